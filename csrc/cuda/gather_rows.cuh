// out[i] = x[index[i]], row by row: the one kernel behind gather_groups and scatter_groups. Rows are copied in units of
// up to 16 bytes; a thread copies kUnroll units, a block apart, so that their reads overlap.
#pragma once

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

Tensor gather_rows(const char* op, const char* name, const char* index_name, const Tensor& x,  // [N, ...]
                   const Tensor& index) {                                                      // [N]
    FASTROUTE_CHECK(x.dim() >= 1, op, ": ", name, " must have at least one dimension");
    const Tensor places = *checked_index(op, index_name, index, x);
    const Tensor dense = torch::stable::contiguous(x);
    const int64_t count = dense.size(0);
    FASTROUTE_CHECK(places.size(0) == count, op, ": ", name, " must have ", places.size(0), " rows; got ", count);
    const Tensor out = empty_tensor(op, "the rows", dense.sizes(), dense.scalar_type(), dense);
    const int64_t bytes = count == 0 ? 0 : dense.numel() / count * static_cast<int64_t>(dense.element_size());
    if (bytes == 0) return out;
    const int64_t alignment = bytes | static_cast<int64_t>(reinterpret_cast<uintptr_t>(dense.const_data_ptr()) |
                                                           reinterpret_cast<uintptr_t>(out.const_data_ptr()));
    const Queue queue(op, dense);
    const auto copy = [&](auto unit) {
        using U = decltype(unit);
        const int64_t units = bytes / static_cast<int64_t>(sizeof(U));
        queue.launch(gather_rows_kernel<U>, blocks_for(count * units, kRowThreads * kUnroll), kRowThreads, 0,
                     static_cast<const U*>(dense.const_data_ptr()), places.const_data_ptr<int64_t>(), count, units,
                     static_cast<U*>(out.mutable_data_ptr()));
    };
    switch (alignment & -alignment & 15) {
        case 0: copy(uint4{}); break;
        case 8: copy(uint2{}); break;
        case 4: copy(uint32_t{}); break;
        case 2: copy(uint16_t{}); break;
        default: copy(uint8_t{});
    }
    return out;
}

}  // namespace
}  // namespace fastroute
