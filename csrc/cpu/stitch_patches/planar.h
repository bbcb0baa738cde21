// The rows of a patch as runs of sums, for `stitch_patches`: where they lie, unpacked from smaller types and from
// pixels whose channels lie side by side, or computed by the last layers of the patch's branch.
#pragma once

#include <optional>
#include <utility>

#include "cpu/halves.h"
#include "cpu/stitch_patches/plan.h"
#include "cpu/stitch_patches/spent.h"

namespace fastroute {
namespace {

// `rows` rows of `span` pixels of a patch to [channels][rows][span], channels and rows as far apart as `to` says.
template <typename T>
struct UnpackBody {
    using W = Work<T>;

    FASTROUTE_INLINE static void run(const T* patch, PatchLayout from, int64_t channels, int64_t rows, int64_t span,
                                     W* target, PatchLayout to, W* buffer) {
        const int64_t bytes = span * from.x * static_cast<int64_t>(sizeof(T));
        for (int64_t r = 0; r < rows; ++r) {
            const T* row = patch + r * from.y;
            // A page ahead, where the hardware stops asking.
            const char* ahead = reinterpret_cast<const char*>(row) + 4096;
            for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(ahead + at);
            W* line = target + r * to.y;
            if (from.x == 1) {
                for (int64_t c = 0; c < channels; ++c) widen(row + c * from.c, span, line + c * to.c);
            } else if constexpr (std::is_same_v<T, W>) {
                part(row, from, channels, span, line, to.c);
            } else {
                widen(row, (span - 1) * from.x + channels, buffer);
                part(buffer, from, channels, span, line, to.c);
            }
        }
    }

    FASTROUTE_INLINE static void widen(const T* __restrict from, int64_t count, W* __restrict to) {
        if constexpr (std::is_same_v<T, Half>) {
            if (has_halves()) return widen_halves(from, count, to);
        }
        for (int64_t l = 0; l < count; ++l) to[l] = static_cast<W>(from[l]);
    }

    // One row of pixels to one of each channel.
    FASTROUTE_INLINE static void part(const W* row, PatchLayout from, int64_t channels, int64_t span, W* line,
                                      int64_t step) {
        if (channels == 3 && from.x == 3) {
            colours(row, span, line, line + step, line + 2 * step);
        } else if constexpr (std::is_same_v<W, float>) {
            upsampler::copy_planar(row, {1, 0, from.x}, channels, span, line, step);
        } else {
            for (int64_t l = 0; l < span; ++l) {
                for (int64_t c = 0; c < channels; ++c) line[c * step + l] = row[l * from.x + c];
            }
        }
    }

    FASTROUTE_INLINE static void colours(const W* __restrict from, int64_t count, W* __restrict red,
                                         W* __restrict green, W* __restrict blue) {
        for (int64_t l = 0; l < count; ++l) {
            red[l] = from[3 * l], green[l] = from[3 * l + 1], blue[l] = from[3 * l + 2];
        }
    }
};

// Floats of a row that `columns` LR pixels become.
inline int64_t computed_columns(int64_t columns, int64_t shuffle) {
    return (columns + upsampler::kRowAlign - 1) / upsampler::kRowAlign * upsampler::kRowAlign * shuffle;
}

// The rows of a patch of which the first is k, some at a time. `all` rows will be asked for; where a region is larger
// than its patches, they are computed for the whole region at once, since its patches follow each other.
template <typename T>
class PlanarPatch {
  public:
    using W = Work<T>;

    PlanarPatch(const StitchPlan<T>& plan, const Held<T>& held, int64_t k, int64_t all, int64_t slot,
                Scratch<W>* scratch)
        : layout(plan.in_place() ? plan.layout_of(held) : plan.tile), plan(plan), held(held), scratch(scratch) {
        if constexpr (std::is_same_v<T, float>) {
            if (plan.upsampling == nullptr) return;
            if (held.kind < 0) {
                layout = {held.c, held.y, 1, 1};
                return;
            }
            begin = ticks();
            const Upsampling& from = *plan.upsampling;
            const bool region = held.height > from.size || held.width > from.size;
            if (region && find(held.row, k)) return;
            const int64_t first = region ? k + held.down * plan.geometry.scale : k;
            upsampled.emplace(from.kinds[held.kind], held.data, upsampler::FeatureStep{held.c, held.y, held.x},
                              held.height, held.width, first, &scratch->layers);
            if (region) compute(first, all, k, slot);
        }
    }

    // Rows [k, k + rows) of the channels of an item from c on, channels and rows as far apart as `layout` then says.
    // Upsampled channels are computed all at once, and c is 0 then.
    const W* next(int64_t c, int64_t k, int64_t rows) {
        W* tile = scratch->tile.data();
        if (plan.unpacked()) {
            const PatchLayout at = plan.layout_of(held);
            const T* from = held.data + c * at.c + k * at.y;
            layout.c = rows * layout.y;
            run_isa<UnpackBody<T>>(from, at, plan.channels, rows, plan.span, tile, layout, scratch->row.data());
            return tile;
        }
        if constexpr (std::is_same_v<T, float>) {
            if (ready != nullptr) return ready + (k - ready_from) * layout.y;
            if (upsampled.has_value()) {
                if (begin == 0) begin = ticks();
                upsampled->compute(k, k + rows, tile, layout.y, layout.c);
                scratch->spent[held.kind] += ticks() - std::exchange(begin, 0);
                return tile;
            }
        }
        if constexpr (std::is_same_v<T, W>) return held.data + c * layout.c + k * layout.y;
        return tile;
    }

    PatchLayout layout;

  private:
    // Whether the rows of the region have been computed for another of its patches.
    bool find(int64_t row, int64_t k) {
        for (const auto& computed : scratch->computed) {
            if (computed.region != row) continue;
            use(computed.rows, k);
            return true;
        }
        return false;
    }

    void compute(int64_t first, int64_t all, int64_t k, int64_t slot) {
        auto& computed = scratch->computed[slot & 1];
        const int64_t step = computed_columns(held.width, plan.upsampling->shuffle);
        computed.rows.resize(plan.channels * plan.rows *
                             computed_columns(plan.upsampling->widest, plan.upsampling->shuffle));
        upsampled->compute(first, first + all, computed.rows.data(), step, plan.rows * step);
        computed.region = held.row;
        use(computed.rows, k);
        scratch->spent[held.kind] += ticks() - std::exchange(begin, 0);
    }

    void use(const std::vector<W>& rows, int64_t k) {
        const int64_t step = computed_columns(held.width, plan.upsampling->shuffle);
        layout = {plan.rows * step, step, 1, 1};
        ready = rows.data() + held.across * plan.geometry.scale, ready_from = k;
    }

    const StitchPlan<T>& plan;
    const Held<T>& held;
    Scratch<W>* scratch;
    int64_t begin = 0;  // ticks since which the time counts; 0 while it does not
    std::optional<upsampler::Patch> upsampled;
    const W* ready = nullptr;  // computed rows, from row `ready_from` on
    int64_t ready_from = 0;
};

}  // namespace
}  // namespace fastroute
