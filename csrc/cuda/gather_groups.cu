// gather_groups: row i of the output is row order[i] of the input, by the kernel of gather_rows.cuh.
#include "common/gather_groups.h"
#include "cuda/gather_rows.cuh"

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "gather_groups", gather_groups); }

}  // namespace fastroute
