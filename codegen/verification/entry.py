"""Kernels of a library through the C contract (abi.h), on memory of any kind. Needs no torch."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from ..build import abi
from ..build.library import load_library_table
from ..runtime.config import KernelConfig
from ..runtime.op_table import OPS
from ..runtime.problem import Problem
from .kinds import Device

_TEXT = 4096
_DESCALES = {role for role in abi.ROLES if role.startswith("descale")}


def _serially(begin: int, end: int, _: int, body: Callable[..., None], context: int) -> None:
    body(begin, end, context)


def _in_threads(begin: int, end: int, grain: int, body: Callable[..., None], context: int) -> None:
    step = max(grain, -(-(end - begin) // THREADS))
    parts = [(at, min(at + step, end)) for at in range(begin, end, step)]
    threads = [Thread(target=body, args=(*part, context)) for part in parts]  # a call of C leaves Python to others
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


THREADS = 3
_SERIALLY = abi.ParallelFor(_serially)
_IN_THREADS = abi.ParallelFor(_in_threads)


def threaded_host() -> abi.Host:
    """What runs a kernel's threads, `THREADS` at once."""
    return abi.Host(c.sizeof(abi.Host), THREADS, _IN_THREADS)


class Refused(Exception):
    """A kernel does not take a problem; says why."""


class LaunchError(Exception):
    """A kernel took a problem and failed; says why."""


class Call:
    """A call that its kernel takes; it may run any number of times.

    Attributes:
        args: it, for the contract.
        workspace_bytes: memory that it needs beside its tensors.

    Raises:
        Refused: the kernel does not take this problem.
    """

    def __init__(self, entry: abi.Entry, args: abi.Args) -> None:
        self._entry, self.args, self._text = entry, args, c.create_string_buffer(_TEXT)
        if entry.can_run(c.byref(args), self._text, _TEXT):
            raise Refused(self._text.value.decode(errors="replace"))
        self.workspace_bytes = int(entry.workspace_bytes(c.byref(args)))

    def run(self, workspace: int | None, stream: int | None) -> None:
        """Runs the kernel, or enqueues it on a GPU's stream.

        Raises:
            LaunchError: it failed; says why.
        """
        if self._entry.run(c.byref(self.args), workspace, stream, self._text, _TEXT):
            raise LaunchError(self._text.value.decode(errors="replace"))


class CallList:
    """Calls that one kernel takes and runs together; it may run any number of times.

    Attributes:
        workspace_bytes: memory that they need beside their tensors.
    """

    def __init__(self, entry: abi.Entry, calls: Sequence[Call]) -> None:
        self._entry, self._calls, self._text = entry, calls, c.create_string_buffer(_TEXT)
        self._list = (c.POINTER(abi.Args) * len(calls))(*(c.pointer(call.args) for call in calls))
        self.workspace_bytes = int(entry.calls_workspace_bytes(self._list, len(calls)))

    def run(self, workspace: int | None, stream: int | None) -> None:
        """Runs the kernel, or enqueues it on a GPU's stream.

        Raises:
            LaunchError: it failed; says why.
        """
        if self._entry.run_calls(self._list, len(self._calls), workspace, stream, self._text, _TEXT):
            raise LaunchError(self._text.value.decode(errors="replace"))


class Entry:
    """One kernel of a library.

    Attributes:
        config: its identity.
        op: what it computes.
        device: what runs it. In the emulator it takes memory of the CPU, and can be given schedules.

    Raises:
        InputError: it is no kernel library of this version of the contract.
        ValueError: the library holds no such kernel, or one of an op that the op table doesn't have.
    """

    def __init__(self, library: Path, key: str) -> None:
        self._library, contents = load_library_table(library)
        self.config = KernelConfig.parse(key)
        entries = [contents.entries[i].contents for i in range(contents.count)]
        found = [entry for entry in entries if entry.key.decode() == key]
        if not found:
            raise ValueError(f"{library} has no kernel {key}")
        if self.config.op not in OPS:
            raise ValueError(f"{key}: nothing is known of the op; there are {', '.join(OPS)}")
        self.op = OPS[self.config.op]
        self._entry = found[0]
        on_gpu = self._entry.device == abi.DEVICES["cuda"]
        self.device: Device = "emulator" if contents.flags & abi.EMULATED else "cuda" if on_gpu else "cpu"

    @property
    def tensor_device(self) -> str:
        """The place of its tensors, for torch."""
        return "cuda" if self.device == "cuda" else "cpu"

    def function(self, name: str) -> Any:
        """A function of the library or of what it is linked to; AttributeError if there is none."""
        return getattr(self._library, name)

    def prepare(
        self,
        problem: Problem,
        views: Mapping[str, abi.Tensor],
        device_index: int = 0,
        host: abi.Host | None = None,
        accumulate: Sequence[str] = (),
    ) -> Call:
        """A call with tensors by role.

        Args:
            problem: what it computes.
            views: the tensors.
            device_index: of the GPU where they are.
            host: what runs its threads, by default one.
            accumulate: roles of gradients that are added to what their tensors hold.

        Raises:
            Refused: the kernel does not take this problem.
        """
        host = host or abi.Host(c.sizeof(abi.Host), 1, _SERIALLY)
        args = abi.make_args(self.op.name, abi.describe(problem), views, host, self.tensor_device)
        further = [*(["accumulate"] if accumulate else []), *(["descale"] if _DESCALES & views.keys() else [])]
        args.features = abi.feature_bits((*problem.features(), *further))
        args.accumulate = sum(1 << abi.ROLES.index(role) for role in accumulate)
        args.device_index = device_index
        return Call(self._entry, args)

    def prepare_list(self, calls: Sequence[Call]) -> CallList:
        """Calls of this kernel, at least one, none of which writes what another reads or writes."""
        return CallList(self._entry, calls)

    @property
    def accumulates(self) -> bool:
        """Whether the kernel can add gradients to what their tensors hold."""
        return bool(self._entry.features & abi.feature_bits(["accumulate"]))

    @property
    def runs_lists(self) -> bool:
        """Whether the kernel runs lists of calls."""
        return bool(self._entry.struct_size >= c.sizeof(abi.Entry) and self._entry.run_calls)
