"""The choice of the backend of an operator, and the reasons why a backend cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastroute._extras import remedy

GPU_BACKENDS = ("triton", "cuda")
BACKENDS = ("reference", "cpu", *GPU_BACKENDS)
VARIABLE = "FASTROUTE_BACKEND"
# The oldest Triton and the lowest compute capability for which the kernels are compiled and tested.
TRITON_VERSION = (3, 6)
CAPABILITY = (8, 0)
REMEDY = "run `pip install .` again in a copy of the source, with a C++20 compiler such as g++"
# The names under which Triton for NVIDIA GPUs is installed: from PyPI, on Windows, and with PyTorch's nightly builds.
TRITON = ("triton", "triton-windows", "pytorch-triton")
# The names of its builds for other GPUs alone. AMD also installs one as "triton", beside a torch that tells what it is for.
OTHER_TRITONS = {
    "pytorch-triton-rocm": "AMD",
    "triton-rocm": "AMD",
    "pytorch-triton-xpu": "Intel",
    "triton-xpu": "Intel",
}

# Operators that consist of matrix products: a GPU runs them by torch's own products, whatever backend is requested.
PRODUCTS = frozenset({"cell_mlp", "conv1x1", "conv3x3"})


class BackendError(RuntimeError):
    """A requested backend cannot run. The message gives the reasons."""


class Extension:
    """The compiled operators, which are loaded once, when an operator is first imported. Nothing is compiled.

    Attributes:
        info: how it was built, as `_build.json` says; empty without an extension.
        reasons: why there is no extension; empty if it is loaded.
        looked_for: whether loading it has been tried.
    """

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.reasons: list[str] = []
        self.looked_for = False

    def load(self, schema_digest: str) -> None:
        """Load the compiled operators if they were built from the schemas of this package, else warn."""
        self.looked_for = True
        self._load(schema_digest)
        # No warning for a user who requested the reference.
        if self.reasons and os.environ.get(VARIABLE) != "reference":
            warnings.warn(
                f"fastroute runs without its compiled operators, many times slower on a CPU: {'; '.join(self.reasons)}; "
                f"{VARIABLE}=reference says that this is meant",
                stacklevel=2,
            )

    def _load(self, schema_digest: str) -> None:
        folder = Path(__file__).parent
        try:
            info = json.loads((folder / "_build.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.reasons = [_not_built(folder.parent)]
            return
        if "reason" in info:
            self.reasons = [f"the C++ extension was not built, because {info['reason']} ({REMEDY})"]
            return
        if info["schema_digest"] != schema_digest:
            self.reasons = ["the C++ extension was built from other sources: run `pip install .` again"]
            return
        library = folder / "_ops.so"
        if not library.exists():
            self.reasons = ["the library of C++ operators (_ops.so) is missing: run `pip install .` again"]
            return
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            self.reasons = [f"the C++ operators failed to load: {error}"]
            return
        self.info = {**info, **_compiled()}


def _compiled() -> dict[str, Any]:
    """What the compiler says, if the module that asks it was built for this version of Python."""
    try:
        module = importlib.import_module("fastroute._C")
    except ImportError:
        return {}
    return dict(module.build_info())


def _not_built(root: Path) -> str:
    """Why nothing says how the package in `root` was built: it is a source folder, or files of the package are missing."""
    if not (root / "setup.py").exists():
        return f"the C++ extension was not built ({REMEDY})"
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != root.resolve()]
    installed = importlib.machinery.PathFinder.find_spec("fastroute", elsewhere)
    if installed is not None and installed.origin is not None:
        return (
            f"Python imports fastroute from the source folder {root}, which was not built, instead of the one installed in "
            f"{Path(installed.origin).parent}: start Python in another folder"
        )
    return (
        f"Python imports fastroute from the source folder {root}, which was not built: run `pip install .` and start Python in "
        "another folder, or `pip install --editable .`"
    )


EXTENSION = Extension()


def loaded_extension() -> Extension:
    """The extension, after it has been loaded by importing the operators' library."""
    if not EXTENSION.looked_for:
        importlib.import_module("fastroute.ops._library")
    return EXTENSION


