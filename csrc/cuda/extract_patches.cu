// extract_patches: out[m, c, k, l] = (image[b, c, y0 + k, x0 + l] / maximum - mean[c]) / std[c] for the patch order[m]
// of image b at (y0, x0), or the region that begins with it, reads clamped to the image. A patch is a sequence of rows,
// runs in memory: the pixels of one row of a channel, or all channels of them in channels_last. A block writes some
// rows of one patch, a thread 16 bytes of them at a time where the image has them side by side too, and one element
// otherwise.
#include "common/extract_patches.h"

#include "cuda/counting_sort.cuh"
#include "cuda/extract_patches.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
// Blocks of a multiprocessor that the registers allow.
template <typename In>
constexpr int kBlocks = sizeof(In) == 8 ? 3 : 4;
constexpr int kPacks = 4;  // of one thread: enough to pay for finding the patch

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads, kBlocks<In>)
    extract_patches_kernel(const In* __restrict__ images,  // [B, C, H, W]
                           ExtractPlan plan, int64_t total,
                           Out* __restrict__ out) {  // [M, C, rows, cols]
    constexpr int N = kPack<Out>;
    for (int64_t item = blockIdx.x; item < total; item += gridDim.x) {
        const int64_t m = item / plan.groups;
        const int first = static_cast<int>(item - m * plan.groups) * plan.group_rows;
        const int rows = plan.rows - first < plan.group_rows ? plan.rows - first : plan.group_rows;
        const Source<In, Out> source(plan, images, m);
        Out* target = out + (m * plan.rows + first) * plan.length;
        const int elements = rows * plan.length;
        if (!source.template has_runs<N>()) {
            // Every element is read on its own: neighbouring lanes then write neighbours.
#pragma unroll 1
            for (int at = static_cast<int>(threadIdx.x); at < elements; at += kThreads) {
                target[at] = source.element(first + at / plan.length, at % plan.length);
            }
            continue;
        }
        for (int at = static_cast<int>(threadIdx.x) * N; at < elements; at += kThreads * N) {
            const int row = at / plan.length, l = at - row * plan.length;
            if (l + N <= plan.length && source.template is_run<N>(l)) {
                store_pack<N>(target + at, source.template run<N>(first + row, l), N);
                continue;
            }
            // Clamped, or running on into the next rows.
#pragma unroll 1
            for (int e = at; e < elements && e < at + N; ++e) {
                target[e] = source.element(first + e / plan.length, e % plan.length);
            }
        }
    }
}

Statistic statistic_of(const std::optional<Tensor>& values) {
    if (!values.has_value()) return {nullptr, ScalarType::Float};
    dispatch_floating(kOp, values->scalar_type(), [](auto) {});
    return {values->const_data_ptr(), values->scalar_type()};
}

