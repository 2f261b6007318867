"""Times of gnaforge itself: a call's fixed cost, and the command line."""

from __future__ import annotations

import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..build.kernels import open_libraries
from ..build_tools.text import count_of
from ..errors import InputError
from ..families import Family
from ..runtime.config import ANY_HEAD_DIM, KernelConfig
from ..runtime.op_table import FORWARD


def _alternate(calls: dict[str, Callable[[], object]], rounds: int = 15, repeats: int = 1000) -> dict[str, float]:
    """Median microseconds of each call, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in seconds.items()}


def call_overhead() -> list[dict[str, Any]]:
    """What a call costs besides computing: the smallest problem there is, beside two allocations, the bare operator,
    and the same operator wrapped by ``torch.library.custom_op``."""
    import torch

    from ..runtime.core import load_file
    from ..runtime.ops import na1d

    for library in open_libraries([KernelConfig(FORWARD.name, "cpu", 1, "fp32", ANY_HEAD_DIM, (1,), (1,))]):
        load_file(library)
    x = torch.randn(1, 1, 1, 8)
    na1d(x, x, x, 1)
    operator = torch.ops.gnaforge.forward_no_grad.default

    @torch.library.custom_op(
        "gnaforge_bench::forward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
    )
    def call_operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return operator(q, k, v, [1, 1, 1, 0])[0]  # type: ignore[no-any-return]

    calls: dict[str, Callable[[], object]] = {
        "two torch.empty": lambda: (torch.empty(1, 1, 1, 8), torch.empty(1, 1, 1)),
        "operator": lambda: operator(x, x, x, [1, 1, 1, 0]),
        "na1d": lambda: na1d(x, x, x, 1),
        "operator in custom_op": lambda: call_operator(x, x, x),
    }
    if importlib.util.find_spec("natten"):
        import natten

        y = torch.randn(1, 2, 1, 8)  # NATTEN refuses a window of 1
        calls["natten.na1d, on its flex backend"] = lambda: natten.na1d(y, y, y, 2, backend="flex-fna")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        times = _alternate(calls, repeats=300)
    empty = times["two torch.empty"]
    return [{"what": name, "us": us, "us beyond two empty": us - empty} for name, us in times.items()]


def _run(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a command line."""
    code = "from gnaforge.cli import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder
    )
    seconds = time.perf_counter() - start
    # The maximum over all children so far: it can only be told apart where this one raised it.
    return seconds, max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


_THOUSAND = """\
spec_version: 1
library: thousand
arch: cpu
kernels:
  - rank: 2
    head_dim: any
    dtype: [fp32, bf16, fp16]
    tiles: [{}]
"""


def tool_times() -> list[dict[str, Any]]:
    """Seconds and peak memory of commands, each in a fresh process with a fresh cache, in rising order of memory."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "GNAFORGE_CACHE_DIR": str(folder / "cache")}
        boxes = [f"{{q: [{a}, {b}], kv: [{c}, 8]}}" for a in range(1, 16) for b in range(1, 17) for c in (8, 16)]
        (folder / "thousand.yaml").write_text(_THOUSAND.format(", ".join(boxes[:334])))
        one = "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"
        for what, arguments, rounds in (
            ("--help", ["--help"], 5),
            ("list", ["list"], 5),
            ("generate 1,002 kernels", ["generate", "thousand.yaml"], 3),
            ("build one cpu kernel", ["build", one], 1),
            ("build it again", ["build", one], 5),
        ):
            runs = [_run(arguments, environment, folder) for _ in range(rounds)]
            rows.append(
                {
                    "command": what,
                    "seconds": statistics.median(seconds for seconds, _ in runs),
                    "peak MB (so far)": max(megabytes for _, megabytes in runs),
                }
            )
    return rows


def calibration(family: Family, report: Path | None) -> list[dict[str, Any]]:
    """A kernel family's constants of the time model, fitted to runs, beside those that it has: the cpu's to runs on
    this machine, a GPU's to those of a report.

    Raises:
        InputError: a GPU's are asked for without a report of runs.
    """
    from ..simulator.calibration import calibrate_cpu, calibrate_report

    if not family.target.is_gpu:
        found = calibrate_cpu(family)
    elif report is None:
        raise InputError(
            f"--calibrate --arch {family.arch} needs --from FILE, a report of `gnaforge bench --report` on a GPU"
        )
    else:
        from .run import read_report

        runs = read_report(report)
        try:
            found = calibrate_report(runs, family)
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{report}: no constants can be fitted to these runs: {error}") from error
    constants = family.time_constants()
    rows = [
        {"constant": name, "fitted": value, "in use": getattr(constants, name)}
        for name, value in found.constants.items()
    ]
    errors = {f"rms error of {count_of(found.runs, 'run')}": found.rms_error, "largest error": found.largest_error}
    rows += [{"constant": name, "fitted": value, "in use": ""} for name, value in errors.items()]
    return [*rows, {"constant": "source", "fitted": "these runs", "in use": constants.source}]
