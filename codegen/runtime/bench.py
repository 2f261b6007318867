"""Times kernels beside what torch offers for the same mask, and beside dense attention.

Contenders take turns within a round, so that a change of the machine's speed hits all of them; medians over rounds.
Inputs rotate among several sets, as many as it takes to leave no input in a GPU's cache. Useful work counts visible
pairs only, by the op table's floating-point operations of a pair; dense contenders are charged with all pairs. On a GPU
time is taken with CUDA events. Each problem's result is checked on some queries in float64.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import core
from .bench_contenders import (
    CONTENDERS,
    DENSE,
    HEADS_FIRST,
    OWN,
    Call,
    Tensors,
    Unavailable,
    excluded,
    heads_first,
    variant_of,
)
from .bench_gradients import with_backward_pass, with_gradients, work_of
from .config import DIRECTIONS, Direction, KernelConfig
from .dtypes import DTYPES
from .family import facts_of, find_facts
from .kernels import registry
from .op_table import FORWARD
from .ops import neighborhood_attention
from .problem import Problem, option_of
from .problem_file import read_problems
from .problem_rules import ProblemError
from .reference import visible_pairs, visited_pairs
from .request import Request

REPORT_SCHEMA = 2
DEFAULT_CONTENDERS = {"cpu": ("gnaforge", "sdpa", "flex"), "cuda": tuple(CONTENDERS)}
_FLUSH_BYTES = 2**28  # of input sets together: several times a GPU's L2 cache
_MOST_SETS = 16


@dataclass(frozen=True)
class Timing:
    """Median seconds of a contender, the fastest round, and its largest difference from gnaforge's output."""

    contender: str
    seconds: float
    fastest: float
    useful_gflops: float
    rounds: int
    difference: float | None


def _clock(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds per call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    excluded.seconds = 0.0
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start - excluded.seconds) / repeats


def matmul_gflops() -> float:
    """Rate of torch's own fp32 matrix product on the CPU, GFLOP/s, best of five: what the machine gives."""
    a = torch.randn(1536, 1536)
    a @ a
    return 2 * 1536**3 / min(_clock(lambda: a @ a, 1, "cpu") for _ in range(5)) / 1e9


def _input_sets(problem: Problem, device: str) -> list[Tensors]:
    first = _inputs(problem, device)
    if device == "cpu":
        return [first]
    size = sum(x.numel() * x.element_size() for x in first)
    return [first, *(_inputs(problem, device, seed) for seed in range(1, min(_MOST_SETS, ceil(_FLUSH_BYTES / size))))]


def _inputs(problem: Problem, device: str, seed: int = 0) -> Tensors:
    """Q, K and V, then K and V of each piece of extra keys, all of which count."""
    found = FORWARD.random_inputs(problem, seed, device)
    return tuple(found[name] for name in _input_names(problem))


def _input_names(problem: Problem) -> tuple[str, ...]:
    ends = ("", "_2")[: len(problem.extra_tokens)]
    return ("q", "k", "v", *(f"extra_{name}{end}" for end in ends for name in ("k", "v")))


class _Rotation:
    """A contender's call, with the next input set each time."""

    def __init__(self, call: Call, sets: Sequence[Tensors]) -> None:
        self.call, self.sets, self.next = call, sets, 0

    def __call__(self) -> torch.Tensor:
        self.next = (self.next + 1) % len(self.sets)
        return self.call(self.sets[self.next])


