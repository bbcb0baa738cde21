// How the kernels of pixel_mlp are launched: once per call the packed layers and the coordinates of both axes; per
// chunk of output pixels the list of each class's pixels; per class W_1 · feature for every feature, then all further
// layers.
#pragma once

#include "cuda/pixel_mlp_plan.cuh"

namespace fastroute::pixel_mlp {
namespace {

// Blocks of a multiprocessor of kernels that use few registers and little shared memory.
constexpr int64_t kManyBlocks = 8;
constexpr int64_t kReservedShared = 1 << 10;  // bytes of a block's shared memory that the system keeps

template <typename T>
struct Run {
    using W = Work<T>;
    const Queue& queue;
    const Plan<T>& plan;
    const Tensor& features;                  // [B, D, h, w]
    const std::optional<Tensor>& class_map;  // [B, H, W]
    Tensor packed, places;
    Pixels<T> pixels;  // of the whole output, `images` and `height` apart
    PixelAxis y, x;
    int64_t row_begin;
    bool given;  // coordinates are given: a pixel may read a feature beside its nearest

    // All layers' numbers, in the kernels' order.
    template <typename As, bool Fragments>
    void pack(std::vector<PackedLayer> layers) const {
        const auto move = [&](void*& offset) {
            offset = data_at<char>(packed, static_cast<int64_t>(reinterpret_cast<intptr_t>(offset)));
        };
        for (PackedLayer& layer : layers) {
            move(layer.to), move(layer.vector), move(layer.rel[0]), move(layer.rel[1]);
            if (layer.entry != nullptr) move(layer.entry);
        }
        for (size_t begin = 0; begin < layers.size(); begin += kPackLayers) {
            const size_t count = std::min<size_t>(layers.size() - begin, kPackLayers);
            PackedLayers part{};
            std::copy_n(layers.begin() + static_cast<int64_t>(begin), count, part.layers);
            queue.launch(pixel_mlp_pack_kernel<As, Fragments>, static_cast<int64_t>(count) * kPackBlocks, kPackThreads,
                         0, part);
        }
    }

    void prepare(int64_t rows, const W* relative /* [H + W], or null: exact */) {
        pack<W, false>(plan.plain);
        if constexpr (sizeof(T) <= 4) pack<T, true>(plan.fragments);
        Place<W>* const to = data_at<Place<W>>(places);
        const auto axis = [&](const PixelAxis& a, const W* values, int64_t begin, int64_t count, Place<W>* at) {
            queue.launch(pixel_mlp_axis_kernel<W>, blocks_for(count, kPackThreads), kPackThreads, 0, a, values, begin,
                         count, at);
        };
        axis(y, relative, row_begin, rows, to), axis(x, given ? relative + y.out : nullptr, 0, x.out, to + rows);
        pixels.rows = to, pixels.cols = to + rows;
    }

    // Output rows [row, row + height) of `images` images, counted from those that are asked for.
    void chunk(int64_t image, int64_t images, int64_t row, int64_t height) const {
        Pixels<T> p = pixels;
        p.images = static_cast<uint32_t>(images), p.height = static_cast<uint32_t>(height);
        p.rows += row, p.out += image * p.out_image + row * p.width;
        if (p.residual != nullptr) p.residual += image * p.residual_stride[0];
        const int64_t beside = given ? 1 : 0, top = std::max<int64_t>(y.nearest(row_begin + row) - beside, 0);
        const int64_t bottom = std::min(y.nearest(row_begin + row + height - 1) + beside, y.size - 1);
        p.feature_row = static_cast<int32_t>(top);
        p.feature_rows = static_cast<int32_t>(bottom - top + 1);
        const uint32_t count = p.count(), classes = static_cast<uint32_t>(plan.classes.size());

        ClassMap map{};
        FreeClasses free{};
        for (uint32_t k = 0; k < classes; ++k) {
            if (plan.classes[k].kind == Kind::free) free.bits[k / 32] |= 1u << k % 32;
        }
        Tensor sorted;
        uint32_t *starts = nullptr, *list = nullptr;
        if (class_map.has_value()) {
            const Tensor& m = *class_map;
            const int64_t place = image * m.stride(0) + (row_begin + row) * m.stride(1);
            const bool dense =
                m.stride(2) == 1 && m.stride(1) == p.width && (images == 1 || m.stride(0) == m.stride(1) * height);
            map = {
                .data = static_cast<const char*>(m.const_data_ptr()) + place * static_cast<int64_t>(m.element_size()),
                .stride = {m.stride(0), m.stride(1), m.stride(2)},
                .bytes = m.scalar_type() == ScalarType::Byte,
                .linear = dense,
                .height = p.height,
                .width = p.width,
                .classes = classes};
            const int64_t blocks = blocks_for(count, kSortPixels);
            sorted = device_buffer((classes * (blocks + 2) + 1 + count) * sizeof(uint32_t), features);
            uint32_t* const counts = data_at<uint32_t>(sorted);
            uint32_t* const totals = counts + classes * blocks;
            starts = totals + classes, list = starts + classes + 1;
            queue.launch(pixel_mlp_count_kernel, blocks, kSortThreads, 0, map, count, counts);
            queue.launch(pixel_mlp_scan_kernel, classes, kSortThreads, 0, static_cast<uint32_t>(blocks), counts,
                         totals);
            queue.launch(pixel_mlp_scatter_kernel, blocks, kSortThreads, 0, map, count, counts, totals, starts, list);
        }
        if (class_map.has_value() || free.bits[0] != 0) {
            queue.launch(pixel_mlp_free_kernel<T>, blocks_for(count, kSortThreads), kSortThreads, 0, p, map, free);
        }
        int64_t widest = 0;
        for (const ClassPlan<T>& c : plan.classes) widest = std::max<int64_t>(widest, c.padded);
        if (widest == 0) return;
        const int64_t feature_count = images * p.feature_rows * p.feature_cols;
        const Tensor first = device_buffer(feature_count * widest * sizeof(W), features);
        for (uint32_t k = 0; k < classes; ++k) {
            const Members members{list, starts == nullptr ? nullptr : starts + k, count};
            if (plan.classes[k].kind != Kind::free) one_class(plan.classes[k], p, members, image, data_at<W>(first));
        }
    }

