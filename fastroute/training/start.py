"""Weights to start from: those of the recipe's own layout, or of another system or network over the same backbone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastroute._contexts import levels_to_caller
from fastroute.models.architectures import FIRST_LAYERS, scale_of_weights, widths_of
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint, state_dict_of
from fastroute.models.fsrcnn import TAIL, resampled_tail
from fastroute.models.pcsr import rename_published

# What a network has and an encoder has not.
AFTER_FEATURES = (
    "tail_conv.", "upsample.", "exit.", "sub_mean.", "add_mean.", "upconv1.", "upconv2.", "HRconv.", "conv_last.", "tail.",
)  # fmt: skip
BATCH_NORM_EPS = 1e-5


class Start(NamedTuple):
    """Weights to start from.

    Attributes:
        state: a state dict.
        name: what messages call it.
        recipe: that made it; "" where that is unknown.
        scale: its upscaling factor; 0 where that is unknown.
    """

    state: Mapping[str, Tensor]
    name: str = "init"
    recipe: str = ""
    scale: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Start:
        """The weights in a checkpoint file; also one as PCSR's code stores it, a network beside its weights.

        Raises:
            fastroute.CheckpointError: the file cannot be read or holds no weights.
        """
        content, metadata = read_checkpoint(path)
        model = content.get("model")
        if isinstance(model, Mapping) and isinstance(model.get("sd"), Mapping):
            content = {rename_published(str(key)): value for key, value in model["sd"].items()}
        scale = metadata.get("scale", "")
        recipe = metadata.get("system", "").strip('"')
        return cls(state_dict_of(content, path), str(path), recipe, int(scale) if scale.isdecimal() else 0)

    def at_scale(self, scale: int) -> Start:
        """The weights for networks of another factor: the last layers of FSRCNN are resampled, all others stay.

        Where nothing says for which factor they are, it is the one at which flat images stay flat; where that does not tell
        either, all stay.

        Warns:
            UserWarning: FSRCNN's weights that keep flat images flat at no factor, or at several.
        """
        tails = [
            key for key, value in self.state.items() if key.endswith("tail_conv.weight") and value.shape[2:] == (TAIL, TAIL)
        ]
        own = self.scale or (self._judged() if tails else None) or scale
        if own == scale:
            return self
        made = {key: resampled_tail(self.state[key], own, scale) for key in tails}
        return self._replace(state={**self.state, **made}, scale=scale)

    def _judged(self) -> int | None:
        """The factor of FSRCNN's weights, or a warning."""
        network = self.network.state
        width = widths_of(network, re.escape(FIRST_LAYERS["fsrcnn"]) + "()")
        found = scale_of_weights("fsrcnn", network, "", width[0]) if width else None
        if found is None:
            warnings.warn(
                f"{self.name} does not say its upscaling factor, and its weights keep flat images flat at no factor from 2 to "
                "4 or at several, so they are taken as they are",
                stacklevel=levels_to_caller(),
            )
        return found

    @property
    def branches(self) -> list[Start]:
        """The branches of ClassSR's layout, cheapest first; none for another layout."""
        numbers = sorted({int(m[1]) for key in self.state if (m := re.match(r"net(\d+)\.", key))})
        return [self.part(f"net{number}.") for number in numbers]

    @property
    def network(self) -> Start:
        """The one network that it is, ARM's supernet, or the most expensive branch of ClassSR and CDNSR."""
        if branches := self.branches:
            return branches[-1]
        return self.part("network.") if any(key.startswith("network.") for key in self.state) else self

    def part(self, prefix: str) -> Start:
        """The entries under `prefix`, without it."""
        inner = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        return self._replace(state=inner, name=f"{self.name} ({prefix[:-1]})")


def start_network(network: nn.Module, start: Start) -> None:
    """Load a network of the same architecture; its batch norms are folded where `network` has biases instead.

    Raises:
        fastroute.CheckpointError: it does not fit; the message names the entries.
    """
    state = dict(start.state)
    own = network.state_dict()
    for key in [key for key in own if key.endswith(".0.bias") and key not in state]:
        layer = key.removesuffix("0.bias")
        names = [f"{layer}1.{name}" for name in ("running_mean", "running_var", "weight", "bias")]
        if {f"{layer}0.weight", *names} <= state.keys():
            mean, variance, weight, bias = (state[name] for name in names)
            fused = fuse_conv_bn_weights(state[f"{layer}0.weight"], None, mean, variance, BATCH_NORM_EPS, weight, bias)
            state = {name: value for name, value in state.items() if not name.startswith(f"{layer}1.")}
            state[f"{layer}0.weight"], state[key] = (value.detach() for value in fused)
    load_weights(network, state, start.name)


def start_branches(branches: list[nn.Module], start: Start) -> None:
    """Load the branches of ClassSR or CDNSR, one by one.

    Raises:
        fastroute.CheckpointError: their number or one of them does not fit.
    """
    found = start.branches
    if len(found) != len(branches):
        raise CheckpointError(f"{start.name} does not fit: it has {len(found)} branches net1, net2, …, not {len(branches)}")
    for branch, weights in zip(branches, found, strict=True):
        start_network(branch, weights)


def start_encoder(encoder: nn.Module, start: Start) -> None:
    """Load the layers of a network up to its features, without those that enlarge the image and shift its mean.

    Raises:
        fastroute.CheckpointError: it does not fit; the message names the entries.
    """
    network, own = start.network, encoder.state_dict()
    # RCAN's encoder has the first of its means.
    trunk = {key: value for key, value in network.state.items() if key in own or not key.startswith(AFTER_FEATURES)}
    start_network(encoder, network._replace(state=trunk))
