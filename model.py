"""A GPT: the network, its KV cache, sampling. Depends only on PyTorch, common/cpu.py and common/rope.py.

The defaults are GPT-2's (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
and the module names are those of GPT-2 and nanoGPT, so their state dicts load. Every other choice is a field of GPTConfig.

Shapes: B batch, T tokens, C = n_embd, H query heads, K key/value heads, D head size, S positions attended to,
V vocabulary (the matrices are padded to a multiple of 64 rows).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from common import cpu
from common.rope import check_scaling, rotary_table

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024  # context: the longest sequence, in tokens
    vocab_size: int = 50257  # number of token ids
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # 0 for pretraining; 0.1 or more for small datasets
    head_dim: int = 0  # size of a head; 0: n_embd / n_head
    bias: bool = True  # biases in linear layers and LayerNorms
    qkv_bias: bool = False  # biases of queries, keys and values where bias=False, as in Qwen2
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5  # added to the variance
    mlp: str = "gelu"  # gelu (tanh approximation, GPT-2) | gelu_erf (exact, nanoGPT) | swiglu | relu2
    mlp_hidden: int = 0  # width inside the MLP; 0: 4 n_embd (swiglu: 8/3 n_embd, for the same number of parameters)
    pos: str = "learned"  # position encoding: learned | rope | none
    rope_base: float = 10000.0  # RoPE's theta
    rope_scaling: str = "none"  # for a longer context than was trained: none | linear | llama3 | yarn (common/rope.py)
    rope_factor: float = 1.0  # how many times longer
    rope_original: int = 0  # the context that was trained; 0: block_size / rope_factor
    rope_low: float = 1.0  # llama3, yarn: channels that turn fewer times in the trained context are stretched
    rope_high: float = 0.0  # llama3, yarn: channels that turn more often are not; 0: 4 for llama3, 32 for yarn
    n_kv_head: int = 0  # key/value heads, shared by groups of query heads; 0: n_head
    qk_norm: bool = False  # RMS-normalise queries and keys
    qk_norm_weight: bool = False  # and learn a factor for each channel, as in Qwen3
    tie_weights: bool = True  # share one matrix between the embedding and the head
    logit_softcap: float = 0.0  # c * tanh(logits / c), as in Gemma 2; 0: off
    init: str = "gpt2"  # gpt2 | zero_proj: see GPT.init_weights
    attn: str = "sdpa"  # attention kernel: sdpa (fused) | manual (the formula written out)
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory, more time
    lora_rank: int = 0  # train only LoRA adapters of this rank on the blocks' linear layers; 0: all weights
    lora_alpha: float = 16.0  # the adapters are scaled by lora_alpha / lora_rank

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.qkv_bias = self.qkv_bias and not self.bias
        if not self.mlp_hidden:
            self.mlp_hidden = round(self.n_embd / 3) * 8 if self.mlp in GATED else 4 * self.n_embd
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"--{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        for keys, ok, bounds in BOUNDS:
            for key in keys.split():
                if not ok(getattr(self, key)):
                    raise ValueError(f"--{key}={getattr(self, key)}: must be {bounds}")
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head={self.n_head} is not divisible by --n_kv_head={self.n_kv_head}")
        if self.pos == "rope" and self.head_size % 2:
            raise ValueError(f"--pos=rope needs an even head size, not {self.head_size}")
        if self.qk_norm_weight and not self.qk_norm:
            raise ValueError("--qk_norm_weight=True needs --qk_norm=True")
        check_scaling(self)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head


def swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def relu_squared(x):
    return cpu.ReluSquared.apply(x) if cpu.trains_on_cpu(x) else F.relu(x).square()


ACTIVATIONS = {  # --mlp: a new activation is one line here; a gated one is named in GATED too
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu2": relu_squared,
    "swiglu": swiglu,
}
GATED = ("swiglu",)  # activations that take twice the width: gate and value
CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": tuple(ACTIVATIONS),
    "pos": ("learned", "rope", "none"),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "init": ("gpt2", "zero_proj"),
    "attn": ("sdpa", "manual"),
}
BOUNDS = (
    ("block_size vocab_size n_layer n_head n_embd n_kv_head mlp_hidden rope_factor", lambda n: n >= 1, "at least 1"),
    ("head_dim norm_eps rope_original rope_low rope_high logit_softcap lora_rank", lambda n: n >= 0, "at least 0"),
    ("rope_base lora_alpha", lambda n: n > 0, "above 0"),
    ("dropout", lambda p: 0 <= p < 1, "at least 0 and less than 1"),
)


class RMSNorm(nn.RMSNorm):
    """torch's, with its weight in the dtype of x: under autocast the two differ, and torch then takes a slow path."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if cpu.trains_on_cpu(x):
            return cpu.RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(config: GPTConfig) -> nn.Module:
    """The norm of the residual stream, over the last dimension."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class KVCache:
    """Keys and values of every layer, (B, K, length, D) each, allocated once. The first kv_len positions are filled."""

    mask = None  # bool (T, S), True where attended to; None: causal. Set by StaticKVCache in common/inference.py

    def __init__(self, config: GPTConfig, batch: int, length: int, device, dtype):
        shape = (batch, config.n_kv_head, length, config.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.config, self.length, self.kv_len = config, length, 0

    def positions(self, T: int, device):
        """Where the next T tokens go, (T,). Raises ValueError past block_size."""
        if self.kv_len + T > self.config.block_size:
            raise ValueError(f"{self.kv_len + T} tokens are more than the block_size of {self.config.block_size}")
        return torch.arange(self.kv_len, self.kv_len + T, device=device)

    def update(self, layer: int, k, v):
        """Append k, v (B, K, T, D) of one layer; return all its keys and values so far, (B, K, S, D)."""
        end = self.kv_len + k.size(2)
        self.keys[layer][:, :, self.kv_len : end] = k
        self.values[layer][:, :, self.kv_len : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select_rows(self, rows: torch.Tensor, length: int) -> "KVCache":
        """A new cache of the given length with copies of some rows, integer (n,)."""
        first = self.keys[0]
        other = KVCache(self.config, len(rows), length, first.device, first.dtype)
        other.kv_len = self.kv_len
        for old, new in zip(self.keys + self.values, other.keys + other.values):
            new[:, :, : self.kv_len] = old[rows, :, : self.kv_len]
        return other


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by cos and sin (T, D/2). This pairing is Llama's."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if cpu.trains_on_cpu(x):
        return cpu.Rotate.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D = config.head_size
        width, kv_width = config.n_head * D, config.n_kv_head * D
        qkv_bias = config.bias or config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, width + 2 * kv_width, bias=qkv_bias)  # q, k, v in one matrix
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps, config.qk_norm_weight)
            self.k_norm = RMSNorm(D, config.norm_eps, config.qk_norm_weight)
        self.resid_dropout = cpu.Dropout(config.dropout)

    def forward(self, x, rotary, cache: KVCache | None = None):
        c, (B, T, _) = self.config, x.shape
        H, K, D = c.n_head, c.n_kv_head, c.head_size
        qkv = self.c_attn(x).view(B, T, H + 2 * K, D).transpose(1, 2)
        q, k, v = qkv.split((H, K, K), dim=1)  # (B, H, T, D), (B, K, T, D), (B, K, T, D)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is None:
            y = self.attend(q, k, v)
        else:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
            y = self.attend(q.to(k.dtype), k, v, cache.mask).to(x.dtype)
        y = y.transpose(1, 2).reshape(B, T, H * D)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v, mask=None):
        """softmax(q k^T / sqrt(D)) v: the T queries are the last T of S positions, and none sees a later one.

        q (B, H, T, D), k and v (B, K, S, D). A mask, bool (T, S), True where attended to, replaces the causal one.
        """
        T, S = q.size(2), k.size(2)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.attn == "sdpa" and mask is None and cpu.block_attention_is_faster(q, k, dropout):
            return cpu.BlockAttention.apply(q, k, v, dropout)
        manual = self.config.attn == "manual" or cpu.manual_attention_is_faster(q, S)
        if mask is None and T > 1 and (manual or S > T):
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if manual:
            return cpu.manual_attention(q, k, v, mask, dropout)
        causal, grouped = T > 1 and mask is None, q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.mlp_hidden * (2 if config.mlp in GATED else 1)
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = cpu.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache: KVCache | None = None):
        x = x + self.attn(self.ln_1(x), rotary, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, C = config.padded_vocab_size, config.n_embd
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, C)})
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, C)
        elif config.pos == "rope":
            cos, sin = rotary_table(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.transformer["drop"] = cpu.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the matrices from normal distributions with these standard deviations; biases are zero.

        --init=                 gpt2                      zero_proj
        embeddings              0.02                      0.02
        residual projections    0.02 / sqrt(2 n_layer)    0         (c_proj of attention and MLP)
        untied head             0.02                      0
        other matrices          0.02                      0.5 / sqrt(fan_in)

        gpt2: section 2.3 of the GPT-2 paper; the residual stream sums 2 n_layer projections. zero_proj: every block starts
        as the identity, and 1 / sqrt(fan_in) keeps the scale of activations independent of the width. The 0.5 was better
        in our runs with Muon (BENCHMARKS.md).
        """
        zero_proj = self.config.init == "zero_proj"
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.0 if zero_proj else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif name == "lm_head.weight":  # listed only if untied
                nn.init.normal_(p, std=0.0 if zero_proj else 0.02)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.5 / math.sqrt(p.size(1)) if zero_proj and ".h." in name else 0.02)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def forward(self, idx, targets=None, cache: KVCache | None = None, return_logits=True, label_smoothing=0.0):
        """Next-token logits and, with targets, their mean cross-entropy.

        idx, targets: integer (B, T); targets[:, t] is the id after idx[:, t], and -1 is ignored.
        Returns (logits (B, T, V), loss in nats or None); with return_logits=False (None, loss), so that training need not
        keep the logits, its largest tensor. With a cache, idx continues it and the logits are those after idx, (B, 1, V).
        """
        x = self.hidden(idx, cache)
        if targets is not None and not return_logits:
            return None, self.loss_of(x, targets, label_smoothing)
        logits = self.logits(x if cache is None else x[:, -1:])
        return logits, None if targets is None else self.loss_of(x, targets, label_smoothing, logits)

    def hidden(self, idx, cache: KVCache | None = None):
        """The input of the head, (B, T, C), for idx (B, T). Raises ValueError for a sequence longer than block_size."""
        c, T = self.config, idx.size(1)
        if cache is None and T > c.block_size:
            raise ValueError(f"{T} tokens are more than the block_size of {c.block_size}")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T, idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        if c.pos == "learned":
            x = x + self.transformer.wpe(positions)
        rotary = (self.cos[positions], self.sin[positions]) if c.pos == "rope" else None
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if c.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache)
        if cache is not None:
            cache.kv_len += T
        return self.transformer.ln_f(x)

    def logits(self, x):
        """(..., C) -> (..., V)"""
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        c = self.config.logit_softcap
        return c * torch.tanh(logits / c) if c else logits

    def loss_of(self, x, targets, label_smoothing=0.0, logits=None):
        """Mean cross-entropy of the head's input x (B, T, C), or of its logits (B, T, V) if given."""
        V, targets = self.config.vocab_size, targets.reshape(-1)  # (B T,)
        if logits is None and cpu.fused_loss_is_faster(x, V) and not self.config.logit_softcap:
            return cpu.fused_linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets, V, label_smoothing)
        logits = (self.logits(x) if logits is None else logits).reshape(-1, V).float()  # (B T, V)
        return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing)

    # -------------------------------------------------------------------------
    # Sampling

    def generate(
        self, idx, max_new_tokens: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop_tokens=(), rng=None,
        on_logits=None, make_step=None,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Continue idx, integer (B, T): yields the next id of every row, (B,), until max_new_tokens or all rows stopped.

        Shorter rows are padded with -1 at their end. Sampling starts at the end of the shortest row; longer rows first yield
        the rest of their prompt, which does not count toward max_new_tokens. A finished row repeats its stop token.
        When block_size is full, the last half of the context is read again and the text continues.

        temperature 0 is greedy; top_k keeps the k most likely ids (0: all), top_p the most likely that sum to p
        (https://arxiv.org/abs/1904.09751), min_p those at least p times as likely as the most likely one
        (https://arxiv.org/abs/2407.01082). rng: a torch.Generator. on_logits(logits (B, V)): called at every step.
        make_step(model, cache, sample): builds another decoding step, such as inference.DecodeStep.
        Raises ValueError for an empty prompt or a setting out of range.
        """
        start = int((idx >= 0).sum(1).min()) if len(idx) else 0  # length of the shortest row
        if not start:
            raise ValueError("the prompt is empty: give at least one token")
        limits = {"temperature": math.inf, "top_k": self.config.vocab_size, "top_p": 1, "min_p": 1}
        for (name, high), value in zip(limits.items(), (temperature, top_k, top_p, min_p)):
            if not 0 <= value <= high:
                raise ValueError(f"--{name}={value}: must be between 0 and {high}")

        def sample(logits):  # (B, 1, V) -> (B,)
            if on_logits:
                on_logits(logits[:, -1])
            return sample_next_token(logits[:, -1].float(), temperature, top_k, top_p, min_p, rng).to(idx.dtype)

        length = min(self.config.block_size, -(-(idx.size(1) + max_new_tokens) // 256) * 256)
        cache = KVCache(self.config, len(idx), length, idx.device, self.kv_dtype())
        step = make_step(self, cache, sample) if make_step else None
        return self._generate(idx, start, max_new_tokens, sample, cache, step, stop_tokens)

    @torch.no_grad()
    def _generate(self, idx, start, max_new_tokens, sample, cache, step, stop_tokens) -> Iterator[torch.Tensor]:
        block_size, device, was_training = self.config.block_size, idx.device, self.training
        idx, rest = idx[:, :start], idx[:, start:]  # rest: (B, T - start), -1 past a row's end
        stops = torch.tensor(sorted(stop_tokens), device=device, dtype=idx.dtype)
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=device)
        context = [idx[:, -block_size:]]
        self.eval()
        try:
            for n in range(rest.size(1) + max_new_tokens):
                if n == 0 or cache.kv_len == block_size:
                    if n:
                        context = [torch.cat(context, dim=1)[:, -(block_size // 2 or 1) :]]
                    new = sample(self.prefill(context[0], cache))
                elif step:
                    new = step(new)
                else:
                    new = sample(self(new[:, None], cache=cache)[0])
                in_prompt = rest[:, n] >= 0 if n < rest.size(1) else torch.zeros_like(stopped)
                if n < rest.size(1):
                    new = torch.where(in_prompt, rest[:, n], new)
                if len(stops):
                    new = torch.where(stopped, context[-1][:, -1], new)
                    stopped |= torch.isin(new, stops) & ~in_prompt
                yield new
                context.append(new[:, None])
                # Reading `stopped` syncs with a GPU, so there only every 16th step does.
                if len(stops) and (device.type != "cuda" or n % 16 == 15) and stopped.all():
                    return
        finally:
            self.train(was_training)

    @torch.no_grad()
    def prefill(self, idx, cache: KVCache) -> torch.Tensor:
        """Read a prompt idx (B, T) into the cache from its start; return the logits after it, (B, 1, V).

        Identical rows are computed once. A long prompt is read in pieces, so that memory stays bounded.
        """
        B, target = len(idx), cache
        if B > 1 and (idx == idx[0]).all():
            idx, cache = idx[:1], KVCache(self.config, 1, idx.size(1), idx.device, cache.keys[0].dtype)
        cache.kv_len = 0
        for piece in idx.split(max(64, 2**14 // len(idx)), dim=1):
            logits, _ = self(piece, cache=cache)
        if cache is not target:
            for rows, row in zip(target.keys + target.values, cache.keys + cache.values):
                rows[:, :, : cache.kv_len] = row
            target.kv_len = cache.kv_len
        return logits.expand(B, -1, -1)

    def kv_dtype(self) -> torch.dtype:
        """Dtype of the KV cache: float32 on a CPU, whose attention kernel is five times slower in bfloat16 (BENCHMARKS.md)."""
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return torch.float32 if device == "cpu" else self.transformer.wte.weight.dtype

    def num_params(self) -> int:
        """Number of parameters, without the rows that pad the vocabulary."""
        count = sum(p.numel() for p in self.parameters())
        copies = 1 if self.config.tie_weights else 2
        return count - copies * (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd


def sample_next_token(logits, temperature, top_k, top_p, min_p, rng=None):
    """Sample ids (B,) from logits (B, V); see GPT.generate for the settings."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    logits = logits - logits.amax(-1, keepdim=True)  # stays finite however low the temperature
    probs = (logits / max(temperature, 1e-30)).softmax(-1)
    if min_p:
        probs = probs.where(probs >= min_p * probs.amax(-1, keepdim=True), 0)
    if top_p < 1:
        sum_before = probs.cumsum(-1) - probs  # 0 for the most likely id, which is always kept
        probs = probs.where(sum_before <= top_p * probs.sum(-1, keepdim=True), 0)
    if probs.device.type == "cpu" and not probs.isfinite().all():
        raise ValueError("the model's probabilities are not finite numbers")
    # Exponential race: argmax(p / Exp(1)) samples from p without torch.multinomial's GPU sync.
    new = (probs / torch.empty_like(probs).exponential_(generator=rng)).argmax(-1)
    return new if ids is None else ids.gather(-1, new[:, None]).squeeze(-1)
