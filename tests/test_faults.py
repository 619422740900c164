"""Faults injected into real runs, which are then resumed and compared with a run without faults, bit for bit.

`pytest` runs a short form. The longer one, with its figures at the end:

    python tests/test_faults.py --kills=300
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, SMALL, TEXT, Script, call, make_nanogpt_chars

from common.checkpoint import load_checkpoint, load_latest, save_checkpoint
from common.shards import load_dataset
from configurator import UserError, configure, short_errors

import numpy as np
import pytest
import torch

kills = 300  # kill -9 at random instants, in all
seed = 1  # of the instants

STEPS = 30
OFTEN = (
    f"--dataset=chars --max_iters={STEPS} --eval_interval=5 --checkpoint_interval=3 --sample_interval=12 --keep_checkpoints=2"
).split()
SETTINGS = [
    "--dtype=bfloat16 --dropout=0.2 --gradient_accumulation_steps=2",
    "--dtype=float16 --learning_rate=1e-2",
    "--optimizer=muon --schedule=wsd --norm=rmsnorm --mlp=swiglu --pos=rope",
    "--optimizer=adafactor --qk_norm=True --n_kv_head=1",
    "--optimizer=sgd --learning_rate=0.1 --label_smoothing=0.1 --activation_checkpointing=True",
]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def told(out: Path) -> list[dict]:
    """What the log says of every step, without the seconds it took."""
    timed = ("tokens_per_sec", "mfu", "elapsed")
    return [{k: v for k, v in m.items() if k not in timed} for m in metrics(out)]


def same(a, b) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out: Path, whole: Path) -> None:
    """Every loss, rate, norm and evaluation, the samples, the weights and the optimizer's state."""
    assert sorted(told(out), key=str) == sorted(told(whole), key=str)
    assert [m["step"] for m in told(out) if "train_loss" in m] == list(range(1, STEPS + 1))
    ours, theirs = (load_checkpoint(d / "ckpt.pt") for d in (out, whole))
    for part in ("model", "optimizers", "scaler", "step", "tokens", "best_val_loss", "sequences"):
        assert same(ours[part], theirs[part]), part
    assert same(load_checkpoint(out / "best.pt")["model"], load_checkpoint(whole / "best.pt")["model"])
    texts = [{p.name: p.read_text() for p in (d / "samples").iterdir()} for d in (out, whole)]
    assert texts[0] == texts[1]
    assert not list(out.glob("*.part"))


def arguments(setting: str, out: str) -> list[str]:
    return [*SMALL, *OFTEN, *setting.split(), f"--out_dir={out}"]


