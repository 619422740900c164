"""Token shards: their writer and readers, and the order of batches.

A dataset is a folder of 1-D token arrays, one or more files a split, read as memory maps:

    ours            {name}_{train|val}_{000000}.npy, uint16 (uint32 past 65,536 ids), and meta.json
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.tokenizer import CharTokenizer

VERIFIED_TOKENS = 50_000_000  # a dataset smaller than this is checked in a fraction of a second
CHUNK = 100_000_000  # tokens shuffled at a time: a longer file is read as several, so that memory stays flat

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


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Token ids in shards of shard_tokens each, the last one shorter.

    Ids go to the disk as they come, into NAME.part; a shard appears under its name when it is whole, and in `shards` as
    {file, tokens, sha256}. name_of: a shard's file name, by how many came before it. With shards and filled it goes on where
    an earlier writer was: behind those shards and that many ids of the next one.
    """

    HEADER = 128  # bytes, so that it can be written last, when the number of tokens is known

    def __init__(
        self, folder: Path, name_of: Callable[[int], str], vocab_size: int, shard_tokens=CHUNK, shards=(), filled=0
    ):
        self.folder, self.name_of, self.vocab_size, self.shard_tokens = folder, name_of, vocab_size, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.shards, self.filled, self.file = list(shards), filled, None
        if filled:
            path, part = self.paths()
            if path.exists():  # it became whole after what is known here
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
        """Write ids. Raises ValueError for one past the vocabulary."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token id {ids.max()} is outside the vocabulary of {self.vocab_size:,}")
        while len(ids):
            if self.file is None:
                self.file = open(self.paths()[1], "w+b")
                self.file.write(bytes(self.HEADER))
            take = min(len(ids), self.shard_tokens - self.filled)
            with writing(self.file.name):
                self.file.write(ids[:take].astype(self.dtype).tobytes())
            self.filled, ids = self.filled + take, ids[take:]
            if self.filled == self.shard_tokens:
                self.finish()

    def sync(self) -> None:
        """Bring what was added to the disk."""
        if self.file:
            with writing(self.file.name):
                self.file.flush()
                os.fsync(self.file.fileno())

    def finish(self) -> None:
        """End the shard that is being written, if there is one."""
        if self.file is None:
            return
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": (self.filled,)}).encode()
        magic = np.lib.format.magic(1, 0)
        header = magic + (self.HEADER - len(magic) - 2).to_bytes(2, "little") + text
        with writing(self.file.name):
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
    turns: bool = False  # conversations as prepare_text.py --source=chat writes them, a turn a document


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
    turns = meta.get("arguments", {}).get("source") == "chat"
    return Dataset(name, splits["train"], splits["val"], tokenizer, vocab_size, turns)


def load_mixture(names: str, data_dir: str | Path = "data", verify: bool = False) -> list[tuple[Dataset, float]]:
    """The datasets of a --dataset key, with their shares: "tinystories", or "tinystories:0.7,chat:0.3". See load_dataset.

    Raises ValueError if their vocabularies differ.
    """
    found = []
    for part in names.split(","):
        name, _, weight = part.partition(":")
        if not name:
            raise ValueError(f"--dataset={names}: a name is missing")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise ValueError(f"--dataset={names}: the weight of {name} must be a number above 0, not {weight!r}")
        if any(name == d.name for d, _ in found):
            raise ValueError(f"--dataset={names}: {name} is named twice")
        found.append((load_dataset(name, data_dir, verify), share))
    first = found[0][0]
    for dataset, _ in found:
        if dataset.vocab_size != first.vocab_size or dataset.tokenizer != first.tokenizer:
            if not (dataset.tokenizer["kind"] == first.tokenizer["kind"] == "gpt2"):
                raise ValueError(f"--dataset={names}: {first.name} and {dataset.name} have different vocabularies")
    total = sum(share for _, share in found)
    return [(dataset, share / total) for dataset, share in found]


def how_to_make(name: str) -> str:
    """The command that makes a dataset of this name."""
    if name == "tinystories_synthetic":
        return "make it with python prepare_tinystories.py --synthetic=True"
    if name in ("tinystories", "tinystories_v2"):
        return "make it with python prepare_tinystories.py" + (" --version=v2" if name.endswith("_v2") else "")
    if name.startswith("edu_fineweb"):
        return "make it with python build_fineweb_shards.py"
    if name in ("fineweb10B", "fineweb100B", "finewebedu10B"):
        return f"make it with python build_fineweb_shards.py --pretokenized={name}"
    if name in ("chat", "shakespeare", "openwebtext"):
        return f"make it with python prepare_text.py --source={name}"
    if name == "shakespeare_char":
        return f"make it with python prepare_text.py --source=shakespeare --dataset={name} --tokenizer=char"
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


class MixedWindows:
    """Windows of several datasets, each dataset's in its own order, in shares of weights.

    Of every BLOCK windows each dataset has a fixed number, in a fresh order for each block, so window i is a function of the
    seed and i, as in TrainingWindows. An epoch is as many windows as all have together.
    """

    BLOCK = 2048

    def __init__(self, parts: list[TrainingWindows], weights: Sequence[float], seed: int = 1337):
        total = sum(weights)
        ends = np.rint(np.cumsum(weights) / (total or 1) * self.BLOCK).astype(int)
        self.parts, self.seed = parts, seed
        self.counts = np.diff(ends, prepend=0)
        if not self.counts.all():
            raise ValueError(f"the weights of a mixture are at least 1/{self.BLOCK} of it, not {weights}")
        self.vocab_size, self.block_size = parts[0].vocab_size, parts[0].block_size
        self.per_epoch = sum(p.per_epoch for p in parts)
        self._orders: dict[int, np.ndarray] = {}

    def before(self, i: int) -> np.ndarray:
        """How many of the windows before number i are of each dataset."""
        block, rest = divmod(i, self.BLOCK)
        if block not in self._orders:
            order = np.repeat(np.arange(len(self.parts)), self.counts)
            self._orders = {block: np.random.default_rng((self.seed, block, 0)).permutation(order)}
        return block * self.counts + np.bincount(self._orders[block][:rest], minlength=len(self.parts))

    def locate(self, first: int, count: int) -> Iterator[tuple[Shard, np.ndarray]]:
        """Windows first .. first + count - 1 as (shard, start offsets), dataset by dataset."""
        begin, end = self.before(first), self.before(first + count)
        for part, a, b in zip(self.parts, begin, end):
            yield from part.locate(int(a), int(b - a))

    batch = TrainingWindows.batch


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
