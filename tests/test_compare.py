"""The comparison of one image: what is measured, what the page shows, and that it works in a browser."""

from __future__ import annotations

import base64
import math
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from browser import chromium, images_loaded, visit
from click.testing import CliRunner, Result
from networks import picture, random_classsr, randomise
from PIL import Image

import fastroute
from fastroute import io, quality
from fastroute.cascades.decision import Table
from fastroute.cascades.promise import Calibration
from fastroute.cascades.stored import save_cascade
from fastroute.cli import main
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.compact import Compact
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.report.comparison import BICUBIC, STRONGER, bicubic, compare, labels
from fastroute.report.comparison_page import SHOWN_PIXELS, find_detail, render, write_page

pytestmark = pytest.mark.usefixtures("quick_tuning")
SCALE = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of a routed network, a plain one, and one that routes pixels."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"scale": SCALE, "patch": 16, "stride": 12}
    save_checkpoint(folder / "routed.safetensors", random_classsr((3, 5, 20), SCALE, 16), settings)
    save_checkpoint(folder / "plain.safetensors", randomise(FSRCNN(6, SCALE)), settings)
    pcsr = randomise(PCSR.build(FSRCNN(8, upsample=False), [[4], [64, 64]], [4]))
    save_checkpoint(folder / "pixels.safetensors", pcsr, {})
    return folder


@pytest.fixture(scope="module")
def image():
    return (picture(1, 3, 45, 61)[0] * 255).to(torch.uint8)


@pytest.fixture
def source(tmp_path, image):
    io.write_image(tmp_path / "photo.png", image)
    return tmp_path / "photo.png"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.mark.slow
def test_variants_are_what_the_routers_compute(models, image):
    paths = [models / f"{name}.safetensors" for name in ("routed", "plain", "pixels")]
    found = compare(image, paths, budgets=(0.6, 0.8), runs=1)
    by_name = {variant.name: variant for variant in found.variants}
    assert list(by_name) == [
        BICUBIC, "routed, dense", "routed, budget 0.6", "routed, budget 0.8", "plain, dense",
        "pixels, dense", "pixels, budget 0.6", "pixels, budget 0.8",
    ]  # fmt: skip
    assert found.scale == SCALE and found.reference is None
    for name, path in zip(("routed", "pixels"), (paths[0], paths[2]), strict=True):
        router = fastroute.load(path)
        options = {"scale": SCALE} if name == "pixels" else {}
        for label, budget in (("dense", 1.0), ("budget 0.6", 0.6)):
            variant, expected = by_name[f"{name}, {label}"], router.upscale(image, budget=budget, **options)
            assert torch.equal(variant.image, expected.image)
            assert variant.stats.flops == expected.stats.flops and variant.seconds > 0 and variant.quality == {}
        assert torch.equal(variant.class_map, expected.class_map)
        assert variant.classes.shape == variant.image.shape and variant.dense is by_name[f"{name}, dense"]
    assert torch.equal(by_name[BICUBIC].image, bicubic(image, (90, 122)))


@pytest.mark.slow
def test_quality_is_measured_against_the_reference(models, image):
    path = models / "routed.safetensors"
    reduced = compare(image, [path], downscale=True, runs=1)
    assert reduced.source.shape == (3, 22, 30) and torch.equal(reduced.reference, image[:, :44, :60])
    given = compare(reduced.source, [path], reference=reduced.reference, runs=1)
    assert [v.name for v in given.variants] == [BICUBIC, "routed, dense", "routed, routed"]
    for one, two in zip(reduced.variants, given.variants, strict=True):
        assert one.quality == two.quality == quality.compare(one.image, reduced.reference, SCALE)


@pytest.mark.slow
def test_the_time_of_a_first_run_is_not_counted(models, image, monkeypatch):
    """The median of three runs, of which the first, with its measurements, is a fourth."""
    from fastroute.patch.patch_router import PatchRouter

    original, times = PatchRouter.upscale, iter([90.0, 80.0, 1.0, 4.0, 2.0, 8.0, 3.0, 6.0])

    def upscale(self, *arguments, **options):
        result = original(self, *arguments, **options)
        result.stats.seconds.update(total=next(times) + 100, tune=100.0)
        return result

    monkeypatch.setattr(PatchRouter, "upscale", upscale)
    found = compare(image, [models / "routed.safetensors"], runs=3)
    assert [variant.seconds for variant in found.variants[1:]] == pytest.approx([2.0, 6.0])


