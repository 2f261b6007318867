"""The process in which kernels run: ``python -m gnaforge.verification.worker``. One JSON request per line of standard
input, one reply per line of standard output.

A kernel may crash or hang without harm to its caller, and its schedule is its own: see `process.Worker`.
"""

from __future__ import annotations

import ctypes as c
import hashlib
import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..build_tools.emulator.library import LaunchOptions
from ..build_tools.emulator.module import ORDERS, TIMINGS
from ..families import family_of
from ..runtime.config import KernelConfig
from ..runtime.op_table import FORWARD
from ..runtime.problem import Problem
from ..runtime.reference import attention, error_bound
from .contract import Kernel, Refused
from .counters import OLDER_EMULATOR, REPORTED
from .layouts import Guarded, guarded
from .problems import EMULATED_PROCESSORS

Json = dict[str, Any]


class Failure(Exception):
    """A kernel is wrong. ``kind`` says in which way, for programs."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Emulator:
    """The stand-in that an emulated kernel is linked to. ``relaxed_tensor_waits`` is as in `emulator.Options`."""

    def __init__(self, kernel: Kernel, relaxed_tensor_waits: bool) -> None:
        self._relaxed_tensor_waits = int(relaxed_tensor_waits)
        try:
            self._reset = kernel.function("gnaforge_standin_reset")
            self._announce = kernel.function("gnaforge_standin_announce")
            self._withdraw = kernel.function("gnaforge_standin_withdraw")
            self._report = kernel.function("gnaforge_standin_report")
        except AttributeError as error:
            raise ValueError(OLDER_EMULATOR) from error
        self._announce.argtypes = [c.c_uint64, c.c_uint64, c.c_char_p]
        self._withdraw.argtypes = [c.c_uint64]
        self._report.restype = c.c_char_p
        self._known: list[int] = []

    def start(self, schedule: Json) -> None:
        """Begins a run: forgets the last one's errors, counters and memory."""
        for address in self._known:
            self._withdraw(address)
        self._known = []
        how = LaunchOptions(
            timing=TIMINGS.index(schedule["timing"]),
            order=ORDERS.index(schedule["order"]),
            seed=schedule["seed"],
            host_threads=1,
            patience=schedule["patience"],
            trace=int(schedule["trace"]),
            relaxed_tensor_waits=self._relaxed_tensor_waits,
        )
        self._reset(c.byref(how))

    def announce(self, name: str, address: int, size: int) -> None:
        """Lets the kernel touch memory; everything else is out of bounds."""
        self._announce(address, size, name.encode())
        self._known.append(address)

    def report(self) -> Json:
        """Messages and launches since `start`.

        Raises:
            ValueError: the emulator counts less than is wanted of it.
        """
        said = dict(json.loads(self._report()))
        if any(REPORTED - launch.keys() for launch in said["launches"]):
            raise ValueError(OLDER_EMULATOR)
        return said


@lru_cache(maxsize=4)
def _expected(problem: Problem, seed: int, rounds: bool) -> tuple[Any, Any, Any]:
    """Inputs, exact results, and how far a kernel may be from them."""
    q, k, v = FORWARD.random_inputs(problem, seed).values()
    exact = attention(problem, q, k, v)
    return (q, k, v), exact, error_bound(problem, q, k, v, exact, rounds_probabilities=rounds)


def _allocate(problem: Problem, inputs: Any, layout: str) -> dict[str, Guarded]:
    memory = {}
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        memory[name] = guarded(name, tensor.shape, tensor.dtype, layout)
        memory[name].tensor.copy_(tensor)
    leading = (problem.batch, *problem.tokens, problem.heads)
    memory["out"] = guarded("out", (*leading, problem.value_head_dim), inputs[2].dtype, layout)
    memory["lse"] = guarded("lse", leading, torch.float32, layout, channels=False)
    return memory


def _poison(problem: Problem, memory: dict[str, Guarded], seed: int) -> tuple[int, int]:
    """Puts NaN into Q, K and V of all batch entries and heads but one K/V head and its queries; returns which."""
    batch, head = seed % problem.batch, seed // problem.batch % problem.kv_heads
    group = problem.heads // problem.kv_heads
    for name, count in (("query", group), ("key", 1), ("value", 1)):
        tensor = memory[name].tensor
        kept = tensor[batch, ..., head * count : (head + 1) * count, :].clone()
        tensor.fill_(float("nan"))
        tensor[batch, ..., head * count : (head + 1) * count, :] = kept
    return batch, head


def _inputs(memory: dict[str, Guarded]) -> dict[str, torch.Tensor]:
    """All bytes of Q, K and V and of what is around them."""
    return {name: memory[name].storage.view(torch.uint8) for name in ("query", "key", "value")}


def _check_memory(memory: dict[str, Guarded], before: dict[str, torch.Tensor]) -> None:
    for name, now in _inputs(memory).items():
        if not torch.equal(now, before[name]):
            raise Failure("guard", f"the kernel wrote into {name}, or around it")
    for name in ("out", "lse"):
        missing = memory[name].unwritten()
        if missing.any():
            first = memory[name].place(missing.nonzero()[0].tolist())
            raise Failure("unwritten", f"{int(missing.sum())} elements of {name} were never written; first: {first}")
    for one in (memory["out"], memory["lse"]):
        outside = one.outside()
        if len(outside):
            raise Failure(
                "guard",
                f"{len(outside)} elements outside of {one.name} were written, in its guard zones or gaps; first: "
                f"{int(outside[0]):+} elements from its start",
            )


