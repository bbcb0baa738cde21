"""The contexts of torch in which a router may be called: it works as if there were none, or says why it cannot."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastroute.buffers import explained

F = TypeVar("F", bound=Callable[..., Any])

# The devices on which autocast runs operators in another type than that of their weights.
AUTOCAST = ("cpu", "cuda")
FREE = "use a smaller image or patch, or free memory"
TRACED = (
    "an image is routed by its values, which tracing, fake tensors and the transforms of torch.func do not know; a "
    "FixedPatchRouter or FixedPixelRouter can be exported and compiled"
)


def is_plain() -> bool:
    """Whether tensors created now are ordinary ones, which may be kept for later calls."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    # Fake, functional and traced tensors have classes of their own.
    return type(torch.empty(0, device="cpu")) is Tensor


class CallLock:
    """A reentrant lock that is not shared with copies of its owner."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


@contextmanager
def settled() -> Iterator[None]:
    """Within the block, networks compute in the type of their weights, and the default device is the CPU."""
    with ExitStack() as stack:
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def ordinary(op: str, *arguments: object) -> Iterator[None]:
    """Within the block there is no autocast and no inference mode, and the default device is the CPU.

    Args:
        op: name of the function, for messages.
        arguments: arguments of the call.

    Raises:
        RuntimeError: the call is traced or transformed, or one of `arguments` carries a derivative of forward mode.
    """
    if not is_plain():
        raise RuntimeError(f"{op}: {TRACED}")
    # Inference mode, in which routers run, would silently drop a derivative.
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments if _dual_level()):
        raise RuntimeError(f"{op}: a router has no derivative, not even in forward mode; got a dual tensor")
    # Weights that are made within must also be usable outside of inference mode.
    with torch.inference_mode(False), settled():
        yield


def levels_to_caller() -> int:
    """The `stacklevel` with which a warning of the caller names the line of the user."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastroute", "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    return level


def _dual_level() -> bool:
    """Whether forward-mode differentiation is in progress."""
    return forward_ad._current_level >= 0


def ordinarily(function: F) -> F:
    """Make a function, or a method of an object with a `lock`, run in :func:`ordinary`, one call of an object at a time.

    :func:`torch.compile` does not compile anything within, so the result is that of the plain call.
    """
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        lock = getattr(args[0], "lock", None) if args else None
        with (
            explained(name, FREE),
            ordinary(name, *args, *kwargs.values()),
            lock if isinstance(lock, CallLock) else ExitStack(),
        ):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Importing the compiler takes a second. A program that compiles has imported it already.
        return (_uncompiled(run) if "torch._dynamo" in sys.modules else run)(*args, **kwargs)

    return call  # type: ignore[return-value]


def computing_in_own_type(forward: F) -> F:
    """Make the `forward` of a module with a `device` run in :func:`settled`. A trace contains only what is needed of it."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            with explained("upscale", FREE), settled():
                return forward(self, *args, **kwargs)
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return run  # type: ignore[return-value]


# All threads share the caches of fake tensors.
_faking = threading.RLock()


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Within the block, operators of this thread return fake tensors and take neither time nor memory."""
    # Imported here, because it imports Triton if that is installed.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _faking, FakeTensorMode(allow_non_fake_inputs=True):
        yield


_left_alone: dict[Callable[..., Any], Callable[..., Any]] = {}


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which the compiler leaves uncompiled."""
    if function not in _left_alone:
        _left_alone[function] = torch._dynamo.disable(function, reason=TRACED)
    return _left_alone[function]
