"""Says how far values that are not finite reach: the same of a kernel for any arch, given that of unseen V."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.runtime.problem import Problem
from gnaforge.verification.poison import queries_that_see, queries_that_visit
from gnaforge.verification.problems import for_kernel

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]
NAN, INF = float("nan"), float("inf")


def check_reach(attend: Attend, config: KernelConfig, problem: Problem, tokens: int = 3) -> None:
    """Spoils some tokens of K and V, one after the other. ``attend`` gives output and log-sum-exp of q, k, v, and a
    pattern."""
    problem = for_kernel(problem, config)
    dtype, rng = DTYPES[config.dtype].torch, Random(0)
    torch.manual_seed(0)
    shape = (1, *problem.tokens, problem.heads)
    dims = problem.head_dim, problem.head_dim, problem.value_head_dim
    q, k, v = (torch.randn(*shape, n).to(dtype) for n in dims)
    q = q.abs() + 0.125  # so that scores of an infinite key are infinite
    pattern = problem.window, problem.stride, problem.dilation, problem.causal
    clean_out, clean_lse = attend(q, k, v, *pattern)
    assert clean_out.isfinite().all() and clean_lse.isfinite().all()
    for _ in range(tokens):
        token = [rng.randrange(n) for n in problem.tokens]
        at = (0, *token)
        sees = queries_that_see(problem, token, "cpu")
        # On GPUs a probability of 0 is multiplied by V of all keys of a tile.
        visits = sees if config.arch == "cpu" else queries_that_visit(problem, config, token, "cpu") | sees
        assert sees.any() and not visits.all(), "the problem tells nothing"
        for name, value in (("k", NAN), ("k", INF), ("k", -INF), ("v", NAN), ("v", INF)):
            spoiled = {"k": k.clone(), "v": v.clone()}
            spoiled[name][at] = value
            out, lse = attend(q, spoiled["k"], spoiled["v"], *pattern)
            what = config.key, token, name, value
            unreached = ~(sees if name == "k" else visits)
            assert torch.equal(out[0][unreached], clean_out[0][unreached]), what
            assert torch.equal(lse[0][~sees], clean_lse[0][~sees]), what
            seen_out, seen_lse = out[0][sees], lse[0][sees]
            if name == "v":
                assert torch.equal(lse, clean_lse), what
                assert (seen_out.isnan() if value is NAN else ~seen_out.isfinite()).all(), what
            elif value == -INF:  # such a key has no weight
                assert seen_out.isfinite().all() and seen_lse.isfinite().all(), what
            else:
                assert seen_out.isnan().all(), what
                # CUTLASS's mainloop has no other sum than NaN for such a row.
                is_nan = value is NAN or config.variant == "cutlass"
                assert (seen_lse.isnan() if is_nan else seen_lse == INF).all(), what
