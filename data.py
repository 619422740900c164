"""Text and tokens: tokenizers, the writer and the readers of token shards, and the order of batches.

A dataset is a folder of 1-D token arrays, one or more files a split, read as memory maps:

    ours            {name}_{train|val}_{000000}.npy, uint16 (uint32 past 65,535 ids), and meta.json
    nanoGPT         train.bin, val.bin, bare uint16, and for characters meta.pkl
    build-nanogpt   {name}_{train|val}_{000000}.npy
    llm.c, modded-nanogpt   {name}_{train|val}_{000000}.bin, behind a header of 256 int32
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SHA256 = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"  # of its 50,256 tokens, a line each
VERIFIED_TOKENS = 50_000_000  # a dataset smaller than this is checked in a fraction of a second
SAMPLE_CHARACTERS = 50_000_000  # what a bpe tokenizer is trained on at most
CHUNK = 100_000_000  # tokens shuffled at a time: a longer file is read as several, so that memory stays flat

# -----------------------------------------------------------------------------
# Tokenizers: encode(text, special) -> list of ids, decode(ids) -> text, token_bytes(id), n_vocab, eot, to_dict()


class CharTokenizer:
    """One id a character of the given alphabet, in its order; with eot=True an end-of-text id behind them."""

    def __init__(self, chars: str, eot: bool = False):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.eot = len(chars) if eot else None
        self.n_vocab = len(chars) + eot

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises ValueError for a character that is not in the alphabet. special: EOT in the text is the eot id."""
        if special and self.eot is not None and EOT in text:
            parts = [self.encode(part) for part in text.split(EOT)]
            return [i for n, part in enumerate(parts) for i in ([self.eot] if n else []) + part]
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(
                f"character {e.args[0]!r} is not among the {len(self.chars)} this tokenizer knows: {self.chars!r}"
            ) from None

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        """The ids of all texts one after the other, int32, each behind an end-of-text id if there is one."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        table = np.full(max(map(ord, self.chars), default=0) + 2, -1, np.int32)
        table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
        ids = table[np.minimum(codes, len(table) - 1)]
        if len(ids) and ids.min() < 0:
            self.encode(chr(codes[ids.argmin()]))  # raises
        if self.eot is None:
            return ids
        return np.insert(ids, np.cumsum([0, *map(len, texts[:-1])]), self.eot)

    def token_bytes(self, i: int) -> bytes:
        return (EOT if i == self.eot else self.chars[i]).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(EOT if i == self.eot else self.chars[i] for i in ids)

    def to_dict(self) -> dict:
        return {"kind": "char", "chars": self.chars, "eot": self.eot is not None}


class BPETokenizer:
    """A byte-level vocabulary, run by tiktoken: tokens[i] are the bytes of id i, the lower id merged first; eot is last.

    A piece of the pattern that is itself a token is taken whole; merges build the others, from single bytes.
    """

    def __init__(self, kind: str, pattern: str, tokens: list[bytes]):
        import tiktoken

        if missing := 256 - sum(len(t) == 1 for t in tokens):
            raise ValueError(f"a byte-level vocabulary holds all 256 bytes; {missing} are missing")
        self.kind, self.pattern, self.tokens = kind, pattern, tokens
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1
        ranks = {t: i for i, t in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special: EOT in the text is the eot id; otherwise it is ordinary text."""
        return self.encoding.encode(text, allowed_special={EOT}) if special else self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        """The ids of all texts one after the other, uint32, each behind an end-of-text id."""
        if any(EOT in text for text in texts):  # where it is ordinary text
            return np.array([i for text in texts for i in (self.eot, *self.encode(text))], np.uint32)
        return self.encoding.encode_to_numpy(EOT + EOT.join(texts), allowed_special={EOT})

    def token_bytes(self, i: int) -> bytes:
        return EOT.encode() if i == self.eot else self.tokens[i]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        return {"kind": self.kind, "pattern": self.pattern, "tokens": [t.decode("latin-1") for t in self.tokens]}


