// The penalty of a budget, bisected on the device with the midpoints of the reference, because near ties rounding makes
// the result depend on them. A pass over the items tries up to 31 midpoints at once: of an interval that ends at 0 the
// next 31 halvings, of any other those that five steps can meet. The choice of an item moves to cheaper classes as the
// penalty grows, so an item is counted once, and again wherever its class changes along them. Counts are integers, so
// adding them atomically gives the same sums in any order. Every block of the next pass works out the decisions for
// itself.
#pragma once

#include <cmath>

#include "common/assign_classes.h"
#include "common/host_device.h"
#include "cuda/launch.h"

namespace fastroute {
namespace {

constexpr int kMostClasses = 256;
constexpr int kSteps = 5;                // of the bisection in one pass
constexpr int kPenalties = 1 << kSteps;  // the lower end and the midpoints
constexpr int kHalvings = kPenalties - 1;
constexpr int kBudgetThreads = 256;
// Over all blocks; one block takes what is left.
#ifndef FASTROUTE_BUDGET_PASSES
#define FASTROUTE_BUDGET_PASSES 64
#endif
constexpr int kMostPasses = FASTROUTE_BUDGET_PASSES;
constexpr int64_t kFewItems = 4096;  // one block alone is as fast

// Scores [B, K, L]: item (b, l) has class k's score at (b·K + k)·L + l.
struct Items {
    int64_t batch, classes, length;

    FASTROUTE_HOST_DEVICE int64_t count() const { return batch * length; }
};

// One number per class, as an argument of a kernel.
struct PerClass {
    double value[kMostClasses];
};

struct Prices {
    PerClass log_cost, share;  // log2 of the cost, and its fraction of the most expensive
    double allowed;            // of the mean share
    bool logits;               // scores are logits
};

// An interval of penalties whose upper end fits the budget. `settled`: nothing is left to bisect.
struct Interval {
    double low, high;
    int started, settled;
};

using Count = unsigned long long;

// What the passes leave for each other: intervals in turn, and counts [kPenalties, K] and open items in turns of three.
struct BudgetState {
    Interval* intervals;  // [2]
    Count* counts;        // [3][kPenalties · K + 1]

    static int64_t bytes(int64_t classes) {
        return 2 * static_cast<int64_t>(sizeof(Interval)) + 3 * (kPenalties * classes + 1) * int64_t{sizeof(Count)};
    }
    BudgetState(void* memory)
        : intervals(static_cast<Interval*>(memory)), counts(reinterpret_cast<Count*>(intervals + 2)) {}

