"""Activation by import, entry point and call, in any order and process; and its undoing.

Each case is a function that runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest

from tests.ranks import launch

pytestmark = pytest.mark.quick
TOGGLE = launch.SIZE
SEAMS = {
    "vllm.distributed.parallel_state": ["init_model_parallel_group"],
    "vllm.model_executor.layers.linear": ["RowParallelLinear.__init__"],
    "vllm.model_executor.models.deepseek_v2": [
        "DeepseekV2MLAAttention.__init__",
        "DeepseekV2Attention.__init__",
    ],
    "vllm.model_executor.model_loader.base_loader": ["initialize_model"],
    "vllm.config": ["VllmConfig.compute_hash"],
}
# Wrapped where a release has them.
SAVERS = {
    "vllm.model_executor.model_loader.sharded_state_loader": ["ShardedStateLoader.save_model"],
    "vllm.model_executor.model_loader.tensorizer_loader": ["TensorizerLoader.save_model"],
    "vllm.model_executor.model_loader.tensorizer": ["serialize_vllm_model"],
}
SYMBOLS = {f"{module}.{path}" for module, paths in SEAMS.items() for path in paths}
WRAPPED = SYMBOLS | {f"{module}.{path}" for module, paths in SAVERS.items() for path in paths}

Snapshot = list[tuple[Any, str, Any]]


def snapshot() -> Snapshot:
    """Every class and function in every loaded module of vLLM, and all attributes of classes."""
    found: Snapshot = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm" or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, (type, FunctionType)) or callable(value):
                found.append((module, attribute, value))
            if isinstance(value, type) and value.__module__.startswith("vllm"):
                found += [(value, inner, vars(value)[inner]) for inner in vars(value)]
    return found


def changed(before: Snapshot) -> list[str]:
    """What is another object now. Class attributes that vLLM itself computes are left out."""
    return sorted(
        {
            f"{owner.__name__}.{name}"
            for owner, name, value in before
            if vars(owner).get(name) is not value
            and not name.startswith(("_abc_", "__pydantic", "__dataclass", "__weakref"))
            and (callable(value) or isinstance(value, (classmethod, staticmethod, property)))
        }
    )


def prepare() -> None:
    for module in (*SEAMS, *SAVERS):
        importlib.import_module(module)
    import vllm.distributed
    from vllm.platforms import current_platform

    assert current_platform is not None and vllm.distributed


@contextlib.contextmanager
def world(**changes: Any) -> Any:
    """A world of this process alone, with these attributes of the VllmConfig."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    from tests.ranks.layers import configuration

    config = configuration()
    vars(config).update(changes)
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            1, 0, f"file://{scratch}/store", 0, backend="gloo"
        )
        # Only now, because vLLM then looks for the other data-parallel ranks.
        config.parallel_config.data_parallel_size = 4
        try:
            yield parallel_state
        finally:
            parallel_state.destroy_distributed_environment()


def first_group(**changes: Any) -> None:
    """What makes the seams go in: vLLM creates a group."""
    with world(**changes) as parallel_state:
        parallel_state.init_model_parallel_group([[0]], 0, "gloo", group_name="ep").destroy()


def supported() -> str:
    from oproj_patch.releases import VLLM_RELEASES  # here, because cases import the package

    return f"{VLLM_RELEASES[0]} to {VLLM_RELEASES[-1]}"


def constructor() -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return vars(RowParallelLinear)["__init__"]


def raises(code: str, call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        assert getattr(error, "code", "") == code, error
        return str(error)
    raise AssertionError(f"{call} did not raise {code}")


# -- cases: vLLM was imported first -----------------------------------------------------------


def import_after_vllm() -> None:
    before, original = snapshot(), constructor()
    os.environ[TOGGLE] = "2"
    import oproj_patch

    assert oproj_patch.status().enabled and oproj_patch.status().size == 2
    assert oproj_patch.status().seams == () and constructor() is original
    assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]
    first_group()
    status = oproj_patch.status()
    assert set(status.seams) == WRAPPED and status.versions["vllm"].startswith("0.32.0")
    assert constructor() is not original and constructor().__wrapped__ is original
    assert changed(before) == sorted(
        {
            f"{module}.{path}" if "." not in path else path
            for module, paths in (SEAMS | SAVERS).items()
            for path in paths
        }
    )
    oproj_patch.disable()
    assert constructor() is original and changed(before) == []
    assert not oproj_patch.status().enabled and oproj_patch.status().seams == ()
    assert TOGGLE not in os.environ
    first_group()
    assert changed(before) == []


