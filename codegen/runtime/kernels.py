"""The kernels of this process, as a read-only mapping from config to kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import core, lookup
from .config import ANY_HEAD_DIM, KernelConfig


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. Calling it is `neighborhood_attention` with this kernel pinned.

    Attributes:
        config: its identity.
        origin: path of the library that brought it.
        device: ``cpu`` or ``cuda``: where its tensors must be.
        threads: threads per CTA; 0 on cpu.
        shared_memory: bytes per CTA; 0 on cpu.
        emulated: a GPU kernel that runs on the emulator and takes CPU tensors.
    """

    config: KernelConfig
    origin: str
    device: str
    threads: int
    shared_memory: int
    emulated: bool

    @property
    def key(self) -> str:
        """The config's key."""
        return self.config.key

    def may_serve(self, request: lookup.Request) -> bool:
        """Whether it may compute what a request asks for, but for its tiles, as far as its key tells."""
        config = self.config
        dims = ((ANY_HEAD_DIM, ANY_HEAD_DIM), (request.head_dim, request.value_head_dim))
        return (
            self.device == request.device
            and not self.emulated
            and (config.op, config.rank, config.dtype) == (request.op, request.rank, request.dtype)
            and (config.head_dim, config.value_head_dim or config.head_dim) in dims
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments as `neighborhood_attention`, with this kernel pinned."""
        from .ops import neighborhood_attention

        return neighborhood_attention(*args, **kwargs, kernel=self.config)


def _kernel(key: str, **facts: Any) -> Kernel:
    return Kernel(KernelConfig.parse(key), **facts)


class Registry(Mapping[KernelConfig, Kernel]):
    """Read-only view of the process's kernel table. Keys are configs; a key's text works too."""

    def __init__(self) -> None:
        self._generation = -1
        self._kernels: dict[KernelConfig, Kernel] = {}

    def _current(self) -> dict[KernelConfig, Kernel]:
        lookup.load_entry_points()
        generation = core.generation()
        if generation != self._generation:
            known = {kernel.key: kernel for kernel in self._kernels.values()}  # kernels stay; parsing takes long
            kernels = [known.get(row["key"]) or _kernel(**row) for row in core.table()]
            self._kernels, self._generation = {kernel.config: kernel for kernel in kernels}, generation
        return self._kernels

    def __getitem__(self, config: KernelConfig | str) -> Kernel:
        return self._current()[KernelConfig.parse(config) if isinstance(config, str) else config]

    def __iter__(self) -> Iterator[KernelConfig]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def serves(self, request: lookup.Request) -> bool:
        """Whether a kernel is loaded that may compute what a request asks for, as far as its key tells."""
        if request.key:
            return KernelConfig.parse(request.key) in self
        return any(kernel.may_serve(request) for kernel in self.values())

    def __repr__(self) -> str:
        return f"<gnaforge registry: {len(self)} kernels>"


registry = Registry()


def kernels() -> list[Kernel]:
    """The kernels of this process, sorted by config. A kernel in the cache joins when a call first needs it."""
    return [registry[config] for config in sorted(registry)]
