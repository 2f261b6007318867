"""Readers of files from elsewhere, a good input for each, and ways to spoil it; see test_hostile.py."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import struct
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

from gnaforge.build import cache_report
from gnaforge.build.kernels import build_kernels
from gnaforge.build.library import RECORD_FILE, read_library
from gnaforge.build.render import render_sources
from gnaforge.build.sources import write_sources
from gnaforge.build_tools.cache import Cache, user_cache
from gnaforge.build_tools.cache_archive import export_artifacts, import_artifacts
from gnaforge.build_tools.cache_care import to_prune
from gnaforge.build_tools.elf import parse_elf
from gnaforge.build_tools.text import printable
from gnaforge.build_tools.wheel_abi import platform_tag
from gnaforge.cli import bench as bench_command, cache as cache_command, inspecting, wheel as wheel_command
from gnaforge.cli.cache_moving import needed_files
from gnaforge.errors import GnaforgeError, InputError
from gnaforge.plan import Plan, plan
from gnaforge.runtime.problem import Problem
from gnaforge.spec import parse_spec
from gnaforge.wheel.build import build_wheel
from gnaforge.wheel.check import check
from kernel_set import SMALL, cpu_config

MEMORY = 1 << 30  # bytes that reading one file may take
SECONDS = 10.0  # that it may take

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**17, -(10**17), 1e300, -0.5, "", "\x1b[2J\x1b]0;owned\x07", "\u202egnp", "a\nb", "\0"),
    *("[red]x[/nope]", "x" * 5000, "../../evil", "/etc/passwd", [], {}, [[]] * 50, {"a": {"b": {}}}, ["x"], "\x9b31m"),
)
"""Values that JSON can hold and nobody expects."""
RAW = (
    *(b"[" * 100_000, b'{"a":' * 50_000, b"9" * 400, b"1e999", b'"\\ud800"', b"NaN", b"-Infinity", b"\xff\xfe", b""),
    *(b"null", b"1" * 5000, b'"\\u0000"', b"{", b"\xef\xbb\xbf{}"),
)
"""JSON, or almost, that some parsers choke on."""


class Reader(NamedTuple):
    """A kind of file, ``data`` that is one, how to spoil it, and what reads a file of the kind in a folder."""

    data: bytes
    spoil: Callable[[bytes, Random], bytes]
    read: Callable[[bytes, Path], object]


def spoil_bytes(data: bytes, random: Random) -> bytes:
    """Flips bits, cuts, repeats, fills, or overwrites numbers."""
    spoiled = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        at = random.randrange(len(spoiled) + 1)
        length = random.choice((1, 2, 4, 8, 64, 4096))
        kind = random.randrange(6)
        if kind == 0 and at < len(spoiled):
            spoiled[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del spoiled[at : at + length]
        elif kind == 2:
            spoiled[at:at] = spoiled[at : at + length] * random.choice((1, 2, 20))
        elif kind == 3:
            spoiled[at : at + length] = bytes([random.choice((0, 0xFF, 0x20, 0x1B))]) * length
        elif kind == 4:
            number = random.choice((0, 1, 0xFFFF, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 64) - 1))
            spoiled[at : at + 8] = struct.pack("<Q", number)[: random.choice((2, 4, 8))]
        elif random.random() < 0.1:
            del spoiled[at:]
    return bytes(spoiled)


def spoil_elf(data: bytes, random: Random) -> bytes:
    """As `spoil_bytes`, most often in the headers, which say where everything is."""
    if random.random() < 0.3:
        return spoil_bytes(data, random)
    spoiled = bytearray(data)
    sections = struct.unpack_from("<Q", data, 40)[0]
    for _ in range(random.choice((1, 2, 4))):
        at = random.choice((random.randrange(16, 64), random.randrange(sections, len(data) - 8)))
        number = random.choice((0, 1, 64, 0xFFFF, 0xFFFFFFFF, len(data), (1 << 63) - 1, random.getrandbits(32)))
        size = random.choice((1, 2, 4, 8))
        spoiled[at : at + size] = struct.pack("<Q", number & ((1 << 64) - 1))[:size]
    return bytes(spoiled)


def spoil_json(data: bytes, random: Random) -> bytes:
    """Replaces or removes values anywhere in the tree, or writes what is no JSON in place of one."""
    value = json.loads(data)
    raw = None
    for _ in range(random.choice((1, 1, 2, 5))):
        holder, place = value, None
        while isinstance(holder, dict | list) and holder:
            inner = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
            if place is not None and random.random() < 0.3:
                break
            parent, place = holder, inner
            holder = holder[inner]
        if place is None:
            continue
        kind = random.randrange(5)
        if kind == 0:
            del parent[place]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(random.choice(NASTY))] = parent.pop(place)
        elif kind == 2 and raw is None:
            parent[place], raw = "@raw@", random.choice(RAW)
        else:
            parent[place] = copy.deepcopy(random.choice(NASTY))  # it may be spoiled further
    text = json.dumps(value, indent=random.choice((None, 1)), ensure_ascii=random.random() < 0.5)
    spoiled = text.encode("utf-8", "surrogatepass").replace(b'"@raw@"', raw or b"")
    return spoil_bytes(spoiled, random) if random.random() < 0.1 else spoiled


def spoil_text(data: bytes, random: Random) -> bytes:
    """Swaps words and lines of a spec, and puts nasty values in place of words; or as `spoil_bytes`."""
    if random.random() < 0.3:
        return spoil_bytes(data, random)
    words = data.decode().replace(",", " , ").split(" ")
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(words))
        value = random.choice(
            (*NASTY, ".inf", "1_000", "0x10", "!!python/object:os.system", "&a 1", "*a", "- -", "{", "auto")
        )
        words[at] = random.choice((str(value)[:100], random.choice(words), json.dumps(value)[:200]))
    return " ".join(words).encode("utf-8", "surrogatepass")


def spoil_zip(data: bytes, random: Random) -> bytes:
    """Spoils, renames, drops, doubles or packs otherwise the files of an archive; or its bytes."""
    if random.random() < 0.3:
        return spoil_bytes(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(files))
        name, content = files[at]
        kind = random.randrange(8)
        if kind == 0:
            del files[at]
            files = files or [("x", b"")]
        elif kind == 1:
            files.append((name, content))
        elif kind == 2:
            odd = ("../evil", "/evil", "a\x1b[2Jb", name.upper(), name + "/", "x" * 3000, name.replace("/", "\\"))
            files[at] = (random.choice(odd), content)
        elif name.endswith(".json"):
            files[at] = (name, spoil_json(content, random))
        elif name.endswith(".so"):
            files[at] = (name, spoil_elf(content, random))
        else:
            files[at] = (name, spoil_bytes(content, random))
    methods = [*[zipfile.ZIP_DEFLATED] * 90, *[zipfile.ZIP_STORED] * 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in files:
            archive.writestr(name, content, random.choice(methods))
    spoiled = buffer.getvalue()
    return spoil_bytes(spoiled, random) if random.random() < 0.1 else spoiled


SPEC = b"""\
spec_version: 1
library: okay
arch: [cpu, sm90, sm100]
kernels:
  - rank: [1, 2]
    head_dim: [64, 128]
    dtype: [bf16, fp16]
    tiles: [{q: [64], kv: [64]}, {q: [8, 8], kv: [8, 8]}]
    shapes:
      - {tokens: [30, 48], window: [18, 24], stride: [16, 8], heads: 24, kv_heads: 8}
  - {rank: 1, head_dim: 64, dtype: bf16, tiles: auto, within: 7.5, shapes: [{tokens: 512, window: 9, dilation: 3}]}
