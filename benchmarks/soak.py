"""Soak real servers: random clients for a long time, o_proj sharded two-way.

    python benchmarks/soak.py --requests 5000 --minutes 20
    python benchmarks/soak.py --pair --minutes 15

The first is one server of two data-parallel ranks, the second a prefill instance and a decode
instance of two ranks. Clients send prompts of the story, some leave in the middle of an answer, a
third of the time one rank gets no request, and now and then all clients pause. Printed: answers,
lost, different and hung requests, and resident memory over time; with --off the same without the
shim. Exits with 1 when a request is lost, hangs or has other tokens than the engine without the
shim.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from demo import engines
from tests.engines import prefill_decode
from tests.engines.runs import STORY_TELLER, EngineRuns, completions

TIMEOUT = 60.0
"""Seconds after which a request counts as hung."""
LEAVES = 0.1
"""Share of requests whose client leaves before the answer is complete."""
SAMPLES = 10
"""How often memory is measured, at equal times."""
IDLE = ((0, 1), (0, 1), (0,), (0, 1), (0, 1), (1,))
"""Which ranks get requests, period by period: one is idle for a third of the time."""


class OtherTokensError(Exception):
    """An answer is not that of the engine without the shim."""


@dataclass
class Soak:
    """What all clients share.

    servers: that a request goes through; expected: by prompt, the longest answer.
    """

    servers: list[engines.Server]
    expected: dict[str, list[int]]
    requests: int
    seed: int
    end: float
    ranks: tuple[int, ...] = (0, 1)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    running: threading.Event = field(default_factory=threading.Event)

    def next(self) -> int | None:
        with self.lock:
            if self.started >= self.requests or time.monotonic() > self.end:
                return None
            self.started += 1
            return self.started

    def client(self) -> None:
        while (number := self.next()) is not None:
            self.running.wait()
            try:
                outcome = self.one(random.Random(self.seed + number))
            except OtherTokensError as error:
                outcome = self.note("different", number, error)
            except TimeoutError as error:
                outcome = self.note("hung", number, error)
            except (OSError, http.client.HTTPException, LookupError, ValueError) as error:
                outcome = self.note("lost", number, error)
            with self.lock:
                self.ended[outcome] += 1

    def note(self, outcome: str, number: int, error: Exception) -> str:
        with self.lock:
            self.problems.append(f"request {number}: {type(error).__name__}: {error}")
        return outcome

    def one(self, rng: random.Random) -> str:
        prompt, wanted = rng.choice([*self.expected]), rng.randint(1, 24)
        headers = {"X-data-parallel-rank": str(rng.choice(self.ranks))}
        more: dict[str, Any] = {}
        if len(self.servers) > 1:
            body = asked(prompt, 1) | {"kv_transfer_params": {"do_remote_decode": True}}
            with answer(self.servers[0], body, {}) as response:
                more = {"kv_transfer_params": json.load(response)["kv_transfer_params"]}
        body = asked(prompt, wanted) | {"stream": True} | more
        leaves = rng.random()
        if leaves < LEAVES / 2:
            with sent(self.servers[-1], body, headers):
                return "left before the answer"
        with answer(self.servers[-1], body, headers) as response:
            if leaves < LEAVES:
                response.readline()
                return "left during the answer"
            lines = [line for line in response if line.startswith(b"data: {")]
        chunks = [json.loads(line.removeprefix(b"data: "))["choices"][0] for line in lines]
        tokens = [token for chunk in chunks for token in chunk["token_ids"]]
        if tokens != self.expected[prompt][:wanted]:
            raise OtherTokensError(f"{tokens}, wanted {wanted} of {self.expected[prompt]}")
        return "complete"


def asked(prompt: str, tokens: int) -> dict[str, Any]:
    told = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "demo", "prompt": prompt, "max_tokens": tokens} | told


@contextlib.contextmanager
def sent(
    server: engines.Server, body: dict[str, Any], headers: dict[str, str]
) -> Iterator[http.client.HTTPConnection]:
    address = server.base_url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        headers = headers | {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def answer(
    server: engines.Server, body: dict[str, Any], headers: dict[str, str]
) -> Iterator[http.client.HTTPResponse]:
    with sent(server, body, headers) as connection:
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
        yield response


def resident(servers: list[engines.Server]) -> dict[str, float]:
    """Resident MiB by process title, of every process of the servers."""
    told: dict[str, float] = {}
    for place, server in enumerate(servers):
        for pid in engines.session_members(server.process.guard.pid):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                name = title if title.startswith("VLLM::") else f"{Path(title).name} {pid}"
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                told[f"{place} {name}"] = pages * 4096 / (1 << 20)
    return told


@contextlib.contextmanager
def started(options: argparse.Namespace, runs: EngineRuns) -> Iterator[list[engines.Server]]:
    """The servers in the order in which a request goes through them."""
    otp = None if options.off else 2
    lifetime = options.minutes * 60 + 400
    if options.pair:
        with (
            prefill_decode.instance(runs, "kv_consumer", 2, otp, lifetime=lifetime) as decode,
            prefill_decode.instance(runs, "kv_producer", 1, None, lifetime=lifetime) as prefill,
        ):
            yield [prefill, decode]
    else:
        with engines.serve(runs.config(STORY_TELLER, otp=otp), lifetime=lifetime) as server:
            yield [server]


def main() -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0, help="no request begins later")
    parser.add_argument("--pair", action="store_true", help="a prefill and a decode instance")
    parser.add_argument("--off", action="store_true", help="without the shim")
    options = parser.parse_args()
    runs = EngineRuns(lambda name: Path(tempfile.mkdtemp(prefix=name)))
    told = sorted(completions(runs.off(STORY_TELLER)), key=lambda told: len(told.token_ids))
    expected = {completion.prompt: completion.token_ids for completion in told}
    with started(options, runs) as servers:
        begun, seconds = time.monotonic(), options.minutes * 60
        seed = options.seed * 1_000_003
        soak = Soak(servers, expected, options.requests, seed, begun + seconds)
        soak.running.set()
        threads = [threading.Thread(target=soak.client) for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        samples: list[tuple[int, dict[str, float]]] = []
        rng = random.Random(options.seed)
        spent: Counter[str] = Counter()
        period = 0
        while any(thread.is_alive() for thread in threads):
            soak.ranks = IDLE[period % len(IDLE)]
            before = time.monotonic()
            time.sleep(rng.uniform(4, 6))
            spent[f"ranks {soak.ranks}"] += round(time.monotonic() - before)
            done = sum(soak.ended.values())
            share = max(done / options.requests, (time.monotonic() - begun) / seconds)
            if share >= len(samples) / SAMPLES:
                samples.append((done, resident(servers)))
                print(f"{time.monotonic() - begun:.0f} s: {dict(soak.ended)}", flush=True)
            if period % 3 == 2:
                soak.running.clear()  # a pause: running requests end, then both ranks idle
                time.sleep(rng.uniform(0.5, 2))
                soak.running.set()
            period += 1
        for thread in threads:
            thread.join(TIMEOUT)
        taken = time.monotonic() - begun
        time.sleep(2)
        samples.append((sum(soak.ended.values()), resident(servers)))
        print(f"{sum(soak.ended.values())} requests in {taken:.0f} s, of which {dict(spent)}")
        for outcome, count in sorted(soak.ended.items()):
            print(f"  {outcome}: {count}")
        for problem in soak.problems[:10]:
            print(f"  {problem}")
        print(f"resident memory, MiB, after {[done for done, _ in samples]} requests:")
        for name in sorted(samples[-1][1]):
            print(f"  {name}: " + " ".join(f"{sample.get(name, 0):.0f}" for _, sample in samples))
        for worker in servers[-1].workers():
            print(f"  rank {worker['dp_rank']}: {worker['status']['exchanges']} exchanges")
        log = servers[-1].log()
    if failed := sum(soak.ended[outcome] for outcome in ("lost", "different", "hung")):
        print(log[-6000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
