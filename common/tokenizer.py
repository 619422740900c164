"""Tokenizers: text to token ids and back. Checkpoints and datasets store the complete tokenizer as its to_dict().

Every tokenizer has encode(text, special) -> list of ids (special: special tokens in the text become their ids),
encode_batch(texts) -> one array of ids with an end-of-text id before each text, decode(ids) -> text, token_bytes(id),
n_vocab, eot (the end-of-text id or None), to_dict(), and to_json() -> the tokenizer.json of the tokenizers library.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from configurator import UserError, first_line

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SHA256 = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"  # of the 50,256 tokens, one per line
MAX_BPE_CHARACTERS = 50_000_000  # of the training text, from which a bpe tokenizer is trained


class CharTokenizer:
    """One id per character of `chars`, in that order. eot=True adds an end-of-text id after the last character."""

    def __init__(self, chars: str, eot: bool = False):
        self.chars = chars
        self.symbols = [*chars, EOT] if eot else list(chars)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.eot, self.n_vocab = self.ids.get(EOT), len(self.symbols)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises UserError for a character outside the vocabulary."""
        is_split = special and self.eot is not None
        symbols = re.findall(f"{re.escape(EOT)}|.", text, re.DOTALL) if is_split else text
        try:
            return [self.ids[symbol] for symbol in symbols]
        except KeyError as e:
            known = f"the {len(self.chars)} characters of the vocabulary: {self.chars!r}"
            raise UserError(f"character {e.args[0]!r} is not among {known}") from None

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
        table = np.full(max(map(ord, self.chars), default=0) + 2, -1, np.int32)
        table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
        ids = table[np.minimum(codes, len(table) - 1)]
        if len(ids) and ids.min() < 0:
            self.encode(chr(codes[ids.argmin()]))  # raises the UserError that names the character
        return ids if self.eot is None else np.insert(ids, np.cumsum([0, *map(len, texts[:-1])]), self.eot)

    def token_bytes(self, i: int) -> bytes:
        return self.symbols[i].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in ids)

    def to_dict(self) -> dict:
        return {"kind": "char", "chars": self.chars, "eot": self.eot is not None}

    def to_json(self) -> str:
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        special = {} if self.eot is None else {EOT: self.eot}
        return tokenizer_json("WordLevel", {"vocab": self.ids, "unk_token": EOT}, special, split, {"type": "Fuse"})


class BPETokenizer:
    """Byte-level BPE, run by tiktoken. tokens[i] are the bytes of id i; the eot id follows, then the special tokens.

    The pattern splits the text into pieces. A piece that is a token becomes its id; others are merged from bytes, the
    lowest id first. Special tokens are recognised wherever they occur in a text.
    """

    def __init__(self, kind: str, pattern: str, tokens: list[bytes], special_tokens: Iterable[str] = ()):
        import tiktoken

        if missing := 256 - sum(len(t) == 1 for t in tokens):
            raise ValueError(f"a byte-level vocabulary needs all 256 bytes; {missing} are missing")
        self.kind, self.pattern, self.tokens, self.special_tokens = kind, pattern, tokens, list(special_tokens)
        self.ranks = {t: i for i, t in enumerate(tokens)}
        self.special = {t: i for i, t in enumerate([EOT, *self.special_tokens], len(tokens))}
        self.eot, self.n_vocab = len(tokens), len(tokens) + len(self.special)
        options = {"pat_str": pattern, "mergeable_ranks": self.ranks, "special_tokens": self.special}
        self.encoding = tiktoken.Encoding(kind, **options)

    def encode(self, text: str, special: bool = False) -> list[int]:
        if not special and not self.special_tokens:
            return self.encoding.encode_ordinary(text)
        allowed = {*self.special_tokens, EOT} if special else set(self.special_tokens)
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        if any(EOT in text for text in texts):  # EOT inside a text is ordinary text and must not become an id
            return np.array([i for text in texts for i in (self.eot, *self.encode(text))], np.uint32)
        return self.encoding.encode_to_numpy(EOT + EOT.join(texts), allowed_special="all")

    def token_bytes(self, i: int) -> bytes:
        return self.tokens[i] if i < self.eot else [EOT, *self.special_tokens][i - self.eot].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        described = {"kind": self.kind, "pattern": self.pattern, "tokens": [t.decode("latin-1") for t in self.tokens]}
        return described | ({"special_tokens": self.special_tokens} if self.special_tokens else {})

    def to_json(self) -> str:
        symbols = {byte: symbol for symbol, byte in unicode_to_byte().items()}
        words = ["".join(symbols[b] for b in token) for token in self.tokens]
        halves = [(i, token[:n], token[n:]) for i, token in enumerate(self.tokens) for n in range(1, len(token))]
        pairs = sorted((i, self.ranks[a], self.ranks[b]) for i, a, b in halves if a in self.ranks and b in self.ranks)
        merges = [[words[left], words[right]] for _, left, right in pairs]
        model = {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges, "ignore_merges": True}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return tokenizer_json("BPE", model, self.special, split, split)


