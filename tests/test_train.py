"""train.py as a user runs it: a few steps on a small dataset, then what it left on disk."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import struct
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, SMALL, TEXT, Script, call, call_on_terminal, make_nanogpt_chars, two_ranks

import train
from common import setup
from common.logger import Logger
from common.shards import load_dataset

import numpy as np
import pytest
import torch


def metrics(folder: Path) -> list[dict]:
    folder = folder if (folder / "metrics.jsonl").exists() else folder / "out"
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def losses(folder: Path) -> dict[int, float]:
    return {m["step"]: m["train_loss"] for m in metrics(folder) if "train_loss" in m}


def train_on_two_ranks(*arguments, cwd) -> str:
    """What rank 0 prints."""
    ranks = two_ranks(*arguments, cwds=(cwd, cwd))
    assert all(rank.returncode == 0 for rank in ranks), [rank.stderr for rank in ranks]
    return ranks[0].stdout


def test_a_run_writes_its_files(run, chars):
    printed = run(
        "train.py",
        *[*SMALL, "--dataset=chars", "--sample_interval=2", "--checkpoint_interval=2", "--keep_checkpoints=2"],
        env={"DRAW": "1"},
    )
    out = chars / "out"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "ckpt.pt",
        "best.pt",
        "config.json",
        "metrics.jsonl",
        "log.txt",
        "results.json",
        "loss.png",
        "samples",
    }
    assert {"step_4.pt", "step_6.pt"} <= names and "step_2.pt" not in names
    assert not [n for n in names if n.endswith(".part")]
    results = json.loads((out / "results.json").read_text())
    assert results["total_steps"] == 6 and results["tokens"] == 6 * 4 * 32
    assert results["final_val_perplexity"] == pytest.approx(np.exp(results["final_val_loss"]))
    assert results["best_val_loss"] == min(m["val_loss"] for m in metrics(out) if "val_loss" in m)
    assert results["versions"]["torch"] == torch.__version__ and results["peak_memory_mib"] > 0
    assert [m["step"] for m in metrics(out) if "train_loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics(out) if "val_loss" in m] == [0, 3, 6]
    log = (out / "log.txt").read_text().splitlines()
    assert [line.split()[:2] for line in log[:3]] == [["0", "val"], ["1", "train"], ["2", "train"]]
    assert json.loads((out / "config.json").read_text())["max_iters"] == 6
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "step_0.txt",
        "step_2.txt",
        "step_4.txt",
        "step_6.txt",
    ]
    png = (out / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", png[16:24]) == (800, 500)
    assert "Try next:" in printed and "eta" in printed


def test_a_checkpoint_is_plain_unprefixed_and_self_contained(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    payload = torch.load(chars / "out" / "ckpt.pt", weights_only=True)
    assert set(payload) >= {
        "model",
        "optimizers",
        "scaler",
        "step",
        "tokens",
        "best_val_loss",
        "model_args",
        "config",
        "tokenizer",
    }
    assert "transformer.h.0.attn.c_attn.weight" in payload["model"]
    plain = {k: v for k, v in payload.items() if k not in ("model", "optimizers")}
    assert json.loads(json.dumps(plain)) == plain
    best = torch.load(chars / "out" / "best.pt", weights_only=True)
    assert best["val_loss"] == best["best_val_loss"] and "optimizers" not in best


RESUMED = [
    (),
    (
        "--optimizer=muon",
        "--dropout=0.2",
        "--gradient_accumulation_steps=2",
        "--sample_interval=2",
        "--momentum_warmup=9",
    ),
    ("--dtype=bfloat16", "--dropout=0.1", "--schedule=wsd"),
    ("--dtype=float16", "--optimizer=sgd", "--learning_rate=0.1"),
    ("--optimizer=adafactor", "--norm=rmsnorm", "--mlp=swiglu", "--pos=rope", "--n_kv_head=1", "--qk_norm=True"),
]


@pytest.mark.parametrize("options", RESUMED, ids=lambda o: " ".join(o) or "plain")
def test_a_resumed_run_is_the_same_run(run, chars, options):
    common = [*SMALL, "--dataset=chars", *options, "--lr_decay_iters=6"]
    run("train.py", *common, "--out_dir=whole")
    run("train.py", *common, "--out_dir=parts", "--max_iters=3")
    (chars / "parts" / "metrics.jsonl").open("a").write(
        '{"step": 9, "train_loss": 0.0}\n{"step": 1'
    )  # of a later crash
    run("train.py", *common, "--out_dir=parts", "--resume")
    assert losses(chars / "parts") == losses(chars / "whole")
    whole, parts = (torch.load(chars / d / "ckpt.pt", weights_only=True) for d in ("whole", "parts"))
    assert all(torch.equal(whole["model"][n], parts["model"][n]) for n in whole["model"])
    if "--momentum_warmup=9" in options:  # the sixth of nine steps
        assert whole["optimizers"][0]["param_groups"][0]["momentum"] == pytest.approx(0.95 - 0.1 * 4 / 9)
    steps = [m["step"] for m in metrics(chars / "parts") if "train_loss" in m]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("micro_batches", [2, 4])  # on two ranks without accumulation and with
def test_two_ranks_train_the_same_run_as_one(chars, micro_batches):
    common = [*SMALL, "--dataset=chars", "--max_iters=20", "--eval_interval=10"]
    common.append(f"--gradient_accumulation_steps={micro_batches}")
    one = call("train.py", *common, "--out_dir=one", cwd=chars)
    assert one.returncode == 0, one.stderr
    train_on_two_ranks(*common, "--out_dir=two", cwd=chars)
    a, b = losses(chars / "one"), losses(chars / "two")
    assert list(a) == list(b) == list(range(1, 21))
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4
    val = [[m["val_loss"] for m in metrics(chars / d) if "val_loss" in m] for d in ("one", "two")]
    assert val[0] == pytest.approx(val[1], abs=1e-4) and len(val[0]) == 3


def test_labels_are_the_next_token(run, tmp_path):
    make_nanogpt_chars(tmp_path / "data" / "abc", "abcdefghijklmnopqrstuvwxyz" * 100)
    run("train.py", *SMALL, "--dataset=abc", "--max_iters=60", "--learning_rate=1e-2", "--eval_interval=0")
    text = run("sample.py", "--start=abc", "--temperature=0", "--max_new_tokens=20", "--device=cpu")
    assert text.startswith("abcdefghijklmnopqrstuvw")


def test_evaluation_leaves_the_training_stream_alone(run, chars):
    run(
        "train.py",
        *SMALL,
        "--dataset=chars",
        "--dropout=0.2",
        "--out_dir=often",
        "--eval_interval=1",
        "--sample_interval=1",
    )
    run("train.py", *SMALL, "--dataset=chars", "--dropout=0.2", "--out_dir=never", "--eval_interval=0")
    assert losses(chars / "often") == losses(chars / "never")


def test_validation_loss_is_the_mean_over_the_whole_split(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--dropout=0.1", "--final_eval_tokens=0")
    from common.checkpoint import load_model

    model, _ = load_model(chars / "out" / "ckpt.pt")
    ids = torch.from_numpy(np.fromfile(chars / "data" / "chars" / "val.bin", np.uint16).astype(np.int64))
    n = (len(ids) - 1) // 32 * 32
    with torch.no_grad():
        logits, loss = model(ids[:n].view(-1, 32), ids[1 : n + 1].view(-1, 32))
    results = json.loads((chars / "out" / "results.json").read_text())
    assert results["final_val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    right = (logits.argmax(-1).view(-1) == ids[1 : n + 1]).float().mean().item()
    assert results["final_val_accuracy"] == pytest.approx(right, abs=1e-6)


def test_compile_that_fails_falls_back_under_auto_and_raises_under_true(monkeypatch, capsys):
    def broken(*a, **k):
        def call(*a, **k):
            raise RuntimeError("no compiler\nlong story")

        return call

    class FakeRun:
        device, world_size, model = torch.device("cuda"), 1, train.GPT(train.GPTConfig(8, 8, 1, 1, 8))

        class batches:
            first_sequence, load = (lambda *a: 0), (lambda *a: (0, 0))

        def autocast(self):
            return contextlib.nullcontext()

    run = FakeRun()
    monkeypatch.setattr(torch, "compile", broken)
    assert setup.compile_and_wrap(run, "auto", 0.0) is run.model
    assert "continuing without it (no compiler)" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no compiler"):
        setup.compile_and_wrap(run, True, 0.0)
    # When one of several ranks fails, all continue without it.
    run.world_size = 2
    monkeypatch.setattr(torch, "compile", lambda model, **k: lambda *a, **k: (None, None))
    monkeypatch.setattr(setup, "wrap_in_ddp", lambda run, model: model)
    monkeypatch.setattr(setup, "all_reduce", lambda failed: failed.add_(1))
    assert setup.compile_and_wrap(run, "auto", 0.0) is run.model and not capsys.readouterr().out


def test_fp16_scales_the_loss_and_trains(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--dtype=float16", "--max_iters=30", "--learning_rate=1e-2")
    found = losses(chars / "out")
    assert found[30] < found[1] - 0.3
    assert torch.load(chars / "out" / "ckpt.pt", weights_only=True)["scaler"]["scale"] > 0


def test_in_float16_updates_are_not_skipped_for_ever(monkeypatch):
    monkeypatch.setattr(train, "log_interval", 1000)
    monkeypatch.setattr(train.runtime, "bad_step_error", lambda run, stats: ValueError(f"step {stats.step}"))
    run = SimpleNamespace(scaler=SimpleNamespace(is_enabled=lambda: True))
    log = SimpleNamespace(step=lambda *_: None, show_step=lambda _: None)
    state, monitor = train.State(), train.runtime.StepMonitor(torch.device("cpu"), 1, time.perf_counter())
    norms = [math.inf] * 99 + [1.0] + [math.nan] * 100
    with pytest.raises(ValueError, match="step 200"):
        for norm in norms:
            state.step += 1
            monitor.submit(state, 0.1, torch.tensor(2.0), torch.tensor(norm))
            train.log_step(run, state, log, monitor)


def test_epochs_and_tokens_a_step_set_steps_and_accumulation(run, chars):
    printed = run(
        "train.py",
        *SMALL,
        "--dataset=chars",
        "--gradient_accumulation_steps=0",
        "--total_batch_tokens=512",
        "--max_iters=0",
        "--max_epochs=0.5",
        "--eval_interval=0",
    )
    assert "4 x 32 tokens x 4 micro-batches = 512 tokens" in printed
    windows = (int(len(TEXT) * 0.9) - 1) // 32 - 1
    results = json.loads((chars / "out" / "results.json").read_text())
    assert results["total_steps"] == round(0.5 * windows / 16)


def test_a_budget_of_flops_sets_the_steps(run, chars):
    printed = run("train.py", *SMALL, "--dataset=chars", "--max_iters=0", "--max_flops=1e9", "--dry_run")
    flops = float(re.search(r"FLOPs: ([\d.e+]+) per token", printed).group(1))
    assert f"; {round(1e9 / (flops * 128)):,} steps" in printed.replace("tokens; ", "; ")


def test_the_clock_ends_the_run_and_the_schedule_lands_with_it(run, chars):
    clocked = ["--max_minutes=0.05", "--schedule=linear", "--min_lr=0.0", "--log_interval=1", "--eval_interval=50"]
    run("train.py", *SMALL, "--dataset=chars", *clocked, "--warmup_iters=3", "--max_iters=0")
    results = json.loads((chars / "out" / "results.json").read_text())
    found = [m for m in metrics(chars / "out") if "train_loss" in m]
    assert results["total_steps"] == found[-1]["step"] > 20 and results["max_minutes"] == 0.05
    assert 3 < results["total_seconds"] < 30
    assert found[-1]["lr"] < 0.1 * max(m["lr"] for m in found)
    lrs = [m["lr"] for m in found[len(found) // 5 :]]
    assert all(b < a * 1.05 for a, b in zip(lrs, lrs[1:]))
    # A run that was stopped goes on with what is left of its minutes, here nothing, and says what it reached.
    payload = torch.load(chars / "out" / "ckpt.pt", weights_only=True)
    assert payload["total_seconds"] >= 3
    run("train.py", *SMALL, "--dataset=chars", *clocked, "--max_iters=0", "--resume")
    assert json.loads((chars / "out" / "results.json").read_text())["total_steps"] == results["total_steps"]


def test_minutes_that_the_start_uses_up_leave_one_step_and_a_checkpoint(run, chars):
    printed = run("train.py", *SMALL, "--dataset=chars", "--max_minutes=0.0001", "--max_iters=0")
    assert "after 128 tokens" in printed and (chars / "out" / "ckpt.pt").exists()


def test_two_ranks_stop_by_one_clock(chars):
    keys = ["--max_minutes=0.1", "--max_iters=0", "--gradient_accumulation_steps=2"]
    train_on_two_ranks(*SMALL, "--dataset=chars", *keys, cwd=chars)
    results = json.loads((chars / "out" / "results.json").read_text())
    assert results["total_steps"] == metrics(chars / "out")[-1]["step"] > 5


def test_patience_ends_a_run_whose_loss_no_longer_falls(run, chars):
    keys = ["--learning_rate=0.0", "--min_lr=0.0", "--eval_interval=2", "--max_iters=50", "--patience=3"]
    printed = run("train.py", *SMALL, "--dataset=chars", *keys)
    assert "stopping at step 6: no lower loss in 3 evaluations" in printed
    assert json.loads((chars / "out" / "results.json").read_text())["total_steps"] == 6
    assert torch.load(chars / "out" / "ckpt.pt", weights_only=True)["step"] == 6


def test_patience_counts_alike_on_all_ranks_after_a_resume(chars):
    keys = [*SMALL, "--dataset=chars", "--gradient_accumulation_steps=2", "--learning_rate=1e-2", "--patience=1"]
    train_on_two_ranks(*keys, cwd=chars)
    printed = train_on_two_ranks(*keys, "--max_iters=9", "--resume", cwd=chars)
    assert "stopping at step 6" not in printed
    assert json.loads((chars / "out" / "results.json").read_text())["total_steps"] == 9


def test_group_rates_may_change_on_resume_but_not_from_zero(run, refused, chars):
    keys = [*SMALL, "--dataset=chars", "--embedding_lr=1e-3", "--head_lr=1e-3", "--tie_weights=False"]
    run("train.py", *keys)
    run("train.py", *keys, "--resume", "--max_iters=8", "--head_lr=5e-4")
    message = refused("train.py", *keys, "--resume", "--max_iters=9", "--embedding_lr=0")
    assert "--vector_lr may change when a run resumes, but not from or to 0" in message


def test_one_dial_sets_a_whole_run_and_each_value_can_be_given(run, chars):
    printed = run("train.py", "--depth=4", "--dataset=chars", "--device=cpu", "--dry_run")
    assert "4 layers, 4 heads, width 256" in printed
    printed = run(
        "train.py", "--n_embd=128", "--depth=4", "--dataset=chars", "--device=cpu", "--dry_run", "--max_iters=7"
    )
    assert "4 layers, 2 heads, width 128" in printed and "; 7 steps" in printed
    (chars / "mine.py").write_text("n_layer = 12\nlearning_rate = 0.5\ndropout = 0.1\n")
    done = call("train.py", "mine.py", "--depth=2", "--dataset=chars", "--dry_run", cwd=chars)
    assert "2 layers" in done.stdout and "learning_rate=0.02" in done.stderr  # the dial was turned after the file
    done = call("train.py", "--depth=2", "mine.py", "--dataset=chars", "--dry_run", cwd=chars)
    assert "12 layers" in done.stdout and " learning_rate=" not in done.stderr


def test_the_dial_counts_the_vocabulary_of_stories_that_are_not_made_yet(tmp_path):
    keys = ("--depth=2", "--dataset=tinystories_synthetic", "--device=cpu", "--dry_run")
    first, second = (call("train.py", *keys, cwd=tmp_path) for _ in range(2))
    assert first.returncode == second.returncode == 0
    assert "12 tokens for each of 501,888 weights in matrices and head" in " ".join(first.stderr.split())
    assert first.stderr == second.stderr  # 12 x 2 x 128^2 + 849 x 128


def test_label_smoothing_is_in_the_training_loss_alone(run, chars):
    for smoothing in ("0.0", "0.3"):
        run(
            "train.py",
            *SMALL,
            "--dataset=chars",
            f"--label_smoothing={smoothing}",
            f"--out_dir=s{smoothing}",
            "--learning_rate=0.0",
            "--min_lr=0.0",
        )
    plain, smooth = metrics(chars / "s0.0"), metrics(chars / "s0.3")
    assert [m["val_loss"] for m in plain if "val_loss" in m] == [m["val_loss"] for m in smooth if "val_loss" in m]
    assert plain[1]["train_loss"] != smooth[1]["train_loss"]


def test_dry_run_prints_sizes_and_trains_nothing(run, tmp_path):
    printed = run("train.py", "--dry_run", "--device=cpu")
    for words in (
        "124,337,664 parameters",
        "FLOPs",
        "memory",
        "64 x 1024 tokens x 8 micro-batches = 524,288",
        "19,073 steps",
        "logits (64, 1024, 50257)",
    ):
        assert words in printed, printed
    assert "; 2 epochs\n" in run("train.py", "--dry_run", "--device=cpu", "--max_epochs=2")
    assert not (tmp_path / "out").exists()


def test_eval_only_evaluates_and_writes_no_checkpoint(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    before = (chars / "out" / "ckpt.pt").read_bytes()
    printed = run("train.py", *SMALL, "--dataset=chars", "--eval_only=True", "--init_from=resume")
    assert "val loss" in printed and " tok/s" not in printed
    assert (chars / "out" / "ckpt.pt").read_bytes() == before


def test_fine_tuning_starts_from_the_weights_of_a_run(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--max_iters=30", "--learning_rate=1e-2")
    run("train.py", *SMALL, "--dataset=chars", "--init_from=out", "--out_dir=tuned", "--block_size=16")
    final = json.loads((chars / "out" / "results.json").read_text())["final_val_loss"]
    assert metrics(chars / "tuned")[0]["val_loss"] < final + 0.3


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw", "muon"])
def test_a_fine_tuned_run_resumes_with_a_shorter_context(run, chars, optimizer):
    run("train.py", *SMALL, "--dataset=chars")
    tune = [*SMALL, "--dataset=chars", "--init_from=out", "--out_dir=tuned", f"--optimizer={optimizer}"]
    run("train.py", *tune)
    run("train.py", *tune, "--resume", "--block_size=16", "--max_iters=9")
    assert [m["step"] for m in metrics(chars / "tuned") if "train_loss" in m][-1] == 9


def test_a_run_without_a_checkpoint_is_not_taken_for_a_hugging_face_folder(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=out/x")
    for path in (chars / "out" / "x").glob("*.pt"):
        path.unlink()
    for script in ("sample.py", "evaluate.py"):
        name = "--checkpoints=out/x" if script == "evaluate.py" else "--out_dir=out/x"
        assert "there is no checkpoint out/x/" in refused(script, name)


def test_without_spaces_in_the_vocabulary_samples_begin_with_the_text_itself(run, tmp_path):
    make_nanogpt_chars(tmp_path / "data" / "names", "emma\nolivia\nava\nisabella\n" * 300)
    keys = ["--dataset=names", "--sample_prompt=Emma Q", "--sample_interval=3"]
    assert "samples begin with 'emma\\nolivia\\nava'" in run("train.py", *SMALL, *keys)
    assert len(list((tmp_path / "out" / "samples").iterdir())) > 1


def test_the_dial_divides_a_step_among_any_number_of_ranks(monkeypatch):
    for ranks in (1, 3, 6, 8):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        for depth in (1, 4, 12):
            keys = vars(train) | {"depth": depth, "dataset": "none", "device": "cpu"}
            found = {k: v for _, part in setup.from_depth(keys, {"depth"}) for k, v in part.items()}
            assert found["total_batch_tokens"] % (found["batch_size"] * keys["block_size"] * ranks) == 0


def test_nanogpts_config_files_run_unmodified(run, chars):
    """The keys and types of its config/train_shakespeare_char.py, with its advice for a CPU on the command line."""
    (chars / "config").mkdir()
    (chars / "config" / "theirs.py").write_text(
        "import time\nout_dir = 'out-chars'\neval_interval = 3\neval_iters = 2\nlog_interval = 1\n"
        "always_save_checkpoint = False\nwandb_log = False\nwandb_project = 'shakespeare-char'\n"
        "wandb_run_name = 'mini-gpt' + str(time.time())\ndataset = 'chars'\ngradient_accumulation_steps = 1\n"
        "batch_size = 4\nblock_size = 32\nn_layer = 2\nn_head = 2\nn_embd = 32\ndropout = 0.2\nlearning_rate = 1e-3\n"
        "max_iters = 6\nlr_decay_iters = 6\nmin_lr = 1e-4\nbeta2 = 0.99\nwarmup_iters = 2\ndecay_lr = True\n"
        "device = 'cpu'\ncompile = False\ndtype = 'float32'\nbackend = 'nccl'\ngrad_clip = 1.0\nbias = False\n"
    )
    run("train.py", "config/theirs.py", "--eval_iters=1")
    assert (chars / "out-chars" / "best.pt").exists()
    texts = run("sample.py", "--out_dir=out-chars", "--start=a", "--num_samples=2", "--max_new_tokens=5")
    assert texts.count("---------------\n") == 2


def test_two_first_runs_at_once_share_the_stories_one_of_them_writes(tmp_path):
    quickstart = ["train.py", ROOT / "config" / "quickstart.py", "--dry_run"]
    both = [Script(*quickstart, cwd=tmp_path) for _ in range(2)]
    for one in both:
        one.wait()
        assert one.returncode == 0, one.stderr
    assert sum("writing its stories" in one.stdout for one in both) == 1
    load_dataset("tinystories_synthetic", tmp_path / "data", verify=True)


def test_without_a_login_to_wandb_the_earlier_run_stays_where_it_is(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    nobody = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(chars), "NETRC": str(chars / "none")}
    done = call("train.py", *SMALL, "--dataset=chars", "--wandb_log=True", cwd=chars, env=nobody)
    assert done.returncode == 2 and "--wandb_log: " in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert (chars / "out" / "best.pt").exists() and not (chars / "out" / "previous-1").exists()


def test_wandb_offline_gets_the_run_its_samples_and_if_asked_its_checkpoint(run, chars):
    common = [*SMALL, "--dataset=chars", "--wandb_log=True", "--wandb_project=p", "--wandb_run_name=r"]
    run("train.py", *common, "--sample_prompt=line", "--wandb_checkpoint", "--max_iters=3", "--lr_decay_iters=6")
    files = chars / "out" / "wandb"
    (first,) = files.glob("offline-run-*/run-*.wandb")
    number = torch.load(chars / "out" / "ckpt.pt", weights_only=True)["wandb_id"]
    assert number in first.name and list(files.rglob("media/html/sample*.html"))
    assert f"{number}-model".encode() in first.read_bytes()
    run("train.py", *common, "--lr_decay_iters=6", "--resume")
    assert len({p.name for p in files.glob("offline-run-*/run-*.wandb")}) == 1  # it goes on in the same run


def resident(pid: int, kind: str) -> float:
    """MiB of a process's memory: RssAnon is its own, RssFile includes the pages of files that it maps."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident memory")
