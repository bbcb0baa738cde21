"""Packages that only some features need, which are installed with an extra of this one."""

from __future__ import annotations


def remedy(extra: str) -> str:
    """What somebody who lacks the packages of `extra` is told to do."""
    return f'run pip install ".[{extra}]" in a copy of the source'
