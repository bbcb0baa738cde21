// A block of tiles in one instruction set: Y = A^T [(G w G^T) · (B^T d B)] A for every tile, vectors across channels.
// Included once per instruction set, like simd.h.
//
// Column j of A^T, G and B is for point j of 0, kNear, -kNear, kFar, -kFar and infinity. Points of opposite sign share
// their even and odd parts.

#include "cpu/float_lanes.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// Bytes in a cache line.
inline constexpr int64_t kLine = 64;
// Vectors of outputs in a block of registers.
inline constexpr int kMostVectors = FASTROUTE_BYTES == 64 ? 4 : 2;

// Rows of B^T d: of 0 and infinity, of ±kNear, and of ±kFar.
FASTROUTE_SIMD void at_ends(const Floats* d, Floats& zero, Floats& infinity) {
    const Floats product = broadcast(kNear * kNear * kFar * kFar), sum = broadcast(-(kNear * kNear + kFar * kFar));
    zero = fma(product, d[0], fma(sum, d[2], d[4]));
    infinity = fma(product, d[1], fma(sum, d[3], d[5]));
}
FASTROUTE_SIMD void at_pair(const Floats* d, float point, float other, Floats& plus, Floats& minus) {
    const Floats square = broadcast(-other * other);
    const Floats even = fma(square, d[2], d[4]), odd = fma(square, d[1], d[3]);
    plus = fma(broadcast(point), odd, even), minus = fma(broadcast(-point), odd, even);
}

// A^T m.
FASTROUTE_SIMD void outputs_of(const Floats* m, Floats* y) {
    const Floats near_sum = m[1] + m[2], near_difference = m[1] - m[2];
    const Floats far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    y[0] = m[0] + near_sum + far_sum;
    y[1] = fma(broadcast(kFar), far_difference, broadcast(kNear) * near_difference);
    y[2] = fma(broadcast(kFar * kFar), far_sum, broadcast(kNear * kNear) * near_sum);
    y[3] = fma(broadcast(kFar * kFar * kFar), far_difference,
               fma(broadcast(kNear * kNear * kNear), near_difference, m[5]));
}

// The 6 x 6 inputs of a tile. Rows and columns outside of the image are zeros: of them, the address is never used.
template <typename T>
struct Inputs {
    const T* row[6];
    int64_t pixel, channel;
    bool row_inside[6], column_inside[6];
};

// `count` channels from c on as whole vectors of float32, [6][6]. `Whole`: all are there, side by side.
template <bool Whole, typename T>
FASTROUTE_TARGET __attribute__((noinline)) void gather(const Inputs<T>& in, int64_t c, int64_t count, float* to) {
    for (int i = 0; i < 6; ++i) {
        const T* from = in.row[i] + c * in.channel;
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j, from += in.pixel, to += kLanes) {
            if constexpr (Whole) {
                store(to, load_floats(from));
            } else {
                const bool inside = in.row_inside[i] && in.column_inside[j];
                store(to, inside ? load_some(from, in.channel, count) : Floats{});
            }
        }
    }
}

// Column `column` of the inputs that lie side by side, `Rows` rows from First on.
template <int First, int Rows>
FASTROUTE_SIMD void read_column(const float* const* row, int64_t at, Floats* d) {
#pragma GCC unroll 6
    for (int i = First; i < First + Rows; ++i) d[i] = load(row[i] + at);
}

// Row `Row` of B^T d, six columns, by B, into its six planes.
template <int Row>
FASTROUTE_SIMD void write_row(const Floats* d, float* to, int64_t plane) {
    Floats a, b;
    at_ends(d, a, b);
    store(to + (Row * 6) * plane, a), store(to + (Row * 6 + 5) * plane, b);
    at_pair(d, kNear, kFar, a, b);
    store(to + (Row * 6 + 1) * plane, a), store(to + (Row * 6 + 2) * plane, b);
    at_pair(d, kFar, kNear, a, b);
    store(to + (Row * 6 + 3) * plane, a), store(to + (Row * 6 + 4) * plane, b);
}

// B^T d B of a vector of channels, whose pixels are `pixel` apart. Two rows at a time fit the registers; inputs are
// read again from the cache.
FASTROUTE_SIMD void transform_vector(const float* const* row, int64_t pixel, float* to, int64_t plane) {
    Floats a[6], b[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
        Floats d[6];
        read_column<1, 4>(row, j * pixel, d);
        at_pair(d, kNear, kFar, a[j], b[j]);
    }
    write_row<1>(a, to, plane), write_row<2>(b, to, plane);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
        Floats d[6];
        read_column<1, 4>(row, j * pixel, d);
        at_pair(d, kFar, kNear, a[j], b[j]);
    }
    write_row<3>(a, to, plane), write_row<4>(b, to, plane);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
        Floats d[6];
        read_column<0, 6>(row, j * pixel, d);
        at_ends(d, a[j], b[j]);
    }
    write_row<0>(a, to, plane), write_row<5>(b, to, plane);
}

