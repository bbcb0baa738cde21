"""From a teacher and a folder of images to a student's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute import io
from fastroute.cascades.networks import Networks
from fastroute.cascades.student import HELD_OUT, MOST_HELD_OUT, Learnt, Recipe, Student
from fastroute.cascades.teacher_crops import Crops
from fastroute.models.checkpoints import CheckpointError, read_checkpoint, save_checkpoint, state_dict_of
from fastroute.models.compact import Compact
from fastroute.models.network import Facts
from fastroute.models.pretrained import own_network
from fastroute.profiling import count_flops

# Widths that a target cost chooses from.
WIDTHS = range(8, 257, 8)


def distil(
    teacher: tuple[str, nn.Module, Facts],
    key: str,
    images: Path,
    out: Path,
    minutes: float,
    recipe: Recipe,
    *,
    init: Path | None = None,
    cost: float | None = None,
    exclude: Sequence[str] = (),
    cache: Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Learnt:
    """Let a small network learn what `teacher` makes of `images`, and write it.

    Args:
        teacher: its name, network and facts.
        key: what tells it from other teachers.
        images: a folder, searched recursively.
        out: a .safetensors or .pth file; weights are stored in half precision. The state of the training lies beside it.
        minutes: how long, runs before included.
        recipe: sizes and rates; `scale` and `channels` become those of the teacher.
        init: a checkpoint to start from, of Compact's architecture, whose width and depth are taken.
        cost: choose the width so that the student takes this share of the teacher's FLOPs.
        exclude: patterns of file names to leave out.
        cache: folder for the teacher's outputs; default beside `out`.
        device, dtype: where, and the type in which both compute.
        progress: show a bar.
        tell: is given a line of text now and then.

    Raises:
        ValueError: no images, a cost that no width has, a time that is not positive, or a teacher of other channels than three.
        fastroute.CheckpointError: the teacher, the start or a saved state cannot be used.
    """
    if not minutes > 0:
        raise ValueError(f"distill: minutes must be positive; got {minutes:g}")
    paths = io.list_images(images, exclude)
    if len(paths) < 2:
        raise ValueError(f"distill: at least two images are needed, one of which tests the student; {images} has {len(paths)}")
    name, module, facts = teacher
    if facts.channels != 3:
        raise ValueError(f"distill: the teacher must read 3 channels, those of image files; {name} reads {facts.channels}")
    device = device or torch.device("cpu")
    networks = Networks([module], [facts])
    if dtype != torch.float32:
        networks.halve(dtype)
    networks.to(device, dtype)
    networks.dtype = dtype
    recipe = replace(recipe, scale=facts.scale, channels=facts.channels)
    start = None
    if init is not None:
        start, recipe = start_of(init, recipe)
    elif cost is not None:
        recipe = replace(recipe, width=width_for(cost * networks.flops()[0], recipe))
    held = paths[::HELD_OUT][:MOST_HELD_OUT]
    learnt_from = [path for path in paths if path not in held]
    key = f"{key} {str(dtype).removeprefix('torch.')}"
    folder = out.with_suffix(".crops") if cache is None else cache
    made = partial(Crops, folder, teacher=lambda x: networks.run(0, x.to(device)).cpu(), key=key, scale=facts.scale)
    student = Student(
        made(learnt_from), made(held), recipe, out.with_suffix(".state.pt"), start, device=device, dtype=dtype, tell=tell
    )
    learnt = student.run(minutes, progress)
    about = {
        "scale": facts.scale,
        "teacher": name,
        "psnr_to_teacher": round(learnt.psnr, 2),
        "steps": learnt.steps,
        "minutes": round(learnt.seconds / 60, 1),
        "crops": learnt.crops,
    }
    save_checkpoint(out, learnt.student.half(), about)
    return replace(learnt, student=learnt.student.float())


def start_of(path: Path, recipe: Recipe) -> tuple[dict[str, Tensor], Recipe]:
    """Weights to start from, and the recipe with their width and depth.

    Raises:
        fastroute.CheckpointError: they are no Compact, or of another scale.
    """
    state = state_dict_of(read_checkpoint(path)[0], path)
    found = own_network(state, path)
    if found is None or not isinstance(found[0], Compact):
        raise CheckpointError(f"cannot start from {path}: a student is a Compact network, and this is another")
    network = found[0]
    if (network.scale, network.channels) != (recipe.scale, recipe.channels):
        raise CheckpointError(
            f"cannot start from {path}: its scale is {network.scale} with {network.channels} channels, the teacher's "
            f"{recipe.scale} with {recipe.channels}"
        )
    return state, replace(recipe, width=network.width, depth=network.depth)


def width_for(flops: float, recipe: Recipe) -> int:
    """The largest width of `WIDTHS` at which a student takes at most `flops` per pixel.

    Raises:
        ValueError: even the least takes more.
    """
    side, fitting = 16, 0
    for width in WIDTHS:
        with torch.device("meta"):
            student = Compact(width, recipe.depth, recipe.scale, recipe.channels)
        taken = count_flops(student, (1, recipe.channels, side, side)) / side**2
        if taken > flops:
            break
        fitting = width
    if not fitting:
        raise ValueError(f"distill: cost must allow a width of {WIDTHS[0]} at depth {recipe.depth}; give more, or less depth")
    return fitting


def half_pays(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: processors and GPUs with products of it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False
