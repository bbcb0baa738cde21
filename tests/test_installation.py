"""What an installation finds, builds and says: the torch to build against, CUDA or not, the wheel in a fresh environment."""

import importlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import fastroute
from fastroute import backends
from fastroute.backends import loaded_extension

ROOT = Path(__file__).parents[1]
BUILDING = ROOT / "building"
pytestmark = pytest.mark.skipif(not BUILDING.is_dir(), reason="these tests build the package from its source")


@pytest.fixture
def building(monkeypatch):
    """The modules of building/, by name."""
    monkeypatch.syspath_prepend(str(BUILDING))
    for variable in ("FASTROUTE_TORCH", "FASTROUTE_BUILD_CUDA", "FASTROUTE_CUDA_ARCHS", "FASTROUTE_NO_EXTENSION", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return importlib.import_module


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    """What the build reads of a torch package."""
    (folder / "include" / "torch" / "csrc").mkdir(parents=True)
    text = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "version.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("version", "cuda"), [("2.10.0", "12.8"), ("2.13.0+cpu", None), ("3.0.0a0+git", "13.0")])
def test_the_torch_that_is_named(building, monkeypatch, tmp_path, version, cuda):
    folder = fake_torch(tmp_path / "mit Größe", version, cuda)
    monkeypatch.setenv("FASTROUTE_TORCH", str(folder))
    assert building("target_torch").target_torch() == (folder, version, cuda)


def test_a_torch_that_cannot_be_built_against(building, monkeypatch, tmp_path):
    found = building("target_torch")
    monkeypatch.setenv("FASTROUTE_TORCH", str(fake_torch(tmp_path / "old", "2.9.1")))
    with pytest.raises(found.NoTorch, match=r"needs torch 2\.10 or newer; this is torch 2\.9\.1 in .*Install a newer torch"):
        found.target_torch()
    monkeypatch.setenv("FASTROUTE_TORCH", str(tmp_path))
    with pytest.raises(found.NoTorch, match="is not the folder of a torch package"):
        found.target_torch()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_flags_for_the_compiler_below_nvcc(building, tmp_path):
    folder = tmp_path / "a path, not 'plain', with Größe"
    folder.mkdir()
    (folder / "a.cu").write_text("const char* path() { return __FILE__; }\n")
    flags = building("toolchain").for_host(["-Wall", f"-ffile-prefix-map={folder}/=here/"])
    command = ["nvcc", "-ccbin", "c++", *flags, "-c", str(folder / "a.cu"), "-o", str(folder / "a.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = (folder / "a.o").read_bytes()
    assert b"here/a.cu" in content and b"not 'plain'" not in content


def test_an_isolated_build_finds_the_torch_of_its_environment(building, monkeypatch, tmp_path):
    """pip hides the environment's packages by a module that Python runs when it starts."""
    found = building("target_torch")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert found.ask(sys.executable, dict(os.environ)) == []
    torch = importlib.import_module("torch")
    assert found.target_torch() == (Path(torch.__file__).parent, torch.__version__, torch.version.cuda)


def test_a_build_without_torch_ends_before_anything_is_downloaded(building, monkeypatch):
    found = building("target_torch")
    backend = building("backend")
    monkeypatch.setattr(found, "folders", lambda: iter(()))
    monkeypatch.setattr(backend, "find_compiler", lambda: (["c++"], ""))
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        with pytest.raises(SystemExit, match=r"there is none in this environment.*pip install torch.*--no-build-isolation"):
            hook()
    # Nothing is compiled without a compiler, so no torch is needed.
    monkeypatch.setattr(backend, "find_compiler", lambda: ([], "there is none"))
    backend.check()


def test_editable_installs_are_paths(building, monkeypatch):
    """A finder comes behind the folders of the path, in which a clone called fastroute may lie."""
    backend, given = building("backend"), []
    monkeypatch.setattr(backend.build_meta, "build_editable", lambda *args: given.append(args) or "a.whl")
    assert backend.build_editable("to") == backend.build_editable("to", {"editable_mode": "strict"}, "from") == "a.whl"
    assert given == [("to", {"editable_mode": "compat"}, None), ("to", {"editable_mode": "strict"}, "from")]


def test_torch_is_no_requirement_of_the_build():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requires,) = [line for line in text.splitlines() if line.startswith("requires = ")]
    assert "torch" not in requires


NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88"
[ "$1" = --list-gpu-arch ] && echo compute_80 compute_90
exit 0
"""


@pytest.mark.parametrize(
    ("torch_cuda", "asked", "left_out"),
    [
        ("13.1", "", ""),
        ("12.8", "", "nvcc is of CUDA 13.0 and torch of CUDA 12.8"),
        ("12.8", "1", ""),
        ("13.1", "0", "FASTROUTE_BUILD_CUDA=0 was set"),
        (None, "", "torch was built without CUDA"),
        (None, "1", ""),
    ],
)
def test_cuda_kernels_are_built_for_a_torch_with_cuda(building, monkeypatch, tmp_path, torch_cuda, asked, left_out):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("FASTROUTE_BUILD_CUDA", asked)
    found = building("toolchain").find_cuda(torch_cuda)
    assert found.left_out.startswith(left_out) and bool(found.left_out) == bool(left_out)
    assert found[:3] == ((None, "", ()) if left_out else (str(nvcc), "13.0", ("80", "90")))


def test_no_nvcc(building, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert building("toolchain").find_cuda("13.0").left_out == "nvcc was not found"
    monkeypatch.setenv("FASTROUTE_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found: set CUDACXX or CUDA_HOME"):
        building("toolchain").find_cuda("13.0")


def test_a_source_folder_that_was_not_built_says_what_it_shadows(monkeypatch, tmp_path):
    source, installed = tmp_path / "source", tmp_path / "site-packages"
    for folder in (source, installed):
        (folder / "fastroute").mkdir(parents=True)
        (folder / "fastroute" / "__init__.py").touch()
    (source / "setup.py").touch()
    monkeypatch.setattr(sys, "path", [str(source)])
    assert "which was not built: run `pip install .`" in backends._not_built(source)
    monkeypatch.setattr(sys, "path", [str(source), str(installed)])
    told = backends._not_built(source)
    assert f"instead of the one installed in {installed / 'fastroute'}: start Python in another folder" in told


@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        ("torch", "torch", ["info", "--check"]),
        ("torch", "torch", ["upscale", "a.png", "b.png"]),
        ("torch", "torch", ["join", "a.zarr"]),
        ("PIL", "pillow", ["upscale", "a.png", "b.png"]),
    ],
)
def test_a_requirement_that_is_missing_is_named(tmp_path, module, package, command):
    """As in an environment from which it was removed, or into which fastroute came without its requirements."""
    code = f"import sys; sys.modules[{module!r}] = None; from fastroute.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    told = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert f"Error: fastroute needs {package}, which {sys.executable} does not find: run pip install {package}" in told.stderr


def wheel(folder: Path, **environment: str) -> Path:
    """A wheel of this source in `folder`, by the installed build requirements."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=600)
    (found,) = folder.glob("*.whl")
    return found


def install(package: Path, folder: Path) -> Path:
    """The Python of a fresh environment with `package`, which finds everything else where this one does."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*command, str(package)], check=True, timeout=300)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What the package of a fresh environment prints, in a folder of no source."""
    hidden = ("PYTHONPATH", "FASTROUTE_BACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_a_wheel_without_a_compiler(tmp_path):
    package = wheel(tmp_path, CXX="no-such-compiler")
    assert package.name == f"fastroute-{fastroute.__version__}-py3-none-any.whl"
    python = install(package, tmp_path / "venv")
    reason = "because the C++ compiler named by CXX was not found (no-such-compiler)"
    told = run(python, "-c", "import fastroute, torch; fastroute.TileGrid(8, 8, 4, 2); fastroute.extract_patches", cwd=tmp_path)
    assert told.returncode == 0 and told.stderr.count(reason) == 1
    info = run(python, "-W", "ignore", "-m", "fastroute", "info", cwd=tmp_path)
    assert f"extension: none: the C++ extension was not built, {reason} ({backends.REMEDY})" in info.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(loaded_extension().reasons), reason="; ".join(loaded_extension().reasons))
def test_the_wheel_in_a_fresh_environment(tmp_path):
    """In a path with a space and letters beyond ASCII, and where nothing can be written beside the package."""
    package = wheel(tmp_path / "wheel", FASTROUTE_BUILD_CUDA="0", FASTROUTE_LOCAL_VERSION="test")
    assert package.name.startswith(f"fastroute-{fastroute.__version__}+test-py3-none-linux")
    python = install(package, tmp_path / "Über uns")
    for path in (tmp_path / "Über uns").rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    checked = run(python, "-m", "fastroute", "info", "--check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "\n  ok       cpu, backend cpu, patches\n" in checked.stdout and "checks are ok" in checked.stdout
