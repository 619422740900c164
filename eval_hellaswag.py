"""HellaSwag (https://arxiv.org/abs/1905.07830): which of four endings does the model find most likely?

    python eval_hellaswag.py                          the newest run under out/, all 10,042 validation examples
    python eval_hellaswag.py -m gpt2 -d cuda          GPT-2 (or --init_from= a run, a checkpoint, a Hugging Face folder or id)
    python eval_hellaswag.py --data=FILE --limit=200 --output=results.jsonl
    torchrun --standalone --nproc_per_node=8 eval_hellaswag.py --init_from=gpt2-xl

Two scorings are common. They show the model different text and normalise differently:

    classic   the context and " " + ending as they are. acc: the lowest sum of the ending's token losses; acc_norm: the
              lowest mean loss per token (build-nanogpt, llm.c).
    harness   lm-evaluation-harness: activity label in front, brackets removed. acc: the highest log-likelihood; acc_norm:
              divided by the ending's length in characters.

Chance is 0.25.
"""

import json
import math
import re
import sys
import time
from pathlib import Path

from common import runtime
from common.checkpoint import chosen_model, find_tokenizer, load_model
from common.cpu import tune_malloc
from common.files import atomic_write, check_writable, download, parse_json
from common.inference import for_inference
from common.scoring import Question, check_lengths, ending_losses
from common.tokenizer import PretrainedTokenizer, Tokenizer, tokenizer_from_dict
from configurator import UserError, check_bounds, check_choice, configure, short_errors
from model import GPT

import numpy as np
import torch
import torch.distributed as dist

out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
split = "val"  # val | train | test (which has no labels: use --output)
data = ""  # a file of examples instead, .jsonl with the original's fields
data_dir = "data"  # where the examples are kept, in hellaswag/
source = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"  # where they are downloaded from
scoring = "both"  # both | classic | harness
limit = 0  # score the first N examples; 0: all
batch_size = 0  # examples at a time; 0: 8 on a CPU, 64 elsewhere
output = ""  # a .jsonl file for every example's losses and choices
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where it is fast) | float32 | bfloat16 | float16
backend = "nccl"  # of torchrun's ranks on GPUs; CPUs use gloo
timeout = 600  # seconds a rank waits for the others

SPLITS = {"train": 39905, "val": 10042, "test": 10003}

# -----------------------------------------------------------------------------
# Examples


