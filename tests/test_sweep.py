"""research/sweep.py: studies change only the keys they name, resume, share their runs among workers, and refuse what is wrong."""

import csv
import json
import re
import signal
import time
from pathlib import Path

import sweep
from conftest import Script, call_on_terminal
from studies import STUDIES, TINY, read_jsonl, run_research, write_study

from common.files import file_sha256
from configurator import read_keys, run_file

import pytest


def test_every_key_of_an_arm_reaches_its_run_and_nothing_else_changes(chars):
    """Overrides that never reach the run, the seed above all, make every comparison meaningless."""
    arms = {
        "base": {}, "attn": {"attn": "manual"}, "block": {"norm": "rmsnorm", "mlp": "swiglu", "pos": "rope", "dropout": 0.5},
        "optimizer": {"optimizer": "muon", "learning_rate": 0.02}, "width": {"n_embd": 32, "n_layer": 2},
        "data": {"block_size": 8, "data_fraction": 0.5, "batch_size": 2},
    }  # fmt: skip
    run_research("sweep.py", write_study(chars, arms=arms, seeds=[5]), "--max_parallel=2", cwd=chars)
    rows = {r["arm"]: r for r in read_jsonl(chars / "out" / "study")}
    configs = {arm: json.loads((chars / r["path"] / "config.json").read_text()) for arm, r in rows.items()}
    assert rows.keys() == arms.keys()
    for arm, keys in arms.items():
        config, base = configs[arm], configs["base"]
        assert config["seed"] == 5 and {k: config[k] for k in keys} == keys
        derived = {"mlp_hidden"} if arm in ("width", "block") else set()
        assert {k for k in config if config[k] != base[k]} <= {"out_dir", *keys} | derived
        if arm not in ("base", "attn"):
            assert rows[arm]["final_val_loss"] != rows["base"]["final_val_loss"]
    summary = json.loads((chars / "out" / "study" / "sweep_summary.json").read_text())
    assert any("width" in line and "parameters" in line for line in summary["differences"])
    assert not any(line.startswith(("norm:", "attn:")) for line in summary["differences"])
    with open(chars / "out" / "study" / "results.csv", newline="") as f:
        table = list(csv.DictReader(f))
    columns = (
        "path step params n_embd n_layer n_head final_val_loss best_val_loss final_val_perplexity final_val_accuracy"
    )
    assert len(table) == len(arms) and set(columns.split()) <= table[0].keys()
    # A new seed reaches its run too, and leaves the finished runs alone.
    run_research("sweep.py", write_study(chars, arms={"base": {}}, seeds=[5, 6]), cwd=chars)
    five, six = read_jsonl(chars / "out" / "study")
    assert (five["seed"], six["seed"]) == (5, 6) and five == rows["base"]
    assert json.loads((chars / six["path"] / "config.json").read_text())["seed"] == 6
    assert five["final_val_loss"] != six["final_val_loss"]


def test_a_killed_sweep_keeps_its_finished_runs_and_resumes(chars):
    base = TINY.replace("max_iters=3", "max_iters=60")
    path = write_study(chars, axes={"dropout": [0.0, 0.1, 0.2]}, seeds=[1], base=base)
    first = chars / "out" / "study" / "runs" / "dropout=0.0-seed1" / "results.json"
    process = Script("research/sweep.py", path, "--interval=0.1", cwd=chars)
    deadline = time.monotonic() + 100
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the second run has started
    process.kill()
    process.wait()
    before = first.stat().st_mtime_ns
    output = run_research("sweep.py", path, "--interval=0.1", cwd=chars)
    assert "3 runs, " in output and "0 already ended" not in output
    assert first.stat().st_mtime_ns == before
    assert len(read_jsonl(chars / "out" / "study")) == 3
    assert "3 already ended" in run_research("sweep.py", path, cwd=chars)


def test_a_run_never_continues_another_commands_checkpoint(chars, monkeypatch):
    path = write_study(chars, arms={"only": {}}, seeds=[1])
    run_research("sweep.py", path, cwd=chars)
    folder = chars / "out" / "study" / "runs" / "only-seed1"
    before = json.loads((folder / "results.json").read_text())
    changed = write_study(chars, arms={"only": {}}, seeds=[1], base=TINY + " --learning_rate=0.1")
    monkeypatch.chdir(chars)
    for key, value in run_file(str(changed), {}).items():
        monkeypatch.setattr(sweep, key, value)
    (run,) = sweep.plan_runs(Path("out/study"))
    with monkeypatch.context() as patch:  # stopped while it starts, before it has written anything
        patch.setattr(sweep, "wait_for", lambda process, signals: (process.kill(), -15)[1])
        run.train("", [])
    assert run.state() == "started" and not list(folder.glob("*.pt"))
    run_research("sweep.py", changed, cwd=chars)
    after, config = (json.loads((folder / name).read_text()) for name in ("results.json", "config.json"))
    assert config["learning_rate"] == 0.1 and after["final_val_loss"] != before["final_val_loss"]
    fresh = write_study(chars, name="fresh", arms={"only": {}}, seeds=[1], base=TINY + " --learning_rate=0.1")
    run_research("sweep.py", fresh, cwd=chars)
    assert read_jsonl(chars / "out" / "fresh")[0]["final_val_loss"] == after["final_val_loss"]
    assert json.loads((folder / "previous-1" / "results.json").read_text()) == before  # nothing is lost


