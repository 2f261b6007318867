"""Gradients on cpu: the kernels against exact ones, autograd's ways to ask for them, and models that train."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gnaforge
import oracle
import pytest
import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import InputError
from gnaforge.families import family_of
from gnaforge.runtime import training
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.errors import NoKernelError
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel
from gnaforge.verification.problems import with_settings
from gnaforge.verification.runs import KernelRuns
from kernel_set import BACKWARD_CONFIGS
from test_patterns import attend

pytestmark = pytest.mark.usefixtures("kernel_set")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def random_problem(config: KernelConfig, seed: int) -> Problem:
    """Of any kind that the kernel takes."""
    rng = Random(f"{config} {seed}")
    heads = rng.choice((1, 2, 4))
    problem = Problem((1,) * config.rank, 1, heads=heads, kv_heads=rng.choice((1, heads)), batch=rng.randint(1, 2))
    problem = replace(problem, head_dim=rng.choice((8, 24, 40)), value_head_dim=rng.choice((8, 16)))
    features = {*family_of(config).features} - {"accumulate", "delta", "deterministic"}  # extra keys among them
    return replace(with_settings(problem, rng, 200, features), dtype=config.dtype, scale=rng.choice((None, 0.0, -0.4)))


def run_random_problems(count: int) -> None:
    """Compares every kernel with exact gradients, in every layout, poisoned, twice for the same bits."""
    for config, library in find_libraries(BACKWARD_CONFIGS).items():
        runs = KernelRuns(Kernel(library, config.key), None, rounds_probabilities=False)
        for seed in range(count):
            layout = ("contiguous", "gapped", "heads first", "every second token", "packed")[seed % 5]
            runs.verify(random_problem(config, seed), seed, layout, None, repeats=1, poison=("others", "beyond"))


def test_random_problems() -> None:
    run_random_problems(10)


@pytest.mark.survey
def test_two_thousand_random_problems() -> None:
    run_random_problems(2000 // len(BACKWARD_CONFIGS))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so this runs random problems in another one."""
    environment = {**os.environ, "GNAFORGE_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    code = "import test_backward; test_backward.run_random_problems(4)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# The reference


def dense(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in plain torch, which differentiates it."""
    mask = torch.from_numpy(oracle.mask(problem).copy())
    group = problem.heads // problem.kv_heads
    q, k, v = (
        x.flatten(1, -3).transpose(1, 2) for x in (q, k.repeat_interleave(group, -2), v.repeat_interleave(group, -2))
    )
    scores = ((q @ k.mT) * problem.score_scale).masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    lse = scores.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, problem.tokens), lse.unflatten(1, problem.tokens)


@pytest.mark.parametrize("seed", range(8))
def test_the_reference_is_what_autograd_says(seed: int) -> None:
    problem = random_problem(BACKWARD_CONFIGS[4], seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(role.shape(problem)).requires_grad_() for role in OPS["gna_forward"].inputs)
    out, lse = dense(problem, q, k, v)
    grad_out, grad_lse = draw(out.shape), draw(lse.shape)
    wanted = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))
    named = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "grad_out": grad_out, "grad_lse": grad_lse}
    named = {name: tensor.detach() for name, tensor in named.items()}
    found = OPS["gna_backward_q"].exact(problem, named) | OPS["gna_backward_kv"].exact(problem, named)
    for name, exact in zip(("grad_q", "grad_k", "grad_v"), wanted, strict=True):
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", ["gna_backward_q", "gna_backward_kv"])
def test_samples_are_parts_of_the_whole(op: str) -> None:
    problem = random_problem(BACKWARD_CONFIGS[4], 3)
    inputs = OPS[op].random_inputs(problem)
    whole = OPS[op].exact(problem, inputs)
    for token in ((0, 0), tuple(n - 1 for n in OPS[op].outputs[0].shape(problem)[1:3])):
        sample, bounds = OPS[op].sample(problem, inputs, (problem.batch - 1, *token), rounds_probabilities=False)
        for name, exact in sample.items():
            torch.testing.assert_close(exact, whole[name][(problem.batch - 1, *token)], rtol=1e-9, atol=1e-11)
            assert (bounds[name] > 0).all()


def test_wrong_gradients_would_be_noticed() -> None:
    """The bounds are tight enough to see the gradient of the log-sum-exp missing, one key too many, a head too few."""
    problem = Problem((9, 8), (3, 3), heads=4, kv_heads=2, head_dim=24)
    op_q, op_kv = OPS["gna_backward_q"], OPS["gna_backward_kv"]
    inputs = op_q.random_inputs(problem)
    exact = op_q.exact(problem, inputs) | op_kv.exact(problem, inputs)
    bounds = op_q.bound(problem, inputs, exact, rounds_probabilities=False)
    bounds |= op_kv.bound(problem, inputs, exact, rounds_probabilities=False)
    one_head = {name: tensor.clone() for name, tensor in inputs.items()}
    one_head["grad_out"][..., 1, :] = 0
    one_head["out"][..., 1, :] = 0
    one_head["grad_lse"][..., 1] = 0
    wrong = {
        "no gradient of lse": (problem, {**inputs, "grad_lse": torch.zeros_like(inputs["grad_lse"])}),
        "another window": (replace(problem, window=(3, 4)), inputs),
        "a head too few": (problem, one_head),
    }
    for name, (of, values) in wrong.items():
        found = op_q.exact(of, values) | op_kv.exact(of, values)
        noticed = [role for role in found if ((found[role] - exact[role]).abs() > bounds[role]).any()]
        assert noticed if name == "no gradient of lse" else noticed == ["grad_q", "grad_k", "grad_v"], (name, noticed)


# Autograd

Q, K, V = (torch.randn(2, 9, 8, heads, 16) for heads in (4, 2, 2))
PROBLEM = Problem((9, 8), (5, 3), (2, 1), 1, (False, True), heads=4, kv_heads=2, head_dim=16, batch=2)
WEIGHTS = torch.randn(2, 9, 8, 4, 16)


def run(q: torch.Tensor, k: torch.Tensor = K, v: torch.Tensor = V, **more: Any) -> Any:
    return gnaforge.na2d(q, k, v, (5, 3), (2, 1), is_causal=(False, True), **more)


def gradients_of(call: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad((call(*leaves) * WEIGHTS).sum(), leaves)


def twin(*tensors: torch.Tensor) -> torch.Tensor:
    return dense(PROBLEM, *tensors)[0]


def require_close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == exact.dtype and got.shape == exact.shape
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)


def test_random_calls_agree_with_the_dense_twin() -> None:
    rng, caches = Random(5), 0
    for seed in range(40):
        heads = rng.choice((1, 2, 4))
        problem = Problem((1,) * rng.randint(1, 3), 1, heads=heads, kv_heads=rng.choice((1, heads)), head_dim=16)
        problem = with_settings(problem, rng, 150, ("edge", "block_causal", "sink", "range", "kv_sink"))
        caches += any(problem.kv_sink)
        leaves = [x.requires_grad_() for x in oracle.inputs(problem, seed)]
        weights = [torch.randn(x.shape) for x in attend(problem, *leaves)]
        found = torch.autograd.grad(attend(problem, *leaves), leaves, weights)
        exact = torch.autograd.grad(dense(problem, *leaves), leaves, weights)
        for got, wanted in zip(found, exact, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), problem
    assert caches > 0


def test_a_rolling_cache() -> None:
    """Keys are the grid's first and its last. Those before the window are seen as a sink, or by no query: zeros."""
    grid = {"causal": (True,), "grid": (50,), "q_offset": (40,), "kv_offset": (31,)}
    for sink, first in ((4, 4), (2, 4), (4, 6)):
        cache = {"sink": (sink,), "kv_sink": (first,), "kv_tokens": (first + 19,)}
        problem = Problem((10,), (8,), heads=4, kv_heads=2, head_dim=16, **grid, **cache)
        leaves = [x.requires_grad_() for x in oracle.inputs(problem, 0)]
        weights = [torch.randn(x.shape) for x in attend(problem, *leaves)]
        found = torch.autograd.grad(attend(problem, *leaves), leaves, weights)
        require_close(found, torch.autograd.grad(dense(problem, *leaves), leaves, weights))
        seen = torch.from_numpy(oracle.mask(problem).copy()).any(0)
        assert not found[1][:, ~seen].any() and found[1][:, seen].any(-1).all() and (~seen).any()


def test_every_part_alone_is_what_it_is_beside_others() -> None:
    whole = gradients_of(run, Q, K, V)
    require_close(whole, gradients_of(twin, Q, K, V))
    for chosen in range(1, 7):
        tensors = [x.clone().requires_grad_(bool(chosen >> i & 1)) for i, x in enumerate((Q, K, V))]
        (run(*tensors) * WEIGHTS).sum().backward()
        for i, tensor in enumerate(tensors):
            assert torch.equal(tensor.grad, whole[i]) if chosen >> i & 1 else tensor.grad is None


def test_additional_keys() -> None:
    """Their gradients too; those beyond the lengths are 0, whatever is there."""
    extra_k, extra_v = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    for lengths in (None, torch.tensor([3, 7], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)):
        counts = [7, 7] if lengths is None else lengths.clamp(max=7).tolist()
        for entry, count in enumerate(counts):
            extra_v[entry, count:] = float("nan")

        def ours(q: Any, k: Any, v: Any, more_k: Any, more_v: Any, lengths: Any = lengths) -> torch.Tensor:
            return run(q, k, v, additional_keys=more_k, additional_values=more_v, additional_lengths=lengths)

        def exact(q: Any, k: Any, v: Any, more_k: Any, more_v: Any, counts: Any = counts) -> torch.Tensor:
            outputs = []
            for entry, count in enumerate(counts):
                one = [x[entry : entry + 1] for x in (q, k, v)]
                (out, lse), piece = dense(replace(PROBLEM, batch=1), *one), slice(entry, entry + 1)
                if count:
                    text = [x[piece, :count].repeat_interleave(2, 2).transpose(1, 2) for x in (more_k, more_v)]
                    scores = one[0].flatten(1, 2).transpose(1, 2) @ text[0].mT * 0.25
                    own, whole = lse.flatten(1, 2).mT[..., None], torch.logsumexp(scores, -1, keepdim=True)
                    total = torch.logaddexp(own, whole)
                    rest = out.flatten(1, 2).transpose(1, 2) * (own - total).exp() + (scores - total).exp() @ text[1]
                    out = rest.transpose(1, 2).unflatten(1, (9, 8))
                outputs.append(out)
            return torch.cat(outputs)

        tensors = Q, K, V, extra_k, extra_v
        found = gradients_of(ours, *tensors)
        require_close(found, gradients_of(exact, *tensors))
        for entry, count in enumerate(counts):
            assert not found[3][entry, count:].any() and not found[4][entry, count:].any()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        require_close(gradients_of(compiled, *tensors), found, 1e-6)
        extra_v = torch.randn(2, 7, 2, 16)


def test_of_lse_alone() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K)]
    found = torch.autograd.grad(run(*leaves, return_lse=True)[1].sum(), leaves)
    require_close(found, torch.autograd.grad(dense(PROBLEM, *leaves, V)[1].sum(), leaves))


