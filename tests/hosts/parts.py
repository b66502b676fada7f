"""One start of the ranks of a release runs many parts; each part is a test of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from .conftest import SECONDS
from .wheels import Host

Part = Callable[[Any], None]


@dataclass(frozen=True)
class Ran:
    """By rank and part, the traceback that it ended with or ""; seconds of the start."""

    parts: list[dict[str, str]]
    seconds: float


class Parts:
    """The parts of a module, in the order in which they run.

    The module has a fixture `host`, which returns its parameter, and a fixture `ran`.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = tuple(hosts)
        self._parts: dict[str, tuple[Part, tuple[Host, ...]]] = {}

    def __call__(self, *hosts: Host) -> Callable[[Part], Callable[..., None]]:
        """Return a decorator: run the function in the ranks of `hosts` (default: all).

        In its place it leaves a test of the same name, which fails with the part's traceback.
        """

        def make(part: Part) -> Callable[..., None]:
            self._parts[part.__name__] = part, hosts or self.hosts

            def test(ran: Ran, record_property: Callable[[str, object], None]) -> None:
                record_property(SECONDS, ran.seconds)
                for rank, parts in enumerate(ran.parts):
                    assert not parts[part.__name__], f"rank {rank}: {parts[part.__name__]}"

            test.__name__ = test.__qualname__ = part.__name__
            test.__doc__ = part.__doc__
            on = pytest.mark.parametrize("host", hosts or self.hosts, indirect=True, ids=str)
            decorated: Callable[..., None] = on(test)
            return decorated

        return make

    def run(self, host: Host, here: Any) -> dict[str, str]:
        """In a rank: run the parts of `host`; return "" or a traceback by part.

        A part that fails does not stop the next.
        """
        return {
            name: attempt(lambda part=part: part(here))  # type: ignore[misc]
            for name, (part, hosts) in self._parts.items()
            if host in hosts
        }


def attempt(part: Callable[[], None]) -> str:
    """Return "" or the traceback that `part` ended with."""
    try:
        part()
    except Exception:
        return traceback.format_exc()[-3000:]
    return ""
