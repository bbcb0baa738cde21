"""Convolutions that run by the kernels `conv3x3` and `conv1x1` where these apply: on a CPU, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.backends import select
from fastroute.models.fused import rectify_
from fastroute.ops.conv3x3 import kernel_weight

PLAIN = (Tensor, nn.Parameter)


def version_of(weight: Tensor) -> int:  # [...]
    """How often a weight was changed in place. Tensors made in inference mode do not count."""
    return -1 if weight.is_inference() else weight._version


def run_into(operator: Any, arguments: tuple[Any, ...], out: Tensor | None) -> Tensor:  # [B, O, H, W] -> [B, O, H, W]
    """The result of an operator, in `out` where that is given."""
    if out is None or torch.compiler.is_compiling():
        y: Tensor = operator.default(*arguments)
        # Compilers take no slice as what an operator writes.
        return y if out is None else out.copy_(y)
    operator.out(*arguments, out=out)
    return out


class FusedConv2d(nn.Conv2d):
    """A convolution that keeps the size, with what follows it. Where its kernel does not apply, PyTorch's own layers run.

    Args:
        layer: the convolution that it replaces, whose parameters it shares.
        rectifier: the layer behind it, if :func:`is_rectifier` holds for that.
        shuffle: factor of the pixel shuffle behind both; 1 for none.
    """

    OPERATOR = ""
    # In which its kernel is faster than PyTorch's layers.
    DTYPES: tuple[torch.dtype, ...] = ()
    rectifier: nn.Module | None

    def __init__(self, layer: nn.Conv2d, rectifier: nn.Module | None = None, shuffle: int = 1) -> None:
        channels, size = (layer.in_channels, layer.out_channels), layer.kernel_size[0]
        super().__init__(*channels, size, padding=size // 2, groups=layer.groups, bias=False, device="meta")
        self.weight, self.bias, self.shuffle = layer.weight, layer.bias, shuffle
        self.register_module("rectifier", rectifier)
        self._ran_by_kernel = False
        self._filled: tuple[float, Tensor] | None = None  # a slope, once for every channel
        self.train(layer.training)

    def has_kernel(self, *inputs: Tensor) -> bool:  # [B, C, H, W] each
        """Whether the operator's kernel runs for `inputs`. A compiler takes it where it ran last and could run."""
        if torch.compiler.is_compiling():
            graded = torch.is_grad_enabled()
            return self._ran_by_kernel and all(
                x.dtype == self.weight.dtype and x.device.type == "cpu" and not (graded and x.requires_grad)
                for x in (self.weight, *inputs)
            )
        runs = self._is_plain(*inputs) and not torch.jit.is_tracing() and select(self.OPERATOR, inputs[0].device) == "cpu"
        if runs is not self._ran_by_kernel:
            self._ran_by_kernel = runs
        return runs

    def _is_plain(self, *inputs: Tensor) -> bool:  # [B, C, H, W] each
        """Whether weight and inputs are plain tensors of one of the dtypes on the CPU, none of which needs a gradient."""
        graded = torch.is_grad_enabled()
        # Called for every layer of every pass, so attributes are taken from where they lie.
        weight = self._parameters["weight"]
        if weight is None or weight.dtype not in self.DTYPES:
            return False
        for x in (weight, *inputs):
            if x.dtype is not weight.dtype or type(x) not in PLAIN or not x.is_cpu or (graded and x.requires_grad):
                return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedConv2d:
        self._ran_by_kernel = False
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies find it out again.
        return {**vars(self), "_ran_by_kernel": False}

    def _slope(self, slope: float | None) -> float | None:
        """`slope` or that of the rectifier; None without one, or if every channel has its own."""
        rectifier = self._modules["rectifier"] if slope is None else None
        if rectifier is None or isinstance(rectifier, nn.PReLU):
            return slope
        return rectifier.__dict__.get("negative_slope", 0.0)

    def _slopes(self, slope: float | None) -> Tensor | None:  # -> [O]
        """The factors of negative numbers; None without a rectifier."""
        slope = self._slope(slope)
        if slope is None:
            rectifier = self._modules["rectifier"]
            return None if rectifier is None else rectifier.weight.expand(self.out_channels)  # type: ignore[operator]
        if self._filled is None or self._filled[0] != slope:
            with torch.inference_mode(False):
                self._filled = slope, torch.full((self.out_channels,), slope, dtype=torch.float32, device="cpu")
        return self._filled[1]

    def _rectified(self, y: Tensor, slope: float | None) -> Tensor:  # [B, O, H, W]
        """`y`, which nothing else reads, rectified."""
        slope = self._slope(slope)
        if slope is not None:
            return rectify_(y, slope)
        return y if self.rectifier is None else self.rectifier(y)


