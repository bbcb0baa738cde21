// The tensor cores' products with float32 sums, 16 x 8 x 16 of float16 or bfloat16 and 16 x 8 x 8 of TF32, and the
// packing of their operands: PTX under nvcc, plain C++ in the emulation of the tests (tests/cuda/shim/cuda_mma.h).
//
// Lane 4 g + q of a warp holds, of A [16, 16], B [16, 8] and D [16, 8]:
//   a[0] = A[g][2q..2q+1], a[1] = A[g+8][2q..2q+1], a[2] = A[g][2q+8..2q+9], a[3] = A[g+8][2q+8..2q+9];
//   b0 = B[2q..2q+1][g], b1 = B[2q+8..2q+9][g]; d[0..1] = D[g][2q..2q+1], d[2..3] = D[g+8][2q..2q+1].
// Of TF32, A [16, 8], B [8, 8] and the same D:
//   a[0] = A[g][q], a[1] = A[g+8][q], a[2] = A[g][q+4], a[3] = A[g+8][q+4]; b0 = B[q][g], b1 = B[q+4][g].
#pragma once

#include "cuda/launch.h"

#if !defined(__CUDACC__)
#include "cuda_mma.h"
#endif

namespace fastroute {

#if defined(__CUDACC__)

// Two values in one register, each rounded to nearest even; `low` in bits 0 to 15.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t result;
    if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, BFloat16>);
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
}

// The same of max(x, 0); NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t pack2_relu(float low, float high) {
    uint32_t result;
    if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, BFloat16>);
        asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
}

// A float32 as TF32, which has 10 bits behind the point: rounded to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

// The same of max(x, 0); NaN stays NaN.
__device__ __forceinline__ uint32_t to_tf32_relu(float x) {
    uint32_t result;
    asm("{.reg .f32 positive; max.NaN.f32 positive, %1, 0f00000000; cvt.rna.tf32.f32 %0, positive;}"
        : "=r"(result)
        : "f"(x));
    return result;
}

// D += A B, by all lanes of a warp together. Volatile, so that it is not moved to where only some lanes use the sums.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(std::is_same_v<T, BFloat16>);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

using shim::mma_m16n8k16;
using shim::mma_m16n8k8;
using shim::pack2;
using shim::pack2_relu;
using shim::to_tf32;
using shim::to_tf32_relu;

#endif

}  // namespace fastroute
