"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from fastroute._extras import remedy

# The variable that limits what Ray's C++ code prints.
BACKEND_LOG = "RAY_BACKEND_LOG_LEVEL"
STDERR = 2


class ClusterError(RuntimeError):
    """A Ray cluster cannot be reached, or cannot run the workers. The message gives the reason."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A connection to a Ray cluster while the block lasts, unless there is one already. Ray prints errors only.

    Args:
        address: address of the cluster. By default the one that ``RAY_ADDRESS`` names or the one that runs on this machine; if
            there is none, one of this machine alone is started.

    Raises:
        ImportError: Ray is missing.
        ClusterError: there is no such cluster, or it has other versions of Ray or Python.
    """
    ray = imported()
    if ray.is_initialized():
        yield
        return
    data = logging.getLogger("ray.data")
    level = data.level
    try:
        with _quiet_backend():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cannot connect to Ray at {address or 'this machine'}: {cause_of(error)}") from error
    data.setLevel(logging.ERROR)
    try:
        yield
    finally:
        data.setLevel(level)
        ray.shutdown()


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Where Ray starts in the block, its C++ code prints nothing: it would tell of this very setting, and of usual restarts."""
    given = os.environ.get(BACKEND_LOG)
    os.environ.setdefault(BACKEND_LOG, "fatal")
    with ExitStack() as restoring:
        # A program may run without the stream.
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            kept = os.dup(STDERR)
            restoring.callback(os.close, kept)
            restoring.callback(os.dup2, kept, STDERR)
            os.dup2(nowhere.fileno(), STDERR)
        try:
            yield
        finally:
            if given is None:
                del os.environ[BACKEND_LOG]


def imported() -> Any:
    """The module of Ray.

    Raises:
        ImportError: it is missing, or damaged.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"a cluster needs Ray, which cannot be imported ({error}): {remedy('ray')}") from error
    return ray


def cause_of(error: BaseException) -> str:
    """The last line of an error that came from another machine with its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
