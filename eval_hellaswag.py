"""HellaSwag (https://arxiv.org/abs/1905.07830): which of four endings does the model find likeliest?

    python eval_hellaswag.py                          the newest run under out/, all 10,042 validation examples
    python eval_hellaswag.py -m gpt2 -d cuda          GPT-2 (or --init_from= a run, a checkpoint, a Hugging Face folder or id)
    python eval_hellaswag.py --data=FILE --limit=200 --output=results.jsonl
    torchrun --standalone --nproc_per_node=8 eval_hellaswag.py --init_from=gpt2-xl

Two ways of scoring are common, and they differ: the text they show the model and what they divide by.

    classic   the context and " " + ending as they are. acc: the least sum of the ending's token losses; acc_norm: the least
              mean loss a token (build-nanogpt, llm.c).
    harness   lm-evaluation-harness: activity label in front, brackets removed. acc: the greatest log-likelihood; acc_norm:
              divided by the ending's length in characters.

Chance is 0.25.
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common.checkpoint import find_tokenizer, load_model
from common.corpus import download
from common.inference import for_inference
from common.runtime import join_ranks, leave_ranks, pick_dtype, pick_own_device, tune_malloc
from common.shards import atomic_write
from common.tokenizer import Tokenizer
from configurator import configure, short_errors
from model import GPT

out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
split = "val"  # val | train | test (which has no labels: only --output tells)
data = ""  # a file of examples instead, .jsonl in the original's fields
data_dir = "data"  # where the examples are kept, in hellaswag/
source = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"  # where they are downloaded from
scoring = "both"  # both | classic | harness
limit = 0  # the first so many examples; 0: all
batch_size = 0  # examples at a time; 0: 8 on a CPU, else 64
output = ""  # a .jsonl file of every example's losses and choices
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where native) | float32 | bfloat16 | float16
backend = "nccl"  # of torchrun's ranks on GPUs; the CPU's is gloo
timeout = 600  # seconds that a rank waits for the others

SPLITS = {"train": 39905, "val": 10042, "test": 10003}
SCORINGS = ("classic", "harness")


class Question(NamedTuple):
    """An example as a model sees it. Its endings follow the context, each by itself."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # what acc_norm divides by


def read_examples(path: Path, limit: int = 0) -> list[dict]:
    """The examples of a .jsonl file. Raises ValueError naming the line that is not one."""
    examples = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if limit and len(examples) == limit:
                break
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                texts = [example["ctx"], *example["endings"]]
                label = example.get("label", "")
                if len(texts) != 5 or not all(isinstance(t, str) and t.strip() for t in texts):
                    raise ValueError("it takes a ctx and four endings, as text")
                example["label"] = int(label) if label not in ("", None) else None
                if example["label"] not in (None, 0, 1, 2, 3):
                    raise ValueError(f"the label is {label!r}")
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                what = f"there is no {e}" if isinstance(e, KeyError) else e
                raise ValueError(f"{path}, line {number}: not an example of HellaSwag: {what}") from None
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def find_examples(split: str, data_dir: str, limit: int = 0) -> list[dict]:
    """The examples of a split, downloaded once. Raises ValueError if they cannot be had or are not all there."""
    path = Path(data_dir) / "hellaswag" / f"hellaswag_{split}.jsonl"
    if not path.exists():
        download(f"{source}/{path.name}", path)
    examples = read_examples(path)
    if len(examples) != SPLITS[split]:
        raise ValueError(
            f"{path} holds {len(examples):,} examples of {SPLITS[split]:,}: remove it to download it again"
        )
    return examples[: limit or None]


def classic_question(example: dict, tokenizer: Tokenizer) -> Question:
    endings = [tokenizer.encode(" " + e) for e in example["endings"]]
    return Question(tokenizer.encode(example["ctx"]), endings, [len(e) for e in endings])


def harness_question(example: dict, tokenizer: Tokenizer) -> Question:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    first, second = (example["ctx_a"], example.get("ctx_b") or "") if "ctx_a" in example else (example["ctx"], "")
    context = clean(f"{example.get('activity_label', '')}: {first} {second.capitalize()}")
    choices = [clean(e) for e in example["endings"]]
    kept = context.rstrip()  # spaces at its end belong to the endings
    endings = [context[len(kept) :] + " " + c for c in choices]
    start = tokenizer.encode(kept)
    whole = [tokenizer.encode(kept + e) for e in endings]
    return Question(start, [w[len(start) :] for w in whole], [len(c) for c in choices])


