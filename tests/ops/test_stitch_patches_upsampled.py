"""Tests of `stitch_patches.upsampled_out`: the last layers of the branches and the stitching in one pass."""

from __future__ import annotations

import pytest
import torch
from support import in_layout, random
from test_stitch_patches import shuffled
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional as F

import fastroute
from fastroute import TileGrid, make_window, stitch_patches
from fastroute.backends import unsupported_reasons
from fastroute.models.arm import Bicubic
from fastroute.models.fsrcnn import FSRCNN
from fastroute.ops._upsampled import FINISHED, Upsampler, stitch_upsampled
from fastroute.rewrite.optimize import interpolation, optimize, split_shuffle, split_upsampler

MISSING = "; ".join(unsupported_reasons("stitch_patches", "cpu", torch.device("cpu")))
needs_kernel = pytest.mark.skipif(bool(MISSING), reason=MISSING)
# Sums of up to 56 * 9 products of numbers about 1: float32's rounding of them, as in the error policy of arithmetic ops.
TOLERANCE = 2e-5


def upsampler(
    features: int, units: int, channels: int, shuffle: int, kernel: int = 3, expands: bool = True, seed: int = 0
) -> Upsampler:
    make = torch.Generator().manual_seed(seed)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=make)

    outputs = channels * shuffle**2
    weight = some(outputs, units if expands else features, kernel, kernel) / kernel / units**0.5
    if not expands:
        empty = torch.empty(0)
        return Upsampler(empty.view(0, 0), empty, empty, weight, some(outputs), shuffle)
    return Upsampler(some(units, features) / features**0.5, some(units), some(units), weight, some(outputs), shuffle)


def layers_of(x: Tensor, u: Upsampler) -> Tensor:
    """In float64, layer by layer."""
    x = x.double()
    if u.interpolates:
        return torch.einsum("Yy,ncyx,Xx->ncYX", u.weight.double(), x, u.weight.double())
    if u.expand.numel():
        x = F.prelu(F.conv2d(x, u.expand.double()[:, :, None, None], u.expand_bias.double()), u.slope.double())
    return F.pixel_shuffle(F.conv2d(x, u.weight.double(), u.bias.double(), padding=u.weight.shape[2] // 2), u.shuffle)


def check(
    grid: TileGrid,
    upsamplers: list[Upsampler],
    window: str = "uniform",
    images: int = 1,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, int] | None = None,
    finished: bool = False,
) -> None:
    """Against the layers in float64 and the reference's stitching, over batches of every kind in turn, finished ones too."""
    number = images * grid.num_patches
    features = [in_layout(random((number, u.features, grid.patch, grid.patch)), layout) for u in upsamplers]
    batches = list(features[0].split(3))
    turns = [FINISHED] * finished + [*range(len(upsamplers))]
    kinds = [turns[i % len(turns)] for i in range(len(batches))]
    batches = [features[kind].split(3)[i] for i, kind in enumerate(kinds)]
    inverse = shuffled(number, "cpu")
    made = [layers_of(batch, upsamplers[kind]) for batch, kind in zip(batches, kinds, strict=True)]
    for i, kind in enumerate(kinds):
        if kind == FINISHED:
            batches[i] = random(made[i].shape, seed=i)
            made[i] = batches[i].double()
    patches = torch.cat(made)
    with fastroute.use_backend("reference"):
        expected = stitch_patches(patches, grid, window, inverse)
    begin, end = rows or (0, grid.output_size[0])
    expected = expected[:, :, begin:end]
    out = torch.full(expected.shape, 7, dtype=dtype)
    weights = make_window(window, grid.patch * grid.scale)
    spent = stitch_upsampled(batches, kinds, upsamplers, grid, weights, inverse, (begin, end), out)
    assert spent.shape == (len(upsamplers) + 1,) and (spent >= 0).all()
    if dtype.is_floating_point:
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)
    else:
        levels = expected.clamp(0, 1) * (255 if dtype == torch.uint8 else 65535)
        slack = 0.5 + 65535 * TOLERANCE
        assert (out.double() - levels).abs().max() <= (0.51 if dtype == torch.uint8 else slack)


