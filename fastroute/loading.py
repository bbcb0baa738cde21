"""`load`: makes a router from a model's name or a checkpoint."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._arguments import real
from fastroute._contexts import levels_to_caller, ordinarily
from fastroute.cascades import opening
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.stored import CASCADE, read_cascade
from fastroute.catalogue import WEIGHTS, default_model, list_models
from fastroute.engines import ANY, TORCH, check_engine
from fastroute.grid import usual_stride
from fastroute.models import arm as arm_models
from fastroute.models.architectures import (
    FIRST_LAYERS,
    SECOND_LAYERS,
    arm_of,
    classsr_of,
    network_of,
    pcsr_of,
    scale_of_weights,
    widths_of,
)
from fastroute.models.arm import ARM, EdgeClassifier
from fastroute.models.arm_tables import read_table
from fastroute.models.checkpoints import (
    CheckpointError,
    fitted,
    read_checkpoint,
    short,
    state_dict_of,
    tensors_of,
    without_prefixes,
)
from fastroute.models.network import Facts
from fastroute.models.pcsr import PCSR, PUBLISHED
from fastroute.models.precision import check_precision
from fastroute.models.scales import scale_of_shapes
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.border import ZERO, check_border

# Arguments of a router of patches.
ROUTING = ("window", "batch", "border", "merge", "coverage", "rounded")
# Limits beyond any published network. Numbers in a file are checked against them before anything is built.
LARGEST = {"scale": 64, "patch": 4096, "stride": 4096}


@ordinarily
@buffers.explained("load", "free memory, or choose a smaller model")
def load(
    name_or_path: str | Path | nn.Module | Any | None = None,
    *,
    device: str | torch.device = "cpu",
    scale: float | None = None,
    patch: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    tune: bool = True,
    window: str | Tensor | None = None,
    batch: int | None = None,
    engine: str = TORCH,
    border: str = ZERO,
    merge: int | None = None,
    table: str | Path | None = None,
    eta: float | None = None,
    published: bool = False,
) -> PatchRouter | PixelRouter | CascadeRouter:
    """An upscaler from a shipped model, a checkpoint file, or a network of one's own.

    Args:
        name_or_path: a name that :func:`list_models` gives, or a file (.pth, .pt or .safetensors): ClassSR or CDNSR over
            FSRCNN, CARN, SRResNet or RCAN in their published layout; ARM with its table, as `fastroute train` writes it;
            PCSR over FSRCNN or CARN as published or as `fastroute train` writes it; one of those networks alone, or as PCSR's
            code stores it; Real-ESRGAN's networks; others that spandrel knows (the extra `pretrained`); or a cascade that
            `fastroute calibrate` wrote. Or a module, a spandrel model, or "package.module:function" that gives one. Default:
            the shipped ClassSR for `scale`, which is 4 if not given, and PCSR for other factors than 2, 3 and 4.
        device: where to run.
        scale: upscaling factor. Default: that which the file says, or the shapes of its weights. FSRCNN's are the same at 2, 3
            and 4, and its published files do not say: the factor is then the one at which flat images stay flat, and 4 where
            that does not tell; both with a warning where it is not certain. PCSR has any factor; this one is that of calls
            that give none.
        patch, stride: LR patch size and distance of patches. Default: what the file says; else 32, and as distance
            :func:`fastroute.grid.usual_stride`.
        dtype: type in which the networks compute: float32, bfloat16, float16 or float64. Images keep their own type. Sums,
            means and the last addition are float32 in half precision too.
        tune: find out on the work of calls how the branches run fastest, see :class:`fastroute.PatchRouter`.
        window, batch, merge: see :class:`fastroute.PatchRouter`; not for PCSR. The default window is "hann", which hides the
            grid of the patches at no cost in time or PSNR. ``window="uniform", merge=1`` is the published setting.
        border: "zero" or "edge", see :class:`fastroute.PatchRouter`.
        engine: engine that executes the branches, see :meth:`fastroute.PatchRouter.compile`.
        table: the table that ARM's code stored beside its weights (.state): `name_or_path` is then the supernet of an ARM, as
            published, whose file is that of a plain network. Without a table it runs as that network, densely.
        eta: choose classes as ARM's code does, argmax of PSNR - cost / eta with the PSNR of the table's nearest bin; for ARM
            alone. By default the table is interpolated, which is better at every cost.
        published: what routes patches does so as its published code: without the remainder beyond the last whole stride, each
            patch on its own, clamped and rounded to 8 bits before overlaps are averaged.

    Returns:
        :class:`fastroute.PatchRouter`, for PCSR :class:`fastroute.PixelRouter`, for Real-ESRGAN's networks, those of others
        and cascades :class:`fastroute.CascadeRouter`; call its `upscale`.

    Raises:
        ValueError: the device or the engine cannot be used, float16 on a CPU that has no convolutions in it, or an impossible
            scale, patch or stride.
        fastroute.CheckpointError: no such model or file, a damaged file, a model of another scale than requested, or an unknown
            architecture (the message names the keys that do not fit).

    Warns:
        UserWarning: the upscaling factor is not certain.
    """
    device = usable_device(device)
    check_precision("load", dtype, device)
    asked = _asked(scale, patch, stride)
    name_or_path = default_model(scale) if name_or_path is None else name_or_path
    asked |= {name: value for name, value in (("window", window), ("batch", batch), ("merge", merge)) if value is not None}
    asked["border"] = check_border("load", border)
    if eta is not None and not real("load", "eta", eta) > 0:
        raise ValueError(f"load: eta must be positive; got {eta}")
    asked |= {name: value for name, value in (("table", table), ("eta", eta)) if value is not None}
    if published:
        given = [name for name in ("window", "merge") if name in asked] + (["border"] if border != ZERO else [])
        if given:
            raise ValueError(f"load: published=True decides {given[0]}; leave one of them out")
        asked |= {"published": True, "window": "uniform", "merge": 1, "coverage": "crop", "rounded": True}
    if engine not in (TORCH, ANY):
        check_engine(engine, device, dtype)
    own = opening.of_code(name_or_path, asked)
    router: Any = (_load(weights_of(str(name_or_path)), asked) if own is None else own).to(device, dtype)
    if isinstance(router, PatchRouter):
        router.networks.tune = tune
    return router if engine == TORCH else router.compile(engine)


def open_network(op: str, source: Any) -> tuple[str, nn.Module, Facts]:
    """Name, network and facts of what :func:`load` would load, where it holds one network, or a ValueError."""
    return opening.network_of(op, source, load(source))


def _load(path: Path, asked: dict[str, Any]) -> PatchRouter | PixelRouter | CascadeRouter:
    """The model in a file, in float32 on the CPU."""
    content, metadata = read_checkpoint(path)
    if CASCADE in metadata:
        return read_cascade(content, metadata[CASCADE], path, asked, partial(open_network, "load"))
    settings = _settings(metadata, path)
    model = content.get("model")
    published = isinstance(model, Mapping) and model.get("name") in PUBLISHED
    if not published and isinstance(model, Mapping) and isinstance(model.get("sd"), Mapping):
        # PCSR's format names the network next to its weights.
        arguments = model.get("args")
        for name in ("upscale", "scale"):
            if isinstance(arguments, Mapping) and name in arguments:
                settings["scale"] = _positive(arguments[name], "scale", path)
        content = model["sd"]
    try:
        if published:
            published_state = state_dict_of(PCSR.published_state(content), path)
            pcsr = fitted(lambda: PCSR.of_specification(content), published_state, path)
            return _pixel_router(pcsr, settings, asked)
        tensors = tensors_of(content, path)
        state = without_prefixes(tensors)
        if "classifier.layers.0.weight" in state:
            pcsr = fitted(lambda: pcsr_of(state, settings.get("mean")), state, path)
            return _pixel_router(pcsr, settings, asked)
        return opening.of_state(tensors, path, asked) or _router(tensors, state, path, settings, asked)
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if buffers.is_exhausted(error):
            raise
        raise CheckpointError(f"cannot use {path}{' as PCSR' if published else ''}: {error}") from error


def weights_of(name_or_path: str | Path) -> Path:
    """The path of a shipped model's file, or the given path.

    Raises:
        fastroute.CheckpointError: neither exists.
    """
    if str(name_or_path) in list_models():
        return WEIGHTS / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {short(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not exists and not path.suffix:
        raise CheckpointError(f"no model or file {short(name_or_path)!r}; the models are {', '.join(list_models()) or 'none'}")
    return path


def _asked(scale: float | None, patch: int | None, stride: int | None) -> dict[str, Any]:
    """Check an argument of the caller and return it."""
    asked = {name: value for name, value in (("scale", scale), ("patch", patch), ("stride", stride)) if value is not None}
    for name, value in asked.items():
        wanted = "positive and finite" if name == "scale" else "a positive whole number"
        known = isinstance(value, int) or (name == "scale" and isinstance(value, float))
        if not known or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(
                f"load: {name} must be {wanted}; got {value!s:.40}"
                if known
                else f"load: {name} must be {wanted}; got {value!r}"
            )
        if value > LARGEST[name]:
            raise ValueError(f"load: {name} must be at most {LARGEST[name]}; got {value!s:.40}")
    if patch is not None and stride is not None and stride > patch:
        raise ValueError(f"load: stride must be at most patch ({patch}), or pixels between patches are lost; got {stride}")
    return asked


def usable_device(name: str | torch.device) -> torch.device:
    """The device `name`, once a tensor has been made there.

    Raises:
        ValueError: there is no such device, or it does not work. The message says why.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # The rest of torch's message lists every backend.
        reason = str(error).splitlines()[0].split(". ")[0].split(", ipu")[0]
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: its tensors hold no values")
    return device


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The options that a router needs, from a file's metadata."""
    found: dict[str, Any] = {}
    for name in ("scale", "patch", "stride", "input_range", "mean"):
        if name in metadata:
            try:
                value = json.loads(metadata[name])
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"cannot use {path}: its {name} is {metadata[name][:80]!r}, not a number") from error
            found[name] = _numbers(value, name, path) if name in ("input_range", "mean") else _positive(value, name, path)
    return found


