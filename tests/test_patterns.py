"""Edges, block-causal frames, sinks and parts of a grid, from the Python API down to the cpu kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import gnaforge
import oracle
import pytest
import torch
from gnaforge import registration
from gnaforge.errors import InputError
from gnaforge.families import TARGETS
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem, fields_of_pattern
from gnaforge.runtime.request import Request
from gnaforge.verification.problems import with_settings

pytestmark = pytest.mark.usefixtures("kernel_set")

ALL = ("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys")


def settings_of(problem: Problem) -> dict[str, Any]:
    """The keyword arguments of a call, without those that say nothing."""
    said = {name: getattr(problem, name) for name in ("edge", "sink", "grid", "q_offset", "kv_offset", "kv_sink")}
    return {name: value for name, value in said.items() if value and set(value) - {0, "shift"}}


def attend(problem: Problem, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The problem as a call."""
    out, lse = gnaforge.neighborhood_attention(
        *tensors,
        problem.window,
        problem.stride,
        problem.dilation,
        problem.causal,
        return_lse=True,
        **settings_of(problem),
    )
    return out, lse


def require_close(
    problem: Problem,
    got: tuple[torch.Tensor, torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    extra: list[oracle.Piece] | None = None,
) -> None:
    for found, exact in zip(got, oracle.reference(problem, *inputs, *(extra or ())), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5, msg=lambda text: f"{problem}: {text}")


def test_random_calls_agree_with_exact_attention() -> None:
    rng, needed = Random(0), set()
    gnaforge.na1d(LINE, LINE, LINE, 3)  # loads the operator
    for seed in range(120):
        problem = Problem((1,) * rng.randint(1, 3), 1, heads=2, kv_heads=rng.choice((1, 2)), head_dim=16)
        problem = with_settings(problem, rng, 250, ALL)
        problem = replace(problem, extra_tokens=problem.extra_tokens[:1])  # as many as the operator takes
        needed |= {*problem.features()}
        inputs, extra = oracle.inputs(problem, seed), oracle.extra_inputs(problem, seed)
        if extra:
            got = torch.ops.gnaforge.forward(*inputs, problem.pattern, None, "", *extra[0])
        else:
            got = attend(problem, *inputs)
        require_close(problem, got, inputs, extra)
        fields = fields_of_pattern(problem.pattern)
        same = {name: getattr(problem, name) for name in ("heads", "kv_heads", "head_dim", "kv_tokens", "extra_tokens")}
        assert Problem(problem.tokens, **{**same, **fields}) == Problem.from_json(
            {**problem.as_json(), "dtype": "bf16"}
        )
    assert needed == set(ALL)


X = torch.randn(1, 12, 9, 2, 16)
LINE = torch.randn(1, 12, 2, 16)


@pytest.mark.parametrize(
    ("keywords", "row", "seen"),
    [
        ({"kernel_size": 5, "edge": "cut"}, 0, [0, 1, 2]),
        ({"kernel_size": 40, "edge": "cut"}, 3, list(range(12))),
        ({"kernel_size": 5, "edge": "wrap"}, 0, [0, 1, 2, 10, 11]),
        ({"kernel_size": 3, "edge": "wrap", "dilation": 3}, 1, [1, 4, 10]),
        ({"kernel_size": 6, "stride": 3, "is_causal": "block"}, 7, [3, 4, 5, 6, 7, 8]),
        ({"kernel_size": 3, "is_causal": "token", "sink": 2}, 9, [0, 1, 7, 8, 9]),
        ({"kernel_size": 3, "is_causal": True, "sink": 5}, 2, [0, 1, 2]),
        ({"kernel_size": 3, "sink": 2}, 6, [0, 1, 5, 6, 7]),
        ({"kernel_size": 3, "edge": "cut", "grid": 20, "q_offset": 2, "kv_offset": 1}, 0, [0, 1, 2]),
        (
            {"kernel_size": 3, "is_causal": True, "sink": 2, "grid": 40, "q_offset": 20, "kv_sink": 2, "kv_offset": 18},
            0,
            [0, 1, 2, 3, 4],
        ),
    ],
    ids=str,
)
def test_what_a_query_sees(keywords: dict[str, Any], row: int, seen: list[int]) -> None:
    """Values are one-hot, so that the output's channels that aren't 0 are the keys."""
    values = torch.eye(12).repeat(1, 1, 1)[:, :, None, :].expand(1, 12, 1, 12)
    values = torch.nn.functional.pad(values, (0, 4))
    query = LINE[:, :8, :1] if "grid" in keywords else LINE[..., :1, :]
    out = gnaforge.na1d(query, LINE[..., :1, :], values, **keywords)
    assert out[0, row, 0].nonzero().flatten().tolist() == seen


def test_any_number_of_queries_where_all_keys_are_seen() -> None:
    """Cross attention along dense axes; the other axis has a window."""
    query, key = torch.randn(2, 7, 9, 4, 16), torch.randn(2, 12, 9, 2, 16)
    problem = Problem((7, 9), (12, 3), heads=4, kv_heads=2, head_dim=16, batch=2, kv_tokens=(12, 9))
    require_close(problem, gnaforge.na2d(query, key, key, (12, 3), return_lse=True), (query, key, key))


BAD: dict[str, dict[str, Any]] = {
    "edge is 'bend'; it must be one of shift, cut, wrap": {"edge": "bend"},
    "edge: ('cut', 'cut', 'cut') has 3 entries for 2 dimensions": {"edge": ("cut",) * 3},
    "is_causal is 'frame'; it must be a bool, 'token' or 'block'": {"is_causal": "frame"},
    "is_causal is true along dim 1, where edge is wrap; it must be false there": {
        "edge": "wrap",
        "is_causal": (False, True),
    },
    "is_causal is block along dim 0, where edge is wrap; it must be false there": {
        "edge": ("wrap", "cut"),
        "is_causal": "block",
    },
    "kernel_size 13 times dilation 1 exceeds the 12 tokens along dim 0; kernel_size must be at most 12 there": {
        "kernel_size": (13, 3),
        "edge": "wrap",
    },
    "dilation is 2 along dim 1, which wraps; it must divide the 9 tokens there": {"edge": "wrap", "dilation": 2},
    "sink is 3 along dim 0, which wraps; it must be 0 there": {"edge": ("wrap", "shift"), "sink": 3},
    "sink is 3 along dim 1, which has dilation; it must be 0 there": {"dilation": (1, 2), "sink": 3},
    "sink is -1 along dim 0; it must be at least 0": {"sink": (-1, 0)},
    "sink along dim 1 is beyond 64 bits": {"sink": (0, 2**70)},
    "grid is 0 along dim 1; it must be at least 1": {"grid": (12, 0)},
    "kv_offset is 0 along dim 0, and the 12 keys from there on end at 12; they must end by 10, as the grid does": {
        "grid": 10
    },
    "q_offset is 1 along dim 0, and the 12 queries from there on end at 13; they must end by 12, as the grid does": {
        "q_offset": (1, 0)
    },
    "q_offset is -1 along dim 0; it must be at least 0": {"q_offset": -1},
    "kv_offset is -1 along dim 1; it must be at least 0 where edge is not wrap": {
        "kv_offset": (0, -1),
        "grid": (12, 20),
    },
    "kv_offset is 1 along dim 0; it must be at least 2, which is kv_sink": {"kv_sink": 2, "kv_offset": 1, "grid": 40},
    "kv_sink is 13 along dim 0; it must be 0 to the 12 key tokens": {"kv_sink": 13},
    "kv_sink is 1 along dim 0, which wraps; it must be 0 there": {"edge": "wrap", "kv_sink": 1, "kv_offset": 1},
    "queries 11 to 15 see keys 12 to 16 of the grid along dim 0, which the key tensor lacks: it has 12 keys from "
    "kv_offset (0) on, and queries see 3 to 16 in all": {
        "grid": (20, 9),
        "q_offset": (4, 0),
    },
}


@pytest.mark.parametrize("text", BAD)
def test_illegal_settings_name_dimension_field_and_what_is_allowed(text: str) -> None:
    """In the same words where torch only traces."""
    keywords = {"kernel_size": 3, **BAD[text]}
    with pytest.raises(ValueError) as caught:
        gnaforge.na2d(X, X, X, **keywords)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError) as traced:
        gnaforge.na2d(*(X.to("meta") for _ in range(3)), **keywords)
    assert str(traced.value) == str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"edge": 1}, "edge must be a name or a sequence of 2, of shift, cut, wrap; got 1"),
        ({"sink": 1.5}, "sink must be int or a sequence of 2, got 1.5"),
        ({"q_offset": True}, "q_offset must be int or a sequence of 2, got True"),
        ({"is_causal": (True, 2)}, "is_causal must be bool, 'token', 'block' or a sequence of 2, got (True, 2)"),
    ],
)
def test_settings_of_another_type(keywords: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        gnaforge.na2d(X, X, X, 3, **keywords)
    assert text == str(caught.value)


def test_keys_of_another_length_need_a_grid() -> None:
    for keywords in ({}, {"edge": "cut"}, {"sink": 2}):
        with pytest.raises(ValueError, match=r"key has shape \[1, 12, 2, 16\], query has \[1, 7, 2, 16\]"):
            gnaforge.na1d(LINE[:, :7], LINE, LINE, 3, **keywords)


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "wrap": lambda x: gnaforge.na2d(x, x, x, 3, edge=("wrap", "cut")),
    "block": lambda x: gnaforge.na2d(x, x, x, 6, 3, is_causal=("block", False), sink=(2, 0)),
    "range": lambda x: gnaforge.na2d(x[:, :4], x, x, 3, grid=(64, x.shape[2]), q_offset=(2, 0), edge="cut"),
    "cross": lambda x: gnaforge.na2d(x[:, :3], x, x, (x.shape[1], 3)),
}


