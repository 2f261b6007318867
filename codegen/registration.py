"""Kernels for a running process: `register` and `warmup`, and what a call compiles when no kernel fits it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .build.cached import open_kernel, open_kernels
from .build.core import core_files
from .errors import BuildError, InputError
from .families import (
    TARGETS,
    Family,
    choose_family,
    families_of,
    family_of,
    find_family,
    is_key,
    machine_target,
    require_config,
    require_features,
)
from .families.family import Box
from .runtime import core, family as family_facts, jit, lookup
from .runtime.config import ANY_HEAD_DIM, DIRECTIONS, KernelConfig
from .runtime.dtypes import dtype_name
from .runtime.errors import NoKernelError
from .runtime.kernels import registry
from .runtime.lookup import Made
from .runtime.op_table import FORWARD
from .runtime.problem import Causal, per_dim
from .runtime.request import Request, refusal

if TYPE_CHECKING:
    import torch

    from .build.progress import Listener
    from .spec import Spec

Numbers = int | Sequence[int]
Flags = Causal | Sequence[Causal]

_ENTRY_FIELDS = ("rank", "head_dim", "value_head_dim", "dtype", "out_dtype", "direction", "variant")
_PATTERN = (
    "window",
    "stride",
    "dilation",
    "causal",
    "edge",
    "sink",
    "grid",
    "q_offset",
    "kv_tokens",
    "kv_offset",
    "kv_sink",
)
_TILE_FIELDS = {"q": "q_tile", "kv": "kv_tile", "q_heads": "q_tile_heads"}  # by field of a spec's tile
_SHAPE_FIELDS = ("tokens", *_PATTERN, "extra_tokens", "heads", "kv_heads", "batch")
_WORTH_FITTING = 8  # default Q tiles that a call must have tokens for


def register(
    kernel: KernelConfig | str | os.PathLike[str] | Mapping[str, Any] | Spec | None = None,
    *,
    rank: Numbers | None = None,
    head_dim: Numbers | str | None = None,
    dtype: str | torch.dtype | Sequence[str] | None = None,
    out_dtype: str | torch.dtype | None = None,
    direction: str | Sequence[str] | None = None,
    arch: str | Sequence[str] | None = None,
    q_tile: Numbers | None = None,
    kv_tile: Numbers | None = None,
    q_tile_heads: int | None = None,
    tiles: str | Sequence[Mapping[str, Any]] | None = None,
    value_head_dim: Numbers | None = None,
    variant: str | None = None,
    tokens: Numbers | None = None,
    window: Numbers | None = None,
    stride: Numbers | None = None,
    dilation: Numbers | None = None,
    causal: Flags | None = None,
    edge: str | Sequence[str] | None = None,
    sink: Numbers | None = None,
    grid: Numbers | None = None,
    q_offset: Numbers | None = None,
    kv_tokens: Numbers | None = None,
    kv_offset: Numbers | None = None,
    kv_sink: Numbers | None = None,
    extra_tokens: Numbers | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    batch: int | None = None,
    policy: str | None = None,
) -> list[str]:
    """Makes kernels available in this process: loaded already, from the cache, or compiled now (seconds) and cached.

    Say which in one of four ways: the fields below; a `KernelConfig`; its key; or a spec, as a path, a preset's name, a
    mapping or a `Spec`. Doing it again does nothing. Any number of threads and processes may ask at once: each kernel
    is compiled once. Meanwhile other threads may call the operators. If it takes over a second, stderr says so.

        gnaforge.register(rank=3, head_dim=72, dtype="bf16", arch="sm90", q_tile=(2, 8, 8), kv_tile=(2, 8, 8))
        gnaforge.register(rank=2, head_dim=64, dtype="bf16", tokens=(256, 256), window=80, heads=24)   # fitted tiles
        gnaforge.register("hunyuan-video")

    Args:
        kernel: a config, a key or a spec; of a spec's archs the one that runs here is taken, unless ``arch`` is given.
        rank: token dimensions, 1 to 3.
        head_dim: channels per head of Q and K; ``value_head_dim`` of V, where it differs.
        dtype: an element type, such as ``bf16``, or torch's.
        out_dtype: of the output, where ``dtype`` is e4m3; default: ``bf16``.
        direction: ``forward``, the default, ``backward``, or ``training`` for both.
        arch: ``cpu``, ``sm90``, ...; default: this machine's GPU, or ``cpu`` where there is none.
        q_tile, kv_tile: tokens per tile and dimension. Without them the tiles are fitted to ``tokens`` and ``window``,
            of each kernel for itself; without those they are the arch's default.
        q_tile_heads: beside them, query heads that share keys, of which a query tile has the tokens: 1, or more where
            the arch can. Fitted tiles have as many as suit the problem.
        tiles: in their place: ``auto`` (fitted), or a list as in a spec.
        variant: kernel family, where an arch has several.
        tokens, window, stride, dilation, causal, edge, sink, heads, kv_heads, batch: the problem to fit the tiles to.
            The kernel takes any other, too. A window of one number holds for all dimensions, and so do the others.
        grid, q_offset, kv_tokens, kv_offset, kv_sink, extra_tokens: the rest of it, as in a spec.
        policy: from now on, what a call does that no kernel fits: ``never`` raises, ``warn`` compiles one and says
            so, ``always`` compiles silently. Default: ``GNAFORGE_JIT``, else ``warn``. May be given alone.

    Returns:
        The kernels' keys.

    Raises:
        InputError: (a `ValueError`) a field is wrong, or nothing was named; each line begins with the field.
        BuildError: (a `RuntimeError`) no compiler, an unusable cache folder, or the compilation failed. Where only some
            of the kernels lack their compiler, the others are there.
        RuntimeError: torch is tracing, or a CUDA graph is being captured.
    """
    fields = {name: value for name, value in locals().items() if value is not None}
    for name in ("kernel", "policy", "arch"):
        fields.pop(name, None)
    if busy := jit.busy():
        raise RuntimeError(f"gnaforge.register: {busy}")
    if policy is not None:
        if policy not in jit.POLICIES:
            raise InputError(f"policy: {policy!r} is not one of {', '.join(jit.POLICIES)}")
        jit.set_policy(policy)
        if kernel is None and arch is None and not fields:
            return []
    if kernel is None and not fields:
        raise InputError("say which kernel: rank, head_dim and dtype; or a KernelConfig, a key or a spec")
    if kernel is None:
        configs = _configs_of_fields(fields, arch)
    elif fields:
        raise InputError(f"{', '.join(fields)}: can't be given beside {kernel!r}, which says it all")
    else:
        configs = _configs_of(kernel, arch)
    _have(configs)
    return [config.key for config in configs]


def warmup(
    kernel: KernelConfig | str | os.PathLike[str] | Mapping[str, Any] | Spec | None = None, **fields: Any
) -> list[str]:
    """`register`, and then runs every kernel that can run here once, on a tiny problem; stderr names the others.

    After it the first call of a server, and the capture of a CUDA graph, find everything loaded. Arguments, result and
    errors are those of `register`.
    """
    keys = register(kernel, **fields)
    from .first_runs import run_once

    idle: dict[str, list[str]] = {}
    for key in keys:
        if reason := run_once(KernelConfig.parse(key)):
            idle.setdefault(reason, []).append(key)
    for reason, own in idle.items():
        print(f"gnaforge: warmup did not run {', '.join(own)}: {reason}", file=sys.stderr, flush=True)
    return keys


def _configs_of(kernel: object, arch: str | Sequence[str] | None) -> list[KernelConfig]:
    if isinstance(kernel, KernelConfig) or (isinstance(kernel, str) and is_key(kernel)):
        config = require_config(kernel)
        if arch is not None and config.arch not in _list_archs(arch):
            raise InputError(f"arch: {arch!r} excludes {config}, which is for {config.arch}")
        return [config]
    from .plan import plan
    from .spec import Spec, load_spec, spec_of

    if isinstance(kernel, str | os.PathLike):
        spec = load_spec(kernel if isinstance(kernel, str) else Path(kernel))
    elif isinstance(kernel, Spec):
        spec = kernel
    elif isinstance(kernel, Mapping):
        spec = spec_of(dict(kernel))
    else:
        raise InputError(f"kernel: {kernel!r} is no config, key or spec")
    return list(plan(spec, _list_archs(arch) if arch is not None else [_own_arch(spec)]).configs)


def _own_arch(spec: Spec) -> str:
    """The arch of a spec that runs on this machine: its GPU's, else cpu."""
    try:
        own = machine_target().name
    except InputError:
        own = "cpu"
    for arch in (own, "cpu"):
        if arch in spec.arch:
            return arch
    raise InputError(
        f"arch: {spec.library} has kernels for {', '.join(spec.arch)}, this machine runs {own}; "
        f"name one to compile it all the same: arch={spec.arch[0]!r}"
    )


