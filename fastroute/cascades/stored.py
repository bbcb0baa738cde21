"""A calibrated cascade as a file: what was learnt, and which networks it is about."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastroute import io
from fastroute.cascades.decision import Decision, Sampling, Table
from fastroute.cascades.opening import Opener, check_costs, open_all, refuse_patches
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.samples import MOST
from fastroute.cascades.score import EDGE, LEARNED, OUTPUT, stored_score
from fastroute.cascades.sources import BICUBIC
from fastroute.catalogue import list_models
from fastroute.models.checkpoints import CheckpointError

if TYPE_CHECKING:
    from fastroute.cascades.promise import Calibration

# The entry of the metadata that tells such a file from weights.
CASCADE = "cascade"
TENSORS = ("scores", "errors", "contexts", "shares")
MOST_BRANCHES, MOST_BINS, MOST_CONTEXT = 16, 4096, 4096
MOST_NUMBER = 1e30


def save_cascade(path: Path, branches: Sequence[str | Path], calibration: Calibration, **about: Any) -> None:
    """Write what was learnt; networks stay where they are, and are named relative to the file.

    Args:
        path: a .safetensors file.
        branches: shipped models, files, or "bicubic", cheapest first.
        calibration: of a cascade of these.
        about: more to be told of it, values of JSON.

    Raises:
        fastroute.CheckpointError: another ending, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"cannot write {path}: its ending must be .safetensors")
    table = calibration.table
    tensors = {
        "scores": table.scores.double(),
        "errors": table.errors.double(),
        "contexts": torch.tensor(table.contexts, dtype=torch.int64),
        "shares": torch.tensor(table.shares, dtype=torch.float64),
    }
    if calibration.score is not None:
        tensors |= calibration.score.tensors()
    content = {
        **about,
        "branches": [_entry(branch, path) for branch in branches],
        "costs": list(calibration.costs),
        "inner": table.inner,
        "margin": table.margin,
        "wide": list(table.wide),
        "sampling": None if table.sampling is None else asdict(table.sampling),
        "fidelity": table.fidelity,
        "pictures": calibration.pictures,
        "cells": calibration.cells,
        "reached": [round(value, 2) for value in calibration.reached],
        "score": _score(calibration),
        "base": calibration.base,
        "tried": {name: round(value, 4) for name, value in calibration.tried.items()},
    }
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {CASCADE: json.dumps(content)})
    try:
        io.write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _score(calibration: Calibration) -> str:
    if calibration.base is not None:
        return OUTPUT
    return EDGE if calibration.score is None else LEARNED


def _entry(branch: str | Path, path: Path) -> dict[str, str]:
    if branch == BICUBIC:
        return {"kind": BICUBIC}
    if str(branch) in list_models():
        return {"kind": "model", "name": str(branch)}
    relative = os.path.relpath(Path(branch).resolve(), path.resolve().parent)
    return {"kind": "file", "path": Path(relative).as_posix(), "sha256": digest(Path(branch))}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def read_cascade(
    content: Mapping[str, Tensor], told: str, path: Path, asked: Mapping[str, Any], open_one: Opener
) -> CascadeRouter:
    """The router of a file that :func:`save_cascade` wrote.

    Args:
        content: its tensors.
        told: what its metadata say.
        path: the file, beside which the networks are looked for.
        asked: what a caller of :func:`fastroute.load` gave.
        open_one: see :func:`fastroute.cascades.opening.open_all`.

    Raises:
        fastroute.CheckpointError: damaged, or a network is missing or another than the one it was calibrated with.
    """
    refuse_patches(asked, "a calibrated cascade")
    try:
        about = json.loads(told)
        branches = about["branches"]
        if not isinstance(branches, list) or not 1 < len(branches) <= MOST_BRANCHES:
            raise ValueError("it must name at least two networks")
        table = _table(content, about, len(branches))
        costs = [_number(cost, "costs", 0.0) for cost in about["costs"]]
        kind = about.get("score", EDGE)
        if kind not in (EDGE, LEARNED, OUTPUT):
            raise ValueError(f"its score is {str(kind)[:40]!r}, which is unknown")
        base = _base(about["base"], len(branches)) if kind == OUTPUT else None
        # Calibrations are of networks of three channels.
        score = stored_score(content, 3) if kind == LEARNED else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"cannot use {path}: no whole cascade: {str(error)[:200]}") from error
    sources = [_source(branch, path) for branch in branches]
    opened = open_all("load", sources, open_one)
    names = [name for name, _, _ in opened]
    scale = opened[-1][2].scale
    if asked.get("scale", scale) != scale:
        raise CheckpointError(f"cannot use {path}: it upscales by {scale} alone; got scale={asked['scale']:g}")
    decision = Decision(table, score=score, base=base)
    router = CascadeRouter([module for _, module, _ in opened], [facts for _, _, facts in opened], decision, costs, names)
    try:
        check_costs("load", costs, names)
        # Whatever took which time: a file whose networks have changed places promises nothing.
        check_costs("load", router.branch_flops, names)
    except ValueError as error:
        raise CheckpointError(f"cannot use {path}: {str(error).removeprefix('load: ')}") from error
    return router


