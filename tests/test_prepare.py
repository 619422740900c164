"""prepare_text.py and prepare_tinystories.py: what they write, and what they refuse."""

import hashlib
import http.server
import json
import random
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SMALL, TEXT, Script, call

import prepare_tinystories
from common.corpus import DatasetWriter, Unique, counted, document_hash, download, split_text
from common.shards import load_dataset
from common.tokenizer import tokenizer_from_dict, word_tokenizer


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
    assert sorted(found["train"] + found["val"]) == sorted(texts)  # the ten that came twice are there once
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
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}
    assert "nothing to do" in run("prepare_text.py", "--input=a.txt", "--tokenizer=char")
    assert "--overwrite" in refused("prepare_text.py", "--input=a.txt", "--tokenizer=bpe", "--vocab_size=280")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before
    run("prepare_text.py", "--input=a.txt", "--tokenizer=char", "--overwrite=True")


def long_text(size: int) -> str:
    rng, words = random.Random(2), TEXT.split() + ["naïve", "日本語", "don't", "1,234", "\n\n", "\t", "  ", "🙂"]
    return " ".join(rng.choice(words) for _ in range(size))


def test_a_text_read_in_pieces_tokenizes_as_the_whole(run, tmp_path):
    """2.7 MB, which is read a megabyte at a time and tokenized half a megabyte at a time."""
    import tiktoken

    text = long_text(550_000)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    run("prepare_text.py", "--input=long.txt")
    cut = int(len(text) * 0.9)
    dataset, gpt2 = load_dataset("long", tmp_path / "data"), tiktoken.get_encoding("gpt2")
    assert len(text.encode()) > 2_600_000
    assert read(dataset, "train").tolist() == gpt2.encode_ordinary(text[:cut])
    assert read(dataset, "val").tolist() == gpt2.encode_ordinary(text[cut:])


def test_a_document_too_long_for_memory_comes_as_several(tmp_path, monkeypatch):
    monkeypatch.setattr("common.corpus.LONGEST", 1000)
    text = long_text(300_000)
    (tmp_path / "a.txt").write_text(f"short<|endoftext|>{text}<|endoftext|>end")
    found = [t for t, _ in split_text(tmp_path / "a.txt")]
    assert found[0] == "short" and found[-1] == "end" and len(found) > 1000
    assert "".join("".join(found[1:-1]).split()) == "".join(text.split())
    whole = [*split_text(tmp_path / "a.txt")]
    for n in (0, 1, 700, len(whole) - 2):  # each position is one to go on from
        assert [t for t, _ in split_text(tmp_path / "a.txt", whole[n][1])][:5] == [t for t, _ in whole[n + 1 : n + 6]]
    (tmp_path / "b.txt").write_text("日本" * 3000)  # not a space in it
    assert "".join(t for t, _ in split_text(tmp_path / "b.txt")) == "日本" * 3000