def _configs_of_fields(fields: dict[str, Any], arch: str | Sequence[str] | None) -> list[KernelConfig]:
    for name in ("dtype", "out_dtype"):
        if str(fields.get(name)).startswith("torch."):
            fields = {**fields, name: dtype_name(fields[name])}
    arch = machine_target().name if arch is None else arch
    config = _plain_config(fields, arch)
    return [config] if config is not None else _configs_by_spec(fields, arch)


def _plain_config(fields: dict[str, Any], arch: Any) -> KernelConfig | None:
    """The one config that the fields name with its tiles, or None if it takes a spec to say what they name."""
    if not {"rank", "head_dim", "dtype"} <= fields.keys() <= {"rank", "head_dim", "dtype", "q_tile", "kv_tile"}:
        return None
    tiles = (fields.get("q_tile"), fields.get("kv_tile"))
    if not isinstance(arch, str) or (tiles[0] is None) != (tiles[1] is None):
        return None

    def config_of(family: Family) -> KernelConfig:
        whole = tiles if tiles != (None, None) else family.default_boxes(fields["rank"], fields["head_dim"])
        names = (fields["rank"], fields["dtype"], fields["head_dim"])
        return KernelConfig(FORWARD.name, arch, *names, _box(whole[0]), _box(whole[1]), variant=family.variant)

    try:
        family = choose_family(FORWARD.name, arch, None, config_of)
        config = config_of(family)
    except (ValueError, TypeError, KeyError):
        return None  # the spec's models say what is wrong, and better
    return None if family.faults(config) or config.head_dim == ANY_HEAD_DIM else family.serving_config(config)


