"""The parts of the operators that live in Python: what they do where torch traces, differentiates or transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import jit, joint_parts, lookup, table
from .autocast import register_autocast
from .backward_parts import register_backward_parts
from .batching import register_batching
from .errors import NoKernelError
from .given import failure_of_call
from .gradients import register_autograd
from .list_parts import register_list_parts
from .request import Request, is_zero, request_of
from .scaled import forward_scaled_fake, refuse_batching


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check((q, k, v, extra_k, extra_v, extra_lengths), pattern, scale, key)
    return _results(q, v)


def _forward_out_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    *,
    output: torch.Tensor,  # torch.compile takes no strided tensor of an argument that is called out
    output_lse: torch.Tensor,
) -> None:
    _check((q, k, v, extra_k, extra_v, extra_lengths, None, None, None, output, output_lse), pattern, scale, key)


def _joint_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    text_key: str = "",
    *texts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_parts(joint_parts.of_packed(q, k, v, pattern, key, text_key, *texts), scale)
    rows = q.flatten(1, -3).shape[1] + sum(text.shape[1] for text in texts[::4] if text is not None)
    return _results(q.new_empty((q.shape[0], rows, q.shape[-2], 1)), v)


def _joint_apart_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    key: str,
    text_key: str,
    *text: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    _check_parts(joint_parts.of_apart(q, k, v, pattern, key, text_key, *text), scale)
    return (*_results(q, v), *_results(text[0], v))


def _joint_out_fake(*arguments: Any, output: torch.Tensor, output_lse: torch.Tensor) -> None:
    _check_results(_joint_fake(*arguments)[0], output, output_lse)


def _joint_apart_out_fake(
    *arguments: Any,
    output: torch.Tensor,
    output_lse: torch.Tensor,
    output_text: torch.Tensor,
    output_text_lse: torch.Tensor,
) -> None:
    wanted, _, text_wanted, _ = _joint_apart_fake(*arguments)
    _check_results(wanted, output, output_lse)
    _check_results(text_wanted, output_text, output_text_lse, "text_out", "text_out_lse")


def _check_results(
    wanted: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, name: str = "out", lse_name: str = "out_lse"
) -> None:
    """Refuses tensors that can't take a result like ``wanted`` and its log-sum-exp: of any call with such a result, as
    one that sees a single key."""
    rank = wanted.dim() - 3
    query = wanted.new_empty((*wanted.shape[:-1], 8))
    key, value = (wanted.new_empty((wanted.shape[0], *[1] * rank, wanted.shape[-2], c)) for c in (8, wanted.shape[-1]))
    tensors = (query, key, value, *[None] * 6, out, lse)
    names = ("query", "key", "value", *[""] * 6, name, lse_name)
    if failure := failure_of_call(tensors, [*[1] * 3 * rank, *[0] * rank], names=names):
        raise ValueError(failure.reason)


def _results(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _check_parts(parts: Iterable[joint_parts.Part], scale: float | None) -> None:
    for part in parts:
        _check(part.tensors, part.pattern, scale, part.key, part.names)


def _check(
    tensors: Sequence[torch.Tensor | None],
    pattern: Sequence[int],
    scale: float | None,
    key: str,
    names: Sequence[str] = (),
) -> None:
    """Refuses what a forward call with these tensors would refuse; `given.failure_of_call` describes them."""
    if failure := failure_of_call(tensors, pattern, scale, key, names=names):
        raise ValueError(failure.reason)
    q, k, v = tensors[:3]
    assert q is not None and k is not None and v is not None
    if q.device.type in ("cpu", "cuda") and not any(map(is_zero, q.shape[:-1])):
        _require_kernel(request_of(q, k, v, pattern, key, *tensors[3:9:3]), tensors, pattern, scale)


def _require_kernel(
    request: Request, tensors: Sequence[torch.Tensor | None], pattern: Sequence[int], scale: float | None
) -> None:
    """A compiled graph calls the operator without Python: what it needs is loaded now, and must be there already.

    Raises:
        NoKernelError: it isn't.
    """
    lookup.load_matching(request)
    failure = failure_of_call(tensors, pattern, scale, request.key, choose=True)
    if failure is None and table.serves(request):  # where a size isn't known, the core isn't asked
        return
    lookup.remedy(request)  # raises what is more to the point than that none is loaded, if there is something
    if failure is not None:
        raise NoKernelError(f"{failure.whole}\n{jit.TRACING}")
    wanted, call = request.key or str(request), request.register_call()
    raise NoKernelError(f"gnaforge: no kernel for {wanted} is loaded\nregister one with: {call}\n{jit.TRACING}")


_library: torch.library.Library | None = None  # what it registered ends with it


def register_python_parts() -> None:
    """Registers fakes, autograd, autocast and vmap; called once per process, when the core has registered itself."""
    global _library
    _library = torch.library.Library("gnaforge", "IMPL")
    fakes: dict[str, Callable[..., Any]] = {
        "forward": _forward_fake,
        "forward_no_grad": _forward_fake,  # which is forward without its autograd formula: that costs time at each call
        "forward_out": _forward_out_fake,
        "joint": _joint_fake,
        "joint_out": _joint_out_fake,
        "joint_apart": _joint_apart_fake,
        "joint_apart_out": _joint_apart_out_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"gnaforge::{name}", fake, lib=_library)
        register_autocast(name, _library)
        register_batching(name, _library)
    torch.library.register_fake("gnaforge::forward_scaled_out", forward_scaled_fake, lib=_library)
    _library.impl("forward_scaled_out", refuse_batching, "FuncTorchBatched")
    register_list_parts(_library)
    register_backward_parts(_library)
    register_autograd(_library)
