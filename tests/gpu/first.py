#!/usr/bin/env python3
"""Tells within minutes whether anything is wrong on a GPU, and which guesses of the performance model hold.

Runs sections, the most telling first, each within a time of its own and in processes of its own: one that hangs or
faults ends only itself. Results are on disk as they come. README.md says what they decide."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commands import Watch, driver, sanitizer_output, versions
from paths import BENCH_LIBRARY, DEVICE, FACTS, HERE, LIBRARY, PLAN, set_up

set_up()

from first_report import Report  # noqa: E402
from gnaforge.build.library import is_emulated, read_library  # noqa: E402
from gnaforge.errors import InputError  # noqa: E402
from gnaforge.verification.process import HarnessError, Worker, WorkerError  # noqa: E402

Json = dict[str, Any]
SECTIONS = {
    "machine": (90, "what is there: GPU, driver, torch, tools"),
    "right": (50, "12 kernels on 20 ragged problems each, NaN where it must not matter, against float64"),
    "gradients": (35, "the same of 17 kernels of gradients (needs torch)"),
    "dense": (60, "cycles per KV tile of dense attention, in a burst and for longer, beside torch's cuDNN and flash"),
    "boxes": (25, "without masks: what loads cost at rank 1, 2 and 3, and a Q tile with few KV tiles"),
    "models": (80, "HunyuanVideo, FLUX, Wan, StormScope, at stride 1 and perfect strides, beside dense attention"),
    "sanitizer": (60, "compute-sanitizer's racecheck and memcheck on two small problems, if it is installed"),
    "suite": (0, "the suite of run.py, for the time that is left (needs torch)"),
}
"""Seconds that each may take, 0 for the rest; what it does."""
_IMPORT_SECONDS = 60.0  # of torch, on a machine that has just started
_LOST_TWICE = "this kernel hung or faulted before"
_UP = "no time left"


class Skipped(Exception):
    """A section can't run here; says why."""


class NoDevice(Exception):
    """Nothing can run: there is no GPU."""


