// Functions for both host and device, always inlined; and arithmetic that rounds alike on both.
#pragma once

#if defined(__CUDACC__)
#define FASTROUTE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTROUTE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastroute {

// a · b and a + b, each rounded on its own: a device's compiler would fuse them, and the result would have other bits.
FASTROUTE_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

FASTROUTE_HOST_DEVICE double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

FASTROUTE_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

FASTROUTE_HOST_DEVICE double add(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dadd_rn(a, b);
#else
    return a + b;
#endif
}

}  // namespace fastroute
