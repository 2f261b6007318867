"""Calls of an emulated kernel through the C contract: with extra keys, one by one and in lists.

Use: ``python sm90_calls.py LIBRARY KEY CHECK``, in a process of its own: the stand-in reads its settings once, of which
GNAFORGE_EMULATOR_MEMORY must be ``mapped``.
"""

from __future__ import annotations

import ctypes as c
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gnaforge.build import abi
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel, LaunchError, Refused
from gnaforge.verification.emulator import Emulator
from gnaforge.verification.entry import Call
from gnaforge.verification.problems import for_kernel, tile_counts
from gnaforge.verification.schedules import Schedule

Tensors = Mapping[str, torch.Tensor]


class Calls:
    """A kernel, and how its launches are scheduled: as ``verification.schedules.Schedule.as_json`` says."""

    def __init__(self, library: str, key: str, schedule: dict[str, Any]) -> None:
        self.kernel = Kernel(Path(library), key)
        self.emulator = Emulator(self.kernel, ())
        self._schedule = schedule

    def prepare(self, problem: Problem, tensors: Tensors) -> Call:
        """A call on tensors by role, as the kernel takes it.

        Raises:
            Refused: it doesn't; says why.
        """
        call = self.kernel.prepare_call(problem, {"lse": tensors["q"][..., 0].float(), **tensors})
        if "lse" not in tensors:  # the harness knows none that goes without
            call.args.tensors[abi.ROLES.index("lse")] = c.POINTER(abi.Tensor)()
        call.held = tensors  # as long as the call, they stay
        return call

    def run(self, *calls: Call, together: bool = False) -> list[dict[str, Any]]:
        """Runs calls one after the other, or together; returns what was counted of each launch.

        Raises:
            LaunchError: the kernel broke a rule; says which.
        """
        self.emulator.start(self._schedule)
        try:
            for one in [self.kernel.prepare_list(calls)] if together else calls:
                assert one.workspace_bytes == 0
                one.run(None, None)
        except LaunchError as error:
            raise LaunchError("\n".join(self.emulator.messages()) or str(error)) from error
        return self.emulator.launches()

    def q_tiles(self, problem: Problem) -> int:
        """Q tiles of one batch entry and all heads."""
        config = self.kernel.config
        return tile_counts(problem, config).q_tiles * problem.heads // config.q_tile_heads

    @property
    def padded_rows(self) -> int:
        """Rows of the products for one Q tile."""
        return -(-self.kernel.config.q_rows // 64) * 64

    @property
    def folds(self) -> bool:
        """Whether heads fold into channels, so that batch entries of rank 3 share maps."""
        config = self.kernel.config
        dims = config.head_dim, config.value_head_dim or config.head_dim
        return config.q_tile_heads == 1 and all(dim % 64 == 0 for dim in dims)


def tensors_of(problem: Problem, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a problem without lengths, and room for its results."""
    inputs = {name: x for name, x in FORWARD.random_inputs(problem, seed).items() if x.is_floating_point()}
    results = {
        role.name: torch.full(role.shape(problem), torch.nan, dtype=role.dtype(problem).torch)
        for role in FORWARD.outputs
    }
    return {**inputs, **results}


def some_heads(tensors: Tensors, first: int, count: int, group: int) -> dict[str, torch.Tensor]:
    """Heads of all tensors of a call: ``count`` of K and V from ``first`` on, and their ``group`` of Q each."""
    found = {}
    for name, tensor in tensors.items():
        scale = group if name in ("q", "out", "lse") else 1
        no_heads = tensor.dim() == 1
        found[name] = tensor if no_heads else tensor.narrow(-1 if name == "lse" else -2, scale * first, scale * count)
    return found


def require_right(problem: Problem, tensors: Tensors) -> None:
    """Results are as near to exact ones as rounding allows."""
    exact = FORWARD.exact(problem, tensors)
    bounds = FORWARD.bound(problem, tensors, exact, rounds_probabilities=True)
    for name, wanted in exact.items():
        error = (tensors[name].double() - wanted).abs()
        assert bool((error <= bounds[name]).all()), f"{problem}: {name} is off by {float(error.max()):.2g}"


def small(calls: Calls, **fields: Any) -> Problem:
    """A problem of the kernel's rank and head dims."""
    shapes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
        1: ((150,), (40,)),
        2: ((12, 13), (5, 6)),
        3: ((5, 6, 7), (3, 4, 3)),
    }
    tokens, window = shapes[calls.kernel.config.rank]
    pattern: dict[str, Any] = {"tokens": tokens, "window": window, "batch": 2, "heads": 4, "kv_heads": 2}
    return for_kernel(Problem(**{**pattern, **fields}), calls.kernel.config)


def check_lengths(calls: Calls) -> None:
    """No key, one, some, whole tiles and all of them count, of each batch entry others; and with less and more than
    there are."""
    columns = calls.kernel.config.kv_columns
    tokens = 2 * columns + 5
    ends = (0, 1), (columns, tokens), (columns + 1, columns - 1), (-2 * columns, tokens + 100), (2 * columns, 0)
    for lengths in ends:
        for pieces in (1, 2):
            problem = small(calls, extra_tokens=(tokens, columns)[:pieces])
            tensors = tensors_of(problem)
            tensors["extra_lengths"] = torch.tensor(lengths, dtype=torch.int32)
            # What doesn't count may be anything in K, and anything finite in V.
            for b, length in enumerate(lengths):
                tensors["extra_k"][b, max(length, 0) :] = torch.nan
                tensors["extra_v"][b, max(length, 0) :] = torch.finfo(tensors["v"].dtype).max
            launches = calls.run(calls.prepare(problem, tensors))
            require_right(problem, tensors)
            keys = sum(min(max(n, 0), tokens) // columns + (pieces - 1) for n in lengths)  # whole tiles
            parts = sum(n >= tokens or (n > 0 and n % columns != 0) for n in lengths)
            plain = calls.run(calls.prepare(small(calls), tensors_of(small(calls))))
            assert len(launches) == len(plain)
            more = [
                sum(x[kind] for x in launches) - sum(x[kind] for x in plain)
                for kind in ("interior_tiles", "shell_tiles")
            ]
            q_tiles = calls.q_tiles(problem)
            assert more == [q_tiles * keys, q_tiles * parts], (lengths, pieces, more, q_tiles, keys, parts)


def check_layouts(calls: Calls) -> None:
    """Batch entries of extra keys that are one, of K or V or both; lengths with gaps; layouts that are refused."""
    problem = small(calls, extra_tokens=(30, 41))
    tensors = tensors_of(problem)
    lengths = torch.tensor([17, 99, 30, 99], dtype=torch.int32)
    for names in (("extra_k",), ("extra_v_2",), ("extra_k", "extra_v", "extra_k_2", "extra_v_2")):
        one = {name: tensors[name][:1].expand_as(tensors[name]) for name in names}
        shared = {**tensors, **one, "extra_lengths": lengths[::2]}
        calls.run(calls.prepare(problem, shared))
        require_right(problem, shared)
    k, v = tensors["extra_k"], tensors["extra_v_2"]
    for name, tensor, said in (
        ("extra_k", k.new_zeros(k.numel() + 1)[1:].view_as(k), "extra_key is not aligned to 16 bytes"),
        ("extra_k", k[:, :1].expand_as(k), "extra_key has stride 0 along its first token dim"),
        ("extra_k", k[:, :, :1].expand_as(k), "extra_key has stride 0 along its heads"),
        ("extra_v_2", v.new_zeros(*v.shape[:-1], v.shape[-1] + 2)[..., : v.shape[-1]], "a positive multiple of 8"),
    ):
        try:
            calls.prepare(problem, {**tensors, name: tensor})
        except Refused as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"the kernel takes what it can't read: {said}")
    # Rank 3 folds heads into channels whatever the extra keys are like.
    apart = {**tensors, "extra_k": torch.cat([k, k], -1)[..., : k.shape[-1]]}
    calls.run(calls.prepare(problem, apart))
    require_right(problem, apart)


def check_second_piece_alone(calls: Calls) -> None:
    """The contract lets the first piece be missing."""
    problem = small(calls, extra_tokens=(70,))
    tensors = tensors_of(problem)
    call = calls.prepare(problem, tensors)
    args = call.args
    calls.run(call)
    wanted = [tensors[name].clone() for name in ("out", "lse")]
    args.problem.contents.extra_tokens[0], args.problem.contents.extra_tokens[1] = 0, 70
    for role in ("extra_k", "extra_v"):
        at = abi.ROLES.index(role)
        args.tensors[at + 1], args.tensors[at] = args.tensors[at], c.POINTER(abi.Tensor)()
    tensors["out"].fill_(torch.nan)
    calls.run(call)
    assert all(map(torch.equal, (tensors["out"], tensors["lse"]), wanted))


def check_work(calls: Calls) -> None:
    """Of the work that chooses a kernel, extra keys are whole tiles; more of them than an int holds are refused."""
    columns, group = calls.kernel.config.kv_columns, small(calls)
    tiles = calls.q_tiles(group) * group.batch
    per_tile = calls.padded_rows * columns * (group.head_dim + group.value_head_dim)

    def work_of(problem: Problem) -> float:
        call = calls.prepare(problem, tensors_of(problem))
        return float(call._entry.visited_work(c.byref(call.args)))

    for pieces in ((1,), (columns,), (columns + 1, 3 * columns)):
        more = work_of(small(calls, extra_tokens=pieces)) - work_of(group)
        assert more == tiles * per_tile * sum(-(-tokens // columns) for tokens in pieces)
    call = calls.prepare(problem := small(calls, extra_tokens=(1,)), tensors_of(problem))
    call.args.problem.contents.extra_tokens[0] = 1 << 30
    try:
        Call(call._entry, call.args)
    except Refused as error:
        assert "extra keys, at most 1073741823 in a piece" in str(error), error
    else:
        raise AssertionError("the kernel takes more extra keys than it can count")


def check_list(calls: Calls, problems: Sequence[Problem], tensors: Sequence[Tensors], launches: range) -> None:
    """Runs calls one by one, and as a list: they give the same bits, in one of so many launches."""
    made = [calls.prepare(problem, own) for problem, own in zip(problems, tensors, strict=True)]
    results = [own[name] for own in tensors for name in ("out", "lse") if name in own]

    def clear() -> None:
        for result in results:
            result.fill_(torch.nan)

    clear()
    alone = calls.run(*made)
    wanted = [result.clone() for result in results]
    assert all(bool(result.isfinite().all()) for result in wanted)
    clear()
    together = calls.run(*made, together=True)
    assert all(map(torch.equal, results, wanted))
    assert len(together) in launches, f"{len(together)} launches"
    tiles = [sum(one["interior_tiles"] + one["shell_tiles"] for one in each) for each in (alone, together)]
    assert tiles[0] == tiles[1] > 0


def check_windows_per_head(calls: Calls) -> None:
    """Heads of one problem with windows of their own, in any order, with extra keys and without, are one launch: they
    share maps. Of other tensors, or a scale of its own, a call has what it needs all the same."""
    rank = calls.kernel.config.rank
    for extra, lengths in (((), None), ((50, 9), (20, 50))):
        whole = small(calls, heads=12, kv_heads=6, extra_tokens=extra)
        tensors = tensors_of(whole)
        if lengths:
            tensors["extra_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        parts = [(0, 1, 3, 1), (1, 2, 2, 2), (3, 1, 4, 1), (4, 2, 1, 1)]  # first head, heads, window, stride
        problems = [
            replace(
                whole,
                heads=2 * count,
                kv_heads=count,
                window=(window,) * rank,
                stride=(stride,) * rank,
                causal=(first == 3,) * rank,
            )
            for first, count, window, stride in parts
        ]
        own = [some_heads(tensors, first, count, 2) for first, count, *_ in parts]
        sets = 2 if rank == 3 and not calls.folds else 1
        check_list(calls, problems, own, range(1, 2 * sets + 1))
        for problem, part in zip(problems, own, strict=True):
            require_right(problem, part)
        check_list(calls, problems[::-1], own[::-1], range(1, 6))
        others = tensors_of(problems[0], 1)
        if lengths:
            others["extra_lengths"] = tensors["extra_lengths"]
        check_list(calls, [*problems, problems[0]], [*own, others], range(1, 6))
        check_list(calls, [problems[0], replace(problems[1], scale=0.5)], own[:2], range(2, 5))
        without = {name: tensor for name, tensor in own[1].items() if name != "lse"}
        check_list(calls, problems[:3], [own[0], without, own[2]], range(2, 13))


def check_samples(calls: Calls) -> None:
    """Samples of a packed batch, each with its own layout and extra keys: more than one launch has room for."""
    rank = calls.kernel.config.rank
    sizes = [(9, 5, 4), (4, 7, 6), (12, 3, 5), (5, 5, 5), (9, 5, 4), (3, 8, 7), (6, 4, 3)]
    problems = [
        small(
            calls,
            tokens=size[:rank],
            window=tuple(min(3, n) for n in size[:rank]),
            batch=1,
            extra_tokens=(7 + 20 * i,) if i % 2 else (),
            dilation=(2 if i == 2 else 1,) + (1,) * (rank - 1),
        )
        for i, size in enumerate(sizes)
    ]
    counts = [problem.token_count for problem in problems]
    first = [sum(counts[:i]) for i in range(len(counts))]
    line = small(calls, tokens=(sum(counts),) + (1,) * (rank - 1), window=(1,) * rank, batch=1)
    packed = {name: x.flatten(1, rank) for name, x in tensors_of(line).items()}
    tensors = []
    for problem, begin, count in zip(problems, first, counts, strict=True):
        own = {name: x[:, begin : begin + count].unflatten(1, problem.tokens) for name, x in packed.items()}
        extra = {name: x for name, x in tensors_of(problem).items() if name.startswith("extra")}
        tensors.append({**own, **extra})
    check_list(calls, problems, tensors, range(2, 8))
    for problem, own in zip(problems, tensors, strict=True):
        require_right(problem, own)


def check_joint(calls: Calls) -> None:
    """Rows of an image and of its text, which are parts of one sequence, as `joint_attention` calls them: the image's
    rows see their window and the text before and behind it, the text's all. A list of both is one launch; only where
    rank is 1 has one kernel both."""
    before, image, behind = 30, 90, 25
    first, last = before, before + image
    total = last + behind
    whole = small(calls, tokens=(total,), window=(total,), batch=1)
    tensors = tensors_of(whole)

    def rows(begin: int, end: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: tensors[name][:, begin:end] for name in names}

    queries, keys = ("q", "out", "lse"), ("k", "v")
    text = {"grid": (total,), "kv_tokens": (total,), "window": (total,)}
    pieces = {
        f"extra_{name}{end}": tensors[name][:, begin : begin + count]
        for name in keys
        for end, begin, count in (("", 0, before), ("_2", last, behind))
    }
    problems = [
        small(calls, tokens=(before,), batch=1, **text),
        small(calls, tokens=(image,), window=(33,), batch=1, extra_tokens=(before, behind)),
        small(calls, tokens=(behind,), batch=1, **text),
    ]
    parts = [
        {**rows(0, before, queries), **rows(0, total, keys)},
        {**rows(first, last, (*queries, *keys)), **pieces},
        {**rows(last, total, queries), **rows(0, total, keys)},
    ]
    check_list(calls, problems, parts, range(1, 2))
    for problem, part in zip(problems, parts, strict=True):
        require_right(problem, part)


def main(library: str, key: str, check: str) -> None:
    """Runs one of the checks above under the schedule of the environment."""
    timing, order = (os.environ[f"GNAFORGE_EMULATOR_{name}"] for name in ("TIMING", "ORDER"))
    globals()[f"check_{check}"](Calls(library, key, Schedule(timing, order).as_json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
