"""Token files: their writer and readers, and the order of batches.

A dataset is a folder of 1-D token arrays, one or more files per split, read as memory maps:

    ours            {name}_{train|val}_{000000}.npy, uint16 (uint32 past 65,536 ids), and meta.json
    nanoGPT         train.bin, val.bin, bare uint16, and for characters meta.pkl
    build-nanogpt   {name}_{train|val}_{000000}.npy
    llm.c, modded-nanogpt   {name}_{train|val}_{000000}.bin, after a header of 256 int32
"""

import hashlib
import io
import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.files import file_sha256, named_disk_errors, parse_json
from common.tokenizer import CharTokenizer, IdTokenizer, same_vocabulary
from configurator import UserError

VERIFIED_TOKENS = 50_000_000  # smaller datasets are always checked: it takes a fraction of a second
CHUNK = 100_000_000  # tokens shuffled at a time; a longer file is read as several, so that memory stays flat

# -----------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes token ids as shards of shard_tokens each; the last one is shorter. name_of: number -> file name.

    Ids go to NAME.part; a complete shard gets its name, and an entry {file, tokens, sha256} in `shards`. To resume an
    earlier writer, give its shards and `filled`, the number of ids in its unfinished shard.
    """

    HEADER = 128  # bytes reserved for the .npy header, which is written last, when the number of tokens is known

    def __init__(self, folder: Path, name_of: Callable, vocab_size: int, shard_tokens=CHUNK, shards=(), filled=0):
        self.folder, self.name_of, self.vocab_size, self.shard_tokens = folder, name_of, vocab_size, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.shards, self.filled, self.file = list(shards), filled, None
        if filled:
            path, part = self.paths()
            if path.exists():  # it was completed after `filled` was recorded
                os.replace(path, part)
            self.file = open(part, "r+b")
            self.file.truncate(self.HEADER + filled * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def paths(self) -> tuple[Path, Path]:
        path = self.folder / self.name_of(len(self.shards))
        return path, path.with_name(path.name + ".part")

    @property
    def tokens(self) -> int:
        return sum(s["tokens"] for s in self.shards) + self.filled

    def add(self, ids) -> None:
        """Write ids. Raises UserError for one outside the vocabulary."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"token id {ids.max()} is outside the vocabulary of {self.vocab_size:,}")
        while len(ids):
            if self.file is None:
                self.file = open(self.paths()[1], "w+b")
                self.file.write(bytes(self.HEADER))
            take = min(len(ids), self.shard_tokens - self.filled)
            with named_disk_errors(self.file.name):
                self.file.write(ids[:take].astype(self.dtype).tobytes())
            self.filled, ids = self.filled + take, ids[take:]
            if self.filled == self.shard_tokens:
                self.finish()

    def sync(self) -> None:
        if self.file:
            with named_disk_errors(self.file.name):
                self.file.flush()
                os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self.file is None:
            return
        fields = repr({"descr": self.dtype.str, "fortran_order": False, "shape": (self.filled,)})
        header = np.lib.format.magic(1, 0) + (self.HEADER - 10).to_bytes(2, "little") + fields.encode()
        with named_disk_errors(self.file.name):
            self.file.seek(0)
            self.file.write(header.ljust(self.HEADER - 1) + b"\n")
        self.sync()
        self.file.close()
        path, part = self.paths()
        self.shards.append({"file": path.name, "tokens": self.filled, "sha256": file_sha256(part)})
        os.replace(part, path)
        self.file, self.filled = None, 0


