"""vllm-ascend's configurations and releases that are refused, before any group exists.

One process of each release runs the parts that are tests here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from oproj_patch.releases import ASCEND_RELEASES, in_range
from tests.ranks import launch

from . import ascend
from .ascend import changed, refused
from .parts import Parts, Ran
from .wheels import Host

RELEASES = tuple(ASCEND_RELEASES)
TORCHAIR = ("0.9.1", "0.11.0")
# Attention implementations that a release takes under decode context parallelism, or `dsa_cp`.
CONTEXT_PARALLEL = {
    "0.13.0": ["mla_cp.AscendMlaCPImpl"],
    "0.18.0": ["mla_cp.AscendMlaCPImpl", "sfa_cp.AscendSFACPImpl"],
    "0.23.0": [
        "mla_cp.AscendMlaCPImpl",
        "sfa_cp.AscendSFACPImpl",
        "sfa_cp.AscendSFADCPImpl",
        "dsa_cp.AscendDSACPImpl",
    ],
    "0.26.0rc1": [
        "mla_cp.AscendMlaDCPImpl",
        "sfa_cp.AscendSFADCPImpl",
        "dsa_cp.AscendDSACPImpl",
    ],
    "0.30.0rc2": [
        "mla_cp.AscendMlaDCPImpl",
        "sfa_cp.AscendSFADCPImpl",
        "dsa_cp.AscendDSACPImpl",
    ],
}
part = Parts([Host("ascend", release) for release in RELEASES])
_open = contextlib.ExitStack()


class Here:
    """Where a part runs: the release, a model; `config`, as a worker has it."""

    def __init__(self, host: Host, model: str) -> None:
        self.host = host
        self.model = model

    @functools.cached_property
    def config(self) -> Any:
        from vllm.config import set_current_vllm_config

        config = ascend.configured(self.model, 2)
        ascend.import_worker()
        from vllm_ascend import utils

        utils.adapt_patch()
        _open.enter_context(set_current_vllm_config(config))
        return config


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.param
    return found


@pytest.fixture(scope="module")
def ran(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The parts of a release, with the toggle 4."""
    model = ascend.write_model(tmp_path_factory.mktemp(str(host)))
    started = time.monotonic()
    env = ascend.variables(host, 4)
    told = launch.run(1, all_parts, Here(host, model), env=env, fresh=True, seconds=400)
    return Ran(told, time.monotonic() - started)


def all_parts(here: Here) -> dict[str, str]:
    """In a process: run every part."""
    ascend.stand_in()
    return part.run(here.host, here)


@part()  # the first: no configuration exists yet
def test_a_number_beside_the_built_in_option_is_refused(here: Here) -> None:
    option = ascend.option(here.host.version)
    sentence = refused(lambda: ascend.configured(here.model, 2, additional_config=option))
    assert sentence.startswith("OPROJ016: OPROJ_TENSOR_PARALLEL_SIZE is 4")
    assert "oproj_tensor_parallel_size is 2" in sentence


# What is asked for: how the sentence names it, the releases that refuse it, and the remedy.
REFUSALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "xlite": ("additional_config.xlite_graph_config.enabled is True", RELEASES, "remove the"),
    "sparse offload": ("sparse_kv_offload_config.enabled is True", RELEASES[-2:], "remove the"),
    "layer_sharding": ("additional_config.layer_sharding is ['o_proj']", RELEASES, "take o_proj"),
    "prefill": (
        "--prefill-context-parallel-size is 2",
        tuple(release for release in RELEASES if in_range(release, "0.30.0")),
        "remove the option",
    ),
    "LoRA": ("--enable-lora is given", RELEASES, "remove the option"),
    "decode": ("", (), ""),
    "dsa_cp": (
        "additional_config.enable_dsa_cp is True",
        RELEASES[RELEASES.index("0.23.0") :],
        "remove",
    ),
    "VLLM_USE_V2_MODEL_RUNNER": ("VLLM_USE_V2_MODEL_RUNNER ", RELEASES, "unset one"),
    "VLLM_ASCEND_ENABLE_DBO": ("VLLM_ASCEND_ENABLE_DBO of vllm-ascend", TORCHAIR, "unset one"),
    "first engine": ("VLLM_USE_V1 is 0", RELEASES, "set VLLM_USE_V1=1"),
    "full graphs": ("of vllm-ascend 0.11.0 is FULL", ("0.11.0",), "use PIECEWISE or NONE"),
    "full graphs, drafter": ("of vllm-ascend 0.11.0 is FULL", ("0.11.0",), "use PIECEWISE"),
    "eagle": ("", (), ""),
    "shared experts": ("enable_shared_expert_dp with torchair", ("0.11.0",), "disable one"),
    "nothing": ("", (), ""),
}


