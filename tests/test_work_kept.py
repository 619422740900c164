"""A folder that holds a run's work is never begun over, and a dataset that changed does not go unnoticed."""

import json
import signal
import time

from conftest import SMALL, TEXT, Script, call

from common.checkpoint import build_model, load_checkpoint
from common.files import read_metrics
from configurator import UserError
from model import GPT, GPTConfig

import pytest
import torch

BEST_ONLY = [*SMALL, "--dataset=chars", "--always_save_checkpoint=False"]


@pytest.mark.parametrize("option", ["--resume", "--wandb_run_name=again"])
def test_a_run_that_left_only_its_best_weights_is_moved_aside(run, chars, option):
    run("train.py", *BEST_ONLY)
    (chars / "out" / "ckpt.pt").unlink()  # as after a kill before the end
    best, metrics = (chars / "out" / "best.pt").read_bytes(), (chars / "out" / "metrics.jsonl").read_text()
    printed = run("train.py", *BEST_ONLY, option, "--max_iters=3")
    moved = chars / "out" / "previous-1"
    assert (moved / "best.pt").read_bytes() == best and (moved / "metrics.jsonl").read_text() == metrics
    assert "--init_from=out/previous-1/best.pt starts from its best weights" in printed
    assert ("out has no checkpoint to resume from: starting the run" in printed) == (option == "--resume")
    assert load_checkpoint(chars / "out" / "ckpt.pt")["step"] == 3


def test_a_run_resumed_at_step_0_keeps_its_files(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--max_iters=1")
    checkpoint = torch.load(chars / "out" / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"step": 0, "sequences": 0, "tokens": 0}, chars / "out" / "ckpt.pt")
    run("train.py", *SMALL, "--dataset=chars", "--resume")
    assert not (chars / "out" / "previous-1").exists()


def wait_for_step(folder, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (folder / "log.txt").exists() and len((folder / "log.txt").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} is not at step {step}")


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(refused, chars):
    keys = [*SMALL, "--dataset=chars", "--max_iters=100000", "--eval_interval=0", "--checkpoint_interval=5"]
    first = Script("train.py", *keys, cwd=chars)
    wait_for_step(chars / "out", 10)
    for option in ("--resume", "--seed=7"):
        assert "--out_dir=out: another run is writing there" in refused("train.py", *keys, option)
    assert not (chars / "out" / "previous-1").exists()
    steps = len(read_metrics(chars / "out"))
    wait_for_step(chars / "out", steps + 10)  # the first run goes on, in its own files
    assert "val loss" in call("train.py", *keys, "--resume", "--eval_only", cwd=chars).stdout  # reading is allowed
    first.kill(signal.SIGKILL)
    first.wait()
    assert "the run to resume is at step" in refused(
        "train.py", *keys, "--resume", "--max_iters=1"
    )  # the lock has ended


def test_a_dataset_that_was_made_again_is_not_resumed_on(run, refused, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare = ["prepare_text.py", "--inputs=a.txt", "--dataset=d", "--tokenizer=char"]
    run(*prepare)
    train = ["train.py", *SMALL, "--dataset=d"]
    run(*train)
    (tmp_path / "a.txt").write_text(TEXT[: len(TEXT) // 2])
    run(*prepare, "--overwrite=True")
    again = [*train, "--resume", "--max_iters=8"]
    assert "the dataset d is another than the run was trained on: --init_from=out" in refused(*again)
    run(*train, "--init_from=out", "--out_dir=new", "--max_iters=2")
    (tmp_path / "a.txt").write_text(TEXT)
    run(*prepare, "--overwrite=True")
    run(*again)  # the same content again


def test_a_dry_run_refuses_what_the_run_refuses(refused, run, chars):
    train = ["train.py", *SMALL, "--dataset=chars"]
    for option, words in (
        ("--block_size=111540", "--block_size"), ("--compile=0", "--compile=0"),
        ("--rope_base=0", "--rope_base=0"), ("--decay_fraction=2.0", "--decay_fraction=2.0"),
        ("--peak_tflops=-1.0", "--peak_tflops=-1.0"), ("--logit_softcap=-3.0", "--logit_softcap=-3.0"),
    ):  # fmt: skip
        assert words in refused(*train, option, "--dry_run"), option
    assert refused(*train, "--block_size=111540") == refused(*train, "--block_size=111540", "--dry_run")
    assert "shapes: idx" in run(*train, "--dry_run") and not (chars / "out").exists()
    run(*train)
    message = refused(*train, "--resume", "--n_layer=3", "--dry_run")
    assert "the run to resume had 2" in message


def test_keys_given_on_the_command_line_are_never_ignored(run, chars):
    (chars / "c.py").write_text("max_minutes = 20.0\ntotal_batch_tokens = 256\n")
    printed = run("train.py", *SMALL, "--dataset=chars", "c.py", "--max_iters=3")
    assert " 3/3 " in printed
    printed = run("train.py", *SMALL, "--dataset=chars", "c.py", "--max_iters=2", "--gradient_accumulation_steps=3")
    assert "x 3 micro-batches = 384 tokens; 2 steps" in printed
    printed = run("train.py", *SMALL, "--dataset=chars", "--max_epochs=0.05", "--max_iters=1000")
    steps = json.loads((chars / "out" / "results.json").read_text())["total_steps"]
    assert 0 < steps < 100 and f"{steps}/{steps}" in printed  # given together, the first limit ends the run


def old_nanogpt_checkpoint(folder) -> dict:
    """A checkpoint of nanoGPT from before its weights were tied, and its optimizer's groups of before May 2023."""
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True, vocab_size=50)
    model = GPT(GPTConfig(**args, tie_weights=False, mlp="gelu_erf"))
    weights = {n: p[:50] if len(p) == 64 and "h." not in n else p for n, p in model.state_dict().items()}
    decayed = [p for n, p in weights.items() if p.dim() == 2 and "transformer.w" not in n]
    others = [p for n, p in weights.items() if not (p.dim() == 2 and "transformer.w" not in n)]
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(p) for p in ps]} for ps in (decayed, others)])
    checkpoint = {"model": weights, "model_args": args, "optimizer": optimizer.state_dict(), "iter_num": 4}
    checkpoint |= {"best_val_loss": 9.0, "config": {"dataset": "chars", "block_size": 32}}
    (folder / "out").mkdir()
    torch.save(checkpoint, folder / "out" / "ckpt.pt")
    return model


