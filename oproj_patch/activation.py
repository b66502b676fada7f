"""Activation, its undoing, and the programmatic interface.

The import of the package, or its entry point, wraps `parallel_state.init_model_parallel_group`
only. When vLLM creates its first group, the ranks agree on the start, and every other seam is
installed: by then the host has applied its own patches, and a process that builds no model stays
untouched.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from . import settings as settings_module
from .errors import OprojError
from .hosts import ascend_option, ascend_version, launch_env, vllm_version
from .hosts.seam import Installed, Seam, install, install_on_import
from .settings import TOGGLE, Settings


@dataclass(frozen=True)
class Status:
    """What is active in this process.

    enabled: the toggle is on; size: the otp group size, 0 when off or not yet known.
    versions: distribution -> version, once seams are installed; seams: patched symbols.
    otp_ranks: global ranks of this process's otp group; layers: sharded layers; bytes_kept,
        bytes_saved: of their parameters on this rank, and what it would hold more unsharded.
    grid: of the group, `AxB`; empty before there is a group.
    exchanges: steps of o_proj layers run so far (a graph replay is not counted).
    """

    enabled: bool
    size: int
    versions: dict[str, str]
    seams: tuple[str, ...]
    otp_ranks: tuple[int, ...] = ()
    layers: int = 0
    bytes_kept: int = 0
    bytes_saved: int = 0
    exchanges: int = 0
    grid: str = ""


@dataclass
class _Start:
    """One start of vLLM's process groups, on which the ranks agreed or which was refused."""

    world: weakref.ref[Any]
    key: str = ""
    refusal: OprojError | None = None
    facts: dict[str, str] = field(default_factory=dict)
    tp_groups: list[list[int]] = field(default_factory=list)


@dataclass
class _State:
    settings: Settings = field(default_factory=Settings)
    refusal: OprojError | None = None
    host: Any = None
    installed: list[Installed] = field(default_factory=list)
    start: _Start | None = None
    stack: ExitStack = field(default_factory=ExitStack)


_state = _State()
# Not part of the state: another size does not make vLLM load its plugins again.
_ray = ExitStack()


def activate() -> None:
    """Do what the environment asks for. Idempotent; off is a no-op.

    Raises OprojValueError when a variable is not understood, OprojError when the toggle changed
    while sharded layers exist.
    """
    try:
        wanted = settings_module.read()
    except OprojError as error:
        # vLLM logs what a plugin raises while it is loaded, and goes on without the plugin.
        if not (_state.settings.enabled or _state.refusal):
            _wrap_group_creation()
        _state.refusal = error
        raise
    if wanted == _state.settings and _state.refusal is None:
        return
    _refuse_while_sharded(f"{TOGGLE} changed")
    _withdraw()
    if not wanted.enabled:
        _ray.close()
        return
    _state.settings = wanted
    _state.stack.callback(launch_env.add_to_vllm_plugins(os.environ))
    version = ascend_version()
    seam, host = ascend_option.seam(wanted, version), lambda: f"vllm-ascend {version}"
    _state.stack.callback(install_on_import(seam, seam.module, host, []))
    _wrap_group_creation()


def plugin_loaded() -> None:
    """Do what vLLM's plugin loader wants: `activate`, and let vLLM copy our variables to Ray."""
    activate()
    _ray.callback(launch_env.add_to_ray(os.environ))


def enable(size: int | str | None = None) -> None:
    """Turn the shim on in this process and in those it starts. Raises as `activate` does.

    size: the group size or "auto", written to the toggle; None keeps the toggle as it is.
    """
    if size is None:
        activate()
        return
    settings_module.parse_size(str(size))
    before = os.environ.get(TOGGLE)
    os.environ[TOGGLE] = str(size)
    try:
        activate()
    except OprojError:
        os.environ.pop(TOGGLE)
        if before is not None:
            os.environ[TOGGLE] = before
        elif not status().layers:
            _withdraw()
        raise


def disable() -> None:
    """Undo everything: vLLM's attributes and the environment are as before, the toggle is unset.

    Where another plugin wrapped a symbol after us, its wrapper stays and ours passes through.
    Raises OprojError while sharded layers exist in this process.
    """
    _refuse_while_sharded("disable() was called")
    os.environ.pop(TOGGLE, None)
    _withdraw()
    _ray.close()


def status() -> Status:
    """Return what is active in this process. Imports nothing."""
    otp_group = sys.modules.get(f"{__package__}.sharding.otp_group")
    group = otp_group.current() if otp_group is not None else None
    now = Status(_state.settings.enabled, _state.settings.size, {}, ())
    if _state.host is not None:
        seams = tuple(entry.seam.symbol for entry in _state.installed)
        now = replace(now, versions=dict(_state.host.versions), seams=seams)
    if group is None:
        return now
    kept, saved = group.totals()
    return replace(
        now, size=group.size, otp_ranks=tuple(group.ranks), layers=len(group.layers),
        bytes_kept=kept, bytes_saved=saved, exchanges=group.steps, grid=str(group.grid),
    )  # fmt: skip


