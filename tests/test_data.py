import json
import pickle
import struct

from conftest import TEXT, make_nanogpt_chars

from common.corpus import DatasetWriter, check_replaceable
from common.shards import ShardWriter, load_dataset, load_mixture, open_shard
from common.tokenizer import tokenizer_from_dict, word_tokenizer
from common.windows import Batches, MixedWindows, TrainingWindows, split_shards, validation_batches, validation_windows
from configurator import UserError

import numpy as np
import pytest
import torch


def write(folder, arrays, vocab=1000, split="train", shard_tokens=100):
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, lambda n: f"{folder.name}_{split}_{n:06d}.npy", vocab, shard_tokens)
    for ids in arrays:
        writer.add(ids)
    writer.finish()
    return writer.shards


def write_meta(folder, **shards):
    tokenizer = word_tokenizer("", 300)
    meta = {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.n_vocab, "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_shards_hold_the_documents_in_order_and_meta_json_describes_them(tmp_path):
    documents = [np.arange(n) for n in (5, 250, 0, 45)]
    shards = write(tmp_path / "d", documents)
    assert [s["tokens"] for s in shards] == [100, 100, 100]
    assert [s["file"] for s in shards] == [f"d_train_{i:06d}.npy" for i in range(3)]
    read = np.concatenate([np.load(tmp_path / "d" / s["file"]) for s in shards])
    assert read.dtype == np.uint16 and np.array_equal(read, np.concatenate(documents))
    write_meta(tmp_path / "d", train=shards)
    dataset = load_dataset("d", tmp_path)
    assert sum(s.tokens for s in dataset.train) == 300 and dataset.vocab_size == 257
    with pytest.raises(UserError, match="--overwrite"):
        check_replaceable(tmp_path / "d", overwrite=False)


def test_large_vocabularies_take_four_bytes_and_ids_outside_are_refused(tmp_path):
    write(tmp_path / "d", [np.array([70_000])], vocab=70_001)
    assert np.load(tmp_path / "d" / "d_train_000000.npy").tolist() == [70_000]
    for wrong in (1000, -1):
        with pytest.raises(UserError, match="outside the vocabulary"):
            write(tmp_path / "e", [np.array([1, wrong])])


def test_the_formats_of_nanogpt_build_nanogpt_and_llmc_are_read(tmp_path):
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


def test_nanogpts_character_datasets_are_read(tmp_path):
    make_nanogpt_chars(tmp_path / "chars", TEXT)
    dataset = load_dataset("chars", tmp_path)
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    assert tokenizer.decode(dataset.train[0].map().tolist()) == TEXT[: int(len(TEXT) * 0.9)]
    assert dataset.vocab_size == len(set(TEXT))


def test_a_dataset_named_train_keeps_its_splits_apart(tmp_path):
    folder = tmp_path / "train"
    write_meta(folder, **{s: write(folder, [np.arange(50)], 300, s) for s in ("train", "val")})
    dataset = load_dataset("train", tmp_path)
    assert [s.path.name for s in dataset.train] == ["train_train_000000.npy"]
    assert [s.path.name for s in dataset.val] == ["train_val_000000.npy"]


def test_overwriting_never_deletes_files_of_others(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    np.save(folder / "edufineweb_train_000001.npy", np.arange(9))
    with pytest.raises(UserError, match="not ours to replace"):
        DatasetWriter(folder, {}, lambda: word_tokenizer("", 300), overwrite=True)
    assert (folder / "edufineweb_train_000001.npy").exists()


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    make_nanogpt_chars(tmp_path / "chars", TEXT)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "chars" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Evil()}))
    with pytest.raises(UserError, match="only plain dicts"):
        load_dataset("chars", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({"vocab_size": 4, "itos": {0: "the", 1: " ", 2: "cat", 3: "a"}}, "the cat"),
        ({"vocab_size": 4, "itos": ["the", " ", "cat", "a"]}, "the cat"),
        ({"vocab_size": 4, "itos": {n: n for n in range(4)}}, " 0 1 2"),
        ({"vocab_size": 4}, " 0 1 2"),
    ],
)
def test_a_meta_pkl_with_longer_tokens_or_numbers_is_read_as_what_it_is(tmp_path, meta, text):
    make_nanogpt_chars(tmp_path / "d", TEXT)
    (tmp_path / "d" / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = tokenizer_from_dict(load_dataset("d", tmp_path).tokenizer)
    assert tokenizer.n_vocab == 4 and tokenizer.decode([0, 1, 2]) == text and tokenizer.encode(text) == [0, 1, 2]


@pytest.mark.parametrize(
    "meta", [{}, {"vocab_size": "x"}, {"vocab_size": 3, "itos": {0: "a"}}, [1], {"vocab_size": -1}]
)
def test_a_meta_pkl_of_something_else_is_refused(tmp_path, meta):
    make_nanogpt_chars(tmp_path / "d", TEXT)
    (tmp_path / "d" / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="meta.pkl is not nanoGPT's"):
        load_dataset("d", tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 130, 300])