// Asks for a cache line of every pixel that the next tile of the row reads and this one does not: pixels lie too far
// apart for a processor to notice that they follow each other. Beyond the image nothing is touched by it.
template <typename T>
FASTROUTE_SIMD void prefetch_next(const Inputs<T>& in, int64_t c) {
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 4
        for (int j = 6; j < 6 + kTile; ++j) __builtin_prefetch(in.row[i] + j * in.pixel + c);
    }
}

struct Tile {
    int64_t image, top, left;
};

template <typename T>
FASTROUTE_SIMD Tile tile_at(const Winograd<T>& p, int64_t tile) {
    return {tile / (p.across * p.down), tile / p.across % p.down * kTile, tile % p.across * kTile};
}

template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void transform_tile(const Winograd<T>& p, const Tile& tile, float* to) {
    Inputs<T> in{.row = {}, .pixel = p.x.pixel, .channel = p.x.channel, .row_inside = {}, .column_inside = {}};
    bool whole = true;
    for (int i = 0; i < 6; ++i) {
        const int64_t y = tile.top - 1 + i, x = tile.left - 1 + i;
        in.row_inside[i] = y >= -p.context && y < p.height + p.context, in.column_inside[i] = x >= 0 && x < p.width;
        in.row[i] = p.x.at(tile.image, in.row_inside[i] ? y : tile.top, tile.left - 1, 0);
        whole &= in.row_inside[i] && in.column_inside[i];
    }
    const int64_t plane = p.transformed_plane();
    alignas(FASTROUTE_BYTES) float gathered[6 * 6 * kLanes];
    const float* row[6];
    for (int i = 0; i < 6; ++i) row[i] = gathered + i * 6 * kLanes;
    int64_t c = 0;
    if (whole && in.channel == 1) {
        for (; c + kLanes <= p.channels; c += kLanes) {
            if (c * static_cast<int64_t>(sizeof(T)) % kLine == 0) prefetch_next(in, c);
            if constexpr (std::is_same_v<T, float>) {
                const float* at[6];
                for (int i = 0; i < 6; ++i) at[i] = in.row[i] + c;
                transform_vector(at, in.pixel, to + c, plane);
            } else {
                gather<true>(in, c, kLanes, gathered);
                transform_vector(row, kLanes, to + c, plane);
            }
        }
    }
    for (; c < p.channels; c += kLanes) {
        gather<false>(in, c, std::min<int64_t>(kLanes, p.channels - c), gathered);
        transform_vector(row, kLanes, to + c, plane);
    }
}

// to[r][v] = Σ_k a[r][k] · b[k][v] for Rows tiles and Vectors vectors of outputs.
template <int Rows, int Vectors>
FASTROUTE_TARGET __attribute__((noinline)) void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row,
                                                         int64_t depth, float* to, int64_t to_row) {
    Floats sum[Rows][Vectors] = {};
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        Floats weight[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) weight[v] = load(b + v * kLanes);
#pragma GCC unroll 24
        for (int r = 0; r < Rows; ++r) {
            const Floats x = broadcast(a[r * a_row + k]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(x, weight[v], sum[r][v]);
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(to + r * to_row + v * kLanes, sum[r][v]);
    }
}

// The same for any number of tiles. Blocks of registers leave room for a vector of weights and the broadcast.
template <int Vectors>
FASTROUTE_SIMD void multiply_tiles(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                                   float* to, int64_t to_row, int64_t tiles) {
    constexpr int wide[] = {0, 24, 12, 8, 6}, narrow[] = {0, 12, 6};
    constexpr int rows = FASTROUTE_BYTES == 64 ? wide[Vectors] : narrow[Vectors > 2 ? 0 : Vectors];
    int64_t t = 0;
    for (; t + rows <= tiles; t += rows)
        multiply<rows, Vectors>(a + t * a_row, a_row, b, b_row, depth, to + t * to_row, to_row);
    for (; t + rows / 2 <= tiles; t += rows / 2)
        multiply<rows / 2, Vectors>(a + t * a_row, a_row, b, b_row, depth, to + t * to_row, to_row);
    for (; t < tiles; ++t) multiply<1, Vectors>(a + t * a_row, a_row, b, b_row, depth, to + t * to_row, to_row);
}

// The same for at most four outputs, such as colours: narrow vectors take a fraction of the time.
#if FASTROUTE_BYTES > 16
template <int Rows>
FASTROUTE_TARGET __attribute__((noinline)) void multiply_few(const float* a, int64_t a_row, const float* b,
                                                             int64_t b_row, int64_t depth, float* to, int64_t to_row) {
    __m128 sum[Rows];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) sum[r] = _mm_setzero_ps();
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        const __m128 weight = _mm_loadu_ps(b);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) sum[r] = _mm_fmadd_ps(_mm_broadcast_ss(a + r * a_row + k), weight, sum[r]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) _mm_storeu_ps(to + r * to_row, sum[r]);
}

