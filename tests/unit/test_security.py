"""What runs inside vLLM reads no pickle, starts no program and writes no file: its source.

`tests/faults/test_faults.py` watches a running rank.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import oproj_patch

PACKAGE = Path(oproj_patch.__file__).parent
COMMAND_LINE = sorted(PACKAGE.glob("cli/*.py"))
INSIDE = sorted({*PACKAGE.rglob("*.py")} - {*COMMAND_LINE})
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
PROGRAMS = {"subprocess", "multiprocessing", "ctypes", "pty"}
CALLS = {"eval", "exec", "system", "popen", "load_object", "broadcast_object_list"} | {
    "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"
}  # fmt: skip
WRITES = {"open", "write_text", "write_bytes", "mkdir", "mkdtemp", "mkstemp", "save", "unlink"}


def used(path: Path) -> tuple[set[str], set[str]]:
    """Modules that a file imports, and names of what it calls; keywords with their value."""
    modules, calls = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func).rpartition(".")[2])
            calls |= {ast.unparse(keyword) for keyword in node.keywords}
    return modules, calls


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: path.stem)
def test_inside_vllm(path: Path) -> None:
    modules, calls = used(path)
    assert not modules & (PICKLES | PROGRAMS)
    assert not calls & (CALLS | WRITES)


@pytest.mark.parametrize("path", COMMAND_LINE, ids=lambda path: path.stem)
def test_command_line(path: Path) -> None:
    modules, calls = used(path)
    assert not modules & PICKLES
    assert not calls & (CALLS | {"shell=True", "weights_only=False"})
