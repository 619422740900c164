"""The order of batches: a pure function of the seed and the number of sequences seen.

Plain text is cut into windows of block_size + 1 tokens. Conversations, which have a mask beside their tokens, are packed
whole into rows of that length, and only what the mask marks is learned.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from common.runtime import to_device
from common.shards import BEGINS, CHUNK, CUT, LEARNED, Shard
from configurator import UserError

import numpy as np


def split_shards(shards: list[Shard], fraction: float = 1.0, chunk: int = CHUNK) -> list[Shard]:
    """The first `fraction` of the tokens, as pieces of at most `chunk` tokens, so that memory stays flat."""
    left = round(sum(s.tokens for s in shards) * fraction)
    pieces = []
    for shard in shards:
        for start in range(0, min(shard.tokens, left), chunk):
            offset = shard.offset + start * np.dtype(shard.dtype).itemsize
            pieces.append(replace(shard, offset=offset, tokens=min(chunk, min(shard.tokens, left) - start)))
        left = max(0, left - shard.tokens)
    return pieces


def check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"--data_fraction={fraction}: must be above 0 and at most 1")


class TrainingWindows:
    """The endless sequence of training windows of block_size + 1 tokens. Window i depends on the seed and i alone.

    Each epoch visits the shards, and the windows of a grid in each shard, in a new random order. The grid shifts by a
    random offset each epoch, so window boundaries fall on new tokens every time. Too short shards are skipped.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size: int, seed: int = 1337, fraction: float = 1.0):
        check_fraction(fraction)
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

    def learned(self, first: int, count: int) -> int:
        """The number of targets in windows first .. first + count - 1."""
        return count * self.block_size

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

    def split(self, first: int, count: int) -> list[tuple]:
        """Each dataset's part of the windows first .. first + count - 1, as (windows, first, count)."""
        begin, end = self.before(first), self.before(first + count)
        return [(part, int(a), int(b - a)) for part, a, b in zip(self.parts, begin, end) if b > a]

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As TrainingWindows.batch; dataset by dataset."""
        batches = [part.batch(a, n) for part, a, n in self.split(first, count)]
        return tuple(np.concatenate(arrays) for arrays in zip(*batches))

    def learned(self, first: int, count: int) -> int:
        return sum(part.learned(a, n) for part, a, n in self.split(first, count))

    def describe(self, first: int, count: int) -> str:
        return "; ".join(part.describe(a, n) for part, a, n in self.split(first, count))


class PackedRows:
    """Conversations packed whole into rows of block_size + 1 tokens, for training and for validation.

    Best fit: the longest first, each into the row that it fills best. A row begins with a conversation; what is left of it
    is padding. A conversation that is longer than a row loses its first exchanges, system message included, and begins with
    its first token all the same; one whose last exchange alone is longer is left out. Row i of training depends on the seed and
    i alone; each epoch has a new order.
    """

    def __init__(self, shards: list[Shard], block_size: int, vocab_size=2**32, seed: int = 1337, fraction: float = 1.0):
        check_fraction(fraction)
        self.shards, self.block_size, self.vocab_size, self.seed = shards, block_size, vocab_size, seed
        self.left_out = 0  # conversations
        found = [c for n, shard in enumerate(shards) for c in self.conversations(n, shard)]
        found = found[: max(1, round(len(found) * fraction))]
        if not found:
            raise UserError(f"no conversation fits {block_size + 1:,} tokens: raise --block_size")
        self.rows = pack(found, block_size + 1)  # [[(shard, start, stop, number of targets, first id), ...], ...]
        self.targets = np.array([sum(c[3] for c in row) for row in self.rows])
        self.per_epoch = len(self.rows)
        self.order = lru_cache(1)(self.order)  # of the latest epoch

    def conversations(self, number: int, shard: Shard) -> Iterator[tuple[int, int, int, int, int]]:
        """(shard, start, stop, number of targets, first id) of the conversations of a shard, cut to what fits a row."""
        mask, ids, room = np.load(shard.mask, mmap_mode="r"), shard.map(), self.block_size + 1
        begins, cuts = np.flatnonzero(mask & BEGINS), np.flatnonzero(mask & CUT)
        learned = np.concatenate(([0], np.cumsum(mask & LEARNED)))
        for start, stop in zip(begins.tolist(), [*begins[1:].tolist(), len(mask)]):
            first = int(ids[start])
            if stop - start > room:
                cut = np.searchsorted(cuts, stop - room)
                start = int(cuts[cut]) if cut < len(cuts) and cuts[cut] < stop else stop
                if start < stop and ids[start] != first:  # the token before it makes room for the first
                    start -= 1
                    if stop - start > room:
                        start = int(cuts[cut + 1]) - 1 if cut + 1 < len(cuts) and cuts[cut + 1] < stop else stop
            if start < stop and (targets := int(learned[stop] - learned[start + 1])):  # the first token is no target
                yield number, start, stop, targets, first
            else:
                self.left_out += 1

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.per_epoch)

    def locate(self, first: int, count: int) -> list[int]:
        """Numbers of the rows at the places first .. first + count - 1 of the order."""
        places = [divmod(i, self.per_epoch) for i in range(first, first + count)]
        return [int(self.order(epoch)[i]) for epoch, i in places]

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(self.locate(first, count))

    def read(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows, int64 (len(rows), block_size) each; a target that is not learned is -1."""
        ids = np.zeros((len(rows), self.block_size + 1), np.int64)
        targets = np.full_like(ids, -1)
        for n, row in enumerate(rows):
            at = 0
            for number, start, stop, _, first in self.rows[row]:
                shard, end = self.shards[number], at + stop - start
                piece = check_ids(shard, shard.map()[start:stop], self.vocab_size).astype(np.int64)
                learned = np.load(shard.mask, mmap_mode="r")[start:stop] & LEARNED > 0
                learned[0], piece[0] = False, first  # nothing in this conversation comes before it
                ids[n, at:end], targets[n, at:end] = piece, np.where(learned, piece, -1)
                at = end
            ids[n, at:] = ids[n, 0]  # padding, which no target follows
        return ids[:, :-1], targets[:, 1:]

    def learned(self, first: int, count: int) -> int:
        return int(self.targets[self.locate(first, count)].sum())

    def describe(self, first: int, count: int) -> str:
        places = [(self.shards[n], start) for row in self.locate(first, count) for n, start, *_ in self.rows[row]]
        offsets = [f"{s.path.name} at byte {s.offset + i * np.dtype(s.dtype).itemsize:,}" for s, i in places]
        return ", ".join(offsets[:4]) + (f" and {len(offsets) - 4} more conversations" if len(offsets) > 4 else "")


