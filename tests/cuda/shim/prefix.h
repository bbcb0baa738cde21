// What all kernels include, in the order in which they do; compiled once for all of them.
#include <torch/csrc/stable/ops.h>

#include "cuda/pack.cuh"
