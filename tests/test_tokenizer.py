"""common/tokenizer.py: encoding and decoding, compared with tiktoken and the tokenizers library."""

import json

from conftest import TEXT

from common.chat import chat_prompt
from common.inference import prompt_ids, text_pieces
from common.tokenizer import (
    EOT,
    GPT2_PATTERN,
    LONGEST_PIECE,
    BPETokenizer,
    CharTokenizer,
    PretrainedTokenizer,
    gpt2_tokenizer,
    learn_tokenizer,
    read_tokenizer,
    same_vocabulary,
    tokenizer_from_dict,
    train_bpe,
    word_tokenizer,
)  # fmt: skip
from configurator import UserError

import numpy as np
import pytest

STRANGE = "naïve café — “quotes” 日本語 🙂\t\n\r\n  spaces   " + EOT


def test_gpt2_tokenizer_equals_tiktoken():
    import tiktoken

    ours, theirs = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    assert (ours.n_vocab, ours.eot) == (50257, 50256)
    assert ours.encode(STRANGE) == theirs.encode_ordinary(STRANGE)
    assert ours.encode("a" + EOT, special=True) == [64, 50256]
    assert ours.decode(ours.encode(STRANGE)) == STRANGE


def test_trained_bpe_round_trips_any_text():
    tokenizer = train_bpe([TEXT], 300)
    assert tokenizer.n_vocab == 300
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = rng.integers(0, 256, 40, dtype=np.uint8).tobytes().decode("utf-8", errors="replace")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(STRANGE)) == STRANGE
    assert b"".join(map(tokenizer.token_bytes, range(256, 299))).isascii()
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_trained_bpe_equals_the_tokenizers_library():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=349, initial_alphabet=alphabet, show_progress=False)
    )
    ours = train_bpe([TEXT], 350)
    assert ours.encode(TEXT + STRANGE) == theirs.encode(TEXT + STRANGE).ids


@pytest.mark.parametrize("texts", [[], [""], ["  \n"], ["ab ab"]])
def test_bpe_refuses_a_vocabulary_larger_than_the_text_supports(texts):
    with pytest.raises(UserError, match="--vocab_size=300 is more than this text supports, which is at most 2"):
        train_bpe(texts, 300)


def test_bpe_refuses_a_vocabulary_smaller_than_the_bytes():
    with pytest.raises(UserError, match="--vocab_size=100: the 256 bytes and the special tokens need 257"):
        train_bpe([TEXT], 100)


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("abc \n"),
        CharTokenizer("abc \n", eot=True),
        CharTokenizer(["abc", " ", "c", "cab", "\n"]),
        word_tokenizer("abc cab abc", 300),
        train_bpe([TEXT], 300, ["<|user|>"]),
    ],
    ids=["char", "char+eot", "strings", "word", "bpe+special"],
)
def test_a_tokenizer_round_trips_through_json(tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict() and again.n_vocab == tokenizer.n_vocab and again.eot == tokenizer.eot
    ids = again.encode("abc cab\n")
    assert again.decode(ids) == "abc cab\n" and b"".join(map(again.token_bytes, ids)) == b"abc cab\n"
    if again.eot is not None:
        assert again.encode("a" + EOT + "b", special=True)[1] == again.eot


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(UserError, match="'é' is not among the 3"):
        CharTokenizer("abc").encode("abcé")
    with pytest.raises(UserError, match="'é' is not among the 3"):
        CharTokenizer("abc").encode_batch(["abc", "abcé"])


def test_an_incomplete_byte_vocabulary_is_refused():
    with pytest.raises(ValueError, match="256 bytes"):
        BPETokenizer("bpe", ".", [b"a"])


def test_special_tokens_are_never_split_and_not_part_of_the_training_text():
    text = "<|user|>" + TEXT[:50] + "<|bot|>" + TEXT[50:90]
    tokenizer = train_bpe([text * 20, TEXT], 300, ["<|user|>", "<|bot|>"])
    assert tokenizer.n_vocab == 300 and tokenizer.eot == 297
    ids = tokenizer.encode(text)
    assert ids[0] == 298 and ids.count(299) == 1 and tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]).tolist() == [297, *ids]
    assert not any(b"user" in t or b"bot" in t for t in tokenizer.tokens)
    with pytest.raises(UserError, match="need 259"):
        train_bpe([TEXT], 258, ["<|user|>", "<|bot|>"])


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "bpe+special", "word", "char", "char+eot"])
def test_tokenizer_json_works_in_the_tokenizers_library(kind, tmp_path):
    from tokenizers import Tokenizer

    makers = {
        "gpt2": gpt2_tokenizer,
        "bpe": lambda: train_bpe([TEXT], 350),
        "bpe+special": lambda: train_bpe([TEXT], 350, ["<|user|>"]),
        "word": lambda: word_tokenizer(TEXT, 300),
        "char": lambda: CharTokenizer("".join(sorted(set(TEXT)))),
        "char+eot": lambda: CharTokenizer("".join(sorted(set(TEXT))), eot=True),
    }
    ours = makers[kind]()
    text = TEXT[:3000] if "char" in kind else TEXT[:3000] + STRANGE.removesuffix(EOT) + " unheard-of words aabbabab"
    theirs = Tokenizer.from_str(ours.to_json())
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text and theirs.get_vocab_size() == ours.n_vocab
    if ours.eot is not None:
        assert theirs.encode(EOT).ids == [ours.eot]
    if kind == "bpe+special":
        assert theirs.encode("a<|user|>b").ids == ours.encode("a<|user|>b")
    (tmp_path / "tokenizer.json").write_text(ours.to_json(), encoding="utf-8")
    again = read_tokenizer(tmp_path)
    assert again.encode(text) == ours.encode(text) and again.decode(again.encode(text)) == text
    assert again.to_dict() | {"pattern": 0} == ours.to_dict() | {"pattern": 0}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": {"vocab": {}}, "added_tokens": []}'])
