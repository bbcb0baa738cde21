// assign_classes: argmax over classes of score / cost^penalty; with a budget, of log2(score) - penalty · log2(cost) at
// the smallest penalty whose mean cost fits. What every device checks and allocates, and the numbers of the search.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "assign_classes";
constexpr double kBudgetSlack = 1e-9;   // mean cost and budget are both sums of rounded fractions
constexpr double kSmallest = 0x1p-126;  // scores below count as this much
constexpr double kMostLog = 1024.0;     // log2 of the largest double: what an infinite score counts as
constexpr double kLargestLog = 1152.0;  // above the range of these logarithms, 126 + 1024

// A call, checked but for the scores.
struct Assignment {
    Tensor score;              // [N, K, ...]
    std::vector<double> cost;  // [K]
    double penalty;
    std::optional<double> budget;
};

// Each device defines the kernel; T is the type of the scores. There are items.
template <typename T>
void run_assign_classes(const Assignment& call, const Tensor& out);

// The cost of each class; what must hold of the numbers is checked.
std::vector<double> checked_costs(const Tensor& score,  // [N, K, ...]
                                  const Tensor& cost,   // [K], on the CPU
                                  double penalty, const std::optional<double>& budget) {
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
    FASTROUTE_CHECK(std::isfinite(penalty), kOp, ": penalty must be finite; got ", penalty);
    if (budget.has_value()) {
        FASTROUTE_CHECK(penalty == 0, kOp, ": give either penalty or budget; got penalty=", penalty,
                        " and budget=", *budget);
        const auto [least, most] = std::minmax_element(costs.begin(), costs.end());
        const double possible = *least / *most;
        FASTROUTE_CHECK(possible - kBudgetSlack <= *budget && *budget <= 1 + kBudgetSlack, kOp,
                        ": budget must lie in [", possible,
                        ", 1], from everything in the cheapest class to everything "
                        "in the most expensive; got ",
                        *budget);
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

Tensor assign_classes(const Tensor& score,  // [N, K, ...]
                      const Tensor& cost,   // [K], on the CPU
                      double penalty, std::optional<double> budget, int64_t id_bytes) {
    const ScalarType dtype = id_type(kOp, id_bytes);
    const Assignment call{
        .score = score, .cost = checked_costs(score, cost, penalty, budget), .penalty = penalty, .budget = budget};
    std::vector<int64_t> size{score.size(0)};
    for (int64_t d = 2; d < score.dim(); ++d) size.push_back(score.size(d));
    const Tensor out = empty_tensor(kOp, "the classes", size, dtype, score);
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, score.scalar_type(), [&](auto zero) { run_assign_classes<decltype(zero)>(call, out); });
    return out;
}

}  // namespace
}  // namespace fastroute
