"""Boxes of tokens in tensors [batch, *tokens, ...], and pieces of keys and values in messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch

from .layout import Box, Call, Piece, Place
from .planning import Route

Pair = tuple[torch.Tensor, torch.Tensor]
"""Of keys and of values."""


def part(tensor: torch.Tensor, box: Box, origin: Sequence[int]) -> torch.Tensor:
    """A view of the tokens of a box; the tensor's begin at ``origin``."""
    spans = (slice(low - begin, high - begin) for (low, high), begin in zip(box, origin, strict=True))
    places: tuple[slice, ...] = (slice(None), *spans)
    return tensor[places]


def box_at(begin: Sequence[int], size: Sequence[int]) -> Box:
    """The box of a size that begins there."""
    return tuple((low, low + extent) for low, extent in zip(begin, size, strict=True))


def pack(pieces: Sequence[Piece], own: Pair) -> torch.Tensor:
    """A message: of each piece its keys, then its values."""
    parts = [
        part(tensor, box_at(piece.source, piece.size), (0,) * len(piece.size)).reshape(-1)
        for piece in pieces
        for tensor in own
    ]
    return torch.cat(parts) if parts else own[0].new_empty(0)


def unpack(pieces: Sequence[Piece], message: torch.Tensor, own: Pair) -> list[Pair]:
    """The pieces of a message, as views; other sizes are those of the rank's own keys and values."""
    found, at = [], 0
    for piece in pieces:
        pair = []
        for tensor in own:
            shape = (tensor.shape[0], *piece.size, *tensor.shape[-2:])
            pair.append(message[at : at + prod(shape)].view(shape))
            at += prod(shape)
        found.append((pair[0], pair[1]))
    return found


def gather(call: Call, route: Route, own: torch.Tensor, halo: Sequence[torch.Tensor]) -> torch.Tensor:
    """The keys, or values, of a call: of the rank's own ones and of pieces that came."""
    keys = own.new_empty((own.shape[0], *call.kv_tokens, *own.shape[-2:]))
    for there, here, source in _places(call, route, own, halo):
        part(keys, there, (0,) * len(there)).copy_(part(source, here, (0,) * len(here)))
    return keys


def scatter_add(
    call: Call, route: Route, gradient: torch.Tensor, own: torch.Tensor, halo: Sequence[torch.Tensor]
) -> None:
    """Adds the gradient of a call's keys, or values, to those of the tensors that `gather` took them from."""
    for there, here, target in _places(call, route, own, halo):
        part(target, here, (0,) * len(here)).add_(part(gradient, there, (0,) * len(there)))


def _places(
    call: Call, route: Route, own: torch.Tensor, halo: Sequence[torch.Tensor]
) -> Iterator[tuple[Box, Box, torch.Tensor]]:
    """Boxes of a call's keys with the boxes of the tensors that have them: own tokens first, then pieces in order."""
    sources = [(route.origin, route.shape, own)]
    sources += [(piece.position, piece.size, held) for piece, held in zip(route.received, halo, strict=True)]
    for position, size, tensor in sources:
        for pairs in product(*_overlaps(call, position, size)):
            yield tuple(there for there, _ in pairs), tuple(here for _, here in pairs), tensor


def _overlaps(call: Call, position: Place, size: Place) -> Iterator[list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Per axis: what tokens from ``position`` on are of a call's keys, counted in these, and in those tokens."""
    for spans, begin, extent in zip(call.keys, position, size, strict=True):
        at, found = 0, []
        for low, high in spans:
            first, last = max(low, begin), min(high, begin + extent)
            if first < last:
                found.append(((at + first - low, at + last - low), (first - begin, last - begin)))
            at += high - low
        yield found
