// The penalty of a budget, bisected on the device with the midpoints of the reference, because near ties rounding makes
// the result depend on them. A pass over the items takes up to eight steps: it counts the classes at every midpoint
// that these can meet; of an interval that ends at 0, at the next halvings. The choice of an item moves to cheaper
// classes as the penalty grows, so it is counted once, and again wherever its class changes; most change nowhere in the
// interval, and two looks tell (assign_classes_choice.cuh). Counts are integers, so adding them atomically gives the
// same sums in any order. Every block of the next pass works out the decisions for itself.
#pragma once

#include "cuda/assign_classes_choice.cuh"

namespace fastroute {
namespace {

constexpr int kBudgetThreads = 256;
// Of a multiprocessor: half of its threads, but in float64, which is there for precision, and for more than four
// classes.
template <typename T, int K>
inline constexpr int kBudgetBlocks = kPrecise<T> ? 2 : (K > 0 ? 4 : 3);
// Over all blocks; one block takes what is left.
#ifndef FASTROUTE_BUDGET_PASSES
#define FASTROUTE_BUDGET_PASSES 16
#endif
constexpr int kMostPasses = FASTROUTE_BUDGET_PASSES;
constexpr int64_t kFewItems = 4096;  // one block alone is as fast

// Steps of a pass of a kernel for K classes, and the penalties from one end of its interval to the other: as many as a
// block has threads, or fewer where the counts of up to 256 classes must fit into shared memory.
template <int K>
inline constexpr int kSteps = K > 0 ? 8 : 5;
template <int K>
inline constexpr int kCuts = 1 << kSteps<K>;

// An interval of penalties whose upper end fits the budget. `settled`: nothing is left to bisect.
struct Interval {
    double low, high;
    int started, settled;
};

using Count = unsigned long long;

// What the passes leave for each other: intervals in turns of two, and in turns of three how the number of items of
// each class changes from cut to cut.
struct BudgetState {
    Interval* intervals;  // [2]
    Count* counts;        // [3][K, cuts]
    int64_t entries;      // K · cuts

    static int64_t bytes(int64_t entries) {
        return 2 * static_cast<int64_t>(sizeof(Interval)) + 3 * entries * int64_t{sizeof(Count)};
    }
    BudgetState(void* memory, int64_t entries_of)
        : intervals(static_cast<Interval*>(memory)),
          counts(reinterpret_cast<Count*>(intervals + 2)),
          entries(entries_of) {}

