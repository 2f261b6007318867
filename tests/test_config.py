"""KernelConfig: the key is the config, no two configs share one, and nothing malformed has one."""

from __future__ import annotations

import dataclasses
import re
from math import prod

import pytest
from gnaforge.families import TARGETS, families
from gnaforge.runtime.config import ANY_HEAD_DIM, OPS, KernelConfig
from gnaforge.runtime.dtypes import DTYPES
from hypothesis import assume, given, strategies as st
from kernel_set import FAMILIES

EXTENTS = st.sampled_from([1, 8, 18, 81]) | st.integers(1, 300)  # the first ones look alike when run together
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True)


@st.composite
def configs(draw: st.DrawFn) -> KernelConfig:
    rank = draw(st.integers(1, 3))
    head_dim = draw(st.integers(0, 512))
    box = st.tuples(*[EXTENTS] * rank)
    return KernelConfig(
        op=draw(st.sampled_from(OPS)),
        arch=draw(st.sampled_from(list(TARGETS)) | NAMES),
        rank=rank,
        dtype=draw(st.sampled_from(list(DTYPES))),
        head_dim=head_dim,
        value_head_dim=0 if head_dim == ANY_HEAD_DIM else draw(st.integers(0, 512)),
        q_tile=draw(box),
        kv_tile=draw(box),
        variant=draw(st.just("") | st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)),
        q_tile_heads=draw(st.sampled_from([1, 1, 2, 12])),
    )


EXAMPLE = KernelConfig("gna_forward", "sm90", 3, "bf16", 128, (2, 8, 8), (2, 8, 8))


def test_keys_are_as_the_design_writes_them() -> None:
    assert EXAMPLE.key == "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8"
    assert str(EXAMPLE) == EXAMPLE.key
    assert EXAMPLE.symbol == "gnaforge_entry_gna_forward_sm90_r3_bf16_d128_q2x8x8_kv2x8x8"
    other = KernelConfig("gna_backward_kv", "sm100", 1, "fp16", 96, (128,), (256,), value_head_dim=64, variant="lean")
    assert other.key == "gna_backward_kv-sm100-r1-fp16-d96v64-q128-kv256-lean"
    packed = dataclasses.replace(EXAMPLE, arch="sm100", q_tile=(2, 8, 4), q_tile_heads=4)
    assert packed.key == "gna_forward-sm100-r3-bf16-d128-q2x8x4h4-kv2x8x8"
    anything = dataclasses.replace(EXAMPLE, arch="cpu", head_dim=ANY_HEAD_DIM)
    assert anything.key == "gna_forward-cpu-r3-bf16-dany-q2x8x8-kv2x8x8"


@given(configs())
def test_key_parses_back(config: KernelConfig) -> None:
    parsed = KernelConfig.parse(config.key)
    assert parsed == config
    assert parsed.key == config.key
    rows = prod(config.q_tile) * config.q_tile_heads
    assert (config.q_rows, config.kv_columns) == (rows, prod(config.kv_tile))


@given(configs(), configs())
def test_key_and_symbol_are_equal_only_for_equal_configs(one: KernelConfig, other: KernelConfig) -> None:
    assert (one == other) == (one.key == other.key) == (one.symbol == other.symbol)
    assert one != other or hash(one) == hash(other)


@given(configs(), configs(), configs())
def test_order_is_total(a: KernelConfig, b: KernelConfig, c: KernelConfig) -> None:
    assert (a < b) + (b < a) + (a == b) == 1
    assert not (a <= b <= c) or a <= c


@given(configs(), configs())
def test_differences_name_the_fields_that_make_configs_equal(one: KernelConfig, other: KernelConfig) -> None:
    names = one.differences(other)
    assert names == other.differences(one)
    assert bool(names) == (one != other)
    assert dataclasses.replace(one, **{name: getattr(other, name) for name in names}) == other


@given(configs())
def test_value_head_dim_equal_to_head_dim_is_the_default(config: KernelConfig) -> None:
    same = dataclasses.replace(config, value_head_dim=config.head_dim)
    assert same == dataclasses.replace(config, value_head_dim=0)


