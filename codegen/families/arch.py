"""The arch table: one line per architecture, with the limits that its kernel family sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

from ..errors import InputError
from ..runtime.config import ANY_HEAD_DIM, OPS, KernelConfig

QBoxLimit = Callable[[tuple[int, ...]], "str | None"]
"""Why a Q tile of these extents does not fit; None if it does."""

TileLimit = Callable[[int, int, int, int], "str | None"]
"""Why a tile of (query rows, key columns) does not fit with (head dim, value head dim); None if it does."""


_SHARED_MEMORY = 227 * 1024  # of one thread block on sm90 (CUDA C Programming Guide, technical specifications)


def _any_q_box(box: tuple[int, ...]) -> None:
    return None


def _any_tile(rows: int, columns: int, head_dim: int, value_head_dim: int) -> None:
    return None


def _channels(head_dim: int) -> int:
    """Channels that a row takes in shared memory: whole 128-byte swizzle atoms of 16-bit elements."""
    return -(-head_dim // 64) * 64


def _sm90_tile(rows: int, columns: int, head_dim: int, value_head_dim: int) -> str | None:
    q, v = _channels(head_dim), _channels(value_head_dim)
    # O takes the place of Q; two stages of K and V, the least that hides their loads; barriers.
    memory = 2 * (rows * max(q, v) + 2 * columns * (q + v)) + 1024
    if memory > _SHARED_MEMORY:
        return f"needs {memory:,} bytes of shared memory, of which there are {_SHARED_MEMORY:,}"
    # Of a row: scores of the next tile (fp32), probabilities of this one (16 bit), output (fp32), over half a quad of
    # threads. The limits are what compiles without a spill at rank 3, which needs most besides, with nvcc 13.0: at head
    # dim 128, 128x176 does and 128x192 doesn't always; at 64, 128x224 and 192x128; at 256, 128x64, whose producer needs
    # more.
    registers = columns // 2 + columns // 4 + value_head_dim // 2
    limit = 128 if rows > 128 else 180 if q + v > 256 else 200
    if registers > limit:
        return f"needs {registers} accumulator registers a thread, of which there are {limit}"
    return None


def _sm100_q_box(box: tuple[int, ...]) -> str | None:
    # The kernel computes two halves of 128 rows, each a box of its own, cut across one axis; odd ones are rounded up.
    half = min(prod(box) // extent * -(-extent // 2) for extent in box)
    return None if half <= 128 else f"can't be cut into two boxes of at most 128 tokens: the best has {half}"


@dataclass(frozen=True)
class Arch:
    """An architecture: where its template is, what compiles it, and which configs its kernels can have.

    ``max_q_rows`` and ``max_kv_columns`` bound the products of the tile extents; ``kv_multiple`` is what the KV
    product must be divisible by (the MMA's N granularity); ``row_multiple`` is what query rows are padded to (its M, or
    the lanes of vectors); ``tile_limit`` knows registers and memory, ``q_box_limit`` which boxes can be. ``kv_padding``
    is what KV columns are padded to; a tile with padding is masked whatever it holds. ``clips_tiles`` says that keys of
    a KV tile beyond those that the Q tile sees cost nothing; ``fit_multiple`` is what fitted KV products are a multiple
    of. ``variants`` names the kernel families, default first; ``target`` is what nvcc compiles for, ``nvcc`` the first
    release that can, ``cutlass`` whether with CUTLASS; ``capabilities`` are the CUDA compute capabilities that its
    kernels run on; ``emulated_device`` is the emulator's GPU for them, ``relaxed_tensor_waits`` names the variants that
    need that option of the emulator; ``job_memory_gb`` is what one compilation may take; ``default_tiles`` are the
    query and key boxes, by rank, to take where nothing is known of the shapes.
    """

    name: str
    template: str
    compiler: str
    device: str
    dtypes: tuple[str, ...]
    max_q_rows: int
    max_kv_columns: int
    kv_multiple: int
    row_multiple: int
    tile_limit: TileLimit = _any_tile
    q_box_limit: QBoxLimit = _any_q_box
    kv_padding: int = 1
    clips_tiles: bool = False
    fit_multiple: int = 16
    variants: tuple[str, ...] = ("",)
    target: str = ""
    nvcc: tuple[int, int] = (0, 0)
    cutlass: bool = False
    capabilities: tuple[tuple[int, int], ...] = ()
    emulated_device: str = ""
    relaxed_tensor_waits: tuple[str, ...] = ()
    head_dim_at_run_time: bool = False
    ops: tuple[str, ...] = ("gna_forward",)
    job_memory_gb: float = 4.0
    default_tiles: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    head_dim_multiple: int = 8
    max_head_dim: int = 256

    def problems(self, config: KernelConfig) -> list[tuple[str, str]]:
        """Why ``config`` can't be a kernel of this arch, as (field, reason) pairs; empty if it can."""
        found: list[tuple[str, str]] = []
        if config.op not in self.ops:
            found.append(("op", f"{config.op} is not available on {self.name}; available: {', '.join(self.ops)}"))
        if config.dtype not in self.dtypes:
            found.append(("dtype", f"{self.name} has no {config.dtype} kernels; it has {', '.join(self.dtypes)}"))
        if config.variant not in self.variants:
            names = ", ".join(repr(v) for v in self.variants)
            found.append(("variant", f"{config.variant!r} is not a variant of {self.name}; it has {names}"))
        for name in ("head_dim", "value_head_dim"):
            dim = getattr(config, name)
            if dim == ANY_HEAD_DIM:
                if name == "head_dim" and not self.head_dim_at_run_time:
                    found.append((name, f"{self.name} kernels are built for one head dim; give a number"))
            elif dim % self.head_dim_multiple:
                found.append((name, f"{dim} must be a multiple of {self.head_dim_multiple}"))
            elif dim > self.max_head_dim:
                found.append((name, f"{dim} is too large; {self.name} takes at most {self.max_head_dim}"))
        if config.q_rows > self.max_q_rows:
            found.append(("q_tile", f"holds {config.q_rows} query tokens; {self.name} takes at most {self.max_q_rows}"))
        elif reason := self.q_box_limit(config.q_tile):
            found.append(("q_tile", reason))
        if config.kv_columns > self.max_kv_columns:
            found.append(
                ("kv_tile", f"holds {config.kv_columns} key tokens; {self.name} takes at most {self.max_kv_columns}")
            )
        if config.kv_columns % self.kv_multiple:
            found.append(
                ("kv_tile", f"holds {config.kv_columns} key tokens; {self.name} needs a multiple of {self.kv_multiple}")
            )
        if not found and config.head_dim != ANY_HEAD_DIM and (reason := self._limit(config, config.kv_columns)):
            found.append(("kv_tile", f"beside {config.q_rows} query tokens {reason}"))
        return found

    def built(self, config: KernelConfig) -> KernelConfig:
        """The kernel that serves ``config``: one for all head dims where the arch takes them at run time."""
        return replace(config, head_dim=ANY_HEAD_DIM, value_head_dim=0) if self.head_dim_at_run_time else config

    def most_kv_columns(self, config: KernelConfig) -> int:
        """The most key tokens that fit beside the Q tile of ``config``; 0 if none do."""
        columns = range(self.max_kv_columns, 0, -self.kv_multiple)
        return next((n for n in columns if self._limit(config, n) is None), 0)

    def default_boxes(
        self, rank: int, head_dim: int = ANY_HEAD_DIM, value_head_dim: int = ANY_HEAD_DIM
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The query and key boxes to take where nothing is known of the shapes: ``default_tiles``, the key box halved
        along its longest sides until it fits the head dims."""
        q_tile, kv_tile = self.default_tiles[rank]
        rows = self.padded_rows(prod(q_tile))
        while prod(kv_tile) > self.kv_multiple and self.tile_limit(
            rows, prod(kv_tile), head_dim, value_head_dim or head_dim
        ):
            longest = kv_tile.index(max(kv_tile))
            kv_tile = (*kv_tile[:longest], kv_tile[longest] // 2, *kv_tile[longest + 1 :])
        return q_tile, kv_tile

    def padded_rows(self, tokens: int) -> int:
        """The rows that a Q tile of so many tokens is computed as."""
        return -(-tokens // self.row_multiple) * self.row_multiple

    def padded_columns(self, tokens: int) -> int:
        """The columns that a KV tile of so many tokens is computed as."""
        multiple = max(self.kv_multiple, self.kv_padding)
        return -(-tokens // multiple) * multiple

    def _limit(self, config: KernelConfig, columns: int) -> str | None:
        value_head_dim = config.value_head_dim or config.head_dim
        return self.tile_limit(self.padded_rows(config.q_rows), columns, config.head_dim, value_head_dim)


_CPU_TILES = {1: ((64,), (64,)), 2: ((8, 8), (8, 8)), 3: ((4, 4, 4), (4, 8, 8))}
_SM90_TILES = {1: ((128,), (128,)), 2: ((8, 16), (8, 16)), 3: ((2, 8, 8), (2, 8, 8))}
_SM100_TILES = {1: ((256,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))}

ARCHES: Mapping[str, Arch] = MappingProxyType(
    {
        arch.name: arch
        for arch in (
            Arch("cpu", "cpu/kernel.cpp.j2", "c++", "cpu", ("fp32", "bf16", "fp16"), 256, 512, 1, 32,
                 clips_tiles=True, head_dim_at_run_time=True, job_memory_gb=1.0, default_tiles=_CPU_TILES),
            Arch("sm90", "sm90/kernel.cu.j2", "nvcc", "cuda", ("bf16", "fp16"), 192, 256, 16, 64,
                 _sm90_tile, target="90a", nvcc=(12, 0), capabilities=((9, 0),), emulated_device="h100",
                 default_tiles=_SM90_TILES),
            Arch("sm100", "sm100/kernel.cu.j2", "nvcc", "cuda", ("bf16", "fp16"), 256, 128, 16, 256,
                 q_box_limit=_sm100_q_box, kv_padding=128, target="100f", nvcc=(12, 9), cutlass=True,
                 capabilities=((10, 0), (10, 3)), variants=("cutlass",), emulated_device="b200",
                 relaxed_tensor_waits=("cutlass",), default_tiles=_SM100_TILES, max_head_dim=128),
        )
    }
)  # fmt: skip


def checked(config: KernelConfig | str) -> KernelConfig:
    """``config``, or the config of that key, if there can be such a kernel.

    Raises:
        InputError: it is no key, or its arch doesn't have such kernels; a line for each reason.
    """
    try:
        config = KernelConfig.parse(config) if isinstance(config, str) else config
    except ValueError as error:
        raise InputError(str(error)) from error
    if config.arch not in ARCHES:
        raise InputError(f"{config}: unknown arch {config.arch!r}; known: {', '.join(ARCHES)}")
    if problems := ARCHES[config.arch].problems(config):
        raise InputError("\n".join(f"{config}: {name}: {reason}" for name, reason in problems))
    return config


def is_key(text: str) -> bool:
    """Whether ``text`` is meant as a kernel's key, in place of a spec's name."""
    return text.startswith(tuple(op + "-" for op in OPS))
