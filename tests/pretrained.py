"""Spandrel beside any torch, and small checkpoints in the layouts of others."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

# What torchvision's Python code registers fakes of as it is imported; its compiled library, which loads only beside the torch
# that it was built for, defines them. Nobody calls them here.
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def spandrel() -> ModuleType:
    """The package; torchvision, which it needs, is imported with its missing operators declared by name."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        if not _declared:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator + SCHEMA)
            _declared.append(library)
        import torchvision  # noqa: F401
    import spandrel

    return spandrel
