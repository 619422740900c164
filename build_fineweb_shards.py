"""FineWeb-Edu, or any parquet or JSONL text, as token shards for GPT-2 scale runs.

    python build_fineweb_shards.py                                 ten billion tokens, streamed, 20 GB on disk
    python build_fineweb_shards.py --max_tokens=1_000_000_000      the first billion
    python build_fineweb_shards.py --source=corpus/ --dataset=mine parquet or JSONL files of your own
    python build_fineweb_shards.py --worker=0 --num_workers=4      one of four machines, each with its own --worker
    python build_fineweb_shards.py --pretokenized=fineweb10B       download ready-made shards instead of tokenizing

The first shard is for validation, the others for training, 100 million tokens each. The same command resumes an
interrupted run. FineWeb-Edu (https://arxiv.org/abs/2406.17557) is a set of educational web pages; its samples have 10,
100 or 350 billion tokens.
"""

import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from common.corpus import DatasetWriter, find_files, is_up_to_date, open_stream, split_long, stream_documents, text_of
from common.files import check_disk_space, download, parse_json
from common.shards import open_shard
from common.tokenizer import Tokenizer, learn_tokenizer
from configurator import UserError, check_bounds, check_choice, configure, first_line, short_errors

sample = "10BT"  # sample of FineWeb-Edu: 10BT | 100BT | 350BT
source = ""  # read these .parquet or .jsonl files or folders instead, separated by commas
text_field = "text"  # name of the field that holds a document's text
dataset = ""  # folder under data_dir (default: edu_fineweb10B, or after --sample, --source or --pretokenized)
data_dir = "data"  # folder of all datasets
tokenizer = "gpt2"  # gpt2 | the folder or hub id of a pretrained model
max_tokens = 0  # largest number of tokens to write, validation included (0: no limit)
shard_tokens = 100_000_000  # tokens per shard file
worker = 0  # index of this machine, from 0 to num_workers - 1
num_workers = 1  # number of machines; each reads its own files and writes its own shards
pretokenized = ""  # fineweb10B | fineweb100B | finewebedu10B: download shards of GPT-2 tokens
pretokenized_source = "https://huggingface.co/datasets/kjj0/{name}-gpt2/resolve/main"  # URL of those shards
max_bad = 100  # documents in --source that may be damaged or without text; they are skipped and counted
overwrite = False  # replace an existing dataset

HUB_ID = "HuggingFaceFW/fineweb-edu"
TOKENS = {"10BT": 10e9, "100BT": 100e9, "350BT": 350e9}
PRETOKENIZED = {"fineweb10B": ("fineweb", 103), "fineweb100B": ("fineweb", 1030), "finewebedu10B": ("finewebedu", 99)}


def open_hub():
    """This worker's share of FineWeb-Edu, as a stream of `datasets`. Raises UserError if it cannot be read."""
    stream = open_stream(HUB_ID, name=f"sample-{sample}", split="train")
    if num_workers > stream.num_shards:
        raise UserError(f"--num_workers={num_workers}: the source has only {stream.num_shards} files to distribute")
    return stream.shard(num_workers, worker, contiguous=False) if num_workers > 1 else stream


def read_rows(path: Path, start: int) -> Iterator[tuple[int, object]]:
    """(number, row) of a file from row `start` on; the row is an exception where it is damaged.

    Only the column of the text is read, so that the files may differ in their other columns.
    """
    if path.suffix.lower() != ".parquet":
        with open(path, "rb") as f:
            for number, line in itertools.islice(enumerate(f), start, None):
                try:
                    yield number, parse_json(line) if line.strip() else {text_field: None}
                except ValueError as e:
                    yield number, e
        return
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise UserError(
                f"{path} has no column {text_field!r}, only {', '.join(file.schema_arrow.names)}: set --text_field"
            )
        number = 0
        for batch in file.iter_batches(1000, columns=[text_field]):
            for value in batch.column(0)[max(0, start - number) :]:
                try:
                    yield start, {text_field: value.as_py()}
                except UnicodeDecodeError as e:
                    yield start, e
                start += 1
            number += len(batch)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(
            f"{path} is damaged ({first_line(e)}): remove or replace it, then the same command resumes"
        ) from None


def read_files(files: list[Path], position) -> Iterator[tuple[str, list[int]]]:
    """The documents of this worker's files, each with the position after it.

    A position is [file, row, damaged rows so far, parts of the row that were read already, if it is a long one].
    """
    first, start, bad, skip = position or (0, 0, 0, 0)
    own, good = files[worker::num_workers], position is not None
    for n, path in enumerate(own[first:], first):
        for number, row in read_rows(path, start):
            try:
                if isinstance(row, Exception):
                    raise UserError(f"{path}, document {number + 1}: {first_line(row)}")
                text = text_of(row, text_field, f"{path}, document {number + 1}")
            except UserError as e:
                bad += 1
                if not good or bad > max_bad:  # the first document: the key is wrong, not the document
                    raise UserError(f"{e} (--max_bad={max_bad})" if good else str(e)) from None
                print(f"skipped: {e}")
                continue
            good = good or bool(text)
            parts = list(split_long(text))
            for count, part in enumerate(parts[skip:], skip + 1):
                yield part, [n, number + 1, bad, 0] if count == len(parts) else [n, number, bad, count]
            skip = 0
        start = 0


