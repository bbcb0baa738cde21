// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. Its kernel is in stitch_patches_forward.cuh. A patch in a region
// is read where a table says, which a kernel before makes. The adjoint takes one thread per pixel of a patch.
#include "common/stitch_patches.h"

#include "cuda/counting_sort.cuh"
#include "cuda/stitch_patches_forward.cuh"

namespace fastroute {
namespace {

void check_on_device(const Stitching& call) {
    // Leaves room for the end of a block beyond the image, and for a tile that a small image does not fill.
    constexpr int64_t most = kMaxBlocks / 2;
    const Geometry& geometry = call.geometry;
    FASTROUTE_CHECK(geometry.out_height() <= most && geometry.out_width() <= most && geometry.span() <= most, kOp,
                    ": the image must be below 2^30 pixels wide");
    FASTROUTE_CHECK(call.target.batch == 0 || call.target.count > 0, kOp,
                    ": patches must hold at least one row where inverse is not empty");
}

// Where every row of several tensors lies; nothing for one tensor.
std::optional<Tensor> row_table(const Queue& queue, const Batches& batches, int64_t count) {
    if (batches.size() == 1) return std::nullopt;
    const int64_t size[] = {count};
    const Tensor table = torch::stable::empty({size, 1}, ScalarType::Long, std::nullopt, batches.front().device());
    int64_t first = 0;
    for (size_t begin = 0; begin < batches.size(); begin += kBatches) {
        BatchList list{};
        int64_t rows = 0;
        for (size_t b = begin; b < std::min(batches.size(), begin + kBatches); ++b) {
            const Tensor& batch = batches[b];
            rows += batch.size(0);
            list.data[b - begin] = static_cast<const char*>(batch.const_data_ptr());
            list.end[b - begin] = rows;
            list.step[b - begin] = batch.stride(0) * static_cast<int64_t>(batch.element_size());
        }
        list.first = first;
        queue.launch(stitch_patches_rows_kernel, blocks_for(rows, kThreads), kThreads, 0, list, rows,
                     static_cast<const void**>(table.mutable_data_ptr()));
        first += rows;
    }
    return table;
}

// Where every patch is read within its region.
Tensor region_table(const Queue& queue, const Stitching& call) {
    const Batches& batches = call.batches;
    const Tensor &some = batches.front(), &inverse = *call.places.inverse, &region = *call.places.region;
    const int64_t patches = inverse.size(0), channels = some.size(1);
    const RegionFormat format{.channels = static_cast<int>(channels),
                              .bytes = static_cast<int>(some.element_size()),
                              .factor = static_cast<int>(call.geometry.scale / call.shuffle),
                              .planar = some.is_contiguous()};
    const int64_t bytes[] = {patches * static_cast<int64_t>(sizeof(RegionPlace))};
    const Tensor table = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, some.device());
    RegionList list{};
    for (size_t begin = 0; begin < batches.size(); begin += kBatches) {
        list.first += list.rows, list.rows = 0;
        for (size_t b = begin; b < std::min(batches.size(), begin + kBatches); ++b) {
            const Tensor& batch = batches[b];
            FASTROUTE_CHECK(channels * batch.size(2) * batch.size(3) < kMaxBlocks, kOp,
                            ": a region must have fewer than 2^31 elements");
            list.rows += batch.size(0);
            list.data[b - begin] = static_cast<const char*>(batch.const_data_ptr());
            list.end[b - begin] = list.rows;
            list.height[b - begin] = static_cast<int>(batch.size(2));
            list.width[b - begin] = static_cast<int>(batch.size(3));
        }
        queue.launch(stitch_patches_regions_kernel, blocks_for(patches, kThreads), kThreads, 0, list, format,
                     inverse.const_data_ptr<int64_t>(), region.const_data_ptr<int64_t>(), patches, call.target.count,
                     call.geometry, static_cast<RegionPlace*>(table.mutable_data_ptr()));
    }
    return table;
}

template <typename T>
void run_stitch_patches(const Stitching& call, const Tensor& out) {
    using W = Work<T>;
    if (out.numel() == 0) return;
    const Geometry& geometry = call.geometry;
    const Target& target = call.target;
    const Tensor& first = call.batches.front();
    const Queue queue(kOp, first);
    std::optional<Tensor> rows, regions;
    if (call.regions()) {
        regions = region_table(queue, call);
    } else {
        rows = row_table(queue, call.batches, target.count);
    }
    const bool one = !rows.has_value() && !regions.has_value();
    // Of regions it is the channels, or 1, whatever an axis of one pixel says.
    const int64_t pixel = !call.regions() ? first.stride(3) : first.is_contiguous() ? 1 : first.size(1);
    const int64_t bytes[] = {AxisTables<W>::bytes(geometry)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, first.device());
    const StitchPlan<T> plan{
        .patches = one ? first.const_data_ptr<T>() : nullptr,
        .rows = rows.has_value() ? static_cast<const void* const*>(rows->const_data_ptr()) : nullptr,
        .regions = regions.has_value() ? static_cast<const RegionPlace*>(regions->const_data_ptr()) : nullptr,
        .layout = {.n = first.stride(0),
                   .c = first.stride(1),
                   .y = first.stride(2),
                   .x = pixel,
                   .shuffle = static_cast<int>(call.shuffle)},
        .inverse = call.places.inverse.has_value() ? call.places.inverse->const_data_ptr<int64_t>() : nullptr,
        .count = target.count,
        .tables = make_tables<W>(queue, call.window, geometry, memory),
        .stride = static_cast<int>(geometry.y.stride),
        .last_y = static_cast<int>(geometry.y.last_origin()),
        .last_x = static_cast<int>(geometry.x.last_origin()),
        .tile_rows = static_cast<int>(geometry.y.count()),
        .tile_cols = static_cast<int>(geometry.x.count()),
        .scale = static_cast<int>(geometry.scale),
        .span = static_cast<int>(geometry.span()),
        .row_begin = static_cast<int>(call.row_begin),
        .height = static_cast<int>(target.rows),
        .width = static_cast<int>(target.width),
        .channels = target.channels,
        .image_step = out.stride(0),
        .channel_step = out.stride(1),
        .row_step = out.stride(2)};
    const int64_t total = target.batch * target.channels * blocks_for(target.rows, kBlockRows<T>) *
                          blocks_for(target.width, 32 * kPack<T>);
    dispatch_image(kOp, out.scalar_type(), [&](auto zero) {
        using Out = decltype(zero);
        const auto kernel =
            regions.has_value() ? stitch_patches_kernel<T, Out, true> : stitch_patches_kernel<T, Out, false>;
        queue.launch(kernel, total, kThreads, 0, plan, total, out.mutable_data_ptr<Out>());
    });
}

// The adjoint: patch pixel (k, l) reads the gradient of its output pixel times wy[k] and then wx[l]; a row that several
// patches were read from sums theirs. One thread per pixel of a patch.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    _stitch_patches_backward_kernel(const T* __restrict__ grad,           // [B, C, H·s, W·s]
                                    const int64_t* __restrict__ start,    // [M + 1] or null: row m is patch m
                                    const int64_t* __restrict__ numbers,  // [N] by row, or null
                                    AxisTables<Work<T>> tables, Geometry geometry, int64_t channels, int64_t total,
                                    T* __restrict__ out) {  // [M, C, P, P]
    using W = Work<T>;
    const int64_t span = geometry.span(), cols = geometry.x.count(), tiles = geometry.y.count() * cols;
    const int64_t scale = geometry.scale, height = geometry.out_height(), width = geometry.out_width();
    for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < total; at += int64_t{gridDim.x} * kThreads) {
        const int64_t l = at % span, k = at / span % span, c = at / span / span % channels;
        const int64_t m = at / span / span / channels;
        W sum = W(0);
        for (int64_t s = start == nullptr ? m : start[m]; s < (start == nullptr ? m + 1 : start[m + 1]); ++s) {
            const int64_t n = numbers == nullptr ? s : numbers[s], i = n % tiles / cols, j = n % cols;
            const int64_t y = geometry.y.origin(i) * scale + k, x = geometry.x.origin(j) * scale + l;
            if (y >= height || x >= width) continue;
            const W value = static_cast<W>(grad[((n / tiles * channels + c) * height + y) * width + x]);
            sum = add(sum, multiply(multiply(value, tables.weights_y[i * span + k]), tables.weights_x[j * span + l]));
        }
        out[at] = static_cast<T>(sum);
    }
}

