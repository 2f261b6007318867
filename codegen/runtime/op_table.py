"""Tells what each op reads and writes, exactly and within which bounds. Verification, benchmarks and callers of the
contract loop over this table: none of them knows a tensor of an op by name. Imports torch only where tensors are made.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .dtypes import DTYPES, INT32, Dtype
from .problem import Problem

if TYPE_CHECKING:
    import torch

    from .reference import ExtraKeys

_BRUTE_FORCE = 2**26  # pairs of tokens that exact attention takes a few seconds for

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
        has_tokens: False for a number per batch entry and head.
    """

    name: str
    title: str
    side: Literal["q", "kv", "extra", "batch"]
    channels: Literal["head_dim", "value_head_dim"] | None
    element: str = ""
    piece: int = 0
    optional: bool = False
    has_tokens: bool = True

    def shape(self, problem: Problem) -> tuple[int, ...]:
        """Its extents in a problem."""
        if self.side == "batch":
            return (problem.batch,)
        if not self.has_tokens:
            return (problem.batch, self.heads(problem))
        tokens = problem.tokens if self.side == "q" else problem.kv_tokens or problem.tokens
        if self.side == "extra":
            tokens = (problem.extra_tokens[self.piece],)
        channels = () if self.channels is None else (int(getattr(problem, self.channels)),)
        return (problem.batch, *tokens, self.heads(problem), *channels)

    def heads(self, problem: Problem) -> int:
        """Its heads in a problem."""
        return problem.heads if self.side == "q" else problem.kv_heads

    def dtype(self, problem: Problem, output_dtype: str = "") -> Dtype:
        """The type of its elements in a problem, for a kernel of this output dtype; by default that of the problem."""
        own = output_dtype or problem.output_dtype if self.element == "output" else self.element
        return INT32 if own == INT32.name else DTYPES[own or problem.dtype]

    def bytes(self, problem: Problem) -> int:
        """The size of all its elements in a problem."""
        return prod(self.shape(problem)) * self.dtype(problem).bytes


def random_lengths(problem: Problem, seed: int) -> list[list[int] | None]:
    """How many keys of each piece count in `Op.random_inputs`, of each batch entry; None: all, and the call brings no
    lengths. Kernels cut them to what there is."""
    found: list[list[int] | None] = []
    for piece, tokens in enumerate(problem.extra_tokens):
        rng = Random(f"lengths {piece} {problem.tokens} {problem.extra_tokens} {seed}")
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
        derive: of a problem and random inputs, those that follow from others.
        extra_outputs: the roles of what it writes for each piece of extra keys.
        held: the side whose tile a kernel holds, while tiles of the other one pass by.
        products: matrix products that ``flop`` is of.
    """

    name: str
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    exact: Callable[[Problem, Tensors], dict[str, torch.Tensor]]
    bound: Bound
    sample: Sample
    flop: Callable[[Problem], float]
    derive: Callable[[Problem, Tensors], Tensors] = lambda problem, inputs: {}
    extra_outputs: tuple[Role, ...] = ()
    held: Literal["q", "kv"] = "q"
    products: int = 0

    def reads(self, problem: Problem) -> tuple[Role, ...]:
        """The roles of what it reads of a problem: `inputs`, those of extra keys, and what narrow inputs are multiplied
        by, in the order of gnaforge_role."""
        pieces = range(len(problem.extra_tokens))
        scales = _DESCALES if DTYPES[problem.dtype].scaled else ()
        return (*self.inputs, *(role for role in _EXTRA if role.piece in pieces), *scales)

    def writes(self, problem: Problem) -> tuple[Role, ...]:
        """The roles of what it writes of a problem: `outputs`, and those of extra keys; as gnaforge_role has them."""
        return (*self.outputs, *(role for role in self.extra_outputs if role.piece < len(problem.extra_tokens)))

    def results(self, names: Container[str]) -> tuple[Role, ...]:
        """The roles of what it writes, as far as they are among these names of roles."""
        return (*self.outputs, *(role for role in self.extra_outputs if role.name in names))

    def random_inputs(
        self, problem: Problem, seed: int = 0, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Inputs with normally distributed elements, by role; the same for equal arguments. Of four pieces of extra
        keys one has no lengths; others are at times shorter than nothing, or longer than the piece. Of four descales
        one is missing."""
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
            if not role.has_tokens:
                if Random(f"{role.name} {problem.tokens} {seed}").random() < 0.75:
                    found[role.name] = values.exp2()
                continue
            found[role.name] = values.to(role.dtype(problem).torch)
        for name, values in self.derive(problem, found).items():
            found[name] = values.to(found[name].dtype)
        return found

    def bytes(self, problem: Problem) -> int:
        """What it has to move: all inputs and outputs once."""
        return sum(role.bytes(problem) for role in (*self.reads(problem), *self.writes(problem)))


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


_DESCALES = (
    Role("descale_q", "query's descale", "q", None, "fp32", optional=True, has_tokens=False),
    Role("descale_k", "key's descale", "kv", None, "fp32", optional=True, has_tokens=False),
    Role("descale_v", "value's descale", "kv", None, "fp32", optional=True, has_tokens=False),
)


