// One block of output pixels through their MLPs. Included once per instruction set, like simd.h.
//
//     y = residual + W_n relu(... relu(W_1 [feature | rel | cell] + b_1) ...) + b_n
//
// Pixels are sorted by class. For each class W_1 · feature is made once per feature that some pixel of it reads; a tile
// of kTile pixels then adds what belongs to its place and goes through all further layers as [units][pixels], one
// unit's vector of pixels times one broadcast weight. Every pixel sums in one order, so its bits do not depend on its
// tile.

#include "cpu/mlp_layer_tile.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// to[r] = Σ_d from[r][d] · weight[d], for up to kUnits rows and Count vectors of units.
template <typename T, int Count>
FASTROUTE_SIMD void multiply_rows(const T* const* from, const T* weight, int64_t dim, int64_t padded, int64_t count,
                                  T* const* to) {
    constexpr int lanes = Simd<T>::lanes;
    Vector<T> sum[kUnits][Count] = {};
    for (int64_t d = 0; d < dim; ++d) {
        Vector<T> w[Count];
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) w[v] = load(weight + d * padded + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kUnits; ++r) {
            const Vector<T> x = broadcast(from[r][d]);
#pragma GCC unroll 4
            for (int v = 0; v < Count; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        for (int v = 0; v < Count; ++v) store(to[r] + v * lanes, sum[r][v]);
    }
}

// W_1 · feature, for the features ws.used[0 .. count) of the block.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void feature_layer(const Problem<T>& p, const Mlp<T>& mlp, int64_t image,
                                                              int64_t cols, int64_t count, Workspace<T>& ws) {
    constexpr int lanes = Simd<T>::lanes;
    for (int64_t begin = 0; begin < count; begin += kUnits) {
        const int64_t rows = count - begin < kUnits ? count - begin : kUnits;
        const T* from[kUnits];
        T* to[kUnits];
        for (int64_t r = 0; r < kUnits; ++r) {
            // Rows beyond the last repeat it and are not kept.
            const int64_t place = begin + (r < rows ? r : rows - 1), feature = ws.used[place];
            const char* at = p.features.at(image, ws.feature_row[feature / cols], ws.feature_col[feature % cols]);
            to[r] = ws.first + place * mlp.padded;
            from[r] = reinterpret_cast<const T*>(at);
            if (p.features.direct) continue;
            if (r < rows) p.features.load(at, p.features.stride[1], p.dim, ws.gathered + r * p.dim);
            from[r] = ws.gathered + (r < rows ? r : rows - 1) * p.dim;
        }
        int64_t unit = 0;
        for (; unit + kVectors * lanes <= mlp.padded; unit += kVectors * lanes) {
            multiply_rows<T, kVectors>(from, mlp.feature + unit, p.dim, mlp.padded, rows, to);
            for (T*& row : to) row += kVectors * lanes;
        }
        for (; unit < mlp.padded; unit += lanes) {
            multiply_rows<T, 1>(from, mlp.feature + unit, p.dim, mlp.padded, rows, to);
            for (T*& row : to) row += lanes;
        }
    }
}

// The first layer of a tile, [units][pixels]: what the feature gives, what the row gives, what the column gives.
template <typename T, bool Relu>
FASTROUTE_SIMD void first_layer(const Mlp<T>& mlp, const T* const* feature, const T* const* row, const T* rel_x,
                                int64_t vectors, T* y) {
    constexpr int lanes = Simd<T>::lanes;
    for (int64_t v = 0; v < vectors; ++v) {
        const int64_t p = v * lanes;
        for (int64_t u = 0; u < mlp.padded; u += lanes) {
            Vector<T> x[lanes];
            const Vector<T> slope = load(mlp.rel_x + u);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
                const Vector<T> sum = load(feature[p + i] + u) + load(row[p + i] + u);
                x[i] = fma(broadcast(rel_x[p + i]), slope, sum);
                if (Relu) x[i] = relu(x[i]);
            }
            transpose<T, lanes / 2>(x);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) store(y + (u + i) * kTile + p, x[i]);
        }
    }
}

// The layers behind the first, from its activations `x`; where the last one's lie, in `x` or `y`, is returned.
template <typename T>
FASTROUTE_SIMD T* further_layers(const Mlp<T>& mlp, int64_t vectors, T* x, T* y) {
#if FASTROUTE_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
        if (mlp.bf16) return bf16::run_layers(mlp, vectors, x, y);
    }
