"""A video that grows frame by frame, from a rolling cache of keys: the last four frames, and the first one for good.

The cache holds the sink's tokens in front and the window's behind them; each new frame is one call, whose queries begin
where the video ends. At the end, all frames at once give the same.
"""

import gnaforge
import torch

TOKENS, WINDOW, HEADS, DIM = 24, 4, 2, 32  # tokens of a frame, frames of a window

torch.manual_seed(0)
frames = torch.randn(10, 3, 1, TOKENS, HEADS, DIM)  # of each frame, what a model makes q, k and v of
sink = cache = None  # keys and values
outputs = []
for number, frame in enumerate(frames):
    query, new = frame[0], frame[1:]
    sink = new if sink is None else sink
    cache = new if cache is None else torch.cat([cache, new], 2)[:, :, -WINDOW * TOKENS :]
    first = max(number + 1 - WINDOW, 0) * TOKENS  # where the cache begins
    key, value = torch.cat([sink, cache], 2) if first else cache
    out = gnaforge.na1d(
        query,
        key,
        value,
        kernel_size=WINDOW * TOKENS,
        stride=TOKENS,
        is_causal="block",
        sink=TOKENS,
        grid=(number + 1) * TOKENS,
        q_offset=number * TOKENS,
        kv_offset=first,
        kv_sink=TOKENS if first else 0,
    )
    outputs.append(out)
    print(f"frame {number}: {key.shape[1]} keys")

query, key, value = frames.transpose(0, 1).permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
whole = gnaforge.na1d(query, key, value, WINDOW * TOKENS, stride=TOKENS, is_causal="block", sink=TOKENS)
torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
print("all frames at once give the same")