# -----------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Shard:
    path: Path
    dtype: str
    offset: int  # of the first token, in bytes
    tokens: int

    def map(self) -> np.ndarray:
        """The tokens, read-only. Pages stay resident as long as the map lives, so keep it briefly."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


HEADERS = {20240520: "uint16", 20240801: "uint32"}  # llm.c's magic numbers: GPT-2 and Llama 3 ids


def open_shard(path: Path) -> Shard:
    """Describe a token file of any of the four formats. Raises UserError if it is truncated or not a token file."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
        except OSError:
            raise
        except Exception:  # numpy parses the header as Python
            raise UserError(f"{path} is truncated or damaged; make the dataset again") from None
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise UserError(f"{path} holds {array.dtype} {array.shape}, not a row of token ids")
        shard = Shard(path, array.dtype.str, array.offset, len(array))
    else:
        magic, _, tokens = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
        in_header = magic in HEADERS
        shard = Shard(path, HEADERS[magic], 1024, tokens) if in_header else Shard(path, "uint16", 0, size // 2)
    expected = shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize
    if size != expected:
        raise UserError(f"{path} is truncated: {size:,} bytes of {expected:,}; make the dataset again")
    if shard.tokens == 0:
        raise UserError(f"{path} holds no tokens; make the dataset again")
    return shard


class PlainUnpickler(pickle.Unpickler):
    # Without a class nothing in the file can run.
    def find_class(self, module, name):
        raise UserError(f"meta.pkl asks for {module}.{name}: only plain dicts, lists, strings and numbers are read")


@dataclass
class Dataset:
    name: str
    train: list[Shard]
    val: list[Shard]
    tokenizer: dict  # as to_dict gives it; {"kind": "gpt2"} alone where the files do not say
    vocab_size: int
    sha256: str = ""  # of all its shards' hashes; of large files of other projects, of their sizes and ends
    is_chat: bool = False  # conversations as prepare_text.py --source=chat writes them, each exchange a document


def load_dataset(name: str, data_dir: str | Path = "data", verify: bool = False) -> Dataset:
    """Find the shards of data_dir/name. Raises UserError if they are missing or damaged; verify: check every sha256."""
    folder = Path(data_dir) / name
    meta_file, pickle_file = folder / "meta.json", folder / "meta.pkl"
    if not folder.is_dir():
        raise UserError(f"there is no dataset {folder}: {how_to_make(name)}")
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    tokenizer, vocab_size, is_chat = {"kind": "gpt2"}, 50257, False
    if meta_file.exists():
        try:
            meta = parse_json(meta_file.read_text(encoding="utf-8"))
            listed = [(split, shard) for split in splits for shard in meta["shards"].get(split, [])]
            listed = [(split, shard["file"], shard["tokens"], shard["sha256"]) for split, shard in listed]
            tokenizer, vocab_size = dict(meta["tokenizer"]), int(meta["vocab_size"])
            is_chat = meta.get("arguments", {}).get("source") == "chat"
            wrong = [file for _, file, tokens, _ in listed if Path(file).name != file or type(tokens) is not int]
            if wrong or not 0 < vocab_size <= 2**32 or "kind" not in tokenizer:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{meta_file} is damaged; make the dataset again") from None
        verify = verify or sum(tokens for _, _, tokens, _ in listed) < VERIFIED_TOKENS
        for split, file, tokens, sha256 in listed:
            if not (folder / file).exists():
                raise UserError(f"{folder} lacks {file}, which meta.json lists; make the dataset again")
            shard = open_shard(folder / file)
            if shard.tokens != tokens:
                raise UserError(f"{shard.path} holds {shard.tokens:,} tokens, meta.json says {tokens:,}")
            if verify and file_sha256(shard.path) != sha256:
                raise UserError(f"{shard.path} is damaged: its sha256 is not meta.json's; make the dataset again")
            splits[split].append(shard)
        hashes = [sha256 for *_, sha256 in listed]
    else:
        for path in sorted(folder.iterdir()):
            if match := re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:npy|bin)", path.name):
                splits[match[1]].append(open_shard(path))
        if pickle_file.exists():
            try:
                pickled = PlainUnpickler(io.BytesIO(pickle_file.read_bytes())).load()
                vocab_size = int(pickled["vocab_size"])
                if vocab_size < 1:
                    raise ValueError
                symbols = [pickled["itos"][i] for i in range(vocab_size)] if "itos" in pickled else []
                if not all(isinstance(symbol, str) for symbol in symbols) or not symbols:  # no language: numbers
                    tokenizer = IdTokenizer(vocab_size).to_dict()
                elif all(len(symbol) == 1 for symbol in symbols):
                    tokenizer = CharTokenizer("".join(symbols)).to_dict()
                else:
                    tokenizer = CharTokenizer(symbols).to_dict()
            except UserError:
                raise
            except Exception:  # a pickle of nonsense can raise anything
                raise UserError(f"{pickle_file} is not nanoGPT's: it lacks vocab_size, or tokens in itos") from None
        hashes = [fingerprint(shard) for shard in splits["train"] + splits["val"]]
    if not splits["train"]:
        raise UserError(f"{folder} has no training tokens: {how_to_make(name)}")
    sha256 = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return Dataset(name, splits["train"], splits["val"], tokenizer, vocab_size, sha256, is_chat)


def fingerprint(shard: Shard) -> str:
    """The sha256 of a file; of a large one, which would take seconds to read, its size and both ends."""
    if shard.tokens < VERIFIED_TOKENS:
        return file_sha256(shard.path)
    tokens = shard.map()
    return f"{shard.tokens} {tokens[:1000].tolist()} {tokens[-1000:].tolist()}"


