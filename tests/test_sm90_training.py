"""Users' calls that sm90 kernels train in the emulator, although one kernel call isn't all of it: joint attention,
heads with windows of their own that share keys, packed samples, dense and merged attention. Nothing here ran on
hardware."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from test_sm90 import MODES, run
from test_sm90_bands import survey

KEYS = {
    1: (
        "gna_forward-sm90-r1-fp16-d64-q128-kv128",
        "gna_backward_q-sm90-r1-fp16-d64-q128-kv128",
        "gna_backward_kv-sm90-r1-fp16-d64-q128-kv128",
    ),
    2: (
        "gna_forward-sm90-r2-fp16-d64-q8x16-kv8x16",
        "gna_backward_q-sm90-r2-fp16-d64-q8x16-kv8x16",
        "gna_backward_kv-sm90-r2-fp16-d64-q8x16-kv8x8",
    ),
    3: (
        "gna_forward-sm90-r3-fp16-d64-q2x8x8-kv2x6x8",
        "gna_backward_q-sm90-r3-fp16-d64-q2x8x8-kv2x6x8",
        "gna_backward_kv-sm90-r3-fp16-d64-q2x4x8-kv2x8x8",
    ),
}


def require_gradients(cases: str, ranks: list[int], mode: str) -> None:
    """They are as exact as 16 bits allow: of fp16, 5e-4 of the largest element are lost when it is stored."""
    configs = [KernelConfig.parse(key) for rank in ranks for key in KEYS[rank]]
    try:
        libraries = find_libraries(configs, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    given = json.dumps({config.key: str(path) for config, path in libraries.items()})
    found = json.loads(run(["sm90_training.py", cases, given], mode))
    assert all(max(errors) < 2e-3 for errors in found.values()), found


@pytest.mark.parametrize(
    ("cases", "ranks", "mode"),
    [
        ("packed,dense_packed", [1], "eager"),
        ("heads,dense_causal", [1], "random"),
        ("apart,samples,merged", [1, 2], "lazy"),
    ],
)
def test_gradients(session_cache: Path, cases: str, ranks: list[int], mode: str) -> None:
    require_gradients(cases, ranks, mode)


@pytest.mark.survey
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", KEYS)
def test_gradients_of_every_rank(session_cache: Path, rank: int, mode: str) -> None:
    more = {1: ",packed,dense,dense_causal,dense_packed", 2: ",apart", 3: ""}[rank]
    require_gradients("heads,samples,merged" + more, sorted({1, rank}), mode)


def test_some_calls_that_mix_all_settings(session_cache: Path) -> None:
    survey(8, "sm90_backward_survey.py")


@pytest.mark.survey
def test_many_calls_that_mix_all_settings(session_cache: Path) -> None:
    survey(400, "sm90_backward_survey.py")
