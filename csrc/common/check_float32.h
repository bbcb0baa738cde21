// The check of tensors that a kernel takes in one type only.
#pragma once

#include "common/checks.h"

namespace fastroute {

// `x` is a float32 tensor of `rank` dimensions on the CPU.
inline void check_float32(const char* op, const char* name, const Tensor& x, int64_t rank) {
    check_cpu(op, name, x), check_rank(op, name, x, rank);
    FASTROUTE_CHECK(x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

}  // namespace fastroute