def import_twice() -> None:
    original = constructor()
    os.environ[TOGGLE] = "2"
    import oproj_patch

    first_group()
    wrapped = constructor()
    oproj_patch.plugin()
    importlib.reload(oproj_patch)
    del sys.modules["oproj_patch"]
    import oproj_patch as again

    again.enable()
    again.enable(2)
    first_group()
    assert constructor() is wrapped and wrapped.__wrapped__ is original
    again.disable()
    assert constructor() is original


def on_off_on() -> None:
    before, original = snapshot(), constructor()
    import oproj_patch

    for size in (2, 4, 2):
        oproj_patch.enable(size)
        first_group()
        assert constructor().__wrapped__ is original and oproj_patch.status().size == size
        assert os.environ[TOGGLE] == str(size)
        oproj_patch.disable()
        oproj_patch.disable()
        assert changed(before) == []


def undo_before_patch() -> None:
    before = snapshot()
    import oproj_patch

    oproj_patch.disable()
    assert changed(before) == []
    oproj_patch.enable(2)
    oproj_patch.disable()  # no group was created: only the hook is there
    assert changed(before) == []
    oproj_patch.enable(2)
    oproj_patch.enable(0)
    assert changed(before) == [] and not oproj_patch.status().enabled
    first_group()
    assert changed(before) == []


def size_changed_before_groups() -> None:
    import oproj_patch

    oproj_patch.enable(2)
    oproj_patch.enable(4)
    first_group()
    assert oproj_patch.status().size == 4
    oproj_patch.enable(2)  # seams are in, but nothing is sharded yet
    first_group()
    assert oproj_patch.status().size == 2 and not hasattr(constructor().__wrapped__, "__wrapped__")


def refused_size_leaves_things_as_they_are() -> None:
    before = snapshot()
    import oproj_patch

    raises("OPROJ001", oproj_patch.enable, "two")
    assert TOGGLE not in os.environ and changed(before) == []
    oproj_patch.enable(4)
    raises("OPROJ001", oproj_patch.enable, -3)
    assert os.environ[TOGGLE] == "4" and oproj_patch.status().size == 4


def off() -> None:
    before = snapshot()
    for value in (None, "", "0", "1", " 1 "):
        if value is None:
            os.environ.pop(TOGGLE, None)
        else:
            os.environ[TOGGLE] = value
        sys.modules.pop("oproj_patch", None)
        import oproj_patch

        oproj_patch.plugin()
        assert [name for name in sys.modules if name.startswith("oproj_patch.")] == [
            "oproj_patch._version"
        ]
        first_group()
        assert changed(before) == []
    oproj_patch.enable()
    assert not oproj_patch.status().enabled and changed(before) == []


def copies_of_the_hook() -> None:
    original = constructor()
    import oproj_patch

    oproj_patch.enable(2)
    from vllm.distributed.parallel_state import init_model_parallel_group as copy

    first_group()
    with world():
        copy([[0]], 0, "gloo", group_name="ep").destroy()
    assert constructor().__wrapped__ is original and not hasattr(original, "__wrapped__")
    oproj_patch.disable()
    with world():
        copy([[0]], 0, "gloo", group_name="ep").destroy()
    assert constructor() is original


def missing(symbol: str) -> None:
    """Without `symbol` nothing is patched, and who goes on is refused again."""
    import vllm

    module, path = next(
        (sys.modules[module], path)
        for module, paths in SEAMS.items() for path in paths if f"{module}.{path}" == symbol
    )  # fmt: skip
    owner_path, _, attribute = path.rpartition(".")
    if attribute == "__init__":  # it would be inherited: the class itself is gone
        owner_path, attribute = "", owner_path
    owner = getattr(module, owner_path) if owner_path else module
    file = sys.modules[owner.__module__].__file__ if owner_path else owner.__file__
    delattr(owner, attribute)
    before = snapshot()
    import oproj_patch

    if attribute == "init_model_parallel_group":
        message = raises("OPROJ008", oproj_patch.enable, 2)
        assert changed(before) == []
    else:
        oproj_patch.enable(2)
        for _ in range(2):
            message = raises("OPROJ008", first_group)
            assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]
        oproj_patch.disable()
        assert changed(before) == []
    release = f" of vllm {vllm.__version__} "
    for part in (symbol, release, f" see {file}, ", f"vllm {supported()}", TOGGLE):
        assert part in message, (part, message)


