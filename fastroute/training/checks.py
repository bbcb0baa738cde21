"""Checks of the settings that recipes share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from fastroute._arguments import LARGEST_SPAN, real, whole

# The backbone of a system that is given in Python.
OWN = "own"


def check_settings(recipe: Any, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise an error that names the first setting that is no number of its kind, below 1, below 0, or beyond what can be.

    Args:
        recipe: a dataclass; of all of its fields numbers are looked at.
        positive, not_negative: names of fields.

    Raises:
        TypeError: a setting is no number, or no whole one where its default is.
        ValueError: it is out of range.
    """
    least = {**dict.fromkeys(not_negative, 0), **dict.fromkeys(positive, 1)}
    for field in fields(recipe):
        value, name, kind = getattr(recipe, field.name), field.name, str(field.type)
        most = 2**63 - 1 if name == "seed" or name.endswith("steps") else LARGEST_SPAN
        numbers = [value] if kind == "int" else value if kind.startswith("tuple[int") else []
        if kind.startswith("tuple[tuple[int"):
            if not all(isinstance(part, Sequence) for part in value):
                raise TypeError(f"train: {name} must be lists of whole numbers; got {value}")
            numbers = [number for part in value for number in part]
        for number in numbers:
            whole("train", name, number, most, least.get(name, -most))
        if kind == "float" and not math.isfinite(real("train", name, value)):
            raise ValueError(f"train: {name} must be finite; got {value}")
        if name.endswith(("rate", "weight", "price")):
            least.setdefault(name, 0)
    for name, bound in least.items():
        if not getattr(recipe, name) >= bound:
            raise ValueError(f"train: {name} must be at least {bound}; got {getattr(recipe, name)}")


def check_shares(recipe: Any, *names: str) -> None:
    """Raise a ValueError that names the first of these settings that is outside of [0, 1]."""
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"train: {name} must lie in [0, 1]; got {getattr(recipe, name)}")


def check_backbone(backbone: str, known: Iterable[str]) -> None:
    """Raise a ValueError that lists the known backbones."""
    if backbone not in (*known, OWN):
        raise ValueError(f"train: backbone must be one of {', '.join(known)}; got {backbone!r}")


def check_widths(widths: Sequence[int]) -> None:
    """Raise a ValueError where widths are not positive or do not rise."""
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"train: widths must rise; got {widths}")
    if widths[0] < 1:
        raise ValueError(f"train: widths must be at least 1; got {widths}")
