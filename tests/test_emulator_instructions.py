"""Each arithmetic instruction of the emulator against NumPy, on edge cases and random bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator_ptx import DTYPES, bf16, element_address, f16, from_bf16, module_text, run
from gnaforge.build_tools.emulator import EmulationError, load

LANES = 1024
REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def inputs(kind: str, rng: np.random.Generator, small: bool = False) -> np.ndarray:
    """Random bits, with the type's edge cases in every combination at the front."""
    dtype = np.dtype(DTYPES[kind])
    if kind in ("f32", "f64"):
        values = (rng.standard_normal(LANES) * 10.0 ** rng.integers(-3, 4, LANES)).astype(dtype)
        edges = np.array([0, -0.0, 1, -1, 0.5, 1e30, -1e30, np.inf, -np.inf, np.nan, 3.5, 2.5], dtype)
    elif kind in ("f16", "f16x2"):
        values = rng.standard_normal(LANES * 2).astype(np.float16).view(np.uint16)
        values = values[:LANES] if kind == "f16" else values.view(np.uint32)
        edges = np.array([0, 0x3C00, 0x8000, 0x0001, 0x7C00, 0xFBFF], dtype)
    elif kind in ("bf16", "bf16x2"):
        values = bf16(rng.standard_normal(LANES * 2))
        values = values[:LANES] if kind == "bf16" else values.view(np.uint32)
        edges = np.array([0, 0x3F80, 0x8000, 0x7F80], dtype)
    elif kind == "f32x2":
        return rng.standard_normal(LANES * 2).astype(np.float32).view(np.uint64)
    else:
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, LANES, dtype, endpoint=True)
        if small:
            return (values % 70).astype(dtype)
        edges = np.array([0, 1, info.max, info.min, info.max - 1, 2], dtype)
    count = len(edges)
    first, second = np.meshgrid(np.arange(count), np.arange(count))
    chosen = first.ravel() if rng.integers(2) else second.ravel()
    values[: len(chosen)] = edges[chosen]
    return values


def lanewise(instruction: str, result: str, sources: list[np.ndarray], kinds: list[str]) -> np.ndarray:
    """Runs ``instruction`` with operands ``{d}``, ``{a}``, ``{b}``, ``{c}`` on each thread's values."""
    names = dict(zip("abc", (f"{REGISTER[source.itemsize]}{i + 1}" for i, source in enumerate(sources)), strict=False))
    out = np.zeros(LANES, DTYPES[result])
    body = ""
    for i, (source, kind) in enumerate(zip(sources, kinds, strict=True)):
        body += element_address("%d70", f"%p{i}", source.itemsize)
        body += f"ld.global.b{8 * source.itemsize} {names['abc'[i]]}, [%d70]; // {kind}\n"
    target = f"{REGISTER[out.itemsize]}0"
    body += instruction.format(d=target, **names) + "\n"
    body += element_address("%d70", f"%p{len(sources)}", out.itemsize)
    body += f"st.global.b{8 * out.itemsize} [%d70], {target};"
    run(body, [*sources, out], threads=LANES)
    return out


def case(
    opcode: str, result: str, kinds: str, expected: Callable[..., Any], small: str = "", tolerance: float = 0.0
) -> Any:
    return pytest.param(opcode, result, kinds.split(), expected, small.split(), tolerance, id=opcode)


