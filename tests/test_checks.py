"""Checks that every call is held to, and that each notices its fault: in every layout, for every op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import oracle
import pytest
import torch
from gnaforge.build import abi
from gnaforge.runtime import op_table
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.runtime.op_table import FORWARD, OPS, Op, Role, Tensors
from gnaforge.runtime.problem import FEATURES, Problem
from gnaforge.verification.checks import Failure, bytes_of_inputs, check_memory, compare_all, digest
from gnaforge.verification.contract import Kernel
from gnaforge.verification.kinds import LAYOUTS, POISONS
from gnaforge.verification.layouts import Memory, allocate, fill
from gnaforge.verification.poison import POISONERS, queries_that_see, queries_that_visit
from gnaforge.verification.runs import KernelRuns

CONFIG = KernelConfig.parse("gna_forward-sm90-r2-bf16-d8-q4x4-kv4x4")
PROBLEM = Problem((9, 11), (4, 3), (2, 1), (2, 1), (False, True), batch=2, heads=4, kv_heads=2, head_dim=8)


@pytest.mark.parametrize(("layout", "dtype"), [*product(LAYOUTS, DTYPES)])
def test_every_layout_holds_every_tensor_apart(layout: str, dtype: str) -> None:
    """Values come back, no element is part of two tensors, and results may lie in any layout, too."""
    problem = replace(PROBLEM, dtype=dtype, head_dim=16, value_head_dim=48)
    memory, values = allocate(FORWARD, problem, layout), FORWARD.random_inputs(problem)
    assert all(one.storage.isnan().all() and one.unwritten().all() for one in memory.values())
    fill(memory, values)
    for one in memory.values():
        if one.role.name in values:
            assert torch.equal(one.tensor, values[one.role.name]) and not one.unwritten().any()
        else:
            one.tensor.fill_(1)
        assert tuple(one.tensor.shape) == one.role.shape(problem) and one.tensor.stride()[-1] > 0
        assert one.role.channels is None or one.tensor.stride()[-1] == 1
        assert all(stride * one.tensor.element_size() % 16 == 0 for stride in one.tensor.stride()[:-1]) or (
            one.role.channels is None
        )
        contiguous = layout == "contiguous" or (layout == "packed" and one.role in FORWARD.outputs)
        contiguous |= layout == "padded channels" and one.role.channels is None
        contiguous |= layout in ("packed", "heads first") and not one.role.has_tokens
        assert one.tensor.is_contiguous() == contiguous, one.role
    shared = {id(one.storage) for one in memory.values()}
    assert len(shared) == len(memory) - (2 if layout == "packed" else 0)
    for role in FORWARD.outputs:
        assert len(memory[role.name].outside()) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_outside_of_a_result_is_noticed(layout: str) -> None:
    memory = allocate(FORWARD, PROBLEM, layout)
    fill(memory, FORWARD.random_inputs(PROBLEM))
    before = bytes_of_inputs(FORWARD, memory)
    for role in FORWARD.outputs:
        memory[role.name].tensor.fill_(float("nan"))  # written, though not a number
    check_memory(FORWARD, memory, before)
    for role in FORWARD.outputs:
        one = memory[role.name]
        first, size = one.extent
        step = one.tensor.element_size()
        at = (first - one.storage.data_ptr()) // step
        outside = [0, at - 1, at + size // step, one.storage.numel() - 1]
        inside = torch.zeros_like(one.storage, dtype=torch.bool)
        inside.as_strided(one.tensor.shape, one.tensor.stride(), at).fill_(True)
        gaps = (~inside[at : at + size // step]).nonzero().flatten()
        for position in outside + ([at + int(gaps[len(gaps) // 2])] if len(gaps) else []):
            held = one.storage[position].clone()
            one.storage[position] = 1
            with pytest.raises(Failure, match=f"1 element outside of {role.name} was written") as raised:
                check_memory(FORWARD, memory, before)
            assert raised.value.kind == "guard" and f"first: {position - at:+} elements" in str(raised.value)
            one.storage[position] = held
    last = memory["out"].tensor
    last[1, 8, 10, 3, 7] = memory["out"].storage[0]
    where = "batch entry 1, token 8,10, head 3, channel 7"
    with pytest.raises(Failure, match=f"1 element of out was never written; first: {where}"):
        check_memory(FORWARD, memory, before)
    last[1, 8, 10, 3, 7] = 0
    memory["k"].storage[-1] = 0
    named = "query, or around it" if layout == "packed" else "key, or around it"  # they share their memory
    with pytest.raises(Failure, match=f"the kernel wrote into {named}"):
        check_memory(FORWARD, memory, before)


def attend(memory: Memory, problem: Problem, spoil: str = "") -> None:
    """Attention without a kernel's care: every key takes part in the products. ``spoil``: what is wrong with it."""
    q, k, v = (memory[role.name].tensor.double() for role in FORWARD.inputs)
    if spoil == "head":
        k = k + 0 * k.sum(-2, keepdim=True)
    if spoil == "batch":
        q = q + 0 * q.sum(0, keepdim=True)
    if spoil == "token":
        v = v + 0 * v.sum(1, keepdim=True)
    finite = v.nan_to_num() if spoil != "token" else v
    out, lse = oracle.reference(problem, q, k.nan_to_num() if spoil == "hides" else k, finite)
    memory["out"].tensor.copy_(out)
    memory["lse"].tensor.copy_(lse)


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        ("", "", ""),
        ("head", "others", "depends on batch entries other than"),
        ("batch", "others", "depends on batch entries other than"),
        ("token", "unseen", "depends on the keys"),
        ("hides", "unseen", "does not show"),
    ],
)
def test_poison_finds_what_must_not_matter(spoil: str, kind: str, said: str) -> None:
    for seed, poison in product(range(5), ("others", "unseen")):
        memory = allocate(FORWARD, PROBLEM, LAYOUTS[seed])
        fill(memory, FORWARD.random_inputs(PROBLEM, seed))
        attend(memory, PROBLEM, spoil)
        clean = {role.name: memory[role.name].tensor.clone() for role in FORWARD.outputs}
        found = POISONERS[poison](FORWARD, PROBLEM, CONFIG, memory, seed)
        assert found is not None and all(0 < int(kept.sum()) < kept.numel() for kept in found.kept.values())
        attend(memory, PROBLEM, spoil)
        if poison == kind:
            with pytest.raises(Failure, match=said) as raised:
                found.check(clean, memory)
            assert raised.value.kind == "poison"
        else:
            found.check(clean, memory)
    alone = replace(PROBLEM, batch=1, kv_heads=1)
    for poison in ("others", "beyond"):
        assert POISONERS[poison](FORWARD, alone, CONFIG, allocate(FORWARD, alone, "contiguous"), 0) is None


