// The pixels of a patch in whole vectors of every output row at a time, where at most two tile rows and columns meet.
// With a fused pixel shuffle of factor 4, one LR pixel holds 4 x 4 values per channel, so four of them are a 4 x 4
// square of runs to transpose; rows that were just computed lie as they are written. Only for AVX-512; other
// instruction sets take the general way, with the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/pixel.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace fastroute {

// One LR row of a patch, [count, channels, 4, 4] values, `step` apart; `ahead` is what will be read next.
struct ShuffledRow {
    const float* pixels;
    const float* ahead;
    int64_t step, count, channels;
};

// Rows of a patch, [channels, rows, count] values.
struct PlanarRows {
    const float* pixels;
    int64_t channel_step, row_step, channels, rows, count;
};

// Types of patches and image for which there are the functions below, and whether the processor has what they need.
template <typename T, typename Out>
inline constexpr bool kWideRuns = FASTROUTE_X86 && !std::is_same_v<T, double> && !std::is_same_v<Out, double>;

inline bool has_wide_runs() { return active_isa() == Isa::avx512; }

// What becomes of the weighed values of one tile.
enum class Runs {
    keep,    // stored until the next tile column adds to them
    put,     // to the image
    begin,   // times the row's weight, stored until the next tile row adds to them
    finish,  // times the row's weight, added to what was stored, to the image
};

// Where they go; all of it begins at the first row and column of the runs.
template <typename Out>
struct RunTarget {
    const float* weight_x;  // [columns]
    const float* weight_y;  // [rows]
    float* window;          // [channels, rows, columns]: what the tile column before kept, and what is kept
    float* sum;             // the same of the tile row before
    Out* out;
    int64_t window_channel, window_row, sum_channel, sum_row, out_channel, out_row;
    bool stream;
};

#if FASTROUTE_X86
#define FASTROUTE_WIDE FASTROUTE_AVX512 FASTROUTE_INLINE

// Four vectors of four runs each, transposed.
FASTROUTE_WIDE void transpose_runs(__m512& a, __m512& b, __m512& c, __m512& d) {
    const __m512 low0 = _mm512_shuffle_f32x4(a, b, 0x44), low1 = _mm512_shuffle_f32x4(c, d, 0x44);
    const __m512 high0 = _mm512_shuffle_f32x4(a, b, 0xee), high1 = _mm512_shuffle_f32x4(c, d, 0xee);
    a = _mm512_shuffle_f32x4(low0, low1, 0x88);
    b = _mm512_shuffle_f32x4(low0, low1, 0xdd);
    c = _mm512_shuffle_f32x4(high0, high1, 0x88);
    d = _mm512_shuffle_f32x4(high0, high1, 0xdd);
}

// [0, 1] as integers, rounded half to even as by `to_pixel`; the maximum returns its second operand for NaN.
FASTROUTE_WIDE __m512i wide_integers(__m512 value, float maximum) {
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_setzero_ps()), _mm512_set1_ps(1.0f));
    return _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(maximum)));
}

FASTROUTE_WIDE void put_run(uint8_t* to, __mmask16 mask, __m512 value, bool) {
    const __m512i integers = wide_integers(value, 255.0f);
    if (mask == 0xffff) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(integers));
    } else {
        _mm512_mask_cvtepi32_storeu_epi8(to, mask, integers);
    }
}

FASTROUTE_WIDE void put_run(uint16_t* to, __mmask16 mask, __m512 value, bool) {
    const __m512i integers = wide_integers(value, 65535.0f);
    if (mask == 0xffff) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(integers));
    } else {
        _mm512_mask_cvtepi32_storeu_epi16(to, mask, integers);
    }
}

FASTROUTE_WIDE void put_run(float* to, __mmask16 mask, __m512 value, bool stream) {
    if (stream && mask == 0xffff && reinterpret_cast<uintptr_t>(to) % kLine == 0) {
        _mm512_stream_ps(to, value);
    } else {
        _mm512_mask_storeu_ps(to, mask, value);
    }
}

FASTROUTE_WIDE void put_run(Half* to, __mmask16 mask, __m512 value, bool) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rounded half to even by an addition to the bits; NaN is one pattern.
FASTROUTE_WIDE void put_run(BFloat16* to, __mmask16 mask, __m512 value, bool) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    _mm256_mask_storeu_epi16(to, mask,
                             _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}

// One row of a RunTarget. Held by value: the compiler cannot know that bytes written to an image are none of its
// fields.
template <typename Out>
struct RowTarget {
    const float* weight_x;
    float weight_y;
    float *window, *sum;
    Out* out;
    bool stream;

    FASTROUTE_INLINE RowTarget(const RunTarget<Out>& to, int64_t c, int64_t row)
        : weight_x(to.weight_x),
          weight_y(to.weight_y[row]),
          window(to.window + c * to.window_channel + row * to.window_row),
          sum(to.sum + c * to.sum_channel + row * to.sum_row),
          out(to.out + c * to.out_channel + row * to.out_row),
          stream(to.stream) {}
};

// Values of columns [x, x + 16) times the column's weight, with Joined added to the window, else to 0.
template <Runs To, bool Joined, typename Out>
FASTROUTE_WIDE void weigh_wide(__m512 value, __m512 weight, __mmask16 mask, int64_t x, RowTarget<Out> to) {
    const __m512 zero = _mm512_setzero_ps();
    const __m512 before = Joined ? _mm512_maskz_loadu_ps(mask, to.window + x) : zero;
    value = _mm512_add_ps(before, _mm512_mul_ps(weight, value));
    if constexpr (To == Runs::keep) {
        _mm512_mask_storeu_ps(to.window + x, mask, value);
        return;
    }
    if constexpr (To == Runs::begin || To == Runs::finish) {
        const __m512 above = To == Runs::finish ? _mm512_maskz_loadu_ps(mask, to.sum + x) : zero;
        value = _mm512_add_ps(above, _mm512_mul_ps(_mm512_set1_ps(to.weight_y), value));
    }
    if constexpr (To == Runs::begin) {
        _mm512_mask_storeu_ps(to.sum + x, mask, value);
    } else {
        put_run(to.out + x, mask, value, to.stream);
    }
}

