#include "cuda/pixel_mlp.cu"
#include "tensors.h"

namespace {

using namespace fastroute::pixel_mlp;

// Three classes: a deep one, a linear one and a free one.
void run(ScalarType type, int64_t width, bool tf32 = false) {
    const auto of = [&](const std::vector<int64_t>& size) { return torch::stable::to(floats(size), type); };
    const int64_t inputs = 16 + 4;
    const std::vector<Tensor> weights{of({width, inputs}), of({width, width}), of({3, width}), of({3, inputs})};
    const std::vector<Tensor> biases{of({width}), of({width}), of({3}), of({3})};
    const Tensor relative = floats({14 + 18});
    const Tensor map = tensor<uint8_t>({1, 14, 18}, ScalarType::Byte, [](int64_t n) { return n % 3; });
    const Tensor features = of({1, 16, 7, 9}), residual = of({1, 3, 7, 9});
    if (tf32) {
        pixel_mlp_tf32(features, weights, biases, {3, 1, 0}, 14, 18, map, residual, relative, 0, 14);
    } else {
        pixel_mlp(features, weights, biases, {3, 1, 0}, 14, 18, map, residual, relative, 0, 14);
    }
}

}  // namespace

int main() {
    run(ScalarType::Float, 24);
    run(ScalarType::Half, 32);
    run(ScalarType::Float, 24, true);
    // Activations that wait in shared memory.
    run(ScalarType::Float, 130, true);
}
