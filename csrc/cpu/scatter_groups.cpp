// scatter_groups: row i of the output is row inverse[i] of the input.
#include <torch/csrc/stable/library.h>

#include "cpu/gather_rows.h"

namespace fastroute {
namespace {

Tensor scatter_groups_cpu(const Tensor& y,          // [N, ...]
                          const Tensor& order,      // [N]
                          const Tensor& inverse) {  // [N]
    check_same_device("scatter_groups", "groups.order", order, y);
    check_same_device("scatter_groups", "groups.inverse", inverse, y);
    FASTROUTE_CHECK(order.dim() == 1 && inverse.dim() == 1 && order.size(0) == inverse.size(0),
                    "scatter_groups: order and inverse must be vectors of one length");
    return gather_rows("scatter_groups", "y", "groups.inverse", y, inverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "scatter_groups", scatter_groups_cpu); }

}  // namespace fastroute
