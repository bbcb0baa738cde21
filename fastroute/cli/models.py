"""`fastroute models`: the shipped models."""

import click


@click.command("models")
def command() -> None:
    """List the shipped models: task, size, FLOPs and quality."""
    from fastroute.catalogue import DEFAULT_MODEL, WEIGHTS, list_models, read_card

    cards = [read_card(name) for name in list_models()]
    head = ("model", "task", "weights", "MFLOPs per patch: branches + classifier", "PSNR (bicubic)")
    lines = [head]
    for card in cards:
        lines.append((card.name, card.task or "-", f"{card.size / 1e6:.1f} MB", card.flops or "-", card.psnr or "-"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo(f"\n{DEFAULT_MODEL} is the default. Cards with training data and measurements: {WEIGHTS}")
