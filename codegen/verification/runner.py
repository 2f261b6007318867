"""Verifies kernels: builds them in emulated form, runs each on problems under schedules, gathers what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.config import KernelConfig
from ..runtime.op_table import random_lengths
from ..runtime.problem import Problem
from .counters import WorkCounters, count_work
from .kinds import LAYOUTS, POISONS, Comparison, Device
from .problems import count_call_tiles
from .process import Worker, WorkerError
from .schedules import Schedule

_DRAWS = 20  # tries per random problem that a kernel has to take
_UNTRIED = frozenset({"refused", "library", "reference"})  # failures that say nothing of what a kernel computes
_LATE = "exact attention of this problem takes longer than --timeout {}; use --max-tiles or fewer tokens"


@dataclass(frozen=True)
class Settings:
    """The settings of a verification.

    Attributes:
        schedules: for kernels on the emulator.
        seed: of the tensors' values.
        gaps: also run with the other layouts of the tensors, with gaps between tokens, heads and channels.
        poison: also run with NaN where it must not matter: see `kinds.POISONS`.
        trace: errors come with the last events of each warp.
        timeout: seconds that one run may take.
    """

    schedules: Sequence[Schedule]
    seed: int = 0
    gaps: bool = True
    poison: bool = True
    trace: bool = False
    timeout: float = 600.0


@dataclass
class ProblemResult:
    """Findings on a kernel and one problem.

    Attributes:
        problem: it.
        cut_from: the problem as given, if it was cut down.
        data_seed: of the tensors' values.
        runs: how often the kernel ran.
        failed: None, or in which way it is wrong: ``emulator`` (a rule of PTX is broken, or it hangs), ``wrong``
            (numerics), ``unwritten``, ``guard``, ``repeat`` (another run gives other bits), ``poison`` (what must not
            matter does), ``list`` (in a list with another call it gives other bits), ``threads`` (on several threads it
            does), ``tiles`` (other tiles than the simulator's model has), ``launch``, ``crash``; or why it could not be
            tried: ``library``, ``refused``, ``reference`` (exact attention takes too long).
        message: on failure, everything that is known.
        schedule: on failure, under which one; None for kernels on the CPU.
        layout: on failure, of the tensors.
        errors: of each result that of the run where it takes most of its bound, by role.
        identical: whether all runs gave the same bits.
        counters: of the first run; None for kernels on the CPU.
        model: visited and interior tiles by the simulator's model; None where nothing was counted.
    """

    problem: Problem
    cut_from: Problem | None = None
    data_seed: int = 0
    runs: int = 0
    failed: str | None = None
    message: str = ""
    schedule: Schedule | None = None
    layout: str = ""
    errors: dict[str, Comparison] = field(default_factory=dict)
    identical: bool = True
    counters: WorkCounters | None = None
    launches: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        data: dict[str, Any] = {
            "problem": self.problem.as_json(),
            "cut_from": self.cut_from.as_json() if self.cut_from else None,
            "data_seed": self.data_seed,
            "runs": self.runs,
            "failed": self.failed,
        }
        if self.failed:
            data.update(message=self.message, layout=self.layout)
            data["schedule"] = vars(self.schedule) if self.schedule else None
        else:
            data.update(**self.errors, identical=self.identical)
        data["counters"] = self.counters.as_json() if self.counters else None
        data["launches"] = [{k: v for k, v in launch.items() if k != "opcodes"} for launch in self.launches]
        data["model"] = self.model
        return data


@dataclass
class KernelResult:
    """Findings on one kernel. ``note`` says what could not be tried, if anything."""

    config: KernelConfig
    library: Path | None
    device: Device = "cpu"
    problems: list[ProblemResult] = field(default_factory=list)
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether it ran, and everything was right."""
        return bool(self.problems) and not any(result.failed for result in self.problems)

    @property
    def wrong(self) -> bool:
        """Whether it ran, and something was wrong. A kernel is neither good nor wrong if it could not be tried."""
        return any(result.failed and result.failed not in _UNTRIED for result in self.problems)

    @property
    def emulated(self) -> bool:
        """Whether it ran in the emulator."""
        return self.device == "emulator"

    @property
    def runs(self) -> int:
        """Runs of all problems."""
        return sum(result.runs for result in self.problems)

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "key": self.config.key,
            "library": str(self.library) if self.library else None,
            "emulated": self.emulated,
            "good": self.good,
            "wrong": self.wrong,
            "note": self.note,
            "problems": [result.as_json() for result in self.problems],
        }


@dataclass(frozen=True)
class _Run:
    schedule: Schedule | None
    layout: str
    poison: tuple[str, ...] = ()
    last: bool = False