"""
SOURCES = render_sources("okay", (SMALL,))


def read_spec(data: bytes, folder: Path) -> object:
    return plan(parse_spec(data, "f.yaml"))


def read_archive(data: bytes, folder: Path) -> object:
    (folder / "a.zip").write_bytes(data)
    cache = Cache(folder / "cache")
    shutil.rmtree(cache.root, ignore_errors=True)
    found = import_artifacts(folder / "a.zip", cache, needed_files)
    with mock.patch.dict(os.environ, {"GNAFORGE_CACHE_DIR": str(cache.root)}):
        inspecting._print_table([inspecting._row(row) for row in inspecting._cached_rows()])
    return found


def read_wheel(data: bytes, folder: Path) -> object:
    path = folder / WHEEL_NAME[0]
    path.write_bytes(data)
    report = check(path)
    wheel_command._print_report(report)
    json.dumps(report.as_dict())
    return report


WHEEL_NAME: list[str] = []


def read_bench_report(data: bytes, folder: Path) -> object:
    from gnaforge.bench.run import explain_missing, read_report, rows
    from gnaforge.bench.tools import calibration
    from gnaforge.families import families_of

    (folder / "r.json").write_bytes(data)
    found = read_report(folder / "r.json")
    if timed := rows(found):
        bench_command._show(timed, False)
    print(*(printable(line) for line in explain_missing(found)), sep="\n")
    with contextlib.suppress(GnaforgeError):
        calibration(families_of("gna_forward", "sm90")[0], folder / "r.json")
    return found


def read_problem_list(data: bytes, folder: Path) -> object:
    from gnaforge.runtime.problem_file import read_problems

    (folder / "p.json").write_bytes(data)
    try:
        return read_problems(folder / "p.json")
    except ValueError as error:  # a wheel's runtime knows no GnaforgeError
        raise InputError(str(error)) from error


def read_manifest(data: bytes, folder: Path) -> object:
    source = folder / "okay" / "src"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    (source / "manifest.json").write_bytes(data)
    (source / "mine.txt").write_text("mine")
    return write_sources(SOURCES, folder)


def read_build_record(data: bytes, folder: Path) -> object:
    library = folder / "okay.so"
    if not library.exists():
        shutil.copy(LIBRARY[0], library)
    (folder / RECORD_FILE).write_bytes(data)
    found = read_library(library)
    rows = [inspecting._row({**row, "state": "built", "where": str(library)}, modelled=True) for row in found]
    inspecting._print_table(rows)
    inspecting._print_static(rows)
    inspecting.print_json(rows)
    if not {"registers", "code"} & set().union(*found):
        raise InputError("nothing is taken from the record")  # which is no error: a library alone only says less
    return rows


def read_cache_record(data: bytes, folder: Path) -> object:
    """Prints all there is to say of a cache whose only artifact has this record, which an import may have brought."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "cache").mkdir(mode=0o700)
    shutil.copytree(ARTIFACT[0], folder / "cache" / ARTIFACT[0].name)
    (folder / "cache" / ARTIFACT[0].name / "record.json").write_bytes(data)
    with mock.patch.dict(os.environ, {"GNAFORGE_CACHE_DIR": str(folder / "cache")}):
        (summary,) = cache_report.summaries()
        to_prune(user_cache(), cache_report.is_stale, older_than=None, keep_bytes=None)
        rows = [inspecting._row(row, modelled=True) for row in inspecting._cached_rows()]
        inspecting._print_table(rows)
        inspecting._print_static(rows)
        cache_command.explain(OTHER.key, json=False)
        cache_command.explain(SMALL.key, json=True)
    if summary["kernels"]["count"] == 0:
        raise InputError("the artifact is of no use")
    return rows


