"""Your own text, or a public corpus by name, as token shards, ready for train.py.

    python prepare_text.py --input=book.txt --dataset=mine --tokenizer=char
    python prepare_text.py --input=notes/,chats.jsonl --dataset=mine --tokenizer=bpe --vocab_size=4096
    python prepare_text.py --list                       the corpora known by name, with size and licence
    python prepare_text.py --source=wikitext2           one of them, streamed
    python prepare_text.py --source=owner/name:config --text_field=content --max_docs=10_000     any of the hub's
    python prepare_text.py --source=chat                questions and answers in turns, from several sources
    python prepare_text.py --dataset=mine --preview=2   the first batches of a prepared dataset, as text

A .txt file is one document, a .jsonl file one document a line. A single document is cut, its end is validation;
of several, whole documents are, by their hash, and of equal ones all but the first are left out. <|endoftext|> in a
.txt file separates documents. A bpe tokenizer is trained on the training part alone. Started again after it was
interrupted, the same command goes on.
"""

from __future__ import annotations  # the key `list` hides the type in what is run

import codecs
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.corpus import (
    DatasetWriter,
    Source,
    check_free,
    check_room,
    counted,
    document_hash,
    download,
    is_made,
    not_utf8,
    open_stream,
    split_text,
    stream_rows,
    text_of,
)  # fmt: skip
from common.shards import TrainingWindows, load_dataset
from common.tokenizer import EOT, learn_tokenizer, tokenizer_from_dict
from configurator import configure, short_errors

input = ""  # files or folders of .txt and .jsonl, separated by commas; empty: $LOCAL_TEXT_DATA_PATH
source = ""  # instead: a corpus of --list, or the hub id of any other (owner/name or owner/name:config)
list = False  # print the corpora that --source knows by name
preview = 0  # print so many batches of the prepared dataset, as train.py draws them
dataset = ""  # name of the dataset, a folder under data_dir; empty: the name of the input or source
data_dir = "data"  # where datasets are
tokenizer = "gpt2"  # gpt2 | char | bpe (trained on the text) | the folder or hub id of a pretrained model
vocab_size = 4096  # ids of a bpe tokenizer
special_tokens = ""  # tokens of a bpe tokenizer that are never split, separated by commas: <|user|>,<|assistant|>
val_fraction = 0.1  # for validation: of the text if it is one document, else of the documents
text_field = ""  # the text's key in .jsonl or on the hub; empty: text, of files $LOCAL_TEXT_FIELD
max_docs = 0  # documents at most; 0: all
max_tokens = 0  # tokens to write at most; 0: all
max_samples_per_source = 20_000  # conversations at most from each source of the chat mix
allow_synthetic = False  # arithmetic stands in for sources of the chat mix that cannot be had
shard_tokens = 100_000_000  # tokens in a shard file
seed = 1337  # which documents are for validation, and the order of the chat mix
overwrite = False  # replace a dataset that is there
batch_size = 4  # sequences in a batch of the preview
block_size = 64  # tokens in each


class Corpus(NamedTuple):
    id: str  # on the hub, or the address of a text
    config: str
    megabytes: int  # of text
    licence: str
    val: str = ""  # its own validation split; empty: documents are held out by their hash
    files: str = ""  # where its files in the hub are, for corpora whose own loader is a script


PARQUET = "refs/convert/parquet"  # the branch in which the hub keeps every corpus as parquet
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPORA = {
    "shakespeare": Corpus(TINY_SHAKESPEARE, "", 1, "public domain"),
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", 11, "CC BY-SA 3.0, GFDL", "validation"),
    "wikitext103": Corpus("Salesforce/wikitext", "wikitext-103-raw-v1", 540, "CC BY-SA 3.0, GFDL", "validation"),
    "tinystories": Corpus("roneneldan/TinyStories", "", 1900, "CDLA-Sharing 1.0", "validation"),
    "openwebtext10k": Corpus("stas/openwebtext-10k", "", 49, "CC0 (packaging)", "", "plain_text/train"),
    "openwebtext": Corpus("Skylion007/openwebtext", "", 38_000, "CC0 (packaging)"),
    "wikipedia": Corpus("wikimedia/wikipedia", "20231101.en", 20_000, "CC BY-SA 3.0, GFDL"),
    "redpajama": Corpus("togethercomputer/RedPajama-Data-1T-Sample", "", 5_000, "of its sources", "", "*/*train"),
    "fineweb_edu": Corpus("HuggingFaceFW/fineweb-edu", "sample-10BT", 45_000, "ODC-By 1.0"),
    # These two are JSON on the hub; what it has of them as parquet is their first part, which is read.
    "c4": Corpus("allenai/c4", "", 10_000, "ODC-By 1.0", "", "en/*train"),
    "pile": Corpus("monology/pile-uncopyrighted", "", 10_000, "of its sources", "", "default/*train"),
}


