"""The sm90 backward kernels in the emulator, and the checks that their build makes. Nothing here ran on hardware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
from gnaforge.build.kernels import build_kernels, find_libraries
from gnaforge.errors import BuildError
from gnaforge.families.sm90_backward_q import FAMILY
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel, random_problem_for, shrink
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm90_backward_kernels import Q_CONFIGS, Q_KEYS
from sm90_boundary import Q_BOXES, compile_kernel
from test_sm90 import run

SCHEDULES = [Schedule("eager", "round-robin"), Schedule("lazy", "depth-first"), Schedule("random", "random")]


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    try:
        return find_libraries(Q_CONFIGS, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


def require_right(config: KernelConfig, library: Path, problems: list[Problem], settings: Settings) -> None:
    """Every problem is within its bound under every schedule, with the same bits, and is not refused."""
    with Verifier(config, library, settings) as verifier:
        for problem in problems:
            found = verifier.verify(problem)
            assert not found.failed and found.identical, f"{problem}: {found.failed}\n{found.message}"


@pytest.mark.parametrize("config", Q_CONFIGS, ids=str)
def test_random_problems(libraries: dict[KernelConfig, Path], config: KernelConfig) -> None:
    """All settings that the family has; in all layouts, poisoned, with the same bits under all schedules."""
    problems = [shrink(random_problem_for(config, seed, 300), config, 120) for seed in range(6)]
    require_right(config, libraries[config], problems, Settings(SCHEDULES))


@pytest.mark.survey
def test_four_hundred_random_problems(libraries: dict[KernelConfig, Path]) -> None:
    for config in Q_CONFIGS:
        problems = [shrink(random_problem_for(config, seed), config) for seed in range(100, 150)]
        require_right(config, libraries[config], problems, Settings(SCHEDULES))


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        # CTAs take many Q tiles; as folded heads and per batch entry.
        (Q_KEYS[0], Problem((9, 9, 10), (5, 4, 9), (2, 1, 3), 1, (False, True, False), batch=3, heads=4, kv_heads=2)),
        (Q_KEYS[1], Problem((7, 9, 16), (3, 3, 7), (1, 2, 1), (1, 2, 1), batch=2, heads=6, kv_heads=3)),
        (Q_KEYS[6], Problem(580, 150, 5, causal=True, batch=2, heads=4, kv_heads=1)),
        (Q_KEYS[2], Problem((20, 18), (20, 18), heads=5)),  # dense
        (Q_KEYS[5], Problem((23, 20), (5, 4), dilation=(4, 3), heads=2)),  # more dilation groups than a launch holds
        # Extra keys: two pieces with and without whole tiles, batch entries apart, more launches for dilation groups.
        (Q_KEYS[0], Problem((9, 6, 11), (5, 5, 7), (1, 2, 1), batch=2, heads=2, kv_heads=1, extra_tokens=(200, 40))),
        (Q_KEYS[1], Problem((5, 9, 8), (3, 4, 3), 1, (1, 2, 1), (True, False, False), batch=2, extra_tokens=(99,))),
        (Q_KEYS[6], Problem(200, 50, 3, 2, batch=3, heads=2, kv_heads=1, extra_tokens=(48, 100))),
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: Problem) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([SCHEDULES[2]], gaps=False, poison=False)
    require_right(config, libraries[config], [for_kernel(problem, config)], settings)


def test_a_tile_that_fills_no_warpgroup_is_added_to() -> None:
    """Its gradient lies apart from Q, where nobody has written the rows that the tile hasn't."""
    config = KernelConfig.parse("gna_backward_q-sm90-r2-bf16-d64-q2x4-kv6x8")
    library = find_libraries([config], emulated=True)[config]
    settings = Settings(SCHEDULES[:1], gaps=False, poison=False)
    require_right(config, library, [for_kernel(Problem((7, 9), (5, 5)), config)], settings)


