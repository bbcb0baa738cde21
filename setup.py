"""Builds the C++ extension; everything else about the package stands in pyproject.toml.

    fastroute/_ops.so       csrc/library.cpp, csrc/cpu/**/*.cpp, csrc/cuda/*.cu    the operators, without Python symbols
    fastroute/_build.json   what was built, or why there is no extension
    fastroute/_C.*.so       csrc/module.cpp, by pybind11: what the compiler says of it; left out where there are no headers of
                            Python or no pybind11, and of no use to another version of Python

Nothing that is needed depends on the version of Python, so one wheel serves all of them. The compilers and the torch to build
against are found by building/, which also has the hooks of pip. Sources are found by name; ninja builds them in build/ and
rebuilds what an edit, of a header too, makes stale.

Environment:
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as everywhere.
    FASTROUTE_NO_EXTENSION=1           build no extension: the reference backend runs.
    FASTROUTE_TORCH=FOLDER             the torch package to build against. Default: that of the environment, see
                                       building/target_torch.py.
    FASTROUTE_BUILD_CUDA=1 or 0        build the CUDA kernels whatever torch this is, or leave them out. Default: where
                                       there are both a CUDA torch and an nvcc (CUDACXX, CUDA_HOME or PATH) of the same
                                       major version.
    FASTROUTE_CUDA_ARCHS="80 90"       compute capabilities to build for.
    FASTROUTE_LOCAL_VERSION=cu13       what the version of the wheel ends in, after a plus sign.
    FASTROUTE_PYTHON_MODULE=0          leave out _C.
    FASTROUTE_DEBUG=1                  -O0 -g and assertions.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "building"))

from target_torch import STABLE_ABI, NoTorch, Torch, target_torch  # noqa: E402, found by the line above
from toolchain import STANDARD, Cuda, compiler_name, find_compiler, find_cuda, for_host  # noqa: E402

DEBUG = os.environ.get("FASTROUTE_DEBUG") == "1"
MODULE = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
# Instruction sets for which the CPU kernels have code (csrc/cpu/isa.h); the machine that runs them decides which is used.
CPU_ISAS = ["baseline", *(["avx2", "avx512", "avx512_bf16"] if platform.machine() == "x86_64" else [])]

# Kernels choose their instruction set at run time, so there is no -march; contraction of a * b + c would make results
# depend on the compiler.
CXX_FLAGS = [
    *(["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-DNDEBUG"]),
    *(f"-std={STANDARD}", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
]
COMPILER, NO_COMPILER = find_compiler()


def write_if_changed(path: Path, text: str) -> None:
    """Write `path`, but leave its time alone when it already says this: its dependants then stay fresh."""
    # Whatever the locale is: paths are bytes.
    content = os.fsencode(text)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def write_build(folder: Path, info: dict[str, object]) -> None:
    """Say in the package what was built."""
    (folder / "_build.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


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
    """Builds the shared object by ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        """`_ops.so` bears no Python version: nothing in it depends on one."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """Write the generated header and the ninja file, run it, and put the result where setuptools wants it."""
        try:
            torch = target_torch()
        except NoTorch as error:
            raise SystemExit(str(error)) from None
        cuda = find_cuda(torch.cuda)
        kernels = f"CUDA kernels for {', '.join(cuda.archs)}" if cuda.nvcc else f"no CUDA kernels: {cuda.left_out}"
        print(f"fastroute: built against {torch}; {kernels}", flush=True)

        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        digest = self.write_schemas(folder)
        write_if_changed(folder / "build.ninja", ninja_file(folder, torch, cuda))
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
            shutil.copy2(folder / "_ops.so", target)
            for old in target.parent.glob("_C.*.so"):
                old.unlink()
            if headers():
                shutil.copy2(folder / "_C.so", target.parent / MODULE)
            write_build(
                target.parent,
                {
                    "compiler": compiler_name(COMPILER),
                    "debug": DEBUG,
                    "cpu_isas": CPU_ISAS,
                    "cuda": bool(cuda.nvcc),
                    "cuda_left_out": cuda.left_out,
                    "nvcc": cuda.version or None,
                    "cuda_archs": cuda.archs,
                    "torch_version": torch.version,
                    "stable_abi": ".".join(map(str, STABLE_ABI)),
                    "schema_digest": digest,
                },
            )

    def copy_extensions_to_source(self) -> None:
        """Of a build in place or an editable install: what was built lies beside the sources."""
        super().copy_extensions_to_source()
        for old in (ROOT / "fastroute").glob("_C.*.so"):
            old.unlink()
        for built in ("_build.json", MODULE):
            if Path(self.build_lib, "fastroute", built).exists():
                shutil.copy2(Path(self.build_lib, "fastroute", built), ROOT / "fastroute")

    def write_schemas(self, folder: Path) -> str:
        """Write `schemas.h`, read from fastroute/ops/*.py, and give its fingerprint."""
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
        return str(module.digest(schemas))


def headers() -> list[str]:
    """The folders of Python's and pybind11's headers; none if one of them is missing, or the module is not wanted."""
    python = sysconfig.get_path("include")
    if os.environ.get("FASTROUTE_PYTHON_MODULE") == "0" or not Path(python, "Python.h").exists():
        return []
    try:
        import pybind11
    except ImportError:
        return []
    return [python, pybind11.get_include()]


def operator_size(source: Path) -> int:
    """Bytes of an operator's source, and of the headers beside it where it has a folder of its own."""
    own = source.parent.name == source.stem
    return sum(path.stat().st_size for path in (source.parent.iterdir() if own else [source]))


def ninja_file(folder: Path, torch: Torch, cuda: Cuda) -> str:
    """The text of the ninja file."""
    torch_folder, nvcc = torch.folder, cuda.nvcc
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
    # The largest operators first, so that none is left for the end.
    sources = [*sorted(CSRC.glob("cpu/**/*.cpp"), key=operator_size, reverse=True), CSRC / "library.cpp"]
    objects = build_objects("cxx", sources, quote(*ops_flags))
    if nvcc:
        host = [flag for flag in CXX_FLAGS if flag.startswith(("-f", "-W"))] + prefix_maps
        command = [nvcc, "-ccbin", COMPILER[-1]]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda.archs]
        # A device newer than the last one compiles its PTX when it first runs it.
        code.append(f"-gencode=arch=compute_{cuda.archs[-1]},code=compute_{cuda.archs[-1]}")
        flags = ["-O3", f"-std={STANDARD}", "-DUSE_CUDA", *code, *for_host(host), *includes]
        depends = "--generate-dependencies-with-compile --dependency-output $out.d"
        rule("nvcc", f"{quote(*command, *flags)} $flags {depends} -c $in -o $out", "compile", depends=True)
        # nvcc links too: it knows where its runtime lies, and takes the static one.
        rule("nvlink", f"{quote(*command, *code, '-cudadevrt=none', '-shared')} $in -o $out $libs", "link")
        objects += build_objects("nvcc", sorted(CSRC.glob("cuda/*.cu")), quote(*ops_flags))
    if headers():
        flags = [flag for folder in headers() for flag in ("-isystem", folder)]
        build("_C.so", "link", build_objects("cxx", [CSRC / "module.cpp"], quote(*flags)), libs="")
    build("_ops.so", "nvlink" if nvcc else "link", objects, libs=quote(*ops_libs))
    return "\n\n".join(text) + "\n"


