"""Micro-batches are measured once, remembered, and never trusted blindly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from networks import picture
from torch import nn

from fastroute import PatchRouter
from fastroute.models.fsrcnn import FSRCNN
from fastroute.routing import tuning
from fastroute.routing.tuning import Tuning, tune

EXAMPLE = torch.rand(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "of" / "fastroute"))
    monkeypatch.setattr(tuning, "_unwritten", {})
    return tmp_path / "of" / "fastroute" / "tuning.json"


class Clock:
    """A clock that only moves when a pass moves it."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Scripted(nn.Module):
    """A branch whose passes take as long as the script says: milliseconds per patch of the batch, format and pass."""

    def __init__(self, clock, script):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 2)
        self.clock, self.script = clock, script
        self.passes = []

    def forward(self, x):
        channels_last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
        self.passes.append((x.shape[0], channels_last))
        self.clock.now += 1e-3 * x.shape[0] * self.script(x.shape[0], channels_last, len(self.passes) - 1)
        return x


@pytest.fixture
def scripted(monkeypatch):
    """Makes branches of scripted times."""
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)
    return lambda script: Scripted(clock, script)


@pytest.fixture
def raced(monkeypatch):
    """Measurements made up: channels_last twice as fast, batches of 16 best."""
    calls = []

    def turn(branch, example, batch, channels_last):
        calls.append((batch, channels_last))
        return 1e-3 * (abs(batch - 16) + 100) * (1 if channels_last else 2)

    monkeypatch.setattr(tuning, "_turn", turn)
    monkeypatch.setattr(tuning, "PASS_SECONDS", 1e6)
    return calls


def per_patch(**milliseconds):
    """A script by batch; contiguous patches take twice as long."""
    return lambda batch, channels_last, _: milliseconds[f"b{batch}"] * (1 if channels_last else 2)


EVEN = per_patch(b8=1.0, b16=0.9, b32=0.8, b64=0.9)


def test_the_fastest_is_chosen_measured_once_and_remembered(cache, raced):
    best = tune(FSRCNN(3, 2), EXAMPLE)
    assert best == Tuning(16, True, 100)
    # Formats in turn, then batches in turn.
    formats, sizes = raced[: 2 * tuning.REPEATS], raced[2 * tuning.REPEATS :]
    assert formats == [(16, True), (16, False)] * tuning.REPEATS
    assert sizes == [(batch, True) for batch in tuning.BATCHES] * tuning.REPEATS
    assert list(json.loads(cache.read_text()).values()) == [{"batch": 16, "channels_last": True, "milliseconds": 100}]
    raced.clear()
    written = cache.read_bytes()
    assert tune(FSRCNN(3, 2), EXAMPLE) == best
    assert raced == [] and cache.read_bytes() == written


@pytest.mark.parametrize(
    ("milliseconds", "batch"),
    [
        ({"b8": 1.00, "b16": 0.90, "b32": 0.80, "b64": 0.90}, 32),
        # Less than 2 % is not worth the memory.
        ({"b8": 1.00, "b16": 0.99, "b32": 0.985, "b64": 0.982}, 8),
        ({"b8": 1.00, "b16": 0.90, "b32": 0.873, "b64": 0.864}, 32),
        # Small gains that add up, and a step back on the way, do not end the search.
        ({"b8": 1.00, "b16": 0.985, "b32": 0.97, "b64": 0.955}, 32),
        ({"b8": 1.00, "b16": 1.05, "b32": 0.80, "b64": 0.70}, 64),
    ],
)
def test_a_larger_batch_must_earn_its_memory(scripted, milliseconds, batch):
    assert tune(scripted(per_patch(**milliseconds)), EXAMPLE) == Tuning(batch, True, pytest.approx(milliseconds[f"b{batch}"]))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_faster_format_is_kept(scripted, channels_last):
    branch = scripted(lambda batch, last, _: EVEN(batch, last == channels_last, 0))
    assert tune(branch, EXAMPLE) == Tuning(32, channels_last, pytest.approx(0.8))


@pytest.mark.parametrize("start", range(0, 40, 3))
def test_a_disturbance_does_not_change_the_choice(scripted, cache, start):
    # Everything takes five times as long for longer than a round.
    branch = scripted(lambda batch, last, at: EVEN(batch, last, at) * (5 if start <= at < start + 6 else 1))
    assert tune(branch, EXAMPLE) == Tuning(32, True, pytest.approx(0.8))


def test_what_was_measured_on_a_busy_machine_is_not_written(scripted, cache, caplog):
    busy = scripted(lambda batch, last, at: EVEN(batch, last, at) * (1 if at % 3 == 0 else 3))
    with caplog.at_level("INFO", "fastroute"):
        found = tune(busy, EXAMPLE)
    assert not cache.exists() and "busy" in caplog.text
    # It holds in this process, so that all routers of it run alike; the next one measures again.
    passes = len(busy.passes)
    assert tune(busy, EXAMPLE) == found and len(busy.passes) == passes
    assert tune(busy, EXAMPLE, largest=4).batch == 4 and len(busy.passes) == passes
    tuning._unwritten.clear()
    busy.script = EVEN
    assert tune(busy, EXAMPLE) == Tuning(32, True, pytest.approx(0.8)) and len(busy.passes) > passes
    assert [entry["batch"] for entry in json.loads(cache.read_text()).values()] == [32]


