"""Tests of `group_by_class`."""

from __future__ import annotations

import pytest
import torch
from support import compiles_once, inductor_equals_eager, repeats, same
from torch import Tensor
from torch.library import opcheck

from fastroute import ClassGroups, group_by_class
from fastroute.reference.group_by_class import group_by_class_reference

OP = torch.ops.fastroute.group_by_class.default
INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8)


def random_ids(n: int, classes: int, dtype=torch.int64, device="cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (n,), generator=generator).to(device, dtype)


def check(ids: Tensor, classes: int) -> ClassGroups:
    """Group, compare with the reference, and return the groups."""
    groups = group_by_class(ids, classes)
    assert isinstance(groups, ClassGroups)
    for actual, expected in zip(groups, group_by_class_reference(ids, classes), strict=True):
        same(actual, expected)
        assert actual.is_contiguous()
    return groups


def test_table(backend):
    groups = group_by_class(torch.tensor([2, 0, 2, 1, 0], device=backend.device), 4)
    assert groups.order.tolist() == [1, 4, 3, 0, 2]
    assert groups.inverse.tolist() == [3, 0, 4, 2, 1]
    assert groups.offsets.tolist() == [0, 2, 3, 5, 5]
    assert {x.dtype for x in groups} == {torch.int64}


@pytest.mark.parametrize("dtype", INDEX, ids=str)
# Above 32768 items several threads share the work.
@pytest.mark.parametrize("n", [0, 1, 2, 7, 700, 70001])
def test_sweep(backend, n, dtype):
    for classes in (1, 3, 256) if n > 1000 else (1, 2, 3, 5, 100, 256):
        ids = random_ids(n, min(classes, 128 if dtype == torch.int16 else 256), dtype, backend.device)
        groups = check(ids, classes)
        # What a stable sort is, said without sorting.
        ordered = ids.long()[groups.order]
        assert (ordered.diff() >= 0).all()
        assert (groups.order.diff()[ordered.diff() == 0] > 0).all()
        assert torch.equal(groups.inverse[groups.order], torch.arange(n, device=backend.device))
        counts = torch.bincount(ids.long(), minlength=classes)
        assert torch.equal(groups.offsets.diff(), counts)
        assert groups.offsets[0] == 0


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_empty_and_single_classes(backend, dtype):
    for only in (0, 2, 4):
        ids = torch.full((9,), only, dtype=dtype, device=backend.device)
        groups = check(ids, 5)
        assert groups.order.tolist() == list(range(9))
        assert groups.offsets.tolist() == [0] * (only + 1) + [9] * (5 - only)
    check(torch.tensor([4, 0, 4], dtype=dtype, device=backend.device), 5)


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_strides(backend, dtype):
    ids = random_ids(300, 6, dtype, backend.device)
    check(ids[1::3], 6)
    check(ids.view(20, 15)[:, 4], 6)
    check(ids[:1].expand(50), 6)
    check(ids.view(20, 15).t().flatten(), 6)


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_opcheck(operator, dtype):
    for n in (0, 1, 11):
        opcheck(OP, (random_ids(n, 3, dtype, operator.device), 3))


def test_no_gradient(operator):
    # Indices have none, even where the ids come out of a computation that records gradients.
    score = torch.rand(6, 3, device=operator.device, requires_grad=True)
    groups = group_by_class(score.argmax(dim=1), 3)
    assert not any(x.requires_grad for x in groups)


def test_poisoned(backend, poisoned):
    for n in (0, 1, 513, 70001):
        for classes in (1, 3, 20):
            # Only even classes: the bounds of empty ones must be written too.
            ids = random_ids(n, classes, device=backend.device) // 2 * 2
            check(ids, classes)


def group(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = group_by_class(ids, 3)
    return groups.order, groups.inverse, groups.offsets


def test_compiles_once_for_all_sizes(operator):
    arguments = [(random_ids(n, 3, device=operator.device),) for n in (10, 700, 33)]
    compiles_once(group, arguments)


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(group, random_ids(50, 3, device=operator.device))


def test_deterministic(backend):
    ids = random_ids(100_000, 7, device=backend.device)
    repeats(lambda: tuple(group_by_class(ids, 7)), backend.device)


IDS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "ids", "classes", "words"),
    [
        (TypeError, [0, 1], 2, "class_ids Tensor list"),
        (ValueError, IDS.view(1, 3), 3, r"class_ids \(N,\) \(1, 3\)"),
        (ValueError, IDS[0], 3, r"class_ids \(N,\) \(\)"),
        (TypeError, IDS.float(), 3, "class_ids int64 float32"),
        (TypeError, IDS.bool(), 3, "class_ids int64 bool"),
        (TypeError, IDS.to(torch.int8), 3, "class_ids int64 int8"),
        (ValueError, IDS, 0, "num_classes at least 1 0"),
        (ValueError, IDS, -2, "num_classes at least 1 -2"),
    ],
)
def test_errors(kind, ids, classes, words):
    with pytest.raises(kind, match="^group_by_class: .*" + ".*".join(words.split(" "))):
        group_by_class(ids, classes)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.int64, -1),
        (torch.int64, 3),
        (torch.int64, 2**32),
        (torch.int64, -(2**63)),
        (torch.int32, -(2**31)),
        (torch.int16, 256),
        (torch.uint8, 255),
    ],
    ids=str,
)
# The wrong id alone, first, last, and in the stretch of a second thread.
@pytest.mark.parametrize(("n", "place"), [(1, 0), (5, 0), (5, 4), (70001, 70000)])
def test_class_out_of_range(backend, dtype, number, n, place):
    ids = torch.zeros(n, dtype=dtype, device=backend.device)
    ids[place] = number
    with pytest.raises(ValueError, match=rf"^group_by_class: class_ids must lie in \[0, 3\); got {number}$"):
        group_by_class(ids, 3)
