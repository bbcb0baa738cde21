// What pixel_mlp prepares once per call: packed weights, coordinates of rows and columns, blocks of output pixels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/pixel_mlp.h"
#include "common/pixel_mlp_axis.h"
#include "cpu/mlp_layer.h"

namespace fastroute::pixel_mlp {

// Padding of the first layer's units: one vector of the widest instruction set.
template <typename T>
inline constexpr int64_t kPad = 64 / static_cast<int64_t>(sizeof(T));

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One class. The first layer is split: [D][padded] for the feature, and [padded] each for what is added to it.
template <typename T>
struct Mlp {
    int64_t units = 0, padded = 0;  // of the first layer; 0: a free class
    bool bf16 = false;              // the other layers' products are of bfloat16
    const T *feature = nullptr, *rel_y = nullptr, *rel_x = nullptr, *constant = nullptr;
    std::vector<Layer<T>> layers;
};

// One axis: which feature, where in it, and the two pixels of the bilinear residual.
template <typename T>
struct Axis {
    std::vector<int32_t> nearest, first, second;  // [out]
    std::vector<T> relative, weight;              // [out]
    std::vector<int64_t> cuts;                    // borders of blocks, at borders of features where possible
    int64_t longest = 0, most_features = 0, most_sources = 0;  // of a block
};

// A strided image [B, D, h, w] of any type; `load` widens one vector of it.
template <typename T>
struct Source {
    const char* data = nullptr;
    int64_t stride[4] = {};  // in bytes
    void (*load)(const char* from, int64_t stride, int64_t count, T* to) = nullptr;
    bool direct = false;  // its vectors along D can be read in place

    const char* at(int64_t b, int64_t y, int64_t x) const {
        return data + b * stride[0] + y * stride[2] + x * stride[3];
    }
};

template <typename T>
struct Problem {
    int64_t dim, channels, width, row_begin, rows, widest;  // widest: units of any layer, padded
    Axis<T> y, x;
    std::vector<Mlp<T>> mlps;
    Source<T> features, residual;
    char* out;  // [B, C, rows, W]
    int64_t out_bytes;
    void (*store)(const T* from, int64_t count, char* to);
};

struct Block {
    int64_t image, y0, y1, x0, x1;  // output pixels
};

// One thread's buffers, aligned to a vector.
template <typename T>
struct Workspace {
    std::unique_ptr<char[]> memory;
    uint8_t* classes;                    // [rows, cols]
    uint32_t *pixels, *place;            // of one class: row << 16 | column; of one tile: offset in `out`
    int32_t *row, *col;                  // number of the feature row or column of each pixel row or column
    int32_t *feature_row, *feature_col;  // which feature row or column bears that number
    int32_t *slot, *used;                // by feature: where its first layer lies; by place: which feature
    T *first, *bands;                    // first layer: [features][padded] and [rows][padded]
    T *gathered, *near, *far;            // features of some rows; activations [units][kTile], twice
    T *out, *blend, *upper;              // [C][rows][cols]; two rows of the residual's source

