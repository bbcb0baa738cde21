"""The network that a state dict belongs to: its depth, widths and layout follow from its keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastroute.models import arm as arm_models
from fastroute.models.arm import ARM
from fastroute.models.carn import CARN, RGB_MEAN
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import BACKBONES as ENCODERS
from fastroute.models.pcsr import PCSR, encoder_of
from fastroute.models.rcan import RCAN
from fastroute.models.scales import scale_of_flat_images
from fastroute.models.srresnet import SRResNet

# The weight that identifies a backbone. Its first size is the width.
FIRST_LAYERS = {
    "fsrcnn": "head_conv.0.weight",
    "carn": "entry.weight",
    "srresnet": "conv_first.weight",
    "rcan": "head.0.weight",
}
# A weight beside it that those architectures of others lack whose first layer has the same name.
SECOND_LAYERS = {"srresnet": "recon_trunk.0.conv1.weight", "rcan": "body.0.body.0.body.0.weight"}
MOST_PARTS = 1000


def classsr_of(
    backbone: str, state: Mapping[str, Tensor], widths: Sequence[int], scale: int, options: Mapping[str, Any]
) -> ClassSR:
    """A ClassSR or CDNSR model over `backbone`, with branches of `widths`."""
    branches = [network_of(backbone, state, f"net{k}.", w, scale, **options) for k, w in enumerate(widths, start=1)]
    layers = count_parts(state, "", r"classifier\.CondNet\.(\d+)\.weight")
    first = state.get("classifier.CondNet.0.weight")
    width = len(first) if first is not None and first.ndim == 4 and len(first) else 128
    return ClassSR(branches, PatchClassifier(len(branches), width, layers=max(layers, 2)))


def network_of(
    backbone: str,
    state: Mapping[str, Tensor],
    prefix: str,
    width: int,
    scale: int,
    input_range: float = 255,
    mean: Sequence[float] = RGB_MEAN,
) -> nn.Module:
    """The network under `prefix`. Published networks differ, so its depth and layout are found from its keys and shapes."""
    entry = state.get(prefix + FIRST_LAYERS[backbone])
    channels = entry.shape[1] if entry is not None and entry.ndim == 4 else 3
    if backbone == "fsrcnn":
        shrink = state.get(f"{prefix}body_conv.0.0.weight")
        narrow = len(shrink) if shrink is not None and shrink.ndim == 4 and len(shrink) >= channels else 12
        depth = count_parts(state, prefix, r"body_conv\.(\d+)\.weight", 4)
        return FSRCNN(width, scale, narrow, depth, channels)
    if backbone == "carn":
        inner = state.get(f"{prefix}upsample.up.body.0.weight")
        groups = width // inner.shape[1] if inner is not None and inner.ndim == 4 and 0 < inner.shape[1] <= width else 4
        mean_layers, batch_norm = f"{prefix}sub_mean.weight" in state, f"{prefix}c1.1.weight" in state
        merge_bias = f"{prefix}c1.0.bias" in state
        return CARN(width, scale, groups, channels, True, mean, mean_layers, batch_norm, merge_bias)
    if backbone == "srresnet":
        return SRResNet(width, scale, max(1, count_parts(state, prefix, r"recon_trunk\.(\d+)\.conv1\.weight")), channels)
    sizes: dict[str, Any] = _rcan_options(state, prefix, width)
    return RCAN(width, scale, **sizes, input_range=input_range)


def _rcan_options(state: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, int]:
    """The depth of an RCAN, and the width of its attention."""
    groups = count_parts(state, prefix, r"body\.(\d+)\.body\.0\.body\.0\.weight")
    blocks = count_parts(state, prefix, r"body\.0\.body\.(\d+)\.body\.0\.weight")
    squeeze = state.get(f"{prefix}body.0.body.0.body.3.conv_du.0.weight")
    reduction = width // len(squeeze) if squeeze is not None and squeeze.ndim == 4 and 0 < len(squeeze) <= width else 16
    return {"groups": max(1, groups), "blocks": max(1, blocks), "reduction": reduction}


def arm_of(state: Mapping[str, Tensor], scale: int, patch: int) -> ARM:
    """An ARM model with its table, as `fastroute train` writes it."""
    for backbone, name in FIRST_LAYERS.items():
        whole = widths_of(state, rf"network\.{re.escape(name)}()")
        if whole and backbone in arm_models.BACKBONES:
            widths = state["widths"].flatten().tolist() if "widths" in state else []
            # Nothing is built until the numbers agree with the weights.
            if widths[-1:] != whole or not all(isinstance(w, int) and 0 < w <= whole[0] for w in widths):
                raise ValueError(f"its widths must rise to {whole[0]}, that of its network; they are {widths}")
            make = partial(arm_models.BACKBONES[backbone], **_sizes(backbone, state, "network.", whole[0]))
            return ARM(make, widths, scale, bins=state["classifier.table.psnr"].shape[-1], patch=patch)
    raise ValueError(
        "it has a table, but no network of a known architecture; its keys begin with " + ", ".join(list(state)[:4])
    )


def pcsr_of(state: Mapping[str, Tensor], mean: Sequence[float] | None = None) -> PCSR:
    """A PCSR model as `fastroute train` writes it."""

    def widths(prefix: str) -> list[int]:
        """The sizes of the layers of an MLP, including the last one."""
        pattern = rf"{prefix}\.layers\.(\d{{1,9}})\.weight"
        found = {int(m[1]): len(v) for k, v in state.items() if v.ndim and (m := re.fullmatch(pattern, k))}
        return [found[number] for number in sorted(found)]

    for backbone, name in FIRST_LAYERS.items():
        width = widths_of(state, rf"encoder\.{re.escape(name)}()")
        if width and backbone in ENCODERS:
            encoder = encoder_of(backbone, width=width[0], **_sizes(backbone, state, "encoder.", width[0]))
            classifier = widths("classifier")
            # An MLP without layers is a free class.
            hidden = [layers[:-1] if (layers := widths(rf"upsamplers\.{k}")) else None for k in range(min(classifier[-1], 256))]
            return PCSR.build(encoder, hidden, classifier[:-1], mean or (RGB_MEAN if backbone == "carn" else None))
    raise ValueError(f"it has a pixel classifier, but no known encoder; its keys begin with {', '.join(list(state)[:4])}")


def _sizes(backbone: str, state: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, int]:
    """The options of a network, besides its width, that follow from the shapes of its weights under `prefix`."""
    if backbone == "srresnet":
        return {"blocks": max(1, count_parts(state, prefix, r"recon_trunk\.(\d+)\.conv1\.weight"))}
    if backbone == "rcan":
        return _rcan_options(state, prefix, width)
    if backbone == "carn":
        inner = state.get(f"{prefix}b1.b1.body.0.weight")
        return {
            "groups": width // inner.shape[1] if inner is not None and inner.ndim == 4 and 0 < inner.shape[1] <= width else 4
        }
    shrink = state.get(f"{prefix}body_conv.0.0.weight")
    narrow = len(shrink) if shrink is not None and shrink.ndim == 4 and len(shrink) >= 3 else 12
    return {"shrink": narrow, "depth": count_parts(state, prefix, r"body_conv\.(\d+)\.weight", 4)}


def count_parts(state: Mapping[str, Tensor], prefix: str, pattern: str, dimensions: int | None = None) -> int:
    """How many different numbers the group of `pattern` takes in the keys under `prefix`, for tensors of `dim` dimensions."""
    found = {m[1]: value for key, value in state.items() if (m := re.fullmatch(re.escape(prefix) + pattern, key))}
    if len(found) > MOST_PARTS:
        raise ValueError(f"it has {len(found)} parts {prefix}{pattern}, where a network has at most {MOST_PARTS}")
    return sum(dimensions in (None, value.ndim) for value in found.values())


def widths_of(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The output channels of the convolutions whose keys match `pattern`, by the number in its group."""
    found = {int(m[1] or 0): v.shape[0] for k, v in state.items() if (m := re.fullmatch(pattern, k)) and v.ndim == 4 and len(v)}
    return [found[k] for k in sorted(found)]


def scale_of_weights(backbone: str, state: Mapping[str, Tensor], prefix: str, width: int) -> int | None:
    """The factor at which the network under `prefix` keeps flat images flat; None where that does not tell, or nothing fits."""

    def build(scale: int) -> nn.Module:
        with torch.device("meta"):
            network = network_of(backbone, state, prefix, width, scale)
        own = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
        network.load_state_dict(own, assign=True)
        return network

    try:
        return scale_of_flat_images(build)
    except (RuntimeError, ValueError):
        # Weights that do not fit are refused later, by their names.
        return None
