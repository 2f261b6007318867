"""The memo of choices: every number of a call is part of its key."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gnaforge.build import abi
from gnaforge.build.identity import template_dir


@pytest.fixture(scope="module")
def library(compile_library: Callable[..., Path]) -> c.CDLL:
    loaded = c.CDLL(str(compile_library("signature.cpp", "signature", "-O1", f"-I{template_dir() / 'core'}")))
    loaded.slot.restype = c.c_uint64
    loaded.slot.argtypes = [c.POINTER(abi.Args), c.c_uint64]
    return loaded


def call(roles: int = len(abi.ROLES)) -> abi.Args:
    """A call with a tensor of every role, and of some that this version doesn't know."""
    problem = abi.Problem(c.sizeof(abi.Problem), 3)
    args = abi.make_args("gna_forward", problem, {}, abi.Host(c.sizeof(abi.Host), 4))
    held = (c.POINTER(abi.Tensor) * roles)()
    for role in range(roles):
        held[role] = c.pointer(abi.Tensor(c.sizeof(abi.Tensor), 1, 256))
    args.tensors, args.roles = held, roles
    return args


def numbers(struct: Any) -> Iterator[tuple[Any, str | int]]:
    """Where a struct has its numbers: object and name or index."""
    for name, kind in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, c.Array):
            yield from ((value, i) for i in range(len(value)))
        elif kind is c.c_void_p or (not hasattr(kind, "contents") and not issubclass(kind, abi.ParallelFor)):
            yield struct, name


def put(at: Any, name: str | int, value: Any) -> None:
    if isinstance(name, int):
        at[name] = value
    else:
        setattr(at, name, value)


def structs(args: abi.Args) -> list[Any]:
    return [args, args.problem.contents, args.host.contents, *(args.tensors[i].contents for i in range(args.roles))]


def test_every_number_counts(library: c.CDLL) -> None:
    changed = 0
    plain = call()
    for which in range(len(structs(plain))):
        for position in range(len(list(numbers(structs(plain)[which])))):
            other = call()
            at, name = list(numbers(structs(other)[which]))[position]
            if name == "roles":
                continue  # says how many tensors there are, each of which counts
            before = at[name] if isinstance(name, int) else getattr(at, name)
            put(at, name, (before or 0) + 1)
            assert not library.same(c.byref(plain), c.byref(other)), (structs(other)[which], name)
            assert library.slot(plain, 1) != library.slot(other, 1)
            changed += 1
    assert changed > 9 + 45 + 26 * 8 - 3
    assert library.same(c.byref(plain), c.byref(call()))
    assert library.slot(plain, 1) != library.slot(plain, 2)


def test_of_an_address_only_its_alignment_counts(library: c.CDLL) -> None:
    plain, other = call(), call()
    other.tensors[0].contents.data += 64
    assert library.same(c.byref(plain), c.byref(other))
    other.tensors[0].contents.data += 32
    assert not library.same(c.byref(plain), c.byref(other))


def test_a_missing_tensor_counts(library: c.CDLL) -> None:
    for role in range(len(abi.ROLES)):
        other = call()
        other.tensors[role] = None
        assert not library.same(c.byref(call()), c.byref(other))


def test_more_tensors_than_there_are_roles_are_refused_and_not_written_past_the_end(library: c.CDLL) -> None:
    assert not library.too_long(c.byref(call(len(abi.ROLES))))
    assert library.too_long(c.byref(call(len(abi.ROLES) + 1)))
    assert library.too_long(c.byref(call(1000)))


def test_slots_are_spread(library: c.CDLL) -> None:
    """Calls that differ in small numbers use most of the memo's 128 slots."""
    rng = Random(0)
    slots = set()
    for _ in range(512):
        args = call(5)
        problem = args.problem.contents
        problem.tokens = abi.I64x3(*(rng.randrange(8, 64) for _ in range(3)))
        problem.batch = rng.choice((1, 2, 4))
        slots.add(library.slot(args, 1) % 128)
    assert len(slots) > 110
