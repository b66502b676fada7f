"""Time of one o_proj on real gloo ranks: unsharded, the built-in way, and as oproj_patch runs it.

    python benchmarks/o_proj.py [--quick] [--json] [--plot FILE] [--ascend RELEASE]

Every rank is a process with one thread. All contenders run in the same processes, by turns,
on vLLM's own linear layers; a time is the slowest rank's, the median over the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"r1": (16384, 7168), "small": (2048, 512)}
"""Name -> (input columns K, hidden)."""
CONTENDERS = ("unsharded", "gemm", "builtin", "oproj_patch")


@dataclass(frozen=True)
class Run:
    """One set of processes: `counts` is a list of cases, each the rows of every rank.

    gemm: False replaces the local GEMM by nothing, so that only communication is timed.
    """

    shape: str
    ranks: int
    dtype: str
    counts: list[list[int]]
    gemm: bool = True


def equal(ranks: int, rows: Sequence[int]) -> list[list[int]]:
    return [[count] * ranks for count in rows]


QUICK = (
    Run("r1", 2, "bfloat16", [*equal(2, (1, 24, 256, 1024)), [1, 2048], [0, 24]]),
    Run("small", 4, "float32", equal(4, (1, 64, 1024))),
    Run("small", 2, "int8", equal(2, (1, 64, 1024))),
)
FULL = (
    Run("r1", 2, "bfloat16", [*equal(2, (1, 8, 24, 64, 256, 1024, 2048)), [1, 2048], [0, 24]]),
    Run("r1", 4, "bfloat16", [*equal(4, (1, 8, 24, 64, 256, 1024)), [0, 24, 1, 24]]),
    Run("r1", 4, "bfloat16", equal(4, (4096,))),
    *(Run("r1", ranks, "float32", equal(ranks, (1, 24, 256, 1024))) for ranks in (2, 4, 8)),
    Run("r1", 2, "int8", equal(2, (1, 24, 256, 1024))),
    *(
        Run("small", ranks, dtype, equal(ranks, (1, 8, 24, 64, 256, 1024, 2048, 4096)))
        for ranks in (2, 4, 8)
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Run("r1", ranks, "bfloat16", equal(ranks, (1, 8, 24, 64, 256, 1024, 4096)), gemm=False)
        for ranks in (2, 4, 8)
    ),
)


# ---- in a rank -------------------------------------------------------------------------------


def measure(
    shape: str,
    ranks: int,
    dtype: str,
    counts: list[list[int]],
    gemm: bool,
    seconds: float,
    pairs: int,
) -> dict[str, Any]:
    """Body of a rank: its seconds for every case, contender and repetition, and bytes sent.

    pairs: unless 0, only the built-in and ours take turns, at least so many times.
    """
    import torch
    import torch.distributed as dist

    import oproj_patch
    from tests.ranks.layers import groups

    columns, hidden = SHAPES[shape]
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    kind = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    torch.set_default_dtype(kind)
    with groups(ranks) as config, torch.inference_mode():
        layers = _layers(columns, hidden, ranks, rank, dtype, gemm)
        assert oproj_patch.status().layers == 1
        # What happens once only, such as the comparison of layers, is neither counted nor timed.
        with _forward_context(config, rank, [1] * ranks):
            layers["oproj_patch"](torch.randn(1, columns))
        builtin, label = _builtin(layers["builtin"], ranks)
        results = []
        for case in counts:
            rows = case[rank]
            x = torch.randn(rows, columns)
            local = torch.randn(sum(case) if gemm else 0, columns // ranks)
            clock = {name: _Clock(layers[name]) for name in ("builtin", "oproj_patch")}
            if not gemm:
                partial = torch.randn(sum(case), hidden)
                for one in clock.values():
                    one.method.apply = functools.partial(_nothing, partial)
            calls: dict[str, Callable[[], Any]] = {
                "unsharded": functools.partial(layers["unsharded"], x),
                "gemm": functools.partial(_apply, layers["builtin"], local),
                "builtin": functools.partial(builtin, x),
                "oproj_patch": functools.partial(layers["oproj_patch"], x),
            }
            if len(set(case)) > 1:
                del calls["builtin"]
            if not gemm:
                del calls["unsharded"], calls["gemm"]
                calls["weight_gather"] = functools.partial(_gather, layers["oproj_patch"])
            if pairs:
                calls = {name: calls[name] for name in clock if name in calls}
            with _forward_context(config, rank, case):
                sent = {
                    name: _bytes_sent(call, ranks, rank)
                    for name, call in calls.items()
                    if name not in ("unsharded", "gemm")
                }
                errors = _errors(calls, x, layers["whole"]) if _checks(case, gemm, dtype) else {}
                times, outside = _time(calls, clock, seconds, pairs)
            for one in clock.values():
                one.stop()
            results.append({"sent": sent, "seconds": times, "outside": outside, "errors": errors})
            dist.barrier()
    return {"builtin": label, "cases": results}


def _checks(case: list[int], gemm: bool, dtype: str) -> bool:
    return gemm and dtype != "int8" and max(case) <= 64


def _layers(
    columns: int, hidden: int, ranks: int, rank: int, dtype: str, gemm: bool
) -> dict[str, Any]:
    """vLLM's layers: the whole o_proj (where it is used), the built-in's shard of it, and ours."""
    import torch
    from vllm.model_executor.layers.linear import RowParallelLinear

    generator = torch.Generator().manual_seed(0)
    width = columns if gemm else 1
    whole = torch.randn(hidden, width, generator=generator).div_(columns**0.5)
    quantized = _int8_config() if dtype == "int8" else None

    def build(width: int, name: str, weight: torch.Tensor) -> Any:
        layer = RowParallelLinear(
            width, hidden, bias=False, quant_config=quantized, return_bias=False, prefix=name
        )
        if quantized is None:
            layer.weight.data.copy_(weight)
        else:
            layer.weight.data.random_(-127, 127)
            layer.weight_scale.data.fill_(0.01)
        # vLLM's own switch: leave the weight where it can be read, and gathered.
        layer._cpu_skip_gemm_dispatch = not gemm
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    chunk = columns // ranks
    mine = whole[:, rank * chunk : (rank + 1) * chunk] if gemm else whole
    return {
        "whole": whole,
        "unsharded": build(width, "benchmark.whole", whole),
        "builtin": build(chunk, "benchmark.shard", mine),
        "oproj_patch": build(columns, "model.layers.0.self_attn.o_proj", mine),
    }


def _int8_config() -> Any:
    """Weights int8 per output channel, activations int8 per row when they arrive."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                    "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
                }
            },
        }
    )


