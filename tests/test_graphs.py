"""CudaGraph: what it does to the arguments, in which order it captures; and on a GPU, that replays equal eager calls."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from networks import as_image, picture, random_classsr, randomise

import fastroute
from fastroute import CudaGraph
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.runtime import cuda_graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: only a GPU captures a graph")


class Stage:
    """In the place of `torch.cuda`: keeps a record, and a replay is another call of what was captured."""

    def __init__(self):
        self.record = []
        stage = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                stage.record.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self):
                stage.record.append("replay")
                for old, new in zip(self.outputs, self.function(*self.inputs), strict=True):
                    old.copy_(new)

        @contextmanager
        def block(name):
            stage.record.append(f"begin {name}")
            yield
            stage.record.append(f"end {name}")

        self.Stream, self.CUDAGraph = lambda device: Stream(), Graph
        self.current_stream = lambda device: Stream("current")
        self.device = lambda device: block("device")
        self.stream = lambda stream: block(stream.name)
        self.graph = lambda graph, stream: block(f"capture on {stream.name}")


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(torch, "cuda", stage)
    monkeypatch.setattr(cuda_graphs, "common_gpu", lambda examples: examples[0].device)
    return stage


def captured(stage, function, *examples):
    def counted(*arguments):
        stage.record.append("call")
        return function(*arguments)

    graph = CudaGraph(counted, *examples)
    graph.graph.function, graph.graph.inputs, graph.graph.outputs = function, graph.inputs, graph.outputs
    return graph


def test_order_of_a_capture(stage):
    captured(stage, lambda x: (x + 1,), torch.zeros(3))
    assert stage.record == [
        "begin device",
        "side waits for current",
        "begin side",
        "call",
        "call",
        "call",
        "end side",
        "current waits for side",
        "begin capture on side",
        "call",
        "end capture on side",
        "end device",
    ]


def test_calls_copy_and_replay(stage):
    x, y = torch.arange(4.0), torch.ones(4)
    graph = captured(stage, lambda x, y: (2 * x + y,), x, y)
    assert all(held is not given for held, given in zip(graph.inputs, (x, y), strict=True))
    other = torch.tensor([3.0, 1.0, 4.0, 1.0])
    result = graph(other, y)
    assert result is graph.outputs and torch.equal(result[0], 2 * other + 1)
    # Inputs of any strides; the arguments themselves are left alone.
    graph(torch.arange(8.0)[::2], 5 * y)
    assert torch.equal(result[0], torch.tensor([5.0, 9.0, 13.0, 17.0])) and torch.equal(other[:2], torch.tensor([3.0, 1.0]))
    graph.inputs[0].zero_()
    assert torch.equal(graph.replay()[0], torch.full((4,), 5.0))
    with torch.inference_mode():
        assert torch.equal(graph(torch.ones(4), y)[0], torch.full((4,), 3.0))


def test_wrong_arguments_copy_nothing(stage):
    graph = captured(stage, lambda x, y: (x.sum() + y.sum(),), torch.zeros(2), torch.zeros(3))
    for arguments, error, text in [
        ((torch.ones(2),), ValueError, "takes 2 tensors; got 1"),
        ((torch.ones(2), torch.ones(4)), ValueError, r"must be \(3,\), as captured; got \(4,\)"),
        ((torch.ones(2), torch.ones(3, dtype=torch.int64)), TypeError, "one of float32; got int64"),
        ((torch.ones(2), [1.0, 1.0, 1.0]), TypeError, "must be a torch.Tensor; got list"),
    ]:
        with pytest.raises(error, match=text):
            graph(*arguments)
    assert not graph.inputs[0].any() and "replay" not in stage.record


def test_examples_must_be_on_a_gpu():
    with pytest.raises(ValueError, match="on one GPU; got cpu; on a CPU call the function itself"):
        CudaGraph(torch.sin, torch.zeros(1))
    with pytest.raises(ValueError, match="on one GPU; got none"):
        CudaGraph(torch.sin)
    with pytest.raises(TypeError, match=r"examples must be a .*Tensor; got float"):
        CudaGraph(torch.sin, 1.0)
    fixed = fastroute.FixedPatchRouter(
        fastroute.PatchRouter([torch.nn.Identity()], None, patch=8, stride=6, scale=1, batch=8), (3, 9, 9)
    )
    with pytest.raises(ValueError, match="on one GPU; got cpu"):
        fixed.capture(torch.zeros(3, 9, 9))


def patches(dtype, shape, **options):
    system = random_classsr((3, 5, 8), 4, 16)
    router = fastroute.PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=4, batch=8).to("cuda")
    return fastroute.FixedPatchRouter(router, shape, dtype=dtype, capacities=[0.5, 0.3, 0.3], **options)


def pixels(dtype, shape, **options):
    model = randomise(PCSR.build(FSRCNN(8, upsample=False), [[4], [24, 24]], [4])).to("cuda")
    return fastroute.FixedPixelRouter(fastroute.PixelRouter(model), shape, dtype=dtype, **options)


@needs_gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (patches, {}),
        (patches, {"budget": 0.9}),
        (pixels, {"penalty": 0.3}),
        (pixels, {"budget": 0.99}),
        (pixels, {"adaptive": True}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("quick_tuning")
def test_replays_equal_eager_calls(make, options, dtype, kernels):
    """Whole upscales, on other images than the captured one; an eager call does not wait either."""
    device = torch.device("cuda", torch.cuda.current_device())
    ops = ("extract_patches", "stitch_patches", "group_by_class", "assign_classes", "pixel_mlp", "adaptive_threshold")
    reasons = [r for op in (*ops, "refine_boundaries") for r in fastroute.backends.unsupported_reasons(op, kernels, device)]
    if reasons:
        pytest.skip("; ".join(dict.fromkeys(reasons)))
    shape = (2, 3, 45, 61)
    images = [as_image(picture(*shape, seed=seed), dtype).to(device) for seed in range(4)]
    with fastroute.use_backend(kernels):
        fixed = make(dtype, shape, **options)
        graph = fixed.capture(images[0])
        before = torch.cuda.get_sync_debug_mode()
        for image in images[1:]:
            torch.cuda.set_sync_debug_mode("error")
            try:
                replayed, eager = graph(image), fixed.upscale(image)
            finally:
                torch.cuda.set_sync_debug_mode(before)
            assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
        assert not torch.equal(graph(images[1]).image.clone(), graph(images[2]).image)


@needs_gpu
@pytest.mark.usefixtures("quick_tuning")
def test_what_waits_cannot_be_captured():
    x = torch.rand(3, device="cuda")
    with pytest.raises(RuntimeError):
        CudaGraph(lambda x: (x * x.sum().item(),), x)
    torch.cuda.synchronize()
    assert torch.equal(CudaGraph(lambda x: (x + 1,), x)(2 * x)[0], 2 * x + 1)
