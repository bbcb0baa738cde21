// What cell_mlp prepares once per call: packed layers, the windows of each column of cells, and the buffers of a
// thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/mlp_layer.h"

namespace fastroute::cell_mlp {

template <typename T>
struct Problem {
    int64_t channels, cell, span, rows, cols;  // rows and columns of cells
    int64_t windows, padded, widest;           // units of the last layer and numbers of any, in whole vectors
    T slope;
    std::vector<Layer<T>> layers;
    std::vector<int32_t> first, last;  // [cols]: the windows that a column of cells lies in
    int64_t stride[4];                 // of the image, in elements
    // Cells side by side into a tile.
    void (*read)(const Problem& p, const char* image, int64_t y, int64_t x, int64_t count, T* to);
};

// One thread's buffers, aligned to a vector: activations [numbers][kTile], twice, and the sums of a block.
template <typename T>
struct Workspace {
    std::unique_ptr<char[]> memory;
    T *near, *far, *sums;

    Workspace(const Problem<T>& p, int64_t block_rows) {
        const int64_t tile = p.widest * kTile, count = 2 * tile + block_rows * p.windows * p.padded;
        // Zeros: the lanes behind the last cell are multiplied too.
        memory = std::make_unique<char[]>(count * static_cast<int64_t>(sizeof(T)) + kAlign);
        const auto past = reinterpret_cast<uintptr_t>(memory.get()) % kAlign;
        near = reinterpret_cast<T*>(memory.get() + (kAlign - past));
        far = near + tile, sums = far + tile;
    }

  private:
    static constexpr uintptr_t kAlign = 64;
};

}  // namespace fastroute::cell_mlp
