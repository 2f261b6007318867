"""Orders between accesses of different warps and CTAs: PTX ISA, Memory Consistency Model, release and acquire patterns.

Each case passes data from one warp to another through a flag, an mbarrier or a barrier. Whether that is a race follows
from the rules alone, whatever the schedule does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, run
from gnaforge.bench import emulator as benchmark
from gnaforge.build_tools.emulator import EmulationError, Options

every_schedule = pytest.mark.parametrize("options", SCHEDULES[::3], ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
SHARED = ".shared .align 16 .b32 box[8];\n.shared .align 8 .b64 barrier;\n"

# The flag is box[0], initialised before bar.sync; the data is box[4]. Warp 0 writes, warp 1 reads.
FLAG = """
  mov.u32 %r1, box; mov.u32 %r0, 0; mov.u32 %r9, 77; mov.u32 %r8, 1;
  setp.ne.u32 %q1, %tid, 0;
  @!%q1 st.shared.u32 [%r1], %r0;
  bar.sync 0;
  setp.ge.u32 %q2, %tid, 32;
  @%q2 bra READER;
  @%q1 bra END;
  st.shared.u32 [%r1+16], %r9;
  {signal}
  bra END;
READER:
  {poll}
  setp.eq.u32 %q3, %r4, 0;
  @%q3 bra READER;
  {after}
  ld.shared.u32 %r5, [%r1+16];
END:
"""
SIGNALS = {
    "st.release": ("st.release.cta.shared.u32 [%r1], %r8;", True),
    "st.relaxed": ("st.relaxed.cta.shared.u32 [%r1], %r8;", False),
    "st.volatile": ("st.volatile.shared.u32 [%r1], %r8;", False),
    "fence, st.relaxed": ("fence.acq_rel.cta; st.relaxed.cta.shared.u32 [%r1], %r8;", True),
    "membar, st.volatile": ("membar.cta; st.volatile.shared.u32 [%r1], %r8;", True),
    "st.relaxed, fence": ("st.relaxed.cta.shared.u32 [%r1], %r8; fence.acq_rel.cta;", False),
    "red.relaxed": ("red.shared.add.u32 [%r1], %r8;", False),
    "red.release": ("red.release.cta.shared.add.u32 [%r1], %r8;", True),
    "fence.sc, atom": ("fence.sc.cta; atom.relaxed.cta.shared.exch.b32 %r7, [%r1], %r8;", True),
    "proxy fence only": ("fence.proxy.async.shared::cta; st.relaxed.cta.shared.u32 [%r1], %r8;", False),
    "release, then relaxed by the same thread": (
        "st.release.cta.shared.u32 [%r1], %r8; st.relaxed.cta.shared.u32 [%r1], %r8;",
        True,
    ),
}
POLLS = {
    "ld.acquire": ("ld.acquire.cta.shared.u32 %r4, [%r1];", "", True),
    "ld.relaxed": ("ld.relaxed.cta.shared.u32 %r4, [%r1];", "", False),
    "ld.volatile": ("ld.volatile.shared.u32 %r4, [%r1];", "", False),
    "ld.relaxed, fence": ("ld.relaxed.cta.shared.u32 %r4, [%r1];", "fence.acq_rel.cta;", True),
    "ld.volatile, membar": ("ld.volatile.shared.u32 %r4, [%r1];", "membar.gl;", True),
    "atom.acquire": ("atom.acquire.cta.shared.or.b32 %r4, [%r1], 0;", "", True),
    "atom.relaxed": ("atom.relaxed.cta.shared.or.b32 %r4, [%r1], 0;", "", False),
    "fence before ld.relaxed": ("fence.acq_rel.cta; ld.relaxed.cta.shared.u32 %r4, [%r1];", "", False),
}


def check(
    body: str, ordered: bool, options: Options, message: str = "race: read of shared memory", **how: object
) -> None:
    out = np.zeros(4, np.uint32)
    arguments = {"threads": 64, "declarations": SHARED, "options": options, **how}
    if ordered:
        run(body, [out], **arguments)
        return
    with pytest.raises(EmulationError, match=message) as caught:
        run(body, [out], **arguments)
    assert "ptx:" in str(caught.value) and "thread" in str(caught.value)


@every_schedule
@pytest.mark.parametrize("poll", POLLS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_release_and_acquire_patterns(signal: str, poll: str, options: Options) -> None:
    text, releases = SIGNALS[signal]
    load, after, acquires = POLLS[poll]
    body = FLAG.format(signal=text, poll=load, after=after)
    check(body, releases and acquires, options)


@every_schedule
def test_a_weak_flag_is_a_race(options: Options) -> None:
    body = FLAG.format(signal="st.shared.u32 [%r1], %r8;", poll="ld.acquire.cta.shared.u32 %r4, [%r1];", after="")
    check(body, False, options, "race: (read|write) of shared memory")


# Thread 0 writes box[0] and arrives; warp 1 waits and reads.
MBARRIER = """
  mov.u32 %r1, box; mov.u32 %r2, barrier; mov.u32 %r9, 77;
  setp.ne.u32 %q1, %tid, 0;
  @%q1 bra READY;
  mbarrier.init.shared::cta.b64 [%r2], 1;
