"""Tiny DeepSeek-V3 checkpoints for the demo and the engine tests.

The architecture is the real one, with DeepSeek's own attention head sizes, because vLLM's CPU
kernels accept no other. Everything else is tiny. Two variants:

- `dense`: no layer has experts. The configuration is still that of a mixture-of-experts model, so
  vLLM runs its data-parallel ranks in lock step.
- `moe`: the last two layers have experts.

Two forms: *trained* for about a minute on a short story, so that greedy output is readable and the
best next byte wins by a large margin; or *random* with wide weights, made in a second.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from . import engines

Variant = Literal["dense", "moe"]

RECIPE_VERSION = 1
"""Part of the cache path; raise it whenever this module would make another checkpoint."""

HIDDEN_SIZE = 256
NUM_HEADS = 8
V_HEAD_DIM = 128
NUM_LAYERS = 3
MAX_POSITIONS = 256
EOS_TOKEN_ID = 256

O_PROJ_IN = NUM_HEADS * V_HEAD_DIM
"""Columns of each o_proj weight; the rows are `HIDDEN_SIZE`."""
O_PROJ_BYTES = NUM_LAYERS * HIDDEN_SIZE * O_PROJ_IN * 4
"""Bytes of all unsharded o_proj weights of one rank, in float32."""

SENTENCES = (
    "The lighthouse stands where a wide river meets the sea.",
    "Eight keepers live there, and every keeper tends one lamp.",
    "At dusk they climb the stairs, each with a jar of oil.",
    "Nobody can carry all the oil, so they share it out.",
    "When a ship calls from the dark, each lamp sends a beam.",
    "No single beam is strong enough to show the rocks.",
    "Together they make a path of light across the water.",
    "Sometimes one keeper has no ship to guide at all.",
    "He still lights his lamp, because the others count on it.",
    "If he slept, the whole bay would wait in silence.",
    "In the morning they put out the lamps and eat bread.",
    "The youngest writes down how many ships came home.",
    "Yesterday there were seven, and today there were nine.",
    "An old captain once asked why they never quarrel.",
    "We each hold a small part, they said, and add the rest.",
    "Then the fog came back and they climbed the stairs again.",
)
STORY = " ".join(SENTENCES) + " "
"""What the trained form knows by heart. It repeats: the first sentence follows the last."""

_SHORTEST_PROMPT = 12
_MIN_MARGIN = 1.0
"""Smallest distance, in logits, between the best and the second-best next byte of the story."""


def prompts(count: int) -> list[str]:
    """Return `count` distinct beginnings of stretches of the story, of 12 to about 135 bytes.

    Each starts at a sentence, ends after a space, and tells where in the story it is.
    """
    chosen: list[str] = []
    twice = STORY + STORY
    for index in range(count):
        start = STORY.index(SENTENCES[index % len(SENTENCES)])
        end = start + _SHORTEST_PROMPT + (index * 37) % 119
        prompt = ""
        while not prompt or prompt in chosen:
            end = twice.index(" ", end) + 1
            prompt = twice[start:end]
        chosen.append(prompt)
    return chosen


def ensure(
    variant: Variant,
    *,
    trained: bool,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Path:
    """Return the directory of the checkpoint; make it first when it is not cached.

    A process of its own makes it, because this one imports neither torch nor transformers.
    `progress` receives the current stage several times a second. Several callers may ask at once.

    Raises `RuntimeError` with the end of the log when the checkpoint cannot be made.
    """
    name = f"model-{variant}-{'trained' if trained else 'random'}-v{RECIPE_VERSION}"
    path = (cache_dir or engines.default_cache_dir()) / name
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=path.parent) as scratch:
        made, log = Path(scratch, "model"), Path(scratch, "log")
        root = str(Path(__file__).resolve().parents[1])
        code = f"import sys; sys.path.append({root!r}); from demo import model; model.make"
        command = [sys.executable, "-c", f"{code}({variant!r}, {trained}, {str(made)!r})"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("OPROJ_")}
        # Passive waiting: spinning OpenMP threads are ten times slower on a busy machine.
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        with engines.process(command, env, log, deadline=900) as maker:
            while not maker.ended():
                steps = [line for line in maker.log().splitlines() if line.startswith("training")]
                progress(steps[-1] if steps else "making the checkpoint")
                time.sleep(0.1)
        if maker.guard.poll():
            raise RuntimeError(
                f"making {path} failed; it needs torch and transformers with "
                f"DeepseekV3ForCausalLM:\n{maker.log()[-2000:]}"
            )
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
    return path


def make(variant: Variant, trained: bool, directory: str) -> None:
    """Write a checkpoint: configuration, float32 weights, byte-level tokenizer.

    Deterministic for one torch release and thread count. Raises `RuntimeError` when training does
    not reach the wanted margin.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(20)
    network = DeepseekV3ForCausalLM(config(variant, trained)).float()
    if trained:
        _train(network)
    network.save_pretrained(directory)
    write_tokenizer(directory)


def config(variant: Variant, trained: bool) -> Any:
    """Return the configuration of a checkpoint, of transformers' class."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=320,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace={"dense": NUM_LAYERS, "moe": 1}[variant],
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=V_HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.02 if trained else 0.2,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        num_nextn_predict_layers=0,
        # Not fields of transformers' class, but vLLM reads them from config.json.
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )


def _train(network: Any) -> None:
    """Teach `network` the story; print progress."""
    import torch

    story = torch.tensor(list(STORY.encode()))
    starts = torch.tensor([STORY.index(sentence) for sentence in SENTENCES])
    windows = story[(starts[:, None] + torch.arange(192)) % len(story)]
    labels = windows.clone()
    labels[:, :_SHORTEST_PROMPT] = -100  # these bytes tell the sentence; nothing predicts them
    generator = torch.Generator().manual_seed(20)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95))
    margin = float("nan")
    started = time.monotonic()
    for step in range(600):
        # A short warm-up, then a linear decay to a tenth.
        rate = 2e-3 * min(1.0, (step + 1) / 20) * max(0.1, 1.0 - 0.9 * step / 280)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.randperm(len(windows), generator=generator)[:4]
        loss = network(input_ids=windows[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            seconds = time.monotonic() - started
            print(f"training step {step + 1}, loss {loss:.3f}, {seconds:.0f} s of about 60")
            if loss < 0.1 and (margin := _smallest_margin(network, windows)) >= _MIN_MARGIN:
                return
    raise RuntimeError(
        f"after {step + 1} training steps the smallest margin is {margin:.2f} logits, "
        f"wanted {_MIN_MARGIN}; the loss is {loss:.3f}"
    )


def _smallest_margin(network: Any, windows: Any) -> float:
    """Return the smallest logit margin by which the right next byte wins; negative if one loses."""
    import torch

    with torch.no_grad():
        logits = network(input_ids=windows).logits[:, _SHORTEST_PROMPT - 1 : -1]
    wanted = windows[:, _SHORTEST_PROMPT:, None]
    others = logits.scatter(-1, wanted, float("-inf")).amax(-1, keepdim=True)
    return float((logits.gather(-1, wanted) - others).min())


def write_tokenizer(directory: str) -> None:
    """Write a tokenizer with one token per byte (its id is the byte) and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end|>"
    tokenizer.add_special_tokens([end])
    assert tokenizer.token_to_id(end) == EOS_TOKEN_ID
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
