"""`gnaforge verify`, and what is beneath it: kernels in processes of their own, in memory with guard zones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import oracle
import pytest
import torch
from gnaforge.build import kernels as building
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import find_libraries
from gnaforge.build_tools import includes
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.emulator import EmulationError
from gnaforge.cli.verify_text import print_results
from gnaforge.errors import BuildError
from gnaforge.families import family_of
from gnaforge.gna.counts import count_problem
from gnaforge.plan import plan
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import FEATURES, Problem
from gnaforge.runtime.reference import attention, error_bound
from gnaforge.spec import spec_of
from gnaforge.verification.counters import REPORTED, class_of, count_work
from gnaforge.verification.problems import (
    EMULATED_TILES,
    for_kernel,
    random_problem_for,
    shrink,
    tile_counts,
    with_settings,
)
from gnaforge.verification.process import HarnessError, Worker, WorkerError
from gnaforge.verification.runner import KernelResult, ProblemResult, Settings, Verifier
from gnaforge.verification.schedules import Schedule, schedules
from gnaforge.verification.targets import problems_of_shapes, targets_of_plan
from sm90_kernels import KEYS
from test_sm100 import KEYS as SM100_KEYS

SMALL = "gna_forward-sm90-r1-bf16-d32-q64-kv32"
RANK_3 = "gna_forward-sm90-r3-bf16-d64-q2x4x8-kv2x2x8"
OF_HEADS = "gna_forward-sm100-r2-bf16-d64-q8x8h2-kv8x8"
CPU = "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"
CPU_BACKWARD = [f"gna_backward_{side}-cpu-r2-fp32-dany-q8x8-kv8x8" for side in ("q", "kv")]
TOY = "gna_forward-cpu-r1-fp32-d8-q8-kv8"

try:
    find_nvcc()
    NO_NVCC = ""
except BuildError as error:
    NO_NVCC = str(error)
needs_nvcc = pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)


@pytest.fixture
def changed_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str, str], Path]:
    """The kernel of SMALL as an emulated library, after a change of one header: file, text, replacement."""

    def make(header: str, old: str, new: str) -> Path:
        headers = tmp_path / "include"
        shutil.copytree(include_dir(), headers)
        path = headers / "gnaforge" / "sm90" / "forward" / header
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
        monkeypatch.setattr(building, "include_dirs", lambda _: (headers,))
        includes.forget_headers()
        config = KernelConfig.parse(SMALL)
        return find_libraries([config], emulated=True)[config]

    yield make
    includes.forget_headers()


@needs_nvcc
@pytest.mark.parametrize("key", [SMALL, RANK_3])
def test_tiles_are_those_of_the_simulators_model(key: str) -> None:
    """Interior and visited tiles that the kernel marks, on random problems; and everything else that a run checks."""
    config = KernelConfig.parse(key)
    (target,) = targets_of_plan([config], {}).targets
    settings = Settings([Schedule("eager", "round-robin")], gaps=False, poison=False)
    tiles = interior = 0
    with Verifier(config, target.library, settings) as verifier:

        def draw(seed: int) -> Problem:  # without extra keys, which the oracle of tiles doesn't count
            return replace(shrink(random_problem_for(config, seed, 1200), config, 60), extra_tokens=())

        verifier.verify_random(draw, 8, 0)
        # Random windows are small: these two have interior tiles.
        for problem in (
            Problem(300, 200, 64),
            Problem((8, 12, 24), (6, 8, 16), (2, 4, 8), heads=2),
        ):
            if len(problem.tokens) == config.rank:
                verifier.verify(for_kernel(problem, config))
        for found in verifier.result.problems:
            assert not found.failed, found.message
            assert found.counters is not None and found.model is not None
            counted = {"visited": found.counters.tiles, "interior": found.counters.interior_tiles}
            _, visited, inside = oracle.count_tiles(found.problem, config.q_tile, config.kv_tile)
            times = found.problem.batch * found.problem.heads
            assert counted == found.model == {"visited": times * visited, "interior": times * inside}
            tiles += counted["visited"]
            interior += counted["interior"]
    assert tiles > interior > 20


@needs_nvcc
def test_verify_a_gpu_kernel(cli) -> None:
    arguments = ("verify", SMALL, "--tokens", "150", "--window", "70", "--heads", "4", "--kv-heads", "2")
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    ((kernel,),) = [json.loads(done.stdout)]
    assert kernel["key"] == SMALL and kernel["good"] and kernel["emulated"]
    (found,) = kernel["problems"]
    assert found["runs"] == 9 + 2 + 2 and found["identical"]  # schedules, two kinds of poison, in a list with another
    assert 0 < found["out"]["share"] < 1 and found["out"]["error"] < 0.02 and found["lse"]["error"] < 1e-5
    counters = found["counters"]
    tiles = counters["interior_tiles"] + counters["shell_tiles"]
    assert tiles == found["model"]["visited"]
    # Both products of a 64 x 32 tile of 32 channels; a score each, and a rescaling per row and tile by four threads.
    assert counters["mma_operations"] == tiles * 2 * 2 * 64 * 32 * 32
    assert tiles * 64 * 32 <= counters["exp2"] <= tiles * (64 * 32 + 4 * 64)
    assert sum(counters["classes"].values()) == sum(counters["opcodes"].values()) == counters["instructions"]
    row_bytes, q_tiles = 128, 4 * 3
    assert counters["async_load_bytes"] == row_bytes * (q_tiles * 64 + 2 * tiles * 32)
    again = cli("verify", kernel["library"], *arguments[2:], "--timing", "lazy", "--order", "random", "--trace")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "good, in the emulator" in again.stdout and "1 of 1 kernel is good; 6 runs" in again.stdout
    assert "launch of gnaforge_entry_" in again.stdout and "per interior tile" in again.stdout


@needs_nvcc
def test_a_swapped_phase_is_explained(cli, changed_kernel) -> None:
    """The producer takes a fresh stage for a full one. The message says who waits where, and for what."""
    library = changed_kernel("producer.h", "RingPosition at{0, 1};", "RingPosition at{0, 0};")
    arguments = ("verify", str(library), "--tokens", "200", "--window", "100")
    done = cli(*arguments, "--timing", "eager", "--order", "round-robin", "--trace", COLUMNS="2000")
    assert done.returncode == 1, done.stderr
    message = done.stdout
    assert "FAILED (emulator): 200, window 100" in message and "CTA 0,0,0: deadlock: no warp can go on" in message
    where = {
        name: f"(?:{'|'.join(str(number) for number, line in enumerate(lines, 1) if text in line)})"
        for name, header, text in (
            ("wait", "producer.h", "mbarrier_wait(shared + L::k_empty"),
            ("init", "kernel.h", "L::k_empty + 8 * stage, warps"),
        )
        for lines in [(include_dir() / "gnaforge/sm90/forward" / header).read_text().splitlines()]
    }
    producer = re.search(
        r"warp 0: ptx:\d+: mbarrier\.try_wait\.parity.*called at mbarrier\.h:\d+, "
        rf"producer\.h:{where['wait']},.*waits for the end of a phase of parity 0 at mbarrier (0x\w+) "
        r"\(phase 0, parity 0, 4 of 4 arrivals and 0 bytes pending\)",
        message,
    )
    assert producer, message
    assert re.search(r"warps 4 5 6 7: ptx:\d+: mbarrier\.try_wait\.parity.*consumer\.h:\d+", message)
    assert "warps that have exited: 1 2 3" in message
    assert re.search(
        rf"mbarrier {producer[1]} was initialised for 4 arrivals at ptx:\d+: .*kernel\.h:{where['init']},.*; "
        "no thread has arrived at it. Its phase 0 is under way: a wait for parity 1 passes",
        message,
    )
    warp_0 = message[message.index("warp 0, synchronisation:") : message.index("warp 1, synchronisation:")]
    assert "can't go on" in warp_0 and "warp 0, last instructions:" in warp_0
    assert f"again: gnaforge verify {library} --tokens 200 --window 100 --timing eager --order round-robin" in message


@needs_nvcc
def test_wrong_results_are_explained(changed_kernel) -> None:
    """Nothing for the emulator to find, but for the comparison."""
    library = changed_kernel("consumer.h", "0.693147181f + of_sum", "0.693147181f + 1.001f * of_sum")
    config = KernelConfig.parse(SMALL)
    with Verifier(config, library, Settings([Schedule("eager", "round-robin")])) as verifier:
        found = verifier.verify(Problem((40,), (9,), (1,), (1,), (False,), heads=2, head_dim=32, value_head_dim=32))
    assert found.failed == "wrong" and found.runs == 1
    assert "elements of lse are further from exact than rounding allows; worst: " in found.message
    assert " at batch entry 0, token " in found.message


@pytest.mark.parametrize("key", [CPU, *CPU_BACKWARD])
def test_verify_a_cpu_kernel(cli, key: str) -> None:
    arguments = ("--tokens", "9,9", "--window", "3", "--head-dim", "24", "--value-head-dim", "40", "--random", "2")
    done = cli("verify", key, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (kernel,) = json.loads(done.stdout)
    assert kernel["good"] and not kernel["wrong"] and not kernel["emulated"] and len(kernel["problems"]) == 3
    given = kernel["problems"][0]["problem"]
    assert (given["head_dim"], given["value_head_dim"]) == (24, 40)
    results = [role.name for role in OPS[key.partition("-")[0]].outputs]
    assert all(0 < found[name]["share"] < 1 for found in kernel["problems"] for name in results)
    # Layouts, and threads; of kernels that run lists also with another one, and there is a kind of poison; gradients
    # are also added to what is there.
    assert kernel["problems"][0]["runs"] == 6 + 1 + (3 if key == CPU else 1)


@needs_nvcc
def test_a_kernel_that_is_wrong_from_a_ctas_second_tile_on(changed_kernel) -> None:
    """The first of two Q tiles in a row leaves the parity for the second: a default problem must come to one."""
    library = changed_kernel("consumer.h", "L::q_full, i % 2)", "L::q_full, 0)")
    config = KernelConfig.parse(SMALL)
    with Verifier(config, library, Settings([Schedule("eager", "round-robin")])) as verifier:
        found = verifier.verify(shrink(random_problem_for(config, 0), config))
    assert found.failed == "emulator" and "deadlock" in found.message, found.message


@pytest.mark.parametrize("key", [SMALL, RANK_3, *KEYS, *SM100_KEYS, CPU, *CPU_BACKWARD])
def test_random_problems_have_tiles_of_all_kinds(key: str) -> None:
    """By the model: among any three in a row, interior tiles and masked ones, as they are emulated."""
    config = KernelConfig.parse(key)
    for first in range(3):
        problems = [
            shrink(random_problem_for(config, seed), config, EMULATED_TILES) for seed in range(first, first + 3)
        ]
        counts = [tile_counts(problem, config) for problem in problems]
        padded = family_of(config).padding.padded_columns(config.kv_columns) > config.kv_columns  # masked in every tile
        assert padded != any(count.interior for count in counts)
        assert any(count.visited > count.interior for count in counts)
        kv_held = family_of(config).holds_keys
        tiles = [
            p.batch * (p.kv_heads if kv_held else p.heads) * count.q_tiles
            for p, count in zip(problems, counts, strict=True)
        ]
        assert max(tiles) > 6  # two CTAs on each of three processors


def toy_problem(**changes: object) -> Problem:
    return replace(Problem(20, 5, head_dim=8, dtype="fp32"), **changes)


SETTINGS = """
const char* names[] = {"GNAFORGE_EMULATOR_DEVICE", "GNAFORGE_EMULATOR_MEMORY", "GNAFORGE_EMULATOR_UNCHECKED"};
for (const char* name : names)
  if (const char* text = std::getenv(name))
    std::snprintf(err + std::strlen(err), n, "%s ", text);
