"""``python -m gnaforge.bench.emulator``: how fast the emulator runs kernels, by schedule.

Runs a small kernel of its own (loads, stores, shared memory, barriers and arithmetic), then kernels of the toolkit by
their keys. Times are the processor's, the best of several runs; ratios are against the first schedule.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..build_tools.emulator.module import Counters, Options, load
from ..errors import BuildError, GnaforgeError

SCHEDULES = {
    "without checks": Options(checks=False),
    "eager, round-robin": Options(),
    "lazy, depth-first": Options("lazy", "depth-first"),
    "random, random": Options("random", "random", 1),
}

_KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.shared .align 16 .b8 room[4096];
.visible .entry benchmark(.param .u64 p0, .param .u64 p1)
{
  .reg .pred %p<2>;
  .reg .b32 %r<12>;
  .reg .f32 %f<6>;
  .reg .b64 %d<6>;
  ld.param.u64 %d0, [p0];
  ld.param.u64 %d1, [p1];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, %ctaid.x;
  shl.b32 %r2, %r1, 8;
  add.u32 %r2, %r2, %r0;
  mul.wide.u32 %d2, %r2, 4;
  add.s64 %d3, %d0, %d2;
  add.s64 %d4, %d1, %d2;
  mov.u32 %r3, room;
  shl.b32 %r4, %r0, 2;
  add.u32 %r5, %r3, %r4;
  xor.b32 %r6, %r4, 128;
  add.u32 %r6, %r6, %r3;
  mov.u32 %r7, 0;
  ld.global.f32 %f0, [%d3];
  mov.f32 %f1, 0f00000000;
LOOP:
  st.shared.f32 [%r5], %f0;
  bar.sync 0;
  ld.shared.f32 %f2, [%r6];
  fma.rn.f32 %f1, %f2, %f2, %f1;
  fma.rn.f32 %f0, %f2, 0f3F000000, %f0;
  ex2.approx.f32 %f3, %f1;
  max.f32 %f1, %f1, %f3;
  bar.sync 0;
  add.u32 %r7, %r7, 1;
  setp.lt.u32 %p0, %r7, 200;
  @%p0 bra LOOP;
  st.global.f32 [%d4], %f1;
  ret;
}
"""


def _own_kernel() -> Callable[[Options], Counters]:
    module = load(_KERNEL)
    values, out = np.linspace(0, 0.01, 4 * 256, dtype=np.float32), np.zeros(4 * 256, np.float32)
    return lambda options: module.launch([4], [256], [values, out], options=options)


# A process has one schedule for kernels with a host launcher, so each measurement is a process of its own.
_CHILD = """
import sys, time, torch, gnaforge
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES
config = KernelConfig.parse(sys.argv[1])
gnaforge.load_library(sys.argv[2])
dtype = DTYPES[config.dtype].torch
shape = tuple({1: (256,), 2: (16, 16), 3: (8, 8, 8)}[config.rank])
torch.manual_seed(0)
dims = config.head_dim, config.head_dim, config.value_head_dim or config.head_dim
q, k, v = (torch.randn(1, *shape, heads, dim).to(dtype) for heads, dim in zip((config.q_tile_heads, 1, 1), dims))
output = DTYPES[config.output_dtype].torch if DTYPES[config.dtype].scaled else None
best = float("inf")
for _ in range(int(sys.argv[3])):
    start = time.process_time()
    gnaforge.neighborhood_attention(q, k, v, tuple(s // 2 + 1 for s in shape), kernel=config, out_dtype=output)
    best = min(best, time.process_time() - start)
import resource
print(best, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def _environment(options: Options, device: str) -> dict[str, str]:
    settings = {
        "DEVICE": device,
        "MEMORY": "mapped",
        "TIMING": options.timing,
        "ORDER": options.order,
        "SEED": str(options.seed),
        "CHECKS": str(int(options.checks)),
        "TRACE": "1",
    }
    return {**os.environ, **{f"GNAFORGE_EMULATOR_{name}": value for name, value in settings.items()}}


@dataclass(frozen=True)
class Measured:
    """Warp instructions of one run, its best processor time in seconds, and the most memory of its process in MiB."""

    instructions: int
    seconds: float
    memory: int


def measure_own(repeats: int) -> dict[str, Measured]:
    """The benchmark's own kernel under each schedule."""
    run, best = _own_kernel(), dict[str, Measured]()
    for _ in range(repeats):
        for name, options in SCHEDULES.items():
            start = time.process_time()
            instructions = run(options).instructions
            seconds = time.process_time() - start
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            if name not in best or seconds < best[name].seconds:
                best[name] = Measured(instructions, seconds, memory)
    return best


def measure_key(key: str, repeats: int) -> dict[str, Measured]:
    """A kernel of the toolkit on about 256 tokens, with the heads of one tile, half of the tokens per axis in the
    window.

    Raises:
        InputError, BuildError: as `build.kernels.build_kernels`.
    """
    from ..build.kernels import find_libraries  # the emulator itself needs no kernels
    from ..families import family_of, require_config

    config = require_config(key)
    device = family_of(config).target.emulated_device
    (library,) = find_libraries([config], emulated=True).values()
    best: dict[str, Measured] = {}
    for name, options in SCHEDULES.items():
        command = [sys.executable, "-c", _CHILD, key, str(library), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(options, device))
        if done.returncode:
            raise BuildError(
                f"{key} under {name}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}"
            )
        traced = [int(count) for count in re.findall(r": (\d+) warp instructions", done.stderr)]
        seconds, memory = done.stdout.split()
        best[name] = Measured(sum(traced) // repeats, float(seconds), int(memory))
    return best


def report(best: dict[str, Measured]) -> list[str]:
    """One line per schedule."""
    reference, lines = next(iter(best.values())).seconds, []
    for name, one in best.items():
        rate = one.instructions / one.seconds / 1e6
        lines.append(
            f"  {name:20} {one.instructions:9,} warp instructions {1e3 * one.seconds:8.1f} ms {rate:6.2f} M/s"
            f" {one.seconds / reference:5.2f}x {one.memory:5} MiB"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gnaforge.bench.emulator", description=__doc__)
    parser.add_argument(
        "keys",
        nargs="*",
        metavar="KEY",
        help="kernels of the toolkit, for example gna_forward-sm90-r1-bf16-d128-q128-kv128",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs per schedule, of which the best counts (default 5)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error("--repeats must be at least 1")
    try:
        for key in [None, *chosen.keys]:
            best = measure_key(key, chosen.repeats) if key else measure_own(chosen.repeats)
            print("\n".join([key or "own kernel", *report(best)]), flush=True)
    except (GnaforgeError, ValueError) as error:  # ValueError: no kernel key
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
