// conv1x1: out[b, o, y, x] = rectify(bias[o] + Σ_c w[o, c] · images[b, c, y, x] + residual[b, o, y, x]), c over the
// channels of all images one after the other, which are never joined.
// Work mapping: one item per block of consecutive pixels, whose sums stay in registers until they are written.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "common/numbers.h"
#include "common/written.h"
#include "cpu/conv1x1/bf16.h"
#include "cpu/conv1x1/problem.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::conv1x1 {

#define FASTROUTE_BODY "cpu/conv1x1/pixels.h"
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

using Block = void (*)(const Problem<float>&, const Run&, int64_t, int64_t);

// Numbers of bfloat16 where no instruction multiplies them: in float32, a block at a time, and rounded at the end.
void run_widened(Block run_block, const Problem<BFloat16>& p, const Run& run, int64_t begin, int64_t end) {
    const int64_t pixels = end - begin;
    std::vector<std::vector<float>> room;
    const auto widened = [&](const View<const BFloat16>& view) {
        std::vector<float>& numbers = room.emplace_back(pixels * view.channels);
        const BFloat16* from = view.at(run) + begin * view.pixel;
        for (int64_t i = 0; i < pixels; ++i) {
            for (int64_t c = 0; c < view.channels; ++c)
                numbers[i * view.channels + c] = from[i * view.pixel + c * view.channel];
        }
        return View<const float>{numbers.data(), view.channels, 0, 1, 0, view.channels};
    };
    Problem<float> q{.images = {},
                     .residual = {},
                     .adds = p.adds,
                     .rectified = p.rectified,
                     .outputs = p.outputs,
                     .columns = p.columns,
                     .weight = p.weight,
                     .bias = p.bias,
                     .slope = p.slope,
                     .out = {}};
    for (const View<const BFloat16>& image : p.images) q.images.push_back(widened(image));
    if (p.adds) q.residual = widened(p.residual);
    std::vector<float> sums(pixels * p.outputs);
    q.out = {sums.data(), p.outputs, 0, 1, 0, p.outputs};
    run_block(q, {0, 0, pixels}, 0, pixels);
    BFloat16* to = p.out.at(run) + begin * p.out.pixel;
    for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t o = 0; o < p.outputs; ++o) to[i * p.out.pixel + o] = sums[i * p.outputs + o];
    }
}

template <typename T>
View<T> view_of(const Tensor& x, T* data) {  // [B, C, H, W]
    return {data, x.size(1), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <typename T>
View<const T> checked_view(const char* name, const Tensor& x, const Tensor& first) {  // [B, C, H, W] each
    check_like(kOp, name, x, first.scalar_type(), "the first image", 4);
    FASTROUTE_CHECK(x.size(0) == first.size(0) && x.size(2) == first.size(2) && x.size(3) == first.size(3), kOp, ": ",
                    name, " must be as many pixels as the first image, (", first.size(0), ", C, ", first.size(2), ", ",
                    first.size(3), ")");
    return view_of(x, x.const_data_ptr<T>());
}

// One number per output, in whole vectors: `x` or, where there is none, `otherwise`.
template <typename T>
std::vector<float> per_column(const char* name, const std::optional<Tensor>& x, float otherwise, const Problem<T>& p) {
    std::vector<float> found(p.columns, otherwise);
    if (!x.has_value()) return found;
    FASTROUTE_CHECK(x->dim() == 1 && x->size(0) == p.outputs, kOp, ": ", name, " must have one number for each of the ",
                    p.outputs, " output channels");
    read_numbers<T>(kOp, name, *x, [&](int64_t o, float value) { found[o] = value; });
    return found;
}

// The weights with the columns of a channel next to each other; for products of bfloat16 those of two channels of an
// image in turn, zeros beside the last of an odd number.
template <typename T>
std::vector<float> packed_weight(const Tensor& weight, const Problem<T>& p, int64_t channels, bool pairs) {  // [O, C]
    const T* from = weight.const_data_ptr<T>();
    // Each is a call into torch.
    const int64_t row = weight.stride(0), step = weight.stride(1);
    if (!pairs) {
        std::vector<float> packed(channels * p.columns);
        // A line of outputs at a time, so that no line is written in parts.
        for (int64_t first = 0; first < p.outputs; first += kPad) {
            const int64_t last = std::min(first + kPad, p.outputs);
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t o = first; o < last; ++o) packed[c * p.columns + o] = from[o * row + c * step];
            }
        }
        return packed;
    }
    int64_t rows = 0;
    for (const View<const T>& image : p.images) rows += (image.channels + 1) / 2;
    std::vector<float> packed(rows * p.columns);
    T* to = reinterpret_cast<T*>(packed.data());
    for (const View<const T>& image : p.images) {
        for (int64_t first = 0; first < p.outputs; first += kPad) {
            const int64_t last = std::min(first + kPad, p.outputs);
            for (int64_t c = 0; c < image.channels; ++c) {
                for (int64_t o = first; o < last; ++o)
                    to[(c / 2 * p.columns + o) * 2 + c % 2] = from[o * row + c * step];
            }
        }
        from += image.channels * step;
        to += (image.channels + 1) / 2 * p.columns * 2;
    }
    return packed;
}

// Whether the pixels of all images follow each other at one stride.
template <typename T>
bool is_one_run(const View<T>& view, int64_t batch, int64_t height, int64_t width) {
    return (height == 1 || view.row == width * view.pixel) && (batch == 1 || view.image == height * width * view.pixel);
}

