"""The sharded layer on every vLLM release: real groups, layers and forward contexts, two ranks.

One start for each release runs all parts in the ranks, because most of a start is vLLM's import.
A part is a test: it passes when the part has raised nothing on any rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oproj_patch.releases import in_range, parse
from tests.ranks import launch
from tests.ranks.layers import (
    O_PROJ,
    build,
    configuration,
    finish,
    forward_context,
    load,
    made,
    model_groups,
    on_grid,
    place,
    reference,
    whole,
    world,
)

from .parts import Parts, Ran, attempt
from .wheels import HOSTS, OLDEST_WRAPT, Host, ensure, environment, origin

VLLM = [host for host in HOSTS if host.kind == "vllm"]
SIZE = 2
TOLERANCE = 5e-6
HEADS, HIDDEN, COLUMNS = 4, 64, 512  # columns = heads * v_head_dim
HALF = COLUMNS // SIZE
# What attention and quantization methods ask of a ModelConfig; a real one needs a whole model.
MODEL = SimpleNamespace(
    is_moe=True,
    model="a mixture-of-experts model",
    dtype=torch.float32,
    quantization=None,
    is_mm_prefix_lm=False,
    use_mla=True,
    hf_config=SimpleNamespace(),
    hf_text_config=SimpleNamespace(),
)
MODULES = (
    "vllm.distributed.parallel_state",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.parameter",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.forward_context",
    "vllm.plugins",
)
QUANTIZATION = "vllm.model_executor.layers.quantization"
# The bulk of what the parts import.
IMPORTED = (
    "pytest",
    *MODULES,
    "torch._dynamo",
    "vllm.model_executor.model_loader.base_loader",
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors",
    f"{QUANTIZATION}.fp8",
)


@dataclass(frozen=True)
class Here:
    """Where a part runs: the release, the entries of its path, torch's file, the base's wrapt."""

    host: Host
    entries: list[Path]
    torch: str
    wrapt: str
    config: Any = None

    @property
    def rank(self) -> int:
        """Data-parallel rank."""
        return int(self.config.parallel_config.data_parallel_rank)


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.param
    return found


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Host, Future[Ran]]]:
    """A run of each release that is wanted, two at a time; what they need is fetched meanwhile."""
    wanted: dict[Host, None] = {
        item.callspec.params["host"]: None
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function)
    }
    with ThreadPoolExecutor(1) as fetching, ThreadPoolExecutor(2) as running:
        for release in wanted:
            fetching.submit(ensure, release)
        started = {release: running.submit(run, release) for release in wanted}
        try:
            yield started
        finally:
            fetching.shutdown(cancel_futures=True)
            running.shutdown(cancel_futures=True)


def run(host: Host) -> Ran:
    """Run all parts on the ranks of one release."""
    env = {
        "PYTHONPATH": environment(host)["PYTHONPATH"],
        "OPROJ_TENSOR_PARALLEL_SIZE": str(SIZE),
        "OPROJ_PATCH_DEBUG": "0",
    }
    here = Here(host, ensure(host), torch.__file__, metadata.version("wrapt"))
    started = time.monotonic()
    with launch.Server(env, IMPORTED) as server:
        told = launch.run(SIZE, all_parts, here, seconds=240, env=env, server=server)
    return Ran(told, time.monotonic() - started)


@pytest.fixture(scope="module")
def ran(host: Host, runs: dict[Host, Future[Ran]]) -> Ran:
    return runs[host].result()


part = Parts(VLLM)


def all_parts(here: Here) -> dict[str, str]:
    """In a rank: run every part; return "" or its traceback. A part does not stop the next."""
    from vllm.config import set_current_vllm_config

    process_groups = torch.distributed.distributed_c10d._world.pg_map
    config = configuration()
    here = dataclasses.replace(here, config=config)
    seams = Seams()
    with set_current_vllm_config(config), world():
        before = len(process_groups)
        with model_groups(SIZE, config=config):
            config.model_config = MODEL
            told = part.run(here.host, here)
            told["seams"] = attempt(seams.installed)
        told["seams"] += attempt(functools.partial(seams.removed, before))
    return told


class Seams:
    """The package's seams: what they wrap now, and that they leave nothing."""

    def __init__(self) -> None:
        from oproj_patch import activation
        from oproj_patch.hosts import seam as registry
        from oproj_patch.hosts import vllm

        # Only the hook is there yet: the original is what it wraps.
        self.originals: dict[str, tuple[Any, str, Any]] = {}
        host = vllm.Vllm({"vllm": "", "oproj_patch": ""})
        for seam in (activation.group_seam(), *host.seams(None)):
            found = registry.resolve(seam, "")
            assert found is not None or seam.lazy
            if found is None:
                continue
            self.originals[seam.symbol] = (found[0], found[1], _unhooked(found[2]))

    def replaced(self) -> list[str]:
        """Return the symbols which are not the original object now."""
        return [
            symbol
            for symbol, (parent, attribute, original) in self.originals.items()
            if inspect.getattr_static(parent, attribute) is not original
        ]

    def installed(self) -> None:
        import oproj_patch

        assert len(self.originals) == 9
        status = oproj_patch.status()
        assert list(status.seams) == self.replaced() == list(self.originals)
        assert list(status.otp_ranks) == [0, 1]

    def removed(self, process_groups: int) -> None:
        """Check that no group is left of `model_groups`; after disable() nothing is."""
        import oproj_patch

        assert oproj_patch.status().otp_ranks == ()
        assert len(torch.distributed.distributed_c10d._world.pg_map) == process_groups
        oproj_patch.disable()
        assert self.replaced() == []