def wrap(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Computes with Python's integers, then keeps the low bits."""
    bits = 8 * np.dtype(DTYPES[kind]).itemsize

    def apply(*arrays: np.ndarray) -> np.ndarray:
        values = [int(function(*(int(x) for x in row))) % (1 << bits) for row in zip(*arrays, strict=True)]
        return np.array(values, f"u{bits // 8}").view(DTYPES[kind])

    return apply


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def remainder(a: int, b: int) -> int:
    return a - truncated(a, b) * b if b else a


def funnel(low: int, high: int, n: int) -> int:
    return ((high << 32 | low) << min(n, 32)) >> 32


def extract(signed: bool) -> Callable[[int, int, int], int]:
    def apply(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        bits = [(a >> i) & 1 for i in range(32)]
        sign = bits[min(position + length - 1, 31)] if signed and length else 0
        field = [bits[position + i] if position + i < 32 else sign for i in range(min(length, 32))]
        field += [sign] * (32 - len(field))
        return sum(bit << i for i, bit in enumerate(field))

    return apply


def insert(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    out = [(b >> i) & 1 for i in range(32)]
    for i in range(length):
        if position + i < 32:
            out[position + i] = (a >> i) & 1 if i < 32 else 0
    return sum(bit << i for i, bit in enumerate(out))


def permute(a: int, b: int, c: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    out = []
    for i in range(4):
        nibble = (c >> (4 * i)) & 15
        byte = source[nibble & 7]
        out.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def lop3(table: int) -> Callable[[int, int, int], int]:
    def apply(a: int, b: int, c: int) -> int:
        return sum(
            ((table >> ((((a >> i) & 1) << 2) | (((b >> i) & 1) << 1) | ((c >> i) & 1))) & 1) << i for i in range(32)
        )

    return apply


def leading_zeros(bits: int) -> Callable[[int], int]:
    return lambda a: bits - (a % (1 << bits)).bit_length()


INTEGER = [
    *(
        case(f"{name}.{kind} {{d}}, {{a}}, {{b}};", kind, f"{kind} {kind}", wrap(kind, function))
        for kind in ("u16", "s16", "u32", "s32", "u64", "s64")
        for name, function in (
            ("add", lambda a, b: a + b),
            ("sub", lambda a, b: a - b),
            ("mul.lo", lambda a, b: a * b),
            ("div", truncated),
            ("rem", remainder),
            ("min", min),
            ("max", max),
        )
    ),
    *(
        case(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", kind, f"{kind} {kind}", wrap(kind, lambda a, b, n=n: (a * b) >> n))
        for kind, n in (("u32", 32), ("s32", 32), ("u64", 64), ("s64", 64))
    ),
    case("mul.wide.u32 {d}, {a}, {b};", "u64", "u32 u32", wrap("u64", lambda a, b: a * b)),
    case("mul.wide.s32 {d}, {a}, {b};", "s64", "s32 s32", wrap("s64", lambda a, b: a * b)),
    case("mul.wide.s16 {d}, {a}, {b};", "s32", "s16 s16", wrap("s32", lambda a, b: a * b)),
    case("mad.lo.s32 {d}, {a}, {b}, {c};", "s32", "s32 s32 s32", wrap("s32", lambda a, b, c: a * b + c)),
    case("mad.wide.s32 {d}, {a}, {b}, {c};", "s64", "s32 s32 s64", wrap("s64", lambda a, b, c: a * b + c)),
    case("mad.hi.u32 {d}, {a}, {b}, {c};", "u32", "u32 u32 u32", wrap("u32", lambda a, b, c: (a * b >> 32) + c)),
    case("sad.s32 {d}, {a}, {b}, {c};", "s32", "s32 s32 s32", wrap("s32", lambda a, b, c: abs(a - b) + c)),
    case(
        "add.sat.s32 {d}, {a}, {b};",
        "s32",
        "s32 s32",
        wrap("s32", lambda a, b: min(max(a + b, -(2**31)), 2**31 - 1)),
    ),
    case("abs.s32 {d}, {a};", "s32", "s32", wrap("s32", abs)),
    case("neg.s64 {d}, {a};", "s64", "s64", wrap("s64", lambda a: -a)),
    case("popc.b32 {d}, {a};", "u32", "b32", wrap("u32", lambda a: bin(a).count("1"))),
    case("popc.b64 {d}, {a};", "u32", "b64", wrap("u32", lambda a: bin(a).count("1"))),
    case("clz.b32 {d}, {a};", "u32", "b32", wrap("u32", leading_zeros(32))),
    case("clz.b64 {d}, {a};", "u32", "b64", wrap("u32", leading_zeros(64))),
    case("brev.b32 {d}, {a};", "b32", "b32", wrap("b32", lambda a: int(f"{a:032b}"[::-1], 2))),
    case("bfind.u32 {d}, {a};", "u32", "u32", wrap("u32", lambda a: a.bit_length() - 1)),
    case("bfind.s32 {d}, {a};", "u32", "s32", wrap("u32", lambda a: (~a if a < 0 else a).bit_length() - 1)),
    case("bfe.u32 {d}, {a}, {b}, {c};", "u32", "u32 u32 u32", wrap("u32", extract(False)), "b c"),
    case("bfe.s32 {d}, {a}, {b}, {c};", "s32", "s32 u32 u32", wrap("s32", extract(True)), "b c"),
    case("bfi.b32 {d}, {a}, {b}, {c}, 7;", "b32", "b32 b32 b32", wrap("b32", lambda a, b, c: insert(a, b, c, 7)), "c"),
    case("bfi.b32 {d}, {a}, {b}, 5, {c};", "b32", "b32 b32 b32", wrap("b32", lambda a, b, c: insert(a, b, 5, c)), "c"),
    case("prmt.b32 {d}, {a}, {b}, {c};", "b32", "b32 b32 b32", wrap("b32", permute)),
    case("and.b64 {d}, {a}, {b};", "b64", "b64 b64", np.bitwise_and),
    case("or.b32 {d}, {a}, {b};", "b32", "b32 b32", np.bitwise_or),
    case("xor.b16 {d}, {a}, {b};", "b16", "b16 b16", np.bitwise_xor),
    case("not.b32 {d}, {a};", "b32", "b32", np.bitwise_not),
    *(
        case(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "b32", "b32 b32 b32", wrap("b32", lop3(table)))
        for table in (0x96, 0xE8, 0x78, 0x1B)
    ),
    case("shl.b32 {d}, {a}, {b};", "b32", "b32 u32", wrap("b32", lambda a, n: a << n), "b"),
    case("shr.u32 {d}, {a}, {b};", "u32", "u32 u32", wrap("u32", lambda a, n: a >> n), "b"),
    case("shr.s32 {d}, {a}, {b};", "s32", "s32 u32", wrap("s32", lambda a, n: a >> n), "b"),
    case("shl.b64 {d}, {a}, {b};", "b64", "b64 u32", wrap("b64", lambda a, n: a << n), "b"),
    case("shr.s64 {d}, {a}, {b};", "s64", "s64 u32", wrap("s64", lambda a, n: a >> n), "b"),
    case("shf.l.clamp.b32 {d}, {a}, {b}, {c};", "b32", "b32 b32 b32", wrap("b32", funnel), "c"),
    case(
        "shf.r.wrap.b32 {d}, {a}, {b}, {c};",
        "b32",
        "b32 b32 b32",
        wrap("b32", lambda low, high, n: (high << 32 | low) >> (n & 31)),
    ),
]


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def exactly_fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # The product of two floats is exact in a double; the rest is exact in a long double for these magnitudes.
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


def pairwise(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *arrays: function(*(x.view(np.float32) for x in arrays)).astype(np.float32).view(np.uint64)


def halves(kind: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def apply(*arrays: np.ndarray) -> np.ndarray:
        widened = [
            (x.view(np.float16) if kind.startswith("f16") else from_bf16(x.view(np.uint16))).astype(np.float64)
            for x in arrays
        ]
        value = function(*widened)
        bits = value.astype(np.float16).view(np.uint16) if kind.startswith("f16") else bf16_of_double(value)
        return bits.view(arrays[0].dtype)

    return apply


def bf16_of_double(value: np.ndarray) -> np.ndarray:
    """Rounded once, from a double: through a float that is rounded to odd."""
    nearest = value.astype(np.float32)
    toward_zero = np.where(np.abs(nearest) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)
    inexact = (toward_zero != value) & np.isfinite(value)
    return bf16((toward_zero.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32))


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """fmax, where +0 is above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


FLOAT = [
    case("add.f32 {d}, {a}, {b};", "f32", "f32 f32", np.add),
    case("sub.rn.f32 {d}, {a}, {b};", "f32", "f32 f32", np.subtract),
    case("mul.f32 {d}, {a}, {b};", "f32", "f32 f32", np.multiply),
    case("mul.ftz.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: flushed(flushed(a) * flushed(b))),
    case("add.sat.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1))),
    case("div.rn.f32 {d}, {a}, {b};", "f32", "f32 f32", np.divide),
    case("fma.rn.f32 {d}, {a}, {b}, {c};", "f32", "f32 f32 f32", exactly_fused),
    case("fma.rn.f64 {d}, {a}, {b}, {c};", "f64", "f64 f64 f64", lambda a, b, c: a * b + c, "", 1e-14),
    case("min.f32 {d}, {a}, {b};", "f32", "f32 f32", np.fmin),
    case("max.f32 {d}, {a}, {b};", "f32", "f32 f32", np.fmax),
    case("max.NaN.f32 {d}, {a}, {b};", "f32", "f32 f32", np.maximum),
    case("max.f32 {d}, {a}, {b}, {c};", "f32", "f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    case("abs.f32 {d}, {a};", "f32", "f32", np.abs),
    case("neg.f32 {d}, {a};", "f32", "f32", np.negative),
    case("sqrt.rn.f32 {d}, {a};", "f32", "f32", np.sqrt),
    case("rcp.approx.ftz.f32 {d}, {a};", "f32", "f32", lambda a: np.float32(1) / flushed(a), "", 2e-7),
    case("rsqrt.approx.f32 {d}, {a};", "f32", "f32", lambda a: 1 / np.sqrt(a), "", 3e-7),
    case("ex2.approx.ftz.f32 {d}, {a};", "f32", "f32", lambda a: flushed(np.exp2(flushed(a))), "", 3e-7),
    case("lg2.approx.f32 {d}, {a};", "f32", "f32", np.log2, "", 3e-7),
    case("sin.approx.f32 {d}, {a};", "f32", "f32", lambda a: np.sin(a.astype(np.float64)), "", 1e-5),
    case("tanh.approx.f32 {d}, {a};", "f32", "f32", np.tanh, "", 1e-5),
    case("copysign.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: np.copysign(b, a)),
    case("add.rz.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: toward(a.astype(np.float64) + b, "zero")),
    case("add.rm.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: toward(a.astype(np.float64) + b, "down")),
    case("mul.rp.f32 {d}, {a}, {b};", "f32", "f32 f32", lambda a, b: toward(a.astype(np.float64) * b, "up")),
    case("add.rn.f32x2 {d}, {a}, {b};", "f32x2", "f32x2 f32x2", pairwise(np.add)),
    case("mul.f32x2 {d}, {a}, {b};", "f32x2", "f32x2 f32x2", pairwise(np.multiply)),
    case("fma.rn.f32x2 {d}, {a}, {b}, {c};", "f32x2", "f32x2 f32x2 f32x2", pairwise(exactly_fused)),
    *(
        case(f"{name}.{kind} {{d}}, {{a}}, {{b}};", kind, f"{kind} {kind}", halves(kind, function))
        for kind in ("f16", "f16x2", "bf16", "bf16x2")
        for name, function in (("add", np.add), ("mul", np.multiply), ("max", larger))
    ),
    case(
        "fma.rn.bf16x2 {d}, {a}, {b}, {c};",
        "bf16x2",
        "bf16x2 bf16x2 bf16x2",
        halves("bf16x2", lambda a, b, c: a * b + c),
    ),
    case("neg.bf16x2 {d}, {a};", "bf16x2", "bf16x2", lambda a: a ^ np.uint32(0x80008000)),
]


def toward(exact: np.ndarray, mode: str) -> np.ndarray:
    """A double rounded to float in a directed mode."""
    nearest = exact.astype(np.float32)
    above = np.where(nearest.astype(np.float64) < exact, np.nextafter(nearest, np.float32(np.inf)), nearest)
    below = np.where(nearest.astype(np.float64) > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    if mode == "zero":
        return np.where(exact < 0, above, below)
    return above if mode == "up" else below


def to_integer(kind: str, rounding: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    info = np.iinfo(DTYPES[kind])

    def apply(a: np.ndarray) -> np.ndarray:
        rounded = [
            0 if np.isnan(x) else min(max(int(x) if np.isfinite(x) else int(np.sign(x)) << 80, info.min), info.max)
            for x in rounding(a.astype(np.float64))
        ]
        return np.array(rounded, DTYPES[kind])

    return apply


def e4m3_values() -> np.ndarray:
    """The value of each byte, from the format's definition."""
    values = np.zeros(256)
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values[byte] = np.nan if byte & 127 == 127 else magnitude * (-1 if byte & 128 else 1)
    return values


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest value, ties to the even byte, saturating."""
    table = e4m3_values()[:127]
    out = []
    for value in np.asarray(x, np.float64):
        if np.isnan(value):
            out.append(127)
            continue
        distance = np.abs(table - min(abs(value), 448.0))
        best = np.flatnonzero(distance == distance.min())
        out.append(int(best[best % 2 == 0][0] if len(best) > 1 else best[0]) | (128 if np.signbit(value) else 0))
    return np.array(out, np.uint16)


CONVERT = [
    case("cvt.u64.u32 {d}, {a};", "u64", "u32", lambda a: a.astype(np.uint64)),
    case("cvt.s64.s32 {d}, {a};", "s64", "s32", lambda a: a.astype(np.int64)),
    case("cvt.u32.u64 {d}, {a};", "u32", "u64", lambda a: a.astype(np.uint32)),
    case("cvt.u32.u16 {d}, {a};", "u32", "u16", lambda a: a.astype(np.uint32)),
    case("cvt.s32.s8 {d}, {a};", "s32", "u32", lambda a: a.astype(np.uint8).view(np.int8).astype(np.int32)),
    case("cvt.sat.u16.s32 {d}, {a};", "u16", "s32", lambda a: np.clip(a, 0, 65535).astype(np.uint16)),
    case("cvt.rn.f32.s32 {d}, {a};", "f32", "s32", lambda a: a.astype(np.float32)),
    case("cvt.rn.f32.u64 {d}, {a};", "f32", "u64", lambda a: a.astype(np.float32)),
    case("cvt.f64.f32 {d}, {a};", "f64", "f32", lambda a: a.astype(np.float64)),
    case("cvt.rn.f32.f64 {d}, {a};", "f32", "f64", lambda a: a.astype(np.float32)),
    case("cvt.rzi.s32.f32 {d}, {a};", "s32", "f32", to_integer("s32", np.trunc)),
    case("cvt.rni.s32.f32 {d}, {a};", "s32", "f32", to_integer("s32", np.rint)),
    case("cvt.rmi.u32.f32 {d}, {a};", "u32", "f32", to_integer("u32", np.floor)),
    case("cvt.rpi.s32.f32 {d}, {a};", "s32", "f32", to_integer("s32", np.ceil)),
    case("cvt.rmi.f32.f32 {d}, {a};", "f32", "f32", np.floor),
    case("cvt.rn.f16.f32 {d}, {a};", "f16", "f32", f16),
    case("cvt.f32.f16 {d}, {a};", "f32", "f16", lambda a: a.view(np.float16).astype(np.float32)),
    case(
        "cvt.rn.bf16.f32 {d}, {a};", "bf16", "f32", lambda a: np.where(np.isnan(a), 0x7FFF, bf16(a)).astype(np.uint16)
    ),
    case("cvt.f32.bf16 {d}, {a};", "f32", "bf16", from_bf16),
    case(
        "cvt.rn.bf16x2.f32 {d}, {a}, {b};",
        "bf16x2",
        "f32 f32",
        lambda a, b: (
            np.where(np.isnan(a), 0x7FFF, bf16(a)).astype(np.uint32) << 16 | np.where(np.isnan(b), 0x7FFF, bf16(b))
        ),
    ),
    case(
        "cvt.rn.f16x2.f32 {d}, {a}, {b};",
        "f16x2",
        "f32 f32",
        lambda a, b: (
            np.where(np.isnan(a), 0x7FFF, f16(a)).astype(np.uint32) << 16 | np.where(np.isnan(b), 0x7FFF, f16(b))
        ),
    ),
    case(
        "cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b};",
        "b16",
        "f32 f32",
        lambda a, b: to_e4m3(a) << 8 | to_e4m3(b),
    ),
    case(
        "cvt.rn.f16x2.e4m3x2 {d}, {a};",
        "f16x2",
        "b16",
        lambda a: (
            np.where(np.isnan(e4m3_values()[a.view(np.uint8)]), 0x7FFF, f16(e4m3_values()[a.view(np.uint8)]))
            .astype(np.uint16)
            .view(np.uint32)
        ),
    ),
]


@pytest.mark.parametrize(
    ("instruction", "result", "kinds", "expected", "small", "tolerance"), INTEGER + FLOAT + CONVERT
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_instruction(
    instruction: str,
    result: str,
    kinds: list[str],
    expected: Callable[..., np.ndarray],
    small: list[str],
    tolerance: float,
) -> None:
    rng = np.random.default_rng(sum(instruction.encode()))
    sources = [inputs(kind, rng, "abc"[i] in small) for i, kind in enumerate(kinds)]
    got = lanewise(instruction, result, sources, kinds)
    wanted = np.asarray(expected(*sources)).astype(DTYPES[result])
    if np.dtype(DTYPES[result]).kind == "f":
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)
        return
    if result in ("f16", "f16x2", "bf16", "bf16x2", "f32x2"):
        part, exponent = {
            "f16": (np.uint16, 0x7C00),
            "f16x2": (np.uint16, 0x7C00),
            "f32x2": (np.uint32, 0x7F800000),
        }.get(result, (np.uint16, 0x7F80))
        got, wanted = got.view(part), wanted.view(part)
        unsigned = part(np.iinfo(part).max >> 1)
        quiet = (wanted & unsigned) > exponent  # NaN: any pattern of it
        assert ((got[quiet] & unsigned) > exponent).all()
        got, wanted = got[~quiet], wanted[~quiet]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("comparison", "kind", "expected"),
    [
        ("lt", "s32", np.less),
        ("lt", "u32", np.less),
        ("ge", "s64", np.greater_equal),
        ("hi", "u32", np.greater),
        ("eq", "f32", np.equal),
        ("ne", "f32", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)),
        ("neu", "f32", np.not_equal),
        ("gtu", "f32", lambda a, b: ~(a <= b)),
        ("num", "f32", lambda a, b: ~np.isnan(a) & ~np.isnan(b)),
        ("nan", "f64", lambda a, b: np.isnan(a) | np.isnan(b)),
        ("leu", "f64", lambda a, b: ~(a > b)),
    ],
)
def test_setp(comparison: str, kind: str, expected: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    a, b = inputs(kind, rng), inputs(kind, rng)
    got = lanewise(
        f"setp.{comparison}.{kind} %q1|%q2, {{a}}, {{b}}; selp.u32 {{d}}, 1, 2, %q1;", "u32", [a, b], [kind, kind]
    )
    np.testing.assert_array_equal(got, np.where(expected(a, b), 1, 2))
    got = lanewise(
        f"setp.ne.u32 %q3, %lane, 5; setp.{comparison}.and.{kind} %q1, {{a}}, {{b}}, !%q3; selp.u32 {{d}}, 1, 2, %q1;",
        "u32",
        [a, b],
        [kind, kind],
    )
    np.testing.assert_array_equal(got, np.where(expected(a, b) & (np.arange(LANES) % 32 == 5), 1, 2))


def test_carry_chain() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 2**64, LANES, np.uint64) for _ in range(2))
    split = "mov.b64 {{%r10, %r11}}, {a}; mov.b64 {{%r12, %r13}}, {b};"
    for add in (True, False):
        name = "add" if add else "sub"
        chain = f"{name}.cc.u32 %r14, %r10, %r12; {name}c.u32 %r15, %r11, %r13; mov.b64 {{d}}, {{{{%r14, %r15}}}};"
        got = lanewise(split + chain, "u64", [a, b], ["u64", "u64"])
        np.testing.assert_array_equal(got, a + b if add else a - b)


def test_packing_and_unpacking() -> None:
    values = np.arange(LANES, dtype=np.uint64) * np.uint64(0x0123456789ABCDEF)
    text = "mov.b64 {{%h10, %h11, %h12, %h13}}, {a}; mov.b64 {d}, {{%h13, %h12, %h11, %h10}};"
    got = lanewise(text, "u64", [values], ["u64"])
    np.testing.assert_array_equal(got, values.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64).ravel())


def test_narrow_loads_extend_by_their_type() -> None:
    data = np.arange(-16, 16, dtype=np.int8)
    signed, unsigned = np.zeros(32, np.int32), np.zeros(32, np.uint32)
    run(
        element_address("%d1", "%p0", 1)
        + "ld.global.s8 %r1, [%d1]; ld.global.u8 %r2, [%d1];"
        + element_address("%d2", "%p1", 4)
        + element_address("%d3", "%p2", 4)
        + "st.global.u32 [%d2], %r1; st.global.u32 [%d3], %r2;",
        [data, signed, unsigned],
    )
    np.testing.assert_array_equal(signed, data)
    np.testing.assert_array_equal(unsigned, data.view(np.uint8))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.u32", lambda x: 100 + x.sum()),
        ("min.s32", lambda x: min(100, x.min())),
        ("max.u32", lambda x: max(100, x.max())),
        ("and.b32", lambda x: np.bitwise_and.reduce(x) & 100),
        ("or.b32", lambda x: np.bitwise_or.reduce(x) | 100),
        ("xor.b32", lambda x: np.bitwise_xor.reduce(x) ^ 100),
    ],
)
def test_atomics(operation: str, expected: Callable[[np.ndarray], int]) -> None:
    values = np.arange(3, 3 + 128, dtype=np.uint32) * 7
    for instruction in (f"red.global.{operation} [%p1], %r1;", f"atom.global.{operation} %r2, [%p1], %r1;"):
        total = np.full(1, 100, np.uint32)
        run(element_address("%d1", "%p0", 4) + "ld.global.u32 %r1, [%d1];" + instruction, [values, total], threads=128)
        assert total[0] == expected(values)


def test_float_atomics_and_compare_and_swap() -> None:
    total, turns = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    # Each thread adds 1 with a compare-and-swap loop, and 0.5 with red.
    run(
        """
        mov.f32 %f1, 0f3F000000; red.global.add.f32 [%p0], %f1;
        ld.relaxed.gpu.global.u32 %r1, [%p1];
        AGAIN:
        add.u32 %r2, %r1, 1;
        mov.u32 %r3, %r1;
        atom.global.cas.b32 %r1, [%p1], %r3, %r2;
        setp.ne.u32 %q1, %r1, %r3;
        @%q1 bra AGAIN;
        """,
        [total, turns],
        threads=96,
    )
    assert (total[0], turns[0]) == (48.0, 96)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("0b1010", 10),
        ("0x1fU", 31),
        ("017", 15),
        ("-5", -5),
        ("0f3F800000", 0x3F800000),
        ("+0f3F800000", 0x3F800000),
        ("-0f3F800000", 0xBF800000),
        ("-0d3FF0000000000000", 0xBFF0000000000000),
    ],
)
def test_constants(literal: str, value: int) -> None:
    out = np.zeros(1, np.uint64)
    run(f"mov.b64 %d1, {literal}; st.global.u64 [%p0], %d1;", [out], threads=1)
    assert out[0] == value % 2**64


@pytest.mark.parametrize(
    "text",
    [
        "mov.f32 %f1, 0.5;",
        "mov.u32 %r1, 8+4;",
        "mov.u32 %r1, 0x;",
        "mov.u32 %r1, 09;",
        "mov.u32 %r1, 12x;",
        "mov.u32 %r1, 0f3F80;",
        "mov.u64 %d1, 0x10000000000000000;",
        "ld.global.u32 %r1, [%p0+8+4];",
        "ld.global.u32 %r1, [%p0+4*2];",
        "ld.global.u32 %r1, [%p0+];",
        "mov.u32 %r1, shared+4+4;",
    ],
)
def test_what_is_not_understood_to_its_end_is_refused(text: str) -> None:
    with pytest.raises(EmulationError, match=r"can't read the (constant|address|operand)"):
        run(text, [np.zeros(4, np.uint32)], declarations=".shared .align 4 .b8 shared[16];")


@pytest.mark.parametrize(
    ("kinds", "value"),
    [
        ("s32.f32", 0),
        ("u16.f32", 0),
        ("s64.f32", 1 << 63),
        ("u64.f32", 1 << 63),
        ("s32.f64", 1 << 31),
        ("u32.f64", 1 << 31),
        ("s64.f64", 1 << 63),
    ],
)
def test_not_a_number_becomes_an_integer(kinds: str, value: int) -> None:
    """PTX ISA, cvt: 0 from f16 and f32 to at most 32 bits, else the top bit alone."""
    to, source = kinds.split(".")
    bits = np.full(LANES, np.nan, DTYPES[source])
    got = lanewise(f"cvt.rni.{kinds} {{d}}, {{a}};", to, [bits], [source])
    assert (got.view(f"u{got.itemsize}") == value).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", "unknown opcode"),
        ("add.u32 %r1, %r2, %d1;", "operand 3 has 64 bits, expected 32"),
        ("cvt.rn.satfinite.e2m1x2.f32 %h1, %f1, %f2;", "not emulated"),
        ("bra NOWHERE;", "unknown label NOWHERE"),
        ("mov.u32 %r1, %unknown;", "unknown special register|unknown name"),
    ],
)
def test_what_is_not_emulated_is_an_error_with_its_line(text: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message) as caught:
        run(f"\n\n{text}\n", [np.zeros(1, np.uint32)])
    assert "ptx:" in str(caught.value)


UNKNOWN = [
    "add.<bogus>.u32 %r1, %r2, %r3;",
    "max.<relu>.s32 %r1, %r2, %r3;",
    "mad.lo.<bogus>.u32 %r1, %r2, %r3, %r4;",
    "shl.<bogus>.b32 %r1, %r2, %r3;",
    "lop3.<bogus>.b32 %r1, %r2, %r3, %r4, 1;",
    "setp.eq.<bogus>.u32 %q1, %r2, %r3;",
    "ex2.approx.<bogus>.f32 %f1, %f2;",
    "cvt.<bogus>.f32.u32 %f1, %r2;",
    "mov.<bogus>.u32 %r1, %r2;",
    "ld.<bogus>.global.u32 %r1, [%p0];",
    "st.<bogus>.global.u32 [%p0], %r1;",
    "cvta.to.<bogus>.global.u64 %d1, %p0;",
    "atom.<bogus>.global.add.u32 %r1, [%p0], %r2;",
    "red.<async>.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.inc.u32 [%r1], %r2, [%r3];",
    "bra.<bogus> END;",
    "bar.<bogus> 0;",
    "barrier.cluster.<bogus>;",
    "fence.<bogus>;",
    "membar.<bogus>;",
    "setmaxnreg.<bogus>.sync.aligned.u32 40;",
    "shfl.sync.<bogus>.b32 %r1, %r2, 0, 31, 0xffffffff;",
    "vote.sync.<bogus>.b32 %r1, %q1, 0xffffffff;",
    "match.<bogus>.sync.b32 %r1, %r2, 0xffffffff;",
    "redux.sync.min.<abs>.f32 %f1, %f2, 0xffffffff;",
    "mbarrier.arrive.<bogus>.shared.b64 _, [%r1];",
    "cp.async.<bogus>.wait_all;",
    "cp.async.bulk.tensor.2d.shared::cta.global.<tile::gather4>.mbarrier::complete_tx::bytes [%r1], [%p0], [%r2];",
    "cp.async.bulk.tensor.2d.global.shared::cta.<tile::scatter4>.bulk_group [%p0, {0, 0}], [%r1];",
    "cp.async.bulk.tensor.3d.shared::cta.global.<im2col::w>.mbarrier::complete_tx::bytes [%r1], [%p0], [%r2];",
    "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes.<cta_group::2> [%r1], [%p0], [%r2];",
    "wgmma.fence.<bogus>.sync.aligned;",
    "ldmatrix.sync.aligned.m8n8.x1.<bogus>.shared.b16 {%r1}, [%r2];",
    "tcgen05.ld.sync.aligned.32x32b.x1.<bogus>.b32 {%r1}, [%r2];",
    "tcgen05.mma.cta_group::1.kind::f16.<ashift> [%r1], %d1, %d2, %r3, %q1;",
    "tcgen05.cp.<cta_group::2>.128x256b [%r1], %d1;",
    "min.<abs>.f32 %f1, %f2, %f3, %f4;",
    "min.<xorsign>.abs.f32 %f1, %f2, %f3;",
    "fma.rn.<oob>.f16 %h1, %h2, %h3, %h4;",
]
# Each modifier is known, and the form isn't.
FORMS = [
    "bar 0;",
    "shfl.sync.b32 %r1, %r2, 0, 31, 0xffffffff;",
    "vote.sync.b32 %r1, %q1, 0xffffffff;",
    "shf.l.b32 %r1, %r2, %r3, %r4;",
    "fence.proxy;",
    "mad.hi.sat.s32 %r1, %r2, %r3, %r4;",
    "max.ftz.s32 %r1, %r2, %r3;",
    "add.rz.f16 %h1, %h2, %h3;",
    "fma.rn.relu.f32 %f1, %f2, %f3, %f4;",
    "add.rn.sat.f32x2 %d1, %d2, %d3;",
    "cvt.rn.satfinite.f16.f32 %h1, %f1;",
    "cvt.rn.satfinite.f16x2.f32 %r1, %f1, %f2;",
    "cvt.rn.satfinite.bf16x2.f32 %r1, %f1, %f2;",
    "cvt.rna.satfinite.tf32.f32 %r1, %f1;",
    "cvt.rn.e4m3x2.f32 %h1, %f1, %f2;",
]


@pytest.mark.parametrize("marked", UNKNOWN)
def test_modifiers_that_are_unknown_are_refused(marked: str) -> None:
    """Never left out in silence; those of PTX that are not emulated are refused like any other."""
    modifier = marked[marked.index("<") + 1 : marked.index(">")]
    text = re.sub("[<>]", "", marked)
    with pytest.raises(
        EmulationError, match=rf"ptx:\d+: the modifier \.{modifier} of .* is unknown or not emulated"
    ) as caught:
        load(module_text(f"\n\n{text}\n"))
    assert text.rstrip(";") in str(caught.value)


@pytest.mark.parametrize("text", FORMS)
def test_forms_that_are_not_emulated_are_refused(text: str) -> None:
    with pytest.raises(EmulationError, match=r"ptx:\d+: this form of .* is not emulated"):
        load(module_text(text))


def test_flushing_of_halves() -> None:
    """.ftz: subnormal operands and results count as zero of their sign."""
    tiny, least = np.uint16(0x8001), np.uint16(0x0400)
    a = np.resize(np.array([tiny, least, 0x3C00], np.uint16), LANES)
    one, half = np.full(LANES, 0x3C00, np.uint16), np.full(LANES, 0x3800, np.uint16)
    got = lanewise("mul.ftz.f16 {d}, {a}, {b};", "f16", [a, one], ["f16", "f16"])
    np.testing.assert_array_equal(got, np.where(a == tiny, 0x8000, a))
    got = lanewise("mul.ftz.f16 {d}, {a}, {b};", "f16", [a, half], ["f16", "f16"])
    np.testing.assert_array_equal(got, np.select([a == tiny, a == least], [0x8000, 0], 0x3800))
    got = lanewise("mul.f16 {d}, {a}, {b};", "f16", [a, half], ["f16", "f16"])
    np.testing.assert_array_equal(got, np.select([a == tiny, a == least], [0x8000, 0x0200], 0x3800))
    got = lanewise("neg.ftz.f16 {d}, {a};", "f16", [a], ["f16"])
    np.testing.assert_array_equal(got, np.where(a == tiny, 0, a ^ 0x8000))