return 1
""".replace("\n", " ")
WRONG = (
    ("", "wrong", "elements of out are further from exact than rounding allows; worst: 1 at batch entry 0, token "),
    (SETTINGS, "launch", "b200 "),
    (
        "return 0",
        "unwritten",
        "160 elements of out were never written; first: batch entry 0, token 0, head 0, channel 0",
    ),
    ("data(args, GNAFORGE_OUT)[-1] = 0", "guard", "1 element outside of out was written"),
    ("data(args, GNAFORGE_Q)[3] = 0", "guard", "the kernel wrote into query, or around it"),
    ('std::snprintf(err, n, "no luck"); return 1', "launch", "no luck"),
)


def test_what_can_be_wrong_on_the_cpu(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process after another kernel. Settings left from something else may not switch checks off."""
    for setting, value in {"DEVICE": "b200", "MEMORY": "mapped", "UNCHECKED": "gna_"}.items():
        monkeypatch.setenv(f"GNAFORGE_EMULATOR_{setting}", value)
    run = {"layout": "contiguous", "schedule": None}
    asked = {"do": "verify", "problem": toy_problem().as_json(), "seed": 0, **run}
    inputs, outputs = str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")
    torch.save([{name: torch.randn(1, 20, 1, 8) for name in "qkv"}], inputs)
    call = {"do": "call", "problems": [asked["problem"]], "together": False, "inputs": inputs, "outputs": outputs}
    called = {**run, **call}
    with Worker() as worker:
        assert worker.request(60, do="ready").keys() == {"seconds"}
        for number, (statement, failed, expected) in enumerate(WRONG):
            library = toy(f"verify_{number}", TOY_KEY=f'"{TOY}"', TOY_STATEMENT=statement)
            assert worker.request(60, do="open", library=str(library), key=TOY)["device"] == "cpu"
            said = worker.request(60, **asked)
            assert said["failed"] == failed and expected in said["message"], said
            assert "mapped" not in said["message"] and "gna_" not in said["message"]
            if failed not in ("", "wrong"):  # the call of the pytest fixture, which compares nothing, sees the same
                said = worker.request(60, **called)
                assert said["failed"] == failed and expected in said["message"], said
        hangs = toy("verify_hangs", TOY_KEY=f'"{TOY}"', TOY_STATEMENT="for (volatile int i = 0;;) i = 0")
        worker.request(60, do="open", library=str(hangs), key=TOY)
        with pytest.raises(WorkerError, match=r"no result within 0\.5 s: the kernel or its host code hangs"):
            worker.request(0.5, **asked)
        with pytest.raises(WorkerError, match="ended by SIGKILL"):
            worker.request(60, **asked)


