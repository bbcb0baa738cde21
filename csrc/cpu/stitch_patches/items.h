// The work of one call of stitch_patches, divided among the threads: an item is some output rows of one channel, or of
// all channels where the pixels of a patch hold them side by side or are computed together.
#pragma once

#include <algorithm>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches/rows.h"
#include "cpu/stitch_patches/spent.h"
#include "cpu/stitch_patches/table.h"

namespace fastroute {
namespace {

constexpr int64_t kWindowBytes = 24 << 10;  // what the window of an item may take of the first-level cache
constexpr int64_t kStreamFrom = 8 << 20;    // bytes of output from which it is written past the caches

// What a plan points at.
template <typename T>
struct Tables {
    std::vector<Work<T>> weights_y, weights_x;
    TileRange read;
    std::vector<Held<T>> held;

    Tables(const Stitching& call, const Upsampling* upsampling) {
        const Work<T>* window = checked_window<Work<T>>(call.window, call.geometry.span());
        weights_y = axis_weights(window, call.geometry.y, call.geometry.scale);
        weights_x = axis_weights(window, call.geometry.x, call.geometry.scale);
        read = read_rows(call);
        held = held_patches<T>(call, read, upsampling);
    }
};

// Channels that are unpacked together where they lie side by side: those of a cache line at most, and as many in every
// item.
int64_t channels_per_item(int64_t channels) {
    int64_t most = std::clamp<int64_t>(channels, 1, 16);
    while (channels % most != 0) --most;
    return most;
}

// The plan of a call whose items are of one channel, before it is known what they are written as.
template <typename T>
StitchPlan<T> first_plan(const Stitching& call, const Tables<T>& tables, const Upsampling* upsampling) {
    const Tensor& first = call.batches.front();
    const int64_t span = call.geometry.span();
    return {.table = tables.held.data(),
            .read = tables.read,
            .layout = {.c = first.stride(1), .y = first.stride(2), .x = first.stride(3), .shuffle = call.shuffle},
            .weights_y = tables.weights_y.data(),
            .weights_x = tables.weights_x.data(),
            .geometry = call.geometry,
            .span = span,
            .width = call.target.width,
            .channels = 1,
            .wide = false,
            .rows = kRows,
            .upsampling = upsampling,
            .tile = {.c = 0, .y = span, .x = 1, .shuffle = 1}};
}

// Which channels an item takes together.
template <typename T>
void choose_channels(const Stitching& call, StitchPlan<T>& plan) {
    const int64_t channels = call.target.channels, shuffle = call.shuffle;
    if (plan.upsampling != nullptr) {
        plan.channels = channels;
        plan.rows = shuffle * rows_per_item(call.target.batch * call.target.rows / shuffle, 8, 2);
        plan.tile.y = computed_columns(plan.span / shuffle, shuffle);
        plan.layout = plan.tile;
    } else if (plan.unpacked() && plan.layout.x != 1) {
        plan.channels = channels_per_item(channels);
    } else if (plan.side_by_side() &&
               channels * kRows * plan.span * static_cast<int64_t>(sizeof(Work<T>)) <= kWindowBytes) {
        plan.channels = channels;
    }
}

// How many rows, which depends on what they are written as.
template <typename T>
void choose_rows(const Stitching& call, const Writer<T>& writer, StitchPlan<T>& plan) {
    const bool wide_patches = plan.planar() || (plan.layout.shuffle == 4 && std::is_same_v<T, float>);
    plan.wide = writer.run_wide != nullptr && wide_patches && plan.covers_twice();
    const Target& target = call.target;
    // Longer runs of each patch: 64 rows of 128 pixels are eight 4 KiB pages.
    if (plan.wide && plan.planar() && plan.upsampling == nullptr) {
        plan.rows = rows_per_item(target.batch * target.channels / plan.channels * target.rows, 4 * kRows, kRows);
    } else if (plan.unpacked()) {
        const int64_t line = static_cast<int64_t>(sizeof(Work<T>));
        plan.rows = std::clamp<int64_t>(kWindowBytes / line / plan.channels / plan.span, 2, kRows);
    }
    if (plan.planar() && !plan.in_place()) plan.tile.c = plan.rows * plan.tile.y;
}

// The items of a call, numbered image by image, channel by channel, rows from the top.
template <typename T>
struct Items {
    using W = Work<T>;
    const StitchPlan<T>& plan;
    const Writer<T>& writer;
    Target target;
    int64_t row_begin;
    char* out;                                   // [B, C, rows, W·s]
    int64_t image_step, channel_step, row_step;  // in bytes
    bool stream;                                 // past the caches

