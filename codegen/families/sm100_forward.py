"""The sm100 forward kernels: two halves of 128 query rows that take turns on the tensor cores, or one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import BuildError
from ..runtime.config import KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.family import Padding
from .family import Box, Family, Limits, MachineCode, q_box_of_halves
from .sm100_cutlass_forward import FAMILY as CUTLASS
from .sm100_times import FORWARD
from .target import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..build_tools.cycles import Roles, Step
    from ..build_tools.cycles.instruction import Instruction
    from ..build_tools.sass import Sass

_SHARED_MEMORY = 227 * 1024  # of one thread block (CUDA C Programming Guide, technical specifications)
_TENSOR_COLUMNS = 512  # of tensor memory (PTX ISA, Tensor Memory)
_HALF_ROWS = 128
_MMA_BYTES = 32  # of the factors of one product, along which it adds up
_CONTROL_BYTES = 5 * 1024  # barriers, facts and statistics, as in sm100/forward/layout.h
_LAUNCH_REGISTERS = 65_536 // 512
_SOFTMAX, _OTHER = 192, 64  # registers of a thread of each kind of warpgroup, as in layout.h


_HALF_BARRIERS = 5  # of one half of rows, see _steps
_PAIRS_BY_FMA = 6  # of 16, as in layout.h
_PADDING = Padding(rows=_HALF_ROWS, columns=16, short=(32, 64))  # as in short_tiles.h


def _whole(channels: int) -> int:
    """Channels of a product: 16 at a time."""
    return -(-channels // 16) * 16


def _chunks(head_dim: int) -> int:
    """Copies of 128 bytes that a row takes."""
    return -(-head_dim // 64)


def _tile(rows: int, kv_box: Box, head_dim: int, value_head_dim: int) -> str | None:
    columns, halves = prod(kv_box), rows // _HALF_ROWS
    needed = _scores_columns(columns) + halves * _whole(value_head_dim)
    if needed > _TENSOR_COLUMNS:
        return f"needs {needed} columns of tensor memory, of which there are {_TENSOR_COLUMNS}"
    # Q, and two stages of K or V, the least that goes on.
    q, widest = _chunks(head_dim), max(_chunks(head_dim), _chunks(value_head_dim))
    memory = 128 * (rows * q + 2 * columns * widest) + _CONTROL_BYTES
    if memory > _SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {_SHARED_MEMORY:,}"
    return None


def _scores_columns(columns: Any) -> Any:
    """Columns of tensor memory for scores, of both halves or of two KV tiles: a number, or an array."""
    return 2 * -(-columns // 32) * 32


def _copies_q(config: KernelConfig) -> bool:
    """Whether products read Q from tensor memory, as layout.h says: of one half, where there is room beside scores and
    output."""
    value_head_dim = config.value_head_dim or config.head_dim
    q = -(-config.head_dim * DTYPES[config.dtype].bytes // 32) * 8  # products take 32 bytes of a row, 4 in a column
    columns = _scores_columns(config.kv_columns) + _whole(value_head_dim) + q
    return config.q_rows <= _HALF_ROWS and columns <= _TENSOR_COLUMNS


def _puts_p_apart(config: KernelConfig) -> bool:
    """`_has_p_apart` of a config."""
    value_head_dim = config.value_head_dim or config.head_dim
    return bool(_has_p_apart(config.q_rows, config.kv_columns, value_head_dim, DTYPES[config.dtype].bytes))


def _has_p_apart(rows: Any, columns: Any, value_head_dim: int, element_bytes: int) -> Any:
    """Whether probabilities have columns of tensor memory of their own, as layout.h says: of two halves, where there is
    room. Of numbers, or arrays."""
    probabilities = -(-columns * element_bytes // _MMA_BYTES) * _MMA_BYTES // 4
    needed = _scores_columns(columns) + 2 * (_whole(value_head_dim) + probabilities)
    return (rows > _HALF_ROWS) & (needed <= _TENSOR_COLUMNS)


def _parts(config: KernelConfig, columns: int = 0) -> tuple[int, ...]:
    """Columns of the parts in which probabilities of a KV tile, or of so many ``columns`` of one, are announced, as
    layout.h says: all but the last word, then that; or all but 32, where the last word is half of a fourth one and
    tiles wait for products. One word is announced alone; if others have more, it has no second part."""
    if config.kv_columns <= 32:
        return (config.kv_columns,)
    columns = columns or config.kv_columns
    waits = DTYPES[config.dtype].bytes == 2 and not _puts_p_apart(config)
    first = columns - 32 if waits and columns > 96 else (columns - 1) // 32 * 32
    return (first, columns - first) if first else (columns, 0)


def exponentials(config: KernelConfig, columns: int = 0) -> tuple[int, ...]:
    """Of a row of scores, those that the unit for them computes, in each of `_parts`; FMAs compute the rest, of all
    words but the last (softmax.h)."""
    found, begin = [], 0
    parts = _parts(config, columns)
    other = (sum(parts) - 1) // 32 * 32  # columns that have some by FMAs
    for own in parts:
        by_fma = max(min(begin + own, other) - begin, 0)
        found.append(own - by_fma * _PAIRS_BY_FMA // 16)
        begin += own
    return tuple(found)


def _under_product(config: KernelConfig, softmax: Sequence[Instruction]) -> int:
    """Exponentials of the last part that come after the first one is announced, and so beside the product with that.
    Each announcement waits for what was stored, by a fence. Tiles of which fewer columns are computed have their own.

    Raises:
        BuildError: ptxas computes some of them before.
    """
    runs = [0]
    for instruction in softmax:
        if instruction.name == "FENCE":
            runs.append(0)
        runs[-1] += instruction.name == "MUFU"
    of_all = exponentials(config)
    wanted = sorted(
        (*of_all, *(n for short in _PADDING.short_tiles(config.kv_tile) for n in exponentials(config, short)))
    )
    # Whichever is moved, it leaves a run that is too short.
    found = sorted([0] * len(wanted) + runs)[-len(wanted) :]
    for own, least in zip(found, wanted, strict=True):
        if own < least:
            raise BuildError(
                "ptxas moved exponentials above the first announcement of probabilities: "
                f"{own} of {least} come after it"
            )
    return found[wanted.index(of_all[-1])]


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record.

    Raises:
        BuildError: products are missing, warps spill, have other registers than planned, or the softmax isn't what it
            was written to be.
    """
    from ..build_tools.cycles.instruction import decode
    from ..build_tools.sass import MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR

    steps, of_scores = _steps(config), _of_scores(config)
    scores = sum(step.products for step in steps if step.tells in of_scores)
    # Products with V have code for each number of columns that is computed.
    each = (steps, *(_steps(config, columns) for columns in _PADDING.short_tiles(config.kv_tile)))
    values = sum(step.products for own in each for step in own) - len(each) * scores
    shared, tensor = (0, scores + values) if _copies_q(config) else (scores, values)
    for opcode, form, of_tile in ((UTCHMMA_SHARED, "shared", shared), (UTCHMMA_TENSOR, "tensor", tensor)):
        if (products := code.count(opcode)) < of_tile:
            raise BuildError(
                f"the machine code has {products} tensor core instructions (UTCHMMA) with a left factor in {form} "
                f"memory, its KV tiles take {of_tile}"
            )
    # With more it can't start; with fewer, warps would wait for ever for the registers that they ask for.
    if registers != _LAUNCH_REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_LAUNCH_REGISTERS}")
    local = code.local_accesses()
    for role, planned in (("softmax", _SOFTMAX), ("other", _OTHER)):
        if planned not in local:
            found = ", ".join(str(count) for count in local if count) or "none"
            raise BuildError(f"no warps set {planned} registers a thread, as planned for {role} warps; set: {found}")
    if accesses := sum(local.values()):
        raise BuildError(f"the machine code has {accesses} accesses to local memory")
    instructions = decode(code.code_of(_SOFTMAX))
    names = {instruction.name for instruction in instructions}
    for name, what in (("FFMA2", "packed multiplications"), ("FMNMX3", "maxima of three")):
        if name not in names:
            raise BuildError(f"the softmax has no {what} ({name})")
    counts = {"products": code.count(UTCHMMA_SHARED) + code.count(UTCHMMA_TENSOR), "mufu": code.count(MUFU)}
    if config.kv_columns > 32:
        counts["mufu_under_product"] = _under_product(config, instructions)
    return counts


