"""Read what the arithmetic of ``plan`` needs from a model's ``config.json``.

The file is untrusted: it may be huge, truncated, deeply nested or hold wrong types. Whatever is
wrong with it ends in one :class:`InputError`. Nothing but the standard library is needed.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oproj_patch.errors import OprojValueError

WEIGHT_BITS = {"int4": 4, "int8": 8, "fp8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
"""Bits of one stored value of each data type that ``plan`` knows."""

MAX_CONFIG_BYTES = 8 * 2**20
_MAX_LAYERS = 10_000
_MAX_WIDTH = 2**20

_TORCH_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NESTED = ("text_config", "language_config", "llm_config")
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")

# Only the fields used here, as the models' public configurations have them.
BUILTIN_MODELS: dict[str, dict[str, Any]] = {
    "deepseek-r1": {
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "deepseek-v2-lite": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "torch_dtype": "bfloat16",
    },
    "kimi-k2": {
        "hidden_size": 7168,
        "num_attention_heads": 64,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 0,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 384,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "qwen3-235b-a22b": {
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 94,
        "num_experts": 128,
        "torch_dtype": "bfloat16",
    },
    "glm-4.5": {
        "hidden_size": 5120,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 92,
        "num_nextn_predict_layers": 1,
        "n_routed_experts": 160,
        "torch_dtype": "bfloat16",
    },
}


class InputError(OprojValueError):
    """A model description or an option that cannot be used; the message is one sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__("OPROJ018", sentence)

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        return type(self), (self.sentence,)


