"""Adapters that turn other networks and scores into the modules that a router takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastroute._arguments import real
from fastroute.models.arm import Bicubic
from fastroute.models.precision import FullPrecision

# The largest difference of two log scores of one patch that float32 can hold above the smallest score a budget distinguishes.
LOG_RANGE = 80.0


class Function(nn.Module):
    """A callable without weights of its own, such as an interpolation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # [...]
        """Apply the function to `x`."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The name of the function, which distinguishes measured speeds."""
        return f"{self.function.__module__}.{getattr(self.function, '__qualname__', type(self.function).__qualname__)}"


class Described(nn.Module):
    """The network of a model that spandrel loaded, called as its descriptor does: sizes are padded, values lie in [0, 1]."""

    def __init__(self, descriptor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.descriptor = descriptor
        # The descriptor is not a module. Registering its network makes its weights known, movable and countable. The descriptor
        # stays in a list, so that the network is not rewritten without the descriptor's knowledge.
        self.networks = nn.ModuleList([descriptor.model])  # type: ignore[attr-defined]
        self.channels = int(descriptor.input_channels)  # type: ignore[attr-defined]
        self.scale = int(descriptor.scale)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        """Map (N, C, H, W) to (N, C, H * scale, W * scale)."""
        return self.descriptor(x)


class Ranged(nn.Module):
    """A network of another range of values, for values in [0, 1]: they are multiplied before it, and what it makes is divided.

    Args:
        network: maps values in [0, white].
        white: above 0, not 1.
        divide: whether its output is an image too; a classifier's is not.
    """

    def __init__(self, network: nn.Module, white: float, divide: bool = True) -> None:
        super().__init__()
        self.network, self.white, self.divide = network, white, divide
        if isinstance(channels := getattr(network, "channels", None), int):
            self.channels = channels

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [...]
        """See the class."""
        result = self.network(x * self.white)
        return result / self.white if self.divide else result

    def extra_repr(self) -> str:
        """The range, which distinguishes measured speeds."""
        return f"white={self.white:g}, divide={self.divide}"


def as_module(op: str, name: str, network: object) -> nn.Module:
    """`network` as a module: itself, the network of a spandrel model, or a module that calls a function.

    Raises:
        TypeError: `network` is none of these.
    """
    if isinstance(network, nn.Module):
        return network
    if callable(network) and isinstance(getattr(network, "model", None), nn.Module):
        missing = [part for part in ("scale", "input_channels") if not isinstance(getattr(network, part, None), int)]
        if not missing:
            return Described(network)
    if callable(network) and not isinstance(network, type):
        return Function(network)
    raise TypeError(f"{op}: {name} must be a torch.nn.Module, a spandrel model or a function; got {type(network).__name__}")


def in_range(op: str, value_range: float | None, name: str, network: object) -> nn.Module:
    """`network` as a module for values in [0, 1] if it takes values in [0, value_range], or as it is for None.

    Args:
        op, name: "PatchRouter", and "branches" or "classifier", for messages.
        value_range: what white is to the network.
        network: see :func:`as_module`.

    Raises:
        TypeError: it can be no module.
        ValueError: `value_range` is not positive and finite.
    """
    white = 1.0 if value_range is None else real(op, "value_range", value_range)
    if not 0 < white < math.inf:
        raise ValueError(f"{op}: value_range must be positive and finite, or None; got {value_range}")
    module = as_module(op, name, network)
    # An interpolation is the same in every range.
    alike = type(module) in (Bicubic, nn.Identity)
    return module if white == 1 or alike else Ranged(module, white, name != "classifier")


class ScoreClassifier(FullPrecision):
    """Turns one number per patch, its difficulty, into class scores.

    The class of a patch is the number of thresholds that its difficulty exceeds. A penalty on costs, and so a budget, moves the
    thresholds: a patch never gets a cheaper class than an easier patch does.

    Args:
        score: a module or function that maps patches (N, C, p, p) to difficulties (N,), larger for harder patches, for example
            :func:`fastroute.models.arm.edge_score`.
        thresholds: increasing numbers, one less than there are classes.

    Raises:
        ValueError: there are no thresholds, or they do not increase.

    Shape:
        (N, C, p, p) to (N, K), probabilities.
    """

    thresholds: Tensor  # [K - 1]

    def __init__(self, score: nn.Module | Callable[[Tensor], Tensor], thresholds: Sequence[float]) -> None:
        super().__init__()
        values = [real("ScoreClassifier", "thresholds", t) for t in thresholds]
        if not values or values != sorted(set(values)) or not all(map(math.isfinite, values)):
            raise ValueError(f"ScoreClassifier: thresholds must be finite and rise; got {thresholds}")
        self.score = as_module("ScoreClassifier", "score", score)
        self.register_buffer("thresholds", torch.tensor(values, dtype=torch.float64))

    def forward(self, patches: Tensor) -> Tensor:  # [N, C, p, p] -> [N, K]
        """See the class."""
        score = self.score(patches)
        if score.shape != patches.shape[:1]:
            number, got = patches.shape[0], tuple(score.shape)
            raise ValueError(f"ScoreClassifier: score must map ({number}, C, p, p) to ({number},); got {got}")
        # log p_k - log p_(k-1) = a (g(x) - g(t_k)) increases with x, whatever a penalty subtracts, so classes are intervals of
        # x. The arc tangent bounds the difference, so that no score becomes too small to be compared.
        middle = self.thresholds.median()
        size = torch.maximum((self.thresholds - middle).abs().amax(), middle.abs())
        width = torch.where(size > 0, size, 1.0)
        gain = LOG_RANGE / (math.pi * len(self.thresholds))
        reached, limits = ((x.double() - middle).div(width).atan() for x in (score, self.thresholds))
        logits = gain * (reached[:, None] - limits).cumsum(dim=1)
        return torch.softmax(torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1), dim=1)
