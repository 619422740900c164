"""Tokenizers: text to token ids and back. Checkpoints and datasets store the complete tokenizer as its to_dict().

Every tokenizer has encode(text, special) -> list of ids (special: special tokens in the text become their ids),
encode_batch(texts) -> one array of ids with an end-of-text id before each text, decode(ids) -> text, token_bytes(id),
n_vocab, eot (the end-of-text id or None), stops (the ids that end a text), bos (the ids that start one), special_names(),
chat_template (Jinja; empty: it has none), to_dict(), and to_json() -> the tokenizer.json of the tokenizers library.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.files import parse_json, read_json
from configurator import UserError, first_line

import numpy as np

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SHA256 = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"  # of the 50,256 tokens, one per line
LONGEST_PIECE = 256  # characters; time to train grows with the square of a piece, and DNA or base64 has no breaks
MAX_BPE_CHARACTERS = 50_000_000  # of the training text, from which a bpe tokenizer is trained


def replace_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON may hold and UTF-8 cannot encode, replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """What all tokenizers share."""

    bos = ()
    chat_template = ""
    bos_token: str | None = (
        None  # what chat templates call so; None: the token that begins a text, or the end-of-text token
    )

    def special_names(self) -> list[str]:
        return [] if self.eot is None else [EOT]

    def settings(self) -> dict:
        """What to_dict() gives beside the vocabulary."""
        stops = {"stops": list(self.stops)} if self.stops not in ((), (self.eot,)) else {}
        bos = {} if self.bos_token is None else {"bos_token": self.bos_token}
        return stops | bos | ({"chat_template": self.chat_template} if self.chat_template else {})


class CharTokenizer(Tokenizer):
    """One id per symbol of `chars`, in that order: characters, or in a list strings of any length, of which the longest wins.

    eot=True adds an end-of-text id after the last.
    """

    def __init__(self, chars: str | list[str], eot: bool = False):
        self.chars = chars
        self.symbols = [*chars, EOT] if eot else list(chars)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.eot, self.n_vocab = self.ids.get(EOT), len(self.symbols)
        self.stops = () if self.eot is None else (self.eot,)
        longest_first = map(re.escape, sorted(filter(None, chars), key=len, reverse=True))
        self.pattern = "" if isinstance(chars, str) else "|".join([*longest_first, r"[\s\S]"])

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises UserError for a character outside the vocabulary."""
        text, pattern = replace_surrogates(text), self.pattern
        if special and self.eot is not None:
            pattern = "|".join((re.escape(EOT), pattern or r"[\s\S]"))
        symbols = re.findall(pattern, text) if pattern else text
        try:
            return [self.ids[symbol] for symbol in symbols]
        except KeyError as e:
            known = f"the {len(self.chars)} characters of the vocabulary: {self.chars!r}"
            raise UserError(f"character {e.args[0]!r} is not among {known}") from None

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        if self.pattern:
            separator = [] if self.eot is None else [self.eot]
            return np.array([i for text in texts for i in (*separator, *self.encode(text))], np.int64)
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
        return {"kind": "char", "chars": self.chars, "eot": self.eot is not None} | self.settings()

    def to_json(self) -> str:
        # Characters outside the vocabulary are removed: the unknown token, which the library asks for, would be a wrong id.
        codes = "".join(f"\\x{{{ord(c):x}}}" for c in set("".join(self.chars)))
        known = {"type": "Replace", "pattern": {"Regex": f"[^{codes}]"}, "content": ""}
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pattern or r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        }
        special = {} if self.eot is None else {EOT: self.eot}
        model = {"vocab": self.ids, "unk_token": EOT}
        return tokenizer_json("WordLevel", model, special, split, {"type": "Fuse"}, known)