ARTIFACT: list[Path] = []
OTHER = cpu_config(1, "fp32", (8,), (40,))


LIBRARY: list[Path] = []


def read_library_file(data: bytes, folder: Path) -> object:
    return platform_tag({"a": parse_elf(data, "a")})


def readers(folder: Path) -> dict[str, Reader]:
    """Every kind of file, with an input that was made as users make it."""
    from gnaforge.runtime.bench import REPORT_SCHEMA

    (artifact,) = build_kernels([SMALL])[0].values()
    export_artifacts([artifact], folder / "good.zip")
    wheel = build_wheel(Plan(library="good", configs=(SMALL,)), folder, rebuild="gnaforge wheel my.yaml")
    WHEEL_NAME[:] = [wheel.path.name]
    LIBRARY[:], ARTIFACT[:] = [artifact.folder / "kernel.so"], [artifact.folder]
    write_sources(SOURCES, folder)
    facts = ("key", "seconds", "library_bytes", "registers", "spill_bytes", "shared_memory", "code")
    code = {"instructions": 3000, "products": 32, "mufu": 130, "mufu_under_product": 64}
    gpu = {"registers": 168, "spill_bytes": 8, "shared_memory": 4096, "code": code}  # what kernels for GPUs have
    built = {"kernels": [{name: {**artifact.record, **gpu}.get(name) for name in facts}]}
    return {
        "specs": Reader(SPEC, spoil_text, read_spec),
        "archives": Reader((folder / "good.zip").read_bytes(), spoil_zip, read_archive),
        "wheels": Reader(wheel.path.read_bytes(), spoil_zip, read_wheel),
        "libraries": Reader((artifact.folder / "kernel.so").read_bytes(), spoil_elf, read_library_file),
        "reports": Reader(json.dumps(bench_report(REPORT_SCHEMA)).encode(), spoil_json, read_bench_report),
        "problem lists": Reader(json.dumps(PROBLEM_LIST).encode(), spoil_json, read_problem_list),
        "manifests": Reader((folder / "okay" / "src" / "manifest.json").read_bytes(), spoil_json, read_manifest),
        "build records": Reader(json.dumps(built).encode(), spoil_json, read_build_record),
        "cache records": Reader((artifact.folder / "record.json").read_bytes(), spoil_json, read_cache_record),
    }


