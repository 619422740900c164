import json
import pickle
import struct

import numpy as np
import pytest
from conftest import TEXT, make_nanogpt_chars

from data import (
    EOT,
    BPETokenizer,
    CharTokenizer,
    TrainingWindows,
    cut,
    finish_dataset,
    gpt2_tokenizer,
    load_dataset,
    open_shard,
    start_dataset,
    tokenizer_from_dict,
    train_bpe,
    validation_batches,
    validation_windows,
    word_tokenizer,
    write_shards,
)  # fmt: skip

STRANGE = "naïve café — “quotes” 日本語 🙂\t\n\r\n  spaces   " + EOT


def write(folder, arrays, vocab=1000, split="train", shard_tokens=100):
    folder.mkdir(exist_ok=True)
    return write_shards(folder, "d", split, arrays, vocab, shard_tokens)


# --- tokenizers


def test_gpt2_tokenizer_is_tiktokens():
    import tiktoken

    ours, theirs = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    assert (ours.n_vocab, ours.eot) == (50257, 50256)
    assert ours.encode(STRANGE) == theirs.encode_ordinary(STRANGE)
    assert ours.encode("a" + EOT, special=True) == [64, 50256]
    assert ours.decode(ours.encode(STRANGE)) == STRANGE


def test_trained_bpe_decodes_every_byte_string_it_encodes():
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

    from data import GPT2_PATTERN

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


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_bpe_refuses_to_train_on_nothing(texts):
    with pytest.raises(ValueError, match="no text"):
        train_bpe(texts, 300)


def test_bpe_vocabulary_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="257"):
        train_bpe([TEXT], 100)
    with pytest.raises(ValueError, match="at most"):
        train_bpe(["ab ab"], 300)


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("abc \n"), CharTokenizer("abc \n", eot=True), word_tokenizer("abc cab abc", 300)],
    ids=["char", "char+eot", "word"],
)
def test_a_tokenizer_survives_json(tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict() and again.n_vocab == tokenizer.n_vocab and again.eot == tokenizer.eot
    ids = again.encode("abc cab\n")
    assert again.decode(ids) == "abc cab\n" and b"".join(map(again.token_bytes, ids)) == b"abc cab\n"
    if again.eot is not None:
        assert again.encode("a" + EOT + "b", special=True)[1] == again.eot


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="'é' is not among the 3"):
        CharTokenizer("abc").encode("abcé")


def test_an_incomplete_byte_vocabulary_is_refused():
    with pytest.raises(ValueError, match="256 bytes"):
        BPETokenizer("bpe", ".", [b"a"])


# --- shards


def test_shards_hold_the_documents_in_order_and_meta_describes_them(tmp_path):
    documents = [np.arange(n) for n in (5, 250, 0, 45)]
    shards = write(tmp_path / "d", documents)
    assert [s["tokens"] for s in shards] == [100, 100, 100]
    assert [s["file"] for s in shards] == [f"d_train_{i:06d}.npy" for i in range(3)]
    read = np.concatenate([np.load(tmp_path / "d" / s["file"]) for s in shards])
    assert read.dtype == np.uint16 and np.array_equal(read, np.concatenate(documents))
    finish_dataset(tmp_path / "d", word_tokenizer("", 300), {"train": shards}, "test", {})
    dataset = load_dataset("d", tmp_path)
    assert sum(s.tokens for s in dataset.train) == 300 and dataset.vocab_size == 257
    with pytest.raises(ValueError, match="--overwrite"):
        start_dataset(tmp_path / "d")


def test_large_vocabularies_get_four_bytes_and_ids_outside_are_refused(tmp_path):
    write(tmp_path / "d", [np.array([70_000])], vocab=70_001)
    assert np.load(tmp_path / "d" / "d_train_000000.npy").tolist() == [70_000]
    for wrong in (1000, -1):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            write(tmp_path / "e", [np.array([1, wrong])])