def whole_run(folder: Path, setting: str) -> float:
    """Train without a fault; returns the seconds it took."""
    call("train.py", "--help", cwd=folder)  # not those of the first start
    start = time.monotonic()
    done = call("train.py", *arguments(setting, "whole"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start


def interrupted_runs(folder: Path, setting: str, count: int, dice: random.Random, number=signal.SIGKILL):
    """Inject `count` signals at random instants, resuming each time; yields (signals so far, path of a finished run)."""
    seconds = whole_run(folder, setting)
    sent = 0
    while sent < count:
        out = folder / "parts"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(dice.randrange(1, 6)):
            if sent == count:
                break
            script = Script("train.py", *arguments(setting, "parts"), "--resume", cwd=folder)
            time.sleep(dice.random() * seconds)
            script.kill(number)
            script.wait()
            hit = script.returncode in (-number, 128 + number)
            assert hit or script.returncode == 0, (script.returncode, script.stderr)
            sent += hit
        done = call("train.py", *arguments(setting, "parts"), "--resume", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        yield sent, out


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_after_kill_9_is_bitwise_equal(chars, setting):
    for _, out in interrupted_runs(chars, setting, 2, random.Random(setting)):
        assert_same_run(out, chars / "whole")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(chars, name):
    number = getattr(signal, name)
    for _, out in interrupted_runs(chars, "--dropout=0.1", 2, random.Random(name), number):
        assert_same_run(out, chars / "whole")
    shutil.rmtree(chars / "parts")
    long = [*SMALL, "--dataset=chars", "--max_iters=100000", "--eval_interval=0", "--out_dir=parts"]
    script = Script("train.py", *long, cwd=chars)
    wait_for(lambda: (chars / "parts" / "log.txt").exists() and len((chars / "parts" / "log.txt").read_text()) > 500)
    script.kill(number)
    assert script.wait().returncode == 128 + number and f"{name}: finishing the step" in script.stderr
    last = metrics(chars / "parts")[-1]["step"]
    assert load_checkpoint(chars / "parts" / "ckpt.pt")["step"] == last and f"stopped at step {last:,}" in script.stdout


def wait_for(condition, seconds=60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_ctrl_c_leaves_at_once(chars):
    run = [*SMALL, "--dataset=chars", "--max_iters=4", "--out_dir=parts"]
    assert call("train.py", *run, cwd=chars).returncode == 0
    before = (chars / "parts" / "ckpt.pt").read_bytes()
    endless = [*run, "--resume", "--max_iters=6", "--gradient_accumulation_steps=1000000"]
    script = Script("train.py", *endless, cwd=chars)
    wait_for(lambda: "resumed with other keys" in script.stdout)
    time.sleep(1)
    script.kill(signal.SIGINT)
    script.kill(signal.SIGINT)  # the same key, held a little long
    time.sleep(1.3)
    assert Path(f"/proc/{script.pid}").exists() and "finishing the step" in script.stderr
    script.kill(signal.SIGINT)
    start = time.monotonic()
    assert script.wait().returncode == 130 and time.monotonic() - start < 5
    assert (chars / "parts" / "ckpt.pt").read_bytes() == before


def test_sigterm_while_compiling_leaves_at_once_and_compiled_training_equals_eager(chars):
    run = [*SMALL, "--dataset=chars", "--n_layer=1"]
    compiled = [*run, "--compile=True", "--out_dir=compiled"]
    fresh = {"TORCHINDUCTOR_CACHE_DIR": str(chars / "cache")}
    script = Script("train.py", *compiled, cwd=chars, env=fresh)
    wait_for(lambda: "step: " in script.stdout)
    time.sleep(1)
    script.kill(signal.SIGTERM)
    start = time.monotonic()
    assert script.wait().returncode == -signal.SIGTERM and time.monotonic() - start < 5
    assert not (chars / "compiled").exists()
    # The next run finds a compiler's cache that was cut off, and trains as the model that is not compiled.
    assert call("train.py", *compiled, "--resume", cwd=chars, env=fresh).returncode == 0
    assert call("train.py", *run, "--out_dir=eager", cwd=chars).returncode == 0
    a, b = ([m["train_loss"] for m in metrics(chars / d) if "train_loss" in m] for d in ("compiled", "eager"))
    assert len(a) == 6 and a == pytest.approx(b, abs=1e-4)
    assert not any("_orig_mod" in name for name in load_checkpoint(chars / "compiled" / "ckpt.pt")["model"])


def test_sigterm_during_a_save_and_an_evaluation_loses_nothing(run, chars):
    keys = [
        *SMALL,
        "--dataset=chars",
        "--n_embd=256",
        "--n_layer=4",
        "--eval_iters=100",
        "--max_iters=9",
        "--dropout=0.1",
    ]
    run("train.py", *keys, "--out_dir=whole")
    script = Script("train.py", *keys, "--out_dir=parts", cwd=chars)
    part = chars / "parts" / "ckpt.pt.part"
    wait_for(part.exists)
    assert "3/9  val" not in script.stdout
    script.kill(signal.SIGTERM)
    assert script.wait().returncode == 128 + signal.SIGTERM and not part.exists()
    assert 3 <= load_checkpoint(chars / "parts" / "ckpt.pt")["step"] <= 4
    run("train.py", *keys, "--out_dir=parts", "--resume")
    assert told(chars / "parts") == told(chars / "whole")


def test_an_evaluation_heeds_a_signal(chars):
    ids = np.fromfile(chars / "data" / "chars" / "val.bin", np.uint16)
    np.tile(ids, 2000).tofile(chars / "data" / "chars" / "val.bin")
    keys = [*SMALL, "--dataset=chars", "--eval_iters=20000", "--max_iters=2", "--eval_interval=2"]
    for options in ([], ["--eval_only"]):
        script = Script("train.py", *keys, *options, cwd=chars)
        wait_for(lambda script=script: "step: " in script.stdout)
        time.sleep(1.5)
        start = time.monotonic()
        script.kill(signal.SIGTERM)
        assert script.wait().returncode in (143, -15) and time.monotonic() - start < 3


def test_resume_keeps_the_model_and_the_validation_windows(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars")
    again = ["train.py", *SMALL, "--dataset=chars", "--resume", "--max_iters=8"]
    for key in ("n_layer=3", "mlp=swiglu", "bias=True"):
        assert f"--{key}: the run to resume had" in refused(*again, f"--{key}")
    assert "--max_iters=3: the run to resume is at step 6 already" in refused(*again, "--max_iters=3")
    message = refused(*again[:-1], "--max_iters=0", "--max_epochs=0.01")
    assert "--max_epochs=0.01: the run to resume is at step 6 already" in message
    before = [m["val_loss"] for m in metrics(chars / "out") if "val_loss" in m][-1]
    printed = run(*again, "--batch_size=2", "--gradient_accumulation_steps=2", "--eval_interval=6")
    line = next(line for line in printed.splitlines() if line.strip().startswith("6/8  val"))
    assert f"val loss {before:.4f}" in line


def test_resume_before_the_first_checkpoint_starts_and_init_from_resume_is_refused(run, refused, chars):
    printed = run("train.py", *SMALL, "--dataset=chars", "--resume")
    assert "out has no checkpoint to resume from: starting the run" in printed
    message = refused("train.py", *SMALL, "--dataset=chars", "--init_from=resume", "--out_dir=none")
    assert "there is no checkpoint none/ckpt.pt" in message


# -----------------------------------------------------------------------------
# Damage


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def emptied(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, refused, chars, damage):
    setting = "--dropout=0.1"
    whole_run(chars, setting)
    run("train.py", *arguments(setting, "parts"), "--max_iters=18", f"--lr_decay_iters={STEPS}")
    out = chars / "parts"
    assert load_checkpoint(out / "ckpt_previous.pt")["step"] == 15
    (out / "ckpt.pt").write_bytes(damage((out / "step_18.pt").read_bytes()))  # both names are one file
    (out / "samples" / "step_18.txt").unlink()  # of the shorter run's end
    (out / "best.pt").write_bytes(damage((out / "best.pt").read_bytes()))
    done = call("train.py", *arguments(setting, "parts"), "--resume", cwd=chars)
    assert done.returncode == 0 and "ckpt.pt is damaged" in done.stdout, done.stdout + done.stderr
    assert (out / "ckpt.pt.damaged").exists()
    assert_same_run(out, chars / "whole")
    for path in {p.stat().st_ino: p for p in out.glob("*.pt")}.values():
        path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):  # it does not begin anew over what may yet be mended
        assert "no checkpoint in parts can be read" in refused("train.py", *arguments(setting, "parts"), "--resume")


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(run, refused, chars):
    big = [*SMALL, "--dataset=chars", "--n_embd=512", "--max_iters=2", "--eval_interval=1", "--final_eval_tokens=512"]
    run("train.py", *big)
    before = sorted(p.name for p in (chars / "out").iterdir())
    imported = int(Path(f"/proc/{Script.servers[ROOT].pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for mib, words in ((0, "ckpt.pt cannot be read now"), (60, "out of memory with micro-batches")):
        limits = {"RLIMIT_AS": imported + mib * 2**20}
        done = call("train.py", *big, "--max_iters=3", "--resume", cwd=chars, limits=limits)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert sorted(p.name for p in (chars / "out").iterdir()) == before
    assert "3/3" in run("train.py", *big, "--max_iters=3", "--resume")


def test_no_flipped_bit_in_a_checkpoint_goes_unnoticed(tmp_path):
    torch.manual_seed(0)
    payload = {
        "model": {"w": torch.randn(300)},
        "model_args": {"n_layer": 1},
        "step": 3,
        "config": {"a": 1.5, "b": "x"},
    }
    save_checkpoint(tmp_path / "ckpt.pt", payload)
    good, dice, noticed = (tmp_path / "ckpt.pt").read_bytes(), random.Random(0), 0
    for _ in range(400):
        place = dice.randrange(len(good))
        bad = bytearray(good)
        bad[place] ^= 1 << dice.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(bad)
        try:
            assert same(load_checkpoint(tmp_path / "ckpt.pt"), payload)  # the bit meant nothing
        except UserError:
            noticed += 1
    assert noticed > 100


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_shard_is_refused(run, refused, tmp_path, damage):
    (tmp_path / "t.txt").write_text(TEXT)
    run("prepare_text.py", "--input=t.txt", "--dataset=d", "--tokenizer=char")
    shard = next((tmp_path / "data" / "d").glob("*train*.npy"))
    shard.write_bytes(damage(shard.read_bytes()))
    assert shard.name in refused("train.py", *SMALL, "--dataset=d")


def test_large_datasets_are_verified_when_asked(run, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(TEXT)
    run("prepare_text.py", "--input=t.txt", "--dataset=d", "--tokenizer=char")
    shard = next((tmp_path / "data" / "d").glob("*train*.npy"))
    shard.write_bytes(flipped(shard.read_bytes()))
    monkeypatch.setattr("common.shards.VERIFIED_TOKENS", 100)
    load_dataset("d", tmp_path / "data")
    with pytest.raises(UserError, match="sha256"):
        load_dataset("d", tmp_path / "data", verify=True)


def test_token_ids_past_the_vocabulary_are_refused(refused, chars):
    ids = np.fromfile(chars / "data" / "chars" / "train.bin", np.uint16)
    ids[::3] = 999
    ids.tofile(chars / "data" / "chars" / "train.bin")
    assert "train.bin holds token id 999, outside the vocabulary" in refused("train.py", *SMALL, "--dataset=chars")


# -----------------------------------------------------------------------------
# Disks


@contextmanager
def small_disk(folder: Path, kib: int):
    """A file system of its own on this folder. Needs root on Linux, as CI has."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a file system")


@root
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_continues(run, refused, chars):
    setting = "--dropout=0.1"
    whole_run(chars, setting)
    size = (chars / "whole" / "ckpt.pt").stat().st_size // 1024
    with small_disk(chars / "parts", 4 * size):
        (chars / "parts" / "other").write_bytes(bytes(1024 * (2 * size)))  # room for one checkpoint, not for two
        done = call("train.py", *arguments(setting, "parts"), cwd=chars)
        assert done.returncode == 2 and f" {STEPS}/{STEPS} " in done.stdout, done.stderr
        assert "No space left on device" in done.stdout and "MiB are free" in done.stdout and "continues" in done.stdout
        assert "ckpt.pt of step 30 is not saved: free some space" in done.stderr
        good = load_latest(chars / "parts")
        assert good is not None and 0 < good["step"] < STEPS
        (chars / "parts" / "other").unlink()
        subprocess.run(["mount", "-o", f"remount,size={30 * size}k", chars / "parts"], check=True)
        run("train.py", *arguments(setting, "parts"), "--resume")
        assert_same_run(chars / "parts", chars / "whole")


def test_a_limit_on_file_size_is_a_full_disk_too(chars):
    whole_run(chars, "")
    limit = (chars / "whole" / "ckpt.pt").stat().st_size // 2
    done = call("train.py", *arguments("", "parts"), cwd=chars, limits={"RLIMIT_FSIZE": limit})
    assert done.returncode == 2 and "File too large" in done.stdout
    assert told(chars / "parts") == told(chars / "whole")


def test_stopped_where_nothing_can_be_saved_it_says_so(chars):
    long = [*SMALL, "--dataset=chars", "--max_iters=100000", "--eval_interval=0"]
    script = Script("train.py", *long, cwd=chars, limits={"RLIMIT_FSIZE": 100_000})
    wait_for(lambda: (chars / "out" / "log.txt").exists() and len((chars / "out" / "log.txt").read_text()) > 500)
    script.kill(signal.SIGTERM)
    assert script.wait().returncode == 2 and "is not saved: free some space" in script.stderr
    bad = [*SMALL, "--dataset=chars", "--learning_rate=1e12", "--optimizer=sgd", "--grad_clip=0.0", "--out_dir=bad"]
    done = call("train.py", *bad, "--max_iters=40", "--eval_interval=0", cwd=chars, limits={"RLIMIT_FSIZE": 100_000})
    assert done.returncode == 2 and "loss nan" in done.stderr and "Traceback" not in done.stderr


@root
def test_a_read_only_out_dir_is_refused_before_training(refused, chars):
    with small_disk(chars / "out", 100):
        subprocess.run(["mount", "-o", "remount,ro", chars / "out"], check=True)
        message = refused("train.py", *SMALL, "--dataset=chars", "--out_dir=out")
    assert "--out_dir=out cannot be written: Read-only file system" in message


# -----------------------------------------------------------------------------
# Numbers gone bad


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(run, refused, chars):
    bad = ["--max_iters=40", "--learning_rate=1e12", "--optimizer=sgd", "--grad_clip=0.0", "--eval_interval=1"]
    message = refused("train.py", *SMALL, "--dataset=chars", "--gradient_accumulation_steps=2", *bad)
    assert "step 2: loss nan" in message and "rank 0, micro-batch 0: train.bin at byte" in message
    assert "--learning_rate" in message and "and 0 more" not in message
    good = load_checkpoint(chars / "out" / "ckpt.pt")
    assert good["step"] == 1 and all(torch.isfinite(w).all() for w in good["model"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_batch_is_named_by_its_place_and_changes_no_weight(run, refused, chars, optimizer):
    """A letter that is rare in the text gets an embedding that is not a number: only batches with it go bad."""
    data = chars / "data" / "chars"
    rare = sorted(set(TEXT)).index("1")
    for name, places in (("train.bin", (500, 9000)), ("val.bin", ())):
        ids = np.fromfile(data / name, np.uint16)
        ids[ids == rare] = rare + 1
        ids[list(places)] = rare
        ids.tofile(data / name)
    common = [*SMALL, "--dataset=chars", f"--optimizer={optimizer}", "--tie_weights=False", "--eval_interval=0"]
    run("train.py", *common)
    checkpoint = torch.load(chars / "out" / "ckpt.pt", weights_only=True)
    checkpoint["model"]["transformer.wte.weight"][rare] = math.nan
    torch.save(checkpoint, chars / "poisoned.pt")
    options = ["--init_from=poisoned.pt", "--out_dir=tuned", "--max_iters=250", "--sample_prompt=e"]
    message = refused("train.py", *common, *options, "--checkpoint_interval=1", "--always_save_checkpoint=False")
    step = int(re.search(r"step (\d+): loss nan", message)[1])
    starts = [int(b.replace(",", "")) for b in re.findall(r"train.bin at byte ([\d,]+)", message)]
    assert len(starts) == 4 and any(b <= 2 * place < b + 2 * 33 for b in starts for place in (500, 9000))
    weights = load_checkpoint(chars / "tuned" / "ckpt.pt")
    assert weights["step"] == step - 1
    assert all(torch.isfinite(w).all() for n, w in weights["model"].items() if "wte" not in n)


# -----------------------------------------------------------------------------
# Memory


def test_out_of_memory_names_keys_that_keep_the_step(refused, chars):
    message = refused(
        "train.py", *SMALL, "--dataset=chars", "--batch_size=6000", "--n_embd=512", limits={"RLIMIT_AS": 4 * 2**30}
    )
    assert "out of memory with micro-batches of 6000 x 32 tokens" in message
    assert "--batch_size=3000 --gradient_accumulation_steps=2 (the same 192,000 tokens per step)" in message


def main() -> None:
    """The longer form: kills over all settings, with a count of what was lost."""
    import tempfile

    dice, injected, compared, lost, start = random.Random(seed), 0, 0, 0, time.monotonic()
    for number, setting in enumerate(SETTINGS):
        share = kills // len(SETTINGS) + (number < kills % len(SETTINGS))
        with tempfile.TemporaryDirectory() as folder:
            make_nanogpt_chars(Path(folder) / "data" / "chars", TEXT)
            for _, out in interrupted_runs(Path(folder), setting, share, dice):
                compared += 1
                try:
                    assert_same_run(out, Path(folder) / "whole")
                except AssertionError as e:
                    lost += 1
                    print(f"lost: {setting}: {str(e).splitlines()[0]}")
            injected += share
            print(f"{injected} kills, {compared} runs compared  ({setting})", flush=True)
    seconds = time.monotonic() - start
    print(f"faults injected {injected}, runs compared {compared}, losses lost {lost}, {seconds:.0f} s")
    sys.exit(lost > 0)


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
