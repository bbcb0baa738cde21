// The last layers of a branch as the kernels of upsampler.h read them: taps that are 0 everywhere are left out, weights
// lie in the order of the sums, and an interpolation's matrix is its band.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/stitch_patches/upsampler.h"

namespace fastroute::upsampler {

// Layers in the order in which the kernels read them. `weight` is [C·r·r, units, K, K], `bias` [C·r·r]; `expand`
// [units, features] or null.
inline Upsampler pack(const float* expand, const float* expand_bias, const float* slope, const float* weight,
                      const float* bias, int64_t features, int64_t units, int64_t channels, int64_t shuffle,
                      int64_t kernel) {
    Upsampler u;
    u.features = features, u.units = units, u.channels = channels, u.shuffle = shuffle, u.kernel = kernel;
    u.expands = expand != nullptr;
    if (u.expands) {
        u.expand.assign((units + 7) / 8 * 8 * features, 0.0f);
        for (int64_t d = 0; d < units; ++d) {
            for (int64_t f = 0; f < features; ++f)
                u.expand[(d / 8 * features + f) * 8 + d % 8] = expand[d * features + f];
        }
        u.expand_bias.assign(expand_bias, expand_bias + units);
        u.slope.assign(slope, slope + units);
    }
    const int64_t r2 = shuffle * shuffle;
    const int64_t square = kernel * kernel;
    unsigned mask = 0;
    std::vector<char> used(square), row_used(shuffle * kernel, 0);
    for (int64_t n = 0; n < channels * r2; ++n) {
        std::fill(used.begin(), used.end(), 0);
        for (int64_t d = 0; d < units; ++d) {
            for (int64_t k = 0; k < square; ++k) used[k] |= weight[(n * units + d) * square + k] != 0.0f;
        }
        for (int64_t k = 0; k < square; ++k) {
            if (!used[k]) continue;
            mask |= 1u << (k % kernel * shuffle + n % shuffle);
            row_used[n % r2 / shuffle * kernel + k / kernel] = 1;
        }
    }
    const Pattern& pattern = *Kernels::active().find(shuffle, kernel, mask);
    u.parts.resize(shuffle);
    for (int64_t i = 0; i < shuffle; ++i) {
        for (int64_t c = 0, count; c < channels; c += count) {
            count = channels - c >= 3 ? 3 : 1;
            Part part{
                .channel = c, .channels = count, .run = pattern.run[count == 3], .taps = {}, .weight = {}, .bias = {}};
            for (int64_t ky = 0; ky < kernel; ++ky) {
                if (row_used[i * kernel + ky]) part.taps.push_back(ky);
            }
            std::vector<int64_t> steps;  // from the first weight of a unit and row of the kernel
            for (int64_t k = 0; k < kernel * shuffle; ++k) {
                for (int64_t e = 0; e < count && (pattern.mask >> k & 1) != 0; ++e) {
                    steps.push_back(((c + e) * r2 + i * shuffle + k % shuffle) * units * square + k / shuffle);
                }
            }
            part.weight.resize(part.taps.size() * units * steps.size());
            float* to = part.weight.data();
            for (const int64_t ky : part.taps) {
                for (int64_t d = 0; d < units; ++d) {
                    for (const int64_t step : steps) *to++ = weight[step + d * square + ky * kernel];
                }
            }
            for (int64_t e = 0; e < count; ++e) {
                for (int64_t r = 0; r < shuffle; ++r) part.bias.push_back(bias[(c + e) * r2 + i * shuffle + r]);
            }
            u.parts[i].push_back(std::move(part));
        }
    }
    return u;
}

// The matrix [rows, columns] of an interpolation as its nonzero band; none where that is wider than `kMostRows` or
// falls.
inline std::optional<Band> band_of(const float* matrix, int64_t rows, int64_t columns) {
    Band band{.rows = rows, .taps = 1, .first = {}, .coefficient = {}, .lane = {}};
    std::vector<int64_t> begin(rows), end(rows);
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = matrix + r * columns;
        end[r] = columns;
        while (begin[r] + 1 < columns && row[begin[r]] == 0.0f) ++begin[r];
        while (end[r] > begin[r] + 1 && row[end[r] - 1] == 0.0f) --end[r];
    }
    // A row in which some numbers happen to be 0, as where a pixel lies on another, begins no later than the next.
    for (int64_t r = rows - 1; r >= 0; --r) {
        if (r + 1 < rows) begin[r] = std::min(begin[r], begin[r + 1]);
        band.taps = std::max(band.taps, end[r] - begin[r]);
    }
    if (band.taps > kMostRows) return std::nullopt;
    const int64_t padded = band.padded();
    band.coefficient.resize(band.taps * padded), band.lane.resize(band.taps * padded);
    bool fits = true;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t first = std::min(begin[r], columns - band.taps);
        band.first.push_back(static_cast<int32_t>(first));
        for (int64_t t = 0; t < band.taps; ++t) {
            const int64_t lane = first - band.first[r / kBandLanes * kBandLanes] + t;
            fits = fits && lane < kBandLanes;
            band.coefficient[t * padded + r] = matrix[r * columns + first + t];
            band.lane[t * padded + r] = static_cast<int32_t>(lane);
        }
    }
    if (!fits) band.lane.clear();
    return band;
}

// A separable interpolation of `channels` channels: of rows by `down`, and of columns by `across`.
inline Upsampler interpolation(Band down, Band across, int64_t channels, int64_t shuffle) {
    Upsampler u;
    u.features = u.units = u.channels = channels, u.shuffle = shuffle, u.kernel = down.taps;
    u.band = std::move(down), u.across = std::move(across);
    return u;
}

}  // namespace fastroute::upsampler
