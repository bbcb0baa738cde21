// What pixel_mlp prepares once per call: packed weights, coordinates of rows and columns, blocks of output pixels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace fastroute::pixel_mlp {

// Units of one register block: 6 units by 4 vectors of pixels leave 8 of 32 AVX-512 registers for operands, and 6 by 2
// leave 4 of 16 AVX2 ones.
inline constexpr int64_t kUnits = 6;
// Pixels that go through all layers together: the activations of 80 units, twice, stay near the first-level cache.
inline constexpr int64_t kTile = 64;
// Padding of the first layer's units: one vector of the widest instruction set.
template <typename T>
inline constexpr int64_t kPad = 64 / static_cast<int64_t>(sizeof(T));

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A layer behind the first: units in groups of kUnits, weight [group][in][units of the group].
template <typename T>
struct Layer {
    int64_t in, out;
    const T* weight;
    const T* bias;  // [out]
};

// One class. The first layer is split: [D][padded] for the feature, and [padded] each for what is added to it.
template <typename T>
struct Mlp {
    int64_t units = 0, padded = 0;  // of the first layer; 0: a free class
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

}  // namespace fastroute::pixel_mlp