def test_tiles_that_hold_a_key() -> None:
    """Against the tiles that the oracle counts: summed over keys, each Q tile's queries see its visited boxes."""
    total = 0
    for key in ((i, j) for i in range(9) for j in range(11)):
        seen = queries_that_see(PROBLEM, key, "cpu")
        visited = queries_that_visit(PROBLEM, CONFIG, key, "cpu")
        assert visited[seen].all()
        flat = key[0] * 11 + key[1]
        assert seen.flatten().tolist() == oracle.mask(PROBLEM)[:, flat].tolist()
        total += int(visited.sum())
    assert int(oracle.mask(PROBLEM).sum()) < total < 99 * 99


def test_names_are_those_of_the_contract() -> None:
    for op in OPS.values():
        numbers = [abi.ROLES.index(role.name) for roles in (op.inputs, op.outputs) for role in roles]
        assert op.name in abi.OPS and numbers == sorted(numbers)
    assert abi.FEATURES[: len(FEATURES)] == FEATURES and set(POISONERS) == set(POISONS)


def test_a_problem_for_the_contract() -> None:
    problem = Problem(
        (4, 6), (4, 3), (2, 1), 1, ("block", True), heads=6, kv_heads=2, head_dim=24, batch=3, scale=0.5, sink=(2, 0),
        grid=(40, 6), q_offset=(36, 0), kv_tokens=(8, 6), kv_offset=(34, 0), kv_sink=(2, 0), extra_tokens=(77,),
    )  # fmt: skip
    made = abi.describe(problem)
    lists = {
        name: list(value)
        for name, kind in abi.Problem._fields_
        if hasattr(value := getattr(made, name), "__len__") and kind is not None
    }
    assert lists == {
        "tokens": [4, 6, 0], "window": [4, 3, 0], "stride": [2, 1, 0], "dilation": [1, 1, 0], "causal": [2, 1, 0],
        "edge": [0, 0, 0], "sink": [2, 0, 0], "grid": [40, 6, 0], "q_offset": [36, 0, 0], "kv_tokens": [8, 6, 0],
        "kv_offset": [34, 0, 0], "kv_sink": [2, 0, 0], "extra_tokens": [77, 0],
    }  # fmt: skip
    assert (made.rank, made.batch, made.heads, made.kv_heads, made.head_dim, made.value_head_dim) == (
        2,
        3,
        6,
        2,
        24,
        24,
    )
    assert made.scale == 0.5 and abi.feature_bits(problem.features()) == 0b111110


