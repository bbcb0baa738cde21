// Every thread is one of the system, so few passes: one block takes the other steps.
#define FASTROUTE_BUDGET_PASSES 3
#include "cuda/assign_classes.cu"
#include "tensors.h"

int main() {
    const Tensor cost = tensor<double>({3}, ScalarType::Double, [](int64_t n) { return n + 1; });
    fastroute::assign_classes(floats({40, 3, 3, 5}), cost, 0.5, 1);
    // In vectors.
    fastroute::assign_classes(floats({2, 3, 3, 8}), cost, 0.5, 1);
    // Few items take one block, more several and then one.
    fastroute::assign_classes_budget(floats({300, 3}), cost, 0.6, std::nullopt, false, 8);
    fastroute::assign_classes_budget(floats({4100, 3}), cost, 0.6, 0.1, true, 4);
}
