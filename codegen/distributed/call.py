"""A call of divided tokens: its arguments made plain and agreed on by all ranks, and what runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..runtime import arguments
from ..runtime.autocast import autocast_tensor
from ..runtime.config import KernelConfig
from ..runtime.dtypes import dtype_name
from ..runtime.ops import kernel_key
from ..runtime.own_patterns import is_own
from ..runtime.problem import Problem, fields_of_pattern
from ..runtime.problem_rules import ProblemError
from .agreement import Caller, agree, announce, report
from .cost import MODES, Division, cheapest, divisions, require_dtype
from .exchange import TRANSPORTS
from .halo import Settings, attend_with_halo
from .heads import HeadTeam, heads_of_ranks, sum_gradient
from .kernels import Extra
from .layout import Shards, bounds_of, chunk_bounds
from .mesh import Dims, Team, check_dims, sizes_of, team_of
from .planning import Plan, route_of

_SIZES = ("batch", "heads", "kv_heads", "head_dim", "value_head_dim")
EXTRA_GRADIENTS = ("sum", "partial")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """The ways in which a call is divided and moved."""

    mode: str
    by_heads: Sequence[str] | None
    transport: str
    save_halo: bool
    head_chunks: int
    border_multiple: int | Sequence[int]
    extra_grad: str

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Options:
        """Those among a call's arguments."""
        return cls(**{field.name: call[field.name] for field in fields(cls)})

    def check(self, dims: Dims) -> None:
        """Refuses what no ranks can do."""
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("transport", self.transport, tuple(TRANSPORTS)),
            ("extra_grad", self.extra_grad, EXTRA_GRADIENTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        arguments.positive_int("head_chunks", self.head_chunks)
        if isinstance(self.by_heads, str) or not isinstance(self.by_heads or (), Sequence):
            raise TypeError(
                f"by_heads is {self.by_heads!r}; it must be names of mesh dimensions, such as ('longitude',)"
            )
        if self.by_heads and self.mode != "hybrid":
            raise ValueError(f"by_heads is for mode='hybrid', and mode is {self.mode!r}")
        for name in self.by_heads or ():
            if name not in dims:
                raise ValueError(f"by_heads: {name!r} divides no tokens; dims is {tuple(dims)!r}")


@dataclass(frozen=True)
class Where:
    """The tokens that ranks have."""

    mesh: DeviceMesh | None
    dims: Dims | None
    grid: int | Sequence[int] | None
    shards: Sequence[Sequence[int] | None] | None


Given = tuple[tuple[Any, ...], tuple[Any, Any], float | None, KernelConfig | str | None]
"""Windows, edges and sinks, scale and kernel of a call, as its arguments have them."""


def given_of(call: Mapping[str, Any]) -> Given:
    """Those among a call's arguments."""
    windows = call["kernel_size"], call["stride"], call["dilation"], call["is_causal"]
    return windows, (call["edge"], call["sink"]), call["scale"], call["kernel"]


def prepare(
    name: str,
    tensors: Tensors,
    extra: Extra,
    given: Given,
    where: Where,
    options: Options,
    text_query: torch.Tensor | None = None,
) -> Prepared:
    """A call of the function ``name`` that all ranks agree on; arguments as `context_parallel_attention` has them.
    ``text_query`` is that of text rows, whose keys are the extra ones.

    Raises:
        RankError: they don't, or something is wrong on another rank.
        TypeError, ValueError: something is wrong here.
    """
    rank = tensors[0].dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query must be [batch, 1 to 3 token dims, heads, head_dim], got {tuple(tensors[0].shape)}")
    if where.mesh is None or where.dims is None:
        raise ValueError("mesh and dims say which ranks have which tokens; give both, or DTensors")
    check_dims(where.mesh, where.dims, rank)
    device = where.mesh.device_type
    with Caller(name, None, device).speaks():
        team = team_of(where.mesh, [dim for dim in where.dims if dim is not None])
    caller = Caller(name, team.group, device)
    try:
        prepared = _prepare(caller, tensors, extra, given, where, options, team, text_query)
        fault = prepared.fault()
    except (TypeError, ValueError) as error:
        if team.group is not None:
            announce(str(error), caller)
        raise
    if team.group is not None:
        return replace(prepared, caller=agree(prepared.signature(), caller, fault))
    if fault:
        raise ValueError(fault)
    return prepared


def _prepare(
    caller: Caller,
    tensors: Tensors,
    extra: Extra,
    given: Given,
    where: Where,
    options: Options,
    team: Team,
    text_query: torch.Tensor | None,
) -> Prepared:
    """The call as this rank alone can tell it."""
    query, key, value = (autocast_tensor(tensor) for tensor in tensors)
    keys, values, lengths = (autocast_tensor(tensor) for tensor in extra)
    names = {"additional_keys": keys, "additional_values": values, "additional_lengths": lengths}
    arguments.require_tensors(**{name: tensor for name, tensor in names.items() if tensor is not None})
    assert where.mesh is not None and where.dims is not None
    rank, (plain, (edge, sink), scale, kernel) = len(where.dims), given
    options.check(where.dims)
    shards = _shards(where.mesh, where.dims, where, query)
    if any(map(is_own, (*plain, edge, sink))):
        raise ValueError("windows of their own for heads: a call of divided tokens has one window for all heads")
    pattern = arguments.plain_pattern(rank, *plain) + arguments.settings_pattern(rank, edge, sink, *[None] * 4)
    scale = None if scale is None else arguments.finite_number("scale", scale)
    sizes = query.shape[0], query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]
    problem = _problem(tuple(pattern), shards, sizes, dtype_name(query.dtype))
    multiples = tuple(arguments.ints_per_dim("border_multiple", options.border_multiple, rank))
    if min(multiples) < 1:
        raise ValueError(f"border_multiple is {min(multiples)}; it must be at least 1")
    division = _division(problem, shards, where.dims, options)
    key_of_kernel = kernel_key(rank, query, value, kernel, None, None)
    whole = (query, key, value), (keys, values, lengths)
    return Prepared(
        caller,
        *whole,
        problem,
        division,
        where.mesh,
        where.dims,
        team,
        options,
        scale,
        multiples,
        key_of_kernel,
        autocast_tensor(text_query),
    )


