"""prepare_text.py and prepare_tinystories.py: the datasets they write, resuming, downloads, and their error messages."""

import hashlib
import http.server
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import ROOT, SMALL, TEXT, Script, call

import prepare_text
import prepare_tinystories
from common import corpus
from common.corpus import DatasetWriter, document_hash, make_source, split_text
from common.files import download
from common.shards import load_dataset
from common.tokenizer import EOT, tokenizer_from_dict, word_tokenizer
from configurator import UserError

import numpy as np
import pytest
from hub import start_hub


def read(dataset, split):
    return np.concatenate([s.map() for s in getattr(dataset, split)])


def test_the_end_of_a_single_text_becomes_the_validation_split(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=book.txt", "--dataset=book", "--tokenizer=char")
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
def test_documents_are_separated_and_the_splits_are_disjoint(run, tmp_path, options):
    texts = [f"document {n}: " + "words " * (n % 5) + f"end {n}." for n in range(100)]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:60] + texts[:10] + [""]))
    for n, t in enumerate(texts[60:]):
        (folder / f"b{n}.txt").write_text(t)
    run("prepare_text.py", "--inputs=texts", "--dataset=d", *options)
    dataset = load_dataset("d", tmp_path / "data")
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    found = {}
    for split in ("train", "val"):
        ids = read(dataset, split)
        assert ids[0] == tokenizer.eot
        found[split] = tokenizer.decode(ids.tolist()).split("<|endoftext|>")[1:]
    assert sorted(found["train"] + found["val"]) == sorted(texts)  # without the ten duplicates
    assert not set(found["train"]) & set(found["val"]) and found["val"]


def test_own_text_trains_and_samples(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=book.txt", "--tokenizer=bpe", "--vocab_size=280")
    run("train.py", *SMALL, "--dataset=book")
    assert run("sample.py", "--start=line", "--max_new_tokens=5", "--device=cpu").startswith("line")


def test_preparing_the_same_input_twice_gives_the_same_bytes(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    for name in ("one", "two"):
        run("prepare_text.py", "--inputs=book.txt", f"--dataset={name}", "--tokenizer=bpe", "--vocab_size=280")
    for split in ("train", "val"):
        a, b = (tmp_path / "data" / n / f"{n}_{split}_000000.npy" for n in ("one", "two"))
        assert a.read_bytes() == b.read_bytes()


def test_of_a_few_documents_at_least_one_is_for_validation(run, tmp_path):
    for n in range(3):
        (tmp_path / "three.txt").write_text("one story.<|endoftext|>another story.<|endoftext|>the third.")
        run(
            "prepare_text.py",
            "--inputs=three.txt",
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
        (" <|endoftext|>\n", [], "there is no text in in.txt"),
        (TEXT, ["--inputs=gone.txt"], "--inputs=gone.txt: there is no such file"),
        (TEXT, ["--inputs=empty"], "no .txt, .md, .rst, .jsonl, .ndjson, .json file"),
        (TEXT, ["--inputs="], "give --inputs=FILE"),
        (TEXT, ["--input=gone.txt"], "--inputs=gone.txt: there is no such file"),
        (TEXT, ["--tokenizer=word"], "--tokenizer=word: choose gpt2, char, ids, bpe, or a folder"),
        (TEXT, ["--tokenizer=bpe", "--vocab_size=100"], "--vocab_size=100"),
        (TEXT, ["--tokenizer=bpe", "--vocab_size=50000"], "more than this text supports"),
        (TEXT, ["--val_fraction=1.5"], "--val_fraction=1.5"),
        (TEXT, ["--seed=-1"], "--seed=-1: must be at least 0"),
        (TEXT, [f"--seed={2**63}"], "must be less than 2^63"),
        (b"ab\xff\xfe", [], "in.txt is not UTF-8 text: byte 2"),
        ("abc".encode("utf-16"), [], "in.txt is UTF-16 text; convert it to UTF-8: python -c"),
        (b"%PDF-1.4 ...", [], "in.txt is a PDF; save its text first"),
        (b"PK\x03\x04....", [], "in.txt is a zip file, as are .docx and .epub"),
        (b"text\0text", [], "in.txt is a binary file"),
    ],
)
def test_bad_input_gives_a_one_line_error(refused, tmp_path, content, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused("prepare_text.py", "--inputs=in.txt", "--tokenizer=char", *arguments)
    assert not (tmp_path / "data" / "in" / "meta.json").exists()


def test_text_of_windows_reads_as_that_of_unix(run, tmp_path):
    unix = "\n".join(f"Line {n} of é." for n in range(4000)) + "\n"
    (tmp_path / "unix.txt").write_text(unix, encoding="utf-8")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + unix.replace("\n", "\r\n").encode())
    (tmp_path / "several.txt").write_bytes(b"\xef\xbb\xbf" + (unix.replace("\n", "\r\n") + EOT).encode() * 2)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(b'{"text": "row %d"}' % n for n in range(40)))
    for name in ("unix", "windows"):
        run("prepare_text.py", f"--inputs={name}.txt", "--tokenizer=char")
    ids = [load_dataset(name, tmp_path / "data").train[0].map() for name in ("unix", "windows")]
    assert np.array_equal(*ids)
    assert [t for t, _ in split_text(tmp_path / "several.txt")] == [unix.strip()] * 2
    run("prepare_text.py", "--inputs=rows.jsonl", "--tokenizer=char")
    rows = load_dataset("rows", tmp_path / "data")
    assert sorted(documents_of(rows, "train") + documents_of(rows, "val")) == sorted(f"row {n}" for n in range(40))


