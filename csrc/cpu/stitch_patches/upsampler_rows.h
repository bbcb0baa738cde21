// Rows of an upsampled patch, in one instruction set: out[c, x · R + r] = bias[c, r] + Σ_t Σ_d Σ_k weight[c, r, d, t,
// k] · row_t[d, x + k - K / 2] over the rows t of the kernel, units d and columns k; an expansion, unit by unit, before
// it; or an interpolation, rows before columns. A block of registers holds all channels and phases of one or two
// vectors of LR pixels. Included once per instruction set, as simd.h is.

#include "cpu/simd.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// Vectors of neighbouring LR pixels that a register block holds: 3 channels of 4 phases by 2 leave 8 of 32 AVX-512
// registers for operands, by 1 they leave 4 of 16 AVX2 ones.
inline constexpr int kVectors = FASTROUTE_BYTES == 64 ? 2 : 1;
inline constexpr int kLanes = Simd<float>::lanes;
inline constexpr int kColumns = kVectors * kLanes;
static_assert(kRowAlign % kColumns == 0);

template <int... I>
constexpr auto zip_low(std::integer_sequence<int, I...>) {
    return std::integer_sequence<int, (I % 2 * static_cast<int>(sizeof...(I)) + I / 2)...>{};
}

template <int... I>
constexpr auto zip_high(std::integer_sequence<int, I...>) {
    constexpr int lanes = sizeof...(I);
    return std::integer_sequence<int, (I % 2 * lanes + lanes / 2 + I / 2)...>{};
}

// a0 b0 a1 b1 ...
FASTROUTE_SIMD void zip(Vector<float>& a, Vector<float>& b) {
    using All = std::make_integer_sequence<int, kLanes>;
    const Vector<float> low = pick<float>(a, b, zip_low(All{})), high = pick<float>(a, b, zip_high(All{}));
    a = low;
    b = high;
}

// R phases of one vector of LR pixels, interleaved: the pixel shuffle of one row.
template <int R>
FASTROUTE_SIMD void put_phases(Vector<float>* phase, float* to) {
    if constexpr (R == 4) {
        zip(phase[0], phase[2]);
        zip(phase[1], phase[3]);
        zip(phase[0], phase[1]);
        zip(phase[2], phase[3]);
    } else if constexpr (R == 2) {
        zip(phase[0], phase[1]);
    }
    for (int r = 0; r < R; ++r) {
        if constexpr (R == 3) {
            for (int l = 0; l < kLanes; ++l) to[l * R + r] = phase[r][l];
        } else {
            store(to + r * kLanes, phase[r]);
        }
    }
}

// One output row of C channels: the sum of all taps of its row phase, bias first, then rows of the kernel, units,
// columns of the kernel.
template <int C, int R, int K, unsigned Mask>
FASTROUTE_TARGET __attribute__((noinline)) void convolve_row(const float* const* rows, int64_t taps, int64_t units,
                                                             int64_t step, int64_t width, const float* weight,
                                                             const float* bias, float* out, int64_t channel_step) {
    for (int64_t x = 0; x < width; x += kColumns) {
        Vector<float> sum[C][kVectors][R];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[c][v][r] = broadcast<float>(bias[c * R + r]);
            }
        }
        const float* w = weight;
        for (int64_t t = 0; t < taps; ++t) {
            const float* pixel = rows[t] + x - K / 2;
            for (int64_t d = 0; d < units; ++d, pixel += step) {
#pragma GCC unroll 5
                for (int k = 0; k < K; ++k) {
                    Vector<float> value[kVectors];
#pragma GCC unroll 2
                    for (int v = 0; v < kVectors; ++v) value[v] = load(pixel + k + v * kLanes);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        if ((Mask >> (k * R + r) & 1) == 0) continue;
#pragma GCC unroll 3
                        for (int c = 0; c < C; ++c) {
                            const Vector<float> factor = broadcast<float>(*w++);
#pragma GCC unroll 2
                            for (int v = 0; v < kVectors; ++v) sum[c][v][r] = fma(factor, value[v], sum[c][v][r]);
                        }
                    }
                }
            }
        }
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) put_phases<R>(sum[c][v], out + c * channel_step + (x + v * kLanes) * R);
        }
    }
}