@dataclass(frozen=True)
class ModelShape:
    """The part of a model's configuration that decides o_proj and KV-cache sizes.

    ``latent_width`` is the number of values that MLA caches per token and layer
    (``kv_lora_rank + qk_rope_head_dim``), 0 for GQA. ``quant_block`` is the length in input
    channels of one quantization block of ``weight_dtype`` (1 when there are none).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent_width: int
    num_layers: int
    mtp_layers: int
    weight_dtype: str
    activation_dtype: str
    quant_block: int
    notes: tuple[str, ...] = ()

    @property
    def o_proj_input(self) -> int:
        """K, the width of the unsharded o_proj input."""
        return self.num_heads * self.v_head_dim


def load_model(model: str, weight_dtype: str | None = None) -> ModelShape:
    """Describe ``model``: a built-in name, a directory with a ``config.json``, or such a file.

    ``weight_dtype`` (a key of :data:`WEIGHT_BITS`) overrides what the configuration says.
    Raises :class:`InputError`.
    """
    builtin = BUILTIN_MODELS.get(model.lower())
    if builtin is not None:
        return parse_config(builtin, weight_dtype)
    path = Path(model)
    try:
        if path.is_dir():
            path = path / "config.json"
        config = _read_json(path)
        described_beside = (path.parent / "quant_model_description.json").is_file()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"MODEL is {_show(model)}, which cannot be read ({_reason(error)}): give a directory "
            f"with a config.json, a config.json, or one of {', '.join(BUILTIN_MODELS)}"
        ) from None
    if weight_dtype is None and described_beside and not config.get("quantization_config"):
        shape = parse_config(config, "int8")
        note = (
            "quant_model_description.json lies beside config.json: int8 is assumed for o_proj, "
            "--dtype says otherwise"
        )
        return replace(shape, notes=(*shape.notes, note))
    return parse_config(config, weight_dtype)


def parse_config(config: dict[str, Any], weight_dtype: str | None = None) -> ModelShape:
    """Take a :class:`ModelShape` from the contents of a ``config.json``.

    Raises :class:`InputError` naming the field, the value found and what is accepted.
    """
    text = next((config[key] for key in _NESTED if isinstance(config.get(key), dict)), config)
    _refuse_other_architectures(text)
    heads = _integer(text, "num_attention_heads", _MAX_WIDTH)
    hidden = _integer(text, "hidden_size", _MAX_WIDTH)
    layers = _integer(text, "num_hidden_layers", _MAX_LAYERS)
    if text.get("kv_lora_rank") is not None:
        latent = _integer(text, "kv_lora_rank", _MAX_WIDTH)
        latent += _integer(text, "qk_rope_head_dim", _MAX_WIDTH)
        kv_heads, head_dim = 1, latent
        v_head_dim = _integer(text, "v_head_dim", _MAX_WIDTH)
    else:
        latent = 0
        kv_heads = _integer(text, "num_key_value_heads", _MAX_WIDTH, default=heads)
        head_dim = _integer(text, "head_dim", _MAX_WIDTH, default=max(1, hidden // heads))
        v_head_dim = _integer(text, "v_head_dim", _MAX_WIDTH, default=head_dim)
    mtp_layers = _integer(text, "num_nextn_predict_layers", _MAX_LAYERS, default=0, least=0)

    activation_dtype = _activation_dtype(text, config)
    quant_block = 1
    if weight_dtype is None:
        quantization = text.get("quantization_config") or config.get("quantization_config")
        weight_dtype, quant_block = _weight_dtype(quantization, activation_dtype)

    notes = []
    if not any(text.get(key) for key in _EXPERT_COUNTS):
        notes.append(
            "the configuration names no experts: for a dense model vLLM gives data-parallel ranks "
            "no lock step, and o_proj cannot be sharded over them"
        )
    if text.get("index_head_dim") is not None:
        notes.append("the index cache of sparse attention is not counted in the KV-cache tokens")
    return ModelShape(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        latent_width=latent,
        num_layers=layers,
        mtp_layers=mtp_layers,
        weight_dtype=weight_dtype,
        activation_dtype=activation_dtype,
        quant_block=quant_block,
        notes=tuple(notes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    # Opening a pipe would wait for a writer, and reading a device might never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{_show(path)} is not a regular file: give a config.json")
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise InputError(
            f"{_show(path)} is larger than {MAX_CONFIG_BYTES // 2**20} MiB, the most that is "
            "accepted: give a config.json"
        )
    try:
        config = json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{_show(path)} is not valid JSON ({_reason(error)}): give a complete config.json"
        ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"{_show(path)} holds a JSON {type(config).__name__}: a JSON object is accepted"
        )
    return config


def _refuse_other_architectures(text: dict[str, Any]) -> None:
    layer_types = text.get("layer_types")
    linear = isinstance(layer_types, list) and "linear_attention" in layer_types
    if linear or text.get("linear_attn_config") is not None:
        raise InputError(
            "config.json describes linear-attention layers, whose output projections are not "
            "sharded: plan accepts models with self-attention in every layer"
        )
    if text.get("o_lora_rank") is not None:
        raise InputError(
            "config.json has o_lora_rank, an output projection made of two layers: plan accepts "
            "models with a single o_proj per layer"
        )


def _integer(
    config: dict[str, Any], name: str, most: int, default: int | None = None, least: int = 1
) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise InputError(f"config.json has no {name}: an integer from {least} to {most} is needed")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(
            f"config.json has {name} = {_show(value)}: an integer from {least} to {most} is "
            "accepted"
        )
    return value


def _activation_dtype(*configs: dict[str, Any]) -> str:
    for config in configs:
        value = config.get("torch_dtype") or config.get("dtype")
        if value is None:
            continue
        if isinstance(value, str) and value in _TORCH_DTYPES:
            return _TORCH_DTYPES[value]
        raise InputError(
            f"config.json has torch_dtype = {_show(value)}: {', '.join(_TORCH_DTYPES)} are accepted"
        )
    return "bf16"


def _weight_dtype(quantization: Any, unquantized: str) -> tuple[str, int]:
    """Return the data type of o_proj's weight and its block length along the input."""
    if quantization is None:
        return unquantized, 1
    if not isinstance(quantization, dict):
        raise InputError(
            f"config.json has quantization_config = {_show(quantization)}: an object is accepted"
        )
    for key in ("ignore", "ignored_layers", "modules_to_not_convert"):
        names = quantization.get(key)
        if isinstance(names, list) and any(_excludes_o_proj(name) for name in names):
            return unquantized, 1
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        blocks = quantization.get("weight_block_size")
        block = blocks[1] if isinstance(blocks, list) and len(blocks) == 2 else None
        return "fp8", _block(block)
    if method in ("gptq", "awq", "auto-round"):
        for bits, dtype in ((4, "int4"), (8, "int8")):
            if quantization.get("bits") == bits:
                return dtype, _block(quantization.get("group_size"))
    if method == "compressed-tensors":
        found = _compressed_tensors_dtype(quantization.get("config_groups"))
        if found is not None:
            return found
    if method == "ascend":
        return "int8", 1
    raise InputError(
        f"config.json has a quantization_config with quant_method = {_show(method)}, from which "
        f"o_proj's data type cannot be told: name it with --dtype ({', '.join(WEIGHT_BITS)})"
    )


def _compressed_tensors_dtype(groups: Any) -> tuple[str, int] | None:
    # With several groups, which one o_proj belongs to depends on patterns: not guessed.
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    [group] = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return None
    kind = (weights.get("type"), weights.get("num_bits"))
    for family, bits, dtype in (("int", 4, "int4"), ("int", 8, "int8"), ("float", 8, "fp8")):
        if kind == (family, bits):
            return dtype, _block(weights.get("group_size"))
    return None


def _excludes_o_proj(name: Any) -> bool:
    """Tell whether an entry of a quantizer's list of excluded layers covers o_proj.

    The entries are names or regular expressions; a regular expression from an untrusted file is
    not run, so only its letters are looked at.
    """
    if not isinstance(name, str) or "vis" in name:
        return False
    return "o_proj" in name or ("self_attn" in name and "_proj" not in name and "index" not in name)


def _block(value: Any) -> int:
    usable = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_WIDTH
    return value if usable else 1


def _show(value: object) -> str:
    """Return ``value`` for an error message: short, one line, no control characters."""
    try:
        text = ascii(str(value) if isinstance(value, Path) else value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:80]