# -----------------------------------------------------------------------------
# Documents of files


def input_files(paths: str) -> Iterator[Path]:
    """The text files of a comma-separated list of files and folders. Raises ValueError for what is not there."""
    for path in map(Path, filter(None, paths.split(","))):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
            if not inside:
                raise ValueError(f"--input={path}: there is no .txt or .jsonl file in this folder")
            yield from inside
        elif path.suffix == ".parquet":
            raise ValueError(f"--input={path}: parquet files are read by build_fineweb_shards.py --source={path}")
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"--input={path}: there is no such file or folder")


def is_lines(path: Path) -> bool:
    return os.environ.get("LOCAL_TEXT_DATA_FORMAT", "").lower() == "jsonl" or path.suffix == ".jsonl"


def file_documents(files: Iterable[Path], field: str) -> Iterator[str]:
    """The documents of the files in order, empty ones left out. Raises ValueError naming the file and line at fault."""
    for path in files:
        if not is_lines(path):
            yield from (text for text, _ in split_text(path))
            continue
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as e:
                    raise not_utf8(path, f.tell() - len(line) + e.start, line[e.start]) from None
                except ValueError as e:
                    raise ValueError(f"{path}, line {number}: not JSON ({e})") from None
                text = text_of(row, field, f"{path}, line {number}")
                if text.strip():
                    yield text


def blocks(path: Path) -> Iterator[str]:
    """A text file, a megabyte at a time. Raises ValueError if it is not UTF-8."""
    begin, rest = 0, b""
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            rest += block
            try:
                text, used = codecs.utf_8_decode(rest, "strict", len(block) < 1 << 20)
            except UnicodeDecodeError as e:
                raise not_utf8(path, begin + e.start, rest[e.start]) from None
            begin, rest = begin + used, rest[used:]
            yield text
    if rest:
        raise not_utf8(path, begin, rest[0])


def is_single(files: list[Path]) -> bool:
    """Whether the files are one .txt without a separator: a single document, however large."""
    if len(files) != 1 or is_lines(files[0]):
        return False
    tail = ""
    for block in blocks(files[0]):
        if EOT in tail + block:
            return False
        tail = block[-len(EOT) :]
    return True


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text given in parts, in pieces of half a megabyte that tokenize as the whole does: each begins at a word's space."""
    rest = ""
    for part in parts:
        rest += part
        if len(rest) > 2**19:
            places = [m.start() for m in re.finditer(r"(?<=\S) (?=[^\W\d_])", rest[-4096:])]
            if places or len(rest) > 2**23:
                at = len(rest) - 4096 + places[-1] if places else len(rest)
                yield rest[:at]
                rest = rest[at:]
    if rest:
        yield rest


def between(parts: Iterable[str], begin: int, end: float) -> Iterator[str]:
    """Characters begin to end - 1 of a text given in parts."""
    at = 0
    for part in parts:
        if at >= end:
            return
        if at + len(part) > begin:
            yield part[max(0, begin - at) : int(min(end - at, len(part)))]
        at += len(part)


# -----------------------------------------------------------------------------
# Documents of the hub


def hub_stream(corpus: Corpus, split: str):
    """A split of a corpus as a stream. Raises ValueError if it cannot be had."""
    options = {"name": corpus.config} if corpus.config else {}
    files = corpus.files
    if not files:
        try:
            return open_stream(corpus.id, split=split, **options)
        except ValueError as e:
            if "scripts" not in str(e):  # no code of a corpus is run here
                raise
            files = f"{corpus.config or '*'}/{split}"
    path = f"hf://datasets/{corpus.id}@{PARQUET}/{files}/*.parquet"
    return open_stream("parquet", corpus.id, data_files=path, split="train")