def run(
    problem: Problem,
    contenders: Sequence[str] = DEFAULT_CONTENDERS["cpu"],
    budget_seconds: float = 20.0,
    kernel: str | None = None,
    device: str = "cpu",
    notes: dict[str, str] | None = None,
    direction: Direction = "forward",
) -> list[Timing]:
    """Times contenders in turn.

    Args:
        problem: what to compute.
        contenders: any of `CONTENDERS`, or ``gnaforge VARIANT``.
        budget_seconds: how long the rounds may take in all; there are at least three, or a single one where that
            alone takes longer.
        kernel: key of the gnaforge kernel; default: the one with the least work.
        device: ``cpu`` or ``cuda``.
        notes: takes why a contender is left out, by name; without it the error is raised.
        direction: ``backward`` or ``training`` (both passes) time gradients, and compare that of Q.

    Returns:
        A timing for each contender that runs, in the order given.
    """
    sets = _input_sets(problem, device)
    torch_sets = [heads_first(x) for x in sets] if HEADS_FIRST & set(contenders) else []
    if direction != "forward":
        sets, torch_sets = with_gradients(sets), with_gradients(torch_sets)
    calls: dict[str, _Rotation] = {}
    outputs: dict[str, torch.Tensor] = {}
    with torch.set_grad_enabled(direction != "forward"):
        for name in contenders:
            own = torch_sets if name in HEADS_FIRST else sets
            try:
                call = _call_of(name, problem, kernel, sets[0], device)
                if direction != "forward":
                    call = with_backward_pass(name, problem, call, direction)
                out = call(own[0])  # the warm-up, compilation included
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                if notes is None or (name == OWN and len(contenders) == 1):
                    raise
                notes[name] = (f"{type(error).__name__}: {error}".splitlines() or ["?"])[0][:300]
                continue
            calls[name] = _Rotation(call, own)
            if name not in DENSE:
                outputs[name] = out
        ours = outputs.get(OWN)
        differences = {
            name: None if ours is None else float((out.float() - ours.float()).abs().max())
            for name, out in outputs.items()
        }
        del outputs, ours
        seconds = _rounds(calls, budget_seconds, device)
    pairs = {name: problem.pair_count if name in DENSE else visible_pairs(problem) for name in calls}
    work = work_of(problem, direction)
    return [
        Timing(name, median, min(times), work * pairs[name] / median / 1e9, len(times), differences.get(name))
        for name, times in seconds.items()
        for median in (statistics.median(times),)
    ]


def _call_of(name: str, problem: Problem, kernel: str | None, tensors: Tensors, device: str) -> Call:
    variant = variant_of(name)
    if variant is None:
        return CONTENDERS[name](problem, kernel, tensors)
    own = choose_kernel(problem, device, variant)
    if own is None:
        raise Unavailable(f"no kernel of the variant {variant} is loaded for this problem")
    return CONTENDERS[OWN](problem, own.key, tensors)