def test_where_a_long_text_is_not_utf8_is_told(refused, tmp_path):
    data = long_text(400_000).encode()
    (tmp_path / "a.txt").write_bytes(data + b"\xff" + data)
    assert f"a.txt is not UTF-8 text: byte {len(data)} is 0xff" in refused("prepare_text.py", "--input=a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    assert "b.jsonl is not UTF-8 text: byte 27" in refused("prepare_text.py", "--input=b.jsonl")


def test_equal_documents_are_known_however_many_there_are():
    unique, rng = Unique(), random.Random(0)
    numbers = [rng.getrandbits(64) for _ in range(100_000)] + [0, 1, 2**64 - 1]
    assert all(unique.add(n) for n in numbers[:-3])
    assert not any(unique.add(n) for n in numbers[:-3]) and unique.count == 100_000
    assert len(unique.table) == 2**18 and unique.fresh.tolist() == numbers[:-3]


def test_a_trained_vocabulary_is_left_for_other_tools(run, tmp_path):
    from tokenizers import Tokenizer

    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--input=book.txt", "--tokenizer=bpe", "--vocab_size=300", "--special_tokens=<|a|>,<|b|>")
    dataset = load_dataset("book", tmp_path / "data")
    theirs = Tokenizer.from_file(str(tmp_path / "data" / "book" / "tokenizer.json"))
    ours = tokenizer_from_dict(dataset.tokenizer)
    assert ours.n_vocab == 300 and theirs.encode("<|b|>the fox").ids == ours.encode("<|b|>the fox")


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


# -----------------------------------------------------------------------------
# A server that misbehaves, and TinyStories from it


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.faults are the misdeeds of the next answers, each done once."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        fault = server.faults.pop(0) if server.faults else "none"
        data = server.files.get(self.path.lstrip("/"))
        if data is None or fault.isdigit():
            self.send_response(404 if data is None else int(fault))
            if fault == "429":
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        begin = 0
        if (wanted := self.headers.get("Range")) and fault != "no ranges":
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        body = data[begin:]
        self.send_response(206 if begin else 200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) + (1000 if fault == "lies" else 0)))
        self.end_headers()
        if fault in ("cuts", "lies"):
            body = body[: len(body) // 2] if fault == "cuts" else body
        self.wfile.write(body)

    def log_message(self, *a):
        pass


@pytest.fixture
def web(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.files, server.faults, server.asked = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("common.corpus.time.sleep", lambda seconds: None)
    yield server
    server.shutdown()


BLOB = random.Random(0).randbytes(3_000_000)


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["cuts"],
        ["cuts", "cuts", "503", "cuts", "429"],
        ["cuts", "no ranges"],
        ["lies"],
        ["no length"],
        ["500", "502", "504", "408"],
        ["cuts", "cuts", "cuts", "cuts", "cuts", "cuts", "cuts", "cuts"],  # progress each time
    ],
    ids=" ".join,
)
def test_a_download_survives_what_servers_do(web, tmp_path, faults):
    web.files["f"], web.faults = BLOB, list(faults)
    download(f"{web.url}/f", tmp_path / "sub" / "f", hashlib.sha256(BLOB).hexdigest())
    assert (tmp_path / "sub" / "f").read_bytes() == BLOB and not list(tmp_path.rglob("*.part"))
    if "cuts" in faults:
        assert any(asked for _, asked in web.asked)  # went on from where it was


