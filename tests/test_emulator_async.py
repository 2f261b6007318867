"""mbarriers, bulk and tensor copies of the emulator against NumPy slicing, and every misuse that it reports."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, copy_from_shared, copy_to_shared, dynamic_shared, module_of, run
from gnaforge.build_tools.emulator import EmulationError, Options, TensorMap

every_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
BARRIERS = ".shared .align 8 .b8 barriers[64];\n"
ELECTED = "setp.ne.u32 %q30, %tid, 0;"  # %q30: not thread 0


def wait(address: str, parity: str, label: str) -> str:
    """A wait loop as CUTLASS writes it."""
    return f"""
    {label}:
      mbarrier.try_wait.parity.shared::cta.b64 %q31, [{address}], {parity};
      @%q31 bra {label}_DONE;
      bra {label};
    {label}_DONE:
    """


INIT = (
    BARRIERS,
    """
      mov.u32 %r100, barriers;
      setp.ne.u32 %q30, %tid, 0;
      @%q30 bra READY;
      mbarrier.init.shared::cta.b64 [%r100], 1;
      fence.mbarrier_init.release.cluster;
    READY:
      bar.sync 0;
    """,
)


# --- mbarrier


@every_schedule
def test_phases_pass_data_back_and_forth(options: Options) -> None:
    # One producer warp, two consumer warps, one slot, 20 rounds, full and empty barriers.
    body = f"""
      mov.u32 %r100, barriers;
      mov.u32 %r101, shared;
      setp.ne.u32 %q30, %tid, 0;
      @%q30 bra READY;
      mbarrier.init.shared::cta.b64 [%r100], 1;
      mbarrier.init.shared::cta.b64 [%r100+8], 64;
    READY:
      bar.sync 0;
      mov.u32 %r1, 0;
      mov.u32 %r0, 0;
      setp.lt.u32 %q1, %tid, 32;
      @%q1 bra PRODUCER;
    CONSUMER:
      and.b32 %r2, %r1, 1;
      {wait("%r100", "%r2", "FULL")}
      ld.shared.u32 %r3, [%r101];
      mad.lo.u32 %r0, %r0, 3, %r3;
      mbarrier.arrive.shared::cta.b64 _, [%r100+8];
      add.u32 %r1, %r1, 1;
      setp.lt.u32 %q2, %r1, 20;
      @%q2 bra CONSUMER;
      bra END;
    PRODUCER:
      setp.ne.u32 %q3, %tid, 0;
      @%q3 bra END;
    PRODUCE:
      and.b32 %r2, %r1, 1;
      xor.b32 %r2, %r2, 1;
      {wait("%r100+8", "%r2", "EMPTY")}
      mul.lo.u32 %r3, %r1, %r1;
      st.shared.u32 [%r101], %r3;
      mbarrier.arrive.release.cta.shared::cta.b64 %d1, [%r100];
      add.u32 %r1, %r1, 1;
      setp.lt.u32 %q2, %r1, 20;
      @%q2 bra PRODUCE;
    END:
      mul.wide.u32 %d9, %tid, 4; add.s64 %d9, %d9, %p0; st.global.u32 [%d9], %r0;
    """
    out = np.zeros(96, np.uint32)
    run(body, [out], threads=96, shared_bytes=16, declarations=BARRIERS + dynamic_shared(), options=options)
    wanted = 0
    for i in range(20):
        wanted = wanted * 3 + i * i
    assert (out[32:] == wanted % 2**32).all()


def test_state_tokens_counts_and_pending() -> None:
    body = """
      mov.u32 %r100, barriers;
      mbarrier.init.shared::cta.b64 [%r100], 5;
      mbarrier.arrive.noComplete.shared::cta.b64 %d1, [%r100], 2;
      mbarrier.pending_count.b64 %r1, %d1;
      mbarrier.arrive.shared::cta.b64 %d2, [%r100], 3;
      mbarrier.test_wait.shared::cta.b64 %q1, [%r100], %d1;
      mbarrier.arrive_drop.shared::cta.b64 %d3, [%r100], 4;
      mbarrier.test_wait.shared::cta.b64 %q2, [%r100], %d3;
      mbarrier.arrive.shared::cta.b64 %d4, [%r100];
      mbarrier.test_wait.shared::cta.b64 %q3, [%r100], %d3;
      mbarrier.arrive.shared::cta.b64 %d5, [%r100];
      mbarrier.test_wait.shared::cta.b64 %q4, [%r100], %d5;
      selp.u32 %r2, 1, 0, %q1; selp.u32 %r3, 1, 0, %q2; selp.u32 %r4, 1, 0, %q3; selp.u32 %r5, 1, 0, %q4;
      st.global.u32 [%p0], %r1; st.global.u32 [%p0+4], %r2; st.global.u32 [%p0+8], %r3;
      st.global.u32 [%p0+12], %r4; st.global.u32 [%p0+16], %r5;
    """
    out = np.zeros(5, np.uint32)
    run(body, [out], threads=1, declarations=BARRIERS)
    # Pending before the first arrival; the phase is over; not over after the drop; over; now one arrival is enough.
    np.testing.assert_array_equal(out, [5, 1, 0, 1, 1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%r100+8];", "no initialised mbarrier at 0x408"),
        ("mbarrier.init.shared::cta.b64 [%r100], 1;", "initialised twice"),
        ("mbarrier.init.shared::cta.b64 [%r100+12], 1;", "not aligned to 8"),
        ("mbarrier.init.shared::cta.b64 [%r100+8], 0;", "not in 1..2.20-1"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r100], 2;", "too many arrivals in one phase"),
        ("st.shared.u32 [%r100+4], %r100;", "overwrites the mbarrier at 0x400"),
        ("mbarrier.arrive.noComplete.shared::cta.b64 %d1, [%r100], 1;", "noComplete would complete"),
        ("mov.u32 %r1, 2; mbarrier.test_wait.parity.shared::cta.b64 %q1, [%r100], %r1;", "neither 0 nor 1"),
        (
            "mbarrier.inval.shared::cta.b64 [%r100]; mbarrier.arrive.shared::cta.b64 _, [%r100];",
            "no initialised mbarrier",
        ),
    ],
)
def test_mbarrier_misuse(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(INIT[1] + body, [np.zeros(4, np.uint32)], threads=1, declarations=INIT[0])


def test_expected_bytes_that_came_before_end_the_phase() -> None:
    body = """
      mbarrier.complete_tx.shared::cta.b64 [%r100], 16;
      mbarrier.arrive.shared::cta.b64 _, [%r100];
      mbarrier.test_wait.parity.shared::cta.b64 %q1, [%r100], 0;
      mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r100], 16;
      mbarrier.test_wait.parity.shared::cta.b64 %q2, [%r100], 0;
      selp.u32 %r1, 1, 0, %q1; selp.u32 %r2, 1, 0, %q2;
      st.global.v2.u32 [%p0], {%r1, %r2};
    """
    out = np.full(2, 9, np.uint32)
    run(INIT[1] + body, [out], threads=1, declarations=INIT[0])
    np.testing.assert_array_equal(out, [0, 1])


@every_schedule
def test_try_wait_gives_up_in_the_end(options: Options) -> None:
    # A kernel may count its tries and go on without the phase, which nobody ends here.
    body = """
      mov.u32 %r0, 0;
    TRY:
      add.u32 %r0, %r0, 1;
      mbarrier.try_wait.parity.shared::cta.b64 %q1, [%r100], 0;
      @%q1 bra END;
      setp.lt.u32 %q2, %r0, 3;
      @%q2 bra TRY;
    END:
      mul.wide.u32 %d9, %tid, 4; add.s64 %d9, %d9, %p0; st.global.u32 [%d9], %r0;
    """
    out = np.zeros(64, np.uint32)
    run(INIT[1] + body, [out], threads=64, declarations=INIT[0], options=options)
    assert (out == 3).all()


def test_a_swapped_phase_is_a_deadlock_report() -> None:
    # Nobody ever arrives, and the waiter waits for parity 0: the report has to say all a kernel author needs.
    body = INIT[1] + wait("%r100", "0", "FULL")
    with pytest.raises(EmulationError, match="deadlock") as caught:
        run(body, [np.zeros(1, np.uint32)], threads=64, declarations=INIT[0])
    message = str(caught.value)
    assert "warps 0 1: ptx:" in message and "mbarrier.try_wait.parity" in message
    assert (
        "for the end of a phase of parity 0 at mbarrier 0x400 (phase 0, parity 0, 1 of 1 arrivals and 0 bytes pending)"
        in message
    )


def test_an_overrun_phase_is_noticed() -> None:
    # Thread 32 waits for one phase while thread 0 runs two ahead: whoever waits by parity can't tell.
    body = (
        INIT[1]
        + f"""
      setp.ge.u32 %q1, %tid, 32;
      @%q1 bra WAITER;
      nanosleep.u32 100; nanosleep.u32 100; nanosleep.u32 100;
      @%q30 bra END;
      mbarrier.arrive.shared::cta.b64 _, [%r100];
      mbarrier.arrive.shared::cta.b64 _, [%r100];
      bra END;
    WAITER:
      {wait("%r100", "0", "FULL")}
    END:
    """
    )
    with pytest.raises(EmulationError, match="overrun"):
        run(body, [np.zeros(1, np.uint32)], threads=64, declarations=INIT[0])


# --- tensor copies


def box_of(
    array: np.ndarray, origin: tuple[int, ...], box: tuple[int, ...], steps: tuple[int, ...], fill: float
) -> np.ndarray:
    """What a tensor load brings; origin, box and steps innermost first, as the hardware has them."""
    extents = [box[0]] + [-(-size // step) for size, step in zip(box[1:], steps[1:], strict=True)]
    steps = (1, *steps[1:])
    out = np.full(extents[::-1], fill, array.dtype)
    for index in np.ndindex(*out.shape):
        position = tuple(o + i * s for o, i, s in zip(origin[::-1], index, steps[::-1], strict=True))
        if all(0 <= p < n for p, n in zip(position, array.shape, strict=True)):
            out[index] = array[position]
    return out


def swizzled(tile: np.ndarray, span: int) -> np.ndarray:
    """The bytes of a tile as they lie in shared memory: 16-byte pieces permuted within lines of 128 bytes."""
    raw = np.zeros(-(-tile.nbytes // 1024) * 1024, np.uint8)
    raw[: tile.nbytes] = np.ascontiguousarray(tile).view(np.uint8).ravel()
    lines = raw.reshape(-1, 8, 16)
    out = np.empty_like(lines)
    for line, piece in product(range(len(lines)), range(8)):
        bits = {0: 0, 32: line % 2, 64: line % 4, 128: line % 8}[span]
        out[line, piece ^ bits] = lines[line, piece]
    return out.ravel()


def load_body(rank: int, origin: tuple[int, ...], size: int) -> str:
    coordinates = ", ".join(f"%r{110 + i}" for i in range(rank))
    assign = "".join(f"mov.s32 %r{110 + i}, {value};\n" for i, value in enumerate(origin))
    return f"""
      {INIT[1]}
      {assign}
      mov.u32 %r101, shared;
      @%q30 bra ISSUED;
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r100], {size};
      cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r101], [%p1, {{{coordinates}}}], [%r100];
    ISSUED:
      {wait("%r100", "0", "LANDED")}
    """


CASES = [
    # shape (outermost first), box, origin (innermost first), swizzle, element steps
    ((64,), (32,), (8,), 0, (1,)),
    ((64,), (32,), (-8,), 0, (1,)),
    ((20, 64), (32, 8), (16, 4), 64, (1, 1)),
    ((20, 64), (64, 16), (0, 10), 128, (1, 1)),
    ((20, 40), (16, 8), (32, -3), 32, (1, 1)),
    ((9, 6, 64), (64, 4, 4), (0, 3, -2), 128, (1, 1, 1)),
    ((3, 9, 6, 64), (64, 4, 2, 2), (32, -1, 8, 1), 128, (1, 1, 1, 1)),
    ((2, 5, 6, 11, 128), (64, 8, 4, 4, 1), (64, -3, 2, 3, 1), 128, (1, 1, 1, 1, 1)),
    ((2, 5, 6, 11, 128), (64, 8, 4, 4, 1), (64, 12, 9, 9, 5), 128, (1, 1, 1, 1, 1)),
    ((20, 12, 64), (64, 6, 8), (0, 1, 3), 128, (1, 2, 3)),
]


@pytest.mark.parametrize(("shape", "box", "origin", "span", "steps"), CASES, ids=str)
@pytest.mark.parametrize("options", SCHEDULES[:4:2], ids=lambda o: o.timing)
def test_tensor_loads(
    shape: tuple[int, ...],
    box: tuple[int, ...],
    origin: tuple[int, ...],
    span: int,
    steps: tuple[int, ...],
    options: Options,
) -> None:
    rng = np.random.default_rng(len(shape))
    for nan in (False, True):
        source = rng.integers(1, 2**15, shape).astype(np.uint16)
        wanted = box_of(source, origin, box, steps, 0x7FFF if nan else 0)
        tensor = TensorMap(source, box, data_type="bf16", swizzle=span, element_strides=steps, fill_nan=nan)
        out = np.zeros(wanted.size, np.uint16)
        body = load_body(len(shape), origin, wanted.nbytes) + copy_from_shared("%p0", wanted.nbytes, 64)
        module = module_of(body, 2, BARRIERS + dynamic_shared())
        module.launch([1], [64], [out, in_memory(tensor)], shared_bytes=20480, memory=[source], options=options)
        np.testing.assert_array_equal(out.view(np.uint8), swizzled(wanted, span)[: wanted.nbytes])


def in_memory(tensor: TensorMap) -> np.ndarray:
    """The tensor map's bytes in device memory, for kernels that take its address."""
    return tensor.bytes


