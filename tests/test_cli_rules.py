"""Rules for every command, found in typer's own registry: help, closed pipes, full disks, exit statuses."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gnaforge.build.kernels import build_kernels
from gnaforge.build_tools.cache_archive import export_artifacts
from gnaforge.cli import READER_GONE, app
from gnaforge.cli.help import split_examples
from gnaforge.errors import InputError
from gnaforge.plan import Plan
from gnaforge.wheel.build import build_wheel
from kernel_set import SMALL
from typer.main import get_command
from typer.testing import CliRunner

SHAPE = ("--tokens", "12", "--window", "5")
ANSWERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("quickstart",): ("--plot", "q.png"),
    ("build",): (SMALL.key,),
    ("wheel",): (SMALL.key,),
    ("check-wheel",): ("WHEEL",),
    ("export",): ("--hf", SMALL.key, "--name", "gnaforge-tests-of-export"),  # whose core test_export.py has compiled
    ("generate",): (SMALL.key,),
    ("list",): ("vit-56",),
    ("presets",): (),
    ("doctor",): (),
    ("simulate",): SHAPE,
    ("verify",): (SMALL.key, *SHAPE),
    ("bench",): (*SHAPE, "--seconds", "0.1", "--against", "sdpa"),
    ("schema",): (),
    ("cache", "info"): (),
    ("cache", "clear"): ("--dry-run",),
    ("cache", "prune"): ("--dry-run",),
    ("cache", "explain"): (SMALL.key,),
    ("cache", "export"): ("kernels.zip",),
    ("cache", "import"): ("ARCHIVE",),
}
"""Arguments with which each command says something."""


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, by what the user writes."""
    command = command or get_command(app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


EVERY = dict(commands())
LEAVES = [path for path, command in EVERY.items() if not hasattr(command, "commands")]


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from gnaforge.cli import main; main()", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_the_tables_of_this_file_name_every_command() -> None:
    assert sorted(ANSWERS) == sorted(LEAVES)


@pytest.mark.parametrize("width", [60, 79, 100, 200])
@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_wraps(path: tuple[str, ...], width: int) -> None:
    """No line is too long, none ends before the next word would be too much, and nothing is cut."""
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(width)})
    assert done.exit_code == 0 and "…" not in done.output and "[/" not in done.output
    width = min(width, 100)
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= width
    for line, following in pairwise(lines[: lines.index("Examples:")]):  # examples end where their commands do
        words = following.split()
        begins_anew = not line.strip() or not words or line.endswith(":") or re.match(r"\s+(-|[a-z-]+  )", following)
        alone = re.fullmatch(r"  \S.*", line) and re.match(r" {10}", following)  # a long name above its text
        if not begins_anew and not alone:
            assert len(line) + 1 + len(words[0]) > width, (line, following)
    for parameter in EVERY[path].params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert not name.startswith("-") or re.search(rf"(?<![\w-]){name}(?![\w-])", done.output), name
    for inner in getattr(EVERY[path], "commands", {}):
        assert f"  {inner} " in done.output


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_shows_two_examples_that_parse(path: tuple[str, ...]) -> None:
    _, examples = split_examples(EVERY[path].help)
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "100"}).output.partition("\nExamples:\n")[2]
    assert len(examples) >= 2
    for line, what in examples:
        assert line in shown and what in " ".join(shown.split())
        program, *words = shlex.split(line)
        assert program == "gnaforge" and tuple(words[: len(path)]) == path
        command: Any = EVERY[()]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("example", words)  # raises if an option or an argument is none of the command's


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_says_what_a_command_is_for(path: tuple[str, ...]) -> None:
    lines = CliRunner().invoke(app, [*path, "--help"]).output.splitlines()
    assert lines[0].startswith("Usage: ") and len(lines[2].split()) > 4


def test_without_arguments_a_group_prints_its_help(cli) -> None:
    for path in ((), ("cache",)):
        assert cli(*path).stdout == cli(*path, "--help").stdout.removesuffix("\n") != ""


def takes_a_float(option: Any) -> bool:
    return "float" in str(option.type_descriptor if hasattr(option, "type_descriptor") else option.type).lower()