def _table(content: Mapping[str, Tensor], about: Mapping[str, Any], classes: int) -> Table:
    missing = [name for name in TENSORS if not isinstance(content.get(name), Tensor)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    scores, errors, contexts, shares = (content[name] for name in TENSORS)
    if any(x.is_complex() for x in (scores, errors, contexts, shares)):
        raise ValueError("its tensors must be real")
    bins = len(scores) if scores.ndim == 1 else 0
    if not 1 < bins <= MOST_BINS or errors.shape != (classes, bins):
        raise ValueError(f"its errors must be ({classes}, bins) and its scores (bins,), 2 bins at least")
    if contexts.ndim != 1 or not 0 < len(contexts) <= 64 or shares.shape != contexts.shape:
        raise ValueError("it must have a share for each context")
    if not all(bool(x.double().isfinite().all()) for x in (scores, errors, shares)) or bool((errors < 0).any()):
        raise ValueError("its scores, errors and shares must be finite, and errors not negative")
    pixels = [int(x) for x in contexts.tolist()]
    if bool((scores.diff() <= 0).any()) or sorted(set(pixels)) != pixels or not 0 <= pixels[0] <= pixels[-1] <= MOST_CONTEXT:
        raise ValueError("its scores and contexts must rise")
    return Table(
        scores.double(),
        errors.double(),
        tuple(pixels),
        tuple(shares.tolist()),
        _number(about["inner"], "inner", 0.0),
        _number(about["margin"], "margin", 1.0),
        _number(about["fidelity"], "fidelity", 0.0),
        _sampling(about.get("sampling")),
        _wide(about.get("wide", []), classes),
    )


def _base(told: Any, classes: int) -> int:
    if isinstance(told, bool) or not isinstance(told, int) or not 0 <= told < classes - 1:
        raise ValueError(f"its base must be the number of a cheaper network; it is {str(told)[:40]!r}")
    return told


def _wide(told: Any, classes: int) -> tuple[bool, ...]:
    if not isinstance(told, list) or len(told) not in (0, classes - 1) or not all(isinstance(own, bool) for own in told):
        raise ValueError("it must say of every cheaper network, or of none, whether it sees far")
    return tuple(told)


def _sampling(told: Any) -> Sampling | None:
    if told is None:
        return None
    if not isinstance(told, Mapping):
        raise ValueError("its sampling must have margins and a least ratio")
    margins = told["margins"]
    if not isinstance(margins, list) or not 0 < len(margins) <= MOST:
        raise ValueError("its sampling must have margins")
    found = tuple(_number(margin, "sampling's margins", 1.0) for margin in margins)
    return Sampling(found, _number(told["least"], "sampling's least ratio", 0.0))


def _number(value: object, name: str, least: float) -> float:
    # Whole numbers have no end.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST_NUMBER:
        raise ValueError(f"its {name} must be a number from {least:g} on; it is {str(value)[:40]!r}")
    return float(value)


def _source(branch: Any, path: Path) -> str | Path:
    kind = branch.get("kind") if isinstance(branch, Mapping) else None
    if kind == BICUBIC:
        return BICUBIC
    if kind == "model" and str(branch.get("name")) in list_models():
        return str(branch["name"])
    if kind != "file" or not all(isinstance(branch.get(name), str) for name in ("path", "sha256")):
        raise CheckpointError(f"cannot use {path}: it names a network in an unknown way: {str(branch)[:80]}")
    try:
        file = path.resolve().parent / branch["path"]
        if not file.is_file():
            raise CheckpointError(
                f"cannot use {path}: its network {branch['path'][:200]} is not there; it is looked for beside the file"
            )
        found = digest(file)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot use {path}: cannot read its network {branch['path'][:200]!r}: {error}") from error
    if found != branch["sha256"]:
        raise CheckpointError(
            f"cannot use {path}: {file} is another network than the one that it was calibrated with (SHA-256 {found[:12]}, "
            f"not {branch['sha256'][:12]}); calibrate it anew"
        )
    return file
