"""`Upscaler`: super-resolution of the images of a Ray dataset."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastroute import io
from fastroute.cascades.router import CascadeRouter
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.files.jobs import Job
from fastroute.files.many_files import Outcome, Router, check_result_fits, reason_of, write_job
from fastroute.files.pictures import upscale_picture
from fastroute.io.write import check_quality, interleaved
from fastroute.loading import load
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.profiling import RoutedFlops
from fastroute.runtime.results import RoutingStats

# The columns that hold an image; they do not travel on.
BYTES, IMAGE = "bytes", "image"


class Upscaler:
    """Super-resolves the images of a Ray dataset: a class for ``Dataset.map_batches``, whose actors load the model once each.

    Rows have one image each, in one of these columns:

    - ``image``: an array (H, W), or (H, W, C) with 1 channel for gray, 3 for RGB, and one more with alpha; uint8, uint16, or
      float32 in [0, 1];
    - ``bytes``: the content of an image file of any format that :func:`fastroute.io.read_picture` reads;
    - ``path``: the path of such a file, which all machines see.

    The result goes to the file that the column ``target`` names, on a file system that all machines see. It is complete or not
    written. The column ``class_map`` may name a PNG for a picture of the classes. Beside ``image`` or ``bytes``, a ``path`` is
    only for messages.

    The rows that come out have all columns but ``image`` and ``bytes``, and three more:

    - ``error``: why the image was not upscaled; empty if it was. One damaged image does not end the job;
    - ``notes``: what was left out or changed on the way from file to file, a sentence a line;
    - ``stats``: the :class:`fastroute.RoutingStats` as a struct, or null after an error; see :func:`stats_of`.

    Pixels do not travel through Ray's object store, unless `images` asks for a column ``image`` of results.

    Args:
        model: a name or a checkpoint, see :func:`fastroute.load`, or a router, or a function that returns a router. A name or
            a function travels to the machines as such, and a router with its weights.
        device: where to run: "cuda" for an actor that is given a GPU.
        images: whether results come back as arrays (H, W, C), in the column ``image``. No ``target`` is needed then. After an
            error it has 0 rows.
        drop_alpha: leave transparency out.
        quality: see :func:`fastroute.io.write_picture`.
        reading: arguments of :func:`fastroute.io.read_picture`, such as `max_pixels`.
        loading: other arguments of :func:`fastroute.load` for a model that is given by name, such as `dtype` and `scale`.
        in_hand: the number of images to have in hand: while one is computed, the others are read and written.
        **upscaling: arguments of the router's `upscale`, such as `budget`.

    Example:
        >>> dataset = ray.data.from_items([{"path": "photo.jpg", "target": "photo-x4.png"}])
        >>> options = {"device": "cuda", "budget": 0.7}
        >>> done = dataset.map_batches(
        ...     fastroute.ray.Upscaler, fn_constructor_kwargs=options, batch_size=4, concurrency=8, num_gpus=1
        ... )
    """

    def __init__(
        self,
        model: str | Path | Router | Callable[[], Router] = DEFAULT_MODEL,
        *,
        device: str | torch.device = "cpu",
        images: bool = False,
        drop_alpha: bool = False,
        quality: int | None = None,
        reading: Mapping[str, Any] | None = None,
        loading: Mapping[str, Any] | None = None,
        in_hand: int = 2,
        **upscaling: Any,
    ) -> None:
        check_quality("Upscaler", quality)
        if isinstance(model, (PatchRouter, PixelRouter, CascadeRouter)):
            self.router: Router = model.to(device)
        elif callable(model):
            self.router = model()
        else:
            self.router = load(model, device=device, **(loading or {}))
        self.images, self.drop_alpha, self.upscaling = images, drop_alpha, upscaling
        self.saving = {} if quality is None else {"quality": quality}
        self.reading = dict(reading or {})
        # An actor may have several threads. They read and write side by side, and one at a time computes.
        self.threads, self.in_hand, self.turn = in_hand, threading.BoundedSemaphore(in_hand), threading.Lock()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Upscale the images of a batch.

        Args:
            batch: columns of equal length, as ``map_batches`` gives them for ``batch_format="numpy"``, which is the default.

        Raises:
            ValueError: a column that is needed is missing.
        """
        if not any(name in batch for name in (IMAGE, BYTES, "path")):
            raise ValueError(f"Upscaler: rows must have a column image, bytes or path; got {', '.join(batch) or 'none'}")
        if not self.images and "target" not in batch:
            raise ValueError(
                f"Upscaler: rows must have a column target, the file of the result, or give images=True; got {', '.join(batch)}"
            )
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._upscale, rows))
        columns: dict[str, Any] = {name: column for name, column in batch.items() if name not in (IMAGE, BYTES)}
        columns["error"] = np.array([outcome.error for outcome, _ in found])
        columns["notes"] = np.array(["\n".join(outcome.notes) for outcome, _ in found])
        columns["stats"] = _objects([outcome.stats and dataclasses.asdict(outcome.stats) for outcome, _ in found])
        if self.images:
            columns[IMAGE] = _objects([image for _, image in found])
        return columns

    def _upscale(self, row: Mapping[str, Any]) -> tuple[Outcome, np.ndarray]:
        """The outcome of a row, and the result if it is asked for."""
        image = np.empty((0, 0, 3), np.uint8)
        target, class_map = row.get("target"), row.get("class_map")
        job = Job(Path(row.get("path", "an image")), Path(target or "none"), Path(class_map) if class_map else None)
        with self.begin(row) as refused:
            if refused:
                return Outcome(job, refused), image
            try:
                picture = self._read(row)
                if target:
                    check_result_fits(self.router, job, picture, **self.upscaling)
                with self.turn:
                    result, upscaled = upscale_picture(self.router, picture, **self.upscaling)
                notes = picture.origin.notes
                if target:
                    notes = (*notes, *io.not_kept(target, result))
                    write_job(self.router, job, result, upscaled, **self.saving)
                if self.images:
                    image = np.atleast_3d(interleaved(result, True))
            except Exception as error:
                return Outcome(job, reason_of(job, error)), image
        return Outcome(job, stats=upscaled.stats, notes=notes), image

    @contextmanager
    def begin(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Take the image of a row in hand while the block lasts. A reason why it must not be begun is the block's value."""
        with self.in_hand:
            yield ""

    def _read(self, row: Mapping[str, Any]) -> io.Picture:
        if IMAGE in row:
            # The pixels of the store are not to be written to.
            pixels = torch.from_numpy(np.moveaxis(np.atleast_3d(row[IMAGE]), 2, 0).copy())
            picture = io.Picture.of_channels(pixels)
        else:
            picture = io.read_picture(row.get("path", "an image"), data=row.get(BYTES), **self.reading)
        return dataclasses.replace(picture, alpha=None) if self.drop_alpha else picture


def stats_of(row: Mapping[str, Any]) -> RoutingStats | None:
    """The statistics in the column ``stats`` of a row that :class:`Upscaler` made; None after an error."""
    found = row["stats"]
    if found is None:
        return None
    flops = {name: RoutedFlops(**found[name]) for name in ("flops", "paper_flops")}
    # A column has the stages of all rows.
    seconds = {name: taken for name, taken in found["seconds"].items() if taken is not None}
    return RoutingStats(**{**found, **flops, "seconds": seconds})


def _objects(values: Sequence[Any]) -> np.ndarray:
    """A column of anything, one object a row."""
    column = np.empty(len(values), object)
    for n, value in enumerate(values):
        column[n] = value
    return column