def _gather(layer: Any) -> Any:
    """Fetch the other ranks' shards, without the GEMM."""
    from oproj_patch.sharding import weight_gather

    return weight_gather._gather(layer, layer.oproj.group)


def _nothing(result: Any, _: Any, x: Any, *__: Any, **___: Any) -> Any:
    return result[: x.shape[0]]


def _apply(layer: Any, x: Any) -> Any:
    return layer.quant_method.apply(layer, x, None)


def _builtin(layer: Any, ranks: int) -> tuple[Callable[[Any], Any], str]:
    """The built-in operation on `layer`, and what it is."""
    from vllm.distributed import parallel_state

    group = parallel_state.init_model_parallel_group(
        [list(range(ranks))], int(os.environ["RANK"]), "gloo", group_name="benchmark"
    )
    try:
        import importlib.metadata

        from vllm_ascend.distributed import parallel_state as ascend_state
        from vllm_ascend.ops.linear_op import OProjRowParallelOp
    except Exception as error:
        label = f"recipe of vllm-ascend's OProjRowParallelOp ({type(error).__name__} on import)"
        return lambda x: _recipe(layer, x, group), label
    ascend_state._OTP = group
    op = OProjRowParallelOp(layer)
    op.update_attrs()
    version = importlib.metadata.version("vllm-ascend")
    return lambda x: op.apply_impl(x)[0], f"OProjRowParallelOp of vllm-ascend {version}"