class Batches:
    """A rank's micro-batches on its device. In a step, micro-batches go to the ranks in turn."""

    def __init__(
        self, windows: TrainingWindows | PackedRows | MixedWindows, batch_size: int, device, rank: int, world_size: int
    ):
        self.windows, self.batch_size, self.device = windows, batch_size, device
        self.rank, self.world_size = rank, world_size
        self.prefetched = (-1, None)  # first sequence, batch

    def first_sequence(self, position: int, micro: int = 0) -> int:
        """The first sequence of this rank's micro-batch `micro`, in a step that starts at sequence `position`."""
        return position + (micro * self.world_size + self.rank) * self.batch_size

    def load(self, first: int) -> list:
        """Inputs and targets, int64 tensors (batch_size, block_size) on the device: the sequences from `first` on."""
        if first == self.prefetched[0]:
            return self.prefetched[1]
        return to_device(self.device, *self.windows.batch(first, self.batch_size))

    def prefetch(self, first: int) -> None:
        self.prefetched = (first, self.load(first))


def pack(pieces: list[tuple], room: int) -> list[list[tuple]]:
    """Rows of pieces (shard, start, stop, ...) that are together at most `room` long, by best fit, the longest first."""
    rows, rows_with, sizes = [], {}, 0  # rows_with[n]: rows with room for n more; bit n of sizes: whether there is one
    for piece in sorted(pieces, key=lambda p: p[1] - p[2]):
        length = piece[2] - piece[1]
        fitting = sizes >> length << length
        size = (fitting & -fitting).bit_length() - 1 if fitting else room
        if fitting:
            row = rows_with[size].pop()
            if not rows_with[size]:
                sizes ^= 1 << size
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(piece)
        rows_with.setdefault(size - length, []).append(row)
        sizes |= 1 << (size - length)
    return rows


def gather(shard: Shard, starts: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """The windows of a shard that begin at `starts`, (len(starts), block_size + 1)."""
    windows = np.lib.stride_tricks.sliding_window_view(shard.map(), block_size + 1)[starts]
    return check_ids(shard, windows, vocab_size)


def check_ids(shard: Shard, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    low, high = ids.min(), ids.max()
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UserError(f"{shard.path} holds token id {bad}, outside the vocabulary of {vocab_size:,}")
    return ids


@lru_cache(8)
def packed_once(shards: tuple[Shard, ...], block_size: int) -> PackedRows:
    return PackedRows(list(shards), block_size)


def training_windows(dataset, block_size: int, seed: int = 1337, fraction: float = 1.0) -> TrainingWindows | PackedRows:
    """The training sequences of a Dataset."""
    kind = PackedRows if dataset.is_masked else TrainingWindows
    return kind(dataset.train, block_size, dataset.vocab_size, seed, fraction)


def validation_windows(shards: list[Shard], block_size: int, limit: int = 0) -> list[tuple]:
    """Validation sequences, always the same; with a limit, that many evenly spaced.

    Of plain text non-overlapping windows as (shard, start offset), of conversations (PackedRows, row).
    """
    if shards and shards[0].mask:
        rows = packed_once(tuple(shards), block_size)
        windows = [(rows, n) for n in range(len(rows.rows))]
    else:
        windows = [(s, start) for s in split_shards(shards) for start in range(0, s.tokens - block_size, block_size)]
    if not windows:
        advice = "lower --block_size, or prepare more text or a larger --val_fraction"
        raise UserError(f"the validation text cannot fill a window of {block_size + 1:,} tokens: {advice}")
    if not limit or limit >= len(windows):
        return windows
    return [windows[i * len(windows) // limit] for i in range(limit)]


def validation_batches(
    windows: list[tuple], block_size: int, vocab_size: int, batch_size: int, rank=0, world_size=1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's inputs and targets, int64 (batch_size, block_size); the last batch is padded with targets of -1."""

    def read(source: Shard | PackedRows, starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(source, PackedRows):
            source.vocab_size = vocab_size
            return source.read(starts)
        found = gather(source, np.array(starts), block_size, vocab_size).astype(np.int64)
        return found[:, :-1], found[:, 1:]

    for first in range(rank * batch_size, len(windows), world_size * batch_size):
        groups = itertools.groupby(windows[first : first + batch_size], key=lambda window: window[0])
        parts = [read(source, [start for _, start in group]) for source, group in groups]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        padding = ((0, batch_size - len(x)), (0, 0))
        yield np.pad(x, padding), np.pad(y, padding, constant_values=-1)
