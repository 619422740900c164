"""prepare_text.py --source: public corpora and the chat mix, read by the real `datasets` from a hub on 127.0.0.1."""

import random
import time

from conftest import SMALL, TEXT, Script

import prepare_text
from common.shards import BEGINS, load_dataset
from common.tokenizer import gpt2_tokenizer, same_vocabulary, tokenizer_from_dict
from configurator import UserError

import numpy as np
import pytest
from hub import parquet, start_hub
from test_prepare import documents_of


def make_pages(count: int) -> list[str]:
    rng, words = random.Random(4), TEXT.split()
    return [f"Page {n}. " + " ".join(rng.choice(words) for _ in range(rng.randrange(20, 300))) for n in range(count)]


PAGES = make_pages(1500)
ROWS = [{"text": t} for t in PAGES]
WIKI = ["", " = One = \n", "\n", " = = Early life = = \n", " It began . \n", " = Two = \n", " It went on . \n"]
CONFIGS = "---\nconfigs:\n- config_name: {0}\n  data_files:\n  - split: validation\n    path: {0}/validation*\n  - split: train\n    path: {0}/train*\n---\n"


def message(n, parent, role, text, rank, tree="t", lang="en"):
    return dict(message_id=n, parent_id=parent, role=role, text=text, rank=rank, message_tree_id=tree, lang=lang)


