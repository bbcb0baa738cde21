// A block of cells, in one instruction set: x_{n+1} = leaky(W_n x_n + b_n) for kTile cells at a time, side by side as
// [numbers][kTile], then the sums over the windows that a cell lies in, from the left to the right. Included once per
// instruction set, like simd.h.

#include "cpu/mlp_layer_tile.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// One row of pixels of `count` cells, as `cell` rows of a tile.
template <typename S, typename T>
FASTROUTE_SIMD void read_run(const S* from, int64_t step, int64_t cell, int64_t count, T* to) {
    for (int64_t l = 0; l < cell; ++l) {
        for (int64_t i = 0; i < count; ++i) to[l * kTile + i] = from_pixel<T>(from[(i * cell + l) * step]);
    }
}

// `count` cells side by side as numbers 0 .. of the rows of a tile, [C · cell · cell][kTile].
template <typename S, typename T>
FASTROUTE_TARGET __attribute__((noinline)) void read_cells(const Problem<T>& p, const char* image, int64_t y, int64_t x,
                                                           int64_t count, T* to) {
    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t k = 0; k < p.cell; ++k, to += p.cell * kTile) {
            const S* from = reinterpret_cast<const S*>(image) + c * p.stride[1] + (y * p.cell + k) * p.stride[2] +
                            x * p.cell * p.stride[3];
            if (p.cell == 4 && p.stride[3] == 1) {
                read_run(from, 1, 4, count, to);  // numbers that the compiler sees
            } else {
                read_run(from, p.stride[3], p.cell, count, to);
            }
        }
    }
}

// Adds cells [begin, begin + count) of a block, whose features are the rows of `x`, to the windows that they lie in.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void add_to_windows(const Problem<T>& p, const T* x, int64_t begin,
                                                               int64_t count, T* sums) {
    constexpr int lanes = Simd<T>::lanes;
    for (int64_t u = 0; u < p.padded; u += lanes) {
        int64_t row = begin / p.cols, col = begin % p.cols;
        for (int64_t v = 0; v < count; v += lanes) {
            Vector<T> cells[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) cells[i] = load(x + (u + i) * kTile + v);
            transpose<T, lanes / 2>(cells);
            const int64_t here = std::min<int64_t>(count - v, lanes);
            for (int64_t i = 0; i < here; ++i) {
                for (int64_t j = p.first[col]; j < p.last[col]; ++j) {
                    T* sum = sums + (row * p.windows + j) * p.padded + u;
                    store(sum, load(sum) + cells[i]);
                }
                if (++col == p.cols) col = 0, ++row;
            }
        }
    }
}

// Rows [row, row + rows) of cells of one image, [rows, windows, padded] sums into ws.sums.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void run_block(const Problem<T>& p, const char* image, int64_t row,
                                                          int64_t rows, Workspace<T>& ws) {
    constexpr int lanes = Simd<T>::lanes;
    const LeakyRelu<T> activation{p.slope};
    std::fill_n(ws.sums, rows * p.windows * p.padded, T(0));
    for (int64_t begin = 0; begin < rows * p.cols; begin += kTile) {
        const int64_t count = std::min(rows * p.cols - begin, kTile);
        T *x = ws.near, *y = ws.far;
        for (int64_t at = 0, run; at < count; at += run) {
            const int64_t col = (begin + at) % p.cols;
            run = std::min(p.cols - col, count - at);
            p.read(p, image, row + (begin + at) / p.cols, col, run, x + at);
        }
        for (const Layer<T>& layer : p.layers) {
            run_layer(layer, x, (count + lanes - 1) / lanes, y, activation);
            std::swap(x, y);
        }
        add_to_windows(p, x, begin, count, ws.sums);
    }
}

#undef FASTROUTE_SIMD
