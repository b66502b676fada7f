"""A tiny DeepSeek V4 checkpoint; `python -m tests.engines.v4 DIRECTORY [zeroed]` makes it.

Each quarter of the outputs of wo_b depends on one quarter of its columns. So a partial result of
two or four ranks is zero where the others' are not, their sum rounds nothing, and equal tokens are
no luck.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ..ranks import v4

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, GROUPS, LAYERS = 256, 4, 2
BOTH_BYTES = LAYERS * 2 * (HIDDEN * GROUPS * v4.RANK + GROUPS * v4.RANK * v4.HEAD_DIM)
"""Of wo_b and wo_a, unsharded."""
WO_B_BYTES = LAYERS * 2 * HIDDEN * GROUPS * v4.RANK


def make(directory: Path, zeroed: bool = False) -> Path:
    """Write the checkpoint and a tokenizer, in a process of its own; zeroed: wo_b is zero."""
    words = [sys.executable, "-m", __name__, str(directory), *["zeroed"] * zeroed]
    subprocess.run(words, cwd=ROOT, check=True, timeout=300)
    return directory


def main(directory: Path, zeroed: bool) -> None:
    import torch
    from safetensors.torch import save_file

    from demo import model

    config = v4.config(HIDDEN, GROUPS, LAYERS)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    model.write_tokenizer(str(directory))
    torch.manual_seed(20)
    tensors = {}
    for name, shape in shapes(config).items():
        if len(shape) == 2 and ".hc_" not in name and not name.startswith("hc_"):
            scale = 1.0 if "embed" in name else 1.5 / shape[1] ** 0.5
            tensors[name] = (torch.randn(shape) * scale).bfloat16()
        else:
            plain = torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.1
            tensors[name] = plain.bfloat16() if "norm" in name else plain
        if name.endswith("wo_b.weight"):
            quarters = [torch.ones(HIDDEN // 4, shape[1] // 4) for _ in range(4)]
            tensors[name] *= torch.block_diag(*quarters) * (0.0 if zeroed else 3.0)
    save_file(tensors, directory / "model.safetensors")


def shapes(config: v4.Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the checkpoint, by its published name."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    wide = config["num_attention_heads"] * v4.HEAD_DIM
    mix, rank, inner = (2 + streams) * streams, v4.RANK, config["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "embed.weight": (config["vocab_size"], hidden),
        "head.weight": (config["vocab_size"], hidden),
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }
    expert = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    for layer in range(config["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            "attn.wq_a.weight": (config["q_lora_rank"], hidden),
            "attn.wkv.weight": (v4.HEAD_DIM, hidden),
            "attn.q_norm.weight": (config["q_lora_rank"],),
            "attn.wq_b.weight": (wide, config["q_lora_rank"]),
            "attn.kv_norm.weight": (v4.HEAD_DIM,),
            "attn.wo_a.weight": (config["o_groups"] * rank, wide // config["o_groups"]),
            "attn.wo_b.weight": (hidden, config["o_groups"] * rank),
            "attn.attn_sink": (config["num_attention_heads"],),
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "ffn.gate.weight": (config["n_routed_experts"], hidden),
            "ffn.gate.bias": (config["n_routed_experts"],),
        }
        for part in ("attn", "ffn"):
            own |= {
                f"hc_{part}_fn": (mix, streams * hidden),
                f"hc_{part}_base": (mix,),
                f"hc_{part}_scale": (3,),
            }
        names = ["shared_experts", *(f"experts.{n}" for n in range(config["n_routed_experts"]))]
        own |= {f"ffn.{name}.{w}.weight": shape for name in names for w, shape in expert.items()}
        found |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), "zeroed" in sys.argv)
