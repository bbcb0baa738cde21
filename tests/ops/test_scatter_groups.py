"""Tests of `scatter_groups`."""

from __future__ import annotations

import re

import pytest
import torch
from support import FLOATING, bits, compiles_once, inductor_equals_eager, random, repeats, same
from torch import Tensor
from torch.library import opcheck

from fastroute import ClassGroups, gather_groups, group_by_class, scatter_groups
from fastroute.reference.scatter_groups import scatter_groups_reference

OP = torch.ops.fastroute.scatter_groups.default
DTYPES = (*FLOATING, torch.uint8, torch.uint16, torch.int16, torch.int64, torch.bool, torch.complex64)


def random_groups(n: int, device: torch.device, classes: int = 3) -> ClassGroups:
    ids = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(2))
    return group_by_class(ids.to(device), classes)


def check(y: Tensor, groups: ClassGroups) -> None:
    rows = scatter_groups(y, groups)
    # Rows that fill one block of memory keep their strides; a size of 1 has no stride that counts.
    sizes = [(n, stride) for n, stride in zip(y.shape[1:], y.stride()[1:], strict=True) if n > 1]
    spans = 1 + sum((n - 1) * stride for n, stride in sizes)
    if y.numel() > 0 and spans == y[0].numel() and all(stride for _, stride in sizes):
        assert [(n, stride) for n, stride in zip(rows.shape[1:], rows.stride()[1:], strict=True) if n > 1] == sizes
        assert len(y) == 1 or rows.stride(0) == spans
    else:
        assert rows.is_contiguous()
    same(rows, scatter_groups_reference(y, groups.order, groups.inverse))


def test_table(backend):
    groups = ClassGroups(*(torch.tensor(v, device=backend.device) for v in ([1, 3, 0, 2], [2, 0, 3, 1], [0, 2, 2, 4])))
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], device=backend.device)
    assert scatter_groups(y, groups).tolist() == [[5, 6], [1, 2], [7, 8], [3, 4]]
    assert scatter_groups(y[:, 0], groups).tolist() == [5, 1, 7, 3]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5, 7), (4, 1, 1), (0,), (16,), (2, 33), (0, 3)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 37])
def test_sweep_of_shapes(backend, n, shape):
    for classes in (1, 3, 50):
        check(random((n, *shape), device=backend.device), random_groups(n, backend.device, classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweep_of_types_and_layouts(backend, dtype):
    groups = random_groups(9, backend.device)
    # Rows of 1 to 40 elements take every path of a copy.
    for width in (1, 2, 3, 4, 8, 40):
        y = random((9, width), torch.uint8, backend.device).to(dtype)
        check(y, groups)
        check(y.view(9, 1, width), groups)
    images = random((9, 3, 4, 5), torch.uint8, backend.device).to(dtype)
    check(images.contiguous(memory_format=torch.channels_last), groups)
    check(images.transpose(1, 3), groups)
    check(images.flatten(2).transpose(1, 2), groups)
    check(images.contiguous(memory_format=torch.channels_last)[::2], random_groups(5, backend.device))
    check(images[:, :, None].contiguous(memory_format=torch.channels_last_3d), groups)
    check(images[:, :1].contiguous(memory_format=torch.channels_last).transpose(2, 3), groups)
    check(images[:, 1:, ::2, 1:], groups)
    check(images[:1].expand(9, -1, -1, -1), groups)
    check(images.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3), groups)


@pytest.mark.parametrize("layout", [(0, 2, 3, 1), (0, 3, 2, 1), (0, 3, 1, 2)], ids=str)
def test_rows_keep_their_layout(backend, layout):
    """Blocks of memory are moved: strides stay, those of a gradient too, whatever the layout in which it comes."""
    groups = random_groups(7, backend.device)
    back = [layout.index(d) for d in range(4)]
    y = random((7, 3, 4, 5), device=backend.device).permute(layout).contiguous().permute(back).requires_grad_()
    rows = scatter_groups(y, groups)
    assert rows.stride() == y.stride() != rows.contiguous().stride()
    upstream = random((7, 3, 4, 5), device=backend.device, seed=1)
    for grad in (upstream, upstream.contiguous(memory_format=torch.channels_last), upstream[:1].expand(7, 3, 4, 5)):
        (actual,) = torch.autograd.grad(rows, y, grad, retain_graph=True)
        same(actual, gather_groups(grad.contiguous(), groups))
        assert actual.stride() == y.stride()


def test_bits_survive(backend):
    groups = random_groups(6, backend.device)
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-42, 3.4e38]
    y = torch.tensor(values, device=backend.device)
    same(bits(scatter_groups(y, groups)), scatter_groups_reference(bits(y), groups.order, groups.inverse))


def test_undoes_gather_groups(backend):
    groups = random_groups(50, backend.device)
    y = random((50, 3), device=backend.device)
    same(scatter_groups(gather_groups(y, groups), groups), y)


