"""The PEP 517 hooks of setuptools. Before anything is downloaded, they refuse what the build would refuse after it.

torch is no build requirement: pip would install another one, of several gigabytes, only to build against it.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from target_torch import NoTorch, target_torch
from toolchain import find_compiler

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What else a wheel needs."""
    check()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What else an editable install needs."""
    check()
    return build_meta.get_requires_for_build_editable(config_settings)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """An editable install by a path and not by a finder, which a folder called fastroute, as of a clone, would hide."""
    settings = {"editable_mode": "compat", **(config_settings or {})}
    return str(build_meta.build_editable(wheel_directory, settings, metadata_directory))


def check() -> None:
    """End if an extension can be compiled, but not without a torch."""
    if find_compiler()[0]:
        try:
            target_torch()
        except NoTorch as error:
            raise SystemExit(f"\n{error}\n") from None
