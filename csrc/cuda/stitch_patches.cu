// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. One kernel makes tables, among them where every patch lies; one
// copies what a single tile makes, and one blends the rest. The adjoint takes one thread per pixel of a patch.
#include "common/stitch_patches.h"

#include "cuda/counting_sort.cuh"
#include "cuda/stitch_patches_blend.cuh"
#include "cuda/stitch_patches_copy.cuh"

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
    const Tensor& first = call.batches.front();
    FASTROUTE_CHECK(first.stride(1) < kMaxBlocks && first.stride(2) < kMaxBlocks, kOp,
                    ": strides of a patch must be below 2^31; give .contiguous() patches");
}

// The tables of a call, made by one launch for every `kBatches` tensors.
template <typename W>
struct Tables {
    Tensor places, memory;
    AxisTables<W> axes;
};

template <typename W>
Tables<W> make_tables(const Queue& queue, const Stitching& call, int pack) {
    const Batches& batches = call.batches;
    const Geometry& geometry = call.geometry;
    const Tensor& first = batches.front();
    const std::optional<Tensor>&inverse = call.places.inverse, &region = call.places.region;
    const PlaceFormat format{.n = first.stride(0) * static_cast<int64_t>(first.element_size()),
                             .c = static_cast<int>(first.stride(1)),
                             .y = static_cast<int>(first.stride(2)),
                             .channels = static_cast<int>(first.size(1)),
                             .bytes = static_cast<int>(first.element_size()),
                             .factor = static_cast<int>(geometry.scale / call.shuffle),
                             .planar = first.is_contiguous()};
    const int64_t patches = call.target.batch * geometry.num_patches();
    const int64_t place_bytes[] = {patches * static_cast<int64_t>(sizeof(Place))};
    const int64_t axis_bytes[] = {AxisTables<W>::bytes(geometry, pack)};
    const Tensor places = torch::stable::empty({place_bytes, 1}, ScalarType::Byte, std::nullopt, first.device());
    const Tensor memory = torch::stable::empty({axis_bytes, 1}, ScalarType::Byte, std::nullopt, first.device());
    const AxisTables<W> axes(memory.mutable_data_ptr(), geometry, pack);
    const W* window = checked_window<W>(call.window, geometry.span());
    PlaceList list{};
    for (size_t begin = 0; begin < batches.size(); begin += kBatches) {
        list.first += list.rows, list.rows = 0;
        for (size_t b = begin; b < std::min(batches.size(), begin + kBatches); ++b) {
            const Tensor& batch = batches[b];
            FASTROUTE_CHECK(!call.regions() || batch.size(1) * batch.size(2) * batch.size(3) < kMaxBlocks, kOp,
                            ": a region must have fewer than 2^31 elements");
            list.rows += batch.size(0);
            list.data[b - begin] = static_cast<const char*>(batch.const_data_ptr());
            list.end[b - begin] = list.rows;
            list.height[b - begin] = static_cast<int>(batch.size(2));
            list.width[b - begin] = static_cast<int>(batch.size(3));
        }
        const int64_t items = (begin == 0 ? axes.entries(geometry) : 0) + patches;
        queue.launch(stitch_patches_tables_kernel<W>, blocks_for(items, kThreads), kThreads, 0,
                     begin == 0 ? window : nullptr, geometry, axes, list, format,
                     inverse.has_value() ? inverse->const_data_ptr<int64_t>() : nullptr,
                     region.has_value() ? region->const_data_ptr<int64_t>() : nullptr, patches, call.target.count,
                     static_cast<Place*>(places.mutable_data_ptr()));
    }
    return {places, memory, axes};
}

// Whether packs of `out` begin at multiples of 16 bytes, and an index of 32 bits counts them.
template <typename Out>
bool is_aligned(const Tensor& out) {
    bool aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0;
    int64_t last = 0;
    for (int d = 0; d < 3; ++d) {
        aligned &= out.stride(d) % kPack<Out> == 0 || out.size(d) == 1;
        last += out.stride(d) * (out.size(d) - 1);
    }
    return aligned && last / kPack<Out> < kMaxBlocks;
}

