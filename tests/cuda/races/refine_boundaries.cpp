#include "cuda/refine_boundaries.cu"
#include "tensors.h"

int main() {
    const Tensor map =
        tensor<uint8_t>({2, 21, 45}, ScalarType::Byte, [](int64_t n) { return n % 7 == 0 || n % 90 > 60 ? 1 : 0; });
    fastroute::refine_boundaries(floats({2, 3, 21, 45}), map, 0, 21);
    fastroute::refine_boundaries(floats({2, 3, 21, 45}), map, 4, 9);
}
