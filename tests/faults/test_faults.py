"""The fault table: real processes over gloo, one fault each, and how every rank ends.

Each row states what the ranks say and within how many seconds of their start all have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.ranks import launch
from tests.ranks.layers import build, configuration, model_groups, world

TOGGLE = "OPROJ_TENSOR_PARALLEL_SIZE"
SECONDS = 5
"""Deadline of the hand-shake, and vLLM's timeout for its groups where a row sets one."""
SLACK = 15
"""Allowed beyond a row's own time: on a busy machine of two cores most of it is start-up."""
ON = {TOGGLE: "2"}
DEBUG = {"OPROJ_PATCH_DEBUG": "1"}
NODE = re.escape(socket.gethostname())
GONE = r"Connection (closed|reset)|Failed to (recv|send)|likely closed|[Rr]ead error|Broken pipe"
ANYHOW = "anyhow"
UNAWARE = rf"enforce fail at .*address\.cc|{GONE}"


@dataclass(frozen=True)
class Row:
    """One fault.

    says: by rank, a pattern its error must match; None for a rank that is killed or stuck; ANYHOW
        for one that must end, and not well; "" for one that must finish.
    within: seconds from the creation of groups on a rank to its end, SLACK not counted.
    blocks: on how many ranks of this node the log has the block for a report; None: not said.
    """

    says: Sequence[str | None]
    within: float
    fault: str = ""
    odd: int = 1
    env: dict[str, str] = field(default_factory=dict)
    rank_env: Sequence[dict[str, str]] = ()
    timeout: int = 0
    blocks: int | None = 1


UNSET = (
    rf"OPROJ011: rank %d: {TOGGLE} is not set there, or .* \(no answer within {SECONDS} s; the "
    rf"other ranks are on {NODE}\): set {TOGGLE}=2 for every process"
)
STORE_GONE = r"OPROJ011: the rank that holds the key-value store .* \(rank 0\) ended|" + GONE
SIZES = (
    rf"OPROJ011: the ranks do not agree on {TOGGLE}: rank 0, 1, 3 \(node {NODE}\) has 2; "
    rf"rank 2 \(node {NODE}\) has 4"
)
VERSION = r"OPROJ011: the ranks do not agree on the version of %s: rank \d \(.*\) has .*; rank \d"
GRAPHS = (
    r"OPROJ011: the ranks do not agree on cudagraph_capture_sizes: rank 0 .* rank 1 .* \[1, 64\]"
)
LAYERS = r"OPROJ012: layer model\.layers\.0\.self_attn\.o_proj is \[.*\] on rank 1 but \[.*\] on"
ORDER = (
    r"OPROJ013: rank %d is at step 2 of model\.layers\.%d\.self_attn\.o_proj while rank %d is "
    r"at step 2 of model\.layers\.%d\.self_attn\.o_proj"
)
WRONG = r"OPROJ013: at step 2 of .* have \[3, 3\] rows, but the host of rank 1 announced \[4, 3\]"
ROWS = r"OPROJ014: o_proj got 5 rows on rank 1 at .*, but .* says \[3, 3\]"
AT = r"step 2 at model\.layers\.0\.self_attn\.o_proj"
ABSENT = (
    rf"OPROJ013: rank 1 did not arrive within %s s, or has ended \(rank 0 was at {AT}: .*\): "
    r"look for the error in the log of that rank"
)
ABSENT_FIRST = ABSENT.replace(AT, "the comparison of layers before its first step")
ABSENT_0 = ABSENT.replace("rank 1", "rank one").replace("rank 0", "rank 1").replace("one", "0")
ABORTED = (
    rf"OPROJ013: a step of the ranks \[0, 1\] failed on all of them \(rank 0 was at {AT}; rank 1 "
    rf"was at {AT}: .*\): the ranks ran different forward passes, or the network failed"
)
SILENT = (
    r"OPROJ011: the key-value store .* gave rank 1 no answer within "
    rf"{SECONDS + 10} s: look at the node and the log of rank 0"
)
NO_MEMORY = r"DefaultCPUAllocator: can't allocate memory|not enough memory"
ABSENT_OF_4 = r"OPROJ013: rank 1 did not arrive within 1800 s, or has ended \(rank 0 was at .*3 was"
NO_STORE = (
    r"OPROJ013: a step of the ranks \[0, 1\] failed \(.*[Tt]imed out.*\), and the "
    r"key-value store on rank 0 does not answer"
)


