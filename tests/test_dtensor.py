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

ENDS = torch.tensor([0, 10, 30])

def attend(*tensors, window=3, **arguments):
    return gnaforge.na2d(*tensors, window, return_lse=True, **arguments)

COUNTS = torch.tensor([8, 0, 3, 5], dtype=torch.int32)

def joint_of(q, k, lengths):
    q, k = q.flatten(1, 2), k.flatten(1, 2)
    settings = {"grid": (8, 8), "prefix": 8, "lengths": lengths, "kernel_size": 3}
    return gnaforge.joint_attention(q, k, k, **settings, return_lse=True)

def apart_of(q, k, lengths):
    return gnaforge.joint_attention(q, k, k, q[:, 0], k[:, 0], k[:, 0], text_lengths=lengths, kernel_size=3)

def main():
    before = torch.randn(1, 9, 8, 1, 16)
    if EARLY:
        attend(before, before, before)  # the core is there before DTensor
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from gnaforge.runtime.sharding import on_mesh
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    places = {"batch": Shard(0), "tokens": Shard(1), "heads": Shard(3), "whole": Replicate(), "heads at 2": Shard(2)}
    names = {str(place): name for name, place in places.items()}

    def spread(shape, *along, seed=0):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return distribute_tensor(whole, mesh, [places[name] for name in along])

    def case(heads, kv_heads, query, key, batch=4, window=3):
        kinds = (heads, query), (kv_heads, key), (kv_heads, key)
        tensors = [spread((batch, 9, 8, n, 16), *along, seed=i) for i, (n, along) in enumerate(kinds)]
        results = attend(*tensors, window=window)
        whole = attend(*(tensor.full_tensor() for tensor in tensors), window=window)
        for got, want in zip(results, whole, strict=True):
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
    def same_gradients(part, *differentiated):
        found = []
        for given in (x, x.full_tensor()):
            leaves = [given.detach().clone().requires_grad_(i in differentiated) for i in range(3)]
            attend(*leaves)[part].square().sum().backward()
            found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
        return all(torch.equal(own.full_tensor(), want) for own, want in zip(*found))

    said["gradients"] = [same_gradients(part, *which) for part in (0, 1) for which in ((0, 1, 2), (0,), (1, 2))]
    def same_gradients_of(call, tensors):
        found = []
        for given in (tensors, [x.full_tensor() for x in tensors]):
            leaves = [x.detach().clone().requires_grad_() for x in given]
            sum(result.square().sum() for result in call(*leaves)).backward()
            found.append([leaf.grad for leaf in leaves])
        return all(torch.equal(own.full_tensor(), want) for own, want in zip(*found))

    said["differentiable"] = words(lambda: attend(x.detach().requires_grad_(), x, x)[0].requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        said["autocast"] = str(attend(x, x, x.bfloat16())[0].dtype)
    compiled = torch.compile(lambda q: attend(q, q, q)[0], backend="aot_eager", fullgraph=True)
    said["compiled"] = torch.equal(compiled(x).full_tensor(), attend(x, x, x)[0].full_tensor())
    own = [(3, 3), (5, 5), (9, 3), (1, 8)]
    said["heads of their own"] = case(4, 4, ("batch", "heads"), ("batch", "heads"), window=own)
    long = [spread((2, 30, n, 16), "batch", "heads at 2", seed=n) for n in (4, 2, 2)]
    ways = {
        "packed": lambda *x: torch.ops.gnaforge.forward_varlen(*x, 2, [3, 4, 6, 3], [3, 3, 1, 1, 1, 1, 0, 0]),
        "lengths": lambda *x: torch.ops.gnaforge.attention_varlen(*x, *map(on_mesh, [ENDS] * 2, x), True),
    }
    rows = [spread((4, 5, 2, 16), "batch", "heads at 2", seed=n) for n in (5, 6)]
    ways["packed with extra keys"] = lambda q, k, v, *extra: torch.ops.gnaforge.forward_varlen(
        q, k, v, 2, [3, 4, 6, 3], [3, 3, 1, 1, 1, 1, 0, 0], None, "", *(extra or rows_like(q))
    )
    rows_like = lambda q: rows if hasattr(q, "full_tensor") else [x.full_tensor() for x in rows]
    for name, call in ways.items():
        results = call(*long)
        for got, want in zip(results, call(*(x.full_tensor() for x in long)), strict=True):
            assert torch.equal(got.full_tensor(), want), name
        said[name] = [names[str(place)] for place in results[0].placements]
    one = [spread((1, 30, 4, 16), "whole", "heads at 2")] * 3
    lengths = {"seqlens_Q": [10, 20], "seqlens_KV": [10, 20]}
    want = gnaforge.attention(*(x.full_tensor() for x in one), **lengths)
    assert torch.equal(gnaforge.attention(*one, **lengths).full_tensor(), want)
    extra = [distribute_tensor(torch.randn(4, 5, 4, 16), mesh, [Shard(0), Shard(2)]) for _ in range(2)]
    forward, pattern = torch.ops.gnaforge.forward, [3, 3, 1, 1, 1, 1, 0, 0]
    got, want = (
        forward(*[given[0]] * 3, pattern, None, "", *given[1:])[0]
        for given in ([x, *extra], [y.full_tensor() for y in (x, *extra)])
    )
    said["extra keys"] = torch.equal(got.full_tensor(), want)
    with torch.no_grad():
        packed = x.flatten(1, 2)
        joint = gnaforge.joint_attention(packed, packed, packed, grid=(8, 8), prefix=8, kernel_size=3)
        said["joint places"] = [names[str(place)] for place in joint.placements]
        whole = packed.full_tensor()
        want = gnaforge.joint_attention(whole, whole, whole, grid=(8, 8), prefix=8, kernel_size=3)
        said["joint"] = torch.equal(joint.full_tensor(), want)
        apart = [*[x] * 3, *[x[:, 0]] * 3]
        results = gnaforge.joint_attention(*apart, kernel_size=3, return_lse=True)
        wanted = gnaforge.joint_attention(*(y.full_tensor() for y in apart), kernel_size=3, return_lse=True)
        said["apart"] = all(torch.equal(got.full_tensor(), want) for got, want in zip(results, wanted))
        one = x, spread((4, 9, 8, 1, 16), "batch", "whole"), distribute_tensor(COUNTS, mesh, [Shard(0), Replicate()])
        for name, run in (("joint", joint_of), ("apart", apart_of)):
            results, wanted = (run(*tensors) for tensors in (one, [y.full_tensor() for y in one]))
            same = all(torch.equal(got.full_tensor(), want) for got, want in zip(results, wanted))
            said[f"{name} of one head of keys"] = [same, *(names[str(p)] for out in results for p in out.placements)]

    def attend_packed(*tensors):
        return (gnaforge.joint_attention(*tensors, grid=(8, 8), prefix=8, kernel_size=3),)

    said["further gradients"] = [
        same_gradients_of(attend_packed, [packed] * 3),
        same_gradients_of(lambda *tensors: gnaforge.joint_attention(*tensors, kernel_size=3), apart),
        *(same_gradients_of(call, long) for call in ways.values()),
        same_gradients_of(ways["packed with extra keys"], [*long, *rows]),
    ]
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
    assert "heads" not in said["heads of their own"]
    assert said["packed"] == said["lengths"] == said["packed with extra keys"] == ["batch", "heads at 2"]
    assert said["bad"].startswith("ValueError: kernel_size 300 times dilation 1 exceeds the 9 tokens along dim 0")
    assert said["gradients"] == [True] * 6 and said["further gradients"] == [True] * 6
    assert said["differentiable"] == "True" and said["autocast"] == "torch.bfloat16" and said["compiled"] is True
    assert said["extra keys"] is said["joint"] is said["apart"] is True
    assert said["joint places"] == ["batch", "heads at 2"]
    assert said["joint of one head of keys"] == [True] + ["batch", "heads at 2"] * 2
    assert said["apart of one head of keys"] == [True, "batch", "heads", "batch", "heads at 2"]


def test_nobody_imports_dtensor_for_it(kernel_set, forked) -> None:
    done = forked(
        "import sys, torch, gnaforge\n"
        "x = torch.randn(1, 9, 8, 1, 16)\n"
        "gnaforge.na2d(x, x, x, 3)\n"
        "print('torch.distributed.tensor' in sys.modules)\n"
    )
    assert done.stdout == "False\n", done.stderr