def test_nanogpts_untied_head_is_kept_and_its_old_optimizer_state_starts_afresh(run, chars):
    theirs = old_nanogpt_checkpoint(chars).eval()
    ours = build_model(load_checkpoint(chars / "out" / "ckpt.pt")).eval()
    idx = torch.randint(50, (2, 20))
    with torch.no_grad():
        assert not ours.config.tie_weights and torch.equal(ours(idx)[0], theirs(idx)[0])
    vocabulary = ["--dataset=chars", "--bias=True", "--init_from=resume", "--max_iters=6", "--eval_interval=0"]
    printed = run("train.py", *SMALL, *vocabulary)
    assert "the optimizer's state has another layout (nanoGPT's before May 2023): it starts afresh" in printed


def test_absurd_sizes_in_a_checkpoint_take_no_memory():
    weights = GPT(GPTConfig(8, 64, 1, 1, 8)).state_dict()
    for key, value in (("n_layer", 10**9), ("n_embd", 10**7), ("vocab_size", 10**9), ("mlp_hidden", 10**8)):
        args = dict(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8) | {key: value}
        with pytest.raises(UserError, match="the weights do not fit this model|is not a size"):
            build_model({"model": dict(weights), "model_args": args})


def test_one_damaged_byte_in_the_metrics_costs_its_line_at_resume(run, chars):
    run("train.py", *SMALL, "--dataset=chars")
    metrics = chars / "out" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(True)
    metrics.write_bytes(
        b"".join([lines[0], lines[1].replace(b'"step"', b'"st\xffp"'), b"[1]\n", b"[" * 9999 + b"\n", *lines[2:]])
    )
    run("train.py", *SMALL, "--dataset=chars", "--resume", "--max_iters=8")
    steps = [entry["step"] for entry in read_metrics(chars / "out") if "train_loss" in entry]
    assert len(steps) == 7 and steps[-1] == 8