def cannot(code: str, rank: int, world: int, sentence: str) -> list[str]:
    """Return what each rank says when `rank` refuses: it the sentence, the others its rank too."""
    others = rf"{code}: rank {rank} \(node {NODE}\) cannot start: {sentence}"
    return [f"{code}: {sentence}" if other == rank else others for other in range(world)]


TESTED = r"vllm \S+ to \S+"  # a rank imports this module, and must not import the package yet
NOT_TESTED = cannot("OPROJ009", 1, 2, f"requested {TESTED}, found 0.99.0")
NO_SYMBOL = cannot("OPROJ008", 1, 2, r"vllm\.\S+DeepseekV2Attention.__init__ of .* cannot be found")
NOT_A_DIVISOR = cannot("OPROJ003", 2, 4, f"{TOGGLE} is 3; accepted are")
NO_SIZE = cannot("OPROJ001", 2, 4, f"{TOGGLE} is 'two'; accepted are")

TABLE = {
    "variable missing on one rank": Row([UNSET % 1, UNAWARE], SECONDS + 2, rank_env=[ON, {}]),
    "variable missing on the rank with the store": Row(
        [UNAWARE, UNSET % 0], SECONDS + 2, rank_env=[{}, ON]
    ),
    "variable missing on one of four": Row(
        [UNSET % 3, UNSET % 3, UNSET % 3, UNAWARE], SECONDS + 2, rank_env=[ON, ON, ON, {}]
    ),
    "another size": Row([SIZES] * 4, 5, rank_env=[ON, ON, {TOGGLE: "4"}, ON]),
    "a size that one rank refuses": Row(
        NOT_A_DIVISOR, 5, rank_env=[ON, ON, {TOGGLE: "3"}, ON], blocks=0
    ),
    "a size that is no number on one rank": Row(
        NO_SIZE, 5, rank_env=[ON, ON, {TOGGLE: "two"}, ON], blocks=0
    ),
    "no number on one rank, missing on another": Row(
        [*NO_SIZE[:3], UNAWARE], SECONDS + 2, rank_env=[ON, ON, {TOGGLE: "two"}, {}], blocks=0
    ),
    "another version of the package": Row([VERSION % "oproj_patch"] * 2, 5, "package"),
    "another version of vLLM": Row([VERSION % "vllm"] * 2, 5, "host"),
    "an untested release on one rank": Row(NOT_TESTED, 5, "untested", blocks=0),
    "a patched symbol is missing on one rank": Row(NO_SYMBOL, 5, "symbol", blocks=0),
    "other graph sizes on one rank": Row([GRAPHS] * 2, 5, "graphs"),
    "other layers on one rank": Row([LAYERS] * 2, 5, "layers"),
    "layers in another order, debug": Row(
        [ORDER % (1, 1, 0, 0), ORDER % (0, 0, 1, 1)], 5, "order", env=DEBUG
    ),
    "row counts announced wrongly, debug": Row([WRONG] * 2, 5, "announced", env=DEBUG),
    # Without the debug mode gloo notices a longer message, and aborts.
    "row counts announced wrongly": Row(
        [ANYHOW, ANYHOW], 10, "announced", timeout=SECONDS, blocks=None
    ),
    "more rows than announced": Row([ABSENT % 1800, ROWS], 10, "rows"),
    "a rank is killed before the agreement": Row([UNSET % 1, None], SECONDS + 2, "kill before"),
    "the rank with the store is killed before the agreement": Row(
        [None, STORE_GONE], 5, "kill before", odd=0, blocks=0
    ),
    "a rank is killed between two steps": Row([ABSENT % 1800, None], 10, "kill between"),
    "a rank is killed during a step": Row([ABSENT % 1800, None], 10, "kill during"),
    "one of four is killed during a step": Row(
        [ABSENT_OF_4, None, ABSENT_OF_4, ABSENT_OF_4], 10, "kill during", env={TOGGLE: "4"}
    ),
    "the rank with the store is killed during a step": Row(
        [None, STORE_GONE], 5, "kill during", odd=0, blocks=None
    ),
    "a rank is killed during a step, debug": Row(
        [ABSENT % SECONDS, None], 10, "kill during", env=DEBUG
    ),
    "a rank is stuck, debug": Row([ABSENT % SECONDS, None], SECONDS + 10, "stuck", env=DEBUG),
    "a rank is stuck": Row([ABSENT % SECONDS, None], SECONDS + 10, "stuck", timeout=SECONDS),
    "the rank with the store is stopped": Row(
        [None, NO_STORE], SECONDS + 17, "stop", odd=0, timeout=SECONDS
    ),
    "the rank with the store is stopped before the agreement": Row(
        [None, SILENT], SECONDS + 10, "stop before", odd=0, blocks=0
    ),
    "a rank comes late, but in time": Row(["", ""], SECONDS, "late", blocks=0),
    "a rank comes too late": Row([UNSET % 1, f"{STORE_GONE}|{UNSET % 1}"], SECONDS + 8, "too late"),
    "names are resolved slowly on one rank": Row(["", ""], 5, "names", blocks=0),
    "the clock is slow on one rank, the variable missing on another": Row(
        [UNSET % 3, UNSET % 3, UNSET % 3, UNAWARE], SECONDS + 7, "clock", rank_env=[ON, ON, ON, {}]
    ),
    "a rank is killed before its group's first collective": Row(
        [ABSENT_FIRST % 1800, None, "", ""], 10, "kill first", env=ON
    ),
    "the interpreter of the rank with the store is blocked": Row(
        [None, ABSENT_0 % SECONDS], SECONDS + 10, "blocked", odd=0, timeout=SECONDS
    ),
    "the backend aborts the group of one rank": Row([ABORTED] * 2, 10, "abort"),
    "no memory for the GEMM of one rank": Row([ABSENT % 1800, NO_MEMORY], 10, "memory"),
}