@pytest.mark.parametrize(("shape", "box", "origin", "span", "steps"), CASES[:-1], ids=str)
@pytest.mark.parametrize("options", [SCHEDULES[1], SCHEDULES[3]], ids=lambda o: o.timing)
def test_tensor_stores_clip_at_the_borders(
    shape: tuple[int, ...],
    box: tuple[int, ...],
    origin: tuple[int, ...],
    span: int,
    steps: tuple[int, ...],
    options: Options,
) -> None:
    rng = np.random.default_rng(len(shape))
    tile = rng.integers(1, 2**16, box[::-1]).astype(np.uint16)
    target = np.zeros(shape, np.uint16)
    wanted = target.copy()
    for index in np.ndindex(*tile.shape):
        position = tuple(o + i for o, i in zip(origin[::-1], index, strict=True))
        if all(0 <= p < n for p, n in zip(position, shape, strict=True)):
            wanted[position] = tile[index]
    image = swizzled(tile, span)
    rank = len(shape)
    coordinates = ", ".join(str(o) for o in origin)
    body = (
        copy_to_shared("%p0", image.nbytes, 64)
        + f"""
      {ELECTED}
      mov.u32 %r101, shared;
      @%q30 bra END;
      cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%p1, {{{coordinates}}}], [%r101];
      cp.async.bulk.commit_group;
      cp.async.bulk.wait_group 0;
    END:
    """
    )
    tensor = TensorMap(target, box, data_type="bf16", swizzle=span, element_strides=steps)
    module = module_of(body, 2, dynamic_shared())
    module.launch([1], [64], [image, in_memory(tensor)], shared_bytes=20480, memory=[target], options=options)
    np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize(("operation", "combine"), [("add", np.add), ("max", np.maximum), ("min", np.minimum)])
