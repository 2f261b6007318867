"""Runs all mutants of a kernel and sets what the emulator notices against what PTX's rules make wrong."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .evidence import Evidence, Verdict
from .module import EmulationError, Module, Options, load
from .mutation import Mutant, mutants
from .recording import record_launches

Run = Callable[[Module, Options], bool]
"""Launches a module under a schedule; whether its results are right."""

FIXED = (Options("eager"), Options("lazy", "depth-first"), Options("lazy"))
RECORDED = (*FIXED, Options("random", "random", 100), Options("random", "random", 101))
TRIED = (*FIXED, *(Options("random", "random", seed) for seed in range(6)))


@dataclass(frozen=True)
class Outcome:
    """One mutant: its class, decided before it ran, and how it was noticed (empty: it survived)."""

    mutant: Mutant
    verdict: Verdict
    noticed: str


@dataclass(frozen=True)
class Survey:
    """The fates of a kernel's mutants."""

    outcomes: tuple[Outcome, ...]

    def of(self, *, wrong: bool, noticed: bool | None = None) -> list[Outcome]:
        """Mutants that the runs reached, by class and fate."""
        reached = (o for o in self.outcomes if o.verdict.reached and o.verdict.wrong == wrong)
        return [o for o in reached if noticed is None or bool(o.noticed) == noticed]

    @property
    def share(self) -> float:
        """Of the mutants that are wrong by a rule, those noticed."""
        return len(self.of(wrong=True, noticed=True)) / max(1, len(self.of(wrong=True)))

    def report(self) -> str:
        """Counts, then every survivor and every harmless mutant with its reason."""
        reached = sum(o.verdict.reached for o in self.outcomes)
        counts = (
            f"{reached} mutants reached, {len(self.outcomes) - reached} not",
            f"wrong by rule {len(self.of(wrong=True))}, of these noticed {len(self.of(wrong=True, noticed=True))}",
            f"harmless by rule {len(self.of(wrong=False))}",
            f"of these noticed all the same {len(self.of(wrong=False, noticed=True))}",
        )
        lines = ["; ".join(counts)]
        for title, chosen in (
            ("wrong, survived", self.of(wrong=True, noticed=False)),
            ("harmless, survived", self.of(wrong=False, noticed=False)),
            ("harmless by rule, but noticed", self.of(wrong=False, noticed=True)),
        ):
            lines += [f"{title}:"] * bool(chosen)
            lines += [f"  {o.mutant}: {o.verdict.reason}{' | ' * bool(o.noticed)}{o.noticed[-240:]}" for o in chosen]
        return "\n".join(lines)


def record(text: str, run: Run, schedules: Sequence[Options] = RECORDED) -> Evidence:
    """What the correct kernel does under a few schedules.

    Raises:
        ValueError: it isn't correct.
    """
    module = load(text)
    recordings = []
    for options in schedules:
        with record_launches() as made:
            if not run(module, options):
                raise ValueError(f"the kernel itself computes something wrong, with {options}")
        recordings.append(made)
    return Evidence(module, text, recordings)


def fate(mutant: Mutant, run: Run, schedules: Sequence[Options] = TRIED) -> str:
    """How the first schedule that notices the mutant does; empty if none does."""
    module = load(mutant.text)
    for options in schedules:
        try:
            if not run(module, options):
                return "wrong results"
        except EmulationError as error:
            return str(error)
    return ""


def survey(
    text: str,
    run: Run,
    *,
    chosen: Callable[[Mutant], bool] = lambda _: True,
    recorded: Sequence[Options] = RECORDED,
    tried: Sequence[Options] = TRIED,
    processes: int = 1,
) -> Survey:
    """Classifies every mutant of a kernel, then runs those that are reached."""
    evidence = record(text, run, recorded)
    judged = [(mutant, evidence.verdict(mutant)) for mutant in mutants(text) if chosen(mutant)]

    def fates(part: int) -> Iterator[tuple[int, str]]:
        for index in range(part, len(judged), processes):
            mutant, verdict = judged[index]
            if verdict.reached:
                yield index, fate(mutant, run, tried)

    found: dict[int, str] = {}
    if processes == 1:
        found.update(fates(0))
    else:
        context = multiprocessing.get_context("fork")  # the kernel's text and problem are there already
        results = context.SimpleQueue()
        workers = [
            context.Process(target=lambda part=part: results.put(list(fates(part)))) for part in range(processes)
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            found.update(results.get())
        for worker in workers:
            worker.join()
    return Survey(tuple(Outcome(m, v, found.get(index, "")) for index, (m, v) in enumerate(judged)))
