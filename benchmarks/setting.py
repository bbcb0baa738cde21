"""How a run of the suite was asked for: smoke or real, with which limits, and where its results go."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure

# Seconds that one benchmark may spend in torch.compile; what comes later says why it is missing.
COMPILE_SECONDS = 15.0


@functools.cache
def set_up_compiler() -> None:
    """What the first compilation of a process takes beside its own counts for none."""
    torch.compile(lambda x: x + 1)(torch.zeros(8, device=measure.device()))


@dataclass
class Setting:
    """What the command line asked for.

    Attributes:
        smoke: small sizes and few rounds: does everything run and agree?
        full: all sizes, batches and photographs, and no limit on compilations.
        results: folder to write to; None writes nothing.
        compiled_seconds: spent in compilations so far.
        compiled_enough: why nothing more is compiled without `full`, whatever the time, if so.
    """

    smoke: bool = False
    full: bool = False
    results: Path | None = None
    compiled_seconds: float = 0.0
    compiled_enough: str | None = None

    def save(self, name: str, rows: list[dict], notes: str) -> None:
        """Keep what was measured, where that was asked for."""
        if self.results is not None:
            print(f"\n{measure.save(name, rows, notes, self.results)}", flush=True)

    def compile_reason(self) -> str | None:
        """Why nothing more is compiled, if so."""
        if self.smoke:
            return "compilation takes too long for a smoke run"
        if self.full:
            return None
        if self.compiled_enough is None and self.compiled_seconds > COMPILE_SECONDS:
            return f"compilations took the {COMPILE_SECONDS:.0f} s that one benchmark has for them; --full lifts the limit"
        return self.compiled_enough

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count the time of the block as compilation."""
        set_up_compiler()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.compiled_seconds += time.perf_counter() - begin

    def compiled(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any] | str:
        """A call of `torch.compile(function)` with these arguments, compiled by a first one; or why there is none."""
        reason = self.compile_reason()
        if reason is not None:
            return reason
        torch.compiler.reset()
        quick = torch.compile(function, dynamic=False)
        try:
            with self.compiling():
                quick(*args)
        except RuntimeError as error:
            return f"does not compile: {str(error).splitlines()[0]}"
        return lambda: quick(*args)
