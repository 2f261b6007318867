"""Neighborhood attention operators, with NATTEN's names, layouts and meaning.

Tensors are heads-last: query ``[batch, *tokens, heads, head_dim]``, key ``[batch, *tokens, heads_kv, head_dim]``,
value ``[batch, *tokens, heads_kv, head_dim_v]``; output ``[batch, *tokens, heads, head_dim_v]`` in the inputs' dtype
and log-sum-exp ``[batch, *tokens, heads]`` in float32, natural logarithm. Semantics: GNA, arXiv 2504.16922.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import is_grad_enabled
from torch._C import _is_tracing as is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import arguments, core, jit, lookup, natten_arguments
from .config import KernelConfig
from .dtypes import DTYPES, dtype_name
from .errors import NoKernelError
from .own_patterns import is_own, own_patterns
from .problem import Causal
from .request import Request, request_of
from .table import loaded_kernels

DTYPE_NAMES = {dtype.torch: dtype.name for dtype in DTYPES.values()}


def _register_python_parts() -> None:
    from .torch_ops import register_python_parts  # which takes longer to import than the rest of a call needs

    register_python_parts()


core.set_python_parts(_register_python_parts)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Results = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def _constant_result(function: F) -> F:
    """Marks a function that torch.compile shall run as plain Python, as torch.compiler.assume_constant_result does.

    That one imports all of torch._dynamo for it, which takes over a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_operators: tuple[Callable[..., Any], ...] = ()  # forward_no_grad, forward
_sharding_registered = False


def load_operators() -> tuple[Callable[..., Any], ...]:
    global _operators
    core.core()
    register_sharding()
    _operators = (torch.ops.gnaforge.forward_no_grad.default, torch.ops.gnaforge.forward.default)
    return _operators


def register_sharding() -> bool:
    """Registers the sharding of DTensors, once, where they are imported. Whether it did now."""
    global _sharding_registered
    if _sharding_registered or "torch.distributed.tensor" not in sys.modules:
        return False
    from .sharding import register_strategies

    register_strategies()
    _sharding_registered = True
    return True


@_constant_result
def load_operators_now() -> bool:
    """Runs as plain Python while torch.compile traces, which can't follow the loading of a library."""
    load_operators()
    return True


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
) -> Any:
    """A call of any rank. ``settings`` are what `arguments.settings_pattern` takes; ``further`` are keys, values and
    lengths of the extra piece, and an output and a log-sum-exp to write to."""
    plain_settings = settings is None or not any(map(is_own, settings[:2]))
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
    if further is not None:
        return _attention_further(query, key, value, pattern, scale, kernel, return_lse, *further)
    if is_compiling():
        arguments.require_call(query, key, value, pattern)
        load_operators_now()
        out, lse = torch.ops.gnaforge.forward.default(query, key, value, pattern, scale, kernel)
        return (out, lse) if return_lse else out
    operators = _operators or load_operators()
    operator = operators[1]
    try:
        # A graph that torch.jit traces may be differentiated later, and a tangent is seen by autograd alone.
        if is_tracing():
            _prepare_trace(query, key, value, pattern, scale, kernel)
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
        out, lse = _recover(error, operator, query, key, value, pattern, scale, kernel)
    return (out, lse) if return_lse else out


def _attention_further(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    kernel: str,
    return_lse: bool,
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    extra_lengths: torch.Tensor | None,
    out: torch.Tensor | None,
    out_lse: torch.Tensor | None,
) -> Any:
    """The rest of `attend` for calls with extra keys or results of the caller's."""
    arguments.require_call(query, key, value, pattern)
    named = {"additional_keys": extra_k, "additional_values": extra_v, "additional_lengths": extra_lengths}
    named |= {"out": out, "out_lse": out_lse}
    arguments.require_tensors(**{name: tensor for name, tensor in named.items() if tensor is not None})
    call = query, key, value, pattern, scale, kernel, extra_k, extra_v, extra_lengths
    results: tuple[torch.Tensor, ...] = ()
    if out is not None or out_lse is not None:
        results = _complete_results(query, value, out, out_lse)
    if is_compiling():
        load_operators_now()
    else:
        load_operators()

    def operator(*call: Any) -> Results:
        if results:
            torch.ops.gnaforge.forward_out.default(*call, output=results[0], output_lse=results[1])
            return results[0], results[1]
        return torch.ops.gnaforge.forward.default(*call)  # type: ignore[no-any-return]

    if is_compiling():
        found = operator(*call)
    else:
        try:
            if is_tracing():
                _prepare_trace(*call)
            found = operator(*call)
        except RuntimeError as error:
            found = _recover(error, operator, *call, results=results)
    return found if return_lse else found[0]


