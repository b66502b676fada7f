"""Environment variables and `--additional-config` -> `Settings`. No torch, no vLLM.

`OPROJ_TENSOR_PARALLEL_SIZE` is the toggle. While it is on, every setting is also read from
`--additional-config '{"oproj_patch": {...}}'`, because that travels with the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .errors import OprojError, OprojValueError

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
DEBUG = "OPROJ_PATCH_DEBUG"
SKIP_VERSION_CHECK = "OPROJ_PATCH_SKIP_VERSION_CHECK"
HANDSHAKE_SECONDS = "OPROJ_PATCH_HANDSHAKE_SECONDS"
WEIGHT_GATHER_ROWS = "OPROJ_WEIGHT_GATHER_ROWS"
GRID = "OPROJ_GRID"
WIRE = "OPROJ_WIRE"
VARIABLES = (TOGGLE, DEBUG, SKIP_VERSION_CHECK, HANDSHAKE_SECONDS, WEIGHT_GATHER_ROWS, GRID, WIRE)
"""Every variable the package reads; launchers must carry them to the workers."""
CONFIG_KEY = "oproj_patch"  # in vLLM's `additional_config`


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
    grid: `AxB`, either number may be N; auto: the one with the fewest bytes.
    wire: auto: rows travel in 8 bits where the layer's own quantization can move to the sender;
        int8, fp8: always in 8 bits; off: always in the model's type.
    """

    size: int = 0
    auto: bool = False
    debug: bool = False
    skip_version_check: bool = False
    handshake_seconds: float = 60.0
    weight_gather_rows: int | None = None
    grid: str = "auto"
    wire: str = "auto"

    @property
    def enabled(self) -> bool:
        return self.auto or self.size > 1

    def shared(self) -> dict[str, str]:
        """Return what must be equal on all ranks, by variable, as text."""
        return {
            TOGGLE: "auto" if self.auto and self.size == 0 else str(self.size),
            DEBUG: str(int(self.debug)),
            WEIGHT_GATHER_ROWS: str(self.weight_gather_rows),
            GRID: self.grid,
            WIRE: self.wire,
        }


class _Option(NamedTuple):
    """One setting. `parse` takes a variable's text or a value of JSON, and raises on others."""

    field: str
    variable: str
    parse: Callable[[Any], Any]
    accepted: str


def _size(value: Any) -> int:
    if type(value) is not int or value < 2:
        raise ValueError
    return value


def _seconds(value: Any) -> float:
    seconds = float(str(value))
    if not 0 < seconds <= 86400:
        raise ValueError
    return seconds


def _rows(value: Any) -> int:
    if not _DIGITS.fullmatch(str(value)):
        raise ValueError
    return int(value)


def _grid(value: Any) -> str:
    if value != "auto" and not _GRID.fullmatch(value):
        raise ValueError
    return str(value)


def _wire(value: Any) -> str:
    if value not in ("auto", "off", "int8", "fp8"):
        raise ValueError
    return str(value)


def _flag(value: Any) -> bool:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return {"0": False, "1": True}[text]


# int() alone would take "1_0", "+4" and digits that are not ASCII.
_DIGITS = re.compile("[0-9]{1,9}")
_GRID = re.compile("([1-9][0-9]{0,5}|N)x([1-9][0-9]{0,5}|N)")
# The toggle itself is read by `parse_size`, because it also knows off and `auto`.
_SIZE = _Option("size", TOGGLE, _size, "is an integer of 2 or more: set one")
_OPTIONS = (
    _Option("debug", DEBUG, _flag, "are 0 and 1: set one of these"),
    _Option("skip_version_check", SKIP_VERSION_CHECK, _flag, "are 0 and 1: set one of these"),
    _Option("handshake_seconds", HANDSHAKE_SECONDS, _seconds,
            "is a number of seconds above 0 and up to 86400: set one"),
    _Option("weight_gather_rows", WEIGHT_GATHER_ROWS, _rows,
            "are 0 (never gather weights) and a number of rows: set one"),
    _Option("grid", GRID, _grid, "are auto, Nx1 and two numbers such as 4x2: set one"),
    _Option("wire", WIRE, _wire, "are auto, off, int8 and fp8: set one"),
)  # fmt: skip


def parse_size(text: str) -> tuple[int, bool]:
    """Parse the toggle's text into (size, auto); size is 0 when off.

    Raises OprojValueError (a ValueError) for anything but an integer >= 0 or `auto`.
    """
    value = text.strip()
    if value in ("auto", ""):
        return 0, value == "auto"
    if not _DIGITS.fullmatch(value) or len(value) > 6:
        raise OprojValueError(
            "OPROJ001",
            f"{TOGGLE} is {text!r}; accepted are 0 or 1 (off), an integer group size of 2 or "
            "more, or auto: set one of these or unset the variable.",
        )
    return (int(value) if int(value) > 1 else 0), False


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read settings from `environ` (default: this process's).

    Raises OprojValueError naming the variable, its value and what is accepted.
    """
    size, auto = parse_size(environ.get(TOGGLE, ""))
    found = {
        option.field: _parsed(option, option.variable, value)
        for option in _OPTIONS
        if (value := environ.get(option.variable, "").strip())
    }
    return Settings(size=size, auto=auto, **found)


def merge(
    settings: Settings, additional_config: Any, environ: Mapping[str, str] = os.environ
) -> Settings:
    """Add to `settings` what vLLM's `additional_config` holds under `oproj_patch`.

    additional_config: a dictionary, or what a release uses instead (ignored then).
    environ: where `settings` were read from (default: this process's environment).
    Raises OprojError for an unknown key, and a value that is malformed or not the variable's.
    """
    ours = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    if ours is None:
        return settings
    where = f"additional_config.{CONFIG_KEY}"
    if not isinstance(ours, dict):
        told = f'{where} is {ours!r}; accepted is an object such as {{"size": 8}}'
        raise OprojError("OPROJ002", f"{told}: write one or remove it.")
    options = {option.field: option for option in (_SIZE, *_OPTIONS)}
    for key, value in ours.items():
        name = f"{where}.{key}"
        if key not in options:
            told = f"{name} is not known; accepted are {', '.join(options)}"
            raise OprojError("OPROJ002", f"{told}: correct the key or remove it.")
        parsed = _parsed(options[key], name, value)
        variable = options[key].variable
        # `auto` sets the toggle, but no size.
        given = settings.size if key == "size" else environ.get(variable, "").strip()
        if given and parsed != getattr(settings, key):
            told = f"{variable} is {given!r} and {name} is {value!r}; accepted are equal values"
            raise OprojError("OPROJ002", f"{told}: correct or remove {name}.")
        settings = replace(settings, **{key: parsed})
    return settings


def _parsed(option: _Option, name: str, value: Any) -> Any:
    try:
        return option.parse(value)
    except (ValueError, KeyError, TypeError):
        told = f"{name} is {value!r}; accepted {option.accepted} or unset it."
        raise OprojValueError("OPROJ002", told) from None
