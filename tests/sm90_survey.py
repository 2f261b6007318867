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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def _heads(self, rng: Random, seed: int) -> Iterator[tuple[str, Problem, Tensors]]:
        whole, heads = random_heads(rng, self.config)
        x = FORWARD.random_inputs(whole, seed)
        x["out"], x["lse"] = attend_heads(heads, x, self.config.key)
        for head, problem in enumerate(heads):
            yield f"head {head}", problem, head_of(x, head, whole.heads // whole.kv_heads)

    def _samples(self, rng: Random, seed: int) -> Iterator[tuple[str, Problem, Tensors]]:
        samples = random_samples(rng, self.config)
        x = inputs_of_samples(samples, seed)
        x["out"], x["lse"] = attend_samples(samples, x, self.config.key)
        for i, problem in enumerate(samples):
            yield f"sample {i}", problem, sample_of(x, i, samples)


def random_heads(rng: Random, config: KernelConfig) -> tuple[Problem, list[Problem]]:
    """A problem of some heads, and for each of them one with a pattern of its own, and extra keys at times."""
    tokens = [rng.randint(1, {1: 150, 2: 16, 3: 7}[config.rank]) for _ in range(config.rank)]
    kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2))
    heads: list[Problem] = []
    while len(heads) < kv_heads * group:
        heads += [random_pattern(rng, tokens, plain=rng.random() < 0.3)] * rng.randint(1, 3)
    heads = heads[: kv_heads * group]
    extra = (rng.randint(1, 130),) if rng.random() < 0.5 else ()
    batch = rng.randint(1, 2)
    heads = [for_kernel(replace(head, batch=batch, extra_tokens=extra), config) for head in heads]
    return replace(heads[0], heads=len(heads), kv_heads=kv_heads), heads


def attend_heads(heads: Sequence[Problem], x: Tensors, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's results, of tensors by role, on a kernel."""
    further = {**own_arguments(heads), **further_arguments(x)}
    out, lse = neighborhood_attention(x["q"], x["k"], x["v"], **further, return_lse=True, kernel=key)
    return out, lse


def head_of(x: Tensors, head: int, group: int) -> Tensors:
    """Of tensors by role those of one head, as views."""
    found = {}
    for name, y in x.items():
        at = head // group if name in ("k", "v") or name.startswith("extra") else head
        found[name] = y if name == "extra_lengths" else y.narrow(-1 if name.endswith("lse") else -2, at, 1)
    return found


def random_samples(rng: Random, config: KernelConfig) -> list[Problem]:
    """Samples of a packed batch with layouts and patterns of their own, and extra keys at times."""
    rank, samples = config.rank, []
    for _ in range(rng.randint(1, 4)):
        tokens = [rng.randint(1, {1: 120, 2: 13, 3: 6}[rank]) for _ in range(rank)]
        samples.append(random_pattern(rng, tokens, plain=rng.random() < 0.3))
    kv_heads = rng.choice((1, 2))
    heads = kv_heads * rng.choice((1, 2))
    extra = (rng.randint(1, 130),) if rng.random() < 0.5 else ()
    shared = {"heads": heads, "kv_heads": kv_heads, "extra_tokens": extra}
    return [for_kernel(replace(sample, **shared), config) for sample in samples]


def inputs_of_samples(samples: Sequence[Problem], seed: int) -> Tensors:
    """Packed tensors by role; extra keys have a row for each sample."""
    one = samples[0]
    shared = {"heads": one.heads, "kv_heads": one.kv_heads, "dtype": one.dtype}
    shared |= {"head_dim": one.head_dim, "value_head_dim": one.value_head_dim}
    line = Problem((sum(problem.token_count for problem in samples),), (1,), **shared)
    x = {name: y[0] for name, y in FORWARD.random_inputs(line, seed).items()}
    rows = FORWARD.random_inputs(replace(line, batch=len(samples), extra_tokens=one.extra_tokens), seed)
    return x | {name: y for name, y in rows.items() if name.startswith("extra")}


def attend_samples(samples: Sequence[Problem], x: Tensors, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_heads`, of packed samples."""
    call = x["q"], x["k"], x["v"], [problem.tokens for problem in samples]
    further = {**own_arguments(samples), **further_arguments(x)}
    out, lse = VARLEN[samples[0].rank](*call, **further, return_lse=True, kernel=key)
    return out, lse


def sample_of(x: Tensors, i: int, samples: Sequence[Problem]) -> Tensors:
    """Of packed tensors by role those of one sample, as views."""
    counts, found = [problem.token_count for problem in samples], {}
    for name, y in x.items():
        extra = name.startswith("extra")
        found[name] = y[i : i + 1] if extra else y.split(counts)[i].unflatten(0, samples[i].tokens)[None]
    return found


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
    operators = {config: Operators(config, library) for config, library in libraries.items()}
    survey(kernel_of, libraries, {seed: operators[config].check for seed, config in kernel_of.items() if seed % 4 == 3})


def survey(
    kernel_of: Mapping[int, KernelConfig],
    libraries: Mapping[KernelConfig, Path],
    otherwise: Mapping[int, Callable[[int], str]],
) -> None:
    """Tries the calls of seeds, says what is wrong of which, and ends the process.

    Args:
        kernel_of: the seeds' kernels.
        libraries: the kernels'.
        otherwise: of seeds whose calls aren't the kernel's own, what says what is wrong of them.
    """
    verifiers = {config: Verifier(config, library, Settings(SCHEDULES)) for config, library in libraries.items()}
    met, wrong, runs, start = Counter[str](), 0, 0, time.monotonic()
    for done, (seed, config) in enumerate(kernel_of.items(), 1):
        if seed in otherwise:
            said, runs = otherwise[seed](seed), runs + 1
            met["through the operators"] += 1
        else:
            problem = random_call(config, seed)
            found = verifiers[config].verify(problem)
            said, runs = found.message if found.failed else "", runs + found.runs
            met.update(_kinds(problem))
        if said:
            wrong += 1
            print(f"seed {seed}, {config.key}: {said}", flush=True)
        if sys.stderr.isatty() or done % 20 == 0:
            print(f"{done} calls, {wrong} wrong, {time.monotonic() - start:.0f} s", file=sys.stderr)
    for verifier in verifiers.values():
        verifier.close()
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(met.items()))
    print(f"{len(kernel_of)} calls, {wrong} wrong, {runs} runs; {kinds}")
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
