"""The benchmark of training with and without each loss: its tables, and a run of one step each."""

from __future__ import annotations

import pytest
import torch
from networks import picture

from benchmarks import losses
from benchmarks.loss_tables import losses_table, norms_table
from fastroute import io

ROW = {"system": "CDNSR", "run": "all losses", "psnr": 30.126, "dense_psnr": 31.0, "flops": 0.654, "classes": [0.5, 0.25, 0.25]}


def test_tables():
    rows = [ROW, ROW | {"system": "ClassSR"}, ROW | {"system": "norms", "run": "of the batch"}]
    table = losses_table(rows).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert table[2] == "| CDNSR | all losses | 30.13 dB | 65 % | 50 / 25 / 25 % | 31.00 dB |"
    assert norms_table(rows).splitlines()[2:] == ["| of the batch | 30.13 dB | 65 % | 50 / 25 / 25 % | 31.00 dB |"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_of_one_step_each(tmp_path, monkeypatch, capsys):
    for folder, size in (("train", 330), ("test", 160)):
        (tmp_path / folder).mkdir()
        image = (picture(1, 3, size, size, seed=size)[0] * 255).to(torch.uint8)
        io.write_image(tmp_path / folder / "a.png", image)
    monkeypatch.setattr(losses, "CDNSR_RUNS", losses.CDNSR_RUNS[:3])
    monkeypatch.setattr(losses, "CLASSSR_RUNS", losses.CLASSSR_RUNS[:1])
    words = ["--train", str(tmp_path / "train"), "--images", str(tmp_path / "test"), "--effort", "0.0001"]
    rows = losses.run(losses.arguments(words))
    assert [row["system"] for row in rows] == ["CDNSR", "CDNSR", "CDNSR", "ClassSR", "norms", "norms", "norms"]
    for row in rows:
        assert 5 < row["psnr"] < 60 and 5 < row["dense_psnr"] < 60
        assert 0 < row["flops"] <= 1.01 and sum(row["classes"]) == pytest.approx(1)
    assert len(losses_table(rows).splitlines()) == 6 and len(norms_table(rows).splitlines()) == 5
    assert "classifier, joint, distillation: all losses" in capsys.readouterr().out