class Unused(torch.autograd.Function):
    """The identity, which gives no gradient."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, ...]:
        return (None,) * len(gradients)


@pytest.mark.parametrize("call", ["plain", "packed", "dense packed", "joint"])
def test_of_nothing(call: str) -> None:
    """Autograd asks for gradients of a call whose results it has none of."""
    long = torch.randn(1, 12, 4, 16, requires_grad=True)
    calls: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "plain": lambda: gnaforge.na1d(long, long, long, 3, return_lse=True),
        "packed": lambda: gnaforge.na1d_varlen(*[long[0]] * 3, [(5,), (7,)], 3, return_lse=True),
        "dense packed": lambda: gnaforge.attention(
            long, long, long, seqlens_Q=[5, 7], seqlens_KV=[5, 7], return_lse=True
        ),
        "joint": lambda: (gnaforge.joint_attention(long, long, long, grid=(10,), prefix=2, kernel_size=3),),
    }
    used = Unused.apply(*calls[call]())[0].sum() + 2 * long.sum()
    used.backward()
    assert long.grad is not None and long.grad.eq(2).all()


GRADS_OUT = {
    "expanded": torch.ones(()).expand(2, 9, 8, 4, 16),
    "heads first": torch.randn(2, 4, 9, 8, 16).permute(0, 2, 3, 1, 4),
    "channels apart": torch.randn(16, 2, 9, 8, 4).permute(1, 2, 3, 4, 0),
    "every second": torch.randn(2, 9, 8, 4, 32)[..., ::2],
    "reversed batch": torch.randn(2, 9, 8, 4, 16).flip(0),
}


@pytest.mark.parametrize("name", GRADS_OUT)
def test_gradients_come_with_any_strides(name: str) -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what torch makes of a sum is nobody's fault
        found = torch.autograd.grad(run(*leaves), leaves, GRADS_OUT[name])
    require_close(found, torch.autograd.grad(run(*leaves), leaves, GRADS_OUT[name].contiguous()), 0)


def test_inputs_with_any_strides() -> None:
    packed = torch.randn(2, 9, 8, 3, 4, 16, requires_grad=True)
    out = gnaforge.na2d(*packed.unbind(3), 3)
    (found,) = torch.autograd.grad(out.square().sum(), packed)
    copy = packed.detach().clone().requires_grad_()
    parts = [x.contiguous() for x in copy.unbind(3)]
    require_close((found,), torch.autograd.grad(gnaforge.na2d(*parts, 3).square().sum(), copy), 0)
    one_head = K[..., :1, :].clone().requires_grad_()
    expanded = one_head.expand(2, 9, 8, 4, 16)
    (found,) = torch.autograd.grad(run(Q, expanded, expanded).sum(), one_head)
    require_close((found,), torch.autograd.grad(run(Q, one_head, one_head).sum(), one_head), 1e-5)


def test_retained_graphs_give_the_same_again() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    loss = (run(*leaves) * WEIGHTS).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


def test_bits_do_not_depend_on_threads() -> None:
    x = torch.randn(1, 24, 24, 2, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(gnaforge.na2d(leaf, leaf, leaf, 7).square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_second_derivatives_are_refused() -> None:
    """But not a graph that could be differentiated again and isn't."""
    leaf = Q.clone().requires_grad_()
    (found,) = torch.autograd.grad((run(leaf) * WEIGHTS).sum(), leaf, create_graph=True)
    assert torch.equal(found, gradients_of(run, Q)[0])
    with pytest.raises(RuntimeError, match="gnaforge: neighborhood attention has no second derivatives"):
        found.sum().backward()


