"""Training that is interrupted, and the equality of what it leaves."""

from __future__ import annotations

from typing import TypeVar

import torch
from support import bits

from fastroute.training.base import RecipeTrainer

AnyTrainer = TypeVar("AnyTrainer", bound=RecipeTrainer)


class Stop(Exception):
    pass


def stopping(trainer: AnyTrainer, at: int, error: type[BaseException] = Stop) -> AnyTrainer:
    """`trainer`, interrupted before its step number `at`."""
    original, count = trainer.loss, [0]

    def loss(*args):
        count[0] += 1
        if count[0] > at:
            raise error
        return original(*args)

    trainer.loss = loss
    return trainer


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(bits(a[name].reshape(-1)), bits(b[name].reshape(-1))) for name in a)