GRIDS = """
import hashlib, os, torch
os.environ["GNAFORGE_EMULATOR_PROCESSORS"] = "{processors}"
from pathlib import Path
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel
from gnaforge.verification.problems import for_kernel
kernel = Kernel(Path("{library}"), "{key}")
problem = for_kernel(Problem((20, 18), (9, 7), (1, 2), heads=4, kv_heads=2), kernel.config)
tensors = kernel.op.random_inputs(problem)
tensors["grad_q"] = torch.full_like(tensors["q"], torch.nan)
kernel.call(problem, tensors)
print(hashlib.sha256(tensors["grad_q"].view(torch.int16).numpy().tobytes()).hexdigest())
"""


def test_any_number_of_thread_blocks_gives_the_same_bits(
    libraries: dict[KernelConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Q_KEYS[2]
    library = libraries[KernelConfig.parse(key)]
    found = {
        run(GRIDS.format(library=library, key=key, processors=processors), mode)
        for mode, processors in (("eager", 1), ("lazy", 3), ("random", 64))
    }
    assert len(found) == 1


DELTA = """
import dataclasses, torch
from pathlib import Path
from gnaforge.build import abi
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel, Refused, view_of
from gnaforge.verification.problems import for_kernel
kernel = Kernel(Path("{library}"), "{key}")
problem = for_kernel(Problem((12, 18), (5, 7), 1, (1, 2), batch=2, heads=4, kv_heads=2), kernel.config)
inputs = kernel.op.random_inputs(problem)
def call(tensors, features=0):
    grad = torch.full_like(inputs["q"], torch.nan)
    views = {{name: view_of(x, 2) for name, x in dict(tensors, grad_q=grad).items()}}
    made = kernel.prepare(problem, views) if not features else prepare_with(features, views)
    workspace = torch.empty(made.workspace_bytes + 256, dtype=torch.uint8)
    made.run((workspace.data_ptr() + 255) // 256 * 256 if made.workspace_bytes else None, None)
    return grad, made.workspace_bytes
def prepare_with(features, views):
    made = kernel.prepare(problem, {{**views, "out": view_of(inputs["out"], 2)}})
    held = abi.make_args(kernel.op.name, made.args.problem.contents, views, made.args.host.contents)
    made.args.tensors, made.args.features = held.tensors, made.args.features | features
    made.held = held
    return made
"""


@pytest.mark.parametrize("key", [Q_KEYS[3], Q_KEYS[5]])
def test_delta_is_left_and_taken(libraries: dict[KernelConfig, Path], key: str) -> None:
    """With any strides; then neither the output nor the gradient of the log-sum-exp is looked at."""
    code = DELTA.format(library=libraries[KernelConfig.parse(key)], key=key)
    code += """
wanted, bytes_alone = call(inputs)
queries = inputs["lse"].numel()
assert bytes_alone == (4 * queries + 255) // 256 * 256, bytes_alone
room = torch.full((2, 12, 18, 11), torch.nan)
delta = room[..., 1:9:2]
found, bytes_beside = call(dict(inputs, delta=delta))
assert bytes_beside == 0 and torch.equal(found, wanted)
exact = (inputs["grad_out"].double() * inputs["out"].double()).sum(-1) - inputs["grad_lse"].double()
assert ((delta - exact).abs() < 1e-4).all() and room[..., 0::2].isnan().all() and room[..., 9:].isnan().all()
without = dict(inputs)
del without["grad_lse"]
delta_without = torch.empty_like(inputs["lse"])
call(dict(without, delta=delta_without))
assert ((delta_without - inputs["grad_lse"] - exact).abs() < 1e-4).all()
given = dict(without, delta=delta)
del given["out"]
found, bytes_given = call(given, abi.feature_bits(("delta",)))
assert bytes_given == 0 and torch.equal(found, wanted)
"""
    run(code)


def test_tensors_have_strides_of_their_own(libraries: dict[KernelConfig, Path]) -> None:
    key = Q_KEYS[3]
    code = DELTA.format(library=libraries[KernelConfig.parse(key)], key=key)
    code += """
wanted, _ = call(inputs)
def moved(x, order):
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)
orders = {"q": (0, 1, 2, 3, 4), "k": (3, 0, 1, 2, 4), "v": (2, 1, 0, 3, 4), "out": (3, 2, 1, 0, 4), "lse": (3, 1, 0, 2)}
orders |= {"grad_out": (1, 3, 0, 2, 4), "grad_lse": (0, 3, 2, 1)}
found, _ = call({name: moved(x, orders[name]) for name, x in inputs.items()})
assert torch.equal(found, wanted)
for name, change, said in (
    ("grad_out", lambda x: x[..., :1, :].expand_as(x), "grad_out has stride 0 along its heads"),
    ("grad_out", lambda x: x.new_zeros(x.numel() + 1)[1:].view_as(x), "grad_out is not aligned to 16 bytes"),
    ("out", lambda x: x.new_zeros(*x.shape[:-1], x.shape[-1] + 2)[..., :-2], "must be a positive multiple of 8"),
):
    try:
        call(dict(inputs, **{name: change(inputs[name])}))
    except Refused as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
one = {name: x[:1].expand_as(x) if name in ("k", "grad_out") else x for name, x in inputs.items()}  # no copies
assert torch.equal(call(one)[0], call({name: x.contiguous() for name, x in one.items()})[0])
"""
    run(code)


OPERATOR = """
import torch, gnaforge
from pathlib import Path
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel
from gnaforge.verification.problems import for_kernel
gnaforge.load_library("{library}")
op, config = (kernel := Kernel(Path("{library}"), "{key}")).op, kernel.config
problem = for_kernel(Problem((12, 18), (5, 7), 1, (1, 2), batch=2, heads=4, kv_heads=2), config)
inputs = op.random_inputs(problem)
inputs["grad_out"] = torch.ones((), dtype=torch.bfloat16).expand(inputs["grad_out"].shape)  # as of a sum
tensors = [inputs[name] for name in ("grad_out", "grad_lse", "q", "k", "v", "out", "lse")]
def call(wanted):
    return torch.ops.gnaforge.backward(*tensors, [5, 7, 1, 1, 1, 2, 0, 0], None, wanted, "{key}", "")
found, *others = call(1)
assert [x.numel() for x in others] == [0] * 4
exact = op.exact(problem, inputs)
bound = op.bound(problem, inputs, exact, rounds_probabilities=True)
assert ((found.double() - exact["grad_q"]).abs() <= bound["grad_q"]).all()
try:
    call(7)
except RuntimeError as error:
    assert "no kernel fits this problem: gna_backward_kv" in str(error), error
else:
    raise AssertionError("no kernel of K's and V's gradients is here")
"""


def test_the_operator_runs_it(libraries: dict[KernelConfig, Path]) -> None:
    """Through the core: gradients of outputs as autograd makes them, and what isn't wanted is not computed."""
    run(OPERATOR.format(library=libraries[KernelConfig.parse(Q_KEYS[5])], key=Q_KEYS[5]))


MUTANTS = {
    "delta without the gradient of the log-sum-exp": (
        "prepare.h",
        "if (params.grad_log_sum_exp.data != nullptr)",
        "if (params.rows < 0)",
    ),
    "no scale": ("q_consumer.h", "factor[2] = {params.scale, params.scale}", "factor[2] = {1, 1}"),
    "no delta": ("q_consumer.h", "(slopes[2 * i] - row[i % 2].delta)", "slopes[2 * i]"),
    "probabilities of negative scores": ("q_consumer.h", "-row[i / 2 % 2].shift", "row[i / 2 % 2].shift"),
    "the head dim in place of the value head dim": (
        "q_consumer.h",
        "multiply_shared<L, Mma, L::value_head_dim>",
        "multiply_shared<L, Mma, L::head_dim>",
    ),
    "no mask": ("q_consumer.h", "facts.kind != TileKind::interior", "facts.kind == TileKind::shell_below"),
    "statistics of another row": ("q_consumer.h", "row[r] = statistics(work, r);", "row[r] = statistics(work, 0);"),
    "delta of another dilation group": ("host.h", "first_delta += slice.query[d] * delta.token_stride[d];", ""),
    "delta of neighbours in place of the dilation group's": (
        "host.h",
        "delta.token_stride[d] * axes[d].dilation",
        "delta.token_stride[d]",
    ),
    "no sum with what is there": ("q_consumer.h", "if (params.accumulates) {", "if (params.accumulates < 0) {"),
    "a sum without the scale": ("q_consumer.h", "first_row(), grad, params.scale);", "first_row(), grad, 1);"),
    "a tile's gradient on top of the one before": (
        "q_consumer.h",
        "for (int i = 0; i < grad_registers; ++i) grad[i] = 0;",
        "for (int i = 0; i < grad_registers; ++i) grad[i] = grad_registers;",
    ),
}


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(libraries: dict[KernelConfig, Path], headers: Path, name: str) -> None:
    file, old, new = MUTANTS[name]
    replace_once(headers / "gnaforge" / "sm90" / "backward" / file, old, new)
    config = KernelConfig.parse("gna_backward_q-sm90-r2-bf16-d72v8-q8x8-kv4x8")
    problem = for_kernel(Problem((14, 17), (5, 7), (1, 2), (1, 2), batch=3, heads=2, extra_tokens=(9, 70)), config)
    library = find_libraries([config], emulated=True)[config]
    with Verifier(config, library, Settings([SCHEDULES[0]], gaps=False, poison=False)) as verifier:
        found = verifier.verify(problem)
    assert found.failed in ("wrong", "emulator"), found.failed


def test_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path]) -> None:
    """A few mutants of a kernel: fences, waits and arrivals that its rules need."""
    said = run(["kernel_mutants.py", str(libraries[Q_CONFIGS[7]]), Q_KEYS[7], "13"], "eager")
    assert re.match(r"\d+ mutants reached, 0 not; wrong by rule ([3-9]), of these noticed \1;", said), said


