"""`fastroute.ray` without a cluster: an `Upscaler` is a class that takes and gives columns, and Ray's blocks hold them."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mixed_files import ramp, write_bad, write_kinds
from networks import as_image, picture, random_classsr

import fastroute
import fastroute.ray
from fastroute import PatchRouter, io
from fastroute.cli import main
from fastroute.files.pictures import upscale_picture
from fastroute.ray import Upscaler, runs
from fastroute.ray.runs import CountingUpscaler

pytestmark = pytest.mark.usefixtures("quick_tuning")


@pytest.fixture(scope="module")
def router() -> PatchRouter:
    system = random_classsr((3, 5), 2, 8)
    return PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2)


def column(values) -> np.ndarray:
    found = np.empty(len(values), object)
    for n, value in enumerate(values):
        found[n] = value
    return found


def through_blocks(columns):
    """The columns as Ray gives them back, from a block of each row."""
    block = pytest.importorskip("ray.data.block", reason='Ray is missing: pip install ".[ray]"')
    count = len(next(iter(columns.values())))
    accessor = block.BlockAccessor
    each = [accessor.batch_to_block({name: values[n : n + 1] for name, values in columns.items()}) for n in range(count)]
    return [row for one in each for row in accessor.for_block(one).iter_rows(public_row_format=True)]


@pytest.mark.slow
def test_files_of_every_kind_and_damaged_ones(router, tmp_path):
    sources = [*write_kinds(tmp_path).values(), *(tmp_path / name for name in write_bad(tmp_path)), tmp_path / "missing.png"]
    targets = [tmp_path / "out" / f"{path.name}.tif" for path in sources]
    rows = {
        "path": np.array([str(path) for path in sources]),
        "target": np.array([str(path) for path in targets]),
        "label": np.arange(len(sources)),
    }
    found = Upscaler(router, budget=0.95)(rows)
    assert list(found) == ["path", "target", "label", "error", "notes", "stats"]
    for row, source, target in zip(through_blocks(found), sources, targets, strict=True):
        assert sources[row["label"]] == source and row["path"] == str(source)
        if source.name.startswith("bad") or source.name == "missing.png":
            assert row["error"].startswith(f"cannot read {source}: ") and not target.exists()
            assert fastroute.ray.stats_of(row) is None
            continue
        assert row["error"] == ""
        opened = io.read_picture(source)
        expected, upscaled = upscale_picture(router, opened, budget=0.95)
        written = io.read_picture(target)
        assert torch.equal(written.color, expected.color)
        assert (written.alpha is None) == (expected.alpha is None)
        assert row["notes"].splitlines() == [*opened.origin.notes, *io.not_kept(target, expected)]
        stats = fastroute.ray.stats_of(row)
        assert stats.counts_per_class == upscaled.stats.counts_per_class
        assert (stats.flops, stats.paper_flops) == (upscaled.stats.flops, upscaled.stats.paper_flops)
        assert stats.seconds.keys() == upscaled.stats.seconds.keys()
        assert stats.work_per_class == upscaled.stats.work_per_class


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rgb.png", "rgba16.png", "gray.jpg", "planar16.tif", "rgb.webp"])
def test_content_of_files(router, tmp_path, kind):
    path = write_kinds(tmp_path)[kind]
    rows = {"bytes": column([path.read_bytes(), path.read_bytes()[:40]]), "path": column(["s3://a/b", "s3://a/c"])}
    found = Upscaler(router, images=True)(rows)
    assert "bytes" not in found and "target" not in found
    expected = upscale_picture(router, io.read_picture(path))[0]
    planes = expected.color if expected.kind != "gray" else expected.color[:1]
    planes = planes if expected.alpha is None else torch.cat([planes, expected.alpha[None]])
    first, second = through_blocks(found)
    assert np.array_equal(first["image"], planes.permute(1, 2, 0).numpy())
    assert second["error"].startswith("cannot read s3://a/c: ") and len(second["image"]) == 0


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays(router, tmp_path, channels, dtype):
    peak = np.iinfo(dtype).max
    pixels = ramp(9, 13, max(channels, 1), peak)
    pixels = pixels[:, :, 0] if channels == 0 else pixels
    pixels.setflags(write=False)
    rows = {"image": column([pixels]), "target": column([str(tmp_path / "out.png")])}
    found = Upscaler(router, images=True)(rows)
    (row,) = through_blocks(found)
    assert row["error"] == "" and row["image"].shape == (18, 26, max(channels, 1)) and row["image"].dtype == dtype
    written = io.read_picture(tmp_path / "out.png")
    assert written.kind == ("gray" if channels < 3 else "rgb") and (written.alpha is not None) == (channels in (2, 4))
    assert np.array_equal(written.color[0].numpy(), row["image"][:, :, 0])
    dropped = Upscaler(router, images=True, drop_alpha=True)(rows)["image"][0]
    assert dropped.shape[2] == (1 if channels < 3 else 3)


def test_several_kinds_of_pixels_in_one_block(router):
    images = [as_image(picture(1, 3, size, 2 * size), torch.uint8)[0].permute(1, 2, 0).numpy() for size in (8, 9, 10)]
    block = pytest.importorskip("ray.data.block", reason='Ray is missing: pip install ".[ray]"')
    made = block.BlockAccessor.batch_to_block(Upscaler(router, images=True)({"image": column(images)}))
    back = block.BlockAccessor.for_block(made).to_batch_format("numpy")
    assert [image.shape for image in back["image"]] == [(2 * size, 4 * size, 3) for size in (8, 9, 10)]


def test_models_that_are_functions_and_names(router, tmp_path):
    io.write_image(tmp_path / "in.png", torch.from_numpy(ramp(8, 8).transpose(2, 0, 1)))
    rows = {"path": column([str(tmp_path / "in.png")]), "class_map": column([str(tmp_path / "map.png")])}
    rows["target"] = column([str(tmp_path / "out.jpg")])
    assert Upscaler(lambda: router, quality=50)(rows)["error"][0] == ""
    assert (tmp_path / "map.png").exists()
    small = (tmp_path / "out.jpg").stat().st_size
    Upscaler(router, quality=100)(rows)
    assert (tmp_path / "out.jpg").stat().st_size > small
    named = Upscaler("pcsr-fsrcnn-x4", loading={"scale": 3}, images=True)({"path": rows["path"]})
    assert named["image"][0].shape == (24, 24, 3)


def test_columns_that_are_missing(router):
    upscaler = Upscaler(router)
    with pytest.raises(ValueError, match=r"must have a column image, bytes or path; got label"):
        upscaler({"label": np.arange(2)})
    with pytest.raises(ValueError, match=r"must have a column target, the file of the result, or give images=True; got path"):
        upscaler({"path": np.array(["a.png"])})
    with pytest.raises(ValueError, match="quality must lie in"):
        Upscaler(router, quality=0)


@pytest.mark.slow
def test_one_image_at_a_time_is_computed(router, tmp_path, monkeypatch):
    """While others are read and written."""
    busy, most = Counter(), Counter()
    lock = threading.Lock()

    def counted(name, function):
        def call(*args, **kwargs):
            with lock:
                busy[name] += 1
                most[name] = max(most[name], busy[name])
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    busy[name] -= 1

        return call

    monkeypatch.setattr("fastroute.ray.upscaler.upscale_picture", counted("compute", upscale_picture))
    upscaler = Upscaler(router, in_hand=3, images=True)
    monkeypatch.setattr(upscaler, "_upscale", counted("hand", upscaler._upscale))
    images = {"image": column([ramp(20 + n, 20) for n in range(12)])}
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(upscaler, [images, images]))
    assert [image.shape for image in found[0]["image"]] == [(2 * (20 + n), 40, 3) for n in range(12)]
    assert most["compute"] == 1 and most["hand"] > 1


class Local:
    """The counter of a run, in this process."""

    def __init__(self) -> None:
        begun = runs.Begun()
        self.count, self.begin, self.end = (SimpleNamespace(remote=getattr(begun, name)) for name in ("count", "begin", "end"))


@pytest.mark.slow
def test_an_image_whose_worker_died_is_alone_and_given_up_at_last(router, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    begun = Local()
    for _ in range(2):
        begun.begin.remote(1)
    for _ in range(3):
        begun.begin.remote(2)
    running: list[int] = []
    beside: dict[int, int] = {}

    def written(router, job, *rest, **saving):
        number = int(job.target.stem)
        running.append(number)
        # Long enough for another to begin, if it may.
        for step in range(100):
            threading.Event().wait(0.02)
            beside[number] = max(beside.get(number, 0), len(running) - 1)
            if beside[number] or (number == 1 and step == 4):
                break
        running.remove(number)

    monkeypatch.setattr("fastroute.ray.upscaler.write_job", written)
    rows = {
        "number": np.arange(12),
        "image": column([ramp(8, 8)] * 12),
        "target": column([str(tmp_path / f"{n}.png") for n in range(12)]),
        "path": column([f"{n}.png" for n in range(12)]),
    }
    found = CountingUpscaler(router, begun=begun, in_hand=4)(rows)
    assert [n for n in range(12) if found["error"][n]] == [2]
    assert found["error"][2] == "cannot upscale 2.png: its worker died 3 times, perhaps for want of memory"
    assert beside[1] == 0 and max(beside.values()) > 0 and 2 not in beside
    assert [begun.count.remote(n) for n in range(4)] == [0, 0, 3, 0]


def test_paths_hold_for_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").touch()
    (tmp_path / "classsr-fsrcnn-x4").mkdir()
    models = ["model.pth", "classsr-fsrcnn-x4", "package.module:function", None]
    assert [runs.found_anywhere(model) for model in models] == [f"{tmp_path}/model.pth", *models[1:]]


def test_room_for_workers():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    cluster = SimpleNamespace(nodes=lambda: nodes)
    assert [runs._room(cluster, cpus, gpus) for cpus, gpus in ((1, 0), (2, 0), (1, 1), (1, 0.5), (0, 0.25), (8, 0))] == [
        6, 2, 1, 2, 4, 0,
    ]  # fmt: skip


@pytest.mark.slow
def test_without_ray(router, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    io.write_image(tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ImportError, match=r'a cluster needs Ray, .*: run pip install "\.\[ray\]" in a copy of the source'):
        next(fastroute.ray.run_jobs([], router))
    with pytest.raises(ImportError, match="needs Ray"), fastroute.ray.connected():
        pass
    result = CliRunner().invoke(main, ["upscale", str(tmp_path), f"{tmp_path / 'out'}/", "--ray"])
    assert result.exit_code == 1 and 'pip install ".[ray]"' in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray", "IN", "OUT/"], "got IN. Write --ray behind IN and OUT"),
        (["IN", "OUT/", "--ray", "somewhere"], "ADDRESS must be HOST:PORT, auto or local; got somewhere"),
        (["IN", "OUT/", "--ray", "--shared-budget", "--budget", "0.7"], "--shared-budget needs all inputs in one process"),
        (["IN", "OUT/", "--ray", "--device", "cuda:1"], "Ray gives every worker a GPU of its own; give --device cuda"),
        (["IN/a.png", "OUT.png", "--ray"], "--ray is for an OUT that is a folder"),
    ],
)
def test_what_is_refused(tmp_path, options, words):
    (tmp_path / "IN").mkdir()
    io.write_image(tmp_path / "IN" / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    given = [
        str(tmp_path) + "/" + option if option.startswith(("IN/", "OUT")) or option == "IN" else option for option in options
    ]
    result = CliRunner().invoke(main, ["upscale", *given])
    assert result.exit_code == 2 and words in " ".join(result.output.split()).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "OUT").exists()
