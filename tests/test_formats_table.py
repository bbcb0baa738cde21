"""The tables in the documentation of what is kept, converted and refused."""

from __future__ import annotations

import pytest
from formats_table import BEGIN, END, PAGE, tables


@pytest.mark.slow
def test_the_tables_are_up_to_date():
    pytest.importorskip("pillow_heif", reason="the tables tell of HEIF too")
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    made = tables()
    assert shown == made, "docs/images.md is out of date: run python tests/formats_table.py"
    rows = [line.strip("|").split("|") for line in made.splitlines() if line.startswith("|")]
    assert len(rows) > 25 and all(cell.strip() for row in rows for cell in row), "a cell is empty"
    assert "lost" not in made
