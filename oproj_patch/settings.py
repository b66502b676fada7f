"""Environment variables and `--additional-config` -> `Settings`. No torch, no vLLM.

The environment variable `OPROJ_TENSOR_PARALLEL_SIZE` is the toggle: while it is off, nothing else
is read. While it is on, every other setting is also read from
`--additional-config '{"oproj_patch": {...}}'`, because that travels with the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .errors import OprojError, OprojValueError

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
DEBUG = "OPROJ_PATCH_DEBUG"
SKIP_VERSION_CHECK = "OPROJ_PATCH_SKIP_VERSION_CHECK"
HANDSHAKE_SECONDS = "OPROJ_PATCH_HANDSHAKE_SECONDS"
WEIGHT_GATHER_ROWS = "OPROJ_WEIGHT_GATHER_ROWS"
VARIABLES = (TOGGLE, DEBUG, SKIP_VERSION_CHECK, HANDSHAKE_SECONDS, WEIGHT_GATHER_ROWS)
"""Every variable the package reads; launchers must carry them to the workers."""

CONFIG_KEY = "oproj_patch"
"""Our key in vLLM's `additional_config`."""


@dataclass(frozen=True)
class Settings:
    """What the user asks for.

    size: otp group size; 0 when off, and 0 with `auto` until the host's configuration is read.
    auto: take the size from the host's configuration.
    debug: compare (layer, step, rows) of all ranks before each step.
    skip_version_check: accept an untested release of the host.
    handshake_seconds: deadline of the agreement between ranks, in seconds.
    weight_gather_rows: rows on every rank from which weights are gathered instead of rows
        dispatched; 0 never; None where a gather moves fewer bytes.
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

    def shared(self) -> dict[str, str]:
        """Return what must be equal on all ranks, by variable, as text."""
        return {
            TOGGLE: "auto" if self.auto and self.size == 0 else str(self.size),
            DEBUG: str(int(self.debug)),
            WEIGHT_GATHER_ROWS: str(self.weight_gather_rows),
        }


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0 < seconds <= 86400:
        raise ValueError
    return seconds


def _rows(value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise ValueError
    return int(value)


class _Option(NamedTuple):
    field: str
    variable: str
    parse: Callable[[str], Any]
    accepted: str


_flag = {"0": False, "1": True}.__getitem__
_OPTIONS = (
    _Option("debug", DEBUG, _flag, "are 0 and 1: set one of these"),
    _Option("skip_version_check", SKIP_VERSION_CHECK, _flag, "are 0 and 1: set one of these"),
    _Option("handshake_seconds", HANDSHAKE_SECONDS, _seconds,
            "is a number of seconds above 0 and up to 86400: set one"),
    _Option("weight_gather_rows", WEIGHT_GATHER_ROWS, _rows,
            "are 0 (never gather weights) and a number of rows: set one"),
)  # fmt: skip


def parse_size(text: str) -> tuple[int, bool]:
    """Parse the toggle's text into (size, auto); size is 0 when off.

    Raises OprojValueError (a ValueError) for anything but an integer >= 0 or `auto`.
    """
    value = text.strip()
    if value in ("auto", ""):
        return 0, value == "auto"
    # int() alone would take "1_0", "+4" and non-ASCII digits.
    if not (value.isascii() and value.isdigit()) or len(value) > 6:
        raise OprojValueError(
            "OPROJ001",
            f"{TOGGLE} is {text!r}; accepted are 0 or 1 (off), an integer group size of 2 or "
            "more, or auto: set one of these or unset the variable.",
        )
    return (int(value) if int(value) > 1 else 0), False


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Read settings from `environ` (default: this process's).

    Raises OprojValueError naming the variable, its value and what is accepted.
    """
    env = os.environ if environ is None else environ
    size, auto = parse_size(env.get(TOGGLE, ""))
    found = {
        option.field: _parsed(option, option.variable, value)
        for option in _OPTIONS
        if (value := env.get(option.variable, "").strip())
    }
    return Settings(size=size, auto=auto, **found)


def merge(
    settings: Settings, additional_config: Any, environ: Mapping[str, str] | None = None
) -> Settings:
    """Add to `settings` what vLLM's `additional_config` holds under `oproj_patch`.

    additional_config: a dictionary, or what a release uses instead (ignored then).
    environ: where `settings` were read from (default: this process's environment).
    Raises OprojError (OPROJ002) for an unknown key, a value that is not understood, and a value
    that differs from the variable's.
    """
    ours = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    if ours is None:
        return settings
    env = os.environ if environ is None else environ
    where = f"additional_config.{CONFIG_KEY}"
    if not isinstance(ours, dict):
        raise OprojError(
            "OPROJ002",
            f'{where} is {ours!r}; accepted is an object such as {{"size": 8}}: write one or '
            "remove it.",
        )
    options = {option.field: option for option in _OPTIONS}
    for key, value in ours.items():
        name = f"{where}.{key}"
        if key == "size":
            settings = _merge_size(settings, name, value)
            continue
        option = options.get(key)
        if option is None:
            raise OprojError(
                "OPROJ002",
                f"{name} is not known; accepted are size, {', '.join(options)}: correct the key "
                "or remove it.",
            )
        text = str(int(value)) if isinstance(value, bool) else value
        if not isinstance(text, (str, int, float)):
            text = ""
        parsed = _parsed(option, name, str(text), shown=value)
        if env.get(option.variable, "").strip() and parsed != getattr(settings, key):
            raise OprojError(
                "OPROJ002",
                f"{option.variable} is {env[option.variable]!r} and {name} is {value!r}; "
                "accepted are equal values: remove one of the two.",
            )
        settings = replace(settings, **{key: parsed})
    return settings


def _merge_size(settings: Settings, name: str, value: Any) -> Settings:
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise OprojError(
            "OPROJ002",
            f"{name} is {value!r}; accepted is an integer of 2 or more: correct it or remove it.",
        )
    if settings.size not in (0, value):
        raise OprojError(
            "OPROJ002",
            f"{TOGGLE} is {settings.size} and {name} is {value!r}; accepted are equal values, or "
            f"{TOGGLE}=auto: remove one of the two.",
        )
    return replace(settings, size=value)


def _parsed(option: _Option, name: str, text: str, shown: Any = None) -> Any:
    try:
        return option.parse(text)
    except (ValueError, KeyError):
        found = text if shown is None else shown
        told = f"{name} is {found!r}; accepted {option.accepted} or unset it."
        raise OprojValueError("OPROJ002", told) from None
