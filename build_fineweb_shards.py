"""FineWeb-Edu, or any parquet or JSONL text, as token shards for GPT-2 scale runs.

    python build_fineweb_shards.py                                 ten billion tokens, streamed, 20 GB on disk
    python build_fineweb_shards.py --max_tokens=1_000_000_000      the first billion
    python build_fineweb_shards.py --source=corpus/ --dataset=mine parquet or JSONL files of your own
    python build_fineweb_shards.py --worker=0 --num_workers=4      one of four machines, each with its own --worker
    python build_fineweb_shards.py --pretokenized=fineweb10B       shards that others made, no tokenizing

The first shard is validation, the others are training, 100 million tokens each. Started again it goes on where it stopped.
FineWeb-Edu (https://arxiv.org/abs/2406.17557): web pages of educational value, 10, 100 or 350 billion tokens of them.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from common.corpus import DatasetWriter, check_free, check_room, download, is_made, open_stream, stream_rows, text_of
from common.shards import open_shard
from common.tokenizer import learn_tokenizer
from configurator import configure, short_errors

sample = "10BT"  # of FineWeb-Edu: 10BT | 100BT | 350BT
source = ""  # files or folders of .parquet and .jsonl instead, separated by commas
text_field = "text"  # the key of a document's text
dataset = ""  # folder under data_dir; empty: edu_fineweb10B, or as sample or pretokenized say
data_dir = "data"  # where datasets are
tokenizer = "gpt2"  # gpt2 | the folder or hub id of a pretrained model
max_tokens = 0  # tokens to write, validation among them; 0: all
shard_tokens = 100_000_000  # tokens in a shard
worker = 0  # which machine this is, of
num_workers = 1  # so many that share the work, each with other files and other shards
pretokenized = ""  # fineweb10B | fineweb100B | finewebedu10B: GPT-2 tokens ready to train on
pretokenized_source = "https://huggingface.co/datasets/kjj0/{name}-gpt2/resolve/main"  # where those are
overwrite = False  # replace a dataset that is there

HUB = "HuggingFaceFW/fineweb-edu"
TOKENS = {"10BT": 10e9, "100BT": 100e9, "350BT": 350e9}
READY = {"fineweb10B": ("fineweb", 103), "fineweb100B": ("fineweb", 1030), "finewebedu10B": ("finewebedu", 99)}


def find_files(paths: str) -> list[Path]:
    """The parquet or JSONL files of a comma-separated list. Raises ValueError for none, or for both kinds."""
    files = []
    for path in map(Path, filter(None, paths.split(","))):
        found = sorted(p for p in path.rglob("*") if p.suffix in (".parquet", ".jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise ValueError(f"--source={path}: there is no .parquet or .jsonl file")
        files += found
    if len({p.suffix for p in files}) != 1 or files[0].suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--source={paths}: give files of one kind, .parquet or .jsonl")
    return files


def stream(files: list[Path]):
    """The documents as a stream of `datasets`, this worker's part of them. Raises ValueError where they cannot be had."""
    if files:
        kind = {".parquet": "parquet", ".jsonl": "json"}[files[0].suffix]
        found = open_stream(kind, source, data_files=[str(p) for p in files], split="train")
    else:
        found = open_stream(HUB, name=f"sample-{sample}", split="train")
    if num_workers == 1:
        return found
    if num_workers > found.num_shards:
        raise ValueError(f"--num_workers={num_workers}: there are {found.num_shards} files to share out")
    return found.shard(num_workers, worker, contiguous=False)


