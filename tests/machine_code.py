"""Reading what nvdisasm prints of machine code."""

from __future__ import annotations

import re

# Stores into global memory.
STORES = r"\bSTG\b"


def functions(text: str) -> dict[str, list[str]]:
    """Instructions and labels of every function by its linker's name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if name := re.match(r"\s*\.text\.(\w+):", line):
            lines = found.setdefault(name[1], [])
        elif match := re.match(r"\s*(\.L_x_\d+:|/\*[0-9a-f]{4,}\*/\s+[^;]*)", line):
            lines.append(match[1])
    return found


def turn(lines: list[str], mark: str = STORES) -> list[str]:
    """The instructions of a turn of the innermost loop that has the mark, without those of loops within it."""
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if line.startswith(".L")}
    targets = [(n, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for n, line in enumerate(lines)]
    # From a label to a branch back to it.
    loops = [range(begin, n + 1) for n, target in targets if target and (begin := labels.get(target[1], n)) < n]
    own = min((loop for loop in loops if any(re.search(mark, lines[n]) for n in loop)), key=len)
    inner = {n for loop in loops if loop != own and loop.start >= own.start and loop.stop <= own.stop for n in loop}
    return [lines[n] for n in own if n not in inner and not lines[n].startswith(".L")]
