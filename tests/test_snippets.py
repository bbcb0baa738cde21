"""The Python of the README has types that mypy accepts: no wrong argument names, no attributes that do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, examples

README = [example for example in examples(ROOT / "README.md") if example.language == "python"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy finds out about torch, which takes most of the time, serves all tests."""
    return tmp_path_factory.mktemp("mypy")


def findings(code: str, folder: Path, cache: Path) -> str:
    """What mypy says about `code` under the project's settings; empty where it finds nothing."""
    path = folder / "snippet.py"
    path.write_text(code, "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-error-summary"]
    # The code of the package has its own check, in `make lint`.
    command += ["--follow-imports", "silent", "--cache-dir", cache, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_readme_passes_mypy(tmp_path: Path, cache: Path):
    # In order, in one module, as one would paste them. Lines of an error are those of the README.
    lines: list[str] = []
    for example in README:
        lines += [""] * (example.line - 1 - len(lines)) + example.text.splitlines()
    assert README
    assert findings("\n".join(lines) + "\n", tmp_path, cache) == ""


@pytest.mark.slow
def test_mypy_notices_what_is_wrong(tmp_path: Path, cache: Path):
    wrong = {
        "router.upscale(image, bugdet=0.7)": 'Unexpected keyword argument "bugdet"',
        "router.upscale(image, budget='half')": 'has incompatible type "str"',
        "fastroute.load(scales=4)": 'Unexpected keyword argument "scales"',
        "result.picture": 'has no attribute "picture"',
        "fastroute.lod()": 'has no attribute "lod"',
    }
    text = README[0].text
    found = findings("\n".join([text, *wrong]) + "\n", tmp_path, cache)
    for number, message in enumerate(wrong.values(), start=len(text.splitlines()) + 1):
        assert any(f"snippet.py:{number}: " in line and message in line for line in found.splitlines()), found
