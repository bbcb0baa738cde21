// What the kernels of stitch_patches that write an image are told, and how one of them reads pixels of a patch.
#pragma once

#include <algorithm>

#include "cuda/stitch_patches.cuh"

namespace fastroute {
namespace {

constexpr int kCopied = 3;  // channels that copies of vectors are made for

// Pixels that a thread computes at a time where registers are few: a part of one pack of either type.
template <typename T, typename Out>
inline constexpr int kPiece = std::min({kPack<T>, kPack<Out>, 4});

template <typename W>
struct StitchPlan {
    const Place* places;  // [N]
    int64_t x;            // stride of a pixel of a patch, in elements
    int shuffle;          // factor of a fused pixel shuffle
    AxisTables<W> tables;
    int stride, last_y, last_x, tile_rows, tile_cols;  // of the grid
    int scale, span;
    int row_begin, height, width;  // rows of `out` and its width, in output pixels
    int64_t channels;
    int64_t image_step, channel_step, row_step;  // of `out`

    __device__ __forceinline__ int origin_y(int i) const { return min(i * stride, last_y) * scale; }
    __device__ __forceinline__ int origin_x(int j) const { return min(j * stride, last_x) * scale; }
    __device__ __forceinline__ Place place(int64_t image, int i, int j) const {
        return places[(image * tile_rows + i) * tile_cols + j];
    }
    // Groups of rows, all of which lie in `out`.
    __device__ __forceinline__ int first_group() const { return (row_begin + kGroup - 1) / kGroup; }
    __device__ __forceinline__ int end_group() const { return (row_begin + height) / kGroup; }
};

// Pixels (k, l) to (k, l + N) of channel c of a patch: with a fused pixel shuffle of factor r, pixel (Y, X) of channel
// c is element (Y / r, X / r) of channel c·r² + (Y mod r)·r + X mod r.
template <int N, typename T, typename W>
__device__ __forceinline__ Pack<T, N> load_pixels(const StitchPlan<W>& plan, const Place& place, int64_t c, int k,
                                                  int l) {
    const T* patch = static_cast<const T*>(place.data);
    const int r = plan.shuffle;
    if (r == 1) {
        const T* row = patch + c * place.c + k * int64_t{place.y};
        if (plan.x == 1) return load_pack<N>(row + l);
        Pack<T, N> pack;
#pragma unroll
        for (int e = 0; e < N; ++e) pack.at[e] = row[(l + e) * plan.x];
        return pack;
    }
    const T* row = patch + (c * r * r + k % r * r) * place.c + k / r * int64_t{place.y};
    Pack<T, N> pack;
    if constexpr (N % 4 == 0) {
        // The channels of one LR pixel lie side by side.
        if (r == 4 && place.c == 1 && l % 4 == 0) {
#pragma unroll
            for (int e = 0; e < N; e += 4) {
                const Pack<T, 4> pixel = load_pack<4>(row + (l + e) / 4 * plan.x);
#pragma unroll
                for (int d = 0; d < 4; ++d) pack.at[e + d] = pixel.at[d];
            }
            return pack;
        }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const int pixel = (l + e) / r;
        pack.at[e] = row[pixel * plan.x + (l + e - pixel * r) * int64_t{place.c}];
    }
    return pack;
}

}  // namespace
}  // namespace fastroute
