// conv1x1: out[b, o, y, x] = rectify(bias[o] + Σ_c w[o, c] · images[b, c, y, x] + residual[b, o, y, x]), c over the
// channels of all images one after the other, which are never joined.
// Work mapping: one item per block of consecutive pixels, whose sums stay in registers until they are written.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/check_float32.h"
#include "common/huge_pages.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::conv1x1 {

// Pixels of one stretch of memory in every image: all of them, or those of one row.
struct Run {
    int64_t image, row, first, count;
};

// A float32 image (B, C, H, W) by its strides, in elements.
struct View {
    const float* data;
    int64_t channels, image, channel, row, pixel;

    const float* at(const Run& run) const { return data + run.image * image + run.row * row; }
};

struct Problem {
    std::vector<View> images;
    View residual;
    bool adds, rectified;
    int64_t outputs, columns;            // outputs, and the same in whole vectors
    const float *weight, *bias, *slope;  // [C][columns], [columns], [columns]
    float* out;                          // [B, H, W, outputs]
};

#define FASTROUTE_BODY "cpu/conv1x1_pixels.h"
#include "cpu/each_isa.h"

namespace {

constexpr const char* kOp = "conv1x1";
// Outputs are padded to whole vectors of the widest instruction set.
constexpr int64_t kPad = 16;
// Pixels of a block: a multiple of those that registers hold, and a few kilobytes of every image.
constexpr int64_t kBlock = 96;

decltype(&baseline::run_block) active_block() {
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) return avx512::run_block;
    if (active_isa() == Isa::avx2) return avx2::run_block;
#endif
    return baseline::run_block;
}

View checked_view(const char* name, const Tensor& x, const Tensor& first) {  // [B, C, H, W] each
    check_float32(kOp, name, x, 4);
    FASTROUTE_CHECK(x.size(0) == first.size(0) && x.size(2) == first.size(2) && x.size(3) == first.size(3), kOp, ": ",
                    name, " must be as many pixels as the first image, (", first.size(0), ", C, ", first.size(2), ", ",
                    first.size(3), ")");
    return {x.const_data_ptr<float>(), x.size(1), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// One number per output, in whole vectors: `x` or, where there is none, `otherwise`.
std::vector<float> per_column(const char* name, const std::optional<Tensor>& x, float otherwise, const Problem& p) {
    std::vector<float> found(p.columns, otherwise);
    if (!x.has_value()) return found;
    check_float32(kOp, name, *x, 1);
    FASTROUTE_CHECK(x->size(0) == p.outputs, kOp, ": ", name, " must have one number for each of the ", p.outputs,
                    " output channels; got ", x->size(0));
    for (int64_t o = 0; o < p.outputs; ++o) found[o] = x->const_data_ptr<float>()[o * x->stride(0)];
    return found;
}

// Whether the pixels of all images follow each other at one stride.
bool is_one_run(const View& view, int64_t height, int64_t width) {
    return (height == 1 || view.row == width * view.pixel) && view.image == height * width * view.pixel;
}

Tensor conv1x1(const std::vector<Tensor>& images,        // [B, C, H, W] each
               const Tensor& weight,                     // [O, C of all images]
               const std::optional<Tensor>& bias,        // [O]
               const std::optional<Tensor>& slope,       // [O]
               const std::optional<Tensor>& residual) {  // [B, O, H, W]
    FASTROUTE_CHECK(!images.empty(), kOp, ": images must hold at least one");
    Problem p{};
    int64_t channels = 0;
    for (const Tensor& image : images) {
        p.images.push_back(checked_view("an image", image, images[0]));
        FASTROUTE_CHECK(!__builtin_add_overflow(channels, image.size(1), &channels), kOp,
                        ": the images have too many channels");
    }
    check_float32(kOp, "weight", weight, 2);
    FASTROUTE_CHECK(weight.size(1) == channels && channels >= 1 && weight.size(0) >= 1, kOp, ": weight must have ",
                    channels,
                    " columns, the channels of all images, and a row for each output, at least one of both; got (",
                    weight.size(0), ", ", weight.size(1), ")");
    const int64_t batch = images[0].size(0), height = images[0].size(2), width = images[0].size(3);
    p.outputs = weight.size(0);
    checked_product(kOp, "weight", {p.outputs, channels});
    checked_product(kOp, "weight", {p.outputs + kPad, channels});
    p.columns = (p.outputs + kPad - 1) / kPad * kPad;
    const auto biases = per_column("bias", bias, 0, p), slopes = per_column("slope", slope, 1, p);
    p.adds = residual.has_value(), p.rectified = slope.has_value();
    if (p.adds) {
        p.residual = checked_view("residual", *residual, images[0]);
        FASTROUTE_CHECK(p.residual.channels == p.outputs, kOp, ": residual must have the ", p.outputs,
                        " channels of the result; got ", p.residual.channels);
    }
    const Tensor out =
        prefer_huge_pages(empty_tensor(kOp, "the result", {batch, p.outputs, height, width}, ScalarType::Float,
                                       images[0], torch::headeronly::MemoryFormat::ChannelsLast));
    if (out.numel() == 0) return out;

    std::vector<float> packed(channels * p.columns);
    const float* from = weight.const_data_ptr<float>();
    for (int64_t o = 0; o < p.outputs; ++o) {
        for (int64_t c = 0; c < channels; ++c)
            packed[c * p.columns + o] = from[o * weight.stride(0) + c * weight.stride(1)];
    }
    p.weight = packed.data(), p.bias = biases.data(), p.slope = slopes.data();
    p.out = out.mutable_data_ptr<float>();
    bool whole = !p.adds || is_one_run(p.residual, height, width);
    for (const View& view : p.images) whole &= is_one_run(view, height, width);
    const int64_t rows = whole ? 1 : height, length = whole ? batch * height * width : width;
    const int64_t blocks = (length + kBlock - 1) / kBlock, runs = whole ? 1 : batch * height;
    const auto run_block = active_block();
    parallel(runs * blocks, grain_for(kBlock * (channels + p.outputs) * 4), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t number = item / blocks, at = item % blocks * kBlock;
            const Run run{number / rows, number % rows, number * length, length};
            run_block(p, run, at, std::min(at + kBlock, length));
        }
    });
    return out;
}

}  // namespace
}  // namespace fastroute::conv1x1

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "conv1x1", conv1x1::conv1x1); }

}  // namespace fastroute