def hub_source(corpus: Corpus, split: str) -> Source:
    """The documents of a corpus, streamed; a position is [documents so far, the stream's own state]."""
    if corpus.id == "Salesforce/wikitext":
        rows = lambda: stream_rows(hub_stream(corpus, split), corpus.id)  # noqa: E731
        return counted(lambda: articles(row["text"] for row in rows()), max_docs)
    field = text_field or "text"

    def read(position) -> Iterator[tuple[str, object]]:
        done, state = position or (0, None)
        found = hub_stream(corpus, split)
        for row in stream_rows(found, corpus.id, state):
            text = text_of(row, field, corpus.id)
            if text.strip():
                if max_docs and done == max_docs:
                    return
                done += 1
                yield text, lambda n=done: [n, found.state_dict()]

    return read


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's articles, of which the hub has one line a row: each begins with a title between single equal signs."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line) and "".join(article).strip():
            yield "".join(article).strip()
            article = []
        article.append(line)
    if "".join(article).strip():
        yield "".join(article).strip()


# -----------------------------------------------------------------------------
# The chat mix: conversations, each a list of turns "User: ...\nAssistant: ..."; the end-of-text token ends a turn, as it
# separates documents, so that any model's vocabulary will do and an answer ends where sampling stops anyway.


def turn(question: str, answer: str) -> str:
    return f"User: {question.strip()}\nAssistant: {answer.strip()}"


def oasst_conversations(rows: Iterable[dict]) -> Iterator[list[str]]:
    """Of each tree of English messages the path of the answers ranked first."""
    trees = itertools.groupby(rows, key=lambda row: row["message_tree_id"])
    for _, tree in trees:
        answers: dict[str | None, list[dict]] = {}
        for row in tree:
            if row["lang"] == "en":
                answers.setdefault(row["parent_id"], []).append(row)
        told, at = [], None
        while at in answers:
            row = min(answers[at], key=lambda r: r["rank"] if r["rank"] is not None else 10**6)
            told.append(row["text"])
            at = row["message_id"]
        if len(told) > 1:
            yield [turn(q, a) for q, a in zip(told[::2], told[1::2])]


def gsm8k_conversations(rows: Iterable[dict]) -> Iterator[list[str]]:
    for row in rows:
        steps, _, result = re.sub(r"<<.*?>>", "", row["answer"]).partition("####")
        yield [turn(row["question"], f"{steps.strip()}\nThe answer is {result.strip()}.")]


def code_conversations(rows: Iterable[dict]) -> Iterator[list[str]]:
    for row in rows:
        yield [turn(f"{row['instruction']}\n{row.get('input') or ''}", row["output"])]


def wikitext_conversations(rows: Iterable[dict]) -> Iterator[list[str]]:
    """Plain text, for fluency."""
    yield from ([text] for text in articles(row["text"] for row in rows))


def arithmetic_conversations(dice: random.Random) -> Iterator[list[str]]:
    """Sums, made up."""
    names = {"+": "plus", "-": "minus", "*": "times"}
    ways = ("What is {a} {op} {b}?", "Calculate {a} {op} {b}.", "{a} {word} {b} is what?", "Solve: {a} {op} {b}")
    while True:
        a, b, op = dice.randrange(100), dice.randrange(100), dice.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        yield [turn(dice.choice(ways).format(a=a, b=b, op=op, word=names[op]), f"{a} {op} {b} = {result}")]


CHAT = {
    "OpenAssistant/oasst1": ("", oasst_conversations),
    "openai/gsm8k": ("main", gsm8k_conversations),
    "sahil2801/CodeAlpaca-20k": ("", code_conversations),
    "Salesforce/wikitext": ("wikitext-2-raw-v1", wikitext_conversations),
}


def chat_conversations() -> tuple[list[list[str]], str]:
    """The mix, without duplicates, shuffled by the seed; and what it is made of.

    Raises ValueError if no source can be had, and nothing may stand in.
    """
    dice, told, mix = random.Random(seed), [], {}
    for name, (config, conversations) in CHAT.items():
        try:
            rows = stream_rows(hub_stream(Corpus(name, config, 0, ""), "train"), name)
            found = [c for c in itertools.islice(conversations(rows), max_samples_per_source)]
            told.append(f"{len(found):,} of {name}")
        except (ValueError, KeyError, TypeError) as e:
            reason = str(e) if isinstance(e, ValueError) else f"its rows are not as they were ({e!r})"
            print(f"chat: without {name}: {reason}")
            if not allow_synthetic:
                continue
            found = [c for c in itertools.islice(arithmetic_conversations(dice), min(max_samples_per_source, 5000))]
            told.append(f"{len(found):,} made-up sums instead of {name}")
        print(f"chat: {told[-1]}")
        mix |= {"\n".join(c): c for c in found}
    if not mix:
        raise ValueError("no source of the chat mix can be had: go online, or --allow_synthetic=True for made-up sums")
    if all("made-up" in t for t in told):
        print(
            "chat: all of it is made-up sums: a model learns the form of answers from them, and nothing to talk about"
        )
    mixed = [*mix.values()]
    dice.shuffle(mixed)
    return mixed, ", ".join(told)


