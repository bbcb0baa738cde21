"""`fastroute info`: what is installed and which backend runs what."""

import click

from fastroute.cli._common import Command


@click.command("info", cls=Command)
def command() -> None:
    """Show versions, devices, and which backend runs which operator."""
    import fastroute

    click.echo(str(fastroute.info()))
