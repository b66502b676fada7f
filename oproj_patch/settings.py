"""Environment variables -> `Settings`. No torch, no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import OprojValueError

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
DEBUG = "OPROJ_PATCH_DEBUG"
SKIP_VERSION_CHECK = "OPROJ_PATCH_SKIP_VERSION_CHECK"
HANDSHAKE_SECONDS = "OPROJ_PATCH_HANDSHAKE_SECONDS"
WEIGHT_GATHER_ROWS = "OPROJ_WEIGHT_GATHER_ROWS"

VARIABLES = (TOGGLE, DEBUG, SKIP_VERSION_CHECK, HANDSHAKE_SECONDS, WEIGHT_GATHER_ROWS)
"""Every variable the package reads; launchers must carry them to the workers."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    size: otp group size; 0 when off, and 0 with `auto` until the host's
        configuration has been read.
    auto: take the size from the host's own configuration.
    debug: compare (layer, step, rows) before each exchange.
    skip_version_check: accept an untested release of the host.
    handshake_seconds: deadline of the hand-shake, in seconds.
    weight_gather_rows: rows on every rank from which weights are gathered instead of
        activations exchanged; 0 never; None where that moves fewer bytes.
    """

    size: int = 0
    auto: bool = False
    debug: bool = False
    skip_version_check: bool = False
    handshake_seconds: float = 60.0
    weight_gather_rows: int | None = None

    @property
    def enabled(self) -> bool:
        return self.auto or self.size > 1


def parse_size(text: str) -> tuple[int, bool]:
    """The toggle's text -> (size, auto); size is 0 when off.

    Raises OprojValueError (a ValueError) for anything but an integer >= 0 or `auto`.
    """
    value = text.strip()
    if value == "auto":
        return 0, True
    if value == "":
        return 0, False
    # int() alone would take "1_0", "+4" and non-ASCII digits.
    if not (value.isascii() and value.isdigit()) or len(value) > 6:
        raise OprojValueError(
            "OPROJ001",
            f"{TOGGLE} is {text!r}; accepted are 0 or 1 (off), an integer group size of 2 or "
            "more, or auto: set one of these or unset the variable.",
        )
    size = int(value)
    return (size, False) if size > 1 else (0, False)


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip()
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise OprojValueError(
        "OPROJ002", f"{name} is {value!r}; accepted are 0 and 1: set one of these or unset it."
    )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    value = environ.get(name, "").strip()
    if not value:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise OprojValueError(
            "OPROJ002",
            f"{name} is {value!r}; accepted is a number of seconds above 0 and up to 86400: "
            "set one or unset it.",
        )
    return seconds


def _rows(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise OprojValueError(
            "OPROJ002",
            f"{name} is {value!r}; accepted are 0 (never gather weights) and a number of rows: "
            "set one or unset it.",
        )
    return int(value)


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from `environ` (default: this process's).

    Raises OprojValueError naming the variable, its value and what is accepted.
    """
    env = os.environ if environ is None else environ
    size, auto = parse_size(env.get(TOGGLE, ""))
    return Settings(
        size=size,
        auto=auto,
        debug=_flag(env, DEBUG),
        skip_version_check=_flag(env, SKIP_VERSION_CHECK),
        handshake_seconds=_seconds(env, HANDSHAKE_SECONDS, 60.0),
        weight_gather_rows=_rows(env, WEIGHT_GATHER_ROWS),
    )
