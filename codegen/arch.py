"""The arch table: one line per architecture, with the limits that its kernel family sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .runtime.config import ANY_HEAD_DIM, KernelConfig


@dataclass(frozen=True)
class Arch:
    """An architecture: where its template is, what compiles it, and which configs its kernels can have.

    ``max_q_rows`` and ``max_kv_columns`` bound the products of the tile extents; ``kv_multiple`` is what the KV
    product must be divisible by (the MMA's N granularity). ``variants`` names the kernel families, default first;
    ``job_memory_gb`` is what one compilation may take; ``default_tiles`` are the query and key boxes, by rank, to take
    where nothing is known of the shapes.
    """

    name: str
    template: str
    compiler: str
    device: str
    dtypes: tuple[str, ...]
    max_q_rows: int
    max_kv_columns: int
    kv_multiple: int
    variants: tuple[str, ...] = ("",)
    head_dim_at_run_time: bool = False
    available: bool = True
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
            elif dim % self.head_dim_multiple or dim > self.max_head_dim:
                found.append(
                    (name, f"{dim} must be a multiple of {self.head_dim_multiple}, at most {self.max_head_dim}")
                )
        if config.q_rows > self.max_q_rows:
            found.append(("q_tile", f"holds {config.q_rows} query tokens; {self.name} takes at most {self.max_q_rows}"))
        if config.kv_columns > self.max_kv_columns:
            found.append(
                ("kv_tile", f"holds {config.kv_columns} key tokens; {self.name} takes at most {self.max_kv_columns}")
            )
        if config.kv_columns % self.kv_multiple:
            found.append(
                ("kv_tile", f"holds {config.kv_columns} key tokens; {self.name} needs a multiple of {self.kv_multiple}")
            )
        return found


_CPU_TILES = {1: ((64,), (64,)), 2: ((8, 8), (8, 8)), 3: ((4, 4, 4), (4, 8, 8))}

ARCHES: Mapping[str, Arch] = MappingProxyType(
    {
        arch.name: arch
        for arch in (
            Arch("cpu", "cpu/kernel.cpp.j2", "c++", "cpu", ("fp32", "bf16", "fp16"), 256, 512, 1,
                 head_dim_at_run_time=True, job_memory_gb=1.0, default_tiles=_CPU_TILES),
            Arch("sm90", "sm90/kernel.cu.j2", "nvcc", "cuda", ("bf16", "fp16"), 192, 256, 16, available=False),
            Arch("sm100", "sm100/kernel.cu.j2", "nvcc", "cuda", ("bf16", "fp16"), 256, 256, 16, available=False,
                 variants=("", "cutlass", "lean")),
        )
    }
)  # fmt: skip
