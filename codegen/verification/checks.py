"""Holds a call to what it owes: all of its results are written and nothing else, within the bounds of rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ..build_tools.text import count_of
from ..runtime.op_table import Op, Tensors
from .kinds import Comparison
from .layouts import Guarded, Memory


class Failure(Exception):
    """A kernel is wrong. ``kind`` says in which way, for programs."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _were(number: int, where: str) -> str:
    return f"{count_of(number, 'element')} {where} {'was' if number == 1 else 'were'}"


def bytes_of_inputs(op: Op, memory: Memory) -> dict[str, torch.Tensor]:
    """All bytes of the inputs and of what is around them, by role: what `check_memory` compares with."""
    outputs = {role.name for role in op.outputs}
    return {name: one.storage.view(torch.uint8).clone() for name, one in memory.items() if name not in outputs}


def check_memory(op: Op, memory: Memory, before: Mapping[str, torch.Tensor]) -> None:
    """Raises a `Failure` unless all results were written, and nothing else."""
    for name, bits in before.items():
        if not torch.equal(memory[name].storage.view(torch.uint8), bits):
            raise Failure("guard", f"the kernel wrote into {memory[name].role.title}, or around it")
    for role in op.outputs:
        one = memory[role.name]
        missing = one.unwritten()
        if missing.any():
            first = one.place(missing.nonzero()[0].tolist())
            raise Failure("unwritten", f"{_were(int(missing.sum()), f'of {role.name}')} never written; first: {first}")
    for role in op.outputs:
        outside = memory[role.name].outside()
        if len(outside):
            raise Failure(
                "guard",
                f"{_were(len(outside), f'outside of {role.name}')} written, in its guard zones or gaps; first: "
                f"{int(outside[0]):+} elements from its start",
            )


def compare_all(op: Op, memory: Memory, exact: Tensors, bounds: Tensors) -> dict[str, Comparison]:
    """The errors of all results, by role.

    Raises:
        Failure: one is beyond its bound.
    """
    return {role.name: compare(memory[role.name], exact[role.name], bounds[role.name]) for role in op.outputs}


def compare(one: Guarded, exact: torch.Tensor, bound: torch.Tensor) -> Comparison:
    """The error of one result.

    Raises:
        Failure: it is beyond the bound.
    """
    found, share = _shares(one.tensor, exact, bound)
    worst = int(share.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
    if share.flatten()[worst] > 1:
        wrong = int((share > 1).sum())
        raise Failure(
            "wrong",
            f"{wrong} of {share.numel()} elements of {one.role.name} are further from exact than rounding allows; "
            f"worst: {float(one.tensor[index]):.6g} at {one.place(index)}, exact {float(exact[index]):.6g}, "
            f"allowed error {float(bound[index]):.2g}",
        )
    return found


def compare_sample(op: Op, got: Tensors, exact: Tensors, bounds: Tensors, where: str) -> dict[str, float]:
    """How much of its bound each result takes at one query, by role.

    Raises:
        Failure: one takes more.
    """
    shares = {
        role.name: _shares(got[role.name], exact[role.name], bounds[role.name])[0]["share"] for role in op.outputs
    }
    for name, share in shares.items():
        if share > 1:
            raise Failure("wrong", f"{where}: the error of {name} takes {share:.3g} of its bound")
    return shares


def _shares(got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> tuple[Comparison, torch.Tensor]:
    error = (got.double() - exact).abs()
    share = torch.where(error.isnan(), float("inf"), error / bound)
    worst = share.argmax()
    found = {"error": error.max(), "bound": bound.flatten()[worst], "share": share.flatten()[worst]}
    return {name: float(value) for name, value in found.items()}, share


def digest(op: Op, memory: Memory) -> str:
    """Of the bits of all results."""
    found = hashlib.sha256()
    for role in op.outputs:
        bits = memory[role.name].tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        found.update(bits.cpu().numpy().tobytes())
    return found.hexdigest()


def results_of(op: Op, memory: Memory) -> dict[str, torch.Tensor]:
    """Copies of all results, by role."""
    return {role.name: memory[role.name].tensor.clone() for role in op.outputs}