def read_examples(path: Path, limit: int = 0) -> list[dict]:
    """The examples of a .jsonl file. Raises UserError naming the line that is not one."""
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = parse_json(line)
            texts, label = [example["ctx"], *example["endings"]], example.get("label", "")
            if len(texts) != 5 or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError("it needs a ctx and four endings, as text")
            example["label"] = int(label) if label not in ("", None) else None
            if example["label"] not in (None, 0, 1, 2, 3):
                raise ValueError(f"the label is {label!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            reason = f"there is no {e}" if isinstance(e, KeyError) else e
            raise UserError(f"{path}, line {number}: not a HellaSwag example: {reason}") from None
        examples.append(example)
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def find_examples(split: str, data_dir: str, limit: int = 0) -> list[dict]:
    """The examples of a split, downloaded once. Raises UserError if they cannot be had or some are missing."""
    path = Path(data_dir) / "hellaswag" / f"hellaswag_{split}.jsonl"
    if not path.exists():
        download(f"{source}/{path.name}", path)
    examples = read_examples(path)
    if len(examples) != SPLITS[split]:
        raise UserError(f"{path} holds {len(examples):,} examples of {SPLITS[split]:,}: remove it to download it again")
    return examples[: limit or None]


def load_examples(data: str, data_dir: str, limit: int, split: str = "val") -> list[dict]:
    """The examples of a file, or of a split, which rank 0 downloads for all."""
    if data and not Path(data).is_file():
        raise UserError(f"--data={data}: no such file")
    if data:
        return read_examples(Path(data), limit)
    if runtime.is_master():
        find_examples(split, data_dir, 1)
    runtime.barrier()
    return find_examples(split, data_dir, limit)


def classic_question(example: dict, tokenizer: Tokenizer) -> Question:
    context = tokenizer.encode(example["ctx"])
    if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.token_bytes(tokenizer.encode("a")[0])[:1] == b" ":
        # It puts a space before every text: of an ending by itself there would be two.
        endings = [tokenizer.encode(f"{example['ctx']} {e}")[len(context) :] for e in example["endings"]]
    else:
        endings = [tokenizer.encode(" " + e) for e in example["endings"]]
    return Question(context, endings, [len(e) for e in endings], example.get("label"))


def harness_question(example: dict, tokenizer: Tokenizer) -> Question:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    first, second = (example["ctx_a"], example.get("ctx_b") or "") if "ctx_a" in example else (example["ctx"], "")
    context = clean(f"{example.get('activity_label', '')}: {first} {second.capitalize()}")
    choices = [clean(e) for e in example["endings"]]
    stripped = context.rstrip()  # spaces at the context's end belong to the endings
    endings = [context[len(stripped) :] + " " + c for c in choices]
    start = tokenizer.encode(stripped)
    whole = [tokenizer.encode(stripped + e) for e in endings]
    return Question(start, [w[len(start) :] for w in whole], [len(c) for c in choices], example.get("label"))


QUESTIONS = {"classic": classic_question, "harness": harness_question}

# -----------------------------------------------------------------------------
# Scoring


class Score:
    def __init__(self):
        self.counts = torch.zeros(3, dtype=torch.float64)  # examples with a label, right by acc, right by acc_norm

    def add(self, question: Question, losses: np.ndarray) -> dict:
        """Count a question with losses (4,). Returns them and the choices by acc and acc_norm."""
        acc, acc_norm = int(losses.argmin()), int((losses / np.array(question.lengths)).argmin())
        if question.label is not None:
            self.counts += torch.tensor([1, acc == question.label, acc_norm == question.label])
        rounded = [round(float(x), 6) for x in losses]
        return {"losses": rounded, "lengths": question.lengths, "acc": acc, "acc_norm": acc_norm}

    def accuracy(self) -> tuple[float, float]:
        examples, right, right_norm = self.counts.tolist()
        return (right / examples, right_norm / examples) if examples else (math.nan, math.nan)

    def __str__(self):
        return "acc {:.4f} acc_norm {:.4f}".format(*self.accuracy()) if self.counts[0] else "no labels"


def load_classic(data: str, data_dir: str, limit: int, tokenizer: dict, block_size: int) -> list[Question]:
    """Questions for train.py. Raises UserError if a model with this context cannot score them."""
    examples, tokenizer = load_examples(data, data_dir, limit), tokenizer_from_dict(tokenizer)
    questions = [classic_question(e, tokenizer) for e in examples]
    check_lengths(questions, block_size)
    return questions


def classic_accuracy(model: GPT, questions: list[Question], rank=0, world_size=1) -> tuple[float, float]:
    """acc and acc_norm of load_classic(), for train.py. The ranks share the questions."""
    own, score, training = questions[rank::world_size], Score(), model.training
    model.eval()
    for indices, losses, _ in ending_losses(model, own):
        for i, row in zip(indices, losses):
            score.add(own[i], row)
    model.train(training)
    runtime.all_reduce(score.counts)
    return score.accuracy()


def score_all(name: str, model: GPT, examples: list[dict], tokenizer: Tokenizer, results: list[dict], total: int):
    """Score this rank's examples, print progress, and add each example's losses and choices to its result."""
    questions, score, done = [QUESTIONS[name](e, tokenizer) for e in examples], Score(), 0
    start = printed = time.perf_counter()
    for indices, losses, _ in ending_losses(model, questions, batch_size):
        for i, row in zip(indices, losses):
            results[i][name] = score.add(questions[i], row)
        done += len(indices)
        if runtime.is_master() and (now := time.perf_counter()) - printed > 5:
            printed = now
            print(f"{done:>7,}/{len(examples):,}  {name} {score}  {done / (now - start):.1f} examples/s")
    runtime.all_reduce(score.counts)
    if runtime.is_master():
        print(f"{name:<8} {score}  {total / (time.perf_counter() - start):.1f} examples/s")


def main() -> None:
    check_choice("split", split, SPLITS)
    check_choice("scoring", scoring, ("both", *QUESTIONS))
    check_bounds(globals(), at_least_0="limit batch_size")
    if output:
        check_writable("output", output, make_folders=True)
    local = runtime.pick_local_device(device)
    if local.type == "cpu":
        tune_malloc()
    rank, world_size = runtime.init_distributed(local, backend, timeout)
    examples = load_examples(data, data_dir, limit, split)
    model, checkpoint = load_model(chosen_model(out_dir, init_from))
    tokenizer = find_tokenizer(checkpoint, data_dir)
    weights_dtype, params = runtime.pick_dtype(dtype, local), model.num_params()
    for_inference(model, local, weights_dtype)
    own = examples[rank::world_size]
    if rank == 0:
        print(f"{len(examples):,} examples, {params:,} parameters, {local}, {runtime.dtype_name(weights_dtype)}")
    start = time.perf_counter()
    results = [{"ind": e.get("ind", rank + n * world_size), "label": e["label"]} for n, e in enumerate(own)]
    for name in QUESTIONS if scoring == "both" else (scoring,):
        score_all(name, model, own, tokenizer, results, len(examples))
    if world_size > 1:
        per_rank = [None] * world_size
        dist.all_gather_object(per_rank, results)
        results = [per_rank[n % world_size][n // world_size] for n in range(len(examples))]
    if rank == 0 and output:
        Path(output).resolve().parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(output), "".join(json.dumps(r) + "\n" for r in results))
        print(f"{output}: {len(results):,} examples, {time.perf_counter() - start:.1f} s")
    runtime.shutdown_distributed()


def long_options(argv: list[str]) -> list[str]:
    """-m NAME and -d DEVICE, as eval_hellaswag.py scripts have taken them since build-nanogpt, as --key=value."""
    names = {"-m": "init_from", "--model_type": "init_from", "--model_name": "init_from", "-d": "device"}
    options, words = [], iter(argv)
    for word in words:
        options.append(f"--{names[word]}={next(words, '')}" if word in names else word)
    return options


if __name__ == "__main__":
    with short_errors(), runtime.explain_memory("--batch_size"):
        configure(globals(), long_options(sys.argv[1:]))
        main()
