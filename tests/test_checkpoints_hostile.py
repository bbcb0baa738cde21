"""Checkpoints that promise more than they hold, or hold something else: one error that names the file, soon and small."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from time import perf_counter

import pytest
import torch
from networks import picture
from safetensors.torch import save_file

import fastroute
from fastroute import CheckpointError, buffers
from fastroute.catalogue import WEIGHTS
from fastroute.models.checkpoints import MOST_ENTRIES, read_checkpoint
from fastroute.training.recipes import read_config

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|TypedStorage|upscaling factor)")
CLASSSR, ABOUT = read_checkpoint(WEIGHTS / "classsr-fsrcnn-x4.safetensors")
PCSR, _ = read_checkpoint(WEIGHTS / "pcsr-fsrcnn-x4.safetensors")
ARM, ABOUT_ARM = read_checkpoint(WEIGHTS / "arm-fsrcnn-x4.safetensors")
IMAGE = picture(1, 3, 40, 40)[0]


class Code:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def header(entries: dict[str, list[int]], body: bytes = b"") -> bytes:
    """A safetensors file of these shapes, all values between the same offsets."""
    table = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(body)]} for name, shape in entries.items()}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


EMPTY = {
    "fsrcnn": {"head_conv.0.weight": [10**9, 0, 5, 5]},
    "carn": {"entry.weight": [10**5, 0, 3, 3]},
    "classsr": {"net1.head_conv.0.weight": [10**6, 0, 5, 5], "net99999999.head_conv.0.weight": [5, 0, 5, 5]},
    "rcan": {"head.0.weight": [50000, 0, 3, 3]},
    "srresnet": {"conv_first.weight": [100000, 0, 3, 3]},
    "pcsr": {"classifier.layers.0.weight": [10**9, 0], "encoder.head_conv.0.weight": [16, 0, 5, 5]},
    "pcsr classes": {"classifier.layers.0.weight": [16, 0], "classifier.layers.1.weight": [0, 10**6]},
}
VALUE = torch.zeros(1)
# Shapes that are stored in full, of networks that would take terabytes.
WIDE = {
    "fsrcnn": {"head_conv.0.weight": torch.zeros(200_000, 3, 1, 1)},
    "carn": {"entry.weight": torch.zeros(100_000, 3, 1, 1)},
    "rcan": {"head.0.weight": torch.zeros(100_000, 3, 1, 1)},
    "srresnet": {"conv_first.weight": torch.zeros(100_000, 3, 1, 1)},
    "classsr": {f"net{k}.conv_first.weight": torch.zeros(50_000, 3, 1, 1) for k in (1, 2, 3)},
    "pcsr": {"classifier.layers.0.weight": torch.zeros(100_000, 1), "encoder.entry.weight": torch.zeros(100_000, 3, 1, 1)},
    "arm": {
        "classifier.table.psnr": torch.zeros(3, 4),
        "widths": torch.tensor([4, 100_000]),
        "network.head_conv.0.weight": torch.zeros(100_000, 3, 1, 1),
    },
}
EXPANDED = {
    "fsrcnn": {"head_conv.0.weight": VALUE.expand(10**8, 3, 5, 5)},
    "carn": {"entry.weight": VALUE.expand(50000, 3, 3, 3)},
    "rcan": {"head.0.weight": VALUE.expand(30000, 3, 3, 3)},
    "table": {**ARM, "classifier.table.psnr": VALUE.expand(3, 10**11)},
}
OTHER = {
    "int": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "bool": lambda x: x.bool(),
    "nan": lambda x: torch.full_like(x, float("nan")),
    "infinite": lambda x: torch.full_like(x, float("inf")),
}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Loading is refused within seconds, and without large allocations; returns the message."""
    monkeypatch.chdir(tmp_path)

    def check(path, *words: str) -> str:
        begin = perf_counter()
        tracemalloc.start()
        peak = _peak()
        try:
            with pytest.raises(CheckpointError) as caught:
                fastroute.load(path)
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        message = str(caught.value)
        assert perf_counter() - begin < 10 and python < 300 << 20 and _peak() - peak < 600 << 20
        assert all(word in message for word in words) and len(message) < 1500, message
        assert not (tmp_path / "PWNED").exists()
        return message

    return check


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("name", EMPTY)
def test_shapes_without_values(tmp_path, refused, name):
    (tmp_path / "x.safetensors").write_bytes(header(EMPTY[name]))
    refused("x.safetensors", "is empty")


@pytest.mark.parametrize("name", EXPANDED)
def test_shapes_of_more_values_than_are_stored(refused, name):
    torch.save(EXPANDED[name], "x.pth")
    refused("x.pth", "fewer than its values take")


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_networks_that_their_weights_do_not_fill(refused, name):
    torch.save(WIDE[name], "x.pth")
    refused("x.pth", "x.pth")


def test_shapes_that_disagree_with_the_file(tmp_path, refused):
    (tmp_path / "x.safetensors").write_bytes(header({"head_conv.0.weight": [2**40, 3, 5, 5]}, b"1234"))
    refused("x.safetensors", "no whole safetensors file")
    # A number where a matrix should be.
    entries = {"classifier.layers.0.weight": VALUE[0], "encoder.head_conv.0.weight": torch.zeros(16, 3, 5, 5)}
    save_file(entries, "x.safetensors")
    refused("x.safetensors")
    save_file({**ARM, "classifier.table.psnr": torch.tensor(1.0)}, "x.safetensors", ABOUT_ARM)
    refused("x.safetensors")


