"""The tables of docs/images.md: what is kept, converted and refused, found by doing it.

`python tests/formats_table.py` writes them; tests/test_formats_table.py tells when they are out of date.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from every_format import make_all, raw_tiff, samples
from mixed_files import SRGB, XMP, exif

from fastroute import io
from fastroute.io import Metadata, Picture
from fastroute.io.metadata import HELD, carried

PAGE = Path(__file__).parents[1] / "docs" / "images.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
FORMATS = {
    "png": "PNG", "jpeg": "JPEG", "webp": "WebP", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "pnm": "Netpbm", "avif": "AVIF",
    "heif": "HEIF", "jp2": "JPEG 2000",
}  # fmt: skip
DEPTHS = {"1 – 7": range(1, 8), "8": (8,), "9 – 15": range(9, 16), "16": (16,), "float": (32,)}
# Formats that store no other depth at all.
NEVER = "not in this format"
METADATA = {
    "profile": Metadata(icc=SRGB), "EXIF": Metadata(exif=exif()), "XMP": Metadata(xmp=XMP),
    "resolution": Metadata(dpi=(300.0, 300.0)),
    "texts": Metadata(text={"Title": "a"}), "comment": Metadata(comment=b"a"), "IPTC": Metadata(iptc=b"\x1c\x02\x78\x00\x01a"),
    "gAMA, cHRM": Metadata(chunks=(("gAMA", (100000).to_bytes(4, "big")),)),
    "cICP (PQ, HLG)": Metadata(chunks=(("cICP", bytes([9, 16, 0, 1])),)),
}  # fmt: skip


def stored_bits(name: str) -> int:
    """Of the case of this name."""
    if name.startswith("pnm"):
        found = re.search(r"(gray|rgb|rgba)(\d+)", name)
        if found is None:
            return 32 if "float" in name else 1
        most = int(found[2])
        return most if "rgba" in name else {1: 1, 7: 3, 255: 8, 1023: 10, 65535: 16}[most]
    if name in ("tiff-half", "tiff-float", "tiff-double"):
        return 32
    found = re.search(r"(?:gray|rgb|palette|cmyk|lossless|premultiplied|graya|rgba|grayx|rgbx)(\d+)", name)
    return int(found[1]) if found and not name.startswith("tiff-turned") else 8


def reading(folder: Path) -> list[list[str]]:
    """A row per format: what becomes of samples of every depth, of transparency, and of odd kinds."""
    cases = make_all()
    rows = []
    for prefix, title in FORMATS.items():
        row = [title]
        names = (prefix, "j2k") if prefix == "jp2" else (prefix,)
        own = {name: case for name, case in cases.items() if name.split("-")[0] in names}
        for depths in DEPTHS.values():
            found = set()
            for name, case in own.items():
                if stored_bits(name) in depths:
                    path = folder / f"case{case.suffix}"
                    path.write_bytes(case.data)
                    bits = io.read_picture(path).bits
                    found.add("kept" if bits == stored_bits(name) else f"scaled to {bits} bits")
            row.append(", ".join(sorted(found)) or NEVER)
        clear = {io.read_picture(_write(folder, case)).alpha is not None for case in own.values() if case.alpha}
        row.append("kept" if clear == {True} else NEVER)
        rows.append(row)
    return rows


def odd_kinds(folder: Path) -> list[list[str]]:
    """What becomes of kinds of samples that are no plain picture."""
    rows = []
    floats = tifffile_bytes((samples(3, 8)).astype(np.float32), photometric="rgb")
    for title, data in {
        "floating point beyond [0, 2]": floats,
        "signed samples": tifffile_bytes(samples(1, 8)[:, :, 0].astype(np.int8), photometric="minisblack"),
        "integers of 32 bits": tifffile_bytes(samples(1, 8)[:, :, 0].astype(np.uint32), photometric="minisblack"),
        "0 is white": raw_tiff(samples(1, 8), 8, 0),
        "premultiplied alpha": raw_tiff(np.minimum(samples(4, 8), samples(4, 8)[:, :, 3:]), 8, 2, (1,)),
        "a further channel of no stated meaning": raw_tiff(samples(4, 8), 8, 2, (0,)),
        "CMYK": raw_tiff(np.dstack([samples(3, 8), samples(1, 8)]), 8, 5),
        "a palette": make_all()["tiff-palette8"].data,
    }.items():
        path = folder / "odd.tif"
        path.write_bytes(data)
        try:
            picture = io.read_picture(path)
            what = "left out, and told" if picture.origin.notes and picture.kind == "rgb" else "converted"
        except io.ImageError:
            what = "refused" + (", or scaled by `white=`" if title.startswith("floating") else "")
        rows.append([title, what])
    return rows


def tifffile_bytes(pixels: np.ndarray, **options: object) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".tif") as file:
        tifffile.imwrite(file.name, pixels, metadata=None, **options)
        return Path(file.name).read_bytes()


def _write(folder: Path, case) -> Path:
    path = folder / f"case{case.suffix}"
    path.write_bytes(case.data)
    return path


def writing(folder: Path) -> list[list[str]]:
    """A row per format: what becomes of depth, transparency and each kind of metadata."""
    rows = []
    for name, ending in {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}.items():
        row = [{"WEBP": "WebP"}.get(name, name)]
        for bits in (8, 16, 32):
            picture = Picture(torch.from_numpy(samples(3, 16).transpose(2, 0, 1).copy())).as_bits(bits)
            io.write_picture(folder / f"a{ending}", picture)
            back = io.read_picture(folder / f"a{ending}").bits
            row.append("kept" if back == bits else f"rounded to {back} bits")
        alpha = torch.from_numpy(samples(1, 8)[:, :, 0])
        try:
            io.write_picture(folder / f"a{ending}", Picture(alpha.expand(3, -1, -1).contiguous(), alpha))
            row.append("kept" if io.read_picture(folder / f"a{ending}").alpha is not None else "lost")
        except io.ImageError:
            row.append("refused")
        for metadata in METADATA.values():
            held = carried(metadata, name, gray=False)
            row.append("kept" if not held.lost else "converted" if held.icc else "left out, and told")
        rows.append(row)
    held = [carried(metadata, "ZARR", gray=False).lost for metadata in METADATA.values()]
    rows.append(["zarr", "kept", "kept", "kept", "kept", *("left out, and told" if lost else "kept" for lost in held)])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    """What lies between the marks on the page."""
    assert set(HELD) == {"PNG", "JPEG", "WEBP", "TIFF", "BMP", "ZARR"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = [
            "Reading, by bits per sample as the file stores them:",
            table(["format", *(f"{depth} bits" if depth != "float" else depth for depth in DEPTHS), "alpha"], reading(folder)),
            "Reading, by what the samples mean:",
            table(["kind", "result"], odd_kinds(folder)),
            "Writing, by bits per channel and by what the picture brings along:",
            table(["format", "8 bits", "16 bits", "float", "alpha", *METADATA], writing(folder)),
        ]
    return "\n\n".join(parts)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
