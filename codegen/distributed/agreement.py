"""Ranks agree on their arguments before they exchange anything, and tell each other what they did when that fails.

An agreement is one `all_gather_object` for each new set of arguments: later calls look it up. What is wrong on one rank
alone is told to the others there, so nobody waits for it.

A rank that dies, or one whose arguments differ later on, lets the transport fail: at once, or after the group's
timeout. Ranks then leave word in the store of the default process group, wait a few seconds for that of others, and
raise one line of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed's, which types don't see there

_PATIENCE = 3.0  # seconds that others have to say what they were doing

Group = dist.ProcessGroup
Signature = Mapping[str, Any]


@dataclass(frozen=True)
class Caller:
    """Who computes a call.

    Attributes:
        name: of the function that was called, for errors.
        group: all ranks that compute it; None for one.
    """

    name: str
    group: Group | None

    @contextmanager
    def speaks(self) -> Iterator[None]:
        """Errors within are this call's, also where autograd runs backward passes of several."""
        token = _caller.set(self)
        try:
            yield
        finally:
            _caller.reset(token)


_caller: ContextVar[Caller] = ContextVar("gnaforge_caller")

# A group that is kept past its end aborts the process.
_agreed: WeakKeyDictionary[Group, set[str]] = WeakKeyDictionary()
_calls = count()
_last: dict[str, Any] = {}
_words: list[tuple[Store, str]] = []  # that this rank has left, with their keys


class RankError(RuntimeError):
    """Ranks that compute one call disagree, or one of them is gone."""


def refuse_capture() -> None:
    """Ends a call that would wait for other ranks' words, where a CUDA graph records what it does.

    Raises:
        RankError: a graph is captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RankError(
            f"{_caller.get().name}: ranks can't agree on arguments while a CUDA graph is captured; call it once before "
            "that, with the same arguments"
        )


def agree(signature: Signature, caller: Caller, fault: str | None = None) -> None:
    """Returns on all ranks of a call, or raises on all of them.

    Args:
        signature: what must be equal on all ranks, as JSON has it; nothing that a right program has otherwise, such as
            a shard's own size: ranks must ask for a new agreement at the same call.
        caller: who computes the call, several ranks.
        fault: what is wrong on this rank.

    Raises:
        RankError: ranks differ, one has a fault, or one doesn't answer within the group's timeout.
    """
    name, group = caller.name, caller.group
    assert group is not None
    text = json.dumps(signature)
    while _words:  # of an error that somebody has caught
        store, key = _words.pop()
        with suppress(RuntimeError, dist.DistError):  # the store may have ended with the groups of then
            store.delete_key(key)
    _last.clear()
    _last.update(call=next(_calls), **signature)
    known = _agreed.setdefault(group, set())
    if text in known:
        if fault:  # the others are in their exchange: they read it when that ends
            _leave_word(group, "checking its arguments", fault)
            raise RankError(f"{name}: {fault}")
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with caller.speaks(), explain("agreeing on arguments", group):
        refuse_capture()
        dist.all_gather_object(everyone, (text, fault), group=group)
    if faults := [each for _, each in everyone if each]:
        raise RankError(f"{name}: {'; '.join(faults)}")
    states = {rank: json.loads(each) for rank, (each, _) in enumerate(everyone)}
    if differences := _differences(states):
        raise RankError(f"{name}: ranks disagree on {differences}")
    known.add(text)


def announce(fault: str, caller: Caller) -> None:
    """Tells ranks that agree on their arguments now that this one has none that can be.

    Raises:
        RankError: they don't: one doesn't answer within the group's timeout.
    """
    group = caller.group
    assert group is not None
    _last.clear()
    _last.update(call=next(_calls))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    own = f"rank {dist.get_rank(group)}: {fault}"
    with caller.speaks(), explain("agreeing on arguments", group, own):
        dist.all_gather_object(everyone, ("", own), group=group)


@contextmanager
def report(caller: Caller) -> Iterator[None]:
    """Leaves word of an error within, for ranks that wait for this one in vain: around each forward and backward
    pass."""
    group = caller.group
    try:
        with caller.speaks():
            yield
    except RankError:
        raise
    except Exception as error:
        if group is not None:
            with suppress(RuntimeError, dist.DistError):  # the store's host may be gone; the error is what matters
                text = (str(error).splitlines() or [""])[0]
                _leave_word(group, "computing", f"rank {dist.get_rank(group)}: {type(error).__name__}: {text}")
        raise


@contextmanager
def explain(doing: str, group: Group, fault: str | None = None) -> Iterator[None]:
    """Turns a failure of the transport between the ranks of ``group``, all of the caller's or some, into a `RankError`
    that says what they were doing, and which ``fault`` this one has."""
    try:
        yield
    except RankError:
        raise
    except (RuntimeError, dist.DistError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        name, words = _caller.get().name, _inquest(doing, group, fault)
        raise RankError(f"{name}: {words} (the transport: {said[0][:120]})") from error


def _inquest(doing: str, group: Group, fault: str | None) -> str:
    """Words for a failure, of all ranks that say something. Those of the group are waited for; others of the caller's
    may know of a fault, and may not have met it yet. All are numbered as the caller's."""
    team = _caller.get().group or group
    own, everyone = dist.get_rank(team), range(dist.get_world_size(team))
    waited = {dist.get_group_rank(team, rank) for rank in dist.get_process_group_ranks(group)}
    states: dict[int, dict[str, Any]] = {}
    with suppress(RuntimeError, dist.DistError):  # whoever held the store is gone: only what is known here can be said
        store = _leave_word(team, doing, fault)
        end = time.monotonic() + _PATIENCE
        for rank in sorted(everyone, key=lambda rank: rank not in waited):
            while not (there := store.check([str(rank)])) and rank in waited and time.monotonic() < end:
                time.sleep(0.05)
            if there:
                states[rank] = json.loads(store.get(str(rank)))
    states = dict(sorted(states.items()))
    faults = [text for state in states.values() if (text := state.pop("fault"))]
    parts = faults or [f"{doing} failed on rank {own}"]
    if silent := [str(rank) for rank in sorted(waited - states.keys())]:
        parts.append(f"no word from rank{'s' * (len(silent) > 1)} {','.join(silent)}")
    if not faults and (differences := _differences(states)):
        parts.append(f"ranks disagree on {differences}")
    return "; ".join(parts)


def _leave_word(group: Group, doing: str, fault: str | None) -> Store:
    ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
    # torch has no public way to it.
    store = PrefixStore(f"gnaforge/{ranks}", dist.distributed_c10d._get_default_store())
    own = str(dist.get_rank(group))
    store.set(own, json.dumps({"fault": fault, "doing": doing, **_last}))
    _words.append((store, own))
    return store


def _differences(states: Mapping[int, Signature]) -> str:
    """Fields in which ranks differ, each with who has which value; empty if there is none."""
    found = []
    for name in dict.fromkeys(name for state in states.values() for name in state):
        by_value: dict[str, list[int]] = {}
        for rank, state in states.items():
            by_value.setdefault(json.dumps(state.get(name)), []).append(rank)
        if len(by_value) > 1:
            who = (
                f"{value} on rank{'s' * (len(ranks) > 1)} {','.join(map(str, ranks))}"
                for value, ranks in by_value.items()
            )
            found.append(f"{name}: {', '.join(who)}")
    return "; ".join(found)
