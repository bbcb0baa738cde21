"""The saved state of a training: what it holds, and whether it belongs to the training that finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastroute.io.files import remove_parts
from fastroute.models.checkpoints import CheckpointError, read_checkpoint

STATE_KEYS = {"recipe", "stage", "step", "model", "optimizer"}
# What later states have too: their precision, the weights of a loss, the best validation, and what else they came from.
MORE_STATE_KEYS = {"precision", "scaler", "helper", "best", "origin"}


def read_state(
    path: Path, recipe: Any, precision: str, resume: bool | None, origin: Mapping[str, str] | None = None
) -> dict | None:
    """The state in `path`; None to begin anew.

    Args:
        path: of the state.
        recipe, precision: of the training, which must be those of the state.
        origin: see :class:`fastroute.training.Trainer`; what a state does not tell is not compared.
        resume: whether there must be a state (True), or one that there is does not count (False); None takes what there is.

    Raises:
        ValueError: there is no state where there must be one, or it is that of another recipe or origin; the message says
            how it differs.
        fastroute.CheckpointError: the file is damaged or no state.
    """
    # A killed run may have left half a file.
    remove_parts([path])
    if resume is False:
        return None
    if not path.exists():
        if resume:
            raise ValueError(f"train: there is nothing to resume: {path} does not exist")
        return None
    state, _ = read_checkpoint(path)
    if set(state) - MORE_STATE_KEYS != STATE_KEYS or not isinstance(state["recipe"], dict):
        raise CheckpointError(f"cannot resume from {path}: it is no state of training; delete it to start anew")
    own = {**plain(asdict(recipe)), "precision": precision}
    # A setting that did not exist when the state was saved had the effect of its default.
    defaults = plain({field.name: field.default for field in fields(recipe)})
    saved = {**defaults, **state["recipe"], "precision": state.get("precision", "float32")}
    if saved.keys() - own.keys():
        raise ValueError(f"train: {path} was saved by another kind of training; train to another folder, or delete that file")
    if saved != own:
        changed = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
        told = ", ".join(f"{name}={saved.get(name)}" for name in changed)
        raise ValueError(
            f"train: {path} was saved by a recipe with other {', '.join(changed)}; train to another folder, "
            f"delete that file, or give what it was saved with: {told}"
        )
    held = state.get("origin") or {}
    if other := [name for name, value in (origin or {}).items() if held.get(name, value) != value]:
        raise ValueError(
            f"train: {path} was saved by a training with other {', '.join(other)}; train to another folder, delete that file, "
            "or give what it was saved with"
        )
    return state


def plain(value: Any) -> Any:
    """Tuples as lists, which a saved state holds."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