def test_a_truncated_shard_is_named(tmp_path, keep):
    write(tmp_path / "d", [np.arange(100)])
    path = tmp_path / "d" / "d_train_000000.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="d_train_000000.npy is (truncated|damaged)"):
        load_dataset("d", tmp_path)


def test_a_shard_that_is_missing_or_differs_from_meta_json_is_named(tmp_path):
    folder = tmp_path / "d"
    shards = write(folder, [np.arange(300)])
    write_meta(folder, train=shards)
    np.save(folder / "d_train_000001.npy", np.zeros(50, np.uint16))
    with pytest.raises(UserError, match="000001.npy holds 50 tokens, meta.json says 100"):
        load_dataset("d", tmp_path)
    (folder / "d_train_000001.npy").unlink()
    with pytest.raises(UserError, match="lacks d_train_000001.npy"):
        load_dataset("d", tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tinystories_synthetic", "prepare_tinystories.py --synthetic=True"),
        ("edu_fineweb10B", "build_fineweb_shards.py"),
        ("shakespeare_char", "prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char"),
    ],
)
def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path, name, command):
    with pytest.raises(UserError, match=command):
        load_dataset(name, tmp_path)


# --- batch order


def numbered(tmp_path, lengths, T=8, **options):
    """Shards whose tokens all differ, so that a window tells its place."""
    folder = tmp_path / "n"
    folder.mkdir(exist_ok=True)
    begin = 0
    for n, length in enumerate(lengths):
        np.save(folder / f"n_train_{n:06d}.npy", np.arange(begin, begin + length, dtype=np.uint32))
        begin += length
    shards = [open_shard(p) for p in sorted(folder.glob("*.npy"))]
    return TrainingWindows(shards, T, 10**6, **options)


def test_batches_are_a_function_of_the_seed_and_the_position_alone(tmp_path):
    windows = numbered(tmp_path, (300, 200))
    x, y = windows.batch(0, 200)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    for first, count in ((150, 20), (3, 7), (60, 100), (0, 1)):  # in any order, across shards and epochs
        assert np.array_equal(windows.batch(first, count)[0], x[first : first + count])
    assert np.array_equal(numbered(tmp_path, (300, 200)).batch(10, 5)[0], x[10:15])
    assert not np.array_equal(numbered(tmp_path, (300, 200), seed=7).batch(0, 50)[0], x[:50])


def test_an_epoch_visits_every_window_of_its_grid_once_and_each_epoch_has_another_grid(tmp_path):
    windows = numbered(tmp_path, (300, 200))
    epochs = [windows.batch(e * windows.per_epoch, windows.per_epoch)[0] for e in range(6)]
    for epoch in epochs:
        seen = np.sort(epoch.ravel())
        assert len(np.unique(seen)) == len(seen) >= 500 - 4 * 8 - 2
    starts = [tuple(np.sort(epoch[:, 0])) for epoch in epochs]
    assert len(set(starts)) > 3
    covered = np.unique(np.concatenate([e.ravel() for e in epochs]))
    assert len(covered) > 490


def test_any_number_of_ranks_reads_the_same_sequences_in_a_step(tmp_path):
    windows = numbered(tmp_path, (3000,))

    def step(world_size, grad_accum_steps, position=5 * 16):
        rows = []
        for micro in range(grad_accum_steps):
            for rank in range(world_size):
                batches = Batches(windows, 2, torch.device("cpu"), rank, world_size)
                rows.append(batches.load(batches.first_sequence(position, micro))[0].numpy())
        return np.concatenate(rows)

    assert np.array_equal(step(1, 8), windows.batch(80, 16)[0])
    for world_size, grad_accum_steps in ((2, 4), (4, 2), (8, 1)):
        assert np.array_equal(step(world_size, grad_accum_steps), step(1, 8))


def test_a_prefetched_batch_is_the_one_that_is_taken(tmp_path):
    batches = Batches(numbered(tmp_path, (3000,)), 2, torch.device("cpu"), 0, 1)
    expected = {first: batches.load(first) for first in (4, 6)}
    batches.prefetch(4)
    prefetched = batches.prefetched[1]
    assert batches.load(4) is prefetched
    for first in (4, 6):  # another than the prefetched one is loaded
        assert all(torch.equal(a, b) for a, b in zip(batches.load(first), expected[first]))


def test_long_files_are_split_without_losing_tokens(tmp_path):
    write(tmp_path / "d", [np.arange(1000) % 1000], shard_tokens=1000)
    (shard,) = load_dataset("d", tmp_path).train
    pieces = split_shards([shard], chunk=300)
    assert [p.tokens for p in pieces] == [300, 300, 300, 100]
    assert np.array_equal(np.concatenate([p.map() for p in pieces]), np.arange(1000))
    assert sum(p.tokens for p in split_shards([shard, shard], 0.75, 300)) == 1500


def test_a_fraction_of_the_data_is_its_first_part(tmp_path):
    windows = numbered(tmp_path, (300, 200), fraction=0.5)
    assert windows.batch(0, 500)[1].max() < 250


