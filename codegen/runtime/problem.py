"""`Problem`: one attention problem, as every part of the package takes it.

Standard library only: built wheels carry this module. Tensors are looked at, never made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from .dtypes import DTYPES, dtype_name
from .problem_rules import EDGES, SCALARS, Dimension, ProblemError, dimension_faults, head_faults, require_types

if TYPE_CHECKING:
    import torch

_FEATURE_FIELDS = {
    "edge": ("edge",),
    "block_causal": ("causal",),
    "sink": ("sink",),
    "range": ("grid", "q_offset", "kv_tokens", "kv_offset"),
    "kv_sink": ("kv_sink",),
    "extra_keys": ("extra_tokens",),
}

FEATURES = tuple(_FEATURE_FIELDS)
"""What a problem may need beyond plain GNA: GNAFORGE_FEATURE_* of abi.h, in lower case."""

_PLAIN = ("tokens", "window", "stride", "dilation", "causal")
# What each field of a pattern is along a dimension where it says nothing.
_NEUTRAL: dict[str, Any] = {
    "stride": 1,
    "dilation": 1,
    "causal": False,
    "edge": "shift",
    "sink": 0,
    "q_offset": 0,
    "kv_offset": 0,
    "kv_sink": 0,
}
_PATTERN = ("stride", "dilation", "causal", "edge", "sink", "grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink")
_NOT_PLAIN = ("edge", "sink", "grid", "q_offset", "kv_offset", "kv_sink")  # arguments of calls

_CAUSAL = (False, True, "block")  # by number in the operator's pattern
_CAUSAL_WORDS: dict[Any, Causal] = {"0": False, "1": True, "token": True, "block": "block"}
_COUNTS = ("tokens", "window", "stride", "dilation", "sink", "grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink")
_IN_PATTERN = ("window", "stride", "dilation", "causal", "edge", "sink", "grid", "q_offset", "kv_offset", "kv_sink")

PLAIN_PATTERN_FIELDS, PATTERN_FIELDS = 4, len(_IN_PATTERN)
"""Numbers per dimension of the operators' patterns: they have the first fields, or all."""

Ints = int | Sequence[int]
Causal = bool | str


