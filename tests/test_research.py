"""The lab: studies that change what they say, fits that find what is there, pipelines that run what is out of date."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call_on_terminal

sys.path.insert(0, str(ROOT / "research"))
import laws  # noqa: E402
import pipeline  # noqa: E402
import plot  # noqa: E402
import scaling  # noqa: E402
import sweep  # noqa: E402

from configurator import read_keys, run_file  # noqa: E402

TINY = (
    "--dataset=chars --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1 "
    "--max_iters=3 --eval_interval=0 --warmup_iters=1 --learning_rate=1e-3 --device=cpu --compile=False --dtype=float32"
)
STUDIES = sorted((ROOT / "config" / "sweep").glob("*.py"))


def lab(script: str, *arguments, cwd: Path, code=0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "research" / script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def study(folder: Path, **keys) -> Path:
    path = folder / "study.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in {"name": "study", "base": TINY, **keys}.items()))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# -----------------------------------------------------------------------------
# sweep.py


def test_every_axis_reaches_the_run_and_nothing_else_changes(chars):
    """The defect this is against: overrides, seeds above all, that never reach the child."""
    arms = {
        "base": {}, "norm": {"norm": "rmsnorm"}, "mlp": {"mlp": "swiglu"}, "pos": {"pos": "rope"}, "attn": {"attn": "manual"},
        "optimizer": {"optimizer": "muon", "learning_rate": 0.02}, "width": {"n_embd": 32}, "depth": {"n_layer": 2},
        "context": {"block_size": 8}, "data": {"data_fraction": 0.5}, "batch": {"batch_size": 2}, "dropout": {"dropout": 0.5},
    }  # fmt: skip
    lab("sweep.py", study(chars, arms=arms, seeds=[5]), "--max_parallel=2", cwd=chars)
    rows = {r["arm"]: r for r in rows_of(chars / "out" / "study")}
    configs = {arm: json.loads((chars / r["path"] / "config.json").read_text()) for arm, r in rows.items()}
    assert rows.keys() == arms.keys()
    for arm, keys in arms.items():
        config, base = configs[arm], configs["base"]
        assert config["seed"] == 5 and {k: config[k] for k in keys} == keys
        derived = {"mlp_hidden"} if arm in ("width", "mlp") else set()
        assert {k for k in config if config[k] != base[k]} <= {"out_dir", *keys} | derived
        if arm not in ("base", "attn"):
            assert rows[arm]["final_val_loss"] != rows["base"]["final_val_loss"]
    summary = json.loads((chars / "out" / "study" / "sweep_summary.json").read_text())
    assert any("width" in line and "parameters" in line for line in summary["differences"])
    assert not any(line.startswith(("norm:", "attn:")) for line in summary["differences"])
    with open(chars / "out" / "study" / "results.csv", newline="") as f:
        table = list(csv.DictReader(f))
    wanted = (
        "path step params n_embd n_layer n_head final_val_loss best_val_loss final_val_perplexity final_val_accuracy"
    )
    assert len(table) == len(arms) and set(wanted.split()) <= table[0].keys()
    # The seeds' own failure, and that other seeds leave what is done alone.
    lab("sweep.py", study(chars, arms={"base": {}}, seeds=[5, 6]), cwd=chars)
    five, six = rows_of(chars / "out" / "study")
    assert (five["seed"], six["seed"]) == (5, 6) and five == rows["base"]
    assert json.loads((chars / six["path"] / "config.json").read_text())["seed"] == 6
    assert five["final_val_loss"] != six["final_val_loss"]


def test_a_killed_sweep_loses_no_finished_run_and_goes_on(chars):
    path = study(chars, axes={"dropout": [0.0, 0.1, 0.2]}, seeds=[1], base=TINY.replace("max_iters=3", "max_iters=60"))
    command = [sys.executable, str(ROOT / "research" / "sweep.py"), str(path), "--interval=0.1"]
    first = chars / "out" / "study" / "runs" / "dropout=0.0-seed1" / "results.json"
    process = subprocess.Popen(
        command, cwd=chars, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 100
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the second run is under way
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = first.stat().st_mtime_ns
    told = lab("sweep.py", path, "--interval=0.1", cwd=chars)
    assert "3 runs, " in told and "0 ended before" not in told
    assert first.stat().st_mtime_ns == before
    assert len(rows_of(chars / "out" / "study")) == 3
    assert "3 ended before" in lab("sweep.py", path, cwd=chars)


def test_on_a_terminal_the_runs_under_way_are_shown(chars):
    path = study(chars, axes={"dropout": [0.0, 0.1]}, seeds=[1], base=TINY.replace("max_iters=3", "max_iters=400"))
    keys = ["--interval=0.1", "--max_parallel=2"]
    done, shown = call_on_terminal("research/sweep.py", path, *keys, cwd=chars, timeout=100)
    assert done.returncode == 0 and re.search(r"dropout=0\.[01], seed 1: +[\d,]+/400  loss", shown), shown
    assert "0 of 2 ended, 2 running, 0 to come" in shown and "\x1b[3A\x1b[J" in shown


def test_a_stopped_sweep_stops_its_runs_which_go_on_where_they_were(chars):
    path = study(chars, arms={"long": {}}, seeds=[1], base=TINY.replace("max_iters=3", "max_iters=4000"))
    command = [sys.executable, str(ROOT / "research" / "sweep.py"), str(path), "--interval=0.1"]
    process = subprocess.Popen(
        command, cwd=chars, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    log = chars / "out" / "study" / "runs" / "long-seed1" / "log.txt"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped with 0 of 1 runs done" in process.communicate()[0] and process.returncode == 143
    steps = len(log.read_text().splitlines())
    assert "FAILED" not in lab("sweep.py", path, "--interval=0.1", cwd=chars)
    text = (log.parent / "train.log").read_text()
    assert "--resume goes on" in text and 0 < steps < 4000
    assert len([line for line in log.read_text().splitlines() if " train " in line]) == 4000


def test_failed_runs_are_told_and_retried_when_asked(chars):
    path = study(chars, arms={"good": {}, "bad": {"sample_prompt": "é"}}, seeds=[1])
    told = lab("sweep.py", path, cwd=chars, code=1)
    assert "FAILED" in told and "'é' is not among" in told and "failed: bad, seed 1" in told
    assert "2 ended before" in lab("sweep.py", path, cwd=chars, code=1)
    assert "1 ended before" in lab("sweep.py", path, "--retry", cwd=chars, code=1)


def test_a_dry_run_prints_commands_and_costs_and_runs_nothing(chars):
    path = study(chars, axes={"n_embd": [16, 32]}, seeds=[1, 2])
    told = lab("sweep.py", path, "--dry_run", cwd=chars)
    assert told.count("python train.py") == 4 and "--n_embd=32 --seed=2" in told
    assert "4 of 4 runs to do: 768 tokens" in told and "GFLOP/s" in told
    assert not (chars / "out" / "study" / "runs").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(axes={"n_embd": 3}), "are a list"),
        (dict(axes={"seed": [1, 2]}), "belong to the study"),
        (dict(axes={"n_embd": [16]}, seeds=[1, 1]), "each once"),
        (dict(zipped={"n_embd": [16], "n_layer": [1, 2]}), "equally many"),
        (dict(arms={"a": {"n_embdd": 3}}), "did you mean n_embd"),
        (dict(axes={"n_embd": [16]}, base="--start='a"), "No closing quotation"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(chars, keys, words):
    told = lab("sweep.py", study(chars, **keys), cwd=chars, code=2)
    assert words in told and "Traceback" not in told


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
        children = sweep.plan(Path("out"))
        assert keys["name"] == path.stem and len(children) >= 2
        for child in children:
            options = [c.partition("=")[0].removeprefix("--") for c in child.command if c.startswith("--")]
            assert set(options) <= known, set(options) - known


def test_intervals_of_paired_differences_are_students():
    mean, half = sweep.interval_of([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    from scipy.stats import t

    for n in (2, 5, 21):
        assert sweep.T_QUANTILE[min(n, 21) - 2] == pytest.approx(t.ppf(0.975, n - 1), abs=2e-3)


# -----------------------------------------------------------------------------
# scaling.py


def law(N, D, E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28):
    return E + A / N**alpha + B / D**beta


def write_points(path: Path, noise=0.01, seed=0, **coefficients) -> None:
    dice = np.random.default_rng(seed)
    lines = ["params,tokens,loss"]
    for N in np.geomspace(1e6, 1e10, 12):
        for D in np.geomspace(1e7, 1e11, 12):
            lines.append(f"{N},{D},{law(N, D, **coefficients) * np.exp(noise * dice.standard_normal())}")
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("seed", [0, 1])
def test_known_coefficients_are_recovered_inside_their_intervals(tmp_path, seed):
    write_points(tmp_path / "points.csv", seed=seed)
    lab("scaling.py", f"--results={tmp_path}/points.csv", "--pictures=False", "--bootstrap=100", cwd=tmp_path)
    found = json.loads((tmp_path / "scaling_laws.json").read_text())["params_and_tokens"]
    for name, true in dict(E=1.7, alpha=0.34, beta=0.28).items():
        low, high = found["interval"][name]
        assert low - 0.25 * (high - low) <= true <= high + 0.25 * (high - low), (name, low, high)
        assert found[name] == pytest.approx(true, rel=0.1)
    assert found["leave_one_out"] is None and found["r2"] > 0.99
    best = laws.optimum(np.array([np.log(400), np.log(410), np.log(1.7), 0.34, 0.28]), found["budget"])
    assert found["best_params"] == pytest.approx(best[0], rel=0.3)


def test_without_noise_the_law_is_found_exactly(tmp_path):
    write_points(tmp_path / "points.csv", noise=0.0)
    points, _ = scaling.read_points(str(tmp_path / "points.csv"))
    N, D, y = (np.array([p[k] for p in points]) for k in ("params", "tokens", "loss"))
    theta = laws.fit_surface(N, D, y, laws.grid_of_starts(y))
    assert laws.natural(theta) == pytest.approx(dict(E=1.7, A=400, B=410, alpha=0.34, beta=0.28), rel=2e-3)
    value, gradient = laws.objective(theta + 0.1, N, D, y, 1e-3)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        numeric = (
            laws.objective(theta + 0.1 + step, N, D, y, 1e-3)[0] - laws.objective(theta + 0.1 - step, N, D, y, 1e-3)[0]
        ) / 2e-6
        assert gradient[i] == pytest.approx(numeric, rel=1e-4)


def test_isoflop_parabolas_agree_with_the_law_that_made_them():
    def points(sizes, budgets=(1e18, 1e19, 1e20)):
        """Runs at multiples of each budget's best size."""
        theta = np.array([np.log(400), np.log(410), np.log(1.7), 0.34, 0.28])
        best = {C: laws.optimum(theta, C)[0] for C in budgets}
        pairs = [(C, m * best[C]) for C in budgets for m in sizes]
        return [dict(params=N, tokens=C / 6 / N, flops=C, loss=law(N, C / 6 / N)) for C, N in pairs]

    around = np.geomspace(0.25, 4, 7)
    assert laws.fit_isoflop(points(around))["exponent_of_N"] == pytest.approx(0.28 / 0.62, abs=0.02)
    assert "a trend needs 2" in laws.fit_isoflop(points(around, [1e18]))["refused"]
    assert "add larger ones" in laws.fit_isoflop(points(around / 16))["refused"]
    assert "add smaller ones" in laws.fit_isoflop(points(around * 16))["refused"]
    assert "3 sizes, a parabola needs 4" in laws.fit_isoflop(points([0.5, 1, 2]))["refused"]


