#include "cpu/conv3x3/conv3x3.cpp"
#include "threads.h"

int main() {
    const Tensor image = floats({2, 3, 37, 45}), weight = floats({36, 1, 3, 4 * 16}), bias = floats({8});
    const Tensor residual = floats({2, 2, 74, 90});
    const Tensor short_image = halves({2, 3, 37, 45}), pairs = halves({9, 1, 2, 4 * 16, 2});
    const Tensor few_pairs = halves({9, 1, 2, 16, 2});
    return threads::at_once([&]() -> std::vector<Tensor> {
        return {fastroute::conv3x3::conv3x3(image, weight, bias, bias, residual, 8, 2, 0),
                fastroute::conv3x3::conv3x3(image, weight, std::nullopt, std::nullopt, std::nullopt, 8, 2, 1),
                fastroute::conv3x3::conv3x3(short_image, pairs, bias, bias, std::nullopt, 8, 2, 0),
                fastroute::conv3x3::conv3x3(short_image, few_pairs, std::nullopt, std::nullopt, std::nullopt, 3, 1, 1)};
    });
}
