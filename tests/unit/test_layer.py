"""Which layers are an o_proj of a decoder's self-attention, and that no model has only some."""

from __future__ import annotations

import pytest

from oproj_patch.errors import OprojError
from oproj_patch.sharding.layer import check_attentions, is_o_proj


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
        "model.layers.0.attn.wo_b",
        "model.layers.0.self_attn.wo_b",
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


@pytest.mark.parametrize(
    ("prefix", "owner"),
    [
        ("model.layers.0.self_attn.dense", "BailingMoeV3MLAAttention"),
        ("model.layers.0.self_attn.out_proj", "Lfm2MoeAttention"),
        ("transformer.blocks.0.norm_attn_norm.attn.out_proj", "DbrxAttention"),
        ("model.layers.0.attn.wo_ud", "InklingAttention"),
    ],
)
def test_o_proj_by_its_owner(prefix: str, owner: str) -> None:
    assert is_o_proj(prefix, owner)
    assert not is_o_proj(prefix) and not is_o_proj(prefix, "BailingMoELinearAttention")
    assert not is_o_proj(f"vision_tower.{prefix}", owner) and not is_o_proj("", owner)


class Plain:
    """An attention as the host registers it; impl: it is a softmax attention."""

    def __init__(self, impl: bool = True, cache: bool = True, attn_type: str = "decoder") -> None:
        if impl:
            self.impl = object()
        if cache:
            self.kv_cache = object()
        self.attn_type = attn_type


O_PROJ = [f"model.layers.{index}.self_attn.o_proj" for index in (0, 1)]
ATTENTIONS = {f"model.layers.{index}.self_attn.attn": Plain() for index in (0, 1)}
LINEAR = {"model.layers.2.self_attn": Plain(impl=False)}
CROSS = {"model.layers.2.cross_attn.attn": Plain(attn_type="encoder_decoder")}


@pytest.mark.parametrize(
    ("built", "attentions"),
    [
        (O_PROJ, ATTENTIONS),
        (O_PROJ, ATTENTIONS | LINEAR | CROSS),
        ([f"{name}#2" for name in O_PROJ], ATTENTIONS),
        ([], ATTENTIONS),  # a drafter that is left whole
        (O_PROJ, {f"{index}.attn": Plain() for index in (0, 1)}),  # Transformers, up to 0.28
        (O_PROJ, {}),
    ],
)
def test_every_attention_has_its_projection(built: list[str], attentions: dict[str, Plain]) -> None:
    check_attentions(Plain(), built, attentions)


@pytest.mark.parametrize(
    ("built", "attentions", "says"),
    [
        (
            O_PROJ[:1],
            ATTENTIONS,
            "the attention model.layers.1.self_attn.attn must have one sharded output projection, "
            "but it has none, while model.layers.0.self_attn.o_proj was sharded",
        ),
        (
            O_PROJ[:1],
            {f"{index}.attn": Plain() for index in (0, 10)},
            "the attention 10.attn must have one sharded output projection",
        ),
        (
            [*O_PROJ, "model.layers.1.o_proj"],
            ATTENTIONS,
            "but model.layers.1.self_attn.o_proj and model.layers.1.o_proj were sharded",
        ),
    ],
)
def test_a_model_sharded_in_part(built: list[str], attentions: dict[str, Plain], says: str) -> None:
    with pytest.raises(OprojError, match=r"^OPROJ007: Plain is sharded in part: ") as raised:
        check_attentions(Plain(), built, attentions)
    assert says in str(raised.value) and "unset OPROJ_TENSOR_PARALLEL_SIZE" in str(raised.value)
