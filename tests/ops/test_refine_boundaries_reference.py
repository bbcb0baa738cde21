"""`refine_boundaries`: the reference against a table and against the published unfold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.reference.refine_boundaries import refine_boundaries_reference


def test_table() -> None:
    image = torch.arange(20.0).view(1, 1, 4, 5) ** 2
    class_map = torch.zeros(1, 4, 5, dtype=torch.int64)
    class_map[0, 1, 1] = 1
    # Beside (1, 1) lie eight pixels; those in the interior are (1, 2), (2, 1) and (2, 2).
    expected = image.clone()
    for y, x in ((1, 2), (2, 1), (2, 2)):
        expected[0, 0, y, x] = image[0, 0, y - 1 : y + 2, x - 1 : x + 2].mean()
    torch.testing.assert_close(refine_boundaries_reference(image, class_map), expected, rtol=1e-6, atol=0)
    assert expected[0, 0, 1, 2].item() == pytest.approx((1 + 4 + 9 + 36 + 49 + 64 + 121 + 144 + 169) / 9)


def test_a_heavy_corner_reaches_inwards_but_borders_stay() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).square()
    class_map = torch.zeros(1, 3, 3, dtype=torch.uint8)
    class_map[0, 0, 0] = 2
    expected = image.clone()
    expected[0, 0, 1, 1] = image.mean()
    torch.testing.assert_close(refine_boundaries_reference(image, class_map), expected)


@pytest.mark.parametrize("value", [0, 1, 2])
def test_one_class_changes_nothing(value: int) -> None:
    image = torch.rand(2, 3, 6, 7)
    class_map = torch.full((2, 6, 7), value)
    output = refine_boundaries_reference(image, class_map)
    assert torch.equal(output, image)
    assert output.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("shape", [(1, 3, 2, 9), (1, 3, 9, 2), (1, 1, 1, 1), (0, 3, 5, 5), (1, 3, 0, 4), (2, 0, 4, 4)])
def test_without_an_interior_it_is_a_copy(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    class_map = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    class_map[..., ::2] = 1
    assert torch.equal(refine_boundaries_reference(image, class_map), image)


def published(image: Tensor, class_map: Tensor) -> Tensor:  # [B, C, H, W], [B, H, W] -> [B, C, H, W]
    b, c, h, w = image.shape
    windows = F.unfold(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3).view(b, c, 9, h, w)
    classes = F.unfold(F.pad(class_map[:, None].to(image.dtype), (1, 1, 1, 1), mode="replicate"), 3).view(b, 9, h, w)
    inner = torch.zeros(h, w, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    chosen = (class_map == 0) & (classes.sum(dim=1) > 0) & inner
    return torch.where(chosen[:, None], windows.mean(dim=2), image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_against_published_unfold(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 17, 22, generator=generator, dtype=torch.float64)
    class_map = (torch.rand(2, 17, 22, generator=generator) < share) * torch.randint(1, 4, (2, 17, 22))
    output = refine_boundaries_reference(image.to(dtype), class_map)
    assert output.dtype == dtype
    expected = published(image.to(dtype).double(), class_map)
    # One rounding of the mean to the output's type, values in [0, 1].
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=max(torch.finfo(dtype).eps, 1e-15))


def test_strides_and_gradient() -> None:
    class_map = torch.zeros(1, 5, 6, dtype=torch.int64)
    class_map[0, 2, 2:4] = 1
    image = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    last = image.to(memory_format=torch.channels_last)
    output = refine_boundaries_reference(last, class_map.mT.contiguous().mT)
    assert output.is_contiguous()
    assert torch.equal(output, refine_boundaries_reference(image, class_map))
    assert torch.autograd.gradcheck(lambda x: refine_boundaries_reference(x, class_map), image.requires_grad_())
