"""From measured cells to a table: what errors to expect at a score, and how far a promise must stay away from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.cascades.measured import Measured

# Cells of a bin at least, and bins at most.
LEAST, BINS = 24, 16
# Errors below are those of rounding, and count as this.
FLOOR = 1e-9


def fit(scores: Tensor, errors: Tensor, edges: Tensor) -> Tensor:  # [N], [K, N], [bins + 1] -> [K, bins]
    """The mean error in every bin, made to rise with the score; an empty bin lies between its neighbours."""
    index = torch.bucketize(scores, edges[1:-1].contiguous())
    bins = len(edges) - 1
    count = torch.bincount(index, minlength=bins).double()
    total = torch.zeros(len(errors), bins, dtype=torch.float64).index_add_(1, index, errors.double())
    return torch.stack([rising(row / count.clamp(min=1), count) for row in total]).clamp(min=FLOOR)


def bin_edges(scores: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [bins + 1], [bins]
    """Bins that hold equally many scores, and their middles."""
    bins = max(2, min(BINS, len(scores) // LEAST))
    edges = torch.quantile(scores.double(), torch.linspace(0, 1, bins + 1, dtype=torch.float64))
    index = torch.bucketize(scores.double(), edges[1:-1].contiguous())
    middles = [scores[index == n].double() for n in range(bins)]
    means = torch.stack([m.mean() if len(m) else edges[n : n + 2].mean() for n, m in enumerate(middles)])
    # Equal scores of many cells leave bins empty: middles must rise all the same.
    return edges, torch.cummax(means, 0).values + 1e-6 * torch.arange(bins)


def rising(values: Tensor, weights: Tensor) -> Tensor:  # [bins], [bins]
    """The nearest values, by weighted squares, that never fall: neighbours that do are averaged."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, bins
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, size = value, weight, 1
        while blocks and (blocks[-1][0] >= mean or total == 0 or blocks[-1][1] == 0):
            before, held, bins = blocks.pop()
            weighed = held + total
            mean = (before * held + mean * total) / weighed if weighed else mean
            total, size = weighed, size + bins
        blocks.append((mean, total, size))
    return torch.tensor([mean for mean, _, size in blocks for _ in range(size)], dtype=torch.float64)


@dataclass(frozen=True)
class Learnt:
    """What :func:`learn` found.

    Attributes:
        scores, errors: see :class:`fastroute.cascades.decision.Table`.
        shares: by context.
        inner: see there.
    """

    scores: Tensor
    errors: Tensor
    shares: tuple[float, ...]
    inner: float


def learn(cells: Sequence[Measured], contexts: Sequence[int]) -> Learnt:
    """A table of all `cells`."""
    scores, errors = torch.cat([c.scores.flatten() for c in cells]), torch.cat([c.errors.flatten(1) for c in cells], dim=1)
    edges, middles = bin_edges(scores)
    cheap = fit(scores, errors, edges)
    # Errors of regions, of fewer cells, as a multiple of those of the cheapest class at their scores.
    border = [part for c in cells for part in c.border]
    inner = [part for c in cells for part in c.inner]
    first = _ratio([part for part in border if part[0] == contexts[0]], middles, cheap[0])
    shares = [1.0]
    for context in contexts[1:]:
        share = _ratio([part for part in border if part[0] == context], middles, cheap[0]) / max(first, 1e-12)
        # More context is never worse; few cells may say so.
        shares.append(min(max(share, 1e-3), shares[-1]))
    within = _ratio([part for part in inner if part[0] == contexts[0]], middles, cheap[0]) / max(first, 1e-12)
    last = (cheap[0] * first).clamp(min=FLOOR)
    return Learnt(middles, torch.cat([cheap, last[None]]), tuple(shares), min(max(within, 1e-3), 1.0))


def _ratio(parts: Sequence[tuple[int, Tensor, Tensor]], middles: Tensor, errors: Tensor) -> float:  # [n], [n]
    """The errors measured over those expected of the cheapest class at the same scores."""
    if not parts:
        return 0.0
    scores, found = torch.cat([part[1] for part in parts]).double(), torch.cat([part[2] for part in parts]).double()
    index = torch.searchsorted(middles.contiguous(), scores.contiguous()).clamp(max=len(middles) - 1)
    return float(found.sum() / errors[index].sum().clamp(min=1e-12))
