#include "cpu/stitch_patches/stitch_patches.cpp"
#include "threads.h"

namespace {

// 2 x 2 patches of 4 pixels at scale 4, of features whose last layers are computed on the way.
Tensor upsampled(const Tensor& features, const std::vector<Tensor>& layers, const Tensor& window) {
    const Tensor out = empty({1, 1, 32, 32}, ScalarType::Float), spent = empty({2}, ScalarType::Double);
    fastroute::stitch_upsampled_out({features}, {0}, layers, integers(4, 1, 4), std::nullopt, window, 8, 8, 4, 4, 4,
                                    false, 4, 0, 32, out, spent);
    return out;
}

}  // namespace

int main() {
    // 4 x 3 patches of 8 pixels cover 20 x 17; the second call undoes a pixel shuffle and writes some rows.
    const Tensor patches = floats({12, 2, 16, 16}), shuffled = floats({12, 8, 8, 8}), window = floats({16});
    const Tensor inverse = integers(12, 5, 12), grad = floats({1, 2, 40, 34}), features = floats({4, 3, 4, 4});
    const std::vector<Tensor> layers{floats({2, 3}), floats({2}), floats({2}), floats({16, 2, 3, 3}), floats({16})};
    return threads::at_once([&]() -> std::vector<Tensor> {
        using fastroute::stitch_patches;
        const auto none = std::nullopt;
        const Tensor out = empty({1, 2, 9, 34}, ScalarType::Float);
        fastroute::stitch_batches_out({shuffled, shuffled}, inverse, none, window, 20, 17, 8, 5, 2, false, 2, 3, 12,
                                      out);
        return {stitch_patches(patches, inverse, window, 20, 17, 8, 5, 2, false, 1, ScalarType::Byte, 0, 40),
                stitch_patches(patches, none, window, 20, 17, 8, 5, 2, false, 1, none, 0, 40), out,
                upsampled(features, layers, window),
                fastroute::_stitch_patches_backward(grad, inverse, window, 20, 17, 8, 5, 2, false, 12)};
    });
}
