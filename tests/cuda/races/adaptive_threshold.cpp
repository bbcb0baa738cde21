#include "cuda/adaptive_threshold.cu"
#include "tensors.h"

int main() {
    fastroute::adaptive_threshold_cuda(floats({2, 700}), ScalarType::Byte);
    fastroute::adaptive_threshold_cuda(floats({1, 5}), ScalarType::Long);
}
