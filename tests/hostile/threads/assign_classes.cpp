#include "cpu/assign_classes.cpp"
#include "threads.h"

int main() {
    const Tensor cost = tensor<double>({3}, ScalarType::Double, [](int64_t n) { return n + 1; });
    const Tensor score = floats({70'000, 3}), images = floats({40, 3, 30, 5});
    return threads::at_once([&]() -> std::vector<Tensor> {
        return {fastroute::assign_classes(images, cost, 0.5, 1),
                std::get<1>(fastroute::assign_classes_budget(score, cost, 0.6, std::nullopt, false, 8)),
                std::get<0>(fastroute::assign_classes_budget(images, cost, 0.6, 0.1, true, 4))};
    });
}
