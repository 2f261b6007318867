"""Attention kernels of CUTLASS's examples 88 and 77, compiled from NVIDIA's unmodified headers, in the emulator.

`cutlass/*.cu` are thin hosts around one forward and one backward kernel each: they fill in NVIDIA's parameters, and the
launch is made here, so that a mutant of the kernel can take its place.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gnaforge.build_tools.cache import digest_of, user_cache
from gnaforge.build_tools.cuda import find_cutlass, find_nvcc
from gnaforge.build_tools.emulator import Counters, Module, Options, load, stand_in
from gnaforge.errors import BuildError

DIM = 128
SCALE = DIM**-0.5
FOLDER = Path(__file__).with_name("cutlass")
FLAGS = ("-std=c++17", "--use_fast_math", "-DNDEBUG", "--expt-relaxed-constexpr", "-lineinfo", "--no-compress")
SOURCES = {
    "hopper": ("hopper_fmha", "90a", "88_hopper_fmha"),
    "blackwell": ("blackwell_fmha", "100a", "77_blackwell_fmha"),
}
Array = np.ndarray[Any, np.dtype[Any]]


class _Launch(ctypes.Structure):
    _fields_ = (
        *(("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32)),
        *(("shared_bytes", ctypes.c_uint32), ("parameter_bytes", ctypes.c_uint32)),
        ("parameters", ctypes.c_ubyte * 4096),
    )


def compiled(name: str) -> Path:
    """The folder with ``host.so`` and ``kernels.ptx`` of ``hopper`` or ``blackwell``, compiled if the cache has none.

    Raises:
        BuildError: no compiler, no nvidia-cutlass, no examples in it, or the compilation failed.
    """
    source, arch, example = SOURCES[name]
    nvcc, include, library = find_nvcc(), find_cutlass().include, stand_in().path
    examples = include.parent / "examples" / example
    if not examples.is_dir():
        raise BuildError(f"nvidia-cutlass holds no {examples}")
    texts = {path.name: path.read_text() for path in (FOLDER / f"{source}.cu", FOLDER / "launch.h")}
    headers = {str(path.relative_to(examples)): path.read_bytes() for path in sorted(examples.rglob("*.hpp"))}
    digest = digest_of(
        {
            "sources": texts,
            "examples": {name: hashlib.sha256(content).hexdigest() for name, content in headers.items()},
            "cutlass": hashlib.sha256((include / "cutlass" / "version.h").read_bytes()).hexdigest(),
            "nvcc": nvcc.version,
            "flags": list(FLAGS),
            "standin": library.parent.name,
        }
    )

    def make(scratch: Path, folder: Path) -> Mapping[str, Any]:
        includes = [f"-I{path}" for path in (include, include.parent / "tools" / "util" / "include", examples)]
        target = ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]  # to PTX: ptxas has nothing to do
        compile_command = [str(nvcc.path), "-c", *FLAGS, *target, "-Xcompiler=-O0,-fPIC", *includes]
        compile_command += ["--keep", "--keep-dir", str(scratch), str(FOLDER / f"{source}.cu"), "-o", "host.o"]
        link = [str(nvcc.path), "-shared", "-cudart", "none", "host.o", str(library), "-o", str(folder / "host.so")]
        link += ["-Xlinker", f"-rpath={library.parent}"]
        for command in (compile_command, link):
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{source}.cu did not compile:\n{done.stdout}{done.stderr}")
        (scratch / f"{source}.ptx").rename(folder / "kernels.ptx")
        return {"key": source, "compiler": nvcc.version}

    return user_cache().find_or_make(f"cutlass-{name}", digest, make).folder


@dataclass(frozen=True)
class Dense:
    """Random inputs in fp16, and exact attention and its gradients in float64. Heads share key heads."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int

    def _random(self, tokens: int, heads: int, seed: int) -> Array:
        rng = np.random.default_rng([seed, *map(int, (self.batch, heads, tokens))])
        return rng.standard_normal((self.batch, tokens, heads, DIM)).astype(np.float16)

    @cached_property
    def inputs(self) -> tuple[Array, Array, Array, Array]:
        """q, k, v, dO: [batch][tokens][heads][128]"""
        sizes = ((self.queries, self.heads), (self.keys, self.key_heads), (self.keys, self.key_heads))
        q, k, v = (self._random(*size, seed) for seed, size in enumerate(sizes))
        return q, k, v, self._random(self.queries, self.heads, 3)

    @cached_property
    def exact(self) -> dict[str, Array]:
        """Results, and under the name with "~" what their rounding errors scale with."""
        q, k, v, do = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in self.inputs)
        share = self.heads // self.key_heads
        k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
        scores = SCALE * q @ k.swapaxes(2, 3)
        high = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - high)
        total = weights.sum(axis=-1, keepdims=True)
        p = weights / total
        o = p @ v
        delta = (o * do).sum(-1, keepdims=True)
        ds = p * (do @ v.swapaxes(2, 3) - delta)

        def grouped(x: Array) -> Array:
            return x.reshape(self.batch, self.key_heads, share, *x.shape[2:]).sum(2)

        pt, dst = p.swapaxes(2, 3), ds.swapaxes(2, 3)
        return {
            "o": o,
            "~o": p @ np.abs(v),
            "lse": (high + np.log(total))[..., 0],
            "delta": delta[..., 0],
            "dq": SCALE * ds @ k,
            "~dq": SCALE * np.abs(ds) @ np.abs(k),
            "dk": grouped(SCALE * dst @ q),
            "~dk": grouped(SCALE * np.abs(dst) @ np.abs(q)),
            "dv": grouped(pt @ do),
            "~dv": grouped(pt @ np.abs(do)),
        }

    def close(self, name: str, value: Array) -> bool:
        """Whether a result [batch][heads][tokens][128] is within fp16's rounding of weights and result."""
        exact, scale = self.exact[name], self.exact["~" + name]
        # Two roundings to fp16, of P or dS and of the result, each half an ulp; fp32 sums in between.
        bound = 2.0**-11 * (scale + np.abs(exact)) + 1e-4 * (1 + scale)
        return bool((np.abs(value - exact) <= bound).all())