def test_what_is_not_finite_reaches_only_who_sees_it() -> None:
    """A gradient is a sum over pairs that see each other, whatever other tokens hold."""
    seen = torch.from_numpy(oracle.mask(PROBLEM).copy()).unflatten(1, (9, 8)).unflatten(0, (9, 8))
    for which in ((1,), (2,), (1, 2)):
        tensors = [x.clone() for x in (Q, K, V)]
        for i in which:
            tensors[i][0, 4, 4] = float("nan")
        of_q, of_k, _ = gradients_of(run, *tensors)
        sees = seen[:, :, 4, 4]
        assert of_q[0][sees].isnan().any(-1).all() and not of_q[0][~sees].isnan().any() and not of_q[1].isnan().any()
        shares = torch.einsum("abxy,ab->xy", seen.float(), sees.float()) > 0  # keys of queries that see it
        assert not of_k[0][~shares].isnan().any() and not of_k[1].isnan().any()


def test_nothing_to_differentiate() -> None:
    for shape in ((0, 9, 8, 4, 16), (2, 9, 8, 0, 16)):
        leaf = torch.empty(shape, requires_grad=True)
        gnaforge.na2d(leaf, leaf, leaf, 3).sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    leaf = Q.clone().requires_grad_()
    (found,) = torch.autograd.grad((checkpoint(run, leaf, use_reentrant=False) * WEIGHTS).sum(), leaf)
    assert torch.equal(found, gradients_of(run, Q)[0])
    if reentrant:
        (checkpoint(run, leaf, use_reentrant=True) * WEIGHTS).sum().backward()
        assert torch.equal(leaf.grad, found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_train(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    require_close(gradients_of(compiled, Q, K, V), gradients_of(run, Q, K, V), 1e-6)


def test_autocast_and_scaled_gradients() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run(*leaves)
    found = torch.autograd.grad((out.float() * WEIGHTS).sum() * 1024.0, leaves)
    assert out.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found)
    for got, exact in zip(found, gradients_of(run, Q, K, V), strict=True):
        torch.testing.assert_close(got / 1024.0, exact, rtol=0.1, atol=0.15)


def test_a_gradient_scaler_skips_what_overflows() -> None:
    """In float16; its scale is halved then."""
    layer = gnaforge.NeighborhoodAttention1D(32, 2, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e8)
    x, before = torch.randn(2, 40, 32), layer.qkv.weight.detach().clone()
    scales = []
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).float().square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == 0.5e8 and scales[-1] == scales[-2] > 1
    assert not torch.equal(layer.qkv.weight, before) and layer.qkv.weight.isfinite().all()


