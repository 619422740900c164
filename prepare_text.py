"""Your own text, or a public corpus, as token shards, ready for train.py.

    python prepare_text.py --inputs=book.txt --dataset=mine --tokenizer=char
    python prepare_text.py --inputs=notes/,chats.jsonl --dataset=mine --tokenizer=bpe --vocab_size=4096
    python prepare_text.py --list_sources               the corpora that --source knows, with size and license
    python prepare_text.py --source=wikitext2           one of them, streamed
    python prepare_text.py --source=owner/name:config --text_field=content --max_docs=10_000     any other on the hub
    python prepare_text.py --source=chat                conversations from several sources
    python prepare_text.py --inputs=chats.jsonl --tokenizer=bpe      your own: {"messages": [{"role": "user", "content": ...}, ...]}
    python prepare_text.py --dataset=mine --preview=2   the first batches of a prepared dataset, as text

A .txt, .md or .rst file is one document, or several separated by <|endoftext|>. A .jsonl, .ndjson or .json file has one document per
line, or is an array of them. With --tokenizer=ids a line of a .txt file is a document: whole numbers, which are its token ids.
A single document is cut in two: its end becomes the validation split. Of several documents, a hash chooses those for
validation, and duplicates are skipped. A bpe tokenizer is trained on the training split only.
Of conversations a mask says what is learned: what the assistant says. train.py packs them whole into rows.
The same command resumes an interrupted run.
"""

import itertools
import json
import math
import os
import random
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import chat, corpus, small_talk
from common.corpus import DatasetWriter, Source, document_hash, make_source, stream_rows, text_of
from common.files import check_disk_space, download, parse_json
from common.shards import load_dataset
from common.tokenizer import EOT, Tokenizer, learn_tokenizer, tokenizer_from_dict
from common.windows import training_windows
from configurator import UserError, check_bounds, configure, short_errors

inputs = ""  # .txt and .jsonl files or folders of them, separated by commas (default: $LOCAL_TEXT_DATA_PATH)
source = ""  # instead of inputs: a corpus of --list_sources, or any hub id (owner/name or owner/name:config)
list_sources = False  # print the corpora that --source knows
preview = 0  # print this many batches of the prepared dataset, as train.py sees them
dataset = ""  # folder under data_dir (default: the name of the input or source)
data_dir = "data"  # folder of all datasets
tokenizer = "gpt2"  # gpt2 | char | bpe (trained on the text) | ids (lines of numbers) | a dataset or pretrained model
vocab_size = 4096  # vocabulary size of a bpe tokenizer
special_tokens = ""  # tokens that a bpe tokenizer never splits, separated by commas: <|user|>,<|assistant|>
val_fraction = 0.1  # validation share: of the characters of a single document, otherwise of the documents
text_field = ""  # name of the field that holds a document's text (default: text; for files $LOCAL_TEXT_FIELD)
max_docs = 0  # largest number of documents (0: no limit)
max_tokens = 0  # largest number of tokens to write (0: no limit)
max_samples_per_source = 20_000  # largest number of conversations from each source of the chat mix
allow_synthetic = False  # replace unavailable sources of the chat mix with generated small talk and sums
shard_tokens = 100_000_000  # tokens per shard file
seed = 1337  # random seed of the validation split and of the order of the chat mix
overwrite = False  # replace an existing dataset
batch_size = 4  # sequences per batch of the preview
block_size = 64  # tokens per sequence of the preview


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Corpus(NamedTuple):
    id: str  # hub id, or URL of a text file
    config: str = ""
    megabytes: int = 0  # size of the text
    license: str = ""
    val: str = ""  # name of its validation split; empty: a hash chooses documents of the training split
    files: str = ""  # folder of its files on the parquet branch, for corpora whose loader is a script


PARQUET = "refs/convert/parquet"  # the branch on which the hub keeps a parquet copy of each corpus
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
    # The next two are JSON on the hub. Its parquet branch holds only their first part, which is what we read.
    "c4": Corpus("allenai/c4", "", 10_000, "ODC-By 1.0", "", "en/*train"),
    "pile": Corpus("monology/pile-uncopyrighted", "", 10_000, "of its sources", "", "default/*train"),
}


# -----------------------------------------------------------------------------
# Documents from files


def is_jsonl(path: Path) -> bool:
    return os.environ.get("LOCAL_TEXT_DATA_FORMAT", "").lower() == "jsonl" or path.suffix.lower() in JSON_SUFFIXES


