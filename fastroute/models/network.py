"""One network and what is known of it, whoever loaded it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUPPORTED, DISCOURAGED, INTERNAL = "supported", "discouraged", "internal"


@dataclass(frozen=True)
class Facts:
    """What is known of a network, and where that is from.

    Attributes:
        architecture: its name.
        scale: factor between output and input.
        channels: of images in and out.
        least, multiple, square: what sizes of input it takes: no side below `least`, sides that are multiples of `multiple`,
            equal sides.
        tiling: "supported"; "discouraged" where the network goes by what the whole image is like; "internal" where it makes
            tiles by itself.
        reach: pixels beyond which nothing changes a pixel's result; None where that is unknown, or far.
        halves: the half types in which it computes well.
        sources: where these facts are from: "shapes" of weights, "spandrel", "file", "probe" for a run of the network.
    """

    architecture: str
    scale: int
    channels: int = 3
    least: int = 1
    multiple: int = 1
    square: bool = False
    tiling: str = SUPPORTED
    halves: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    sources: dict[str, str] = field(default_factory=dict)
    reach: int | None = None

    @property
    def any_size(self) -> bool:
        """Whether the network takes images of every size."""
        return self.least <= 1 and self.multiple == 1 and not self.square

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The least size that the network takes and that holds (height, width)."""
        sides = [-(-max(side, self.least) // self.multiple) * self.multiple for side in (height, width)]
        return (max(sides), max(sides)) if self.square else (sides[0], sides[1])


class AnySize(nn.Module):
    """A network that takes certain sizes only, for images of all: continued below and to the right, cut off afterwards.

    Images are continued by reflection as far as they reach, then by their edge, as spandrel does.

    Args:
        network: of the sizes that `facts` name.
        facts: of the network.
    """

    def __init__(self, network: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.network, self.facts = network, facts
        self.scale, self.channels = facts.scale, facts.channels

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """(B, C, H, W) to (B, C, H * scale, W * scale)."""
        height, width = x.shape[-2:]
        needed = self.facts.padded(height, width)
        if needed == (height, width):
            return self.network(x)
        more = needed[0] - height, needed[1] - width
        reflected = min(more[0], height - 1), min(more[1], width - 1)
        x = F.pad(x, (0, reflected[1], 0, reflected[0]), mode="reflect")
        x = F.pad(x, (0, more[1] - reflected[1], 0, more[0] - reflected[0]), mode="replicate")
        return self.network(x)[..., : height * self.scale, : width * self.scale]
