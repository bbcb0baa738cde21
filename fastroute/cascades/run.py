"""The regions of a plan through their networks, and their results into bands of rows, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.cascades.cells import Cells, Rectangle
from fastroute.cascades.plan import Plan

# Pixels over which the result of a higher class fades out around its regions.
FADE = 4
# Pixels of regions of one size that run together: what keeps two threads busy, and small enough for a cache.
TOGETHER = 96 * 96

Network = Callable[[Tensor], Tensor]
# From where pixels lie in the image to these pixels, floating in [0, 1].
Read = Callable[[Rectangle], Tensor]


@dataclass(frozen=True)
class Piece:
    """A region as it is cut out.

    Attributes:
        inner: its own pixels.
        outer: with the context around it.
        fading: with as much of the context as is blended with what lies around.
    """

    inner: Rectangle
    outer: Rectangle
    fading: Rectangle


@dataclass(frozen=True)
class Limits:
    """How large pieces may be; a single cell is always allowed.

    Attributes:
        largest: pixels with their context; None for no limit.
        tallest: pixels of height without it; None for no limit. Results are held as long as the rows they lie in.
    """

    largest: int | None = None
    tallest: int | None = None


def pieces_of(
    cells: Cells, regions: Sequence[Rectangle], context: int, limits: Limits | None = None, fade: int = FADE
) -> list[Piece]:
    """The pieces of `regions` by rows, each within `limits`.

    Args:
        cells: of the image.
        regions: in cells.
        context: pixels around a region that are cropped.
        limits: regions beyond are cut between their cells.
        fade: pixels of the context that are blended, at most.
    """
    limits = limits or Limits()
    parts = [part for region in regions for part in _parts(cells, region, context, limits)]
    fade = min(fade, context)
    found = [Piece(cells.pixels(part), cells.pixels(part, context), cells.pixels(part, fade)) for part in parts]
    return sorted(found, key=lambda piece: (piece.fading.top, piece.fading.left))


def _parts(cells: Cells, region: Rectangle, context: int, limits: Limits) -> Iterator[Rectangle]:
    height, width = region.bottom - region.top, region.right - region.left
    high = limits.tallest is not None and height > 1 and height * cells.side > limits.tallest
    large = limits.largest is not None and cells.pixels(region, context).area > limits.largest
    if not high and (not large or (height == 1 and width == 1)):
        yield region
        return
    if high or height >= width:
        middle = region.top + height // 2
        halves = region._replace(bottom=middle), region._replace(top=middle)
    else:
        middle = region.left + width // 2
        halves = region._replace(right=middle), region._replace(left=middle)
    for half in halves:
        yield from _parts(cells, half, context, limits)


class Layer:
    """One class of a plan over those below it: pieces are computed when a band needs them, and kept until the last that does.

    Where pieces meet they fade into each other; around them the class fades out over what lies below. A pixel of a piece is its
    own network's, but for `FADE` pixels along another piece of its class. All of this is the same whatever the bands.

    Args:
        pieces: of the class, see :func:`pieces_of`.
        network: from (N, C, h, w) to (N, C, h * scale, w * scale).
        read: gives the pixels of the image.
        scale: of the network.
        lowest: whether nothing lies below.
        done: called after each piece.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        network: Network,
        read: Read,
        scale: int,
        lowest: bool,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        self.pieces, self.network, self.read, self.scale, self.lowest, self.done = pieces, network, read, scale, lowest, done
        self.alone = alone_of(pieces)
        self.batch_of = {n: batch for batch in batches(pieces) for n in batch}
        self.begun, self.active = 0, list[int]()
        self.results: dict[int, Tensor] = {}

    def compute(self, bottom: int) -> None:
        """The results of all pieces that reach above row `bottom`."""
        while self.begun < len(self.pieces) and self.pieces[self.begun].fading.top < bottom:
            self.active.append(self.begun)
            if self.begun not in self.results:
                self._run(self.batch_of[self.begun])
            self.begun += 1

    def _run(self, numbers: Sequence[int]) -> None:
        images = [self.read(self.pieces[n].outer) for n in numbers]
        results = self.network(torch.stack(images) if len(images) > 1 else images[0][None])
        for n, result in zip(numbers, results, strict=True):
            piece = self.pieces[n]
            shown = cut(result, within(piece.fading, piece.outer, self.scale))
            # A batch is held as long as any of its parts; what is most of its memory is not copied.
            self.results[n] = shown if len(numbers) == 1 and 2 * shown.numel() > result.numel() else shown.clone()
            self.done()

    def draw(self, band: Tensor, top: int) -> None:  # [C, rows * scale, W * scale], floating
        """Put what is there of rows from `top` on over `band`, and let go of what no later band needs."""
        scale = self.scale
        bottom = top + band.shape[1] // scale
        shared = [n for n in self.active if not self.alone[n]]
        total = torch.zeros_like(band) if shared else band[:, :0]
        weight = torch.zeros_like(band[:1]) if shared else band[:1, :0]
        for n in self.active:
            place = self.pieces[n].fading
            first, last = max(place.top, top), min(place.bottom, bottom)
            if last <= first:
                continue
            shown = self.results[n][:, scale * (first - place.top) : scale * (last - place.top)].to(band.dtype)
            ramp = fading(self.pieces[n], scale, first, last, band)
            where = scaled(Rectangle(first - top, place.left, last - top, place.right), scale)
            if not self.alone[n]:
                cut(total, where).addcmul_(shown, ramp)
                cut(weight, where).add_(ramp)
            elif self.lowest:
                # Nothing lies below: what fades out there is written over.
                cut(band, where).copy_(shown)
            else:
                cut(band, where).lerp_(shown, ramp)
        if shared:
            mean = total.div_(weight.clamp(min=1e-6))
            share = torch.ones_like(weight) if self.lowest else weight.clamp(max=1)
            band.copy_(torch.where(weight > 0, torch.lerp(band, mean, share), band))
        for n in [n for n in self.active if self.pieces[n].fading.bottom <= bottom]:
            self.active.remove(n)
            del self.results[n]


