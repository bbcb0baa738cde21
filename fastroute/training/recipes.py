"""The recipes of `fastroute train`, by name, and their settings from text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastroute import io
from fastroute.models import arm as arm_models
from fastroute.models import cdnsr as cdnsr_models
from fastroute.models import classsr as classsr_models
from fastroute.training import arm, cdnsr, classsr, pcsr
from fastroute.training.base import RecipeTrainer

# Name: recipe with its defaults, and what runs it.
RECIPES: dict[str, tuple[Any, type[RecipeTrainer]]] = {
    **{f"classsr-{b}": (classsr.Recipe(backbone=b, widths=w), classsr.Trainer) for b, w in classsr_models.WIDTHS.items()},
    **{f"cdnsr-{b}": (cdnsr.Recipe(backbone=b, widths=w), cdnsr.Trainer) for b, w in cdnsr_models.WIDTHS.items()},
    **{f"arm-{b}": (arm.Recipe(backbone=b, widths=w), arm.Trainer) for b, w in arm_models.WIDTHS.items()},
    "pcsr-fsrcnn": (pcsr.Recipe(), pcsr.Trainer),
    # The published widths.
    "pcsr-carn": (
        pcsr.Recipe(backbone="carn", width=52, upsamplers=((20,) * 3, (74,) * 4), classifier=(10, 10)),
        pcsr.Trainer,
    ),
    "pcsr-srresnet": (
        pcsr.Recipe(backbone="srresnet", width=58, upsamplers=((40,) * 3, (170,) * 4), classifier=(20, 20)),
        pcsr.Trainer,
    ),
    # PCSR was not published over RCAN; upsamplers and classifier are those for SRResNet.
    "pcsr-rcan": (
        pcsr.Recipe(backbone="rcan", width=58, upsamplers=((40,) * 3, (170,) * 4), classifier=(20, 20)),
        pcsr.Trainer,
    ),
}


def configure(name: str, settings: Mapping[str, str], config: str | Path | None = None) -> Any:
    """The recipe `name` with some settings changed.

    Args:
        name: a key of `RECIPES`.
        settings: by name, as text: numbers, words, numbers with commas between them, or several such lists with semicolons.
            `scale` is one factor for recipes of several `scales` too.
        config: a YAML file of more settings, such as :func:`write_config` makes; `settings` come before those.

    Raises:
        ValueError: a setting that the recipe does not have, or a value that it cannot take; the message names it, and the
            file if it is from there.
    """
    default = RECIPES[name][0]
    changes = {} if config is None else _parse_all(name, read_config(config), f"train: {config}: ")
    changes |= _parse_all(name, settings, "train: ")
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        raise ValueError(f"{error}; the settings of {config} are in force" if config is not None else str(error)) from error


def read_config(path: str | Path) -> dict[str, str]:
    """The settings in a YAML file, as text; lists may be given as such or as in :func:`configure`.

    Raises:
        ValueError: the file cannot be read, or holds something else; the message names it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"train: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"train: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"train: {path} must hold lines NAME: VALUE; it holds {content!r:.60}")
    return {str(key): _as_text(value, f"train: {path}: {key}") for key, value in content.items()}


def write_config(path: Path, recipe: Any, comment: str) -> None:
    """Write every setting of `recipe` below a line of comment; :func:`configure` reads it."""
    lines = "\n".join(f"{field.name}: {_as_yaml(getattr(recipe, field.name))}" for field in dataclasses.fields(recipe))
    io.write_atomically(path, lambda file: file.write(f"# {comment}\n{lines}\n".encode()))


def _as_yaml(value: object) -> str:
    # Words stand as they are; nothing, and what may mean more in YAML, such as a path, stands in quotes.
    if isinstance(value, str) and not value.isidentifier():
        return json.dumps(value)
    return f"[{', '.join(map(_as_yaml, value))}]" if isinstance(value, tuple) else str(value)


def _as_text(value: object, where: str, levels: int = 2) -> str:
    if isinstance(value, list) and levels:
        separator = ";" if any(isinstance(item, list) for item in value) else ","
        return separator.join(_as_text(item, where, levels - 1) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        got = "a list within lists" if isinstance(value, list) else repr(value)
        raise ValueError(f"{where} must be a number, a word or a list; got {got}")
    return str(value)


def _parse_all(name: str, settings: Mapping[str, str], where: str) -> dict[str, object]:
    default = RECIPES[name][0]
    if hasattr(default, "scales") and "scale" in settings:
        if "scales" in settings:
            raise ValueError(f"{where}scale is one factor and scales are several; give one of them")
        settings = {"scales" if key == "scale" else key: value for key, value in settings.items()}
    known = {field.name for field in dataclasses.fields(default)}
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(f"{where}{name} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return {key: _parse(f"{where}{key}", text, getattr(default, key)) for key, text in settings.items()}


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
            raise ValueError(f"{key} must be whole numbers with commas between them; got {text!r}") from None
    kind = type(like)
    try:
        return kind(text)  # type: ignore[call-arg]
    except ValueError:
        raise ValueError(f"{key} must be a {'whole ' if kind is int else ''}number; got {text!r}") from None
