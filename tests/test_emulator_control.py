"""Divergence, calls, warp-level instructions and barriers of the emulator, under every schedule."""

from __future__ import annotations

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, element_address, module_of, run
from gnaforge.build_tools.emulator import EmulationError, Options

STORE = element_address("%d9", "%p0", 4) + "st.global.u32 [%d9], %r0;"
every_schedule = pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")


def result(body: str, threads: int = 32, options: Options | None = None, declarations: str = "") -> np.ndarray:
    """What each thread leaves in %r0."""
    out = np.zeros(threads, np.uint32)
    run(body + STORE, [out], threads=threads, options=options, declarations=declarations)
    return out


@every_schedule
def test_loops_of_different_lengths_meet_again(options: Options) -> None:
    # Collatz steps of each thread's number, then a whole-warp sum: lanes must reconverge to take part in it.
    body = """
      add.u32 %r1, %tid, 1;
      mov.u32 %r0, 0;
    LOOP:
      setp.eq.u32 %q1, %r1, 1;
      @%q1 bra DONE;
      and.b32 %r2, %r1, 1;
      setp.eq.u32 %q2, %r2, 0;
      @%q2 bra EVEN;
      mad.lo.u32 %r1, %r1, 3, 1;
      bra NEXT;
    EVEN:
      shr.u32 %r1, %r1, 1;
    NEXT:
      add.u32 %r0, %r0, 1;
      bra LOOP;
    DONE:
      redux.sync.add.u32 %r0, %r0, 0xffffffff;
    """

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    wanted = np.array([steps(i + 1) for i in range(64)]).reshape(2, 32).sum(axis=1).repeat(32)
    np.testing.assert_array_equal(result(body, 64, options), wanted)


@every_schedule
def test_a_lane_may_spin_until_its_neighbour_moves(options: Options) -> None:
    # Lane 0 polls a flag at a lower address than the code of lane 1, which sets it.
    body = """
      setp.ne.u32 %q1, %tid, 0;
      @%q1 bra SETTER;
    SPIN:
      ld.acquire.gpu.global.u32 %r1, [%p0+4];
      setp.ne.u32 %q2, %r1, 7;
      @%q2 bra SPIN;
      st.global.u32 [%p0], 9;
      bra END;
    SETTER:
      mov.u32 %r2, 7;
      st.release.gpu.global.u32 [%p0+4], %r2;
    END:
    """
    out = np.zeros(2, np.uint32)
    run(body.replace("[%p0], 9", "[%p0], %r1"), [out], threads=2, options=options)
    np.testing.assert_array_equal(out, [7, 7])