PROBLEM_LIST = [
    Problem((8, 8), (3, 3), (2, 1), heads=2, kv_heads=1, head_dim=64, dtype="bf16").as_json(),
    {"tokens": [30, 48], "window": 9, "kernel": SMALL.key},
]


def bench_report(schema: int) -> dict[str, Any]:
    """A report of two problems, as `gnaforge bench --report` writes it."""
    timing = {"seconds": 1.5e-3, "useful_gflops": 10.0, "difference": 1e-6, "rounds": 3}
    problem = Problem((8, 8), (3, 3), (2, 1), heads=2, kv_heads=1, head_dim=64, dtype="bf16").as_json()
    row = {
        "problem": problem,
        "kernel": "gna_forward-sm90-r2-bf16-d64-q8x8-kv8x8",
        "notes": {"flex": "not installed"},
        "flop_bound": 2.0,
        "work_bound": 1.5,
        "timings": [{"contender": name, **timing} for name in ("gnaforge", "sdpa")],
    }
    failed = {"problem": problem, "error": "RuntimeError: no memory"}
    machine = {"device": "cuda", "matmul_gflops": 100.0, "processors": 132}
    return {"schema": schema, "complete": True, "machine": machine, "kernels": [], "problems": [row, failed]}


def try_input(reader: Reader, data: bytes, folder: Path, one_line: bool) -> str:
    """What reading ``data`` came to: ``accepted``, ``refused``, or what is wrong with that."""
    out = io.StringIO()
    begin = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            reader.read(data, folder)
        came = "accepted"
    except GnaforgeError as error:
        came = "refused"
        text = printable(error, lines=True)
        if one_line and "\n" in text:
            return f"an error of several lines: {text!r}"
        if len(text) > 20_000:
            return f"an error of {len(text)} characters"
    except MemoryError:
        return "takes too much memory"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    took = time.process_time() - begin
    if took > SECONDS:
        return f"takes {took:.0f} s"
    said = out.getvalue()
    return came if printable(said, lines=True) == said else f"prints {ascii(said)[:200]}"


def survey(name: str, reader: Reader, folder: Path, inputs: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Reads the good input and spoiled ones, in this process with a bound on its memory.

    Returns:
        How many were accepted and refused, and the first ten for which neither holds: seed and what was wrong.
    """
    counts: Counter[str] = Counter()
    wrong = []
    good = try_input(reader, reader.data, folder, True)
    assert good == "accepted", f"{name}: {good}"
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        for number in range(inputs):
            random = Random(f"{name} {seed} {number}")
            found = try_input(reader, reader.spoil(reader.data, random), folder, name != "specs")
            counts[found if found in ("accepted", "refused") else "wrong"] += 1
            if counts["wrong"] and found not in ("accepted", "refused"):
                wrong.append(f"{name} {seed} {number}: {found}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return counts, wrong[:10]
