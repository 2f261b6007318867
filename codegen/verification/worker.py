"""The process in which kernels run: ``python -m gnaforge.verification.worker``. See `serving`; with ``--jobs FILE`` the
requests come from a file.

A kernel may crash or hang without harm to its caller, and its schedule is its own: see `process.Worker`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..families import family_of
from ..runtime import core
from ..runtime.config import KernelConfig
from ..runtime.problem import Problem
from .checks import Failure
from .contract import Kernel, Refused
from .emulator import Emulator
from .layouts import fill
from .operators import OPERATOR_JOBS, Skipped
from .problems import EMULATED_PROCESSORS
from .runs import KernelRuns
from .serving import serve

Json = dict[str, Any]


class Server:
    """Answers requests about the one kernel that was opened last."""

    def __init__(self) -> None:
        self._runs: KernelRuns | None = None
        self._library = Path()
        self._jobs: dict[str, Callable[[Json], Json]] = {
            "about": self.about,
            "open": self.open,
            "ready": self.ready,
            "prepare": self.prepare,
            "verify": self.verify,
            "call": self.call,
            "large": self.large,
            "far strides": self.far_strides,
            "beside sdpa": self.beside_sdpa,
            "operator": self.operator,
        }

    @property
    def runs(self) -> KernelRuns:
        """The kernel that is open."""
        if self._runs is None:
            raise LookupError("no kernel was opened")
        return self._runs

    def about(self, _: Json) -> Json:
        """What runs here."""
        found: Json = {"python": sys.version.split()[0], "torch": torch.__version__}
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "processors": gpu.multi_processor_count,
                "memory_gb": round(gpu.total_memory / 2**30),
                "cuda": torch.version.cuda,
            }
        return found

    def open(self, request: Json) -> Json:
        """Loads a kernel: ``library``, ``key``."""
        config, self._library = KernelConfig.parse(request["key"]), Path(request["library"])
        if self._runs is not None:
            self._runs.close()
            self._runs = None
        try:
            family = family_of(config)
            if family.target.emulated_device:  # the stand-in reads it when it is loaded
                os.environ.setdefault("GNAFORGE_EMULATOR_DEVICE", family.target.emulated_device)
                os.environ.setdefault("GNAFORGE_EMULATOR_PROCESSORS", str(EMULATED_PROCESSORS))
            kernel = Kernel(self._library, request["key"])
            emulator = Emulator(kernel, family.relaxed_tensor_waits) if kernel.device == "emulator" else None
        except (InputError, ValueError) as error:
            raise Failure("library", str(error)) from error
        if kernel.device == "cuda" and not torch.cuda.is_available():
            raise Failure("library", "it is for a GPU, and torch finds none, or no driver for it")
        self._runs = KernelRuns(kernel, emulator, family.rounds_probabilities)
        return {"device": kernel.device}

    def ready(self, _: Json) -> Json:
        """Whether the process answers."""
        return {}

    def prepare(self, request: Json) -> Json:
        """Computes exact results for `verify`, which asks for it in a request of its own: it is no kernel's time."""
        self.runs.exact(Problem.from_json(request["problem"]), request["seed"])
        return {}

    def verify(self, request: Json) -> Json:
        """`KernelRuns.verify`."""
        return self.runs.verify(
            Problem.from_json(request["problem"]),
            request["seed"],
            request["layout"],
            request["schedule"],
            request.get("repeats", 0),
            request.get("poison", ()),
            request.get("together", False),
            request.get("threads", False),
            request.get("adds", False),
        )

    def call(self, request: Json) -> Json:
        """Runs the kernel on tensors in a file, and leaves its results in another: for the pytest fixture. With
        ``together``, all calls as one list; else there is one."""
        runs, calls = self.runs, []
        inputs = torch.load(request["inputs"], weights_only=True)
        for problem, tensors in zip(map(Problem.from_json, request["problems"]), inputs, strict=True):
            memory = runs.allocate(problem, request["layout"])
            fill(memory, tensors)
            calls.append((problem, memory))
        if request["together"]:
            launches = runs.run_list(calls, request["schedule"])
        else:
            ((problem, memory),) = calls
            launches = runs.run(problem, memory, request["schedule"])
        outputs = [role.name for role in runs.kernel.op.outputs]
        torch.save([{name: one[name].tensor.contiguous() for name in outputs} for _, one in calls], request["outputs"])
        return {"launches": launches}

    def large(self, request: Json) -> Json:
        """`KernelRuns.sample_large`."""
        problem = Problem.from_json(request["problem"])
        return self.runs.sample_large(problem, request["samples"], request["schedule"])

    def far_strides(self, request: Json) -> Json:
        """`KernelRuns.sample_far_strides`."""
        problem = Problem.from_json(request["problem"])
        return self.runs.sample_far_strides(problem, request["stride"], request["schedule"])

    def beside_sdpa(self, request: Json) -> Json:
        """`KernelRuns.beside_sdpa`."""
        return self.runs.beside_sdpa(Problem.from_json(request["problem"]), request["schedule"])

    def operator(self, request: Json) -> Json:
        """A job of `operators`: through the core, as callers run kernels."""
        return OPERATOR_JOBS[request["kind"]](self._library, self.runs.kernel)

    def answer(self, request: Json) -> Json:
        """The reply to any request. What isn't said of the kernel, its library or this machine is ``broken``: an error
        of the harness."""
        start = time.perf_counter()
        try:
            reply = self._jobs[request["do"]](request)
        except Refused as error:
            reply = {"refused": str(error)}
        except Skipped as error:
            reply = {"skipped": str(error)}
        except Failure as error:
            reply = {"failed": error.kind, "message": str(error)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            reply = {"skipped": f"out of memory: {error}"}
        except Exception:
            reply = {"broken": traceback.format_exc()}
        reply["seconds"] = round(time.perf_counter() - start, 4)
        if not gpu_lives():
            reply["ended"] = True
        return reply


def gpu_lives() -> bool:
    """Whether this process can still use its GPU, if it does: after a fault in a kernel it can't."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Serves until the requests end, or a kernel has taken the GPU along."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="read requests from this file instead")
    parser.add_argument("--core", type=Path, metavar="FILE", help="take the core extension from here")
    options = parser.parse_args()
    if options.core is not None:
        core.set_core_files(lambda: [options.core])
    torch.set_num_threads(1)
    serve(Server().answer, options.jobs)


if __name__ == "__main__":
    main()
