"""`fastroute info`: what is installed and which backend runs what."""

import click


@click.command("info")
def command() -> None:
    """Show versions, devices, and which backend runs which operator."""
    import fastroute

    click.echo(str(fastroute.info()))
