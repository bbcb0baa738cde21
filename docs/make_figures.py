"""Draws the pictures in docs/figures. Run it from anywhere, with the package installed: ``python docs/make_figures.py``.

The class map of pixels needs published weights, in the folder that FASTROUTE_DATA names; without it that one is left as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageDraw

import fastroute
from fastroute import io
from fastroute.visualize import OPACITY, class_colours, class_overlay

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"
SAMPLE = HERE.parent / "assets" / "sample.png"
GREEN, YELLOW, RED = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in class_colours(3).tolist())
INK, SOFT, PAPER = "#1b1f24", "#57606a", "#f6f8fa"
# Pixels of SVG: height of a box, of a line of text, and the size of its letters.
BOX, LINE, LETTERS = 52, 17, 13
# How much stronger than they are the deviations from a flat colour are shown.
AMPLIFIED = 8
# Width of a photograph in the pages.
PHOTO_WIDTH = 700


class Drawing:
    """An SVG on white paper."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, text: str, fill: str = PAPER, height: float = BOX) -> None:
        """A box with its text, of several lines, in the middle."""
        self.rect(x, y, width, height, fill, 5)
        lines = text.split("\n")
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + (number - (len(lines) - 1) / 2) * LINE, line, bold=number == 0)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, round_by: int = 0, opacity: float = 1) -> None:
        """A rectangle with a border."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{round_by}" fill="{fill}" fill-opacity="{opacity}" '
            f'stroke="{INK}"/>'
        )

    def text(self, x: float, y: float, text: str, bold: bool = False, anchor: str = "middle", colour: str = INK) -> None:
        """Text whose middle lies at y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="central" fill="{colour}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last one."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>')

    def write(self, name: str) -> None:
        """Write docs/figures/`name`."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, DejaVu Sans, sans-serif" font-size="{LETTERS}">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>\n'
        )
        (FIGURES / name).write_text(head + "\n".join(self.parts) + "\n</svg>\n")


def patch_path() -> None:
    """From image to image on the patch path."""
    d = Drawing(810, 292, "The patch path: classify, assign, merge, group, extract in class order, a branch per class, stitch")
    for x, text in ((10, "image\n(C, H, W)"), (160, "classify\na score per class"), (310, "assign_classes\nbudget, penalty"),
                    (460, "merge_regions\nof one class"), (610, "group_by_class\norder, inverse")):  # fmt: skip
        d.box(x, 14, 130, text)
    for x in (140, 290, 440, 590):
        d.arrow((x, 40), (x + 20, 40))
    d.box(160, 144, 130, "extract_patches\nin class order")
    for number, (y, fill) in enumerate(((92, GREEN), (144, YELLOW), (196, RED)), start=1):
        d.box(415, y, 130, f"branch {number}\n{('cheapest', '', 'most expensive')[number - 1]}".strip(), "#fff", 46)
        d.rect(415, y, 10, 46, fill)
        d.arrow((290, 170), (352, 170), (352, y + 23), (415, y + 23))
        d.arrow((545, y + 23), (607, y + 23), (607, 170), (670, 170))
    d.box(670, 144, 130, "stitch_patches\noverlaps merged")
    d.arrow((75, 66), (75, 170), (160, 170))
    # Where order and inverse go.
    d.arrow((645, 66), (645, 80), (225, 80), (225, 144))
    d.arrow((700, 66), (700, 144))
    d.text(232, 108, "order", anchor="start", colour=SOFT)
    d.text(707, 108, "inverse", anchor="start", colour=SOFT)
    d.arrow((735, 196), (735, 228))
    d.box(670, 230, 130, "image\n(C, H·s, W·s)")
    d.write("patch-path.svg")


def pixel_path() -> None:
    """From image to image on the pixel path."""
    d = Drawing(720, 250, "The pixel path: encode once, classify every output pixel, an MLP per class, refine")
    d.box(10, 14, 120, "image\n(C, h, w)")
    d.box(160, 14, 130, "encoder\nfeatures (D, h, w)")
    d.box(320, 14, 150, "pixel_mlp\nclassifier")
    d.box(500, 14, 200, "assign_classes\nor adaptive_threshold")
    for a, b in ((130, 160), (290, 320), (470, 500)):
        d.arrow((a, 40), (b, 40))
    d.box(260, 118, 250, "pixel_mlp\nthe MLP of each pixel's class", height=58)
    d.rect(260, 118, 10, 29, GREEN)
    d.rect(260, 147, 10, 29, RED)
    d.arrow((225, 66), (225, 132), (260, 132))
    d.text(218, 100, "features", anchor="end", colour=SOFT)
    d.arrow((70, 66), (70, 162), (260, 162))
    d.text(77, 148, "bilinear residual", anchor="start", colour=SOFT)
    d.arrow((600, 66), (600, 92), (420, 92), (420, 118))
    d.text(430, 104, "class map (H, W)", anchor="start", colour=SOFT)
    d.box(550, 121, 150, "refine_boundaries\nmends the seams")
    d.arrow((510, 147), (550, 147))
    d.arrow((650, 66), (650, 121))
    d.box(550, 190, 150, "image\n(C, H, W)")
    d.arrow((625, 173), (625, 190))
    d.write("pixel-path.svg")


def tiles() -> None:
    """Where patches lie, and what grouping does to them."""
    d = Drawing(720, 260, "Patches overlap; the last row and column are shifted inward; grouping makes one batch per class")
    classes = [[0, 0, 1, 2], [0, 2, 2, 1], [0, 0, 1, 0]]
    patch, origins, rows = 70, (0, 58, 116, 150), (0, 58, 98)
    d.text(125, 18, "patches in the image", bold=True)
    for i, y in enumerate(rows):
        for j, x in enumerate(origins):
            d.rect(15 + x, 36 + y, patch, patch, (GREEN, YELLOW, RED)[classes[i][j]], opacity=0.45)
    for i, y in enumerate(rows):
        for j, x in enumerate(origins):
            # The part that no earlier patch covers is the one that a number can stand in.
            d.text(15 + x + 46, 36 + y + 50, str(i * 4 + j), bold=True)
    d.text(15, 226, "the last row and column are shifted inward,", anchor="start", colour=SOFT)
    d.text(15, 243, "so that every pixel is covered", anchor="start", colour=SOFT)
    d.arrow((256, 120), (300, 120))
    d.text(510, 18, "in class order: one batch per class", bold=True)
    order = sorted(range(12), key=lambda n: classes[n // 4][n % 4])
    for place, number in enumerate(order):
        fill = (GREEN, YELLOW, RED)[classes[number // 4][number % 4]]
        d.rect(318 + place * 32, 100, 32, 40, fill, opacity=0.45)
        d.text(334 + place * 32, 120, str(number), bold=True)
    for first, last, label in ((0, 6, "branch 1"), (6, 9, "branch 2"), (9, 12, "branch 3")):
        d.text(318 + (first + last) * 16, 86, label)
        d.text(318 + first * 32, 156, str(first), colour=SOFT)
    d.text(318 + 12 * 32, 156, "12", colour=SOFT)
    d.text(510, 182, "offsets = [0, 6, 9, 12]", colour=SOFT)
    d.text(510, 204, "order = [" + ", ".join(map(str, order)) + "]", colour=SOFT)
    d.write("tiles.svg")


def to_pillow(image: torch.Tensor, width: int) -> Image.Image:  # uint8 [3, H, W]
    """A Pillow image of that width."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def photographs() -> None:
    """Class maps of the sample: of patches at two budgets, and of pixels."""
    image = io.read_image(SAMPLE)
    router = fastroute.load()
    assert isinstance(router, fastroute.PatchRouter)
    grid = fastroute.TileGrid(image.shape[1], image.shape[2], router.patch, router.stride, router.scale)
    half = (PHOTO_WIDTH - 10) // 2
    pictures = []
    for budget in (0.5, 0.7):
        result = router.upscale(image, budget=budget)
        pictures.append(to_pillow(class_overlay(result.image, result.class_map, grid, router.num_classes), half))
    save("budgets.jpg", pictures)
    regions(image, half)
    data = os.environ.get("FASTROUTE_DATA")
    if data:
        pixels = fastroute.load(Path(data) / "weights" / "pcsr-carn-x4.pth")
        detail = image[:, 150:250, 200:360]
        result = pixels.upscale(detail, scale=4)
        overlay = class_overlay(result.image, result.class_map, None, pixels.num_classes)
        save("pixel-classes.jpg", [to_pillow(result.image, half), to_pillow(overlay, half)])


