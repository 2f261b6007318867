"""Runs jobs on sets of gloo processes, forked from one that has imported torch: ``distributed_ranks.py JOBS RESULTS``.

A job is {"name": function, "ranks": processes, ...}; those in a row with as many processes share them. Results are what
rank 0 returns, in order.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from itertools import combinations, groupby
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from gnaforge import NoKernelError, joint_attention, neighborhood_attention
from gnaforge.distributed import (
    RankError,
    agreement,
    context_parallel_attention,
    context_parallel_joint_attention,
    kernels,
    plan,
    plan_joint,
)
from gnaforge.distributed.agreement import Caller, agree
from gnaforge.distributed.layout import Shards, bounds_of
from gnaforge.distributed.mesh import team_of
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import random_problem, with_settings
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

FEATURES = {"edge", "block_causal", "sink", "extra_keys"}
TIMEOUT, TIMEOUT_OF_FAULTS = 60, 6


def random_call(seed: int, ranks: int) -> tuple[Problem, list[int], list[list[int]], dict[str, Any]]:
    """A problem of any kind, ranks along each axis, sizes of shards, and options."""
    rng = Random(f"{ranks} {seed}")
    while True:  # most are so small that nothing could be divided
        problem = random_problem(rng, max_tokens=600)
        if rng.random() < 0.8:
            problem = with_settings(problem, rng, 600, FEATURES)
        longest = sorted(range(problem.rank), key=lambda axis: -problem.tokens[axis])
        if problem.tokens[longest[0]] > ranks and problem.token_count > 8 * ranks and problem.window[longest[0]] > 1:
            break
    heads = rng.choice((problem.heads, problem.heads, ranks, 2 * ranks))
    kv_heads = rng.choice([n for n in (1, 2, problem.kv_heads, heads) if heads % n == 0])
    fields = {name: getattr(problem, name) for name in ("stride", "dilation", "causal", "edge", "sink", "window")}
    head_dim, value_head_dim = rng.choice(((8, 8), (16, 24), (24, 8), (32, 32)))
    extra = problem.extra_tokens[:1]
    if rng.random() < 0.4:  # windows that leave inner queries to most shards
        fields["window"] = tuple(min(w, rng.randint(2, 5)) for w in problem.window)
        fields["stride"] = tuple(min(s, w) for s, w in zip(problem.stride, fields["window"], strict=True))
        fields |= {"dilation": 1, "sink": 0}
    problem = Problem(
        problem.tokens,
        fields.pop("window"),
        **fields,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        batch=problem.batch,
        dtype="fp32",
        extra_tokens=extra,
    )
    parts = [1] * problem.rank
    factors = rng.choice([f for f in ((ranks,), (2, ranks // 2), (ranks // 2, 2), (2, 2, 2)) if _product(f) == ranks])
    axes = sorted(longest[: len(factors)])
    for axis, count in zip(axes, factors if len(axes) == len(factors) else (ranks,), strict=False):
        parts[axis] = count
    if _product(parts) != ranks:
        parts = [ranks if axis == longest[0] else 1 for axis in range(problem.rank)]
    sizes = []
    for tokens, count in zip(problem.tokens, parts, strict=True):
        cuts = sorted(rng.randint(0, tokens) for _ in range(count - 1))
        even = [min(-(-tokens // count) * (i + 1), tokens) for i in range(count - 1)]
        cuts = rng.choice((cuts, even))
        sizes.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)])
    options = {
        "mode": rng.choice(("halo", "halo", "auto", "ulysses", "hybrid")),
        "transport": rng.choice(("all_to_all", "p2p")),
        "save_halo": rng.random() < 0.6,
        "head_chunks": rng.choice((1, 1, 2, 3)),
        "border_multiple": rng.choice((1, 1, 2)),
        "extra_grad": rng.choice(("sum", "partial")),
    }
    return problem, parts, sizes, options


def _product(numbers: Any) -> int:
    found = 1
    for n in numbers:
        found *= n
    return found


def tensors_of(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    p = problem
    found = {
        "query": randn(p.batch, *p.tokens, p.heads, p.head_dim),
        "key": randn(p.batch, *p.tokens, p.kv_heads, p.head_dim),
        "value": randn(p.batch, *p.tokens, p.kv_heads, p.value_head_dim),
    }
    if p.extra_tokens:
        found["additional_keys"] = randn(p.batch, p.extra_tokens[0], p.kv_heads, p.head_dim)
        found["additional_values"] = randn(p.batch, p.extra_tokens[0], p.kv_heads, p.value_head_dim)
    found["grad_out"] = randn(p.batch, *p.tokens, p.heads, p.value_head_dim)
    found["grad_lse"] = randn(p.batch, *p.tokens, p.heads)
    return found


INPUTS = ("query", "key", "value", "additional_keys", "additional_values")


def differentiate(call: Any, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Results and gradients."""
    leaves = {n: tensors[n].detach().clone().requires_grad_() for n in INPUTS if n in tensors}
    out, lse = call(**leaves, **arguments, return_lse=True)
    torch.autograd.backward([out, lse], [tensors["grad_out"], tensors["grad_lse"]])
    return {"out": out.detach(), "lse": lse.detach(), **{n: leaf.grad for n, leaf in leaves.items()}}


