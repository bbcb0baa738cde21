"""The quality and the cost of a model on a folder of images: PSNR, SSIM, FLOPs in both conventions, seconds, classes.

PSNR and SSIM are those of :mod:`fastroute.quality`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute import buffers, io
from fastroute._arguments import LARGEST_SPAN, whole
from fastroute.cascades.router import CascadeRouter
from fastroute.degradation import make_pair
from fastroute.io.walk import walk
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.quality import compare, least_side, metrics
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import Upscaled

# A first call maps memory and reads weights, so an image that takes fewer seconds than this is upscaled twice.
WARM_UP_BELOW = 10.0


@dataclass(frozen=True)
class Row:
    """One image, or the mean of several.

    Attributes:
        image: file name.
        height, width: size of the super-resolved image.
        psnr, psnr_y: PSNR of RGB and of luma in dB; infinite if nothing differs.
        psnr_bicubic: PSNR of RGB in dB of bicubic interpolation.
        ssim, ssim_y: structural similarity of RGB (the mean of its channels) and of luma.
        counts: patches or pixels of each class, cheapest first.
        flops, flops_fraction: FLOPs done, classifier included, and as a fraction of the most expensive class everywhere.
        paper_flops, paper_fraction: the same as the paper of the system counts, see
            :class:`fastroute.runtime.results.RoutingStats`.
        seconds: seconds of upscaling, without the measurements of a first call.
    """

    image: str
    height: float
    width: float
    psnr: float
    psnr_bicubic: float
    ssim: float
    psnr_y: float
    ssim_y: float
    counts: Sequence[float]
    flops: float
    flops_fraction: float
    paper_flops: float
    paper_fraction: float
    seconds: float


@buffers.explained("evaluate", "leave large images out, or cut them")
def evaluate(
    router: PatchRouter | PixelRouter | CascadeRouter,
    images: str | Path,
    scale: int | None = None,
    exclude: Sequence[str] = (),
    progress: Progress = False,
    errors: list[str] | None = None,
    notes: list[tuple[Path, str]] | None = None,
    **options: Any,
) -> list[Row]:
    """Super-resolve the bicubic reduction of every image below a folder and compare with the image.

    Images are cut to a multiple of the scale and reduced by antialiased bicubic interpolation, to 8 bits. As the papers do,
    results are compared in 8 bits without a border of `scale` pixels.

    Args:
        router: a router, such as :func:`fastroute.load` returns.
        images: folder of HR images, searched recursively, or one image.
        scale: whole upscaling factor. Default: that of the router.
        exclude: glob patterns of file names to leave out.
        progress: show a progress bar, or call this function with the number of images done and the number of all images.
        errors: a list to which the errors of images that cannot be read or are too small are added. Without it the first such
            error is raised.
        notes: a list to which files that were left out, wholly or in part, are added with the reasons.
        options: arguments of the router's `upscale`, such as `budget`.

    Returns:
        One row per image, in the order of their paths.

    Raises:
        ValueError: no images, or none that can be used; one that is too small, without `errors`; a scale that the router does
            not have, or scikit-image is missing.
        fastroute.io.ImageError: an image cannot be read, without `errors`.
    """
    if scale is not None:
        whole("evaluate", "scale", scale, LARGEST_SPAN)
    own = None if isinstance(router, PixelRouter) else int(router.scale)
    factor = scale or own or round(router.scale)
    if own is not None and factor != own:
        raise ValueError(f"evaluate: scale must be {own}, that of the model; got {factor}")
    if own is None:
        options = {**options, "scale": factor}
    folder = Path(images)
    found, told = [folder], [] if notes is None else notes
    if not folder.is_file():
        io.list_images(folder)  # refuses what is not a folder, and a folder without images
        content = walk(folder)
        found = content.images
        told += [*content.others, *((path, f"a folder that cannot be read: {why}") for path, why in content.unreadable)]
    # Not by list_images: it leaves out what is no file, such as a link to nothing, without a word.
    paths = [p for p in found if not any(fnmatch(p.name, pattern) for pattern in exclude)]
    if not paths:
        raise ValueError(f"evaluate: no image is left in {folder}; the patterns exclude {', '.join(exclude)}")
    # Fail early if scikit-image is missing.
    metrics()
    rows: list[Row] = []
    with shown(progress, len(paths), "image", "evaluate") as bar:
        for path in paths:
            try:
                lr, hr = _read_pair(path, factor, told)
            except ValueError as error:
                if errors is None:
                    raise
                errors.append(str(error))
                bar.update()
                continue
            result = router.upscale(lr.to(router.device), **options)
            if not rows and result.stats.seconds["total"] < WARM_UP_BELOW:
                result = router.upscale(lr.to(router.device), **options)
            name = path.name if path == folder else path.relative_to(folder).as_posix()
            rows.append(_row(name, lr, hr, factor, result))
            bar.update()
    if not rows:
        raise ValueError(f"evaluate: no image can be used: {'; '.join(errors or [])}")
    return rows


def _row(name: str, lr: Tensor, hr: Tensor, factor: int, result: Upscaled) -> Row:  # [3, h, w], [3, H, W]
    bicubic = F.interpolate(lr[None].float(), scale_factor=factor, mode="bicubic")[0].clamp(0, 255).round().to(torch.uint8)
    # A router may drop what lies beyond the last whole stride.
    height, width = result.image.shape[-2:]
    hr, bicubic = (image[:, :height, :width].contiguous() for image in (hr, bicubic))
    stats = result.stats
    return Row(
        image=name,
        height=hr.shape[1],
        width=hr.shape[2],
        **compare(result.image.cpu(), hr, factor),
        psnr_bicubic=compare(bicubic, hr, factor)["psnr"],
        counts=list(stats.counts_per_class),
        flops=float(stats.flops.routed),
        flops_fraction=stats.flops.fraction,
        paper_flops=float(stats.paper_flops.routed),
        paper_fraction=stats.paper_flops.fraction,
        seconds=stats.seconds["total"] - stats.seconds.get("tune", 0.0),
    )


def _read_pair(path: Path, factor: int, notes: list[tuple[Path, str]]) -> tuple[Tensor, Tensor]:
    """The bicubic reduction of an image, and the image with which results are compared."""
    picture = io.read_picture(path)
    notes += [(path, note) for note in picture.origin.notes]
    image = picture.as_bits(8).color.contiguous()
    least = least_side(factor)
    if min(image.shape[-2:]) < least:
        height, width = image.shape[-2:]
        raise ValueError(f"evaluate: images must be at least {least} x {least} pixels; {path} has {width} x {height}")
    return make_pair(image, factor)


def mean(rows: Sequence[Row]) -> Row:
    """The mean of every number over the images, also of seconds, FLOPs and counts. Fractions are those of the sums."""
    columns = {
        name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__ if name not in ("image", "counts")
    }
    result = {name: float(np.mean(values)) for name, values in columns.items()}
    for name, fraction in (("flops", "flops_fraction"), ("paper_flops", "paper_fraction")):
        dense = sum(f / part for f, part in zip(columns[name], columns[fraction], strict=True) if part)
        result[fraction] = sum(columns[name]) / dense if dense else 1.0
    counts = [float(np.mean(counts)) for counts in zip(*(row.counts for row in rows), strict=True)]
    return Row(image="mean", counts=counts, **result)


def table(rows: Sequence[Row]) -> str:
    """The rows and their mean as text with aligned columns."""
    head = ["image", "size", "bicubic", "PSNR", "SSIM", "PSNR-Y", "SSIM-Y", "GFLOPs", "of dense", "paper G", "of paper dense",
            "s", "per class"]  # fmt: skip
    lines = [head]
    for row in [*rows, mean(rows)]:
        lines.append([
            row.image, f"{row.width:.0f} x {row.height:.0f}", f"{row.psnr_bicubic:.3f}", f"{row.psnr:.3f}", f"{row.ssim:.4f}",
            f"{row.psnr_y:.3f}",
            f"{row.ssim_y:.4f}", f"{row.flops / 1e9:.1f}", f"{100 * row.flops_fraction:.1f} %", f"{row.paper_flops / 1e9:.1f}",
            f"{100 * row.paper_fraction:.1f} %", f"{row.seconds:.3f}", " / ".join(f"{n:.0f}" for n in row.counts),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = (0, len(head) - 1)
    return "\n".join(
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    )  # fmt: skip


# The legend below a table.
LEGEND = """\
size: of the result. bicubic, PSNR: dB of RGB, of bicubic enlargement and of the model; PSNR-Y, SSIM-Y: of luma.
GFLOPs: done, classifier included; paper G: as the papers count, PCSR's with the classifier, ClassSR's without it;
of dense, of paper dense: beside the most expensive class everywhere, in either count.
s: seconds of upscaling, without the measurements of a first call; per class: patches or pixels, cheapest class first."""


def write_json(path: str | Path, rows: Sequence[Row], **about: object) -> None:
    """Write the rows, their mean and further facts `about` them as JSON. An infinite PSNR is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {**about, "torch": torch.__version__, "images": [asdict(row) for row in rows], "mean": asdict(mean(rows))}
    text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
    io.write_atomically(path, lambda file: file.write(text.encode()))
