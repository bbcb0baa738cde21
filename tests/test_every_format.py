"""Files of every format, depth and layout mean the same, whether they are read whole or in bands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from every_format import make_all

from fastroute import io
from fastroute.io.read import open_picture

CASES = make_all()


@pytest.fixture
def path(tmp_path, request):
    case = CASES[request.param]
    path = tmp_path / f"picture{case.suffix}"
    path.write_bytes(case.data)
    return path


@pytest.mark.parametrize(("path", "name"), [(name, name) for name in CASES], indirect=["path"], ids=list(CASES))
def test_reading(path, name):
    case = CASES[name]
    picture = io.read_picture(path)
    assert (picture.kind, picture.bits, picture.alpha is not None) == (case.kind, case.bits, case.alpha), str(picture)
    planes = [*picture.color[: 1 if case.kind == "gray" else 3]] + ([] if picture.alpha is None else [picture.alpha])
    pixels = torch.stack(planes, dim=2).numpy()
    if case.truth is not None:
        assert pixels.dtype == case.truth.dtype and np.array_equal(pixels, case.truth)
    else:
        assert pixels.shape[:2] == (18, 26) and pixels.std() > 0.05 * (1 if case.bits == 32 else (1 << case.bits) - 1)
    with open_picture(path) as opened:
        assert (opened.kind, opened.metadata, opened.origin) == (picture.kind, picture.metadata, picture.origin)
        height, width = opened.height, opened.width
        bands = [opened.read(y, min(y + 5, height), 0, width) for y in range(0, height, 5)]
        assert np.array_equal(torch.cat(bands, dim=1).permute(1, 2, 0).numpy(), pixels), "bands mean something else"
        corner = opened.read(3, 9, 7, 13).permute(1, 2, 0).numpy()
        assert np.array_equal(corner, pixels[3:9, 7:13]), "rectangles mean something else"


@pytest.mark.parametrize(("path", "name"), [(name, name) for name in CASES], indirect=["path"], ids=list(CASES))
def test_cut_files_are_errors(path, name):
    data = CASES[name].data
    for length in (len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:length])
        with pytest.raises(io.ImageError, match=f"cannot read {path}"):
            io.read_picture(path)
        with pytest.raises(io.ImageError, match=f"cannot read {path}"), open_picture(path) as opened:
            for y in range(opened.height):
                opened.read(y, y + 1, 0, opened.width)
