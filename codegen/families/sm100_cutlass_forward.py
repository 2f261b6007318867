"""The sm100 forward kernels on the mainloop of CUTLASS's example 77: two halves of 128 query rows by 128 keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BuildError
from ..runtime.config import KernelConfig
from ..runtime.family import Padding
from .family import Family, Limits, MachineCode, TimeConstants, q_box_of_halves
from .target import TARGETS

if TYPE_CHECKING:
    from ..build_tools.sass import Sass

_REGISTERS = 65_536 // 512  # of a thread before the warps share them out anew
# Of a thread of each kind of warpgroup, as sm100/cutlass/kernel.h has them.
_SOFTMAX, _CORRECTION, _OTHER = 184, 112, 32

# Bytes of stack, stores or loads. Example 77 as it is, at head dim 128, has 200, 160 and 196 of them with nvcc 13.0, in
# correction warps (tests/compare_builds.py). Ours spills in the epilogue, where a Q tile ends, not among KV tiles.
_SPILL_BYTES = 128


def check_machine_code(config: KernelConfig, code: Sass, registers: int) -> dict[str, int]:
    """Counts of the kernel's instructions, for the record. A product runs beside the softmax whatever waits ptxas sets,
    for other warps issue it.

    Raises:
        BuildError: a product is missing, softmax warps spill, or warps have other registers than planned.
    """
    from ..build_tools.sass import MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR

    for opcode, product in ((UTCHMMA_SHARED, "Q K^T"), (UTCHMMA_TENSOR, "P V")):
        if not code.count(opcode):
            raise BuildError(f"the machine code has no tensor core instruction (UTCHMMA) for {product}")
    # With more it can't start; with fewer, warps would wait for ever for the registers that they ask for.
    if registers != _REGISTERS:
        raise BuildError(f"the kernel takes {registers} registers a thread at its start, planned: {_REGISTERS}")
    local = code.local_accesses()
    for role, planned in (("softmax", _SOFTMAX), ("correction", _CORRECTION), ("other", _OTHER)):
        if planned not in local:
            found = ", ".join(str(count) for count in local if count) or "none"
            raise BuildError(f"no warps set {planned} registers a thread, as planned for {role} warps; set: {found}")
    if local[_SOFTMAX]:
        raise BuildError(f"softmax warps spill registers: {local[_SOFTMAX]} accesses to local memory")
    return {"products": code.count(UTCHMMA_SHARED) + code.count(UTCHMMA_TENSOR), "mufu": code.count(MUFU)}


FAMILY = Family(
    op="gna_forward",
    target=TARGETS["sm100"],
    variant="cutlass",
    dtypes=("bf16", "fp16"),
    features=("deterministic",),
    limits=Limits(q_rows=256, kv_columns=128, head_dim=128, q_box=q_box_of_halves(128)),
    padding=Padding(rows=256, columns=128),
    default_tiles={1: ((256,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))},
    rounds_probabilities=True,
    cutlass="77_blackwell_fmha",
    relaxed=("relaxed_tensor_waits", "relaxed_tensor_fences"),
    machine_code=MachineCode(check_machine_code, _SPILL_BYTES),
    time=TimeConstants(
        device="B200",
        units=148,
        ghz=1.85,
        flop_per_cycle=8192.0,
        # NATTEN 0.20, perfectly block-sparse: 13.01 ms (HunyuanVideo) and 4.114 ms (FLUX) are 3820 and 3670 cycles
        # per 256x128 tile pair, 2048 of them matrix work. Other warps than those of the softmax rescale the output.
        score_cycles=0.047,
        solo_factor=1.0,  # a Q tile always has two halves
        tile_cycles=200.0,
        rescale_cycles=0.0,
        mask_cycles=0.02,
        mask_tile_cycles=300.0,
        key_cycles=0.0,
        q_tile_cycles=2000.0,
        load_bytes_per_cycle=36.0,
        memory_gb_s=8000.0,
        launch_us=3.0,
        dense_rows=256,
        source=(
            "softmax from NATTEN's published block-sparse times on B200; masks, loads and fixed costs "
            "estimated; no kernel of ours was run"
        ),
    ),
)