def survivors_of(said: str) -> tuple[int, list[str]]:
    """Of a report: how many mutants are wrong by rule, and lines of those of them that survived."""
    wrong, noticed = map(int, re.search(r"wrong by rule (\d+), of these noticed (\d+);", said).groups())
    _, _, listed = said.partition("wrong, survived:\n")
    survivors = listed.splitlines()[: wrong - noticed]
    assert len(survivors) == wrong - noticed
    return wrong, survivors


@pytest.mark.survey
@pytest.mark.parametrize("key", [Q_KEYS[0], Q_KEYS[6]])
def test_every_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path], key: str) -> None:
    """But for one wait for grids before: consumers that lack it have met warps that waited, and the emulator takes that
    to be enough, as PTX says that memory is then visible to the whole grid. And but for the three turns: they
    order products in time, and nothing depends on that."""
    said = run(["kernel_mutants.py", str(libraries[KernelConfig.parse(key)]), key], "eager")
    wrong, survivors = survivors_of(said)
    waits = [line for line in survivors if "griddepcontrol.wait;" in line]
    turns = [line for line in survivors if "barrier.cta.sync" in line]
    assert wrong >= 45 and len(waits) <= 1 and len(turns) <= 3 and len(waits + turns) == len(survivors), said


def test_the_gradient_takes_the_place_of_q_when_nobody_reads_it(libraries: dict[KernelConfig, Path]) -> None:
    """PTX doesn't say that a warp waits for other warps' parts of a product, which the emulator lets it do: so by the
    text, of kernels of either layout, that a barrier lies between the last wait and the gradient."""
    for key in (Q_KEYS[2], Q_KEYS[6]):
        text = libraries[KernelConfig.parse(key)].read_bytes().decode("latin-1")
        text = text[: text.index("stmatrix.sync")]  # the PTX lies in the library as it is
        assert "barrier.cta.sync" in text[text.rindex("wgmma.wait_group") :], key


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 64}, "head_dim is 64, this kernel takes 72"),
        ({"scale": -1.0}, "scale is -1, this kernel takes positive ones"),
    ],
)
def test_refusals_say_why(libraries: dict[KernelConfig, Path], fields: dict[str, object], reason: str) -> None:
    config = Q_CONFIGS[5]
    problem = replace(for_kernel(Problem((8, 8), 3), config), **fields)
    with Verifier(config, libraries[config], Settings(SCHEDULES[:1])) as verifier:
        found = verifier.verify(problem)
    assert found.failed == "refused" and reason in found.message