def _shards(mesh: DeviceMesh, dims: Dims, where: Where, query: torch.Tensor) -> Shards:
    rank = len(dims)
    parts = sizes_of(mesh, dims)
    if where.grid is None:
        if max(parts) > 1:
            raise ValueError("grid must say how many tokens all ranks have together: a shard alone doesn't")
        grid = list(query.shape[1:-2])
    else:
        grid = arguments.ints_per_dim("grid", where.grid, rank)
    stated = where.shards if where.shards is not None else [None] * rank
    if len(stated) != rank:
        raise ValueError(f"shards has {len(stated)} entries for {rank} token dimensions")
    bounds = []
    for axis, (tokens, count, sizes) in enumerate(zip(grid, parts, stated, strict=True)):
        if sizes is None:
            bounds.append(chunk_bounds(tokens, count))
            continue
        found = arguments.ints_per_dim(f"shards[{axis}]", list(sizes), len(sizes))
        if len(found) != count or sum(found) != tokens or min(found) < 0:
            raise ValueError(f"shards[{axis}] is {found}; it must be {count} sizes with {tokens} tokens in all")
        bounds.append(bounds_of(found))
    return Shards(tuple(bounds))


@lru_cache(maxsize=1 << 8)
def _problem(pattern: tuple[int, ...], shards: Shards, sizes: tuple[int, ...], dtype: str) -> Problem:
    """The undivided problem, without additional keys, of sizes in `_SIZES`' order. Words are about the call's
    arguments."""
    fields = fields_of_pattern(pattern)
    own: dict[str, Any] = {name: fields[name] for name in ("window", "stride", "dilation", "causal", "edge", "sink")}
    own |= zip(_SIZES, sizes, strict=True)
    try:
        problem = Problem(tuple(bounds[-1] for bounds in shards.bounds), **own, dtype=dtype)
        require_dtype(problem)
    except ProblemError as error:
        name = {"window": "kernel_size", "causal": "is_causal", "tokens": "grid"}.get(error.field, error.field)
        raise ValueError(f"{name}: {error.text}") from None
    return problem


