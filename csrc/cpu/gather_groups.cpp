// gather_groups: row i of the output is row order[i] of the input, by the kernel of gather_rows.h.
#include "common/gather_groups.h"
#include "cpu/gather_rows.h"

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) { FASTROUTE_IMPL(m, "gather_groups", gather_groups); }

}  // namespace fastroute
