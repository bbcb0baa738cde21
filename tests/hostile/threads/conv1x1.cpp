#include "cpu/conv1x1.cpp"
#include "threads.h"

int main() {
    const std::vector<Tensor> images{floats({2, 3, 37, 45}), floats({2, 5, 37, 45})};
    const Tensor weight = floats({20, 8}), bias = floats({20}), residual = floats({2, 20, 37, 45});
    return threads::at_once(
        [&]() -> std::vector<Tensor> { return {fastroute::conv1x1::conv1x1(images, weight, bias, bias, residual)}; });
}
