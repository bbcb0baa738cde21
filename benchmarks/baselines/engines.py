"""The fastest ways to run one network over a whole image in one pass: what users would run instead of routing.

Each engine in its documented setting for the latency or the throughput of one image at a time, with as many threads as torch
has. Inputs are float32; what an engine computes in half precision it rounds by itself, or gets rounded beforehand, untimed.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.classsr_published import compiled_network
from benchmarks.baselines.packages import find
from benchmarks.measure import device
from benchmarks.setting import Setting
from fastroute.engines import AGREEMENT
from fastroute.patch.prepared_networks import MIXED

Run = Callable[[], Tensor]

HINTS = ("LATENCY", "THROUGHPUT")
OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
ON_CPUS = "runs on CPUs here"


class Engines:
    """Every engine for one network and images of one size.

    Args:
        network: in evaluation mode, in float32; it is copied.
        image: (1, C, H, W), float32.
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        self.network, self.image = network, image
        self._model: Any = None

    def ways(self, precision: torch.dtype, setting: Setting) -> Iterator[tuple[str, Run | str]]:
        """By name: a call that upscales the image, computing in `precision`; or why there is none."""
        for hint in HINTS:
            yield f"OpenVINO, {hint}", self.by_openvino(precision, hint)
        yield "ONNX Runtime", by_onnxruntime(self.network, self.image, precision)
        half = copy.deepcopy(self.network).to(precision)
        # Networks of this package that add to the image at the end take it as it is.
        pixels = self.image if isinstance(self.network, MIXED) else self.image.to(precision)
        last = copy.deepcopy(half).to(memory_format=torch.channels_last)
        arranged = pixels.contiguous(memory_format=torch.channels_last)
        yield "eager, channels_last", lambda: last(arranged)
        yield "torch.compile", by_compiler(half, pixels, setting)

    def by_openvino(self, precision: torch.dtype, hint: str) -> Run | str:
        """OpenVINO; `hint` is one of HINTS."""
        openvino = find("openvino")
        if isinstance(openvino, str):
            return openvino
        if device().type != "cpu":
            return ON_CPUS
        if self._model is None:
            example, size = torch.zeros(self.image.shape), list(self.image.shape)
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore")
                self._model = openvino.convert_model(copy.deepcopy(self.network), example_input=example, input=[size])
        options = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = openvino.Core().compile_model(self._model, "CPU", options).create_infer_request()
        pixels = self.image.numpy()

        def run() -> Tensor:
            return torch.from_numpy(request.infer({0: pixels}, share_inputs=True, share_outputs=True)[0])

        return run


def by_onnxruntime(network: nn.Module, image: Tensor, precision: torch.dtype) -> Run | str:
    """ONNX Runtime for images of this size alone, all of its graph optimisations on."""
    for name in ("onnx", "onnxruntime"):
        if isinstance(missing := find(name), str):
            return missing
    if device().type != "cpu":
        return ON_CPUS
    if precision != torch.float32:
        return "ONNX Runtime has no convolutions in bfloat16 on CPUs"
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # The newer exporter needs another package, and gives the same graph.
        warnings.simplefilter("ignore")
        example = (torch.zeros(image.shape),)
        torch.onnx.export(copy.deepcopy(network), example, file, input_names=["x"], output_names=["y"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    pixels = image.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": pixels})[0])


def by_compiler(network: nn.Module, pixels: Tensor, setting: Setting) -> Run | str:
    """torch.compile, which may lay out the weights once, since they are constants."""
    reason = setting.compile_reason()
    if reason is not None:
        return reason
    from torch._inductor import config

    with config.patch(freezing=True):
        quick = compiled_network(network, pixels, setting)
    return quick if isinstance(quick, str) else lambda: quick(pixels)


def disagreement(result: Tensor, expected: Tensor) -> float:  # [1, C, H, W]
    """The largest difference, as a share of the largest value; infinite for another shape or what is no number."""
    if result.shape != expected.shape:
        return float("inf")
    apart = (result.float() - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    return apart if apart == apart else float("inf")


def check(result: Tensor, expected: Tensor, precision: torch.dtype) -> None:  # [1, C, H, W]
    """The network's image, but for rounding in `precision`.

    Raises:
        AssertionError: it is not; says by how much.
    """
    apart, most = disagreement(result, expected), AGREEMENT[precision]
    assert apart <= most, f"disagrees: {apart:.1e} of the largest value, more than {most:g}"
