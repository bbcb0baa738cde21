"""Routers of whole images from networks: one alone, or all of a cascade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastroute.cascades.decision import Decision
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.sources import BICUBIC, Source, bicubic, described, is_named_code, named_code
from fastroute.models.checkpoints import CheckpointError
from fastroute.models.network import Facts
from fastroute.models.pretrained import own_network, spandrel_network
from fastroute.runtime.border import ZERO
from fastroute.runtime.router import Router

Opener = Callable[[Source], tuple[str, nn.Module, Facts]]
# Options of :func:`fastroute.load` that belong to routers of patches.
OF_PATCHES = ("published", "patch", "stride", "window", "batch", "merge", "table", "eta")


def of_code(source: Source, asked: Mapping[str, Any]) -> Router | None:
    """The router of a module, a function, a router or "package.module:function"; None for another name or a file."""
    if is_named_code(source):
        source = named_code(str(source))
    if isinstance(source, (str, Path)):
        return None
    return source if isinstance(source, Router) else dense_router(*described("load", source), asked)


def of_state(state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> CascadeRouter | None:
    """The router of weights in the layout of Real-ESRGAN; None for another."""
    found = own_network(state, path)
    return None if found is None else dense_router(*found, asked, path)


def of_unknown(state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any], known: str) -> CascadeRouter:
    """The router of weights that spandrel may know; `known` is what else is known, for messages."""
    return dense_router(*spandrel_network(state, path, known), asked, path)


def dense_router(module: nn.Module, facts: Facts, asked: Mapping[str, Any], path: Path | None = None) -> CascadeRouter:
    """One network over whole images.

    Args:
        module, facts: the network.
        asked: what a caller of :func:`fastroute.load` gave.
        path: its file.

    Raises:
        ValueError: an option that such a router does not have.
        fastroute.CheckpointError: another scale.
    """
    refuse_patches(asked, facts.architecture)
    if asked.get("scale", facts.scale) != facts.scale:
        name = path or "this model"
        raise CheckpointError(f"cannot use {name}: it upscales by {facts.scale} alone; got scale={asked['scale']:g}")
    return CascadeRouter([module], [facts], Decision(), names=None if path is None else [path.stem])


def network_of(op: str, source: Source, router: Router) -> tuple[str, nn.Module, Facts]:
    """Name, network and facts of the one network of `router`, which `source` names.

    Raises:
        ValueError: it has several.
    """
    if router.num_classes != 1:
        raise ValueError(f"{op}: {source} must hold one network; it is a {type(router).__name__} of {router.num_classes}")
    name = Path(source).stem if isinstance(source, (str, Path)) else ""
    if isinstance(router, CascadeRouter):
        return name or router.names[0], router.networks.members[0], router.facts[0]
    network: nn.Module = next(iter(getattr(router, "branches", [router])))
    kind = type(network).__name__
    # Routers of patches undo the last pixel shuffle of their branches while they stitch.
    if (factor := int(getattr(router, "shuffle", 1))) > 1:
        network = nn.Sequential(network, nn.PixelShuffle(factor))
    return name or kind, network, Facts(kind, int(router.scale), router.channels)


def refuse_patches(asked: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError for options that belong to routers of patches."""
    for option in OF_PATCHES:
        if option in asked:
            raise ValueError(f"load: {name} runs on regions with their context and has no {option}; leave it out")
    if asked.get("border", ZERO) != ZERO:
        raise ValueError(f"load: border must be 'zero' for {name}; got {asked['border']!r}")


def check_costs(op: str, costs: Sequence[float], names: Sequence[str]) -> None:
    """Costs rise from network to network.

    Raises:
        ValueError: they do not.
    """
    for (a, b), (one, other) in zip(pairwise(costs), pairwise(names), strict=False):
        if a == b:
            raise ValueError(f"{op}: branches must differ in cost; {one} and {other} cost {a:.4g} each: leave one of them out")
    rising = all(a < b for a, b in pairwise(costs))
    if len(costs) != len(names) or not rising or not costs[0] > 0:
        told = ", ".join(f"{name} {cost:.4g}" for name, cost in zip(names, costs, strict=False))
        raise ValueError(f"{op}: branches must be given from the cheapest to the most expensive; their costs are {told}")


def open_all(op: str, sources: Sequence[Source], open_one: Opener) -> list[tuple[str, nn.Module, Facts]]:
    """Name, network and facts of each; interpolation is that of the others.

    Args:
        op: what the user called.
        sources: what names them.
        open_one: gives name, network and facts of one that is not interpolation.

    Raises:
        ValueError: none but interpolation, or different scales or channels.
    """
    opened = [None if source == BICUBIC else open_one(source) for source in sources]
    known = [found for found in opened if found is not None]
    if not known:
        raise ValueError(f"{op}: branches must hold at least one network beside interpolation")
    like = known[-1][2]
    for name, _, facts in known:
        if (facts.scale, facts.channels) != (like.scale, like.channels):
            raise ValueError(
                f"{op}: all branches must have one scale and one number of channels; {name} has {facts.scale} and "
                f"{facts.channels}, {known[-1][0]} has {like.scale} and {like.channels}"
            )
    return [(BICUBIC, *bicubic(like.scale, like.channels)) if found is None else found for found in opened]
