"""`oproj-patch doctor`, run as its users run it, and in forks of a process with vLLM."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo import model as demo_model
from oproj_patch._version import build
from oproj_patch.cli import doctor as doctor_module
from oproj_patch.cli import main
from oproj_patch.errors import CODES

from ..engines import tiny
from . import launch

ROOT = Path(__file__).resolve().parents[2]
TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
SECONDS = 300

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what decides about the shim, then `changes`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPROJ_", "VLLM_PLUGINS"))}
    return kept | {"HF_HUB_OFFLINE": "1"} | changes


def doctor(
    *arguments: str, python: str = sys.executable, cwd: Path = ROOT, **changes: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `python -m oproj_patch doctor --json ARGUMENTS`."""
    done = subprocess.run(
        [python, "-m", "oproj_patch", "doctor", "--json", *arguments],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.stderr == "", done.stderr
    return done.returncode, json.loads(done.stdout)


def in_fork(*arguments: str, **changes: str) -> tuple[int, dict[str, Any]]:
    """What `doctor` returns, without the start of an interpreter that imports vLLM."""
    (told,) = launch.run(1, answer, arguments, changes)
    return told[0], json.loads(told[1])


def answer(arguments: tuple[str, ...], changes: dict[str, str]) -> tuple[int, str]:
    """In the fork: exit code and output, as after the start with the command's variables."""
    variables, _ = doctor_module._split(arguments[1:])
    os.environ.update(changes | variables)
    os.environ.update({doctor_module.RESTARTED: "1", "VLLM_LOGGING_LEVEL": "ERROR"})
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["doctor", "--json", *arguments])
    return code, out.getvalue()


def states(report: dict[str, Any], check: str) -> list[tuple[str, str | None]]:
    return [(f["state"], f["code"]) for f in report["findings"] if f["check"] == check]


def text(report: dict[str, Any], check: str) -> str:
    return " ".join(f["text"] for f in report["findings"] if f["check"] == check)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    return tiny.make(tmp_path_factory.mktemp("model"))


def serve(model: str, *options: str) -> list[str]:
    return ["vllm", "serve", model, "--max-model-len", "256", "--dtype", "float32", *options]


# --- with a host ------------------------------------------------------------------------------


@pytest.mark.long
@needs_vllm
def test_active(model: str) -> None:
    code, report = doctor("--", f"{TOGGLE}=2", *serve(model, "--data-parallel-size", "4"))
    assert (code, report["activates"], report["size"]) == (0, True, 2)
    assert {f["state"] for f in report["findings"]} <= {"ok", "note"}
    assert states(report, "refusals") == states(report, "model") == [("ok", None)]
    assert text(report, "model").endswith("the o_proj of every softmax attention is sharded.")
    assert len(states(report, "seam")) >= 5
    assert report["versions"]["oproj_patch"] == build()
    assert "data-parallel size 4" in text(report, "command")


@pytest.mark.long
@needs_vllm
def test_the_module_form_of_the_server(model: str) -> None:
    command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    code, report = doctor("--", *command, "--data-parallel-size", "3", **{TOGGLE: "2"})
    assert code == 1
    assert states(report, "refusals") == [("problem", "OPROJ003")]
    assert "the data-parallel size 3" in text(report, "refusals")


@needs_vllm
@pytest.mark.parametrize(
    ("config", "code", "size"),
    [
        ('{"oproj_tensor_parallel_size": 4}', None, 4),
        ('{"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}}', None, 2),
        ("{}", "OPROJ017", 0),
    ],
)
def test_auto(model: str, config: str, code: str | None, size: int) -> None:
    options = ["--data-parallel-size", "4", "--additional-config", config]
    ended, report = in_fork("--", f"{TOGGLE}=auto", *serve(model, *options))
    assert (ended, report["size"]) == (1 if code else 0, size)
    assert states(report, "refusals") == [("problem" if code else "ok", code)]