def ended(row: Row) -> list[launch.Outcome]:
    ranks = len(row.says)
    return launch.outcomes_of(
        ranks,
        play,
        *(ranks, row.fault, row.odd, row.timeout),
        env={"OPROJ_PATCH_HANDSHAKE_SECONDS": str(SECONDS)}
        | (row.env if row.rank_env else ON | row.env),
        rank_env=row.rank_env or None,
        seconds=60,
        stop_at=[rank for rank, said in enumerate(row.says) if said is not None],
    )


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str) -> None:
    print(f"{name}: {judged(TABLE[name], ended(TABLE[name])):.1f} s")


def judged(row: Row, outcomes: Sequence[launch.Outcome]) -> float:
    """Return the seconds of the last rank; raises AssertionError for another end than the row's."""
    seconds, blocks = [0.0], list[str]()
    for outcome, said in zip(outcomes, row.says, strict=True):
        if said is None:
            continue
        if said == ANYHOW:
            assert outcome.error or outcome.result["text"], outcome.log[-3000:]
            assert "deadline" not in outcome.error
            seconds.append(outcome.seconds)
            continue
        assert outcome.error == "", f"rank {outcome.rank}: {outcome.error}\n{outcome.log[-3000:]}"
        result: dict[str, Any] = outcome.result
        print(f"rank {outcome.rank}: {result['text']}")
        assert re.search(said or "^$", result["text"]), (outcome.rank, result["text"])
        seconds.append(result["seconds"])
        blocks += result["blocks"]
    assert max(seconds) < row.within + SLACK
    if row.blocks is not None:
        assert len(blocks) == row.blocks, blocks
    for block in blocks:
        places = re.findall(r"^  rank \d(?: \(.*\))?: (.*)$", block, re.M)
        assert len(places) > 1 and {*places} != {"no answer"}, block
        for named in ("torch_fr_buffer_size", "the version of vllm 0.", TOGGLE.lower(), "grid"):
            assert named in block.lower(), (named, block)
    return max(seconds)