class PretrainedTokenizer:
    """The tokenizer.json of a pretrained model, run by the tokenizers library. eot: its end-of-text token, or None."""

    def __init__(self, text: str, eot: str | None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError("a pretrained tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
        self.text, self.eot_token = text, eot
        self.library = Tokenizer.from_str(text)
        vocab = self.library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values()) + 1
        self.eot = vocab.get(eot)
        self.special = {t["id"] for t in json.loads(text)["added_tokens"]}
        self.to_byte = byte_of_symbol() if '"ByteLevel"' in text else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special: special tokens in the text are theirs, and those the model begins with are put in front."""
        self.library.encode_special_tokens = not special
        return self.library.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        """The ids of all texts one after the other, int64, each behind an end-of-text id."""
        self.library.encode_special_tokens = True
        encoded = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([part for e in encoded for part in ([self.eot], e.ids)]).astype(np.int64)

    def token_bytes(self, i: int) -> bytes:
        token = self.library.id_to_token(i) or ""
        if i in self.special:
            return token.encode()
        if self.to_byte:
            return bytes(self.to_byte[c] for c in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        return {"kind": "pretrained", "json": self.text, "eot": self.eot_token}


Tokenizer = CharTokenizer | BPETokenizer | PretrainedTokenizer


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's vocabulary, 50,257 ids, downloaded once by tiktoken. Raises ValueError if it cannot be had."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise ValueError(
            f"the GPT-2 vocabulary could not be downloaded ({type(e).__name__}): go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or choose --tokenizer=char"
        ) from None
    return BPETokenizer("gpt2", encoding._pat_str, [encoding.decode_single_token_bytes(i) for i in range(50256)])


def word_tokenizer(text: str, vocab_size: int) -> BPETokenizer:
    """A vocabulary of the commonest pieces of a text, each whole, over the 256 bytes that spell everything else."""
    import regex

    count = Counter(regex.findall(GPT2_PATTERN, text))
    if vocab_size < 257:
        raise ValueError(f"--vocab_size={vocab_size}: the 256 bytes and the end-of-text token need 257")
    pieces = [p.encode() for p, _ in sorted(count.items(), key=lambda item: (-item[1], item[0])) if len(p.encode()) > 1]
    return BPETokenizer("bpe", GPT2_PATTERN, [bytes([b]) for b in range(256)] + pieces[: vocab_size - 257])


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-pair encoding (https://arxiv.org/abs/1508.07909) of vocab_size ids, end-of-text among them, from texts.

    Raises ValueError for no text, a vocabulary under 257, or a text too small for the vocabulary asked.
    """
    if vocab_size < 257:
        raise ValueError(f"--vocab_size={vocab_size}: the 256 bytes and the end-of-text token need 257")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ImportError("training a tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    empty = True

    def counted():
        nonlocal empty
        for text in texts:
            empty = empty and not text.strip()
            yield text

    bpe.train_from_iterator(counted(), trainer)
    if empty:
        raise ValueError("there is no text to train a tokenizer on")
    if bpe.get_vocab_size() < vocab_size - 1:
        most = bpe.get_vocab_size() + 1
        raise ValueError(f"--vocab_size={vocab_size} is more than this text supports: at most {most}")
    to_byte = byte_of_symbol()
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return BPETokenizer("bpe", GPT2_PATTERN, [bytes(to_byte[c] for c in symbols) for symbols, _ in vocab])


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable symbol for each byte, inverted: 188 bytes are their own character, the rest follow from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(b): b for b in own}
    return symbols | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(own)))}


