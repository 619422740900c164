"""How fast: tokenizing and the batch reader.

    python bench.py --mode=data                     on 100 MB of made-up stories
    python bench.py --mode=data --input=corpus.txt  on a text of your own, documents separated by <|endoftext|>

Every figure stands beside the bare thing it is built on, measured in turn with it in the same run; medians of `repeat`.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from configurator import configure, short_errors
from corpus import DatasetWriter, cores, split_text
from data import TrainingWindows, load_dataset
from tokenizer import EOT, gpt2_tokenizer

mode = "data"  # data: tokenizing and the batch reader
input = ""  # a text to tokenize; empty: made-up stories
megabytes = 100  # of text at most
batch_size = 64  # sequences in a batch that is read
block_size = 1024  # tokens in each
repeat = 5  # measurements, of which the median is told


def timed(work) -> tuple[float, float]:
    """What work() returns, and its seconds."""
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def tell(name: str, rates: list[float], baseline: list[float] | None = None, of: str = "") -> None:
    ratio = statistics.median(a / b for a, b in zip(rates, baseline)) if baseline else None
    note = f"{ratio:8.2f} x {of}" if ratio is not None else ""
    spread = f"({min(rates) / 1e6:,.2f} to {max(rates) / 1e6:,.2f})"
    print(f"{name:<44} {statistics.median(rates) / 1e6:>9,.2f}M tokens/s {spread:<22} {note}")


def made_up_stories(path: Path, size: int) -> None:
    from prepare_tinystories import story

    rng = random.Random(1337)
    with open(path, "w", encoding="utf-8") as f:
        while f.tell() < size:
            f.write("".join(f"{story(rng)}\n{EOT}\n" for _ in range(1000)))


def bench_data() -> None:
    """One core's encode_ordinary, our whole way from text to shards, and the reader of batches."""
    tokenizer = gpt2_tokenizer()
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        if input:
            with open(input, encoding="utf-8") as f:
                text.write_text(f.read(megabytes * 10**6), encoding="utf-8")
        else:
            made_up_stories(text, megabytes * 10**6)
        documents = [document for document, _ in split_text(text)]
        size = sum(len(d.encode()) for d in documents)
        print(f"text: {len(documents):,} documents, {size / 1e6:.1f} MB; {cores()} cores; medians of {repeat}")

        def bare() -> int:
            encode = tokenizer.encoding.encode_ordinary
            return sum(len(encode(d)) for d in documents)

        def ours() -> int:
            writer = DatasetWriter(folder / "d", {}, lambda: tokenizer, overwrite=True)
            writer.write(lambda position: split_text(text, position or 0), "train")
            return writer.finish("")["train"]

        bare(), ours()
        one_core, whole = [], []
        for _ in range(repeat):
            for rates, work in ((one_core, bare), (whole, ours)):
                tokens, seconds = timed(work)
                rates.append(tokens / seconds)
        tell("tiktoken's encode_ordinary, one core", one_core)
        tell("from text to shards, all cores", whole, [r * cores() for r in one_core], f"{cores()} cores of that")

        shards = load_dataset("d", folder).train
        tokens, need = np.concatenate([s.map() for s in shards]), batch_size * (block_size + 1)
        tokens = np.resize(tokens, max(len(tokens), need))
        windows = TrainingWindows(shards, block_size, tokenizer.n_vocab)
        count = max(1, 2 * 10**7 // (batch_size * block_size))

        def read() -> int:
            for n in range(count):
                windows.batch(n * batch_size, batch_size)
            return count * batch_size * block_size

        def copy() -> int:  # what any reader does at least: inputs and targets as int64
            for n in range(count):
                begin = n * 1000 % (len(tokens) - need + 1)
                part = tokens[begin : begin + need].reshape(batch_size, -1)
                part[:, :-1].astype(np.int64), part[:, 1:].astype(np.int64)
            return count * batch_size * block_size

        read(), copy()
        reading, copying = [], []
        for _ in range(repeat):
            for rates, work in ((copying, copy), (reading, read)):
                done, seconds = timed(work)
                rates.append(done / seconds)
        tell("copying tokens into inputs and targets", copying)
        tell("batches of shuffled windows, one core", reading, copying, "that")
        print(
            f"8 GPUs at half a million tokens/s each take 4M: the reader gives {statistics.median(reading) / 4e6:.0f} x that"
        )


def main() -> None:
    if mode != "data":
        raise ValueError(f"--mode={mode}: choose data")
    if min(megabytes, batch_size, block_size, repeat) < 1:
        raise ValueError("--megabytes, --batch_size, --block_size and --repeat are at least 1")
    if input and not Path(input).is_file():
        raise ValueError(f"--input={input}: there is no such file")
    bench_data()


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
