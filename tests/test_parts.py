"""The folder in which shards collect the parts of a result: whose it is, who may work in it, and what damage is told."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import as_image, picture, random_classsr

from fastroute import PatchRouter, io
from fastroute.files.image_shards import LargeImage, digest_of, upscale_share
from fastroute.files.joining import join
from fastroute.files.parts import Parts
from fastroute.files.shards import Shard

zarr = pytest.importorskip("zarr", minversion="3")
pytestmark = pytest.mark.usefixtures("quick_tuning")


@pytest.fixture(scope="module")
def router():
    system = random_classsr((3, 5), 2, 8)
    return PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2, tune=False)


@pytest.fixture
def source(tmp_path):
    io.write_image(tmp_path / "in.png", as_image(picture(1, 3, 30, 41, seed=1), torch.uint8)[0])
    return tmp_path / "in.png"


@pytest.fixture
def large(source, tmp_path, router):
    """An image all of whose bands are done, but not joined."""
    image = LargeImage(source, tmp_path / "out.zarr")
    upscale_share(image, router, Shard(1, 1))
    return image


HOLD = """
import sys
from fastroute.files.parts import Parts
with Parts(sys.argv[1]).claimed(0, 1, "bands"):
    print(1, flush=True)
    input()
"""


def test_a_folder_of_that_name_which_is_none_of_ours_stays(tmp_path):
    for name in ("data", "photo.png"):
        mine = tmp_path / f"{name}.parts"
        mine.mkdir()
        (mine / "thesis.txt").write_text("precious")
        (tmp_path / name).touch()
        assert not join(tmp_path / name)
        assert (mine / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_while_a_process_works_nobody_joins_or_forgets(large, router):
    with subprocess.Popen([sys.executable, "-c", HOLD, large.target], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="another process is working on bands 0 to"):
            join(large.target)
        with pytest.raises(ValueError, match="another process is working on bands 0 to 0"):
            upscale_share(large, router, Shard(1, 1))
        assert Parts(large.target).done() == {0}
        other.send_signal(signal.SIGKILL)
    assert join(large.target)


@pytest.mark.slow
def test_a_folder_that_the_user_made_since_is_not_replaced(large):
    large.target.mkdir()
    (large.target / "notes.txt").write_text("precious")
    with pytest.raises(io.ImageError, match="it is a folder that holds something else than an array"):
        join(large.target)
    assert (large.target / "notes.txt").read_text() == "precious" and Parts(large.target).done() == {0}


@pytest.mark.parametrize("content", ["", "[]", "null", None])
def test_damaged_facts_are_told(large, router, content):
    facts = Parts(large.target).path("facts.json")
    facts.unlink()
    if content is not None:
        facts.write_text(content)
    with pytest.raises(ValueError, match=r"out\.zarr\.parts is damaged or something else \(facts\.json.*\); remove it"):
        upscale_share(large, router, Shard(1, 1), resume=True)
    with pytest.raises(ValueError, match=r"out\.zarr\.parts is damaged"):
        join(large.target)


def test_an_array_that_is_gone_is_told(large, router):
    parts = Parts(large.target)
    shutil.rmtree(parts.path("image"))
    with pytest.raises(ValueError, match="image is not there"):
        join(large.target)
    with pytest.raises(ValueError, match="image is not there"):
        upscale_share(large, router, Shard(1, 1))
    assert parts.done() == {0} and not large.target.exists()


def test_damaged_classes_and_shards_are_told(source, tmp_path, router):
    image = LargeImage(source, tmp_path / "out.tif")
    upscale_share(image, router, Shard(1, 1))
    parts = Parts(image.target)
    with open(parts.path("classes", "array.npy"), "r+b") as file:
        file.truncate(40)
    with pytest.raises(ValueError, match=r"damaged .*classes/array\.npy"):
        upscale_share(image, router, Shard(1, 1))
    parts.mark([0])
    (shard,) = (path for path in parts.path("image", "c").rglob("*") if path.is_file())
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(ValueError, match="are damaged"):
        join(image.target)
    assert not image.target.exists()


def test_another_source_of_the_same_length_is_refused(large, router, source):
    pixels = io.read_image(source)
    before = source.read_bytes()
    for seed in range(40):
        io.write_image(source, torch.from_numpy(np.random.default_rng(seed).permutation(pixels.numpy(), axis=1)))
        if len(source.read_bytes()) <= len(before):
            break
    content = source.read_bytes()
    source.write_bytes(content + b"\0" * (len(before) - len(content)))
    with pytest.raises(ValueError, match="it was begun with other settings"):
        upscale_share(large, router, Shard(1, 1), resume=True)


def test_a_digest_sees_all_of_a_small_file_and_samples_of_a_large_one(tmp_path):
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(bytes(1000))
    seen = {digest_of(small)}
    for at in (0, 500, 999):
        content = bytearray(1000)
        content[at] = 1
        small.write_bytes(content)
        seen.add(digest_of(small))
    assert len(seen) == 4 and digest_of(tmp_path) is None
    content = bytearray(20_000_000)
    seen = set()
    for at in (None, 0, 5, 19_999_999):
        if at is not None:
            content[at] ^= 1
        big.write_bytes(content)
        seen.add(digest_of(big))
    assert len(seen) == 4
