"""Specs: what is read, what is refused, and that every refusal names the place, the value and the way out."""

from __future__ import annotations

import pytest
from gnaforge.errors import InputError
from gnaforge.plan import plan
from gnaforge.runtime.problem import Problem
from gnaforge.spec import parse_spec
from spec_text import VALID, marked, problems, replaced


def test_valid_spec_is_read() -> None:
    spec = parse_spec(VALID.encode(), "f.yaml")
    (entry,) = spec.kernels
    assert (spec.library, spec.arch) == ("hunyuan", ("cpu", "sm90", "sm100"))
    assert (entry.rank, entry.head_dim, entry.dtype) == ((3,), (64, 128), ("bf16", "fp16"))
    assert (entry.tiles[0].q, entry.tiles[0].kv) == ((2, 8, 8), (2, 8, 8))
    first, second = entry.shapes
    assert (first.window, first.stride, first.dilation) == ((18, 24, 24), (16, 8, 8), (1, 1, 1))
    assert (first.heads, first.kv_heads, first.batch) == (24, 24, 1)
    assert (second.stride, second.dilation, second.kv_heads, second.batch) == ((1, 1, 1), (3, 1, 1), 8, 2)
    assert first.causal == second.causal == (True, False, False)  # the entry's


def test_single_values_stand_for_lists_of_one() -> None:
    text = """
spec_version: 1
library: one
arch: cpu
kernels:
  - rank: 1
    head_dim: any
    dtype: fp32
    tiles: [{q: 64, kv: [128]}]
    shapes: [{tokens: 100, window: [7], stride: 2, causal: true}]
"""
    spec = parse_spec(text.encode(), "f.yaml")
    entry = spec.kernels[0]
    assert (spec.arch, entry.rank, entry.dtype, entry.head_dim) == (("cpu",), (1,), ("fp32",), (0,))
    assert (entry.tiles[0].q, entry.tiles[0].kv) == ((64,), (128,))
    shape = entry.shapes[0]
    assert (shape.tokens, shape.window, shape.stride, shape.causal) == ((100,), (7,), (2,), (True,))


def test_shapes_have_edges_sinks_and_frames() -> None:
    """Tiles fit them, for an arch that has them; another says which has."""
    text = """
spec_version: 1
library: one
arch: [cpu, sm90]
kernels:
  - rank: 2
    head_dim: 64
    dtype: bf16
    tiles: auto
    shapes:
      - {tokens: [60, 100], window: [50, 7], stride: [10, 1], causal: [block, false], edge: [cut, wrap], sink: [10, 0]}
"""
    spec = parse_spec(text.encode(), "f.yaml")
    problem = spec.kernels[0].shapes[0].problem()
    assert problem.features() == ("edge", "block_causal", "sink") and problem.edge == ("cut", "wrap")
    for arch in ("cpu", "sm90"):
        (config,) = plan(spec, [arch]).configs
        assert (config.arch, config.rank) == (arch, 2)
    assert plan(parse_spec(text.replace("sm90]", "sm100]").encode(), "f.yaml"), ["sm100"]).configs
    with pytest.raises(InputError, match=r"sink\[1\]: 2 along dimension 1, which wraps; it must be 0 there"):
        parse_spec(text.replace("sink: [10, 0]", "sink: [10, 2]").encode(), "f.yaml")


SETTINGS = """
spec_version: 1
library: one
arch: [cpu, sm100]
kernels:
  - rank: 2
    arch: cpu
    head_dim: 64
    dtype: bf16
    causal: [block, false]
    tiles: [{q: [8, 8], kv: [8, 8]}]
    shapes:
      - {tokens: [8, 64], window: [32, 13], stride: [4, 1]}
      - {tokens: [4, 64], window: [8, 64], grid: [40, 64], q_offset: [36, 0], kv_tokens: [12, 64], kv_offset: [32, 0],
         kv_sink: [4, 0], sink: [4, 0], stride: [4, 1], extra_tokens: 256}
      - {tokens: [64, 60], window: [9, 9], edge: [shift, wrap], causal: [false, false], extra_tokens: [77, 9]}
  - rank: 3
    head_dim: 64
    dtype: bf16
    tiles: [{q: [2, 8, 8], kv: [2, 8, 8]}]
    shapes: [{tokens: [8, 16, 16], window: [3, 3, 3]}]
"""


