// Tells a test how many kernels the emulation ran, so that it can see that it tested them.
#include "cuda_shim.h"

extern "C" int64_t shim_launches() { return shim::launches; }
