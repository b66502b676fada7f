"""Instances of a prefill/decode pair over NixlConnector, and what runs between them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace

from demo.engines import Server, free_port, serve

from ..hosts import wheels
from .runs import STORY_TELLER, EngineRuns
from .serving import Request, post

LEASE = 600
"""Seconds that a prefilled cache is kept for who asks for it: more than a test takes."""
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")
ON_THIS_MACHINE = {
    "UCX_TLS": "tcp,sm,self",
    "UCX_NET_DEVICES": "lo",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


@contextlib.contextmanager
def instance(
    runs: EngineRuns,
    role: str,
    dp: int,
    otp: int | None,
    second: bool = False,
    lifetime: float = 900.0,
) -> Iterator[Server]:
    """A server in the `role` of NixlConnector, with one thread of NIXL, on a model runner.

    lifetime: seconds after which it ends in any case.
    """
    config = runs.config(
        STORY_TELLER,
        otp=otp,
        dp=dp,
        second=second,
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"num_threads": 1, "kv_lease_duration": LEASE},
        },
    )
    env = {**config.env, **ON_THIS_MACHINE, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(run=dp))}
    path = (*config.python_path, *wheels.extras(*NIXL))
    config = replace(config, env=env, python_path=path)
    config = replace(config, extension="tests.engines.disaggregation.Probe")
    with serve(config, lifetime=lifetime) as server:
        yield server


def prefill_of(prefill: Server, dp: int, request: Request) -> Request:
    """Let the instance of `dp` ranks compute the prompt; return the request for the other one."""
    more = {"kv_transfer_params": {"do_remote_decode": True}}
    with post(prefill, Request(request.prompt, 1, (request.rank or 0) % dp, more)) as response:
        params = json.load(response)["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    return replace(request, more={**request.more, "kv_transfer_params": params})


def at_rest(server: Server) -> list[dict[str, int]]:
    """Wait until no rank runs steps any more; return each rank's counts."""
    counts: list[dict[str, int]] = []
    end = time.monotonic() + 60
    while time.monotonic() < end:
        before = counts
        counts = [w["counts"] | {"exchanges": w["status"]["exchanges"]} for w in server.workers()]
        if counts == before:
            return counts
        time.sleep(0.5)
    raise AssertionError(f"the ranks go on: {counts}")
