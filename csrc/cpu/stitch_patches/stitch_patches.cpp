// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. Some output rows of one channel are one item of work, or of all
// channels where the pixels of a patch hold them side by side: tile by tile they are summed in the first-level cache,
// and every output pixel is written once. Multiplications and additions are rounded one by one (no contraction), in one
// order, so the result has the same bits on every instruction set and thread count.
#include "common/stitch_patches.h"

#include <algorithm>
#include <vector>

#include "cpu/stitch_patches/backward.h"
#include "cpu/stitch_patches/items.h"
#include "cpu/stitch_patches/kinds.h"

namespace fastroute {
namespace {

// What tells where patches are held is checked when their table is made.
void check_on_device(const Stitching&) {}

template <typename T>
void run_stitch_patches(const Stitching& call, const Tensor& out) {
    stitch<T>(call, out);
}

// Only here: on other devices branches run whole.
void stitch_upsampled_out(const Batches& batches,  // [M_i, F, p, p] each
                          const std::vector<int64_t>& kinds,
                          const Batches& layers,                 // five per kind, see kinds.h
                          const std::optional<Tensor>& inverse,  // [N]
                          const std::optional<Tensor>& region,   // [N]
                          const Tensor& window,                  // [P]
                          int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                          int64_t shuffle, int64_t row_begin, int64_t row_end,
                          const Tensor& out,      // [B, C, rows, W·s]
                          const Tensor& spent) {  // [kinds + 1]
    Stitching call{.geometry = checked_geometry(kOp, height, width, patch, stride, scale, crop),
                   .shuffle = shuffle,
                   .row_begin = row_begin,
                   .row_end = row_end,
                   .batches = batches,
                   .places = checked_places(inverse, region, out),
                   .window = window};
    call.target = checked_kinds(call, kinds, layers, spent);
    check_stitch_out(call, out);
    check_written(kOp, "spent", spent, {out});
    check_same_device(kOp, "window", window, batches.front());
    call.window = torch::stable::contiguous(window);
    const std::vector<upsampler::Upsampler> packed = packed_upsamplers(layers, shuffle);
    int64_t widest = patch;
    for (size_t i = 0; i < batches.size(); ++i) {
        if (kinds[i] >= 0) widest = std::max(widest, batches[i].size(3));
    }
    const Upsampling upsampling{.kinds = packed.data(),
                                .number = static_cast<int64_t>(packed.size()),
                                .kind_of = kinds.data(),
                                .shuffle = shuffle,
                                .size = call.geometry.span() / shuffle,
                                .widest = widest};
    Spent measured;
    measured.ticks.resize(packed.size() + 1);
    stitch<float>(call, out, &upsampling, &measured);
    std::copy(measured.ticks.begin(), measured.ticks.end(), spent.mutable_data_ptr<double>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "stitch_patches", stitch_patches);
    FASTROUTE_IMPL(m, "stitch_patches.out", stitch_patches_out);
    FASTROUTE_IMPL(m, "stitch_patches.batches_out", stitch_batches_out);
    FASTROUTE_IMPL(m, "stitch_patches.upsampled_out", stitch_upsampled_out);
    FASTROUTE_IMPL(m, "_stitch_patches_backward", _stitch_patches_backward);
}

}  // namespace fastroute
