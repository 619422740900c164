"""Token files: their writer and readers, and the order of batches.

A dataset is a folder of 1-D token arrays, one or more files per split, read as memory maps:

    ours            {name}_{train|val}_{000000}.npy, uint16 (uint32 past 65,536 ids), and meta.json
    nanoGPT         train.bin, val.bin, bare uint16, and for characters meta.pkl
    build-nanogpt   {name}_{train|val}_{000000}.npy
    llm.c, modded-nanogpt   {name}_{train|val}_{000000}.bin, after a header of 256 int32
"""

import itertools
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.files import file_sha256, named_disk_errors
from common.tokenizer import CharTokenizer, same_vocabulary
from configurator import UserError

VERIFIED_TOKENS = 50_000_000  # smaller datasets are always checked: it takes a fraction of a second
CHUNK = 100_000_000  # tokens shuffled at a time; a longer file is read as several, so that memory stays flat

# -----------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes token ids as shards of shard_tokens each; the last one is shorter.

    Ids are written to NAME.part as they come. A complete shard gets its name, and an entry {file, tokens, sha256} in `shards`.
    name_of: the file name of a shard, by its number. To resume an earlier writer give its shards and `filled`, the number of
    ids in its unfinished shard.
    """

    HEADER = 128  # bytes reserved for the .npy header, which is written last, when the number of tokens is known

    def __init__(
        self, folder: Path, name_of: Callable[[int], str], vocab_size: int, shard_tokens=CHUNK, shards=(), filled=0
    ):
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
        """Bring what was added so far to the disk."""
        if self.file:
            with named_disk_errors(self.file.name):
                self.file.flush()
                os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self.file is None:
            return
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": (self.filled,)}).encode()
        magic = np.lib.format.magic(1, 0)
        header = magic + (self.HEADER - len(magic) - 2).to_bytes(2, "little") + text
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
    """`tokens` tokens of a file, starting at byte `offset`."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    def map(self) -> np.ndarray:
        """The tokens, read-only. Pages stay resident as long as the map lives, so keep it briefly."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,))


HEADERS = {20240520: "uint16", 20240801: "uint32"}  # llm.c's magic numbers: GPT-2 and Llama 3 ids


def open_shard(path: Path) -> Shard:
    """Describe a token file of any of the four formats. Raises UserError if it is truncated or not a token file."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        if path.suffix == ".npy":
            try:
                version = np.lib.format.read_magic(f)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(f)
            except (ValueError, EOFError):
                raise UserError(f"{path} is damaged: it has no .npy header; make the dataset again") from None
            if len(shape) != 1 or dtype.kind not in "ui":
                raise UserError(f"{path} holds {dtype} {shape}, not a row of token ids")
            shard = Shard(path, dtype.str, f.tell(), shape[0])
        else:
            header = np.frombuffer(f.read(12), "<i4")
            if len(header) == 3 and int(header[0]) in HEADERS:
                shard = Shard(path, HEADERS[int(header[0])], 1024, int(header[2]))
            else:
                shard = Shard(path, "uint16", 0, size // 2)
    expected = shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize
    if size != expected:
        raise UserError(f"{path} is truncated: {size:,} bytes of {expected:,}; make the dataset again")
    if shard.tokens == 0:
        raise UserError(f"{path} holds no tokens; make the dataset again")
    return shard


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers, which need no class; no class is admitted, so nothing in the file can run."""

    def find_class(self, module, name):
        raise UserError(f"meta.pkl asks for {module}.{name}: only plain dicts, lists, strings and numbers are read")


@dataclass
class Dataset:
    name: str
    train: list[Shard]
    val: list[Shard]
    tokenizer: dict | None  # as to_dict gives it; {"kind": "gpt2"} alone where the files do not say
    vocab_size: int
    is_chat: bool = False  # conversations as prepare_text.py --source=chat writes them, each exchange a document


def load_dataset(name: str, data_dir: str | Path = "data", verify: bool = False) -> Dataset:
    """Find the shards of data_dir/name. Raises UserError if they are missing or damaged, with the command that makes them.

    The sha256 in meta.json is checked for small datasets, and with verify=True for all.
    """
    folder = Path(data_dir) / name
    if not folder.is_dir():
        raise UserError(f"there is no dataset {folder}: {how_to_make(name)}")
    meta, splits = {}, {"train": [], "val": []}
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            listed = [
                (split, s["file"], s["tokens"], s["sha256"]) for split in splits for s in meta["shards"].get(split, [])
            ]
            tokenizer, vocab_size = meta["tokenizer"], int(meta["vocab_size"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / 'meta.json'} is damaged; make the dataset again") from None
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
    else:
        for path in sorted(folder.iterdir()):
            if match := re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:npy|bin)", path.name):
                splits[match[1]].append(open_shard(path))
    if not splits["train"]:
        raise UserError(f"{folder} has no training tokens: {how_to_make(name)}")
    if not meta and (folder / "meta.pkl").exists():
        try:
            with open(folder / "meta.pkl", "rb") as f:
                pickled = PlainUnpickler(f).load()
            chars = "".join(pickled["itos"][i] for i in range(pickled["vocab_size"]))
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{folder / 'meta.pkl'} is not nanoGPT's: it lacks vocab_size and itos") from None
        tokenizer, vocab_size = CharTokenizer(chars).to_dict(), pickled["vocab_size"]
    elif not meta:
        tokenizer, vocab_size = {"kind": "gpt2"}, 50257
    is_chat = meta.get("arguments", {}).get("source") == "chat"
    return Dataset(name, splits["train"], splits["val"], tokenizer, vocab_size, is_chat)


def load_mixture(names: str, data_dir: str | Path = "data", verify: bool = False) -> list[tuple[Dataset, float]]:
    """The datasets of a --dataset key and their weights, which sum to 1: "tinystories", or "tinystories:0.7,chat:0.3".

    Raises UserError if their vocabularies differ, and as load_dataset.
    """
    found = []
    for part in names.split(","):
        name, _, weight = part.partition(":")
        if not name:
            raise UserError(f"--dataset={names}: a name is missing")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"--dataset={names}: the weight of {name} must be a number above 0, not {weight!r}")
        if any(name == d.name for d, _ in found):
            raise UserError(f"--dataset={names}: {name} is named twice")
        found.append((load_dataset(name, data_dir, verify), value))
    first = found[0][0]
    for dataset, _ in found:
        if not same_vocabulary(dataset.tokenizer, first.tokenizer):
            raise UserError(f"--dataset={names}: {first.name} and {dataset.name} have different vocabularies")
    total = sum(weight for _, weight in found)
    return [(dataset, weight / total) for dataset, weight in found]


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
    return f"make it with python prepare_text.py --inputs=FILE --dataset={name}{tokenizer}, or choose another --dataset"


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

    Each epoch visits the shards in a new random order, and in each shard the windows of a grid in a new random order. The
    grid shifts by a random offset each epoch, so window boundaries fall on new tokens every time.
    Shards too short for a window are skipped. Raises UserError if all are.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int, seed: int = 1337, fraction: float = 1.0):
        if not 0 < fraction <= 1:
            raise UserError(f"--data_fraction={fraction}: must be above 0 and at most 1")
        self.shards = [s for s in split_shards(shards, fraction) if s.tokens > block_size]
        if not self.shards:
            most = max((s.tokens for s in split_shards(shards, fraction)), default=0)
            raise UserError(
                f"the training text of {most:,} tokens cannot fill a window of {block_size + 1:,}: "
                "lower --block_size or add text"
            )
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        # One window less than would fit leaves room for the random offset.
        self.counts = np.array([max(1, (s.tokens - 1) // block_size - 1) for s in self.shards])
        self.per_epoch = int(self.counts.sum())
        self._epochs: dict[int, tuple] = {}
        self._grids: dict[tuple, np.ndarray] = {}

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, and the cumulative number of windows after each."""
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
            at = int(np.searchsorted(ends, i, side="right"))
            shard = int(shards[at])
            local = i - int(ends[at] - self.counts[shard])
            n = min(count, int(self.counts[shard]) - local)
            yield self.shards[shard], self.starts(epoch, shard)[local : local + n]
            first, count = first + n, count - n

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (count, block_size) each. Raises UserError for an id outside the vocabulary."""
        parts = [gather(shard, starts, self.block_size, self.vocab_size) for shard, starts in self.locate(first, count)]
        windows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    def describe(self, first: int, count: int) -> str:
        """Where windows lie on disk: shard and byte offset of the first few."""
        places = [
            f"{shard.path.name} at byte {shard.offset + int(start) * np.dtype(shard.dtype).itemsize:,}"
            for shard, starts in self.locate(first, count)
            for start in starts
        ]
        return ", ".join(places[:4]) + (f" and {len(places) - 4} more windows" if len(places) > 4 else "")


class MixedWindows:
    """Windows of several datasets in proportion to weights, each dataset in its own order.

    Every block of BLOCK windows holds a fixed number of each dataset's, in a random order, so window i depends on the seed
    and i alone. An epoch is as many windows as all datasets have together.
    """

    BLOCK = 2048

    def __init__(self, parts: list[TrainingWindows], weights: Sequence[float], seed: int = 1337):
        total = sum(weights)
        ends = np.rint(np.cumsum(weights) / (total or 1) * self.BLOCK).astype(int)
        self.parts, self.seed = parts, seed
        self.counts = np.diff(ends, prepend=0)
        if not self.counts.all():
            raise UserError(f"--dataset: each weight must be at least 1/{self.BLOCK} of the sum, not {weights}")
        self.vocab_size, self.block_size = parts[0].vocab_size, parts[0].block_size
        self.per_epoch = sum(p.per_epoch for p in parts)
        self._orders: dict[int, np.ndarray] = {}

    def before(self, i: int) -> np.ndarray:
        """How many of the windows before window i come from each dataset."""
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
    describe = TrainingWindows.describe


def gather(shard: Shard, starts: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """The windows of a shard that begin at `starts`, (len(starts), block_size + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(shard.map(), block_size + 1)[starts]
    if windows.max() >= vocab_size or windows.min() < 0:
        bad = windows.max() if windows.max() >= vocab_size else windows.min()
        raise UserError(f"{shard.path} holds token id {bad}, outside the vocabulary of {vocab_size:,}")
    return windows


def validation_windows(shards: list[Shard], block_size: int, limit: int = 0) -> list[tuple[Shard, int]]:
    """The fixed validation windows as (shard, start offset): non-overlapping, in order; with a limit, that many evenly spaced.

    They depend on the split and block_size alone. Raises UserError if there is none.
    """
    grid = [(s, np.arange(0, s.tokens - block_size, block_size)) for s in split_shards(shards)]
    ends = np.cumsum([len(starts) for _, starts in grid])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        most = max((s.tokens for s in shards), default=0)
        raise UserError(
            f"the validation text of {most:,} tokens cannot fill a window of {block_size + 1:,}: "
            "lower --block_size, or prepare the dataset with more text or a larger --val_fraction"
        )
    wanted = np.arange(total) if not limit or limit >= total else np.arange(limit) * total // limit
    shard_of = np.searchsorted(ends, wanted, side="right")
    return [(grid[s][0], int(grid[s][1][w - ends[s]])) for s, w in zip(shard_of, wanted)]


def validation_batches(
    windows: list[tuple[Shard, int]],
    block_size: int,
    vocab_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of the windows as inputs and targets, int64 (batch_size, block_size) each.

    The last batch is padded with rows whose targets are -1, so that all have the same shape.
    """
    for first in range(rank * batch_size, len(windows), world_size * batch_size):
        x = np.zeros((batch_size, block_size), np.int64)
        y = np.full((batch_size, block_size), -1, np.int64)
        row = 0
        for shard, group in itertools.groupby(windows[first : first + batch_size], key=lambda window: window[0]):
            found = gather(shard, np.array([start for _, start in group]), block_size, vocab_size)
            x[row : row + len(found)], y[row : row + len(found)] = found[:, :-1], found[:, 1:]
            row += len(found)
        yield x, y
