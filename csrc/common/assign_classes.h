// What the kernels of assign_classes check before they run, and the range of scores that a budget compares.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dispatch.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "assign_classes";
constexpr double kBudgetSlack = 1e-9;   // mean cost and budget are both sums of rounded fractions
constexpr double kSmallest = 0x1p-126;  // scores below count as this much
constexpr double kMostLog = 1024.0;     // log2 of the largest double: what an infinite score counts as
constexpr double kLargestLog = 1152.0;  // above the range of these logarithms, 126 + 1024

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

}  // namespace
}  // namespace fastroute
