"""The tables of training with and without each loss, from the rows of :mod:`benchmarks.losses`."""

from __future__ import annotations

from collections.abc import Sequence


def losses_table(rows: Sequence[dict]) -> str:
    """The losses of CDNSR and of ClassSR."""
    return _table("| system | trained with |", [row for row in rows if row["system"] != "norms"], ("system", "run"))


def norms_table(rows: Sequence[dict]) -> str:
    """The statistics of batch norms in joint training."""
    return _table("| statistics in joint training |", [row for row in rows if row["system"] == "norms"], ("run",))


def _table(first: str, rows: Sequence[dict], names: tuple[str, ...]) -> str:
    """Quality and cost of `rows`, behind the cells that say what each is."""
    lines = [
        f"{first} PSNR, as routed | FLOPs | classes | PSNR, largest branch everywhere |",
        f"|{' --- |' * (len(names) + 4)}",
    ]
    for row in rows:
        shares = " / ".join(f"{100 * share:.0f}" for share in row["classes"])
        cells = [
            *(row[name] for name in names),
            f"{row['psnr']:.2f} dB",
            f"{100 * row['flops']:.0f} %",
            f"{shares} %",
            f"{row['dense_psnr']:.2f} dB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
