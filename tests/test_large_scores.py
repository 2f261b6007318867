"""Scores of any size, maxima that move, and rows cut into any number of KV tiles, for kernels of each family.

Scores come of few channels, so that they are exact in fp32 and ties are ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log, log2

import gnaforge
import pytest
import torch
from gnaforge.build.kernels import build_kernels
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import attention, error_bound
from gnaforge.verification.emulated_kernel import EmulatedKernel
from gnaforge.verification.problems import tile_counts

U = 2.0**-24
HEAD_DIM = 64
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A kernel whose KV tiles hold one key each where the tokens are a column: a cheap way to many tiles.

    Attributes:
        key: the kernel.
        column: tokens along the first axis of 600 such tiles.
        exact: a power of two below which equal scores give the exact output. All kernels have half an ulp of the dtype
            more elsewhere, for probabilities that are rounded for the product and not for the sum.
        largest: a power of two below which scores give finite results.
    """

    key: str
    column: int = 600
    exact: float = 30.0
    largest: float = 30.0

    @property
    def config(self) -> KernelConfig:
        return KernelConfig.parse(self.key)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype].torch


CASES = {
    "cpu": Case("gna_forward-cpu-r2-bf16-dany-q8x8-kv8x8", 4800),
    "sm90 bf16": Case("gna_forward-sm90-r2-bf16-d64-q64x1-kv1x16"),
    "sm90 fp16": Case("gna_forward-sm90-r2-fp16-d64-q64x1-kv1x16"),
    "sm100 bf16, one half": Case("gna_forward-sm100-r2-bf16-d64-q128x1-kv1x16"),
    "sm100 fp16, exponentials by FMA": Case("gna_forward-sm100-r2-fp16-d64-q256x1-kv1x48"),
    # CUTLASS's mainloop takes a rounded product off one that isn't rounded.
    "sm100 cutlass, fp16": Case("gna_forward-sm100-r2-fp16-d64-q256x1-kv1x16-cutlass", exact=12.0, largest=28.0),
}


SLOW = {"sm100 cutlass, fp16": pytest.mark.survey}  # a minute to compile, and one to run


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def attend(case: Case, session_cache: object) -> Iterator[Attend]:
    """The kernel as `gnaforge.neighborhood_attention` with output and log-sum-exp."""
    config = case.config
    if config.arch == "cpu":
        build_kernels([config])
        yield lambda *args, **more: gnaforge.neighborhood_attention(*args, **more, kernel=config, return_lse=True)
        return
    try:
        kernel = EmulatedKernel(config)
    except BuildError as error:
        if "no CUDA compiler" in str(error) or "CUTLASS" in str(error):
            pytest.skip(str(error))
        raise
    yield kernel
    kernel.close()


