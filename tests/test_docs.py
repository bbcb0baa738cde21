"""The README and the pages of docs/: every example runs, and the site that is built of them works in a browser."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import chromium, images_loaded, visit
from click.testing import CliRunner
from networks import random_classsr, randomise

from fastroute import io
from fastroute.cli import main
from fastroute.models.compact import Compact
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.rrdbnet import RRDBNet

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# Training that shows that a command runs, not a network: the last value of an option counts.
SHORT = {
    "classsr": "--branch-steps 1,1,1 --classifier-steps 1 --joint-steps 1 --routing-steps 1 --batch 2",
    "cdnsr": "--branch-steps 1,1,1 --classifier-steps 1 --joint-steps 1 --set distill-steps=1 --batch 2",
    "arm": "--set steps=1 --batch 2",
    "pcsr": "--set heavy-steps=1 --set light-steps=1 --batch 2",
}


@dataclass(frozen=True)
class Example:
    """A block of code.

    Attributes:
        line: where it begins in the page.
        language: "python" or "sh".
    """

    line: int
    language: str
    text: str


def examples(page: Path) -> list[Example]:
    """Fenced blocks of Python and shell, and indented commands, in order."""
    found: list[Example] = []
    fence, start, block = "", 0, []
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if match := re.fullmatch(r"```(\S*).*", line):
            if fence:
                if fence in ("python", "sh"):
                    found.append(Example(start, fence, "\n".join(block)))
                fence = ""
            else:
                fence, start, block = match[1] or "text", number + 1, []
        elif fence:
            block.append(line)
        elif line.startswith("    fastroute "):
            found.append(Example(number, "sh", line.strip()))
    assert not fence, f"{page.name}: the block of line {start} has no end"
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that examples name, into which no page of documentation is written."""
    sample = io.read_image(ROOT / "assets" / "sample.png")
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "sample.png", tmp_path / "assets")
    io.write_image(tmp_path / "photo.jpg", sample[:, 150:250, 200:328].contiguous())
    photos = tmp_path / "my-photos"
    photos.mkdir()
    for number, left in enumerate((0, 160)):
        io.write_image(photos / f"{number}.png", sample[:, 100:292, left : left + 192].contiguous())
    shutil.copytree(photos, tmp_path / "other-photos")
    pcsr = randomise(PCSR.build(FSRCNN(8, upsample=False), [[4], [24, 24]], [4]))
    torch.save(pcsr.state_dict(), tmp_path / "pcsr-carn-x4.pth")
    for name, network in (("realesrgan-x4plus", RRDBNet(8, 1, 8)), ("realesr-animevideov3-x4", Compact(8, 1))):
        torch.save({"params": network.state_dict()}, tmp_path / f"{name}.pth")
    torch.save(random_classsr(patch=32).state_dict(), tmp_path / "my-checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(text: str) -> None:
    """One line of a shell block; only commands of the package can be judged here."""
    words = shlex.split(text, comments=True)
    if words[:1] != ["fastroute"]:
        return
    if words[1] == "train":
        words += shlex.split(SHORT[words[2].partition("-")[0]])
    if words[1] == "distill":
        words += shlex.split("--minutes 0.01 --visits 1 --batch 1")
    if words[1] == "compare":
        words += ["--runs", "1"]
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{text}\n{result.output}"


def test_there_are_examples():
    number = {page.name: len(examples(page)) for page in PAGES}
    assert number["README.md"] >= 3 and number["index.md"] >= 3 and sum(number.values()) >= 30


@pytest.mark.slow
@pytest.mark.usefixtures("folder", "quick_tuning")
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem)
def test_examples_run(page, monkeypatch):
    """In order, in one namespace, as one would paste them."""
    # Captures the same graphs without a minute of C++ compilation; what is packaged ahead of time is compiled in full.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for example in examples(page):
        if example.language == "sh":
            for line in example.text.replace("\\\n", " ").splitlines():
                run_command(line)
            continue
        # Lines of an error are those of the page.
        code = compile("\n" * (example.line - 1) + example.text, str(page), "exec")
        exec(code, namespace)


def test_examples_that_fail_are_noticed(folder, monkeypatch):
    page = folder / "page.md"
    page.write_text("```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n\n    fastroute upscal a b\n")
    assert [(e.line, e.language) for e in examples(page)] == [(2, "python"), (8, "python"), (11, "sh")]
    with pytest.raises(AssertionError):
        test_examples_run(page, monkeypatch)
    with pytest.raises(AssertionError, match="No such command"):
        run_command(examples(page)[2].text)


def test_the_readme_is_short():
    """Its generated table counts, HTML comments do not."""
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 1500
    code = [example.text for example in examples(ROOT / "README.md") if example.language == "python"]
    assert 1 <= sum(len(text.splitlines()) for text in code) <= 20


def test_what_the_pages_name_exists():
    """Links between pages and to files."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in (DOCS / "figures").iterdir()) < 500_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it; a warning is an error."""
    pytest.importorskip("furo", reason="the extra docs is not installed")
    target = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", target / "doctrees"]
    result = subprocess.run(
        [*command, DOCS, target / "html"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return target / "html"


class Resources(HTMLParser):
    """What a page loads: scripts, styles, images and frames, but not what it merely links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found += [values[name] for name in ("src", "srcset") if values.get(name)]
        if tag == "link" and values.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.found.append(values["href"])


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        parser = Resources()
        parser.feed(page.read_text("utf-8"))
        assert parser.found
        for address in parser.found:
            assert "//" not in address, f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]*)|@import\s+['\"]([^'\"]*)", style.read_text("utf-8"))
        assert all(not "".join(a).startswith(("http", "//")) for a in addresses), style.name


@pytest.mark.slow
def test_every_operator_is_documented(site):
    from fastroute.diagnostics import operators

    text = (site / "operators.html").read_text("utf-8")
    for op in operators():
        assert f'id="fastroute.{op}"' in text
    assert text.count("<strong>CUDA-graph safe:</strong>") == len(operators())


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.slow
def test_the_site_in_a_browser(browser, site):
    """Every page: no complaint, no stray request, all images; and no wider than a phone."""
    pictures = 0
    with visit(browser, site / "index.html", site, width=390, height=800) as seen:
        for page in PAGES[1:]:
            seen.page.goto((site / f"{page.stem}.html").as_uri())
            pictures += images_loaded(seen.page)
            assert seen.page.locator("article h1").count() == 1
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390, page.name
    assert pictures >= 5


@pytest.mark.slow
def test_the_search_of_the_site(browser, site):
    with visit(browser, site / "search.html", site) as seen:
        seen.page.goto((site / "search.html").as_uri() + "?q=stitch_patches")
        seen.page.wait_for_selector("#search-results li a")
        assert "operators.html" in seen.page.eval_on_selector("#search-results li a", "link => link.href")
