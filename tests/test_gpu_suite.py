"""The hardware suite notices what it is there to notice. That it passes is `test_sm90.py`'s matter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import checks
import oracle
import run as suite
from gnaforge.runtime.config import KernelConfig

CONFIG = KernelConfig.parse("gna_forward-sm90-r2-bf16-d8-q4x4-kv4x4")
PROBLEM = oracle.Problem((9, 11), (4, 3), (2, 1), (2, 1), (False, True), 2, 4, 2, 8, 8)


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_a_write_outside_of_a_tensor_is_noticed(layout: str) -> None:
    memory = checks.inputs(PROBLEM, torch.bfloat16, "cpu", layout, 0)[1]
    assert memory.view.isfinite().all() and memory.whole.isnan().any()
    if layout != "packed":  # where V's and Q's elements are outside of K
        memory.check_rest("key")
        assert memory.view.isfinite().all()
    outside = memory.whole.isnan().nonzero()
    for at in (outside[0], outside[len(outside) // 2], outside[-1]):
        memory.whole[at] = 1
        with pytest.raises(checks.Wrong, match="key: memory outside"):
            memory.check_rest("key")
        memory.whole[at] = torch.nan


def exact(problem: oracle.Problem, tensors: list[torch.Tensor], spoil: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a kernel's care: every key takes part in the products. ``spoil``: what is wrong with it."""
    q, k, v = (x.double() for x in tensors)
    if spoil == "head":
        k = k + 0 * k.sum(-2, keepdim=True)
    if spoil == "batch":
        q = q + 0 * q.sum(0, keepdim=True)
    found = oracle.reference(q, k.nan_to_num() if spoil == "hides" else k, v.nan_to_num(), *problem.pattern)
    return found[0].bfloat16(), found[1].float()


@pytest.mark.parametrize(
    ("spoil", "said"), [("", ""), ("head", "depends on"), ("batch", "depends on"), ("hides", "show it")]
)
def test_poison_finds_what_must_not_matter(monkeypatch: pytest.MonkeyPatch, spoil: str, said: str) -> None:
    monkeypatch.setattr(checks, "attend", lambda entry, problem, tensors, layout: exact(problem, tensors, spoil))
    for seed in range(5):
        made = checks.inputs(PROBLEM, torch.bfloat16, "cpu", "heads last", seed)
        clean = exact(PROBLEM, [memory.view for memory in made])
        arguments = (None, CONFIG, PROBLEM, "heads last", made, clean, seed)
        if said:
            with pytest.raises(checks.Wrong, match=said):
                checks.check_poison(*arguments)
        else:
            checks.check_poison(*arguments)


def test_tiles_that_hold_a_key() -> None:
    """Against the tiles that the oracle counts: summed over keys, each Q tile's queries see its visited boxes."""
    total = 0
    for key in ((i, j) for i in range(9) for j in range(11)):
        seen = checks.seeing(PROBLEM, key, "cpu")
        visited = checks.visiting(PROBLEM, CONFIG, key, "cpu")
        assert visited[seen].all()
        flat = key[0] * 11 + key[1]
        assert seen.flatten().tolist() == oracle.mask(PROBLEM)[:, flat].tolist()
        total += int(visited.sum())
    assert int(oracle.mask(PROBLEM).sum()) < total < 99 * 99


WORKER = """
import sys, time
for line in sys.stdin:
    if "hang" in line: time.sleep(60)
    if "die" in line: sys.exit(3)
    print('{"ok": true}', flush=True)
"""


def test_jobs_that_hang_or_die(tmp_path: Path) -> None:
    def ask(kind: str) -> dict[str, object]:
        worker = suite.Worker([sys.executable, "-c", WORKER], tmp_path / "log")
        assert worker.ask({"kind": "fine"}, 20) == {"ok": True}
        answer = worker.ask({"kind": kind}, 0.3)
        assert worker.process.poll() is not None
        return answer

    assert "it hangs" in str(ask("hang")["error"])
    assert "ended with status 3" in str(ask("die")["error"])
