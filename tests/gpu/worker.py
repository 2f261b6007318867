"""Does one job after the other: reads JSON objects from stdin, a line each, and answers each with one on stdout.

A kernel that hangs or faults takes its process with it. So ``run.py`` feeds jobs to a process like this one, watches
the time, and starts another one where the last job ended badly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import set_up

set_up()

import abi  # noqa: E402
import checks  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
from gnaforge.runtime import core  # noqa: E402
from gnaforge.runtime.config import KernelConfig  # noqa: E402
from gnaforge.runtime.ops import neighborhood_attention  # noqa: E402
from gnaforge.verification.problems import for_kernel  # noqa: E402

Answer = dict[str, Any]


class Skipped(Exception):
    """A job that this machine can't do; says why."""


class Worker:
    """Jobs are methods; ``kind`` names one, the rest of a job are its arguments."""

    def __init__(self, libraries: list[str], device: str) -> None:
        self.device = device
        self.entries = {key: entry for path in libraries for key, entry in abi.entries(path).items()}
        self.libraries = libraries
        self.loaded = False

    def config(self, key: str) -> KernelConfig:
        return KernelConfig.parse(key)

    def load(self) -> None:
        """The kernels, for the operators."""
        if not self.loaded:
            for path in self.libraries:
                core.load_library(path)
            self.loaded = True

    def need_cuda(self) -> None:
        if self.device != "cuda":
            raise Skipped("needs a GPU")

    def random(self, kernel: str, seed: int, max_tokens: int, repeats: int, poison: bool) -> Answer:
        """A random problem, in full."""
        config = self.config(kernel)
        problem, layout = checks.random_problem(config, seed, max_tokens)
        try:
            found = checks.check_problem(
                self.entries[kernel], config, problem, layout, self.device, seed, repeats, poison
            )
        except checks.Wrong as error:
            raise checks.Wrong(f"{error}; {layout}; {problem}") from None
        return {"out": found[0], "lse": found[1]}

    def given(self, kernel: str, problem: Answer, layout: str, repeats: int = 0, poison: bool = False) -> Answer:
        """A problem that is written down."""
        whole = oracle.Problem.from_json(problem)
        config = self.config(kernel)
        found = checks.check_problem(self.entries[kernel], config, whole, layout, self.device, 0, repeats, poison)
        return {"out": found[0], "lse": found[1]}

    def large(self, kernel: str, problem: Answer, samples: int = 30) -> Answer:
        """Contiguous tensors, of which some queries are checked."""
        whole = oracle.Problem.from_json(problem)
        dtype = checks.DTYPES[self.config(kernel).dtype]
        start = (whole.batch, *whole.tokens)
        shapes = [
            (whole.heads, whole.head_dim),
            (whole.kv_heads, whole.head_dim),
            (whole.kv_heads, whole.value_head_dim),
        ]
        generator = torch.Generator(self.device).manual_seed(0)
        tensors = []
        for shape in shapes:
            x = torch.empty(*start, *shape, dtype=dtype, device=self.device)
            flat = x.view(-1)
            for first in range(0, flat.numel(), 2**28):  # normal_ of 16-bit elements needs no copy in fp32
                flat[first : first + 2**28].normal_(generator=generator)
            tensors.append(x)
        out = torch.full((*start, whole.heads, whole.value_head_dim), torch.nan, dtype=dtype, device=self.device)
        lse = torch.full((*start, whole.heads), torch.nan, device=self.device)
        share = checks.check_samples(self.entries[kernel], whole, tensors, out, lse, samples)
        if out.isnan().any() or lse.isnan().any():
            raise checks.Wrong("not every element was written")
        return {"share": share, "elements": max(x.numel() for x in (*tensors, out))}

    def far_strides(self, kernel: str, stride: int) -> Answer:
        """Batch entries ``stride`` elements apart. Pages that nobody touches cost nothing on a CPU."""
        config = self.config(kernel)
        tokens = {1: (70,), 2: (9, 11), 3: (5, 6, 7)}[config.rank]
        half = tuple(n // 2 + 1 for n in tokens)
        problem = for_kernel(oracle.Problem(tokens, half, batch=2, heads=2), config)
        dims = (problem.head_dim, problem.head_dim, problem.value_head_dim, problem.value_head_dim)
        dtype = checks.DTYPES[config.dtype]
        views = []
        for d in dims:
            inner = [2 * d]
            for n in reversed(tokens[1:]):
                inner.insert(0, inner[0] * n)
            count = tokens[0] * inner[0]
            storage = torch.empty(stride + count, dtype=dtype, device=self.device)
            views.append(storage.as_strided((2, *tokens, 2, d), (stride, *inner, d, 1)))
        generator = torch.Generator(self.device).manual_seed(0)
        for x in views[:3]:
            x.copy_(torch.randn(x.shape, generator=generator, device=self.device))
        out = views[3]
        out.fill_(torch.nan)
        lse = torch.full(out.shape[:-1], torch.nan, device=self.device)
        return {"share": checks.check_samples(self.entries[kernel], problem, views[:3], out, lse, 20)}

    def against_sdpa(self, kernel: str, tokens: list[int], heads: int) -> Answer:
        """Dense attention: errors against float64, ours beside torch's SDPA on the same data."""
        config = self.config(kernel)
        problem = for_kernel(oracle.Problem(tokens, tokens, heads=heads), config)
        tensors = [m.view for m in checks.inputs(problem, checks.DTYPES[config.dtype], self.device, "", 0)]
        ours, _ = checks.attend(self.entries[kernel], problem, tensors)
        exact, _ = checks.attention(problem, *tensors)
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in tensors)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(exact.shape)
        rms = [float((x.double() - exact).square().mean().sqrt()) for x in (ours, theirs)]
        if rms[0] > 1.02 * rms[1]:
            raise checks.Wrong(f"rms error {rms[0]:.3g}, SDPA's is {rms[1]:.3g}")
        return {"ours": rms[0], "sdpa": rms[1]}

    # Through the operators, and so the core extension.

    def _operands(self, kernel: str, seed: int = 0) -> tuple[list[torch.Tensor], Callable[..., Any]]:
        self.load()
        config = self.config(kernel)
        tokens = {1: (300,), 2: (20, 18), 3: (8, 9, 10)}[config.rank]
        generator = torch.Generator(self.device).manual_seed(seed)
        dims = (config.head_dim, config.head_dim, config.value_head_dim or config.head_dim)
        dtype = checks.DTYPES[config.dtype]
        tensors = [torch.randn(1, *tokens, 2, d, generator=generator, device=self.device).to(dtype) for d in dims]
        return tensors, lambda *qkv: neighborhood_attention(*qkv, 5, return_lse=True, kernel=kernel)

    def operator(self, kernel: str) -> Answer:
        """The operator gives what the kernel gives; without a name, a kernel is found as well."""
        tensors, attend = self._operands(kernel)
        problem = oracle.Problem.of_tensors(*tensors, 5)
        exact = checks.attention(problem, *tensors)
        found = checks.shares(attend(*tensors), exact, checks.bounds(problem, *tensors, exact))
        if max(found) > 1:
            raise checks.Wrong(f"errors take {max(found):.3g} of their bound")
        if self.device == "cuda":
            chosen = neighborhood_attention(*tensors, 5)
            if not chosen.isfinite().all():
                raise checks.Wrong("the kernel that dispatch chose gives no finite numbers")
        return {"share": max(found)}

    def stream(self, kernel: str) -> Answer:
        """The kernel runs on the current stream: after what is queued there before it, on which its input depends."""
        self.need_cuda()
        tensors, attend = self._operands(kernel)
        want = attend(*tensors)
        late = [torch.zeros_like(x) for x in tensors]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for to, x in zip(late, tensors, strict=True):
                to.copy_(x)
            got = attend(*late)
        pending = not stream.query()
        stream.synchronize()
        if not pending:
            raise checks.Wrong("the call waited for the GPU")
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            raise checks.Wrong("the kernel did not wait for its inputs")
        return {}

    def other_device(self, kernel: str) -> Answer:
        """Tensors of a GPU that is not the current one."""
        self.need_cuda()
        if torch.cuda.device_count() < 2:
            raise Skipped("needs two GPUs")
        tensors, attend = self._operands(kernel)
        want = attend(*tensors)
        got = attend(*(x.to("cuda:1") for x in tensors))
        if torch.cuda.current_device() != 0 or not all(
            torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True)
        ):
            raise checks.Wrong("another device gives another result, or stays the current one")
        return {}

    def graph(self, kernel: str) -> Answer:
        """Captured once, replayed on other inputs."""
        self.need_cuda()
        tensors, attend = self._operands(kernel)
        attend(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(*tensors)
        for seed in (1, 2):
            others, _ = self._operands(kernel, seed)
            want = attend(*others)
            for to, x in zip(tensors, others, strict=True):
                to.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            if not all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)):
                raise checks.Wrong("a replay differs from a call")
        return {}

    def compiled(self, kernel: str) -> Answer:
        """torch.compile(fullgraph=True) changes nothing."""
        tensors, attend = self._operands(kernel)
        want = attend(*tensors)
        got = torch.compile(attend, fullgraph=True)(*tensors)
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            raise checks.Wrong("compiled, the result differs")
        return {}

    def about(self) -> Answer:
        """What runs here."""
        found = {"python": sys.version.split()[0], "torch": torch.__version__, "device": self.device}
        if self.device == "cuda":
            gpu = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "processors": gpu.multi_processor_count,
                "memory_gb": round(gpu.total_memory / 2**30),
                "cuda": torch.version.cuda,
            }
        return found | {"kernels": sorted(self.entries)}


