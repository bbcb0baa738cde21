// The rows of one item of work of `stitch_patches`: tile row by tile row, in each tile column by tile column, patches
// are weighed by wx into a window, which is weighed by wy into the sum, and written once.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/stitch_patches/planar.h"

namespace fastroute {
namespace {

constexpr int64_t kUnpacked = 4096;  // sums that are unpacked before they are merged: 16 KiB

// See Writer::emit.
template <typename T, typename Out>
struct EmitBody {
    using W = Work<T>;

    FASTROUTE_INLINE static void run(const W* window, int64_t step, int64_t channels, int64_t x, int64_t count,
                                     const Rows<T>& out) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t r = 0; r < out.count; ++r) {
                const W* from = window + (c * out.count + r) * step;
                Out* to = out.template at<Out>(c, r, x);
                if constexpr (std::is_same_v<Out, W>) {
                    out.stream ? stream_copy(to, from, count * sizeof(W)) : copy_run(to, from, count * sizeof(W));
                } else {
                    to_pixels(to, from, count);
                }
            }
        }
    }
};

// Asks for the lines of the image that will be written when the next rows are computed: many short runs, which the
// hardware does not foresee, and of which the processor waits for one after the other.
template <typename T>
FASTROUTE_INLINE void expect(const Rows<T>& out, int64_t row, int64_t x, int64_t columns, int64_t channels,
                             int64_t rows) {
    if (out.stream && out.writer->copies) return;
    const int64_t bytes = columns * out.writer->bytes;
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t r = row; r < row + rows; ++r) {
            const char* line = out.data + c * out.channel_step + r * out.row_step + x * out.writer->bytes;
            for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(line + at, 1, 2);
            __builtin_prefetch(line + bytes - 1, 1, 2);
        }
    }
}

template <typename T>
struct StitchBody {
    using W = Work<T>;

    // Columns [x, x + count) of the rows, finished in the window, times wy into the sum over tile rows.
    FASTROUTE_INLINE static void add(const W* window, int64_t span, int64_t channels, int64_t rows, int64_t x,
                                     int64_t count, const W* weight, bool first, W* sum, int64_t width) {
        for (int64_t row = 0; row < channels * rows; ++row) {
            const W* from = window + row * span;
            W* to = sum + row * width + x;
            const W w = weight[row % rows];
            for (int64_t l = 0; l < count; ++l) to[l] = (first ? W(0) : to[l]) + w * from[l];
        }
    }

