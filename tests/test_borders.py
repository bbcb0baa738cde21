"""What networks see beyond the edge of an image, and how the grid of the patches shows on flat colours."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from networks import picture, random_classsr

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.runtime.border import MARGIN, continued

pytestmark = pytest.mark.usefixtures("quick_tuning")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 5, 7)])
def test_an_image_is_continued_by_its_edge(shape, dtype):
    image = (torch.rand(shape) * 200).to(dtype)
    expected = torch.nn.functional.pad(image.double().reshape(-1, *shape[-3:]), (MARGIN,) * 4, mode="replicate")
    assert torch.equal(continued(image).double().reshape(expected.shape), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classsr-fsrcnn-x4", "cdnsr-fsrcnn-x4", "arm-fsrcnn-x4", "pcsr-fsrcnn-x4"])
def test_flat_borders(name):
    router = fastroute.load(name, border="edge")
    white = torch.full((3, 40, 50), 255, dtype=torch.uint8)
    result = router.upscale(white)
    assert result.image.shape == (3, 160, 200) and result.image.is_contiguous()
    assert int(result.image.min()) >= 254
    # With zeros beyond the edge only ARM, whose flat patches are interpolated, and PCSR come close.
    plain = fastroute.load(name).upscale(white).image
    assert int(plain.min()) == {"classsr": 250, "cdnsr": 244, "arm": 255, "pcsr": 253}[name.split("-")[0]]


@pytest.mark.slow
def test_the_window_hides_the_grid():
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 90, 102).contiguous()
    ranges = {}
    for window in ("uniform", None):
        router = fastroute.load(window=window, merge=1)  # regions have no grid within
        inner = router.upscale(green).image[:, 32:-32, 32:-32].int()
        ranges[window] = int((inner.amax((1, 2)) - inner.amin((1, 2))).max())
    assert fastroute.load().window == "hann" and 2 * ranges[None] < ranges["uniform"]


@pytest.mark.slow
def test_edge_is_the_cut_result_of_the_continued_image():
    system = random_classsr((3, 5, 9), 2, 8)
    image = picture(2, 3, 21, 30)
    edge, plain = (
        fastroute.PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2, border=b)
        for b in ("edge", "zero")
    )
    result, whole = edge.upscale(image), plain.upscale(continued(image))
    cut = 2 * MARGIN
    assert torch.equal(result.image, whole.image[..., cut:-cut, cut:-cut]) and torch.equal(result.class_map, whole.class_map)
    assert not result.image.is_inference() and torch.equal(edge.upscale(image[0]).image, result.image[0])
    pixels, other = (fastroute.load("pcsr-fsrcnn-x4", scale=2, border=b) for b in ("edge", "zero"))
    small, large = pixels.upscale(image, penalty=0.5), other.upscale(continued(image), penalty=0.5)
    assert torch.equal(small.image, large.image[..., cut:-cut, cut:-cut])
    assert torch.equal(small.class_map, large.class_map[..., cut:-cut, cut:-cut])
    with pytest.raises(ValueError, match=r"needs a whole factor; got scale=2\.5"):
        pixels.upscale(image, scale=2.5)


@pytest.mark.slow
def test_what_needs_more_than_one_call_refuses_an_edge():
    router = fastroute.load(border="edge")
    image = torch.rand(3, 40, 40)
    for call in (
        lambda: router.stream(fastroute.ArrayReader(image.numpy(), channels_first=True), fastroute.ArrayWriter(None)),
        lambda: fastroute.upscale_many(router, [image], budget=0.8),
        lambda: fastroute.FixedPatchRouter(router, (3, 40, 40), capacities=(1.0, 1.0, 1.0)),
        lambda: fastroute.FixedPixelRouter(fastroute.load("pcsr-fsrcnn-x4", border="edge"), (3, 40, 40)),
    ):
        with pytest.raises(ValueError, match="border='edge' needs the whole image in one call"):
            call()
    with pytest.raises(ValueError, match="border must be one of zero, edge; got 'none'"):
        fastroute.load(border="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classsr-fsrcnn-x4", "pcsr-fsrcnn-x4"])
def test_on_the_command_line(tmp_path, name):
    image = (picture(1, 3, 40, 50)[0] * 255).to(torch.uint8)
    io.write_image(tmp_path / "a.png", image)
    arguments = [
        "upscale",
        tmp_path / "a.png",
        tmp_path / "b.png",
        "--class-map",
        tmp_path / "c.png",
        "--border",
        "edge",
        "--quiet",
    ]
    result = CliRunner().invoke(main, [*map(str, arguments), "--model", name])
    assert result.exit_code == 0, result.output
    assert torch.equal(io.read_image(tmp_path / "b.png"), fastroute.load(name, border="edge").upscale(image).image)
    assert io.read_image(tmp_path / "c.png").shape == (3, 160, 200)