QUESTIONS = {"classic": classic_question, "harness": harness_question}


def check_lengths(questions: list[Question], block_size: int) -> None:
    if max((len(e) for q in questions for e in q.endings), default=0) > block_size:
        raise ValueError(f"an ending has more tokens than the model's context of {block_size}: this model is too small")


@torch.no_grad()
def ending_losses(model: GPT, questions: list[Question], batch_size: int = 0) -> Iterator[tuple[list[int], np.ndarray]]:
    """The sum of every ending's token losses: yields (which questions, losses (len, 4) in nats), short ones first.

    A question is one row: its context, then its four endings, none of which sees another. So a context is read once, the
    head sees the endings alone, and rows of about one length go together. A context that is too long loses its front.
    Raises ValueError for an ending longer than the model's context.
    """
    T, on = model.config.block_size, model.device
    check_lengths(questions, T)
    batch_size = batch_size or (8 if on.type == "cpu" else 64)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].context) + sum(map(len, questions[i].endings)))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [laid_out(questions[i], T) for i in chosen]
        shape = len(rows), max(len(row.ids) for row in rows)
        ids, at, part = (np.zeros(shape, np.int64) for _ in range(3))
        for n, row in enumerate(rows):
            ids[n, : len(row.ids)], at[n, : len(row.ids)], part[n, : len(row.ids)] = row.ids, row.at, row.part
        before = np.concatenate([n * shape[1] + np.array(row.before) for n, row in enumerate(rows)])
        targets = np.concatenate([np.concatenate(questions[i].endings) for i in chosen])
        of = np.repeat(np.arange(4 * len(rows)), [len(e) for i in chosen for e in questions[i].endings])
        ids, at, part, before, targets, of = (torch.from_numpy(a).to(on) for a in (ids, at, part, before, targets, of))
        key, query = part[:, None, None, :], part[:, None, :, None]
        hidden = model.hidden(ids, at=at, mask=((key == 0) | (key == query)).tril())
        each, _ = model.token_losses(hidden.flatten(0, 1)[before], targets)
        losses = torch.zeros(4 * len(rows), device=on).index_add_(0, of, each)
        yield chosen, losses.view(-1, 4).cpu().numpy()


class Row(NamedTuple):
    """A question as one row of ids: each ending goes on from the context's last position. Its last token is not read."""

    ids: list[int]
    at: list[int]  # positions
    part: list[int]  # 0: the context | 1 to 4: an ending
    before: list[int]  # where in the row the token before each of the endings' tokens is


def laid_out(question: Question, block_size: int) -> Row:
    """The question's row, its context's front cut where block_size has no room for it before the longest ending."""
    context = question.context[-(block_size + 1 - max(map(len, question.endings))) :] or [0]
    end = len(context)
    row = Row([*context], [*range(end)], [0] * end, [])
    for n, ending in enumerate(question.endings, 1):
        more, first = len(ending) - 1, len(row.ids)
        row.ids.extend(ending[:-1])
        row.at.extend(range(end, end + more))
        row.part.extend([n] * more)
        row.before.extend([end - 1, *range(first, first + more)])
    return row


class Score:
    """Examples counted so far, and how many were right by acc and by acc_norm."""

    def __init__(self):
        self.count = np.zeros(3)

    def add(self, losses: np.ndarray, lengths: list[int], label: int | None) -> tuple[int, int]:
        """Returns the two choices. losses: (4,)"""
        choices = int(losses.argmin()), int((losses / np.array(lengths)).argmin())
        if label is not None:
            self.count += (1, choices[0] == label, choices[1] == label)
        return choices

    @property
    def accuracy(self) -> tuple[float, float]:
        return tuple(self.count[1:] / self.count[0]) if self.count[0] else (math.nan, math.nan)

    def __str__(self):
        return "acc {:.4f} acc_norm {:.4f}".format(*self.accuracy)


def classic_questions(examples: list[dict], tokenizer: Tokenizer, block_size: int) -> list[tuple[Question, int | None]]:
    """Every example with its label. Raises ValueError now for what a model of this context cannot be asked."""
    found = [(classic_question(e, tokenizer), e["label"]) for e in examples]
    check_lengths([q for q, _ in found], block_size)
    return found