def unsupported_reasons(op: str, backend: str, device: torch.device) -> list[str]:
    """Why `backend` cannot run `op` on `device`; empty if it can. The single predicate behind choice, report and error."""
    if backend == "reference":
        return []
    if backend == "cpu":
        if device.type != "cpu":
            return [f"the tensors are on {device}"]
        return loaded_extension().reasons
    if device.type != "cuda" and not (backend == "triton" and device.type == "cpu"):
        other = "" if device.type in ("cpu", "meta") else "; the kernels are those of NVIDIA GPUs"
        return [f"the tensors are on {device}{other}"]
    if _is_products(op, backend, device):
        return ["matrix products of torch run it there (backend reference)"]
    # AMD's torch calls its devices "cuda" too.
    if device.type == "cuda" and torch.version.hip is not None:
        return [f"this torch is built for AMD GPUs (ROCm {torch.version.hip}); the kernels are those of NVIDIA GPUs"]
    return _triton_reasons(op, device.type, device.index) if backend == "triton" else _cuda_reasons(op, device.index)


def _triton_reasons(op: str, device_type: str, index: int | None) -> list[str]:
    version = next(filter(None, map(installed_version, TRITON)), None)
    if version is None:
        others = [f"; {name} is for {maker} GPUs" for name, maker in OTHER_TRITONS.items() if installed_version(name)]
        return [f"triton is not installed: {remedy('gpu')}{''.join(others)}"]
    if _release(version) < TRITON_VERSION:
        return [f"triton {version} is older than {'.'.join(map(str, TRITON_VERSION))}"]
    if device_type == "cpu" and not _interpreted():
        return ["the tensors are on cpu (TRITON_INTERPRET=1 runs them in Triton's interpreter, for tests)"]
    if device_type == "cuda":
        found = torch.cuda.get_device_capability(index)
        if found < CAPABILITY:
            return [f"the device is of compute capability {_dotted(found)}, {_dotted(CAPABILITY)} is needed"]
    if not (Path(__file__).parent / "triton" / f"{op}.py").exists():
        return [f"this version has no triton kernel of {op}"]
    library = importlib.import_module("fastroute.triton._library")
    reasons: list[str] = library.reasons(op, torch.device(device_type if index is None else f"{device_type}:{index}"))
    return reasons


def _cuda_reasons(op: str, index: int | None) -> list[str]:
    extension = loaded_extension()
    if extension.reasons:
        return extension.reasons
    if not extension.info["cuda"]:
        why = extension.info["cuda_left_out"]
        return [f"the C++ extension was built without CUDA kernels, because {why}; `pip install .` builds it again"]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastroute::{op}", "CUDA"):
        return [f"this version has no cuda kernel of {op}"]
    built = [(int(arch[:-1]), int(arch[-1])) for arch in extension.info["cuda_archs"]]
    found = torch.cuda.get_device_capability(index)
    # Machine code of an architecture runs on it and on later ones of the same generation. The last one is also built as PTX,
    # which the driver translates for all later ones.
    native = any(found[0] == major and found[1] >= minor for major, minor in built)
    if not native and found < built[-1]:
        names = ", ".join(map(_dotted, built))
        return [f"the device is of compute capability {_dotted(found)}, the extension was built for {names}"]
    driver, nvcc = _driver_version(), _release(extension.info.get("nvcc") or "")
    # A driver runs machine code of any CUDA of its own generation, and translates PTX of those that it knows.
    if driver is not None and (nvcc[0] > driver[0] or (nvcc > driver and not native)):
        what = f"the driver knows CUDA {_dotted(driver)}, the extension was built by nvcc {_dotted(nvcc)}"
        return [f"{what} (update the driver, or build with an older nvcc)"]
    return []


