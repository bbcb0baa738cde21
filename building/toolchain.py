"""The compilers of the build: which there are, and what they are to build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

STANDARD = "c++20"
CUDA_ARCHS = ("80", "90", "100")


def find_compiler() -> tuple[list[str], str]:
    """A command that compiles and links C++20; or an empty one and why there is none."""
    if os.environ.get("FASTROUTE_NO_EXTENSION") == "1":
        return [], "FASTROUTE_NO_EXTENSION=1 was set"
    if not sys.platform.startswith("linux"):
        return [], f"the extension is built on Linux only, this is {sys.platform}"
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    reason = "no C++ compiler was found (c++, g++ or clang++)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <span>\nint size(std::span<const char> s) { return static_cast<int>(s.size()); }\n")
        for candidate in candidates:
            if shutil.which(candidate[0]) is None:
                reason = f"the C++ compiler named by CXX was not found ({named})" if named else reason
                continue
            probe = [*candidate, f"-std={STANDARD}", "-fPIC", "-shared", str(source), "-o", f"{folder}/probe.so"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return candidate, ""
            reason = f"'{shlex.join(candidate)}' cannot build a C++20 shared library"
    return [], reason


def compiler_name(compiler: list[str]) -> str:
    """Kind and version of a C++ compiler, such as "gcc 12.2.0"."""
    macros = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    for kind, macro in (("clang", "__clang_version__"), ("gcc", "__VERSION__")):
        version = first_match(rf'#define {macro} "([^" ]+)', macros)
        if version != "unknown":
            return f"{kind} {version}"
    return "unknown"


def first_match(pattern: str, command: list[str]) -> str:
    """The first group of `pattern` in what `command` prints."""
    found = re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found[1] if found else "unknown"


class Cuda(NamedTuple):
    """What compiles csrc/cuda/*.cu.

    Attributes:
        nvcc: the compiler; None if the CUDA kernels are left out.
        version: its version, such as "13.0".
        archs: compute capabilities to build for.
        left_out: why they are left out.
    """

    nvcc: str | None
    version: str = ""
    archs: tuple[str, ...] = ()
    left_out: str = ""


def find_cuda(torch_cuda: str | None) -> Cuda:
    """What builds the CUDA kernels beside a torch for CUDA `torch_cuda`, None for one without CUDA."""
    wanted = os.environ.get("FASTROUTE_BUILD_CUDA", "")
    if wanted == "0":
        return Cuda(None, left_out="FASTROUTE_BUILD_CUDA=0 was set")
    if not torch_cuda and wanted != "1":
        return Cuda(None, left_out="torch was built without CUDA (FASTROUTE_BUILD_CUDA=1 builds them all the same)")
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("FASTROUTE_BUILD_CUDA=1, but nvcc was not found: set CUDACXX or CUDA_HOME, or add it to PATH")
        return Cuda(None, left_out="nvcc was not found")
    version = nvcc_version(nvcc)
    # A program of one major version of CUDA needs a driver of that version, which torch alone may not need.
    if torch_cuda and wanted != "1" and version.split(".")[0] != torch_cuda.split(".")[0]:
        words = f"nvcc is of CUDA {version} and torch of CUDA {torch_cuda} (FASTROUTE_BUILD_CUDA=1 builds them all the same)"
        return Cuda(None, left_out=words)
    return Cuda(nvcc, version, cuda_archs(nvcc))


def nvcc_version(nvcc: str) -> str:
    """The version of an nvcc, such as "13.0"."""
    return first_match(r"release ([\d.]+)", [nvcc, "--version"])


def cuda_archs(nvcc: str) -> tuple[str, ...]:
    """Compute capabilities to build for: those asked for, or the usual ones that this nvcc knows."""
    asked = os.environ.get("FASTROUTE_CUDA_ARCHS", "").replace(".", "").replace(",", " ").split()
    wrong = [arch for arch in asked if not re.fullmatch(r"\d{2,3}", arch)]
    if wrong:
        raise SystemExit(f"FASTROUTE_CUDA_ARCHS must list compute capabilities, as in '8.0 9.0'; got {', '.join(wrong)}")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(sorted(asked, key=int)) or tuple(arch for arch in CUDA_ARCHS if f"compute_{arch}" in known)


def for_host(flags: list[str]) -> list[str]:
    """Flags that nvcc hands on to the host's compiler: it splits them at commas, and a shell reads them once more."""
    return [word for flag in flags for word in ("-Xcompiler", shlex.quote(flag).replace(",", "\\,"))]
