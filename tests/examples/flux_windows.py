"""FLUX with windows: text in front, an image of 16x16 tokens of which each sees 7x7, and all of the text.

A small random transformer stands for the real one, ``pipe.transformer``; the grid comes from ``img_ids``.
"""

import torch
from diffusers import FluxTransformer2DModel
from gnaforge.models.diffusers import sparsify

torch.manual_seed(0)
heads = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
sizes = {"in_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": False}
transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, **heads, **sizes).eval()

places = torch.zeros(16, 16, 3)
places[..., 1], places[..., 2] = torch.arange(16)[:, None], torch.arange(16)
inputs = {
    "hidden_states": torch.randn(1, 16 * 16, 16),
    "encoder_hidden_states": torch.randn(1, 32, 64),
    "pooled_projections": torch.randn(1, 32),
    "img_ids": places.flatten(0, 1),
    "txt_ids": torch.zeros(32, 3),
}


@torch.no_grad()
def sample(steps: int) -> torch.Tensor:
    """Some steps of sampling, from one noise at each call."""
    image = inputs["hidden_states"]
    for step in range(steps):
        timestep = torch.tensor([1 - step / steps])
        image = image - transformer(**inputs | {"hidden_states": image, "timestep": timestep}).sample / steps
    return image


dense = sample(3)
handle = sparsify(transformer, kernel_size=7, dense_steps=1)
sparse = sample(3)
print(handle.report())
handle.remove()
print(f"the image changed by {(sparse - dense).norm() / dense.norm():.1%}")
assert torch.equal(sample(3), dense)
