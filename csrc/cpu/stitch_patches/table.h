// What stitch_patches makes once per call: the weights of both axes, normalised over the tiles of a pixel, and a table
// of where every patch is held.
#pragma once

#include <algorithm>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches/plan.h"

namespace fastroute {
namespace {

// Normalised weights of every tile along one axis, [tiles, span]; 0 outside the image.
template <typename W>
std::vector<W> axis_weights(const W* window, const TileAxis& axis, int64_t scale) {
    const int64_t span = axis.patch * scale, length = axis.covered() * scale, tiles = axis.count();
    std::vector<W> total(std::max(length, span), W(0)), weights(tiles * span);
    for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t k = 0; k < span; ++k) total[axis.origin(i) * scale + k] += window[k];
    }
    for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t k = 0; k < span; ++k) {
            const int64_t at = axis.origin(i) * scale + k;
            if (at >= length)
                weights[i * span + k] = W(0);
            else
                weights[i * span + k] = total[at] == W(0) ? W(axis.owns_end(i, at, length)) : window[k] / total[at];
        }
    }
    return weights;
}

// Tile rows that the output rows of a call read.
TileRange read_rows(const Stitching& call) {
    const int64_t scale = call.geometry.scale;
    if (call.row_begin >= call.row_end) return {0, -1};
    return {call.geometry.y.covering(call.row_begin / scale).first,
            call.geometry.y.covering((call.row_end - 1) / scale).last};
}

// Every row of the batches, in which patches are looked up.
template <typename T>
std::vector<Held<T>> batch_rows(const Stitching& call, const Upsampling* upsampling) {
    std::vector<Held<T>> rows;
    // At once: an expanded tensor may have more rows than there is memory for.
    rows.reserve(call.target.count);
    for (size_t i = 0; i < call.batches.size(); ++i) {
        const Tensor& batch = call.batches[i];
        const T* data = batch.const_data_ptr<T>();
        for (int64_t m = 0; m < batch.size(0); ++m) {
            rows.push_back({.data = data + m * batch.stride(0),
                            .c = batch.stride(1),
                            .y = batch.stride(2),
                            .x = batch.stride(3),
                            .kind = upsampling != nullptr ? upsampling->kind_of[i] : -1,
                            .row = static_cast<int64_t>(rows.size()),
                            .down = 0,
                            .across = 0,
                            .height = batch.size(2),
                            .width = batch.size(3)});
        }
    }
    return rows;
}

// Moves `held`, a region, to patch `n` of it: tile `tile` of its image. The first patch of the region is `region`.
template <typename T>
void move_to_patch(const Stitching& call, bool upsampling, int64_t region, int64_t n, int64_t tile, Held<T>& held) {
    const Geometry& geometry = call.geometry;
    const int64_t corner = region - (n - tile), cols = geometry.x.count();
    if (corner < 0 || corner > tile) {
        fail(kOp, ": region must name a patch above or left of its patches, in their image; got ", region,
             " for patch ", n);
    }
    held.down = geometry.y.origin(tile / cols) - geometry.y.origin(corner / cols);
    held.across = geometry.x.origin(tile % cols) - geometry.x.origin(corner % cols);
    // Elements per LR pixel.
    const bool finished = upsampling && held.kind < 0;
    const int64_t factor = finished ? geometry.scale : geometry.scale / call.shuffle;
    const int64_t span = geometry.y.patch * factor;
    if (held.across < 0 || held.down * factor + span > held.height || held.across * factor + span > held.width) {
        fail(kOp, ": region ", region, " does not hold patch ", n, "; got ", held.height, " x ", held.width);
    }
    if (held.kind < 0) held.data += held.down * factor * held.y + held.across * factor * held.x;
}

// Where every patch of the tile rows `read` is held, [B, rows, cols]; places are checked.
template <typename T>
std::vector<Held<T>> held_patches(const Stitching& call, TileRange read, const Upsampling* upsampling) {
    const std::vector<Held<T>> rows = batch_rows<T>(call, upsampling);
    const auto numbers = [](const std::optional<Tensor>& x) {
        return x.has_value() ? x->const_data_ptr<int64_t>() : nullptr;
    };
    const int64_t *inverse = numbers(call.places.inverse), *region = numbers(call.places.region);
    const int64_t tiles = call.geometry.num_patches(), cols = call.geometry.x.count();
    const int64_t begin = read.first * cols, end = (read.last + 1) * cols;
    std::vector<Held<T>> table;
    table.reserve(call.target.batch * (end - begin));
    for (int64_t b = 0; b < call.target.batch; ++b) {
        if (inverse != nullptr && begin < end) {
            check_in_range(kOp, "inverse", inverse + b * tiles + begin, end - begin, call.target.count);
        }
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t n = b * tiles + tile;
            Held<T> held = rows[inverse == nullptr ? n : inverse[n]];
            if (region != nullptr) move_to_patch(call, upsampling != nullptr, region[n], n, tile, held);
            table.push_back(held);
        }
    }
    return table;
}

}  // namespace
}  // namespace fastroute