def layers_of(
    plan: Plan, pieces: Sequence[Sequence[Piece]], networks: Sequence[Network], read: Read, scale: int,
    done: Callable[[], object] = lambda: None, ready: Mapping[int, Sequence[Tensor]] | None = None,
) -> list[Layer]:  # fmt: skip
    """The classes of a plan that have pieces, the lowest first; `ready` are results that are there, by class."""
    made: list[Layer] = []
    for k, (own, network) in enumerate(zip(pieces, networks, strict=True)):
        if own:
            made.append(Layer(own, network, read, scale, not made, done))
            made[-1].results.update(enumerate((ready or {}).get(k, ())))
    return made


def edges_of(pieces: Sequence[Sequence[Piece]], height: int, rows: int) -> list[int]:
    """Where bands of at most `rows` rows begin and end: also between pieces that do not fade, so that no band needs both."""
    between = {piece.inner.top for own in pieces for piece in own if piece.inner == piece.fading}
    edges = [0]
    for end in sorted({*between, height}):
        edges += range(edges[-1] + rows, end, rows)
        edges += [end] if end > edges[-1] else []
    return edges


def alone_of(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces, given by rows, reach into no other."""
    alone = [True] * len(pieces)
    for n, one in enumerate(pieces):
        for m in range(n + 1, len(pieces)):
            other = pieces[m].fading
            if other.top >= one.fading.bottom:
                break
            if _meet(one.fading, other):
                alone[n] = alone[m] = False
    return alone


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a.top < b.bottom and b.top < a.bottom and a.left < b.right and b.left < a.right


def batches(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Numbers of pieces that run together: of one size."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for n, piece in enumerate(pieces):
        outer = piece.outer
        sizes.setdefault((outer.bottom - outer.top, outer.right - outer.left), []).append(n)
    for (height, width), numbers in sizes.items():
        together = max(1, TOGETHER // (height * width))
        for begin in range(0, len(numbers), together):
            yield numbers[begin : begin + together]


def fading(piece: Piece, scale: int, first: int, last: int, like: Tensor) -> Tensor:  # [1, (last - first) * scale, w]
    """Weights of rows `first` to `last` of a piece over what it fades into: 1 on its own pixels, falling around them."""
    inner, outer = piece.inner, piece.fading
    rows = _ramp(inner.top - outer.top, inner.bottom - inner.top, outer.bottom - inner.bottom, scale, like)
    cols = _ramp(inner.left - outer.left, inner.right - inner.left, outer.right - inner.right, scale, like)
    return rows[scale * (first - outer.top) : scale * (last - outer.top), None].mul(cols)[None]


def _ramp(before: int, own: int, after: int, scale: int, like: Tensor) -> Tensor:  # [...] -> [n]
    def rise(pixels: int) -> Tensor:
        return (torch.arange(pixels * scale, device=like.device, dtype=like.dtype) + 0.5) / max(pixels * scale, 1)

    return torch.cat([rise(before), like.new_ones(own * scale), rise(after).flip(0)])


def cut(image: Tensor, where: Rectangle) -> Tensor:  # [..., H, W] -> [..., h, w]
    """The pixels that lie there."""
    return image[..., where.top : where.bottom, where.left : where.right]


def floating(pixels: Tensor, dtype: torch.dtype) -> Tensor:  # [C, h, w]
    """An image in [0, 1], float32, or float64 for networks of that type."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if pixels.is_floating_point():
        return pixels.to(wanted)
    return pixels.to(wanted) / (255 if pixels.dtype == torch.uint8 else 65535)


def store(result: Tensor, output: Tensor) -> None:  # [C, H, W], [C, H, W]
    """Into the type of the image: integers clamped and rounded half to even."""
    if output.is_floating_point():
        output.copy_(result)
        return
    most = 255 if output.dtype == torch.uint8 else 65535
    rounded = (result * most).round_().clamp_(0, most)
    # uint16 takes no part in arithmetic, but is copied to.
    output.copy_(rounded.to(torch.int32).to(output.dtype))


def scaled(where: Rectangle, scale: int) -> Rectangle:
    """`where` in output pixels."""
    return Rectangle(*(scale * side for side in where))


def within(where: Rectangle, outer: Rectangle, scale: int) -> Rectangle:
    """`where` counted from the corner of `outer`, in output pixels."""
    top, left = where.top - outer.top, where.left - outer.left
    return scaled(Rectangle(top, left, where.bottom - outer.top, where.right - outer.left), scale)
