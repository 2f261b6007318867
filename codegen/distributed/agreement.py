"""Ranks agree on their arguments before they exchange anything, and tell each other what they did when that fails.

A new set of arguments is gathered from all ranks, as JSON: what is wrong on one rank alone is told to the others there,
so nobody waits for it. Of a set that is known ranks compare a digest of it and of the call's number, by one
`all_reduce` of two numbers, and gather where it isn't the same on all of them: they disagree then, one has a fault, the
set is new, or one rank has counted other calls; after that their numbers are equal again. Nothing else can be compared
before an exchange whose sizes may not fit. On GPUs ranks would have to wait for the device to read it: there known sets
are compared where ``GNAFORGE_CHECK_RANKS`` is set, and else taken for those of all.

A rank that dies, or whose arguments differ where nobody compares them, lets the transport fail: at once, or after the
group's timeout. Ranks then leave word in the store of the default process group, wait a few seconds for that of others,
and raise one line of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed's, which types don't see there

_BACKWARD = "backward pass"
_PATIENCE = 3.0  # seconds that others have to say what they were doing

Group = dist.ProcessGroup
Signature = Mapping[str, Any]


@dataclass(frozen=True)
class Caller:
    """Who computes a call.

    Attributes:
        name: of the function that was called, for errors.
        group: all ranks that compute it; None for one.
        device: the type of its tensors' device.
        number: of the call among those of its ranks; 0 until they agree.
    """

    name: str
    group: Group | None
    device: str
    number: int = 0

    @property
    def compares(self) -> bool:
        """Whether ranks compare arguments at each call."""
        return self.device == "cpu" or _is_switched_on()

    @contextmanager
    def speaks(self) -> Iterator[None]:
        """Errors within are this call's, also where autograd runs backward passes of several."""
        token = _caller.set(self)
        try:
            yield
        finally:
            _caller.reset(token)


_caller: ContextVar[Caller] = ContextVar("gnaforge_caller")

# Digests of what ranks agree on. A group that is kept past its end aborts the process.
_agreed: WeakKeyDictionary[Group, dict[str, int]] = WeakKeyDictionary()
_numbers: WeakKeyDictionary[Group, int] = WeakKeyDictionary()
_calls = count()
_last: dict[str, Any] = {}
_Word = tuple[str, str | None, int]  # a rank's text and fault, and the number that its next call has
_words: list[tuple[Store, str]] = []  # that this rank has left, with their keys


class RankError(RuntimeError):
    """Ranks that compute one call disagree, or one of them is gone."""


