// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits. The choice of an item moves to cheaper classes as the penalty grows, so
// bisection needs to look again only at items whose choice differs between its two ends: the work per step halves with
// the interval. Items are narrowed part by part, by all threads.
#include "common/assign_classes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace fastroute {
namespace {

constexpr int64_t kBlock = 256;  // items compared side by side

// Scores of `batch` runs of `length` items: class k of item l of run b lies at b · batch_step + k · class_step +
// l · item_step.
struct Items {
    int64_t batch, classes, length;
    int64_t batch_step, class_step, item_step;
};

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

constexpr int64_t kPart = 4096;  // items that one thread narrows at a time: their logarithms stay in its caches

// The class of largest log2(score) - price; the lowest wins a tie.
uint8_t choose(const double* log_score, const std::vector<double>& price) {
    size_t best = 0;
    double value = log_score[0] - price[0];
    for (size_t k = 1; k < price.size(); ++k) {
        const double other = log_score[k] - price[k];
        if (other > value) value = other, best = k;
    }
    return static_cast<uint8_t>(best);
}

// Some of the items in a bisection. Open are those whose class differs at its two ends.
struct Part {
    std::vector<int32_t> item;                    // counted from the part's first
    std::vector<double> log_score;                // [items, K]
    std::vector<uint8_t> expensive, cheap, here;  // classes at both ends and in the middle
    std::vector<int64_t> settled, counts;  // [K]: classes of items that are not open; of those that are, in the middle

    // Drops the items whose class is the same at both ends, and so between, and looks at the others at the prices of
    // the middle. `ids` are those of the part.
    void narrow(const std::vector<double>& price, uint8_t* ids) {
        const size_t classes = price.size();
        size_t gone = 0, kept = item.size();
        for (size_t n = 0; n < kept; ++n) gone += static_cast<size_t>(expensive[n] == cheap[n]);
        if (gone > 0) kept = drop(ids, classes);
        std::fill(counts.begin(), counts.end(), 0);
        here.resize(kept);
        const double* __restrict log = log_score.data();
        uint8_t* __restrict choice = here.data();
        // Two classes are the usual number of a choice per pixel.
        if (classes == 2) {
            const double first = price[0], second = price[1];
            for (size_t n = 0; n < kept; ++n) choice[n] = log[2 * n + 1] - second > log[2 * n] - first;
            counts[1] = std::accumulate(choice, choice + kept, int64_t(0));
            counts[0] = static_cast<int64_t>(kept) - counts[1];
            return;
        }
        for (size_t n = 0; n < kept; ++n) {
            choice[n] = choose(log + n * classes, price);
            ++counts[choice[n]];
        }
    }

