// gather_groups: row i of the output is row order[i] of the input.
#include "cuda/rows.cuh"

namespace fastroute {
namespace {

Tensor gather_groups_cuda(const Tensor& x,          // [N, ...]
                          const Tensor& order,      // [N]
                          const Tensor& inverse) {  // [N]
    FASTROUTE_CHECK(order.dim() == 1 && inverse.dim() == 1 && order.size(0) == inverse.size(0),
                    "gather_groups: order and inverse must be vectors of one length");
    return gather_rows("gather_groups", "x", "groups.order", x, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { m.impl("gather_groups", TORCH_BOX(&gather_groups_cuda)); }

}  // namespace fastroute