// How pixels of `call` are copied: in vectors where all that a pack reads begins at multiples of 16 bytes.
template <typename T, typename Out>
CopyLayout copy_layout(const Stitching& call, int64_t pixel, const Tensor& out) {
    constexpr int V = kPack<T>, N = kPack<Out>;
    const Geometry& geometry = call.geometry;
    const Tensor& first = call.batches.front();
    bool aligned = call.target.channels == kCopied && is_aligned<Out>(out);
    for (const Tensor& batch : call.batches) {
        aligned &= reinterpret_cast<uintptr_t>(batch.const_data_ptr()) % 16 == 0;
        aligned &= !call.regions() || pixel > 1 || batch.size(3) % V == 0;
    }
    const auto in_vectors = [](int64_t elements) { return elements % V == 0; };
    if (!call.regions()) {
        aligned &= in_vectors(first.stride(0)) && in_vectors(first.stride(2));
    }
    if (!aligned) return CopyLayout::any;
    const int64_t side = geometry.scale * geometry.x.stride, last = geometry.scale * geometry.x.last_origin();
    if (call.shuffle == 1 && pixel == 1 && in_vectors(first.stride(1)) && first.stride(1) < kMaxBlocks &&
        in_vectors(side) && in_vectors(last) && in_vectors(geometry.span())) {
        return CopyLayout::rows;
    }
    const bool values = call.shuffle == 4 && pixel == kCopied * 16 && (call.regions() || first.stride(1) == 1);
    return values && geometry.scale % 4 == 0 && N % 4 == 0 ? CopyLayout::shuffled : CopyLayout::any;
}

// Copies, of a layout that `copy_layout` finds.
template <typename T, typename Out, CopyLayout kLayout>
void run_copies(const Queue& queue, const StitchPlan<Work<T>>& plan, int64_t batch, const Tensor& out) {
    CopyRows rows{.at = {},
                  .image = static_cast<unsigned>(plan.image_step / kPack<Out>),
                  .row = static_cast<unsigned>(plan.row_step / kPack<Out>)};
    for (int at = 0; kLayout != CopyLayout::any && at < kCopied * kGroup; ++at) {
        const int64_t first = at / kGroup * plan.channel_step + at % kGroup * plan.row_step;
        rows.at[at] = reinterpret_cast<uint4*>(out.mutable_data_ptr<Out>() + first);
    }
    const int64_t groups = std::max(plan.end_group() - plan.first_group(), 0);
    const int64_t blocks = batch * blocks_for(groups, kRun * (kCopyThreads / 32)) *
                           blocks_for(plan.tables.packs, 32 * kWide<T, Out, kLayout>);
    FASTROUTE_CHECK(blocks <= kMaxBlocks, kOp, ": the images are too large for one call; give fewer of them");
    queue.launch(stitch_patches_copy_kernel<T, Out, kLayout>, blocks, kCopyThreads, 0, plan, rows,
                 out.mutable_data_ptr<Out>());
}

template <typename T>
void run_stitch_patches(const Stitching& call, const Tensor& out) {
    using W = Work<T>;
    if (out.numel() == 0) return;
    const Geometry& geometry = call.geometry;
    const Target& target = call.target;
    const Tensor& first = call.batches.front();
    const Queue queue(kOp, first);
    const Tables<W> tables = make_tables<W>(queue, call, 16 / static_cast<int>(out.element_size()));
    const StitchPlan<W> plan{.places = static_cast<const Place*>(tables.places.const_data_ptr()),
                             // Of regions it is the channels, or 1, whatever an axis of one pixel says.
                             .x = !call.regions()         ? first.stride(3)
                                  : first.is_contiguous() ? 1
                                                          : first.size(1),
                             .shuffle = static_cast<int>(call.shuffle),
                             .tables = tables.axes,
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
    dispatch_image(kOp, out.scalar_type(), [&](auto zero) {
        using Out = decltype(zero);
        // Results that are wider than the patches, or round to another half type, are not worth kernels of their own.
        constexpr bool vectors = !kPrecise<T, Out> && (std::is_same_v<T, Out> || std::is_integral_v<Out>);
        CopyLayout layout = CopyLayout::any;
        if constexpr (vectors) {
            layout = copy_layout<T, Out>(call, plan.x, out);
            if (layout == CopyLayout::rows) run_copies<T, Out, CopyLayout::rows>(queue, plan, target.batch, out);
            if (layout == CopyLayout::shuffled) {
                run_copies<T, Out, CopyLayout::shuffled>(queue, plan, target.batch, out);
            }
        }
        if (layout == CopyLayout::any) run_copies<T, Out, CopyLayout::any>(queue, plan, target.batch, out);
        const int64_t total =
            target.batch * blocks_for(target.rows, kBlendRows) * blocks_for(target.width, 32 * kPiece<T, Out>);
        queue.launch(stitch_patches_blend_kernel<T, Out>, total, kThreads, 0, plan, total, out.mutable_data_ptr<Out>());
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
    const int64_t bytes[] = {AxisTables<W>::bytes(geometry, 0)};
    const Tensor memory = torch::stable::empty({bytes, 1}, ScalarType::Byte, std::nullopt, grad.device());
    const AxisTables<W> tables(memory.mutable_data_ptr(), geometry, 0);
    queue.launch(stitch_patches_tables_kernel<W>, blocks_for(tables.entries(geometry), kThreads), kThreads, 0,
                 checked_window<W>(call.window, geometry.span()), geometry, tables, PlaceList{}, PlaceFormat{},
                 static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(nullptr), 0, 0,
                 static_cast<Place*>(nullptr));
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
