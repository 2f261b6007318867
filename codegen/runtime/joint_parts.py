"""The calls that joint attention consists of: as templates/core/joint.h makes them, for whoever only looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .given import number_of
from .request import is_zero

_TEXT_NAMES = {
    "prefix": ("query of the prefix", "key of the prefix", "value of the prefix", "lengths of the prefix"),
    "suffix": ("query of the suffix", "key of the suffix", "value of the suffix", "lengths of the suffix"),
    "text": ("text_q", "text_k", "text_v", "text_lengths"),
}


class Part(NamedTuple):
    """One of the calls: its tensors and their names as `given.failure_of_call` has them, its pattern and the key of the
    kernel that it is pinned to; ``name`` is for messages."""

    name: str
    tensors: tuple[torch.Tensor | None, ...]
    names: tuple[str, ...]
    pattern: Sequence[int]
    key: str


def of_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Sequence[int],
    key: str,
    text_key: str,
    *texts: torch.Tensor | None,
) -> Iterator[Part]:
    """The parts of a call of the operator ``joint``, the image's first; ``texts`` are query, key, value and lengths of
    the prefix and of the suffix, or fewer.

    Raises:
        ValueError: behind the image's part: it has no tokens, or a text's query is of another shape than its key.
    """
    whole = (*texts, *[None] * (8 - len(texts)))
    return _parts((q, k, v), pattern, key, text_key, {"prefix": whole[:4], "suffix": whole[4:]})


def of_apart(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Sequence[int],
    key: str,
    text_key: str,
    *text: torch.Tensor | None,
) -> Iterator[Part]:
    """The parts of a call of the operator ``joint_apart``, as `of_packed` gives them."""
    return _parts((q, k, v), pattern, key, text_key, {"text": (*text, *[None] * (4 - len(text)))})


def _parts(
    image: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: Sequence[int],
    key: str,
    text_key: str,
    texts: dict[str, tuple[torch.Tensor | None, ...]],
) -> Iterator[Part]:
    pieces = tuple(tensor for text in texts.values() for tensor in text[1:])
    names = tuple(name for text in texts for name in _TEXT_NAMES[text][1:])
    yield Part("image rows", (*image, *pieces), ("query", "key", "value", *names), pattern, key)
    keys, values = (tensor.flatten(1, -3) for tensor in image[1:])
    if is_zero(keys.shape[1]):
        raise ValueError(f"query has shape {list(image[0].shape)}; an image has tokens")
    for text, (q, k, *_) in texts.items():
        if q is not None and k is not None:
            wanted = [*k.shape[:2], *image[0].shape[-2:]]
            if list(q.shape) != wanted:
                name, key_name = _TEXT_NAMES[text][:2]
                found, needed = ([number_of(size) for size in sizes] for sizes in (q.shape, wanted))
                raise ValueError(f"{name} has shape {found}; beside {key_name} it must be {needed}")
            own = (_TEXT_NAMES[text][0], "key", "value", *names)
            yield Part("text rows", (q, keys, values, *pieces), own, [keys.shape[1], 1, 1, 0], text_key)