READY:
  {meet}
  setp.ge.u32 %q2, %tid, 32;
  @%q2 bra READER;
  @%q1 bra END;
  st.shared.u32 [%r1], %r9;
  {arrive}
  bra END;
READER:
  {wait}
  @!%q3 bra READER;
  {after}
  ld.shared.u32 %r5, [%r1];
END:
"""
ARRIVALS = {
    "arrive": ("mbarrier.arrive.shared::cta.b64 _, [%r2];", True),
    "arrive.release": ("mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2];", True),
    "arrive.relaxed": ("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r2];", False),
    "fence, arrive.relaxed": ("fence.acq_rel.cta; mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r2];", True),
    "arrive.expect_tx": ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 0;", True),
}
WAITS = {
    "try_wait": ("mbarrier.try_wait.parity.shared::cta.b64 %q3, [%r2], 0;", "", True),
    "test_wait.acquire": ("mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 %q3, [%r2], 0;", "", True),
    "try_wait.relaxed": ("mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %q3, [%r2], 0;", "", False),
    "try_wait.relaxed, fence": (
        "mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %q3, [%r2], 0;",
        "fence.acq_rel.cta;",
        True,
    ),
}


@every_schedule
@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("arrive", ARRIVALS)
def test_mbarriers_release_and_acquire(arrive: str, wait: str, options: Options) -> None:
    text, releases = ARRIVALS[arrive]
    poll, after, acquires = WAITS[wait]
    body = MBARRIER.format(meet="bar.sync 0;", arrive=text, wait=poll, after=after)
    check(body, releases and acquires, options, "race: read|uninitialised")


MEETINGS = {
    "bar.sync": ("bar.sync 0;", True),
    "cluster barrier": ("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", True),
    "relaxed cluster barrier": ("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;", False),
    "relaxed cluster barrier after fence.mbarrier_init": (
        "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;",
        True,
    ),
}


@every_schedule
@pytest.mark.parametrize("meet", MEETINGS)
def test_mbarriers_are_used_after_their_initialisation(meet: str, options: Options) -> None:
    text, ordered = MEETINGS[meet]
    body = MBARRIER.format(meet=text, arrive=ARRIVALS["arrive"][0], wait=WAITS["try_wait"][0], after="")
    check(body, ordered, options, "race: the mbarrier at 0x.* an mbarrier.init of warp 0 has initialised")


@every_schedule
def test_an_init_fence_orders_nothing_but_initialisations(options: Options) -> None:
    body = """
      mov.u32 %r1, box;
      setp.eq.u32 %q1, %tid, 0;
      @%q1 st.shared.u32 [%r1], %tid;
      fence.mbarrier_init.release.cluster;
      barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
      ld.shared.u32 %r2, [%r1];
    """
    check(body, False, options)


INIT_FENCES = {
    "none": ("", False),
    "fence.mbarrier_init": ("fence.mbarrier_init.release.cluster;", True),
    "fence.proxy.async": ("fence.proxy.async.shared::cta;", True),
}


@pytest.mark.parametrize("fence", INIT_FENCES)
def test_copies_signal_mbarriers_that_the_async_proxy_can_see(fence: str) -> None:
    text, visible = INIT_FENCES[fence]
    body = f"""
      mov.u32 %r1, box; mov.u32 %r2, barrier;
      mbarrier.init.shared::cta.b64 [%r2], 1;
      {text}
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;
      cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%p0], 16, [%r2];
    WAIT:
      mbarrier.try_wait.parity.shared::cta.b64 %q1, [%r2], 0;
      @!%q1 bra WAIT;
    """
    check(body, visible, Options(), "visible to the async proxy neither by", threads=1)


# --- every reader counts


@every_schedule
@pytest.mark.parametrize("readers", [1, 2, 3, 5, 7])
def test_a_writer_has_to_wait_for_every_reader(readers: int, options: Options) -> None:
    """All but one of the readers meet the writer at barrier 1; with all of them, it is no race."""
    body = """
      mov.u32 %r1, box;
      setp.eq.u32 %q1, %tid, 0;
      @%q1 st.shared.u32 [%r1], %tid;
      bar.sync 0;
      shr.u32 %r2, %tid, 5;
      setp.ge.u32 %q2, %r2, 1;
      @%q2 ld.shared.u32 %r3, [%r1];
      setp.eq.u32 %q3, %r2, {absent};
      @%q3 bra END;
      bar.sync 1, {threads};
      @%q1 st.shared.u32 [%r1], %tid;
    END:
    """
    warps = readers + 1
    for absent in range(1, warps):
        text = body.format(absent=absent, threads=32 * (warps - 1))
        check(text, False, options, f"race: .* warp ({absent} has read|0 has written)", threads=32 * warps)
    check(body.format(absent=99, threads=32 * warps), True, options, threads=32 * warps)


# --- device memory: CTA 1 writes, CTA 0 reads; or the other way round, as they come

GLOBAL = """
  mov.u32 %r1, %ctaid.x; mov.u32 %r9, 77; mov.u32 %r8, 1;
  {write}
  {signal}
  setp.ne.u32 %q1, %r7, 1;
  @%q1 bra END;
  {after}
  ld.global.u32 %r2, [%p0+8];
