"""The fastest ways to run one network over a whole image in one pass: what users would run instead of routing.

Each engine in its documented setting for the latency or the throughput of one image at a time, with as many threads as torch
has. Inputs are float32; what an engine computes in half precision it rounds by itself, or gets rounded beforehand, untimed.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.baselines.classsr_published import compiled_network
from benchmarks.baselines.packages import find
from benchmarks.measure import device
from benchmarks.setting import Setting
from fastroute.engines import AGREEMENT
from fastroute.routing.branches import MIXED

Run = Callable[[], Tensor]

HINTS = ("LATENCY", "THROUGHPUT")
OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
ON_CPUS = "runs on CPUs here"


def whole_image(network: nn.Module, image: Tensor, precision: torch.dtype, setting: Setting) -> Iterator[tuple[str, Run | str]]:
    """Every engine by name: a call that upscales `image`, (1, C, H, W) float32, in `precision`; or why there is none."""
    for hint in HINTS:
        yield f"OpenVINO, {hint}", by_openvino(network, image, precision, hint)
    yield "ONNX Runtime", by_onnxruntime(network, image, precision)
    # Networks of this package that add to the image at the end take it as it is.
    half, pixels = copy.deepcopy(network).to(precision), image if isinstance(network, MIXED) else image.to(precision)
    last = copy.deepcopy(half).to(memory_format=torch.channels_last)
    arranged = pixels.contiguous(memory_format=torch.channels_last)
    yield "eager, channels_last", lambda: last(arranged)
    reason = setting.compile_reason()
    if reason is not None:
        yield "torch.compile", reason
        return
    from torch._inductor import config

    # Weights are constants: the compiler lays them out once.
    with config.patch(freezing=True):
        quick = compiled_network(half, pixels, setting)
    yield "torch.compile", quick if isinstance(quick, str) else lambda: quick(pixels)


def by_openvino(network: nn.Module, image: Tensor, precision: torch.dtype, hint: str) -> Run | str:
    """OpenVINO for images of this size alone; `hint` is one of HINTS."""
    openvino = find("openvino")
    if isinstance(openvino, str):
        return openvino
    if device().type != "cpu":
        return ON_CPUS
    pixels = image.numpy()
    with torch.inference_mode(False), torch.no_grad():
        model = openvino.convert_model(
            copy.deepcopy(network), example_input=torch.zeros(image.shape), input=[list(image.shape)]
        )
    options = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run() -> Tensor:
        result = request.infer({0: pixels}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

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