def _complete_results(
    query: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None, out_lse: torch.Tensor | None
) -> Results:
    """An output and a log-sum-exp to write to, where the caller brings one of them."""
    from .autocast import autocast_dtype

    if out is None:
        out = query.new_empty((*query.shape[:-1], *value.shape[-1:]), dtype=autocast_dtype(query))
    if out_lse is None:
        out_lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return out, out_lse


def _recover(
    error: RuntimeError, operator: Callable[..., Results], *call: Any, results: tuple[torch.Tensor, ...] = ()
) -> Results:
    """After a failed call: loads or makes a kernel that fits and tries again, or raises what the caller can act on."""
    if register_sharding():  # torch.distributed.tensor came after the core
        try:
            return operator(*call)
        except RuntimeError as again:
            error = again
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        raise _error_of(error, failure, call, results) from None

    def attempt() -> Results | core.Failure:
        """The operator's result, or the core's `Failure` if it has no kernel for the call."""
        try:
            return operator(*call)
        except RuntimeError as again:
            found = core.failure_of(again)
            if found.code not in core.NO_KERNEL:
                raise _error_of(again, found, call, results) from None
            return found

    return find_kernel(failure, attempt, _request_of(call))


def _error_of(
    error: RuntimeError, failure: core.Failure, call: tuple[Any, ...], results: tuple[torch.Tensor, ...]
) -> Exception:
    """The error to raise for one of an operator's that no other kernel would mend."""
    from .given import failure_of_call

    if failure.code == core.ErrorCode.BAD_INPUT:
        return ValueError(failure.reason)
    if failure.code == core.ErrorCode.OUT_OF_MEMORY:
        return out_of_memory(failure, call[0], call[2])
    if failure.code == core.ErrorCode.OTHER:
        tensors = (*call[:3], *call[6:], *[None] * (12 - len(call)), *results) if results else (*call[:3], *call[6:])
        if fault := failure_of_call(tensors, *call[3:6]):
            return ValueError(fault.reason)  # torch refused it first, in other words
    return error


def _request_of(call: tuple[Any, ...]) -> Request:
    from .autocast import autocast_tensor

    return request_of(*map(autocast_tensor, call[:3]), call[3], call[5], *call[6:7])


def _prepare_trace(*call: Any) -> None:
    """Loads or makes a kernel for a call that torch.jit traces: it doesn't survive an operator that fails.

    Raises:
        ValueError, NoKernelError: as a call.
    """
    from .autocast import autocast_tensor

    arguments.require_call(*call[:4])
    cast = tuple(map(autocast_tensor, call))
    prepare_apart(lambda: prepare((*cast[:3], *cast[6:]), *cast[3:6]))
    if any(tensor is not None and tensor.requires_grad for tensor in (*call[:3], *call[6:8])):
        from .training import prepare_backward

        prepare_apart(lambda: prepare_backward((*call[:3], *call[6:8]), call[3]))