def gpu_lives(device: str) -> bool:
    """Whether this process can still use its GPU: after a fault in a kernel it can't."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--library", action="append", required=True)
    parser.add_argument("--jobs", type=Path, help="read jobs from this file instead")
    options = parser.parse_args()
    worker = Worker(options.library, options.device)
    # Whatever else prints, C code and child processes included, prints to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    lines = options.jobs.read_text().splitlines() if options.jobs else sys.stdin
    for line in lines:
        job = json.loads(line)
        start = time.perf_counter()
        answer: Answer
        fatal = False
        try:
            arguments = {name: value for name, value in job.items() if name not in ("kind", "section")}
            answer = {"ok": True, **getattr(worker, job["kind"])(**arguments)}
            if options.device == "cuda":
                torch.cuda.synchronize()
        except Skipped as error:
            answer = {"skipped": str(error)}
        except checks.Wrong as error:
            answer = {"ok": False, "error": str(error)}
            fatal = not gpu_lives(options.device)
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            fatal = not gpu_lives(options.device)
        if fatal:
            answer["ended"] = True
        answer["seconds"] = round(time.perf_counter() - start, 4)
        print(json.dumps(answer), file=answers, flush=True)
        if fatal:
            sys.exit(3)
        if options.device == "cuda" and job["kind"] in ("large", "far_strides"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