def group_seam() -> Seam:
    """Return the one seam that is installed before vLLM creates its groups."""
    return Seam(
        "vllm.distributed.parallel_state", "init_model_parallel_group", _group_created,
        "agree on a start and create the otp group; every caller that creates groups comes "
        "through it, with the rank lists of the whole world",
        ("group_ranks", "backend", "group_name"),
    )  # fmt: skip


def _wrap_group_creation() -> None:
    seam, version = group_seam(), lambda: f"vllm {vllm_version()}"
    # `vllm.distributed` copies the names of its `parallel_state` while it is imported: wrap after
    # that, or the copy would keep the wrapper forever.
    _state.stack.callback(install_on_import(seam, "vllm.distributed", version, _state.installed))


def _group_created(create: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrap vLLM's creation of one kind of groups; the first of a start begins the start."""
    given = inspect.signature(create).bind(*args, **kwargs).arguments
    start = _started()
    if start.refusal is not None:
        _state.start = None  # once mended, the next engine in this world is another start
        raise start.refusal
    name = given.get("group_name")
    if name == "tp" and not start.tp_groups:
        start.tp_groups = given["group_ranks"]
    group = create(*args, **kwargs)
    if name == "dp":
        _create_otp_group(start, given["group_ranks"], given["backend"], group)
    return group


def _started() -> _Start:
    """Return this start of process groups; the first call in a world begins it."""
    from torch import distributed

    toggle = os.environ.pop(TOGGLE, None)
    try:  # with a malformed toggle the import of the package has failed, and would again
        from .sharding import otp_group
    finally:
        if toggle is not None:
            os.environ[TOGGLE] = toggle
    from vllm.config import get_current_vllm_config

    from .hosts import detect

    world = distributed.group.WORLD
    if _state.start is not None and _state.start.world() is world:
        return _state.start
    # Weakly, because a process group must end with its world.
    start = _Start(weakref.ref(world))
    settings, equal, refusal = _state.settings, dict[str, str](), _state.refusal
    try:
        if refusal is None:
            settings, equal = _install(_state.host or detect(), get_current_vllm_config())
    except OprojError as error:
        refusal = error
    except Exception as error:  # told to the others, which would wait for this rank
        what = f"{type(error).__name__}: {error}"
        sentence = f"vLLM's modules or configuration cannot be read here ({what}): mend that first."
        refusal = OprojError("OPROJ008", sentence)
        refusal.__cause__ = error
    start.facts = settings.shared() | equal
    try:
        start.key = otp_group.agree_to_start(settings, equal, refusal)
    except OprojError as error:
        start.refusal = error
    otp_group.refuse(start.refusal)
    _state.start = start
    return start


def _install(host: Any, config: Any) -> tuple[Settings, dict[str, str]]:
    """Check what this rank can check alone, and install every seam but the first.

    Returns the resolved settings, and by name what must be equal on all ranks.
    """
    from .hosts.ascend_option import resolved

    host.settings = settings = resolved(_state.settings, config)
    host.check_version(settings)
    # Another engine of this process may need seams that the first one did not (LoRA).
    known = {entry.seam.symbol for entry in _state.installed}
    wanted = [seam for seam in host.seams(config) if seam.symbol not in known]
    _state.installed += install(wanted, str(host))
    _state.host = host
    host.check(config, settings)
    versions = {f"the version of {name}": version for name, version in host.versions.items()}
    return settings, versions | host.agreed(config)


def _create_otp_group(start: _Start, dp_groups: Sequence[Any], backend: str, dp: Any) -> None:
    from vllm.config import get_current_vllm_config

    from .sharding import otp_group

    host = _state.host
    config = get_current_vllm_config()
    otp_group.create(
        dp_groups, start.tp_groups, backend, host.settings, start.key, dp,
        host.graph_rows(config), host.agreed_grid, start.facts,
    )  # fmt: skip
    original = dp.destroy

    def destroy() -> None:
        # Whoever destroys vLLM's groups calls this object.
        try:
            otp_group.destroy()
        finally:
            _state.start = None
            original()

    dp.destroy = destroy


def _withdraw() -> None:
    """Go back to off: seams and environment as they were."""
    global _state
    _state.stack.close()
    _state = _State()


def _refuse_while_sharded(what: str) -> None:
    now = status()
    if now.layers:
        raise OprojError(
            "OPROJ010",
            f"{what} while {now.layers} o_proj layers are sharded {now.size}-way in this process "
            f"(it now reads {os.environ.get(TOGGLE, '')!r}): shut the engine down first.",
        )
