"""Tokens per second of a real vLLM server without and with the shim: DP=2, group size 2.

    python benchmarks/serve.py [--json] [--compiled]

A server with DeepSeek-V3's architecture, random weights and an o_proj of 4096 -> 1024 in every
layer answers streamed requests: a decode-heavy load (short prompts, long answers) and a
prefill-heavy one. Each server answers every load several times; the first answer is thrown away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Load:
    """Requests sent at once, tokens of each prompt and of each answer."""

    requests: int
    prompt_tokens: int
    answer_tokens: int


LOADS = {"decode-heavy": Load(16, 16, 96), "prefill-heavy": Load(16, 448, 4)}
ROUNDS = 4
SIZES = {
    "hidden_size": 1024,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 4,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Answer:
    """Seconds after which the tokens of one answer arrived."""

    arrivals: list[float]

    @property
    def first(self) -> float:
        return self.arrivals[0]

    @property
    def each(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, len(self.arrivals) - 1)


def ask(base_url: str, load: Load, number: int) -> Answer:
    """Stream one answer; every chunk is one token."""
    body = {
        "model": "demo",
        "prompt": [(number * 31 + place * 7) % 256 for place in range(load.prompt_tokens)],
        "max_tokens": load.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{base_url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    arrivals = []
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                arrivals.append(time.perf_counter() - start)
    return Answer(arrivals)


def answer_all(base_url: str, load: Load) -> dict[str, float]:
    """Send a load; tokens per second over all, medians of the other two, in milliseconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(load.requests) as pool:
        answers = list(pool.map(lambda n: ask(base_url, load, n), range(load.requests)))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": load.requests * (load.prompt_tokens + load.answer_tokens) / seconds,
        "output_tokens_per_second": load.requests * load.answer_tokens / seconds,
        "time_to_first_token_ms": statistics.median(a.first for a in answers) * 1e3,
        "time_per_output_token_ms": statistics.median(a.each for a in answers) * 1e3,
    }


def serve(model: Path, otp: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Start one server and answer all loads; medians over the rounds."""
    from demo import engines

    config = engines.EngineConfig(
        model,
        dp=2,
        compiled=compiled,
        env={"OPROJ_TENSOR_PARALLEL_SIZE": str(otp)} if otp else {},
        options={"load_format": "dummy", "max_model_len": 512},
    )
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
    with engines.serve(config) as server:
        for _ in range(ROUNDS):
            for name, load in LOADS.items():
                measured[name].append(answer_all(server.base_url, load))
        for worker in server.workers():
            exchanges = (worker.get("status") or {}).get("exchanges", 0)
            assert bool(exchanges) == bool(otp), worker
    return {
        name: {key: statistics.median(r[key] for r in rounds[1:]) for key in rounds[0]}
        for name, rounds in measured.items()
    }


def checkpoint(directory: Path) -> Path:
    """The demo's model directory with larger layers and no weights."""
    from demo import model as demo_model

    source = demo_model.ensure("dense", trained=False)
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.startswith("model"):
            (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **SIZES}))
    return directory


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| load | | off | on | on / off |", "| --- | --- | --- | --- | --- |"]
    for name in LOADS:
        off, on = results["off"][name], results["on"][name]
        for key in off:
            what = key.replace("_ms", ", ms").replace("_", " ")
            lines.append(
                f"| {name} | {what} | {off[key]:.1f} | {on[key]:.1f} | {on[key] / off[key]:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tokens per second of a server, off and on.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compiled", action="store_true", help="vLLM's torch.compile, not eager")
    args = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = checkpoint(Path(scratch))
        for label, otp in (("off", 0), ("on", 2)):
            results[label] = serve(model, otp, args.compiled)
            print(f"{label}: done", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1) if args.json else table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
