"""A Neighborhood Attention Transformer of two blocks learns to take the noise out of images."""

import gnaforge
import torch
from torch import nn


class Block(nn.Module):
    """NAT's block (arXiv 2204.07143), or with a dilation DiNAT's (arXiv 2209.15001)."""

    def __init__(self, channels: int, heads: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = gnaforge.NeighborhoodAttention2D(channels, heads, kernel_size, dilation=dilation)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: ``[batch, height, width, channels]``."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(1, 32), Block(32, 2, 3), Block(32, 2, 3, dilation=2), nn.LayerNorm(32), nn.Linear(32, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of bright squares, with noise and without."""
    clean = torch.zeros(size, 10, 10, 1)
    for image in clean:
        row, column = torch.randint(0, 7, (2,)).tolist()
        image[row : row + 4, column : column + 4] = 1
    return clean + 0.5 * torch.randn_like(clean), clean


for step in range(41):
    noisy, clean = batch()
    loss = nn.functional.mse_loss(model(noisy), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
assert loss < 0.1  # the mean of all images makes 0.13, the noisy image itself 0.25
