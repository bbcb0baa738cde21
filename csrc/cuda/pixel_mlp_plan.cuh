// What pixel_mlp decides on the host, class by class: none, one product, layers on tensor cores or without; and where
// the packed numbers lie that the kernels read.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/pixel_mlp_mma.cuh"
#include "cuda/pixel_mlp_simt.cuh"
#include "cuda/pixel_mlp_sort.cuh"

namespace fastroute::pixel_mlp {

// Pixels, and features, that are in work at once: bounds the memory, and what the first layer gives, 64 units of 1/16
// as many features, stays near the second-level cache.
#ifndef FASTROUTE_CHUNK_PIXELS
#define FASTROUTE_CHUNK_PIXELS (1 << 21)
#endif
inline constexpr int64_t kChunkPixels = FASTROUTE_CHUNK_PIXELS;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline Tensor device_buffer(int64_t bytes, const Tensor& beside) {
    const int64_t size[1] = {std::max<int64_t>(bytes, 1)};
    return torch::stable::empty({size, 1}, ScalarType::Byte, std::nullopt, beside.device());
}

template <typename T>
T* data_at(const Tensor& buffer, int64_t offset = 0) {
    return reinterpret_cast<T*>(static_cast<char*>(buffer.mutable_data_ptr()) + offset);
}

enum class Kind { free, linear, simt, mma };

// One class; offsets are bytes in the buffer of packed numbers.
template <typename T>
struct ClassPlan {
    Kind kind = Kind::free;
    bool fragments = false;          // its first layer runs on tensor cores
    int32_t depth = 0, units = 0;    // layers; units of the first one
    int32_t padded = 0, widest = 0;  // the same, padded; of any layer but the last, padded
    int64_t first_weight = 0, constant = 0, rel_y = 0, rel_x = 0;
    int64_t table = 0;  // of SimtLayer
    int64_t image = 0;  // of MmaImage
    bool resident = false;
    MmaImage<T> layout{};
};

template <typename T>
struct Plan {
    using W = Work<T>;
    std::vector<ClassPlan<T>> classes;
    std::vector<PackedLayer> fragments, plain;  // what pixel_mlp_pack_kernel is to do, offsets standing for pointers
    int64_t bytes = 0;

