// Includes FASTROUTE_BODY, a file written for simd.h, once per instruction set, each time in a namespace of its own.
// What intrinsics it needs must have been included before.

#if FASTROUTE_X86
namespace avx512 {
#define FASTROUTE_BYTES 64
#define FASTROUTE_TARGET FASTROUTE_AVX512
#include FASTROUTE_BODY
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace avx512

namespace avx2 {
#define FASTROUTE_BYTES 32
#define FASTROUTE_TARGET FASTROUTE_AVX2
#include FASTROUTE_BODY
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace avx2
#endif

namespace baseline {
#define FASTROUTE_BYTES 16
#define FASTROUTE_TARGET
#include FASTROUTE_BODY
#undef FASTROUTE_BYTES
#undef FASTROUTE_TARGET
}  // namespace baseline

#undef FASTROUTE_BODY
