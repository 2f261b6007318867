"""`Request`: what a call needs of a kernel, and the one place that says whether a kernel serves it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import ANY_HEAD_DIM, KernelConfig
from .dtypes import DTYPES, dtype_name
from .problem import Problem, fields_of_pattern, hungriest, split_patterns

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Request:
    """The needs of a call for a kernel, as far as a kernel's key can tell; ``problem`` and ``key`` say more if known.

    Attributes:
        device: ``cpu`` or ``cuda``; ``device_index`` says which.
        q_tile, kv_tile: the tiles that the call asks for, if it does.
        key: the kernel that the call is pinned to, or empty.
        out_dtype: of the output, where it is not the inputs'.
        one_pattern: whether all heads are known to have one, so that a Q tile may have several that share keys.
        problem: the call's problem; None while torch traces with sizes that aren't numbers.
        heads_per_kv: query heads that share keys; 0 where that is not known either.
    """

    op: str
    rank: int
    dtype: str
    head_dim: int
    value_head_dim: int
    device: str
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None
    device_index: int = 0
    key: str = ""
    problem: Problem | None = None
    out_dtype: str = ""
    one_pattern: bool = False
    heads_per_kv: int = 0

    @classmethod
    def of_problem(cls, op: str, problem: Problem, device: str, **further: Any) -> Request:
        """The request of a call with this problem; ``further`` are fields that it doesn't say."""
        dims = problem.head_dim, problem.value_head_dim
        further = {"out_dtype": problem.out_dtype, "heads_per_kv": problem.heads // problem.kv_heads, **further}
        return cls(op, problem.rank, problem.dtype, *dims, device, problem=problem, **further)

    def __str__(self) -> str:
        value = f" (value {self.value_head_dim})" if self.value_head_dim != self.head_dim else ""
        return f"rank {self.rank}, {self.dtype}, head_dim {self.head_dim}{value}, on {self.device}"

    @property
    def output_dtype(self) -> str:
        """Of the output."""
        return self.out_dtype or (DTYPES[self.dtype].output if self.dtype in DTYPES else self.dtype)

    def register_call(self) -> str:
        """The call that registers a kernel for it: the same text that the core's errors end with."""
        if self.key:
            return f'gnaforge.register("{self.key}")'
        fields = [f"rank={self.rank}", f"head_dim={self.head_dim}"]
        if self.value_head_dim != self.head_dim:
            fields.append(f"value_head_dim={self.value_head_dim}")
        fields.append(f'dtype="{self.dtype}"')
        if (output := self.output_dtype) != self.dtype:
            fields.append(f'out_dtype="{output}"')
        if self.op != "gna_forward":
            fields.append('direction="backward"')
        if self.device == "cpu":
            fields.append('arch="cpu"')
        if self.problem is not None:
            fields += self.problem.register_arguments()
        return f"gnaforge.register({', '.join(fields)})"


def request_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Sequence[int],
    pinned: str = "",
    *extra_keys: torch.Tensor | None,
) -> Request:
    """The request that a forward call with these tensors makes; ``pattern`` as the operator has it,
    ``extra_keys`` those of each further piece.

    Raises:
        ProblemError: the tensors and the pattern make no problem.
    """
    one_pattern = True
    if (count := query.shape[-2]) != 1 and 1 <= (rank := query.dim() - 3) <= 3:
        patterns = split_patterns(pattern, rank, count)
        pattern, one_pattern = hungriest(patterns, rank), len(patterns) == 1
    fields = fields_of_pattern(pattern)
    extra = [keys.shape[1] for keys in extra_keys if keys is not None and not is_zero(keys.shape[1])]
    sizes = (*query.shape, *key.shape, value.shape[-1], *fields["window"], *extra)
    problem = None
    if all(type(size) is int and size for size in sizes):  # a size may be a symbol while torch traces, and 0
        if grid := fields.get("grid"):
            fields["grid"] = tuple(own or size for own, size in zip(grid, key.shape[1:-2], strict=True))
        problem = Problem.of_tensors(query, key, value, **fields, extra_tokens=extra)
    return Request(
        "gna_forward",
        len(fields["window"]),
        dtype_name(query.dtype),
        int(query.shape[-1]),
        int(value.shape[-1]),
        query.device.type,
        device_index=query.device.index or 0,
        key=pinned,
        problem=problem,
        one_pattern=one_pattern,
        heads_per_kv=heads_per_kv(query, key),
    )


def heads_per_kv(query: torch.Tensor, key: torch.Tensor) -> int:
    """Query heads that share keys; 0 where torch traces with numbers of heads that aren't numbers."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    return heads // kv_heads if type(heads) is int and type(kv_heads) is int and kv_heads else 0


def is_zero(size: int) -> bool:
    """Whether a size is known to be 0: while torch traces it may be a symbol."""
    return type(size) is int and size == 0


def refusal(
    config: KernelConfig, device: str, request: Request, *, emulated: bool = False, features: Collection[str] = ()
) -> str:
    """Why a kernel can't serve a request, as far as is known without asking it; empty if it may.

    Args:
        config: the kernel.
        device: ``cpu`` or ``cuda``: where its tensors must be.
        request: what is asked for.
        emulated: whether it is a GPU kernel that runs on the emulator.
        features: what it has beyond plain GNA, of `problem.FEATURES`.
    """
    if request.key:
        return "" if config.key == request.key else f"{request.key} is asked for"
    if emulated:
        return "emulated, runs only when named"
    if device != request.device:
        return f"takes {device} tensors"
    for name in request.problem.features() if request.problem is not None else ():
        if name not in features:
            return f"doesn't have the feature {name}"
    if request.heads_per_kv and (reason := _group_misfit(request.heads_per_kv, config)):
        return reason
    return mismatch(
        config,
        op=request.op,
        rank=request.rank,
        dtype=request.dtype,
        head_dim=request.head_dim,
        value_head_dim=request.value_head_dim,
        q_tile=request.q_tile,
        kv_tile=request.kv_tile,
        output_dtype=request.output_dtype,
    )


def heads_misfit(problem: Problem, config: KernelConfig) -> str:
    """Why a kernel's tiles can't have the heads of a problem; empty if they can."""
    return _group_misfit(problem.heads // problem.kv_heads, config)


def _group_misfit(group: int, config: KernelConfig) -> str:
    if group % config.q_tile_heads == 0:
        return ""
    shared = "no query heads share" if group == 1 else f"{group} query heads share"
    return f"{shared} keys; tiles of {config.key} have {config.q_tile_heads}"


def mismatch(config: KernelConfig, **wanted: Any) -> str:
    """Why a kernel's key is not of the kind that is wanted, by field of `KernelConfig`; None leaves a field open. Empty
    if it is. Head dims are numbers, also those of values."""
    own = {name: getattr(config, name) for name in wanted}
    if "value_head_dim" in own:
        own["value_head_dim"] = config.value_head_dim or config.head_dim
    for name, value in wanted.items():
        is_open = value is None or (name in ("head_dim", "value_head_dim") and own[name] == ANY_HEAD_DIM)
        if not is_open and own[name] != value:
            return f"{name} is {own[name]}, not {value}"
    return ""
