// pixel_mlp: each output pixel's MLP, with the first layer's product with the features made once per feature.
// Work mapping: one item per block of output pixels, cut at borders of features; a thread takes the next block when it
// is done with one, because the classes of pixels make some blocks many times dearer than others.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/pixel_axis.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pixel_mlp_plan.h"

#if FASTROUTE_X86
#include <immintrin.h>
#endif

namespace fastroute::pixel_mlp {

#if FASTROUTE_X86
namespace avx512 {
#define FASTROUTE_BYTES 64
#define FASTROUTE_TARGET FASTROUTE_AVX512
#include "cpu/pixel_mlp_block.h"
#include "cpu/simd.h"
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace avx512

namespace avx2 {
#define FASTROUTE_BYTES 32
#define FASTROUTE_TARGET FASTROUTE_AVX2
#include "cpu/pixel_mlp_block.h"
#include "cpu/simd.h"
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace avx2
#endif

namespace baseline {
#define FASTROUTE_BYTES 16
#define FASTROUTE_TARGET
#include "cpu/pixel_mlp_block.h"
#include "cpu/simd.h"
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace baseline

namespace {

constexpr const char* kOp = "pixel_mlp";

// Output pixels of a block: with 80 units of first layer and 3 channels about half a second-level cache at scale 4.
constexpr int64_t kBlockPixels = 8192;
constexpr int64_t kBlockColumns = 1024;

template <typename S, typename T>
void load_as(const char* from, int64_t stride, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(*reinterpret_cast<const S*>(from + i * stride));
}

template <typename S, typename T>
void store_as(const T* from, int64_t count, char* to) {
    std::transform(from, from + count, reinterpret_cast<S*>(to), [](T x) { return static_cast<S>(x); });
}

template <typename T>
Source<T> source_of(const char* name, const Tensor& x) {
    Source<T> source;
    check_cpu(kOp, name, x);
    check_rank(kOp, name, x, 4);
    source.data = static_cast<const char*>(x.const_data_ptr());
    const auto bytes = static_cast<int64_t>(x.element_size());
    for (int64_t d = 0; d < 4; ++d) source.stride[d] = x.stride(d) * bytes;
    dispatch_floating(kOp, x.scalar_type(), [&](auto zero) {
        using S = decltype(zero);
        source.load = load_as<S, T>;
        source.direct = std::is_same_v<S, T> && x.stride(1) == 1;
    });
    return source;
}

// Rows or columns [begin, end) of one axis, cut into blocks of at most `limit` pixels, at borders of features where a
// feature has not more pixels than that itself.
template <typename T>
Axis<T> axis_of(int64_t size, int64_t out, int64_t begin, int64_t end, int64_t limit) {
    const PixelAxis axis{size, out};
    Axis<T> result;
    for (int64_t at = begin; at < end; ++at) {
        const int64_t first = axis.bilinear_first(at);
        result.nearest.push_back(static_cast<int32_t>(axis.nearest(at)));
        result.first.push_back(static_cast<int32_t>(first));
        result.second.push_back(static_cast<int32_t>(std::min(first + 1, size - 1)));
        result.relative.push_back(static_cast<T>(static_cast<double>(axis.relative(at)) / static_cast<double>(out)));
        result.weight.push_back(static_cast<T>(axis.bilinear_weight(at)));
    }
    const int64_t count = end - begin;
    result.cuts.push_back(0);
    for (int64_t at = 0; at < count;) {
        int64_t cut = std::min(at + limit, count);
        if (cut < count) {
            int64_t border = cut;
            while (border > at && result.nearest[border] == result.nearest[border - 1]) --border;
            if (border > at) cut = border;
        }
        int64_t features = 1;
        for (int64_t i = at + 1; i < cut; ++i) features += result.nearest[i] != result.nearest[i - 1];
        result.longest = std::max(result.longest, cut - at);
        result.most_features = std::max(result.most_features, features);
        result.most_sources = std::max<int64_t>(result.most_sources, result.second[cut - 1] - result.first[at] + 1);
        result.cuts.push_back(at = cut);
    }
    return result;
}

// The MLPs as the kernel reads them; `memory` holds the numbers.
template <typename T>
std::vector<Mlp<T>> pack(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                         const std::vector<int64_t>& depths, int64_t dim, double cell_y, double cell_x,
                         std::vector<std::vector<T>>& memory) {
    const auto keep = [&](int64_t count) {
        memory.emplace_back(count, T(0));
        return memory.back().data();
    };
    const auto values = [&](const Tensor& x) {
        const Tensor dense = torch::stable::contiguous(x);
        T* copy = keep(dense.numel());
        dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
            using S = decltype(zero);
            load_as<S, T>(static_cast<const char*>(dense.const_data_ptr()), sizeof(S), dense.numel(), copy);
        });
        return copy;
    };
    std::vector<Mlp<T>> mlps;
    size_t at = 0;
    for (const int64_t depth : depths) {
        Mlp<T> mlp;
        for (int64_t n = 0; n < depth; ++n, ++at) {
            const int64_t out = weights[at].size(0), in = weights[at].size(1);
            const T *weight = values(weights[at]), *bias = values(biases[at]);
            if (n > 0) {
                T* packed = keep(out * in);
                mlp.layers.push_back({in, out, packed, bias});
                for (int64_t u = 0; u < out; u += kUnits) {
                    const int64_t units = std::min(kUnits, out - u);
                    for (int64_t k = 0; k < in; ++k) {
                        for (int64_t i = 0; i < units; ++i) *packed++ = weight[(u + i) * in + k];
                    }
                }
                continue;
            }
            mlp.units = out, mlp.padded = round_up(out, kPad<T>);
            T *feature = keep(dim * mlp.padded), *rel_y = keep(mlp.padded), *rel_x = keep(mlp.padded);
            T* constant = keep(mlp.padded);
            mlp.feature = feature, mlp.rel_y = rel_y, mlp.rel_x = rel_x, mlp.constant = constant;
            for (int64_t u = 0; u < out; ++u) {
                const T* row = weight + u * in;
                for (int64_t d = 0; d < dim; ++d) feature[d * mlp.padded + u] = row[d];
                rel_y[u] = row[dim], rel_x[u] = row[dim + 1];
                constant[u] = static_cast<T>(row[dim + 2] * cell_y + row[dim + 3] * cell_x + bias[u]);
            }
        }
        mlps.push_back(std::move(mlp));
    }
    return mlps;
}

template <typename T>
void run_block(const Problem<T>& p, const Block& block, const std::vector<int64_t>& counts, Workspace<T>& ws) {
    const int64_t cols = block.x1 - block.x0, rows = block.y1 - block.y0;
    const auto number = [](const Axis<T>& axis, int64_t begin, int64_t end, int32_t* which, int32_t* feature) {
        int32_t last = 0;
        for (int64_t i = begin; i < end; ++i) {
            if (i > begin && axis.nearest[i] != axis.nearest[i - 1]) ++last;
            which[i - begin] = last, feature[last] = axis.nearest[i];
        }
        return static_cast<int64_t>(last) + 1;
    };
    const int64_t feature_rows = number(p.y, block.y0, block.y1, ws.row, ws.feature_row);
    const int64_t feature_cols = number(p.x, block.x0, block.x1, ws.col, ws.feature_col);

    // A counting sort by class; places[k] is where the next pixel of class k goes.
    std::vector<int64_t> places(counts.size() + 1, 0);
    for (size_t k = 0; k < counts.size(); ++k) places[k + 1] = places[k] + counts[k];
    std::vector<int64_t> next = places;
    for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < cols; ++x) {
            const uint32_t pixel = static_cast<uint32_t>(y << 16 | x);
            ws.pixels[counts.size() == 1 ? y * cols + x : next[ws.classes[y * cols + x]]++] = pixel;
        }
    }
    const auto run = [&](auto fill, auto one_class) {
        fill(p, block, ws);
        for (size_t k = 0; k < counts.size(); ++k) {
            if (counts[k] == 0 || p.mlps[k].units == 0) continue;
            one_class(p, p.mlps[k], block, ws.pixels + places[k], counts[k], feature_rows * feature_cols, feature_cols,
                      ws);
        }
    };
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) {
        run(avx512::fill_residual<T>, avx512::run_class<T>);
    } else if (active_isa() == Isa::avx2) {
        run(avx2::fill_residual<T>, avx2::run_class<T>);
    } else
#endif
        run(baseline::fill_residual<T>, baseline::run_class<T>);

    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t y = 0; y < rows; ++y) {
            char* to =
                p.out + (((block.image * p.channels + c) * p.rows + block.y0 + y) * p.width + block.x0) * p.out_bytes;
            p.store(ws.out + (c * rows + y) * cols, cols, to);
        }
    }
}