def _box(extents: Any) -> tuple[int, ...]:
    return (extents,) if isinstance(extents, int) else tuple(extents)


def _configs_by_spec(fields: dict[str, Any], arch: str | Sequence[str]) -> list[KernelConfig]:
    """As a spec would say it, so that what is wrong is said in the same words."""
    from .plan import plan
    from .spec import spec_of

    entry = {name: fields[name] for name in _ENTRY_FIELDS if name in fields}
    shape = {name: fields[name] for name in _SHAPE_FIELDS if name in fields}
    boxes = {short: fields[name] for short, name in _TILE_FIELDS.items() if name in fields}
    if boxes.keys() == {"q_heads"}:
        raise InputError("q_tile_heads: is of tiles that are given, by q_tile and kv_tile; fitted ones have their own")
    if boxes and "tiles" in fields:
        raise InputError("tiles: can't be given beside q_tile and kv_tile")
    if fields.get("tiles") == "auto" and not shape:
        raise InputError("tiles: auto fits tiles to a problem; give its tokens and window")
    configs: list[KernelConfig] = []
    for name in _list_archs(arch):
        tiles = fields.get("tiles") or ([boxes] if boxes else "auto" if shape else _default_tiles(name, fields))
        spec = {"spec_version": 1, "library": "registered", "arch": name}
        spec["kernels"] = [{**entry, "tiles": tiles, **({"shapes": [_complete(shape)]} if shape else {})}]
        checked_spec = spec_of(spec, lambda path: _field_name(path, fields))
        configs += plan(checked_spec).configs
    return configs


