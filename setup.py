"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

    fastroute/_C.*.so   csrc/module.cpp                                        a pybind11 module: what was built
    fastroute/_ops.so   csrc/library.cpp, csrc/cpu/**/*.cpp, csrc/cuda/*.cu    the operators, without Python symbols

Sources are found by name; ninja builds them in build/ and rebuilds what an edit, of a header too, makes stale.

Environment:
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as everywhere.
    FASTROUTE_NO_EXTENSION=1           build no extension: the reference backend runs.
    FASTROUTE_BUILD_CUDA=1 or 0        build the CUDA kernels whatever torch this is, or leave them out. Default: where
                                       there are both nvcc (CUDACXX, CUDA_HOME or PATH) and a CUDA torch.
    FASTROUTE_CUDA_ARCHS="80 90"       compute capabilities to build for.
    FASTROUTE_DEBUG=1                  -O0 -g and assertions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# The oldest torch whose stable ABI has all that the kernels call; one build serves it and later ones.
STABLE_ABI = (2, 10)
STANDARD = "c++20"
CUDA_ARCHS = ("80", "90", "100")
DEBUG = os.environ.get("FASTROUTE_DEBUG") == "1"

# Kernels choose their instruction set at run time, so there is no -march; contraction of a * b + c would make results
# depend on the compiler.
CXX_FLAGS = [
    *(["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-DNDEBUG"]),
    *(f"-std={STANDARD}", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
]


def find_compiler() -> tuple[list[str], str]:
    """A command that compiles and links C++20; or an empty one and why there is none."""
    if os.environ.get("FASTROUTE_NO_EXTENSION") == "1":
        return [], "FASTROUTE_NO_EXTENSION=1 is set"
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


COMPILER, NO_COMPILER = find_compiler()


def find_nvcc(torch_cuda: str | None) -> str | None:
    """The nvcc that builds csrc/cuda/*.cu, or None when those are left out."""
    wanted = os.environ.get("FASTROUTE_BUILD_CUDA", "")
    if wanted == "0" or not list(CSRC.glob("cuda/*.cu")) or not (torch_cuda or wanted == "1"):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and wanted == "1":
        raise SystemExit("FASTROUTE_BUILD_CUDA=1, but nvcc was not found: set CUDACXX or CUDA_HOME, or add it to PATH")
    return nvcc


def first_match(pattern: str, command: list[str]) -> str:
    """The first group of `pattern` in what `command` prints."""
    found = re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found[1] if found else "unknown"


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to build for: those asked for, or the usual ones that this nvcc knows."""
    asked = os.environ.get("FASTROUTE_CUDA_ARCHS", "").replace(".", "").replace(",", " ").split()
    wrong = [arch for arch in asked if not re.fullmatch(r"\d{2,3}", arch)]
    if wrong:
        raise SystemExit(f"FASTROUTE_CUDA_ARCHS must list compute capabilities, as in '8.0 9.0'; got {', '.join(wrong)}")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return sorted(asked, key=int) or [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


def write_if_changed(path: Path, text: str) -> None:
    """Write `path`, but leave its time alone when it already says this: its dependants then stay fresh."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_command() -> list[str]:
    """How to run ninja: the package of this Python, or the program."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    if program is None:
        raise SystemExit("ninja was not found: pip install ninja")
    return [program]


def quote(*args: str | Path) -> str:
    """Arguments as text in a command of a ninja file."""
    return shlex.join(str(arg) for arg in args).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as an input or output in a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildExtension(build_ext):
    """Builds both shared objects with one ninja file."""

    def get_ext_filename(self, fullname: str) -> str:
        """`_ops.so` bears no Python version: nothing in it depends on one."""
        if fullname.rpartition(".")[2] == "_ops":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Write the generated headers and the ninja file, run it, and put the results where setuptools wants them."""
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(f"building fastroute needs {error.name}: pip install it and try again") from None
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_ABI:
            raise SystemExit(f"fastroute needs torch 2.10 or newer; this is torch {torch.__version__}")

        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc(torch.version.cuda)
        archs = cuda_archs(nvcc) if nvcc else []
        self.write_headers(folder, str(torch.__version__), nvcc, archs)

        torch_folder = Path(torch.__file__).parent
        module_includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        write_if_changed(
            folder / "build.ninja",
            ninja_file(folder, module_includes, torch_folder, nvcc, archs),
        )
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        result = subprocess.run([*ninja_command(), "-C", str(folder), *jobs], check=False)
        if result.returncode != 0:
            raise SystemExit(
                "fastroute's C++ extension failed to compile; the compiler's messages stand above. "
                "FASTROUTE_NO_EXTENSION=1 installs without it."
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file in the old one's place: a process that has the old one loaded keeps it.
            target.unlink(missing_ok=True)
            shutil.copy2(folder / f"{extension.name.rpartition('.')[2]}.so", target)

    def write_headers(self, folder: Path, torch_version: str, nvcc: str | None, archs: list[str]) -> None:
        """`schemas.h`, read from fastroute/ops/*.py, and `build_config.h`, for `build_info()`."""
        path = ROOT / "fastroute" / "ops" / "_schemas.py"
        spec = importlib.util.spec_from_file_location("_schemas", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        schemas = module.read_schemas(path.parent)
        lines = "".join(f"    {json.dumps(schema)},\n" for schema in schemas)
        write_if_changed(
            folder / "schemas.h",
            f"#pragma once\n\ninline constexpr const char* FASTROUTE_SCHEMAS[] = {{\n{lines}}};\n",
        )
        values = {
            "SCHEMA_DIGEST": module.digest(schemas),
            "TORCH_VERSION": torch_version,
            "STABLE_ABI": ".".join(map(str, STABLE_ABI)),
            "NVCC_VERSION": first_match(r"release ([\d.]+)", [nvcc, "--version"]) if nvcc else "",
            "CUDA_ARCHS": " ".join(archs),
        }
        defines = "".join(f"#define FASTROUTE_{name} {json.dumps(value)}\n" for name, value in values.items())
        write_if_changed(folder / "build_config.h", f"#pragma once\n\n{defines}")


def operator_size(source: Path) -> int:
    """Bytes of an operator's source, and of the headers beside it where it has a folder of its own."""
    own = source.parent.name == source.stem
    return sum(path.stat().st_size for path in (source.parent.iterdir() if own else [source]))


def ninja_file(folder: Path, module_includes: list[str], torch_folder: Path, nvcc: str | None, archs: list[str]) -> str:
    """The text of the ninja file."""
    includes = [f"-I{CSRC}", f"-I{folder}"]
    cxx = quote(*COMPILER, *shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS, *includes)
    link = quote(*COMPILER, "-shared", *shlex.split(os.environ.get("LDFLAGS", "")))
    abi = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
    ops_flags = [abi, "-isystem", torch_folder / "include"]
    # torch is loaded before _ops.so, so no path to it is stored. A library with CUDA kernels names libtorch, which
    # stands for libtorch_cuda where torch has one and for nothing where it has not.
    cuda_lib = ["-Xlinker", "--no-as-needed", "-ltorch"] if nvcc else []
    ops_libs = [f"-L{torch_folder / 'lib'}", *cuda_lib, "-ltorch_cpu", "-lc10"]
    # No path of the building machine in the binaries: checks name their file.
    prefix_maps = [f"-ffile-prefix-map={path}/=" for path in (ROOT, torch_folder)]

    text = ["ninja_required_version = 1.5"]

    def rule(name: str, command: str, verb: str, depends: bool = False) -> None:
        depfile = "\n  depfile = $out.d\n  deps = gcc" if depends else ""
        text.append(f"rule {name}\n  command = {command}\n  description = {verb} $out{depfile}")

    def build(output: str, rule: str, inputs: list[Path], **variables: str) -> Path:
        lines = "".join(f"\n  {name} = {value}" for name, value in variables.items())
        text.append(f"build {escape(folder / output)}: {rule} {' '.join(map(escape, inputs))}{lines}")
        return folder / output

    def build_objects(rule: str, sources: list[Path], flags: str) -> list[Path]:
        names = [source.relative_to(CSRC).as_posix().replace("/", "-") for source in sources]
        return [build(f"{name}.o", rule, [source], flags=flags) for name, source in zip(names, sources, strict=True)]

    rule("cxx", f"{cxx} {quote(*prefix_maps)} $flags -MMD -MF $out.d -c $in -o $out", "compile", depends=True)
    rule("link", f"{link} $in -o $out $libs", "link")
    build("_C.so", "link", build_objects("cxx", [CSRC / "module.cpp"], quote(*module_includes)))
    # The largest operators first, so that none is left for the end.
    sources = [*sorted(CSRC.glob("cpu/**/*.cpp"), key=operator_size, reverse=True), CSRC / "library.cpp"]
    objects = build_objects("cxx", sources, quote(*ops_flags))
    if nvcc:
        host = [flag for flag in CXX_FLAGS if flag.startswith(("-f", "-W"))] + prefix_maps
        cuda = [nvcc, "-ccbin", COMPILER[-1]]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        # A device newer than the last one compiles its PTX when it first runs it.
        code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = ["-O3", f"-std={STANDARD}", "-DUSE_CUDA", *code, "-Xcompiler", ",".join(host), *includes]
        depends = "--generate-dependencies-with-compile --dependency-output $out.d"
        rule("nvcc", f"{quote(*cuda, *flags)} $flags {depends} -c $in -o $out", "compile", depends=True)
        # nvcc links too: it knows where its runtime lies, and takes the static one.
        rule("nvlink", f"{quote(*cuda, *code, '-cudadevrt=none', '-shared')} $in -o $out $libs", "link")
        objects += build_objects("nvcc", sorted(CSRC.glob("cuda/*.cu")), quote(*ops_flags))
    build("_ops.so", "nvlink" if nvcc else "link", objects, libs=quote(*ops_libs))
    return "\n\n".join(text) + "\n"


class BuildPython(build_py):
    """Says so when there will be no extension."""

    def run(self) -> None:
        """Copy the Python files; in an editable install without an extension, drop one left from before."""
        super().run()
        if COMPILER:
            return
        print(
            f"fastroute: no C++ extension, because {NO_COMPILER}. The reference backend will be used. "
            "For the fast one, install a C++20 compiler (for example g++) and install fastroute again."
        )
        if self.editable_mode:
            for pattern in ("_C.*.so", "_ops*.so"):
                for library in (ROOT / "fastroute").glob(pattern):
                    library.unlink()


def relative(*patterns: str) -> list[str]:
    """Files of csrc/ that match, relative to this folder."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


setup(
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    ext_modules=[
        Extension("fastroute._C", relative("module.cpp")),
        Extension(
            "fastroute._ops", relative("library.cpp", "cpu/**/*.cpp", "cuda/*.cu"), depends=relative("**/*.h", "**/*.cuh")
        ),
    ]
    if COMPILER
    else [],
)
