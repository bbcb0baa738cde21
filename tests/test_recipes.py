"""The recipes of CDNSR, ARM and PCSR: resumed runs, who learns in which stage, and what they learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from interrupted import Stop, equal, stopping
from networks import picture

import fastroute
from fastroute import io
from fastroute.models.checkpoints import save_checkpoint
from fastroute.training import arm, cdnsr, pcsr
from fastroute.training.data import Pool
from fastroute.training.recipes import RECIPES, configure
from fastroute.training.start import Start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_tuning", "one_thread")]

CDNSR = cdnsr.Recipe(
    widths=(3, 4), scale=2, patch=8, branch_steps=(2, 3), classifier_steps=3, joint_steps=3, distill_steps=3, batch=4,
    negatives=2, layers=3,
)  # fmt: skip
ARM_RECIPE = arm.Recipe(widths=(3, 5, 6), scale=2, patch=8, steps=9, batch=4, bins=6, table_patches=50)
PCSR = pcsr.Recipe(
    width=4, upsamplers=((), (3,), (5, 5)), classifier=(3,), scales=(2, 3), patch=8, heavy_steps=5, light_steps=4, batch=2
)  # fmt: skip
CASES = {"cdnsr": (cdnsr.Trainer, CDNSR), "arm": (arm.Trainer, ARM_RECIPE), "pcsr": (pcsr.Trainer, PCSR)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        io.write_image(folder / f"{number}.png", (picture(1, 3, 140, 150 + number, seed=number)[0] * 255).to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def pools(images):
    return {scale: Pool.build(images, scale=scale, patch=8, shrinks=(1.0,)) for scale in (2, 3)}


def make(name: str, pools: dict, path, recipe=None, **options):
    trainer, default = CASES[name]
    chosen = recipe or default
    return trainer(pools[chosen.scale], chosen, path, **options)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("stops", [(1,), (4,), (6, 2)])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(pools, tmp_path, name, stops):
    whole = make(name, pools, tmp_path / "whole.pt", save_every=2).run()
    assert not whole.training
    for at in stops:
        with pytest.raises(Stop):
            stopping(make(name, pools, tmp_path / "parts.pt", save_every=2), at).run()
        torch.rand(7)
        np.random.rand(3)
    resumed = make(name, pools, tmp_path / "parts.pt", save_every=2).run()
    assert equal(resumed.state_dict(), whole.state_dict())
    # A finished run is not run again, and ends in the same state.
    assert equal(stopping(make(name, pools, tmp_path / "parts.pt"), 0).run().state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("cdnsr", [{"net2"}, {"net1"}, {"classifier"}, {"net1", "net2", "classifier"}, {"net1", "net2"}]),
        ("arm", [{"network"}]),
        ("pcsr", [{"encoder", "upsamplers.2"}, {"upsamplers.1", "classifier"}]),
    ],
)
def test_every_stage_moves_its_own_parameters(pools, tmp_path, name, moved):
    trainer = make(name, pools, tmp_path / "state.pt")
    assert len(trainer.stages) == len(moved)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    original, found = trainer._save, []

    def save(optimizer):
        original(optimizer)
        if optimizer is None:
            now = dict(trainer.model.named_parameters())
            changed = {k for k in now if not torch.equal(now[k], before[k])}
            found.append({".".join(k.split(".")[: 2 if k.startswith("upsamplers") else 1]) for k in changed})
            before.update({k: v.clone() for k, v in now.items()})

    trainer._save = save
    trainer.run()
    assert found == moved


@pytest.mark.parametrize("name", list(CASES))
def test_seeds(pools, tmp_path, name):
    first, again = (make(name, pools, tmp_path / f"{n}.pt").run().state_dict() for n in range(2))
    other = make(name, pools, tmp_path / "other.pt", dataclasses.replace(CASES[name][1], seed=1)).run().state_dict()
    assert equal(first, again) and not equal(first, other)


def test_state_of_another_recipe(pools, tmp_path):
    make("pcsr", pools, tmp_path / "state.pt").run()
    changed = dataclasses.replace(PCSR, upsamplers=((), (3,), (5, 6)))
    with pytest.raises(ValueError, match=r"was saved by a recipe with other upsamplers; train to another folder"):
        make("pcsr", pools, tmp_path / "state.pt", changed).run()
    with pytest.raises(ValueError, match="was saved by another kind of training; train to another folder"):
        make("arm", pools, tmp_path / "state.pt").run()


def test_state_of_another_origin(pools, tmp_path):
    """What else decided what was learnt, as far as both tell."""
    origin = {"images": "a", "--init": ""}
    make("pcsr", pools, tmp_path / "state.pt", origin=origin).run()
    for same in (origin, {}, {"images": "a", "--shrinks": "1"}):
        make("pcsr", pools, tmp_path / "state.pt", origin=same).run()
    with pytest.raises(ValueError, match="was saved by a training with other images, --init; train to another folder"):
        make("pcsr", pools, tmp_path / "state.pt", origin={"images": "b", "--init": "c"}).run()
    make("pcsr", pools, tmp_path / "new.pt", origin={"images": "b"}, resume=False).run()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("arm", {"steps": 200, "batch": 8, "learning_rate": 5e-3}),
        ("pcsr", {"heavy_steps": 150, "batch": 4, "learning_rate": 5e-3}),
    ],
)
def test_training_lowers_the_error(pools, tmp_path, name, changes):
    trainer = make(name, pools, tmp_path / "state.pt", dataclasses.replace(CASES[name][1], **changes))
    lr, hr = trainer.pool.batch(np.arange(0, len(trainer.pool.positions), 5), np.random.default_rng(0))

    def error() -> float:
        with torch.no_grad():
            if name == "arm":
                return sum((trainer.model.run(k, lr) - hr).square().mean().item() for k in (1, 2, 3))
            features = trainer.model.features(lr)
            return (trainer.model.upsample(features, lr, hr.shape[2:], None, [2]) - hr).square().mean().item()

    before = error()
    trainer.run()
    assert error() < 0.9 * before


def test_cdnsr_moves_towards_its_target(pools, tmp_path):
    """A heavy price on FLOPs empties the expensive class; none does not."""
    steps = {"classifier_steps": 60, "classifier_rate": 0.02, "joint_steps": 1, "distill_steps": 1, "batch": 8, "alpha": 0.01}
    used = []
    for price in (1e4, 0.0):
        recipe = dataclasses.replace(CDNSR, lambda_reg=price, **steps)
        model = make("cdnsr", pools, tmp_path / f"{price}.pt", recipe).run()
        lr, _ = pools[2].batch(np.arange(0, len(pools[2].positions), 3), np.random.default_rng(0))
        with torch.no_grad():
            used.append(model.classifier(lr)[:, 1].mean().item())
    assert used[0] < 0.05 < used[1]


def test_cdnsr_temperatures(pools, tmp_path):
    recipe = dataclasses.replace(CDNSR, classifier_steps=10)
    trainer, seen = make("cdnsr", pools, tmp_path / "state.pt", recipe), []
    original = trainer.loss

    def loss(stage, rng):
        result = original(stage, rng)
        if stage.branch is None:
            seen.append((stage.kind, round(trainer.model.temperature, 3)))
        return result

    trainer.loss = loss
    trainer.run()
    assert [t for kind, t in seen if kind == "classifier"] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4, 0.4])
    assert [t for kind, t in seen if kind == "distill"] == [0.4] * 3
    assert [cdnsr.Recipe(variant=v).target for v in "rms"] == [0.85, 0.65, 0.5] and cdnsr.Recipe(alpha=0.3).target == 0.3


def test_arm_widths_are_drawn_by_cost(pools, tmp_path):
    trainer = make("arm", pools, tmp_path / "state.pt")
    cost = trainer.model.classifier.cost
    assert trainer.share.tolist() == pytest.approx((cost**2 / (cost**2).sum()).tolist()) and trainer.share[0] == 0


def test_arm_table(pools, tmp_path):
    model = make("arm", pools, tmp_path / "state.pt").run()
    assert model.table.ready and model.classifier.eta.item() == pytest.approx(4 * model.classifier.cost[-1].item())
    # Flips and turns change neither scores nor, much, what the table says of interpolation.
    pool = pools[2]
    chosen = np.unique(np.linspace(0, len(pool.positions) - 1, 50).round().astype(int))
    psnr = pool.psnr[chosen].mean()
    lr, _ = pool.batch(chosen, np.random.default_rng(5))
    assert model.table(fastroute.models.arm.edge_score(lr), between=False)[:, 0].mean().item() == pytest.approx(psnr, abs=2)


def test_arm_starts_from_a_supernet_or_from_the_whole(pools, tmp_path):
    other = make("arm", pools, tmp_path / "a.pt", dataclasses.replace(ARM_RECIPE, seed=3)).run()
    still = dataclasses.replace(ARM_RECIPE, steps=0)
    for number, state in enumerate((other.network.state_dict(), other.state_dict())):
        model = make("arm", pools, tmp_path / f"b{number}.pt", still, init=Start(state)).run()
        assert equal(model.network.state_dict(), other.network.state_dict()) and model.table.ready


@pytest.mark.parametrize("name", ["arm", "pcsr"])
def test_balanced_errors(pools, tmp_path, name):
    """The weight of a patch is (1e-3 / (bicubic error + 2e-4))^balance."""
    losses = {}
    for balance in (0.0, 1.0):
        recipe = dataclasses.replace(CASES[name][1], balance=balance)
        trainer = make(name, pools, tmp_path / f"{balance}.pt", recipe)
        stage = trainer.stages[0]
        losses[balance], error, _ = trainer.loss(stage, np.random.default_rng(1))
        errors = torch.tensor([1e-3, 2e-4, 5e-5, 0])
        indices = np.array([0, 3, 4, len(trainer.pool) - 1])
        bicubic = 10 ** (-torch.from_numpy(trainer.pool.psnr[indices]) / 10)
        expected = ((1e-3 / (bicubic + 2e-4)) ** balance * errors).mean()
        torch.testing.assert_close(trainer.balanced(errors, indices), expected)
    assert losses[0.0] == 100 * error and losses[1.0] != losses[0.0]


def test_pcsr_focus(pools, tmp_path):
    """Half of the first phase's patches come from the harder half, beside half of the rest: 3 of 4; then no longer."""
    trainer = make("pcsr", pools, tmp_path / "state.pt", dataclasses.replace(PCSR, batch=4000, focus=0.5))
    heavy, light = (trainer.draw(stage, np.random.default_rng(0)) for stage in trainer.stages)
    half = len(trainer.pool) // 2
    plain = make("pcsr", pools, tmp_path / "plain.pt", dataclasses.replace(PCSR, batch=4000))
    usual = np.mean(plain.draw(plain.stages[0], np.random.default_rng(0)) >= half)
    assert (heavy[:2000] >= half).all() and (heavy[2000:] < half).any()
    assert np.mean(light >= half) == usual


