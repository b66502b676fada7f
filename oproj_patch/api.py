"""Activation and the programmatic interface.

Activation is two steps. First, whenever the package is imported or its entry point is
called, only `parallel_state.init_model_parallel_group` gets a hook. Then, when vLLM creates
its groups, the hook installs every seam: by then the host has applied its own patches, all
its modules can be imported, and processes that never build a model stay untouched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from . import builtin, hosts
from . import settings as settings_module
from .errors import OprojError
from .releases import VLLM_RELEASES
from .seams.registry import Installed, install, undo
from .settings import TOGGLE, Settings

PARALLEL_STATE = "vllm.distributed.parallel_state"
# It copies the names of PARALLEL_STATE while it is imported: hook after that, or the copy
# would keep the hook for ever.
HOOK_AFTER = "vllm.distributed"
HOOKED = "init_model_parallel_group"
# Groups that vLLM creates through it before the data-parallel one.
BEFORE_DP = ("inner_dp_world", "tp", "etp", "edp", "dcp", "pcp", "pp")


@dataclass(frozen=True)
class Status:
    """What is active in this process.

    enabled: the toggle is on here; size: the otp group size, 0 when off or not yet known.
    versions: host name -> version, once seams are installed; seams: patched symbols.
    otp_ranks: global ranks of this process's otp group; layers: sharded layers.
    bytes_kept, bytes_saved: bytes of their parameters on this rank, and what it would hold
        in addition without the shim.
    exchanges: exchanges run so far (a graph replay is not counted).
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
class _State:
    settings: Settings = field(default_factory=Settings)
    refusal: OprojError | None = None
    hook: tuple[Any, Any] | None = None
    waiting: bool = False
    versions: dict[str, str] | None = None
    installed: list[Installed] | None = None
    undo_environment: Callable[[], None] | None = None
    undo_builtin: Callable[[], None] | None = None
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
        _hook_group_creation()
        raise
    if wanted == _state.settings and _state.refusal is None:
        return
    _refuse_while_sharded(f"{TOGGLE} changed")
    _withdraw()
    if not wanted.enabled:
        _withdraw_from_ray()
        return
    _state.settings = wanted
    _state.undo_environment = hosts.let_children_load_us(os.environ)
    _state.undo_builtin = builtin.watch(wanted)
    _hook_group_creation()


def plugin_loaded() -> None:
    """What vLLM's plugin loader calls: `activate`, and let vLLM copy our variables to Ray workers.

    Raises as `activate` does.
    """
    activate()
    if _state.undo_ray is None:
        _state.undo_ray = hosts.let_ray_copy_our_variables(os.environ)


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

    Raises OprojError while sharded layers exist in this process.
    """
    _refuse_while_sharded("disable() was called")
    _restore(None)
    _withdraw()
    _withdraw_from_ray()


def status() -> Status:
    """What is active in this process. Imports nothing."""
    otp_group = sys.modules.get(f"{__package__}.otp_group")
    group = otp_group.current() if otp_group is not None else None
    kept = saved = 0
    if group is not None:
        from . import row_parallel

        kept, saved = row_parallel.totals(group)
    return Status(
        enabled=_state.settings.enabled,
        size=group.size if group is not None else _state.settings.size,
        versions=dict(_state.versions or {}),
        seams=tuple(entry.seam.symbol for entry in _state.installed or ()),
        otp_ranks=tuple(group.ranks) if group is not None else (),
        layers=len(group.layers) if group is not None else 0,
        bytes_kept=kept,
        bytes_saved=saved,
        exchanges=group.exchanges if group is not None else 0,
    )


def _hook_group_creation() -> None:
    if HOOK_AFTER in sys.modules:
        _hook(sys.modules[HOOK_AFTER])
    elif not _state.waiting:
        import wrapt

        wrapt.register_post_import_hook(_hook, HOOK_AFTER)
        _state.waiting = True


def _hook(_: Any) -> None:
    """Hook group creation. Called now, or by wrapt when vLLM's module has been imported."""
    _state.waiting = False
    wanted = _state.settings.enabled or _state.refusal is not None
    if not wanted or _state.hook is not None or _state.installed is not None:
        return
    import wrapt

    parallel_state = sys.modules[PARALLEL_STATE]
    original = getattr(parallel_state, HOOKED, None)
    if original is None:
        raise OprojError(
            "OPROJ008",
            f"{PARALLEL_STATE}.{HOOKED} of vllm {hosts.vllm_version()} cannot be found; "
            "oproj_patch needs it to create the otp group: see "
            f"{parallel_state.__file__}, install a supported release ({VLLM_RELEASES[0]} to "
            f"{VLLM_RELEASES[-1]}), or unset {TOGGLE}.",
        )
    _state.hook = (parallel_state, original)
    setattr(parallel_state, HOOKED, wrapt.FunctionWrapper(original, _first_group))


def _first_group(create: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """vLLM creates its first group: install every seam, then let it go on."""
    # Without a hook this is called through a copy of it, made by an import.
    if _state.refusal is None and _state.hook is not None:
        try:
            _install()
        except OprojError as error:
            _state.refusal = error
    if _state.refusal is not None:
        return _refuse(_state.refusal, create, args, kwargs)
    return getattr(sys.modules[PARALLEL_STATE], HOOKED)(*args, **kwargs)


def _refuse(refusal: OprojError, create: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Raise `refusal` where all ranks can hear of it, or they would wait for this one."""
    import inspect

    from torch import distributed
    from vllm.config import get_current_vllm_config

    toggle = os.environ.pop(TOGGLE, None)
    try:  # with the toggle, the import of the package may have failed, and would again
        from . import otp_group, refusals
    finally:
        _restore(toggle)
    given = inspect.signature(create).bind(*args, **kwargs).arguments
    name = given.get("group_name")
    alone = distributed.get_world_size() == 1
    if name not in (*BEFORE_DP, "dp") or alone or refusals.elastic(get_current_vllm_config()):
        raise refusal
    group = create(*args, **kwargs)
    if name == "dp":
        ranks, backend = given["group_ranks"], given["backend"]
        otp_group.create(ranks, [], backend, _state.settings, {}, group, refusal)
    return group


def _install() -> None:
    host = hosts.detect()
    settings = _state.settings
    host.check_version(settings)
    if settings.auto:
        settings = replace(settings, size=host.configured_size())
    hook = _state.hook
    _remove_hook()
    try:
        _state.installed = install(host.seams(settings), str(host))
    except BaseException:
        # Whoever goes on regardless must be refused again, not served unsharded.
        if hook is not None:
            _hook_group_creation()
        raise
    _state.versions = host.versions


def _remove_hook() -> None:
    if _state.hook is not None:
        parallel_state, original = _state.hook
        setattr(parallel_state, HOOKED, original)
        _state.hook = None


def _withdraw() -> None:
    """Back to off: seams, hook and environment as they were."""
    if _state.installed is not None:
        undo(_state.installed)
    _remove_hook()
    if _state.undo_environment is not None:
        _state.undo_environment()
    if _state.undo_builtin is not None:
        _state.undo_builtin()
    _state.settings = Settings()
    _state.refusal = None
    _state.versions = _state.installed = None
    _state.undo_environment = _state.undo_builtin = None


def _withdraw_from_ray() -> None:
    # Not part of `_withdraw`: another size does not make vLLM load its plugins again.
    if _state.undo_ray is not None:
        _state.undo_ray()
    _state.undo_ray = None


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
