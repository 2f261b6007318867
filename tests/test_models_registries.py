"""LightX2V and vLLM-Omni: attentions that their registries hand out, against SDPA with the whole mask.

Neither installs here (vLLM is for GPUs; LightX2V is in no index, and wants an older torch), so these tests go
by the interfaces that they publish: see published_registries.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gnaforge.errors import InputError
from gnaforge.models import lightx2v, vllm_omni
from gnaforge.models.schedule import Pattern, Schedule
from gnaforge.runtime.problem import Problem
from oracle import mask
from published_registries import AttentionMetadata, VideoTokenLayout, install_lightx2v, install_vllm_omni
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("kernel_set", "one_thread")
GRID, HEADS, DIM = (4, 6, 5), 3, 16
TOKENS = 4 * 6 * 5
LOCAL = Pattern((-1, 3, 3))
HEADS_APART = Pattern(((4, 3, 3), (2, 6, 5), (4, 6, 5)), stride=(1, 2, 1))


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *windows: Any, prefix: int = 0, scale: float | None = None
) -> torch.Tensor:
    """Of ``[batch, tokens, heads, head_dim]``; a window and stride for each head, or for all."""
    masks = []
    for window, stride in windows:
        whole = torch.ones(prefix + TOKENS, prefix + TOKENS, dtype=torch.bool)
        whole[prefix:, prefix:] = torch.from_numpy(mask(Problem(GRID, window, stride)))
        masks.append(whole)
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*tensors, attn_mask=torch.stack(masks), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


LOCALLY = [((4, 3, 3), 1)]
APART = [((4, 3, 3), (1, 2, 1)), ((2, 6, 5), (1, 2, 1)), ((4, 6, 5), (1, 2, 1))]
ALL = [(GRID, 1)]


class TestLightX2V:
    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        return install_lightx2v(monkeypatch)

    def call(self, registry: Any, block: int, step: int = 0, name: str = "gnaforge", **more: Any) -> Any:
        """As Wan's self-attention calls it; the tensors and the result."""
        q, k, v = randn(3, TOKENS, HEADS, DIM).unbind()
        ends = torch.tensor([0, TOKENS], dtype=torch.int32)
        given = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": TOKENS, "max_seqlen_kv": TOKENS}
        scheduler = SimpleNamespace(step_index=step)
        given |= {"block_idx": block, "scheduler": scheduler, "grid_sizes": GRID, "sol_morton_preordered": False}
        return (q, k, v), registry[name]().apply(q=q, k=k, v=v, **{**given, **more})

    def test_layers_steps_and_heads(self, registry: Any) -> None:
        lightx2v.register(Schedule([LOCAL, HEADS_APART, None], dense_steps=1), layers=3, steps=4)
        for step in (0, 1):
            for block, windows in enumerate((LOCALLY, APART, ALL)):
                (q, k, v), out = self.call(registry, block, step)
                want = expected(q[None], k[None], v[None], *(windows if step else ALL))[0].flatten(1)
                assert out.shape == (TOKENS, HEADS * DIM)
                torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)

    def test_it_is_a_weight_without_weights(self, registry: Any) -> None:
        found = lightx2v.register(LOCAL, name="other")
        own = registry["other"]()
        assert isinstance(own, found) and own.state_dict() == {} and own.weight_name == "other"
        lightx2v.register(HEADS_APART, name="other")  # takes the place of its own
        (q, k, v), out = self.call(registry, 0, name="other")
        want = expected(q[None], k[None], v[None], *APART)[0].flatten(1)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"grid_sizes": None}, RuntimeError, "gnaforge, block 0: windows need grid_sizes"),
            ({"grid_sizes": (4, 6, 6)}, ValueError, "there are 120 tokens, and the grid (4, 6, 6) has 144"),
            ({"scheduler": None}, RuntimeError, "doesn't say the step"),
            ({"block_idx": None}, RuntimeError, "doesn't say its layer"),
            ({"block_idx": 3}, InputError, "is layer 3, and the schedule has 2"),
            ({"causal": True}, NotImplementedError, "neither a mask, dropout nor causal"),
            ({"cu_seqlens_q": torch.tensor([0, 60, 120])}, NotImplementedError, "self-attention of one sample"),
        ],
    )
    def test_what_calls_refuse(self, registry: Any, given: Any, error: type[Exception], message: str) -> None:
        lightx2v.register(Schedule({(0, 0): LOCAL, (0, 1): LOCAL}), layers=2)
        with pytest.raises(error) as raised:
            self.call(registry, 0, **given)
        assert message in str(raised.value)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"name": "torch_sdpa"}, "name: LightX2V has an attention 'torch_sdpa'"),
            ({"dense": "flash_attn9"}, "dense: LightX2V has no attention 'flash_attn9', only torch_sdpa"),
            ({"schedule": [LOCAL], "layers": 1}, "it is a Schedule or a Pattern"),
            ({"schedule": Schedule([LOCAL, None]), "layers": 3}, "the schedule is for 2 layers"),
        ],
    )
    def test_what_register_refuses(self, registry: Any, given: Any, message: str) -> None:
        before = dict(registry)
        with pytest.raises(InputError) as raised:
            lightx2v.register(**{"schedule": LOCAL, **given})
        assert message in str(raised.value) and registry == before