def test_deterministic_mode_and_inplace_changes() -> None:
    want = gradients_of(run, Q, K, V)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, gradients_of(run, Q, K, V), want))
    finally:
        torch.use_deterministic_algorithms(False)
    leaf = Q.clone().requires_grad_()
    moved = leaf * 1
    out = run(moved)
    moved += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


DDP = """
import os, torch, torch.distributed as dist, gnaforge
from torch.nn.parallel import DistributedDataParallel
def main(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = gnaforge.NeighborhoodAttention2D(32, 2, 3)
    data = torch.randn(2, 9, 8, 32)
    module(data).square().mean().backward()
    alone = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    both = DistributedDataParallel(module)
    both(data[rank : rank + 1]).square().mean().backward()
    assert all(torch.allclose(p.grad, q, atol=1e-6) for p, q in zip(module.parameters(), alone))
    dist.destroy_process_group()
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
import torch.multiprocessing as mp
if __name__ == "__main__":
    mp.start_processes(main, (port,), nprocs=2, start_method="fork")
    print("same")
"""


def test_data_parallel_training(python) -> None:
    done = python(DDP)
    assert done.stdout == "same\n", done.stderr


# Kernels for it


def test_kernels_are_made_at_the_forward_call(python, own_cache: Path) -> None:
    """In one go, said in one line; nothing is compiled by `backward`."""
    done = python(
        "import sys, torch, gnaforge\n"
        "from gnaforge.runtime import jit\n"
        "gnaforge.register(policy='warn')\n"
        "x = torch.randn(1, 16, 1, 8, requires_grad=True)\n"
        "out = gnaforge.na1d(x, x, x, 3)\n"
        "gnaforge.register(policy='never')\n"
        "out.sum().backward()\n"
        "print(sorted(k.config.op for k in gnaforge.kernels()), x.grad.shape)\n"
    )
    assert done.stdout.startswith("['gna_backward_kv', 'gna_backward_q', 'gna_forward']"), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("gnaforge: compiled")]
    of_gradients = [line for line in lines if "gna_backward_q" in line]
    assert len(lines) == 2 and len(of_gradients) == 1 and "gna_backward_kv" in of_gradients[0], lines


