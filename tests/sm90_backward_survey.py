"""Random calls of sm90's backward kernels, all settings mixed, in the emulator, beside exact gradients in float64.

Use: ``python sm90_backward_survey.py COUNT [FIRST]``.

As `sm90_survey`, of which the calls are: three of four go to a kernel of dQ or of dK and dV itself, which also adds to
gradients that are there. The fourth is a user's, of heads with windows of their own that share keys, or of packed
samples, differentiated by autograd with respect to some of its tensors. Nothing here runs on hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import sm90_survey as forward
import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel
from gnaforge.verification.emulator import Emulator
from sm90_backward_kernels import KV_CONFIGS, Q_CONFIGS
from sm90_training import Kernels
from test_sm90_training import KEYS

Tensors = dict[str, torch.Tensor]

CONFIGS = [*Q_CONFIGS, *KV_CONFIGS]
DIFFERENTIABLE = ("q", "k", "v", "extra_k", "extra_v")


class Training:
    """Calls that autograd differentiates, on the kernels of one rank, in this process."""

    def __init__(self, rank: int, libraries: Mapping[KernelConfig, Path]) -> None:
        own = {config.key: str(libraries[config]) for config in map(KernelConfig.parse, KEYS[rank])}
        self._kernels = Kernels(own)
        self._forward = KernelConfig.parse(self._kernels.key("forward", rank))
        self._emulators = [Emulator(Kernel(Path(library), key), ()) for key, library in own.items()]

    def check(self, seed: int) -> str:
        """Says what is wrong of a call's gradients, if anything is."""
        rng = Random(f"survey of training {self._forward.key} {seed}")
        for emulator in self._emulators:
            emulator.start(forward.SCHEDULES[seed // 4 % 3].as_json())
        try:
            return self._heads(rng, seed) if rng.random() < 0.5 else self._samples(rng, seed)
        except Exception as error:
            return "\n".join([repr(error), *(line for one in self._emulators for line in one.messages())])

    def _heads(self, rng: Random, seed: int) -> str:
        whole, heads = forward.random_heads(rng, self._forward)
        group = whole.heads // whole.kv_heads

        def part(x: Tensors, head: int) -> Tensors:
            return forward.head_of(x, head, group)

        return self._check(rng, heads, forward.FORWARD.random_inputs(whole, seed), forward.attend_heads, part)

    def _samples(self, rng: Random, seed: int) -> str:
        samples = forward.random_samples(rng, self._forward)

        def part(x: Tensors, i: int) -> Tensors:
            return forward.sample_of(x, i, samples)

        return self._check(rng, samples, forward.inputs_of_samples(samples, seed), forward.attend_samples, part)

    def _check(
        self,
        rng: Random,
        problems: Sequence[Problem],
        x: Tensors,
        attend: Callable[[Sequence[Problem], Tensors, str], tuple[torch.Tensor, torch.Tensor]],
        part: Callable[[Tensors, int], Tensors],
    ) -> str:
        """Of a call of these problems, of which ``part`` gives the tensors of one."""
        there = [name for name in DIFFERENTIABLE if name in x]
        wanted = [name for name in there if rng.random() < 0.7] or there
        leaves = {name: x[name].clone().requires_grad_() for name in wanted}
        results = attend(problems, x | leaves, self._forward.key)
        weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(rng.getrandbits(30))) for y in results]
        weights = [weight.to(y.dtype) for weight, y in zip(weights, results, strict=True)]
        with self._kernels.pinned():
            found = dict(zip(leaves, torch.autograd.grad(results, [*leaves.values()], weights), strict=True))
        names = ("out", "lse", "grad_out", "grad_lse")
        x = x | dict(zip(names, (*(y.detach() for y in results), *weights), strict=True))
        exact, bound = sums_of_parts(problems, x, there, part)
        for name, gradient in found.items():
            error = (gradient.double() - exact[name]).abs()
            if not bool((error <= bound[name]).all()):
                share = float((error / bound[name]).nan_to_num(torch.inf).max())
                return f"the gradient of {name} takes {share:.2g} of its bound; {problems}"
        return ""


def sums_of_parts(
    problems: Sequence[Problem], x: Tensors, names: Sequence[str], part: Callable[[Tensors, int], Tensors]
) -> tuple[Tensors, Tensors]:
    """Exact gradients of a call that consists of problems, and how far kernels may be from them, which store a sum each
    time that they add to it."""
    exact, bound, largest = ({name: torch.zeros_like(x[name], dtype=torch.float64) for name in names} for _ in "012")
    unit = torch.finfo(x["q"].dtype).eps / 2
    for i, problem in enumerate(problems):
        inputs = part(x, i)
        views = [part(sums, i) for sums in (exact, bound, largest)]
        for op in (OPS["gna_backward_q"], OPS["gna_backward_kv"]):
            own = op.exact(problem, inputs)
            limits = op.bound(problem, inputs, own, rounds_probabilities=True)
            for role, gradient in own.items():
                of_exact, of_bound, of_largest = (sums[role.removeprefix("grad_")] for sums in views)
                of_exact += gradient
                of_largest += gradient.abs()
                of_bound += limits[role] + unit * of_largest
    return exact, bound


def main(count: int, first: int = 0) -> None:
    """Tries the calls of ``count`` seeds."""
    kernel_of = {seed: CONFIGS[seed // 4 % len(CONFIGS)] for seed in range(first, first + count)}
    through = {seed: 1 + seed // 4 % 3 for seed in kernel_of if seed % 4 == 3}
    further = [KernelConfig.parse(key) for rank in sorted({*through.values()}) for key in KEYS[rank]]
    libraries = find_libraries(sorted({*kernel_of.values(), *further}), emulated=True)
    training = {rank: Training(rank, libraries) for rank in {*through.values()}}
    forward.survey(kernel_of, libraries, {seed: training[rank].check for seed, rank in through.items()})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
