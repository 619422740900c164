"""build_fineweb_shards.py on real parquet and JSONL files, read by the real `datasets`."""

import json
import random
import re
import time

from conftest import SMALL, TEXT, Script, call

import build_fineweb_shards
from common import corpus as corpus_module
from common.shards import HEADERS, load_dataset
from common.tokenizer import tokenizer_from_dict
from configurator import UserError

import numpy as np
import pytest
from test_prepare import web  # noqa: F401, a fixture


def make_pages(count: int) -> list[str]:
    rng, words = random.Random(5), TEXT.split()
    return [f"Page {n}. " + " ".join(rng.choice(words) for _ in range(rng.randrange(20, 400))) for n in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """Six parquet files and six JSONL files of 250 pages each; returns the pages by file."""
    import pyarrow
    import pyarrow.parquet

    pages = make_pages(1500)
    files = [pages[n : n + 250] for n in range(0, 1500, 250)]
    for kind in ("parquet", "jsonl"):
        (tmp_path / kind).mkdir()
    for n, texts in enumerate(files):
        table = pyarrow.table({"text": texts, "score": [1.0] * len(texts)})
        pyarrow.parquet.write_table(table, tmp_path / "parquet" / f"{n:03d}.parquet", row_group_size=100)
        (tmp_path / "jsonl" / f"{n:03d}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return files


def documents(folder) -> list[str]:
    """The documents in the order of the shard numbers, validation first."""
    meta = json.loads((folder / "meta.json").read_text())
    names = sorted((s["file"] for split in meta["shards"].values() for s in split), key=lambda name: name[-10:])
    ids = np.concatenate([np.load(folder / name) for name in names])
    return tokenizer_from_dict(meta["tokenizer"]).decode(ids).split("<|endoftext|>")[1:]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_shards_have_equal_size_and_the_first_is_for_validation(run, corpus, tmp_path, kind):
    printed = run("build_fineweb_shards.py", f"--source={kind}", "--shard_tokens=50000")
    folder = tmp_path / "data" / kind
    dataset = load_dataset(kind, tmp_path / "data")
    assert [s.path.name for s in dataset.val] == [f"{kind}_val_000000.npy"]
    assert [s.path.name for s in dataset.train] == [
        f"{kind}_train_{n:06d}.npy" for n in range(1, len(dataset.train) + 1)
    ]
    assert {s.tokens for s in (*dataset.val, *dataset.train[:-1])} == {50000} and len(dataset.train) > 2
    assert documents(folder) == [t for file in corpus for t in file]
    assert "the last shard, " in printed and dataset.train[-1].path.name in printed
    assert "nothing to do" in run("build_fineweb_shards.py", f"--source={kind}", "--shard_tokens=50000")
    run("train.py", *SMALL, f"--dataset={kind}", "--final_eval_tokens=1000", "--max_iters=2")


def test_a_killed_build_resumes_without_a_repeated_or_missing_page(run, corpus, tmp_path):
    keys = ["--source=parquet", "--shard_tokens=10000"]
    run("build_fineweb_shards.py", *keys, "--dataset=whole")
    parts, rng, killed = tmp_path / "data" / "parts", random.Random(7), 0
    while not (parts / "meta.json").exists() and killed < 12:
        before = len(list(parts.glob("*[0-9].npy")))
        script = Script("build_fineweb_shards.py", *keys, "--dataset=parts", cwd=tmp_path)
        deadline = time.monotonic() + 60
        while len(list(parts.glob("*[0-9].npy"))) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        script.kill()
        killed += script.wait().returncode == -9
    run("build_fineweb_shards.py", *keys, "--dataset=parts")
    assert documents(tmp_path / "data" / "parts") == documents(tmp_path / "data" / "whole")
    assert documents(tmp_path / "data" / "parts") == [t for file in corpus for t in file]
    assert killed > 2 and not list((tmp_path / "data" / "parts").glob("*.part"))


def test_max_tokens_gives_the_first_shards_of_the_whole_dataset(run, corpus, tmp_path):
    keys = ["--source=jsonl", "--shard_tokens=30000"]
    run("build_fineweb_shards.py", *keys, "--dataset=whole")
    whole = tmp_path / "data" / "whole"
    parts = tmp_path / "data" / "parts"
    for shard in range(2, 5):
        run("build_fineweb_shards.py", *keys, "--dataset=parts", f"--max_tokens={shard * 30000}", "--overwrite=True")
        assert len(list(parts.glob("*.npy"))) == shard
        for path in parts.glob("*.npy"):
            assert np.array_equal(np.load(path), np.load(whole / path.name.replace("parts", "whole")))


def test_workers_read_different_pages_and_write_different_shards(run, refused, corpus, tmp_path):
    found, names = [], set()
    for worker in range(3):
        keys = [f"--worker={worker}", "--num_workers=3", f"--data_dir=machine{worker}", "--dataset=d"]
        run("build_fineweb_shards.py", "--source=parquet", "--shard_tokens=20000", *keys)
        folder = tmp_path / f"machine{worker}" / "d"
        found += documents(folder)
        written = {p.name for p in folder.glob("*.npy")}
        assert not written & names
        names |= written
    assert sorted(found) == sorted(t for file in corpus for t in file)
    assert [n for n in names if "val" in n] == ["d_val_000000.npy"]
    assert "the source has only 6 files" in refused("build_fineweb_shards.py", "--source=parquet", "--num_workers=7")


def test_pretokenized_shards_are_downloaded_checked_and_kept(run, refused, web, tmp_path):  # noqa: F811
    magic = next(m for m, dtype in HEADERS.items() if dtype == "uint16")
    ids = np.arange(3000, dtype=np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(ids)
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        web.files[name] = header.tobytes() + ids.tobytes()
    keys = ["--pretokenized=fineweb10B", f"--pretokenized_source={web.url}"]
    run("build_fineweb_shards.py", *keys, "--max_tokens=300_000_000")
    dataset = load_dataset("fineweb10B", tmp_path / "data")
    assert sum(s.tokens for s in dataset.train) == 6000 and dataset.vocab_size == 50257
    requests = len(web.asked)
    run("build_fineweb_shards.py", *keys, "--max_tokens=300_000_000")
    assert len(web.asked) == requests
    web.files["fineweb_train_000003.bin"] = header.tobytes()
    assert "is truncated" in refused("build_fineweb_shards.py", *keys, "--max_tokens=400_000_000")
    assert not (tmp_path / "data" / "fineweb10B" / "fineweb_train_000003.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sample=1T"], "--sample=1T: choose one of 10BT"),
        (["--worker=2", "--num_workers=2"], "--worker=2: must be less than --num_workers=2"),
        (["--shard_tokens=0"], "--shard_tokens=0: must be at least 1"),
        (["--num_workers=2", "--tokenizer=a/b"], "--num_workers=2 needs --tokenizer=gpt2"),
        (["--pretokenized=c4"], "--pretokenized=c4: choose one of"),
        (["--source=none"], "--source=none: there is no such file or folder"),
        (["--source=notes.txt"], "--source=notes.txt: there is no such file"),
        (["--source=jsonl", "--text_field=body"], "there is no text under 'body', only text: set --text_field"),
    ],
)
def test_bad_input_gives_a_one_line_error(refused, corpus, arguments, words):
    assert words in refused("build_fineweb_shards.py", *arguments)