OASST = [
    message("a", None, "prompter", "Hello?", None),
    message("b", "a", "assistant", "Second best.", 1),
    message("c", "a", "assistant", "Best.", 0),
    message("d", "c", "prompter", "And then?", None),
    message("e", "d", "assistant", "The end.", 0),
    message("f", None, "prompter", "Hola?", None, "u", "es"),
    message("g", "f", "assistant", "Si.", 0, "u", "es"),
]
GSM8K = [
    {"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(40)
]


def corpora() -> dict[str, dict[str, bytes]]:
    """The contents of the hub: {id: {path: bytes}}."""
    wiki = "wikitext-2-raw-v1"
    return {
        "Skylion007/openwebtext": {
            f"plain_text/train-{n:05d}-of-00003.parquet": parquet(ROWS[500 * n : 500 * n + 500]) for n in range(3)
        },
        "stas/openwebtext-10k": {
            "openwebtext-10k.py": b"raise SystemExit", "@plain_text/train/0000.parquet": parquet(ROWS[:300]),
        },
        "allenai/c4": {"en/c4-train.00000.json.gz": b"", "@en/partial-train/0000.parquet": parquet(ROWS[:60])},
        "someone/scripted": {"scripted.py": b"raise SystemExit", "@default/train/0000.parquet": parquet(ROWS[:50])},
        "Salesforce/wikitext": {
            "README.md": CONFIGS.format(wiki).encode(),
            f"{wiki}/validation-0.parquet": parquet([{"text": t} for t in WIKI[:5]]),
            f"{wiki}/train-0.parquet": parquet([{"text": t} for t in WIKI + [" = Three = \n", " It ended . \n"]]),
        },
        "OpenAssistant/oasst1": {"data/train-0.parquet": parquet(OASST)},
        "openai/gsm8k": {
            "README.md": CONFIGS.format("main").encode(), "main/train-0.parquet": parquet(GSM8K),
            "main/validation-0.parquet": parquet(GSM8K[:1]),
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": CONFIGS.format("sample-10BT").encode(),
            **{f"sample-10BT/train-{n}.parquet": parquet(ROWS[500 * n : 500 * n + 500]) for n in range(3)},
            "sample-10BT/validation-0.parquet": parquet(ROWS[:1]),
        },
    }  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server, environment = start_hub(corpora())
    for name, value in {**environment, "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()


def splits(tmp_path, name) -> dict[str, list[str]]:
    dataset = load_dataset(name, tmp_path / "data")
    return {split: documents_of(dataset, split) for split in ("train", "val")}


def test_a_corpus_is_streamed_split_by_hash_and_deduplicated(run, hub, tmp_path):
    hub.repos["Skylion007/openwebtext"]["plain_text/train-00003-of-00004.parquet"] = parquet(ROWS[100:150])
    keys = ["--source=openwebtext", "--shard_tokens=20000", "--max_tokens=10_000_000"]
    run("prepare_text.py", *keys)
    found = splits(tmp_path, "openwebtext")
    assert sorted(found["train"] + found["val"]) == sorted(PAGES)
    assert 0.07 < len(found["val"]) / len(PAGES) < 0.13
    assert found["train"] == [t for t in PAGES if t in set(found["train"])]  # in the order of the corpus
    assert not list((tmp_path / "data" / "openwebtext").glob("*.part"))
    requests = hub.ranges
    assert "nothing to do" in run("prepare_text.py", *keys)
    assert hub.ranges == requests
    run("prepare_text.py", "--source=openwebtext", "--dataset=few", "--max_docs=100")
    few = splits(tmp_path, "few")
    assert sorted(few["train"] + few["val"]) == sorted(PAGES[:100])
    run("prepare_text.py", "--source=openwebtext", "--dataset=short", "--max_tokens=5000")
    short = load_dataset("short", tmp_path / "data")
    assert 400 < short.val[0].tokens < 600 and 4998 <= short.train[0].tokens + short.val[0].tokens <= 5000


def test_a_killed_stream_resumes_without_a_repeated_or_missing_document(run, hub, tmp_path):
    hub.repos["Skylion007/openwebtext"]["plain_text/train-00003-of-00004.parquet"] = parquet(ROWS[::3])
    keys = ["--source=Skylion007/openwebtext", "--shard_tokens=3000"]
    run("prepare_text.py", *keys, "--dataset=whole")
    rng, killed, shards = random.Random(5), 0, tmp_path / "data" / "parts"
    while killed < 6 and not (shards / "meta.json").exists():
        before = len(list(shards.glob("*.npy")))
        script = Script("prepare_text.py", *keys, "--dataset=parts", cwd=tmp_path)
        deadline = time.monotonic() + 30
        while len(list(shards.glob("*.npy"))) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.03 * rng.random())
        script.kill()
        killed += script.wait().returncode == -9
    run("prepare_text.py", *keys, "--dataset=parts")
    assert killed > 1 and splits(tmp_path, "parts") == splits(tmp_path, "whole")
    for split in ("train", "val"):
        one, two = (sorted((tmp_path / "data" / d).glob(f"*_{split}_*.npy")) for d in ("whole", "parts"))
        assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_corpus_with_a_loading_script_is_read_from_its_parquet_copy(run, hub, tmp_path):
    run("prepare_text.py", "--source=openwebtext10k", "--tokenizer=bpe", "--vocab_size=300")
    found = splits(tmp_path, "openwebtext10k")
    assert sorted(found["train"] + found["val"]) == sorted(PAGES[:300])
    run("prepare_text.py", "--source=c4", "--tokenizer=char")  # the hub has a part of it as parquet
    found = splits(tmp_path, "c4")
    assert sorted(found["train"] + found["val"]) == sorted(PAGES[:60])
    run("prepare_text.py", "--source=someone/scripted", "--tokenizer=char")
    found = splits(tmp_path, "scripted")
    assert sorted(found["train"] + found["val"]) == sorted(PAGES[:50])


def test_wikitext_is_read_by_article_with_its_own_validation_split(run, hub, tmp_path):
    printed = run("prepare_text.py", "--source=wikitext2", "--preview=1", "--batch_size=2", "--block_size=8")
    one = "= One = \n\n = = Early life = = \n It began ."
    found = splits(tmp_path, "wikitext2")
    assert found["val"] == [one]
    assert found["train"] == ["= Two = \n It went on .", "= Three = \n It ended ."]  # without the validation articles
    assert "batch 1: inputs (2, 8) int64, targets (2, 8) int64" in printed
    again = run("prepare_text.py", "--dataset=wikitext2", "--preview=2", "--batch_size=2", "--block_size=8")
    rows = [line for line in again.splitlines() if line.startswith("  '")]
    assert len(rows) == 4 and any("It" in row for row in rows)


def test_fineweb_edu_is_streamed_from_the_hub(run, hub, tmp_path):
    printed = run("build_fineweb_shards.py", "--shard_tokens=30000", "--max_tokens=100_000")
    dataset = load_dataset("edu_fineweb10B", tmp_path / "data")
    assert [s.path.name for s in dataset.val] == ["edufineweb_val_000000.npy"]
    assert sum(s.tokens for s in (*dataset.train, *dataset.val)) == 100_000 and "70,000 train" in printed
    assert documents_of(dataset, "val")[:20] == PAGES[:20]


def test_the_chat_mix_is_written_in_turns_and_reports_skipped_sources(run, refused, hub, tmp_path):
    printed = run("prepare_text.py", "--source=chat", "--max_samples_per_source=30", "--val_fraction=0.2")
    assert "chat: skipped sahil2801/CodeAlpaca-20k" in printed and "chat: 30 of openai/gsm8k" in printed
    found = {split: conversations_of(tmp_path, split) for split in ("train", "val")}
    turns = found["train"] + found["val"]
    fourteen = "<|endoftext|>User: What is 7 + 7?\nAssistant: It is 14.\nThe answer is 14.<|endoftext|>"
    assert fourteen in turns and not any("Hola" in t or "Second" in t for t in turns)
    hello = "<|endoftext|>User: Hello?\nAssistant: Best.<|endoftext|>User: And then?\nAssistant: The end.<|endoftext|>"
    assert (
        hello in turns and "<|endoftext|>It began ." in turns
    )  # a conversation stays together; a paragraph is no turn
    assert len(turns) == 30 + 1 + 3 and not set(found["train"]) & set(found["val"]) and found["val"]
    numbers = [int(t.split()[3]) for t in turns if "User: What is" in t]
    assert numbers != sorted(numbers)  # shuffled
    allowed = ["--source=chat", "--dataset=more", "--allow_synthetic=True", "--max_samples_per_source=50"]
    assert "50 synthetic conversations instead of sahil2801/CodeAlpaca-20k" in run("prepare_text.py", *allowed)
    hub.repos.clear()
    assert "--source=small_talk" in refused("prepare_text.py", "--source=chat", "--dataset=none")
    assert not (tmp_path / "data" / "none").exists()
    run("train.py", *SMALL, "--dataset=chat:0.5,more:0.5", "--block_size=64")


def conversations_of(folder, split: str) -> list[str]:
    """The conversations of data/chat, as text."""
    dataset = load_dataset("chat", folder / "data")
    shards = getattr(dataset, split)
    ids = np.concatenate([s.map() for s in shards])
    begins = np.flatnonzero(np.concatenate([np.load(s.mask) for s in shards]) & BEGINS)
    decode = tokenizer_from_dict(dataset.tokenizer).decode
    return [decode(part) for part in np.split(ids, begins[1:])]


def test_a_missing_connection_to_the_hub_is_reported_at_once(refused):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    message = refused("prepare_text.py", "--source=wikitext2", env=nowhere)
    assert "Salesforce/wikitext cannot be read: no connection to the hub (ConnectionError)" in message
    assert "--source=small_talk" in refused("prepare_text.py", "--source=chat", env=nowhere)


def test_small_talk_needs_no_network(run, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    keys = ["--source=small_talk", "--dataset=chat", "--max_samples_per_source=200", "--tokenizer=char"]
    printed = run("prepare_text.py", *keys, env=nowhere)
    assert "skipped" not in printed
    found = [text for split in ("train", "val") for text in conversations_of(tmp_path, split)]
    assert 150 < len(found) <= 200 and all("User: " in text and "Assistant: " in text for text in found)
    run("prepare_text.py", *keys, "--max_docs=50", "--overwrite=True", env=nowhere)
    assert sum(len(conversations_of(tmp_path, split)) for split in ("train", "val")) == 50


def test_list_sources_prints_every_corpus_and_downloads_nothing(run, hub):
    printed = run("prepare_text.py", "--list_sources")
    for name, corpus in prepare_text.CORPORA.items():
        assert f"{name} " in printed and corpus.license in printed and corpus.id in printed
    assert "chat" in printed and hub.ranges == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source=nonsense"], "--source=nonsense: choose one of shakespeare"),
        (["--source=nobody/nothing"], "nobody/nothing cannot be read"),
        (["--source=openwebtext", "--text_field=body", "--max_docs=5"], "there is no text under 'body', only text"),
        (["--source=c4", "--inputs=x.txt"], "give one of them"),
        (
            ["--source=openwebtext", "--special_tokens=<|user|>", "--max_docs=9"],
            "--special_tokens need --tokenizer=bpe",
        ),
        (["--preview=2"], "give --inputs=FILE"),
        (["--preview=2", "--dataset=gone"], "data/gone"),
    ],
)
def test_bad_input_gives_a_one_line_error(refused, hub, arguments, words):
    assert words in refused("prepare_text.py", *arguments)


def test_a_full_disk_is_reported_before_anything_is_downloaded(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "source", "c4")
    monkeypatch.setattr(prepare_text, "data_dir", str(tmp_path))
    monkeypatch.setattr("common.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**30}))
    with pytest.raises(UserError, match="needs about 5,000 MiB, 1,024 MiB are free: set --max_tokens"):
        prepare_text.main()
    assert hub.ranges == 0


def test_only_the_tokenizer_of_a_hub_model_is_downloaded(run, refused, hub, tmp_path):
    hub.repos["some/model"] = {"tokenizer.json": gpt2_tokenizer().to_json().encode(), "model.safetensors": b"weights"}
    (tmp_path / "a.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=a.txt", "--tokenizer=some/model")
    assert same_vocabulary(load_dataset("a", tmp_path / "data").tokenizer, gpt2_tokenizer().to_dict())
    assert not list((tmp_path / "hf").rglob("model.safetensors"))
    message = refused("prepare_text.py", "--inputs=a.txt", "--tokenizer=no/model", "--dataset=b")
    assert "--tokenizer=no/model cannot be read from the hub" in message
