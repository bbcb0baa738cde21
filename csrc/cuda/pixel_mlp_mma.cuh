// The layers behind the first on tensor cores, for float16, bfloat16 and, as TF32, float32, with float32 sums.
// Work mapping: a persistent block of Warps warps; each warp takes 16 · Rows pixels through all layers. Its activations
// stay in registers: the sums of 16 units of one layer are, in place, the operand of 16 inputs of the next. Where two
// layers are more than the registers hold, those of the next wait in shared memory, each lane's own. Weights are read
// in fragment order, 16 bytes per lane and step. Every hidden layer is padded to 16 · Tiles units.
#pragma once

#include "cuda/pixel_mlp_data.cuh"
#include "cuda/pixel_mlp_operand.cuh"

namespace fastroute::pixel_mlp {

// One class's numbers behind its first layer, in this order, as one block that can be copied to shared memory.
template <typename T>
struct MmaImage {
    int32_t tiles, hidden, channels;  // tiles of 16 units, layers between the first and the last, C

    FASTROUTE_HOST_DEVICE int32_t last_tiles() const { return (channels + 15) / 16; }
    FASTROUTE_HOST_DEVICE int32_t rel_y() const { return 0; }                             // float [tiles · 16]
    FASTROUTE_HOST_DEVICE int32_t rel_x() const { return tiles * 64; }                    // float [tiles · 16]
    FASTROUTE_HOST_DEVICE int32_t bias(int32_t n) const { return (2 + n) * tiles * 64; }  // float [tiles · 16]
    FASTROUTE_HOST_DEVICE int32_t weight(int32_t n) const {  // [tiles or last_tiles][tiles][kTileBytes]
        return bias(hidden) + last_tiles() * 64 + n * tiles * tiles * kTileBytes<T>;
    }
    FASTROUTE_HOST_DEVICE int32_t bytes() const { return weight(hidden) + last_tiles() * tiles * kTileBytes<T>; }
};

// Outputs of one warp, 16 channels of 32 pixels, on their way from the tensor cores' order to one pixel per lane.
inline constexpr int kStageStride = 17;

template <typename T>
struct MmaTask {
    Pixels<T> pixels;
    Members members;
    const float* first;  // [features, tiles · 16], see pixel_mlp_first.cuh
    const char* image;   // in global memory
    MmaImage<T> layout;
};

template <typename T, int Tiles>
inline constexpr int kLayerSteps = kSteps<T> * Tiles;

// By the steps of one layer: where the next layer's activations wait in shared memory, and how many
// warps and blocks of a multiprocessor the registers of Steps · Rows allow.
FASTROUTE_HOST_DEVICE constexpr bool mma_through_shared(int steps) { return steps > 16; }
// All warps of a block share its copy of the weights, so few large blocks leave more of them in a multiprocessor.
FASTROUTE_HOST_DEVICE constexpr int mma_warps(int steps) {
    if (mma_through_shared(steps)) return 4;
    return steps == 5 ? 12 : 8;
}
FASTROUTE_HOST_DEVICE constexpr int mma_rows(int steps) { return steps > 8 ? 1 : 2; }
FASTROUTE_HOST_DEVICE constexpr int mma_blocks(int steps) {
    return mma_through_shared(steps) || steps <= 4 || steps == 10 ? 2 : 1;
}

// The first layer's activations of this warp's pixels, as operands: what the feature gives and what the place gives.
template <typename T, int Tiles, int Rows>
__device__ __forceinline__ void first_operand(const MmaTask<T>& task, const char* image, const At<float>& pixel,
                                              uint32_t (&x)[Rows][kLayerSteps<T, Tiles>][4]) {
    const uint32_t feature = feature_of(task.pixels, pixel);
    const float rel_y = pixel.y.relative, rel_x = pixel.x.relative;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const float4* slope_y = reinterpret_cast<const float4*>(image + task.layout.rel_y()) + q;
    const float4* slope_x = reinterpret_cast<const float4*>(image + task.layout.rel_x()) + q;
#pragma unroll
    for (int row = 0; row < 2 * Rows; ++row) {
        const uint32_t source = row * 8 + g;
        const int64_t at = static_cast<int64_t>(__shfl_sync(kFullWarp, feature, source)) * (Tiles * 16);
        const float y = __shfl_sync(kFullWarp, rel_y, source), x_ = __shfl_sync(kFullWarp, rel_x, source);
        const float4* from = reinterpret_cast<const float4*>(task.first + at) + q;
#pragma unroll
        for (int k = 0; k < Tiles; ++k) {
            // Keeps the compiler from reading so far ahead that it runs out of registers.
            if (Tiles > 8 && k % 4 == 0) __syncwarp();
            const float4 base = __ldg(from + 4 * k), sy = slope_y[4 * k], sx = slope_x[4 * k];
            set_operand<T>(&x[row / 2][k * kSteps<T>], row % 2, fmaf(x_, sx.x, fmaf(y, sy.x, base.x)),
                           fmaf(x_, sx.y, fmaf(y, sy.y, base.y)), fmaf(x_, sx.z, fmaf(y, sy.z, base.z)),
                           fmaf(x_, sx.w, fmaf(y, sy.w, base.w)));
        }
    }
}

// sum = bias + W x for 16 units, of which Halves times eight are wanted.
template <typename T, int Steps, int Rows, int Halves>
__device__ __forceinline__ void multiply_tile(const uint4* weight, const float* bias,
                                              const uint32_t (&x)[Rows][Steps][4], float (&sum)[Rows][2][4]) {
    const uint32_t q = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < Halves; ++half) {
        const float2 b = *reinterpret_cast<const float2*>(bias + half * 8 + 2 * q);
#pragma unroll
        for (int row = 0; row < Rows; ++row) {
            sum[row][half][0] = sum[row][half][2] = b.x;
            sum[row][half][1] = sum[row][half][3] = b.y;
        }
    }
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
        // As above: weights are not read far ahead.
        if (Steps > 16 && k % 8 == 0) __syncwarp();
        const uint4 w = weight[k * 32];
#pragma unroll
        for (int row = 0; row < Rows; ++row) {
            multiply_step<T>(sum[row][0], x[row][k], w.x, w.y);
            if (Halves == 2) multiply_step<T>(sum[row][1], x[row][k], w.z, w.w);
        }
    }
}

