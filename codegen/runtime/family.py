"""Facts of kernel families that running kernels takes; built wheels carry this module, and the facts as metadata.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

from .config import KernelConfig
from .dtypes import DTYPES

if TYPE_CHECKING:
    from .request import Request


@dataclass(frozen=True)
class Padding:
    """The size that a tile is computed as.

    Attributes:
        rows: tokens of the tile that a kernel holds, a Q tile or for gradients of K and V a KV tile, are padded to a
            multiple of this: the M of the matrix product, or the lanes of vectors.
        columns: those of the tiles that pass by, likewise. Such a tile with padding is masked whatever it holds.
        clips: whether tokens of a tile that passes by cost nothing if no token of the other one has to do with them.
        short: numbers of columns, in order, that kernels compute of a last KV tile along the first axis in place of
            all, where nobody sees the others.
    """

    rows: int
    columns: int = 1
    clips: bool = False
    short: tuple[int, ...] = ()

    def padded_rows(self, tokens: int) -> int:
        """The rows that a tile of so many tokens is computed as, which the kernel holds."""
        return -(-tokens // self.rows) * self.rows

    def padded_columns(self, tokens: int) -> int:
        """The columns that a tile of so many tokens is computed as, which passes by."""
        return -(-tokens // self.columns) * self.columns

    def short_tiles(self, kv_box: Sequence[int]) -> tuple[int, ...]:
        """Those of ``short`` for which kernels with such KV tiles have code: with which rows of the box along its first
        axis begin."""
        columns = prod(kv_box)
        row = columns // kv_box[0]
        least = {next((n for n in self.short if n >= rows * row), columns) for rows in range(1, kv_box[0])}
        return tuple(n for n in self.short if n in least and n < columns)


@dataclass(frozen=True)
class FamilyFacts:
    """Facts of a family that running its kernels takes.

    Attributes:
        name: of the family.
        device: ``cpu`` or ``cuda``.
        nvcc_target: what its machine code is for, as in ``sm_90a``; empty for a CPU.
        capabilities: the CUDA compute capabilities that it runs on.
        padding: what its tiles are computed as.
        features: the optional features that it has: GNAFORGE_FEATURE_* of abi.h, in lower case.
        dtypes: element types of the inputs.
        head_dim_multiple: of which its head dims are multiples, those of values too.
        most_head_dim: the largest of them.
    """

    name: str
    device: str
    nvcc_target: str
    capabilities: tuple[tuple[int, int], ...]
    padding: Padding
    features: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    head_dim_multiple: int = 8
    most_head_dim: int = 256

    def channel_multiple(self, dtype: str) -> int:
        """Head dims of inputs of this type are multiples of this: of 16 bytes too, which copies to GPUs' shared memory
        ask of a head's place."""
        return max(self.head_dim_multiple, 16 // DTYPES[dtype].bytes)

    def why_never(self, request: Request) -> str:
        """Why no kernel of the family can serve a request, whatever its tiles, and what to do; empty if one may."""
        kernels = f"{self.name.partition('_')[0]} kernels"
        if request.dtype not in self.dtypes:
            return f"dtype: {kernels} take {', '.join(self.dtypes)}, not {request.dtype}; convert the tensors"
        multiple = self.channel_multiple(request.dtype)
        takes = f"{kernels} take multiples of {multiple} up to {self.most_head_dim}"
        advice = []
        for name, dim, way in (
            ("head_dim", request.head_dim, "query and key with zeros to {} channels, with scale={} ** -0.5"),
            ("value_head_dim", request.value_head_dim, "value to {} channels, of which the output's first {} count"),
        ):
            padded = -(-dim // multiple) * multiple
            if padded > self.most_head_dim:
                return f"{name}: {dim} is too large; {takes}"
            if padded != dim:
                advice.append((f"{name}: {dim} is no such number", way.format(padded, dim)))
        return f"{advice[0][0]}: {takes}; pad {', and '.join(way for _, way in advice)}" if advice else ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a wheel's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FamilyFacts:
        """What `as_json` was made of, also after a way through JSON."""
        return cls(
            values["name"],
            values["device"],
            values["nvcc_target"],
            tuple((major, minor) for major, minor in values["capabilities"]),
            Padding(**{**values["padding"], "short": tuple(values["padding"]["short"])}),
            tuple(values["features"]),
            tuple(values["dtypes"]),
            values["head_dim_multiple"],
            values["most_head_dim"],
        )


Provider = Callable[[KernelConfig], "FamilyFacts | None"]
_provider: Provider | None = None


def set_provider(provider: Provider | None) -> None:
    """Sets where facts come from: the families of the full package, or the metadata of a wheel. None for a kernel that
    neither knows."""
    global _provider
    _provider = provider


def find_facts(config: KernelConfig) -> FamilyFacts | None:
    """The facts of a kernel's family; None where this package doesn't know it, as of a kernel of another wheel."""
    if _provider is None:
        # The package around this runtime has a module `api`, whose `connect` sets the provider.
        import_module(f"{__package__.rpartition('.')[0]}.api").connect()
    assert _provider is not None
    return _provider(config)


def facts_of(config: KernelConfig) -> FamilyFacts:
    """The facts of a kernel's family.

    Raises:
        LookupError: this package doesn't know the family; names the kernel.
    """
    facts = find_facts(config)
    if facts is None:
        raise LookupError(f"{config}: this package doesn't know the kernel's family")
    return facts