def file_documents(files: Iterable[Path], field: str) -> Iterator[str]:
    """The non-empty documents of the files, in order. Raises UserError that names the file and line with an error."""
    for path in files:
        if is_jsonl(path):
            for where, row in json_rows(path):
                yield from corpus.split_long(text_of(row, field, where))
        elif tokenizer == "ids":  # a line is a document
            yield from filter(None, (line.strip() for text, _ in corpus.split_text(path) for line in text.splitlines()))
        else:
            yield from (text for text, _ in corpus.split_text(path))


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, object) of a file with an object per line, or with one array of objects."""
    with open(path, "rb") as f:
        start = next((line.strip() for line in f if line.strip()), b"")
        f.seek(0)
        is_array = start.removeprefix(corpus.UTF8_BOM).startswith(b"[")
        for number, line in enumerate([f.read()] if is_array else f, 1):
            line = line.removeprefix(corpus.UTF8_BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                rows = parse_json(line)
            except UnicodeDecodeError as e:
                raise corpus.not_utf8(path, e, f.tell()) from None
            except ValueError as e:
                raise UserError(f"{path}, line {number}: not JSON ({e})") from None
            if is_array:
                yield from ((f"{path}, object {n}", row) for n, row in enumerate(rows, 1))
            else:
                yield f"{path}, line {number}", rows


def read_blocks(path: Path) -> Iterator[str]:
    """A text file in blocks of a megabyte, with newlines as on Unix. Raises UserError if it is not UTF-8."""
    with open(path, encoding="utf-8-sig", newline=None) as f:
        try:
            yield from iter(lambda: f.read(1 << 20), "")
        except UnicodeDecodeError as e:
            raise corpus.not_utf8(path, e, f.buffer.tell()) from None


def is_single_document(files: list[Path]) -> bool:
    """Whether the files are one .txt file without a separator."""
    if len(files) != 1 or is_jsonl(files[0]):
        return False
    blocks = itertools.chain([""], read_blocks(files[0]))
    return not any(EOT in a[-len(EOT) :] + b for a, b in itertools.pairwise(blocks))


def split_at_words(blocks: Iterable[str]) -> Iterator[str]:
    """A text in pieces of about half a megabyte, cut where GPT-2's pattern never matches: the tokens are the same."""
    text = ""
    for block in blocks:
        text += block
        if len(text) > 2**19:
            places = [m.start() for m in re.finditer(r"(?<=\S) (?=[^\W\d_])", text[-4096:])]
            if places or len(text) > 2**23:
                cut = len(text) - 4096 + places[-1] if places else len(text)
                yield text[:cut]
                text = text[cut:]
    if text:
        yield text


def slice_text(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """text[start:stop] of a text in blocks."""
    position = 0
    for block in blocks:
        yield block[max(0, start - position) : max(0, stop - position)]
        position += len(block)


# -----------------------------------------------------------------------------
# Documents from the hub


def hub_stream(entry: Corpus, split: str):
    """A split of a corpus as a stream. Raises UserError if it cannot be read."""
    try:
        if not entry.files:
            return corpus.open_stream(entry.id, name=entry.config or None, split=split)
    except UserError as e:
        if "scripts" not in str(e):
            raise
    # The corpus needs a loading script, which `datasets` does not run: read the parquet copy instead.
    files = entry.files or f"{entry.config or '*'}/{split}"
    path = f"hf://datasets/{entry.id}@{PARQUET}/{files}/*.parquet"
    return corpus.open_stream("parquet", entry.id, data_files=path, split="train")


def hub_source(entry: Corpus, split: str, limit: int) -> Source:
    """At most `limit` documents of a corpus (0: all), streamed. A position is [number of documents so far, state of the stream]."""
    if entry.id == "Salesforce/wikitext":
        return make_source(lambda: articles(stream_rows(hub_stream(entry, split), entry.id)), limit)

    def read(position) -> Iterator[tuple[str, Callable]]:
        count, state = position or (0, None)
        stream = hub_stream(entry, split)
        texts = corpus.stream_documents(stream, text_field or "text", entry.id, state)
        for number, text in enumerate(itertools.islice(texts, limit - count if limit else None), count + 1):
            yield text, lambda number=number: [number, stream.state_dict()]

    return read


def articles(rows: Iterable[dict]) -> Iterator[str]:
    """WikiText's articles. The hub has one row per line; an article starts at a title between single equal signs."""
    lines: list[str] = []
    for line in itertools.chain((row["text"] for row in rows), [" = End = "]):
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            if article := "".join(lines).strip():
                yield article
            lines = []
        lines.append(line)


# -----------------------------------------------------------------------------
# The chat mix: conversations, as lists of messages, and some plain text


def exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]


