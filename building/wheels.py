"""`make wheels`: one wheel for CPUs and one for each major version of CUDA whose nvcc is here, audited.

Each serves every version of Python and every torch from the oldest that is supported: the operators use LibTorch's stable
ABI, as torch-abi-audit confirms, and auditwheel gives the wheel the tag of the oldest glibc that it runs on. The wheel for CPUs
bears the plain version, as PyPI wants; the others a local one, such as 0.1.0+cu13, for an index of one's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from toolchain import nvcc_version

ROOT = Path(__file__).resolve().parents[1]
# What torch brings along. Everything else that a wheel needs must be of every Linux.
OF_TORCH = ("libtorch*.so", "libc10*.so")


def nvccs(homes: Iterable[Path]) -> dict[str, Path]:
    """The newest nvcc of each major version of CUDA, below the folders `homes`."""
    found: dict[str, tuple[tuple[int, ...], Path]] = {}
    for nvcc in (home / "bin" / "nvcc" for home in homes):
        if nvcc.is_file():
            version = tuple(map(int, nvcc_version(str(nvcc)).split(".")))
            found[str(version[0])] = max(found.get(str(version[0]), (version, nvcc)), (version, nvcc))
    return {major: nvcc for major, (_, nvcc) in sorted(found.items())}


def build(nvcc: Path | None, major: str, to: Path) -> Path:
    """Build, tag and audit a wheel, for CPUs without `nvcc`; the file in `to`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "FASTROUTE_BUILD_CUDA": "0", "FASTROUTE_PYTHON_MODULE": "0", "PATH": path}
    if nvcc:
        environment |= {"FASTROUTE_BUILD_CUDA": "1", "CUDACXX": str(nvcc), "FASTROUTE_LOCAL_VERSION": f"cu{major}"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def run(*command: str) -> None:
            subprocess.run(command, env=environment, check=True)

        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        run(*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder / "built"), str(ROOT))
        (wheel,) = (folder / "built").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("fastroute/_ops.so", folder)
        run("torch-abi-audit", "--check", "both", str(folder / "fastroute" / "_ops.so"))
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        run("auditwheel", "repair", *excluded, "--wheel-dir", str(folder / "tagged"), str(wheel))
        (tagged,) = (folder / "tagged").glob("*.whl")
        if "-py3-none-manylinux" not in tagged.name:
            raise SystemExit(f"{tagged.name} is not for every version of Python and every Linux")
        to.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(tagged, to))


def main() -> None:
    """Build the wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"))]
    parser.add_argument("--cuda", type=Path, nargs="*", default=usual, help="folders of CUDA toolkits; none: only for CPUs")
    parser.add_argument("--to", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    built = [build(None, "", options.to)]
    built += [build(nvcc, major, options.to) for major, nvcc in nvccs(options.cuda).items()]
    print(*built, sep="\n")


if __name__ == "__main__":
    main()