    void one_class(const ClassPlan<T>& c, const Pixels<T>& p, const Members& members, int64_t image, W* first) const {
        const auto numbers = [&](int64_t offset) { return data_at<W>(packed, offset); };
        FirstLayer<T> f{};
        const auto aligned = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
        for (int64_t d = 0; d < 4; ++d) f.stride[d] = features.stride(d);
        f.features =
            static_cast<const T*>(features.const_data_ptr()) + image * f.stride[0] + p.feature_row * f.stride[2];
        f.wide = f.stride[1] == 1 && aligned(f.stride[0]) && aligned(f.stride[2]) && aligned(f.stride[3]) &&
                 reinterpret_cast<uintptr_t>(f.features) % 16 == 0;
        f.images = p.images, f.rows = static_cast<uint32_t>(p.feature_rows);
        f.cols = static_cast<uint32_t>(p.feature_cols);
        f.dim = static_cast<int32_t>(features.size(1)), f.padded_in = static_cast<int32_t>(round_up(f.dim, 16));
        f.units = c.units, f.padded_out = c.padded;
        f.weight = data_at<char>(packed, c.first_weight), f.constant = numbers(c.constant);
        f.to = first, f.members = members;
        const int64_t count = p.count();
        if constexpr (sizeof(T) <= 4) {
            if (c.fragments) {
                const auto kernel =
                    c.kind == Kind::mma ? pixel_mlp_first_mma_kernel<T, true> : pixel_mlp_first_mma_kernel<T, false>;
                queue.launch(kernel, blocks_for(f.count(), kFirstTile), kThreads, 0, f);
            }
            if (c.kind == Kind::mma) {
                const MmaTask<T> task{.pixels = p,
                                      .members = members,
                                      .first = first,
                                      .image = data_at<char>(packed, c.image),
                                      .layout = c.layout};
                return c.resident ? launch_mma<true>(c, task, count) : launch_mma<false>(c, task, count);
            }
        }
        constexpr int few = sizeof(W) == 8 ? 2 : 4, many = sizeof(W) == 8 ? 2 : 8;
        if (!c.fragments) {
            queue.launch(pixel_mlp_first_kernel<T, many>, blocks_for(f.count(), kGroups * many), kThreads, 0, f);
        }
        const SimtTask<T> task{.pixels = p,
                               .members = members,
                               .first = first,
                               .rel_y = numbers(c.rel_y),
                               .rel_x = numbers(c.rel_x),
                               .units = c.padded,
                               .widest = c.widest,
                               .depth = c.depth - 1,
                               .layers = data_at<SimtLayer<W>>(packed, c.table)};
        const int64_t most = kManyBlocks * queue.multiprocessors();
        if (c.kind == Kind::linear) {
            const int64_t blocks = std::min(blocks_for(count, kThreads), most);
            return queue.launch(pixel_mlp_linear_kernel<T>, blocks, kThreads, 0, task);
        }
        const auto launch = [&](auto kernel, int64_t tile) {
            const int64_t bytes = 2 * c.widest * tile * static_cast<int64_t>(sizeof(W));
            queue.launch(kernel, std::min(blocks_for(count, tile), most), kThreads, bytes, task);
        };
        // 96 KiB are what any device gives to a block.
        if (2 * c.widest * kGroups * many * static_cast<int64_t>(sizeof(W)) <= 96 << 10) {
            launch(pixel_mlp_simt_kernel<T, many>, kGroups * many);
        } else {
            launch(pixel_mlp_simt_kernel<T, few>, kGroups * few);
        }
    }

    template <bool Resident>
    void launch_mma(const ClassPlan<T>& c, const MmaTask<T>& task, int64_t count) const {
        const int steps = kSteps<T> * c.layout.tiles, warps = mma_warps(steps);
        const int64_t bytes = mma_shared_bytes(c), pixels = 16 * mma_rows(steps) * warps;
        // A multiprocessor has what one block may use and its reserve, and takes the reserve of every block from it.
        const int64_t room = (queue.max_shared_bytes() + kReservedShared) / (bytes + kReservedShared);
        const int64_t fitting = std::clamp<int64_t>(room, 1, mma_blocks(steps));
        const int64_t blocks = std::min(blocks_for(count, pixels), fitting * queue.multiprocessors());
        const auto launch = [&]<int... Tiles>(std::integer_sequence<int, Tiles...>) {
            const auto one = [&]<int N>(std::integral_constant<int, N>) {
                if constexpr (has_kernel<T>(N, Resident)) {
                    if (c.layout.tiles == N) {
                        queue.launch(pixel_mlp_mma_kernel<T, N, Resident>, blocks, 32 * warps, bytes, task);
                    }
                }
            };
            (one(std::integral_constant<int, Tiles>{}), ...);
        };
        launch(std::integer_sequence<int, 1, 2, 3, 4, 5, 6, 8, 12, 16>{});
    }
};

}  // namespace
}  // namespace fastroute::pixel_mlp
