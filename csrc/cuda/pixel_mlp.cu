// pixel_mlp: y = residual + W_n relu(... relu(W_1 [feature | rel | cell] + b_1) ...) + b_n for each output pixel, by
// the MLP of its class, with W_1 · feature made once per feature. Per chunk of output pixels and class: the pixels of
// the class are listed, its first layer is applied to all features, and a persistent kernel, which reads the length of
// the list on the device, takes its pixels through the other layers.
#include "common/pixel_mlp.h"

#include "cuda/pixel_mlp_run.cuh"

namespace fastroute::pixel_mlp {
namespace {

// Of a chunk of output pixels: rows of one image, or whole images.
struct Chunk {
    int64_t images, height;

    // As many rows as neither their pixels nor the features between them are too many, then as many images.
    explicit Chunk(const Sizes& s) {
        const int64_t most = std::min(kChunkPixels / s.width, kChunkPixels / s.w * s.height / s.h);
        height = std::clamp<int64_t>(most, 1, s.rows);
        const int64_t area = std::max(s.width * height, s.w * (height * s.h / s.height + 4));
        images = height < s.rows ? 1 : std::clamp<int64_t>(kChunkPixels / area, 1, s.batch);
    }
};

template <typename T>
Pixels<T> pixels_of(const Call& call, const Tensor& out) {
    const Sizes& s = call.sizes;
    Pixels<T> pixels{};
    pixels.width = static_cast<uint32_t>(s.width), pixels.feature_cols = static_cast<int32_t>(s.w);
    pixels.source_rows = static_cast<int32_t>(s.h), pixels.source_cols = static_cast<int32_t>(s.w);
    pixels.out = static_cast<T*>(out.mutable_data_ptr()), pixels.channels = static_cast<int32_t>(s.channels);
    pixels.out_channel = s.rows * s.width, pixels.out_image = s.channels * pixels.out_channel;
    if (call.residual.has_value()) {
        pixels.residual = static_cast<const T*>(call.residual->const_data_ptr());
        for (int64_t d = 0; d < 4; ++d) pixels.residual_stride[d] = call.residual->stride(d);
    }
    return pixels;
}

template <typename T>
void run_pixel_mlp(const Call& call, const Tensor& out) {
    using W = Work<T>;
    const Sizes& s = call.sizes;
    constexpr int64_t longest = int64_t{1} << 30;  // of an axis: coordinates are 32-bit
    FASTROUTE_CHECK(std::max({s.h, s.w, s.height, s.width}) <= longest, kOp, ": no side may exceed ", longest);
    const Queue queue(kOp, call.features);
    const W* given = call.relative.has_value() ? static_cast<const W*>(call.relative->const_data_ptr()) : nullptr;
    const Plan<T> plan = plan_of<T>(call, queue.max_shared_bytes());
    Run<T> run{.queue = queue,
               .plan = plan,
               .features = call.features,
               .class_map = call.class_map,
               .packed = device_buffer(plan.bytes, call.features),
               .places = device_buffer((s.rows + s.width) * static_cast<int64_t>(sizeof(Place<W>)), call.features),
               .pixels = pixels_of<T>(call, out),
               .y = {.size = s.h, .out = s.height},
               .x = {.size = s.w, .out = s.width},
               .row_begin = s.row_begin,
               .given = given != nullptr};
    run.prepare(s.rows, given);
    const Chunk chunk(s);
    for (int64_t image = 0; image < s.batch; image += chunk.images) {
        for (int64_t row = 0; row < s.rows; row += chunk.height) {
            run.chunk(image, std::min(chunk.images, s.batch - image), row, std::min(chunk.height, s.rows - row));
        }
    }
}

}  // namespace
}  // namespace fastroute::pixel_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) {
    FASTROUTE_IMPL(m, "pixel_mlp", pixel_mlp::pixel_mlp);
    FASTROUTE_IMPL(m, "pixel_mlp.tf32", pixel_mlp::pixel_mlp_tf32);
}

}  // namespace fastroute
