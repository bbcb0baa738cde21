// out[i] = x[index[i]], row by row: what gather_groups and scatter_groups have in common on every device.
#pragma once

#include <algorithm>

#include "common/checks.h"

namespace fastroute {
namespace {

struct RowGather {
    const char *op, *name, *index_name;
    Tensor x;      // [N, ...] contiguous
    Tensor index;  // [N] contiguous
    int64_t row_bytes;
};

// Each device defines these: what it alone can check, before memory is taken; and the kernel, for rows that are not
// empty.
void check_on_device(const RowGather& call);
void run_gather_rows(const RowGather& call, const Tensor& out);

Tensor gather_rows(const char* op, const char* name, const Tensor& x,  // [N, ...]
                   const Tensor& order, const Tensor& inverse,         // [N] each
                   const char* index_name, const Tensor& index) {      // one of them
    check_same_device(op, "groups.order", order, x);
    check_same_device(op, "groups.inverse", inverse, x);
    FASTROUTE_CHECK(order.dim() == 1 && inverse.dim() == 1 && order.size(0) == inverse.size(0), op,
                    ": order and inverse must be vectors of one length");
    FASTROUTE_CHECK(x.dim() >= 1, op, ": ", name, " must have at least one dimension");
    const Tensor places = *checked_index(op, index_name, index, x), rows = as_contiguous(x);
    const int64_t count = rows.size(0), elements = rows.numel() / std::max<int64_t>(count, 1);
    FASTROUTE_CHECK(places.size(0) == count, op, ": ", name, " must have ", places.size(0), " rows; got ", count);
    const RowGather call{.op = op,
                         .name = name,
                         .index_name = index_name,
                         .x = rows,
                         .index = places,
                         .row_bytes = elements * static_cast<int64_t>(rows.element_size())};
    check_on_device(call);
    const Tensor out = empty_tensor(op, "the rows", rows.sizes(), rows.scalar_type(), rows);
    if (out.numel() > 0) run_gather_rows(call, out);
    return out;
}

}  // namespace
}  // namespace fastroute
