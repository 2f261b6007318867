"""Joint attention of an image or video with text, as MMDiT blocks have it, in one call: nothing is concatenated."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

from . import arguments, core, finding, joint_parts, ops, sharding
from .autocast import autocast_tensor
from .config import KernelConfig
from .errors import NoKernelError
from .further import complete_results
from .given import failure_of_call, number_of
from .own_patterns import is_own, own_patterns
from .problem import Causal

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_RESULTS = ("output", "output_lse", "output_text", "output_text_lse")  # names of what operators write to


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_q: torch.Tensor | None = None,
    text_k: torch.Tensor | None = None,
    text_v: torch.Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    grid: Sequence[int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    lengths: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    text_lengths: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: Causal | Sequence[Causal] = False,
    edge: str | Sequence[str] | None = None,
    sink: int | Sequence[int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    text_out: torch.Tensor | None = None,
    text_out_lse: torch.Tensor | None = None,
    kernel: KernelConfig | str | None = None,
    text_kernel: KernelConfig | str | None = None,
) -> Any:
    """Attention of image (or video) tokens and text tokens to each other: an image token sees its window of the image
    and all text; a text token sees all of the image and all text. One softmax for each, no mask, no concatenation.

    Packed: with ``grid`` the tensors hold all tokens of a sequence, text before the image (FLUX, CogVideoX), after it
    (HunyuanVideo), or on both sides. Apart: with ``text_q``, ``text_k`` and ``text_v``, as MMDiT blocks (SD3, FLUX)
    have them before they concatenate.

    Args:
        q, k, v: packed ``[batch, prefix + prod(grid) + suffix, heads, head_dim]``, apart ``[batch, *tokens, heads,
            head_dim]``. k and v may have fewer heads, a divisor (GQA), v another head_dim; any strides with contiguous
            channels are read as they lie.
        text_q, text_k, text_v: apart ``[batch, S, heads, head_dim]``, in all but tokens as q, k and v.
        kernel_size, stride, dilation, is_causal, edge, sink: the image's window, as `neighborhood_attention` has them.
            None of them hides text, or anything from text.
        grid: packed: tokens of the image along each dimension, one to three numbers.
        prefix, suffix: packed: text tokens before and after the image.
        lengths: packed: how many of the text tokens count, int32 ``[batch]`` on the same device, cut to those that
            there are; default: all. With text on both sides a pair, of the prefix and of the suffix, or None for
            either. Tokens beyond are padding: their values must be finite, nobody sees them, and their own output is
            computed as that of text.
        text_lengths: the same where tensors are apart.
        scale: factor of Q K^T; default ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp of each token, float32, natural logarithm.
        out, out_lse: tensors to write the output and the log-sum-exp to, as `neighborhood_attention` takes them; apart,
            those of the image.
        text_out, text_out_lse: the same of the text, where tensors are apart.
        kernel, text_kernel: pin the kernels of the image's rows, of the grid's rank, and of the text's, of rank 1.

    Returns:
        Packed: the output ``[batch, tokens, heads, head_dim_v]``, or with ``return_lse`` a tuple with the log-sum-exp
        ``[batch, tokens, heads]``. Apart: a tuple of the image's output and the text's, or with ``return_lse`` of the
        image's output, the text's, the image's log-sum-exp and the text's. Each is the tensor to write to, if there is
        one.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: shapes, dtypes, devices or the pattern don't fit each other.
        NoKernelError: there is no kernel for the text rows, or the image rows, as the message says, and none may or can
            be compiled now (``GNAFORGE_JIT``).
        MemoryError, torch.OutOfMemoryError, NotImplementedError, RuntimeError: as `neighborhood_attention`.

    Gradients flow through outputs and log-sum-exps to all of q, k and v, image and text, on ``cpu``. Keys of padding
    get zeros. Text rows are launched first, the image rows may run beside them.
    """
    arguments.require_tensors(q=q, k=k, v=v)
    texts = {"text_q": text_q, "text_k": text_k, "text_v": text_v}
    if grid is not None:
        apart = {**texts, "text_lengths": text_lengths, "text_out": text_out, "text_out_lse": text_out_lse}
        for name, value in apart.items():
            if value is not None:
                raise ValueError(f"grid is for packed tokens, which hold the text; leave out {name}")
        shape = _grid(grid)
        image, packed_texts = _packed_pieces(q, k, v, shape, prefix, suffix)
        tensors = _with_lengths(packed_texts, lengths)
    else:
        arguments.require_tensors(**texts, **({} if text_lengths is None else {"text_lengths": text_lengths}))
        packed = {"prefix": prefix != 0, "suffix": suffix != 0, "lengths": lengths is not None}
        for name, is_given in packed.items():
            if is_given:
                raise ValueError(f"{name} is for packed tokens; give their grid too, or leave it out")
        image, tensors = (q, k, v), (text_q, text_k, text_v, text_lengths)
        shape = tuple(q.shape[1:-2])
    rank = len(shape)
    if not 1 <= rank <= 3:
        raise ValueError(f"q must be [batch, 1 to 3 token dims, heads, head_dim], got {tuple(q.shape)}")
    plain, settings = (kernel_size, stride, dilation, is_causal), (edge, sink, None, None, None, None)
    if any(map(is_own, (*plain, edge, sink))):
        pattern = own_patterns(rank, q.shape[-2], "head", plain, None if edge is None and sink is None else settings)
    else:
        pattern = arguments.plain_pattern(rank, *plain)
        if edge is not None or sink is not None:
            pattern += arguments.settings_pattern(rank, *settings)
    arguments.require_call(*image, pattern)
    if scale is not None:
        scale = arguments.number("scale", scale)
    keys = ops.kernel_key(rank, q, v, kernel, None, None), ops.kernel_key(1, q, v, text_kernel, None, None)
    given = {"out": out, "out_lse": out_lse, "text_out": text_out, "text_out_lse": text_out_lse}
    into: tuple[torch.Tensor, ...] = ()
    if any(tensor is not None for tensor in given.values()):
        arguments.require_tensors(**{name: tensor for name, tensor in given.items() if tensor is not None})
        into = complete_results(q, v, out, out_lse)
        if text_q is not None and text_v is not None:
            into += complete_results(text_q, text_v, text_out, text_out_lse)
    results = _run("joint" if grid is not None else "joint_apart", (*image, pattern, scale, *keys, *tensors), into)
    if grid is not None:
        return results if return_lse else results[0]
    image_out, lse, own_text_out, text_lse = results
    return (image_out, own_text_out, lse, text_lse) if return_lse else (image_out, own_text_out)


def _grid(grid: Any) -> tuple[int, ...]:
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise TypeError(f"grid must be a sequence of 1 to 3 whole numbers, got {grid!r}")
    extents = tuple(_count(f"grid along dim {d}", extent, 1) for d, extent in enumerate(grid))
    if not 1 <= len(extents) <= 3:
        raise ValueError(f"grid has {len(extents)} entries; it must have 1 to 3")
    return extents


def _count(name: str, value: Any, least: int) -> int:
    """A number of tokens, which may be a symbol while torch traces, and to torch.jit is a tensor."""
    if isinstance(value, bool) or not (isinstance(value, int | torch.SymInt) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    count: Any = value if isinstance(value, int | torch.SymInt) else operator.index(value)
    if count < least:
        raise ValueError(f"{name} is {count}; it must be at least {least}")
    return count  # type: ignore[no-any-return]


def _packed_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, ...], prefix: int, suffix: int
) -> tuple[Tensors, list[Tensors | None]]:
    """Query, key and value of the image, and of the prefix and the suffix; None where there is no such text."""
    prefix, suffix = _count("prefix", prefix, 0), _count("suffix", suffix, 0)
    image = prod(grid)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got {tuple(tensor.shape)}")
        if tensor.shape[1] != prefix + image + suffix:
            there, *extents, p, i, s = map(number_of, (tensor.shape[1], *grid, prefix, image, suffix))
            parts = f"a prefix of {p}, {i} of the grid {'x'.join(map(str, extents))} and a suffix of {s}"
            raise ValueError(f"{name} has {there} tokens, and {parts} make others")
    # One split, into what is there: its gradient is one concatenation.
    has_prefix, has_suffix = (bool(not isinstance(count, int) or count > 0) for count in (prefix, suffix))
    counts = [prefix, image, suffix][0 if has_prefix else 1 : 3 if has_suffix else 2]
    pieces = list(zip(q.split(counts, 1), k.split(counts, 1), v.split(counts, 1), strict=True))
    iq, ik, iv = pieces[1 if has_prefix else 0]
    texts = [pieces[0] if has_prefix else None, pieces[-1] if has_suffix else None]
    return (iq.unflatten(1, grid), ik.unflatten(1, grid), iv.unflatten(1, grid)), texts


def _with_lengths(texts: Sequence[Tensors | None], lengths: Any) -> tuple[torch.Tensor | None, ...]:
    """Query, key, value and lengths of the prefix and of the suffix."""
    given = [text for text in texts if text is not None]
    if lengths is None:
        pair: tuple[Any, ...] = (None, None)
    elif isinstance(lengths, torch.Tensor):
        if len(given) != 1:
            sides = "there is none" if not given else "it is on both sides of the image: give a pair of them"
            raise ValueError(f"lengths are those of text, and {sides}")
        pair = (lengths, None) if texts[0] is not None else (None, lengths)
    elif isinstance(lengths, Sequence) and len(lengths) == 2:
        pair = tuple(lengths)
        arguments.require_tensors(**{f"lengths[{i}]": x for i, x in enumerate(pair) if x is not None})
        for i, side in enumerate(("prefix", "suffix")):
            if texts[i] is None and pair[i] is not None:
                raise ValueError(f"lengths[{i}] are those of the {side}, which has no tokens")
    else:
        raise TypeError("lengths must be a tensor, or a pair for text on both sides of the image")
    return tuple(x for text, own in zip(texts, pair, strict=True) for x in (*(text or [None] * 3), own))


def _run(name: str, call: tuple[Any, ...], into: tuple[torch.Tensor, ...]) -> Any:
    """The results of an operator, once there are kernels for it; in the caller's tensors, if there are some."""
    ops.load_operators()
    entry = getattr(torch.ops.gnaforge, f"{name}_out" if into else name).default

    def call_operator(*call: Any) -> Any:
        if not into:
            return entry(*call)
        entry(*call, **dict(zip(_RESULTS, into, strict=False)))
        return into

    if is_compiling():
        return call_operator(*call)
    if is_tracing():
        finding.prepare_apart(lambda: _find_kernels(name, call))
        finding.prepare_traced_backward(name, call)
    try:
        try:
            return call_operator(*call)
        except RuntimeError as error:
            if not (sharding.register_when_imported() or core.failure_of(error).code in core.NO_KERNEL):
                raise
        _find_kernels(name, call)
        return call_operator(*call)
    except RuntimeError as error:
        if isinstance(error, NoKernelError):
            raise
        raise _error_of(error, name, call) from None