class PlainAxis(NamedTuple):
    """One token dimension of a plain problem."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool


@dataclass(frozen=True, init=False)
class Problem:
    """One attention problem. Fields from ``tokens`` to ``causal``, and from ``edge`` to ``kv_sink``, have one entry per
    token dimension, outermost first; a single value stands for all dimensions.

    Q is [batch, *tokens, heads, head_dim]; K is [batch, *kv_tokens, kv_heads, head_dim]; V and the output have
    ``value_head_dim`` channels. Semantics: GNA, arXiv 2504.16922; a key is visible iff it is along every dimension.

    Attributes:
        tokens: of the queries.
        window: keys that a query sees (at most, where causal).
        stride: consecutive queries that share one window.
        dilation: tokens from one key of a window to the next.
        causal: True (or ``token``): a query sees no key after itself; ``block``: none after its group of ``stride``
            queries.
        heads, kv_heads: of Q, and of K and V; by default as many.
        head_dim, value_head_dim: channels of Q and K, and of V; by default equal.
        batch: batch entries.
        dtype: element type of Q, K and V.
        out_dtype: that of the output, where it is another than `Dtype.output` of ``dtype``; else empty.
        scale: of the scores; None: head_dim ** -0.5.
        edge: what a window does that would leave the grid, of `EDGES`.
        sink: first keys of the grid that are seen beside the window.
        grid: tokens that windows are laid in; None: those of the keys.
        q_offset: where in the grid the queries begin.
        kv_tokens: of the keys; None: as the queries.
        kv_offset: where in the grid the keys begin.
        kv_sink: keys [0, kv_sink) are the grid's first, the others begin at kv_offset.
        extra_tokens: keys of each further piece that all queries see.

    Raises:
        ProblemError: (a ValueError) a field is malformed, or the fields break a rule of `problem_rules`.
    """

    tokens: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[Causal, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    batch: int
    dtype: str
    out_dtype: str
    scale: float | None
    edge: tuple[str, ...]
    sink: tuple[int, ...]
    grid: tuple[int, ...] | None
    q_offset: tuple[int, ...]
    kv_tokens: tuple[int, ...] | None
    kv_offset: tuple[int, ...]
    kv_sink: tuple[int, ...]
    extra_tokens: tuple[int, ...]

    def __init__(
        self,
        tokens: Ints,
        window: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        causal: Causal | Sequence[Causal] = False,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int = 128,
        value_head_dim: int | None = None,
        batch: int = 1,
        dtype: str = "bf16",
        out_dtype: str = "",
        scale: float | None = None,
        edge: str | Sequence[str] = "shift",
        sink: Ints = 0,
        grid: Ints | None = None,
        q_offset: Ints = 0,
        kv_tokens: Ints | None = None,
        kv_offset: Ints = 0,
        kv_sink: Ints = 0,
        extra_tokens: Sequence[int] = (),
    ) -> None:
        whole = tuple(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else (tokens,)
        if not 1 <= (rank := len(whole)) <= 3:
            raise ProblemError("tokens", f"{whole} has {rank} entries; one to three dimensions are possible")
        keys = None if kv_tokens is None else per_dim("kv_tokens", kv_tokens, rank)
        keys = None if keys == whole else keys
        field = per_dim("grid", grid, rank) if grid is not None else None
        values: dict[str, Any] = {
            "tokens": whole,
            "window": per_dim("window", window, rank),
            "stride": per_dim("stride", stride, rank),
            "dilation": per_dim("dilation", dilation, rank),
            "causal": tuple(True if x == "token" else x for x in per_dim("causal", causal, rank)),
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "value_head_dim": head_dim if value_head_dim is None else value_head_dim,
            "batch": batch,
            "dtype": dtype,
            "out_dtype": "" if dtype in DTYPES and out_dtype == DTYPES[dtype].output else out_dtype,
            "scale": scale,
            "edge": per_dim("edge", edge, rank),
            "sink": per_dim("sink", sink, rank),
            "grid": field,
            "q_offset": per_dim("q_offset", q_offset, rank),
            "kv_tokens": keys,
            "kv_offset": per_dim("kv_offset", kv_offset, rank),
            "kv_sink": per_dim("kv_sink", kv_sink, rank),
            "extra_tokens": tuple(extra_tokens),
        }
        require_types(values)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if field == (keys or whole) and all(axis.dense or axis.keys == axis.tokens for axis in self.dimensions):
            object.__setattr__(self, "grid", None)  # which would say no more
        faults = [fault for d, axis in enumerate(self.dimensions) for fault in dimension_faults(axis, d)]
        for fault in (*faults, *head_faults(self.heads, self.kv_heads)):
            raise ProblemError(fault.field, fault.text)

    @classmethod
    def of_tensors(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        causal: Causal | Sequence[Causal] = False,
        **further: Any,
    ) -> Problem:
        """The problem that a call with these tensors computes; ``further`` are fields that they don't say.

        Raises:
            ProblemError: as the constructor; the tensors are not looked at beyond what a problem holds.
        """
        return cls(
            tuple(query.shape[1:-2]),
            window,
            stride,
            dilation,
            causal,
            heads=query.shape[-2],
            kv_heads=key.shape[-2],
            head_dim=query.shape[-1],
            value_head_dim=value.shape[-1],
            batch=query.shape[0],
            dtype=dtype_name(query.dtype),
            kv_tokens=tuple(key.shape[1:-2]),
            **further,
        )

    @property
    def output_dtype(self) -> str:
        """Of the output."""
        return self.out_dtype or DTYPES[self.dtype].output

    @property
    def rank(self) -> int:
        """Number of token dimensions."""
        return len(self.tokens)

    @property
    def token_count(self) -> int:
        """Query tokens of one batch entry."""
        return prod(self.tokens)

    @property
    def pair_count(self) -> int:
        """Pairs of a query and a key, extra ones included, of one batch entry and head: what dense attention takes."""
        return self.token_count * (prod(self.kv_tokens or self.tokens) + sum(self.extra_tokens))

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What the problem says of each token dimension."""
        columns: list[Sequence[Any]] = [getattr(self, name) or (None,) * self.rank for name in Dimension._fields]
        return tuple(Dimension(*entries) for entries in zip(*columns, strict=True))

    @property
    def axes(self) -> tuple[PlainAxis, ...]:
        """The token dimensions of a plain problem.

        Raises:
            ProblemError: it is not plain.
        """
        self.require_features(())
        columns = (self.tokens, self.window, self.stride, self.dilation, self.causal)
        return tuple(PlainAxis(n, w, s, d, c is True) for n, w, s, d, c in zip(*columns, strict=True))

    @property
    def pattern(self) -> list[int]:
        """The torch operator's ``pattern``: window, stride, dilation and causal of all dimensions; where they don't say
        all, also edge, sink, grid, q_offset, kv_offset and kv_sink. Extra keys are the operator's own arguments."""
        fields = {
            "window": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "causal": map(_CAUSAL.index, self.causal),
            "edge": map(EDGES.index, self.edge),
            "sink": self.sink,
            "grid": self.grid or self.kv_tokens or self.tokens,
            "q_offset": self.q_offset,
            "kv_offset": self.kv_offset,
            "kv_sink": self.kv_sink,
        }
        plain = not {*self.features()} - {"block_causal", "extra_keys"}
        names = list(fields)[: 4 if plain else None]
        return [value for name in names for value in fields[name]]

    def features(self) -> tuple[str, ...]:
        """What it needs beyond plain GNA, of `FEATURES` and in that order."""
        return tuple(name for name, wanted in _FEATURE_FIELDS.items() if any(map(self._needs, wanted)))

    def _needs(self, field: str) -> bool:
        return "block" in self.causal if field == "causal" else not self._is_neutral(field)

    def _is_neutral(self, field: str) -> bool:
        value = getattr(self, field)
        return value is None or set(value) <= {_NEUTRAL.get(field)}

    def require_features(self, has: Iterable[str], who: str = "this version") -> None:
        """Refuses the problem for somebody that has only these features.

        Raises:
            ProblemError: it needs another one, which the message names.
        """
        for name in self.features():
            if name not in has:
                field = next(filter(self._needs, _FEATURE_FIELDS[name]))
                raise ProblemError(field, f"{who} doesn't have the feature {name}")

    def dense(self) -> Problem:
        """Attention of all queries to all keys, by the same tensors."""
        one, none = (1,) * self.rank, (0,) * self.rank
        plain: dict[str, Any] = {"stride": one, "dilation": one, "causal": (False,) * self.rank, "edge": "shift"}
        plain |= dict.fromkeys(("sink", "q_offset", "kv_offset", "kv_sink"), none)
        return replace(self, window=self.kv_tokens or self.tokens, grid=None, **plain)

    def arguments(self) -> dict[str, Any]:
        """The pattern and scale as keyword arguments of `neighborhood_attention`.

        Raises:
            ProblemError: there are extra keys, which are tensors there.
        """
        self.require_features([name for name in FEATURES if name != "extra_keys"], "a call without their tensors")
        further = [name for name in _NOT_PLAIN if not self._is_neutral(name)]
        return {
            "kernel_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.causal,
            **({} if self.scale is None else {"scale": self.scale}),
            **{name: getattr(self, name) for name in further},
        }

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values, for JSON; those beyond plain GNA only where they say something."""
        own = [name for name in ("out_dtype", "scale") if getattr(self, name) not in ("", None)]
        names = [*_PLAIN, *SCALARS, "dtype", *own]
        names += [name for name in (*_PATTERN, "extra_tokens") if name not in names and not self._is_neutral(name)]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Problem:
        """The problem of fields as `as_json` gives them; those that are missing have their default.

        Raises:
            ProblemError: a field is unknown, or wrong.
        """
        names = [field.name for field in fields(cls)]
        for name in (*sorted(data.keys() - set(names)), *sorted({"tokens", "window"} - data.keys())):
            raise ProblemError(name, "is no field of a problem" if name in data else "is required")
        return cls(**data)

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Problem:
        """The problem that options of a command line describe, by field; None stands for an option that wasn't given.
        What has an entry per dimension may be a text: ``30,48,80`` or ``30x48x80``, one entry for all; causal: 0, 1 or
        block; edge: ``shift,wrap``. ``extra_tokens`` has a number per piece.

        Raises:
            ProblemError: a text is no list of numbers, or the fields are wrong.
        """
        fields = {name: value for name, value in given.items() if value is not None}
        for name in (*_COUNTS, "extra_tokens"):
            if isinstance(text := fields.get(name), str):
                numbers = parse_numbers(name, text)
                fields[name] = numbers[0] if len(numbers) == 1 and name != "extra_tokens" else numbers
        if "causal" in fields:
            words = fields["causal"].split(",") if isinstance(fields["causal"], str) else [fields["causal"]]
            if not set(words) <= _CAUSAL_WORDS.keys():
                allowed = "0, 1 (or token) or block, once or per dimension"
                raise ProblemError("causal", f"{given['causal']!r} is not {allowed}")
            flags = tuple(_CAUSAL_WORDS[word] for word in words)
            fields["causal"] = flags[0] if len(flags) == 1 else flags
        if isinstance(text := fields.get("edge"), str) and "," in text:
            fields["edge"] = tuple(text.split(","))
        return cls.from_json(fields)

    def __str__(self) -> str:
        """In one line, for people, without dtype and head dim: ``30x48x80, window 18x24x24, 24 heads``."""
        return ", ".join([self.pattern_text(), *self._head_texts()])

    def pattern_text(self) -> str:
        """Tokens and pattern in one line, for people: ``30x48x80, window 18x24x24``."""
        said = [f"{name.replace('_', ' ')} {_box(getattr(self, name))}" for name in self._not_neutral(_PATTERN)]
        return ", ".join([_box(self.tokens), f"window {_box(self.window)}", *said])

    def _head_texts(self) -> list[str]:
        parts = [f"extra keys {' and '.join(map(str, self.extra_tokens))}"] if self.extra_tokens else []
        parts += [f"scale {self.scale:g}"] if self.scale is not None else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        grouped = f" ({self.kv_heads} of K, V)" if self.kv_heads != self.heads else ""
        return parts + ([f"{self.heads} heads{grouped}"] if self.heads > 1 or grouped else [])

    def options(self, *, elements: bool = True) -> str:
        """The command line's options that give this problem; ``elements``: with head dims and dtype."""
        given = [
            f"{option_of(name)} {','.join(map(_option_text, getattr(self, name)))}"
            for name in self._not_neutral(("tokens", "window", *_PATTERN, "extra_tokens"))
        ]
        given += [f"--heads {self.heads}"] if self.heads > 1 else []
        given += [f"--kv-heads {self.kv_heads}"] if self.kv_heads != self.heads else []
        given += [f"--batch {self.batch}"] if self.batch > 1 else []
        if elements:
            given += [f"--head-dim {self.head_dim}"]
            given += [f"--value-head-dim {self.value_head_dim}"] if self.value_head_dim != self.head_dim else []
            given += [f"--dtype {self.dtype}", *([f"--out-dtype {self.out_dtype}"] if self.out_dtype else [])]
        return " ".join(given)

    def register_arguments(self) -> list[str]:
        """The arguments of `gnaforge.register` that fit tiles to this problem: ``window=(18, 24, 24)``, ..."""
        names = self._not_neutral(("tokens", "window", *_PATTERN, "extra_tokens"))
        found = [f"{name}={_tuple_text(getattr(self, name))}" for name in names]
        found.append(f"heads={self.heads}")
        found += [f"kv_heads={self.kv_heads}"] if self.kv_heads != self.heads else []
        return found + ([f"batch={self.batch}"] if self.batch != 1 else [])

    def _not_neutral(self, names: Iterable[str]) -> list[str]:
        """Those of some fields that aren't neutral."""
        return [name for name in names if not self._is_neutral(name)]


