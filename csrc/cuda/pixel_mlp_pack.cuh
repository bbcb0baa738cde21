// What pixel_mlp prepares on the device once per call: coordinates of rows and columns, and the weights in the order in
// which the kernels read them. Work mapping: one thread per number, in strides of the grid.
#pragma once

#include "cuda/pixel_mlp_data.cuh"
#include "cuda/pixel_mlp_operand.cuh"

namespace fastroute::pixel_mlp {

inline constexpr int kPackThreads = 256;
inline constexpr int kPackBlocks = 8;   // per layer
inline constexpr int kPackLayers = 16;  // per launch: their descriptions are arguments, which 4 KiB must hold

// places[i] describes pixel begin + i of an axis.
template <typename W>
__global__ void __launch_bounds__(kPackThreads)
    pixel_mlp_axis_kernel(PixelAxis axis, const W* relative /* [out], or null: exact */, int64_t begin, int64_t count,
                          Place<W>* places /* [count] */) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
    if (i >= count) return;
    const int64_t at = begin + i;
    const bool given = relative != nullptr;
    const W place = given ? relative[at] : static_cast<W>(axis.exact(at));
    places[i] = {static_cast<int32_t>(given ? axis.placed(at, place) : axis.nearest(at)),
                 static_cast<int32_t>(axis.bilinear_first(at)), place, static_cast<W>(axis.bilinear_weight(at))};
}

// A tensor of any floating type and stride, as a kernel reads it.
struct Numbers {
    const void* data;
    int64_t stride[2];
    int32_t type;  // 0 float, 1 Half, 2 BFloat16, 3 double

    __device__ __forceinline__ double at(int64_t i, int64_t j) const {
        const int64_t place = i * stride[0] + j * stride[1];
        switch (type) {
            case 0: return static_cast<const float*>(data)[place];
            case 1: return static_cast<float>(static_cast<const Half*>(data)[place]);
            case 2: return static_cast<float>(static_cast<const BFloat16*>(data)[place]);
            default: return static_cast<const double*>(data)[place];
        }
    }
};

// A layer behind the first without tensor cores: [in][padded] and [padded].
template <typename W>
struct SimtLayer {
    const W *weight, *bias;
    int32_t in, padded;
};

// One layer. Behind `dim` columns of features, a first layer has rel_y, rel_x, cell_y and cell_x; dim is -1 for others.
struct PackedLayer {
    Numbers weight, bias;  // [out, in], [out]
    int32_t out, in, dim;
    int32_t padded_out, padded_in;  // of the packed weight; padded_out of the vectors too
    bool permuted;                  // its units in fragment order, see `unit_of`
    double cell_y, cell_x;
    void* to;               // the packed weight
    void *vector, *rel[2];  // bias; of a first layer with the cell's part in it, and the two columns of the position
    void* entry;            // where a SimtLayer is to tell of it, or null
};

struct PackedLayers {
    PackedLayer layers[kPackLayers];
};

// Within 16 units the order in which one lane of a warp holds 4 of them together in the operand of a matrix product:
// place 4 q + i holds unit 2 q + i of the lower eight for i < 2, of the upper eight for the others.
__device__ __forceinline__ int32_t unit_of(int32_t place) {
    return place / 16 * 16 + place % 16 / 4 * 2 + place % 2 + place % 4 / 2 * 8;
}

// The packed weight. Fragments: [out / 16][in / 16] blocks of 16 x 16, see `fragment_place`. Otherwise [in][out].
template <typename T, bool Fragments>
__global__ void __launch_bounds__(kPackThreads) pixel_mlp_pack_kernel(PackedLayers all) {
    using W = Work<T>;
    using E = std::conditional_t<Fragments, Element<T>, W>;
    const PackedLayer& layer = all.layers[blockIdx.x / kPackBlocks];
    const int32_t first = blockIdx.x % kPackBlocks * kPackThreads + threadIdx.x, step = kPackBlocks * kPackThreads;
    const int32_t columns = layer.dim >= 0 ? layer.dim : layer.in;
    E* to = static_cast<E*>(layer.to);
    const int32_t numbers = layer.padded_out * layer.padded_in;
    for (int32_t i = first; i < numbers; i += step) {
        int32_t row = i % layer.padded_out, col = i / layer.padded_out;
        if (Fragments) {
            const int32_t tile = i / 256, tiles = layer.padded_in / 16;
            const FragmentPlace place = fragment_place<T>(i % 256);
            row = tile / tiles * 16 + place.unit, col = tile % tiles * 16 + place.input;
        }
        const int32_t unit = layer.permuted ? unit_of(row) : row;
        const bool real = unit < layer.out && col < columns;
        to[i] = static_cast<E>(static_cast<W>(real ? layer.weight.at(unit, col) : 0.0));
    }
    W *vector = static_cast<W*>(layer.vector), *rel_y = static_cast<W*>(layer.rel[0]);
    W* rel_x = static_cast<W*>(layer.rel[1]);
    if (first == 0 && layer.entry != nullptr) {
        *static_cast<SimtLayer<W>*>(layer.entry) = {static_cast<const W*>(layer.to),
                                                    static_cast<const W*>(layer.vector), layer.in, layer.padded_out};
    }
    for (int32_t i = first; i < layer.padded_out; i += step) {
        const int32_t unit = layer.permuted ? unit_of(i) : i;
        const bool real = unit < layer.out;
        double sum = real ? layer.bias.at(unit, 0) : 0.0;
        if (layer.dim >= 0) {
            rel_y[i] = static_cast<W>(real ? layer.weight.at(unit, layer.dim) : 0.0);
            rel_x[i] = static_cast<W>(real ? layer.weight.at(unit, layer.dim + 1) : 0.0);
            if (real) {
                sum += layer.weight.at(unit, layer.dim + 2) * layer.cell_y +
                       layer.weight.at(unit, layer.dim + 3) * layer.cell_x;
            }
        }
        vector[i] = static_cast<W>(sum);
    }
}

}  // namespace fastroute::pixel_mlp
