"""The models shipped with the package, and the content of their cards. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "classsr-fsrcnn-x4"
# For factors without a model of their own.
ANY_SCALE = "pcsr-fsrcnn-x4"
WEIGHTS = Path(__file__).parent / "weights"
# A row of a card's table.
ROW = re.compile(r"^\|\s*(\S[^|]*?)\s*\|\s*(\S[^|]*?)\s*\|\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A shipped model.

    Attributes:
        name: name for :func:`fastroute.load`.
        size: size of its weights in bytes.
        task: its purpose, for example "photographs x4".
        flops: FLOPs of each branch, cheapest first, and of the classifier.
        psnr: PSNR of the model and of bicubic interpolation.
        path: the card itself, which also describes the training and test data.
    """

    name: str
    size: int
    task: str
    flops: str
    psnr: str
    path: Path


def list_models() -> list[str]:
    """The names of the models shipped with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def default_model(scale: float | None = None) -> str:
    """The shipped model for an upscaling factor: `DEFAULT_MODEL` or its like, and `ANY_SCALE` where there is none."""
    if scale is None:
        return DEFAULT_MODEL
    # Written out: 4.0000001 is another factor than 4.
    name = f"{DEFAULT_MODEL.rpartition('-x')[0]}-x{int(scale) if scale == int(scale) else scale}"
    return name if name in list_models() else ANY_SCALE


def read_card(name: str) -> Card:
    """The card of the shipped model `name`; entries are "" if the card does not state them."""
    path = WEIGHTS / f"{name}.md"
    rows = dict(ROW.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    size = (WEIGHTS / f"{name}.safetensors").stat().st_size
    return Card(name, size, rows.get("Task", ""), rows.get("FLOPs", ""), rows.get("PSNR", ""), path)
