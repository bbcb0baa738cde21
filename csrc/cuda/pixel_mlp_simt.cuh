// pixel_mlp without tensor cores: float64, and float32 where TF32 is not asked for, by fused multiply-adds in that
// type; and whatever the other kernels do not take, such as weights of another type than the features. Work mapping: a
// block of kThreads threads takes 8 · Pixels pixels (or features) and 64 units at a time; a thread sums Pixels pixels
// by 4 units. Activations lie in shared memory as [unit][pixel], weights in the caches as [in][out].
#pragma once

#include "cuda/pixel_mlp_first.cuh"

namespace fastroute::pixel_mlp {

// 16 bytes of numbers: what is loaded at once.
template <typename W>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(W));

template <typename W>
struct alignas(16) Vector {
    W at[kVector<W>];
};

// NaN stays NaN.
template <typename W>
__device__ __forceinline__ W relu(W x) {
    return x < W(0) ? W(0) : x;
}

template <typename W>
__device__ __forceinline__ Vector<W> load_vector(const W* from) {
    return *reinterpret_cast<const Vector<W>*>(from);
}

inline constexpr int kGroups = 8;                          // of pixels, side by side
inline constexpr int kUnits = 4;                           // of a thread
inline constexpr int kPass = kThreads / kGroups * kUnits;  // units of a block at once
inline constexpr int kSimtDepth = 32;                      // numbers of a feature held at once

// sum[pixel][unit] += Σ_k x[k][pixel] · weight[k][unit]. The thread's pixels are vectors, kGroups of them apart, so
// that a warp reads whole rows of banks.
template <typename W, int Pixels>
__device__ __forceinline__ void multiply(const W* x, const W* weight, int32_t depth, int32_t stride,
                                         W (&sum)[Pixels][kUnits]) {
    constexpr int lanes = kVector<W>, tile = kGroups * Pixels;
#pragma unroll 4
    for (int32_t k = 0; k < depth; ++k) {
        W pixel[Pixels], unit[kUnits];
#pragma unroll
        for (int v = 0; v < Pixels; v += lanes) {
            const Vector<W> part = load_vector(x + k * tile + v * kGroups);
#pragma unroll
            for (int i = 0; i < lanes; ++i) pixel[v + i] = part.at[i];
        }
#pragma unroll
        for (int v = 0; v < kUnits; v += lanes) {
            const Vector<W> part = load_vector(weight + static_cast<int64_t>(k) * stride + v);
#pragma unroll
            for (int i = 0; i < lanes; ++i) unit[v + i] = part.at[i];
        }
#pragma unroll
        for (int p = 0; p < Pixels; ++p) {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) sum[p][u] = fma(pixel[p], unit[u], sum[p][u]);
        }
    }
}

// Where in a tile the pixel `p` of a thread of pixel group `group` lies.
template <typename W>
__device__ __forceinline__ int32_t pixel_place(int32_t group, int p) {
    return (p / kVector<W> * kGroups + group) * kVector<W> + p % kVector<W>;
}

template <typename T, int Pixels>
__global__ void __launch_bounds__(kThreads) pixel_mlp_first_kernel(FirstLayer<T> f) {
    using W = Work<T>;
    constexpr int tile = kGroups * Pixels;
    FASTROUTE_SHARED(Vector<W>, memory, [kSimtDepth * tile / kVector<W>]);
    W* const x = reinterpret_cast<W*>(memory);
    if (f.members.size() == 0) return;
    const int32_t group = threadIdx.x % kGroups, units = threadIdx.x / kGroups * kUnits;
    const uint32_t feature = blockIdx.x * tile + threadIdx.x % tile, count = f.count();
    const T* from = feature < count ? f.at(feature) : nullptr;
    for (int32_t unit = units; unit - units < f.padded_out; unit += kPass) {
        W sum[Pixels][kUnits] = {};
        for (int32_t begin = 0; begin < f.dim; begin += kSimtDepth) {
            const int32_t depth = min(kSimtDepth, f.dim - begin);
            __syncthreads();
            for (int32_t d = threadIdx.x / tile; d < depth; d += kThreads / tile) {
                x[d * tile + threadIdx.x % tile] =
                    from == nullptr ? W(0) : static_cast<W>(from[(begin + d) * f.stride[1]]);
            }
            __syncthreads();
            if (unit >= f.padded_out) continue;
            const W* weight = static_cast<const W*>(f.weight) + static_cast<int64_t>(begin) * f.padded_out + unit;
            multiply<W, Pixels>(x + group * kVector<W>, weight, depth, f.padded_out, sum);
        }
        if (unit >= f.padded_out) continue;
#pragma unroll
        for (int p = 0; p < Pixels; ++p) {
            const uint32_t row = blockIdx.x * tile + pixel_place<W>(group, p);
            if (row >= count) continue;
            W* const to = f.to + static_cast<int64_t>(row) * f.padded_out + unit;
#pragma unroll
            for (int u = 0; u < kUnits; ++u) to[u] = sum[p][u] + f.constant[unit + u];
        }
    }
}