    // Rows [k, k + rows) of one patch times wx into the window: added to its first `shared` columns, which earlier
    // tiles began, and put into the others.
    template <typename Value>
    FASTROUTE_INLINE static void weigh_rows(const Value* patch, const Value* ahead, PatchLayout at, int64_t channels,
                                            int64_t k, int64_t rows, int64_t span, int64_t shared, int64_t kept,
                                            const W* weight, W* window, W* buffer, int64_t first_channel) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t r = 0; r < rows; ++r) {
                prefetch_row(ahead, at, first_channel + c, k + r, span);
                const W* row = load_row(patch, at, first_channel + c, k + r, span, buffer);
                W* target = window + (c * rows + r) * span;
                for (int64_t l = 0; l < shared; ++l) target[l] += weight[l] * row[l];
                for (int64_t l = shared; l < kept; ++l) target[l] = W(0) + weight[l] * row[l];
            }
        }
    }

    // The same for whole LR rows of all channels, which lie side by side: a patch is read from front to back.
    template <int R, bool Add>
    FASTROUTE_INLINE static void weigh_pixels(const T* row, const T* ahead, PatchLayout at, int64_t channels,
                                              int64_t begin, int64_t end, const W* weight, W* window, int64_t row_step,
                                              int64_t channel_step) {
        const int64_t bytes = channels * R * R * static_cast<int64_t>(sizeof(T));
        for (int64_t l = begin; l < end; ++l) {
            const T* pixel = row + l * at.x;
            for (int64_t line = 0; line < bytes; line += kLine) {
                __builtin_prefetch(reinterpret_cast<const char*>(ahead + l * at.x) + line);
            }
            for (int64_t c = 0; c < channels; ++c) {
                W* target = window + c * channel_step + l * R;
#pragma GCC unroll 4
                for (int d = 0; d < R; ++d) {
                    weigh_run<R, Add>(pixel + (c * R + d) * R, weight + l * R, target + d * row_step);
                }
            }
        }
    }

    // The R values of one row of one LR pixel. As vectors where there are such: the compiler cannot know that what it
    // writes is not what it reads next.
    template <int R, bool Add>
    FASTROUTE_INLINE static void weigh_run(const T* values, const W* weight, W* target) {
        if constexpr (std::is_same_v<T, W> && (R == 2 || R == 4)) {
            typedef W Run __attribute__((vector_size(R * sizeof(W)), aligned(sizeof(W)), may_alias));
            const Run value = *reinterpret_cast<const Run*>(values) * *reinterpret_cast<const Run*>(weight);
            Run* to = reinterpret_cast<Run*>(target);
            *to = (Add ? *to : Run{}) + value;
        } else {
            for (int e = 0; e < R; ++e) target[e] = (Add ? target[e] : W(0)) + weight[e] * static_cast<W>(values[e]);
        }
    }

    template <int R>
    FASTROUTE_INLINE static void weigh_shuffled(const T* patch, const T* ahead, PatchLayout at, int64_t channels,
                                                int64_t k, int64_t rows, int64_t span, int64_t shared, int64_t kept,
                                                const W* weight, W* window) {
        for (int64_t r = 0; r < rows; r += R) {
            const int64_t offset = (k + r) / R * at.y;
            W* target = window + r * span;
            weigh_pixels<R, true>(patch + offset, ahead + offset, at, channels, 0, shared / R, weight, target, span,
                                  rows * span);
            weigh_pixels<R, false>(patch + offset, ahead + offset, at, channels, shared / R, kept / R, weight, target,
                                   span, rows * span);
        }
    }

    // The output rows from `at` on, which the same tile rows cover. Columns outside and rows inside: what is being
    // summed stays in the first-level cache.
    FASTROUTE_INLINE static void run(const StitchPlan<T>& plan, int64_t image, int64_t c, int64_t at, TileRange range,
                                     Scratch<W>* scratch, Rows<T> out) {
        W* window = scratch->window.data();
        for (auto& computed : scratch->computed) computed.region = -1;
        const int64_t cols = plan.geometry.x.count(), span = plan.span, width = plan.width, rows = out.count;
        const int64_t channels = plan.channels, factor = plan.layout.shuffle;
        const W* top = plan.weights_y + range.first * span + at - plan.origin_y(range.first);
        // One tile row of weight 1, as almost everywhere under a uniform window: nothing to sum over tile rows.
        bool direct = range.first == range.last;
        for (int64_t r = 0; r < rows; ++r) direct = direct && top[r] == W(1);
        const bool whole = plan.side_by_side() && rows % factor == 0;
        const bool aligned = plan.planar() || (whole && at % factor == 0);
        if (plan.wide && aligned && (direct || range.last == range.first + 1)) {
            return out.writer->run_wide(plan, image, c, at, range, direct, scratch, out);
        }
        scratch->sum.resize(channels * plan.rows * width);
        W* sum = scratch->sum.data();
        for (int64_t i = range.first; i <= range.last; ++i) {
            const int64_t k = at - plan.origin_y(i);
            int64_t shared = 0;  // columns at the front of the window that earlier tiles began
            for (int64_t j = 0; j < cols; ++j) {
                const Held<T>& held = plan.held(image, i, j);
                const PatchLayout layout = plan.layout_of(held);
                const T* patch = held.data;
                const T* ahead = j + 1 < cols ? plan.held(image, i, j + 1).data : patch;
                const W* weight = plan.weights_x + j * span;
                const int64_t x0 = plan.origin_x(j), kept = std::min(span, width - x0);
                if (whole && k % factor == 0 && factor == 4) {
                    weigh_shuffled<4>(patch + c * 16, ahead + c * 16, layout, channels, k, rows, span, shared, kept,
                                      weight, window);
                } else if (whole && k % factor == 0 && factor == 3) {
                    weigh_shuffled<3>(patch + c * 9, ahead + c * 9, layout, channels, k, rows, span, shared, kept,
                                      weight, window);
                } else if (whole && k % factor == 0 && factor == 2) {
                    weigh_shuffled<2>(patch + c * 4, ahead + c * 4, layout, channels, k, rows, span, shared, kept,
                                      weight, window);
                } else if (plan.planar() && !plan.in_place()) {
                    PlanarPatch<T> some(plan, held, k, rows, i - range.first, scratch);
                    const W* values = some.next(c, k, rows);
                    weigh_rows(values, values, some.layout, channels, 0, rows, span, shared, kept, weight, window,
                               scratch->row.data(), 0);
                } else {
                    weigh_rows(patch, ahead, layout, channels, k, rows, span, shared, kept, weight, window,
                               scratch->row.data(), c);
                }
                const int64_t finished = plan.finished(j);
                if (direct && out.writer->integers) {
                    for (int64_t r = 0; r < channels * rows; ++r) {
                        copy_run(sum + r * width + x0, window + r * span, finished * sizeof(W));
                    }
                } else if (direct) {
                    out.writer->emit(window, span, channels, x0, finished, out);
                } else {
                    add(window, span, channels, rows, x0, finished, plan.weights_y + i * span + k, i == range.first,
                        sum, width);
                }
                shared = kept - finished;
                for (int64_t r = 0; r < channels * rows && shared > 0; ++r) {
                    std::memmove(window + r * span, window + r * span + finished, shared * sizeof(W));
                }
            }
        }
        if (!direct || out.writer->integers) out.writer->emit(sum, width, channels, 0, width, out);
    }
};