NUMBERS = [(path, option) for path in LEAVES for option in EVERY[path].params if takes_a_float(option)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300"])
@pytest.mark.parametrize(("path", "option"), NUMBERS, ids=lambda x: " ".join(x) if isinstance(x, tuple) else x.name)
def test_numbers_without_end_are_refused(path: tuple[str, ...], option: Any, value: str) -> None:
    """Before anything is done: no clock counts so far, no time is modelled with them, and JSON has none of them."""
    done = CliRunner().invoke(app, [*path, *ANSWERS[path], option.opts[0], value])
    said = done.output if done.exit_code == 2 else str(done.exception)
    assert done.exit_code == 2 or isinstance(done.exception, InputError), said
    assert option.opts[0].lstrip("-") in said


@pytest.mark.parametrize("option", ["--seed", "--data-seed", "--seeds", "--random"])
def test_counts_and_seeds_without_end_are_refused(option: str) -> None:
    done = CliRunner().invoke(app, ["verify", SMALL.key, option, str(10**20)])
    assert done.exit_code == 2 and option in done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> dict[str, str]:
    """Paths of a wheel and of an archive of the cache, by what stands for them in `ANSWERS`."""
    folder = tmp_path_factory.mktemp("made")
    (artifact,) = build_kernels([SMALL])[0].values()
    export_artifacts([artifact], folder / "kernels.zip")
    wheel = build_wheel(Plan(library="good", configs=(SMALL,)), folder, rebuild="gnaforge wheel my.yaml")
    return {"WHEEL": str(wheel.path), "ARCHIVE": str(folder / "kernels.zip")}


@pytest.fixture
def nobody() -> Iterator[int]:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_reader_that_has_gone_ends_a_command_quietly(
    path: tuple[str, ...], made: dict[str, str], nobody: int, tmp_path: Path
) -> None:
    process = start(*path, *(made.get(word, word) for word in ANSWERS[path]), stdout=nobody, cwd=tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == READER_GONE, said
    assert not re.search(r"Traceback|BrokenPipe|Exception ignored|Errno|error", said), said


@pytest.mark.parametrize(
    "arguments",
    [
        *[(), ("--help",), ("verify", "--help"), ("cache", "--help"), ("--version",), ("nonsense",)],
        *[("build", "missing.yaml"), ("generate", SMALL.key, "--check"), ("build", SMALL.key, "--jobs", "0")],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_help_and_errors_to_a_reader_that_has_gone(arguments: tuple[str, ...], nobody: int, tmp_path: Path) -> None:
    """As with ``2>&1 | true``: nothing can be said, and nothing but the exit status tells."""
    code = "from gnaforge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=nobody, stderr=nobody, cwd=tmp_path)
    assert done.returncode == READER_GONE


def test_a_reader_of_one_line(cli, tmp_path: Path) -> None:
    assert cli("build", SMALL.key).returncode == 0
    process = start("list", "hunyuan-video", "--json", stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "[\n"
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().splitlines()
    assert all(line.startswith("gnaforge: fitting tiles") for line in said), said  # which a busy machine takes long for


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [("schema",), ("list", "vit-56"), ("--help",)], ids=" ".join)
def test_a_full_disk_is_said_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(*arguments, stdout=full, cwd=tmp_path)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert said == "error: can't write the output: No space left on device\n"


def test_a_closed_output_is_no_error(tmp_path: Path) -> None:
    process = start("schema", preexec_fn=lambda: os.close(1), cwd=tmp_path)
    assert process.communicate(timeout=300)[1] == "" and process.returncode == 0


def test_the_package_runs_as_a_program(python, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gnaforge", "list", "nonsense"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no preset 'nonsense'")


def test_ctrl_c_ends_a_build_and_its_compilers(fake_cxx, own_cache: Path, tmp_path: Path) -> None:
    compiler = fake_cxx(seconds=47.11)
    # What runs in a shell's background has SIGINT ignored, and so would the build.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start("build", SMALL.key, env={**os.environ, "CXX": f"'{compiler}'"}, cwd=tmp_path, **heeds)
    begun = time.monotonic()
    while not compiler.with_name("compiled").exists():
        assert process.poll() is None and time.monotonic() < begun + 60
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in said
    sleeping = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 47.11" not in sleeping
    assert not list(own_cache.glob(".build-*"))


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (0, ("schema",)),
        (0, ("--version",)),
        (0, ("cache", "info")),
        (1, ("generate", SMALL.key, "--check")),
        (1, ("doctor",)),
        (2, ()),
        (2, ("cache",)),
        (2, ("build", "missing.yaml")),
        (2, ("build",)),
        (2, ("nonsense",)),
        (2, ("verify", "missing.yaml")),
        (2, ("check-wheel", "missing.whl")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_exit_statuses(cli, status: int, arguments: tuple[str, ...]) -> None:
    """As `gnaforge --help` documents them; 3 of check-wheel is in test_wheel.py."""
    assert cli(*arguments, CXX="no-such-compiler").returncode == status


def test_every_exit_status_is_documented() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"}).output.partition("Exit status:")[2]
    assert set(re.findall(r"\b\d+\b", text)) == {"0", "1", "2", "130", str(READER_GONE)}
