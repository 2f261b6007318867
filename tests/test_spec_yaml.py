"""Spec files: traps of YAML, files that are none, presets, the JSON Schema, and that nothing crashes the reader."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from gnaforge.errors import InputError
from gnaforge.families import faults_of
from gnaforge.plan import plan
from gnaforge.spec import json_schema, load_spec, parse_spec, presets
from gnaforge.spec.yaml import MAX_BYTES
from hypothesis import given, settings, strategies as st
from spec_text import VALID, marked, problems, replaced

YAML_BOOL = "as a boolean; write true or false, or put it in quotes if it is text"
NO_DECIMAL = "is no plain decimal number: YAML may read it in base 8, 16 or 60; write 1 to 18 digits, the first not 0"

# What to replace in VALID, by what (« marks the place that the message must name), and the rest of the message.
REFUSED = {
    "infinity": (
        "[18, 24, 24]",
        "[18, «.inf, 24]",
        "kernels[0].shapes[0].window[1]: YAML reads .inf as a fraction; write a decimal number",
    ),
    "yes": ("[true, false, false]", "[«yes, false, false]", f"kernels[0].causal[0]: YAML reads yes {YAML_BOOL}"),
    "on": ("hunyuan", "«on", f"library: YAML reads on {YAML_BOOL}"),
    "octal": ("[18, 24, 24]", "[18, «024, 24]", f"kernels[0].shapes[0].window[1]: 024 {NO_DECIMAL}"),
    "base 60": ("[18, 24, 24]", "[18, «1:30, 24]", f"kernels[0].shapes[0].window[1]: 1:30 {NO_DECIMAL}"),
    "hexadecimal": ("heads: 24", "heads: «0x18", f"kernels[0].shapes[0].heads: 0x18 {NO_DECIMAL}"),
    "underscore": ("heads: 24", "heads: «2_4", f"kernels[0].shapes[0].heads: 2_4 {NO_DECIMAL}"),
    "long number": ("heads: 24", "heads: «" + "9" * 5000, f"kernels[0].shapes[0].heads: {'9' * 40} {NO_DECIMAL}"),
    "tag": (
        "heads: 24",
        "heads: «!!python/object/apply:os.system [ls]",
        (
            "kernels[0].shapes[0].heads: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not supported; "
            "write a plain value"
        ),
    ),
    "harmless tag": (
        "heads: 24",
        "heads: «!!int '24'",
        "kernels[0].shapes[0].heads: tag 'tag:yaml.org,2002:int' is not supported; write a plain value",
    ),
    "alias": (
        "window: [18, 24, 24]",
        "window: «*w",
        "kernels[0].shapes[0].window: alias *w is not supported; repeat the value",
    ),
    "anchor": (
        "window: [18, 24, 24]",
        "window: «&w [18, 24, 24]",
        "kernels[0].shapes[0].window: anchor &w is not supported; repeat the value",
    ),
    "field given twice": ("arch: [cpu", "«library: x\narch: [cpu", "library: given twice; it is first given at 3:1"),
    "unprintable": ("hunyuan", '«"a\\u202Eb"', "library: 'a\\u202eb' holds characters that can't be printed"),
    "unprintable field": (
        "arch:",
        '«"\\e[31m": x\narch:',
        "'\\x1b[31m': unknown field; allowed: spec_version, library, arch, kernels",
    ),
    "second document": (
        "spec_version: 1",
        "spec_version: 1\n«---\na: b\n---",
        "a second YAML document begins here; a kernel spec is one document",
    ),
    "control character": ("hunyuan", "hun«\x07yuan", "character '\\x07' is not allowed in YAML"),
    "list as field name": ("arch:", "? «[a, b]\n: 5\narch:", "a field name must be plain text"),
    "merge key": (
        "arch:",
        "«<<: {a: b}\narch:",
        "<<: unknown field; allowed: spec_version, library, arch, kernels",
    ),
    "syntax": (
        "[cpu, sm90, sm100]",
        "[cpu, sm90, sm100\nkernels«: 5",
        "not valid YAML: expected ',' or ']', but got ':'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trap_is_refused_at_its_place(case: str) -> None:
    old, new, message = REFUSED[case]
    text, position = marked(replaced(old, new))
    assert problems(text) == [f"f.yaml:{position}: {message}"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1:1: the file is empty; a kernel spec begins with spec_version: 1"),
        (b"\n# only a comment\n", "1:1: the file is empty; a kernel spec begins with spec_version: 1"),
        (b"# c\n- a", "2:1: the top level is a list; a kernel spec is a mapping that begins with spec_version: 1"),
        (b"hello", "1:1: the top level is a single value; a kernel spec is a mapping that begins with spec_version: 1"),
        (b"a: b\nc\xff: d", "2:2: byte 0xff is not UTF-8; a kernel spec is a YAML text file"),
        (b"\x7fELF\x02\x00\x00", "1:1: character '\\x7f' is not allowed in YAML"),
        (VALID.encode("utf-16"), "1:1: byte 0xff is not UTF-8; a kernel spec is a YAML text file"),
        (b'a: "\\UFFFFFFFF"', "1:1: not valid YAML: a number or an escape after this point is out of range"),
        (b"a: " + b"[" * 100_000, "1:23: a" + "[0]" * 19 + ": nested more than 20 levels deep"),
        (b"- " * 100_000, "1:41: " + "[0]" * 20 + ": nested more than 20 levels deep"),
        (b"a" * (MAX_BYTES + 1), "1:1: the file is larger than 1,000,000 bytes, too large for a kernel spec"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_file_that_is_no_spec(data: bytes, message: str) -> None:
    assert problems(data) == [f"f.yaml:{message}"]


def test_bomb_of_aliases_is_refused() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    lines = problems(bomb)
    assert "f.yaml:1:5: a0: anchor &a0 is not supported; repeat the value" in lines
    assert "f.yaml:2:10: a1[0]: alias *a0 is not supported; repeat the value" in lines


def test_byte_order_mark_and_windows_line_ends_are_read() -> None:
    data = b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode()
    assert parse_spec(data, "f.yaml") == parse_spec(VALID.encode(), "f.yaml")
    assert "f.yaml:1:4: a: alias *b is not supported; repeat the value" in problems(b"\xef\xbb\xbfa: *b")


def test_load_spec_takes_paths_and_preset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(VALID)
    (tmp_path / "other").write_text(VALID)
    monkeypatch.chdir(tmp_path)
    for source in ("mine.yaml", str(tmp_path / "other"), "./other", Path("other")):
        assert load_spec(source).library == "hunyuan"
    assert load_spec("flux-4k").library == "flux_4k"
    known = ", ".join(presets())
    with pytest.raises(InputError, match=re.escape("no preset 'mine'")) as caught:
        load_spec("mine")
    assert "did you mean the file mine.yaml?" in str(caught.value)
    with pytest.raises(InputError) as caught:
        load_spec("hunyuan")
    assert f"presets: {known}; did you mean 'hunyuan-video'?" in str(caught.value)
    with pytest.raises(InputError, match=r"nothing\.yaml: no such file; presets are named without \.yaml: atlas, "):
        load_spec("nothing.yaml")
    with pytest.raises(InputError, match="can't read '/': Is a directory"):
        load_spec("/")
    with pytest.raises(InputError, match="null byte"):
        load_spec("a\0.yaml")


def test_messages_name_the_file_or_preset(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("a: b")
    with pytest.raises(InputError) as caught:
        load_spec(file)
    assert all(line.startswith(f"{file}:1:1: ") for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("name", presets())
def test_preset(name: str) -> None:
    spec = load_spec(name)
    assert spec.library == name.replace("-", "_")
    assert 20 < len(presets()[name]) <= 110
    kernels = plan(spec)
    assert set(kernels.shapes) == set(kernels.configs)
    for config in kernels.configs:
        assert not faults_of(config)
        for shape in kernels.shapes[config]:
            assert shape.problem().tokens == shape.tokens


def test_known_presets() -> None:
    names = {"quickstart", "hunyuan-video", "flux-4k", "wan-720p", "cosmos", "atlas", "vit-56"}
    names |= {"stormscope", "longlive", "cosmos-predict2"}
    assert list(presets()) == sorted(names)


def test_json_schema_agrees_with_the_reader() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for name in presets():
        path = Path(__file__).parents[1] / "codegen" / "presets" / f"{name}.yaml"
        validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(yaml.safe_load(VALID))
    validator.validate(yaml.safe_load(replaced("[{q: [2, 8, 8], kv: [2, 8, 8]}]", "auto\n    within: 10")))
    for old, new in [
        ("spec_version: 1", "spec_version: 2"),
        ("hunyuan", "Hunyuan"),
        ("bf16", "bf61"),
        ("arch:", "arhc:"),
        ("rank: 3", "rank: 4"),
        ("[64, 128]", "[]"),
        ("[64, 128]", "all"),
        ("window: [18, 24, 24]", "window: [18, 0, 24]"),
        ("[{q: [2, 8, 8], kv: [2, 8, 8]}]", "outo"),
        ("heads: 24", "heads: '24'"),
    ]:
        assert list(validator.iter_errors(yaml.safe_load(replaced(old, new)))), new


def test_json_schema_describes_every_field() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert field.get("description"), name


_LINE = re.compile(r"f:(\d+):(\d+): .+|f: \d+ more faults are not listed")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # as YAML has them


def check_reader(data: bytes) -> None:
    """The reader returns a spec that can be planned, or raises an InputError whose places lie in the file."""
    try:
        spec = parse_spec(data, "f")
    except InputError as error:
        last = len(_LINE_BREAK.findall(data.decode(errors="replace"))) + 1
        for line in str(error).split("\n"):
            match = _LINE.fullmatch(line)
            assert match, line
            assert match[1] is None or 1 <= int(match[1]) <= last, line
    else:
        plan(spec)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="[]{}:,-?&*!|>'\"%@`#~ \n\tab01.<=\\"))
def test_random_text_never_crashes_the_reader(text: str) -> None:
    check_reader(text.encode(errors="surrogatepass"))


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_random_bytes_never_crash_the_reader(data: bytes) -> None:
    check_reader(data)


_SNIPPETS = st.text(max_size=5) | st.sampled_from(
    [
        *("[", "]", "{", "}", ": ", "- ", "\n", "~", "*a", "&a ", "!t ", "---\n", "<<", "''", '"\\ud800"', "[[]]"),
        *("no", "0x7", "1:30", "-1", "99", "1.5", "9" * 30, "any", "auto", "rank", "sm90", "fp32", "{a: {b: 1}}"),
    ]
)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), _SNIPPETS), min_size=1, max_size=4))
def test_spoiled_spec_never_crashes_the_reader(cuts: list[tuple[int, int, str]]) -> None:
    text = VALID
    for start, length, snippet in cuts:
        text = text[:start] + snippet + text[start + length :]
    check_reader(text.encode(errors="surrogatepass"))


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["auto", "any", "bf16", "cpu", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["q", "kv", "rank", "tokens"]), inner),
    max_leaves=8,
)
_TOKENS = re.findall(r"\w+|\[[\w, ]+\]", VALID.partition("\n")[2])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_TOKENS), _VALUES)
def test_value_of_another_kind_never_crashes_the_reader(token: str, value: object) -> None:
    inline = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    check_reader(replaced(token, inline).encode())
