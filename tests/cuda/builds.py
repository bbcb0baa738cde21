"""Builds what these tests run: the kernels of csrc/cuda for the CPU, under a sanitizer, and for GPUs, by nvcc; and, for
tests/hostile, those of csrc/cpu under a sanitizer.

Objects are kept in build/cuda-tests under a digest of all that they are made of.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-tests"
TORCH = Path(torch.__file__).parent
KERNELS = [
    path for path in sorted(CSRC.glob("cuda/*.cu")) if path.stem in os.environ.get("FASTROUTE_SHIM_ONLY", path.stem).split()
]
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
INCLUDES = [f"-I{CSRC}", "-isystem", str(TORCH / "include")]
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "g++"]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin" if (home := os.environ.get("CUDA_HOME")) else None)

# -O1 keeps the reports readable; contraction of a * b + c would change results.
SHIM_FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
]
SHIM_FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", f"-I{HERE / 'shim'}", ABI, *INCLUDES]
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-DFASTROUTE_SHIM_THREADS", "-Wno-tsan", "-Wno-unused-function"],
}
LIBRARIES = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def compiler_reason() -> str | None:
    """Why nothing can be built for the CPU; None when it can."""
    if not sys.platform.startswith("linux"):
        return f"the shim is built on Linux only, this is {sys.platform}"
    if shutil.which(CXX[0]) is None:
        return f"the C++ compiler was not found ({CXX[0]})"
    if "clang" in subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=False).stdout:
        return "the sanitizers' libraries are looked for where g++ keeps them"
    return None


def run(command: Sequence[str | Path]) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def digest(command: Sequence[str | Path], files: Sequence[Path]) -> str:
    """A fingerprint of a command, of torch and of the files that it reads."""
    total = hashlib.sha256(f"{torch.__version__} {command}".encode())
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def headers() -> list[Path]:
    """Every header that a kernel may include."""
    return sorted([*CSRC.glob("**/*.h"), *CSRC.glob("cuda/*.cuh"), *HERE.glob("*/*.h")])


def kept(path: Path, command: Sequence[str | Path]) -> Path:
    """`path`, made by `command` -o `path` unless an earlier run made it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        run([*command, "-o", fresh])
        fresh.replace(path)
    return path


def shim_prefix(sanitizer: str) -> Path:
    """The header that every kernel begins with, precompiled: half of what a source takes to compile."""
    header = HERE / "shim" / "prefix.h"
    command = [*CXX, "-x", "c++-header", *SHIM_FLAGS, *SANITIZERS[sanitizer], header]
    folder = CACHE / f"prefix-{sanitizer}-{digest(command, headers())}"
    kept(folder / "prefix.h.gch", command)
    return folder / header.name


def shim_object(source: Path, sanitizer: str) -> Path:
    """One source compiled for the CPU."""
    prefix = ["-include", shim_prefix(sanitizer)] if source.parent in (CSRC / "cuda", HERE / "races") else []
    command = [*CXX, "-x", "c++", *SHIM_FLAGS, *SANITIZERS[sanitizer], *prefix, "-c", source]
    # A program of races/ includes the kernel of its name.
    files = [source, CSRC / "cuda" / f"{source.stem}.cu"] if source.parent.name == "races" else [source]
    return kept(CACHE / f"{source.parent.name}-{source.stem}-{sanitizer}-{digest(command, [*files, *headers()])}.o", command)


def shim_link(name: str, sources: Sequence[Path], sanitizer: str, *flags: str) -> Path:
    """A library or program of sources compiled for the CPU."""
    objects = [shim_object(source, sanitizer) for source in sources]
    command = [*CXX, *SANITIZERS[sanitizer], *flags, *objects, *LIBRARIES]
    return kept(CACHE / f"{name}-{sanitizer}-{digest(command, objects)}", command)


def shim_library(sanitizer: str, kernels: Sequence[Path] = KERNELS) -> Path:
    """A library that registers the kernels of csrc/cuda in the place of those of csrc/cpu."""
    return shim_link("shim.so", [*kernels, HERE / "launches.cpp"], sanitizer, "-shared")


def cpu_object(source: Path, sanitizer: str, *flags: str) -> Path:
    """One source of csrc/cpu, or one that includes such, compiled under a sanitizer."""
    plain = [flag for flag in SHIM_FLAGS if not flag.endswith("shim")]
    command = [*CXX, *plain, *SANITIZERS[sanitizer], f"-I{HERE}", *flags, "-c", source]
    # Programs include the kernels of their names.
    made_of = sorted({source, *CSRC.glob(f"cpu/**/{source.stem}.cpp"), *CSRC.glob("c[op]*/**/*.h"), *source.parent.glob("*.h")})
    return kept(CACHE / f"cpu-{source.stem}-{sanitizer}-{digest([*command, *made_of], made_of)}.o", command)


def cpu_link(name: str, sources: Sequence[Path], sanitizer: str, compile_flags: Sequence[str], *flags: str) -> Path:
    """A library or program of such sources."""
    objects = [cpu_object(source, sanitizer, *compile_flags) for source in sources]
    command = [*CXX, *SANITIZERS[sanitizer], *flags, *objects, *LIBRARIES]
    return kept(CACHE / f"{name}-{sanitizer}-{digest(command, objects)}", command)


def runtime(sanitizer: str) -> str:
    """What must be loaded before all else: the sanitizer's own library, and the one whose exceptions it watches."""
    return " ".join(run([*CXX, f"-print-file-name=lib{name}.so"]).strip() for name in (sanitizer, "stdc++"))


def emulated(*arguments: str) -> subprocess.CompletedProcess:
    """Runs pytest with the CUDA kernels emulated on the CPU, under AddressSanitizer and UBSan."""
    paths = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "FASTROUTE_SHIM": str(shim_library("address")),
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": runtime("asan"),
        # What Python and torch never free is not ours to report.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "shim_plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "--capture=sys",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def thread_command(program: Path) -> list[str]:
    """Runs a program under ThreadSanitizer, which older versions cannot do where addresses are too random."""
    fixed = ["setarch", "-R"]
    able = shutil.which("setarch") is not None and subprocess.run([*fixed, "true"], check=False).returncode == 0
    return [*(fixed if able else []), str(program)]
