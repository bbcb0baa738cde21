"""A function of tensors of fixed shapes, captured in a CUDA graph once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute.ops import _checks as check

# Calls before the capture: libraries choose their kernels and allocate, Triton compiles.
WARMUP = 3


class CudaGraph:
    """A function of tensors as one CUDA graph: a call copies its arguments and launches all kernels at once.

    The function must not wait for the device, and neither its shapes nor what it does may depend on values:
    :class:`fastroute.FixedPatchRouter`, :class:`fastroute.FixedPixelRouter`, or a function of operators whose documentation
    calls them safe. It is called three times on a stream of its own, then captured. What it reads beside its arguments, such
    as weights, is read again in every call, where it was: change it in place or not at all.

    Args:
        function: of tensors, returns tensors or a tuple of them.
        examples: its arguments, on one GPU; later ones have their shapes, strides aside, and dtypes.

    Attributes:
        inputs: what the graph reads: write into them yourself, and :meth:`replay`, to spare a copy.
        outputs: what it writes.

    Raises:
        ValueError: no examples, or not all on one GPU.
        RuntimeError: something in the function waits, or cannot be captured.

    Example:
        >>> graph = fastroute.CudaGraph(fixed, frame)
        >>> image = graph(next_frame).image.clone()
    """

    def __init__(self, function: Callable[..., Any], *examples: Tensor) -> None:
        self.function, device = function, common_gpu(examples)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self.inputs = tuple(x.detach().clone() for x in examples)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    function(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Libraries that warmed up on this stream find their workspaces there.
            with torch.cuda.graph(self.graph, stream=stream):
                self.outputs = function(*self.inputs)

    def __call__(self, *arguments: Tensor) -> Any:
        """Copy the arguments and replay, on the current stream.

        Args:
            arguments: as the examples; on the GPU or on the host. One in pinned memory is copied when its turn comes: leave
                it as it is until then.

        Returns:
            `outputs`: the same tensors every time, which the next call overwrites. Clone what is to stay.

        Raises:
            ValueError, TypeError: another number of arguments, shape or dtype. Nothing has been copied then.
        """
        op = "CudaGraph"
        if len(arguments) != len(self.inputs):
            raise ValueError(f"{op}: the graph takes {len(self.inputs)} tensors; got {len(arguments)}")
        for given, held in zip(arguments, self.inputs, strict=True):
            check.tensor(op, "arguments", given)
            check.dtype(op, "arguments", given.dtype, (held.dtype,))
            if given.shape != held.shape:
                raise ValueError(f"{op}: arguments must be {tuple(held.shape)}, as captured; got {tuple(given.shape)}")
        with torch.no_grad():
            for given, held in zip(arguments, self.inputs, strict=True):
                held.copy_(given, non_blocking=True)
        return self.replay()

    def replay(self) -> Any:
        """Run on what `inputs` hold; returns `outputs`."""
        self.graph.replay()
        return self.outputs


def common_gpu(examples: Sequence[Tensor]) -> torch.device:
    """Where all of them are.

    Raises:
        ValueError: see :class:`CudaGraph`.
    """
    devices = {check.tensor("CudaGraph", "examples", x).device for x in examples}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        got = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"CudaGraph: examples must be tensors on one GPU; got {got}; on a CPU call the function itself")
    return devices.pop()
