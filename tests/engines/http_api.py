"""Greedy completions of a server, asked of a data-parallel rank."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from demo.engines import Server


def post(server: Server, body: dict[str, Any], rank: int, timeout: float = 120.0) -> Any:
    """Ask `rank` for a completion; return the open response. Raises TimeoutError."""
    greedy = {"model": "demo", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    call = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        data=json.dumps(greedy | body).encode(),
        headers={"Content-Type": "application/json", "X-data-parallel-rank": str(rank)},
    )
    return urllib.request.urlopen(call, timeout=timeout)


def tokens(server: Server, body: dict[str, Any], rank: int) -> list[int]:
    """Return the tokens of one completion."""
    with post(server, body, rank) as response:
        found: list[int] = json.load(response)["choices"][0]["token_ids"]
    return found