@pytest.mark.parametrize("name", ["wrap", "block"])
def test_one_graph_serves_many_resolutions(name: str) -> None:
    graphs = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend=count)
    for side in range(8, 18):
        x = torch.randn(1, side, side + 3, 2, 16)
        torch.testing.assert_close(compiled(x), call(x))
    assert graphs <= 2


@pytest.mark.parametrize("name", CALLS)
def test_export_vmap_and_autocast(name: str) -> None:
    call = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x)

    assert torch.equal(torch.export.export(Module(), (X,)).module()(X), call(X))
    several = torch.stack([X, X.flip(1)])
    torch.testing.assert_close(torch.vmap(call)(several), torch.stack([call(X), call(X.flip(1))]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(X).dtype == torch.bfloat16


def test_operator_by_torchs_own_checks() -> None:
    pattern = [3, 3, 1, 1, 1, 1, 0, 0, 2, 1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0]  # wrap and cut; no grid, and one
    gnaforge.na2d(X, X, X, 3, edge="cut")  # loads the operator
    torch.library.opcheck(torch.ops.gnaforge.forward_no_grad.default, (X, X, X, pattern))


def test_modules_have_edges_and_sinks() -> None:
    torch.manual_seed(0)
    module = gnaforge.NeighborhoodAttention2D(
        32, 2, (5, 4), edge=("wrap", "cut"), is_causal=(False, "block"), sink=(0, 1)
    )
    assert "edge=('wrap', 'cut')" in repr(module) and "sink=(0, 1)" in repr(module)
    x = torch.randn(1, 8, 7, 32)
    with torch.no_grad():
        q, k, v = module.qkv(x).view(1, 8, 7, 3, 2, 16).unbind(-3)
        settings = {"is_causal": (False, "block"), "edge": ("wrap", "cut"), "sink": (0, 1)}
        want = gnaforge.na2d(q, k, v, (5, 4), **settings)
        torch.testing.assert_close(module(x), module.proj(want.flatten(-2)))
    assert "edge" not in repr(gnaforge.NeighborhoodAttention2D(32, 2, 3))
    for keywords, text in (
        ({"edge": "bend"}, "edge is 'bend'"),
        ({"edge": "wrap", "is_causal": True}, "causal: true along dimension 0, where edge is wrap"),
        ({"sink": 2, "dilation": 2}, "sink: 2 along dimension 0, which has dilation; it must be 0 there"),
    ):
        with pytest.raises(ValueError, match=text):
            gnaforge.NeighborhoodAttention2D(32, 2, 3, **keywords)


@pytest.mark.usefixtures("plain_sm100")
def test_an_arch_that_lacks_a_setting_names_those_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled."""
    monkeypatch.setattr(registration, "machine_target", lambda device, index: TARGETS["sm100"])
    for fields, field, feature in (
        ({"edge": "cut"}, "edge", "edge"),
        ({"causal": "block"}, "causal", "block_causal"),
        ({"sink": 3}, "sink", "sink"),
        ({"grid": 16, "q_offset": 2, "kv_tokens": 16}, "grid", "range"),
    ):
        problem = Problem(9, 3, head_dim=64, **fields)
        request = Request.of_problem("gna_forward", problem, "cuda")
        for make in (
            lambda request, quiet: registration.make_for_call([request], quiet=quiet),
            lambda request, quiet: registration.CacheSource().remedy(request),
        ):
            with pytest.raises(InputError) as caught:
                make(request, quiet=True)
            assert str(caught.value) == f"{field}: sm100 doesn't have the feature {feature}; cpu and sm90 have it"


def test_register_takes_what_its_errors_print() -> None:
    problem = Problem(
        (40, 40), 9, 3, causal=(False, "block"), edge="cut", sink=(0, 2), heads=2, head_dim=16, dtype="fp32"
    )
    call = Request.of_problem("gna_forward", problem, "cpu").register_call()
    assert 'causal=(False, "block"), edge=("cut", "cut"), sink=(0, 2)' in call
    (key,) = eval(call, {"gnaforge": gnaforge})
    assert KernelConfig.parse(key).rank == 2
    part = Problem((40, 40), 9, grid=64, q_offset=3, kv_tokens=64, head_dim=16, dtype="fp32")
    assert Request.of_problem("gna_forward", part, "cpu").register_call() == (
        'gnaforge.register(rank=2, head_dim=16, dtype="fp32", arch="cpu", tokens=(40, 40), window=(9, 9), '
        "grid=(64, 64), q_offset=(3, 3), kv_tokens=(64, 64), heads=1)"
    )