def test_a_changed_config_file_trains_its_runs_anew_but_not_a_changed_comment(chars):
    config = chars / "base.py"
    config.write_text("# one comment\nweight_decay = 0.1\n")
    path = write_study(chars, arms={"only": {}}, seeds=[1], base=f"{config} {TINY}")
    run_research("sweep.py", path, cwd=chars)
    config.write_text("# another comment\nweight_decay = 0.1\n")
    assert "1 already ended" in run_research("sweep.py", path, cwd=chars)
    record = (
        chars / "out" / "study" / "runs" / "only-seed1" / "run.json"
    )  # older studies have the hash of the whole file
    older = json.loads(record.read_text()) | {"configs": {str(config): file_sha256(config)}}
    record.write_text(json.dumps(older))
    assert "1 already ended" in run_research("sweep.py", path, cwd=chars)
    config.write_text("weight_decay = 0.2\n")
    assert "its command, config or code has changed" in run_research("sweep.py", path, cwd=chars)


def test_tables_are_not_emptied_by_a_study_whose_arms_have_changed(chars):
    path = write_study(chars, axes={"n_embd": [8, 16], "dropout": [0.0, 0.1]}, seeds=[1])
    run_research("sweep.py", path, "--max_parallel=2", cwd=chars)
    before = (chars / "out" / "study" / "results.csv").read_bytes()
    swapped = write_study(chars, axes={"dropout": [0.0, 0.1], "n_embd": [8, 16]}, seeds=[1])
    output = run_research("sweep.py", swapped, "--runs=[-1]", cwd=chars)
    assert (
        "no run has finished, so no table is written" in output
        and "4 runs in out/study/runs, such as n_embd=16" in output
    )
    assert (chars / "out" / "study" / "results.csv").read_bytes() == before


def test_a_study_may_be_moved_and_named_by_another_path(chars):
    path = write_study(chars, axes={"dropout": [0.0, 0.1]}, seeds=[1])
    run_research("sweep.py", path, cwd=chars)
    (chars / "out" / "study").rename(chars / "moved")
    for folder in ("moved", chars / "moved"):
        assert "2 already ended" in run_research("sweep.py", path, f"--output_dir={folder}", cwd=chars)
    assert len(read_jsonl(chars / "moved")) == 2


def test_runs_of_other_code_are_named_and_left_out_unless_asked_and_repeated_by_force(chars):
    path = write_study(chars, arms={"a": {}, "b": {"dropout": 0.1}}, seeds=[1, 2])
    run_research("sweep.py", path, cwd=chars)
    runs_folder = chars / "out" / "study" / "runs"
    results = json.loads((runs_folder / "b-seed2" / "results.json").read_text())
    assert re.fullmatch("[0-9a-f]{12}", results["code"])
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", results["git_commit"])
    (runs_folder / "b-seed2" / "results.json").write_text(json.dumps(results | {"code": "0123456789ab"}))
    output = run_research("sweep.py", path, cwd=chars)
    assert f"left out, with code 0123456789ab and not {results['code']}: b seed 2" in output and " 1  " in output
    assert "left out" in run_research("scaling.py", "--results=out/study", "--pictures=False", cwd=chars)
    assert "left out" not in run_research("sweep.py", path, "--mixed=True", cwd=chars)
    output = run_research("sweep.py", path, "--force=True", cwd=chars)
    assert "3 already ended" in output and "left out" not in output
    assert json.loads((runs_folder / "b-seed2" / "results.json").read_text())["code"] == results["code"]


