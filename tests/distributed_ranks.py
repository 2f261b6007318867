"""Runs jobs on sets of gloo processes, forked from one that has imported torch: ``distributed_ranks.py JOBS RESULTS``.

A job is {"name": function, "ranks": processes, ...}; those in a row with as many processes share them. Results are what
rank 0 returns, in order.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
import traceback
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from gnaforge import joint_attention, neighborhood_attention
from gnaforge.distributed import context_parallel_attention, context_parallel_joint_attention, plan
from gnaforge.distributed.layout import Shards, bounds_of
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import random_problem, with_settings
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

FEATURES = {"edge", "block_causal", "sink", "extra_keys"}
TIMEOUT = 60


def random_call(seed: int, ranks: int) -> tuple[Problem, list[int], list[list[int]], dict[str, Any]]:
    """A problem of any kind, ranks along each axis, sizes of shards, and options."""
    rng = Random(f"{ranks} {seed}")
    while True:  # most are so small that nothing could be divided
        problem = random_problem(rng, max_tokens=600)
        if rng.random() < 0.8:
            problem = with_settings(problem, rng, 600, FEATURES)
        if max(problem.tokens) > ranks and problem.token_count > 8 * ranks:
            break
    heads = rng.choice((problem.heads, problem.heads, ranks, 2 * ranks))
    kv_heads = rng.choice([n for n in (1, 2, problem.kv_heads, heads) if heads % n == 0])
    fields = {name: getattr(problem, name) for name in ("stride", "dilation", "causal", "edge", "sink", "window")}
    head_dim, value_head_dim = rng.choice(((8, 8), (16, 24), (24, 8), (32, 32)))
    extra = problem.extra_tokens[:1]
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
    longest = sorted(range(problem.rank), key=lambda axis: -problem.tokens[axis])
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


TRAFFIC = {"bytes": 0}


def count_traffic() -> None:
    """Counts what is handed to the transport for other ranks."""
    plain, batch = dist.all_to_all_single, dist.batch_isend_irecv

    def counted(out: Any, parts: Any, received: Any, sent: Any, group: Any = None, async_op: bool = False) -> Any:
        own = dist.get_rank(group)
        TRAFFIC["bytes"] += sum(n for r, n in enumerate(sent) if r != own) * parts.element_size()
        return plain(out, parts, received, sent, group=group, async_op=async_op)

    def counted_batch(operations: Any) -> Any:
        TRAFFIC["bytes"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return batch(operations)

    dist.all_to_all_single, dist.batch_isend_irecv = counted, counted_batch


def mesh_of(parts: list[int]) -> tuple[DeviceMesh, list[str | None]]:
    names = [f"axis{i}" for i, count in enumerate(parts) if count > 1]
    mesh = init_device_mesh("cpu", tuple(c for c in parts if c > 1), mesh_dim_names=tuple(names))
    return mesh, [f"axis{i}" if count > 1 else None for i, count in enumerate(parts)]


MESHES: dict[tuple[int, ...], Any] = {}


def check_random(seed: int, ranks: int, again: bool = False) -> dict[str, Any]:
    """Compares a random call with the undivided one, results and gradients, and its bytes with the formula."""
    problem, parts, sizes, options = random_call(seed, ranks)
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
    got = differentiate(context_parallel_attention, local, arguments)
    if again:
        for name, tensor in differentiate(context_parallel_attention, local, arguments).items():
            assert torch.equal(tensor, got[name]), f"{name} differs from run to run"
    if options["extra_grad"] == "partial":
        for name in INPUTS[3:]:
            if name in got:
                dist.all_reduce(got[name])
    every: list[Any] = [None] * ranks
    dist.gather_object((box, got, counted), every if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return {}
    want = differentiate(neighborhood_attention, whole, windows)
    errors, equal = {}, {}
    for name, tensor in want.items():
        worst, same = 0.0, True
        for own, results, _ in every:
            here = tensor if name.startswith("additional") else cut(tensor, own)
            assert here.shape == results[name].shape, (name, here.shape, results[name].shape)
            if here.numel():
                worst = max(worst, float((here - results[name]).abs().max() / tensor.abs().max()))
                same = same and torch.equal(here, results[name])
        errors[name], equal[name] = worst, same
    assert max(errors.values()) < 1e-4, (errors, str(problem), sizes, options)
    return {
        "mode": planned.mode,
        "error": max(errors.values()),
        "equal": equal,
        "problem": str(problem),
        "sizes": sizes,
        "options": options,
        "bytes": [n for *_, n in every],
        "deep": planned.peers,
    }


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
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    results = run_jobs(jobs)
    if rank == 0:
        (folder / "results").write_text(json.dumps(results))
    dist.barrier()
    MESHES.clear()
    dist.destroy_process_group()


def run_set(ranks: int, jobs: list[dict[str, Any]]) -> list[Any]:
    """Forks processes, and gives rank 0's results."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run_rank(rank, ranks, Path(folder), jobs)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(statuses):
            raise SystemExit(f"{ranks} processes ended with {statuses}")
        return json.loads((Path(folder) / "results").read_text())


def main() -> None:
    jobs, results = (Path(name) for name in sys.argv[1:])
    found: list[Any] = []
    for ranks, some in groupby(json.loads(jobs.read_text()), key=lambda job: job["ranks"]):
        found += run_set(ranks, list(some))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