// Copies the classes of a block and counts them; false when one is out of range.
template <typename T>
bool read_classes(const Tensor& map, const Block& block, int64_t first_row, uint8_t* classes,
                  std::vector<int64_t>& counts) {
    const auto limit = static_cast<T>(counts.size() - 1);
    const T* data = map.const_data_ptr<T>() + block.image * map.stride(0);
    bool good = true;
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t y = block.y0; y < block.y1; ++y) {
        const T* row = data + (first_row + y) * map.stride(1);
        for (int64_t x = block.x0; x < block.x1; ++x) {
            const T id = row[x * map.stride(2)];
            good &= id >= 0 && id <= limit;
            const auto known = static_cast<uint8_t>(good ? id : 0);
            *classes++ = known;
            ++counts[known];
        }
    }
    return good;
}

template <typename T>
void run_blocks(const Problem<T>& p, int64_t batch, const std::optional<Tensor>& class_map) {
    const int64_t down = static_cast<int64_t>(p.y.cuts.size()) - 1, across = static_cast<int64_t>(p.x.cuts.size()) - 1;
    const int64_t blocks = batch * down * across;
    std::atomic<int64_t> next{0};
    std::atomic<bool> good{true};
    const int64_t threads = std::min<int64_t>(blocks, torch::stable::get_num_threads());
    parallel(threads, 1, [&](int64_t, int64_t) {
        Workspace<T> ws(p);
        std::vector<int64_t> counts(p.mlps.size());
        for (int64_t item = next++; item < blocks; item = next++) {
            const int64_t row = item / across % down, col = item % across;
            const Block block{item / across / down, p.y.cuts[row], p.y.cuts[row + 1], p.x.cuts[col], p.x.cuts[col + 1]};
            if (!class_map.has_value()) {
                counts[0] = (block.y1 - block.y0) * (block.x1 - block.x0);
            } else {
                const bool bytes = class_map->scalar_type() == ScalarType::Byte;
                const auto read = bytes ? read_classes<uint8_t> : read_classes<int64_t>;
                if (!read(*class_map, block, p.row_begin, ws.classes, counts)) good = false;
            }
            run_block(p, block, counts, ws);
        }
    });
    if (!good) value_error(kOp, ": class_map must lie in [0, ", p.mlps.size(), "), one class per MLP");
}

