"""Kernel families: what the package brings, a second one on an arch, and what is said of one that lacks something."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import gnaforge
import pytest
from gnaforge import families as package
from gnaforge.build.render import render_kernel
from gnaforge.build_tools.includes import include_closure
from gnaforge.errors import BuildError, InputError
from gnaforge.families import (
    TARGETS,
    Family,
    choose_family,
    families,
    families_of,
    family_of,
    faults_of,
    require_config,
    require_family,
)
from gnaforge.plan import plan
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.family import FamilyFacts, facts_of, find_facts
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.fitting import fit_problems, simulate_problem
from gnaforge.spec import spec_of
from kernel_set import FAMILIES

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests/toy_family/cpu_toy_forward.py"
STATE = ROOT / "build_tools/emulator/standin/state.cpp"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The toy family, beside the package's own."""
    monkeypatch.setenv("GNAFORGE_FAMILIES", str(TOY))
    return require_family(FORWARD.name, "cpu", "toy")


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Family]]:
    """Gives a family of the package other values: ``changed("cpu_forward", time=None)``."""

    def change(name: str, **fields: object) -> Family:
        module = import_module(f"gnaforge.families.{name}")
        monkeypatch.setattr(module, "FAMILY", replace(module.FAMILY, **fields))
        package._table.cache_clear()
        return require_family(FORWARD.name, module.FAMILY.arch)

    yield change
    monkeypatch.undo()
    package._table.cache_clear()


def test_a_family_is_named_like_its_file_and_has_its_template() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "codegen/families").glob("*.py")}
    files = {name for name, text in texts.items() if re.search(r"^FAMILY = ", text, re.M)}
    assert {family.name for family in families()} == files
    for family in families():
        assert (ROOT / "templates" / family.template).is_file()
    own = {path.name for path in (ROOT / "templates").iterdir() if list(path.glob("kernel.*.j2"))}
    assert own == files


def test_every_target_has_one_default_family_which_comes_first() -> None:
    for arch in TARGETS:
        own = families_of("gna_forward", arch)
        assert [family.default for family in own] == [True] + [False] * (len(own) - 1)
    assert [family.arch for family in families()] == sorted((f.arch for f in families()), key=list(TARGETS).index)


