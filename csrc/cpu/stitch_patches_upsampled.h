// What stitch_patches prepares where the last layers of the branches are computed on the way.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches_rows.h"

namespace fastroute {
namespace {

constexpr size_t kLayers = 5;  // tensors per kind

// Whether batch i holds finished patches, which go through no layers.
inline bool given(const std::vector<int64_t>& kinds, size_t i) { return kinds[i] < 0; }

// Checks the layers of every kind, [expand [D, F], its bias [D], slope [D], weight [C·r·r, D, K, K], bias [C·r·r]]; the
// first three are empty where there is no expansion. Returns C and F.
std::pair<int64_t, int64_t> checked_layers(const Batches& layers, int64_t shuffle, const Tensor& spent) {
    FASTROUTE_CHECK(!layers.empty() && layers.size() % kLayers == 0, kOp, ": layers must hold five tensors per kind");
    const auto number = static_cast<int64_t>(layers.size() / kLayers);
    const int64_t square = shuffle * shuffle, outputs = layers[3].size(0);
    const int64_t features = layers[0].numel() > 0 ? layers[0].size(1) : layers[3].size(1);
    for (size_t at = 0; at < layers.size(); at += kLayers) {
        const Tensor &expand = layers[at], &weight = layers[at + 3];
        for (size_t i = 0; i < kLayers; ++i) {
            FASTROUTE_CHECK(layers[at + i].is_contiguous() && layers[at + i].scalar_type() == ScalarType::Float, kOp,
                            ": layers must be contiguous float32");
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
    return {outputs / square, features};
}

// Checks the batches: features [M, F, p, p] of one memory format, or given patches [M, C, P, P], dense.
Target checked_features(const Batches& batches, const std::vector<int64_t>& kinds, int64_t number, int64_t channels,
                        int64_t features, const std::optional<Tensor>& inverse, const TileGrid& grid, int64_t scale,
                        int64_t shuffle, int64_t row_begin, int64_t row_end) {
    FASTROUTE_CHECK(!batches.empty() && kinds.size() == batches.size(), kOp, ": kinds must have one entry per batch");
    const int64_t span = grid.y.patch * scale;
    Batches computed, finished;
    for (size_t i = 0; i < batches.size(); ++i) {
        FASTROUTE_CHECK(kinds[i] >= -1 && kinds[i] < number, kOp, ": kinds must lie in [-1, ", number, "); got ",
                        kinds[i]);
        FASTROUTE_CHECK(batches[i].scalar_type() == ScalarType::Float, kOp, ": upsampled patches must be float32");
        (given(kinds, i) ? finished : computed).push_back(batches[i]);
    }
    FASTROUTE_CHECK(inverse.has_value() || finished.empty() || computed.empty(), kOp,
                    ": inverse must be given where some patches are finished and some are not");
    Target target{};
    int64_t count = 0;
    if (!computed.empty()) {
        FASTROUTE_CHECK(computed.front().dim() == 4 && computed.front().size(1) == features, kOp,
                        ": patches must have ", features, " features");
        target = checked_target(computed, inverse, grid, scale, shuffle, row_begin, row_end, channels);
        count += target.count;
    }
    if (!finished.empty()) {
        target = checked_target(finished, inverse, grid, scale, 1, row_begin, row_end);
        count += target.count;
        const Tensor& first = finished.front();
        FASTROUTE_CHECK(
            target.channels == channels && first.stride(1) == span * span && first.stride(2) == span &&
                first.stride(3) == 1,
            kOp, ": finished patches must be ", channels, " x ", span, " x ", span, ", side by side");
    }
    target.count = count;
    return target;
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
