#include "cuda/scatter_groups.cu"
#include "tensors.h"

int main() {
    const Tensor order = integers(131, 5, 131), inverse = integers(131, 105, 131);
    fastroute::scatter_groups(floats({131, 3, 5}), order, inverse);
}
