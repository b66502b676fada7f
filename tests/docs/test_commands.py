"""Every command of the documents is run here, or is named with the test that runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from oproj_patch import settings

from ..engines import tiny
from ..ranks.test_doctor import in_fork
from .tables import DOCUMENTS, ROOT

SECONDS = 300
TOGGLE = settings.TOGGLE

# What is not run from here, and what runs it.
ELSEWHERE = {
    "pip install .": "tests/docs/test_release.py",
    "pip install tox && tox": ".ci/run",
    "curl http://localhost:8000/metrics": "tests/engines/serving.py",
}

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    where: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Every fenced block of every document; a block may be indented, as in a list."""
    found = []
    pattern = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    for path in DOCUMENTS:
        for indent, language, text in pattern.findall(path.read_text(encoding="utf-8")):
            plain = "\n".join(line.removeprefix(indent) for line in text.splitlines())
            found.append(Block(path.name, language, plain))
    return found


def commands(starts: str = "") -> list[str]:
    """Every shell command, once."""
    lines = [
        line for block in blocks() if block.language == "sh" for line in block.text.splitlines()
    ]
    return sorted({line for line in lines if line.strip() and line.startswith(starts)})


def servers() -> list[str]:
    """Commands that start a server, or ask doctor about one."""
    return [line for line in commands() if "vllm serve" in line]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPROJ_", "VLLM_PLUGINS"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1"}


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    return tiny.make(tmp_path_factory.mktemp("model"))


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in blocks()} <= {"sh", "python", "yaml", "text", ""}
    assert {block.where for block in blocks() if not block.language} <= {"how-it-works.md"}


def test_every_command_is_run_by_a_test() -> None:
    handled = {
        *commands("oproj-patch plan"),
        *commands("oproj-patch doctor"),
        *commands("python -m oproj_patch doctor"),
        *commands("python -m tests."),
        *commands("pytest tests/"),
        *commands("tox -e "),
        *commands("pip install tox && tox -e "),
        *servers(),
        *ELSEWHERE,
    }
    assert set(commands()) <= handled
    for command, runner in ELSEWHERE.items():
        text = (ROOT / runner).read_text(encoding="utf-8")
        assert command.split("localhost:8000")[-1] in text, (command, runner)


@pytest.mark.parametrize("command", commands("oproj-patch plan"))
def test_plan(command: str) -> None:
    done = shell(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Memory" in done.stdout


@needs_vllm
@pytest.mark.parametrize("command", servers())
def test_servers_would_be_accepted_and_active(command: str, tiny_model: str) -> None:
    given = command.partition(" -- ")[2] if command.startswith("oproj-patch doctor") else command
    given = given.replace("MODEL", shlex.quote(tiny_model))
    # VLLM_PLUGINS names what only an environment with vllm-ascend has; the filter is the same.
    code, report = in_fork("--", *shlex.split(given))
    wrong = [f for f in report["findings"] if f["state"] not in ("ok", "note")]
    if "ray" in given.split() and find_spec("ray") is None:
        assert [(f["check"], "ray" in f["text"].lower()) for f in wrong] == [("command", True)]
        return
    assert (code, wrong) == (0, [])
    said = re.search(rf"{TOGGLE}=(\w+)", given)
    assert said is not None
    assert report["size"] == (4 if said[1] == "auto" else int(said[1]))


@pytest.mark.long
@needs_vllm
@pytest.mark.parametrize("command", [c for c in commands() if c.endswith("patch doctor")])
def test_doctor_alone_says_off(command: str) -> None:
    done = shell(command)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("\n  problem") == 1
    assert f"{TOGGLE} is not set: off" in done.stdout


def environments() -> set[str]:
    """Names of the environments in tox.ini, `{a,b}` spelled out."""
    text = (ROOT / "tox.ini").read_text(encoding="utf-8")
    names = re.findall(r"^\[testenv:(.+)\]$", text, re.MULTILINE)
    return {part for name in names for part in name.strip("{}").split(",")}


def named_environments(text: str) -> set[str]:
    """Environments that a command or a document names after `tox -e`; ROOM stands for any."""
    return set(re.findall(r"tox -e (\w+)", text)) - {"ROOM"}


def test_tox_environments_exist() -> None:
    paths = [*DOCUMENTS, ROOT / "tox.ini"]
    named = set().union(*(named_environments(path.read_text(encoding="utf-8")) for path in paths))
    assert {"demo", "all", "quick"} < named
    assert named <= environments()


def test_every_environment_is_in_contributing_or_the_readme() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told += (ROOT / "README.md").read_text(encoding="utf-8")
    # `tests` is what `tox` alone runs, with `lint`.
    assert environments() - {"tests"} <= named_environments(told)


def test_the_workflow_runs_lint_the_quick_tests_and_the_command_of_the_readme() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)["jobs"]["tox"]
    run = job["strategy"]["matrix"]["command"]
    assert job["steps"][-1] == {"run": "${{ matrix.command }}"}
    install = "pip install tox && tox"
    assert run == [f"{install} -e lint", f"{install} -e quick", install]
    assert install in commands() and named_environments("\n".join(run)) <= environments()


@pytest.mark.parametrize("command", [c for c in commands("tox -e ") if " -k " in c])
def test_tests_that_tox_is_asked_for_are_there(command: str) -> None:
    room, *arguments = shlex.split(command.partition("tox -e ")[2])
    assert collected(f"tests/{room}", *arguments[1:])


@pytest.mark.parametrize("command", commands("pytest tests/"))
def test_tests_that_pytest_is_asked_for_are_there(command: str) -> None:
    assert collected(*shlex.split(command)[1:])


def collected(*arguments: str) -> list[str]:
    """Tests that pytest finds for these arguments."""
    pytest_ = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("command", commands("python -m tests.docs"))
def test_tables_are_written(command: str, tmp_path: Path) -> None:
    """From empty tables, in copies of the documents that the command names."""
    pytest.importorskip("torch")
    module, *targets = shlex.split(command)[2:]
    copies: dict[Path, str] = {}
    for path in sorted(path for target in targets for path in ROOT.glob(target)):
        text = path.read_text(encoding="utf-8")
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        empty = re.sub(r"(?<=:begin -->\n).*?(?=<!-- \w+:end -->)", "", text, flags=re.DOTALL)
        copy.write_text(empty, encoding="utf-8")
        if empty != text:
            copies[copy] = text
    assert copies
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, copies)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert {copy: copy.read_text(encoding="utf-8") for copy in copies} == copies


@pytest.mark.parametrize("command", commands("python -m tests.hosts"))
def test_host_commands_are_understood(command: str) -> None:
    """The wheels themselves are fetched by tests/hosts."""
    from oproj_patch.releases import VLLM_RELEASES

    module, *arguments = shlex.split(command)[2:]
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert arguments[:2] == ["ensure", "vllm"]
    assert arguments[2] in VLLM_RELEASES


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_programs(block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.text + "\nprint(oproj_patch.status())\n"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "Status(enabled=True, size=4" in done.stdout


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "yaml"], ids=str)
def test_pod_templates(block: Block) -> None:
    yaml = pytest.importorskip("yaml")
    [container] = yaml.safe_load(block.text)["spec"]["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    assert set(environ) <= set(settings.VARIABLES)
    read = settings.read(environ)
    assert (read.size, read.handshake_seconds) == (8, 600.0)
