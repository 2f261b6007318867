"""The kernels of this process, as a read-only mapping from config to kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .config import KernelConfig
from .ops import neighborhood_attention
from .table import LoadedKernel, loaded_kernels


class Kernel(LoadedKernel):
    """A loaded kernel. Calling it is `neighborhood_attention` with this kernel pinned. Fields: see `LoadedKernel`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments as `neighborhood_attention`, with this kernel pinned."""
        return neighborhood_attention(*args, **kwargs, kernel=self.config)


class Registry(Mapping[KernelConfig, Kernel]):
    """Read-only view of the process's kernel table. Keys are configs; a key's text works too."""

    def __init__(self) -> None:
        self._rows: Mapping[KernelConfig, LoadedKernel] = {}
        self._kernels: dict[KernelConfig, Kernel] = {}

    def _current(self) -> dict[KernelConfig, Kernel]:
        rows = loaded_kernels()
        if rows is not self._rows:
            self._kernels = {config: self._kernels.get(config) or Kernel(**vars(row)) for config, row in rows.items()}
            self._rows = rows
        return self._kernels

    def __getitem__(self, config: KernelConfig | str) -> Kernel:
        return self._current()[KernelConfig.parse(config) if isinstance(config, str) else config]

    def __iter__(self) -> Iterator[KernelConfig]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def __repr__(self) -> str:
        return f"<gnaforge registry: {len(self)} kernels>"


registry = Registry()


def kernels() -> list[Kernel]:
    """The kernels of this process, sorted by config. A kernel in the cache joins when a call first needs it."""
    return [registry[config] for config in sorted(registry)]