#endif
    for (size_t n = 0; n + 1 < mlp.layers.size(); ++n) {
        run_layer(mlp.layers[n], x, vectors, y, Relu{});
        std::swap(x, y);
    }
    run_layer(mlp.layers.back(), x, vectors, y, Linear{});
    return y;
}

// Adds to ws.out the MLP of the pixels ws.pixels[0 .. count).
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void run_class(const Problem<T>& p, const Mlp<T>& mlp, const Block& block,
                                                          const uint32_t* pixels, int64_t count, int64_t features,
                                                          int64_t feature_cols, Workspace<T>& ws) {
    constexpr int lanes = Simd<T>::lanes;
    const int64_t cols = block.x1 - block.x0, rows = block.y1 - block.y0, area = rows * cols;
    for (int64_t i = 0; i < features; ++i) ws.slot[i] = -1;
    int32_t slots = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t feature =
            static_cast<int32_t>(ws.row[pixels[i] >> 16] * feature_cols + ws.col[pixels[i] & 0xffff]);
        if (ws.slot[feature] < 0) ws.slot[feature] = slots, ws.used[slots++] = feature;
    }
    feature_layer(p, mlp, block.image, feature_cols, slots, ws);
    for (int64_t y = 0; y < rows; ++y) {
        const Vector<T> relative = broadcast(p.y.relative[block.y0 + y]);
        for (int64_t u = 0; u < mlp.padded; u += lanes) {
            store(ws.bands + y * mlp.padded + u, fma(relative, load(mlp.rel_y + u), load(mlp.constant + u)));
        }
    }

    const T *feature[kTile], *row[kTile];
    T rel_x[kTile];
    for (int64_t begin = 0; begin < count; begin += kTile) {
        const int64_t tile = count - begin < kTile ? count - begin : kTile;
        const int64_t vectors = (tile + lanes - 1) / lanes;
        for (int64_t i = 0; i < vectors * lanes; ++i) {
            const uint32_t pixel = pixels[begin + (i < tile ? i : tile - 1)], y = pixel >> 16, x = pixel & 0xffff;
            feature[i] = ws.first + ws.slot[ws.row[y] * feature_cols + ws.col[x]] * mlp.padded;
            row[i] = ws.bands + y * mlp.padded;
            rel_x[i] = p.x.relative[block.x0 + x];
            ws.place[i] = static_cast<uint32_t>(y * cols + x);
        }
        T *x = ws.near, *const y = ws.far;
        if (mlp.layers.empty()) {
            first_layer<T, false>(mlp, feature, row, rel_x, vectors, x);
        } else {
            first_layer<T, true>(mlp, feature, row, rel_x, vectors, x);
            x = further_layers(mlp, vectors, x, y);
        }
        for (int64_t c = 0; c < p.channels; ++c) {
            T* out = ws.out + c * area;
            const T* from = x + c * kTile;
            for (int64_t i = 0; i < tile; ++i) out[ws.place[i]] += from[i];
        }
    }
}

// ws.out = the bilinear residual, or zero.
template <typename T>
FASTROUTE_TARGET __attribute__((noinline)) void fill_residual(const Problem<T>& p, const Block& block,
                                                              Workspace<T>& ws) {
    const int64_t cols = block.x1 - block.x0, rows = block.y1 - block.y0;
    if (p.residual.data == nullptr) {
        std::fill_n(ws.out, p.channels * rows * cols, T(0));
        return;
    }
    const int64_t left = p.x.first[block.x0], count = p.x.second[block.x1 - 1] - left + 1;
    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t y = 0; y < rows; ++y) {
            const int64_t at = block.y0 + y;
            const char* base = p.residual.data + c * p.residual.stride[1];
            const char* top = base + block.image * p.residual.stride[0] + left * p.residual.stride[3];
            p.residual.load(top + p.y.first[at] * p.residual.stride[2], p.residual.stride[3], count, ws.blend);
            p.residual.load(top + p.y.second[at] * p.residual.stride[2], p.residual.stride[3], count, ws.upper);
            const T weight = p.y.weight[at];
            for (int64_t i = 0; i < count; ++i) ws.blend[i] = ws.blend[i] * (1 - weight) + ws.upper[i] * weight;
            T* out = ws.out + (c * rows + y) * cols;
            for (int64_t x = 0; x < cols; ++x) {
                const T right = p.x.weight[block.x0 + x];
                const T *a = ws.blend + (p.x.first[block.x0 + x] - left),
                        *b = ws.blend + (p.x.second[block.x0 + x] - left);
                out[x] = *a * (1 - right) + *b * right;
            }
        }
    }
}

#undef FASTROUTE_SIMD
