"""LoRA (https://arxiv.org/abs/2106.09685): train low-rank adapters on the blocks' linear layers and nothing else."""

import math

from model import GPT

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """y = x (W + scale B A)^T with W frozen, A (rank, in) random and B (out, rank) zero at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **like) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> nn.Linear:
        """A plain layer with the same output."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight.detach() + self.scale * (self.lora_b @ self.lora_a).detach())
        plain.bias = self.bias
        return plain


def add_lora(model: GPT, rank: int, alpha: float) -> None:
    """Freeze the model and add trainable low-rank matrices to every linear layer of its blocks."""
    model.config.lora_rank, model.config.lora_alpha = rank, alpha
    model.requires_grad_(False)
    for block in model.transformer.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            setattr(part, name, LoRALinear(getattr(part, name), rank, alpha))


def merge_lora(model: GPT) -> None:
    """Add the low-rank matrices to the weights, so that the model is a plain one again, all of it trainable."""
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in [*part.named_children()]:
                if isinstance(layer, LoRALinear):
                    setattr(part, name, layer.merged())
    model.config.lora_rank = 0
    model.requires_grad_(True)
