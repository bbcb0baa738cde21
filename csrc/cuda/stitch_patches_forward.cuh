// The kernel of stitch_patches: each product and sum is rounded on its own, columns before rows. A block writes some
// rows of 32 packs of one channel, a pack being 16 bytes of patches; a thread writes one pack of a few rows.
#pragma once

#include "cuda/stitch_patches.cuh"

namespace fastroute {
namespace {

// Rows of a thread: as many as its registers hold beside their sums.
template <typename T>
inline constexpr int kRows = sizeof(T) == 2 ? 2 : 4;
// Rows of a block: a warp is 32 packs wide.
template <typename T>
inline constexpr int kBlockRows = kThreads / 32 * kRows<T>;

// Where the pixels of a patch lie: with a fused pixel shuffle of factor r, pixel (Y, X) of channel c is element (Y / r,
// X / r) of channel c·r² + (Y mod r)·r + X mod r.
struct PatchLayout {
    int64_t n, c, y, x;  // strides in elements
    int shuffle;
};

// One patch: its first pixel, and where the others lie.
template <typename T>
struct Placed {
    const T* data;
    PatchLayout layout;
};

template <typename T>
struct StitchPlan {
    const T* patches;            // [M, ...], or null where `rows` or `regions` says where each lies
    const void* const* rows;     // [M] or null
    const RegionPlace* regions;  // [N] or null
    PatchLayout layout;
    const int64_t* inverse;  // [N] or null
    int64_t count;           // M
    AxisTables<Work<T>> tables;
    int stride, last_y, last_x, tile_rows, tile_cols;  // of the grid
    int scale, span;
    int row_begin, height, width;  // rows of `out` and its width, in output pixels
    int64_t channels;
    int64_t image_step, channel_step, row_step;  // of `out`

    __device__ __forceinline__ int origin_y(int i) const {
        return (i * int64_t{stride} < last_y ? i * stride : last_y) * scale;
    }
    __device__ __forceinline__ int origin_x(int j) const {
        return (j * int64_t{stride} < last_x ? j * stride : last_x) * scale;
    }

    // Patch (i, j) of an image, in a region or one by one. Nothing can raise here: a row out of range becomes the
    // nearest.
    template <bool kRegions>
    __device__ __forceinline__ Placed<T> patch(int64_t image, int i, int j) const {
        int64_t m = (image * tile_rows + i) * tile_cols + j;
        if constexpr (kRegions) {
            const RegionPlace place = regions[m];
            return {static_cast<const T*>(place.data), {0, place.c, place.y, layout.x, layout.shuffle}};
        }
        if (inverse != nullptr) {
            const int64_t wanted = __ldg(inverse + m), last = count - 1;
            m = wanted < 0 ? 0 : (wanted < last ? wanted : last);
        }
        return {rows != nullptr ? static_cast<const T*>(rows[m]) : patches + m * layout.n, layout};
    }
};

// Pixels (k, l) to (k, l + N) of channel c of a patch.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pixels(const Placed<T>& placed, int64_t c, int k, int l) {
    const T* patch = placed.data;
    const PatchLayout& at = placed.layout;
    const int r = at.shuffle;
    if (r == 1) {
        const T* row = patch + c * at.c + k * at.y;
        if (at.x == 1) return load_pack<N>(row + l);
        Pack<T, N> pack;
#pragma unroll
        for (int e = 0; e < N; ++e) pack.at[e] = row[(l + e) * at.x];
        return pack;
    }
    const T* row = patch + (c * r * r + k % r * r) * at.c + k / r * at.y;
    Pack<T, N> pack;
    if constexpr (N % 4 == 0) {
        // The channels of one LR pixel lie side by side.
        if (r == 4 && at.c == 1 && l % 4 == 0) {
#pragma unroll
            for (int e = 0; e < N; e += 4) {
                const Pack<T, 4> pixel = load_pack<4>(row + (l + e) / 4 * at.x);
#pragma unroll
                for (int d = 0; d < 4; ++d) pack.at[e + d] = pixel.at[d];
            }
            return pack;
        }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
        const int pixel = (l + e) / r;
        pack.at[e] = row[pixel * at.x + (l + e - pixel * r) * at.c];
    }
    return pack;
}

template <int N, typename T, typename Out>
__device__ __forceinline__ void write(const StitchPlan<T>& plan, Out* out, int64_t image, int64_t c, int y, int x,
                                      const Pack<Work<T>, N>& sum) {
    Pack<Out, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.at[e] = to_pixel<Out>(sum.at[e]);
    store_pack<N>(out + image * plan.image_step + c * plan.channel_step + y * plan.row_step + x, pack, plan.width - x);
}

// One pack of one row, whatever tiles cover it.
template <int N, bool kRegions, typename T>
__device__ Pack<Work<T>, N> blend(const StitchPlan<T>& plan, int64_t image, int64_t c, int y, int x) {
    using W = Work<T>;
    const Cover rows = plan.tables.covers_y[y / plan.scale];
    const int end = (x + N < plan.width ? x + N : plan.width) - 1;
    const int first = plan.tables.covers_x[x / plan.scale].first, last = plan.tables.covers_x[end / plan.scale].last;
    Pack<W, N> sum;
#pragma unroll
    for (int e = 0; e < N; ++e) sum.at[e] = W(0);
    for (int i = rows.first; i <= rows.last; ++i) {
        const int k = y - plan.origin_y(i);
        Pack<W, N> strip;
#pragma unroll
        for (int e = 0; e < N; ++e) strip.at[e] = W(0);
        for (int j = first; j <= last; ++j) {
            const int l = x - plan.origin_x(j);
            const Placed<T> patch = plan.template patch<kRegions>(image, i, j);
            const W* weight = plan.tables.weights_x + int64_t{j} * plan.span;
            if (l >= 0 && l + N <= plan.span) {
                const Pack<T, N> pixels = load_pixels<N>(patch, c, k, l);
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    strip.at[e] = add(strip.at[e], multiply(weight[l + e], static_cast<W>(pixels.at[e])));
                }
            } else {
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    if (l + e < 0 || l + e >= plan.span || x + e > end) continue;
                    const T pixel = load_pixels<1>(patch, c, k, l + e).at[0];
                    strip.at[e] = add(strip.at[e], multiply(weight[l + e], static_cast<W>(pixel)));
                }
            }
        }
        const W weight = plan.tables.weights_y[int64_t{i} * plan.span + k];
#pragma unroll
        for (int e = 0; e < N; ++e) sum.at[e] = add(sum.at[e], multiply(weight, strip.at[e]));
    }
    return sum;
}

