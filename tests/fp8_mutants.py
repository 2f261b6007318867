"""Headers of sm100's kernels, each broken in one place where e4m3 differs from 16 bits: a check in the emulator must
notice every one.

``python fp8_mutants.py [EVERY [FIRST]]`` tries all of them, or every so manieth from the FIRSTth on, and prints those
that nobody noticed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from emulated_calls import MODES
from gnaforge.build import kernels as building
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import find_libraries
from gnaforge.build_tools import includes
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule

# Two halves of two heads each, whose P is apart, with padding of rows of V; and one half, with Q in tensor memory.
APART = "gna_forward-sm100-r1-e4m3-obf16-d80v48-q125h2-kv80"
# Of rank 3, with heads that don't fold into channels: a batch entry is a slice of its own.
SLICED = "gna_forward-sm100-r3-e4m3-obf16-d80-q4x5x6-kv2x4x8"
COPIED = "gna_forward-sm100-r2-e4m3-ofp16-d208-q8x16-kv8x6"
PROBLEMS = {
    # Descales of all three tensors; then of none; scores that grow by more than a shift may lag behind.
    APART: (
        Problem(292, 90, heads=4, kv_heads=2, batch=2, extra_tokens=(33,)),
        Problem(299, 299, heads=2, kv_heads=1, scale=0.9),
    ),
    COPIED: (Problem((12, 18), (9, 11), heads=4, kv_heads=2, batch=2),),
    SLICED: (Problem((6, 7, 8), (3, 5, 5), heads=2, kv_heads=1, batch=3),),
}
FACTORS, DESCALE, SOFTMAX, MMA = (
    "sm100/forward/factors.h",
    "gpu/descale.h",
    "sm100/forward/softmax.h",
    "sm100/forward/mma.h",
)
LAYOUT, ROWS, EPILOGUE, KERNEL = (f"sm100/forward/{name}.h" for name in ("layout", "row_softmax", "epilogue", "kernel"))
MATH, ELEMENT, TCGEN05 = "ptx/math.h", "gpu/element.h", "ptx/tcgen05.h"
CALLS = "calls"  # noticed by calls of which a list has several, and not by the checks of a single one


class Mutant(NamedTuple):
    """One change of one header below ``gnaforge/``: ``old``, which stands there once, becomes ``new``. Noticed by
    problems of the kernel ``by``, or by what test_sm100_fp8.py calls with one."""

    header: str
    old: str
    new: str
    by: str = APART

    def __str__(self) -> str:
        return f"{self.header}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}"


MUTANTS = [
    Mutant(FACTORS, "growth = 0.75f", "growth = 1.5f"),
    Mutant(FACTORS, "growth = 0.75f", "growth = 8.0f"),
    Mutant(FACTORS, "p_exponent = 8", "p_exponent = 0", CALLS),
    Mutant(FACTORS, "p_exponent = 8", "p_exponent = 10"),
    Mutant(FACTORS, "code = 0;\n  static constexpr float growth", "code = 1;\n  static constexpr float growth"),
    Mutant(FACTORS, "scaled = true", "scaled = false"),
    Mutant(ROWS, ": Factors::p_exponent - base", ": -base"),
    Mutant(ROWS, ": Factors::p_exponent - base", ": -Factors::p_exponent - base"),
    Mutant(ROWS, ": sum * (1.0f / (1 << Factors::p_exponent))", ": sum"),
    Mutant(
        EPILOGUE,
        "Row::true_sum(inverse) * gpu::RowDescales<L::heads>(params, work, 0).values",
        "Row::true_sum(inverse)",
    ),
    Mutant(EPILOGUE, "Row::true_sum(inverse) * gpu", "inverse * gpu"),
    Mutant(EPILOGUE, "(params, work, 0).values", "(params, work, 0).scores"),
    Mutant(DESCALE, "batch * batch_stride[tensor] + ", ""),
    Mutant(DESCALE, " + head * head_stride[tensor]", ""),
    Mutant(DESCALE, "head * head_stride[tensor]", "head * batch_stride[tensor]"),
    Mutant(DESCALE, "if (from == nullptr) return 1.0f;", "if (from == nullptr) return 2.0f;"),
    Mutant(DESCALE, "found.batch_stride[i] = tensor->batch_stride;", "found.batch_stride[i] = tensor->head_stride;"),
    Mutant(DESCALE, "GNAFORGE_DESCALE_Q + i", "GNAFORGE_DESCALE_Q + 2 - i"),
    Mutant(DESCALE, "+ work.batch;", ";"),
    Mutant(DESCALE, "std::int64_t{params.first_batch(work.slice)} + ", "", SLICED),
    Mutant(DESCALE, " - params.slices[work.slice].first_head", "", CALLS),
    Mutant(DESCALE, "params.call(work.slice)", "params.call(0)", CALLS),
    Mutant(DESCALE, "quotient(first / Heads)", "quotient(first)"),
    Mutant(DESCALE, "first + member", "first"),
    Mutant(DESCALE, " * call.at(Descales::k, batch, kv_head)", ""),
    Mutant(DESCALE, "call.at(Descales::k, batch, kv_head)", "call.at(Descales::k, batch, first)"),
    Mutant(DESCALE, "call.at(Descales::q, batch, first + member) * ", ""),
    Mutant(DESCALE, "values = call.at(Descales::v", "values = call.at(Descales::k"),
    Mutant(DESCALE, "call.at(Descales::v, batch, kv_head)", "call.at(Descales::v, 0, kv_head)"),
    Mutant(SOFTMAX, "scale *= gpu", "gpu"),
    Mutant(SOFTMAX, "L::head(threadIdx.x % half_rows)).scores", "0).scores"),
    Mutant(
        SOFTMAX,
        "pack(scores[Begin + 2 * i - 2], scores[Begin + 2 * i - 1], a, b)",
        "pack(a, b, scores[Begin + 2 * i - 2], scores[Begin + 2 * i - 1])",
    ),
    Mutant(SOFTMAX, "p[i] = 0;", "p[i] = 0x7F7F7F7F;"),
    Mutant(SOFTMAX, "ptx::store_tensor_8(at, p);", "ptx::store_tensor_8(at + 4, p);"),
    Mutant(SOFTMAX, "p_words = 32 * L::Element::bytes / 4", "p_words = 16"),
    Mutant(MMA, "int step = First / L::mma_depth", "int step = First / 16"),
    Mutant(MMA, "ceil_div(Last, L::mma_depth)", "Last / L::mma_depth"),
    Mutant(MMA, "v + step * L::mma_depth", "v + step * 16"),
    Mutant(MMA, "ceil_div(L::head_dim, L::mma_depth)", "L::head_dim / L::mma_depth"),
    Mutant(MMA, "ceil_div(L::head_dim, L::mma_depth)", "L::head_dim / L::mma_depth", COPIED),
    Mutant(MMA, "multiply_tensor<L::Element::bytes>(L::scores(buffer)", "multiply_tensor<2>(L::scores(buffer)", COPIED),
    Mutant(MMA, "multiply_tensor<L::Element::bytes>(L::out(half)", "multiply_tensor<2>(L::out(half)"),
    Mutant(MMA, "multiply_shared<L::Element::bytes>", "multiply_shared<2>"),
    Mutant(LAYOUT, "kv_rows = round_up(columns, mma_depth)", "kv_rows = columns"),
    Mutant(LAYOUT, "kv_rows = round_up(columns, mma_depth)", "kv_rows = columns", COPIED),
    Mutant(LAYOUT, "kv_box_bytes = columns * row_bytes", "kv_box_bytes = kv_rows * row_bytes"),
    Mutant(LAYOUT, "p_columns = kv_rows * Element::bytes / 4", "p_columns = columns * Element::bytes / 4"),
    Mutant(LAYOUT, "p_columns = kv_rows * Element::bytes / 4", "p_columns = 16"),
    Mutant(LAYOUT, "mma_depth = mma_bytes / Element::bytes", "mma_depth = 16"),
    Mutant(LAYOUT, "round_up(head_dim, mma_depth) * Element::bytes / 4", "round_up(head_dim, mma_depth) / 8", COPIED),
    Mutant(KERNEL, "if constexpr (L::columns < L::kv_rows) {", "if constexpr (L::columns > L::kv_rows) {"),
    Mutant(KERNEL, "if constexpr (L::columns < L::kv_rows) {", "if constexpr (L::columns > L::kv_rows) {", COPIED),
    Mutant(KERNEL, "(memory + L::kv_offset, blocks, L::columns)", "(memory + L::kv_offset, 1, L::columns)"),
    Mutant(KERNEL, "(memory + L::kv_offset, blocks, L::columns)", "(memory + L::kv_offset, blocks, L::columns + 8)"),
    Mutant(MATH, "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1", "cvt.rn.satfinite.e4m3x2.f32 low, %1, %2"),
    Mutant(MATH, "mov.b32 %0, {low, high}", "mov.b32 %0, {high, low}"),
    Mutant(MATH, "e4m3x2.f32 high, %4, %3", "e4m3x2.f32 high, %2, %1"),
]
"""Made by hand: one for each thing that is easily forgotten."""


def missing() -> list[Mutant]:
    """Those that can't be made: the header has changed."""
    folder = include_dir() / "gnaforge"
    return [mutant for mutant in MUTANTS if (folder / mutant.header).read_text().count(mutant.old) != 1]


