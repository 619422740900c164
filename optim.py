"""Optimizers by name, their parameter groups, and the learning rate at a step.

Weight decay falls on matrices only (two dimensions and more), never on biases or norms.
"""

import math

import torch

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


def make_optimizers(
    model: torch.nn.Module, name="adamw", learning_rate=6e-4, weight_decay=0.1, beta1=0.9, beta2=0.95, momentum=0.9
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter of the model once; usually one, with muon two.

    muon (https://kellerjordan.github.io/posts/muon) takes the matrices of the blocks, its step scaled to AdamW's size so
    that one learning rate serves both (https://arxiv.org/abs/2502.16982); embeddings, head and vectors stay with AdamW.
    Raises ValueError for a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"--optimizer={name}: choose one of {', '.join(OPTIMIZERS)}")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizers = []
    if name == "muon":
        hidden = [p for n, p in named if p.dim() == 2 and ".h." in n]
        named = [(n, p) for n, p in named if not (p.dim() == 2 and ".h." in n)]
        muon = torch.optim.Muon(
            hidden, lr=learning_rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    groups = [
        dict(params=[p for _, p in named if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for _, p in named if p.dim() < 2], weight_decay=0.0),
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        return optimizers
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu", "mps")
    if name in ("adamw", "muon"):
        rest = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=fused)
    elif name == "adam":
        rest = torch.optim.Adam(groups, lr=learning_rate, betas=(beta1, beta2), fused=fused)
    elif name == "sgd":
        rest = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused)
    else:
        rest = torch.optim.Adafactor(groups, lr=learning_rate)
    return optimizers + [rest]


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
