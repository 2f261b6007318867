"""Files that are damaged or made to do harm: one clear error within bounds of memory and time, or the right answer."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gnaforge.build_tools import limits
from gnaforge.build_tools.cache import Cache
from gnaforge.build_tools.cache_archive import import_artifacts
from gnaforge.build_tools.elf import parse_elf
from gnaforge.build_tools.text import printable
from gnaforge.errors import InputError
from gnaforge.runtime import problem_file
from gnaforge.runtime.bench import REPORT_SCHEMA
from gnaforge.wheel.check import check
from hostile import NASTY, RAW, Reader, bench_report, readers, survey, try_input

READERS = (
    "specs",
    "archives",
    "wheels",
    "libraries",
    "reports",
    "problem lists",
    "manifests",
    "build records",
    "cache records",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", READERS)
def test_some_spoiled_inputs(good: dict[str, Reader], tmp_path: Path, name: str) -> None:
    _, wrong = survey(name, good[name], tmp_path, 40, seed=1)
    assert not wrong


@pytest.mark.survey
@pytest.mark.parametrize("name", READERS)
def test_many_spoiled_inputs(good: dict[str, Reader], tmp_path: Path, name: str, capsys) -> None:
    counts, wrong = survey(name, good[name], tmp_path, 2000)
    with capsys.disabled():
        print(f"\n{name}: {dict(sorted(counts.items()))}")
    assert not wrong
    assert min(counts["accepted"], counts["refused"]) >= 20  # else it tries too little of the one or the other


@pytest.mark.parametrize("name", ["reports", "problem lists", "manifests", "build records", "cache records"])
@pytest.mark.parametrize("data", RAW, ids=lambda data: repr(data[:12]))
def test_json_that_parsers_choke_on(good: dict[str, Reader], tmp_path: Path, name: str, data: bytes) -> None:
    assert try_input(good[name], data, tmp_path, True) == "refused"


@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value)[:20])
def test_a_nasty_value_in_any_place_of_a_report(good: dict[str, Reader], tmp_path: Path, value: object) -> None:
    def spoiled(node: Any) -> list[Any]:
        if isinstance(node, dict):
            return [{**node, key: bad} for key in node for bad in (value, *spoiled(node[key]))]
        if isinstance(node, list):
            return [[*node[:i], bad, *node[i + 1 :]] for i in range(len(node)) for bad in (value, *spoiled(node[i]))]
        return []

    for report in spoiled(bench_report(REPORT_SCHEMA)):
        came = try_input(good["reports"], json.dumps(report).encode(), tmp_path, True)
        assert came in ("accepted", "refused"), report


def test_what_terminals_obey_is_written_as_its_escape() -> None:
    assert printable("a\x1b[2J\x07\x9b\u202e\u2028\ud800\n\tÄ 😀") == (r"a\x1b[2J\x07\x9b\u202e\u2028\ud800\n\tÄ 😀")
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r" and printable("abcd", most=3) == "abc..."


def test_names_in_errors_are_cut(tmp_path: Path) -> None:
    """A file's name in an archive may have 65,535 bytes."""
    (tmp_path / WHEEL).write_bytes(zipped({"../" + "\x1b" * 20_000: b""}))
    with pytest.raises(InputError, match="which would be written outside its folder") as caught:
        check(tmp_path / WHEEL)
    assert len(str(caught.value)) < 2000


def test_every_command_prints_through_that_function() -> None:
    """Other ways to the terminal are the table's and the progress bars'."""
    import re

    import gnaforge.cli

    folder = Path(gnaforge.cli.__file__).parent
    found = {
        path.name
        for path in folder.glob("*.py")
        if re.search(r"(?<![\w.])print\(|\.echo\(|stdout\.write", path.read_text())
    }
    assert found == {"tables.py"}


def test_errors_and_tables_print_no_escapes(cli, tmp_path: Path) -> None:
    for arguments in (("check-wheel", "\x1b[2J.whl"), ("cache", "import", "\x1b[2J.zip"), ("list", "\x1b[2J.so")):
        done = cli(*arguments)
        assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr and r"\x1b[2J" in done.stderr
    report = bench_report(REPORT_SCHEMA)
    report["problems"][0]["timings"][1]["contender"] = "[red]x[/nope]"
    report["problems"][1]["error"] = "\x1b]0;owned\x07"
    (tmp_path / "r.json").write_text(json.dumps(report))
    done = cli("bench", "--from", "r.json")
    assert "[red]x[/nope]" in done.stdout and r"\x1b]0;owned\x07" in done.stderr and "\x1b" not in done.stderr


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


WHEEL = "gnaforge_evil-1.0-py3-none-manylinux_2_27_x86_64.whl"
FOLDER = "gna_forward-cpu-r1-fp32-dany-q64-kv64-" + "ab" * 8