def build(folder: Path, files: list[Path]) -> None:
    """Tokenize the documents in their order into shards of one size; the first of all workers' is validation."""
    began = time.perf_counter()
    keys = ("text_field", "tokenizer", "max_tokens", "shard_tokens", "worker", "num_workers")
    arguments = {k: globals()[k] for k in keys}
    arguments |= {"files": [[str(p), p.stat().st_size] for p in files]} if files else {"hub": HUB, "sample": sample}
    if not overwrite and is_made(folder, arguments):
        return
    name = folder.name if source else "edufineweb"
    check_free(folder, overwrite, name)
    # Text takes more bytes than its tokens, parquet about as many.
    expected = sum(p.stat().st_size for p in files) if files else 2 * TOKENS[sample]
    expected = min(expected / num_workers, 2 * max_tokens or expected)
    there = sum(p.stat().st_size for p in folder.glob(f"{name}_*.npy*"))
    check_room(folder, expected - there, ": --max_tokens, or another --data_dir")

    def name_of(_, count: int) -> str:
        number = count * num_workers + worker
        return f"{name}_{'train' if number else 'val'}_{number:06d}.npy"

    def documents(position) -> Iterator[tuple[str, object]]:
        found = stream(files)
        for row in stream_rows(found, source or HUB, position):
            text = text_of(row, text_field, source or HUB)
            if text.strip():
                yield text, found.state_dict  # called only where the position is wanted

    writer = DatasetWriter(
        folder, arguments, lambda: learn_tokenizer(tokenizer, 0, lambda: ()), overwrite, name, shard_tokens, name_of
    )
    writer.write(documents, "all", max_tokens=max_tokens)
    tokens = writer.finish(source or f"{HUB} {sample}")
    print(f"{folder}: {tokens['train']:,} train and {tokens['val']:,} val tokens, {time.perf_counter() - began:.0f} s")
    last = writer.writers["all"].shards[-1] if writer.writers else {"tokens": shard_tokens}
    if last["tokens"] < shard_tokens and not max_tokens:
        print(f"the text ended in {last['file']}, which is shorter than the others and used as they are")
    if worker == 0 and not tokens["train"]:
        print("all of it fits into the validation shard: lower --shard_tokens to have training shards too")


def fetch_pretokenized(folder: Path) -> None:
    """Download shards in llm.c's format; those that are there are kept."""
    stem, count = READY[pretokenized]
    if max_tokens:
        count = min(count, max(1, -(-max_tokens // 100_000_000) - 1))
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{n:06d}.bin" for n in range(1, count + 1)]
    for name in names:
        if not (folder / name).exists():
            download(f"{pretokenized_source.format(name=pretokenized)}/{name}", folder / name)
            try:
                open_shard(folder / name)
            except ValueError:
                (folder / name).unlink()
                raise
    tokens = [open_shard(folder / name).tokens for name in names]
    print(f"{folder}: {sum(tokens[1:]):,} train and {tokens[0]:,} val tokens, made by others in GPT-2's vocabulary")


def main() -> None:
    if sample not in TOKENS:
        raise ValueError(f"--sample={sample}: choose one of {', '.join(TOKENS)}")
    if pretokenized and pretokenized not in READY:
        raise ValueError(f"--pretokenized={pretokenized}: choose one of {', '.join(READY)}")
    if tokenizer in ("char", "bpe"):
        raise ValueError(
            f"--tokenizer={tokenizer}: choose gpt2, a folder or a hub id; prepare_text.py learns a vocabulary"
        )
    if not 0 <= worker < num_workers or shard_tokens < 1 or max_tokens < 0:
        raise ValueError(
            f"--worker={worker} --num_workers={num_workers} --shard_tokens={shard_tokens} --max_tokens={max_tokens}: a "
            "worker is one of 0 to num_workers - 1, shards have tokens, and max_tokens is at least 0"
        )
    if num_workers > 1 and tokenizer != "gpt2":
        raise ValueError(
            f"--num_workers={num_workers} --tokenizer={tokenizer}: shards put together are read as GPT-2's"
        )
    files = find_files(source) if source else []
    default = pretokenized or (
        re.sub(r"\W+", "_", Path(source.split(",")[0]).stem) if source else "edu_fineweb" + sample[:-1]
    )
    folder = Path(data_dir) / (dataset or default)
    if pretokenized:
        fetch_pretokenized(folder)
    else:
        build(folder, files)
    if num_workers == 1:
        print(f"Train on it: python train.py --dataset={folder.name}")
    else:
        print(f"When all {num_workers} workers are done, put their shards into one folder, without the meta.json files")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
