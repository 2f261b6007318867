"""Our oracle and our operators against NATTEN itself, whose flex backend runs on a CPU: an outside check.

NATTEN's own setup.py builds CUDA kernels for hours where it sees a GPU. This installs it without, in seconds:
``CUDA_VISIBLE_DEVICES= NATTEN_CUDA_ARCH= pip install --no-build-isolation --no-deps natten==0.21.6``
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import gnaforge
import numpy as np
import oracle
import pytest
import torch
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.reference import error_bound
from test_problem_surveys import attend, load_all

pytest.importorskip("natten")
from natten.backends.flex import flex_fmha, flex_fna_generic, get_na_flex_mask
from natten.functional import merge_attentions, neighborhood_attention_generic
from torch.nn.attention.flex_attention import create_mask

pytestmark = [
    pytest.mark.natten,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

Outputs = tuple[torch.Tensor, torch.Tensor]


def random_problem(rng: Random) -> oracle.Problem:
    """A problem that NATTEN accepts: no window of 1, and with flex one head dim, a power of 2."""
    problem = oracle.random_problem(rng, max_tokens=128, min_window=2)
    head_dim = 2 ** (problem.head_dim.bit_length() - 1)
    return replace(problem, head_dim=head_dim, value_head_dim=head_dim)


def natten_outputs(problem: oracle.Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
    """NATTEN's output and LSE.

    Not na1d to na3d: where a window covers the layout these run plain attention, which refuses causal on a CPU.
    """
    # flex traces itself anew for each problem, 0.4 s for work of 0.02 s; force_eager stops that.
    with torch.compiler.set_stance("force_eager"):
        return flex_fna_generic(q, k, v, **problem.arguments(), return_lse=True)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("batch", range(10))
def test_outputs(batch: int) -> None:
    """Ten times 50 random problems: NATTEN computes what the oracle computes, and our operators what NATTEN does."""
    rng = Random(f"outputs {batch}")
    for number in range(50):
        problem = random_problem(rng)
        dtype = rng.choice(("fp32", "bf16", "fp16"))
        q, k, v = oracle.inputs(problem, number, dtype)
        theirs = natten_outputs(problem, q.float(), k.float(), v.float())
        exact = oracle.reference(problem, q, k, v)
        ours = gnaforge.neighborhood_attention(q, k, v, **problem.arguments(), return_lse=True)
        bounds = error_bound(problem, q, k, v, exact)
        for name, natten, want, got, bound in zip(("output", "LSE"), theirs, exact, ours, bounds, strict=True):
            where = f"{name}, batch {batch}, {number}, {dtype}, {problem}"
            # fp32 rounding makes 1e-6 here, one key too many or too few makes 4e-3 or more.
            assert (natten - want).abs().max().item() < 1e-4, f"NATTEN: {where}"
            assert ((got - natten).abs() <= bound + 1e-4).all(), f"gnaforge: {where}"


@pytest.mark.parametrize("batch", range(4))
def test_masks(batch: int) -> None:
    """Four times 250 more problems, bit by bit: the mask functions that NATTEN gives to flex attention."""
    rng = Random(f"masks {batch}")
    for _ in range(250):
        problem = random_problem(rng)
        block_mask = get_na_flex_mask("cpu", problem.rank, problem.tokens, *problem.arguments().values())
        tokens = int(np.prod(problem.tokens))
        theirs = create_mask(block_mask.mask_mod, 1, 1, tokens, tokens, device="cpu")
        assert np.array_equal(theirs[0, 0].numpy(), oracle.mask(problem)), problem


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("batch", range(4))
def test_additional_keys(batch: int) -> None:
    """Four times 25 problems, of which NATTEN computes windows and additional keys apart and merges them."""
    rng = Random(f"additional {batch}")
    load_all()
    for number in range(25):
        problem = replace(random_problem(rng), extra_tokens=(rng.choice((1, rng.randint(1, 40), 100)),), dtype="fp32")
        given = FORWARD.random_inputs(problem, number)
        given.pop("extra_lengths", None)
        q, k, v, keys, values = given.values()
        with torch.compiler.set_stance("force_eager"):
            theirs = neighborhood_attention_generic(
                q,
                k,
                v,
                **replace(problem, extra_tokens=()).arguments(),
                additional_keys=keys,
                additional_values=values,
                backend="flex-fna",
                attention_kwargs={"backend": "flex-fmha"},
            )
        exact, _ = oracle.reference(problem, q, k, v, (keys, values, None))
        got, _ = attend(problem, None, given)
        where = f"batch {batch}, {number}, {problem}"
        assert (theirs - exact).abs().max().item() < 1e-4, f"NATTEN: {where}"
        assert (got - theirs).abs().max().item() < 1e-4, f"gnaforge: {where}"


def test_dense_attention_and_merged_attention() -> None:
    """Queries and keys of other numbers; parts of the keys apart, merged as NATTEN merges them."""
    rng = Random("dense")
    for number in range(40):
        tokens, keys = rng.randint(1, 60), rng.randint(2, 90)
        problem = oracle.Problem(tokens, keys, kv_tokens=keys, heads=4, kv_heads=rng.choice((1, 2, 4)), head_dim=16)
        q, k, v = oracle.inputs(problem, number)
        exact = oracle.reference(problem, q, k, v)
        cut = rng.randint(1, keys - 1)
        with torch.compiler.set_stance("force_eager"):
            theirs = flex_fmha(q, k, v, return_lse=True)
            parts = [flex_fmha(q, k[:, at], v[:, at], return_lse=True) for at in (slice(0, cut), slice(cut, None))]
        merged = merge_attentions(*map(list, zip(*parts, strict=True)), torch_compile=False, use_autograd_fix=False)
        for natten, whole, want in zip(theirs, merged, exact, strict=True):
            assert (natten - want).abs().max().item() < 1e-4 and (whole - want).abs().max().item() < 1e-4, problem