def classic_accuracy(model: GPT, questions: list[tuple[Question, int | None]], rank=0, world=1) -> tuple[float, float]:
    """acc and acc_norm of the classic scoring, shared out over the ranks; the model is left as it was. For training."""
    mine, score, training = questions[rank::world], Score(), model.training
    model.eval()
    for chosen, losses in ending_losses(model, [q for q, _ in mine]):
        for i, loss in zip(chosen, losses):
            score.add(loss, mine[i][0].lengths, mine[i][1])
    model.train(training)
    count = torch.from_numpy(score.count)
    if world > 1:
        dist.all_reduce(count)
    score.count = count.numpy()
    return score.accuracy


def main() -> None:
    if split not in SPLITS:
        raise ValueError(f"--split={split}: choose one of {', '.join(SPLITS)}")
    if scoring not in (*SCORINGS, "both"):
        raise ValueError(f"--scoring={scoring}: choose both, classic or harness")
    if limit < 0 or batch_size < 0:
        raise ValueError(f"--limit={limit}, --batch_size={batch_size}: must be at least 0")
    on = pick_own_device(device)
    if on.type == "cpu":
        tune_malloc()
    rank, world = join_ranks(on, backend, timeout)
    if data and not Path(data).is_file():
        raise ValueError(f"--data={data}: there is no such file")
    if not data and rank == 0:
        find_examples(split, data_dir, 1)  # downloads
    if world > 1:
        dist.barrier()
    examples = read_examples(Path(data), limit) if data else find_examples(split, data_dir, limit)
    model, payload = load_model(out_dir if init_from == "resume" else init_from)
    tokenizer = find_tokenizer(payload, data_dir)
    kind, params = pick_dtype(dtype, on), model.num_params()
    for_inference(model, on, kind)
    mine = examples[rank::world]
    if rank == 0:
        print(f"{len(examples):,} examples, {params:,} parameters, {on}, {str(kind).removeprefix('torch.')}")
    results = [{"ind": e.get("ind", n), "label": e["label"]} for n, e in enumerate(mine)]
    scores, began = {}, time.perf_counter()
    for name in SCORINGS if scoring == "both" else (scoring,):
        score, done, told, start = Score(), 0, time.perf_counter(), time.perf_counter()
        questions = [QUESTIONS[name](e, tokenizer) for e in mine]
        for chosen, losses in ending_losses(model, questions, batch_size):
            for i, loss in zip(chosen, losses):
                acc, acc_norm = score.add(loss, questions[i].lengths, mine[i]["label"])
                results[i][name] = {"losses": [round(float(x), 6) for x in loss], "lengths": questions[i].lengths}
                results[i][name] |= {"acc": acc, "acc_norm": acc_norm}
            done += len(chosen)
            if rank == 0 and time.perf_counter() - told > 5:
                told = time.perf_counter()
                print(
                    f"{done * world:>7,}/{len(examples):,}  {name} {score}  {done * world / (told - start):.1f} examples/s"
                )
        count = torch.from_numpy(score.count)
        if world > 1:
            dist.all_reduce(count)  # gloo's, on the CPU
        score.count, scores[name] = count.numpy(), score
        if rank == 0:
            speed = len(examples) / (time.perf_counter() - start)
            print(
                f"{name:<8} {score}  ({speed:.1f} examples/s)"
                if score.count[0]
                else f"{name:<8} no labels ({speed:.1f} examples/s)"
            )
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, results)
        results = [everyone[n % world][n // world] for n in range(len(examples))]
    if rank == 0 and output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(output), "".join(json.dumps(r) + "\n" for r in results))
        print(f"{output}: {len(results):,} examples, {time.perf_counter() - began:.1f} s")
    leave_ranks()


def long_options(argv: list[str]) -> list[str]:
    """-m NAME and -d DEVICE, as eval_hellaswag.py scripts have taken them since build-nanogpt's, in our form."""
    names = {"-m": "init_from", "--model_type": "init_from", "--model_name": "init_from", "-d": "device"}
    found, rest = [], iter(argv)
    for word in rest:
        found.append(f"--{names[word]}={next(rest, '')}" if word in names else word)
    return found


if __name__ == "__main__":
    with short_errors():
        configure(globals(), long_options(sys.argv[1:]))
        main()
