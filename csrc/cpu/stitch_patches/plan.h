// What one call of `stitch_patches` works on: where patches lie and what they weigh, how much of the output an item of
// work is, and the buffers of a thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/geometry.h"
#include "cpu/memory.h"
#include "cpu/stitch_patches/pixel_run.h"
#include "cpu/stitch_patches/upsampler.h"
#include "cpu/stitch_patches/wide_runs.h"

namespace fastroute {
namespace {

constexpr int64_t kRows = 16;  // output rows per item of work: 16 rows of a 128-pixel patch are two 4 KiB pages

// Rows per item of work out of all there are, between `least` and `most`: items share what lies on their borders, so
// large ones are better, but threads need items enough to end together.
inline int64_t rows_per_item(int64_t rows, int64_t most, int64_t least) {
    const int64_t threads = torch::stable::get_num_threads();
    while (most > least && rows < 8 * threads * most) most /= 2;
    return most;
}

// Where the pixels of a patch lie: with a fused pixel shuffle of factor r, pixel (Y, X) of channel c is element (Y / r,
// X / r) of channel c·r² + (Y mod r)·r + X mod r.
struct PatchLayout {
    int64_t c, y, x;  // strides in elements
    int64_t shuffle;
};

// One row of one patch as a run of sums, in place when it already is one.
template <typename T>
FASTROUTE_INLINE const Work<T>* load_row(const T* patch, PatchLayout at, int64_t c, int64_t k, int64_t span,
                                         Work<T>* buffer) {
    using W = Work<T>;
    const int64_t r = at.shuffle;
    const T* row = patch + (c * r * r + k % r * r) * at.c + k / r * at.y;
    if constexpr (std::is_same_v<T, W>) {
        if (r == 1 && at.x == 1) return row;
    }
    if (r == 1) {
        for (int64_t l = 0; l < span; ++l) buffer[l] = static_cast<W>(row[l * at.x]);
    } else {
        for (int64_t l = 0; l < span / r; ++l) {
            for (int64_t d = 0; d < r; ++d) buffer[l * r + d] = static_cast<W>(row[l * at.x + d * at.c]);
        }
    }
    return buffer;
}

// Asks for one row of a patch; with a fused pixel shuffle r rows lie together and are asked for once.
template <typename T>
FASTROUTE_INLINE void prefetch_row(const T* patch, PatchLayout at, int64_t c, int64_t k, int64_t span) {
    const int64_t r = at.shuffle;
    if (r > 1 && (at.c != 1 || k % r != 0)) return;
    const T* row = patch + c * r * r * at.c + k / r * at.y;
    if (at.x == 1) {
        prefetch_run(row, span * static_cast<int64_t>(sizeof(T)));
    } else {
        for (int64_t l = 0; l < span / r; ++l) __builtin_prefetch(row + l * at.x);
    }
}

// Patches that are the input of their branch's last layers, which are computed for the rows of each item of work.
struct Upsampling {
    const upsampler::Upsampler* kinds;
    int64_t number;          // of them
    const int64_t* kind_of;  // of each batch; -1 for one of patches that are finished, [C, P, P]
    int64_t shuffle;         // output pixels per pixel of the features
    int64_t size;            // of a patch, in pixels of the features
    int64_t widest;          // region
};

// Where a patch is read: in a batch of its own kind, or within the region that holds it.
template <typename T>
struct Held {
    const T* data;          // its first pixel; with last layers to compute, the first feature of its region
    int64_t c, y, x;        // strides in elements
    int64_t kind;           // of last layers, -1 for none
    int64_t row;            // of the region among all
    int64_t down, across;   // LR pixels from the beginning of the region
    int64_t height, width;  // of the region, in LR pixels
};

template <typename T>
struct StitchPlan {
    using W = Work<T>;
    const Held<T>* table;  // [B, tile rows that are read, cols]
    TileRange read;        // those tile rows
    PatchLayout layout;    // of the first batch; only c and y of others may differ
    const W* weights_y;    // [rows, span]
    const W* weights_x;    // [cols, span]
    Geometry geometry;
    int64_t span, width;  // of a patch and of the image, in output pixels
    int64_t channels;     // of one item of work: 1, or all of them
    bool wide;            // see `covers_twice`
    int64_t rows;         // output rows per item of work
    const Upsampling* upsampling;
    PatchLayout tile;  // of some rows of the channels of an item: computed, or unpacked to runs of sums

    // Whether all phases and channels of an LR pixel of a patch lie side by side, and tiles meet between LR pixels.
    FASTROUTE_INLINE bool side_by_side() const {
        return layout.shuffle > 1 && layout.shuffle <= 4 && layout.c == 1 && geometry.scale % layout.shuffle == 0;
    }

