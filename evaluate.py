"""How good is a model: loss, perplexity, bits per byte, accuracy, and what it writes.

    python evaluate.py                                          the newest run under out/, on its own validation split
    python evaluate.py --checkpoints=out/a,out/b/step_500.pt,gpt2 --dataset=tinystories
    python evaluate.py --eval_tokens=0 --stride=256             the whole split, each token with at least T - 256 before it
    python evaluate.py --baseline=True                          also the same model untrained
    python evaluate.py --tasks=sums                              of a chat model: how many of 100 one-digit sums are right
    python evaluate.py --tasks=arc_easy,hellaswag --limit=200   tasks of lm-evaluation-harness (pip install -e '.[eval]')

Writes evaluation_results.csv and evaluation_results.json, with every sample, into output_dir, and prints a table.

loss             nats per token, on windows of block_size tokens that are the same for every model on a dataset
bits per byte    loss in bits per byte of text: comparable between vocabularies
distinct-n       (dist-1, dist-2) distinct n-grams of words over all n-grams in the samples: 1 never repeats itself
KL-1, KL-2       divergence of the samples' unigram and bigram frequencies from the corpus's, in nats. Beside it stands the
                 value of an equally long piece of the corpus, since few tokens never match many
"""

import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import small_talk
from common.chat import chat_prompt
from common.checkpoint import build_model, chosen_model, find_checkpoint, find_tokenizer, read_model
from common.files import atomic_write, check_writable
from common.inference import complete, for_inference, prompt_ids
from common.logger import finite, perplexity
from common.pretrained import is_pretrained
from common.runtime import autocast, explain_memory, pick_device, pick_dtype
from common.scoring import sum_losses
from common.shards import Dataset, Shard, load_dataset
from common.tokenizer import Tokenizer, same_vocabulary
from common.windows import split_shards, validation_batches, validation_windows
from configurator import UserError, check_bounds, check_choice, configure, short_errors
from model import GPT

import numpy as np
import torch

checkpoints = ""  # runs, folders of runs, checkpoints, Hugging Face models, separated by commas; empty: the newest run
dataset = ""  # to evaluate on; empty: what each was trained on
data_dir = "data"  # where datasets are
split = "val"  # val | train
eval_tokens = 2**20  # tokens to evaluate, in evenly spaced windows; 0: the whole split
stride = 0  # tokens between windows, of which only the last `stride` count; 0: block_size, no overlap
block_size = 0  # tokens in a window; 0: the model's context
batch_size = 8  # windows at a time
tasks = ""  # sums, and tasks of lm-evaluation-harness, separated by commas; asked as turns of a chat model
limit = 0  # questions of each task; 0: all
tasks_dir = ""  # a folder with harness tasks of your own
baseline = False  # also evaluate the same model with its initial weights
prompts = "Once upon a time,|Solve: (3x + 5 = 11)|Write a function add(a, b) {"  # to be continued, separated by |
num_samples = 8  # texts to sample without a prompt, for distinct-n and KL; 0: none, and no prompts either
max_new_tokens = 100  # tokens in each
temperature = 0.8  # of prompts and samples
top_k = 200  # of prompts and samples; 0: all
seed = 1337  # of sampling, and of the untrained weights
output_dir = "evaluation"  # where the results go
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (on a GPU the fastest, elsewhere float32) | float32 | bfloat16 | float16
quantize = ""  # int8: evaluate with 8-bit weights, as sample.py --quantize=int8

CORPUS_TOKENS = 5_000_000  # of the training split, for the corpus's frequencies