def test_a_crash_is_a_result(cli, toy) -> None:
    statement = 'std::fprintf(stderr, "last words\\n"); std::abort()'
    library = toy("verify_crashes", TOY_KEY=f'"{TOY}"', TOY_STATEMENT=statement)
    done = cli("verify", str(library), "--tokens", "20", "--window", "5", "--head-dim", "8")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "FAILED (crash): 20, window 5" in done.stdout and "was ended by SIGABRT" in done.stdout
    assert "last words" in done.stdout


# With a window of one token, the output is V, and the log-sum-exp the score.
RIGHT = """
const float *q = data(args, GNAFORGE_Q), *k = data(args, GNAFORGE_K);
for (int64_t i = 0; i < args->problem->tokens[0]; ++i) {
  float score = 0;
  for (int c = 0; c < 8; ++c) score += q[8 * i + c] * k[8 * i + c];
  data(args, GNAFORGE_LSE)[i] = score * static_cast<float>(args->problem->scale);
}
std::memcpy(data(args, GNAFORGE_OUT), data(args, GNAFORGE_V), 32 * args->problem->tokens[0]);
return 0
""".replace("\n", " ")
LAUNCH = dict.fromkeys(REPORTED, 0) | {"opcodes": {}, "kernel": "toy", "grid": [1, 1, 1]}


