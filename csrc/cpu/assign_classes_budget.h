// The penalty of a budget. The choice of an item moves to cheaper classes as the penalty grows, so bisection needs to
// look again only at items whose choice differs between its two ends: the work per step halves with the interval. It
// begins between two penalties that a sample of the items suggests, and that all items confirm. Items are narrowed part
// by part, by all threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/assign_classes.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

// Scores of `batch` runs of `length` items: class k of item l of run b lies at b · batch_step + k · class_step +
// l · item_step.
struct Items {
    int64_t batch, classes, length;
    int64_t batch_step, class_step, item_step;
};

constexpr int64_t kPart = 4096;  // items that one thread narrows at a time: their logarithms stay in its caches

// log2 of scores, or logits as they are. Tells whether one is NaN.
template <typename T>
bool read_run(const T* __restrict from, int64_t step, int64_t count, bool logits, double* __restrict to) {
    int32_t bad = 0;
    const auto copy = [&](auto stride) {
        for (int64_t n = 0; n < count; ++n) {
            to[n] = static_cast<double>(static_cast<Work<T>>(from[n * stride]));
            bad |= to[n] != to[n];
        }
    };
    // A step that the compiler knows makes whole vectors of the loads.
    if (step == 1) {
        copy(std::integral_constant<int64_t, 1>{});
    } else {
        copy(step);
    }
    for (int64_t n = 0; n < count; ++n) to[n] = logits ? finite_logit(to[n]) : log_of_score(to[n]);
    return bad != 0;
}

// The classes of largest log2(score) - price, the lowest on a tie; adds how many items have each to `counts`. The
// logarithms of one class are `step` from those of the next. At most kPart items.
void choose(const double* __restrict log_score,  // [K, count]
            int64_t step, int64_t count, const std::vector<double>& price, uint8_t* __restrict choice,
            std::vector<int64_t>& counts) {  // [K]
    // Two classes are the usual number of a choice per pixel.
    if (price.size() == 2) {
        const double* __restrict other = log_score + step;
        const double first = price[0], second = price[1];
        for (int64_t n = 0; n < count; ++n) choice[n] = other[n] - second > log_score[n] - first;
        const int64_t ones = std::accumulate(choice, choice + count, int64_t(0));
        counts[0] += count - ones, counts[1] += ones;
        return;
    }
    double best[kPart];
    for (int64_t n = 0; n < count; ++n) best[n] = log_score[n] - price[0], choice[n] = 0;
    for (size_t k = 1; k < price.size(); ++k) {
        const double* __restrict own = log_score + static_cast<int64_t>(k) * step;
        for (int64_t n = 0; n < count; ++n) {
            const double value = own[n] - price[k];
            choice[n] = value > best[n] ? static_cast<uint8_t>(k) : choice[n];
            best[n] = value > best[n] ? value : best[n];
        }
    }
    for (int64_t n = 0; n < count; ++n) ++counts[choice[n]];
}

// log2 of the scores of items, every `step`-th of them from `first` on. Tells whether one is NaN. At most kPart items.
template <typename T>
bool read(const T* score, const Items& items, int64_t first, int64_t step, int64_t count, bool logits,
          double* __restrict log_score) {  // [K, count]
    bool bad = false;
    for (int64_t n = 0, run; n < count; n += run) {
        const int64_t at = first + n * step, place = at % items.length;
        run = std::min(count - n, (items.length - place + step - 1) / step);
        const T* from = score + at / items.length * items.batch_step + place * items.item_step;
        for (int64_t k = 0; k < items.classes; ++k) {
            bad |=
                read_run(from + k * items.class_step, step * items.item_step, run, logits, log_score + k * count + n);
        }
    }
    if (!logits) return bad;
    double most[kPart];
    std::copy_n(log_score, count, most);
    for (int64_t k = 1; k < items.classes; ++k) {
        const double* __restrict own = log_score + k * count;
        for (int64_t n = 0; n < count; ++n) most[n] = larger(most[n], own[n]);
    }
    for (int64_t k = 0; k < items.classes; ++k) {
        double* __restrict own = log_score + k * count;
        for (int64_t n = 0; n < count; ++n) own[n] = log_of_logit(own[n], most[n]);
    }
    return bad;
}

