"""The hardware suite notices what it is there to notice. That it passes is `test_sm90.py`'s matter."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import checks
import oracle
import run as suite
from gnaforge.runtime.config import KernelConfig

CONFIG = KernelConfig.parse("gna_forward-sm90-r2-bf16-d8-q4x4-kv4x4")
PROBLEM = oracle.Problem((9, 11), (4, 3), (2, 1), (2, 1), (False, True), batch=2, heads=4, kv_heads=2, head_dim=8)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_a_write_outside_of_a_tensor_is_noticed(layout: str) -> None:
    memory = checks.inputs(PROBLEM, torch.bfloat16, "cpu", layout, 0)[1]
    assert memory.view.isfinite().all() and memory.whole.isnan().any()
    if layout != "packed":  # where V's and Q's elements are outside of K
        memory.check_rest("key")
        assert memory.view.isfinite().all()
    outside = memory.whole.isnan().nonzero()
    for at in (outside[0], outside[len(outside) // 2], outside[-1]):
        memory.whole[at] = 1
        with pytest.raises(checks.Wrong, match="key: memory outside"):
            memory.check_rest("key")
        memory.whole[at] = torch.nan


def exact(problem: oracle.Problem, tensors: list[torch.Tensor], spoil: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a kernel's care: every key takes part in the products. ``spoil``: what is wrong with it."""
    q, k, v = (x.double() for x in tensors)
    if spoil == "head":
        k = k + 0 * k.sum(-2, keepdim=True)
    if spoil == "batch":
        q = q + 0 * q.sum(0, keepdim=True)
    found = oracle.reference(problem, q, k.nan_to_num() if spoil == "hides" else k, v.nan_to_num())
    return found[0].bfloat16(), found[1].float()


@pytest.mark.parametrize(
    ("spoil", "said"), [("", ""), ("head", "depends on"), ("batch", "depends on"), ("hides", "show it")]
)
def test_poison_finds_what_must_not_matter(monkeypatch: pytest.MonkeyPatch, spoil: str, said: str) -> None:
    monkeypatch.setattr(checks, "attend", lambda entry, problem, tensors, layout: exact(problem, tensors, spoil))
    for seed in range(5):
        made = checks.inputs(PROBLEM, torch.bfloat16, "cpu", "heads last", seed)
        clean = exact(PROBLEM, [memory.view for memory in made])
        arguments = (None, CONFIG, PROBLEM, "heads last", made, clean, seed)
        if said:
            with pytest.raises(checks.Wrong, match=said):
                checks.check_poison(*arguments)
        else:
            checks.check_poison(*arguments)


def test_tiles_that_hold_a_key() -> None:
    """Against the tiles that the oracle counts: summed over keys, each Q tile's queries see its visited boxes."""
    total = 0
    for key in ((i, j) for i in range(9) for j in range(11)):
        seen = checks.seeing(PROBLEM, key, "cpu")
        visited = checks.visiting(PROBLEM, CONFIG, key, "cpu")
        assert visited[seen].all()
        flat = key[0] * 11 + key[1]
        assert seen.flatten().tolist() == oracle.mask(PROBLEM)[:, flat].tolist()
        total += int(visited.sum())
    assert int(oracle.mask(PROBLEM).sum()) < total < 99 * 99


WORKER = """
import json, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job.get("kernel") == "hangs": time.sleep(60)
    if job.get("kernel") == "dies": sys.exit(3)
    faults = job.get("kernel") == "faults"
    print(json.dumps({"ok": not faults, "error": "", **({"ended": True} if faults else {})}), flush=True)
    if faults: time.sleep(0.2); sys.exit(3)
"""


@pytest.fixture
def hardware_suite(tmp_path: Path) -> suite.Suite:
    options = argparse.Namespace(seconds=600, job_seconds=1.0, device="cpu", library=[], out=tmp_path / "suite.json")
    found = suite.Suite(options)
    found.command = [sys.executable, "-c", WORKER]
    return found


@pytest.mark.parametrize(("kernel", "error"), [("hangs", "it hangs"), ("dies", "ended with status 3"), ("faults", "")])
def test_a_kernel_that_ends_its_worker(hardware_suite: suite.Suite, kernel: str, error: str) -> None:
    """It takes the blame twice, and is left out then. No other kernel does, and no worker lives on."""
    assert hardware_suite.start()["ok"] and hardware_suite.worker is not None
    process = hardware_suite.worker.process
    answer = hardware_suite.ask({"kind": "random", "kernel": kernel})
    assert answer["ended"] and error in str(answer["error"])
    assert process.poll() is not None
    kernels = ("A", kernel, kernel, "B", "C")
    hardware_suite.run(iter([{"kind": "random", "section": "all", "kernel": name} for name in kernels]))
    hardware_suite.drop()
    assert hardware_suite.deaths == {kernel: 2}
    found = hardware_suite.results["sections"]["all"]
    assert (found["passed"], found["failed"]) == (3, 1)
    assert found["skipped"] == {"this kernel hung or faulted before": 1}


def test_no_worker_starts(hardware_suite: suite.Suite) -> None:
    hardware_suite.command = [sys.executable, "-c", "raise SystemExit(5)"]
    answer = hardware_suite.ask({"kind": "random", "kernel": "A"})
    assert answer["error"] == "no worker starts: the process ended with status 5"
    assert hardware_suite.deaths == {}


FAULTING = """
import os, sys
sys.path.insert(0, {folder!r})
sys.argv = ["worker.py", "--device=cpu", "--library=none", "--jobs=jobs"]
import checks, worker
class Kernels(worker.Worker):
    def __init__(self, libraries, device):
        self.dead = False
    def random(self, kernel):
        os.system("echo of a child")
        os.write(1, b"of C\\n")
        print("of Python")
        if kernel == "faults":
            raise checks.Wrong("illegal address")
        return {{}}
worker.Worker = Kernels
worker.gpu_lives = lambda device: False
worker.main()
"""


def test_what_a_worker_prints(forked: Callable[..., Any], tmp_path: Path) -> None:
    """Answers and nothing else, and that it ends, with the kernel that took its GPU along."""
    jobs = [{"kind": "random", "kernel": name} for name in ("right", "faults", "right")]
    (tmp_path / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    done = forked(FAULTING.format(folder=str(Path(suite.__file__).parent)))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert "SystemExit: 3" in done.stderr, done.stderr
    assert all(answer.pop("seconds") >= 0 for answer in answers)
    assert answers == [{"ok": True}, {"ok": False, "error": "illegal address", "ended": True}]
    assert done.stderr.splitlines().count("of C") == done.stderr.splitlines().count("of a child") == 2


def test_the_sanitizer_sees_each_allocation(
    hardware_suite: suite.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "ERROR SUMMARY: cache off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hardware_suite.options.device = "cuda"
    hardware_suite.sanitize(["A"])
    found = hardware_suite.results["sanitizer"]
    assert found["memcheck"]["summary"] == ["ERROR SUMMARY: cache off: 1"]


def test_a_command_that_hangs_ends_with_its_children() -> None:
    """The child holds the pipe, which is read to its end."""
    said = suite._output(["sh", "-c", "echo begins; sleep 50 & sleep 50; echo ends"], 1, {})
    assert said == "begins\n\ntimed out"