class PretrainedTokenizer:
    """The tokenizer.json of a pretrained model, run by the tokenizers library. eot: the end-of-text token, or None."""

    def __init__(self, text: str, eot: str | None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a pretrained tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
        self.text, self.eot_token = text, eot
        self.library = Tokenizer.from_str(text)
        vocab = self.library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values()) + 1
        self.eot = vocab.get(eot)
        self.special = {t["id"] for t in json.loads(text)["added_tokens"]}
        self.to_byte = unicode_to_byte() if '"ByteLevel"' in text else None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special=True also adds the tokens that the model expects first."""
        self.library.encode_special_tokens = not special
        return self.library.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: list[str]) -> np.ndarray:
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

    decode = BPETokenizer.decode

    def to_dict(self) -> dict:
        return {"kind": "pretrained", "json": self.text, "eot": self.eot_token}

    def to_json(self) -> str:
        return self.text


Tokenizer = CharTokenizer | BPETokenizer | PretrainedTokenizer


def tokenizer_json(model: str, fields: dict, special: dict[str, int], pre_tokenizer: dict, decoder: dict) -> str:
    """A tokenizer.json for the tokenizers library: a model of this type with these fields, and special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in special.items()]
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    parts |= {"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    return json.dumps(parts | {"model": {"type": model, **fields}}, ensure_ascii=False)


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's vocabulary, 50,257 ids, downloaded once by tiktoken. Raises UserError if the download fails."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:
        advice = "connect to the internet once, set TIKTOKEN_CACHE_DIR to its folder, or choose --tokenizer=char"
        raise UserError(f"the GPT-2 vocabulary cannot be downloaded ({type(e).__name__}): {advice}") from None
    return BPETokenizer("gpt2", encoding._pat_str, [encoding.decode_single_token_bytes(i) for i in range(50256)])


def word_tokenizer(text: str, vocab_size: int) -> BPETokenizer:
    """A vocabulary of the 256 bytes and the most frequent whole pieces of a text; the bytes spell all other pieces."""
    import regex

    counts = Counter(regex.findall(GPT2_PATTERN, text))
    pieces = [p.encode() for p in sorted(counts, key=lambda p: (-counts[p], p)) if len(p.encode()) > 1]
    return BPETokenizer("bpe", GPT2_PATTERN, [bytes([b]) for b in range(256)] + pieces[: vocab_size - 257])


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()) -> BPETokenizer:
    """Train byte-pair encoding (https://arxiv.org/abs/1508.07909); vocab_size includes eot and special_tokens."""
    special_tokens = list(special_tokens)
    n_special = 1 + len(special_tokens)
    if vocab_size < 256 + n_special:
        raise UserError(f"--vocab_size={vocab_size}: the 256 bytes and the special tokens need {256 + n_special}")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - n_special, initial_alphabet=alphabet, show_progress=False)
    if special_tokens:
        pattern = "|".join(map(re.escape, special_tokens))
        texts = (re.sub(pattern, "\n", text) for text in texts)
    bpe.train_from_iterator(texts, trainer)
    if (limit := bpe.get_vocab_size() + n_special) < vocab_size:
        raise UserError(f"--vocab_size={vocab_size} is more than this text supports, which is at most {limit}")
    to_byte, vocab = unicode_to_byte(), bpe.get_vocab()
    tokens = [bytes(to_byte[c] for c in symbols) for symbols in sorted(vocab, key=vocab.get)]
    return BPETokenizer("bpe", GPT2_PATTERN, tokens, special_tokens)


