"""Adds up what the emulator counted in the launches of a call, and puts it into words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# First part of an opcode; the first class that has it. What is left is integer and logic.
_CLASSES: dict[str, frozenset[str]] = {
    "matrix": frozenset({"wgmma", "tcgen05", "mma"}),
    "exp2": frozenset({"ex2"}),
    "synchronisation": frozenset({"mbarrier", "bar", "barrier", "fence", "membar", "nanosleep", "setmaxnreg", "elect"}),
    "asynchronous copy": frozenset({"cp", "prefetch"}),
    "load and store": frozenset({"ld", "st", "ldmatrix", "stmatrix", "red", "atom"}),
    "conversion": frozenset({"cvt"}),
    "control": frozenset({"bra", "brx", "call", "ret", "exit", "trap"}),
    "warp": frozenset({"shfl", "vote", "match", "redux", "activemask"}),
    "move": frozenset({"mov", "selp", "cvta", "prmt"}),
}
# What is read of each launch that the stand-in reports.
_TOTALS = (
    *("instructions", "mma_operations", "async_load_bytes", "async_store_bytes", "load_bytes", "store_bytes"),
    *("interior_tiles", "shell_tiles", "interior_instructions", "shell_instructions"),
)
REPORTED = frozenset({*_TOTALS, "opcodes", "kernel", "grid"})
OLDER_EMULATOR = "the library is linked to an older emulator; build it again"
_FLOAT = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"})


def class_of(opcode: str) -> str:
    """The class of an instruction: what hardware unit or purpose it stands for, roughly."""
    parts = opcode.split(".")
    for name, opcodes in _CLASSES.items():
        if parts[0] in opcodes:
            return name
    return "float" if _FLOAT.intersection(parts[1:]) else "integer and logic"


@dataclass(frozen=True)
class WorkCounters:
    """Counts of the launches of one call. Instructions are warp instructions of PTX, which ptxas changes further.

    Attributes:
        launches: kernels launched.
        instructions: of all warps.
        classes: the same by class.
        mma_instructions: matrix products that were issued, per warp.
        mma_operations: their multiplications and additions.
        exp2: exponentials, of single threads.
        async_load_bytes: bytes that TMA brought to shared memory.
        async_store_bytes: bytes that TMA took from it.
        load_bytes, store_bytes: bytes of ordinary loads and stores of all threads, shared memory included.
        interior_tiles, shell_tiles: KV tiles visited without and with a mask; 0 if the kernel has no markers.
        interior_instructions, shell_instructions: executed on them, by all warps that compute. In a pipelined loop,
            the product with V of a tile is counted with the tile after it. 0 if the markers only count tiles, as in
            the variant ``cutlass``, whose loops are CUTLASS's.
    """

    launches: int
    instructions: int
    classes: Mapping[str, int]
    mma_instructions: int
    mma_operations: int
    exp2: int
    async_load_bytes: int
    async_store_bytes: int
    load_bytes: int
    store_bytes: int
    interior_tiles: int
    shell_tiles: int
    interior_instructions: int
    shell_instructions: int
    opcodes: Mapping[str, int] = field(repr=False)

    @property
    def tiles(self) -> int:
        """KV tiles visited."""
        return self.interior_tiles + self.shell_tiles

    def rates(self) -> dict[str, float]:
        """Instructions per piece of work, and bytes and work per KV tile; only those that are defined."""
        pairs = {
            "instructions_per_interior_tile": (self.interior_instructions, self.interior_tiles),
            "instructions_per_shell_tile": (self.shell_instructions, self.shell_tiles),
            "instructions_per_tile_all_warps": (self.instructions, self.tiles),
            "instructions_per_exp2": (32 * self.instructions, self.exp2),
            "instructions_per_mma": (self.instructions, self.mma_instructions),
            "mma_operations_per_instruction": (self.mma_operations, self.instructions),
            "exp2_per_tile": (self.exp2, self.tiles),
            "mma_operations_per_tile": (self.mma_operations, self.tiles),
            "async_load_bytes_per_tile": (self.async_load_bytes, self.tiles),
        }
        return {name: over / under for name, (over, under) in pairs.items() if under and over}

    def as_json(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), **self.rates()}


def count_work(launches: Sequence[Mapping[str, Any]]) -> WorkCounters:
    """Adds up launches as the stand-in reports them."""
    opcodes: Counter[str] = Counter()
    for launch in launches:
        opcodes.update(launch["opcodes"])
    classes: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        classes[class_of(opcode)] += count

    totals = {name: sum(int(launch[name]) for launch in launches) for name in _TOTALS}
    for kind in ("interior", "shell"):
        if totals[f"{kind}_instructions"] < totals[f"{kind}_tiles"]:
            totals[f"{kind}_instructions"] = 0  # nothing between markers that only count tiles
    return WorkCounters(
        **totals,
        launches=len(launches),
        classes=dict(classes.most_common()),
        mma_instructions=sum(n for opcode, n in opcodes.items() if ".mma" in opcode or opcode.startswith("mma.")),
        # A packed exponential would be two; there is none for f32.
        exp2=32 * sum(n for opcode, n in opcodes.items() if opcode.startswith("ex2.")),
        opcodes=dict(sorted(opcodes.items())),
    )
