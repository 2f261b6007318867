"""PTX modules, and launches of their kernels on NumPy arrays."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GnaforgeError
from .library import Counted, LaunchOptions, engine

TIMINGS = ("eager", "lazy", "random")
ORDERS = ("round-robin", "depth-first", "random")
# CUtensorMapDataType
DATA_TYPES = {
    "u8": 0,
    "u16": 1,
    "u32": 2,
    "s32": 3,
    "u64": 4,
    "s64": 5,
    "f16": 6,
    "f32": 7,
    "f64": 8,
    "bf16": 9,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_WIDE_ATOMS = {(128, 32): 4}

Array = np.ndarray[Any, np.dtype[Any]]


class EmulationError(GnaforgeError):
    """A kernel broke a rule of PTX, hung, or uses what the emulator lacks. The message says where and why."""


@dataclass(frozen=True)
class Options:
    """The schedule of a kernel. Every choice is one that PTX allows hardware to make.

    Attributes:
        timing: when asynchronous work completes: ``eager`` (when issued), ``lazy`` (when nothing else can run, or when
            somebody waits) or ``random``.
        order: which warp runs: ``round-robin``, ``depth-first`` (one until it blocks) or ``random``.
        seed: of everything random. The same seed gives the same run, on one host thread.
        host_threads: CTAs that run at once.
        patience: instructions of a CTA without any visible progress before it counts as hung.
        relaxed_tensor_waits: lets tcgen05.ld and tcgen05.st be complete at once, without the tcgen05.wait that PTX
            demands. ptxas and the hardware's scoreboards make that work, and CUTLASS's example 77 relies on it.
        relaxed_tensor_fences: lets accesses to tensor memory by different threads be ordered without tcgen05.fence.
            CUTLASS has none in its headers.
        relaxed_warpgroups: lets a wgmma read from shared memory what the other warps of its warpgroup wrote before they
            issued it. PTX has no barrier there; the backward kernel of CUTLASS's example 88 relies on it.
        relaxed_tensor_frees: lets tcgen05.dealloc come before the last use of the columns, as in the backward kernel of
            CUTLASS's example 77: nothing there waits for the last dQ.
        trace: an error's message ends with the last instructions and synchronisation of each warp. Slow.
        early: the launch may begin before the one before it has ended, as with
            cudaLaunchAttributeProgrammaticStreamSerialization: touching device memory before griddepcontrol.wait is
            an error. The stand-in sets it for launches that have the attribute.
        checks: False leaves out the search for races in shared and global memory and for reads of uninitialised shared
            memory: to see what it costs.
    """

    timing: str = "eager"
    order: str = "round-robin"
    seed: int = 0
    host_threads: int = 1
    patience: int = 20_000_000
    relaxed_tensor_waits: bool = False
    relaxed_tensor_fences: bool = False
    relaxed_warpgroups: bool = False
    relaxed_tensor_frees: bool = False
    trace: bool = False
    early: bool = False
    checks: bool = True

    def __post_init__(self) -> None:
        for value, known in ((self.timing, TIMINGS), (self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Counters:
    """Counts of a launch.

    Attributes:
        instructions: warp instructions executed.
        opcodes: the same by opcode.
        lines: the same by line of the PTX.
        waits: by line, how often an mbarrier wait found its phase open.
        async_load_bytes: bytes that bulk and asynchronous copies brought to shared memory.
        async_store_bytes: bytes that bulk copies took from it.
        load_bytes: bytes of ordinary loads, all threads.
        store_bytes: bytes of ordinary stores, all threads.
        interior_tiles, shell_tiles: KV tiles that the kernel marked (``pmevent 1`` begins a tile, 2 says that it needs
            a mask, 3 ends it), as the first warp that marks any goes through them; 0 without markers.
        interior_instructions, shell_instructions: warp instructions between the markers, all warps.
        mma_operations: multiplications and additions of matrix instructions.
    """

    instructions: int
    opcodes: Mapping[str, int]
    lines: Mapping[int, int]
    waits: Mapping[int, int]
    async_load_bytes: int
    async_store_bytes: int
    load_bytes: int
    store_bytes: int
    interior_tiles: int = 0
    shell_tiles: int = 0
    interior_instructions: int = 0
    shell_instructions: int = 0
    mma_operations: int = 0

    def of(self, prefix: str) -> int:
        """Warp instructions whose opcode starts with ``prefix``."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefix))


