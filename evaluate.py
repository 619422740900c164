"""How good is a model: loss, perplexity, bits per byte, accuracy, and what it writes.

    python evaluate.py                                          the newest run under out/, on its own validation split
    python evaluate.py --checkpoints=out/a,out/b/step_500.pt,gpt2 --dataset=tinystories
    python evaluate.py --eval_tokens=0 --stride=256             the whole split, each token with at least T - 256 before it
    python evaluate.py --baseline=True                          and the same model untrained

Writes evaluation_results.csv and evaluation_results.json, with every sample, into output_dir, and prints a table.

loss             nats a token, on windows of block_size tokens that are the same for every model of that dataset
bits per byte    loss in bits over the bytes of the text: comparable between vocabularies
distinct-n       (dist-1, dist-2) different n-grams of words over all n-grams of the samples: 1 never repeats itself
KL-1, KL-2       of the samples' token (and pair of tokens) frequencies from the corpus's, in nats; beside it stands what
                 as much text of the corpus itself scores, since few tokens never match many
"""

import contextlib
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import build_model, find_checkpoint, find_tokenizer, is_pretrained, load_payload
from common.inference import for_inference
from common.logger import finite
from common.runtime import pick_device, pick_dtype
from common.shards import (
    Dataset,
    Shard,
    atomic_write,
    cut,
    gather,
    load_dataset,
    validation_batches,
    validation_windows,
)
from common.tokenizer import Tokenizer
from configurator import configure, short_errors
from model import GPT