class First:
    """Runs the sections.

    Args:
        options: of the command line.
        plan: of prepare.py.
        libraries: by key of the kernels.
        report: takes results.
    """

    def __init__(self, options: argparse.Namespace, plan: Json, libraries: dict[str, Path], report: Report) -> None:
        self.options, self.plan, self.libraries, self.report = options, plan, libraries, report
        self.emulated = any(map(is_emulated, set(libraries.values())))
        self.end = time.monotonic() + options.seconds
        self.section_end = self.end
        self.worker: Worker | None = None
        self.opened = ""
        self.lost: dict[str, int] = {}
        self.torch: Json = {}

    def run(self, names: Iterable[str]) -> None:
        """Runs sections by name; whatever happens in one is in the report."""
        for name in names:
            seconds = SECTIONS[name][0] * self.options.patience or self.options.seconds
            self.section_end = min(self.end, time.monotonic() + seconds)
            self.report.begin(name)
            left = self.section_end - time.monotonic()
            status = "done"
            try:
                if left <= 0:
                    raise Skipped(_UP)
                getattr(self, name)()
            except NoDevice:
                raise
            except Skipped as error:
                status = f"skipped: {error}"
            except (WorkerError, HarnessError) as error:
                self.report.fault(str(error))
                status = "failed"
            except Exception:  # whatever ends one section, the others' results are wanted
                self.report.fault(traceback.format_exc())
                status = "failed"
            self.drop()
            if status == "done" and time.monotonic() > self.section_end:
                status = "its time was up"
            self.report.end(status)

    # --- sections

    def machine(self) -> None:
        """Facts of this machine. Without a GPU nothing else can be said."""
        asked = ("memory.total", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu")
        self.report.facts(
            {
                "host": platform.platform(),
                "nvidia-smi": driver(*asked),
                **versions(),
                "carried": json.loads(FACTS.read_text()) if FACTS.is_file() else None,
            }
        )
        try:
            self.report.facts(self.ask({"do": "about"}))
        except WorkerError as error:
            raise NoDevice(str(error)) from error
        try:
            self.torch = self.ask({"do": "torch"}, at_least=_IMPORT_SECONDS)
        except (WorkerError, HarnessError) as error:  # importing it hangs, fails, or ends the process
            self.torch = {"unavailable": str(error)}
        self.report.facts(self.torch)

    def right(self) -> None:
        """Small problems of every shape and layout; without torch contiguous ones, and some queries of each."""
        wanted = self.plan["right"]
        if self._no_torch:
            print(f"  without torch: {self._no_torch}", flush=True)
            self._measure_checks(wanted["without_torch"])
            return
        self._run_ragged("right")

    def gradients(self) -> None:
        """The same of kernels of backward passes."""
        self._run_ragged("gradients")

    def dense(self) -> None:
        """Cycles per KV tile."""
        self._measure("dense")

    def boxes(self) -> None:
        """Loads of boxes."""
        self._measure("boxes")

    def models(self) -> None:
        """Models beside their bounds."""
        self._measure("models")

    def sanitizer(self) -> None:
        """Races and accesses out of bounds."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise Skipped("compute-sanitizer is not installed")
        jobs = []
        for job in self.plan["sanitizer"]:
            jobs += [{"do": "open", "key": job["kernel"], "library": str(self.libraries[job["kernel"]])}, job]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "jobs"
            path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
            for check in ("racecheck", "memcheck"):
                left = self.section_end - time.monotonic()
                if left < 5:
                    self.report.result({"check": check}, {"skipped": _UP})
                    continue
                # Half of the time each, the second what the first has left of it.
                seconds = left / 2 if check == "racecheck" else left
                summary, text = sanitizer_output(tool, check, [*self._command(), "--jobs", str(path)], seconds, {})
                found: Json = {"summary": summary, "shares": text.count('"share": '), "text": text[-4000:]}
                errors = [line for line in summary if "SUMMARY" in line and not _says_zero(line)]
                if errors or (found["shares"] < len(self.plan["sanitizer"]) and "timed out" not in summary):
                    found |= {"failed": check, "message": "; ".join(errors) or text[-500:]}
                self.report.result({"check": check}, found)

    def suite(self) -> None:
        """The long suite."""
        wanted = self.plan["suite"]
        suite = self._require_suite()
        keys = sorted(wanted["kernels"])
        jobs = suite.jobs_of(keys, wanted["problems"], not self.emulated, self.plan["right"]["problems"] + 1)
        self._run_suite(suite, "suite", (job for job in jobs if wanted["only"] in (None, [job["section"]])))

    # --- how they run

    def _command(self) -> list[str]:
        return [sys.executable, str(HERE / "measure.py"), "--device", str(self.options.device)]

    def ask(self, request: Json, at_least: float = 0) -> Json:
        """The answer of the process that measures, which is started if it isn't there. It may take ``at_least`` so many
        seconds.

        Raises:
            WorkerError: it hangs or ended.
            HarnessError: it has a bug.
        """
        if self.worker is None:
            settings = {"GNAFORGE_EMULATOR_PROCESSORS": "3"} if self.emulated else {}
            self.worker, self.opened = Worker(None, self.report.log, self._command(), **settings), ""
        left = self.section_end - time.monotonic()
        limit = max(self.options.job_seconds + 3 * request.get("seconds", 0), at_least)
        late = "no result within {} s: it hangs" if limit <= left else "cut off after {} s: the section's time is up"
        try:
            return self.worker.request(round(max(min(limit, left), 0.1), 1), late=late, **request)
        except (WorkerError, HarnessError):
            self.drop()
            raise

    def drop(self) -> None:
        """Ends the process that measures."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def _measure(self, section: str) -> None:
        rows = self.plan[section]["rows"]
        for run in self.plan[section]["runs"]:
            row = rows[run["row"]]
            if time.monotonic() >= self.section_end:
                answer: Json = {"skipped": _UP}
            elif run["seconds"] < 1:
                answer = self._try(run)
            else:
                with Watch() as watch:
                    answer = self._try(run)
                answer = {**answer, "nvidia-smi": watch.medians}
            self.report.run(row, run, answer)
        self.report.compare(rows)

    def _measure_checks(self, jobs: list[Json]) -> None:
        passed = 0
        for job in jobs:
            answer = {"skipped": _UP} if time.monotonic() >= self.section_end else self._try(job)
            passed += "share" in answer
            self.report.result({name: job[name] for name in ("kernel", "problem")}, answer, told="share" not in answer)
        print(f"  {passed} of {len(jobs)} passed", flush=True)

    def _try(self, run: Json) -> Json:
        """The answer to a run; a process that is lost is the fault of its kernel."""
        key = run.get("kernel") or run["contender"]
        if self.lost.get(key, 0) >= 2:
            return {"skipped": _LOST_TWICE}
        try:
            if self.worker is None:
                self.opened = ""
            if run["do"] == "sdpa" and self._no_torch:
                return {"unavailable": self._no_torch}
            if run["do"] != "sdpa" and self.opened != key:
                opened = self.ask({"do": "open", "library": str(self.libraries[key]), "key": key})
                if "failed" in opened:
                    return opened
                self.opened = key
            if run["do"] == "sdpa":
                self.opened = ""
            answer = self.ask(run, _IMPORT_SECONDS if run["do"] == "sdpa" else 0)
        except WorkerError as error:
            answer = {"failed": "crash", "message": str(error), "ended": True}
        except HarnessError as error:
            return {"failed": "harness", "message": str(error)}
        if answer.get("ended"):
            self.drop()
            self.lost[key] = self.lost.get(key, 0) + 1
        return answer

    @property
    def _no_torch(self) -> str:
        """The reason that torch can't be used; empty if it can."""
        if self.torch.get("usable") or (self.emulated and "torch" in self.torch):
            return ""
        return str(self.torch.get("unavailable") or "torch can't use this GPU")

    def _require_suite(self) -> Any:
        """The module run.py, where torch can use this GPU."""
        if self._no_torch:
            raise Skipped(self._no_torch)
        try:
            import run
        except ImportError as error:
            raise Skipped(str(error)) from error
        return run

    def _run_ragged(self, name: str) -> None:
        suite, wanted = self._require_suite(), self.plan[name]
        jobs = suite.ragged_jobs(name, sorted(wanted["kernels"]), range(wanted["problems"]), wanted["tokens"])
        self._run_suite(suite, name, jobs)

    def _run_suite(self, suite: Any, name: str, jobs: Iterable[Json]) -> None:
        limits = {"seconds": self.section_end - time.monotonic(), "job_seconds": self.options.job_seconds}
        schedule = {"timing": "eager", "order": "round-robin", "seed": 0}
        options = argparse.Namespace(out=self.report.file(f"{name}.json"), **limits, **schedule)
        running = suite.Suite(options, self.libraries, self.emulated)
        try:
            running.start()
            running.run(iter(jobs))
        finally:
            running.drop()
            running.save()
            for failure in running.results["failures"]:
                job, answer = failure["job"], {k: v for k, v in failure.items() if k != "job"}
                self.report.result(job, {"failed": "suite", **answer}, told=False)  # the suite has
            self.report.result({"results": options.out.name}, {"sections": running.results["sections"]}, told=False)


def _says_zero(summary: str) -> bool:
    """True if a summary line of compute-sanitizer counts nothing."""
    numbers = [word for word in summary.replace(",", " ").split() if word.isdigit()]
    return bool(numbers) and not any(map(int, numbers[:1]))


def _parser() -> argparse.ArgumentParser:
    described = "\n".join(
        f"  {name:10} {f'{limit} s' if limit else 'rest':>5}  {does}" for name, (limit, does) in SECTIONS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sections, with the most that each may take:\n{described}\n\n"
        "example, where tests/gpu/carried is there:\n  python3 tests/gpu/first.py --out results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=400, help="after which no new run starts; default: 400")
    parser.add_argument(
        "--only",
        action="append",
        choices=SECTIONS,
        metavar="SECTION",
        help="run this section, after machine; may be given several times",
    )
    parser.add_argument("--job-seconds", type=float, default=20, help="a kernel that takes longer hangs; default: 20")
    out = Path(os.environ.get("OUT", HERE / "results"))
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help="results; default: $OUT, or results")
    rehearsal = parser.add_argument_group("for a rehearsal in the emulator")
    rehearsal.add_argument("--library", type=Path, action="append", metavar="FILE", help="kernels")
    rehearsal.add_argument("--device", type=Path, default=DEVICE, metavar="FILE", help="what device.cu is compiled to")
    rehearsal.add_argument("--plan", type=Path, default=PLAN, metavar="FILE", help="problems; see first_plan.py")
    rehearsal.add_argument("--patience", type=float, default=1, help="sections may take so many times longer")
    return parser


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def main() -> int:
    options = _parser().parse_args()
    libraries = options.library or [LIBRARY, BENCH_LIBRARY]
    missing = [str(path) for path in (*libraries, options.device, options.plan) if not path.is_file()]
    if missing:
        return _fail(f"{', '.join(missing)}: no such file; python tests/gpu/prepare.py makes it")
    try:
        plan = json.loads(options.plan.read_text())
        found = {row["key"]: path for path in libraries for row in read_library(path.resolve())}
    except (ValueError, InputError) as error:
        return _fail(f"{error}; python tests/gpu/prepare.py makes it anew")
    try:
        report = Report(options.out, plan["schema"], sorted(found))
    except OSError as error:
        return _fail(f"no results can be written to {options.out}: {error.strerror}; --out names another folder")
    report.facts({"command": " ".join(sys.argv[1:]), "date": datetime.datetime.now(datetime.timezone.utc).isoformat()})
    first = First(options, plan, found, report)
    try:
        first.run(["machine", *(name for name in SECTIONS if name != "machine" and name in (options.only or SECTIONS))])
    except NoDevice as error:
        report.end("failed")
        return _fail(f"no GPU can be used here: {error}")
    report.complete()
    print(f"{report.failures} failed; results in {report.path}")
    return report.failures > 0


if __name__ == "__main__":
    sys.exit(main())
