"""A block as of HunyuanVideo: video tokens with windows and padded text, in one softmax, one sequence, no mask."""

import gnaforge
import torch
from torch import nn

FRAMES, HEIGHT, WIDTH, TEXT = 4, 8, 8, 12


class Block(nn.Module):
    """Attention over video, then text; a feed-forward layer beside it, as in single-stream blocks."""

    def __init__(self, channels: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU())
        self.out = nn.Linear(3 * channels, channels)

    def forward(self, tokens: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
        """``tokens``: ``[batch, frames * height * width + text, channels]``; ``text_lengths``: int32 ``[batch]``."""
        x = self.norm(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = gnaforge.joint_attention(
            q,
            k,
            v,
            grid=(FRAMES, HEIGHT, WIDTH),
            suffix=TEXT,
            lengths=text_lengths,
            kernel_size=(3, 5, 5),
            stride=(1, 2, 2),
        )
        return tokens + self.out(torch.cat([attended.flatten(2), self.mlp(x)], -1))


torch.manual_seed(0)
block = Block()
tokens = torch.randn(2, FRAMES * HEIGHT * WIDTH + TEXT, 64)
lengths = torch.tensor([12, 5], dtype=torch.int32)
with torch.no_grad():
    out = block(tokens, lengths)
    # What padding holds reaches nobody else.
    changed = tokens.clone()
    changed[1, -7:] = 100.0
    again = block(changed, lengths)
assert torch.equal(out[:, :-7], again[:, :-7])
print(f"{tuple(out.shape)}: the second prompt's padding changed nothing but itself")
