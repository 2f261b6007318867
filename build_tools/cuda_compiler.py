"""How CUDA sources are compiled and linked, and what the compiler says of a kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError
from .cuda import Nvcc, find_nvcc
from .sass import Sass, read_cubin
from .toolchain import Compiler

_HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", f"-Xcompiler={_HOST_FLAGS}")
NVCC_LINK_FLAGS = (
    "-shared",
    "--no-device-link",
    *(f"-Xlinker={flag}" for flag in ("-z", "defs", "--build-id=none", "-s", "--exclude-libs=ALL")),
)
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# ptxas serialises wgmma: each product waits for the one before.
_SERIALISED = re.compile(r"^.*\(C75(?:04|09|10|15)\).*$", re.MULTILINE)


@dataclass(frozen=True)
class KernelFacts:
    """What ptxas reports of a kernel."""

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
    """

    nvcc: Nvcc
    host: Compiler
    target: str
    stand_in: Path | None = None

    def compile_command(self, source: str, output: str, include_dir: Path) -> list[str]:
        """Compiles ``source`` to the object ``output``; leaves the machine code beside it, with suffix ``.cubin``."""
        folder = str(Path(output).parent)
        return [
            str(self.nvcc.path),
            *NVCC_FLAGS,
            *self._code_flags(),
            f"-ccbin={self.host.path}",
            f"-I{include_dir}",
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
            "compile_flags": [*NVCC_FLAGS, *self._code_flags()],
            "link_flags": list(NVCC_LINK_FLAGS),
            # The stand-in's folder is named by the digest of what it is made of.
            "runtime": "static" if self.stand_in is None else self.stand_in.parent.name,
        }

    @property
    def version(self) -> str:
        """For messages."""
        return f"nvcc {self.nvcc.version} ({self.nvcc.source}), {self.host.version}"

    def _code_flags(self) -> list[str]:
        if self.stand_in is None:
            return [f"-gencode=arch=compute_{self.target},code=sm_{self.target}"]
        # The emulator runs the PTX, and finds it in the object if it is not compressed.
        return [
            f"-gencode=arch=compute_{self.target},code=[sm_{self.target},compute_{self.target}]",
            "--no-compress",
            "-DGNAFORGE_EMULATED",
        ]


def cuda_compiler(host: Compiler, target: str, stand_in: Path | None = None) -> CudaCompiler:
    """nvcc for ``target``.

    Raises:
        BuildError: there is none.
    """
    return CudaCompiler(find_nvcc(), host, target, stand_in)


def kernel_facts(log: str) -> KernelFacts:
    """Reads what ``ptxas -v`` printed about the one kernel of an object.

    Raises:
        BuildError: it serialised matrix products, the kernel spills registers, or the report has another form.
    """
    if (warning := _SERIALISED.search(log)) is not None:
        raise BuildError(f"ptxas serialised the kernel's matrix products: {warning[0].strip()}")
    used, spills = _USED.findall(log), _SPILLS.findall(log)
    if len(used) != 1 or len(spills) != 1:
        raise BuildError(f"ptxas reported on {len(used)} kernels, expected 1:\n{log}")
    stack, stores, loads = map(int, spills[0])
    if stack or stores or loads:
        raise BuildError(
            f"the kernel spills registers: {stores} bytes of stores and {loads} of loads, {stack} bytes of stack; "
            "give it smaller tiles"
        )
    return KernelFacts(int(used[0]), stores + loads)


def machine_code(folder: Path) -> Sass:
    """The machine code of the kernel that was compiled in ``folder``.

    Raises:
        BuildError: there is not exactly one cubin, or it holds no code.
    """
    cubins = sorted(folder.glob("*.cubin"))
    if len(cubins) != 1:
        raise BuildError(f"nvcc left {len(cubins)} cubins in {folder}, expected 1")
    return read_cubin(cubins[0].read_bytes())
