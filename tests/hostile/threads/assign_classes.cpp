#include "cpu/assign_classes.cpp"
#include "threads.h"

int main() {
    const Tensor cost = tensor<double>({3}, ScalarType::Double, [](int64_t n) { return n + 1; });
    const Tensor score = floats({9'000, 3}), images = floats({40, 3, 30, 5});
    return threads::at_once([&]() -> std::vector<Tensor> {
        return {fastroute::assign_classes(images, cost, 0.5, std::nullopt, 1),
                fastroute::assign_classes(score, cost, 0, 0.6, 8), fastroute::assign_classes(images, cost, 0, 0.6, 4)};
    });
}