def test_power_laws_along_an_axis_are_recovered():
    dice = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 12)
    y = (2 + 3 * x**-0.5) * np.exp(0.002 * dice.standard_normal(12))
    points = [dict(n_embd=a, params=1.0, tokens=1.0, flops=1.0, loss=b) for a, b in zip(x, y)]
    found = scaling.fit_axis(points, "n_embd", dice)["offset"]
    for name, true in dict(b=0.5, c=2.0).items():
        low, high = found["interval"][name]
        assert low <= true <= high and found[name] == pytest.approx(true, rel=0.1)
    assert found["leave_one_out"] < 0.02


def test_intervals_of_few_points_are_not_of_zero_width():
    dice = np.random.default_rng(0)
    points = [
        dict(n_embd=n, params=1.0, tokens=1.0, flops=1.0, loss=v)
        for n, v in zip((16, 32, 64, 128), (3.1, 2.4, 2.05, 1.8))
    ]
    found = scaling.fit_axis(points, "n_embd", dice)
    for fit, names in (("power", "ab"), ("offset", "abc")):
        for name in names:
            low, high = found[fit]["interval"][name]
            assert high - low > 1e-4 * abs(found[fit][name]) and low <= found[fit][name] <= high
    assert found["fixed"] == dict(params=1.0, tokens=1.0, flops=1.0)


