"""The HTML page of a comparison: a single file that includes its pictures and loads nothing else."""

from __future__ import annotations

import base64
import html
import math
import os
from importlib import resources
from io import BytesIO
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from fastroute import __version__, io
from fastroute.report.comparison import BICUBIC, STRONGER, Comparison, Variant, shown_size
from fastroute.visualize import class_colours, colour_names

# The pixels of a picture under the slider and of a class map. With these limits a page of ten pictures stays below about 10 MB.
SHOWN_PIXELS = 1_000_000
MAP_WIDTH = 800
JPEG_QUALITY = 92
# The side of the squares in which the detail is searched, in pixels of the result.
SQUARE = 16

Box = tuple[int, int, int, int]


def check_page(path: str | Path) -> None:
    """Check before the work that the page can be written.

    Raises:
        ValueError: `path` does not end in .html or .htm, is a folder, or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write {path}: the name of the page must end in .html or .htm")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"cannot write {path}: permission denied")


def write_page(path: str | Path, comparison: Comparison, name: str, detail: Box | None = None) -> None:
    """Write the page, completely or not at all.

    Args:
        path: the file, which ends in .html.
        comparison: the comparison to show.
        name: name of the image, for the headline.
        detail: the part that the slider shows, as left, top, width and height in pixels of the enlarged image. Default: all of
            a result of at most a million pixels, else the part in which bicubic and the first model differ most.

    Raises:
        ValueError: see :func:`check_page`; or the detail is empty or not inside the image.
    """
    check_page(path)
    text = render(comparison, name, detail)
    io.write_atomically(path, lambda file: file.write(text.encode(errors="replace")))


def render(comparison: Comparison, name: str, detail: Box | None = None) -> str:
    """The text of the page, see :func:`write_page`."""
    first, *others = comparison.variants
    height, width = first.image.shape[1:]
    box = find_detail(first.image, others[0].image) if detail is None else detail
    left, top, across, down = box
    if min(left, top) < 0 or min(across, down) < 1 or left + across > width or top + down > height:
        raise ValueError(f"detail must lie in the result, {width} x {height}; got left {left}, top {top}, {across} x {down}")

    best = next((v for v in reversed(others) if v.class_map is not None), others[-1])
    # What a cascade is to come near to is more telling beside it than interpolation.
    beside = best.dense if best.near is not None and best.dense is not None else first
    pictures = {variant.name: variant.image for variant in comparison.variants}
    pictures |= {f"{v.name}: classes": v.classes for v in comparison.variants if v.classes is not None}
    if comparison.reference is not None:
        pictures["reference"] = comparison.reference
    shown = {name: encode(crop(picture, box), SHOWN_PIXELS) for name, picture in pictures.items()}
    ids = {name: f"picture{number}" for number, name in enumerate(pictures)}
    template = Template((resources.files("fastroute.report") / "templates" / "compare.html").read_text("utf-8"))
    whole = box == (0, 0, width, height)
    scale = comparison.scale
    return template.substitute(
        title=html.escape(f"{name}, enlarged {scale:g} times"),
        subtitle=html.escape(
            f"{shown_size(comparison.source)} pixels become {shown_size(first.image)}. {told_reference(comparison)}"
        ),
        width=shown[BICUBIC][1][0],
        height=shown[BICUBIC][1][1],
        options="".join(f'<option value="{ids[name]}">{html.escape(name)}</option>' for name in pictures),
        pictures="\n".join(
            f'<img id="{ids[name]}" alt="{html.escape(name)}" src="{data}">' for name, (data, _) in shown.items()
        ),
        left=ids[beside.name],
        right=ids[best.name],
        shown=html.escape(told_detail(box, whole, shown[BICUBIC][1])),
        caption=html.escape(
            "FLOPs: two for each multiply-add done, classifiers included; dense: everything in the most expensive class. Time: "
            f"median of {comparison.runs} run{'s' if comparison.runs > 1 else ''} in turn on {comparison.device}."
        ),
        columns=columns(comparison),
        rows="\n".join(row(variant, comparison) for variant in comparison.variants),
        maps=maps(comparison, None if whole else box) + differences(comparison, None if whole else box),
        footer=html.escape(f"fastroute {__version__}, torch {torch.__version__}"),
    )


def find_detail(a: Tensor, b: Tensor) -> Box:  # [3, H, W] uint8 twice
    """The box to show: all of a small image, or of a larger one the part, of the same shape, in which the two differ most."""
    height, width = a.shape[1:]
    if height * width <= SHOWN_PIXELS:
        return 0, 0, width, height
    # No side exceeds that of the image, even if that is very long.
    ratio = math.sqrt(SHOWN_PIXELS / (height * width))
    down, across = max(1, int(height * ratio)), max(1, int(width * ratio))
    # Computed in 8 bits, because wider integers would take eight times the memory of the image.
    difference = (torch.maximum(a, b) - torch.minimum(a, b)).sum(dim=0, dtype=torch.float32)[None]
    squares = F.avg_pool2d(difference, SQUARE, ceil_mode=True)
    window = (min(max(1, down // SQUARE), squares.shape[1]), min(max(1, across // SQUARE), squares.shape[2]))
    means = F.avg_pool2d(squares, window, stride=1)[0]
    y, x = divmod(int(means.argmax()), means.shape[1])
    return min(x * SQUARE, width - across), min(y * SQUARE, height - down), across, down


def crop(image: Tensor, box: Box) -> Tensor:  # [3, H, W] -> [3, h, w]
    """The pixels of the box."""
    left, top, across, down = box
    return image[:, top : top + down, left : left + across]


def encode(image: Tensor, pixels: int, frame: Box | None = None) -> tuple[str, tuple[int, int]]:  # [3, H, W] uint8
    """A JPEG of limited size as a data: address, and its width and height. `frame` is drawn into it."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    ratio = min(1.0, math.sqrt(pixels / (picture.width * picture.height)))
    if ratio < 1:
        sides = (max(1, int(picture.width * ratio)), max(1, int(picture.height * ratio)))
        picture = picture.resize(sides, Image.Resampling.LANCZOS)
    if frame is not None:
        left, top, across, down = (round(side * ratio) for side in frame)
        for inset, colour in enumerate(("black", "white", "white", "black")):
            corners = (left + inset, top + inset, left + across - 1 - inset, top + down - 1 - inset)
            if corners[0] <= corners[2] and corners[1] <= corners[3]:
                ImageDraw.Draw(picture).rectangle(corners, outline=colour)
    file = BytesIO()
    # Colours keep their full resolution; halving it would blur what is to be compared.
    picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), picture.size


