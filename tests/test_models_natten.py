"""NATTEN's names on our kernels: beside NATTEN itself, and beside attention written out key by key."""

from __future__ import annotations

import importlib
import inspect
import math
import subprocess
import sys
from itertools import product
from typing import Any, get_args, get_origin

import gnaforge.models.natten as natten
import pytest
import torch
from gnaforge.models.natten import functional
from gnaforge.runtime.problem import Problem
from oracle import mask

pytestmark = pytest.mark.usefixtures("kernel_set", "one_thread")


def heads_first(rank: int, grid: tuple[int, ...], heads: int = 2, head_dim: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rank)
    return torch.randn(3, 2, heads, *grid, head_dim, dtype=torch.float64).requires_grad_().unbind(0)


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, rpb: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of heads-first tensors under the oracle's mask; a bias is looked up pair by pair."""
    flat = [x.flatten(2, -2) for x in (q, k, v)]
    scores = flat[0] @ flat[1].mT
    if rpb is not None:
        places = list(product(*map(range, problem.tokens)))
        for i, j in product(range(len(places)), repeat=2):
            steps = zip(places[i], places[j], problem.window, problem.dilation, strict=True)
            at = [(b - a) // d + w - 1 for a, b, w, d in steps]
            if all(0 <= x < 2 * w - 1 for x, w in zip(at, problem.window, strict=True)):
                scores = scores.index_put(
                    (torch.arange(2)[:, None], torch.arange(2), torch.tensor(i), torch.tensor(j)),
                    rpb[(slice(None), *at)],
                    accumulate=True,
                )
    scores = scores.masked_fill(~torch.tensor(mask(problem)), -torch.inf)
    return (scores.softmax(-1) @ flat[2]).unflatten(2, q.shape[2:-1])


UNFUSED = [
    Problem((11,), (3,), dilation=(3,)),
    Problem((9,), (4,), causal=(True,)),
    Problem((6, 7), (3, 5)),
    Problem((7, 6), (3, 2), dilation=(2, 3)),
    Problem((4, 5, 4), (2, 3, 4), dilation=(2, 1, 1), causal=(False, True, False)),
]


@pytest.mark.parametrize("problem", UNFUSED, ids=str)
def test_scores_and_weighted_sums(problem: Problem) -> None:
    rank, window = problem.rank, problem.window
    q, k, v = heads_first(rank, problem.tokens)
    causal = {"is_causal": tuple(problem.causal)} if any(problem.causal) else {}
    attn = getattr(functional, f"na{rank}d_qk")(q, k, window, problem.dilation, **causal)
    assert attn.shape == (*q.shape[:-1], math.prod(window))
    got = getattr(functional, f"na{rank}d_av")(attn.softmax(-1), v, window, problem.dilation, **causal)
    want = written_out(q, k, v, problem)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.square().sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("problem", [p for p in UNFUSED if not any(p.causal)], ids=str)
def test_relative_position_bias(problem: Problem) -> None:
    """The older names, and the fused operator with a bias, which then differs from the one without."""
    rank, window, dilation = problem.rank, problem.window, problem.dilation
    q, k, v = heads_first(rank, problem.tokens)
    rpb = torch.randn(2, *(2 * w - 1 for w in window), dtype=torch.float64, requires_grad=True)
    want = written_out(q, k, v, problem, rpb)
    attn = getattr(functional, f"na{rank}d_qk")(q, k, window, dilation, rpb=rpb)
    got = getattr(functional, f"na{rank}d_av")(attn.softmax(-1), v, window, dilation)
    torch.testing.assert_close(got, want)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), [rpb]) for x in (got, want))
    torch.testing.assert_close(ours, theirs)
    last = [x.movedim(1, -2) for x in (q, k, v)]
    fused = getattr(natten, f"na{rank}d")(*last, window, dilation=dilation, rpb=rpb, scale=1.0)
    torch.testing.assert_close(fused.movedim(-2, 1), want)
    if len(set(window)) == len(set(dilation)) == 1:
        older = [window[0], dilation[0]] if rank < 3 else [window[0], window[0], dilation[0], dilation[0]]
        attn = getattr(functional, f"natten{rank}dqkrpb")(q, k, rpb, *older).softmax(-1)
        torch.testing.assert_close(getattr(functional, f"natten{rank}dav")(attn, v, *older), want)