// A device's indices are not looked at: the sort moves them into range.
void check_on_device(const StitchingBackward&) {}

template <typename T>
void run_stitch_patches_backward(const StitchingBackward& call, const Tensor& out) {
    using W = Work<T>;
    const Tensor& grad = call.grad;
    const Geometry& geometry = call.geometry;
    const Queue queue(kOp, grad);
    // Patch numbers by row of `patches`: a row may hold several patches, or none.
    std::optional<Tensor> start, numbers;
    if (call.inverse.has_value()) {
        const int64_t count = call.inverse->size(0), items[] = {count}, bounds[] = {call.num_patches + 1};
        start = torch::stable::empty({bounds, 1}, ScalarType::Long, std::nullopt, grad.device());
        numbers = torch::stable::empty({items, 1}, ScalarType::Long, std::nullopt, grad.device());
        counting_sort(queue, grad, call.inverse->const_data_ptr<int64_t>(), count, call.num_patches,
                      numbers->mutable_data_ptr<int64_t>(), static_cast<int64_t*>(nullptr),
                      start->mutable_data_ptr<int64_t>());
    }
    const int64_t bytes[] = {AxisTables<W>::bytes(geometry)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, grad.device());
    const AxisTables<W> tables = make_tables<W>(queue, call.window, geometry, memory);
    const int64_t* none = nullptr;
    queue.launch(_stitch_patches_backward_kernel<T>, blocks_for(out.numel(), kThreads), kThreads, 0,
                 grad.const_data_ptr<T>(), start.has_value() ? start->const_data_ptr<int64_t>() : none,
                 numbers.has_value() ? numbers->const_data_ptr<int64_t>() : none, tables, geometry, out.size(1),
                 out.numel(), out.mutable_data_ptr<T>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "stitch_patches", stitch_patches);
    FASTROUTE_IMPL(m, "stitch_patches.out", stitch_patches_out);
    FASTROUTE_IMPL(m, "stitch_patches.batches_out", stitch_batches_out);
    FASTROUTE_IMPL(m, "_stitch_patches_backward", _stitch_patches_backward);
}

}  // namespace fastroute
