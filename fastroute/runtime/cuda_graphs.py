"""A function of tensors of fixed shapes, captured in a CUDA graph once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute.ops import _checks as check

# Calls before the capture, in which libraries choose their kernels and allocate, and Triton compiles.
WARMUP = 3


class CudaGraph:
    """A function of tensors as one CUDA graph: a call copies its arguments and launches all kernels at once.

    The function must not wait for the device, and neither its shapes nor what it does may depend on values:
    :class:`fastroute.FixedPatchRouter`, :class:`fastroute.FixedPixelRouter`, or a function of operators whose documentation
    calls them safe. It is called three times on a stream of its own, then captured. Whatever else it reads, such as weights, is
    read from the same memory in every call: change it in place or not at all.

    Args:
        function: takes tensors and returns a tensor or a tuple of tensors.
        examples: its arguments, on one GPU. Later arguments must have the same shapes and dtypes; strides may differ.

    Attributes:
        inputs: the tensors that the graph reads. To avoid a copy, write into them yourself and call :meth:`replay`.
        outputs: the tensors that it writes.

    Raises:
        ValueError: there are no examples, or they are not all on one GPU.
        RuntimeError: something in the function waits for the device or cannot be captured.

    Example:
        >>> graph = fastroute.CudaGraph(fixed, frame)
        >>> image = graph(next_frame).image.clone()
    """

    def __init__(self, function: Callable[..., Any], *examples: Tensor) -> None:  # [...] each
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
            # Libraries find the workspaces that they set up on this stream.
            with torch.cuda.graph(self.graph, stream=stream):
                self.outputs = function(*self.inputs)

    def __call__(self, *arguments: Tensor) -> Any:  # [...] each
        """Copy the arguments and replay, on the current stream.

        Args:
            arguments: like the examples, on the GPU or on the host. An argument in pinned memory is copied asynchronously: do
                not change it until the copy is done.

        Returns:
            `outputs`: the same tensors every time, which the next call overwrites. Clone what you want to keep.

        Raises:
            ValueError, TypeError: the number of arguments, a shape or a dtype differs. Nothing has been copied then.
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
        """Run on the content of `inputs` and return `outputs`."""
        self.graph.replay()
        return self.outputs


def common_gpu(examples: Sequence[Tensor]) -> torch.device:  # [...] each
    """The GPU that holds all `examples`.

    Raises:
        ValueError: see :class:`CudaGraph`.
    """
    devices = {check.tensor("CudaGraph", "examples", x).device for x in examples}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        got = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"CudaGraph: examples must be tensors on one GPU; got {got}; on a CPU call the function itself")
    return devices.pop()