def _compare(one: Guarded, exact: torch.Tensor, bound: torch.Tensor, part: Any) -> Json:
    """The largest error, and where it takes most of its bound.

    Raises:
        Failure: it is beyond the bound.
    """
    got = one.tensor[part]
    error, limit = (got.double() - exact[part]).abs(), bound[part]
    share = torch.where(error.isnan(), float("inf"), error / limit)
    worst = int(share.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape)]
    if share.flatten()[worst] > 1:
        wrong = int((share > 1).sum())
        where = one.place(index if part is ... else _absolute(one, part, index))
        raise Failure(
            "wrong",
            f"{wrong} of {share.numel()} elements of {one.name} are further from exact than rounding allows; "
            f"worst: {float(got[tuple(index)]):.6g} at {where}, exact {float(exact[part][tuple(index)]):.6g}, "
            f"allowed error {float(limit[tuple(index)]):.2g}",
        )
    return {"error": float(error.max()), "bound": float(limit.flatten()[worst]), "share": float(share.max())}


def _absolute(one: Guarded, part: Any, index: list[int]) -> list[int]:
    """The index in the whole tensor of one in a part [batch entry, ..., some heads]."""
    full = torch.arange(one.tensor.numel()).view(one.tensor.shape)[part]
    flat = full[tuple(index)]
    return [int(i) for i in torch.unravel_index(flat, one.tensor.shape)]


class Server:
    """Answers requests about the one kernel that was opened."""

    def __init__(self) -> None:
        self.kernel: Kernel | None = None
        self.emulator: Emulator | None = None

    def open(self, request: Json) -> Json:
        """Loads a kernel: ``library``, ``key``."""
        self.config = KernelConfig.parse(request["key"])
        family = self.family = family_of(self.config)
        if family.target.emulated_device:  # the stand-in reads it when it is loaded
            os.environ.setdefault("GNAFORGE_EMULATOR_DEVICE", family.target.emulated_device)
            os.environ.setdefault("GNAFORGE_EMULATOR_PROCESSORS", str(EMULATED_PROCESSORS))
        self.kernel = Kernel(Path(request["library"]), request["key"])
        self.emulator = Emulator(self.kernel, family.relaxed_tensor_waits) if self.kernel.emulated else None
        return {"emulated": self.kernel.emulated}

    def ready(self, _: Json) -> Json:
        """Whether the process answers."""
        return {}

    def _run(self, problem: Problem, memory: dict[str, Guarded], request: Json) -> Json:
        """Runs the kernel, and checks what it wrote; returns what the emulator counted, and the seconds that it took.

        Raises:
            Refused, Failure
        """
        assert self.kernel is not None
        if self.emulator:
            self.emulator.start(request["schedule"])
            for one in memory.values():
                self.emulator.announce(one.name, *one.extent)
        tensors = {name: one.tensor for name, one in memory.items()}
        announce = self.emulator.announce if self.emulator else lambda *_: None
        before = {name: one.clone() for name, one in _inputs(memory).items()}
        start = time.perf_counter()
        try:
            self.kernel.call(problem, tensors, announce)
        except RuntimeError as error:
            said = self.emulator.report()["messages"] if self.emulator else []
            raise Failure("emulator" if said else "launch", "\n".join(said) or str(error)) from error
        seconds = time.perf_counter() - start
        _check_memory(memory, before)
        return {"launches": self.emulator.report()["launches"] if self.emulator else [], "seconds": seconds}

    def prepare(self, request: Json) -> Json:
        """Computes exact attention for `verify`, which asks for it in a request of its own: it is no kernel's time."""
        self._exact(request)
        return {}

    def _exact(self, request: Json) -> tuple[Any, Any, Any]:
        rounds = self.config.arch != "cpu"  # tensor cores take probabilities in 16 bits
        return _expected(Problem.from_json(request["problem"]), request["seed"], rounds)

    def verify(self, request: Json) -> Json:
        """Runs the kernel on a ``problem`` with data of ``seed`` in a ``layout``, and compares with exact attention."""
        problem = Problem.from_json(request["problem"])
        inputs, exact, bounds = self._exact(request)
        memory = _allocate(problem, inputs, request["layout"])
        part: Any = ...
        if request.get("poisoned"):
            batch, head = _poison(problem, memory, request["seed"])
            group = problem.heads // problem.kv_heads
            part = (batch, *[slice(None)] * len(problem.tokens), slice(head * group, (head + 1) * group))
        counted = self._run(problem, memory, request)
        found = {
            name: _compare(memory[name], wanted, bound, part)
            for name, wanted, bound in zip(("out", "lse"), exact, bounds, strict=True)
        }
        bits = b"".join(memory[name].tensor.contiguous().view(torch.uint8).numpy().tobytes() for name in ("out", "lse"))
        return {**found, **counted, "digest": hashlib.sha256(bits).hexdigest()}

    def call(self, request: Json) -> Json:
        """Runs the kernel on tensors in a file, and leaves its results in another: for the pytest fixture."""
        q, k, v = torch.load(request["inputs"], weights_only=True)
        problem = Problem.from_json(request["problem"])
        memory = _allocate(problem, (q, k, v), request["layout"])
        counted = self._run(problem, memory, request)
        torch.save(tuple(memory[name].tensor.contiguous() for name in ("out", "lse")), request["outputs"])
        return counted

    def answer(self, request: Json) -> Json:
        """The reply to any request."""
        try:
            return dict(getattr(self, request["do"])(request))
        except Refused as error:
            return {"refused": str(error)}
        except Failure as error:
            return {"failed": error.kind, "message": str(error)}
        except (ValueError, OSError, AttributeError) as error:
            return {"failed": "library", "message": str(error)}


def main() -> None:
    """Serves until standard input ends."""
    # Kernels print to standard output, which is for replies only.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    server = Server()
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
