// Declares every operator, so that a process without Python has them too. The schemas are those of fastroute/ops/*.py:
// setup.py writes them into schemas.h. Kernels register themselves, each beside its code.

#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastroute, m) {
    for (const char* schema : FASTROUTE_SCHEMAS) {
        m.def(schema);
    }
}
