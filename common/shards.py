"""Token files: their writer and their readers.

A dataset is a folder of 1-D token arrays, one or more files per split, read as memory maps:

    ours            {name}_{train|val}_{000000}.npy, uint16 (uint32 past 65,536 ids), and meta.json
    nanoGPT         train.bin, val.bin, bare uint16, and for characters meta.pkl
    build-nanogpt   {name}_{train|val}_{000000}.npy
    llm.c, modded-nanogpt   {name}_{train|val}_{000000}.bin, after a header of 256 int32

Conversations have a mask beside each shard, {name}_{train|val}_{000000}.mask.npy: a byte of flags per token.
"""

import difflib
import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import file_sha256, named_disk_errors, parse_json
from common.tokenizer import CharTokenizer, IdTokenizer, same_vocabulary
from configurator import UserError

import numpy as np

VERIFIED_TOKENS = 50_000_000  # smaller datasets are always checked: it takes a fraction of a second
CHUNK = 100_000_000  # tokens in a shard
# Flags of a mask
LEARNED = 1  # a token that training predicts: the assistant's words and the end of its turn
BEGINS = 2  # the first token of a conversation
CUT = 4  # the first token of a later exchange: a conversation that does not fit a row loses what is before

# -----------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes token ids as shards of shard_tokens each; the last one is shorter. name_of: number -> file name.

    Ids go to NAME.part; a complete shard gets its name, and an entry {file, tokens, sha256} in `shards`. To resume an
    earlier writer, give its shards and `filled`, the number of ids in its unfinished shard. masked: ids carry the flags of
    a mask above bit 32, which go to a file of their own.
    """

    HEADER = 128  # bytes reserved for the .npy header, which is written last, when the number of tokens is known

    def __init__(
        self, folder: Path, name_of: Callable, vocab_size: int, shard_tokens=CHUNK, shards=(), filled=0, masked=False
    ):
        self.folder, self.name_of, self.vocab_size, self.shard_tokens = folder, name_of, vocab_size, shard_tokens
        self.dtypes = [np.dtype("<u2" if vocab_size <= 2**16 else "<u4")] + [np.dtype("|u1")] * masked
        self.shards, self.filled, self.files = list(shards), filled, []  # files: of the ids, and of the mask
        if filled:
            for dtype, (path, part) in zip(self.dtypes, self.paths()):
                if path.exists():  # it was completed after `filled` was recorded
                    os.replace(path, part)
                self.files.append(open(part, "r+b"))
                self.files[-1].truncate(self.HEADER + filled * dtype.itemsize)
                self.files[-1].seek(0, os.SEEK_END)

    def paths(self) -> list[tuple[Path, Path]]:
        """The path of each file when it is complete, and until then."""
        path = self.folder / self.name_of(len(self.shards))
        paths = [path, path.with_suffix(".mask.npy")][: len(self.dtypes)]
        return [(p, p.with_name(p.name + ".part")) for p in paths]

    @property
    def tokens(self) -> int:
        return sum(s["tokens"] for s in self.shards) + self.filled

    def add(self, ids) -> None:
        """Write ids. Raises UserError for one outside the vocabulary."""
        ids, columns = np.asarray(ids), []
        if len(self.dtypes) > 1:
            ids, columns = ids & 0xFFFFFFFF, [ids >> 32]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"token id {ids.max()} is outside the vocabulary of {self.vocab_size:,}")
        columns = [ids, *columns]
        while len(columns[0]):
            if not self.files:
                self.files = [open(part, "w+b") for _, part in self.paths()]
                for file in self.files:
                    file.write(bytes(self.HEADER))
            take = min(len(columns[0]), max(0, self.shard_tokens - self.filled))  # resumed with smaller shards: 0
            whole = cut_whole(columns[1], take) if len(columns) > 1 else take  # a shard ends with a conversation
            take = whole or (take if not self.filled else 0)
            for file, dtype, column in zip(self.files, self.dtypes, columns):
                with named_disk_errors(file.name):
                    file.write(column[:take].astype(dtype).tobytes())
            self.filled, columns = self.filled + take, [column[take:] for column in columns]
            if self.filled == self.shard_tokens or len(columns[0]):
                self.finish()

    def sync(self) -> None:
        for file in self.files:
            with named_disk_errors(file.name):
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if not self.files:
            return
        for file, dtype in zip(self.files, self.dtypes):
            fields = repr({"descr": dtype.str, "fortran_order": False, "shape": (self.filled,)})
            header = np.lib.format.magic(1, 0) + (self.HEADER - 10).to_bytes(2, "little") + fields.encode()
            with named_disk_errors(file.name):
                file.seek(0)
                file.write(header.ljust(self.HEADER - 1) + b"\n")
        self.sync()
        paths = self.paths()
        for file in self.files:
            file.close()
        hashes = [file_sha256(part) for _, part in paths]
        for path, part in reversed(paths):  # the ids last
            os.replace(part, path)
        entry = {"file": paths[0][0].name, "tokens": self.filled, "sha256": hashes[0]}
        self.shards.append(entry | ({"mask": paths[1][0].name, "mask_sha256": hashes[1]} if len(paths) > 1 else {}))
        self.files, self.filled = [], 0


def cut_whole(flags: np.ndarray, limit: int) -> int:
    """The largest number of tokens, at most `limit`, that are whole conversations by their flags; 0 if the first is longer."""
    if limit >= len(flags):
        return len(flags)
    begins = np.flatnonzero(flags[: limit + 1] & BEGINS)
    return int(begins[-1]) if len(begins) else 0


# -----------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Shard:
    path: Path
    dtype: str
    offset: int  # of the first token, in bytes
    tokens: int
    mask: Path | None = None

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
    is_chat: bool = False  # conversations, as prepare_text.py writes them

    @property
    def is_masked(self) -> bool:
        return bool(self.train) and self.train[0].mask is not None


def load_dataset(name: str, data_dir: str | Path = "data", verify: bool = False) -> Dataset:
    """Find the shards of data_dir/name. Raises UserError if they are missing or damaged; verify: check every sha256."""
    folder = Path(data_dir) / name
    meta_file, pickle_file = folder / "meta.json", folder / "meta.pkl"
    if not folder.is_dir():
        known = [p.name for p in Path(data_dir).iterdir() if p.is_dir()] if Path(data_dir).is_dir() else []
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? Otherwise " if near else ""
        raise UserError(f"there is no dataset {folder}: {hint}{how_to_make(name)}")
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    tokenizer, vocab_size, is_chat = {"kind": "gpt2"}, 50257, False
    if meta_file.exists():
        try:
            meta = parse_json(meta_file.read_text(encoding="utf-8"))
            listed = [(split, shard) for split in splits for shard in meta["shards"].get(split, [])]
            keys = ("file", "tokens", "sha256")
            masks = [(shard["mask"], shard["mask_sha256"]) if "mask" in shard else None for _, shard in listed]
            listed = [(split, *(shard[key] for key in keys)) for split, shard in listed]
            tokenizer, vocab_size = dict(meta["tokenizer"]), int(meta["vocab_size"])
            is_chat = any(masks) or meta.get("arguments", {}).get("source") == "chat"
            names = [file for _, file, _, _ in listed] + [mask[0] for mask in masks if mask]
            wrong = [file for file in names if Path(file).name != file]
            wrong += [tokens for *_, tokens, _ in listed if type(tokens) is not int]
            wrong += masks if any(masks) and not all(masks) else []
            if wrong or not 0 < vocab_size <= 2**32 or "kind" not in tokenizer:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{meta_file} is damaged; make the dataset again") from None
        verify = verify or sum(tokens for _, _, tokens, _ in listed) < VERIFIED_TOKENS

        def open_listed(file: str, tokens: int, sha256: str) -> Shard:
            if not (folder / file).exists():
                raise UserError(f"{folder} lacks {file}, which meta.json lists; make the dataset again")
            shard = open_shard(folder / file)
            if shard.tokens != tokens:
                raise UserError(f"{shard.path} holds {shard.tokens:,} tokens, meta.json says {tokens:,}")
            if verify and file_sha256(shard.path) != sha256:
                raise UserError(f"{shard.path} is damaged: its sha256 is not meta.json's; make the dataset again")
            return shard

        for (split, file, tokens, sha256), mask in zip(listed, masks):
            shard = open_listed(file, tokens, sha256)
            splits[split].append(replace(shard, mask=open_listed(mask[0], tokens, mask[1]).path) if mask else shard)
        hashes = [sha256 for *_, sha256 in listed] + [sha256 for _, sha256 in filter(None, masks)]
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
    if chats := [dataset.tokenizer for dataset in datasets if dataset.is_chat]:
        datasets = [replace(dataset, tokenizer=chats[0]) for dataset in datasets]  # for its chat template
    return [(dataset, weights[dataset.name] / sum(weights.values())) for dataset in datasets]


def how_to_make(name: str) -> str:
    own_text = f"prepare_text.py --inputs=FILE --dataset={name}"
    commands = {  # the first pattern that matches counts
        "tinystories": "prepare_tinystories.py",
        "tinystories_v2": "prepare_tinystories.py --version=v2",
        "tinystories_synthetic": "prepare_tinystories.py --synthetic=True",
        "edu_fineweb.*": "build_fineweb_shards.py (20 GB); a first run that needs no download: python train.py config/quickstart.py",
        "fineweb(edu)?10+B": f"build_fineweb_shards.py --pretokenized={name}",
        "chat|shakespeare|openwebtext": f"prepare_text.py --source={name}",
        "chat_.*": f"prepare_text.py --source=chat --dataset={name} --tokenizer=MODEL, the model to start from",
        "shakespeare_char": f"prepare_text.py --source=shakespeare --dataset={name} --tokenizer=char",
        ".*_char": f"{own_text} --tokenizer=char, or choose another --dataset",
        ".*": f"{own_text}, or choose another --dataset",
    }
    return "make it with python " + next(c for pattern, c in commands.items() if re.fullmatch(pattern, name, re.DOTALL))
