"""Arrays of images on disk: the levels of a pyramid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import as_image, picture

from fastroute.files import arrays

zarr = pytest.importorskip("zarr", minversion="3")


@pytest.mark.slow
def test_levels_of_a_pyramid(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SMALLEST_LEVEL", 20)
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        layout = arrays.Layout((3, 75, 51), str(arrays.dtype_of(dtype)), 16, True)
        folder = tmp_path / layout.dtype
        arrays.create(folder, layout)
        image = as_image(picture(1, 3, 75, 51)[0], dtype)
        arrays.ArrayRows(folder, layout).write(0, 0, image)
        for _ in range(2):
            arrays.add_levels(folder, layout)
        group = zarr.open_group(str(folder), mode="r")
        datasets = group.attrs["ome"]["multiscales"][0]["datasets"]
        assert [group[level["path"]].shape for level in datasets] == [(3, 75, 51), (3, 38, 26), (3, 19, 13)]
        assert datasets[2]["coordinateTransformations"] == [
            {"type": "scale", "scale": [1.0, 4.0, 4.0]},
            {"type": "translation", "translation": [0.0, 1.5, 1.5]},
        ]
        assert np.array_equal(group["0"][:], image.numpy())
        wide = torch.nn.functional.pad(image.double()[None], (0, 1, 0, 1), "replicate")
        mean = torch.nn.functional.avg_pool2d(wide, 2)[0].numpy()
        assert np.abs(group["1"][:] - mean).max() <= (1e-6 if dtype == torch.float32 else 0.5)