def _recipe(layer: Any, x: Any, group: Any) -> Any:
    """What the built-in operation does, step by step, on vLLM's own group object."""
    import torch
    import torch.distributed as dist

    rows, chunk, ranks = x.shape[0], layer.input_size, group.world_size
    # The rank that a piece goes to becomes the outermost dimension of one flat send buffer.
    outgoing = x.reshape(-1, ranks, chunk).transpose(0, 1).contiguous().view(-1)
    arrived = torch.empty(rows * ranks * chunk, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(arrived, outgoing, group=group.device_group)
    partial = _apply(layer, arrived.view(rows * ranks, chunk))
    return group.reduce_scatter(partial, dim=0).view(rows, layer.output_size)


def _forward_context(config: Any, rank: int, case: list[int]) -> Any:
    """vLLM's forward context with the row counts that its scheduler has synchronised."""
    import torch
    from vllm.forward_context import set_forward_context

    return set_forward_context(
        None, config, num_tokens=case[rank], num_tokens_across_dp=torch.tensor(case)
    )


class _Clock:
    """Seconds spent in one layer's GEMM."""

    def __init__(self, layer: Any) -> None:
        self.method = layer.quant_method
        self.seconds = 0.0
        apply = self.method.apply

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = apply(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        self.method.apply = timed

    def stop(self) -> None:
        del self.method.apply


def _time(
    calls: dict[str, Callable[[], Any]], clocks: dict[str, _Clock], seconds: float, pairs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per call of every repetition, and the part of it spent outside of the GEMM.

    Contenders take turns; a repetition is a burst of calls, as the layers of a model are.
    """
    import torch
    import torch.distributed as dist

    def burst(name: str, length: int) -> tuple[float, float]:
        clock = clocks.get(name)
        before = clock.seconds if clock else 0.0
        dist.barrier()
        start = time.perf_counter()
        for _ in range(length):
            calls[name]()
        total = time.perf_counter() - start
        return total / length, (total - (clock.seconds - before if clock else 0.0)) / length

    # The first call of a shape makes the kernel library plan it, and buffers their size.
    first = sum(burst(name, 1)[0] for name in calls) / len(calls)
    slowest = torch.tensor(first, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    one = float(slowest)
    length = max(1, min(61, int(0.25 / one)))
    repetitions = max(pairs or 3, min(40, int(seconds / (one * length * len(calls)))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    outside: dict[str, list[float]] = {name: [] for name in clocks if name in calls}
    order = list(calls)
    for repetition in range(repetitions):
        for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
            total, rest = burst(name, length)
            times[name].append(total)
            if name in outside:
                outside[name].append(rest)
    return times, outside


def _bytes_sent(call: Callable[[], Any], ranks: int, rank: int) -> int:
    """Bytes this rank gives to others in one call, counted at the collective calls."""
    import torch.distributed as dist

    sent = 0

    def size(tensor: Any) -> int:
        count: int = tensor.numel() * tensor.element_size()
        return count

    def all_to_all(
        output: Any, input_: Any, out: Any = None, splits: Any = None, **options: Any
    ) -> Any:
        nonlocal sent
        kept = splits[rank] / max(1, sum(splits)) if splits else 1 / ranks
        sent += round(size(input_) * (1 - kept))
        return originals["all_to_all_single"](output, input_, out, splits, **options)

    def reduce_scatter(output: Any, input_: Any, *args: Any, **options: Any) -> Any:
        nonlocal sent
        sent += size(input_) * (ranks - 1) // ranks
        return originals["reduce_scatter_tensor"](output, input_, *args, **options)

    def send(tensor: Any, *args: Any, **options: Any) -> Any:
        nonlocal sent
        sent += size(tensor)
        return originals["isend"](tensor, *args, **options)

    def all_gather(outputs: Any, tensor: Any, *args: Any, **options: Any) -> Any:
        nonlocal sent
        sent += size(tensor) * (ranks - 1)
        return originals["all_gather"](outputs, tensor, *args, **options)

    counting = {
        "all_to_all_single": all_to_all,
        "reduce_scatter_tensor": reduce_scatter,
        "isend": send,
        "all_gather": all_gather,
    }
    originals = {name: getattr(dist, name) for name in counting}
    with _replaced(dist, counting):
        call()
    return sent


@contextlib.contextmanager
def _replaced(module: Any, functions: dict[str, Any]) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def _errors(calls: dict[str, Callable[[], Any]], x: Any, whole: Any) -> dict[str, float]:
    """Largest error against float64, relative to the largest output."""
    if not x.numel():
        # Every rank must make the same calls.
        for name in calls:
            calls[name]()
        return {}
    expected = x.double() @ whole.double().t()
    scale = float(expected.abs().max())
    return {
        name: float((call().double() - expected).abs().max()) / scale
        for name, call in calls.items()
        if name != "gemm"
    }


# ---- in the parent ---------------------------------------------------------------------------


def exact_bytes(case: Sequence[int], columns: int, hidden: int, size: int) -> int:
    """The least the group sends for one o_proj: every chunk and every partial once."""
    others = len(case) - 1
    total = sum(case)
    return size * sum(
        rows * columns // len(case) * others + (total - rows) * hidden for rows in case
    )


def summarise(run: Run, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result for each case of a run, from what its ranks measured."""
    columns, hidden = SHAPES[run.shape]
    results = []
    for index, case in enumerate(run.counts):
        told = [rank["cases"][index] for rank in ranks]
        slowest = {
            name: [max(both) for both in zip(*(t["seconds"][name] for t in told), strict=True)]
            for name in told[0]["seconds"]
        }
        seconds = {name: statistics.median(slowest[name]) for name in slowest}
        # A rank that is done first waits for the other: the least is what communication takes.
        outside = {
            name: statistics.median(
                [min(both) for both in zip(*(t["outside"][name] for t in told), strict=True)]
            )
            for name in told[0]["outside"]
        }
        sharded = ("builtin", "oproj_patch")
        communication = {
            name: seconds[name] - seconds.get("gemm", 0.0) for name in sharded if name in seconds
        }
        sent = {name: sum(t["sent"][name] for t in told) for name in told[0]["sent"]}
        size = {"float32": 4}.get(run.dtype, 2)
        results.append(
            {
                "shape": run.shape,
                "rows": max(case),
                "counts": case,
                "ranks": run.ranks,
                "dtype": run.dtype,
                "gemm_left_out": not run.gemm,
                "seconds": {**dict.fromkeys(CONTENDERS), **seconds},
                "quartiles": {
                    name: statistics.quantiles(values, n=4)[::2] for name, values in slowest.items()
                },
                "repetitions": len(next(iter(slowest.values()))),
                "communication": communication,
                "outside_gemm": outside,
                "bytes_sent": {**sent, "minimum": exact_bytes(case, columns, hidden, size)},
                "errors": {
                    name: max(t["errors"].get(name, 0.0) for t in told)
                    for name in told[0]["errors"] or told[-1]["errors"]
                },
            }
        )
    return results


def ratio(values: dict[str, Any]) -> float | None:
    """Ours over the built-in's, where there are both."""
    ours, builtin = values.get("oproj_patch"), values.get("builtin")
    return ours / builtin if ours is not None and builtin and builtin > 0 else None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown tables; times in milliseconds, bytes in MiB."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value / (1 << 20):.3g}"

    whole = [
        "| shape | N | dtype | rows | unsharded | GEMM alone | builtin | oproj_patch "
        "| total, ours/builtin | communication | outside the GEMM | bytes / minimum |",
        "|" + " --- |" * 12,
    ]
    parts = [
        "| shape | N | dtype | rows | builtin | oproj_patch | weight gather | ours/builtin "
        "| MiB sent: builtin | oproj_patch | weight gather |",
        "|" + " --- |" * 11,
    ]
    for result in results:
        counts, seconds = result["counts"], result["seconds"]
        rows = counts[0] if len(set(counts)) == 1 else "+".join(map(str, counts))
        sent = result["bytes_sent"]
        cells = [result["shape"], result["ranks"], result["dtype"], rows]
        if result["gemm_left_out"]:
            names = ("builtin", "oproj_patch", "weight_gather")
            cells += [ms(seconds.get(name)) for name in names]
            cells += [number(ratio(seconds)), *(mib(sent.get(name)) for name in names)]
        else:
            cells += [ms(seconds[name]) for name in CONTENDERS]
            cells += [
                number(ratio(seconds)),
                number(ratio(result["communication"])),
                number(ratio(result["outside_gemm"])),
                number(sent["oproj_patch"] / sent["minimum"], 3),
            ]
        lines = parts if result["gemm_left_out"] else whole
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    title = "\n\nCommunication alone (no GEMM); bytes of the whole group:\n\n"
    return title.join(
        "\n".join(lines) for lines in (whole, parts) if len(lines) > 2 or lines is whole
    )


def plot(results: Sequence[dict[str, Any]], path: str) -> None:
    """Time over rows of the three contenders, one panel for each shape, group size and dtype."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed here.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        if len(set(result["counts"])) == 1 and not result["gemm_left_out"]:
            key = (result["shape"], result["ranks"], result["dtype"])
            panels.setdefault(key, []).append(result)
    across = min(3, max(1, len(panels)))
    down = math.ceil(len(panels) / across) or 1
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.6 * across, 3.6 * down), squeeze=False, layout="constrained"
    )
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    for axis, ((shape, ranks, dtype), members) in zip(axes.flat, panels.items(), strict=False):
        members = sorted(members, key=lambda result: int(result["rows"]))
        rows = [result["rows"] for result in members]
        for name, marker in (("unsharded", "s"), ("builtin", "^"), ("oproj_patch", "o")):
            axis.plot(
                rows,
                [result["seconds"][name] * 1e3 for result in members],
                marker=marker,
                markersize=4,
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="rows per rank", ylabel="milliseconds")
        columns, hidden = SHAPES[shape]
        axis.set_title(f"K={columns}, hidden={hidden}, {dtype}, N={ranks}", fontsize=10)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def execute(
    run: Run, seconds: float, ascend: str = "", pairs: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Measure one run; returns its results and what the built-in contender was.

    ascend: release of vllm-ascend whose wheel, and vLLM's for it, are put before the installed one.
    """
    from benchmarks import o_proj
    from tests.hosts import wheels
    from tests.ranks import launch

    host = {}
    if ascend:
        host = wheels.environment(wheels.Host("ascend", ascend), {})
        host["VLLM_PLUGINS"] = "oproj_patch"  # on vLLM's CPU platform: there is no NPU

    told = launch.run(
        run.ranks,
        functools.partial(o_proj.measure, **asdict(run), seconds=seconds, pairs=pairs),
        fresh=True,
        seconds=1800,
        env=host
        | {
            "OPROJ_TENSOR_PARALLEL_SIZE": str(run.ranks),
            # Where weights can be read, gathering them is a contender of its own.
            "OPROJ_WEIGHT_GATHER_ROWS": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
    )
    return summarise(run, told), told[0]["builtin"]


def selected(args: argparse.Namespace) -> list[Run]:
    runs = []
    for run in QUICK if args.quick else FULL:
        counts = [case for case in run.counts if not args.rows or max(case) in args.rows]
        if (
            counts
            and (not args.shape or run.shape == args.shape)
            and (not args.ranks or run.ranks in args.ranks)
            and (not args.dtype or run.dtype in args.dtype)
            and (not args.communication or not run.gemm)
        ):
            runs.append(Run(run.shape, run.ranks, run.dtype, counts, run.gemm))
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few cases, within 5 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw time over rows")
    parser.add_argument("--shape", choices=SHAPES, help="only this shape")
    parser.add_argument("--ranks", type=int, nargs="+", help="only these group sizes")
    parser.add_argument("--dtype", nargs="+", help="only these: float32, bfloat16, int8")
    parser.add_argument("--rows", type=int, nargs="+", help="only these (largest) row counts")
    parser.add_argument(
        "--communication", action="store_true", help="only the runs that leave out the GEMM"
    )
    parser.add_argument(
        "--ascend", metavar="RELEASE", default="", help="take the built-in from vllm-ascend's wheel"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=0,
        metavar="COUNT",
        help="only the built-in and oproj_patch, by turns, at least so many times",
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="per case (default 6)")
    parser.add_argument(
        "--saved", metavar="FILE", nargs="+", help="show the JSON of earlier runs, measure nothing"
    )
    args = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    results: list[dict[str, Any]] = []
    label = ""
    if args.saved:
        for name in args.saved:
            saved = json.loads(Path(name).read_text())
            results += saved["results"]
            label = saved["builtin"]
    else:
        for run in selected(args):
            what = f"{run.shape}, {run.ranks} ranks, {run.dtype}: {len(run.counts)} cases"
            print(what, file=sys.stderr, flush=True)
            found, label = execute(run, args.seconds, args.ascend, args.pairs)
            results += found
    if args.plot:
        plot(results, args.plot)
    if args.json:
        import torch

        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(json.dumps({"results": results, "builtin": label, "machine": machine}, indent=1))
    else:
        print(f"builtin: {label}\n\n{table(results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