def test_a_wait_above_the_exponentials_fails_the_build(
    libraries: dict[KernelConfig, Path], headers: Path, own_cache: Path
) -> None:
    """The loop without its rotation: ptxas does what the rotation is there to prevent, and the check sees it."""
    consumer = headers / "gnaforge" / "sm90" / "backward" / "q_consumer.h"
    after = "      find_probabilities();\n    }\n"
    replace_once(
        consumer, after, after.replace("    }\n", "      ptx::wgmma_wait<0>();\n      ptx::hold(slopes);\n    }\n")
    )
    with pytest.raises(BuildError, match="ptxas moved a wait above the exponentials"):
        build_kernels([Q_CONFIGS[2]])
    assert (own_cache / ".failed" / Q_KEYS[2] / "kernel.cu").is_file()


def test_facts_of_a_gpu_build(libraries: dict[KernelConfig, Path]) -> None:
    artifacts, _ = build_kernels(Q_CONFIGS[:1])
    record = artifacts[Q_CONFIGS[0]].record
    # 384 threads share 65,536 registers; Q, dO and dQ of 128 rows, two stages of 96 columns; barriers; a table of
    # masks, 16 bytes for each place between keys along an axis.
    assert record["registers"] == 168 and record["spill_bytes"] == 0
    assert record["shared_memory"] == 3 * 128 * 256 + 2 * 2 * 96 * 256 + 512 + 16 * (3 + 7 + 9)
    assert record["code"]["mufu_under_product"] == record["code"]["mufu"] == 2 * 48


