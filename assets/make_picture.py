"""Draws assets/demo.png: bicubic, routed result and class map of one detail of assets/sample.png, side by side.

Run it from anywhere, with the package installed: ``python assets/make_picture.py``.
"""

from __future__ import annotations

import io as memory_file
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import fastroute
from fastroute import io
from fastroute.visualize import class_overlay

HERE = Path(__file__).resolve().parent
# The detail in LR pixels, left, top, width, height: fine hairs before the blurred meadow, easy and hard patches side by side.
DETAIL = (70, 240, 130, 120)
# Screen pixels: gap between two pictures, height of the labels, size of their letters.
GAP, LABEL, LETTERS = 8, 30, 18
MAX_BYTES = 700_000


def to_pillow(image: Tensor) -> Image.Image:  # uint8 [3, H, W]
    """A Pillow image."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own letters; older versions have them in one size only."""
    try:
        return ImageFont.load_default(LETTERS)
    except TypeError:
        return ImageFont.load_default()


def main() -> None:
    """Write the picture."""
    low = io.read_image(HERE / "sample.png")  # [3, H, W]
    router = fastroute.load()
    result = router.upscale(low)
    height, width = low.shape[1:]
    grid = fastroute.TileGrid(height, width, router.patch, router.stride, router.scale)
    classes = class_overlay(result.image, result.class_map, grid, router.num_classes)
    enlarged = to_pillow(low).resize((width * router.scale, height * router.scale), Image.Resampling.BICUBIC)

    left, top, across, down = (side * router.scale for side in DETAIL)
    box = (left, top, left + across, top + down)
    share = round(100 * result.stats.flops.fraction)
    pictures = [
        ("bicubic", enlarged.crop(box)),
        (f"fastroute, {share} % of the FLOPs", to_pillow(result.image).crop(box)),
        ("classes: green cheap, red dear", to_pillow(classes).crop(box)),
    ]
    sheet = Image.new("RGB", (len(pictures) * (across + GAP) - GAP, down + LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, picture) in enumerate(pictures):
        x = number * (across + GAP)
        sheet.paste(picture, (x, LABEL))
        draw.text((x + across // 2, LABEL // 2), label, fill="black", font=font(), anchor="mm")

    # 256 colours keep the file small enough to be shown on a page; dithering hides the difference.
    buffer = memory_file.BytesIO()
    sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "PNG", optimize=True)
    if buffer.tell() > MAX_BYTES:
        raise SystemExit(f"the picture would be {buffer.tell()} bytes, more than {MAX_BYTES}: make DETAIL smaller")
    io.write_atomically(HERE / "demo.png", lambda file: file.write(buffer.getvalue()))
    print(f"wrote {HERE / 'demo.png'}: {sheet.width} x {sheet.height}, {buffer.tell() // 1024} KiB; {result.stats}")


if __name__ == "__main__":
    main()
