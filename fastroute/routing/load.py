"""From a name or a checkpoint to an upscaler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute.catalogue import DEFAULT_MODEL, WEIGHTS, list_models
from fastroute.models import arm as arm_models
from fastroute.models.arm import ARM
from fastroute.models.carn import CARN, RGB_MEAN
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint, state_dict_of
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.pixel_router import PixelRouter

# The weight by which a backbone is known; its first size is the width.
FIRST_LAYERS = {
    "fsrcnn": "head_conv.0.weight",
    "carn": "entry.weight",
    "srresnet": "conv_first.weight",
    "rcan": "head.0.weight",
}


def load(name_or_path: str | Path = DEFAULT_MODEL, device: str | torch.device = "cpu") -> PatchRouter | PixelRouter:
    """An upscaler from a shipped model or a checkpoint file.

    Args:
        name_or_path: a name that :func:`list_models` gives, or a file (.pth, .pt or .safetensors): ClassSR or CDNSR over
            FSRCNN, CARN, SRResNet or RCAN in their published layout; ARM with its table, as `fastroute train` writes it;
            PCSR over FSRCNN or CARN as published or as `fastroute train` writes it; or one of those networks alone, or as
            PCSR's code stores it.
        device: where to run.

    Returns:
        :class:`fastroute.PatchRouter`, or for PCSR :class:`fastroute.PixelRouter`; call its `upscale`.

    Raises:
        ValueError: a device that cannot be used.
        fastroute.CheckpointError: no such model or file, a damaged file, or another architecture (the message names the keys
            that do not fit).
    """
    device = usable_device(device)
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
        if "classifier.layers.0.weight" in state:
            pcsr = _pcsr(state)
            load_weights(pcsr, state, path)
            return PixelRouter(pcsr.to(device))
        return _router(state, path, **settings).to(device)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"cannot use {path}: {error}") from error


def usable_device(name: str | torch.device) -> torch.device:
    """The device `name`, once a tensor could be made there.

    Raises:
        ValueError: no such device, or none that works; the message says why.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # Torch goes on to list every backend there is.
        reason = str(error).splitlines()[0].split(". ")[0].split(", ipu")[0]
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}") from error
    return device


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, int]:
    found = {}
    for name in ("scale", "patch", "stride", "input_range"):
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


def _router(
    state: dict[str, Tensor], path: Path, scale: int = 4, patch: int = 32, stride: int = 28, input_range: int = 255
) -> PatchRouter:
    if "classifier.table.psnr" in state:
        arm = _arm(state, scale, patch)
        load_weights(arm, state, path)
        if not arm.table.ready:
            raise CheckpointError(f"cannot use {path}: its table holds no measurements; train the table on images first")
        return PatchRouter(arm.branches, arm.classifier, patch, stride, scale, costs=arm.costs(patch))
    for backbone, name in FIRST_LAYERS.items():
        widths = _widths(state, rf"net(\d+)\.{re.escape(name)}")
        if widths:
            branches = [_network(backbone, state, f"net{k}.", w, scale, input_range) for k, w in enumerate(widths, start=1)]
            layers = sum(re.fullmatch(r"classifier\.CondNet\.\d+\.weight", key) is not None for key in state)
            system = ClassSR(branches, PatchClassifier(len(branches), layers=max(layers, 2)))
            load_weights(system, state, path)
            return PatchRouter(system.branches, system.classifier, patch, stride, scale)
        alone = _widths(state, rf"{re.escape(name)}()")
        if alone:
            network = _network(backbone, state, "", alone[0], scale, input_range)
            load_weights(network, state, path)
            return PatchRouter([network], None, patch, stride, scale)
    known = ", ".join(f"{backbone} ({name})" for backbone, name in FIRST_LAYERS.items())
    raise CheckpointError(
        f"{path} is of no known architecture; known are ClassSR and CDNSR (classifier.*, net1.*, …), ARM (network.*, "
        f"classifier.table.*), PCSR, and networks alone: {known}; its keys begin with {', '.join(list(state)[:4])}"
    )


def _network(
    backbone: str, state: Mapping[str, Tensor], prefix: str, width: int, scale: int, input_range: int = 255
) -> nn.Module:
    """The network under `prefix`; its depth and layout are read off its keys, since the published ones differ in them."""
    if backbone == "fsrcnn":
        return FSRCNN(width, scale)
    if backbone == "carn":
        return CARN(width, scale, mean_layers=f"{prefix}sub_mean.weight" in state, batch_norm=f"{prefix}c1.1.weight" in state)
    if backbone == "srresnet":
        return SRResNet(width, scale, blocks=max(1, _count(state, prefix, r"recon_trunk\.(\d+)\.conv1\.weight")))
    groups = _count(state, prefix, r"body\.(\d+)\.body\.0\.body\.0\.weight")
    blocks = _count(state, prefix, r"body\.0\.body\.(\d+)\.body\.0\.weight")
    squeeze = state.get(f"{prefix}body.0.body.0.body.3.conv_du.0.weight")
    reduction = width // len(squeeze) if squeeze is not None and squeeze.ndim == 4 and 0 < len(squeeze) <= width else 16
    return RCAN(width, scale, max(1, groups), max(1, blocks), reduction, input_range=input_range)


def _arm(state: Mapping[str, Tensor], scale: int, patch: int) -> ARM:
    for backbone, name in FIRST_LAYERS.items():
        whole = _widths(state, rf"network\.{re.escape(name)}()")
        if whole and backbone in arm_models.BACKBONES:
            widths = state["widths"].flatten().tolist() if "widths" in state else []
            # Nothing is built before the numbers agree with the weights.
            if widths[-1:] != whole or not all(isinstance(w, int) and 0 < w <= whole[0] for w in widths):
                raise ValueError(f"its widths must rise to {whole[0]}, that of its network; they are {widths}")
            return ARM(backbone, widths, scale, bins=state["classifier.table.psnr"].shape[-1], patch=patch)
    raise ValueError(
        "it has a table, but no network of a known architecture; its keys begin with " + ", ".join(list(state)[:4])
    )


def _pcsr(state: Mapping[str, Tensor]) -> PCSR:
    def widths(prefix: str) -> list[int]:
        """Sizes of the layers of an MLP, its last one included."""
        found = {int(m[1]): len(v) for k, v in state.items() if (m := re.fullmatch(rf"{prefix}\.layers\.(\d+)\.weight", k))}
        return [found[number] for number in sorted(found)]

    for backbone, name in FIRST_LAYERS.items():
        width = _widths(state, rf"encoder\.{re.escape(name)}()")
        if width and backbone in ("fsrcnn", "carn"):
            carn = backbone == "carn"
            encoder = CARN(width[0], upsample=False) if carn else FSRCNN(width[0], upsample=False)
            classifier = widths("classifier")
            # One without layers is free.
            hidden = [layers[:-1] if (layers := widths(rf"upsamplers\.{k}")) else None for k in range(min(classifier[-1], 256))]
            return PCSR.build(encoder, hidden, classifier[:-1], RGB_MEAN if carn else None)
    raise ValueError(f"it has a pixel classifier, but no known encoder; its keys begin with {', '.join(list(state)[:4])}")


def _count(state: Mapping[str, Tensor], prefix: str, pattern: str) -> int:
    """How many different numbers the keys under `prefix` have at the group of `pattern`."""
    return len({m[1] for key in state if (m := re.fullmatch(re.escape(prefix) + pattern, key))})


def _widths(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = {int(m[1] or 0): v.shape[0] for k, v in state.items() if (m := re.fullmatch(pattern, k)) and v.ndim == 4 and len(v)}
    return [found[k] for k in sorted(found)]
