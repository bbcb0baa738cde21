// out[i] = x[index[i]], row by row: the one kernel behind gather_groups and scatter_groups. Rows are copied in units of
// up to 16 bytes; a thread copies kUnroll units, a block apart, so that their reads overlap.
#pragma once

#include "common/gather_rows.h"
#include "cuda/launch.h"

namespace fastroute {
namespace {

constexpr int kRowThreads = 256;
constexpr int kUnroll = 4;

// An entry of `index` outside [0, count) is moved to the nearest inside: a kernel cannot raise.
template <typename U>
__global__ void __launch_bounds__(kRowThreads)
    gather_rows_kernel(const U* __restrict__ x,                              // [N, units]
                       const int64_t* __restrict__ index,                    // [N]
                       int64_t count, int64_t units, U* __restrict__ out) {  // [N, units]
    const int64_t total = count * units, step = int64_t{gridDim.x} * kRowThreads * kUnroll;
    for (int64_t base = int64_t{blockIdx.x} * kRowThreads * kUnroll + threadIdx.x; base < total; base += step) {
        U unit[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = base + u * kRowThreads;
            if (at >= total) break;
            const int64_t row = at / units, from = index[row];
            unit[u] = x[(from < 0 ? 0 : from < count ? from : count - 1) * units + at - row * units];
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = base + u * kRowThreads;
            if (at < total) out[at] = unit[u];
        }
    }
}

// A device's indices are not looked at: the kernel moves them into range.
void check_on_device(const RowGather&) {}

void run_gather_rows(const RowGather& call, const Tensor& out) {
    const int64_t count = out.size(0), bytes = call.row_bytes;
    const int64_t alignment = bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(call.x.const_data_ptr()) |
                                                           reinterpret_cast<uintptr_t>(out.const_data_ptr()));
    const Queue queue(call.op, call.x);
    const auto copy = [&](auto unit) {
        using U = decltype(unit);
        const int64_t units = bytes / static_cast<int64_t>(sizeof(U));
        queue.launch(gather_rows_kernel<U>, blocks_for(count * units, kRowThreads * kUnroll), kRowThreads, 0,
                     static_cast<const U*>(call.x.const_data_ptr()), call.index.const_data_ptr<int64_t>(), count, units,
                     static_cast<U*>(out.mutable_data_ptr()));
    };
    switch (alignment & -alignment & 15) {
        case 0: return copy(uint4{});
        case 8: return copy(uint2{});
        case 4: return copy(uint32_t{});
        case 2: return copy(uint16_t{});
        default: return copy(uint8_t{});
    }
}

}  // namespace
}  // namespace fastroute
