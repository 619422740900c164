"""A GPT: the network, its KV cache and sampling, its parameter and FLOP counts. Needs torch alone.

The defaults are GPT-2's (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
and the module names are those of GPT-2 and nanoGPT, so their state dicts load. Every other choice is a field of GPTConfig.

Shapes: B batch, T tokens, C = n_embd, H query heads, K key/value heads, D = C / H, V vocabulary (padded inside to 64).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257  # ids that exist; the matrices are padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as GPT-2
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # gelu (tanh, as GPT-2) | gelu_erf (exact, as nanoGPT) | swiglu | relu2
    mlp_hidden: int = 0  # 0: 4 n_embd; for swiglu two thirds of it, which has as many parameters
    pos: str = "learned"  # learned | rope | none
    rope_base: float = 10000.0
    n_kv_head: int = 0  # key/value heads shared by groups of query heads; 0: n_head
    qk_norm: bool = False  # RMS-normalise queries and keys
    tie_weights: bool = True  # one matrix for the embedding and the head
    logit_softcap: float = 0.0  # c tanh(logits / c), as Gemma 2; 0: off
    init: str = "gpt2"  # gpt2 | zero_proj (zero: residual projections, an untied head; other matrices: 1/2 fan-in^-1/2)
    attn: str = "sdpa"  # sdpa | manual (the formula written out)
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time
    lora_rank: int = 0  # train low-rank additions to the blocks' matrices, and nothing else; 0: all weights
    lora_alpha: float = 16.0  # they count lora_alpha / lora_rank times

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.mlp_hidden:  # 8/3 n_embd, in a multiple of 8 that the matrix units like
            self.mlp_hidden = round(self.n_embd / 3) * 8 if self.mlp == "swiglu" else 4 * self.n_embd
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"--{key}={getattr(self, key)}: choose one of {', '.join(allowed)}")
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "mlp_hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"--{key}={getattr(self, key)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head={self.n_head} is not divisible by --n_kv_head={self.n_kv_head}")
        if self.pos == "rope" and self.head_size % 2:
            raise ValueError(f"--pos=rope needs an even head size, not n_embd/n_head = {self.head_size}")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(f"--lora_rank={self.lora_rank} --lora_alpha={self.lora_alpha}: at least 0, and above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout}: must be at least 0 and less than 1")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "gelu_erf", "swiglu", "relu2"),
    "pos": ("learned", "rope", "none"),
    "init": ("gpt2", "zero_proj"),
    "attn": ("sdpa", "manual"),
}


class Norm(nn.Module):
    """LayerNorm (bias optional) or RMSNorm over the last dimension, by config.norm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.rms, self.eps = config.norm == "rmsnorm", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias and not self.rms else None

    def forward(self, x):
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class KVCache:
    """Keys and values of every layer, (B, K, length, D) each, allocated once; the first `filled` positions are valid.

    A step whose shapes never change (see DecodeStep) sets `at`, integer (1,) on the device, the position it writes to, and
    `mask`, bool (1, reach), the positions it looks at.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, device, dtype):
        self.config = config
        shape = (batch, config.n_kv_head, length, config.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length, self.filled = length, 0
        self.at = self.mask = None

    def add(self, layer: int, k, v):
        """Store k, v (B, K, T, D) behind what is there; return all keys and values so far."""
        if self.at is not None:
            keys, values, reach = self.keys[layer], self.values[layer], self.mask.size(-1)
            keys.index_copy_(2, self.at, k.to(keys.dtype))
            values.index_copy_(2, self.at, v.to(keys.dtype))
            return keys[:, :, :reach], values[:, :, :reach]
        end = self.filled + k.size(2)
        self.keys[layer][:, :, self.filled : end] = k
        self.values[layer][:, :, self.filled : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def rows(self, chosen: torch.Tensor, length: int) -> "KVCache":
        """A cache with the chosen rows, integer (n,), of this one, and room for `length` positions."""
        first = self.keys[0]
        other = KVCache(self.config, len(chosen), length, first.device, first.dtype)
        other.filled = self.filled
        for mine, new in zip(self.keys + self.values, other.keys + other.values):
            new[:, :, : self.filled] = mine[chosen, :, : self.filled]
        return other


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        kv_width = config.n_kv_head * config.head_size
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * kv_width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, cache: KVCache | None = None, mask=None):
        c, (B, T, C) = self.config, x.shape
        H, K, D = c.n_head, c.n_kv_head, c.head_size
        q, k, v = self.c_attn(x).split((C, K * D, K * D), dim=2)
        q = q.view(B, T, H, D).transpose(1, 2)
        k = k.view(B, T, K, D).transpose(1, 2)
        v = v.view(B, T, K, D).transpose(1, 2)
        if c.qk_norm:
            q, k = F.rms_norm(q, (D,), eps=c.norm_eps), F.rms_norm(k, (D,), eps=c.norm_eps)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        past = 0
        if cache is not None:
            past, mask = cache.filled, cache.mask
            k, v = cache.add(self.layer, k, v)
            q = q.to(k.dtype)
        y = self.attend(q, k, v, past, mask)
        if cache is not None:
            y = y.to(x.dtype)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def attend(self, q, k, v, past: int, mask=None):
        """Causal attention of T queries, the last of past + T positions, or as a mask says (True: looked at).

        q (B, H, T, D), k and v (B, K, past + T, D), mask bool, broadcast to (B, 1, T, past + T)
        """
        T, S = q.size(2), k.size(2)
        dropout = self.config.dropout if self.training else 0.0
        grouped = q.size(1) != k.size(1)
        fused = self.config.attn == "sdpa" and not formula_is_faster(q, S, self.training)
        if mask is None and T > 1 and (past or not fused):
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(past)
        if fused:
            causal = T > 1 and mask is None
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)
        shape, groups = q.shape, q.size(1) // k.size(1)
        if grouped:  # the heads that share keys stand one below the other
            q = q.reshape(q.size(0), k.size(1), groups * T, q.size(-1))
        scale = 1 / math.sqrt(q.size(-1))
        if q.dtype == torch.float16:  # whose range is soon exceeded
            q, scale = q * scale, 1
        scores = q @ k.transpose(-2, -1)
        bias = scores.new_zeros(T, S)
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        scores = torch.add(torch.cat([bias] * groups, -2) if grouped else bias, scores, alpha=scale)
        return (F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v).view(shape)


def formula_is_faster(q, S: int, training: bool) -> bool:
    """On a CPU in bfloat16, for a while: the fused kernel's backward pass is slow (BENCHMARKS.md)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.size(2) and S <= (512 if training else 256)


