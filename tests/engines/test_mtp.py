"""Speculative decoding with an MTP layer: its o_proj is sharded too, and no rank runs ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from demo import model as demo_model
from demo.engines import Round, run_offline

from . import drafter
from .runs import (
    PROMPTS,
    STORY_TELLER,
    EngineRuns,
    assert_round_sizes,
    assert_same_tokens,
    completions,
)

DRAFTER_LENGTH = 48
LAYERS = demo_model.NUM_LAYERS + 1


@pytest.mark.deployment("MTP drafter, on both model runners", "DP=2, N=2; one rank too long, idle")
@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_drafter(runs: EngineRuns, tmp_path: Path, second: bool) -> None:
    """Tokens as without drafts and without the shim, whatever each rank's drafts are worth.

    Rank 0 first comes to the drafter's length, where it cannot draft any more while rank 1 goes
    on drafting, and then has no request at all.
    """
    off = runs.off(STORY_TELLER)
    config = runs.config(
        STORY_TELLER,
        otp=2,
        second=second,
        speculative_config={
            "method": "mtp",
            "num_speculative_tokens": 1,
            "max_model_len": DRAFTER_LENGTH,
        },
    )
    config = replace(
        config,
        model=drafter.add(config.model, tmp_path / "model"),
        extension="drafting.DraftingProbe",
        python_path=(Path(__file__).parent, *config.python_path),
    )
    prompts = sorted((prompt for prompt in PROMPTS if len(prompt) < DRAFTER_LENGTH - 8), key=len)
    longest = prompts[-1]
    rounds = [
        Round([[longest], prompts[:1]], [24, 24]),
        Round([[], prompts[1:3]], [1, 12]),
    ]
    fitting = [len(prompts[0]) + 24, *(len(prompt) + 12 for prompt in prompts[1:3])]
    assert max(fitting) < DRAFTER_LENGTH - 2 < len(longest) + 24
    on = run_offline(config, rounds)
    assert_round_sizes(on, rounds)
    assert_same_tokens(off, on)
    story = demo_model.STORY * 2
    for completion in completions(on):
        start = story.index(completion.prompt) + len(completion.prompt)
        assert completion.text == story[start : start + len(completion.token_ids)]

    assert sum(worker["drafts"].get("accepted", 0) for worker in on.workers) > 0
    exchanges = set()
    for worker in on.workers:
        drafts = worker["drafts"]
        assert drafts["rejected"] > 0
        # The second runner drafts on, whatever its length.
        assert second or (drafts["too long"] > 0) == (worker["dp_rank"] == 0)
        shapes = {tuple(layer["shape"]) for layer in worker["layers"].values()}
        assert shapes == {(demo_model.HIDDEN_SIZE, demo_model.O_PROJ_IN // 2)}
        assert len(worker["layers"]) == worker["status"]["layers"] == LAYERS
        exchanges.add(worker["status"]["exchanges"])
    for log in on.logs:
        assert ("Using V2 Model Runner" in log) == second
    (count,) = exchanges
    assert count > 0 and count % LAYERS == 0