def boundary() -> Iterator[KernelConfig]:
    """The largest KV tile beside Q tiles of one, two and three warpgroups, of all ranks."""
    dims = [(dim, 0) for dim in range(8, 257, 8)] + [(q, v) for q in (8, 64, 128, 256) for v in (8, 64, 256) if q != v]
    sizes = range(FAMILY.limits.kv_columns, 0, -FAMILY.limits.kv_multiple)
    for (rank, q_boxes), dtype, (head_dim, value_head_dim) in product(Q_BOXES.items(), FAMILY.dtypes, dims):
        for q_box in q_boxes:
            boxes = [(2,) * (rank - 1) + (columns >> (rank - 1),) for columns in sizes]
            configs = (
                KernelConfig(FAMILY.op, FAMILY.arch, rank, dtype, head_dim, q_box, box, value_head_dim) for box in boxes
            )
            yield from islice((config for config in configs if not FAMILY.faults(config)), 1)


def test_a_sample_of_the_boundary_compiles(libraries: dict[KernelConfig, Path], tmp_path: Path) -> None:
    configs = list(boundary())
    for config in configs[7 :: len(configs) // 12]:
        assert compile_kernel(config, tmp_path) > 0


@pytest.mark.survey
def test_the_boundary_compiles(libraries: dict[KernelConfig, Path], tmp_path: Path) -> None:
    for config in list(boundary())[::5]:
        assert compile_kernel(config, tmp_path) > 0


def test_default_tiles_fit_every_head_dim() -> None:
    for rank, head_dim, value_head_dim in product((1, 2, 3), range(8, 257, 8), (0, 8, 128, 256)):
        boxes = FAMILY.default_boxes(rank, head_dim, value_head_dim)
        assert not FAMILY.faults(KernelConfig(FAMILY.op, FAMILY.arch, rank, "bf16", head_dim, *boxes, value_head_dim))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("r1-bf16-d256-q128-kv64", "needs 262,656 bytes of shared memory, of which there are 232,448"),
        ("r1-bf16-d128-q128-kv112", "needs 204 accumulator registers a thread, of which there are 196"),
        ("r1-bf16-d200-q192-kv16", "needs 132 registers a thread for one product, of which there are 128 at launch"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_name(key: str, reason: str) -> None:
    ((field, said),) = FAMILY.faults(KernelConfig.parse(f"gna_backward_q-sm90-{key}"))
    assert field == "kv_tile" and reason in said