def test_gradient(backend):
    groups = random_groups(5, backend.device)
    y = random((5, 2, 3), torch.float64, backend.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: scatter_groups(t, groups), y)
    assert torch.autograd.gradgradcheck(lambda t: scatter_groups(t, groups), y)
    upstream = random((5, 2, 3), torch.float64, backend.device, seed=1)
    # A gradient that was expanded or transposed on its way here has odd strides.
    for grad in (upstream, upstream[:1].expand(5, 2, 3), upstream.transpose(1, 2).contiguous().transpose(1, 2)):
        (actual,) = torch.autograd.grad(scatter_groups(y, groups), y, grad)
        (expected,) = torch.autograd.grad(scatter_groups_reference(y, groups.order, groups.inverse), y, grad)
        same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    for n, shape in ((0, (3,)), (5, ()), (5, (2, 3, 3))):
        groups = random_groups(n, operator.device)
        y = random((n, *shape), device=operator.device).requires_grad_(grad)
        opcheck(OP, (y, groups.order, groups.inverse))
    opcheck(
        OP,
        (
            random((5, 2, 3), device=operator.device).transpose(1, 2).requires_grad_(grad),
            *random_groups(5, operator.device)[:2],
        ),
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_poisoned(backend, poisoned, dtype):
    for n in (1, 37, 1000):
        groups = random_groups(n, backend.device)
        y = random((n, 3, 5), dtype, backend.device).requires_grad_()
        rows = scatter_groups(y, groups)
        assert not rows.isnan().any()
        same(rows.detach(), scatter_groups_reference(y.detach(), groups.order, groups.inverse))
        (gradient,) = torch.autograd.grad(rows, y, y.detach())
        same(gradient, gather_groups(y.detach(), groups))


def group_and_move(ids: Tensor, y: Tensor) -> Tensor:
    return scatter_groups(y, group_by_class(ids, 3))


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    arguments = []
    for n, h in ((10, 5), (700, 4), (33, 9)):
        ids = torch.arange(n, device=operator.device) % 3
        arguments.append((ids, random((n, 2, h, 7), device=operator.device)))
    compiles_once(group_and_move, arguments)
    channels_last = [(ids, y.contiguous(memory_format=torch.channels_last)) for ids, y in arguments]
    compiles_once(group_and_move, channels_last)
    compiles_once(group_and_move, [(ids, y.requires_grad_()) for ids, y in arguments])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    ids = torch.arange(20, device=operator.device) % 3
    inductor_equals_eager(group_and_move, ids, random((20, 2, 3), device=operator.device))


def test_deterministic(backend):
    groups = random_groups(5000, backend.device)
    y = random((5000, 40), device=backend.device).requires_grad_()
    repeats(lambda: scatter_groups(y, groups).detach(), backend.device)
    repeats(lambda: torch.autograd.grad(scatter_groups(y, groups), y, y.detach()), backend.device)


ROWS = torch.zeros(3, 2)
ORDER = torch.tensor([0, 1, 2])
OFFSETS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("kind", "y", "groups", "words"),
    [
        (TypeError, [1.0], (ORDER, ORDER, OFFSETS), "y Tensor list"),
        (ValueError, ROWS[0, 0], (ORDER, ORDER, OFFSETS), "y one dimension scalar"),
        (ValueError, ROWS[:2], (ORDER, ORDER, OFFSETS), "groups.order 2 3"),
        (ValueError, ROWS, (ORDER, ORDER[:2], OFFSETS), "groups.inverse 3 2"),
        (TypeError, ROWS, (ORDER.int(), ORDER, OFFSETS), "groups.order int64 int32"),
        (ValueError, ROWS, (ORDER.view(1, 3), ORDER, OFFSETS), r"groups.order 1-D \(1, 3\)"),
        (ValueError, ROWS, (ORDER.to("meta"), ORDER, OFFSETS), "y groups.order one device cpu meta"),
        (ValueError, ROWS, (ORDER, ORDER.to("meta"), OFFSETS), "y groups.inverse one device cpu meta"),
    ],
)
def test_errors(kind, y, groups, words):
    with pytest.raises(kind, match="^scatter_groups: .*" + ".*".join(words.split(" "))):
        scatter_groups(y, ClassGroups(*groups))


@pytest.mark.parametrize("number", [-1, 3, 2**31, -(2**40)])
def test_place_out_of_range(backend, number):
    wrong = torch.tensor([0, number, 1], device=backend.device)
    with pytest.raises(backend.index_errors) as error:
        scatter_groups(ROWS.to(backend.device), ClassGroups(wrong, wrong, OFFSETS))
    if error.type is ValueError:
        assert re.match(rf"scatter_groups: .* must lie in \[0, 3\); got {number}$", str(error.value))
