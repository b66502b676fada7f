"""Activation, its undoing, and the programmatic interface.

Activation is two steps. First, whenever the package is imported or its entry point is called, only
`parallel_state.init_model_parallel_group` is wrapped. Then, when vLLM creates its first group, the
ranks agree on the start and every other seam is installed: by then the host has applied its own
patches, all its modules can be imported, and processes that never build a model stay untouched.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from . import settings as settings_module
from .errors import OprojError
from .hosts import ascend_option, distribution, launch_env, vllm_version
from .hosts.seam import Installed, Seam, install, undo
from .settings import TOGGLE, Settings

PARALLEL_STATE = "vllm.distributed.parallel_state"
# It copies the names of PARALLEL_STATE while it is imported: wrap after that, or the copy would
# keep the wrapper for ever.
WRAP_AFTER = "vllm.distributed"


@dataclass(frozen=True)
class Status:
    """What is active in this process.

    enabled: the toggle is on here; size: the otp group size, 0 when off or not yet known.
    versions: host name -> version, once seams are installed; seams: patched symbols.
    otp_ranks: global ranks of this process's otp group; layers: sharded layers.
    bytes_kept, bytes_saved: bytes of their parameters on this rank, and what it would hold
        in addition without the shim.
    exchanges: steps of o_proj layers run so far (a graph replay is not counted).
    """

    enabled: bool
    size: int
    versions: dict[str, str]
    seams: tuple[str, ...]
    otp_ranks: tuple[int, ...]
    layers: int
    bytes_kept: int
    bytes_saved: int
    exchanges: int


@dataclass
class _Start:
    """One start of vLLM's process groups, on which the ranks agreed or which was refused."""

    world: weakref.ref[Any]
    settings: Settings = field(default_factory=Settings)
    key: str = ""
    host: Any = None
    refusal: OprojError | None = None
    tp_groups: list[list[int]] = field(default_factory=list)


@dataclass
class _State:
    settings: Settings = field(default_factory=Settings)
    refusal: OprojError | None = None
    group_seam: list[Installed] = field(default_factory=list)
    waiting: bool = False
    host: Any = None
    installed: list[Installed] = field(default_factory=list)
    start: _Start | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    undo_ray: Callable[[], None] | None = None


_state = _State()


def activate() -> None:
    """Do what the environment asks for. Idempotent; off is a no-op.

    Raises OprojValueError when a variable is not understood, OprojError when the toggle was
    changed while sharded layers exist.
    """
    try:
        wanted = settings_module.read()
    except OprojError as error:
        # vLLM logs what a plugin raises while it is loaded, and goes on without the plugin.
        _state.refusal = error
        _wrap_group_creation()
        raise
    if wanted == _state.settings and _state.refusal is None:
        return
    _refuse_while_sharded(f"{TOGGLE} changed")
    _withdraw()
    if not wanted.enabled:
        _withdraw_from_ray()
        return
    _state.settings = wanted
    _state.stack.callback(launch_env.add_to_vllm_plugins(os.environ))
    _state.stack.callback(ascend_option.watch(wanted, _ascend))
    _wrap_group_creation()


def plugin_loaded() -> None:
    """Do what vLLM's plugin loader wants: `activate`, and let vLLM copy our variables to Ray.

    Raises as `activate` does.
    """
    activate()
    if _state.undo_ray is None:
        _state.undo_ray = launch_env.add_to_ray(os.environ)


def enable(size: int | str | None = None) -> None:
    """Turn the shim on in this process and in those it starts.

    size: the group size or "auto", written to the toggle; None keeps the toggle as it is.
    Raises OprojValueError when the size is not understood, OprojError when sharded layers of
    another size exist.
    """
    if size is not None:
        settings_module.parse_size(str(size))
        before = os.environ.get(TOGGLE)
        os.environ[TOGGLE] = str(size)
        try:
            activate()
        except OprojError:
            _restore(before)
            raise
        return
    activate()


def disable() -> None:
    """Undo everything: vLLM's attributes and the environment are as before, the toggle is unset.

    Where another plugin wrapped a symbol after us, its wrapper stays and ours passes through.
    Raises OprojError while sharded layers exist in this process.
    """
    _refuse_while_sharded("disable() was called")
    _restore(None)
    _withdraw()
    _withdraw_from_ray()


def status() -> Status:
    """Return what is active in this process. Imports nothing."""
    otp_group = sys.modules.get(f"{__package__}.sharding.otp_group")
    group = otp_group.current() if otp_group is not None else None
    kept, saved = group.totals() if group is not None else (0, 0)
    seams = [*_state.group_seam, *_state.installed] if _state.installed else ()
    return Status(
        enabled=_state.settings.enabled,
        size=group.size if group is not None else _state.settings.size,
        versions=dict(_state.host.versions) if _state.host is not None else {},
        seams=tuple(entry.seam.symbol for entry in seams),
        otp_ranks=tuple(group.ranks) if group is not None else (),
        layers=len(group.layers) if group is not None else 0,
        bytes_kept=kept,
        bytes_saved=saved,
        exchanges=group.steps if group is not None else 0,
    )


