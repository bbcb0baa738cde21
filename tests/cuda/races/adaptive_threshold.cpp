#include "cuda/adaptive_threshold.cu"
#include "tensors.h"

int main() {
    fastroute::adaptive_threshold(floats({2, 700}), 1);
    fastroute::adaptive_threshold(floats({1, 5}), 8);
}
