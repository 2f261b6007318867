"""Plans: which kernels a spec comes down to, in which order, and what the user is told about it."""

from __future__ import annotations

from math import prod

import pytest
from gnaforge.errors import InputError
from gnaforge.families import TARGETS
from gnaforge.plan import Plan, plan
from gnaforge.runtime.config import ANY_HEAD_DIM, KernelConfig
from gnaforge.spec import KernelEntry, Shape, Spec, Tile
from hypothesis import given, settings, strategies as st

TILE = Tile(q=(8, 8), kv=(8, 8))


def spec_of(*entries: KernelEntry, arch: tuple[str, ...] = ("sm90",)) -> Spec:
    return Spec(spec_version=1, library="lib", arch=arch, kernels=entries)


def entry_of(
    dtype: tuple[str, ...] = ("bf16",),
    head_dim: tuple[int, ...] = (64,),
    tiles: tuple[Tile, ...] = (TILE,),
    shapes: tuple[Shape, ...] = (),
    value_head_dim: tuple[int, ...] = (),
) -> KernelEntry:
    optional = {"shapes": shapes, "value_head_dim": value_head_dim}
    given_ones = {name: value for name, value in optional.items() if value}
    return KernelEntry(rank=(2,), dtype=dtype, head_dim=head_dim, tiles=tiles, **given_ones)  # type: ignore[arg-type]


def shape_of(window: int) -> Shape:
    return Shape(tokens=(32, 32), window=(window, window))


def keys(kernels: Plan) -> list[str]:
    return [config.key for config in kernels.configs]


def test_lists_multiply_and_configs_are_sorted() -> None:
    tiles = (TILE, Tile(q=(4, 8), kv=(16, 8)))
    kernels = plan(spec_of(entry_of(("fp16", "bf16"), (128, 64), tiles), arch=("sm90", "sm100")))
    assert kernels.library == "lib"
    assert keys(kernels) == [
        f"gna_forward-{arch}-r2-{dtype}-d{dim}-{tile}"
        for arch in ("sm100", "sm90")
        for dtype in ("bf16", "fp16")
        for dim in (64, 128)
        for tile in ("q4x8-kv16x8", "q8x8-kv8x8")
    ]
    assert (kernels.duplicates, kernels.notes, kernels.shapes) == ((), (), {})


def test_order_of_the_spec_does_not_matter() -> None:
    one, other = entry_of(("fp16", "bf16")), entry_of(head_dim=(32, 64))
    assert plan(spec_of(one, other)).configs == plan(spec_of(other, one)).configs


def test_value_head_dim_multiplies_and_equals_head_dim_by_default() -> None:
    kernels = plan(spec_of(entry_of(head_dim=(64, 128), value_head_dim=(64,))))
    assert [(c.head_dim, c.value_head_dim) for c in kernels.configs] == [(64, 0), (128, 64)]


def test_duplicates_are_built_once_and_reported() -> None:
    kernels = plan(spec_of(entry_of(head_dim=(64, 64, 128)), entry_of(), entry_of(head_dim=(32,))))
    assert [config.head_dim for config in kernels.configs] == [32, 64, 128]
    assert [(config.head_dim, times) for config, times in kernels.duplicates] == [(64, 2)]


def test_rank_given_twice_repeats_its_kernels_only() -> None:
    line = Tile(q=(64,), kv=(64,))
    entry = KernelEntry(rank=(1, 2, 2), dtype=("bf16",), head_dim=(64,), tiles=(line, TILE))
    kernels = plan(spec_of(entry))
    assert [config.rank for config in kernels.configs] == [1, 2]
    assert [(config.rank, times) for config, times in kernels.duplicates] == [(2, 1)]
    assert entry.count() == 3