@pytest.mark.parametrize("shuffle", [2, 3, 4])
@pytest.mark.parametrize("geometry", [(9, 13, 8, 6), (20, 37, 8, 3), (5, 4, 8, 8), (70, 75, 33, 29)], ids=str)
def test_equals_the_layers(shuffle, geometry):
    grid = TileGrid(*geometry, shuffle)
    kinds = [upsampler(5, units, 3, shuffle, seed=units) for units in (4, 9, 17)]
    check(grid, kinds)
    check(grid, kinds, "hann", images=2, layout="contiguous")


@pytest.mark.parametrize("geometry", [(9, 13, 8, 6), (20, 37, 8, 3), (5, 4, 8, 8), (70, 75, 33, 29)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_finished_patches_among_others(geometry, dtype):
    for shuffle in (2, 4):
        kinds = [upsampler(5, units, 3, shuffle, seed=units) for units in (4, 17)]
        check(TileGrid(*geometry, shuffle), kinds, dtype=dtype, finished=True)
        check(TileGrid(*geometry, shuffle), kinds[:1], "hann", images=2, dtype=dtype, layout="contiguous", finished=True)


def test_finished_patches_alone():
    """As of a photograph all of whose patches are easy."""
    grid, u = TileGrid(20, 37, 8, 6, 4), upsampler(5, 4, 3, 4)
    patches, inverse = random((grid.num_patches, 3, 32, 32)), shuffled(grid.num_patches, "cpu")
    expected = stitch_patches(patches, grid, "hann", inverse)
    out = torch.full(expected.shape, 7.0)
    held, window = ([patches[:5], patches[5:]], [FINISHED, FINISHED], [u]), make_window("hann", 32)
    spent = stitch_upsampled(*held, grid, window, inverse, (0, 80), out)
    assert torch.equal(out, expected) and spent[0] == 0 < spent[1]


def blend(patch: int, scale: int, taps: int, channels: int = 3) -> Upsampler:
    """An interpolation of random numbers, `taps` of which meet in each output pixel."""
    make = torch.Generator().manual_seed(taps)
    weight, empty = torch.zeros(patch * scale, patch), torch.empty(0)
    for row in range(patch * scale):
        first = min(max(row // scale - taps // 2, 0), patch - min(taps, patch))
        weight[row, first : first + taps] = torch.randn(min(taps, patch), generator=make) / taps**0.5
    return Upsampler(torch.empty(0, channels), empty, empty, weight, empty, scale)


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("geometry", [(9, 13, 8, 6), (5, 4, 8, 8), (70, 75, 33, 29)], ids=str)
def test_interpolations(geometry, scale, taps):
    grid, kind = TileGrid(*geometry, scale), blend(geometry[2], scale, taps)
    check(grid, [kind])
    check(grid, [upsampler(5, 4, 3, scale), kind, upsampler(7, 9, 3, scale)], "hann", 2, "contiguous", finished=True)
    check(grid, [kind], dtype=torch.uint8, rows=(1, grid.output_size[0] - 2))


@pytest.mark.parametrize("scale", [2, 3, 4, 5])
@pytest.mark.parametrize("patch", [2, 3, 7, 16, 40])
def test_bicubic_interpolation(patch, scale):
    """Its matrix gives what PyTorch gives, edges included; at a factor of 3 every third row has one number."""
    grid = TileGrid(30, 41, patch, max(patch - 4, 1), scale)
    kind = interpolation(Bicubic(scale), patch)
    patches = random((grid.num_patches, 3, patch, patch))
    with fastroute.use_backend("reference"):
        expected = stitch_patches(Bicubic(scale)(patches.double()), grid)
    out = torch.empty(expected.shape)
    inverse, window = torch.arange(grid.num_patches), torch.ones(patch * scale)
    stitch_upsampled([patches], [0], [kind], grid, window, inverse, (0, out.shape[2]), out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("matrix", [torch.ones(24, 12), torch.eye(24)[:, :12].flip(0)], ids=["full", "falling"])
def test_errors_of_interpolations(matrix):
    grid, empty = TileGrid(9, 8, 12, 6, 2), torch.empty(0)
    kind = Upsampler(torch.empty(0, 3), empty, empty, matrix.contiguous(), empty, 2)
    patches, inverse = random((grid.num_patches, 3, 12, 12)), torch.arange(grid.num_patches)
    with pytest.raises(ValueError, match="at most 8 numbers side by side, none further left"):
        stitch_upsampled([patches], [0], [kind], grid, torch.ones(24), inverse, (0, 18), torch.empty(1, 3, 18, 16))


def test_what_is_an_interpolation():
    assert interpolation(Bicubic(4), 16).shuffle == 4
    assert interpolation(nn.Upsample(scale_factor=4, mode="bicubic"), 16) is None


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels(channels):
    check(TileGrid(9, 21, 8, 5, 4), [upsampler(3, 8, channels, 4)])


@pytest.mark.parametrize(("shuffle", "kernel"), [(2, 5), (2, 3), (3, 3), (4, 3)])
def test_without_expansion(shuffle, kernel):
    grid = TileGrid(9, 40, 8, 7, shuffle)
    check(grid, [upsampler(6, 6, 3, shuffle, kernel, expands=False)])
    check(grid, [upsampler(6, 11, 3, shuffle, kernel), upsampler(6, 6, 3, shuffle, kernel, expands=False)], "linear")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16, torch.float64], ids=str)
def test_types(dtype, layout):
    check(TileGrid(30, 26, 16, 12, 4), [upsampler(4, 10, 3, 4)], dtype=dtype, layout=layout)


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (5, 31), (7, 50), (63, 64)])
def test_rows(rows):
    check(TileGrid(16, 20, 8, 6, 4), [upsampler(4, 10, 3, 4)], rows=rows)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_layers_of_fsrcnn(scale):
    """A transposed convolution's taps, nearly half of which are 0."""
    torch.manual_seed(0)
    grid, split = TileGrid(20, 40, 16, 12, scale), []
    x = torch.rand(grid.num_patches, 3, 16, 16)
    networks = [FSRCNN(width, scale).double() for width in (16, 20)]
    for network in networks:
        nn.init.normal_(network.tail_conv.weight, std=0.1)
        body, factor = split_shuffle(optimize(network.float()))
        split.append(split_upsampler(body, factor))
    upsamplers = [u for _, u in split]
    assert [u.features for u in upsamplers] == [12, 12]
    with torch.no_grad():
        features = [body(x[i::2]) for i, (body, _) in enumerate(split)]
        patches = torch.cat([network.double()(x[i::2].double()) for i, network in enumerate(networks)])
    with fastroute.use_backend("reference"):
        expected = stitch_patches(patches, grid)
    out = torch.empty(expected.shape)
    stitch_upsampled(features, [0, 1], upsamplers, grid, torch.ones(16 * scale), torch.arange(len(x)), (0, 20 * scale), out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)


@needs_kernel
def test_rows_are_those_of_the_whole_bit_for_bit():
    """Wherever a band begins, and however the work is divided among threads."""
    grid = TileGrid(40, 70, 16, 12, 4)
    kinds, features = [upsampler(4, 10, 3, 4)], random((grid.num_patches, 4, 16, 16))
    inverse = shuffled(grid.num_patches, "cpu")

    def stitched(begin: int, end: int) -> Tensor:
        out = torch.empty(1, 3, end - begin, 280)
        stitch_upsampled([features], [0], kinds, grid, make_window("linear", 64), inverse, (begin, end), out)
        return out

    whole, threads = stitched(0, 160), torch.get_num_threads()
    for begin, end in ((0, 160), (3, 157), (48, 52), (17, 18)):
        assert torch.equal(stitched(begin, end), whole[:, :, begin:end])
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(stitched(0, 160), whole)
    finally:
        torch.set_num_threads(threads)


def test_patches_that_no_row_needs_may_be_missing():
    grid, kinds = TileGrid(20, 10, 8, 6, 2), [upsampler(4, 10, 3, 2)]
    features, inverse = random((grid.num_patches, 4, 8, 8)), torch.arange(grid.num_patches)
    whole = torch.empty(1, 3, 40, 20)
    stitch_upsampled([features], [0], kinds, grid, torch.ones(16), inverse, (0, 40), whole)
    inverse[-grid.cols :] = -(10**9)
    part = torch.empty(1, 3, 20, 20)
    stitch_upsampled([features], [0], kinds, grid, torch.ones(16), inverse, (0, 20), part)
    assert torch.equal(part, whole[:, :, :20])
    with pytest.raises(ValueError, match="inverse"):
        stitch_upsampled([features], [0], kinds, grid, torch.ones(16), inverse, (0, 40), whole)


def arguments() -> tuple[list, dict]:
    grid, u = TileGrid(9, 8, 8, 6, 2), upsampler(4, 6, 3, 2)
    args = [
        [random((2, 4, 8, 8))],
        [0],
        u.layers,
        None,
        None,
        torch.ones(16),
        *(grid.height, grid.width, grid.patch, grid.stride, grid.scale, False, 2, 0, 18),
    ]
    return args, {"out": torch.empty(1, 3, 18, 16), "spent": torch.empty(2, dtype=torch.float64)}


def test_opcheck():
    args, out = arguments()
    # What is measured differs from call to call.
    opcheck(torch.ops.fastroute.stitch_patches.upsampled_out, tuple(args), out, test_utils=("test_schema", "test_faketensor"))


@needs_kernel
@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, [], "kinds"),
        (1, [1], "kinds must lie in"),
        (1, [0, 0], "one entry per batch"),
        (2, [], "five tensors"),
        (0, [random((2, 5, 8, 8))], "4 features"),
        (1, [-2], "kinds must lie in"),
        (1, [-1], "kind -1 must have 3 features"),
        (0, [random((2, 4, 8, 8), torch.float64)], "float32"),
        (0, [random((2, 4, 7, 8))], "pixels wide"),
        (12, 3, "shuffle must divide"),
        (13, -1, "rows"),
        (5, torch.ones(15), "window"),
    ],
)
def test_errors_of_the_kernel(at, value, words):
    args, out = arguments()
    args[at] = value
    with pytest.raises(ValueError, match=words):
        torch.ops.fastroute.stitch_patches.upsampled_out(*args, **out)


