"""The kernels that are loaded in this process, as the core's table has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import core, lookup
from .config import KernelConfig
from .request import Request, refusal


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel of the process's table.

    Attributes:
        config: its identity.
        origin: path of the library that brought it.
        device: ``cpu`` or ``cuda``: where its tensors must be.
        threads: threads per CTA; 0 on cpu.
        shared_memory: bytes per CTA; 0 on cpu.
        emulated: a GPU kernel that runs on the emulator and takes CPU tensors.
        features: what it has beyond plain GNA, of `problem.FEATURES`.
    """

    config: KernelConfig
    origin: str
    device: str
    threads: int
    shared_memory: int
    emulated: bool
    features: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The config's key."""
        return self.config.key

    def refusal(self, request: Request) -> str:
        """Why it can't serve a request, as far as is known without asking it; empty if it may."""
        return refusal(self.config, self.device, request, emulated=self.emulated, features=self.features)


_generation = -1
_rows: dict[KernelConfig, LoadedKernel] = {}


def loaded_kernels() -> Mapping[KernelConfig, LoadedKernel]:
    """The kernels of this process, by config, those of installed packages among them. The same mapping until another
    kernel is loaded."""
    global _generation, _rows
    lookup.load_entry_points()
    generation = core.generation()
    if generation != _generation:
        known = {kernel.key: kernel for kernel in _rows.values()}  # kernels stay; parsing takes long
        rows = [known.get(row["key"]) or _loaded_kernel(**row) for row in core.table()]
        _rows, _generation = {kernel.config: kernel for kernel in rows}, generation
    return _rows


def serves(request: Request) -> bool:
    """Whether a kernel is loaded that may compute what a request asks for, as far as is known without asking it."""
    return any(not kernel.refusal(request) for kernel in loaded_kernels().values())


def _loaded_kernel(key: str, **facts: Any) -> LoadedKernel:
    return LoadedKernel(KernelConfig.parse(key), **facts)
