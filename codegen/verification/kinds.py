"""Names the kinds of runs. Needs no torch."""

from __future__ import annotations

from typing import Literal

Device = Literal["cpu", "emulator", "cuda"]
"""What runs a kernel: this processor, the emulator in place of a GPU, or a GPU."""

LAYOUTS = ("contiguous", "gapped", "heads first", "packed", "padded channels", "every second token")
"""Ways in which the tensors of a call lie: heads last without gaps; with room behind each dimension; heads outside of
the tokens; inputs as heads of one tensor; as channels of a wider tensor; a slice of the tokens. See `layouts`."""

POISONS = ("others", "unseen", "beyond")
"""What is made NaN although it must not matter: other batch entries and heads; tokens that a query doesn't see; extra
keys beyond their length. See `poison`."""

Comparison = dict[str, float]
"""``error``: the largest of a result; ``bound``: what is allowed where most of it is used; ``share``: how much."""
