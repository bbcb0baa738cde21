// group_by_class: the order that sorts items by class, its inverse, and where each class begins; a stable counting
// sort. What every device checks and allocates.
#pragma once

#include <tuple>

#include "common/dispatch.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "group_by_class";

struct Groups {
    Tensor order, inverse;  // [N]
    Tensor offsets;         // [K + 1]
};

// Each device defines the kernel; T is the type of the ids.
template <typename T>
void run_group_by_class(const Tensor& class_ids,  // [N] contiguous
                        int64_t num_classes, const Groups& out);

std::tuple<Tensor, Tensor, Tensor> group_by_class(const Tensor& class_ids,  // [N]
                                                  int64_t num_classes) {
    check_rank(kOp, "class_ids", class_ids, 1);
    check_at_least(kOp, "num_classes", num_classes, 1);
    // Every thread has its own counts.
    checked_product(kOp, "num_classes", {num_classes, int64_t{1} << 16});
    const Tensor dense = as_contiguous(class_ids);
    const auto make = [&](int64_t size) { return empty_tensor(kOp, "the indices", {size}, ScalarType::Long, dense); };
    const int64_t count = dense.size(0);
    const Groups out{.order = make(count), .inverse = make(count), .offsets = make(num_classes + 1)};
    dispatch_index(kOp, dense.scalar_type(),
                   [&](auto zero) { run_group_by_class<decltype(zero)>(dense, num_classes, out); });
    return {out.order, out.inverse, out.offsets};
}

}  // namespace
}  // namespace fastroute