checkpoints = ""  # runs, folders of runs, checkpoints, Hugging Face models, with commas between; empty: the newest run
dataset = ""  # to evaluate on; empty: what each was trained on
data_dir = "data"  # where datasets are
split = "val"  # val | train
eval_tokens = 2**20  # tokens to look at, in windows evenly spaced; 0: the whole split
stride = 0  # tokens a window goes on by, of which alone the loss counts; 0: block_size, no token twice
block_size = 0  # tokens in a window; 0: the model's context
batch_size = 8  # windows at a time
baseline = False  # also the same model with the weights it began with
prompts = "Once upon a time,|Solve: (3x + 5 = 11)|Write a function add(a, b) {"  # to be continued, separated by |
num_samples = 8  # texts to write from nothing, for distinct-n and KL; 0: none, and no prompts either
max_new_tokens = 100  # tokens of each
temperature = 0.8  # of prompts and samples
top_k = 200  # of prompts and samples; 0: all
seed = 1337  # of what is written, and of the untrained weights
output_dir = "evaluation"  # where the results go
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (on a GPU what it does best, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: as sample.py reads the weights with that key

CORPUS_TOKENS = 5_000_000  # of the training split, whose frequencies samples are held against


def strided_batches(shards: list[Shard], T: int, step: int, limit: int, vocab_size: int) -> Iterator[tuple]:
    """Inputs and targets (batch_size, T) of windows that go on by `step`: a target that was one before is -1.

    limit: so many windows, evenly spaced; 0: all.
    """
    windows = [
        (s, start) for s in cut(shards) for start in range(0, max(1, s.tokens - T), step) if start + T < s.tokens
    ]
    if not windows:
        raise ValueError(f"the {split} text cannot fill a window of {T + 1:,} tokens: lower --block_size")
    if limit and limit < len(windows):
        windows = [windows[n * len(windows) // limit] for n in range(limit)]
    for first in range(0, len(windows), batch_size):
        rows = [
            (gather(s, np.array([start]), T, vocab_size)[0], start) for s, start in windows[first : first + batch_size]
        ]
        x, y = (np.stack([row[a : a + T] for row, _ in rows]).astype(np.int64) for a in (0, 1))
        for n, (_, start) in enumerate(rows):
            y[n, : T - step if start else 0] = -1
        yield x, y


@torch.no_grad()
def measure(model: GPT, found: Dataset, tokenizer: Tokenizer, amp) -> dict:
    """Loss, perplexity, bits per byte and accuracy on a dataset."""
    T, on = block_size or model.config.block_size, model.device
    shards = found.val if split == "val" else found.train
    step = stride or T
    limit = -(-eval_tokens // step)
    if step < T:
        batches = strided_batches(shards, T, step, limit, found.vocab_size)
    else:
        batches = validation_batches(validation_windows(shards, T, limit), T, found.vocab_size, batch_size)
    sizes = np.array([0 if i == tokenizer.eot else len(tokenizer.token_bytes(i)) for i in range(found.vocab_size)])
    loss_sum, correct, tokens, size = 0.0, 0, 0, 0
    for x, y in batches:
        size += int(sizes[y[y >= 0]].sum())
        x, y = torch.from_numpy(x).to(on), torch.from_numpy(y).to(on)
        known = y >= 0
        with amp():
            losses, right = model.token_losses(model.hidden(x)[known], y[known], accuracy=True)
        loss_sum, correct = loss_sum + float(losses.double().sum()), correct + int(right.sum())
        tokens += len(right)
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss_sum / math.log(2) / size if size else None,
        "accuracy": correct / tokens,
        "tokens": tokens,
    }


def write(model: GPT, tokenizer: Tokenizer, prompt: str, count: int, amp) -> list[list[int]]:
    """Continuations of a prompt: the ids behind it, without the end-of-text token."""
    ids = tokenizer.encode(prompt, special=True) or [tokenizer.eot or 0]
    known = min(model.config.vocab_size, tokenizer.n_vocab)
    model.config.vocab_size = known
    dice = torch.Generator(model.device).manual_seed(seed)
    stop = () if tokenizer.eot is None else (tokenizer.eot,)
    idx = torch.tensor([ids] * count, device=model.device)
    with amp():
        new = model.generate(idx, max_new_tokens, temperature, min(top_k, known), stop_tokens=stop, generator=dice)
        rows = torch.stack(list(new), dim=1).tolist()
    return [row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row for row in rows]


def distinct(texts: list[str], n: int) -> float | None:
    """Different n-grams of words over all of them (https://arxiv.org/abs/1510.03055); None if there is none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def divergence(ids: list[np.ndarray], corpus: np.ndarray, n: int) -> float | None:
    """KL, in nats, of the frequencies of n-grams of ids from those of the corpus, half a count added to what it lacks."""

    def count(arrays) -> Counter:
        return Counter(gram for a in arrays for gram in zip(*(a[i:].tolist() for i in range(n))))

    seen, known = count(ids), count([corpus])
    total, size = sum(seen.values()), sum(known.values())
    if not total:
        return None
    lacking = sum(gram not in known for gram in seen)
    size += lacking / 2
    return sum(c / total * math.log(c / total / (known.get(gram, 0.5) / size)) for gram, c in seen.items())


def writing(model: GPT, tokenizer: Tokenizer, found: Dataset, amp) -> dict:
    """Samples and continued prompts, and what the samples are like."""
    told = {"prompts": {}, "samples": []}
    for prompt in filter(None, prompts.split("|")):
        try:
            told["prompts"][prompt] = tokenizer.decode(write(model, tokenizer, prompt, 1, amp)[0])
        except (ValueError, RuntimeError) as e:  # a character that it does not know, weights that are not numbers
            told["prompts"][prompt] = f"({e})"
    try:
        rows = write(model, tokenizer, "", num_samples, amp)
    except RuntimeError as e:  # probabilities that are not numbers
        print(f"warning: nothing can be sampled ({e})")
        rows = []
    told["samples"] = [tokenizer.decode(row) for row in rows]
    told |= {f"distinct_{n}": distinct(told["samples"], n) for n in (1, 2, 3)}
    corpus, taken = [], 0
    for shard in found.train:
        corpus.append(np.asarray(shard.map()[: CORPUS_TOKENS - taken], np.int64))
        taken += len(corpus[-1])
    corpus = np.concatenate(corpus)
    arrays = [np.array(row) for row in rows if row]
    size = sum(map(len, arrays))
    own = np.concatenate([s.map()[:size] for s in found.val or found.train])[:size].astype(np.int64)
    for name, n in (("unigram", 1), ("bigram", 2)):
        told[f"kl_{name}"] = divergence(arrays, corpus, n)
        told[f"kl_{name}_of_the_corpus"] = divergence([own], corpus, n)
    return told


def evaluate(name: str, on: torch.device, amp) -> Iterator[dict]:
    """The results of a model, and of its untrained self if that is asked for."""
    payload = load_payload(name)
    path = name if is_pretrained(name) else str(find_checkpoint(name))
    tokenizer = find_tokenizer(payload, data_dir)
    where = dataset or payload.get("config", {}).get("dataset", "")
    if not where:
        raise ValueError(f"{path} does not say what it was trained on: --dataset=NAME")
    if "," in where:
        raise ValueError(f"{path} was trained on {where}: choose one of them to evaluate on, --dataset=NAME")
    found = load_dataset(where, data_dir)
    same = found.tokenizer == tokenizer.to_dict() or found.tokenizer["kind"] == tokenizer.to_dict()["kind"] == "gpt2"
    if not same:
        raise ValueError(f"{path} has another vocabulary than {where}: prepare the text with --tokenizer= its own")
    untrained = None
    if baseline:
        torch.manual_seed(seed)
        untrained = GPT(build_model(payload).config)
    for kind, model in (("untrained", untrained), ("", build_model(payload))):
        if model is None:
            continue
        c, params = model.config, model.num_params()
        if quantize:
            for_inference(model, on, pick_dtype(dtype, on), quantize)
        model.to(on).eval()
        result = {
            "path": f"{path} {kind}".strip(), "dataset": where, "split": split, "step": 0 if kind else payload.get("step"),
            "params": params, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
            "block_size": block_size or c.block_size, "stride": stride or block_size or c.block_size,
        }  # fmt: skip
        if result["block_size"] > c.block_size or result["stride"] > result["block_size"]:
            raise ValueError(
                f"--block_size={result['block_size']} --stride={result['stride']}: the context is {c.block_size}"
            )
        result |= measure(model, found, tokenizer, amp)
        if num_samples:
            result |= writing(model, tokenizer, found, amp)
        yield result


COLUMNS = {  # of results: as the table calls them
    "loss": ("loss", "{:.4f}"), "perplexity": ("perplexity", "{:,.2f}"), "bits_per_byte": ("bits/byte", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"), "distinct_1": ("dist-1", "{:.3f}"), "distinct_2": ("dist-2", "{:.3f}"),
    "kl_unigram": ("KL-1", "{:.3f}"), "kl_bigram": ("KL-2", "{:.3f}"),
}  # fmt: skip


def table(results: list[dict]) -> str:
    columns = {c: shown for c, shown in COLUMNS.items() if any(r.get(c) is not None for r in results)}
    rows = [["", "params", *(title for title, _ in columns.values())]]
    for r in results:
        numbers = [f.format(r[c]) if r.get(c) is not None else "" for c, (_, f) in columns.items()]
        rows.append([r["path"].replace("/best.pt", ""), f"{r['params'] / 1e6:.2f}M", *numbers])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def runs_in(name: str) -> list[str]:
    """The runs in a folder that is none itself, as a study's are; else the name alone."""
    folder = Path(name)
    if not name or not folder.is_dir() or is_pretrained(name) or find_checkpoint(name).is_file():
        return [name]
    return sorted(str(run) for run in folder.iterdir() if run.is_dir() and find_checkpoint(run).is_file()) or [name]


def write_results(folder: Path, results: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = [k for k in results[0] if k not in ("prompts", "samples")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    atomic_write(folder / "evaluation_results.csv", text.getvalue())
    told = json.dumps([finite(r) for r in results], indent=1, ensure_ascii=False)
    atomic_write(folder / "evaluation_results.json", told)


def main() -> None:
    if split not in ("val", "train"):
        raise ValueError(f"--split={split}: choose val or train")
    if min(eval_tokens, stride, block_size, num_samples, top_k, temperature) < 0 or min(batch_size, max_new_tokens) < 1:
        raise ValueError(
            "--eval_tokens, --stride, --block_size, --num_samples, --top_k and --temperature are at least 0, "
            "--batch_size and --max_new_tokens at least 1"
        )
    on = pick_device(device)
    kind = torch.float32 if dtype == "auto" and on.type != "cuda" else pick_dtype(dtype, on)

    def amp():
        return contextlib.nullcontext() if kind == torch.float32 or quantize else torch.autocast(on.type, kind)

    results = []
    names = [each for name in checkpoints.split(",") for each in runs_in(name)]
    for name in names:  # a wrong name is told before the first is evaluated
        if not is_pretrained(name) and not find_checkpoint(name).is_file():
            raise ValueError(f"--checkpoints={name}: there is no checkpoint {find_checkpoint(name)}")
    folder = Path(output_dir)
    for name in names:
        for result in evaluate(name, on, amp):
            results.append(result)
            print(f"{result['path']}: loss {result['loss']:.4f} on {result['tokens']:,} tokens of {result['dataset']}")
            write_results(folder, results)
    last = results[-1]
    for prompt, told in last.get("prompts", {}).items():
        print(f"\n> {prompt}\n{prompt}{told}")
    if last.get("samples"):
        print(f"\n> a sample\n{last['samples'][0]}")
    print(f"\n{table(results)}")
    if num_samples and last["kl_unigram_of_the_corpus"] is not None:
        print(
            f"KL of as much of the corpus: {last['kl_unigram_of_the_corpus']:.3f}, {last['kl_bigram_of_the_corpus']:.3f}"
        )
    print(f"{folder}/evaluation_results.csv, evaluation_results.json")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