@pytest.mark.slow
def test_all_budgets_are_checked_before_anything_runs(models, monkeypatch):
    monkeypatch.setattr(fastroute.PixelRouter, "upscale", lambda *args, **options: pytest.fail("ran"))
    monkeypatch.setattr(fastroute.PatchRouter, "upscale", lambda *args, **options: pytest.fail("ran"))
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^compare: routed, budget 0\.001: budget must lie in \["):
        compare(image, [models / "routed.safetensors", models / "pixels.safetensors"], budgets=(1.0, 0.001))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "absent"], ["no model or file 'absent'"]),
        (["--models", "routed", "classsr-fsrcnn-x4"], ["one size", "routed 2", "classsr-fsrcnn-x4 4"]),
        (["--models", "routed", "routed"], ["models must differ"]),
        (["--models", "routed", "--scale", "3"], ["upscales by 2 alone", "got scale=3"]),
        (["--models", "routed", "--budget", "0.01"], ["compare: routed, budget 0.01: budget must lie in ["]),
        (["--models", "pixels", "--scale", "-1"], ["scale must be positive and finite; got -1"]),
        (["--models", "pixels", "--scale", "0.01"], ["0.01 makes 1 x 0 of 61 x 45"]),
        (["--models", "pixels", "--scale", "2.5", "--downscale"], ["whole factor", "2.5"]),
        (["--models", "routed", "--reference", "photo.png"], ["reference must be 122 x 90", "got 61 x 45"]),
        (["--models", "routed", "--reference", "photo.png", "--downscale"], ["either reference or downscale"]),
        (["--models", "routed", "--detail", "0", "0", "123", "1"], ["detail must lie in the result, 122 x 90"]),
        (["--models", "routed", "--runs", "0"], ["--runs"]),
        (["--out", "page.pdf"], ["must end in .html"]),
        (["--out", "absent/page.html"], ["absent does not exist"]),
    ],
)
def test_bad_options(models, source, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    options = [str(models / f"{o}.safetensors") if o in ("routed", "pixels") else o for o in options]
    result = call(source, *options)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Error: " in result.output and all(word in result.output for word in words), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.slow
def test_bad_images(models, image):
    path = [models / "routed.safetensors"]
    for bad, error, words in (
        (image.float(), TypeError, "image must be uint8"),
        (image[None], ValueError, r"must be \(3, H, W\)"),
        (image[:, :1, :1], ValueError, "at least 2 x 2"),
        (image[:, :10, :10], ValueError, "PSNR and SSIM need a result of at least 15 x 15; got 10 x 10"),
    ):
        with pytest.raises(error, match=words):
            compare(bad, path, downscale=True)


@pytest.mark.slow
def test_lists_of_options(models, source, tmp_path, monkeypatch):
    """Several values after one name, the name repeated, and with an equals sign."""
    monkeypatch.chdir(tmp_path)
    two = [models / "routed.safetensors", models / "plain.safetensors"]
    for lists in (
        ["--models", *two, "--budget", "0.6", "0.8"],
        ["--models", two[0], "--models", two[1], "--budget=0.6", "0.8"],
    ):
        result = call(source, *lists, "--runs", 1)
        assert result.exit_code == 0, result.output
        for name in ("bicubic", "routed, dense", "routed, budget 0.6", "routed, budget 0.8", "plain, dense"):
            assert f"  {name}: " in result.output
        assert "wrote photo-compare.html" in result.output
    assert (tmp_path / "photo-compare.html").stat().st_size > 1000
    assert call("--quiet", "--runs", 1, "--out", "a.html", "--models", two[1], "--", source).output == ""
    assert (tmp_path / "a.html").exists()


def test_labels():
    assert labels(["a-x4", "runs/b.pth", "other/c.pth", "runs/c.pth"]) == ["a-x4", "b", "other/c.pth", "runs/c.pth"]


def test_detail_of_a_large_image():
    a = torch.zeros(3, 900, 1600, dtype=torch.uint8)
    b = a.clone()
    b[:, 850:, 1500:] = 9
    left, top, across, down = find_detail(a, b)
    assert across * down <= SHOWN_PIXELS and (left + across, top + down) == (1600, 900)
    b[:, :100, :120] = 30
    assert find_detail(a, b)[:2] == (0, 0)
    assert find_detail(a[:, :500, :500], b[:, :500, :500]) == (0, 0, 500, 500)
    narrow = torch.zeros(3, 7, 200_000, dtype=torch.uint8)
    left, top, across, down = find_detail(narrow, narrow)
    assert down <= 7 and left + across <= 200_000


@pytest.mark.slow
def test_the_page_holds_everything_itself(models, image):
    found = compare(image, [models / "routed.safetensors"], downscale=True, runs=1)
    page = render(found, "<b>&photo.png", (4, 2, 30, 20))
    assert "<b>" not in page and "&lt;b&gt;&amp;photo.png, enlarged 2 times" in page
    # What a page can load stands in these.
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert sources and all(a.startswith("data:") and not b for a, b in sources)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", page)
    pictures = re.findall(r'<img id="picture\d" alt="([^"]*)" src="data:image/jpeg;base64,([^"]*)"', page)
    names = [name for name, _ in pictures]
    assert names == [BICUBIC, "routed, dense", "routed, routed", "routed, routed: classes", "reference"]
    shown = {name: Image.open(BytesIO(base64.b64decode(data))) for name, data in pictures}
    assert {picture.size for picture in shown.values()} == {(30, 20)}
    for name, expected in ((BICUBIC, found.variants[0].image), ("reference", found.reference)):
        # JPEG keeps the noise of this picture within some levels on average.
        error = np.abs(np.array(shown[name]).astype(int) - expected[:, 2:22, 4:34].permute(1, 2, 0).numpy())
        assert error.mean() < 8
    for variant in found.variants:
        assert f"{variant.quality['psnr']:.2f} dB" in page and f"{variant.quality['ssim']:.4f}" in page
    counts = found.variants[2].stats.counts_per_class
    assert " / ".join(f"{100 * n / sum(counts):.0f}" for n in counts) + " %" in page


@pytest.mark.slow
def test_a_result_like_the_reference_is_called_identical(models, image):
    found = compare(image, [models / "plain.safetensors"], reference=bicubic(image, (90, 122)), runs=1)
    assert "<td>identical</td>" in render(found, "photo.png")


@pytest.mark.slow
def test_cascades_beside_their_dense_runs(tmp_path):
    """A page for a network and a cascade over it: one dense run, how near the routed one comes to it, and where it differs."""
    torch.manual_seed(0)
    image = torch.full((3, 96, 192), 100, dtype=torch.uint8)
    image[:, :, 128:] = torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)
    save_checkpoint(tmp_path / "heavy.safetensors", Compact(16, 6, 2))
    save_checkpoint(tmp_path / "light.safetensors", Compact(8, 1, 2))
    names = [tmp_path / "light.safetensors", tmp_path / "heavy.safetensors"]
    scores, contexts = torch.tensor([1.0, 200.0]).double(), (8,)
    table = Table(scores, torch.tensor([[1e-6, 1e-1], [1e-9, 1e-9]]).double(), contexts, fidelity=20.0)
    save_cascade(tmp_path / "routed.safetensors", names, Calibration(table, (0.05, 1.0), 2, 10, 20.0, (20.0,)))
    found = compare(image, [tmp_path / "routed.safetensors", tmp_path / "heavy.safetensors"], runs=1)
    first, dense, routed = found.variants
    assert (dense.name, routed.name) == ("heavy, dense", "routed, routed") and routed.dense is dense
    apart = (routed.image.int() - dense.image.int()).abs()
    assert 0 < int((apart > 0).sum()) < apart.numel()
    assert routed.near == pytest.approx(-10 * math.log10(float((apart / 255).double().square().mean())), abs=1e-3)
    assert torch.equal(routed.difference, (apart * STRONGER).clamp(max=31 * STRONGER).to(torch.uint8))
    assert dense.near is None and first.near is None
    page = render(found, "a picture")
    near = f"{routed.near:.2f} dB"
    assert page.count(near) == 3 and "PSNR to dense" in page and "Differences to the dense results" in page
    assert 'sides[0].value = "picture1"' in page
    alone = compare(image, [tmp_path / "routed.safetensors"], runs=1)
    assert [v.name for v in alone.variants] == ["bicubic", "routed, dense", "routed, routed"]


