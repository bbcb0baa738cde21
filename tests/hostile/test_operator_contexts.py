"""What each operator does in the contexts of PyTorch: every row of the table in docs/operators.md is a test here."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastroute
from fastroute import TileGrid
from fastroute.backends import EXTENSION, BackendError

DOCS = Path(__file__).parents[2] / "docs" / "operators.md"
GRID = TileGrid(8, 8, 4, 4)
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR)


CLASSES = (rand(1, 8, 8) * 2).to(torch.uint8)
GROUPS = fastroute.group_by_class(torch.tensor([1, 0, 1, 0]), 2)
MLP = [(rand(6, 7), rand(6) - 0.5), (rand(2, 6) - 0.5, rand(2))]
KERNEL, POINTS = rand(3, 2, 3, 3) - 0.5, rand(3, 2) - 0.5
TRANSFORMED = fastroute.conv3x3_weight(KERNEL).transformed
CELL = [(rand(5, 16) - 0.5, rand(5)), (rand(2, 5), rand(2))]


class Case(NamedTuple):
    """An operator of one tensor; the others are its surroundings."""

    run: Callable[..., Tensor]
    x: Tensor
    linear: bool = True


SMOOTH = {
    "extract_patches": Case(lambda x: fastroute.extract_patches(x, GRID), rand(1, 2, 8, 8)),
    "stitch_patches": Case(lambda x: fastroute.stitch_patches(x, GRID, "hann"), rand(4, 2, 4, 4)),
    "gather_groups": Case(lambda x: fastroute.gather_groups(x, GROUPS), rand(4, 3)),
    "scatter_groups": Case(lambda x: fastroute.scatter_groups(x, GROUPS), rand(4, 3)),
    "refine_boundaries": Case(lambda x: fastroute.refine_boundaries(x, CLASSES.to(x.device)), rand(1, 2, 8, 8)),
    "pixel_mlp": Case(lambda x: fastroute.pixel_mlp(x, [to_device(MLP, x)], (8, 8)), rand(1, 3, 4, 4), linear=False),
    "cell_mlp": Case(lambda x: fastroute.cell_mlp(x, to_device(CELL, x), 4, 2, 1), rand(1, 1, 8, 8), linear=False),
    "conv1x1": Case(lambda x: fastroute.conv1x1([x, x], torch.cat([POINTS, POINTS], 1).to(x.device)), rand(1, 2, 5, 6)),
    "conv3x3": Case(lambda x: fastroute.conv3x3(x, KERNEL.to(x.device)), rand(1, 2, 5, 6)),
}
INDICES = {
    "group_by_class": Case(lambda x: fastroute.group_by_class((x * 2).long(), 2).order, rand(40)),
    "assign_classes": Case(lambda x: fastroute.assign_classes(x, [1.0, 4.0], budget=0.7), rand(30, 2)),
    "merge_regions": Case(lambda x: fastroute.merge_regions((x * 2).long(), GRID, [1.0, 4.0], 2).group, rand(40)),
    "adaptive_threshold": Case(lambda x: fastroute.adaptive_threshold(x), rand(2, 50)),
}
WRITERS = {
    "stitch_patches": Case(
        lambda x, out=None: fastroute.stitch_patches(x, GRID, out=torch.empty(1, 2, 8, 8) if out is None else out),
        rand(4, 2, 4, 4),
    ),
    "refine_boundaries": Case(
        lambda x, out=None: fastroute.refine_boundaries(x, CLASSES, out=torch.empty(1, 2, 8, 8) if out is None else out),
        rand(1, 2, 8, 8),
    ),
    "conv1x1": Case(
        lambda x, out=None: fastroute.conv1x1(
            x, KERNEL[:, :, 0, 0], out=torch.empty(1, 5, 6, 3).permute(0, 3, 1, 2) if out is None else out
        ),
        rand(1, 2, 5, 6),
    ),
    "conv3x3": Case(
        lambda x, out=None: fastroute.conv3x3(
            x, KERNEL, out=torch.empty(1, 5, 6, 3).permute(0, 3, 1, 2) if out is None else out
        ),
        rand(1, 2, 5, 6),
    ),
}


def to_device(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(weight.to(x.device), bias.to(x.device)) for weight, bias in layers]


smooth = pytest.mark.parametrize("op", SMOOTH)
indices = pytest.mark.parametrize("op", INDICES)
all_ops = pytest.mark.parametrize("op", [*SMOOTH, *INDICES])
writers = pytest.mark.parametrize("op", WRITERS)
needs_kernels = pytest.mark.skipif(bool(EXTENSION.reasons), reason="; ".join(EXTENSION.reasons))


def case_of(op: str) -> Case:
    return SMOOTH.get(op) or INDICES[op]


def reference(op: str, x: Tensor) -> Tensor:
    with fastroute.use_backend("reference"):
        return case_of(op).run(x)


def test_rows_of_the_table_are_tests():
    table = DOCS.read_text().split("## Contexts")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([a-z][^|]*?) +\|", table.replace("`", ""), re.MULTILINE)
    names = {"test_" + re.sub(r"\W+", "_", row.replace("torch.", "")).strip("_").lower() for row in rows}
    own = {name for name in globals() if name.startswith("test_") and getattr(globals()[name], "row", False)}
    assert names == own
    assert len(names) == len(rows)


def row(test: Any) -> Any:
    """A test of a row of the table, by its name."""
    test.row = True
    return test


@row
@all_ops
@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_no_grad_inference_mode(op, inside):
    case = case_of(op)
    with inside():
        found = case.run(case.x)
    assert torch.equal(found, case.run(case.x))
    assert not found.requires_grad


@row
@all_ops
@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_autocast(op, asked):
    case = case_of(op)
    x = case.x.clone().requires_grad_(op in SMOOTH)
    with fastroute.use_backend(asked if not EXTENSION.reasons else "reference"):
        expected = case.run(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = case.run(x)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            if op in SMOOTH:
                (grad,) = torch.autograd.grad(found.sum(), x)
                assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


@row
@smooth
def test_backward_autograd_grad(op):
    case = SMOOTH[op]
    x, same = (case.x.clone().requires_grad_() for _ in range(2))
    weight = rand(*case.run(case.x).shape)
    (case.run(x) * weight).sum().backward()
    (reference(op, same) * weight).sum().backward()
    assert torch.allclose(x.grad, same.grad, atol=1e-5)


@row
@smooth
@needs_kernels
def test_second_derivatives(op):
    case = SMOOTH[op]
    x = case.x.clone().requires_grad_()
    weight = rand(*case.run(case.x).shape).requires_grad_()
    (grad,) = torch.autograd.grad((case.run(x) * weight).sum(), x, create_graph=True)
    if not case.linear:
        with pytest.raises(NotImplementedError, match=f"^{op}: there is no second derivative"):
            torch.autograd.grad(grad.square().sum(), weight)
        return
    (found,) = torch.autograd.grad(grad.square().sum(), weight)
    (first,) = torch.autograd.grad((reference(op, x) * weight).sum(), x, create_graph=True)
    assert torch.allclose(found, torch.autograd.grad(first.square().sum(), weight)[0], atol=1e-5)


@row
@smooth
def test_func_grad_vjp_jacrev_hessian(op):
    case = SMOOTH[op]
    x = case.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.run(x).square().sum(), x)
    assert torch.allclose(torch.func.grad(lambda z: case.run(z).square().sum())(case.x), expected, atol=1e-4)
    jacobian = torch.func.jacrev(lambda z: case.run(z).square().sum())(case.x)
    assert torch.allclose(jacobian, expected, atol=1e-4)
    assert torch.func.hessian(lambda z: case.run(z).square().sum())(case.x).isfinite().all()


@row
@smooth
def test_func_jvp_jacfwd_autograd_forward_ad(op):
    case = SMOOTH[op]
    x = case.x.clone().requires_grad_()
    direction = rand(*x.shape)
    (grad,) = torch.autograd.grad(case.run(x).square().sum(), x)
    expected = (grad * direction).sum()
    _, found = torch.func.jvp(lambda z: case.run(z).square().sum(), (case.x,), (direction,))
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.allclose(torch.func.jacfwd(lambda z: case.run(z).square().sum())(case.x), grad, atol=1e-3)
    with forward_ad.dual_level():
        dual = case.run(forward_ad.make_dual(case.x, direction)).square().sum()
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-4)


@row
@all_ops
def test_vmap(op):
    case = case_of(op)
    batch = torch.stack([case.x, case.x.flip(0), case.x * 0.5])
    if op == "group_by_class":
        batch = (batch * 2).long()
        found = torch.vmap(lambda x: fastroute.group_by_class(x, 2).order)(batch)
        expected = torch.stack([fastroute.group_by_class(x, 2).order for x in batch])
    else:
        found, expected = torch.vmap(case.run)(batch), torch.stack([case.run(x) for x in batch])
    assert torch.allclose(found, expected, atol=1e-5)
    # What is not batched is computed as ever.
    assert torch.equal(torch.vmap(lambda a: a * case.run(case.x).sum())(torch.ones(3)), case.run(case.x).sum().expand(3))


@row
@all_ops
@pytest.mark.slow
def test_compile_fullgraph_true(op):
    case = case_of(op)
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(case.x), case.run(case.x), atol=1e-6)


@row
@all_ops
def test_export(op):
    case = case_of(op)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case.run(x)

    program = torch.export.export(Module(), (case.x,))
    assert torch.allclose(program.module()(case.x), case.run(case.x), atol=1e-6)


@row
@all_ops
def test_fake_tensors(op):
    case = case_of(op)
    expected = case.run(case.x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = case.run(mode.from_tensor(case.x))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "cpu")
    assert torch.equal(case.run(case.x), expected)


@row
@all_ops
def test_meta_tensors(op):
    case = case_of(op)
    expected = case.run(case.x)
    if op in ("gather_groups", "scatter_groups"):
        groups = fastroute.ClassGroups(*(part.to("meta") for part in GROUPS))
        found = getattr(fastroute, op)(case.x.to("meta"), groups)
    else:
        found = case.run(case.x.to("meta"))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@row
@all_ops
def test_use_deterministic_algorithms(op):
    case = case_of(op)
    expected = case.run(case.x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(case.run(case.x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@writers
def test_writing_is_refused_where_it_cannot_be_transformed(op):
    case = WRITERS[op]
    for transform in (
        lambda: torch.func.jvp(case.run, (case.x,), (case.x,)),
        lambda: torch.func.grad(lambda z: case.run(z).sum())(case.x),
        lambda: torch.vmap(case.run)(case.x[None]),
    ):
        with pytest.raises(NotImplementedError, match=f"^{op}: .*cannot write into `out`; leave it away"):
            transform()


@smooth
@needs_kernels
def test_a_backend_that_was_asked_for_is_not_replaced(op):
    case = SMOOTH[op]
    with fastroute.use_backend("cpu"), pytest.raises(BackendError, match=f"^{op}: backend 'cpu' .*plain PyTorch alone"):
        torch.func.jvp(case.run, (case.x,), (case.x,))


OPS = torch.ops.fastroute
RAW = {
    "extract_patches": lambda x: OPS.extract_patches(x, None, None, None, 4, 4, False, None, False, 4, 4),
    "stitch_patches": lambda x: OPS.stitch_patches(x, None, torch.ones(4), 8, 8, 4, 4, 1, False, 1, None, 0, 8),
    "gather_groups": lambda x: OPS.gather_groups(x, GROUPS.order, GROUPS.inverse),
    "scatter_groups": lambda x: OPS.scatter_groups(x, GROUPS.order, GROUPS.inverse),
    "refine_boundaries": lambda x: OPS.refine_boundaries(x, CLASSES, 0, 8),
    "pixel_mlp": lambda x: OPS.pixel_mlp(x, [w for w, _ in MLP], [b for _, b in MLP], [2], 8, 8, None, None, None, 0, 8),
    "cell_mlp": lambda x: OPS.cell_mlp(x, [w for w, _ in CELL], [b for _, b in CELL], 0.1, 4, 2, 1),
    "conv1x1": lambda x: OPS.conv1x1([x, x], torch.cat([POINTS, POINTS], 1), None, None, None),
    "conv3x3": lambda x: OPS.conv3x3(x, TRANSFORMED, None, None, None, 3, 1),
}


@smooth
def test_registered_operators_refuse_forward_mode_and_know_vmap(op):
    case, run = SMOOTH[op], RAW[op]
    with pytest.raises(NotImplementedError, match=f"^{op}: .*no formula for forward-mode"):
        torch.func.jvp(run, (case.x,), (case.x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{op}: .*no formula for forward-mode"):
        run(forward_ad.make_dual(case.x, case.x))
    batch = torch.stack([case.x, case.x * 0.5])
    assert torch.equal(torch.vmap(run)(batch), torch.stack([run(x) for x in batch]))
    with pytest.raises(ValueError, match=f"^{op}: torch.vmap over nothing"):
        torch.vmap(run)(batch[:0])


META = torch.ones(4, device="meta")
MIXED = {
    "stitch_patches": lambda: OPS.stitch_patches(rand(4, 1, 4, 4), None, META, 8, 8, 4, 4, 1, False, 1, None, 0, 8),
    "extract_patches": lambda: OPS.extract_patches(rand(1, 4, 8, 8), None, META, None, 4, 4, False, None, False, 4, 4),
    "refine_boundaries": lambda: OPS.refine_boundaries(rand(1, 1, 8, 8), CLASSES.to("meta"), 0, 8),
    "assign_classes": lambda: OPS.assign_classes(rand(3, 4), META.double(), 0.0, 1),
    "cell_mlp": lambda: OPS.cell_mlp(rand(1, 1, 4, 8), [rand(4, 16)], [META], 0.1, 4, 1, 1),
    "conv1x1": lambda: OPS.conv1x1([rand(1, 2, 4, 8)], rand(4, 2), META, None, None),
    "conv3x3": lambda: OPS.conv3x3(rand(1, 2, 4, 8), TRANSFORMED, META[:3], None, None, 3, 1),
}


@pytest.mark.parametrize("op", MIXED)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_tensors_of_several_devices_are_refused(op, mode):
    with mode(), pytest.raises(ValueError, match=f"^{op}: .* must be on one device; got (cpu and meta|meta and cpu)"):
        MIXED[op]()
