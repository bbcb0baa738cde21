// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits (assign_classes_budget.h). Blocks of items are compared side by side, by
// all threads.
#include "common/assign_classes.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/assign_classes_budget.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

constexpr int64_t kBlock = 256;  // items compared side by side

// out[l] = argmax over k of score · scale[k]; the lowest class wins a tie. Tells whether a score was NaN.
template <typename T, typename Id>
struct ArgmaxBody {
    using W = Work<T>;

    // Steps that the compiler knows make whole vectors of the loads.
    FASTROUTE_INLINE static void run(const T* score, Items items, const W* scale, int64_t count, Id* out,
                                     int32_t* nan) {
        if (items.classes != 2) {
            any(score, items, scale, count, out, nan);
        } else if (items.item_step == 1) {
            two<1>(score, score + items.class_step, scale, count, out, nan);
        } else if (items.item_step == 2 && items.class_step == 1) {
            two<2>(score, score + 1, scale, count, out, nan);
        } else {
            any(score, items, scale, count, out, nan);
        }
    }

    // Two classes are the usual number of a choice per pixel.
    template <int Step>
    FASTROUTE_INLINE static void two(const T* __restrict first, const T* __restrict second, const W* scale,
                                     int64_t count, Id* __restrict out, int32_t* nan) {
        const W scale0 = scale[0], scale1 = scale[1];
        int32_t bad = 0;
        for (int64_t l = 0; l < count; ++l) {
            const W a = static_cast<W>(first[Step * l]) * scale0, b = static_cast<W>(second[Step * l]) * scale1;
            bad |= (a != a) | (b != b);
            out[l] = static_cast<Id>(b > a);
        }
        *nan = bad;
    }

    FASTROUTE_INLINE static void any(const T* score, Items items, const W* scale, int64_t count, Id* out,
                                     int32_t* nan) {
        int32_t best[kBlock];
        W value[kBlock], other[kBlock];
        int32_t bad = weigh(score, items.item_step, scale[0], count, value);
        for (int64_t l = 0; l < count; ++l) best[l] = 0;
        for (int64_t k = 1; k < items.classes; ++k) {
            bad |= weigh(score + k * items.class_step, items.item_step, scale[k], count, other);
            for (int64_t l = 0; l < count; ++l) {
                best[l] = other[l] > value[l] ? static_cast<int32_t>(k) : best[l];
                value[l] = other[l] > value[l] ? other[l] : value[l];
            }
        }
        for (int64_t l = 0; l < count; ++l) out[l] = static_cast<Id>(best[l]);
        *nan = bad;
    }

    // The scores of one class times `scale`; whether one is NaN.
    FASTROUTE_INLINE static int32_t weigh(const T* score, int64_t step, W scale, int64_t count, W* to) {
        if (step == 1) return weigh_run<1>(score, step, scale, count, to);
        if (step == 3) return weigh_run<3>(score, step, scale, count, to);
        return weigh_run<0>(score, step, scale, count, to);
    }

    template <int Step>
    FASTROUTE_INLINE static int32_t weigh_run(const T* __restrict score, int64_t step, W scale, int64_t count,
                                              W* __restrict to) {
        int32_t bad = 0;
        for (int64_t l = 0; l < count; ++l) {
            to[l] = static_cast<W>(score[l * (Step > 0 ? Step : step)]) * scale;
            bad |= to[l] != to[l];
        }
        return bad;
    }
};

template <typename T, typename Id>
void assign_by_penalty(const T* score, Items items, const std::vector<double>& cost, double penalty, Id* ids) {
    using W = Work<T>;
    std::vector<W> scale;
    for (const double s : penalty_scales(cost, penalty)) scale.push_back(static_cast<W>(s));
    std::atomic<bool> nan{false};
    const int64_t blocks = (items.length + kBlock - 1) / kBlock;
    parallel(items.batch * blocks, 16, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t b = item / blocks, first = item % blocks * kBlock;
            const int64_t count = std::min(kBlock, items.length - first);
            const T* from = score + b * items.batch_step + first * items.item_step;
            Id* to = ids + b * items.length + first;
            int32_t bad = 0;
            run_isa<ArgmaxBody<T, Id>, kPrecise<T>>(from, items, scale.data(), count, to, static_cast<int32_t*>(&bad));
            if (bad != 0) nan = true;
        }
    });
    if (nan) fail(kOp, ": score must not be NaN");
}

// Where the scores of `score` [N, K, ...] lie; nothing where the dimensions behind the classes are no run of items.
std::optional<Items> items_of(const Tensor& score) {
    Items items{.batch = score.size(0),
                .classes = score.size(1),
                .length = 1,
                .batch_step = score.stride(0),
                .class_step = score.stride(1),
                .item_step = 1};
    bool first = true;
    for (int64_t d = score.dim() - 1; d >= 2; --d) {
        if (score.size(d) == 1) continue;
        if (first) items.item_step = score.stride(d);
        if (score.stride(d) != items.length * items.item_step) return std::nullopt;
        items.length *= score.size(d);
        first = false;
    }
    // One item each: the runs are items.
    if (items.length == 1) {
        std::swap(items.batch, items.length);
        items.item_step = std::exchange(items.batch_step, 0);
    }
    return items;
}

// The scores as runs of items, copied where their strides are no such runs.
template <typename T, typename F>
void with_items(const Tensor& score, F&& run) {
    check_cpu(kOp, "score", score);
    const std::optional<Items> found = items_of(score);
    const Tensor dense = found.has_value() ? score : torch::stable::contiguous(score);
    run(dense.const_data_ptr<T>(), found.has_value() ? *found : *items_of(dense));
}

template <typename T>
void run_assign_classes(const Tensor& score, const std::vector<double>& cost, double penalty, const Tensor& out) {
    with_items<T>(score, [&](const T* from, const Items& items) {
        dispatch_index(kOp, out.scalar_type(), [&](auto zero) {
            assign_by_penalty(from, items, cost, penalty, out.mutable_data_ptr<decltype(zero)>());
        });
    });
}

template <typename T>
void run_assign_classes_budget(const Tensor& score, const std::vector<double>& cost, const Budget& budget,
                               const Tensor& out, const Tensor& solved) {
    std::vector<uint8_t> chosen(out.numel());
    with_items<T>(score, [&](const T* from, const Items& items) {
        *solved.mutable_data_ptr<double>() = Search<T>(from, items, cost, budget).solve(chosen.data());
    });
    dispatch_index(kOp, out.scalar_type(), [&](auto zero) {
        using Id = decltype(zero);
        Id* ids = out.mutable_data_ptr<Id>();
        parallel(out.numel(), grain_for(sizeof(Id)), [&](int64_t begin, int64_t end) {
            std::copy(chosen.begin() + begin, chosen.begin() + end, ids + begin);
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "assign_classes", assign_classes);
    FASTROUTE_IMPL(m, "assign_classes.budget", assign_classes_budget);
}

}  // namespace fastroute
