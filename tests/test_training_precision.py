"""Training in half types: what stays in float32, exact resume, and states of another precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from interrupted import Stop, equal, stopping
from networks import picture

from fastroute import io
from fastroute.training import arm, cdnsr, classsr, pcsr
from fastroute.training.data import Pool
from fastroute.training.losses import average_loss, class_loss, routing_loss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CASES = {
    "classsr": (
        classsr.Trainer,
        classsr.Recipe(widths=(3, 4), scale=2, patch=8, branch_steps=(1, 2), classifier_steps=2, joint_steps=2,
                       routing_steps=2, batch=4),
    ),
    "cdnsr": (
        cdnsr.Trainer,
        cdnsr.Recipe(widths=(3, 4), scale=2, patch=8, branch_steps=(1, 2), classifier_steps=2, joint_steps=2, distill_steps=2,
                     batch=4, negatives=2),
    ),
    "arm": (arm.Trainer, arm.Recipe(widths=(3, 5), scale=2, patch=8, steps=9, batch=4, table_patches=20)),
    "pcsr": (
        pcsr.Trainer,
        pcsr.Recipe(width=4, upsamplers=((), (3,), (5, 5)), scales=(2,), patch=8, heavy_steps=5, light_steps=4, batch=2),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    io.write_image(folder / "0.png", (picture(1, 3, 140, 150)[0] * 255).to(torch.uint8))
    return Pool.build(folder, scale=2, patch=8, shrinks=(1.0,))


def make(name: str, pool: Pool, path, precision: str, **changes: object):
    trainer, recipe = CASES[name]
    return trainer(pool, dataclasses.replace(recipe, **changes), path, save_every=2, precision=precision)


@pytest.mark.parametrize(
    ("name", "precision"), [("classsr", "float16"), ("cdnsr", "bfloat16"), ("arm", "float16"), ("pcsr", "bfloat16")]
)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(pool, tmp_path, name, precision):
    types = set()
    original = torch.nn.functional.conv2d

    def watched(*arguments, **named):
        result = original(*arguments, **named)
        # Of what learns: tables are measured and images validated in float32.
        if torch.is_grad_enabled():
            types.update((result.dtype, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", watched)
        whole = make(name, pool, tmp_path / "whole.pt", precision).run().state_dict()
    assert getattr(torch, precision) in types and None not in types
    with pytest.raises(Stop):
        stopping(make(name, pool, tmp_path / "parts.pt", precision), 6).run()
    assert equal(make(name, pool, tmp_path / "parts.pt", precision).run().state_dict(), whole)
    single = make(name, pool, tmp_path / "single.pt", "float32").run().state_dict()
    assert not equal(single, whole) and all(value.dtype == single[key].dtype for key, value in whole.items())
    with pytest.raises(ValueError, match="was saved by a recipe with other precision; train to another folder"):
        make(name, pool, tmp_path / "whole.pt", "float32").run()


def test_training_lowers_the_error(pool, tmp_path):
    trainer = make("arm", pool, tmp_path / "state.pt", "bfloat16", steps=80, batch=8, learning_rate=1e-2)
    lr, hr = pool.batch(np.arange(0, len(pool.positions), 3), np.random.default_rng(0))

    def error() -> float:
        with torch.no_grad():
            return sum((trainer.model.run(k, lr) - hr).square().mean().item() for k in (1, 2))

    before = error()
    trainer.run()
    assert error() < 0.9 * before


def test_the_scale_of_float16_is_saved(pool, tmp_path):
    trainer = make("arm", pool, tmp_path / "state.pt", "float16")
    # No gradient times this is finite: steps are left out until the scale has fallen.
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = {key: value.clone() for key, value in trainer.model.network.state_dict().items()}
    with pytest.raises(Stop):
        stopping(trainer, 4).run()
    assert equal(trainer.model.network.state_dict(), before)
    resumed = make("arm", pool, tmp_path / "state.pt", "float16")
    with pytest.raises(Stop):
        stopping(resumed, 0).run()
    assert resumed.scaler.get_scale() == trainer.scaler.get_scale() == 2.0**26


def test_a_state_from_before_there_were_precisions(pool, tmp_path):
    whole = make("arm", pool, tmp_path / "state.pt", "float32").run().state_dict()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["precision"], state["scaler"]
    torch.save(state, tmp_path / "state.pt")
    assert equal(make("arm", pool, tmp_path / "state.pt", "float32").run().state_dict(), whole)
    with pytest.raises(ValueError, match="with other precision"):
        make("arm", pool, tmp_path / "state.pt", "bfloat16").run()


def test_losses_are_sums_in_float32():
    probability = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1).bfloat16()
    errors, cost = torch.rand(3000, 3), torch.tensor([0.2, 0.5, 1.0])
    for loss in (average_loss, class_loss, lambda p: routing_loss(p, errors, cost, 0.1)):
        assert loss(probability).dtype == torch.float32 and torch.equal(loss(probability), loss(probability.float()))


def test_refused(pool, tmp_path):
    with pytest.raises(ValueError, match="train: precision must be one of float32, bfloat16, float16; got 'half'"):
        make("arm", pool, tmp_path / "state.pt", "half")