def test_a_full_disk_is_reported_before_the_start(corpus, tmp_path):
    done = call("build_fineweb_shards.py", "--sample=350BT", cwd=tmp_path)
    assert done.returncode == 2 and "needs about 667,572 MiB" in done.stderr and not (tmp_path / "data").exists()


def test_an_unavailable_hub_is_reported(refused):
    message = refused("build_fineweb_shards.py", "--max_tokens=1000", env={"HF_HUB_OFFLINE": "1"})
    assert "HuggingFaceFW/fineweb-edu cannot be read" in message


def test_bad_documents_are_skipped_counted_and_bounded_and_bad_files_named(run, refused, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "c").mkdir()
    rows = [
        '{"text": "one"}',
        '{"text": null}',
        "{",
        '{"text": 3}',
        '{"body": "x"}',
        '{"text": "a \\ud83d b"}',
        "[" * 9999,
        '{"text": "two"}',
    ]
    (tmp_path / "c" / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "c" / "b.JSONL").write_bytes(b'{"text": "\xff"}\n{"text": "three", "other": [1]}\n')
    for name, columns in (("c", {"text": ["four"], "n": [1]}), ("d", {"other": ["x"], "text": ["five"], "n": ["y"]})):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "c" / f"{name}.parquet")
    printed = run("build_fineweb_shards.py", "--source=c", "--shard_tokens=10")
    assert documents(tmp_path / "data" / "c") == ["one", "a \ufffd b", "two", "three", "four", "five"]
    assert printed.count("skipped: c/") == 5 and "skipped: c/a.jsonl, document 3: " in printed
    message = refused("build_fineweb_shards.py", "--source=c", "--dataset=few", "--max_bad=2")
    assert "c/a.jsonl, document 5" in message and "--max_bad=2" in message
    (tmp_path / "c" / "c.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    assert "c/c.parquet is damaged" in refused("build_fineweb_shards.py", "--source=c", "--dataset=damaged")


@pytest.mark.parametrize("then", ["replaced", "removed", "another changed"])
def test_a_damaged_file_is_replaced_or_removed_and_the_build_goes_on(corpus, tmp_path, monkeypatch, capsys, then):
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(build_fineweb_shards, "shard_tokens", 50_000)
    monkeypatch.setattr(build_fineweb_shards, "source", "parquet")
    folder, last = tmp_path / "data" / "d", tmp_path / "parquet" / "004.parquet"
    good = last.read_bytes()
    last.write_bytes(good[: len(good) // 2])

    def build() -> None:
        build_fineweb_shards.build(folder, sorted((tmp_path / "parquet").iterdir()))

    with pytest.raises(UserError, match="004.parquet is damaged"):
        build()
    assert list(folder.glob("*_train_*.npy"))
    last.unlink()
    if then == "another changed":
        (tmp_path / "parquet" / "000.parquet").write_bytes(good)
        with pytest.raises(UserError, match="holds an unfinished dataset with other settings"):
            build()
        return
    if then == "replaced":
        last.write_bytes(good)
    build()
    assert re.search(r"resuming after [1-9][\d,]* tokens", capsys.readouterr().out)
    assert documents(folder) == [t for n, file in enumerate(corpus) if n != 4 or then == "replaced" for t in file]


def test_a_corpus_below_one_shard_is_refused_and_leaves_nothing(refused, corpus, tmp_path):
    message = refused("build_fineweb_shards.py", "--source=jsonl")
    assert "fit into the validation shard: set --shard_tokens" in message and "prepare_text.py" in message
    assert not list((tmp_path / "data").glob("*/*"))


def test_a_long_document_in_parts_resumes_within_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "LONGEST", 20)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "some words " * 9}) + "\n" + json.dumps({"text": "end"}) + "\n")
    whole = list(build_fineweb_shards.read_files([path], None))
    assert "".join(text for text, _ in whole) == "some words " * 9 + "end" and len(whole) > 4
    for n, (_, position) in enumerate(whole, 1):
        assert list(build_fineweb_shards.read_files([path], position)) == whole[n:]
