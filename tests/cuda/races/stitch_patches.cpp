#include "cuda/stitch_patches.cu"
#include "tensors.h"

int main() {
    using fastroute::stitch_patches;
    // 4 x 3 patches of 8 pixels cover 20 x 17; the second call undoes a pixel shuffle and writes some rows.
    const Tensor patches = floats({12, 2, 16, 16}), window = floats({16}), inverse = integers(12, 5, 12);
    stitch_patches(patches, inverse, window, 20, 17, 8, 5, 2, false, 1, ScalarType::Byte, 0, 40);
    const Tensor shuffled = floats({12, 8, 8, 8}), out = floats({1, 2, 9, 34});
    fastroute::stitch_batches_out({shuffled, shuffled}, inverse, std::nullopt, window, 20, 17, 8, 5, 2, false, 2, 3, 12,
                                  out);
    // Three channels in vectors: 2 x 2 patches of 16 pixels cover 28 x 28.
    stitch_patches(floats({4, 3, 32, 32}), std::nullopt, floats({32}), 28, 28, 16, 12, 2, false, 1, ScalarType::Float,
                   0, 56);
    // Regions of two shapes, of which some do not hold the patch that is said to lie in them.
    const Tensor wide = floats({3, 2, 16, 26}), high = floats({2, 2, 26, 16}), region = integers(12, 1, 7);
    fastroute::stitch_batches_out({wide, high}, integers(12, 5, 5), region, window, 20, 17, 8, 5, 2, false, 1, 0, 40,
                                  floats({1, 2, 40, 34}));
    fastroute::_stitch_patches_backward(floats({1, 2, 40, 34}), inverse, window, 20, 17, 8, 5, 2, false, 12);
}
