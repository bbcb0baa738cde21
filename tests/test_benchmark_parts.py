"""What the benchmarks measure and compare with: timing, baselines, images, fits, and the comparison of two commits."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import compare, images, measure, setting
from benchmarks.baselines import classsr_published, engines, mlp_layouts, packages, paper_tables
from benchmarks.device_tables import sentence
from benchmarks.e2e import class_mixes, growth, headline
from benchmarks.measure import Timing, alternate, summary
from benchmarks.ops import pixel_mlp, stitch_patches_upsampled
from benchmarks.setting import COMPILE_SECONDS, Setting
from fastroute import TileGrid
from fastroute.models.classsr import ClassSR


def test_summary():
    assert summary([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 2.0, 4.0, 5)


def test_alternate_takes_turns():
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert all(taken.runs == 3 and taken.low <= taken.median <= taken.high for taken in times.values())


def test_a_slow_variant_sits_out(monkeypatch: pytest.MonkeyPatch):
    variants = {"slow": lambda: time.sleep(0.02), "quick": lambda: None}
    times = alternate(variants, rounds=9, warm_up=0, limit=0.04)
    assert (times["slow"].runs, times["quick"].runs) == (measure.MIN_ROUNDS, 9)
    monkeypatch.setattr(measure, "LONG_SECONDS", 0.01)
    assert alternate(variants, rounds=9, warm_up=0, limit=0.04)["slow"].runs == measure.FEW_ROUNDS


def test_a_slow_peer_runs_once():
    variants = {name: lambda: time.sleep(0.02) for name in ("ours", "slow")} | {"quick": lambda: None}
    times = alternate(variants, rounds=4, warm_up=0, slow=0.01, kept=("ours",))
    assert {name: taken.runs for name, taken in times.items()} == {"ours": 4, "slow": 1, "quick": 4}


def test_a_first_run_tells_all():
    begun = measure.first(lambda: (time.sleep(0.02), 5)[1])
    assert begun.result == 5 and begun.seconds >= 0.02


def test_what_comes_before_a_run_is_not_timed():
    calls: list[str] = []

    def before() -> None:
        calls.append("before")
        time.sleep(0.02)

    times = alternate({"a": lambda: calls.append("a")}, rounds=3, warm_up=0, before=before)
    assert calls == ["before", "a"] * 3
    assert times["a"].high < 0.02


def test_peak_memory_sees_what_is_freed_again():
    def run() -> torch.Tensor:
        torch.ones(16 << 20).sum()
        return torch.ones(4 << 20)

    held = measure.peak_memory(lambda: None)
    if held is None:
        pytest.skip("this system does not tell the high-water mark of a process")
    most = measure.peak_memory(run)
    # Pages are counted with some slack.
    assert 60 << 20 <= most < 88 << 20, f"{most / 2**20:.0f} MB for tensors of 64 and 16 MB, one after the other"


def test_packages_that_are_missing_say_so(monkeypatch: pytest.MonkeyPatch):
    for name in ("kornia", "monai", "tiler"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("kornia.contrib", "monai.inferers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    grid = TileGrid(40, 40, 16, 12)
    ways = {**packages.extractors(grid), **packages.mergers(grid), "window": packages.sliding_window(nn.Identity(), grid, 2)}
    assert all(isinstance(reason, str) and '".[benchmark]"' in reason for reason in ways.values())


def test_a_package_for_newer_pythons_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.sys, "version_info", (3, 10, 4))
    assert packages.find("kornia.contrib") == "needs Python 3.11 or newer, this is 3.10"
    assert packages.find("tiler") == packages.HINT


def test_padding_fills_whole_strides():
    grid = TileGrid(41, 30, 16, 12)
    image = torch.rand(1, 3, 41, 30)
    padded = packages.pad_image(image, grid)
    assert padded.shape[2:] == packages.padded_size(grid) == (52, 40)
    assert torch.equal(padded[:, :, :41, :30], image)
    assert torch.equal(padded[:, :, 51, :30], image[:, :, 40])


@torch.inference_mode()
def test_plain_ways_agree_at_given_classes():
    torch.manual_seed(0)
    model = ClassSR.fsrcnn((4, 6, 8)).eval()
    calls: list[int] = []
    model.classifier.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    grid = TileGrid(30, 41, 16, 12, 4)
    image = torch.rand(1, 3, 30, 41)
    ids = [number % 3 for number in range(grid.num_patches)]
    looped = classsr_published.loop_over_patches(model, image, grid, ids)
    batched = classsr_published.batch_per_class(model, image, grid, torch.tensor(ids), batch=4)
    assert sum(calls) == 2 * grid.num_patches, "the classifier's time belongs to routing"
    torch.testing.assert_close(looped, batched)
    most_expensive = [2] * grid.num_patches
    expected = classsr_published.loop_over_patches(model, image, grid, most_expensive)
    torch.testing.assert_close(classsr_published.tiled(model.branches[2], image, grid, 5), expected)
    assert (looped - expected).abs().max() > 1e-3


def test_mixes_have_the_printed_flops():
    for backbone, flops in paper_tables.BRANCH_FLOPS.items():
        for row in paper_tables.CLASSSR[backbone]:
            shares = paper_tables.mix_of(row.flops, flops)
            assert sum(shares) == pytest.approx(1) and min(shares) > 0
            assert sum(s * f for s, f in zip(shares, flops, strict=True)) == pytest.approx(row.flops, rel=1e-6)
    assert paper_tables.mix_of(2.0, (1.0, 2.0, 3.0)) == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="mean must lie between"):
        paper_tables.mix_of(3.0, (1.0, 2.0, 3.0))


def test_printed_figures_are_those_of_the_papers():
    folder = os.environ.get("FASTROUTE_DATA")
    if not folder:
        pytest.skip("FASTROUTE_DATA is not set")
    printed = json.loads((Path(folder) / "fixtures" / "paper-tables.json").read_text())
    for backbone, flops in paper_tables.BRANCH_FLOPS.items():
        assert list(flops) == printed["branch_flops"][backbone]["flops"]
        table = printed["cdnsr_report_table_1"][backbone]
        for name, row in zip(paper_tables.TEST_SETS, paper_tables.CLASSSR[backbone], strict=True):
            assert (row.flops, row.seconds) == (table["classsr"][name][2], table["classsr"][name][4])
            assert row.dense_seconds == table["original"][name][4]


def test_class_ids_have_their_shares():
    ids = class_mixes.class_ids([0.5, 0.2, 0.3], 100)
    assert [ids.count(k) for k in range(3)] == [50, 20, 30]
    assert ids != sorted(ids)
    assert set(class_mixes.class_ids([0.0, 0.0, 1.0], 7)) == {2}


@torch.inference_mode()
@pytest.mark.parametrize("which", ["mixed", "expensive"])
def test_layouts_of_mlps_agree(which: str):
    torch.manual_seed(0)
    mlps = [pixel_mlp.make_layers(8, hidden, 3) for hidden in ([6, 5], [10, 9, 7])][which == "expensive" :]
    features, residual = torch.randn(1, 8, 5, 6), torch.rand(1, 3, 5, 6)
    size = (20, 24)
    class_map = (torch.rand(1, *size) < 0.4).to(torch.uint8) if which == "mixed" else None
    expected = pixel_mlp.plain(features, mlps, size, class_map, residual)
    torch.testing.assert_close(
        mlp_layouts.by_columns(features, mlps, size, class_map, residual), expected, rtol=1e-4, atol=1e-5
    )
    if class_map is not None:
        run = mlp_layouts.grouped(mlps)
        if isinstance(run, str):
            pytest.skip(run)
        torch.testing.assert_close(run(features, size, class_map, residual), expected, rtol=1e-4, atol=1e-5)


def test_multiply_adds_of_a_pixel():
    layers = pixel_mlp.make_layers(8, [5], 3)
    # Per feature 5 · 8; per pixel 2 · 5 of the coordinates and 3 · 5 of the last layer.
    assert pixel_mlp.multiply_adds(layers, 8, features=10, pixels=160) == 10 * 40 + 160 * 25


def test_flops_of_last_layers():
    """A product for every pixel that a tap leads to within the patch, and none for what sticks out."""
    plain, _, _ = stitch_patches_upsampled.last_layers()
    expand, ones = plain[0], nn.ConvTranspose2d(1, 1, 9, 4, 3, output_padding=1, bias=False)
    nn.init.ones_(ones.weight)
    size = stitch_patches_upsampled.PATCH
    taps = int(ones(torch.ones(1, 1, size, size)).sum())
    products = expand.weight.numel() * size**2 + expand.out_channels * 3 * taps
    assert stitch_patches_upsampled.needed_flops(plain) == 2 * products


def test_last_layers_agree():
    torch.manual_seed(0)
    plain, subpixel, upsampler = stitch_patches_upsampled.last_layers()
    features = stitch_patches_upsampled.some_features(2, upsampler.features)
    shuffled = nn.functional.pixel_shuffle(subpixel(features), upsampler.shuffle)
    torch.testing.assert_close(shuffled, plain(features), rtol=0, atol=1e-5)


def test_photographs_without_a_data_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FASTROUTE_DATA", raising=False)
    (path,) = images.photographs("test4k")
    assert path == images.SAMPLE and "sample" in images.source("test4k")
    lr = images.low_resolution(path, (500, 700))
    assert lr.shape == (1, 3, 500, 700) and lr.dtype == torch.uint8


def test_tiles_are_mirrored():
    image = torch.arange(6).view(1, 2, 3)
    assert images.tiled(image, 3, 7).tolist() == [[[0, 1, 2, 2, 1, 0, 0], [3, 4, 5, 5, 4, 3, 3], [3, 4, 5, 5, 4, 3, 3]]]


def test_fits_find_slopes():
    points = {0.5: 1.0, 2.0: 4.0, 8.0: 16.0}
    rows = [
        {"kind": "megapixels", "x": x, "times": {"a": Timing(y, y, y, 3)}, "peak_bytes": {"a": 3e6 * x + 5e6}}
        for x, y in points.items()
    ]
    for row in rows:
        row["result_bytes"] = 3e6 * row["x"]
    (fit,) = growth.fits(rows, "megapixel")
    assert fit["exponent"] == pytest.approx(1) and fit["seconds_per_unit"] == pytest.approx(2) and fit["r2"] == pytest.approx(1)
    assert fit["extra_bytes_per_unit"] == pytest.approx(0) and fit["extra_bytes"] == [5e6, 5e6]
    assert "power 1.00" in sentence(fit) and "5 to 5 MB" in sentence(fit)


def test_a_difference_within_the_noise_is_none():
    base = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0]
    assert not compare.judge(base, base[1:] + base[:1]).regressed
    assert not compare.judge([1.0] * 5, [1.02] * 5).regressed
    slower = compare.judge([1.0] * 5, [1.1] * 5)
    assert slower.regressed and slower.ratio == pytest.approx(1.1) and slower.noise == compare.LEAST
    # The same median, but the pairs differ too much to tell.
    assert not compare.judge([1.0] * 5, [0.7, 1.1, 1.6, 0.8, 1.3]).regressed


def run_compare(monkeypatch: pytest.MonkeyPatch, head: dict) -> tuple[object, list[Path]]:
    """The message with which a comparison ends, and the trees that it ran."""
    base = {"a": 1.0, "b": 1.0}
    ran: list[Path] = []

    def run_once(tree: Path, smoke: bool) -> dict:
        ran.append(tree)
        return {"backend": "cpu", "cases": head if tree == compare.ROOT else base}

    monkeypatch.setattr(compare, "tree_of", lambda reference: Path(reference))
    monkeypatch.setattr(compare, "run_once", run_once)
    monkeypatch.setattr(sys, "argv", ["compare", "old", "--rounds", "3", "--smoke"])
    try:
        compare.main()
    except SystemExit as end:
        return end.code, ran
    return None, ran


def test_a_regression_fails_after_a_second_look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    ended, ran = run_compare(monkeypatch, {"a": 1.5, "b": 1.0, "new": 1.0})
    assert ended == "slower beyond the noise: a"
    # A look at the backends, then twice three pairs in turn.
    assert len(ran) == 2 + 2 * 6 and ran[2:5] == [Path("old"), compare.ROOT, compare.ROOT]
    assert "new" in capsys.readouterr().out


def test_no_regression_ends_well(monkeypatch: pytest.MonkeyPatch):
    ended, ran = run_compare(monkeypatch, {"a": 0.5, "b": 1.0})
    assert ended is None and len(ran) == 2 + 6


def test_versions_on_different_backends_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "run_once", lambda tree, smoke: {"backend": str(tree), "cases": {}})
    with pytest.raises(SystemExit, match="build both alike"):
        compare.check_backends((Path("one"), Path("two")))


def test_an_unknown_commit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "WORK", tmp_path)
    with pytest.raises(SystemExit, match="git rev-parse"):
        compare.tree_of("no-such-commit")
    assert not list(tmp_path.iterdir())


def test_a_compiled_network_may_be_missing():
    reason = classsr_published.compiled_network(nn.Identity(), torch.rand(1, 3, 4, 4), Setting(smoke=True))
    assert "smoke" in str(reason)


def test_limits_of_compilation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setting, "set_up_compiler", lambda: None)
    assert "smoke" in str(Setting(smoke=True).compile_reason())
    assert Setting().compile_reason() is None
    used = Setting(compiled_seconds=COMPILE_SECONDS + 1)
    assert "--full" in str(used.compile_reason())
    assert Setting(full=True, compiled_seconds=COMPILE_SECONDS + 1).compile_reason() is None
    assert Setting(compiled_enough="enough").compile_reason() == "enough"
    assert Setting(full=True, compiled_enough="enough").compile_reason() is None
    with used.compiling():
        time.sleep(0.01)
    assert used.compiled_seconds > COMPILE_SECONDS + 1.01
    Setting().save("nothing", [], "no folder, nothing written")


def test_classes_by_the_edge_score_cluster():
    # Noise in one half, whose lower part is weaker; a flat one beside it.
    pixels = torch.full((1, 3, 60, 120), 0.5)
    noise = torch.rand(1, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :, 60:] = 0.5 + (noise - 0.5) * torch.linspace(1, 0.2, 60)[:, None]
    grid = TileGrid(60, 120, 12, 12, scale=4)
    ids = headline.edge_classes(pixels, grid, [0.5, 0.2, 0.3]).argmax(dim=1)
    assert ids.bincount().tolist() == [25, 10, 15]
    assert ids.view(5, 10)[:, 6:].min() >= 1 and ids.view(5, 10)[:, :4].max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_dense_engines_agree(precision: torch.dtype):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(), nn.Conv2d(8, 48, 3, padding=1), nn.PixelShuffle(4)
    ).eval()
    image = torch.rand(1, 3, 20, 24)
    with torch.inference_mode():
        expected = network(image)
        found = dict(engines.Engines(network, image).ways(precision, Setting(smoke=True)))
        assert "too long" in str(found.pop("torch.compile"))
        told = {name: run for name, run in found.items() if isinstance(run, str)}
        for run in (run for run in found.values() if not isinstance(run, str)):
            engines.check(run(), expected, precision)
    assert "eager, channels_last" not in told
    assert all("not installed" in reason or "bfloat16" in reason for reason in told.values())
    with pytest.raises(AssertionError, match="disagrees"):
        engines.check(expected + 0.1 * expected.abs().max(), expected, precision)
    with pytest.raises(AssertionError, match="disagrees"):
        engines.check(expected * float("nan"), expected, precision)
