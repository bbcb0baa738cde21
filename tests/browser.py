"""Pages in a headless Chromium, for tests; they are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page of playwright, what it complained of, and the addresses outside its own folder that it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; starting it takes a second, so that a module's tests share one."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium is installed, under none of the names {', '.join(NAMES)}")
    with api.sync_playwright() as playwright:
        # As root, in a container, its sandbox cannot be set up.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, path: Path, home: Path | None = None, width: int = 1280, height: int = 900) -> Iterator[Visit]:
    """Open a file in a window of that size; at the end there must be no complaint and no request outside `home`."""
    page = browser.new_page(viewport={"width": width, "height": height})
    seen = Visit(page)
    inside = (path.parent if home is None else home).resolve().as_uri()

    def note(request: Any) -> None:
        if not request.url.startswith((inside, "data:")):
            seen.strays.append(request.url)

    page.on("request", note)
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda request: seen.complaints.append(f"failed: {request.url[:200]}"))
    try:
        page.goto(path.resolve().as_uri())
        yield seen
    finally:
        page.close()
    assert seen.strays == [] and seen.complaints == []


def images_loaded(page: Any) -> int:
    """How many images the page has; every one must have arrived, and have a text in its place."""
    images = page.eval_on_selector_all("img", "found => found.map(i => [i.complete && i.naturalWidth > 0, i.alt, i.src])")
    for loaded, alt, source in images:
        assert loaded and alt, source[:200]
    return len(images)