def test_a_failed_write_keeps_the_old_page(models, image, tmp_path, monkeypatch):
    found = compare(image, [models / "plain.safetensors"], runs=1)
    (tmp_path / "a.html").write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(tmp_path / "a.html", found, "photo.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"] and (tmp_path / "a.html").read_text() == "old"


@pytest.fixture(scope="module")
def page(models, image, tmp_path_factory):
    found = compare(image, [models / "routed.safetensors", models / "pixels.safetensors"], downscale=True, runs=1)
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, found, "photo.png", (0, 0, 40, 30))
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def right_edge(page) -> float:
    """Where the right picture begins, as a share of the width in percent."""
    clip = page.eval_on_selector("#stage img.right", "image => getComputedStyle(image).clipPath")
    return float(re.fullmatch(r"inset\(0(?:px)? 0(?:px)? 0(?:px)? ([\d.]+)%\)", clip)[1])


@pytest.mark.slow
def test_the_slider_in_a_browser(browser, page):
    with visit(browser, page) as seen:
        assert images_loaded(seen.page) == 8 + 2
        assert seen.page.title() == "photo.png, enlarged 2 times"
        names = [seen.page.inner_text(f"#{side}-name") for side in ("left", "right")]
        assert names == ["◂ bicubic", "pixels, routed ▸"]
        assert right_edge(seen.page) == 50
        # By keyboard.
        seen.page.focus("#slider")
        seen.page.keyboard.press("ArrowRight")
        assert right_edge(seen.page) == 50.5
        assert "bicubic on 51 % of the width" in seen.page.get_attribute("#slider", "aria-valuetext")
        seen.page.keyboard.press("Home")
        assert right_edge(seen.page) == 0
        # By mouse.
        box = seen.page.locator("#stage").bounding_box()
        seen.page.mouse.move(box["x"] + 2, box["y"] + 9)
        seen.page.mouse.down()
        seen.page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 9)
        seen.page.mouse.up()
        assert right_edge(seen.page) == pytest.approx(75, abs=5)
        handle = seen.page.locator(".handle").bounding_box()
        assert handle["x"] + 1 == pytest.approx(box["x"] + box["width"] * right_edge(seen.page) / 100, abs=2)


