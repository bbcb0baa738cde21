// The intrinsics of x86, where there are any.
#pragma once

#include "cpu/isa.h"

#if FASTROUTE_X86
// The compiler's own header declares what it leaves undefined on purpose in a way that it warns of.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
