"""Tests of `assign_classes`: what a penalty chooses, and the seven kinds of test. Budgets have their own file."""

from __future__ import annotations

import pytest
import torch
from support import FLOATING, compiles_once, few, inductor_equals_eager, repeats, same
from torch import Tensor
from torch.library import opcheck

from fastroute import assign_classes
from fastroute.reference.assign_classes import assign_classes_budget_reference, assign_classes_reference

OP, WITHIN = torch.ops.fastroute.assign_classes.default, torch.ops.fastroute.assign_classes.budget
COSTS = {1: [3.0], 2: [1.0, 4.0], 3: [141.0, 304.0, 468.0], 5: [5.0, 1.0, 2.0, 2.5, 9.0]}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


def probabilities(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> Tensor:
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.softmax(dim=1).to(dtype).to(device)


def reference(score: Tensor, cost: list[float], penalty=0.0, budget=None, dtype=torch.int64) -> Tensor:
    prices = torch.tensor(cost, dtype=torch.float64)
    if budget is None:
        return assign_classes_reference(score, prices, penalty, dtype)
    return assign_classes_budget_reference(score, prices, budget, None, False, dtype)[1]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` [N, K] or [B, K, H, W] with other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    larger = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    larger[..., 1::2] = x
    return larger[..., 1::2]


def test_table(backend):
    score = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]], device=backend.device)
    assert assign_classes(score, [1, 2, 4]).tolist() == [0, 2, 1]
    # score / cost: 0.5 0.15 0.05; 0.1 0.15 0.15 (nearly a tie, so the last is raised); 0.3 0.2 0.075.
    score[1, 2] = 0.64
    assert assign_classes(score, [1, 2, 4], penalty=1).tolist() == [0, 2, 0]
    # score · cost: 0.5 0.6 0.8; 0.1 0.6 2.56; 0.3 0.8 1.2.
    assert assign_classes(score, [1, 2, 4], penalty=-1).tolist() == [2, 2, 2]
    # score / cost²: 0.5 0.075 0.0125; 0.1 0.075 0.04; 0.3 0.1 0.01875.
    assert assign_classes(score, [1, 2, 4], penalty=2).tolist() == [0, 0, 0]


def test_table_of_pixels(backend):
    score = torch.tensor([[[[0.9, 0.4, 0.5]], [[0.1, 0.6, 0.5]]]], device=backend.device)
    ids = assign_classes(score, [1.0, 3.0], dtype=torch.uint8)
    assert ids.dtype == torch.uint8
    assert ids.tolist() == [[[0, 1, 0]]]


def test_lowest_class_wins_a_tie(backend):
    score = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]], device=backend.device)
    assert assign_classes(score, [4, 3, 2, 1]).tolist() == [1, 0]
    # 1/4 over 1, 1/2 over 2, 1/2 over 2, 1/2 over 4.
    assert assign_classes(score, [1, 2, 2, 4], penalty=1).tolist() == [0, 0]
    assert assign_classes(score.double(), [1, 2, 2, 4], penalty=-1).tolist() == [3, 3]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (301,), (2, 7, 300), (0, 4, 4), (1, 1, 513)], ids=str)
def test_sweep_of_penalties(backend, shape, dtype):
    for classes, cost in COSTS.items():
        score = probabilities(shape[0], classes, *shape[1:], dtype=dtype, device=backend.device)
        value = torch.tensor(cost, dtype=torch.float64, device=backend.device)
        for layout in LAYOUTS:
            laid = lay_out(score, layout)
            same(assign_classes(laid, cost), reference(score, cost))
            for penalty in (0.3, 1.0, -0.7):
                ids = assign_classes(laid, cost, penalty)
                assert ids.shape == shape
                assert ids.is_contiguous()
                # Boundary band: the power and one product are rounded, so values this close may change places.
                price = value.pow(penalty).view(-1, *[1] * (score.ndim - 2))
                penalised = score.double() / price
                chosen = penalised.gather(1, ids.unsqueeze(1))
                eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
                assert (chosen >= penalised.amax(dim=1, keepdim=True) * (1 - 4 * eps)).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_largest_number_of_classes(backend, dtype):
    score = torch.eye(256, device=backend.device)
    cost = torch.arange(1.0, 257.0)
    ids = assign_classes(score, cost, dtype=dtype)
    same(ids, torch.arange(256, device=backend.device).to(dtype))


def test_cost_tensors_and_units(backend):
    score = probabilities(500, 3, device=backend.device)
    cost = COSTS[3]
    expected = assign_classes(score, cost, 0.5)
    for other in (tuple(cost), torch.tensor(cost), torch.tensor([141, 304, 468]), torch.tensor(cost).double()):
        same(assign_classes(score, other, 0.5), expected)
    # The unit of the cost scales all values alike: it decides nothing, at any penalty.
    for penalty in (-6.0, -0.5, 0.5, 6.0, 30.0):
        milli, million = (assign_classes(score, [c * unit for c in cost], penalty) for unit in (2.0**-10, 2.0**20))
        same(milli, million)


def test_zero_scores_tie_under_a_penalty_and_have_a_price_under_a_budget(backend):
    score = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=backend.device)
    assert assign_classes(score, [2.0, 1.0]).tolist() == [0, 1, 0]
    # 0 / 2 and 0 / 1 are equal: the lowest class wins the first item.
    assert assign_classes(score, [2.0, 1.0], penalty=1.0).tolist() == [0, 1, 0]
    # Under a budget zeros count as 2^-126, so that even a class that is ruled out can be had for a price.
    assert assign_classes(score, [2.0, 1.0], budget=1.0).tolist() == [0, 0, 0]
    assert assign_classes(score, [2.0, 1.0], budget=0.5).tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    cost = torch.tensor(COSTS[3], dtype=torch.float64)
    for shape in ((0, 3), (7, 3), (2, 3, 4, 5)):
        score = probabilities(*shape, device=operator.device).requires_grad_(grad)
        for dtype in few((torch.int64, torch.uint8), shape[0]):
            for penalty in (0.0, 0.5):
                opcheck(OP, (score, cost, penalty, dtype.itemsize))
            for penalty, logits in ((None, False), (0.5, True)):
                opcheck(WITHIN, (score, cost, 0.7, penalty, logits, dtype.itemsize))


def test_no_gradient(backend):
    score = probabilities(7, 3, device=backend.device).requires_grad_()
    assert not assign_classes(score, COSTS[3], 0.5).requires_grad
    assert not assign_classes(score, COSTS[3], budget=0.7).requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_poisoned(backend, poisoned, dtype):
    for shape in ((1, 3), (777, 3), (2, 3, 9, 31)):
        score = probabilities(*shape, device=backend.device)
        same(assign_classes(score, COSTS[3], dtype=dtype), reference(score, COSTS[3], dtype=dtype))
        ids = assign_classes(score, COSTS[3], budget=0.7, dtype=dtype)
        same(ids, reference(score, COSTS[3], budget=0.7, dtype=dtype))
        assert int(ids.max()) < 3


def penalise(score: Tensor) -> Tensor:
    return assign_classes(score, [1.0, 2.0, 7.0], 0.5)


def spend(score: Tensor) -> Tensor:
    return assign_classes(score, [1.0, 3.0], budget=0.7, dtype=torch.uint8)


# Half of ten items in the more expensive class cost 2 / 3 of it: twelve decimals are a little less, and allowed.
def spend_nearly(score: Tensor) -> Tensor:
    return assign_classes(score, [1.0, 3.0], budget=0.666666666666)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(penalise, [(probabilities(n, 3, device=operator.device),) for n in (10, 700, 33)])
    images = [probabilities(b, 2, h, w, device=operator.device) for b, h, w in ((4, 10, 7), (3, 9, 12), (5, 31, 8))]
    compiles_once(spend, [(x,) for x in images])


@pytest.mark.slow
def test_compiled_budget_equals_eager(operator):
    score = probabilities(10, 2, device=operator.device)
    assert int(spend_nearly(score).sum()) == 5
    compiles_once(spend_nearly, [(score,)])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(penalise, probabilities(50, 3, device=operator.device))


def test_deterministic(backend):
    score = probabilities(2, 3, 150, 131, device=backend.device)
    repeats(lambda: assign_classes(score, COSTS[3], 0.5), backend.device)
    score = probabilities(9001, 3, device=backend.device)
    repeats(lambda: assign_classes(score, COSTS[3], budget=0.7), backend.device)


SCORE = torch.full((4, 3), 1 / 3)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"score": [[1.0]]}, "score Tensor list"),
        (ValueError, {"score": SCORE[0]}, r"score \(N, K\) \(3,\)"),
        (TypeError, {"score": SCORE.int()}, "score float32 int32"),
        (TypeError, {"dtype": torch.int16}, "dtype int64 uint8 int16"),
        (TypeError, {"dtype": torch.float32}, "dtype int64 float32"),
        (ValueError, {"cost": [1.0, 2.0]}, r"cost 3 \(2,\)"),
        (ValueError, {"cost": [[1.0, 2.0, 3.0]]}, r"cost 3 \(1, 3\)"),
        (ValueError, {"score": SCORE[:, :0], "cost": []}, "score 1 to 256 0"),
        (ValueError, {"score": torch.ones(1, 257), "cost": [1.0] * 257}, "score 1 to 256 257"),
        (ValueError, {"cost": [1.0, 0.0, 2.0]}, "cost positive 0.0"),
        (ValueError, {"cost": [1.0, -1.0, 2.0]}, "cost positive -1.0"),
        (ValueError, {"cost": [1.0, float("inf"), 2.0]}, "cost finite inf"),
        (ValueError, {"cost": [1.0, float("nan"), 2.0]}, "cost finite nan"),
        (ValueError, {"penalty": float("nan")}, "penalty finite nan"),
        (ValueError, {"penalty": float("inf")}, "penalty finite inf"),
        (ValueError, {"penalty": 1.0, "budget": 0.5}, "either penalty or budget 1.0 0.5"),
        (ValueError, {"budget": 0.2}, r"budget \[0.25, 1\] 0.2"),
        (ValueError, {"budget": 1.1}, r"budget \[0.25, 1\] 1.1"),
        (ValueError, {"budget": float("nan")}, r"budget \[0.25, 1\] nan"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^assign_classes: .*" + ".*".join(words.split(" "))):
        assign_classes(**{"score": SCORE, "cost": [1.0, 2.0, 4.0]} | args)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("arguments", [{}, {"penalty": 0.5}, {"budget": 0.7}], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (9000, 3), (2, 3, 5, 300)], ids=str)
def test_nan_score(backend, shape, arguments, dtype):
    for place in (0, -1):
        for channel in range(3):
            score = probabilities(*shape, dtype=dtype, device=backend.device)
            # The first or the last item.
            score.movedim(1, -1)[(place,) * (len(shape) - 1)][channel] = float("nan")
            with pytest.raises(ValueError, match=r"^assign_classes: score must not be NaN$"):
                assign_classes(score, COSTS[3], **arguments)