template <typename T, typename Out, bool kRegions>
__global__ void __launch_bounds__(kThreads, 2)
    stitch_patches_kernel(StitchPlan<T> plan, int64_t total, Out* __restrict__ out) {  // [B, C, rows, W·s]
    using W = Work<T>;
    constexpr int N = kPack<T>, Rows = kRows<T>;
    const int across = (plan.width + 32 * N - 1) / (32 * N), down = (plan.height + kBlockRows<T> - 1) / kBlockRows<T>;
    for (int64_t item = blockIdx.x; item < total; item += gridDim.x) {
        const int64_t plane = item / (int64_t{across} * down), image = plane / plan.channels, c = plane % plan.channels;
        const int cell = static_cast<int>(item - plane * across * down);
        const int top = cell / across * kBlockRows<T> + static_cast<int>(threadIdx.x / 32) * Rows;
        const int x = (cell % across * 32 + static_cast<int>(threadIdx.x % 32)) * N;
        if (x >= plan.width || top >= plan.height) continue;
        const int y = plan.row_begin + top;
        const bool whole = x + N <= plan.width && top + Rows <= plan.height;
        const Cover rows = plan.tables.covers_y[y / plan.scale], left = plan.tables.covers_x[x / plan.scale];
        const int bottom = plan.tables.covers_y[whole ? (y + Rows - 1) / plan.scale : 0].last;
        const int right = plan.tables.covers_x[whole ? (x + N - 1) / plan.scale : 0].last;
        if (whole && rows.first == bottom && left.first == right) {
            // One tile covers all of it: all reads before all writes.
            const Placed<T> patch = plan.template patch<kRegions>(image, rows.first, left.first);
            const int k = y - plan.origin_y(rows.first), l = x - plan.origin_x(left.first);
            Pack<T, N> pixels[Rows];
#pragma unroll
            for (int r = 0; r < Rows; ++r) pixels[r] = load_pixels<N>(patch, c, k + r, l);
            const Pack<W, N> weight = load_pack<N>(plan.tables.weights_x + int64_t{left.first} * plan.span + l);
#pragma unroll
            for (int r = 0; r < Rows; ++r) {
                const W weight_y = plan.tables.weights_y[int64_t{rows.first} * plan.span + k + r];
                Pack<W, N> sum;
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    const W strip = add(W(0), multiply(weight.at[e], static_cast<W>(pixels[r].at[e])));
                    sum.at[e] = add(W(0), multiply(weight_y, strip));
                }
                write<N>(plan, out, image, c, top + r, x, sum);
            }
        } else {
            for (int r = 0; r < Rows && top + r < plan.height; ++r) {
                write<N>(plan, out, image, c, top + r, x, blend<N, kRegions>(plan, image, c, y + r, x));
            }
        }
    }
}

}  // namespace
}  // namespace fastroute
