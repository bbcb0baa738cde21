"""`join`: what shards have left beside a result becomes the result."""

from __future__ import annotations

from pathlib import Path

import torch

from fastroute.files.arrays import ArrayPixels, Layout, add_levels, is_zarr
from fastroute.files.parts import Parts, spans
from fastroute.files.readers import open_source
from fastroute.files.writers import check_target, open_writer
from fastroute.io.files import replace_folder
from fastroute.io.read import AUTO
from fastroute.runtime.progress import Progress, shown


def join(target: str | Path, progress: Progress = False) -> bool:
    """Make one result of the parts that shards have written. It may be called again, also after it has been killed.

    An array gets its name, with the smaller levels of an OME-Zarr image. Any other format is written from the parts, row by
    row, with the metadata of the source, which must still be where it was.

    Args:
        target: path of the result, as it was given to the shards.
        progress: show a progress bar, or call a function with how much is done and how much there is.

    Returns:
        Whether there was something to join; otherwise the result is complete already.

    Raises:
        ValueError: neither the result nor its parts are there, or parts are missing. The message says what to do.
    """
    target, parts = Path(target), Parts(target)
    if not parts.begun:
        if target.exists():
            # What an earlier call that was killed has left. A folder without facts is none of ours.
            parts.tidy()
            return False
        if parts.folder.is_dir():
            raise ValueError(f"join: {parts.damaged('facts.json is not there')}")
        raise ValueError(f"join: there is neither {target} nor {parts.folder}; run the shards first")
    facts = parts.facts()
    if "layout" not in facts:
        gone = [name for name in parts.noted("results")["names"] if not (target / name).is_file()]
        if gone:
            raise ValueError(
                f"join: {target} lacks {len(gone)} results, such as {gone[0]}; run the shards again with --resume, or remove "
                f"{parts.folder}"
            )
        parts.remove()
        return True
    layout, image = Layout.from_json(facts["layout"]), parts.path("image")
    check_target(target)
    # Nobody may begin a band again meanwhile.
    with parts.claimed(0, layout.bands + 1, "bands"):
        left = sorted(set(range(layout.bands)) - layout.complete(parts.done()))
        if left:
            raise ValueError(
                f"join: {target} lacks {len(left)} of {layout.bands} bands ({spans(left)}); run the shards again with --resume"
            )
        if not image.is_dir() and not (is_zarr(target) and target.exists()):
            raise ValueError(f"join: {parts.damaged('image is not there')}")
        # Otherwise an earlier call was killed after the array had got its name.
        if image.is_dir():
            if not is_zarr(target):
                _write(target, parts, layout, progress)
            else:
                if layout.ome:
                    add_levels(image, layout)
                replace_folder(image, parts.target)
        parts.remove()
    return True


def _write(target: Path, parts: Parts, layout: Layout, progress: Progress) -> None:
    """Write a file of another format from the array."""
    origin, pixels = parts.noted("origin"), ArrayPixels(parts.path("image"), layout)
    options = {"max_pixels": AUTO, "white": 1.0, **origin["reading"]}
    with open_source(origin["source"], **options) as opened:
        opened = opened.without_alpha() if origin["drop_alpha"] else opened
        with open_writer(target, layout.shape, opened) as writer, shown(progress, layout.shape[1], "row") as bar:
            step, height = int(getattr(writer, "row_step", 1)), layout.shape[1]
            rows = max(layout.chunk // step, 1) * step
            for top in range(0, height, rows):
                end = min(top + rows, height)
                writer.write(top, 0, torch.from_numpy(pixels.read(top, end)))
                bar.update(end - top)
