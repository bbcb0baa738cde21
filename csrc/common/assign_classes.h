// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits. What every device checks and allocates, and the numbers of the search.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/host_device.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "assign_classes";
constexpr double kBudgetSlack = 1e-9;            // mean cost and budget are both sums of rounded fractions
constexpr double kSmallest = 0x1p-126;           // scores below count as this much
constexpr double kMostLog = 1024.0;              // log2 of the largest double: what an infinite score counts as
constexpr double kLargestLog = 1152.0;           // above the range of these logarithms, 126 + 1024
constexpr double kLogOfE = 0x1.71547652b82fep0;  // log2(e)
constexpr double kEqualLogs = 0x1p-53;           // logits nearer to the largest count as equal, as probabilities do
constexpr double kLargest = std::numeric_limits<double>::max();

// A budget, checked but for the scores.
struct Budget {
    double share;  // mean cost allowed, as a fraction of the most expensive class's
    double least;  // no smaller penalty is considered
    double bound;  // at this penalty all items are of the cheapest class
    bool logits;   // scores are logits, not probabilities
};

// Each device defines the kernels; T is the type of the scores. There are items.
template <typename T>
void run_assign_classes(const Tensor& score,              // [N, K, ...]
                        const std::vector<double>& cost,  // [K]
                        double penalty, const Tensor& out);
template <typename T>
void run_assign_classes_budget(const Tensor& score,              // [N, K, ...]
                               const std::vector<double>& cost,  // [K]
                               const Budget& budget, const Tensor& out,
                               const Tensor& solved);  // float64 [], the penalty

// A logit as a finite number. NaN, where nobody could look, counts as the smallest.
FASTROUTE_HOST_DEVICE double finite_logit(double logit) {
    const double z = -kLargest < logit ? logit : -kLargest;
    return z < kLargest ? z : kLargest;
}
FASTROUTE_HOST_DEVICE double larger(double a, double b) { return a < b ? b : a; }

// log2 of a score; of a finite logit, relative to the largest of its item.
FASTROUTE_HOST_DEVICE double log_of_score(double score) {
    const double log = ::log2(kSmallest < score ? score : kSmallest);
    return log < kMostLog ? log : kMostLog;
}
FASTROUTE_HOST_DEVICE double log_of_logit(double logit, double most) {
    const double log = (logit - most) * kLogOfE, other = log > -kEqualLogs ? 0.0 : log;
    return larger(-kMostLog, other);
}

// The cost of each class; what must hold of the numbers is checked.
std::vector<double> checked_costs(const Tensor& score,   // [N, K, ...]
                                  const Tensor& cost) {  // [K], on the CPU
    FASTROUTE_CHECK(score.dim() >= 2, kOp, ": score must have at least 2 dimensions; got ", score.dim());
    FASTROUTE_CHECK(cost.is_cpu(), kOp, ": cost must be on the CPU, it is read before the kernel runs");
    const int64_t classes = score.size(1);
    FASTROUTE_CHECK(classes >= 1 && classes <= 256, kOp, ": score must have 1 to 256 classes; got ", classes);
    FASTROUTE_CHECK(cost.dim() == 1 && cost.size(0) == classes && cost.scalar_type() == ScalarType::Double, kOp,
                    ": cost must be ", classes, " float64 values");
    const Tensor dense = torch::stable::contiguous(cost);
    const double* values = dense.const_data_ptr<double>();
    const std::vector<double> costs(values, values + classes);
    for (const double c : costs) {
        FASTROUTE_CHECK(c > 0 && std::isfinite(c), kOp, ": cost must be positive and finite; got ", c,
                        "; give a free class its small true cost");
    }
    return costs;
}

// cost^-penalty, relative to the class that gains most, so that no unit of cost overflows.
std::vector<double> penalty_scales(const std::vector<double>& cost, double penalty) {
    std::vector<double> scales(cost.size(), 1.0);
    if (penalty == 0) return scales;
    double most = -std::numeric_limits<double>::infinity();
    for (const double c : cost) most = std::max(most, -penalty * std::log(c));
    for (size_t k = 0; k < cost.size(); ++k) scales[k] = std::exp(-penalty * std::log(cost[k]) - most);
    return scales;
}

// Penalties at which every possible score is overruled by the cost lie beyond this, above and below 0.
double penalty_bound(const std::vector<double>& cost) {
    std::vector<double> sorted;
    for (const double c : cost) sorted.push_back(std::log2(c));
    std::sort(sorted.begin(), sorted.end());
    double gap = std::numeric_limits<double>::infinity();
    for (size_t k = 1; k < sorted.size(); ++k) {
        if (sorted[k] > sorted[k - 1]) gap = std::min(gap, sorted[k] - sorted[k - 1]);
    }
    return kLargestLog / (std::isfinite(gap) ? gap : 1.0);
}

// What the classes and the penalty of a budget are found with.
Budget checked_budget(const std::vector<double>& cost,  // [K]
                      double share, const std::optional<double>& penalty, bool logits) {
    const auto [least, most] = std::minmax_element(cost.begin(), cost.end());
    const double possible = *least / *most;
    FASTROUTE_CHECK(possible - kBudgetSlack <= share && share <= 1 + kBudgetSlack, kOp, ": budget must lie in [",
                    possible, ", 1], from everything in the cheapest class to everything in the most expensive; got ",
                    share);
    FASTROUTE_CHECK(!penalty.has_value() || std::isfinite(*penalty), kOp, ": penalty must be finite; got ", *penalty);
    const double bound = penalty_bound(cost);
    // Beyond the bound, too, everything is in the cheapest or the most expensive class.
    return {
        .share = share, .least = std::clamp(penalty.value_or(-bound), -bound, bound), .bound = bound, .logits = logits};
}

Tensor empty_classes(const Tensor& score,  // [N, K, ...]
                     int64_t id_bytes) {
    std::vector<int64_t> size{score.size(0)};
    for (int64_t d = 2; d < score.dim(); ++d) size.push_back(score.size(d));
    return empty_tensor(kOp, "the classes", size, id_type(kOp, id_bytes), score);
}

Tensor assign_classes(const Tensor& score,  // [N, K, ...]
                      const Tensor& cost,   // [K], on the CPU
                      double penalty, int64_t id_bytes) {
    const std::vector<double> costs = checked_costs(score, cost);
    FASTROUTE_CHECK(std::isfinite(penalty), kOp, ": penalty must be finite; got ", penalty);
    const Tensor out = empty_classes(score, id_bytes);
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, score.scalar_type(),
                      [&](auto zero) { run_assign_classes<decltype(zero)>(score, costs, penalty, out); });
    return out;
}

// The penalty, float64 [], and the classes at it.
std::tuple<Tensor, Tensor> assign_classes_budget(const Tensor& score,  // [N, K, ...]
                                                 const Tensor& cost,   // [K], on the CPU
                                                 double share, std::optional<double> penalty, bool logits,
                                                 int64_t id_bytes) {
    const std::vector<double> costs = checked_costs(score, cost);
    const Budget budget = checked_budget(costs, share, penalty, logits);
    const Tensor out = empty_classes(score, id_bytes);
    const Tensor solved = empty_tensor(kOp, "the penalty", {}, ScalarType::Double, score);
    if (out.numel() == 0) return {torch::stable::fill_(solved, budget.least), out};
    dispatch_floating(kOp, score.scalar_type(),
                      [&](auto zero) { run_assign_classes_budget<decltype(zero)>(score, costs, budget, out, solved); });
    return {solved, out};
}

}  // namespace
}  // namespace fastroute
