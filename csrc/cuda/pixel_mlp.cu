// pixel_mlp: each output pixel's MLP, with the first layer's product with the features made once per feature. Per chunk
// of output pixels and class: the pixels of the class are listed, its first layer is applied to all features, and a
// persistent kernel, which reads the length of the list on the device, takes its pixels through the other layers.
#include "cuda/pixel_mlp_run.cuh"

namespace fastroute::pixel_mlp {
namespace {

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
    const Sizes sizes =
        checked_sizes(features, weights, biases, depths, height, width, class_map, residual, row_begin, row_end);
    const std::optional<Tensor> given = checked_relative(relative, features, sizes);
    const Tensor out = empty_output(features, sizes);
    if (out.numel() == 0) return out;
    constexpr int64_t longest = int64_t{1} << 30;  // of an axis: coordinates are 32-bit
    FASTROUTE_CHECK(std::max({sizes.h, sizes.w, height, width}) <= longest, kOp, ": no side may exceed ", longest);
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
    FASTROUTE_IMPL(m, "pixel_mlp", pixel_mlp::pixel_mlp_cuda);
    FASTROUTE_IMPL(m, "pixel_mlp.tf32", pixel_mlp::pixel_mlp_tf32_cuda);
}

}  // namespace fastroute
