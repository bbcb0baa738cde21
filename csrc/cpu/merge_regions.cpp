// merge_regions: least(r) = min(cost of r as one region, Σ least(halves of r)) for every rectangle r of every block of
// merge x merge tiles, from single tiles upwards; then every tile goes down from its block to the rectangle that runs
// whole. Rows of blocks are divided among the threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/merge_regions.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

using namespace regions;

constexpr const char* kOp = "merge_regions";
constexpr int64_t kMostRectangles = (2 * kMostMerge - 1) * (2 * kMostMerge - 1);
// A block of 4 x 4 tiles takes a microsecond.
constexpr int64_t kBlocksPerThread = 64;

struct Problem {
    TileGrid grid;
    int64_t merge, levels, classes;
    bool promote;
    const float* costs;                     // [K, S]
    std::vector<int64_t> codes_y, codes_x;  // [levels, tiles], of the stretch that holds a tile
    int64_t *executed, *region, *group;     // [N]

    int64_t shapes() const { return 4 * levels * levels; }
    int64_t code(int64_t y, int64_t row, int64_t x, int64_t col) const {
        return codes_y[y * grid.y.count() + row] * 2 * levels + codes_x[x * grid.x.count() + col];
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

// The block of image `image` whose first tile is (top, left).
template <typename T>
void merge_block(const Problem& p, const T* ids, int64_t image, int64_t top, int64_t left) {
    Rectangle rectangles[kMostRectangles];
    const int64_t rows = p.grid.y.count(), cols = p.grid.x.count(), side = stretches(p.merge);
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

std::tuple<Tensor, Tensor, Tensor> merge_regions_cpu(const Tensor& class_ids,  // [N]
                                                     const Tensor& costs,      // [K, S]
                                                     int64_t height, int64_t width, int64_t patch, int64_t stride,
                                                     bool crop, int64_t merge, bool promote) {
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop);
    const int64_t images = checked_blocks(kOp, class_ids, costs, grid, merge);
    check_cpu(kOp, "class_ids", class_ids);
    const Tensor dense = as_contiguous(class_ids), table = as_contiguous(costs);
    const int64_t count = dense.size(0), classes = table.size(0);
    const float* cost = table.const_data_ptr<float>();
    for (int64_t i = 0; i < table.numel(); ++i) {
        if (!(cost[i] >= 0.0f && cost[i] < std::numeric_limits<float>::infinity())) {
            fail(kOp, ": costs must be finite and at least 0; got ", cost[i]);
        }
    }
    const auto make = [&] { return empty_tensor(kOp, "the indices", {count}, ScalarType::Long, class_ids); };
    const Tensor executed = make(), region = make(), group = make();
    const int64_t levels = levels_of(merge);
    const Problem problem{.grid = grid,
                          .merge = merge,
                          .levels = levels,
                          .classes = classes,
                          .promote = promote,
                          .costs = cost,
                          .codes_y = codes_of(grid.y, levels),
                          .codes_x = codes_of(grid.x, levels),
                          .executed = executed.mutable_data_ptr<int64_t>(),
                          .region = region.mutable_data_ptr<int64_t>(),
                          .group = group.mutable_data_ptr<int64_t>()};
    const int64_t down = (grid.y.count() + merge - 1) / merge, across = (grid.x.count() + merge - 1) / merge;
    dispatch_index(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        const T* ids = dense.const_data_ptr<T>();
        for (int64_t n = 0; n < count; ++n) {
            const int64_t id = static_cast<int64_t>(ids[n]);
            if (id < 0 || id >= classes) fail(kOp, ": class_ids must lie in [0, ", classes, "); got ", id);
        }
        parallel(images * down * across, kBlocksPerThread, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t row = block / across % down, col = block % across;
                merge_block(problem, ids, block / across / down, row * merge, col * merge);
            }
        });
    });
    return {executed, region, group};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "merge_regions", merge_regions_cpu); }

}  // namespace fastroute
