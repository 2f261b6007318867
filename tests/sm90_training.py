"""Gradients of what takes several calls: how far those that given kernels compute are from exact ones.

Use: ``python sm90_training.py CASES KERNELS``, in a process of its own. CASES are names with commas between them.
KERNELS are libraries by key, as JSON; operators are told which to run, since emulated ones run only when named. Calls
are users', and autograd differentiates them. Prints for each case a number of each gradient, as JSON: its largest error
by the largest element of the exact one, in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gnaforge
import torch
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.ops import load_operators
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import mask_rows
from own_patterns import own_arguments
from test_attention import exact as attend_dense
from test_joint import INT, attend_whole, whole_mask
from test_joint_backward import gradients_of

Tensors = Sequence[torch.Tensor]
Call = Callable[..., Tensors]

PINS = {"backward": (10, None), "backward_varlen": (12, 7), "attention_backward_varlen": (12, None)}
"""Of operators: the place of the first of two keys, and that of the rank, where tensors don't tell it."""
JOINT_TENSORS = 26  # and other arguments than keys, of joint_backward


class Kernels:
    """The kernels of a run, by op and rank."""

    def __init__(self, libraries: dict[str, str]) -> None:
        for library in libraries.values():
            gnaforge.load_library(library)
        self._keys = {(config.op, config.rank): config.key for config in map(KernelConfig.parse, libraries)}
        self.rank = max(rank for _, rank in self._keys)

    def key(self, op: str, rank: int) -> str:
        return self._keys[f"gna_{op}", rank]

    def _keys_of(self, rank: int) -> tuple[str, str]:
        return self.key("backward_q", rank), self.key("backward_kv", rank)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Backward operators run these kernels; a user's call names those of its forward pass alone."""
        load_operators()
        originals = {name: getattr(torch.ops.gnaforge, name) for name in (*PINS, "joint_backward")}

        def of_call(name: str, *call: Any) -> Any:
            first, place = PINS[name]
            keys = self._keys_of(call[place] if place else call[2].dim() - 3)
            return originals[name].default(*call[:first], *keys, *call[first + 2 :])

        def of_joint(*call: Any) -> Any:
            call = (*call, *[None] * JOINT_TENSORS)[:JOINT_TENSORS]
            return originals["joint_backward"].default(*call, *self._keys_of(call[0].dim() - 3), *self._keys_of(1))

        named: dict[str, Any] = {name: SimpleNamespace(default=lambda *x, n=name: of_call(n, *x)) for name in PINS}
        with patch.multiple(torch.ops.gnaforge, **named, joint_backward=SimpleNamespace(default=of_joint)):
            yield


@dataclass
class Case:
    """A user's call, the same in float64, and what they are of. Both have as many results."""

    call: Call
    exact: Call
    tensors: list[torch.Tensor]


HEADS, KV_HEADS, HEAD_DIM, BATCH = 4, 2, 64, 2


