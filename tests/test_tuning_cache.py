"""Which branches share what was measured, and what of the file that remembers it is believed."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from fastroute.models.fsrcnn import FSRCNN
from fastroute.runtime import tuning
from fastroute.runtime.tuning import Setting, search_of

EXAMPLE = torch.rand(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "of" / "fastroute"))
    monkeypatch.setattr(tuning, "_searches", {})
    return tmp_path / "of" / "fastroute" / "tuning.json"


def test_what_decides_the_speed_is_measured_apart(cache):
    model, threads = FSRCNN(3, 2), torch.get_num_threads()
    races = [search_of(model, EXAMPLE)]
    for other, x in ((FSRCNN(4, 2), EXAMPLE), (FSRCNN(3, 3), EXAMPLE), (model, torch.rand(1, 3, 9, 9))):
        races.append(search_of(other, x))
    races.append(search_of(FSRCNN(3, 2).double(), EXAMPLE.double()))
    try:
        torch.set_num_threads(threads + 1)
        races.append(search_of(model, EXAMPLE))
    finally:
        torch.set_num_threads(threads)
    assert len(set(map(id, races))) == len(races) == len({search.key for search in races})
    # The values of the weights decide nothing.
    assert search_of(FSRCNN(3, 2), EXAMPLE) is races[0]


GOOD = asdict(Setting(512))
TURN = {
    "shape": [8, 8],
    "setting": GOOD,
    "seconds": [0.5],
}


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"batch": 8, "channels_last": True, "milliseconds": 1.0},
        {"best": None, "seconds": None, "trials": None},
        {
            "best": GOOD,
            "seconds": float("nan"),
            "trials": [],
        },
        {"best": GOOD, "seconds": -1.0, "trials": []},
        {"best": GOOD, "seconds": "1", "trials": []},
        {"best": {"pixels": 0, "channels_last": True, "parallel": False, "engine": "torch"}, "seconds": 1.0, "trials": []},
        {"best": {"pixels": True, "channels_last": True, "parallel": False, "engine": "torch"}, "seconds": 1.0, "trials": []},
        {"best": {"pixels": 512, "channels_last": 1, "parallel": False, "engine": "torch"}, "seconds": 1.0, "trials": []},
        {"best": {"pixels": 512}, "seconds": 1.0, "trials": []},
        {"best": [512, True], "seconds": 1.0, "trials": [3, None, [], {}]},
        {"trials": [{**TURN, "shape": [8]}, {**TURN, "shape": [8, 0]}, {**TURN, "shape": [8, "8"]}, {**TURN, "shape": 8}]},
        {
            "trials": [
                {**TURN, "setting": {}},
                {**TURN, "seconds": [0.0]},
                {**TURN, "seconds": 0.5},
                {**TURN, "seconds": [True]},
            ]
        },
    ],
)
def test_a_damaged_entry_is_ignored(cache, entry):
    key = search_of(FSRCNN(3, 2), EXAMPLE).key
    tuning._searches.clear()
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({key: entry}))
    search = search_of(FSRCNN(3, 2), EXAMPLE)
    assert search.best is None and search._trials == {}


def test_an_entry_of_the_cache_is_used(cache):
    key = search_of(FSRCNN(3, 2), EXAMPLE).key
    tuning._searches.clear()
    cache.parent.mkdir(parents=True)
    cache.write_text(
        json.dumps(
            {
                key: {
                    "best": {"pixels": 320, "channels_last": False, "parallel": False, "engine": "torch"},
                    "seconds": 0.1,
                    "trials": [],
                }
            }
        )
    )
    assert search_of(FSRCNN(3, 2), EXAMPLE).best == Setting(320, False)
    tuning._searches.clear()
    cache.write_text(json.dumps({key: {"best": None, "seconds": None, "trials": [TURN]}}))
    assert search_of(FSRCNN(3, 2), EXAMPLE)._trials == {(8, 8): {Setting(512, True): [0.5]}}
