"""Releases that are too old or too new, and releases that lack a symbol: refused, not half-patched.

`tests/test_activation.py` does the same on the release that is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .. import ranks
from .overlay import Host, environment

pytest.importorskip("vllm")
NEWER = "0.33.0"


def told(path: str, function: str, **args: object) -> dict[str, str]:
    (found,) = ranks.run(
        1, f"tests.bodies.activation:{function}", args, seconds=200, env={"PYTHONPATH": path}
    )
    return dict(found)


@pytest.mark.parametrize("host", [Host("vllm", "0.9.1"), Host("vllm", "0.18.0")], ids=str)
def test_a_symbol_that_is_gone(host: Host) -> None:
    outcomes = told(environment(host)["PYTHONPATH"], "on_release")
    assert len(outcomes) == 6 and not any(outcomes.values()), outcomes


def test_older_release() -> None:
    """The released 0.8.5 itself."""
    path = environment(Host("vllm", "0.8.5"))["PYTHONPATH"]
    assert told(path, "on_untested", version="0.8.5", alike=False) == {
        "refused": "",
        "lacking": "",
    }


def test_newer_release(tmp_path: Path) -> None:
    """The installed release under a later number, told by its own version module."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    package = tmp_path / "vllm"
    package.mkdir()
    for file in Path(spec.submodule_search_locations[0]).iterdir():
        if file.name not in ("_version.py", "__pycache__"):
            (package / file.name).symlink_to(file)
    (package / "_version.py").write_text(
        f"__version__ = version = {NEWER!r}\n__version_tuple__ = (0, 33, 0)\n"
    )
    about = tmp_path / f"vllm-{NEWER}+cpu.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {NEWER}+cpu\n")
    outcomes = told(str(tmp_path), "on_untested", version=NEWER, alike=True)
    assert outcomes == dict.fromkeys(("refused", "accepted", "missing"), "")
