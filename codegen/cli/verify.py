"""`gnaforge verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..build_tools.text import count_of
from .options import LONGEST_WAIT, ArchOption, JsonOption, plan_of, refuse_unused
from .problem_options import PATTERN, ProblemOptions, takes_problem
from .tables import say

if TYPE_CHECKING:
    from ..runtime.config import KernelConfig
    from ..runtime.problem import Problem
    from ..verification.runner import KernelResult, Settings
    from ..verification.targets import Target, Targets

_RANDOM_BY_DEFAULT = 3
_MOST = 1_000_000  # of random problems or runs: more take years
_LARGEST_SEED = 2**62  # generators of torch and of the emulator take 64 bits; runs count on from it
_UNTRIED = 2  # exit status: no kernel is wrong, but not all could be tried


@takes_problem(
    head_dim={"help": "Only kernels that take this head dim.", "show_default": "each kernel's, or 64"},
    value_head_dim={"help": "Only kernels that take this head dim of V."},
    dtype={"help": "Only kernels of this dtype.", "show_default": "all"},
    out_dtype={"help": "Only kernels whose output has this dtype.", "show_default": "all"},
)
def verify(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="KEY|SPEC|LIB",
            help="The key of a kernel, a spec file or preset, or a library (.so) of cpu or emulated kernels.",
            show_default=False,
        ),
    ],
    options: ProblemOptions,
    arch: ArchOption = None,
    random: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=_MOST,
            help="Random problems per kernel: small, of all patterns, full of edge cases.",
            show_default=f"{_RANDOM_BY_DEFAULT} where there is no other problem",
        ),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Cut problems down until they visit at most N pairs of tiles.",
            show_default="300; problems given by --tokens as they are",
        ),
    ] = None,
    timing: Annotated[
        str, typer.Option(help="When asynchronous work completes: eager, lazy, random, or some with commas.")
    ] = "eager,lazy,random",
    order: Annotated[
        str, typer.Option(help="Which warp runs: round-robin, depth-first, random, or some with commas.")
    ] = "round-robin,depth-first,random",
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, max=_MOST, help="Runs of every schedule that is random.")
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=_LARGEST_SEED, help="Seed of the first random schedule, and of the first random problem."
        ),
    ] = 0,
    data_seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Seed of the values in the tensors.")] = 0,
    gaps: Annotated[
        bool,
        typer.Option(
            "--gaps/--no-gaps",
            help="Also lay tensors in other ways: with gaps full of NaN, heads first, packed, sliced.",
        ),
    ] = True,
    poison: Annotated[
        bool,
        typer.Option(
            "--poison/--no-poison", help="Also put NaN into other batch entries and heads, and where the mask hides it."
        ),
    ] = True,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Show each launch, and with errors the last events of each warp. Slower."),
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, max=LONGEST_WAIT, help="Time that one run may take.")
    ] = 600.0,
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            help="Compilations and kernels that run at once.",
            show_default="as many as processors and memory allow",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check kernels without a GPU, in the emulator.

    Their results are compared with exact attention in float64. GPU kernels are compiled for the emulator (once, into
    the cache) and run under every timing of asynchronous work with every order of warps. Reported are wrong numbers,
    broken rules of PTX (races, missing fences, wrong phases), deadlocks with who waits for what, accesses out of
    bounds, elements that were not written. Kernels for the cpu run as they are, and so do those of a library for a GPU
    that is here. Nothing is said about speed on hardware.

    Exit status: 0 if all kernels are good; 1 if one is wrong; 2 if none is, but not all could be tried: bad input, no
    compiler, a kernel that doesn't compile or refuses a problem.

    Problems: --tokens and --window; or the shapes of the spec (or of --preset), cut down to what can be emulated; and
    --random N.

    Examples:
        gnaforge verify hunyuan-video --arch sm90
        gnaforge verify gna_forward-sm90-r2-bf16-d64-q8x16-kv8x16 --random 20 --seeds 5
        gnaforge verify KEY --tokens 30,40 --window 12,16 --timing lazy --seed 7 --trace  # Repeat one run, and look.
    """
    from ..errors import GnaforgeError, InputError
    from ..families import require_config
    from ..runtime.config import ANY_HEAD_DIM
    from ..runtime.request import heads_misfit, mismatch
    from ..verification.targets import FREE_HEAD_DIM, problems_of_shapes

    if options.preset is not None and options.tokens is not None:
        raise InputError("give either --preset or --tokens, not both")
    if (options.tokens is None) != (options.window is None):
        raise InputError("--tokens and --window go together; see gnaforge verify --help")
    if options.tokens is None:
        refuse_unused(context, (*PATTERN[2:], "batch", "heads", "kv_heads"), "without --tokens and --window")
    head_dim = options.head_dim or FREE_HEAD_DIM
    head_dims = (head_dim, options.value_head_dim or head_dim)
    _check_types(dtype=options.dtype, out_dtype=options.out_dtype)
    of_kernels = replace(options, dtype=None, out_dtype=None)
    problem = of_kernels.problem(head_dim=head_dim) if options.tokens is not None else None
    settings = _settings(timing, order, seeds, seed, data_seed, gaps, poison, trace, timeout)

    shapes = _shapes_of(options.preset) if options.preset is not None else None

    misfits: list[str] = []
    passed: list[KernelConfig] = []

    def is_wanted(config: KernelConfig) -> bool:
        wanted = {name: getattr(options, name) for name in ("head_dim", "value_head_dim", "dtype")}
        rank = None if problem is None else problem.rank
        if mismatch(config, rank=rank, output_dtype=options.out_dtype, **wanted):
            return False
        if problem is not None and (misfit := heads_misfit(problem, config)):
            if not passed:
                misfits.append(misfit)
            return False
        passed.append(config)
        misfits.clear()  # what is wrong from here on is something else
        if config.head_dim == ANY_HEAD_DIM:
            require_config(replace(config, head_dim=head_dims[0], value_head_dim=head_dims[1]))
        if shapes is not None and not any(len(shape.tokens) == config.rank for shape in shapes):
            raise InputError(f"--preset {options.preset} has no shape of rank {config.rank}, which {config.key} is for")
        if shapes is not None and not problems_of_shapes(shapes, config, head_dims):
            several = f"{config.q_tile_heads} or a multiple of it share keys, as tiles of {config.key} need"
            raise InputError(f"--preset {options.preset} has no shape of whose query heads {several}")
        return True

    try:
        targets = _targets(target, arch, is_wanted, head_dims, jobs)
    except GnaforgeError as error:
        if misfits and isinstance(error, InputError):
            raise InputError(f"--kv-heads: {misfits[0]}") from None
        error.exit_code = _UNTRIED
        raise
    work = [_work(one, problem, shapes, random, max_tiles, head_dims) for one in targets.targets]
    results = _run(work, settings, seed, jobs)
    _report(results, targets, target, trace, json)
    if any(result.wrong for result in results):
        raise typer.Exit(1)
    if targets.skipped or not all(result.good for result in results):
        raise typer.Exit(_UNTRIED)


