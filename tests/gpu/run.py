#!/usr/bin/env python3
"""The hardware suite: every check of the GPU kernels in one command, within a time limit. README.md says how to run it.

Jobs are requests to `gnaforge.verification.worker`, in a process that a kernel that hangs or faults may take with it;
the suite then goes on with the next job. Results so far are on disk at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from commands import driver, sanitizer_output
from paths import CORE, FACTS, HERE, LIBRARY, set_up

set_up()

from gnaforge.build.library import is_emulated, read_library  # noqa: E402
from gnaforge.families import family_of  # noqa: E402
from gnaforge.runtime.config import KernelConfig  # noqa: E402
from gnaforge.runtime.problem import Problem  # noqa: E402
from gnaforge.verification import process  # noqa: E402
from gnaforge.verification.kinds import LAYOUTS, POISONS  # noqa: E402
from gnaforge.verification.problems import for_kernel, random_problem_for  # noqa: E402

Job = dict[str, Any]
_FAR = 2**31 + 64  # elements
_OPERATOR_KINDS = ("stream", "other device", "graph", "compiled", "layouts")


def _job(section: str, do: str, kernel: str, problem: Problem | None = None, **fields: Any) -> Job:
    described = {} if problem is None else {"problem": for_kernel(problem, KernelConfig.parse(kernel)).as_json()}
    return {"section": section, "do": do, "kernel": kernel, **described, **fields}


def _verify(section: str, kernel: str, problem: Problem, layout: str, seed: int = 0, **fields: Any) -> Job:
    return _job(section, "verify", kernel, problem, layout=layout, seed=seed, **fields)


def _random(section: str, kernel: str, seed: int, max_tokens: int, **fields: Any) -> Job:
    problem = random_problem_for(KernelConfig.parse(kernel), seed, max_tokens)
    return _verify(section, kernel, problem, LAYOUTS[seed % len(LAYOUTS)], seed, **fields)


def ragged_jobs(section: str, keys: list[str], seeds: Iterable[int], tokens: int) -> Iterator[Job]:
    """A small problem per seed and kernel, of any shape and layout, repeated, and with NaN where it must not matter."""
    for seed in seeds:
        for key in keys:
            yield _random(section, key, seed, tokens, repeats=1, poison=POISONS)


def _dense(rank: int, large: bool) -> tuple[int, ...]:
    if large:
        return {1: (4000,), 2: (60, 70), 3: (12, 18, 20)}[rank]
    return {1: (300,), 2: (12, 20), 3: (5, 7, 8)}[rank]


def _jobs_beside_torch(configs: dict[str, KernelConfig], large: bool) -> Iterator[Job]:
    keys = [*configs]
    for key in keys[:: 1 if large else 4]:
        yield _job("operators", "operator", key, kind="result")
    for kind in _OPERATOR_KINDS:
        for key in keys[:: 4 if large else len(keys)]:
            yield _job("operators", "operator", key, kind=kind)
    for key in keys if large else keys[:1]:
        tokens = _dense(configs[key].rank, large)
        yield _job("accuracy beside SDPA", "beside sdpa", key, Problem(tokens, tokens, heads=2))


def jobs_of(keys: list[str], problems: int, large: bool, first: int) -> Iterator[Job]:
    """All jobs, the most telling first. ``large``: sizes for a GPU, not for the emulator. Seeds start at ``first``."""
    yield from ragged_jobs("first runs", keys, [first - 1], 300)
    configs = {key: KernelConfig.parse(key) for key in keys}
    forward = {key: config for key, config in configs.items() if config.op == "gna_forward"}
    yield from _jobs_beside_torch(forward, large)
    for seed in range(first, first + max(1, problems // len(keys))):
        for key in keys:
            tokens = 2500 if large and seed % 2 else 400
            poison = [POISONS[seed // 3 % 2]] if seed % 3 == 0 else []
            yield _random("random problems", key, seed, tokens, repeats=int(large), poison=poison)
    for key, config in configs.items() if large else ():
        tokens = _dense(config.rank, True)
        problem = Problem(tokens, tuple(n // 2 + 1 for n in tokens), batch=3, heads=8, kv_heads=2)
        for layout in ("heads first", "packed"):
            yield _verify("repeats", key, problem, layout, repeats=10)
    for key, config in forward.items():
        tokens = {1: (70,), 2: (9, 11), 3: (5, 6, 7)}[config.rank]
        problem = Problem(tokens, tuple(n // 2 + 1 for n in tokens), batch=2, heads=2)
        yield _job("large tensors", "far strides", key, problem, stride=_FAR)
    wide = [key for key, config in forward.items() if config.head_dim == 128 and not config.value_head_dim]
    for key in wide if large else wide[:1]:
        rank = configs[key].rank
        tokens = {1: (140_000,), 2: (400, 350), 3: (40, 50, 70)}[rank] if large else _dense(rank, False)
        # Beyond 2^31 elements for each of Q, K, V and O.
        problem = Problem(tokens, tuple(min(n, 9) for n in tokens), heads=128 if large else 1)
        yield _job("large tensors", "large", key, problem, samples=30 if large else 2)


class Suite:
    """Runs jobs and keeps the results."""

    def __init__(self, options: argparse.Namespace, libraries: dict[str, Path], emulated: bool) -> None:
        self.options, self.libraries, self.emulated = options, libraries, emulated
        targets = {family_of(KernelConfig.parse(key)).target for key in libraries}
        self.on_gpu = not emulated and any(target.is_gpu for target in targets)
        self.end = time.monotonic() + options.seconds
        # In the emulator, operators use memory that nobody announces, and the schedule of the environment.
        settings = {"TIMING": options.timing, "ORDER": options.order, "SEED": str(options.seed), "MEMORY": "mapped"}
        self.settings = {f"GNAFORGE_EMULATOR_{name}": value for name, value in settings.items()} if emulated else {}
        how = {"timing": options.timing, "order": options.order, "seed": options.seed}
        self.schedule = {**how, "patience": 20_000_000, "trace": False} if emulated else None
        self.worker: process.Worker | None = None
        self.opened: tuple[str, bool] | None = None
        self.deaths: dict[str, int] = {}
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv[1:]),
            "driver": driver(),
            "host": platform.platform(),
            "facts": json.loads(FACTS.read_text()) if FACTS.is_file() else None,
            "machine": {},
            "sections": {},
            "failures": [],
            "sanitizer": {},
        }

    def start(self, through_operators: bool = False) -> dict[str, Any]:
        """A new worker says what runs here. It has had time to start then, so no job gets more time than another."""
        self.drop()
        settings = self.settings if through_operators else {}
        core = CORE if CORE.is_file() else None
        self.worker = process.Worker(core, self.options.out.with_suffix(".log"), **settings)
        return self.worker.request(self.options.job_seconds + 60, do="about")

    def drop(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self.worker.close()
        self.worker = self.opened = None

    def ask(self, job: Job) -> dict[str, Any]:
        """The answer to a job, from a process that is alive."""
        wanted = job["kernel"], job["do"] == "operator" and self.emulated
        try:
            if self.worker is None or (self.opened or wanted)[1] != wanted[1]:
                self.start(wanted[1])
            assert self.worker is not None
            if self.opened != wanted:
                opened = self.worker.open(self.options.job_seconds, self.libraries[wanted[0]], wanted[0])
                if "failed" in opened:
                    return opened
                self.opened = wanted
            fields = {name: value for name, value in job.items() if name not in ("section", "kernel")}
            answer = self.worker.request(self.options.job_seconds, schedule=self.schedule, **fields)
        except process.WorkerError as error:
            answer = {"failed": "crash", "message": str(error), "ended": True}
        except process.HarnessError as error:
            return {"failed": "harness", "message": str(error)}
        if answer.get("ended"):
            self.drop()
            self.deaths[wanted[0]] = self.deaths.get(wanted[0], 0) + 1
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
        wrong = answer.get("message") or answer.get("refused")
        found["failed" if wrong else "passed"] += 1
        if wrong:
            self.results["failures"].append({"job": job, **answer})
            print(f"FAILED {json.dumps(job)}\n  {wrong}", flush=True)
            self.save()
        shares = {name: one["share"] for name, one in answer.get("errors", {}).items()} | answer.get("shares", {})
        shares |= {name: answer[name] for name in ("ours", "sdpa") if name in answer}
        for name, value in shares.items():
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
        if not self.on_gpu or tool is None:
            self.results["sanitizer"] = {"skipped": "no GPU" if tool else "compute-sanitizer is not installed"}
            return
        jobs = self.options.out.with_suffix(".jobs")
        listed = []
        for key in keys:
            listed.append({"do": "open", "key": key, "library": str(self.libraries[key])})
            listed += [{**_random("", key, seed, 200), "schedule": None} for seed in (0, 1)]
        jobs.write_text("".join(json.dumps(job) + "\n" for job in listed))
        for check in ("memcheck", "racecheck", "synccheck"):
            left = self.end - time.monotonic()
            if left < 20:
                self.results["sanitizer"][check] = "no time left"
                continue
            # Without torch's cache each tensor is an allocation of its own, whose end memcheck knows.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [*process.COMMAND, "--jobs", str(jobs)]
            summary, text = sanitizer_output(tool, check, command, min(left, 90), uncached)
            answered = text.count('"digest": '), text.count('"failed": ')
            self.results["sanitizer"][check] = {"summary": summary, "passed": answered[0], "failed": answered[1]}
            self.options.out.with_suffix(f".{check}.txt").write_text(text[-200_000:])
            print(f"{check}: {'; '.join(summary) or text[-300:]}", flush=True)
            self.save()

    def save(self) -> None:
        self.options.out.write_text(json.dumps(self.results, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    library_help = f"default: {LIBRARY.relative_to(HERE)}; elsewhere than on a GPU problems are smaller"
    parser.add_argument("--library", action="append", type=Path, help=library_help)
    parser.add_argument("--problems", type=int, default=2000, help="random problems")
    parser.add_argument("--seconds", type=float, default=420, help="after which no new job starts")
    parser.add_argument("--job-seconds", type=float, default=30, help="a job that takes longer hangs")
    parser.add_argument("--only", action="append", help="run this section; may be given several times")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument(
        "--repeat", type=Path, metavar="FILE", help="instead, do the jobs again that failed in these results"
    )
    for name, first in (("timing", "eager"), ("order", "round-robin")):
        parser.add_argument(f"--{name}", default=first, help=f"of the emulator's schedule; default: {first}")
    parser.add_argument("--seed", type=int, default=0, help="of the emulator's schedule")
    out = Path(os.environ.get("OUT", HERE / "results")) / f"suite-{datetime.date.today()}.json"
    parser.add_argument("--out", type=Path, default=out, help="results; logs go beside them")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.library or [LIBRARY]]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        print(f"error: {', '.join(missing)} does not exist; python tests/gpu/prepare.py makes it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    libraries = {row["key"]: path for path in paths for row in read_library(path)}
    suite = Suite(options, libraries, all(map(is_emulated, paths)))
    try:
        about = suite.start()
    except (process.WorkerError, process.HarnessError) as error:
        print(f"error: no worker runs: {error}; see {options.out.with_suffix('.log')}", file=sys.stderr)
        return 2
    if suite.on_gpu and "gpu" not in about:
        print("error: these kernels are for a GPU, and torch finds none, or no driver for it", file=sys.stderr)
        return 2
    suite.results["machine"] = {**about, "kernels": sorted(libraries)}
    print(json.dumps(about), flush=True)
    keys = sorted(libraries)
    jobs = jobs_of(keys, options.problems, suite.on_gpu, options.first_seed)
    if options.repeat is not None:
        jobs = (failure["job"] for failure in json.loads(options.repeat.read_text())["failures"])
    suite.run(job for job in jobs if options.only is None or job["section"] in options.only)
    suite.drop()
    if (options.only is None and options.repeat is None) or "sanitizer" in (options.only or ()):
        suite.sanitize(keys[::4])
    suite.save()
    failed = len(suite.results["failures"])
    print(f"{failed} failed; results in {options.out}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
