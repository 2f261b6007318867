"""Checks of a kernel as callers run it: through torch's operators and the core, on streams, in graphs, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..runtime import core
from ..runtime.op_table import FORWARD
from ..runtime.ops import neighborhood_attention
from ..runtime.problem import Problem
from .checks import Failure
from .contract import Kernel
from .problems import for_kernel

Json = dict[str, Any]
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_WINDOW = 5
_TOKENS: Mapping[int, tuple[int, ...]] = {1: (300,), 2: (20, 18), 3: (8, 9, 10)}


class Skipped(Exception):
    """A job that this machine can't do; says why."""


def _operands(library: Path, kernel: Kernel, seed: int = 0) -> tuple[Problem, Operands, Attend]:
    """A small problem with two heads of K and V, inputs, and the operator with this kernel pinned."""
    core.load_library(library)
    if kernel.op is not FORWARD:
        raise Skipped(f"there is no operator for {kernel.op.name} alone")
    heads = 2 * kernel.config.q_tile_heads
    problem = for_kernel(Problem(_TOKENS[kernel.config.rank], _WINDOW, heads=heads, kv_heads=2), kernel.config)
    q, k, v = FORWARD.random_inputs(problem, seed, kernel.tensor_device).values()
    key = kernel.config.key

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = neighborhood_attention(q, k, v, _WINDOW, return_lse=True, kernel=key)
        return out, lse

    return problem, (q, k, v), attend


def _need_gpu(kernel: Kernel) -> None:
    if kernel.device != "cuda":
        raise Skipped("needs a GPU")


def _require_equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], otherwise: str) -> None:
    if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True)):
        raise Failure("operator", otherwise)


def result(library: Path, kernel: Kernel) -> Json:
    """The operator gives what the kernel gives; without a name, a kernel is found as well."""
    problem, tensors, attend = _operands(library, kernel)
    inputs = dict(zip((role.name for role in FORWARD.inputs), tensors, strict=True))
    exact = FORWARD.exact(problem, inputs)
    bounds = FORWARD.bound(problem, inputs, exact, rounds_probabilities=kernel.device != "cpu")
    shares = {}
    for role, got in zip(FORWARD.outputs, attend(*tensors), strict=True):
        shares[role.name] = float(((got.double() - exact[role.name]).abs() / bounds[role.name]).max())
        if not shares[role.name] <= 1:
            raise Failure("operator", f"the error of {role.title} takes {shares[role.name]:.3g} of its bound")
    if kernel.device == "cuda":
        chosen = neighborhood_attention(*tensors, _WINDOW)
        if not chosen.isfinite().all():
            raise Failure("operator", "the kernel that dispatch chose gives no finite numbers")
    return {"shares": shares}


def stream(library: Path, kernel: Kernel) -> Json:
    """The kernel runs on the current stream: after what is queued there before it, on which its input depends."""
    _need_gpu(kernel)
    _, tensors, attend = _operands(library, kernel)
    want = attend(*tensors)
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for to, x in zip(late, tensors, strict=True):
            to.copy_(x)
        got = attend(*late)
    pending = not other.query()
    other.synchronize()
    if not pending:
        raise Failure("operator", "the call waited for the GPU")
    _require_equal(got, want, "the kernel did not wait for its inputs")
    return {}


def other_device(library: Path, kernel: Kernel) -> Json:
    """Tensors of a GPU that is not the current one."""
    _need_gpu(kernel)
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    _, tensors, attend = _operands(library, kernel)
    want = attend(*tensors)
    got = attend(*(x.to("cuda:1") for x in tensors))
    if torch.cuda.current_device() != 0:
        raise Failure("operator", "another device stays the current one")
    _require_equal(got, want, "another device gives another result")
    return {}


def graph(library: Path, kernel: Kernel) -> Json:
    """Captured once, replayed on other inputs."""
    _need_gpu(kernel)
    _, tensors, attend = _operands(library, kernel)
    attend(*tensors)
    torch.cuda.synchronize()
    captured_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured_graph):
        captured = attend(*tensors)
    for seed in (1, 2):
        _, others, _ = _operands(library, kernel, seed)
        want = attend(*others)
        for to, x in zip(tensors, others, strict=True):
            to.copy_(x)
        captured_graph.replay()
        torch.cuda.synchronize()
        _require_equal(captured, want, "a replay differs from a call")
    return {}


def compilation(library: Path, kernel: Kernel) -> Json:
    """torch.compile(fullgraph=True) changes nothing."""
    _, tensors, attend = _operands(library, kernel)
    want = attend(*tensors)
    _require_equal(torch.compile(attend, fullgraph=True)(*tensors), want, "compiled, the result differs")
    return {}


def _odd_layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the same shape that lie as tensor maps can't show them, or as kernels don't take them."""
    misplaced = x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    gaps = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))[..., : x.shape[-1]].copy_(x)
    return {
        "at an odd address": misplaced,
        "with odd gaps": gaps,
        "with channels apart": x.mT.contiguous().mT,
        "of one token": x[:, :1].expand_as(x),
        "of one head": x[..., :1, :].expand_as(x),
        "of one batch entry": x[:1].expand_as(x),
    }


def layouts(library: Path, kernel: Kernel) -> Json:
    """However an input lies, and where K and V are one head's, the result is that of contiguous tensors."""
    _, tensors, attend = _operands(library, kernel)
    whole = [torch.cat([x, x.flip(1)]) for x in tensors]
    names = list(_odd_layouts(whole[0]))
    calls = {f"{FORWARD.inputs[i % 3].title} {name}": {i % 3: name} for i, name in enumerate(names)}
    calls |= {f"keys and values {name}": {1: name, 2: name} for name in ("of one head", "of one batch entry")}
    for title, odd in calls.items():
        given = [_odd_layouts(x)[odd[i]] if i in odd else x for i, x in enumerate(whole)]
        want = attend(*(x.contiguous() for x in given))
        _require_equal(attend(*given), want, f"{title}: the result differs from that of contiguous tensors")
    return {"calls": len(calls)}


OPERATOR_JOBS: dict[str, Callable[[Path, Kernel], Json]] = {
    "result": result,
    "stream": stream,
    "other device": other_device,
    "graph": graph,
    "compiled": compilation,
    "layouts": layouts,
}
"""Checks by name; they raise `Failure`, and `Skipped` where this machine can't do them."""