def test_keys_that_all_queries_see() -> None:
    """Scores and fused operators agree on additional keys; scores of a window come before those of these."""
    q, k, v = (x.detach().float() for x in heads_first(2, (6, 7)))
    extra = torch.randn(2, 2, 2, 5, 8)
    attn = functional.natten2dqk(q, k, 3, 1, additional_keys=extra[0])
    torch.testing.assert_close(attn[..., :9], functional.natten2dqk(q, k, 3, 1))
    got = functional.natten2dav(attn.softmax(-1), v, 3, 1, additional_values=extra[1])
    pieces = {name: x.transpose(1, 2) for name, x in zip(("additional_keys", "additional_values"), extra, strict=True)}
    want = natten.na2d(*(x.movedim(1, -2) for x in (q, k, v)), 3, scale=1.0, **pieces)
    torch.testing.assert_close(got, want.movedim(-2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_arguments_by_position_are_those_of_natten(rank: int) -> None:
    """In the order of NATTEN 0.17: window, dilation, additional keys or values, causality, and the bias."""
    q, k, v = (x.detach() for x in heads_first(rank, (6, 5, 4)[:rank]))
    torch.manual_seed(9)
    keys, values = torch.randn(2, 2, 2, 3, 8, dtype=torch.float64).unbind(0)
    rpb = torch.randn(2, *(3,) * rank, dtype=torch.float64)
    qk, av = (getattr(functional, f"na{rank}d_{name}") for name in ("qk", "av"))
    biased = qk(q, k, 2, 1, keys, False, rpb)
    torch.testing.assert_close(biased, qk(q, k, 2, dilation=1, additional_keys=keys, is_causal=False, rpb=rpb))
    attn = qk(q, k, 2, 2, keys, True)
    torch.testing.assert_close(attn, qk(q, k, 2, dilation=2, additional_keys=keys, is_causal=True))
    assert attn.shape[-1] == 2**rank + 3 and attn.isinf().any()
    got = av(attn.softmax(-1), v, 2, 2, values, True)
    torch.testing.assert_close(got, av(attn.softmax(-1), v, 2, dilation=2, additional_values=values, is_causal=True))


@pytest.mark.parametrize("extra", [0, 300])
def test_sums_of_low_precision_are_float32_inside(extra: int) -> None:
    """A window of 13x13 in bfloat16, also key by key and with additional keys: as far off as the output's rounding."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 14, 13, 16).bfloat16().unbind(0)
    rpb = torch.randn(2, 25, 25)
    more = torch.randn(2, 1, 2, extra, 16).bfloat16() if extra else (None, None)
    exact = [None if x is None else x.double() for x in more]

    attn = functional.na2d_qk(q, k, 13, additional_keys=more[0], rpb=rpb)
    want = functional.na2d_qk(q.double(), k.double(), 13, additional_keys=exact[0], rpb=rpb.double())
    assert attn.dtype == torch.bfloat16
    torch.testing.assert_close(attn.double(), want, rtol=2**-8, atol=1e-5)  # half a unit in the last place
    weights = want.mul(0.25).softmax(-1).bfloat16()
    out = functional.na2d_av(weights, v, 13, additional_values=more[1])
    assert out.dtype == torch.bfloat16
    want = functional.na2d_av(weights.double(), v.double(), 13, additional_values=exact[1])
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-5)
    if not extra:
        q, k, v = (x.movedim(1, -2) for x in (q, k, v))
        fused = natten.na2d(q, k, v, 13, rpb=rpb)
        want = natten.na2d(q.double(), k.double(), v.double(), 13, rpb=rpb.double())
        assert fused.dtype == torch.bfloat16
        torch.testing.assert_close(fused.double(), want, rtol=2**-8, atol=1e-4)


def test_three_dimensions_by_older_names() -> None:
    q, k, v = heads_first(3, (4, 6, 6))
    attn = functional.natten3dqk(q, k, 2, 3, 2, 1).softmax(-1)
    got = functional.natten3dav(attn, v, 2, 3, 2, 1)
    torch.testing.assert_close(got, written_out(q, k, v, Problem((4, 6, 6), (2, 3, 3), dilation=(2, 1, 1))))


class DilatedBlock(torch.nn.Module):
    """A block as of DiNAT, with the arguments that such code gives to NATTEN's module."""

    def __init__(self, module: Any, dilation: int | None, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
        self.attn = module(32, kernel_size=3, dilation=dilation, num_heads=2, qkv_bias=True, qk_scale=None, **options)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"attn_drop": 0.1, "proj_drop": 0.0}, {"rel_pos_bias": True}, {"bias": True}])
