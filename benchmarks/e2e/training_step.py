"""The joint training step of ClassSR-FSRCNN, beside the same step as a loop over patches, as the published code writes it.

A step is the forward pass of classifier and branches, ClassSR's three losses, the backward pass and the update. What the
variants differ in is the mixture of the branches alone; their gradients agree before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import alternate, device, exactly, first, peak_flops
from benchmarks.setting import Setting
from fastroute import buffers
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.training.losses import average_loss, class_loss

OURS, LOOP, PUBLISHED = "fastroute", "loop over patches", "loop over patches, plain modules"
BATCHED, COMPILED = "whole batches, plain modules", "whole batches, plain modules, compiled"
BATCH, SMOKE_BATCH, PATCH, SCALE = 96, 6, 32, 4
SMOKE_WIDTHS = (8, 12, 16)
ROUNDS, SECONDS = 7, 15.0
TYPES = {"float32": None, "bfloat16": torch.bfloat16}
# Of the norm of all gradients: the orders of the sums differ.
TOLERANCE = 1e-4
Mixture = Callable[[Tensor], tuple[Tensor, Tensor]]


def plain(model: ClassSR) -> ClassSR:
    """`model` of torch's own layers alone, on the same parameters."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    for name, branch in model.named_children():
        if not isinstance(branch, FSRCNN) or branch.tail_conv is None:
            continue
        tail = branch.tail_conv
        arguments = (tail.in_channels, tail.out_channels, tail.kernel_size, tail.stride, tail.padding, tail.output_padding)
        other = nn.ConvTranspose2d(*arguments, device=tail.weight.device)
        other.weight, other.bias = tail.weight, tail.bias
        made._modules[name] = nn.Sequential(branch.head_conv, branch.body_conv, other)
    return made


def summed(model: ClassSR, patches: Tensor) -> tuple[Tensor, Tensor]:  # [N, C, p, p] -> [N, C, P, P], [N, K]
    """Every branch on all patches, weighted."""
    probability = model.classifier(patches)
    outputs = [probability[:, k, None, None, None] * branch(patches) for k, branch in enumerate(model.branches)]
    return torch.stack(outputs).sum(dim=0), probability


def looped(mixture: Mixture, patches: Tensor) -> tuple[Tensor, Tensor]:
    """One patch after the other."""
    parts = [mixture(patches[n : n + 1]) for n in range(len(patches))]
    return torch.cat([image for image, _ in parts]), torch.cat([probability for _, probability in parts])


def loss_of(output: Tensor, probability: Tensor, hr: Tensor) -> Tensor:
    """ClassSR's losses with its published weights."""
    return 1000 * F.l1_loss(output, hr) + 0.5 * class_loss(probability) + 3 * average_loss(probability)


class Step:
    """A training step of one way to mix the branches."""

    def __init__(self, model: ClassSR, mixture: Mixture, lr: Tensor, hr: Tensor, dtype: torch.dtype | None) -> None:
        self.parameters, self.mixture, self.lr, self.hr = list(model.parameters()), mixture, lr, hr
        # So small a rate that the weights stay what they are for the next variant.
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-12)
        self.half = torch.autocast(device().type, dtype, enabled=dtype is not None)

    def gradients(self) -> list[Tensor]:
        """Of all parameters."""
        self._backward()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

    def __call__(self) -> None:
        self._backward()
        self.optimizer.step()

    def _backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.half:
            output, probability = self.mixture(self.lr)
            loss = loss_of(output.float(), probability.float(), self.hr)
        loss.backward()


def check(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise unless the gradients of all parameters together agree."""
    assert len(found) == len(expected), name
    one, other = (torch.cat([x.flatten() for x in gradients]) for gradients in (found, expected))
    error = (one - other).norm() / other.norm()
    assert error < TOLERANCE, f"{name}: the gradients are {error:.1e} apart"


def run_type(kind: str, model: ClassSR, setting: Setting) -> dict:
    """One row: all ways in one precision."""
    count = SMOKE_BATCH if setting.smoke else BATCH
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(count, 3, PATCH, PATCH, generator=generator).to(device())
    # Brighter than any output, so that rounding turns the sign of no error, which is all that its gradient is.
    hr = F.interpolate(lr, scale_factor=SCALE, mode="bicubic") + 1
    lr, hr = (x.contiguous(memory_format=torch.channels_last) for x in (lr, hr))
    usual = plain(model)
    ways: dict[str, Mixture] = {
        OURS: model.mixture,
        LOOP: lambda x: looped(model.mixture, x),
        PUBLISHED: lambda x: looped(lambda one: summed(usual, one), x),
        BATCHED: lambda x: summed(usual, x),
    }
    steps = {name: Step(model, way, lr, hr, TYPES[kind]) for name, way in ways.items()}
    missing: dict[str, str] = {}
    compiled = setting.compiled(lambda x: summed(usual, x), lr)
    if isinstance(compiled, str):
        missing[COMPILED] = compiled
    else:
        quick = torch.compile(lambda x: summed(usual, x), dynamic=False)
        steps[COMPILED] = Step(model, quick, lr, hr, TYPES[kind])
        with setting.compiling():
            steps[COMPILED].gradients()
    if kind == "float32":
        expected = exactly(steps[PUBLISHED].gradients)
        for name, step in steps.items():
            check(name, exactly(step.gradients), expected)
    with FlopCounterMode(display=False) as counter:
        steps[OURS].gradients()
    flops = counter.get_total_flops()
    peaks = {name: first(step).peak for name, step in steps.items()}
    times = alternate(dict(steps), 1 if setting.smoke else ROUNDS, limit=SECONDS)
    floor = flops / peak_flops(TYPES[kind] or torch.float32, convolutions=True)
    ours = times[OURS].median
    print(f"\nClassSR-FSRCNN, joint step of {count} patches of {PATCH} x {PATCH}, {kind}: {flops / 1e9:.1f} GFLOP")
    print(f"  at the rate of the best matrix product {1e3 * floor:.1f} ms; fastroute takes {ours / floor:.1f} times that")
    for name, timing in times.items():
        print(f"  {name:<40} {timing}   {timing.median / ours:5.2f} x fastroute", flush=True)
    for name, reason in missing.items():
        print(f"  {name:<40} not timed: {reason}")
    return {
        "op": f"joint step, batch {count}, {kind}",
        "dtype": kind,
        "batch": count,
        "times": times,
        "peak_bytes": peaks,
        "missing": missing,
        "flops": flops,
        "floor_seconds": floor,
        "time_over_floor": ours / floor,
        "speedup": times[LOOP].median / ours,
    }


@pytest.fixture
def keeps_memory():
    """As `fastroute train` runs on a CPU; it favours all variants."""
    if device().type == "cpu":
        buffers.keep_freed()


@pytest.mark.usefixtures("keeps_memory")
def test_training_step(setting: Setting) -> None:
    """A row per precision."""
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        model = ClassSR.fsrcnn(SMOKE_WIDTHS) if setting.smoke else ClassSR.fsrcnn()
        model = model.train().to(device(), memory_format=torch.channels_last)
        rows = [run_type(kind, model, setting) for kind in TYPES]
    notes = "random weights; gradients agree in float32; medians of alternating steps; FLOPs as torch counts our form"
    setting.save("training_step", rows, notes)