def _unhooked(original: Any) -> Any:
    return inspect.unwrap(original) if hasattr(original, "_self_wrapper") else original


@part()
def test_release(here: Here) -> None:
    """Which release it is, and where its modules come from."""
    import vllm
    import wrapt
    from vllm.platforms import current_platform

    assert parse(vllm.__version__) == parse(here.host.version)
    assert (current_platform.device_type, torch.__file__) == ("cpu", here.torch)
    oldest = here.host.version == VLLM[0].version
    assert wrapt.__version__ == (OLDEST_WRAPT if oldest else here.wrapt)
    for module in MODULES:
        file = importlib.import_module(module).__file__
        assert file and Path(file).is_relative_to(origin(module, here.entries)), module


@part()
def test_construct(here: Here) -> None:
    """Both attention modules of DeepSeek, with an o_proj that is sharded, loads and runs."""
    for name in ("DeepseekV2MLAAttention", "DeepseekV2Attention"):
        _attention(name, here)


def _attention(name: str, here: Here) -> None:
    from vllm.model_executor.models import deepseek_v2

    import oproj_patch

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    hf_config = SimpleNamespace(
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope),
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=256,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
    )
    prefix = f"{name}.layers.0.self_attn"
    given = {
        "vllm_config": here.config,
        "config": hf_config,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": COLUMNS // HEADS,
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "cache_config": here.config.cache_config,
        "quant_config": None,
        "prefix": prefix,
    }
    cls = getattr(deepseek_v2, name)
    known = inspect.signature(cls.__init__).parameters
    with _without_kernels(deepseek_v2):
        module = cls(**{key: value for key, value in given.items() if key in known})
    layer = module.o_proj
    weight = whole(HIDDEN, COLUMNS, torch.float32)
    load(layer, weight, None)
    assert type(module).__qualname__ == name
    assert layer.oproj.name == f"{prefix}.o_proj" and oproj_patch.status().layers > 0
    assert place(layer.weight.data, weight) == [here.rank * HALF]
    finish(layer)
    _equal(layer, layer, (weight, None), [3, 1], here)