def _is_rescaling(block: Sequence[Instruction]) -> bool:
    """Whether a block of softmax warps multiplies the output, as few tiles do."""
    return {"LDTM", "STTM"} <= {instruction.name for instruction in block}


def _is_below_split(block: Sequence[Instruction]) -> bool:
    """Whether a block works out what rows see of a KV tile below a split, as few tiles are: it reads the bands again,
    those of the Q tile's slice."""
    return {"LDC", "LDS", "SEL", "VIADDMNMX"} <= {instruction.name for instruction in block}


def _product(columns: Any, shared_rows: Any) -> Any:
    """Cycles of one product of 128 rows, numbers or arrays: of the tensor cores, 8192 FLOP a cycle of 16-bit elements,
    or of reading its factors' rows from shared memory, 128 bytes a cycle, if that takes longer (Zadouri et al.,
    FlashAttention-4)."""
    work, reads = columns / 2, shared_rows * _MMA_BYTES / 128
    return (work + reads + abs(work - reads)) / 2


def _scores_product(columns: Any, copied: Any) -> Any:
    """Of one with Q, which is read from shared memory as well if it isn't ``copied`` to tensor memory."""
    return _product(columns, columns + _HALF_ROWS * (1 - copied))


def _of_scores(config: KernelConfig) -> tuple[int, ...]:
    """The mbarriers of `_steps` at which scores are told of: of each half."""
    return (0, _HALF_BARRIERS) if config.q_rows > _HALF_ROWS else (0,)


