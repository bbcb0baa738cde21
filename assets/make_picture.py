"""Draws assets/demo.png: bicubic and routed result of a detail of assets/sample.png, and the class map of all of it.

Run it from anywhere, with the package installed: ``python assets/make_picture.py``.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import fastroute
from fastroute import io
from fastroute.visualize import class_overlay

HERE = Path(__file__).resolve().parent
# The detail in LR pixels, left, top, width, height: seeds and fine hairs, near the middle of the photograph.
DETAIL = (218, 175, 92, 92)
# Screen pixels: gap between two pictures, height of the labels, size of their letters, width of the frame.
GAP, LABEL, LETTERS, FRAME = 8, 30, 18, 3
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
    scale = router.scale
    grid = fastroute.TileGrid(height, width, router.patch, router.stride, scale)
    classes = to_pillow(class_overlay(result.image, result.class_map, grid, router.num_classes))
    enlarged = to_pillow(low).resize((width * scale, height * scale), Image.Resampling.BICUBIC)

    left, top, across, down = (side * scale for side in DETAIL)
    box = (left, top, left + across, top + down)
    # The class map is shown whole, as high as the details beside it, with a frame around the detail.
    shrink = down / classes.height
    classes = classes.resize((round(classes.width * shrink), down), Image.Resampling.LANCZOS)
    ImageDraw.Draw(classes).rectangle([round(side * shrink) for side in box], outline="white", width=FRAME)
    pictures = [
        ("bicubic", enlarged.crop(box)),
        (f"fastroute, {100 * result.stats.flops.fraction:.0f} % of the FLOPs", to_pillow(result.image).crop(box)),
        ("class of every patch, green cheap to red expensive", classes),
    ]
    sheet = Image.new("RGB", (sum(p.width + GAP for _, p in pictures) - GAP, down + LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    x = 0
    for label, picture in pictures:
        sheet.paste(picture, (x, LABEL))
        draw.text((x + picture.width // 2, LABEL // 2), label, fill="black", font=font(), anchor="mm")
        x += picture.width + GAP

    buffer = BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MAX_BYTES:
        # 256 colours and dithering keep the file fit for a page.
        buffer = BytesIO()
        sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "PNG", optimize=True)
    io.write_atomically(HERE / "demo.png", lambda file: file.write(buffer.getvalue()))
    print(f"wrote assets/demo.png: {sheet.width} x {sheet.height}, {buffer.tell() // 1024} KiB; {result.stats}")


if __name__ == "__main__":
    main()