// Of a class whose layers behind the first are `layers[0 .. depth)`.
template <typename T>
struct SimtTask {
    using W = Work<T>;
    Pixels<T> pixels;
    Members members;
    const W* first;          // [features, units]
    const W *rel_y, *rel_x;  // [units]
    int32_t units, widest;   // padded units of the first layer, and of the widest but the last
    int32_t depth;
    const SimtLayer<W>* layers;
};

template <typename T, int Pixels>
__global__ void __launch_bounds__(kThreads, 4) pixel_mlp_simt_kernel(SimtTask<T> task) {
    using W = Work<T>;
    constexpr int lanes = kVector<W>;
    constexpr uint32_t tile = kGroups * Pixels;
    FASTROUTE_DYNAMIC_SHARED(W, memory);
    W *x = memory, *y = x + task.widest * tile;  // [widest, tile] each
    const uint32_t size = task.members.size(), first = task.members.first();
    const int32_t group = threadIdx.x % kGroups, units = threadIdx.x / kGroups * kUnits;
    // At both ends a thread has one pixel and every `stride`-th unit.
    constexpr int stride = kThreads / tile;
    const int32_t pixel = threadIdx.x % tile, begin = threadIdx.x / tile;
    for (uint32_t number = blockIdx.x; number * tile < size; number += gridDim.x) {
        const uint32_t place = number * tile + pixel;
        const At<W> at = pixel_at(task.pixels, task.members.at(first + min(place, size - 1)));
        const W* from = task.first + static_cast<int64_t>(feature_of(task.pixels, at)) * task.units;
        for (int32_t unit = begin * lanes; unit < task.units; unit += stride * lanes) {
            const Vector<W> base = load_vector(from + unit), slope_y = load_vector(task.rel_y + unit);
            const Vector<W> slope_x = load_vector(task.rel_x + unit);
#pragma unroll
            for (int i = 0; i < lanes; ++i) {
                const W sum = fma(at.x.relative, slope_x.at[i], fma(at.y.relative, slope_y.at[i], base.at[i]));
                x[(unit + i) * tile + pixel] = relu(sum);
            }
        }
        __syncthreads();
        for (int32_t n = 0; n + 1 < task.depth; ++n) {
            const SimtLayer<W> layer = task.layers[n];
            for (int32_t unit = units; unit < layer.padded; unit += kPass) {
                W sum[Pixels][kUnits];
#pragma unroll
                for (int p = 0; p < Pixels; ++p) {
#pragma unroll
                    for (int u = 0; u < kUnits; ++u) sum[p][u] = layer.bias[unit + u];
                }
                multiply<W, Pixels>(x + group * lanes, layer.weight + unit, layer.in, layer.padded, sum);
#pragma unroll
                for (int u = 0; u < kUnits; ++u) {
#pragma unroll
                    for (int p = 0; p < Pixels; p += lanes) {
                        Vector<W> part;
#pragma unroll
                        for (int i = 0; i < lanes; ++i) part.at[i] = relu(sum[p + i][u]);
                        *reinterpret_cast<Vector<W>*>(y + (unit + u) * tile + pixel_place<W>(group, p)) = part;
                    }
                }
            }
            __syncthreads();
            W* const swap = x;
            x = y, y = swap;
        }
        const SimtLayer<W> last = task.layers[task.depth - 1];
        for (int32_t c = begin; c < task.pixels.channels; c += stride) {
            W sum = last.bias[c];
            for (int32_t k = 0; k < last.in; ++k) sum = fma(x[k * tile + pixel], last.weight[k * last.padded + c], sum);
            if (place < size) store_pixel(task.pixels, at, c, sum);
        }
        __syncthreads();
    }
}

// A class of one layer has nothing behind the first. One thread per pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads) pixel_mlp_linear_kernel(SimtTask<T> task) {
    using W = Work<T>;
    const uint32_t size = task.members.size(), first = task.members.first();
    for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
        const At<W> at = pixel_at(task.pixels, task.members.at(first + i));
        const W* from = task.first + static_cast<int64_t>(feature_of(task.pixels, at)) * task.units;
        for (int32_t c = 0; c < task.pixels.channels; ++c) {
            const W sum = fma(at.x.relative, task.rel_x[c], fma(at.y.relative, task.rel_y[c], from[c]));
            store_pixel(task.pixels, at, c, sum);
        }
    }
}

}  // namespace fastroute::pixel_mlp
