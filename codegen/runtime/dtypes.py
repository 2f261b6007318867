"""The one table of element types. Standard library only: built wheels carry this module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """An element type, under its names everywhere.

    Attributes:
        name: in keys, specs and messages. Its enumerator in abi.h is ``GNAFORGE_<NAME>``.
        bytes: of one element.
        code: value of the enumerator.
        torch_name: name in torch, without ``torch.``.
        unwritten: bits of a NaN that no arithmetic makes: what still holds it was not written.
        ptx: name in PTX's matrix instructions; empty where they don't take it.
        outputs: the types that outputs of such inputs may have, the default first; empty: the type itself.
        p_exponent: probabilities are multiplied by 2 to this before they are rounded to it, as they are below 1.
    """

    name: str
    bytes: int
    code: int
    torch_name: str
    unwritten: int
    ptx: str = ""
    outputs: tuple[str, ...] = ()
    p_exponent: int = 0

    @property
    def output(self) -> str:
        """The type of outputs where no other one is asked for."""
        return self.outputs[0] if self.outputs else self.name

    @property
    def scaled(self) -> bool:
        """Whether calls bring descales: numbers that fit so narrow a type are multiplied by one per head."""
        return bool(self.outputs)

    def names(self) -> dict[str, str]:
        """Its names in C++ and PTX, for templates; one that it doesn't have is missing, so that no template can take
        it by mistake."""
        found = {"enumerator": f"GNAFORGE_{self.name.upper()}", "ptx": self.ptx}
        return {key: name for key, name in found.items() if name}

    @property
    def torch(self) -> torch.dtype:
        """torch's object for it. Imports torch."""
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            Dtype("fp32", bytes=4, code=1, torch_name="float32", unwritten=0x7FC5A5A5),
            Dtype("bf16", bytes=2, code=2, torch_name="bfloat16", unwritten=0x7FE5, ptx="bf16"),
            Dtype("fp16", bytes=2, code=3, torch_name="float16", unwritten=0x7EA5, ptx="f16"),
            Dtype(
                "e4m3",
                bytes=1,
                code=5,
                torch_name="float8_e4m3fn",
                unwritten=0xFF,
                ptx="e4m3",
                outputs=("bf16", "fp16"),
                p_exponent=8,
            ),
        )
    }
)

INT32 = Dtype("int32", bytes=4, code=4, torch_name="int32", unwritten=0x7FE5A5A5)
"""Of lengths; no kernel computes with it. Read by mistake, ``unwritten`` is longer than any tensor."""


def takes_out_dtype(dtype: str, dtypes: Collection[str]) -> bool:
    """Whether a type of outputs that is given beside the types of inputs, ``dtypes``, is meant for ``dtype``, one of
    them. Where outputs of some have another type than their inputs, it is meant for those alone. A name that is no
    type's is like one whose outputs have its own."""
    scaled = [name for name in dtypes if name in DTYPES and DTYPES[name].scaled]
    return dtype in scaled or not scaled


def dtype_name(dtype: object) -> str:
    """The name in `DTYPES` of a torch dtype; of any other, and of what is no dtype, its text."""
    text = str(dtype)
    return next((known.name for known in DTYPES.values() if text == f"torch.{known.torch_name}"), text)
