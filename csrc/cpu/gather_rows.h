// out[i] = x[index[i]], row by row: the one kernel behind gather_groups and scatter_groups. Rows are divided among the
// threads.
#pragma once

#include <cstring>

#include "common/gather_rows.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

void check_on_device(const RowGather& call) {
    check_cpu(call.op, call.name, call.x);
    const int64_t count = call.index.size(0);
    check_in_range(call.op, call.index_name, call.index.const_data_ptr<int64_t>(), count, count);
}

void run_gather_rows(const RowGather& call, const Tensor& out) {
    const int64_t bytes = call.row_bytes;
    const int64_t* from = call.index.const_data_ptr<int64_t>();
    const char* source = static_cast<const char*>(call.x.const_data_ptr());
    char* target = static_cast<char*>(out.mutable_data_ptr());
    const auto copy = [&](auto row_bytes) {
        parallel(out.size(0), grain_for(2 * bytes), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(target + i * bytes, source + from[i] * bytes, row_bytes(bytes));
        });
    };
    // A constant length makes memcpy one or two moves.
    switch (bytes) {
        case 4: return copy([](int64_t) { return size_t{4}; });
        case 8: return copy([](int64_t) { return size_t{8}; });
        case 16: return copy([](int64_t) { return size_t{16}; });
        default: return copy([](int64_t n) { return static_cast<size_t>(n); });
    }
}

}  // namespace
}  // namespace fastroute
