"""`tiled`: runs any network over overlapping tiles of an image of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._arguments import LARGEST_SPAN, whole
from fastroute._contexts import ordinarily
from fastroute._copies import inference_copy
from fastroute.models.adapters import as_module
from fastroute.patch.patch_router import PatchRouter
from fastroute.patch.prepared_networks import guess_channels
from fastroute.rewrite.optimize import parameter_dtype
from fastroute.windows import CROP


@ordinarily
@buffers.explained("tiled", "choose a smaller patch")
def tiled(
    model: nn.Module | Callable[[Tensor], Tensor] | Any,
    *,
    patch: int = 128,
    stride: int | None = None,
    overlap: int | None = None,
    scale: int | None = None,
    window: str | Tensor = CROP,  # [P]
    batch: int | None = None,
    channels: int | None = None,
    tune: bool = True,
    merge: int | None = None,
    value_range: float | None = 1.0,
) -> PatchRouter:
    """Run a network over overlapping tiles, so that an image of any size takes the memory of a few tiles.

    Tiles run in batches, in the memory format and the batch size that are fastest on the device. Up to 4 x 4 neighbouring tiles
    run as one if the network takes inputs of that size, so that their overlaps are computed once. With the window "crop" the
    result is that of the whole image, up to the order of sums, if the network sees at most `overlap` / 2 pixels around each
    pixel: along the edges of the image it pads as it would pad the whole image. A network that sees further, as most do, shows
    seams with "crop" if the overlap is small; "linear" or "hann" blend them. An image smaller than a tile is extended by
    repeating its edge.

    Args:
        model: any module from (N, C, p, p) to (N, C, p * scale, p * scale), a spandrel model, or a function. It is copied.
        patch: side of a tile in input pixels. The network must take this size, for example a multiple of its windows.
        stride: distance of two tiles, at most `patch`.
        overlap: `patch` - `stride`, instead of `stride`. Default: a quarter of the tile.
        scale: factor between output and input. Default: that of a first tile.
        window: how overlaps are merged, see :func:`fastroute.make_window`.
        batch: tiles per pass. Default: by measurement, which is remembered.
        channels: number of channels of the images. Default: what the model names or its first convolution reads, else 3.
        merge: side of a block of tiles, 1, 2, 4 or 8, that runs as one larger tile, whose overlaps are computed once. Default:
            as many as 512 MiB allow, up to 4, and 1 for a network that takes no other size than `patch`.
        value_range: what white is to the network, such as 255, or None for HDR images; see :class:`fastroute.PatchRouter`.
        tune: find out on the work of calls how the network runs fastest, see :class:`fastroute.PatchRouter`.

    Returns:
        A :class:`fastroute.PatchRouter` of one class: a module that maps (B, C, H, W) or (C, H, W), floating in [0, 1], uint8
        or uint16, to the same type `scale` times as large. A floating image is not clamped. Its `upscale` has progress bars,
        statistics and times.

    Raises:
        ValueError: impossible sizes, both `stride` and `overlap`, or a model that returns something else than one scaled image
            per tile.
        TypeError: `model` cannot be called.

    Example:
        >>> upscale = fastroute.tiled(model, patch=128, overlap=32)
        >>> image = upscale(image)
    """
    whole("tiled", "patch", patch, LARGEST_SPAN)
    for name, number in (("overlap", overlap), ("channels", channels)):
        if number is not None:
            whole("tiled", name, number, LARGEST_SPAN, least=0 if name == "overlap" else 1)
    if stride is not None and overlap is not None:
        raise ValueError(f"tiled: give either stride or overlap; got stride={stride} and overlap={overlap}")
    if overlap is not None and not 0 <= overlap < patch:
        raise ValueError(f"tiled: overlap must be at least 0 and less than patch ({patch}); got {overlap}")
    step = stride if stride is not None else patch - (patch // 4 if overlap is None else overlap)
    network = as_module("tiled", "model", model)
    factor = probe_scale(network, patch, channels) if scale is None else scale
    options = {"window": window, "batch": batch, "channels": channels, "tune": tune, "merge": merge}
    sizes = {"patch": patch, "stride": step, "scale": factor}
    return PatchRouter([network], None, **sizes, **options, value_range=value_range)  # type: ignore[arg-type]


@torch.inference_mode()
def probe_scale(network: nn.Module, patch: int, channels: int | None = None) -> int:
    """The factor between the output of `network` and a tile.

    Raises:
        ValueError: the factor is not the same whole number along both axes, or the number of channels changes.
    """
    like = next(network.parameters(), torch.empty(0))
    size = (1, channels or guess_channels([network]), patch, patch)
    # On a copy, because others may be using the network.
    probe = inference_copy(network, share=True)
    try:
        output = probe(torch.full(size, 0.5, dtype=parameter_dtype(network), device=like.device))
    except RuntimeError as error:
        if buffers.is_exhausted(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"tiled: model takes no tiles {size}: {reason}; give channels, or another patch") from error
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    factor = output.shape[-1] // patch if isinstance(output, Tensor) and output.ndim else 0
    if factor < 1 or found != (*size[:2], patch * factor, patch * factor):
        raise ValueError(f"tiled: model must map {size} to {size[:2]} and a whole multiple of {patch} x {patch}; got {found}")
    return factor
