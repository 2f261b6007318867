"""Facts that the time model has to be told: of a family's kernels, and of a target's multiprocessor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .instruction import Instruction, Pipe, Role


@dataclass(frozen=True)
class Multiprocessor:
    """Cycles of one of the four parts of a streaming multiprocessor, each of which issues one instruction a cycle.

    Attributes:
        occupancy: of a pipe by one instruction of a warp; of tensor memory by one column of its lanes.
        longer: the same of some instructions, by name.
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
    longer: Mapping[str, int]
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
        Pipe.TENSOR_MEMORY: 1,
    },
    longer={},
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

SM100 = replace(
    SM90,
    # ptxas's own stalls. 128 bytes a cycle and part of tensor memory, and latencies to registers and back: estimates.
    longer={"FFMA2": 2, "FADD2": 2, "FMUL2": 2},
    latency={**SM90.latency, "LDTM": 60, "STTM": 30},
    # 8192 FLOP a cycle: Zadouri et al., FlashAttention-4.
    fma_per_cycle=4096,
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

    @property
    def contents(self) -> str:
        """What the loops have that others haven't, for messages."""
        return f"{self.groups} groups of matrix products (WARPGROUP.ARRIVE)"

    def admits(self, body: Sequence[Instruction]) -> bool:
        """Whether these are the instructions of such a loop, or of one around it."""
        groups = sum(instruction.role is Role.ARRIVE for instruction in body)
        return groups == self.groups and not any(instruction.name in self.never for instruction in body)


@dataclass(frozen=True)
class RoleLoop:
    """The loop over KV tiles of warps that have a role of their own.

    Attributes:
        names: of instructions that are in it, and together in no other loop but those around it.
        rare, aside: as in `TileLoop`.
        loads: loads of tensor memory (LDTM) that a tile takes, in one block; 0 if all tiles take as many. A block with
            another number that isn't rare is for tiles of which fewer columns are computed.
    """

    names: frozenset[str]
    rare: Callable[[Sequence[Instruction]], bool] = no_block
    aside: Callable[[Sequence[Instruction]], bool] = no_block
    loops: int = 1
    loads: int = 0

    @property
    def contents(self) -> str:
        """As of `TileLoop`."""
        return " and ".join(sorted(self.names))

    def is_own(self, block: Sequence[Instruction]) -> bool:
        """Whether a block loads the scores of its tiles; any, if it doesn't say how many loads that takes."""
        return self.loads in (0, self._loads_of_scores(block))

    def is_of_others(self, block: Sequence[Instruction]) -> bool:
        """Whether a block loads the scores of tiles of another number of columns."""
        return not self.is_own(block) and self._loads_of_scores(block) > 0

    def _loads_of_scores(self, block: Sequence[Instruction]) -> int:
        return 0 if self.rare(block) else sum(instruction.name == "LDTM" for instruction in block)

    def admits(self, body: Sequence[Instruction]) -> bool:
        """As of `TileLoop`."""
        return self.names <= {instruction.name for instruction in body}


@dataclass(frozen=True)
class Step:
    """Matrix products that one thread issues one after the other.

    Attributes:
        products: how many.
        cycles: of each, on the tensor cores.
        awaits: the mbarrier that the thread waits at before, where softmax warps arrive.
        tells: the mbarrier at which they arrive when they are done, where softmax warps wait.
    """

    products: int
    cycles: int
    awaits: int | None = None
    tells: int | None = None


@dataclass(frozen=True)
class Roles:
    """The way that kernels work through KV tiles where one thread issues products, softmax warps turn scores into
    probabilities, and each waits for the other at mbarriers. These have numbers, which the kernel itself needn't use.

    Attributes:
        multiprocessor: what they run on.
        softmax: the loop of softmax warps; they wait for scores, load them, and arrive for each part of probabilities.
        issues: the loop of the thread that issues products.
        steps: those of one KV tile, as that thread issues them.
        scores, probabilities: for each softmax warp of a part of the multiprocessor the mbarrier where it awaits
            scores, and those where it arrives, in order.
        apart: where probabilities don't take the scores' place, likewise the mbarrier where it arrives once it has read
            scores, and the one where it awaits the products with the probabilities before.
        streams: whether scores of the next Q tile's first KV tile come before the output of this one's last.
        short: of each smaller number of columns that is computed of a last KV tile, the loads of a softmax warp
            (`RoleLoop.loads`), and the steps: as many as ``steps``, of which some have no products.
    """

    multiprocessor: Multiprocessor
    softmax: RoleLoop
    issues: RoleLoop
    steps: tuple[Step, ...]
    scores: tuple[int, ...]
    probabilities: tuple[tuple[int, ...], ...]
    streams: bool
    apart: tuple[tuple[int, int], ...] = ()
    short: Mapping[int, tuple[int, tuple[Step, ...]]] = field(default_factory=dict)
