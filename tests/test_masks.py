"""Masks of shell tiles, of boxes of all kinds, against NumPy: on the host, and as nvcc compiles them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from itertools import count, takewhile
from math import prod
from pathlib import Path

import numpy as np
import pytest
from gnaforge.build.identity import include_dir
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.emulator import load
from gnaforge.errors import BuildError
from test_headers import STRICT, UBSAN, pointer

FAR = (1 << 30) - 1  # positions along an axis are less
MASKS = 1024


@pytest.fixture(scope="module")
def masks(compile_library: Callable[..., Path]) -> ctypes.CDLL:
    """masks.cpp as a library. Warnings are errors, and UBSan, where there is one, ends the process."""
    try:
        path = compile_library("masks.cpp", "masks", *STRICT, *UBSAN)
    except subprocess.CalledProcessError:
        path = compile_library("masks.cpp", "masks", *STRICT)
    return ctypes.CDLL(str(path))


def cases(masks: ctypes.CDLL) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each box its index, ranges [MASKS, rank, 2] and the words of their masks. Ranges begin and end anywhere in the
    box, and now and then outside, just so or far away; some are empty."""
    rng = np.random.default_rng(0)
    for index in range(masks.box_count()):
        box = tuple(takewhile(bool, (masks.extent_of(index, axis) for axis in count())))
        ranges, seen = np.zeros((MASKS, len(box), 2), np.int32), np.ones((MASKS, *box), bool)
        for d, extent in enumerate(box):
            bounds = rng.integers(0, extent + 1, (2, MASKS))
            whole = rng.random(MASKS) < 0.3  # so that the others can be seen
            bounds = np.where(
                whole, [[0], [extent]], np.where(rng.random(MASKS) < 0.9, np.sort(bounds, axis=0), bounds)
            )
            beyond = rng.choice([-FAR, -33, -1, extent + 1, extent + 70, FAR], (2, MASKS))
            ranges[:, d] = np.where(rng.random((2, MASKS)) < 0.1, beyond, bounds).T
            position = np.arange(extent)
            along = (ranges[:, d, :1] <= position) & (position < ranges[:, d, 1:])
            seen &= along.reshape(MASKS, *(extent if axis == d else 1 for axis in range(len(box))))
        words = -(-prod(box) // 32)
        bits = np.zeros((MASKS, 32 * words), bool)
        bits[:, : prod(box)] = seen.reshape(MASKS, -1)
        assert 0.1 < seen.any(axis=tuple(range(1, 1 + len(box)))).mean() < 0.95, box
        yield index, ranges, np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def test_masks_on_the_host(masks: ctypes.CDLL) -> None:
    for index, ranges, expected in cases(masks):
        found = np.zeros_like(expected)
        masks.find_masks(index, MASKS, pointer(ranges), pointer(found))
        assert np.array_equal(found, expected), [masks.extent_of(index, axis) for axis in range(3)]


def test_masks_on_a_device(masks: ctypes.CDLL, tmp_path: Path) -> None:
    """In the emulator: device code has shifts of its own."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    ptx, source = tmp_path / "masks.ptx", Path(__file__).with_name("masks.cpp")
    flags = ("-ptx", "-arch=sm_90a", "-std=c++17", "-Werror=all-warnings", f"-I{include_dir()}", "-x", "cu")
    done = subprocess.run([str(nvcc.path), *flags, str(source), "-o", str(ptx)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module = load(ptx.read_text())
    for index, ranges, expected in cases(masks):
        found = np.zeros_like(expected)
        numbers = [np.array([number], np.int32) for number in (index, MASKS)]
        module.launch([MASKS // 128], [128], [*numbers, ranges, found])
        assert np.array_equal(found, expected), [masks.extent_of(index, axis) for axis in range(3)]
