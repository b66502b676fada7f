"""The demo's trained checkpoint with an MTP draft layer that is right now and then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo.model import HIDDEN_SIZE, NUM_LAYERS, STORY

_LAYER = f"model.layers.{NUM_LAYERS}"


def add(source: Path, directory: Path) -> Path:
    """Copy the checkpoint in `source` to `directory`, with one MTP layer; return that.

    The layer sees the current byte and proposes the one that most often follows it in the story.
    """
    directory.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, directory)
    config = json.loads((source / "config.json").read_text())
    # The draft layer is dense too: no expert is dispatched.
    config |= {"num_nextn_predict_layers": 1, "first_k_dense_replace": NUM_LAYERS + 1}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights |= _draft_layer(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _draft_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    ones = torch.ones(HIDDEN_SIZE)
    layer = {f"{_LAYER}.{name}.weight": ones.clone() for name in
             ("enorm", "hnorm", "shared_head.norm")}  # fmt: skip
    last = f"model.layers.{NUM_LAYERS - 1}."
    for name, weight in weights.items():
        if name.startswith(last):
            # Attention and MLP of the last layer, quietly: o_proj counts, but not too much.
            loud = name.endswith(("o_proj.weight", "down_proj.weight"))
            layer[f"{_LAYER}.{name.removeprefix(last)}"] = weight * (0.05 if loud else 1.0)
    story = STORY.encode()
    known = sorted(set(story))
    pairs = list(zip(story, story[1:] + story[:1], strict=True))
    following = [max(known, key=lambda then: pairs.count((now, then))) for now in known]
    inputs = embedding[known] / embedding[known].pow(2).mean(1, keepdim=True).sqrt()
    from_byte = torch.linalg.pinv(head)[:, following] @ torch.linalg.pinv(inputs.t())
    from_byte *= HIDDEN_SIZE**0.5 / (from_byte @ inputs.t()).norm(dim=0).mean()
    layer[f"{_LAYER}.eh_proj.weight"] = torch.cat(
        [from_byte, torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE)], dim=1
    )
    # vLLM takes both from the model itself.
    layer[f"{_LAYER}.embed_tokens.weight"] = embedding.clone()
    layer[f"{_LAYER}.shared_head.head.weight"] = head.clone()
    return layer