FASTROUTE_SIMD void multiply_few_tiles(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                                       float* to, int64_t to_row, int64_t tiles) {
    int64_t t = 0;
    for (; t + 12 <= tiles; t += 12) multiply_few<12>(a + t * a_row, a_row, b, b_row, depth, to + t * to_row, to_row);
    for (; t < tiles; ++t) multiply_few<1>(a + t * a_row, a_row, b, b_row, depth, to + t * to_row, to_row);
}
#else
FASTROUTE_SIMD void multiply_few_tiles(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                                       float* to, int64_t to_row, int64_t tiles) {
    multiply_tiles<1>(a, a_row, b, b_row, depth, to, to_row, tiles);
}
#endif

// The outputs of a tile from `vectors` vectors of products, which begin at column `first` of group `group`.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void write_tile(const Winograd<T>& p, const Tile& tile, int64_t group,
                                                           int64_t first, int64_t vectors, const float* products) {
    const int64_t rows = std::min(kTile, p.height - tile.top), cols = std::min(kTile, p.width - tile.left);
    const int64_t plane = p.products_plane();
    for (int64_t v = 0; v < vectors; ++v, first += kLanes) {
        const int64_t part = first / p.lanes, within = first % p.lanes;
        const int64_t count = std::min<int64_t>(kLanes, p.shown - within);
        if (count <= 0) continue;  // padding alone
        const float* from = products + v * kLanes;
        Floats half[6][kTile];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
            Floats m[6];
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) m[i] = load(from + (i * 6 + j) * plane);
            outputs_of(m, half[j]);
        }
        const Floats bias = load(p.bias + group * p.columns + first), slope = load(p.slope + group * p.columns + first);
        const int64_t y0 = tile.top * p.shuffle + part / p.shuffle, x0 = tile.left * p.shuffle + part % p.shuffle;
        const int64_t channel = group * p.shown + within;
        T* to = p.y.at(tile.image, y0, x0, channel);
        const bool adds = p.residual.data != nullptr;
        const T* add = adds ? p.residual.at(tile.image, y0, x0, channel) : nullptr;
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
            if (i >= rows) break;
            Floats m[6], y[kTile];
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) m[j] = half[j][i];
            outputs_of(m, y);
#pragma GCC unroll 4
            for (int j = 0; j < kTile; ++j) {
                if (j >= cols) break;
                Floats value = y[j] + bias;
                if (p.rectified) value = value > Floats{} ? value : value * slope;
                if (adds) {
                    const T* at = add + (i * p.residual.row + j * p.residual.pixel) * p.shuffle;
                    const bool dense = count == kLanes && p.residual.channel == 1;
                    value = value + (dense ? load_floats(at) : load_some(at, p.residual.channel, count));
                }
                store_some(to + (i * p.y.row + j * p.y.pixel) * p.shuffle, value, count);
            }
        }
    }
}

// Tiles [begin, begin + count) of all images, row by row.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void run_block(const Winograd<T>& p, int64_t begin, int64_t count,
                                                          const Workspace& ws) {
    const int64_t row = padded(p.channels);
    for (int64_t t = 0; t < count; ++t) transform_tile(p, tile_at(p, begin + t), ws.transformed + t * row);
    for (int64_t group = 0; group < p.groups; ++group) {
        for (int64_t first = 0; first < p.columns; first += kMostVectors * kLanes) {
            const int64_t vectors = std::min<int64_t>(kMostVectors, (p.columns - first) / kLanes);
            // Without a shuffle, the last few outputs stand alone in a vector; what stands beside them is never
            // written.
            const int64_t last = p.shown / kLanes * kLanes, rest = p.shown % kLanes;
            const bool few =
                p.shuffle == 1 && 0 < rest && rest <= 4 && first <= last && last < first + vectors * kLanes;
            const int64_t whole = few ? (last - first) / kLanes : vectors, to_row = vectors * kLanes;
            for (int64_t point = 0; point < kPoints; ++point) {
                const float* a = ws.transformed + point * p.transformed_plane() + group * p.in;
                const float* b = p.weight + (point * p.groups + group) * p.in * p.columns + first;
                float* to = ws.products + point * p.products_plane();
                switch (whole) {
#if FASTROUTE_BYTES == 64
                    case 4: multiply_tiles<4>(a, row, b, p.columns, p.in, to, to_row, count); break;
                    case 3: multiply_tiles<3>(a, row, b, p.columns, p.in, to, to_row, count); break;
#endif
                    case 2: multiply_tiles<2>(a, row, b, p.columns, p.in, to, to_row, count); break;
                    case 1: multiply_tiles<1>(a, row, b, p.columns, p.in, to, to_row, count); break;
                    default: break;
                }
                const int64_t at = whole * kLanes;
                if (few) multiply_few_tiles(a, row, b + at, p.columns, p.in, to + at, to_row, count);
            }
            for (int64_t t = 0; t < count; ++t) {
                const float* products = ws.products + t * vectors * kLanes;
                write_tile(p, tile_at(p, begin + t), group, first, vectors, products);
            }
        }
    }
}

#undef FASTROUTE_SIMD
