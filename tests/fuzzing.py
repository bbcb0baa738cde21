"""Files damaged at random, read in a process that measures what each of them costs.

Run as a script, it reads files from `first` to `last` of a campaign, through both readers, and prints a line for each that
raised something else than an ImageError, took long or much memory, and at the end how many were read and refused.
"""

from __future__ import annotations

import logging
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from every_format import make_all

from fastroute import io
from fastroute.io.read import open_picture

# Of the processor: the machine may be busy.
MOST_SECONDS, MOST_BYTES = 10.0, 1 << 30
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(seeds: list[bytes], number: int) -> bytes:
    """The damaged file of this number: changed, cut, doubled or spliced bytes, most of them near the beginning."""
    rng = random.Random(number)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if len(data) < 16:
            break
        reach = min(len(data), rng.choice((32, 128, 512, len(data))))
        at, action = rng.randrange(reach), rng.randrange(7)
        if action == 0:
            data[at] = rng.randrange(256)
        elif action == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            width = rng.choice((1, 2, 4))
            value = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
            data[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        elif action == 3:
            del data[rng.randrange(len(data)) :]
        elif action == 4:
            del data[at : at + rng.randrange(1, 64)]
        elif action == 5:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        else:
            other = rng.choice(seeds)
            data[at : at + 32] = other[at : at + 32]
    return bytes(data)


def read_both(path: Path) -> str:
    """Read a file whole and in bands; tells what each of them did."""
    ends = []
    try:
        io.read_picture(path)
        ends.append("read")
    except io.ImageError:
        ends.append("refused")
    try:
        with open_picture(path) as opened:
            for y in range(0, opened.height, 64):
                opened.read(y, min(y + 64, opened.height), 0, opened.width)
                if y > 4096:
                    break
        ends.append("read")
    except io.ImageError:
        ends.append("refused")
    io.is_image(path)
    return "/".join(ends)


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def main(first: int, last: int, folder: Path) -> None:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    cases = make_all()
    seeds = [case.data for case in cases.values()]
    # Some libraries end the process on damaged files, or never: who started it sees the number of the last file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ends: dict[str, int] = {}
    path = folder / f"damaged-{first}"
    for case in cases.values():
        path.write_bytes(case.data)
        read_both(path)
    for number in range(first, last):
        print(f"at {number}", flush=True)
        path.write_bytes(mutate(seeds, number))
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak(), time.process_time()
        try:
            end = read_both(path)
        except Exception:
            end = "raised"
            print(f"RAISED {number}: {traceback.format_exc()}", flush=True)
        seconds, grown = time.process_time() - start, peak() - before
        if seconds > MOST_SECONDS:
            print(f"SLOW {number}: {seconds:.1f} s", flush=True)
        if grown > MOST_BYTES:
            print(f"LARGE {number}: {grown >> 20} MiB", flush=True)
        ends[end] = ends.get(end, 0) + 1
    print(f"END {ends}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
