"""Reading and writing weights, safely."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fastroute import io

# Names under which training code stores a state dict beside other things, averaged weights before those of the last step;
# and what wrappers put before the names of all entries.
WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net_g")
PREFIXES = tuple(f"{name}." for name in ("module", "_orig_mod", "model", "net_g", "params_ema", "params-ema", "params"))
# Where a .pth keeps the options of its model, and those that the weights do not tell.
METADATA = "metadata"
OPTIONS = ("scale", "patch", "mean", "input_range")
NAMED_AT_MOST = 4


# What unpickling something else, or half a checkpoint, may raise.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, struct.error)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file and the reason."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint file holds: the object in it and its metadata.

    Pickled files are read with ``weights_only=True``: a file that would run code is refused.

    Args:
        path: a .safetensors file, or one that torch.save wrote.

    Returns:
        The dictionary stored, tensors on the CPU, and the metadata, values as JSON; {} where there are none.

    Raises:
        CheckpointError: missing, unreadable, cut short, not a checkpoint, or one that holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: permission denied") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: no whole safetensors file ({error})") from error
    except pickle.UnpicklingError as error:
        # Both a damaged pickle and one with code in it end here; torch's own text tells them apart.
        code = "GLOBAL" in str(error)
        reason = "it holds more than tensors and plain values" if code else "it is damaged or no checkpoint"
        raise CheckpointError(f"cannot read {path}: {reason}; only weights are loaded, never code") from error
    except DAMAGE as error:
        raise CheckpointError(f"cannot read {path}: damaged, cut short, or no checkpoint{_detail(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"cannot read {path}: it holds a {type(content).__name__}, not a state dict")
    metadata = content.get(METADATA)
    if not isinstance(metadata, Mapping):
        return dict(content), {}
    rest = {name: value for name, value in content.items() if name != METADATA}
    # As `save_checkpoint` writes it.
    state = rest["params"] if rest.keys() == {"params"} else rest
    return dict(state) if isinstance(state, Mapping) else rest, _as_json(metadata)


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: unwrapped, without the prefixes that compilers, trainers and several GPUs add.

    Raises:
        CheckpointError: there is none.
    """
    # Each of them at most once.
    for _ in WRAPPERS:
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors or len(tensors) != len(content):
        raise CheckpointError(f"cannot read {path}: it holds no state dict; its keys are {_some(content)}")
    return without_prefixes(tensors)


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries without what all their names begin with, of `PREFIXES`; a compiled part inside has one of its own."""
    # How many weights torch's AveragedModel has seen.
    state = {name.replace("._orig_mod.", "."): value for name, value in state.items() if name != "n_averaged"}
    while prefix := next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`, strictly.

    Raises:
        CheckpointError: a missing, an unexpected or a wrongly shaped entry; the message names them.
    """
    own = model.state_dict()
    problems = []
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]  # fmt: skip
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} {title}: {_some(names)}")
    if problems:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(dict(state))
    # Networks are built in torch's default type, but run in that of published weights.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32)
        if isinstance(module, nn.BatchNorm2d):
            module.float()


def save_checkpoint(path: str | Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the state dict of `model` in its published layout: safetensors, or torch's format for .pth and .pt.

    Args:
        path: the file; written under a temporary name and renamed.
        model: its state dict is written as it is, in a .pth as the entry "params".
        metadata: stored beside it, values as JSON: such as the scale, patch and stride, which :func:`fastroute.load` reads.
            What the model itself knows of its options is added.

    Raises:
        CheckpointError: another ending, or the folder cannot be written.
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
    """Options of a model, or of its most expensive branch, that its weights do not tell."""
    parts = [*getattr(model, "branches", [])[-1:], model]
    found = {name: getattr(part, name) for part in parts for name in OPTIONS if hasattr(part, name)}
    return {name: value.flatten().tolist() if isinstance(value, Tensor) else value for name, value in found.items()}


def _as_json(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """Metadata of a .pth: as they were written, or plain values that others have put there."""
    plain = {str(k): v for k, v in metadata.items() if isinstance(v, str | int | float)}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in plain.items()}


def _some(names: Any) -> str:
    listed = [str(name) for name in names]
    more = len(listed) - NAMED_AT_MOST
    return ", ".join(listed[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _detail(error: BaseException) -> str:
    """The first line of what torch or pickle says of the file, in brackets; nothing where Python itself stumbled, or where it
    is a bare number or byte."""
    line = (str(error).splitlines() or [""])[0][:120]
    return f" ({line})" if " " in line and isinstance(error, (RuntimeError, EOFError, OSError)) else ""
