// merge_regions: least(r) = min(cost of r as one region, Σ least(halves of r)) for every rectangle r of every block of
// merge x merge tiles, from single tiles upwards; then every tile goes down from its block to the rectangle that runs
// whole. A thread stands for a tile; a thread block holds the rectangles of as many blocks of tiles as it has threads
// for in shared memory, and all of one size, 2^y x 2^x tiles, are found at a time.
#include "common/merge_regions.h"

#include <limits>

#include "cuda/launch.h"

namespace fastroute {
namespace {

constexpr int kThreads = 64;  // of the largest block: a tile each
// Rectangles of as many blocks as have kThreads tiles: 225 of one block of 8 x 8, 4 · 49, 16 · 9 or 64 · 1.
constexpr int kRectangles = (2 * kMostMerge - 1) * (2 * kMostMerge - 1);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct MergePlan {
    Geometry geometry;
    int tile_rows, tile_cols;  // of an image
    int down, across;          // blocks of an image
    int64_t blocks;            // of all images
    int levels, classes;
    bool promote;
    const float* costs;                  // [K, S]
    int64_t *executed, *region, *group;  // [N]

    __device__ __forceinline__ int64_t shapes() const { return 4 * levels * levels; }

    // Of the rectangle of 2^y x 2^x tiles whose first is (row, col).
    __device__ __forceinline__ int64_t code(int y, int row, int x, int col) const {
        return side_code(geometry.y, row, y) * 2 * levels + side_code(geometry.x, col, x);
    }
};

// One rectangle of a block.
struct Rectangle {
    float least;
    int highest, lowest, act;
};

// Rectangles of one block of tiles, of those of all sizes.
struct Block {
    Rectangle* rectangles;
    int merge;

    // Rectangle (i, j) of those of 2^y x 2^x tiles.
    __device__ __forceinline__ Rectangle& at(int y, int i, int x, int j) const {
        const int64_t side = stretches(merge);
        return rectangles[stretch(merge, y, i) * side + stretch(merge, x, j)];
    }
};

// Two halves of a rectangle against what it costs so far.
__device__ __forceinline__ void cut(Rectangle& whole, const Rectangle& first, const Rectangle& second, Act act) {
    const float cost = add(first.least, second.least);
    if (cost < whole.least) whole.least = cost, whole.act = act;
}

// Rectangle (i, j) of those of 2^y x 2^x tiles, whose first tile is (row, col); `id` is the class of that tile where it
// is the only one.
__device__ __forceinline__ void join(const MergePlan& plan, const Block& block, int y, int i, int x, int j, int row,
                                     int col, int id) {
    Rectangle here{0.0f, -1, plan.classes, kWhole};
    if (row < plan.tile_rows && col < plan.tile_cols) {
        if (y + x == 0) {
            here.highest = here.lowest = id;
        } else {
            const Rectangle& a = y > 0 ? block.at(y - 1, 2 * i, x, j) : block.at(y, i, x - 1, 2 * j);
            const Rectangle& b = y > 0 ? block.at(y - 1, 2 * i + 1, x, j) : block.at(y, i, x - 1, 2 * j + 1);
            here.highest = max(a.highest, b.highest);
            here.lowest = min(a.lowest, b.lowest);
        }
        here.least = plan.promote || here.highest == here.lowest
                         ? plan.costs[here.highest * plan.shapes() + plan.code(y, row, x, col)]
                         : kInfinity;
        if (y > 0) cut(here, block.at(y - 1, 2 * i, x, j), block.at(y - 1, 2 * i + 1, x, j), kRows);
        if (x > 0) cut(here, block.at(y, i, x - 1, 2 * j), block.at(y, i, x - 1, 2 * j + 1), kCols);
    }
    block.at(y, i, x, j) = here;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_regions_kernel(const T* __restrict__ class_ids,  // [N]
                                                                 MergePlan plan) {
    FASTROUTE_SHARED(Rectangle, rectangles, [kRectangles]);
    const int merge = 1 << (plan.levels - 1), tiles = merge * merge, together = kThreads / tiles;
    const int place = static_cast<int>(threadIdx.x) / tiles, cell = static_cast<int>(threadIdx.x) % tiles;
    const int side = static_cast<int>(stretches(merge));
    const Block block{rectangles + place * side * side, merge};
    const int64_t turns = (plan.blocks + together - 1) / together;
    for (int64_t turn = blockIdx.x; turn < turns; turn += gridDim.x) {
        const int64_t number = turn * together + place, image = number / plan.across / plan.down;
        const int top = static_cast<int>(number / plan.across % plan.down) * merge;
        const int left = static_cast<int>(number % plan.across) * merge;
        const int row = top + cell / merge, col = left + cell % merge;
        const bool inside = number < plan.blocks && row < plan.tile_rows && col < plan.tile_cols;
        const int64_t n = (image * plan.tile_rows + row) * plan.tile_cols + col;
        int id = 0;
        if (inside) {
            // Nothing can raise here: a class out of range becomes the nearest.
            const int64_t given = static_cast<int64_t>(class_ids[n]), last = plan.classes - 1;
            id = static_cast<int>(given < 0 ? 0 : given < last ? given : last);
        }
        for (int y = 0; y < plan.levels; ++y) {
            for (int x = 0; x < plan.levels; ++x) {
                const int i = cell / (merge >> x), j = cell % (merge >> x);
                if (i < merge >> y) join(plan, block, y, i, x, j, top + (i << y), left + (j << x), id);
                __syncthreads();
            }
        }
        if (inside) {
            int y = plan.levels - 1, x = plan.levels - 1;
            const Rectangle* here = &block.at(y, 0, x, 0);
            while (here->act != kWhole) {
                here->act == kRows ? --y : --x;
                here = &block.at(y, (row - top) >> y, x, (col - left) >> x);
            }
            const int first_row = row >> y << y, first_col = col >> x << x;
            const int64_t first = (image * plan.tile_rows + first_row) * plan.tile_cols + first_col;
            plan.executed[n] = here->highest;
            plan.region[n] = first;
            plan.group[n] =
                first == n ? here->highest * plan.shapes() + plan.code(y, row, x, col) : plan.classes * plan.shapes();
        }
        __syncthreads();
    }
}

void check_on_device(const Merging& call) {
    FASTROUTE_CHECK(
        call.geometry.y.size < kMaxBlocks / 2 && call.geometry.x.size < kMaxBlocks / 2 && call.classes < kMaxBlocks,
        kOp, ": the image must be below 2^30 pixels wide, and have fewer than 2^31 classes");
}

template <typename T>
void run_merge_regions(const Merging& call, const Merged& out) {
    const MergePlan plan{.geometry = call.geometry,
                         .tile_rows = static_cast<int>(call.geometry.y.count()),
                         .tile_cols = static_cast<int>(call.geometry.x.count()),
                         .down = static_cast<int>(call.down),
                         .across = static_cast<int>(call.across),
                         .blocks = call.blocks(),
                         .levels = static_cast<int>(call.levels),
                         .classes = static_cast<int>(call.classes),
                         .promote = call.promote,
                         .costs = call.costs.const_data_ptr<float>(),
                         .executed = out.executed.mutable_data_ptr<int64_t>(),
                         .region = out.region.mutable_data_ptr<int64_t>(),
                         .group = out.group.mutable_data_ptr<int64_t>()};
    const Queue queue(kOp, call.class_ids);
    queue.launch(merge_regions_kernel<T>, blocks_for(plan.blocks * call.merge * call.merge, kThreads), kThreads, 0,
                 call.class_ids.const_data_ptr<T>(), plan);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "merge_regions", merge_regions); }

}  // namespace fastroute
