"""Neighborhood attention of PhysicsNeMo's ShardTensors on gloo processes: ``physicsnemo_ranks.py RESULTS``.

Every function of it runs on all ranks of its set, which are forked from one process that has imported the package.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

import gnaforge.models.natten
import torch
import torch.distributed as dist
from gnaforge.models import physicsnemo as adapter

gnaforge.models.natten.install()

import physicsnemo.nn.functional.natten as functional  # noqa: E402
from physicsnemo.domain_parallel import ShardTensor  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import Partial, Replicate, Shard  # noqa: E402

TENSORS = "query", "key", "value"


def sizes_of(rng: Random, tokens: int, parts: int) -> list[int]:
    """Shards of any sizes, none of them empty."""
    cuts = sorted(rng.sample(range(1, tokens), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]


def random_call(seed: int, ranks: int) -> dict[str, Any]:
    """Shapes, windows, and the tensor dimension that each mesh dimension divides."""
    rng = Random(f"{seed} {ranks}")
    rank = rng.choice((1, 2, 2, 3))
    tokens = [rng.randint(*{1: (20, 60), 2: (9, 16), 3: (6, 9)}[rank]) for _ in range(rank)]
    window = [rng.randint(2, n) for n in tokens]
    window[0] = min(window[0], tokens[0] // 2)
    stride = [rng.choice((1, rng.randint(1, w))) for w in window]
    dilation = [rng.randint(1, n // w) for w, n in zip(window, tokens, strict=True)]
    mesh = (2, 2) if ranks == 4 and rng.random() < 0.7 else (ranks,)
    axes = sorted(rng.sample(range(1, rank + 1), min(len(mesh), rank)))
    axes = ([rng.choice((0, rank + 1))] if len(axes) < len(mesh) else []) + axes
    return {
        "shape": (2, *tokens, 4, rng.choice((8, 16))),
        "value": rng.choice((8, 24)),
        "windows": {
            "stride": stride,
            "dilation": dilation,
            "is_causal": [rng.random() < 0.3 for _ in window],
            "scale": rng.choice((None, 0.3)),
        },
        "window": window,
        "mesh": mesh,
        "axes": axes,
        "sizes": [sizes_of(rng, (2, *tokens, 4)[axis], parts) for axis, parts in zip(axes, mesh, strict=True)],
        "lse": rng.random() < 0.5,
        "extra": rng.random() < 0.3 and all(1 <= axis <= rank for axis in axes),
    }


def shard(whole: torch.Tensor, mesh: DeviceMesh, axes: list[int], sizes: list[list[int]]) -> ShardTensor:
    """A leaf, of this rank's part."""
    local, shapes = whole, {}
    for mesh_dim, (axis, own) in enumerate(zip(axes, sizes, strict=True)):
        local = local.split(own, axis)[mesh.get_local_rank(mesh_dim)]
    for mesh_dim, (axis, own) in enumerate(zip(axes, sizes, strict=True)):
        shapes[mesh_dim] = tuple((*local.shape[:axis], n, *local.shape[axis + 1 :]) for n in own)
    placements = [Shard(axis) for axis in axes]
    found = ShardTensor.from_local(local.clone(), mesh, placements, shapes)
    return found.detach().requires_grad_()


