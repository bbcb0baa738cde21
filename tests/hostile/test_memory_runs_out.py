"""Memory that runs out in whatever users call is a MemoryError that says what to do; the process is as it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only there is address space limited as it is here"),
]

# Every call runs in forks of one process, once small to load what it needs, then large with so many megabytes to spare.
PROGRAM = r"""
import json, os, re, resource, signal, sys, tempfile
from pathlib import Path
import torch
import fastroute
from fastroute import FixedPatchRouter, FixedPixelRouter, buffers, io
from fastroute.files import many_files
from fastroute.models.fsrcnn import FSRCNN
from fastroute.report import comparison, evaluation
from fastroute.training.data import Pool
from fastroute.training.recipes import RECIPES, configure

torch.set_num_threads(1)
os.chdir(tempfile.mkdtemp())
ADVICE = re.compile(r"out of memory.*; |memory limit of .*(raise|choose|store)|must be at least \d+ bytes", re.DOTALL)
patches, pixels = fastroute.load("classsr-fsrcnn-x4", tune=False), fastroute.load("pcsr-fsrcnn-x4")
tiles = fastroute.tiled(FSRCNN(16, scale=4), tune=False)

class Reader:
    dtype = torch.uint8
    def __init__(self, height, width):
        self.shape = (3, height, width)
    def read(self, top, bottom, left, right):
        return torch.zeros(3, bottom - top, right - left, dtype=torch.uint8)

class Writer:
    def write(self, top, left, pixels):
        pass

generator = torch.Generator().manual_seed(0)
small, large = (torch.randint(0, 255, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in ((80, 96), (600, 800)))
for name, image in (("small", small), ("large", large)):
    for ending in ("png", "tif", "jpg"):
        io.write_image(f"{name}.{ending}", image)
    os.mkdir(name)
    for number in range(2):
        io.write_image(f"{name}/{number}.png", image)
images = {"small": small, "large": large}

def jobs(name, **options):
    for outcome in many_files.run_jobs(patches, many_files.plan_jobs([name], "out"), **options):
        if outcome.error:
            raise MemoryError(outcome.error)

def train(name):
    steps = {"branch_steps": "1,1,1", "classifier_steps": "1", "joint_steps": "1", "routing_steps": "1"}
    recipe = configure("classsr-fsrcnn", {**steps, "batch": "256" if name == "large" else "4", "patch": "16"})
    pool = Pool.build(name, recipe.scale, recipe.patch)
    RECIPES["classsr-fsrcnn"][1](pool, recipe, Path(tempfile.mkdtemp()) / "state.pt").run()

def fixed(router, image, **options):
    made = {patches: FixedPatchRouter, pixels: FixedPixelRouter}[router](router, image.shape, dtype=torch.uint8, **options)
    return made.upscale(image)

CALLS = {
    "upscale, patches": lambda n: patches.upscale(images[n]),
    "upscale, patches, budget": lambda n: patches.upscale(images[n], budget=0.8),
    "upscale, pixels": lambda n: pixels.upscale(images[n]),
    "upscale, pixels, budget": lambda n: pixels.upscale(images[n], budget=0.8),
    "upscale, pixels, adaptive": lambda n: pixels.upscale(images[n], adaptive=True),
    "stream, patches": lambda n: patches.stream(Reader(*images[n].shape[1:]), Writer()),
    "stream, pixels": lambda n: pixels.stream(Reader(*images[n].shape[1:]), Writer()),
    "stream, pixels, scale 1": lambda n: pixels.stream(Reader(*images[n].shape[1:]), Writer(), scale=1),
    "upscale_many, patches": lambda n: list(fastroute.upscale_many(patches, [images[n]] * 2, budget=0.8)),
    "upscale_many, pixels": lambda n: list(fastroute.upscale_many(pixels, [images[n]] * 2, budget=0.8)),
    "upscale_file, png": lambda n: fastroute.upscale_file(f"{n}.png", "out.png", patches),
    "upscale_file, png, pixels": lambda n: fastroute.upscale_file(f"{n}.png", "out.png", pixels),
    "upscale_file, tif": lambda n: fastroute.upscale_file(f"{n}.tif", "out.tif", patches),
    "upscale_file, jpg": lambda n: fastroute.upscale_file(f"{n}.jpg", "out.jpg", patches),
    "upscale_file, webp": lambda n: fastroute.upscale_file(f"{n}.jpg", "out.webp", patches),
    "tiled": lambda n: fastroute.tiled(FSRCNN(8, scale=2), patch=32 if n == "small" else 1024),
    "tiled, upscale": lambda n: tiles.upscale(images[n]),
    "folder": lambda n: jobs(n),
    "folder, shared budget": lambda n: jobs(n, shared_budget=True, budget=0.9),
    "evaluate, patches": lambda n: evaluation.evaluate(patches, f"{n}.png"),
    "evaluate, pixels": lambda n: evaluation.evaluate(pixels, f"{n}.png"),
    "compare": lambda n: comparison.compare(images[n], ["classsr-fsrcnn-x4"], runs=1),
    "train": train,
    "fixed size, patches": lambda n: fixed(patches, images[n], sample=images[n]),
    "fixed size, pixels": lambda n: fixed(pixels, images[n]),
    "read": lambda n: io.read_picture(f"{n}.png"),
    "write, tif": lambda n: io.write_image("out.tif", images[n]),
    "write, webp": lambda n: io.write_image("out.webp", images[n]),
}

def outcome(call, spare):
    call("small")
    buffers.give_back()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20),) * 2)
    try:
        call("large")
    except MemoryError as error:
        return "refused" if ADVICE.search(str(error)) else f"no advice: {error}"
    except io.ImageError as error:  # a file that would take more than the limit
        return "refused" if ADVICE.search(str(error)) else f"ImageError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"

spares, some = json.loads(sys.argv[1])
for name in some or CALLS:
    call = CALLS[name]
    for spare in spares:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(600)
            try:
                os.write(write, outcome(call, spare).encode()[:500])
            finally:
                os._exit(0)
        os.close(write)
        found = os.read(read, 1000).decode()
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([name, spare, found or f"ended with {status}"]), flush=True)
        if found == "done":
            break
"""


# What begins otherwise from call to call; the soak makes all of them.
SOME = [
    "upscale, pixels, budget",
    "stream, patches",
    "upscale_many, pixels",
    "upscale_file, webp",
    "tiled",
    "folder",
    "compare",
]
SPARES = [1, 4, 8, 16, 24, 48, 80, 120, 180, 260, 400, 600, 1000, 2000]
# A thread that begins when nothing at all is left ends the process: glibc's doing, with these words and status.
THREAD = re.compile("failed to register TLS destructor: out of memory|cannot allocate memory for thread-local data")
ENDED = (f"ended with {-signal.SIGABRT}", "ended with 127")


@pytest.mark.parametrize(
    ("spares", "some"), [([16], SOME), pytest.param(SPARES, [], marks=pytest.mark.soak)], ids=["some", "all"]
)
def test_every_call_says_what_to_do(spares, some):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTROUTE_TUNE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([spares, some])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes = [json.loads(line) for line in run.stdout.splitlines()]
    ended = [found for found in outcomes if found[2] in ENDED]
    assert len(ended) <= len(THREAD.findall(run.stderr)), run.stderr
    assert not [found for found in outcomes if found not in ended and found[2] not in ("refused", "done")]
    assert len([found for found in outcomes if found[2] == "refused"]) >= len(some) - len(ended)
    if not some:
        assert all(found[2] == "done" for found in {found[0]: found for found in outcomes}.values())