def _steps(config: KernelConfig, columns: int = 0) -> tuple[Step, ...]:
    """The products of a KV tile, or of so many ``columns`` of one, as mma.h issues them. Of the mbarriers those of one
    half, or of all rows, are numbered 0: scores, 1: the first words of probabilities, 2: the last one; and, where these
    don't take the scores' place, 3: scores are read, 4: probabilities are. The other half's come behind them."""
    from ..build_tools.cycles import Step

    apart, depth = _puts_p_apart(config), _MMA_BYTES // DTYPES[config.dtype].bytes
    out = _whole(config.value_head_dim or config.head_dim)
    parts = _parts(config, columns)
    columns = columns or config.kv_columns
    scores_cycles = round(_scores_product(columns, _copies_q(config)))
    found: list[Step] = []
    for told in _of_scores(config):
        values = [
            Step(-(-keys // depth), round(_product(out, out)), awaits=told + part)
            for part, keys in enumerate(parts, start=1)
        ]
        scores = Step(-(-config.head_dim // depth), scores_cycles, tells=told)
        if apart:
            scores, values[-1] = replace(scores, awaits=told + 3), replace(values[-1], tells=told + 4)
        scores_first = apart or config.q_rows <= _HALF_ROWS
        found += [scores, *values] if scores_first else [*values, scores]
    return tuple(found)


def _product_cycles(rows: Any, columns: Any, head_dim: int, value_head_dim: int) -> Any:
    """Of a tile's products: numbers, or arrays."""
    tensor = _scores_columns(columns) + _whole(value_head_dim) + _whole(head_dim) // 2
    copied = (rows <= _HALF_ROWS) & (tensor <= _TENSOR_COLUMNS)
    out = _whole(value_head_dim)
    scores = _whole(head_dim) / 16 * _scores_product(columns, copied)
    return rows / _HALF_ROWS * (scores + columns / 16 * _product(out, out))


def _occupancy(rows: Any, columns: Any, head_dim: int, value_head_dim: int, element_bytes: int = 2) -> tuple[Any, ...]:
    """Softmax warpgroups of a thread block, and blocks of a multiprocessor; and whether probabilities have columns of
    their own, so that warps wait for each other in other ways."""
    return rows / _HALF_ROWS, 1, _has_p_apart(rows, columns, value_head_dim, element_bytes)


def tile_loop(config: KernelConfig) -> Roles:
    """How warps work through KV tiles: the MMA warp issues products, softmax warps compute what they take."""
    from ..build_tools.cycles import SM100, RoleLoop, Roles

    of_scores = _of_scores(config)
    short = {n: (-(-n // 32), _steps(config, n)) for n in _PADDING.short_tiles(config.kv_tile)}
    return Roles(
        SM100,
        softmax=RoleLoop(
            frozenset({"LDTM", "MUFU", "STTM"}),
            rare=_is_rescaling,
            aside=_is_below_split,
            loads=-(-config.kv_columns // 32),
        ),
        issues=RoleLoop(frozenset({"UTCHMMA"})),
        steps=_steps(config),
        scores=of_scores,
        probabilities=tuple(tuple(scores + 1 + part for part in range(len(_parts(config)))) for scores in of_scores),
        streams=len(of_scores) == 2,
        apart=tuple((scores + 3, scores + 4) for scores in of_scores) if _puts_p_apart(config) else (),
        short=short,
    )


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm100"],
    default=True,
    dtypes=("bf16", "fp16", "e4m3"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "descale", "deterministic"),
    limits=Limits(q_rows=256, kv_columns=128, q_box=q_box_of_halves(_HALF_ROWS), tile=_tile),
    padding=_PADDING,
    default_tiles={1: ((256,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))},
    several_heads=True,
    rounds_probabilities=True,
    machine_code=MachineCode(check_machine_code, tile_loop=tile_loop),
    time=replace(
        CUTLASS.time_constants(),
        # FlashAttention-4's published 1605 TFLOP/s on B200 at head dim 128 (Zadouri et al.) are 2,862 cycles per
        # 256x128 scores at 1.85 GHz; of that pipeline a model like ours says 2,480. The rest: power, and what models
        # lack.
        score_cycles=0.0117,
        solo_factor=1.6,  # of constants that are fitted to measured times, without `code`
        tile_cycles=0.0,
        mask_cycles=0.0,
        mask_tile_cycles=0.0,
        q_tile_cycles=500.0,
        dense_rows=0,
        code=FORWARD,
        occupancy=_occupancy,
        products=_product_cycles,
        source=(
            "matrix work, softmax, masks and Q tiles from a model of our machine code, and of how its warps wait for "
            "each other, on a machine that nobody measured here; what FlashAttention-4's published times on B200 take "
            "beyond such a model; loads and fixed costs estimated; no kernel of ours was run"
        ),
    ),
)
