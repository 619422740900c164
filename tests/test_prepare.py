"""prepare_text.py and prepare_tinystories.py: what they write, and what they refuse."""

import json
import random
import re

import numpy as np
import pytest
from conftest import SMALL, TEXT

import prepare_tinystories
from data import load_dataset, tokenizer_from_dict


def read(dataset, split):
    return np.concatenate([s.map() for s in getattr(dataset, split)])


def test_a_single_text_is_cut_and_its_end_is_validation(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--input=book.txt", "--dataset=book", "--tokenizer=char")
    dataset = load_dataset("book", tmp_path / "data")
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    cut = int(len(TEXT) * 0.9)
    assert (
        tokenizer.decode(read(dataset, "train")) == TEXT[:cut] and tokenizer.decode(read(dataset, "val")) == TEXT[cut:]
    )
    assert dataset.vocab_size == len(set(TEXT)) and tokenizer.eot is None


@pytest.mark.parametrize(
    "options", [["--tokenizer=gpt2"], ["--tokenizer=bpe", "--vocab_size=300"], ["--tokenizer=char"]]
)
def test_documents_are_separated_and_none_is_in_both_splits(run, tmp_path, options):
    texts = [f"document {n}: " + "words " * (n % 5) + f"end {n}." for n in range(100)]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:60] + texts[:10] + [""]))
    for n, t in enumerate(texts[60:]):
        (folder / f"b{n}.txt").write_text(t)
    run("prepare_text.py", "--input=texts", "--dataset=d", *options)
    dataset = load_dataset("d", tmp_path / "data")
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    found = {}
    for split in ("train", "val"):
        ids = read(dataset, split)
        assert ids[0] == tokenizer.eot
        found[split] = tokenizer.decode(ids.tolist()).split("<|endoftext|>")[1:]
    assert sorted(found["train"] + found["val"]) == sorted(texts + texts[:10])
    assert not set(found["train"]) & set(found["val"]) and found["val"]


def test_own_text_trains_and_samples_end_to_end(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--input=book.txt", "--tokenizer=bpe", "--vocab_size=280")
    run("train.py", *SMALL, "--dataset=book")
    assert run("sample.py", "--start=line", "--max_new_tokens=5", "--device=cpu").startswith("line")


def test_preparing_the_same_input_twice_gives_the_same_bytes(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    for name in ("one", "two"):
        run("prepare_text.py", "--input=book.txt", f"--dataset={name}", "--tokenizer=bpe", "--vocab_size=280")
    for split in ("train", "val"):
        a, b = (tmp_path / "data" / n / f"{n}_{split}_000000.npy" for n in ("one", "two"))
        assert a.read_bytes() == b.read_bytes()


def test_of_a_few_documents_one_at_least_is_held_out(run, tmp_path):
    for n in range(3):
        (tmp_path / "three.txt").write_text("one story.<|endoftext|>another story.<|endoftext|>the third.")
        run(
            "prepare_text.py",
            "--input=three.txt",
            "--tokenizer=char",
            f"--seed={n}",
            f"--dataset=d{n}",
            "--val_fraction=0.05",
        )
        tokens = json.loads((tmp_path / "data" / f"d{n}" / "meta.json").read_text())["tokens"]
        assert tokens["train"] > 0 and tokens["val"] > 0


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("", [], "there is no text in in.txt"),
        ("  \n", [], "there is no text in in.txt"),
        ("x", [], "cannot be split"),
        (TEXT, ["--input=gone.txt"], "--input=gone.txt: there is no such file"),
        (TEXT, ["--input=empty"], "no .txt or .jsonl file"),
        (TEXT, ["--input="], "--input=FILE"),
        (TEXT, ["--tokenizer=word"], "--tokenizer=word: choose gpt2, char, bpe, or a folder"),
        (TEXT, ["--tokenizer=bpe", "--vocab_size=100"], "--vocab_size=100"),
        (TEXT, ["--tokenizer=bpe", "--vocab_size=50000"], "more than this text supports"),
        (TEXT, ["--val_fraction=1.5"], "--val_fraction=1.5"),
        (b"\xff\xfe\x00", [], "in.txt is not UTF-8 text"),
    ],
)
def test_bad_input_is_told_in_one_line(refused, tmp_path, content, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused("prepare_text.py", "--input=in.txt", "--tokenizer=char", *arguments)
    assert not (tmp_path / "data" / "in" / "meta.json").exists()


def test_a_broken_line_of_jsonl_is_named(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    message = refused("prepare_text.py", "--input=a.jsonl", "--tokenizer=char")
    assert "a.jsonl, line 2" in message and "--text_field" in message


def test_a_dataset_that_is_there_is_kept_unless_told(run, refused, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    run("prepare_text.py", "--input=a.txt", "--tokenizer=char")
    assert "--overwrite" in refused("prepare_text.py", "--input=a.txt", "--tokenizer=char")
    run("prepare_text.py", "--input=a.txt", "--tokenizer=char", "--overwrite=True")


# --- the stories


def test_the_same_seed_writes_the_same_stories_and_splits_are_disjoint(run, tmp_path):
    for name in ("a", "b"):
        printed = run("prepare_tinystories.py", "--synthetic=True", "--max_docs=300", f"--dataset={name}")
    assert "300 stories" in printed
    a, b = (load_dataset(n, tmp_path / "data") for n in ("a", "b"))
    assert np.array_equal(read(a, "train"), read(b, "train"))
    tokenizer = tokenizer_from_dict(a.tokenizer)
    train, val = (set(tokenizer.decode(read(a, s).tolist()).split("<|endoftext|>")[1:]) for s in ("train", "val"))
    assert len(val) == 15 and len(train) == 285 and not train & val


def test_stories_are_varied_and_agree_with_themselves():
    rng = random.Random(1)
    stories = [prepare_tinystories.story(rng) for _ in range(3000)]
    assert len(set(stories)) == len(stories)
    for text in stories:
        assert not re.search(r"[{}]|\b[Aa] [aeiouAEIOU]|\ban [^aeiou]|  ", text), text
        assert not re.search(r"(?:^|[.!?] |\n)[a-z]", text), text
        people = set(re.findall(r"\b[A-Z][a-z]+\b", text)) & set(prepare_tinystories.GIRLS + prepare_tinystories.BOYS)
        assert 1 <= len(people) <= 2, text
        if (
            people <= set(prepare_tinystories.GIRLS)
            and "dad" not in text
            and "grandpa" not in text
            and "uncle" not in text
        ):
            assert not re.search(r"\b([Hh]e|[Hh]is|him)\b", text), text


def test_only_the_embedded_stories_are_made_so_far_and_it_says_so(refused):
    assert "--synthetic=True" in refused("prepare_tinystories.py")
