"""Micro-batches are measured once, remembered, and never trusted blindly."""

from __future__ import annotations

import json

import pytest
import torch
from networks import picture

from fastroute import PatchRouter
from fastroute.models.fsrcnn import FSRCNN
from fastroute.routing import tuning
from fastroute.routing.tuning import Tuning, cache_path, tune

EXAMPLE = torch.rand(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "of" / "fastroute"))
    monkeypatch.setattr(tuning, "REPEATS", 1)
    return tmp_path / "of" / "fastroute" / "tuning.json"


@pytest.fixture
def measured(monkeypatch):
    """Measurements made up: channels_last twice as fast, batches of 16 best."""
    calls = []

    def measure(branch, example, batch, channels_last):
        calls.append((batch, channels_last))
        return Tuning(batch, channels_last, (abs(batch - 16) + 100) * (1 if channels_last else 2))

    monkeypatch.setattr(tuning, "_measure", measure)
    return calls


def test_the_fastest_is_chosen_measured_once_and_remembered(cache, measured):
    best = tune(FSRCNN(3, 2), EXAMPLE)
    assert best == Tuning(16, True, 100)
    # 8 and 16 are tried, 32 is no better, and 64 is then not worth a look.
    assert [batch for batch, _ in measured] == [16, 16, *tuning.BATCHES[:3]]
    assert {channels_last for _, channels_last in measured} == {True, False}
    assert list(json.loads(cache.read_text()).values()) == [{"batch": 16, "channels_last": True, "milliseconds": 100}]
    measured.clear()
    written = cache.read_bytes()
    assert tune(FSRCNN(3, 2), EXAMPLE) == best
    assert measured == [] and cache.read_bytes() == written


def test_a_larger_batch_must_earn_its_memory(measured, monkeypatch):
    monkeypatch.setattr(tuning, "_measure", lambda branch, x, batch, cl: Tuning(batch, cl, 100 - batch / 64))
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == 16


def test_what_decides_the_speed_is_measured_apart(cache, measured):
    model, example = FSRCNN(3, 2), EXAMPLE
    threads = torch.get_num_threads()
    tune(model, example)
    for other, x in ((FSRCNN(4, 2), example), (FSRCNN(3, 3), example), (model, torch.rand(1, 3, 9, 9))):
        measured.clear()
        tune(other, x)
        assert measured
    measured.clear()
    tune(FSRCNN(3, 2).double(), example.double())
    assert measured
    try:
        torch.set_num_threads(threads + 1)
        measured.clear()
        tune(model, example)
        assert measured
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(cache.read_text())) == 6
    # The values of the weights decide nothing.
    measured.clear()
    tune(FSRCNN(3, 2), example)
    assert not measured


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"7",
        b'{"KEY": null}',
        b'{"KEY": {"batch": 8}}',
        b'{"KEY": {"batch": 8, "channels_last": true, "milliseconds": 1, "more": 1}}',
        b'{"KEY": {"batch": 0, "channels_last": true, "milliseconds": 1}}',
        b'{"KEY": {"batch": -8, "channels_last": true, "milliseconds": 1}}',
        b'{"KEY": {"batch": "8", "channels_last": true, "milliseconds": 1}}',
        b'{"KEY": {"batch": 8.5, "channels_last": true, "milliseconds": 1}}',
        b'{"KEY": {"batch": [8], "channels_last": null, "milliseconds": {}}}',
    ],
)
def test_a_damaged_cache_is_ignored(cache, content):
    branch = FSRCNN(3, 2).eval()
    router = PatchRouter([branch], None, 8, 8, 2)
    image = picture(1, 3, 16, 16)
    expected = router.upscale(image).image
    (key,) = json.loads(cache.read_text())
    cache.write_bytes(content.replace(b"KEY", key.encode()))
    again = PatchRouter([branch], None, 8, 8, 2).upscale(image)
    torch.testing.assert_close(again.image, expected, rtol=0, atol=1e-5)
    # Measured again, and the file is whole again.
    entry = json.loads(cache.read_text())[key]
    assert entry["batch"] in tuning.BATCHES and isinstance(entry["channels_last"], bool)


def test_an_entry_of_the_cache_is_used(cache, measured):
    tune(FSRCNN(3, 2), EXAMPLE)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"batch": 5, "channels_last": False, "milliseconds": 1.5}}))
    assert tune(FSRCNN(3, 2), EXAMPLE) == Tuning(5, False, 1.5)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "file" / "below"))
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == 16
    (tmp_path / "dir" / "tuning.json").mkdir(parents=True)
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "dir"))
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == 16
    assert [path.name for path in (tmp_path / "dir").iterdir()] == ["tuning.json"]


def test_where_the_cache_lies(monkeypatch, tmp_path, cache):
    assert cache_path() == cache
    monkeypatch.delenv("FASTROUTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "fastroute" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path() == tmp_path / ".cache" / "fastroute" / "tuning.json"


def test_router_tunes_each_branch_once(cache, measured):
    router = PatchRouter([FSRCNN(3, 2), FSRCNN(5, 2)], None, 8, 8, 2)
    for _ in range(2):
        router.upscale(picture(1, 3, 16, 16), class_map=torch.tensor([[0, 1], [1, 1]]))
    # Both formats, then batches up to the first that is no better.
    assert len(measured) == 2 * (2 + 3)
    assert len(json.loads(cache.read_text())) == 2


def test_tuning_leaves_the_random_state_alone(cache, measured):
    router = PatchRouter([FSRCNN(3, 2)], None, 8, 8, 2)
    image = picture(1, 3, 16, 16)
    state = torch.get_rng_state()
    router.upscale(image)
    assert torch.equal(torch.get_rng_state(), state)