def rotary_table(length: int, head_size: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (length, D/2) each, of RoPE's angles (https://arxiv.org/abs/2104.09864, eq. 15)."""
    frequency = base ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by position: Llama's order of the dimensions."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LoRALinear(nn.Linear):
    """A frozen linear layer and a trained addition of low rank, zero at first (https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        about = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **about) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **about))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self) -> nn.Linear:
        """One plain layer that does the same."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight.detach() + self.scale * (self.lora_b @ self.lora_a).detach())
        plain.bias = self.bias
        return plain


GELU = {"gelu": "tanh", "gelu_erf": "none"}  # by --mlp: how torch calls its approximation


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        width = 2 * config.mlp_hidden if self.kind == "swiglu" else config.mlp_hidden  # swiglu: gate and value in one
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))

    def activate(self, x):
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        if self.kind == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate=GELU[self.kind])


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache: KVCache | None = None, mask=None):
        x = x + self.attn(self.ln_1(x), rotary, cache, mask)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of logits x W^T that are never kept: 2048 rows at a time they become, in place, their softmax and
    then their gradient, in the same pass. x (N, C), W (padded V, C), targets (N,), of which -1 counts for nothing.
    """

    memory: dict[str, torch.Tensor] = {}

    @staticmethod
    def scratch(name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Memory taken once: fresh pages cost more than the sums on them, and blocks so large, freed between small ones that
        stay, tear holes into the heap."""
        if (found := HeadLoss.memory.get(name)) is None or found.shape != shape or found.dtype != like.dtype:
            found = HeadLoss.memory[name] = like.new_empty(shape)
        return found

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, targets, vocab_size: int, smoothing: float):
        w, known, total = weight[:vocab_size].to(x.dtype), targets >= 0, torch.zeros((), dtype=torch.float64)
        dx, dw = torch.empty_like(x), weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None
        block = HeadLoss.scratch("block", x, min(2048, len(x)), vocab_size)
        product = HeadLoss.scratch("product", x, x.size(1), vocab_size)
        for first in range(0, len(x), 2048):
            at = slice(first, first + 2048)
            rows, mask = x[at], known[at]
            own = torch.arange(len(rows)), targets[at].clamp(min=0)
            p = torch.mm(rows, w.t(), out=block[: len(rows)])
            if smoothing:
                above = p.mean(-1).float() - p[own]
            torch.softmax(p, -1, out=p)
            likely, p[own] = p[own].float(), 0
            rest = p.sum(-1).float()  # 1 - likely, exact where likely is close to 1
            losses = torch.where(rest < 0.5, -torch.log1p(-rest), -likely.log())
            if (far := (likely < 1e-30) & mask).any():  # rounded to nothing
                logits = torch.mm(rows[far], w.t()).float()
                losses[far] = F.cross_entropy(logits, targets[at][far], reduction="none")
            p[own] = -rest.to(p.dtype)  # the gradient of the loss in the logits
            if smoothing:
                losses -= smoothing * above
                p -= smoothing / vocab_size
                p[own] += smoothing
            if not mask.all():
                p[~mask] = 0
            total += losses.where(mask, 0).sum()
            torch.mm(p, w, out=dx[at])
            if dw is not None:
                torch.mm(rows.t(), p, out=product)
                if first:
                    dw[:vocab_size] += product.t()
                else:
                    dw[:vocab_size] = product.t()
        if dw is not None:
            dw[vocab_size:] = 0
        ctx.count = known.sum()
        ctx.save_for_backward(dx, dw)
        return (total / ctx.count).float()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.count
        return dx * scale, None if dw is None else dw.mul_(scale), None, None, None


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, C = config.padded_vocab_size, config.n_embd
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, C)})
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, C)
        elif config.pos == "rope":
            cos, sin = rotary_table(config.block_size, config.head_size, config.rope_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = Norm(config)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        if config.lora_rank:
            self.add_lora(config.lora_rank, config.lora_alpha)

    def add_lora(self, rank: int, alpha: float) -> None:
        """From here on only low-rank additions to the matrices of attention and MLP are trained; see LoRALinear."""
        self.config.lora_rank, self.config.lora_alpha = rank, alpha
        self.requires_grad_(False)
        for block in self.transformer.h:
            for part in (block.attn, block.mlp):
                part.c_proj = LoRALinear(part.c_proj, rank, alpha)
            block.attn.c_attn = LoRALinear(block.attn.c_attn, rank, alpha)
            block.mlp.c_fc = LoRALinear(block.mlp.c_fc, rank, alpha)

    def merge_lora(self) -> None:
        """Add what add_lora's parameters learned to the matrices; all weights are trained again."""
        for block in self.transformer.h:
            for part in (block.attn, block.mlp):
                for name, layer in [*part.named_children()]:
                    if isinstance(layer, LoRALinear):
                        setattr(part, name, layer.merged())
        self.config.lora_rank = 0
        self.requires_grad_(True)

    def _init_weights(self, module):
        zero = self.config.init == "zero_proj"
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # fan-in^-1/2 keeps activations of one size at every width; half of it, since Muon never shrinks what was drawn
            # (BENCHMARKS.md).
            std = module.in_features**-0.5 / 2 if zero and isinstance(module, nn.Linear) else 0.02
            if module is self.lm_head:
                std = 0.0 if zero and not self.config.tie_weights else 0.02
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # applied after its children: the last word on c_proj
            if zero:
                nn.init.zeros_(module.c_proj.weight)
            else:  # the residual stream sums 2 n_layer projections (GPT-2 paper, section 2.3)
                nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def forward(self, idx, targets=None, cache: KVCache | None = None, return_logits=True, label_smoothing=0.0):
        """Next-token logits and, with targets, their mean cross-entropy.

        idx, targets: integer (B, T), targets[:, t] being the id after idx[:, t]; -1 counts for nothing.
        Returns (logits (B, T, vocab_size), loss in nats or None). Training passes return_logits=False and gets
        (None, loss): the logits are its largest tensor, and compiled it need not be kept.
        With a cache, idx continues what the cache holds, and the logits are those of the last position, (B, 1, V).
        """
        x = self.hidden(idx, cache)
        if targets is not None and not return_logits:
            return None, self.head_loss(x, targets, label_smoothing)
        logits = self.logits(x if cache is None else x[:, -1:])
        return logits, None if targets is None else self.cross_entropy(logits, targets, label_smoothing)

    def head_loss(self, x, targets, label_smoothing=0.0):
        """The loss of what hidden() returned, (B, T, C). On a CPU in training the logits are not kept, see HeadLoss."""
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
            x = x.to(torch.get_autocast_dtype("cpu"))
        V, training = self.config.vocab_size, torch.is_grad_enabled() and not torch.compiler.is_compiling()
        pays = training and V >= 512 and x.dtype != torch.float16  # characters are few, and float16's range too small
        if x.device.type == "cpu" and pays and not self.config.logit_softcap:
            return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), V, label_smoothing)
        return self.cross_entropy(self.logits(x), targets, label_smoothing)

    def cross_entropy(self, logits, targets, label_smoothing=0.0):
        V = self.config.vocab_size
        return F.cross_entropy(
            logits.reshape(-1, V).float(), targets.reshape(-1), ignore_index=-1, label_smoothing=label_smoothing
        )

    @torch.no_grad()
    def token_losses(self, hidden, targets, accuracy=False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-log p of targets (n,) after hidden (n, C), float32, and with accuracy whether each was the likeliest token.

        On a CPU a few rows at a time, whose logits stay in its cache.
        """
        on_cpu = hidden.device.type == "cpu"
        rows = max(256, 2**22 // self.config.vocab_size) if on_cpu else 4096
        few = max(8, 2**19 // self.config.vocab_size) if on_cpu else rows
        losses, right = [], []
        for h, targets_of_h in zip(hidden.split(rows), targets.split(rows)):
            for logits, y in zip(self.logits(h).split(few), targets_of_h.split(few)):
                logits = logits.float()
                own = logits.gather(-1, y[:, None])[:, 0]
                losses.append(logits.logsumexp(-1) - own)
                if accuracy:  # argmax takes a CPU ten times as long as amax: it is asked where there is a tie alone
                    others = logits.scatter_(-1, y[:, None], -math.inf)
                    best = others.amax(-1)
                    right.append(own > best)
                    tie = own == best
                    right[-1][tie] = y[tie] < others[tie].argmax(-1)
        return torch.cat(losses), torch.cat(right) if accuracy else None

    def hidden(self, idx, cache: KVCache | None = None, at=None, mask=None):
        """What the head sees, (B, T, C); with a cache, of the T tokens that continue what it holds.

        Rows that are not one text each give, without a cache, their tokens' positions `at`, integer (B, T) below block_size,
        and `mask`, bool (B, 1, T, T), True where one looks at another. Raises ValueError for a text beyond block_size.
        """
        config, T = self.config, idx.size(1)
        if cache is not None and cache.at is not None:
            at = cache.at
        elif at is None:
            past = cache.filled if cache is not None else 0
            if past + T > config.block_size:
                raise ValueError(f"{past + T} tokens are more than the context: block_size is {config.block_size}")
            at = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.wte(idx)
        rotary = None
        if config.pos == "learned":
            x = x + self.transformer.wpe(at)
        elif config.pos == "rope":
            rotary = self.cos[at], self.sin[at]
            if at.dim() == 2:  # the same for all heads
                rotary = [table[:, None] for table in rotary]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if config.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotary, None, mask, use_reentrant=False)
            else:
                x = block(x, rotary, cache, mask)
        if cache is not None and cache.at is None:
            cache.filled += T
        return self.transformer.ln_f(x)

    def logits(self, x):
        """(..., C) -> (..., vocab_size)"""
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        c = self.config.logit_softcap
        return c * torch.tanh(logits / c) if c else logits

    def generate(
        self, idx, max_new_tokens: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_tokens=(), generator=None,
        graph=True, compile=False, watch=None,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Continue idx, integer (B, T): yields the next id of every row, (B,), max_new_tokens times or until all rows stopped (on
        a GPU up to 15 ids later: to ask waits for it, so every 16th is asked).

        Shorter rows are filled up with -1. Decoding begins where the shortest ends; until T the longer rows yield their own
        ids, which come on top of max_new_tokens.

        temperature 0 is greedy; top_k keeps the k likeliest ids (0: all), top_p the likeliest that sum to p
        (https://arxiv.org/abs/1904.09751), min_p those at least p times as likely as the likeliest
        (https://arxiv.org/abs/2407.01082). A row that met a stop token repeats it. On a GPU the step is a CUDA graph
        unless graph=False, compiled if that is asked for. watch, if given, is called with the logits (B, V) of every step.
        Keys and values are cached. When block_size is full, the last half of the context is read in again and the
        text goes on, so a token sees between block_size / 2 and block_size tokens before it.
        Raises ValueError for an empty prompt or a setting outside its range.
        """
        shortest = int((idx >= 0).sum(1).min()) if len(idx) else 0
        if not shortest:
            raise ValueError("the prompt is empty: give at least one token")
        if not 0 <= top_k <= self.config.vocab_size:
            raise ValueError(f"--top_k={top_k}: must be between 0 (all) and the vocabulary, {self.config.vocab_size}")
        for name, value, low, high in (
            ("temperature", temperature, 0, math.inf), ("top_p", top_p, 0, 1), ("min_p", min_p, 0, 1)
        ):  # fmt: skip
            if not low <= value <= high:
                raise ValueError(f"--{name}={value}: must be between {low} and {high}")

        def pick(logits):  # (B, 1, V) -> (B,)
            if watch:
                watch(logits[:, -1])
            return choose(logits[:, -1].float(), temperature, top_k, top_p, min_p, generator).to(idx.dtype)

        length = -(-(idx.size(1) + max_new_tokens) // 256) * 256  # few of them, to compile for
        length = min(self.config.block_size, length)
        cache = KVCache(self.config, len(idx), length, idx.device, self._cache_dtype())
        graphed = graph and not watch and idx.device.type == "cuda"
        step = DecodeStep(self, cache, pick, generator, compile) if graphed else None
        new = self._decode(idx, shortest, max_new_tokens, pick, cache, step, stop_tokens)
        return one_ahead(new) if idx.device.type == "cuda" else new

    @torch.no_grad()
    def _decode(
        self, idx, shortest: int, max_new_tokens, pick, cache: KVCache, step, stop_tokens
    ) -> Iterator[torch.Tensor]:
        was_training, limit, on = self.training, self.config.block_size, idx.device
        idx, given = idx[:, :shortest], idx[:, shortest:]
        self.eval()
        try:
            text = [idx[:, -limit:]]  # what the model may still look at
            stopped = torch.zeros(len(idx), dtype=torch.bool, device=on)
            stops = torch.tensor(sorted(stop_tokens), device=on, dtype=idx.dtype)
            for n in range(given.size(1) + max_new_tokens):
                if n == 0 or cache.filled == limit:
                    if n:
                        text = [torch.cat(text, dim=1)[:, -(limit // 2 or 1) :]]
                    new = pick(self.prefill(text[0], cache))
                elif step:
                    new = step(new)
                else:
                    new = pick(self(new[:, None], cache=cache)[0])
                if n < given.size(1):
                    new = torch.where(given[:, n] < 0, new, given[:, n])
                if len(stops):
                    new = torch.where(stopped, text[-1][:, -1], new)
                    stopped |= torch.isin(new, stops) & (given[:, n] < 0 if n < given.size(1) else True)
                yield new
                text.append(new[:, None])
                # A look at `stopped` waits for a GPU, so there it is rare.
                if len(stops) and (on.type != "cuda" or n % 16 == 15) and stopped.all():
                    return
        finally:
            self.train(was_training)

    @torch.no_grad()
    def prefill(self, idx, cache: KVCache) -> torch.Tensor:
        """Read idx (B, T) into the cache, from its start: the logits after it, (B, 1, V).

        Rows that are all the same are read once; a long text goes in parts, so that memory stays bounded.
        """
        B, part = len(idx), cache
        if B > 1 and (idx == idx[0]).all():
            idx, part = idx[:1], KVCache(self.config, 1, idx.size(1), idx.device, cache.keys[0].dtype)
        part.filled = 0
        for piece in idx.split(max(64, 2**14 // len(idx)), dim=1):
            logits, _ = self(piece, cache=part)
        if part is not cache:
            for rows, row in zip(cache.keys + cache.values, part.keys + part.values):
                rows[:, :, : part.filled] = row
            cache.filled = part.filled
        return logits.expand(B, -1, -1)

    def _cache_dtype(self) -> torch.dtype:
        """Of keys and values. A CPU's attention is several times faster in float32, whatever the weights are."""
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return torch.float32 if device == "cpu" else self.transformer.wte.weight.dtype

    def load_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take the weights of a state dict of ours, nanoGPT's or transformers' GPT-2. Raises ValueError if they do not fit."""
        own = self.state_dict()
        weights = {}
        for name, tensor in clean_state_dict(state_dict).items():
            if name in own and name.endswith(("wte.weight", "lm_head.weight")) and len(tensor) < len(own[name]):
                tensor = F.pad(tensor, (0, 0, 0, len(own[name]) - len(tensor)))  # rows of ids that do not exist
            weights[name] = tensor
        if self.config.tie_weights:
            weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight"))
        missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or extra:
            raise ValueError(f"the weights do not fit this model: missing {missing[:3]}, unexpected {extra[:3]}")
        wrong = [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            shapes = ", ".join(f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in wrong[:3])
            raise ValueError(f"the weights do not fit this model: {shapes}")
        self.load_state_dict(weights)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """The model of a Hugging Face folder or hub id (see pretrained.py), its weights in float32 on the CPU."""
        from common.pretrained import read_pretrained

        arguments, weights, _ = read_pretrained(name)
        model = cls(GPTConfig(**arguments))
        model.load_weights(weights)
        return model

    def num_params(self) -> int:
        """How many parameters there are, without the rows that pad the vocabulary."""
        count = sum(p.numel() for p in self.parameters())
        copies = 1 if self.config.tie_weights else 2
        return count - copies * (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd

    def flops_per_token(self, T: int | None = None, convention="palm") -> float:
        """Floating-point operations to train on one token at context T (forward and backward, a multiply-add is two).

        palm: 6 N + 12 L H Q T, N all parameters but positions (https://arxiv.org/abs/2204.02311, appendix B), as nanoGPT
        reports. causal: the matrix products alone, attention over the (T + 1) / 2 keys that a causal query sees on average.
        """
        c, T = self.config, T or self.config.block_size
        if convention == "palm":
            positions = self.transformer.wpe.weight.numel() if c.pos == "learned" else 0
            return 6 * (sum(p.numel() for p in self.parameters()) - positions) + 12 * c.n_layer * c.n_embd * T
        if convention == "causal":
            matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and ".h." in n)
            return 6 * (matrices + c.padded_vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * (T + 1) / 2
        raise ValueError(f"FLOP convention {convention!r}: choose palm or causal")


class DecodeStep:
    """generate()'s step with shapes that never change: on a GPU a CUDA graph, launched whole without waiting for it.

    Attention looks at the first `reach` positions, masked beyond the present one; there is a graph for each 256 of them.
    """

    def __init__(self, model: GPT, cache: KVCache, pick, generator=None, compile=False):
        self.model, self.cache, self.pick, self.generator, self.compile = model, cache, pick, generator, compile
        self.token = torch.zeros(cache.keys[0].size(0), dtype=torch.long, device=model.device)
        self.new, self.at, self.graphs = self.token.clone(), torch.zeros(1, dtype=torch.long, device=model.device), {}

    def __call__(self, token) -> torch.Tensor:
        """The ids, integer (B,), after `token` (B,), which joins the cache."""
        cache = self.cache
        self.token.copy_(token)
        self.at.fill_(cache.filled)
        reach = cache.length if self.compile else min(cache.length, (cache.filled // 256 + 1) * 256)
        if reach not in self.graphs:
            self.graphs[reach] = self.capture(reach) if self.at.device.type == "cuda" else None
        if graph := self.graphs[reach]:
            with torch.cuda.device(self.at.device):
                graph.replay()
        else:
            self.run(reach)
        cache.filled += 1
        return self.new.to(token.dtype, copy=True)

    def run(self, reach: int) -> None:
        cache, model = self.cache, self.model
        cache.at, cache.mask = self.at, (torch.arange(reach, device=model.device) <= self.at)[None]
        if self.compile and not hasattr(model, "compiled_forward"):
            model.compiled_forward = torch.compile(model.forward, dynamic=False)
        forward = model.compiled_forward if self.compile else model.forward
        try:
            self.new.copy_(self.pick(forward(self.token[:, None], cache=cache)[0]))
        finally:
            cache.at = cache.mask = None

    def capture(self, reach: int) -> torch.cuda.CUDAGraph:
        cuda = torch.cuda
        with cuda.device(self.at.device):
            dice = self.generator or cuda.default_generators[self.at.device.index or 0]
            state, side, graph = dice.get_state(), cuda.Stream(), cuda.CUDAGraph()
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):  # what is allocated and tuned at first happens before the capture
                for _ in range(3):
                    self.run(reach)
            cuda.current_stream().wait_stream(side)
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            try:
                with cuda.graph(graph):
                    self.run(reach)
            except RuntimeError as e:
                raise RuntimeError(
                    f"decoding cannot be captured as a CUDA graph ({e}): --graph=False does without"
                ) from e
            dice.set_state(state)  # as if nothing had been drawn
        return graph


def one_ahead(iterator: Iterator) -> Iterator:
    """The same items, each handed out when the next is under way: the device works while the caller reads."""
    last = next(iterator, None)
    for item in iterator:
        yield last
        last = item
    if last is not None:
        yield last


def choose(logits, temperature, top_k, top_p, min_p, generator=None):
    """Sample ids (B,) from logits (B, V); see GPT.generate."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = (logits / temperature).softmax(-1)
    if min_p:
        probs = probs.where(probs >= min_p * probs.amax(-1, keepdim=True), 0)
    if top_p < 1:
        before = probs.cumsum(-1) - probs  # the likeliest id always stays
        probs = probs.where(before <= top_p * probs.sum(-1, keepdim=True), 0)
    # The shortest of waits at these rates is a draw from them. torch.multinomial would have the caller wait for a GPU.
    wait = torch.empty_like(probs).exponential_(generator=generator)
    if probs.device.type == "cpu" and not probs.isfinite().all():
        raise RuntimeError("the model's probabilities are not numbers")
    new = (probs / wait).argmax(-1)
    return new if ids is None else ids.gather(-1, new[:, None]).squeeze(-1)


def clean_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and layout of ours: wrapper prefixes and mask buffers dropped, GPT-2's Conv1D matrices transposed."""
    clean = {}
    for name, tensor in state_dict.items():
        while name.startswith(("_orig_mod.", "module.")):
            name = name.partition(".")[2]
        name = name.replace("._orig_mod", "")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            clean[name if name.startswith(("transformer.", "lm_head.")) else "transformer." + name] = tensor
    first = clean.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.shape[1] == 3 * first.shape[0]:  # Conv1D keeps (in, out)
        conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        clean = {n: t.t() if n.endswith(conv1d) else t for n, t in clean.items()}
    return clean
