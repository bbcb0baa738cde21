"""Which implementation of an operator runs, and why another cannot."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
VARIABLE = "FASTROUTE_BACKEND"

_requested: str | None = None


class Extension:
    """The compiled operators: loaded once, on first import of the package; compiles nothing.

    Attributes:
        info: what `_C.build_info()` returns; empty without an extension.
        reasons: why there is no extension; empty when it is loaded.
    """

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.reasons: list[str] = []

    def load(self, schema_digest: str) -> None:
        """Load the compiled operators if they were built from the schemas of this package."""
        try:
            module: ModuleType = importlib.import_module("fastroute._C")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            self.reasons = [
                "the C++ extension was not built (install g++ and run `pip install .` again)"
                if missing
                else f"the C++ extension failed to load: {error}"
            ]
            return
        info = dict(module.build_info())
        if info["schema_digest"] != schema_digest:
            self.reasons = ["the C++ extension was built from other sources: run `pip install .` again"]
            return
        libraries = sorted(Path(__file__).parent.glob("_ops*.so"))
        if not libraries:
            self.reasons = ["the library of C++ operators (_ops.so) is missing: run `pip install .` again"]
            return
        try:
            torch.ops.load_library(str(libraries[0]))
        except (OSError, RuntimeError) as error:
            self.reasons = [f"the C++ operators failed to load: {error}"]
            return
        self.info = info


EXTENSION = Extension()


def unsupported_reasons(op: str, backend: str, device: torch.device) -> list[str]:
    """Why `backend` cannot run `op` on `device`; empty when it can. The one predicate that picks, reports and raises."""
    if backend == "reference":
        return []
    if backend == "cpu":
        if device.type != "cpu":
            return [f"the tensors are on {device}"]
        return EXTENSION.reasons
    if device.type != "cuda":
        return [f"the tensors are on {device}"]
    return [f"this version has no {backend} kernel of {op}"]


def select(op: str, device: torch.device) -> str:
    """The backend that runs `op` on `device`: the requested one, else the fastest that can.

    Raises:
        RuntimeError: the requested backend cannot run it; the message gives the reasons.
    """
    request = requested()
    if request:
        _check_name(request)
        reasons = unsupported_reasons(op, request, device)
        if reasons:
            raise RuntimeError(f"{op}: backend '{request}' was asked for but cannot run: {'; '.join(reasons)}")
        return request
    for backend in ("cuda", "triton", "cpu"):
        if not unsupported_reasons(op, backend, device):
            return backend
    return "reference"


def requested() -> str | None:
    """The backend asked for by :func:`use_backend` or the environment, if any."""
    return _requested or os.environ.get(VARIABLE) or None


def use_backend(name: str | None) -> _Request:
    """Ask for one backend from now on, or within a ``with`` block; None returns to the automatic choice.

    The environment variable FASTROUTE_BACKEND does the same for a whole process.

    Args:
        name: "reference", "cpu", "triton", "cuda" or None.

    Raises:
        ValueError: an unknown name. A backend that cannot run raises when an operator is called, with the reasons.

    Example:
        >>> with fastroute.use_backend("reference"):
        ...     patches = fastroute.extract_patches(image, grid)
    """
    global _requested
    if name is not None:
        _check_name(name)
    request = _Request(_requested)
    _requested = name
    return request


class _Request:
    """Restores the previous request when its ``with`` block ends."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._previous


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {name!r}")
