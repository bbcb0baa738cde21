"""Safe reading and writing of weights."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fastroute import io

# The names under which training code stores a state dict beside other things (averaged weights come before those of the last
# step), and the prefixes that wrappers add to the names of all entries.
WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net_g")
PREFIXES = tuple(f"{name}." for name in ("module", "_orig_mod", "model", "net_g", "params_ema", "params-ema", "params"))
# The entry in which a .pth keeps the options of its model, and the options that do not follow from the weights.
METADATA = "metadata"
OPTIONS = ("scale", "patch", "mean", "input_range")
NAMED_AT_MOST = 4
M = TypeVar("M", bound=nn.Module)


# What unpickling half a checkpoint, or something else, may raise.
DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    RecursionError,
)
# No known network has more entries, and a file with more would take minutes to look through.
MOST_ENTRIES = 20_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file and the reason."""


def read_checkpoint(path: str | Path, arrays: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a checkpoint file: the object in it and its metadata.

    Pickled files are read with ``weights_only=True``: a file that would run code is refused.

    Args:
        path: a .safetensors file, or one that torch.save wrote.
        arrays: allow NumPy arrays of numbers in it too.

    Returns:
        The stored dictionary, with tensors on the CPU, and the metadata with values as JSON, {} if there are none.

    Raises:
        CheckpointError: the file is missing, unreadable, cut short, not a checkpoint, or holds code.
    """
    path = Path(path)
    try:
        # A pipe or a device may never end.
        if not path.is_file():
            reason = "it is a folder" if path.is_dir() else "it is not a regular file" if path.exists() else "no such file"
            raise CheckpointError(f"cannot read {short(path)}: {reason}")
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                names = list(file.keys())
                _refuse_many(len(names), path)
                return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
        _check_archive(path)
        with torch.serialization.safe_globals(_array_parts() if arrays else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: permission denied") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: no whole safetensors file ({error})") from error
    except pickle.UnpicklingError as error:
        # Both a damaged pickle and one with code in it end here. Only torch's message distinguishes them.
        code = "GLOBAL" in str(error)
        reason = "it holds more than tensors and plain values" if code else "it is damaged or no checkpoint"
        raise CheckpointError(f"cannot read {path}: {reason}; only weights are loaded, never code") from error
    except DAMAGE as error:
        raise CheckpointError(f"cannot read {short(path)}: damaged, cut short, or no checkpoint{_detail(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"cannot read {path}: it holds a {type(content).__name__}, not a state dict")
    metadata = content.get(METADATA)
    if not isinstance(metadata, Mapping):
        return dict(content), {}
    rest = {name: value for name, value in content.items() if name != METADATA}
    # The form that `save_checkpoint` writes.
    state = rest["params"] if rest.keys() == {"params"} else rest
    return dict(state) if isinstance(state, Mapping) else rest, _as_json(metadata)


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: unwrapped, and without the prefixes that compilers, trainers and several GPUs add.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    return without_prefixes(tensors_of(content, path))


def tensors_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint under the names that are stored: "model." may be a prefix or a part of the network.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    # Each prefix is removed at most once.
    for _ in WRAPPERS:
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    _refuse_many(len(content), path)
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors or len(tensors) != len(content):
        raise CheckpointError(f"cannot read {path}: it holds no state dict; its keys are {_some(content)}")
    for name, tensor in tensors.items():
        if reason := _unusable(tensor, name):
            raise CheckpointError(f"cannot use {path}: {shown(name)} {reason}; weights must be plain floating tensors")
    return tensors


def _array_parts() -> list[Any]:
    """The types in a pickled NumPy array of numbers. Arrays of objects need more types, and are still refused."""
    # NumPy 2 has moved the function, but files contain its old name.
    rebuild = (np._core if hasattr(np, "_core") else np.core).multiarray._reconstruct
    names = [f"numpy.{folder}.multiarray._reconstruct" for folder in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32)]
    return [*((rebuild, name) for name in names), np.ndarray, np.dtype, *kinds]


def _refuse_many(number: int, path: str | Path) -> None:
    if number > MOST_ENTRIES:
        raise CheckpointError(f"cannot use {path}: it has {number} entries, where a network has at most {MOST_ENTRIES}")


def _check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more than its size, before any of it is unpacked."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    # A handful of records describe the archive, and each tensor has at most one record.
    _refuse_many(len(records) - 16, path)
    unpacked, size = sum(record.file_size for record in records), path.stat().st_size
    if unpacked > 2 * size:
        raise CheckpointError(f"cannot read {path}: {size} bytes unpack to {unpacked}; torch.save does not compress")


def _unusable(tensor: Tensor, name: str) -> str:  # [...]
    """Why `tensor` cannot be a weight; "" if it can."""
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is not dense ({tensor.layout})"
    if tensor.device.type == "meta":
        return "has no data (device meta)"
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return f"is of type {tensor.dtype}"
    if not tensor.numel():
        return f"of shape {tuple(tensor.shape)} is empty"
    stored = tensor.untyped_storage().nbytes()
    if stored < tensor.numel() * tensor.element_size():
        return f"of shape {tuple(tensor.shape)} has {stored} bytes, fewer than its values take"
    # A table that has not been measured yet and the worth of a decibel, which may be infinite, are not weights.
    plain = ".table." not in name and not name.endswith("classifier.eta")
    if tensor.is_floating_point() and plain and not bool(tensor.to(torch.float32).isfinite().all()):
        return "holds NaN or infinite values"
    return ""


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries without the `PREFIXES` that all their names begin with. A compiled part of the model has its own prefix."""
    # The counter of torch's AveragedModel.
    state = {name.replace("._orig_mod.", "."): value for name, value in state.items() if name != "n_averaged"}
    while prefix := next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`, strictly.

    Raises:
        CheckpointError: an entry is missing, unexpected, or of another shape or type. The message names such entries.
    """
    check_fits(model, state, path)
    model.load_state_dict(dict(state))
    # Networks are built in torch's default type, but run in the type of published weights.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32)
        if isinstance(module, nn.BatchNorm2d):
            module.float()


def fitted(build: Callable[[], M], state: Mapping[str, Tensor], path: str | Path) -> M:
    """The network that `build` makes, with the weights of `state`. Nothing of its size is allocated until these fit.

    Raises:
        CheckpointError: see :func:`load_weights`; also if no network can have such sizes.
    """
    try:
        with torch.device("meta"):
            plan = build()
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        detail = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"cannot use {path}: {detail}") from error
    check_fits(plan, state, path)
    model = build()
    load_weights(model, state, path)
    return model


def check_fits(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse a `state` that does not fit `model`, which may be on the meta device.

    Raises:
        CheckpointError: see :func:`load_weights`.
    """
    own = model.state_dict()
    problems = []
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]  # fmt: skip
    types = [f"{k} {str(state[k].dtype).removeprefix('torch.')}" for k, v in own.items()
             if k in state and state[k].is_floating_point() != v.is_floating_point()]  # fmt: skip
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes), ("of another type", types))
    for title, names in found:
        if names:
            problems.append(f"{len(names)} {title}: {_some(names)}")
    if problems:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")


def save_checkpoint(path: str | Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the state dict of `model` in its published layout: safetensors, or torch's format for .pth and .pt.

    Args:
        path: the file, which is written under a temporary name and then renamed.
        model: the model whose state dict is written, in a .pth as the entry "params".
        metadata: options stored beside it, with values as JSON, such as the scale, patch and stride that :func:`fastroute.load`
            reads. Options that the model itself knows are added.

    Raises:
        CheckpointError: the file has another ending, or the folder cannot be written.
    """
    path = Path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    about = {k: json.dumps(v) for k, v in {**_options(model), **(metadata or {})}.items()}
    try:
        if path.suffix == ".safetensors":
            data = save_safetensors(state, about)
            io.write_atomically(path, lambda file: file.write(data))
        elif path.suffix in (".pth", ".pt"):
            io.write_atomically(path, lambda file: torch.save({"params": state, METADATA: about}, file))
        else:
            raise CheckpointError(f"cannot write {path}: its ending must be .safetensors, .pth or .pt")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _options(model: nn.Module) -> dict[str, Any]:
    """The options of a model, or of its most expensive branch, that do not follow from its weights."""
    parts = [*getattr(model, "branches", [])[-1:], model]
    found = {name: getattr(part, name) for part in parts for name in OPTIONS if hasattr(part, name)}
    return {name: value.flatten().tolist() if isinstance(value, Tensor) else value for name, value in found.items()}


def _as_json(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """The metadata of a .pth: as `save_checkpoint` writes them, or plain values that other code has stored."""
    plain = {str(k): v for k, v in metadata.items() if isinstance(v, str | int | float)}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in plain.items() if not isinstance(v, int) or abs(v) < 2**63}


def _some(names: Any) -> str:
    listed = [shown(name) for name in names]
    more = len(listed) - NAMED_AT_MOST
    return ", ".join(listed[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def shown(name: object) -> str:
    """A name out of a file as text for messages: not too long, and nothing that a terminal would act upon."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[:80])


def short(path: str | Path) -> str:
    """`path` as text for messages."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:150]}…{text[-150:]}"


def _detail(error: BaseException) -> str:
    """The first line of an error of torch or pickle, in brackets; "" if Python itself failed, or for a bare number or byte."""
    line = (str(error).splitlines() or [""])[0][:120]
    return f" ({line})" if " " in line and isinstance(error, (RuntimeError, EOFError, OSError)) else ""
