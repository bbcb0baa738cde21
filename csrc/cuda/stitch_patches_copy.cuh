// Output pixels that one tile makes alone, at a weight of 1: its pixels, converted. A warp takes `kRun` groups of
// output rows and a pack of 16 bytes of `out` per lane, or two, 32 packs apart, so that neighbouring lanes write
// neighbours and both share the addresses of their rows. What lies between is blended (stitch_patches_blend.cuh).
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "cuda/stitch_patches_plan.cuh"

namespace fastroute {
namespace {

constexpr int kCopyThreads = 128;
constexpr int kRun = 4;  // groups of a warp

// How patches lie: in any way, channels at run time; or three channels in rows, or as the 48 values of an LR pixel of a
// sub-pixel convolution by 4, which begin at multiples of 16 bytes.
enum class CopyLayout { any, rows, shuffled };

// Packs of a lane: as many as its registers have addresses for, with a pack of 16-bit numbers in rows one.
template <typename T, typename Out, CopyLayout kLayout>
inline constexpr int kWide = kLayout == CopyLayout::shuffled ? (std::is_same_v<T, Half> ? 5 : 2)
                             : kLayout == CopyLayout::rows && sizeof(T) == 2 && sizeof(Out) == 1 ? 2
                                                                                                 : 1;

// The rows of a group for each of three channels, and steps of `out` in packs from image to image and from row to row.
struct CopyRows {
    uint4* at[kCopied * kGroup];
    unsigned image, row;
};

// Four pixels of float16 in two words as four bytes: clamped to [0, 1], NaN being 0, and as a multiple of 2^-24 the
// smallest numbers of float16 are integers, so that the product with 255 · 2^-24 rounds half to even by itself.
__device__ __forceinline__ unsigned bytes_of_halves(unsigned low, unsigned high) {
    const unsigned ones = 0x3c003c00u, steps = 0x00ff00ffu;
    __half2 a, b, one, step;
    memcpy(&a, &low, 4), memcpy(&b, &high, 4), memcpy(&one, &ones, 4), memcpy(&step, &steps, 4);
    a = __hmul2(__hmul2_sat(a, one), step), b = __hmul2(__hmul2_sat(b, one), step);
    memcpy(&low, &a, 4), memcpy(&high, &b, 4);
    return __byte_perm(low, high, 0x6420);
}

template <typename Out, typename T, int N>
__device__ __forceinline__ Pack<Out, N> copied(const Pack<T, N>& pixels) {
    using W = Work<T>;
    Pack<Out, N> pack;
    if constexpr (std::is_same_v<T, Half> && std::is_same_v<Out, uint8_t> && N % 4 == 0) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            unsigned low, high;
            memcpy(&low, reinterpret_cast<const char*>(pixels.at) + 2 * e, 4);
            memcpy(&high, reinterpret_cast<const char*>(pixels.at) + 2 * e + 4, 4);
            const unsigned bytes = bytes_of_halves(low, high);
            memcpy(pack.at + e, &bytes, 4);
        }
    } else {
        // The sum of one tile: -0 becomes 0.
#pragma unroll
        for (int e = 0; e < N; ++e) pack.at[e] = to_pixel<Out>(add(W(0), static_cast<W>(pixels.at[e])));
    }
    return pack;
}

// Groups [first, last) of tile row i, one pack of any layout, in pieces that need few registers.
template <typename T, typename Out>
__device__ __forceinline__ void copy_any(const StitchPlan<Work<T>>& plan, int64_t image, int i, int j, int pack,
                                         int first, int last, Out* out) {
    constexpr int M = kPiece<T, Out>;
    const Place place = plan.place(image, i, j);
    const int x = pack * kPack<Out>, l = x - plan.origin_x(j);
#pragma unroll 1
    for (int y = first * kGroup; y < last * kGroup; ++y) {
        Out* target = out + image * plan.image_step + (y - plan.row_begin) * plan.row_step + x;
#pragma unroll 1
        for (int64_t c = 0; c < plan.channels; ++c, target += plan.channel_step) {
#pragma unroll 1
            for (int e = 0; e < kPack<Out>; e += M) {
                const Pack<T, M> pixels = load_pixels<M, T>(plan, place, c, y - plan.origin_y(i), l + e);
                store_pack<M>(target + e, copied<Out>(pixels), M);
            }
        }
    }
}

// N elements from a multiple of 16 bytes on. Not through the read-only path, whose loads the compiler moves above
// stores until it runs out of registers: many warps hide the latency of few loads.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_vectors(const T* from) {
    Pack<T, N> pack;
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(pack) / sizeof(uint4)); ++v) {
        const uint4 word = __ldcs(reinterpret_cast<const uint4*>(from) + v);
        memcpy(reinterpret_cast<char*>(pack.at) + v * sizeof(uint4), &word, sizeof(uint4));
    }
    return pack;
}

