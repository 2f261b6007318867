"""A kernel in the emulator as a Python callable, for tests of kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..build.kernels import find_libraries
from ..build.library import read_library
from ..build_tools.emulator import EmulationError
from ..errors import InputError
from ..runtime.config import KernelConfig
from ..runtime.op_table import FORWARD, named_extra_keys
from ..runtime.problem import Problem
from ..runtime.reference import ExtraKeys
from .counters import WorkCounters, count_work
from .process import Worker, WorkerError
from .runs import Listed
from .schedules import Schedule

Pair = tuple[torch.Tensor, torch.Tensor]


class EmulatedKernel:
    """A kernel that runs in the emulator, in a process of its own.

    Args:
        kernel: a config or key, which is compiled unless the cache has it; or the path of an emulated library that
            holds one kernel.
        timeout: seconds that one call may take.

    Attributes:
        config: the kernel.
        library: the file that holds it.
        schedule: of the calls to come.
        trace: whether errors show the last events of each warp.
        counters: of the last call.

    Raises:
        InputError, BuildError: there is no such kernel, or it can't be compiled.
    """

    def __init__(self, kernel: KernelConfig | str | Path, timeout: float = 600.0) -> None:
        if isinstance(kernel, Path):
            rows = read_library(kernel)
            if len(rows) != 1 or not rows[0]["emulated"]:
                raise InputError(f"{kernel} is no emulated library of one kernel")
            self.config, self.library = KernelConfig.parse(rows[0]["key"]), kernel
        else:
            self.config = KernelConfig.parse(kernel) if isinstance(kernel, str) else kernel
            self.library = find_libraries([self.config], emulated=True)[self.config]
        self.schedule = Schedule("eager", "round-robin")
        self.trace = False
        self.counters: WorkCounters | None = None
        self._timeout = timeout
        self._worker: Worker | None = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        scale: float | None = None,
        *,
        extra: Sequence[ExtraKeys] = (),
        layout: str = "contiguous",
        **settings: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the kernel, arguments and results as those of `gnaforge.neighborhood_attention` with ``return_lse``.

        The kernel gets copies of the tensors with guard zones around them.

        Args:
            extra: pieces of keys that all queries see.
            layout: of all tensors, of `kinds.LAYOUTS`.
            settings: further fields of `Problem`: edge, sink, grid, ...

        Raises:
            EmulationError: the kernel broke a rule, wrote what it must not, or left elements out; the message says
                where and why.
            WorkerError: its process crashed or hangs.
            ValueError: the arguments make no problem, or it refuses this one; says why.
        """
        call = make_call(
            query, key, value, kernel_size, stride, dilation, is_causal, scale=scale, extra=extra, **settings
        )
        (results,) = self._run([call], layout, together=False)
        return results

    def run_list(self, calls: Sequence[Listed], *, layout: str = "contiguous") -> list[Pair]:
        """Runs calls that `make_call` made as one list; returns their results, output and log-sum-exp.

        Raises:
            EmulationError, WorkerError, ValueError: as a call.
        """
        return self._run(calls, layout, together=True)

    def _run(self, calls: Sequence[Listed], layout: str, *, together: bool) -> list[Pair]:
        with tempfile.TemporaryDirectory(prefix="gnaforge-") as folder:
            inputs, outputs = Path(folder) / "inputs.pt", Path(folder) / "outputs.pt"
            torch.save([{name: x.detach().clone() for name, x in tensors.items()} for _, tensors in calls], inputs)
            said = self._ask(
                do="call",
                inputs=str(inputs),
                outputs=str(outputs),
                problems=[problem.as_json() for problem, _ in calls],
                together=together,
                layout=layout,
                schedule=self.schedule.as_json(self.trace),
            )
            if "refused" in said:
                raise ValueError(f"{self.config.key} refuses: {said['refused']}")
            if "failed" in said:
                raise EmulationError(f"{self.config.key}, {self.schedule}: {said['message']}")
            self.counters = count_work(said["launches"])
            return [(found["out"], found["lse"]) for found in torch.load(outputs, weights_only=True)]

    def _ask(self, **what: Any) -> dict[str, Any]:
        try:
            if self._worker is None:
                self._worker = Worker()
                opened = self._worker.open(self._timeout, self.library, self.config.key)
                if "failed" in opened:
                    raise InputError(opened["message"])
            return self._worker.request(self._timeout, **what)
        except (WorkerError, InputError):
            self.close()
            raise

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        if self._worker:
            self._worker.close()
            self._worker = None


def make_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *pattern: Any,
    extra: Sequence[ExtraKeys] = (),
    **settings: Any,
) -> Listed:
    """A call and its tensors by role; arguments as those of `EmulatedKernel`'s calls.

    Raises:
        ValueError: the arguments make no problem.
    """
    tokens = tuple(piece.key.shape[1] for piece in extra)
    problem = Problem.of_tensors(query, key, value, kernel_size, *pattern, **settings, extra_tokens=tokens)
    tensors = dict(zip((role.name for role in FORWARD.inputs), (query, key, value), strict=True))
    return problem, tensors | named_extra_keys(extra)