def build(folder: Path, files: list[Path]) -> None:
    """Tokenize the documents in their order into shards of equal size. Shard 0 is validation; worker 0 writes it."""
    keys = ("text_field", "tokenizer", "max_tokens", "shard_tokens", "worker", "num_workers")
    arguments = {k: globals()[k] for k in keys}
    arguments |= {"files": [[str(p), p.stat().st_size] for p in files]} if files else {"hub": HUB_ID, "sample": sample}
    name = folder.name if source else "edufineweb"
    if is_up_to_date(folder, arguments, overwrite, name):
        return
    # An upper bound of what is written: tokens take fewer bytes than their text, and about as many as parquet.
    expected = sum(p.stat().st_size for p in files) if files else 2 * TOKENS[sample]
    expected = min(expected / num_workers, 2 * max_tokens or expected)
    check_disk_space(folder, expected, ": set --max_tokens, or another --data_dir")

    def name_of(_, count: int) -> str:
        number = count * num_workers + worker
        return f"{name}_{'train' if number else 'val'}_{number:06d}.npy"

    def documents(position) -> Iterator[tuple[str, object]]:
        if files:
            return read_files(files, position)
        stream = open_hub()
        texts = stream_documents(stream, text_field, HUB_ID, position)
        return ((text, stream.state_dict) for text in texts)  # slow, so it is called only when the position is saved

    def make_tokenizer() -> Tokenizer:
        return learn_tokenizer(tokenizer, 0, lambda: ())

    def goes_on(old: dict, sources: dict) -> bool:
        """Files that were not read yet may have changed since: a damaged one is replaced or removed."""
        n, row, _, part = sources.get("all", {}).get("position") or (0, 0, 0, 0)
        n += row + part > 0
        read, before = (a.get("files", [])[worker::num_workers][:n] for a in (arguments, old))
        return read == before and {**old, "files": 0} == {**arguments, "files": 0}

    options = dict(shard_tokens=shard_tokens, name_of=name_of, goes_on=goes_on if files else None)
    writer = DatasetWriter(folder, arguments, make_tokenizer, overwrite, name, **options)
    writer.write(documents, "all", max_tokens=max_tokens)
    if num_workers == 1 and writer.tokens <= shard_tokens:
        writer.discard()
        raise UserError(
            f"all {writer.tokens:,} tokens fit into the validation shard: set --shard_tokens to a hundredth of that, or use "
            "prepare_text.py, which divides any amount of text"
        )
    writer.finish(source or f"{HUB_ID} {sample}")
    print(writer.summary)
    last = writer.writers["all"].shards[-1] if writer.writers else {"tokens": shard_tokens}
    if last["tokens"] < shard_tokens and not max_tokens:
        print(f"the last shard, {last['file']}, is shorter than the others; training uses it like them")


def fetch_pretokenized(folder: Path) -> None:
    """Download shards in llm.c's format. Files that exist are kept."""
    prefix, count = PRETOKENIZED[pretokenized]
    if max_tokens:
        count = min(count, max(1, -(-max_tokens // 100_000_000) - 1))
    names = [f"{prefix}_val_000000.bin"] + [f"{prefix}_train_{n:06d}.bin" for n in range(1, count + 1)]
    tokens = []
    for path in (folder / name for name in names):
        is_new = not path.exists()
        if is_new:
            download(f"{pretokenized_source.format(name=pretokenized)}/{path.name}", path)
        try:
            tokens.append(open_shard(path).tokens)
        except (UserError, ValueError):
            if is_new:
                path.unlink()
            raise
    print(f"{folder}: {sum(tokens[1:]):,} train and {tokens[0]:,} val tokens, downloaded, in GPT-2's vocabulary")


def main() -> None:
    check_choice("sample", sample, TOKENS)
    if pretokenized:
        check_choice("pretokenized", pretokenized, PRETOKENIZED)
    if tokenizer in ("char", "bpe"):
        choices = "gpt2, or the folder or hub id of a model; prepare_text.py learns a vocabulary"
        raise UserError(f"--tokenizer={tokenizer}: choose {choices}")
    check_bounds(globals(), at_least_0="worker max_tokens max_bad", at_least_1="num_workers shard_tokens")
    if worker >= num_workers:
        raise UserError(f"--worker={worker}: must be less than --num_workers={num_workers}")
    if num_workers > 1 and tokenizer != "gpt2":
        reason = "merged shards have no meta.json, so they are read as GPT-2's"
        raise UserError(f"--num_workers={num_workers} needs --tokenizer=gpt2: {reason}")
    files = find_files("source", source, (".parquet", ".jsonl", ".ndjson"))
    if other := next((p for p in files if p.suffix.lower() not in (".parquet", ".jsonl", ".ndjson")), None):
        raise UserError(f"--source={other}: give .parquet or .jsonl files")
    if files and num_workers > len(files):
        raise UserError(f"--num_workers={num_workers}: the source has only {len(files)} files to distribute")
    default = (
        re.sub(r"\W+", "_", Path(os.path.abspath(source.split(",")[0])).stem) if source else "edu_fineweb" + sample[:-1]
    )
    folder = Path(data_dir) / (dataset or pretokenized or default)
    if pretokenized:
        fetch_pretokenized(folder)
    else:
        build(folder, files)
    if num_workers == 1:
        place = f" --data_dir={shlex.quote(data_dir)}" if data_dir != "data" else ""
        print(f"Train on it: python train.py --dataset={folder.name}{place}")
    else:
        print(f"When all {num_workers} workers are done, move their shards (but no meta.json) into one folder")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
