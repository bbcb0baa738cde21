"""Numbers at their edges where files are read and written, images come in numbers, and networks are trained or compared."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from networks import picture
from test_edges import EDGES, MORE, NOT_OURS

import fastroute
from fastroute import PixelRouter, io
from fastroute.files import many_files
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.report import comparison, evaluation
from fastroute.training.recipes import RECIPES

FEW = [0, -1, 2**31, 2**63, math.inf, math.nan, np.float32("nan"), np.bool_(True)]
IMAGE = (picture(1, 3, 36, 40)[0] * 255).to(torch.uint8)
SCALARS = [np.int64(-1), np.uint8(0), np.float32("nan"), np.float64("inf"), np.bool_(True)]


@cache
def router(name):
    return fastroute.load(f"{name}-fsrcnn-x4")


def pcsr():
    return PCSR.build(FSRCNN(4, upsample=False), [[4], [8]], [4])


def many(name, **options):
    return list(fastroute.upscale_many(router(name), [IMAGE], **options))


def jobs(**options):
    outcome = next(iter(many_files.run_jobs(router("classsr"), many_files.plan_jobs(["in.png"], "out"), **options)))
    if outcome.error:
        raise ValueError(outcome.error)


def file(target, **options):
    return fastroute.upscale_file("in.png", target, router("pcsr" if "scale" in options else "classsr"), **options)


# A call by the name of its argument, which the message names.
CALLS = {
    **{
        f"upscale_many {n}, {name}": lambda v, n=n, name=name: many(name, **{n: v})
        for n in ("budget", "budget_flops")
        for name in ("classsr", "pcsr")
    },
    "upscale_many memory_limit": lambda v: many("pcsr", budget=0.8, memory_limit=v),
    "upscale_many scale": lambda v: many("pcsr", budget=0.8, scale=v),
    **{f"upscale_file {n}": lambda v, n=n: file("out.png", **{n: v}) for n in ("memory_limit", "max_pixels", "white", "scale")},
    "upscale_file budget": lambda v: file("out.tif", budget=v),
    "upscale_file quality": lambda v: file("out.jpg", quality=v),
    "run_jobs quality": lambda v: jobs(quality=v),
    **{f"read_picture {n}": lambda v, n=n: io.read_picture("float.tif", **{n: v}) for n in ("max_pixels", "white")},
    **{f"read_image {n}": lambda v, n=n: io.read_image("in.png", **{n: v}) for n in ("max_pixels", "white")},
    "write_picture quality": lambda v: io.write_picture("out.webp", io.Picture(IMAGE), quality=v),
    **{
        f"output_size {n}": lambda v, n=n: router("pcsr").output_size(**{"height": 9, "width": 9, "scale": 2.0, n: v})
        for n in ("height", "width", "scale")
    },
    **{
        f"patches output_size {n}": lambda v, n=n: router("classsr").output_size(**{"height": 9, "width": 9, n: v})
        for n in ("height", "width")
    },
    **{f"evaluate {n}": lambda v, n=n: evaluation.evaluate(router("pcsr"), "in.png", **{n: v}) for n in ("scale", "budget")},
    "compare budgets": lambda v: comparison.compare(IMAGE, ["pcsr-fsrcnn-x4"], budgets=[v], runs=1),
    "compare scale": lambda v: comparison.compare(IMAGE, ["pcsr-fsrcnn-x4"], scale=v, runs=1),
    "PixelRouter scale": lambda v: PixelRouter(pcsr(), scale=v),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "cache"))
    io.write_image("in.png", IMAGE)
    io.write_image("float.tif", IMAGE / 255)


@pytest.mark.parametrize(
    "values", [pytest.param(FEW, id="few"), pytest.param([*EDGES, *SCALARS, *MORE], id="all", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", CALLS)
def test_refused_by_name_or_right(folder, name, values):
    for value in values:
        try:
            CALLS[name](value)
        except (ValueError, TypeError, MemoryError) as error:
            message, argument = str(error), name.split()[1 + name.startswith("patches")].rstrip(",")
            names = (argument.rstrip("s"), argument.replace("_", " "), "out of memory", "image")
            told = any(name in message for name in names)
            assert ": " in message and told and not NOT_OURS.search(message), (value, message)


def nested(old, value):
    return (*old[:-1], value) if isinstance(old, tuple) else value


@pytest.mark.parametrize("recipe", ["classsr-fsrcnn", "cdnsr-fsrcnn", "arm-fsrcnn", "pcsr-fsrcnn"])
def test_settings_of_training(recipe):
    """Each is refused by name, or a number of its kind: finite, and a whole one that is no bool where the default is."""
    default, accepted = RECIPES[recipe][0], 0
    for field in fields(default):
        old = getattr(default, field.name)
        if isinstance(old, str):
            continue
        for value in (*EDGES, *SCALARS, 1, 0.5, True, "3", None, 10**400):
            try:
                replace(default, **{field.name: nested(old, value)})
            except (ValueError, TypeError) as error:
                message = str(error)
                assert message.startswith("train: ") and field.name in message and not NOT_OURS.search(message), message
            else:
                assert not isinstance(value, (bool, np.bool_, str)) and math.isfinite(value) and value >= 0, (field.name, value)
                assert isinstance(old, float) or int(value) == value, (field.name, value)
                accepted += 1
    assert accepted > 20