# An op of this test's own, with another set of results: what K's gradient would be if V were all that it depended on,
# and V's. Both are K's and V's size, so nothing of them has the queries' heads.
GRAD_K = Role("grad_k", "K's gradient", "kv", "head_dim")
GRAD_V = Role("grad_v", "V's gradient", "kv", "value_head_dim", "fp32")


def _exact(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    return {"grad_k": 2 * inputs["k"].double(), "grad_v": inputs["v"].double() + inputs["lse"].double().sum()}


def _bound(
    problem: Problem,
    inputs: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    *,
    rounds_probabilities: bool,
) -> dict[str, torch.Tensor]:
    return {name: value.abs() * 1e-6 + 1e-4 for name, value in exact.items()}


OTHER = Op(
    "gna_backward_kv",
    (op_table.Q, op_table.K, op_table.V, op_table.LSE),
    (GRAD_K, GRAD_V),
    _exact,
    _bound,
    lambda *_, **__: ({}, {}),
    lambda problem: 0.0,
)
OTHER_KEY = "gna_backward_kv-cpu-r1-fp32-d8-q8-kv8"
COMPUTES = """
double all = 0; int64_t tokens = args->problem->tokens[0];
for (int64_t i = 0; i < tokens * args->problem->heads; ++i) all += data(args, GNAFORGE_LSE)[i];
for (int64_t i = 0; i < 8 * tokens * args->problem->kv_heads; ++i) {
  data(args, GNAFORGE_GRAD_K)[i] = 2 * data(args, GNAFORGE_K)[i];
  data(args, GNAFORGE_GRAD_V)[i] = data(args, GNAFORGE_V)[i] + static_cast<float>(all);
}
SPOIL; return 0
""".replace("\n", " ")


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        ("", "", ""),
        ("data(args, GNAFORGE_GRAD_V)[9] += 1", "wrong", r"1 of 320 elements of grad_v .* token 0, head 1, channel 1"),
        ("data(args, GNAFORGE_GRAD_K)[-1] = 0", "guard", "outside of grad_k was written"),
        ("data(args, GNAFORGE_LSE)[0] = 0", "guard", "the kernel wrote into LSE"),
        (
            "static int runs = 0; if (runs++) data(args, GNAFORGE_GRAD_K)[0] *= 1.0000001f",
            "repeat",
            "another run gives other bits",
        ),
        (
            "if (args->host->threads > 1) data(args, GNAFORGE_GRAD_V)[0] *= 1.0000001f",
            "threads",
            "on 3 threads it gives other bits",
        ),
    ],
)
def test_an_op_with_other_results_is_held_to_the_same(
    toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, spoil: str, kind: str, said: str
) -> None:
    """Through the contract, with tensors by role: nothing but the op table knows what an op reads and writes."""
    monkeypatch.setitem(OPS, OTHER.name, OTHER)
    library = toy(
        f"other_op_{kind}_{len(spoil)}",
        TOY_KEY=f'"{OTHER_KEY}"',
        TOY_OP="GNAFORGE_GNA_BACKWARD_KV",
        TOY_STATEMENT=COMPUTES.replace("SPOIL", spoil),
    )
    kernel = Kernel(library, OTHER_KEY)
    assert kernel.op is OTHER and kernel.device == "cpu"
    problem = Problem(20, 5, heads=4, kv_heads=2, head_dim=8, dtype="fp32")
    runs = KernelRuns(kernel, None, rounds_probabilities=False)
    asked = (problem, 3, "contiguous", None, 2, (), False, True)
    if kind:
        with pytest.raises(Failure, match=said) as raised:
            runs.verify(*asked)
        assert raised.value.kind == kind
        return
    found = runs.verify(*asked)
    assert set(found["errors"]) == {"grad_k", "grad_v"} and found["runs"] == 4
    assert all(one["share"] < 1 for one in found["errors"].values())
    memory = runs.allocate(problem, "packed")
    assert len({id(one.storage) for one in memory.values()}) == 4  # Q, K and V share theirs
    fill(memory, runs.exact(problem, 3).inputs)
    (before,) = {digest(OTHER, memory)}
    for name, value in runs.exact(problem, 3).results.items():
        memory[name].tensor.copy_(value)
    exact = runs.exact(problem, 3)
    assert compare_all(OTHER, memory, exact.results, exact.bounds) and digest(OTHER, memory) != before
