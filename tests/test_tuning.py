"""How branches run fastest is found on the work of calls, remembered, and never trusted blindly."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from typing import ClassVar

import pytest
import torch
from networks import picture
from torch import nn

import fastroute
from fastroute import PatchRouter
from fastroute.models.fsrcnn import FSRCNN
from fastroute.patch import branches
from fastroute.patch.branches import Branches, even_parts
from fastroute.runtime import tuning
from fastroute.runtime.tuning import Setting, search_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "of" / "fastroute"))
    monkeypatch.setattr(tuning, "_searches", {})
    # A patch of 8 x 8 is one unit of 64 pixels.
    monkeypatch.setattr(tuning, "PIXELS", (8 * 64, 4 * 64, 16 * 64, 32 * 64))
    monkeypatch.setattr(branches, "workers", lambda: 1)
    monkeypatch.setattr(tuning, "TRIAL_PIXELS", {"cpu": 32 * 64})
    return tmp_path / "of" / "fastroute" / "tuning.json"


class Clock:
    """A clock that only moves when a pass moves it."""

    now = 1000.0

    @classmethod
    def perf_counter(cls):
        return cls.now


class Scripted(nn.Module):
    """A branch whose passes take as long as the script says: seconds per patch, by batch, format and number of the pass."""

    passes: ClassVar[list] = []

    def __init__(self, script, scale=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 2)
        self.script, self.scale = [script], scale  # in a list, for copies to share

    def forward(self, x):
        if isinstance(x, torch._subclasses.FakeTensor):
            return x
        last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert last == (x.stride(1) == 1)
        self.passes.append((x.shape[0], last))
        Clock.now += x.shape[0] * self.script[0](x.shape[0], last, len(self.passes) - 1)
        return x * 1

    def __deepcopy__(self, memo):
        return Scripted(self.script[0], self.scale)

    def extra_repr(self):
        return "scripted"


@pytest.fixture
def run(monkeypatch):
    """Runs patches through a branch of scripted times; gives its networks and the passes of each call."""
    monkeypatch.setattr(tuning, "time", Clock)

    def make(script, **options):
        networks = Branches([Scripted(script)], 8, True, 3, **options)

        def call(count, side=8):
            Scripted.passes = []
            patches = torch.rand(count, 3, side, side)
            results = networks.run(0, patches)
            networks.remember()
            assert torch.equal(torch.cat(results), patches)
            return Scripted.passes

        return networks, call

    return make


def seconds(b4=1.0, b8=0.9, b16=0.8, b32=0.9, contiguous=2.0):
    """A script by batch; contiguous patches take longer."""
    by_batch = {4: b4, 8: b8, 16: b16, 32: b32}
    return lambda batch, last, _: by_batch.get(batch, 1.0) * (1 if last else contiguous)


def settle(call, networks, turns=40):
    for _ in range(turns):
        if networks._search(0, networks.device).best is not None:
            break
        call(40)
    return networks.setting(0, networks.device)


def best(networks):
    return networks._search(0, networks.device).best


def test_nothing_is_computed_twice_and_the_fastest_is_found_and_remembered(run, cache):
    networks, call = run(seconds())
    for _ in range(10):
        assert sum(batch for batch, _ in call(100)) == 100
    assert best(networks) == Setting(16 * 64, True)
    (entry,) = json.loads(cache.read_text()).values()
    assert (
        entry["best"] == {"pixels": 16 * 64, "channels_last": True, "parallel": False, "engine": "torch"}
        and entry["trials"] == []
    )
    assert entry["seconds"] == pytest.approx(0.8 / 64)
    # From then on, here and in the next process.
    written = cache.read_bytes()
    assert {batch for batch, _ in call(48)} == {16}
    tuning._searches.clear()
    networks, call = run(seconds())
    assert {batch for batch, _ in call(48)} == {16} and cache.read_bytes() == written


def test_a_call_too_small_to_tell_anything_measures_nothing(run, cache):
    networks, call = run(seconds())
    for _ in range(20):
        assert call(31) == [(8, True), (8, True), (8, True), (7, True)]
    assert not cache.exists() and best(networks) is None


def test_a_search_goes_on_in_the_next_process(run, cache):
    turns = Counter()
    for _ in range(60):
        tuning._searches.clear()
        networks, call = run(seconds())
        if best(networks) is not None:
            break
        first = call(32)[0]
        turns[first] += 1
    assert best(networks) == Setting(16 * 64, True)
    assert turns[8, False] == tuning.ROUNDS and sum(turns.values()) == tuning.ROUNDS * 5


@pytest.mark.parametrize(
    ("milliseconds", "batch"),
    [
        ({"b4": 1.00, "b8": 0.90, "b16": 0.80, "b32": 0.90}, 16),
        # Less than 2 % is not worth the memory.
        ({"b4": 0.99, "b8": 0.985, "b16": 0.98, "b32": 0.975}, 4),
        ({"b4": 1.00, "b8": 0.90, "b16": 0.873, "b32": 0.864}, 16),
        ({"b4": 1.00, "b8": 1.05, "b16": 0.80, "b32": 0.70}, 32),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_larger_batch_must_earn_its_memory_and_the_faster_format_is_kept(run, milliseconds, batch, last):
    script = seconds(**milliseconds, contiguous=2.0 if last else 0.5)
    networks, call = run(script)
    assert settle(call, networks) == Setting(batch * 64, last)


@pytest.mark.parametrize("start", range(0, 60, 7))
def test_a_disturbance_does_not_change_the_choice(run, start):
    even = seconds()
    networks, call = run(lambda batch, last, at: even(batch, last, at))
    passed = [0]

    def script(batch, last, at):
        passed[0] += 1
        return even(batch, last, at) * (5 if start <= passed[0] < start + 8 else 1)

    networks.modules[0].script[0] = script
    assert settle(call, networks) == Setting(16 * 64, True)


def test_what_was_measured_on_a_busy_machine_is_not_written(run, cache, caplog):
    even, passed = seconds(), Counter()

    def busy(batch, last, at):
        passed[batch, last] += 1
        return even(batch, last, at) * (1 if passed[batch, last] % 3 == 0 else 3)

    networks, call = run(busy)
    with caplog.at_level("INFO", "fastroute"):
        found = settle(call, networks)
    assert best(networks) == found and "busy" in caplog.text
    # The search has an end, and what it found holds in this process alone.
    assert sum(passed.values()) < 40 * tuning.MOST_ROUNDS * 5
    entries = json.loads(cache.read_text()) if cache.exists() else {}
    assert all(entry["best"] is None for entry in entries.values())
    tuning._searches.clear()
    assert best(run(busy)[0]) is None


@pytest.mark.parametrize("way", ["keyword", "environment", "batch"])
def test_it_can_be_switched_off(run, cache, monkeypatch, way, caplog):
    if way == "environment":
        monkeypatch.setenv("FASTROUTE_TUNE", "0")
    options = {"keyword": {"tune": False}, "environment": {}, "batch": {"batch": 8}}[way]
    networks, call = run(seconds(), **options)
    with caplog.at_level("INFO", "fastroute"):
        for _ in range(3):
            assert call(64) == [(8, True)] * 8
    assert not cache.exists() and not caplog.records
    # What was measured before is used all the same, but where the batch is told.
    if way != "batch":
        search_of(networks.modules[0], torch.empty(networks.size)).best = Setting(16 * 64, False)
        assert call(64) == [(16, False)] * 4


def test_it_is_announced_once(run, caplog):
    networks, call = run(seconds())
    with caplog.at_level("INFO", "fastroute"):
        call(31)
        assert not caplog.records
        settle(call, networks)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and told[0] == tuning.MEASURING % "Scripted" and "1024 pixels" in told[1]


def test_turns_of_several_shapes_are_not_mixed_and_the_best_serves_all(run):
    # Large regions take half the time per pixel: that says nothing about batches.
    even = seconds()
    networks, call = run(even)
    for _ in range(40):
        networks.modules[0].script[0] = lambda batch, last, at: 2 * even(4 * batch, last, at)
        call(20, side=16)
        networks.modules[0].script[0] = even
        call(40)
    assert best(networks) == Setting(16 * 64, True)
    assert {batch for batch, _ in call(8, side=16)} == {4} and {batch for batch, _ in call(3, side=40)} == {1}


@pytest.mark.parametrize(("most", "tried"), [(1, {1}), (5, {4, 5}), (14, {4, 8, 14}), (100, {4, 8, 16, 32})])
def test_no_batch_exceeds_what_memory_allows(run, monkeypatch, most, tried):
    networks, call = run(lambda batch, *_: 1 / batch)
    monkeypatch.setattr(networks, "largest", lambda *_: most)
    sizes = set()
    for _ in range(40):
        sizes |= {batch for batch, _ in call(64)}
    assert max(sizes) <= most and sizes >= {even_parts(32, size)[0] for size in tried}
    assert min(best(networks).batch((8, 8)), most) == max(tried)
    assert max(batch for batch, _ in call(200)) <= most


def test_one_turn_at_a_time(run):
    networks, _ = run(seconds())
    search = networks._search(0, networks.device)
    turn = search.trial((8, 8), 32)
    # Another thread works meanwhile, and measures nothing.
    found = []
    thread = threading.Thread(target=lambda: found.append(search.trial((8, 8), 32)))
    thread.start()
    thread.join()
    assert turn is not None and found == [None]
    search.add((8, 8), turn, None)  # it failed
    assert search.trial((8, 8), 32) == turn


def test_a_failure_in_a_turn_is_raised_and_forgotten(run):
    networks, call = run(seconds())
    networks.modules[0].script[0] = lambda *_: {}["out of order"]
    with pytest.raises(KeyError, match="out of order"):
        call(40)
    networks.modules[0].script[0] = seconds()
    assert settle(call, networks) == Setting(16 * 64, True)


def test_a_cache_that_cannot_be_written_is_no_error(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "file" / "below"))
    networks, call = run(seconds())
    assert settle(call, networks) == Setting(16 * 64, True)


class Counting(nn.Module):
    """A branch that counts the patches that it is given."""

    patches = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        Counting.patches += x.shape[0]
        return self.conv(x)


@pytest.mark.parametrize("make", [lambda: fastroute.tiled(Counting(), patch=32), lambda: PatchRouter([Counting()], scale=1)])
def test_a_first_call_does_what_the_second_does(make, monkeypatch):
    # An image of one tile: nothing is run to be measured, nor a fake patch to count its memory.
    router = make()
    call, counts = router if isinstance(router, nn.Module) else router.upscale, []
    for _ in range(3):
        Counting.patches = 0
        call(picture(1, 3, 20, 24))
        counts.append(Counting.patches)
    assert counts == [1, 1, 1]


def test_routers_can_be_copied_while_they_measure(run):
    networks, call = run(seconds())
    call(40)
    again = copy.deepcopy(networks)
    assert again._searches == {} and networks._searches
    assert again._search(0, networks.device) is networks._search(0, networks.device)


@pytest.mark.slow
def test_routers_measure_on_photographs_too(cache, monkeypatch):
    # Real times: whatever is chosen, the result stays.
    image = picture(1, 3, 120, 160)
    expected = PatchRouter([FSRCNN(3, 2).eval()], None, patch=8, stride=8, scale=2, tune=False).upscale(image)
    torch.manual_seed(0)
    router = PatchRouter([FSRCNN(3, 2).eval()], None, patch=8, stride=8, scale=2)
    router.branches[0].load_state_dict(PatchRouter([FSRCNN(3, 2)], None, patch=8, stride=8, scale=2).branches[0].state_dict())
    state = torch.get_rng_state()
    for _ in range(10):
        result = router.upscale(image)
        assert result.image.shape == expected.image.shape
    assert best(router.networks) is not None and torch.equal(torch.get_rng_state(), state)
    again = router.upscale(image).image
    torch.testing.assert_close(again, result.image, rtol=0, atol=1e-5)
