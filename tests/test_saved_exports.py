"""Exports of the routers of fixed sizes: saved, loaded where the package is not, and the same bits."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fastroute
from fastroute.backends import loaded_extension

# A process without the package needs the operators' library.
pytestmark = pytest.mark.skipif(bool(loaded_extension().reasons), reason="; ".join(loaded_extension().reasons))

SIZE = {"shape": (3, 40, 56), "dtype": torch.uint8}
LIBRARY = Path(fastroute.__file__).parent / "_ops.so"
LOADED = """
    import sys
    import torch

    sys.modules["fastroute"] = None  # an import of it fails
    torch.ops.load_library({library!r})
    frame, wanted = torch.load("expected.pt")
    found = {program}(frame)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    print([torch.equal(*pair) for pair in zip(found, wanted)], [name for name in sys.modules if name.startswith("fastroute.")])
"""


class Results(nn.Module):
    """All results of a router, as a plain tuple."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router

    def forward(self, image):
        return tuple(self.router.upscale(image))


class Named(Results):
    def forward(self, image):
        return self.router.upscale(image)


def fixed_patches():
    return fastroute.FixedPatchRouter(fastroute.load(tune=False), **SIZE, capacities=[0.5, 0.4, 0.3], budget=0.7)


def fixed_pixels():
    return fastroute.FixedPixelRouter(fastroute.load("pcsr-fsrcnn-x4"), **SIZE, scale=2, penalty=0.5)


def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def exported(router: nn.Module, folder: Path):
    """The exported program; what it gives for another frame lies in `folder`."""
    first, second = frames()
    with torch.no_grad():
        program = torch.export.export(Results(router), (first,))
    torch.save((second, tuple(router.upscale(second))), folder / "expected.pt")
    return program


def run_elsewhere(program: str, folder: Path) -> str:
    """What a process prints that cannot import the package."""
    code = textwrap.dedent(LOADED).format(library=str(LIBRARY), program=program)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("make", [fixed_patches, fixed_pixels])
def test_a_saved_export_needs_only_the_library(make, tmp_path):
    torch.export.save(exported(make(), tmp_path), tmp_path / "saved.pt2")
    assert run_elsewhere("torch.export.load('saved.pt2').module()", tmp_path) == "[True, True, True] []"


@pytest.mark.slow
@pytest.mark.parametrize("make", [fixed_patches, fixed_pixels])
def test_a_compiled_package_needs_only_the_library(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    program = exported(make(), tmp_path)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    assert run_elsewhere("torch._inductor.aoti_load_package('compiled.pt2')", tmp_path) == "[True, True, True] []"


@pytest.mark.slow
def test_the_named_result_is_saved_too(tmp_path):
    router, (first, second) = fixed_patches(), frames()
    torch.export.save(torch.export.export(Named(router), (first,)), tmp_path / "saved.pt2")
    found, expected = torch.export.load(tmp_path / "saved.pt2").module()(second), router.upscale(second)
    assert isinstance(found, fastroute.FixedUpscaled)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
