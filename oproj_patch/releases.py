"""The host releases this package is tested with, and how release numbers compare.

This is the only list of releases: the version gate, `docs/releases.md` and tox read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

VLLM_RELEASES: tuple[str, ...] = (
    "0.9.1", "0.9.2", "0.10.0", "0.10.1.1", "0.10.2", "0.11.0", "0.11.2", "0.12.0", "0.13.0",
    "0.14.1", "0.15.1", "0.16.0", "0.17.1", "0.18.0", "0.19.1", "0.20.2", "0.21.0", "0.22.1",
    "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0",
    "0.32.0", "0.33.0",
)  # fmt: skip
"""Tested vLLM releases, oldest first."""

ASCEND_RELEASES: Mapping[str, str] = {
    "0.9.1": "0.9.1",  # its wheel requires torch_npu 2.5.1.post1
    "0.11.0": "0.11.0",  # 2.7.1
    "0.13.0": "0.13.0",  # 2.8.0.post2
    "0.18.0": "0.18.0",  # 2.9.0
    "0.23.0": "0.23.0",  # 2.10.0.post4
    "0.23.0.post1": "0.23.0",
    "0.26.0rc1": "0.26.0",
    "0.30.0rc2": "0.30.0",
}
"""Tested vllm-ascend releases, oldest first, each with the vLLM that it patches."""

_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)(?=$|[^\d])")


def parse(version: str) -> tuple[int, ...]:
    """Return the release numbers of `version`: `0.11.0rc1`, `0.32.0+cpu`, `0.11.0.post2`.

    Suffixes (rc, dev, post, local) and trailing zeros are dropped: `0.11`, `0.11.0` and
    `0.11.0rc1` are one release. Raises ValueError when `version` begins with no release number.
    """
    found = _NUMBERS.match(version.strip())
    if found is None:
        raise ValueError(f"version {version!r} does not begin with a release number")
    return tuple(int(number) for number in re.sub(r"(\.0+)+$", "", found[1]).split("."))


def in_range(version: str, first: str, last: str = "") -> bool:
    """Tell whether `first <= version <= last`; empty: no such end. `dev` counts as newest."""
    try:
        numbers = parse(version)
    except ValueError:
        return not last
    return parse(first or "0") <= numbers and (not last or numbers <= parse(last))


def untested(vllm: str, ascend: str | None = None) -> str:
    """Return what is untested about this pair, as `requested X, found Y`; empty if tested.

    Any vLLM between the oldest and the newest tested release is in range; of vllm-ascend only
    the tested releases are, each with its own vLLM.
    """
    first, last = VLLM_RELEASES[0], VLLM_RELEASES[-1]
    if ascend is None:
        tested = in_range(vllm, first, last)
        return "" if tested else f"requested vllm {first} to {last}, found {vllm}"
    for release, partner in ASCEND_RELEASES.items():
        if in_range(ascend, release, release):
            told = f"requested vllm {partner} for vllm-ascend {ascend}, found vllm {vllm}"
            return "" if in_range(vllm, partner, partner) else told
    return f"requested vllm-ascend {', '.join(ASCEND_RELEASES)}, found {ascend}"
