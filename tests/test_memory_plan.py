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

# Libraries are warm, and the reader and writer hold nothing. Where the process is "used", other images went through it before,
# and what the C library keeps free of them is in the way.
PROGRAM = """
import gc, json, re, sys
import torch
import fastroute
from fastroute import buffers

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
for model, height, width, options, factor, used in json.loads(sys.argv[1]):
    router = routers.setdefault(model, fastroute.load(model))
    router.stream(Reader(80, 96), Writer(), memory_limit=None, **options)
    for size, scale in (((600, 1600), 3.0), ((700, 900), 1.0), ((300, 1500), 4.0)) if used else ():
        router.stream(Reader(*size), Writer(), memory_limit=None, **({"scale": scale} if "scale" in options else {}))
    try:
        router.stream(Reader(height, width), Writer(), memory_limit=1, **options)
    except ValueError as error:
        limit = int(int(re.search(r"at least (\\d+)", str(error))[1]) * factor)
    gc.collect()
    buffers.give_back()
    before = bytes_of("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    stats = router.stream(Reader(height, width), Writer(), memory_limit=limit, **options).stats
    print(json.dumps([limit, stats.working_set, bytes_of("VmHWM") - before]), flush=True)
"""
PCSR = "pcsr-fsrcnn-x4"
CASES = [(PCSR, 700, 1300, {"scale": 2.0}, 1.0, False), (PCSR, 700, 1300, {"scale": 4.0}, 1.0, True)]
SIZES = ((1200, 1600), (300, 4000), (2500, 400), (700, 1300))
MORE = [
    (model, height, width, {"scale": scale, **options}, factor, used)
    for model in (PCSR, "carn")
    for scale in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
    for height, width in SIZES
    for options, factor in (({}, 1.0), ({}, 1.5), ({"budget": 0.95}, 1.0), ({"adaptive": True}, 1.0), ({"refine": False}, 1.0))
    for used in (False, True)
    # CARN takes ten times as long.
    if model == PCSR or (height == 300 and scale in (1.0, 1.5, 2.0, 4.0) and not used)
] + [
    (name, height, width, options, factor, used)
    for name in ("classsr-fsrcnn-x4", "arm-fsrcnn-x4", "cdnsr-fsrcnn-x4")
    for height, width in SIZES
    for options, factor in (({}, 1.0), ({}, 1.5), ({"budget": 0.95}, 1.0))
    for used in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [pytest.param(CASES, id="few"), pytest.param(MORE, id="many", marks=pytest.mark.soak)])
def test_streamed_runs_hold_no_more_than_their_limit(cases):
    carn = os.path.join(os.environ.get("FASTROUTE_DATA", ""), "weights", "pcsr-carn-x4.pth")
    chosen = [
        (carn if case[0] == "carn" else case[0], *case[1:]) for case in cases if case[0] != "carn" or os.path.exists(carn)
    ]
    # A process each: what an earlier run has freed would be used again, and not be seen.
    over = []
    for case in chosen:
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([case])],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-2000:]
        limit, working_set, grown = json.loads(found.stdout)
        print(f"{os.path.basename(case[0])} {case[1:]}: {grown / 1e6:.0f} of {limit / 1e6:.0f} MB, {grown / limit:.2f}")
        assert working_set <= limit
        if grown > limit:
            over.append((case, limit, grown))
    assert not over
