"""In a process with one host: its own model runner drives a small sharded model, graphs emulated.

Real: vLLM's configuration, groups, loader, model runner (constructor, `load_model`, capture,
`execute_model`, `_dummy_run`), its compiler's splitting, graph wrapper and dispatcher.
Stood in: the model's attention (a matrix product), and the steps' scheduler output.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import json
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch

from tests.ranks.layers import DEVICE, enter_device

from . import emulator, host

SIZE = 2
HIDDEN, COLUMNS, LAYERS, VOCABULARY = 32, 64, 2, 64
CAPTURE_SIZES = [1, 2, 4, 8, 24]
MAX_ROWS = 64

MODEL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": LAYERS,
    "moe_layer_freq": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": COLUMNS // 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
}

# Of another architecture, where the host captures no graph of a DeepSeek model.
QWEN: dict[str, Any] = {
    **{name: value for name, value in MODEL.items() if name != "kv_lora_rank"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": COLUMNS // 4,
    "num_experts": 8,
}

START_SECONDS = 240.0
STEP_SECONDS = 20.0
TOLERANCE = 5e-6

Told = dict[str, Any]
Step = Sequence[Any]
"""What each rank does: a list of rows for each of its requests; [] idles; None: zero tokens.

`DRAFTED` instead of a number is a request that decodes a row and verifies a drafted one.
"""
DRAFTED = "1+1"


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A float32 matrix [rows, columns], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, device="cpu")
    return values / columns**0.5


def expected(tokens: Sequence[int]) -> torch.Tensor:
    """The model's output [tokens, HIDDEN] in float64, with whole weights and without a host."""
    x = matrix(VOCABULARY, HIDDEN, 1).double()[torch.tensor(tokens)]
    for index in range(LAYERS):
        heads = torch.tanh(x @ matrix(COLUMNS, HIDDEN, 10 + index).double().t())
        x = x + heads @ matrix(HIDDEN, COLUMNS, 20 + index).double().t()
    return x