def option_of(field: str) -> str:
    """The command line's option for a field."""
    return f"--{field.replace('_', '-')}"


def parse_numbers(field: str, text: str) -> tuple[int, ...]:
    """The whole numbers that a text lists, separated by commas or ``x``.

    Raises:
        ProblemError: it lists something else; blames ``field``.
    """
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ProblemError(field, f"{text!r} is no list of whole numbers; write for example 56,56") from None


def fields_of_pattern(pattern: Sequence[int]) -> dict[str, tuple[Any, ...]]:
    """The fields of a problem that the torch operator's ``pattern`` holds, as `Problem.pattern` gives it.

    Raises:
        ProblemError: it has a wrong length, or numbers that mean nothing.
    """
    for rank in (1, 2, 3):
        for count in (PLAIN_PATTERN_FIELDS, PATTERN_FIELDS):
            if len(pattern) == rank * count:
                columns = [tuple(pattern[i : i + rank]) for i in range(0, len(pattern), rank)]
                fields: dict[str, tuple[Any, ...]] = dict(zip(_IN_PATTERN, columns, strict=False))
                for name, meanings in (("causal", _CAUSAL), ("edge", EDGES)):
                    if not all(0 <= number < len(meanings) for number in fields.get(name, ())):
                        raise ProblemError("pattern", f"{fields[name]} holds numbers that are no {name}")
                    if name in fields:
                        fields[name] = tuple(meanings[number] for number in fields[name])
                if not any(fields.get("grid", ())):  # the key tensor's tokens
                    fields.pop("grid", None)
                return fields
    raise ProblemError("pattern", f"{len(pattern)} numbers are no pattern of 1 to 3 dimensions")


