"""`fastroute info --check`: a known picture through every backend and engine, compared with the known result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastroute.backends import BACKENDS, unsupported_reasons, use_backend
from fastroute.diagnostics import devices, needs
from fastroute.engines import ENGINES, TORCH, engine_of
from fastroute.loading import load
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter

HEIGHT, WIDTH = 40, 56
# Kernels and engines sum in other orders, which may round to the next level, and may move a pixel at the border of two classes.
LEVELS, SHARE = 1, 1e-3


@dataclass(frozen=True)
class Known:
    """A model and what it makes of the known picture.

    Attributes:
        model: its name.
        what: what is checked with it.
        values: every 4,099th value of the result, flattened, of the reference on a CPU; two hexadecimal digits each.
    """

    model: str
    what: str
    values: str


STEP = 4099
KNOWN = (
    Known("classsr-fsrcnn-x4", "patches", "002d97ff4b72ff69983bff51557f6fa9c58d585c7d76ffff93c480"),
    Known("pcsr-fsrcnn-x4", "pixels", "002d54cf4b76eb699717ff5164706fadd78d58548d76f1f693c67f"),
    Known("realesrgan-x4plus-student", "cascade", "032d5ecb4c73936a9747c351637c6e95818c585a8675e9d190bf6c"),
)
# Engines compile networks, one of which tells enough.
NETWORK = Known("classsr-fsrcnn-x4", "its first network", "022d6dff4b78ff69982bff51779a6fd0828d58568376ffff93d3a7")


@dataclass(frozen=True)
class Verdict:
    """One line of the report.

    Attributes:
        status: "ok"; "WRONG", if the result is another one; "FAILED", if there is none; "skipped", if it cannot run here.
        subject: device, backend or engine, and what was routed.
        remark: numbers or reasons.
    """

    status: Literal["ok", "WRONG", "FAILED", "skipped"]
    subject: str
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.subject}" + (f": {self.remark}" if self.remark else "")


def known_picture() -> Tensor:
    """uint8 (3, 40, 56): a smooth half and a half full of edges, by integer arithmetic alone."""
    y, x = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)[None]
    smooth = 2 * x + 3 * y
    edges = (x * x + 3 * y * y) // 7 * 53 + x // 5 % 2 * 90
    return torch.stack([torch.where(x < WIDTH // 2, smooth + 20 * c, edges + 31 * c) % 256 for c in range(3)]).to(torch.uint8)


def check_installation() -> Iterator[Verdict]:
    """Run the known picture through every backend and engine of every device, and give a verdict on each.

    Results are compared with known values, and each with the reference of this machine: at most one value in a thousand may
    differ by more than one level of 255.
    """
    with use_backend("reference"):
        expected = {known: upscale(known, torch.device("cpu"), TORCH) for known in (*KNOWN, NETWORK)}
    for name in devices():
        device = torch.device(name)
        for backend in BACKENDS:
            reasons = unsupported_reasons("extract_patches", backend, device)
            if reasons:
                yield Verdict("skipped", f"{name}, backend {backend}", needs(reasons[0], name))
                continue
            for known in KNOWN:
                with use_backend(backend):
                    yield judge(f"{name}, backend {backend}, {known.what}", known, expected[known], device, TORCH)
        for engine in ENGINES:
            reasons = engine_of(engine).unsupported_reasons(device, torch.float32)
            if reasons:
                yield Verdict("skipped", f"{name}, engine {engine}", needs(reasons[0], name))
            elif engine != TORCH:
                yield judge(f"{name}, engine {engine}", NETWORK, expected[NETWORK], device, engine)


def upscale(known: Known, device: torch.device, engine: str) -> Tensor:
    """uint8 (3, H, W): the known picture, upscaled on `device`."""
    router = load(known.model, device=device, tune=False)
    image = known_picture().to(device)
    if isinstance(router, PixelRouter):
        return router.upscale(image, penalty=0.5).image.cpu()
    if known is NETWORK:
        assert isinstance(router, PatchRouter)
        # A router leaves a pixel shuffle that ends all of its networks to the stitching.
        network = nn.Sequential(router.branches[0], nn.PixelShuffle(router.shuffle))
        router = PatchRouter([network], patch=router.patch, scale=router.scale, tune=False)
        router.compile(engine)
    return router.upscale(image).image.cpu()


def judge(subject: str, known: Known, expected: Tensor, device: torch.device, engine: str) -> Verdict:
    """The verdict on one backend or engine."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = upscale(known, device, engine)
    except Exception as error:  # whatever is wrong with an installation
        return Verdict("FAILED", subject, (str(error).strip() or type(error).__name__).splitlines()[0])
    if found.shape != expected.shape:
        return Verdict("WRONG", subject, f"the result is {tuple(found.shape)} instead of {tuple(expected.shape)}")
    apart = (found.int() - expected.int()).abs()
    far = int((apart > LEVELS).sum())
    if far > SHARE * apart.numel():
        words = f"{far:,} of {apart.numel():,} values differ from the reference, by up to {int(apart.max())} of 255 levels"
        return Verdict("WRONG", subject, words)
    values = torch.tensor(list(bytes.fromhex(known.values)), dtype=torch.int32)
    most = int((found.flatten()[::STEP].int() - values).abs().max())
    if most > LEVELS:
        return Verdict("WRONG", subject, f"known values of the result differ by up to {most} of 255 levels")
    return Verdict("ok", subject, "" if not far else f"{far} of {apart.numel():,} values differ by more than one level")