class TestVllmOmni:
    @pytest.fixture
    def omni(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        return install_vllm_omni(monkeypatch)

    def layer(self, omni: Any, prefix: str = "blocks.0.attn1", **more: Any) -> Any:
        """As vLLM-Omni's `Attention` makes one."""
        given = {"num_heads": HEADS, "head_size": DIM, "softmax_scale": 0.3, "causal": False, "num_kv_heads": HEADS}
        given |= {"qkv_layout": "BSND", "prefix": prefix, "backend_kwargs": None, "role": "self"}
        given["backend_explicit"] = True
        backend = omni.enum["TORCH_SDPA"].get_class()
        assert backend.get_name() == "TORCH_SDPA"
        return backend.get_impl_cls()(**{**given, **more})

    def test_layers_steps_and_heads(self, omni: Any) -> None:
        vllm_omni.register(Schedule([LOCAL, HEADS_APART, None], dense_steps=1), layers=3)
        q, k, v = randn(3, 2, TOKENS, HEADS, DIM).unbind()
        call = AttentionMetadata(video_layout=VideoTokenLayout(0, GRID, TOKENS))
        for step in (0, 1):
            omni.state.context = SimpleNamespace(denoise_step_idx=step)
            for block, windows in enumerate((LOCALLY, APART, ALL)):
                out = self.layer(omni, f"blocks.{block}.attn1").forward(q, k, v, call)
                want = expected(q, k, v, *(windows if step else ALL), scale=0.3)
                torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)

    def test_text_before_and_padding_behind(self, omni: Any) -> None:
        vllm_omni.register(LOCAL)
        q, k, v = randn(3, 2, 7 + TOKENS + 9, HEADS, DIM).unbind()
        k, v = k[:, :, :1], v[:, :, :1]  # GQA
        valid = torch.arange(7 + TOKENS + 9) < 7 + TOKENS
        layout = VideoTokenLayout(7, GRID)
        out = self.layer(omni, num_kv_heads=1).forward(
            q, k, v, AttentionMetadata(valid.expand(2, -1), video_layout=layout)
        )
        want = expected(*(x[:, : 7 + TOKENS] for x in (q, k, v)), *LOCALLY, prefix=7, scale=0.3)
        torch.testing.assert_close(out[:, : 7 + TOKENS], want, atol=1e-5, rtol=1e-5)
        assert out.shape == q.shape and not out[:, 7 + TOKENS :].any()

    def test_cross_attention_is_left_alone(self, omni: Any) -> None:
        vllm_omni.register(LOCAL)
        q, k = randn(2, TOKENS, HEADS, DIM), randn(2, 11, HEADS, DIM)
        out = self.layer(omni, "blocks.0.attn2", role="cross").forward(q, k, k, None)
        tensors = (x.transpose(1, 2) for x in (q, k, k))
        torch.testing.assert_close(out, scaled_dot_product_attention(*tensors, scale=0.3).transpose(1, 2))

    def test_it_can_be_taken_out(self, omni: Any) -> None:
        vllm_omni.register(LOCAL, backend="SAGE_ATTN")
        assert omni.enum["SAGE_ATTN"].get_class().get_name() == "SAGE_ATTN"
        assert omni.enum["TORCH_SDPA"].get_class().get_name() == "SDPA"
        vllm_omni.register(LOCAL)
        omni.enum["TORCH_SDPA"].clear_override()
        assert omni.enum["TORCH_SDPA"].get_class().get_name() == "SDPA"

    @pytest.mark.parametrize(
        ("call", "layer", "error", "message"),
        [
            (None, {}, RuntimeError, "blocks.0.attn1: the model publishes no video_layout"),
            ({"video_layout": VideoTokenLayout()}, {}, RuntimeError, "publishes no video_layout"),
            ({"video_layout": VideoTokenLayout(video_spans=(1, 2))}, {}, NotImplementedError, "several videos"),
            ({"video_layout": VideoTokenLayout(8, GRID)}, {}, RuntimeError, "its layout has 128 tokens"),
            ({"joint_key": torch.zeros(1)}, {}, NotImplementedError, "joint tensors"),
            ({"full_attn_spans": [[(0, 3)]]}, {}, NotImplementedError, "spans"),
            ({}, {"causal": True}, NotImplementedError, "causal=True"),
            ({}, {"prefix": ""}, RuntimeError, "attention doesn't say its layer"),
            ({}, {"prefix": "blocks.7.attn1"}, InputError, "is layer 7, and the schedule has 2"),
        ],
    )
    def test_what_calls_refuse(self, omni: Any, call: Any, layer: Any, error: type[Exception], message: str) -> None:
        vllm_omni.register(Schedule([LOCAL, LOCAL]))
        q = randn(2, TOKENS, HEADS, DIM)
        if call is not None:
            call = AttentionMetadata(**{"video_layout": VideoTokenLayout(0, GRID), **call})
        with pytest.raises(error) as raised:
            self.layer(omni, **layer).forward(q, q, q, call)
        assert message in str(raised.value)

    def test_steps_come_from_the_forward_context(self, omni: Any) -> None:
        vllm_omni.register(Schedule(LOCAL, dense_steps=1))
        q = randn(2, TOKENS, HEADS, DIM)
        with pytest.raises(RuntimeError, match="doesn't say the step"):
            self.layer(omni).forward(q, q, q, AttentionMetadata(video_layout=VideoTokenLayout(0, GRID)))

    def test_what_register_refuses(self, omni: Any) -> None:
        with pytest.raises(InputError, match="backend: vLLM-Omni has no 'CUSTOM', only FLASH_ATTN, TORCH_SDPA"):
            vllm_omni.register(LOCAL, backend="CUSTOM")
