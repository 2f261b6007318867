"""The first minutes on a GPU, rehearsed: every section in the emulator, and what each leaves of the rest when something
hangs, dies, or is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
from kernel_set import SMALL
from sm90_backward_kernels import KV_KEYS, Q_KEYS
from sm90_kernels import KEYS

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import first
import first_report
import measure
from first_plan import plan_of_hardware, plan_of_rehearsal
from prepare import build_device

GPU = Path(__file__).parent / "gpu"
BY_RANK = {1: KEYS[9], 2: KEYS[4], 3: KEYS[0]}
TOY = "gna_forward-cpu-r1-fp32-d8-q{}-kv8"
HANGS, DIES, NANS, FAILS = (TOY.format(q) for q in (8, 16, 24, 32))
Json = dict[str, Any]


@pytest.fixture(scope="module")
def devices(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """device.cu for the emulator, and for a GPU."""
    folder = tmp_path_factory.mktemp("device")
    found = {name: folder / f"{name}.so" for name in ("emulated", "real")}
    try:
        for name, path in found.items():
            build_device(path, emulated=name == "emulated")
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    return found


def run(*arguments: object, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """first.py, by a Python."""
    command = [python, str(GPU / "first.py"), *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OUT")}
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, timeout=900)


def lines_of(folder: Path) -> list[Json]:
    (path,) = folder.glob("first-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(lines: list[Json]) -> dict[str, str]:
    return {line["section"]: line["status"] for line in lines if line["kind"] == "end"}


def write_plan(folder: Path, plan: Json) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def sanitizer(folder: Path, errors: int) -> str:
    """A PATH with a compute-sanitizer that runs the command, and finds so many errors in it."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'test "$1 $3 $4" = "--tool --kernel-regex kns=gna_" || exit 9\n'
        'check=$2; shift 4; "$@"\n'
        f'if [ $check = racecheck ]; then echo "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"\n'
        f'else echo "ERROR SUMMARY: {errors} errors"; fi\n'
    )
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_all_sections_in_the_emulator(devices: dict[str, Path], tmp_path: Path) -> None:
    gradients = [Q_KEYS[2], KV_KEYS[-2]]
    libraries = find_libraries([KernelConfig.parse(key) for key in (*BY_RANK.values(), *gradients)], emulated=True)
    plan = write_plan(tmp_path, plan_of_rehearsal(BY_RANK, gradients))
    given = [f"--device={devices['emulated']}", f"--plan={plan}", *(f"--library={path}" for path in libraries.values())]
    slow = ["--seconds=1500", "--patience=20", "--job-seconds=300"]
    done = run(*given, *slow, f"--out={tmp_path / 'out'}", PATH=sanitizer(tmp_path, 0))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path / "out")
    assert statuses(lines) == dict.fromkeys(first.SECTIONS, "done")

    runs = [line for line in lines if line["kind"] == "run"]
    timed = [line for line in runs if "seconds" in line]
    assert {line["contender"] for line in timed} == {"gnaforge", "gnaforge dense", "flash dense"}
    assert {line["contender"] for line in runs if "unavailable" in line} == {"cudnn dense"}  # not on a CPU
    for line in timed:
        assert line["seconds"] > 0 and line["tflops"] > 0 and line["launches"] >= 1
        assert 0 < line.get("share", 0.5) < 1
        assert line["cycles"] is None  # the emulator counts none between launches
    assert {line["kernel"] for line in timed if "kernel" in line} == set(BY_RANK.values())
    right, backward, suite = (line["sections"] for line in lines if line["kind"] == "result" and "sections" in line)
    assert right["right"]["passed"] == 3 and backward["gradients"]["passed"] == 2
    assert suite["accuracy beside SDPA"]["passed"] == 1
    checks = {line["job"]["check"]: line for line in lines if line.get("job", {}).get("check")}
    assert checks.keys() == {"racecheck", "memcheck"} and all(line["shares"] == 2 for line in checks.values())
    told = [line for line in lines if line["kind"] == "ratios" and line["section"] == "models"]
    assert any("times as fast as its own dense run" in line for line in told)

    # What `gnaforge bench` reads.
    (report,) = (tmp_path / "out").glob("*.bench.json")
    read = subprocess.run(
        [sys.executable, "-m", "gnaforge", "bench", "--from", str(report), "--json"], capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    assert json.loads(report.read_text())["complete"]
    assert {row["contender"] for row in json.loads(read.stdout)} == {line["contender"] for line in timed}


def test_kernels_are_measured_with_the_standard_library_alone(devices: dict[str, Path], tmp_path: Path) -> None:
    """On a machine with a driver and nothing else."""
    key = BY_RANK[1]
    library = find_libraries([KernelConfig.parse(key)], emulated=True)[KernelConfig.parse(key)]
    plan = write_plan(tmp_path, plan_of_rehearsal({1: key}))
    given = [f"--device={devices['emulated']}", f"--plan={plan}", f"--library={library}", f"--out={tmp_path / 'out'}"]
    venv.create(tmp_path / "bare", symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = run(*given, "--patience=20", "--job-seconds=300", python=python, PATH=sanitizer(tmp_path, 0))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(tmp_path / "out")
    found = statuses(lines)
    for name in ("gradients", "suite"):
        assert found.pop(name) == "skipped: No module named 'torch'"
    assert found.keys() < first.SECTIONS.keys() and set(found.values()) == {"done"}
    (right,) = (line for line in lines if line["kind"] == "result" and line["section"] == "right")
    assert right["job"]["kernel"] == key and 0 < right["share"] < 1 and "1 of 1 passed" in done.stdout
    timed = [line for line in lines if line["kind"] == "run" and line["contender"].startswith("gnaforge")]
    assert timed and all("seconds" in line for line in timed)


def test_what_hangs_dies_or_is_wrong_leaves_the_rest(
    devices: dict[str, Path], small_kernel: Path, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """One of each in front of a good kernel, in a section of its own."""
    behaviour = {
        HANGS: {"TOY_STATEMENT": "for (volatile int i = 0;;) i = i + 1"},
        DIES: {"TOY_STATEMENT": "std::abort()"},
        NANS: {"TOY_VALUE": "(0.0f/0.0f)"},
        FAILS: {"TOY_STATEMENT": "return GNAFORGE_FAILED"},
    }
    libraries = [toy(f"first_{n}", TOY_KEY=f'"{key}"', **how) for n, (key, how) in enumerate(behaviour.items())]
    plan = plan_of_rehearsal({1: SMALL.key})
    for section, keys in {"dense": [HANGS], "boxes": [DIES, FAILS], "models": [NANS]}.items():
        for key in keys:
            bad, good = plan_of_rehearsal({1: key})[section], plan[section]
            for run_of_good in good["runs"]:
                run_of_good["row"] += len(bad["rows"])
            for row in bad["rows"]:
                row["label"] += f" by {key}"
            plan[section] = {name: [*bad[name], *good[name]] for name in ("rows", "runs")}
    plan["sanitizer"] = plan_of_rehearsal({1: NANS})["sanitizer"]
    given = [f"--device={devices['emulated']}", f"--plan={write_plan(tmp_path, plan)}"]
    given += [f"--library={path}" for path in (small_kernel, *libraries)]
    done = run(*given, "--job-seconds=3", f"--out={tmp_path / 'out'}", PATH=sanitizer(tmp_path, 7))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = lines_of(tmp_path / "out")
    skipped = dict.fromkeys(("gradients", "suite"), "skipped: torch can't use this GPU")
    assert statuses(lines) == {**dict.fromkeys(first.SECTIONS, "done"), **skipped}
    runs = [line for line in lines if line["kind"] == "run" and line["contender"].startswith("gnaforge")]
    said = {
        key: [line.get("message", line.get("skipped")) for line in runs if line["kernel"] == key] for key in behaviour
    }
    assert all("it hangs" in message for message in said[HANGS]) and len(said[HANGS]) == 2
    assert all("was ended by SIGABRT" in message for message in said[DIES])
    assert all(message.startswith("out: nan at batch entry 0, token 0") for message in said[NANS])
    assert all(line["seconds"] > 0 for line in runs if line["kernel"] == NANS)  # timed all the same
    assert [line["failed"] for line in runs if line["kernel"] == FAILS] == ["launch"] * 2
    good = [line for line in runs if line["kernel"] == SMALL.key]
    assert {line["section"] for line in good} == {"dense", "boxes", "models"}
    assert all(0 < line["share"] < 1 and "failed" not in line for line in good)
    failed = [line["job"]["check"] for line in lines if line["kind"] == "result" and "failed" in line]
    assert failed == ["racecheck", "memcheck"]  # the one for want of results, the other for errors
    assert done.stdout.count("FAILED") == sum("failed" in line for line in lines)
    assert f"{done.stdout.count('FAILED')} failed; results in" in done.stdout


def test_a_key_too_many_or_too_few_is_wrong(devices: dict[str, Path], small_kernel: Path, tmp_path: Path) -> None:
    """Of 60 that a query sees, and of 256."""
    runs = plan_of_rehearsal({1: SMALL.key})["models"]["runs"][:2]
    jobs: list[Json] = [{"do": "open", "key": SMALL.key, "library": str(small_kernel)}]
    for of_plan in runs:
        for end in (0, -1, 0):
            queries = [{**query, "end": [query["end"][0] + end]} for query in of_plan["queries"][:1]]
            jobs += [{"do": "check", "problem": of_plan["problem"], "queries": queries}, jobs[0]]  # which forgets
    (tmp_path / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    command = [
        sys.executable,
        str(GPU / "measure.py"),
        f"--device={devices['emulated']}",
        f"--jobs={tmp_path / 'jobs'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    checks = [answer for answer in answers if "device" not in answer]
    assert [answer.get("failed") for answer in checks] == [None, "wrong", None] * 2, done.stdout + done.stderr
    assert all("lse: " in answer["message"] or "out: " in answer["message"] for answer in (checks[1], checks[4]))


def test_a_kernel_is_given_up_after_two_processes(
    devices: dict[str, Path], toy: Callable[..., Path], tmp_path: Path
) -> None:
    library = toy("first_dies_always", TOY_KEY=f'"{DIES}"', TOY_STATEMENT="std::abort()")
    plan = write_plan(tmp_path, plan_of_rehearsal({1: DIES}))
    given = [f"--device={devices['emulated']}", f"--plan={plan}", f"--library={library}", f"--out={tmp_path / 'out'}"]
    done = run(*given, "--only=dense", "--only=models")
    lines = [line for line in lines_of(tmp_path / "out") if line["kind"] == "run" and "kernel" in line]
    assert done.returncode == 1
    assert ["failed" in line for line in lines] == [True, True, *[False] * (len(lines) - 2)]
    assert {line["skipped"] for line in lines[2:]} == {first._LOST_TWICE}


def test_a_section_ends_when_its_time_is_up(
    devices: dict[str, Path], small_kernel: Path, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """The run of then is cut off, the rest is said to be left out, and the next section has its own time."""
    library = toy("first_sleeps", "-include", "unistd.h", TOY_KEY=f'"{HANGS}"', TOY_STATEMENT="sleep(600)")
    plan = plan_of_rehearsal({1: SMALL.key})
    plan["dense"] = plan_of_rehearsal({1: HANGS})["dense"]
    given = [f"--device={devices['emulated']}", f"--plan={write_plan(tmp_path, plan)}", f"--out={tmp_path / 'out'}"]
    given += [f"--library={path}" for path in (small_kernel, library)]
    done = run(*given, "--only=dense", "--only=boxes", "--patience=0.2", "--job-seconds=500")
    lines = lines_of(tmp_path / "out")
    assert statuses(lines)["dense"] == "its time was up", done.stdout
    dense = [line for line in lines if line["kind"] == "run" and line["section"] == "dense"]
    assert "the section's time is up" in dense[0]["message"] and dense[-1]["skipped"] == first._UP
    boxes = [line for line in lines if line["kind"] == "run" and line["section"] == "boxes"]
    assert {line["kernel"] for line in boxes} == {SMALL.key} and "seconds" in boxes[0]


def test_bad_input_says_what_to_do(devices: dict[str, Path], small_kernel: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of_rehearsal({1: SMALL.key}))
    given = [f"--device={devices['real']}", f"--plan={plan}", f"--library={small_kernel}"]
    (tmp_path / "file").touch()
    (tmp_path / "empty.so").touch()
    for arguments, said in (
        ([*given, "--only=nonsense"], "invalid choice: 'nonsense' (choose from"),
        ([*given, f"--out={tmp_path / 'file' / 'out'}"], "Not a directory; --out names another folder"),
        ([*given, f"--plan={tmp_path / 'none'}"], "none: no such file; python tests/gpu/prepare.py makes it"),
        ([*given, f"--plan={tmp_path / 'empty.so'}"], "python tests/gpu/prepare.py makes it anew"),
        ([*given, f"--library={tmp_path / 'empty.so'}"], "is no shared library; python tests/gpu/prepare.py makes it"),
        ([*given, f"--out={tmp_path / 'none'}"], "no GPU can be used here"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert statuses(lines_of(tmp_path / "none")) == {"machine": "failed"}
    teaches = run("--help").stdout
    assert all(f"  {name}" in teaches for name in first.SECTIONS) and "python3 tests/gpu/first.py --out" in teaches


def test_what_is_planned_for_hardware_fits_a_card_and_the_time() -> None:
    """By the simulator's times, with as much again for all that is not timed."""
    plan = plan_of_hardware(sorted(KEYS), [*Q_KEYS, *KV_KEYS])
    assert plan["right"]["problems"] * len(plan["right"]["kernels"]) == 240
    assert sum(limit for limit, _ in first.SECTIONS.values()) <= 400
    for section in ("dense", "boxes", "models"):
        seconds = 0.0
        for run_of_plan in plan[section]["runs"]:
            row = plan[section]["rows"][run_of_plan["row"]]
            problem = Problem.from_json(run_of_plan["problem"])
            one = row["model_seconds"] * (row["model_speedup"] if run_of_plan["contender"] == "gnaforge dense" else 1)
            seconds += run_of_plan["pause"] + 4 * one + max(one, run_of_plan["seconds"])
            assert sum(role.bytes(problem) for role in (*FORWARD.inputs, *FORWARD.outputs)) < 10e9
            if run_of_plan["do"] == "time":
                config = KernelConfig.parse(run_of_plan["kernel"])
                assert for_kernel(problem, config) == problem and config.rank == problem.rank
        assert 2 * seconds < first.SECTIONS[section][0], section
    rows = {row["label"]: row for row in plan["models"]["rows"]}
    assert len(rows) == 12 and {row["group"] for row in rows.values()} == {"HunyuanVideo", "FLUX", "Wan", "StormScope"}
    assert rows["HunyuanVideo, stride 16x8x8"]["perfect"] and rows["FLUX, stride 16x16"]["perfect"]
    tiles = [run_of_plan["tiles"] for run_of_plan in plan["boxes"]["runs"]]
    assert all(one["interior"] == one["kv"] and one["q"] == 16 * 128 for one in tiles)
    assert [one["kv"] // one["q"] for one in tiles] == [128] * 4 + [4, 4, 1, 1]


def test_cycles_follow_from_both_counters() -> None:
    """The stamps are taken outside of the marks: 1.1 s beside 1 s of launches."""
    found = measure.clock_of(1.0, 1.1 * 1.7e9, 1.1e9, 100)
    assert found["mhz"] == pytest.approx(1700) and found["cycles"] == pytest.approx(1.7e7)
    assert measure.clock_of(1.0, 0, 0, 1) == {"cycles": None, "mhz": None}
    tiles = {
        "q": 2048,
        "kv": 2048 * 128,
        "tensor_cycles": 2048.0,
    }  # 16,384 tokens and 16 heads by 128 and 128: 15.5 Q tiles a processor
    assert first_report.tiles_of_busiest(tiles, 132) == 16 * 128
    run = {"flop": 2.2e12, "tiles": tiles}
    found = first_report.derived(run, {"seconds": 0.0036, "cycles": 2300.0 * 16 * 128}, 132)
    assert found["tflops"] == pytest.approx(611, abs=1) and found["cycles_per_tile"] == pytest.approx(2300)
    assert found["tensor_share"] == pytest.approx(2048 / 2300)
    assert found["cycles_per_q_tile"] == pytest.approx(2300 * 128)


def test_a_launch_that_the_host_decides_is_told() -> None:
    row = {"label": "short", "model_seconds": 2e-5}
    run_of_plan = {"contender": "gnaforge", "flop": 1e9}
    told = [
        first_report.tell_run(row, run_of_plan, {"seconds": 3e-5, "launches": 9, "host_seconds": host}, 132)
        for host in (None, 1e-5, 2.9e-5)
    ]
    assert ["the host takes" in line for line in told] == [False, False, True]


def test_ratios_are_of_rows_of_a_group() -> None:
    masked = {"group": "a", "label": "masked", "flop_bound": 10.0, "work_bound": 7.0, "model_speedup": 6.5}
    dense = {"group": "a", "label": "dense", "flop_bound": 1.0, "work_bound": 1.0, "model_speedup": 1.0}
    times = {"masked": {"gnaforge": 2.0, "gnaforge dense": 13.0}, "dense": {"gnaforge": 12.0, "cudnn dense": 14.0}}
    assert first_report.ratios(masked, [masked, dense], times) == {
        "times as fast as its own dense run": 6.5,
        "times as fast as dense of gnaforge": 6.0,
        "times as fast as dense of cuDNN": 7.0,
        "by its tiles": 7.0,
        "by the model": 6.5,
    }
    found = first_report.ratios(dense, [dense], times)
    assert found == {"times as fast as cudnn dense": pytest.approx(14 / 12)}
    assert first_report.ratios(masked, [masked, dense], {}) == {}
