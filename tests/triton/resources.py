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
sys.path.append(str(ROOT / "tests"))
from machine_code import functions, turn  # noqa: E402

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


def compiled(variant: Any, arch: int) -> Any:
    """`variant` for `arch`, as a launch with aligned tensors would have it; Triton's cache on disk keeps the result."""
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
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))


def tool(name: str, kernel: Any, *options: str) -> str:
    """What a tool that comes with Triton says of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_variant(variant: Any, arch: int) -> Resources:
    """What `variant` uses on `arch`."""
    kernel = compiled(variant, arch)
    text = tool("cuobjdump", kernel, "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, kernel.metadata.shared)


def copying(shuffle: int) -> Any:
    """The variant of `stitch_patches` that copies pixels of float16 as bytes."""
    types = {"patches": "*fp16", "out": "*u8"}
    (found,) = (
        variant
        for variant in variants("stitch_patches")
        if variant.kernel.__name__ == "stitch_patches_copy_kernel"
        and variant.constants["SHUFFLE"] == shuffle
        and variant.constants["CHANNELS"] == 3
        and all(variant.types[name] == kind for name, kind in types.items())
    )
    return found


def instructions_per_pixel(variant: Any, arch: int) -> float:
    """Of a variant that copies: instructions of a turn that stores whole vectors, per pixel and channel that a thread writes in
    it."""
    (lines,) = functions(tool("nvdisasm", compiled(variant, arch), "-c")).values()
    pixels = variant.constants["LANES"] * variant.constants["PACK"] * variant.constants["CHANNELS"]
    return len(turn(lines, r"\bSTG\.E\.128\b")) * 32 * variant.options["num_warps"] / pixels


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