def _check_types(**given: str | None) -> None:
    """Refuses what is no element type of inputs, or of outputs, by the field that says it."""
    from ..errors import InputError
    from ..runtime.dtypes import DTYPES
    from ..runtime.problem import option_of

    outputs = dict.fromkeys(name for dtype in DTYPES.values() for name in dtype.outputs or (dtype.name,))
    for field, value in given.items():
        known = outputs if field == "out_dtype" else DTYPES
        if value is not None and value not in known:
            raise InputError(f"{option_of(field)}: {value!r} is not one of {', '.join(known)}")


def _settings(
    timing: str,
    order: str,
    seeds: int,
    seed: int,
    data_seed: int,
    gaps: bool,
    poison: bool,
    trace: bool,
    timeout: float,
) -> Settings:
    from ..build_tools.emulator.module import ORDERS, TIMINGS
    from ..errors import InputError
    from ..verification.runner import Settings
    from ..verification.schedules import schedules

    def some(option: str, text: str, known: Sequence[str]) -> list[str]:
        chosen = text.split(",")
        for value in chosen:
            if value not in known:
                raise InputError(f"{option} {value}: unknown; there are {', '.join(known)}")
        return list(dict.fromkeys(chosen))

    found = schedules(some("--timing", timing, TIMINGS), some("--order", order, ORDERS), seeds, seed)
    return Settings(found, data_seed, gaps, poison, trace, timeout)