    Workspace(const Problem<T>& p) {
        const int64_t rows = p.y.longest, cols = p.x.longest, features = p.y.most_features * p.x.most_features;
        int64_t size = 0;
        char* base = nullptr;
        const auto take = [&](auto*& pointer, int64_t count) {
            if (base != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + size);
            size += round_up(count * static_cast<int64_t>(sizeof(*pointer)), 64);
        };
        const auto take_all = [&] {
            size = 0;
            take(classes, rows * cols), take(pixels, rows * cols), take(place, kTile);
            take(row, rows), take(col, cols), take(feature_row, rows), take(feature_col, cols);
            take(slot, features), take(used, features);
            take(first, features * p.widest), take(bands, rows * p.widest);
            take(gathered, kUnits * p.dim), take(near, p.widest * kTile), take(far, p.widest * kTile);
            take(out, p.channels * rows * cols), take(blend, p.x.most_sources), take(upper, p.x.most_sources);
        };
        take_all();
        memory = std::make_unique_for_overwrite<char[]>(size + 64);
        base = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
        take_all();
    }
};

template <typename S, typename T>
void load_as(const char* from, int64_t stride, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(*reinterpret_cast<const S*>(from + i * stride));
}

template <typename S, typename T>
void store_as(const T* from, int64_t count, char* to) {
    std::transform(from, from + count, reinterpret_cast<S*>(to), [](T x) { return static_cast<S>(x); });
}

template <typename T>
Source<T> source_of(const char* name, const Tensor& x) {
    Source<T> source;
    check_cpu(kOp, name, x);
    check_rank(kOp, name, x, 4);
    source.data = static_cast<const char*>(x.const_data_ptr());
    const auto bytes = static_cast<int64_t>(x.element_size());
    for (int64_t d = 0; d < 4; ++d) source.stride[d] = x.stride(d) * bytes;
    dispatch_floating(kOp, x.scalar_type(), [&](auto zero) {
        using S = decltype(zero);
        source.load = load_as<S, T>;
        source.direct = std::is_same_v<S, T> && x.stride(1) == 1;
    });
    return source;
}

// Rows or columns [begin, end) of one axis, cut into blocks of at most `limit` pixels, at borders of features where a
// feature has not more pixels than that itself.
template <typename T>
Axis<T> axis_of(int64_t size, int64_t out, int64_t begin, int64_t end, int64_t limit,
                const T* relative /* [out], or null: exact */) {
    const PixelAxis axis{size, out};
    Axis<T> result;
    for (int64_t at = begin; at < end; ++at) {
        const int64_t first = axis.bilinear_first(at);
        const int64_t nearest = relative == nullptr ? axis.nearest(at) : axis.placed(at, relative[at]);
        result.nearest.push_back(static_cast<int32_t>(nearest));
        result.first.push_back(static_cast<int32_t>(first));
        result.second.push_back(static_cast<int32_t>(std::min(first + 1, size - 1)));
        result.relative.push_back(relative == nullptr ? static_cast<T>(axis.exact(at)) : relative[at]);
        result.weight.push_back(static_cast<T>(axis.bilinear_weight(at)));
    }
    const int64_t count = end - begin;
    result.cuts.push_back(0);
    for (int64_t at = 0; at < count;) {
        int64_t cut = std::min(at + limit, count);
        if (cut < count) {
            int64_t border = cut;
            while (border > at && result.nearest[border] == result.nearest[border - 1]) --border;
            if (border > at) cut = border;
        }
        int64_t features = 1;
        for (int64_t i = at + 1; i < cut; ++i) features += result.nearest[i] != result.nearest[i - 1];
        result.longest = std::max(result.longest, cut - at);
        result.most_features = std::max(result.most_features, features);
        result.most_sources = std::max<int64_t>(result.most_sources, result.second[cut - 1] - result.first[at] + 1);
        result.cuts.push_back(at = cut);
    }
    return result;
}

// What becomes of the layers: features of a first one, the cell that it is given, and whether products may be of
// bfloat16.
struct Packing {
    int64_t dim;
    double cell_y, cell_x;
    bool bf16;
};

// The MLPs as the kernel reads them, in bfloat16 those whose weights are; `memory` holds the numbers.
template <typename T>
std::vector<Mlp<T>> pack(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                         const std::vector<int64_t>& depths, const Packing& packing,
                         std::vector<std::vector<T>>& memory) {
    const int64_t dim = packing.dim;
    const auto keep = [&](int64_t count) {
        memory.emplace_back(count, T(0));
        return memory.back().data();
    };
    const auto values = [&](const Tensor& x) {
        const Tensor dense = torch::stable::contiguous(x);
        T* copy = keep(dense.numel());
        dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
            using S = decltype(zero);
            load_as<S, T>(static_cast<const char*>(dense.const_data_ptr()), sizeof(S), dense.numel(), copy);
        });
        return copy;
    };
    std::vector<Mlp<T>> mlps;
    size_t at = 0;
    for (const int64_t depth : depths) {
        Mlp<T> mlp;
        mlp.bf16 = packing.bf16;
        for (size_t n = at; n < at + static_cast<size_t>(depth); ++n) {
            mlp.bf16 &= weights[n].scalar_type() == ScalarType::BFloat16;
        }
        for (int64_t n = 0; n < depth; ++n, ++at) {
            const int64_t out = weights[at].size(0), in = weights[at].size(1);
            const T *weight = values(weights[at]), *bias = values(biases[at]);
            if (n > 0) {
                T* packed = keep(packed_size(out, in, mlp.bf16));
                pack_layer(weight, out, in, mlp.bf16, packed);
                mlp.layers.push_back({in, out, packed, bias});
                continue;
            }
            mlp.units = out, mlp.padded = round_up(out, kPad<T>);
            T *feature = keep(dim * mlp.padded), *rel_y = keep(mlp.padded), *rel_x = keep(mlp.padded);
            T* constant = keep(mlp.padded);
            mlp.feature = feature, mlp.rel_y = rel_y, mlp.rel_x = rel_x, mlp.constant = constant;
            for (int64_t u = 0; u < out; ++u) {
                const T* row = weight + u * in;
                for (int64_t d = 0; d < dim; ++d) feature[d * mlp.padded + u] = row[d];
                rel_y[u] = row[dim], rel_x[u] = row[dim + 1];
                constant[u] = static_cast<T>(row[dim + 2] * packing.cell_y + row[dim + 3] * packing.cell_x + bias[u]);
            }
        }
        mlps.push_back(std::move(mlp));
    }
    return mlps;
}

}  // namespace fastroute::pixel_mlp