def test_shuffles() -> None:
    lanes = np.arange(32)
    for mode, amount, control, wanted in [
        ("bfly", 5, 31, lanes ^ 5),
        ("up", 3, 0, np.where(lanes >= 3, lanes - 3, lanes)),
        ("down", 3, 31, np.where(lanes + 3 <= 31, lanes + 3, lanes)),
        ("idx", 7, 31, np.full(32, 7)),
        ("idx", 2, 0x181F, lanes // 8 * 8 + 2),  # segments of 8
        ("bfly", 1, 0x181F, lanes ^ 1),
    ]:
        text = f"shfl.sync.{mode}.b32 %r0|%q1, %lane, {amount}, {control}, 0xffffffff;"
        np.testing.assert_array_equal(result(text), wanted, err_msg=mode)
    inside = result("shfl.sync.up.b32 %r1|%q1, %lane, 4, 0, 0xffffffff; selp.u32 %r0, 1, 0, %q1;")
    np.testing.assert_array_equal(inside, lanes >= 4)


def test_votes_matches_and_elections() -> None:
    lanes = np.arange(32)
    odd = "and.b32 %r1, %lane, 1; setp.eq.u32 %q1, %r1, 1;"
    pattern = sum(1 << i for i in range(1, 32, 2))
    assert (result(odd + "vote.sync.ballot.b32 %r0, %q1, 0xffffffff;") == pattern).all()
    assert (result(odd + "vote.sync.any.pred %q2, %q1, -1; selp.u32 %r0, 1, 0, %q2;") == 1).all()
    assert (result(odd + "vote.sync.all.pred %q2, %q1, -1; selp.u32 %r0, 1, 0, %q2;") == 0).all()
    np.testing.assert_array_equal(
        result(odd + "match.any.sync.b32 %r0, %r1, -1;"), np.where(lanes % 2, pattern, 0xFFFFFFFF ^ pattern)
    )
    leader = result("elect.sync %r1|%q1, -1; selp.u32 %r0, 1, 0, %q1;")
    assert leader.sum() == 1
    np.testing.assert_array_equal(result("redux.sync.max.s32 %r0, %lane, -1;"), np.full(32, 31))


def test_a_shuffle_that_reads_an_absent_lane_is_an_error() -> None:
    body = "setp.lt.u32 %q1, %lane, 16; @!%q1 bra END; shfl.sync.bfly.b32 %r0, %lane, 16, 31, 0xffff; END:"
    with pytest.raises(EmulationError, match="shfl reads lane 16, which does not take part"):
        result(body)


def test_a_collective_without_one_of_its_lanes_is_a_deadlock() -> None:
    body = """
      setp.lt.u32 %q1, %lane, 16;
      @%q1 bra LOW;
      bar.warp.sync 0xffffffff;
      bra END;
    LOW:
      shfl.sync.bfly.b32 %r0, %lane, 1, 31, 0xffffffff;
    END:
    """
    with pytest.raises(EmulationError, match="deadlock") as caught:
        result(body)
    assert "lanes 0xffff" in str(caught.value)
    assert "shfl.sync" in str(caught.value)


CALLEE = """
.func (.param .b32 value) twice_if_odd (.param .b32 x)
{
  .reg .b32 %r<4>;
  .reg .pred %q1;
  ld.param.u32 %r1, [x];
  and.b32 %r2, %r1, 1;
  setp.eq.u32 %q1, %r2, 0;
  @%q1 bra EVEN;
  shl.b32 %r1, %r1, 1;
  st.param.b32 [value], %r1;
  ret;
EVEN:
  st.param.b32 [value], %r1;
  ret;
}
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);
.global .align 1 .b8 text[11] = {37, 100, 32, 37, 46, 49, 102, 32, 37, 115, 0};
.global .align 1 .b8 word[3] = {104, 105, 0};
"""


def test_calls_return_to_each_lane() -> None:
    body = """
    {
      .param .b32 argument; .param .b32 answer;
      st.param.b32 [argument], %tid;
      call.uni (answer), twice_if_odd, (argument);
      ld.param.b32 %r0, [answer];
    }
    """
    lanes = np.arange(32)
    np.testing.assert_array_equal(result(body, declarations=CALLEE), np.where(lanes % 2, 2 * lanes, lanes))


def test_printf(capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    {
      .local .align 8 .b8 room[24];
      .reg .b64 %at;
      .param .b64 first; .param .b64 second; .param .b32 answer;
      mov.u64 %at, room;
      st.local.u32 [%at], 42;
      mov.f64 %g1, 0d3FF8000000000000;
      st.local.f64 [%at+8], %g1;
      mov.u64 %d1, word;
      st.local.u64 [%at+16], %d1;
      cvta.local.u64 %d2, %at;
      mov.u64 %d3, text;
      st.param.b64 [first], %d3;
      st.param.b64 [second], %d2;
      call.uni (answer), vprintf, (first, second);
    }
    """
    run(
        body.replace("st.local.u32 [%at], 42;", "mov.u32 %r1, 42; st.local.u32 [%at], %r1;"),
        [],
        threads=1,
        declarations=CALLEE,
    )
    assert capfd.readouterr().out == "42 1.5 hi"


def test_indexed_branches() -> None:
    body = """
      and.b32 %r1, %lane, 3;
      TABLE: .branchtargets A, B, A, C;
      brx.idx %r1, TABLE;
    A: mov.u32 %r0, 10; bra END;
    B: mov.u32 %r0, 20; bra END;
    C: mov.u32 %r0, 30;
    END:
    """
    np.testing.assert_array_equal(result(body), np.tile([10, 20, 10, 30], 8))


def test_trap_names_line_and_thread() -> None:
    with pytest.raises(EmulationError, match=r"ptx:\d+: @%q1 trap \(kernel\.cu:7\): thread 37: trap"):
        result("setp.eq.u32 %q1, %tid, 37;\n@%q1 trap;", 64)


@every_schedule
def test_named_barriers_hand_over_between_warps(options: Options) -> None:
    # Warp 1 produces into shared memory what warp 0 consumes, ten times, with arrive and sync on two barriers.
    body = """
      mov.u32 %r1, shared;
      mad.lo.u32 %r1, %lane, 4, %r1;
      mov.u32 %r2, 0;
      mov.u32 %r0, 0;
      setp.ge.u32 %q1, %tid, 32;
    LOOP:
      @%q1 bra PRODUCE;
      bar.sync 1, 64;
      ld.shared.u32 %r3, [%r1];
      add.u32 %r0, %r0, %r3;
      bar.arrive 2, 64;
      bra NEXT;
    PRODUCE:
      setp.eq.u32 %q2, %r2, 0;
      @%q2 bra FREE;
      bar.sync 2, 64;
    FREE:
      mad.lo.u32 %r3, %r2, 100, %lane;
      st.shared.u32 [%r1], %r3;
      bar.arrive 1, 64;
    NEXT:
      add.u32 %r2, %r2, 1;
      setp.lt.u32 %q3, %r2, 10;
      @%q3 bra LOOP;
    """
    out = result(body, 64, options, ".shared .align 16 .b8 shared[128];")
    np.testing.assert_array_equal(out[:32], sum(100 * i for i in range(10)) + 10 * np.arange(32))


def test_barrier_reductions() -> None:
    body = "setp.lt.u32 %q1, %tid, 40; bar.red.popc.u32 %r0, 0, %q1;"
    assert (result(body, 64) == 40).all()
    body = "setp.lt.u32 %q1, %tid, 40; bar.red.and.pred %q2, 0, %q1; selp.u32 %r0, 1, 0, %q2;"
    assert (result(body, 64) == 0).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.ge.u32 %q1, %tid, 32; @%q1 bar.sync 1, 96;", "barrier 1 .32 of 96 threads arrived"),
        ("bar.sync 1, 40;", "not a positive multiple of 32"),
        ("bar.sync 17;", "not in 0..15"),
        ("setp.ge.u32 %q1, %tid, 32; @%q1 bar.sync 1, 64; @!%q1 bar.sync 1, 96;", "is in use for (64|96) threads"),
        ("bar.arrive 1, 32;\nbar.sync 0;\nsetp.lt.u32 %q1, %tid, 1;\n@%q1 bar.sync 1, 64;", "deadlock"),
    ],
)
def test_barrier_misuse(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        result(body, 64)


@pytest.mark.parametrize("leaves", ["first", "last"])
@every_schedule
def test_barrier_cluster_waits_for_the_threads_that_are_left(leaves: str, options: Options) -> None:
    # Warp 3 leaves without arriving, at once (and warp 2 after its arrival) or after all others have arrived.
    # Warp 1 reads what warp 0 writes, which arrives later.
    sleep = "nanosleep.u32 100;"
    body = f"""
      mov.u32 %r1, shared; mov.u32 %r0, 0; mov.u32 %r3, 42;
      shr.u32 %r2, %tid, 5;
      setp.eq.u32 %q2, %r2, 2; @%q2 bra ARRIVE;
      setp.eq.u32 %q3, %r2, 3; @%q3 bra LEAVE;
      {3 * sleep}
      setp.eq.u32 %q1, %r2, 1; @%q1 bra ARRIVE;
      {3 * sleep}
      st.shared.u32 [%r1], %r3;
    ARRIVE:
      barrier.cluster.arrive.aligned;
      {"@%q2 ret;" if leaves == "first" else ""}
      barrier.cluster.wait.aligned;
      ld.shared.u32 %r0, [%r1];
      bra END;
    LEAVE:
      {9 * sleep if leaves == "last" else ""}
      ret;
    END:
    """
    out = result(body, 128, options, ".shared .align 16 .b8 shared[16];")
    np.testing.assert_array_equal(out, np.repeat([42, 42, 0 if leaves == "first" else 42, 0], 32))


def test_a_deadlock_at_barrier_cluster_is_reported() -> None:
    # Warp 1 waits at another barrier. On several host threads, where nothing but the report may end the launch.
    body = """
      setp.ge.u32 %q1, %tid, 32;
      @%q1 bra OTHER;
      barrier.cluster.arrive.aligned;
      barrier.cluster.wait.aligned;
    OTHER:
      bar.sync 1, 64;
    """
    with pytest.raises(EmulationError, match=r"deadlock(.|\n)*warp 0: .*barrier\.cluster\.wait.*: waits"):
        result(body, 64, Options(host_threads=2))


@pytest.mark.parametrize("instruction", ["bar.warp.sync 0xffffffff;", "bar.red.popc.u32 %r0, 1, 64, %q1;"])
def test_a_deadlock_names_the_barrier(instruction: str) -> None:
    body = f"setp.ne.u32 %q1, %tid, 0; @%q1 bra END; SPIN: {instruction} END: bar.warp.sync 0xffffffff;"
    with pytest.raises(EmulationError, match="deadlock") as caught:
        result(body)
    assert "waits for the other lanes of its warp before barrier 1" in str(caught.value) or "bar.warp" in instruction
    assert "bar.warp.sync 0xffffffff (kernel.cu:7): waits for other lanes of its warp" in str(caught.value)


def test_tiles_are_counted_once_however_lanes_diverge() -> None:
    body = """
      mov.u32 %r0, 0;
      setp.ge.u32 %q1, %lane, 16;
      @%q1 bra LATE;
      pmevent 1; pmevent 2; add.u32 %r0, %r0, 1; pmevent 3;
      bra END;
    LATE:
      pmevent 1; pmevent 2; add.u32 %r0, %r0, 1; pmevent 3;
    END:
    """
    counters = run(body, [], threads=32)
    assert (counters.interior_tiles, counters.shell_tiles) == (0, 1)


def test_a_seed_repeats_its_run() -> None:
    # Order of atomic increments shows the schedule.
    module = module_of("atom.global.add.u32 %r0, [%p1], 1;".replace("1;", "%r1;") + STORE, 2)

    def order(seed: int) -> list[int]:
        out, turns = np.zeros(256, np.uint32), np.zeros(1, np.uint32)
        module.launch([1], [256], [out, turns], options=Options("random", "random", seed))
        return list(out)

    assert order(1) == order(1)


def test_a_hang_without_blocking_is_noticed() -> None:
    body = "SPIN: ld.global.u32 %r1, [%p0]; setp.eq.u32 %q1, %r1, 0; @%q1 bra SPIN;"
    with pytest.raises(EmulationError, match="hung"):
        result(body, options=Options(patience=100_000))


def test_ctas_on_several_host_threads() -> None:
    out = np.zeros(64, np.uint32)
    total = np.zeros(1, np.uint32)
    body = """
      mov.u32 %r1, %ctaid.x;
      mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, %p0;
      st.global.u32 [%d1], %r1;
      red.global.add.u32 [%p1], %r1;
    """
    run(body, [out, total], threads=32, grid=64, options=Options(host_threads=3))
    np.testing.assert_array_equal(out, np.arange(64))
    assert total[0] == 32 * np.arange(64).sum()
