"""Which seams of vllm-ascend are installed: by their symbols, where the version is not trusted."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from oproj_patch.hosts import vllm_ascend
from oproj_patch.hosts.seam import Seam
from oproj_patch.releases import ASCEND_RELEASES, in_range

pytest.importorskip("torch")


def own_seams(version: str, vllm: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Seam]:
    """Return the seams in vllm-ascend, by symbol, outside of its torchair mode."""
    monkeypatch.setattr(vllm_ascend.VllmAscend, "traceable", lambda _: False)
    ops = SimpleNamespace(register_dummy_fusion_op=lambda: None)  # what 0.9.1 is asked for
    monkeypatch.setitem(sys.modules, "vllm_ascend", SimpleNamespace(ops=ops))
    host = vllm_ascend.VllmAscend({"oproj_patch": "", "vllm": vllm, "vllm-ascend": version})
    return {s.symbol: s for s in host.seams(None) if s.module.startswith("vllm_ascend")}


@pytest.mark.parametrize("release", ASCEND_RELEASES)
def test_of_a_tested_release(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = own_seams(release, ASCEND_RELEASES[release], monkeypatch)
    assert all(seam.required for seam in found.values())
    assert all(in_range(release, seam.since, seam.until) for seam in found.values())


@pytest.mark.parametrize(
    "version", ["0.9.0rc2", "0.8.5", "0.10.0rc1", "0.12.0", "0.27.0rc1", "0.1.dev5+g01", "unknown"]
)
def test_of_an_untested_version_all_that_are_there(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code may be that of any release; the seam that an idle rank needs must be there."""
    found = own_seams(version, "0.9.1", monkeypatch)
    every = {
        seam.symbol
        for release, vllm in ASCEND_RELEASES.items()
        for seam in own_seams(release, vllm, monkeypatch).values()
    }
    assert set(found) == every
    assert found["vllm_ascend.attention.mla_v1.AscendMLAImpl.forward"].required
