"""Random calls of sm90's first family, all settings mixed, in the emulator, beside exact attention in float64.

Use: ``python sm90_survey.py COUNT [FIRST]``.

Of a seed the call is always the same one. Three of four go to the kernel itself: edges, frames, sinks, ranges, cross
attention, two pieces of extra keys with lengths, dilation; under three schedules, in other layouts, with NaN where it
must not matter, as a list behind the call before, and with KV tiles counted. The fourth goes through the operators:
heads with windows of their own, or samples of a packed batch, with and without extra keys. Prints what is wrong, and a
summary; exits with 1 if something is. Nothing here runs on hardware.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

os.environ.update(GNAFORGE_EMULATOR_MEMORY="mapped", GNAFORGE_EMULATOR_PROCESSORS="3", OMP_NUM_THREADS="1")

import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.runtime import core
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.ops import neighborhood_attention
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.varlen import na1d_varlen, na2d_varlen, na3d_varlen
from gnaforge.verification.contract import Kernel
from gnaforge.verification.emulator import Emulator
from gnaforge.verification.problems import for_kernel, random_problem, shrink, with_settings
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from own_patterns import own_arguments, random_pattern
from sm90_kernels import CONFIGS

SCHEDULES = [Schedule("eager", "round-robin"), Schedule("lazy", "depth-first"), Schedule("random", "random")]
FEATURES = ("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys")
MOST_TOKENS = {1: 500, 2: 900, 3: 1500}
VARLEN = {1: na1d_varlen, 2: na2d_varlen, 3: na3d_varlen}

Tensors = dict[str, torch.Tensor]


def random_call(config: KernelConfig, seed: int) -> Problem:
    """A problem of a kernel with settings of all kinds, small enough for the emulator."""
    rng = Random(f"survey {config.key} {seed}")
    problem = with_settings(random_problem(rng, config.rank), rng, MOST_TOKENS[config.rank], FEATURES)
    problem = shrink(for_kernel(problem, config), config)
    return replace(problem, scale=8 * problem.score_scale) if rng.random() < 0.3 else problem


class Operators:
    """The operators on one kernel, in this process."""

    def __init__(self, config: KernelConfig, library: Path) -> None:
        self.config, self._kernel = config, Kernel(library, config.key)
        core.load_library(library)
        self._emulator = Emulator(self._kernel, ())

    def check(self, seed: int) -> str:
        """Says what is wrong of a call, if anything is."""
        rng = Random(f"survey of operators {self.config.key} {seed}")
        self._emulator.start(SCHEDULES[seed // 4 % 3].as_json())
        try:
            parts = self._heads(rng, seed) if rng.random() < 0.5 else self._samples(rng, seed)
            return "\n".join(filter(None, (_wrong(*part) for part in parts)))
        except Exception as error:
            return "\n".join([repr(error), *self._emulator.messages()])

    def _tensors(self, problem: Problem, seed: int) -> Tensors:
        return FORWARD.random_inputs(for_kernel(problem, self.config), seed)

    def _heads(self, rng: Random, seed: int) -> Iterator[tuple[str, Problem, Tensors]]:
        """Heads with patterns of their own, and extra keys at times."""
        tokens = [rng.randint(1, {1: 150, 2: 16, 3: 7}[self.config.rank]) for _ in range(self.config.rank)]
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2))
        heads: list[Problem] = []
        while len(heads) < kv_heads * group:
            heads += [random_pattern(rng, tokens, plain=rng.random() < 0.3)] * rng.randint(1, 3)
        heads = heads[: kv_heads * group]
        extra = (rng.randint(1, 130),) if rng.random() < 0.5 else ()
        batch = rng.randint(1, 2)
        whole = replace(heads[0], batch=batch, heads=len(heads), kv_heads=kv_heads, extra_tokens=extra)
        x = self._tensors(whole, seed)
        call, further = (x["q"], x["k"], x["v"]), {**own_arguments(heads), **further_arguments(x)}
        out, lse = neighborhood_attention(*call, **further, return_lse=True, kernel=self.config.key)
        for head, problem in enumerate(heads):
            own = for_kernel(replace(problem, batch=batch, heads=1, kv_heads=1, extra_tokens=extra), self.config)
            shared = slice(head // group, head // group + 1)
            tensors = {name: y[..., shared, :] for name, y in x.items() if name not in ("q", "extra_lengths")}
            tensors |= {name: x[name] for name in ("extra_lengths",) if name in x}
            tensors |= {"q": x["q"][..., head : head + 1, :], "out": out[..., head : head + 1, :]}
            yield f"head {head}", own, {**tensors, "lse": lse[..., head : head + 1]}

    def _samples(self, rng: Random, seed: int) -> Iterator[tuple[str, Problem, Tensors]]:
        """Samples of a packed batch with layouts and patterns of their own."""
        rank, samples = self.config.rank, []
        for _ in range(rng.randint(1, 4)):
            tokens = [rng.randint(1, {1: 120, 2: 13, 3: 6}[rank]) for _ in range(rank)]
            samples.append(random_pattern(rng, tokens, plain=rng.random() < 0.3))
        kv_heads = rng.choice((1, 2))
        heads = kv_heads * rng.choice((1, 2))
        counts = [problem.token_count for problem in samples]
        extra = (rng.randint(1, 130),) if rng.random() < 0.5 else ()
        line = Problem((sum(counts),), (1,), heads=heads, kv_heads=kv_heads)
        x = {name: y[0] for name, y in self._tensors(line, seed).items()}
        rows = self._tensors(replace(line, batch=len(samples), extra_tokens=extra), seed)
        rows = {name: y for name, y in rows.items() if name.startswith("extra")}
        call = *x.values(), [problem.tokens for problem in samples]
        further = {**own_arguments(samples), **further_arguments(rows)}
        x["out"], x["lse"] = VARLEN[rank](*call, **further, return_lse=True, kernel=self.config.key)
        parts = {name: y.split(counts) for name, y in x.items()}
        for i, problem in enumerate(samples):
            own = for_kernel(replace(problem, heads=heads, kv_heads=kv_heads, extra_tokens=extra), self.config)
            tensors = {name: part[i].unflatten(0, problem.tokens)[None] for name, part in parts.items()}
            yield f"sample {i}", own, tensors | {name: y[i : i + 1] for name, y in rows.items()}


def further_arguments(tensors: Tensors) -> dict[str, Any]:
    """Extra keys as the operators take them, if there are some."""
    names = {"extra_k": "additional_keys", "extra_v": "additional_values", "extra_lengths": "additional_lengths"}
    return {given: tensors[name] for name, given in names.items() if name in tensors}


def _wrong(name: str, problem: Problem, tensors: Tensors) -> str:
    exact = FORWARD.exact(problem, tensors)
    bounds = FORWARD.bound(problem, tensors, exact, rounds_probabilities=True)
    for role, wanted in exact.items():
        error = (tensors[role].double() - wanted).abs()
        if not bool((error <= bounds[role]).all()):
            return f"{name}, {problem}: {role} is off by {float(error.max()):.2g}"
    return ""


def main(count: int, first: int = 0) -> None:
    """Tries the calls of ``count`` seeds."""
    kernel_of = {seed: CONFIGS[seed // 4 % len(CONFIGS)] for seed in range(first, first + count)}
    libraries = find_libraries(sorted(set(kernel_of.values())), emulated=True)
    verifiers = {config: Verifier(config, library, Settings(SCHEDULES)) for config, library in libraries.items()}
    operators = {config: Operators(config, library) for config, library in libraries.items()}
    met, wrong, runs, start = Counter[str](), 0, 0, time.monotonic()
    for seed, config in kernel_of.items():
        if seed % 4 == 3:
            said, runs = operators[config].check(seed), runs + 1
            met["through the operators"] += 1
        else:
            problem = random_call(config, seed)
            found = verifiers[config].verify(problem)
            said, runs = found.message if found.failed else "", runs + found.runs
            met.update(_kinds(problem))
        if said:
            wrong += 1
            print(f"seed {seed}, {config.key}: {said}", flush=True)
        if sys.stderr.isatty() or seed % 20 == 19:
            print(f"{seed + 1 - first} calls, {wrong} wrong, {time.monotonic() - start:.0f} s", file=sys.stderr)
    for verifier in verifiers.values():
        verifier.close()
    print(f"{count} calls, {wrong} wrong, {runs} runs; " + ", ".join(f"{n} {kind}" for kind, n in sorted(met.items())))
    sys.exit(wrong > 0)


def _kinds(problem: Problem) -> Sequence[str]:
    """What is met of the settings."""
    axes = problem.dimensions
    kinds = {
        "cut": any(axis.edge == "cut" for axis in axes),
        "wrap": any(axis.edge == "wrap" for axis in axes),
        "token causal": any(axis.causal in (True, "token") for axis in axes),
        "negative offset": any(axis.kv_offset < 0 for axis in axes),
        "cross attention": any(axis.dense and axis.tokens != axis.keys for axis in axes),
        "dilation": max(problem.dilation) > 1,
        "two pieces": len(problem.extra_tokens) == 2,
    }
    return [*problem.features(), *(kind for kind, there in kinds.items() if there)]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
