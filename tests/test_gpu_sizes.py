"""How much the routers do at once on a GPU, where there is none: a CPU is given its sizes."""

from __future__ import annotations

import pytest
import torch
from networks import picture, random_classsr
from test_pixel_router import make_model
from torch import nn
from waits import GPU

import fastroute
from fastroute import PatchRouter, PixelRouter, buffers
from fastroute.files import many_files
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.patch import branches, classify, passes, patch_memory, patch_speed
from fastroute.pixel import pixel_image, pixel_rows, pixel_speed
from fastroute.pixel.pixel_rows import PixelGrid, PixelMemory
from fastroute.runtime import memory_plan, tuning
from fastroute.runtime.protocols import ArrayReader
from fastroute.runtime.transfer import to_host

pytestmark = pytest.mark.usefixtures("quick_tuning")
CUDA = torch.device("cuda", 0)


def make_router(**options) -> PatchRouter:
    system = random_classsr((3, 5, 8), 4, 16)
    return PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=4, **options)


def gpu_sizes(monkeypatch) -> None:
    """The CPU's sizes become a GPU's, but for the default limit."""
    for module in (branches, passes, patch_speed, classify, patch_memory, pixel_image, pixel_speed, pixel_rows, memory_plan):
        for name, table in list(vars(module).items()):
            if isinstance(table, dict) and set(table) == {"cpu", "cuda"} and name != "DEFAULT_LIMIT":
                monkeypatch.setattr(module, name, {"cpu": table["cuda"]})
    # A GPU takes no strips but of very wide images.
    monkeypatch.setattr(pixel_rows, "MAX_COLUMNS", 1 << 17)


