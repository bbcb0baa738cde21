// The class of an item at a penalty: argmax of log2(score) - penalty · log2(cost), the lowest on a tie, with the bits
// of the reference. The difference d of two classes is linear in the penalty, and what float64 may get wrong about it,
// in the reference, grows no faster than a constant plus the penalty. So where d exceeds a bound of all errors at two
// penalties, and for the same class, it does so between them too, and the reference chooses that class at every penalty
// between. Float32 with its own errors in the bound settles nearly all items in a few instructions. The others are
// looked at in float64.
#pragma once

#include <cmath>

#include "common/assign_classes.h"
#include "cuda/assign_classes_items.cuh"

namespace fastroute {
namespace {

struct Prices {
    PerClass<double> log_cost, share;  // log2 of the cost, and its fraction of the most expensive
    PerClass<float> slope;             // log2 of the cost relative to class 0
    double steepest, span;             // the largest of the absolute values of log_cost and of slope
    double allowed;                    // of the mean share
    bool logits;                       // scores are logits
};

// A penalty, the same in float32, and its part of the bound there.
struct Cut {
    double penalty;
    float rough, error;
};

// A difference of two classes in float32 is off by less than 2^-19 · (1 + largest logarithm + |penalty| · span): each
// logarithm by 2^-21 · (1 + itself), each price by 2^-22 of itself, and sums and difference by half of a last bit. In
// the reference it is off by less than 2^-51 · (largest logarithm + |penalty| · steepest); in float64 here by as much.
constexpr float kRoughError = 0x1p-19f;
constexpr double kFineError = 0x1p-49;
// Finite logits beyond this are left to float64.
constexpr float kLargestRough = 0x1p100f;
template <typename W>
inline constexpr W kEndless = std::numeric_limits<W>::infinity();

__device__ __forceinline__ Cut cut_at(double penalty, const Prices& prices) {
    const double error = fabs(penalty) * (kRoughError * prices.span + kFineError * prices.steepest);
    return {penalty, static_cast<float>(penalty), static_cast<float>(error)};
}

// A class, and whether its lead exceeds the bound.
struct Choice {
    int id;
    bool sure;
};

__device__ __forceinline__ float finite_logit(float logit) { return logit; }
__device__ __forceinline__ float larger(float a, float b) { return a < b ? b : a; }
__device__ __forceinline__ float log_of_score(float score) {
    const float log = __log2f(static_cast<float>(kSmallest) < score ? score : static_cast<float>(kSmallest));
    return log < static_cast<float>(kMostLog) ? log : static_cast<float>(kMostLog);
}
__device__ __forceinline__ float log_of_logit(float logit, float most) {
    return larger(-static_cast<float>(kMostLog), (logit - most) * static_cast<float>(kLogOfE));
}

// The logarithms of an item's scores, in float32 or, as the reference has them, in float64: in registers for up to K
// classes; for any number, K = 0, in memory.
template <typename W, typename T, int K>
class Logs {
  public:
    static constexpr bool kExact = std::is_same_v<W, double>;

    // From its score of class 0.
    __device__ __forceinline__ Logs(const T* from, const Items& items, const Prices& prices) : from_(from) {
        W raw[K > 0 ? K : 1];
#pragma unroll
        for (int k = 0; k < K; ++k) raw[k] = present(k, items) ? read(k, items) : W(0);
        settle(raw, items, prices);
    }
    // From those of a run, of which it is number e.
    template <int N>
    __device__ __forceinline__ Logs(const Pack<T, N> (&run)[K > 0 ? K : 1], int e, const Items& items,
                                    const Prices& prices) {
        W raw[K];
#pragma unroll
        for (int k = 0; k < K; ++k) raw[k] = static_cast<W>(static_cast<Work<T>>(run[k].at[e]));
        settle(raw, items, prices);
    }

    __device__ __forceinline__ Choice at(const Cut& cut, const Items& items, const Prices& prices) const {
        W best = value(0, cut, items, prices), second = -kEndless<W>;
        int id = 0;
        const auto compare = [&](int k) {
            const W other = value(k, cut, items, prices);
            second = other > best ? best : larger(second, other);
            if (other > best) best = other, id = k;
        };
        each_class(1, items, compare);
        const W error = kExact ? W(fabs(cut.penalty) * (kFineError * prices.steepest)) : W(cut.error);
        return {id, best - second > error_ + error};
    }

  private:
    // Two classes have kernels of their own; four registers serve up to four.
    __device__ __forceinline__ static bool present(int k, const Items& items) { return K == 2 || k < items.classes; }
    template <typename F>
    __device__ __forceinline__ static void each_class(int first, const Items& items, F&& f) {
        if constexpr (K > 0) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (k >= first) f(k);
            }
        } else {
#pragma unroll 1
            for (int k = first; k < items.classes; ++k) f(k);
        }
    }
    __device__ __forceinline__ W read(int k, const Items& items) const {
        return static_cast<W>(static_cast<Work<T>>(from_[k * items.class_step]));
    }
    __device__ __forceinline__ W log_of(W raw, const Prices& prices) const {
        return prices.logits ? log_of_logit(finite_logit(raw), most_) : log_of_score(raw);
    }
    __device__ __forceinline__ W value(int k, const Cut& cut, const Items& items, const Prices& prices) const {
        const W log = K > 0 ? log_[K > 0 ? k : 0] : log_of(read(k, items), prices);
        if constexpr (kExact) {
            return add(log, -multiply(cut.penalty, prices.log_cost.value[k]));
        } else {
            return k == 0 ? log : log - cut.rough * prices.slope.value[k];
        }
    }
    __device__ __forceinline__ void settle(const W (&raw)[K > 0 ? K : 1], const Items& items, const Prices& prices) {
        const auto own = [&](int k) { return K > 0 ? raw[K > 0 ? k : 0] : read(k, items); };
        most_ = -kEndless<W>;
        W largest = 0;
        bool known = true;
        each_class(0, items, [&](int k) {
            if (!present(k, items)) return;
            // Not so if it is NaN.
            known = known && (kExact || !prices.logits || fabs(own(k)) < W(kLargestRough));
            most_ = larger(most_, finite_logit(own(k)));
        });
        each_class(0, items, [&](int k) {
            const W log = present(k, items) ? log_of(own(k), prices) : -kEndless<W>;
            if constexpr (K > 0) log_[k] = log;
            if (present(k, items)) largest = larger(largest, W(fabs(log)));
        });
        error_ = known ? (kExact ? W(kFineError) : W(kRoughError)) * (1 + largest) : kEndless<W>;
    }

    const T* from_ = nullptr;
    W log_[K > 0 ? K : 1];
    W most_ = 0, error_ = 0;
};

}  // namespace
}  // namespace fastroute
