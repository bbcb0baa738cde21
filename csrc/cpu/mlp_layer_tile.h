// Layers of an MLP for a tile of pixels, [units][kTile]: one unit's vector of pixels times one broadcast weight.
// Included once per instruction set, like simd.h. Every pixel sums in one order, so its bits do not depend on its tile.

#include "cpu/simd.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

// As many vectors beside kUnits as the registers hold.
inline constexpr int kVectors = FASTROUTE_BYTES == 64 ? 4 : 2;

// What follows a layer.
struct Linear {
    template <typename V>
    FASTROUTE_SIMD V operator()(V x) const {
        return x;
    }
};
struct Relu {
    template <typename V>
    FASTROUTE_SIMD V operator()(V x) const {
        return relu(x);
    }
};
template <typename T>
struct LeakyRelu {
    T slope;

    FASTROUTE_SIMD Vector<T> operator()(Vector<T> x) const { return x > Vector<T>{} ? x : x * slope; }
};

// y[u] = bias[u] + Σ_k weight[k][u] · x[k] for Units units and Count vectors of pixels.
template <typename T, int Units, int Count, typename Activation>
FASTROUTE_SIMD void multiply_block(const T* weight, const T* bias, const T* x, int64_t in, T* y,
                                   Activation activation) {
    constexpr int lanes = Simd<T>::lanes;
    Vector<T> sum[Units][Count];
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) sum[u][v] = broadcast(bias[u]);
    }
    for (int64_t k = 0; k < in; ++k) {
        Vector<T> pixels[Count];
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) pixels[v] = load(x + k * kTile + v * lanes);
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u) {
            const Vector<T> w = broadcast(weight[k * Units + u]);
#pragma GCC unroll 4
            for (int v = 0; v < Count; ++v) sum[u][v] = fma(w, pixels[v], sum[u][v]);
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) store(y + u * kTile + v * lanes, activation(sum[u][v]));
    }
}

// One layer for Count vectors of pixels.
template <typename T, int Count, typename Activation>
FASTROUTE_TARGET __attribute__((noinline)) void multiply_layer(const Layer<T>& layer, const T* x, T* y,
                                                               Activation activation) {
    const T* weight = layer.weight;
    const T* bias = layer.bias;
    int64_t u = 0;
    for (; u + kUnits <= layer.out; u += kUnits) {
        multiply_block<T, kUnits, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        weight += kUnits * layer.in;
    }
    switch (layer.out - u) {
        case 5: return multiply_block<T, 5, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        case 4: return multiply_block<T, 4, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        case 3: return multiply_block<T, 3, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        case 2: return multiply_block<T, 2, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        case 1: return multiply_block<T, 1, Count>(weight, bias + u, x, layer.in, y + u * kTile, activation);
        default: return;
    }
}

template <typename T, typename Activation>
FASTROUTE_SIMD void run_layer(const Layer<T>& layer, const T* x, int64_t vectors, T* y, Activation activation) {
    constexpr int lanes = Simd<T>::lanes;
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors)
        multiply_layer<T, kVectors>(layer, x + v * lanes, y + v * lanes, activation);
    for (; v < vectors; ++v) multiply_layer<T, 1>(layer, x + v * lanes, y + v * lanes, activation);
}

#undef FASTROUTE_SIMD