def check_random(seed: int, ranks: int) -> dict[str, Any]:
    """Compares a call and its gradients with the same function of plain tensors."""
    call = random_call(seed, ranks)
    shape, windows, names = call["shape"], dict(call["windows"]), ("a", "b")[: len(call["mesh"])]
    mesh = init_device_mesh("cpu", call["mesh"], mesh_dim_names=names)
    generator = torch.Generator().manual_seed(seed)
    whole = {n: torch.randn(shape, generator=generator) for n in TENSORS}
    whole["value"] = torch.randn(*shape[:-1], call["value"], generator=generator)
    out_gradient = torch.randn(*shape[:-1], call["value"], generator=generator)
    extra = {
        f"additional_{n}s": torch.randn(2, 3, 4, whole[n].shape[-1], generator=generator)
        for n in ("key", "value")
        if call["extra"]
    }
    function = getattr(functional, f"na{len(shape) - 3}d")

    def run(tensors: dict[str, Any], gradient: Any, more: dict[str, Any]) -> dict[str, Any]:
        found = function(*tensors.values(), call["window"], **windows, **more, return_lse=call["lse"])
        out, lse = found if call["lse"] else (found, None)
        out.backward(gradient)
        results = {"out": out.detach(), **{n: x.grad for n, x in tensors.items()}}
        results |= {n: x.grad for n, x in more.items()}
        return results if lse is None else {**results, "lse": lse.detach()}

    leaves = {n: x.clone().requires_grad_() for n, x in whole.items()}
    want = run(leaves, out_gradient, {n: x.clone().requires_grad_() for n, x in extra.items()})
    places = {"mesh": mesh, "axes": call["axes"], "sizes": call["sizes"]}
    more = {
        n: ShardTensor.from_local(x.clone(), mesh, [Replicate()] * mesh.ndim, {}).detach().requires_grad_()
        for n, x in extra.items()
    }
    got = run({n: shard(x, **places) for n, x in whole.items()}, shard(out_gradient, **places).detach(), more)
    errors = {}
    for name, expected in want.items():
        own = got[name]
        assert isinstance(own, ShardTensor), (name, type(own))
        if name == "out":
            assert own.placements == tuple(Shard(axis) for axis in call["axes"])
            assert tuple(own.shape) == tuple(expected.shape)
        gathered = own.full_tensor()
        errors[name] = float((gathered - expected).abs().max() / expected.abs().max())
    assert max(errors.values()) < 1e-5, (errors, call)
    return {"error": max(errors.values()), "window": call["window"], **{n: windows[n] for n in ("stride", "dilation")}}


def check_refusals(ranks: int) -> dict[str, str]:
    """Messages of what can't be; nothing hangs, and a call after them goes well."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("a",))
    x = torch.randn(1, 12, 2, 8)
    own = shard(x, mesh, [1], [[6, 6]])
    channels, partial = shard(x, mesh, [3], [[4, 4]]), ShardTensor.from_local(x, mesh, [Partial()], {})
    heads = shard(x, mesh, [2], [[1, 1]])

    def words(call: Any) -> str:
        try:
            call()
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    found = {
        "plain key": words(lambda: functional.na1d(own, x, own, 3)),
        "two dims": words(lambda: functional.na2d(own, own, own, 3)),
        "channels": words(lambda: functional.na1d(channels, channels, channels, 3)),
        "partial": words(lambda: functional.na1d(partial, partial, partial, 3)),
        "apart": words(lambda: functional.na1d(own, heads, heads, 3)),
        "unknown": words(lambda: functional.na1d(own, own, own, 3, rpb=None)),
        "window": words(lambda: functional.na1d(own, own, own, 13)),
        "option": words(lambda: adapter.install(grid=3)),
    }
    adapter.install(mode="ulysses", transport="p2p")
    got = functional.na1d(own, own, own, 4, backend="hopper-fna").full_tensor()
    adapter.install()
    assert torch.allclose(got, functional.na1d(x, x, x, 4), atol=1e-5)
    return found


JOBS = [(check_random, n, {"seed": seed}) for n, count in ((2, 8), (3, 8), (4, 12)) for seed in range(count)]
JOBS += [(check_refusals, 2, {})]


def main(results: Path) -> None:
    """Runs each job on as many processes as it wants, and writes what rank 0 returns."""
    adapter.install()
    found: list[Any] = []
    for count in (2, 3, 4):
        jobs = [job for job in JOBS if job[1] == count]
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(count):
                if not (child := os.fork()):
                    os._exit(run(rank, count, jobs, Path(folder)))
                children.append(child)
            ends = [os.waitpid(child, 0)[1] for child in children]
            if any(ends):
                sys.exit(1)
            found += json.loads((Path(folder) / "results").read_text())
    results.write_text(json.dumps(found))


def run(rank: int, count: int, jobs: list[Any], folder: Path) -> int:
    """One rank's part of all jobs; 0 if it went well."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), count), rank=rank, world_size=count)
        returned = [job(ranks=count, **arguments) for job, _, arguments in jobs]
        if rank == 0:
            (folder / "results").write_text(json.dumps(returned))
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