_ENDS = ("", "_2")  # of the roles' names, by piece


def extra_keys(inputs: Tensors) -> list[ExtraKeys]:
    """The pieces of extra keys among inputs by role."""
    from . import reference

    return reference.extra_keys(inputs)


def named_extra_keys(pieces: Sequence[ExtraKeys]) -> dict[str, torch.Tensor]:
    """Pieces of extra keys as inputs by role."""
    named: dict[str, torch.Tensor] = {}
    for piece, end in zip(pieces, _ENDS, strict=False):
        tensors = (piece.key, piece.value, piece.lengths)
        roles = (f"extra_k{end}", f"extra_v{end}", f"extra_lengths{end}")
        named |= {role: tensor for role, tensor in zip(roles, tensors, strict=True) if tensor is not None}
    return named


def _forward(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    from .reference import attention, dequantise

    inputs = dequantise(inputs)
    return _by_name(attention(problem, inputs["q"], inputs["k"], inputs["v"], *extra_keys(inputs)))


def _forward_bound(
    problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool
) -> dict[str, torch.Tensor]:
    from .reference import dequantise, error_bound

    inputs = dequantise(inputs)
    qkv = inputs["q"], inputs["k"], inputs["v"]
    pair = exact["out"], exact["lse"]
    extra = extra_keys(inputs)
    return _by_name(error_bound(problem, *qkv, pair, *extra, rounds_probabilities=rounds_probabilities))


def _forward_sample(
    problem: Problem, inputs: Tensors, at: Sequence[int], *, rounds_probabilities: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from .reference import dequantise, query_sample

    inputs = dequantise(inputs)
    qkv = inputs["q"], inputs["k"], inputs["v"]
    extra = extra_keys(inputs)
    exact, bounds = query_sample(problem, *qkv, at, *extra, rounds_probabilities=rounds_probabilities)
    return _by_name(exact), _by_name(bounds)


def _by_name(pair: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"out": pair[0], "lse": pair[1]}


def _forward_results(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    """What a backward pass reads of its forward pass. Of a problem too large for brute force, results that one might
    have: gradients are defined by what they are."""
    if problem.token_count * prod(problem.kv_tokens or problem.tokens) <= _BRUTE_FORCE:
        return _forward(problem, inputs)
    most = abs(problem.score_scale) * inputs["q"].double().norm(dim=-1) * inputs["k"].double().norm(dim=-1).max()
    return {"out": inputs["out"] / 4, "lse": most / 2}


def _forward_flop(problem: Problem) -> float:
    """Q K^T and P V."""
    return 2.0 * problem.batch * problem.heads * (problem.head_dim + problem.value_head_dim)


GRAD_OUT = Role("grad_out", "output's gradient", "q", "value_head_dim", "output")
GRAD_LSE = Role("grad_lse", "LSE's gradient", "q", None, "fp32")
GRAD_Q = Role("grad_q", "query's gradient", "q", "head_dim")
GRAD_K = Role("grad_k", "key's gradient", "kv", "head_dim")
GRAD_V = Role("grad_v", "value's gradient", "kv", "value_head_dim")
_GRAD_EXTRA = (
    Role("grad_extra_k", "extra key's gradient", "extra", "head_dim"),
    Role("grad_extra_k_2", "second extra key's gradient", "extra", "head_dim", piece=1),
    Role("grad_extra_v", "extra value's gradient", "extra", "value_head_dim"),
    Role("grad_extra_v_2", "second extra value's gradient", "extra", "value_head_dim", piece=1),
)
_BACKWARD_INPUTS = (Q, K, V, OUT, LSE, GRAD_OUT, GRAD_LSE)


def _backward_op(name: str, outputs: tuple[Role, ...], products: tuple[int, int]) -> Op:
    """A backward op; ``products``: matrix products along the channels of Q and K, and along those of V."""
    side: Literal["q", "kv"] = "kv" if name.endswith("_kv") else "q"

    def of_reference(kind: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            from . import reference_backward

            return getattr(reference_backward, f"{kind}_{side}")(*given, **named)

        return call

    def flop(problem: Problem) -> float:
        channels = products[0] * problem.head_dim + products[1] * problem.value_head_dim
        return 2.0 * problem.batch * problem.heads * channels

    exact, bound, sample = (of_reference(kind) for kind in ("gradient", "bound", "sample"))
    extra = _GRAD_EXTRA if side == "kv" else ()
    further = _forward_results, extra, side, sum(products)
    return Op(name, _BACKWARD_INPUTS, outputs, exact, bound, sample, flop, *further)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("gna_forward", (Q, K, V), (OUT, LSE), _forward, _forward_bound, _forward_sample, _forward_flop, products=2),
        _backward_op("gna_backward_q", (GRAD_Q,), (2, 1)),
        _backward_op("gna_backward_kv", (GRAD_K, GRAD_V), (2, 2)),
    )
}
"""The ops by name."""

FORWARD = OPS["gna_forward"]