def lying(size: int, method: int, packed: bytes) -> bytes:
    """An archive with a file that says it has ``size`` bytes, whatever its ``packed`` bytes unpack to."""
    data = bytearray(zipped({"x.bin": packed}, zipfile.ZIP_STORED))
    directory = data.rfind(b"PK\1\2")
    for at, field in ((0, 8), (directory, 10)):
        struct.pack_into("<H", data, at + field, method)
    struct.pack_into("<I", data, 22, size)
    struct.pack_into("<I", data, directory + 24, size)
    return bytes(data)


def bomb(unpacked: int) -> bytes:
    return zipped({f"{FOLDER}/record.json": bytes(unpacked)})


def many_names(count: int) -> bytes:
    """A list of so many files, in little more bytes than it has: what a reader makes of it is many times that."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    entries = b"".join(entry + b"%08d" % i for i in range(count))
    return entries + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), 0, 0)


OTHER_METHOD = "in a way that gnaforge doesn't write"
BAD_ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bomb": (lambda: bomb(150 << 20), "unpacks to 157,286,400 bytes"),
    "bz2 that says 10 bytes": (
        lambda: lying(10, 12, bz2.compress(bytes(1 << 20))),
        "in a way that gnaforge doesn't write",
    ),
    "LZMA": (lambda: zipped({"a": b"x"}, zipfile.ZIP_LZMA), OTHER_METHOD),
    "a long list": (lambda: many_names(400_000), "its list of files has more than 16 MiB"),
    "a list that lies": (lambda: many_names(10)[:-8] + b"\xff" * 8, "or a damaged one"),
    "empty": (lambda: b"", "or a damaged one"),
    "a size that lies": (
        lambda: lying(10, 0, b"x" * 1000),
        "or a damaged one|not made by gnaforge|no artifact",
    ),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_archives_that_cost_too_much(tmp_path: Path, case: str) -> None:
    make, expected = BAD_ARCHIVES[case]
    for name in (WHEEL, "a.zip"):
        (tmp_path / name).write_bytes(make())
    with pytest.raises(InputError, match=expected):
        check(tmp_path / WHEEL)
    with pytest.raises(InputError, match=expected):
        import_artifacts(tmp_path / "a.zip", Cache(tmp_path / "cache"))


def test_an_artifact_of_too_many_bytes_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnaforge.build_tools.cache_archive.ARTIFACT_BYTES", 1000)
    name, _, digest = FOLDER.rpartition("-")
    data = os.urandom(1001)
    record = {"schema": 1, "digest": digest * 4, "key": name, "files": {"a": hashlib.sha256(data).hexdigest()}}
    files = {"record.json": json.dumps(record).encode(), "a": data}
    (tmp_path / "a.zip").write_bytes(zipped({f"{FOLDER}/{file}": content for file, content in files.items()}))
    (tmp_path / "source" / FOLDER).mkdir(parents=True, mode=0o700)
    for file, content in files.items():
        (tmp_path / "source" / FOLDER / file).write_bytes(content)
    for source in ("a.zip", "source"):
        (tmp_path / source).chmod(0o700)
        with pytest.raises(InputError, match="has more than 1,000 bytes"):
            import_artifacts(tmp_path / source, Cache(tmp_path / "cache"))
    os.truncate(tmp_path / "source" / FOLDER / "a", 1 << 40)  # a sparse file, of which little is read
    with pytest.raises(InputError, match="has more than 1,000 bytes"):
        import_artifacts(tmp_path / "source", Cache(tmp_path / "cache"))


_HEADER, _SECTION = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ")


def elf(strings: bytes, versions: bytes = b"", symbols: bytes = b"") -> bytes:
    """A library with these tables: names, versions that it needs, and dynamic symbols."""
    tables = ((3, strings, 0), (0x6FFFFFFE, versions, 1), (11, symbols, 1))
    offset = _HEADER.size + _SECTION.size * (1 + len(tables))
    sections, content = [bytes(_SECTION.size)], b""
    for kind, data, link in tables:
        sections.append(_SECTION.pack(0, kind, 0, 0, offset + len(content), len(data), link, 0, 0, 0))
        content += data
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = _HEADER.pack(ident, 3, 62, 1, 0, 0, _HEADER.size, 0, 64, 0, 0, _SECTION.size, len(sections), 0)
    return header + b"".join(sections) + content


def symbol(name: int) -> bytes:
    return struct.pack("<IBBHQQ", name, 0x10, 0, 0, 0, 0)


BAD_LIBRARIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "versions of versions": (
        lambda: elf(
            b"\0a\0",
            b"".join(struct.pack("<HHIII", 1, 0xFFFF, 1, (20_000 - i) * 16, 16) for i in range(20_000)) + bytes(80),
        ),
        "more than 32,768 symbol versions",
    ),
    "versions in a circle": (lambda: elf(b"\0a\0", struct.pack("<HHIII", 1, 0xFFFF, 1, 0, 0)), "symbol versions"),
    "one long name": (lambda: elf(b"a" * 1_000_000, symbols=symbol(1)), "a name without an end in its first 65,536"),
    "long names": (
        lambda: elf(b"\0" + b"a" * 60_000 + b"\0", symbols=b"".join(symbol(1 + i) for i in range(20_000))),
        "more than 67,108,864 bytes of names",
    ),
    "many symbols": (lambda: elf(b"\0a\0", symbols=bytes(24 * 300_000)), "a table of more than 262,144 entries"),
    "no table": (lambda: elf(b"")[:100], "truncated|unpack_from"),
}


@pytest.mark.parametrize("case", BAD_LIBRARIES)
def test_libraries_that_cost_too_much(case: str) -> None:
    make, expected = BAD_LIBRARIES[case]
    with pytest.raises(InputError, match=expected):
        parse_elf(make(), "a.so")


@pytest.mark.parametrize("arguments", [("generate", "p.yaml"), ("check-wheel", WHEEL), ("cache", "import", "p.zip")])
def test_pipes_are_refused_and_not_waited_for(cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / arguments[-1])
    done = cli(*arguments)
    assert done.returncode == 2 and "not a regular file" in done.stderr


def test_lists_of_problems_are_bounded(python, tmp_path: Path) -> None:
    from gnaforge.runtime.problem_file import MOST_PROBLEMS, read_problems

    file = tmp_path / "p.json"
    one = {"tokens": [8], "window": 3}

    def refusal(data: str) -> str:
        file.write_text(data)
        with pytest.raises(ValueError) as caught:
            read_problems(file)
        return str(caught.value)

    assert refusal(json.dumps([one] * (MOST_PROBLEMS + 1))) == "1,001 problems; at most 1,000"
    assert refusal(json.dumps([{**one, "heads": 10**9}])) == "a number beyond 1,048,576"
    assert refusal(json.dumps([{**one, "\x1b[2J": 1}])) == r"\x1b[2J: is no field of a problem"
    assert refusal(json.dumps([{**one, "kernel": "x" * 10_000}])).endswith("...")
    assert refusal(" " * (8 << 20) + "[]") == "more than 8,388,608 bytes"
    file.unlink()
    os.mkfifo(file)
    command = "from gnaforge.runtime.bench import main; main(['--problems', 'p.json'])"
    done = python(command)
    assert done.returncode == 2 and done.stderr.endswith("error: --problems: not a regular file\n")
    file.unlink()
    file.write_text(json.dumps([{**one, "heads": 2, "kernel": "gna_forward-cpu-r1-fp32-dany-q8-kv8"}, one]))
    (first, second) = read_problems(file)
    assert first[0].heads == 2 and first[1] == "gna_forward-cpu-r1-fp32-dany-q8-kv8" and second[1] is None


def test_json_within_bounds() -> None:
    assert limits.parse_json(b'{"a": [1, 2.5, "\\ud83d\\ude00"]}', 100) == {"a": [1, 2.5, "😀"]}
    with pytest.raises(ValueError, match="more than 3 bytes"):
        limits.parse_json(b"[1]]", 3)


def test_the_documented_bounds_are_those_in_force() -> None:
    """The table in build_tools/README.md names each bound with its value."""
    import gnaforge.build_tools
    from gnaforge.bench import report_file

    assert problem_file.MOST_BYTES == limits.REPORT_BYTES and problem_file._DIGITS == limits.INTEGER_DIGITS
    assert problem_file.MOST_PROBLEMS == report_file.MAX_PROBLEMS and problem_file.MOST_EXTENT == report_file.MAX_EXTENT
    text = (Path(gnaforge.build_tools.__file__).parent / "README.md").read_text()
    for value in (
        f"{limits.RECORD_BYTES >> 20} MiB",
        f"{limits.REPORT_BYTES >> 20} MiB",
        f"{limits.LIBRARY_BYTES >> 30} GiB",
        f"{limits.ARTIFACT_BYTES >> 20} MiB",
        f"{limits.UNPACKED_BYTES >> 30} GiB",
        f"{limits.UNPACKED_RATIO} times",
        f"{limits.DIRECTORY_BYTES >> 20} MiB",
        f"{limits.SYMBOLS:,}",
        f"{limits.VERSIONS:,}",
        f"{limits.INTEGER_DIGITS} digits",
        f"{problem_file.MOST_PROBLEMS:,} problems, numbers up to {problem_file.MOST_EXTENT:,}",
    ):
        assert value in text.partition("## Bounds")[2].partition("\n## ")[0], value