def test_foreign_formats_are_read(tmp_path):
    tokens = np.arange(500, dtype=np.uint16)
    folder = tmp_path / "foreign"
    folder.mkdir()
    tokens.tofile(folder / "train.bin")
    np.save(folder / "edufineweb_train_000001.npy", tokens)
    for name, magic, array in (
        ("fineweb_val_000000.bin", 20240520, tokens),
        ("v.bin", 20240801, tokens.astype(np.uint32)),
    ):
        header = np.zeros(256, np.int32)
        header[:3] = magic, 1, 500
        (folder / name).write_bytes(header.tobytes() + array.tobytes())
    for name in ("train.bin", "edufineweb_train_000001.npy", "fineweb_val_000000.bin", "v.bin"):
        assert np.array_equal(open_shard(folder / name).map(), tokens), name
    dataset = load_dataset("foreign", tmp_path)
    assert len(dataset.train) == 2 and len(dataset.val) == 1
    assert dataset.tokenizer == {"kind": "gpt2"} and dataset.vocab_size == 50257


def test_nanogpt_characters_are_read(tmp_path):
    make_nanogpt_chars(tmp_path / "chars", TEXT)
    dataset = load_dataset("chars", tmp_path)
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    assert tokenizer.decode(dataset.train[0].map().tolist()) == TEXT[: int(len(TEXT) * 0.9)]
    assert dataset.vocab_size == len(set(TEXT))


def test_names_that_contain_the_other_split_do_not_mix_them(tmp_path):
    folder = tmp_path / "train"
    shards = {
        s: write_shards(folder, "train", s, [np.arange(50)], 300)
        for s in ("train", "val")
        if not folder.mkdir(exist_ok=True)
    }
    finish_dataset(folder, word_tokenizer("", 300), shards, "test", {})
    dataset = load_dataset("train", tmp_path)
    assert [s.path.name for s in dataset.train] == ["train_train_000000.npy"]
    assert [s.path.name for s in dataset.val] == ["train_val_000000.npy"]


def test_foreign_files_are_never_cleared_away(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    np.save(folder / "edufineweb_train_000001.npy", np.arange(9))
    with pytest.raises(ValueError, match="not ours to replace"):
        start_dataset(folder, overwrite=True)
    assert (folder / "edufineweb_train_000001.npy").exists()


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    make_nanogpt_chars(tmp_path / "chars", TEXT)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "chars" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Evil()}))
    with pytest.raises(ValueError, match="only plain dicts"):
        load_dataset("chars", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 5, 130, 300])
def test_a_truncated_shard_is_named(tmp_path, keep):
    write(tmp_path / "d", [np.arange(100)])
    path = tmp_path / "d" / "d_train_000000.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="d_train_000000.npy is (truncated|damaged)"):
        load_dataset("d", tmp_path)


def test_a_shard_that_meta_lists_but_is_gone_or_other_is_named(tmp_path):
    folder = tmp_path / "d"
    shards = write(folder, [np.arange(300)])
    finish_dataset(folder, word_tokenizer("", 300), {"train": shards}, "test", {})
    np.save(folder / "d_train_000001.npy", np.zeros(50, np.uint16))
    with pytest.raises(ValueError, match="000001.npy holds 50 tokens, meta.json says 100"):
        load_dataset("d", tmp_path)
    (folder / "d_train_000001.npy").unlink()
    with pytest.raises(ValueError, match="lacks d_train_000001.npy"):
        load_dataset("d", tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tinystories_synthetic", "prepare_tinystories.py --synthetic=True"),
        ("edu_fineweb10B", "build_fineweb_shards.py"),
        ("shakespeare_char", "prepare_text.py --input=FILE --dataset=shakespeare_char --tokenizer=char"),
    ],
)
def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path, name, command):
    with pytest.raises(ValueError, match=command):
        load_dataset(name, tmp_path)


# --- batch order


def numbered(tmp_path, lengths, T=8, **options):
    """Shards whose tokens are all different, so that a window tells where it is from."""
    folder = tmp_path / "n"
    folder.mkdir(exist_ok=True)
    begin = 0
    for n, length in enumerate(lengths):
        np.save(folder / f"n_train_{n:06d}.npy", np.arange(begin, begin + length, dtype=np.uint32))
        begin += length
    shards = [open_shard(p) for p in sorted(folder.glob("*.npy"))]
    return TrainingWindows(shards, T, 10**6, **options)


def test_batches_are_a_function_of_seed_and_number_alone(tmp_path):
    windows = numbered(tmp_path, (300, 200))
    x, y = windows.batch(0, 200)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    for first, count in ((150, 20), (3, 7), (60, 100), (0, 1)):  # in any order, over shard and epoch boundaries
        assert np.array_equal(windows.batch(first, count)[0], x[first : first + count])
    assert np.array_equal(numbered(tmp_path, (300, 200)).batch(10, 5)[0], x[10:15])
    assert not np.array_equal(numbered(tmp_path, (300, 200), seed=7).batch(0, 50)[0], x[:50])