class IdTokenizer(Tokenizer):
    """Texts that are whole numbers already, separated by white space: music, DNA, anything but language.

    The numbers 0 .. count - 1 are the ids; eot=True adds an end-of-text id after them.
    """

    def __init__(self, count: int, eot: bool = False):
        self.count, self.eot, self.n_vocab = count, count if eot else None, count + eot
        self.stops = (count,) if eot else ()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises UserError for what is no id."""
        words = text.replace(EOT, f" {self.eot} ").split() if special and self.eot else text.split()
        numbers = re.compile("[0-9]{1,12}")
        if bad := next((w for w in words if not numbers.fullmatch(w) or int(w) >= self.n_vocab), None):
            raise UserError(
                f"{bad[:30]!r} is not a token id: whole numbers from 0 to {self.count - 1}, with spaces between"
            )
        return [int(w) for w in words]

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        separator = [] if self.eot is None else [self.eot]
        return np.array([i for text in texts for i in (*separator, *self.encode(text))], np.int64)

    def token_bytes(self, i: int) -> bytes:
        return EOT.encode() if i == self.eot else f" {i}".encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode()

    def to_dict(self) -> dict:
        return {"kind": "ids", "count": self.count, "eot": self.eot is not None}

    def to_json(self) -> str:
        special = {} if self.eot is None else {EOT: self.eot}
        model = {"vocab": {str(i): i for i in range(self.count)} | special, "unk_token": EOT}
        return tokenizer_json("WordLevel", model, special, {"type": "WhitespaceSplit"}, None)


class BPETokenizer(Tokenizer):
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
        self.stops = (self.eot,)
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

    def is_merged(self) -> bool:
        """Whether every token is one byte or the sum of two others: not so with a vocabulary of whole words."""
        return all(
            len(t) == 1 or any(t[:n] in self.ranks and t[n:] in self.ranks for n in range(1, len(t)))
            for t in self.tokens
        )

    def token_bytes(self, i: int) -> bytes:
        return self.tokens[i] if i < self.eot else [EOT, *self.special_tokens][i - self.eot].encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        described = {"kind": self.kind, "pattern": self.pattern, "tokens": [t.decode("latin-1") for t in self.tokens]}
        described |= {"special_tokens": self.special_tokens} if self.special_tokens else {}
        return described | self.settings()

    def special_names(self) -> list[str]:
        return list(self.special)

    def to_json(self) -> str:
        symbols = {byte: symbol for symbol, byte in unicode_to_byte().items()}
        words = ["".join(symbols[b] for b in token) for token in self.tokens]
        halves = [(i, token[:n], token[n:]) for i, token in enumerate(self.tokens) for n in range(1, len(token))]
        pairs = sorted((i, self.ranks[a], self.ranks[b]) for i, a, b in halves if a in self.ranks and b in self.ranks)
        merges = [[words[left], words[right]] for _, left, right in pairs]
        model = {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges, "ignore_merges": True}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return tokenizer_json("BPE", model, self.special, split, split)


class PretrainedTokenizer(Tokenizer):
    """The tokenizer.json of a pretrained model, run by the tokenizers library. eot: the end-of-text token, or None."""

    def __init__(self, text: str, eot: str | None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a pretrained tokenizer needs the tokenizers package: pip install -e '.[bpe]'") from None
        self.text, self.eot_token = text, eot
        self.library = Tokenizer.from_str(text)
        self.plain = Tokenizer.from_str(text)  # spells special tokens out; of its own, since threads share a tokenizer
        self.plain.encode_special_tokens = True
        for library in (self.library, self.plain):
            library.no_truncation()  # neither is part of the vocabulary: texts would be cut and padded
            library.no_padding()
        vocab = self.library.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values()) + 1
        self.eot = vocab.get(eot)
        self.stops = () if self.eot is None else (self.eot,)
        fields = parse_json(text)
        self.special = {t["id"] for t in fields["added_tokens"]}  # spelled as they are
        self.marks = {t["id"] for t in fields["added_tokens"] if t.get("special")}
        # What the post-processor puts before a text. What it adds at the end would end a prompt before it began.
        encoded = self.library.encode("a")
        self.bos = tuple(encoded.ids[: sum(itertools.takewhile(bool, encoded.special_tokens_mask))])
        self.to_byte = unicode_to_byte() if '"ByteLevel"' in text else None
        kind, model = (fields.get("decoder") or {}).get("type"), fields["model"]
        self.suffix = model.get("end_of_word_suffix") or ""
        self.prefix = (model.get("continuing_subword_prefix") or "##") if kind == "WordPiece" else ""
        # Tokens that are whole words, which the library joins with spaces.
        self.joins_words = bool(self.prefix or self.suffix or (kind is None and model["type"] == "WordLevel"))

    def encode(self, text: str, special: bool = False) -> list[int]:
        library = self.library if special else self.plain
        return library.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> np.ndarray:
        encoded = self.plain.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([part for e in encoded for part in ([self.eot], e.ids)]).astype(np.int64)

    def token_bytes(self, i: int) -> bytes:
        token = self.library.id_to_token(i) or ""
        if i in self.special:
            return token.encode()
        if self.to_byte:
            return bytes(self.to_byte[c] for c in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        if self.suffix:
            return token.replace(self.suffix, " ").encode()
        if self.joins_words:
            return (
                token.removeprefix(self.prefix) if self.prefix and token.startswith(self.prefix) else " " + token
            ).encode()
        return token.replace("\u2581", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        if self.joins_words:
            return self.library.decode(list(map(int, ids)), skip_special_tokens=False)
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        return {"kind": "pretrained", "json": self.text, "eot": self.eot_token} | self.settings()

    def special_names(self) -> list[str]:
        """The tokens that mark something: not those that are text, as runs of spaces are in some vocabularies."""
        return [self.library.id_to_token(i) for i in sorted(self.marks | {*self.stops})]

    def to_json(self) -> str:
        return self.text


def tokenizer_json(model: str, fields: dict, special: dict[str, int], pre_tokenizer, decoder, normalizer=None) -> str:
    """A tokenizer.json for the tokenizers library: a model of this type with these fields, and special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in special.items()]
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer}
    parts |= {"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    return json.dumps(parts | {"model": {"type": model, **fields}}, ensure_ascii=False)


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's vocabulary, 50,257 ids, downloaded once by tiktoken. Raises UserError if the download fails."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:
        advice = "connect to the internet once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
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
    bounded = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_PIECE}}}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, bounded, pre_tokenizers.ByteLevel(False, use_regex=False)])
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
    """The tokenizer that to_dict() described. Raises UserError for what it cannot have described."""
    try:
        return _from_dict(d)
    except UserError:
        raise
    except Exception as e:  # the tokenizers library and tiktoken raise plain Exceptions
        raise UserError(f"the stored tokenizer is damaged: {first_line(e)}") from None