def test_runs_of_another_kind_stay_out_of_a_fit(capsys):
    points = [dict(loss=1.0, kind="optimizer=muon")] * 3 + [dict(loss=2.0, kind="optimizer=sgd")]
    assert scaling.of_one_kind(points) == points[:3]
    assert "2 kinds of runs: the fits take the 3 with optimizer=muon" in capsys.readouterr().out


def test_fits_that_the_data_cannot_carry_are_refused():
    def points(pairs):
        return [dict(params=n, tokens=d, flops=6 * n * d, loss=law(n, d)) for n, d in pairs]

    dice = np.random.default_rng(0)
    assert (
        "grow together" in scaling.fit_both(points([(n, 20 * n) for n in np.geomspace(1e6, 1e9, 9)]), dice)["refused"]
    )
    assert (
        "different tokens" in scaling.fit_both(points([(n, 1e9) for n in np.geomspace(1e6, 1e9, 9)]), dice)["refused"]
    )
    few = [(n, d) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9)] + [(1e6, 1e10)]
    assert "need 8" in scaling.fit_both(points(few), dice)["refused"]
    near = [(n, d) for n in (1e6, 1.2e6, 1.5e6) for d in (1e8, 1e9, 1e10)]
    assert "within a factor" in scaling.fit_both(points(near), dice)["refused"]
    assert "needs 3" in scaling.fit_axis(points([(1e6, 1e9), (1e7, 1e9)]), "params", dice)["refused"]
    rising = [dict(p, loss=1 / p["loss"]) for p in points([(n, 1e9) for n in np.geomspace(1e6, 1e9, 5)])]
    assert "does not fall" in scaling.fit_axis(rising, "params", dice)["refused"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("params,tokens\n1,2\n", "a point has loss"),
        ("params,loss\n1,2\n", "two of params, tokens, flops"),
        ("params,tokens,loss\n1,many,2\n", "'many', not a number"),
        ("params,tokens,loss\n1,-2,2\n", "above 0"),
        ("params,tokens,loss\n", "no line"),
    ],
)
def test_a_csv_that_is_wrong_is_told(tmp_path, text, words):
    (tmp_path / "points.csv").write_text(text)
    assert words in lab("scaling.py", "--results=points.csv", cwd=tmp_path, code=2)