def test_either_race_may_be_disturbed(scripted, cache):
    passes = scripted(EVEN)
    tune(passes, EXAMPLE)
    formats = max(i for i, (_, last) in enumerate(passes.passes) if not last) + 1
    cache.unlink()
    for first, last in ((0, formats), (formats, len(passes.passes))):

        def script(batch, channels_last, at, first=first, last=last):
            return EVEN(batch, channels_last, at) * (2 if first <= at < last and at % 3 else 1)

        tuning._unwritten.clear()
        tune(scripted(script), EXAMPLE)
        assert not cache.exists()


def test_a_first_pass_that_sets_up_is_no_disturbance(scripted, cache):
    seen = set()

    def script(batch, last, at):
        first = (batch, last) not in seen
        seen.add((batch, last))
        return EVEN(batch, last, at) * (50 if first else 1)

    assert tune(scripted(script), EXAMPLE) == Tuning(32, True, pytest.approx(0.8))
    assert cache.exists()


def test_turns_last_alike_and_the_race_is_bounded(scripted):
    # 0.05 ms per patch: 0.4 ms a pass of 8, of which a turn then has as many as make up its time.
    light = scripted(lambda *_: 0.05)
    tune(light, EXAMPLE)
    sizes = light.passes[-tuning.REPEATS * sum(-(-100 // batch) for batch in tuning.BATCHES) :]
    for batch in tuning.BATCHES:
        assert sum(size == batch for size, _ in sizes) == tuning.REPEATS * -(-100 // batch)
    # 20 ms per patch: the least rounds, and no pass of over a second.
    heavy = scripted(lambda *_: 20.0)
    tune(heavy, torch.rand(1, 3, 9, 9))
    assert [size for size, _ in heavy.passes] == [16, 16] * tuning.LEAST_ROUNDS + [8, 16, 32] * tuning.LEAST_ROUNDS


@pytest.mark.parametrize(("largest", "tried"), [(1, {1}), (5, {5}), (14, {8, 14}), (16, {8, 16}), (40, {8, 16, 32, 40})])
def test_no_batch_exceeds_the_largest(scripted, largest, tried):
    branch = scripted(lambda batch, *_: 1 / batch)
    assert tune(branch, EXAMPLE, largest).batch == largest
    assert {size for size, _ in branch.passes} == tried


def test_entries_of_another_way_of_measuring_are_not_believed(cache, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(tuning, "METHOD", tuning.METHOD - 1)
        old = tuning.tuning_key(FSRCNN(3, 2), EXAMPLE)
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({old: {"batch": 8, "channels_last": True, "milliseconds": 1.1}}))
    monkeypatch.setattr(tuning, "_turn", lambda branch, example, batch, channels_last: 1e-3 / batch)
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == tuning.BATCHES[-1]
    assert len(json.loads(cache.read_text())) == 2


def test_what_decides_the_speed_is_measured_apart(cache, raced):
    model, example = FSRCNN(3, 2), EXAMPLE
    threads = torch.get_num_threads()
    tune(model, example)
    for other, x in ((FSRCNN(4, 2), example), (FSRCNN(3, 3), example), (model, torch.rand(1, 3, 9, 9))):
        raced.clear()
        tune(other, x)
        assert raced
    raced.clear()
    tune(FSRCNN(3, 2).double(), example.double())
    assert raced
    try:
        torch.set_num_threads(threads + 1)
        raced.clear()
        tune(model, example)
        assert raced
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(cache.read_text())) == 6
    # The values of the weights decide nothing.
    raced.clear()
    tune(FSRCNN(3, 2), example)
    assert not raced


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
        b'{"KEY": {"batch": true, "channels_last": true, "milliseconds": 1}}',
        b'{"KEY": {"batch": 8, "channels_last": true, "milliseconds": NaN}}',
        b'{"KEY": {"batch": 8, "channels_last": true, "milliseconds": -5}}',
        b'{"KEY": {"batch": 8, "channels_last": true, "milliseconds": true}}',
        b'{"KEY": {"batch": [8], "channels_last": null, "milliseconds": {}}}',
    ],
)
def test_a_damaged_cache_is_ignored(cache, content, monkeypatch):
    # However busy the machine is.
    monkeypatch.setattr(tuning, "STEADY", math.inf)
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


def test_an_entry_of_the_cache_is_used(cache, raced):
    tune(FSRCNN(3, 2), EXAMPLE)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"batch": 5, "channels_last": False, "milliseconds": 1.5}}))
    assert tune(FSRCNN(3, 2), EXAMPLE) == Tuning(5, False, 1.5)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, raced):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "file" / "below"))
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == 16
    (tmp_path / "dir" / "tuning.json").mkdir(parents=True)
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "dir"))
    assert tune(FSRCNN(3, 2), EXAMPLE).batch == 16
    assert [path.name for path in (tmp_path / "dir").iterdir()] == ["tuning.json"]


def test_router_tunes_each_branch_once(cache, raced):
    router = PatchRouter([FSRCNN(3, 2), FSRCNN(5, 2)], None, 8, 8, 2)
    for _ in range(2):
        router.upscale(picture(1, 3, 16, 16), class_map=torch.tensor([[0, 1], [1, 1]]))
    assert len(raced) == 2 * tuning.REPEATS * (2 + len(tuning.BATCHES))
    assert len(json.loads(cache.read_text())) == 2


def test_tuning_leaves_the_random_state_alone(cache, raced):
    router = PatchRouter([FSRCNN(3, 2)], None, 8, 8, 2)
    image = picture(1, 3, 16, 16)
    state = torch.get_rng_state()
    router.upscale(image)
    assert torch.equal(torch.get_rng_state(), state)
