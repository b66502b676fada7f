"""What is released: a wheel and an sdist, from `python -m build` to an environment with vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from oproj_patch import __version__

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "oproj_patch")
TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"

pytest.importorskip("build")


def call(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPROJ_", "PYTHON", "VLLM_"))}
    return subprocess.run(
        [*map(str, command)],
        env=kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environ,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(*command: str | Path, **environ: str) -> str:
    """Standard output of a command that must succeed."""
    done = call(*command, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building writes beside it."""
    directory = tmp_path_factory.mktemp("source")
    for name in NAMES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, directory / name, ignore=ignored)
        else:
            shutil.copy(path, directory)
    return directory


@pytest.fixture(scope="module")
def released(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.long
def test_contents(released: tuple[Path, Path]) -> None:
    wheel, sdist = released
    assert wheel.name == f"oproj_patch-{__version__}-py3-none-any.whl"
    assert sdist.name == f"oproj_patch-{__version__}.tar.gz"
    info = f"oproj_patch-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = archive.read(f"{info}/entry_points.txt").decode()
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "oproj_patch").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in names if not name.startswith(info)} == modules
    assert f"{info}/licenses/LICENSE" in names
    assert "[vllm.general_plugins]\noproj_patch = oproj_patch:plugin" in points
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {"LICENSE", "README.md", "setup.py"} <= packed


@pytest.mark.long
def test_metadata_is_accepted_by_an_index(released: tuple[Path, Path]) -> None:
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *released)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wheel", "sdist", "pip install ."])
def test_installs_into_an_empty_environment(
    kind: str, source: Path, released: tuple[Path, Path], tmp_path: Path
) -> None:
    target = {"wheel": released[0], "sdist": released[1], "pip install .": source}[kind]
    venv.create(tmp_path, with_pip=True)
    binaries = tmp_path / "bin"
    run(binaries / "pip", "install", "--quiet", target)
    run(binaries / "pip", "check")
    assert run(binaries / "oproj-patch", "--version") == f"oproj_patch {__version__}\n"
    planned = json.loads(run(binaries / "oproj-patch", "plan", "deepseek-r1", "--json"))
    assert planned["rows"][0]["otp_size"] == 2
    assert call(binaries / "oproj-patch", "doctor", **{TOGGLE: "2"}).returncode == 1
    code = "import oproj_patch, sys; print('wrapt' in sys.modules, oproj_patch.__version__)"
    assert run(binaries / "python", "-c", code) == f"False {__version__}\n"


@pytest.mark.long
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_installs_beside_vllm(released: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    [site] = (tmp_path / "lib").glob("python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "beside.pth").write_text("\n".join(ours) + "\n")
    binaries = tmp_path / "bin"
    run(
        *(binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--force-reinstall", "--target", site, released[0]),
    )
    code = "import oproj_patch; print(oproj_patch.__file__)"
    assert run(binaries / "python", "-c", code).startswith(str(site))
    run(binaries / "python", "-m", "oproj_patch", "doctor", **{TOGGLE: "2"})
