#include "cpu/scatter_groups.cpp"
#include "threads.h"

int main() {
    const Tensor rows = floats({131, 3, 5}), order = integers(131, 5, 131), inverse = integers(131, 105, 131);
    return threads::at_once([&]() -> std::vector<Tensor> { return {fastroute::scatter_groups(rows, order, inverse)}; });
}
