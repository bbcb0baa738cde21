"""`fastroute info`: installed versions, and the backend of every operator."""

import click


@click.command("info")
def command() -> None:
    """Show versions, devices, and which backend runs which operator."""
    import fastroute

    click.echo(str(fastroute.info()))
