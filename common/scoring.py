"""Loss and accuracy of a model on given tokens, for training, evaluate.py and HellaSwag."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from configurator import UserError
from model import GPT, KVCache

import numpy as np
import torch


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


# -----------------------------------------------------------------------------
# Questions with several endings


class Question(NamedTuple):
    context: list[int]
    endings: list[list[int]]
    lengths: list[int] = []  # what acc_norm divides by
    label: int | None = None


def check_lengths(questions: list[Question], block_size: int) -> None:
    sizes = [len(e) for q in questions for e in q.endings]
    if max(sizes, default=0) > block_size:
        raise UserError(f"an ending has more tokens than the model's context of {block_size}: this model is too small")
    if min(sizes, default=1) == 0:
        raise UserError("an ending has no token in the model's vocabulary")


@torch.no_grad()
def ending_losses(
    model: GPT, questions: list[Question], batch_size: int = 0, accuracy: bool = False
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """The summed token losses of every ending: yields (indices of n questions, losses (n, E) in nats, greedy (n, E)).

    E is the largest number of endings; what a question lacks is 0. greedy, bool: with accuracy=True, whether each token of
    the ending was the most likely one.

    Contexts of similar length go together. The part of them that all have is read once, into the KV cache; the endings, each
    after the rest of its context, are then read in batches of similar length, with the head applied to the endings only.
    Where an ending does not fit the model after its context, the context loses its front. Raises UserError for an ending
    longer than the model's context.
    """
    T, device = model.config.block_size, model.device
    batch_size = batch_size or (8 if device.type == "cpu" else 64)
    check_lengths(questions, T)
    contexts = []  # (index of the question, its endings that see this context, context)
    for i, (context, endings, *_) in enumerate(questions):
        rooms = [T + 1 - len(e) for e in endings]
        if len(context) <= min(rooms):
            contexts.append((i, range(len(endings)), context or [0]))
        else:
            contexts += [(i, [n], context[-room:] or [0]) for n, room in enumerate(rooms)]
    contexts.sort(key=lambda entry: len(entry[2]))
    missing = np.array([len(q.endings) for q in questions])
    found = np.zeros((len(questions), max(missing, default=0)))
    all_greedy = np.zeros(found.shape, dtype=bool)
    group_size = min(8 * batch_size, 256)  # contexts in one cache
    # The cache has the model's own dtype: here rows are copied more than they are attended to.
    autocast_dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    kv_dtype = autocast_dtype or model.transformer.wte.weight.dtype
    for first in range(0, len(contexts), group_size):
        group = contexts[first : first + group_size]
        shared = len(group[0][2]) - 1  # the token before an ending is read with it
        cache = KVCache(model.config, len(group), shared, device, kv_dtype)
        if shared:
            model.hidden(torch.tensor([context[:shared] for _, _, context in group], device=device), cache)
        places, rows = [], []  # question and ending of each row; its context in the cache, ids, length of the ending
        for row, (i, endings, context) in enumerate(group):
            for n in endings:
                ending = questions[i].endings[n]
                places.append((i, n))
                rows.append((row, context[shared:] + ending, len(ending)))
        losses, greedy = torch.zeros(len(rows), device=device), torch.zeros(len(rows), dtype=torch.bool, device=device)
        remaining = sorted(range(len(rows)), key=lambda r: len(rows[r][1]))
        while remaining:  # the longest first
            width = max(1, len(rows[remaining[-1]][1]) - 1)
            # Each row copies its context's keys and values, so the number of rows is bounded too.
            count = max(1, min(64 * batch_size // width, 8 * batch_size))
            remaining, batch = remaining[:-count], remaining[-count:]
            x, y = np.zeros((len(batch), width), np.int64), np.full((len(batch), width), -1, np.int64)
            for row, r in enumerate(batch):
                _, ids, size = rows[r]
                end = len(ids) - 1
                x[row, :end], y[row, end - size : end] = ids[:-1], ids[len(ids) - size :]
            part = cache.select_rows(torch.tensor([rows[r][0] for r in batch], device=device), shared + width)
            x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
            in_ending = y >= 0
            per_token, correct = torch.zeros(y.shape, device=device), ~in_ending
            per_token[in_ending], is_top = token_losses(model, model.hidden(x, part)[in_ending], y[in_ending], accuracy)
            losses[torch.tensor(batch, device=device)] = per_token.sum(1)
            if accuracy:
                correct[in_ending] = is_top
                greedy[torch.tensor(batch, device=device)] = correct.all(1)
        indices, columns = np.array(places).T
        found[indices, columns], all_greedy[indices, columns] = losses.cpu().numpy(), greedy.cpu().numpy()
        np.subtract.at(missing, indices, 1)
        complete = [i for i in dict.fromkeys(indices.tolist()) if not missing[i]]
        yield complete, found[complete], all_greedy[complete]
