"""Activation by import, entry point and call, in any order and process; and its undoing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ranks
from tests.bodies import activation


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    (told,) = ranks.run(1, "tests.bodies.activation:in_forks", seconds=300)
    return dict(told)


@pytest.mark.parametrize(
    "case", [*activation.CASES, *(f"missing {symbol}" for symbol in sorted(activation.SYMBOLS))]
)
def test_vllm_first(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == "", outcomes[case]


@pytest.mark.parametrize(
    ("case", "toggle"), [("import_before_vllm", "2"), ("enabled_then_disabled_before_vllm", "")]
)
def test_package_first(case: str, toggle: str) -> None:
    ranks.run(1, f"tests.bodies.activation:{case}", env={activation.TOGGLE: toggle})


@pytest.mark.parametrize(
    ("toggle", "allowed"),
    [
        *((text, ["oproj_patch", "oproj_patch._version"]) for text in ("", "0", "1")),
        ("2", None),
        ("auto", None),
    ],
)
def test_import_is_light(toggle: str, allowed: list[str] | None) -> None:
    """Off imports one module and its version; on does not import torch or vLLM either."""
    code = (
        "import os, sys, oproj_patch\n"
        "if os.environ['OPROJ_TENSOR_PARALLEL_SIZE'] in ('', '0', '1'): oproj_patch.plugin()\n"
        "print(*(name for name in sorted(sys.modules) if name.partition('.')[0] in "
        "('torch', 'vllm', 'wrapt', 'oproj_patch')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={activation.TOGGLE: toggle, "PYTHONPATH": str(ranks.ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.split()  # fmt: skip
    if allowed is not None:
        assert found == allowed
    assert not {name.partition(".")[0] for name in found} & {"torch", "vllm"}