def _targets(
    target: str,
    arch: list[str] | None,
    wanted: Callable[[KernelConfig], bool],
    head_dims: tuple[int, int],
    jobs: int | None,
) -> Targets:
    from ..build.kernels import Listener
    from ..errors import InputError
    from ..plan import require_few
    from ..verification.targets import Targets, targets_of_library, targets_of_plan
    from .building import Progress

    if target.endswith(".so"):
        found = targets_of_library(Path(target))
        chosen = tuple(t for t in found.targets if wanted(t.config) and (not arch or t.config.arch in arch))
        kernels: Sequence[object] = found.targets
    else:
        plan = plan_of(target, arch)
        require_few(target, chain.from_iterable(plan.shapes.values()), "shape", "verified")
        kernels = plan.configs
        configs = [config for config in plan.configs if wanted(config)]
        found, chosen = Targets(()), ()
        if configs:
            with Progress() as progress:
                listener = Listener(progress.update, progress.note)
                found = targets_of_plan(configs, plan.shapes, head_dims=head_dims, jobs=jobs, listener=listener)
                chosen = found.targets
    if not chosen:
        raise InputError(
            f"of the {count_of(len(kernels), 'kernel')} of {target} none is for that rank, head dim, dtypes and arch"
        )
    return Targets(chosen, found.skipped)


def _shapes_of(preset: str) -> list[Any]:
    from ..errors import InputError
    from ..plan import require_few
    from ..spec import load_spec

    shapes = [shape for entry in load_spec(preset).kernels for shape in entry.problems]
    if not shapes:
        raise InputError(f"{preset} lists no shapes")
    require_few(preset, shapes, "shape", "verified")
    return shapes


class _Work:
    """Problems and layouts to try one kernel on."""

    def __init__(self, target: Target, problems: list[tuple[Problem, Problem | None]], random: int, tiles: int) -> None:
        self.target, self.problems, self.random, self.tiles = target, problems, random, tiles


def _work(
    target: Target,
    problem: Problem | None,
    shapes: list[Any] | None,
    random: int | None,
    max_tiles: int | None,
    head_dims: tuple[int, int],
) -> _Work:
    from ..families import family_of
    from ..verification.problems import EMULATED_TILES, for_kernel, shrink
    from ..verification.targets import problems_of_shapes

    config = target.config
    most = max_tiles or (EMULATED_TILES if family_of(config).target.is_gpu else 100 * EMULATED_TILES)
    whole: Sequence[Problem] = target.problems if random is None or shapes else ()
    if shapes is not None:
        whole = problems_of_shapes(shapes, config, head_dims)
    if problem is not None:
        whole = [for_kernel(problem, config)]
    pairs: list[tuple[Problem, Problem | None]] = []
    for one in dict.fromkeys(whole):
        small = one if problem is not None and max_tiles is None else shrink(one, config, most)
        pairs.append((small, None if small == one else one))
    return _Work(target, pairs, random or (0 if pairs else _RANDOM_BY_DEFAULT), most)


def _run(work: Sequence[_Work], settings: Settings, seed: int, jobs: int | None) -> list[KernelResult]:
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..build_tools.toolchain import job_limit
    from ..verification.problems import random_problem_for, shrink
    from ..verification.runner import Verifier

    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        per_problem = len(settings.schedules) + settings.poison
        total = sum((len(one.problems) + one.random) * per_problem for one in work)
        task = bar.add_task("verifying", total=total)

        def verify_one(one: _Work) -> KernelResult:
            config = one.target.config
            with Verifier(config, one.target.library, settings, lambda: bar.advance(task)) as verifier:
                for problem, whole in one.problems:
                    found = verifier.verify(problem, whole)
                    if found.failed == "refused":
                        verifier.result.problems.append(found)
                verifier.verify_random(
                    lambda at: shrink(random_problem_for(config, at), config, one.tiles), one.random, seed
                )
                return verifier.result

        with ThreadPoolExecutor(jobs or job_limit(1.0)) as pool:
            return list(pool.map(verify_one, work))


def _report(results: Sequence[KernelResult], targets: Targets, target: str, trace: bool, json: bool) -> None:
    if json:
        from json import dumps

        rows = [result.as_json() for result in results]
        rows += [
            {"key": key, "good": False, "wrong": False, "note": why, "problems": []}
            for key, why in targets.skipped.items()
        ]
        say(dumps(rows, indent=1))
        return
    from .verify_text import print_results

    print_results(results, targets.skipped, target, trace)