END:
"""
WRITE = "mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, %p0; st.global.u32 [%d1+8], %r9;"
SPLITS = {
    "atom.acq_rel.gpu": ("atom.acq_rel.gpu.global.add.u32 %r7, [%p0], 1;", "", True),
    "fences around": ("fence.acq_rel.gpu; atom.global.add.u32 %r7, [%p0], 1;", "fence.acq_rel.gpu;", True),
    "__threadfence before and after": ("membar.gl; atom.global.add.u32 %r7, [%p0], 1;", "membar.gl;", True),
    "no fence after": ("fence.acq_rel.gpu; atom.global.add.u32 %r7, [%p0], 1;", "", False),
    "no fence before": ("atom.global.add.u32 %r7, [%p0], 1;", "fence.acq_rel.gpu;", False),
    "scope of the CTA": ("atom.acq_rel.cta.global.add.u32 %r7, [%p0], 1;", "", False),
    "fences of the CTA": ("fence.acq_rel.cta; atom.global.add.u32 %r7, [%p0], 1;", "fence.acq_rel.cta;", False),
    "a plain atomic": ("atom.global.add.u32 %r7, [%p0], 1;", "", False),
}


@pytest.mark.parametrize("split", SPLITS)
def test_the_last_cta_reads_what_others_wrote(split: str) -> None:
    """The counter of split reductions: who finds it at 1 comes last, and reads the first CTA's word."""
    signal, after, ordered = SPLITS[split]
    body = GLOBAL.format(write=WRITE, signal=signal, after=after)
    check(
        body, ordered, Options(), "race: read of global memory at 0x.* of CTA number 0 has written", grid=2, threads=1
    )


