"""The recipes of `fastroute train`, by name, and their settings from text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastroute.models import arm as arm_models
from fastroute.models import cdnsr as cdnsr_models
from fastroute.models import classsr as classsr_models
from fastroute.training import arm, cdnsr, classsr, pcsr
from fastroute.training.base import BaseTrainer

# Name: recipe with its defaults, and what runs it.
RECIPES: dict[str, tuple[Any, type[BaseTrainer]]] = {
    **{f"classsr-{b}": (classsr.Recipe(backbone=b, widths=w), classsr.Trainer) for b, w in classsr_models.WIDTHS.items()},
    **{f"cdnsr-{b}": (cdnsr.Recipe(backbone=b, widths=w), cdnsr.Trainer) for b, w in cdnsr_models.WIDTHS.items()},
    **{f"arm-{b}": (arm.Recipe(backbone=b, widths=w), arm.Trainer) for b, w in arm_models.WIDTHS.items()},
    "pcsr-fsrcnn": (pcsr.Recipe(), pcsr.Trainer),
    # The published widths.
    "pcsr-carn": (
        pcsr.Recipe(backbone="carn", width=52, upsamplers=((20,) * 3, (74,) * 4), classifier=(10, 10)),
        pcsr.Trainer,
    ),
}


def configure(name: str, settings: Mapping[str, str]) -> Any:
    """The recipe `name` with some settings changed.

    Args:
        name: a key of `RECIPES`.
        settings: by name, as text: numbers, words, numbers with commas between them, or several such lists with semicolons.

    Raises:
        ValueError: a setting that the recipe does not have, or a value that it cannot take; the message names it.
    """
    default = RECIPES[name][0]
    known = {field.name for field in dataclasses.fields(default)}
    changes = {}
    for key, text in settings.items():
        if key not in known:
            raise ValueError(f"train: {name} has no setting {key!r}; it has {', '.join(sorted(known))}")
        changes[key] = _parse(key, text, getattr(default, key))
    return dataclasses.replace(default, **changes)


def _parse(key: str, text: str, like: object) -> object:
    """`text` as a value of the kind of `like`."""
    if isinstance(like, str):
        return text
    if isinstance(like, tuple) and like and isinstance(like[0], tuple):
        return tuple(_parse(key, part, ()) for part in text.split(";"))
    if isinstance(like, tuple):
        # Only where nothing is the default may nothing be meant.
        if not text and not like:
            return ()
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"train: {key} must be whole numbers with commas between them; got {text!r}") from None
    kind = type(like)
    try:
        return kind(text)  # type: ignore[call-arg]
    except ValueError:
        raise ValueError(f"train: {key} must be a {'whole ' if kind is int else ''}number; got {text!r}") from None
