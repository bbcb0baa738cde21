"""What the Triton kernels use of a GPU, found by compiling them without one.

python tests/triton/resources.py [op ...]     prints the table
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "fastroute" / "triton"
OPS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@dataclass(frozen=True)
class Resources:
    """Of one kernel for one architecture: registers per thread, bytes of local memory (spills), bytes of shared memory."""

    registers: int
    local: int
    shared: int


def variants(op: str) -> Iterator[Any]:
    """The variants that the file of `op` names."""
    yield from importlib.import_module(f"fastroute.triton.{op}").variants()


def describe(variant: Any) -> str:
    """A variant in one line: kernel, types of its pointers, constants and options."""
    types = [f"{name}:{t}" for name, t in variant.signature.items() if t != "constexpr" and t not in ("i32", "*i64")]
    settings = [f"{name}={value}" for name, value in {**variant.constants, **variant.options}.items() if value is not None]
    return " ".join([variant.kernel.__name__, *types, *settings])


def compile_variant(variant: Any, arch: int) -> Resources:
    """Compile for `arch`, as a launch with aligned tensors would; Triton's cache on disk keeps the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    anywhere = variant.kernel.do_not_specialize_on_alignment
    pointers = [i for i, name in enumerate(names) if variant.signature[name].startswith("*") and name not in anywhere]
    source = ASTSource(
        variant.kernel,
        variant.signature,
        dict(variant.constants),
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, compiled.metadata.shared)


def main(ops: list[str]) -> None:
    """Print the table of `ops`."""
    print("| kernel and variant | arch | registers | local bytes | shared bytes |\n|---|---|---|---|---|")
    for op in ops:
        for variant in variants(op):
            for arch in variant.archs:
                used = compile_variant(variant, arch)
                print(f"| {describe(variant)} | sm_{arch} | {used.registers} | {used.local} | {used.shared} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or OPS)
