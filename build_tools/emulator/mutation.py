"""Kernels with one synchronising instruction taken out or weakened, and the PTX rule that says why that is wrong.

Whether a mutant breaks its rule in a given run is decided by `evidence`, from recordings of the correct kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_NOTHING = "pmevent 0;"  # what a dropped instruction's guard is left with
_PREDICATE = r"(?P<predicate>[%\w]+)"


@dataclass(frozen=True)
class Rule:
    """A change to one kind of instruction.

    Attributes:
        kind: names the condition in `evidence` under which the mutant is wrong.
        change: what was done.
        section: of the PTX ISA.
        why: what that section says, in a sentence.
        pattern: of the instruction.
        replacement: what takes its place.
    """

    kind: str
    change: str
    section: str
    why: str
    pattern: str
    replacement: Callable[[re.Match[str]], str] = lambda _: _NOTHING


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        line: of the instruction in the text; lines keep their numbers.
        instruction: as it was.
        rule: what was done to it.
        text: the whole module.
    """

    line: int
    instruction: str
    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.line}: {self.instruction[:70]}: {self.rule.change}"


def _plus_one(match: re.Match[str]) -> str:
    return f"{match['before']}{int(match['number']) + 1};"


def _without_release(match: re.Match[str]) -> str:
    return re.sub(r"\.(release|acquire|acq_rel)\b", ".relaxed", match[0], count=1)


