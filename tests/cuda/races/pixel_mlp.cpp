#include "cuda/pixel_mlp.cu"
#include "tensors.h"

namespace {

// Three classes: a deep one, a linear one and a free one.
void run(ScalarType type, int64_t width) {
    const auto of = [&](const std::vector<int64_t>& size) { return torch::stable::to(floats(size), type); };
    const int64_t inputs = 16 + 4;
    const std::vector<Tensor> weights{of({width, inputs}), of({width, width}), of({3, width}), of({3, inputs})};
    const std::vector<Tensor> biases{of({width}), of({width}), of({3}), of({3})};
    const Tensor relative = floats({14 + 18});
    const Tensor map = tensor<uint8_t>({1, 14, 18}, ScalarType::Byte, [](int64_t n) { return n % 3; });
    fastroute::pixel_mlp::pixel_mlp_cuda(of({1, 16, 7, 9}), weights, biases, {3, 1, 0}, 14, 18, map, of({1, 3, 7, 9}),
                                         relative, 0, 14);
}

}  // namespace

int main() {
    run(ScalarType::Float, 24);
    run(ScalarType::Half, 32);
}
