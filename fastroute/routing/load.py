"""From a name or a checkpoint to an upscaler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint, state_dict_of
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.routing.patch_router import PatchRouter

DEFAULT_MODEL = "classsr-fsrcnn-x4"
WEIGHTS = Path(__file__).parent.parent / "weights"


def list_models() -> list[str]:
    """Names of the models shipped with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def load(name_or_path: str | Path = DEFAULT_MODEL, device: str | torch.device = "cpu") -> PatchRouter:
    """An upscaler from a shipped model or a checkpoint file.

    Args:
        name_or_path: a name that :func:`list_models` gives, or a file: ClassSR over FSRCNN in its published layout (.pth,
            .pt or .safetensors), or a plain FSRCNN, alone or as PCSR's code stores it.
        device: where to run.

    Returns:
        :class:`fastroute.PatchRouter`; call its `upscale`.

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
    settings = {k: json.loads(v) for k, v in metadata.items() if k in ("scale", "patch", "stride")}
    model = content.get("model")
    if isinstance(model, Mapping) and "sd" in model:
        # PCSR's format names the network beside its weights.
        settings.setdefault("scale", int(model.get("args", {}).get("upscale", 4)))
        content = model["sd"]
    state = state_dict_of(content, path)
    return _router(state, path, settings).to(device)


def _router(state: dict[str, Tensor], path: Path, settings: dict[str, int]) -> PatchRouter:
    scale, patch, stride = settings.get("scale", 4), settings.get("patch", 32), settings.get("stride", 28)
    widths = _widths(state, r"net(\d+)\.head_conv\.0\.weight")
    if widths:
        system = ClassSR.fsrcnn(widths, scale)
        load_weights(system, state, path)
        return PatchRouter(system.branches, system.classifier, patch, stride, scale)
    if "head_conv.0.weight" in state:
        network = FSRCNN(state["head_conv.0.weight"].shape[0], scale)
        load_weights(network, state, path)
        return PatchRouter([network], None, patch, stride, scale)
    known = "ClassSR over FSRCNN (classifier.*, net1.head_conv.*, …) and FSRCNN (head_conv.*, body_conv.*, tail_conv.*)"
    some = ", ".join(list(state)[:4])
    raise CheckpointError(f"{path} is of no known architecture; known are {known}; its keys begin with {some}")


def _widths(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = {int(m[1]): int(v.shape[0]) for k, v in state.items() if (m := re.fullmatch(pattern, k))}
    return [found[k] for k in sorted(found)]
