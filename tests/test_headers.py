"""C++ headers that kernels compile, those of gna/ and sm90's masks, against the oracle; the order of tiles against
Python's."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import reduce
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import oracle
import pytest
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import kernel_compiler
from gnaforge.build.render import render_kernel, source_suffix
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.errors import BuildError
from gnaforge.gna.axes import Axis as PythonAxis
from gnaforge.gna.source import WindowTiles, tile_list
from gnaforge.runtime.config import KernelConfig

SOURCE = Path(__file__).with_name("headers.cpp")
STRICT = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")
INT_MAX = (1 << 31) - 1
UBSAN = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")


class Axis(ctypes.Structure):
    """PlainAxis in headers.cpp, of gnaforge::Axis."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("length", "window", "stride", "dilation")),
        ("causal", ctypes.c_bool),
    )


class Shape(ctypes.Structure):
    """The first members of Shape in headers.cpp: a Q tile and a KV tile."""

    _fields_ = (
        ("rank", ctypes.c_int),
        ("q_tile", ctypes.POINTER(ctypes.c_int)),
        ("kv_tile", ctypes.POINTER(ctypes.c_int)),
    )


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """headers.cpp as a library. Warnings are errors, and UBSan, where there is one, ends the process."""
    library = tmp_path_factory.mktemp("headers") / "headers.so"
    for sanitizer in (UBSAN, ()):
        command = [*cxx_compiler().command, *STRICT, *sanitizer, "-shared", "-fPIC", f"-I{include_dir()}"]
        done = subprocess.run([*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.shape_at.restype = ctypes.POINTER(Shape)
    loaded.count_q_tiles.restype = loaded.count_wrong_divisions.restype = ctypes.c_int64
    return loaded


@pytest.mark.parametrize(
    ("first", "last", "dense", "spread"),
    [
        pytest.param(1, 300, 1 << 16, 1 << 20, id="small divisors and dividends"),
        pytest.param(1, 1 << 18, 4, 1 << 24, id="divisors up to 2^18"),
        *(
            pytest.param(
                (1 << bits) - 64, min((1 << bits) + 64, INT_MAX), 64, 1 << max(0, 24 - bits), id=f"beside 2^{bits}"
            )
            for bits in range(18, 32)
        ),
    ],
)
def test_divisors_divide(headers: ctypes.CDLL, first: int, last: int, dense: int, spread: int) -> None:
    """A factor that is too small or too large goes wrong first beside the largest multiples."""
    assert headers.count_wrong_divisions(first, last, dense, spread) == 0


def test_every_small_window_and_its_transpose(headers: ctypes.CDLL) -> None:
    for length in range(1, 23):
        for window, causal in product(range(1, length + 1), (False, True)):
            for stride in range(1, window + 1):
                check_windows(headers, (length, window, stride, 1, causal))


def test_windows_of_dilation_groups(headers: ctypes.CDLL) -> None:
    rng = Random(1)
    for _ in range(1000):
        check_windows(headers, oracle.random_axis(rng, 60))


def check_windows(headers: ctypes.CDLL, axis: tuple[int, int, int, int, bool]) -> None:
    length, dilation = axis[0], axis[3]
    for group in range(dilation):
        seen = oracle.axis_mask(*axis)[group::dilation, group::dilation]
        windows, transposed = np.zeros((2, length, 2), dtype=np.int32)
        assert headers.all_windows(ctypes.byref(Axis(*axis)), group, pointer(windows), pointer(transposed)) == len(seen)
        for intervals, expected in ((windows, seen), (transposed, seen.T)):
            begin, end = intervals[: len(seen), :1], intervals[: len(seen), 1:]
            position = np.arange(len(seen))
            assert np.array_equal((begin <= position) & (position < end), expected), (axis, group)


def test_tiles_and_masks(headers: ctypes.CDLL) -> None:
    """3,000 random problems, and of each one random combination of dilation groups, pair by pair."""
    rng = Random(2)
    for index in range(headers.shape_count()):
        shape = headers.shape_at(index).contents
        q_tile, kv_tile = shape.q_tile[: shape.rank], shape.kv_tile[: shape.rank]
        for _ in range(200):
            problem = oracle.random_problem(rng, rank=shape.rank, max_tokens=rng.choice((27, 64, 125)))
            case = f"q_tile {q_tile}, kv_tile {kv_tile}, {problem}"
            check_counts(headers, index, q_tile, kv_tile, problem, case)
            groups = [rng.randrange(d) for d in problem.dilation]
            check_visits(headers, index, q_tile, kv_tile, problem, groups, f"{case}, groups {groups}")


def check_counts(headers, index: int, q_tile: list[int], kv_tile: list[int], problem, case: str) -> None:
    counts = (ctypes.c_double * 3)()
    headers.count_all_tiles(index, (Axis * len(q_tile))(*problem.axes), counts)
    assert tuple(counts) == oracle.count_tiles(problem, tuple(q_tile), tuple(kv_tile)), case
    errors = ctypes.c_int()
    found = headers.count_q_tiles(index, (Axis * len(q_tile))(*problem.axes), ctypes.byref(errors))
    assert (found, errors.value) == (counts[0], 0), case


def check_visits(headers, index: int, q_tile: list[int], kv_tile: list[int], problem, groups, case: str) -> None:
    """Runs the tile lists and masks of the given dilation groups and compares every pair with the oracle."""
    masks = [
        oracle.axis_mask(*axis)[group :: axis[3], group :: axis[3]]
        for axis, group in zip(problem.axes, groups, strict=True)
    ]
    seen = reduce(np.kron, masks)
    lengths = [len(mask) for mask in masks]
    q_tiles = [-(-length // extent) for length, extent in zip(lengths, q_tile, strict=True)]
    visits, row_mask, row_set, quad_mask, tile = np.zeros((5, *seen.shape), dtype=np.int32)
    count, interior = np.zeros((2, np.prod(q_tiles)), dtype=np.int32)
    origin = np.full((np.prod(q_tiles) * np.prod(lengths), len(q_tile)), -1, dtype=np.int32)
    axes = [
        (length, window, stride, 1, causal)
        for length, (_, window, stride, _, causal) in zip(lengths, problem.axes, strict=True)
    ]
    outputs = (visits, row_mask, row_set, quad_mask, tile, count, interior, origin)
    arrays = (ctypes.c_void_p * len(outputs))(*(pointer(array).value for array in outputs))
    stray = headers.visit_tiles(index, (Axis * len(axes))(*axes), arrays)

    assert stray == 0, f"a mask shows a pair that does not exist, or a tile is not what its kind and extent say: {case}"
    assert visits.max() == 1, f"a pair is visited twice: {case}"
    assert np.array_equal(row_mask, seen), f"RowMask: {case}"
    assert np.array_equal(row_set, seen), f"rows_that_see: {case}"
    assert np.array_equal(quad_mask, seen), f"QuadColumns: {case}"

    coordinates = np.unravel_index(np.arange(len(seen)), lengths)
    q_tile_of = np.ravel_multi_index([x // extent for x, extent in zip(coordinates, q_tile, strict=True)], q_tiles)
    queries = np.bincount(q_tile_of, minlength=len(count))
    # Visible pairs of each Q tile (row) in each entry of its list (column).
    visible = np.zeros((len(count), count.max()))
    np.add.at(visible, (np.broadcast_to(q_tile_of[:, None], seen.shape)[seen], tile[seen]), 1)
    entry = np.arange(count.max())
    assert np.array_equal(visible > 0, entry < count[:, None]), f"a tile that no query sees: {case}"
    whole = visible == queries[:, None] * np.prod(kv_tile)
    assert np.array_equal(whole, entry < interior[:, None]), f"interior tiles: {case}"
    sources = [
        WindowTiles(PythonAxis(length, window, stride, causal=causal)) for length, window, stride, _, causal in axes
    ]
    begins = product(*(range(0, length, extent) for length, extent in zip(lengths, q_tile, strict=True)))
    lists = [tile_list(sources, q_tile, kv_tile, begin) for begin in begins]
    assert interior.tolist() == [inside for _, inside in lists], case
    assert np.array_equal(origin[: count.sum()], np.concatenate([tiles for tiles, _ in lists])), f"order: {case}"


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("gna_forward-cpu-r1-bf16-dany-q8-kv8", "INT32", "no cpu kernel takes this dtype"),
        ("gna_forward-sm90-r1-bf16-d64-q64-kv64", "FP32", "no tensor-core kernel takes this dtype"),
        ("gna_forward-sm100-r1-bf16-d64-q256-kv128", "FP32", "no tensor-core kernel takes this dtype"),
    ],
)
def test_a_dtype_that_a_family_does_not_know_fails_to_compile(
    key: str, other: str, message: str, tmp_path: Path
) -> None:
    """And not as another dtype: a kernel that took the wrong one would pass every check of a build."""
    config = KernelConfig.parse(key)
    try:
        compiler = kernel_compiler(config, cxx_compiler())
    except BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / f"kernel{source_suffix(config)}"
    text = render_kernel(config)
    assert text.count("dtype = GNAFORGE_BF16;") == 2  # of the inputs, of the output
    source.write_text(text.replace("dtype = GNAFORGE_BF16;", f"dtype = GNAFORGE_{other};"))
    command = compiler.compile_command(str(source), str(source.with_suffix(".o")), include_dir())
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(rf"static.assert.*{message}", done.stdout + done.stderr), done.stderr


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_compiles_with_clang(tmp_path: Path) -> None:
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("no clang++ on PATH")
    compile_with(clang, *STRICT, "-c", "-o", str(tmp_path / "headers.o"))


def test_compiles_with_nvcc_for_a_device(tmp_path: Path) -> None:
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    # Promotes what nvcc only warns of, a host function called from device code, to an error.
    flags = ("-std=c++17", "-arch=sm_90a", "-Werror=all-warnings", "-x", "cu", "-ptx")
    compile_with(str(nvcc.path), *flags, "-o", str(tmp_path / "headers.ptx"))
    assert "on_device" in (tmp_path / "headers.ptx").read_text()


def compile_with(compiler: str, *flags: str) -> None:
    done = subprocess.run([compiler, *flags, f"-I{include_dir()}", str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