@needs_kernel
def test_errors_of_finished_patches():
    args, out = arguments()
    features, patch = random((1, 4, 8, 8)), random((1, 3, 16, 16))
    operator = torch.ops.fastroute.stitch_patches.upsampled_out
    args[:2] = [features, patch], [0, FINISHED]
    with pytest.raises(ValueError, match="inverse must be given"):
        operator(*args, **out)
    args[3] = torch.arange(2)
    operator(*args, **out)
    # Interpolations.
    empty = torch.empty(0)
    held = args[2]
    for matrix, words in [(torch.ones(16, 9)[:, :8], "contiguous"), (torch.ones(8, 8), "weight must be 16 x 8")]:
        args[2] = [torch.empty(0, 3), empty, empty, matrix, empty]
        with pytest.raises(ValueError, match=words):
            operator(*args, **out)
    args[2] = held
    args[0] = [features, patch.contiguous(memory_format=torch.channels_last)]
    with pytest.raises(ValueError, match="finished patches must be 3 x 16 x 16"):
        operator(*args, **out)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [nn.Conv2d(4, 16, 3, padding=1)],
        [nn.ReLU(), nn.Conv2d(4, 16, 3)],
        [nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1, padding_mode="reflect")],
        [nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1, groups=2)],
        [nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1).double()],
        [nn.ReLU(), nn.Conv2d(4, 16, 1)],
        [nn.ReLU(), nn.Conv2d(4, 16, 7, padding=3)],
        [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 16, 3, padding=1)],
    ],
    ids=str,
)
def test_other_layers_are_not_split(layers):
    assert split_upsampler(nn.Sequential(*layers), 4) is None


def test_what_is_split_is_all_there():
    layers = [nn.ReLU(), nn.Conv2d(3, 4, 1, bias=False), nn.LeakyReLU(0.3), nn.Conv2d(4, 16, 3, padding=1, bias=False)]
    branch, x = nn.Sequential(*layers).eval(), random((2, 3, 5, 6))
    body, u = split_upsampler(branch, 4)
    assert len(body) == 1 and u.features == 3
    with torch.no_grad():
        torch.testing.assert_close(layers_of(body(x), u), F.pixel_shuffle(branch.double()(x.double()), 4))
    body, u = split_upsampler(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1)), 4)
    assert len(body) == 2 and u.expand.numel() == 0 and u.features == 4
