// gather_groups: row i of the output is row order[i] of the input. Each device brings its kernel of gather_rows.h.
#pragma once

#include "common/gather_rows.h"

namespace fastroute {
namespace {

Tensor gather_groups(const Tensor& x,          // [N, ...]
                     const Tensor& order,      // [N]
                     const Tensor& inverse) {  // [N]
    return gather_rows("gather_groups", "x", x, order, inverse, "groups.order", order);
}

}  // namespace
}  // namespace fastroute
