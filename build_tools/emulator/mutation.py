"""Kernels with one synchronising instruction taken out or weakened: the emulator ought to notice each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_NOTHING = "pmevent 0;"  # what a dropped instruction's guard is left with
_PREDICATE = r"(?P<predicate>[%\w]+)"


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        line: of the instruction in the text; lines keep their numbers.
        instruction: as it was.
        change: what was done to it.
        rule: why that is wrong.
        text: the whole module.
    """

    line: int
    instruction: str
    change: str
    rule: str
    text: str


@dataclass(frozen=True)
class _Rule:
    pattern: str
    change: str
    rule: str
    replacement: Callable[[re.Match[str]], str] = lambda _: _NOTHING


def _plus_one(match: re.Match[str]) -> str:
    return f"{match['before']}{int(match['number']) + 1};"


# What is not here, because nothing in the emulator depends on it: fences between threads, and of mbarrier.init.
_OBSERVE = "what others wrote may be used only after its phase was observed"
_ACCUMULATORS = "registers of a wgmma may be touched only after wgmma.wait_group"
_RULES = (
    _Rule(
        rf"mbarrier\.(try|test)_wait[^;]*?\s{_PREDICATE}\s*,[^;]*;",
        "wait dropped",
        _OBSERVE,
        lambda match: f"setp.eq.u32 {match['predicate']}, 0, 0;",
    ),
    _Rule(r"mbarrier\.arrive\.(?![^;]*expect_tx)[^;]*;", "arrival dropped", "the phase can't end without its arrivals"),
    _Rule(
        r"(?P<head>mbarrier\.arrive)(?P<between>[^;\s]*?)\.expect_tx(?P<rest>[^;]*\]),[^;]*;",
        "expected bytes dropped",
        "a phase has to wait for the bytes of its copies",
        lambda match: f"{match['head']}{match['between']}{match['rest']};",
    ),
    _Rule(r"mbarrier\.init[^;]*;", "initialisation dropped", "an mbarrier must be initialised"),
    _Rule(
        r"(?P<before>wgmma\.wait_group\.sync\.aligned\s+)(?P<number>\d+);",
        "waits for one group less",
        _ACCUMULATORS,
        _plus_one,
    ),
    _Rule(r"wgmma\.wait_group[^;]*;", "wait dropped", _ACCUMULATORS),
    _Rule(r"wgmma\.commit_group[^;]*;", "commit dropped", "wgmma.wait_group waits for committed groups only"),
    _Rule(r"wgmma\.fence[^;]*;", "fence dropped", "wgmma.fence orders register accesses before wgmma.mma_async"),
    _Rule(r"fence\.proxy\.async[^;]*;", "fence dropped", "the async proxy needs a fence to see generic writes"),
    _Rule(r"\bbar(rier)?(\.cta)?\.sync[^;]*;", "barrier dropped", "threads must meet where they share memory"),
    _Rule(r"\bbar(rier)?(\.cta)?\.arrive[^;]*;", "arrival dropped", "a barrier needs all of its threads"),
    _Rule(r"cp\.async\.bulk\.commit_group[^;]*;", "commit dropped", "wait_group waits for committed groups only"),
    _Rule(
        r"cp\.async\.bulk\.wait_group[^;]*;",
        "wait dropped",
        "the source of a bulk store may change only after its read was waited for",
    ),
    _Rule(r"tcgen05\.commit[^;]*;", "commit dropped", "only tcgen05.commit tells when an MMA is done"),
    _Rule(r"tcgen05\.wait::st[^;]*;", "wait dropped", "tcgen05.st is done only after tcgen05.wait::st"),
    _Rule(r"tcgen05\.wait::ld[^;]*;", "wait dropped", "tcgen05.ld is done only after tcgen05.wait::ld"),
    _Rule(r"tcgen05\.alloc[^;]*;", "allocation dropped", "tensor memory must be allocated"),
    _Rule(r"tcgen05\.dealloc[^;]*;", "deallocation dropped", "tensor memory must be freed before the kernel ends"),
)


def mutants(text: str) -> Iterator[Mutant]:
    """Every synchronising instruction of a module, taken out or weakened in turn."""
    comments = [match.span() for match in re.finditer(r"//[^\n]*", text)]
    for rule in _RULES:
        for match in re.finditer(rule.pattern, text):
            if any(start <= match.start() < end for start, end in comments):
                continue
            lines = "\n" * match[0].count("\n")
            yield Mutant(
                line=text.count("\n", 0, match.start()) + 1,
                instruction=" ".join(match[0].split()),
                change=rule.change,
                rule=rule.rule,
                text=f"{text[: match.start()]}{rule.replacement(match)}{lines}{text[match.end() :]}",
            )
