// scatter_groups: row i of the output is row inverse[i] of the input, by the kernel of gather_rows.cuh.
#include "common/scatter_groups.h"
#include "cuda/gather_rows.cuh"

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, FASTROUTE_CUDA, m) { FASTROUTE_IMPL(m, "scatter_groups", scatter_groups); }

}  // namespace fastroute