class Conv3x3(FusedConv2d):
    """A 3 x 3 convolution that runs by :func:`fastroute.conv3x3`."""

    OPERATOR = "conv3x3"
    # Processors with AMX multiply whole matrices of bfloat16 at once, for which PyTorch has kernels.
    DTYPES = (torch.float32,) if torch.cpu._is_amx_tile_supported() else (torch.float32, torch.bfloat16)

    transformed: Tensor | None

    def __init__(self, layer: nn.Conv2d, rectifier: nn.Module | None = None, shuffle: int = 1) -> None:
        super().__init__(layer, rectifier, shuffle)
        # Made from the weight, its values, and what else is kept beside it.
        self.register_buffer("transformed", None, persistent=False)
        self._source: tuple[Tensor, Tensor, tuple[int, int, float]] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, O / s / s, H s, W s]
        """The layer with what follows it."""
        return self.fused(x)

    def fused(
        self,
        x: Tensor,  # [B, C, H, W]
        slope: float | None = None,
        shuffle: int = 1,
        residual: Tensor | None = None,  # [B, O / s / s, H s, W s]
        factor: float = 1.0,
        out: Tensor | None = None,  # [B, O / s / s, H s, W s]
        context: int = 0,
    ) -> Tensor:  # [B, O / s / s, H s, W s]
        """The layer times `factor`, its rectifier or one with `slope`, a pixel shuffle, and a sum with `residual`.

        `out` and `context` are those of :func:`fastroute.conv3x3`.
        """
        shuffle *= self.shuffle
        runs = self.has_kernel(*((x,) if residual is None else (x, residual)))
        weight = self._transformed(shuffle, factor) if runs else None
        if weight is not None:
            bias, slopes = self._bias(factor), self._slopes(slope)
            arguments = (x, weight, bias, slopes, residual, self.out_channels, shuffle, context)
            return run_into(torch.ops.fastroute.conv3x3, arguments, out)
        y = F.conv2d(x, self.weight, self.bias, padding=(1 - context, 1), groups=self.groups)
        y = self._rectified(y if factor == 1 else y * factor, slope)
        if shuffle > 1:
            y = F.pixel_shuffle(y, shuffle)
        if residual is not None:
            # The gradient of a rectifier needs its result.
            y = y + residual if y.requires_grad else y.add_(residual)
        return y if out is None else out.copy_(y)

    def _bias(self, factor: float) -> Tensor | None:  # -> [O]
        bias = self._parameters["bias"]
        return bias if bias is None or factor == 1 else bias * factor

    def _transformed(self, shuffle: int, factor: float) -> Tensor | None:  # [36, G, C / G, P] or [9, G, pairs, P, 2]
        """The weight as the kernel reads it, made anew whenever the weight has changed. A compiler makes none."""
        # In this order: another thread writes them in the other one.
        weight, source = self._parameters["weight"], self._source
        made = self._buffers["transformed"]
        if torch.compiler.is_compiling():
            return made
        assert weight is not None  # for the type checker
        if (
            made is None
            or source is None
            or source[0] is not weight
            or source[1].data_ptr() != weight.data_ptr()
            or source[2] != self._state(shuffle, factor)
        ):
            return self._transform(shuffle, factor)
        return made

    def _state(self, shuffle: int, factor: float) -> tuple[int, int, float]:
        """The version of the weight, and what else the transformed weight depends on."""
        weight = self._parameters["weight"]
        assert weight is not None  # for the type checker
        return version_of(weight), shuffle, factor

    def _transform(self, shuffle: int, factor: float) -> Tensor:  # [36, G, C / G, P] or [9, G, pairs, P, 2]
        with torch.inference_mode(False), torch.no_grad():
            state, values = self._state(shuffle, factor), self.weight.detach()
            made = self.transformed = kernel_weight(values * factor, self.groups, shuffle)
            # The values are kept, so that no others can take their place in memory.
            self._source = (self.weight, values, state)
        return made

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.transformed = self._source = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedConv2d:
        self.transformed = self._source = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make it again.
        return {**super().__getstate__(), "_source": None, "_buffers": {**self._buffers, "transformed": None}}


class Conv1x1(FusedConv2d):
    """A 1 x 1 convolution of one group that runs by :func:`fastroute.conv1x1`."""

    OPERATOR = "conv1x1"
    DTYPES = Conv3x3.DTYPES if torch.cpu._is_avx512_bf16_supported() else (torch.float32,)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, O, H, W]
        """The layer with what follows it."""
        return self.fused([x])

    def fused(
        self,
        parts: Sequence[Tensor],  # [B, C, H, W] each
        slope: float | None = None,
        residual: Tensor | None = None,  # [B, O, H, W]
        out: Tensor | None = None,  # [B, O, H, W]
    ) -> Tensor:  # [B, O, H, W]
        """The layer over the joined channels of `parts`, a sum with `residual`, and its rectifier or one with `slope`.

        `out` is that of :func:`fastroute.conv1x1`.
        """
        if self.has_kernel(*parts, *(() if residual is None else (residual,))):
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            assert weight is not None  # for the type checker
            arguments = (parts, weight.flatten(1), bias, self._slopes(slope), residual)
            return run_into(torch.ops.fastroute.conv1x1, arguments, out)
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        # PyTorch's convolutions refuse an image without rows.
        y = super().forward(x) if x.numel() else x.new_zeros(x.shape[0], self.out_channels, *x.shape[2:])
        y = self._rectified(y if residual is None else y + residual, slope)
        return y if out is None else out.copy_(y)
