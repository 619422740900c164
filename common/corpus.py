"""From text to a dataset: readers of documents, and a writer that tokenizes on all cores and resumes when interrupted.

A source is a function source(position) that yields (text, position after it) for each document in order, starting at a
position (None: the start). A position is a JSON-able value, or a function that returns one when called before the next
document is read.
"""

import array
import contextlib
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.files import HUB, atomic_write, named_disk_errors, parse_json
from common.shards import CHUNK, ShardWriter, cut_whole
from common.tokenizer import EOT, BPETokenizer, Tokenizer, replace_surrogates, tokenizer_from_dict
from configurator import UserError, first_line

import numpy as np

Source = Callable[[object], Iterable[tuple[str, object]]]
LONGEST = 2**24  # bytes or characters; a longer document is read as several, to bound the memory
MOST_UNIQUE = 10**8  # hashes remembered to find duplicates; a set of Python ints takes 75 to 95 bytes per document
BATCH_CHARACTERS = 2**19  # text that one thread tokenizes at a time


def make_source(documents: Callable[[], Iterable[str]], limit: int = 0) -> Source:
    """A source whose position is the number of documents read. To resume, it reads them again but does not tokenize."""
    return lambda position: itertools.islice(zip(documents(), itertools.count(1)), position or 0, limit or None)