@given(configs(), st.data())
def test_spoiled_key_is_refused_or_another_config(config: KernelConfig, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(config.key)))
    cut = data.draw(st.integers(0, 3))
    key = config.key[:at] + data.draw(st.text("0189xvrdqk-_any ٣\n", max_size=3)) + config.key[at + cut :]
    assume(key != config.key)
    try:
        parsed = KernelConfig.parse(key)
    except ValueError as error:
        assert repr(key) in str(error) or ": " in str(error)
    else:
        assert parsed.key == key
        assert parsed != config


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "is no kernel key; a key looks like gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8"),
        ("gna_forward-sm90-r4-bf16-d64-q8x8x8x8-kv8x8x8x8", "is no kernel key"),
        ("gna_sideways-sm90-r1-bf16-d64-q8-kv8", "is no kernel key"),
        ("GNA_forward-sm90-r1-bf16-d64-q8-kv8", "is no kernel key"),
        ("gna_forward-sm90-r1-bf16-d64-q8-kv8\n", "is no kernel key"),
        ("gna_forward-sm90-r1-bf16-d64-q8-kv8-", "is no kernel key"),
        ("gna_forward-sm100-r1-bf16-d64-q8h1-kv8", "is not canonical; write 'gna_forward-sm100-r1-bf16-d64-q8-kv8'"),
        ("gna_forward-sm100-r1-bf16-d64-q8h0-kv8", "q_tile_heads: 0 is not a positive integer"),
        ("gna_forward-sm90-r1-bf16-d064-q8-kv8", "is not canonical; write 'gna_forward-sm90-r1-bf16-d64-q8-kv8'"),
        ("gna_forward-sm90-r1-bf16-d64v64-q8-kv8", "is not canonical; write 'gna_forward-sm90-r1-bf16-d64-q8-kv8'"),
        ("gna_forward-sm90-r1-bf16-d0-q8-kv8", "is not canonical; write 'gna_forward-sm90-r1-bf16-dany-q8-kv8'"),
        ("gna_forward-cpu-r1-bf16-danyv64-q8-kv8", "value_head_dim: a kernel that takes head_dim at run time"),
        ("gna_forward-sm90-r1-int8-d64-q8-kv8", "dtype: 'int8' is not one of fp32, bf16, fp16"),
        ("gna_forward-sm90-r2-bf16-d64-q8-kv8x8", "q_tile: (8,) has 1 extents, rank 2 needs 2"),
        ("gna_forward-sm90-r1-bf16-d64-q0-kv8", "q_tile: (0,) must hold positive integers"),
    ],
)
def test_invalid_key_is_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        KernelConfig.parse(key)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("op", "forward"),
        ("arch", "SM90"),
        ("arch", "sm90-r1"),
        ("arch", ""),
        ("rank", 0),
        ("rank", 4),
        ("rank", 3.0),
        ("dtype", "float16"),
        ("head_dim", -8),
        ("head_dim", 64.0),
        ("head_dim", True),
        ("value_head_dim", -8),
        ("q_tile", (2, 8)),
        ("q_tile", (2, 8, 0)),
        ("kv_tile", (2, 8, True)),
        ("kv_tile", (2, 8, 8.0)),
        ("variant", "Lean"),
        ("variant", "a-b"),
        ("variant", "lean\n"),
    ],
)
def test_invalid_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        dataclasses.replace(EXAMPLE, **{field: value})  # type: ignore[arg-type]


def test_config_is_immutable_and_takes_lists() -> None:
    config = dataclasses.replace(EXAMPLE, q_tile=[2, 8, 8])  # type: ignore[arg-type]
    assert config == EXAMPLE
    assert config.q_tile == (2, 8, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2  # type: ignore[misc]


def test_default_boxes_fit_every_head_dim() -> None:
    for family in families():
        largest = family.limits.head_dim
        for rank in (1, 2, 3):
            for head_dim in range(8, largest + 1, 8):
                for value_head_dim in (8, head_dim, largest):
                    q_tile, kv_tile = family.default_boxes(rank, head_dim, value_head_dim)
                    names = (family.op, family.arch, rank, "bf16", head_dim)
                    config = KernelConfig(*names, q_tile, kv_tile, value_head_dim, family.variant)
                    assert family.faults(config) == []
    assert FAMILIES["sm90"].default_boxes(2, 128, 128) == ((8, 16), (8, 16))
    assert FAMILIES["sm90"].default_boxes(1, 256, 256) == ((128,), (64,))
