"""The container recipe, without a container engine: what it states, and its commands in folders that stand for its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mixed_files import ramp
from PIL import Image

from fastroute import io

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "Containerfile"
VARIANTS = ("cpu", "cuda")
# What a recipe's own folders are, outside of a container.
FOLDERS = ("/source", "/build", "/wheels", "/opt/fastroute", "/data", "/cache")
# Commands that change the system around them, or fetch what the tests have.
SYSTEM = ("apt-get ", "useradd ")


@dataclass
class Stage:
    """A FROM and what follows it: instructions and their arguments."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(variant: str) -> list[Stage]:
    """The stages of a variant, in order, each with all that it builds on."""
    lines = [line for line in RECIPE.read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["ARG VARIANT=cpu", "ARG TORCH_INDEX="]
    found: list[Stage] = []
    for line in lines[2:]:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.replace("${VARIANT}", variant).partition(" AS ")
            earlier = [stage for stage in found if stage.name == base]
            found.append(Stage(earlier[0].base, name, list(earlier[0].steps)) if earlier else Stage(base, name))
        else:
            found[-1].steps.append((word, rest.strip()))
    return found


def ends(variant: str) -> tuple[Stage, Stage]:
    """The stage that builds the wheel, and the result."""
    every = stages(variant)
    return next(stage for stage in every if stage.name == "build"), every[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_versions_are_pinned(variant):
    pinned = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for stage in ends(variant):
        assert re.fullmatch(r"(\w+/)?\w+:\d[\w.-]+", stage.base)
        torch = [rest for _, rest in stage.steps if "torch" in rest and rest.startswith("/")]
        assert len(torch) == 1 and torch[0].endswith(f' {pinned[1]} ${{TORCH_INDEX:+--index-url "$TORCH_INDEX"}}')
        assert ("ARG", "TORCH_INDEX") in stage.steps
    assert ("devel" in ends(variant)[0].base) == (variant == "cuda")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_is_root_and_no_compiler_is_left(variant):
    _, result = ends(variant)
    assert [rest for word, rest in result.steps if word == "USER"] == ["fastroute"]
    assert [word for word, _ in result.steps][-3:] == ["USER", "ENTRYPOINT", "CMD"]
    assert not [rest for _, rest in result.steps if "g++" in rest or "devel" in rest]
    assert "useradd --create-home fastroute" in " ".join(rest for _, rest in result.steps)


def test_the_build_has_what_it_needs():
    build, _ = ends("cpu")
    text = (ROOT / "pyproject.toml").read_text()
    needed = set(re.findall(r'"([\w]+)', re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)[1]))
    fetched = {re.match(r"[\w]+", word)[0] for _, rest in build.steps if " pip install" in rest.replace("/", " ") for word in
               re.findall(r'(?<=[ "])[a-z]\w*(?:==[\d.]+|>=\d+)?(?=[" ]|$)', rest.partition("--no-cache-dir")[2])}  # fmt: skip
    assert needed <= fetched
    copied = [name for word, rest in build.steps if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"csrc", "fastroute", "setup.py", "pyproject.toml", *re.findall(r'^readme = "(.*)"$', text, re.MULTILINE)} <= set(
        copied
    )


def test_the_documentation_tells_the_same():
    told = (ROOT / "docs" / "clusters.md").read_text()
    commands = [line.removeprefix("#     ") for line in RECIPE.read_text().splitlines() if line.startswith("#     podman")]
    assert len(commands) == 3 and all(command in told for command in commands)


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """Everything but packages of the system and downloads; without the extension, which takes minutes."""
    root, installed = tmp_path / "root", sysconfig.get_paths()["purelib"]
    for name in FOLDERS[:1] + FOLDERS[4:5]:
        (root / name[1:]).mkdir(parents=True)

    def moved(text: str) -> str:
        return re.sub(rf"(?<![\w.])({'|'.join(FOLDERS)})(?![\w])", lambda found: f"{root}{found[1]}", text)

    variables = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "FASTROUTE_NO_EXTENSION": "1"}
    variables.pop("PYTHONPATH", None)
    build, result = ends("cpu")
    for stage in (build, result):
        # The build finds what the tests have; the result has only what it installs.
        given = {**variables, **({"PYTHONPATH": installed} if stage is build else {"PIP_NO_DEPS": "1"})}
        place = root
        for word, rest in stage.steps:
            if word in ("ENV", "ARG"):
                for text in rest.split():
                    name, _, value = text.partition("=")
                    given[name] = os.path.expandvars(moved(value))
            elif word == "WORKDIR":
                place = Path(moved(rest))
            elif word == "COPY" and not rest.startswith("--from"):
                *names, target = rest.split()
                for name in names:
                    source = place / name if target == "./" else place / target
                    source.symlink_to(ROOT / name)
            elif word == "RUN":
                assert not rest.startswith("--")
                kept = [part for part in rest.split(" && ") if not part.startswith(SYSTEM)]
                if not kept or (stage is result and "torch==" in rest):
                    continue
                command = moved(" && ".join(kept)).replace("python3 -m venv", f"{sys.executable} -m venv")
                done = subprocess.run(
                    ["bash", "-c", command], cwd=place, env=given, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    steps = dict(result.steps)
    run = {**given, "PYTHONPATH": installed, "PATH": f"{root}/opt/fastroute/bin:{os.environ['PATH']}"}
    (place / "my-photos").mkdir()
    Image.fromarray(ramp(8, 12)).save(place / "my-photos" / "a.png")
    entry = [*json.loads(steps["ENTRYPOINT"]), "upscale", "my-photos", "photos-x4/", "--quiet"]
    subprocess.run(entry, cwd=place, env=run, check=True)
    assert io.read_image(place / "photos-x4" / "a.png").shape == (3, 32, 48)
    shown = subprocess.run(
        [*json.loads(steps["ENTRYPOINT"]), *json.loads(steps["CMD"])], cwd=place, env=run, capture_output=True
    )
    assert b"upscale" in shown.stdout
    where = [f"{root}/opt/fastroute/bin/python", "-c", "import fastroute; print(fastroute.__file__)"]
    assert subprocess.run(where, cwd=place, env=run, capture_output=True, text=True).stdout.startswith(f"{root}/opt/fastroute/")
    assert (root / "cache").stat().st_mode & 0o7777 == 0o1777
