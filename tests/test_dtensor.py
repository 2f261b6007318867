"""DTensors: four processes compute one call, each its share of batch and heads."""

from __future__ import annotations

import json
from typing import Any

import pytest

RANKS = """
import json, os, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
import gnaforge
warnings.simplefilter("ignore")
torch.set_num_threads(1)

def attend(*tensors, **arguments):
    return gnaforge.na2d(*tensors, 3, return_lse=True, **arguments)

def main():
    before = torch.randn(1, 9, 8, 1, 16)
    if EARLY:
        attend(before, before, before)  # the core is there before DTensor
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    places = {"batch": Shard(0), "tokens": Shard(1), "heads": Shard(3), "whole": Replicate()}
    names = {str(place): name for name, place in places.items()}

    def spread(shape, *along, seed=0):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return distribute_tensor(whole, mesh, [places[name] for name in along])

    def case(heads, kv_heads, query, key, batch=4):
        kinds = (heads, query), (kv_heads, key), (kv_heads, key)
        tensors = [spread((batch, 9, 8, n, 16), *along, seed=i) for i, (n, along) in enumerate(kinds)]
        results = attend(*tensors)
        for got, want in zip(results, attend(*(tensor.full_tensor() for tensor in tensors)), strict=True):
            assert torch.equal(got.full_tensor(), want), (heads, kv_heads, query, key)
        out, lse = ([names[str(place)] for place in result.placements] for result in results)
        assert out == lse
        return out

    def words(call):
        try:
            return str(call())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    said = {name: case(*arguments) for name, arguments in CASES.items()}
    x = spread((4, 9, 8, 4, 16), "batch", "heads")
    said["bad"] = words(lambda: gnaforge.na2d(x, x, x, 300))
    said["gradients"] = words(lambda: attend(x.detach().requires_grad_(), x, x)[0].sum().backward())
    said["gradients of lse"] = words(lambda: attend(x.detach().requires_grad_(), x, x)[1].sum().backward())
    said["differentiable"] = words(lambda: attend(x.detach().requires_grad_(), x, x)[0].requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        said["autocast"] = str(attend(x, x, x.bfloat16())[0].dtype)
    compiled = torch.compile(lambda q: attend(q, q, q)[0], backend="aot_eager", fullgraph=True)
    said["compiled"] = torch.equal(compiled(x).full_tensor(), attend(x, x, x)[0].full_tensor())
    extra = [distribute_tensor(torch.randn(4, 5, 4, 16), mesh, [Shard(0), Shard(2)]) for _ in range(2)]
    forward, pattern = torch.ops.gnaforge.forward, [3, 3, 1, 1, 1, 1, 0, 0]
    got, want = (
        forward(*[given[0]] * 3, pattern, None, "", *given[1:])[0]
        for given in ([x, *extra], [y.full_tensor() for y in (x, *extra)])
    )
    said["extra keys"] = torch.equal(got.full_tensor(), want)
    return said

pids = []
for rank in range(4):
    if not (pid := os.fork()):
        status = 1
        try:
            dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/store", rank=rank, world_size=4)
            said = main()
            dist.barrier()
            if rank == 0:
                Path("said").write_text(json.dumps(said))
            status = 0
        finally:
            os._exit(status) if status == 0 else (__import__("traceback").print_exc(), os._exit(status))
    pids.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
print(Path("said").read_text())
"""

CASES: dict[str, tuple[Any, ...]] = {
    # heads of Q, of K and V; placements of Q, of K and V
    "batch and heads": (4, 4, ("batch", "heads"), ("batch", "heads")),
    "heads over the whole mesh": (8, 4, ("heads", "heads"), ("heads", "heads")),
    "grouped heads": (8, 2, ("batch", "heads"), ("batch", "heads")),
    "fewer groups than devices": (8, 2, ("heads", "heads"), ("heads", "heads")),
    "one head of K for all": (8, 1, ("batch", "heads"), ("batch", "whole")),
    "groups that devices would split": (6, 3, ("batch", "heads"), ("batch", "whole")),
    "as many heads, unevenly": (3, 3, ("batch", "heads"), ("batch", "heads")),
    "batch, unevenly": (2, 2, ("batch", "whole"), ("batch", "whole"), 3),
    "tokens": (4, 4, ("tokens", "batch"), ("tokens", "batch")),
}
PLACED = {
    "batch and heads": ["batch", "heads"],
    "heads over the whole mesh": ["heads", "heads"],
    "grouped heads": ["batch", "heads"],
    "one head of K for all": ["batch", "heads"],
    "as many heads, unevenly": ["batch", "heads"],
    "batch, unevenly": ["batch", "whole"],
}


@pytest.mark.parametrize("early", [True, False], ids=["core first", "DTensor first"])
def test_each_device_computes_its_share(kernel_set, forked, early: bool) -> None:
    """All results are those of one device; where the placements allow it, nothing is moved for them."""
    done = forked(f"EARLY, CASES = {early}, {CASES!r}\n{RANKS}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: said[name] for name in PLACED} == PLACED
    assert "heads" not in said["groups that devices would split"] and "tokens" not in said["tokens"]
    assert said["fewer groups than devices"].count("heads") == 1
    assert said["bad"].startswith("ValueError: kernel_size 300 times dilation 1 exceeds the 9 tokens along dim 0")
    for name in ("gradients", "gradients of lse"):
        assert "this version has no backward kernels" in said[name]
    assert said["differentiable"] == "True" and said["autocast"] == "torch.bfloat16" and said["compiled"] is True
    assert said["extra keys"] is True


def test_nobody_imports_dtensor_for_it(kernel_set, forked) -> None:
    done = forked(
        "import sys, torch, gnaforge\n"
        "x = torch.randn(1, 9, 8, 1, 16)\n"
        "gnaforge.na2d(x, x, x, 3)\n"
        "print('torch.distributed.tensor' in sys.modules)\n"
    )
    assert done.stdout == "False\n", done.stderr
