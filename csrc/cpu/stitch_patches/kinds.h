// What stitch_patches prepares where the last layers of the branches are computed on the way.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches/upsampler_pack.h"

namespace fastroute {
namespace {

constexpr size_t kLayers = 5;  // tensors per kind

// A kind's layers: [expand [D, F], its bias [D], slope [D], weight [C·r·r, D, K, K], bias [C·r·r]], the first three
// empty where there is no expansion; or, with expand [0, C], an interpolation: weight [P, p], bias the same for
// columns, or empty where that is weight too, and the others empty.
struct Kind {
    const Tensor &expand, &expand_bias, &slope, &weight, &bias;

    Kind(const Batches& layers, size_t kind)
        : expand(layers[kLayers * kind]),
          expand_bias(layers[kLayers * kind + 1]),
          slope(layers[kLayers * kind + 2]),
          weight(layers[kLayers * kind + 3]),
          bias(layers[kLayers * kind + 4]) {
        FASTROUTE_CHECK(weight.dim() == 4 || (weight.dim() == 2 && expand.dim() == 2), kOp,
                        ": weight must be C * r * r x D x K x K, or P x p with an expansion 0 x C");
    }

    bool interpolates() const { return weight.dim() == 2; }
    const Tensor& across() const { return bias.dim() == 2 ? bias : weight; }
    int64_t features() const {
        return interpolates() || (expand.numel() > 0 && expand.dim() == 2) ? expand.size(1) : weight.size(1);
    }
    int64_t channels(int64_t shuffle) const { return interpolates() ? features() : weight.size(0) / shuffle / shuffle; }
};

void check_kind(const Kind& kind, int64_t span, int64_t shuffle, int64_t channels) {
    const Tensor &expand = kind.expand, &weight = kind.weight;
    for (const Tensor* tensor : {&expand, &kind.expand_bias, &kind.slope, &weight, &kind.bias}) {
        check_cpu(kOp, "layers", *tensor);
        FASTROUTE_CHECK(tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float, kOp,
                        ": layers must be contiguous float32");
    }
    FASTROUTE_CHECK(kind.channels(shuffle) == channels, kOp, ": all kinds must have ", channels, " channels");
    if (kind.interpolates()) {
        for (const Tensor* matrix : {&weight, &kind.across()}) {
            FASTROUTE_CHECK(matrix->size(1) > 0 && matrix->size(0) == matrix->size(1) * shuffle, kOp,
                            ": weight must be ", span, " x ", span / shuffle, ", or as its regions are; got ",
                            matrix->size(0), " x ", matrix->size(1));
        }
        return;
    }
    const int64_t square = shuffle * shuffle, units = weight.size(1);
    check_at_least(kOp, "the features of a patch", kind.features(), 1);
    check_at_least(kOp, "the units of an expansion", units, 1);
    FASTROUTE_CHECK(kind.bias.dim() == 1 && weight.size(0) % square == 0 && weight.size(2) == weight.size(3) &&
                        kind.bias.numel() == weight.size(0),
                    kOp, ": weight must be C * ", square, " x D x K x K with one bias per output");
    FASTROUTE_CHECK(expand.numel() == 0 ||
                        (expand.dim() == 2 && kind.expand_bias.dim() == 1 && kind.slope.dim() == 1 &&
                         expand.size(0) == units && kind.expand_bias.numel() == units && kind.slope.numel() == units),
                    kOp, ": the expansion must lead from ", kind.features(), " features to ", units);
    FASTROUTE_CHECK(weight.size(2) <= 5 && upsampler::Kernels::active().find(shuffle, weight.size(2), 0) != nullptr,
                    kOp, ": there is no kernel of ", weight.size(2), " x ", weight.size(2), " for a shuffle of ",
                    shuffle);
}

// Batches by kind, those of finished patches, kind -1, last.
std::vector<Batches> sorted_batches(const Batches& batches, const std::vector<int64_t>& kinds, int64_t number) {
    std::vector<Batches> sorted(number + 1);
    for (size_t i = 0; i < batches.size(); ++i) {
        FASTROUTE_CHECK(kinds[i] >= -1 && kinds[i] < number, kOp, ": kinds must lie in [-1, ", number, "); got ",
                        kinds[i]);
        FASTROUTE_CHECK(batches[i].scalar_type() == ScalarType::Float, kOp, ": upsampled patches must be float32");
        sorted[kinds[i] < 0 ? number : kinds[i]].push_back(batches[i]);
    }
    return sorted;
}

// Checks batches and layers: of each kind, features [M, F, p, p] of one memory format; of kind -1, finished patches
// [M, C, P, P], side by side. A call of regions has regions instead.
Target checked_kinds(const Stitching& call, const std::vector<int64_t>& kinds, const Batches& layers,
                     const Tensor& spent) {
    const Geometry& geometry = call.geometry;
    const int64_t span = geometry.span(), shuffle = call.shuffle;
    check_shuffle(span, shuffle);
    FASTROUTE_CHECK(!call.batches.empty() && kinds.size() == call.batches.size(), kOp,
                    ": kinds must have one entry per batch");
    FASTROUTE_CHECK(!layers.empty() && layers.size() % kLayers == 0, kOp, ": layers must hold five tensors per kind");
    const int64_t number = static_cast<int64_t>(layers.size() / kLayers);
    check_cpu(kOp, "spent", spent);
    FASTROUTE_CHECK(spent.dim() == 1 && spent.size(0) == number + 1 && spent.scalar_type() == ScalarType::Double &&
                        spent.is_contiguous(),
                    kOp, ": spent must be ", number + 1, " numbers of float64 side by side");
    const std::vector<Batches> sorted = sorted_batches(call.batches, kinds, number);
    const int64_t channels = Kind(layers, 0).channels(shuffle);
    check_at_least(kOp, "the number of channels", channels, 1);
    for (int64_t k = 0; k < number; ++k) check_kind(Kind(layers, k), span, shuffle, channels);
    const auto used = std::count_if(sorted.begin(), sorted.end(), [](const Batches& some) { return !some.empty(); });
    FASTROUTE_CHECK(call.places.inverse.has_value() || used == 1, kOp,
                    ": inverse must be given for patches of several kinds");
    Target target{};
    int64_t count = 0;
    for (int64_t k = 0; k <= number; ++k) {
        if (sorted[k].empty()) continue;
        const Tensor& first = sorted[k].front();
        const bool finished = k == number;
        const int64_t features = finished ? channels : Kind(layers, k).features();
        FASTROUTE_CHECK(first.dim() == 4 && first.size(1) == features, kOp, ": patches of kind ", finished ? -1 : k,
                        " must have ", features, " features");
        target = checked_target(call, sorted[k], finished ? 1 : shuffle, finished ? 0 : channels);
        count += target.count;
        FASTROUTE_CHECK(!finished || first.is_contiguous(), kOp, ": finished patches must be ", channels, " x ", span,
                        " x ", span, ", side by side");
        if (finished || !Kind(layers, k).interpolates()) continue;
        const Kind kind(layers, k);
        for (const Tensor& batch : sorted[k]) {
            FASTROUTE_CHECK(batch.size(2) == kind.weight.size(1) && batch.size(3) == kind.across().size(1), kOp,
                            ": patches of kind ", k, " must be ", kind.weight.size(1), " x ", kind.across().size(1),
                            ", which its matrices read; got ", batch.size(2), " x ", batch.size(3));
        }
    }
    target.count = count;
    return target;
}

// The layers as the kernels read them; `check_kind` was called. What only packing tells is checked here.
std::vector<upsampler::Upsampler> packed_upsamplers(const Batches& layers, int64_t shuffle) {
    std::vector<upsampler::Upsampler> packed;
    for (size_t k = 0; k < layers.size() / kLayers; ++k) {
        const Kind kind(layers, k);
        const auto data = [](const Tensor& tensor) { return tensor.const_data_ptr<float>(); };
        const int64_t channels = kind.channels(shuffle);
        if (kind.interpolates()) {
            const auto band_of = [&](const Tensor& matrix) {
                auto band = upsampler::band_of(data(matrix), matrix.size(0), matrix.size(1));
                FASTROUTE_CHECK(band.has_value(), kOp, ": each row of weight must have at most ", upsampler::kMostRows,
                                " numbers side by side, none further left than in the row above");
                return std::move(*band);
            };
            packed.push_back(upsampler::interpolation(band_of(kind.weight), band_of(kind.across()), channels, shuffle));
            continue;
        }
        packed.push_back(upsampler::pack(kind.expand.numel() > 0 ? data(kind.expand) : nullptr, data(kind.expand_bias),
                                         data(kind.slope), data(kind.weight), data(kind.bias), kind.features(),
                                         kind.weight.size(1), channels, shuffle, kind.weight.size(2)));
    }
    return packed;
}

}  // namespace
}  // namespace fastroute