def strided_windows(shards: list[Shard], T: int, step: int, limit: int) -> list[tuple[Shard, int]]:
    """Windows of T tokens, `step` tokens apart, as (shard, start offset); with a limit, that many evenly spaced."""
    windows = [(s, start) for s in split_shards(shards) for start in range(0, s.tokens - T, step)]
    if not windows:
        raise UserError(f"the {split} text cannot fill a window of {T + 1:,} tokens: lower --block_size")
    return [windows[n * len(windows) // limit] for n in range(limit)] if 0 < limit < len(windows) else windows


def measure(model: GPT, data: Dataset, tokenizer: Tokenizer, amp) -> dict:
    """Loss, perplexity, bits per byte and accuracy on a dataset. amp: makes the autocast context."""
    T = block_size or model.config.block_size
    shards, step = data.val if split == "val" else data.train, stride or T
    limit = -(-eval_tokens // step)
    if step < T and data.is_masked:
        raise UserError(f"--stride={stride}: {data.name} holds conversations, which are evaluated whole")
    strided = step < T
    windows = strided_windows(shards, T, step, limit) if strided else validation_windows(shards, T, limit)
    token_sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(data.vocab_size)])
    token_sizes[[i for name in tokenizer.special_names() for i in tokenizer.encode(name, special=True)]] = 0
    n_bytes = 0

    def batches():
        nonlocal n_bytes
        for n, (x, y) in enumerate(validation_batches(windows, T, data.vocab_size, batch_size)):
            for row, (_, start) in enumerate(windows[n * batch_size : (n + 1) * batch_size] if strided else ()):
                y[row, : T - step if start else 0] = -1  # targets that the window before covers
            n_bytes += int(token_sizes[y[y >= 0]].sum())
            yield x, y

    loss_sum, correct, tokens = sum_losses(model, batches(), amp).tolist()
    loss, bits = loss_sum / tokens, loss_sum / math.log(2)
    result = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits / n_bytes if n_bytes else None}
    return result | {"accuracy": correct / tokens, "tokens": int(tokens)}


def distinct(texts: list[str], n: int) -> float | None:
    """Distinct n-grams of words over all n-grams (https://arxiv.org/abs/1510.03055); None if there is none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def divergence(rows: list[np.ndarray], corpus: np.ndarray, n: int) -> float | None:
    """KL divergence, in nats, of the n-gram frequencies of rows of ids from the corpus's; unseen n-grams count one half."""

    def count(arrays) -> Counter:
        return Counter(gram for a in arrays for gram in zip(*(a[i:].tolist() for i in range(n))))

    sampled, known = count(rows), count([corpus])
    total = sum(sampled.values())
    if not total:
        return None
    known_total = sum(known.values()) + sum(gram not in known for gram in sampled) / 2
    return sum(c / total * math.log(c / total / (known.get(gram, 0.5) / known_total)) for gram, c in sampled.items())


