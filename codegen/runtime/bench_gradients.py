"""Contenders of `bench` with their backward pass: forward and backward together, or backward alone."""

from __future__ import annotations

import torch

from .bench_contenders import HEADS_FIRST, Call, Tensors
from .config import Direction
from .problem import Problem


def work_of(problem: Problem, direction: Direction) -> float:
    """Floating-point operations per pair of a query and a key that the passes need: two matrix products forward, five
    backward, which is what fused kernels compute and published figures count. Ours compute seven."""
    both = problem.head_dim + problem.value_head_dim
    products = {"forward": both, "backward": 2 * both + problem.head_dim, "training": 3 * both + problem.head_dim}
    return 2.0 * problem.batch * problem.heads * products[direction]


def with_gradients(sets: list[Tensors]) -> list[Tensors]:
    """Inputs that gradients are wanted of."""
    return [tuple(tensor.requires_grad_() for tensor in tensors) for tensors in sets]


def with_backward_pass(name: str, problem: Problem, call: Call, direction: Direction) -> Call:
    """A contender's call with its backward pass, or that alone, from the same random gradient of the output. Returns
    the gradient of Q, heads last."""
    outputs: dict[int, torch.Tensor] = {}  # whose graphs are kept, where backward alone is timed
    gradients: list[torch.Tensor] = []

    def run(tensors: Tensors) -> torch.Tensor:
        kept = direction == "backward"
        out = outputs[id(tensors)] if id(tensors) in outputs else call(tensors)
        if kept:
            outputs[id(tensors)] = out
        if not gradients:
            generator = torch.Generator(out.device).manual_seed(0)
            gradients.append(torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype))
        found = torch.autograd.grad(out, tensors, gradients[0], retain_graph=kept)[0]
        return found.transpose(1, 2).unflatten(1, problem.tokens) if name in HEADS_FIRST else found

    return run
