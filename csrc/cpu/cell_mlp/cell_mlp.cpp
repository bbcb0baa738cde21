// cell_mlp: out[b, y, j] = (1 / span) Σ_x f(cell (y, x) of image b), x in [start_j, start_j + span),
// start_j = min(j · step, cols - span), f a chain of layers with a leaky rectifier behind each.
// Work mapping: one item per block of rows of cells; tiles of cells go through all layers inside the caches, across the
// ends of rows, and are added to their windows from the left to the right.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/pixel.h"
#include "cpu/cell_mlp/plan.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::cell_mlp {

#define FASTROUTE_BODY "cpu/cell_mlp/tile.h"
#include "cpu/each_isa.h"

namespace {

constexpr const char* kOp = "cell_mlp";
// Cells of a block: its last tile may be filled in part, and a block's sums stay in the second-level cache.
constexpr int64_t kBlockCells = 16 * kTile;
// Units are padded to whole vectors of the widest instruction set.
template <typename T>
constexpr int64_t kPad = 64 / static_cast<int64_t>(sizeof(T));

template <typename T>
int64_t padded(int64_t units) {
    return (units + kPad<T> - 1) / kPad<T> * kPad<T>;
}

// The kernels of one instruction set.
template <typename T>
struct Kernels {
    void (*run_block)(const Problem<T>& p, const char* image, int64_t row, int64_t rows, Workspace<T>& ws);
    decltype(Problem<T>::read) read;

    template <typename S>
    static Kernels active() {
#if FASTROUTE_X86
        if (active_isa() == Isa::avx512) return {avx512::run_block<T>, avx512::read_cells<S, T>};
        if (active_isa() == Isa::avx2) return {avx2::run_block<T>, avx2::read_cells<S, T>};
#endif
        return {baseline::run_block<T>, baseline::read_cells<S, T>};
    }
};

// The values of a dense tensor of any floating type.
template <typename T>
std::vector<T> values(const Tensor& x) {
    const Tensor dense = as_contiguous(x);
    std::vector<T> copy(dense.numel());
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
        using S = decltype(zero);
        const S* from = dense.const_data_ptr<S>();
        std::transform(from, from + copy.size(), copy.begin(), [](S value) { return static_cast<T>(value); });
    });
    return copy;
}

void check(const Tensor& image,                 // [B, C, H, W]
           const std::vector<Tensor>& weights,  // [F_out, F_in] each
           const std::vector<Tensor>& biases,   // [F_out] each
           double slope, int64_t cell, int64_t span, int64_t step) {
    FASTROUTE_CHECK(std::abs(slope) <= std::numeric_limits<float>::max(), kOp,
                    ": slope must be a number of float32; got ", slope);
    check_cpu(kOp, "image", image), check_rank(kOp, "image", image, 4);
    check_at_least(kOp, "cell", cell, 1), check_at_least(kOp, "span", span, 1), check_at_least(kOp, "step", step, 1);
    checked_product(kOp, "a cell", {image.size(1), cell, cell});
    FASTROUTE_CHECK(image.size(2) % cell == 0 && image.size(3) % cell == 0 && image.size(3) / cell >= span, kOp,
                    ": image must hold whole cells, at least span of them in a row");
    constexpr int64_t kMostCells = int64_t{1} << 31;  // windows of a row are counted in 32 bits
    FASTROUTE_CHECK(image.size(3) / cell < kMostCells, kOp, ": image must have less than 2^31 cells in a row");
    FASTROUTE_CHECK(!weights.empty() && weights.size() == biases.size(), kOp,
                    ": layers must hold at least one weight, and as many biases");
    int64_t in = image.size(1) * cell * cell;
    for (size_t n = 0; n < weights.size(); ++n) {
        check_cpu(kOp, "layers", weights[n]), check_cpu(kOp, "layers", biases[n]);
        check_rank(kOp, "a weight", weights[n], 2), check_rank(kOp, "a bias", biases[n], 1);
        FASTROUTE_CHECK(weights[n].size(1) == in && biases[n].size(0) == weights[n].size(0) && biases[n].size(0) >= 1,
                        kOp, ": layer ", n, " must map ", in, " numbers, its bias as long as its output");
        FASTROUTE_CHECK(
            weights[n].scalar_type() == weights[0].scalar_type() && biases[n].scalar_type() == weights[0].scalar_type(),
            kOp, ": all layers must be of one dtype");
        in = weights[n].size(0);
    }
}

