"""Tiny DeepSeek-V3 checkpoints for the demo and the end-to-end tests.

The architecture is the real one and the attention head sizes are DeepSeek's own, the only ones
that vLLM's CPU kernels accept; everything else is tiny. Two variants:

``dense``
    Every layer has an ordinary MLP (``first_k_dense_replace == num_hidden_layers``). The
    configuration is still that of a mixture-of-experts model, so vLLM runs its data-parallel
    ranks in lock step, but no expert is dispatched.
``moe``
    The last two layers have experts.

and two forms: *trained* for about a minute on a short story, so that greedy output is readable and
the margins between logits are large, or *random* with wide weights, made in a second.

Only :func:`build` and what it calls import torch and transformers; :func:`ensure` runs it in a
process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

Variant = Literal["dense", "moe"]

RECIPE_VERSION = 1
"""Part of the cache path; raise it whenever a checkpoint made by this module would differ."""

HIDDEN_SIZE = 256
NUM_HEADS = 8
V_HEAD_DIM = 128
NUM_LAYERS = 3
MAX_POSITIONS = 256
EOS_TOKEN_ID = 256
VOCAB_SIZE = 320
FLOAT32_BYTES = 4

O_PROJ_IN = NUM_HEADS * V_HEAD_DIM
"""Columns of each o_proj weight (K); the rows are ``HIDDEN_SIZE``."""
O_PROJ_BYTES = NUM_LAYERS * HIDDEN_SIZE * O_PROJ_IN * FLOAT32_BYTES
"""Bytes of all unsharded o_proj weights of one rank."""

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

_TRAIN_SEED = 20
_TRAIN_WINDOW = 192
_TRAIN_BATCH = 4
_TRAIN_DECAY_STEPS = 280
_TRAIN_MAX_STEPS = 600
_LEARNING_RATE = 2e-3
_SHORTEST_PROMPT = 12
_RANDOM_INITIALIZER_RANGE = 0.2
_MIN_MARGIN = 1.0
"""Smallest distance, in logits, between the best and the second-best next byte of the story."""


def prompts(count: int) -> list[str]:
    """Return ``count`` distinct beginnings of stretches of the story, of very different lengths.

    Each starts at a sentence and ends after a space, and is long enough to tell where in the
    story it is. Lengths run from about 12 to about 135 bytes.
    """
    chosen: list[str] = []
    twice = STORY + STORY
    for index in range(count):
        start = STORY.index(SENTENCES[index % len(SENTENCES)])
        end = start + _SHORTEST_PROMPT + (index * 37) % 119
        while True:
            end = twice.index(" ", end) + 1
            if twice[start:end] not in chosen:
                break
        chosen.append(twice[start:end])
    return chosen


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/oproj_patch``, or ``~/.cache/oproj_patch``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "oproj_patch"


def checkpoint_path(variant: Variant, *, trained: bool, cache_dir: Path) -> Path:
    """Return where :func:`ensure` keeps this checkpoint."""
    form = "trained" if trained else "random"
    return cache_dir / f"model-{variant}-{form}-v{RECIPE_VERSION}"


def ensure(
    variant: Variant,
    *,
    trained: bool,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    deadline: float = 900.0,
) -> Path:
    """Return the directory of the checkpoint, making it first when it is not cached.

    ``progress`` receives one line at a time; ``deadline`` is in seconds. Safe when several
    processes ask at once: each builds in a directory of its own and the first to finish wins.

    Raises ``RuntimeError`` when the checkpoint cannot be made, with the last lines of output.
    """
    path = checkpoint_path(variant, trained=trained, cache_dir=cache_dir or default_cache_dir())
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=path.name + ".", dir=path.parent))
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        variant,
        "trained" if trained else "random",
        str(scratch),
        str(deadline),
    ]
    try:
        # Run by file name and without our variables: the shim has no business in this process.
        env = {k: v for k, v in os.environ.items() if not k.startswith("OPROJ_")}
        # Passive waiting: spinning OpenMP threads are ten times slower on a busy machine.
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        lines: list[str] = []
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line.rstrip())
                    if line.startswith(_PROGRESS):
                        progress(line[len(_PROGRESS) :].rstrip())
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        if code != 0:
            tail = "\n".join(lines[-20:])
            raise RuntimeError(
                f"making the {path.name} checkpoint failed with exit code {code}; "
                f"it needs torch and transformers with DeepseekV3ForCausalLM:\n{tail}"
            )
        try:
            scratch.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        return path
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_PROGRESS = "progress: "


def _say(text: str) -> None:
    print(_PROGRESS + text, flush=True)


def build(variant: Variant, *, trained: bool, directory: Path) -> None:
    """Make one checkpoint in ``directory``: config, float32 weights, byte-level tokenizer.

    Deterministic for one torch release and thread count. Prints progress. Raises ``RuntimeError``
    when training does not reach the wanted margin.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(_TRAIN_SEED)
    model = DeepseekV3ForCausalLM(_config(variant, trained)).float()
    report: dict[str, Any] = {"recipe": RECIPE_VERSION, "variant": variant, "trained": trained}
    if trained:
        report |= _train(model)
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    (directory / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")


def _config(variant: Variant, trained: bool) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
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
        first_k_dense_replace=NUM_LAYERS if variant == "dense" else 1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=V_HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.02 if trained else _RANDOM_INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        num_nextn_predict_layers=0,
        # Not fields of transformers' class, but vLLM reads them from config.json.
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )


def _train(model: Any) -> dict[str, Any]:
    """Teach ``model`` the story; return steps, final loss, margin and seconds."""
    import torch

    story = torch.tensor(list(STORY.encode()))
    starts = torch.tensor([STORY.index(sentence) for sentence in SENTENCES])
    windows = story[(starts[:, None] + torch.arange(_TRAIN_WINDOW)) % len(story)]
    # The first bytes only tell which sentence it is; nothing predicts them.
    labels = windows.clone()
    labels[:, :_SHORTEST_PROMPT] = -100
    generator = torch.Generator().manual_seed(_TRAIN_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
    started = time.monotonic()
    loss_value = margin = float("nan")
    step = 0
    for step, rate in enumerate(_learning_rates(), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.randperm(len(windows), generator=generator)[:_TRAIN_BATCH]
        loss = model(input_ids=windows[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_value = loss.item()
        if step % 20 == 0 or step == _TRAIN_MAX_STEPS:
            _say(
                f"training step {step}, loss {loss_value:.3f}, "
                f"{time.monotonic() - started:.0f} s of about 60"
            )
        if loss_value < 0.1 and step % 20 == 0:
            margin = _smallest_margin(model, windows)
            if margin >= _MIN_MARGIN:
                break
    else:
        raise RuntimeError(
            f"after {step} training steps the smallest margin is {margin:.2f} logits, "
            f"wanted {_MIN_MARGIN}; the loss is {loss_value:.3f}"
        )
    return {
        "steps": step,
        "loss": loss_value,
        "margin": margin,
        "seconds": round(time.monotonic() - started, 1),
    }


def _learning_rates() -> Iterator[float]:
    """Yield the rate of each step: a short warm-up, then a linear decay to a tenth, kept."""
    for step in range(_TRAIN_MAX_STEPS):
        warm_up = min(1.0, (step + 1) / 20)
        decay = max(0.1, 1.0 - 0.9 * step / _TRAIN_DECAY_STEPS)
        yield _LEARNING_RATE * warm_up * decay


def _smallest_margin(model: Any, windows: Any) -> float:
    """Return the smallest logit margin by which the right next byte wins, in all windows.

    Negative when any byte after the shortest prompt is predicted wrongly.
    """
    import torch

    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, _SHORTEST_PROMPT - 1 : -1]
    wanted = windows[:, _SHORTEST_PROMPT:, None]
    right = logits.gather(-1, wanted)
    others = logits.scatter(-1, wanted, float("-inf")).amax(-1, keepdim=True)
    return float((right - others).min())


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token per byte (the id is the byte) and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end|>"
    tokenizer.add_special_tokens([end])
    assert tokenizer.token_to_id(end) == EOS_TOKEN_ID
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)


def _byte_vocabulary() -> dict[str, int]:
    """Map the printable character that ByteLevel uses for a byte to that byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    vocabulary = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    for index, byte in enumerate(hidden):
        vocabulary[chr(256 + index)] = byte
    return vocabulary


def _main(arguments: list[str]) -> None:
    import signal

    variant, form, directory, deadline = arguments
    assert variant in get_args(Variant)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(max(1, int(float(deadline))))
    build(variant, trained=form == "trained", directory=Path(directory))  # type: ignore[arg-type]


if __name__ == "__main__":
    _main(sys.argv[1:])