def test_a_folder_gives_its_texts_and_names_what_is_left_out(run, tmp_path):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.md", "c.rst", "LICENSE", ".git/config", "d.TXT"):
        (notes / name).write_text(f"{name} " * 400)
    (notes / "picture.png").write_bytes(b"\x89PNG\0")
    (notes / "program").write_bytes(b"\x7fELF\0\0")
    (notes / "table.csv").write_text("a,b")
    printed = run("prepare_text.py", "--inputs=notes", "--tokenizer=char")
    assert "notes: 3 files of other kinds are left out: picture.png, program, table.csv" in printed
    dataset = load_dataset("notes", tmp_path / "data")
    text = " ".join(documents_of(dataset, "train") + documents_of(dataset, "val"))
    assert all(name in text for name in ("a.txt", "b.md", "c.rst", "LICENSE", "d.TXT")) and "config" not in text


@pytest.mark.parametrize("sizes", [(35, 11, 17), (10, 10), (1000, 5), (3, 3, 3, 3, 60), (*[7] * 40, 90), (1, 1000)])
def test_few_documents_are_split_by_their_size(run, tmp_path, sizes):
    rng, words = random.Random(5), TEXT.split()
    texts = [f"Number {n}. " + " ".join(rng.choice(words) for _ in range(20 * size)) for n, size in enumerate(sizes)]
    (tmp_path / "few.txt").write_text(EOT.join(texts))
    printed = run("prepare_text.py", "--inputs=few.txt", "--tokenizer=char", "--val_fraction=0.1")
    dataset = load_dataset("few", tmp_path / "data")
    train, val = (sum(s.tokens for s in shards) for shards in (dataset.train, dataset.val))
    assert 0.04 < val / (train + val) < 0.13, printed
    kept = "".join(sorted("".join(documents_of(dataset, "train") + documents_of(dataset, "val")).replace(" ", "")))
    assert kept == "".join(sorted("".join(texts).replace(" ", "")))  # nothing is lost, nothing twice


def test_a_text_without_spaces_is_split_where_its_share_ends(run, tmp_path):
    for name, text in (("a", "木" * 300), ("b", "A title " + "日本" * 20_000)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    printed = run("prepare_text.py", "--inputs=a.txt,b.txt", "--dataset=d", "--tokenizer=char")
    dataset = load_dataset("d", tmp_path / "data")
    train, val = (sum(s.tokens for s in shards) for shards in (dataset.train, dataset.val))
    assert 0.05 < val / (train + val) < 0.13 and "note: validation" not in printed


def test_a_dataset_that_is_too_small_is_said_at_once(run, tmp_path):
    (tmp_path / "small.txt").write_text(TEXT[:1500])
    printed = run("prepare_text.py", "--inputs=small.txt", "--tokenizer=char")
    assert "note: 1,350 training tokens are few" in printed and "train with --block_size=37" in printed
    (tmp_path / "large.txt").write_text(TEXT * 12)
    assert "note:" not in run("prepare_text.py", "--inputs=large.txt", "--tokenizer=char")


def test_the_printed_command_works_though_the_presets_prompt_cannot_be_encoded(run, tmp_path):
    (tmp_path / "music.txt").write_text("c d e f g a b c " * 4000)
    printed = run("prepare_text.py", "--inputs=music.txt", "--tokenizer=char")
    command = re.search(r"Train on it: python (.*)", printed)[1].split()
    tiny = [o for o in SMALL if not o.startswith("--block_size")]
    run_it = [*command[:1], ROOT / command[1], *command[2:], *tiny]
    assert "Once upon" not in run(*run_it)  # the preset's prompt belongs to its own dataset
    printed = run(*run_it, "--sample_prompt=Once upon a time")
    assert "--sample_prompt='Once upon a time' cannot be used" in printed and "samples begin with 'c d e'" in printed
    assert re.search(r"sample.py --out_dir=\S+ --start='c d e'", printed)


def test_an_error_in_an_array_names_the_object(refused, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}] * 30 + [{"body": "two"}]))
    assert "a.json, object 31: " in refused("prepare_text.py", "--inputs=a.json", "--tokenizer=char")


