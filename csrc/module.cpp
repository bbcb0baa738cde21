// The Python module `_C`: what the extension was built from and for. The operators themselves live in _ops.so, which
// has no Python in it.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"

namespace py = pybind11;

namespace {

std::string compiler() {
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

py::list words(const std::string& text) {
    py::list list;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
        list.append(word);
    }
    return list;
}

py::dict build_info() {
    const std::string nvcc = FASTROUTE_NVCC_VERSION;
    py::dict info;
    info["compiler"] = compiler();
#if defined(__OPTIMIZE__)
    info["debug"] = false;
#else
    info["debug"] = true;
#endif
    info["cpu_isas"] = cpu_isas();
    info["cuda"] = !nvcc.empty();
    info["nvcc"] = nvcc.empty() ? py::object(py::none()) : py::object(py::str(nvcc));
    info["cuda_archs"] = words(FASTROUTE_CUDA_ARCHS);
    info["torch_version"] = FASTROUTE_TORCH_VERSION;
    info["stable_abi"] = FASTROUTE_STABLE_ABI;
    info["schema_digest"] = FASTROUTE_SCHEMA_DIGEST;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What fastroute's compiled operators were built from and for.";
    m.def("build_info", &build_info, "Compiler, instruction sets, CUDA targets, torch version and schema fingerprint.");
}