def test_without_kernels_backward_says_what_to_do(python, own_cache: Path) -> None:
    done = python(
        "import torch, gnaforge\n"
        "gnaforge.register(rank=1, head_dim=8, dtype='fp32', arch='cpu')\n"
        "gnaforge.register(policy='never')\n"
        "x = torch.randn(1, 16, 1, 8, requires_grad=True)\n"
        "out = gnaforge.na1d(x, x, x, 3)\n"
        "try:\n    out.sum().backward()\n"
        "except gnaforge.NoKernelError as error:\n    print(error)\n"
        "print(gnaforge.register(rank=1, head_dim=8, dtype='fp32', arch='cpu', direction='backward'))\n"
        "out.sum().backward()\n"
    )
    assert done.returncode == 0, done.stderr
    assert "no kernel fits this problem: gna_backward_kv, rank 1, fp32" in done.stdout
    keys = [f"gna_backward_{of}-cpu-r1-fp32-dany-q64-kv64" for of in ("q", "kv")]
    assert f"\nor build them with: gnaforge build {keys[0]} && gnaforge build {keys[1]}\n" in done.stdout
    assert """\ncalls don't compile (gnaforge.register(policy="never") was called)\n""" in done.stdout
    assert (
        'register one with: gnaforge.register(rank=1, head_dim=8, dtype="fp32", direction="backward", arch="cpu"'
        in done.stdout
    )
    assert "['gna_backward_kv-cpu-r1-fp32-dany-q64-kv64', 'gna_backward_q-cpu-r1-fp32-dany-q64-kv64']" in done.stdout


def test_kernels_are_asked_for_again_under_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(training, "load_missing", list)
    monkeypatch.setattr(training.jit, "make_kernels", lambda *_: asked.append(training.jit.policy()) or "")
    leaf = torch.randn(1, 77, 1, 8, requires_grad=True)
    for policy in ("never", "never", "warn"):
        monkeypatch.setattr(training.jit, "_policy", policy)
        training.prepare_backward("forward", (leaf, leaf, leaf, [3, 1, 1, 0], None, ""))
    assert asked == ["never", "warn"]