def changed_signature() -> None:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers import linear

    import oproj_patch

    before = snapshot()

    def init(self: Any, input_size: int, output_size: int, name: str = "") -> None: ...

    linear.RowParallelLinear.__init__ = init  # what a later release might have
    oproj_patch.enable(2)
    message = raises("OPROJ008", first_group)
    assert "RowParallelLinear.__init__" in message and "has no parameter" in message
    assert "quant_config, prefix" in message
    assert not hasattr(VllmConfig.compute_hash, "__wrapped__")
    assert len(changed(before)) == 2  # the hook, and what this test changed


def failure_while_wrapping() -> None:
    """An error after some seams are in: they come out again."""
    import oproj_patch

    before = snapshot()
    oproj_patch.enable(2)
    import wrapt

    apply, calls = wrapt.apply_patch, []

    def failing(parent: Any, attribute: str, replacement: Any) -> None:
        calls.append(attribute)
        if len(calls) == 3:
            raise RuntimeError("no room")
        apply(parent, attribute, replacement)

    wrapt.apply_patch = failing
    assert "no room" in raises("OPROJ008", first_group)
    assert len(calls) == 3
    assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]


def untested_version() -> None:
    import vllm

    for version in ("0.99.0", "0.9.0", "1.0"):
        vllm.__version__ = version
        refused(version)
    os.environ["OPROJ_PATCH_SKIP_VERSION_CHECK"] = "1"
    accepted()


def refused(version: str) -> None:
    """The release is named, and nothing is patched."""
    import oproj_patch

    oproj_patch.disable()
    before = snapshot()
    oproj_patch.enable(2)
    message = raises("OPROJ009", first_group)
    assert f"requested vllm {supported()}, found {version};" in message, message
    assert "OPROJ_PATCH_SKIP_VERSION_CHECK=1" in message and TOGGLE in message
    assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]
    oproj_patch.disable()
    assert changed(before) == []


def a_second_engine_that_needs_more_seams() -> None:
    import oproj_patch

    adapters = "vllm.lora.model_manager.from_layer"
    oproj_patch.enable(2)
    first_group()
    once = oproj_patch.status().seams
    assert adapters not in once
    first_group(lora_config=object())
    assert oproj_patch.status().seams == (*once, adapters)
    first_group(lora_config=object())
    assert oproj_patch.status().seams == (*once, adapters)
    oproj_patch.disable()
    assert oproj_patch.status().seams == ()


def a_refused_start_that_is_mended_in_its_world() -> None:
    import oproj_patch

    oproj_patch.enable(2)
    with world() as parallel_state:
        from vllm.config import get_current_vllm_config

        create = parallel_state.init_model_parallel_group
        load = get_current_vllm_config().load_config
        load.load_format = "sharded_state"
        assert "--load-format is sharded_state" in raises(
            "OPROJ015", create, [[0]], 0, "gloo", False, None, "ep"
        )
        load.load_format = "auto"
        create([[0]], 0, "gloo", group_name="ep").destroy()
    assert set(oproj_patch.status().seams) == WRAPPED


def lacking_the_loader() -> None:
    import vllm
    from vllm.model_executor import model_loader

    import oproj_patch

    before = snapshot()
    oproj_patch.enable(2)
    message = raises("OPROJ008", first_group)
    assert f"base_loader.initialize_model of vllm {vllm.__version__} cannot be found" in message
    assert f" see {model_loader.__file__}, " in message, message
    assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]


def accepted() -> None:
    import oproj_patch

    oproj_patch.enable(2)
    first_group()
    assert set(oproj_patch.status().seams) == WRAPPED


def version_gate_reads_any_form() -> None:
    import vllm

    import oproj_patch

    for version in ("0.32.0+cpu", "0.31.0rc1", "0.32.0.post1"):
        vllm.__version__ = version
        oproj_patch.enable(2)
        first_group()
        assert oproj_patch.status().seams and oproj_patch.status().versions["vllm"] == version
        oproj_patch.disable()


