"""Optimizers by name, their parameter groups, and the learning rate at a step.

Weight decay falls on matrices only (two dimensions and more), never on biases or norms.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


def make_optimizers(
    model: torch.nn.Module, name="adamw", learning_rate=6e-4, weight_decay=0.1, beta1=0.9, beta2=0.95, momentum=0.95,
    embedding_lr=0.0, head_lr=0.0, vector_lr=0.0, dtype=torch.float32,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers that together update every parameter of the model once; usually one, with muon two.

    muon takes the matrices of the blocks, embeddings, head and vectors stay with AdamW. These have learning rates of their
    own where one is given (0: learning_rate); a tied head goes with the embedding. Each group's "share" is its rate over
    learning_rate. dtype is that of Muon's products. Raises ValueError for a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"--optimizer={name}: choose one of {', '.join(OPTIMIZERS)}")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizers = []
    if name == "muon":
        hidden = [(n, p) for n, p in named if p.dim() == 2 and ".h." in n]
        named = [(n, p) for n, p in named if not (p.dim() == 2 and ".h." in n)]
        rows = [matrices_in(n, p, model.config) for n, p in hidden]
        optimizers.append(Muon([p for _, p in hidden], learning_rate, weight_decay, momentum, rows, dtype))
    own = {"head": head_lr, "embedding": embedding_lr, "vector": vector_lr}
    parts = {}  # (decayed, which rate) -> parameters, the decayed first; without rates of their own two, as nanoGPT's
    for decayed in (True, False):
        for n, p in named:
            if (p.dim() >= 2) == decayed:
                part = "head" if n == "lm_head.weight" else "embedding" if "transformer.w" in n else ""
                part = part if decayed else "vector"
                parts.setdefault((decayed, part if own.get(part) else ""), []).append(p)
    groups = [
        dict(params=params, lr=own.get(part) or learning_rate, weight_decay=weight_decay * decayed)
        for (decayed, part), params in parts.items()
    ]
    if groups:
        fused = groups[0]["params"][0].device.type in ("cuda", "cpu", "mps")
        if name in ("adamw", "muon"):
            rest = torch.optim.AdamW(groups, betas=(beta1, beta2), fused=fused)
        elif name == "adam":
            rest = torch.optim.Adam(groups, betas=(beta1, beta2), fused=fused)
        elif name == "sgd":
            # Not fused: that one, held in its first step, goes on from a momentum that was never written.
            rest = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0)
        else:
            rest = torch.optim.Adafactor(groups)
        optimizers.append(rest)
    for each in optimizers:
        for group in each.param_groups:
            group["share"] = group["lr"] / learning_rate if learning_rate else 1.0
    return optimizers


def matrices_in(name: str, p: torch.Tensor, config) -> list[int]:
    """The rows of each matrix that a parameter of the blocks holds: queries, keys and values lie in one, as do swiglu's two."""
    if name.endswith("attn.c_attn.weight"):
        kv_width = config.n_kv_head * config.head_size
        return [config.n_embd, kv_width, kv_width]
    if name.endswith("mlp.c_fc.weight") and config.mlp == "swiglu":
        return [config.mlp_hidden] * 2
    return [len(p)]


def orthogonalise(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrices with singular values near 1 (0.7 to 1.2), to matrices G (n, rows, columns), in G's dtype.

    Newton-Schulz iteration with the quintic of https://kellerjordan.github.io/posts/muon, all n at once.
    """
    X = G.mT if G.size(-2) > G.size(-1) else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if G.size(-2) > G.size(-1) else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (https://kellerjordan.github.io/posts/muon), for the matrices of the blocks.

    An update's root mean square gain is lr whatever the width: its singular values are lr * max(1, rows / columns) ** 0.5.
    Matrices of one shape are stacked and orthogonalised together; of several ranks each does its share, and they exchange
    the results. Every rank keeps all momenta, so a checkpoint fits any number of them.

    rows: for each parameter the rows of the matrices it holds, one under the other; None: it is one matrix.
    found_inf, if set, is a tensor that is not 0 where this step must change nothing; a GPU is not waited for.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, rows=None, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, fused=True))
        self.rows, self.dtype = rows, dtype

    @torch.no_grad()
    def step(self):
        hold, keep = getattr(self, "found_inf", None), 1.0
        if hold is not None and hold.is_cuda:
            keep = 1 - hold
        elif hold:
            return
        for group in self.param_groups:
            used = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            params, momentum = [group["params"][i] for i in used], group["momentum"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            means = [self.state[p]["momentum_buffer"] for p in params]
            if torch.is_tensor(keep):
                grads = [torch.where(keep > 0, g, m) for m, g in zip(means, grads)]
            torch._foreach_lerp_(means, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, means, momentum)
            alike = defaultdict(list)  # shape -> (weights, update) of the matrices that have it
            for i, p, u in zip(used, params, updates):
                rows = self.rows[i] if self.rows else [len(p)]
                for pair in zip(p.split(rows), u.split(rows)):
                    alike[pair[0].shape].append(pair)
            shares = [(pairs, *self.share(torch.stack([u for _, u in pairs]))) for pairs in alike.values()]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * keep)
            for pairs, whole, work in shares:
                if work:
                    work.wait()
                rate = group["lr"] * max(1, whole.size(1) / whole.size(2)) ** 0.5
                new = (whole[: len(pairs)].to(params[0].dtype) * keep).unbind()
                torch._foreach_add_([w for w, _ in pairs], list(new), alpha=-rate)

    def share(self, G: torch.Tensor):
        """G (n, rows, columns) orthogonalised, this rank's part here and the others' on the way, and what to wait for."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return orthogonalise(G.to(self.dtype)), None
        each = -(-len(G) // world)
        mine = G.new_zeros(each, *G.shape[1:], dtype=self.dtype)
        part = G[dist.get_rank() * each :][:each]
        mine[: len(part)] = part
        whole = torch.empty(world * each, *G.shape[1:], device=G.device, dtype=self.dtype)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on
        return whole, gather(whole, orthogonalise(mine).contiguous(), async_op=G.is_cuda)


def learning_rate_at(
    step: int, schedule="cosine", learning_rate=6e-4, min_lr=6e-5, warmup_iters=0, decay_iters=1, decay_fraction=0.2
) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then the schedule down to min_lr at decay_iters.

    cosine and linear fall all the way, wsd (warmup-stable-decay) in the last decay_fraction of the steps, constant never.
    Raises ValueError for a schedule that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule={schedule}: choose one of {', '.join(SCHEDULES)}")
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    begin = max(warmup_iters, decay_iters * (1 - decay_fraction)) if schedule == "wsd" else warmup_iters
    done = min(1.0, max(0.0, (step - begin) / max(1, decay_iters - begin)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_lr + left * (learning_rate - min_lr)