def _positive(value: object, name: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"cannot use {path}: its {name} must be a positive whole number; it is {str(value)[:80]!r}")
    if value > LARGEST[name]:
        raise CheckpointError(f"cannot use {path}: its {name} must be at most {LARGEST[name]}; it is {value:.3g}")
    return value


def _numbers(value: object, name: str, path: Path) -> Any:
    """A finite number, or a list of at most four numbers where several are allowed."""
    values = value if name == "mean" and isinstance(value, list) and 0 < len(value) <= 4 else [value]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise CheckpointError(f"cannot use {path}: its {name} must be finite numbers; it is {value!r}")
    return value


def _pixel_router(pcsr: PCSR, settings: Mapping[str, Any], asked: Mapping[str, Any]) -> PixelRouter:
    for name in ("patch", "stride", "window", "batch", "merge", "table", "eta"):
        # As PCSR was published it is routed in any case.
        if name in asked and not ("published" in asked and name in ("window", "merge")):
            raise ValueError(f"PCSR routes pixels and has no {name}; leave {name} out")
    return PixelRouter(pcsr, scale=asked.get("scale", settings.get("scale", 4)), border=asked["border"])


def _router(
    tensors: dict[str, Tensor], state: dict[str, Tensor], path: Path, settings: Mapping[str, Any], asked: Mapping[str, Any]
) -> PatchRouter | CascadeRouter:
    """The router of weights under the names of the file, `tensors`, and without their prefixes, `state`."""
    patch = asked.get("patch", settings.get("patch", 32))
    # The stride of a file goes with its patch.
    stride = asked.get("stride", settings.get("stride", usual_stride(patch)) if "patch" not in asked else usual_stride(patch))
    if stride > patch:
        raise CheckpointError(
            f"cannot use {path}: its stride of {stride} is above its patch of {patch}, so pixels between them would be lost; "
            f"say stride={usual_stride(patch)}, on the command line --stride {usual_stride(patch)}"
        )
    how = {"window": "hann"} | {name: asked[name] for name in ROUTING if name in asked}
    if "classifier.table.psnr" in state:
        scale = _scale(state, "network.", path, settings, asked)
        arm = fitted(lambda: arm_of(state, scale, patch), state, path)
        if not arm.table.ready:
            raise CheckpointError(f"cannot use {path}: its table holds no measurements; train the table on images first")
        return _arm_router(arm, asked, patch=patch, stride=stride, scale=scale, **how)
    if "table" in asked:
        arm = _arm_with_table(state, path, settings, asked, patch)
        return _arm_router(arm, asked, patch=patch, stride=stride, scale=arm.scale, **how)
    if "eta" in asked:
        raise ValueError("eta is for ARM, whose table says what each class is worth; give the table, or leave eta out")
    options = {name: settings[name] for name in ("input_range", "mean") if name in settings}
    for backbone, name in FIRST_LAYERS.items():
        widths = widths_of(state, rf"net(\d+)\.{re.escape(name)}")
        if widths:
            scale = _scale(state, f"net{len(widths)}.", path, settings, asked)
            system = fitted(partial(classsr_of, backbone, state, widths, scale, options), state, path)
            return PatchRouter(system.branches, system.classifier, patch=patch, stride=stride, scale=scale, **how)
        alone = widths_of(state, rf"{re.escape(name)}()")
        if alone and SECOND_LAYERS.get(backbone, name) in state:
            scale = _scale(state, "", path, settings, asked)
            network = fitted(partial(network_of, backbone, state, "", alone[0], scale, **options), state, path)
            return PatchRouter([network], None, patch=patch, stride=stride, scale=scale, **how)
    known = ", ".join(f"{backbone} ({name})" for backbone, name in FIRST_LAYERS.items())
    systems = "ClassSR and CDNSR (classifier.*, net1.*, …), ARM (network.*, classifier.table.*), PCSR, and networks alone: "
    return opening.of_unknown(tensors, path, asked, systems + known)


