// conv3x3: out[b, o, y, x] = residual[b, o, y, x] + rectify(bias[o] + Σ_{c, i, j} w[o, c, i, j] · image[b, c, y - 1 +
// i, x - 1 + j]), pixels outside of the image being 0 and the sum over the channels of o's group, by Winograd's minimal
// filtering F(4 x 4, 3 x 3): 36 products for every 16 outputs and input channel instead of 144.
// Work mapping: tiles of 4 x 4 outputs are numbered over all images; blocks of them are transformed, multiplied at one
// point after the other, and transformed back inside the caches. One item per block.
#include "cpu/conv3x3/plan.h"

#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/huge_pages.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::conv3x3 {

#define FASTROUTE_BODY "cpu/conv3x3/block.h"
#include "cpu/each_isa.h"

namespace {

constexpr const char* kOp = "conv3x3";

decltype(&baseline::run_block) active_block() {
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) return avx512::run_block;
    if (active_isa() == Isa::avx2) return avx2::run_block;
#endif
    return baseline::run_block;
}

void check_floats(const char* name, const Tensor& x, int64_t rank) {
    check_cpu(kOp, name, x), check_rank(kOp, name, x, rank);
    FASTROUTE_CHECK(x.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32");
}

View<const float> view_of(const Tensor& x) {  // [B, C, H, W]
    return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// One number per output in whole vectors, group by group: `x` or, where there is none, `otherwise`.
std::vector<float> per_output(const char* name, const std::optional<Tensor>& x, float otherwise, const Problem& p) {
    std::vector<float> found(p.groups * p.columns, otherwise);
    if (!x.has_value()) return found;
    check_floats(name, *x, 1);
    FASTROUTE_CHECK(x->size(0) == p.groups * p.out, kOp, ": ", name, " must have one number for each of the ",
                    p.groups * p.out, " output channels; got ", x->size(0));
    const float* from = x->const_data_ptr<float>();
    for (int64_t o = 0; o < x->size(0); ++o) found[o / p.out * p.columns + o % p.out] = from[o * x->stride(0)];
    return found;
}

Tensor conv3x3(const Tensor& image,                    // [B, C, H, W]
               const Tensor& weight,                   // [36, G, C / G, P]
               const std::optional<Tensor>& bias,      // [O]
               const std::optional<Tensor>& slope,     // [O]
               const std::optional<Tensor>& residual,  // [B, O, H, W]
               int64_t channels) {
    check_floats("image", image, 4), check_floats("weight", weight, 4);
    check_at_least(kOp, "channels", channels, 1);
    const int64_t groups = weight.size(1);
    FASTROUTE_CHECK(weight.size(0) == kPoints && groups >= 1 && channels % groups == 0 && weight.size(2) >= 1 &&
                        weight.size(2) == image.size(1) / groups && image.size(1) % groups == 0 &&
                        channels / groups <= std::numeric_limits<int64_t>::max() - kPad &&
                        weight.size(3) == padded(channels / groups),
                    kOp, ": weight must be (36, groups, C / groups, O / groups in whole vectors of ", kPad,
                    "), as conv3x3_weight gives it");
    Problem p{.images = image.size(0),
              .height = image.size(2),
              .width = image.size(3),
              .channels = image.size(1),
              .groups = groups,
              .in = weight.size(2),
              .out = channels / groups,
              .columns = weight.size(3),
              .down = 0,
              .across = 0,
              .tiles = 0,
              .rectified = slope.has_value(),
              .x = view_of(image),
              .residual = {},
              .y = {},
              .weight = nullptr,
              .bias = nullptr,
              .slope = nullptr};
    const auto biases = per_output("bias", bias, 0, p), slopes = per_output("slope", slope, 1, p);
    if (residual.has_value()) {
        check_floats("residual", *residual, 4);
        FASTROUTE_CHECK(residual->size(0) == p.images && residual->size(1) == channels &&
                            residual->size(2) == p.height && residual->size(3) == p.width,
                        kOp, ": residual must have the shape of the result, (", p.images, ", ", channels, ", ",
                        p.height, ", ", p.width, ")");
        p.residual = view_of(*residual);
    }
    Tensor out =
        prefer_huge_pages(empty_tensor(kOp, "the result", {p.images, channels, p.height, p.width}, ScalarType::Float,
                                       image, torch::headeronly::MemoryFormat::ChannelsLast));
    if (out.numel() == 0) return out;
    const Tensor dense = as_contiguous(weight);
    p.weight = dense.const_data_ptr<float>(), p.bias = biases.data(), p.slope = slopes.data();
    p.y = {out.mutable_data_ptr<float>(), p.height * p.width * channels, 1, p.width * channels, channels};
    p.down = (p.height + kTile - 1) / kTile, p.across = (p.width + kTile - 1) / kTile;
    p.tiles = tiles_per_block(p.channels);
    const int64_t total = p.images * p.down * p.across, blocks = (total + p.tiles - 1) / p.tiles;
    const auto run_block = active_block();
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
        static thread_local Workspace ws;
        ws.reserve(p);
        for (int64_t n = begin; n < end; ++n) run_block(p, n * p.tiles, std::min(p.tiles, total - n * p.tiles), ws);
    });
    return out;
}

}  // namespace
}  // namespace fastroute::conv3x3

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "conv3x3", conv3x3::conv3x3); }

}  // namespace fastroute
