// scatter_groups: row i of the output is row inverse[i] of the input. Each device brings its kernel of gather_rows.h.
#pragma once

#include "common/gather_rows.h"

namespace fastroute {
namespace {

Tensor scatter_groups(const Tensor& y,          // [N, ...]
                      const Tensor& order,      // [N]
                      const Tensor& inverse) {  // [N]
    return gather_rows("scatter_groups", "y", y, order, inverse, "groups.inverse", inverse);
}

}  // namespace
}  // namespace fastroute