@pytest.mark.parametrize("name", TABLE)
def test_each_row_can_fail(name: str) -> None:
    """All ranks finish; or all end with another error; or all end as the row says, but late."""
    row = TABLE[name]

    def all_end(text: str, seconds: float) -> list[launch.Outcome]:
        result = {"text": text, "seconds": seconds, "blocks": []}
        return [launch.Outcome(rank, result, seconds=seconds) for rank in range(len(row.says))]

    wrong = [all_end("", 10 + row.within + SLACK)]
    if any(row.says):
        wrong.append(all_end("", 1))
    if ANYHOW not in row.says:
        wrong.append(all_end("another error", 1))
    for outcomes in wrong:
        with pytest.raises(AssertionError):
            judged(row, outcomes)


def test_every_fault_is_in_the_document() -> None:
    text = (launch.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Faults")[2].partition("| --- |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]*) \|", table, re.M) == list(TABLE)


@pytest.mark.parametrize("debug", ["0", "1"])
def test_without_a_fault_all_ranks_finish(debug: str) -> None:
    row = Row([""] * 4, 20, env={"OPROJ_PATCH_DEBUG": debug})
    for outcome in ended(row):
        assert outcome.error == "", outcome.log[-3000:]
        assert outcome.result["text"] == "" and outcome.result["exchanges"] == 4


def test_a_running_rank_reads_no_pickle_starts_no_program_writes_no_file() -> None:
    launch.run(2, audited, seconds=60, env=ON)


# -- in a rank: two sharded layers, two forward passes, and one fault on one rank -------------

NAMES = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
_open = contextlib.ExitStack()


def play(dp: int, fault: str = "", odd: int = 1, timeout: int = 0) -> dict[str, Any]:
    """In a rank: return what ended it, and seconds from the creation of groups to its end.

    fault: what goes wrong on rank `odd`; timeout: vLLM's timeout for its groups, in seconds.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # The seams import it when the first group is created; seconds are counted without that.
    importlib.import_module("vllm.model_executor.models.deepseek_v2")
    mine = int(os.environ["RANK"]) == odd
    if mine and fault:
        _before_groups(fault)
    clock, blocks = time.perf_counter, _Blocks()
    started = clock()
    try:
        _open.enter_context(world())
        config = _open.enter_context(model_groups(dp, config=_config(timeout, fault, mine)))
        exchanges = _forwards(dp, fault if mine else "", config)
        _open.close()
    except RuntimeError as error:
        # Without tearing down, like a worker of vLLM that failed: its executor ends it.
        return {
            "kind": type(error).__name__,
            "text": str(error),
            "seconds": clock() - started,
            "blocks": blocks.told,
        }
    told = {"kind": "", "text": "", "seconds": clock() - started, "exchanges": exchanges}
    return told | {"blocks": blocks.told}


class _Blocks(logging.Handler):
    """What the package logs for a report."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []
        logging.getLogger("vllm.oproj_patch").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def _config(timeout: int, fault: str, mine: bool) -> Any:
    from vllm.config import CUDAGraphMode, ParallelConfig

    config = configuration()
    config.parallel_config = ParallelConfig(
        distributed_timeout_seconds=timeout or None,
        cpu_distributed_timeout_seconds=timeout or None,
    )
    if fault == "graphs":
        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        config.compilation_config.cudagraph_capture_sizes = [1, 64 if mine else 32]
    return config


def _before_groups(fault: str) -> None:
    if fault == "package":
        from oproj_patch import hosts

        hosts.build = lambda: "9.9.9"
    elif fault == "host":
        import vllm

        vllm.__version__ = "0.31.0"
    elif fault == "untested":
        import vllm

        vllm.__version__ = "0.99.0"
    elif fault == "symbol":
        from vllm.model_executor.models import deepseek_v2

        del deepseek_v2.DeepseekV2Attention
    elif fault == "names":
        for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo", "getfqdn"):
            setattr(socket, name, lambda *_, **__: time.sleep(60))
    elif fault == "clock":
        real, began = time.monotonic, time.monotonic()
        time.monotonic = lambda: began + (real() - began) / 10  # type: ignore[assignment]
    elif fault in _BEFORE:
        from oproj_patch.sharding import otp_group

        agree, first = otp_group.agree_to_start, _BEFORE[fault]

        def after(*args: Any) -> str:
            first()
            return agree(*args)

        otp_group.agree_to_start = after


