"""What each otp group size N saves and costs, by arithmetic alone, without torch and vLLM.

The gain is memory; time is only ever a cost. Sizes are of o_proj weights: quantization scales and
biases are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import OprojValueError
from ..hosts.refusals import EXPERT_COUNTS
from ..settings import TOGGLE
from ..sharding import topology
from ..sharding.topology import QUANTIZED_OUTPUTS, Grid

GIB, MIB = 2**30, 2**20
WEIGHT_BITS = {"int4": 4, "fp4": 4, "int8": 8, "fp8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
TORCH_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DESCRIPTIONS = {"quant_model_description.json": "ascend", "hf_quant_config.json": "modelopt"}
"""What ModelSlim and ModelOpt write beside a `config.json`, and the quant_method it belongs to."""
NODE = 8  # accelerators in most nodes
LATENCY = 10e-6  # seconds that an all-to-all of few bytes is assumed to take
SLOW_LINK = 25  # GB/s of a link between nodes, for each rank
DENSE = "no experts: o_proj of a dense model cannot be sharded over data parallelism"
_unusable = partial(OprojValueError, "OPROJ018")

_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "n_routed_experts")
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}
_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_MXFP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 32]}}
_V4 = {"head_dim": 512, "o_lora_rank": 1024}
_MTP = {"num_nextn_predict_layers": 1}
# The fields used here, as the models' public configurations have them.
BUILTIN_MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True)) | fields
    for name, *sizes, fields in (
        ("deepseek-r1", 7168, 128, 61, 256, _MTP | _MLA | _FP8),
        ("deepseek-v2-lite", 2048, 16, 27, 64, _MLA),
        ("kimi-k2", 7168, 64, 61, 384, _MLA | _FP8),
        ("qwen3-235b-a22b", 4096, 64, 94, 128, {"num_key_value_heads": 4, "head_dim": 128}),
        ("glm-4.5", 5120, 96, 92, 160, {"num_key_value_heads": 8, "head_dim": 128} | _MTP),
        ("deepseek-v4-flash", 4096, 64, 43, 256, _V4 | {"o_groups": 8} | _FP8),
        ("deepseek-v4-pro", 7168, 128, 61, 384, _V4 | {"o_groups": 16} | _FP8),
        ("deepseek-v4.1-flash", 5120, 64, 40, 256, _V4 | {"o_groups": 8} | _MXFP8),
    )
}
MODEL = "a directory with a config.json, such a file, a Hugging Face id in the local cache, or one "
MODEL += f"of {', '.join(BUILTIN_MODELS)}"


class ModelShape(NamedTuple):
    """The part of a model's configuration that decides o_proj and KV-cache sizes."""

    hidden_size: int
    num_heads: int
    o_proj_input: int  # columns of the unsharded o_proj
    kv_heads: int  # in the cache of one layer; MLA's latent vector is one head
    kv_width: int  # values that one of them takes per token
    dtypes: tuple[str, ...]  # of the o_proj of each decoder layer
    mtp_dtypes: tuple[str, ...]  # and of each MTP layer
    activation_dtype: str
    blocks: tuple[int, int]  # a rank's columns and outputs are multiples of these
    narrow: bool  # rows travel in 8 bits
    notes: list[str]
    groups: int = 0  # of DeepSeek V4's wo_a, which stands before its wo_b; 0: there is none
    heads_width: int = 0  # values of all heads, which go into wo_a