def test_a_relaxed_store_of_another_cta_ends_what_was_released() -> None:
    # CTA 0 writes and releases; CTA 1 stores to the flag, relaxed; CTA 2 acquires that, which brings nothing.
    body = """
      mov.u32 %r1, %ctaid.x; mov.u32 %r2, 7;
      setp.eq.u32 %q0, %r1, 0; setp.eq.u32 %q1, %r1, 1; setp.eq.u32 %q2, %r1, 2;
      @%q0 st.global.u32 [%p0], %r2;
      @%q0 st.release.gpu.global.u32 [%p0+4], %r2;
      @%q1 st.relaxed.gpu.global.u32 [%p0+4], %r2;
      @%q2 ld.acquire.gpu.global.u32 %r3, [%p0+4];
      @%q2 ld.global.u32 %r4, [%p0];
    """
    with pytest.raises(EmulationError, match=r"race: read of global memory .* of CTA number 0 has written"):
        run(body, [np.zeros(2, np.uint32)], threads=1, grid=3)


def test_ctas_that_write_the_same_place() -> None:
    body = "st.global.u32 [%p0], %tid;"
    check(body, False, Options(), "race: write to global memory", grid=2, threads=1)
    check("red.global.add.u32 [%p0], 1;", True, Options(), grid=2)
    check(
        "mov.u32 %r1, %ctaid.x; mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, %p0;" + body.replace("p0", "d1"),
        True,
        Options(),
        grid=3,
        threads=1,
    )


BULK_STORE = """
  mov.u32 %r1, box; mov.u32 %r9, 77;
  st.shared.v4.b32 [%r1], {{%r9, %r9, %r9, %r9}};
  fence.proxy.async.shared::cta;
  cp.async.bulk.global.shared::cta.bulk_group [%p0], [%r1], 16;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group{read} 0;
  ld.global.u32 %r2, [%p0];
"""


@every_schedule
def test_a_bulk_store_is_waited_for_before_its_bytes_are_read(options: Options) -> None:
    check(BULK_STORE.format(read=""), True, options, threads=1)
    check(
        BULK_STORE.format(read=".read"),
        False,
        options,
        "race: read of global memory at 0x.* a bulk store has",
        threads=1,
    )


# Warp 1 touches device memory; a launch that may begin early has to wait before, itself or by a warp that it has seen.
EARLY = {
    "no wait": ("@%q1 bra END; st.global.u32 [%p0], %r9;", False),
    "a wait": ("@%q1 bra END; griddepcontrol.wait; st.global.u32 [%p0], %r9;", True),
    "a wait too late": ("@%q1 bra END; st.global.u32 [%p0], %r9; griddepcontrol.wait;", False),
    "launch_dependents": ("@%q1 bra END; griddepcontrol.launch_dependents; ld.global.u32 %r8, [%p0];", False),
    "another warp's wait": ("@%q1 griddepcontrol.wait; @!%q1 st.global.u32 [%p0], %r9;", False),
    "another warp's wait, seen": ("@%q1 griddepcontrol.wait; bar.sync 0; @!%q1 st.global.u32 [%p0], %r9;", True),
    "seen before the wait": ("bar.sync 0; @%q1 griddepcontrol.wait; @!%q1 st.global.u32 [%p0], %r9;", False),
    "a bulk load": (
        """@%q1 bra END; mov.u32 %r1, box; mov.u32 %r2, barrier; setp.ne.u32 %q2, %tid, 32; @%q2 bra END;
        mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%p0], 16, [%r2];""",
        False,
    ),
}


@pytest.mark.parametrize("case", EARLY)
@every_schedule
def test_an_early_launch_waits_before_it_touches_device_memory(options: Options, case: str) -> None:
    body, right = EARLY[case]
    body = f"mov.u32 %r9, 77; setp.lt.u32 %q1, %tid, 32; {body} END:"
    message = "touches device memory before griddepcontrol.wait, in a launch that may begin"
    check(body, right, replace(options, early=True), message)
    if "bulk" not in case:
        check(body, True, options)


def test_checks_can_be_left_out() -> None:
    body = "mov.u32 %r1, box; st.shared.u32 [%r1], %tid; ld.shared.u32 %r2, [%r1+16]; st.global.u32 [%p0], %r2;"
    check(body, False, Options(), "race|uninitialised")
    check(body, True, Options(checks=False))


def test_the_benchmark_measures_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(benchmark.SCHEDULES)
    assert all("70,976 warp instructions" in line and "M/s" in line for line in lines[1:])
    assert benchmark.main(["nonsense", "--repeats", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
