"""The hardware suite: it keeps what it is told, survives what takes its processes along, and needs no gnaforge. That
kernels pass it is `test_sm90.py`'s matter."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import run as suite
from commands import output_of
from gnaforge.build.core import core_path
from gnaforge.build.kernels import find_libraries
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification import process
from kernel_set import SMALL, cpu_config

KEY = "gna_forward-sm90-r1-bf16-d8-q{}-kv16"
A, BAD, B, C = (KEY.format(q) for q in (64, 128, 192, 32))

WORKER = """
import json, sys, time
kernel = ""
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "open":
        kernel = job["key"]
    faults = job["do"] == "verify" and kernel == "{bad}"
    if faults and "{how}" == "hangs": time.sleep(60)
    if faults and "{how}" == "dies": sys.exit(3)
    failed = {{"failed": "launch", "message": "illegal address", "ended": True}} if faults else {{"device": "cuda"}}
    print(json.dumps(failed), flush=True)
    if faults: time.sleep(0.2); sys.exit(3)
"""


def suite_of(folder: Path, keys: tuple[str, ...] = (A, BAD, B, C), **options: Any) -> suite.Suite:
    how = {"timing": "eager", "order": "round-robin", "seed": 0}
    settings = argparse.Namespace(seconds=600, job_seconds=1.0, out=folder / "suite.json", **how)
    return suite.Suite(settings, dict.fromkeys(keys, folder / "none.so"), emulated=False)


@pytest.mark.parametrize(
    ("how", "said"),
    [("hangs", "hangs"), ("dies", "was ended with status 3"), ("faults", "illegal address")],
)
def test_a_kernel_that_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str) -> None:
    """It takes the blame twice, and is left out then. No other kernel does, and no worker lives on."""
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", WORKER.format(bad=BAD, how=how)])
    hardware_suite = suite_of(tmp_path)
    assert hardware_suite.start()["device"] and hardware_suite.worker is not None
    running = hardware_suite.worker._process
    job = {"section": "all", "do": "verify"}
    answer = hardware_suite.ask({**job, "kernel": BAD})
    assert answer["ended"] and said in answer["message"]
    assert running.poll() is not None and hardware_suite.worker is None
    hardware_suite.run(iter([{**job, "kernel": name} for name in (A, BAD, BAD, B, C)]))
    hardware_suite.drop()
    assert hardware_suite.deaths == {BAD: 2}
    found = hardware_suite.results["sections"]["all"]
    assert (found["passed"], found["failed"]) == (3, 1)
    assert found["skipped"] == {"this kernel hung or faulted before": 1}
    (failure,) = json.loads((tmp_path / "suite.json").read_text())["failures"]
    assert failure["job"] == {**job, "kernel": BAD} and said in failure["message"]


def test_an_error_of_the_harness_is_no_kernels(tmp_path: Path, small_kernel: Path) -> None:
    """The worker goes on, the kernel isn't blamed, and the results say what broke."""
    hardware_suite = suite_of(tmp_path, (SMALL.key,))
    hardware_suite.libraries = {SMALL.key: small_kernel}
    hardware_suite.options.job_seconds = 60
    broken = hardware_suite.ask({"section": "all", "do": "verify", "kernel": SMALL.key, "problem": {"tokens": [9]}})
    assert broken["failed"] == "harness" and "Traceback" in broken["message"] and "window: is req" in broken["message"]
    fine = suite._verify("all", SMALL.key, Problem(40, 9), "gapped")
    assert hardware_suite.ask(fine)["runs"] == 1 and not hardware_suite.deaths
    hardware_suite.drop()


