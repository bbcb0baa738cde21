// What one call of `stitch_patches` works on: where patches lie and what they weigh, the buffers of a thread, and the
// rows of a patch whose last layers are computed on the way.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "common/geometry.h"
#include "cpu/memory.h"
#include "cpu/pixel_run.h"
#include "cpu/upsampler.h"
#include "cpu/wide_runs.h"

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

// A clock that may be read often; what it counts is of no matter, only ratios are.
inline int64_t ticks() {
#if FASTROUTE_X86
    return static_cast<int64_t>(__rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
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
    int64_t number;                    // of them
    const upsampler::FeatureStep* at;  // of the features of each kind
    const int64_t* kind_of;            // [M]; -1 for a patch that is finished, [C, P, P]
    int64_t size;                      // of a patch, in LR pixels
};

template <typename T>
struct StitchPlan {
    using W = Work<T>;
    const T* const* patches;  // [M]
    PatchLayout layout;
    const int64_t* inverse;  // [N] or null
    const W* weights_y;      // [rows, span]
    const W* weights_x;      // [cols, span]
    TileGrid grid;
    int64_t scale, span, width;  // width in output pixels
    int64_t channels;            // of one item of work: 1, or all of them
    bool wide;                   // see `covers_twice`
    int64_t rows;                // output rows per item of work
    const Upsampling* upsampling;

    // Whether all phases and channels of an LR pixel of a patch lie side by side, and tiles meet between LR pixels.
    FASTROUTE_INLINE bool side_by_side() const {
        return layout.shuffle > 1 && layout.shuffle <= 4 && layout.c == 1 && scale % layout.shuffle == 0;
    }

    // Whether the rows of a patch are runs of pixels, as they lie or as they are computed.
    FASTROUTE_INLINE bool planar() const { return layout.shuffle == 1 && layout.x == 1; }

    // Columns of tile column j that the next one does not reach.
    FASTROUTE_INLINE int64_t finished(int64_t j) const {
        return (j + 1 < grid.x.count() ? grid.x.origin(j + 1) * scale : width) - grid.x.origin(j) * scale;
    }

    // Whether no output column lies in more than two tile columns.
    bool covers_twice() const {
        int64_t shared = 0;
        for (int64_t j = 0; j < grid.x.count(); ++j) {
            if (finished(j) < shared) return false;
            shared = std::min(span, width - grid.x.origin(j) * scale) - finished(j);
        }
        return true;
    }

    FASTROUTE_INLINE int64_t place(int64_t n) const { return inverse == nullptr ? n : inverse[n]; }
    FASTROUTE_INLINE const T* patch(int64_t n) const { return patches[place(n)]; }
};

// Buffers of one thread.
template <typename W>
struct Scratch {
    // [3, channels, rows, span]: columns that the tiles so far cover and later ones may add to, of each tile row where
    // two are summed tile by tile, and what is passed from one to the other.
    std::vector<W> window;
    std::vector<W> sum;  // [channels, rows, width]: for rows that are summed tile row by tile row
    std::vector<W> row;  // [span]
    // Of upsampled patches: rows of one patch, as `layout` says; buffers; ticks spent in the layers of each kind.
    std::vector<W> tile;
    upsampler::Buffers layers;
    std::vector<int64_t> spent;

    template <typename T>
    Scratch(const StitchPlan<T>& plan, int64_t kinds)
        : window(3 * plan.channels * plan.rows * plan.span), row(plan.span), spent(kinds) {
        if (plan.upsampling == nullptr) return;
        tile.resize(plan.channels * plan.layout.c);
        for (int64_t kind = 0; kind < kinds; ++kind) {
            layers.reserve(plan.upsampling->kinds[kind].scratch(plan.upsampling->size));
        }
    }
};

// The rows of patch n of which the first is k, computed some at a time; or where they lie, if the patch is finished.
class PlanarPatch {
  public:
    PlanarPatch(const StitchPlan<float>& plan, int64_t n, int64_t k, Scratch<float>* scratch)
        : layout(plan.layout), finished(plan.patch(n)), scratch(scratch) {
        if (plan.upsampling == nullptr) return;
        const Upsampling& from = *plan.upsampling;
        kind = from.kind_of[plan.place(n)];
        if (kind < 0) {
            layout = {plan.span * plan.span, plan.span, 1, 1};
            return;
        }
        begin = ticks();
        patch.emplace(from.kinds[kind], finished, from.at[kind], from.size, k, &scratch->layers);
    }

    // Rows [k, k + rows) of the channels from c on, channels and rows as far apart as `layout` says. All channels are
    // computed at once, and c is 0 then.
    const float* next(int64_t c, int64_t k, int64_t rows) {
        if (!patch.has_value()) return finished + c * layout.c + k * layout.y;
        if (begin == 0) begin = ticks();
        patch->compute(k, k + rows, scratch->tile.data(), layout.y, layout.c);
        scratch->spent[kind] += ticks() - std::exchange(begin, 0);
        return scratch->tile.data();
    }

    PatchLayout layout;

  private:
    int64_t begin = 0;  // ticks since which the time counts; 0 while it does not
    int64_t kind = -1;
    const float* finished;
    std::optional<upsampler::Patch> patch;
    Scratch<float>* scratch;
};

// Where an item of work goes: rows of one image, channel after channel.
template <typename Out>
struct Rows {
    Out* data;
    int64_t channel_step, row_step;
    int64_t count;
    bool stream;
};

}  // namespace
}  // namespace fastroute
