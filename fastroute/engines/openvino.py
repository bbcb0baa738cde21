"""OpenVINO on CPUs: one stream per thread, each with its own batches, which are read and written in place."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastroute._copies import inference_copy
from fastroute._extras import remedy
from fastroute.engines import Compiled

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}

FLOAT32_ENDS, PARALLEL = True, True


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """See :class:`fastroute.engines.Engine`."""
    reasons = [] if device.type == "cpu" else [f"openvino runs on CPUs only; the networks are on {device}"]
    if dtype not in HINTS:
        reasons.append(
            f"openvino computes in float32 and bfloat16; the networks compute in {str(dtype).removeprefix('torch.')}"
        )
    if find_spec("openvino") is None:
        reasons.append(f"openvino is not installed: {remedy('openvino')}")
    return reasons


def compile(branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
    """See :class:`fastroute.engines.Engine`. Numbers of patches, heights and widths stay dynamic."""
    import openvino

    with torch.inference_mode(False), torch.no_grad():
        # The weights are given in float32: the engine rounds by itself, and keeps float32 inputs and outputs.
        network = inference_copy(branch).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        example = torch.full(shapes[0], 0.5)
        channels, ratio = _outcome(network, example)
        model = openvino.convert_model(
            network, example_input=example, input=[openvino.PartialShape([-1, shapes[0][1], -1, -1])]
        )
    options = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    program = openvino.Core().compile_model(model, "CPU", options)
    # Calls of several threads take turns, because they share the requests of a program.
    requests, lock = [program.create_infer_request() for _ in range(threads)], threading.Lock()

    def run(batches: Sequence[Tensor]) -> list[Tensor]:
        inputs = [batch.float().contiguous() for batch in batches]
        results = [torch.empty(x.shape[0], channels, x.shape[2] * ratio, x.shape[3] * ratio) for x in inputs]
        with lock:
            try:
                for n, (x, y) in enumerate(zip(inputs, results, strict=True)):
                    request = requests[n % len(requests)]
                    if n >= len(requests):
                        request.wait()
                    request.set_input_tensor(_shared(openvino, x))
                    request.set_output_tensor(_shared(openvino, y))
                    request.start_async()
            finally:
                for request in requests[: len(inputs)]:
                    request.wait()
        return results

    return run


def _shared(openvino: Any, x: Tensor) -> Any:
    """A tensor of OpenVINO that shares the memory of `x`."""
    return openvino.Tensor(x.numpy(), shared_memory=True)


def _outcome(network: nn.Module, example: Tensor) -> tuple[int, int]:
    """The number of channels of the output of `network`, and its upscaling factor."""
    result = network(example)
    return result.shape[1], result.shape[2] // example.shape[2]
