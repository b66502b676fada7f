"""``oproj-patch plan``: what each otp group size saves and costs, by arithmetic alone.

Sizes are of o_proj weights: quantization scales and biases are not counted. Needs neither torch
nor vLLM.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oproj_patch.cli.model_config import (
    BUILTIN_MODELS,
    WEIGHT_BITS,
    InputError,
    ModelShape,
    load_model,
)
from oproj_patch.topology import legal_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GIB = 2**30
MIB = 2**20
_MAX_RANKS = 2**16
_MAX_ROWS = 2**24


def legal_otp_sizes(dp: int, inputs: int, tp: int = 1, block: int = 1) -> list[int]:
    """Return the group sizes N >= 2 that ``dp`` ranks and an o_proj of ``inputs`` channels allow.

    ``block`` is the quantization block length, of which every shard must be a whole multiple.
    """
    return [n for n in legal_sizes(dp, inputs, tp) if inputs % (tp * n * block) == 0]


def weight_bytes(inputs: int, outputs: int, bits: int) -> int:
    """Return the bytes of one ``[outputs, inputs]`` weight of ``bits`` bits a value."""
    return _divide_up(inputs * outputs * bits, 8)


def kv_bytes_per_token(shape: ModelShape, tp: int, kv_bits: int) -> int:
    """Return the KV-cache bytes that one token takes on one rank, over all decoder layers.

    MLA caches one latent vector on every tensor-parallel rank; GQA divides its KV heads among
    them, at least one each.
    """
    grouped = 2 * max(1, shape.num_kv_heads // tp) * shape.head_dim
    values = shape.latent_width or grouped
    return values * shape.num_layers * kv_bits // 8


def exchange_bytes(rows: int, otp_size: int, width: int, hidden: int, element_bytes: int) -> int:
    """Return the bytes that a rank sends in one layer when activations are exchanged.

    ``rows`` tokens of ``width`` input channels go out in shards, and ``otp_size - 1`` partial
    results of ``hidden`` channels go back for as many rows of other ranks.
    """
    out = (otp_size - 1) * (width // otp_size)
    back = (otp_size - 1) * hidden
    return element_bytes * rows * (out + back)


def weight_gather_bytes(otp_size: int, width: int, hidden: int, bits: int) -> int:
    """Return the bytes that a rank sends in one layer when weight shards are gathered instead."""
    return (otp_size - 1) * weight_bytes(width // otp_size, hidden, bits)


def weight_gather_rows(
    otp_size: int, width: int, hidden: int, bits: int, element_bytes: int
) -> int:
    """Return T*, the least rows per rank at which a weight gather moves no more bytes.

    With weights and activations of the same size: ``K*H / (K + N*H)``, rounded up.
    """
    gather = weight_gather_bytes(otp_size, width, hidden, bits)
    return _divide_up(gather, exchange_bytes(1, otp_size, width, hidden, element_bytes))


@dataclass(frozen=True)
class PrefillCost:
    """Bytes that a rank sends for a prefill chunk of ``rows`` rows, all layers, by each scheme."""

    rows: int
    exchange_bytes: int
    weight_gather_bytes: int


@dataclass(frozen=True)
class Row:
    """What one group size means. Bytes sent are of one rank, over all decoder layers."""

    otp_size: int
    o_proj_bytes_per_rank: int
    saved_bytes_per_rank: int
    saved_bytes_instance: int
    kv_tokens_per_rank: int
    kv_tokens_instance: int
    exchange_bytes_per_token: int
    exchange_bytes_per_step: int
    weight_gather_rows: int
    prefill: tuple[PrefillCost, ...]
    mtp_saved_bytes_per_rank: int


@dataclass(frozen=True)
class Plan:
    """All rows for one model and deployment, and the figures that do not depend on N."""

    model: str
    dp: int
    tp: int
    dtype: str
    kv_dtype: str
    activation_dtype: str
    batch: int
    hidden_size: int
    o_proj_input: int
    num_layers: int
    mtp_layers: int
    unsharded_bytes_per_rank: int
    mtp_unsharded_bytes_per_rank: int
    kv_bytes_per_token: int
    weight_gather_buffer_bytes: int
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def make_plan(
    model: str,
    shape: ModelShape,
    *,
    dp: int = 32,
    tp: int = 1,
    kv_dtype: str = "bf16",
    batch: int = 24,
    prefill_rows: Sequence[int] = (4096,),
) -> Plan:
    """Compute the plan of ``shape`` on ``dp`` x ``tp`` ranks.

    ``batch`` is the rows of a decode step on each rank, ``prefill_rows`` those of a prefill chunk.
    Raises :class:`InputError` when the heads do not divide by ``tp`` or no group size is legal.
    """
    if shape.num_heads % tp:
        raise InputError(
            f"--tp is {tp}, which does not divide the model's {shape.num_heads} attention heads: "
            "give a divisor of it"
        )
    width = shape.o_proj_input // tp
    sizes = legal_otp_sizes(dp, shape.o_proj_input, tp, shape.quant_block)
    if not sizes:
        multiple = f" into multiples of {shape.quant_block}" if shape.quant_block > 1 else ""
        raise InputError(
            f"--dp is {dp}, of which no divisor from 2 up splits the o_proj input of {width} "
            f"channels per rank evenly{multiple}: give a --dp that has one"
        )
    hidden, layers = shape.hidden_size, shape.num_layers
    bits = WEIGHT_BITS[shape.weight_dtype]
    element_bytes = WEIGHT_BITS[shape.activation_dtype] // 8
    kv_bytes = kv_bytes_per_token(shape, tp, WEIGHT_BITS[kv_dtype])
    full = weight_bytes(width, hidden, bits)

    rows = []
    for n in sizes:
        shard = weight_bytes(width // n, hidden, bits)
        saved = (full - shard) * layers
        token = exchange_bytes(1, n, width, hidden, element_bytes) * layers
        gather = weight_gather_bytes(n, width, hidden, bits) * layers
        rows.append(
            Row(
                otp_size=n,
                o_proj_bytes_per_rank=shard * layers,
                saved_bytes_per_rank=saved,
                saved_bytes_instance=saved * dp * tp,
                kv_tokens_per_rank=saved // kv_bytes,
                kv_tokens_instance=saved // kv_bytes * dp,
                exchange_bytes_per_token=token,
                exchange_bytes_per_step=token * batch,
                weight_gather_rows=weight_gather_rows(n, width, hidden, bits, element_bytes),
                prefill=tuple(PrefillCost(r, token * r, gather) for r in prefill_rows),
                mtp_saved_bytes_per_rank=(full - shard) * shape.mtp_layers,
            )
        )
    return Plan(
        model=model,
        dp=dp,
        tp=tp,
        dtype=shape.weight_dtype,
        kv_dtype=kv_dtype,
        activation_dtype=shape.activation_dtype,
        batch=batch,
        hidden_size=hidden,
        o_proj_input=shape.o_proj_input,
        num_layers=layers,
        mtp_layers=shape.mtp_layers,
        unsharded_bytes_per_rank=full * layers,
        mtp_unsharded_bytes_per_rank=full * shape.mtp_layers,
        kv_bytes_per_token=kv_bytes,
        weight_gather_buffer_bytes=full,
        notes=shape.notes,
        rows=tuple(rows),
    )


def format_plan(plan: Plan) -> str:
    """Return ``plan`` as text that fits a terminal of 80 columns."""
    lines = [
        _printable(plan.model) if len(plan.model) < 80 else f"...{_printable(plan.model[-76:])}",
        (
            f"o_proj [{plan.hidden_size}, {plan.o_proj_input}] x {plan.num_layers} layers, "
            f"{plan.dtype}, DP {plan.dp}, TP {plan.tp}"
        ),
        (
            f"Not sharded: {plan.unsharded_bytes_per_rank / GIB:.2f} GiB on every rank. "
            f"One token of KV cache: {plan.kv_bytes_per_token:,} B ({plan.kv_dtype})."
        ),
        "",
        "Memory",
    ]
    header = ["N", "o_proj", "saved", "saved", "KV tokens", "KV tokens"]
    units = ["", "GiB/rank", "GiB/rank", "GiB, all", "per rank", "all ranks"]
    lines += _table(
        [header, units],
        [
            [
                str(row.otp_size),
                f"{row.o_proj_bytes_per_rank / GIB:.2f}",
                f"{row.saved_bytes_per_rank / GIB:.2f}",
                f"{row.saved_bytes_instance / GIB:.1f}",
                f"+{row.kv_tokens_per_rank:,}",
                f"+{row.kv_tokens_instance:,}",
            ]
            for row in plan.rows
        ],
    )
    lines += ["", f"Decode, bytes sent by a rank ({plan.activation_dtype} activations)"]
    lines += _table(
        [["N", "one token", f"step of {plan.batch}"], ["", "MiB", "MiB"]],
        [
            [
                str(row.otp_size),
                f"{row.exchange_bytes_per_token / MIB:.2f}",
                f"{row.exchange_bytes_per_step / MIB:.1f}",
            ]
            for row in plan.rows
        ],
    )
    lines += ["", "Prefill, bytes sent by a rank for one chunk"]
    lines += _table(
        [["N", "rows", "exchange", "weight gather", "gather pays"], ["", "", "GiB", "GiB", "from"]],
        [
            [
                str(row.otp_size),
                f"{cost.rows:,}",
                f"{cost.exchange_bytes / GIB:.2f}",
                f"{cost.weight_gather_bytes / GIB:.2f}",
                f"{row.weight_gather_rows:,} rows",
            ]
            for row in plan.rows
            for cost in row.prefill
        ],
    )
    buffer = plan.weight_gather_buffer_bytes / GIB
    notes = [f"a weight gather needs a buffer of {buffer:.2f} GiB per rank, shared by all layers"]
    if plan.mtp_layers:
        notes.append(
            f"{plan.mtp_layers} MTP layer{'s' * (plan.mtp_layers > 1)} not counted: "
            f"{plan.mtp_unsharded_bytes_per_rank / GIB:.2f} GiB more o_proj per rank when loaded, "
            "sharded alike"
        )
    notes.extend(plan.notes)
    lines.append("")
    for note in notes:
        lines += _wrap(f"Note: {note}.")
    return "\n".join(lines)


def save_plot(plan: Plan, path: Path) -> None:
    """Draw memory and bytes sent over N into ``path`` (``.svg`` or ``.png``).

    Raises :class:`InputError` when matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--plot needs matplotlib, which is not installed: pip install 'oproj_patch[plot]'"
        ) from None
    labels = [str(row.otp_size) for row in plan.rows]
    kept = [row.o_proj_bytes_per_rank / GIB for row in plan.rows]
    saved = [row.saved_bytes_per_rank / GIB for row in plan.rows]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{_printable(plan.model)}: {plan.dtype}, DP {plan.dp}, TP {plan.tp}")
    memory, traffic = figure.subplots(1, 2)
    memory.bar(labels, kept, color="#1f5fa8", label="kept")
    memory.bar(labels, saved, bottom=kept, color="#b9d3ee", label="saved")
    memory.set(xlabel="otp group size N", ylabel="GiB per rank", title="o_proj weights")
    memory.set_ylim(0, 1.2 * (kept[0] + saved[0]))
    memory.legend(loc="upper center", ncols=2)
    # From one row to beyond the largest crossing, so that every crossing is in the picture.
    most = 4 * max(row.weight_gather_rows for row in plan.rows)
    for row in plan.rows:
        rows = [1, most]
        sent = [row.exchange_bytes_per_token * r / MIB for r in rows]
        (line,) = traffic.plot(rows, sent, label=f"N = {row.otp_size}")
        gather = row.prefill[0].weight_gather_bytes / MIB
        traffic.plot(rows, [gather, gather], color=line.get_color(), linestyle=":", linewidth=1)
    traffic.set(
        xscale="log",
        yscale="log",
        xlabel="rows per rank",
        ylabel="MiB sent per rank",
        title="exchange (lines), weight gather (dotted)",
    )
    traffic.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(
            f"--plot {_printable(str(path))} cannot be written ({error.strerror}): name a file "
            "in a directory that you may write to"
        ) from None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the ``plan`` command; its ``func`` default is :func:`run`."""
    parser = subparsers.add_parser(
        "plan",
        help="show what each group size saves and costs for a model",
        description="Show, for each legal otp group size N, the memory that sharding o_proj "
        "saves and the bytes that it sends. Arithmetic only: needs neither torch nor vLLM.",
        epilog="Quantization scales and biases are not counted.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a directory, a config.json, or one of {', '.join(BUILTIN_MODELS)}",
    )
    parser.add_argument(
        "--dp", type=_count(_MAX_RANKS), default=32, help="data-parallel ranks (default: 32)"
    )
    parser.add_argument(
        "--tp", type=_count(_MAX_RANKS), default=1, help="tensor-parallel ranks (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=list(WEIGHT_BITS),
        help="data type of the o_proj weight (default: what the configuration says)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("bf16", "fp8", "int8"),
        default="bf16",
        help="data type of the KV cache (default: bf16)",
    )
    parser.add_argument(
        "--batch",
        type=_count(_MAX_ROWS),
        default=24,
        help="rows of a decode step on each rank (default: 24)",
    )
    parser.add_argument(
        "--prefill-rows",
        type=_count(_MAX_ROWS),
        nargs="+",
        default=[4096],
        metavar="ROWS",
        help="rows of a prefill chunk on each rank (default: 4096)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", type=_plot_path, metavar="FILE", help="also draw into FILE, .svg or .png"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0. Raises :class:`InputError` when an input is unusable."""
    shape = load_model(args.model, args.dtype)
    plan = make_plan(
        args.model,
        shape,
        dp=args.dp,
        tp=args.tp,
        kv_dtype=args.kv_dtype,
        batch=args.batch,
        prefill_rows=args.prefill_rows,
    )
    if args.plot is not None:
        save_plot(plan, args.plot)
    print(json.dumps(asdict(plan), indent=2) if args.json else format_plan(plan))
    return 0


def _divide_up(value: int, by: int) -> int:
    return -(-value // by)


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{_printable(text)} found, an integer from 1 to {most} is accepted"
            )
        return value

    return parse


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(
            f"{_printable(text)} found, a file name ending in .svg or .png is accepted"
        )
    return path


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _table(header: list[list[str]], body: list[list[str]]) -> list[str]:
    cells = [*header, *body]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=79, subsequent_indent="  ")
