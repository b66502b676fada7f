"""Soak a real server: two data-parallel ranks, o_proj sharded two-way, random clients.

    python benchmarks/soak.py --requests 5000

Clients send prompts of random length, some leave in the middle of an answer, and now and then
all pause, so that ranks idle. Printed: answers, lost and hung requests, and resident memory over
time; with --off the same without the shim. Exits with 1 when a request is lost or hangs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from demo import engines
from demo import model as demo_model

TIMEOUT = 60.0
"""Seconds after which a request counts as hung."""
LEAVES = 0.1
"""Share of requests whose client leaves before the answer is complete."""
SAMPLES = 10
"""How often memory is measured, at equal numbers of requests."""


@dataclass
class Soak:
    """What all clients share."""

    port: int
    requests: int
    seed: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    running: threading.Event = field(default_factory=threading.Event)

    def next(self) -> int | None:
        with self.lock:
            if self.started >= self.requests:
                return None
            self.started += 1
            return self.started

    def client(self) -> None:
        while (number := self.next()) is not None:
            self.running.wait()
            try:
                outcome = self.one(random.Random(self.seed + number))
            except TimeoutError:
                outcome = "hung"
            except (OSError, http.client.HTTPException, ValueError) as error:
                outcome = "lost"
                with self.lock:
                    self.problems.append(f"request {number}: {type(error).__name__}: {error}")
            with self.lock:
                self.ended[outcome] += 1

    def one(self, rng: random.Random) -> str:
        wanted = rng.randint(1, 24)
        start = rng.randrange(len(demo_model.STORY) - 200)
        body = {
            "model": "demo",
            "prompt": demo_model.STORY[start : start + rng.randint(1, 180)],
            "max_tokens": wanted,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            if rng.random() < LEAVES / 2:
                return "left before the answer"
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
            if rng.random() < LEAVES / 2:
                response.readline()
                return "left during the answer"
            lines = [line for line in response if line.startswith(b"data: {")]
            usage = json.loads(lines[-1].removeprefix(b"data: "))["usage"]
            if usage["completion_tokens"] != wanted:
                raise ValueError(f"{usage['completion_tokens']} tokens, wanted {wanted}")
            return "complete"
        finally:
            connection.close()


def resident(session: int) -> dict[str, float]:
    """Resident MiB by process title, of every process of a session."""
    told: dict[str, float] = {}
    for pid in engines.session_members(session):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        name = title if title.startswith("VLLM::") else f"{Path(title).name} {pid}"
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        told[name] = pages * 4096 / (1 << 20)
    return told


def main() -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0, help="end after this time")
    parser.add_argument("--off", action="store_true", help="without the shim")
    options = parser.parse_args()
    env = {} if options.off else {"OPROJ_TENSOR_PARALLEL_SIZE": "2"}
    config = engines.EngineConfig(demo_model.ensure("dense", trained=False), env=env)
    lifetime = options.minutes * 60 + 300
    with engines.serve(config, lifetime=lifetime) as server:
        session = server.process.guard.pid
        soak = Soak(
            int(server.base_url.rpartition(":")[2]), options.requests, options.seed * 1_000_003
        )
        soak.running.set()
        threads = [threading.Thread(target=soak.client) for _ in range(options.clients)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        samples: list[dict[str, float]] = []
        rng = random.Random(options.seed)
        pauses = 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(rng.uniform(3, 12))
            if time.monotonic() - begun > options.minutes * 60:
                with soak.lock:
                    soak.requests = soak.started
            if sum(soak.ended.values()) >= (len(samples) + 1) * options.requests / SAMPLES:
                samples.append(resident(session))
            soak.running.clear()  # a pause: running requests end, then both ranks idle
            time.sleep(rng.uniform(0.5, 4))
            pauses += 1
            soak.running.set()
        for thread in threads:
            thread.join(TIMEOUT)
        seconds = time.monotonic() - begun
        time.sleep(2)
        samples.append(resident(session))
        print(f"{sum(soak.ended.values())} requests in {seconds:.0f} s with {pauses} pauses")
        for outcome, count in sorted(soak.ended.items()):
            print(f"  {outcome}: {count}")
        for problem in soak.problems[:10]:
            print(f"  {problem}")
        print(f"resident memory, MiB, every {options.requests // SAMPLES} requests, at the end:")
        for name in sorted(samples[-1]):
            told = " ".join(f"{sample.get(name, 0):.0f}" for sample in samples)
            print(f"  {name}: {told}")
        for worker in server.workers():
            print(f"  rank {worker['dp_rank']}: {worker['status']['exchanges']} exchanges")
    return 1 if soak.ended["lost"] or soak.ended["hung"] else 0


if __name__ == "__main__":
    sys.exit(main())