def load_mixture(names: str, data_dir: str | Path = "data", verify: bool = False) -> list[tuple[Dataset, float]]:
    """The datasets of a --dataset key like "tinystories:0.7,chat:0.3" and their weights, which then sum to 1."""
    weights: dict[str, float] = {}
    for name, _, text in (part.partition(":") for part in names.split(",")):
        if not name:
            raise UserError(f"--dataset={names}: a name is missing")
        if name in weights:
            raise UserError(f"--dataset={names}: {name} is named twice")
        try:
            weights[name] = float(text or 1)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] < float("inf"):
            raise UserError(f"--dataset={names}: the weight of {name} must be a number above 0, not {text!r}")
    datasets = [load_dataset(name, data_dir, verify) for name in weights]
    for dataset in datasets:
        if not same_vocabulary(dataset.tokenizer, datasets[0].tokenizer):
            raise UserError(f"--dataset={names}: {datasets[0].name} and {dataset.name} have different vocabularies")
    return [(dataset, weights[dataset.name] / sum(weights.values())) for dataset in datasets]


def how_to_make(name: str) -> str:
    own_text = f"prepare_text.py --inputs=FILE --dataset={name}"
    commands = {  # the first pattern that matches counts
        "tinystories": "prepare_tinystories.py",
        "tinystories_v2": "prepare_tinystories.py --version=v2",
        "tinystories_synthetic": "prepare_tinystories.py --synthetic=True",
        "edu_fineweb.*": "build_fineweb_shards.py",
        "fineweb(edu)?10+B": f"build_fineweb_shards.py --pretokenized={name}",
        "chat|shakespeare|openwebtext": f"prepare_text.py --source={name}",
        "shakespeare_char": f"prepare_text.py --source=shakespeare --dataset={name} --tokenizer=char",
        ".*_char": f"{own_text} --tokenizer=char, or choose another --dataset",
        ".*": f"{own_text}, or choose another --dataset",
    }
    return "make it with python " + next(c for pattern, c in commands.items() if re.fullmatch(pattern, name, re.DOTALL))


def split_shards(shards: list[Shard], fraction: float = 1.0, chunk: int = CHUNK) -> list[Shard]:
    """The first `fraction` of the tokens, as pieces of at most `chunk` tokens."""
    left = round(sum(s.tokens for s in shards) * fraction)
    pieces = []
    for shard in shards:
        for start in range(0, min(shard.tokens, left), chunk):
            offset = shard.offset + start * np.dtype(shard.dtype).itemsize
            pieces.append(replace(shard, offset=offset, tokens=min(chunk, min(shard.tokens, left) - start)))
        left = max(0, left - shard.tokens)
    return pieces


# -----------------------------------------------------------------------------
# Batch order: a pure function of the seed and the number of sequences seen


