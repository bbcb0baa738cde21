// extract_patches: out[m, c, k, l] = (image[b, c, y0 + k, x0 + l] / maximum - mean[c]) / std[c] for the patch order[m]
// of image b at (y0, x0), reads clamped to the image; k and l run over a patch, or over the region that begins with it.
// One patch is one item of work.
#include "common/extract_patches.h"

#include <algorithm>
#include <vector>

#include "cpu/extract_patches/backward.h"
#include "cpu/extract_patches/patch.h"

namespace fastroute {
namespace {

template <typename W>
std::vector<W> statistic(const std::optional<Tensor>& values) {
    std::vector<W> result;
    if (!values.has_value()) return result;
    const Tensor dense = torch::stable::contiguous(*values);
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        const T* data = dense.const_data_ptr<T>();
        for (int64_t c = 0; c < dense.size(0); ++c) result.push_back(static_cast<W>(data[c]));
    });
    return result;
}

// What becomes of each of 256 pixels in each channel.
template <typename In, typename Out>
std::vector<Out> table_of(const Convert<In, Out>& convert, int64_t channels) {
    std::vector<Out> table;
    for (int64_t c = 0; c < channels; ++c) {
        for (int pixel = 0; pixel < 256; ++pixel) table.push_back(convert.compute(static_cast<In>(pixel), c));
    }
    return table;
}

void check_on_device(const Extraction& call) {
    check_cpu(kOp, "image", call.image);
    const Selection& selected = call.selected;
    if (selected.order.has_value()) {
        check_in_range(kOp, "order", selected.numbers(), selected.count, selected.patches);
    }
}

template <typename In, typename Out>
void run_extract_patches(const Extraction& call, const Tensor& out) {
    using W = typename Convert<In, Out>::W;
    const int64_t channels = call.image.size(1);
    std::vector<W> means = statistic<W>(call.mean);
    const std::vector<W> stds = statistic<W>(call.std);
    // Subtracting 0 changes no bit.
    if (means.empty() && !stds.empty()) means.resize(channels, 0);
    Task<In, Out> task{
        .images = call.image.const_data_ptr<In>(),
        .from = Layout(call.image),
        .to = Layout(out),
        .channels = channels,
        .image = {call.image.size(2), call.image.size(3)},
        .size = {call.rows, call.cols},
        .convert = {.mean = means.empty() ? nullptr : means.data(), .std = stds.empty() ? nullptr : stds.data()}};
    std::vector<Out> table;
    if constexpr (std::is_same_v<In, uint8_t> && !std::is_same_v<In, Out>) {
        table = table_of(task.convert, task.channels);
        task.convert.table = table.data();
    }
    const Geometry& geometry = call.selected.geometry;
    const int64_t tiles = geometry.num_patches(), tile_cols = geometry.x.count();
    const int64_t* number = call.selected.numbers();
    const auto place_of = [&](int64_t m) -> Place {
        const int64_t n = number == nullptr ? m : number[m], tile = n % tiles;
        return {n / tiles, geometry.y.origin(tile / tile_cols), geometry.x.origin(tile % tile_cols)};
    };
    const auto inside = [&](Place at) {
        return at.y + task.size.y <= task.image.y && at.x + task.size.x <= task.image.x;
    };
    const bool copies = means.empty() && task.from.x == 1 && task.to.x == 1;
    Out* const result = out.mutable_data_ptr<Out>();
    const int64_t bytes = task.channels * call.rows * call.cols * static_cast<int64_t>(sizeof(In) + sizeof(Out));
    parallel(call.selected.count, grain_for(bytes), [&](int64_t begin, int64_t end) {
        if constexpr (std::is_same_v<In, Out>) {
            while (copies && begin < end && inside(place_of(begin))) {
                // The patch after the next: the next one's pixels are on their way.
                const Place ahead = place_of(std::min(begin + 2, end - 1));
                run_isa<CopyBody<In>>(task, place_of(begin), ahead, result + begin * task.to.n);
                ++begin;
            }
        }
        for (int64_t m = begin; m < end; ++m) {
            run_isa<ExtractBody<In, Out>, kPrecise<In, Out>>(task, place_of(m), place_of(std::min(m + 1, end - 1)),
                                                             result + m * task.to.n);
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "extract_patches", extract_patches);
    FASTROUTE_IMPL(m, "_extract_patches_backward", _extract_patches_backward);
}

}  // namespace fastroute