template <typename T>
Tensor convolved(const std::vector<Tensor>& images,      // [B, C, H, W] each
                 const Tensor& weight,                   // [O, C of all images]
                 const std::optional<Tensor>& bias,      // [O]
                 const std::optional<Tensor>& slope,     // [O]
                 const std::optional<Tensor>& residual,  // [B, O, H, W]
                 const std::optional<Tensor>& given) {   // [B, O, H, W]
    Problem<T> p{};
    int64_t channels = 0;
    for (const Tensor& image : images) {
        p.images.push_back(checked_view<T>("an image", image, images[0]));
        FASTROUTE_CHECK(!__builtin_add_overflow(channels, image.size(1), &channels), kOp,
                        ": the images have too many channels");
    }
    check_like(kOp, "weight", weight, images[0].scalar_type(), "the first image", 2);
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
        p.residual = checked_view<T>("residual", *residual, images[0]);
        FASTROUTE_CHECK(p.residual.channels == p.outputs, kOp, ": residual must have the ", p.outputs,
                        " channels of the result; got ", p.residual.channels);
    }
    if (given.has_value()) {
        checked_view<T>("out", *given, images[0]);
        FASTROUTE_CHECK(given->size(1) == p.outputs, kOp, ": out must have the ", p.outputs,
                        " channels of the result; got ", given->size(1));
        FASTROUTE_CHECK(given->stride(1) == 1 || p.outputs == 1 || given->numel() == 0, kOp,
                        ": out must have its channels side by side");
        std::vector<Tensor> read = images;
        read.push_back(weight);
        check_written(kOp, "out", *given, with_given(std::move(read), {&bias, &slope, &residual}));
    }
    const Tensor out = given.has_value()
                           ? *given
                           : prefer_huge_pages(empty_tensor(kOp, "the result", {batch, p.outputs, height, width},
                                                            images[0].scalar_type(), images[0],
                                                            torch::headeronly::MemoryFormat::ChannelsLast));
    if (out.numel() == 0) return out;

    constexpr bool kHalf = std::is_same_v<T, BFloat16>;
    const bool pairs = kHalf && active_bf16();
    const auto packed = packed_weight(weight, p, channels, pairs);
    p.weight = packed.data(), p.bias = biases.data(), p.slope = slopes.data();
    p.out = view_of(out, out.mutable_data_ptr<T>());
    bool whole = is_one_run(p.out, batch, height, width);
    if (p.adds) whole &= is_one_run(p.residual, batch, height, width);
    for (const View<const T>& view : p.images) whole &= is_one_run(view, batch, height, width);
    const int64_t rows = whole ? 1 : height, length = whole ? batch * height * width : width;
    const int64_t blocks = (length + kBlock - 1) / kBlock, runs = whole ? 1 : batch * height;
    const auto run_block = active_block();
    const auto run_item = [&](int64_t item) {
        const int64_t number = item / blocks, at = item % blocks * kBlock, last = std::min(at + kBlock, length);
        const Run run{number / rows, number % rows, length};
        if constexpr (!kHalf) {
            run_block(p, run, at, last);
        } else if (!pairs) {
            run_widened(run_block, p, run, at, last);
        } else {
#if FASTROUTE_X86
            half::run_block(p, run, at, last);
#endif
        }
    };
    const int64_t items = runs * blocks, grain = grain_for(kBlock * (channels + p.outputs) * 4);
    const int64_t parts = (items + grain - 1) / grain;
    in_turn(parts, [&](const auto& next) {
        for (int64_t part = next(); part < parts; part = next()) {
            for (int64_t item = part * grain; item < std::min((part + 1) * grain, items); ++item) run_item(item);
        }
    });
    return out;
}

Tensor by_type(const std::vector<Tensor>& images,      // [B, C, H, W] each
               const Tensor& weight,                   // [O, C of all images]
               const std::optional<Tensor>& bias,      // [O]
               const std::optional<Tensor>& slope,     // [O]
               const std::optional<Tensor>& residual,  // [B, O, H, W]
               const std::optional<Tensor>& out) {     // [B, O, H, W]
    FASTROUTE_CHECK(!images.empty(), kOp, ": images must hold at least one");
    switch (images[0].scalar_type()) {
        case ScalarType::Float: return convolved<float>(images, weight, bias, slope, residual, out);
        case ScalarType::BFloat16: return convolved<BFloat16>(images, weight, bias, slope, residual, out);
        default: fail(kOp, ": the images must be float32 or bfloat16");
    }
}

Tensor conv1x1(const std::vector<Tensor>& images,        // [B, C, H, W] each
               const Tensor& weight,                     // [O, C of all images]
               const std::optional<Tensor>& bias,        // [O]
               const std::optional<Tensor>& slope,       // [O]
               const std::optional<Tensor>& residual) {  // [B, O, H, W]
    return by_type(images, weight, bias, slope, residual, std::nullopt);
}

void conv1x1_out(const std::vector<Tensor>& images,      // [B, C, H, W] each
                 const Tensor& weight,                   // [O, C of all images]
                 const std::optional<Tensor>& bias,      // [O]
                 const std::optional<Tensor>& slope,     // [O]
                 const std::optional<Tensor>& residual,  // [B, O, H, W]
                 const Tensor& out) {                    // [B, O, H, W]
    by_type(images, weight, bias, slope, residual, out);
}

}  // namespace
}  // namespace fastroute::conv1x1

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "conv1x1", conv1x1::conv1x1);
    FASTROUTE_IMPL(m, "conv1x1.out", conv1x1::conv1x1_out);
}

}  // namespace fastroute