@dataclass(frozen=True)
class Example:
    """A kernel of ``hopper`` (example 88) or ``blackwell`` (example 77), ``forward`` or ``backward``."""

    arch: str
    direction: str

    @cached_property
    def text(self) -> str:
        """The PTX of this kernel alone."""
        text = (compiled(self.arch) / "kernels.ptx").read_text()
        body, tail = re.split(r"\n(?=\s*\.file\s)", text, maxsplit=1)
        head, *entries = re.split(r"\n(?=(?:\.visible |\.weak )?\.entry )", body)
        backward = [entry for entry in entries if "Bwd" in entry.split("(")[0]]
        (forward,) = (entry for entry in entries if entry not in backward)
        entry = forward if self.direction == "forward" else backward[0]
        return f"{head}\n{entry}\n{tail}"

    def module(self) -> Module:
        return load(self.text)

    @property
    def relaxed(self) -> dict[str, bool]:
        """Where NVIDIA's kernel relies on more than PTX promises."""
        backward = self.direction == "backward"
        if self.arch == "hopper":
            return {"relaxed_warpgroups": backward}
        return {"relaxed_tensor_waits": True, "relaxed_tensor_fences": True, "relaxed_tensor_frees": backward}

    def run(self, module: Module, problem: Dense, options: Options | None = None) -> tuple[bool, Counters]:
        """Launches it. Returns whether all results are right, and the counters."""
        exact = problem.exact
        if self.direction == "forward":
            o, lse, counters = self.attend(module, problem, options)
            right = problem.close("o", o.transpose(0, 2, 1, 3)) and bool((np.abs(lse - exact["lse"]) < 1e-4).all())
            return right, counters
        q, k, v, do = problem.inputs
        lse, delta = exact["lse"].astype(np.float32), exact["delta"].astype(np.float32)
        if self.arch == "blackwell":
            lse, delta = (-math.log2(math.e) * exact["lse"]).astype(np.float32), -delta
        sums = np.zeros((problem.batch, problem.heads, problem.queries, DIM), np.float32)
        results = {"dk": np.full(k.shape, np.nan, np.float16), "dv": np.full(v.shape, np.nan, np.float16)}
        tensors = [q, k, v, do, lse, delta, sums, results["dk"], results["dv"]]
        counters = self._launch(module, problem, tensors, options)
        right = all(problem.close(name, value.transpose(0, 2, 1, 3)) for name, value in results.items())
        right &= problem.close("dq", sums * (SCALE if self.arch == "blackwell" else 1))
        return right, counters

    def attend(self, module: Module, problem: Dense, options: Options | None = None) -> tuple[Array, Array, Counters]:
        """Launches the forward kernel. Returns O as [batch][tokens][heads][128], its log-sum-exp as
        [batch][heads][tokens], and the counters."""
        q, k, v, _ = problem.inputs
        o = np.full(q.shape, np.nan, np.float16)
        lse = np.full((problem.batch, problem.heads, problem.queries), np.nan, np.float32)
        return o, lse, self._launch(module, problem, [q, k, v, o, lse], options)

    def _launch(self, module: Module, problem: Dense, tensors: list[Array], options: Options | None) -> Counters:
        host = ctypes.CDLL(str(compiled(self.arch) / "host.so"))
        launch = _Launch()
        sizes = (ctypes.c_int * 5)(problem.batch, problem.heads, problem.key_heads, problem.queries, problem.keys)
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.ctypes.data for tensor in tensors))
        getattr(host, self.direction)(sizes, pointers, ctypes.byref(launch))
        return module.launch(
            list(launch.grid),
            [launch.block],
            [bytes(launch.parameters[: launch.parameter_bytes])],
            shared_bytes=launch.shared_bytes,
            memory=tensors,
            options=replace(options or Options(), **self.relaxed),
        )