def test_one_cpu_kernel_serves_all_head_dims_and_that_is_no_duplicate() -> None:
    kernels = plan(spec_of(entry_of(head_dim=(64, 128), value_head_dim=(32, 64)), arch=("cpu", "sm90")))
    assert [(c.arch, c.head_dim, c.value_head_dim) for c in kernels.configs] == [
        ("cpu", ANY_HEAD_DIM, 0),
        ("sm90", 64, 0),
        ("sm90", 64, 32),
        ("sm90", 128, 32),
        ("sm90", 128, 64),
    ]
    assert kernels.duplicates == ()
    assert kernels.notes == (
        "cpu kernels take the head dim at run time: 1 of them serves the 4 configs that the spec asks for",
    )


def test_duplicates_of_a_kernel_for_all_head_dims_are_still_reported() -> None:
    kernels = plan(spec_of(entry_of(head_dim=(64, 64, 128)), arch=("cpu",)))
    assert [(config.head_dim, times) for config, times in kernels.duplicates] == [(ANY_HEAD_DIM, 1)]


def test_shapes_go_to_every_kernel_of_their_entries() -> None:
    small, large = shape_of(7), shape_of(13)
    kernels = plan(
        spec_of(
            entry_of(head_dim=(64,), shapes=(small, small)),
            entry_of(head_dim=(64, 128), shapes=(large,)),
            entry_of(head_dim=(32,)),
            arch=("cpu", "sm90"),
        )
    )
    found = {(config.arch, config.head_dim): shapes for config, shapes in kernels.shapes.items()}
    assert found == {
        ("cpu", ANY_HEAD_DIM): (small, large),
        ("sm90", 64): (small, large),
        ("sm90", 128): (large,),
    }


def test_arches_choose_from_those_of_the_spec() -> None:
    spec = spec_of(entry_of(), arch=("cpu", "sm90"))
    assert {config.arch for config in plan(spec, ["sm90"]).configs} == {"sm90"}
    assert {config.arch for config in plan(spec, ["sm90", "cpu"]).configs} == {"cpu", "sm90"}
    assert plan(spec, []) == plan(spec) == plan(spec, None)
    with pytest.raises(InputError) as caught:
        plan(spec, ["sm100"])
    assert str(caught.value) == "arch 'sm100' is not in the spec of lib, which has cpu, sm90; did you mean 'sm90'?"


def test_a_thousand_configs() -> None:
    tiles = tuple(Tile(q=(q, 4), kv=(kv, 16)) for q in range(1, 33) for kv in range(1, 9))
    kernels = plan(spec_of(entry_of(("bf16", "fp16"), (64, 128), tiles)))
    assert len(kernels.configs) == 1024


_AXES = st.fixed_dictionaries(
    {
        "arch": st.lists(st.sampled_from(list(TARGETS)), min_size=1, max_size=4),
        "dtype": st.lists(st.sampled_from(["bf16", "fp16"]), min_size=1, max_size=3),
        "head_dim": st.lists(st.sampled_from([8, 64, 72]), min_size=1, max_size=3),
        "tiles": st.lists(st.sampled_from([TILE, Tile(q=(4, 4), kv=(4, 4))]), min_size=1, max_size=3),
    }
)


@settings(max_examples=60, deadline=None)
@given(_AXES)
def test_every_config_asked_for_is_accounted_for(axes: dict[str, list[str]]) -> None:
    """Against a count that knows nothing of how plans are made."""
    entry = entry_of(tuple(axes["dtype"]), tuple(axes["head_dim"]), tuple(axes["tiles"]))  # type: ignore[arg-type]
    kernels = plan(spec_of(entry, arch=tuple(axes["arch"])))

    others = len(set(axes["dtype"])) * len(set(axes["tiles"]))
    expected = sum(others * (1 if arch == "cpu" else len(set(axes["head_dim"]))) for arch in set(axes["arch"]))
    assert len(kernels.configs) == len(set(kernels.configs)) == expected
    assert list(kernels.configs) == sorted(kernels.configs)
    assert all(KernelConfig.parse(config.key) == config for config in kernels.configs)

    lists = [axes["dtype"], axes["tiles"], axes["head_dim"]]
    repeated = prod(map(len, lists)) - prod(len(set(values)) for values in lists)
    assert sum(times for _, times in kernels.duplicates) == repeated * len(set(axes["arch"]))
