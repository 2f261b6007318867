"""Calls that sm90 kernels train in the emulator, although one kernel call isn't all of it: joint attention, and heads
with windows of their own that share keys. Nothing here ran on hardware."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from kernel_set import BACKWARD_CONFIGS, CONFIGS
from test_sm90 import run

SM90 = {
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
}
CPU = {config.op: config for config in (*CONFIGS, *BACKWARD_CONFIGS) if (config.rank, config.dtype) == (1, "fp16")}


def errors_of(case: str, libraries: dict[KernelConfig, Path], mode: str) -> list[float]:
    """Of all gradients, as `sm90_training` prints them."""
    found: list[float] = json.loads(
        run(["sm90_training.py", case, json.dumps({config.key: str(path) for config, path in libraries.items()})], mode)
    )
    return found


@pytest.mark.parametrize(
    ("case", "ranks", "mode"), [("packed", [1], "eager"), ("heads", [1], "random"), ("apart", [1, 2], "lazy")]
)
def test_gradients(session_cache: Path, case: str, ranks: list[int], mode: str) -> None:
    """As exact as 16 bits allow, and where there are kernels for the cpu as those: these round no probabilities."""
    configs = [KernelConfig.parse(key) for rank in ranks for key in SM90[rank]]
    try:
        libraries = find_libraries(configs, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    found = errors_of(case, libraries, mode)
    assert max(found) < 2e-3, found
    if ranks == [1]:
        beside = errors_of(case, find_libraries(list(CPU.values())), mode)
        assert all(own < 3 * other + 2e-4 for own, other in zip(found, beside, strict=True)), (found, beside)