std::optional<Tensor> dense(const std::optional<Tensor>& x) {
    return x.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

void check_on_device(const Extraction& call) {
    const int64_t channels = call.image.size(1), side = std::max(call.rows, call.cols);
    FASTROUTE_CHECK(channels <= kMaxBlocks / side / 2, kOp, ": C * patch must be below 2^30; got ", channels, " * ",
                    side);
    FASTROUTE_CHECK(call.selected.count == 0 || call.selected.patches > 0, kOp,
                    ": order must be empty where there is no image");
}

template <typename In, typename Out>
void run_extract_patches(const Extraction& call, const Tensor& out) {
    const Tensor& image = call.image;
    const std::optional<Tensor> means = dense(call.mean), stds = dense(call.std);
    const int64_t channels = image.size(1);
    const int64_t lines = call.channels_last ? call.rows : channels * call.rows;
    const int64_t length = call.channels_last ? call.cols * channels : call.cols;
    const int64_t wanted = kThreads * kPacks * 16 / static_cast<int64_t>(sizeof(Out));
    const int64_t group_rows = std::clamp<int64_t>(wanted / length, 1, lines);
    const ExtractPlan plan{.image_step = image.stride(0),
                           .c_step = image.stride(1),
                           .y_step = image.stride(2),
                           .x_step = image.stride(3),
                           .geometry = call.selected.geometry,
                           .tiles = call.selected.geometry.num_patches(),
                           .cols = call.selected.geometry.x.count(),
                           .count = call.selected.patches,
                           .groups = blocks_for(lines, group_rows),
                           .order = call.selected.numbers(),
                           .channels = static_cast<int>(channels),
                           .height = static_cast<int>(call.rows),
                           .rows = static_cast<int>(lines),
                           .length = static_cast<int>(length),
                           .group_rows = static_cast<int>(group_rows),
                           .channels_last = call.channels_last,
                           .mean = statistic_of(means),
                           .std = statistic_of(stds)};
    const Queue queue(kOp, image);
    const int64_t total = call.selected.count * plan.groups;
    queue.launch(extract_patches_kernel<In, Out>, total, kThreads, 0, image.const_data_ptr<In>(), plan, total,
                 out.mutable_data_ptr<Out>());
}

// The adjoint: image pixel (y, x) sums the gradients of all patch pixels that read it, tile rows before tile columns,
// and of one patch columns before rows before repeats. One thread per pixel of the image.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    _extract_patches_backward_kernel(const T* __restrict__ grad,         // [M, C, p, p]
                                     const int64_t* __restrict__ start,  // [B · tiles + 1] or null: patch n is row n
                                     const int64_t* __restrict__ rows,   // [M] by patch number, or null
                                     Geometry geometry, int64_t channels, int64_t total,
                                     T* __restrict__ out) {  // [B, C, H, W]
    using W = Work<T>;
    const int64_t height = geometry.y.size, width = geometry.x.size, patch = geometry.x.patch,
                  cols = geometry.x.count();
    for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < total; at += int64_t{gridDim.x} * kThreads) {
        const int64_t x = at % width, y = at / width % height, c = at / width / height % channels;
        const int64_t image = at / width / height / channels;
        const TileRange range_y = geometry.y.covering(y), range_x = geometry.x.covering(x);
        W sum = W(0);
        for (int64_t i = range_y.first; i <= range_y.last; ++i) {
            const int64_t top = y - geometry.y.origin(i);
            if (top >= patch) continue;  // the remainder that "crop" drops
            // Patch rows below a small image read its last row, and columns its last column.
            const int64_t bottom = y == height - 1 && height < patch ? patch - 1 : top;
            for (int64_t j = range_x.first; j <= range_x.last; ++j) {
                const int64_t left = x - geometry.x.origin(j);
                if (left >= patch) continue;
                const int64_t right = x == width - 1 && width < patch ? patch - 1 : left;
                const int64_t n = (image * geometry.y.count() + i) * cols + j;
                const int64_t begin = start == nullptr ? n : start[n], end = start == nullptr ? n + 1 : start[n + 1];
                W folded = W(0);
                for (int64_t l = left; l <= right; ++l) {
                    W column = W(0);
                    for (int64_t k = top; k <= bottom; ++k) {
                        W repeated = W(0);
                        for (int64_t r = begin; r < end; ++r) {
                            const int64_t m = rows == nullptr ? r : rows[r];
                            repeated += static_cast<W>(grad[((m * channels + c) * patch + k) * patch + l]);
                        }
                        column += repeated;
                    }
                    folded += column;
                }
                sum += folded;
            }
        }
        out[at] = static_cast<T>(sum);
    }
}

// A device's indices are not looked at: the sort moves them into range.
void check_on_device(const ExtractionBackward&) {}

template <typename T>
void run_extract_patches_backward(const ExtractionBackward& call, const Tensor& out) {
    const Selection& selected = call.selected;
    const Queue queue(kOp, call.grad);
    // Rows of `grad` by patch number.
    std::optional<Tensor> start, rows;
    if (selected.order.has_value()) {
        const int64_t items[] = {selected.count}, bounds[] = {selected.patches + 1};
        start = torch::stable::empty({bounds, 1}, ScalarType::Long, std::nullopt, call.grad.device());
        rows = torch::stable::empty({items, 1}, ScalarType::Long, std::nullopt, call.grad.device());
        counting_sort(queue, call.grad, selected.numbers(), selected.count, selected.patches,
                      rows->mutable_data_ptr<int64_t>(), static_cast<int64_t*>(nullptr),
                      start->mutable_data_ptr<int64_t>());
    }
    const int64_t* none = nullptr;
    queue.launch(_extract_patches_backward_kernel<T>, blocks_for(out.numel(), kThreads), kThreads, 0,
                 call.grad.const_data_ptr<T>(), start.has_value() ? start->const_data_ptr<int64_t>() : none,
                 rows.has_value() ? rows->const_data_ptr<int64_t>() : none, selected.geometry, out.size(1), out.numel(),
                 out.mutable_data_ptr<T>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "extract_patches", extract_patches);
    FASTROUTE_IMPL(m, "_extract_patches_backward", _extract_patches_backward);
}

}  // namespace fastroute