def auto_without_a_size() -> None:
    import oproj_patch

    oproj_patch.enable("auto")
    assert oproj_patch.status().enabled and oproj_patch.status().size == 0
    message = raises("OPROJ017", first_group)
    assert f"{TOGGLE} is auto, but --additional-config names no size" in message
    assert oproj_patch.status().seams == ()


def environment_of_children() -> None:
    import oproj_patch

    for before, during in (
        (None, None), ("", "oproj_patch"), ("a,b", "a,b,oproj_patch"),
        ("oproj_patch", "oproj_patch"), ("a,oproj_patch", "a,oproj_patch"),
    ):  # fmt: skip
        os.environ.pop("VLLM_PLUGINS", None)
        if before is not None:
            os.environ["VLLM_PLUGINS"] = before
        oproj_patch.enable(2)
        assert os.environ.get("VLLM_PLUGINS") == during, (before, during)
        oproj_patch.enable(4)
        assert os.environ.get("VLLM_PLUGINS") == during
        oproj_patch.disable()
        assert os.environ.get("VLLM_PLUGINS") == before


def entry_point() -> None:
    """vLLM's own plugin loading, with and without a filter, on and off."""
    from vllm import plugins

    from oproj_patch.settings import VARIABLES

    ray = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
    before = snapshot()

    def load() -> Any:
        plugins.plugins_loaded = False
        for name in [n for n in sys.modules if n.partition(".")[0] == "oproj_patch"]:
            del sys.modules[name]
        plugins.load_general_plugins()
        api = sys.modules.get("oproj_patch.activation")
        return api.status() if api else None

    assert load() is None and "oproj_patch" in sys.modules and changed(before) == []
    os.environ["VLLM_PLUGINS"] = "another_plugin"
    os.environ[TOGGLE] = "2"
    assert load() is None and "oproj_patch" not in sys.modules and changed(before) == []
    os.environ["VLLM_PLUGINS"] = "another_plugin,oproj_patch"
    os.environ[ray] = "MINE"
    assert load().enabled and load().size == 2
    assert os.environ[ray].startswith("MINE,") and TOGGLE in os.environ[ray]
    assert len(os.environ[ray].split(",")) == 1 + len(VARIABLES)


def variables_for_ray() -> None:
    """vLLM's plugin loading names ours to Ray; switching off takes exactly those away again."""
    from vllm import plugins
    from vllm.platforms import current_platform

    import oproj_patch
    from oproj_patch.settings import VARIABLES

    ray = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
    platform = type(current_platform)
    for before, since, after in (
        (None, "", None), ("", "", ""), ("MINE", "", "MINE"), ("A,,B", "", "A,,B"),
        (f"A,{TOGGLE}", "", f"A,{TOGGLE}"), ("A", ",LATER", "A,LATER"), (None, ",LATER", "LATER"),
    ):  # fmt: skip
        for off in (oproj_patch.disable, lambda: oproj_patch.enable(0)):
            names = ["theirs", VARIABLES[1]]  # as vLLM up to 0.18 has it
            platform.additional_env_vars = names
            os.environ.pop(ray, None)
            if before is not None:
                os.environ[ray] = before
            os.environ[TOGGLE] = "2"
            plugins.plugins_loaded = False
            plugins.load_general_plugins()
            oproj_patch.enable(4)  # another size keeps them
            oproj_patch.plugin()
            assert sorted(filter(None, os.environ[ray].split(","))) == sorted(
                {*filter(None, (before or "").split(",")), *VARIABLES}
            )
            assert names[:2] == ["theirs", VARIABLES[1]] and sorted(names[1:]) == sorted(VARIABLES)
            os.environ[ray] += since
            off()
            assert os.environ.get(ray) == after, (before, os.environ.get(ray))
            assert platform.additional_env_vars is names and names == ["theirs", VARIABLES[1]]


def bad_toggle_through_the_entry_point() -> None:
    """vLLM swallows what a plugin raises while it is loaded: no engine may start all the same."""
    from vllm import plugins

    os.environ[TOGGLE] = "two"
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    api = sys.modules["oproj_patch.activation"]  # the import of the package itself failed
    for _ in range(2):
        assert f"{TOGGLE} is 'two'" in raises("OPROJ001", first_group)
    os.environ[TOGGLE] = "2"
    api.activate()
    first_group()
    assert set(api.status().seams) == WRAPPED


def _in_child(queue: Any) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    api = sys.modules.get("oproj_patch.activation")
    told = [api.status().enabled, api.status().size] if api else [False, 0]
    queue.put([*told, "torch" in sys.modules])