def cut(tensor: torch.Tensor, box: Any) -> torch.Tensor:
    return tensor[(slice(None), *(slice(*span) for span in box))]


TRAFFIC = {"bytes": 0, "gathered": 0}


def count_traffic() -> None:
    """Counts what is handed to the transport for other ranks, and what `all_gather` brings from them."""
    plain, batch, gather = dist.all_to_all_single, dist.batch_isend_irecv, dist.all_gather

    def counted(out: Any, parts: Any, received: Any, sent: Any, group: Any = None, async_op: bool = False) -> Any:
        own = dist.get_rank(group)
        TRAFFIC["bytes"] += sum(n for r, n in enumerate(sent) if r != own) * parts.element_size()
        return plain(out, parts, received, sent, group=group, async_op=async_op)

    def counted_batch(operations: Any) -> Any:
        TRAFFIC["bytes"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return batch(operations)

    def counted_gather(found: Any, tensor: Any, group: Any = None) -> Any:
        TRAFFIC["gathered"] += (len(found) - 1) * tensor.nbytes
        return gather(found, tensor, group=group)

    dist.all_to_all_single, dist.batch_isend_irecv, dist.all_gather = counted, counted_batch, counted_gather


def mesh_of(parts: list[int]) -> tuple[DeviceMesh, list[str | None]]:
    names = [f"axis{i}" for i, count in enumerate(parts) if count > 1]
    mesh = init_device_mesh("cpu", tuple(c for c in parts if c > 1), mesh_dim_names=tuple(names))
    return mesh, [f"axis{i}" if count > 1 else None for i, count in enumerate(parts)]


MESHES: dict[tuple[int, ...], Any] = {}


def check_random(seed: int, ranks: int, again: bool = False) -> dict[str, Any]:
    """`compare` of a random call."""
    return compare(seed, ranks, again, *random_call(seed, ranks))


def check_corners(ranks: int) -> dict[str, Any]:
    """`compare` of one whose border calls share keys, own ones and halos of several neighbours."""
    problem = Problem((14, 13), (5, 5), edge=("cut", "wrap"), heads=2, head_dim=8, dtype="fp32", extra_tokens=(3,))
    options = {"mode": "halo", "transport": "all_to_all", "save_halo": True, "head_chunks": 2, "border_multiple": 1}
    return compare(5, ranks, True, problem, [2, 2], [[7, 7], [6, 7]], {**options, "extra_grad": "sum"})


def compare(
    seed: int,
    ranks: int,
    again: bool,
    problem: Problem,
    parts: list[int],
    sizes: list[list[int]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compares a call with the undivided one, results and gradients, and its bytes with the formula."""
    if tuple(parts) not in MESHES:
        MESHES[tuple(parts)] = mesh_of(parts)
    mesh, dims = MESHES[tuple(parts)]
    shards = Shards(tuple(bounds_of(own) for own in sizes))
    box = shards.box(dist.get_rank())
    whole = tensors_of(problem, seed)
    local = {n: x if n.startswith("additional") else cut(x, box) for n, x in whole.items()}
    windows = (
        problem.arguments()
        if not problem.extra_tokens
        else Problem(
            problem.tokens,
            problem.window,
            problem.stride,
            problem.dilation,
            problem.causal,
            edge=problem.edge,
            sink=problem.sink,
        ).arguments()
    )
    for mode in dict.fromkeys((options["mode"], "auto")):
        try:
            arguments = {
                **windows,
                **options,
                "mode": mode,
                "mesh": mesh,
                "dims": dims,
                "grid": problem.tokens,
                "shards": sizes,
            }
            asked = {n: local[n].clone().requires_grad_() for n in INPUTS if n in local}
            planned = plan(**asked, **arguments)
            break
        except ValueError:  # heads that don't divide
            assert mode in ("ulysses", "hybrid")
    TRAFFIC["bytes"] = 0
    with torch.no_grad():
        context_parallel_attention(**{n: local[n] for n in INPUTS if n in local}, **arguments)
    counted = TRAFFIC["bytes"]
    assert counted == planned.traffic.sent, (counted, planned.traffic)
    TRAFFIC["bytes"] = 0
    got = differentiate(context_parallel_attention, local, arguments)
    if planned.mode == "halo":  # gradients of halos go back, and halos that weren't kept travel again
        passes = planned.traffic.sent * (1 if options["save_halo"] else 2) + planned.traffic.received
        assert passes == TRAFFIC["bytes"], (TRAFFIC, planned.traffic)
    if again:
        for name, tensor in differentiate(context_parallel_attention, local, arguments).items():
            assert torch.equal(tensor, got[name]), f"{name} differs from run to run"
    if options["extra_grad"] == "partial":
        for name in INPUTS[3:]:
            if name in got:
                dist.all_reduce(got[name])
    # Equal scores and whole numbers leave nothing to round: such a call is equal to the bit, whatever the order.
    exact = {n: x.mul(4).round() for n, x in whole.items()}
    exact["query"] = torch.zeros_like(exact["query"])
    with torch.no_grad():
        own = {n: exact[n] if n.startswith("additional") else cut(exact[n], box) for n in INPUTS if n in exact}
        got["exact"], _ = context_parallel_attention(**own, **arguments, return_lse=True)
    every: list[Any] = [None] * ranks
    dist.gather_object(
        (box, got, counted, planned.inner_share * (planned.mode == "halo")), every if dist.get_rank() == 0 else None
    )
    if dist.get_rank() != 0:
        return {}
    want = differentiate(neighborhood_attention, whole, windows)
    want["exact"] = neighborhood_attention(**{n: exact[n] for n in INPUTS if n in exact}, **windows)
    errors, equal = {}, {}
    for name, tensor in want.items():
        worst, same = 0.0, True
        for own, results, *_ in every:
            here = tensor if name.startswith("additional") else cut(tensor, own)
            assert here.shape == results[name].shape, (name, here.shape, results[name].shape)
            if here.numel():
                worst = max(worst, float((here - results[name]).abs().max() / tensor.abs().max()))
                same = same and torch.equal(here, results[name])
        errors[name], equal[name] = worst, same
    assert max(errors.values()) < 1e-5 and equal["exact"], (errors, equal, str(problem), sizes, options)
    return {
        "mode": planned.mode,
        "error": max(errors.values()),
        "equal": equal,
        "problem": str(problem),
        "sizes": sizes,
        "options": options,
        "bytes": [n for *_, n, _ in every],
        "peers": planned.peers,
        "inner": max(share for *_, share in every),
    }


def check_joint(ranks: int, shards: list[int], mode: str) -> float:
    """Joint attention with text of other lengths per batch entry against the undivided call; the largest error,
    relative to the largest value."""
    problem = Problem((sum(shards), 7), (5, 3), heads=3, head_dim=16, batch=2, dtype="fp32")
    bounds = Shards((bounds_of(shards), (0, 7)))
    mesh, dims = mesh_of([ranks, 1])
    image, generator = tensors_of(problem, 1), torch.Generator().manual_seed(2)
    names = "text_q", "text_k", "text_v", "gradient"
    text = {name: torch.randn(2, 9, 3, 16, generator=generator) for name in names}
    grad_text = text.pop("gradient")
    lengths, box = torch.tensor([9, 4], dtype=torch.int32), bounds.box(dist.get_rank())

    def run(call: Any, own: Any, grad: torch.Tensor, **arguments: Any) -> dict[str, torch.Tensor]:
        leaves = {n: x.detach().clone().requires_grad_() for n, x in {**own, **text}.items()}
        out, text_out, lse, text_lse = call(**leaves, text_lengths=lengths, return_lse=True, **arguments)
        torch.autograd.backward([out, text_out, text_lse], [grad, grad_text, grad_text[..., 0]])
        results = {"out": out, "lse": lse, "text_out": text_out, "text_lse": text_lse}
        return {**{n: x.detach() for n, x in results.items()}, **{n: x.grad for n, x in leaves.items()}}

    def undivided(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **other: Any) -> Any:
        out, text_out, lse, text_lse = joint_attention(query, key, value, kernel_size=(5, 3), **other)
        return out, text_out, lse, text_lse

    inputs = {n: image[n] for n in INPUTS[:3]}
    whole = run(undivided, inputs, image["grad_out"])
    where = {"mesh": mesh, "dims": dims, "grid": problem.tokens, "shards": [shards, None], "mode": mode}
    local, grad = {n: cut(x, box) for n, x in inputs.items()}, cut(image["grad_out"], box)
    arguments = {**text, "text_lengths": lengths, "kernel_size": (5, 3), **where}
    planned, known = plan_joint(**local, **arguments), len(agreement._agreed[team_of(mesh, ["axis0"]).group])
    TRAFFIC.update(bytes=0, gathered=0)
    with torch.no_grad():
        context_parallel_joint_attention(**local, **arguments)
    assert (TRAFFIC["bytes"], TRAFFIC["gathered"]) == (planned.traffic.sent, planned.text_bytes), (TRAFFIC, planned)
    assert len(agreement._agreed[team_of(mesh, ["axis0"]).group]) == known, "the call agreed on something new"
    got, errors = run(context_parallel_joint_attention, local, grad, kernel_size=(5, 3), **where), []
    for name, tensor in whole.items():
        here = tensor if name.startswith("text") else cut(tensor, box)
        assert here.shape == got[name].shape, name
        errors.append(float((here - got[name]).abs().max() / tensor.abs().max()) if here.numel() else 0.0)
    assert max(errors) < 1e-5, dict(zip(whole, errors, strict=True))
    return max(errors)


def check_aligned(ranks: int) -> dict[str, bool]:
    """Shards and borders at multiples of the Q tile, and of the stride: each query meets its keys in the order of the
    undivided call, and results are equal to the bit."""
    mesh, dims = mesh_of([2, ranks // 2])
    found = {}
    for name, windows in {
        "plain": {"kernel_size": (7, 9)},
        "stride": {"kernel_size": (8, 8), "stride": (4, 8)},
        "causal": {"kernel_size": (9, 8), "stride": (1, 8), "is_causal": (True, "block")},
        "cut": {"kernel_size": (7, 15), "edge": "cut"},
        "bf16": {"kernel_size": (7, 9)},
    }.items():
        problem = Problem((32, 8 * ranks), (7, 9), heads=2, head_dim=16)
        dtype = "bf16" if name == "bf16" else "fp32"
        box = Shards(((0, 16, 32), tuple(range(0, 8 * ranks + 1, 16)))).box(dist.get_rank())
        whole = tensors_of(problem, 3)
        tensors = [whole[n].to(torch.bfloat16 if name == "bf16" else torch.float32) for n in INPUTS[:3]]
        pinned = {**windows, "kernel": f"gna_forward-cpu-r2-{dtype}-dany-q8x8-kv8x8", "return_lse": True}
        want = neighborhood_attention(*tensors, **pinned)
        got = context_parallel_attention(
            *(cut(x, box) for x in tensors),
            **pinned,
            mesh=mesh,
            dims=dims,
            grid=problem.tokens,
            mode="halo",
            border_multiple=8,
        )
        found[name] = all(torch.equal(cut(w, box), g) for w, g in zip(want, got, strict=True))
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, found)
    return {name: all(own[name] for own in everyone) for name in found}


def check_rounding(ranks: int, heads: int, kv_heads: int, mode: str) -> dict[str, float]:
    """Errors of gradients in bf16, each in units of the undivided call's."""
    problem = Problem((12, 14), (5, 5), edge="cut", heads=heads, kv_heads=kv_heads, head_dim=16, extra_tokens=(5,))
    mesh, dims = mesh_of([2, ranks // 2])
    whole = tensors_of(problem, 4)
    half = {n: x.to(torch.bfloat16) if n != "grad_lse" else x for n, x in whole.items()}
    windows = {"kernel_size": (5, 5), "edge": "cut"}
    exact = differentiate(neighborhood_attention, {n: x.float() for n, x in half.items()}, windows)
    box = Shards((bounds_of([6, 6]), (0, *range(14 - 4 * (ranks // 2 - 1), 15, 4)))).box(dist.get_rank())
    sizes = [[6, 6], [14 - 4 * (ranks // 2 - 1), *[4] * (ranks // 2 - 1)]]
    local = {n: x if n.startswith("additional") else cut(x, box) for n, x in half.items()}
    where = {"mesh": mesh, "dims": dims, "grid": problem.tokens, "shards": sizes, "mode": mode}
    got = differentiate(context_parallel_attention, local, windows | where)
    plain, found = differentiate(neighborhood_attention, half, windows), {}
    for name in INPUTS[1:]:
        own = {
            n: x if name.startswith("additional") else cut(x, box)
            for n, x in (("exact", exact[name]), ("plain", plain[name]))
        }
        errors = torch.stack([(x.float() - own["exact"]).square().sum() for x in (got[name], own["plain"])])
        dist.all_reduce(errors)
        found[name] = float((errors[0] / errors[1]).sqrt())
    return found


def check_groups(ranks: int) -> list[str]:
    """The first call for some dimensions of a mesh makes all groups that any division of them needs, of which each has
    had a collective before ranks send to some; equal meshes have groups of their own. Gives all modes' names."""
    mesh, dims = mesh_of([2, 2, ranks // 4])
    x, where = torch.randn(1, 2, 2, 2, ranks, 8), {"dims": dims, "grid": (4, 4, ranks // 2), "transport": "p2p"}
    reduce, batch, make, met = dist.all_reduce, dist.batch_isend_irecv, DeviceMesh._create_flatten_mesh, []

    def counted_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        met.append(group)
        return reduce(tensor, *args, group=group, **options)

    def counted_batch(operations: Any) -> Any:
        assert all(any(op.group is group for group in met) for op in operations), (
            "a group's first collective is partial"
        )
        return batch(operations)

    def refuse(*_: Any) -> None:
        raise AssertionError("a group is made after the first call")

    dist.all_reduce, dist.batch_isend_irecv = counted_reduce, counted_batch
    modes = [plan(x, x, x, 3, mesh=mesh, mode="halo", **where).mode]
    DeviceMesh._create_flatten_mesh = refuse
    for by_heads in (some for count in (1, 2) for some in combinations(dims, count)):
        options = {"mesh": mesh, "mode": "hybrid", "by_heads": by_heads, **where}
        context_parallel_attention(x, x, x, 3, **options)
        modes.append(plan(x, x, x, 3, **options).mode)
    modes.append(plan(x, x, x, 3, mesh=mesh, mode="ulysses", **where).mode)
    DeviceMesh._create_flatten_mesh = make
    other, _ = mesh_of([2, 2, ranks // 4])
    plan(x, x, x, 3, mesh=other, mode="halo", **where)
    assert other == mesh and team_of(other, dims[:1]).group is other.get_group(dims[0])
    assert team_of(other, dims[:2]).group is not team_of(mesh, dims[:2]).group
    dist.all_reduce, dist.batch_isend_irecv = reduce, batch
    met.clear()
    return modes


def check_dtensors(ranks: int) -> list[str]:
    """DTensors, divided by batch, uneven tokens and heads of which queries have more than keys, on a mesh of three
    dimensions; the placements of results."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "tokens", "heads"))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    places, of_extra = [Shard(0), Shard(2), Shard(3)], [Shard(0), Replicate(), Shard(2)]
    whole = {n: randn(2, 4, 7, 4 if n == "query" else 2, 16) for n in INPUTS[:3]}
    whole |= {n: randn(2, 5, 2, 16) for n in INPUTS[3:]}
    windows = {"kernel_size": (3, 4), "stride": (1, 2), "edge": ("cut", "wrap")}
    grads = {"grad_out": randn(2, 4, 7, 4, 16), "grad_lse": randn(2, 4, 7, 4)}
    want = differentiate(neighborhood_attention, {**whole, **grads}, windows)
    spread = {n: distribute_tensor(x, mesh, of_extra if "additional" in n else places) for n, x in whole.items()}
    spread |= {n: distribute_tensor(x, mesh, places) for n, x in grads.items()}
    got = differentiate(context_parallel_attention, spread, windows)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].full_tensor(), tensor, rtol=1e-5, atol=1e-5, msg=name)
    planned = plan(**{n: spread[n] for n in INPUTS if n in spread}, **windows, mode="halo")
    assert planned.mode == "halo" and planned.traffic.received > 0

    def refuse(expected: str, **changes: torch.Tensor) -> None:
        for call in (context_parallel_attention, plan):
            try:
                call(**{n: spread[n] for n in INPUTS} | changes, **windows)
            except (ValueError, TypeError) as error:
                assert expected in str(error), error
            else:
                raise AssertionError(expected)

    for heads, kv_heads in ((12, 3), (4, 1)):  # a rank would have queries of one head of keys, and not that
        odd = {n: distribute_tensor(randn(2, 4, 7, heads, 16), mesh, places) for n in INPUTS[:1]}
        odd |= {n: distribute_tensor(randn(2, 4, 7, kv_heads, 16), mesh, places) for n in INPUTS[1:3]}
        refuse(f"{heads} heads, {kv_heads} of keys and values, are divided over 2 ranks", **odd)
    for at, placement in (
        (0, Replicate()),
        (1, Shard(1)),
        (1, Partial()),
        (2, Replicate()),
        (2, Shard(1)),
        (2, Partial()),
    ):
        wrong = [placement if i == at else place for i, place in enumerate(of_extra)]
        extra = {n: DTensor.from_local(spread[n].to_local(), mesh, wrong, run_check=False) for n in INPUTS[3:]}
        refuse(f"is {placement!r} along {mesh.mesh_dim_names[at]!r}; it must be {of_extra[at]!r}", **extra)
    small = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "rest"))
    extra = {n: distribute_tensor(whole[n], small, [Shard(0), Replicate()]) for n in INPUTS[3:]}
    refuse("must be on the query's mesh", **extra)
    refuse("all of them or none", **{n: spread[n].to_local() for n in INPUTS[:3]})
    refuse("all of them or none", **{n: spread[n].to_local() for n in INPUTS[3:]})
    for placements, expected in (
        ([Replicate(), Shard(4), Replicate()], "divides channels"),
        ([Partial(), Replicate(), Replicate()], "redistribute"),
        ([Shard(1), Shard(1), Replicate()], "one is possible"),
    ):
        bad = DTensor.from_local(spread["query"].to_local(), mesh, placements, run_check=False)
        try:
            context_parallel_attention(bad, bad, bad, 3)
        except ValueError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(expected)
    return [str(result.placements) for result in (got["out"], got["lse"], got["additional_keys"])]


Arguments = dict[str, Any]
DISAGREEMENTS: dict[str, tuple[Arguments, Arguments]] = {  # of one rank, and of the others
    "window": ({"kernel_size": 3, "dilation": 2}, {"kernel_size": 5}),  # whose halos have equal sizes
    "scale": ({"kernel_size": 5, "scale": 0.5}, {"kernel_size": 5}),
    "halos": ({"kernel_size": 5}, {"kernel_size": 9}),
    "transport": ({"kernel_size": 5, "transport": "p2p"}, {"kernel_size": 5}),
    "new": ({"kernel_size": 5, "edge": "wrap"}, {"kernel_size": 5}),
    "word": ({"kernel_size": 5, "edge": "bent"}, {"kernel_size": 5}),
    "shard": ({"kernel_size": 5, "short": 1}, {"kernel_size": 5}),
    "dtype": ({"kernel_size": 5, "dtype": torch.float8_e4m3fn}, {"kernel_size": 5}),
    "text": ({"kernel_size": 5, "text": 3}, {"kernel_size": 5}),
}


def check_disagreements(ranks: int) -> dict[str, list[str]]:
    """What ranks say of a call with arguments of which each set was agreed on before (but "new" and wrong ones), where
    one rank has another set than the others. After that a call goes well."""
    rank, (mesh, dims) = dist.get_rank(), mesh_of([2, 2] if ranks == 4 else [ranks])
    x, text = torch.randn(1, *[12] * len(dims), 2, 8), torch.randn(1, 3, 2, 8)
    where = {"mesh": mesh, "dims": dims, "grid": [12 * mesh.size(i) for i in range(len(dims))], "mode": "halo"}

    def call(
        own: torch.Tensor = x, short: int = 0, dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> torch.Tensor:
        own = own[:, short:].to(dtype)
        if (tokens := arguments.pop("text", 0)) == 0:
            return context_parallel_attention(own, own, own, **where, **arguments)
        return context_parallel_joint_attention(own, own, own, *[text[:, :tokens]] * 3, **where, **arguments)[0]

    said: dict[str, list[str]] = {}
    for i, (name, (odd, others)) in enumerate(DISAGREEMENTS.items()):
        want = call(**others)
        if name not in ("new", "word", "shard", "dtype"):
            call(**odd)
        words = ""
        try:
            call(**(odd if rank == i % ranks else others))
        except (RankError, ValueError) as error:
            words = f"{type(error).__name__}: {error}"
        said[name] = [""] * ranks
        dist.all_gather_object(said[name], words)
        leaf = x.clone().requires_grad_()
        got = call(leaf, **others)
        got.sum().backward()
        assert torch.equal(got, want) and leaf.grad is not None, name
    return said


def check_comparisons(ranks: int) -> None:
    """To compare arguments a later call makes one collective of 16 bytes on CPUs, and none on GPUs."""
    (mesh, dims), made = mesh_of([ranks]), []
    reduce, gather, x = dist.all_reduce, dist.all_gather_object, torch.randn(1, 4, 2, 8)

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        made.append(tensor.nbytes)
        return reduce(tensor, *args, **options)

    def counted_gather(*args: Any, **options: Any) -> Any:
        made.append(0)
        return gather(*args, **options)

    where = {"mesh": mesh, "dims": dims, "grid": 4 * ranks}
    context_parallel_attention(x, x, x, 3, **where)
    dist.all_reduce, dist.all_gather_object = counted, counted_gather
    try:
        context_parallel_attention(x, x, x, 3, **where)
        assert made == [16], made
        group = mesh_of([ranks])[0].get_group()
        agree({"kernel_size": 3}, Caller("f", group, "cuda"))
        assert made == [16, 0], made
        if dist.get_rank() == 0:  # the others have gone on
            agree({"kernel_size": 3}, Caller("f", group, "cuda"))
        assert made == [16, 0], made
        for known in (False, True):  # by a comparison, ranks have the same number again
            numbers: list[Any] = [None] * ranks
            gather(numbers, agree({"kernel_size": 3}, Caller("f", group, "cpu")).number)
            assert len(set(numbers)) == 1, (known, numbers)
        made.clear()
        narrow = x.to(torch.float8_e4m3fn)
        for function in (context_parallel_attention, plan):  # both refuse it on all ranks, when they have said so
            try:
                function(narrow, narrow, narrow, 3, **where)
            except ValueError as error:
                assert "dtype: tokens of e4m3 can't be divided" in str(error), error
            else:
                raise AssertionError("e4m3")
        assert made == [16, 0] * 2, made
        assert (Caller("f", group, "cpu").compares, Caller("f", group, "cuda").compares) == (True, False)
    finally:
        dist.all_reduce, dist.all_gather_object = reduce, gather


def check_orders(ranks: int, mode: str) -> dict[str, list[str]]:
    """Rank 1 runs the backward passes of two calls, with halos of equal sizes, in the other order; or a forward pass in
    place of one, with right or wrong arguments. Gives the words of all ranks' errors; gradients are right before and
    after."""
    mesh, dims = mesh_of([ranks])
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, 6, 2 * ranks, 8, generator=generator, requires_grad=True)
    more = {"mesh": mesh, "dims": dims, "grid": 6 * ranks, "mode": mode}
    text = torch.randn(1, 2, 2 * ranks, 8, generator=torch.Generator().manual_seed(9), requires_grad=True)

    def call(window: int, skipped: int = 0, **others: Any) -> torch.Tensor:
        own = x[:, skipped:]
        out = context_parallel_attention(own, own, own, window, 1, 1, False, None, text, text, **more, **others)
        return out.square().sum()

    def gradient() -> torch.Tensor:
        found = torch.autograd.grad(call(5), (x, text))
        return torch.cat([each.flatten() for each in found])

    before, found = gradient(), {}
    for kind, options in {"order": {}, "forward": {}, "shard": {"skipped": 1}, "word": {"edge": "bent"}}.items():
        losses = call(5), call(5)
        try:
            if dist.get_rank() != 1:
                torch.autograd.grad(losses[0], (x, text))
            elif kind == "order":
                torch.autograd.grad(losses[1], (x, text))
            else:
                call(5, **options)
            word = "nothing"
        except (RankError, ValueError) as error:
            word = str(error)
        words: list[Any] = [None] * ranks
        dist.all_gather_object(words, word)
        found[kind] = words
    assert torch.equal(gradient(), before)
    return found


def check_fault(kind: str, ranks: int) -> tuple[str, float]:
    """Something is wrong with rank 1. Gives the words of this rank's error, and seconds until it came."""
    rank, (mesh, dims) = dist.get_rank(), mesh_of([2, 2] if kind == "hybrid" else [ranks])
    x = torch.randn(1, *[4] * len(dims), 2, 8, requires_grad=kind == "backward")
    where = {"mesh": mesh, "dims": dims, "grid": (8, 8) if kind == "hybrid" else 4 * ranks}
    where |= {"mode": "hybrid", "by_heads": ("axis1",)} if kind == "hybrid" else {"mode": "halo"}

    def call(window: Any = 3, tokens: int = 4, **options: Any) -> torch.Tensor:
        own = x if tokens == 4 else torch.randn(1, tokens, 2, 8)
        return context_parallel_attention(own, own, own, window, **where, **options)

    odd = rank == 1
    if kind not in ("window", "shard", "word", "lengths", "text lengths"):
        call()
        call(5)
    dist.barrier()
    begin = time.monotonic()
    try:
        if kind == "window":
            call(3 if odd else 5)
        elif kind in ("shard", "later shard"):
            call(tokens=3 if odd else 4)
        elif kind == "word":
            call(edge="bent" if odd else "cut")
        elif kind == "lengths":
            lengths = torch.tensor([2], dtype=torch.int64 if odd else torch.int32)
            extra = torch.randn(1, 3, 2, 8)
            call(additional_keys=extra, additional_values=extra, additional_lengths=lengths)
        elif kind == "text lengths":
            text, lengths = torch.randn(1, 3, 2, 8), torch.tensor([2], dtype=torch.int32)
            context_parallel_joint_attention(
                x, x, x, text, text, text, 3, **where, text_lengths=None if odd else lengths
            )
        elif kind == "backward":
            out = call()
            if odd:
                kernels.backward = _no_memory
            out.sum().backward()
            call()  # for ranks that had all they need of rank 1 already
        elif kind == "hybrid":
            call(kernel="gna_forward-cpu-r2-fp32-dany-q1x1-kv1x1" if odd else None)
            call()
        elif kind == "kernel":
            call(kernel="gna_forward-cpu-r1-fp32-dany-q1-kv1" if odd else None)
            call()  # for ranks that had all they need of rank 1 already
        elif kind in ("death", "caught"):
            if kind == "caught":  # of an error that ranks have caught nothing is said later
                with contextlib.suppress(NoKernelError):
                    call(kernel="gna_forward-cpu-r1-fp32-dany-q1-kv1")
                call()
            if odd:
                os.kill(os.getpid(), signal.SIGKILL)
            call()
        else:
            if odd:
                time.sleep(TIMEOUT_OF_FAULTS + 6)
            call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "", time.monotonic() - begin


def _no_memory(*_: Any) -> None:
    raise RuntimeError("out of memory")


def run_jobs(jobs: list[dict[str, Any]]) -> list[Any]:
    found = []
    for job in jobs:
        arguments = dict(job)
        try:
            found.append(globals()[arguments.pop("name")](**arguments))
        except Exception:
            print(f"rank {dist.get_rank()}: {job}", file=sys.stderr)
            raise
    return found


def run_rank(rank: int, ranks: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    count_traffic()
    faults = jobs[0]["name"] == "check_fault"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_OF_FAULTS if faults else TIMEOUT),
    )
    (folder / f"results{rank}").write_text(json.dumps(run_jobs(jobs)))
    if faults:
        os._exit(0)  # what was wrong may hold up a group's end
    dist.barrier()
    MESHES.clear()
    dist.destroy_process_group()


class Set:
    """Processes that run jobs together."""

    def __init__(self, ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
        self.jobs, self.folder, self.children = jobs, folder, []
        folder.mkdir()
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run_rank(rank, ranks, folder, jobs)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            self.children.append(child)

    def results(self) -> list[Any]:
        """Rank 0's, by job; of faults those of all ranks, None of one that died."""
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        files = [self.folder / f"results{rank}" for rank in range(len(self.children))]
        if self.jobs[0]["name"] == "check_fault":
            return [[json.loads(file.read_text())[0] if file.exists() else None for file in files]]
        if any(statuses):
            raise SystemExit(f"{len(self.children)} processes ended with {statuses}")
        return json.loads(files[0].read_text())


def main() -> None:
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    # Faults have sets of their own, which mostly wait; so they all begin at once.
    faults = [i for i, job in enumerate(jobs) if job["name"] == "check_fault"]
    found: list[Any] = [None] * len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        apart = {i: Set(jobs[i]["ranks"], [jobs[i]], Path(folder) / str(i)) for i in faults}
        others = [i for i in range(len(jobs)) if i not in apart]
        for ranks, some in groupby(others, key=lambda i: jobs[i]["ranks"]):
            numbers = list(some)
            results = Set(ranks, [jobs[i] for i in numbers], Path(folder) / f"of {numbers[0]}").results()
            for i, result in zip(numbers, results, strict=True):
                found[i] = result
        for i, one in apart.items():
            (found[i],) = one.results()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
