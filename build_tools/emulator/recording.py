"""Recordings of what a launch did that matters to synchronisation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .library import engine

# Event of engine/recording.h, which says what the fields of a record mean
EVENTS = (
    "cta",
    "execute",
    "read",
    "write",
    "async_read",
    "async_write",
    "landed",
    "tensor_read",
    "tensor_write",
    "init",
    "arrive",
    "expect",
    "complete",
    "wait_open",
    "wait_done",
    "barrier",
)
RECORD = np.dtype([("event", "u4"), ("warp", "u4"), ("instruction", "u4"), ("address", "u4"), ("value", "u8")])


@dataclass
class Recording:
    """Events, in the order of the schedule; complete once the block of `recording` has ended.

    Attributes:
        records: of dtype `RECORD`; ``event`` is an index into `EVENTS`, ``instruction`` one into `Module.instructions`.
    """

    records: np.ndarray[Any, np.dtype[Any]] = field(default_factory=lambda: np.zeros(0, RECORD))


@contextmanager
def record_launches() -> Iterator[Recording]:
    """Records the launches of this thread in the block, those on one host thread."""
    made = Recording()
    engine().gnaforge_emulator_record(1)
    try:
        yield made
    finally:
        engine().gnaforge_emulator_record(0)
        count = ctypes.c_uint64()
        address = engine().gnaforge_emulator_records(ctypes.byref(count))
        if count.value:
            made.records = np.frombuffer(ctypes.string_at(address, count.value * RECORD.itemsize), RECORD)