RULES = (
    Rule(
        "phase wait",
        "wait dropped",
        "mbarrier.test_wait, mbarrier.try_wait",
        "only a wait that returned true tells that the phase is complete and shows what its arrivals did before",
        rf"mbarrier\.(try|test)_wait[^;]*?\s{_PREDICATE}\s*,[^;]*;",
        lambda match: f"setp.eq.u32 {match['predicate']}, 0, 0;",
    ),
    Rule(
        "arrival",
        "arrival dropped",
        "mbarrier.arrive",
        "a phase is complete only when the pending count is zero, so each arrival of a phase that is waited for counts",
        r"mbarrier\.arrive\.(?![^;]*expect_tx)[^;]*;",
    ),
    Rule(
        "expected bytes",
        "expected bytes dropped",
        "mbarrier.expect_tx",
        "without them the phase can complete before the copies that it tracks have written their bytes",
        r"(?P<head>mbarrier\.arrive)(?P<between>[^;\s]*?)\.expect_tx(?P<rest>[^;]*\]),[^;]*;",
        lambda match: f"{match['head']}{match['between']}{match['rest']};",
    ),
    Rule(
        "initialisation",
        "initialisation dropped",
        "mbarrier.init",
        "any other operation on an mbarrier object that is not initialised is undefined",
        r"mbarrier\.init[^;]*;",
    ),
    Rule(
        "wgmma wait",
        "waits for one group less",
        "wgmma.wait_group",
        "registers of a wgmma, and shared memory that it reads, may be used again only when its group is complete",
        r"(?P<before>wgmma\.wait_group\.sync\.aligned\s+)(?P<number>\d+);",
        _plus_one,
    ),
    Rule(
        "wgmma wait",
        "wait dropped",
        "wgmma.wait_group",
        "registers of a wgmma, and shared memory that it reads, may be used again only when its group is complete",
        r"wgmma\.wait_group[^;]*;",
    ),
    Rule(
        "wgmma wait",
        "commit dropped",
        "wgmma.commit_group",
        "wgmma.wait_group waits for committed groups only",
        r"wgmma\.commit_group[^;]*;",
    ),
    Rule(
        "wgmma fence",
        "fence dropped",
        "wgmma.fence",
        "it must order other accesses to the registers of a wgmma.mma_async before that one",
        r"wgmma\.fence[^;]*;",
    ),
    Rule(
        "proxy fence",
        "fence dropped",
        "membar, fence: fence.proxy.async",
        "it must stand between a generic write and an access of the async proxy to the same bytes",
        r"fence\.proxy\.async[^;]*;",
    ),
    Rule(
        "barrier",
        "barrier dropped",
        "bar, barrier",
        "it orders what its threads did before for all that wait at it, and needs the number of threads given",
        r"\bbar(rier)?(\.cta)?\.sync[^;]*;",
    ),
    Rule(
        "barrier",
        "arrival dropped",
        "bar, barrier",
        "it completes only when the number of threads given has arrived",
        r"\bbar(rier)?(\.cta)?\.arrive[^;]*;",
    ),
    Rule(
        "bulk wait",
        "commit dropped",
        "cp.async.bulk.commit_group",
        "wait_group waits for committed groups only",
        r"cp\.async\.bulk\.commit_group[^;]*;",
    ),
    Rule(
        "bulk wait",
        "wait dropped",
        "cp.async.bulk.wait_group",
        "the source of a bulk store may be written, or its CTA end, only after the reads were waited for",
        r"cp\.async\.bulk\.wait_group[^;]*;",
    ),
    Rule(
        "arrival",
        "commit dropped",
        "tcgen05.commit",
        "only its arrival at the mbarrier tells that the MMAs before are complete",
        r"tcgen05\.commit[^;]*;",
    ),
    Rule(
        "tensor store wait",
        "wait dropped",
        "tcgen05.wait",
        "tcgen05.st is complete only after tcgen05.wait::st",
        r"tcgen05\.wait::st[^;]*;",
    ),
    Rule(
        "tensor load wait",
        "wait dropped",
        "tcgen05.wait",
        "the registers of tcgen05.ld may be used only after tcgen05.wait::ld",
        r"tcgen05\.wait::ld[^;]*;",
    ),
    Rule(
        "always",
        "allocation dropped",
        "tcgen05.alloc",
        "tensor memory must be allocated before use",
        r"tcgen05\.alloc[^;]*;",
    ),
    Rule(
        "always",
        "deallocation dropped",
        "tcgen05.dealloc",
        "all tensor memory must be freed before the kernel ends",
        r"tcgen05\.dealloc[^;]*;",
    ),
    Rule(
        "always",
        "wait dropped",
        "griddepcontrol",
        "a launch that may begin early sees what launches before it wrote only after the wait",
        r"griddepcontrol\.wait;",
    ),
    Rule(
        "initialisation fence",
        "fence dropped",
        "membar, fence: fence.mbarrier_init",
        "it makes mbarrier.init visible beyond the thread: to other CTAs and to copies that complete there",
        r"fence\.mbarrier_init[^;]*;",
    ),
    Rule(
        "tensor fence",
        "fence dropped",
        "tcgen05.fence",
        "tcgen05 operations of different threads are ordered only if both sides of their synchronisation are fenced",
        r"tcgen05\.fence[^;]*;",
    ),
    Rule(
        "thread fence",
        "fence dropped",
        "membar, fence: Memory Consistency Model",
        "a relaxed flag shows what was written before it only through a fence, on both sides",
        r"(?:membar\.|fence\.(?:acq_rel|sc|acquire|release))[^;]*;",
    ),
    Rule(
        "thread fence",
        "made relaxed",
        "Memory Consistency Model: release and acquire patterns",
        "a relaxed operation doesn't order what was written before, or is read after",
        r"\b(?:ld|st|atom|red|mbarrier\.\w+)\.(?:\w+\.)*?(?:release|acquire|acq_rel)\.[^;]*;",
        _without_release,
    ),
)


def mutants(text: str) -> Iterator[Mutant]:
    """Every synchronising instruction of a module, taken out or weakened in turn."""
    comments = [match.span() for match in re.finditer(r"//[^\n]*", text)]
    for rule in RULES:
        for match in re.finditer(rule.pattern, text):
            if any(start <= match.start() < end for start, end in comments):
                continue
            lines = "\n" * match[0].count("\n")
            yield Mutant(
                line=text.count("\n", 0, match.start()) + 1,
                instruction=" ".join(match[0].split()),
                rule=rule,
                text=f"{text[: match.start()]}{rule.replacement(match)}{lines}{text[match.end() :]}",
            )