def test_an_epoch_visits_every_window_of_its_grid_once_and_the_next_another_grid(tmp_path):
    windows = numbered(tmp_path, (300, 200))
    epochs = [windows.batch(e * windows.per_epoch, windows.per_epoch)[0] for e in range(6)]
    for epoch in epochs:
        seen = np.sort(epoch.ravel())
        assert len(np.unique(seen)) == len(seen) >= 500 - 4 * 8 - 2
    starts = [tuple(np.sort(epoch[:, 0])) for epoch in epochs]
    assert len(set(starts)) > 3
    covered = np.unique(np.concatenate([e.ravel() for e in epochs]))
    assert len(covered) > 490


def test_ranks_and_accumulation_share_out_the_same_step(tmp_path):
    windows = numbered(tmp_path, (3000,))

    def step(world, accumulation, batch_size=2, number=5):
        rows = []
        for micro in range(accumulation):
            for rank in range(world):
                place = (number * accumulation + micro) * world + rank
                rows.append(windows.batch(place * batch_size, batch_size)[0])
        return np.concatenate(rows)

    for world, accumulation in ((2, 4), (4, 2), (8, 1)):
        assert np.array_equal(step(world, accumulation), step(1, 8))


def test_long_files_are_read_in_chunks_that_lose_nothing(tmp_path):
    write(tmp_path / "d", [np.arange(1000) % 1000], shard_tokens=1000)
    (shard,) = load_dataset("d", tmp_path).train
    pieces = cut([shard], chunk=300)
    assert [p.tokens for p in pieces] == [300, 300, 300, 100]
    assert np.array_equal(np.concatenate([p.map() for p in pieces]), np.arange(1000))
    assert sum(p.tokens for p in cut([shard, shard], 0.75, 300)) == 1500


def test_a_fraction_of_the_data_is_its_first_part(tmp_path):
    windows = numbered(tmp_path, (300, 200), fraction=0.5)
    assert windows.batch(0, 500)[1].max() < 250


@pytest.mark.parametrize(("lengths", "works"), [((9,), True), ((8,), False), ((3, 9, 2), True), ((17,), True)])
def test_tiny_data_works_down_to_one_window(tmp_path, lengths, works):
    if works:
        x, y = numbered(tmp_path, lengths).batch(0, 50)
        assert x.shape == y.shape == (50, 8) and np.array_equal(x[:, 1:], y[:, :-1])
    else:
        with pytest.raises(ValueError, match="lower --block_size"):
            numbered(tmp_path, lengths)


def test_a_token_past_the_vocabulary_names_its_shard(tmp_path):
    windows = numbered(tmp_path, (300,))
    windows.vocab_size = 250
    with pytest.raises(ValueError, match=r"n_train_000000.npy holds token id 2\d\d, past the vocabulary of 250"):
        windows.batch(0, windows.per_epoch)


def test_validation_windows_are_fixed_cover_the_split_and_share_out_over_ranks(tmp_path):
    shards = numbered(tmp_path, (300, 201)).shards
    whole = validation_windows(shards, 8)
    assert len(whole) == 37 + 25
    x = np.concatenate([x for x, _ in validation_batches(whole, 8, 10**6, 5)])[: len(whole)]
    assert np.array_equal(x.ravel(), np.concatenate([np.arange(296), 300 + np.arange(200)]))
    assert validation_windows(shards, 8, 10) == validation_windows(shards, 8, 10)
    few = validation_windows(shards, 8, 10)
    assert len(few) == 10 and set(few) <= set(whole)
    targets = [y for rank in range(3) for _, y in validation_batches(whole, 8, 10**6, 5, rank, 3)]
    assert all(y.shape == (5, 8) for y in targets)
    assert sum((y >= 0).sum() for y in targets) == len(whole) * 8
    with pytest.raises(ValueError, match="lower --block_size"):
        validation_windows(shards, 400)


def test_headers_that_lie_are_refused(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(struct.pack("<3i", 20240520, 1, 1000) + bytes(1012) + bytes(100))
    with pytest.raises(ValueError, match="truncated"):
        open_shard(path)
