"""Runs of one kernel on a problem: in guarded memory beside exact results, again for the same bits, poisoned, and on
tensors too large for all that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import Any

import torch

from ..build import abi
from ..runtime.op_table import FORWARD, Op, Role, Tensors
from ..runtime.problem import Problem
from .checks import Failure, bytes_of_inputs, check_memory, compare_all, compare_sample, digest, results_of
from .contract import Kernel, LaunchError
from .emulator import Emulator
from .entry import THREADS, threaded_host
from .kinds import Comparison
from .layouts import Memory, allocate, fill
from .poison import POISONERS

Json = dict[str, Any]
Listed = tuple[Problem, Tensors]
"""A call and its tensors by role."""


@dataclass(frozen=True)
class Exact:
    """Inputs of a problem, exact results, and how far a kernel may be from them; all by role."""

    inputs: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]


@lru_cache(maxsize=4)
def exact_results(op: Op, problem: Problem, seed: int, device: str, rounds_probabilities: bool) -> Exact:
    """Of a problem with data of ``seed``, by brute force."""
    inputs = op.random_inputs(problem, seed, device)
    results = op.exact(problem, inputs)
    return Exact(inputs, results, op.bound(problem, inputs, results, rounds_probabilities=rounds_probabilities))


class KernelRuns:
    """One kernel, wherever it runs, and what it is tried with.

    Args:
        kernel: it.
        emulator: the one that it is linked to, if it is.
        rounds_probabilities: as in its family.
    """

    def __init__(self, kernel: Kernel, emulator: Emulator | None, rounds_probabilities: bool) -> None:
        self.kernel, self._emulator = kernel, emulator
        self._rounds_probabilities = rounds_probabilities

    def close(self) -> None:
        """Before another kernel of this process runs: they may share one emulator."""
        if self._emulator is not None:
            self._emulator.forget()

    def exact(self, problem: Problem, seed: int) -> Exact:
        """What `verify` compares with; a second time it costs nothing."""
        kernel = self.kernel
        return exact_results(kernel.op, problem, seed, kernel.tensor_device, self._rounds_probabilities)

    def verify(
        self,
        problem: Problem,
        seed: int,
        layout: str,
        schedule: Json | None,
        repeats: int = 0,
        poison: Sequence[str] = (),
        together: bool = False,
        threads: bool = False,
        adds: bool = False,
    ) -> Json:
        """Runs the kernel with data of ``seed``, compares with exact results, and tries again.

        Args:
            problem: what it computes.
            seed: of the tensors' values, and of what is poisoned.
            layout: of `kinds.LAYOUTS`.
            schedule: of the emulator; None elsewhere.
            repeats: further runs, which must give the same bits.
            poison: kinds of `kinds.POISONS`, each for a further run.
            together: also run it as a list with another call, if the kernel runs lists.
            threads: also run it on several threads of this processor, if that is what runs it.
            adds: also have it add some gradients to what is there, if it can.

        Returns:
            ``errors`` by result, ``digest`` of all results, ``runs``, and ``launches`` of the first run.

        Raises:
            Refused, Failure
        """
        op, exact = self.kernel.op, self.exact(problem, seed)
        memory = self.allocate(problem, layout)
        fill(memory, exact.inputs)
        launches = self.run(problem, memory, schedule)
        errors: dict[str, Comparison] = compare_all(op, memory, exact.results, exact.bounds)
        clean, bits, runs = results_of(op, memory), digest(op, memory), 1 + repeats
        for _ in range(repeats):
            self._run_again(problem, memory, schedule)
            if digest(op, memory) != bits:
                raise Failure("repeat", "another run gives other bits")
        for kind in poison:
            found = POISONERS[kind](op, problem, self.kernel.config, memory, seed)
            if found is None:
                continue
            self._run_again(problem, memory, schedule)
            found.check(clean, memory)
            fill(memory, exact.inputs)
            runs += 1
        if threads and self.kernel.device == "cpu":
            self._run_again(problem, memory, schedule, threaded_host())
            runs += 1
            if digest(op, memory) != bits:
                raise Failure("threads", f"on {THREADS} threads it gives other bits")
        if together and self.kernel.runs_lists:
            self._run_together(problem, seed, memory, schedule)
            runs += 2
            if digest(op, memory) != bits:
                raise Failure("list", "run as a list with another call, it gives other bits")
        if adds and self.kernel.accumulates:
            self._run_adding(problem, seed, memory, schedule)
            runs += 1
        return {"errors": errors, "digest": bits, "runs": runs, "launches": launches}

    def _run_together(self, problem: Problem, seed: int, memory: Memory, schedule: Json | None) -> None:
        """Runs a call as a list, behind another one with other data.

        Raises:
            Failure: of the other call, or one was not run.
        """
        op, other = self.kernel.op, self.allocate(problem, "contiguous")
        fill(other, op.random_inputs(problem, seed + 1, self.kernel.tensor_device))
        self.run(problem, other, schedule)
        alone = digest(op, other)
        for role in op.writes(problem):
            memory[role.name].clear()
            other[role.name].clear()
        self.run_list([(problem, other), (problem, memory)], schedule)
        if digest(op, other) != alone:
            raise Failure("list", "run as a list, the call before it gives other bits")

    def _run_adding(self, problem: Problem, seed: int, memory: Memory, schedule: Json | None) -> None:
        """Runs a call that adds some of its gradients, at least one, to random numbers, and overwrites the others.

        Raises:
            Failure: of the call, or a sum is further from exact than rounding allows.
        """
        op, exact, rng = self.kernel.op, self.exact(problem, seed), Random(f"adds {seed}")
        roles = [role.name for role in op.writes(problem)]
        adding = rng.sample(roles, rng.randint(1, len(roles)))
        generator, results, bounds = torch.Generator().manual_seed(seed), dict(exact.results), dict(exact.bounds)
        for name in roles:
            memory[name].clear()
            if name not in adding:
                continue
            tensor = memory[name].tensor
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            held = tensor.double()
            results[name] = exact.results[name] + held
            bounds[name] = exact.bounds[name] + torch.finfo(tensor.dtype).eps * held.abs()
        self._run([(problem, memory)], schedule, partial(self._call, accumulate=adding))
        compare_all(op, memory, results, bounds)

    def allocate(self, problem: Problem, layout: str) -> Memory:
        """Memory for the tensors of a call."""
        kernel = self.kernel
        return allocate(kernel.op, problem, layout, kernel.tensor_device, kernel.config.output_dtype)

    def run(self, problem: Problem, memory: Memory, schedule: Json | None, host: abi.Host | None = None) -> list[Json]:
        """Runs the kernel, and checks what it wrote; returns what the emulator counted of each launch.

        Raises:
            Refused, Failure
        """
        return self._run([(problem, memory)], schedule, partial(self._call, host=host))

    def run_list(self, calls: Sequence[tuple[Problem, Memory]], schedule: Json | None) -> list[Json]:
        """The same of several calls as one list, for kernels that run lists."""
        return self._run(calls, schedule, self._call_list)

    def _run(
        self, calls: Sequence[tuple[Problem, Memory]], schedule: Json | None, run: Callable[[Sequence[Listed]], None]
    ) -> list[Json]:
        op, emulator = self.kernel.op, self._emulator
        if emulator is not None:
            assert schedule is not None
            emulator.start(schedule)
            for _, memory in calls:
                for one in memory.values():
                    emulator.announce(one.role.title, *one.extent)
        before = [bytes_of_inputs(op, memory) for _, memory in calls]
        run([(problem, {name: one.tensor for name, one in memory.items()}) for problem, memory in calls])
        for (_, memory), held in zip(calls, before, strict=True):
            check_memory(op, memory, held)
        return emulator.launches() if emulator is not None else []

    def _run_again(self, problem: Problem, memory: Memory, schedule: Json | None, host: abi.Host | None = None) -> None:
        for role in self.kernel.op.writes(problem):
            memory[role.name].clear()
        self.run(problem, memory, schedule, host)

    def _call(self, calls: Sequence[Listed], host: abi.Host | None = None, accumulate: Sequence[str] = ()) -> None:
        """Runs the kernel on the one call that there is, to its end.

        Raises:
            Refused, Failure
        """
        ((problem, tensors),) = calls
        self._finish(lambda: self.kernel.call(problem, tensors, self._announce, host, accumulate))

    def _call_list(self, calls: Sequence[Listed]) -> None:
        self._finish(lambda: self.kernel.call_list(calls, self._announce))

    def _announce(self, name: str, address: int, size: int) -> None:
        if self._emulator is not None:
            self._emulator.announce(name, address, size)

    def _finish(self, run: Callable[[], None]) -> None:
        try:
            run()
        except LaunchError as error:
            said = self._emulator.messages() if self._emulator is not None else []
            raise Failure("emulator" if said else "launch", "\n".join(said) or str(error)) from error
        if self.kernel.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise Failure("launch", str(error)) from error

    def sample_large(self, problem: Problem, samples: int, schedule: Json | None) -> Json:
        """Contiguous tensors of any size, of which some queries are compared.

        Raises:
            Refused, Failure
        """
        op, device = self.kernel.op, self.kernel.tensor_device
        generator = torch.Generator(device).manual_seed(0)
        tensors = {}
        for role in _required(op, problem):
            tensors[role.name] = torch.empty(role.shape(problem), dtype=role.dtype(problem).torch, device=device)
            flat = tensors[role.name].view(-1)
            for first in range(0, flat.numel(), 2**28):  # normal_ of 16-bit elements needs no copy in fp32
                flat[first : first + 2**28].normal_(generator=generator)
        for role in op.outputs:
            dtype = role.dtype(problem, self.kernel.config.output_dtype).torch
            tensors[role.name] = torch.full(role.shape(problem), torch.nan, dtype=dtype, device=device)
        shares = self._compare_samples(problem, tensors, samples, schedule)
        for role in op.outputs:
            if tensors[role.name].isnan().any():
                raise Failure("unwritten", f"not every element of {role.name} was written")
        return {"shares": shares, "elements": max(tensor.numel() for tensor in tensors.values())}

    def sample_far_strides(self, problem: Problem, stride: int, schedule: Json | None) -> Json:
        """Batch entries ``stride`` elements apart. Pages that nobody touches cost nothing on a CPU.

        Raises:
            Refused, Failure
        """
        op, device = self.kernel.op, self.kernel.tensor_device
        inputs = op.random_inputs(problem, 0, device)
        tensors = {}
        for role in (*_required(op, problem), *op.outputs):
            shape = role.shape(problem)
            inner = torch.empty(shape[1:], device="meta").stride()
            dtype = role.dtype(problem, self.kernel.config.output_dtype).torch
            room = torch.empty((shape[0] - 1) * stride + shape[1] * inner[0], dtype=dtype, device=device)
            tensors[role.name] = room.as_strided(shape, (stride, *inner))
            tensors[role.name].copy_(inputs.get(role.name, torch.tensor(torch.nan)))
        return {"shares": self._compare_samples(problem, tensors, 20, schedule)}

    def _compare_samples(
        self, problem: Problem, tensors: Mapping[str, torch.Tensor], samples: int, schedule: Json | None
    ) -> dict[str, float]:
        """Runs the kernel and compares the first query, the last and some others of the first and last batch entry.
        Returns the largest share of its bound that each result takes."""
        op = self.kernel.op
        if self._emulator is not None:
            assert schedule is not None
            self._emulator.start(schedule)
            for role in (*_required(op, problem), *op.outputs):
                self._emulator.announce(role.title, *_extent(tensors[role.name]))
        self._call([(problem, tensors)])
        worst = dict.fromkeys((role.name for role in op.outputs), 0.0)
        for at in _sample_tokens(op, problem, samples):
            exact, bounds = op.sample(problem, tensors, at, rounds_probabilities=self._rounds_probabilities)
            got = {role.name: tensors[role.name][at] for role in op.outputs}
            shares = compare_sample(op, got, exact, bounds, f"batch entry {at[0]}, token {at[1:]}")
            worst = {name: max(share, shares[name]) for name, share in worst.items()}
        return worst

    def beside_sdpa(self, problem: Problem, schedule: Json | None) -> Json:
        """Errors of dense attention, ours beside those of torch's SDPA on the same data, root mean squares.

        Raises:
            Refused, Failure: ours is more than 5 % larger. Lazy rescaling costs some: a row's largest probability is
                rounded as the others are, SDPA's is 1.
        """
        exact = self.exact(problem, 0)
        memory = self.allocate(problem, "contiguous")
        fill(memory, exact.inputs)
        self.run(problem, memory, schedule)
        wanted = exact.results["out"]
        q, k, v = (exact.inputs[role.name].flatten(1, -3).transpose(1, 2) for role in FORWARD.inputs)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(wanted.shape)
        ours, sdpa = (float((x.double() - wanted).square().mean().sqrt()) for x in (memory["out"].tensor, theirs))
        if ours > 1.05 * sdpa:
            raise Failure("wrong", f"rms error {ours:.3g}, SDPA's is {sdpa:.3g}")
        return {"ours": ours, "sdpa": sdpa}


def _required(op: Op, problem: Problem) -> list[Role]:
    """The roles of what an op reads that no call goes without."""
    return [role for role in op.reads(problem) if not role.optional]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (reach + 1) * tensor.element_size()


def _sample_tokens(op: Op, problem: Problem, samples: int) -> Iterator[tuple[int, ...]]:
    """Batch entries with tokens of what the op computes: queries, or keys."""
    rng = Random(0)
    extents = op.outputs[0].shape(problem)[1 : 1 + problem.rank]
    tokens = [(0,) * problem.rank, tuple(n - 1 for n in extents)]
    tokens += [tuple(rng.randrange(n) for n in extents) for _ in range(samples)]
    for batch in sorted({0, problem.batch - 1}):
        yield from ((batch, *token) for token in tokens)
