"""The Muon optimizer (https://kellerjordan.github.io/posts/muon): momentum, orthogonalised."""

from collections import defaultdict

import torch
import torch.distributed as dist


def orthogonalise(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrices with singular values near 1 (0.7 to 1.2) to a batch of matrices G (n, rows, columns), in G's dtype.

    Newton-Schulz iteration with the quintic polynomial of Muon's page.
    """
    X = G.mT if G.size(-2) > G.size(-1) else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if G.size(-2) > G.size(-1) else X


def rows_of_matrices(name: str, p: torch.Tensor, config) -> list[int]:
    """The row counts of the matrices that one parameter holds: c_attn is q, k and v, a gated c_fc is gate and value."""
    if name.endswith("attn.c_attn.weight"):
        kv_width = config.n_kv_head * config.head_size
        return [config.n_head * config.head_size, kv_width, kv_width]
    if name.endswith("mlp.c_fc.weight") and len(p) == 2 * config.mlp_hidden:
        return [config.mlp_hidden] * 2
    return [len(p)]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for the matrices of the blocks.

    The singular values of an update are lr * max(1, rows / columns) ** 0.5, so one lr suits every width. Matrices of one
    shape are stacked and orthogonalised together: the quickstart takes 77 s instead of 86 (BENCHMARKS.md). With several
    ranks each orthogonalises its share and they exchange the results; every rank keeps all momenta, so a checkpoint fits
    any number of ranks.

    rows: for each parameter the row counts of the matrices it holds; None: it is one matrix. dtype: of the iteration.
    found_inf, if set, is a tensor; where it is not 0 the step changes nothing, without a GPU sync.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, rows=None, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, fused=True))
        self.rows, self.dtype = rows, dtype

    @torch.no_grad()
    def step(self):
        found_inf, keep = getattr(self, "found_inf", None), 1.0
        if found_inf is not None and found_inf.is_cuda:
            keep = 1 - found_inf  # 0 or 1, on the device
        elif found_inf:
            return
        for group in self.param_groups:
            indices = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            params, momentum = [group["params"][i] for i in indices], group["momentum"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            if torch.is_tensor(keep):
                grads = [torch.where(keep > 0, g, m) for m, g in zip(buffers, grads)]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, buffers, momentum)
            by_shape = defaultdict(list)  # shape -> [(weights, update)] of the matrices that have it
            for i, p, u in zip(indices, params, updates):
                rows = self.rows[i] if self.rows else [len(p)]
                for pair in zip(p.split(rows), u.split(rows)):
                    by_shape[pair[0].shape].append(pair)
            stacks = [
                (pairs, *self.orthogonalise_on_ranks(torch.stack([u for _, u in pairs]))) for pairs in by_shape.values()
            ]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * keep)
            for pairs, result, work in stacks:
                if work:
                    work.wait()
                lr = group["lr"] * max(1, result.size(1) / result.size(2)) ** 0.5
                new = (result[: len(pairs)].to(params[0].dtype) * keep).unbind()
                torch._foreach_add_([w for w, _ in pairs], list(new), alpha=-lr)

    def orthogonalise_on_ranks(self, G: torch.Tensor):
        """G (n, rows, columns) orthogonalised, a share on each rank; and what to wait for before it is complete."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size == 1:
            return orthogonalise(G.to(self.dtype)), None
        share = -(-len(G) // world_size)
        own = G.new_zeros(share, *G.shape[1:], dtype=self.dtype)
        part = G[dist.get_rank() * share :][:share]
        own[: len(part)] = part
        result = torch.empty(world_size * share, *G.shape[1:], device=G.device, dtype=self.dtype)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        return result, gather(result, orthogonalise(own).contiguous(), async_op=G.is_cuda)