def fault_of(mutant: Mutant, folder: Path) -> str:
    """What notices it, empty if nothing does; ``folder`` has the headers, which stay as they are."""
    key = COPIED if mutant.by == CALLS else mutant.by
    path = folder / "gnaforge" / mutant.header
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        with patch.object(building, "include_dirs", lambda _: (folder,)):
            includes.forget_headers()
            config = KernelConfig.parse(key)
            try:
                library = find_libraries([config], emulated=True)[config]
            except BuildError as error:
                return f"doesn't compile: {error}"
    finally:
        path.write_text(text)
        includes.forget_headers()
    if mutant.by != CALLS:
        with Verifier(
            config, library, Settings([Schedule("lazy", MODES["lazy"])], gaps=False, poison=False)
        ) as verifier:
            for problem in PROBLEMS[key]:
                found = verifier.verify(for_kernel(problem, config))
                if found.failed:
                    return f"{found.failed}: {found.message}"
        return ""
    return _fault_of_calls(library)


def _fault_of_calls(library: Path) -> str:
    from emulated_calls import PRELUDE, run
    from test_sm100_fp8 import CALLS as CODE

    try:
        run(PRELUDE.format(key=COPIED, library=library) + CODE)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def try_mutants(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Those that nobody noticed. The headers as they are must pass."""
    left = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "include"
        shutil.copytree(include_dir(), folder)
        for by in dict.fromkeys(mutant.by for mutant in mutants):
            fault = fault_of(Mutant(FACTORS, "#pragma once", "#pragma once", by), folder)
            assert not fault, f"{by}: {fault}"
        for number, mutant in enumerate(mutants, 1):
            said = fault_of(mutant, folder)
            left += [] if said else [mutant]
            line = (said.splitlines() or ["NOT NOTICED"])[-1 if mutant.by == CALLS else 0][:120]
            print(f"{number} of {len(mutants)}: {mutant} by {mutant.by}: {line}", flush=True)
    return left


def main(every: int = 1, first: int = 0) -> None:
    """Exits with 1 if a mutant isn't noticed."""
    mutants = MUTANTS[first::every]
    left = try_mutants(mutants)
    print(f"{len(mutants) - len(left)} of {len(mutants)} noticed")
    sys.exit(bool(left))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
