"""The base class of all routers: a frozen module that maps images to images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastroute._contexts import CallLock, ordinary
from fastroute.engines import ANY
from fastroute.models.precision import HALVES, FullPrecision, check_precision, probed_dtype
from fastroute.runtime.protocols import Reader, Writer
from fastroute.runtime.results import Streamed, Upscaled

if TYPE_CHECKING:
    from typing_extensions import Self


class Router(FullPrecision, ABC):
    """Super-resolution of whole images by several networks: the base of :class:`PatchRouter` and :class:`PixelRouter`.

    A router is a module like any other. ``router(image)`` returns the upscaled image; `.to`, `.half`, `.bfloat16` and `.cuda`
    move its networks to a device or change the type in which they compute; `state_dict`, `copy.deepcopy` and `pickle` include
    their weights. Images keep their own type. A router is for inference: its networks are frozen copies in evaluation mode, and
    no gradients flow through it.

    Attributes:
        scale: upscaling factor.
        channels: number of channels of the images.
        num_classes: number of classes, one per network or upsampler.
        border: what networks see beyond the edge of an image, "zero" or "edge".
        dtype: type in which the networks compute, except for those that would lose too much quality.
        budget: budget of :meth:`forward`, as `upscale` takes it. None, the default, leaves the choice to the classifier.
    """

    scale: float
    channels: int
    num_classes: int
    border: str
    dtype: torch.dtype
    _place: Tensor  # where the networks are, also those without weights

    def __init__(self) -> None:
        super().__init__()
        self.lock = CallLock()
        self.training = False
        self.budget: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self._place.device

    def forward(self, image: Tensor) -> Tensor:  # [B, C, H, W] or [C, H, W] -> [..., C, H * scale, W * scale]
        """The upscaled image that :meth:`upscale` returns for `image` within :attr:`budget`."""
        return self.upscale(image, budget=self.budget).image

    @abstractmethod
    def upscale(self, image: Tensor, **options: Any) -> Upscaled:  # [B, C, H, W] or [C, H, W]
        """Super-resolve an image or a batch of images. All options are keywords."""

    @abstractmethod
    def stream(self, reader: Reader, writer: Writer, **options: Any) -> Streamed:
        """Super-resolve an image without holding it or its result in memory as a whole."""

    @abstractmethod
    def output_size(self, height: int, width: int, **options: Any) -> tuple[int, int]:
        """Height and width of the result for an image of the given size."""

    @abstractmethod
    def compile(self, engine: str = ANY) -> Self:  # type: ignore[override]
        """Let another engine than PyTorch run the networks."""

    def train(self, mode: bool = True) -> Self:
        """Set the flag `training`. The networks are frozen and stay in evaluation mode."""
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        op = f"{type(self).__name__}.to"
        with ordinary(op), self.lock:
            device, dtype = probed_dtype(fn, torch.empty(0, dtype=self.dtype, device=self.device))
            check_precision(op, dtype, device)
            if dtype in HALVES and self.dtype not in HALVES:
                self._before_halving(dtype)
            super()._apply(_sparing(fn, self._exact_in(dtype)), recurse)
            self.dtype = dtype
            self._moved()
        return self

    def _before_halving(self, dtype: torch.dtype) -> None:
        """Called while the weights are still exact, before they are converted to a half type."""

    def _exact_in(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """Weights and buffers that stay float32 in a router of `dtype`."""
        return ()

    def _moved(self) -> None:
        """Called after the networks have moved or changed their type."""


def _sparing(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:  # [...] each
    """`fn`, except that tensors in `kept` keep their type."""
    spared = {id(x) for x in kept}

    def apply(x: Tensor) -> Tensor:  # [...]
        made = fn(x)
        return x.to(made.device) if id(x) in spared and made.dtype in HALVES else made

    return apply if spared else fn
