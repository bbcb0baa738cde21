// The last layers of a branch, computed for a few output rows of one patch at a time: a 1 x 1 convolution and a leaky
// rectifier, or none, then a convolution and a pixel shuffle; or a separable interpolation, A x Aᵀ of every channel.
// What the patches hold between the branches and the stitching is then the few features that the layers read. Taps of
// the convolution that are 0 everywhere, as nearly half are where it stands for a transposed one, are left out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::upsampler {

// Columns of a row buffer come in multiples of this, and as many zeros lie before them as the widest kernel reads.
inline constexpr int64_t kRowAlign = 32, kRowPad = 16;

// Rows of a Band that go through it together.
inline constexpr int64_t kBandLanes = 16;
// Taps of a Band and rows of a convolution's kernel, at most.
inline constexpr int64_t kMostRows = 8;

// One output row of some channels. `rows`: [taps] LR rows of [units], `step` apart; `out`: channels `channel_step`
// apart.
using ConvolveRow = void (*)(const float* const* rows, int64_t taps, int64_t units, int64_t step, int64_t width,
                             const float* weight, const float* bias, float* out, int64_t channel_step);

// Kernels for shuffle factor, kernel size, and which (column of the kernel, phase) is not 0 everywhere; by channels.
struct Pattern {
    int64_t shuffle, kernel;
    unsigned mask;
    ConvolveRow run[2];  // 1 channel, 3 channels
};

// Some channels of one row phase.
struct Part {
    int64_t channel, channels;
    ConvolveRow run;
    std::vector<int64_t> taps;  // rows of the kernel that are not 0 everywhere
    std::vector<float> weight;  // [taps][units][columns, phases, channels that are not 0 everywhere]
    std::vector<float> bias;    // [channels][phases]
};

// A banded matrix [rows, columns], each of whose rows has `taps` numbers side by side that may not be 0.
struct Band {
    int64_t rows, taps;
    std::vector<int32_t> first;      // [rows], the column of the first of them; never falls
    std::vector<float> coefficient;  // [taps][rows in whole vectors]
    // The same columns within the kLanes columns from that of the first of every kBandLanes rows, where they fit.
    std::vector<int32_t> lane;  // [taps][rows in whole vectors], or empty

    int64_t padded() const { return (rows + kBandLanes - 1) / kBandLanes * kBandLanes; }
};

struct Upsampler {
    int64_t features = 0, units = 0, channels = 0, shuffle = 0, kernel = 0;
    bool expands = false;
    std::vector<float> expand;              // [units / 8][features][8]
    std::vector<float> expand_bias, slope;  // [units]
    std::vector<std::vector<Part>> parts;   // [shuffle]
    std::optional<Band> band, across;       // of an interpolation: its rows and its columns

    // Floats of the buffers of a Patch of so many columns.
    int64_t scratch(int64_t columns) const {
        const int64_t width = (columns + kRowAlign - 1) / kRowAlign * kRowAlign;
        return features * width + (kernel + 1) * (units * (kRowPad + width) + 2 * kRowPad);
    }
};

#define FASTROUTE_BODY "cpu/stitch_patches/upsampler_rows.h"
#include "cpu/each_isa.h"

// The functions of one instruction set.
struct Kernels {
    const Pattern *begin, *end;
    void (*expand_row)(const Upsampler& u, const float* planar, int64_t width, float* row, int64_t step);
    void (*blend_row)(const Upsampler& u, int64_t k, const float* const* rows, int64_t step, int64_t width,
                      float* blended, float* out, int64_t channel_step);

    static const Kernels& active() {
#if FASTROUTE_X86
        static const Kernels widest{.begin = std::begin(avx512::kPatterns),
                                    .end = std::end(avx512::kPatterns),
                                    .expand_row = avx512::expand_row,
                                    .blend_row = avx512::blend_row};
        static const Kernels wide{.begin = std::begin(avx2::kPatterns),
                                  .end = std::end(avx2::kPatterns),
                                  .expand_row = avx2::expand_row,
                                  .blend_row = avx2::blend_row};
        if (active_isa() == Isa::avx512) return widest;
        if (active_isa() == Isa::avx2) return wide;
#endif
        static const Kernels any{.begin = std::begin(baseline::kPatterns),
                                 .end = std::end(baseline::kPatterns),
                                 .expand_row = baseline::expand_row,
                                 .blend_row = baseline::blend_row};
        return any;
    }

    // The kernels that compute no more than they must; null where there are none.
    const Pattern* find(int64_t shuffle, int64_t kernel, unsigned mask) const {
        for (const Pattern* p = begin; p != end; ++p) {
            if (p->shuffle == shuffle && p->kernel == kernel && (mask & ~p->mask) == 0) return p;
        }
        return nullptr;
    }
};

// Strides of the features of a patch, in elements.
struct FeatureStep {
    int64_t c, y, x;
};

// One LR row of features as [features][size], rows `pitch` apart; by squares of four where channels lie side by side.
inline void copy_planar(const float* from, FeatureStep at, int64_t features, int64_t size, float* to, int64_t pitch) {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    const int64_t squares = at.c == 1 ? 4 : 0;
    for (int64_t l = 0; l < size; l += 4) {
        const int64_t columns = std::min<int64_t>(size - l, 4);
        int64_t f = 0;
        for (; squares == 4 && columns == 4 && f + 4 <= features; f += 4) {
            Four a[4], b[4];
            for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Four*>(from + (l + i) * at.x + f);
            b[0] = Four{a[0][0], a[1][0], a[0][1], a[1][1]};
            b[1] = Four{a[2][0], a[3][0], a[2][1], a[3][1]};
            b[2] = Four{a[0][2], a[1][2], a[0][3], a[1][3]};
            b[3] = Four{a[2][2], a[3][2], a[2][3], a[3][3]};
            a[0] = Four{b[0][0], b[0][1], b[1][0], b[1][1]};
            a[1] = Four{b[0][2], b[0][3], b[1][2], b[1][3]};
            a[2] = Four{b[2][0], b[2][1], b[3][0], b[3][1]};
            a[3] = Four{b[2][2], b[2][3], b[3][2], b[3][3]};
            for (int i = 0; i < 4; ++i) *reinterpret_cast<Four*>(to + (f + i) * pitch + l) = a[i];
        }
        for (; f < features; ++f) {
            for (int64_t i = 0; i < columns; ++i) to[f * pitch + l + i] = from[f * at.c + (l + i) * at.x];
        }
    }
}