@part()
def test_configurations_are_refused_by_name_with_a_remedy(here: Here) -> None:
    """Each conflict put into the release's own configuration objects, alone."""
    from vllm import envs
    from vllm_ascend import ascend_config

    from oproj_patch.hosts import detect
    from oproj_patch.settings import Settings

    config, host, settings = here.config, detect(), Settings(size=2)
    theirs = ascend_config._ASCEND_CONFIG
    enabled = SimpleNamespace(enabled=True)
    eagle = SimpleNamespace(method="eagle", num_speculative_tokens=2)
    drafter = SimpleNamespace(method="mtp", num_speculative_tokens=2)
    full = SimpleNamespace(name="FULL")
    graphs = (config.model_config, "enforce_eager", False)
    level = (config.compilation_config, "level", 3)  # what 0.9.1 takes where it is not eager
    mode = (config.compilation_config, "cudagraph_mode", full)
    if not hasattr(config.compilation_config, "cudagraph_mode"):
        mode = level
    changes: dict[str, list[tuple[Any, str, Any]]] = {
        "nothing": [],
        "xlite": [(theirs, "xlite_graph_config", enabled)],
        "sparse offload": [(theirs, "sparse_kv_offload_config", enabled)],
        "layer_sharding": [(theirs, "layer_sharding", ["o_proj"])],
        "prefill": [(config.parallel_config, "prefill_context_parallel_size", 2)],
        "decode": [(config.parallel_config, "decode_context_parallel_size", 2)],
        "LoRA": [(config, "lora_config", SimpleNamespace())],
        "dsa_cp": [(config, "additional_config", {"enable_dsa_cp": True})],
        "eagle": [(config, "speculative_config", eagle)],
        "first engine": [(envs, "VLLM_USE_V1", False)],
        "full graphs": [graphs, mode],
        "full graphs, drafter": [graphs, mode, (config, "speculative_config", drafter)],
        "shared experts": [
            graphs,
            (theirs, "torchair_graph_config", enabled),
            (theirs, "enable_shared_expert_dp", True),
        ],
    }
    told: dict[str, str] = {}
    for asked, values in changes.items():
        with contextlib.ExitStack() as stack:
            for target, attribute, value in values:
                stack.enter_context(changed(target, attribute, value))
            told[asked] = refused(lambda: host.check(config, settings))
    for asked in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_ASCEND_ENABLE_DBO"):
        os.environ[asked] = "1"
        told[asked] = refused(lambda: host.check(config, settings))
        del os.environ[asked]
    assert told.keys() == REFUSALS.keys()
    for asked, (name, wanted, remedy) in REFUSALS.items():
        if here.host.version not in wanted:
            assert told[asked] == "", asked
            continue
        assert told[asked].startswith("OPROJ015: OPROJ_TENSOR_PARALLEL_SIZE is 2, and ")
        assert name in told[asked], asked
        assert re.search(remedy, told[asked]), told[asked]


@part(*(host for host in part.hosts if host.version in CONTEXT_PARALLEL))
def test_forward_under_decode_context_parallelism_is_the_inherited_one(here: Here) -> None:
    """Our seam is in its forward. That of `dsa_cp`, with weights of its own, is another one."""
    import wrapt
    from vllm_ascend.attention import mla_v1, sfa_v1

    from oproj_patch.hosts import detect
    from oproj_patch.hosts.seam import install

    bases = mla_v1.AscendMLAImpl, sfa_v1.AscendSFAImpl
    assert here.config
    installed = install(
        [seam for seam in detect().seams(None) if seam.path.endswith("Impl.forward")], "this host"
    )
    assert {entry.parent for entry in installed} >= {*bases}
    for name in CONTEXT_PARALLEL[here.host.version]:
        module, _, attribute = name.partition(".")
        found = importlib.import_module(f"vllm_ascend.attention.context_parallel.{module}")
        kind = getattr(found, attribute)
        ours = issubclass(kind, bases)
        assert ours == (module != "dsa_cp")
        forward = inspect.getattr_static(kind, "forward")
        assert isinstance(forward, wrapt.FunctionWrapper) == ours
        assert ("forward" in vars(kind)) == (not ours)
    for entry in installed:
        assert entry.undo()


@part()
def test_another_vllm_is_refused(here: Here) -> None:
    import vllm

    from oproj_patch import activation
    from oproj_patch.hosts import detect

    config = here.config
    with changed(vllm, "__version__", "0.12.0"):
        told = refused(lambda: activation._install(detect(), config))
    assert told.startswith(
        f"OPROJ009: requested vllm {here.host.vllm} for vllm-ascend {here.host.version}, found "
        "vllm 0.12.0"
    )


@part()
def test_a_symbol_that_is_gone_is_named_and_nothing_is_patched(here: Here) -> None:
    import wrapt

    config = here.config
    from vllm_ascend.attention import mla_v1

    from oproj_patch import activation
    from oproj_patch.hosts import detect

    name = str(detect())
    assert name.startswith(f"vllm-ascend {here.host.version} on vllm {here.host.vllm}")
    implementation = mla_v1.AscendMLAImpl
    del mla_v1.AscendMLAImpl
    told = refused(lambda: activation._install(detect(), config))
    mla_v1.AscendMLAImpl = implementation
    assert told.startswith("OPROJ008: vllm_ascend.attention.mla_v1.AscendMLAImpl.forward")
    for wanted in (name, "cannot be found", "vllm_ascend/attention/mla_v1.py, "):
        assert wanted in told
    for seam in detect().seams(None):
        if seam.lazy:  # not in every release
            continue
        found = wrapt.resolve_path(importlib.import_module(seam.module), seam.path)[2]
        assert not isinstance(found, wrapt.FunctionWrapper), seam.symbol


@part()
def test_our_key_is_out_of_its_sight(here: Here) -> None:
    """`additional_config.oproj_patch` is there for us, and AscendConfig never sees it."""
    from vllm_ascend import ascend_config

    from oproj_patch.hosts.ascend_option import resolved
    from oproj_patch.settings import Settings

    ours = {"oproj_patch": {"size": 4, "weight_gather_rows": 0}}
    config = ascend.configured(here.model, 2, additional_config=ours)
    found = ascend_config.init_ascend_config(config)
    assert not hasattr(found, "oproj_patch")
    assert config.additional_config["oproj_patch"] == ours["oproj_patch"]
    settings = resolved(Settings(size=4), config)
    assert (settings.size, settings.weight_gather_rows) == (4, 0)