def test_two_workers_share_a_study_and_take_over_from_one_that_is_killed(chars):
    path = write_study(
        chars, axes={"dropout": [0.0, 0.1, 0.2]}, seeds=[1, 2], base=TINY.replace("max_iters=3", "max_iters=60")
    )
    command = ["research/sweep.py", path, "--interval=0.1"]
    workers = [Script(*command, cwd=chars) for _ in range(2)]
    outputs = [worker.wait().stdout for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    ended = [re.findall(r"\d+/6  (dropout=\S+, seed \d)", output) for output in outputs]
    assert len(ended[0]) + len(ended[1]) == 6 == len({*ended[0], *ended[1]}) and ended[0] and ended[1]  # each run once
    logs = [log.read_text() for log in (chars / "out" / "study" / "runs").glob("*/train.log")]
    assert len(logs) == 6 and all(log.count("final evaluation") <= 1 and "resumed" not in log for log in logs)
    assert all("dropout=0.2" in output for output in outputs)  # both print the whole table
    assert len(read_jsonl(chars / "out" / "study")) == 6
    # A worker that is killed leaves its run to the others.
    longer = write_study(
        chars, axes={"dropout": [0.0, 0.1]}, seeds=[3], base=TINY.replace("max_iters=3", "max_iters=1500")
    )
    killed = Script(*command, cwd=chars)
    running = chars / "out" / "study" / "runs" / "dropout=0.0-seed3"
    deadline = time.monotonic() + 100
    while not (running / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    other = Script(*command, cwd=chars)
    killed.kill()
    killed.wait()
    output = other.wait().stdout
    assert other.returncode == 0 and "FAILED" not in output and longer.exists()
    assert len(read_jsonl(chars / "out" / "study")) == 2


def test_a_terminal_shows_the_running_runs(chars):
    base = TINY.replace("max_iters=3", "max_iters=400")
    path = write_study(chars, axes={"dropout": [0.0, 0.1]}, seeds=[1], base=base)
    keys = ["--interval=0.1", "--max_parallel=2"]
    done, shown = call_on_terminal("research/sweep.py", path, *keys, cwd=chars, timeout=100)
    one = r"dropout=0\.[01], seed 1: [\d,]+/400 loss [\d.]+"
    assert done.returncode == 0 and re.search(rf"0/2  {one}; dropout", shown), shown


def test_a_stopped_sweep_stops_its_runs_and_resumes_them(chars):
    path = write_study(chars, arms={"long": {}}, seeds=[1], base=TINY.replace("max_iters=3", "max_iters=1500"))
    process = Script("research/sweep.py", path, "--interval=0.1", cwd=chars)
    log = chars / "out" / "study" / "runs" / "long-seed1" / "log.txt"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill(signal.SIGTERM)
    assert "stopped with 0 of 1 runs done" in process.wait().stdout and process.returncode == 143
    steps = len(log.read_text().splitlines())
    assert "FAILED" not in run_research("sweep.py", path, "--interval=0.1", cwd=chars)
    text = (log.parent / "train.log").read_text()
    assert len(re.findall(r"^ *1/1,500 ", text, re.M)) == 1 and 0 < steps < 1500  # it did not start again
    assert len([line for line in log.read_text().splitlines() if " train " in line]) == 1500


def test_a_log_that_is_not_utf_8_is_read(chars):
    run = object.__new__(sweep.Run)
    run.folder = chars
    (chars / "train.log").write_bytes(b"a sample: caf\xe9\nerror: no memory\n")
    assert run.last_line("error: ") == "error: no memory"


def test_failed_runs_are_reported_and_retried_on_request(chars):
    path = write_study(chars, arms={"good": {}, "bad": {"n_head": 3}}, seeds=[1])
    output = run_research("sweep.py", path, cwd=chars, code=1)
    assert "FAILED" in output and "is not divisible by --n_head=3" in output and "failed: bad, seed 1" in output
    assert "2 already ended" in run_research("sweep.py", path, cwd=chars, code=1)
    assert "1 already ended" in run_research("sweep.py", path, "--retry", cwd=chars, code=1)


def test_a_dry_run_prints_commands_and_costs_but_runs_nothing(chars):
    path = write_study(chars, axes={"n_embd": [16, 32]}, seeds=[1, 2])
    output = run_research("sweep.py", path, "--dry_run", cwd=chars)
    assert output.count("python train.py") == 4 and "--n_embd=32 --seed=2" in output
    assert "4 of 4 runs to do: 768 tokens" in output and "of training steps, by a few steps of each arm" in output
    parameters, tokens, flops = re.search(r"n_embd=32 +([\d,]+) +(\d+) +([\d.e+]+)", output).groups()
    assert float(flops) == pytest.approx(6 * int(parameters.replace(",", "")) * int(tokens), rel=0.5)
    assert not (chars / "out" / "study" / "runs").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(axes={"n_embd": 3}), "must be a list"),
        (dict(axes={"seed": [1, 2]}), "the study sets seed"),
        (dict(axes={"n_embd": [16]}, seeds=[1, 1]), "each only once"),
        (dict(zipped={"n_embd": [16], "n_layer": [1, 2]}), "same number of values"),
        (dict(arms={"a": {"n_embdd": 3}}), "did you mean n_embd"),
        (dict(axes={"n_embd": [16]}, base="--start='a"), "No closing quotation"),
    ],
)
def test_a_wrong_study_is_refused(chars, keys, words):
    output = run_research("sweep.py", write_study(chars, **keys), cwd=chars, code=2)
    assert words in output and "Traceback" not in output


def test_ready_studies_name_keys_that_train_has(monkeypatch):
    import train

    known = set(read_keys(train.__file__))
    assert len(STUDIES) >= 13
    for path in STUDIES:
        assert f"config/sweep/{path.name}" in path.read_text()
        keys = {"axes": {}, "zipped": {}, "arms": {}, "seeds": [1, 2, 3], **run_file(str(path), {})}
        assert keys.keys() <= set(read_keys(sweep.__file__))
        for name in ("base", "axes", "zipped", "arms", "seeds", "name"):
            monkeypatch.setattr(sweep, name, keys[name])
        planned = sweep.plan_runs(Path("out"))
        assert keys["name"] == path.stem and len(planned) >= 2
        for run in planned:
            options = [c.partition("=")[0].removeprefix("--") for c in run.arguments if c.startswith("--")]
            assert set(options) <= known, set(options) - known