class TensorMap:
    """A tensor map, as cuTensorMapEncodeTiled makes it; can be passed as a kernel argument.

    Args:
        array: what it describes. Innermost dimension first in ``dims``, so ``dims`` is the array's shape reversed.
        box: elements per dimension of one copy, innermost first.
        data_type: one of ``DATA_TYPES``; None takes it from the array's dtype.
        dims, strides: innermost first; strides in bytes, without the innermost. None takes them from the array.
        swizzle: 0, 32, 64 or 128 bytes.
        swizzle_atom: 16 bytes, or 32 with a swizzle of 128.
        element_strides: per dimension.
        fill_nan: elements out of bounds read as NaN instead of zero.

    Raises:
        EmulationError: a rule of the driver is broken; says which.
    """

    def __init__(
        self,
        array: Array,
        box: Sequence[int],
        *,
        data_type: str | None = None,
        dims: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        swizzle: int = 0,
        swizzle_atom: int = 16,
        element_strides: Sequence[int] | None = None,
        fill_nan: bool = False,
    ) -> None:
        self.array = array
        dims = list(dims if dims is not None else array.shape[::-1])
        strides = list(strides if strides is not None else array.strides[-2::-1])
        rank = len(dims)
        named = data_type or f"{'s' if array.dtype.kind == 'i' else array.dtype.kind}{8 * array.dtype.itemsize}"
        if named not in DATA_TYPES:
            raise ValueError(f"{named!r} is not one of {', '.join(DATA_TYPES)}")
        self._storage = np.zeros(128 + 64, np.uint8)
        start = -self._storage.ctypes.data % 64
        self.bytes = self._storage[start : start + 128]

        def words(kind: Any, values: Sequence[int], count: int) -> Any:
            return (kind * max(count, 1))(*(int(value) for value in values))

        failed = engine().gnaforge_emulator_tensor_map(
            self.bytes.ctypes.data,
            DATA_TYPES[named],
            rank,
            array.ctypes.data,
            words(ctypes.c_uint64, dims, rank),
            words(ctypes.c_uint64, strides, rank - 1),
            words(ctypes.c_uint32, box, rank),
            words(ctypes.c_uint32, element_strides or [1] * rank, rank),
            0,
            SWIZZLES[swizzle] if swizzle_atom == 16 else _WIDE_ATOMS[swizzle, swizzle_atom],
            0,
            int(fill_nan),
        )
        if failed:
            raise EmulationError(_last_error())


def _byte_bounds(array: Array) -> tuple[int, int]:
    """Lowest and highest address of an array's elements, also of a strided one."""
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    low = array.ctypes.data + sum(min(step, 0) for step in reach)
    return low, array.ctypes.data + sum(max(step, 0) for step in reach) + array.itemsize


def _last_error() -> str:
    return str(engine().gnaforge_emulator_error().decode(errors="replace"))


def load(source: str | Path) -> Module:
    """Reads a module: PTX text, or the path of a file that holds it.

    Raises:
        EmulationError: it can't be parsed, or uses an instruction that is not emulated; names the line.
    """
    if isinstance(source, Path):
        return Module(source.read_text(), source.name)
    return Module(source, "ptx")


