"""Which seams a release has, and how many bytes its rows take, as a host tells without a model."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from oproj_patch.hosts import vllm, vllm_ascend
from oproj_patch.hosts.seam import Seam
from oproj_patch.releases import ASCEND_RELEASES, VLLM_RELEASES, in_range

pytest.importorskip("torch")


def own_seams(version: str, vllm: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Seam]:
    """Return the seams in vllm-ascend, by symbol, outside of its torchair mode."""
    monkeypatch.setattr(vllm_ascend.VllmAscend, "traceable", lambda _: False)
    ops = SimpleNamespace(register_dummy_fusion_op=lambda: None)  # what 0.9.1 is asked for
    monkeypatch.setitem(sys.modules, "vllm_ascend", SimpleNamespace(ops=ops))
    host = vllm_ascend.VllmAscend({"oproj_patch": "", "vllm": vllm, "vllm-ascend": version})
    return {s.symbol: s for s in host.seams(None) if s.module.startswith("vllm_ascend")}


@pytest.mark.parametrize("release", VLLM_RELEASES)
def test_of_a_tested_release_of_vllm(release: str) -> None:
    config = SimpleNamespace(lora_config=object())
    found = vllm.Vllm({"vllm": release}).seams(config)
    assert all(in_range(release, seam.since, seam.until) for seam in found)
    [manager] = [seam.module for seam in found if seam.path == "from_layer"]
    assert manager == f"vllm.lora.{'model_manager' if in_range(release, '0.13.0') else 'models'}"
    warmed = {seam.path for seam in found if seam.lazy}
    since = {"deep_gemm_warmup": "0.10.1.1", "b12x_warmup": "0.28.0"}
    assert warmed == {path for path, first in since.items() if in_range(release, first)}


def test_of_an_untested_version_of_vllm_all_that_are_there() -> None:
    found = vllm.Vllm({"vllm": "0.8.0"}).seams(SimpleNamespace(lora_config=object()))
    others = [seam for seam in found if not in_range("0.8.0", seam.since, seam.until)]
    paths = ["deep_gemm_warmup", "b12x_warmup", "from_layer"]
    assert [seam.path for seam in others] == paths and not any(seam.required for seam in others)


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ({"model.layers.0.self_attn.o_proj": "W8A8"}, 1),
        ({"model.layers.0.self_attn.o_proj": "W8A8_DYNAMIC"}, None),
        ({"model.layers.0.self_attn.o_proj": "FLOAT"}, None),
        ({f"model.layers.{i}.self_attn.o_proj": "W8A8" if i < 2 else "FLOAT" for i in range(3)}, 1),
        ({f"model.layers.{i}.self_attn.o_proj": "FLOAT" if i else "W8A8" for i in range(3)}, None),
        ({"layers.0.attn.wo_b": "W8A8", "layers.0.attn.wo_a": "FLOAT"}, 1),
        ({"model.layers.0.attn.o_proj": "W8A8", "visual.layers.0.attn.o_proj": "FLOAT"}, 1),
        ({"model.layers.0.mlp.down_proj": "W8A8"}, None),
    ],
)
def test_bytes_on_the_way_out_of_most_layers(
    kinds: dict[str, str], told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_ascend.VllmAscend, "traceable", lambda _: False)
    description = {f"{name}.weight": kind for name, kind in kinds.items()}
    config = SimpleNamespace(quant_config=SimpleNamespace(quant_description=description))
    assert vllm_ascend.VllmAscend({}).wire_bytes(config) == told


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
