"""The table of architectures against vLLM's registry, and its sharded rows against vLLM's classes.

Some rows are constructed here, all of them in `tests/hosts/test_architectures.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.docs.architectures import CONSTRUCTED, READ, REFUSED
from tests.ranks import architectures
from tests.ranks.launch import RankFailed, World
from tests.ranks.registry import Source

SAMPLE = (
    "BailingMoeV2_5ForCausalLM",  # linear attentions beside softmax ones
    "BailingMoeV3ForCausalLM",  # self_attn.dense, and linear attentions that are sharded
    "DeepseekForCausalLM",  # no name
    "DeepseekV4ForCausalLM",  # wo_b, and caches of its own
    "Lfm2MoeForCausalLM",  # out_proj
    "LongcatFlashForCausalLM",  # two attentions in a layer
)


@pytest.mark.long
def test_every_architecture_has_one_row() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    found = Source(Path(spec.origin).parent).expert_architectures()
    rows = [
        *CONSTRUCTED,
        *(name for group in (READ, REFUSED) for row in group.values() for name in row),
    ]
    assert sorted(rows) == sorted(found)


@pytest.mark.parametrize("architecture", SAMPLE)
def test_every_attention_is_sharded(world: World, architecture: str) -> None:
    check(world, architecture)


def check(world: World, architecture: str) -> None:
    """Construct a row of the table on two ranks."""
    for found in world.run(
        architectures.construct, architecture, CONSTRUCTED[architecture], seconds=120
    ):
        assert found and set(found.values()) == {1}, found


@pytest.mark.parametrize(
    ("architecture", "config", "says"),
    [
        ("DbrxForCausalLM", {"model_type": "dbrx"}, "OPROJ004: "),
        (
            "OpenAIPrivacyFilterForTokenClassification",
            {"model_type": "openai_privacy_filter", "num_hidden_layers": 2},
            "OPROJ007: ",
        ),
    ],
)
def test_refused(architecture: str, config: dict[str, str | int], says: str) -> None:
    with World(2) as world, pytest.raises(RankFailed, match=says):
        world.run(
            architectures.construct, architecture, {"architectures": [architecture], **config}
        )
