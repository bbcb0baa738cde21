"""Files that hold weights, and files that do not: always one clear error, never code."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import picture, random_classsr, randomise
from safetensors.torch import save_file

import fastroute
from fastroute import CheckpointError
from fastroute.models.checkpoints import WRAPPERS, load_weights, read_checkpoint, save_checkpoint, state_dict_of
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN

pytestmark = pytest.mark.usefixtures("quick_tuning")
ENDINGS = [".pth", ".pt", ".safetensors"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A whole checkpoint of every kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for ending in ENDINGS:
        save_checkpoint(folder / f"whole{ending}", ClassSR.fsrcnn((3, 4)))
    torch.save(FSRCNN(3).state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder


def refused(path, *words: str) -> str:
    """`load` refuses `path` with an error that names it and says `words`; returns the message."""
    with pytest.raises(CheckpointError) as caught:
        fastroute.load(path)
    message = str(caught.value)
    assert all(word in message for word in (str(path), *words)), message
    assert len(message) < 1000 and "Traceback" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole.pth", "whole.pt", "whole.safetensors", "legacy.pth"])
def test_cut_short(files, tmp_path, name):
    data = (files / name).read_bytes()
    fastroute.load(files / name)
    path = tmp_path / name
    for length in (0, 1, 4, 7, 8, 9, 64, 500, len(data) // 4, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "cannot read")


@pytest.mark.parametrize("ending", ENDINGS)
@given(st.binary(max_size=300))
@settings(max_examples=30)
def test_no_checkpoint(tmp_path, ending, data):
    path = tmp_path / f"noise{ending}"
    path.write_bytes(data)
    refused(path, "cannot read")


def test_what_python_says_of_noise_is_not_told(tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(b"tt.")
    with pytest.raises(CheckpointError, match=r"damaged, cut short, or no checkpoint$"):
        fastroute.load(path)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30)
def test_damaged_pickle(files, tmp_path, data):
    """One byte of the pickle inside a .pth is another."""
    with zipfile.ZipFile(files / "whole.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in parts if name.endswith("data.pkl")]
    pickled = bytearray(parts[name])
    pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for other, content in parts.items():
            archive.writestr(other, bytes(pickled) if other == name else content)
    try:
        fastroute.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_with_code_in_it_is_refused(tmp_path, ending, wrapped):
    victim = tmp_path / "victim"

    class Hostile:
        def __reduce__(self):
            return open, (str(victim), "w")

    path = tmp_path / f"hostile{ending}"
    if wrapped:
        torch.save({"state_dict": FSRCNN(3).state_dict(), "x": Hostile()}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile()))
    words = ("never code",) if ending != ".safetensors" else ()
    refused(path, "cannot read", *words)
    assert not victim.exists()
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not victim.exists()
    if ending != ".safetensors":
        # The file would have done it.
        torch.load(path, weights_only=False) if wrapped else pickle.loads(path.read_bytes())
        assert victim.exists()


def test_no_file(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.pth")
    assert "it is a folder" in refused(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    assert "it is a folder" in refused(tmp_path / "folder.safetensors")


def test_text(tmp_path):
    for ending in ENDINGS:
        path = tmp_path / f"notes{ending}"
        path.write_text("These are not weights.\n" * 20)
        assert "more than tensors" not in refused(path, "cannot read")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], ("it holds a list, not a state dict",)),
        (torch.ones(3), ("it holds a Tensor, not a state dict",)),
        ({}, ("it holds no state dict",)),
        ({"state_dict": {}}, ("it holds no state dict",)),
        ({"epoch": 3, "optimizer": {}}, ("it holds no state dict", "epoch, optimizer")),
        ({"state_dict": 5, "lr": 1.0}, ("it holds no state dict",)),
        ({3: torch.ones(1)}, ("no known architecture", "3")),
        ({"conv1.weight": torch.ones(1), "conv1.bias": torch.ones(1)}, ("known architecture", "conv1.weight, conv1.bias")),
        ({"model": {"sd": 5}}, ("it holds no state dict",)),
        ({"model": {"sd": {}, "args": None}}, ("it holds no state dict",)),
        ({"model": {"sd": FSRCNN(3).state_dict(), "args": {"upscale": "many"}}}, ()),
        ({"head_conv.0.weight": torch.tensor(1.0)}, ("head_conv.0.weight",)),
        ({"head_conv.0.weight": torch.ones(0, 3, 5, 5)}, ("head_conv.0.weight",)),
        ({"net1.head_conv.0.weight": torch.tensor(1.0)}, ("net1.head_conv.0.weight",)),
    ],
)
def test_other_contents(tmp_path, content, words):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    refused(path, *words)


@pytest.mark.parametrize("metadata", [{"scale": "four"}, {"scale": "null"}, {"patch": "[1]"}, {"stride": "99"}, {"scale": "0"}])
def test_metadata_that_makes_no_sense(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    save_file({k: v.contiguous() for k, v in FSRCNN(3).state_dict().items()}, path, metadata)
    refused(path)


@pytest.mark.slow
def test_missing_unexpected_and_misshapen_entries(tmp_path):
    whole = ClassSR.fsrcnn((3, 4)).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in whole.items() if k != "classifier.lastOut.bias"}, path)
    refused(path, "does not fit ClassSR", "1 missing: classifier.lastOut.bias")
    torch.save({**whole, "net3.more": torch.ones(1)}, path)
    refused(path, "1 unexpected: net3.more")
    torch.save({**whole, "net1.tail_conv.bias": torch.ones(5)}, path)
    refused(path, "1 of another shape: net1.tail_conv.bias (5,) instead of (3,)")
    torch.save({k: v for k, v in whole.items() if not k.startswith("net1")}, path)
    refused(path, "does not fit", "missing", "unexpected")
    # Many problems are counted, not listed.
    message = refused(path)
    assert message.count(",") < 20 and " more" in message


def test_strict_in_both_directions():
    model = FSRCNN(3)
    before = model.head_conv[0].weight.detach().clone()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, {**state, "more": torch.ones(1)}, "x.pth")
    assert torch.equal(model.head_conv[0].weight, before), "loaded in part"
    load_weights(model, state, "x.pth")
    assert torch.equal(model.head_conv[0].weight, before + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        *((wrapper, "") for wrapper in (None, *WRAPPERS)),
        *((None, prefix) for prefix in ("module.", "_orig_mod.", "model.", "net_g.", "model.net_g.module.")),
        (WRAPPERS[0], "module._orig_mod."),
        (WRAPPERS[-1], "model.net_g.module."),
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    system = random_classsr((3, 4), 4)
    state = {prefix + k: v for k, v in system.state_dict().items()}
    path = tmp_path / "wrapped.pth"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 7, "lr": 0.1, "metadata": {"scale": 4}}, path)
    assert state_dict_of(read_checkpoint(path)[0], path).keys() == system.state_dict().keys()
    image = picture(1, 3, 32, 32)
    with torch.no_grad():
        upscaled = fastroute.load(path, scale=4).upscale(image).image
        torch.testing.assert_close(upscaled, system(image), rtol=0, atol=1e-5)


def test_wrappers_within_wrappers(tmp_path):
    """Averaged weights come first; a part that was compiled alone has its prefix inside."""
    system = random_classsr((3, 4), 4)
    last = {name: value + 1 for name, value in system.state_dict().items()}
    own = {f"model.{name.replace('net1.', 'net1._orig_mod.')}": value for name, value in system.state_dict().items()}
    path = tmp_path / "wrapped.pth"
    torch.save({"state_dict": {"params": last, "params-ema": {"n_averaged": torch.tensor(3), **own}}}, path)
    found = state_dict_of(read_checkpoint(path)[0], path)
    assert found.keys() == system.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in system.state_dict().items())


def test_plain_network_alone_and_as_pcsr_stores_it(tmp_path):
    network = randomise(FSRCNN(4, 3), 1).eval()
    path = tmp_path / "plain.pth"
    torch.save({"model": {"name": "fsrcnn", "args": {"upscale": 3}, "sd": network.state_dict()}, "epoch": 2}, path)
    router = fastroute.load(path)
    assert (router.scale, router.num_classes, router.classifier) == (3, 1, None)
    image = picture(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(router.upscale(image).image, network(image), rtol=0, atol=1e-5)
    save_checkpoint(tmp_path / "plain.safetensors", network, {"scale": 3})
    assert fastroute.load(tmp_path / "plain.safetensors").scale == 3


@pytest.mark.slow
def test_published_files(data_folder):
    weights = data_folder / "weights"
    # A supernet of ARM is a network of its largest width; CARN's has other layers than PCSR's.
    for name in ("fsrcnn-x4.pth", "carn-x4.pth", "arm-fsrcnn.pth", "arm-carn.pth"):
        assert fastroute.load(weights / name).num_classes == 1
    for name in ("pcsr-fsrcnn-x4.pth", "pcsr-carn-x4.pth"):
        assert isinstance(fastroute.load(weights / name), fastroute.PixelRouter)


def test_unknown_names(monkeypatch):
    monkeypatch.setattr("fastroute.loading.list_models", lambda: ["first", "second"])
    with pytest.raises(CheckpointError, match=r"no model or file 'third'; the models are first, second"):
        fastroute.load("third")


def test_saving(tmp_path):
    for name in ("weights.bin", "weights"):
        with pytest.raises(CheckpointError, match=r"must be \.safetensors, \.pth or \.pt"):
            save_checkpoint(tmp_path / name, FSRCNN(3))
    for ending in ENDINGS:
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(tmp_path / "absent" / f"x{ending}", FSRCNN(3))
    assert list(tmp_path.iterdir()) == []
    for ending in ENDINGS:
        path = tmp_path / f"x{ending}"
        save_checkpoint(path, FSRCNN(3), {"widths": (16, 36), "name": "ä", "np": float(np.float32(0.5))})
        assert read_checkpoint(path)[1] == {"widths": "[16, 36]", "name": '"\\u00e4"', "np": "0.5", "scale": "4"}