    FASTROUTE_HOST_DEVICE Count* turn(int pass) const { return counts + pass % 3 * entries; }
};

// Passes that always suffice for an interval of penalties [-bound, bound] and `steps` of a pass: halvings down to the
// last double, 2^-1074, and then 52 bits below a power of 2.
int passes_for(double bound, int steps) {
    const int64_t halvings = std::ilogb(bound) + 1 + 1074, first = (1 << steps) / 2 - 1;
    return 1 + static_cast<int>(blocks_for(std::max<int64_t>(halvings - first, 0), (1 << steps) - 1)) +
           static_cast<int>(blocks_for(52, steps));
}

// How a pass cuts an interval: the reference tries 0 first and then halves towards it, from one side, where an end or
// the middle is 0.
enum class Cutting { halves, steps };

__device__ __forceinline__ Cutting cutting_of(const Interval& interval) {
    return interval.low == 0 || interval.high == 0 || interval.low == -interval.high ? Cutting::halves : Cutting::steps;
}

// `end` halved so many times, each time rounded.
__device__ __forceinline__ double halved(double end, int times) {
    const int exact = min(times, max(ilogb(end) + 1022, 0));
    double value = scalbn(end, -exact);
    for (int n = exact; n < times; ++n) value = multiply(0.5, value);
    return value;
}

// The penalties of a pass in order: [0] is the lower and [cuts] the upper end of the interval. All threads of a block
// call this.
template <int kLast>
__device__ void spread(const Interval& interval, double* penalty) {  // [kLast + 1]
    const int at = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (at == 0) penalty[0] = interval.low, penalty[kLast] = interval.high;
    if (cutting_of(interval) == Cutting::halves) {
        const int zero = interval.low == 0 ? 0 : (interval.high == 0 ? kLast : kLast / 2);
        if (at > 0 && at < kLast) {
            penalty[at] = at < zero ? halved(interval.low, at) : (at > zero ? halved(interval.high, kLast - at) : 0.0);
        }
    } else {
#pragma unroll 1
        for (int half = kLast / 2; half > 0; half /= 2) {
            __syncthreads();
            const int own = half + 2 * half * at;
            if (own < kLast) penalty[own] = multiply(0.5, add(penalty[own - half], penalty[own + half]));
        }
    }
    __syncthreads();
}

// Sum of the values of the threads up to this one. All threads of a block call this.
__device__ __forceinline__ Count scan_block(Count value) {
    FASTROUTE_SHARED(Count, totals, [kBudgetThreads / 32]);
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Count below = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value += below;
    }
    __syncthreads();
    if (lane == 31) totals[warp] = value;
    __syncthreads();
    for (int w = 0; w < warp; ++w) value += totals[w];
    return value;
}

// What the steps of one pass make of an interval, from its counts. All threads of a block call this.
template <int K>
__device__ Interval narrowed(const Interval& interval, const Count* counts, const Items& items, const Prices& prices) {
    constexpr int kLast = kCuts<K>;
    FASTROUTE_SHARED(int, fits, [kLast]);
    FASTROUTE_SHARED(double, penalty, [kLast + 1]);
    if (interval.settled != 0) return interval;
    spread<kLast>(interval, penalty);
    const int at = static_cast<int>(threadIdx.x);
    double sum = 0;
#pragma unroll 1
    for (int64_t k = 0; k < items.classes; ++k) {
        const Count number = scan_block(at < kLast ? counts[k * kLast + at] : 0);
        sum = add(sum, multiply(static_cast<double>(number), prices.share.value[k]));
    }
    if (at < kLast) fits[at] = sum / static_cast<double>(items.count()) <= prices.allowed + kBudgetSlack ? 1 : 0;
    __syncthreads();
    Interval next = interval;
    next.started = 1;
    // Only before the first step may the lower end fit.
    if (interval.started == 0 && fits[0] != 0) {
        next.high = interval.low, next.settled = 1;
        return next;
    }
    const bool halves = cutting_of(interval) == Cutting::halves;
    int low = 0, high = kLast;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (halves && penalty[low] == 0) middle = high - 1;
        if (halves && penalty[high] == 0) middle = low + 1;
        if (penalty[middle] == penalty[low] || penalty[middle] == penalty[high]) {
            next.settled = 1;
            break;
        }
        (fits[middle] != 0 ? high : low) = middle;
    }
    next.low = penalty[low], next.high = penalty[high];
    return next;
}

// What an item adds to the counts of a block, from cut `at` on, where its class is `here`. False where these logarithms
// cannot tell what it is at the next cut.
template <int kLast, typename Own>
__device__ __forceinline__ bool follow(const Own& own, const Items& items, const Prices& prices, const Cut* cuts,
                                       unsigned* counts, int& at, Choice& here) {
    const Choice end = own.at(cuts[kLast], items, prices);
    for (;;) {
        if (here.sure) {
            if (end.sure && end.id == here.id) return true;
            // The last cut up to which nothing changes; it is at `high` that nobody knows.
            int high = kLast;
            while (high - at > 1) {
                const int middle = (at + high) / 2;
                const Choice there = own.at(cuts[middle], items, prices);
                (there.sure && there.id == here.id ? at : high) = middle;
            }
        }
        if (at + 1 == kLast) return true;
        const Choice next = own.at(cuts[at + 1], items, prices);
        if (!Own::kExact && !next.sure) return false;
        ++at;
        if (next.id != here.id) {
            atomicAdd(&counts[next.id * kLast + at], 1u);
            atomicAdd(&counts[here.id * kLast + at], ~0u);
        }
        here = next;
    }
}

// The same from the lower end on.
template <int kLast, typename T, int K>
__device__ __forceinline__ void count_item(const T* from, const Items& items, const Prices& prices, const Cut* cuts,
                                           unsigned* counts) {
    int at = 0;
    const Logs<Work<T>, T, K> own(from, items, prices);
    Choice here = own.at(cuts[0], items, prices);
    const bool known = here.sure || Logs<Work<T>, T, K>::kExact;
    if (known) {
        atomicAdd(&counts[here.id * kLast], 1u);
        if (follow<kLast>(own, items, prices, cuts, counts, at, here)) return;
    }
    const Logs<double, T, K> fine(from, items, prices);
    here = fine.at(cuts[at], items, prices);
    if (!known) atomicAdd(&counts[here.id * kLast], 1u);
    follow<kLast>(fine, items, prices, cuts, counts, at, here);
}