@contextlib.contextmanager
def _without_kernels(deepseek_v2: Any) -> Iterator[None]:
    """Leave out what computes attention, which few releases have for a CPU; all else is real."""

    class Nothing(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

    latent = "MultiHeadLatentAttention"
    names = {"Attention", "MLAAttention", latent, f"{latent}Wrapper"} & vars(deepseek_v2).keys()
    kept = {name: vars(deepseek_v2)[name] for name in names}
    vars(deepseek_v2).update(dict.fromkeys(kept, Nothing))
    try:
        yield
    finally:
        vars(deepseek_v2).update(kept)


@part()
def test_load(here: Here) -> None:
    """Both weight loaders cut the shard of this rank out of the whole weight, bit for bit."""
    from vllm.model_executor.parameter import ModelWeightParameter

    weight = whole(HIDDEN, COLUMNS, torch.bfloat16)
    mine = [here.rank * HALF]
    kind = {"params_dtype": weight.dtype}
    layer = build("own.self_attn.o_proj", HIDDEN, COLUMNS, bias=False, **kind)
    load(layer, weight, None)
    assert place(layer.weight.data, weight) == mine
    layer = build("first.self_attn.o_proj", HIDDEN, COLUMNS, bias=False, **kind)
    layer.weight_loader(layer.weight, weight)
    assert place(layer.weight.data, weight) == mine
    layer = build("second.self_attn.o_proj", HIDDEN, COLUMNS, bias=True, **kind)
    if not isinstance(layer.weight, ModelWeightParameter):
        layer.weight = ModelWeightParameter(
            data=torch.empty_like(layer.weight),
            input_dim=1,
            output_dim=0,
            weight_loader=layer.weight_loader_v2,
        )
        if hasattr(layer, "update_param_tp_status"):
            layer.update_param_tp_status()
    layer.weight_loader_v2(layer.weight, weight)
    assert place(layer.weight.data, weight) == mine
    layer.bias.weight_loader(layer.bias, weight[:, 0])
    assert torch.equal(layer.bias.data, weight[:, 0])


@part()
def test_forward_eager(here: Here) -> None:
    """Steps in which the ranks have different numbers of rows."""
    _forwards("eager", [[3, 1], [5, 5], [1, 7], [2, 6]], here)


@part()
def test_output_cut(here: Here) -> None:
    """Each rank has half of the outputs: on the grid 1x2."""
    with on_grid(1, 2):
        _forwards("cut", [[3, 1], [5, 5], [0, 7]], here)


@part()
def test_idle_rank(here: Here) -> None:
    """Steps in which a rank has no row."""
    _forwards("idle", [[4, 0], [0, 3], [0, 0], [2, 2]], here)


@part()
def test_forward_compiled(here: Here) -> None:
    """One graph for all row counts of 2 or more."""
    # The same torch for all releases: what differs is what is traced, not its code generation.
    compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    _forwards("compiled", [[3, 2], [5, 5], [2, 7], [4, 3]], here, compile_)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _forwards(
    name: str, rows: list[list[int]], here: Here, wrap: Callable[..., Any] = lambda layer: layer
) -> None:
    import oproj_patch

    layer, weight, bias = made(HIDDEN, COLUMNS, bias=True, prefix=f"{name}.{O_PROJ}")
    finish(layer)
    forward = wrap(layer)
    before = oproj_patch.status().exchanges
    for counts in rows:
        _equal(forward, layer, (weight, bias), counts, here)
    assert oproj_patch.status().exchanges - before == len(rows)


def _equal(
    forward: Any,
    layer: Any,
    parameters: tuple[torch.Tensor, torch.Tensor | None],
    counts: list[int],
    here: Here,
) -> None:
    """Check a step of counts[rank] rows against the whole weight's output, in float64."""
    x = whole(counts[here.rank], COLUMNS, torch.float32, seed=50 + here.rank)
    # A rank with no row at all has no data-parallel metadata in every release.
    with torch.inference_mode(), forward_context(here.config, counts, announced=min(counts) > 0):
        output = forward(x)[0]
    expected = reference(x, *parameters)
    assert output.shape == expected.shape
    if x.numel():
        assert float((output.double() - expected).abs().max()) < TOLERANCE


@part()
def test_quantized(here: Here) -> None:
    """Per quantization: every parameter's shape, and that it holds its part of the whole."""
    shapes = {name: _quantized(name, here) for name in _QUANTIZED}
    with on_grid(1, 2):
        cut = {name: _quantized(name, here, "cut") for name in _QUANTIZED}
    assert cut["fp8 block"] in ({}, {"weight": [128, 512], "weight_scale_inv": [1, 4]})
    assert cut["W8A8"] == {"weight": [128, 512], "weight_scale": [128, 1]}
    assert cut["AWQ"] == {"qweight": [512, 16], "qzeros": [8, 16], "scales": [8, 128]}
    assert cut["GPTQ"].pop("g_idx", [512]) == [512]
    assert cut["GPTQ"] == {"qweight": [64, 128], "qzeros": [8, 16], "scales": [8, 128]}
    if shapes["fp8 block"] or not in_range(here.host.version, "0.19"):
        assert shapes["fp8 block"] == {"weight": [256, 256], "weight_scale_inv": [2, 2]}
    assert shapes["W8A8"] == {"weight": [256, 256], "weight_scale": [256, 1]}
    assert shapes["AWQ"] == {"qweight": [256, 32], "qzeros": [4, 32], "scales": [4, 256]}
    assert shapes["GPTQ"].pop("g_idx", [256]) == [256]
    assert shapes["GPTQ"] == {"qweight": [32, 256], "qzeros": [4, 32], "scales": [4, 256]}


def _fp8_block() -> Any:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    return Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )


def _w8a8() -> Any:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    def numbers(strategy: str, dynamic: bool) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy,
                "dynamic": dynamic}  # fmt: skip

    return compressed_tensors.CompressedTensorsConfig.from_config(
        {
            "format": "int-quantized",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": numbers("channel", False),
                    "input_activations": numbers("token", True),
                }
            },
        }
    )


def _gptq() -> Any:
    settings: dict[str, Any] = {
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "lm_head": False,
        "sym": True,
    }
    settings["modules_in_block_to_quantize"] = ["self_attn.o_proj"]
    return _from_config(("gptq.GPTQConfig", "auto_gptq.AutoGPTQConfig"), settings)


def _awq() -> Any:
    settings = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "lm_head": False}
    return _from_config(("awq.AWQConfig", "auto_awq.AutoAWQConfig"), settings)


def _from_config(names: tuple[str, ...], settings: dict[str, Any]) -> Any:
    """The first of `names` that the release has, made from a checkpoint's settings."""
    for name in names:
        module, _, cls = name.partition(".")
        try:
            found = importlib.import_module(f"{QUANTIZATION}.{module}")
        except ModuleNotFoundError:
            continue
        return getattr(found, cls).from_config(settings)
    raise LookupError(f"no {' or '.join(names)}")


_QUANTIZED: dict[str, Callable[[], Any]] = {
    "fp8 block": _fp8_block,
    "W8A8": _w8a8,
    "GPTQ": _gptq,
    "AWQ": _awq,
}


def _quantized(name: str, here: Here, where: str = "") -> dict[str, list[int]]:
    prefix = f"{name.replace(' ', '_')}{where}.{O_PROJ}"
    quant_config = _QUANTIZED[name]()
    options = {"quant_config": quant_config, "params_dtype": torch.bfloat16}
    try:
        layer = build(prefix, 256, COLUMNS, bias=False, **options)
    except ValueError as error:
        # Releases since 0.19 choose the kernel here, and have none for most CPUs; 0.20's table
        # has no row for CPUs at all.
        if not any(told in str(error) for told in ("Failed to find a kernel", "PlatformEnum.CPU")):
            raise
        return {}
    found: dict[str, list[int]] = {}
    generator = torch.Generator().manual_seed(7)
    for key, param in layer.named_parameters():
        shape = list(param.shape)
        dim = ("input_dim", "output_dim")[layer.oproj.grid.outputs - 1]
        cut = getattr(param, dim, None)
        if cut is not None:
            shape[cut] *= SIZE
        data = torch.randint(0, 100, shape, generator=generator).to(param.dtype)
        param.weight_loader(param, data)
        if cut is not None:
            data = data.narrow(cut, here.rank * param.shape[cut], param.shape[cut])
        same = torch.equal(param.data.view(torch.uint8), data.contiguous().view(torch.uint8))
        assert same, (name, key)
        found[key] = list(param.shape)
    return found


