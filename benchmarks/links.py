"""Time and bytes of one o_proj where links decide: each rank sends through a slow link of its own.

    python benchmarks/links.py --ranks 8 --rate 200mbit --rows 1 4 24 96 [--json] [--plot FILE]

Each rank is a process in a network namespace of its own, on one bridge, and `tc tbf` limits what
it sends. That gives a CPU the ratio of arithmetic to network that an accelerator has. All
contenders run in the same processes, by turns. The namespaces have no names, so the kernel removes
them, their links and the bridge when the processes end, however they end.

Linux, root, `ip` and `tc` are needed. The local GEMM is left out unless `--gemm` is given. Rows
that travel in int8 are quantized by a stand-in for the device's kernel, and are not multiplied.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.77.0"
MTU = 9000  # bytes of one packet; headers then add 1% to the payload
BURST = "64kb"  # what a link takes at once
CLONE_NEWNET = 0x40000000
ROWS_LAYOUT = "rows"
ROWS_OF_INT8 = "rows of int8"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Unavailable(Exception):
    """This machine cannot make the links."""


class Contender(NamedTuple):
    """One way to run the layer.

    name: ROWS_LAYOUT, ROWS_OF_INT8 (the same for a layer that quantizes the rows that arrive, as
        those with the wire int8 do before they send), `grid`, `sequential` (a grid, one part of a
        step after the other instead of at the same time) or `builtin`, which has neither grid nor
        wire.
    """

    name: str
    grid: str = ""
    wire: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, self))


def contenders(ranks: int, gemm: bool) -> list[Contender]:
    """What takes turns: the rows layout, with which the others are compared, first."""
    from oproj_patch.sharding import topology

    plain, *grids = topology.grids(ranks)
    chosen = [Contender(ROWS_LAYOUT, str(plain), "off"), Contender("builtin")]
    if not gemm:
        chosen.append(Contender(ROWS_OF_INT8, str(plain), "off"))
    for wire in ("off",) if gemm else ("off", "int8"):
        offered = grids if wire == "off" else [plain, *grids]
        chosen += [Contender("grid", str(grid), wire) for grid in offered]
    return chosen + [Contender("sequential", str(plain), "off")] * gemm


def formula(one: Contender, ranks: int, columns: int, hidden: int, dtype: str) -> int:
    """Bytes that a rank sends for each row of its own, as the package and `plan` compute them."""
    from oproj_patch.sharding import topology

    a, b = map(int, (one.grid or f"{ranks}x1").split("x"))
    element = {"bfloat16": 2, "float32": 4}[dtype]
    out = 1 if one.wire == "int8" else element
    return topology.step_bytes(ranks, columns // a, hidden // b, element, out)


def chosen_by_auto(one: Contender, ranks: int, columns: int, hidden: int) -> bool:
    """Tell whether the package takes this grid by itself, for rows that travel so."""
    from oproj_patch.sharding import topology

    best = topology.choose_grid(ranks, columns, hidden, 2, 1 if one.wire == "int8" else 2)
    return one.grid == str(best)


def bytes_per_second(rate: str) -> float:
    """Read a rate as tc writes it, such as 200mbit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmg]bit)", rate)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(
            f"{rate!r} found, a number above 0 with one of {', '.join(UNITS)} is accepted"
        )
    return float(found[1]) * UNITS[found[2]] / 8


# ---- the links -------------------------------------------------------------------------------


def make_bridge() -> None:
    """Move this process into a network namespace of its own, with a bridge; raise Unavailable."""
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} of iproute2 is not installed")
    try:
        _system_call("unshare", CLONE_NEWNET)
        _run("ip link add switch type bridge")
        _run(f"ip link set switch mtu {MTU} up")
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        raise Unavailable(f"network namespaces cannot be made here ({told.strip()})") from None


def join_bridge(rank: int, rate: str) -> None:
    """Move this rank, which has one thread, behind a link of its own; its process ends with it."""
    bridge = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    _system_call("unshare", CLONE_NEWNET)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    port = f"port{rank}"
    _run(f"ip link add eth0 mtu {MTU} type veth peer name {port} mtu {MTU} netns {os.getppid()}")
    _system_call("setns", bridge, CLONE_NEWNET)
    _run(f"ip link set {port} master switch up")
    _system_call("setns", own, CLONE_NEWNET)
    _run(f"ip addr add {NETWORK}.{rank + 1}/24 dev eth0")
    _run(f"tc qdisc add dev eth0 root tbf rate {rate} burst {BURST} latency 200ms")
    # The connections of each contender rest during the others' turns.
    Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text("0")
    _run("ip link set eth0 up")
    _run("ip link set lo up")


