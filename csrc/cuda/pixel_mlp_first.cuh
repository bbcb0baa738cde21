// The first layer's product with the features, once per feature and class: to[feature][unit] = Σ_d W[unit][d] ·
// feature[d] + what is the same for all pixels. Kept in float32 (float64 for float64), so it is not rounded on the way.
#pragma once

#include "cuda/pixel_mlp_pack.cuh"

namespace fastroute::pixel_mlp {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / 32;

template <typename T>
struct FirstLayer {
    using W = Work<T>;
    const T* features;  // [images, D, h, w], at the chunk's first feature row
    int64_t stride[4];
    bool wide;  // D is dense and aligned: 16 bytes of it can be read at once
    uint32_t images, rows, cols;
    int32_t dim, padded_in, units, padded_out;
    const void* weight;  // packed
    const W* constant;   // [padded_out]
    W* to;               // [images · rows · cols, padded_out]
    Members members;     // a class without pixels needs nothing

    FASTROUTE_HOST_DEVICE uint32_t count() const { return images * rows * cols; }

    __device__ __forceinline__ const T* at(uint32_t feature) const {
        const uint32_t line = feature / cols, col = feature - line * cols, image = line / rows, row = line % rows;
        return features + image * stride[0] + row * stride[2] + col * stride[3];
    }
};

// Tensor cores. Work mapping: a block takes kFirstTile features, each warp 32 of them by 64 units at a time.
inline constexpr int kFirstTile = kThreads;
inline constexpr int kFirstDepth = 64;  // numbers of a feature held at once
// Eight numbers more per row: what a warp reads at once then lies in different banks.
inline constexpr int kFirstStride = kFirstDepth + 8;

// Copies numbers [begin, begin + kFirstDepth) of this thread's feature to shared memory, zeros beyond the last.
template <typename T>
__device__ __forceinline__ void load_feature(const FirstLayer<T>& f, const T* from, int32_t begin, Element<T>* to) {
    constexpr int N = 16 / static_cast<int>(sizeof(T));
    for (int32_t d = 0; d < kFirstDepth; d += N) {
        alignas(16) T values[N];
        alignas(16) Element<T> elements[N];
        const int32_t left = from == nullptr ? 0 : f.dim - begin - d;
        if (f.wide && left >= N) {
            *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from + begin + d);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = i < left ? from[(begin + d + i) * f.stride[1]] : T(0.0f);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) elements[i] = Element<T>(values[i]);
        *reinterpret_cast<uint4*>(to + d) = *reinterpret_cast<const uint4*>(elements);
    }
}

template <typename T, bool Permuted>
__global__ void __launch_bounds__(kThreads) pixel_mlp_first_mma_kernel(FirstLayer<T> f) {
    constexpr int Steps = kSteps<T>;
    FASTROUTE_SHARED(uint4, memory, [kFirstTile * kFirstStride * sizeof(T) / 16]);
    Element<T>* const tile = reinterpret_cast<Element<T>*>(memory);
    if (f.members.size() == 0) return;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const uint32_t feature = blockIdx.x * kFirstTile + threadIdx.x, count = f.count();
    const T* from = feature < count ? f.at(feature) : nullptr;
    const uint4* weight = static_cast<const uint4*>(f.weight);
    const int32_t depth_tiles = f.padded_in / 16, unit_tiles = f.padded_out / 16;
    const Element<T>* rows = tile + (warp * 32 + g) * kFirstStride + 2 * q;
    const bool once = f.dim <= kFirstDepth;
    for (int32_t n0 = 0; n0 < unit_tiles; n0 += 4) {
        float sum[2][4][2][4] = {};
        for (int32_t begin = 0; begin < f.padded_in; begin += kFirstDepth) {
            if (!once || n0 == 0) {
                __syncthreads();
                load_feature(f, from, begin, tile + threadIdx.x * kFirstStride);
                __syncthreads();
            }
            // Lanes that stored sums meet those beyond the last feature.
            __syncwarp();
            const int32_t steps = min(kFirstDepth / 16, depth_tiles - begin / 16) * Steps;
            for (int32_t k = 0; k < steps; ++k) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    load_operand<T>(rows + m * 16 * kFirstStride + k * (16 / Steps), 8 * kFirstStride, a[m]);
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    if (n0 + n >= unit_tiles) continue;
                    const uint4 b = __ldg(weight + (((n0 + n) * depth_tiles + begin / 16) * Steps + k) * 32 + lane);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        multiply_step<T>(sum[m][n][0], a[m], b.x, b.y);
                        multiply_step<T>(sum[m][n][1], a[m], b.z, b.w);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (n0 + n >= unit_tiles) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int32_t place = (n0 + n) * 16 + half * 8 + 2 * q;
                const float2 constant = *reinterpret_cast<const float2*>(f.constant + place);
                // Units that are only padding stay 0 even where a feature is infinite.
                const bool real0 = (Permuted ? unit_of(place) : place) < f.units;
                const bool real1 = (Permuted ? unit_of(place + 1) : place + 1) < f.units;
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const uint32_t row = blockIdx.x * kFirstTile + warp * 32 + m * 8 + g;
                    if (row >= count) continue;
                    const float* s = sum[m / 2][n][half] + m % 2 * 2;
                    *reinterpret_cast<float2*>(f.to + static_cast<int64_t>(row) * f.padded_out + place) =
                        make_float2(real0 ? s[0] + constant.x : 0.0f, real1 ? s[1] + constant.y : 0.0f);
                }
            }
        }
    }
}

}  // namespace fastroute::pixel_mlp