def test_a_block_of_dinat(options: dict[str, Any]) -> None:
    """Forward and backward beside the same block written out; in evaluation, where weights are not dropped."""
    torch.manual_seed(0)
    block = DilatedBlock(natten.NeighborhoodAttention2D, 2, **options).eval()
    x = torch.randn(2, 7, 8, 32, requires_grad=True)

    def attend(inner: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = inner.qkv(x).unflatten(-1, (3, 2, 16)).movedim(-3, 0).movedim(-2, 2)
        out = written_out(q * 0.25, k, v, Problem((7, 8), (3, 3), dilation=(2, 2)), inner.rpb)
        return inner.proj(out.movedim(1, -2).flatten(-2))  # type: ignore[no-any-return]

    half = x + attend(block.attn, block.norm1(x))
    want, got = half + block.mlp(block.norm2(half)), block(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    leaves = [x, *block.parameters()]
    pairs = zip(
        torch.autograd.grad(got.square().mean(), leaves), torch.autograd.grad(want.square().mean(), leaves), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    block.train()
    assert block(x).isfinite().all()
    assert ("attn.rpb" in block.state_dict()) == ("rel_pos_bias" in options or "bias" in options)


class HourglassBlock(torch.nn.Module):
    """Attention as of k-diffusion's hourglass transformer: cosine similarity, scale 1; either way to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96, bias=False)
        self.out = torch.nn.Linear(32, 32, bias=False)
        self.scale = torch.nn.Parameter(torch.full((2,), 10.0))

    def forward(self, x: torch.Tensor, fused: bool) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(-3)
        factor = self.scale.sqrt()[:, None]
        q, k = (torch.nn.functional.normalize(y, dim=-1) * factor for y in (q, k))
        if fused and natten.has_fused_na():
            y = natten.functional.na2d(q, k, v, 3, scale=1.0)
        else:
            q, k, v = (y.movedim(-2, 1) for y in (q, k, v))
            weights = torch.softmax(natten.functional.na2d_qk(q, k, 3), dim=-1).to(v.dtype)
            y = natten.functional.na2d_av(weights, v, 3).movedim(1, -2)
        return x + self.out(y.flatten(-2))  # type: ignore[no-any-return]


def test_a_block_of_the_hourglass_transformer() -> None:
    torch.manual_seed(0)
    block, x = HourglassBlock(), torch.randn(2, 6, 7, 32, requires_grad=True)
    leaves = [x, *block.parameters()]
    outs = [block(x, fused) for fused in (True, False)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().mean(), leaves) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_what_is_refused() -> None:
    x = torch.randn(1, 6, 6, 2, 8)
    rpb = torch.zeros(2, 5, 5)
    with pytest.raises(NotImplementedError, match="rpb goes with neither stride"):
        natten.na2d(x, x, x, 3, 2, rpb=rpb)
    with pytest.raises(NotImplementedError, match="rpb goes with neither stride"):
        natten.na2d(x, x, x, 3, is_causal=(False, True), rpb=rpb)
    with pytest.raises(ValueError, match=r"rpb has shape \(2, 5, 5\); it must be \(2, 9, 9\)"):
        natten.na2d(x, x, x, 5, rpb=rpb)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernel_sise'"):
        natten.na2d(x, x, x, 3, kernel_sise=3)
    with pytest.raises(ValueError, match=r"na3d takes \[batch, 3 token dims"):
        natten.na3d(x, x, x, 3)
    with pytest.raises(ValueError, match="a window of 7 with dilation 1 doesn't fit into 6 tokens"):
        functional.na2d_qk(x.movedim(-2, 1), x.movedim(-2, 1), 7)
    with pytest.raises(ValueError, match=r"attn is \(1, 2, 6, 6, 9\); it must be \(1, 2, 6, 6, 25\)"):
        functional.na2d_av(torch.zeros(1, 2, 6, 6, 9), x.movedim(-2, 1), 5)
    with pytest.raises(NotImplementedError, match="rel_pos_bias and attn_drop go with neither"):
        natten.NeighborhoodAttention2D(32, 2, 3, stride=2, rel_pos_bias=True)
    with pytest.raises(ValueError, match="memory usage preference 'lots'"):
        natten.set_memory_usage_preference("lots")


def test_switches_tell_what_they_were_set_to() -> None:
    natten.use_deterministic_algorithms()
    natten.set_memory_usage_preference("unrestricted")
    natten.use_kv_parallelism_in_fused_na(False)
    natten.allow_flex_compile(True, backprop=True)
    try:
        assert natten.are_deterministic_algorithms_enabled() and natten.is_memory_usage_unrestricted()
        assert not natten.is_kv_parallelism_in_fused_na_enabled() and natten.is_flex_compile_backprop_allowed()
    finally:
        natten.use_deterministic_algorithms(False)
        natten.set_memory_usage_preference()
        natten.use_kv_parallelism_in_fused_na()
        natten.disable_flex_compile()
    assert natten.is_memory_usage_default() and not natten.is_flex_compile_allowed()


def test_unchanged_code_after_install() -> None:
    """In a fresh process: code that says ``import natten``; and a refusal once NATTEN itself is there."""
    code = """
import sys, types, gnaforge.models.natten as ours
ours.install(); ours.install()
import natten, natten.functional
from natten import NeighborhoodAttention2D, use_fused_na, HAS_LIBNATTEN, get_configs_for_cutlass_fna
from natten.functional import na2d, natten2dav, natten2dqkrpb
from natten import disable_autotuner, disable_fused_na, enable_fused_na, is_autotuner_enabled, is_fna_enabled
from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed
from natten.utils import check_all_args, log
from natten.utils.checks import check_all_args as same
disable_autotuner(); enable_fused_na(); log.get_logger("a").info("b")
assert check_all_args is same and is_fna_enabled() and not is_autotuner_enabled()
assert natten is ours and HAS_LIBNATTEN and get_configs_for_cutlass_fna(1, 2, 3) == []
sys.modules["natten"] = types.ModuleType("natten")
try: ours.install()
except RuntimeError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "natten is imported already: call install before anything imports it\n"


def test_checks_of_older_releases() -> None:
    assert natten.utils.check_all_args(2, 3, 2, True) == ((3, 3), (2, 2), (True, True))
    assert natten.utils.check_all_args(2, 3, dilation=2, is_causal=None) == ((3, 3), (2, 2), (False, False))
    for wrong in ((), (1,), (1, 1, False, 1)):
        with pytest.raises(TypeError, match="check_all_args takes"):
            natten.utils.check_all_args(2, 3, *wrong)
    with pytest.raises(TypeError, match="check_all_args takes"):
        natten.utils.check_all_args(2, 3, 1, dilatation=1)


@pytest.mark.natten
class TestBesideNatten:
    """NATTEN itself: names, arguments, and what its modules compute on a CPU."""

    theirs: Any

    @pytest.fixture(autouse=True)
    def _natten(self) -> None:
        type(self).theirs = pytest.importorskip("natten")

    def test_every_name_is_served(self) -> None:
        assert [name for name in self.theirs.__all__ if not hasattr(natten, name)] == []

    def test_types_and_checks(self) -> None:
        """Types by name; checks by what they return and refuse."""

        def parts(one: Any) -> Any:
            """A union's members, or a tuple's entries, whichever way they are written."""
            if get_origin(one) is tuple:
                return get_args(one)
            return frozenset(map(parts, get_args(one))) or one

        theirs, ours = (importlib.import_module(f"{one.__name__}.types") for one in (self.theirs, natten))
        names = [name for name in vars(theirs) if name.endswith("OrDed") or name.startswith(("Dimension", "CausalArg"))]
        assert len(names) == 16 and all(hasattr(ours, name) for name in names)
        assert [parts(getattr(ours, name)) for name in names] == [parts(getattr(theirs, name)) for name in names]
        assert ours.NoneType is theirs.NoneType
        checks = importlib.import_module(f"{self.theirs.__name__}.utils.checks")

        def result(module: Any, *given: Any) -> Any:
            try:
                return module.check_all_args(*given)
            except ValueError:
                return ValueError

        good = [(2, 3, 2, 1, True), (3, (3, 4, 5), None, (1, 2, 1), (True, False, False)), (1, [7], [2], [3], [False])]
        bad = [(2, 1, 1, 1, False), (2, (3, 3, 3), 1, 1, False), (2, 3, 0, 1, False), (2, 3, 1, 1.5, False)]
        bad += [(2, "33", 1, 1, False), (2, 3, 1, 1, 1), (2, 3, (1,), 1, None), (2, 3, 1, 0, False)]
        assert [result(natten.utils, *given) for given in good] == [result(checks, *given) for given in good]
        assert {result(one, *given) for given in bad for one in (natten.utils, checks)} == {ValueError}

    def test_every_argument_is_taken(self) -> None:
        """Tuning arguments, too, with whatever value, and without effect."""
        torch.manual_seed(0)
        given: dict[str, Any] = {"query": torch.randn(1, 6, 2, 8), "kernel_size": 3}
        given["key"] = given["value"] = given["query"]
        extra = torch.randn(1, 2, 2, 8)
        for name in ("na1d", "neighborhood_attention_generic", "attention"):
            theirs, ours = (getattr(module.functional, name) for module in (self.theirs, natten))
            own = {key: value for key, value in given.items() if name != "attention" or key != "kernel_size"}
            want = ours(**own, return_lse=True)
            tuning = {
                key: (8,) if "shape" in key else 8 if "size" in key else parameter.default
                for key, parameter in inspect.signature(theirs).parameters.items()
                if key not in own and key != "return_lse"
            }
            for got, wanted in zip(ours(**own, **tuning, return_lse=True), want, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)
            if name != "attention":
                assert not torch.equal(ours(**own, additional_keys=extra, additional_values=extra), want[0])

    def test_arguments_by_position(self) -> None:
        """Those that have an effect come in NATTEN's order; of modules all do."""
        for name in ("neighborhood_attention_generic", "attention", "merge_attentions"):
            theirs, ours = (
                [
                    parameter.name
                    for parameter in inspect.signature(getattr(module.functional, name)).parameters.values()
                    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                ]
                for module in (self.theirs, natten)
            )
            assert theirs[: len(ours)] == ours
        for rank in (1, 2, 3):
            theirs, ours = (
                list(inspect.signature(getattr(module, f"NeighborhoodAttention{rank}D").__init__).parameters)
                for module in (self.theirs, natten)
            )
            assert ours[: len(theirs)] == theirs

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_modules(self, rank: int) -> None:
        torch.manual_seed(rank)
        arguments = {"kernel_size": 3, "stride": 2, "dilation": 2, "is_causal": rank == 1, "qkv_bias": True}
        modules = [getattr(one, f"NeighborhoodAttention{rank}D")(32, 2, **arguments) for one in (self.theirs, natten)]
        modules[1].load_state_dict(modules[0].state_dict())
        x = torch.randn(2, *(6, 7, 6)[:rank], 32)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(modules[1](x), modules[0](x), rtol=1e-4, atol=1e-4)
