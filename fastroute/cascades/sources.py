"""From whatever names a network to the network and what is known of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastroute._copies import inference_copy
from fastroute.models.adapters import Described, as_module
from fastroute.models.arm import Bicubic
from fastroute.models.network import AnySize, Facts
from fastroute.models.pretrained import described_facts

BICUBIC = "bicubic"
PROBE = "probe"
# Sizes that a network of one's own is tried at: its channels, then what its sides must be multiples of.
PROBED, MULTIPLES = 64, (1, 2, 4, 8, 16, 32, 64)

# What names a network: a shipped model, a file, "bicubic", "package.module:function", a module, a spandrel model, a function.
Source = str | Path | nn.Module | Callable[[Tensor], Tensor] | Any


def bicubic(scale: int, channels: int) -> tuple[nn.Module, Facts]:
    """Interpolation, which needs no network."""
    return Bicubic(scale, channels), Facts(BICUBIC, scale, channels, reach=2)


def is_named_code(source: object) -> bool:
    """Whether `source` is "package.module:function" and no file."""
    if not isinstance(source, str) or source.count(":") != 1 or Path(source).exists():
        return False
    module, name = source.split(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_code(source: str) -> Any:
    """What the function "package.module:function" gives.

    Raises:
        ValueError: no such module or function.
    """
    module, name = source.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"load: {source!r} names no function that can be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"load: {source!r} must be a function that gives a network; it is a {type(function).__name__}")
    return function()


def described(op: str, network: Source, scale: int | None = None) -> tuple[nn.Module, Facts]:
    """A network of one's own and what can be found out about it.

    Args:
        op: what the user called.
        network: a module, a spandrel model or a function.
        scale: factor between output and input; default that of a trial.

    Raises:
        TypeError: it is none of these.
        ValueError: it maps no image to one of as many channels and a whole multiple of its size.
    """
    module = as_module(op, "model", network)
    if isinstance(module, Described):
        return module, described_facts(module.descriptor)
    facts = probed(op, module, scale)
    return (module if facts.any_size else AnySize(module, facts)), facts


@torch.inference_mode()
def probed(op: str, module: nn.Module, scale: int | None = None) -> Facts:
    """What runs of `module` on small images tell.

    Raises:
        ValueError: see :func:`described`.
    """
    probe = inference_copy(module, share=True)
    like = next(probe.parameters(), torch.empty(0))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    told = getattr(module, "channels", None)
    read = [m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
    channels = told if isinstance(told, int) else next((c for c in read if c in (1, 3, 4)), 3)

    def run(height: int, width: int) -> Tensor | Exception:
        try:
            return probe(torch.full((1, channels, height, width), 0.5, dtype=dtype, device=like.device))
        except Exception as error:  # a network of others
            return error

    found = run(PROBED, PROBED)
    if isinstance(found, Exception):
        reason = (str(found).splitlines() or [type(found).__name__])[0][:200]
        raise ValueError(f"{op}: model takes no image (1, {channels}, {PROBED}, {PROBED}): {reason}") from found
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    factor = found.shape[-1] // PROBED if isinstance(found, Tensor) and found.ndim == 4 else 0
    if factor < 1 or shape != (1, channels, factor * PROBED, factor * PROBED) or (scale or factor) != factor:
        wanted = f"(1, {channels}, {scale or 's'} * {PROBED}, {scale or 's'} * {PROBED})"
        raise ValueError(f"{op}: model must map (1, {channels}, {PROBED}, {PROBED}) to {wanted}; got {shape}")
    multiple = next((m for m in MULTIPLES if _fits(run(m * (PROBED // m + 1), PROBED), m, factor)), PROBED)
    least = next((n for n in (1, 2, 4, 8, 16, 32) if n % multiple == 0 and _fits_least(run(n, n), n, factor)), PROBED)
    names = ("scale", "channels", "least", "multiple")
    return Facts(type(module).__name__, factor, channels, least, multiple, sources=dict.fromkeys(names, PROBE))


def _fits(found: Tensor | Exception, multiple: int, factor: int) -> bool:  # [B, C, H, W]
    height = multiple * (PROBED // multiple + 1)
    return isinstance(found, Tensor) and tuple(found.shape[-2:]) == (factor * height, factor * PROBED)


def _fits_least(found: Tensor | Exception, side: int, factor: int) -> bool:  # [B, C, H, W]
    return isinstance(found, Tensor) and tuple(found.shape[-2:]) == (factor * side, factor * side)