def _arm_router(arm: ARM, asked: Mapping[str, Any], *, patch: int, **how: Any) -> PatchRouter:
    classifier = arm.classifier
    if "eta" in asked:
        classifier = EdgeClassifier(arm.table, classifier.cost, asked["eta"], classifier.spent, published=True)
    return PatchRouter(arm.branches, classifier, patch=patch, costs=arm.costs(patch), **how)


def _arm_with_table(
    state: Mapping[str, Tensor], path: Path, settings: Mapping[str, Any], asked: Mapping[str, Any], patch: int
) -> ARM:
    """A published supernet, whose weights are those of its widest network, with its table."""
    found = read_table(asked["table"])
    for backbone, name in FIRST_LAYERS.items():
        width = widths_of(state, rf"{re.escape(name)}()")
        if not width or backbone not in arm_models.BACKBONES:
            continue
        widths = arm_models.WIDTHS[backbone]
        if widths[-1] != width[0] or len(found.cost) != len(widths) + 1:
            raise CheckpointError(
                f"cannot use {path} with {asked['table']}: ARM over {backbone} has widths {widths} and interpolation; the file "
                f"has width {width[0]} and the table {len(found.cost)} classes"
            )
        scale = _scale(state, "", path, settings, asked)
        system = ARM(backbone, None, scale, len(found.score), patch).eval()
        system.network = fitted(partial(arm_models.BACKBONES[backbone], width[0], scale), state, path).eval()
        found.fill(system.table)
        return system
    raise CheckpointError(f"cannot use {path} with a table of ARM: it is none of {', '.join(arm_models.BACKBONES)}")


