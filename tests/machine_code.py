"""Reading what nvdisasm prints of machine code."""

from __future__ import annotations

import re


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


def turns(lines: list[str]) -> list[list[str]]:
    """The bodies of all loops: from a label to a branch back to it."""
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if line.startswith(".L")}
    loops = []
    for n, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], n) < n:
            loops.append([line for line in lines[labels[target[1]] : n + 1] if not line.startswith(".L")])
    return loops


def storing_turn(lines: list[str], store: str = "STG") -> int:
    """Instructions of a turn of the shortest loop that stores."""
    return min(len(loop) for loop in turns(lines) if any(store in line for line in loop))