def _division(problem: Problem, shards: Shards, dims: Dims, options: Options) -> Division:
    if options.mode == "auto":
        return cheapest(problem, shards)
    divided = tuple(axis for axis, parts in enumerate(shards.parts) if parts > 1)
    if options.mode == "halo":
        return Division(problem, shards)
    if options.mode == "ulysses":
        found = Division(problem, shards, divided)
    elif options.by_heads:
        found = Division(problem, shards, tuple(axis for axis in divided if dims[axis] in options.by_heads))
    else:
        some = [each for each in divisions(problem, shards) if each.mode == "hybrid"]
        if not some:
            raise ValueError(f"mode='hybrid' needs two divided axes, and heads that divide; shards are {shards.parts}")
        return min(some, key=lambda each: each.busiest[1].most)
    if found.fault:
        raise ValueError(f"mode={options.mode!r}: {found.fault}")
    return found


@dataclass(frozen=True)
class Prepared:
    """A call that can run."""

    caller: Caller
    tensors: Tensors
    extra: Extra
    problem: Problem
    division: Division
    mesh: DeviceMesh
    dims: Dims
    team: Team
    options: Options
    scale: float | None
    multiples: tuple[int, ...]
    kernel: str
    text_query: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens of this rank's shard."""
        return self.division.shards.shape(self.team.rank)

    @property
    def _extra_names(self) -> tuple[str, str, str]:
        """The function's names of extra keys, values and lengths."""
        if self.text_query is None:
            return "additional_keys", "additional_values", "additional_lengths"
        return "text_k", "text_v", "text_lengths"

    def signature(self) -> dict[str, Any]:
        """Values that all ranks must have equal, by the names of arguments."""
        problem, options = self.problem, self.options
        given = [x for x in (*self.tensors, *self.extra[:2], self.text_query) if x is not None]
        of_keys, _, of_lengths = self._extra_names
        return {
            "function": self.caller.name,
            "kernel_size": problem.window,
            "stride": problem.stride,
            "dilation": problem.dilation,
            "is_causal": problem.causal,
            "edge": problem.edge,
            "sink": problem.sink,
            "grid": problem.tokens,
            "shards": [[b - a for a, b in pairwise(own)] for own in self.division.shards.bounds],
            "dims": self.dims,
            "batch": problem.batch,
            "heads": [problem.heads, problem.kv_heads],
            "head_dim": [problem.head_dim, problem.value_head_dim],
            "dtype": problem.dtype,
            of_keys: [x.shape[1] for x in self.extra[:1] if x is not None],
            of_lengths: self.extra[2] is not None,
            "scale": self.scale,
            "mode": options.mode,
            "by_heads": options.by_heads or (),
            "transport": options.transport,
            "save_halo": options.save_halo,
            "head_chunks": options.head_chunks,
            "extra_grad": options.extra_grad,
            "requires_grad": [torch.is_grad_enabled() and tensor.requires_grad for tensor in given],
        }

    def fault(self) -> str | None:
        """Words for a fault of this rank's tensors; None if they have none."""
        problem, (query, key, value), (keys, values, lengths) = self.problem, self.tensors, self.extra
        rank, extra = self.team.rank, (problem.batch, 0 if keys is None else keys.shape[1])
        shard = problem.batch, *self.shape
        of_query, of_key = (problem.heads, problem.head_dim), (problem.kv_heads, problem.head_dim)
        of_value = problem.kv_heads, problem.value_head_dim
        name_of_keys, name_of_values, name_of_lengths = self._extra_names
        for name, tensor, rows, own in (
            ("query", query, shard, of_query),
            ("key", key, shard, of_key),
            ("value", value, shard, of_value),
            (name_of_keys, keys, extra, of_key),
            (name_of_values, values, extra, of_value),
            ("text_q", self.text_query, extra, of_query),
        ):
            if tensor is None:
                continue
            article = "an" if name.startswith("a") else "a"
            if tuple(tensor.shape) != rows + own:
                what = "its shard is" if rows is shard else "it must be"
                return f"rank {rank} has {article} {name} of shape {list(tensor.shape)}; {what} {[*rows, *own]}"
            if tensor.dtype != query.dtype or tensor.device != query.device:
                given = f"{article} {name} of {tensor.dtype} on {tensor.device}"
                return f"rank {rank} has {given}, and a query of {query.dtype} on {query.device}"
        if (keys is None) != (values is None):
            return f"rank {rank} has additional keys or values without the others"
        if lengths is not None:
            if keys is None:
                return f"rank {rank} has additional lengths without keys"
            if tuple(lengths.shape) != shard[:1] or lengths.dtype != torch.int32 or lengths.device != query.device:
                given = f"{name_of_lengths} of shape {list(lengths.shape)}, {lengths.dtype} on {lengths.device}"
                return f"rank {rank} has {given}; they must be [{problem.batch}], torch.int32 on {query.device}"
        return None

    def run(self, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp; where that isn't to be returned, it may be that of a part of the heads."""
        with report(self.caller):
            return self._run(return_lse)

    def _run(self, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = self.tensors
        keys, values, lengths = self.extra
        if self.team.group is not None and self.options.extra_grad == "sum":
            keys, values = (sum_gradient(x, self.caller) for x in (keys, values))
        team, heads = self._head_team(), self.problem.heads
        if team is None:
            return attend_with_halo(self._settings(), query, key, value, (keys, values, lengths))
        of_query, of_keys = heads_of_ranks(heads, self.problem.kv_heads, self.division.head_ranks)
        query, key, value = team.to_heads((of_query, of_keys, of_keys), query, key, value)
        own = slice(*of_keys[team.rank])
        keys, values = (x if x is None else x[..., own, :] for x in (keys, values))
        out, lse = attend_with_halo(self._settings(), query, key, value, (keys, values, lengths))
        out = team.to_tokens(of_query, heads, out)
        if return_lse:
            lse = team.to_tokens(of_query, heads, lse.unsqueeze(-1)).squeeze(-1)
        return out, lse

    def _names(self, by_heads: bool) -> list[str]:
        """The mesh dimensions whose ranks exchange heads, or the others that divide tokens."""
        names = enumerate(self.dims)
        return [name for axis, name in names if name is not None and (axis in self.division.by_heads) is by_heads]

    def _head_team(self) -> HeadTeam | None:
        team = team_of(self.mesh, self._names(True))
        if team.group is None:
            return None
        bounds = enumerate(self.division.shards.bounds)
        own = tuple(
            b if axis in self.division.by_heads else (0, n) for (axis, b), n in zip(bounds, self.shape, strict=True)
        )
        return HeadTeam(self.caller, team.group, team.rank, Shards(own), self.options.transport)

    def _settings(self) -> Settings:
        options, team = self.options, team_of(self.mesh, self._names(False))
        route = route_of(self.problem, self.division.layout, team.rank, self.multiples)
        rest = options.transport, options.save_halo, options.head_chunks
        return Settings(route, self.caller, team.group, self.scale, self.kernel, *rest)

    def plan(self) -> Plan:
        """The call's plan on this rank."""
        self._head_team()
        route = self._settings().route
        inner = 0 if route.inner is None else prod(high - low for low, high in route.inner.call.queries)
        shards, names = self.division.shards, self.dims
        return Plan(
            mode=self.division.mode,
            by_heads=tuple(self._names(True)),
            traffic=self.division.traffic_at(shards.place(self.team.rank)),
            busiest=self.division.busiest[1],
            bytes_of_modes={
                tuple(str(names[axis]) for axis in each.by_heads): each.busiest[1].most
                for each in divisions(self.problem, shards)
            },
            peers=sum(count > 0 for count in route.received_tokens),
            inner_share=inner / max(1, prod(route.shape)),
        )
