#!/usr/bin/env python3
"""The hardware suite: every check of the GPU kernels in one command, within a time limit. README.md says how to run it.

Jobs run in processes of their own (worker.py), which a kernel that hangs or faults may take with it; the suite then
goes on with the next job. Results so far are on disk at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paths import FACTS, HERE, LIBRARY, set_up

set_up()

from gnaforge.runtime.config import KernelConfig  # noqa: E402
from gnaforge.runtime.problem import Problem  # noqa: E402
from gnaforge.verification.problems import for_kernel  # noqa: E402

Job = dict[str, Any]
_FAR = 2**31 + 64  # elements


def _job(**fields: Any) -> Job:
    return fields


def _dense(rank: int, large: bool) -> list[int]:
    return {1: [4000 if large else 300], 2: [60, 70] if large else [12, 20], 3: [12, 18, 20] if large else [5, 7, 8]}[
        rank
    ]


def _problem(
    tokens: list[int], window: list[int], batch: int, heads: int, kv_heads: int, config: KernelConfig
) -> dict[str, Any]:
    problem = Problem(tokens, window, batch=batch, heads=heads, kv_heads=kv_heads)
    return for_kernel(problem, config).as_json()


def jobs_of(keys: list[str], problems: int, large: bool, first: int) -> Iterator[Job]:
    """All jobs, the most telling first. ``large``: sizes for a GPU, not for the emulator. Seeds start at ``first``."""
    configs = {key: KernelConfig.parse(key) for key in keys}
    for key in keys:
        yield _job(
            section="first runs", kind="random", kernel=key, seed=first - 1, max_tokens=300, repeats=1, poison=True
        )
    for key in keys[:: 1 if large else 4]:
        yield _job(section="operators", kind="operator", kernel=key)
    for kind in ("stream", "other_device", "graph", "compiled"):
        for key in keys[:: 4 if large else len(keys)]:
            yield _job(section="operators", kind=kind, kernel=key)
    for key, config in configs.items():
        if not large and key != keys[0]:
            continue
        tokens = _dense(config.rank, large)
        yield _job(section="accuracy beside SDPA", kind="against_sdpa", kernel=key, tokens=tokens, heads=2)
    seeds = range(first, first + max(1, problems // len(keys)))
    for seed in seeds:
        for key in keys:
            tokens = 2500 if large and seed % 2 else 400
            yield _job(
                section="random problems", kind="random", kernel=key, seed=seed, max_tokens=tokens, repeats=int(large),
                poison=seed % 3 == 0,
            )  # fmt: skip
    if large:
        for key, config in configs.items():
            tokens = _dense(config.rank, True)
            problem = _problem(tokens, [n // 2 + 1 for n in tokens], 3, 8, 2, config)
            for layout in ("heads first", "packed"):
                yield _job(section="repeats", kind="given", kernel=key, problem=problem, layout=layout, repeats=10)
    for key in keys:
        yield _job(section="large tensors", kind="far_strides", kernel=key, stride=_FAR)
    for key, config in configs.items():
        if config.head_dim == 128 and not config.value_head_dim:
            tokens = (
                {1: [140_000], 2: [400, 350], 3: [40, 50, 70]}[config.rank] if large else _dense(config.rank, False)
            )
            # Beyond 2^31 elements for each of Q, K, V and O.
            heads = 128 if large else 1
            problem = _problem(tokens, [min(n, 9) for n in tokens], 1, heads, heads, config)
            yield _job(section="large tensors", kind="large", kernel=key, problem=problem, samples=30 if large else 2)
            if not large:
                break


class Worker:
    """A worker process, and its answers with a time limit."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log.open("ab")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.answers: queue.Queue[bytes] = queue.Queue()
        self.fresh = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(b"")

    def ask(self, job: Job, limit: float) -> dict[str, Any]:
        """The answer to a job; one with ``ended`` set if the process did not survive it."""
        assert self.process.stdin is not None
        start = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=limit + (60 if self.fresh else 0))
        except queue.Empty:
            self.stop(0)
            return {"ok": False, "ended": True, "error": f"no answer in {time.perf_counter() - start:.0f} s: it hangs"}
        except OSError:
            line = b""
        if not line:
            self.stop()
            return {"ok": False, "ended": True, "error": f"the process ended with status {self.process.returncode}"}
        self.fresh = False
        return json.loads(line)

    def stop(self, patience: float = 10) -> None:
        """Ends the process, whatever it does, after as many seconds as it may take to end by itself."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
                self.process.wait(patience)
            except (OSError, subprocess.TimeoutExpired):
                pass
        self.process.kill()
        self.process.wait()
        self.log.close()


class Suite:
    """Runs jobs and keeps the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.command = [sys.executable, str(HERE / "worker.py"), "--device", options.device]
        for path in options.library:
            self.command += ["--library", str(path)]
        self.worker: Worker | None = None
        self.deaths: dict[str, int] = {}
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv[1:]),
            "driver": _driver(),
            "host": platform.platform(),
            "facts": json.loads(FACTS.read_text()) if FACTS.is_file() else None,
            "machine": {},
            "sections": {},
            "failures": [],
            "sanitizer": {},
        }

    def start(self) -> dict[str, Any]:
        """A new worker says what runs here. It has had time to start then, so no job gets more time than another."""
        self.worker = Worker(self.command, self.options.out.with_suffix(".log"))
        answer = self.worker.ask({"kind": "about"}, self.options.job_seconds)
        if answer.get("ended"):
            self.drop()
        return answer

    def drop(self) -> None:
        """Ends the worker: one whose GPU died may have said so and live on for a moment."""
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def ask(self, job: Job) -> dict[str, Any]:
        """The answer to a job, from a process that is alive."""
        if self.worker is None:
            started = self.start()
            if self.worker is None:
                return {**started, "error": f"no worker starts: {started['error']}"}
        answer = self.worker.ask(job, self.options.job_seconds)
        if answer.get("ended"):
            self.drop()
            kernel = job.get("kernel", "")
            self.deaths[kernel] = self.deaths.get(kernel, 0) + 1
        return answer

    def run(self, jobs: Iterator[Job]) -> None:
        """Does jobs until the time is up."""
        section = ""
        for job in jobs:
            if self.deaths.get(job["kernel"], 0) >= 2:
                answer = {"skipped": "this kernel hung or faulted before"}
            elif time.monotonic() > self.end:
                answer = {"skipped": "no time left"}
            else:
                answer = self.ask(job)
            if job["section"] != section:
                self.show(section)
                section = job["section"]
            self.keep(job, answer)
        self.show(section)

    def keep(self, job: Job, answer: dict[str, Any]) -> None:
        found = self.results["sections"].setdefault(
            job["section"], {"passed": 0, "failed": 0, "skipped": {}, "seconds": 0.0, "largest": {}}
        )
        found["seconds"] = round(found["seconds"] + answer.get("seconds", 0), 3)
        if "skipped" in answer:
            found["skipped"][answer["skipped"]] = found["skipped"].get(answer["skipped"], 0) + 1
            return
        found["passed" if answer["ok"] else "failed"] += 1
        if not answer["ok"]:
            self.results["failures"].append({"job": job, **answer})
            print(f"FAILED {json.dumps(job)}\n  {answer['error']}", flush=True)
            self.save()
        for name, value in answer.items():
            if isinstance(value, float) and name != "seconds":
                found["largest"][name] = max(value, found["largest"].get(name, 0))

    def show(self, section: str) -> None:
        self.save()
        if section:
            found = self.results["sections"][section]
            skipped = "".join(f", {n} skipped ({why})" for why, n in found["skipped"].items())
            largest = "".join(f", {name} at most {value:.3g}" for name, value in found["largest"].items())
            counts = f"{found['passed']} passed, {found['failed']} failed{skipped}{largest}"
            print(f"{section}: {counts}; {found['seconds']:.1f} s", flush=True)

    def sanitize(self, keys: list[str]) -> None:
        """compute-sanitizer over a few problems, where it is installed and the machine lets it work."""
        tool = shutil.which("compute-sanitizer")
        if self.options.device != "cuda" or tool is None:
            self.results["sanitizer"] = {"skipped": "no GPU" if tool else "compute-sanitizer is not installed"}
            return
        jobs = self.options.out.with_suffix(".jobs")
        listed = [
            _job(kind="random", kernel=key, seed=seed, max_tokens=200, repeats=0, poison=False)
            for seed in (0, 1)
            for key in keys
        ]
        jobs.write_text("".join(json.dumps(job) + "\n" for job in listed))
        for check in ("memcheck", "racecheck", "synccheck"):
            left = self.end - time.monotonic()
            if left < 20:
                self.results["sanitizer"][check] = "no time left"
                continue
            command = [tool, "--tool", check, "--kernel-regex", "kns=gna_forward", *self.command, "--jobs", str(jobs)]
            # Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
            text = _output(command, min(left, 90), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            summary = [line.strip() for line in text.splitlines() if "SUMMARY" in line or "timed out" in line]
            answered = text.count('"ok": true'), text.count('"ok": false')
            self.results["sanitizer"][check] = {"summary": summary, "passed": answered[0], "failed": answered[1]}
            self.options.out.with_suffix(f".{check}.txt").write_text(text[-200_000:])
            print(f"{check}: {'; '.join(summary) or text[-300:]}", flush=True)
            self.save()

    def save(self) -> None:
        self.options.out.write_text(json.dumps(self.results, indent=1) + "\n")


def _output(command: list[str], seconds: float, environment: dict[str, str]) -> str:
    """All that a command prints within its time, after which it ends with the processes that it has started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        printed = process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired as error:  # a process that left the group holds the pipe
        printed = error.stdout or b""
    return printed.decode(errors="replace") + "\ntimed out"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: emulated libraries")
    parser.add_argument("--library", action="append", type=Path, help=f"default: {LIBRARY.relative_to(HERE)}")
    parser.add_argument("--problems", type=int, default=2000, help="random problems")
    parser.add_argument("--seconds", type=float, default=420, help="after which no new job starts")
    parser.add_argument("--job-seconds", type=float, default=30, help="a job that takes longer hangs")
    parser.add_argument("--only", action="append", help="run this section; may be given several times")
    parser.add_argument("--first-seed", type=int, default=1)
    out = Path(os.environ.get("OUT", HERE / "results")) / f"suite-{datetime.date.today()}.json"
    parser.add_argument("--out", type=Path, default=out, help="results; logs go beside them")
    options = parser.parse_args()
    options.library = [path.resolve() for path in options.library or [LIBRARY]]
    missing = [str(path) for path in options.library if not path.is_file()]
    if missing:
        print(f"error: {', '.join(missing)} does not exist; python tests/gpu/prepare.py makes it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    about = suite.start()
    if not about.get("ok"):
        print(f"error: no worker runs: {about.get('error')}; see {options.out.with_suffix('.log')}", file=sys.stderr)
        return 2
    keys = about.pop("kernels")
    suite.results["machine"] = about
    print(json.dumps(about), flush=True)
    jobs = jobs_of(keys, options.problems, options.device == "cuda", options.first_seed)
    suite.run(job for job in jobs if options.only is None or job["section"] in options.only)
    suite.drop()
    if options.only is None or "sanitizer" in options.only:
        suite.sanitize(keys[::4])
    suite.save()
    failed = len(suite.results["failures"])
    print(f"{failed} failed; results in {options.out}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