def randoms(*tokens: int, batch: int = BATCH) -> list[torch.Tensor]:
    """Q, K and V."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(batch, *tokens, count, HEAD_DIM).half() for count in heads]


def packed(kernels: Kernels) -> Case:
    """An image in a line between two texts that are padded: rows of both call kernels of one rank."""
    prefix, image, suffix, lengths = 20, 90, 150, [[20, 131], [0, 150]]
    sides = tuple(torch.tensor([pair[i] for pair in lengths], dtype=INT) for i in (0, 1))
    mask = whole_mask(Problem(image, 33, 3, 2), prefix, suffix, lengths)
    text = {"grid": (image,), "prefix": prefix, "suffix": suffix, "lengths": sides, "return_lse": True}
    pins = {"kernel": kernels.key("forward", 1), "text_kernel": kernels.key("forward", 1)}

    def call(*x: torch.Tensor) -> Any:
        return gnaforge.joint_attention(*x, kernel_size=33, stride=3, dilation=2, **text, **pins)

    return Case(call, lambda *x: attend_whole(*x, mask), randoms(prefix + image + suffix))


def apart(kernels: Kernels) -> Case:
    """An image of two dimensions and a text as tensors of their own."""
    grid, text, lengths = (9, 14), 70, [70, 13]
    count = prod(grid)
    mask = whole_mask(Problem(grid, (5, 8)), 0, text, [[0, length] for length in lengths])
    own = {"text_lengths": torch.tensor(lengths, dtype=INT), "kernel_size": (5, 8), "return_lse": True}
    pins = {"kernel": kernels.key("forward", 2), "text_kernel": kernels.key("forward", 1)}

    def exact(*tensors: torch.Tensor) -> Any:
        whole = [torch.cat([x.flatten(1, 2), y], 1) for x, y in zip(tensors[:3], tensors[3:], strict=True)]
        out, lse = attend_whole(*whole, mask)
        return out[:, :count].unflatten(1, grid), out[:, count:], lse[:, :count].unflatten(1, grid), lse[:, count:]

    return Case(lambda *x: gnaforge.joint_attention(*x, **own, **pins), exact, [*randoms(*grid), *randoms(text)])


def heads(kernels: Kernels) -> Case:
    """Windows of their own for heads that share keys, beside additional keys that all of them see."""
    rank = kernels.rank
    tokens, windows = {1: ((200,), [17, 150, 17, 64]), 2: ((11, 17), [4, 11, 4, 7]), 3: ((5, 6, 7), [2, 5, 2, 3])}[rank]
    masks = [mask_rows(Problem(tokens, window), 0, prod(tokens)) for window in windows]
    mask = torch.cat([torch.stack(masks), torch.ones(HEADS, prod(tokens), 60, dtype=torch.bool)], -1)[None]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> Any:
        given = {"additional_keys": more[0], "additional_values": more[1], "kernel": kernels.key("forward", rank)}
        return gnaforge.neighborhood_attention(q, k, v, [(w,) * rank for w in windows], **given, return_lse=True)

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> Any:
        keys, values = (torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, more[0]), (v, more[1])))
        out, lse = attend_whole(q.flatten(1, -3), keys, values, mask)
        return out.unflatten(1, tokens), lse.unflatten(1, tokens)

    return Case(call, exact, [*randoms(*tokens), *randoms(60)[1:]])


def samples(kernels: Kernels) -> Case:
    """Packed samples with layouts and windows of their own, and additional keys of each, of which some count; two
    samples share a call."""
    rank, more, lengths = kernels.rank, 70, [70, 13, 0, 70]
    large, small, other = {
        1: ((90,), (7,), (150,)),
        2: ((9, 13), (4, 3), (20, 5)),
        3: ((4, 5, 6), (2, 2, 3), (7, 3, 4)),
    }[rank]
    halves = tuple(n // 2 for n in large)
    problems = [Problem(large, halves, 2), Problem(small, 2), Problem(large, halves, 2), Problem(other, 3, causal=True)]
    layouts = [problem.tokens for problem in problems]
    operator = (gnaforge.na1d_varlen, gnaforge.na2d_varlen, gnaforge.na3d_varlen)[rank - 1]
    own = {**own_arguments(problems), "additional_lengths": torch.tensor(lengths, dtype=INT), "return_lse": True}
    counts = [prod(tokens) for tokens in layouts]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> Any:
        given = {"additional_keys": extra[0], "additional_values": extra[1], "kernel": kernels.key("forward", rank)}
        return operator(q[0], k[0], v[0], layouts, **own, **given)

    def exact(*tensors: torch.Tensor) -> Any:
        found, pieces = [], zip(*(x[0].split(counts) for x in tensors[:3]), strict=True)
        for i, ((q, k, v), problem) in enumerate(zip(pieces, problems, strict=True)):
            k, v = (torch.cat([x, y[i, : lengths[i]]])[None] for x, y in ((k, tensors[3]), (v, tensors[4])))
            mask = mask_rows(problem, 0, counts[i])
            mask = torch.cat([mask, torch.ones(counts[i], lengths[i], dtype=torch.bool)], 1)
            found.append(attend_whole(q[None], k, v, mask))
        return [torch.cat(parts, 1)[0] for parts in zip(*found, strict=True)]

    return Case(call, exact, [*randoms(sum(counts), batch=1), *randoms(more, batch=len(counts))[1:]])


def _dense(kernels: Kernels, queries: int, keys: int, is_causal: bool) -> Case:
    def call(*x: torch.Tensor) -> Any:
        return gnaforge.attention(*x, is_causal, kernel=kernels.key("forward", 1), return_lse=True)

    tensors = [*randoms(queries, batch=1)[:1], *randoms(keys, batch=1)[1:]]
    return Case(call, lambda *x: attend_dense(*x, is_causal), tensors)


def dense(kernels: Kernels) -> Case:
    """Other keys than queries."""
    return _dense(kernels, 150, 210, False)


def dense_causal(kernels: Kernels) -> Case:
    """Queries behind the last key see all, which are a call of their own."""
    return _dense(kernels, 210, 150, True)


def dense_packed(kernels: Kernels) -> Case:
    """Samples with more queries than keys and the other way round, without queries, and without keys."""
    of_q, of_kv = [60, 0, 140, 5, 33], [140, 9, 60, 0, 33]
    ends = {f"cumulative_seqlen_{name}": torch.tensor([0, *n]).cumsum(0) for name, n in (("Q", of_q), ("KV", of_kv))}

    def call(*x: torch.Tensor) -> Any:
        pins = {"kernel": kernels.key("forward", 1), "return_lse": True}
        out, lse = gnaforge.attention(*x, True, **ends, **pins)
        return out, torch.where(lse.isneginf(), 0, lse)

    def exact(*x: torch.Tensor) -> Any:
        found = []
        for q, k, v in zip(*(y.split(n, 1) for y, n in zip(x, (of_q, of_kv, of_kv), strict=True)), strict=True):
            zeros = torch.zeros_like(q)  # of a sample without keys, as its log-sum-exp is taken above
            found.append(attend_dense(q, k, v, True) if k.shape[1] else (zeros, zeros[..., 0]))
        return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]

    return Case(call, exact, [*randoms(sum(of_q), batch=1)[:1], *randoms(sum(of_kv), batch=1)[1:]])


def merged(kernels: Kernels) -> Case:
    """A window and a text, of which each has its own softmax: gradients of log-sum-exps count."""
    rank = kernels.rank
    tokens = {1: (200,), 2: (11, 17), 3: (5, 6, 7)}[rank]
    window = tuple(n // 2 for n in tokens)
    mask = mask_rows(Problem(tokens, window), 0, prod(tokens))
    mask = torch.cat([mask, torch.ones(prod(tokens), 70, dtype=torch.bool)], 1)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more_k: torch.Tensor, more_v: torch.Tensor) -> Any:
        near = gnaforge.neighborhood_attention(q, k, v, window, kernel=kernels.key("forward", rank), return_lse=True)
        of_text = {"kernel": kernels.key("forward", 1), "return_lse": True}
        text = gnaforge.attention(q.flatten(1, -3), more_k, more_v, **of_text)
        pairs = zip((x.flatten(1, rank) for x in near), text, strict=True)
        return gnaforge.merge_attentions(*map(list, pairs))

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more_k: torch.Tensor, more_v: torch.Tensor) -> Any:
        keys, values = (torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, more_k), (v, more_v)))
        return attend_whole(q.flatten(1, -3), keys, values, mask)

    return Case(call, exact, [*randoms(*tokens), *randoms(70)[1:]])


CASES = {case.__name__: case for case in (packed, apart, heads, samples, dense, dense_causal, dense_packed, merged)}


def errors(found: Tensors, wanted: Tensors) -> list[float]:
    """Each one's largest, by the largest element of what is wanted."""
    pairs = zip(found, wanted, strict=True)
    return [float((x.double() - y.double()).abs().max() / y.double().abs().max()) for x, y in pairs]


def errors_of(case: Case, kernels: Kernels) -> list[float]:
    """Errors of the case's gradients, which are the same twice."""
    wide = [x.double() for x in case.tensors]
    weights = [torch.randn(result.shape) for result in case.exact(*wide)]
    with kernels.pinned():
        found, again = (gradients_of(case.call, case.tensors, weights) for _ in range(2))
    assert all(map(torch.equal, found, again))
    return errors(found, gradients_of(case.exact, wide, weights))


def main(names: str, libraries: str) -> None:
    """Runs some of the cases above."""
    torch.manual_seed(0)
    kernels = Kernels(json.loads(libraries))
    print(json.dumps({name: errors_of(CASES[name](kernels), kernels) for name in names.split(",")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
