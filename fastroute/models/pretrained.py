"""Networks of others from their checkpoints: Real-ESRGAN's two architectures here, all others through spandrel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._extras import remedy
from fastroute.models.adapters import Described
from fastroute.models.checkpoints import CheckpointError, fitted, shown, without_prefixes
from fastroute.models.compact import Compact
from fastroute.models.network import AnySize, Facts
from fastroute.models.rrdbnet import RRDBNet

# RRDBNet's layers in the layouts before: of ESRGAN's first code, in which most networks of users are stored, and of its second.
LAYERS = ("conv_first", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")
SECOND_NAMES = dict(zip(("conv_first", "trunk_conv", "upconv1", "upconv2", "HRconv", "conv_last"), LAYERS, strict=True))
FIRST_NAMES = dict(zip((f"model.{n}" for n in (0, 3, 6, 8, 10)), (LAYERS[0], *LAYERS[2:]), strict=True))
BLOCK = re.compile(r"(?:model\.1\.sub|RRDB_trunk)\.(\d{1,4})\.(?:RDB([123])\.conv([1-5])(?:\.0)?\.)?(weight|bias)")
# The weights by which they are known.
COMPACT, RRDB = ("body.0.weight", "body.1.weight"), ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight")
SHAPES = "shapes"
MOST_LAYERS = 1000


def own_network(state: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, Facts] | None:
    """The network of a state dict in the layout of Real-ESRGAN, or in one of ESRGAN's at a scale of 4; None for another.

    Args:
        state: under the names that are stored.
        path: of the file, for messages.

    Raises:
        fastroute.CheckpointError: its entries do not fit each other.
    """
    state = _renamed(state) or without_prefixes(dict(state))
    if all(name in state for name in RRDB):
        return _rrdb(state, path)
    if all(name in state for name in COMPACT) and _is_compact(state):
        return _compact(state, path)
    return None


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of a layout before under their names of today; None for another layout, or one with other layers."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if m := BLOCK.fullmatch(name):
            # The convolution behind the blocks is the last of their chain in the first layout.
            found[f"body.{m[1]}.rdb{m[2]}.conv{m[3]}.{m[4]}" if m[2] else f"conv_body.{m[4]}"] = value
        elif new := FIRST_NAMES.get(layer) or SECOND_NAMES.get(layer):
            found[f"{new}.{kind}"] = value
        else:
            return None
    complete = all(f"{layer}.{kind}" in found for layer in LAYERS for kind in ("weight", "bias"))
    return found if complete and len(found) == len(state) and "conv_hr.weight" in found else None


def _is_compact(state: Mapping[str, Tensor]) -> bool:
    numbers = [m[1] for key in state if (m := re.fullmatch(r"body\.(\d{1,4})\.(weight|bias)", key))]
    return len(numbers) == len(state) and state["body.0.weight"].ndim == 4 and state["body.1.weight"].ndim == 1


def _compact(state: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, Facts]:
    last = max(int(key.split(".")[1]) for key in state)
    first, end = state["body.0.weight"], state.get(f"body.{last}.weight")
    if end is None or end.ndim != 4 or last % 2 or last < 2 or last > 2 * MOST_LAYERS:
        raise CheckpointError(f"cannot use {path}: it begins like Compact, but its last layer is no convolution")
    channels = first.shape[1]
    scale = round((len(end) / channels) ** 0.5)
    if scale < 1 or scale**2 * channels != len(end):
        raise CheckpointError(
            f"cannot use {path}: its last layer must have {channels} channels times the square of a scale; it has {len(end)}"
        )
    network = fitted(lambda: Compact(len(first), last // 2 - 1, scale, channels), state, path)
    known = dict.fromkeys(("architecture", "scale", "channels", "reach"), SHAPES)
    # Each convolution sees a pixel further.
    return network, Facts("Compact", scale, channels, sources=known, reach=last // 2 + 1)


def _rrdb(state: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, Facts]:
    first, dense, end = (state[name] for name in RRDB)
    if any(x.ndim != 4 for x in (first, dense, end)):
        raise CheckpointError(f"cannot use {path}: it begins like RRDBNet, but its layers are no convolutions")
    channels = len(end)
    scale = {1: 4, 4: 2, 16: 1}.get(first.shape[1] // channels) if first.shape[1] % channels == 0 else None
    if scale is None:
        raise CheckpointError(
            f"cannot use {path}: its first layer must read {channels}, {4 * channels} or {16 * channels} channels, for a scale "
            f"of 4, 2 or 1; it reads {first.shape[1]}"
        )
    blocks = len({m[1] for key in state if (m := re.match(r"body\.(\d{1,4})\.", key))})
    network = fitted(lambda: RRDBNet(len(first), min(blocks, MOST_LAYERS), len(dense), scale, channels), state, path)
    # Where pixels are folded into channels, the sides are multiples of four as spandrel has them: images are continued alike.
    least, multiple = (2, 1) if scale == 4 else (4, 4)
    known = dict.fromkeys(("architecture", "scale", "channels"), SHAPES)
    facts = Facts("RRDBNet", scale, channels, least, multiple, sources=known)
    return AnySize(network, facts), facts


def spandrel_network(state: Mapping[str, Any], path: Path, known: str = "") -> tuple[nn.Module, Facts]:
    """The network that spandrel makes of a state dict.

    Args:
        state: under the names that are stored.
        path: of the file, for messages.
        known: what else is known, for messages.

    Raises:
        fastroute.CheckpointError: spandrel is not installed, cannot be imported, knows no such architecture, or the network is
            not one from images to images.
    """
    names = ", ".join(shown(name) for name in list(state)[:4])
    unknown = f"{path} is of no known architecture; known are {known}; its keys begin with {names}"
    try:
        import spandrel
    except ImportError as error:
        raise CheckpointError(f"{unknown}; many more are known where spandrel is: {remedy('pretrained')}") from error
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{unknown}; spandrel, which knows many more, cannot be imported: {reason}; it needs a torchvision built for this "
            f"torch ({torch.__version__})"
        ) from error
    try:
        descriptor = _by_spandrel(spandrel, state)
    except spandrel.UnsupportedModelError as error:
        raise CheckpointError(f"{unknown}; spandrel {spandrel.__version__} does not know it either") from error
    except Exception as error:  # a network of others, built from shapes that nobody has checked
        if buffers.is_exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"cannot use {path}: spandrel cannot build it: {reason}") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise CheckpointError(
            f"cannot use {path}: {descriptor.architecture.name} needs more than an image ({descriptor.purpose})"
        )
    if descriptor.input_channels != descriptor.output_channels:
        read, written = descriptor.input_channels, descriptor.output_channels
        raise CheckpointError(f"cannot use {path}: it reads {read} channels and writes {written}; both must be the same")
    descriptor.eval()
    return Described(descriptor), described_facts(descriptor)


def _by_spandrel(spandrel: Any, state: Mapping[str, Any]) -> Any:
    """Its descriptor, under the names that are stored or without their prefixes."""
    try:
        return spandrel.ModelLoader().load_from_state_dict(dict(state))
    except spandrel.UnsupportedModelError:
        stripped = without_prefixes(dict(state))
        if stripped.keys() == state.keys():
            raise
        return spandrel.ModelLoader().load_from_state_dict(stripped)


def described_facts(descriptor: Any) -> Facts:
    """What spandrel's descriptor says of a network."""
    size = descriptor.size_requirements
    halves = (torch.float16,) * bool(descriptor.supports_half) + (torch.bfloat16,) * bool(descriptor.supports_bfloat16)
    names = ("architecture", "scale", "channels", "least", "multiple", "square", "tiling", "halves")
    return Facts(
        str(descriptor.architecture.name),
        int(descriptor.scale),
        int(descriptor.input_channels),
        max(1, int(size.minimum)),
        max(1, int(size.multiple_of)),
        bool(size.square),
        str(descriptor.tiling.name).lower(),
        halves,
        dict.fromkeys(names, "spandrel"),
    )