    FASTROUTE_HOST_DEVICE Count* turn(int pass, int64_t classes) const {
        return counts + pass % 3 * (kPenalties * classes + 1);
    }
};

// The class of one item at a penalty: argmax of log2(score) - penalty · log2(cost), the lowest class on a tie.
template <typename T>
__device__ int choose(const T* score, const Items& items, const Prices& prices, double penalty) {
    const auto at = [&](int k) { return static_cast<double>(static_cast<Work<T>>(score[k * items.length])); };
    double most = -kLargest;
    for (int k = 0; prices.logits && k < items.classes; ++k) most = larger(most, finite_logit(at(k)));
    int best = 0;
    double value = 0;
    for (int k = 0; k < items.classes; ++k) {
        const double log = prices.logits ? log_of_logit(finite_logit(at(k)), most) : log_of_score(at(k));
        const double other = add(log, -multiply(penalty, prices.log_cost.value[k]));
        if (k == 0 || other > value) value = other, best = k;
    }
    return best;
}

// Below the first of these a penalty moves no score but those of 1, whose logarithm is 0, and a power of 2 as factor
// changes no choice while penalty · log2(cost) is a normal number: all logarithms but 0 are at least 2^-53. The second
// takes what a pass leaves below the first, which is above 2^-160, to where 2^-53 times it is still normal.
constexpr double kTiny = 0x1p-128, kLeap = 0x1p-800;

// Passes that always suffice for an interval of penalties [-bound, bound]: halvings down to kTiny, halvings from there
// times kLeap to the last double, 2^-1074, and 53 bits below a power of 2.
int passes_for(double bound) {
    const int halvings = static_cast<int>(blocks_for(std::ilogb(bound) + 1 + 128, kHalvings)) +
                         static_cast<int>(blocks_for(1075 - 800 - 128, kHalvings));
    return 1 + halvings + static_cast<int>(blocks_for(53, kSteps));
}

// How a pass cuts an interval. The first tries its middle alone: between the widest ends nearly all items differ.
enum class Cut { middle, halves_down, halves_up, five_steps };

__device__ __forceinline__ Cut cut_of(const Interval& interval) {
    if (interval.started == 0) return Cut::middle;
    if (interval.low == 0) return Cut::halves_down;
    return interval.high == 0 ? Cut::halves_up : Cut::five_steps;
}

// The penalties of a pass, in order: [0] is the lower and [kPenalties] the upper end of the interval.
__device__ void spread(const Interval& interval, double* penalty) {
    penalty[0] = interval.low, penalty[kPenalties] = interval.high;
    const Cut cut = cut_of(interval);
    if (cut == Cut::middle) {
        for (int at = 1; at < kPenalties; ++at) penalty[at] = multiply(0.5, add(interval.low, interval.high));
    } else if (cut == Cut::halves_down) {
        for (int at = kPenalties - 1; at > 0; --at) penalty[at] = multiply(0.5, penalty[at + 1]);
    } else if (cut == Cut::halves_up) {
        for (int at = 1; at < kPenalties; ++at) penalty[at] = multiply(0.5, penalty[at - 1]);
    } else {
        for (int half = kPenalties / 2; half > 0; half /= 2) {
            for (int at = half; at < kPenalties; at += 2 * half) {
                penalty[at] = multiply(0.5, add(penalty[at - half], penalty[at + half]));
            }
        }
    }
}

// What the steps of one pass make of an interval. counts [kPenalties, K] hold, from one penalty to the next, the change
// of the number of items of each class; `open` items differ between the ends. All threads of a block call this.
__device__ Interval narrowed(const Interval& interval, const Count* counts, Count open, const Items& items,
                             const Prices& prices) {
    FASTROUTE_SHARED(int, fits, [kPenalties]);
    FASTROUTE_SHARED(double, penalty, [kPenalties + 1]);
    if (interval.settled != 0) return interval;
    __syncthreads();
    if (threadIdx.x == 0) spread(interval, penalty);
    if (threadIdx.x < kPenalties) {
        double sum = 0;
        for (int64_t k = 0; k < items.classes; ++k) {
            Count number = 0;
            for (int p = 0; p <= static_cast<int>(threadIdx.x); ++p) number += counts[p * items.classes + k];
            sum = add(sum, multiply(static_cast<double>(number), prices.share.value[k]));
        }
        fits[threadIdx.x] = sum / static_cast<double>(items.count()) <= prices.allowed + kBudgetSlack ? 1 : 0;
    }
    __syncthreads();
    Interval next = interval;
    next.started = 1;
    // Only before the first step may the lower end fit.
    if (interval.started == 0 && fits[0] != 0) {
        next.high = interval.low, next.settled = 1;
        return next;
    }
    const Cut cut = cut_of(interval);
    int low = 0, high = kPenalties;
    while (high - low > 1) {
        const int middle = cut == Cut::halves_down ? high - 1 : (cut == Cut::halves_up ? low + 1 : (low + high) / 2);
        if (penalty[middle] == penalty[low] || penalty[middle] == penalty[high]) {
            next.settled = cut == Cut::middle ? 0 : 1;
            break;
        }
        (fits[middle] != 0 ? high : low) = middle;
    }
    next.low = penalty[low], next.high = penalty[high];
    if (open == 0) next.settled = 1;
    const auto leap = [](double end) { return fabs(end) < kTiny && fabs(end) > kTiny * 0x1p-32 ? end * kLeap : end; };
    if (next.low == 0) next.high = leap(next.high);
    if (next.high == 0) next.low = leap(next.low);
    return next;
}

// Counts the items of this block, every `step`-th of them from `first` on, in shared memory [kPenalties · K + 1]. All
// threads of the block call this.
template <typename T>
__device__ void count_items(const T* score, const Items& items, const Prices& prices, const Interval& interval,
                            int64_t first, int64_t step, unsigned* counts) {
    FASTROUTE_SHARED(double, penalty, [kPenalties + 1]);
    const Cut cut = cut_of(interval);
    const int tries = cut == Cut::middle ? 1 : kHalvings;
    const bool down = cut == Cut::halves_down;
    __syncthreads();
    if (threadIdx.x == 0) spread(interval, penalty);
    for (int64_t e = threadIdx.x; e < kPenalties * items.classes + 1; e += kBudgetThreads) counts[e] = 0;
    __syncthreads();
    for (int64_t n = first; n < items.count(); n += step) {
        const T* own = score + n / items.length * items.classes * items.length + n % items.length;
        const int expensive = choose(own, items, prices, penalty[0]);
        const int cheap = choose(own, items, prices, penalty[kPenalties]);
        atomicAdd(&counts[expensive], 1u);
        if (expensive == cheap) continue;
        atomicAdd(&counts[kPenalties * items.classes], 1u);
        const auto change = [&](int at, int from, int to) {
            if (from == to || at == kPenalties) return;
            atomicAdd(&counts[at * items.classes + to], 1u);
            atomicAdd(&counts[at * items.classes + from], ~0u);
        };
        // Halvings are tried towards 0, until the class is that at 0. Of five steps all are: where ties are near,
        // rounding may turn the order of classes back.
        const int goal = down ? expensive : cheap;
        int here = down ? cheap : expensive;
        for (int tried = 1; tried <= tries && (here != goal || cut == Cut::five_steps); ++tried) {
            const int p = down ? kPenalties - tried : tried;
            const int next = choose(own, items, prices, penalty[p]);
            if (down) {
                change(p + 1, next, here);
            } else {
                change(p, here, next);
            }
            here = next;
        }
        if (down) change(1, expensive, here);
    }
}

// Pass number `pass`: decides the steps of the pass before it, then counts.
template <typename T>
__global__ void __launch_bounds__(kBudgetThreads, 2)
    assign_classes_pass_kernel(const T* __restrict__ score,  // [B, K, L]
                               Items items, const __grid_constant__ Prices prices, int pass, BudgetState state) {
    FASTROUTE_DYNAMIC_SHARED(unsigned, counts);
    const int64_t entries = kPenalties * items.classes + 1;
    Interval interval = state.intervals[pass % 2];
    if (pass > 0) {
        const Count* before = state.turn(pass - 1, items.classes);
        interval = narrowed(interval, before, before[entries - 1], items, prices);
    }
    if (blockIdx.x == 0) {
        // The next pass counts here: nobody else looks at it now.
        for (int64_t e = threadIdx.x; e < entries; e += kBudgetThreads) state.turn(pass + 1, items.classes)[e] = 0;
        if (threadIdx.x == 0) state.intervals[(pass + 1) % 2] = interval;
    }
    if (interval.settled != 0) return;
    count_items(score, items, prices, interval, int64_t{blockIdx.x} * kBudgetThreads + threadIdx.x,
                int64_t{gridDim.x} * kBudgetThreads, counts);
    __syncthreads();
    // Differences wrap around, and do so in the same way in a wider type when their sign is kept.
    for (int64_t e = threadIdx.x; e < entries; e += kBudgetThreads) {
        const int change = static_cast<int>(counts[e]);
        if (change != 0)
            atomicAdd(&state.turn(pass, items.classes)[e], static_cast<Count>(static_cast<long long>(change)));
    }
}

// Decides the last pass and goes on alone, in one block, until nothing is left; `passes` went before.
template <typename T>
__global__ void __launch_bounds__(kBudgetThreads, 2)
    assign_classes_finish_kernel(const T* __restrict__ score,  // [B, K, L]
                                 Items items, const __grid_constant__ Prices prices, int passes, BudgetState state) {
    FASTROUTE_DYNAMIC_SHARED(unsigned, counts);
    const int64_t entries = kPenalties * items.classes + 1;
    Interval interval = state.intervals[passes % 2];
    if (passes > 0) {
        const Count* before = state.turn(passes - 1, items.classes);
        interval = narrowed(interval, before, before[entries - 1], items, prices);
    }
    Count* total = state.turn(passes, items.classes);
    while (interval.settled == 0) {
        count_items(score, items, prices, interval, threadIdx.x, kBudgetThreads, counts);
        __syncthreads();
        for (int64_t e = threadIdx.x; e < entries; e += kBudgetThreads) {
            total[e] = static_cast<Count>(static_cast<long long>(static_cast<int>(counts[e])));
        }
        // Every thread reads what all wrote; narrowed() waits before it reads, and its result is the same in all.
        __syncthreads();
        interval = narrowed(interval, total, total[entries - 1], items, prices);
    }
    if (threadIdx.x == 0) state.intervals[(passes + 1) % 2] = interval;
}

}  // namespace
}  // namespace fastroute