def prepare_apart(prepare: Callable[[], object]) -> None:
    """Calls a function while torch.jit traces, which must not make a part of the trace of what it looks at."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as other:  # a trace is one thread's
        other.submit(prepare).result()


def prepare(
    tensors: Sequence[Any], pattern: Sequence[int], scale: float | None, key: str, names: Sequence[str] = ()
) -> None:
    """Has a kernel in the table for a forward call that doesn't run now; tensors and names are as
    `given.failure_of_call` takes them.

    Raises:
        ValueError, NoKernelError: as a call.
    """
    from .given import failure_of_call

    def attempt() -> core.Failure | None:
        return failure_of_call(tensors, pattern, scale, key, choose=True, names=names)

    failure = attempt()
    if failure is not None and failure.code == core.ErrorCode.BAD_INPUT:
        raise ValueError(failure.reason)
    if failure is not None and failure.code in core.NO_KERNEL:
        find_kernel(failure, attempt, request_of(tensors[0], tensors[1], tensors[2], pattern, key, *tensors[3:9:3]))


def find_kernel(failure: core.Failure, attempt: Callable[[], T | core.Failure], request: Request) -> T:
    """What ``attempt`` gives when there is a kernel for it, which is loaded or made; until then that is a `Failure`.

    Raises:
        ValueError, NoKernelError: there can't be one, or none may be made.
    """
    if busy := jit.busy():
        lookup.remedy(request)  # raises where there can't be a kernel
        raise NoKernelError(f"{failure.whole}\n{busy}") from None
    lookup.load_matching(request)
    result = attempt()  # also where nothing new came: another thread may have loaded it
    if isinstance(result, core.Failure) and request.key and result.code != core.ErrorCode.MISSING:
        raise NoKernelError(f"{result.text}\nleave out kernel= to let gnaforge choose one that fits") from None
    reason = ""
    if isinstance(result, core.Failure):
        with jit.one_thread(request):
            result = attempt()
            if isinstance(result, core.Failure):
                reason = jit.make_kernels(request)
                result = attempt()
    if isinstance(result, core.Failure):
        # To register one is no help in a package of built kernels.
        text = result.text if lookup.source() is None else result.whole
        raise NoKernelError("\n".join(filter(None, [text, reason, lookup.remedy(request)]))) from None
    return result


def out_of_memory(failure: core.Failure, query: torch.Tensor, value: torch.Tensor) -> torch.OutOfMemoryError:
    """The error of a GPU that has no memory for a call: what was wanted, and what torch says of the device.

    Raises:
        RuntimeError: it isn't memory that torch lacks.
    """
    try:
        _ = (
            query.new_empty((*query.shape[:-1], value.shape[-1])),
            query.new_empty(query.shape[:-1], dtype=torch.float32),
        )
    except torch.OutOfMemoryError as own:
        return torch.OutOfMemoryError(f"{failure.text}\n{own}")
    return torch.OutOfMemoryError(failure.text)


def kernel_key(
    rank: int,
    query: torch.Tensor,
    value: torch.Tensor,
    kernel: KernelConfig | str | None,
    q_tile: Any,
    kv_tile: Any,
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
    key: str = _key_with_tiles(
        rank,
        dtype_name(autocast_dtype(query)),
        int(query.shape[-1]),
        int(value.shape[-1]),
        query.device.type,
        None if q_tile is None else tuple(arguments.ints_per_dim("q_tile_shape", q_tile, rank)),
        None if kv_tile is None else tuple(arguments.ints_per_dim("kv_tile_shape", kv_tile, rank)),
        torch.compiler.is_compiling(),
    )
    return key


@cache
def _parse_key(key: str) -> str:
    return KernelConfig.parse(key).key


@_constant_result
def _require_key(key: str) -> str:
    return _parse_key(key)


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
) -> str:
    """Key of a kernel with the given tiles, made if the policy says so and torch doesn't trace.

    Raises:
        NoKernelError: there is none; lists the tiles that there are.
    """
    request = Request("gna_forward", rank, dtype, head_dim, value_head_dim, device, q_tile, kv_tile)

    def find_fitting(request: Request) -> list[KernelConfig]:
        return [kernel.config for kernel in loaded_kernels().values() if not kernel.refusal(request)]

    found = find_fitting(request)
    if not found:
        lookup.load_matching(request)
        found = find_fitting(request)
    reason = ""
    if not found and not tracing and not (reason := jit.busy()):
        with jit.one_thread(request):
            reason = "" if find_fitting(request) else jit.make_kernels(request)
        found = find_fitting(request)
    if found:
        return found[0].key
    listing = "".join(f"\n  {config}" for config in find_fitting(replace(request, q_tile=None, kv_tile=None)))
    listing = listing or " none"
    raise NoKernelError(
        f"no kernel with q_tile_shape {q_tile} and kv_tile_shape {kv_tile} is loaded for {request}; "
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
            which are contiguous: slices of larger ones, for example. They must not overlap with an input, nor with each
            other, which isn't checked. No argument may require grad then, nor the call be under torch.vmap.
        kernel: pins a kernel: its `KernelConfig` or key.
        natten_tuning: NATTEN's other tuning arguments are accepted and ignored, with one warning.

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
    if natten_tuning:
        natten_arguments.check(natten_tuning)
    arguments.require_tensors(query=query)
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query must be [batch, 1 to 3 token dims, heads, head_dim], got {tuple(query.shape)}")
    pinned = kernel_key(rank, query, value, kernel, q_tile_shape, kv_tile_shape)
    settings = further = None
    if not (edge is None is sink is grid is q_offset is kv_offset is kv_sink):
        settings = edge, sink, grid, q_offset, kv_offset, kv_sink
    if not (additional_keys is additional_values is additional_lengths is out is out_lse is None):
        further = additional_keys, additional_values, additional_lengths, out, out_lse
    return attend(
        rank, query, key, value, kernel_size, stride, dilation, is_causal, scale, return_lse, pinned, settings, further
    )


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
        kernel: KernelConfig | str | None = None,
        **natten_tuning: Any,
    ) -> Any:
        settings = None
        if not (edge is None is sink is grid is q_offset is kv_offset is kv_sink):
            settings = edge, sink, grid, q_offset, kv_offset, kv_sink
        if attention_kwargs is not None or backend is not None or natten_tuning:
            given = {"attention_kwargs": attention_kwargs, "backend": backend}
            natten_arguments.check({**{name: x for name, x in given.items() if x is not None}, **natten_tuning})
        further = None
        if not (additional_keys is additional_values is additional_lengths is out is out_lse is None):
            further = additional_keys, additional_values, additional_lengths, out, out_lse
        pinned = ""
        if kernel is not None or q_tile_shape is not None or kv_tile_shape is not None:
            pinned = kernel_key(rank, query, value, kernel, q_tile_shape, kv_tile_shape)
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
