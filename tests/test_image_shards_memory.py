"""A large image through three workers: each stays within its memory, whatever the height, and the pixels are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastroute.files.joining import join

zarr = pytest.importorskip("zarr", minversion="3")
tifffile = pytest.importorskip("tifffile")
WORKERS, TILE = 3, 256
# The command, and the most memory that it held, in kB. What wait4 tells is that of the process which forked, if it is larger.
WORKER = """
from pathlib import Path
from fastroute.__main__ import main
try:
    main()
finally:
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def make_image(path: Path, height: int, width: int) -> None:
    """A tiled TIFF of smooth tiles among tiles of noise, of which no more than a tile is held."""
    flat = np.add.outer(np.arange(TILE) // 4, np.arange(TILE) // 4).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    noise = np.random.default_rng(0).integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
    count = -(-height // TILE) * -(-width // TILE)
    tiles = (noise if n % 5 == 0 else flat for n in range(count))
    layout = {"shape": (height, width, 3), "dtype": np.uint8, "tile": (TILE, TILE), "photometric": "rgb"}
    tifffile.imwrite(path, tiles, bigtiff=True, compression="zlib", **layout)


def upscale(source: Path, target: Path, workers: int) -> list[int]:
    """The largest resident memory of each of some workers, in bytes, which run side by side."""
    command = [sys.executable, "-c", WORKER, "upscale", str(source), str(target), "--budget", "0.8"]
    command += ["--no-tune", "--quiet", "--max-pixels", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "--shard", f"{number}/{workers}"], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(1, workers + 1)
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * workers
    join(target)
    return [int(text.split()[-1]) << 10 for text in said]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heights", "width", "most"),
    [((300, 600), 512, 0.75e9), pytest.param((2048, 32768), 32768, 1.5e9, marks=pytest.mark.soak)],
)
def test_memory_of_a_worker(tmp_path, heights, width, most):
    peaks = []
    for height in heights:
        make_image(tmp_path / "in.tif", height, width)
        peaks.append(max(upscale(tmp_path / "in.tif", tmp_path / "three.zarr", WORKERS)))
        print(f"{width} x {height}: {peaks[-1] / 1e6:.0f} MB in the worker that took most")
    assert max(peaks) < most
    upscale(tmp_path / "in.tif", tmp_path / "one.zarr", 1)
    one, three = (zarr.open_array(str(tmp_path / f"{name}.zarr"), mode="r") for name in ("one", "three"))
    assert one.shape == three.shape == (4 * heights[-1], 4 * width, 3)
    step = three.shards[0]
    for top in range(0, one.shape[0], step):
        assert np.array_equal(one[top : top + step], three[top : top + step])