def _scale(state: Mapping[str, Tensor], prefix: str, path: Path, settings: Mapping[str, Any], asked: Mapping[str, Any]) -> int:
    """The requested factor, or that of the file, its shapes or its weights, in this order. They must agree."""
    widths = {backbone: widths_of(state, re.escape(prefix + name) + "()") for backbone, name in FIRST_LAYERS.items()}
    backbone, width = next(((backbone, found[0]) for backbone, found in widths.items() if found), ("", 0))
    shaped = scale_of_shapes(backbone, state, prefix, width) if width else None
    if shaped is not None:
        shaped = _positive(shaped, "scale", path)
    known = settings.get("scale", shaped)
    if "scale" in asked:
        scale = asked["scale"]
        if scale != int(scale):
            raise ValueError(f"its networks upscale by whole factors alone; got scale={scale}")
        if known is not None and scale != known:
            raise CheckpointError(f"cannot use {path}: it upscales by {known} alone; got scale={scale:g}")
        return int(scale)
    if known is not None or not width:
        return known or 4

    judged = scale_of_weights(backbone, state, prefix, width)
    if judged != 4:
        reason = (
            "the weights keep flat images flat at no factor from 2 to 4 or at several, so 4 is assumed"
            if judged is None
            else f"the weights keep flat images flat at a factor of {judged} alone, so that is taken"
        )
        warnings.warn(
            f"{path} does not say its upscaling factor, and FSRCNN has equal shapes at 2, 3 and 4: {reason}; "
            "say which it is by scale=N, on the command line --scale N",
            stacklevel=levels_to_caller(),
        )
    return judged or 4
