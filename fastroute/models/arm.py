"""ARM: "Any-Time Super-Resolution Method", Chen et al., ECCV 2022: one network of several widths, an edge score, a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.precision import FullPrecision
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.profiling import count_flops

# Luma in units of 2^-15, the fixed-point weights of the published scores.
LUMA = (9798, 19235, 3735)
# The number of input pixels that bicubic interpolation reads for one output pixel.
BICUBIC_TAPS = 16
BINS = 30
# PSNR of two equal patches, in dB.
LARGEST_PSNR = 100.0
# The logarithm of the score of a class that no budget wants. It lies above 2^-126, below which `assign_classes` ignores scores.
UNWANTED = -80.0


def carn(width: int, scale: int, groups: int = 4) -> CARN:
    """CARN as ARM trains it: with biases instead of batch norms, and with the mean colour in two convolutions."""
    return CARN(width, scale, groups, mean_layers=True, batch_norm=False)


# For each backbone, a function of width and scale that makes it in ARM's form, and the published widths.
# RCAN's come from ClassSR.
BACKBONES: dict[str, Callable[..., nn.Module]] = {"fsrcnn": FSRCNN, "carn": carn, "srresnet": SRResNet, "rcan": RCAN}
WIDTHS = {"fsrcnn": (16, 36, 56), "carn": (36, 52, 64), "srresnet": (36, 52, 64), "rcan": (36, 50, 64)}


class Bicubic(nn.Module):
    """Bicubic interpolation, the class that needs no network."""

    def __init__(self, scale: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.scale, self.channels = scale, channels

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """Map (B, C, H, W) to (B, C, H * scale, W * scale)."""
        return F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)


def edge_score(patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N]
    """The mean strength of the edges of each patch, from 0 to 255: the mean of :func:`edge_strength`.

    Args:
        patches: RGB in [0, 1], at least 2 x 2 pixels.
    """
    return edge_strength(patches).mean(dim=(1, 2, 3))


def edge_strength(images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, 1, H, W]
    """The strength of the edges at every pixel, from 0 to 255.

    This is |Laplacian| of the luma, in whole steps of an 8-bit image and clipped at 255, with reflected borders. All numbers
    are whole, so every device gives the same bits.

    Args:
        images: RGB in [0, 1], at least 2 x 2 pixels.
    """
    # Products stay below 2^24, up to which float32 represents whole numbers exactly.
    pixels = (images.float() * 255).round_().clamp_(0, 255)
    # The weights are arguments of kernels. A tensor of weights would have to be copied to a GPU, which waits.
    luma = LUMA[0] * pixels[:, :1]
    for c in (1, 2):
        luma.add_(pixels[:, c : c + 1], alpha=LUMA[c])
    luma = F.pad(luma.add_(2**14).div_(2**15).floor_(), (1, 1, 1, 1), mode="reflect")
    # The kernel: twice the corners minus eight times the middle.
    edges = luma[:, :, :-2, :-2] + luma[:, :, :-2, 2:]
    edges.add_(luma[:, :, 2:, :-2]).add_(luma[:, :, 2:, 2:]).sub_(luma[:, :, 1:-1, 1:-1], alpha=4)
    return edges.abs_().mul_(2).clamp_(max=255)


class EdgeTable(FullPrecision):
    """The PSNR that each class reaches on patches with a given edge score, measured on data.

    Shape:
        scores (N,) to PSNRs in dB (N, K).
    """

    score: Tensor  # [bins], centres of equal bins from 0
    psnr: Tensor  # [K, bins]

    def __init__(self, num_classes: int, bins: int = BINS) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"EdgeTable: bins must be at least 1; got {bins}")
        self.register_buffer("score", (torch.arange(bins, dtype=torch.float32) + 0.5) * (255 / bins))
        self.register_buffer("psnr", torch.full((num_classes, bins), math.nan, dtype=torch.float32))

    @property
    def ready(self) -> bool:
        """Whether the table holds measurements."""
        return bool(self.psnr.isfinite().all() and self.score.isfinite().all())

    @torch.no_grad()
    def fit(self, score: Tensor, psnr: Tensor) -> None:  # [N], [N, K]
        """Fill equal bins from 0 to the largest score with the mean PSNR in each. Empty bins are interpolated.

        Raises:
            ValueError: there are no patches, or the shapes do not match.
        """
        classes, bins = self.psnr.shape
        if score.ndim != 1 or not len(score) or psnr.shape != (len(score), classes):
            raise ValueError(
                f"EdgeTable: score must be (N,), N at least 1, and psnr (N, {classes}); got {tuple(score.shape)} and "
                f"{tuple(psnr.shape)}"
            )
        # On the CPU the order of the sums is fixed.
        score, psnr = score.cpu(), psnr.cpu()
        width = max(float(score.max()), 1e-6) / bins
        index = (score.double() / width).long().clamp(0, bins - 1)
        count = torch.bincount(index, minlength=bins)
        total = torch.zeros(bins, classes, dtype=torch.float64).index_add_(0, index, psnr.double())
        full = count.nonzero().squeeze(1)
        centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * width
        mean = interpolate(centres[full], (total[full] / count[full, None]).t(), centres)
        self.score.copy_(centres)
        self.psnr.copy_(mean.t())

    def forward(self, score: Tensor, between: bool = True) -> Tensor:  # [N] -> [N, K]
        """The expected PSNR of every class.

        Args:
            score: edge scores. Those beyond the ends of the table count as its ends.
            between: interpolate between the centres of the bins. The published code does not, so that all patches of a bin have
                the same class.
        """
        if between:
            return interpolate(self.score, self.psnr, score)
        width = 2 * self.score[0]
        return self.psnr[:, (score / width).long().clamp(0, len(self.score) - 1)].t()


def interpolate(centres: Tensor, values: Tensor, at: Tensor) -> Tensor:  # [bins], [K, bins], [N] -> [N, K]
    """Piecewise linear interpolation, constant beyond the ends."""
    if len(centres) == 1:
        return values.t().expand(len(at), -1)
    right = torch.searchsorted(centres, at.contiguous()).clamp(1, len(centres) - 1)
    share = ((at - centres[right - 1]) / (centres[right] - centres[right - 1])).clamp(0, 1)
    return torch.lerp(values[:, right - 1], values[:, right], share).t()


class EdgeClassifier(FullPrecision):
    """ARM's classifier, which has no weights: class scores from :func:`edge_score` and an :class:`EdgeTable`.

    The class of the largest score is the published decision, argmax of eta * PSNR - cost. Under a budget the scores of
    :func:`budget_scores` spend it where a decibel is cheapest.

    Args:
        table: expected PSNRs.
        cost: (K,), cost of each class.
        eta: cost that one decibel is worth; infinite for the best expected PSNR.
        spent: (K,), the positive cost of each class that a budget counts. Default: `cost`.
        published: decide as the published code does, by the PSNR of the bin instead of an interpolation between two bins.
            Scores are then the softmax of PSNR - cost / eta.

    Shape:
        (N, 3, p, p) in [0, 1] to (N, K).
    """

    cost: Tensor  # [K]
    eta: Tensor  # []
    spent: Tensor  # [K]

    def __init__(
        self,
        table: EdgeTable,
        cost: Sequence[float] | Tensor,  # [K]
        eta: float = math.inf,
        spent: Sequence[float] | Tensor | None = None,  # [K]
        published: bool = False,
    ) -> None:
        super().__init__()
        self.table, self.published = table, published
        self.register_buffer("cost", torch.as_tensor(cost, dtype=torch.float64))
        self.register_buffer("eta", torch.tensor(float(eta), dtype=torch.float64))
        counted = torch.as_tensor(cost if spent is None else spent, dtype=torch.float64)
        self.register_buffer("spent", counted.clone(), persistent=False)

    def utility(self, patches: Tensor, between: bool = True) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """The expected PSNR minus cost / eta, in dB."""
        psnr = self.table(edge_score(patches), between)
        return psnr - (self.cost / self.eta).to(psnr.dtype)

    def forward(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """See the class."""
        if self.published:
            return torch.softmax(self.utility(patches, between=False).double(), dim=1)
        return budget_scores(self.utility(patches), self.spent)


def budget_scores(utility: Tensor, cost: Tensor) -> Tensor:  # [N, K], [K] -> [N, K]
    """Scores for which argmax of score / cost^penalty is, at every penalty, argmax of utility - price * cost at some price.

    The sum of the utility over all patches is then the largest at its cost. `assign_classes` weighs the logarithm of the cost,
    and if the logarithm of a score were PSNR itself, the first step, from nearly nothing to the narrowest network, would count
    for more than all others. As the price falls, a patch moves up the concave hull of its utility over cost, along each edge at
    the price that equals its slope. So the score rises along an edge by the ratio of the costs to f(slope), with one increasing
    f for all patches and f(0) = 0. Here f is a logarithm of slopes per cost of the most expensive class, so that no gain leaves
    the range of a float. Classes below the hull are never best. No two costs may be equal.
    """
    cost, order = cost.sort()
    value = utility[:, order].double()
    rows, last = torch.arange(len(value), device=value.device), len(cost) - 1
    current, total = torch.zeros_like(rows), value.new_zeros(len(value))
    logarithm = torch.full_like(value, UNWANTED)
    logarithm[:, 0] = 0
    for _ in range(last):
        # The edges from the present vertex of each patch to all more expensive classes. Cheaper classes are ruled out.
        run = (cost - cost[current, None]) / cost[last]
        slope = (value - value[rows, current, None]) / run.clamp(min=1e-9)
        slope[torch.arange(last + 1, device=value.device) <= current[:, None]] = -math.inf
        steepest, following = slope.max(dim=1)
        rise = steepest.sign() * steepest.abs().log1p() * (cost[following] / cost[current]).log()
        ended = current == last
        total = torch.where(ended, total, total + rise)
        current = torch.where(ended, current, following)
        logarithm[rows, current] = total
    logarithm = (logarithm - logarithm.amax(dim=1, keepdim=True)).clamp(min=UNWANTED)
    return torch.empty_like(utility).copy_(logarithm[:, order.argsort()].exp())


class ARM(nn.Module):
    """A network whose leading channels form narrower networks, bicubic interpolation, and a table that chooses among them.

    Class 0 is interpolation, class k the network at the k-th width. The widths share weights: each layer of a narrower network
    consists of the first rows and columns of the same layer here.

    Args:
        backbone: "fsrcnn", "carn", "srresnet" or "rcan"; or a function of width and scale that makes a network of one's own,
            each of whose weights at a width is the leading part of the same weight at every larger one.
        widths: increasing widths. Default: the published ones.
        scale: upscaling factor.
        bins: number of bins of the table.
        patch: LR patch size for which the costs of the decision are counted.

    Shape:
        (N, 3, p, p) in [0, 1] to (N, 3, p * scale, p * scale), each patch by its class. This is the plain form that defines the
        numbers; :class:`fastroute.PatchRouter` is the fast one.
    """

    widths: Tensor  # [K - 1]

    def __init__(
        self,
        backbone: str | Callable[[int, int], nn.Module] = "fsrcnn",
        widths: Sequence[int] | None = None,
        scale: int = 4,
        bins: int = BINS,
        patch: int = 32,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str) and backbone not in BACKBONES:
            raise ValueError(f"ARM: backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        self._make = BACKBONES[backbone] if isinstance(backbone, str) else backbone
        if widths is None and not isinstance(backbone, str):
            raise ValueError("ARM: widths must be given for a backbone of one's own")
        chosen = list(WIDTHS[str(backbone)] if widths is None else widths)
        if not chosen or chosen != sorted(set(chosen)):
            raise ValueError(f"ARM: widths must rise; got {tuple(chosen)}")
        self.scale, self.patch, self.num_classes = scale, patch, len(chosen) + 1
        self.network = self._make(chosen[-1], scale)
        with torch.device("meta"):
            # Only their structure is used. A plain list keeps them out of the state dict.
            self._shapes = [self._make(width, scale) for width in chosen]
            self._check_slices(chosen)
            size = (1, 3, patch, patch)
            cost = [0.0] + [float(count_flops(shape, size, "paper")) for shape in self._shapes]
        self.register_buffer("widths", torch.tensor(chosen))
        self.classifier = EdgeClassifier(EdgeTable(self.num_classes, bins), cost, spent=self.costs(patch))
        self.free = Bicubic(scale)

    def _check_slices(self, widths: Sequence[int]) -> None:
        """Refuse a network whose narrower forms are not its leading channels."""
        whole = self.network.state_dict()
        for width, shape in zip(widths, self._shapes, strict=True):
            for name, like in shape.state_dict().items():
                most = tuple(whole[name].shape) if name in whole else None
                size = tuple(like.shape)
                if most is None or len(most) != len(size) or any(n > m for n, m in zip(size, most, strict=True)):
                    raise ValueError(
                        f"ARM: backbone must give networks whose weights at a width are parts of those at a larger one; {name} "
                        f"is {size} at {width} and {most} at {widths[-1]}"
                    )

    @property
    def table(self) -> EdgeTable:
        """The classifier's table."""
        return self.classifier.table

    def sliced(self, k: int) -> dict[str, Tensor]:
        """Parameters and buffers of class `k` >= 1: views of those of the whole network, so that gradients reach them."""
        whole = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        shape = self._shapes[k - 1].state_dict()
        return {name: whole[name][tuple(slice(n) for n in like.shape)] for name, like in shape.items()}

    def run(self, k: int, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, 3, P, P]
        """Run `patches` through class `k`, on the shared weights."""
        if k == 0:
            return self.free(patches)
        return functional_call(self._shapes[k - 1].train(self.training), self.sliced(k), (patches,), strict=True)

    @property
    def branches(self) -> list[nn.Module]:
        """Interpolation and one network per width, with copies of the weights."""
        networks: list[nn.Module] = [Bicubic(self.scale)]
        for k, width in enumerate(self.widths.tolist(), start=1):
            network = self._make(width, self.scale)
            network.load_state_dict(self.sliced(k))
            networks.append(network.to(next(self.network.parameters())).eval())
        return networks

    def costs(self, patch: int = 32) -> list[float]:
        """The cost of every class on a patch, as `budget` counts it: FLOPs done, including those of the interpolation."""
        size = (1, 3, patch, patch)
        free = 2.0 * BICUBIC_TAPS * 3 * (patch * self.scale) ** 2
        return [free] + [float(count_flops(shape, size)) for shape in self._shapes]

    @torch.no_grad()
    def measure(self, lr: Tensor, hr: Tensor) -> Tensor:  # [N, 3, p, p], [N, 3, P, P] -> [N, K]
        """The PSNR in dB of every class on every patch, as published: in 8-bit steps, without a border of `scale` pixels."""
        inner = slice(self.scale, -self.scale)
        errors = []
        for k in range(self.num_classes):
            difference = (self.run(k, lr).clamp(0, 1) * 255).round() - hr * 255
            errors.append(difference[..., inner, inner].double().square().mean(dim=(1, 2, 3)))
        mse = torch.stack(errors, dim=1).clamp(min=1e-30)
        return (10 * torch.log10(255**2 / mse)).clamp(max=LARGEST_PSNR)

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, 3, P, P]
        """Run every patch through its class. For evaluation only: training runs one width at a time, by :meth:`run`."""
        class_ids = self.classifier(patches).argmax(dim=1)
        n, c, height, width = patches.shape
        output = patches.new_empty(n, c, height * self.scale, width * self.scale)
        for k in range(self.num_classes):
            rows = (class_ids == k).nonzero().squeeze(1)
            if rows.numel():
                output[rows] = self.run(k, patches[rows])
        return output