class TrainingWindows:
    """The endless sequence of training windows of block_size + 1 tokens. Window i depends on the seed and i alone.

    Each epoch visits the shards, and the windows of a grid in each shard, in a new random order. The grid shifts by a
    random offset each epoch, so window boundaries fall on new tokens every time. Too short shards are skipped.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int, seed: int = 1337, fraction: float = 1.0):
        if not 0 < fraction <= 1:
            raise UserError(f"--data_fraction={fraction}: must be above 0 and at most 1")
        self.shards = [s for s in split_shards(shards, fraction) if s.tokens > block_size]
        if not self.shards:
            advice = "lower --block_size or add text"
            raise UserError(f"the training text cannot fill a window of {block_size + 1:,} tokens: {advice}")
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        # One window less than would fit leaves room for the random offset.
        self.counts = np.array([max(1, (s.tokens - 1) // block_size - 1) for s in self.shards])
        self.per_epoch = int(self.counts.sum())
        self.order, self.starts = lru_cache(1)(self.order), lru_cache(1)(self.starts)  # of the latest epoch and shard

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, and the cumulative number of windows after each."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        return shards, self.counts[shards].cumsum()

    def starts(self, epoch: int, shard: int) -> np.ndarray:
        """Start offsets of the windows of one shard in this epoch's order, int64 (counts[shard],)."""
        rng = np.random.default_rng((self.seed, epoch, shard))
        n, T = self.counts[shard], self.block_size
        offset = rng.integers(self.shards[shard].tokens - n * T)
        return rng.permutation(n) * T + offset

    def locate(self, first: int, count: int) -> Iterator[tuple[Shard, np.ndarray]]:
        """Windows first .. first + count - 1 as (shard, start offsets), in order."""
        while count:
            epoch, i = divmod(first, self.per_epoch)
            shards, ends = self.order(epoch)
            at = int(np.searchsorted(ends, i, side="right"))
            shard, left = int(shards[at]), int(ends[at]) - i
            n, local = min(count, left), int(self.counts[shards[at]]) - left
            yield self.shards[shard], self.starts(epoch, shard)[local : local + n]
            first, count = first + n, count - n

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (count, block_size) each. Raises UserError for an id outside the vocabulary."""
        parts = [gather(shard, starts, self.block_size, self.vocab_size) for shard, starts in self.locate(first, count)]
        windows = np.concatenate(parts)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    def describe(self, first: int, count: int) -> str:
        """Where windows lie on disk: shard and byte offset of the first few."""
        places = []
        for shard, starts in self.locate(first, count):
            offsets = shard.offset + starts * np.dtype(shard.dtype).itemsize
            places += [f"{shard.path.name} at byte {offset:,}" for offset in offsets]
        return ", ".join(places[:4]) + (f" and {len(places) - 4} more windows" if len(places) > 4 else "")


class MixedWindows:
    """Windows of several datasets in proportion to weights, each dataset in its own order."""

    BLOCK = 2048  # windows that hold a fixed number of each dataset's, in a random order that depends on the seed alone

    def __init__(self, parts: list[TrainingWindows], weights: Sequence[float], seed: int = 1337):
        ends = np.rint(np.cumsum(weights) / (sum(weights) or 1) * self.BLOCK).astype(int)
        self.parts, self.seed = parts, seed
        self.counts = np.diff(ends, prepend=0)
        if not self.counts.all():
            raise UserError(f"--dataset: each weight must be at least 1/{self.BLOCK} of the sum, not {weights}")
        self.vocab_size, self.block_size = parts[0].vocab_size, parts[0].block_size
        self.per_epoch = sum(p.per_epoch for p in parts)
        self.order = lru_cache(1)(self.order)  # of the latest block

    def order(self, block: int) -> np.ndarray:
        """Which dataset each window of a block comes from, (BLOCK,)."""
        datasets = np.repeat(np.arange(len(self.parts)), self.counts)
        return np.random.default_rng((self.seed, block, 0)).permutation(datasets)

    def before(self, i: int) -> np.ndarray:
        """How many of the windows before window i come from each dataset."""
        block, rest = divmod(i, self.BLOCK)
        return block * self.counts + np.bincount(self.order(block)[:rest], minlength=len(self.parts))

    def locate(self, first: int, count: int) -> Iterator[tuple[Shard, np.ndarray]]:
        """Windows first .. first + count - 1 as (shard, start offsets), dataset by dataset."""
        begin, end = self.before(first), self.before(first + count)
        for part, a, b in zip(self.parts, begin, end):
            yield from part.locate(int(a), int(b - a))

    batch = TrainingWindows.batch
    describe = TrainingWindows.describe


def gather(shard: Shard, starts: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """The windows of a shard that begin at `starts`, (len(starts), block_size + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(shard.map(), block_size + 1)[starts]
    low, high = windows.min(), windows.max()
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UserError(f"{shard.path} holds token id {bad}, outside the vocabulary of {vocab_size:,}")
    return windows


def validation_windows(shards: list[Shard], block_size: int, limit: int = 0) -> list[tuple[Shard, int]]:
    """Non-overlapping windows as (shard, start offset), always the same; with a limit, that many evenly spaced."""
    windows = [(s, start) for s in split_shards(shards) for start in range(0, s.tokens - block_size, block_size)]
    if not windows:
        advice = "lower --block_size, or prepare more text or a larger --val_fraction"
        raise UserError(f"the validation text cannot fill a window of {block_size + 1:,} tokens: {advice}")
    if not limit or limit >= len(windows):
        return windows
    return [windows[i * len(windows) // limit] for i in range(limit)]


def validation_batches(
    windows: list[tuple[Shard, int]], block_size: int, vocab_size: int, batch_size: int, rank=0, world_size=1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's inputs and targets, int64 (batch_size, block_size); the last batch is padded with targets of -1."""
    for first in range(rank * batch_size, len(windows), world_size * batch_size):
        groups = itertools.groupby(windows[first : first + batch_size], key=lambda window: window[0])
        starts = [(shard, np.array([start for _, start in group])) for shard, group in groups]
        found = np.concatenate([gather(shard, rows, block_size, vocab_size) for shard, rows in starts]).astype(np.int64)
        padding = ((0, batch_size - len(found)), (0, 0))
        yield np.pad(found[:, :-1], padding), np.pad(found[:, 1:], padding, constant_values=-1)