@cache
def _is_switched_on() -> bool:
    """Read once: ranks that compare wait for those that do."""
    return os.environ.get("GNAFORGE_CHECK_RANKS", "0") not in ("", "0")


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Ends a call that would wait for other ranks' words, where a CUDA graph records what it does.

    Raises:
        RankError: a graph is captured.
    """
    if _is_capturing():
        raise RankError(
            f"{_caller.get().name}: ranks can't agree on arguments while a CUDA graph is captured; call it once before "
            "that, with the same arguments"
        )


def agree(signature: Signature, caller: Caller, fault: str | None = None) -> Caller:
    """Returns the caller with the call's number on all ranks of a call, or raises on all of them; on GPUs without
    ``GNAFORGE_CHECK_RANKS``, and while a graph is captured, arguments that ranks have agreed on before are taken for
    those of all.

    Args:
        signature: what must be equal on all ranks, as JSON has it; nothing that a right program has otherwise, such as
            a shard's own size.
        caller: who computes the call, several ranks.
        fault: what is wrong on this rank.

    Raises:
        RankError: ranks differ, one has a fault, or one doesn't answer within the group's timeout.
    """
    name, group = caller.name, caller.group
    assert group is not None
    text = json.dumps({**signature, "GNAFORGE_CHECK_RANKS": caller.compares})
    while _words:  # of an error that somebody has caught
        store, key = _words.pop()
        with suppress(RuntimeError, dist.DistError):  # the store may have ended with the groups of then
            store.delete_key(key)
    known = _agreed.setdefault(group, {})
    if text in known and (not caller.compares or _is_capturing()):
        _note_call(signature)
        if fault:  # the others are in their exchange: they read it when that ends
            _leave_word(group, "checking its arguments", fault)
            raise RankError(f"{name}: {fault}")
        return _numbered(caller, _next_number(group))
    everyone = _exchange_words(caller, text, fault, signature)
    if everyone is None:
        return _numbered(caller, _next_number(group))
    _raise_faults(caller, everyone)
    states = {rank: json.loads(each) for rank, (each, *_) in enumerate(everyone)}
    if differences := _differences(states):
        raise RankError(f"{name}: ranks disagree on {differences}")
    known[text] = _digest(text)
    return _numbered(caller, max(number for *_, number in everyone))


def _raise_faults(caller: Caller, everyone: list[_Word]) -> None:
    if faults := [fault for _, fault, _ in everyone if fault]:
        raise RankError(f"{caller.name}: {'; '.join(faults)}")


def _next_number(group: Group) -> int:
    return _numbers.get(group, 0) + 1


def _numbered(caller: Caller, number: int) -> Caller:
    assert caller.group is not None
    _numbers[caller.group] = number
    return replace(caller, number=number)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 | 1


def follow(caller: Caller, step: str) -> None:
    """Returns on all ranks that are in the same step of a backward pass, or raises on all of them. Where ranks compare
    no arguments they don't compare this either.

    Raises:
        RankError: they are in those of different calls, one has a fault in its call, or one doesn't answer within the
            group's timeout.
    """
    group = caller.group
    if group is None or not caller.compares or _is_capturing():
        return
    text = json.dumps({"function": caller.name, _BACKWARD: f"of call {caller.number}, {step}"})
    with explain("comparing backward passes", group):
        everyone = _compare(caller, text, _digest(text), None)
    if everyone is not None:
        _raise_faults(caller, everyone)
        states = {rank: json.loads(each) for rank, (each, *_) in enumerate(everyone)}
        raise RankError(f"{caller.name}: ranks disagree on {_differences(states) or 'the step that they are in'}")


def announce(fault: str, caller: Caller) -> None:
    """Tells ranks that agree on their arguments now that this one has none that can be.

    Raises:
        RankError: they don't: one doesn't answer within the group's timeout.
    """
    assert caller.group is not None
    _exchange_words(caller, "", f"rank {dist.get_rank(caller.group)}: {fault}", {})


def _note_call(signature: Signature) -> None:
    _last.clear()
    _last.update(call=next(_calls), **signature)


def _exchange_words(caller: Caller, text: str, fault: str | None, signature: Signature) -> list[_Word] | None:
    """All ranks' words; None where each has this text, which is known, the same number, and no fault."""
    group = caller.group
    assert group is not None
    _note_call(signature)
    known = _agreed.get(group)
    with caller.speaks(), explain("agreeing on arguments", group, fault):
        refuse_capture()
        if known and caller.compares:
            digest = 0 if fault or text not in known else known[text] ^ _next_number(group) << 1
            return _compare(caller, text, digest, fault)
        return _gather_words(caller, text, fault)


def _compare(caller: Caller, text: str, digest: int, fault: str | None) -> list[_Word] | None:
    """All ranks' words; None where each has this digest, which isn't 0."""
    both = torch.tensor([digest, -digest], device=caller.device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=caller.group)
    most, least = both.tolist()
    return None if digest and most == -least else _gather_words(caller, text, fault)


def _gather_words(caller: Caller, text: str, fault: str | None) -> list[_Word]:
    assert caller.group is not None
    everyone: list[Any] = [None] * dist.get_world_size(caller.group)
    dist.all_gather_object(everyone, (text, fault, _next_number(caller.group)), group=caller.group)
    return everyone


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
    except Exception as error:  # whatever it is, others wait for this rank; it goes on to the caller
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
    names = dict.fromkeys(name for state in states.values() for name in state)
    for name in [_BACKWARD] if _BACKWARD in names else names:  # ranks in other passes differ in all else
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