def split_patterns(pattern: Sequence[int], rank: int, count: int) -> list[Sequence[int]]:
    """The patterns that an operator's ``pattern`` holds: one, or one for each of ``count`` heads or samples."""
    if len(pattern) in (rank * PLAIN_PATTERN_FIELDS, rank * PATTERN_FIELDS) or count == 0 or len(pattern) % count:
        return [pattern]
    own = len(pattern) // count
    return [pattern[i : i + own] for i in range(0, len(pattern), own)]


def hungriest(patterns: Sequence[Sequence[int]], rank: int) -> Sequence[int]:
    """Of several patterns that one kernel is to serve the one that asks most of it: a window with more fields that
    aren't neutral, or else a larger one."""

    def wants(pattern: Sequence[int]) -> tuple[int, int]:
        beyond = [number for number in pattern[PLAIN_PATTERN_FIELDS * rank :] if number]
        return len(beyond) + sum(number > 1 for number in pattern[3 * rank : 4 * rank]), prod(pattern[:rank])

    return patterns[0] if len(patterns) == 1 else max(patterns, key=wants)


def per_dim(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One entry per token dimension: those given, or the value for all.

    Raises:
        ProblemError: there are more or fewer; blames the field ``name``.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) != rank:
        entries = "1 entry" if len(value) == 1 else f"{len(value)} entries"
        raise ProblemError(name, f"{tuple(value)} has {entries} for {rank} dimension{'s' * (rank > 1)}")
    return tuple(value)


def _box(values: Sequence[object]) -> str:
    words = any(isinstance(x, str) for x in values)
    return ("/" if words else "x").join(str(int(x)) if isinstance(x, bool) else str(x) for x in values)


def _option_text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _tuple_text(values: Sequence[object]) -> str:
    texts = [f'"{value}"' if isinstance(value, str) else str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"
