"""Neighborhood attention operators, with NATTEN's names, layouts and meaning.

Tensors are heads-last: query ``[batch, *tokens, heads, head_dim]``, key ``[batch, *tokens, heads_kv, head_dim]``,
value ``[batch, *tokens, heads_kv, head_dim_v]``; output ``[batch, *tokens, heads, head_dim_v]`` in the inputs' dtype
and log-sum-exp ``[batch, *tokens, heads]`` in float32, natural logarithm. Semantics: GNA, arXiv 2504.16922.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import is_grad_enabled
from torch._C import _is_tracing as is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import arguments, core, finding, jit, lookup, natten_arguments, sharding
from .config import KernelConfig
from .dtypes import DTYPES, dtype_name
from .errors import NoKernelError
from .further import attend_further
from .own_patterns import is_own, own_patterns
from .problem import Causal
from .request import Request
from .scaled import attend_scaled, is_scaled
from .table import loaded_kernels

if TYPE_CHECKING:
    from .pinned_gradients import Tiles

DTYPE_NAMES = {dtype.torch: dtype.name for dtype in DTYPES.values()}


def _register_python_parts() -> None:
    from .torch_ops import register_python_parts  # which takes longer to import than the rest of a call needs

    register_python_parts()


core.set_python_parts(_register_python_parts)

F = TypeVar("F", bound=Callable[..., Any])


def _constant_result(function: F) -> F:
    """Marks a function that torch.compile shall run as plain Python, as torch.compiler.assume_constant_result does.

    That one imports all of torch._dynamo for it, which takes over a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_operators: tuple[Callable[..., Any], ...] = ()  # forward_no_grad, forward


def _load_operators() -> tuple[Callable[..., Any], ...]:
    global _operators
    core.core()
    sharding.register_when_imported()
    _operators = (torch.ops.gnaforge.forward_no_grad.default, torch.ops.gnaforge.forward.default)
    return _operators


@_constant_result
def _load_operators_now() -> bool:
    """Runs as plain Python while torch.compile traces, which can't follow the loading of a library."""
    _load_operators()
    return True


def load_operators() -> None:
    """Makes the operators known to torch."""
    if is_compiling():
        _load_operators_now()
    elif not _operators:
        _load_operators()


