"""Tells what each op reads and writes, exactly and within which bounds. Verification, benchmarks and callers of the
contract loop over this table: none of them knows a tensor of an op by name. Imports torch only where tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from random import Random
from typing import TYPE_CHECKING, Literal, Protocol

from .dtypes import DTYPES, INT32, Dtype
from .problem import Problem

if TYPE_CHECKING:
    import torch

    from .reference import ExtraKeys

Tensors = Mapping[str, "torch.Tensor"]
"""Tensors by role."""


@dataclass(frozen=True)
class Role:
    """A tensor's part in an op, as gnaforge_role in abi.h: heads-last, [batch, *tokens, heads, channels].

    Attributes:
        name: that of the role, in lower case.
        title: for people.
        side: whose tokens and heads it has: ``q``, ``kv``, or those of a piece of extra keys; ``batch``: it has none.
        channels: the field of `Problem` that counts them; None: it has none.
        element: its dtype; empty: the problem's; ``output``: that of the kernel's output.
        piece: of the extra keys.
        optional: whether a call may go without.
    """

    name: str
    title: str
    side: Literal["q", "kv", "extra", "batch"]
    channels: Literal["head_dim", "value_head_dim"] | None
    element: str = ""
    piece: int = 0
    optional: bool = False

    def shape(self, problem: Problem) -> tuple[int, ...]:
        """Its extents in a problem."""
        if self.side == "batch":
            return (problem.batch,)
        tokens = problem.tokens if self.side == "q" else problem.kv_tokens or problem.tokens
        if self.side == "extra":
            tokens = (problem.extra_tokens[self.piece],)
        channels = () if self.channels is None else (int(getattr(problem, self.channels)),)
        return (problem.batch, *tokens, self.heads(problem), *channels)

    def heads(self, problem: Problem) -> int:
        """Its heads in a problem."""
        return problem.heads if self.side == "q" else problem.kv_heads

    def dtype(self, problem: Problem, output_dtype: str = "") -> Dtype:
        """The type of its elements in a problem, for a kernel of this output dtype; by default the problem's."""
        own = output_dtype if self.element == "output" else self.element
        return INT32 if own == INT32.name else DTYPES[own or problem.dtype]

    def bytes(self, problem: Problem) -> int:
        """The size of all its elements in a problem."""
        return prod(self.shape(problem)) * self.dtype(problem).bytes


def random_lengths(problem: Problem, seed: int) -> list[list[int] | None]:
    """How many keys of each piece count in `Op.random_inputs`, of each batch entry; None: all, and the call brings no
    lengths. Kernels cut them to what there is."""
    found: list[list[int] | None] = []
    for piece, tokens in enumerate(problem.extra_tokens):
        rng = Random(f"lengths {piece} {seed}")
        kinds = [(0, 1, tokens, *[rng.randint(0, tokens)] * 4, -1, tokens + 3) for _ in range(problem.batch)]
        found.append(None if rng.random() < 0.25 else [rng.choice(kind) for kind in kinds])
    return found


class Bound(Protocol):
    """The largest error that a kernel's results may have, elementwise, by role."""

    def __call__(
        self, problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool
    ) -> dict[str, torch.Tensor]: ...