    // Whether the rows of a patch are runs of sums as they lie.
    FASTROUTE_INLINE bool in_place() const {
        return upsampling == nullptr && std::is_same_v<T, W> && layout.shuffle == 1 && layout.x == 1;
    }

    // Whether they are to be made so: of a smaller type, or all channels of a pixel side by side.
    FASTROUTE_INLINE bool unpacked() const {
        return upsampling == nullptr && !in_place() && layout.shuffle == 1 && (layout.x == 1 || layout.c == 1);
    }

    // Whether they are so in the end.
    FASTROUTE_INLINE bool planar() const { return upsampling != nullptr || in_place() || unpacked(); }

    // The first output row of tile row i, and the first column of tile column j.
    FASTROUTE_INLINE int64_t origin_y(int64_t i) const { return geometry.y.origin(i) * geometry.scale; }
    FASTROUTE_INLINE int64_t origin_x(int64_t j) const { return geometry.x.origin(j) * geometry.scale; }

    // Columns of tile column j that the next one does not reach.
    FASTROUTE_INLINE int64_t finished(int64_t j) const {
        return (j + 1 < geometry.x.count() ? origin_x(j + 1) : width) - origin_x(j);
    }

    // Whether no output column lies in more than two tile columns.
    bool covers_twice() const {
        int64_t shared = 0;
        for (int64_t j = 0; j < geometry.x.count(); ++j) {
            if (finished(j) < shared) return false;
            shared = std::min(span, width - origin_x(j)) - finished(j);
        }
        return true;
    }

    FASTROUTE_INLINE const Held<T>& held(int64_t image, int64_t i, int64_t j) const {
        return table[(image * (read.last - read.first + 1) + i - read.first) * geometry.x.count() + j];
    }
    FASTROUTE_INLINE PatchLayout layout_of(const Held<T>& patch) const {
        return {patch.c, patch.y, layout.x, layout.shuffle};
    }
};

// Buffers of one thread.
template <typename W>
struct Scratch {
    // [3, channels, rows, span]: columns that the tiles so far cover and later ones may add to, of each tile row where
    // two are summed tile by tile, and what is passed from one to the other.
    std::vector<W> window;
    std::vector<W> sum;   // [channels, rows, width]: for rows that are summed tile row by tile row
    std::vector<W> row;   // of a patch: its pixels, or, where they are unpacked, all from the first to the last value
    std::vector<W> tile;  // rows of one patch as `StitchPlan::tile` says
    // Of upsampled patches: buffers; ticks spent in the layers of each kind.
    upsampler::Buffers layers;
    std::vector<int64_t> spent;
    // Of the last two regions: which one, and its rows of the item of work, [channels, rows, columns].
    struct Computed {
        int64_t region = -1;
        std::vector<W> rows;
    } computed[2];

    template <typename T>
    Scratch(const StitchPlan<T>& plan, int64_t kinds)
        : window(3 * plan.channels * plan.rows * plan.span),
          row(plan.unpacked() ? (plan.span - 1) * plan.layout.x + plan.channels : plan.span),
          tile(plan.channels * plan.tile.c),
          spent(kinds) {
        for (int64_t kind = 0; kind < kinds; ++kind) {
            layers.reserve(plan.upsampling->kinds[kind].scratch(plan.upsampling->widest));
        }
    }
};

template <typename T>
struct Rows;

// How sums become pixels of one type. The bodies below know the type of the patches alone, which keeps their number,
// and the time that the extension takes to compile, at that of those types.
template <typename T>
struct Writer {
    using W = Work<T>;
    int64_t bytes;  // of a pixel
    bool integers;  // pixels are not sums of pixels: they are written when all is summed
    bool copies;    // pixels are sums as they are
    // Finished columns [x, x + count) of the rows from [channels, rows, step].
    void (*emit)(const W* window, int64_t step, int64_t channels, int64_t x, int64_t count, const Rows<T>& out);
    // Whole vectors of every row at a time, see `StitchBody::run`; null where there are no such.
    void (*run_wide)(const StitchPlan<T>& plan, int64_t image, int64_t c, int64_t at, TileRange range, bool direct,
                     Scratch<W>* scratch, const Rows<T>& out);
};

// Where an item of work goes: rows of one image, channel after channel.
template <typename T>
struct Rows {
    char* data;
    int64_t channel_step, row_step;  // in bytes
    int64_t count;
    bool stream;  // past the caches
    const Writer<T>* writer;

    template <typename Out>
    FASTROUTE_INLINE Out* at(int64_t c, int64_t r, int64_t x) const {
        return reinterpret_cast<Out*>(data + c * channel_step + r * row_step) + x;
    }
};

}  // namespace
}  // namespace fastroute
