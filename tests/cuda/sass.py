"""Instructions per output pixel and channel, or item, in the machine code of the fast paths, which no GPU is needed to count.

python tests/cuda/sass.py prints the tables of docs/operators.md. A fast path is the innermost loop of its kernel that reads or
writes vectors. A loop within it is for what is rare and does not count; nothing else branches, or both ways count, so that the
length is the most that a warp issues for the pixels or items of one turn.
"""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import builds
import compiled

ARCHS = tuple(arch for arch in ("80", "90", "120") if "FASTROUTE_TEST_ARCHS" not in os.environ or arch in compiled.ARCHS)
# What a lane writes in one turn: 4 rows of 3 channels, in packs of 16 bytes.
GROUP = 4 * 3 * 16


class FastPath(NamedTuple):
    """A kernel by its source and a pattern of the linker's name; how many pixels of a channel, or items, a lane writes or reads
    in a turn; the most instructions that a turn may take for each; and what is in no other loop."""

    name: str
    source: str
    pattern: str
    pixels: int
    most: float
    mark: str = r"\bSTG\b"


LOAD = r"\bLDG\S*128\b"
FAST_PATHS = (
    FastPath(
        "`stitch_patches`, pixels of a sub-pixel convolution by 4",
        "stitch_patches",
        r"copy_kernelI.*Half.*hLNS.*E2E",
        5 * GROUP,
        1.5,
    ),
    FastPath("`stitch_patches`, rows of pixels", "stitch_patches", r"copy_kernelI.*Half.*hLNS.*E1E", 2 * GROUP, 2.0),
    FastPath("`assign_classes` by penalty", "assign_classes", r"classes_vector_kernelI.*Half.*hLi2E", 8, 12.0),
    FastPath("`assign_classes` by budget, a pass", "assign_classes", r"classes_pass_kernelI.*HalfELi2E", 8, 100.0, LOAD),
)
DOUBLES = re.compile(r"\b(D(ADD|MUL|FMA|SETP)|MUFU\S*64H|F2F\S*F64\S*)\b")


def disassembler() -> str | None:
    """The toolkit's nvdisasm, or the one that comes with Triton."""
    beside = Path(builds.NVCC).with_name("nvdisasm") if builds.NVCC else None
    found = str(beside) if beside and beside.exists() else shutil.which("nvdisasm")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = triton.knobs.nvidia.nvdisasm.path
    return found


def reason() -> str | None:
    """Why nothing can be counted; None when it can."""
    return compiled.nvcc_reason(ARCHS) or (None if disassembler() else "nvdisasm was not found (CUDA toolkit or Triton)")


@cache
def disassembled(source: Path, arch: str) -> str:
    """Machine code of every kernel of one source, kept from run to run."""
    return builds.run([disassembler(), "-c", compiled.machine_code(source, arch)[0]])


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


def loops(lines: list[str]) -> list[range]:
    """Where all loops lie: from a label to a branch back to it."""
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if line.startswith(".L")}
    targets = [(n, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for n, line in enumerate(lines)]
    return [range(begin, n + 1) for n, target in targets if target and (begin := labels.get(target[1], n)) < n]


def turn(path: FastPath, arch: str) -> list[str]:
    """The instructions of a turn of the innermost loop that has the mark, without the loops within it."""
    code = functions(disassembled(builds.CSRC / "cuda" / f"{path.source}.cu", arch))
    (lines,) = (lines for name, lines in code.items() if re.search(path.pattern, name))
    found = loops(lines)
    own = min((loop for loop in found if any(re.search(path.mark, lines[n]) for n in loop)), key=len)
    inner = {n for loop in found if loop != own and loop.start >= own.start and loop.stop <= own.stop for n in loop}
    return [lines[n] for n in own if n not in inner and not lines[n].startswith(".L")]


def count(path: FastPath, arch: str) -> float:
    """The instructions of a turn per pixel and channel, or per item."""
    return len(turn(path, arch)) / path.pixels


def main() -> None:
    """Print the table."""
    print("| fast path | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |\n|---|" + "---:|" * len(ARCHS))
    for path in FAST_PATHS:
        print(f"| {path.name} | " + " | ".join(f"{count(path, arch):.2f}" for arch in ARCHS) + " |")


if __name__ == "__main__":
    main()