@pytest.mark.parametrize("name", OTHER)
def test_tensors_that_are_no_weights(refused, name):
    torch.save({key: OTHER[name](value) for key, value in CLASSSR.items()}, "x.pth")
    refused("x.pth", {"nan": "NaN", "int": "int32", "quantised": "quantised"}.get(name, ""))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_weights(tmp_path, dtype, quick_tuning):
    path = tmp_path / "x.pth"
    torch.save({key: torch.nn.Parameter(value.to(dtype)) for key, value in CLASSSR.items()}, path)
    router = fastroute.load(path, scale=4)
    assert router.dtype == torch.float32 and router.upscale(IMAGE).image.isfinite().all()


@pytest.mark.slow
def test_too_many_entries(refused):
    # Each by itself is a whole tensor; one storage serves all, or the file would take long to make.
    blocks = {f"recon_trunk.{i}.conv1.weight": VALUE for i in range(MOST_ENTRIES + 1)}
    torch.save({"conv_first.weight": torch.zeros(64, 3, 3, 3), **blocks}, "x.pth")
    refused("x.pth", f"{MOST_ENTRIES + 2} entries")
    few = dict(list(blocks.items())[:2000])
    torch.save({"conv_first.weight": torch.zeros(64, 3, 3, 3), **few}, "x.pth")
    refused("x.pth", "at most 1000")


@pytest.mark.parametrize(
    "metadata",
    [
        {"scale": "[" * 100_000},
        {"scale": "1" * 5000},
        {"scale": "1000000000"},
        {"patch": "1000000"},
        {"patch": "100000000000", "stride": "1"},
        {"stride": "0"},
        {"stride": "40"},
        {"scale": "true"},
        {"scale": "4.0"},
        {"scale": "NaN"},
        {"input_range": "Infinity"},
        {"mean": "[1e999]"},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_metadata(refused, metadata, ending):
    about = {**ABOUT, **metadata}
    if ending == ".pth":
        torch.save({"params": CLASSSR, "metadata": about}, "x.pth")
    else:
        save_file(CLASSSR, "x.safetensors", about)
    refused(f"x{ending}")


@pytest.mark.slow
def test_metadata_without_end(refused):
    itself: dict = {}
    itself["state_dict"] = itself
    for content in (itself, {"metadata": itself}, {"params": {"a": VALUE}, "metadata": {"scale": itself}}):
        torch.save(content, "x.pth")
        refused("x.pth")
    # Deeper than Python's own pickler writes: lists in lists, by the instructions of a pickle.
    depth = 100_000
    nested = b"]" * depth + b"a" * (depth - 1)
    pickled = b"\x80\x02}X\x08\x00\x00\x00metadata}X\x05\x00\x00\x00scale" + nested + b"ss."
    with zipfile.ZipFile("x.pth") as whole, zipfile.ZipFile("deep.pth", "w") as deep:
        for name in whole.namelist():
            deep.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    refused("deep.pth")


@pytest.mark.parametrize(
    "model",
    [
        {"name": "pcsr-phase1"},
        {"name": "pcsr-phase1", "args": {"encoder_spec": None}, "sd": PCSR},
        {"sd": CLASSSR, "args": {"scale": 10**9}},
        *(
            {
                "name": "pcsr-phase1",
                "sd": PCSR,
                "args": {
                    "encoder_spec": {"name": "fsrcnn", "args": {"d": width}},
                    **{
                        f"{part}_spec": {"args": {"imnet_spec": {"args": {"hidden_list": hidden}}}}
                        for part in ("light_sampler", "heavy_sampler", "classifier")
                    },
                },
            }
            for width, hidden in ((10**9, [16]), (16, [10**9]), (16, [1] * 10**4), (16, ["a"]), (-5, [16]))
        ),
    ],
    ids=range(8),
)
def test_published_descriptions(refused, model):
    torch.save({"model": model}, "x.pth")
    refused("x.pth")


@pytest.mark.slow
def test_archives(tmp_path, refused):
    torch.save({"a": VALUE}, "small.pth")
    with zipfile.ZipFile("small.pth") as small, zipfile.ZipFile("x.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in small.namelist():
            bomb.writestr(name, small.read(name) if not name.endswith("/data/0") else bytes(64 << 20))
    refused("x.pth", "unpack to")
    with zipfile.ZipFile("small.pth", "a") as archive:
        archive.writestr("../../evil", "x")
    refused("small.pth")
    torch.save({"a": Code()}, "code.pth")
    refused("code.pth", "never code")
    torch.save({"a": Code()}, "legacy.pth", _use_new_zipfile_serialization=False)
    refused("legacy.pth", "never code")


def test_places_that_are_no_files(tmp_path, refused):
    os.mkfifo("pipe.pth")
    os.symlink("/dev/zero", "endless.pth")
    os.symlink("itself.pth", "itself.pth")
    os.mkdir("folder.pth")
    for name in ("pipe.pth", "endless.pth"):
        refused(name, "not a regular file")
    refused("folder.pth", "folder")
    for name in ("itself.pth", "a\0b.pth", "a" * 5000 + ".pth", "a" * 5000, "../../etc/passwd", "../weights/classsr-fsrcnn-x4"):
        refused(name)


def test_running_out_of_memory_is_no_fault_of_the_file(monkeypatch):
    """And is told as what it is."""
    monkeypatch.setattr("fastroute.loading.fitted", lambda *args: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        fastroute.load("classsr-fsrcnn-x4")
    assert buffers.is_exhausted(MemoryError())


def test_a_device_without_values():
    with pytest.raises(ValueError, match=r"^device 'meta' cannot be used: its tensors hold no values$"):
        fastroute.load("classsr-fsrcnn-x4", device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[" * 10_000, "batch: " + "1" * 5000, "a: &a [*a, *a]"])
def test_settings_without_end(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        read_config(path)