def test_tensor_reductions(operation: str, combine: np.ufunc) -> None:
    rng = np.random.default_rng(3)
    tile, target = rng.standard_normal((8, 32)).astype(np.float32), rng.standard_normal((6, 32)).astype(np.float32)
    wanted = target.copy()
    wanted[3:] = combine(target[3:], tile[:3])
    body = (
        copy_to_shared("%p0", tile.nbytes, 32)
        + f"""
      {ELECTED}
      mov.u32 %r101, shared;
      @%q30 bra END;
      cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group [%p1, {{0, 3}}], [%r101];
      cp.async.bulk.commit_group;
      cp.async.bulk.wait_group 0;
    END:
    """
    )
    module = module_of(body, 2, dynamic_shared())
    module.launch([1], [32], [tile, in_memory(TensorMap(target, (32, 8)))], shared_bytes=2048, memory=[target])
    np.testing.assert_allclose(target, wanted, rtol=1e-6)


# --- copies without tensor maps


@every_schedule
def test_bulk_copies_there_and_back(options: Options) -> None:
    source = np.arange(256, dtype=np.float32)
    target = np.full(256, 0.5, np.float32)
    body = f"""
      {INIT[1]}
      mov.u32 %r101, shared;
      @%q30 bra END;
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r100], 1024;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0], 512, [%r100];
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101+512], [%p0+512], 512, [%r100];
      {wait("%r100", "0", "LANDED")}
      cp.async.bulk.global.shared::cta.bulk_group [%p1], [%r101], 512;
      cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%p1+512], [%r101+512], 512;
      cp.async.bulk.commit_group;
      cp.async.bulk.wait_group 0;
    END:
    """
    run(body, [source, target], shared_bytes=1024, declarations=BARRIERS + dynamic_shared(), options=options)
    np.testing.assert_array_equal(target, np.concatenate([source[:128], source[128:] + 0.5]))


