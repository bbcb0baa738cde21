"""The pixel path at a fixed size: whole images at once, every tensor with the same shape in every call, nothing read back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute._arguments import real
from fastroute._contexts import computing_in_own_type, ordinarily
from fastroute._copies import inference_copy
from fastroute._levels import quantise, to_float
from fastroute.budget.limits import check_possible, most_expensive
from fastroute.models.pcsr import relative_coordinates
from fastroute.models.precision import sums_of
from fastroute.ops import _checks as check
from fastroute.ops.adaptive_threshold import adaptive_threshold
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.pixel_mlp import pixel_mlp
from fastroute.ops.refine_boundaries import refine_boundaries
from fastroute.pixel.pixel_image import last_layer, odds, upsample
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.border import refuse_edge
from fastroute.runtime.cuda_graphs import CudaGraph
from fastroute.runtime.fixed_size import FixedUpscaled, check_fixed, check_shape


class FixedPixelRouter(nn.Module):
    """:meth:`PixelRouter.upscale` for images of one size, for CUDA graphs (:meth:`capture`), export and compilation.

    The operator counts and lists the pixels of a class on the device, so no capacities are needed, and the time of a call
    depends on the classes that it chooses. The image is that of :meth:`PixelRouter.upscale` up to what the encoder rounds
    differently on a whole image than on bands. The budget, which the images of a batch share, and the 2-means of each image are
    solved on all pixels.

    Args:
        router: the router whose encoder is copied, on its device, and whose MLPs are shared.
        shape: shape of the images, (B, C, h, w) or (C, h, w).
        dtype: type of the images: floating in [0, 1], uint8 or uint16.
        scale, size, penalty, adaptive, refine, budget: see :meth:`PixelRouter.upscale`.

    Raises:
        ValueError: an invalid shape, size or budget, or arguments that exclude each other.
        TypeError: an unsupported dtype, or `router` is not a :class:`PixelRouter`.

    Shape:
        images as `shape` says to images of the new size; :meth:`upscale` gives a :class:`fastroute.FixedUpscaled`, its class
        map uint8 (B, H, W) or (H, W).

    Differentiable: no.
    Deterministic: yes, as far as the encoder is.
    Synchronises: no; making one does.
    CUDA-graph safe: yes with the kernels of a GPU, if the encoder is.
    Memory layout: any strides; contiguous output. The features and logits of whole images are held at once.

    Example:
        >>> fixed = fastroute.FixedPixelRouter(router, (3, 270, 480), dtype=torch.uint8, scale=4, penalty=0.5)
        >>> graph = fixed.capture(frame)
        >>> result = graph(next_frame)
    """

    OP = "FixedPixelRouter"
    mean: Tensor  # [1, C or 1, 1, 1]
    place: Tensor  # [H + W]

    @ordinarily
    def __init__(
        self,
        router: PixelRouter,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        penalty: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
        budget: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(router, PixelRouter):
            raise TypeError(f"{self.OP}: router must be a PixelRouter; got {type(router).__name__}")
        refuse_edge(self.OP, router)
        self.shape, self.dtype, self.device = check_shape(self.OP, shape, router.channels), dtype, router.device
        check.dtype(self.OP, "dtype", dtype, check.FLOATING + check.INTEGER_IMAGE)
        if not math.isfinite(real(self.OP, "penalty", penalty)):
            raise ValueError(f"{self.OP}: penalty must be finite; got {penalty}")
        if (penalty != 0) + adaptive + (budget is not None) > 1:
            got = f"penalty={penalty}, adaptive={adaptive}, budget={budget}"
            raise ValueError(f"{self.OP}: give one of penalty, adaptive and budget; got {got}")
        if adaptive and router.num_classes != 2:
            raise ValueError(f"{self.OP}: adaptive needs exactly 2 classes; got {router.num_classes}; use penalty instead")
        h, w = self.shape[-2:]
        self.size = router.output_size(h, w, scale=scale, size=size)
        # The published code takes the mean factor of a size, rounded to one decimal.
        factor = router.scale if scale is None else float(scale)
        if size is not None:
            factor = max(round((size[0] / h + size[1] / w) / 2, 1), 0.1)
        self.costs = router.class_cost(factor) if penalty or budget is not None else [1.0] * router.num_classes
        self.num_classes, self.adaptive, self.budget, self.refine = router.num_classes, adaptive, budget, refine
        if budget is not None:
            budget = real(self.OP, "budget", budget)
            check_possible(self.costs, budget)
        # Then nothing needs to be classified.
        self.only = most_expensive(self.costs) if budget == 1 else None

        # A copy, because a graph refers to weights by their addresses, and the router's weights may move.
        networks = router.networks
        self.encoder, self.compute_dtype, self.mlps = inference_copy(router.encoder), router.dtype, networks.mlps
        # A compiler or an export sees the kernels that ran before, and the weights that were transformed for them.
        with torch.no_grad():
            self.encoder(torch.zeros((1, router.channels, 8, 8), dtype=self.compute_dtype, device=self.device))
        self.classifier = networks.classifier
        if adaptive:
            self.classifier = odds(networks.classifier)
        elif penalty:
            # argmax of softmax(z) / cost^k is argmax of z - k · log(cost): a change of the last bias.
            shift = torch.tensor([penalty * math.log(c) for c in self.costs], dtype=torch.float64).to(self.device)
            self.classifier = last_layer(networks.classifier, lambda w, b: (w, (b.double() - shift).to(b.dtype)))
        self.register_buffer("mean", networks.mean.to(self.device, sums_of(router.dtype)), persistent=False)
        like = torch.empty(1, dtype=router.dtype, device=self.device).expand(1, 1, h, w)
        self.register_buffer("place", relative_coordinates(like, self.size), persistent=False)

    def forward(self, image: Tensor) -> Tensor:  # [B, C, h, w] or [C, h, w]
        """The upscaled image, see :meth:`upscale`."""
        return self.upscale(image).image

    @computing_in_own_type
    @torch.no_grad()
    def upscale(self, image: Tensor) -> FixedUpscaled:  # [B, C, h, w] or [C, h, w]
        """Super-resolve images of the fixed size, see the class. The values of floating images are not checked."""
        images = check_fixed("upscale", image, self.shape, self.dtype, self.device)
        lr = to_float(images, sums_of(self.compute_dtype))
        features = self.encoder((lr - self.mean).to(self.compute_dtype, memory_format=torch.channels_last))
        classes = self._classes(features)
        raw = upsample(features, self.mlps, self.size, classes, lr, None, self.place)
        near = classes if self.refine else torch.zeros_like(classes)
        if self.dtype in check.INTEGER_IMAGE and torch.compiler.is_compiling():
            # The compiler refuses operators that return what they have written.
            wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
            output = quantise(refine_boundaries(wide, near), self.dtype)
        elif self.dtype in check.INTEGER_IMAGE:
            output = torch.empty(raw.shape, dtype=self.dtype, device=raw.device)
            refine_boundaries(raw, near, out=output)
        else:
            output = refine_boundaries(raw, near).to(self.dtype)
        if image.ndim == 3:
            output, classes = output[0], classes[0]
        return FixedUpscaled(output, classes, torch.zeros(self.num_classes, dtype=torch.int64, device=raw.device))

    def capture(self, image: Tensor) -> CudaGraph:  # [B, C, h, w] or [C, h, w]
        """Capture this upscale in a CUDA graph that takes images like `image`."""
        return CudaGraph(self.upscale, image)

    def _classes(self, features: Tensor) -> Tensor:  # [B, D, h, w] -> uint8 [B, H, W]
        if self.only is not None:
            size = (features.shape[0], *self.size)
            return torch.full(size, self.only, dtype=torch.uint8, device=features.device)
        logits = pixel_mlp(features, [self.classifier], self.size, relative=self.place)  # [B, K or 1, H, W]
        if self.adaptive:
            return adaptive_threshold(torch.sigmoid(logits[:, 0]), torch.uint8)
        if self.budget is None:
            return assign_classes(logits, [1.0] * self.num_classes, dtype=torch.uint8)
        return assign_classes(logits, self.costs, budget=self.budget, dtype=torch.uint8, logits=True)
