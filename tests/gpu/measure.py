#!/usr/bin/env python3
"""The process in which first.py times and checks kernels, one request per line; see `gnaforge.verification.serving`.
Standard library only, but for requests about torch."""

from __future__ import annotations

import argparse
import ctypes as c
import math
import struct
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from paths import set_up

set_up()

from device import Device, DeviceError, Exact, Query  # noqa: E402
from gnaforge.build import abi  # noqa: E402
from gnaforge.errors import InputError  # noqa: E402
from gnaforge.runtime.dtypes import DTYPES  # noqa: E402
from gnaforge.runtime.problem import Problem  # noqa: E402
from gnaforge.verification.entry import Call, Entry, LaunchError, Refused  # noqa: E402
from gnaforge.verification.serving import serve  # noqa: E402

Json = dict[str, Any]
_SHORT = 5e-4  # seconds of a kernel beside which the host's part of a launch is of interest
_NAN = 0xFF  # every byte of it: NaN in each element type
_LSE_SLACK = 1e-3  # of log-sum-exp: fp32 sums and exp2, far below what a lost KV tile does to it
_UNITS = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}  # half an ulp of 1


class Wrong(Exception):
    """A kernel's results are not what they must be; says where."""


class Tensors:
    """Q, K, V and results of a problem in device memory, contiguous, each an allocation of its own."""

    def __init__(self, device: Device, entry: Entry, problem: Problem) -> None:
        self.device, self.entry, self.problem = device, entry, problem
        self.addresses: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._exact: list[Exact] = []
        self._workspace = 0
        try:
            self._allocate()
        except BaseException:
            self.release()
            raise

    def _allocate(self) -> None:
        op, problem = self.entry.op, self.problem
        views: dict[str, abi.Tensor] = {}
        for role in (*op.inputs, *op.outputs):
            shape, dtype = role.shape(problem), role.dtype(problem, self.entry.config.output_dtype)
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            size = self._bytes[role.name] = math.prod(shape) * dtype.bytes
            at = self.addresses[role.name] = self.device.allocate(size)
            view = abi.Tensor(c.sizeof(abi.Tensor), dtype.code, at, strides[0])
            view.token_stride = abi.I64x3(*strides[1 : 1 + problem.rank])
            view.head_stride = strides[1 + problem.rank]
            views[role.name] = view
        for seed, role in enumerate(op.inputs):
            count = math.prod(role.shape(problem))
            self.device.fill(self.addresses[role.name], count, role.dtype(problem).code, seed)
        self.call: Call = self.entry.prepare(problem, views)
        if self.call.workspace_bytes:
            self._workspace = self.device.allocate(self.call.workspace_bytes)

    def launch(self) -> None:
        """Runs the kernel on the default stream."""
        self.call.run(self._workspace or None, None)

    def release(self) -> None:
        """Gives the memory back."""
        for address in (*self.addresses.values(), self._workspace):
            if address:
                self.device.release(address)
        self.addresses, self._workspace = {}, 0

    def check(self, queries: list[Json]) -> float:
        """Runs the kernel over results that are NaN, and compares some queries, always the same, with float64. Returns
        the largest share of its bound that an element takes.

        Raises:
            Wrong: more than all of it.
        """
        for role in self.entry.op.outputs:
            self.device.set(self.addresses[role.name], _NAN, self._bytes[role.name])
        self.launch()
        self.device.wait()
        if not self._exact:
            with ThreadPoolExecutor() as pool:  # C code: the lock of the interpreter is free
                self._exact = list(pool.map(self.device.exact, map(self._query, queries)))
        return max(map(self._compare, queries, self._exact))

    def _compare(self, query: Json, exact: Exact) -> float:
        """The largest share of its bound that an element of a query's results takes."""
        problem, unit = self.problem, _UNITS[self.problem.dtype]
        row = (query["batch"] * problem.token_count + query["token"]) * problem.heads + query["head"]
        # Probabilities and the output are rounded, each by half an ulp; the rest is fp32.
        sizes = zip(exact.out, exact.magnitude, strict=True)
        bounds = [1.1 * unit * (magnitude + abs(value)) + 1e-4 * magnitude + 1e-6 for value, magnitude in sizes]
        worst = 0.0
        for name, values, allowed in (("out", exact.out, bounds), ("lse", [exact.lse], [_LSE_SLACK])):
            for channel, found in enumerate(self._read(name, row)):
                share = abs(found - values[channel]) / allowed[channel]
                if not share <= 1:  # NaN, too
                    where = f"batch entry {query['batch']}, token {query['token']}, head {query['head']}"
                    raise Wrong(
                        f"{name}: {found:.6g} at {where}, channel {channel}; exact is {values[channel]:.6g}, allowed "
                        f"error {allowed[channel]:.2g}"
                    )
                worst = max(worst, share)
        return worst

    def _query(self, query: Json) -> Query:
        problem = self.problem

        def three(values: Any) -> Any:
            return abi.I64x3(*values)

        boxes = (three(problem.tokens), *(three(query[name]) for name in ("begin", "end", "step")))
        sizes = (problem.heads, problem.kv_heads, problem.head_dim, problem.value_head_dim)
        where = (query["batch"], query["token"], query["head"])
        code = DTYPES[problem.dtype].code
        return Query(problem.rank, code, *boxes, *where, *sizes, problem.score_scale, (c.c_uint64 * 3)(0, 1, 2))

    def _read(self, name: str, row: int) -> list[float]:
        (role,) = (role for role in self.entry.op.outputs if role.name == name)
        dtype = role.dtype(self.problem, self.entry.config.output_dtype)
        channels = 1 if role.channels is None else self.problem.value_head_dim
        data = self.device.read(self.addresses[name] + row * channels * dtype.bytes, channels * dtype.bytes)
        if dtype.name == "bf16":
            halves = struct.unpack(f"<{channels}H", data)
            return list(struct.unpack(f"<{channels}f", struct.pack(f"<{channels}I", *(half << 16 for half in halves))))
        return list(struct.unpack(f"<{channels}{'e' if dtype.name == 'fp16' else 'f'}", data))