def test_memory_is_flat_on_a_file_larger_than_memory(tmp_path):
    """Training from a sparse file of 20 GB, every window from another place: what is resident does not grow."""
    make_nanogpt_chars(tmp_path / "data" / "sparse", TEXT)
    os.truncate(tmp_path / "data" / "sparse" / "train.bin", 20 * 10**9)
    options = "--block_size=256 --batch_size=64 --max_iters=100000 --eval_interval=0 --n_embd=8 --n_layer=1".split()
    script = Script("train.py", *SMALL, "--dataset=sparse", *options, cwd=tmp_path)
    log = tmp_path / "out" / "log.txt"
    sizes = {}
    deadline = time.monotonic() + 200
    while len(sizes) < 6 and time.monotonic() < deadline:
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if steps // 10 not in sizes and steps >= 10:
            sizes[steps // 10] = [resident(script.pid, kind) for kind in ("RssAnon", "RssFile")]
        time.sleep(0.02)
    script.kill()
    script.wait()
    own, mapped = zip(*sizes.values())
    assert len(sizes) == 6, script.stderr
    assert max(own) < own[0] + 64, own
    assert max(mapped) < mapped[0] + 64, mapped


BAD = [
    (["--n_head=3"], "n_embd=32 is not divisible by --n_head=3"),
    (["--dataset=nothere"], "there is no dataset data/nothere: make it with python prepare_text.py"),
    (["--block_size=30000"], "lower --block_size"),
    (["--batch_size=0"], "--batch_size=0: must be at least 1"),
    (["--device=cuda:77"], "--device=cuda:77: this machine has"),
    (["--device=tpu"], "--device=tpu: choose auto"),
    (["--dtype=int8"], "--dtype=int8: choose one of auto"),
    (["--optimizer=adamax"], "--optimizer=adamax: choose one of"),
    (["--schedule=step"], "--schedule=step: choose one of"),
    (["--norm=batch"], "--norm=batch: choose one of"),
    (["--decay_fraction=2.0"], "--decay_fraction=2.0: must be between 0 and 1"),
    (["--eval_only", "--resume", "--out_dir=nothing"], "there is no checkpoint nothing/ckpt.pt"),
    (["--compile=maybe", "--dry_run"], "--compile=maybe: choose"),
    (["--total_batch_tokens=100", "--gradient_accumulation_steps=0"], "not a multiple of batch_size x block_size"),
    (["--data_fraction=0.0"], "--data_fraction=0.0"),
    (["--seed=-1"], "--seed=-1"),
    (["--max_iters=0"], "--max_iters=0: give --max_iters, --max_epochs"),
    (["--total_batch_tokens=512"], "--gradient_accumulation_steps=1 and --total_batch_tokens=512 differ"),
    (["--learning_rate=0", "--head_lr=0.1"], "multiples of it"),
    (["--depth=-1"], "--depth=-1: must be at least 0"),
    (["--depth=2", "--n_embd=0"], "--n_embd=0: must be at least 1"),
    (["--depth=2", "--block_size=0"], "--block_size=0: must be at least 1"),
    (["--label_smoothing=2.0"], "--label_smoothing=2.0"),
    (["--hellaswag_interval=5", "--hellaswag_data=gone.jsonl"], "--hellaswag_data=gone.jsonl: no such file"),
    (["--init_from=resume"], "there is no checkpoint out/ckpt.pt"),
    (["--init_from=gone"], "there is no checkpoint gone"),
    (["--learnin_rate=1"], "did you mean learning_rate"),
    (["missing.py"], "missing.py: no such config file"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_a_one_line_error(refused, chars, arguments, words):
    assert words in refused("train.py", *SMALL, "--dataset=chars", *arguments)


def test_a_checkpoint_of_another_vocabulary_is_refused(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars")
    make_nanogpt_chars(chars / "data" / "other", "abc" * 500)
    message = refused("train.py", *SMALL, "--dataset=other", "--init_from=out", "--out_dir=o2")
    assert "vocabulary" in message and "--dataset" in message
    assert "context of 32" in refused("train.py", *SMALL, "--dataset=chars", "--init_from=out", "--block_size=64")


def test_resuming_with_other_keys_prints_them_or_refuses_them(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars")
    for key, value in (("optimizer", "sgd"), ("block_size", "16")):
        assert f"--{key}={value}: the run to resume had" in refused(
            "train.py", *SMALL, "--dataset=chars", "--resume", f"--{key}={value}"
        )
    printed = run("train.py", *SMALL, "--dataset=chars", "--resume", "--max_iters=8", "--weight_decay=0.2")
    assert "resumed with other keys than before: weight_decay 0.1 -> 0.2" in printed
    groups = torch.load(chars / "out" / "ckpt.pt", weights_only=True)["optimizers"][0]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0]


def test_datasets_mix_and_each_has_its_validation_loss(run, refused, tmp_path):
    make_nanogpt_chars(tmp_path / "data" / "a", TEXT)
    make_nanogpt_chars(tmp_path / "data" / "b", "".join(reversed(TEXT)))
    keys = [*SMALL, "--dataset=a:3,b:1", "--max_iters=40", "--eval_interval=20"]
    printed = run("train.py", *keys, "--out_dir=whole")
    assert "data: a (75.0%)" in printed and "data: b (25.0%)" in printed
    metrics = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    by_source = [m["val_loss_by_source"] for m in metrics if "val_loss" in m]
    assert len(by_source) == 3 and all(set(m) == {"a", "b"} for m in by_source)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    losses = results["final_val_loss_by_source"]
    assert results["final_val_loss"] == pytest.approx(0.75 * losses["a"] + 0.25 * losses["b"])
    alone = run(
        "train.py", *SMALL, "--dataset=b", "--init_from=whole/ckpt.pt", "--eval_only=True", "--eval_iters=100000"
    )
    assert f"val loss {losses['b']:.4f}" in alone
    # Stopped and gone on with, the mixture is the same.
    run("train.py", *keys, "--out_dir=parts", "--max_iters=25", "--lr_decay_iters=40")
    run("train.py", *keys, "--out_dir=parts", "--resume", "--lr_decay_iters=40")
    parts = [json.loads(line) for line in open(tmp_path / "parts" / "metrics.jsonl")]
    each = [[m["train_loss"] for m in found if "train_loss" in m] for found in (metrics, parts)]
    assert each[0] == each[1]
    assert "there is no dataset data/c" in refused("train.py", *SMALL, "--dataset=a:1,c:1")


def test_on_a_terminal_a_bar_of_80_columns_and_elsewhere_lines_that_fit(run, chars):
    done, shown = call_on_terminal("train.py", *SMALL, "--dataset=chars", "--out_dir=bar", cwd=chars)
    assert done.returncode == 0, shown
    bars = [part for part in re.split(r"[\r\n]", shown) if re.search(r"loss [\d.]+ .*lr .*tok/s.*eta", part)]
    assert bars and max(map(len, bars)) <= 80 and any(re.match(r" *[1-6]/6 ", b) and " val " in b for b in bars), shown
    assert "val loss" in shown and "Try next:" in shown and "norm" not in shown.split("step:")[1]
    start = shown[: shown.index("     0/6")].replace("\r", "").strip().split("\n")
    assert len(start) <= 5 and max(map(len, start)) < 90, start
    _, slow = call_on_terminal("train.py", *SMALL, "--dataset=chars", "--log_interval=6", "--out_dir=bar", cwd=chars)
    bars = [part for part in re.split(r"[\r\n]", slow) if re.match(r" *[1-5]/6 .*eta \d+:\d\d", part)]
    assert bars, slow  # the bar moves, and says the time left, before there is a line to log
    lines = [
        line for line in run("train.py", *SMALL, "--dataset=chars", "--out_dir=lines").splitlines() if " tok/s" in line
    ]
    assert len(lines) == 6 and max(map(len, lines)) <= 80
    assert re.fullmatch(
        r" +3/6  loss \d\.\d{4}  lr \d\.\de-\d  norm \d+\.\d\d  [\d.,]+ ms  [\d.]+k? tok/s  eta \d+:\d\d", lines[2]
    )


@pytest.mark.parametrize("more", [["--max_minutes=0.02"], ["--wandb_log=True"]])
def test_on_a_terminal_by_the_clock_and_with_wandb(chars, more):
    done, shown = call_on_terminal("train.py", *SMALL, "--dataset=chars", *more, cwd=chars)
    assert done.returncode == 0 and "Try next:" in shown, shown


def test_a_full_disk_costs_tensorboards_files_alone(capsys):
    class Full:
        def flush(self):
            raise OSError(28, "No space left on device")

    log = Logger.__new__(Logger)
    log.board = Full()
    for _ in range(2):
        log.to_board(lambda board: None)
    assert log.board is None and capsys.readouterr().out.count("No space left on device") == 1


def test_numbers_of_a_line_are_short():
    from common.logger import format_duration, short_number

    assert [
        short_number(x) for x in (52_917, 1_370_000, 999_960, 7.5, 812, 4_012)
    ] == "52.9k 1.37M 1.00M 7.5 812 4.01k".split()
    assert [format_duration(s) for s in (38, 754, 7272, 186_000)] == ["0:38", "12:34", "2:01:12", "2d 03h"]


def test_tensorboard_has_the_metrics_of_the_run_and_of_its_resumption(run, chars):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = [*SMALL, "--dataset=chars", "--tensorboard", "--sample_prompt=line"]
    run("train.py", *common, "--max_iters=4", "--lr_decay_iters=6")
    run("train.py", *common, "--lr_decay_iters=6", "--resume")
    board = EventAccumulator(str(chars / "out" / "tensorboard")).Reload()
    for key in ("train_loss", "val_loss", "lr"):
        told = {e.step: e.value for e in board.Scalars(key)}
        wanted = {m["step"]: m[key] for m in metrics(chars) if key in m}
        assert told.keys() == wanted.keys() and all(abs(told[s] - wanted[s]) < 1e-6 for s in wanted)
    assert "sample/text_summary" in board.Tags()["tensors"]


def test_resuming_with_another_batch_size_continues_at_the_next_sequence(run, chars):
    """Without a learning rate a step's loss depends on its text alone."""
    frozen = [*SMALL, "--dataset=chars", "--learning_rate=0.0", "--min_lr=0.0", "--eval_interval=0"]
    run("train.py", *frozen, "--batch_size=4", "--max_iters=6", "--out_dir=whole")
    run("train.py", *frozen, "--batch_size=8", "--max_iters=2", "--out_dir=parts")
    run("train.py", *frozen, "--batch_size=4", "--max_iters=4", "--out_dir=parts", "--resume")
    whole, parts = losses(chars / "whole"), losses(chars / "parts")
    assert parts[1] == pytest.approx((whole[1] + whole[2]) / 2) and [parts[3], parts[4]] == [whole[5], whole[6]]
    assert [m["tokens"] for m in metrics(chars / "parts") if "train_loss" in m] == [256, 512, 640, 768]
    checkpoint = torch.load(chars / "parts" / "ckpt.pt", weights_only=True)
    assert (checkpoint["sequences"], checkpoint["tokens"]) == (24, 768)
    assert json.loads((chars / "parts" / "results.json").read_text())["tokens"] == 768


def test_eval_only_makes_no_optimizer_and_compiles_nothing(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    (chars / "broken.py").write_text(
        "import torch\n\ndef broken(*a, **k):\n    raise SystemExit('not needed to evaluate')\n\n"
        "torch.optim.AdamW.__init__ = torch.compile = torch.Tensor.backward = broken\n"
    )
    last = [m["val_loss"] for m in metrics(chars) if "val_loss" in m][-1]
    printed = run(
        "train.py", "broken.py", *SMALL, "--dataset=chars", "--init_from=out/ckpt.pt", "--eval_only", "--compile=True"
    )
    assert f"val loss {last:.4f}" in printed and not (chars / "out" / "previous-1").exists()


def test_safetensors_in_the_working_directory_are_not_taken_for_the_run(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--sample_prompt=line")
    (chars / "other.safetensors").write_bytes(b"not weights")
    (chars / "config.json").write_text("{}")
    assert run("sample.py", "--start=line", "--max_new_tokens=3").startswith("line")
    assert "chars" in run("evaluate.py", "--num_samples=0")


def test_the_seconds_of_steps_without_a_log_line_are_counted(run, chars):
    keys = [
        "--learning_rate=0.0",
        "--min_lr=0.0",
        "--eval_interval=5",
        "--max_iters=50",
        "--patience=1",
        "--log_interval=1000",
    ]
    run("train.py", *SMALL, "--dataset=chars", *keys)
    results = json.loads((chars / "out" / "results.json").read_text())
    assert results["total_steps"] == 5 and results["train_seconds"] > 0


SAYS_THE_COMPILER = """
import runpy, sys

def imported():
    return [name for name in ("torch._dynamo", "sympy") if name in sys.modules]

assert not imported()
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print(imported())
"""


def run_and_say_the_compiler(folder: Path, script: str, *keys: str) -> str:
    """The modules of the compiler that a script imported."""
    (folder / "says.py").write_text(SAYS_THE_COMPILER)
    done = call(folder / "says.py", ROOT / script, *keys, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "sgd", "adafactor"])
def test_training_that_is_not_compiled_never_imports_the_compiler(chars, optimizer):
    """It would take as long as importing torch."""
    keys = [*SMALL, f"--optimizer={optimizer}", "--dataset=chars"]
    assert run_and_say_the_compiler(chars, "train.py", *keys) == "[]"


@pytest.mark.parametrize("rope", [False, True])
def test_sampling_and_evaluation_never_import_the_compiler(run, chars, rope):
    modern = ["--pos=rope", "--norm=rmsnorm"] if rope else []
    run("train.py", *SMALL, "--dataset=chars", "--max_iters=2", *modern)
    assert run_and_say_the_compiler(chars, "sample.py", "--max_new_tokens=2", "--seed=1") == "[]"
    keys = ["--checkpoints=out", "--num_samples=1", "--eval_tokens=100"]
    assert run_and_say_the_compiler(chars, "evaluate.py", *keys) == "[]"


def test_what_the_version_before_left_resumes_samples_and_evaluates(run, tmp_path):
    """A dataset, a config and a run of three steps, made before the position was counted in sequences."""
    shutil.copytree(ROOT / "tests" / "previous_version", tmp_path, dirs_exist_ok=True)
    assert run("sample.py", "--start=line", "--max_new_tokens=5").startswith("line")
    run("evaluate.py", "--checkpoints=out/ckpt.pt", "--num_samples=0")
    with open(tmp_path / "evaluation" / "evaluation_results.csv") as f:
        evaluated = float(next(csv.DictReader(f))["loss"])
    assert evaluated == pytest.approx(
        json.loads((tmp_path / "out" / "results.json").read_text())["final_val_loss"], abs=1e-5
    )
    run("train.py", "keys.py", "--max_iters=6", "--resume")
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["sequences"] == 6 * 8
    whole = [json.loads(line) for line in open(tmp_path / "whole_metrics.jsonl")]
    for key in ("train_loss", "val_loss", "lr", "tokens"):
        want = {(m["step"], "val_loss" in m): m[key] for m in whole if key in m}
        found = {(m["step"], "val_loss" in m): m[key] for m in metrics(tmp_path) if key in m}
        found.pop((3, True), None)  # an evaluation where the short run ended
        # Dropout draws other numbers than that version; other batches would differ by more.
        assert found == pytest.approx(want, abs=4e-3 if key.endswith("loss") else 1e-9), key


def test_a_run_from_other_weights_says_that_they_set_the_model_keys_and_resumes(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    tune = ["train.py", *SMALL, "--dataset=chars", "--init_from=out", "--out_dir=tuned", "--lr_decay_iters=6"]
    printed = run(*tune, "--n_layer=3", "--mlp=relu2", "--max_iters=3")
    assert "2 layers, 2 heads, width 32" in printed and "from out, which sets the model keys" in printed
    run(*tune, "--n_layer=3", "--mlp=relu2", "--max_iters=4", "--resume")  # the same command again
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=tuned", "--max_iters=5", "--init_from=resume")
    run(*tune, "--max_iters=6", "--resume")
    saved = torch.load(chars / "tuned" / "ckpt.pt", weights_only=True)
    assert saved["requested"]["init_from"] == saved["config"]["init_from"] == "out"
    assert json.loads((chars / "tuned" / "config.json").read_text())["n_layer"] == 2
