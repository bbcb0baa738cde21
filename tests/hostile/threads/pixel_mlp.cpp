#include "cpu/pixel_mlp/pixel_mlp.cpp"
#include "threads.h"

int main() {
    // Three classes: a deep one, a linear one and a free one; more pixels than a block has.
    const std::vector<Tensor> weights{floats({24, 20}), floats({24, 24}), floats({3, 24}), floats({3, 20})};
    const std::vector<Tensor> biases{floats({24}), floats({24}), floats({3}), floats({3})};
    const Tensor features = floats({1, 16, 30, 40}), residual = floats({1, 3, 30, 40}), relative = floats({120 + 160});
    const Tensor map = tensor<uint8_t>({1, 120, 160}, ScalarType::Byte, [](int64_t n) { return n % 3; });
    return threads::at_once([&]() -> std::vector<Tensor> {
        using fastroute::pixel_mlp::pixel_mlp;
        return {pixel_mlp(features, weights, biases, {3, 1, 0}, 120, 160, map, residual, std::nullopt, 0, 120),
                pixel_mlp(features, weights, biases, {3, 1, 0}, 120, 160, map, residual, relative, 7, 100)};
    });
}
