"""Values that must not matter, made NaN: what a kernel computes elsewhere stays as it was, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from random import Random

import torch

from ..families import family_of
from ..runtime.config import KernelConfig
from ..runtime.op_table import Op, extra_keys
from ..runtime.problem import Problem
from ..runtime.problem_rules import Dimension
from ..runtime.reference import visible, windows
from .checks import Failure
from .kinds import POISONS
from .layouts import Memory, bits_of


@dataclass(frozen=True)
class Poison:
    """The elements that were poisoned.

    Attributes:
        why: names it, for messages.
        kept: per result, where it must stay as it was: bool, of the shape of the result without channels.
        shown: per result, likewise, where it must be NaN.
    """

    why: str
    kept: dict[str, torch.Tensor]
    shown: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(self, clean: dict[str, torch.Tensor], memory: Memory) -> None:
        """Raises a `Failure` unless results are what they must be, beside those of a ``clean`` run."""
        for name, kept in self.kept.items():
            if not torch.equal(memory[name].tensor[kept], clean[name][kept]):
                raise Failure("poison", f"{memory[name].role.title}: depends on {self.why}")
        for name, shown in self.shown.items():
            if not memory[name].tensor[shown].isnan().all():
                raise Failure("poison", f"{memory[name].role.title}: does not show {self.why} where it is seen")


def poison_others(op: Op, problem: Problem, config: KernelConfig, memory: Memory, seed: int) -> Poison | None:
    """NaN in all batch entries and heads but one K/V head and its queries; None if there are no others."""
    if problem.batch * problem.kv_heads == 1:
        return None
    batch, head = seed % problem.batch, seed // problem.batch % problem.kv_heads
    group = problem.heads // problem.kv_heads

    def own(name: str) -> torch.Tensor:
        role, tensor = memory[name].role, memory[name].tensor
        count = group if role.side == "q" else 1
        shape = tensor.shape if role.channels is None else tensor.shape[:-1]
        chosen = torch.zeros(shape, dtype=torch.bool, device=tensor.device)
        if role.side == "batch":
            chosen[batch] = True
        else:
            chosen[batch, ..., head * count : (head + 1) * count] = True
        return chosen

    for role in op.reads(problem):
        if role.name in memory:
            tensor, others = memory[role.name].tensor, ~own(role.name)
            if tensor.is_floating_point():
                _put(tensor, others, torch.nan)
            else:
                tensor[others] = 1 - tensor[others]
    kept = {role.name: own(role.name) for role in op.writes(problem)}
    return Poison(f"batch entries other than {batch}, or heads other than {head} of K and V", kept)


def poison_unseen(op: Op, problem: Problem, config: KernelConfig, memory: Memory, seed: int) -> Poison | None:
    """NaN in K of one token, for queries that don't see it, with large V; NaN or infinity in V of another one, for
    queries whose Q tile doesn't come near it. None for ops other than forward."""
    if op.name != "gna_forward":
        return None
    rng = Random(f"poison {seed}")
    k, v = memory["k"].tensor, memory["v"].tensor
    masked, far = ([rng.randrange(n) for n in problem.kv_tokens or problem.tokens] for _ in range(2))

    def of_token(token: Sequence[int]) -> tuple[int | slice, ...]:
        return (slice(None), *token)

    seen = queries_that_see(problem, masked, k.device)
    unseen = ~(seen | queries_that_visit(problem, config, far, k.device))
    k[of_token(masked)] = float("nan")
    v[of_token(masked)] = torch.finfo(v.dtype).max
    v[of_token(far)] = rng.choice((float("nan"), float("inf"), float("-inf")))

    def of_all(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[None, ..., None].expand(problem.batch, *problem.tokens, problem.heads)

    why = f"the keys {masked} or {far}, which the mask hides"
    return Poison(why, {role.name: of_all(unseen) for role in op.outputs}, {"out": of_all(seen)})


def poison_beyond(op: Op, problem: Problem, config: KernelConfig, memory: Memory, seed: int) -> Poison | None:
    """Extra keys beyond their length become NaN, and their values NaN or, on GPUs, which multiply them by 0, the
    largest number. None if all of them count."""
    found = False
    for piece in extra_keys({name: one.tensor for name, one in memory.items()}):
        beyond = ~piece.valid()
        found = found or bool(beyond.any())
        _put(piece.key, beyond, torch.nan)
        largest = torch.finfo(piece.value.dtype).max
        _put(piece.value, beyond, largest if family_of(config).target.is_gpu else torch.nan)
    if not found:
        return None
    kept = {role.name: torch.ones_like(memory[role.name].tensor, dtype=torch.bool) for role in op.writes(problem)}
    return Poison("extra keys beyond their length", kept)


def _put(tensor: torch.Tensor, where: torch.Tensor, value: float) -> None:
    """Writes ``value`` where ``where`` holds, by its bits: torch has no masked writes of 8-bit floating point."""
    like = torch.tensor(value, dtype=tensor.dtype, device=tensor.device)
    bits_of(tensor)[where] = bits_of(like)


Poisoner = Callable[[Op, Problem, KernelConfig, Memory, int], "Poison | None"]

POISONERS: dict[str, Poisoner] = dict(zip(POISONS, (poison_others, poison_unseen, poison_beyond), strict=True))
"""By kind. Each changes inputs in memory; None if the problem or the op has nothing to poison."""


def queries_that_see(problem: Problem, key: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """The queries, bool [*tokens], that see the token ``key``."""
    return _outer(
        [
            visible(axis, torch.arange(axis.tokens, device=device), torch.tensor(at, device=device))
            for axis, at in zip(problem.dimensions, key, strict=True)
        ]
    )


def queries_that_visit(
    problem: Problem, config: KernelConfig, key: Sequence[int], device: torch.device | str
) -> torch.Tensor:
    """The queries, bool [*tokens], whose Q tile visits a KV tile that holds the token ``key``; if the problem isn't
    plain, or comes near it by less than a KV tile."""
    found, plain = [], not problem.features()
    for axis, at, q, kv in zip(problem.dimensions, key, config.q_tile, config.kv_tile, strict=True):
        token = torch.arange(axis.tokens, device=device)
        if plain:
            found.append(_visits(axis, token, at, q, kv))
            continue
        keys = torch.arange(axis.keys, device=device)
        apart = (keys - at).abs()
        apart = torch.minimum(apart, axis.keys - apart) if axis.edge == "wrap" else apart
        near = keys[apart < kv * axis.dilation]
        comes_near = visible(axis, token[:, None], near).any(1)
        tile = token // axis.dilation // q * axis.dilation + token % axis.dilation
        found.append((comes_near[:, None] & (tile[:, None] == tile)).any(0))
    return _outer(found)


def _visits(axis: Dimension, token: torch.Tensor, at: int, q: int, kv: int) -> torch.Tensor:
    """Which tokens of a plain axis are in a Q tile that visits a KV tile with the token ``at``."""
    length, dilation = axis.tokens, axis.dilation
    group, position = token % dilation, token // dilation
    count = (length - group + dilation - 1) // dilation
    first = position // q * q
    last = torch.minimum(first + q, count) - 1
    rules = axis.window, axis.stride, dilation, bool(axis.causal)
    begin, _ = windows(first * dilation + group, length, *rules)
    _, end = windows(last * dilation + group, length, *rules)
    reach = begin + (end - begin + kv - 1) // kv * kv
    where = at // dilation
    return (group == at % dilation) & (begin <= where) & (where < reach)


def _outer(axes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens for which all of the flags, one per dimension, are set."""
    rank = len(axes)
    shaped = [flags.view([-1 if e == d else 1 for e in range(rank)]) for d, flags in enumerate(axes)]
    return reduce(torch.logical_and, shaped)
