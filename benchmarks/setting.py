"""How a run of the suite was asked for: smoke or real, with which limits, and where its results go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure

# Seconds that one benchmark may spend in torch.compile; what comes later says why it is missing.
COMPILE_SECONDS = 25.0


@dataclass
class Setting:
    """What the command line asked for.

    Attributes:
        smoke: small sizes and few rounds: does everything run and agree?
        full: no limit on compilations, nor on the number of photographs.
        results: folder to write to; None writes nothing.
        compiled_seconds: spent in compilations so far.
    """

    smoke: bool = False
    full: bool = False
    results: Path | None = None
    compiled_seconds: float = 0.0

    def save(self, name: str, rows: list[dict], notes: str) -> None:
        """Keep what was measured, where that was asked for."""
        if self.results is not None:
            print(f"\n{measure.save(name, rows, notes, self.results)}", flush=True)

    def compile_reason(self) -> str | None:
        """Why nothing more is compiled, if so."""
        if self.smoke:
            return "compilation takes too long for a smoke run"
        if not self.full and self.compiled_seconds > COMPILE_SECONDS:
            return f"compilations took the {COMPILE_SECONDS:.0f} s that one benchmark has for them; --full lifts the limit"
        return None

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count the time of the block as compilation."""
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