// Open items, those whose class differs at the two ends of a bisection, of a part of all items.
struct Part {
    std::vector<int32_t> item;                    // counted from the part's first
    std::vector<double> log_score;                // [K, items at first]
    int64_t step = 0;                             // the number of items at first
    std::vector<uint8_t> expensive, cheap, here;  // classes at both ends and in the middle
    std::vector<int64_t> settled, counts;  // [K]: classes of items that are not open; of those that are, in the middle

    // Drops the items whose class has become the same at both ends, and so between, and looks at the others at the
    // prices of the middle. `ids` are those of the part.
    void narrow(const std::vector<double>& price, uint8_t* ids) {
        size_t kept = 0;
        for (size_t n = 0; n < item.size(); ++n) {
            if (expensive[n] == cheap[n]) {
                ids[item[n]] = cheap[n];
                ++settled[cheap[n]];
                continue;
            }
            if (kept < n) {
                item[kept] = item[n], expensive[kept] = expensive[n], cheap[kept] = cheap[n];
                for (size_t k = 0; k < price.size(); ++k) log_score[k * step + kept] = log_score[k * step + n];
            }
            ++kept;
        }
        item.resize(kept), expensive.resize(kept), cheap.resize(kept), here.resize(kept);
        std::fill(counts.begin(), counts.end(), 0);
        choose(log_score.data(), step, static_cast<int64_t>(kept), price, here.data(), counts);
    }
};

// The bisection for the penalty of a budget.
template <typename T>
class Search {
  public:
    Search(const T* score, const Items& items, const std::vector<double>& cost, const Budget& budget)
        : score_(score), items_(items), budget_(budget), total_(items.batch * items.length) {
        const double most_expensive = *std::max_element(cost.begin(), cost.end());
        for (double c : cost) log_cost_.push_back(std::log2(c)), share_.push_back(c / most_expensive);
    }

    // The penalty; the classes at it go into `ids`.
    double solve(uint8_t* ids) {
        double low = budget_.least, high = budget_.bound;
        const auto [likely_low, likely_high] = likely();
        // Where the sample was misleading, all items are looked at from the ends.
        if (!bracket(likely_low, likely_high, ids)) bracket(low, high, ids);
        if (all_fit_) return finish(&Part::expensive, low, ids);
        for (double middle; (middle = 0.5 * (low + high)) != low && middle != high;) {
            // The cost falls as the penalty grows, so beyond the bracket is known what fits.
            const bool inside = low_ < middle && middle < high_;
            const bool enough = inside ? fits_at(middle, ids) : middle >= high_;
            (enough ? high : low) = middle;
            if (inside) {
                (enough ? high_ : low_) = middle;
                for (Part& part : parts_) std::swap(enough ? part.cheap : part.expensive, part.here);
            }
        }
        return finish(&Part::cheap, high, ids);
    }

  private:
    static constexpr int64_t kSample = 1 << 15;  // items that tell where the penalty probably lies
    static constexpr double kMargin = 0.01;      // of them may change class beyond the ends of the bracket
    static constexpr int kSampleSteps = 32;

    std::vector<double> prices(double penalty) const {
        std::vector<double> price;
        for (const double c : log_cost_) price.push_back(multiply(penalty, c));
        return price;
    }

    // The mean cost of so many items of each class.
    double mean(const std::vector<int64_t>& counts, int64_t total) const {
        double sum = 0;
        for (size_t k = 0; k < share_.size(); ++k) sum += static_cast<double>(counts[k]) * share_[k];
        return sum / static_cast<double>(total);
    }

    // An interval in which the penalty probably lies, found on a sample of the items.
    std::pair<double, double> likely() const {
        // An odd distance, so that the columns of an image take turns.
        const int64_t step = total_ / kSample | 1, count = (total_ + step - 1) / step;
        if (step == 1) return {budget_.least, budget_.bound};
        std::vector<double> log_score(count * items_.classes);
        std::vector<uint8_t> choice(kPart);
        const auto each_part = [&](auto&& run) {
            for (int64_t n = 0; n < count; n += kPart)
                run(n, std::min(kPart, count - n), &log_score[n * items_.classes]);
        };
        each_part([&](int64_t first, int64_t size, double* to) {
            read(score_, items_, first * step, step, size, budget_.logits, to);
        });
        const auto end = [&](double limit, double low, double high, bool upper) {
            for (int n = 0; n < kSampleSteps; ++n) {
                const double middle = 0.5 * (low + high);
                std::vector<int64_t> counts(items_.classes);
                const std::vector<double> price = prices(middle);
                each_part([&](int64_t, int64_t size, const double* from) {
                    choose(from, size, size, price, choice.data(), counts);
                });
                (mean(counts, count) <= limit ? high : low) = middle;
            }
            return upper ? high : low;
        };
        const double least = *std::min_element(share_.begin(), share_.end()), margin = kMargin * (1 - least);
        const double low = end(budget_.share + margin, budget_.least, budget_.bound, false);
        return {low, end(budget_.share - margin, low, budget_.bound, true)};
    }