@pytest.mark.slow
def test_the_choice_of_pictures_in_a_browser(browser, page):
    with visit(browser, page) as seen:
        seen.page.select_option("#left", label="reference")
        seen.page.select_option("#right", label="routed, routed: classes")
        visible = seen.page.eval_on_selector_all("#stage img", "all => all.filter(i => i.offsetWidth).map(i => i.alt).sort()")
        assert visible == ["reference", "routed, routed: classes"]
        seen.page.select_option("#right", label="reference")
        assert seen.page.locator("#stage img:visible").count() == 1
        seen.page.select_option("#zoom", "4")
        assert seen.page.locator("#stage img.left").bounding_box()["width"] == 160


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390])
def test_the_page_on_a_phone(browser, page, width):
    with visit(browser, page, width=width) as seen:
        assert images_loaded(seen.page) == 10
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("#left", "#right", "#zoom", ".view", "table"):
            assert seen.page.locator(name).is_visible()


@pytest.mark.slow
def test_the_browser_notices_errors(browser, tmp_path):
    """Pages that break each rule are refused."""
    (tmp_path / "a.html").write_text('<img alt="" src="http://example.invalid/a.png">')
    (tmp_path / "b.html").write_text("<script>missing()</script>")
    for name in ("a.html", "b.html"):
        with pytest.raises(AssertionError), visit(browser, tmp_path / name):
            pass