def runs_on(nvcc_target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``sm_<nvcc_target>`` runs there (CUDA C Programming Guide): of ``90a`` on 9.0 alone, of ``100f``
    on 10.0 and later ones of that family."""
    major, minor, kind = re.fullmatch(r"(\d+)(\d)([af])", nvcc_target).groups()  # type: ignore[union-attr]
    built = int(major), int(minor)
    return capability == built if kind == "a" else capability[0] == built[0] and capability[1] >= built[1]


def test_targets_name_capabilities_that_their_code_runs_on() -> None:
    assert not runs_on("90a", (9, 1)) and not runs_on("100f", (12, 0))
    for target in TARGETS.values():
        assert bool(target.capabilities) == target.is_gpu == bool(target.nvcc_target)
        assert all(runs_on(target.nvcc_target, capability) for capability in target.capabilities)
    capabilities = [capability for target in TARGETS.values() for capability in target.capabilities]
    assert len(capabilities) == len(set(capabilities)), "no GPU has two targets"


def test_the_emulator_has_the_device_of_every_gpu_target() -> None:
    text = STATE.read_text()
    names = re.findall(r'"(\w+)"', re.search(r'choice\("DEVICE", \{(.*?)\}', text)[1])  # type: ignore[index]
    rows = re.findall(r'\{"NVIDIA \w+ \(emulated\)", (\d+), (\d+),', text)
    devices = {name: (int(major), int(minor)) for name, (major, minor) in zip(names, rows, strict=True)}
    for target in TARGETS.values():
        assert not target.is_gpu or devices[target.emulated_device] in target.capabilities


def test_kernels_take_their_capabilities_from_the_target() -> None:
    for key, said in (
        ("gna_forward-sm90-r1-bf16-d64-q64-kv64", "capabilities[] = {90};"),
        ("gna_forward-sm100-r1-bf16-d64-q256-kv128", "capabilities[] = {100, 103};"),
    ):
        assert said in render_kernel(require_config(key))


def test_features_are_those_of_the_contract() -> None:
    text = (ROOT / "templates/include/gnaforge/abi.h").read_text()
    known = {name.lower() for name in re.findall(r"#define GNAFORGE_FEATURE_(\w+)", text)}
    for family in families():
        assert set(family.features) <= known
    rendered = render_kernel(require_config("gna_forward-sm90-r1-bf16-d64-q64-kv64-cutlass"))
    assert "features = GNAFORGE_FEATURE_DETERMINISTIC;" in rendered and "op = GNAFORGE_GNA_FORWARD;" in rendered


def test_families_that_include_cutlass_say_so() -> None:
    """Only then are its headers found, its version part of a kernel's name in the cache, and its licence in wheels."""
    for family in families():
        template = (ROOT / "templates" / family.template).read_text()
        headers = include_closure(template, ROOT / "templates/include")
        texts = [template, *((ROOT / "templates/include" / name).read_text() for name in headers)]
        assert bool(family.cutlass) == any(re.search(r"#\s*include\s*[<\"]cut(lass|e)/", text) for text in texts)


def test_facts_pass_through_json() -> None:
    import json

    for family in families():
        assert FamilyFacts.from_json(json.loads(json.dumps(family.facts.as_json()))) == family.facts
    unknown = KernelConfig("gna_forward", "cpu", 1, "fp32", 0, (8,), (8,), variant="none")
    assert find_facts(unknown) is None
    with pytest.raises(LookupError, match="doesn't know the kernel's family"):
        facts_of(unknown)


# A second family on one arch.


class TestTwoFamilies:
    """The toy beside cpu's own: the default serves what it can, a named variant is taken everywhere."""

    def test_lookup(self, toy: Family) -> None:
        own = FAMILIES["cpu"]
        assert families_of("gna_forward", "cpu") == (require_family("gna_forward", "cpu"), toy)
        assert require_family("gna_forward", "cpu").name == own.name and not toy.default
        assert family_of(KernelConfig("gna_forward", "cpu", 1, "fp32", 0, (8,), (8,), variant="toy")) is toy
        assert family_of(KernelConfig("gna_forward", "cpu", 1, "fp32", 0, (8,), (8,))).name == own.name
        with pytest.raises(InputError, match="variant: 'tory' is not a variant of cpu; it has '', 'toy'"):
            require_family("gna_forward", "cpu", "tory")

    def test_the_default_serves_what_it_can_and_the_next_one_the_rest(self, toy: Family) -> None:
        def config(rows: int) -> Callable[[Family], KernelConfig]:
            return lambda family: KernelConfig(
                "gna_forward", "cpu", 1, "fp32", 64, (rows,), (64,), variant=family.variant
            )

        default = require_family("gna_forward", "cpu")
        for rows, variant, chosen in ((64, None, default), (512, None, toy), (4096, None, default), (4096, "toy", toy)):
            assert choose_family("gna_forward", "cpu", variant, config(rows)) is chosen
        assert default.faults(config(4096)(default)) == [("q_tile", "holds 4,096 query tokens; cpu takes at most 256")]
        assert toy.faults(config(4096)(toy)) == [("q_tile", "holds 4,096 query tokens; cpu toy takes at most 1024")]

    @pytest.mark.parametrize("tiles", ["auto", [{"q": 64, "kv": 64}]])
    def test_specs(self, toy: Family, tiles: object) -> None:
        entry = {"rank": 1, "head_dim": 64, "dtype": "fp32", "tiles": tiles}
        entry["shapes"] = [{"tokens": 4096, "window": 64}]
        spec = {"spec_version": 1, "library": "x", "arch": "cpu", "kernels": [entry]}
        (default,) = plan(spec_of(spec)).configs
        assert default.variant == ""
        (named,) = plan(spec_of({**spec, "kernels": [{**entry, "variant": "toy"}]})).configs
        assert named.variant == "toy"
        if tiles == "auto":  # fitted with the toy's own limits and constants
            assert named.q_tile != default.q_tile

    def test_a_spec_takes_the_family_that_can(self, toy: Family) -> None:
        entry = {"rank": 1, "head_dim": 64, "dtype": "fp32", "tiles": [{"q": [64, 512][i], "kv": 64} for i in range(2)]}
        spec = {"spec_version": 1, "library": "x", "arch": "cpu", "kernels": [entry]}
        assert {config.q_tile: config.variant for config in plan(spec_of(spec)).configs} == {(64,): "", (512,): "toy"}
        with pytest.raises(InputError, match="holds 512 query tokens; cpu takes at most 256"):
            spec_of({**spec, "kernels": [{**entry, "dtype": "bf16"}]})  # which the toy doesn't have

    def test_simulate_and_fit(self, toy: Family) -> None:
        shape = {"tokens": (64, 64), "window": (9, 9)}
        default = gnaforge.simulate(**shape, arch="cpu", dtype="fp32")
        named = gnaforge.simulate(**shape, arch="cpu", variant="toy", dtype="fp32")
        assert (default.family.default, named.family) == (True, toy)
        assert default.as_json()["variant"] == "" and named.as_json()["variant"] == "toy"
        assert named.as_json()["model"]["source"] == "made up"
        assert named.work_bound > default.work_bound  # no padding of rows
        assert gnaforge.simulate(**shape, arch="cpu", q_tile=(32, 16), kv_tile=(8, 8), dtype="fp32").family is toy
        fits = [gnaforge.fit(shape, arch="cpu", variant=variant, dtype="fp32").tiles for variant in (None, "toy")]
        assert fits[0] != fits[1] and fits[0] == gnaforge.fit(shape, arch="cpu", variant="", dtype="fp32").tiles
        with pytest.raises(InputError, match="variant: no GPU has a kernel family 'toy'"):
            gnaforge.simulate(**shape, variant="toy")

    def test_registration_names_configs(self, toy: Family) -> None:
        from gnaforge.registration import _configs_of_fields, config_for
        from gnaforge.runtime.request import Request

        fields = {"rank": 1, "head_dim": 64, "dtype": "fp32"}
        for more, variant in (
            ({}, ""),
            ({"variant": "toy"}, "toy"),
            ({"q_tile": 64, "kv_tile": 64}, ""),
            ({"q_tile": 512, "kv_tile": 64}, "toy"),
            ({"variant": "toy", "q_tile": 64, "kv_tile": 64}, "toy"),
            ({"variant": "toy", "tokens": 4096, "window": 64}, "toy"),
        ):
            (config,) = _configs_of_fields({**fields, **more}, "cpu")
            assert config.variant == variant, more
        (config,) = _configs_of_fields({**fields, "variant": "toy"}, "cpu")
        assert (config.q_tile, config.kv_tile) == toy.default_tiles[1]
        request = Request("gna_forward", 1, "fp32", 64, 64, "cpu")
        assert config_for(request, fit=True).variant == ""
        assert config_for(replace(request, q_tile=(512,)), fit=True).variant == "toy"

    def test_benchmarks_build_the_family_that_is_named(self, toy: Family) -> None:
        from gnaforge.bench.run import config_of
        from gnaforge.runtime.bench import computed_pairs
        from gnaforge.runtime.reference import visible_pairs

        problem = Problem((64,), (9,), head_dim=64, dtype="fp32")
        configs = [config_of(problem, "cpu", variant) for variant in (None, "toy")]
        assert [config.variant for config in configs] == ["", "toy"]
        # By its own padding: the toy computes no row and no key that nobody asked for.
        assert computed_pairs(problem, replace(configs[1], q_tile=(1,))) == visible_pairs(problem)
        assert computed_pairs(problem, replace(configs[0], q_tile=(1,))) == 32 * visible_pairs(problem)


# What a family lacks is said by name.


def test_a_family_without_time_constants_says_so(changed) -> None:
    family = changed("cpu_forward", time=None)
    said = "the kernel family cpu_forward has no time constants"
    problem = Problem((64,), (9,), dtype="fp32")
    for call in (
        lambda: gnaforge.simulate((64,), (9,), arch="cpu", dtype="fp32"),
        lambda: gnaforge.simulate((64,), (9,), arch="cpu", dtype="fp32", q_tile=(8,), kv_tile=(8,)),
        lambda: gnaforge.fit({"tokens": (64,), "window": (9,)}, arch="cpu", dtype="fp32"),
        lambda: simulate_problem(problem, arch="cpu"),
        lambda: fit_problems([problem], family),
    ):
        with pytest.raises(InputError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_calls_and_benchmarks_of_a_family_without_time_constants_take_default_tiles(changed) -> None:
    from gnaforge.bench.run import config_of
    from gnaforge.registration import config_for
    from gnaforge.runtime.request import Request

    family = changed("cpu_forward", time=None, head_dim_at_run_time=False)
    problem = Problem((4096,), (64,), head_dim=64, dtype="fp32")
    request = Request.of_problem("gna_forward", problem, "cpu")
    assert config_for(request, fit=True).q_tile == family.default_tiles[1][0]
    assert config_of(problem, "cpu").q_tile == family.default_tiles[1][0]
    entry = {"rank": 1, "head_dim": 64, "dtype": "fp32", "tiles": "auto", "shapes": [{"tokens": 64, "window": 9}]}
    made = plan(spec_of({"spec_version": 1, "library": "x", "arch": "cpu", "kernels": [entry]}))
    assert made.configs[0].q_tile == family.default_tiles[1][0] and "no time model to fit by" in made.notes[0]


SECOND_DEFAULT = """
from dataclasses import replace
from importlib import import_module
from gnaforge.families import cpu_forward
FAMILY = replace(cpu_forward.FAMILY, variant="mine")
"""


def test_a_gpu_family_without_demands_on_machine_code_is_built_and_said_to_be(changed, own_cache: Path) -> None:
    from gnaforge.build.kernels import Listener, build_kernels

    changed("sm90_forward", machine_code=None)
    config = require_config("gna_forward-sm90-r1-bf16-d64-q64-kv64")
    notes: list[str] = []
    try:
        artifacts, _ = build_kernels([config], listener=Listener(note=notes.append))
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    assert notes == ["the kernel family sm90_forward demands nothing of its machine code but no spills"]
    record = artifacts[config].record
    assert record["registers"] > 0 and record["spill_bytes"] == 0 and record["code"].keys() == {"instructions", "bytes"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError: .*No such file or directory"),
        ("FAMILY = 3", "FAMILY is no gnaforge.families.Family"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("", "AttributeError: module .* has no attribute 'FAMILY'"),
        ("from gnaforge.families.cpu_forward import FAMILY", "there are two kernel families cpu_forward"),
        (SECOND_DEFAULT, "2 kernel families say that they are the default of gna_forward on cpu"),
    ],
)
def test_a_file_that_holds_no_family_is_named(tmp_path: Path, monkeypatch, text: str | None, reason: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("GNAFORGE_FAMILIES", os.pathsep.join([str(TOY), str(path)]))
    with pytest.raises(InputError, match=rf"GNAFORGE_FAMILIES: .*{reason}"):
        families()


def test_a_missing_template_is_named(toy: Family, tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / TOY.name
    copy.write_text(TOY.read_text())
    monkeypatch.setenv("GNAFORGE_FAMILIES", str(copy))
    with pytest.raises(InputError, match=r"cpu_toy_forward has no template: 'cpu_toy_forward/kernel\.cpp\.j2'"):
        render_kernel(KernelConfig("gna_forward", "cpu", 1, "fp32", 0, (8,), (8,), variant="toy"))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("gna_forward-sm80-r1-bf16-d64-q64-kv64", "arch: 'sm80' is unknown; there are cpu, sm90, sm100"),
        (
            "gna_forward-sm90-r1-bf16-d64-q64-kv64-lean",
            "variant: 'lean' is not a variant of sm90; it has '', 'cutlass'",
        ),
    ],
)
def test_there_is_no_such_kernel(key: str, reason: str) -> None:
    config = KernelConfig.parse(key)
    assert [": ".join(fault) for fault in faults_of(config)] == [reason]
    for call in (require_config, family_of, render_kernel):
        with pytest.raises(InputError, match=re.escape(f"{key}: {reason}")):
            call(config)
