"""The stand-in for CUDA that an emulated kernel is linked to: its schedule, memory, messages and counters."""

from __future__ import annotations

import ctypes as c
import json
from collections.abc import Iterable
from typing import Any

from .checks import Failure
from .contract import Kernel
from .counters import OLDER_EMULATOR, REPORTED

Json = dict[str, Any]


class Emulator:
    """Drives the stand-in.

    Args:
        kernel: an emulated one.
        relaxed: names of `emulator.Options` to set, as its family has them.

    Raises:
        Failure: it lacks what this version drives it by.
    """

    def __init__(self, kernel: Kernel, relaxed: Iterable[str]) -> None:
        self._relaxed = dict.fromkeys(relaxed, 1)
        try:
            self._reset = kernel.function("gnaforge_standin_reset")
            self._announce = kernel.function("gnaforge_standin_announce")
            self._withdraw = kernel.function("gnaforge_standin_withdraw")
            self._report = kernel.function("gnaforge_standin_report")
        except AttributeError as error:
            raise Failure("library", OLDER_EMULATOR) from error
        self._announce.argtypes = [c.c_uint64, c.c_uint64, c.c_char_p]
        self._withdraw.argtypes = [c.c_uint64]
        self._report.restype = c.c_char_p
        self._known: list[int] = []

    def start(self, schedule: Json) -> None:
        """Begins a run: forgets the last one's errors, counters and memory."""
        from ..build_tools.emulator.library import LaunchOptions
        from ..build_tools.emulator.module import ORDERS, TIMINGS

        self.forget()
        how = LaunchOptions(
            timing=TIMINGS.index(schedule["timing"]),
            order=ORDERS.index(schedule["order"]),
            seed=schedule["seed"],
            host_threads=1,
            patience=schedule["patience"],
            trace=int(schedule["trace"]),
            **self._relaxed,
        )
        self._reset(c.byref(how))

    def forget(self) -> None:
        """Takes back what was announced."""
        for address in self._known:
            self._withdraw(address)
        self._known = []

    def announce(self, name: str, address: int, size: int) -> None:
        """Lets the kernel touch memory; everything else is out of bounds."""
        self._announce(address, size, name.encode())
        self._known.append(address)

    def messages(self) -> list[str]:
        """What was wrong since `start`."""
        return list(json.loads(self._report())["messages"])

    def launches(self) -> list[Json]:
        """What was counted since `start`.

        Raises:
            Failure: the emulator counts less than is wanted of it.
        """
        launches = list(json.loads(self._report())["launches"])
        if any(REPORTED - launch.keys() for launch in launches):
            raise Failure("library", OLDER_EMULATOR)
        return launches
