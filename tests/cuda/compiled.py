"""What nvcc says of every kernel of csrc/cuda: registers, spills and shared memory on each architecture.

python tests/cuda/compiled.py prints the table. Each architecture has its own PTX, as in setup.py: ptxas makes other registers
of another. Reports are kept in build/cuda-tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import builds

ARCHS = tuple(os.environ.get("FASTROUTE_TEST_ARCHS", "80 90 100").split())


class Kernel(NamedTuple):
    """One kernel on one architecture; sizes in bytes."""

    name: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int


def nvcc_reason(archs: Sequence[str] = ARCHS) -> str | None:
    """Why nothing can be compiled for these GPUs; None when it can."""
    if builds.NVCC is None or not Path(builds.NVCC).exists():
        return "nvcc was not found (CUDACXX, CUDA_HOME or PATH)"
    known = subprocess.run([builds.NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    missing = [arch for arch in archs if f"compute_{arch}" not in known]
    return f"this nvcc does not know sm_{', sm_'.join(missing)}" if missing else None


def machine_code(source: Path, arch: str) -> tuple[Path, str]:
    """Machine code of one source for one architecture, and what ptxas says of it; kept from run to run."""
    # Of device code alone: the shim's compiler warns of the host's.
    flags = ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xptxas", "-v", f"-arch=sm_{arch}", builds.ABI, *builds.INCLUDES]
    making = [str(builds.NVCC), "-ccbin", builds.CXX[-1], *flags, "-cubin", source]
    cubin = builds.CACHE / f"{source.stem}-{arch}-{builds.digest(making, [source, *builds.headers()])}.cubin"
    said = cubin.with_suffix(".ptxas")
    if not said.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        fresh = cubin.with_suffix(f".{os.getpid()}")
        text = builds.run([*making, "-o", fresh])
        if "warning" in text:
            raise RuntimeError(text)
        fresh.replace(cubin)
        said.write_text(text)
    return cubin, said.read_text()


def kernels(source: Path) -> list[Kernel]:
    """Every kernel of one source on every architecture."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    reports = "".join(machine_code(source, arch)[1] for arch in ARCHS)
    for match in re.finditer(pattern, reports, re.DOTALL):
        mangled, arch, stack, stores, loads, registers, rest = match.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        found.append(Kernel(demangled(mangled), arch, int(registers), spills, int(stack), int(shared[1]) if shared else 0))
    return found


def demangled(name: str) -> str:
    """`stitch_patches_kernel<float, c10::Half>` of a linker's name."""
    if shutil.which("c++filt") is None:
        return name
    text = builds.run(["c++filt", name]).strip().replace("fastroute::", "").replace("(anonymous namespace)::", "")
    return re.sub(r"^void ", "", text).split("(")[0]


def main() -> None:
    """Print the table."""
    print(f"{'kernel':72} {'sm':>4} {'registers':>9} {'spills':>6} {'stack':>6} {'shared':>6}")
    for source in builds.KERNELS:
        for kernel in kernels(source):
            name, *numbers = kernel
            print(f"{name:72} {numbers[0]:>4} {numbers[1]:>9} {numbers[2]:>6} {numbers[3]:>6} {numbers[4]:>6}")


if __name__ == "__main__":
    main()
