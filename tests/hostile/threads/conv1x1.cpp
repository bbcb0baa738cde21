#include "cpu/conv1x1/conv1x1.cpp"
#include "threads.h"

int main() {
    const std::vector<Tensor> images{floats({2, 3, 37, 45}), floats({2, 5, 37, 45})};
    const Tensor weight = floats({20, 8}), bias = floats({20}), residual = floats({2, 20, 37, 45});
    const std::vector<Tensor> short_images{halves({2, 4, 37, 45}), halves({2, 4, 37, 45})};
    const Tensor short_weight = halves({20, 8}), short_residual = halves({2, 20, 37, 45});
    return threads::at_once([&]() -> std::vector<Tensor> {
        return {fastroute::conv1x1::conv1x1(images, weight, bias, bias, residual),
                fastroute::conv1x1::conv1x1(short_images, short_weight, bias, bias, short_residual)};
    });
}
