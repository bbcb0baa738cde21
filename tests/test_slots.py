"""Slots: where patches go when a class has too many of them, against loops over patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastroute.patch.slots import Slots, capacities_for, check_capacities


def place_plainly(ids, capacities, hardness):
    """The class in which each patch runs, one patch after the other."""
    classes = range(len(capacities))
    ranked = [sorted((n for n, c in enumerate(ids) if c == own), key=lambda n: (-hardness[n], n)) for own in classes]
    free = [max(capacity - len(patches), 0) for capacity, patches in zip(capacities, ranked, strict=True)]
    waiting = [max(len(patches) - capacity, 0) for capacity, patches in zip(capacities, ranked, strict=True)]
    moves = {own: [] for own in classes}
    for to in classes:
        for own in reversed(range(to)):
            while waiting[own] and free[to]:
                moves[own].append(to)
                waiting[own] -= 1
                free[to] -= 1
    ran = {}
    for own in reversed(classes):
        up, stay = len(moves[own]), min(len(ranked[own]), capacities[own])
        for patch, to in zip(ranked[own], sorted(moves[own], reverse=True), strict=False):
            ran[patch] = to
        for patch in ranked[own][up : up + stay]:
            ran[patch] = own
        for patch in ranked[own][up + stay :]:
            ran[patch] = max(to for to in classes if free[to])
            free[ran[patch]] -= 1
    return [ran[n] for n in range(len(ids))]


@pytest.mark.parametrize(
    ("ids", "capacities", "hardness", "expected"),
    [
        ([0, 1, 2, 0], [2, 1, 1], None, [0, 1, 2, 0]),
        # The first patch moves up.
        ([0, 0, 0], [2, 1, 1], None, [1, 0, 0]),
        # The hardest moves up, and furthest.
        ([0, 0, 0], [1, 1, 1], [0.1, 0.9, 0.5], [0, 2, 1]),
        # Nowhere to move up to: the easiest moves down.
        ([1, 1, 1], [2, 2], [0.3, 0.1, 0.2], [1, 0, 1]),
        # Both overflow, and the more expensive one chooses first.
        ([1, 1, 2, 2], [1, 1, 1, 1], None, [1, 0, 3, 2]),
        # No slots at all in a class.
        ([1, 1, 0], [1, 0, 2], [0.2, 0.8, 0.5], [2, 2, 0]),
        ([0, 0], [2], None, [0, 0]),
    ],
)
def test_examples(ids, capacities, hardness, expected):
    hard = None if hardness is None else torch.tensor(hardness)
    placed = Slots(capacities, len(ids), torch.device("cpu"))(torch.tensor(ids), hard)
    assert placed.classes.tolist() == expected
    wanted = torch.bincount(torch.tensor(ids), minlength=len(capacities))
    assert placed.overflow.tolist() == (wanted - torch.tensor(capacities)).clamp(min=0).tolist()


@st.composite
def cases(draw):
    classes, number = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    ids = draw(st.lists(st.integers(0, classes - 1), min_size=number, max_size=number))
    capacities = draw(st.lists(st.integers(0, number), min_size=classes, max_size=classes))
    short = max(number - sum(capacities), 0)
    capacities[draw(st.integers(0, classes - 1))] += short
    hardness = draw(st.none() | st.lists(st.integers(0, 4), min_size=number, max_size=number))
    return ids, capacities, hardness


@given(cases())
def test_equal_to_loops(case):
    ids, capacities, hardness = case
    hard = None if hardness is None else torch.tensor(hardness, dtype=torch.float32)
    slots = Slots(capacities, len(ids), torch.device("cpu"))
    placed = slots(torch.tensor(ids), hard)
    assert placed.classes.tolist() == place_plainly(ids, capacities, hardness or [0] * len(ids))
    # Every patch has a slot of its own, of its class, and the slot knows it; unused ones hold a patch that exists.
    assert placed.places.unique().numel() == len(ids)
    assert torch.equal(placed.patches[placed.places], torch.arange(len(ids)))
    assert placed.patches.shape == (sum(capacities),) and int(placed.patches.max()) < len(ids)
    start = slots.start[placed.classes]
    assert bool(((placed.places >= start) & (placed.places < start + slots.capacity[placed.classes])).all())


def test_capacities():
    assert check_capacities("op", [3, 0.5, 1.0], 3, 7) == [3, 4, 7]
    assert check_capacities("op", [7 / 10, 3 / 10], 2, 10) == [7, 3]
    assert check_capacities("op", [10**6, 0], 2, 10) == [10, 0]
    assert capacities_for([[5, 0, 15]], 20, 0.2) == [6, 0, 18]
    assert capacities_for([[5, 0, 15]], 40, 0) == [10, 0, 30]
    assert capacities_for([[1, 1]], 3, 9) == [3, 3]
    # The largest share of each class, in calls of different length.
    assert capacities_for([[8, 1, 1], [4, 4, 12], [1, 3, 0]], 20, 0) == [16, 15, 12]


@pytest.mark.parametrize(
    ("capacities", "error", "text"),
    [
        ([5, 4], ValueError, "one entry per class, 3; got 2"),
        ([5, 3, 1], ValueError, "hold all 10 patches together; .* hold 9: add 1"),
        ([5, -1, 9], ValueError, "got -1"),
        ([0.5, 1.5, 0.1], ValueError, r"in \[0, 1\]; got 1.5"),
        ([5, float("nan"), 9], ValueError, "got nan"),
        ([5, True, 9], TypeError, "got bool"),
        ([5, "6", 9], TypeError, "got str"),
    ],
)
def test_impossible_capacities(capacities, error, text):
    with pytest.raises(error, match=text):
        check_capacities("op", capacities, 3, 10)
    with pytest.raises(ValueError, match="slack must be at least 0"):
        capacities_for([[1, 2]], 3, -0.5)
