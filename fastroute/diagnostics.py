"""`info`: installed versions, devices, and the backend of every operator."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fastroute.backends import BACKENDS, EXTENSION, OTHER_TRITONS, TRITON, installed_version, select, unsupported_reasons

PACKAGES = ("torch", "numpy", "pillow", "tifffile", "imagecodecs", "safetensors")


def operators() -> list[str]:
    """The names of all operators."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[!_]*.py"))


def needs(reason: str, device: str) -> str:
    """Why a backend cannot run on `device`, without tensors that nobody has made yet."""
    return reason.replace(f"the tensors are on {device}", f"it needs {'a GPU' if device == 'cpu' else 'a CPU'}")


def devices() -> dict[str, str]:
    """The devices of this machine by torch's names, described."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        found |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return found


@dataclass(frozen=True)
class Info:
    """Versions, devices, and for each operator and device the backends with the reasons why one cannot run.

    Attributes:
        versions: versions of this package, Python and its dependencies, or "not installed".
        extension: how the compiled operators were built; {} without them.
        devices: devices by torch's names, for example {"cpu": …, "cuda:0": …}.
        backends: {device: {operator: {backend: reasons}}}. An empty list of reasons means that the backend runs.
        chosen: {device: {operator: backend}}.
    """

    versions: dict[str, str]
    extension: dict[str, object]
    devices: dict[str, str]
    backends: dict[str, dict[str, dict[str, list[str]]]]
    chosen: dict[str, dict[str, str]]

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines.append(f"extension: {_built(self.extension) or 'none: ' + '; '.join(EXTENSION.reasons)}")
        for device, description in self.devices.items():
            lines += ["", f"{device}: {description}"]
            width = max(map(len, self.chosen[device]))
            for op, backend in self.chosen[device].items():
                runs = [name for name, why in self.backends[device][op].items() if not why]
                others = ", ".join(name for name in runs if name != backend)
                lines.append(f"  {op:<{width}}  {backend}" + (f"  (also {others})" if others else ""))
            reasons: dict[str, str] = {}
            for op, table in self.backends[device].items():
                for name, why in table.items():
                    if why and name not in reasons:
                        # Reasons that differ only in the operator are listed once.
                        reasons[name] = needs(why[0].removesuffix(f" of {op}"), device)
            lines += [f"  {name} cannot run here: {why}" for name, why in reasons.items()]
        return "\n".join(lines)


def _built(extension: dict[str, object]) -> str:
    """How the compiled operators were built, as text; "" without them."""
    if not extension:
        return ""
    listed = {key: ", ".join(map(str, value)) for key, value in extension.items() if isinstance(value, (list, tuple))}
    cuda = f"CUDA kernels for {listed['cuda_archs']} by {extension['nvcc']}" if extension["cuda"] else "no CUDA kernels"
    debug = ", for debugging" if extension["debug"] else ""
    torch_version = f"torch {extension['torch_version']} (stable ABI {extension['stable_abi']})"
    return f"built with {extension['compiler']} and {torch_version}{debug}; CPU kernels for {listed['cpu_isas']}; {cuda}"


def info() -> Info:
    """Versions, devices, and the backend of every operator. A GPU is only asked for its name.

    Raises:
        RuntimeError: a requested backend cannot run on one of the devices.
    """
    from fastroute import __version__

    versions = {"fastroute": __version__, "python": platform.python_version()}
    tritons = [name for name in (*TRITON, *OTHER_TRITONS) if installed_version(name)] or TRITON[:1]
    for package in (PACKAGES[0], *tritons, *PACKAGES[1:]):
        versions[package] = installed_version(package) or "not installed"
    found = devices()
    table = {
        name: {op: {b: unsupported_reasons(op, b, torch.device(name)) for b in BACKENDS} for op in operators()}
        for name in found
    }
    chosen = {name: {op: select(op, torch.device(name)) for op in operators()} for name in found}
    return Info(versions, dict(EXTENSION.info), found, table, chosen)
