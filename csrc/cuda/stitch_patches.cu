// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. Its kernel is in stitch_patches_forward.cuh. A patch in a region
// is read where a table says, which a kernel before makes.
#include "cuda/counting_sort.cuh"
#include "cuda/stitch_patches_forward.cuh"

namespace fastroute {
namespace {

// What the kernel cannot do, beside what no kernel of stitch_patches can.
void check_limits(const Target& target, const TileGrid& grid, int64_t scale) {
    // Leaves room for the end of a block beyond the image, and for a tile that a small image does not fill.
    constexpr int64_t most = kMaxBlocks / 2;
    const int64_t height = grid.y.covered() * scale, span = grid.y.patch * scale;
    FASTROUTE_CHECK(height <= most && target.width <= most && span <= most, kOp,
                    ": the image must be below 2^30 pixels wide");
    FASTROUTE_CHECK(target.batch == 0 || target.count > 0, kOp,
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
Tensor region_table(const Queue& queue, const Batches& batches, const Tensor& inverse, const Tensor& region,
                    const TileGrid& grid, int64_t scale, int64_t shuffle, int64_t count) {
    const Tensor& some = batches.front();
    const int64_t patches = inverse.size(0), channels = some.size(1);
    const RegionFormat format{static_cast<int>(channels), static_cast<int>(some.element_size()),
                              static_cast<int>(scale / shuffle), some.is_contiguous()};
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
                     inverse.const_data_ptr<int64_t>(), region.const_data_ptr<int64_t>(), patches, count, grid,
                     static_cast<RegionPlace*>(table.mutable_data_ptr()));
    }
    return table;
}

void stitch_into(const Tensor& out, const Batches& batches, const std::optional<Tensor>& inverse,
                 const std::optional<Tensor>& region, const Tensor& window, const TileGrid& grid, int64_t scale,
                 int64_t shuffle, int64_t row_begin, const Target& target) {
    const Tensor& first = batches.front();
    check_same_device(kOp, "window", window, first);
    if (target.batch * target.channels * target.rows * target.width == 0) return;
    const Queue queue(kOp, first);
    const Tensor dense_window = torch::stable::contiguous(window);
    std::optional<Tensor> rows, regions;
    if (region.has_value()) {
        regions = region_table(queue, batches, *inverse, *region, grid, scale, shuffle, target.count);
    } else {
        rows = row_table(queue, batches, target.count);
    }
    const bool one = !rows.has_value() && !regions.has_value();
    // Of regions it is the channels, or 1, whatever an axis of one pixel says.
    const int64_t pixel = !regions.has_value() ? first.stride(3) : first.is_contiguous() ? 1 : first.size(1);
    dispatch_floating(kOp, first.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const int64_t bytes[] = {AxisTables<W>::bytes(grid, grid.y.patch * scale)};
        const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, first.device());
        const StitchPlan<T> plan{
            one ? first.const_data_ptr<T>() : nullptr,
            rows.has_value() ? static_cast<const void* const*>(rows->const_data_ptr()) : nullptr,
            regions.has_value() ? static_cast<const RegionPlace*>(regions->const_data_ptr()) : nullptr,
            {first.stride(0), first.stride(1), first.stride(2), pixel, static_cast<int>(shuffle)},
            inverse.has_value() ? inverse->const_data_ptr<int64_t>() : nullptr,
            target.count,
            make_tables<W>(queue, dense_window, grid, scale, memory),
            static_cast<int>(grid.y.stride),
            static_cast<int>(grid.y.last_origin()),
            static_cast<int>(grid.x.last_origin()),
            static_cast<int>(grid.y.count()),
            static_cast<int>(grid.x.count()),
            static_cast<int>(scale),
            static_cast<int>(grid.y.patch * scale),
            static_cast<int>(row_begin),
            static_cast<int>(target.rows),
            static_cast<int>(target.width),
            target.channels,
            out.stride(0),
            out.stride(1),
            out.stride(2)};
        const int64_t total = target.batch * target.channels * blocks_for(target.rows, kBlockRows<T>) *
                              blocks_for(target.width, 32 * kPack<T>);
        dispatch_image(kOp, out.scalar_type(), [&](auto out_zero) {
            using Out = decltype(out_zero);
            const auto kernel =
                regions.has_value() ? stitch_patches_kernel<T, Out, true> : stitch_patches_kernel<T, Out, false>;
            queue.launch(kernel, total, kThreads, 0, plan, total, out.mutable_data_ptr<Out>());
        });
    });
}

Tensor stitch_patches_cuda(const Tensor& patches,                 // [M, C·r·r, P / r, P / r]
                           const std::optional<Tensor>& inverse,  // [N]
                           const Tensor& window,                  // [P]
                           int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                           int64_t shuffle, std::optional<ScalarType> dtype, int64_t row_begin, int64_t row_end) {
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const std::optional<Tensor> places = checked_index(kOp, "inverse", inverse, patches);
    const Target target = checked_target({patches}, places, grid, scale, shuffle, row_begin, row_end);
    check_limits(target, grid, scale);
    const Tensor out = empty_tensor(kOp, "the image", {target.batch, target.channels, target.rows, target.width},
                                    dtype.value_or(patches.scalar_type()), patches);
    stitch_into(out, {patches}, places, std::nullopt, window, grid, scale, shuffle, row_begin, target);
    return out;
}

