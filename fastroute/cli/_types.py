"""Types of options that several commands or none of click's own know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastroute.files.shards import Shard


class Pixels(click.ParamType):
    """A positive whole number, or "none"."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | None:
        """The number, or None for no limit."""
        if value in (None, "auto"):
            return value
        if value == "none":
            return None
        try:
            # Both 300000000 and 3e8 are accepted.
            number = int(float(value))
        except (ValueError, OverflowError):
            number = 0
        return number if number > 0 else self.fail(f"it must be a positive number or none; got {value}", param, ctx)


class ShardType(click.ParamType):
    """A shard, such as "3/16", or "auto"."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        """The shard."""
        from fastroute.files.shards import Shard

        if isinstance(value, Shard):
            return value
        try:
            return Shard.of_environment() if value == "auto" else Shard.parse(value)
        except ValueError as error:
            return self.fail(str(error).removeprefix("shard: "), param, ctx)
