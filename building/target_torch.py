"""Finds the torch that the package will run with, without importing it.

An isolated build, which is what pip does by default, hides the packages of the environment that it installs into, but runs the
Python of that environment. Asked without the variables that hide them, this Python tells where its torch lies. The extension
uses LibTorch's stable ABI, so any torch that is new enough will do to build against; which devices it was built for decides
whether CUDA kernels are built as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The oldest torch whose stable ABI has all that the kernels call; one build serves it and later ones.
STABLE_ABI = (2, 10)

VARIABLE = "FASTROUTE_TORCH"
# By these pip keeps a build apart from the environment of its Python.
ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
WHERE = "import importlib.util as u; s = u.find_spec('torch'); print(*(s and s.submodule_search_locations or []), sep='\\n')"


class NoTorch(Exception):
    """There is no torch to build against, or one that is too old. The message gives the remedy."""


class Torch(NamedTuple):
    """A torch.

    Attributes:
        folder: the folder of the package.
        version: such as "2.13.0+cpu".
        cuda: the CUDA version that it was built for, such as "13.0"; None without CUDA.
    """

    folder: Path
    version: str
    cuda: str | None

    def __str__(self) -> str:
        return f"torch {self.version} in {self.folder}"


def target_torch() -> Torch:
    """The torch to build against: that of FASTROUTE_TORCH, of this Python, or of the active virtual or conda environment.

    Raises:
        NoTorch: there is none, or it is too old.
    """
    named = os.environ.get(VARIABLE)
    torch = next(filter(None, map(read_torch, [Path(named)] if named else folders())), None)
    if torch is None and named:
        raise NoTorch(f"{VARIABLE}={named} is not the folder of a torch package, such as .../site-packages/torch")
    if torch is None:
        raise NoTorch(
            "fastroute is built against the torch that it will run with, and there is none in this environment. Install it "
            "first (pip install torch; PyTorch's own index also has smaller builds for CPUs), then fastroute again. If there "
            "is one, but the build is kept apart from it, as by uv or python -m build: install without build isolation "
            f"(--no-build-isolation, after pip install 'setuptools>=77' ninja), or name the folder of torch in {VARIABLE}. "
            "FASTROUTE_NO_EXTENSION=1 installs without the compiled operators."
        )
    if tuple(int(part) for part in torch.version.split(".")[:2]) < STABLE_ABI:
        oldest = ".".join(map(str, STABLE_ABI))
        raise NoTorch(f"fastroute needs torch {oldest} or newer; this is {torch}. Install a newer torch first")
    return torch


def folders() -> Iterator[Path]:
    """Folders of torch packages, best first."""
    pythons = [sys.executable]
    pythons += [f"{os.environ[name]}/bin/python" for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    # Without isolation, or with torch in an isolated environment, what Python sees as it was started.
    yield from ask(sys.executable, dict(os.environ))
    for python in pythons:
        yield from ask(python, {key: value for key, value in os.environ.items() if key not in ISOLATION})


def ask(python: str, environment: dict[str, str]) -> list[Path]:
    """Where `python` would import torch from."""
    try:
        # Away from the source folder, which would come first.
        found = subprocess.run([python, "-c", WHERE], env=environment, cwd=os.sep, capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [Path(line) for line in found.stdout.splitlines() if line] if found.returncode == 0 else []


def read_torch(folder: Path) -> Torch | None:
    """The torch in `folder`, or None if there is none with headers."""
    version = folder / "version.py"
    if not version.is_file() or not (folder / "include" / "torch" / "csrc").is_dir():
        return None
    values: dict[str, object] = {}
    exec(compile(version.read_text(encoding="utf-8"), str(version), "exec"), values)
    cuda = values.get("cuda")
    return Torch(folder, str(values["__version__"]), str(cuda) if cuda else None)