def _parts(name: str, call: tuple[Any, ...]) -> Iterator[joint_parts.Part]:
    cast = tuple(map(autocast_tensor, call))
    return (joint_parts.of_packed if name == "joint" else joint_parts.of_apart)(*cast[:4], *cast[5:])


def _find_kernels(name: str, call: tuple[Any, ...]) -> None:
    """Loads or makes what the parts of the call lack.

    Raises:
        ValueError, NoKernelError: as `joint_attention`.
    """
    for part in _parts(name, call):
        try:
            finding.prepare(part.tensors, part.pattern, call[4], part.key, part.names)
        except NoKernelError as error:
            raise NoKernelError(f"{part.name}: {error}") from None


def _error_of(error: RuntimeError, name: str, call: tuple[Any, ...]) -> Exception:
    """The error to raise for the operator's."""
    failure = core.failure_of(error)
    if failure.code == core.ErrorCode.BAD_INPUT:
        return ValueError(failure.reason)
    if failure.code == core.ErrorCode.OUT_OF_MEMORY:
        return finding.out_of_memory(failure, call[0], call[2])
    if failure.code in core.NO_KERNEL:
        return NoKernelError(failure.text)
    if failure.code == core.ErrorCode.OTHER:
        for part in _parts(name, call):
            if fault := failure_of_call(part.tensors, part.pattern, call[4], names=part.names):
                return ValueError(fault.reason)  # torch refused it first, in other words
    return error
