// Pixels of conv1x1 in one instruction set: vectors across outputs, several pixels in the registers at a time. Included
// once per instruction set, like simd.h.

#include "cpu/float_lanes.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// Vectors of outputs in a block of registers.
inline constexpr int kMostVectors = FASTROUTE_BYTES == 64 ? 4 : 2;

// `Pixels` pixels and `Vectors` vectors of outputs, from column `first` on. `at` is the first of the pixels.
template <int Pixels, int Vectors>
FASTROUTE_TARGET __attribute__((noinline)) void run_pixels(const Problem<float>& p, const Run& run, int64_t at,
                                                           int64_t first) {
    Floats sum[Pixels][Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        const Floats bias = load(p.bias + first + v * kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < Pixels; ++i) sum[i][v] = bias;
    }
    const float* b = p.weight + first;
    for (const View<const float>& image : p.images) {
        const float* a = image.at(run) + at * image.pixel;
        for (int64_t k = 0; k < image.channels; ++k, a += image.channel, b += p.columns) {
            Floats weight[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) weight[v] = load(b + v * kLanes);
#pragma GCC unroll 12
            for (int i = 0; i < Pixels; ++i) {
                const Floats x = broadcast(a[i * image.pixel]);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(x, weight[v], sum[i][v]);
            }
        }
    }
    float* to = p.out.at(run) + at * p.out.pixel + first;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        const int64_t channel = first + v * kLanes, count = std::min<int64_t>(kLanes, p.outputs - channel);
        if (count <= 0) break;  // padding alone
        const Floats slope = load(p.slope + channel);
#pragma GCC unroll 12
        for (int i = 0; i < Pixels; ++i) {
            Floats value = sum[i][v];
            if (p.adds) {
                const View<const float>& residual = p.residual;
                const float* from = residual.at(run) + (at + i) * residual.pixel + channel * residual.channel;
                const bool dense = count == kLanes && residual.channel == 1;
                value = value + (dense ? load(from) : load_some(from, residual.channel, count));
            }
            if (p.rectified) value = value > Floats{} ? value : value * slope;
            store_some(to + i * p.out.pixel + v * kLanes, value, count);
        }
    }
}

// Blocks of registers leave room for a vector of weights and the broadcast.
template <int Vectors>
FASTROUTE_SIMD void run_vectors(const Problem<float>& p, const Run& run, int64_t begin, int64_t end, int64_t first) {
    constexpr int pixels = FASTROUTE_BYTES == 64 ? (Vectors == 4 ? 6 : Vectors == 3 ? 8 : 12) : Vectors == 2 ? 6 : 12;
    int64_t at = begin;
    for (; at + pixels <= end; at += pixels) run_pixels<pixels, Vectors>(p, run, at, first);
    for (; at < end; ++at) run_pixels<1, Vectors>(p, run, at, first);
}

// Pixels [begin, end) of a run.
FASTROUTE_TARGET __attribute__((noinline)) void run_block(const Problem<float>& p, const Run& run, int64_t begin,
                                                          int64_t end) {
    for (int64_t first = 0; first < p.columns; first += kMostVectors * kLanes) {
        switch (std::min<int64_t>(kMostVectors, (p.columns - first) / kLanes)) {
#if FASTROUTE_BYTES == 64
            case 4: run_vectors<4>(p, run, begin, end, first); break;
            case 3: run_vectors<3>(p, run, begin, end, first); break;
#endif
            case 2: run_vectors<2>(p, run, begin, end, first); break;
            default: run_vectors<1>(p, run, begin, end, first); break;
        }
    }
}

#undef FASTROUTE_SIMD
