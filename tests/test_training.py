"""Training: a few steps, stopped and taken up again, and what `fastroute train` refuses."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from interrupted import Stop, equal, stopping
from networks import picture
from torch.nn import functional as F

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.models.checkpoints import read_checkpoint, save_checkpoint
from fastroute.models.classsr import ClassSR
from fastroute.training.classsr import Recipe, Trainer
from fastroute.training.data import Pool
from fastroute.training.losses import routing_loss
from fastroute.training.start import Start

RECIPE = Recipe(
    widths=(3, 4), scale=2, patch=8, branch_steps=(3, 5), classifier_steps=4, joint_steps=3, routing_steps=2, batch=4
)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
OPTIONS = ["--branch-steps", "1,2,1", "--classifier-steps", "2", "--joint-steps", "1", "--routing-steps", "1", "--batch", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        image = (picture(1, 3, 140, 150 + number, seed=number)[0] * 255).to(torch.uint8)
        io.write_image(folder / f"{number}.png", image)
    return folder


@pytest.fixture(scope="module")
def pool(images):
    return Pool.build(images, scale=2, patch=8, shrinks=(1.0, 2.0))


# Inside a stage, at its end, and between two saved states; 5 + 3 + 4 + 3 steps in all.
@pytest.mark.parametrize("stops", [(4,), (5,), (7,), (2, 3, 1), (13,), (0,)])
@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(pool, tmp_path, stops, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = Trainer(pool, recipe, tmp_path / "whole.pt", save_every=2).run()
    assert not whole.training
    for at in stops:
        with pytest.raises(Stop):
            stopping(Trainer(pool, recipe, tmp_path / "parts.pt", save_every=2), at).run()
        # What else goes on in the process decides nothing.
        torch.rand(7)
        np.random.rand(3)
    resumed = Trainer(pool, recipe, tmp_path / "parts.pt", save_every=2).run()
    assert equal(resumed.state_dict(), whole.state_dict())


def test_optimizers(pool, tmp_path, monkeypatch):
    """Both learn, on different ways."""
    weights = []
    for optimizer in ("adam", "soap"):
        recipe = replace(RECIPE, optimizer=optimizer, branch_steps=(1, 150), learning_rate=1e-2)
        trainer = Trainer(pool, recipe, tmp_path / f"{optimizer}.pt")
        lr, hr = pool.batch(np.arange(16), np.random.default_rng(0))
        before = F.mse_loss(trainer.model.branches[1](lr), hr)
        model = trainer.run()
        assert F.mse_loss(model.branches[1](lr), hr) < 0.7 * before
        weights.append(model.state_dict())
    assert not equal(*weights)
    with pytest.raises(ValueError, match=r"^train: optimizer must be one of adam, soap; got 'sgd'$"):
        replace(RECIPE, optimizer="sgd")
    monkeypatch.setattr("fastroute.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimizer=soap needs another package: run pip install"):
        replace(RECIPE, optimizer="soap")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_loses_nothing(pool, tmp_path, interruption):
    whole = Trainer(pool, RECIPE, tmp_path / "whole.pt").run()
    for at in (0, 3, 4):
        with pytest.raises(interruption):
            stopping(Trainer(pool, RECIPE, tmp_path / "parts.pt", save_every=1000), at, interruption).run()
    # 7 steps are done, and are not done again.
    trainer = Trainer(pool, RECIPE, tmp_path / "parts.pt")
    resumed = stopping(trainer, sum(stage.steps for stage in trainer.stages) - 7).run()
    assert equal(resumed.state_dict(), whole.state_dict())


def test_an_interrupt_within_a_step(pool, tmp_path):
    """The statistics of batch norms count its batch once."""
    recipe = dataclasses.replace(RECIPE, backbone="carn", widths=(4, 8), branch_steps=(1, 3))
    whole = Trainer(pool, recipe, tmp_path / "whole.pt").run()
    trainer = Trainer(pool, recipe, tmp_path / "parts.pt")
    original = trainer.loss

    def loss(stage, rng):
        result = original(stage, rng)
        if trainer.step == 2:
            raise KeyboardInterrupt
        return result

    trainer.loss = loss
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    resumed = Trainer(pool, recipe, tmp_path / "parts.pt")
    resumed = stopping(resumed, sum(stage.steps for stage in resumed.stages) - 2).run()
    assert equal(resumed.state_dict(), whole.state_dict())


def test_norms_of_joint_training(pool, tmp_path):
    """They keep the statistics of the branches' training, or go on with those of the batches."""
    recipe = dataclasses.replace(RECIPE, backbone="carn", widths=(4, 8), branch_steps=(2, 3))
    found = {}
    for norms in ("running", "batch"):
        trainer = Trainer(pool, dataclasses.replace(recipe, norms=norms), tmp_path / f"{norms}.pt")
        original, kept = trainer.begin, []

        def begin(stage, original=original, kept=kept, trainer=trainer):
            original(stage)
            kept.append(
                [(norm.training, norm.running_mean.clone(), norm.num_batches_tracked.clone()) for norm in trainer.norms]
            )

        trainer.begin = begin
        trainer.run()
        found[norms] = kept
    # Two stages of the branches, then classifier, joint and routing.
    for norms, stages in found.items():
        modes = [{training for training, *_ in stage} for stage in stages]
        assert modes == [{True}] * 2 + [{norms == "batch"}] * 3
    first, last = found["running"][2], found["running"][4]
    assert all(torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(first, last, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(found["batch"][2], found["batch"][4], strict=True))
    with pytest.raises(ValueError, match="norms must be one of running, batch; got 'frozen'"):
        dataclasses.replace(RECIPE, norms="frozen")


def test_a_resumed_run_repeats_only_what_was_not_saved(pool, tmp_path):
    with pytest.raises(Stop):
        stopping(Trainer(pool, RECIPE, tmp_path / "state.pt", save_every=2), 7).run()
    # 5 steps of the first stage, then 2 of the second: all saved. 10 are left.
    rest = stopping(Trainer(pool, RECIPE, tmp_path / "state.pt", save_every=2), 10)
    rest.run()
    with pytest.raises(Stop):
        stopping(Trainer(pool, RECIPE, tmp_path / "fresh.pt", save_every=2), 14).run()
    # A finished run is not run again.
    stopping(Trainer(pool, RECIPE, tmp_path / "state.pt"), 0).run()


def test_every_stage_moves_its_own_parameters(pool, tmp_path):
    fresh = {k: v.clone() for k, v in Trainer(pool, RECIPE, tmp_path / "a.pt").model.state_dict().items()}
    moved = []
    # After the stages of branch 2 (5 steps), branch 1 (3) and the classifier (4).
    for steps in (5, 8, 12):
        trainer = stopping(Trainer(pool, RECIPE, tmp_path / f"{steps}.pt"), steps)
        with pytest.raises(Stop):
            trainer.run()
        state = trainer.model.state_dict()
        moved.append({name.split(".")[0] for name in state if not torch.equal(state[name], fresh[name])})
    assert moved == [{"net2"}, {"net1", "net2"}, {"net1", "net2", "classifier"}]


def test_training_lowers_the_loss(pool, tmp_path):
    recipe = dataclasses.replace(RECIPE, branch_steps=(60, 60), learning_rate=5e-3, batch=8)
    trainer = Trainer(pool, recipe, tmp_path / "state.pt")
    with torch.no_grad():
        for branch in trainer.model.branches:
            branch.tail_conv.weight.mul_(0.5)
    lr, hr = pool.batch(np.arange(0, len(pool.positions), 7), np.random.default_rng(0))

    def error():
        with torch.no_grad():
            return [(branch(lr) - hr).abs().mean().item() for branch in trainer.model.branches]

    before = error()
    trainer.run()
    assert all(after < 0.8 * first for after, first in zip(error(), before, strict=True))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balanced_errors(pool, tmp_path, balance):
    """The weight of a patch is (1e-3 / (bicubic error + 2e-4))^balance."""
    trainer = Trainer(pool, dataclasses.replace(RECIPE, balance=balance), tmp_path / "state.pt")
    stage = trainer.stages[0]
    loss, mse, _ = trainer.loss(stage, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    indices = trainer.draw(stage, rng)
    lr, hr = pool.batch(indices, rng)
    with torch.no_grad():
        errors = (trainer.model.branches[stage.branch](lr) - hr).double().square().flatten(1).mean(dim=1)
    bicubic = 10 ** (-torch.from_numpy(pool.psnr[indices]).double() / 10)
    weights = (1e-3 / (bicubic + 2e-4)) ** balance
    assert torch.allclose(loss.double(), 100 * (weights * errors).mean(), rtol=1e-5)
    assert torch.allclose(mse.double(), errors.mean(), rtol=1e-5), "the progress bar tells the plain error"
    assert (weights.std() > 0) == (balance > 0)


def test_rates_are_annealed(pool, tmp_path, monkeypatch):
    rates = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or original(self))
    Trainer(
        pool, dataclasses.replace(RECIPE, branch_steps=(1, 300), joint_steps=1, routing_steps=1, batch=1), tmp_path / "state.pt"
    ).run()
    # 200 steps of warming up, times a cosine that has fallen to a quarter by then.
    assert rates[0] == pytest.approx(1e-3 / 200) and rates[199] == pytest.approx(1e-3 * 0.2545, rel=0.02)
    assert max(rates[:300]) < 1e-3 and rates[299] < 1e-5


def test_seeds_and_start_weights(pool, tmp_path):
    first = Trainer(pool, RECIPE, tmp_path / "a.pt").model.state_dict()
    other = Trainer(pool, dataclasses.replace(RECIPE, seed=1), tmp_path / "b.pt").model.state_dict()
    assert equal(first, Trainer(pool, RECIPE, tmp_path / "c.pt").model.state_dict())
    # The first three features start as an interpolator, whatever the seed.
    assert not torch.equal(first["net2.head_conv.0.weight"], other["net2.head_conv.0.weight"])
    assert equal(Trainer(pool, RECIPE, tmp_path / "d.pt", init=Start(other)).model.state_dict(), other)


def test_state_of_another_recipe(pool, tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(Stop):
        stopping(Trainer(pool, RECIPE, path, save_every=1), 2).run()
    before = path.read_bytes()
    changed = dataclasses.replace(RECIPE, batch=5, seed=3)
    with pytest.raises(
        ValueError,
        match=r"state\.pt was saved by a recipe with other batch, seed; train to another .* saved with: batch=4, seed=0$",
    ):
        Trainer(pool, changed, path).run()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_steps": (1,)}, "branch_steps must be one positive number per width"),
        ({"branch_steps": (1, 0)}, "branch_steps must be one positive number per width"),
        ({"widths": (), "branch_steps": ()}, "must"),
        ({"widths": (4, 3)}, "widths must rise"),
        ({"widths": (3, 3)}, "widths must rise"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"scale": -1}, "scale must be at least 1"),
        ({"joint_steps": 0}, "joint_steps must be at least 1"),
        ({"focus": 1.1}, r"focus must lie in \[0, 1\]"),
        ({"balance": -0.1}, r"balance must lie in \[0, 1\]"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refused_recipes(changes, message):
    with pytest.raises(ValueError, match=f"train: .*{message}"):
        dataclasses.replace(RECIPE, **changes)


def train(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", "classsr-fsrcnn", *map(str, arguments)])


def fails(result: Result, *words: str) -> None:
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Error: " in result.output and "Traceback" not in result.output
    assert all(word in result.output for word in words), result.output


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Stop])
def test_command_resumes_bit_for_bit(images, tmp_path, monkeypatch, interruption):
    whole = train("--images", images, "--out", tmp_path / "whole", *OPTIONS)
    assert whole.exit_code == 0 and " patches from 2 images, whole and reduced\n" in whole.output, whole.output
    original = Trainer._run_stage

    def run_stage(self, number, *args):
        if number == 3:
            raise interruption
        original(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_stage", run_stage)
        assert train("--images", images, "--out", tmp_path / "parts", *OPTIONS).exit_code != 0
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["state.pt"]
    resumed = train("--images", images, "--out", tmp_path / "parts", *OPTIONS)
    assert resumed.exit_code == 0
    # The three branches were not trained again.
    assert "branch" in whole.output and "branch" not in resumed.output
    name = "classsr-fsrcnn-x4.safetensors"
    assert f"wrote {tmp_path / 'parts' / name}" in resumed.output
    (weights, metadata), (others, _) = (read_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
    assert equal(weights, others)
    assert metadata["scale"] == "4" and metadata["branch_steps"] == "[1, 2, 1]"
    router = fastroute.load(tmp_path / "parts" / name)
    assert (router.num_classes, router.patch, router.stride, router.scale) == (3, 32, 28, 4)


def test_command_starts_from_weights(images, tmp_path):
    save_checkpoint(tmp_path / "start.pth", ClassSR.fsrcnn((16, 36, 56), 2))
    result = train("--images", images, "--out", tmp_path / "out", "--init", tmp_path / "start.pth", "--scale", 2, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "classsr-fsrcnn-x2.safetensors").exists()
    save_checkpoint(tmp_path / "other.pth", ClassSR.fsrcnn((3, 4), 2))
    for path in (tmp_path / "other.pth", tmp_path / "absent.pth"):
        fails(train("--images", images, "--out", tmp_path / "out2", "--init", path, *OPTIONS), str(path))
    assert not list((tmp_path / "out2").glob("*.safetensors"))


def test_command_refuses(images, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(train("--images", tmp_path / "empty", "--out", tmp_path / "o"), "empty holds no image file")
    fails(train("--images", tmp_path / "absent", "--out", tmp_path / "o"), "absent is not a folder")
    fails(train("--out", tmp_path / "o"), "--images")
    fails(train("--images", images, "--exclude", "*.png", "--out", tmp_path / "o"), "is excluded by *.png")
    for steps, word in (("1,2", "one positive number per width"), ("1,x,3", "whole numbers"), ("", "whole numbers")):
        fails(train("--images", images, "--out", tmp_path / "o", "--branch-steps", steps), word)
    fails(train("--images", images, "--out", tmp_path / "o", "--batch", 0), "batch must be at least 1")
    (tmp_path / "file").write_text("")
    fails(train("--images", images, "--out", tmp_path / "file"), "cannot make the folder")
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.safetensors"))


def test_command_refuses_before_images_are_read(images, tmp_path):
    """The folder holds a picture that cannot be read, which would be named first."""
    out = tmp_path / "done"
    assert train("--images", images, "--out", out, *OPTIONS).exit_code == 0
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "broken.png").write_bytes(b"no image")
    save_checkpoint(tmp_path / "other.pth", ClassSR.fsrcnn((3, 4), 2))
    new = ("--images", folder, "--out", tmp_path / "o")
    for arguments, words in (
        ((*new, "--validate-every", 0), ["--validate-every"]),
        ((*new, "--validate", tmp_path / "absent"), ["absent is not a folder"]),
        ((*new, "--resume"), ["nothing to resume"]),
        ((*new, "--init", tmp_path / "other.pth"), ["does not fit"]),
        ((*new, "--set", "widths=1,16,36"), ["FSRCNN"]),
        ((*new, "--set", "backbone=own"), ["needs a model, given in Python"]),
        ((*new, "--scale", 3, "--set", "scale=2"), ["scale=2 contradicts --scale 3"]),
        ((*new, "--shrinks", "1,x"), ["--shrinks", "numbers of at least 1"]),
        (("--images", folder, "--out", out, *OPTIONS), ["other images"]),
        (("--images", images, "--out", out, *OPTIONS, "--set", "balance=0.5"), ["other balance"]),
        (("--images", images, "--out", out, *OPTIONS, "--shrinks", "1,2"), ["other --shrinks"]),
        (("--images", images, "--out", out, *OPTIONS, "--init", tmp_path / "other.pth"), ["other --init"]),
    ):
        result = train(*arguments)
        fails(result, *words)
        assert "broken.png" not in result.output and "reading images" not in result.output, arguments
    assert not (tmp_path / "o").exists()
    again = train("--images", images, "--out", out, *OPTIONS)
    assert again.exit_code == 0 and "this training is complete" in again.output


def test_command_names_bad_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    io.write_image(folder / "small.png", torch.zeros(3, 127, 300, dtype=torch.uint8))
    fails(
        train("--images", folder, "--out", tmp_path / "o"),
        "images must be at least 128 x 128 pixels",
        f"{folder / 'small.png'} (300 x 127)",
        "--exclude",
    )
    (folder / "broken.png").write_bytes(b"no image")
    fails(train("--images", folder, "--out", tmp_path / "o"), f"cannot read {folder / 'broken.png'}", "--exclude")
    # A header that promises more than there is.
    io.write_image(folder / "large.png", torch.zeros(3, 300, 300, dtype=torch.uint8))
    content = (folder / "large.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    (folder / "small.png").unlink()
    fails(train("--images", folder, "--out", tmp_path / "o"), f"cannot read {folder / 'broken.png'}", "--exclude")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"J", {"a": 1}, {"recipe": {"batch": 3}}, [1]])
def test_command_refuses_a_damaged_state(images, tmp_path, content):
    path = tmp_path / "state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    fails(train("--images", images, "--out", tmp_path, *OPTIONS), str(path))


def test_routing_loss_by_hand():
    probability = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    errors = torch.tensor([[5.0, 1.0], [2.0, 2.0]])
    cost = torch.tensor([0.5, 1.0])
    # Totals at price 2: (6, 3) and (3, 4); regrets in units of 2: (1.5, 0) and (0, 0.5); stakes 2 and 1.
    sure = torch.softmax(torch.tensor([[-3.0, 0.0], [0.0, -1.0]]), dim=1)
    entropy = -(sure * probability.clamp(min=1e-12).log()).sum(dim=1)
    expected = (2 * entropy[0] + entropy[1]) / 3
    assert routing_loss(probability, errors, cost, 2.0).item() == pytest.approx(expected.item())
    # It is least at the targets, and one extreme patch counts no more than a regret of 10.
    assert routing_loss(sure, errors, cost, 2.0) < routing_loss(probability, errors, cost, 2.0)
    huge, large = (torch.tensor([[e, 0.0], [0.0, 0.0]]) for e in (1e6, 1e3))
    assert torch.equal(routing_loss(probability, huge, cost, 2.0), routing_loss(probability, large, cost, 2.0))
    with pytest.raises(ValueError, match="routing_loss: errors must be"):
        routing_loss(probability, errors[:1], cost, 2.0)
