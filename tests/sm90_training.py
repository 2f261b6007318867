"""Gradients of what takes several calls: how far those that given kernels compute are from exact ones.

Use: ``python sm90_training.py CASE KERNELS``, in a process of its own. KERNELS are libraries by key, as JSON; operators
are told which to run, since emulated ones run only when named. Prints a number for each gradient, as JSON: its largest
error by the largest element of the exact one, in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gnaforge
import torch
from gnaforge.runtime import joint
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.formulas import FORMULAS
from gnaforge.runtime.own_patterns import own_patterns
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import mask_rows
from test_joint import INT, attend_whole, whole_mask
from test_joint_backward import gradients_of

Tensors = Sequence[torch.Tensor]


@dataclass
class Case:
    """An operator's call and the same in float64.

    Attributes:
        formula: the operator's gradients.
        inputs: its arguments.
        results: what it gave.
        exact: results in float64, of ``tensors``.
        tensors: what the call is of.
        weights: of the results.
        whole: gradients of ``tensors``, of the formula's.
    """

    formula: str
    inputs: tuple[Any, ...]
    results: Tensors
    exact: Callable[..., Any]
    tensors: list[torch.Tensor]
    weights: list[torch.Tensor]
    whole: Callable[[Tensors], Tensors] = list


class Kernels:
    """The kernels of a run, by op and rank."""

    def __init__(self, libraries: dict[str, str]) -> None:
        for library in libraries.values():
            gnaforge.load_library(library)
        self._keys = {(config.op, config.rank): config.key for config in map(KernelConfig.parse, libraries)}

    def key(self, op: str, rank: int) -> str:
        return self._keys[f"gna_{op}", rank]

    def joint_attention(self, rank: int, *tensors: torch.Tensor, **arguments: Any) -> tuple[tuple[Any, ...], Tensors]:
        """The arguments and results of its operator."""
        calls = []

        def run(name: str, call: tuple[Any, ...], into: tuple[torch.Tensor, ...]) -> Any:
            calls.append(call)
            return original(name, call, into)

        original, pins = joint._run, {"kernel": self.key("forward", rank), "text_kernel": self.key("forward", 1)}
        with patch.object(joint, "_run", run):
            results = gnaforge.joint_attention(*tensors, return_lse=True, **pins, **arguments)
        return calls[0], results

    def gradients(self, case: Case, rank: int) -> Tensors:
        """What the formula gives on these kernels."""
        backward, joint_backward = torch.ops.gnaforge.backward, torch.ops.gnaforge.joint_backward
        keys, texts = ((self.key("backward_q", of), self.key("backward_kv", of)) for of in (rank, 1))

        def of_call(*call: Any) -> Any:
            return backward.default(*call[:10], *keys, *call[12:])

        def of_parts(*call: Any) -> Any:
            tensors = [*call[:26], *[None] * (26 - len(call))]
            return joint_backward.default(*tensors, *keys, *texts)

        formula = FORMULAS[case.formula]
        named = {"backward": of_call, "joint_backward": of_parts}
        with patch.multiple(torch.ops.gnaforge, **{name: SimpleNamespace(default=of) for name, of in named.items()}):
            wanted = (1 << len(formula.differentiable)) - 1
            weights = [w.to(result.dtype) for w, result in zip(case.weights, case.results, strict=True)]
            return case.whole(formula.backward(case.inputs, case.results, weights, wanted))


HEADS, KV_HEADS, HEAD_DIM, BATCH = 4, 2, 64, 2


def randoms(*tokens: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """Q, K and V."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(BATCH, *tokens, count, HEAD_DIM).to(dtype) for count in heads]


def weights(*tokens: int) -> list[torch.Tensor]:
    """Of an output and its log-sum-exp."""
    return [torch.randn(BATCH, *tokens, HEADS, HEAD_DIM), torch.randn(BATCH, *tokens, HEADS)]