def _system_call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=30)


# ---- in a rank -------------------------------------------------------------------------------


def measure(
    chosen: Sequence[Contender], rate: str, rows: Sequence[int], columns: int, hidden: int,
    dtype: str, gemm: bool, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Body of a rank: for each number of rows the bytes it sent, and its seconds by repetition."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_bridge(rank, rate)

    import torch

    from benchmarks import o_proj
    from tests.ranks import layers

    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    layers.join_world()
    calls: dict[Contender, Callable[[Any], Any]] = {}
    clocks: dict[str, o_proj._Clock] = {}
    label, results = "", []
    with torch.inference_mode():
        for contender in chosen:
            if contender.name != "builtin":
                calls[contender], layer = _ours(contender, columns, hidden, gemm)
                if gemm:
                    clocks[str(contender)] = o_proj._Clock(layer)
        with layers.model_groups(ranks) as config:
            layer = _layer("benchmark.shard", columns // ranks, hidden, gemm)
            calls[Contender("builtin")], label = o_proj._builtin(layer, ranks)
            for count in rows:
                x = torch.randn(count, columns)
                given = {str(name): functools.partial(call, x) for name, call in calls.items()}
                with o_proj._forward_context(config, rank, [count] * ranks):
                    for call in given.values():
                        call()
                    sent = {
                        name: o_proj._bytes_sent(call, ranks, rank) for name, call in given.items()
                    }
                    times, outside = o_proj._time(given, clocks, seconds, 5)
                multiplying = {
                    name: [
                        all_ - rest for all_, rest in zip(times[name], outside[name], strict=True)
                    ]
                    for name in outside
                }
                results.append({"sent": sent, "seconds": times, "gemm": multiplying})
    return {"builtin": label, "rows": results}


def _ours(
    contender: Contender, columns: int, hidden: int, gemm: bool
) -> tuple[Callable[[Any], Any], Any]:
    """The package's layer with this grid and wire, in a group of its own: how to run it, and it."""
    import torch

    import oproj_patch
    from benchmarks import o_proj
    from oproj_patch.sharding import exchange, otp_group
    from oproj_patch.sharding.wire import Wire
    from tests.ranks import layers

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wanted = {"OPROJ_WEIGHT_GATHER_ROWS": "0", "OPROJ_GRID": contender.grid}
    with mock.patch.dict(os.environ, wanted):
        oproj_patch.enable(ranks)
        with layers.model_groups(ranks) as config:
            layer = _layer(layers.O_PROJ, columns, hidden, gemm)
            if contender.wire == "int8":
                chunk = layer.input_size_per_partition
                layer.oproj.wire = Wire(chunk, torch.int8, _quantize, lambda values, _: values)
            elif contender.name == ROWS_OF_INT8:
                _quantize_first(layer.quant_method)
            # What happens once only, such as the comparison of layers, is not measured.
            with o_proj._forward_context(config, rank, [1] * ranks):
                layer(torch.randn(1, columns))
            assert oproj_patch.status().grid == contender.grid
            # Groups and layer outlive vLLM's groups, so that all contenders can take turns.
            group, otp_group._current = otp_group._current, None
        oproj_patch.disable()

    def call(x: Any) -> Any:
        otp_group._current = group
        try:
            return layer(x)
        finally:
            otp_group._current = None

    def sequential(x: Any) -> Any:
        with mock.patch.object(
            exchange, "exchange", functools.partial(_in_turn, exchange.exchange)
        ):
            return call(x)

    return sequential if contender.name == "sequential" else call, layer


def _in_turn(exchange: Any, layer: Any, x: Any, counts: tuple[int, ...], parts: int = 1) -> Any:
    """Run the parts of a step one after the other."""
    import torch

    done, rank = [], layer.oproj.group.rank
    for part in range(parts):
        starts, ends = (tuple(n * p // parts for n in counts) for p in (part, part + 1))
        some = tuple(end - start for start, end in zip(starts, ends, strict=True))
        done.append(exchange(layer, x[starts[rank] : ends[rank]], some))
    return torch.cat(done)


def _quantize(rows: Any) -> Any:
    """Stand in for the kernel of a static scale."""
    import torch

    return (rows * 32).to(torch.int8), None


def _quantize_first(method: Any) -> None:
    """Let a quant method quantize the rows that it gets, as that of an int8 layer does."""
    apply = method.apply

    def quantized(layer: Any, x: Any, *given: Any, **named: Any) -> Any:
        _quantize(x)
        return apply(layer, x, *given, **named)

    method.apply = quantized


def _layer(prefix: str, columns: int, hidden: int, gemm: bool) -> Any:
    """vLLM's layer; without `gemm` its quant method returns partial results made before."""
    import torch

    from tests.ranks import layers

    layer = layers.build(prefix, hidden, columns, bias=False, return_bias=False)
    layer.weight.data.normal_()
    outputs = layer.weight.shape[0]  # a CPU packs it now
    layers.finish(layer)
    if gemm:
        return layer
    kept = dict[int, Any]()

    def nothing(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
        rows = x.shape[0]
        if rows not in kept:
            kept[rows] = torch.randn(rows, outputs)
        return kept[rows]

    layer.quant_method.apply = nothing
    return layer


# ---- in the parent ---------------------------------------------------------------------------


def summarise(
    told: Sequence[dict[str, Any]], chosen: Sequence[Contender], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One result for each number of rows and contender, from what the ranks measured.

    bytes_sent: by one rank, counted; formula_bytes: computed. seconds: median over the repetitions
    of the slowest rank; gemm_seconds: the same of the GEMM in them; to_rows: median of the ratios
    to the rows layout in the same repetition; bound_seconds: the bytes over the rate. auto: the
    package takes this grid by itself.
    """
    results = []
    for index, rows in enumerate(args.rows):
        ranks = [rank["rows"][index] for rank in told]
        layout = []
        for one in chosen:
            sent = max(rank["sent"][str(one)] for rank in ranks)
            by_rank = [rank["seconds"][str(one)] for rank in ranks]
            times = [max(repetition) for repetition in zip(*by_rank, strict=True)]
            layout = layout or times
            gemm = [rank["gemm"].get(str(one), [0.0]) for rank in ranks]
            ratios = [mine / theirs for mine, theirs in zip(times, layout, strict=True)]
            results.append(
                {
                    "rows": rows,
                    "dtype": args.dtype,
                    "contender": one.name,
                    "grid": one.grid,
                    "wire": one.wire,
                    "auto": chosen_by_auto(one, args.ranks, args.columns, args.hidden),
                    "bytes_sent": sent,
                    "formula_bytes": rows
                    * formula(one, args.ranks, args.columns, args.hidden, args.dtype),
                    "seconds": statistics.median(times),
                    "gemm_seconds": statistics.median(map(max, zip(*gemm, strict=True))),
                    "bound_seconds": sent / bytes_per_second(args.rate),
                    "quartiles": statistics.quantiles(times, n=4)[::2],
                    "repetitions": len(times),
                    "to_rows": statistics.median(ratios),
                }
            )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table: a contender a line, milliseconds (of the rows layout's)."""
    lines: dict[str, list[str]] = {}
    base = {r["rows"]: r["bytes_sent"] for r in results if r["contender"] == ROWS_LAYOUT}
    for r in results:
        name = str(Contender(r["contender"], r["grid"], r["wire"]))
        sent = f"{r['bytes_sent'] // r['rows']:,} ({r['bytes_sent'] / base[r['rows']]:.2f})"
        bound = f"{r['bound_seconds'] / r['seconds']:.2f}"
        cells = lines.setdefault(name, [name, sent, bound])
        cells[-1:] = [f"{r['seconds'] * 1e3:.1f} ({r['to_rows']:.2f})", bound]
    head = ["contender", "bytes a row", *(f"ms at {rows}" for rows in base)]
    head.append(f"bound / time at {max(base)}")
    every = [head, ["---"] * len(head), *lines.values()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def plot(results: Sequence[dict[str, Any]], path: str) -> None:
    """Time (solid) and bytes (dashed) over rows, as a part of the rows layout's; a panel a wire."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed here.") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    wires = sorted({r["wire"] for r in results if r["contender"] == "grid"}, reverse=True)
    figure, axes = pyplot.subplots(
        1, len(wires), figsize=(4.6 * len(wires), 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    axes.flat[0].set_ylabel("time (solid), bytes (dashed) / rows layout")
    layouts = {r["rows"]: r["bytes_sent"] for r in results if r["contender"] == ROWS_LAYOUT}
    for axis, wire in zip(axes.flat, wires, strict=True):
        for color, grid in enumerate(sorted({r["grid"] for r in results} - {""}, reverse=True)):
            mine = [r for r in results if (r["grid"], r["wire"]) == (grid, wire)]
            rows, style = [r["rows"] for r in mine], {"color": f"C{color}", "markersize": 4}
            axis.plot(rows, [r["to_rows"] for r in mine], marker="o", label=grid, **style)
            sent = [r["bytes_sent"] / layouts[r["rows"]] for r in mine]
            axis.plot(rows, sent, linestyle="dashed", **style)
        axis.set(xscale="log", xlabel="rows per rank", ylim=(0, None))
        axis.set_xticks(list(layouts), list(map(str, layouts)))
        axis.minorticks_off()
        axis.set_title(f"dispatch in {'16 bits' if wire == 'off' else wire}", fontsize=10)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; return what `--json` prints. Raises Unavailable."""
    from benchmarks import links
    from tests.hosts import wheels
    from tests.ranks import launch

    chosen = links.contenders(args.ranks, args.gemm)
    host = {}
    if args.ascend:  # fetched while there is a network
        host = wheels.environment(wheels.Host("ascend", args.ascend), {})
        host["VLLM_PLUGINS"] = "oproj_patch"  # on vLLM's CPU platform: there is no NPU
    make_bridge()
    body = functools.partial(
        links.measure, chosen, args.rate, args.rows, args.columns, args.hidden, args.dtype,
        args.gemm, args.seconds,
    )  # fmt: skip
    env = {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0"}
    with launch.Server({**host, "VLLM_LOGGING_LEVEL": "WARNING"}) as server:
        told = launch.run(
            args.ranks, body, seconds=1800, env={**host, "VLLM_LOGGING_LEVEL": "WARNING", **env},
            server=server,
        )  # fmt: skip
    import torch

    return {
        "results": summarise(told, chosen, args),
        "builtin": told[0]["builtin"],
        "ranks": args.ranks,
        "rate": args.rate,
        "columns": args.columns,
        "hidden": args.hidden,
        "gemm_left_out": not args.gemm,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--ranks", type=int, default=8, help=f"one process each {default}")
    add("--rate", default="200mbit", help=f"what a rank may send in a second {default}")
    add("--rows", type=int, nargs="+", default=[1, 4, 24, 96], help="of each rank (1 4 24 96)")
    add("--columns", type=int, default=8192, help=f"of the unsharded input {default}")
    add("--hidden", type=int, default=3584, help=f"outputs {default}")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=default)
    add("--gemm", action="store_true", help="do the local GEMM too, instead of leaving it out")
    add("--seconds", type=float, default=20.0, help=f"for each number of rows {default}")
    add("--ascend", metavar="RELEASE", default="", help="the built-in of vllm-ascend's wheel")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="draw time and bytes over rows, against the rows layout")
    add("--saved", metavar="FILE", help="show the JSON of an earlier run, measure nothing")
    args = parser.parse_args(arguments)
    try:
        bytes_per_second(args.rate)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --rate: {error}")
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a host prints warnings
    try:
        found = json.loads(Path(args.saved).read_text()) if args.saved else execute(args)
    except Unavailable as error:
        print(f"links.py needs Linux, root, ip and tc: {error}.", file=sys.stderr)
        return 2
    if args.plot:
        plot(found["results"], args.plot)
    with output:
        print(json.dumps(found, indent=1) if args.json else table(found["results"]), file=output)
    wrong = [r for r in found["results"] if r["bytes_sent"] != r["formula_bytes"]]
    for r in wrong:
        told = "{rows} rows, {grid} {wire}: {bytes_sent} bytes counted, {formula_bytes} computed."
        print(told.format(**r), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
