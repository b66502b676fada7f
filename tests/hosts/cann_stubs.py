"""Import the real torch_npu on a machine without an NPU and without CANN.

torch_npu links to the CANN libraries. This module generates shared libraries of those names
from what the wheel leaves undefined: every function answers with an error, and the few that
importing torch_npu asks report that there is no device. Nothing is computed by them.

Needs `gcc` and `nm` (packages gcc and binutils) on `PATH`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import util
from pathlib import Path

from . import wheels

# Everything is defined in the first; the others only have to exist.
_LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
)
_ANSWERED = {
    "aclInit": "int aclInit(const char *path) { return 0; }",
    "aclFinalize": "int aclFinalize(void) { return 0; }",
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { *n = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B1"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "CANN stub"; }',
}
_ERROR = 500000  # ACL_ERROR_INTERNAL_ERROR


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let a child with environment `base` import torch_npu."""
    libraries = filter(None, [str(ensure()), base.get("LD_LIBRARY_PATH", "")])
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        # torch would import torch_npu by itself, in processes that must not have it too.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def ensure() -> Path:
    """Generate the libraries unless they are stored; return their directory.

    Raises:
        RuntimeError: gcc or nm is missing or fails.
    """
    torch_npu = wheels.store("torch-npu", wheels.torch_version())
    if torch_npu is None:
        raise RuntimeError(
            "torch-npu is installed in the base environment, which must be a CPU one; "
            "run these tests in an environment without it"
        )
    return wheels.stored(f"cann-stubs-{torch_npu.name}", lambda new: _build(torch_npu, new))


def undefined(torch_npu: Path) -> list[str]:
    """Return the symbols which the wheel's libraries expect from CANN, sorted."""
    spec = util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    own = sorted(torch_npu.rglob("*.so"))
    torch = sorted((Path(spec.origin).parent / "lib").glob("*.so*"))
    missing = _symbols("--undefined-only", own) - _symbols("--defined-only", [*own, *torch])
    # A version names a system library; Python's own come from the executable.
    return sorted(name for name in missing if not re.search(r"@|^_?Py", name))


def _symbols(which: str, libraries: Iterable[Path]) -> set[str]:
    listing = _output(["nm", "-D", which, *map(str, libraries)])
    # Weak undefined symbols (w, v) may stay undefined.
    return {line.split()[-1] for line in listing.splitlines() if re.search(r" [^wv\s] \S+$", line)}


def _build(torch_npu: Path, new: Path) -> None:
    new.mkdir()
    source = new / "cann_stubs.c"
    source.write_text("\n".join(map(_definition, undefined(torch_npu))))
    for name in _LIBRARIES:
        inputs = [str(source)] if name == _LIBRARIES[0] else ["-x", "c", os.devnull]
        command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        _output([*command, "-o", str(new / name), *inputs])


def _definition(symbol: str) -> str:
    if symbol in _ANSWERED:
        return _ANSWERED[symbol]
    if symbol.startswith("_ZT"):  # vtable or type information
        return f"void *{symbol}[64];"
    return f"long {symbol}(void) {{ return {_ERROR}; }}"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise RuntimeError(
            f"{command[0]} is not on PATH; install gcc and binutils to generate the CANN stubs"
        ) from None
    if done.returncode:
        raise RuntimeError(
            f"{command[0]} failed (exit status {done.returncode}); its output:\n{done.stderr}"
        )
    return done.stdout


if __name__ == "__main__":
    print(ensure())
    sys.exit(0)