def emulated_toy(toy, name: str, **launch: object) -> Path:
    """A kernel that is right, linked to an emulator that reports this launch."""
    report = json.dumps(json.dumps({"messages": [], "launches": [launch]}))
    return toy(name, TOY_KEY=f'"{TOY}"', TOY_FLAGS="GNAFORGE_LIBRARY_EMULATED", TOY_STATEMENT=RIGHT, TOY_REPORT=report)


def test_other_tiles_than_the_models_are_said_of_their_schedule(toy) -> None:
    library = emulated_toy(toy, "verify_tiles", **LAUNCH | {"shell_tiles": 7})
    settings = Settings([Schedule("eager", "round-robin"), Schedule("lazy", "round-robin")], gaps=False)
    with Verifier(KernelConfig.parse(TOY), library, settings) as verifier:
        found = verifier.verify(toy_problem(window=(1,)))
    assert found.failed == "tiles" and "went through {'visited': 7, 'interior': 0}, the" in found.message
    assert found.runs == 1 and found.schedule == settings.schedules[0] and verifier.result.wrong


def test_an_older_emulator_is_named(toy) -> None:
    """One that counts less, and one without the functions that drive it."""
    known = {name: value for name, value in LAUNCH.items() if name != "mma_operations"}
    schedule = Schedule("eager", "round-robin").as_json(False)
    asked = {"do": "verify", "seed": 0, "layout": "contiguous", "schedule": schedule}
    expected = ("library", "the library is linked to an older emulator; build it again")

    def why(said: dict[str, object]) -> object:
        return said["failed"], said["message"]

    with Worker() as worker:
        assert worker.open(60, emulated_toy(toy, "verify_counts", **LAUNCH), TOY)["device"] == "emulator"
        said = worker.request(60, problem=toy_problem(window=(1,)).as_json(), **asked)
        assert said["launches"] == [LAUNCH]
        worker.open(60, emulated_toy(toy, "verify_counts_less", **known), TOY)
        assert why(worker.request(60, problem=toy_problem(window=(1,)).as_json(), **asked)) == expected
        library = toy("verify_undriven", TOY_KEY=f'"{TOY}"', TOY_FLAGS="GNAFORGE_LIBRARY_EMULATED")
        assert why(worker.open(60, library, TOY)) == expected