def test_what_a_worker_prints(tmp_path: Path, toy: Any) -> None:
    """Replies and nothing else, whatever kernels print; and it reads jobs from a file, as the sanitizer's do."""
    key = "gna_forward-cpu-r1-fp32-d8-q8-kv8"
    statement = 'std::puts("of C"); std::fflush(stdout); std::system("echo of a child")'
    library = toy("suite_prints", TOY_KEY=f'"{key}"', TOY_STATEMENT=statement.replace('\\"', '"'))
    fields = {"problem": Problem(20, 5, head_dim=8, dtype="fp32").as_json(), "schedule": None, "layout": "packed"}
    jobs = [{"do": "open", "library": str(library), "key": key}, {"do": "verify", "seed": 0, **fields}, {"do": "ready"}]
    (tmp_path / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    done = subprocess.run([*process.COMMAND, "--jobs", str(tmp_path / "jobs")], capture_output=True, text=True)
    opened, wrong, ready = map(json.loads, done.stdout.splitlines())
    assert opened["device"] == "cpu" and wrong["failed"] == "wrong" and ready.keys() == {"seconds"}
    assert done.stderr.splitlines().count("of C") == done.stderr.splitlines().count("of a child") == 1


def test_a_gpu_that_is_lost_ends_its_worker(tmp_path: Path) -> None:
    """Any further job of the process would fail, whosever kernel it is for."""
    code = """
import sys
sys.argv = ["worker.py", "--jobs=jobs"]
from gnaforge.verification import worker
from gnaforge.verification.checks import Failure
def fail(*_):
    raise Failure("launch", "illegal address")
worker.Server.verify = fail
worker.gpu_lives = lambda: False
worker.main()
"""
    (tmp_path / "jobs").write_text('{"do": "verify"}\n{"do": "ready"}\n')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 3 and answer.pop("seconds") >= 0
    assert answer == {"failed": "launch", "message": "illegal address", "ended": True}


def test_operators_run_with_the_core_that_was_carried(kernel_set: None, tmp_path: Path) -> None:
    """As on a machine without a compile cache: only that file is there."""
    config = cpu_config(2, "bf16", (8, 8), (8, 8))
    library = shutil.copy(find_libraries([config])[config], tmp_path)
    core = shutil.copy(core_path(), tmp_path / "core.so")
    with process.Worker(Path(core), GNAFORGE_CACHE_DIR="/nonexistent") as worker:
        assert worker.open(60, Path(library), config.key)["device"] == "cpu"
        found = worker.request(120, do="operator", kind="result")
        assert all(0 < share < 1 for share in found["shares"].values()), found
        assert worker.request(60, do="operator", kind="graph")["skipped"] == "needs a GPU"


def test_a_machine_with_torch_and_numpy_is_enough(kernel_set: None, tmp_path: Path) -> None:
    """The checkout, a library, and no gnaforge: its packages for building, specs and the command line are missing."""
    packages = tmp_path / "packages"
    packages.mkdir()
    import filelock
    import numpy

    names = ["torchgen", "functorch", "typing_extensions.py", "sympy", "mpmath", "networkx", "fsspec", "filelock"]
    folders = {Path(module.__file__).parents[1] for module in (torch, numpy, filelock) if module.__file__}
    for name in ("torch", "numpy", "numpy.libs", *names):
        for folder in folders:
            if (folder / name).exists() and not (packages / name).exists():
                (packages / name).symlink_to(folder / name)
    config = cpu_config(2, "bf16", (8, 8), (8, 8))
    library = find_libraries([config])[config]
    sections = ("first runs", "random problems", "accuracy beside SDPA", "large tensors")
    arguments = [f"--library={library}", "--problems=3", f"--out={tmp_path / 'suite.json'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    # Without site there are neither packages of this environment nor its gnaforge.
    bare = [sys.executable, "-S", str(Path(suite.__file__)), *arguments, *(f"--only={name}" for name in sections)]
    done = subprocess.run(
        bare,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(packages), "GNAFORGE_CACHE_DIR": "/nonexistent"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "suite.json").read_text())
    assert found["failures"] == [] and set(found["sections"]) == set(sections)
    assert found["sections"]["random problems"]["passed"] == 3 and found["machine"]["kernels"] == [config.key]
    largest = found["sections"]["large tensors"]["largest"]
    assert set(largest) == {"out", "lse"} and all(0 < share < 1 for share in largest.values())


def test_the_sanitizer_sees_each_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "ERROR SUMMARY: cache off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hardware_suite = suite_of(tmp_path)
    hardware_suite.sanitize([A])
    found = hardware_suite.results["sanitizer"]
    assert found["memcheck"]["summary"] == ["ERROR SUMMARY: cache off: 1"]
    opened, *problems = map(json.loads, (tmp_path / "suite.jobs").read_text().splitlines())
    assert opened["key"] == A and [job["do"] for job in problems] == ["verify"] * 2


def test_jobs_are_for_all_kernels_and_devices() -> None:
    """Each kernel has a first run, poisoned and repeated; large ones are for hardware."""
    keys = [A, "gna_forward-sm90-r2-bf16-d128-q8x16-kv8x16", "gna_forward-sm90-r3-fp16-d72v40-q2x8x8-kv2x4x8"]
    keys.append("gna_backward_kv-sm90-r2-bf16-d128-q8x8-kv8x16")
    for large in (False, True):
        jobs = list(suite.jobs_of(keys, 12, large, 5))
        sections = {job["section"] for job in jobs}
        assert sections >= {"first runs", "operators", "random problems", "large tensors"}
        assert ("repeats" in sections) == large
        gradients = {job["section"] for job in jobs if "backward" in job["kernel"]}
        assert gradients == {"first runs", "random problems", *(["repeats"] if large else [])}
        for job in jobs:
            assert json.loads(json.dumps(job))["kernel"] in keys
            if "problem" in job:
                problem, config = (
                    Problem.from_json(json.loads(json.dumps(job["problem"]))),
                    KernelConfig.parse(job["kernel"]),
                )
                assert (problem.rank, problem.dtype, problem.head_dim) == (config.rank, config.dtype, config.head_dim)
        first = [job for job in jobs if job["section"] == "first runs"]
        assert [job["kernel"] for job in first] == keys and all(job["poison"] and job["repeats"] for job in first)
        (widest,) = {max(Problem.from_json(job["problem"]).token_count for job in jobs if job["do"] == "large")}
        assert (widest * 128 * 128 > 2**31) == large


def test_a_command_that_hangs_ends_with_its_children() -> None:
    """The child holds the pipe, which is read to its end."""
    said = output_of(["sh", "-c", "echo begins; sleep 50 & sleep 50; echo ends"], 1, {})
    assert said == "begins\n\ntimed out"