class Done(BaseException):
    """Ends a step after the forward pass; `hidden` is what the host would make logits of."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def model_class() -> type[torch.nn.Module]:
    """The small model. vLLM's decorator reads the configuration of its constructor."""
    from vllm.compilation.decorators import support_torch_compile
    from vllm.model_executor.layers.linear import RowParallelLinear

    library = torch.library.Library("oproj_tests", "FRAGMENT")
    library.define("attention(Tensor x, Tensor weight, Tensor(a!) output) -> ()")

    def attention(x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
        # Into memory of the piece before, as the host's own: the next piece reads it there.
        torch.tanh(x @ weight.t(), out=output)

    library.impl("attention", attention, "CompositeExplicitAutograd")
    library._register_fake("attention", lambda x, weight, output: None)
    _keep.append(library)

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, prefix: str, seed: int) -> None:
            super().__init__()
            self.o_proj = RowParallelLinear(
                COLUMNS, HIDDEN, bias=False, prefix=f"{prefix}.self_attn.o_proj"
            )
            self.attention = torch.nn.Parameter(matrix(COLUMNS, HIDDEN, 10 + seed), False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.new_empty((x.shape[0], COLUMNS))
            torch.ops.oproj_tests.attention(x, self.attention, heads)
            return x + self.o_proj(heads)[0]

    class Inner(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.embedding = torch.nn.Parameter(matrix(VOCABULARY, HIDDEN, 1), False)
            self.layers = torch.nn.ModuleList(
                Layer(f"{prefix}.layers.{index}", index) for index in range(LAYERS)
            )
            caches = vllm_config.compilation_config.static_forward_context
            for index in range(LAYERS):
                caches[f"{prefix}.layers.{index}.self_attn.attn"] = SimpleNamespace(kv_cache=[])

        def forward(
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> torch.Tensor:
            x = self.embedding[input_ids]
            for layer in self.layers:
                x = layer(x)
            return x

    # What the decorator marks as dynamic it takes from annotations, which are texts here.
    compiled: Any = support_torch_compile(
        dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0}
    )(Inner)

    class Small(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.model = compiled(vllm_config=vllm_config, prefix=prefix or "model")

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model.embedding[input_ids]

        def compute_logits(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
            raise Done(hidden.clone())

        def load_weights(self, weights: Any) -> set[str]:
            for index, layer in enumerate(self.model.layers):
                weight = layer.o_proj.weight
                weight.weight_loader(weight, matrix(HIDDEN, COLUMNS, 20 + index))
                # Not packed, as on a device; recent releases ask a CPU's layer for its product.
                layer.o_proj.cpu_linear = torch.nn.functional.linear
            return {name for name, _ in self.named_parameters()}

    return Small


_keep: list[Any] = []


def engine_options(mode: str, drafting: bool) -> dict[str, Any]:
    """Keyword arguments of `EngineArgs` for one graph mode; drafting: with drafts of one token.

    They come from the prompt, without a model of their own.
    """
    from vllm.config import CompilationConfig

    wanted: dict[str, Any] = {
        "backend": "eager",
        "use_inductor": False,
        "custom_ops": ["none"],
        "cudagraph_capture_sizes": CAPTURE_SIZES,
        "cudagraph_num_of_warmups": 1,
        "cudagraph_mode": mode,
        "use_cudagraph": mode != "NONE",
        "full_cuda_graph": mode == "FULL",
        "mode": 3,
        "level": 3,
    }
    known = inspect.signature(CompilationConfig).parameters
    if "cudagraph_mode" in known:
        wanted = {k: v for k, v in wanted.items() if k not in ("use_cudagraph", "full_cuda_graph")}
    if "use_inductor" in known:
        del wanted["backend"]
    if "mode" in known:
        wanted.pop("level")
    compilation = {name: value for name, value in wanted.items() if name in known}
    drafts = {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 2}
    return {
        "speculative_config": {**drafts, "prompt_lookup_min": 1} if drafting else None,
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",  # 0.9.1 takes no other; the model itself is of float32
        "max_model_len": MAX_ROWS,
        "max_num_batched_tokens": MAX_ROWS,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "data_parallel_size": SIZE,
        "distributed_executor_backend": "external_launcher",
        "compilation_config": CompilationConfig(**compilation),
    }


def model_directory() -> str:
    """A directory with the small model's configuration, whose architecture is registered."""
    from vllm.model_executor.models.registry import ModelRegistry

    told = QWEN if host.is_ascend() and host.of_first_graphs() else MODEL
    # In place of the architecture that the configuration names, which vLLM would import.
    ModelRegistry.register_model(told["architectures"][0], model_class())
    directory = Path(tempfile.mkdtemp(prefix="graphs-"))
    (directory / "config.json").write_text(json.dumps(told))
    return str(directory)


@contextlib.contextmanager
def vllm_groups(options: dict[str, Any]) -> Iterator[Any]:
    """vLLM's configuration of this rank, with its groups created."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    rank = int(os.environ["RANK"])
    os.environ.setdefault("VLLM_DIST_IDENT", os.environ["MASTER_PORT"])
    backend = enter_device()
    given = EngineArgs(model=model_directory(), **options)
    with host.configured():
        config = given.create_engine_config()
    with set_current_vllm_config(config):
        # The world of both ranks at once, which some releases would multiply by the size.
        config.parallel_config.data_parallel_size = 1
        parallel_state.init_distributed_environment(
            SIZE, rank, "tcp://127.0.0.1:" + os.environ["MASTER_PORT"], rank, backend
        )
        config.parallel_config.data_parallel_size = SIZE
        config.parallel_config.data_parallel_rank = rank
        parallel_state.initialize_model_parallel(1, 1)
        yield config


@contextlib.contextmanager
def ascend_groups(options: dict[str, Any]) -> Iterator[Any]:
    """The same by vllm-ascend, as far as its worker does before it makes its runner."""
    from vllm.plugins import load_general_plugins

    from tests.hosts import ascend

    ascend.stand_in()
    load_general_plugins()
    del options["dtype"], options["data_parallel_size"]
    with ascend.worker(model_directory(), SIZE, **options) as config:
        yield config


@contextlib.contextmanager
def runner(mode: str, drafting: bool) -> Iterator[Any]:
    """The host's model runner after loading, profiling and capturing."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.kv_cache_interface import KVCacheConfig

    with contextlib.ExitStack() as stack:
        undo = stack.enter_context(emulator.Patches())
        options = engine_options(mode, drafting)
        if host.is_ascend():
            options["enforce_eager"] = mode == "NONE"
            import torch_npu  # noqa: F401

            stack.enter_context(emulator.installed(("cuda", "npu")))
            stack.enter_context(host.on_cpu())
            config = stack.enter_context(ascend_groups(options))
            host.answer_for_npu(undo)
            from vllm_ascend.worker.model_runner_v1 import NPUModelRunner as Runner
        else:
            if DEVICE.type == "cpu":
                stack.enter_context(emulator.installed())
            host.give_graphs(undo)
            config = stack.enter_context(vllm_groups(options))
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
        if DEVICE.type == "cuda":
            stack.enter_context(host.on_cuda())
            config.parallel_config.disable_nccl_for_dp_synchronization = True
        host.give_compiler(undo)
        splitting = config.compilation_config.splitting_ops
        if splitting:
            # Written as the release writes its own attention.
            splitting.append(f"oproj_tests{'::' if '::' in splitting[0] else '.'}attention")
        config.model_config.dtype = torch.float32
        config.parallel_config.distributed_executor_backend = "uni"
        if hasattr(config.cache_config, "kv_cache_layout"):
            config.cache_config.kv_cache_layout = "LBNHC"  # what the engine tells its workers

        def load(self: Any, vllm_config: Any, model_config: Any, **_: Any) -> Any:
            with DEVICE:
                model = base_loader.initialize_model(vllm_config)
            model.load_weights(())
            return model.to(DEVICE).eval()

        cache = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[])
        with mock.patch.object(base_loader.BaseModelLoader, "load_model", load):
            found = Runner(config, DEVICE)
            found.load_model()
            if hasattr(found, "attn_metadata_builders"):  # up to 0.10.0, which asks the first
                _give_attention(found, cache)
            found.initialize_kv_cache(cache)
        with contextlib.suppress(Done):
            found.profile_run()
        found.capture_model()
        yield found


def _give_attention(found: Any, cache: Any) -> None:
    """A group of no layer for a runner that asks each group whether it can be replayed.

    The answer is the release's own for MLA.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    builder = SimpleNamespace(
        reorder_batch=lambda *_: False,
        build=lambda *_, **__: None,
        build_for_cudagraph_capture=lambda *_: None,
    )
    with contextlib.suppress(ImportError):  # 0.9.1 does not ask, and needs kernels to import it
        from vllm.v1.attention.backends.mla.common import MLACommonMetadataBuilder

        replayed: Any = MLACommonMetadataBuilder
        builder.can_run_in_cudagraph = lambda of: replayed.can_run_in_cudagraph(builder, of)
    found.attn_metadata_builders = [builder]
    found.cascade_attn_enabled = False
    found.initialize_attn_backend = lambda *_: None
    spec = FullAttentionSpec(16, 1, 16, torch.float32, use_mla=False)
    cache.kv_cache_groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=[])]


def scheduled(rows: Sequence[Any], step: int) -> tuple[Any, list[int]]:
    """The scheduler's output for a request of each of `rows`, all new; the tokens of its logits.

    A request of one row decodes: its prompt has been computed but for one token.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched import output

    new, last = [], []
    rank = int(os.environ["RANK"])
    drafts, counts = {}, [2 if count == DRAFTED else count for count in rows]
    for index, count in enumerate(counts):
        drafted = rows[index] == DRAFTED
        computed = 3 if drafted or count == 1 else 0
        tokens = [
            (7 * step + 3 * index + 5 * rank + place) % VOCABULARY
            for place in range(computed + count)
        ]
        last += tokens[-2:] if drafted else tokens[-1:]
        if drafted:
            drafts[_name(step, index)] = tokens[-1:]
        new.append(
            _built(
                output.NewRequestData,
                req_id=_name(step, index),
                prompt_token_ids=tokens,
                prefill_token_ids=tokens,
                sampling_params=SamplingParams(temperature=0.0),
                block_ids=([],),
                num_computed_tokens=computed,
            )
        )
    told = _built(
        output.SchedulerOutput,
        scheduled_new_reqs=new,
        scheduled_cached_reqs=getattr(output.CachedRequestData, "make_empty", list)(),
        num_scheduled_tokens={_name(step, index): count for index, count in enumerate(counts)},
        total_num_scheduled_tokens=sum(counts),
        scheduled_spec_decode_tokens=drafts,
        finished_req_ids=set(_running),
    )
    _running[:] = [_name(step, index) for index in range(len(rows))]
    return told, last


_running: list[str] = []
_EMPTY: dict[str, Any] = {
    "scheduled_spec_decode_tokens": {},
    "scheduled_encoder_inputs": {},
    "num_common_prefix_blocks": [],
    "free_encoder_input_ids": [],
    "free_encoder_mm_hashes": [],
    "structured_output_request_ids": {},
    "grammar_bitmask": None,
    "mm_features": [],
    "mm_inputs": [],
    "mm_kwargs": [],
    "mm_hashes": [],
    "mm_positions": [],
    "pooling_params": None,
    "lora_request": None,
}


def _name(step: int, index: int) -> str:
    return f"step{step}-{index}"


def _built(cls: Any, **given: Any) -> Any:
    """An instance of a release's data class; what a test does not tell is empty."""
    told = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in given:
            told[name] = given[name]
        elif parameter.default is parameter.empty:
            told[name] = copy.copy(_EMPTY[name])
    return cls(**told)


def idle(found: Any) -> None:
    """What the host's worker does for a rank without a request."""
    worker: Any = object.__new__(host.worker_class())
    worker.__dict__.update(
        model_runner=found, use_v2_model_runner=False, randomize_dummy_inputs=False
    )
    with contextlib.suppress(Done):
        worker.execute_dummy_batch()


def do(found: Any, rows: Any, step: int) -> float | None:
    """One step of this rank; the largest error of its requests' outputs, None without one."""
    if rows is None:
        found.execute_model(scheduled([], step)[0])
        # The engine runs a dummy batch when the model did not run.
        idle(found)
        return None
    if not rows:
        idle(found)
        return None
    told, last = scheduled(rows, step)
    try:
        with torch.inference_mode():
            found.execute_model(told)
    except Done as done:
        hidden = done.hidden
    else:
        raise AssertionError("the step did not come to its logits")
    if getattr(found, "execute_model_state", None) is not None:
        found.execute_model_state = None
    assert hidden.shape == (len(last), HIDDEN), hidden.shape
    return float((hidden.double().cpu() - expected(last)).abs().max())


def steps(mode: str, drafting: bool, plan: Sequence[Step], watch: Watch) -> None:
    """Run `plan[step][rank]` on this rank; `watch` is told errors and how many graphs ran."""
    rank = int(os.environ["RANK"])
    watch.told |= {"errors": [], "replays": []}
    with runner(mode, drafting) as found:
        watch.told["captures"] = emulator.Graph.captures
        if mode == "FULL" and emulator.Graph.all:  # The first graph has the most rows.
            package = str(Path(sys.modules["oproj_patch"].__file__ or "").parent)
            found_in = emulator.Graph.all[0].allocations_in(package)
            watch.told["allocations"] = [[a.bytes, a.operator, a.function] for a in found_in]
        for number, step in enumerate(plan):
            watch.allow(STEP_SECONDS)
            before = emulator.Graph.replays
            error = do(found, step[rank], number)
            if DEVICE.type == "cuda":  # A peer that ends before its kernels would leave this one.
                torch.cuda.synchronize()
            watch.told["replays"].append(emulator.Graph.replays - before)
            watch.told["errors"].append(error)


def cell(
    mode: str, plan: Sequence[Step], drafting: bool = False, seconds: float = START_SECONDS
) -> list[Told]:
    """`steps` on two ranks forked from this process: what each told.

    A rank that raised has its traceback as "error". A rank that was not ready after `seconds`, or
    not done with a step after `STEP_SECONDS`, has the functions it was in, innermost first, as
    "hung".
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["VLLM_DP_MASTER_PORT"] = str(port)
    shared |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0"}
    gc.freeze()  # A collection in a rank would copy all that it shares with this process.
    sys.stdout.flush()
    pipes = [os.pipe() for _ in range(SIZE)]
    pids = []
    for rank, (_, end) in enumerate(pipes):
        pid = os.fork()
        if pid == 0:
            os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            watch = Watch(end)
            watch.allow(seconds)
            try:
                steps(mode, drafting, plan, watch)
            except BaseException:
                watch.tell(error=traceback.format_exc())
            watch.tell()
        os.close(end)
        pids.append(pid)
    found = []
    for pid, (start, _) in zip(pids, pipes, strict=True):
        with open(start, "rb") as answer:
            text = answer.read()
        os.waitpid(pid, 0)
        found.append(json.loads(text) if text else {"error": "the rank died"})
    return found


class Watch:
    """In a rank: what it tells when it ends, which happens at its deadline if not before."""

    def __init__(self, end: int) -> None:
        self.told: Told = {}
        self._end = end
        self._once = threading.Lock()
        self._main = threading.get_ident()
        self._timer: threading.Timer | None = None

    def allow(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._hung)
        self._timer.daemon = True
        self._timer.start()

    def tell(self, **more: Any) -> NoReturn:
        """End the process."""
        self._once.acquire()
        with open(self._end, "w") as answer:
            answer.write(json.dumps({**self.told, **more}))
        sys.stderr.flush()
        os._exit(0)

    def _hung(self) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        places = [f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in reversed(stack)]
        self.tell(hung=places)


def scenarios(
    mode: str, plans: Mapping[str, Sequence[Step]], drafting: bool = False
) -> dict[str, list[Told]]:
    """What both ranks told of each plan; after one that fails the next starts anew."""
    found: dict[str, list[Told]] = {}
    waiting = dict(plans)
    while waiting:
        ranks = cell(mode, [step for plan in waiting.values() for step in plan], drafting)
        if not any("captures" in told for told in ranks):  # the start failed, or was refused
            return found | dict.fromkeys(waiting, ranks)
        start = 0
        for name, plan in list(waiting.items()):
            del waiting[name]
            end = start + len(plan)
            found[name] = [_part(told, start, end) for told in ranks]
            start = end
            if not all(passed(told) for told in found[name]):
                break
    return found


def _part(told: Told, start: int, end: int) -> Told:
    """What a rank told of the steps from `start` to `end`."""
    cut = told | {name: told.get(name, [])[start:end] for name in ("errors", "replays")}
    if len(cut["errors"]) == end - start:
        cut.pop("error", None)
        cut.pop("hung", None)
    return cut


def passed(told: Told) -> bool:
    """Whether a rank came to its end, and all its outputs were right."""
    errors = told["errors"]
    return not {"error", "hung"} & told.keys() and all(
        error is None or error < TOLERANCE for error in errors
    )


def main() -> None:
    """Run `scenarios` of each mode told on standard input; answer a JSON line for each.

    With `"refusing": false` the package refuses no mode at the start; `grid` is OPROJ_GRID.
    """
    wanted: list[dict[str, Any]] = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("vllm.v1.worker.gpu_worker")  # once, for all ranks to come
    from oproj_patch.hosts import refusals

    for given in wanted:
        rules = refusals.RULES if given.pop("refusing", True) else ()
        env = {"OPROJ_GRID": given.pop("grid", "")}
        with mock.patch.object(refusals, "RULES", rules), mock.patch.dict(os.environ, env):
            found = scenarios(**given)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