def _driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver knows; None where torch cannot tell. No device is initialised."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = ask() if ask is not None else 0
    return (number // 1000, number % 1000 // 10) if number else None


@functools.cache
def kernels_on_gpu(op: str, index: int | None) -> tuple[str, ...]:
    """The backends that have a kernel of `op` on this GPU, the usually faster first. They are found once per process."""
    device = torch.device("cuda" if index is None else f"cuda:{index}")
    return tuple(backend for backend in ("cuda", "triton") if not unsupported_reasons(op, backend, device))


# By operator and number of a GPU, the backend that was measured to be faster there; see `fastroute.runtime.kernels`.
_preferred: dict[tuple[str, int | None], str] = {}
# The operators whose backend is chosen while somebody records them.
_called: set[str] | None = None


def prefer(op: str, index: int | None, backend: str | None) -> None:
    """Let `backend`, which has a kernel of `op`, run it on this GPU unless another one is requested; None for the usual one."""
    if backend is None:
        _preferred.pop((op, index), None)
    else:
        _preferred[op, index] = backend


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The operators whose backend on a GPU is chosen within the block, by any thread."""
    global _called
    before, _called = _called, set()
    try:
        yield _called
    finally:
        _called = before


def _fastest_on_gpu(op: str, index: int | None) -> str:
    """The backend of `op` on this GPU."""
    if _called is not None:
        _called.add(op)
    return _preferred.get((op, index)) or next(iter(kernels_on_gpu(op, index)), "reference")


# The values are constant in a process, so a trace of torch.compile need not look inside. This is the attribute that
# torch.compiler.assume_constant_result sets; calling that would import the compiler with this package.
for _function in (_triton_reasons, _cuda_reasons, _fastest_on_gpu):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def _is_products(op: str, backend: str, device: torch.device) -> bool:
    """Whether torch's own products run `op` if the other operators run on `backend`."""
    return op in PRODUCTS and backend in GPU_BACKENDS and (device.type == "cuda" or _interpreted())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if there is none of this name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _release(version: str) -> tuple[int, int]:
    """The leading numbers of a version: (3, 6) of "3.6.0+git1234"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def select(op: str, device: torch.device) -> str:
    """The backend that runs `op` on `device`: the requested one, else the fastest that can.

    Raises:
        BackendError: the requested backend cannot run it. The message gives the reasons.
    """
    request = requested()
    if request:
        by_variable = not _asked()
        _check_name(request, f"{VARIABLE}: backend" if by_variable else "backend")
        if _is_products(op, request, device):
            return "reference"
        reasons = unsupported_reasons(op, request, device)
        if reasons:
            remedy = f"; unset the environment variable {VARIABLE} for the automatic choice" if by_variable else ""
            raise BackendError(f"{op}: backend '{request}' was asked for but cannot run: {'; '.join(reasons)}{remedy}")
        return request
    if device.type == "cuda":
        return _fastest_on_gpu(op, device.index)
    # Triton's interpreter runs on a CPU only if it is requested.
    return "reference" if unsupported_reasons(op, "cpu", device) else "cpu"


def requested() -> str | None:
    """The backend requested by :func:`use_backend` in this thread or by the environment, if any."""
    return _asked() or os.environ.get(VARIABLE) or None


def use_backend(name: str | None) -> _Request:
    """Request one backend from now on, or within a ``with`` block. None returns to the automatic choice.

    The request applies to the calling thread, as torch's own default device and gradient mode do. The environment variable
    FASTROUTE_BACKEND does the same for a whole process.

    Args:
        name: "reference", "cpu", "triton", "cuda" or None.

    Raises:
        ValueError: an unknown name. A backend that cannot run raises when an operator is called, with the reasons.

    Example:
        >>> with fastroute.use_backend("reference"):
        ...     patches = fastroute.extract_patches(image, grid)
    """
    if name is not None:
        _check_name(name)
    request = _Request(name)
    # A request without a block lasts until the next one, so only the last of these matters.
    while len(_thread.requests) > 1 and not (_thread.requests[-1].entered or _thread.requests[-2].entered):
        del _thread.requests[-2]
    _thread.ask(request)
    return request


class _Request:
    """A request, which lasts until its ``with`` block ends, if it has one."""

    def __init__(self, name: str | None) -> None:
        self.name, self.entered = name, False

    def __enter__(self) -> None:
        self.entered = True
        if not any(request is self for request in _thread.requests):
            _thread.ask(self)

    def __exit__(self, *exception: object) -> None:
        # Removed by identity, because blocks need not end in the order in which they began.
        _thread.drop(self)


class _Requests(threading.local):
    """The requests of the current thread, the latest last."""

    def __init__(self) -> None:
        self.requests: list[_Request] = []
        # Kept separately, because the compiler can follow a plain value of a thread and notices when it changes.
        self.name: str | None = None

    def ask(self, request: _Request) -> None:
        self.requests.append(request)
        self.name = request.name

    def drop(self, request: _Request) -> None:
        self.requests = [other for other in self.requests if other is not request]
        self.name = self.requests[-1].name if self.requests else None


_thread = _Requests()


def _asked() -> str | None:
    return _thread.name


def _check_name(name: str, what: str = "backend") -> None:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}; got {name!r}")