def regions(image: torch.Tensor, width: int) -> None:  # uint8 [3, H, W]
    """What runs at once, each in a frame and in the colour of its class: patch by patch, and merged into regions."""
    pictures = []
    for merge in (1, 4):
        router = fastroute.load(merge=merge)
        assert isinstance(router, fastroute.PatchRouter)
        grid = fastroute.TileGrid(image.shape[1], image.shape[2], router.patch, router.stride, router.scale)
        classes = router.upscale(image).class_map.flatten()
        # Merged once more, the classes as they ran give the regions that ran.
        found = fastroute.merge_regions(classes, grid, router.costs, merge, promote=False)
        picture = to_pillow(image.float().mean(dim=0).to(torch.uint8).expand(3, -1, -1), width)
        tint, frames, shapes = picture.copy(), [], grid.region_shapes(merge)
        for n in (found.region == torch.arange(grid.num_patches)).nonzero().flatten().tolist():
            x, y = grid.col_origins[n % grid.cols], grid.row_origins[n // grid.cols]
            tall, wide = shapes[int(found.group[n]) % len(shapes)]
            frames.append([round(side * width / grid.width) for side in (x, y, x + wide, y + tall)])
            ImageDraw.Draw(tint).rectangle(frames[-1], fill=(GREEN, YELLOW, RED)[int(found.class_ids[n])])
        picture = Image.blend(picture, tint, OPACITY)
        for left, top, right, bottom in frames:
            ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=INK)
        pictures.append(picture)
    save("regions.jpg", pictures)


