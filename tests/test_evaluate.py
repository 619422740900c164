"""evaluate.py: its numbers against a plain computation, and its files."""

import csv
import json
import math

from conftest import SMALL, TEXT

import evaluate
from common.checkpoint import load_model
from common.shards import load_dataset

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pretrained import save_gpt2, save_gpt2_tokenizer


@pytest.fixture
def trained(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--keep_checkpoints=2", "--final_eval_tokens=0")
    return chars


def rows_of(folder) -> list[dict]:
    with open(folder / "evaluation" / "evaluation_results.csv") as f:
        return list(csv.DictReader(f))


def test_its_loss_equals_the_final_loss_of_training_and_its_files_agree(run, trained):
    printed = run("evaluate.py", "--checkpoints=out/ckpt.pt,out/step_3.pt", "--eval_tokens=0", "--baseline=True")
    results = json.loads((trained / "out" / "results.json").read_text())
    rows = rows_of(trained)
    names = ("ckpt.pt untrained", "ckpt.pt", "step_3.pt untrained", "step_3.pt")
    assert [r["path"] for r in rows] == [f"out/{name}" for name in names]
    last = rows[1]
    assert float(last["loss"]) == pytest.approx(results["final_val_loss"], abs=1e-5)
    assert float(last["accuracy"]) == pytest.approx(results["final_val_accuracy"], abs=1e-6)
    assert int(last["params"]) == results["model_parameters"] and [r["step"] for r in rows] == ["0", "6", "0", "3"]
    assert float(last["perplexity"]) == pytest.approx(math.exp(float(last["loss"])))
    bits = float(last["loss"]) / math.log(2)
    assert float(last["bits_per_byte"]) == pytest.approx(bits)  # a character is a byte here
    assert float(rows[0]["loss"]) > float(last["loss"])
    assert float(rows[0]["loss"]) == pytest.approx(math.log(40), abs=0.1)
    full = json.loads((trained / "evaluation" / "evaluation_results.json").read_text())
    assert [r["loss"] for r in full] == [float(r["loss"]) for r in rows]
    assert len(full[1]["samples"]) == 8 and "Once upon a time," in full[1]["prompts"]
    assert "out/step_3.pt untrained" in printed and "> Once upon a time," in printed


def test_a_folder_of_runs_means_all_its_runs(run, refused, trained):
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=study/b")
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=study/a", "--seed=2")
    run("evaluate.py", "--checkpoints=study", "--num_samples=0")
    assert [r["path"] for r in rows_of(trained)] == ["study/a/best.pt", "study/b/best.pt"]
    (trained / "empty").mkdir()
    assert "there is no checkpoint" in refused("evaluate.py", "--checkpoints=empty")


def test_with_a_stride_each_token_counts_once_and_sees_the_tokens_before_it(run, trained):
    run("evaluate.py", "--checkpoints=out", "--eval_tokens=0", "--stride=5", "--num_samples=0", "--batch_size=3")
    model, _ = load_model(trained / "out")
    ids = load_dataset("chars", trained / "data").val[0].map().astype(np.int64)
    T, losses = model.config.block_size, {}
    for start in range(0, len(ids) - T, 5):
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(ids[start : start + T][None]))
        per_token = F.cross_entropy(logits[0], torch.from_numpy(ids[start + 1 : start + T + 1]), reduction="none")
        losses |= {start + 1 + n: float(per_token[n]) for n in range(0 if start == 0 else T - 5, T)}
    (row,) = rows_of(trained)
    assert int(row["tokens"]) == len(losses)
    assert float(row["loss"]) == pytest.approx(np.mean([*losses.values()]), abs=1e-5)
    assert sorted(losses) == list(range(1, len(losses) + 1))
    assert "prompts" not in json.loads((trained / "evaluation" / "evaluation_results.json").read_text())[0]


def test_a_pretrained_model_is_evaluated_on_a_dataset_of_its_vocabulary(run, refused, trained, gpt2_vocabulary):
    save_gpt2(trained / "m", vocab_size=50257)
    save_gpt2_tokenizer(trained / "m", gpt2_vocabulary)
    (trained / "book.txt").write_text(TEXT)
    run("prepare_text.py", "--inputs=book.txt")
    keys = ["--checkpoints=m", "--max_new_tokens=10", "--num_samples=2"]
    run("evaluate.py", *keys, "--dataset=book", "--block_size=32")
    (row,) = rows_of(trained)
    assert row["step"] == "0" and row["block_size"] == "32"
    size = len(TEXT[int(len(TEXT) * 0.9) :])
    tokens = int(row["tokens"])
    assert float(row["bits_per_byte"]) == pytest.approx(float(row["loss"]) / math.log(2) * tokens / size, rel=0.05)
    assert "--dataset=NAME" in refused("evaluate.py", *keys)
    assert "another vocabulary" in refused("evaluate.py", *keys, "--dataset=chars")


def test_distinct_and_divergence_equal_counts_by_hand():
    assert evaluate.distinct(["a b a b", "c"], 1) == 3 / 5
    assert evaluate.distinct(["a b a b", "c"], 2) == 2 / 3
    assert evaluate.distinct(["", "a"], 2) is None
    corpus = np.array([0, 0, 1, 1])
    assert evaluate.divergence([np.array([0, 1])], corpus, 1) == 0
    assert evaluate.divergence([np.array([0, 0])], corpus, 1) == pytest.approx(math.log(2))
    assert evaluate.divergence([np.array([7])], corpus, 1) == pytest.approx(math.log(4.5 / 0.5))
    assert evaluate.divergence([np.array([0, 0]), np.array([0, 1])], corpus, 2) == pytest.approx(math.log(3 / 2))
    assert evaluate.divergence([], corpus, 1) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoints=gone"], "gone"),
        (["--checkpoints=out,out/stpe_3.pt"], "there is no checkpoint out/stpe_3.pt"),
        (["--split=test"], "--split=test: choose one of val, train"),
        (["--stride=64"], "--block_size=32 --stride=64: the context is 32"),
        (["--block_size=64"], "the context is 32"),
        (["--dataset=none"], "there is no dataset data/none"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        ([f"--seed={2**64}"], "must be at least 0 and less than 2^63"),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, trained, arguments, words):
    assert words in refused("evaluate.py", "--checkpoints=out", *arguments)
    assert not (trained / "evaluation").exists()
