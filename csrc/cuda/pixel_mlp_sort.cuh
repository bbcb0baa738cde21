// The pixels of a chunk grouped by class: a stable counting sort whose counts never leave the device.
// Work mapping: a block sorts kSortPixels pixels, each warp a run of them, 32 at a time; a lane's rank among those of
// its class is a count of lower lanes. Pixels of a class keep their order, so neighbours stay neighbours.
#pragma once

#include "cuda/pixel_mlp_data.cuh"

namespace fastroute::pixel_mlp {

inline constexpr int kSortThreads = 256;  // as many as there can be classes: one thread per class where one is needed
inline constexpr int kSortWarps = kSortThreads / 32;
inline constexpr uint32_t kSortSteps = 16;  // of 32 pixels, per warp
inline constexpr uint32_t kSortPixels = kSortThreads * kSortSteps;

// Exclusive sum over the threads of a block; `sums` has room for one number per thread.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t* sums) {
    const uint32_t thread = threadIdx.x;
    uint32_t total = value;
    sums[thread] = total;
    __syncthreads();
    for (uint32_t step = 1; step < kSortThreads; step *= 2) {
        const uint32_t other = thread >= step ? sums[thread - step] : 0;
        __syncthreads();
        sums[thread] = total += other;
        __syncthreads();
    }
    return total - value;
}

// f(pixel, class, lanes of the same class) for the pixels of this warp, 32 at a time; class kNoClass beyond the last.
template <typename F>
__device__ __forceinline__ void for_pixels(const ClassMap& map, uint32_t count, const F& f) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t first = blockIdx.x * kSortPixels + warp * 32 * kSortSteps + lane;
    for (uint32_t step = 0; step < kSortSteps; ++step) {
        const uint32_t pixel = first + step * 32;
        const uint32_t id = pixel < count ? map.at(pixel) : kNoClass;
        f(pixel, id, __match_any_sync(kFullWarp, id));
    }
}

// Adds to number[warp][class] the pixels of this warp.
__device__ __forceinline__ void count_warps(const ClassMap& map, uint32_t count, uint32_t (*number)[kSortThreads]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int w = 0; w < kSortWarps; ++w) number[w][threadIdx.x] = 0;
    __syncthreads();
    for_pixels(map, count, [&](uint32_t, uint32_t id, uint32_t peers) {
        // The lowest lane of each class adds for all of them.
        if (id != kNoClass && (peers & ((1u << lane) - 1)) == 0) number[warp][id] += __popc(peers);
        __syncwarp();
    });
    __syncthreads();
}

// counts[class][block] = the pixels of each class in each block.
__global__ void __launch_bounds__(kSortThreads, 4)
    pixel_mlp_count_kernel(ClassMap map, uint32_t count, uint32_t* counts /* [K, blocks] */) {
    FASTROUTE_SHARED(uint32_t, number, [kSortWarps][kSortThreads]);
    count_warps(map, count, number);
    if (threadIdx.x >= map.classes) return;
    uint32_t total = 0;
    for (int w = 0; w < kSortWarps; ++w) total += number[w][threadIdx.x];
    counts[threadIdx.x * gridDim.x + blockIdx.x] = total;
}

// Per class, counts become the sums before each block, and totals[class] the sum of all. One block per class.
__global__ void __launch_bounds__(kSortThreads, 4)
    pixel_mlp_scan_kernel(uint32_t blocks, uint32_t* counts /* [K, blocks] */, uint32_t* totals /* [K] */) {
    FASTROUTE_SHARED(uint32_t, sums, [kSortThreads]);
    uint32_t* row = counts + static_cast<int64_t>(blockIdx.x) * blocks;
    uint32_t before = 0;
    for (uint32_t begin = 0; begin < blocks; begin += kSortThreads) {
        const uint32_t at = begin + threadIdx.x, value = at < blocks ? row[at] : 0;
        const uint32_t sum = exclusive_sum(value, sums);
        if (at < blocks) row[at] = before + sum;
        before += sums[kSortThreads - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// Writes the list, and where each class begins in it: starts[class], the end of the last class behind them.
__global__ void __launch_bounds__(kSortThreads, 4)
    pixel_mlp_scatter_kernel(ClassMap map, uint32_t count, const uint32_t* counts /* [K, blocks] */,
                             const uint32_t* totals /* [K] */, uint32_t* starts /* [K + 1] */,
                             uint32_t* pixels /* [count] */) {
    FASTROUTE_SHARED(uint32_t, number, [kSortWarps][kSortThreads]);
    FASTROUTE_SHARED(uint32_t, sums, [kSortThreads]);
    const uint32_t id = threadIdx.x;
    const uint32_t total = id < map.classes ? totals[id] : 0, start = exclusive_sum(total, sums);
    if (blockIdx.x == 0 && id < map.classes) {
        starts[id] = start;
        if (id + 1 == map.classes) starts[id + 1] = start + total;
    }
    count_warps(map, count, number);
    if (id < map.classes) {
        uint32_t next = start + counts[id * gridDim.x + blockIdx.x];
        for (int w = 0; w < kSortWarps; ++w) {
            const uint32_t own = number[w][id];
            number[w][id] = next;
            next += own;
        }
    }
    __syncthreads();
    const uint32_t lower = (1u << threadIdx.x % 32) - 1, warp = threadIdx.x / 32;
    for_pixels(map, count, [&](uint32_t pixel, uint32_t which, uint32_t peers) {
        const uint32_t rank = __popc(peers & lower);
        const uint32_t place = which == kNoClass ? 0 : number[warp][which] + rank;
        __syncwarp();
        if (which != kNoClass) {
            pixels[place] = pixel;
            if (rank == 0) number[warp][which] += __popc(peers);
        }
        __syncwarp();
    });
}

// The residual, or 0, at pixels of free classes. One thread per pixel.
struct FreeClasses {
    uint32_t bits[8];  // bit k of the whole: class k is free

    FASTROUTE_HOST_DEVICE bool has(uint32_t id) const { return id == kNoClass || (bits[id / 32] >> id % 32 & 1) != 0; }
};

template <typename T>
__global__ void __launch_bounds__(kSortThreads, 4)
    pixel_mlp_free_kernel(Pixels<T> p, ClassMap map /* data null: all pixels */, FreeClasses free) {
    const uint32_t pixel = blockIdx.x * kSortThreads + threadIdx.x;
    if (pixel >= p.count() || (map.data != nullptr && !free.has(map.at(pixel)))) return;
    const At<Work<T>> at = pixel_at(p, pixel);
    for (int32_t c = 0; c < p.channels; ++c) store_pixel(p, at, c, Work<T>(0));
}

}  // namespace fastroute::pixel_mlp