@pytest.mark.usefixtures("every_feature")
def test_settings_of_shapes_are_those_of_problems() -> None:
    """The default of an entry's causal holds for a window that exceeds the tokens, too."""
    spec = parse_spec(SETTINGS.encode(), "f.yaml")
    frames, cache, wrapped = (shape.problem(head_dim=64) for shape in spec.kernels[0].shapes)
    assert frames == Problem((8, 64), (32, 13), (4, 1), causal=("block", False), head_dim=64)
    assert cache == Problem(
        (4, 64), (8, 64), (4, 1), causal=("block", False), head_dim=64, grid=(40, 64), q_offset=(36, 0),
        kv_tokens=(12, 64), kv_offset=(32, 0), kv_sink=(4, 0), sink=(4, 0), extra_tokens=(256,),
    )  # fmt: skip
    assert (wrapped.edge, wrapped.causal, wrapped.extra_tokens) == (("shift", "wrap"), (False, False), (77, 9))
    assert {config.arch: config.rank for config in plan(spec).configs if config.rank == 2} == {"cpu": 2}
    assert {config.arch for config in plan(spec).configs if config.rank == 3} == {"cpu", "sm100"}


SETTINGS_REFUSED = {
    "window of another default": ("[block, false]", "[true, false]", "shapes[0].window[0]: 32 is more than"),
    "no default": ("    causal: [block, false]\n", "", "shapes[0].window[0]: 32 is more than"),
    "its own causal": ("stride: [4, 1]}", "causal: [true, false]}", "shapes[0].window[0]: 32 is more than"),
    "malformed default": ("[block, false]", "[blok, false]", "kernels[0].causal[0]: 'blok' is no causal kind; allowed"),
    "range beyond the grid": ("q_offset: [36", "q_offset: [37", "shapes[1].q_offset[0]: 37 along dimension 0,"),
    "keys of another length": ("kv_tokens: [12,", "kv_tokens: [13,", "shapes[1].kv_offset[0]: 32 along dimension"),
    "entries of a range": ("kv_sink: [4, 0]", "kv_sink: [4]", "shapes[1].kv_sink: [4] has 1 entry; rank 2 needs 2"),
    "three pieces": ("[77, 9]", "[77, 9, 5]", "shapes[2].extra_tokens: [77, 9, 5] has 3 entries; at most 2"),
    "no extra keys": ("[77, 9]", "[77, 0]", "shapes[2].extra_tokens[1]: 0 is too small; at least 1"),
    "arch of the entry": ("arch: cpu", "arch: sm90", "kernels[0].arch: 'sm90' is not among those of the spec"),
    "an arch without them": ("    arch: cpu\n", "", "shapes[0].causal: sm100 doesn't have the feature"),
}  # fmt: skip


@pytest.mark.usefixtures("every_feature", "plain_sm100")
@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_refusals_of_settings(case: str) -> None:
    old, new, message = SETTINGS_REFUSED[case]
    assert SETTINGS.count(old) >= 1
    with pytest.raises(InputError) as raised:
        parse_spec(SETTINGS.replace(old, new, 1).encode(), "f.yaml")
    assert message in str(raised.value), raised.value
    if case not in ("an arch without them", "no default", "window of another default"):
        assert "\n" not in str(raised.value).strip()


@pytest.mark.usefixtures("every_feature", "plain_sm100")
def test_every_feature_that_an_arch_lacks_is_refused_where_it_is_asked_for() -> None:
    for field, given, feature in (
        ("edge", "edge: [wrap, shift]", "edge"),
        ("causal", "causal: [block, false]", "block_causal"),
        ("sink", "sink: [2, 0]", "sink"),
        ("kv_tokens", "window: [20, 20], kv_tokens: [20, 20]", "range"),
        ("extra_tokens", "extra_tokens: 64", "extra_keys"),
    ):
        window = "" if "window" in given else "window: [3, 3], "
        text = SETTINGS[: SETTINGS.index("  - rank: 2")].replace("[cpu, sm100]", "sm100") + (
            "  - {rank: 2, head_dim: 64, dtype: bf16, tiles: [{q: [8, 8], kv: [8, 8]}],\n"
            f"     shapes: [{{tokens: [64, 64], {window}{given}}}]}}\n"
        )
        place = rf"f\.yaml:7:\d+: kernels\[0\]\.shapes\[0\]\.{field}"
        with pytest.raises(InputError, match=f"{place}: sm100 doesn't have the feature {feature}; cpu"):
            parse_spec(text.encode(), "f.yaml")