def describe_samples(model: GPT, tokenizer: Tokenizer, data: Dataset, amp) -> dict:
    """Continued prompts and free samples, and statistics of the samples."""

    def sample(prompt: str, count: int) -> list[list[int]]:
        ids, rng = prompt_ids(tokenizer, prompt), torch.Generator(model.device).manual_seed(seed)
        settings = {"temperature": temperature, "top_k": min(top_k, model.config.vocab_size), "rng": rng}
        with amp():
            return complete(model, tokenizer, [ids] * count, max_new_tokens, **settings)

    continued, rows = {}, []
    for prompt in filter(None, prompts.split("|")):
        try:
            continued[prompt] = tokenizer.decode(sample(prompt, 1)[0])
        except UserError as e:  # an unknown character, weights that are not finite
            continued[prompt] = f"({e})"
    try:
        rows = sample("", num_samples)
    except UserError as e:
        print(f"warning: nothing can be sampled ({e})")
    texts = [tokenizer.decode(row) for row in rows]
    result = {"prompts": continued, "samples": texts} | {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    arrays = [np.array(row) for row in rows if row]
    corpus = first_tokens(data.train, CORPUS_TOKENS)
    piece = first_tokens(data.val or data.train, sum(map(len, arrays)))
    for name, n in (("unigram", 1), ("bigram", 2)):
        result[f"kl_{name}"] = divergence(arrays, corpus, n)
        result[f"kl_{name}_of_the_corpus"] = divergence([piece], corpus, n)
    return result


def first_tokens(shards: list[Shard], count: int) -> np.ndarray:
    parts = [np.zeros(0, np.int64)]
    for shard in shards:
        parts.append(shard.map()[: count - sum(map(len, parts))])
    return np.concatenate(parts)


def evaluate(name: str, target: torch.device, amp) -> Iterator[dict]:
    """The results of a model, and of its untrained twin if --baseline asks for it."""
    checkpoint = read_model(name)
    path = name if is_pretrained(name) else str(find_checkpoint(name))
    tokenizer = find_tokenizer(checkpoint, data_dir)
    data_name = dataset or checkpoint.get("config", {}).get("dataset", "")
    if "," not in data_name:
        data_name = data_name.partition(":")[0]  # a single dataset may have a weight too
    if not data_name and not tasks:
        raise UserError(f"{path} does not say what it was trained on: --dataset=NAME")
    if "," in data_name and not tasks:
        raise UserError(f"{path} was trained on {data_name}: choose one of them to evaluate on, --dataset=NAME")
    is_missing = not data_name or "," in data_name or not (Path(data_dir) / data_name).is_dir()
    data = None if tasks and not dataset and is_missing else load_dataset(data_name, data_dir)
    if data and not same_vocabulary(data.tokenizer, tokenizer.to_dict()):
        raise UserError(f"{path} has another vocabulary than {data_name}: prepare the text with its own, --tokenizer=")
    model = build_model(checkpoint)
    c, models = model.config, {path: model}
    T = block_size or c.block_size
    if T > c.block_size or stride > T:
        raise UserError(f"--block_size={T} --stride={stride or T}: the context is {c.block_size}")
    if baseline:
        torch.manual_seed(seed)
        models = {f"{path} untrained": GPT(replace(c)), path: model}
    for title, model in models.items():
        params, step = model.num_params(), checkpoint.get("step") if title == path else 0
        if quantize:
            for_inference(model, target, pick_dtype(dtype, target), quantize)
        model.to(target).eval()
        result = {
            "path": title, "dataset": data_name, "split": split, "step": step, "params": params, "n_embd": c.n_embd,
            "n_layer": c.n_layer, "n_head": c.n_head, "block_size": T, "stride": stride or T,
            **(measure(model, data, tokenizer, amp) if data else {}),
        }  # fmt: skip
        # Ids that pad the vocabulary are not sampled.
        model.config.vocab_size = min(c.vocab_size, tokenizer.n_vocab)
        is_chat = bool(checkpoint.get("is_chat"))
        wanted, result["scores"] = [*filter(None, tasks.split(","))], {}
        if "sums" in wanted:
            result["scores"]["sums"] = score_sums(model, tokenizer, amp, is_chat)
        if names := [name for name in wanted if name != "sums"]:
            result["scores"] |= run_harness(model, tokenizer, names, amp, is_chat)
        if num_samples and data and not tasks:
            result |= describe_samples(model, tokenizer, data, amp)
        yield result


def score_sums(model: GPT, tokenizer: Tokenizer, amp, is_chat: bool) -> float:
    """The share of the 100 one-digit sums, in words that no synthetic conversation has, that are answered right."""
    if not is_chat:
        raise UserError("--tasks=sums: it is for a model that was trained on conversations")
    questions = small_talk.held_out_sums()[: limit or None]
    rows = [chat_prompt(tokenizer, [], question, model.config.block_size, True)[0] for question, _ in questions]
    with amp():
        answers = complete(model, tokenizer, rows, min(40, model.config.block_size), temperature=0.0)
    numbers = [re.findall(r"-?\d+", tokenizer.decode(ids)) for ids in answers]
    return sum(found[-1:] == [str(result)] for found, (_, result) in zip(numbers, questions)) / len(questions)


def run_harness(model: GPT, tokenizer: Tokenizer, names: list[str], amp, is_chat: bool) -> dict:
    try:
        from common.harness import run_tasks
    except ImportError as e:
        raise UserError(f"--tasks={tasks} needs lm-evaluation-harness ({e}): pip install -e '.[eval]'") from None
    return run_tasks(model, tokenizer, names, limit, tasks_dir, amp, batch_size, is_chat)


COLUMNS = {  # of results: title and format in the printed table
    "params": ("params", "{:,}"), "loss": ("loss", "{:.4f}"), "perplexity": ("perplexity", "{:,.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"), "accuracy": ("accuracy", "{:.1%}"), "distinct_1": ("dist-1", "{:.3f}"),
    "distinct_2": ("dist-2", "{:.3f}"), "kl_unigram": ("KL-1", "{:.3f}"), "kl_bigram": ("KL-2", "{:.3f}"),
}  # fmt: skip


def table(results: list[dict]) -> str:
    scores = {name: (name, "{:.4f}") for r in results for name in r["scores"]}
    results = [r | r["scores"] for r in results]
    columns = {c: spec for c, spec in COLUMNS.items() if any(r.get(c) is not None for r in results)} | scores
    rows = [["", *(title for title, _ in columns.values())]]
    for r in results:
        numbers = [f.format(r[c]) if r.get(c) is not None else "" for c, (_, f) in columns.items()]
        rows.append([r["path"].replace("/best.pt", ""), *numbers])
    name_width, *widths = (max(map(len, column)) for column in zip(*rows))
    lines = ("  ".join([name.ljust(name_width), *map(str.rjust, row, widths)]) for name, *row in rows)
    return "\n".join(line.rstrip() for line in lines)


def runs_in(name: str) -> list[str]:
    """The runs in a folder that is not a run itself, such as a study's; otherwise the name alone."""
    folder = Path(name)
    if not folder.is_dir() or is_pretrained(name) or find_checkpoint(name).is_file():
        return [name]
    return sorted(str(run) for run in folder.iterdir() if run.is_dir() and find_checkpoint(run).is_file()) or [name]


def write_results(folder: Path, results: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = [{k: v for k, v in r.items() if k != "scores"} | r["scores"] for r in results]
    columns = [k for k in dict.fromkeys(itertools.chain(*results)) if k not in ("prompts", "samples")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    atomic_write(folder / "evaluation_results.csv", text.getvalue())
    content = json.dumps([finite(r) for r in results], indent=1, ensure_ascii=False)
    atomic_write(folder / "evaluation_results.json", content)


def main() -> None:
    check_choice("split", split, ("val", "train"))
    check_bounds(globals(), at_least_0="eval_tokens stride block_size num_samples top_k temperature limit")
    check_bounds(globals(), at_least_1="batch_size max_new_tokens")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed={seed}: must be at least 0 and less than 2^63")
    target = pick_device(device)
    amp_dtype = torch.float32 if quantize or (dtype == "auto" and target.type != "cuda") else pick_dtype(dtype, target)
    results, folder = [], Path(output_dir)
    check_writable("output_dir", f"{output_dir}/evaluation_results.csv", make_folders=True)
    names = [run for name in (checkpoints or chosen_model("", "resume")).split(",") for run in runs_in(name)]
    for name in names:  # a wrong name is an error before the first model is evaluated
        if not is_pretrained(name) and not find_checkpoint(name).is_file():
            raise UserError(f"--checkpoints={name}: there is no checkpoint {find_checkpoint(name)}")
    for name in names:
        for result in evaluate(name, target, partial(autocast, target, amp_dtype)):
            results.append(result)
            if "loss" in result:
                on = f"{result['tokens']:,} tokens of {result['dataset']}"
                print(f"{result['path']}: loss {result['loss']:.4f} on {on}")
            write_results(folder, results)
    last = results[-1]
    for prompt, text in last.get("prompts", {}).items():
        print(f"\n> {prompt}\n{prompt}{text}")
    if last.get("samples"):
        print(f"\n> a sample\n{last['samples'][0]}")
    print(f"\n{table(results)}")
    if last.get("kl_unigram_of_the_corpus") is not None:
        unigram, bigram = last["kl_unigram_of_the_corpus"], last["kl_bigram_of_the_corpus"]
        print(f"KL of an equally long piece of the corpus: {unigram:.3f}, {bigram:.3f}")
    print(f"{folder}/evaluation_results.csv, evaluation_results.json")


if __name__ == "__main__":
    with short_errors(), explain_memory("--batch_size, --block_size or --num_samples"):
        configure(globals(), aliases={"task": "tasks"})
        main()
