#include "cuda/extract_patches.cu"
#include "tensors.h"

int main() {
    const Tensor image = floats({2, 3, 20, 17}), order = integers(9, 5, 24), mean = floats({3});
    fastroute::extract_patches(image, order, mean, mean, 8, 5, false, ScalarType::Half, false, 8, 8);
    fastroute::extract_patches(image, std::nullopt, std::nullopt, std::nullopt, 8, 5, true, std::nullopt, true, 8, 8);
    // Regions, some of which reach out of the image.
    fastroute::extract_patches(image, order, std::nullopt, std::nullopt, 8, 5, false, std::nullopt, false, 18, 13);
    fastroute::_extract_patches_backward(floats({9, 3, 8, 8}), order, 2, 20, 17, 8, 5, false);
}