def told_reference(comparison: Comparison) -> str:
    """A sentence about the reference of PSNR and SSIM."""
    if comparison.reference is None:
        return "There is no reference image, so no PSNR."
    border = math.ceil(comparison.scale)
    return f"PSNR and SSIM of RGB against the reference, without a border of {border} pixels."


def told_detail(box: Box, whole: bool, sides: tuple[int, int]) -> str:
    """A sentence about the part that the slider shows."""
    left, top, across, down = box
    words = "The whole image" if whole else f"A detail of {across} x {down} pixels at ({left}, {top}), framed in the class maps"
    if sides != (across, down):
        words += f", reduced to {sides[0]} x {sides[1]}"
    return f"{words}. The pictures are JPEG of quality {JPEG_QUALITY}; the figures are those of the results themselves."


def columns(comparison: Comparison) -> str:
    """The header of the table."""
    names = ["picture", *(["PSNR", "SSIM"] if comparison.reference is not None else [])]
    names += ["PSNR to dense"] if told_nearness(comparison) else []
    names += ["FLOPs", "FLOPs / dense", "as papers count", "time", "time / dense", "classes, cheapest first"]
    return "".join(f'<th scope="col">{name}</th>' for name in names)


def row(variant: Variant, comparison: Comparison) -> str:
    """A row of the table."""
    cells = []
    if comparison.reference is not None:
        psnr = variant.quality["psnr"]
        cells += [decibels(psnr), f"{variant.quality['ssim']:.4f}"]
    if told_nearness(comparison):
        cells.append("" if variant.near is None else decibels(variant.near))
    stats, dense = variant.stats, variant.dense or variant
    if stats is None or dense.stats is None:
        cells += ["", "", "", shown_seconds(variant.seconds), "", ""]
    else:
        cells += [
            f"{stats.flops.routed / 1e9:,.1f} G",
            percent(stats.flops.routed, dense.stats.flops.routed),
            percent(stats.paper_flops.routed, dense.stats.paper_flops.routed),
            shown_seconds(variant.seconds),
            percent(variant.seconds, dense.seconds),
            "" if variant.class_map is None else shares(stats.counts_per_class),
        ]
    return f'<tr><th scope="row">{html.escape(variant.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def told_nearness(comparison: Comparison) -> bool:
    """Whether any variant is to come near to a dense one."""
    return any(variant.near is not None for variant in comparison.variants)


