// gather_groups: row i of the output is row order[i] of the input.
#include "cuda/gather_rows.cuh"

namespace fastroute {
namespace {

Tensor gather_groups_cuda(const Tensor& x,          // [N, ...]
                          const Tensor& order,      // [N]
                          const Tensor& inverse) {  // [N]
    check_same_device("gather_groups", "groups.order", order, x);
    check_same_device("gather_groups", "groups.inverse", inverse, x);
    FASTROUTE_CHECK(order.dim() == 1 && inverse.dim() == 1 && order.size(0) == inverse.size(0),
                    "gather_groups: order and inverse must be vectors of one length");
    return gather_rows("gather_groups", "x", "groups.order", x, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "gather_groups", gather_groups_cuda); }

}  // namespace fastroute