def _rounds(calls: dict[str, _Rotation], budget_seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds per call of each contender, by round."""
    seconds = {name: [_clock(call, 1, device)] for name, call in calls.items()}
    # A fast contender repeats within its turn until the turn is long enough for the clock.
    turn_seconds = 0.05 if device == "cpu" else 0.01
    repeats = {name: max(1, int(turn_seconds / first)) for name, (first,) in seconds.items()}
    turn = sum(first * repeats[name] for name, (first,) in seconds.items())
    rounds = max(0 if turn > budget_seconds else 3, min(30, int(budget_seconds / turn))) if calls else 0
    if rounds:
        seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_clock(call, repeats[name], device))
    return seconds


def computed_pairs(problem: Problem, config: KernelConfig) -> int:
    """Scores that a kernel computes of a problem, per batch entry and head: its bound is all pairs over these."""
    return visited_pairs(problem, config.q_tile, config.kv_tile, facts_of(config).padding, config.q_tile_heads)


def share_of_work_bound(problem: Problem, config: KernelConfig, seconds: float, dense_seconds: float) -> float:
    """How much of what it saves in scores a kernel saves in time, against itself on all pairs of the same tokens.

    Padding counts on both sides: the dense run computes more than all pairs, where tiles leave the tokens' box.
    """
    return dense_seconds / seconds * computed_pairs(problem, config) / computed_pairs(problem.dense(), config)


def choose_kernel(problem: Problem, device: str, variant: str | None = None) -> KernelConfig | None:
    """The kernel of this process with the least work, as dispatch chooses; None if none fits. Kernels of families that
    this package doesn't know are left out: their padding is part of the work. With a variant, of its kernels."""
    request = Request.of_problem(FORWARD.name, problem, device)
    kernels = [kernel.config for kernel in registry.values() if not kernel.refusal(request)]
    kernels = [config for config in kernels if variant is None or config.variant == variant]
    fitting = [config for config in kernels if find_facts(config) is not None]
    return min(fitting, key=lambda config: computed_pairs(problem, config), default=None)


def check(problem: Problem, kernel: str | None, device: str, queries: int = 16) -> float:
    """Largest error of some queries' output, relative to half a unit in the last place, in the inputs' type, of the
    largest value: a few at most, where a kernel is right."""
    tensors = _inputs(problem, device)
    out = CONTENDERS[OWN](problem, kernel, tensors)(tensors)
    unit = torch.finfo(tensors[2].dtype).eps / 2 * float(tensors[2].double().abs().max())
    named = dict(zip(_input_names(problem), tensors, strict=True))
    rng = Random(0)
    worst = 0.0
    for _ in range(queries):
        at = (rng.randrange(problem.batch), *(rng.randrange(n) for n in problem.tokens))
        exact, _ = FORWARD.sample(problem, named, at, rounds_probabilities=False)
        error = float((out[at].double() - exact["out"]).abs().max())
        worst = max(worst, error / unit) if error == error else float("inf")
    return worst


def overhead(config: KernelConfig, device: str) -> dict[str, float]:
    """Microseconds of the host per call of the smallest problem that a kernel takes, and of two allocations."""
    problem = Problem(
        (1,) * config.rank,
        1,
        heads=config.q_tile_heads,
        kv_heads=1,
        head_dim=config.head_dim or 64,
        value_head_dim=config.value_head_dim or config.head_dim or 64,
        dtype=config.dtype,
        out_dtype=config.output_dtype,
    )
    q, k, v = _inputs(problem, device)
    output = DTYPES[config.output_dtype].torch if DTYPES[config.dtype].scaled else None
    calls: dict[str, Callable[[], object]] = {
        "call": lambda: neighborhood_attention(q, k, v, 1, kernel=config.key, out_dtype=output),
        "two torch.empty": lambda: (torch.empty_like(q), torch.empty(q.shape[:-1], device=device)),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(15):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(200):
                    call()
                found[name].append((time.perf_counter() - start) / 200 * 1e6)
                if device == "cuda":
                    torch.cuda.synchronize()
    return {name: statistics.median(times) for name, times in found.items()}


def machine(device: str) -> dict[str, Any]:
    """What the times are of: versions, the device and its clock."""
    found: dict[str, Any] = {
        "device": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "processors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found["matmul_gflops"] = matmul_gflops()
    return found


def measure(
    problem: Problem,
    contenders: Sequence[str],
    budget_seconds: float,
    kernel: str | None,
    device: str,
    direction: Direction = "forward",
) -> dict[str, Any]:
    """One problem of a report: times, bounds, ratios and the check."""
    chosen = KernelConfig.parse(kernel) if kernel else choose_kernel(problem, device)
    row: dict[str, Any] = {"problem": problem.as_json(), "kernel": chosen.key if chosen else None, "notes": {}}
    if direction != "forward":
        row["direction"] = direction
    if chosen is None:
        row["notes"]["gnaforge"] = "no kernel is loaded for this problem"
        contenders = [name for name in contenders if not name.startswith(OWN)]
    else:
        row["error_units"] = check(problem, chosen.key, device)
        row["work_bound"] = problem.pair_count / computed_pairs(problem, chosen)
    rivals = {name: choose_kernel(problem, device, variant_of(name)) for name in contenders if variant_of(name)}
    row["rivals"] = {name: config.key for name, config in rivals.items() if config is not None}
    row["flop_bound"] = problem.pair_count / visible_pairs(problem)
    timings = run(problem, contenders, budget_seconds, chosen.key if chosen else None, device, row["notes"], direction)
    row["timings"] = [asdict(timing) for timing in timings]
    seconds = {timing.contender: timing.seconds for timing in timings}
    ours = seconds.get(OWN)
    if ours:
        row["speedups"] = {name: took / ours for name, took in seconds.items() if name != OWN}
        if "gnaforge dense" in seconds and chosen is not None and direction == "forward":
            row["share_of_work_bound"] = share_of_work_bound(problem, chosen, ours, seconds["gnaforge dense"])
    return row


def _gpu_fault() -> str | None:
    """Gives torch's unused memory back, between problems; what is wrong where a kernel has ended the GPU's context."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"the GPU can't be used any more: {error}"[:1000]
    return None


def report(
    problems: Sequence[Problem],
    contenders: Sequence[str],
    seconds: float,
    kernels: Sequence[str | None],
    device: str,
    path: Path | None,
    direction: Direction = "forward",
) -> dict[str, Any]:
    """Measures problems, within ``seconds`` for the rounds of all.

    Args:
        problems: what to measure.
        contenders: as in `run`.
        seconds: budget of the rounds of all problems.
        kernels: of each problem the key of the gnaforge kernel; None takes the one with the least work.
        device: ``cpu`` or ``cuda``.
        path: takes what is done so far, at any time.
        direction: as in `run`.
    """
    found: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "kernels": sorted(kernel.key for kernel in registry.values()),
        "problems": [],
        "complete": False,
    }

    def save() -> None:
        if path is None:
            return
        # A file is replaced whole; a link, a pipe or a device is written through.
        through = path.is_symlink() or (path.exists() and not path.is_file())
        target = path if through else path.with_name(f".{path.name}.partial")
        target.write_text(json.dumps(found, indent=1) + "\n")
        if not through:
            target.replace(path)

    end = time.monotonic() + seconds
    fault = None
    for done, (problem, kernel) in enumerate(zip(problems, kernels, strict=True)):
        print(f"{done + 1} of {len(problems)}: {problem}, head dim {problem.head_dim}", file=sys.stderr)
        left = max(0.0, end - time.monotonic()) / (len(problems) - done)
        try:
            row = measure(problem, contenders, left, kernel, device, direction)
        except Exception as error:
            row = {"problem": problem.as_json(), "error": f"{type(error).__name__}: {error}"[:1000]}
        found["problems"].append(row)
        save()
        if device == "cuda" and (fault := _gpu_fault()):
            row["fault"] = fault
            break
        if time.monotonic() > end + seconds / 4:
            break
    found["complete"] = len(found["problems"]) == len(problems) and not fault
    first = next((row["kernel"] for row in found["problems"] if row.get("kernel")), None)
    if first is not None and not fault:
        save()
        try:
            found["overhead_us"] = overhead(KernelConfig.parse(first), device)
        except (RuntimeError, MemoryError) as error:
            found["overhead_error"] = str(error)[:1000]
    save()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m gnaforge.runtime.bench", description=__doc__)
    parser.add_argument(
        "--problems", type=Path, metavar="FILE.json", help="list of problems, each perhaps with a kernel"
    )
    parser.add_argument("--tokens", help="token layout, for example 56,56")
    parser.add_argument("--window", help="window, for example 7,7; one number holds for all dimensions")
    for name in ("stride", "dilation"):
        parser.add_argument(f"--{name}", help="one number, or one per dimension")
    parser.add_argument("--causal", help="0, 1 or block, once or per dimension")
    parser.add_argument("--edge", help="shift, cut or wrap, once or per dimension")
    for name in ("sink", "grid", "q-offset", "kv-tokens", "kv-offset", "kv-sink"):
        parser.add_argument(f"--{name}", help="one number, or one per dimension")
    parser.add_argument("--extra-tokens", help="keys that all queries see; two numbers for two pieces")
    for name in ("heads", "kv-heads", "value-head-dim", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--out-dtype", choices=DTYPES, help="of the output, where it may be another one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    known = f"{', '.join(CONTENDERS)}, {OWN} VARIANT"
    parser.add_argument("--contenders", help=f"default: all that suit the device; there are {known}")
    parser.add_argument(
        "--direction", choices=DIRECTIONS, default="forward", help="training: forward and backward together"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="budget of the timed rounds of all problems")
    parser.add_argument("--kernel", help="key of the gnaforge kernel; default: the one with the least work")
    parser.add_argument("--library", action="append", default=[], help="kernel library to load first")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where to write the report; default: stdout")
    options = vars(parser.parse_args(arguments))
    device, file, path = options.pop("device"), options.pop("problems"), options.pop("report")
    contenders = options.pop("contenders")
    names = contenders.split(",") if contenders else DEFAULT_CONTENDERS[device]
    if unknown := [name for name in names if name not in CONTENDERS and variant_of(name) is None]:
        parser.error(f"--contenders: {unknown[0]!r} is unknown; there are {known}")
    budget, kernel, direction = options.pop("seconds"), options.pop("kernel"), options.pop("direction")
    for library in options.pop("library"):
        core.load_library(library)
    if file is None and (options["tokens"] is None or options["window"] is None):
        parser.error("give --tokens and --window, or --problems")
    try:
        rows = [(Problem.from_options(options), None)] if file is None else read_problems(file)
    except ProblemError as error:
        parser.error(f"{option_of(error.field)}: {error.text}")
    except ValueError as error:
        parser.error(f"--problems: {error}")
    problems, kernels = [problem for problem, _ in rows], [own or kernel for _, own in rows]
    found = report(problems, names, budget, kernels, device, path, direction)
    if path is None:
        json.dump(found, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