def attend(
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: Causal | Sequence[Causal] | None,
    scale: float | None,
    return_lse: bool,
    kernel: str,
    settings: tuple[Any, ...] | None,
    further: tuple[Any, ...] | None,
    backward_tiles: Tiles | None = None,
    scales: tuple[Any, ...] | None = None,
) -> Any:
    """A call of any rank. ``settings`` are what `arguments.settings_pattern` takes; ``further`` are keys, values and
    lengths of the extra piece, and an output and a log-sum-exp to write to; ``scales`` are descales of query, key and
    value, and the output's dtype."""
    plain_settings = settings is None or not (is_own(settings[0]) or is_own(settings[1]))
    if type(kernel_size) is type(stride) is type(dilation) is int and type(is_causal) is bool and plain_settings:
        pattern = [kernel_size] * rank + [stride] * rank + [dilation] * rank + [is_causal] * rank
    else:
        plain = kernel_size, stride, dilation, is_causal
        if not plain_settings or any(map(is_own, plain)):
            arguments.require_tensors(query=query)
            pattern = own_patterns(rank, query.shape[-2], "head", plain, settings)
            settings = None
        else:
            pattern = arguments.plain_pattern(rank, *plain)
    if settings is not None:
        pattern += arguments.settings_pattern(rank, *settings)
    if scale is not None and type(scale) is not float:
        scale = arguments.number("scale", scale)
    if scales is not None or is_scaled(query):
        load_operators()
        return attend_scaled(query, key, value, pattern, scale, kernel, return_lse, further, scales)
    if backward_tiles is not None and not is_compiling() and (further is None or further[3] is further[4] is None):
        from .pinned_gradients import attend_pinned

        load_operators()
        tensors = query, key, value, *(further or (None, None, None))[:3]
        key_of = partial(_backward_key, rank, backward_tiles)
        if (pair := attend_pinned(tensors, pattern, scale, kernel, key_of)) is not None:
            return pair if return_lse else pair[0]
    if further is not None:
        load_operators()
        return attend_further(query, key, value, pattern, scale, kernel, return_lse, *further)
    if is_compiling():
        arguments.require_call(query, key, value, pattern)
        _load_operators_now()
        out, lse = torch.ops.gnaforge.forward.default(query, key, value, pattern, scale, kernel)
        return (out, lse) if return_lse else out
    operators = _operators or _load_operators()
    operator = operators[1]
    try:
        # A graph that torch.jit traces may be differentiated later, and a tangent is seen by autograd alone.
        if is_tracing():
            finding.prepare_trace(query, key, value, pattern, scale, kernel)
        elif not (
            (is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
            or forward_ad._current_level >= 0
        ):
            operator = operators[0]
        out, lse = operator(query, key, value, pattern, scale, kernel)
    except (RuntimeError, AttributeError, TypeError) as error:
        arguments.require_call(query, key, value, pattern)
        if not isinstance(error, RuntimeError):
            raise
        out, lse = finding.recover(error, operator, query, key, value, pattern, scale, kernel)
    return (out, lse) if return_lse else out


def kernel_key(
    rank: int,
    query: torch.Tensor,
    value: torch.Tensor,
    kernel: KernelConfig | str | None,
    q_tile: Any,
    kv_tile: Any,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> str:
    if isinstance(kernel, str):
        checked: str = _require_key(kernel)
        return checked
    if kernel is not None:
        return arguments.key_of(kernel)
    if q_tile is None and kv_tile is None:
        return ""
    from .autocast import autocast_dtype

    arguments.require_tensors(query=query, value=value)
    if out_dtype is None and is_scaled(query) and isinstance(out, torch.Tensor):
        out_dtype = out.dtype
    key: str = _key_with_tiles(
        rank,
        dtype_name(autocast_dtype(query)),
        index(query.shape[-1]),  # where torch traces with sizes that aren't numbers, these become ones
        index(value.shape[-1]),
        query.device.type,
        None if q_tile is None else tuple(arguments.ints_per_dim("q_tile_shape", q_tile, rank)),
        None if kv_tile is None else tuple(arguments.ints_per_dim("kv_tile_shape", kv_tile, rank)),
        torch.compiler.is_compiling(),
        out_dtype="" if out_dtype is None else dtype_name(out_dtype),
    )
    return key


@cache
def _parse_key(key: str) -> str:
    return KernelConfig.parse(key).key


@_constant_result
def _require_key(key: str) -> str:
    return _parse_key(key)


def _backward_key(rank: int, tiles: Tiles, op: str, query: torch.Tensor, value: torch.Tensor) -> str:
    from .autocast import autocast_dtype

    named = zip(("backward_q_tile_shape", "backward_kv_tile_shape"), tiles, strict=True)
    q_tile, kv_tile = (
        None if tile is None else tuple(arguments.ints_per_dim(name, tile, rank)) for name, tile in named
    )
    dims = int(query.shape[-1]), int(value.shape[-1])
    key: str = _key_with_tiles(
        rank, dtype_name(autocast_dtype(query)), *dims, query.device.type, q_tile, kv_tile, False, op
    )
    return key


@_constant_result
def _key_with_tiles(
    rank: int,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    device: str,
    q_tile: tuple[int, ...] | None,
    kv_tile: tuple[int, ...] | None,
    tracing: bool,
    op: str = "gna_forward",
    out_dtype: str = "",
) -> str:
    """Key of a kernel with the given tiles, made if the policy says so and torch doesn't trace.

    Raises:
        NoKernelError: there is none; lists the tiles that there are.
    """
    request = Request(op, rank, dtype, head_dim, value_head_dim, device, q_tile, kv_tile, out_dtype=out_dtype)

    def find_fitting(request: Request) -> list[KernelConfig]:
        found = [kernel.config for kernel in loaded_kernels().values() if not kernel.refusal(request)]
        return sorted(found, key=lambda config: config.q_tile_heads)

    def serves_all(found: list[KernelConfig]) -> bool:  # tiles of several heads serve only calls with such groups
        return bool(found) and found[0].q_tile_heads == 1

    found = find_fitting(request)
    if not serves_all(found):
        lookup.load_matching(request)
        found = find_fitting(request)
    reason = ""
    if not serves_all(found) and not tracing and not (reason := jit.busy()):
        with jit.one_thread(request):
            reason = "" if serves_all(find_fitting(request)) else jit.make_kernels(request)
        found = find_fitting(request)
    if found:
        return found[0].key
    listing = "".join(f"\n  {config}" for config in find_fitting(replace(request, q_tile=None, kv_tile=None)))
    listing = listing or " none"
    raise NoKernelError(
        f"no kernel {f'of {op} ' if op != 'gna_forward' else ''}with q_tile_shape {q_tile} and kv_tile_shape {kv_tile} "
        f"is loaded for {request}; "
        f"there are:{listing}\n" + "\n".join(filter(None, [reason, lookup.remedy(request)]))
    )


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: Causal | Sequence[Causal] | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    additional_lengths: torch.Tensor | None = None,
    edge: str | Sequence[str] | None = None,
    sink: int | Sequence[int] | None = None,
    grid: int | Sequence[int] | None = None,
    q_offset: int | Sequence[int] | None = None,
    kv_offset: int | Sequence[int] | None = None,
    kv_sink: int | Sequence[int] | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    descale_q: float | torch.Tensor | None = None,
    descale_k: float | torch.Tensor | None = None,
    descale_v: float | torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    kernel: KernelConfig | str | None = None,
    **natten_tuning: Any,
) -> Any:
    """Neighborhood attention of any rank, read off the query: 1 to 3 token dimensions. What values that are not finite
    reach: see `na1d`.

    Args:
        query: ``[batch, *tokens, heads, head_dim]``, of a type that kernels take, such as bfloat16.
        key: ``[batch, *tokens, heads_kv, head_dim]``; ``heads_kv`` divides ``heads`` (GQA, MQA). Along a dimension
            whose window holds all keys there may be any number of queries, as in cross attention.
        value: ``[batch, *tokens, heads_kv, head_dim_v]``.
        kernel_size: window, in tokens: an integer for all dimensions or one per dimension. Or ``[heads, rank]``: of
            each head its own, as a sequence of sequences, a tensor or an array. So may be stride, dilation, is_causal,
            edge and sink.
            ``1 <= kernel_size``, and ``kernel_size * dilation <= tokens`` but for ``cut`` and ``block``.
        stride: queries that share a window, ``1 <= stride <= kernel_size``.
        dilation: step between the keys of a window.
        is_causal: a query sees no later key along the dimensions where this is true (or ``token``); ``block``: none
            after its group of ``stride`` queries, as where these are a video frame. That window ends with the group.
        scale: factor of Q K^T; default ``head_dim ** -0.5``.
        additional_keys, additional_values: further keys that all queries see, in the same softmax, such as text:
            ``[batch, S, heads_kv, head_dim]`` and ``[batch, S, heads_kv, head_dim_v]``. (NATTEN's, there computed
            apart and merged.)
        additional_lengths: how many of them count, int32 ``[batch]`` on the same device, cut to [0, S]; default: all.
            Those beyond are padding: their values must be finite, and have no effect then.
        edge: what a window does that would leave the grid: ``shift`` (inwards, NATTEN's way, the default), ``cut``, or
            ``wrap`` to the other end, as longitude does; one for all dimensions or one per dimension.
        sink: the first so many tokens of each dimension are seen beside the window, by causal queries as far as these
            are not later. Needs dilation 1, and no ``wrap``. (StreamingLLM, arXiv 2309.17453.)
        grid: tokens per dimension that windows are laid in, where query or key are parts of it; default: the key's.
        q_offset, kv_offset: where in the grid the queries and the keys begin. Every key that a query sees must be in
            the key tensor. ``kv_offset`` may be negative where the grid wraps: positions go on beyond its ends.
        kv_sink: the key tensor has the first so many tokens of the grid in front, and those from ``kv_offset`` on
            after them, as a rolling cache has.
        q_tile_shape, kv_tile_shape: take a kernel with these tiles.
        return_lse: also return the log-sum-exp of each query.
        out, out_lse: tensors to write the output and the log-sum-exp to, of any strides but for the output's channels,
            which are contiguous: slices of larger ones, for example. Each is written to whether or not it is returned,
            ``out_lse`` also without ``return_lse``. They must not overlap with an input, nor with each
            other, which isn't checked. No argument may require grad then, nor the call be under torch.vmap.
        descale_q, descale_k, descale_v: of query, key and value in float8_e4m3fn, what their numbers are multiplied
            by: a number, or float32 ``[heads]`` of a query and ``[heads_kv]`` of the others, on their device.
            Positive, which of tensors isn't checked. Extra keys and values have those of key and value. Default: 1.
        out_dtype: of the output of such a call, torch.bfloat16 by default, or torch.half. It has no gradients.
        kernel: pins a kernel: its `KernelConfig` or key.
        natten_tuning: ``backward_q_tile_shape`` and ``backward_kv_tile_shape`` take backward kernels with these tiles,
            where gradients are wanted and torch neither traces nor transforms the call. NATTEN's other tuning arguments
            are accepted and ignored, with one warning.

    Returns:
        The output ``[batch, *tokens, heads, head_dim_v]``, or with ``return_lse`` a tuple with the log-sum-exp
        ``[batch, *tokens, heads]``, float32, natural logarithm. Each is the tensor to write to, if there is one.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: shapes, dtypes, devices or the pattern don't fit each other.
        MemoryError, torch.OutOfMemoryError: there is no memory, on a CPU or a GPU, for the output, the log-sum-exp,
            the workspace or a copy of an input; says for which, and how much. A compiled graph raises a RuntimeError
            with the same text for a GPU.
        NoKernelError: no kernel computes this, and none may or can be compiled now (``GNAFORGE_JIT``); lists each
            kernel's reason and the call that registers one.
        NotImplementedError: forward-mode differentiation; ``out`` or ``out_lse`` under torch.vmap.
        RuntimeError: ``out`` or ``out_lse`` where an argument requires grad.

    Under torch.autocast tensors are cast as torch's scaled_dot_product_attention casts its own. What torch only traces
    is refused in the same words as a call that runs.
    """
    backward_tiles = natten_arguments.backward_tiles(natten_tuning) if natten_tuning else None
    arguments.require_tensors(query=query)
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query must be [batch, 1 to 3 token dims, heads, head_dim], got {tuple(query.shape)}")
    pinned = kernel_key(rank, query, value, kernel, q_tile_shape, kv_tile_shape, out, out_dtype)
    settings = further = scales = None
    if not (descale_q is descale_k is descale_v is None and out_dtype is None):
        scales = descale_q, descale_k, descale_v, out_dtype
    if not (edge is None is sink is grid is q_offset is kv_offset is kv_sink):
        settings = edge, sink, grid, q_offset, kv_offset, kv_sink
    if not (additional_keys is additional_values is additional_lengths is out is out_lse is None):
        further = additional_keys, additional_values, additional_lengths, out, out_lse
    plain = kernel_size, stride, dilation, is_causal, scale, return_lse
    return attend(rank, query, key, value, *plain, pinned, settings, further, backward_tiles, scales)


_NON_FINITE = """Scores up to 2^30 in powers of two give finite results (up to 2^28 by the variant ``cutlass``).
    Values that are not finite: a NaN or infinity in K reaches the queries that see its token, and no
    others. So does one in V on cpu. On GPUs (sm90, sm100) one in V also makes the outputs NaN of queries whose Q tile
    visits a KV tile with its token: they multiply it by a probability of 0. It never reaches another batch entry, or a
    query head that has other keys, and from V not the log-sum-exp. A query with a score of infinity has NaN as output
    and a log-sum-exp of infinity (by kernels of the variant ``cutlass``: NaN)."""


def _fixed_rank(rank: int, layout: str) -> Callable[..., Any]:
    def operator(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: Causal | Sequence[Causal] | None = False,
        scale: float | None = None,
        additional_keys: torch.Tensor | None = None,
        additional_values: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        *,
        additional_lengths: torch.Tensor | None = None,
        edge: str | Sequence[str] | None = None,
        sink: int | Sequence[int] | None = None,
        grid: int | Sequence[int] | None = None,
        q_offset: int | Sequence[int] | None = None,
        kv_offset: int | Sequence[int] | None = None,
        kv_sink: int | Sequence[int] | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        out_lse: torch.Tensor | None = None,
        descale_q: float | torch.Tensor | None = None,
        descale_k: float | torch.Tensor | None = None,
        descale_v: float | torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        kernel: KernelConfig | str | None = None,
        **natten_tuning: Any,
    ) -> Any:
        settings = backward_tiles = scales = None
        if not (descale_q is descale_k is descale_v is None and out_dtype is None):
            scales = descale_q, descale_k, descale_v, out_dtype
        if not (edge is None is sink is grid is q_offset is kv_offset is kv_sink):
            settings = edge, sink, grid, q_offset, kv_offset, kv_sink
        if attention_kwargs is not None or backend is not None or natten_tuning:
            given = {"attention_kwargs": attention_kwargs, "backend": backend}
            given = {**{name: x for name, x in given.items() if x is not None}, **natten_tuning}
            backward_tiles = natten_arguments.backward_tiles(given)
        further = None
        if not (additional_keys is additional_values is additional_lengths is out is out_lse is None):
            further = additional_keys, additional_values, additional_lengths, out, out_lse
        pinned = ""
        if kernel is not None or q_tile_shape is not None or kv_tile_shape is not None:
            pinned = kernel_key(rank, query, value, kernel, q_tile_shape, kv_tile_shape, out, out_dtype)
        return attend(
            rank,
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            return_lse,
            pinned,
            settings,
            further,
            backward_tiles,
            scales,
        )

    operator.__name__ = operator.__qualname__ = f"na{rank}d"
    operator.__doc__ = (
        f"{rank}-D neighborhood attention; query, key and value are ``[batch, {layout}, heads, head_dim]``.\n\n"
        f"    Arguments, results and errors: see `neighborhood_attention`.\n\n    {_NON_FINITE}\n    "
    )
    return operator


na1d = _fixed_rank(1, "X")
na2d = _fixed_rank(2, "X, Y")
na3d = _fixed_rank(3, "X, Y, Z")
