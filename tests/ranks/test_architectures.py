"""The table of architectures against vLLM's registry, and its sharded rows against vLLM's classes.

Some rows are constructed here, all of them in `tests/hosts/test_architectures.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from oproj_patch.errors import OprojError
from oproj_patch.hosts import architectures as architectures_known
from tests.docs.architectures import CONSTRUCTED, NEWER, READ, REFUSED, rows
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
    """`tests/hosts/test_architectures.py` does the same with the newest release."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    found = Source(Path(spec.origin).parent).expert_architectures()
    assert sorted(set(rows()) - {*READ[NEWER]}) == sorted(found)


def test_the_package_knows_the_table() -> None:
    """By name, as it tells the user; the other refused ones have a rule."""
    sharded = {*CONSTRUCTED, *(name for names in READ.values() for name in names)}
    assert sharded == architectures_known.SHARDED
    [without_cache] = [names for why, names in REFUSED.items() if "OPROJ007" in why]
    assert {*without_cache} == architectures_known.NO_CACHE
    for name in without_cache:
        with pytest.raises(OprojError, match=f"^OPROJ007: .* attention of {name} has no KV cache"):
            architectures_known.told([name])
    assert architectures_known.told(["NewForCausalLM"])[0] is False


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