def flat_colours() -> None:
    """What is left of a flat green and of a flat white image, the deviations shown eight times as strong."""
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 90, 90).contiguous()
    white = torch.full((3, 90, 90), 255, dtype=torch.uint8)
    # The grid of patches with two windows; the corner with zeros and with the edge beyond it.
    shown = [fastroute.load(window=window, merge=1).upscale(green).image[:, 64:-64, 64:-64] for window in ("uniform", "hann")]
    shown += [fastroute.load("cdnsr-fsrcnn-x4", border=border).upscale(white).image[:, :48, :48] for border in ("zero", "edge")]
    pictures = []
    for image, flat in zip(shown, (green, green, white, white), strict=True):
        strength = AMPLIFIED * (image.int() - flat[:, :1, :1].int()).abs().amax(dim=0, keepdim=True)
        picture = (255 - strength).clamp(min=0).to(torch.uint8).expand(3, -1, -1)
        pictures.append(to_pillow(picture, (PHOTO_WIDTH - 30) // 4))
    save("flat-colours.jpg", pictures)


def save(name: str, pictures: list[Image.Image]) -> None:
    """Side by side on white."""
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + 10 * (len(pictures) - 1), pictures[0].height), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + 10
    sheet.save(FIGURES / name, quality=88, optimize=True)


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    patch_path()
    pixel_path()
    tiles()
    photographs()
    flat_colours()
    print(*(f"{path.name}: {path.stat().st_size:,d} bytes" for path in sorted(FIGURES.iterdir())), sep="\n")
