#include "cpu/extract_patches/extract_patches.cpp"
#include "threads.h"

int main() {
    const Tensor image = floats({2, 3, 20, 17}), order = integers(9, 5, 24), mean = floats({3});
    const Tensor bytes = tensor<uint8_t>({1, 3, 20, 17}, ScalarType::Byte, [](int64_t n) { return n % 251; });
    const Tensor grad = floats({9, 3, 8, 8});
    return threads::at_once([&]() -> std::vector<Tensor> {
        using fastroute::extract_patches;
        const auto none = std::nullopt;
        return {extract_patches(image, order, mean, mean, 8, 5, false, ScalarType::Half, false, 8, 8),
                extract_patches(image, none, none, none, 8, 5, true, none, true, 8, 8),
                extract_patches(image, none, none, none, 8, 5, false, none, false, 8, 8),
                extract_patches(bytes, none, mean, mean, 8, 5, false, ScalarType::Float, true, 8, 8),
                fastroute::_extract_patches_backward(grad, order, 2, 20, 17, 8, 5, false)};
    });
}