class Server:
    """Answers requests about the one kernel that was opened last."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._entry: Entry | None = None
        self._tensors: Tensors | None = None
        self._jobs: dict[str, Callable[[Json], Json]] = {
            "about": self.about,
            "torch": self.torch,
            "open": self.open,
            "check": self.check,
            "time": self.time,
            "sdpa": self.sdpa,
        }

    def about(self, _: Json) -> Json:
        """Facts of the GPU."""
        return dict(self._device.facts)

    def torch(self, _: Json) -> Json:
        """Torch's version and what it says of the GPU."""
        import torch

        found: Json = {"torch": torch.__version__, "cuda_of_torch": torch.version.cuda, "usable": False}
        if torch.cuda.is_available():
            found |= {"usable": True, "cudnn": torch.backends.cudnn.version()}
        return found

    def open(self, request: Json) -> Json:
        """Loads a kernel: ``library``, ``key``."""
        self._forget()
        try:
            self._entry = Entry(Path(request["library"]), request["key"])
        except (InputError, ValueError) as error:
            return {"failed": "library", "message": str(error)}
        return {"device": self._entry.device}

    def check(self, request: Json) -> Json:
        """Compares some queries of a problem with float64: ``problem``, ``queries``."""
        return {"share": self._problem(request).check(request["queries"])}

    def time(self, request: Json) -> Json:
        """`check`, then `measure`, also where results are wrong: ``seconds``, ``pause``."""
        tensors = self._problem(request)
        try:
            found: Json = {"share": tensors.check(request["queries"])}
        except Wrong as error:
            found = {"failed": "wrong", "message": str(error)}
        return {**found, **measure(self._device, tensors.launch, request["seconds"], request["pause"])}

    def sdpa(self, request: Json) -> Json:
        """Torch's dense attention, random inputs: ``problem``, ``contender``, ``seconds``, ``pause``."""
        import torch

        self._forget()
        try:
            return self._time_sdpa(request, "cuda" if torch.cuda.is_available() else "cpu")
        except RuntimeError as error:
            self._device.wait()  # raises if it is the GPU that failed
            return {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _time_sdpa(self, request: Json, where: str) -> Json:
        import torch
        from gnaforge.runtime.bench_contenders import DENSE, heads_first
        from gnaforge.runtime.op_table import FORWARD

        problem = Problem.from_json(request["problem"])
        q, k, v = FORWARD.random_inputs(problem, 0, where).values()
        tensors = heads_first((q, k, v))
        with torch.no_grad():
            call = DENSE[request["contender"]](problem, None, tensors)
            call(tensors)
            self._device.wait()
            return measure(self._device, lambda: call(tensors), request["seconds"], request["pause"])

    def _problem(self, request: Json) -> Tensors:
        if self._entry is None:
            raise LookupError("no kernel was opened")
        problem = Problem.from_json(request["problem"])
        if self._tensors is None or self._tensors.problem != problem:
            self._forget_tensors()
            self._tensors = Tensors(self._device, self._entry, problem)
        return self._tensors

    def _forget_tensors(self) -> None:
        if self._tensors is not None:
            self._tensors.release()
        self._tensors = None

    def _forget(self) -> None:
        self._forget_tensors()
        self._entry = None

    def answer(self, request: Json) -> Json:
        """The reply to any request. What isn't said of the kernel or this machine is ``broken``: an error of the
        harness."""
        start = time.perf_counter()
        try:
            reply = self._jobs[request["do"]](request)
        except Refused as error:
            reply = {"failed": "refused", "message": str(error)}
        except Wrong as error:
            reply = {"failed": "wrong", "message": str(error)}
        except MemoryError as error:
            reply = {"skipped": f"out of memory: {error}"}
        except ImportError as error:
            reply = {"unavailable": str(error)}
        except (DeviceError, LaunchError) as error:
            reply = {"failed": "launch", "message": str(error), "ended": True}
        except Exception:  # goes to whoever asked; the next job may be right
            reply = {"broken": traceback.format_exc()}
        return {**reply, "took": round(time.perf_counter() - start, 3)}


def measure(device: Device, launch: Callable[[], object], seconds: float, pause: float) -> Json:
    """Repeats a call for about ``seconds``, after a pause in which the GPU cools and one call that warms it up.

    Returns:
        ``launches``; per launch ``seconds``, by events, and ``cycles`` of a processor's clock; ``mhz``, the mean clock;
        ``host_seconds`` that a launch of a short kernel takes before it is in the queue. The last three are None where
        nothing counts cycles, or the kernel is long.
    """
    time.sleep(pause)
    launch()
    device.mark(0)
    launch()
    device.mark(1)
    one = device.elapsed().seconds
    host = _enqueue(launch) if one < _SHORT else None
    device.wait()
    launches = max(1, min(100_000, round(seconds / max(one, 1e-6))))
    device.mark(0)
    for _ in range(launches):
        launch()
    device.mark(1)
    found = device.elapsed()
    return {
        "launches": launches,
        "seconds": found.seconds / launches,
        **clock_of(*found, launches),
        "host_seconds": host,
    }


def _enqueue(launch: Callable[[], object], times: int = 50) -> float:
    """Seconds of the host per launch, of fewer than a queue takes."""
    start = time.perf_counter()
    for _ in range(times):
        launch()
    return (time.perf_counter() - start) / times


def clock_of(seconds: float, cycles: float, nanoseconds: float, launches: int) -> Json:
    """Cycles per launch and the mean clock. The two counters are read together, a little outside of the marks that
    time is taken between: the clock is of both, and cycles follow from it."""
    if cycles <= 0 or nanoseconds <= 0:
        return {"cycles": None, "mhz": None}
    per_second = cycles / (nanoseconds * 1e-9)
    return {"cycles": seconds * per_second / launches, "mhz": per_second / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=Path, required=True, metavar="FILE", help="device.so of prepare.py")
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="read requests from this file instead")
    options = parser.parse_args()
    try:
        device = Device(options.device)
    except (OSError, DeviceError) as error:
        print(f"error: no GPU can be used here: {error}", file=sys.stderr)
        return 2
    serve(Server(device).answer, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