def _forwards(dp: int, fault: str, config: Any) -> int:
    import oproj_patch

    hidden = 24 if fault == "layers" else 20
    layers = [build(name, hidden, 48, bias=False) for name in NAMES]
    for layer in layers:
        layer.weight.data.fill_(1.0)
        layer.quant_method.process_weights_after_loading(layer)
    if not oproj_patch.status().enabled:
        # What vLLM does next in a rank that knows nothing of the others' wish.
        from vllm.distributed import get_dp_group

        torch.distributed.all_reduce(torch.ones(1), group=get_dp_group().cpu_group)
    for step in range(2):
        if step == 1:
            _between_steps(fault)
        elif fault == "kill first":
            _kill()
        if fault == "memory" and step == 1:
            for layer in layers:
                layer.quant_method.apply = lambda *_: torch.empty(1 << 50)
        rows = 5 if fault == "rows" and step == 1 else 3
        with _announced(dp, fault if step == 1 else "", config), torch.inference_mode():
            for layer in reversed(layers) if fault == "order" and step == 1 else layers:
                output, _ = layer(torch.ones(rows, 48))
                assert output.shape == (rows, hidden) and bool((output == 48.0).all())
    return oproj_patch.status().exchanges


def _between_steps(fault: str) -> None:
    if fault == "kill between":
        _kill()
    elif fault == "kill during":
        time.sleep(1.5)  # the others are inside their step by then
        _kill()
    elif fault == "stuck":
        time.sleep(300)
    elif fault == "stop":
        _stop()
    elif fault == "blocked":
        ctypes.PyDLL(None).sleep(300)  # a C call that keeps the interpreter's lock
    elif fault == "abort":
        _abort()


@contextlib.contextmanager
def _announced(dp: int, fault: str, config: Any) -> Iterator[None]:
    """vLLM's own forward context, with the row counts it announces."""
    from vllm.forward_context import set_forward_context

    counts = torch.full((dp,), 3, dtype=torch.int32)
    if fault == "announced":
        counts[0] = 4
    with set_forward_context(None, config, num_tokens=3, num_tokens_across_dp=counts):
        yield


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


_BEFORE = {
    "kill before": _kill,
    "stop before": _stop,
    "late": lambda: time.sleep(SECONDS - 2),
    "too late": lambda: time.sleep(SECONDS + 3),
}
"""What happens on the odd rank before it agrees on the start."""


def _abort() -> None:
    """Cut all connections but those to the store: gloo's own abort() does nothing."""
    store = int(os.environ["MASTER_PORT"])
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6):
                ports = end.getsockname()[1], end.getpeername()[1]
                if store not in ports:
                    end.shutdown(socket.SHUT_RDWR)


def audited() -> None:
    """In a rank: two forward passes, in which the package writes, starts and unpickles nothing."""
    events: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.mkdir")
        if writes and _is_ours(sys._getframe(1)):
            events.append(f"{event} {args}")

    sys.addaudithook(hook)
    assert play(2)["exchanges"] == 4
    assert events == []
    # As if a module of the package wrote a file.
    exec("import os; os.close(os.open(os.devnull, os.O_WRONLY))", {"__name__": "oproj_patch.x"})
    assert len(events) == 1, "the hook notices nothing"


def _is_ours(frame: Any) -> bool:
    """Whether the package, rather than vLLM or this test, comes first on the way out."""
    while frame is not None:
        owner = frame.f_globals.get("__name__", "").partition(".")[0]
        if owner in ("oproj_patch", "vllm", "tests"):
            return bool(owner == "oproj_patch")
        frame = frame.f_back
    return False