class Module:
    """A PTX module, ready to run."""

    def __init__(self, text: str, name: str) -> None:
        self._handle = engine().gnaforge_emulator_module(text.encode(), name.encode())
        if not self._handle:
            raise EmulationError(_last_error())
        described = json.loads(engine().gnaforge_emulator_describe(self._handle))
        self.target: int = described["target"]
        self.kernels: dict[str, list[tuple[int, int]]] = {
            kernel["name"]: [(offset, size) for offset, size in kernel["params"]] for kernel in described["kernels"]
        }
        self._param_bytes: dict[str, int] = {kernel["name"]: kernel["bytes"] for kernel in described["kernels"]}
        self.instructions: list[tuple[int, str]] = [(line, opcode) for line, opcode in described["instructions"]]

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            engine().gnaforge_emulator_module_free(self._handle)

    def opcodes(self) -> Counter[str]:
        """Instructions in the text, by opcode."""
        return Counter(opcode for _, opcode in self.instructions)

    def _kernel(self, kernel: str | None) -> str:
        if kernel is None:
            if len(self.kernels) != 1:
                raise ValueError(f"name one of the kernels: {', '.join(self.kernels)}")
            return next(iter(self.kernels))
        if kernel not in self.kernels:
            raise ValueError(f"no kernel {kernel!r}; there are: {', '.join(self.kernels)}")
        return kernel

    def _pack(self, kernel: str, arguments: Sequence[object], arrays: list[Array]) -> Array:
        """Arguments as the kernel's parameter bytes. Arrays are passed by address and noted in ``arrays``."""
        params = self.kernels[kernel]
        if len(arguments) != len(params):
            raise ValueError(f"{kernel} takes {len(params)} arguments, got {len(arguments)}")
        packed = np.zeros(self._param_bytes[kernel] + 64, np.uint8)
        start = -packed.ctypes.data % 64  # a tensor map among the parameters keeps its alignment
        packed = packed[start : start + self._param_bytes[kernel]]
        for (offset, size), argument in zip(params, arguments, strict=True):
            if isinstance(argument, TensorMap):
                arrays.append(argument.array)
                value = argument.bytes.tobytes()
            elif isinstance(argument, np.ndarray):
                arrays.append(argument)
                value = argument.ctypes.data.to_bytes(8, "little")
            elif isinstance(argument, bytes | bytearray):
                value = bytes(argument)
            elif isinstance(argument, np.generic):
                value = argument.tobytes()
            elif isinstance(argument, int):
                value = (argument % (1 << 8 * size)).to_bytes(size, "little")
            elif isinstance(argument, float):
                value = np.float32(argument).tobytes() if size == 4 else np.float64(argument).tobytes()
            else:
                raise TypeError(f"can't pass {type(argument).__name__} to a kernel")
            if len(value) != size:
                raise ValueError(f"an argument has {len(value)} bytes, {kernel} takes {size} there")
            packed[offset : offset + size] = np.frombuffer(value, np.uint8)
        return packed

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[object],
        *,
        kernel: str | None = None,
        shared_bytes: int = 0,
        memory: Iterable[Array] = (),
        options: Options | None = None,
    ) -> Counters:
        """Runs a kernel to its end.

        Args:
            grid, block: sizes; missing dimensions are 1.
            arguments: one per parameter: arrays (passed by address), tensor maps, numbers, or bytes as they are.
            kernel: its name; None if the module holds one.
            shared_bytes: dynamic shared memory.
            memory: further arrays that the kernel may touch. Everything else in the process is out of bounds for it.
            options: the schedule.

        Raises:
            EmulationError: the kernel broke a rule or hung.
        """
        options = options or Options()
        name = self._kernel(kernel)
        arrays = list(memory)
        packed = self._pack(name, arguments, arrays)
        how = LaunchOptions(
            grid=(*grid, 1, 1)[:3],
            block=(*block, 1, 1)[:3],
            dynamic_shared=shared_bytes,
            timing=TIMINGS.index(options.timing),
            order=ORDERS.index(options.order),
            host_threads=options.host_threads,
            seed=options.seed,
            patience=options.patience,
            relaxed_tensor_frees=int(options.relaxed_tensor_frees),
            relaxed_warpgroups=int(options.relaxed_warpgroups),
            relaxed_tensor_waits=int(options.relaxed_tensor_waits),
            relaxed_tensor_fences=int(options.relaxed_tensor_fences),
            trace=int(options.trace),
            unchecked=int(not options.checks),
            early=int(options.early),
        )
        device = engine().gnaforge_emulator_memory()
        counted = Counted()
        executed, waited = np.zeros((2, len(self.instructions)), np.uint64)
        try:
            for index, array in enumerate(arrays):
                low, high = _byte_bounds(array)
                label = f"array {index} {array.dtype}{list(array.shape)}"
                engine().gnaforge_emulator_memory_add(device, low, high - low, label.encode())
            failed = engine().gnaforge_emulator_launch(
                self._handle,
                name.encode(),
                ctypes.byref(how),
                packed.ctypes.data,
                packed.size,
                device,
                ctypes.byref(counted),
                executed.ctypes.data,
                waited.ctypes.data,
            )
        finally:
            engine().gnaforge_emulator_memory_free(device)
        if failed:
            raise EmulationError(_last_error())
        opcodes: Counter[str] = Counter()
        lines: Counter[int] = Counter()
        waits = {line: count for (line, _), count in zip(self.instructions, waited.tolist(), strict=True) if count}
        for (line, opcode), count in zip(self.instructions, executed.tolist(), strict=True):
            if count and opcode != "pmevent":  # markers are no work
                opcodes[opcode] += count
                lines[line] += count
        return Counters(
            counted.instructions,
            dict(opcodes),
            dict(lines),
            waits,
            counted.async_load_bytes,
            counted.async_store_bytes,
            counted.load_bytes,
            counted.store_bytes,
            counted.interior_tiles,
            counted.shell_tiles,
            counted.interior_instructions,
            counted.shell_instructions,
            counted.mma_operations,
        )