def document_hash(text: str, seed: int = 0) -> int:
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[tuple], separated: bool = True, encode_texts: Callable | None = None
) -> Iterator[tuple]:
    """Tokenize documents (text, split, position) on all cores; yields ({split: ids}, last position()), in order.

    Each thread tokenizes a batch: tokenizers release the GIL. separated: put an end-of-text id before each document.
    encode_texts(tokenizer, texts) -> ids: replaces the tokenizer's encode_batch.
    """
    local = threading.local()

    def copy_tokenizer() -> None:  # tiktoken is a third faster in the thread that used the encoding first
        is_tiktoken = isinstance(tokenizer, BPETokenizer)
        local.tokenizer = tokenizer_from_dict(tokenizer.to_dict()) if is_tiktoken else tokenizer

    def encode(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        if encode_texts:
            return {split: encode_texts(local.tokenizer, texts) for split, texts in batch.items()}
        encoded = {split: local.tokenizer.encode_batch(texts) for split, texts in batch.items()}
        if not separated and tokenizer.eot is not None:
            encoded = {split: ids[ids != tokenizer.eot] for split, ids in encoded.items()}
        return encoded

    batch, size, pending, n_threads = {}, 0, deque(), cores()
    with ThreadPoolExecutor(n_threads, initializer=copy_tokenizer) as pool:
        for text, split, position in documents:
            batch.setdefault(split, []).append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                pending.append((pool.submit(encode, batch), position()))
                batch, size = {}, 0
            if len(pending) > 2 * n_threads:
                future, end = pending.popleft()
                yield future.result(), end
        if batch:
            pending.append((pool.submit(encode, batch), position()))
        for future, end in pending:
            yield future.result(), end


class DatasetWriter:
    """Writes a dataset, and resumes one that was interrupted if its arguments are the same.

    progress.json records how far each source was read and how many ids that gave in each file. What was written after
    the last record is written again, so no document is repeated or missing. documents.part holds the 8-byte hashes of
    the documents so far. A finished dataset stays in place until the one that replaces it is complete.
    name: prefix of the shard files (default: the folder's name). name_of(split, number): the name of a shard file.
    encode(tokenizer, texts): gives ids with the flags of a mask above bit 32, which then becomes a file of its own.
    goes_on(old arguments, sources): whether to resume a dataset with other arguments, whose sources were read so far.
    """

    def __init__(
        self, folder: Path, arguments: dict, make_tokenizer: Callable[[], Tokenizer], overwrite: bool = False,
        name: str = "", shard_tokens: int = CHUNK, name_of: Callable[[str, int], str] | None = None,
        encode: Callable | None = None, goes_on: Callable[[dict, dict], bool] | None = None,
    ):  # fmt: skip
        if not re.fullmatch(r"\w[\w.+-]*", folder.name):
            raise UserError(f"--dataset={folder.name}: use only letters, digits and _ . + - in a name")
        check_replaceable(folder, overwrite, name)
        self.start, self.summary = time.perf_counter(), ""
        self.target, self.name, self.shard_tokens = folder, name or folder.name, shard_tokens
        self.encode = encode
        self.folder = folder.with_name(folder.name + ".new") if (folder / "meta.json").exists() else folder
        self.arguments = json.loads(json.dumps(arguments))
        self.name_of = name_of or (lambda split, number: f"{self.name}_{split}_{number:06d}.npy")
        self.progress_file, self.hashes_file = self.folder / "progress.json", self.folder / "documents.part"
        self.writers: dict[str, ShardWriter] = {}
        self.sources: dict[str, dict] = {}
        self.seen: set[int] = set()  # hashes of the documents so far
        self.unsaved_hashes = array.array("Q")
        progress = {}
        try:
            if self.progress_file.exists():
                progress = parse_json(self.progress_file.read_text(encoding="utf-8"))
            old, sources = progress.get("arguments"), progress.get("sources")
            resumable = old == self.arguments or bool(progress and goes_on and goes_on(old, sources))
            empty = not any(split["shards"] or split["filled"] for split in progress.get("splits", {}).values())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.progress_file} is damaged: remove {self.folder} to start again") from None
        if resumable:
            return self.resume(progress)
        if not overwrite and (own_shards(self.folder, self.name) or not empty):
            advice = "finish it with those, choose another --dataset, or set --overwrite=True to start again"
            raise UserError(f"{self.folder} holds an unfinished dataset with other settings: {advice}")
        self.tokenizer = make_tokenizer()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hashes_file.unlink(missing_ok=True)
        self.save()
        self.remove_unknown_shards()

    def resume(self, progress: dict) -> None:
        self.tokenizer, self.sources = tokenizer_from_dict(progress["tokenizer"]), progress["sources"]
        self.writers = {split: self.shard_writer(split, **state) for split, state in progress["splits"].items()}
        self.remove_unknown_shards()
        data = self.hashes_file.read_bytes() if self.hashes_file.exists() else b""
        hashes = array.array("Q", data[: 8 * progress["documents"]])
        self.seen = set(hashes)
        self.hashes_file.write_bytes(hashes.tobytes())
        print(f"{self.folder}: resuming after {self.tokens:,} tokens")

    def remove_unknown_shards(self) -> None:
        known = {s["file"] for w in self.writers.values() for s in w.shards}
        known |= {s["mask"] for w in self.writers.values() for s in w.shards if "mask" in s}
        known |= {part.name for w in self.writers.values() if w.filled for _, part in w.paths()}
        for path in own_shards(self.folder, self.name):
            if path.name not in known:
                path.unlink()

    def discard(self) -> None:
        for path in (self.progress_file, self.hashes_file, *own_shards(self.folder, self.name)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds other files
            self.folder.rmdir()

    def shard_writer(self, split: str, **state) -> ShardWriter:
        name_of = partial(self.name_of, split)
        masked = self.encode is not None
        return ShardWriter(self.folder, name_of, self.tokenizer.n_vocab, self.shard_tokens, masked=masked, **state)

    @property
    def tokens(self) -> int:
        return sum(w.tokens for w in self.writers.values())

    def is_new(self, text: str) -> bool:
        """Whether no equal document came before. Remembers the document, up to MOST_UNIQUE of them."""
        number = document_hash(text)
        if number in self.seen:
            return False
        if len(self.seen) < MOST_UNIQUE:
            self.seen.add(number)
            self.unsaved_hashes.append(number)
        return True

    def save(self, documents: int = 0) -> None:
        """Record the progress. documents: how many of the remembered documents are in what was written."""
        if self.unsaved_hashes:
            with named_disk_errors(self.hashes_file), open(self.hashes_file, "ab") as f:
                self.unsaved_hashes.tofile(f)
                f.flush()
                os.fsync(f.fileno())
            self.unsaved_hashes = array.array("Q")
        for writer in self.writers.values():
            writer.sync()
        splits = {split: {"shards": w.shards, "filled": w.filled} for split, w in self.writers.items()}
        progress = {"arguments": self.arguments, "tokenizer": self.tokenizer.to_dict(), "sources": self.sources}
        atomic_write(self.progress_file, json.dumps(progress | {"splits": splits, "documents": documents}))

    def write(
        self, source: Source, split: str | Callable[[str], str], key="", max_tokens=0, unique=False, separated=True
    ) -> None:
        """Write the documents of a source to a split, or each to split(text).

        key: names the source, if there are several. max_tokens: stop when the dataset has this size (0: no limit).
        unique: skip documents equal to an earlier one. separated: see encode_documents.
        """
        progress = self.sources.setdefault(key or str(split), {"position": None, "done": False})
        if progress["done"]:
            return

        def documents() -> Iterator[tuple]:
            for text, position in source(progress["position"]):
                if not unique or self.is_new(text):
                    name, count = split(text) if callable(split) else split, len(self.seen)
                    yield text, name, lambda p=position, n=count: (p() if callable(p) else p, n)

        start = last_save = time.perf_counter()
        first_token, count = self.tokens, len(self.seen)
        for encoded, (position, count) in encode_documents(self.tokenizer, documents(), separated, self.encode):
            room, size, new_shards = max_tokens - self.tokens, sum(map(len, encoded.values())), []
            for name, ids in encoded.items():
                writer = self.writers.setdefault(name, self.shard_writer(name))
                n_shards = len(writer.shards)
                keep = len(ids) if not max_tokens or size <= room else len(ids) * room // size
                writer.add(ids[: keep if self.encode is None else cut_whole(ids >> 32, keep)])
                new_shards += writer.shards[n_shards:]
            progress["position"] = position
            for shard in new_shards:
                speed = (self.tokens - first_token) / (time.perf_counter() - start) / 1e6
                print(f"{shard['file']}  {self.tokens:,} tokens  {speed:.2f}M tokens/s")
            if new_shards or time.perf_counter() - last_save > 10:
                self.save(count)
                last_save = time.perf_counter()
            if max_tokens and size >= room:
                break
        progress["done"] = True
        self.save(count)

    def finish(self, source: str) -> dict[str, int]:
        """Write meta.json, which makes the folder a dataset. Returns the number of tokens of each split."""
        for writer in self.writers.values():
            writer.finish()
        shards: dict[str, list] = {"train": [], "val": []}
        for shard in (shard for writer in self.writers.values() for shard in writer.shards):
            shards[re.search(r"_(train|val)_\d+\.npy$", shard["file"])[1]].append(shard)
        tokens = {split: sum(s["tokens"] for s in shards[split]) for split in shards}
        n_vocab, tokenizer = self.tokenizer.n_vocab, self.tokenizer.to_dict()
        meta = {"source": source, "tokenizer": tokenizer, "vocab_size": n_vocab}
        meta |= {"dtype": "uint16" if n_vocab <= 2**16 else "uint32", "tokens": tokens, "shards": shards}
        if tokenizer["kind"] == "bpe":
            atomic_write(self.folder / "tokenizer.json", self.tokenizer.to_json())
        atomic_write(self.folder / "meta.json", json.dumps(meta | {"arguments": self.arguments}, indent=1))
        self.progress_file.unlink()
        self.hashes_file.unlink(missing_ok=True)
        if self.folder != self.target:
            # meta.json leaves first and arrives last: at no time does it describe shards of the other dataset.
            for old in ("meta.json", "tokenizer.json"):
                (self.target / old).unlink(missing_ok=True)
            for old in own_shards(self.target, self.name):
                old.unlink()
            for new in sorted(self.folder.iterdir(), key=lambda p: p.name == "meta.json"):
                os.replace(new, self.target / new.name)
            self.folder.rmdir()
        counts = f"{tokens['train']:,} train and {tokens['val']:,} val tokens, vocabulary of {n_vocab:,}"
        self.summary = f"{self.target}: {counts}, {time.perf_counter() - self.start:.1f} s"
        return tokens


def own_shards(folder: Path, name: str = "") -> set[Path]:
    """The shard files in a folder that have our names, unfinished ones included."""
    paths = folder.glob(f"{name or folder.name}_*.npy*")
    return {p for p in paths if re.search(r"_(train|val)_\d{6}(\.mask)?\.npy(\.part)?$", p.name)}


def check_replaceable(folder: Path, overwrite: bool, name: str = "") -> None:
    """Raise UserError if the folder holds a finished dataset (without overwrite) or the files of another project."""
    foreign = {*folder.glob("*.npy"), *folder.glob("*.bin")} - own_shards(folder, name)
    if foreign:
        raise UserError(f"{folder} holds {min(foreign).name}, which is not ours to replace: choose another --dataset")
    if (folder / "meta.json").exists() and not overwrite:
        raise UserError(f"{folder} already holds a dataset: choose another --dataset, or set --overwrite=True")


def is_up_to_date(folder: Path, arguments: dict, overwrite: bool, name: str = "") -> bool:
    """Whether the folder holds a dataset made with these arguments. Raises UserError as check_replaceable."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        meta = parse_json((folder / "meta.json").read_text(encoding="utf-8"))
        if not overwrite and meta.get("arguments") == json.loads(json.dumps(arguments)):
            print(f"{folder} already exists with these settings: nothing to do (--overwrite=True makes it again)")
            return True
    check_replaceable(folder, overwrite, name)
    return False


# -----------------------------------------------------------------------------
# Reading documents


def find_files(key: str, paths: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a list of files and folders, separated by commas. Raises UserError for a path without any.

    Of a folder those with the suffixes ("": files without one). What is left out is counted and named.
    """
    files = []
    for path in map(Path, filter(None, paths.split(","))):
        found = [path]
        if path.is_dir():
            own = (p.relative_to(path).parts for p in path.rglob("*") if p.is_file())
            every = sorted(path.joinpath(*parts) for parts in own if not any(part.startswith(".") for part in parts))
            found = [p for p in every if p.suffix.lower() in suffixes and (p.suffix or not kind_of_binary(p))]
            if found and (left_out := [p.name for p in every if p not in found]):
                names = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
                print(f"{path}: {len(left_out):,} files of other kinds are left out: {names}")
        if not path.exists() or not found:
            known = ", ".join(filter(None, suffixes))
            problem = f"no {known} file in this folder" if path.exists() else "no such file or folder"
            raise UserError(f"--{key}={path}: there is {problem}")
        files += found
    return files


UTF8_BOM = b"\xef\xbb\xbf"
KINDS = {  # how files begin that are no text: what they are, what to do
    b"%PDF": ("a PDF", "save its text first, for example with pdftotext"),
    b"PK\x03\x04": ("a zip file, as are .docx and .epub", "save its text first"),
    b"\xd0\xcf\x11\xe0": ("an old Office file", "save its text first"),
    b"\x1f\x8b": ("gzip", "unpack it first"),
    b"\x89PNG": ("a picture", ""),
    b"\xff\xd8\xff": ("a picture", ""),
    b"PAR1": ("parquet", "build_fineweb_shards.py --source= reads it"),
}


def kind_of_binary(path: Path) -> str:
    """Why a file is no UTF-8 text, and what to do; empty if it may be text."""
    with open(path, "rb") as f:
        start = f.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        convert = f"open('utf8.txt', 'w', encoding='utf-8').write(open({str(path)!r}, encoding='utf-16').read())"
        return f'UTF-16 text; convert it to UTF-8: python -c "{convert}"'
    for magic, (kind, advice) in KINDS.items():
        if start.startswith(magic):
            return f"{kind}; {advice}" if advice else kind
    return "a binary file" if b"\0" in start else ""


def open_stream(name: str, label: str = "", /, **options):
    """The rows of a corpus as a stream of `datasets`. Raises UserError, which names the label, if it cannot be opened.

    name: a hub id, or parquet or json with data_files. Only what is read is downloaded; no code of a corpus is run.
    """
    import datasets
    import requests

    label = label or name
    datasets.disable_progress_bars()
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
    if not offline and "hf:" in str(options.get("data_files", "hf:")):
        try:  # one quick request: without a connection huggingface_hub would retry for a minute
            requests.head(os.environ.get("HF_ENDPOINT", HUB), timeout=20)
        except requests.RequestException as e:
            raise UserError(f"{label} cannot be read: no connection to the hub ({type(e).__name__})") from None
    try:
        return datasets.load_dataset(name, streaming=True, **options)
    except Exception as e:
        raise UserError(f"{label} cannot be read ({first_line(e)}); run the same command again to resume") from None


def stream_rows(stream, label: str, state=None) -> Iterator[dict]:
    """The rows of a stream; state: resume from this stream.state_dict(). Raises UserError if reading fails."""
    if state:
        stream.load_state_dict(state)
    try:
        yield from stream
    except Exception as e:
        raise UserError(f"{label}: {first_line(e)}; run the same command again to resume") from None


def stream_documents(stream, field: str, label: str, state=None) -> Iterator[str]:
    """The non-empty texts of a stream's rows; state and errors as in stream_rows and text_of."""
    return filter(None, (text_of(row, field, label) for row in stream_rows(stream, label, state)))


def text_of(row: dict, field: str, label: str) -> str:
    """The text of a row, "" if it is null or white space. Raises UserError if the row has no text under this key."""
    text = row.get(field) if isinstance(row, dict) else None
    if text is None and isinstance(row, dict) and field in row:
        return ""
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{label}: there is no text under {field!r}, only {keys}: set --text_field")
    return replace_surrogates(text) if text.strip() else ""


def split_long(text: str) -> Iterator[str]:
    """A document in parts of at most LONGEST characters, cut at white space where there is some, to bound the memory."""
    start = 0
    while len(text) - start > LONGEST:
        cut = max(text.rfind(space, start, start + LONGEST) for space in "\n ") + 1 or start + LONGEST
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def split_text(path: Path, start: int = 0) -> Iterator[tuple[str, int]]:
    """The documents of a text file from byte `start` on, separated by EOT, each with the byte position after it.

    They are stripped. Empty ones are skipped; one of more than LONGEST bytes comes as several. Raises UserError for a
    file that is not UTF-8.
    """
    separator = EOT.encode()
    window = LONGEST + len(separator)
    buffer, offset, begin = b"", start, 0  # offset: of buffer[0] in the file; begin: of the next document in the buffer
    with open(path, "rb") as f:
        if not start and f.read(3) == UTF8_BOM:
            start = offset = 3
        f.seek(start)
        while True:
            end = buffer.find(separator, begin, begin + window)
            if end >= 0:
                after = end + len(separator)
            elif len(buffer) - begin >= window:
                at = buffer.rfind(b"\n", begin, begin + LONGEST) + 1 or buffer.rfind(b" ", begin, begin + LONGEST) + 1
                end = at or begin + LONGEST
                while buffer[end] & 0xC0 == 0x80:  # a continuation byte: do not cut inside a character
                    end -= 1
                after = end
            elif block := f.read(1 << 20):
                buffer, offset, begin = buffer[begin:] + block, offset + begin, 0
                continue
            elif begin < len(buffer):
                end = after = len(buffer)
            else:
                return
            try:
                text = unix_newlines(buffer[begin:end].decode("utf-8")).strip()
            except UnicodeDecodeError as e:
                raise not_utf8(path, e, offset + end) from None
            if text:
                yield text, offset + after
            begin = after


def unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def not_utf8(path: Path, e: UnicodeDecodeError, end: int) -> UserError:
    """end: the position in the file after the bytes of e.object."""
    position = end - len(e.object) + e.start
    return UserError(f"{path} is not UTF-8 text: byte {position} is {e.object[e.start]:#04x}; convert it to UTF-8")
