"""Registration of the operators: one schema each, whether or not the extension is built.

Every module of this package names its schemas in `SCHEMAS`; setup.py reads the same strings into the extension, so that
a process without Python has them too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastroute.backends import EXTENSION, requested, select
from fastroute.ops._schemas import digest, read_schemas

NAMESPACE = "fastroute"

# Prefix of the messages of C++ checks on values, which only a kernel can see.
VALUE_ERROR = "fastroute value error: "

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SCHEMAS = read_schemas(Path(__file__).parent)
EXTENSION.load(digest(_SCHEMAS))
if EXTENSION.reasons:
    for _schema in _SCHEMAS:
        LIBRARY.define(_schema)


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Give operator `name` its reference for every device without a kernel, its fake kernel and its gradient."""
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def call(name: str, reference: Callable[..., Any], device: torch.device, *args: Any, **out: Any) -> Any:
    """Run operator `name` on the chosen backend; what a kernel finds wrong with a value becomes a ValueError."""
    compiling = torch.compiler.is_compiling()
    # A compiled graph holds the operator, whose kernel may well be the reference, unless the reference was asked for.
    if select(name, device) == "reference" and (requested() or not compiling):
        return reference(*args, **out)
    operator = getattr(torch.ops.fastroute, name)
    if compiling:
        return operator(*args, **out)
    try:
        return operator(*args, **out)
    except RuntimeError as error:
        message = str(error)
        if VALUE_ERROR not in message:
            raise
        raise ValueError(message.split(VALUE_ERROR, 1)[1].split("\n", 1)[0]) from None
