// conv3x3 in bfloat16, with AVX-512 BF16, by direct sums: 9 taps are 9 shifted images whose channels are multiplied in
// pairs. Sums are float32 and rounded once, when they are written.
// To a few channels, say of an image at the end of a network, vectors across outputs would be nearly empty: there the
// products with all 9 taps are made at every pixel first, as 9 times as many outputs, and then added where they belong.
#pragma once

#include "cpu/bf16_products.h"

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/conv3x3/plan.h"

#if FASTROUTE_X86
#define FASTROUTE_SIMD FASTROUTE_AVX512_BF16 FASTROUTE_INLINE

namespace fastroute::conv3x3::half {

using bf16::kLanes, bf16::Number, bf16::Pairs;

// Pixels of a row that pass together: three rows of them stay in the first-level cache at 64 channels.
inline constexpr int64_t kAcross = 48;

// Pairs of all channels of a group at up to 9 taps.
struct Taps {
    std::array<Pairs, 18> pairs;
    int64_t number = 0;

    // The last of an odd number of channels stands beside the one before it, whose weight is 0 there.
    void add(const Direct& p, const Number* first, const float* weight, int64_t columns) {
        pairs[number++] = {first, p.in / 2, p.x.pixel, weight};
        if (p.in % 2 == 1) pairs[number++] = {first + p.in - 2, 1, p.x.pixel, weight + p.in / 2 * columns};
    }
};

// `Pixels` pixels from (y, x) on and `Vectors` vectors of outputs from column `first` on.
template <int Pixels, int Vectors>
FASTROUTE_AVX512_BF16 __attribute__((noinline)) void run_pixels(const Direct& p, const Taps& taps, int64_t offset,
                                                                int64_t n, int64_t y, int64_t x, int64_t group,
                                                                int64_t first) {
    __m512 sum[Pixels][Vectors];
    bf16::multiply(taps.pairs.data(), taps.number, offset, p.columns, first, p.bias + group * p.columns, sum);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        const int64_t column = first + v * kLanes, part = column / p.lanes, within = column % p.lanes;
        const int64_t count = std::min(kLanes, p.shown - within), channel = group * p.shown + within;
        if (count <= 0) continue;  // padding alone
        const int64_t to_y = y * p.shuffle + part / p.shuffle, to_x = x * p.shuffle + part % p.shuffle;
        const __m512 slope = _mm512_loadu_ps(p.slope + group * p.columns + column);
        Number* to = p.y.at(n, to_y, to_x, channel);
        const Number* add = p.residual.data == nullptr ? nullptr : p.residual.at(n, to_y, to_x, channel);
#pragma GCC unroll 12
        for (int i = 0; i < Pixels; ++i) {
            __m512 value = sum[i][v];
            if (p.rectified) value = bf16::rectified(value, slope);
            if (add != nullptr)
                value = value + bf16::widened(add + i * p.shuffle * p.residual.pixel, p.residual.channel, count);
            bf16::store_rounded(to + i * p.shuffle * p.y.pixel, value, count);
        }
    }
}

template <int Vectors>
void run_vectors(const Direct& p, const Taps& taps, int64_t n, int64_t y, int64_t begin, int64_t end, int64_t group,
                 int64_t first) {
    constexpr int pixels = bf16::kPixels<Vectors>;
    int64_t x = begin;
    for (; x + pixels <= end; x += pixels) run_pixels<pixels, Vectors>(p, taps, x - begin, n, y, x, group, first);
    // Rows are seldom a multiple of it.
    constexpr int fewer = pixels / 3;
    for (; x + fewer <= end; x += fewer) run_pixels<fewer, Vectors>(p, taps, x - begin, n, y, x, group, first);
    for (; x < end; ++x) run_pixels<1, Vectors>(p, taps, x - begin, n, y, x, group, first);
}

// Pixels [begin, end) of a row, all with the same taps: those between `from` and `to`, across, lie inside of the image.
inline void run_stretch(const Direct& p, int64_t n, int64_t y, int64_t begin, int64_t end, int64_t from, int64_t to) {
    for (int64_t group = 0; group < p.groups; ++group) {
        Taps taps;
        for (int64_t i = 0; i < 3; ++i) {
            if (y - 1 + i < -p.context || y - 1 + i >= p.height + p.context) continue;
            for (int64_t j = from; j <= to; ++j) {
                const int64_t row = ((i * 3 + j) * p.groups + group) * p.pairs;
                const Number* at = p.x.at(n, y - 1 + i, begin - 1 + j, group * p.in);
                taps.add(p, at, p.weight + row * p.columns, p.columns);
            }
        }
        for (int64_t first = 0; first < p.columns; first += bf16::kMostVectors * kLanes) {
            switch (std::min<int64_t>(bf16::kMostVectors, (p.columns - first) / kLanes)) {
                case 4: run_vectors<4>(p, taps, n, y, begin, end, group, first); break;
                case 3: run_vectors<3>(p, taps, n, y, begin, end, group, first); break;
                case 2: run_vectors<2>(p, taps, n, y, begin, end, group, first); break;
                default: run_vectors<1>(p, taps, n, y, begin, end, group, first); break;
            }
        }
    }
}