// One LR row.
template <Runs To, bool Joined, typename Out>
FASTROUTE_AVX512 __attribute__((noinline)) void shuffled_run(const ShuffledRow& from, const RunTarget<Out>& to) {
    for (int64_t l = 0; l < from.count; l += 4) {
        const int64_t left = from.count - l < 4 ? from.count - l : 4, x = 4 * l;
        const __mmask16 mask = static_cast<__mmask16>((1 << 4 * left) - 1);
        const int64_t second = left > 1 ? from.step : 0, third = left > 2 ? 2 * from.step : 0;
        const int64_t fourth = left > 3 ? 3 * from.step : 0;
        const __m512 weight = _mm512_maskz_loadu_ps(mask, to.weight_x + x);
        for (int64_t c = 0; c < from.channels; ++c) {
            // Not into the first level, where the window is.
            const float* ahead = from.ahead + l * from.step + c * 16;
            _mm_prefetch(ahead, _MM_HINT_T1);
            _mm_prefetch(ahead + second, _MM_HINT_T1);
            _mm_prefetch(ahead + third, _MM_HINT_T1);
            _mm_prefetch(ahead + fourth, _MM_HINT_T1);
            const float* pixel = from.pixels + l * from.step + c * 16;
            __m512 run[4] = {_mm512_loadu_ps(pixel), _mm512_loadu_ps(pixel + second), _mm512_loadu_ps(pixel + third),
                             _mm512_loadu_ps(pixel + fourth)};
            transpose_runs(run[0], run[1], run[2], run[3]);
#pragma GCC unroll 4
            for (int64_t row = 0; row < 4; ++row) {
                weigh_wide<To, Joined>(run[row], weight, mask, x, RowTarget<Out>(to, c, row));
            }
        }
    }
}

// Columns [x, x + 16) of one row. Unit: the weights are 1, and nothing is added to.
template <Runs To, bool Joined, bool Unit, typename Out>
FASTROUTE_WIDE void weigh_vector(const float* pixels, int64_t x, __mmask16 mask, RowTarget<Out> to) {
    const __m512 value = _mm512_maskz_loadu_ps(mask, pixels + x);
    if constexpr (Unit && To == Runs::put) {
        put_run(to.out + x, mask, value, to.stream);
    } else {
        weigh_wide<To, Joined>(value, _mm512_maskz_loadu_ps(mask, to.weight_x + x), mask, x, to);
    }
}

// Columns [begin, end) of one row.
template <Runs To, bool Joined, bool Unit, typename Out>
FASTROUTE_WIDE void weigh_planar(const float* pixels, int64_t begin, int64_t end, RowTarget<Out> to) {
    int64_t x = begin;
    for (; x + 16 <= end; x += 16) weigh_vector<To, Joined, Unit>(pixels, x, 0xffff, to);
    if (x < end) weigh_vector<To, Joined, Unit>(pixels, x, static_cast<__mmask16>((1 << (end - x)) - 1), to);
}

// Some rows of all channels of a tile. Its first `shared` columns are added to the window, `finished` are done with,
// and the others are put into the window, whose first column is then that of the next tile.
template <Runs To, bool Unit, typename Out>
FASTROUTE_AVX512 __attribute__((noinline)) void planar_rows(const PlanarRows& from, int64_t shared, int64_t finished,
                                                            const RunTarget<Out>& to) {
    for (int64_t c = 0; c < from.channels; ++c) {
        for (int64_t row = 0; row < from.rows; ++row) {
            const float* pixels = from.pixels + c * from.channel_step + row * from.row_step;
            RowTarget<Out> at(to, c, row);
            weigh_planar<To, true, false>(pixels, 0, shared, at);
            weigh_planar<To, false, Unit>(pixels, shared, finished, at);
            at.window -= finished;
            weigh_planar<Runs::keep, false, false>(pixels, finished, from.count, at);
        }
    }
}

template <typename Out>
void each_planar_row(Runs mode, bool unit, const PlanarRows& from, int64_t shared, int64_t finished,
                     const RunTarget<Out>& to) {
    switch (mode) {
        case Runs::put:
            return unit ? planar_rows<Runs::put, true>(from, shared, finished, to)
                        : planar_rows<Runs::put, false>(from, shared, finished, to);
        case Runs::begin: return planar_rows<Runs::begin, false>(from, shared, finished, to);
        case Runs::finish: return planar_rows<Runs::finish, false>(from, shared, finished, to);
        case Runs::keep: return;  // never of whole rows
    }
}

#undef FASTROUTE_WIDE

template <typename Out>
void each_shuffled_run(Runs to, bool joined, const ShuffledRow& from, const RunTarget<Out>& target) {
    switch (to) {
        case Runs::keep: return shuffled_run<Runs::keep, false>(from, target);
        case Runs::put:
            return joined ? shuffled_run<Runs::put, true>(from, target) : shuffled_run<Runs::put, false>(from, target);
        case Runs::begin:
            return joined ? shuffled_run<Runs::begin, true>(from, target)
                          : shuffled_run<Runs::begin, false>(from, target);
        case Runs::finish:
            return joined ? shuffled_run<Runs::finish, true>(from, target)
                          : shuffled_run<Runs::finish, false>(from, target);
    }
}
#endif

}  // namespace fastroute