def tokenizer_from_dict(d: dict) -> Tokenizer:
    """The tokenizer that to_dict described. Raises ValueError for a kind that is none of ours."""
    if d.get("kind") == "char":
        return CharTokenizer(d["chars"], d["eot"])
    if d.get("kind") == "gpt2" and "tokens" not in d:  # foreign files name it at most
        return gpt2_tokenizer()
    if d.get("kind") in ("gpt2", "bpe"):
        return BPETokenizer(d["kind"], d["pattern"], [t.encode("latin-1") for t in d["tokens"]])
    if d.get("kind") == "pretrained":
        return PretrainedTokenizer(d["json"], d["eot"])
    raise ValueError(f"unknown tokenizer kind {d.get('kind')!r}")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a pretrained model's folder. Byte-level BPE on GPT-2's pattern becomes a BPETokenizer.

    Raises ValueError if there is none or it is damaged.
    """
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        found = json.loads(text)
        model, added = found["model"], [t["content"] for t in found["added_tokens"]]
        eot = EOT if EOT in added else None
        if (folder / "tokenizer_config.json").exists():
            eos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token") or eot
            eot = eos["content"] if isinstance(eos, dict) else eos
        ordinary = {t: i for t, i in model["vocab"].items() if t not in added}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no tokenizer.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {e}") from None
    split = found.get("pre_tokenizer") or {}
    classic = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    ids = [ordinary.get(a + b, -1) for a, b in merges]
    in_order = ids == sorted(ids) and sorted(ordinary.values()) == list(range(len(ordinary)))
    if classic and in_order and found.get("normalizer") is None and added == [EOT]:
        to_byte = byte_of_symbol()
        tokens = [bytes(to_byte[c] for c in t) for t in sorted(ordinary, key=ordinary.get)]
        digest = hashlib.sha256(b"\n".join(tokens)).hexdigest()
        return BPETokenizer("gpt2" if digest == GPT2_SHA256 else "bpe", GPT2_PATTERN, tokens)
    try:
        return PretrainedTokenizer(text, eot)
    except Exception as e:
        if isinstance(e, ImportError):
            raise
        raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {e}") from None


def learn_tokenizer(kind: str, vocab_size: int, texts: Callable, train: Callable | None = None, eot=True) -> Tokenizer:
    """The tokenizer of a --tokenizer key, learned from texts() where it is char or bpe.

    A char alphabet has every character of all texts, so that validation can be encoded; bpe sees train() alone, and of
    that the first SAMPLE_CHARACTERS. Raises ValueError for another name.
    """
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "char":
        chars = set()
        for text in texts():
            chars.update(text)
        return CharTokenizer("".join(sorted(chars)), eot)
    if kind == "bpe":
        return train_bpe(first_characters((train or texts)()), vocab_size)
    if Path(kind).is_dir() or "/" in kind:
        from model import download_pretrained

        made = read_tokenizer(Path(kind) if Path(kind).is_dir() else download_pretrained(kind))
        if made.eot is None:
            raise ValueError(f"--tokenizer={kind}: it has no end-of-text token to separate documents")
        return made
    raise ValueError(f"--tokenizer={kind}: choose gpt2, char, bpe, or a folder with a tokenizer.json")


def first_characters(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


# -----------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def writing(path):
    """An error of the disk names the file, as it does where a file is opened."""
    try:
        yield
    except OSError as e:
        if e.errno and not e.filename:
            raise OSError(e.errno, f"{e.strerror}; make room, and the same command goes on", str(path)) from None
        raise


def atomic_write(path: Path, data: str | bytes) -> None:
    """The whole file or the old one: written beside it under another name, synced, then renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with writing(path), open(part, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


class ShardWriter:
    """Token ids in shards {name}_{split}_{000000}.npy of shard_tokens each, the last one shorter.

    Ids go to the disk as they come; a shard appears under its name when it is whole, and in `shards` as {file, tokens,
    sha256}. split: its name, or a function of a shard's number, where one stream fills several. number_of: a shard's number
    by how many were before it, where several machines write one dataset.
    """

    HEADER = 128  # bytes, so that it can be written last, when the number of tokens is known

    def __init__(
        self, folder: Path, name: str, split, vocab_size: int, shard_tokens: int = CHUNK, shards=(), number_of=None
    ):
        self.folder, self.name, self.vocab_size, self.shard_tokens = folder, name, vocab_size, shard_tokens
        self.split_of = split if callable(split) else lambda number: split
        self.number_of = number_of or (lambda count: count)
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.shards, self.filled, self.file = list(shards), 0, None

    def path(self, count: int) -> Path:
        number = self.number_of(count)
        return self.folder / f"{self.name}_{self.split_of(number)}_{number:06d}.npy"

    def add(self, ids) -> Iterator[int]:
        """Write ids; yields, whenever a shard is whole, how many of them are in shards. Raises ValueError past the vocabulary."""
        ids, used = np.asarray(ids), 0
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token id {ids.max()} is outside the vocabulary of {self.vocab_size:,}")
        while used < len(ids):
            if self.file is None:
                part = self.path(len(self.shards))
                self.file = open(part.with_name(part.name + ".part"), "w+b")
                self.file.write(bytes(self.HEADER))
            take = min(len(ids) - used, self.shard_tokens - self.filled)
            with writing(self.file.name):
                self.file.write(ids[used : used + take].astype(self.dtype).tobytes())
            self.filled, used = self.filled + take, used + take
            if self.filled == self.shard_tokens:
                self.flush()
                yield used

    def flush(self) -> None:
        """End the shard that is being written, if there is one."""
        if self.file is None:
            return
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": (self.filled,)}).encode()
        magic = np.lib.format.magic(1, 0)
        header = magic + (self.HEADER - len(magic) - 2).to_bytes(2, "little") + text
        with writing(self.file.name):
            self.file.seek(0)
            self.file.write(header.ljust(self.HEADER - 1) + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        path = self.path(len(self.shards))
        part = path.with_name(path.name + ".part")
        self.shards.append({"file": path.name, "tokens": self.filled, "sha256": file_sha256(part)})
        os.replace(part, path)
        self.file, self.filled = None, 0


def write_shards(folder: Path, name: str, split: str, documents: Iterable, vocab_size: int, shard_tokens: int = CHUNK):
    """Write arrays of ids, taken one at a time, as shards; returns {file, tokens, sha256} of each. See ShardWriter."""
    writer = ShardWriter(folder, name, split, vocab_size, shard_tokens)
    for ids in documents:
        for _ in writer.add(ids):
            pass
    writer.flush()
    return writer.shards


# From a position (None: the start), documents, each with the position behind it or a function that tells it at that moment.
Source = Callable[[object], Iterable[tuple[object, str]]]


def split_text(path: Path, byte: int = 0) -> Iterator[tuple[int, str]]:
    """The documents of a text file from a byte on, separated by EOT, each with the byte behind it; a megabyte in memory.

    White space around a document is dropped, and so is a document of nothing else. Raises ValueError if it is not UTF-8.
    """
    mark, rest, begin = EOT.encode(), b"", byte
    with open(path, "rb") as f:
        f.seek(byte)
        while True:
            block = f.read(1 << 20)
            *whole, rest = (rest + block).split(mark)
            if not block:
                whole, rest = [rest], b""
            for document in whole:
                begin += len(document) + len(mark)
                try:
                    text = document.decode("utf-8").strip()
                except UnicodeDecodeError as e:
                    at = begin - len(document) - len(mark) + e.start
                    raise ValueError(
                        f"{path} is not UTF-8 text: byte {at} is {document[e.start]:#04x}; convert it"
                    ) from None
                if text:
                    yield begin, text
            if not block:
                return


def encode_documents(tokenizer: Tokenizer, source: Source, position=None, threads: int = 0, separated: bool = True):
    """The documents of a source as arrays of ids in their order: yields (position before, position behind, ids).

    About a megabyte of text at a time, each on a thread of its own: tokenizers leave Python while they work. separated:
    with an end-of-text id before each document.
    """

    def encode(texts):
        ids = tokenizer.encode_batch(texts)
        return ids if separated or tokenizer.eot is None else ids[ids != tokenizer.eot]

    if not threads:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def batches():
        before, behind, texts, size = position, position, [], 0
        for behind, text in source(position):
            texts.append(text)
            size += len(text)
            if size >= 2**19:
                behind = behind() if callable(behind) else behind
                yield before, behind, texts
                before, texts, size = behind, [], 0
        if texts:
            yield before, None, texts

    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for before, behind, texts in batches():
            waiting.append((before, behind, pool.submit(encode, texts)))
            if len(waiting) > 2 * threads:
                before, behind, ids = waiting.popleft()
                yield before, behind, ids.result()
        while waiting:
            before, behind, ids = waiting.popleft()
            yield before, behind, ids.result()


class DatasetWriter:
    """A dataset in the making. What an attempt with the same arguments left when it was interrupted is continued.

    progress.json says after each shard how far the source was read, so that no document is repeated or missing.
    """

    def __init__(
        self, folder: Path, arguments: dict, make_tokenizer: Callable, overwrite: bool = False, name: str = ""
    ):
        check_free(folder, overwrite, name)
        self.folder, self.name, self.arguments = folder, name or folder.name, json.loads(json.dumps(arguments))
        self.file = folder / "progress.json"
        self.state = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        if self.state.get("arguments") == self.arguments:
            self.tokenizer = tokenizer_from_dict(self.state["tokenizer"])
            done = sum(s["tokens"] for split in self.state["splits"].values() for s in split["shards"])
            print(f"{folder}: going on after {done:,} tokens")
            return
        self.tokenizer = make_tokenizer()
        start_dataset(folder, overwrite, name)
        self.state = {"arguments": self.arguments, "tokenizer": self.tokenizer.to_dict(), "splits": {}}
        self.save()

    def save(self) -> None:
        atomic_write(self.file, json.dumps(self.state))

    def write(
        self, split: str, source: Source, shard_tokens: int = CHUNK, max_tokens: int = 0, split_of=None, number_of=None,
        separated=True,
    ) -> None:  # fmt: skip
        """Write the documents of a source as a split, max_tokens of them at most (0: all). See encode_documents."""
        so_far = self.state["splits"].setdefault(split, {"shards": [], "position": None, "skip": 0, "done": False})
        if so_far["done"]:
            return
        writer = ShardWriter(
            self.folder, self.name, split_of or split, self.tokenizer.n_vocab, shard_tokens, so_far["shards"], number_of
        )
        written, skip = sum(s["tokens"] for s in writer.shards), so_far["skip"]
        begin, clock, total = written, time.perf_counter(), 0
        for before, _, ids in encode_documents(self.tokenizer, source, so_far["position"], separated=separated):
            fresh = ids[skip:]
            fresh = fresh[: max_tokens - written] if max_tokens else fresh
            for used in writer.add(fresh):
                so_far |= {"shards": writer.shards, "position": before, "skip": skip + used}
                self.save()
                total = written + used
                print(f"{writer.shards[-1]['file']}  {total:,} tokens  {rate(total - begin, clock)}")
            written, skip = written + len(fresh), 0
            if max_tokens and written >= max_tokens:
                break
        writer.flush()
        so_far |= {"shards": writer.shards, "done": True}
        self.save()

    def finish(self, source: str) -> dict[str, int]:
        """Write meta.json, which makes the folder a dataset. Returns the tokens by split."""
        shards = {"train": [], "val": []}
        for found in self.state["splits"].values():
            for shard in found["shards"]:
                shards["val" if "_val_" in shard["file"] else "train"].append(shard)
        finish_dataset(self.folder, self.tokenizer, shards, source, self.arguments)
        self.file.unlink()
        return {split: sum(s["tokens"] for s in found) for split, found in shards.items()}


def rate(tokens: int, since: float) -> str:
    return f"{tokens / max(time.perf_counter() - since, 1e-9) / 1e6:.2f}M tokens/s"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def start_dataset(folder: Path, overwrite: bool = False, name: str = "") -> None:
    """A folder to write shards to, cleared of what an interrupted attempt left. Raises ValueError if a dataset is there."""
    check_free(folder, overwrite, name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    for old in own_shards(folder, name):
        old.unlink()


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


def finish_dataset(
    folder: Path, tokenizer: Tokenizer, shards: dict[str, list[dict]], source: str, arguments: dict
) -> None:
    """Write meta.json, which makes the folder a dataset. shards: what write_shards returned, by split."""
    meta = {
        "source": source,
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.n_vocab,
        "dtype": "uint16" if tokenizer.n_vocab <= 2**16 else "uint32",
        "tokens": {split: sum(s["tokens"] for s in found) for split, found in shards.items()},
        "shards": shards,
        "arguments": arguments,
    }
    atomic_write(folder / "meta.json", json.dumps(meta, indent=1))


def download(url: str, path: Path, sha256: str = "") -> None:
    """Fetch a file, which appears under its name when it is whole; what an interrupted attempt left is continued.

    An attempt that fails is repeated after 1, 2, 4, ... seconds, six times without progress at most. Raises ValueError
    for what repeating does not mend, and then: what is there so far stays, and the same command goes on with it.
    """
    import requests
    from tqdm import tqdm

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
                    wait = max(wait, min(60.0, float(r.headers.get("Retry-After", "0").strip() or 0)))
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


# -----------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Shard:
    """`tokens` tokens of a file, from byte `offset`."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    def map(self) -> np.ndarray:
        """The tokens, read-only. Pages that a map touched stay resident as long as it lives: keep it short."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


HEADERS = {20240520: "uint16", 20240801: "uint32"}  # llm.c's magic numbers: GPT-2 and Llama 3 ids


def open_shard(path: Path) -> Shard:
    """Describe a token file of any of the four formats. Raises ValueError if it is truncated or not one."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        if path.suffix == ".npy":
            try:
                version = np.lib.format.read_magic(f)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(f)
            except (ValueError, EOFError):
                raise ValueError(f"{path} is damaged: it has no .npy header; make the dataset again") from None
            if len(shape) != 1 or dtype.kind not in "ui":
                raise ValueError(f"{path} holds {dtype} {shape}, not a row of token ids")
            shard = Shard(path, dtype.str, f.tell(), shape[0])
        else:
            header = np.frombuffer(f.read(12), "<i4")
            if len(header) == 3 and int(header[0]) in HEADERS:
                shard = Shard(path, HEADERS[int(header[0])], 1024, int(header[2]))
            else:
                shard = Shard(path, "uint16", 0, size // 2)
    expected = shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize
    if size != expected:
        raise ValueError(f"{path} is truncated: {size:,} bytes of {expected:,}; make the dataset again")
    if shard.tokens == 0:
        raise ValueError(f"{path} holds no tokens; make the dataset again")
    return shard


class PlainUnpickler(pickle.Unpickler):
    """Dicts, lists, strings and numbers need no class, so none is admitted, and nothing in the file can run."""

    def find_class(self, module, name):
        raise ValueError(f"meta.pkl asks for {module}.{name}: only plain dicts, lists, strings and numbers are read")


@dataclass
class Dataset:
    name: str
    train: list[Shard]
    val: list[Shard]
    tokenizer: dict | None  # as to_dict gives it; {"kind": "gpt2"} alone where the files do not say
    vocab_size: int


def load_dataset(name: str, data_dir: str | Path = "data", verify: bool = False) -> Dataset:
    """Find the shards of data_dir/name. Raises ValueError where they are missing or damaged, with the command that helps.

    The bytes are held against meta.json's sha256 if there are few of them, and with verify however many.
    """
    folder = Path(data_dir) / name
    if not folder.is_dir():
        raise ValueError(f"there is no dataset {folder}: {how_to_make(name)}")
    meta, splits = {}, {"train": [], "val": []}
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            listed = [
                (split, s["file"], s["tokens"], s["sha256"]) for split in splits for s in meta["shards"].get(split, [])
            ]
            tokenizer, vocab_size = meta["tokenizer"], int(meta["vocab_size"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / 'meta.json'} is damaged; make the dataset again") from None
        verify = verify or sum(tokens for _, _, tokens, _ in listed) < VERIFIED_TOKENS
        for split, file, tokens, sha256 in listed:
            if not (folder / file).exists():
                raise ValueError(f"{folder} lacks {file}, which meta.json lists; make the dataset again")
            shard = open_shard(folder / file)
            if shard.tokens != tokens:
                raise ValueError(f"{shard.path} holds {shard.tokens:,} tokens, meta.json says {tokens:,}")
            if verify and file_sha256(shard.path) != sha256:
                raise ValueError(f"{shard.path} is damaged: its sha256 is not meta.json's; make the dataset again")
            splits[split].append(shard)
    else:
        for path in sorted(folder.iterdir()):
            if match := re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:npy|bin)", path.name):
                splits[match[1]].append(open_shard(path))
    if not splits["train"]:
        raise ValueError(f"{folder} has no training tokens: {how_to_make(name)}")
    if not meta and (folder / "meta.pkl").exists():
        try:
            with open(folder / "meta.pkl", "rb") as f:
                pickled = PlainUnpickler(f).load()
            chars = "".join(pickled["itos"][i] for i in range(pickled["vocab_size"]))
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{folder / 'meta.pkl'} is not nanoGPT's: it lacks vocab_size and itos") from None
        tokenizer, vocab_size = CharTokenizer(chars).to_dict(), pickled["vocab_size"]
    elif not meta:
        tokenizer, vocab_size = {"kind": "gpt2"}, 50257
    return Dataset(name, splits["train"], splits["val"], tokenizer, vocab_size)


def how_to_make(name: str) -> str:
    """The command that makes a dataset of this name."""
    if name == "tinystories_synthetic":
        return "make it with python prepare_tinystories.py --synthetic=True"
    if name in ("tinystories", "tinystories_v2"):
        return "make it with python prepare_tinystories.py" + (" --version=v2" if name.endswith("_v2") else "")
    if name.startswith("edu_fineweb"):
        return "make it with python build_fineweb_shards.py"
    tokenizer = " --tokenizer=char" if name.endswith("_char") else ""
    return f"make it with python prepare_text.py --input=FILE --dataset={name}{tokenizer}, or choose another --dataset"


def cut(shards: list[Shard], fraction: float = 1.0, chunk: int = CHUNK) -> list[Shard]:
    """The first `fraction` of the tokens, in pieces of at most `chunk`."""
    left = round(sum(s.tokens for s in shards) * fraction)
    pieces = []
    for shard in shards:
        for start in range(0, min(shard.tokens, left), chunk):
            offset = shard.offset + start * np.dtype(shard.dtype).itemsize
            pieces.append(replace(shard, offset=offset, tokens=min(chunk, min(shard.tokens, left) - start)))
        left = max(0, left - shard.tokens)
    return pieces


# -----------------------------------------------------------------------------
# Batch order: a pure function of (seed, step)


class TrainingWindows:
    """The endless sequence of training windows of block_size + 1 tokens, each addressed by its number.

    An epoch visits every shard in a fresh order and in it every window of a grid, in a fresh order; the grid starts at
    a fresh offset each epoch, so that boundaries fall on other tokens. Window number i depends on the seed alone.
    Shards too short for a window are passed over; ValueError if all are.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int, seed: int = 1337, fraction: float = 1.0):
        if not 0 < fraction <= 1:
            raise ValueError(f"--data_fraction={fraction}: must be above 0 and at most 1")
        self.shards = [s for s in cut(shards, fraction) if s.tokens > block_size]
        if not self.shards:
            most = max((s.tokens for s in cut(shards, fraction)), default=0)
            raise ValueError(
                f"the training text of {most:,} tokens cannot fill a window of {block_size + 1:,}: "
                "lower --block_size or add text"
            )
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        # One window less than would fit leaves the grid room to move; it loses another place each epoch.
        self.counts = np.array([max(1, (s.tokens - 1) // block_size - 1) for s in self.shards])
        self.per_epoch = int(self.counts.sum())
        self._epochs: dict[int, tuple] = {}
        self._grids: dict[tuple, np.ndarray] = {}

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the number of windows up to the end of each."""
        if epoch not in self._epochs:
            shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
            self._epochs = {epoch: (shards, self.counts[shards].cumsum())}
        return self._epochs[epoch]

    def starts(self, epoch: int, shard: int) -> np.ndarray:
        """Start offsets of the windows of one shard in this epoch's order, int64 (counts[shard],)."""
        if (epoch, shard) not in self._grids:
            rng = np.random.default_rng((self.seed, epoch, shard))
            n, T = self.counts[shard], self.block_size
            offset = rng.integers(self.shards[shard].tokens - n * T)
            self._grids = {(epoch, shard): rng.permutation(n) * T + offset}
        return self._grids[epoch, shard]

    def locate(self, first: int, count: int) -> Iterator[tuple[Shard, np.ndarray]]:
        """Windows first .. first + count - 1 as (shard, start offsets), in order."""
        while count:
            epoch, i = divmod(first, self.per_epoch)
            shards, ends = self.order(epoch)
            place = int(np.searchsorted(ends, i, side="right"))
            shard = int(shards[place])
            local = i - int(ends[place] - self.counts[shard])
            take = min(count, int(self.counts[shard]) - local)
            yield self.shards[shard], self.starts(epoch, shard)[local : local + take]
            first, count = first + take, count - take

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (count, block_size) each. Raises ValueError for an id outside the vocabulary."""
        parts = [gather(shard, starts, self.block_size, self.vocab_size) for shard, starts in self.locate(first, count)]
        windows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


def gather(shard: Shard, starts: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """The windows of a shard that begin at `starts`, (len(starts), block_size + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(shard.map(), block_size + 1)[starts]
    if windows.max() >= vocab_size or windows.min() < 0:
        wrong = windows.max() if windows.max() >= vocab_size else windows.min()
        raise ValueError(f"{shard.path} holds token id {wrong}, past the vocabulary of {vocab_size:,}")
    return windows


def validation_windows(shards: list[Shard], block_size: int, limit: int = 0) -> list[tuple[Shard, int]]:
    """The fixed validation windows, as (shard, start offset): non-overlapping, in order, and with a limit that many of
    them, evenly spaced. They depend on the split and block_size alone. Raises ValueError if none fits.
    """
    grid = [(s, np.arange(0, s.tokens - block_size, block_size)) for s in cut(shards)]
    ends = np.cumsum([len(starts) for _, starts in grid])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        most = max((s.tokens for s in shards), default=0)
        raise ValueError(
            f"the validation text of {most:,} tokens cannot fill a window of {block_size + 1:,}: "
            "lower --block_size, or prepare the dataset with more text or a larger --val_fraction"
        )
    wanted = np.arange(total) if not limit or limit >= total else np.arange(limit) * total // limit
    places = np.searchsorted(ends, wanted, side="right")
    return [(grid[p][0], int(grid[p][1][w - ends[p]])) for p, w in zip(places, wanted)]


def validation_batches(
    windows: list[tuple[Shard, int]], block_size: int, vocab_size: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of the windows as inputs and targets, int64 (batch_size, block_size) each.

    Every batch has the same shape: what the last one lacks is filled with rows whose targets are -1.
    """
    for first in range(rank * batch_size, len(windows), world * batch_size):
        x = np.zeros((batch_size, block_size), np.int64)
        y = np.full((batch_size, block_size), -1, np.int64)
        row = 0
        for shard, group in itertools.groupby(windows[first : first + batch_size], key=lambda window: window[0]):
            found = gather(shard, np.array([start for _, start in group]), block_size, vocab_size)
            x[row : row + len(found)], y[row : row + len(found)] = found[:, :-1], found[:, 1:]
            row += len(found)
        yield x, y