def test_a_missing_or_damaged_tokenizer_json_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="has no tokenizer.json" if content is None else "tokenizer.json is damaged"):
        read_tokenizer(tmp_path)


def test_vocabularies_are_compared_by_content_except_gpt2():
    gpt2, ab, abc = gpt2_tokenizer().to_dict(), CharTokenizer("ab").to_dict(), CharTokenizer("abc").to_dict()
    assert same_vocabulary(gpt2, {"kind": "gpt2"}) and same_vocabulary({"kind": "gpt2"}, gpt2)
    assert same_vocabulary(ab, dict(ab)) and not same_vocabulary(ab, abc) and not same_vocabulary(gpt2, ab)
    bpe = train_bpe([TEXT], 350, ["<|user|>"])
    foreign = PretrainedTokenizer(bpe.to_json(), EOT).to_dict()
    assert foreign["kind"] == "pretrained" and same_vocabulary(foreign, bpe.to_dict())
    assert not same_vocabulary(foreign, train_bpe([TEXT], 350, ["<|bot|>"]).to_dict())
    assert not same_vocabulary(foreign, {"kind": "gpt2"})


def foreign_tokenizer(kind: str, folder=None):
    """A small tokenizer of the tokenizers library, trained on TEXT."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    options = dict(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    model, trainer, decoder = {
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**options), decoders.WordPiece()),
        "suffix": (
            models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
            trainers.BpeTrainer(end_of_word_suffix="</w>", **options),
            decoders.BPEDecoder(),
        ),
        "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**options), None),
        "unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **options), decoders.Metaspace()),
    }[kind]
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.Whitespace()
    if kind == "wordpiece":
        library.normalizer = normalizers.Lowercase()
    if decoder:
        library.decoder = decoder
    library.train_from_iterator([TEXT], trainer)
    return library


@pytest.mark.parametrize("kind", ["wordpiece", "suffix", "wordlevel", "unigram"])
def test_tokenizers_of_other_kinds_print_what_their_library_prints(kind, tmp_path):
    library = foreign_tokenizer(kind)
    (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours, text = read_tokenizer(tmp_path), "the quick brown fox jumps over lazy dogs"
    ids = library.encode(text).ids
    assert ours.encode(text) == ids and len(ids) > 5
    assert ours.decode(ids).strip() == library.decode(ids) == text
    streamed = "".join(text_pieces(ours, ids))
    assert streamed.strip() == text, streamed


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off(tmp_path):
    library = foreign_tokenizer("unigram")
    library.enable_truncation(8)
    library.enable_padding(length=8, pad_id=0)
    ours = PretrainedTokenizer(library.to_str(), "</s>")
    library.no_truncation(), library.no_padding()
    for text in (TEXT[:500], "a"):
        assert ours.encode(text) == library.encode(text).ids
        assert ours.encode_batch([text, text]).tolist() == 2 * [ours.eot, *library.encode(text).ids]


def test_a_prompt_keeps_the_start_token_a_model_asks_for_but_not_an_end_token(tmp_path):
    from tokenizers import processors

    library = foreign_tokenizer("unigram")
    plain = library.encode("the dogs").ids
    specials = [("<s>", 1), ("</s>", 2)]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    ours = PretrainedTokenizer(library.to_str(), "</s>")
    assert prompt_ids(ours, "the dogs") == [1, *plain] and ours.encode("the dogs") == plain
    assert prompt_ids(ours, "") == [1] and list(ours.bos) == [1]
    ids, _ = chat_prompt(ours, [], "the", 100, is_chat=True)
    assert ids == [1, *ours.encode("User: the\nAssistant:")]


def test_the_end_tokens_are_those_of_tokenizer_config_and_generation_config(tmp_path):
    (tmp_path / "tokenizer.json").write_text(foreign_tokenizer("unigram").to_str(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 10000000]}')
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.eot == 2 and tokenizer.stops == (2, 5, 7)
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))).stops == (2, 5, 7)
    (tmp_path / "tokenizer.json").write_text(train_bpe([TEXT], 300).to_json(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).stops == (2, 5, 7, 299)


def test_half_a_surrogate_pair_is_replaced_in_every_kind(tmp_path):
    text = "the \ud83d dogs"
    for tokenizer in (train_bpe([TEXT], 300), PretrainedTokenizer(foreign_tokenizer("unigram").to_str(), "</s>")):
        assert tokenizer.encode(text) == tokenizer.encode("the \ufffd dogs")
    assert CharTokenizer("ab\ufffd").encode("a\ud83d") == [0, 2]


def test_characters_outside_the_vocabulary_of_an_export_are_left_out_not_end_of_text():
    from tokenizers import Tokenizer

    for eot in (False, True):
        ours = CharTokenizer("ab ^]\\-\n", eot)
        theirs = Tokenizer.from_str(ours.to_json())
        assert theirs.encode("a é^]\\-\nbz").ids == ours.encode("a ^]\\-\nb")


def test_what_no_string_of_a_vocabulary_matches_is_named_not_left_out():
    strings = CharTokenizer(["the", " ", "cat", "\n"], eot=True)
    assert strings.encode("the cat\n") == [0, 1, 2, 3] and strings.encode("cat" + EOT, special=True) == [2, 4]
    with pytest.raises(UserError, match="character 'd' is not among"):
        strings.encode("the dog")


def test_a_foreign_character_tokenizer_with_an_unknown_token_is_used_as_it_is(tmp_path):
    fields = json.loads(CharTokenizer("abc").to_json())
    fields["normalizer"] = {"type": "Lowercase"}
    fields["model"] |= {"vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.to_dict()["kind"] == "pretrained" and tokenizer.encode("Ax") == [1, 0]


def test_ids_are_a_vocabulary_of_numbers():
    ids = learn_tokenizer("ids", 0, lambda: ["3 1 4", "1 5\n9"], eot=True)
    assert (ids.n_vocab, ids.eot) == (11, 10) and ids.encode("9 0\n3") == [9, 0, 3]
    assert ids.encode_batch(["1 2", "3"]).tolist() == [10, 1, 2, 10, 3] and ids.decode([1, 2, 9]) == " 1 2 9"
    assert same_vocabulary(ids.to_dict(), tokenizer_from_dict(ids.to_dict()).to_dict())
    for bad in ("1 x", "-1", "11", "1.5", "٣", "9" * 5000):
        with pytest.raises(UserError, match="is not a token id"):
            ids.encode(bad)


def test_a_run_without_a_break_is_learned_from_in_bounded_pieces():
    tokenizer = train_bpe(["AC" * 50_000, TEXT], 300)  # as one piece, training time would grow with its square
    assert 1 < max(map(len, tokenizer.tokens)) <= LONGEST_PIECE
    assert tokenizer.decode(tokenizer.encode("AC" * 1000)) == "AC" * 1000