def packed(kernels: Kernels) -> Case:
    """An image in a line between two texts that are padded: rows of both call kernels of one rank."""
    prefix, image, suffix, lengths = 20, 90, 150, [[20, 131], [0, 150]]
    total = prefix + image + suffix
    sides = tuple(torch.tensor([pair[i] for pair in lengths], dtype=INT) for i in (0, 1))
    mask = whole_mask(Problem(image, 33, 3, 2), prefix, suffix, lengths)
    tensors, text = randoms(total), {"grid": (image,), "prefix": prefix, "suffix": suffix, "lengths": sides}
    inputs, results = kernels.joint_attention(1, *tensors, kernel_size=33, stride=3, dilation=2, **text)

    def whole(found: Tensors) -> Tensors:
        return [torch.cat([found[3 + i], found[i], found[6 + i]], 1) for i in range(3)]

    return Case("joint", inputs, results, lambda *x: attend_whole(*x, mask), tensors, weights(total), whole)


def apart(kernels: Kernels) -> Case:
    """An image of two dimensions and a text as tensors of their own."""
    grid, text, lengths = (9, 14), 70, [70, 13]
    count = grid[0] * grid[1]
    mask = whole_mask(Problem(grid, (5, 8)), 0, text, [[0, length] for length in lengths])
    tensors = [*randoms(*grid), *randoms(text)]
    own = {"text_lengths": torch.tensor(lengths, dtype=INT), "kernel_size": (5, 8)}
    inputs, results = kernels.joint_attention(2, *tensors, **own)

    def exact(*tensors: torch.Tensor) -> Any:
        whole = [torch.cat([x.flatten(1, 2), y], 1) for x, y in zip(tensors[:3], tensors[3:], strict=True)]
        out, lse = attend_whole(*whole, mask)
        return out[:, :count].unflatten(1, grid), lse[:, :count].unflatten(1, grid), out[:, count:], lse[:, count:]

    (out, lse), (text_out, text_lse) = weights(*grid), weights(text)
    found = [results[i] for i in (0, 2, 1, 3)]  # of the operator, which has an output and its log-sum-exp together
    return Case("joint_apart", inputs, found, exact, tensors, [out, lse, text_out, text_lse])


def heads(kernels: Kernels) -> Case:
    """Windows of their own for heads that share keys, beside additional keys that all of them see."""
    tokens, more, windows = 200, 60, [[17], [150], [17], [64]]
    masks = [mask_rows(Problem(tokens, *window), 0, tokens) for window in windows]
    mask = torch.cat([torch.stack(masks), torch.ones(HEADS, tokens, more, dtype=torch.bool)], -1)[None]
    tensors = [*randoms(tokens), *randoms(more)[1:]]
    pattern = own_patterns(1, HEADS, "head", (windows, 1, 1, False), None)
    inputs = (*tensors[:3], pattern, None, kernels.key("forward", 1), *tensors[3:], None)
    results = torch.ops.gnaforge.forward_no_grad.default(*inputs)

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more_k: torch.Tensor, more_v: torch.Tensor) -> Any:
        return attend_whole(q, torch.cat([k, more_k], 1), torch.cat([v, more_v], 1), mask)

    return Case("forward", inputs, results, exact, tensors, weights(tokens))


def errors(found: Tensors, wanted: Tensors) -> list[float]:
    """Each one's largest, by the largest element of what is wanted."""
    pairs = zip(found, wanted, strict=True)
    return [float((x.double() - y.double()).abs().max() / y.double().abs().max()) for x, y in pairs]


def main(name: str, libraries: str) -> None:
    """Runs one of the cases above."""
    torch.manual_seed(0)
    kernels = Kernels(json.loads(libraries))
    with torch.no_grad():
        case = {"packed": packed, "apart": apart, "heads": heads}[name](kernels)
        found, again = (kernels.gradients(case, 2 if name == "apart" else 1) for _ in range(2))
    assert all(map(torch.equal, found, again))
    print(json.dumps(errors(found, gradients_of(case.exact, [x.double() for x in case.tensors], case.weights))))


if __name__ == "__main__":
    main(*sys.argv[1:])