    // Takes the items whose class differs between two penalties. Tells whether the budget fails at the lower one and
    // holds at the higher one; or holds at the least of all, which is then the answer.
    bool bracket(double low, double high, uint8_t* ids) {
        low_ = low, high_ = high;
        parts_ = std::vector<Part>((total_ + kPart - 1) / kPart);
        const std::vector<double> least = prices(low), most = prices(high);
        const size_t classes = share_.size();
        std::vector<std::vector<int64_t>> at_low(parts_.size(), std::vector<int64_t>(classes)), at_high = at_low;
        std::atomic<bool> nan{false};
        parallel(static_cast<int64_t>(parts_.size()), 1, [&](int64_t begin, int64_t end) {
            std::vector<double> log_score(kPart * classes);
            std::vector<uint8_t> expensive(kPart), cheap(kPart);
            for (int64_t p = begin; p < end; ++p) {
                const int64_t first = p * kPart, size = std::min(kPart, total_ - first);
                if (read(score_, items_, first, 1, size, budget_.logits, log_score.data())) nan = true;
                choose(log_score.data(), size, size, least, expensive.data(), at_low[p]);
                choose(log_score.data(), size, size, most, cheap.data(), at_high[p]);
                Part& part = parts_[p];
                part.counts.resize(classes);
                std::copy_n(cheap.begin(), size, ids + first);
                for (int64_t n = 0; n < size; ++n) part.step += expensive[n] != cheap[n];
                part.item.reserve(part.step), part.log_score.reserve(part.step * classes);
                part.expensive.reserve(part.step), part.cheap.reserve(part.step);
                part.settled = at_high[p];
                for (int64_t n = 0; n < size; ++n) {
                    if (expensive[n] == cheap[n]) continue;
                    part.item.push_back(static_cast<int32_t>(n));
                    part.expensive.push_back(expensive[n]), part.cheap.push_back(cheap[n]);
                    --part.settled[cheap[n]];
                }
                for (size_t k = 0; k < classes; ++k) {
                    for (const int32_t n : part.item) part.log_score.push_back(log_score[k * size + n]);
                }
            }
        });
        if (nan) fail(kOp, ": score must not be NaN");
        const bool holds = affordable(at_low);
        all_fit_ = holds && low == budget_.least;
        return all_fit_ || (!holds && affordable(at_high));
    }

    // Whether the budget holds with so many items of each class in the parts.
    bool affordable(const std::vector<std::vector<int64_t>>& parts) const {
        std::vector<int64_t> counts(share_.size());
        for (const std::vector<int64_t>& part : parts) {
            for (size_t k = 0; k < counts.size(); ++k) counts[k] += part[k];
        }
        return mean(counts, total_) <= budget_.share + kBudgetSlack;
    }

    // Whether it holds at a penalty between those of the bracket.
    bool fits_at(double penalty, uint8_t* ids) {
        const std::vector<double> price = prices(penalty);
        parallel(static_cast<int64_t>(parts_.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) parts_[p].narrow(price, ids + p * kPart);
        });
        std::vector<std::vector<int64_t>> counts;
        for (const Part& part : parts_) {
            counts.push_back(part.settled);
            for (size_t k = 0; k < share_.size(); ++k) counts.back()[k] += part.counts[k];
        }
        return affordable(counts);
    }

    double finish(std::vector<uint8_t> Part::* choice, double penalty, uint8_t* ids) const {
        for (size_t p = 0; p < parts_.size(); ++p) {
            const Part& part = parts_[p];
            for (size_t n = 0; n < part.item.size(); ++n) ids[p * kPart + part.item[n]] = (part.*choice)[n];
        }
        return penalty;
    }

    const T* score_;
    const Items& items_;
    const Budget& budget_;
    int64_t total_;
    std::vector<double> log_cost_, share_;  // [K]
    std::vector<Part> parts_;
    double low_ = 0, high_ = 0;  // ends of the bracket
    bool all_fit_ = false;
};

}  // namespace
}  // namespace fastroute