// Buffers of one thread, for any number of patches.
struct Buffers {
    std::vector<float> values;
    // Whose zeros lie where they must, and for how many columns.
    const Upsampler* padded_for = nullptr;
    int64_t padded_width = 0;

    void reserve(int64_t count) {
        if (count > static_cast<int64_t>(values.size())) values.resize(count);
    }
};

// A patch, or a region, of `height` x `columns` LR pixels, whose output rows are computed from the top to the bottom,
// some at a time.
class Patch {
  public:
    // `row` is the first output row that will be asked for; `buffers` hold `u.scratch(columns)` floats.
    Patch(const Upsampler& u, const float* features, FeatureStep at, int64_t height, int64_t columns, int64_t row,
          Buffers* buffers)
        : u(u), features(features), at(at), height(height), columns(columns), planar(buffers->values.data()) {
        width = (columns + kRowAlign - 1) / kRowAlign * kRowAlign, step = kRowPad + width;
        row_size = u.units * step + 2 * kRowPad;
        held = planar + u.features * width;
        outside = held + u.kernel * row_size;
        next = u.band.has_value() ? u.band->first[row] : std::max<int64_t>(row / u.shuffle - u.kernel / 2, 0);
        for (int64_t y = 0; y <= u.kernel / 2; ++y) prefetch(next + y);
        if (buffers->padded_for == &u && buffers->padded_width == width) return;
        buffers->padded_for = &u, buffers->padded_width = width;
        std::fill(outside, outside + row_size, 0.0f);
        // Each row of each unit ends in the zeros that the next one begins with.
        for (int64_t r = 0; r < u.kernel; ++r) {
            for (int64_t d = 0; d <= u.units; ++d) {
                float* pad = held + r * row_size + d * step;
                std::fill(pad, pad + kRowPad, 0.0f);
            }
        }
    }

    // Output rows [begin, end): channel c of row k goes to tile + c · channel_step + (k - begin) · row_step. What lies
    // behind the last column, up to a multiple of kRowAlign LR pixels, is overwritten too.
    void compute(int64_t begin, int64_t end, float* tile, int64_t row_step, int64_t channel_step) {
        if (u.band.has_value()) return interpolate(*u.band, begin, end, tile, row_step, channel_step);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t y = k / u.shuffle, reach = u.kernel / 2;
            for (; next <= std::min(y + reach, height - 1); ++next) prepare(next);
            for (const Part& part : u.parts[k % u.shuffle]) {
                const float* rows[kMostRows];
                const int64_t taps = static_cast<int64_t>(part.taps.size());
                for (int64_t t = 0; t < taps; ++t) {
                    const int64_t from = y + part.taps[t] - reach;
                    rows[t] = from >= 0 && from < height ? row(from) : outside + kRowPad;
                }
                part.run(rows, taps, u.units, step, width, part.weight.data(), part.bias.data(),
                         tile + part.channel * channel_step + (k - begin) * row_step, channel_step);
            }
        }
    }

  private:
    void interpolate(const Band& band, int64_t begin, int64_t end, float* tile, int64_t row_step,
                     int64_t channel_step) {
        for (int64_t k = begin; k < end; ++k) {
            for (; next < band.first[k] + band.taps; ++next) prepare(next);
            const float* rows[kMostRows];
            for (int64_t t = 0; t < band.taps; ++t) rows[t] = row(band.first[k] + t);
            kernels.blend_row(u, k, rows, step, width, planar, tile + (k - begin) * row_step, channel_step);
        }
    }

    float* row(int64_t y) const { return held + y % u.kernel * row_size + kRowPad; }

    // Asks for LR row y.
    void prefetch(int64_t y) const {
        if (y >= height || at.c != 1) return;
        const char* from = reinterpret_cast<const char*>(features + y * at.y);
        for (int64_t byte = 0; byte < columns * at.x * 4; byte += 64) __builtin_prefetch(from + byte, 0, 2);
    }

    // What the convolution reads of LR row y.
    void prepare(int64_t y) const {
        float* to = row(y);
        prefetch(y + 1);
        copy_planar(features + y * at.y, at, u.features, columns, u.expands ? planar : to, u.expands ? width : step);
        if (u.expands) {
            for (int64_t f = 0; f < u.features && columns < width; ++f)
                std::fill(planar + f * width + columns, planar + (f + 1) * width, 0.0f);
            kernels.expand_row(u, planar, width, to, step);
        }
        for (int64_t d = 0; d < u.units && columns < width; ++d)
            std::fill(to + d * step + columns, to + d * step + width, 0.0f);
    }

    const Upsampler& u;
    const Kernels& kernels = Kernels::active();
    const float* features;
    FeatureStep at;
    int64_t height, columns, width, step, row_size;
    int64_t next;    // LR row to prepare
    float* planar;   // [features, width]
    float* held;     // [kernel, row_size]: the rows that an output row reads, in turn
    float* outside;  // [row_size]: a row of zeros
};

}  // namespace fastroute::upsampler
