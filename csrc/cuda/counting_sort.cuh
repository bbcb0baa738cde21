// A stable counting sort of any number of items into any number of classes, in three launches. Every warp owns a
// stretch of items: it counts them by class; one block turns the counts, class by class and stretch by stretch, into
// places; and every warp then places its items. Nothing is added atomically, so the order is that of a sequential sort.
#pragma once

#include "cuda/launch.h"

namespace fastroute {
namespace {

constexpr int kSortThreads = 128;
constexpr int kSortWarps = kSortThreads / 32;
constexpr int kScanThreads = 1024;           // of the one block that scans
constexpr int kScanItems = 8;                // consecutive counts of one thread
constexpr int64_t kStretch = 256;            // items from which a warp of its own pays
constexpr int64_t kMostStretches = 1 << 14;  // more warps than any device holds at a time
constexpr int64_t kMostCounts = 1 << 20;     // one block scans them

struct SortPlan {
    int64_t count, classes;
    int64_t stretches, stretch;  // number and length, a multiple of a warp
};

inline SortPlan sort_plan(int64_t count, int64_t classes) {
    const int64_t most = std::clamp<int64_t>(kMostCounts / classes, 1, kMostStretches);
    const int64_t wanted = std::clamp<int64_t>(blocks_for(count, kStretch), 1, most);
    const int64_t stretch = std::max<int64_t>(blocks_for(blocks_for(count, wanted), 32) * 32, 32);
    return {count, classes, std::max<int64_t>(blocks_for(count, stretch), 1), stretch};
}

// A class out of range is the nearest one: a kernel cannot raise, and what it writes must be a permutation.
template <typename T>
__device__ __forceinline__ int64_t class_of(const T* ids, int64_t n, int64_t classes) {
    const int64_t id = static_cast<int64_t>(ids[n]);
    return id < 0 ? 0 : (id < classes ? id : classes - 1);
}

template <typename T>
__global__ void __launch_bounds__(kSortThreads) sort_count_kernel(const T* __restrict__ ids,  // [N]
                                                                  SortPlan plan,
                                                                  int64_t* __restrict__ counts) {  // [K, stretches]
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t stretch = int64_t{blockIdx.x} * kSortWarps + threadIdx.x / 32;
    if (stretch >= plan.stretches) return;
    for (int64_t k = lane; k < plan.classes; k += 32) counts[k * plan.stretches + stretch] = 0;
    __syncwarp();
    const int64_t begin = stretch * plan.stretch;
    for (int64_t first = begin; first < begin + plan.stretch && first < plan.count; first += 32) {
        const bool present = first + lane < plan.count;
        const unsigned active = __ballot_sync(kFullWarp, present);
        if (present) {
            const int64_t id = class_of(ids, first + lane, plan.classes);
            const unsigned alike = __match_any_sync(active, static_cast<long long>(id));
            if (lane == __ffs(alike) - 1) counts[id * plan.stretches + stretch] += __popc(alike);
        }
        __syncwarp();
    }
}

// Sum of the values of the lanes up to this one.
__device__ __forceinline__ int64_t scan_warp(int64_t value) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int64_t below = __shfl_up_sync(kFullWarp, static_cast<long long>(value), step);
        if (lane >= step) value += below;
    }
    return value;
}

// Counts become the sums of all counts before them, in place, in one block.
__global__ void __launch_bounds__(kScanThreads) sort_scan_kernel(SortPlan plan,
                                                                 int64_t* __restrict__ counts,     // [K, stretches]
                                                                 int64_t* __restrict__ offsets) {  // [K + 1]
    FASTROUTE_SHARED(int64_t, totals, [kScanThreads / 32]);
    const int64_t entries = plan.classes * plan.stretches;
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    int64_t before = 0;
    for (int64_t base = 0; base < entries; base += kScanThreads * kScanItems) {
        const int64_t first = base + threadIdx.x * kScanItems;
        int64_t value[kScanItems], own = 0;
#pragma unroll
        for (int e = 0; e < kScanItems; ++e) {
            value[e] = first + e < entries ? counts[first + e] : 0;
            own += value[e];
        }
        const int64_t up_to = scan_warp(own);
        if (lane == 31) totals[warp] = up_to;
        __syncthreads();
        const int64_t warps = scan_warp(lane < kScanThreads / 32 ? totals[lane] : 0);
        const int64_t earlier = __shfl_sync(kFullWarp, static_cast<long long>(warps), warp == 0 ? 0 : warp - 1);
        int64_t place = before + up_to - own + (warp == 0 ? 0 : earlier);
#pragma unroll
        for (int e = 0; e < kScanItems; ++e) {
            if (first + e < entries) counts[first + e] = place;
            place += value[e];
        }
        before += __shfl_sync(kFullWarp, static_cast<long long>(warps), 31);
        __syncthreads();
    }
    for (int64_t k = threadIdx.x; k < plan.classes; k += kScanThreads) offsets[k] = counts[k * plan.stretches];
    if (threadIdx.x == 0) offsets[plan.classes] = plan.count;
}

template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    sort_place_kernel(const T* __restrict__ ids,  // [N]
                      SortPlan plan,
                      int64_t* __restrict__ places,     // [K, stretches]: of the next item
                      int64_t* __restrict__ order,      // [N]
                      int64_t* __restrict__ inverse) {  // [N] or null
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t stretch = int64_t{blockIdx.x} * kSortWarps + threadIdx.x / 32;
    if (stretch >= plan.stretches) return;
    const int64_t begin = stretch * plan.stretch;
    for (int64_t first = begin; first < begin + plan.stretch && first < plan.count; first += 32) {
        const int64_t n = first + lane;
        const unsigned active = __ballot_sync(kFullWarp, n < plan.count);
        if (n < plan.count) {
            const int64_t id = class_of(ids, n, plan.classes);
            const unsigned alike = __match_any_sync(active, static_cast<long long>(id));
            const int leader = __ffs(alike) - 1;
            long long start = 0;
            if (lane == leader) {
                start = places[id * plan.stretches + stretch];
                places[id * plan.stretches + stretch] = start + __popc(alike);
            }
            start = __shfl_sync(active, start, leader);
            const int64_t place = start + __popc(alike & ((1u << lane) - 1));
            order[place] = n;
            if (inverse != nullptr) inverse[n] = place;
        }
        __syncwarp();
    }
}

// order, inverse (unless null) and offsets of `count` ids of `classes` classes.
template <typename T>
void counting_sort(const Queue& queue, const Tensor& like, const T* ids, int64_t count, int64_t classes, int64_t* order,
                   int64_t* inverse, int64_t* offsets) {
    const SortPlan plan = sort_plan(count, classes);
    const int64_t size[] = {plan.classes * plan.stretches};
    const Tensor table = torch::stable::empty({size, 1}, ScalarType::Long, std::nullopt, like.device());
    int64_t* counts = table.mutable_data_ptr<int64_t>();
    const int64_t blocks = blocks_for(plan.stretches, kSortWarps);
    queue.launch(sort_count_kernel<T>, blocks, kSortThreads, 0, ids, plan, counts);
    queue.launch(sort_scan_kernel, 1, kScanThreads, 0, plan, counts, offsets);
    queue.launch(sort_place_kernel<T>, blocks, kSortThreads, 0, ids, plan, counts, order, inverse);
}

}  // namespace
}  // namespace fastroute