def _runs(settings: Settings, device: Device) -> Iterable[_Run]:
    """Layouts take turns over the schedules: each schedule is tried once, the first two layouts at least once. Without
    schedules each layout is. The last run is also poisoned, and run as a list and on several threads."""
    layouts = LAYOUTS if settings.gaps else LAYOUTS[:1]
    schedules: Sequence[Schedule | None] = settings.schedules if device == "emulator" else [None]
    count = max(len(schedules), min(len(layouts), 2) if device == "emulator" else len(layouts))
    for i in range(count):
        poison = tuple(POISONS) if settings.poison and i == count - 1 else ()
        yield _Run(schedules[i % len(schedules)], layouts[i % len(layouts)], poison, i == count - 1)


class Verifier:
    """One kernel in a process of its own, which is started anew when it crashed.

    Args:
        config, library: the kernel, and the library that holds it.
        settings: how to verify.
        progress: called after each run.
    """

    def __init__(
        self, config: KernelConfig, library: Path, settings: Settings, progress: Callable[[], None] = lambda: None
    ) -> None:
        self.result = KernelResult(config, library)
        self._library, self._settings, self._progress = library, settings, progress
        self._worker: Worker | None = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def _ask(self, **what: Any) -> dict[str, Any]:
        try:
            if self._worker is None:
                self._worker = Worker()
                opened = self._worker.open(self._settings.timeout, self._library, self.result.config.key)
                if "failed" in opened:
                    return opened
                self.result.device = opened["device"]
            said = self._worker.request(self._settings.timeout, **what)
            if said.get("ended"):
                self.close()
            return said
        except WorkerError as error:
            self.close()
            return {"failed": "crash", "message": str(error)}

    def verify(self, problem: Problem, cut_from: Problem | None = None) -> ProblemResult:
        """Runs the kernel on a problem until something is wrong. The result joins those of the kernel."""
        found = ProblemResult(problem, cut_from, self._settings.seed)
        opened = self._ask(do="ready")  # starts the process, which says whether the kernel is an emulated one
        if "failed" in opened:
            found.failed, found.message = opened["failed"], opened["message"]
        else:
            self._try_all(found)
        if found.failed != "refused":
            self.result.problems.append(found)
        return found

    def _prepare(self, found: ProblemResult) -> bool:
        """Has exact attention computed, which takes longer than the kernel does where this runs on the CPU itself."""
        problem = found.problem.as_json()
        said = self._ask(do="prepare", problem=problem, seed=found.data_seed, late=_LATE)
        if "failed" in said:
            found.failed, found.message = "reference", said["message"]
        return not found.failed

    def _try_all(self, found: ProblemResult) -> None:
        if not self._prepare(found):
            return
        digests = set()
        for run in _runs(self._settings, self.result.device):
            said = self._ask(
                do="verify",
                problem=found.problem.as_json(),
                seed=found.data_seed,
                layout=run.layout,
                poison=run.poison,
                together=run.last,
                threads=run.last,
                adds=run.last,
                schedule=run.schedule.as_json(self._settings.trace) if run.schedule else None,
            )
            found.runs += said.get("runs", 1)
            self._progress()
            found.schedule, found.layout = run.schedule, run.layout
            if "refused" in said:
                found.failed, found.message = "refused", said["refused"]
            elif "failed" in said:
                found.failed, found.message = said["failed"], said["message"]
            elif found.counters is None and said["launches"]:
                self._count(found, said["launches"])
            if found.failed:
                return
            for name, one in said["errors"].items():
                if name not in found.errors or one["share"] > found.errors[name]["share"]:
                    found.errors[name] = one
            digests.add(said["digest"])
        found.identical = len(digests) == 1

    def _count(self, found: ProblemResult, launches: list[dict[str, Any]]) -> None:
        found.launches = launches
        found.counters = count_work(launches)
        if not found.counters.tiles:
            return
        lengths = random_lengths(found.problem, found.data_seed)
        found.model = count_call_tiles(found.problem, self.result.config, lengths)
        counted = {"visited": found.counters.tiles, "interior": found.counters.interior_tiles}
        if counted != found.model:
            found.failed = "tiles"
            found.message = f"the kernel went through {counted}, the simulator's model has {found.model}"

    def verify_random(self, draw: Callable[[int], Problem], count: int, first_seed: int) -> None:
        """Verifies ``count`` problems that ``draw`` makes of seeds; those that the kernel refuses are left out."""
        seed = first_seed
        for _ in range(count):
            for _ in range(_DRAWS):
                found = self.verify(draw(seed))
                seed += 1
                if found.failed != "refused":
                    break
            else:
                self.result.note = f"refused {_DRAWS} random problems in a row, the last one because {found.message}"
                return