// The 1 x 1 convolution and its leaky rectifier on one LR row: [features, width] to [units, width], rows `step` apart.
FASTROUTE_TARGET __attribute__((noinline)) void expand_row(const Upsampler& u, const float* planar, int64_t width,
                                                           float* row, int64_t step) {
    constexpr int units = 8;  // together, as one block of registers
    const Vector<float> zero{};
    for (int64_t d = 0; d < u.units; d += units) {
        const int64_t count = std::min<int64_t>(units, u.units - d);
        const float* weight = u.expand.data() + d * u.features;  // [features][units]
        for (int64_t x = 0; x < width; x += kColumns) {
            Vector<float> sum[units][kVectors] = {};
            for (int64_t f = 0; f < u.features; ++f) {
                Vector<float> value[kVectors];
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) value[v] = load(planar + f * width + x + v * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < units; ++i) {
                    const Vector<float> factor = broadcast<float>(weight[f * units + i]);
#pragma GCC unroll 2
                    for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(factor, value[v], sum[i][v]);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < units; ++i) {
                if (i >= count) break;
                const Vector<float> bias = broadcast<float>(u.expand_bias[d + i]);
                const Vector<float> slope = broadcast<float>(u.slope[d + i]);
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) {
                    const Vector<float> y = sum[i][v] + bias;
                    store(row + (d + i) * step + x + v * kLanes, y > zero ? y : y * slope);
                }
            }
        }
    }
}

// The columns of one output row, `channels` times, from LR rows of [width] that were blended of several.
FASTROUTE_SIMD void blend_columns(const Band& band, int64_t channels, const float* blended, int64_t width, float* out,
                                  int64_t channel_step) {
    const int64_t padded = band.padded();
#if FASTROUTE_BYTES == 64
    constexpr int kTaps = 4;  // of bicubic interpolation
    if (band.taps <= kTaps && !band.lane.empty()) {
        const int32_t *first = band.first.data(), *lanes = band.lane.data();
        const float* coefficients = band.coefficient.data();
        const int64_t rows = band.rows, taps = band.taps;
        for (int64_t x = 0; x < rows; x += kLanes) {
            __m512i lane[kTaps];
            Vector<float> coefficient[kTaps] = {};
#pragma GCC unroll 4
            for (int t = 0; t < kTaps; ++t) {
                lane[t] = _mm512_loadu_si512(lanes + (t < taps ? t : 0) * padded + x);
                if (t < taps) coefficient[t] = load(coefficients + t * padded + x);
            }
            const float* from = blended + first[x];
            float* to = out + x;
            for (int64_t c = 0; c < channels; ++c, from += width, to += channel_step) {
                // What lies behind the row is of no number of the band.
                const __m512 values = _mm512_loadu_ps(from);
                Vector<float> sum{};
#pragma GCC unroll 4
                for (int t = 0; t < kTaps; ++t) {
                    sum = fma(_mm512_maskz_permutexvar_ps(0xffff, lane[t], values), coefficient[t], sum);
                }
                store(to, sum);
            }
        }
        return;
    }
#endif
    for (int64_t c = 0; c < channels; ++c, blended += width, out += channel_step) {
        for (int64_t x = 0; x < band.rows; ++x) {
            float sum = 0.0f;
            for (int64_t t = 0; t < band.taps; ++t) {
                sum += band.coefficient[t * padded + x] * blended[band.first[x] + t];
            }
            out[x] = sum;
        }
    }
}

// One output row of a separable interpolation. `blended`: room for [channels][width].
FASTROUTE_TARGET __attribute__((noinline)) void blend_row(const Upsampler& u, int64_t k, const float* const* rows,
                                                          int64_t step, int64_t width, float* blended, float* out,
                                                          int64_t channel_step) {
    const Band& band = *u.band;
    const int64_t padded = band.padded();
    // All channels first: what was just stored in two pieces cannot be read as one for a while.
    for (int64_t c = 0; c < u.channels; ++c) {
        for (int64_t x = 0; x < width; x += kLanes) {
            Vector<float> sum{};
            for (int64_t t = 0; t < band.taps; ++t) {
                const Vector<float> factor = broadcast<float>(band.coefficient[t * padded + k]);
                sum = fma(factor, load(rows[t] + c * step + x), sum);
            }
            store(blended + c * width + x, sum);
        }
    }
    blend_columns(*u.across, u.channels, blended, width, out, channel_step);
}

template <int R, int K, unsigned Mask>
constexpr Pattern pattern() {
    return {R, K, Mask, {convolve_row<1, R, K, Mask>, convolve_row<3, R, K, Mask>}};
}

// Where taps are 0 in every unit, the smallest pattern that has the others: a transposed convolution of 9 x 9 leaves 9
// of 12 columns at factor 4, and 9 of 10 at factor 2.
inline constexpr Pattern kPatterns[] = {
    pattern<4, 3, 0xef3>(), pattern<4, 3, 0xfff>(), pattern<3, 3, 0x1ff>(),
    pattern<2, 3, 0x3f>(),  pattern<2, 5, 0x3fd>(), pattern<2, 5, 0x3ff>(),
};

#undef FASTROUTE_SIMD
