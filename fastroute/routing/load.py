"""From a name or a checkpoint to an upscaler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastroute.models.carn import CARN
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint, state_dict_of
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.pixel_router import PixelRouter

DEFAULT_MODEL = "classsr-fsrcnn-x4"
WEIGHTS = Path(__file__).parent.parent / "weights"


def list_models() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | Path = DEFAULT_MODEL, device: str | torch.device = "cpu") -> PatchRouter | PixelRouter:
    """An upscaler from a shipped model or a checkpoint file.

    Args:
        name_or_path: a name that :func:`list_models` gives, or a file: ClassSR over FSRCNN in its published layout (.pth,
            .pt or .safetensors), PCSR over FSRCNN or CARN as published, or a plain FSRCNN or CARN, alone or as PCSR's code
            stores it.
        device: where to run.

    Returns:
        :class:`fastroute.PatchRouter`, or for PCSR :class:`fastroute.PixelRouter`; call its `upscale`.

    Raises:
        fastroute.CheckpointError: no such model or file, a damaged file, or another architecture (the message names the keys
            that do not fit).
    """
    path = WEIGHTS / f"{name_or_path}.safetensors"
    if str(name_or_path) not in list_models():
        path = Path(name_or_path)
        if not path.exists() and not path.suffix:
            raise CheckpointError(
                f"no model or file {str(name_or_path)!r}; the models are {', '.join(list_models()) or 'none'}"
            )
    content, metadata = read_checkpoint(path)
    settings = _settings(metadata, path)
    model = content.get("model")
    if isinstance(model, Mapping) and model.get("name") == "pcsr-phase1":
        try:
            return PixelRouter(PCSR.from_published(content).to(device))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"cannot use {path} as PCSR: {error}") from error
    if isinstance(model, Mapping) and isinstance(model.get("sd"), Mapping):
        # PCSR's format names the network beside its weights.
        arguments = model.get("args")
        for name in ("upscale", "scale"):
            if isinstance(arguments, Mapping) and name in arguments:
                settings["scale"] = _positive(arguments[name], name, path)
        content = model["sd"]
    state = state_dict_of(content, path)
    try:
        return _router(state, path, **settings).to(device)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, int]:
    found = {}
    for name in ("scale", "patch", "stride"):
        if name in metadata:
            try:
                found[name] = _positive(json.loads(metadata[name]), name, path)
            except json.JSONDecodeError as error:
                raise CheckpointError(f"cannot use {path}: its {name} is {metadata[name]!r}, not a number") from error
    return found


def _positive(value: object, name: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"cannot use {path}: its {name} must be a positive whole number; it is {value!r}")
    return value


def _router(state: dict[str, Tensor], path: Path, scale: int = 4, patch: int = 32, stride: int = 28) -> PatchRouter:
    widths = _widths(state, r"net(\d+)\.head_conv\.0\.weight")
    if widths:
        system = ClassSR.fsrcnn(widths, scale)
        load_weights(system, state, path)
        return PatchRouter(system.branches, system.classifier, patch, stride, scale)
    alone = _widths(state, r"head_conv\.0\.weight()")
    if alone:
        network = FSRCNN(alone[0], scale)
        load_weights(network, state, path)
        return PatchRouter([network], None, patch, stride, scale)
    carn = _widths(state, r"entry\.weight()")
    if carn:
        plain = CARN(carn[0], scale)
        load_weights(plain, state, path)
        return PatchRouter([plain], None, patch, stride, scale)
    known = "ClassSR over FSRCNN (classifier.*, net1.head_conv.*, …), PCSR, FSRCNN (head_conv.*, …) and CARN (entry.*, …)"
    some = ", ".join(list(state)[:4])
    raise CheckpointError(f"{path} is of no known architecture; known are {known}; its keys begin with {some}")


def _widths(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = {int(m[1] or 0): v.shape[0] for k, v in state.items() if (m := re.fullmatch(pattern, k)) and v.ndim == 4 and len(v)}
    return [found[k] for k in sorted(found)]