def make_plan(
    model: str, shape: ModelShape, *, dp: int = 32, tp: int = 1, kv_dtype: str = "bf16",
    batch: int = 24, prefill_rows: Sequence[int] = (4096,), link: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Compute what `--json` prints: a plan of `shape` on `dp` x `tp` ranks, one row for each N.

    batch, prefill_rows: rows of a decode step, and of prefill chunks, on each rank; link: GB/s that
        a rank sends.
    Bytes sent are of one rank and all decoder layers. Raises OprojValueError when no N is legal.
    """
    width, hidden, layers = shape.o_proj_input // tp, shape.hidden_size, len(shape.dtypes)
    sizes = topology.legal_sizes(dp, shape.o_proj_input, tp, shape.blocks[0])
    if shape.num_heads % tp or not sizes:
        raise _unusable(
            f"--dp is {dp} and --tp is {tp}: give a --tp that divides the {shape.num_heads} heads, "
            f"and a --dp with a divisor N above 1 for which {shape.blocks[0]} * N divides {width}"
        )

    # wo_a has heads_width x rank elements; wo_b's columns are groups x rank.
    first = shape.heads_width // tp * shape.o_proj_input // max(1, shape.groups)

    def joined(n: int) -> bool:
        """Tell whether a rank of `n` holds whole groups of wo_a: then both are one step."""
        return bool(first) and shape.groups % (tp * n) == 0

    def held(n: int, dtypes: Sequence[str]) -> int:
        elements = width // n * hidden + (first // n if joined(n) else first)
        return sum(-(-elements * WEIGHT_BITS[dtype] // 8) for dtype in dtypes)

    # MLA caches its vector on every tensor-parallel rank; GQA divides its heads among them.
    kv_bytes = max(1, shape.kv_heads // tp) * shape.kv_width * layers * WEIGHT_BITS[kv_dtype] // 8
    full, mtp_full = held(1, shape.dtypes), held(1, shape.mtp_dtypes)
    element = WEIGHT_BITS[shape.activation_dtype] // 8

    def sent(n: int, wire: str, out: int) -> dict[str, Any]:
        """Describe a dispatch of `out` bytes an element."""
        grid = topology.choose_grid(n, width, hidden, element, out, shape.blocks)
        return {"wire": wire, "grid": str(grid)} | {
            f"bytes_per_token{name}":
                topology.step_bytes(n, width // a, hidden // b, element, out) * layers
            for name, (a, b) in (("", grid), ("_Nx1", Grid(n, 1)), ("_1xN", Grid(1, n)))
            if hidden % b == 0
        }  # fmt: skip

    def both_sent(n: int) -> dict[str, Any]:
        """Describe the step of wo_a and wo_b: whole heads go out."""
        chunk = shape.heads_width // tp // n
        step = topology.step_bytes(n, chunk, hidden, element) * layers
        told = {"wire": shape.activation_dtype, "grid": str(Grid(n, 1)), "layers": "wo_a, wo_b"}
        return told | {"bytes_per_token": step, "bytes_per_token_Nx1": step}

    rows = []
    for n in sizes:
        kept = held(n, shape.dtypes)
        wires = [sent(n, shape.activation_dtype, element), sent(n, "8 bits", 1)]
        if first:
            wires = [both_sent(n)] * joined(n) + [wires[0] | {"layers": "wo_b"}]
        taken, waits = wires[shape.narrow and not first], 2 * layers * LATENCY
        step = taken["bytes_per_token"]
        gather = topology.gather_bytes(n, kept)
        saved, tokens = full - kept, (full - kept) // max(1, kv_bytes)
        rows.append({
            "otp_size": n, "o_proj_bytes_per_rank": kept,
            "saved_bytes_per_rank": saved, "saved_bytes_instance": saved * dp * tp,
            **({} if first else {
                "kv_tokens_per_rank": tokens, "kv_tokens_instance": tokens * dp,
                "weight_gather_bytes": gather,
                "weight_gather_rows": topology.gather_threshold(gather, step),
            }),
            "grid": taken["grid"], "exchange_bytes_per_token": step, "wires": wires,
            "seconds_latency": waits,
            "seconds_link": waits + step * batch / (1e9 * link),
            "seconds_slow_link": waits + step * batch / (1e9 * SLOW_LINK),
            "prefill": [{"rows": m, "exchange_bytes": step * m} for m in prefill_rows],
            "mtp_saved_bytes_per_rank": mtp_full - held(n, shape.mtp_dtypes),
        })  # fmt: skip
    unnamed = model.lower() in BUILTIN_MODELS or model.endswith(".json")
    options = f" --data-parallel-size {dp}" + (f" --tensor-parallel-size {tp}" if tp > 1 else "")
    served = f"vllm serve {'MODEL' if unnamed else shlex.quote(model)}{options}"
    size, reason = sizes[0], f"the smallest, because no group divides a node of {NODE} devices"
    # A group is of neighboring ranks: where it divides a node, it stays within one.
    if fitting := [n for n in sizes if NODE % (n * tp) == 0]:
        size, reason = fitting[-1], f"the largest whose groups divide a node of {NODE} devices"
    start = {"otp_size": size, "reason": reason, "command": f"{TOGGLE}={size} {served}"}
    counts = Counter(shape.dtypes)
    mixture = " + ".join(f"{dtype} x {count}" for dtype, count in counts.items())
    return {
        "model": model, "dp": dp, "tp": tp, "kv_dtype": kv_dtype, "batch": batch,
        "dispatch": taken["wire"], "link": link, "slow_link": SLOW_LINK, "latency": LATENCY,
        "dtype": mixture if len(counts) > 1 else shape.dtypes[0], "num_layers": layers,
        "activation_dtype": shape.activation_dtype, "mtp_layers": len(shape.mtp_dtypes),
        "hidden_size": hidden, "o_proj_input": shape.o_proj_input, "kv_bytes_per_token": kv_bytes,
        "unsharded_bytes_per_rank": full, "mtp_unsharded_bytes_per_rank": mtp_full,
        "weight_gather_buffer_bytes": 0 if first else max(held(1, [dtype]) for dtype in counts),
        "groups": shape.groups,
        "notes": shape.notes, "rows": rows, "start": None if DENSE in shape.notes else start,
    }  # fmt: skip


_DEFAULTS: dict[str, Any] = make_plan.__kwdefaults__ or {}


def _table(rows: Sequence[dict[str, Any]], *columns: tuple[str, str, str, str, float]) -> str:
    """Lay out columns of (title, unit, key in a row, format, divisor of a number), N first."""
    columns = (("N", "", "otp_size", ".0f", 1), *columns)
    lines = [[title for title, *_ in columns], [unit for _, unit, *_ in columns]]
    lines += [
        [cell if isinstance(cell := row.get(key, "-"), str) else format(cell / by, form)
         for *_, key, form, by in columns] for row in rows
    ]  # fmt: skip
    return "\n".join(f"{n:>4}" + "".join(f"{cell:>15}" for cell in cells) for n, *cells in lines)


def format_plan(plan: dict[str, Any]) -> str:
    """Return `plan` as text that fits a terminal of 80 columns, and the command to start with."""
    rows = plan["rows"]
    buffer, mtp = plan["weight_gather_buffer_bytes"], plan["mtp_unsharded_bytes_per_rank"]
    cache = f"One token of KV cache: {plan['kv_bytes_per_token']:,} B ({plan['kv_dtype']})."
    if not plan["kv_bytes_per_token"]:
        cache = "KV cache: compressed, not counted."
    groups, hidden, columns = plan["groups"], plan["hidden_size"], plan["o_proj_input"]
    name, kind = f"o_proj [{hidden}, {columns}]", ("dispatch", "", "wire", "", 1)
    if groups:
        name = f"wo_b [{hidden}, {columns}] and wo_a in {groups} groups"
        kind = ("one step of", "", "layers", "", 1)
    notes = [
        f"milliseconds are assumed, not measured: {plan['latency'] * 1e6:g} us for each of "
        f"{2 * plan['num_layers']} all-to-alls, and the bytes at the speed of a rank's link; the "
        "gain is memory, never speed",
        "rows travel in 8 bits where vllm-ascend has static W8A8; this model's in "
        f"{plan['dispatch']}",
    ]
    if buffer:
        notes.append(
            f"a weight gather needs a buffer of {buffer / GIB:.2f} GiB per rank for all layers"
        )
    if groups:
        notes[1:] = [
            "DeepSeek V4 has wo_a and wo_b in place of an o_proj; the column o_proj is the sum of "
            "both",
            "wo_b alone is sharded where N does not divide the groups of wo_a, and where the "
            "attention quantizes its output before wo_a; then it has a grid of its own",
        ]
    if mtp:
        notes.append(f"MTP is not counted: {mtp / GIB:.2f} GiB more o_proj per rank, sharded alike")
    lines = [
        plan["model"],
        f"{name} x {plan['num_layers']} layers, {plan['dtype']}, DP {plan['dp']}, TP {plan['tp']}",
        f"Not sharded: {plan['unsharded_bytes_per_rank'] / GIB:.2f} GiB on every rank. " + cache,
        "\nMemory",
        _table(rows,
            ("o_proj", "GiB/rank", "o_proj_bytes_per_rank", ".2f", GIB),
            ("saved", "GiB/rank", "saved_bytes_per_rank", ".2f", GIB),
            ("saved", "GiB, all", "saved_bytes_instance", ".1f", GIB),
            ("KV tokens", "per rank", "kv_tokens_per_rank", "+,.0f", 1),
            ("KV tokens", "all ranks", "kv_tokens_instance", "+,.0f", 1)),
        "\nDecode, bytes sent by a rank for one token, by type of the dispatch and by grid",
        _table([{**row, **wire} for row in rows for wire in row["wires"]],
            kind, ("grid", "", "grid", "", 1),
            ("on the grid", "MiB", "bytes_per_token", ".2f", MIB),
            ("N x 1", "MiB", "bytes_per_token_Nx1", ".2f", MIB),
            ("1 x N", "MiB", "bytes_per_token_1xN", ".2f", MIB)),
        f"\nDecode, what a step of {plan['batch']} rows takes longer with a dispatch in "
        f"{plan['dispatch']}",
        _table(rows,
            ("grid", "", "grid", "", 1),
            ("latency alone", "ms", "seconds_latency", ".2f", 1e-3),
            (f"{plan['link']} GB/s", "ms", "seconds_link", ".2f", 1e-3),
            (f"{plan['slow_link']} GB/s", "ms", "seconds_slow_link", ".2f", 1e-3)),
        "\nPrefill, bytes sent by a rank for one chunk",
        _table([{**row, **cost} for row in rows for cost in row["prefill"]],
            ("rows", "", "rows", ",.0f", 1),
            ("exchange", "GiB", "exchange_bytes", ".2f", GIB),
            ("weight gather", "GiB", "weight_gather_bytes", ".2f", GIB),
            ("gather pays", "from row", "weight_gather_rows", ",.0f", 1)),
        "",
    ]  # fmt: skip
    fill = partial(textwrap.fill, width=79, break_on_hyphens=False)
    lines += [fill(f"Note: {note}.") for note in (*notes, *plan["notes"])]
    if plan["start"]:
        lines.append("\nStart with N = {otp_size}, {reason}:\n{command}".format(**plan["start"]))
    return "\n".join(lines)


def load_model(model: str, weight_dtype: str | None = None) -> ModelShape:
    """Describe `model`: a built-in name, a folder with a `config.json`, such a file, a cached id.

    weight_dtype: a key of WEIGHT_BITS, instead of the configuration's. Raises OprojValueError.
    """
    if model.lower() in BUILTIN_MODELS:
        return parse_config(BUILTIN_MODELS[model.lower()], weight_dtype)
    try:
        path, cache = Path(model), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
        hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
        main = hub / f"models--{model.replace('/', '--')}/refs/main"
        if main.is_file() and not path.exists():
            path = main.parents[1] / "snapshots" / main.read_text().strip()
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_bytes())
        beside = {name: path.with_name(name) for name in DESCRIPTIONS}
        config |= {n: json.loads(file.read_bytes()) for n, file in beside.items() if file.is_file()}
        return parse_config(config, weight_dtype)
    except OprojValueError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        raise _unusable(
            f"MODEL is {model!r}, which cannot be read ({type(error).__name__}: {error}): "
            f"give {MODEL}"
        ) from None


def parse_config(config: dict[str, Any], weight_dtype: str | None = None) -> ModelShape:
    """Take a ModelShape from a `config.json`, to which `load_model` adds DESCRIPTIONS by name.

    Raises OprojValueError for an unusable value and KeyError for a missing field.
    """
    nested = [config.get(key) for key in ("text_config", "language_config", "llm_config")]
    inner: dict[str, Any] = next(filter(None, nested), {})
    text = config | {key: value for key, value in inner.items() if value is not None}
    linear = "linear_attention" in (text.get("layer_types") or ())
    if linear or text.get("linear_attn_config"):
        raise _unusable("config.json has linear attention: one kind of o_proj is accepted")
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    head_dim = text.get("head_dim") or hidden // heads
    v_head_dim = text.get("v_head_dim") or head_dim
    kv_heads, kv_width = text.get("num_key_value_heads") or heads, head_dim + v_head_dim
    if text.get("kv_lora_rank"):
        kv_heads, kv_width = 1, text["kv_lora_rank"] + text["qk_rope_head_dim"]
    groups, columns = 0, heads * v_head_dim
    if rank := text.get("o_lora_rank"):  # DeepSeek V4: its cache is compressed, layer by layer
        groups, kv_width = text["o_groups"], 0
        columns = groups * rank
    layers, mtp_layers = text["num_hidden_layers"], text.get("num_nextn_predict_layers") or 0
    plain = TORCH_DTYPES[text.get("torch_dtype") or text.get("dtype") or "bfloat16"]
    schemes, notes = [(weight_dtype or plain, 1)] * (layers + mtp_layers), []
    found = text.get("quantization_config") or text.get("compression_config") or {}
    for name, family in DESCRIPTIONS.items():
        if name in text and str(found.get("quant_method", family)).startswith(family):
            described = text[name].get("quantization", text[name])
            found = {**described, "quant_method": family, **found}
    # As `VllmAscend.wire_bytes` and `grid.fewest_bytes` decide.
    kinds = [kind for name, kind in found.items() if name.endswith(".o_proj.weight")]
    narrow = found.get("quant_method") == "ascend" and not weight_dtype
    narrow = narrow and 2 * kinds.count("W8A8") > len(kinds)
    quantized = weight_dtype not in TORCH_DTYPES.values() if weight_dtype else found
    if found and not weight_dtype:
        roots = ("model.language_model", "language_model.model") if inner else ("model",)
        attention = "attn.wo_b" if groups else "self_attn.o_proj"
        for index in range(layers + mtp_layers):
            names = [f"{root}.layers.{index}.{attention}" for root in roots]
            schemes[index] = _scheme(found, names) or (plain, 1)
        notes.append("the quantization tells the data type of each o_proj: --dtype says otherwise")
    if not any(text.get(key) for key in EXPERT_COUNTS):
        notes.append(DENSE)
    if text.get("index_head_dim"):
        notes.append("of sparse attention, index cache and scales of an fp8 cache are not counted")
    dtypes, blocks = zip(*schemes, strict=True)
    return ModelShape(
        hidden_size=hidden, num_heads=heads, o_proj_input=columns, groups=groups,
        heads_width=heads * v_head_dim if groups else 0,
        kv_heads=kv_heads, kv_width=kv_width, activation_dtype=plain, notes=notes,
        dtypes=dtypes[:layers], mtp_dtypes=dtypes[layers:], narrow=narrow,
        blocks=(math.lcm(*blocks), QUANTIZED_OUTPUTS if quantized else 1),
    )  # fmt: skip


def _equal_or_regex(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


# The lists of excluded modules that a method reads, and how vLLM compares an entry with a name.
_EXCLUSIONS: dict[str, tuple[tuple[str, ...], Callable[[str, str], bool]]] = {
    "fp8": (("ignored_layers", "modules_to_not_convert"), str.__eq__),
    "fbgemm_fp8": (("modules_to_not_convert",), str.__eq__),
    "compressed-tensors": (("ignore",), _equal_or_regex),
    "awq": (("modules_to_not_convert",), lambda entry, name: entry in name),
    "modelopt": (("ignore", "exclude_modules"), lambda e, name: e in name or fnmatch(name, e)),
}
# Data type, and how many input columns share a scale.
_MODELOPT_ALGORITHMS = {
    "FP8": ("fp8", 1), "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", 1), "FP8_PB_WO": ("fp8", 128),
    "MXFP8": ("fp8", 32), "NVFP4": ("fp4", 16), "W4A16_NVFP4": ("fp4", 16),
}  # fmt: skip


def _scheme(quantization: dict[str, Any], names: Sequence[str]) -> tuple[str, int] | None:
    """Return data type and block of the o_proj with one of `names`; None: it is not quantized."""
    method = str(quantization.get("quant_method"))
    dtype, block = "", quantization.get("group_size")
    for family, (keys, matches) in _EXCLUSIONS.items():
        entries = [entry for key in keys for entry in quantization.get(key) or ()]
        if method.startswith(family) and any(matches(e, name) for e in entries for name in names):
            return None
    if method == "mxfp4":  # vLLM quantizes only the experts.
        return None
    if method in ("fp8", "fbgemm_fp8"):
        dtype, block = "fp8", (quantization.get("weight_block_size") or (1, 1))[1]
    elif method.startswith(("gptq", "awq", "auto-round")):
        dtype = f"int{quantization.get('bits', quantization.get('w_bit'))}"
    elif method.startswith("modelopt"):
        # MIXED_PRECISION lists the layers and the algorithm of each.
        layers = quantization.get("quantized_layers") or dict.fromkeys(names, quantization)
        told = [layers[name].get("quant_algo") for name in names if name in layers]
        if not told:
            return None
        dtype, block = _MODELOPT_ALGORITHMS.get(str(told[0]).upper(), ("", 1))
    elif method == "ascend":
        # ModelSlim names an o_proj's weight with `W8A8` or the like; where it names others, FLOAT.
        weights = [f"{name}.{end}" for name in names for end in ("weight", "weight_packed")]
        absent = "FLOAT" if any(".o_proj." in key for key in quantization) else ""
        kind = next((quantization[name] for name in weights if name in quantization), absent)
        if kind == "FLOAT":
            return None
        dtype = ("fp" if "FP" in kind else "int") + kind.removeprefix("W").partition("A")[0]
    elif method == "compressed-tensors":
        # The group of which a target names the module; else one that names its class.
        groups = quantization["config_groups"].values()
        targets = [(target, g.get("weights")) for g in groups for target in g["targets"]]
        by_name = [w for target, w in targets if any(_equal_or_regex(target, n) for n in names)]
        by_class = [w for target, w in targets if target.lower() in "rowparallellinear"]
        weight = next(iter(by_name + by_class), None)
        if not weight:
            return None
        dtype = f"{weight['type'].replace('float', 'fp')}{weight['num_bits']}"
        block = (weight.get("block_structure") or (1, weight.get("group_size")))[1]
    if dtype in WEIGHT_BITS:
        return dtype, block if isinstance(block, int) and block > 0 else 1
    raise _unusable(
        f"the quantization has quant_method = {method!r}, from which the data type of {names[0]} "
        f"cannot be told: name it with --dtype ({', '.join(WEIGHT_BITS)})"
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the `plan` command; its `func` default is `run`."""
    about = "show what each group size saves and costs for a model"
    parser = subparsers.add_parser("plan", help=about, description=__doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("model", metavar="MODEL", help=MODEL)
    add("--dp", type=_positive, help=f"data-parallel ranks {default}")
    add("--tp", type=_positive, help=f"tensor-parallel ranks {default}")
    add("--batch", type=_positive, help=f"rows of a decode step on each rank {default}")
    add("--prefill-rows", type=_positive, nargs="+", help="rows of a chunk (default: 4096)")
    add("--link", type=_positive, help=f"GB/s that a rank sends {default}")
    add("--dtype", choices=WEIGHT_BITS, help="data type of o_proj (default: the configuration's)")
    add("--kv-dtype", choices=("bf16", "fp8", "int8"), help=f"KV cache {default}")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run, **_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0. Raises OprojValueError when an input is unusable."""
    options = {name: getattr(args, name) for name in _DEFAULTS}
    plan = make_plan(args.model, load_model(args.model, args.dtype), **options)
    print(json.dumps(plan, indent=2) if args.json else format_plan(plan))
    return 0


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} found, an integer of 1 or more is accepted")
