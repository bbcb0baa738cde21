"""What `fastroute upscale` was asked for, whatever the files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastroute.cli._common import cheap_router, check_routing, load_router

if TYPE_CHECKING:
    from fastroute.cascades.router import CascadeRouter
    from fastroute.patch.patch_router import PatchRouter
    from fastroute.pixel.pixel_router import PixelRouter


@dataclass(frozen=True)
class Task:
    """What was asked for, whatever the files.

    Attributes:
        model: a name or a file.
        running: device and precision, see :func:`fastroute.cli._common.running_options`.
        places: arguments of :func:`fastroute.load`.
        chosen: those of the router's `upscale` that decide the result.
        limit: its memory limit.
        reading, saving: arguments of :func:`fastroute.io.read_picture` and :func:`fastroute.io.write_picture`.
    """

    model: str
    running: dict[str, Any]
    places: dict[str, Any]
    chosen: dict[str, Any]
    limit: dict[str, Any]
    reading: dict[str, Any]
    saving: dict[str, Any]
    drop_alpha: bool
    overwrite: bool
    quiet: bool
    cheap: tuple[str, ...] = ()

    def load(self) -> tuple[PatchRouter | PixelRouter | CascadeRouter, dict[str, Any]]:
        """The router, and the options of its `upscale`."""
        if self.cheap:
            given = [
                name
                for name, value in self.places.items()
                if value not in (None, False) and (name, value) != ("border", "zero")
            ]
            if given:
                flag = "as-published" if given[0] == "published" else given[0]
                raise click.UsageError(f"--{flag} does not go with --cheap: networks run on regions with their context")
            router: Any = cheap_router(self.model, self.cheap, self.running)
        else:
            router = load_router(self.model, self.running, **self.places)
        return router, check_routing(router, self.model, self.chosen)

    def settings(self, **more: Any) -> dict[str, Any]:
        """All that results depend on."""
        from fastroute.cascades.sources import is_named_code
        from fastroute.loading import weights_of

        name, digest = self.model, "code"
        if not is_named_code(self.model):
            name = Path(self.model).name
            with open(weights_of(self.model), "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()[:12]
        given = {**self.places, **self.chosen, **self.reading, **self.saving, **more}
        # Those that decide no pixel, or only the last bits of one.
        known = {key: value for key, value in given.items() if value is not None and key not in ("batch", "max_pixels")}
        about = {"model": f"{name} ({digest})", "precision": self.running["precision"], "drop-alpha": self.drop_alpha}
        if self.cheap:
            about["cheap"] = ", ".join(self.cheap)
        return {**about, **known}