    int64_t take(int64_t count) { return std::exchange(bytes, bytes + round_up(count, 256)); }
};

inline Numbers numbers_of(const Tensor& x) {
    const int type = x.scalar_type() == ScalarType::Float      ? 0
                     : x.scalar_type() == ScalarType::Half     ? 1
                     : x.scalar_type() == ScalarType::BFloat16 ? 2
                                                               : 3;
    FASTROUTE_CHECK(type != 3 || x.scalar_type() == ScalarType::Double, kOp,
                    ": the dtype must be float32, float16, bfloat16 or float64");
    return {x.const_data_ptr(), {x.stride(0), x.dim() > 1 ? x.stride(1) : 0}, type};
}

// Whether there is a kernel of layers of 16 · tiles units: one that keeps all weights in shared memory, or one that
// reads those of 16 units at a time. TF32 has fewer, and 256 units of it would leave no room for the weights.
template <typename T>
constexpr bool has_kernel(int tiles, bool resident) {
    if (!resident) return tiles == 8 || tiles == 16;
    return tiles <= 5 || tiles == 8 || (kSteps<T> == 1 && (tiles == 6 || tiles == 12 || tiles == 16));
}

template <typename T>
int64_t mma_shared_bytes(const ClassPlan<T>& c) {
    const int64_t tiles = c.layout.tiles, steps = kSteps<T> * tiles, warps = mma_warps(steps);
    return 16 * mma_rows(steps) * warps * kStageStride * static_cast<int64_t>(sizeof(float)) +
           (mma_through_shared(steps) ? warps * steps * 512 : 0) +
           (c.resident ? c.layout.bytes() : tiles * kTileBytes<T>);
}

// Chooses the tensor-core kernel of a class whose widest layer but the last has `widest` units, at most 256.
template <typename T>
void choose_mma(ClassPlan<T>& c, int64_t widest, int32_t channels, int64_t max_shared) {
    for (const bool resident : {true, false}) {
        int32_t tiles = static_cast<int32_t>(blocks_for(widest, 16));
        while (tiles <= 16 && !has_kernel<T>(tiles, resident)) ++tiles;
        c.layout = {tiles, c.depth - 2, channels}, c.resident = resident;
        if (tiles <= 16 && mma_shared_bytes(c) <= max_shared) break;
    }
    c.padded = c.widest = c.layout.tiles * 16;
}

template <typename T>
Plan<T> plan_of(const Call& call, int64_t max_shared) {
    using W = Work<T>;
    const Sizes& sizes = call.sizes;
    const std::vector<Tensor>&weights = call.weights, &biases = call.biases;
    const auto ratio = [](int64_t small, int64_t large) {
        return 2.0 * static_cast<double>(small) / static_cast<double>(large);
    };
    Plan<T> plan;
    const auto offset = [](int64_t bytes) { return reinterpret_cast<void*>(bytes); };
    size_t at = 0;
    for (const int64_t depth : call.depths) {
        ClassPlan<T> c;
        c.depth = static_cast<int32_t>(depth);
        if (depth == 0) {
            plan.classes.push_back(c);
            continue;
        }
        int64_t widest = 1;
        // Tensor cores take weights of the features' type, and round those of float32 to it, as autocast does.
        const auto type = std::is_same_v<T, Half>    ? ScalarType::Half
                          : std::is_same_v<T, float> ? ScalarType::Float
                                                     : ScalarType::BFloat16;
        c.fragments = sizeof(T) == 2 || (sizeof(T) == 4 && call.tf32);
        for (int64_t n = 0; n < depth; ++n) {
            const ScalarType given = weights[at + n].scalar_type();
            c.fragments &= given == type || given == ScalarType::Float;
            if (n + 1 < depth) widest = std::max(widest, weights[at + n].size(0));
        }
        c.units = static_cast<int32_t>(weights[at].size(0));
        c.kind = depth == 1 ? Kind::linear : (c.fragments ? Kind::mma : Kind::simt);
        c.padded = static_cast<int32_t>(round_up(c.units, c.fragments ? 16 : kUnits));
        c.widest = static_cast<int32_t>(round_up(widest, kUnits));
        if (c.kind == Kind::mma) choose_mma(c, widest, static_cast<int32_t>(sizes.channels), max_shared);

        auto& list = c.fragments ? plan.fragments : plan.plain;
        const int64_t element = c.fragments ? sizeof(T) : sizeof(W);
        const int64_t padded_in = c.fragments ? round_up(sizes.dim, 16) : sizes.dim;
        const int64_t vector = c.padded * static_cast<int64_t>(sizeof(W));
        c.first_weight = plan.take(padded_in * c.padded * element), c.constant = plan.take(vector);
        if (c.kind == Kind::mma) {
            c.image = plan.take(c.layout.bytes());
            c.rel_y = c.image + c.layout.rel_y(), c.rel_x = c.image + c.layout.rel_x();
        } else {
            c.rel_y = plan.take(vector), c.rel_x = plan.take(vector);
        }
        list.push_back({.weight = numbers_of(weights[at]),
                        .bias = numbers_of(biases[at]),
                        .out = c.units,
                        .in = static_cast<int32_t>(sizes.dim + 4),
                        .dim = static_cast<int32_t>(sizes.dim),
                        .padded_out = c.padded,
                        .padded_in = static_cast<int32_t>(padded_in),
                        .permuted = c.kind == Kind::mma,
                        .cell_y = ratio(sizes.h, sizes.height),
                        .cell_x = ratio(sizes.w, sizes.width),
                        .to = offset(c.first_weight),
                        .vector = offset(c.constant),
                        .rel = {offset(c.rel_y), offset(c.rel_x)},
                        .entry = nullptr});
        if (c.kind == Kind::simt) c.table = plan.take((depth - 1) * sizeof(SimtLayer<W>));
        for (int64_t n = 1; n < depth; ++n) {
            const Tensor &weight = weights[at + n], &bias = biases[at + n];
            const auto out = static_cast<int32_t>(weight.size(0)), in = static_cast<int32_t>(weight.size(1));
            PackedLayer layer{};
            layer.weight = numbers_of(weight), layer.bias = numbers_of(bias);
            layer.out = out, layer.in = in, layer.dim = -1;
            if (c.kind == Kind::mma) {
                const auto number = static_cast<int32_t>(n - 1);
                layer.padded_in = c.padded;
                layer.padded_out = n + 1 < depth ? c.padded : 16 * c.layout.last_tiles();
                layer.to = offset(c.image + c.layout.weight(number));
                layer.vector = offset(c.image + c.layout.bias(number));
            } else {
                layer.padded_in = in, layer.padded_out = static_cast<int32_t>(round_up(out, kUnits));
                layer.to = offset(plan.take(int64_t{1} * layer.padded_in * layer.padded_out * sizeof(W)));
                layer.vector = offset(plan.take(layer.padded_out * sizeof(W)));
                layer.entry = offset(c.table + (n - 1) * static_cast<int64_t>(sizeof(SimtLayer<W>)));
            }
            list.push_back(layer);
        }
        at += depth;
        plan.classes.push_back(c);
    }
    return plan;
}

}  // namespace fastroute::pixel_mlp
