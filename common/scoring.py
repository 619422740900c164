"""Loss and accuracy of a model on given tokens, for training, evaluate.py and HellaSwag."""

import math
from collections.abc import Callable, Iterable

import torch

from model import GPT


@torch.no_grad()
def token_losses(model: GPT, hidden, targets, accuracy=False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of each token, float32 (n,) in nats, and with accuracy=True whether it was the most likely one, bool (n,).

    hidden (n, C) is the head's input, targets integer (n,). Works in chunks; on a CPU their logits stay in its cache.
    """
    cpu, V = hidden.device.type == "cpu", model.config.vocab_size
    product_rows = max(256, 2**22 // V) if cpu else 4096
    softmax_rows = max(8, 2**19 // V) if cpu else product_rows
    losses, correct = [], []
    for h, chunk_targets in zip(hidden.split(product_rows), targets.split(product_rows)):
        for logits, y in zip(model.logits(h).split(softmax_rows), chunk_targets.split(softmax_rows)):
            logits = logits.float()
            target_logit = logits.gather(-1, y[:, None])[:, 0]
            losses.append(logits.logsumexp(-1) - target_logit)
            if accuracy:  # amax is ten times as fast as argmax on a CPU, so only ties take argmax
                others = logits.scatter_(-1, y[:, None], -math.inf)
                best_other = others.amax(-1)
                correct.append(target_logit > best_other)
                tie = target_logit == best_other
                correct[-1][tie] = y[tie] < others[tie].argmax(-1)
    return torch.cat(losses), torch.cat(correct) if accuracy else None


@torch.no_grad()
def sum_losses(model: GPT, batches: Iterable, autocast: Callable, interrupted=lambda: False) -> torch.Tensor:
    """Sums over all batches, float64 (3,) on the CPU: loss in nats, correctly predicted tokens, tokens.

    batches: numpy inputs and targets, int64 (B, T) each; targets of -1 are not counted. autocast: makes the context of a
    forward pass. Ends early when interrupted() becomes true.
    """
    sums = [torch.zeros(3, device=model.device)]
    for x, y in batches:
        if interrupted():
            break
        x, y = torch.from_numpy(x).to(model.device), torch.from_numpy(y).to(model.device)
        mask = y >= 0
        with autocast():
            losses, correct = token_losses(model, model.hidden(x)[mask], y[mask], accuracy=True)
        sums.append(torch.stack((losses.sum(), correct.sum(), mask.sum())))
    return torch.stack(sums).cpu().double().sum(0)
