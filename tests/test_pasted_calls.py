"""The call that an error tells the user to paste says the problem, of each kind of call, and makes what serves it."""

from __future__ import annotations

import json

import gnaforge
import pytest
from gnaforge import registration
from gnaforge.families import families_of
from gnaforge.runtime.config import KernelConfig

KINDS = """
import json, torch, gnaforge

def x(*shape):
    return torch.randn(*shape, 2, 16)

i32 = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
image, text, packed = x(1, 12, 10), x(1, 7), x(1, 127)
wide = x(1, 12, 10).repeat(1, 1, 1, 2, 1)
KINDS = {
    "plain": lambda: gnaforge.na2d(image, image, image, (5, 4), stride=(2, 1)),
    "edges": lambda: gnaforge.na2d(image, image, image, (5, 4), edge=("wrap", "cut"), sink=(0, 2)),
    "block causal": lambda: gnaforge.na2d(image, image, image, 4, 2, is_causal=("block", True)),
    "grouped heads": lambda: gnaforge.na2d(wide, image, image[..., :8], 4),
    "range": lambda: gnaforge.na2d(
        image[:, 2:5], image, image, (5, 4), grid=(24, 10), q_offset=(6, 0), kv_offset=(2, 0)),
    "before the grid": lambda: gnaforge.na1d(text, x(1, 17), x(1, 17), 6, edge="wrap", grid=20, kv_offset=-5),
    "cache": lambda: gnaforge.na1d(
        text[:, :2], text, text, 4, is_causal=True, sink=2, grid=40, q_offset=38, kv_offset=35, kv_sink=2),
    "cross attention": lambda: gnaforge.na1d(text, packed, packed, 127),
    "dense": lambda: gnaforge.attention(text, packed, packed),
    "extra keys": lambda: gnaforge.na2d(image, image, image, 4, additional_keys=text, additional_values=text),
    "windows per head": lambda: gnaforge.na2d(image, image, image, [(3, 3), (12, 1)], edge="cut"),
    "packed samples": lambda: gnaforge.na2d_varlen(packed[0], packed[0], packed[0], [(12, 10), (7, 1)], (3, 1)),
    "packed lengths": lambda: gnaforge.attention(text, text, text, seqlens_Q=[3, 4], seqlens_KV=[5, 2]),
    "packed text": lambda: gnaforge.joint_attention(packed, packed, packed, grid=(12, 10), prefix=7, kernel_size=5),
    "text on both sides": lambda: gnaforge.joint_attention(
        packed, packed, packed, grid=(5, 10), prefix=70, suffix=7, lengths=(i32(9), None), kernel_size=5),
    "text apart": lambda: gnaforge.joint_attention(image, image, image, text, text, text, kernel_size=5),
}

def advice(call):
    try:
        call()
    except gnaforge.NoKernelError as error:
        return str(error).split("register one with: ")[1].splitlines()[0]
"""
SAID = {
    "edges": 'window=(5, 4), edge=("wrap", "cut"), sink=(0, 2), heads=2',
    "block causal": 'window=(4, 4), stride=(2, 2), causal=("block", True), heads=2',
    "grouped heads": 'value_head_dim=8, dtype="fp32", arch="cpu", tokens=(12, 10), window=(4, 4), heads=4, kv_heads=2',
    "range": "window=(5, 4), grid=(24, 10), q_offset=(6, 0), kv_tokens=(12, 10), kv_offset=(2, 0), heads=2",
    "before the grid": 'window=6, edge="wrap", grid=20, kv_tokens=17, kv_offset=-5, heads=2',
    "cache": "window=4, causal=True, sink=2, grid=40, q_offset=38, kv_tokens=7, kv_offset=35, kv_sink=2, heads=2",
    "cross attention": "tokens=7, window=127, kv_tokens=127, heads=2",
    "extra keys": "window=(4, 4), extra_tokens=7, heads=2",
    "packed text": "tokens=(12, 10), window=(5, 5), extra_tokens=7, heads=2",
    "text on both sides": "tokens=(5, 10), window=(5, 5), extra_tokens=(70, 7), heads=2",
}


def test_each_kind_of_call_says_what_serves_it(forked, no_kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that the pasted call asks for are of the call's rank, dtype and head dims. None is compiled."""
    done = forked(KINDS + "print(json.dumps({kind: advice(call) for kind, call in KINDS.items()}))\n")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setattr(registration, "_have", lambda configs: None)
    features = families_of("gna_forward", "cpu")[0].features
    assert {"range", "kv_sink", "extra_keys"} <= set(features)
    for kind, call in said.items():
        assert call is not None and SAID.get(kind, "tokens=") in call, (kind, call)
        (key,) = eval(call, {"gnaforge": gnaforge})
        config = KernelConfig.parse(key)
        assert (config.op, config.arch, config.dtype) == ("gna_forward", "cpu", "fp32"), (kind, call)
        assert f"rank={config.rank}, head_dim=16" in call, (kind, call)


def test_what_is_pasted_serves_the_call(forked, no_kernels) -> None:
    """Joint attention, whose text rows and image rows lack a kernel each: two errors, two calls, and it runs."""
    done = forked(
        KINDS + 'for _ in range(2):\n    eval(advice(KINDS["text apart"]))\n'
        'print([out.shape for out in KINDS["text apart"]()], len(gnaforge.kernels()))\n'
    )
    assert done.stdout.endswith("[torch.Size([1, 12, 10, 2, 16]), torch.Size([1, 7, 2, 16])] 2\n"), done.stderr