def _default_tiles(arch: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    rank = fields.get("rank")
    own = [family for family in families_of(FORWARD.name, arch) if fields.get("variant") in (None, family.variant)]
    family = (own or families_of(FORWARD.name, "cpu"))[0]  # of an unknown name the spec's models say what is wrong
    ranks = [rank] if isinstance(rank, int) else rank if isinstance(rank, list | tuple) else []
    ranks = [r for r in ranks if r in family.default_tiles]
    tiles: list[dict[str, Any]] = [_boxes(family.default_tiles[r]) for r in ranks] or [{"q": [1], "kv": [1]}]
    if fields.get("direction", "forward") in ("forward", ["forward"], ("forward",)):
        return tiles
    for op in DIRECTIONS["backward"]:
        for own_family in families_of(op, arch)[:1]:
            for tile, r in zip(tiles, ranks, strict=False):
                tile[op.removeprefix("gna_")] = _boxes(own_family.default_tiles[r])
    return tiles


def _boxes(pair: tuple[Box, Box]) -> dict[str, Any]:
    return {"q": list(pair[0]), "kv": list(pair[1])}


def _complete(shape: dict[str, Any]) -> dict[str, Any]:
    """A shape with one entry per dimension where one value was given for all."""
    tokens = shape.get("tokens")
    rank = len(tokens) if isinstance(tokens, list | tuple) else 1
    columns = {name: shape[name] for name in _PATTERN if name in shape}
    return {**shape, **{n: v if isinstance(v, list | tuple) else per_dim(n, v, rank) for n, v in columns.items()}}


def _field_name(path: tuple[int | str, ...], fields: Mapping[str, Any]) -> str:
    """How the caller knows the place in the spec that stands for the fields."""
    from .spec.yaml import path_text

    own = path[2:] if path[:1] == ("kernels",) else path
    if own[:1] == ("tiles",) and "tiles" not in fields:
        own = (_TILE_FIELDS[str(own[2])], *own[3:]) if len(own) > 2 else ("tiles",)
    elif own[:1] == ("shapes",):
        own = own[2:] or ("tokens",)
    if len(own) == 2 and not isinstance(fields.get(str(own[0])), list | tuple):
        own = own[:1]
    return path_text(own)


def _list_archs(arch: object) -> list[str]:
    if isinstance(arch, str):
        return [arch]
    if isinstance(arch, list | tuple) and arch:
        return list(arch)
    raise InputError(f"arch: {arch!r} is neither a name nor a list of names; there are {', '.join(TARGETS)}")


def _have(configs: Sequence[KernelConfig]) -> None:
    """Has every kernel in the process's table."""
    missing = [config for config in configs if config not in registry]
    absent = [config for config in missing if core.load_first(open_kernel(config)) is None]
    if absent:
        from .build.progress import show_compilation

        with show_compilation([config.key for config in absent]) as listener:
            _build_and_load(absent, listener)


def _build_and_load(configs: Sequence[KernelConfig], listener: Listener) -> list[KernelConfig]:
    """Has kernels in the process's table that the cache lacks, or has in a form that can't be loaded here. Returns
    those that were compiled.

    Raises:
        BuildError: some can't be compiled; the others are in the table.
    """
    from .build.identity import LIBRARY_FILE
    from .build.kernels import build_kernels, explain_missing, split_buildable
    from .build_tools.cache import user_cache

    ready, missing = split_buildable(configs)
    artifacts, compiled = build_kernels(ready, listener=listener)
    for config, artifact in artifacts.items():
        with artifact.open_verified(LIBRARY_FILE) as file:
            if config in compiled or artifact.folder.parent != user_cache().root:
                core.load_file(file)
                continue
            if core.load_first([file]) is not None:
                continue
        user_cache().discard(artifact.folder)
        compiled += _build_and_load([config], listener)
    if missing:
        raise BuildError(explain_missing(missing))
    return compiled


def connect() -> None:
    """Has calls that lack a kernel, or the core, look into the compile cache. Importing `api` does so."""
    core.set_core_files(core_files)
    lookup.set_source(CacheSource())
    family_facts.set_provider(_facts)


def disconnect() -> None:
    """Undoes `connect`: calls see what is loaded, and what installed packages announce."""
    core.set_core_files(None)
    lookup.set_source(None)
    family_facts.set_provider(None)


def _facts(config: KernelConfig) -> family_facts.FamilyFacts | None:
    family = find_family(config)
    return family.facts if family else None


class CacheSource:
    """Kernels in the compile cache, and the compiler."""

    def builds(self, request: Request) -> Iterator[Iterator[BinaryIO]]:
        """What the cache and its layers have of each kernel whose key may serve the request. Asks no compiler."""
        return open_kernels(request)

    def make(self, requests: Sequence[Request], *, quiet: bool) -> Made:
        """Compiles a kernel for each request and loads it."""
        return make_for_call(requests, quiet=quiet)

    def remedy(self, *requests: Request) -> str:
        """The commands that build a kernel for each request.

        Raises:
            InputError: there can't be one; says what the caller has to change.
            NoKernelError: this machine's GPU is one that this version has no kernels for.
        """
        configs = dict.fromkeys(map(self._possible, requests))
        what = "them" if len(configs) > 1 else "it" if requests[0].key else "one"
        return f"or build {what} with: {' && '.join(f'gnaforge build {config}' for config in configs)}"

    def _possible(self, request: Request) -> KernelConfig:
        """A kernel that could be built for a request; raises as `remedy`."""
        if request.key:
            return _pinned_config(request)
        try:
            arch = machine_target(request.device, request.device_index).name
        except InputError as error:
            raise NoKernelError(str(error)) from None
        _require_features(request, arch)
        reasons = [family.facts.why_never(request) for family in families_of(request.op, arch)]
        if reasons and all(reasons):
            raise InputError(reasons[0]) from None
        return config_for(request, fit=False)


def make_for_call(requests: Sequence[Request], *, quiet: bool) -> Made:
    """Compiles the kernels for a call that none fits, and loads them.

    Raises:
        InputError: this version has no kernels for it.
        BuildError: as `register`.
    """
    from .build.progress import show_compilation

    begin = time.monotonic()
    configs = [config_for(request, fit=True) for request in requests]
    with show_compilation([config.key for config in configs], transient=True, quiet=quiet) as listener:
        compiled = _build_and_load(configs, listener)
    return Made([config.key for config in compiled], time.monotonic() - begin)


def config_for(request: Request, *, fit: bool) -> KernelConfig:
    """The kernel to make for a request: with the tiles that it names, else fitted to its problem, else the default.

    It is of the first family of the arch that can serve the request, the default one before others. A small problem
    takes the default tiles: they cost it little, and the same kernel will be used for larger ones.

    Raises:
        InputError: this version has no such kernels; says what it has.
    """
    if request.key:
        return _pinned_config(request)
    arch = machine_target(request.device, request.device_index).name
    _require_features(request, arch)

    def with_boxes(family: Family, q_tile: Box, kv_tile: Box, heads: int = 1) -> KernelConfig:
        names = request.op, arch, request.rank, request.dtype, request.head_dim
        boxes = request.q_tile or q_tile, request.kv_tile or kv_tile
        try:
            return KernelConfig(*names, *boxes, request.value_head_dim, family.variant, request.out_dtype, heads)
        except ValueError as error:
            raise InputError(str(error)) from None

    def with_default_boxes(family: Family) -> KernelConfig:
        return with_boxes(family, *family.default_boxes(request.rank, request.head_dim, request.value_head_dim))

    family = choose_family(request.op, arch, None, with_default_boxes)
    config = with_default_boxes(family)
    p = request.problem
    tiles_asked = request.q_tile is not None or request.kv_tile is not None
    fits = fit and not tiles_asked and not family.faults(config) and family.time is not None
    if fits and p is not None and p.token_count >= _WORTH_FITTING * config.q_rows:
        from .call_tiles import fit_tiles

        tiles = fit_tiles(request, family)
        config = with_boxes(family, tiles.q, tiles.kv, tiles.q_heads)
    return family.serving_config(require_config(config))


def _pinned_config(request: Request) -> KernelConfig:
    """The kernel that a request names.

    Raises:
        InputError: there is no such kernel, or it can't serve the request; a compiler would have worked in vain.
    """
    config = require_config(request.key)
    family = family_of(config)
    reason = refusal(config, family.target.device, replace(request, key=""), features=family.features)
    if reason:
        advice = "leave out kernel= to let gnaforge choose one that fits"
        raise InputError(f"kernel: {config}: {reason}; {advice}")
    return config


def _require_features(request: Request, arch: str) -> None:
    """Raises an InputError for a problem that needs what no kernel of the arch has; names the archs that have it."""
    own = families_of(request.op, arch)
    needed = set(request.problem.features()) if request.problem is not None else set()
    if request.problem is not None and not any(needed <= set(family.features) for family in own):
        require_features(request.problem, request.op, arch, {name for family in own for name in family.features})