def test_a_download_that_cannot_be_mended_says_so_and_goes_on_next_time(web, tmp_path):
    web.files["f"] = BLOB
    with pytest.raises(ValueError, match="/g: 404"):
        download(f"{web.url}/g", tmp_path / "g")
    web.faults = ["cuts"] + ["500"] * 6
    with pytest.raises(ValueError, match="500 .*, six times; the same command goes on from 1,441,792 bytes"):
        download(f"{web.url}/f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    download(f"{web.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BLOB and web.asked[-1][1] == "bytes=1441792-"
    with pytest.raises(ValueError, match="not the file that is known by this name"):
        download(f"{web.url}/f", tmp_path / "h", sha256="0" * 64)
    assert not list(tmp_path.glob("h*"))
    (tmp_path / "i.part").write_bytes(BLOB + b"more")  # of another, longer file
    download(f"{web.url}/f", tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == BLOB


def test_a_mirror_of_the_hub_is_asked_instead_of_it(web, tmp_path, monkeypatch):
    web.files["datasets/a/b"] = BLOB
    monkeypatch.setenv("HF_ENDPOINT", f"{web.url}/")
    download("https://huggingface.co/datasets/a/b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BLOB and web.asked[-1][0] == "/datasets/a/b"


def test_a_download_larger_than_the_disk_is_refused_first(web, tmp_path, monkeypatch):
    web.files["f"] = BLOB
    monkeypatch.setattr("common.corpus.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match="3 MiB are still to come, 1 MiB are free"):
        download(f"{web.url}/f", tmp_path / "f")


def tell(count: int, seed: int) -> list[str]:
    rng, words = random.Random(seed), TEXT.split()
    return [f"Story {n}. " + " ".join(rng.choice(words) for _ in range(rng.randrange(5, 60))) for n in range(count)]


@pytest.fixture
def tinystories(web):
    """The four files, small, in the originals' form."""
    told = {"train": tell(3000, 1), "val": tell(60, 2)}
    for names in prepare_tinystories.FILES.values():
        for split, name in names.items():
            web.files[name] = "\n<|endoftext|>\n".join(told[split]).encode() + b"\n<|endoftext|>\n"
    return web, told


def documents_of(dataset, split) -> list[str]:
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    text = tokenizer.decode(read(dataset, split))
    assert text.startswith("<|endoftext|>")
    return text.split("<|endoftext|>")[1:]


@pytest.mark.parametrize("options", ["", "--tokenizer=char --version=v2", "--tokenizer=bpe --vocab_size=300"])
def test_tinystories_are_downloaded_and_tokenized_whole(run, tinystories, tmp_path, options):
    web, told = tinystories
    printed = run("prepare_tinystories.py", f"--source={web.url}", "--shard_tokens=20000", *options.split())
    name = "tinystories_v2" if "v2" in options else "tinystories"
    dataset = load_dataset(name, tmp_path / "data")
    assert len(dataset.train) > 1 and {s.tokens for s in dataset.train[:-1]} == {20000}
    assert documents_of(dataset, "train") == told["train"] and documents_of(dataset, "val") == told["val"]
    assert dataset.vocab_size == {"": 50257, "--tokenizer=b": 300}.get(options[:13], dataset.vocab_size)
    asked = len(web.asked)
    printed = run("prepare_tinystories.py", f"--source={web.url}", "--shard_tokens=20000", *options.split())
    assert "nothing to do" in printed and len(web.asked) == asked
    assert "another --dataset" in call("prepare_tinystories.py", "--max_docs=7", *options.split(), cwd=tmp_path).stderr


def test_tinystories_in_part(run, tinystories, tmp_path):
    web, told = tinystories
    run("prepare_tinystories.py", f"--source={web.url}", "--max_docs=50", "--dataset=few")
    dataset = load_dataset("few", tmp_path / "data")
    assert documents_of(dataset, "train") == told["train"][:50] and documents_of(dataset, "val") == told["val"][:5]
    run("prepare_tinystories.py", f"--source={web.url}", "--data_fraction=0.25", "--dataset=quarter")
    part = documents_of(load_dataset("quarter", tmp_path / "data"), "train")
    assert part == told["train"][: len(part)] and 0.2 < len(part) / 3000 < 0.3


def test_preparing_killed_anywhere_goes_on_without_a_repeated_or_missing_story(run, tinystories, tmp_path):
    """Killed twenty times at random instants, while it downloads, tokenizes and writes."""
    web, told = tinystories
    keys = [f"--source={web.url}", "--shard_tokens=2000"]
    run("prepare_tinystories.py", *keys, "--dataset=whole")
    seconds, dice = 0.6, random.Random(3)
    for _ in range(20):
        script = Script("prepare_tinystories.py", *keys, "--dataset=parts", cwd=tmp_path)
        time.sleep(dice.random() * seconds)
        script.kill()
        script.wait()
    printed = run("prepare_tinystories.py", *keys, "--dataset=parts")
    dataset = load_dataset("parts", tmp_path / "data")
    assert documents_of(dataset, "train") == told["train"], printed
    whole = load_dataset("whole", tmp_path / "data")
    assert [s.path.read_bytes() for s in dataset.train] == [s.path.read_bytes() for s in whole.train]
    assert not list((tmp_path / "data" / "parts").glob("*.part"))


def test_another_setting_does_not_go_on_with_what_is_there(tmp_path, monkeypatch):
    tokenizer = word_tokenizer(TEXT, 500)
    folder = tmp_path / "d"
    first = DatasetWriter(folder, {"a": 1}, lambda: tokenizer)
    first.write(lambda position: [("one two", 1)], "val")
    again = DatasetWriter(folder, {"a": 1}, lambda: pytest.fail("made again"))
    assert again.sources["val"]["done"] and again.tokens == first.tokens > 0
    with pytest.raises(ValueError, match="holds an unfinished dataset, of other settings.*--overwrite"):
        DatasetWriter(folder, {"a": 2}, lambda: tokenizer)
    assert list(folder.glob("*.part"))
    other = DatasetWriter(folder, {"a": 2}, lambda: tokenizer, overwrite=True)
    assert other.sources == {} and other.tokens == 0 and not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version=v3"], "--version=v3: choose v1 or v2"),
        (["--data_fraction=0.0"], "--data_fraction=0.0"),
        (["--synthetic=True", "--max_docs=1"], "at least 2 stories"),
        (["--synthetic=True", "--tokenizer=char"], "these stories have a vocabulary of their own"),
        (["--source=."], "--source=.: there is no TinyStories-train.txt"),
    ],
)
def test_tinystories_bad_input(refused, arguments, words, monkeypatch):
    assert words in refused("prepare_tinystories.py", *arguments)


# --- what must not be lost, and what is not a dataset


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def many(tmp_path, count: int, name="many.jsonl", bad_line="") -> None:
    rows = [json.dumps({"text": f"document {n} of the many"}) for n in range(count)]
    (tmp_path / name).write_text("\n".join([*rows, *([bad_line] if bad_line else [])]) + "\n")


def test_a_dataset_stays_until_the_one_that_replaces_it_is_whole(run, refused, tmp_path):
    many(tmp_path, 30_000)
    keys = ["--dataset=d", "--tokenizer=char", "--shard_tokens=100000"]
    run("prepare_text.py", "--input=many.jsonl", *keys)
    before = files_of(tmp_path / "data" / "d")
    many(tmp_path, 30_000, "bad.jsonl", "{nonsense")
    assert "bad.jsonl, line 30001: not JSON" in refused(
        "prepare_text.py", "--input=bad.jsonl", *keys, "--overwrite=True"
    )
    assert files_of(tmp_path / "data" / "d") == before
    many(tmp_path, 20_000)
    run("prepare_text.py", "--input=many.jsonl", *keys, "--overwrite=True")
    after = files_of(tmp_path / "data" / "d")
    assert after != before and json.loads(after["meta.json"])["tokens"]["train"] < 700_000
    load_dataset("d", tmp_path / "data", verify=True)


def test_names_of_datasets_do_not_mix_their_splits(run, refused, tmp_path):
    many(tmp_path, 500)
    for name in ("my_train_set", "a_val_b"):
        run("prepare_text.py", "--input=many.jsonl", "--tokenizer=char", f"--dataset={name}")
        dataset = load_dataset(name, tmp_path / "data")
        assert [s.path.name for s in dataset.train] == [f"{name}_train_000000.npy"]
        assert [s.path.name for s in dataset.val] == [f"{name}_val_000000.npy"]
    assert "a name has letters" in refused("prepare_text.py", "--input=many.jsonl", "--dataset=a:b")


def test_documents_remembered_after_the_last_save_are_forgotten_on_going_on(tmp_path):
    """The disk filled up between the list of documents and progress.json."""
    texts = [f"document {n}" for n in range(50)]
    first = DatasetWriter(tmp_path / "d", {}, lambda: word_tokenizer(TEXT, 500))
    for text in texts[:20]:
        first.unique.add(document_hash(text))
    first.unique.fresh.tofile(open(first.hashes, "ab"))
    for _ in range(2):
        again = DatasetWriter(tmp_path / "d", {}, lambda: pytest.fail("made again"))
        assert again.unique.count == 0 and again.hashes.stat().st_size == 0
    again.write(counted(lambda: texts), "train", unique=True)
    assert again.tokens == sum(len(again.tokenizer.encode(t)) + 1 for t in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max_tokens=1"], "nothing is left for"),
        (["--val_fraction=0.00001"], "nothing is left for val"),
        (["--tokenizer=bpe", "--special_tokens=<|a|>,<|a|>"], "each once"),
        (["--tokenizer=bpe", "--special_tokens=<|endoftext|>"], "is there anyway"),
    ],
)
def test_what_would_be_no_dataset_is_refused_and_leaves_nothing(refused, tmp_path, arguments, words):
    many(tmp_path, 1200)
    assert words in refused("prepare_text.py", "--input=many.jsonl", *arguments)
    assert not (tmp_path / "data" / "many").exists()


def test_a_limit_on_documents_does_not_cut_a_single_one(run, tmp_path):
    text = long_text(300_000)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    run("prepare_text.py", "--input=one.txt", "--max_docs=1", "--tokenizer=char")
    assert len(read(load_dataset("one", tmp_path / "data"), "train")) == int(len(text) * 0.9)