HEADS = """
spec_version: 1
library: one
arch: cpu
kernels:
  - rank: 2
    head_dim: 64
    dtype: bf16
    tiles: auto
    shapes:
      - tokens: [32, 48]
        stride: [2, 2]
        kv_heads: 4
        windows:
          - {heads: 8, window: [5, 7]}
          - {heads: 2, window: [16, 9], stride: [4, 1], edge: [cut, wrap]}
          - {heads: 6, window: [9, 9], causal: [true, false], sink: [3, 0]}
"""


def test_windows_of_some_heads_are_problems_of_their_own() -> None:
    text = HEADS.replace("heads: 2,", "heads: 4,").replace("heads: 6,", "heads: 4,")
    spec = parse_spec(text.encode(), "f.yaml")
    (shape,) = spec.kernels[0].shapes
    first, second, third = (part.problem() for part in shape.parts)
    assert shape.heads == 16 and spec.kernels[0].problems == shape.parts
    assert first == Problem((32, 48), (5, 7), 2, heads=8, kv_heads=2)
    assert second == Problem((32, 48), (16, 9), (4, 1), heads=4, kv_heads=1, edge=("cut", "wrap"))
    assert third == Problem((32, 48), 9, 2, causal=(True, False), heads=4, kv_heads=1, sink=(3, 0))
    planned = plan(spec)
    assert {part for shapes in planned.shapes.values() for part in shapes} == set(shape.parts)
    groups = HEADS.replace("heads: 2,", "heads: 1,").replace("heads: 6,", "heads: 3,")  # of one head of K and V
    (shape,) = parse_spec(groups.replace("kv_heads: 4", "kv_heads: 3").encode(), "f.yaml").kernels[0].shapes
    assert [(part.heads, part.kv_heads) for part in shape.parts] == [(8, 2), (1, 1), (3, 1)]


