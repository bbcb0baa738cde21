// scatter_groups: row i of the output is row inverse[i] of the input, by the kernel of gather_rows.h.
#include "common/scatter_groups.h"
#include "cpu/gather_rows.h"

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "scatter_groups", scatter_groups); }

}  // namespace fastroute
