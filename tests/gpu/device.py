"""The functions of device.cu, for Python without torch."""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any, NamedTuple


class DeviceError(Exception):
    """A CUDA call failed; this process can't use the GPU any more."""


class _Facts(c.Structure):
    _fields_ = (
        ("name", c.c_char * 256),
        *((name, c.c_int) for name in ("major", "minor", "processors", "driver", "runtime")),
        *((name, c.c_uint64) for name in ("memory", "l2_bytes")),
    )


class _Elapsed(c.Structure):
    _fields_ = (*((name, c.c_double) for name in ("seconds", "cycles", "nanoseconds")), ("processors", c.c_int))


class Query(c.Structure):
    """One query of a call whose tensors `Device.fill` filled; see device.cu."""

    _fields_ = (
        *((name, c.c_int) for name in ("rank", "dtype")),
        *((name, c.c_int64 * 3) for name in ("tokens", "begin", "end", "step")),
        *((name, c.c_int64) for name in ("batch", "token", "head", "heads", "kv_heads", "head_dim", "value_head_dim")),
        ("scale", c.c_double),
        ("seeds", c.c_uint64 * 3),
    )


class Elapsed(NamedTuple):
    """The time between two marks: seconds by events; cycles of a processor and nanoseconds by their own counters,
    medians over processors, 0 where nothing counts them."""

    seconds: float
    cycles: float
    nanoseconds: float


class Exact(NamedTuple):
    """Attention of a query in float64: output and the same with |V|, by channel; log-sum-exp."""

    out: list[float]
    magnitude: list[float]
    lse: float


class Device:
    """The first GPU, or what stands in for it where the library is linked to the emulator.

    Attributes:
        facts: name, compute capability, processors, versions, sizes.

    Raises:
        OSError: there is no such library.
        DeviceError: there is no GPU that CUDA can use; says why.
    """

    def __init__(self, library: Path) -> None:
        self._library = c.CDLL(str(library.resolve()))
        found = _Facts()
        self._call("open", c.byref(found))
        versions = {name: getattr(found, name) for name in ("driver", "runtime")}
        self.facts: dict[str, Any] = {
            "gpu": found.name.decode(errors="replace"),
            "compute_capability": f"{found.major}.{found.minor}",
            "processors": found.processors,
            "memory_bytes": found.memory,
            "l2_bytes": found.l2_bytes,
            **{name: f"{of // 1000}.{of % 1000 // 10}" for name, of in versions.items()},
        }

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, f"device_{name}")
        function.restype = c.c_char_p
        if error := function(*arguments):
            raise DeviceError(f"{name}: {error.decode(errors='replace')}")

    def allocate(self, size: int) -> int:
        """An address of ``size`` bytes.

        Raises:
            MemoryError: there are not as many.
        """
        memory = c.c_void_p()
        self._call("allocate", c.byref(memory), c.c_uint64(size))
        if not memory.value:
            raise MemoryError(f"the GPU has no {size:,} bytes left")
        return memory.value

    def release(self, address: int) -> None:
        """Gives memory back."""
        self._call("release", c.c_void_p(address))

    def set(self, address: int, byte: int, size: int) -> None:
        """Sets bytes."""
        self._call("set", c.c_void_p(address), byte, c.c_uint64(size))

    def fill(self, address: int, count: int, dtype: int, seed: int) -> None:
        """Nearly normal values, which ``seed`` decides; ``dtype`` is its code in abi.h."""
        self._call("fill", c.c_void_p(address), c.c_uint64(count), dtype, c.c_uint64(seed))

    def read(self, address: int, size: int) -> bytes:
        """Bytes of device memory."""
        buffer = c.create_string_buffer(size)
        self._call("read", buffer, c.c_void_p(address), c.c_uint64(size))
        return buffer.raw

    def wait(self) -> None:
        """For all work.

        Raises:
            DeviceError: some of it failed.
        """
        self._call("wait")

    def mark(self, which: int) -> None:
        """Begins what is measured (0), or ends it (1), on the default stream."""
        self._call("mark", which)

    def elapsed(self) -> Elapsed:
        """Between the marks; waits for the second."""
        found = _Elapsed()
        self._call("elapsed", c.byref(found))
        return Elapsed(found.seconds, found.cycles, found.nanoseconds)

    def exact(self, query: Query) -> Exact:
        """Computed on the host, from the values that `fill` makes."""
        row = c.c_double * query.value_head_dim
        out, magnitude, lse = row(), row(), c.c_double()
        self._call("exact", c.byref(query), out, magnitude, c.byref(lse))
        return Exact(list(out), list(magnitude), lse.value)
