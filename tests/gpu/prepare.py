#!/usr/bin/env python3
"""Builds what the suite takes to a machine with a GPU and without gnaforge or a compiler: kernels, the core extension,
what measures kernels without torch, facts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from paths import BENCH_LIBRARY, CARRIED, CORE, DEVICE, FACTS, HERE, LIBRARY, PLAN, ROOT

sys.path.insert(0, str(ROOT / "tests"))

from first_plan import plan_of_hardware
from gnaforge.build.core import core_path
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import find_stand_in, kernel_compiler
from gnaforge.build.link import build, library_path
from gnaforge.build_tools.cuda_compiler import CudaCompiler
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.errors import BuildError
from gnaforge.plan import Plan, plan
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.spec import load_spec
from sm90_backward_kernels import KV_CONFIGS, Q_CONFIGS
from sm90_kernels import CONFIGS

# What bench.py times: these presets' shapes with kernels fitted to them, and dense attention.
PRESETS = ("hunyuan-video", "flux-4k", "wan-720p", "cosmos", "vit-56")
DENSE_KERNELS = [
    f"gna_forward-sm90-r1-bf16-{tiles}"
    for tiles in (
        "d128-q128-kv128",
        "d128-q128-kv176",
        "d64-q192-kv128",
        "d64-q128-kv128",
        "d72-q128-kv128",
        "d96-q128-kv128",
        "d112-q128-kv128",
        "d256-q128-kv64",
    )
]


def _problems() -> list[dict[str, object]]:
    """For `gnaforge.runtime.bench --problems`: dense at head dim 128 first, then the presets, then other head dims.

    Each dense kernel has a row of its own: the choice by least work would always be that of the smallest tiles.
    """

    def dense(kernel: str, tokens: int = 16384, heads: int = 16) -> dict[str, object]:
        problem = Problem(tokens, tokens, heads=heads, head_dim=KernelConfig.parse(kernel).head_dim)
        return {**problem.as_json(), "kernel": kernel}

    first = [key for key in DENSE_KERNELS if KernelConfig.parse(key).head_dim == 128]
    found = [*map(dense, first), dense(first[0], 75600, 24)]
    for name in PRESETS:
        for _, entry in load_spec(name).entries("sm90"):
            problems = [shape.problem(head_dim=entry.head_dim[0]) for shape in entry.problems]
            found += [problem.as_json() for problem in problems if not problem.features()]
    return found + [dense(key) for key in DENSE_KERNELS if key not in first]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def build_device(path: Path, *, emulated: bool = False) -> None:
    """Compiles device.cu to a library; linked to the emulator's stand-in if ``emulated``, else to a static runtime.

    Raises:
        BuildError: there is no compiler.
    """
    compiler = kernel_compiler(CONFIGS[0], cxx_compiler(), find_stand_in() if emulated else None)
    assert isinstance(compiler, CudaCompiler)
    with tempfile.TemporaryDirectory(prefix="gnaforge-") as folder:
        built = f"{folder}/device.o"
        for command in (
            compiler.compile_command(str(HERE / "device.cu"), built, include_dir()),
            compiler.link_command([built], str(path)),
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"device.cu did not compile:\n{done.stderr}")


def main() -> None:
    CARRIED.mkdir(exist_ok=True)
    gradients = [*Q_CONFIGS, *KV_CONFIGS]
    first = plan_of_hardware(*(sorted(config.key for config in configs) for configs in (CONFIGS, gradients)))
    rows = [row for part in ("dense", "boxes", "models") for row in first[part]["rows"]]
    measured = {KernelConfig.parse(row["kernel"]) for row in rows}
    fitted = {config for name in PRESETS for config in plan(load_spec(name), ["sm90"]).configs}
    facts: dict[str, object] = {"commit": _git("rev-parse", "HEAD"), "uncommitted": _git("status", "--short")}
    for name, configs in (
        (LIBRARY.stem, sorted([*CONFIGS, *gradients])),
        (BENCH_LIBRARY.stem, sorted(fitted | measured | set(map(KernelConfig.parse, DENSE_KERNELS)))),
    ):
        made = Plan(name, tuple(configs))
        result = build(made, CARRIED)
        shutil.copy(library_path(CARRIED, name), LIBRARY.with_name(f"{name}.so"))
        facts[name] = result.records
        print(f"{name}.so: {len(configs)} kernels, {len(result.compiled)} compiled in {result.seconds:.0f} s")
        shutil.rmtree(CARRIED / name)
    shutil.copy(core_path(), CORE)
    build_device(DEVICE)
    PLAN.write_text(json.dumps(first) + "\n")
    (CARRIED / "problems.json").write_text(json.dumps(_problems(), indent=1) + "\n")
    FACTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{sum(path.stat().st_size for path in CARRIED.iterdir()) / 2**20:.1f} MB in {CARRIED}")


if __name__ == "__main__":
    main()