def test_archs_without_gradients_say_so() -> None:
    with pytest.raises(InputError, match=r"op: sm100 has no backward pass; cpu and sm90 have one$"):
        gnaforge.register("gna_backward_q-sm100-r1-bf16-d64-q128-kv128")
    inputs = Q, K, V, [5, 3, 2, 1, 1, 1, 0, 1], None, "", None, None, None
    request = training.backward_requests("forward", inputs, 1)[0]
    assert request.op == "gna_backward_q" and 'direction="backward"' in request.register_call()
    with pytest.raises(NoKernelError, match="gna_backward_q"):
        from gnaforge.runtime.backward_parts import _backward_fake

        grad = torch.empty(2, 9, 8, 4, 16, dtype=torch.float16)
        halves = [x.half() for x in (Q, K, V)]
        _backward_fake(grad, None, *halves, grad, grad[..., 0], [5, 3, 2, 1, 1, 1, 0, 1], None, 1)


# Training


class Classifier(torch.nn.Module):
    """Two layers of neighborhood attention over an image."""

    def __init__(self, layer: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(1, 32, 2, 2)
        self.layers = torch.nn.ModuleList([layer(), layer()])
        self.head = torch.nn.Linear(64 * 32, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = x + layer(torch.nn.functional.layer_norm(x, (32,)))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Sequence(torch.nn.Module):
    """One causal layer over a sequence, which says the next token."""

    def __init__(self, layer: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 32)
        self.layer = layer()
        self.head = torch.nn.Linear(32, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(x + self.layer(x)).transpose(1, 2)  # type: ignore[no-any-return]


class Twin(torch.nn.Module):
    """A module of the package with torch's attention below a mask in place of the kernels."""

    def __init__(self, module: torch.nn.Module, problem: Problem) -> None:
        super().__init__()
        self.module, self.problem = module, problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.module.qkv(x).unflatten(-1, (3, self.problem.heads, -1))
        q, k, v = (part.squeeze(-3).flatten(1, -3).transpose(1, 2) for part in qkv.split(1, dim=-3))
        mask = torch.from_numpy(oracle.mask(self.problem).copy())
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.module.proj(out.transpose(1, 2).flatten(2).view(x.shape))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_have_the_gradients_of_their_dense_twins(rank: int) -> None:
    tokens, window = (7, 6, 5)[:rank], (5, 3, 4)[:rank]
    kind = getattr(gnaforge, f"NeighborhoodAttention{rank}D")
    layer = kind(32, 2, window, is_causal=(False,) * (rank - 1) + (True,))
    problem = Problem(tokens, window, causal=(False,) * (rank - 1) + (True,), heads=2, kv_heads=2, head_dim=16)
    x = torch.randn(2, *tokens, 32)
    found = []
    for model in (layer, Twin(layer, problem)):
        leaf = x.clone().requires_grad_()
        loss = (model(leaf) * torch.linspace(-1, 1, 32)).square().sum()
        found.append(torch.autograd.grad(loss, (leaf, *layer.parameters())))
    require_close(*found, 1e-4)


def train(model: torch.nn.Module, batch: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Losses of 200 steps."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        data, labels = batch(generator)
        loss = torch.nn.functional.cross_entropy(model(data), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def images(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 4, (8,), generator=generator)
    data = torch.randn(8, 1, 16, 16, generator=generator) * 0.3
    for image, label in zip(data, labels.tolist(), strict=True):  # a bright quarter
        image[0, label // 2 * 8 : label // 2 * 8 + 8, label % 2 * 8 : label % 2 * 8 + 8] += 1
    return data, labels


def sequences(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = (torch.randint(0, 8, (8, 1), generator=generator) + 3 * torch.arange(33)) % 8
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", ["classifier", "sequence"])
def test_models_train_as_their_dense_twins_do(name: str) -> None:
    losses = []
    for twin in (False, True):
        torch.manual_seed(0)
        if name == "classifier":
            problem = Problem((8, 8), (5, 5), heads=2, head_dim=16)
            model: torch.nn.Module = Classifier(lambda: gnaforge.NeighborhoodAttention2D(32, 2, 5))
            if twin:
                model.layers = torch.nn.ModuleList(Twin(layer, problem) for layer in model.layers)
            losses.append(train(model, images))
        else:
            problem = Problem((32,), (6,), causal=(True,), heads=2, head_dim=16)
            model = Sequence(lambda: gnaforge.NeighborhoodAttention1D(32, 2, 6, is_causal=True))
            if twin:
                model.layer = Twin(model.layer, problem)
            losses.append(train(model, sequences))
    ours, wanted = losses
    assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-3
    assert sum(ours[-20:]) < 0.5 * sum(ours[:20])
