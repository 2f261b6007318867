"""Where kernels come from when the process's table has none that fits: installed packages, then the compile cache.

Order: kernels loaded already; libraries that installed packages announce (entry-point group ``gnaforge.libraries``);
whatever the `Source` finds, which the full gnaforge package sets to its compile cache. Only `Source.make` compiles, and
only `jit` asks for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from .core import load_first, load_library, process_lock

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "gnaforge.libraries"


class Problem(NamedTuple):
    """What a call brings beyond its `Request`: one number per token dimension, then the rest."""

    tokens: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    heads: int
    kv_heads: int
    batch: int


@dataclass(frozen=True)
class Request:
    """What a call needs of a kernel, as far as a kernel's key can tell; ``problem`` and ``key`` say more if known.

    Attributes:
        device: ``cpu`` or ``cuda``; ``device_index`` says which.
        q_tile, kv_tile: the tiles that the call asks for, if it does.
        key: the kernel that the call is pinned to, or empty.
        problem: the call's problem; None while torch traces with sizes that aren't numbers.
    """

    op: str
    rank: int
    dtype: str
    head_dim: int
    value_head_dim: int
    device: str
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None
    device_index: int = 0
    key: str = ""
    problem: Problem | None = None

    def __str__(self) -> str:
        value = f" (value {self.value_head_dim})" if self.value_head_dim != self.head_dim else ""
        return f"rank {self.rank}, {self.dtype}, head_dim {self.head_dim}{value}, on {self.device}"

    def register_call(self) -> str:
        """The call that registers a kernel for it: the same text that the core's errors end with."""
        if self.key:
            return f'gnaforge.register("{self.key}")'
        fields = [f"rank={self.rank}", f"head_dim={self.head_dim}"]
        if self.value_head_dim != self.head_dim:
            fields.append(f"value_head_dim={self.value_head_dim}")
        fields.append(f'dtype="{self.dtype}"')
        if self.device == "cpu":
            fields.append('arch="cpu"')
        p = self.problem
        if p is not None:
            fields += [f"tokens={_extents(p.tokens)}", f"window={_extents(p.window)}"]
            fields += [f"{name}={_extents(v)}" for name in ("stride", "dilation") if max(v := getattr(p, name)) > 1]
            if any(p.causal):
                fields.append(f"causal={_extents(p.causal)}")
            fields.append(f"heads={p.heads}")
            if p.kv_heads != p.heads:
                fields.append(f"kv_heads={p.kv_heads}")
            if p.batch != 1:
                fields.append(f"batch={p.batch}")
        return f"gnaforge.register({', '.join(fields)})"


def _extents(values: Sequence[object]) -> str:
    return str(values[0]) if len(values) == 1 else f"({', '.join(map(str, values))})"


class Made(NamedTuple):
    """What `Source.make` did: the keys that were compiled for it, and how long it took."""

    compiled: list[str]
    seconds: float


class Source(Protocol):
    """A place that holds kernels beyond those of installed packages."""

    def builds(self, request: Request) -> Iterable[Iterable[BinaryIO]]:
        """Of each kernel that may fit its builds, open files of which the first that can be loaded is to be taken."""

    def make(self, request: Request, *, quiet: bool) -> Made:
        """Compiles a kernel for ``request`` and loads it; with ``quiet`` it shows no progress.

        Raises:
            RuntimeError, ValueError: it can't; the text says why and what to do.
        """

    def remedy(self, request: Request) -> str:
        """What the user can do to get a kernel that fits: the last line of the error."""


_source: Source | None = None
_package_remedy: Callable[[Request], str] | None = None
_entry_points_done = False


def set_source(source: Source) -> None:
    """Sets where kernels come from when no installed package has one."""
    global _source
    _source = source


def source() -> Source | None:
    """What `set_source` set."""
    return _source


def set_package_remedy(remedy: Callable[[Request], str]) -> None:
    """Sets what a package of built kernels, which has no `Source`, says of a request that none of them fits."""
    global _package_remedy
    _package_remedy = remedy


def request_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Sequence[int], pinned: str = ""
) -> Request:
    """The request that a forward call with these tensors makes; ``pattern`` is window, stride, dilation, causal."""
    from .ops import DTYPE_NAMES

    rank = len(pattern) // 4
    sizes = (*query.shape[1:-1], key.shape[-2], query.shape[0])
    problem = None
    if all(type(size) is int for size in sizes):  # while torch traces, a size may be a symbol
        window, stride, dilation, causal = (tuple(pattern[i * rank : (i + 1) * rank]) for i in range(4))
        problem = Problem(sizes[:rank], window, stride, dilation, tuple(map(bool, causal)), *sizes[rank:])
    return Request(
        "gna_forward",
        rank,
        DTYPE_NAMES.get(query.dtype, str(query.dtype)),
        int(query.shape[-1]),
        int(value.shape[-1]),
        query.device.type,
        device_index=query.device.index or 0,
        key=pinned,
        problem=problem,
    )


def load_entry_points() -> int:
    """Loads the libraries of installed packages, once per process; a broken one is a warning. Returns new kernels."""
    global _entry_points_done
    with process_lock():  # one for all copies: each would hold its own and wait for the other's when a fork does
        if _entry_points_done:
            return 0
        _entry_points_done = True
        added = 0
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                for path in entry.load()():
                    added += load_library(path)
            except Exception as error:  # somebody else's package must not stop this one
                warnings.warn(f"gnaforge: can't load the kernels of {entry.value}: {error}", stacklevel=2)
        return added


def load_matching(request: Request) -> int:
    """Loads what installed packages and the source have for ``request``. Returns new kernels.

    Looks anew each time: a kernel that was missing may have been built since, by another process.
    """
    added = load_entry_points()
    for builds in _source.builds(request) if _source else ():
        added += load_first(builds) or 0
    return added


def remedy(request: Request) -> str:
    """How to get a kernel for ``request``."""
    if _source is None and _package_remedy is not None:
        return _package_remedy(request)
    if _source is None:
        return "this package holds only the kernels above; build another with gnaforge"
    return _source.remedy(request)
