"""Tokenizers: text to ids and back. A checkpoint and a dataset carry theirs whole, as to_dict gives it.

Each has encode(text, special) -> list of ids, encode_batch(texts) -> array, decode(ids) -> text, token_bytes(id), n_vocab, eot,
to_dict() and to_json(), the tokenizer.json of Hugging Face's libraries.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SHA256 = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"  # of its 50,256 tokens, a line each
SAMPLE_CHARACTERS = 50_000_000  # what a bpe tokenizer is trained on at most


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

    def to_json(self) -> str:
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = self.ids | ({EOT: self.eot} if self.eot is not None else {})
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": EOT}
        return library_json(model, {} if self.eot is None else {EOT: self.eot}, split, {"type": "Fuse"})


class BPETokenizer:
    """A byte-level vocabulary, run by tiktoken: tokens[i] are the bytes of id i, the lower id merged first; then comes eot.

    A piece of the pattern that is itself a token is taken whole; merges build the others, from single bytes.
    special_tokens have the ids behind eot, and are theirs wherever they stand in a text.
    """

    def __init__(self, kind: str, pattern: str, tokens: list[bytes], special_tokens: Iterable[str] = ()):
        import tiktoken

        if missing := 256 - sum(len(t) == 1 for t in tokens):
            raise ValueError(f"a byte-level vocabulary holds all 256 bytes; {missing} are missing")
        self.kind, self.pattern, self.tokens = kind, pattern, tokens
        self.special_tokens = list(special_tokens)
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1 + len(self.special_tokens)
        ranks = {t: i for i, t in enumerate(tokens)}
        self.special = {t: i for i, t in enumerate([EOT, *self.special_tokens], self.eot)}
        self.encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special: EOT in the text is the eot id; otherwise it is ordinary text."""
        if not special and not self.special_tokens:
            return self.encoding.encode_ordinary(text)
        allowed = {*self.special_tokens, EOT} if special else set(self.special_tokens)
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        """The ids of all texts one after the other, uint32, each behind an end-of-text id."""
        if any(EOT in text for text in texts):  # where it is ordinary text
            return np.array([i for text in texts for i in (self.eot, *self.encode(text))], np.uint32)
        return self.encoding.encode_to_numpy(EOT + EOT.join(texts), allowed_special="all")

    def token_bytes(self, i: int) -> bytes:
        return self.tokens[i] if i < self.eot else [EOT, *self.special_tokens][i - self.eot].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        made = {"kind": self.kind, "pattern": self.pattern, "tokens": [t.decode("latin-1") for t in self.tokens]}
        return made | ({"special_tokens": self.special_tokens} if self.special_tokens else {})

    def to_json(self) -> str:
        symbol = {b: s for s, b in byte_of_symbol().items()}
        ranks = {t: i for i, t in enumerate(self.tokens)}
        halves = [
            (ranks[t[:cut]], ranks[t[cut:]], rank)
            for t, rank in ranks.items()
            for cut in range(1, len(t))
            if t[:cut] in ranks and t[cut:] in ranks
        ]
        words = ["".join(symbol[b] for b in t) for t in self.tokens]
        merges = [[words[left], words[right]] for left, right, _ in sorted(halves, key=lambda h: (h[2], h[0], h[1]))]
        model = {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": merges, "ignore_merges": True}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's
        return library_json(model, self.special, split, split)


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

    def to_json(self) -> str:
        return self.text


Tokenizer = CharTokenizer | BPETokenizer | PretrainedTokenizer


def library_json(model: dict, special: dict[str, int], pre_tokenizer: dict, decoder: dict) -> str:
    """A tokenizer.json of the tokenizers library. special: ids of tokens that stand for no text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in special.items()]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    whole |= {"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}
    return json.dumps(whole, ensure_ascii=False)


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


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()) -> BPETokenizer:
    """Byte-pair encoding (https://arxiv.org/abs/1508.07909) of vocab_size ids, end-of-text and special_tokens among them.

    Raises ValueError for no text, a vocabulary too small for the bytes, or a text too small for the vocabulary asked.
    """
    special_tokens = list(special_tokens)
    own = 1 + len(special_tokens)
    if vocab_size < 256 + own:
        raise ValueError(f"--vocab_size={vocab_size}: the 256 bytes and the special tokens need {256 + own}")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ImportError("training a tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - own, initial_alphabet=alphabet, show_progress=False)
    empty = True

    def counted():
        nonlocal empty
        for text in texts:
            empty = empty and not text.strip()
            yield re.sub("|".join(map(re.escape, special_tokens)), "\n", text) if special_tokens else text

    bpe.train_from_iterator(counted(), trainer)
    if empty:
        raise ValueError("there is no text to train a tokenizer on")
    if bpe.get_vocab_size() < vocab_size - own:
        most = bpe.get_vocab_size() + own
        raise ValueError(f"--vocab_size={vocab_size} is more than this text supports: at most {most}")
    to_byte = byte_of_symbol()
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(to_byte[c] for c in symbols) for symbols, _ in vocab]
    return BPETokenizer("bpe", GPT2_PATTERN, tokens, special_tokens)


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
        tokens = [t.encode("latin-1") for t in d["tokens"]]
        return BPETokenizer(d["kind"], d["pattern"], tokens, d.get("special_tokens", ()))
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


def learn_tokenizer(
    kind: str, vocab_size: int, texts: Callable, train: Callable | None = None, eot=True, special_tokens=()
) -> Tokenizer:
    """The tokenizer of a --tokenizer key, learned from texts() where it is char or bpe.

    A char alphabet has every character of all texts, so that validation can be encoded; bpe sees train() alone, and of
    that the first SAMPLE_CHARACTERS. Raises ValueError for another name.
    """
    if EOT in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"--special_tokens={','.join(special_tokens)}: each once, and {EOT} is there anyway")
    if special_tokens and kind != "bpe":
        raise ValueError(f"--special_tokens are for --tokenizer=bpe; --tokenizer={kind} has its own")
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "char":
        chars = set()
        for text in texts():
            chars.update(text)
        return CharTokenizer("".join(sorted(chars)), eot)
    if kind == "bpe":
        return train_bpe(first_characters((train or texts)()), vocab_size, special_tokens)
    if Path(kind).is_dir() or "/" in kind:
        from common.pretrained import download_pretrained

        made = read_tokenizer(Path(kind) if Path(kind).is_dir() else download_pretrained(kind, weights=False))
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
