// Output pixels that several tiles make, or one at another weight than 1: each product and sum is rounded on its own,
// columns before rows. A thread writes a run of one row, of all channels, unless its pixels are copied
// (stitch_patches_copy.cuh).
#pragma once

#include "cuda/stitch_patches_plan.cuh"

namespace fastroute {
namespace {

// Rows of a block: a warp is 32 runs wide.
constexpr int kBlendRows = kThreads / 32;

template <typename W>
__device__ __forceinline__ bool is_copied(const StitchPlan<W>& plan, int y, int x) {
    const int group = y / kGroup, pack = x / plan.tables.pack;
    return group >= plan.first_group() && group < plan.end_group() && pack < plan.tables.packs &&
           plan.tables.alone_y[group] >= 0 && plan.tables.alone_x[pack] >= 0;
}

template <int N, typename T, typename W>
__device__ __forceinline__ Pack<W, N> blend(const StitchPlan<W>& plan, int64_t image, int64_t c, int y, int x,
                                            const Cover& rows, const Cover& cols) {
    const int end = (x + N < plan.width ? x + N : plan.width) - 1;
    Pack<W, N> sum;
#pragma unroll
    for (int e = 0; e < N; ++e) sum.at[e] = W(0);
    for (int i = rows.first; i <= rows.last; ++i) {
        const int k = y - plan.origin_y(i);
        Pack<W, N> strip;
#pragma unroll
        for (int e = 0; e < N; ++e) strip.at[e] = W(0);
        for (int j = cols.first; j <= cols.last; ++j) {
            const int l = x - plan.origin_x(j);
            const Place place = plan.place(image, i, j);
            const W* weight = plan.tables.weights_x + int64_t{j} * plan.span;
            if (l >= 0 && l + N <= plan.span) {
                const Pack<T, N> pixels = load_pixels<N, T>(plan, place, c, k, l);
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    strip.at[e] = add(strip.at[e], multiply(weight[l + e], static_cast<W>(pixels.at[e])));
                }
            } else {
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    if (l + e < 0 || l + e >= plan.span || x + e > end) continue;
                    const T pixel = load_pixels<1, T>(plan, place, c, k, l + e).at[0];
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

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    stitch_patches_blend_kernel(const __grid_constant__ StitchPlan<Work<T>> plan, int64_t total,
                                Out* __restrict__ out) {  // [B, C, rows, W·s]
    constexpr int N = kPiece<T, Out>;
    const int across = (plan.width + 32 * N - 1) / (32 * N), down = (plan.height + kBlendRows - 1) / kBlendRows;
    for (int64_t item = blockIdx.x; item < total; item += gridDim.x) {
        const int64_t image = item / (int64_t{across} * down);
        const int cell = static_cast<int>(item - image * across * down);
        const int line = cell / across * kBlendRows + static_cast<int>(threadIdx.x / 32);
        const int x = (cell % across * 32 + static_cast<int>(threadIdx.x % 32)) * N;
        if (x >= plan.width || line >= plan.height || is_copied(plan, plan.row_begin + line, x)) continue;
        const int y = plan.row_begin + line, end = (x + N < plan.width ? x + N : plan.width) - 1;
        const Cover rows = plan.tables.covers_y[y / plan.scale];
        const Cover cols{plan.tables.covers_x[x / plan.scale].first, plan.tables.covers_x[end / plan.scale].last};
        Out* target = out + image * plan.image_step + line * plan.row_step + x;
        for (int64_t c = 0; c < plan.channels; ++c, target += plan.channel_step) {
            const Pack<Work<T>, N> sum = blend<N, T>(plan, image, c, y, x, rows, cols);
            Pack<Out, N> pack;
#pragma unroll
            for (int e = 0; e < N; ++e) pack.at[e] = to_pixel<Out>(sum.at[e]);
            store_pack<N>(target, pack, plan.width - x);
        }
    }
}

}  // namespace
}  // namespace fastroute