def _from_dict(d: dict) -> Tokenizer:
    kind = d.get("kind")
    if kind == "char":
        tokenizer = CharTokenizer(d["chars"], d["eot"])
    elif kind == "ids":
        tokenizer = IdTokenizer(d["count"], d["eot"])
    elif kind == "gpt2" and "tokens" not in d:  # files of other projects do not store the vocabulary
        tokenizer = gpt2_tokenizer()
    elif kind in ("gpt2", "bpe"):
        tokens = [t.encode("latin-1") for t in d["tokens"]]
        tokenizer = BPETokenizer(kind, d["pattern"], tokens, d.get("special_tokens", ()))
    elif kind == "pretrained":
        tokenizer = PretrainedTokenizer(d["json"], d["eot"])
    else:
        raise ValueError(f"unknown tokenizer kind {kind!r}")
    tokenizer.stops = tuple(d.get("stops", tokenizer.stops))
    tokenizer.chat_template, tokenizer.bos_token = d.get("chat_template", ""), d.get("bos_token")
    return tokenizer


def same_vocabulary(a: dict, b: dict) -> bool:
    """Whether two to_dict() descriptions mean the same by each id. Of GPT-2's vocabulary some files store only the kind."""
    a, b = ({k: v for k, v in d.items() if k not in ("stops", "chat_template", "bos_token")} for d in (a, b))
    if a == b or a["kind"] == b["kind"] == "gpt2":
        return True
    if {"kind": "gpt2"} in (a, b):  # not loaded, which may be a download, to see that the other has another size
        other = tokenizer_from_dict(b if a == {"kind": "gpt2"} else a)
        if other.n_vocab != 50257:
            return False
    first, second = tokenizer_from_dict(a), tokenizer_from_dict(b)
    ids = range(first.n_vocab)
    return first.n_vocab == second.n_vocab and all(first.token_bytes(i) == second.token_bytes(i) for i in ids)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a pretrained model, as the class that gives the same ids fastest. Raises UserError.

    Its stops are the end tokens that its tokenizer, config and generation config name.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json")
    try:
        text = file.read_text(encoding="utf-8")
        fields = parse_json(text)
        others = {name: beside(folder / f"{name}.json") for name in ("tokenizer_config", "config", "generation_config")}
        eot = others["tokenizer_config"].get("eos_token") or (EOT if f'"{EOT}"' in text else None)
        tokenizer = recognise(fields) or PretrainedTokenizer(text, eot["content"] if isinstance(eot, dict) else eot)
        stops = {*tokenizer.stops}
        for name in ("config", "generation_config"):
            ids = others[name].get("eos_token_id")
            stops |= {
                i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < tokenizer.n_vocab
            }
        tokenizer.stops = tuple(sorted(stops))
        tokenizer.chat_template = read_chat_template(folder, others["tokenizer_config"])
        if tokenizer.chat_template and not tokenizer.bos:
            bos = others["tokenizer_config"].get("bos_token") or ""
            tokenizer.bos_token = bos["content"] if isinstance(bos, dict) else bos
        return tokenizer
    except UserError:
        raise
    except Exception as e:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{file} is damaged: {first_line(e)}") from None


