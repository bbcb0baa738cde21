"""A fixed number of slots per class, and which patch goes to which slot, decided on the device without involving the host.

From call to call only values change. Every tensor keeps its size, so that a graph captured once can be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastroute._arguments import real
from fastroute.ops.group_by_class import group_by_class


class Placed(NamedTuple):
    """The places of the patches of one call.

    Attributes:
        patches: int64 (S,), the patch in each slot; an unused slot holds patch 0, whose result nobody reads.
        places: int64 (N,), the slot of each patch.
        classes: int64 (N,), the class of that slot.
        overflow: int64 (K,), patches of each class that found no slot of their class.
    """

    patches: Tensor
    places: Tensor
    classes: Tensor
    overflow: Tensor


class Slots(nn.Module):
    """Slots for the patches of each class, those of the cheapest class first.

    A class with more patches than slots fills its slots. The other patches go to free slots of the next more expensive class
    that has any. If no such class has any, they go to free slots of the cheaper classes, the most expensive of these first. If
    several classes overflow, the most expensive one chooses first. The patches of a class are ordered from the hardest to the
    easiest: the hardest ones move up, the very hardest furthest, and the easiest ones move down.

    Args:
        capacities: slots of each class; at least as many as patches in all.
        number: of patches N.
        device: where the decision is made.
    """

    capacity: Tensor  # [K]
    start: Tensor  # [K]

    def __init__(self, capacities: Sequence[int], number: int, device: torch.device) -> None:
        super().__init__()
        self.capacities, self.number, self.total = list(capacities), number, sum(capacities)
        capacity = torch.tensor(self.capacities, dtype=torch.int64, device="cpu")
        self.register_buffer("capacity", capacity.to(device), persistent=False)
        self.register_buffer("start", (capacity.cumsum(0) - capacity).to(device), persistent=False)

    def forward(self, class_ids: Tensor, hardness: Tensor | None = None) -> Placed:  # [N], [N]
        """Place all patches.

        Args:
            class_ids: the class of each patch.
            hardness: ranks the patches of a class, the hardest first, equal ones by their number. Default: by number alone.
        """
        number, last = self.number, len(self.capacities) - 1
        if hardness is None:
            groups = group_by_class(class_ids, last + 1)
            order = groups.order
        else:
            hardest = torch.argsort(hardness, descending=True, stable=True)
            groups = group_by_class(class_ids[hardest], last + 1)
            order = hardest[groups.order]
        at = torch.arange(number, device=order.device)
        own = torch.searchsorted(groups.offsets[1:], at, right=True).clamp(max=last)  # class of each patch in class order
        rank = at - groups.offsets[own]
        counts = groups.offsets.diff()
        kept = torch.minimum(counts, self.capacity)
        over, free = counts - kept, self.capacity - kept

        # Upwards, as a stack: a class with too many patches puts the others on it, one with free slots takes from its top.
        excess = (counts - self.capacity).cumsum(0)
        height = excess - excess.cummin(0).values.clamp(max=0)  # of the stack behind each class
        classes = torch.arange(last + 1, device=order.device)
        since = torch.where(classes[None] < classes[:, None], height[:, None], height[None])  # [from, to]
        waiting = (since.cummin(1).values - (height - over)[:, None]).clamp(min=0)
        taken = over[:, None] - waiting  # by the classes up to `to`
        flow = taken.diff(dim=1, prepend=torch.zeros_like(taken[:, :1]))
        up, down = taken[:, last], waiting[:, last]
        before = flow.cumsum(0) - flow  # from classes cheaper than `from`

        # The first `up` patches of a class go up, the next `kept` stay, the rest goes down.
        climb = up[own] - 1 - rank
        higher = (taken[own] <= climb[:, None]).sum(1).clamp(max=last)
        above = kept[higher] + before[own, higher] + climb - (taken - flow)[own, higher]

        spare = free - flow.sum(0)
        left = spare.flip(0).cumsum(0).flip(0)  # in a class and all the more expensive ones
        fall = rank - (up + kept - (down.flip(0).cumsum(0).flip(0) - down))[own]
        lower = ((fall[:, None] < left).sum(1) - 1).clamp(min=0)
        below = (self.capacity - left)[lower] + fall

        stays = rank - up[own]
        goes_up, goes_down = stays < 0, stays >= kept[own]
        to = torch.where(goes_up, higher, torch.where(goes_down, lower, own))
        slot = self.start[to] + torch.where(goes_up, above, torch.where(goes_down, below, stays))
        nothing = torch.zeros_like(order)
        patches = nothing.new_zeros(self.total).scatter(0, slot, order)
        return Placed(patches, nothing.scatter(0, order, slot), nothing.scatter(0, order, to), over)


def check_capacities(op: str, capacities: Sequence[int | float], num_classes: int, number: int) -> list[int]:
    """The slots of each class, given as counts or as fractions of all `number` patches.

    Raises:
        ValueError: there is not one entry per class, an entry is negative or a fraction above 1, or there are too few slots.
        TypeError: an entry is neither a whole number nor a fraction.
    """
    given = list(capacities)
    if len(given) != num_classes:
        raise ValueError(f"{op}: capacities must have one entry per class, {num_classes}; got {len(given)}")
    counts = []
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: capacities must be numbers of patches or fractions of all; got {type(value).__name__}")
        whole = isinstance(value, int)
        if not 0 <= value < math.inf or (value > 1 and not whole):
            raise ValueError(f"{op}: capacities must be numbers of patches or fractions in [0, 1]; got {value}")
        # A fraction that was computed, such as 7 / 10, is not rounded up to one patch more.
        counts.append(min(number, int(value) if whole else math.ceil(value * number - 1e-9)))
    if sum(counts) < number:
        raise ValueError(
            f"{op}: capacities must hold all {number} patches together; {counts} hold {sum(counts)}: add {number - sum(counts)}"
        )
    return counts


def capacities_for(counts: Sequence[Sequence[int]], number: int, slack: float) -> list[int]:
    """The slots of `number` patches for the largest share that each class has in any call of a sample, plus a reserve.

    Args:
        counts: patches of each class in each call.
        number: of patches in the calls to come.
        slack: the reserve, as a fraction of the slots.

    Raises:
        ValueError: `slack` is negative or not finite.
    """
    if not 0 <= real("FixedPatchRouter", "slack", slack) < math.inf:
        raise ValueError(f"FixedPatchRouter: slack must be at least 0 and finite; got {slack}")
    # More slots than patches are of no use.
    slack = min(slack, float(number))
    shares = [[count / max(sum(call), 1) for count in call] for call in counts]
    largest = map(max, zip(*shares, strict=True))
    return [min(number, math.ceil((1 + slack) * share * number - 1e-9)) for share in largest]