def unicode_to_byte() -> dict[str, int]:
    """The inverse of GPT-2's bytes_to_unicode(): 188 bytes stand for themselves, the others are characters from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(b): b for b in printable}
    return symbols | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(printable)))}


def tokenizer_from_dict(d: dict) -> Tokenizer:
    """The tokenizer that to_dict() described. Raises ValueError for an unknown kind."""
    kind = d.get("kind")
    if kind == "char":
        return CharTokenizer(d["chars"], d["eot"])
    if kind == "gpt2" and "tokens" not in d:  # files of other projects do not store the vocabulary
        return gpt2_tokenizer()
    if kind in ("gpt2", "bpe"):
        tokens = [t.encode("latin-1") for t in d["tokens"]]
        return BPETokenizer(kind, d["pattern"], tokens, d.get("special_tokens", ()))
    if kind == "pretrained":
        return PretrainedTokenizer(d["json"], d["eot"])
    raise ValueError(f"unknown tokenizer kind {kind!r}")


def same_vocabulary(a: dict, b: dict) -> bool:
    """Whether two to_dict() descriptions mean the same ids. Of GPT-2's vocabulary some files store only the kind."""
    return a == b or a["kind"] == b["kind"] == "gpt2"


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a pretrained model, as a BPETokenizer where tiktoken gives the same ids. Raises UserError."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json")
    try:
        text = file.read_text(encoding="utf-8")
        fields = json.loads(text)
        model, added = fields["model"], [t["content"] for t in fields["added_tokens"]]
        eot = EOT if EOT in added else None
        if config_file.exists():
            eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token") or eot
            eot = eos["content"] if isinstance(eos, dict) else eos
        vocab = {t: i for t, i in model["vocab"].items() if t not in added}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        merged_ids = [vocab.get(a + b, -1) for a, b in merges]
        # tiktoken merges by id, so the ids have to be in the order of the merges, without a gap.
        in_order = merged_ids == sorted(merged_ids) and sorted(vocab.values()) == list(range(len(vocab)))
        split = fields.get("pre_tokenizer") or {}
        is_plain = fields.get("normalizer") is None and not split.get("add_prefix_space") and added == [EOT]
        is_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and is_plain
        if not is_gpt2 or not in_order:
            return PretrainedTokenizer(text, eot)
        to_byte = unicode_to_byte()
        tokens = [bytes(to_byte[c] for c in t) for t in sorted(vocab, key=vocab.get)]
        digest = hashlib.sha256(b"\n".join(tokens)).hexdigest()
        return BPETokenizer("gpt2" if digest == GPT2_SHA256 else "bpe", GPT2_PATTERN, tokens)
    except UserError:
        raise
    except Exception as e:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{file} is damaged: {first_line(e)}") from None


def download_tokenizer(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
    except Exception as e:
        raise UserError(f"--tokenizer={name}: not a folder, and the hub does not have it: {first_line(e)}") from None


def learn_tokenizer(kind: str, vocab_size: int, texts, train_texts=None, eot=True, special_tokens=()) -> Tokenizer:
    """The tokenizer of a --tokenizer key: char has every character of texts(), bpe is trained on train_texts() only."""
    if EOT in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise UserError(f"--special_tokens={','.join(special_tokens)}: name each once; {EOT} is always included")
    if special_tokens and kind != "bpe":
        raise UserError(f"--special_tokens need --tokenizer=bpe; --tokenizer={kind} has its own")
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "char":
        return CharTokenizer("".join(sorted(set(itertools.chain.from_iterable(texts())))), eot)
    if kind == "bpe":
        return train_bpe(first_characters((train_texts or texts)()), vocab_size, special_tokens)
    is_folder = Path(kind).is_dir()
    if is_folder or "/" in kind:
        pretrained = read_tokenizer(Path(kind) if is_folder else download_tokenizer(kind))
        if pretrained.eot is None:
            raise UserError(f"--tokenizer={kind} has no end-of-text token to separate documents")
        return pretrained
    raise UserError(f"--tokenizer={kind}: choose gpt2, char, bpe, or a folder with a tokenizer.json")


def first_characters(texts: Iterable[str]) -> Iterator[str]:
    remaining = MAX_BPE_CHARACTERS
    for text in texts:
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return
