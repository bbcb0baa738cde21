// What stitch_patches prepares where the last layers of the branches are computed on the way.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches_rows.h"

namespace fastroute {
namespace {

constexpr size_t kLayers = 5;  // tensors per kind

// Checks [expand [D, F], its bias [D], slope [D], weight [C·r·r, D, K, K], bias [C·r·r]] of every kind; the first three
// are empty where there is no expansion. Returns C.
int64_t checked_upsamplers(const Batches& batches, const std::vector<int64_t>& kinds, const Batches& layers,
                           int64_t shuffle, const Tensor& spent) {
    FASTROUTE_CHECK(!batches.empty() && kinds.size() == batches.size(), kOp, ": kinds must have one entry per batch");
    FASTROUTE_CHECK(!layers.empty() && layers.size() % kLayers == 0, kOp, ": layers must hold five tensors per kind");
    const int64_t number = static_cast<int64_t>(layers.size() / kLayers), features = batches.front().size(1);
    for (const int64_t kind : kinds) {
        FASTROUTE_CHECK(kind >= 0 && kind < number, kOp, ": kinds must lie in [0, ", number, "); got ", kind);
    }
    for (const Batches* list : {&batches, &layers}) {
        for (const Tensor& tensor : *list) {
            FASTROUTE_CHECK(tensor.scalar_type() == ScalarType::Float, kOp, ": upsampled patches must be float32");
        }
    }
    const int64_t square = shuffle * shuffle, outputs = layers[3].size(0);
    for (size_t at = 0; at < layers.size(); at += kLayers) {
        const Tensor &expand = layers[at], &weight = layers[at + 3];
        for (size_t i = 0; i < kLayers; ++i) {
            FASTROUTE_CHECK(layers[at + i].is_contiguous(), kOp, ": layers must be contiguous");
        }
        FASTROUTE_CHECK(weight.dim() == 4 && weight.size(0) == outputs && outputs % square == 0 &&
                            weight.size(2) == weight.size(3) && layers[at + 4].numel() == outputs,
                        kOp, ": weight must be C * ", square, " x D x K x K with one bias per output");
        const int64_t units = weight.size(1);
        FASTROUTE_CHECK(expand.numel() == 0
                            ? units == features
                            : expand.dim() == 2 && expand.size(0) == units && expand.size(1) == features &&
                                  layers[at + 1].numel() == units && layers[at + 2].numel() == units,
                        kOp, ": the expansion must lead from ", features, " features to ", units);
        FASTROUTE_CHECK(weight.size(2) <= 5 && upsampler::Kernels::active().find(shuffle, weight.size(2), 0) != nullptr,
                        kOp, ": there is no kernel of ", weight.size(2), " x ", weight.size(2), " for a shuffle of ",
                        shuffle);
    }
    FASTROUTE_CHECK(spent.dim() == 1 && spent.size(0) == number + 1 && spent.scalar_type() == ScalarType::Double, kOp,
                    ": spent must be ", number + 1, " numbers of float64");
    return outputs / square;
}

// The layers as the kernels read them; they were checked.
std::vector<upsampler::Upsampler> packed_upsamplers(const Batches& layers, int64_t features, int64_t channels,
                                                    int64_t shuffle) {
    std::vector<upsampler::Upsampler> packed;
    for (size_t at = 0; at < layers.size(); at += kLayers) {
        const auto data = [&](size_t i) { return layers[at + i].const_data_ptr<float>(); };
        const Tensor& weight = layers[at + 3];
        packed.push_back(upsampler::pack(layers[at].numel() > 0 ? data(0) : nullptr, data(1), data(2), data(3), data(4),
                                         features, weight.size(1), channels, shuffle, weight.size(2)));
    }
    return packed;
}

// What the threads measured: ticks in the layers of each kind, and in everything else.
struct Spent {
    std::mutex lock;
    std::vector<int64_t> ticks;  // [kinds + 1]

    void add(const std::vector<int64_t>& layers, int64_t all) {
        const std::lock_guard guard(lock);
        for (size_t kind = 0; kind < layers.size(); ++kind) {
            ticks[kind] += layers[kind];
            all -= layers[kind];
        }
        ticks.back() += all;
    }
};

// LR rows per item of work: each item computes anew what its convolutions read beside them, but threads need items
// enough to end together.
inline int64_t rows_per_item(int64_t rows) {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t count = 8;
    while (count > 2 && rows < 8 * threads * count) count /= 2;
    return count;
}

}  // namespace
}  // namespace fastroute
