"""The public trainer: networks, losses and data of one's own, validation, checkpoints, logs and resuming."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from interrupted import Stop, equal, stopping
from networks import picture
from torch import nn
from torch.nn import functional as F

from fastroute import io, quality
from fastroute.degradation import make_pair
from fastroute.models.checkpoints import read_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.training import CsvLog, Recipe, Stage, StepResult, TensorBoardLog, Trainer, Validation
from fastroute.training.data import Pool
from fastroute.training.logs import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(steps=6, batch=2, learning_rate=0.05)


class Own(nn.Module):
    """A network of one's own, with a batch norm: a convolution to an upscaled image."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(
            nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.BatchNorm2d(3 * scale**2), nn.PixelShuffle(scale)
        )

    def forward(self, x):
        return self.layers(x) + F.interpolate(x, scale_factor=self.scale, mode="nearest")


class OwnData(torch.utils.data.Dataset):
    """Pairs of one's own, 8-bit."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index):
        hr = (picture(1, 3, 16, 16, seed=int(index))[0] * 255).to(torch.uint8)
        return F.avg_pool2d(hr.float(), 2).to(torch.uint8), hr


class OwnLoss(nn.Module):
    """A loss that learns too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, output, target):
        return (self.weight * (output - target)).abs().mean() + (self.weight - 1).square().mean()


def own() -> Own:
    torch.manual_seed(3)
    return Own()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        io.write_image(folder / f"{number}.png", (picture(1, 3, 41, 50 + number, seed=number)[0] * 255).to(torch.uint8))
    return folder


def test_one_step_by_hand(tmp_path):
    """Adam's first step moves every weight by the rate, against the sign of its gradient."""
    network, data = own(), OwnData()
    before = {k: v.clone() for k, v in network.named_parameters()}
    indices = np.random.default_rng([0, 0, 0]).integers(0, 5, 2)
    lr, hr = (torch.stack([data[i][k] for i in indices]).float() / 255 for k in (0, 1))
    copy = own()
    F.mse_loss(copy(lr), hr).backward()
    trainer = Trainer(network, data, Recipe(steps=1, batch=2, learning_rate=0.01), tmp_path / "a" / "state.pt", loss=F.mse_loss)
    assert trainer.run() is network and not network.training
    for name, parameter in copy.named_parameters():
        large = parameter.grad.abs() > 1e-5
        moved = network.get_parameter(name) - before[name]
        # The bias before a batch norm has no gradient.
        assert large.any() or name == "layers.0.bias"
        assert torch.allclose(moved[large], -0.01 / 200 * parameter.grad[large].sign(), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4,), (2, 3)])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, images, stops):
    def trainer(name: str) -> Trainer:
        validation = Validation(images, 2, every=4)
        return Trainer(
            own(), OwnData(), RECIPE, tmp_path / name / "state.pt", loss=OwnLoss(), save_every=2, validation=validation,
            logs=[CsvLog(tmp_path / f"{name}.csv")],
        )  # fmt: skip

    whole = trainer("whole")
    state = whole.run().state_dict()
    assert whole.helper.weight.std() > 0, "the loss has not learnt"
    for at in stops:
        with pytest.raises(Stop):
            stopping(trainer("parts"), at).run()
        torch.rand(7)
    rest = trainer("parts")
    assert equal(rest.run().state_dict(), state)
    assert equal(rest.helper.state_dict(), whole.helper.state_dict()) and rest.best == whole.best
    for name in ("best", "last"):
        weights = [read_checkpoint(tmp_path / run / f"{name}.safetensors")[0] for run in ("whole", "parts")]
        assert equal(*weights)
    # Rows after the saved state are not written twice.
    rows = [list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("whole", "parts")]
    assert tuple(rows[0][0]) == COLUMNS
    assert [(r["steps"], r["validation_psnr"]) for r in rows[0]] == [(r["steps"], r["validation_psnr"]) for r in rows[1]]
    assert (
        [r["steps"] for r in rows[0]] == ["1", "4", "6"] and rows[0][0]["rate"] == "0.00025" and float(rows[0][0]["loss"]) > 0
    )