def decibels(psnr: float) -> str:
    """A PSNR as text."""
    return f"{psnr:.2f} dB" if math.isfinite(psnr) else "identical"


def percent(part: float, whole: float) -> str:
    """A share as text; empty if there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def shown_seconds(seconds: float) -> str:
    """A time as text, in milliseconds."""
    return f"{1000 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def shares(counts: list[int]) -> str:
    """A bar of the class colours, and the numbers."""
    total = max(sum(counts), 1)
    text = " / ".join(f"{100 * count / total:.0f}" for count in counts) + " %"
    parts = zip(class_colours(len(counts)).tolist(), counts, strict=True)
    bar = "".join(f'<span style="width:{100 * n / total:.2f}%;background:rgb{tuple(colour)}"></span>' for colour, n in parts)
    return f'{text}<div class="bar" aria-hidden="true">{bar}</div>'


def maps(comparison: Comparison, box: Box | None) -> str:
    """The class maps of the whole image, with legends of their colours."""
    found = [(variant, variant.classes) for variant in comparison.variants if variant.classes is not None]
    if not found:
        return ""
    legends, figures = {}, []
    for variant, classes in found:
        assert variant.stats is not None  # there are classes
        number = len(variant.stats.counts_per_class)
        legends[number] = legend(number)
        # Limited by width, so that long images are not shown larger than others.
        pixels = MAP_WIDTH * max(1, MAP_WIDTH * classes.shape[1] // classes.shape[2])
        data, _ = encode(classes, pixels, box)
        name = html.escape(variant.name)
        figures.append(f'<figure><img alt="class map of {name}" src="{data}"><figcaption>{name}</figcaption></figure>')
    return (
        f"<h2>Class maps</h2>\n{''.join(legends[number] for number in sorted(legends))}\n"
        f'<div class="maps">\n{chr(10).join(figures)}\n</div>'
    )


def differences(comparison: Comparison, box: Box | None) -> str:
    """What cascades made otherwise than their dense runs."""
    found = [(variant, variant.difference) for variant in comparison.variants if variant.difference is not None]
    figures = []
    for variant, difference in found:
        assert variant.near is not None and variant.dense is not None  # there is a difference
        data, _ = encode(difference, MAP_WIDTH * max(1, MAP_WIDTH * difference.shape[1] // difference.shape[2]), box)
        words = html.escape(f"{variant.name} and {variant.dense.name}: PSNR {decibels(variant.near)}")
        figures.append(f'<figure><img alt="difference of {words}" src="{data}"><figcaption>{words}</figcaption></figure>')
    if not figures:
        return ""
    return (
        f'\n<h2>Differences to the dense results</h2>\n<p class="soft">{STRONGER} times as strong.</p>\n'
        f'<div class="maps">\n{chr(10).join(figures)}\n</div>'
    )


def legend(number: int) -> str:
    """The legend of `number` classes."""
    remarks = {0: ", cheapest", number - 1: ", most expensive"} if number > 1 else {}
    items = "".join(
        f'<li><i style="background:rgb{tuple(colour)}"></i>class {k + 1} of {number}{remarks.get(k, "")}: {name}</li>'
        for k, (colour, name) in enumerate(zip(class_colours(number).tolist(), colour_names(number), strict=True))
    )
    return f'<ul class="legend">{items}</ul>'