HEADS_REFUSED = {
    "shared heads": ("kv_heads: 4", "kv_heads: 4", "windows[2].heads: heads 10 to 15 share heads of K and V"),
    "a window's own": ("[16, 9],", "[16, 6], dilation: [1, 7],", "windows[1].dilation[1]: 7 along dimension 1"),
    "sum": ("        stride: [2, 2]\n", "        heads: 12\n", "heads: 12 is not the 16 heads of the windows"),
    "both": ("        stride: [2, 2]\n", "        window: [5, 5]\n", "windows: can't be given beside window"),
    "neither": (HEADS[HEADS.index("        windows:") :], "", "window: is required"),
    "the shape's stride": ("stride: [2, 2]", "stride: [6, 2]", "stride[0]: 6 is more than the window of dimension 0"),
    "its own window": ("window: [5, 7]", "window: [5, 70]", "windows[0].window[1]: 70 is more than the 48"),
    "entries": ("window: [5, 7]", "window: [5]", "windows[0].window: [5] has 1 entry; rank 2 needs 2"),
    "unknown": ("{heads: 8,", "{heds: 8,", "windows[0].heds: unknown field; allowed: heads, window, "),
    "no heads": ("{heads: 8,", "{", "windows[0].heads: is required"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS_REFUSED)
def test_refusals_of_windows_per_head(case: str) -> None:
    old, new, message = HEADS_REFUSED[case]
    text = HEADS.replace(old, new, 1)
    if case != "shared heads":
        text = text.replace("kv_heads: 4", "kv_heads: 2")
    with pytest.raises(InputError) as raised:
        parse_spec(text.encode(), "f.yaml")
    assert f"kernels[0].shapes[0].{message}" in str(raised.value), raised.value


def test_several_ranks_take_the_tiles_and_shapes_of_their_length() -> None:
    text = (
        VALID.replace("rank: 3", "rank: [2, 3]")
        .replace("    causal: [true, false, false]\n", "")
        .replace("tiles: [", "tiles: [{q: [8, 8], kv: [8, 8]}, ")
    )
    kernels = plan(parse_spec(text.encode(), "f.yaml"), ["sm90"])
    assert {(c.rank, c.q_tile) for c in kernels.configs} == {(2, (8, 8)), (3, (2, 8, 8))}
    assert {c.rank for c in kernels.shapes} == {3}


ENTRY_FIELDS = (
    "rank, head_dim, value_head_dim, dtype, out_dtype, direction, causal, tiles, within, variant, arch, shapes"
)
INTEGER = "is no integer; allowed: a whole number, not in quotes"

# What to replace in VALID, by what (« marks the place that the message must name), and the rest of the message.
REFUSED = {
    "unknown field": (
        "dtype:",
        "«dtpye: x\n    dtype:",
        f"kernels[0].dtpye: unknown field; allowed: {ENTRY_FIELDS}; did you mean 'dtype'?",
    ),
    "unknown top field": (
        "arch:",
        "«arhc: x\narch:",
        "arhc: unknown field; allowed: spec_version, library, arch, kernels; did you mean 'arch'?",
    ),
    "unknown shape field": (
        "batch: 2",
        "«windw: 2",
        (
            "kernels[0].shapes[1].windw: unknown field; allowed: tokens, window, stride, dilation, causal, edge, sink, "
            "windows, grid, q_offset, kv_tokens, kv_offset, kv_sink, extra_tokens, heads, kv_heads, batch; did you "
            "mean 'window'?"
        ),
    ),
    "unknown tile field": (
        "{q: [2, 8, 8],",
        "{«k: 1, q: [2, 8, 8],",
        "kernels[0].tiles[0].k: unknown field; allowed: q, kv, q_heads, backward_q, backward_kv; did you mean 'kv'?",
    ),
    "missing field": (
        "  - rank: 3\n    head_dim: [64, 128]",
        "  - «rank: 3",
        "kernels[0].head_dim: is required",
    ),
    "missing top field": ("# a comment\nspec_version: 1\n", "«", "spec_version: is required"),
    "other version": ("version: 1", "version: «2", "spec_version: 2 is not supported; allowed: 1"),
    "version as bool": ("version: 1", "version: «true", "spec_version: true is not supported; allowed: 1"),
    "library name": (
        "hunyuan",
        "«Hunyuan-Video",
        (
            "library: 'Hunyuan-Video' is no library name; allowed: lower-case letters, digits and _, a letter first; "
            "did you mean 'hunyuan_video'?"
        ),
    ),
    "library as number": (
        "hunyuan",
        "«5",
        "library: 5 is no library name; allowed: lower-case letters, digits and _, a letter first",
    ),
    "unknown arch": (
        "sm90,",
        "«sm_90a,",
        "arch[1]: 'sm_90a' is no arch; allowed: cpu, sm90, sm100; did you mean 'sm90'?",
    ),
    "dtype": (
        "bf16",
        "«bf61",
        "kernels[0].dtype[0]: 'bf61' is no dtype; allowed: fp32, bf16, fp16, e4m3; did you mean 'bf16'?",
    ),
    "dtype of torch": (
        "bf16",
        "«BFloat16",
        "kernels[0].dtype[0]: 'BFloat16' is no dtype; allowed: fp32, bf16, fp16, e4m3; did you mean 'bf16'?",
    ),
    "dtype as number": (
        "bf16",
        "«16",
        "kernels[0].dtype[0]: 16 is no dtype; allowed: fp32, bf16, fp16, e4m3; did you mean 'fp16'?",
    ),
    "direction": (
        "direction: [forward]",
        "direction: «forwards",
        (
            "kernels[0].direction: 'forwards' is no direction; allowed: forward, backward, training; "
            "did you mean 'forward'?"
        ),
    ),
    "auto tiles": (
        "[{q: [2, 8, 8], kv: [2, 8, 8]}]",
        "«auto8",
        "kernels[0].tiles: 'auto8' is neither auto nor a list of tiles such as [{q: [8, 8], kv: [8, 8]}]",
    ),
    "tiles not in a list": (
        "[{q: [2, 8, 8], kv: [2, 8, 8]}]",
        "«{q: [2, 8, 8], kv: [2, 8, 8]}",
        "kernels[0].tiles: a mapping is no list; allowed: a list, each entry after a '-'",
    ),
    "tile not a mapping": (
        "[{q: [2, 8, 8], kv: [2, 8, 8]}]",
        "[«5]",
        (
            "kernels[0].tiles[0]: 5 is no mapping; allowed: a mapping with the fields q, kv, q_heads, backward_q, "
            "backward_kv"
        ),
    ),
    "variant": (
        "direction:",
        "variant: «cutlas\n    direction:",
        "kernels[0].variant: 'cutlas' is no variant; allowed: cutlass; did you mean 'cutlass'?",
    ),
    "rank": ("rank: 3", "rank: «4", "kernels[0].rank: 4 is too large; at most 3"),
    "rank as text": ("rank: 3", "rank: «'3'", f"kernels[0].rank: '3' {INTEGER}"),
    "head dim zero": (
        "[64, 128]",
        "[64, «0]",
        "kernels[0].head_dim[1]: 0 is no head dim; allowed: a positive integer, or any",
    ),
    "head dim as text": (
        "[64, 128]",
        "«all",
        "kernels[0].head_dim: 'all' is no head dim; allowed: a positive integer, or any",
    ),
    "value head dim beside any": (
        "[64, 128]",
        "any\n    value_head_dim: «64",
        "kernels[0].value_head_dim: can't be given beside head_dim any, which leaves both open",
    ),
    "empty list": (
        "[64, 128]",
        "«[]",
        "kernels[0].head_dim: is an empty list; allowed: at least one entry",
    ),
    "null": (
        "[64, 128]",
        "[«~]",
        "kernels[0].head_dim[0]: an empty value is no head dim; allowed: a positive integer, or any",
    ),
    "nothing after the colon": ("heads: 24}", "heads:« }", f"kernels[0].shapes[0].heads: an empty value {INTEGER}"),
    "too many entries of causal": (
        "[true, false, false]",
        "«[true, false]",
        "kernels[0].causal: [true, false] has 2 entries; rank 3 needs 3",
    ),
    "causal as number": (
        "[true, false, false]",
        "[true, «0, false]",
        "kernels[0].causal[1]: 0 is no causal kind; allowed: true, false, token, block",
    ),
    "edge of no kind": (
        "batch: 2",
        "edge: «bend",
        "kernels[0].shapes[1].edge: 'bend' is no edge; allowed: shift, cut, wrap",
    ),
    "tile of another rank": (
        "{q: [2, 8, 8]",
        "{q: «[8, 8]",
        "kernels[0].tiles[0].q: [8, 8] has 2 entries; rank 3 needs 3",
    ),
    "kv tile of another rank": (
        "kv: [2, 8, 8]",
        "kv: «16",
        "kernels[0].tiles[0].kv: [16] has 1 entry; rank 3 needs 3",
    ),
    "rank without a tile": (
        (
            "rank: 3\n    head_dim: [64, 128]\n    dtype: [bf16, fp16]\n    direction: [forward]\n"
            "    causal: [true, false, false]\n    tiles: ["
        ),
        "rank: [2, 3]\n    head_dim: [64, 128]\n    dtype: [bf16, fp16]\n    direction: [forward]\n    tiles: «[",
        "kernels[0].tiles: no tile has 2 entries; rank 2 needs at least one",
    ),
    "tokens of another rank": (
        "{tokens: [30, 48, 80], window: [18, 24, 24], stride: [16, 8, 8]",
        "{tokens: «[30, 48, 80, 1], window: [18, 24, 24]",
        "kernels[0].shapes[0].tokens: [30, 48, 80, 1] has 4 entries; rank 3 needs 3",
    ),
    "window of another rank": (
        "[18, 24, 24]",
        "«[18, 24]",
        "kernels[0].shapes[0].window: [18, 24] has 2 entries; rank 3 needs 3",
    ),
    "stride not per dimension": (
        "[16, 8, 8]",
        "«8",
        "kernels[0].shapes[0].stride: [8] has 1 entry; rank 3 needs 3",
    ),
    "window over tokens": (
        "[18, 24, 24]",
        "[«31, 24, 24]",
        "kernels[0].shapes[0].window[0]: 31 is more than the 30 tokens of dimension 0; at most 30",
    ),
    "dilated window over tokens": (
        "[9, 24, 24]",
        "[«11, 24, 24]",
        (
            "kernels[0].shapes[1].window[0]: 11 with dilation 3 spans 33 tokens and is more than the 30 tokens of "
            "dimension 0; at most 10"
        ),
    ),
    "dilation over tokens": (
        "[3, 1, 1]",
        "[1, 1, «81]",
        "kernels[0].shapes[1].dilation[2]: 81 is more than the 80 tokens of dimension 2; at most 80",
    ),
    "stride over window": (
        "[16, 8, 8]",
        "[16, «25, 8]",
        "kernels[0].shapes[0].stride[1]: 25 is more than the window of dimension 1; at most 24",
    ),
    "window below 1": (
        "[18, 24, 24]",
        "[18, «0, 24]",
        "kernels[0].shapes[0].window[1]: 0 is too small; at least 1",
    ),
    "dilation below 1": (
        "[3, 1, 1]",
        "[3, «-1, 1]",
        "kernels[0].shapes[1].dilation[1]: -1 is too small; at least 1",
    ),
    "tokens over the limit": (
        "[30, 48, 80]",
        "[30, 48, «1073741824]",
        "kernels[0].shapes[0].tokens[2]: 1073741824 is too large; at most 1073741823",
    ),
    "heads": (
        "kv_heads: 8",
        "kv_heads: «7",
        (
            "kernels[0].shapes[1].kv_heads: 7 does not divide heads; allowed: a divisor of heads, which is 24; "
            "did you mean 6?"
        ),
    ),
    "fraction": ("[18, 24, 24]", "[18, «1.5, 24]", f"kernels[0].shapes[0].window[1]: 1.5 {INTEGER}"),
    "text for a number": ("[18, 24, 24]", "[18, «1e5, 24]", f"kernels[0].shapes[0].window[1]: '1e5' {INTEGER}"),
    "mapping for a number": ("[18, 24, 24]", "«{a: 1}", f"kernels[0].shapes[0].window: a mapping {INTEGER}"),
    "bool for a number": ("[18, 24, 24]", "[18, «true, 24]", f"kernels[0].shapes[0].window[1]: true {INTEGER}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_place_value_and_way_out(case: str) -> None:
    old, new, message = REFUSED[case]
    text, position = marked(replaced(old, new))
    assert problems(text) == [f"f.yaml:{position}: {message}"]


def test_every_problem_is_listed_in_the_order_of_the_file() -> None:
    text = (
        VALID.replace("hunyuan", "on")
        .replace("bf16", "bf61")
        .replace("[18, 24, 24]", "[31, 24, 24]")
        .replace("kv_heads: 8, batch: 2", "batchs: 2")
        + "  - rank: 4\n    head_dim: 64\n    tiles: outo\n"
    )
    found = [line.split(": ")[:2] for line in problems(text)]
    assert found == [
        ["f.yaml:3:10", "library"],
        ["f.yaml:8:13", "kernels[0].dtype[0]"],
        ["f.yaml:13:41", "kernels[0].shapes[0].window[0]"],
        ["f.yaml:14:85", "kernels[0].shapes[1].batchs"],
        ["f.yaml:15:5", "kernels[1].dtype"],
        ["f.yaml:15:11", "kernels[1].rank"],
        ["f.yaml:17:12", "kernels[1].tiles"],
    ]


def test_a_long_list_of_problems_is_cut_short() -> None:
    lines = problems(replaced("[64, 128]", f"[{', '.join(['0'] * 80)}]"))
    assert len(lines) == 51
    assert lines[-1] == "f.yaml: 30 more faults are not listed"


# As above, but what kernel families refuse: one line per arch that does.
OFF_LIMITS = {
    "head dim": (
        "[64, 128]",
        "[64, «70]",
        ["kernels[0].head_dim[1]: 70 must be a multiple of 8; did you mean 72?"],
    ),
    "large head dim": (
        "[64, 128]",
        "«264",
        [
            "kernels[0].head_dim: 264 is too large; cpu takes at most 256; did you mean 256?",
            "kernels[0].head_dim: 264 is too large; sm100 takes at most 256; did you mean 256?",
            "kernels[0].head_dim: 264 is too large; sm90 takes at most 256; did you mean 256?",
        ],
    ),
    "value head dim": (
        "dtype:",
        "value_head_dim: [8, «9]\n    dtype:",
        ["kernels[0].value_head_dim[1]: 9 must be a multiple of 8; did you mean 16?"],
    ),
    "head dim at run time": (
        "[64, 128]",
        "«any",
        [
            "kernels[0].head_dim: sm100 kernels are built for one head dim; give a number",
            "kernels[0].head_dim: sm90 kernels are built for one head dim; give a number",
        ],
    ),
    "dtype": (
        "bf16",
        "«fp32",
        [
            "kernels[0].dtype[0]: sm100 has no fp32 kernels; it has bf16, fp16, e4m3",
            "kernels[0].dtype[0]: sm90 has no fp32 kernels; it has bf16, fp16",
        ],
    ),
    "q tile": (
        "{q: [2, 8, 8]",
        "{q: «[4, 8, 8]",
        ["kernels[0].tiles[0].q: holds 256 query tokens; sm90 takes at most 192"],
    ),
    "kv tile too large": (
        "kv: [2, 8, 8]",
        "kv: «[8, 8, 8]",
        [
            "kernels[0].tiles[0].kv: holds 512 key tokens; sm100 takes at most 128",
            "kernels[0].tiles[0].kv: holds 512 key tokens; sm90 takes at most 256",
        ],
    ),
    "kv tile no multiple": (
        "kv: [2, 8, 8]",
        "kv: «[1, 5, 20]",
        [
            "kernels[0].tiles[0].kv: holds 100 key tokens; sm100 needs a multiple of 16; the nearest: 96 or 112",
            "kernels[0].tiles[0].kv: holds 100 key tokens; sm90 needs a multiple of 16; the nearest: 96 or 112",
        ],
    ),
    "variant": (
        "dtype:",
        "variant: «cutlass\n    dtype:",
        ["kernels[0].variant: 'cutlass' is not a variant of cpu; it has ''"],
    ),
}


@pytest.mark.parametrize("case", OFF_LIMITS)
def test_limits_of_the_archs_are_reported_at_the_value(case: str) -> None:
    old, new, messages = OFF_LIMITS[case]
    text, position = marked(replaced(old, new))
    assert problems(text) == [f"f.yaml:{position}: {message}" for message in messages]


def test_huge_product_is_refused_with_its_count_before_it_is_listed() -> None:
    thousand = ", ".join(["8"] * 1000)
    text = replaced("[64, 128]", f"[{thousand}]\n    value_head_dim: [{thousand}]")
    message = "kernels: the lists multiply to 6,000,000 kernels; at most 10,000"
    assert problems(text) == [f"f.yaml:6:3: {message}"]


@pytest.mark.parametrize("given", ["[2, 8, 8]", "", "x"])
def test_boxes_of_a_backward_kernel_are_a_mapping(given: str) -> None:
    (line,) = problems(replaced("kv: [2, 8, 8]", f"kv: [2, 8, 8], backward_kv: {given}"))
    assert "tiles[0].backward_kv: " in line and "allowed: a mapping with the fields q, kv" in line


def test_heads_of_a_query_tile() -> None:
    """Of a forward kernel, where the arch can; rows are counted for each head."""
    text = replaced("q: [2, 8, 8]", "q: [2, 8, 8], q_heads: 2").replace("kv_heads: 8", "kv_heads: 2")
    where = "f.yaml:11:37: kernels[0].tiles[0].q_heads: "
    assert problems(text) == [f"{where}tiles of {arch} kernels have 1 head, not 2" for arch in ("cpu", "sm90")]
    text = text.replace("[cpu, sm90, sm100]", "sm100").replace("[forward, backward]", "forward")
    (first, *_) = plan(parse_spec(text.encode(), "f.yaml")).configs
    assert first.q_tile_heads == 2 and "-q2x8x8h2-kv2x8x8" in first.key
    for heads, said in ((3, "takes at most 85 of 3 heads"), (4, "takes at most 64 of 4 heads")):
        (line,) = problems(text.replace("q_heads: 2", f"q_heads: {heads}"))
        assert "tiles[0].q: " in line and said in line
    for heads, kv_heads, groups in ((2, 8, "1 or 3"), (4, 12, "1 or 2"), (2, 24, "1")):
        (line,) = problems(
            text.replace("q_heads: 2", f"q_heads: {heads}").replace("kv_heads: 2", f"kv_heads: {kv_heads}")
        )
        assert line == f"{where}{heads} divides heads / kv_heads of none of the shapes: {groups}"


def test_directions_where_there_are_gradients() -> None:
    text = replaced("[forward]", "[forward, backward]")
    text = text.replace("kv: [2, 8, 8]", "kv: [2, 6, 8], backward_kv: {q: [2, 4, 8], kv: [2, 8, 8]}")
    where = "f.yaml:9:26: kernels[0].direction[1]: "
    assert problems(text) == [f"{where}sm100 has no backward pass; cpu and sm90 have one"]
    spec = parse_spec(text.replace("[cpu, sm90, sm100]", "cpu").encode(), "f.yaml")
    ops = [config.op for config in plan(spec).configs]
    assert sorted(ops) == sorted(["gna_forward", "gna_backward_q", "gna_backward_kv"] * 2)
