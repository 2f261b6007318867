"""Facts that the time model has to be told: of a family's kernels, and of a target's multiprocessor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .instruction import Instruction, Pipe


@dataclass(frozen=True)
class Multiprocessor:
    """Cycles of one of the four parts of a streaming multiprocessor, each of which issues one instruction a cycle.

    Attributes:
        occupancy: of a pipe by one instruction of a warp.
        latency: from issue to the result, where ptxas leaves it to a scoreboard: by the instruction's name.
        other_latency: of the others, and of the special functions in `MUFU`.
        read_latency: until the operands have been read, where a scoreboard says so.
        product_start, product_end: from a product's issue to its start, and from its end to the wait's.
        arrive: what WARPGROUP.ARRIVE takes.
        barrier: from the last arrival at a named barrier to the next instruction.
        fence: what MEMBAR takes.
        fma_per_cycle: multiplications and additions of the tensor cores of all four parts.
        warpgroup_threads: of the warps that compute a product together, one in each part.
        registers, shared_memory: there are for thread blocks.
    """

    occupancy: Mapping[Pipe, int]
    latency: Mapping[str, int]
    other_latency: int
    read_latency: int
    product_start: int
    product_end: int
    arrive: int
    barrier: int
    fence: int
    fma_per_cycle: int
    warpgroup_threads: int
    registers: int
    shared_memory: int

    def product_cycles(self, columns: int) -> int:
        """What a product of 64 rows, 16 deep, takes."""
        return 64 * 16 * columns // self.fma_per_cycle

    def blocks(self, threads: int, registers: int, shared_memory: int) -> int:
        """Thread blocks that fit: of so many threads with so many registers at launch, and bytes of shared memory, to
        which the hardware adds 1 KB."""
        by_registers = self.registers // (threads * max(registers, 1))
        return max(1, min(by_registers, self.shared_memory // (max(shared_memory, 0) + 1024), 32))


SM90 = Multiprocessor(
    # FP32: 32 lanes; integers, comparisons, conversions: 16; special functions: 4 (CUDA C Programming Guide, arithmetic
    # instructions). ptxas's own stalls say the same.
    occupancy={
        **{Pipe.FMA: 1, Pipe.INTEGER: 2, Pipe.ALU: 2, Pipe.MUFU: 8, Pipe.MEMORY: 2, Pipe.UNIFORM: 2, Pipe.CONTROL: 1},
        Pipe.TENSOR: 2,
    },
    latency={"SHFL": 24, "LDS": 28, "S2R": 30, "LDC": 30, "R2UR": 12, "MUFU": 22, "F2I": 22, "I2F": 22},
    other_latency=24,
    read_latency=12,
    product_start=10,
    product_end=24,
    arrive=4,
    barrier=26,
    fence=40,
    fma_per_cycle=2048,
    warpgroup_threads=128,
    registers=65_536,
    shared_memory=228 * 1024,
)


def no_block(block: Sequence[Instruction]) -> bool:
    """Says of no block that it runs rarely."""
    return False


@dataclass(frozen=True)
class TileLoop:
    """The way that warps of a family's kernels work through KV tiles: one tile a pass of a loop, within one of Q tiles.

    Attributes:
        multiprocessor: what they run on.
        warps: of a thread block those that run the loop, on each of the multiprocessor's parts.
        threads: of a thread block, others included.
        groups: runs of matrix products that a loop issues for one tile, each behind a WARPGROUP.ARRIVE.
        peeled: of a Q tile, the KV tiles that no pass of a loop is for: 1 where loops are rotated, else 0.
        loops: 1 for all KV tiles; 2 where shell tiles have one of their own, with the longer way through it.
        beside: the loop that half of ``warps`` have, where they take the same tiles as the others in one of their own.
        most_blocks: thread blocks that a kernel's grid has on a multiprocessor, where more would fit.
        lead: tiles by which one of two such loops may be ahead, since both have to free what a tile takes.
        never: names of instructions that the loop of these warps hasn't got, which tells it from other warps' loops.
        rare: says of a block that the loop may pass by that it runs so rarely that no tile is charged with it.
        aside: the same of a block to which tiles come on the way of others that don't pass it by: so those that lead to
            it are charged.
    """

    multiprocessor: Multiprocessor
    warps: int
    threads: int
    groups: int
    peeled: int = 1
    loops: int = 1
    most_blocks: int = 32
    beside: TileLoop | None = None
    lead: int = 0
    never: frozenset[str] = field(default_factory=frozenset)
    rare: Callable[[Sequence[Instruction]], bool] = no_block
    aside: Callable[[Sequence[Instruction]], bool] = no_block
