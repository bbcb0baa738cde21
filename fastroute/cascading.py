"""Cascades from what users name: files, modules, functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastroute._arguments import real, whole
from fastroute._contexts import ordinarily
from fastroute.cascades.decision import CONTEXT, Decision
from fastroute.cascades.opening import check_costs, open_all
from fastroute.cascades.output_score import scored_class
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.score import EDGE, OUTPUT
from fastroute.cascades.sources import Source
from fastroute.loading import open_network
from fastroute.models.network import Facts


@ordinarily
def cascade(
    branches: Sequence[Source],
    *,
    score: str = EDGE,
    context: int = CONTEXT,
    thresholds: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
) -> CascadeRouter:
    """Networks of any architectures and one scale, the cheaper ones where they come near enough to the most expensive one.

    An image is cut into cells of 32 pixels. A score of each, how strong its edges are, decides about its network. Cells of one
    network are merged into the regions that cost least, each of which is computed with some context that is cropped; where
    nothing is gained, the whole image runs through the most expensive network, and that is its result, exactly. Where
    networks meet, a blend of 4 pixels hides the change.

    Args:
        branches: the networks, cheapest first: names or files that :func:`fastroute.load` takes and that hold one network,
            modules, spandrel models, functions, or "bicubic" for interpolation.
        score: "edge", the mean strength of edges; or "output", the mean gradient of what a cheaper network makes of the cell,
            which knows noise from detail. That network, the best of those that cost at most a tenth of the most
            expensive one, then runs on the whole image.
        context: pixels around a region. 8 to 16 suit networks of a large receptive field; more is nearer to the whole image.
        thresholds: of the scores, rising, one less than there are networks: a cell runs in the network whose number is that of
            the thresholds that its score exceeds. Without them calls need a `budget` or a `class_map`.
        costs: of a pixel in each network, in any unit; default its FLOPs.

    Returns:
        A router: call its `upscale` with ``budget=0.5``, for example.

    Raises:
        ValueError: no networks, different scales or channels, another score, costs or thresholds that do not rise.
        fastroute.CheckpointError: a file that cannot be used, or that holds more than one network.

    Example:
        >>> router = fastroute.cascade(["bicubic", "realesrgan-x4plus.pth"])
        >>> result = router.upscale(image, budget=0.5)
    """
    op = "cascade"
    if not branches or isinstance(branches, (str, Path)):
        raise ValueError(f"{op}: branches must be a list of at least one network; got {branches!r}")
    if score not in (EDGE, OUTPUT):
        raise ValueError(f"{op}: score must be 'edge' or 'output'; got {score!r}")
    whole(op, "context", context, 4096, least=0)
    opened = open_branches(op, branches)
    limits = None if thresholds is None else tuple(real(op, "thresholds", t) for t in thresholds)
    if limits is not None and (len(limits) != len(branches) - 1 or sorted(set(limits)) != list(limits)):
        raise ValueError(f"{op}: thresholds must be {len(branches) - 1} numbers that rise; got {thresholds}")
    given = None if costs is None else [real(op, "costs", cost) for cost in costs]
    names = [name for name, _, _ in opened]
    router = CascadeRouter(
        [module for _, module, _ in opened],
        [facts for _, _, facts in opened],
        Decision(None, limits, context),
        given,
        names,
    )
    check_costs(op, router.costs, names)
    if score == OUTPUT and len(names) > 1:
        router.decision = replace(router.decision, base=scored_class(router.costs))
    return router


def open_branches(op: str, branches: Sequence[Source]) -> list[tuple[str, nn.Module, Facts]]:
    """Name, network and facts of each of `branches`, see :func:`cascade`."""
    return open_all(op, branches, lambda source: open_network(op, source))