def test_flops_stand_in_for_tokens_in_a_csv(tmp_path):
    (tmp_path / "p.csv").write_text("Params,FLOPs,Loss\n10,1200,3.0\n")
    assert scaling.read_csv(tmp_path / "p.csv") == [dict(params=10, flops=1200, loss=3, tokens=20)]
    (tmp_path / "p.csv").write_text(
        "x,Model Size,Training FLOP,hex_color,loss\n7,10,1200,#faebdd,3.0\n"
    )  # of other projects
    assert scaling.read_csv(tmp_path / "p.csv") == [dict(params=10, flops=1200, loss=3, tokens=20)]


# -----------------------------------------------------------------------------
# growth.py


def test_growth_is_measured_drawn_and_told(tmp_path):
    axes = "--axes={'n_layer': [2, 1], 'ranks': [1, 2]}"
    base = "--base=--n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --device=cpu --compile=False"
    told = lab("growth.py", base, axes, "--steps=1", "--vocab_size=600", "--output_dir=grown", cwd=tmp_path)
    with open(tmp_path / "grown" / "growth.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(r["axis"], r["value"]) for r in rows][:3] == [("n_layer", "1"), ("n_layer", "2"), ("ranks", "1")]
    assert all(float(r["ms_a_step"]) > 0 and float(r["peak_memory_mib"]) > 0 for r in rows)
    assert "at the end it grows as n_layer^" in told
    assert (tmp_path / "grown" / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_growth_says_what_does_not_run(tmp_path):
    refused = lab("growth.py", "--axes={'width': [1]}", cwd=tmp_path, code=2)
    assert "--axes: width is not one of batch_size, block_size, n_layer, ranks" in refused
    assert "a list of whole numbers" in lab("growth.py", "--axes={'n_layer': 4}", cwd=tmp_path, code=2)
    told = lab("growth.py", "--base=--n_embd=30 --n_head=4", "--axes={'n_layer': [1]}", cwd=tmp_path, code=2)
    assert "does not run: error: --n_embd=30 is not divisible" in told and "nothing could be measured" in told


# -----------------------------------------------------------------------------
# plot.py and a whole small study


def test_a_study_ends_in_fits_and_pictures(chars):
    path = study(chars, zipped={"n_embd": [8, 16, 32, 64]}, seeds=[1], base=TINY + " --max_iters=30 --eval_interval=10")
    lab("sweep.py", path, "--max_parallel=2", cwd=chars)
    told = lab("plot.py", "--results=out/study", "--x=flops", cwd=chars)
    assert "n_embd=64" in told
    told = lab("scaling.py", "--results=out/study", cwd=chars)
    assert "width" in told and "different tokens" in told
    out = chars / "out" / "study"
    for name in ("comparison.png", "curves_flops.png", "scaling_n_embd.png", "efficiency.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name
    with open(out / "summary.csv", newline="") as f:
        assert [row["n"] for row in csv.DictReader(f)] == ["1"] * 4
    told = lab("plot.py", "--results=nothing", cwd=chars, code=2)
    assert "no run" in told


def test_curves_are_read_by_step_tokens_flops_and_seconds(tmp_path):
    lines = [
        dict(step=0, tokens=0, val_loss=5.0), dict(step=10, tokens=100, train_loss=4.0, elapsed=2.0),
        dict(step=10, tokens=100, val_loss=4.5),
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = dict(path=str(tmp_path), tokens=200, train_flops=4000)
    found = {by: plot.read_curve(row, "val_loss", by) for by in plot.UNITS}
    assert found == dict(steps=[(10, 4.5)], tokens=[(100, 4.5)], flops=[(2000, 4.5)], seconds=[(2.0, 4.5)])


# -----------------------------------------------------------------------------
# pipeline.py

STEP = "python -c 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\"x\")'"


def pipeline_file(folder: Path, steps: dict) -> Path:
    path = folder / "pipe.py"
    path.write_text(f"name = 'pipe'\nsteps = {steps!r}\n")
    return path


def report_of(folder: Path) -> dict[str, str]:
    return {
        s["step"]: s["state"] for s in json.loads((folder / "out" / "pipelines" / "pipe.json").read_text())["steps"]
    }


def test_a_pipeline_runs_in_order_and_then_only_what_is_out_of_date(tmp_path):
    steps = {
        "last": {"run": f"{STEP} c", "after": ["middle"], "inputs": ["b"], "outputs": ["c"]},
        "first": {"run": f"{STEP} a", "outputs": ["a"]},
        "middle": {"run": f"{STEP} b", "after": ["first"], "inputs": ["a"], "outputs": ["b"]},
    }
    path = pipeline_file(tmp_path, steps)
    told = lab("pipeline.py", path, "--dry_run", cwd=tmp_path)
    assert told.index("first: to run") < told.index("middle: to run") < told.index("last: to run")
    assert not (tmp_path / "a").exists()
    lab("pipeline.py", path, cwd=tmp_path)
    assert list(report_of(tmp_path).items()) == [("first", "done"), ("middle", "done"), ("last", "done")]
    lab("pipeline.py", path, cwd=tmp_path)
    assert set(report_of(tmp_path).values()) == {"up to date"}
    later = time.time() + 5
    os.utime(tmp_path / "b", (later, later))
    lab("pipeline.py", path, cwd=tmp_path)
    assert report_of(tmp_path) == dict(first="up to date", middle="up to date", last="done")
    lab("pipeline.py", path, "--step=middle", cwd=tmp_path)
    assert report_of(tmp_path) == dict(middle="done")
    lab("pipeline.py", path, "--from_step=middle", "--force", cwd=tmp_path)
    assert report_of(tmp_path) == dict(middle="done", last="done")


def test_a_failed_step_stops_what_needs_it(tmp_path):
    steps = {
        "bad": {"run": "python -c 'raise SystemExit(3)'", "retries": 1},
        "needs": {"run": f"{STEP} n", "after": ["bad"]},
        "other": {"run": f"{STEP} o", "env": {"A": 1}},
        "silent": {"run": "python -c 0", "outputs": ["never"]},
    }
    path = pipeline_file(tmp_path, steps)
    lab("pipeline.py", path, cwd=tmp_path, code=1)
    assert report_of(tmp_path) == {"bad": "failed"}
    lab("pipeline.py", path, "--continue_on_error", cwd=tmp_path, code=1)
    assert report_of(tmp_path) == dict(bad="failed", needs="not run: bad failed", other="done", silent="failed")
    told = lab("pipeline.py", path, "--dry_run", cwd=tmp_path)
    assert "bad: to run" in told and "needs: to run" in told
    entry = json.loads((tmp_path / "out" / "pipelines" / "pipe.json").read_text())["steps"][0]
    assert entry["exit"] == 3 and entry["attempts"] == 2 and entry["seconds"] >= 0


def test_what_a_failed_step_left_does_not_count_as_up_to_date(tmp_path):
    bad = 'python -c \'import sys; open("a", "w"); sys.exit(1)\''
    path = pipeline_file(tmp_path, {"half": {"run": bad, "outputs": ["a"]}})
    lab("pipeline.py", path, cwd=tmp_path, code=1)
    assert (tmp_path / "a").exists()
    lab("pipeline.py", path, cwd=tmp_path, code=1)
    assert report_of(tmp_path) == {"half": "failed"}


def test_a_signal_reaches_the_step_and_the_pipeline_ends(tmp_path):
    wait = 'python -c \'import signal, sys, time; signal.signal(15, lambda *_: (open("saved", "w"), sys.exit(143))); open("on", "w"); time.sleep(60)\''
    path = pipeline_file(tmp_path, {"long": {"run": wait}, "next": {"run": f"{STEP} n"}})
    process = subprocess.Popen([sys.executable, str(ROOT / "research" / "pipeline.py"), str(path)], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "on").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and (tmp_path / "saved").exists()
    assert report_of(tmp_path) == {"long": "failed"}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"a": {"run": "x", "after": ["b"]}}, "comes after b, which is no step"),
        ({"a": {"run": "x", "after": ["b"]}, "b": {"run": "x", "after": ["a"]}}, "wait for one another"),
        ({"a": {"rum": "x"}}, "run is missing"),
        ({"a": {"run": "x", "needs": []}}, "needs is not among"),
        ({"a": {"run": "x", "outputs": "file"}}, "outputs is a list"),
        ({"a": {"run": "x", "retries": -1}}, "retries is a number"),
        ({"a": {"run": "x 'y"}}, "No closing quotation"),
    ],
)
def test_a_pipeline_that_makes_no_sense_is_refused(tmp_path, steps, words):
    told = lab("pipeline.py", pipeline_file(tmp_path, steps), cwd=tmp_path, code=2)
    assert words in told and "Traceback" not in told


def test_ready_pipelines_are_in_order():
    for path in (ROOT / "config" / "pipeline").glob("*.py"):
        keys = run_file(str(path), {})
        assert keys.keys() <= set(read_keys(pipeline.__file__))
        steps = keys["steps"]
        assert set(pipeline.in_order(steps)) == set(steps)
        for s in steps.values():
            script = s["run"].split()[0]
            assert (ROOT / script).is_file(), script


def test_the_lab_talks_to_the_scripts_by_their_command_line_alone():
    source = "".join(p.read_text() for p in (ROOT / "research").glob("*.py"))
    rooms = "model optim data checkpoint train tokenizer corpus machine report inference pretrained".split()
    assert not re.findall(rf"^\s*(?:import|from) (?:{'|'.join(rooms)})\b", source, re.M)
