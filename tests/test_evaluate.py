"""`fastroute evaluate`: its metrics against their definitions, its rows against the routers, its command."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import picture, random_classsr, randomise
from torch import Tensor
from torch.nn import functional as F

import fastroute
from fastroute import PatchRouter, PixelRouter, io, quality
from fastroute.cli import main
from fastroute.degradation import make_pair
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.report import evaluation

pytest.importorskip("skimage")
pytestmark = pytest.mark.usefixtures("quick_tuning")
SCALE = 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for name, size, seed in (("b.png", (70, 81), 0), ("more/a.png", (64, 40), 1)):
        io.write_image(folder / name, (picture(1, 3, *size, seed=seed)[0] * 255).to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def system():
    return random_classsr((3, 5, 20), SCALE, 16)


@pytest.fixture
def router(system):
    return PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=SCALE, merge=1)


def noisy(x: Tensor, strength: float, seed: int = 0) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + strength * noise).round().clamp(0, 255).to(torch.uint8)


def written_out_ssim(x: Tensor, y: Tensor) -> float:  # [C, H, W]
    """SSIM of Wang et al., the mean over the places where the whole window lies within the image."""
    place = torch.arange(-5, 6, dtype=torch.float64)
    gauss = torch.exp(-(place**2) / (2 * 1.5**2))
    window = (gauss[:, None] * gauss / gauss.sum() ** 2)[None, None]

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z[:, None], window)

    x, y = x.double(), y.double()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean().item()


@pytest.mark.parametrize("border", [0, 3])
def test_metrics_by_their_definitions(border):
    target = (picture(1, 3, 47, 53)[0] * 255).to(torch.uint8)
    image = noisy(target, 12)
    found = quality.compare(image, target, border)
    a, b = (x[:, border : 47 - border, border : 53 - border].double() for x in (image, target))
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / (a - b).square().mean().item()))
    assert found["ssim"] == pytest.approx(written_out_ssim(a, b), abs=1e-9)
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)[:, None, None] / 255
    ya, yb = ((x * weights).sum(dim=0, keepdim=True) + 16 for x in (a, b))
    assert found["psnr_y"] == pytest.approx(10 * math.log10(255**2 / (ya - yb).square().mean().item()))
    assert found["ssim_y"] == pytest.approx(written_out_ssim(ya, yb), abs=1e-9)
    assert len({round(value, 6) for value in found.values()}) == 4


def test_luma_of_known_colours():
    colours = np.array([[0, 255, 255, 0, 0], [0, 255, 0, 255, 0], [0, 255, 0, 0, 255]])[:, None]
    # Black, white, red, green and blue of BT.601.
    assert quality.luma(colours)[0].tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_equal_images():
    target = (picture(1, 3, 20, 20)[0] * 255).to(torch.uint8)
    found = quality.compare(target, target, 2)
    assert found["psnr"] == found["psnr_y"] == math.inf
    assert found["ssim"] == pytest.approx(1) and found["ssim_y"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"compare: image must be \(3, 20, 20\) as target; got \(3, 20, 19\)"):
        quality.compare(target[:, :, 1:], target, 2)


@pytest.mark.slow
def test_rows_are_those_of_the_router(images, router):
    rows = evaluation.evaluate(router, images)
    assert [row.image for row in rows] == ["b.png", "more/a.png"]
    assert [(row.height, row.width) for row in rows] == [(70, 80), (64, 40)]
    for row in rows:
        lr, hr = make_pair(io.read_image(images / row.image), SCALE)
        result = router.upscale(lr)
        assert quality.compare(result.image, hr, SCALE)["psnr"] == row.psnr
        bicubic = torch.nn.functional.interpolate(lr[None] / 255, scale_factor=SCALE, mode="bicubic")[0]
        by_bicubic = (bicubic.clamp(0, 1) * 255).round().to(torch.uint8)
        assert quality.compare(by_bicubic, hr, SCALE)["psnr"] == pytest.approx(row.psnr_bicubic, abs=1e-3)
        assert row.counts == result.stats.counts_per_class
        assert (row.flops, row.flops_fraction) == (result.stats.flops.routed, result.stats.flops.fraction)
        assert (row.paper_flops, row.paper_fraction) == (result.stats.paper_flops.routed, result.stats.paper_flops.fraction)
        assert row.seconds > 0


@pytest.mark.slow
def test_budget_reaches_the_router(images, router):
    expensive, cheap = evaluation.evaluate(router, images, budget=1), evaluation.evaluate(router, images, budget=0.8)
    assert all(row.counts[:2] == [0, 0] for row in expensive)
    assert all(row.flops < other.flops and row.counts[2] < other.counts[2] for row, other in zip(cheap, expensive, strict=True))


def test_mean_by_hand():
    numbers = {"height": 1, "psnr_bicubic": 28.0, "ssim": 0.5, "psnr_y": 3.0, "ssim_y": 0.25}
    rows = [
        evaluation.Row("a", width=2, psnr=30, counts=[1, 2], flops=10, flops_fraction=0.5, paper_flops=4, paper_fraction=0.4,
                     seconds=1, **numbers),
        evaluation.Row("b", width=4, psnr=33, counts=[3, 6], flops=60, flops_fraction=0.75, paper_flops=10, paper_fraction=1,
                     seconds=2, **numbers),
    ]  # fmt: skip
    mean = evaluation.mean(rows)
    assert (mean.image, mean.width, mean.psnr, mean.counts, mean.flops, mean.seconds) == ("mean", 3, 31.5, [2, 4], 35, 1.5)
    # 70 of 20 + 80, and 14 of 10 + 10: of the sums, not of the fractions.
    assert mean.flops_fraction == pytest.approx(0.7) and mean.paper_fraction == pytest.approx(0.7)
    lines = evaluation.table(rows).splitlines()
    assert len(lines) == 4 and lines[-1].startswith("mean") and "31.500" in lines[-1] and lines[-1].endswith("2 / 4")


def test_pcsr_at_a_scale(images):
    model = randomise(PCSR.build(FSRCNN(4, upsample=False), [None, (4,)], ())).eval()
    rows = evaluation.evaluate(PixelRouter(model), images, scale=3, penalty=0.1)
    assert [(row.height, row.width) for row in rows] == [(69, 81), (63, 39)]
    assert [sum(row.counts) for row in rows] == [69 * 81, 63 * 39]
    assert evaluation.evaluate(PixelRouter(model), images)[0].height == 68  # times 4 by default


def test_refusals(images, router, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="evaluate: scale must be 2, that of the model; got 4"):
        evaluation.evaluate(router, images, scale=4)
    with pytest.raises(ValueError, match=r"evaluate: no image is left in .*; the patterns exclude \*\.png"):
        evaluation.evaluate(router, images, exclude=["*.png"])
    io.write_image(tmp_path / "small.png", torch.zeros(3, 15, 60, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels; .*small\.png has 60 x 15"):
        evaluation.evaluate(router, tmp_path)
    io.write_image(tmp_path / "small.png", torch.zeros(3, 16, 17, dtype=torch.uint8))
    assert len(evaluation.evaluate(router, tmp_path)) == 1
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ValueError, match=r'need scikit-image .*: run pip install "\.\[evaluate\]" in a copy of the source'):
        evaluation.evaluate(router, images)


@pytest.mark.slow
def test_what_cannot_be_used_is_told_beside_the_others(images, router, model, tmp_path):
    io.write_image(tmp_path / "good.png", torch.zeros(3, 40, 40, dtype=torch.uint8))
    io.write_image(tmp_path / "small.png", torch.zeros(3, 15, 60, dtype=torch.uint8))
    (tmp_path / "broken.png").write_bytes(b"no image")
    errors = []
    assert [row.image for row in evaluation.evaluate(router, tmp_path, errors=errors)] == ["good.png"]
    assert len(errors) == 2 and "broken.png" in errors[0] and "small.png has 60 x 15" in errors[1]
    result = call(model, "--images", tmp_path, "--quiet", "--json", tmp_path / "x.json")
    assert result.exit_code == 1 and "2 of 3 images are left out:" in result.output
    assert "good.png" in result.output and (tmp_path / "x.json").exists()
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match=r"no image can be used: .*broken\.png.*; .*small\.png"):
        evaluation.evaluate(router, tmp_path, errors=[])


def test_one_image(images, router):
    (row,) = evaluation.evaluate(router, images / "more" / "a.png")
    (other,) = evaluation.evaluate(router, images / "more")
    assert (row.image, row.psnr) == ("a.png", other.psnr)


@pytest.mark.slow
def test_first_call_is_not_timed(images, router, monkeypatch):
    calls, upscale = [], router.upscale

    def counted(image, **options):
        result = upscale(image, **options)
        calls.append(result.stats.seconds["total"] - result.stats.seconds["tune"])
        return result

    monkeypatch.setattr(router, "upscale", counted)
    rows = evaluation.evaluate(router, images)
    assert [row.seconds for row in rows] == calls[1:] and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(evaluation, "WARM_UP_BELOW", 0.0)
    assert [row.seconds for row in evaluation.evaluate(router, images)] == calls


@pytest.fixture(scope="module")
def model(system, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, system, {"scale": SCALE, "patch": 16, "stride": 12})
    return path


def call(*arguments: object):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.mark.slow
def test_command(images, model, tmp_path):
    target = tmp_path / "result.json"
    result = call(model, "--images", images, "--json", target, "--budget", 0.9, "--exclude", "a.*")
    assert result.exit_code == 0, result.output
    expected = evaluation.evaluate(fastroute.load(model), images, exclude=["a.*"], budget=0.9)
    written = json.loads(target.read_text())
    assert [row["image"] for row in written["images"]] == ["b.png"]
    assert written["images"][0]["psnr"] == written["mean"]["psnr"] == expected[0].psnr
    assert written["images"][0]["counts"] == expected[0].counts
    running = {"device": "cpu", "engine": "torch", "precision": "float32", "tune": True}
    assert written["options"] == {"budget": 0.9, "scale": None, **running} and written["model"] == str(model)
    assert {"torch", "device", "threads", "fastroute"} <= written.keys()
    lines = result.stdout.splitlines()
    assert any(line.startswith("b.png") and f"{expected[0].psnr:.3f}" in line for line in lines)
    assert any(line.startswith("mean") for line in lines) and lines[-1] == f"wrote {target}"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_command_refuses(images, model, tmp_path):
    for options, words in (
        (["--penalty", 1, "--budget", 0.9], ["give one of --budget and --penalty"]),
        (["--adaptive"], ["--adaptive", "this option is PCSR's"]),
        (["--no-refine"], ["--refine", "this option is PCSR's"]),
        (["--budget", 0.01], ["budget must lie in ["]),
        (["--scale", 3], ["--scale", "upscales by 2 alone"]),
        (["--json", tmp_path / "absent" / "x.json"], ["--json", "does not exist"]),
        (["--device", "nowhere"], ["--device"]),
    ):
        result = call(model, "--images", images, "--quiet", *options)
        assert result.exit_code != 0 and isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Error: " in result.output and all(word in result.output for word in words), result.output
    for arguments in (["absent", "--images", images], [model, "--images", tmp_path], [model]):
        result = call(*arguments)
        assert result.exit_code != 0 and "Error: " in result.output
    assert list(tmp_path.iterdir()) == []


def test_infinite_numbers_are_null(tmp_path):
    row = evaluation.Row("a", 1, 1, math.inf, 30, 1, math.inf, 1, [1], 1, 1, 1, 1, 1)
    evaluation.write_json(tmp_path / "x.json", [row])
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["images"][0]["psnr"] is None and content["mean"]["psnr_y"] is None and content["mean"]["ssim"] == 1


def test_a_link_to_nothing_is_told(router, tmp_path):
    io.write_image(tmp_path / "good.png", torch.zeros(3, 40, 60, dtype=torch.uint8))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    errors: list[str] = []
    assert len(evaluation.evaluate(router, tmp_path, errors=errors)) == 1
    assert len(errors) == 1 and "gone.png" in errors[0]
