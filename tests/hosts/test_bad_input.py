"""Releases that are too old or too new, or lack a symbol: refused, not half-patched.

`tests/ranks/test_activation.py` does the same on the release that is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch, test_activation

from .wheels import Host, environment

NEWER = "0.34.0"
UNCHECKED = {"OPROJ_PATCH_SKIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[launch.Server]:
    """A process on the release that the parameter names, which has imported what is patched."""
    path = environment(request.param)["PYTHONPATH"]
    with launch.Server({"PYTHONPATH": path}, ["vllm.distributed", *test_activation.SEAMS]) as found:
        yield found


@pytest.mark.parametrize(
    "server",
    [pytest.param(Host("vllm", release), id=f"vllm-{release}") for release in ("0.9.1", "0.18.0")],
    indirect=True,
)
@pytest.mark.parametrize("symbol", sorted(test_activation.SYMBOLS))
def test_a_symbol_that_is_gone(server: launch.Server, symbol: str) -> None:
    launch.run(1, test_activation.missing, symbol, server=server)


@pytest.fixture(scope="module")
def older() -> Iterator[launch.Server]:
    """A process on the released 0.8.5 itself."""
    path = environment(Host("vllm", "0.8.5"))["PYTHONPATH"]
    with launch.Server({"PYTHONPATH": path}, ["vllm.distributed"]) as server:
        yield server


def test_older_release_is_refused(older: launch.Server) -> None:
    launch.run(1, test_activation.refused, "0.8.5", server=older)


def test_older_release_unchecked_lacks_the_loader(older: launch.Server) -> None:
    launch.run(1, test_activation.lacking_the_loader, server=older, env=UNCHECKED)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Server]:
    """A process on the installed release under a later number, told by its own version module."""
    path = tmp_path_factory.mktemp("newer")
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    package = path / "vllm"
    package.mkdir()
    for file in Path(spec.submodule_search_locations[0]).iterdir():
        if file.name not in ("_version.py", "__pycache__"):
            (package / file.name).symlink_to(file)
    (package / "_version.py").write_text(
        f"__version__ = version = {NEWER!r}\n__version_tuple__ = (0, 34, 0)\n"
    )
    about = path / f"vllm-{NEWER}+cpu.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {NEWER}+cpu\n")
    imported = ["vllm.distributed", *test_activation.SEAMS]
    with launch.Server({"PYTHONPATH": str(path)}, imported) as server:
        yield server


@pytest.mark.parametrize(
    ("case", "args", "env"),
    [
        (test_activation.refused, [NEWER], {}),
        (test_activation.accepted, [], UNCHECKED),
        (test_activation.missing, ["vllm.config.VllmConfig.compute_hash"], UNCHECKED),
    ],
)
def test_newer_release(
    newer: launch.Server, case: Callable[..., None], args: list[Any], env: dict[str, str]
) -> None:
    launch.run(1, case, *args, server=newer, env=env)