class Sample(Protocol):
    """Exact results and bounds at one query, a batch entry and a token, of a problem of any size, by role."""

    def __call__(
        self, problem: Problem, inputs: Tensors, at: Sequence[int], *, rounds_probabilities: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: as `KernelConfig.op` has it.
        inputs, outputs: the roles of what it reads and writes in every problem, in the order of gnaforge_role.
        exact: its results in float64, of a problem and its inputs.
        bound, sample: see `Bound` and `Sample`.
        flop: floating-point operations per pair of a query and a key, all heads of all batch entries together.
    """

    name: str
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    exact: Callable[[Problem, Tensors], dict[str, torch.Tensor]]
    bound: Bound
    sample: Sample
    flop: Callable[[Problem], float]

    def reads(self, problem: Problem) -> tuple[Role, ...]:
        """The roles of what it reads of a problem: `inputs`, and those of extra keys, in the order of gnaforge_role."""
        pieces = range(len(problem.extra_tokens))
        return (*self.inputs, *(role for role in _EXTRA if role.piece in pieces))

    def random_inputs(
        self, problem: Problem, seed: int = 0, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Inputs with normally distributed elements, by role; the same for equal arguments. Of four pieces of extra
        keys one has no lengths; others are at times shorter than nothing, or longer than the piece."""
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        found = {}
        for role in self.reads(problem):
            if role.side == "batch":
                lengths = random_lengths(problem, seed)[role.piece]
                if lengths is not None:
                    found[role.name] = torch.tensor(lengths, dtype=torch.int32, device=device)
                continue
            values = torch.randn(role.shape(problem), generator=generator, device=device)
            found[role.name] = values.to(role.dtype(problem).torch)
        return found

    def bytes(self, problem: Problem) -> int:
        """What it has to move: all inputs and outputs once."""
        return sum(role.bytes(problem) for role in (*self.reads(problem), *self.outputs))


Q = Role("q", "query", "q", "head_dim")
K = Role("k", "key", "kv", "head_dim")
V = Role("v", "value", "kv", "value_head_dim")
OUT = Role("out", "output", "q", "value_head_dim", "output")
LSE = Role("lse", "LSE", "q", None, "fp32")
_EXTRA = (
    Role("extra_k", "extra key", "extra", "head_dim"),
    Role("extra_k_2", "second extra key", "extra", "head_dim", piece=1),
    Role("extra_v", "extra value", "extra", "value_head_dim"),
    Role("extra_v_2", "second extra value", "extra", "value_head_dim", piece=1),
    Role("extra_lengths", "extra lengths", "batch", None, INT32.name, optional=True),
    Role("extra_lengths_2", "second extra lengths", "batch", None, INT32.name, piece=1, optional=True),
)


_ENDS = ("", "_2")  # of the roles' names, by piece


def extra_keys(inputs: Tensors) -> list[ExtraKeys]:
    """The pieces of extra keys among inputs by role."""
    from .reference import ExtraKeys

    there = [end for end in _ENDS if f"extra_k{end}" in inputs]
    return [
        ExtraKeys(inputs[f"extra_k{end}"], inputs[f"extra_v{end}"], inputs.get(f"extra_lengths{end}")) for end in there
    ]


def named_extra_keys(pieces: Sequence[ExtraKeys]) -> dict[str, torch.Tensor]:
    """Pieces of extra keys as inputs by role."""
    named: dict[str, torch.Tensor] = {}
    for piece, end in zip(pieces, _ENDS, strict=False):
        tensors = (piece.key, piece.value, piece.lengths)
        roles = (f"extra_k{end}", f"extra_v{end}", f"extra_lengths{end}")
        named |= {role: tensor for role, tensor in zip(roles, tensors, strict=True) if tensor is not None}
    return named


def _forward(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    from .reference import attention

    return _by_name(attention(problem, inputs["q"], inputs["k"], inputs["v"], *extra_keys(inputs)))


def _forward_bound(
    problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool
) -> dict[str, torch.Tensor]:
    from .reference import error_bound

    qkv = inputs["q"], inputs["k"], inputs["v"]
    pair = exact["out"], exact["lse"]
    extra = extra_keys(inputs)
    return _by_name(error_bound(problem, *qkv, pair, *extra, rounds_probabilities=rounds_probabilities))


def _forward_sample(
    problem: Problem, inputs: Tensors, at: Sequence[int], *, rounds_probabilities: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from .reference import query_sample

    qkv = inputs["q"], inputs["k"], inputs["v"]
    extra = extra_keys(inputs)
    exact, bounds = query_sample(problem, *qkv, at, *extra, rounds_probabilities=rounds_probabilities)
    return _by_name(exact), _by_name(bounds)


def _by_name(pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"out": pair[0], "lse": pair[1]}


def _forward_flop(problem: Problem) -> float:
    """Q K^T and P V."""
    return 2.0 * problem.batch * problem.heads * (problem.head_dim + problem.value_head_dim)


OPS: dict[str, Op] = {
    op.name: op
    for op in (Op("gna_forward", (Q, K, V), (OUT, LSE), _forward, _forward_bound, _forward_sample, _forward_flop),)
}
"""The ops by name."""

FORWARD = OPS["gna_forward"]