    // Drops them, and tells how many are left.
    size_t drop(uint8_t* ids, size_t classes) {
        size_t kept = 0;
        for (size_t n = 0; n < item.size(); ++n) {
            if (expensive[n] == cheap[n]) {
                ids[item[n]] = cheap[n];
                ++settled[cheap[n]];
                continue;
            }
            item[kept] = item[n], expensive[kept] = expensive[n], cheap[kept] = cheap[n];
            std::copy_n(&log_score[n * classes], classes, &log_score[kept * classes]);
            ++kept;
        }
        item.resize(kept), expensive.resize(kept), cheap.resize(kept);
        return kept;
    }
};

double mean_share(const std::vector<int64_t>& counts, const std::vector<double>& share, int64_t total) {
    double sum = 0;
    for (size_t k = 0; k < share.size(); ++k) sum += static_cast<double>(counts[k]) * share[k];
    return sum / static_cast<double>(total);
}

template <typename T>
void assign_by_budget(const T* score, Items items, const std::vector<double>& cost, double budget,
                      std::vector<uint8_t>& ids) {
    const int64_t total = items.batch * items.length, classes = items.classes;
    const double most_expensive = *std::max_element(cost.begin(), cost.end());
    std::vector<double> log_cost, share;
    for (double c : cost) log_cost.push_back(std::log2(c)), share.push_back(c / most_expensive);
    double high = penalty_bound(cost), low = -high;

    const auto price = [&](double penalty) {
        std::vector<double> prices;
        for (const double c : log_cost) prices.push_back(penalty * c);
        return prices;
    };
    const std::vector<double> least = price(low), most = price(high);
    std::vector<Part> parts((total + kPart - 1) / kPart);
    const int64_t count = static_cast<int64_t>(parts.size());
    std::atomic<bool> nan{false};
    parallel(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * kPart, size = std::min(kPart, total - first);
            Part part;
            part.item.resize(size), part.log_score.resize(size * classes);
            part.expensive.resize(size), part.cheap.resize(size);
            part.settled.resize(classes), part.counts.resize(classes);
            bool bad = false;
            for (int64_t n = 0; n < size; ++n) {
                const int64_t at = first + n;
                const T* from = score + at / items.length * items.batch_step + at % items.length * items.item_step;
                double* log_score = &part.log_score[n * classes];
                for (int64_t k = 0; k < classes; ++k) {
                    const double s = static_cast<double>(static_cast<Work<T>>(from[k * items.class_step]));
                    bad |= s != s;
                    log_score[k] = std::min(std::log2(std::max(s, kSmallest)), kMostLog);
                }
                part.item[n] = static_cast<int32_t>(n);
                part.expensive[n] = choose(log_score, least);
                part.cheap[n] = choose(log_score, most);
                ++part.counts[part.expensive[n]];
            }
            if (bad) nan = true;
            parts[p] = std::move(part);
        }
    });
    if (nan) fail(kOp, ": score must not be NaN");
    // Whether the budget holds with the classes that `counts` and `settled` say.
    const auto fits = [&] {
        std::vector<int64_t> counts(classes, 0);
        for (const Part& part : parts) {
            for (int64_t k = 0; k < classes; ++k) counts[k] += part.settled[k] + part.counts[k];
        }
        return mean_share(counts, share, total) <= budget + kBudgetSlack;
    };
    const auto finish = [&](std::vector<uint8_t> Part::* choice) {
        for (int64_t p = 0; p < count; ++p) {
            const Part& part = parts[p];
            for (size_t n = 0; n < part.item.size(); ++n) ids[p * kPart + part.item[n]] = (part.*choice)[n];
        }
    };
    if (fits()) return finish(&Part::expensive);
    for (double middle; (middle = 0.5 * (low + high)) != low && middle != high;) {
        const std::vector<double> prices = price(middle);
        parallel(count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) parts[p].narrow(prices, &ids[p * kPart]);
        });
        if (std::all_of(parts.begin(), parts.end(), [](const Part& part) { return part.item.empty(); })) return;
        const bool enough = fits();
        (enough ? high : low) = middle;
        for (Part& part : parts) std::swap(enough ? part.cheap : part.expensive, part.here);
    }
    finish(&Part::cheap);
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

template <typename T>
void run_assign_classes(const Assignment& call, const Tensor& out) {
    check_cpu(kOp, "score", call.score);
    const std::optional<Items> found = items_of(call.score);
    const Tensor dense = found.has_value() ? call.score : torch::stable::contiguous(call.score);
    const Items items = found.has_value() ? *found : *items_of(dense);
    const T* score = dense.const_data_ptr<T>();
    const int64_t total = out.numel();
    std::vector<uint8_t> chosen(call.budget.has_value() ? total : 0);
    if (call.budget.has_value()) assign_by_budget(score, items, call.cost, *call.budget, chosen);
    dispatch_index(kOp, out.scalar_type(), [&](auto zero) {
        using Id = decltype(zero);
        Id* ids = out.mutable_data_ptr<Id>();
        if (!call.budget.has_value()) return assign_by_penalty(score, items, call.cost, call.penalty, ids);
        parallel(total, grain_for(sizeof(Id)), [&](int64_t begin, int64_t end) {
            std::copy(chosen.begin() + begin, chosen.begin() + end, ids + begin);
        });
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "assign_classes", assign_classes); }

}  // namespace fastroute
