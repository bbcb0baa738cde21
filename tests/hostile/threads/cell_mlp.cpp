#include "cpu/cell_mlp/cell_mlp.cpp"
#include "threads.h"

int main() {
    const Tensor image = floats({2, 3, 128, 320});
    const std::vector<Tensor> weights{floats({7, 48}), floats({4, 7})}, biases{floats({7}), floats({4})};
    return threads::at_once(
        [&]() -> std::vector<Tensor> { return {fastroute::cell_mlp::cell_mlp(image, weights, biases, 0.1, 4, 3, 2)}; });
}