@needs_vllm
def test_a_dense_model_is_refused(model: str, tmp_path: Path) -> None:
    config = json.loads(Path(model, "config.json").read_text())
    dense = config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for name in [name for name in dense if "expert" in name or "lora" in name or "rope" in name]:
        del dense[name]
    (tmp_path / "config.json").write_text(json.dumps(dense | {"head_dim": 32}))
    command = serve(str(tmp_path), "--skip-tokenizer-init", "--data-parallel-size", "4")
    code, report = in_fork("--", f"{TOGGLE}=2", *command)
    assert code == 1
    assert states(report, "refusals") == [("problem", "OPROJ004")], text(report, "command")


@needs_vllm
def test_columns_that_cannot_be_divided(model: str) -> None:
    code, report = in_fork("--", f"{TOGGLE}=3", *serve(model, "--data-parallel-size", "6"))
    assert code == 1
    assert states(report, "refusals") == [("problem", "OPROJ005")]


@needs_vllm
def test_outputs_that_a_named_grid_does_not_cut(model: str) -> None:
    command = serve(model, "--data-parallel-size", "6")
    code, report = in_fork("--", f"{TOGGLE}=3", "OPROJ_GRID=1x3", *command)
    assert code == 1
    assert states(report, "refusals") == [("problem", "OPROJ005")]
    assert "OPROJ_GRID is 1x3, which does not cut o_proj on 1 " in text(report, "refusals")


@needs_vllm
def test_a_command_that_vllm_refuses(model: str) -> None:
    code, report = in_fork("--", f"{TOGGLE}=2", *serve(model, "--no-such-option"))
    assert code == 1
    assert states(report, "command") == [("problem", None)]
    assert "--no-such-option" in text(report, "command")


@needs_vllm
@pytest.mark.parametrize(
    ("toggle", "config", "code", "size"),
    [
        ("2", "{}", None, 2),
        ("3", "{}", "OPROJ003", 3),
        ("auto", '{"oproj_tensor_parallel_size": 4}', None, 4),
    ],
)
def test_a_model_that_is_not_there_leaves_the_checks_of_the_layout(
    toggle: str, config: str, code: str | None, size: int
) -> None:
    options = ["--data-parallel-size", "4", "--additional-config", config]
    ended, report = in_fork("--", f"{TOGGLE}={toggle}", *serve("MODEL", *options))
    assert (ended, report["size"]) == (1 if code else 0, size)
    assert states(report, "command") == [("note", None)]
    assert text(report, "command").endswith(
        "MODEL is a placeholder or not reachable: the checks that need its configuration were left "
        "out."
    )
    assert states(report, "refusals") == [("problem" if code else "ok", code)]
    assert ("where the model can be read" in report["next"]) is (code is None)
    verdict = doctor_module.format_report(report).splitlines()[-2]
    limited = f"would be active here, {size}-way, as far as could be checked."
    assert verdict == "oproj_patch " + ("would not be active here." if code else limited)


@needs_vllm
@pytest.mark.parametrize(
    ("plugins", "state"), [("oproj_patch", "ok"), ("ascend", "problem"), ("", "problem")]
)
def test_plugin_filter(plugins: str, state: str) -> None:
    code, report = in_fork(**{TOGGLE: "2", "VLLM_PLUGINS": plugins})
    assert states(report, "plugin") == [(state, None)]
    assert code == (0 if state == "ok" else 1)


@needs_vllm
def test_without_a_command_model_and_layout_are_open() -> None:
    code, report = in_fork(**{TOGGLE: "8"})
    assert (code, report["size"]) == (0, 8)
    assert states(report, "command") == [("note", None)]
    code, report = in_fork(**{TOGGLE: "auto"})
    assert code == 1
    assert states(report, "command") == [("unknown", None)]


@needs_vllm
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({TOGGLE: "0"}, None),
        ({TOGGLE: "four"}, "OPROJ001"),
        ({TOGGLE: "2", "OPROJ_PATCH_DEBUG": "yes"}, "OPROJ002"),
    ],
)
def test_off_or_not_understood(changes: dict[str, str], code: str | None) -> None:
    ended, report = in_fork(**changes)
    assert (ended, report["activates"], report["size"]) == (1, False, 0)
    assert states(report, "toggle") == [("problem", code)]
    # The rest is looked at all the same.
    assert states(report, "plugin") == [("ok", None)]


