"""Which layers are an o_proj of a decoder's self-attention, by name."""

from __future__ import annotations

import pytest

from oproj_patch.sharding.layer import is_o_proj


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.0.self_attn.o_proj",
        "language_model.model.layers.61.self_attn.o_proj",
        "model.layers.3.attn.o_proj",
        "model.layers.3.attention.o_proj",
        "model.layers.3.self_attention.o_proj",
        "model.layers.3.self_attn.1.o_proj",
        "model.layers.3.mixer.o_proj",
        "model.layers.3.o_proj",
        "transformer.h.3.attention.dense",
        "self_attn.o_proj",
    ],
)
def test_o_proj(prefix: str) -> None:
    assert is_o_proj(prefix)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "o_proj",
        "lm_head",
        "model.layers.0.self_attn.o_proj.base_layer",
        "model.layers.0.self_attn.dense",
        "model.layers.0.self_attn.qo_proj",
        "model.layers.0.linear_attn.out_proj",
        "model.layers.0.cross_attn.o_proj",
        "model.decoder.layers.0.encoder_attn.attn.o_proj",
        "model.layers.0.mlp.experts.3.self_attn.o_proj",
        "vision_tower.encoder.layers.0.self_attn.o_proj",
        "model.vit.layers.0.attn.o_proj",
        "audio_tower.layers.0.self_attn.o_proj",
    ],
)
def test_no_o_proj(prefix: str) -> None:
    assert not is_o_proj(prefix)