# -----------------------------------------------------------------------------


class Parts(NamedTuple):
    """What is to be written."""

    sources: dict[str, Source]  # by split, validation first, so that training has none of it; all: the hash says which
    told: str  # where they are from
    single: bool = False  # pieces of one document


def parts_of_files(files: list[Path], field: str) -> Parts:
    """Raises ValueError if there is no text, or a single document too short to cut."""
    told = ", ".join(p.name for p in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    if is_single(files):

        def text():
            return blocks(files[0])
    else:
        first = [*itertools.islice(file_documents(files, field), 2)]
        if len(first) != 1:
            return Parts({"all": counted(lambda: file_documents(files, field), max_docs)}, told)

        def text():
            return iter(first)

    size = sum(map(len, text()))
    if not any(part.strip() for part in text()):
        raise ValueError(f"there is no text in {told}")
    cut = int(size * (1 - val_fraction) + 1e-6)
    if not 0 < cut < size:
        raise ValueError(f"a text of {size} characters cannot be split by --val_fraction={val_fraction}")
    spans = {"val": (cut, size), "train": (0, cut)}
    sources = {split: counted(lambda span=span: pieces(between(text(), *span))) for split, span in spans.items()}
    return Parts(sources, told, True)


def parts_of_chat() -> Parts:
    conversations, told = chat_conversations()
    held_out = [document_hash("\n".join(c), seed) < val_fraction * 2**64 for c in conversations]
    held_out[0] |= not any(held_out)
    splits = {"val": True, "train": False}
    chosen = {split: [c for c, h in zip(conversations, held_out) if h == value] for split, value in splits.items()}
    sources = {
        split: counted(lambda each=each: (t for c in each for t in c)) for split, each in chosen.items()
    }  # a turn is a document
    return Parts(sources, told)


def held_out_below(read: Source, where: str) -> int:
    """Documents whose hash is below this are for validation: by val_fraction, but of few at least one is, and one is not."""
    hashes = [document_hash(text, seed) for text, _ in itertools.islice(read(None), 1000)]
    limit = int(val_fraction * 2**64)
    if not hashes:
        raise ValueError(f"there is no text in {where}")
    if len(hashes) == 1000:
        return limit
    ordered = sorted(set(hashes))
    if len(ordered) == 1:
        raise ValueError(f"{where} holds one document only, again and again: nothing to hold out for validation")
    return min(max(limit, ordered[1]), ordered[-1])


def prepare(folder: Path, find_parts: Callable[[], Parts], arguments: dict) -> None:
    """Write the dataset, or go on with it."""
    keys = ("tokenizer", "vocab_size", "special_tokens", "val_fraction", "text_field", "max_docs", "max_tokens", "seed")
    arguments = {k: globals()[k] for k in keys} | arguments
    if not overwrite and is_made(folder, arguments):
        return
    check_free(folder, overwrite)
    sources, told, single = find_parts()
    where: dict[str, str | Callable] = {split: split for split in sources}
    if "all" in sources:
        limit = held_out_below(sources["all"], told)
        where["all"] = lambda text: "val" if document_hash(text, seed) < limit else "train"

    def texts(train_only: bool) -> Iterator[str]:
        for split, read in sources.items():
            if not (train_only and split == "val"):
                yield from (
                    text for text, _ in read(None) if not train_only or split != "all" or where["all"](text) == "train"
                )

    def made():
        special = [t for t in special_tokens.split(",") if t]
        both = lambda: texts(False), lambda: texts(True)  # noqa: E731
        return learn_tokenizer(tokenizer, vocab_size, *both, eot=not single, special_tokens=special)

    writer = DatasetWriter(folder, arguments, made, overwrite, shard_tokens=shard_tokens)
    for split, read in sources.items():
        most = -(-max_tokens * val_fraction // 1) if split == "val" else max_tokens
        writer.write(read, where[split], split, int(most), unique=not single, separated=not single)
    for split in ("train", "val"):
        if split not in writer.writers or not writer.writers[split].tokens:
            writer.discard()
            raise ValueError(
                f"nothing is left for {split}: more text, --max_docs or --max_tokens, or another --val_fraction"
            )
    counts = writer.finish(told)
    tokens = " and ".join(f"{counts[split]:,} {split}" for split in ("train", "val"))
    print(f"{folder}: {tokens} tokens, {tokenizer} vocabulary of {writer.tokenizer.n_vocab:,}")
    name = f"--dataset={folder.name}" + (f" --data_dir={data_dir}" if data_dir != "data" else "")
    preset = f"config/quickstart.py --out_dir=out/{folder.name}"
    if arguments.get("source") == "chat":
        preset = "config/train_chat.py"
    print(f"Train on it: python train.py {preset} {name}")


def show_batches(name: str) -> None:
    """Print the first batches of a dataset: shapes, and each row as text."""
    found = load_dataset(name, data_dir)
    decode = tokenizer_from_dict(found.tokenizer).decode
    windows = TrainingWindows(found.train, block_size, found.vocab_size, seed)
    for number in range(preview):
        x, y = windows.batch(number * batch_size, batch_size)
        print(f"batch {number + 1}: inputs {x.shape} {x.dtype}, targets {y.shape} {y.dtype}, the inputs one token on")
        for row in x:
            print(f"  {decode(row.tolist())!r}")


def print_corpora() -> None:
    print(f"{'--source=':<15} {'text':>9}  {'licence':<20} from")
    for name, c in CORPORA.items():
        size = f"{c.megabytes:,} MB" if c.megabytes < 2000 else f"{c.megabytes / 1000:,.0f} GB"
        print(f"{name:<15} {size:>9}  {c.licence:<20} {c.id}{':' + c.config if c.config else ''}")
    print(f"{'chat':<15} {'30 MB':>9}  {'of its sources':<20} {', '.join(CHAT)}")
    print("Any other: --source=owner/name or owner/name:config, with --text_field")


def main() -> None:
    if list:
        return print_corpora()
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction={val_fraction}: must be between 0 and 1")
    if min(max_docs, max_tokens, preview) < 0 or min(shard_tokens, max_samples_per_source, batch_size, block_size) < 1:
        raise ValueError(
            "--max_docs, --max_tokens and --preview are at least 0, sizes of shards and batches at least 1"
        )
    paths = input or ("" if source else os.environ.get("LOCAL_TEXT_DATA_PATH", ""))
    if input and source:
        raise ValueError("--input and --source: give one of them")
    if not paths and not source:
        if not (preview and dataset):
            raise ValueError(
                "which text? --input=FILE (or set LOCAL_TEXT_DATA_PATH), or --source=NAME; --list shows names"
            )
        return show_batches(dataset)
    name = dataset or (
        Path(paths.split(",")[0]).resolve().stem if paths else re.sub(r"\W+", "_", source.partition("/")[2] or source)
    )
    folder = Path(data_dir) / name
    if source == "chat":
        keys = ("max_samples_per_source", "allow_synthetic")
        prepare(folder, parts_of_chat, {"source": source} | {k: globals()[k] for k in keys})
    elif paths or source == "shakespeare":
        if not paths:
            paths = str(Path(data_dir) / "downloads" / "tinyshakespeare.txt")
            if not Path(paths).exists():
                download(CORPORA[source].id, Path(paths))
        files = [*input_files(paths)]
        stamps = [[str(p), p.stat().st_size, p.stat().st_mtime] for p in files]
        field = text_field or os.environ.get("LOCAL_TEXT_FIELD", "text")
        prepare(folder, lambda: parts_of_files(files, field), {"files": stamps, "text_field": field})
    else:
        corpus = CORPORA.get(source)
        if corpus is None:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
                raise ValueError(f"--source={source}: none of {', '.join(CORPORA)}, chat, and no hub id owner/name")
            corpus = Corpus(source.partition(":")[0], source.partition(":")[2], 0, "")
        if not max_docs:
            expected = min(corpus.megabytes * 2**20 / 2, 2 * max_tokens or float("inf"))  # four characters a token
            there = sum(p.stat().st_size for p in folder.glob("*.npy*"))
            check_room(folder, expected - there, ": --max_tokens or --max_docs, or another --data_dir")
        splits = {"val": corpus.val, "train": "train"} if corpus.val else {"all": "train"}
        sources = {split: hub_source(corpus, theirs) for split, theirs in splits.items()}
        prepare(folder, lambda: Parts(sources, source), {"source": source})
    if preview:
        show_batches(name)


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
