// The Python module `_C`: what the compiler says of the extension that it has built. It is made for one version of
// Python and optional; the operators themselves live in _ops.so, which has no Python in it.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

const char* compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

// Instruction sets for which the CPU kernels have code (cpu/isa.h); the machine that runs them decides which is used.
py::list cpu_isas() {
    py::list isas;
    isas.append("baseline");
#if defined(__x86_64__) && defined(__GNUC__)
    isas.append("avx2");
    isas.append("avx512");
    isas.append("avx512_bf16");
#endif
    return isas;
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
#if defined(__OPTIMIZE__)
    info["debug"] = false;
#else
    info["debug"] = true;
#endif
    info["cpu_isas"] = cpu_isas();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What fastroute's compiled operators were built by and for.";
    m.def("build_info", &build_info, "Compiler, optimization and instruction sets.");
}