def channels(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., n] as the first channels of a head."""
    whole = torch.nn.functional.pad(values, (0, HEAD_DIM - values.shape[-1])).to(dtype)
    assert torch.equal(whole[..., : values.shape[-1]].double(), values.double()), "not exact in the dtype"
    return whole


def tiles_a_row(case: Case, tokens: tuple[int, int]) -> int:
    counts = tile_counts(Problem(tokens, tokens), case.config)
    return counts.visited // counts.q_tiles


def test_equal_scores_over_600_tiles(case: Case, attend: Attend) -> None:
    """The output is the value, the log-sum-exp the score and that of the number of keys."""
    tokens = (case.column, 1)
    assert tiles_a_row(case, tokens) == 600
    scale = 0.25
    powers, q, k = [], [], []  # per head; no product of these with the scale is exact
    for power, sign in ((11.6, 1.0), (20.6, 1.0), (case.largest - 0.4, -1.0)):
        doublings = round(power - log2(165 / 128 * 221 / 128 * scale / log(2)))
        if case.largest == case.exact or power != 20.6:  # CUTLASS's takes long to emulate
            powers.append(power)
            q.append(165 / 128 * 2.0 ** (doublings // 2))
            k.append(sign * 221 / 128 * 2.0 ** (doublings - doublings // 2))
    torch.manual_seed(0)
    shape = (1, *tokens, len(powers))
    query, key = (channels(torch.tensor(x)[:, None].expand(*shape, 1), case.dtype) for x in (q, k))
    value = torch.randn(len(powers), HEAD_DIM).to(case.dtype).expand(*shape, HEAD_DIM).contiguous()
    out, lse = attend(query, key, value, tokens, scale=scale)
    exact = torch.tensor(q).double() * torch.tensor(k).double() * scale
    for head, size in enumerate(powers):
        assert abs(log2(abs(exact[head].item()) / log(2)) - size) < 0.6
        if size < case.exact:
            assert torch.equal(out[..., head, :], value[..., head, :]), size
        else:
            off = (out - value)[..., head, :].abs() / value[..., head, :].abs()
            assert (off <= torch.finfo(case.dtype).eps).all(), (size, off.max())
        wanted = exact[head] + log(case.column)
        assert ((lse[..., head].double() - wanted).abs() <= 4 * U * wanted.abs() + 600 * U).all(), size


def test_large_scores_of_both_signs(case: Case, attend: Attend) -> None:
    """Far apart or equal: a query's output is the mean of the values of its best keys."""
    tokens, scale = (12, 18), 0.25
    torch.manual_seed(1)
    sizes = [13.0, 20.0, case.largest - 2.0]
    heads = 2 * len(sizes)  # of each size, keys of both signs, and of one, so that all scores are negative
    q = torch.randint(128, 160, (1, *tokens, heads, 1)) / 128.0
    k = torch.randint(192, 208, (1, *tokens, heads, 1)) / 128.0
    q[..., : len(sizes), :] *= torch.randint(2, (1, *tokens, len(sizes), 1)) * 2.0 - 1.0
    k[..., : len(sizes), :] *= torch.randint(2, (1, *tokens, len(sizes), 1)) * 2.0 - 1.0
    k[..., len(sizes) :, :] *= -1.0
    for head in range(heads):
        power = int(sizes[head % len(sizes)] + 1.5)
        q[..., head, :] *= 2.0 ** (power // 2)
        k[..., head, :] *= 2.0 ** (power - power // 2)
    query, key = channels(q, case.dtype), channels(k, case.dtype)
    value = torch.randn(1, *tokens, heads, HEAD_DIM).to(case.dtype)
    problem = Problem.of_tensors(query, key, value, tokens, scale=scale)
    largest = (q.abs().max() * k.abs().max()).item() * scale / log(2)
    assert 2.0 ** (case.largest - 2) < largest < 2.0**case.largest
    out, lse = attend(query, key, value, tokens, scale=scale)
    exact_out, exact_lse = attention(problem, query, key, value)
    roundings = 0.5 if case.largest == case.exact else 1.5
    allowed = roundings * torch.finfo(case.dtype).eps * exact_out.abs() + 500 * U * value.abs().max().item()
    assert ((out.double() - exact_out).abs() <= allowed).all()
    # CUTLASS's log-sum-exp has an ulp more of the score.
    assert ((lse.double() - exact_lse).abs() <= (4 + 2 * (roundings > 1)) * U * exact_lse.abs() + 500 * U).all()


@pytest.mark.parametrize("step", [0.5, 7.95, 8.05])
@pytest.mark.parametrize("shape", ["many tiles", "many keys"])
def test_maxima_that_move_at_every_tile(case: Case, attend: Attend, step: float, shape: str) -> None:
    """Rising, by just under what sm90's kernels leave as it is, and falling; in powers of two up to 4,800."""
    few = case.config.arch == "sm100"
    tokens = {"many tiles": (60 if few else case.column, 1), "many keys": (20, 16)}[shape]
    if shape == "many tiles" and step != 7.95:
        tokens = (40, 1)
    tile = torch.arange(tokens[0]) * (600 if tokens[0] == 4800 else tokens[0]) // tokens[0]
    torch.manual_seed(2)
    key = 0.05 * torch.randn(1, *tokens, 2, HEAD_DIM)
    for head, places in enumerate((tile, tile.flip(0))):
        key[0, :, :, head, 0], key[0, :, :, head, 1] = (places % 16)[:, None], (places // 16)[:, None]
    query = torch.randn(1, *tokens, 2, HEAD_DIM)
    query[..., 0], query[..., 1] = 1.0, 16.0
    value = torch.randn(1, *tokens, 2, HEAD_DIM)
    q, k, v = (x.to(case.dtype) for x in (query, key, value))
    problem = Problem.of_tensors(q, k, v, tokens, scale=step * log(2))
    out, lse = attend(q, k, v, tokens, scale=step * log(2))
    exact = attention(problem, q, k, v)
    bounds = error_bound(problem, q, k, v, exact, rounds_probabilities=case.config.arch != "cpu")
    for found, wanted, bound in zip((out, lse), exact, bounds, strict=True):
        assert ((found.double() - wanted).abs() <= bound).all()


def test_results_do_not_depend_on_where_a_row_is_cut(case: Case, attend: Attend) -> None:
    """The same 60 keys as 60 tiles and as 4, with arithmetic that is exact: scores that are powers of two."""
    torch.manual_seed(3)
    key = torch.randint(-8, 9, (1, 60, 1, 1))
    query = torch.randint(2, (1, 60, 1, 1)) * 2 - 1
    value = torch.randint(-8, 9, (1, 60, 1, HEAD_DIM)).to(case.dtype)
    found = []
    for tokens in ((60, 1), (4, 15), (1, 60)):
        q, k = (channels(x.float().unflatten(1, tokens), case.dtype) for x in (query, key))
        out, lse = attend(q, k, value.unflatten(1, tokens), tokens, scale=log(2))
        found.append((out.flatten(1, 2), lse.flatten(1, 2)))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert ((lse - found[0][1]).abs() <= 8 * U * lse.abs().max()).all()


@pytest.mark.parametrize("window", [64, 9])  # with 9, most rows see nothing of the first tiles
def test_a_row_depends_on_no_other(case: Case, attend: Attend, window: int) -> None:
    """Rows that share threads and warps: others' scores of any size, moving maxima included, change no bit of it."""
    tokens = (64, 1)
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, *tokens, 1, HEAD_DIM).to(case.dtype) for _ in range(3))
    others = torch.arange(64) % 5 != 2
    found = []
    for size in (1.0, 30.0, 3000.0):
        changed = q.clone()
        changed[:, others] *= size
        out, lse = attend(changed, k, v, (window, 1))
        assert out.isfinite().all() and lse.isfinite().all()
        found.append((out[:, ~others], lse[:, ~others]))
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


@pytest.mark.parametrize("bit", [0, 3, 6])
def test_rows_move_alone(case: Case, attend: Attend, bit: int) -> None:
    """Of rows that share threads and warps only those whose number has a bit, or lacks it, have maxima that rise."""
    tokens = (128, 1)
    torch.manual_seed(5)
    row = torch.arange(128) >> bit & 1
    query = torch.stack((row, 1 - row), -1)[None, :, None]  # two heads
    key = torch.arange(128)[None, :, None, None].expand(1, 128, 2, 1)
    q, k = (channels(x.reshape(1, *tokens, 2, 1).float(), case.dtype) for x in (query, key))
    v = torch.randn(1, *tokens, 2, HEAD_DIM).to(case.dtype)
    problem = Problem.of_tensors(q, k, v, tokens, scale=20.0)
    exact = attention(problem, q, k, v)
    bounds = error_bound(problem, q, k, v, exact, rounds_probabilities=case.config.arch != "cpu")
    for found, wanted, bound in zip(attend(q, k, v, tokens, scale=20.0), exact, bounds, strict=True):
        assert ((found.double() - wanted).abs() <= bound).all()