// Pixels of rows r and r + 1 of a group, N from `from` on, of a channel.
template <CopyLayout kLayout, int N, typename T>
__device__ __forceinline__ void load_two_rows(const T* from, int c_step, int step, int c, int r,
                                              Pack<T, N> (&pixels)[2]) {
    if constexpr (kLayout == CopyLayout::rows) {
        pixels[0] = load_vectors<T, N>(from + c * int64_t{c_step} + r * int64_t{step});
        pixels[1] = load_vectors<T, N>(from + c * int64_t{c_step} + (r + 1) * int64_t{step});
    } else {
#pragma unroll
        for (int q = 0; q < N / 4; ++q) {
            const Pack<T, 8> two = load_vectors<T, 8>(from + (q * kCopied + c) * 16 + r * 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) pixels[0].at[4 * q + e] = two.at[e], pixels[1].at[4 * q + e] = two.at[4 + e];
        }
    }
}

// The same in vectors, of packs 32 apart, of which `tile` leaves out those below 0.
template <CopyLayout kLayout, typename T, typename Out>
__device__ __forceinline__ void copy_vectors(const StitchPlan<Work<T>>& plan, const CopyRows& rows, int64_t image,
                                             int i, const int (&tile)[kWide<T, Out, kLayout>], int pack, int first,
                                             int last) {
    constexpr int N = kPack<Out>, Wide = kWide<T, Out, kLayout>;
    const T* from[Wide];
    int c_step[Wide], step[Wide];
#pragma unroll
    for (int w = 0; w < Wide; ++w) {
        // What is left out reads pixels that nothing writes.
        const Place place = plan.place(image, i, tile[w] < 0 ? 0 : tile[w]);
        const int k = first * kGroup - plan.origin_y(i);
        const int l = tile[w] < 0 ? 0 : (pack + 32 * w) * N - plan.origin_x(tile[w]);
        from[w] = static_cast<const T*>(place.data) +
                  (kLayout == CopyLayout::rows ? k * int64_t{place.y} + l
                                               : k / 4 * int64_t{place.y} + int64_t{l / 4} * (kCopied * 16));
        c_step[w] = place.c, step[w] = place.y;
    }
    unsigned target = static_cast<unsigned>(image) * rows.image +
                      static_cast<unsigned>(first * kGroup - plan.row_begin) * rows.row + static_cast<unsigned>(pack);
#pragma unroll 1
    for (int g = first; g < last; ++g, target += kGroup * rows.row) {
#pragma unroll
        for (int c = 0; c < kCopied; ++c) {
#pragma unroll
            for (int r = 0; r < kGroup; r += 2) {
                uint4* const row[2] = {rows.at[c * kGroup + r] + target, rows.at[c * kGroup + r + 1] + target};
#pragma unroll
                for (int w = 0; w < Wide; ++w) {
                    Pack<T, N> pixels[2];
                    load_two_rows<kLayout>(from[w], c_step[w], step[w], c, r, pixels);
#pragma unroll
                    for (int d = 0; d < 2; ++d) {
                        const Pack<Out, N> pack_of = copied<Out>(pixels[d]);
                        uint4 word;
                        memcpy(&word, pack_of.at, sizeof(word));
                        if (tile[w] >= 0) row[d][32 * w] = word;
                    }
                }
            }
        }
#pragma unroll
        for (int w = 0; w < Wide; ++w) from[w] += (kLayout == CopyLayout::rows ? kGroup : 1) * int64_t{step[w]};
    }
}

template <typename T, typename Out, CopyLayout kLayout>
__global__ void __launch_bounds__(kCopyThreads, kLayout == CopyLayout::shuffled ? 8 : 7)
    stitch_patches_copy_kernel(const __grid_constant__ StitchPlan<Work<T>> plan, const __grid_constant__ CopyRows rows,
                               Out* __restrict__ out) {  // [B, C, rows, W·s]
    constexpr int Wide = kWide<T, Out, kLayout>, kWarps = kCopyThreads / 32;
    const int begin = plan.first_group(), end = plan.end_group(), packs = plan.tables.packs;
    const int across = (packs + 32 * Wide - 1) / (32 * Wide);
    const int down = (end - begin + kRun * kWarps - 1) / (kRun * kWarps);
    const int image = static_cast<int>(blockIdx.x) / (across * down);
    const int cell = static_cast<int>(blockIdx.x) - image * (across * down);
    const int first = begin + (cell / across * kWarps + static_cast<int>(threadIdx.x / 32)) * kRun;
    const int last = min(first + kRun, end);
    const int pack = cell % across * 32 * Wide + static_cast<int>(threadIdx.x % 32);
    int tile[Wide], some = -1;
#pragma unroll
    for (int w = 0; w < Wide; ++w) {
        tile[w] = pack + 32 * w < packs ? plan.tables.alone_x[pack + 32 * w] : -1;
        some = max(some, tile[w]);
    }
    if (some < 0) return;
    for (int g = first; g < last;) {
        const int from = g, i = plan.tables.alone_y[g];
        for (++g; g < last && plan.tables.alone_y[g] == i;) ++g;
        if (i < 0) continue;
        if constexpr (kLayout == CopyLayout::any) {
            copy_any<T>(plan, image, i, tile[0], pack, from, g, out);
        } else {
            copy_vectors<kLayout, T, Out>(plan, rows, image, i, tile, pack, from, g);
        }
    }
}

}  // namespace
}  // namespace fastroute