inline void run_row(const Direct& p, int64_t n, int64_t y) {
    const int64_t last = p.width - 1;
    run_stretch(p, n, y, 0, 1, 1, last == 0 ? 1 : 2);
    for (int64_t x = 1; x < last; x += kAcross) run_stretch(p, n, y, x, std::min(x + kAcross, last), 0, 2);
    if (last > 0) run_stretch(p, n, y, last, last + 1, 0, 1);
}

// To few channels: one group, no shuffle.

// Products with all taps, tap * shown + channel the column, of one row: [1 + width + 1][columns], zeros at both ends.
template <int Pixels, int Vectors>
FASTROUTE_AVX512_BF16 __attribute__((noinline)) void run_products(const Taps& row, int64_t at, const float* zeros,
                                                                  float* to) {
    __m512 sum[Pixels][Vectors];
    bf16::multiply(row.pairs.data(), row.number, at, Vectors * kLanes, 0, zeros, sum);
    for (int i = 0; i < Pixels; ++i) {
        for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(to + ((at + i) * Vectors + v) * kLanes, sum[i][v]);
    }
}

template <int Vectors>
void run_products_of_row(const Few& few, const Taps& row, int64_t width, float* to) {
    constexpr int pixels = bf16::kPixels<Vectors>;
    int64_t x = 0;
    for (; x + pixels <= width; x += pixels) run_products<pixels, Vectors>(row, x, few.zeros.data(), to);
    for (; x < width; ++x) run_products<1, Vectors>(row, x, few.zeros.data(), to);
}

// Row y from the products of three rows, those outside of the image null.
FASTROUTE_AVX512_BF16 __attribute__((noinline)) inline void add_taps(const Direct& p, const Few& few,
                                                                     const std::array<const float*, 3>& rows, int64_t n,
                                                                     int64_t y) {
    const __m128 bias = _mm_loadu_ps(p.bias), slope = _mm_loadu_ps(p.slope);
    const auto shown = static_cast<__mmask8>((1u << p.shown) - 1);
    for (int64_t x = 0; x < p.width; ++x) {
        __m128 sum = bias;
        for (int64_t i = 0; i < 3; ++i) {
            if (rows[i] == nullptr) continue;
            const float* products = rows[i] + x * few.columns + i * 3 * p.shown;
            for (int64_t j = 0; j < 3; ++j) sum = _mm_add_ps(sum, _mm_loadu_ps(products + j * (few.columns + p.shown)));
        }
        if (p.rectified)
            sum = _mm_mask_blend_ps(_mm_cmp_ps_mask(sum, _mm_setzero_ps(), _CMP_GT_OQ), _mm_mul_ps(sum, slope), sum);
        if (p.residual.data != nullptr) {
            float added[4] = {};
            for (int64_t o = 0; o < p.shown; ++o) added[o] = *p.residual.at(n, y, x, o);
            sum = _mm_add_ps(sum, _mm_loadu_ps(added));
        }
        _mm_mask_storeu_epi16(p.y.at(n, y, x, 0), shown, (__m128i)_mm_cvtneps_pbh(sum));
    }
}

// Rows [begin, end) of image n.
inline void run_few_rows(const Direct& p, const Few& few, int64_t n, int64_t begin, int64_t end) {
    const int64_t length = (p.width + 2) * few.columns;
    std::vector<float> products(3 * length);
    std::array<const float*, 3> rows{};
    for (int64_t y = begin - 1; y <= end; ++y) {
        rows = {rows[1], rows[2], nullptr};
        if (y >= -p.context && y < p.height + p.context) {
            float* to = products.data() + (y + 3) % 3 * length;
            Taps row;
            row.add(p, p.x.at(n, y, 0, 0), few.weight.data(), few.columns);
            switch (few.columns / kLanes) {
                case 1: run_products_of_row<1>(few, row, p.width, to + few.columns); break;
                case 2: run_products_of_row<2>(few, row, p.width, to + few.columns); break;
                default: run_products_of_row<3>(few, row, p.width, to + few.columns); break;
            }
            rows[2] = to;
        }
        if (y > begin) add_taps(p, few, rows, n, y - 1);
    }
}

}  // namespace fastroute::conv3x3::half

#undef FASTROUTE_SIMD
#endif