Tensor pixel_mlp_cpu(const Tensor& features,              // [B, D, h, w]
                     const std::vector<Tensor>& weights,  // [F_out, F_in] each
                     const std::vector<Tensor>& biases,   // [F_out] each
                     const std::vector<int64_t>& depths,  // [K]
                     int64_t height, int64_t width,
                     const std::optional<Tensor>& class_map,  // [B, H, W]
                     const std::optional<Tensor>& residual,   // [B, C, h, w]
                     int64_t row_begin, int64_t row_end) {
    check_rank(kOp, "features", features, 4);
    const int64_t batch = features.size(0), dim = features.size(1), h = features.size(2), w = features.size(3);
    FASTROUTE_CHECK(!depths.empty() && depths.size() <= 256, kOp, ": mlps must hold 1 to 256 MLPs; got ",
                    depths.size());
    int64_t total = 0, channels = residual.has_value() ? residual->size(1) : 0, widest = 1;
    for (const int64_t depth : depths) {
        FASTROUTE_CHECK(depth >= 0, kOp, ": depths must not be negative");
        total += depth;
    }
    FASTROUTE_CHECK(static_cast<int64_t>(weights.size()) == total && weights.size() == biases.size(), kOp,
                    ": depths must add up to the number of layers, ", weights.size());
    if (total > 0) channels = weights.back().size(0);
    int64_t at = 0;
    for (const int64_t depth : depths) {
        for (int64_t n = 0, in = dim + 4; n < depth; ++n, ++at) {
            check_cpu(kOp, "mlps", weights[at]), check_cpu(kOp, "mlps", biases[at]);
            check_rank(kOp, "a weight", weights[at], 2), check_rank(kOp, "a bias", biases[at], 1);
            const int64_t out = weights[at].size(0);
            FASTROUTE_CHECK(weights[at].size(1) == in && biases[at].size(0) == out, kOp, ": layer ", at, " must map ",
                            in, " numbers, its bias as long as its output");
            FASTROUTE_CHECK(out >= 1 && (n + 1 < depth || out == channels), kOp, ": each MLP must end in ", channels,
                            " channels");
            widest = std::max(widest, out), in = out;
        }
    }
    FASTROUTE_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= height && width >= 0, kOp,
                    ": the rows must be ordered and lie in the output");
    FASTROUTE_CHECK(class_map.has_value() || depths.size() == 1, kOp, ": class_map must be given for several MLPs");
    if (class_map.has_value()) {
        check_cpu(kOp, "class_map", *class_map), check_rank(kOp, "class_map", *class_map, 3);
        FASTROUTE_CHECK(class_map->scalar_type() == ScalarType::Byte || class_map->scalar_type() == ScalarType::Long,
                        kOp, ": class_map must be uint8 or int64");
        FASTROUTE_CHECK(class_map->size(0) == batch && class_map->size(1) == height && class_map->size(2) == width, kOp,
                        ": class_map must be [B, H, W]");
    }
    const int64_t size[4] = {batch, channels, row_end - row_begin, width};
    const Tensor out = torch::stable::empty({size, 4}, features.scalar_type(), std::nullopt, features.device());
    if (out.numel() == 0) return out;
    FASTROUTE_CHECK(h > 0 && w > 0, kOp, ": features must have at least one pixel");
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));

    dispatch_floating(kOp, features.scalar_type(), [&](auto zero) {
        using S = decltype(zero);
        using T = Work<S>;
        const int64_t cols = std::min(kBlockColumns, width);
        std::vector<std::vector<T>> memory;
        Problem<T> p{dim,
                     channels,
                     width,
                     row_begin,
                     row_end - row_begin,
                     round_up(widest, kPad<T>),
                     {},
                     {},
                     {},
                     {},
                     {},
                     static_cast<char*>(out.mutable_data_ptr()),
                     sizeof(S),
                     store_as<S, T>};
        p.y = axis_of<T>(h, height, row_begin, row_end, std::max<int64_t>(kBlockPixels / cols, 1));
        p.x = axis_of<T>(w, width, 0, width, cols);
        const auto ratio = [](int64_t small, int64_t large) {
            return 2.0 * static_cast<double>(small) / static_cast<double>(large);
        };
        p.mlps = pack<T>(weights, biases, depths, dim, ratio(h, height), ratio(w, width), memory);
        p.features = source_of<T>("features", features);
        if (residual.has_value()) {
            const Tensor& r = *residual;
            FASTROUTE_CHECK(
                r.dim() == 4 && r.size(0) == batch && r.size(1) == channels && r.size(2) == h && r.size(3) == w, kOp,
                ": residual must be [B, C, h, w], C as the MLPs end in");
            p.residual = source_of<T>("residual", r);
        }
        run_blocks(p, batch, class_map);
    });
    return out;
}

}  // namespace
}  // namespace fastroute::pixel_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { m.impl("pixel_mlp", TORCH_BOX(&pixel_mlp::pixel_mlp_cpu)); }

}  // namespace fastroute