// 16 bytes per thread and step, by all threads of a block.
__device__ __forceinline__ void copy_block(const char* from, int32_t bytes, char* to) {
    for (int32_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
}

// Resident: the class's numbers are copied to shared memory once; otherwise the weights of 16 units at a time.
template <typename T, int Tiles, bool Resident>
__global__ void __launch_bounds__(32 * mma_warps(kLayerSteps<T, Tiles>), mma_blocks(kLayerSteps<T, Tiles>))
    pixel_mlp_mma_kernel(MmaTask<T> task) {
    constexpr int Steps = kLayerSteps<T, Tiles>, Rows = mma_rows(Steps), Warps = mma_warps(Steps);
    constexpr bool Shared = mma_through_shared(Steps);
    // Steps of the next layer in registers.
    constexpr int Ahead = Shared ? kSteps<T> : Steps;
    constexpr uint32_t kWarpPixels = 16 * Rows, kBlockPixels = Warps * kWarpPixels;
    if (blockIdx.x * kBlockPixels >= task.members.size()) return;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    FASTROUTE_DYNAMIC_SHARED(char, shared);
    float* const stage = reinterpret_cast<float*>(shared) + warp * kWarpPixels * kStageStride;
    char* const behind = shared + kBlockPixels * kStageStride * sizeof(float);
    uint4* const next = reinterpret_cast<uint4*>(behind) + warp * Steps * 32 + lane;  // [Steps], 32 apart
    char* const copy = behind + (Shared ? Warps * Steps * 512 : 0);
    const char* const image = Resident ? copy : task.image;
    if (Resident) {
        copy_block(task.image, task.layout.bytes(), copy);
        __syncthreads();
    }
    const auto bias = [&](int32_t n) { return reinterpret_cast<const float*>(image + task.layout.bias(n)); };
    // Of 16 units of layer n.
    const auto weight = [&](int32_t n, int32_t unit) {
        const int32_t at = task.layout.weight(n) + unit * Tiles * kTileBytes<T>;
        if (!Resident) {
            __syncthreads();
            copy_block(task.image + at, Tiles * kTileBytes<T>, copy);
            __syncthreads();
        }
        return reinterpret_cast<const uint4*>(copy + (Resident ? at : 0)) + lane;
    };
    const auto pixel = [&](uint32_t place) {
        return pixel_at(task.pixels, task.members.at(task.members.first() + min(place, task.members.size() - 1)));
    };

    // The size is read again where it is needed, for the sake of registers.
    for (uint32_t tile = blockIdx.x; tile * kBlockPixels < task.members.size(); tile += gridDim.x) {
        // Each lane knows one pixel; a warp of 16 pixels knows each twice. Those beyond the last repeat it.
        const uint32_t place = tile * kBlockPixels + warp * kWarpPixels + lane % kWarpPixels;
        uint32_t x[Rows][Steps][4];
        first_operand<T, Tiles, Rows>(task, image, pixel(place), x);

        for (int32_t n = 0; n < task.layout.hidden; ++n) {
            uint32_t y[Rows][Ahead][4];
#pragma unroll(Shared ? 1 : Tiles)
            for (int unit = 0; unit < Tiles; ++unit) {
                const int at = Shared ? 0 : unit * kSteps<T>;
                float sum[Rows][2][4];
                multiply_tile<T, Steps, Rows, 2>(weight(n, unit), bias(n) + unit * 16, x, sum);
#pragma unroll
                for (int row = 0; row < Rows; ++row) {
                    const auto& s = sum[row];
                    set_operand<T>(&y[row][at], 0, s[0][0], s[0][1], s[1][0], s[1][1]);
                    set_operand<T>(&y[row][at], 1, s[0][2], s[0][3], s[1][2], s[1][3]);
                }
                if constexpr (Shared) {
#pragma unroll
                    for (int k = 0; k < Ahead; ++k) {
                        next[(unit * Ahead + k) * 32] = make_uint4(y[0][k][0], y[0][k][1], y[0][k][2], y[0][k][3]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < Steps; ++k) {
                if constexpr (Shared) {
                    const uint4 step = next[k * 32];
                    x[0][k][0] = step.x, x[0][k][1] = step.y, x[0][k][2] = step.z, x[0][k][3] = step.w;
                } else {
#pragma unroll
                    for (int row = 0; row < Rows; ++row) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) x[row][k][i] = y[row][k][i];
                    }
                }
            }
        }

        const int32_t last = task.layout.hidden;
        for (int32_t begin = 0; begin < task.layout.channels; begin += 16) {
            const int32_t left = min(16, task.layout.channels - begin);
            const uint4* w = weight(last, begin / 16);
            float sum[Rows][2][4];
            // Lanes that stored pixels meet those that had none; where weights are copied all have met.
            if (Resident) __syncwarp();
            if (left <= 8) {
                multiply_tile<T, Steps, Rows, 1>(w, bias(last) + begin, x, sum);
            } else {
                multiply_tile<T, Steps, Rows, 2>(w, bias(last) + begin, x, sum);
            }
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half * 8 >= left) continue;
#pragma unroll
                for (int row = 0; row < 2 * Rows; ++row) {
                    float* const to = stage + (row * 8 + g) * kStageStride + half * 8 + 2 * q;
                    to[0] = sum[row / 2][half][row % 2 * 2], to[1] = sum[row / 2][half][row % 2 * 2 + 1];
                }
            }
            __syncwarp();
            if (place >= task.members.size() || lane >= kWarpPixels) continue;
            // Found again, because the registers are needed in between.
            const At<float> at = pixel(place);
            for (int32_t c = 0; c < left; ++c) store_pixel(task.pixels, at, begin + c, stage[lane * kStageStride + c]);
        }
    }
}

}  // namespace fastroute::pixel_mlp
