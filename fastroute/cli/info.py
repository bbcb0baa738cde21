"""`fastroute info`: installed versions, and the backend of every operator."""

import sys

import click


@click.command("info")
@click.option("--check", is_flag=True, help="Upscale a known picture by every backend and engine, and judge each result.")
def command(check: bool) -> None:
    """Show versions, devices, and which backend runs which operator."""
    import fastroute

    click.echo(str(fastroute.info()))
    if check:
        sys.exit(_check())


def _check() -> int:
    """Print the verdicts; the exit status."""
    from fastroute.report.self_check import HEIGHT, WIDTH, check_installation

    click.echo(f"\nA known picture of {WIDTH} x {HEIGHT} pixels, upscaled by every backend and engine:")
    counts = dict.fromkeys(("ok", "WRONG", "FAILED", "skipped"), 0)
    for verdict in check_installation():
        counts[verdict.status] += 1
        click.echo(f"  {verdict}")
    bad = counts["WRONG"] + counts["FAILED"]
    skipped = f"; {counts['skipped']} cannot run here and were skipped" if counts["skipped"] else ""
    if bad:
        click.echo(
            f"{bad} of {bad + counts['ok']} checks went wrong{skipped}. Do not use what they name. A backend is mended by "
            "installing fastroute again, an engine by installing its package again, or by doing without it."
        )
        return 1
    click.echo(f"All {counts['ok']} checks are ok{skipped}.")
    return 0
