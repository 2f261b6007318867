"""Compiles and links CUDA sources, and reads what the compiler says of a kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .cuda import Cutlass, Nvcc, find_cutlass, find_nvcc
from .errors import BuildError
from .sass import Sass, read_cubin
from .toolchain import Compiler

_HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", f"-Xcompiler={_HOST_FLAGS}")
# What CUTLASS's own examples are compiled with, as far as it bears on device code.
CUTLASS_FLAGS = ("-DNDEBUG", "-ftz=true", "--expt-relaxed-constexpr")
NVCC_LINK_FLAGS = (
    "-shared",
    "--no-device-link",
    *(f"-Xlinker={flag}" for flag in ("-z", "defs", "--build-id=none", "-s", "--exclude-libs=ALL")),
)
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# ptxas lets each wgmma wait for the one before, adds waits of its own, or leaves out setmaxnreg. By its words: versions
# number them differently.
_LOSS = re.compile(r"^.*(?:Potential Performance Loss|warpgroup\.wait is injected).*$", re.MULTILINE)


@dataclass(frozen=True)
class KernelFacts:
    """Facts that ptxas reports of a kernel."""

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class CudaCompiler:
    """nvcc with its host compiler, for one GPU architecture.

    Attributes:
        nvcc: the CUDA compiler.
        host: what compiles host code; nvcc calls it.
        target: the architecture as in ``sm_<target>``.
        stand_in: the emulator's stand-in for the CUDA runtime, to link to; None links the static runtime.
        cutlass: where kernels find CUTLASS, if they are made of it.
    """

    nvcc: Nvcc
    host: Compiler
    target: str
    stand_in: Path | None = None
    cutlass: Cutlass | None = None

    def compile_command(self, source: str, output: str, *include_dirs: Path) -> list[str]:
        """Compiles ``source`` to the object ``output``; leaves the machine code beside it, with suffix ``.cubin``."""
        folder = str(Path(output).parent)
        return [
            str(self.nvcc.path),
            *self._flags(),
            f"-ccbin={self.host.path}",
            *(f"-I{path}" for path in include_dirs),
            *(f"-isystem={path}" for path in (self.cutlass.folders if self.cutlass else ())),  # mutes its warnings
            "--keep",
            f"--keep-dir={folder}",
            "-c",
            source,
            "-o",
            output,
        ]

    def link_command(self, objects: list[str], output: str) -> list[str]:
        """Links objects to a stripped shared library that leaves no symbol undefined."""
        command = [str(self.nvcc.path), f"-ccbin={self.host.path}", *NVCC_LINK_FLAGS]
        if self.stand_in is not None:
            runtime = ["-cudart=none", str(self.stand_in), f"-Xlinker=-rpath={self.stand_in.parent}"]
        else:
            library_dir = self.nvcc.path.parent.parent / "lib"  # of the pip wheels; nvcc itself expects lib64
            runtime = ["-cudart=static", *([f"-L{library_dir}"] if library_dir.is_dir() else [])]
        return [*command, *objects, *runtime, "-o", output]

    def identity(self) -> dict[str, object]:
        """What of this compiler decides the bytes of an object."""
        return {
            "compiler": f"nvcc {self.nvcc.version}",
            "host_compiler": self.host.version,
            **self.host.options,
            **self.host.target,
            "compile_flags": self._flags(),
            "link_flags": list(NVCC_LINK_FLAGS),
            # The stand-in's folder is named by the digest of what it is made of.
            "runtime": "static" if self.stand_in is None else self.stand_in.parent.name,
        }

    @property
    def version(self) -> str:
        """For messages."""
        return f"nvcc {self.nvcc.version} ({self.nvcc.source}), {self.host.version}"

    def _flags(self) -> list[str]:
        return [*NVCC_FLAGS, *(CUTLASS_FLAGS if self.cutlass else ()), *self._code_flags()]

    def _code_flags(self) -> list[str]:
        if self.stand_in is None:
            return [f"-gencode=arch=compute_{self.target},code=sm_{self.target}"]
        # The emulator runs the PTX, and finds it in the object if it is not compressed.
        return [
            f"-gencode=arch=compute_{self.target},code=[sm_{self.target},compute_{self.target}]",
            "--no-compress",
            "-lineinfo",  # its messages name lines of the sources
            "-DGNAFORGE_EMULATED",
        ]


def cuda_compiler(
    host: Compiler,
    target: str,
    stand_in: Path | None = None,
    *,
    cutlass: str = "",
    at_least: tuple[int, int] = (0, 0),
) -> CudaCompiler:
    """nvcc for ``target``, of a version ``at_least`` that, with CUTLASS if kernels are made of it: of which example.

    Raises:
        BuildError: one of them is missing.
    """
    return CudaCompiler(find_nvcc(at_least), host, target, stand_in, find_cutlass(cutlass) if cutlass else None)


def kernel_facts(log: str, spill_limit: int = 0) -> KernelFacts:
    """Reads what ``ptxas -v`` printed about the kernel of an object, which takes most registers, and those that prepare
    for it.

    Raises:
        BuildError: it reports a loss of performance, such as serialised products; a kernel spills more than
            ``spill_limit`` bytes of registers; or the report has another form.
    """
    if losses := dict.fromkeys(_LOSS.findall(log)):
        raise BuildError("\n".join(["ptxas says that the kernel loses performance:", *losses]))
    used, spills = _USED.findall(log), _SPILLS.findall(log)
    if not used or len(spills) != len(used):
        raise BuildError(f"ptxas reported on {len(used)} kernels, of {len(spills)} on spills:\n{log}")
    stack, stores, loads = (sum(map(int, each)) for each in zip(*spills, strict=True))
    if max(stack, stores, loads) > spill_limit:
        advice = f"there may be at most {spill_limit} of each" if spill_limit else "give it smaller tiles"
        raise BuildError(
            f"the kernel spills registers: {stores} bytes of stores and {loads} of loads, {stack} bytes of stack; "
            + advice
        )
    return KernelFacts(max(map(int, used)), stores + loads)


def cubin_of(folder: Path) -> Path:
    """The machine code of the kernel that was compiled in ``folder``, as a file.

    Raises:
        BuildError: there is not exactly one cubin.
    """
    cubins = sorted(folder.glob("*.cubin"))
    if len(cubins) != 1:
        raise BuildError(f"nvcc left {len(cubins)} cubins in {folder}, expected 1")
    return cubins[0]


def machine_code(folder: Path) -> Sass:
    """The machine code of the kernel that was compiled in ``folder``.

    Raises:
        BuildError: there is not exactly one cubin, or it holds no code.
    """
    return read_cubin(cubin_of(folder).read_bytes())