def _child(method: str) -> Any:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,), daemon=True)
    process.start()
    try:
        return queue.get(timeout=120)[:2]
    finally:
        process.kill()
        process.join()


def children() -> None:
    """Spawned children load the plugin, forked ones inherit; a filter does not keep it out."""
    assert _child("spawn") == [False, 0]
    os.environ["VLLM_PLUGINS"] = "another_plugin"
    import oproj_patch

    oproj_patch.enable(4)
    assert _child("spawn") == [True, 4] and _child("fork") == [True, 4]
    oproj_patch.disable()
    assert _child("spawn") == [False, 0] and _child("fork") == [False, 0]


def forked_child_is_its_own() -> None:
    """disable() in a forked child leaves the parent patched."""
    original = constructor()
    import oproj_patch

    oproj_patch.enable(2)
    first_group()
    pid = os.fork()
    if pid == 0:
        oproj_patch.disable()
        os._exit(0 if constructor() is original else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert constructor().__wrapped__ is original and oproj_patch.status().enabled


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        import_after_vllm, import_twice, on_off_on, undo_before_patch, size_changed_before_groups,
        refused_size_leaves_things_as_they_are, off, copies_of_the_hook, changed_signature,
        failure_while_wrapping, untested_version, version_gate_reads_any_form,
        auto_without_a_size, environment_of_children, entry_point, variables_for_ray,
        bad_toggle_through_the_entry_point, children, forked_child_is_its_own,
        a_second_engine_that_needs_more_seams, a_refused_start_that_is_mended_in_its_world,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] * (case == "children")) for case in CASES]
)
def test_vllm_first(case: str) -> None:
    launch.run(1, CASES[case], seconds=300)


@pytest.mark.parametrize("symbol", sorted(SYMBOLS))
def test_a_symbol_that_is_gone(symbol: str) -> None:
    launch.run(1, missing, symbol)


# -- fresh processes: the package comes first -------------------------------------------------


def import_before_vllm() -> None:
    """The toggle is on, and the package is imported before anything of vLLM."""
    import oproj_patch

    assert oproj_patch.status().enabled
    assert not {"torch", "vllm"} & set(sys.modules)
    prepare()
    from vllm import distributed

    hook = distributed.parallel_state.init_model_parallel_group
    original = hook.__wrapped__
    assert distributed.init_model_parallel_group is original
    before = snapshot()
    first_group()
    assert set(oproj_patch.status().seams) == WRAPPED
    oproj_patch.disable()
    assert changed(before) == ["vllm.distributed.parallel_state.init_model_parallel_group"]
    assert distributed.parallel_state.init_model_parallel_group is original
    assert not hasattr(constructor(), "__wrapped__")


def enabled_then_disabled_before_vllm() -> None:
    import oproj_patch

    oproj_patch.enable(4)
    oproj_patch.disable()
    prepare()
    from vllm.distributed import parallel_state

    assert not hasattr(parallel_state.init_model_parallel_group, "__wrapped__")
    before = snapshot()
    first_group()
    assert changed(before) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "toggle"), [(import_before_vllm, "2"), (enabled_then_disabled_before_vllm, "")]
)
def test_package_first(case: Callable[[], None], toggle: str) -> None:
    launch.run(1, case, env={TOGGLE: toggle}, fresh=True)


@pytest.mark.parametrize(
    ("toggle", "allowed"),
    [
        *((text, ["oproj_patch", "oproj_patch._version"]) for text in ("", "0", "1")),
        ("2", None),
        ("auto", None),
    ],
)
def test_import_is_light(toggle: str, allowed: list[str] | None) -> None:
    """Off imports one module and its version; on does not import torch or vLLM either."""
    code = (
        "import os, sys, oproj_patch\n"
        "if os.environ['OPROJ_TENSOR_PARALLEL_SIZE'] in ('', '0', '1'): oproj_patch.plugin()\n"
        "print(*(name for name in sorted(sys.modules) if name.partition('.')[0] in "
        "('torch', 'vllm', 'wrapt', 'oproj_patch')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={TOGGLE: toggle, "PYTHONPATH": str(launch.ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.split()  # fmt: skip
    if allowed is not None:
        assert found == allowed
    assert not {name.partition(".")[0] for name in found} & {"torch", "vllm"}
