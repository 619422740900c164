"""RoPE's angles (https://arxiv.org/abs/2104.09864), and three ways to stretch them over a longer context than was trained.

`c` is a GPTConfig. The context was trained at c.rope_original positions and is stretched c.rope_factor times:

    linear    every frequency / factor (https://arxiv.org/abs/2306.15595)
    llama3    frequencies that turn less than rope_low times in the trained context / factor; those above rope_high times as
              they are; in between mixed (Llama 3.1)
    yarn      the same idea, mixed over dimensions instead of frequencies, and attention sharpened (https://arxiv.org/abs/2309.00071)
"""

import math

import torch


def check_scaling(c) -> None:
    """Fill in what rope_scaling leaves to a default. Raises ValueError for fields that do not fit together."""
    if c.rope_scaling == "none":
        if (c.rope_factor, c.rope_original, c.rope_low, c.rope_high) != (1, 0, 1, 0):
            raise ValueError(
                f"--rope_factor={c.rope_factor}: it needs --rope_scaling, and so do rope_original, rope_low, rope_high"
            )
        return
    c.rope_original = c.rope_original or max(1, round(c.block_size / c.rope_factor))
    c.rope_high = c.rope_high or {"llama3": 4.0, "yarn": 32.0}.get(c.rope_scaling, 0.0)
    if c.pos != "rope":
        raise ValueError(f"--rope_scaling={c.rope_scaling} needs --pos=rope")
    if c.rope_scaling == "yarn" and c.rope_base <= 1:
        raise ValueError(f"--rope_base={c.rope_base}: --rope_scaling=yarn needs more than 1")
    if c.rope_scaling != "linear" and not 0 < c.rope_low < c.rope_high:
        raise ValueError(f"--rope_low={c.rope_low}: must be above 0 and below --rope_high={c.rope_high}")


def rotary_table(c) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angle of each position and pair of channels, float32 (block_size, D/2) each."""
    with torch.device("cpu"):  # also for a model without memory: on the meta device these would import torch._dynamo
        frequency, scale = frequencies(c)
        angle = torch.outer(torch.arange(c.block_size, dtype=torch.float64), frequency)
        return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def frequencies(c) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of channels, float64 (D/2,), and the factor of cos and sin."""
    D = c.head_size
    frequency = c.rope_base ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    if c.rope_scaling == "none":
        return frequency, 1.0
    if c.rope_scaling == "linear":
        return frequency / c.rope_factor, 1.0
    if c.rope_scaling == "llama3":
        turns = c.rope_original * frequency / (2 * math.pi)  # in the trained context
        kept = ((turns - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / c.rope_factor), 1.0

    def pair_that_turns(times: float) -> float:  # its index in the table, not rounded
        return D * math.log(c.rope_original / (times * 2 * math.pi)) / (2 * math.log(c.rope_base))

    first = max(math.floor(pair_that_turns(c.rope_high)), 0)
    last = min(math.ceil(pair_that_turns(c.rope_low)), D - 1)
    stretched = ((torch.arange(D // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (1 - stretched + stretched / c.rope_factor), 0.1 * math.log(max(1.0, c.rope_factor)) + 1