# --- the variables of the command, and what the host prints -----------------------------------

NOISY_HOST = """
import os
print("on standard output")
os.system("echo from a child; echo and another >&2")
raise RuntimeError(f"level {os.environ['VLLM_LOGGING_LEVEL']}")
"""


@pytest.mark.parametrize(
    ("given", "level"), [([], "ERROR"), (["VLLM_LOGGING_LEVEL=DEBUG"], "DEBUG")]
)
def test_a_host_that_prints_and_cannot_be_imported(
    tmp_path: Path, given: list[str], level: str
) -> None:
    """Python itself starts with the variables: this PYTHONPATH decides which vLLM is found."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(NOISY_HOST)
    variables = [f"PYTHONPATH={tmp_path}", f"{TOGGLE}=2", f"{TOGGLE}=4", *given]
    code, report = doctor("--", *variables, *serve("MODEL"))
    assert (code, report["size"]) == (1, 4)
    assert states(report, "host") == [("problem", None)]
    assert f"(RuntimeError): level {level}" in text(report, "host")


# --- without one ------------------------------------------------------------------------------


def test_without_vllm(tmp_path: Path) -> None:
    python, *_ = without_vllm(tmp_path)
    code, report = doctor(python=python, cwd=tmp_path, **{TOGGLE: "2"})
    assert code == 1
    assert states(report, "host") == [("problem", None)]
    assert "vLLM is not installed" in text(report, "host")
    assert states(report, "toggle") == [("ok", None)]


# --- how it looks -----------------------------------------------------------------------------


def without_vllm(tmp_path: Path) -> list[str]:
    """The command, in a folder with this package but none of the metadata that a build leaves."""
    venv.create(tmp_path, with_pip=False)
    (tmp_path / "oproj_patch").symlink_to(ROOT / "oproj_patch")
    return [str(tmp_path / "bin" / "python"), "-m", "oproj_patch", "doctor"]


def test_text(tmp_path: Path) -> None:
    done = subprocess.run(
        without_vllm(tmp_path), env=environment(), cwd=tmp_path, capture_output=True, timeout=60
    )
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    assert lines[-2] == "oproj_patch would not be active here."
    assert lines[-1] == "Next: mend what is marked problem, and run doctor again."
    assert max(map(len, lines)) <= 100


@needs_vllm
def test_an_entry_point_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("vllm.plugins")  # torch and vLLM read entry points of their own
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **_: [SimpleNamespace(value="other:plugin")]
    )
    state, told = doctor_module._plugin()
    assert state == "problem" and "its entry point leads to other:plugin: pip install" in told


# --- the command line around it ---------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["echo hello", "python server.py", "vllm bench", "A=1 vllm", "x" * 5000, "\0"]
)
def test_commands_it_cannot_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--", *command.split(" ")]) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("oproj-patch: OPROJ018: ")
    assert line.isprintable()
    assert len(line) < 500


def test_the_command_line_is_not_activated(tmp_path: Path) -> None:
    """Not even with the toggle set: neither wrapt nor the host is imported by `plan`."""
    (tmp_path / "wrapt.py").write_text("raise RuntimeError('imported')\n")
    for how in (["-m", "oproj_patch"], ["-um", "oproj_patch"]):
        done = subprocess.run(
            [sys.executable, *how, "plan", "kimi-k2"],
            env=environment(**{TOGGLE: "2", "PYTHONPATH": str(tmp_path)}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_other_programs_are_activated() -> None:
    code = "import os, oproj_patch; print(os.environ['VLLM_PLUGINS'])"
    for how in (["-c", code], ["-c", code, "oproj_patch"]):
        done = subprocess.run(
            [sys.executable, *how],
            env=environment(**{TOGGLE: "2", "VLLM_PLUGINS": "x"}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "x,oproj_patch\n", done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "oproj_patch", "plan", "kimi-k2"],
            env=environment(),
            cwd=ROOT,
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_demo_model_is_what_is_checked() -> None:
    assert demo_model.O_PROJ_IN % 3 != 0  # test_columns_that_cannot_be_divided rests on it
    assert set(CODES) == {f"OPROJ{number:03}" for number in range(1, len(CODES) + 1)}