def group_seam() -> Seam:
    """Return the one seam that is installed before vLLM creates its groups."""
    return Seam(
        PARALLEL_STATE,
        "init_model_parallel_group",
        _group_created,
        "agree on a start and create the otp group; every caller that creates groups comes "
        "through it, with the rank lists of the whole world",
        ("group_ranks", "backend", "group_name"),
    )


def _wrap_group_creation() -> None:
    if WRAP_AFTER in sys.modules:
        _wrap(None)
    elif not _state.waiting:
        import wrapt

        wrapt.register_post_import_hook(_wrap, WRAP_AFTER)
        _state.waiting = True


def _wrap(_: Any) -> None:
    """Wrap group creation. Called now, or by wrapt when vLLM's module has been imported."""
    _state.waiting = False
    wanted = _state.settings.enabled or _state.refusal is not None
    if wanted and not _state.group_seam:
        _state.group_seam = install([group_seam()], f"vllm {vllm_version()}")


def _group_created(create: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrap vLLM's creation of one kind of groups; the first of a start begins the start."""
    given = inspect.signature(create).bind(*args, **kwargs).arguments
    start = _started()
    if start.refusal is not None:
        raise start.refusal
    name = given.get("group_name")
    if name == "tp" and not start.tp_groups:
        start.tp_groups = given["group_ranks"]
    group = create(*args, **kwargs)
    if name == "dp":
        _create_otp_group(start, given["group_ranks"], given["backend"], group)
    return group


def _started() -> _Start:
    """Return this start of process groups; begin one when there is none in this world."""
    from torch import distributed

    toggle = os.environ.pop(TOGGLE, None)
    try:  # with a malformed toggle the import of the package has failed, and would again
        from .sharding import otp_group
    finally:
        _restore(toggle)
    world = distributed.group.WORLD
    if _state.start is None or _state.start.world() is not world:
        # Weakly, because a process group must end with its world.
        _state.start = _Start(weakref.ref(world))
        _begin(_state.start)
        otp_group.refuse(_state.start.refusal)
    return _state.start


def _begin(start: _Start) -> None:
    """Read the configuration, install the seams, and agree with every rank of the world."""
    from vllm.config import get_current_vllm_config

    from .hosts import detect
    from .sharding import otp_group

    refusal = _state.refusal
    settings, equal = _state.settings, dict[str, str]()
    try:
        if refusal is None:
            host = _state.host or detect()
            config = get_current_vllm_config()
            settings, equal = _install(host, config)
            start.host = host
    except OprojError as error:
        refusal = error
    try:
        start.key = otp_group.agree_to_start(settings, equal, refusal)
    except OprojError as error:
        start.refusal = error
    start.settings = settings


def _install(host: Any, config: Any) -> tuple[Settings, dict[str, str]]:
    """Check what can be checked on this rank alone, and install every seam but the first.

    Returns the resolved settings, and by name what must be equal on all ranks.
    """
    from .hosts.host import resolved

    host.settings = settings = resolved(_state.settings, config)
    host.check_version(settings)
    if not _state.installed:
        _state.installed = install(host.seams(), str(host))
        _state.host = host
    host.check(config, settings)
    versions = {f"the version of {name}": version for name, version in host.versions.items()}
    return settings, versions | host.agreed(config)


def _create_otp_group(start: _Start, dp_groups: Sequence[Any], backend: str, dp: Any) -> None:
    from vllm.config import get_current_vllm_config

    from .sharding import otp_group, topology

    topology.check_size(start.settings.size, len(dp_groups[0]))
    graph_rows = start.host.graph_rows(get_current_vllm_config())
    otp_group.create(dp_groups, start.tp_groups, backend, start.settings, start.key, dp, graph_rows)
    original = dp.destroy

    def destroy() -> None:
        # Whoever destroys vLLM's groups calls this object.
        otp_group.destroy()
        _state.start = None
        original()

    dp.destroy = destroy


def _withdraw() -> None:
    """Go back to off: seams and environment as they were."""
    global _state
    undo([*_state.group_seam, *_state.installed])
    _state.stack.close()
    otp_group = sys.modules.get(f"{__package__}.sharding.otp_group")
    if otp_group is not None:
        otp_group.refuse(None)
    _state = _State(waiting=_state.waiting, undo_ray=_state.undo_ray)


def _withdraw_from_ray() -> None:
    # Not part of `_withdraw`: another size does not make vLLM load its plugins again.
    if _state.undo_ray is not None:
        _state.undo_ray()
    _state.undo_ray = None


def _ascend() -> str:
    return f"vllm-ascend {distribution('vllm-ascend', 'vllm_ascend') or 'unknown'}"


def _restore(toggle: str | None) -> None:
    if toggle is None:
        os.environ.pop(TOGGLE, None)
    else:
        os.environ[TOGGLE] = toggle


def _refuse_while_sharded(what: str) -> None:
    now = status()
    if now.layers:
        raise OprojError(
            "OPROJ010",
            f"{what} while {now.layers} o_proj layers are sharded {now.size}-way in this process "
            f"(it now reads {os.environ.get(TOGGLE, '')!r}): shut the engine down first.",
        )