@pytest.mark.parametrize(("lengths", "works"), [((9,), True), ((8,), False), ((3, 9, 2), True), ((17,), True)])
def test_data_as_short_as_one_window_works(tmp_path, lengths, works):
    if works:
        x, y = numbered(tmp_path, lengths).batch(0, 50)
        assert x.shape == y.shape == (50, 8) and np.array_equal(x[:, 1:], y[:, :-1])
    else:
        with pytest.raises(UserError, match="lower --block_size"):
            numbered(tmp_path, lengths)


def test_a_token_outside_the_vocabulary_names_its_shard(tmp_path):
    windows = numbered(tmp_path, (300,))
    windows.vocab_size = 250
    with pytest.raises(UserError, match=r"n_train_000000.npy holds token id 2\d\d, outside the vocabulary of 250"):
        windows.batch(0, windows.per_epoch)


def test_validation_windows_are_fixed_cover_the_split_and_are_shared_by_the_ranks(tmp_path):
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
    with pytest.raises(UserError, match="lower --block_size"):
        validation_windows(shards, 400)


def test_a_file_shorter_than_its_header_says_is_refused(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(struct.pack("<3i", 20240520, 1, 1000) + bytes(1012) + bytes(100))
    with pytest.raises(UserError, match="truncated"):
        open_shard(path)


def test_a_shard_writer_resumes_at_any_number_of_ids(tmp_path):
    """A writer recorded `known` ids, wrote on to `written` and died: the next one writes again what was not recorded."""
    ids = np.arange(1000) % 777
    (tmp_path / "whole").mkdir()
    whole = ShardWriter(tmp_path / "whole", "{:06d}.npy".format, 1000, 100)
    whole.add(ids)
    whole.finish()
    for known, written in ((0, 50), (37, 37), (37, 70), (130, 199), (130, 420), (100, 100), (250, 1000)):
        folder = tmp_path / f"{known}-{written}"
        folder.mkdir()
        first = ShardWriter(folder, "{:06d}.npy".format, 1000, 100)
        first.add(ids[:known])
        first.sync()
        state = {"shards": list(first.shards), "filled": first.filled}
        first.add(ids[known:written])
        first.sync()
        second = ShardWriter(folder, "{:06d}.npy".format, 1000, 100, **state)
        assert second.tokens == known
        second.add(ids[known:])
        second.finish()
        assert second.shards == whole.shards
        for shard in whole.shards:
            assert (folder / shard["file"]).read_bytes() == (tmp_path / "whole" / shard["file"]).read_bytes()
        assert not list(folder.glob("*.part"))


# --- mixtures


def mixed(tmp_path, weights, T=8):
    """Two datasets whose tokens tell them apart: below 1000 and from 1000 on."""
    parts = []
    for n, length in enumerate((900, 300)):
        folder = tmp_path / f"m{n}"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"m{n}_train_000000.npy", np.arange(1000 * n, 1000 * n + length, dtype=np.uint16))
        shards = [open_shard(p) for p in folder.glob("*.npy")]
        parts.append(TrainingWindows(shards, T, 2000))
    return MixedWindows(parts, weights, seed=3)


def test_a_mixture_keeps_its_weights_in_every_stretch(tmp_path):
    windows = mixed(tmp_path, (0.7, 0.3))
    rows = np.concatenate([windows.batch(n * 100, 100)[0] for n in range(100)])
    second = rows[:, 0] >= 1000
    assert second.mean() == pytest.approx(0.3, abs=0.001)
    for stretch in second.reshape(-1, 500):
        assert 0.2 < stretch.mean() < 0.4
    with pytest.raises(UserError):
        mixed(tmp_path, (0.0, 0.0))


def test_a_mixtures_windows_depend_on_their_position_alone_and_keep_each_datasets_order(tmp_path):
    windows = mixed(tmp_path, (3, 1))
    rows = np.concatenate([windows.batch(n, 1)[0] for n in range(3000)])
    for part, chosen in enumerate((rows[:, 0] < 1000, rows[:, 0] >= 1000)):
        own = rows[chosen]
        assert np.array_equal(own, windows.parts[part].batch(0, len(own))[0])
    for first, count in ((0, 10), (500, 64), (2040, 20), (2900, 100)):  # across the ends of blocks and epochs
        x, y = windows.batch(first, count)
        assert np.array_equal(x[:, 1:], y[:, :-1])
        assert sorted(map(tuple, x)) == sorted(map(tuple, rows[first : first + count]))


def test_a_mixture_needs_names_weights_and_one_vocabulary(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name / "train.bin")
    make_nanogpt_chars(tmp_path / "chars", TEXT)
    found = load_mixture("a:3,b:1", tmp_path)
    assert [(d.name, w) for d, w in found] == [("a", 0.75), ("b", 0.25)]
    assert [(d.name, w) for d, w in load_mixture("a", tmp_path)] == [("a", 1.0)]
    for wrong, words in (
        ("a:1,chars:1", "a and chars have different vocabularies"),
        ("a:1,b:x", "a number above 0"),
        ("a:1,b:-1", "a number above 0"),
        ("a:1,a:2", "is named twice"),
        ("a,c", "there is no dataset"),
    ):
        with pytest.raises(UserError, match=words):
            load_mixture(wrong, tmp_path)