def oasst_conversations(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """In each tree of messages, the English path along the answers with the best rank."""
    for _, tree in itertools.groupby(rows, key=lambda row: row["message_tree_id"]):
        replies: dict[str | None, list[dict]] = {}
        for row in tree:
            if row["lang"] == "en":
                replies.setdefault(row["parent_id"], []).append(row)
        texts, parent = [], None
        while parent in replies:
            best = min(replies[parent], key=lambda row: row["rank"] if row["rank"] is not None else 10**6)
            texts.append(best["text"])
            parent = best["message_id"]
        if len(texts) > 1:
            yield [message for q, a in zip(texts[::2], texts[1::2]) for message in exchange(q, a)]


def gsm8k_conversations(rows: Iterable[dict]) -> Iterator[list[dict]]:
    for row in rows:
        steps, _, result = re.sub(r"<<.*?>>", "", row["answer"]).partition("####")
        yield exchange(row["question"], f"{steps.strip()}\nThe answer is {result.strip()}.")


def code_conversations(rows: Iterable[dict]) -> Iterator[list[dict]]:
    for row in rows:
        yield exchange(f"{row['instruction']}\n{row.get('input') or ''}", row["output"])


def paragraphs(rows: Iterable[dict]) -> Iterator[str]:
    """WikiText's paragraphs, for fluency."""
    for article in articles(rows):
        lines = map(str.strip, article.split("\n"))
        yield from (line for line in lines if line and not line.startswith("= "))


CHAT = {
    "OpenAssistant/oasst1": ("", oasst_conversations),
    "openai/gsm8k": ("main", gsm8k_conversations),
    "sahil2801/CodeAlpaca-20k": ("", code_conversations),
    "Salesforce/wikitext": ("wikitext-2-raw-v1", paragraphs),
}


def small_talk_documents() -> tuple[dict[str, Source], str, bool]:
    """Generated small talk and sums, which need no network."""
    found = itertools.islice(small_talk.conversations(random.Random(seed)), max_samples_per_source)
    mix = dict.fromkeys(json.dumps(c, ensure_ascii=False) for c in found)
    return split_conversations(
        [*mix],
        random.Random(seed),
        f"{min(len(mix), max_docs or len(mix)):,} conversations of generated small talk and sums",
    )


def chat_documents() -> tuple[dict[str, Source], str, bool]:
    """The chat mix as JSON, shuffled, without duplicates. Raises UserError if no source is available."""
    rng, descriptions, mix = random.Random(seed), [], {}
    for name, (config, conversations) in CHAT.items():
        try:
            rows = stream_rows(hub_stream(Corpus(name, config), "train"), name)
            found = list(itertools.islice(conversations(rows), max_samples_per_source))
            descriptions.append(f"{len(found):,} of {name}")
        except (UserError, KeyError, TypeError) as e:
            reason = str(e) if isinstance(e, UserError) else f"its rows have another format ({e!r})"
            print(f"chat: skipped {name}: {reason}")
            if not allow_synthetic:
                continue
            found = list(itertools.islice(small_talk.conversations(rng), min(max_samples_per_source, 5000)))
            descriptions.append(f"{len(found):,} synthetic conversations instead of {name}")
        print(f"chat: {descriptions[-1]}")
        mix |= dict.fromkeys(json.dumps(c, ensure_ascii=False) for c in found)
    if not mix:
        advice = "go online, or use --source=small_talk for generated small talk and sums"
        raise UserError(f"no source of the chat mix is available: {advice}")
    return split_conversations([*mix], rng, ", ".join(descriptions))


def split_conversations(mixed: list[str], rng: random.Random, description: str) -> tuple[dict[str, Source], str, bool]:
    rng.shuffle(mixed)
    mixed = mixed[: max_docs or None]
    in_val = {text for text in mixed if document_hash(text, seed) < val_fraction * 2**64} or {mixed[0]}
    sources = {
        split: make_source(lambda is_val=is_val: (text for text in mixed if (text in in_val) == is_val))
        for split, is_val in (("val", True), ("train", False))
    }
    return sources, description, False


def holds_conversations(files: list[Path]) -> bool:
    """Whether the first row of a JSON file has messages, and no --text_field chooses something else."""
    if text_field or not is_jsonl(files[0]):
        return False
    row = next((row for _, row in json_rows(files[0])), None)
    return isinstance(row, dict) and "messages" in row


def file_conversations(files: list[Path]) -> Iterator[str]:
    """The conversations of JSON files, as JSON. Raises UserError that names the file and line with an error."""
    for path in files:
        if not is_jsonl(path):
            raise UserError(
                f"--inputs: {files[0]} holds conversations and {path} text: prepare two datasets and mix them"
            )
        for where, row in json_rows(path):
            messages = chat.check_messages(row.get("messages") if isinstance(row, dict) else None, where)
            if any(message["role"] == "assistant" for message in messages):
                yield json.dumps(messages, ensure_ascii=False)


# -----------------------------------------------------------------------------
# Writing the dataset. It is made from a tuple: sources by split, a description, and whether they are one document.
# A hash chooses the split for a source "all". Validation is written first, so that training skips its documents.


def file_documents_by_split(files: list[Path], field: str) -> tuple[dict[str, Source], str, bool]:
    """The documents of files. Raises UserError if there is no text, or a single document too short to split."""
    names = ", ".join(p.name for p in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    is_single = tokenizer != "ids" and is_single_document(files)
    first = [] if is_single else list(itertools.islice(file_documents(files, field), 2))
    if not is_single and len(first) != 1:
        few = list(itertools.islice(file_documents(files, field), 1000))
        if 1 < len(set(few)) and len(few) < 1000 and not max_docs:
            return split_few(few), names, False
        return {"all": make_source(lambda: file_documents(files, field), max_docs)}, names, False

    if tokenizer == "ids":
        numbers = first[0].split()
        cut = int(len(numbers) * (1 - val_fraction) + 1e-6)
        parts = {"val": " ".join(numbers[cut:]), "train": " ".join(numbers[:cut])}
        return {split: make_source(lambda text=text: [text]) for split, text in parts.items()}, names, True

    def blocks() -> Iterable[str]:
        return read_blocks(files[0]) if is_single else first

    if not any(block.strip() for block in blocks()):
        raise UserError(f"there is no text in {names}")
    size = sum(map(len, blocks()))
    cut = int(size * (1 - val_fraction) + 1e-6)
    if not 0 < cut < size:
        raise UserError(f"a text of {size} characters cannot be split by --val_fraction={val_fraction}")

    def part(start: int, stop: int) -> Source:
        return make_source(lambda: split_at_words(slice_text(blocks(), start, stop)))

    return {"val": part(cut, size), "train": part(0, cut)}, names, True


def split_few(documents: list[str]) -> dict[str, Source]:
    """Fewer than a thousand documents: those for validation are chosen by their size, so that it is near --val_fraction.

    In an order by hash, each that still fits is taken. If all are too large, the end of the largest is for validation.
    """
    documents = list(dict.fromkeys(documents))
    room = sum(map(len, documents)) * val_fraction
    parts, left = {"val": [], "train": []}, room
    for text in sorted(documents, key=lambda text: document_hash(text, seed)):
        if len(text) <= left * 1.1:
            parts["val"].append(text)
            left -= len(text)
    chosen = set(parts["val"])
    for text in documents:
        if text in chosen:
            continue
        if left > room / 2 and text == max((t for t in documents if t not in chosen), key=len):
            at = max(1, len(text) - round(left))
            cut = text.rfind(" ", max(0, at - 1000), at) + 1 or at  # at a space that is near
            parts["val"].append(text[cut:])
            text = text[:cut]
        parts["train"].append(text)
    return {split: make_source(lambda texts=texts: texts) for split, texts in parts.items()}


def val_threshold(read: Source, description: str) -> int:
    """Documents whose hash is below this are for validation; of fewer than 1000 at least one is on each side."""
    hashes = [document_hash(text, seed) for text, _ in itertools.islice(read(None), 1000)]
    threshold = int(val_fraction * 2**64)
    if not hashes:
        raise UserError(f"there is no text in {description}")
    if len(hashes) == 1000:
        return threshold
    ordered = sorted(set(hashes))
    if len(ordered) == 1:
        raise UserError(
            f"{description} holds one document, once or several times: none is left for validation, add another"
        )
    return min(max(threshold, ordered[1]), ordered[-1])


def prepare(
    folder: Path, find_documents: Callable[[], tuple[dict[str, Source], str, bool]], arguments: dict, is_chat=False
) -> None:
    keys = ("tokenizer", "vocab_size", "special_tokens", "val_fraction", "text_field", "max_docs", "max_tokens", "seed")
    arguments = {k: globals()[k] for k in keys} | arguments
    if corpus.is_up_to_date(folder, arguments, overwrite):
        return
    sources, description, is_single = find_documents()
    threshold = val_threshold(sources["all"], description) if "all" in sources else 0
    if "all" in sources and not threshold:  # said before a large corpus is tokenized
        raise UserError(f"--val_fraction={val_fraction}: no document would be for validation")

    def split_of(text: str) -> str:
        return "val" if document_hash(text, seed) < threshold else "train"

    def texts(*wanted: str) -> Iterator[str]:
        for name in ("all", *wanted):
            documents = sources[name](None) if name in sources else ()
            found = (text for text, _ in documents if name != "all" or split_of(text) in wanted)
            yield from map(chat.plain_text, found) if is_chat else found

    def make_tokenizer() -> Tokenizer:
        special, all_texts = list(filter(None, special_tokens.split(","))), lambda: texts("val", "train")
        if is_chat and tokenizer == "bpe":
            special += [token for token in chat.TURN_TOKENS if token not in special]
        learned = learn_tokenizer(tokenizer, vocab_size, all_texts, lambda: texts("train"), not is_single, special)
        return chat.for_chat(learned) if is_chat else learned

    encode = chat.encode_documents if is_chat else None
    writer = DatasetWriter(folder, arguments, make_tokenizer, overwrite, shard_tokens=shard_tokens, encode=encode)
    for split, read in sources.items():
        limit = math.ceil(max_tokens * val_fraction) if split == "val" else max_tokens
        writer.write(read, split_of if split == "all" else split, split, limit, not is_single, not is_single)
    for split in ("train", "val"):
        if split not in writer.writers or not writer.writers[split].tokens:
            writer.discard()
            advice = "add text, raise --max_docs or --max_tokens, or change --val_fraction"
            raise UserError(f"no text is left for the {split} split: {advice}")
    tokens = writer.finish(description)
    print(writer.summary)
    warn_if_small(tokens, chosen=not (source in CORPORA and CORPORA[source].val))
    preset = "config/train_chat.py" if is_chat else "config/quickstart.py"
    preset += f" --out_dir=out/{folder.name}" * (folder.name != "chat")  # the run of the chat preset itself is out/chat
    place = f" --data_dir={shlex.quote(data_dir)}" if data_dir != "data" else ""
    print(f"Train on it: python train.py {preset} --dataset={os.path.relpath(folder, data_dir)}{place}")


def warn_if_small(tokens: dict[str, int], chosen: bool) -> None:
    """Say what will go wrong in training, and what to do about it. chosen: --val_fraction chose the validation text."""
    train, val = tokens["train"], tokens["val"]
    share = val / (train + val)
    if train < 100_000:
        print(f"note: {train:,} training tokens are few: a model learns them by heart. A megabyte of text is a start.")
    if chosen and not val_fraction / 3 < share < 3 * val_fraction:
        print(
            f"note: validation has {share:.0%} of the tokens, not {val_fraction:.0%}: the documents are too few or too large to choose from"
        )
    if val < 300:
        print(
            f"note: {val:,} validation tokens do not fill a window of 256: add text, or train with --block_size={max(8, val // 4)}"
        )


def show_batches(name: str) -> None:
    prepared = load_dataset(name, data_dir)
    decode = tokenizer_from_dict(prepared.tokenizer).decode
    windows = training_windows(prepared, block_size, seed)
    for number in range(preview):
        x, y = windows.batch(number * batch_size, batch_size)
        print(f"batch {number + 1}: inputs {x.shape} {x.dtype}, targets {y.shape} {y.dtype}, shifted by one token")
        for row, targets in zip(x, y):
            print(f"  {decode(row.tolist())!r}")
            if prepared.is_masked:
                print(f"  learned: {decode(targets[targets >= 0].tolist())!r}")


def print_sources() -> None:
    print(f"{'--source=':<15} {'text':>9}  {'license':<20} from")
    for name, c in CORPORA.items():
        size = f"{c.megabytes:,} MB" if c.megabytes < 2000 else f"{c.megabytes / 1000:,.0f} GB"
        print(f"{name:<15} {size:>9}  {c.license:<20} {c.id}{':' + c.config if c.config else ''}")
    print(f"{'chat':<15} {'30 MB':>9}  {'of its sources':<20} {', '.join(CHAT)}")
    print(
        f"{'small_talk':<15} {'4 MB':>9}  {'generated':<20} greetings, names, sums, questions about a sentence; no network"
    )
    print("Any other corpus on the hub: --source=owner/name or owner/name:config, with --text_field")


def prepare_files(folder: Path, paths: str) -> None:
    files = corpus.find_files("inputs", paths, (".txt", ".md", ".rst", "", *JSON_SUFFIXES))
    for path in files:
        if kind := corpus.kind_of_binary(path):
            raise UserError(f"--inputs={path} is {kind}")
    field = text_field or os.environ.get("LOCAL_TEXT_FIELD", "text")
    stamps = [[str(p), p.stat().st_size, p.stat().st_mtime] for p in files]
    if holds_conversations(files):
        names = ", ".join(p.name for p in files[:5])
        found = {"all": make_source(lambda: file_conversations(files), max_docs)}
        return prepare(folder, lambda: (found, names, False), {"files": stamps, "chat": True}, is_chat=True)
    prepare(folder, lambda: file_documents_by_split(files, field), {"files": stamps, "text_field": field})


def prepare_corpus(folder: Path, name: str) -> None:
    if name not in CORPORA and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        raise UserError(
            f"--source={name}: choose one of {', '.join(CORPORA)}, chat, small_talk, or a hub id owner/name"
        )
    entry = CORPORA.get(name) or Corpus(*name.split(":"))
    if not max_docs:
        # A token takes two bytes and stands for about four characters.
        expected = min(entry.megabytes * 2**20 / 2, 2 * max_tokens or float("inf"))
        check_disk_space(folder, expected, ": set --max_tokens or --max_docs, or another --data_dir")
    splits = {"val": entry.val, "train": "train"} if entry.val else {"all": "train"}
    limits = {"val": max(1, math.ceil(max_docs * val_fraction)) if max_docs else 0}  # as for --max_tokens
    sources = {split: hub_source(entry, hub_split, limits.get(split, max_docs)) for split, hub_split in splits.items()}
    prepare(folder, lambda: (sources, name, False), {"source": name})


def main() -> None:
    if list_sources:
        return print_sources()
    at_least_1 = "shard_tokens max_samples_per_source batch_size block_size"
    check_bounds(
        globals(), at_least_0="max_docs max_tokens preview seed", at_least_1=at_least_1, below_1="val_fraction"
    )
    if seed >= 2**63:
        raise UserError(f"--seed={seed}: must be less than 2^63")
    if inputs and source:
        raise UserError("--inputs and --source: give one of them")
    paths = inputs or ("" if source else os.environ.get("LOCAL_TEXT_DATA_PATH", ""))
    if not paths and not source:
        if preview and dataset:
            return show_batches(dataset)
        raise UserError("give --inputs=FILE (or set LOCAL_TEXT_DATA_PATH) or --source=NAME (see --list_sources)")
    stem, kept = (Path(os.path.abspath(paths.split(",")[0])).stem, ".+-") if paths else (source.split("/", 1)[-1], "")
    default = re.sub(rf"[^\w{kept}]+", "_", stem)
    folder = Path(data_dir) / (dataset or default)
    if paths:
        prepare_files(folder, paths)
    elif source == "shakespeare":
        path = Path(data_dir) / "downloads" / "tinyshakespeare.txt"
        download(CORPORA[source].id, path)
        prepare_files(folder, str(path))
    elif source == "small_talk":
        prepare(folder, small_talk_documents, {"source": source, "max_samples": max_samples_per_source}, is_chat=True)
    elif source == "chat":
        options = {"max_samples_per_source": max_samples_per_source, "allow_synthetic": allow_synthetic}
        prepare(folder, chat_documents, {"source": source} | options, is_chat=True)
    else:
        prepare_corpus(folder, source)
    if preview:
        show_batches(os.path.relpath(folder, data_dir))


if __name__ == "__main__":
    with short_errors():
        configure(globals(), aliases={"input": "inputs", "list": "list_sources"})
        main()
