"""Your own text as token shards, ready for train.py.

    python prepare_text.py --input=book.txt --dataset=mine --tokenizer=char
    python prepare_text.py --input=notes/,chats.jsonl --dataset=mine --tokenizer=bpe --vocab_size=4096

A .txt file is one document, a .jsonl file one document a line. A single document is cut, its end is validation;
of several, whole documents are. <|endoftext|> in a .txt file separates documents.
A bpe tokenizer is trained on the training part alone.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from configurator import configure, short_errors
from data import (
    EOT,
    DatasetWriter,
    check_free,
    learn_tokenizer,
)

input = ""  # files or folders of .txt and .jsonl, separated by commas; empty: $LOCAL_TEXT_DATA_PATH
dataset = ""  # name of the dataset, a folder under data_dir; empty: the name of the input
data_dir = "data"  # where datasets are
tokenizer = "gpt2"  # gpt2 | char | bpe (trained on the text) | the folder or hub id of a pretrained model
vocab_size = 4096  # ids of a bpe tokenizer
val_fraction = 0.1  # for validation: of the text if it is one document, else of the documents
text_field = ""  # the text's key in .jsonl; empty: $LOCAL_TEXT_FIELD or text
shard_tokens = 100_000_000  # tokens in a shard file
seed = 1337  # which documents are for validation
overwrite = False  # replace a dataset that is there


def input_files(paths: str) -> list[Path]:
    """The text files of a comma-separated list of files and folders. Raises ValueError for what is not there."""
    files = []
    for path in map(Path, filter(None, paths.split(","))):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
            if not inside:
                raise ValueError(f"--input={path}: there is no .txt or .jsonl file in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--input={path}: there is no such file or folder")
    return files


def documents(files: list[Path], field: str) -> Iterator[str]:
    """The documents of the files in order, empty ones left out. Raises ValueError naming the file and line at fault."""
    for path in files:
        lines = os.environ.get("LOCAL_TEXT_DATA_FORMAT", "").lower() == "jsonl" or path.suffix == ".jsonl"
        try:
            with open(path, encoding="utf-8", newline="") as f:
                if not lines:
                    yield from (text for text in f.read().split(EOT) if text.strip())
                    continue
                for number, line in enumerate(f, 1):
                    if not line.strip():
                        continue
                    try:
                        text = json.loads(line)[field]
                    except (json.JSONDecodeError, KeyError, TypeError) as e:
                        raise ValueError(
                            f"{path}, line {number}: not a JSON object with the key {field!r} ({e}); set --text_field"
                        ) from None
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, line {number}: {field!r} is {type(text).__name__}, not text")
                    if text.strip():
                        yield text.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold half a character
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{path} is not UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}; convert it"
            ) from None


def place(text: str, seed: int) -> float:
    """A number in [0, 1) by the hash of a document: those below --val_fraction are held out, equal ones together."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode()).digest()[:6], "big") / 2**48


def split_documents(files: list[Path], field: str, fraction: float, seed: int):
    """Two functions that read the training and the validation documents, and whether the text is a single document.

    Raises ValueError if there is no text, or a single one too short to cut.
    """
    first, places = None, set()
    for text in documents(files, field):
        first = text if first is None else first
        places.add(place(text, seed))
    if not places:
        raise ValueError(f"there is no text in {', '.join(map(str, files[:3]))}")
    if len(places) == 1:
        cut = int(len(first) * (1 - fraction) + 1e-6)
        if not 0 < cut < len(first):
            raise ValueError(f"a text of {len(first)} characters cannot be split by --val_fraction={fraction}")
        return lambda: [first[:cut]], lambda: [first[cut:]], True
    ordered = sorted(places)  # of few documents at least one is held out, and one is not
    limit = min(max(fraction, ordered[1]), ordered[-1])

    def part(held_out: bool):
        return (t for t in documents(files, field) if (place(t, seed) < limit) == held_out)

    return lambda: part(False), lambda: part(True), False


def main() -> None:
    paths = input or os.environ.get("LOCAL_TEXT_DATA_PATH", "")
    if not paths:
        raise ValueError("which text? --input=FILE (or set LOCAL_TEXT_DATA_PATH)")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction={val_fraction}: must be between 0 and 1")
    files = input_files(paths)
    name = dataset or Path(paths.split(",")[0]).stem
    folder = Path(data_dir) / name
    field = text_field or os.environ.get("LOCAL_TEXT_FIELD", "text")
    check_free(folder, overwrite)
    train, val, single = split_documents(files, field, val_fraction, seed)
    stamps = [[str(p), p.stat().st_size, p.stat().st_mtime] for p in files]
    arguments = {k: globals()[k] for k in ("tokenizer", "vocab_size", "val_fraction", "seed")} | {"text_field": field}

    def made():
        return learn_tokenizer(tokenizer, vocab_size, lambda: itertools.chain(train(), val()), train, eot=not single)

    writer = DatasetWriter(folder, arguments | {"files": stamps}, made, overwrite)
    for split, texts in (("train", train), ("val", val)):

        def source(position, texts=texts):
            return itertools.islice(enumerate(texts(), 1), position or 0, None)

        writer.write(split, source, shard_tokens, separated=not single)
    counts = writer.finish(", ".join(p.name for p in files))
    told = " and ".join(f"{counts[split]:,} {split}" for split in ("train", "val"))
    print(f"{folder}: {told} tokens, {tokenizer} vocabulary of {writer.tokenizer.n_vocab:,}")
    print(
        f"Train on it: python train.py config/quickstart.py --dataset={name} --data_dir={data_dir} --out_dir=out/{name}"
    )


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