def test_the_next_command_names_the_dataset_as_train_finds_it(run, tmp_path):
    (tmp_path / "my book.txt").write_text(TEXT)
    assert " --dataset=my_book\n" in run("prepare_text.py", "--inputs=my book.txt", "--tokenizer=char")
    printed = run("prepare_text.py", "--inputs=my book.txt", "--dataset=sub/mine", "--tokenizer=char", "--preview=1")
    assert " --dataset=sub/mine\n" in printed
    run("train.py", *SMALL, "--dataset=sub/mine", "--max_iters=1")


def test_an_error_in_a_jsonl_file_names_the_line(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    message = refused("prepare_text.py", "--inputs=a.jsonl", "--tokenizer=char")
    assert "a.jsonl, line 2" in message and "--text_field" in message


def test_the_former_spelling_of_the_keys_still_works(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "config.py").write_text("input = 'a.txt'\ntokenizer = 'char'\n")
    run("prepare_text.py", "config.py")
    assert "nothing to do" in run("prepare_text.py", "--input=a.txt", "--tokenizer=char")
    assert "wikitext2" in run("prepare_text.py", "--list")


def test_an_existing_dataset_is_kept_without_overwrite(run, refused, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=a.txt", "--tokenizer=char")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}
    assert "nothing to do" in run("prepare_text.py", "--inputs=a.txt", "--tokenizer=char")
    assert "--overwrite" in refused("prepare_text.py", "--inputs=a.txt", "--tokenizer=bpe", "--vocab_size=280")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before
    run("prepare_text.py", "--inputs=a.txt", "--tokenizer=char", "--overwrite=True")


def long_text(size: int) -> str:
    rng, words = random.Random(2), TEXT.split() + ["naïve", "日本語", "don't", "1,234", "\n\n", "\t", "  ", "🙂"]
    return " ".join(rng.choice(words) for _ in range(size))


def test_a_text_read_in_pieces_gives_the_tokens_of_the_whole(run, tmp_path):
    """The text has 2.7 MB; it is read in blocks of one megabyte and tokenized in pieces of half a megabyte."""
    import tiktoken

    text = long_text(550_000)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    run("prepare_text.py", "--inputs=long.txt")
    cut = int(len(text) * 0.9)
    dataset, gpt2 = load_dataset("long", tmp_path / "data"), tiktoken.get_encoding("gpt2")
    assert len(text.encode()) > 2_600_000
    assert read(dataset, "train").tolist() == gpt2.encode_ordinary(text[:cut])
    assert read(dataset, "val").tolist() == gpt2.encode_ordinary(text[cut:])


def test_a_very_long_document_is_read_as_several(tmp_path, monkeypatch):
    monkeypatch.setattr("common.corpus.LONGEST", 1000)
    text = long_text(300_000)
    (tmp_path / "a.txt").write_text(f"short<|endoftext|>{text}<|endoftext|>end")
    found = [t for t, _ in split_text(tmp_path / "a.txt")]
    assert found[0] == "short" and found[-1] == "end" and len(found) > 1000
    assert "".join("".join(found[1:-1]).split()) == "".join(text.split())
    whole = [*split_text(tmp_path / "a.txt")]
    for n in (0, 1, 700, len(whole) - 2):  # reading can resume at each position
        assert [t for t, _ in split_text(tmp_path / "a.txt", whole[n][1])][:5] == [t for t, _ in whole[n + 1 : n + 6]]
    (tmp_path / "lines.txt").write_text("".join(f"{n} {n + 1} {n + 2}\n" for n in range(1000)))
    parts = [t for t, _ in split_text(tmp_path / "lines.txt")]
    assert len(parts) > 5 and all(len(line.split()) == 3 for part in parts for line in part.split("\n"))
    (tmp_path / "b.txt").write_text("日本" * 3000)  # without any space
    assert "".join(t for t, _ in split_text(tmp_path / "b.txt")) == "日本" * 3000


def test_the_position_of_bytes_that_are_not_utf8_is_reported(refused, tmp_path):
    data = long_text(400_000).encode()
    (tmp_path / "a.txt").write_bytes(data + b"\xff" + data)
    (tmp_path / "several.txt").write_bytes(b"one<|endoftext|>" + data + b"\xff" + data)
    assert f"several.txt is not UTF-8 text: byte {len(data) + 16} is" in refused(
        "prepare_text.py", "--inputs=several.txt"
    )
    (tmp_path / "end.txt").write_bytes(b"a" * (2**20 - 1) + "é".encode()[:1])
    assert "end.txt is not UTF-8 text: byte 1048575 is 0xc3" in refused("prepare_text.py", "--inputs=end.txt")
    assert f"a.txt is not UTF-8 text: byte {len(data)} is 0xff" in refused("prepare_text.py", "--inputs=a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    assert "b.jsonl is not UTF-8 text: byte 27" in refused("prepare_text.py", "--inputs=b.jsonl")


def test_hashes_of_documents_are_remembered_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("common.corpus.MOST_UNIQUE", 3)
    writer = DatasetWriter(tmp_path / "d", {}, lambda: word_tokenizer(TEXT, 500))
    assert [writer.is_new(text) for text in "abacbdee"] == [True, True, False, True, False, True, True, True]
    assert writer.unsaved_hashes.tolist() == [document_hash(text) for text in "abc"]


def test_a_trained_vocabulary_is_also_written_as_tokenizer_json(run, tmp_path):
    from tokenizers import Tokenizer

    (tmp_path / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=book.txt", "--tokenizer=bpe", "--vocab_size=300", "--special_tokens=<|a|>,<|b|>")
    dataset = load_dataset("book", tmp_path / "data")
    theirs = Tokenizer.from_file(str(tmp_path / "data" / "book" / "tokenizer.json"))
    ours = tokenizer_from_dict(dataset.tokenizer)
    assert ours.n_vocab == 300 and theirs.encode("<|b|>the fox").ids == ours.encode("<|b|>the fox")


# -----------------------------------------------------------------------------
# Synthetic stories


def test_the_default_stories_never_change(tmp_path):
    """The results in BENCHMARKS.md and the ready configs rest on these very bytes."""
    prepare_tinystories.make_synthetic(tmp_path / "tinystories_synthetic")
    meta = json.loads((tmp_path / "tinystories_synthetic" / "meta.json").read_text())
    assert {split: shards[0]["sha256"] for split, shards in meta["shards"].items()} == {
        "train": "5c0a6de6c350b6dac6b1cf59fe00ac00cb51a6c4d20b50404399076bdfadb5ee",
        "val": "5353ab1f5ce0a8e29e31fd4b9848b797102b34779cd667832cee1c33f6b8ef45",
    }


def test_missing_synthetic_stories_are_made_once(tmp_path, capsys):
    folder = tmp_path / "data" / "tinystories_synthetic"
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(prepare_tinystories.make_missing_stories, [dict(dataset=folder.name, data_dir=folder.parent)] * 3)
        )
    assert capsys.readouterr().out.count("does not exist: writing its stories") == 1
    load_dataset(folder.name, folder.parent, verify=True)


def test_the_same_seed_writes_the_same_stories_and_splits_are_disjoint(run, refused, tmp_path):
    for name in ("a", "b"):
        printed = run("prepare_tinystories.py", "--synthetic=True", "--max_docs=300", f"--dataset={name}")
    assert "300 stories" in printed
    again = ["prepare_tinystories.py", "--synthetic=True", "--dataset=a"]
    assert "nothing to do" in run(*again, "--max_docs=300")
    assert "--overwrite" in refused(*again, "--max_docs=200")
    a, b = (load_dataset(n, tmp_path / "data") for n in ("a", "b"))
    assert np.array_equal(read(a, "train"), read(b, "train"))
    tokenizer = tokenizer_from_dict(a.tokenizer)
    train, val = (set(tokenizer.decode(read(a, s).tolist()).split("<|endoftext|>")[1:]) for s in ("train", "val"))
    assert len(val) == 15 and len(train) == 285 and not train & val


def test_stories_are_varied_and_grammatical():
    rng = random.Random(1)
    stories = [prepare_tinystories.story(rng) for _ in range(3000)]
    assert len(set(stories)) == len(stories)
    for text in stories:
        assert not re.search(r"[{}]|\b[Aa] [aeiouAEIOU]|\ban [^aeiou]|  ", text), text
        assert not re.search(r"(?:^|[.!?] |\n)[a-z]", text), text
        people = set(re.findall(r"\b[A-Z][a-z]+\b", text)) & set(prepare_tinystories.GIRLS + prepare_tinystories.BOYS)
        assert 1 <= len(people) <= 2, text
        men = [word for word in ("dad", "grandpa", "uncle") if word in text]
        if people <= set(prepare_tinystories.GIRLS) and not men:
            assert not re.search(r"\b([Hh]e|[Hh]is|him)\b", text), text


# -----------------------------------------------------------------------------
# Downloads, from a server with faults, and TinyStories from it


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    """Serves server.files. server.faults are the faults of the next answers, each used once."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        fault = server.faults.pop(0) if server.faults else "none"
        data = server.files.get(self.path.lstrip("/"))
        if data is None or fault.isdigit():
            self.send_response(404 if data is None else int(fault))
            if fault == "429":
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def log_message(self, *a):
        pass


@pytest.fixture
def web(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyHandler)
    server.files, server.faults, server.asked = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
    yield server
    server.shutdown()


BLOB = random.Random(0).randbytes(3_000_000)


@pytest.mark.parametrize("faults", [[], ["503", "429"], ["no length"], ["500", "502", "504", "408"]], ids=" ".join)
def test_a_download_retries_after_server_errors(web, tmp_path, faults):
    web.files["f"], web.faults = BLOB, list(faults)
    download(f"{web.url}/f", tmp_path / "sub" / "f", hashlib.sha256(BLOB).hexdigest())
    assert (tmp_path / "sub" / "f").read_bytes() == BLOB and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["404"], "cannot be downloaded .HTTPError: 404"),
        (["cut"], "cannot be downloaded .*; try the same command again"),
        (["500"] * 6, "500"),
    ],
    ids=["404", "cut", "500"],
)
def test_a_failed_download_leaves_no_file_and_the_next_call_succeeds(web, tmp_path, faults, words):
    web.files["f"], web.faults = BLOB, list(faults)
    with pytest.raises(UserError, match=words):
        download(f"{web.url}/f", tmp_path / "f")
    assert not list(tmp_path.iterdir())
    download(f"{web.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BLOB


def test_without_a_network_a_download_fails_at_once_and_leaves_no_folder(tmp_path):
    for url in ("https://nowhere.invalid/f", "https://huggingface.co/datasets/a/b/resolve/main/f"):
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(UserError, match="there is no network, or it does not know"),
        ):
            patch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
            download(url, tmp_path / "data" / "f")
    assert not (tmp_path / "data").exists()


def test_a_download_with_another_sha256_is_removed(web, tmp_path):
    web.files["f"] = BLOB
    with pytest.raises(UserError, match="sha256 mismatch: got .*, expected 0000"):
        download(f"{web.url}/f", tmp_path / "f", sha256="0" * 64)
    assert not list(tmp_path.iterdir())


def test_files_on_the_hub_are_downloaded_by_its_own_client(run, refused, tmp_path):
    """$HF_ENDPOINT is honored, a broken transfer leaves no file behind, and the next call succeeds."""
    stories = make_stories(100, 1)
    files = {name: "<|endoftext|>".join(stories).encode() for name in prepare_tinystories.FILES["v1"].values()}
    server, environment = start_hub({"roneneldan/TinyStories": files})
    server.faults = ["cut"] * 6
    message = refused("prepare_tinystories.py", "--tokenizer=char", env=environment)
    assert "TinyStories-train.txt cannot be downloaded" in message or "TinyStories-valid.txt cannot" in message
    downloads = tmp_path / "data" / "downloads"
    assert not server.faults and not list(downloads.glob("*.txt"))
    server.faults = ["cut"]  # the client retries after one
    run("prepare_tinystories.py", "--tokenizer=char", env=environment)
    server.shutdown()
    assert {p.name: p.read_bytes() for p in downloads.glob("*.txt")} == files
    assert documents_of(load_dataset("tinystories", tmp_path / "data"), "train") == stories


def make_stories(count: int, seed: int) -> list[str]:
    rng, words = random.Random(seed), TEXT.split()
    return [f"Story {n}. " + " ".join(rng.choice(words) for _ in range(rng.randrange(5, 60))) for n in range(count)]


@pytest.fixture
def tinystories(web):
    """The four files of TinyStories in their format, but small."""
    stories = {"train": make_stories(3000, 1), "val": make_stories(60, 2)}
    for names in prepare_tinystories.FILES.values():
        for split, name in names.items():
            web.files[name] = "\n<|endoftext|>\n".join(stories[split]).encode() + b"\n<|endoftext|>\n"
    return web, stories


def documents_of(dataset, split) -> list[str]:
    tokenizer = tokenizer_from_dict(dataset.tokenizer)
    text = tokenizer.decode(read(dataset, split))
    assert text.startswith("<|endoftext|>")
    return text.split("<|endoftext|>")[1:]


@pytest.mark.parametrize("options", ["", "--tokenizer=char --version=v2", "--tokenizer=bpe --vocab_size=300"])
def test_tinystories_are_downloaded_and_tokenized_completely(run, tinystories, tmp_path, options):
    web, stories = tinystories
    printed = run("prepare_tinystories.py", f"--source={web.url}", "--shard_tokens=20000", *options.split())
    name = "tinystories_v2" if "v2" in options else "tinystories"
    dataset = load_dataset(name, tmp_path / "data")
    assert len(dataset.train) > 1 and {s.tokens for s in dataset.train[:-1]} == {20000}
    assert documents_of(dataset, "train") == stories["train"] and documents_of(dataset, "val") == stories["val"]
    assert dataset.vocab_size == {"": 50257, "--tokenizer=b": 300}.get(options[:13], dataset.vocab_size)
    asked = len(web.asked)
    printed = run("prepare_tinystories.py", f"--source={web.url}", "--shard_tokens=20000", *options.split())
    assert "nothing to do" in printed and len(web.asked) == asked
    assert "another --dataset" in call("prepare_tinystories.py", "--max_docs=7", *options.split(), cwd=tmp_path).stderr


def test_a_part_of_tinystories_can_be_chosen(run, tinystories, tmp_path):
    web, stories = tinystories
    run("prepare_tinystories.py", f"--source={web.url}", "--max_docs=50", "--dataset=few")
    dataset = load_dataset("few", tmp_path / "data")
    assert (
        documents_of(dataset, "train") == stories["train"][:50] and documents_of(dataset, "val") == stories["val"][:5]
    )
    run("prepare_tinystories.py", f"--source={web.url}", "--data_fraction=0.25", "--dataset=quarter")
    part = documents_of(load_dataset("quarter", tmp_path / "data"), "train")
    assert part == stories["train"][: len(part)] and 0.2 < len(part) / 3000 < 0.3


def test_a_killed_preparation_resumes_without_a_repeated_or_missing_story(run, tinystories, tmp_path):
    """It is killed twelve times at random moments of downloading, tokenizing and writing."""
    web, stories = tinystories
    keys = [f"--source={web.url}", "--shard_tokens=2000"]
    run("prepare_tinystories.py", *keys, "--dataset=whole")
    seconds, rng = 0.6, random.Random(3)
    for _ in range(12):
        script = Script("prepare_tinystories.py", *keys, "--dataset=parts", cwd=tmp_path)
        time.sleep(rng.random() * seconds)
        script.kill()
        script.wait()
    printed = run("prepare_tinystories.py", *keys, "--dataset=parts")
    dataset = load_dataset("parts", tmp_path / "data")
    assert documents_of(dataset, "train") == stories["train"], printed
    whole = load_dataset("whole", tmp_path / "data")
    assert [s.path.read_bytes() for s in dataset.train] == [s.path.read_bytes() for s in whole.train]
    assert not list((tmp_path / "data" / "parts").glob("*.part"))


def test_an_unfinished_dataset_with_other_settings_is_not_resumed(tmp_path):
    tokenizer = word_tokenizer(TEXT, 500)
    folder = tmp_path / "d"
    DatasetWriter(folder, {"a": 0}, lambda: tokenizer)  # has written nothing, so there is nothing to lose
    first = DatasetWriter(folder, {"a": 1}, lambda: tokenizer)
    first.write(lambda position: [("one two", 1)], "val")
    again = DatasetWriter(folder, {"a": 1}, lambda: pytest.fail("the tokenizer is made again"))
    assert again.sources["val"]["done"] and again.tokens == first.tokens > 0
    with pytest.raises(UserError, match="holds an unfinished dataset with other settings.*--overwrite"):
        DatasetWriter(folder, {"a": 2}, lambda: tokenizer)
    assert list(folder.glob("*.part"))
    other = DatasetWriter(folder, {"a": 2}, lambda: tokenizer, overwrite=True)
    assert other.sources == {} and other.tokens == 0 and not list(folder.glob("*.part"))


def test_a_dataset_resumed_with_smaller_shards_is_readable(tmp_path):
    tokenizer, text = word_tokenizer(TEXT, 500), " ".join(TEXT.split())
    first = DatasetWriter(tmp_path / "d", {}, lambda: tokenizer)
    first.write(lambda position: [(text, 1)], "val")
    first.write(lambda position: [(text, 1)], "train")
    written = first.tokens
    again = DatasetWriter(tmp_path / "d", {}, lambda: tokenizer, shard_tokens=100)
    again.writers["train"].add(np.ones(250))
    again.finish("")
    dataset = load_dataset("d", tmp_path, verify=True)
    assert sum(s.tokens for s in dataset.train + dataset.val) == written + 250
    assert [s.tokens for s in dataset.train][1:] == [100, 100, 50]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version=v3"], "--version=v3: choose one of v1, v2"),
        (["--data_fraction=0.0"], "--data_fraction=0.0"),
        (["--synthetic=True", "--max_docs=1"], "--max_docs=1: must be at least 2"),
        (["--synthetic=True", "--tokenizer=char"], "the synthetic stories have their own vocabulary"),
        (["--source=."], "--source=.: there is no TinyStories-train.txt"),
    ],
)
def test_bad_tinystories_settings_give_a_one_line_error(refused, arguments, words):
    assert words in refused("prepare_tinystories.py", *arguments)


# -----------------------------------------------------------------------------
# Existing datasets, and text that makes none


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write_many(tmp_path, count: int, name="many.jsonl", bad_line="") -> None:
    """A JSONL file of many short documents."""
    rows = [json.dumps({"text": f"document {n} of the many"}) for n in range(count)]
    (tmp_path / name).write_text("\n".join([*rows, *([bad_line] if bad_line else [])]) + "\n")


def test_a_dataset_stays_until_its_replacement_is_complete(run, refused, tmp_path):
    write_many(tmp_path, 30_000)
    keys = ["--dataset=d", "--tokenizer=char", "--shard_tokens=100000"]
    run("prepare_text.py", "--inputs=many.jsonl", *keys)
    before = files_of(tmp_path / "data" / "d")
    write_many(tmp_path, 30_000, "bad.jsonl", "{nonsense")
    assert "bad.jsonl, line 30001: not JSON" in refused(
        "prepare_text.py", "--inputs=bad.jsonl", *keys, "--overwrite=True"
    )
    assert files_of(tmp_path / "data" / "d") == before
    write_many(tmp_path, 20_000)
    run("prepare_text.py", "--inputs=many.jsonl", *keys, "--overwrite=True")
    after = files_of(tmp_path / "data" / "d")
    assert after != before and json.loads(after["meta.json"])["tokens"]["train"] < 700_000
    load_dataset("d", tmp_path / "data", verify=True)


def test_a_split_name_inside_a_dataset_name_is_not_a_split(run, refused, tmp_path):
    write_many(tmp_path, 500)
    for name in ("my_train_set", "a_val_b"):
        run("prepare_text.py", "--inputs=many.jsonl", "--tokenizer=char", f"--dataset={name}")
        dataset = load_dataset(name, tmp_path / "data")
        assert [s.path.name for s in dataset.train] == [f"{name}_train_000000.npy"]
        assert [s.path.name for s in dataset.val] == [f"{name}_val_000000.npy"]
    assert "use only letters" in refused("prepare_text.py", "--inputs=many.jsonl", "--dataset=a:b")


def test_hashes_saved_after_the_last_progress_are_dropped_on_resume(tmp_path):
    """As if the disk filled up between writing documents.part and progress.json."""
    texts = [f"document {n}" for n in range(50)]
    first = DatasetWriter(tmp_path / "d", {}, lambda: word_tokenizer(TEXT, 500))
    for text in texts[:20]:
        first.is_new(text)
    with open(first.hashes_file, "ab") as f:
        first.unsaved_hashes.tofile(f)
    for _ in range(2):
        again = DatasetWriter(tmp_path / "d", {}, lambda: pytest.fail("the tokenizer is made again"))
        assert not again.seen and again.hashes_file.stat().st_size == 0
    again.write(make_source(lambda: texts), "train", unique=True)
    assert again.tokens == sum(len(again.tokenizer.encode(t)) + 1 for t in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max_tokens=1"], "no text is left for the"),
        (["--val_fraction=0.00001"], "no text is left for the val split"),
        (["--val_fraction=0"], "--val_fraction=0.0: no document would be for validation"),
        (["--tokenizer=bpe", "--special_tokens=<|a|>,<|a|>"], "name each once"),
        (["--tokenizer=bpe", "--special_tokens=<|endoftext|>"], "is always included"),
    ],
)
def test_settings_that_give_no_dataset_leave_no_files(refused, tmp_path, arguments, words):
    write_many(tmp_path, 1200)
    assert words in refused("prepare_text.py", "--inputs=many.jsonl", *arguments)
    assert not (tmp_path / "data" / "many").exists()


def test_max_docs_does_not_shorten_a_single_document(run, tmp_path):
    text = long_text(300_000)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    run("prepare_text.py", "--inputs=one.txt", "--max_docs=1", "--tokenizer=char")
    assert len(read(load_dataset("one", tmp_path / "data"), "train")) == int(len(text) * 0.9)


def test_json_of_every_spelling_is_read_and_null_is_empty(run, tmp_path):
    folder = tmp_path / "in"
    (folder / "book.txt").mkdir(parents=True)  # a folder, whatever its name
    rows = [json.dumps({"text": text}) for text in ("one", None, "two", " ")]
    (folder / "book.txt" / "A.JSONL").write_text("\n".join(rows))
    (folder / "b.ndjson").write_text('{"text": "three"}\n')
    (folder / "c.json").write_text('{"text": "four"}\n{"text": "five"}\n')
    (folder / "d.json").write_text('\n[{"text": "six"},\n {"text": "seven"}]')
    (folder / "E.TXT").write_text("eight")
    run("prepare_text.py", "--inputs=in", "--tokenizer=char", "--val_fraction=0.3")
    dataset = load_dataset("in", tmp_path / "data")
    assert sorted(documents_of(dataset, "train") + documents_of(dataset, "val")) == sorted(
        "one two three four five six seven eight".split()
    )


def test_a_long_json_document_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST", 30)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT[:500]}))
    parts = list(prepare_text.file_documents([tmp_path / "a.jsonl"], "text"))
    assert "".join(parts) == TEXT[:500] and max(map(len, parts)) <= 30 and len(parts) > 16


def test_lines_of_numbers_are_trained_on_and_sampled_as_numbers(run, refused, tmp_path):
    (tmp_path / "music.txt").write_text("".join(f"{n % 7} {n % 5} 60 {n % 3}\n" * 3 for n in range(300)))
    run("prepare_text.py", "--inputs=music.txt", "--tokenizer=ids")
    dataset = load_dataset("music", tmp_path / "data")
    assert dataset.vocab_size == 62 and dataset.tokenizer == {"kind": "ids", "count": 61, "eot": True}
    run("train.py", *SMALL, "--dataset=music", "--block_size=16")
    printed = run("sample.py", "--start=1 2 60", "--max_new_tokens=20", "--temperature=0.5")
    assert all(word.isdecimal() for word in printed.split()) and printed.startswith("1 2 60 ")
    assert "'x' is not a token id" in refused("sample.py", "--start=x")
    (tmp_path / "one.txt").write_text(" ".join(str(n % 100) for n in range(1000)))
    run("prepare_text.py", "--inputs=one.txt", "--tokenizer=ids")
    one = load_dataset("one", tmp_path / "data")
    assert one.train[0].map().tolist() == [n % 100 for n in range(900)] and one.val[0].tokens == 100
    (tmp_path / "words.txt").write_text("1 2 three\n4\n5")
    assert "'three' is not a token id" in refused("prepare_text.py", "--inputs=words.txt", "--tokenizer=ids")


def test_a_trained_vocabulary_with_special_tokens_is_used_for_another_dataset(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=a.txt", "--tokenizer=bpe", "--vocab_size=300", "--special_tokens=<|user|>")
    (tmp_path / "b.txt").write_text("<|user|>" + TEXT[:3000] + "<|user|>" + TEXT[3000:5000])
    run("prepare_text.py", "--inputs=b.txt", "--tokenizer=data/a")
    a, b = (load_dataset(name, tmp_path / "data") for name in "ab")
    special = tokenizer_from_dict(a.tokenizer).encode("<|user|>")
    assert len(special) == 1 and np.count_nonzero(np.concatenate([read(b, "train"), read(b, "val")]) == special[0]) == 2
    run("train.py", *SMALL, "--dataset=a:0.5,b:0.5", "--max_iters=2")
