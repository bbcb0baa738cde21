// Pixels of conv1x1 in bfloat16, with AVX-512 BF16. Sums are float32 and rounded once, when they are written.
#pragma once

#include "cpu/bf16_products.h"

#include <algorithm>
#include <vector>

#include "cpu/conv1x1/problem.h"

#if FASTROUTE_X86

namespace fastroute::conv1x1::half {

using bf16::kLanes, bf16::Number, bf16::Pairs;

// `Pixels` pixels and `Vectors` vectors of outputs, from column `first` on. Pixel `at` of the run is the first one, and
// the pixel number `offset` of `images`.
template <int Pixels, int Vectors>
FASTROUTE_AVX512_BF16 __attribute__((noinline)) void run_pixels(const Problem<Number>& p,
                                                                const std::vector<Pairs>& images, const Run& run,
                                                                int64_t offset, int64_t at, int64_t first) {
    __m512 sum[Pixels][Vectors];
    bf16::multiply(images.data(), static_cast<int64_t>(images.size()), offset, p.columns, first, p.bias, sum);
    Number* to = p.out.at(run) + at * p.out.pixel + first;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        const int64_t channel = first + v * kLanes, count = std::min<int64_t>(kLanes, p.outputs - channel);
        if (count <= 0) break;  // padding alone
        const __m512 slope = _mm512_loadu_ps(p.slope + channel);
#pragma GCC unroll 12
        for (int i = 0; i < Pixels; ++i) {
            __m512 value = sum[i][v];
            if (p.adds) {
                const View<const Number>& residual = p.residual;
                const Number* from = residual.at(run) + (at + i) * residual.pixel + channel * residual.channel;
                value = value + bf16::widened(from, residual.channel, count);
            }
            if (p.rectified) value = bf16::rectified(value, slope);
            bf16::store_rounded(to + i * p.out.pixel + v * kLanes, value, count);
        }
    }
}

template <int Vectors>
void run_vectors(const Problem<Number>& p, const std::vector<Pairs>& images, const Run& run, int64_t begin, int64_t end,
                 int64_t first) {
    constexpr int pixels = bf16::kPixels<Vectors>;
    int64_t at = begin;
    for (; at + pixels <= end; at += pixels) run_pixels<pixels, Vectors>(p, images, run, at - begin, at, first);
    for (; at < end; ++at) run_pixels<1, Vectors>(p, images, run, at - begin, at, first);
}

// The pixels [begin, end) of every image as pairs: as they lie or, where channels do not follow each other or are odd
// in number, copied to `room`.
inline std::vector<Pairs> pairs_of(const Problem<Number>& p, const Run& run, int64_t begin, int64_t end,
                                   std::vector<Number>& room) {
    int64_t copied = 0;
    const auto lies = [](const View<const Number>& image) { return image.channel == 1 && image.channels % 2 == 0; };
    for (const View<const Number>& image : p.images) copied += lies(image) ? 0 : (image.channels + 1) / 2 * 2;
    room.assign(copied * (end - begin), Number(0.0f));
    std::vector<Pairs> found;
    Number* to = room.data();
    const float* weight = p.weight;
    for (const View<const Number>& image : p.images) {
        const Number* from = image.at(run) + begin * image.pixel;
        const int64_t count = (image.channels + 1) / 2;
        found.push_back({lies(image) ? from : to, count, lies(image) ? image.pixel : 2 * count, weight});
        weight += count * p.columns;
        if (lies(image)) continue;
        for (int64_t i = begin; i < end; ++i, from += image.pixel, to += 2 * count) {
            for (int64_t c = 0; c < image.channels; ++c) to[c] = from[c * image.channel];
        }
    }
    return found;
}

// Pixels [begin, end) of a run.
inline void run_block(const Problem<Number>& p, const Run& run, int64_t begin, int64_t end) {
    std::vector<Number> room;
    const std::vector<Pairs> images = pairs_of(p, run, begin, end, room);
    for (int64_t first = 0; first < p.columns; first += bf16::kMostVectors * kLanes) {
        switch (std::min<int64_t>(bf16::kMostVectors, (p.columns - first) / kLanes)) {
            case 4: run_vectors<4>(p, images, run, begin, end, first); break;
            case 3: run_vectors<3>(p, images, run, begin, end, first); break;
            case 2: run_vectors<2>(p, images, run, begin, end, first); break;
            default: run_vectors<1>(p, images, run, begin, end, first); break;
        }
    }
}

}  // namespace fastroute::conv1x1::half

#endif
