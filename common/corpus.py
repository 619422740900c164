"""From text to a dataset: downloads, documents, and the writer that tokenizes on all cores and survives being killed.

A source is a function: given a position (None: the start) it yields (text, position behind it) for each document in order.
A position is a JSON-able value, or a function that tells it when called at that moment.
"""

import array
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.shards import CHUNK, ShardWriter, atomic_write, file_sha256, writing
from common.tokenizer import EOT, BPETokenizer, Tokenizer, tokenizer_from_dict
from configurator import first_line

Source = Callable[[object], Iterable[tuple[str, object]]]
HUB = "https://huggingface.co"
LONGEST = 2**24  # bytes of a document: what is longer is taken as several, so that memory stays flat
MOST_UNIQUE = 10**8  # documents that are remembered, to find duplicates: 16 to 32 bytes each


class Unique:
    """Remembers documents by 64 bits of a hash. A table with open addressing, as a set of numbers takes four times the memory."""

    def __init__(self):
        self.table, self.count, self.fresh = array.array("Q", bytes(8 * 2**16)), 0, array.array("Q")

    def add(self, number: int) -> bool:
        """Whether the number is new; it is remembered if there is room."""
        mask = len(self.table) - 1
        number = number or 1  # 0 is an empty place
        place = number & mask
        while found := self.table[place]:
            if found == number:
                return False
            place = place + 1 & mask
        if self.count == MOST_UNIQUE:
            return True
        self.table[place] = number
        self.fresh.append(number)
        self.count += 1
        if 2 * self.count > len(self.table):
            known, self.table = self.table, array.array("Q", bytes(8 * 2 * len(self.table)))
            mask = len(self.table) - 1
            for number in filter(None, known):
                place = number & mask
                while self.table[place]:
                    place = place + 1 & mask
                self.table[place] = number
        return True


def counted(documents: Callable[[], Iterable[str]], limit: int = 0) -> Source:
    """A source whose positions are the number of documents so far; going on reads them again, but tokenizes none twice."""

    def read(position):
        return itertools.islice(zip(documents(), itertools.count(1)), position or 0, limit or None)

    return read