@every_schedule
def test_small_asynchronous_copies(options: Options) -> None:
    source = np.arange(128, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    body = f"""
      mov.u32 %r101, shared;
      mad.lo.u32 %r102, %tid, 16, %r101;
      mul.wide.u32 %d1, %tid, 16; add.s64 %d1, %d1, %p1;
      mov.u32 %r103, 8;
      setp.eq.u32 %q1, %tid, 3;
      selp.u32 %r103, %r103, 16, %q1;
      cp.async.cg.shared.global [%r102], [%d1], 16, %r103;
      cp.async.commit_group;
      cp.async.wait_group 0;
      bar.sync 0;
      {copy_from_shared("%p0", 512, 32)}
    """
    run(body, [out, source], shared_bytes=512, declarations=dynamic_shared(), options=options)
    wanted = source.copy()
    wanted[14:16] = 0  # the third thread's copy is filled up with zeros
    np.testing.assert_array_equal(out, wanted)


COPIES = """
  mov.u32 %r101, shared;
  mad.lo.u32 %r102, %tid, 16, %r101;
  mul.wide.u32 %d1, %tid, 16; add.s64 %d1, %d1, %p0;
  cp.async.ca.shared.global [%r102], [%d1], 16;
  cp.async.commit_group;
  cp.async.ca.shared.global [%r102+1024], [%d1], 16;
  cp.async.commit_group;
"""
OWN, OTHER = "[%r102]", "[%r101]"  # what this thread copied, and what thread 0 did


@every_schedule
@pytest.mark.parametrize(
    ("between", "place", "fine"),
    [
        ("cp.async.wait_group 1;", OWN, True),
        ("cp.async.wait_all;", OWN, True),
        ("", OWN, False),
        ("bar.sync 0;", OWN, False),
        ("cp.async.wait_group 2;", OWN, False),
        ("cp.async.wait_group 1;", "[%r102+1024]", False),
        ("cp.async.wait_group 1; bar.sync 0;", OTHER, True),
        ("cp.async.wait_group 1;", OTHER, False),
        ("bar.sync 0; cp.async.wait_group 0;", OTHER, False),
        (f"cp.async.mbarrier.arrive.noinc.shared.b64 [%r100];{wait('%r100', '0', 'LANDED')}", OTHER, True),
        (f"mbarrier.arrive.shared.b64 _, [%r100];{wait('%r100', '0', 'LANDED')}", OTHER, False),
    ],
)
def test_small_copies_are_waited_for(between: str, place: str, fine: bool, options: Options) -> None:
    # Two groups of copies by each thread of two warps; the threads of warp 1 then read.
    init = INIT[1].replace("[%r100], 1;", "[%r100], 64;")
    body = f"{init}{COPIES}{between}\nsetp.ge.u32 %q5, %tid, 32; @%q5 ld.shared.u32 %r1, {place}; cp.async.wait_all;"

    def launch() -> None:
        data = np.zeros(1024, np.uint8)
        run(body, [data], threads=64, shared_bytes=2048, declarations=INIT[0] + dynamic_shared(), options=options)

    if fine:
        launch()
        return
    # What the other warp has yet to copy isn't there at all.
    race = r"race: read of shared memory at .*, which an asynchronous copy has written"
    with pytest.raises(EmulationError, match=race + ("|uninitialised" if place == OTHER else "")):
        launch()


@pytest.mark.parametrize("waits_first", [True, False])
@every_schedule
def test_a_bulk_store_reads_until_its_wait(waits_first: bool, options: Options) -> None:
    # Thread 0 stores and tells warp 1, which writes to the bytes that are stored.
    steps = ["cp.async.bulk.wait_group.read 0;", "mbarrier.arrive.shared::cta.b64 _, [%r100];"]
    body = f"""
      {INIT[1]}
      mov.u32 %r101, shared;
      setp.ge.u32 %q1, %tid, 32;
      @%q1 bra WRITER;
      @%q30 bra END;
      st.shared.v4.u32 [%r101], {{%r100, %r100, %r100, %r100}};
      fence.proxy.async.shared::cta;
      cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r101], 16;
      cp.async.bulk.commit_group;
      {" ".join(steps if waits_first else steps[::-1])}
      bra END;
    WRITER:
      {"nanosleep.u32 100; " * 4}
      {wait("%r100", "0", "STORED")}
      st.shared.u32 [%r101], %r100;
    END:
    """

    def launch() -> None:
        data = np.zeros(16, np.uint8)
        run(body, [data], threads=64, shared_bytes=16, declarations=BARRIERS + dynamic_shared(), options=options)

    if waits_first:
        launch()
        return
    with pytest.raises(EmulationError, match=r"which a bulk store has read|a bulk store may still read"):
        launch()


MISUSE = {
    "a read before the copy has landed": (
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0], 256, [%r100];\n"
            "ld.shared.u32 %r1, [%r101];"
        ),
        "into which an asynchronous copy has not finished writing",
    ),
    "a store without a proxy fence": (
        (
            "st.shared.v4.u32 [%r101], {%r100, %r100, %r100, %r100};\n"
            "cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r101], 16;"
        ),
        "thread 0 wrote it through the generic proxy and no fence.proxy.async came between",
    ),
    "shared memory reused while a store may read it": (
        (
            "st.shared.v4.u32 [%r101], {%r100, %r100, %r100, %r100};\n"
            "fence.proxy.async.shared::cta;\n"
            "cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r101], 16;\n"
            "cp.async.bulk.commit_group;\n"
            "st.shared.u32 [%r101], %r100;"
        ),
        "a bulk store may still read",
    ),
    "a store that nobody waits for": (
        (
            "st.shared.v4.u32 [%r101], {%r100, %r100, %r100, %r100};\n"
            "fence.proxy.async.shared::cta;\n"
            "cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r101], 16;\n"
            "cp.async.bulk.commit_group;"
        ),
        r"cp\.async\.bulk\.global.* thread 0: exited though its bulk store",
    ),
    "a copy of uninitialised memory": (
        "cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r101], 16;",
        "read of uninitialised shared memory",
    ),
    "the end before a copy has landed": (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0], 256, [%r100];",
        r"cp\.async\.bulk\.shared.* the CTA ended while this copy into its shared memory was under way",
    ),
    "an odd size": (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0], 24, [%r100];",
        "no multiple of 16",
    ),
    "bytes that are no tensor map": (
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0, {0}], [%r100];",
        "not a tensor map",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
@pytest.mark.parametrize("options", [SCHEDULES[1], SCHEDULES[2]], ids=lambda o: o.order)
def test_misuse_of_copies(name: str, options: Options) -> None:
    body, message = MISUSE[name]
    data = np.zeros(1024 + 64, np.uint8)
    data = data[-data.ctypes.data % 64 :][:1024]
    text = INIT[1] + "mov.u32 %r101, shared;\n" + body
    with pytest.raises(EmulationError, match=message):
        run(text, [data], threads=1, shared_bytes=1024, declarations=BARRIERS + dynamic_shared(), options=options)


def test_too_few_expected_bytes_is_a_deadlock() -> None:
    data = np.zeros(256, np.uint8)
    body = f"""
      {INIT[1]}
      mov.u32 %r101, shared;
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r100], 512;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r101], [%p0], 256, [%r100];
      {wait("%r100", "0", "LANDED")}
    """
    with pytest.raises(EmulationError, match="0 of 1 arrivals and 256 bytes pending"):
        run(body, [data], threads=1, shared_bytes=1024, declarations=BARRIERS + dynamic_shared())