#if FASTROUTE_X86
// What `run` does where at most two tile rows and columns meet, in whole vectors. The two tiles of a column follow
// each other, so that what one leaves for the other stays in the caches.
template <typename T, typename Out>
void run_wide(const StitchPlan<T>& plan, int64_t image, int64_t c, int64_t at, TileRange range, bool direct,
              Scratch<Work<T>>* scratch, const Rows<T>& out) {
    using W = Work<T>;
    const int64_t cols = plan.geometry.x.count(), span = plan.span, rows = out.count;
    const int64_t held = plan.channels * rows * span;
    int64_t shared = 0;  // columns of this tile that the window holds the beginning of
    for (int64_t j = 0; j < cols; ++j) {
        const int64_t x0 = plan.origin_x(j), finished = plan.finished(j);
        const int64_t kept = std::min(span, plan.width - x0);
        for (int64_t i = range.first; i <= range.last; ++i) {
            const int64_t k = at - plan.origin_y(i);
            const Held<T>& tile = plan.held(image, i, j);
            const Runs mode = direct ? Runs::put : i < range.last ? Runs::begin : Runs::finish;
            W* window = scratch->window.data() + (i - range.first) * held;
            const auto target = [&](int64_t r, int64_t begin) {
                return RunTarget<Out>{.weight_x = plan.weights_x + j * span + begin,
                                      .weight_y = plan.weights_y + i * span + k + r,
                                      .window = window + r * span,
                                      .sum = scratch->window.data() + 2 * held + r * span + begin,
                                      .out = out.template at<Out>(0, r, x0 + begin),
                                      .window_channel = rows * span,
                                      .window_row = span,
                                      .sum_channel = rows * span,
                                      .sum_row = span,
                                      .out_channel = out.channel_step / static_cast<int64_t>(sizeof(Out)),
                                      .out_row = out.row_step / static_cast<int64_t>(sizeof(Out)),
                                      .stream = out.stream};
            };
            if (plan.planar()) {
                PlanarPatch<T> patch(plan, tile, k, rows, i - range.first, scratch);
                // As few as lie in the first-level cache until they are merged.
                const int64_t most =
                    plan.unpacked() ? std::clamp<int64_t>(kUnpacked / plan.channels / span, 1, kRows) : kRows;
                const W* weight = plan.weights_x + j * span;
                const bool unit = std::all_of(weight + shared, weight + finished, [](W w) { return w == W(1); });
                for (int64_t r = 0, count; r < rows; r += count) {
                    count = std::min(rows - r, most);
                    if (mode == Runs::put || mode == Runs::finish) {
                        expect(out, r, x0, finished, plan.channels, count);
                    }
                    const W* values = patch.next(c, k + r, count);
                    const PlanarRows some{.pixels = values,
                                          .channel_step = patch.layout.c,
                                          .row_step = patch.layout.y,
                                          .channels = plan.channels,
                                          .rows = count,
                                          .count = kept};
                    each_planar_row(mode, unit, some, shared, finished, target(r, 0));
                }
                continue;
            }
            if constexpr (std::is_same_v<T, float>) {
                const T* patch = tile.data;
                const T* ahead = j + 1 < cols ? plan.held(image, i, j + 1).data : patch;
                for (int64_t r = 0; r < rows; r += 4) {
                    const int64_t lr_row = (k + r) / 4 * tile.y;
                    const auto runs = [&](int64_t begin, int64_t end, Runs to, bool joined) {
                        const int64_t offset = c * 16 + lr_row + begin / 4 * plan.layout.x;
                        const ShuffledRow from{.pixels = patch + offset,
                                               .ahead = ahead + offset,
                                               .step = plan.layout.x,
                                               .count = (end - begin) / 4,
                                               .channels = plan.channels};
                        each_shuffled_run(to, joined, from, target(r, begin));
                    };
                    runs(0, shared, mode, true);
                    runs(shared, finished, mode, false);
                    runs(finished, kept, Runs::keep, false);
                }
            }
        }
        shared = kept - finished;
    }
}
#endif

template <typename T, typename Out>
void emit(const Work<T>* window, int64_t step, int64_t channels, int64_t x, int64_t count, const Rows<T>& out) {
    run_isa<EmitBody<T, Out>, kPrecise<T, Out>>(window, step, channels, x, count, out);
}

template <typename T, typename Out>
Writer<T> writer_of() {
    Writer<T> writer{.bytes = sizeof(Out),
                     .integers = std::is_integral_v<Out>,
                     .copies = std::is_same_v<Out, Work<T>>,
                     .emit = emit<T, Out>,
                     .run_wide = nullptr};
#if FASTROUTE_X86
    if constexpr (kWideRuns<T, Out>) {
        if (has_wide_runs()) writer.run_wide = run_wide<T, Out>;
    }
#endif
    return writer;
}

}  // namespace
}  // namespace fastroute