void stitch_batches_out_cuda(const Batches& batches,                // [M_i, C·r·r, P / r, P / r] each, or regions
                             const std::optional<Tensor>& inverse,  // [N]
                             const std::optional<Tensor>& region,   // [N]
                             const Tensor& window,                  // [P]
                             int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                             int64_t shuffle, int64_t row_begin, int64_t row_end,
                             const Tensor& out) {  // [B, C, rows, W·s]
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const Places places = checked_places(inverse, region, out);
    const Target target =
        checked_target(batches, places.inverse, grid, scale, shuffle, row_begin, row_end, 0, region.has_value());
    check_limits(target, grid, scale);
    check_stitch_out(target, batches, places.read(), out);
    stitch_into(out, batches, places.inverse, places.region, window, grid, scale, shuffle, row_begin, target);
}

void stitch_patches_out_cuda(const Tensor& patches, const std::optional<Tensor>& inverse, const Tensor& window,
                             int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                             int64_t shuffle, int64_t row_begin, int64_t row_end, const Tensor& out) {
    stitch_batches_out_cuda({patches}, inverse, std::nullopt, window, height, width, patch, stride, scale, crop,
                            shuffle, row_begin, row_end, out);
}

// The adjoint: patch pixel (k, l) reads the gradient of its output pixel times wy[k] and then wx[l]; a row that several
// patches were read from sums theirs. One thread per pixel of a patch.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    _stitch_patches_backward_kernel(const T* __restrict__ grad,           // [B, C, H·s, W·s]
                                    const int64_t* __restrict__ start,    // [M + 1] or null: row m is patch m
                                    const int64_t* __restrict__ numbers,  // [N] by row, or null
                                    AxisTables<Work<T>> tables, TileGrid grid, int64_t scale, int64_t channels,
                                    int64_t total, T* __restrict__ out) {  // [M, C, P, P]
    using W = Work<T>;
    const int64_t span = grid.y.patch * scale, cols = grid.x.count(), tiles = grid.y.count() * cols;
    const int64_t height = grid.y.covered() * scale, width = grid.x.covered() * scale;
    for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < total; at += int64_t{gridDim.x} * kThreads) {
        const int64_t l = at % span, k = at / span % span, c = at / span / span % channels;
        const int64_t m = at / span / span / channels;
        W sum = W(0);
        for (int64_t s = start == nullptr ? m : start[m]; s < (start == nullptr ? m + 1 : start[m + 1]); ++s) {
            const int64_t n = numbers == nullptr ? s : numbers[s], i = n % tiles / cols, j = n % cols;
            const int64_t y = grid.y.origin(i) * scale + k, x = grid.x.origin(j) * scale + l;
            if (y >= height || x >= width) continue;
            const W value = static_cast<W>(grad[((n / tiles * channels + c) * height + y) * width + x]);
            sum = add(sum, multiply(multiply(value, tables.weights_y[i * span + k]), tables.weights_x[j * span + l]));
        }
        out[at] = static_cast<T>(sum);
    }
}

Tensor _stitch_patches_backward_cuda(const Tensor& grad,                    // [B, C, H·s, W·s]
                                     const std::optional<Tensor>& inverse,  // [N]
                                     const Tensor& window,                  // [P]
                                     int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale,
                                     bool crop, int64_t num_patches) {
    check_same_device(kOp, "window", window, grad);
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const std::optional<Tensor> places = checked_places(grad, inverse, grid, scale, num_patches);
    const int64_t span = patch * scale, count = grad.size(0) * grid.num_patches(), channels = grad.size(1);
    const Tensor dense = torch::stable::contiguous(grad), dense_window = torch::stable::contiguous(window);
    const int64_t items[] = {count}, bounds[] = {num_patches + 1};
    const Tensor out = empty_tensor(kOp, "the gradient", {num_patches, channels, span, span}, grad.scalar_type(), grad);
    if (out.numel() == 0) return out;
    const Queue queue(kOp, grad);
    // Patch numbers by row of `patches`: a row may hold several patches, or none.
    std::optional<Tensor> start, numbers;
    if (places.has_value()) {
        start = torch::stable::empty({bounds, 1}, ScalarType::Long, std::nullopt, grad.device());
        numbers = torch::stable::empty({items, 1}, ScalarType::Long, std::nullopt, grad.device());
        counting_sort(queue, grad, places->const_data_ptr<int64_t>(), count, num_patches,
                      numbers->mutable_data_ptr<int64_t>(), static_cast<int64_t*>(nullptr),
                      start->mutable_data_ptr<int64_t>());
    }
    dispatch_floating(kOp, grad.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const int64_t bytes[] = {AxisTables<W>::bytes(grid, span)};
        const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, grad.device());
        const AxisTables<W> tables = make_tables<W>(queue, dense_window, grid, scale, memory);
        const int64_t* none = nullptr;
        queue.launch(_stitch_patches_backward_kernel<T>, blocks_for(out.numel(), kThreads), kThreads, 0,
                     dense.template const_data_ptr<T>(), start.has_value() ? start->const_data_ptr<int64_t>() : none,
                     numbers.has_value() ? numbers->const_data_ptr<int64_t>() : none, tables, grid, scale, channels,
                     out.numel(), out.mutable_data_ptr<T>());
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "stitch_patches", stitch_patches_cuda);
    FASTROUTE_IMPL(m, "stitch_patches.out", stitch_patches_out_cuda);
    FASTROUTE_IMPL(m, "stitch_patches.batches_out", stitch_batches_out_cuda);
    FASTROUTE_IMPL(m, "_stitch_patches_backward", _stitch_patches_backward_cuda);
}

}  // namespace fastroute
