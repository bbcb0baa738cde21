"""The regions of a plan through their networks, and their results into one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def pieces_of(cells: Cells, regions: Sequence[Rectangle], context: int, largest: int | None = None) -> list[Piece]:
    """The pieces of `regions`, none of more than `largest` pixels unless it is a single cell.

    Args:
        cells: of the image.
        regions: in cells.
        context: pixels around a region that are cropped.
        largest: regions beyond are cut between their cells.
    """
    parts = [part for region in regions for part in _parts(cells, region, context, largest)]
    fade = min(FADE, context)
    return [Piece(cells.pixels(part), cells.pixels(part, context), cells.pixels(part, fade)) for part in parts]


def _parts(cells: Cells, region: Rectangle, context: int, largest: int | None) -> Iterator[Rectangle]:
    height, width = region.bottom - region.top, region.right - region.left
    if largest is None or (height == 1 and width == 1) or cells.pixels(region, context).area <= largest:
        yield region
        return
    if height >= width:
        middle = region.top + height // 2
        halves = region._replace(bottom=middle), region._replace(top=middle)
    else:
        middle = region.left + width // 2
        halves = region._replace(right=middle), region._replace(left=middle)
    for half in halves:
        yield from _parts(cells, half, context, largest)


def run_plan(
    plan: Plan,
    image: Tensor,  # [C, H, W]
    networks: Sequence[Network],
    output: Tensor,  # [C, H * scale, W * scale], float32
    scale: int,
    largest: int | None = None,
    done: Callable[[int, Piece], None] = lambda k, piece: None,
) -> None:
    """Fill `output`: the regions of each class over those of the classes below.

    Where regions of one class meet they fade into each other; around them the class fades out over what lies below. A pixel of
    a region is its own network's, but for `FADE` pixels along another region of its class.

    Args:
        plan: what runs where.
        image: floating in [0, 1].
        networks: of each class, from (N, C, h, w) to (N, C, h * scale, w * scale).
        output: overwritten.
        scale: of the networks.
        largest: pixels of a pass at most, see :func:`pieces_of`.
        done: called with the class and the piece after each piece.
    """
    # What is blended with what is there must be finite.
    output.zero_()
    first = True
    for k, regions in enumerate(plan.regions):
        pieces = pieces_of(plan.cells, regions, plan.context, largest)
        if not pieces:
            continue
        if len(pieces) == 1 and pieces[0].inner == plan.cells.pixels(plan.cells.whole):
            output.copy_(networks[k](image[None])[0])
            done(k, pieces[0])
        else:
            _layer(k, pieces, image, networks[k], output, scale, first, done)
        first = False


def _layer(
    k: int,
    pieces: list[Piece],
    image: Tensor,
    network: Network,
    output: Tensor,
    scale: int,
    lowest: bool,
    done: Callable[[int, Piece], None],
) -> None:
    """The pieces of one class over what is there."""
    alone = alone_of(pieces)
    total = torch.zeros_like(output) if not all(alone) else None
    weight = torch.zeros_like(output[:1]) if total is not None else None
    for numbers in batches(pieces):
        results = network(torch.stack([_cut(image, pieces[n].outer) for n in numbers]))
        for n, result in zip(numbers, results, strict=True):
            piece = pieces[n]
            ramp = fading(piece, scale, output.device)
            shown = _cut(result, _within(piece.fading, piece.outer, scale)).to(output.dtype)
            target = _cut(output, _scaled(piece.fading, scale))
            if alone[n] or total is None or weight is None:
                # Nothing lies below the lowest class: what fades out there is written over.
                _blend(target, shown, ramp, lowest)
            else:
                _cut(total, _scaled(piece.fading, scale)).addcmul_(shown, ramp)
                _cut(weight, _scaled(piece.fading, scale)).add_(ramp)
            done(k, piece)
    if total is not None and weight is not None:
        for n, piece in enumerate(pieces):
            if alone[n]:
                continue
            place = _scaled(piece.fading, scale)
            sums, weights, target = _cut(total, place), _cut(weight, place), _cut(output, place)
            # Each pixel once, though several pieces may reach it: its weight is cleared.
            covered = weights > 0
            mean = sums / weights.clamp(min=1e-6)
            share = torch.ones_like(weights) if lowest else weights.clamp(max=1)
            target.copy_(torch.where(covered, torch.lerp(target, mean, share), target))
            weights.zero_()


def _blend(target: Tensor, shown: Tensor, ramp: Tensor, lowest: bool) -> None:
    if lowest:
        target.copy_(shown)
    else:
        target.lerp_(shown, ramp)


def alone_of(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces reach into no other."""
    return [
        not any(_meet(one.fading, other.fading) for m, other in enumerate(pieces) if m != n) for n, one in enumerate(pieces)
    ]


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


def fading(piece: Piece, scale: int, device: torch.device) -> Tensor:  # [1, h, w]
    """Weights of a piece over what it fades into: 1 on its own pixels, falling to nothing around them."""
    inner, outer = piece.inner, piece.fading
    rows = _ramp(inner.top - outer.top, inner.bottom - inner.top, outer.bottom - inner.bottom, scale, device)
    cols = _ramp(inner.left - outer.left, inner.right - inner.left, outer.right - inner.right, scale, device)
    return rows[:, None].mul(cols)[None]


def _ramp(before: int, own: int, after: int, scale: int, device: torch.device) -> Tensor:
    def rise(pixels: int) -> Tensor:
        return (torch.arange(pixels * scale, device=device, dtype=torch.float32) + 0.5) / max(pixels * scale, 1)

    return torch.cat([rise(before), torch.ones(own * scale, device=device), rise(after).flip(0)])


def _cut(image: Tensor, where: Rectangle) -> Tensor:  # [C, H, W] -> [C, h, w]
    return image[:, where.top : where.bottom, where.left : where.right]


def _scaled(where: Rectangle, scale: int) -> Rectangle:
    return Rectangle(*(scale * side for side in where))


def _within(where: Rectangle, outer: Rectangle, scale: int) -> Rectangle:
    """`where` counted from the corner of `outer`, in output pixels."""
    top, left = where.top - outer.top, where.left - outer.left
    return _scaled(Rectangle(top, left, where.bottom - outer.top, where.right - outer.left), scale)