def test_validation_by_hand(images):
    network = own().eval()
    seen = []
    trainer = Trainer(network, OwnData(), RECIPE, "unused")
    network.eval()
    upscale = trainer.upscale(Stage("training", 1, 1e-3))
    found = Validation(images, 2)(lambda lr: seen.append(lr) or upscale(lr))
    each = []
    for number, lr in enumerate(seen):
        image = io.read_image(images / f"{number}.png")
        expected, hr = make_pair(image, 2)
        assert torch.equal(lr, expected)
        with torch.no_grad():
            result = (network(lr[None].float() / 255)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        each.append(quality.compare(result, hr, 2))
    assert len(each) == 2 and found.psnr == pytest.approx(sum(e["psnr"] for e in each) / 2)
    assert found.ssim == pytest.approx(sum(e["ssim"] for e in each) / 2)


def test_best_and_last(tmp_path, images):
    """The better of two validations of a stage is kept, whenever it was."""
    trainer = Trainer(own(), OwnData(), RECIPE, tmp_path / "state.pt", validation=Validation(images, 2, every=2))
    written, scores = [], iter([30.0, 32.0, 31.0])
    original = trainer.validation
    trainer.validation = lambda upscale: original(upscale)._replace(psnr=next(scores))
    trainer.validation.every = 2
    keep = trainer.write
    trainer.write = lambda path: written.append((path.stem, trainer.step)) or keep(path)
    trainer.run()
    assert written == [("last", 2), ("best", 2), ("last", 4), ("best", 4), ("last", 6), ("last", 0)]
    best, metadata = read_checkpoint(tmp_path / "best.safetensors")
    last, _ = read_checkpoint(tmp_path / "last.safetensors")
    assert equal(last, trainer.model.state_dict()) and not equal(best, last) and metadata["steps"] == "6"


def test_stages_and_losses_of_a_subclass(tmp_path):
    """Whoever needs more than output and target says so in public methods."""

    class Mine(Trainer):
        def plan(self):
            return [Stage("first", 2, 0.1, "bias"), Stage("all", 1, 0.1)]

        def parameters(self, stage):
            return [self.model.layers[0].bias] if stage.kind == "bias" else super().parameters(stage)

        def loss(self, stage, rng):
            lr, hr = self.batch(self.draw(stage, rng), rng)
            error = F.mse_loss(self.model(lr), hr)
            return StepResult(error + 1e-3 * self.model.layers[0].weight.square().sum(), error.detach())

    network, fresh = own(), own().state_dict()
    trainer = stopping(Mine(network, OwnData(), RECIPE, tmp_path / "state.pt"), 2)
    with pytest.raises(Stop):
        trainer.run()
    moved = [name for name, value in network.named_parameters() if not torch.equal(value, fresh[name])]
    assert moved == ["layers.0.bias"]
    Mine(network, OwnData(), RECIPE, tmp_path / "state.pt").run()
    assert not torch.equal(network.layers[0].weight, fresh["layers.0.weight"])


def test_a_pool_of_patches(tmp_path, images):
    pool = Pool.build(images, scale=2, patch=8, shrinks=(1.0,))
    network = FSRCNN(4, 2)
    before = {k: v.clone() for k, v in network.named_parameters()}
    Trainer(network, pool, Recipe(steps=3, batch=2), tmp_path / "state.pt").run()
    assert all(not torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_resume(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(ValueError, match=r"train: there is nothing to resume: .*state\.pt does not exist"):
        Trainer(own(), OwnData(), RECIPE, path, resume=True).run()
    with pytest.raises(Stop):
        stopping(Trainer(own(), OwnData(), RECIPE, path, save_every=1), 4).run()
    anew = Trainer(own(), OwnData(), RECIPE, path, resume=False)
    with pytest.raises(Stop):
        stopping(anew, 5).run()
    assert anew.step == 5
    rest = Trainer(own(), OwnData(), RECIPE, path, save_every=1, resume=True)
    stopping(rest, 2).run()  # 4 steps were saved, by the first of them


def test_refusals(tmp_path, images, monkeypatch):
    with pytest.raises(ValueError, match="train: data must hold at least one pair; it is empty"):
        Trainer(own(), [], RECIPE, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="train: precision must be one of"):
        Trainer(own(), OwnData(), RECIPE, tmp_path / "state.pt", precision="int8")
    with pytest.raises(ValueError, match="train: steps must be at least 1; got 0"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match=r"is excluded by \*\.png"):
        Validation(images, 2, exclude=["*.png"])
    with pytest.raises(ValueError, match=r"validation images must be at least 58 x 58; .*0\.png has 50 x 41"):
        Validation(images, 16)
    with pytest.raises(ValueError, match="validate_every must be"):
        Validation(images, 2, every=0)
    monkeypatch.setattr("fastroute.training.logs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log=tensorboard needs another package: run pip install \"\.\[tensorboard\]\""):
        TensorBoardLog(tmp_path)


def test_tensorboard(tmp_path, monkeypatch):
    """Scalars over the steps of all stages; after an interruption those of void steps are purged."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("fastroute.training.logs.find_spec", lambda name: True)
    log = TensorBoardLog(tmp_path)
    log.begin(7)
    log.write({"stage": "a", "step": 3, "steps": 8, "loss": 0.5, "validation_psnr": 30.0})
    log.end()
    assert calls == [(str(tmp_path), 8), ("loss", 0.5, 8), ("validation_psnr", 30.0, 8), "closed"]
