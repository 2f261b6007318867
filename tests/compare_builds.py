"""Our GPU kernels beside the forward kernel alone of CUTLASS's example for their arch, from its own headers: processor
seconds of compiling and linking, size of the library, and what ptxas spilled. One after the other, with the same
compiler, flags and target.

``python compare_builds.py [KEY...]``; needs the CUDA compiler, CUTLASS's sources, and about a minute per kernel.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from cutlass_kernels import FOLDER, SOURCES
from gnaforge.build.identity import include_dir
from gnaforge.build.render import render_kernel, render_library
from gnaforge.build_tools.cuda_compiler import cuda_compiler, kernel_facts, machine_code
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.families import TARGETS, family_of
from gnaforge.runtime.config import KernelConfig

KEYS = (
    "gna_forward-sm90-r1-bf16-d128-q128-kv128",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8",
    "gna_forward-sm90-r1-bf16-d128-q128-kv128-cutlass",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8-cutlass",
    "gna_forward-sm100-r1-bf16-d128-q256-kv128",
    "gna_forward-sm100-r3-bf16-d128-q4x8x8-kv2x8x8",
    "gna_forward-sm100-r1-bf16-d256-q128-kv64",
    "gna_forward-sm100-r1-bf16-d128-q256-kv128-cutlass",
    "gna_forward-sm100-r3-bf16-d128-q4x8x8-kv2x8x8-cutlass",
)
EXAMPLES = {"sm90": "hopper", "sm100": "blackwell"}
ELEMENTS = {"fp16": "cutlass::half_t", "bf16": "cutlass::bfloat16_t"}
HEADER = (
    "kernel",
    "processor seconds",
    "library",
    "bytes of stack, spill stores, loads",
    "local accesses by registers",
)


def processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(name: str, commands: list[list[str]], folder: Path) -> tuple[str, ...]:
    """Runs the commands in ``folder``, where they compile kernel.cu and link out.so; a line of the table."""
    start = processor_seconds()
    log = ""
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        log += done.stdout + done.stderr
        if done.returncode:
            sys.exit(log)
    seconds = processor_seconds() - start
    kernel_facts(log, spill_limit=1 << 20)
    spills = next(line for line in log.splitlines() if "bytes stack frame" in line)
    local = machine_code(folder).local_accesses()
    return (
        name,
        f"{seconds:.0f}",
        f"{(folder / 'out.so').stat().st_size / 1024:,.0f} KiB",
        ", ".join(word for word in spills.split() if word.isdigit()),
        ", ".join(f"{count} of {registers}" for registers, count in local.items()),
    )


def example(arch: str, dtype: str, head_dim: int) -> tuple[str, ...]:
    """The thin forward host of `cutlass/`."""
    source, _, number = SOURCES[EXAMPLES[arch]]
    compiler = cuda_compiler(cxx_compiler(), TARGETS[arch].nvcc_target, cutlass=number, at_least=TARGETS[arch].nvcc)
    defines = [f"-DGNAFORGE_ELEMENT={ELEMENTS[dtype]}", f"-DGNAFORGE_FORWARD_DIM={head_dim}"]
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernel.cu"
        kernel.write_text(f'#include "{FOLDER / source}.cu"\n')
        compile_it = [*compiler.compile_command(str(kernel), str(kernel.with_suffix(".o")), FOLDER), *defines]
        link_it = compiler.link_command(["kernel.o"], "out.so")
        return measured(f"example {number[:2]}, {dtype}, head dim {head_dim}", [compile_it, link_it], Path(folder))


def ours(config: KernelConfig) -> tuple[str, ...]:
    """One of our kernels, with the table of its library."""
    family = family_of(config)
    target = family.target
    compiler = cuda_compiler(cxx_compiler(), target.nvcc_target, cutlass=family.cutlass, at_least=target.nvcc)
    with tempfile.TemporaryDirectory() as folder:
        kernel, library = Path(folder) / "kernel.cu", Path(folder) / "library.cpp"
        kernel.write_text(render_kernel(config))
        library.write_text(render_library(config.key, [config]))
        commands = [
            compiler.compile_command(str(kernel), str(kernel.with_suffix(".o")), include_dir()),
            compiler.host.compile_command(str(library), str(library.with_suffix(".o")), include_dir()),
            compiler.link_command(["kernel.o", "library.o"], "out.so"),
        ]
        return measured(config.key, commands, Path(folder))


def main(keys: list[str]) -> None:
    configs = [KernelConfig.parse(key) for key in keys or KEYS]
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    seen = set()
    for config in configs:
        channels = 64 if max(config.head_dim, config.value_head_dim) <= 64 else 128
        beside = (config.arch, config.dtype, channels)
        if beside not in seen:
            print("| " + " | ".join(example(*beside)) + " |", flush=True)
            seen.add(beside)
        print("| " + " | ".join(ours(config)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