class BuildPython(build_py):
    """Copies the Python files, and says so when there will be no extension."""

    def run(self) -> None:
        """Copy the Python files; in an editable install without an extension, drop one left from before."""
        if not self.editable_mode:
            # It may hold files that are gone from the sources.
            shutil.rmtree(Path(self.build_lib) / "fastroute", ignore_errors=True)
        super().run()
        if COMPILER:
            return
        print(
            f"fastroute: no C++ extension, because {NO_COMPILER}. The reference backend will be used. "
            "For the fast one, install a C++20 compiler (for example g++) and install fastroute again."
        )
        if self.editable_mode:
            (ROOT / "fastroute" / "_ops.so").unlink(missing_ok=True)
        write_build(ROOT / "fastroute" if self.editable_mode else Path(self.build_lib) / "fastroute", {"reason": NO_COMPILER})


class Wheel(bdist_wheel):
    """A wheel for every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """No version of Python or of its ABI; the platform if there is an extension."""
        return "py3", "none", super().get_tag()[2]


def relative(*patterns: str) -> list[str]:
    """Files of csrc/ that match, relative to this folder."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


def version() -> str:
    """The version of the package, read from its source text, and the local one of this build."""
    text = (ROOT / "fastroute" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__ = (.*)$", text, re.MULTILINE)
    assert found is not None
    local = os.environ.get("FASTROUTE_LOCAL_VERSION")
    return str(ast.literal_eval(found[1])) + (f"+{local}" if local else "")


setup(
    version=version(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "fastroute._ops",
            relative("library.cpp", "module.cpp", "cpu/**/*.cpp", "cuda/*.cu"),
            depends=relative("**/*.h", "**/*.cuh"),
        )
    ]
    if COMPILER
    else [],
)
