"""Registration of the operators: one schema each, whether or not the extension is built.

Every module of this package names its schemas in `SCHEMAS`; setup.py reads the same strings into the extension, so that
a process without Python has them too. The Triton kernels are a second set of operators with the same schemas, fake kernels
and gradients, in a namespace of their own (fastroute/triton/_library.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastroute.backends import EXTENSION, requested, select
from fastroute.ops._schemas import digest, read_schemas

NAMESPACE = "fastroute"
TRITON_NAMESPACE = "fastroute_triton"

# Prefix of the messages of C++ checks on values, which only a kernel can see.
VALUE_ERROR = "fastroute value error: "

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SCHEMAS = read_schemas(Path(__file__).parent)
EXTENSION.load(digest(_SCHEMAS))
if EXTENSION.reasons:
    for _schema in _SCHEMAS:
        LIBRARY.define(_schema)


class Operator(NamedTuple):
    """What an operator has beside its kernels."""

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Give operator `name` its reference for every device without a kernel, its fake kernel and its gradient.

    The gradient is `backward(ops, ctx, *grads)`; it calls operators of the namespace `ops`, the one of its operator, so that
    a gradient runs on the backend that ran the forward pass.
    """
    OPERATORS[name] = Operator(reference, fake, backward, setup_context)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    register_rules(LIBRARY, NAMESPACE, name)


def register_rules(library: torch.library.Library, namespace: str, name: str) -> None:
    """Fake kernel and gradient of operator `name` in `namespace`."""
    operator = OPERATORS[name]
    torch.library.register_fake(f"{namespace}::{name}", operator.fake, lib=library)
    if operator.backward is not None:
        torch.library.register_autograd(
            f"{namespace}::{name}",
            partial(operator.backward, getattr(torch.ops, namespace)),
            setup_context=operator.setup_context,
            lib=library,
        )


def call(name: str, reference: Callable[..., Any], device: torch.device, *args: Any, **out: Any) -> Any:
    """Run operator `name` on the chosen backend; what a kernel finds wrong with a value becomes a ValueError.

    An overload is named in full, `op.overload`: torch tries one after another, and prints all arguments for each that does
    not fit. Without a name it is `op.out` where `out` is given.
    """
    compiling = torch.compiler.is_compiling()
    packet, _, overload = name.partition(".")
    backend = select(packet, device)
    # A compiled graph holds the operator, whose kernel may well be the reference, unless the reference was asked for.
    if backend == "reference" and (requested() or not compiling):
        return reference(*args, **out)
    namespace = torch.ops.fastroute_triton if backend == "triton" else torch.ops.fastroute
    operator = getattr(getattr(namespace, packet), overload or ("out" if out else "default"))
    if compiling:
        return operator(*args, **out)
    try:
        if out or torch.is_inference_mode_enabled() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return operator(*args, **out)
        # What torch would do itself, but only after it has entered Python, which takes as long as the rest of a small call.
        # A tensor that is written has to go the whole way: its version is counted there.
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    except RuntimeError as error:
        message = str(error)
        if VALUE_ERROR not in message:
            raise
        raise ValueError(message.split(VALUE_ERROR, 1)[1].split("\n", 1)[0]) from None
