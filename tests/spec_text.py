"""A valid spec, ways to spoil it, and what its reader says then."""

from __future__ import annotations

import pytest
from gnaforge.errors import InputError
from gnaforge.spec import parse_spec

VALID = """\
# a comment
spec_version: 1
library: hunyuan
arch: [cpu, sm90, sm100]
kernels:
  - rank: 3
    head_dim: [64, 128]
    dtype: [bf16, fp16]
    direction: [forward]
    causal: [true, false, false]
    tiles: [{q: [2, 8, 8], kv: [2, 8, 8]}]
    shapes:
      - {tokens: [30, 48, 80], window: [18, 24, 24], stride: [16, 8, 8], heads: 24}
      - {tokens: [30, 48, 80], window: [9, 24, 24], dilation: [3, 1, 1], heads: 24, kv_heads: 8, batch: 2}
"""


def problems(text: str | bytes) -> list[str]:
    """The lines of the error that ``text`` raises as the file ``f.yaml``."""
    with pytest.raises(InputError) as caught:
        parse_spec(text.encode() if isinstance(text, str) else text, "f.yaml")
    return str(caught.value).split("\n")


def marked(text: str) -> tuple[str, str]:
    """``text`` without its one mark «, and the line:column where the mark stood."""
    before, mark, after = text.partition("«")
    assert mark
    assert "«" not in after
    return before + after, f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def replaced(old: str, new: str) -> str:
    """`VALID` with the first ``old`` replaced."""
    assert old in VALID, old
    return VALID.replace(old, new, 1)