@part()
def test_row_counts(here: Here) -> None:
    """True counts from the release's own metadata: a tensor, or its running sum before 0.11."""
    from vllm.forward_context import set_forward_context

    from oproj_patch.hosts.vllm import Vllm
    from oproj_patch.sharding import otp_group

    group = otp_group.require("the test")
    for counts in ([3, 5], [6, 6], [1, 2]):
        with forward_context(here.config, counts, announced=True):
            assert Vllm({}).announced(group) == tuple(counts)
    # Without counts: the release's own all-reduce.
    with set_forward_context(None, here.config, num_tokens=4 + 3 * here.rank):
        assert Vllm({}).announced(group) == (4, 7)


@part()
def test_lora_with_a_stand_in_for_its_kernel(here: Here) -> None:
    """The release's own LoRA layer around a sharded one, which has a bias."""
    from vllm.config import LoRAConfig

    from oproj_patch.hosts import lora
    from oproj_patch.hosts.seam import of_release

    [seam] = of_release(lora.seams(), here.host.version, untested=False)
    choose = getattr(importlib.import_module(seam.module), seam.path)
    layer, weight, bias = made(HIDDEN, COLUMNS, bias=True, prefix="lora.self_attn.o_proj")
    finish(layer)
    config = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.float32)
    adapted = lora.layer_wrapped(choose, None, (layer, 1, config, []), {"model_config": None})
    assert type(adapted).__name__ == "RowParallelLinearWithLoRA"
    a, b = whole(8, COLUMNS, torch.float32, seed=7), whole(HIDDEN, 8, torch.float32, seed=8)
    adapted.lora_a_stacked[0][0, 0].copy_(a)
    adapted.lora_b_stacked[0][0, 0].copy_(b)

    def add_lora_linear(y: Any, x: Any, stacked_a: Any, stacked_b: Any, *_: Any, **__: Any) -> None:
        y += x @ stacked_a[0][0, 0].t() @ stacked_b[0][0, 0].t()

    adapted.punica_wrapper = SimpleNamespace(add_lora_linear=add_lora_linear)
    _equal(adapted, layer, (weight + b @ a, bias), [3, 1], here)


@part()  # the last: some releases shard nothing that is built after a model
def test_drafter(here: Here) -> None:
    """Whole before 0.25, where a rank may skip its drafter: then nobody waits for it.

    Model and drafter are built by vLLM's own loader. Where the drafter is sharded, rank 1 runs it
    all the same.
    """
    from vllm.model_executor.model_loader import base_loader

    import oproj_patch

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.o_proj = build(f"{prefix}.self_attn.o_proj", HIDDEN, COLUMNS, bias=False)
            caches = vllm_config.compilation_config.static_forward_context
            caches[f"{prefix}.self_attn.attn"] = SimpleNamespace(kv_cache=[])

    drafter_sharded = in_range(here.host.version, "0.25")
    weight = whole(HIDDEN, COLUMNS, torch.float32)
    for name, sharded in (("model", True), ("draft", drafter_sharded)):
        prefix = f"{name}.layers.0"
        model = base_loader.initialize_model(here.config, prefix=prefix, model_class=Model)
        layer = model.o_proj
        assert hasattr(layer, "oproj") == sharded, name
        assert layer.weight.shape == (HIDDEN, HALF if sharded else COLUMNS), name
        load(layer, weight, None)
        finish(layer)
    before = oproj_patch.status().exchanges
    if here.rank == 0 or drafter_sharded:
        _equal(layer, layer, (weight, None), [3, 1], here)
    assert oproj_patch.status().exchanges - before == drafter_sharded


@pytest.mark.parametrize("host", VLLM, indirect=True, ids=str)
def test_seams_and_groups(ran: Ran) -> None:
    """`Seams.installed` after the parts, `Seams.removed` when their groups are gone."""
    for rank, parts in enumerate(ran.parts):
        assert not parts["seams"], f"rank {rank}: {parts['seams']}"