def test_pcsr_scales(pools, tmp_path):
    trainer = make("pcsr", pools, tmp_path / "state.pt")
    sizes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lr, hr = trainer._pairs(trainer.draw(trainer.stages[0], rng), rng)
        assert lr.shape == (2, 3, 8, 8)
        sizes.add(hr.shape[2])
        up = torch.nn.functional.interpolate(lr, hr.shape[2:], mode="bicubic")
        shifted = up.roll(hr.shape[2] // 2, dims=3)
        assert (up - hr).square().mean() < 0.7 * (shifted - hr).square().mean(), "LR and HR show different places"
    assert sizes == {16, 24}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "classsr-carn",
            {"widths": "4,8", "branch_steps": "1,1", "classifier_steps": "1", "joint_steps": "1", "routing_steps": "1"},
        ),
        (
            "classsr-srresnet",
            {"widths": "2,3", "branch_steps": "1,1", "classifier_steps": "1", "joint_steps": "1", "routing_steps": "1"},
        ),
        (
            "cdnsr-carn",
            {"widths": "4,8", "branch_steps": "1,1", "classifier_steps": "1", "joint_steps": "1", "distill_steps": "1"},
        ),
        ("arm-carn", {"widths": "4,8", "steps": "2", "table_patches": "10"}),
        ("pcsr-carn", {"width": "4", "upsamplers": "3;4", "scales": "2", "heavy_steps": "1", "light_steps": "1"}),
    ],
)
def test_other_backbones(pools, tmp_path, name, settings):
    scale = {} if name.startswith("pcsr") else {"scale": "2"}
    recipe = configure(name, {**settings, **scale, "patch": "8", "batch": "2"})
    model = RECIPES[name][1](pools[2], recipe, tmp_path / "state.pt").run()
    save_checkpoint(tmp_path / "model.safetensors", model, {"scale": 2, "patch": 8, "stride": 6})
    router = fastroute.load(tmp_path / "model.safetensors")
    image = picture(1, 3, 20, 30)
    upscaled = router.upscale(image, **({"scale": 2} if name.startswith("pcsr") else {}))
    assert upscaled.image.shape == (1, 3, 40, 60) and upscaled.image.isfinite().all()


def test_a_state_from_before_a_setting_existed(pools, tmp_path):
    path = tmp_path / "state.pt"
    whole = make("cdnsr", pools, path).run().state_dict()
    state = torch.load(path, weights_only=True)
    del state["recipe"]["backbone"]
    torch.save(state, path)
    assert equal(make("cdnsr", pools, path).run().state_dict(), whole)
    with pytest.raises(ValueError, match="a recipe with other backbone"):
        make("cdnsr", pools, path, dataclasses.replace(CDNSR, backbone="srresnet")).run()
