// pixel_mlp: each output pixel's MLP, with the first layer's product with the features made once per feature. Per chunk
// of output pixels and class: the pixels of the class are listed, its first layer is applied to all features, and a
// persistent kernel, which reads the length of the list on the device, takes its pixels through the other layers.
#include "cuda/pixel_mlp_run.cuh"

namespace fastroute::pixel_mlp {
namespace {

// The sizes of one call.
struct Sizes {
    int64_t batch, dim, h, w, channels;
    int64_t height, width, row_begin, rows;
};

// Checks the layers; returns C.
int64_t check_layers(const Tensor& features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                     const std::vector<int64_t>& depths, const std::optional<Tensor>& residual) {
    FASTROUTE_CHECK(!depths.empty() && depths.size() <= 256, kOp, ": mlps must hold 1 to 256 MLPs; got ",
                    depths.size());
    int64_t total = 0, channels = residual.has_value() ? residual->size(1) : 0;
    for (const int64_t depth : depths) {
        FASTROUTE_CHECK(depth >= 0, kOp, ": depths must not be negative");
        total += depth;
    }
    FASTROUTE_CHECK(static_cast<int64_t>(weights.size()) == total && weights.size() == biases.size(), kOp,
                    ": depths must add up to the number of layers, ", weights.size());
    if (total > 0) channels = weights.back().size(0);
    int64_t at = 0;
    for (const int64_t depth : depths) {
        for (int64_t n = 0, in = features.size(1) + 4; n < depth; ++n, ++at) {
            check_same_device(kOp, "mlps", weights[at], features), check_same_device(kOp, "mlps", biases[at], features);
            check_rank(kOp, "a weight", weights[at], 2), check_rank(kOp, "a bias", biases[at], 1);
            const int64_t out = weights[at].size(0);
            FASTROUTE_CHECK(weights[at].size(1) == in && biases[at].size(0) == out, kOp, ": layer ", at, " must map ",
                            in, " numbers, its bias as long as its output");
            FASTROUTE_CHECK(1 <= out && out <= 256, kOp, ": layer ", at, " must have 1 to 256 rows; got ", out);
            FASTROUTE_CHECK(n + 1 < depth || out == channels, kOp, ": each MLP must end in ", channels, " channels");
            in = out;
        }
    }
    return channels;
}

template <typename T>
void run(const Sizes& s, const Tensor& features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
         const std::vector<int64_t>& depths, const std::optional<Tensor>& class_map,
         const std::optional<Tensor>& residual, const std::optional<Tensor>& relative, bool tf32, const Tensor& out) {
    using W = Work<T>;
    const Queue queue(kOp, features);
    const W* given = relative.has_value() ? static_cast<const W*>(relative->const_data_ptr()) : nullptr;
    const auto ratio = [](int64_t small, int64_t large) {
        return 2.0 * static_cast<double>(small) / static_cast<double>(large);
    };
    const Plan<T> plan = plan_of<T>(weights, biases, depths, s.dim, s.channels, ratio(s.h, s.height),
                                    ratio(s.w, s.width), tf32, queue.max_shared_bytes());
    Pixels<T> pixels{};
    pixels.width = static_cast<uint32_t>(s.width), pixels.feature_cols = static_cast<int32_t>(s.w);
    pixels.source_rows = static_cast<int32_t>(s.h), pixels.source_cols = static_cast<int32_t>(s.w);
    pixels.out = static_cast<T*>(out.mutable_data_ptr()), pixels.channels = static_cast<int32_t>(s.channels);
    pixels.out_channel = s.rows * s.width, pixels.out_image = s.channels * pixels.out_channel;
    if (residual.has_value()) {
        pixels.residual = static_cast<const T*>(residual->const_data_ptr());
        for (int64_t d = 0; d < 4; ++d) pixels.residual_stride[d] = residual->stride(d);
    }
    Run<T> call{queue,
                plan,
                features,
                class_map,
                device_buffer(plan.bytes, features),
                device_buffer((s.rows + s.width) * static_cast<int64_t>(sizeof(Place<W>)), features),
                pixels,
                {s.h, s.height},
                {s.w, s.width},
                s.row_begin,
                given != nullptr};
    call.prepare(s.rows, given);

    // As many rows as neither their pixels nor the features between them are too many, then as many images.
    const int64_t most = std::min(kChunkPixels / s.width, kChunkPixels / s.w * s.height / s.h);
    const int64_t height = std::clamp<int64_t>(most, 1, s.rows);
    const int64_t area = std::max(s.width * height, s.w * (height * s.h / s.height + 4));
    const int64_t images = height < s.rows ? 1 : std::clamp<int64_t>(kChunkPixels / area, 1, s.batch);
    for (int64_t image = 0; image < s.batch; image += images) {
        for (int64_t row = 0; row < s.rows; row += height) {
            call.chunk(image, std::min(images, s.batch - image), row, std::min(height, s.rows - row));
        }
    }
}

Tensor pixel_mlp(const Tensor& features,              // [B, D, h, w]
                 const std::vector<Tensor>& weights,  // [F_out, F_in] each
                 const std::vector<Tensor>& biases,   // [F_out] each
                 const std::vector<int64_t>& depths,  // [K]
                 int64_t height, int64_t width,
                 const std::optional<Tensor>& class_map,  // [B, H, W]
                 const std::optional<Tensor>& residual,   // [B, C, h, w]
                 const std::optional<Tensor>& relative,   // [H + W]
                 int64_t row_begin, int64_t row_end, bool tf32) {
    check_rank(kOp, "features", features, 4);
    const int64_t batch = features.size(0), h = features.size(2), w = features.size(3);
    if (residual.has_value()) {
        check_same_device(kOp, "residual", *residual, features), check_rank(kOp, "residual", *residual, 4);
        FASTROUTE_CHECK(residual->scalar_type() == features.scalar_type(), kOp,
                        ": residual must have the dtype of features");
    }
    const int64_t channels = check_layers(features, weights, biases, depths, residual);
    FASTROUTE_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= height && width >= 0, kOp,
                    ": the rows must be ordered and lie in the output");
    FASTROUTE_CHECK(class_map.has_value() || depths.size() == 1, kOp, ": class_map must be given for several MLPs");
    if (class_map.has_value()) {
        check_same_device(kOp, "class_map", *class_map, features), check_rank(kOp, "class_map", *class_map, 3);
        FASTROUTE_CHECK(class_map->scalar_type() == ScalarType::Byte || class_map->scalar_type() == ScalarType::Long,
                        kOp, ": class_map must be uint8 or int64");
        FASTROUTE_CHECK(class_map->size(0) == batch && class_map->size(1) == height && class_map->size(2) == width, kOp,
                        ": class_map must be [B, H, W]");
    }
    if (residual.has_value()) {
        const Tensor& r = *residual;
        FASTROUTE_CHECK(r.size(0) == batch && r.size(1) == channels && r.size(2) == h && r.size(3) == w, kOp,
                        ": residual must be [B, C, h, w], C as the MLPs end in");
    }
    std::optional<Tensor> given;
    if (relative.has_value()) {
        check_same_device(kOp, "relative", *relative, features), check_rank(kOp, "relative", *relative, 1);
        const auto sums = features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
        FASTROUTE_CHECK(relative->scalar_type() == sums && relative->size(0) == height + width, kOp,
                        ": relative must be [H + W], of the type of the sums");
        given = torch::stable::contiguous(*relative);
    }
    const int64_t size[4] = {batch, channels, row_end - row_begin, width};
    const Tensor out = torch::stable::empty({size, 4}, features.scalar_type(), std::nullopt, features.device());
    if (out.numel() == 0) return out;
    FASTROUTE_CHECK(h > 0 && w > 0, kOp, ": features must have at least one pixel");
    constexpr int64_t longest = int64_t{1} << 30;  // of an axis: coordinates are 32-bit
    FASTROUTE_CHECK(std::max({h, w, height, width}) <= longest, kOp, ": no side may exceed ", longest);
    const Sizes sizes{batch, features.size(1), h, w, channels, height, width, row_begin, row_end - row_begin};
    dispatch_floating(kOp, features.scalar_type(), [&](auto zero) {
        run<decltype(zero)>(sizes, features, weights, biases, depths, class_map, residual, given, tf32, out);
    });
    return out;
}

Tensor pixel_mlp_cuda(const Tensor& features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::vector<int64_t>& depths, int64_t height, int64_t width,
                      const std::optional<Tensor>& class_map, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& relative, int64_t row_begin, int64_t row_end) {
    return pixel_mlp(features, weights, biases, depths, height, width, class_map, residual, relative, row_begin,
                     row_end, false);
}

// The products of float32 layers may be made as TF32.
Tensor pixel_mlp_tf32_cuda(const Tensor& features, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& biases, const std::vector<int64_t>& depths, int64_t height,
                           int64_t width, const std::optional<Tensor>& class_map, const std::optional<Tensor>& residual,
                           const std::optional<Tensor>& relative, int64_t row_begin, int64_t row_end) {
    return pixel_mlp(features, weights, biases, depths, height, width, class_map, residual, relative, row_begin,
                     row_end, true);
}

}  // namespace
}  // namespace fastroute::pixel_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    m.impl("pixel_mlp", TORCH_BOX(&pixel_mlp::pixel_mlp_cuda));
    m.impl("pixel_mlp.tf32", TORCH_BOX(&pixel_mlp::pixel_mlp_tf32_cuda));
}

}  // namespace fastroute
