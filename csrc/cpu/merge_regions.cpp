// merge_regions: least(r) = min(cost of r as one region, Σ least(halves of r)) for every rectangle r of every block of
// merge x merge tiles, from single tiles upwards; then every tile goes down from its block to the rectangle that runs
// whole. Blocks are divided among the threads.
#include "common/merge_regions.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/isa.h"

namespace fastroute {
namespace {

constexpr int64_t kMostRectangles = (2 * kMostMerge - 1) * (2 * kMostMerge - 1);
// A block of 4 x 4 tiles takes a microsecond.
constexpr int64_t kBlocksPerThread = 64;

struct Problem {
    Geometry geometry;
    int64_t merge, levels, classes;
    bool promote;
    const float* costs;                     // [K, S]
    std::vector<int64_t> codes_y, codes_x;  // [levels, tiles], of the stretch that holds a tile
    int64_t *executed, *region, *group;     // [N]

    int64_t shapes() const { return 4 * levels * levels; }
    int64_t code(int64_t y, int64_t row, int64_t x, int64_t col) const {
        return codes_y[y * geometry.y.count() + row] * 2 * levels + codes_x[x * geometry.x.count() + col];
    }
};

std::vector<int64_t> codes_of(const TileAxis& axis, int64_t levels) {
    std::vector<int64_t> codes;
    for (int64_t level = 0; level < levels; ++level) {
        for (int64_t tile = 0; tile < axis.count(); ++tile) {
            codes.push_back(side_code(axis, tile >> level << level, level));
        }
    }
    return codes;
}

// One rectangle of a block.
struct Rectangle {
    float least;
    int32_t highest, lowest;
    Act act;
};

// The block of tiles of image `image` whose first tile is (top, left).
template <typename T>
void merge_block(const Problem& p, const T* ids, int64_t image, int64_t top, int64_t left) {
    Rectangle rectangles[kMostRectangles];
    const int64_t rows = p.geometry.y.count(), cols = p.geometry.x.count(), side = stretches(p.merge);
    const auto at = [&](int64_t y, int64_t i, int64_t x, int64_t j) -> Rectangle& {
        return rectangles[stretch(p.merge, y, i) * side + stretch(p.merge, x, j)];
    };
    for (int64_t y = 0; y < p.levels; ++y) {
        for (int64_t i = 0; i < p.merge >> y; ++i) {
            for (int64_t x = 0; x < p.levels; ++x) {
                for (int64_t j = 0; j < p.merge >> x; ++j) {
                    Rectangle& here = at(y, i, x, j);
                    const int64_t row = top + (i << y), col = left + (j << x);
                    if (row >= rows || col >= cols) {
                        here = {0.0f, -1, static_cast<int32_t>(p.classes), kWhole};
                        continue;
                    }
                    if (y + x == 0) {
                        here.highest = here.lowest = static_cast<int32_t>(ids[(image * rows + row) * cols + col]);
                    } else {
                        const Rectangle& a = y > 0 ? at(y - 1, 2 * i, x, j) : at(y, i, x - 1, 2 * j);
                        const Rectangle& b = y > 0 ? at(y - 1, 2 * i + 1, x, j) : at(y, i, x - 1, 2 * j + 1);
                        here.highest = std::max(a.highest, b.highest);
                        here.lowest = std::min(a.lowest, b.lowest);
                    }
                    here.act = kWhole;
                    here.least = p.promote || here.highest == here.lowest
                                     ? p.costs[here.highest * p.shapes() + p.code(y, row, x, col)]
                                     : std::numeric_limits<float>::infinity();
                    const auto cut = [&](Act act, float cost) {
                        if (cost < here.least) here.least = cost, here.act = act;
                    };
                    if (y > 0) cut(kRows, at(y - 1, 2 * i, x, j).least + at(y - 1, 2 * i + 1, x, j).least);
                    if (x > 0) cut(kCols, at(y, i, x - 1, 2 * j).least + at(y, i, x - 1, 2 * j + 1).least);
                }
            }
        }
    }
    for (int64_t row = top; row < std::min(top + p.merge, rows); ++row) {
        for (int64_t col = left; col < std::min(left + p.merge, cols); ++col) {
            int64_t y = p.levels - 1, x = p.levels - 1;
            const Rectangle* here = &at(y, 0, x, 0);
            while (here->act != kWhole) {
                here->act == kRows ? --y : --x;
                here = &at(y, (row - top) >> y, x, (col - left) >> x);
            }
            const int64_t first_row = row >> y << y, first_col = col >> x << x;
            const int64_t n = (image * rows + row) * cols + col;
            p.executed[n] = here->highest;
            p.region[n] = (image * rows + first_row) * cols + first_col;
            p.group[n] =
                p.region[n] == n ? here->highest * p.shapes() + p.code(y, row, x, col) : p.classes * p.shapes();
        }
    }
}

void check_on_device(const Merging& call) {
    check_cpu(kOp, "class_ids", call.class_ids);
    const float* cost = call.costs.const_data_ptr<float>();
    for (int64_t i = 0; i < call.costs.numel(); ++i) {
        if (!(cost[i] >= 0.0f && cost[i] < std::numeric_limits<float>::infinity())) {
            fail(kOp, ": costs must be finite and at least 0; got ", cost[i]);
        }
    }
}

template <typename T>
void run_merge_regions(const Merging& call, const Merged& out) {
    const T* ids = call.class_ids.const_data_ptr<T>();
    for (int64_t n = 0; n < call.class_ids.size(0); ++n) {
        const int64_t id = static_cast<int64_t>(ids[n]);
        if (id < 0 || id >= call.classes) fail(kOp, ": class_ids must lie in [0, ", call.classes, "); got ", id);
    }
    const Problem problem{.geometry = call.geometry,
                          .merge = call.merge,
                          .levels = call.levels,
                          .classes = call.classes,
                          .promote = call.promote,
                          .costs = call.costs.const_data_ptr<float>(),
                          .codes_y = codes_of(call.geometry.y, call.levels),
                          .codes_x = codes_of(call.geometry.x, call.levels),
                          .executed = out.executed.mutable_data_ptr<int64_t>(),
                          .region = out.region.mutable_data_ptr<int64_t>(),
                          .group = out.group.mutable_data_ptr<int64_t>()};
    parallel(call.blocks(), kBlocksPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t row = block / call.across % call.down, col = block % call.across;
            merge_block(problem, ids, block / call.across / call.down, row * call.merge, col * call.merge);
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "merge_regions", merge_regions); }

}  // namespace fastroute