def test_errors_of_the_harness_are_told_apart(toy, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute or a value that the harness gets wrong says nothing of a kernel, and nobody may take it for that."""
    library = toy("verify_harness", TOY_KEY=f'"{TOY}"')
    with Worker() as worker:
        for request in ({"do": "nothing"}, {"do": "_jobs"}, {"do": "verify"}):  # no such job; no kernel is open
            with pytest.raises(HarnessError, match=r"of which nothing follows for a kernel:\n.*Traceback"):
                worker.request(60, **request)
        assert worker.open(60, library, TOY)["device"] == "cpu"
        with pytest.raises(HarnessError, match="KeyError: 'problem'"):
            worker.request(60, do="verify")
    monkeypatch.setattr(Problem, "as_json", lambda problem: {})
    with Verifier(KernelConfig.parse(TOY), library, Settings([])) as verifier, pytest.raises(HarnessError):
        verifier.verify(toy_problem())


def test_a_broken_harness_has_an_exit_status_of_its_own(toy, python) -> None:
    """The command line says so, too."""
    library = toy("verify_harness", TOY_KEY=f'"{TOY}"')
    done = python(
        "from gnaforge.runtime.problem import Problem\n"
        "Problem.as_json = lambda problem: {}\n"
        "import sys\n"
        f"sys.argv[1:] = ['verify', {str(library)!r}, '--tokens', '20', '--window', '5', '--head-dim', '8']\n"
        "from gnaforge.cli import main\n"
        "main()\n"
    )
    assert done.returncode == 70 and "gnaforge's own checks broke" in done.stderr and "tokens" in done.stderr


def test_slow_exact_attention_is_no_fault_of_the_kernel(cli) -> None:
    """Neither is it one that its process takes longer to start than a run may take."""
    done = cli("verify", CPU, "--tokens", "200,200", "--window", "90", "--timeout", "1")
    assert done.returncode == 2 and f"{CPU}: NOT VERIFIED, on this CPU" in done.stdout, done.stdout + done.stderr
    assert "Emulated" not in done.stdout
    assert "FAILED (reference)" in done.stdout and "hangs" not in done.stdout
    said = "exact attention of this problem takes longer than --timeout 1; use --max-tiles or fewer tokens"
    assert said in done.stdout


def test_the_command_that_runs_it_again_has_both_head_dims(capsys: pytest.CaptureFixture[str]) -> None:
    """Of kernels that take any: random problems draw them too."""
    for dims, options in (
        ((24, 40), " --head-dim 24 --value-head-dim 40 --dtype fp32 --trace"),
        ((24, 24), " --head-dim 24 --dtype fp32 --trace"),
    ):
        problem = Problem((9, 9), 3, head_dim=dims[0], value_head_dim=dims[1], dtype="fp32")
        failed = ProblemResult(problem, failed="wrong", message="some")
        print_results([KernelResult(KernelConfig.parse(CPU), None, problems=[failed])], {}, CPU, False)
        assert f"again: gnaforge verify {CPU} --tokens 9,9 --window 3,3{options}\n" in capsys.readouterr().out


def test_without_a_compiler_nothing_is_said_of_the_kernel(cli) -> None:
    """Exit status 1 is for kernels that are wrong."""
    done = cli("verify", SMALL, GNAFORGE_TOOLCHAIN="system", CUDA_HOME="", CUDA_PATH="", PATH="/nonexistent")
    assert done.returncode == 2 and "error: no C" in done.stderr and "Traceback" not in done.stderr


def test_what_a_kernel_refuses_is_no_error_of_random_problems(toy) -> None:
    library = toy("verify_refuses", TOY_KEY=f'"{TOY}"')
    with Verifier(KernelConfig.parse(TOY), library, Settings([])) as verifier:
        found = verifier.verify(toy_problem(head_dim=16, value_head_dim=16))
        assert found.failed == "refused" and "got head_dim 16" in found.message
        verifier.verify_random(lambda _: toy_problem(head_dim=16, value_head_dim=16), 1, 0)
        assert verifier.result.problems == [] and "refused 20 random problems in a row" in verifier.result.note
        assert not verifier.result.good and not verifier.result.wrong


@needs_nvcc
def test_a_library_for_a_gpu_can_only_be_verified_by_key(cli, tmp_path: Path) -> None:
    assert cli("build", SMALL).returncode == 0
    name = SMALL.replace("-", "_")
    done = cli("verify", f"generated/{name}/lib/{name}.so")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "linked for a real GPU: machine code without PTX" in said and f"gnaforge verify {SMALL}" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([CPU, "--tokens", "8,8"], "--tokens and --window go together"),
        ([CPU, "--tokens", "8", "--window", "3"], "of the 1 kernel of"),
        ([CPU, "--tokens", "8,8", "--window", "9"], "--window: 9 is more than the 8 tokens of dimension 0; at most 8"),
        ([CPU, "--tokens", "8,8", "--window", "3,3,3"], "--window: (3, 3, 3) has 3 entries for 2 dimensions"),
        ([CPU, "--tokens", "8,8", "--window", "3", "--causal", "2"], "--causal: '2' is not 0, 1"),
        (
            [CPU, "--tokens", "8,8", "--window", "3", "--heads", "3", "--kv-heads", "2"],
            "--kv-heads: 2 does not",
        ),
        ([CPU, "--stride", "3", "--heads", "2"], "--stride, --heads: has no effect without --tokens"),
        ([CPU, "--timing", "slow"], "--timing slow: unknown; there are eager, lazy, random"),
        ([CPU, "--order", "lazy"], "--order lazy: unknown"),
        ([CPU, "--dtype", "fp16"], "of the 1 kernel of"),
        ([CPU, "--preset", "hunyuan-video"], f"--preset hunyuan-video has no shape of rank 2, which {CPU} is for"),
        ([CPU, "--value-head-dim", "12", "--tokens", "8,8", "--window", "3"], "value_head_dim: 12 must be a multiple"),
        ([SMALL, "--value-head-dim", "40"], "of the 1 kernel of"),
        (
            [OF_HEADS, "--tokens", "8,8", "--window", "3", "--heads", "4"],
            "--kv-heads: no query heads share keys; tiles",
        ),
        ([OF_HEADS, "--preset", "flux-4k"], "has no shape of whose query heads 2 or a multiple of it share keys"),
        ([CPU, "--random", "0"], "Invalid value for '--random'"),
        (["nothing.so"], "nothing.so: No such file"),
        (["text.so"], "text.so is no shared library"),
        (["nonsense"], "no preset 'nonsense'"),
        ([SMALL + "-lean"], "'lean' is not a variant of sm90; it has '', 'cutlass'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(cli, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "text.so").write_text("no library, but long enough to look at its header without running out of it")
    done = cli("verify", *arguments)
    assert done.returncode == 2, done.stdout
    assert expected in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_shapes_are_tried_on_kernels_that_can_have_their_heads() -> None:
    """A spec's, of which one has no heads that share keys: kernels with tiles of several are not asked for it."""
    tiles = [{"q": [8, 8], "q_heads": heads, "kv": [8, 8]} for heads in (1, 2)]
    shape = {"tokens": [16, 16], "window": [3, 3], "heads": 8}
    entry = {"rank": 2, "head_dim": 64, "dtype": "bf16", "tiles": tiles, "shapes": [shape, {**shape, "kv_heads": 2}]}
    found = plan(spec_of({"spec_version": 1, "library": "x", "arch": "sm100", "kernels": [entry]}))
    counts = {config.q_tile_heads: problems_of_shapes(found.shapes[config], config) for config in found.configs}
    assert [len(counts[1]), [problem.kv_heads for problem in counts[2]]] == [2, [2]]


def test_cut_down_problems_stay_of_their_kind() -> None:
    config = KernelConfig.parse("gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8")
    whole = Problem((30, 48, 80), (18, 24, 24), (16, 8, 8), (1, 2, 1), batch=2, heads=24, kv_heads=8)
    for problem, tiles, heads, kv_heads in (
        (whole, 600, 4, 2),
        (whole, 300, 2, 1),  # a K/V head goes before the interior tiles do
        (replace(whole, kv_heads=24), 300, 2, 2),
        (whole, 100, 4, 2),
    ):
        small = shrink(problem, config, tiles)
        counts = tile_counts(small, config)
        assert small.batch * small.heads * counts.visited <= tiles and bool(counts.interior) == (tiles >= 300)
        assert (small.batch, small.heads, small.kv_heads, small.dilation) == (1, heads, kv_heads, (1, 2, 1))
        assert all(1 < stride <= window for window, stride in zip(small.window, small.stride, strict=True))
        assert shrink(small, config, tiles) == small
    rng = Random(0)
    for _ in range(200):
        problem = oracle.random_problem(rng, rank=3, max_tokens=4000)
        for length, window, stride, dilation, _ in shrink(problem, config, 5).axes:
            assert 1 <= stride <= window and window * dilation <= length
        assert Problem.from_json(json.loads(json.dumps(problem.as_json()))) == problem


def test_cut_down_problems_keep_their_settings() -> None:
    rng = Random(1)
    cut = 0
    for seed in range(200):
        config = KernelConfig.parse(f"gna_forward-{('sm90', 'cpu')[seed % 2]}-r2-bf16-d128-q8x16-kv8x16")
        whole = with_settings(oracle.random_problem(rng, rank=2), rng, 3000, FEATURES)
        whole = replace(whole, extra_tokens=(rng.randint(1, 300),) if seed % 3 else (), heads=8, kv_heads=4)
        small = shrink(whole, config, 40)
        assert small.edge == whole.edge and small.causal == whole.causal
        assert [n > 0 for n in small.sink] == [n > 0 for n in whole.sink]
        assert len(small.extra_tokens) == len(whole.extra_tokens)
        assert {*small.features()} == {*whole.features()}, (whole, small)
        assert count_problem(small, config.q_tile, config.kv_tile).visited * small.heads <= 40 or small.heads <= 2
        cut += small.tokens != whole.tokens
    assert cut > 50


def test_schedules() -> None:
    assert len(schedules()) == 9
    many = schedules(seeds=3, first_seed=5)
    assert len(set(many)) == len(many) == 2 + 7 * 3
    assert {s.seed for s in many if s.order == "random"} == {5, 6, 7}


def test_classes_of_instructions() -> None:
    wanted = {
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16": "matrix",
        "ex2.approx.ftz.f32": "exp2",
        "mbarrier.try_wait.parity.shared::cta.b64": "synchronisation",
        "cp.async.bulk.tensor.4d.shared::cluster.global": "asynchronous copy",
        "fma.rn.ftz.f32": "float",
        "setp.lt.s32": "integer and logic",
        "setp.neu.f32": "float",
        "cvt.rn.bf16x2.f32": "conversion",
    }
    assert {opcode: class_of(opcode) for opcode in wanted} == wanted
    assert count_work([]).rates() == {}


@pytest.mark.parametrize("causal", [False, True])
def test_fixture(emulated_kernel, causal: bool) -> None:
    """What authors of kernels write: one test, run under every schedule."""
    kernel = emulated_kernel(SMALL)
    q, k, v = (torch.randn(1, 90, 2, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    got = kernel(q, k, v, 33, stride=4, is_causal=causal, layout="gapped")
    problem = Problem.of_tensors(q, k, v, 33, 4, 1, causal)
    exact = attention(problem, q, k, v)
    limits = error_bound(problem, q, k, v, exact, rounds_probabilities=True)
    for found, wanted, limit in zip(got, exact, limits, strict=True):
        assert ((found.double() - wanted).abs() <= limit).all()
    assert kernel.counters is not None and kernel.counters.tiles > 0
    with pytest.raises(ValueError, match="refuses: head_dim is 16"):
        kernel(q[..., :16], k[..., :16], v[..., :16], 33)


@needs_nvcc
@pytest.mark.emulator(timing=["eager"], order=["round-robin"])
def test_fixture_with_a_broken_kernel(emulated_kernel, changed_kernel, emulator_schedule: Schedule) -> None:
    assert emulator_schedule == Schedule("eager", "round-robin")
    kernel = emulated_kernel(changed_kernel("producer.h", "RingPosition at{0, 1};", "RingPosition at{0, 0};"))
    x = torch.zeros(1, 64, 1, 32).bfloat16()
    with pytest.raises(EmulationError, match=r"timing eager, order round-robin, seed 0: .*deadlock"):
        kernel(x, x, x, 5)