// Counts the runs of items of this block in shared memory [K, cuts]. All threads of the block call this.
template <typename T, int K>
__device__ void count_items(const T* score, const Items& items, const Turns& turns, const Prices& prices,
                            const Interval& interval, unsigned* counts) {
    constexpr int kLast = kCuts<K>, kRun = K > 0 ? kPack<T> : 1;
    FASTROUTE_SHARED(double, penalty, [kLast + 1]);
    FASTROUTE_SHARED(Cut, cuts, [kLast + 1]);
    spread<kLast>(interval, penalty);
    for (int at = static_cast<int>(threadIdx.x); at <= kLast; at += kBudgetThreads) {
        cuts[at] = cut_at(penalty[at], prices);
    }
#pragma unroll 1
    for (int64_t e = threadIdx.x; e < kLast * items.classes; e += kBudgetThreads) counts[e] = 0;
    __syncthreads();
    if constexpr (K == 0) {
        for (Runs<1> run(items, turns); run.more(); run.next()) {
            count_item<kLast, T, K>(run.scores(score), items, prices, cuts, counts);
        }
    } else {
        unsigned settled[K] = {};
        for (Runs<kRun> run(items, turns); run.more(); run.next()) {
            const T* from = run.scores(score);
            const int count = run.count();
            unsigned left = (1u << count) - 1;
            Pack<T, kRun> pack[K] = {};
            load_classes(from, items, count, pack);
#pragma unroll
            for (int e = 0; e < kRun; ++e) {
                const Logs<Work<T>, T, K> own(pack, e, items, prices);
                const Choice low = own.at(cuts[0], items, prices), high = own.at(cuts[kLast], items, prices);
                const bool same = low.sure && high.sure && low.id == high.id && (count == kRun || e < count);
                left &= ~(unsigned{same} << e);
#pragma unroll
                for (int k = 1; k < K; ++k) settled[k] += unsigned{same && low.id == k};
            }
            settled[0] += static_cast<unsigned>(count - __popc(left));
            for (; left != 0; left &= left - 1) {
                const int e = __ffs(static_cast<int>(left)) - 1;
                count_item<kLast, T, K>(from + e * items.item_step, items, prices, cuts, counts);
            }
        }
        const auto add_up = [&](unsigned number, unsigned* to) {
            const unsigned sum = __reduce_add_sync(kFullWarp, number);
            if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(to, sum);
        };
        // Those of class 0 are the rest.
#pragma unroll
        for (int k = 1; k < K; ++k) {
            settled[0] -= settled[k];
            if (k < items.classes) add_up(settled[k], &counts[k * kLast]);
        }
        add_up(settled[0], &counts[0]);
    }
    __syncthreads();
}

// Pass number `pass`: decides the steps of the pass before it, then counts. `alone`, in one block, it goes on until
// nothing is left.
template <typename T, int K>
__global__ void __launch_bounds__(kBudgetThreads, kBudgetBlocks<T, K>)
    assign_classes_pass_kernel(const T* __restrict__ score,  // [B, K, L]
                               const __grid_constant__ Items items, const __grid_constant__ Turns turns,
                               const __grid_constant__ Prices prices, int pass, int alone, BudgetState state) {
    FASTROUTE_DYNAMIC_SHARED(unsigned, counts);
    if (blockIdx.x == 0) {
        // The next pass counts here: nobody else looks at it now.
#pragma unroll 1
        for (int64_t e = threadIdx.x; e < state.entries; e += kBudgetThreads) state.turn(pass + 1)[e] = 0;
    }
    for (int counted = pass - 1;; counted = pass) {
        Interval interval = state.intervals[(counted + 1) % 2];
        if (counted >= 0) interval = narrowed<K>(interval, state.turn(counted), items, prices);
        if (blockIdx.x == 0 && threadIdx.x == 0) state.intervals[(pass + 1) % 2] = interval;
        if (interval.settled != 0) return;
        count_items<T, K>(score, items, turns, prices, interval, counts);
        // Differences wrap around, and do so in the same way in a wider type when their sign is kept.
#pragma unroll 1
        for (int64_t e = threadIdx.x; e < state.entries; e += kBudgetThreads) {
            const auto change = static_cast<Count>(static_cast<long long>(static_cast<int>(counts[e])));
            if (alone != 0) {
                state.turn(pass)[e] = change;
            } else if (change != 0) {
                atomicAdd(&state.turn(pass)[e], change);
            }
        }
        if (alone == 0) return;
        // Every thread reads what all wrote; narrowed() waits before it reads, and its result is the same in all.
    }
}

}  // namespace
}  // namespace fastroute