def document_hash(text: str, seed: int = 0) -> int:
    """64 bits by which a document is known: equal documents are equal, and anything else is spread evenly."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(tokenizer: Tokenizer, documents: Iterable, separated: bool = True, threads: int = 0) -> Iterator:
    """Tokenize documents (text, split, mark): yields ({split: ids of some}, the last one's mark), in their order.

    About half a megabyte of text at a time, each on a thread of its own: tokenizers leave Python while they work. threads:
    0 is one for each core. separated: with an end-of-text id before each document. A mark may be a function, which is called
    when the batch is full, before the next document is read.
    """

    local = threading.local()

    def own_tokenizer() -> None:  # tiktoken's is a third faster in the thread that used it first
        own = isinstance(tokenizer, BPETokenizer)
        local.tokenizer = tokenizer_from_dict(tokenizer.to_dict()) if own else tokenizer

    def encode(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        found = {split: local.tokenizer.encode_batch(texts) for split, texts in batch.items()}
        return (
            found if separated or tokenizer.eot is None else {k: ids[ids != tokenizer.eot] for k, ids in found.items()}
        )

    def batches():
        batch, size, mark = {}, 0, None
        for text, split, mark in documents:
            batch.setdefault(split, []).append(text)
            size += len(text)
            if size >= 2**19:
                yield batch, mark() if callable(mark) else mark
                batch, size = {}, 0
        if batch:
            yield batch, mark() if callable(mark) else mark

    threads = threads or cores()
    with ThreadPoolExecutor(threads, initializer=own_tokenizer) as pool:
        waiting = deque()
        for batch, mark in batches():
            waiting.append((pool.submit(encode, batch), mark))
            if len(waiting) > 2 * threads:
                encoded, mark = waiting.popleft()
                yield encoded.result(), mark
        while waiting:
            encoded, mark = waiting.popleft()
            yield encoded.result(), mark


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock on a file, for which other processes wait here. Where the system has none (Windows) nobody waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as f:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        yield


class DatasetWriter:
    """A dataset in the making. What an attempt with the same arguments left when it was interrupted is continued.

    progress.json says now and then how far the source was read and how many ids of it are in which file: what is written
    after that is written again, so no document is repeated or missing. name: of the shards, if not the folder's.
    """

    def __init__(
        self, folder: Path, arguments: dict, make_tokenizer: Callable[[], Tokenizer], overwrite: bool = False,
        name: str = "", shard_tokens: int = CHUNK, name_of: Callable[[str, int], str] | None = None,
    ):  # fmt: skip
        if not re.fullmatch(r"\w[\w.+-]*", folder.name):
            raise ValueError(f"--dataset={folder.name}: a name has letters, digits and _ . + - alone")
        check_free(folder, overwrite, name)
        self.final, self.name, self.shard_tokens = folder, name or folder.name, shard_tokens
        if (folder / "meta.json").exists():  # stays until the new one is whole
            folder = folder.with_name(folder.name + ".new")
        self.folder = folder
        self.arguments = json.loads(json.dumps(arguments))
        self.name_of = name_of or (lambda split, number: f"{self.name}_{split}_{number:06d}.npy")
        self.file, self.hashes = folder / "progress.json", folder / "documents.part"
        self.writers: dict[str, ShardWriter] = {}
        self.unique = Unique()
        state = {}
        if self.file.exists():
            try:
                state = json.loads(self.file.read_text(encoding="utf-8"))
                same = state["arguments"] == self.arguments
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.file} is damaged: remove {folder} to begin again") from None
            if same:
                return self.go_on(state)
        if not overwrite and (state or own_shards(folder, self.name)):
            raise ValueError(
                f"{folder} holds an unfinished dataset, of other settings: finish it with those, choose another --dataset, or "
                "--overwrite=True"
            )
        self.tokenizer = make_tokenizer()
        folder.mkdir(parents=True, exist_ok=True)
        self.sources: dict[str, dict] = {}
        self.hashes.unlink(missing_ok=True)
        self.save()
        self.clear()

    def go_on(self, state: dict) -> None:
        self.tokenizer, self.sources = tokenizer_from_dict(state["tokenizer"]), state["sources"]
        for split, found in state["splits"].items():
            self.writers[split] = self.writer(split, **found)
        self.clear()
        known = array.array("Q", self.hashes.read_bytes()[: 8 * state["documents"]] if self.hashes.exists() else b"")
        for number in known:
            self.unique.add(number)
        self.hashes.write_bytes(known.tobytes())
        self.unique.fresh = array.array("Q")
        print(f"{self.folder}: going on after {self.tokens:,} tokens")

    def clear(self) -> None:
        """Remove shards that are not of what was written so far."""
        known = {s["file"] for w in self.writers.values() for s in w.shards}
        known |= {w.paths()[1].name for w in self.writers.values() if w.filled}
        for path in own_shards(self.folder, self.name):
            if path.name not in known:
                path.unlink()

    def discard(self) -> None:
        """Remove all that was written."""
        for path in (self.file, self.hashes, *own_shards(self.folder, self.name)):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def writer(self, split: str, **found) -> ShardWriter:
        def name_of(number: int) -> str:
            return self.name_of(split, number)

        return ShardWriter(self.folder, name_of, self.tokenizer.n_vocab, self.shard_tokens, **found)

    @property
    def tokens(self) -> int:
        return sum(w.tokens for w in self.writers.values())

    def save(self, documents: int = 0) -> None:
        """Make what was written so far a place to go on from. documents: how many of those remembered are in it."""
        if self.unique.fresh:
            with writing(self.hashes), open(self.hashes, "ab") as f:
                self.unique.fresh.tofile(f)
                f.flush()
                os.fsync(f.fileno())
            self.unique.fresh = array.array("Q")
        for writer in self.writers.values():
            writer.sync()
        state = {
            "arguments": self.arguments,
            "tokenizer": self.tokenizer.to_dict(),
            "sources": self.sources,
            "splits": {split: {"shards": w.shards, "filled": w.filled} for split, w in self.writers.items()},
            "documents": documents,
        }
        atomic_write(self.file, json.dumps(state))

    def write(
        self, source: Source, split: str | Callable[[str], str], key: str = "", max_tokens: int = 0,
        unique: bool = False, separated: bool = True,
    ) -> None:  # fmt: skip
        """Write the documents of a source to a split, or each to the one that split(text) says. See encode_documents.

        key: names the source, if there are several. max_tokens: in the whole dataset, 0: all. unique: without a document
        that came before.
        """
        so_far = self.sources.setdefault(key or str(split), {"position": None, "done": False})
        if so_far["done"]:
            return

        def documents():
            for text, behind in source(so_far["position"]):
                if unique and not self.unique.add(document_hash(text)):
                    continue
                where = split if isinstance(split, str) else split(text)
                count = self.unique.count
                yield text, where, lambda b=behind, n=count: (b() if callable(b) else b, n)

        clock, begin, saved, shards, count = time.perf_counter(), self.tokens, time.perf_counter(), 0, self.unique.count
        for encoded, (position, count) in encode_documents(self.tokenizer, documents(), separated):
            room, size = max_tokens - self.tokens, sum(map(len, encoded.values()))
            for where, ids in encoded.items():
                if where not in self.writers:
                    self.writers[where] = self.writer(where)
                writer, before = self.writers[where], len(self.writers[where].shards)
                writer.add(ids if not max_tokens or size <= room else ids[: len(ids) * room // size])
                for shard in writer.shards[before:]:
                    speed = (self.tokens - begin) / (time.perf_counter() - clock) / 1e6
                    print(f"{shard['file']}  {self.tokens:,} tokens  {speed:.2f}M tokens/s")
                    shards += 1
            so_far["position"] = position
            if shards or time.perf_counter() - saved > 10:
                self.save(count)
                saved, shards = time.perf_counter(), 0
            if max_tokens and size >= room:
                break
        so_far["done"] = True
        self.save(count)

    def finish(self, source: str) -> dict[str, int]:
        """Write meta.json, which makes the folder a dataset. Returns the tokens by split."""
        for writer in self.writers.values():
            writer.finish()
        found = [shard for writer in self.writers.values() for shard in writer.shards]
        of_split = {s: re.compile(rf"_{s}_\d+\.npy$") for s in ("train", "val")}
        shards = {s: [x for x in found if of_split[s].search(x["file"])] for s in of_split}
        tokens = {split: sum(s["tokens"] for s in each) for split, each in shards.items()}
        meta = {
            "source": source,
            "tokenizer": self.tokenizer.to_dict(),
            "vocab_size": self.tokenizer.n_vocab,
            "dtype": "uint16" if self.tokenizer.n_vocab <= 2**16 else "uint32",
            "tokens": tokens,
            "shards": shards,
            "arguments": self.arguments,
        }
        if meta["tokenizer"]["kind"] == "bpe":
            atomic_write(self.folder / "tokenizer.json", self.tokenizer.to_json())
        atomic_write(self.folder / "meta.json", json.dumps(meta, indent=1))
        self.file.unlink()
        self.hashes.unlink(missing_ok=True)
        if self.folder != self.final:  # in the place of the old one, meta.json first away and last there
            for old in ("meta.json", "tokenizer.json"):
                (self.final / old).unlink(missing_ok=True)
            for old in own_shards(self.final, self.name):
                old.unlink()
            for new in sorted(self.folder.iterdir(), key=lambda p: p.name == "meta.json"):
                os.replace(new, self.final / new.name)
            self.folder.rmdir()
        return tokens


def own_shards(folder: Path, name: str = "") -> set[Path]:
    found = folder.glob(f"{name or folder.name}_*.npy*")
    return {p for p in found if re.search(r"_(train|val)_\d{6}\.npy(\.part)?$", p.name)}


def check_free(folder: Path, overwrite: bool, name: str = "") -> None:
    """Raises ValueError if the folder holds a dataset that may not be replaced: ours without overwrite, or a foreign one.

    name: of its shards, if not the folder's.
    """
    foreign = {*folder.glob("*.npy"), *folder.glob("*.bin")} - own_shards(folder, name)
    if foreign:
        raise ValueError(f"{folder} holds {min(foreign).name}, which is not ours to replace: choose another --dataset")
    if (folder / "meta.json").exists() and not overwrite:
        raise ValueError(f"{folder} holds a dataset already: choose another --dataset, or --overwrite=True")


def is_made(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds a dataset made with these arguments; says so."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    if meta.get("arguments") != json.loads(json.dumps(arguments)):
        return False
    print(f"{folder} is there already, with these settings: nothing to do (--overwrite=True makes it again)")
    return True


def check_room(folder: Path, need: float, advice: str = "") -> None:
    """Raises ValueError if the disk under a folder, which need not exist, has not room for so many bytes."""
    there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        need, free = need / 2**20, free / 2**20
        raise ValueError(f"{folder}: about {need:,.0f} MiB are to be written, {free:,.0f} MiB are free{advice}")


def open_stream(name: str, where: str = "", /, **options):
    """The rows of a corpus as a stream of `datasets`; name: a hub id, or parquet or json with data_files.

    Nothing is fetched but what is read, and no code of the corpus is run. Raises ValueError if it cannot be had. where: the
    corpus as errors name it.
    """
    import datasets
    import requests

    datasets.disable_progress_bars()
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
    if not offline and "hf:" in str(options.get("data_files", "hf:")):
        try:  # the hub's own client would try for a minute
            requests.head(os.environ.get("HF_ENDPOINT", HUB), timeout=20)
        except requests.RequestException as e:
            raise ValueError(
                f"{where or name} cannot be read: there is no way to the hub ({type(e).__name__})"
            ) from None
    try:
        return datasets.load_dataset(name, streaming=True, **options)
    except Exception as e:
        raise ValueError(
            f"{where or name} cannot be read ({first_line(e)}); started again, this goes on where it stopped"
        ) from None


def stream_rows(stream, where: str, state=None) -> Iterator[dict]:
    """The rows of a stream, from a state on that stream.state_dict() gave. Raises ValueError if it breaks off."""
    if state:
        stream.load_state_dict(state)
    rows = iter(stream)
    while True:
        try:
            row = next(rows, None)
        except Exception as e:
            raise ValueError(f"{where}: {first_line(e)}; started again, this goes on where it stopped") from None
        if row is None:
            return
        yield row


def text_of(row: dict, field: str, where: str) -> str:
    """The text of a row. Raises ValueError if it has none under this key."""
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: there is no text under {field!r}, only {keys}: set --text_field")
    return text.encode("utf-8", errors="replace").decode("utf-8")  # JSON may hold half a character


def split_text(path: Path, byte: int = 0) -> Iterator[tuple[str, int]]:
    """The documents of a text file from a byte on, separated by EOT, each with the byte behind it.

    White space around a document is dropped, and so is a document of nothing else. One of more than LONGEST bytes comes as
    several. Raises ValueError if it is not UTF-8.
    """
    mark, rest, begin = EOT.encode(), b"", byte

    def parts(document: bytes, ended: bool) -> Iterator[bytes]:
        """The document, or of a long one the parts that are sure by now."""
        while len(document) > LONGEST + len(mark):
            end = max(document.rfind(c, 0, LONGEST) for c in (b"\n", b" ")) + 1 or LONGEST
            while document[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            yield document[:end]
            document = document[end:]
        if ended:
            yield document

    with open(path, "rb") as f:
        f.seek(byte)
        while True:
            block = f.read(1 << 20)
            *whole, rest = (rest + block).split(mark)
            for n, document in enumerate([*whole, rest]):
                ended = n < len(whole) or not block
                size = 0
                for part in parts(document, ended):
                    size += len(part)
                    behind = begin + size + (len(mark) if ended and size == len(document) else 0)
                    try:
                        text = part.decode("utf-8").strip()
                    except UnicodeDecodeError as e:
                        raise not_utf8(path, begin + size - len(part) + e.start, part[e.start]) from None
                    if text:
                        yield text, behind
                begin += size + (len(mark) if ended else 0)
                rest = document[size:]
            if not block:
                return


def not_utf8(path: Path, place: int, byte: int) -> ValueError:
    return ValueError(f"{path} is not UTF-8 text: byte {place} is {byte:#04x}; convert it")


def download(url: str, path: Path, sha256: str = "") -> None:
    """Fetch a file, which appears under its name when it is whole; what an interrupted attempt left is continued.

    An attempt that fails is repeated after 1, 2, 4, ... seconds, six times without progress at most. Raises ValueError
    for what repeating does not mend, and then: what is there so far stays, and the same command goes on with it.
    $HF_ENDPOINT, a mirror of the Hugging Face hub, is asked instead of the hub.
    """
    import requests
    from tqdm import tqdm

    url = url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures, total = path.with_name(path.name + ".part"), 0, None
    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        reason, wait = "", 2.0**failures
        try:
            with requests.get(url, stream=True, headers=headers, timeout=(20, 60)) as r:
                if r.status_code == 416 and have:  # nothing behind what is there
                    total = int(r.headers.get("Content-Range", "").rpartition("/")[2] or -1)
                elif r.status_code in (408, 429) or r.status_code >= 500:
                    reason = f"{r.status_code} {r.reason}"
                    asked = r.headers.get("Retry-After", "").strip()  # seconds, or a date
                    wait = max(wait, min(60.0, float(asked) if asked.isdigit() else 0.0))
                elif r.status_code not in (200, 206):
                    raise ValueError(f"{url}: {r.status_code} {r.reason}")
                else:
                    have = have if r.status_code == 206 else 0  # a server that knows no ranges begins again
                    length = r.headers.get("Content-Length")
                    total = have + int(length) if length else None
                    free = shutil.disk_usage(path.parent).free
                    if total and total - have > free:
                        need = (total - have) / 2**20
                        raise ValueError(f"{path}: {need:,.0f} MiB are still to come, {free / 2**20:,.0f} MiB are free")
                    bar = tqdm(desc=path.name, total=total, initial=have, unit="B", unit_scale=True, disable=None)
                    with writing(part), open(part, "ab" if have else "wb") as f, bar:
                        for block in r.iter_content(1 << 16):
                            f.write(block)
                            bar.update(len(block))
                            failures = 0
        except requests.RequestException as e:
            reason = type(e).__name__
        size = part.stat().st_size if part.exists() else 0
        if not reason and total in (None, size):
            break
        if total is not None and size > total:  # of another file
            part.unlink()
        failures += 1
        if failures == 6:
            raise ValueError(
                f"{url}: {reason or 'it ends too early'}, six times; the same command goes on from {size:,} bytes"
            )
        print(f"{path.name}: {reason or 'it ended too early'} at {size:,} bytes, trying again in {wait:.0f} s")
        time.sleep(wait)
    if sha256 and file_sha256(part) != sha256:
        part.unlink()
        raise ValueError(f"{url}: what came is not the file that is known by this name (sha256)")
    os.replace(part, path)