class Fake:
    """A reader of any size that must not be read; nothing is computed."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape = (3, height, width)

    def read(self, y0, y1, x0, x1):
        raise InterruptedError("the limit suffices")


def begins(router, reader, **options) -> bool:
    """Whether the limit lets `stream` begin."""
    try:
        router.stream(reader, None, **options)
    except InterruptedError:
        return True
    except ValueError as error:
        assert "memory_limit must be at least" in str(error)
        return False


@pytest.mark.slow
@pytest.mark.parametrize("size", [(600, 800), (9000, 12000)])
def test_the_default_limit_suits_a_gpu(monkeypatch, size):
    gpu_sizes(monkeypatch)
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 1024})  # the fewest to which a GPU goes down
    routers: list = [router for name in fastroute.list_models() if (router := fastroute.load(name)).num_classes > 1]
    for router in routers:
        if isinstance(router, PatchRouter):
            # The most that may pass together.
            largest = [min(1024, router.networks.largest(c, router.device)) for c in range(router.num_classes)]
            for c, number in enumerate(largest):
                router.networks._search(c, router.device).best = tuning.Setting(number * 32 * 32)
        limits = memory_plan.DEFAULT_LIMIT
        assert not begins(router, Fake(*size), memory_limit=limits["cpu"]) or size[0] < 1000
        assert begins(router, Fake(*size), memory_limit=limits["cuda"]), f"{router} needs more"


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1, 1.5, 2, 3, 4])
def test_the_default_limit_suits_any_scale_on_a_gpu(scale):
    hidden = ([16] * 4, [256] * 4)
    for encoder in (FSRCNN(56, upsample=False), CARN(64, upsample=False)):
        router = PixelRouter(PCSR.build(encoder, hidden, [16]))
        for lr in ((600, 800), (6000, 8000), (700, 90_000)):
            grid = PixelGrid(lr, tuple(round(n * scale) for n in lr), CUDA, pixel_rows.BAND_PARTS[-1])
            used = router.memory.working_set(grid, grid.overlapping, 0, 4, True)
            fits = memory_plan.limit_on(CUDA, "auto")
            assert used.bytes(used.block) <= fits


def test_limits_on_devices():
    cpu = torch.device("cpu")
    assert [memory_plan.limit_on(d, "auto") for d in (cpu, CUDA, GPU)] == [512 << 20, 8 << 30, 512 << 20]
    assert [memory_plan.limit_on(CUDA, limit) for limit in (None, 7)] == [None, 7]
    router = make_router(batch=8)
    for limit in ("1 GB", "AUTO"):
        with pytest.raises(TypeError, match="memory_limit must be a whole number of bytes"):
            router.stream(ArrayReader(picture(1, 3, 9, 9)[0].numpy(), True), None, memory_limit=limit)


@pytest.mark.slow
def test_encoder_bands_on_a_gpu(monkeypatch):
    """As large as memory allows, the same for the model of the memory, and no strips but of very wide images."""
    router, calls, rows = PixelRouter(make_model("carn")), [], pixel_image.rows_in_bands
    memory, grid, here = router.memory, PixelGrid((5000, 3000), (5000, 3000), CUDA), PixelGrid((9, 9), (9, 9))
    for passing, pixels in ((1 << 10, 1 << 21), (1 << 14, 1 << 17), (1 << 30, 16 * 640)):
        memory.passing = passing
        assert memory.encoder_band(grid) == (pixels, pixels // 16)
        assert memory.encoder_band(here) == (1 << 15, 640)
        whole = memory.working_set(grid, True, 0, 4, False).fixed
        with monkeypatch.context() as patched:
            patched.setattr(PixelMemory, "encoder_band", lambda self, _: (0, 1))
            assert whole - memory.working_set(grid, True, 0, 4, False).fixed == pixels * passing
    memory.passing = 1 << 10
    monkeypatch.setattr(pixel_image, "rows_in_bands", lambda *args: calls.append(args[4:]) or rows(*args))
    image = picture(1, 3, 6, 1300)
    strips = router.upscale(image, scale=1)
    assert calls.pop() == (1 << 15, 16, 640)
    encoder_band = PixelMemory.encoder_band
    monkeypatch.setattr(PixelMemory, "encoder_band", lambda self, _: encoder_band(self, grid))
    whole = router.upscale(image, scale=1)
    assert calls.pop() == (1 << 21, 16, 1 << 17)
    assert (whole.image - strips.image).abs().max() < 1e-5


def test_bands_of_pixels():
    lr, size = (4000, 3000), (16000, 12000)
    assert len(PixelGrid(lr, size).bands()) == -(-16000 * 12000 // (1 << 20))
    assert len(PixelGrid(lr, size, CUDA).bands()) == -(-16000 * 12000 // (1 << 25))
    # At a small factor the rows of the image count.
    assert len(PixelGrid(lr, lr, CUDA).bands()) == -(-4000 * 3000 // (1 << 21))
    assert len(PixelGrid(lr, size, CUDA, 4).bands()) == -(-16000 * 12000 // (1 << 23))


def test_batches_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    class There:
        """A patch on a GPU, as far as tuning looks."""

        is_cuda, device, dtype, shape = True, CUDA, torch.float32, (1, 3, 8, 8)

    for largest in (1 << 20, 5000):
        tuning._searches.clear()
        race, raced = tuning.search_of(nn.Identity(), There()), []
        assert race.patches((8, 8), largest) == (1 << 20) // 64
        while race.best is None:
            # All turns of a call are given out before any is timed: nobody waits.
            while (turn := race.trial((8, 8), largest)) is not None:
                raced.append(turn)
            for turn in raced[-30:]:
                if race._given[(8, 8), turn]:
                    race.add((8, 8), turn, 1 / turn.batch((8, 8)))
        found = {min(turn.batch((8, 8)), largest) for turn in raced}
        assert found == {min(pixels // 64, largest) for pixels in tuning.GPU_PIXELS}
        assert min(race.best.batch((8, 8)), largest) == min(1 << 14, largest)
    # What other batches were compared on is measured again.
    key = tuning.tuning_key(nn.Identity(), There())
    monkeypatch.setattr(tuning, "GPU_PIXELS", (16,))
    assert tuning.tuning_key(nn.Identity(), There()) != key


@pytest.mark.slow
def test_speeds_on_a_gpu_are_measured_on_many_patches(monkeypatch):
    router, sizes = make_router(batch=8), []
    upscale = router.upscale

    def counted(image, class_map):
        sizes.append(class_map.numel())
        return upscale(image, class_map=class_map)

    monkeypatch.setattr(router, "upscale", counted)
    router._measured_speed(torch.float32)
    assert set(sizes) == {16}
    monkeypatch.setattr(patch_speed, "PATCHES", {"cpu": patch_speed.PATCHES["cuda"]})
    sizes.clear()
    router._measured_speed(torch.float32)
    assert set(sizes) == {1024}
    # A budget classifies the picture once, or its scores were counted twice.
    height, width = pixel_speed.PICTURE["cuda"]
    assert 16 * height * width <= pixel_rows.BUDGET_SAMPLE["cuda"]


def test_threads_of_a_folder():
    assert [many_files.threads(n) for n in (1, 2, 4, 8, 16, 64)] == [(2, 2), (2, 2), (2, 2), (2, 4), (4, 8), (4, 8)]
    assert many_files.threads(many_files.usable_cores()) == (many_files.READERS, many_files.WRITERS)
    assert many_files.BEHIND == many_files.WRITERS + 1 and many_files.usable_cores() >= 1


def test_free_memory_is_asked_for_only_in_need(monkeypatch):
    state, asked = {"allocated": 100, "reserved": 400, "free": 1000}, []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(1) or (state["free"], 5000))
    lowest = memory_plan.WorkingSet(10)
    with memory_plan.advised("upscale", CUDA, 5000, lambda: lowest, False):
        pass
    assert not asked and buffers.available(CUDA) == 1300
    with (
        pytest.raises(torch.OutOfMemoryError, match="memory_limit=1040 would fit"),
        memory_plan.advised("upscale", CUDA, 5000, lambda: lowest, False),
    ):
        state.update(allocated=1100, reserved=1400, free=0)
        raise torch.OutOfMemoryError


def test_rows_from_a_gpu_are_ordinary_tensors(monkeypatch):
    class Stream:
        def __init__(self, *args) -> None:
            pass

        def __getattr__(self, name):
            return lambda *args: self

        __enter__ = __exit__ = lambda self, *args: None

    class There:
        """Rows on a GPU."""

        device, dtype = CUDA, torch.float32

        def contiguous(self):
            return torch.ones(2, 3)

        def record_stream(self, stream):
            pass

    empty = torch.empty
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    with torch.inference_mode():
        host, ready = to_host(There())  # type: ignore[arg-type]
    ready()
    assert not host.is_inference() and host.add_(1).tolist() == [[2.0] * 3] * 2