template <typename T>
void run_blocks(const Problem<T>& p, const Kernels<T>& kernels, const Tensor& image, Tensor& out, int64_t units) {
    const auto* pixels = static_cast<const char*>(image.const_data_ptr());
    const auto image_bytes = p.stride[0] * static_cast<int64_t>(image.element_size());
    const int64_t block_rows = std::clamp<int64_t>(kBlockCells / p.cols, 1, p.rows);
    const int64_t down = (p.rows + block_rows - 1) / block_rows, blocks = image.size(0) * down;
    in_turn(blocks, [&](const auto& next) {
        Workspace<T> ws(p, block_rows);
        for (int64_t item = next(); item < blocks; item = next()) {
            const int64_t b = item / down, row = item % down * block_rows, rows = std::min(block_rows, p.rows - row);
            kernels.run_block(p, pixels + b * image_bytes, row, rows, ws);
            dispatch_floating(kOp, out.scalar_type(), [&](auto zero) {
                using S = decltype(zero);
                S* to = out.mutable_data_ptr<S>() + (b * p.rows + row) * p.windows * units;
                for (int64_t i = 0; i < rows * p.windows; ++i, to += units) {
                    const T* sum = ws.sums + i * p.padded;
                    for (int64_t u = 0; u < units; ++u) to[u] = static_cast<S>(sum[u] / static_cast<T>(p.span));
                }
            });
        }
    });
}

Tensor cell_mlp(const Tensor& image,                 // [B, C, H, W]
                const std::vector<Tensor>& weights,  // [F_out, F_in] each
                const std::vector<Tensor>& biases,   // [F_out] each
                double slope, int64_t cell, int64_t span, int64_t step) {
    check(image, weights, biases, slope, cell, span, step);
    const int64_t rows = image.size(2) / cell, cols = image.size(3) / cell;
    // A step beyond the last window is one to it.
    step = std::min(step, std::max<int64_t>(cols - span, 1));
    const int64_t windows = (cols - span + step - 1) / step + 1, units = weights.back().size(0);
    Tensor out =
        empty_tensor(kOp, "the windows", {image.size(0), rows, windows, units}, weights[0].scalar_type(), image);
    if (out.numel() == 0) return out;

    dispatch_floating(kOp, weights[0].scalar_type(), [&](auto zero) {
        using T = Work<decltype(zero)>;
        Problem<T> p{.channels = image.size(1),
                     .cell = cell,
                     .span = span,
                     .rows = rows,
                     .cols = cols,
                     .windows = windows,
                     .padded = padded<T>(units),
                     .widest = image.size(1) * cell * cell,
                     .slope = static_cast<T>(slope),
                     .layers = {},
                     .first = {},
                     .last = {},
                     .stride = {image.stride(0), image.stride(1), image.stride(2), image.stride(3)},
                     .read = nullptr};
        std::vector<std::vector<T>> memory;
        for (size_t n = 0; n < weights.size(); ++n) {
            const int64_t fan_out = weights[n].size(0), fan_in = weights[n].size(1);
            memory.emplace_back(packed_size(fan_out, fan_in));
            T* packed = memory.back().data();
            pack_layer(values<T>(weights[n]).data(), fan_out, fan_in, false, packed);
            memory.push_back(values<T>(biases[n]));
            p.layers.push_back({fan_in, fan_out, packed, memory.back().data()});
            p.widest = std::max(p.widest, padded<T>(fan_out));
        }
        for (int64_t x = 0; x < cols; ++x) {
            const auto start = [&](int64_t j) { return std::min(j * step, cols - span); };
            int32_t first = x > 0 ? p.first.back() : 0, last = x > 0 ? p.last.back() : 0;
            while (first < windows && start(first) + span <= x) ++first;
            while (last < windows && start(last) <= x) ++last;
            p.first.push_back(first), p.last.push_back(last);
        }
        dispatch_image(kOp, image.scalar_type(), [&](auto pixel) {
            const auto kernels = Kernels<T>::template active<decltype(pixel)>();
            p.read = kernels.read;
            run_blocks(p, kernels, image, out, units);
        });
    });
    return out;
}

}  // namespace
}  // namespace fastroute::cell_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "cell_mlp", cell_mlp::cell_mlp); }

}  // namespace fastroute
