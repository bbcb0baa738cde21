// out[i] = x[index[i]], row by row: the one kernel behind gather_groups and scatter_groups.
#pragma once

#include <cstring>

#include "common/checks.h"
#include "cpu/isa.h"

namespace fastroute {

inline Tensor gather_rows(const char* op, const char* name, const char* index_name, const Tensor& x,  // [N, ...]
                          const Tensor& index) {                                                      // [N]
    check_cpu(op, name, x);
    FASTROUTE_CHECK(x.dim() >= 1, op, ": ", name, " must have at least one dimension");
    const Tensor places = *checked_index(op, index_name, index, x);
    const Tensor dense = as_contiguous(x);
    const int64_t count = dense.size(0);
    FASTROUTE_CHECK(places.size(0) == count, op, ": ", name, " must have ", places.size(0), " rows; got ", count);
    const int64_t* from = places.const_data_ptr<int64_t>();
    check_in_range(op, index_name, from, count, count);
    const Tensor out = empty_tensor(op, "the rows", dense.sizes(), dense.scalar_type(), dense);
    const int64_t bytes = count == 0 ? 0 : dense.numel() / count * static_cast<int64_t>(dense.element_size());
    const char* source = static_cast<const char*>(dense.const_data_ptr());
    char* target = static_cast<char*>(out.mutable_data_ptr());
    const auto copy = [&](auto row_bytes) {
        parallel(count, grain_for(2 * bytes), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(target + i * bytes, source + from[i] * bytes, row_bytes(bytes));
        });
    };
    // A constant length makes memcpy one or two moves.
    switch (bytes) {
        case 0: break;
        case 4: copy([](int64_t) { return size_t{4}; }); break;
        case 8: copy([](int64_t) { return size_t{8}; }); break;
        case 16: copy([](int64_t) { return size_t{16}; }); break;
        default: copy([](int64_t n) { return static_cast<size_t>(n); });
    }
    return out;
}

}  // namespace fastroute