    int64_t blocks() const { return (target.rows + plan.rows - 1) / plan.rows; }
    int64_t parts() const { return target.channels / plan.channels; }
    int64_t count() const { return target.batch * parts() * blocks(); }

    // As many rows at a time as the same tile rows cover; that changes between LR rows alone.
    void run(int64_t item, Scratch<W>& scratch) const {
        const int64_t c = item / blocks() % parts() * plan.channels, b = item / blocks() / parts();
        int64_t y = item % blocks() * plan.rows;
        const int64_t last = std::min(target.rows, y + plan.rows);
        while (y < last) {
            const TileRange range = covering(y);
            int64_t next = y + 1;
            while (next < last && same(range, covering(next))) ++next;
            const Rows<T> to{.data = out + b * image_step + c * channel_step + y * row_step,
                             .channel_step = channel_step,
                             .row_step = row_step,
                             .count = next - y,
                             .stream = stream,
                             .writer = &writer};
            run_isa<StitchBody<T>, kPrecise<T>>(plan, b, c, row_begin + y, range, &scratch, to);
            y = next;
        }
    }

  private:
    TileRange covering(int64_t y) const { return plan.geometry.y.covering((row_begin + y) / plan.geometry.scale); }
    static bool same(TileRange a, TileRange b) { return a.first == b.first && a.last == b.last; }
};

template <typename T>
Items<T> items_of(const Stitching& call, const StitchPlan<T>& plan, const Writer<T>& writer, const Tensor& out) {
    const Target& target = call.target;
    const int64_t pixels = target.batch * target.channels * target.rows * target.width;
    return {.plan = plan,
            .writer = writer,
            .target = target,
            .row_begin = call.row_begin,
            .out = static_cast<char*>(out.mutable_data_ptr()),
            .image_step = out.stride(0) * writer.bytes,
            .channel_step = out.stride(1) * writer.bytes,
            .row_step = out.stride(2) * writer.bytes,
            // What does not fit in the caches anyway should not push anything else out of them.
            .stream = pixels * writer.bytes >= kStreamFrom};
}

// Items that cost alike: each thread takes as many.
template <typename T>
void run_alike(const Items<T>& items) {
    const int64_t item_bytes = items.plan.channels * items.plan.rows * items.target.width * 8;
    parallel(items.count(), grain_for(item_bytes), [&](int64_t begin, int64_t end) {
        Scratch<Work<T>> scratch(items.plan, 0);
        for (int64_t item = begin; item < end; ++item) items.run(item, scratch);
        if (items.stream) stream_fence();
    });
}

// What the layers of a patch cost depends on its kind, and hard patches lie together.
template <typename T>
void run_in_turn(const Items<T>& items, Spent& spent) {
    const int64_t count = items.count();
    in_turn(count, [&](const auto& next) {
        const int64_t start = ticks();
        Scratch<Work<T>> scratch(items.plan, items.plan.upsampling->number);
        for (int64_t item = next(); item < count; item = next()) items.run(item, scratch);
        if (items.stream) stream_fence();
        spent.add(scratch.spent, ticks() - start);
    });
}

// `upsampling` where the last layers of the branches are computed on the way, in float32; `spent` then is how long they
// took.
template <typename T>
void stitch(const Stitching& call, const Tensor& out, const Upsampling* upsampling = nullptr, Spent* spent = nullptr) {
    const Tables<T> tables(call, upsampling);
    StitchPlan<T> plan = first_plan(call, tables, upsampling);
    choose_channels(call, plan);
    Writer<T> writer{};
    dispatch_image(kOp, out.scalar_type(), [&](auto zero) { writer = writer_of<T, decltype(zero)>(); });
    choose_rows(call, writer, plan);
    const Items<T> items = items_of(call, plan, writer, out);
    if constexpr (std::is_same_v<T, float>) {
        if (upsampling != nullptr) return run_in_turn(items, *spent);
    }
    run_alike(items);
}

}  // namespace
}  // namespace fastroute
