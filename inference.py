"""A model's weights as decoding wants them: in the run's dtype, packed for the CPU, or as 8-bit integers.

What is made here samples and evaluates; it is not trained and not saved.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

QUANTIZE = ("", "int8")


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN's kernels read them: one row goes through at the memory's speed."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 1)
        self.bias = layer.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights, a scale a row of the matrix; activations stay as they are. For decoding.

    Rounded to the nearest of 255 steps between a row's largest magnitudes, as LLM.int8()'s vector-wise weights
    (https://arxiv.org/abs/2208.07339). On a CPU in bfloat16 a few rows read half the bytes; elsewhere memory is saved,
    and time is not: the matrix is widened for its product.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = layer.weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(dtype))
        self.bias = layer.bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        # The kernel reads whole blocks of a row, beyond its end if it is not made of them.
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= 4 and x.size(-1) % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has packed layers for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def for_inference(model: nn.Module, device: torch.device, dtype: torch.dtype, quantize: str = "") -> nn.Module:
    """The model on the device, its weights in the dtype and its linear layers packed or, with quantize="int8", in 8 bits.

    It is changed in place and can no longer be trained or saved. Raises ValueError for another name.
    """
    if quantize not in QUANTIZE:
        raise ValueError(f"--quantize={quantize}: choose int8, or leave it out")
    model.merge_lora()
    model.requires_grad_(False).eval()
    if quantize:
        replace_linears(model, lambda layer: Int8Linear(layer, dtype))
    model.to(device, dtype)
    if packs(device, dtype):
        replace_linears(model, PackedLinear)
    return model


def replace_linears(model: nn.Module, new) -> None:
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear):
                setattr(module, name, new(layer))
