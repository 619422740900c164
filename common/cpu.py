"""What makes a CPU fast: training steps in fewer passes over memory, packed and 8-bit linear layers, memory settings."""

import contextlib
import ctypes
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# -----------------------------------------------------------------------------
# Training


def trains_on_cpu(x) -> bool:
    """Whether x is part of a training step on a CPU, where this file's functions replace torch's chains of small kernels."""
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return x.device.type == "cpu" and eager and x.dtype in (torch.float32, torch.bfloat16)


def manual_attention(q, k, v, mask, dropout: float):
    """softmax(q k^T / sqrt(D)) v written out. q (B, H, T, D), k and v (B, K, S, D), mask bool (T, S) or None."""
    (B, H, T, D), K, S = q.shape, k.size(1), k.size(2)
    scale = D**-0.5
    if q.dtype == torch.float16:  # scale before the product, which could overflow
        q, scale = q * scale, 1
    bias = q.new_zeros(T, S)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    q = q.reshape(B, K, H // K * T, D)  # query heads that share a key/value head, stacked along T
    scores = torch.add(bias.repeat(H // K, 1), q @ k.transpose(-2, -1), alpha=scale)  # (B, K, H/K T, S)
    return (F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v).view(B, H, T, D)


def dropout_mask(x, p: float):
    """0 with probability p, else 1, of x's shape and dtype.

    It compares 16 random bits, so p is rounded to 1/65,536; torch's bernoulli_ takes three times as long.
    """
    n = x.numel()
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n].view(x.shape)
    return torch.ge(bits, min(round(p * 2**16) - 2**15, 2**15 - 1), out=torch.empty(x.shape, dtype=x.dtype))


class Dropout(nn.Dropout):
    """torch's, with a faster way to draw the mask on a CPU."""

    def forward(self, x):
        if self.training and self.p and trains_on_cpu(x):
            return x * dropout_mask(x, self.p) * (1 / (1 - self.p))
        return super().forward(x)


class BlockAttention(torch.autograd.Function):
    """Causal attention of T queries to T keys in blocks of rows, without the products of a block with the keys after it.

    q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D). Keeps the softmax of each block, about half of (B, H, T, T), and with
    dropout as much again.
    """

    ROWS = 128  # in a block

    @staticmethod
    def forward(ctx, q, k, v, dropout: float):
        (B, H, T, D), K = q.shape, k.size(1)
        q = q.reshape(B * K, H // K, T, D)  # a row of query heads for each key/value head
        k, v = k.reshape(B * K, T, D), v.reshape(B * K, T, D)
        y, softmaxes, kept = torch.empty_like(q), [], []
        for start in range(0, T, BlockAttention.ROWS):
            rows = q[:, :, start : start + BlockAttention.ROWS]
            n, stop = rows.size(2), start + rows.size(2)
            scores = (rows.flatten(1, 2) @ k[:, :stop].mT).mul_(D**-0.5)  # (B K, H/K n, stop)
            scores[:, :, start:] += torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1).repeat(H // K, 1)
            p = scores.softmax(-1)
            softmaxes.append(p)
            if dropout:
                kept.append(dropout_mask(p, dropout))
                p = (p * kept[-1]).mul_(1 / (1 - dropout))
            y[:, :, start:stop] = (p @ v[:, :stop]).view_as(rows)
        ctx.save_for_backward(q, k, v, *softmaxes, *kept)
        ctx.factor = 1 / (1 - dropout)
        return y.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        blocks = -(-q.size(2) // BlockAttention.ROWS)
        B, K = len(grad), len(k) // len(grad)
        dy, dq, dk, dv = grad.reshape(q.shape), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        stop = 0
        for p, kept in itertools.zip_longest(saved[:blocks], saved[blocks:]):
            start, stop = stop, p.size(-1)
            block = (slice(None), slice(None), slice(start, stop))
            rows, dy_rows = q[block].flatten(1, 2), dy[block].flatten(1, 2)
            dp = dy_rows @ v[:, :stop].mT
            if kept is not None:
                dp.mul_(kept).mul_(ctx.factor)
            dv[:, :stop].baddbmm_((p if kept is None else p * kept).mT, dy_rows, alpha=ctx.factor)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[block] = (ds @ k[:, :stop]).view_as(dq[block])
            dk[:, :stop].baddbmm_(ds.mT, rows)
        scale, shape = q.size(-1) ** -0.5, (B, K, *k.shape[1:])
        return dq.mul_(scale).view_as(grad), dk.mul_(scale).view(shape), dv.view(shape), None


def block_attention_is_faster(q, k, dropout: float) -> bool:
    """Whether to use BlockAttention: to train with dropout, or in bfloat16 on up to 512 positions (BENCHMARKS.md)."""
    return (
        trains_on_cpu(q)
        and 1 < q.size(2) == k.size(2)
        and (dropout > 0 or q.dtype == torch.bfloat16 and k.size(2) <= 512)
    )


def manual_attention_is_faster(q, S: int) -> bool:
    """Whether to write attention out for queries q (B, H, T, D) and S positions, where block_attention_is_faster says no.

    Without a gradient the fused kernel is slow in bfloat16 up to 256 positions (BENCHMARKS.md).
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.size(2) and S <= 256


class ReluSquared(torch.autograd.Function):
    """relu(x)^2. Its backward pass is two kernels; torch's is four, one of them the slow pow."""

    @staticmethod
    def forward(ctx, x):
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, for x (..., C) and weight (C,) of x's dtype, or None. The mean is float32."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        y = x * scale.to(x.dtype)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        product = grad * x  # (..., C)
        dw = None
        if weight is None:
            dot, dx = product.sum(-1, keepdim=True, dtype=torch.float32), grad * scale.to(x.dtype)
        else:
            rows = product.flatten(0, -2)
            dot = (rows @ weight).float().view_as(scale)
            if ctx.needs_input_grad[1]:
                dw = scale.to(x.dtype).flatten() @ rows
            dx = (grad * weight).mul_(scale.to(x.dtype))
        return dx.addcmul_(x, (dot * scale**3 / -x.size(-1)).to(x.dtype)), dw, None


class Rotate(torch.autograd.Function):
    """model.rotate, whose gradient is the rotation by the opposite angle. x (B, H, T, D), cos and sin (T, D/2)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Rotate.turn(grad, *ctx.saved_tensors, -1), None, None

    @staticmethod
    def turn(x, cos, sin, sign: int):
        """x rotated by the angle, or by its opposite with sign -1."""
        half = cos.size(-1)
        y = x * torch.cat((cos, cos), dim=-1)
        y[..., :half].addcmul_(x[..., half:], sin, value=-sign)
        y[..., half:].addcmul_(x[..., :half], sin, value=sign)
        return y


def fused_loss_is_faster(x, vocab_size: int) -> bool:
    """Whether to use fused_linear_cross_entropy for the head's input x: training on a CPU, with a vocabulary of at least 512."""
    return trains_on_cpu(x) and vocab_size >= 512 and head_dtype(x) != torch.float16


def head_dtype(x) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def fused_linear_cross_entropy(x, weight, targets, vocab_size: int, label_smoothing=0.0):
    """Mean cross-entropy of the logits x W^T, without ever holding all of them.

    x (N, C), weight (at least vocab_size, C), targets integer (N,), -1 is ignored. Returns a scalar in nats.
    torch.nn.functional.linear_cross_entropy (torch 2.13) takes 2.1 times as long on this (BENCHMARKS.md).
    """
    return FusedLinearCrossEntropy.apply(x.to(head_dtype(x)), weight, targets, vocab_size, label_smoothing)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients together, in chunks of rows, so the (N, V) logits are never materialised.

    Within a chunk the logits become their softmax and then their gradient in place. In bfloat16 the gradient of the weight is
    fastest as its transpose, which a copy turns for each chunk; in float32 it is added in place, so chunks may be smaller.
    """

    buffers: dict[str, torch.Tensor] = {}

    @staticmethod
    def buffer(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A scratch buffer that is reused: page-faulting a fresh one costs more than the arithmetic, and freeing it
        fragments the heap."""
        found = FusedLinearCrossEntropy.buffers.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            found = FusedLinearCrossEntropy.buffers[name] = torch.empty(shape, dtype=dtype)
        return found

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, targets, vocab_size: int, smoothing: float):
        buffer, in_place = FusedLinearCrossEntropy.buffer, x.dtype == torch.float32
        chunk_rows = max(512, 2**17 // x.size(1)) if in_place else 2048
        w = weight[:vocab_size].to(x.dtype)  # (V, C)
        valid = targets >= 0
        loss_sum = torch.zeros((), dtype=torch.float64)
        dx, dw = torch.empty_like(x), weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None
        logits_buffer = buffer("logits", x.dtype, min(chunk_rows, len(x)), vocab_size)
        dw_buffer = None if in_place else buffer("dw", x.dtype, x.size(1), vocab_size)  # (C, V)
        for start in range(0, len(x), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            rows, mask = x[chunk], valid[chunk]
            at_target = torch.arange(len(rows)), targets[chunk].clamp(min=0)
            p = torch.mm(rows, w.t(), out=logits_buffer[: len(rows)])  # (chunk, V)
            if smoothing:  # loss += smoothing * (target logit - mean logit)
                mean_minus_target = p.mean(-1).float() - p[at_target]
            torch.softmax(p, -1, out=p)
            p_target, p[at_target] = p[at_target].float(), 0
            p_rest = p.sum(-1).float()  # 1 - p_target, but accurate where p_target is close to 1
            losses = torch.where(p_rest < 0.5, -torch.log1p(-p_rest), -p_target.log())
            if (underflow := (p_target < 1e-30) & mask).any():
                logits = torch.mm(rows[underflow], w.t()).float()
                losses[underflow] = F.cross_entropy(logits, targets[chunk][underflow], reduction="none")
            p[at_target] = -p_rest.to(p.dtype)  # p is now d(loss) / d(logits)
            if smoothing:
                losses -= smoothing * mean_minus_target
                p -= smoothing / vocab_size
                p[at_target] += smoothing
            if not mask.all():
                p[~mask] = 0
            loss_sum += losses.where(mask, 0).sum()
            torch.mm(p, w, out=dx[chunk])
            if dw is not None and in_place:
                dw[:vocab_size].addmm_(p.t(), rows, beta=float(start > 0))
            elif dw is not None:
                torch.mm(rows.t(), p, out=dw_buffer)
                if start:
                    dw[:vocab_size] += dw_buffer.t()
                else:
                    dw[:vocab_size] = dw_buffer.t()
        if dw is not None:
            dw[vocab_size:] = 0
        ctx.count = valid.sum()
        ctx.save_for_backward(dx, dw)
        return (loss_sum / ctx.count).float()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.count
        return dx * scale, None if dw is None else dw.mul_(scale), None, None, None


# -----------------------------------------------------------------------------
# Decoding


class PackedLinear(nn.Module):
    """A linear layer with its weights in oneDNN's layout, which streams 1.5x faster than a plain matrix for one row.

    gelu: "tanh" or "none" also applies that approximation of GELU, in the same kernel.
    """

    def __init__(self, layer: nn.Linear, gelu: str = ""):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 1)
        self.bias, self.epilogue = layer.bias, ("gelu", [], gelu) if gelu else ("none", [], "")

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, *self.epilogue)


def packed_linear_is_available(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and one scale per output row, widened for the product, which saves memory only.

    x (..., in) -> (..., out) in x's dtype. Symmetric rounding to 255 levels, as LLM.int8()'s vector-wise weights
    (https://arxiv.org/abs/2208.07339).
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
        self.register_buffer("scale", scale.bfloat16().float())  # so that it can be a bfloat16 number
        self.register_buffer("weight", (weight / self.scale[:, None]).round().to(torch.int8))  # (out, in)
        self.bias = layer.bias

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class PackedInt8Linear(nn.Module):
    """The same for a CPU that multiplies 8-bit numbers (VNNI): each row of x becomes two 8-bit rows, as exact as 16 bits.

    The first is 127 x / max|x| + 128, rounded: the instruction multiplies unsigned by signed numbers. The second is what rounding
    left over, 254 times finer. One row alone costs SmolLM2 0.04 nats (BENCHMARKS.md).
    Up to four rows in bfloat16 are faster in a kernel that reads a second copy of the weights and widens it, except in the head.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        plain = Int8Linear(layer)
        self.weight = torch.ops.onednn.qlinear_prepack(plain.weight, None)
        self.scale, self.zero = plain.scale, torch.zeros_like(plain.scale, dtype=torch.int32)
        self.offset = torch.tensor(128.5)  # half a step more, because the conversion to integers rounds down
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        out_features, in_features = plain.weight.shape
        fits = out_features < 2**14 and in_features % 64 == 0  # where 16 does not divide in_features, it crashes
        self.few_rows = (plain.weight, plain.scale.bfloat16()) if fits else None

    def forward(self, x):
        if self.few_rows and x.dtype == torch.bfloat16 and x.numel() <= 4 * x.size(-1):
            y = torch._weight_int8pack_mm(x.reshape(-1, x.size(-1)), *self.few_rows).view(*x.shape[:-1], -1)
            return y if self.bias is None else y.add_(self.bias)
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min_(1e-12)  # (..., 1)
        first = torch.addcmul(self.offset, x.float(), scale.reciprocal())
        rows = torch.empty(2, *x.shape, dtype=torch.uint8)
        rows[0], rows[1] = first, first.frac().mul_(254).add_(1.5)  # 254 (x / scale - its rounding) + 128.5
        y = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y[0].add_(y[1], alpha=1 / 254).mul_(scale)  # in place: of a vocabulary's logits there are two already
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


def int8_products_are_available(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


# -----------------------------------------------------------------------------
# Memory


def tune_malloc() -> None:
    """Make glibc keep freed memory for large tensors, and back the first 1.9 GB of it with huge pages.

    By default malloc maps each large tensor anew and the kernel zeroes its pages, a sixth of a training step; 4 KiB pages
    cost a tenth of decoding (BENCHMARKS.md). No memory is taken before it is used. Does nothing where glibc is missing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError, RuntimeError):  # musl, macOS, Windows, a memory limit
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        room = torch.empty(1900 * 2**20, dtype=torch.uint8)  # freed on return, but the advice stays on its pages
        begin, size = -(-room.data_ptr() // 2**21) * 2**21, 1898 * 2**20
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 14)  # MADV_HUGEPAGE
