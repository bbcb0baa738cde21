"""The command line: ``fastroute`` or ``python -m fastroute``. Every command has a module of its own.

These modules import torch, and whatever needs it, only inside their functions, so that help is shown at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import signal
import sys

import click

from fastroute import __version__

# In the order in which the help lists them.
COMMANDS = ("upscale", "join", "compare", "evaluate", "train", "distill", "calibrate", "warmup", "models", "info")

# What every command but --help needs: the names by which it is imported, and by which pip knows it.
NEEDED = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "filelock": "filelock"}


class Group(click.Group):
    """Imports a command when it is used. Errors that a user can fix end the command with only their message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command `name`, or None if there is none."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"fastroute.cli.{name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command and report errors."""
        # A terminated run cleans up like an interrupted one and leaves no temporary file.
        signal.signal(signal.SIGTERM, _terminate)
        # Names of files may hold bytes that are not text.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, RuntimeError, MemoryError, ImportError, OSError) as error:
            if not _is_users(error):
                raise
            raise click.ClickException(_words(error)) from error


def _is_users(error: Exception) -> bool:
    """Whether a user can fix the error."""
    if isinstance(error, (ValueError, TypeError, MemoryError)):
        return True
    # For example a full disk. When nobody reads the output any more, click itself ends the command.
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EPIPE)
    # Errors that name an extra to install, and what is missing although fastroute requires it.
    if isinstance(error, ImportError):
        return 'pip install ".[' in str(error) or (isinstance(error, ModuleNotFoundError) and error.name in NEEDED)
    # Click stops by an error of this kind too, perhaps before anything is imported.
    torch, backends, ray = (sys.modules.get(name) for name in ("torch", "fastroute.backends", "fastroute.ray"))
    if ray and isinstance(error, ray.ClusterError):
        return True
    return bool(torch and backends and isinstance(error, (backends.BackendError, torch.OutOfMemoryError)))


def _words(error: Exception) -> str:
    """What a user is told of an error."""
    if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
        package = NEEDED[error.name]
        smaller = " (PyTorch's own index also has smaller builds for CPUs)" if package == "torch" else ""
        return f"fastroute needs {package}, which {sys.executable} does not find: run pip install {package}{smaller}"
    words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    # The argument max_pixels is an option here.
    return words.replace("raise max_pixels", "raise --max-pixels") or "out of memory"


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Dynamic-routing super-resolution: easy parts of an image go through a small network, hard parts through a large one.

    fastroute COMMAND --help explains the options of a command.
    """
