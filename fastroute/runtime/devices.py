"""Constants that differ between kinds of devices: sizes that fit the caches of a CPU leave a GPU idle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


def on_device(table: Mapping[str, T], device: torch.device) -> T:
    """The entry of `table` for the kind of `device`. Kinds without an entry are treated like a CPU."""
    return table.get(device.type, table["cpu"])