def read_chat_template(folder: Path, tokenizer_config: dict) -> str:
    """The chat template of a pretrained model, from either place where transformers keeps it; empty if it has none."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template") or ""
    if isinstance(found, list):  # several by name
        found = next((each["template"] for each in found if each.get("name") == "default"), "")
    if not isinstance(found, str):
        raise UserError(f"{folder}/tokenizer_config.json: chat_template is no text")
    return found


def beside(path: Path) -> dict:
    """The object of a JSON file that may be missing."""
    found = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return found


def recognise(fields: dict) -> Tokenizer | None:
    """The CharTokenizer or BPETokenizer that gives the same ids as a tokenizer.json, if one does."""
    model, added, split = fields["model"], fields["added_tokens"], fields.get("pre_tokenizer") or {}
    names = [token["content"] for token in added]
    if not isinstance(model.get("vocab"), dict):  # Unigram
        return None
    vocab = {token: i for token, i in model["vocab"].items() if token not in names}
    ordered = sorted(vocab, key=vocab.get)
    if sorted(vocab.values()) != list(range(len(vocab))):
        return None
    if [token["id"] for token in added] != [*range(len(vocab), len(vocab) + len(added))] or names[:1] not in (
        [],
        [EOT],
    ):
        return None
    is_char = model["type"] == "WordLevel" and split.get("pattern") == {"Regex": r"[\s\S]"}
    removes_others = (fields.get("normalizer") or {}).get("type") == "Replace"  # as CharTokenizer.to_json writes it
    if is_char and removes_others and len(names) < 2 and all(len(token) == 1 for token in ordered):
        return CharTokenizer("".join(ordered), bool(names))
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    merged_ids = [vocab.get(a + b, -1) for a, b in merges]
    is_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    # tiktoken merges by id, so the ids have to be in the order of the merges.
    if not is_gpt2 or fields.get("normalizer") is not None or merged_ids != sorted(merged_ids) or not names:
        return None
    # Only what BPETokenizer itself wrote has special tokens that are recognised in every text.
    if len(names) > 1 and not model.get("ignore_merges"):
        return None
    to_byte = unicode_to_byte()
    tokens = [bytes(to_byte[c] for c in token) for token in ordered]
    digest = hashlib.sha256(b"\n".join(tokens)).hexdigest()
    return BPETokenizer("gpt2" if digest == GPT2_SHA256 else "bpe", GPT2_PATTERN, tokens, names[1:])


TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
]


def download_tokenizer(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if Path(name).parent.is_dir():
        raise UserError(f"--tokenizer={name}: there is no such folder; prepare the dataset first if it is one")
    try:
        return Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
    except Exception as e:
        question = "is the name right, and the internet connected?"
        raise UserError(f"--tokenizer={name} cannot be read from the hub ({first_line(e)}): {question}") from None


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
    if kind == "ids":
        return IdTokenizer(
            1 + max((max(IdTokenizer(2**31).encode(text), default=0) for text in texts()), default=0), eot
        )
    if kind == "bpe":
        return train_bpe(first_characters((train_texts or texts)()), vocab_size, special_tokens)
    folder = Path(kind)
    if (folder / "meta.json").exists():  # a dataset
        return tokenizer_from_dict(read_json(folder / "meta.json").get("tokenizer", {}))
    if folder.is_dir() or "/" in kind:
        pretrained = read_tokenizer(folder if folder.is_dir() else download_tokenizer(kind))
        if pretrained.eot is None:
            raise UserError(f"--tokenizer={kind} has no end-of-text token to separate documents")
        return pretrained
    raise UserError(f"--tokenizer={kind}: choose gpt2, char, ids, bpe, or a folder with a tokenizer.json")


def first_characters(texts: Iterable[str]) -> Iterator[str]:
    """The texts up to MAX_BPE_CHARACTERS, in parts: a trainer takes a hundred bytes of memory per character of a part."""
    remaining = MAX_BPE_CHARACTERS
    for text in texts:
        for start in range(0, min(len(text), remaining), 2**20):
            yield text[start : min(start + 2**20, remaining)]
        remaining -= len(text)
        if remaining <= 0:
            return
