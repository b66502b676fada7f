"""`oproj-patch plan`: what each otp group size saves and costs, by arithmetic alone.

Sizes are of o_proj weights: quantization scales and biases are not counted. Needs neither torch
nor vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import OprojValueError
from ..hosts.refusals import EXPERT_COUNTS
from ..sharding.topology import gather_bytes, gather_threshold, legal_sizes, step_bytes

GIB, MIB = 2**30, 2**20
WEIGHT_BITS = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
TORCH_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ASCEND, MODELOPT = "quant_model_description.json", "hf_quant_config.json"
"""What ModelSlim (for vllm-ascend) and ModelOpt write beside a `config.json`."""


def _model(hidden: int, heads: int, layers: int, experts: int, **fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers}
    return {**sizes, "n_routed_experts": experts, "torch_dtype": "bfloat16", **fields}


_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}
_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_MTP = {"num_nextn_predict_layers": 1}
# The fields used here, as the models' public configurations have them.
BUILTIN_MODELS: dict[str, dict[str, Any]] = {
    "deepseek-r1": _model(7168, 128, 61, 256, **_MTP, **_MLA, **_FP8),
    "deepseek-v2-lite": _model(2048, 16, 27, 64, **_MLA),
    "kimi-k2": _model(7168, 64, 61, 384, **_MLA, **_FP8),
    "qwen3-235b-a22b": _model(4096, 64, 94, 128, num_key_value_heads=4, head_dim=128),
    "glm-4.5": _model(5120, 96, 92, 160, num_key_value_heads=8, head_dim=128, **_MTP),
}


def _unusable(sentence: str) -> OprojValueError:
    return OprojValueError("OPROJ018", sentence)


@dataclass(frozen=True)
class ModelShape:
    """The part of a model's configuration that decides o_proj and KV-cache sizes.

    o_proj_input: columns of the unsharded o_proj; kv_heads, kv_width: heads of the cache of one
    layer, and values that one of them takes per token (MLA's latent vector is one head); dtypes,
    mtp_dtypes: of the o_proj of each decoder and MTP layer; block: every chunk is a multiple of
    so many columns.
    """

    hidden_size: int
    num_heads: int
    o_proj_input: int
    kv_heads: int
    kv_width: int
    dtypes: tuple[str, ...]
    mtp_dtypes: tuple[str, ...]
    activation_dtype: str
    block: int
    notes: tuple[str, ...]

    @property
    def weight_dtype(self) -> str:
        """The data type of all decoder layers, or each one with the number of its layers."""
        counts = Counter(self.dtypes)
        mixed = " + ".join(f"{dtype} x {count}" for dtype, count in counts.items())
        return mixed if len(counts) > 1 else self.dtypes[0]


def make_plan(
    model: str, shape: ModelShape, *, dp: int = 32, tp: int = 1, kv_dtype: str = "bf16",
    batch: int = 24, prefill_rows: Sequence[int] = (4096,),
) -> dict[str, Any]:  # fmt: skip
    """Compute what `--json` prints: a plan of `shape` on `dp` x `tp` ranks, one row for each N.

    batch, prefill_rows: rows of a decode step, and of prefill chunks, on each rank.
    Returns bytes; those sent are of one rank, over all decoder layers.
    Raises OprojValueError when the heads do not divide by `tp` or no group size is legal.
    """
    if shape.num_heads % tp:
        raise _unusable(
            f"--tp is {tp}, which does not divide the model's {shape.num_heads} attention heads: "
            "give a divisor of it"
        )
    width, hidden, layers = shape.o_proj_input // tp, shape.hidden_size, len(shape.dtypes)
    sizes = legal_sizes(dp, shape.o_proj_input, tp, shape.block)
    if not sizes:
        multiple = f" into multiples of {shape.block}" if shape.block > 1 else ""
        raise _unusable(
            f"--dp is {dp}, of which no divisor from 2 up splits the o_proj input of {width} "
            f"channels per rank evenly{multiple}: give a --dp that has one"
        )

    def held(n: int, dtypes: Sequence[str]) -> int:
        return sum(-(-width // n * hidden * WEIGHT_BITS[dtype] // 8) for dtype in dtypes)

    # MLA caches its vector on every tensor-parallel rank; GQA divides its heads among them.
    kv_values = max(1, shape.kv_heads // tp) * shape.kv_width * layers
    kv_bytes = kv_values * WEIGHT_BITS[kv_dtype] // 8
    full, mtp_full = held(1, shape.dtypes), held(1, shape.mtp_dtypes)
    element_bytes = WEIGHT_BITS[shape.activation_dtype] // 8
    rows = []
    for n in sizes:
        kept = held(n, shape.dtypes)
        step = step_bytes(n, width // n, hidden, element_bytes) * layers
        gather = gather_bytes(n, kept)
        saved, tokens = full - kept, (full - kept) // kv_bytes
        rows.append({
            "otp_size": n, "o_proj_bytes_per_rank": kept,
            "saved_bytes_per_rank": saved, "saved_bytes_instance": saved * dp * tp,
            "kv_tokens_per_rank": tokens, "kv_tokens_instance": tokens * dp,
            "exchange_bytes_per_token": step, "exchange_bytes_per_step": step * batch,
            "weight_gather_rows": gather_threshold(gather, step),
            "prefill": [
                {"rows": count, "exchange_bytes": step * count, "weight_gather_bytes": gather}
                for count in prefill_rows
            ],
            "mtp_saved_bytes_per_rank": mtp_full - held(n, shape.mtp_dtypes),
        })  # fmt: skip
    return {
        "model": model, "dp": dp, "tp": tp, "kv_dtype": kv_dtype, "batch": batch,
        "dtype": shape.weight_dtype, "activation_dtype": shape.activation_dtype,
        "hidden_size": hidden, "o_proj_input": shape.o_proj_input,
        "num_layers": layers, "mtp_layers": len(shape.mtp_dtypes),
        "unsharded_bytes_per_rank": full, "mtp_unsharded_bytes_per_rank": mtp_full,
        "kv_bytes_per_token": kv_bytes,
        "weight_gather_buffer_bytes": max(held(1, [dtype]) for dtype in set(shape.dtypes)),
        "notes": list(shape.notes), "rows": rows,
    }  # fmt: skip


def format_plan(plan: dict[str, Any]) -> str:
    """Return `plan` as text that fits a terminal of 80 columns."""

    def table(rows: Sequence[dict[str, Any]], *columns: tuple[str, str, str, str, int]) -> str:
        cells = [
            [title, unit, *(format(row[key] / scale, form) for row in rows)]
            for title, unit, key, form, scale in columns
        ]
        padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in cells]
        return "\n".join("  " + "   ".join(line) for line in zip(*padded, strict=True))

    rows, model = plan["rows"], plan["model"]
    size = ("N", "", "otp_size", ".0f", 1)
    buffer = plan["weight_gather_buffer_bytes"] / GIB
    notes = [f"a weight gather needs a buffer of {buffer:.2f} GiB per rank, shared by all layers"]
    if plan["mtp_layers"]:
        notes.append(
            f"{plan['mtp_layers']} MTP layer{'s' * (plan['mtp_layers'] > 1)} not counted: "
            f"{plan['mtp_unsharded_bytes_per_rank'] / GIB:.2f} GiB more o_proj per rank when "
            "loaded, sharded alike"
        )
    lines = [
        model if len(model) < 80 else f"...{model[-76:]}",
        f"o_proj [{plan['hidden_size']}, {plan['o_proj_input']}] x {plan['num_layers']} layers, "
        f"{plan['dtype']}, DP {plan['dp']}, TP {plan['tp']}",
        f"Not sharded: {plan['unsharded_bytes_per_rank'] / GIB:.2f} GiB on every rank. "
        f"One token of KV cache: {plan['kv_bytes_per_token']:,} B ({plan['kv_dtype']}).",
        "\nMemory",
        table(
            rows, size,
            ("o_proj", "GiB/rank", "o_proj_bytes_per_rank", ".2f", GIB),
            ("saved", "GiB/rank", "saved_bytes_per_rank", ".2f", GIB),
            ("saved", "GiB, all", "saved_bytes_instance", ".1f", GIB),
            ("KV tokens", "per rank", "kv_tokens_per_rank", "+,.0f", 1),
            ("KV tokens", "all ranks", "kv_tokens_instance", "+,.0f", 1),
        ),
        f"\nDecode, bytes sent by a rank ({plan['activation_dtype']} activations)",
        table(
            rows, size,
            ("one token", "MiB", "exchange_bytes_per_token", ".2f", MIB),
            (f"step of {plan['batch']}", "MiB", "exchange_bytes_per_step", ".1f", MIB),
        ),
        "\nPrefill, bytes sent by a rank for one chunk",
        table(
            [{**row, **cost} for row in rows for cost in row["prefill"]], size,
            ("rows", "", "rows", ",.0f", 1),
            ("exchange", "GiB", "exchange_bytes", ".2f", GIB),
            ("weight gather", "GiB", "weight_gather_bytes", ".2f", GIB),
            ("gather pays", "from row", "weight_gather_rows", ",.0f", 1),
        ),
        "",
    ]  # fmt: skip
    for note in (*notes, *plan["notes"]):
        lines += textwrap.wrap(f"Note: {note}.", width=79, subsequent_indent="  ")
    return "\n".join(lines)


def load_model(model: str, weight_dtype: str | None = None) -> ModelShape:
    """Describe `model`: a built-in name, a directory with a `config.json`, or such a file.

    weight_dtype: a key of WEIGHT_BITS, instead of what the configuration says of o_proj.
    Raises OprojValueError.
    """
    if model.lower() in BUILTIN_MODELS:
        return parse_config(BUILTIN_MODELS[model.lower()], weight_dtype)
    try:
        path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
        config = json.loads(path.read_bytes())
        beside = {
            name: json.loads(path.with_name(name).read_bytes())
            for name in (ASCEND, MODELOPT)
            if path.with_name(name).is_file()
        }
        return parse_config(config, weight_dtype, beside)
    except OprojValueError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise _unusable(
            f"MODEL is {model[-200:]!r}, which cannot be read ({reason}): give a directory with a "
            f"config.json, a config.json, or one of {', '.join(BUILTIN_MODELS)}"
        ) from None


def parse_config(
    config: dict[str, Any], weight_dtype: str | None = None,
    beside: dict[str, dict[str, Any]] | None = None,
) -> ModelShape:  # fmt: skip
    """Take a ModelShape from the contents of a `config.json` and of the files `beside` it.

    Raises OprojValueError naming the field, the value found and what is accepted.
    """
    nested = [config.get(key) for key in ("text_config", "language_config", "llm_config")]
    text: dict[str, Any] = next((c for c in nested if c), config)
    linear = "linear_attention" in (text.get("layer_types") or ())
    for key in ("linear_attn_config", "o_lora_rank", *["layer_types"] * linear):
        if text.get(key) is not None:
            raise _unusable(
                f"config.json has {key}, with linear attention or an output projection in two "
                "parts: plan accepts models with self-attention and one o_proj in every layer"
            )
    heads, hidden = _integer(text, "num_attention_heads"), _integer(text, "hidden_size")
    if text.get("kv_lora_rank") is not None:
        kv_heads, v_head_dim = 1, _integer(text, "v_head_dim")
        kv_width = _integer(text, "kv_lora_rank") + _integer(text, "qk_rope_head_dim")
    else:
        kv_heads = _integer(text, "num_key_value_heads", default=heads)
        head_dim = _integer(text, "head_dim", default=max(1, hidden // heads))
        v_head_dim, kv_width = _integer(text, "v_head_dim", default=head_dim), 2 * head_dim
    layers = _integer(text, "num_hidden_layers")
    count = layers + _integer(text, "num_nextn_predict_layers", default=0, least=0)
    named = [c.get(key) for c in (text, config) for key in ("torch_dtype", "dtype")]
    torch_dtype = str(next(filter(None, named), "bfloat16"))
    if torch_dtype not in TORCH_DTYPES:
        raise _unusable(
            f"config.json has torch_dtype = {torch_dtype!r}: {', '.join(TORCH_DTYPES)} are accepted"
        )
    plain = TORCH_DTYPES[torch_dtype]
    dtypes, block = [weight_dtype or plain] * count, 1
    notes: list[str] = []
    quantization = {} if weight_dtype else _quantization(config, text, beside or {}, notes)
    if quantization:
        roots = ("model",) if text is config else ("model.language_model", "language_model.model")
        names = [
            [f"{root}.layers.{index}.self_attn.o_proj" for root in roots] for index in range(count)
        ]
        schemes = [_scheme(quantization, of_layer) for of_layer in names]
        dtypes = [scheme[0] if scheme else plain for scheme in schemes]
        block = math.lcm(*(scheme[1] for scheme in schemes if scheme))
        notes += _doubts(quantization, names, layers)
    if len(set(dtypes[:layers])) > 1:
        notes.append("o_proj has not the same data type in all layers: each is counted in its own")
    if not any(text.get(key) for key in EXPERT_COUNTS):
        notes.append(
            "the configuration names no experts: for a dense model vLLM gives data-parallel ranks "
            "no lock step, and o_proj cannot be sharded over them"
        )
    if text.get("index_head_dim") is not None:
        notes.append("the index cache of sparse attention is not counted in the KV-cache tokens")
    return ModelShape(
        hidden_size=hidden, num_heads=heads, o_proj_input=heads * v_head_dim,
        kv_heads=kv_heads, kv_width=kv_width, activation_dtype=plain, block=block,
        dtypes=tuple(dtypes[:layers]), mtp_dtypes=tuple(dtypes[layers:]), notes=tuple(notes),
    )  # fmt: skip


def _integer(config: dict[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < least:
        found = f"{name} = {value!r}" if name in config else f"no {name}"
        raise _unusable(f"config.json has {found}: an integer of {least} or more is accepted")
    return value


# Data type, and how many input columns share a scale.
_MODELOPT_ALGORITHMS = {
    "FP8": ("fp8", 1), "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", 1), "FP8_PB_WO": ("fp8", 128),
    "MXFP8": ("fp8", 32), "NVFP4": ("fp4", 16), "W4A16_NVFP4": ("fp4", 16),
}  # fmt: skip


def _quantization(
    config: dict[str, Any], text: dict[str, Any], beside: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Return all that describes the quantization, and its `quant_method`; empty: there is none."""
    key = "quantization_config"
    found = text.get(key) or config.get(key) or config.get("compression_config") or {}
    if "quant_method" not in found:
        method = "ascend" if ASCEND in beside else "modelopt" if MODELOPT in beside else None
        found = {**found, "quant_method": method} if found or method else {}
    for name, family in ((ASCEND, "ascend"), (MODELOPT, "modelopt")):
        if name in beside and str(found["quant_method"]).startswith(family):
            found = {**beside[name].get("quantization", beside[name]), **found}
        elif name in beside:
            notes.append(f"{name} is not read: the quantization is {found['quant_method']}")
    return found


def _equal_or_regex(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


# The lists of excluded modules that a method reads, and how vLLM compares an entry with a name.
_EXCLUSIONS: dict[str, tuple[tuple[str, ...], Callable[[str, str], bool]]] = {
    "fp8": (("ignored_layers", "modules_to_not_convert"), operator.eq),
    "fbgemm_fp8": (("modules_to_not_convert",), operator.eq),
    "compressed-tensors": (("ignore",), _equal_or_regex),
    "awq": (("modules_to_not_convert",), lambda entry, name: entry in name),
    "modelopt": (("ignore", "exclude_modules"), lambda e, name: e in name or fnmatch(name, e)),
}
_LISTS = {key for keys, _ in _EXCLUSIONS.values() for key in keys}


def _entries(quantization: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (list, entry, whether it excludes a module with one of `names`)."""
    method = str(quantization["quant_method"])
    rules = [rule for family, rule in _EXCLUSIONS.items() if method.startswith(family)]
    # The last two are rules of GPTQ and AutoRound, which are looked at and not applied.
    for key in (*sorted(_LISTS), "dynamic", "extra_config"):
        for entry in quantization.get(key) or ():
            excludes = [equal for keys, equal in rules if key in keys]
            yield key, entry, any(equal(entry, name) for equal in excludes for name in names)


def _scheme(quantization: dict[str, Any], names: Sequence[str]) -> tuple[str, int] | None:
    """Return data type and block of the o_proj with one of `names`; None: it is not quantized."""
    method = str(quantization["quant_method"])
    kind, bits, block = "int", None, quantization.get("group_size")
    # vLLM quantizes only the experts of mxfp4.
    if method == "mxfp4" or any(excluded for _, _, excluded in _entries(quantization, names)):
        return None
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8", (quantization.get("weight_block_size") or (1, 1))[1]
    if method.startswith("modelopt"):
        algorithm = quantization.get("quant_algo")
        if algorithm == "MIXED_PRECISION":
            layers = quantization["quantized_layers"]
            algorithm = next((layers[name]["quant_algo"] for name in names if name in layers), None)
            if algorithm is None:
                return None
        if str(algorithm).upper() in _MODELOPT_ALGORITHMS:
            return _MODELOPT_ALGORITHMS[str(algorithm).upper()]
    elif method == "ascend":
        told = _told(quantization, names)
        if told == "FLOAT" or (told is None and any(".o_proj." in key for key in quantization)):
            return None
        if found := re.match(r"W(\d+)A", told or ""):
            kind, bits = "fp" if "FP" in found.string else "int", int(found[1])
    elif method == "compressed-tensors":
        weights = _compressed_group(quantization, names).get("weights")
        if not weights:
            return None
        kind, bits = weights["type"].replace("float", "fp"), weights["num_bits"]
        block = (weights.get("block_structure") or (1, weights.get("group_size")))[1]
    elif method.startswith(("gptq", "awq", "auto-round")):
        bits = quantization.get("bits", quantization.get("w_bit"))
    if f"{kind}{bits}" in WEIGHT_BITS:
        return f"{kind}{bits}", block if isinstance(block, int) and block > 0 else 1
    raise _unusable(
        f"the quantization has quant_method = {method!r}, from which the data type of {names[0]} "
        f"cannot be told: name it with --dtype ({', '.join(WEIGHT_BITS)})"
    )


def _told(quantization: dict[str, Any], names: Sequence[str]) -> str | None:
    """Return what ModelSlim's description says of the o_proj, such as `W8A8` or `FLOAT`."""
    keys = [f"{name}.{kind}" for name in names for kind in ("weight", "weight_packed")]
    return next((quantization[key] for key in keys if key in quantization), None)


def _compressed_group(quantization: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the group of which a target names the module; else one that names its class."""
    groups = [
        (target, group)
        for group in quantization["config_groups"].values()
        for target in group.get("targets", ["Linear"])
    ]
    by_name = [g for target, g in groups if any(_equal_or_regex(target, n) for n in names)]
    by_class = [g for target, g in groups if target.lower() in "rowparallellinear"]
    return next(iter(by_name + by_class), {})


def _doubts(
    quantization: dict[str, Any], names: Sequence[Sequence[str]], layers: int
) -> Iterator[str]:
    """Yield a note for what is said, or not said, of o_proj and had to be guessed."""
    method, every = quantization["quant_method"], [name for of_layer in names for name in of_layer]
    missing = sum(_told(quantization, of_layer) is None for of_layer in names[:layers])
    if method == "ascend" and missing:
        yield f"the description has no o_proj for {missing} layers: counted as not quantized"
    for key, entry, applied in _entries(quantization, every):
        # An o_proj, an attention or a whole layer, not of the vision tower.
        about = re.search(r"o_proj|(attn|attention|layers\.\d+)\W*$", entry)
        if about and not applied and "vis" not in entry:
            yield (
                f"{key} has {entry!r}, which {method} applies to no o_proj, or plan cannot apply: "
                "counted without it, --dtype says otherwise"
            )
            return


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the `plan` command; its `func` default is `run`."""
    parser = subparsers.add_parser(
        "plan",
        help="show what each group size saves and costs for a model",
        description="Show, for each legal otp group size N, the memory that sharding o_proj "
        "saves and the bytes that it sends. Arithmetic only: needs neither torch nor vLLM.",
        epilog="Quantization scales and biases are not counted.",
    )
    models = f"a directory, a config.json, or one of {', '.join(BUILTIN_MODELS)}"
    parser.add_argument("model", metavar="MODEL", help=models)
    add = parser.add_argument
    for name, default, about in (
        ("--dp", 32, "data-parallel ranks"),
        ("--tp", 1, "tensor-parallel ranks"),
        ("--batch", 24, "rows of a decode step on each rank"),
    ):
        add(name, type=_positive, default=default, help=f"{about} (default: {default})")
    add("--prefill-rows", type=_positive, nargs="+", default=[4096], metavar="ROWS",
        help="rows of a prefill chunk on each rank (default: 4096)")  # fmt: skip
    add("--dtype", choices=list(WEIGHT_BITS),
        help="data type of the o_proj weight (default: what the configuration says)")  # fmt: skip
    add("--kv-dtype", choices=("bf16", "fp8", "int8"), default="bf16",
        help="data type of the KV cache (default: bf16)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0. Raises OprojValueError when an input is unusable."""
    options = {key: getattr(args, key) for key in ("dp", "tp", "kv_dtype", "batch", "prefill_rows")}
    plan = make_plan(args.model, load_model(args.model, args.dtype), **options)
    print(json.dumps(plan, indent=2) if args.json else format_plan(plan))
    return 0


def _positive(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 9 and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} found, an integer of 1 or more is accepted")
