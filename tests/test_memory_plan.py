"""The memory that a streamed run on the pixel path may hold, beside what the process is seen to hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the system tells no peak of resident memory"
)

# Libraries are warm, and the reader and writer hold nothing.
PROGRAM = """
import gc, json, re, sys
import torch
import fastroute

torch.set_num_threads(1)

class Reader:
    dtype = torch.uint8
    def __init__(self, height, width):
        self.shape = (3, height, width)
    def read(self, top, bottom, left, right):
        rows = torch.arange(top, bottom).view(1, -1, 1) * 7 + torch.arange(left, right) * 5
        return rows.remainder(251).to(torch.uint8).expand(3, -1, -1).contiguous()

class Writer:
    def write(self, top, left, pixels):
        pass

def bytes_of(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

routers = {}
for model, height, width, options, factor in json.loads(sys.argv[1]):
    router = routers.setdefault(model, fastroute.load(model))
    router.stream(Reader(80, 96), Writer(), memory_limit=None, **options)
    try:
        router.stream(Reader(height, width), Writer(), memory_limit=1, **options)
    except ValueError as error:
        limit = int(int(re.search(r"at least (\\d+)", str(error))[1]) * factor)
    gc.collect()
    before = bytes_of("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    stats = router.stream(Reader(height, width), Writer(), memory_limit=limit, **options).stats
    print(json.dumps([limit, stats.working_set, bytes_of("VmHWM") - before]), flush=True)
"""
# What libraries set up on the way, whatever the image.
PROGRAM_ITSELF = 12 << 20

PCSR = "pcsr-fsrcnn-x4"
CASES = [(PCSR, 700, 1300, {"scale": 2.0}, 1.0), (PCSR, 400, 1500, {"scale": 4.0}, 1.0)]
MORE = [
    (model, height, width, {"scale": scale, **options}, factor)
    for model in (PCSR, "carn")
    for scale in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
    for height, width in ((1200, 1600), (300, 4000), (2500, 400))
    for options, factor in (({}, 1.0), ({}, 1.5), ({"budget": 0.6}, 1.0), ({"adaptive": True}, 1.0), ({"refine": False}, 1.0))
    # CARN takes ten times as long.
    if model == PCSR or (height == 300 and scale in (1.0, 1.5, 2.0, 4.0))
] + [(name, 900, 1200, {}, 1.0) for name in ("classsr-fsrcnn-x4", "arm-fsrcnn-x4", "cdnsr-fsrcnn-x4")]


@pytest.mark.parametrize("cases", [pytest.param(CASES, id="few"), pytest.param(MORE, id="many", marks=pytest.mark.soak)])
def test_streamed_runs_hold_no_more_than_their_limit(cases):
    carn = os.path.join(os.environ.get("FASTROUTE_DATA", ""), "weights", "pcsr-carn-x4.pth")
    chosen = [
        (carn if case[0] == "carn" else case[0], *case[1:]) for case in cases if case[0] != "carn" or os.path.exists(carn)
    ]
    # A process each: what an earlier run has freed would be used again, and not be seen, or lie in the way.
    results = []
    for case in chosen:
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([case])],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-2000:]
        results.append(json.loads(found.stdout))
    over = []
    for case, (limit, working_set, grown) in zip(chosen, results, strict=True):
        print(f"{os.path.basename(case[0])} {case[1:]}: {grown / 1e6:.0f} of {limit / 1e6:.0f} MB, {grown / limit:.2f}")
        assert working_set <= limit
        if grown > limit + PROGRAM_ITSELF:
            over.append((case, limit, grown))
    assert not over
