"""research/: studies change only the keys they name, fits recover known laws, pipelines run only outdated steps."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import laws
import pipeline
import plot
import points as points_module
import runs
import scaling
import sweep
import tables
import verdicts
from conftest import ROOT
from studies import TINY, read_jsonl, run_research, write_study

from common.shards import load_dataset
from configurator import UserError, read_keys, run_file

import numpy as np
import pytest
from test_pretrained import save_gpt2, save_gpt2_tokenizer


def study(losses) -> list[dict]:
    """Rows of a study from losses (seeds, arms)."""
    return [dict(arm=a, seed=s, loss=float(x)) for s, row in enumerate(losses) for a, x in enumerate(row)]


def test_two_arms_are_compared_as_students_t_does_by_seed_where_the_seeds_matter():
    from scipy.stats import ttest_ind, ttest_rel

    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.01, (6, 2)) + [2.0, 2.015]
    for losses, test in ((own, ttest_ind), (own + rng.normal(0, 1, (6, 1)), ttest_rel)):
        interval = test(losses[:, 1], losses[:, 0]).confidence_interval()
        reference, other = verdicts.compare_arms(study(losses), "loss", [0, 1])
        assert "difference" not in reference and other["interval"] == pytest.approx([*interval])
    assert verdicts.compare_arms(study(own[:1]), "loss", [0, 1])[1]["interval"] is None
    rows = study(own)
    assert verdicts.compare_arms([*rows, dict(arm=1, seed=9, loss=2.01)], "loss", [0, 1])[1]["n"] == 7


@pytest.mark.parametrize("arms, runs_per_arm", [(2, 4), (3, 3), (6, 5)])
def test_the_quantile_of_many_arms_is_dunnetts(arms, runs_per_arm):
    from scipy.stats import dunnett

    samples = np.random.default_rng(1).normal(size=(arms + 1, runs_per_arm))
    result = dunnett(*samples[1:], control=samples[0], rng=np.random.default_rng(2))
    low, high = result.confidence_interval(0.95)
    sigma = np.sqrt(samples.var(1, ddof=1).mean() * 2 / runs_per_arm)
    half = verdicts.dunnett_quantile(arms, (arms + 1) * (runs_per_arm - 1)) * sigma
    assert (high - low)[0] / 2 == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("arms, runs_per_arm, seed_effect", [(2, 3, 0), (5, 3, 1), (20, 3, 0), (20, 3, 2), (4, 2, 1)])
def test_in_studies_without_an_effect_about_one_in_twenty_tells_an_arm_apart(arms, runs_per_arm, seed_effect):
    rng, found = np.random.default_rng(3), 0
    for _ in range(400):
        losses = rng.normal(size=(runs_per_arm, arms)) + seed_effect * rng.normal(size=(runs_per_arm, 1))
        fit = verdicts.fit_arms({(row["arm"], row["seed"]): row["loss"] for row in study(losses)})
        quantile = verdicts.dunnett_quantile(arms - 1, fit["df"])
        contrasts = [verdicts.contrast(fit, row - np.eye(arms)[0]) for row in np.eye(arms)[1:]]
        found += any(abs(difference) > quantile * error for difference, error in contrasts)
    assert 0.02 <= found / 400 <= 0.10


def test_effects_of_a_grid_are_those_of_an_analysis_of_variance():
    rng = np.random.default_rng(3)
    arm_keys = {f"{a}{b}": {"a": a, "b": b} for a in ("x", "y") for b in (1, 2, 3)}
    means = {"x1": 1.0, "x2": 1.1, "x3": 1.3, "y1": 1.2, "y2": 1.05, "y3": 1.35}
    rows = [
        dict(arm=arm, seed=seed, loss=means[arm] + 0.05 * rng.standard_normal())
        for arm in arm_keys
        for seed in range(4)
    ]
    *effects, interaction = verdicts.grid_effects(rows, "loss", arm_keys)
    effects, at = effects[:3], effects[3:]
    y = np.array([row["loss"] for row in rows]).reshape(2, 3, 4)
    cell, total = y.mean(2), y.mean()
    within = ((y - cell[:, :, None]) ** 2).sum() / 18
    parts = cell - y.mean((1, 2))[:, None] - y.mean((0, 2))[None] + total
    from scipy.stats import f, t

    assert interaction["title"] == "a and b"
    assert interaction["p"] == pytest.approx(f.sf(4 * (parts**2).sum() / 2 / within, 2, 18))
    on_average = [f"{one}, mean over the other keys" for one in ("a=y against x", "b=2 against 1", "b=3 against 1")]
    assert [e["title"] for e in effects] == on_average
    difference, half = y[1].mean() - y[0].mean(), t.ppf(0.975, 18) * np.sqrt(within * 2 / 12)
    assert effects[0]["interval"] == pytest.approx([difference - half, difference + half])
    assert effects[2]["difference"] == pytest.approx(y[:, 2].mean() - y[:, 0].mean())
    titles = ["a=y against x at b=1", "a=y against x at b=2", "a=y against x at b=3", "b=2 against 1 at a=x"]
    assert [e["title"] for e in at][:4] == titles and len(at) == 3 + 4
    half = t.ppf(1 - 0.025 / 3, 18) * np.sqrt(within * 2 / 4)  # Bonferroni
    assert at[1]["interval"] == pytest.approx([cell[1, 1] - cell[0, 1] - half, cell[1, 1] - cell[0, 1] + half])
    assert verdicts.grid_effects(rows[:-4], "loss", arm_keys) == []  # an arm without a result
    assert verdicts.grid_effects(rows[::4], "loss", arm_keys) == []  # one run of each arm
    assert verdicts.grid_effects([], "loss", arm_keys) == []


def test_verdicts_are_words():
    rng = np.random.default_rng(4)
    losses = rng.normal(0, 0.004, (4, 4)) + [1.0, 1.001, 0.95, 1.2]
    words = [entry.get("verdict") for entry in verdicts.compare_arms(study(losses), "loss", [0, 1, 2, 3], 0.01)]
    assert words[0] is None and re.fullmatch(r"not told apart \(about \d seeds show 0\.01\)", words[1])
    assert re.fullmatch(r"better by 0\.0[45]\d\d, 95 % 0\.0[34]\d\d to 0\.0[56]\d\d", words[2])
    assert words[3].startswith("worse by 0.")
    accuracies = [row | {"acc": row["loss"]} for row in study(losses)]
    assert verdicts.compare_arms(accuracies, "acc", [0, 1, 2, 3])[3]["verdict"].startswith("better by 0.")
    speeds = [row | {"tokens_per_sec": row["loss"]} for row in study(losses)]
    assert verdicts.compare_arms(speeds, "tokens_per_sec", [0, 1, 2, 3])[2]["verdict"].startswith("worse by 0.")
    needed = verdicts.seeds_needed(0.004, 3, 0.01)  # and with as many seeds, four studies of five do show it
    shown = 0
    for _ in range(300):
        losses = rng.normal(0, 0.004, (needed, 4)) + [0, 0.01, 0, 0]
        shown += not verdicts.compare_arms(study(losses), "loss", [0, 1, 2, 3])[1]["verdict"].startswith("not")
    assert 0.7 <= shown / 300 <= 0.95


def test_missing_scipy_is_reported_before_the_first_run(monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sweep, "axes", {"n_embd": [16, 32]})
    with pytest.raises(UserError, match="confidence intervals need scipy: pip install"):
        sweep.main()


# -----------------------------------------------------------------------------
# scaling.py


def law(N, D, E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28):
    return E + A / N**alpha + B / D**beta


def write_points(path: Path, noise=0.01, seed=0, **coefficients) -> None:
    rng = np.random.default_rng(seed)
    lines = ["params,tokens,loss"]
    for N in np.geomspace(1e6, 1e10, 12):
        for D in np.geomspace(1e7, 1e11, 12):
            lines.append(f"{N},{D},{law(N, D, **coefficients) * np.exp(noise * rng.standard_normal())}")
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("seed", [0, 1])
def test_known_coefficients_lie_in_their_intervals(tmp_path, seed):
    write_points(tmp_path / "points.csv", seed=seed)
    run_research("scaling.py", f"--results={tmp_path}/points.csv", "--pictures=False", "--bootstrap=100", cwd=tmp_path)
    found = json.loads((tmp_path / "scaling_laws.json").read_text())["params_and_tokens"]
    for name, true in dict(E=1.7, alpha=0.34, beta=0.28).items():
        low, high = found["interval"][name]
        assert low - 0.25 * (high - low) <= true <= high + 0.25 * (high - low), (name, low, high)
        assert found[name] == pytest.approx(true, rel=0.1)
    assert found["leave_one_out"] is None and found["r2"] > 0.99
    best = laws.optimum(np.array([np.log(400), np.log(410), np.log(1.7), 0.34, 0.28]), found["budget"])
    assert found["best_params"] == pytest.approx(best[0], rel=0.3)


def test_without_noise_the_coefficients_are_exact(tmp_path):
    write_points(tmp_path / "points.csv", noise=0.0)
    points = points_module.read_table(tmp_path / "points.csv", "", "measured")
    N, D, y = (np.array([p[k] for p in points]) for k in ("params", "tokens", "loss"))
    theta = laws.fit_surface(N, D, y)
    assert laws.coefficients(theta) == pytest.approx(dict(E=1.7, A=400, B=410, alpha=0.34, beta=0.28), rel=2e-3)
    value, gradient = laws.objective(theta + 0.1, N, D, y, 1e-3)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        high, low = (laws.objective(theta + 0.1 + shift, N, D, y, 1e-3)[0] for shift in (step, -step))
        assert gradient[i] == pytest.approx((high - low) / 2e-6, rel=1e-4)


def test_isoflop_parabolas_agree_with_the_law_behind_the_points():
    def points(sizes, budgets=(1e18, 1e19, 1e20)):
        """Runs at multiples of each budget's best size."""
        theta = np.array([np.log(400), np.log(410), np.log(1.7), 0.34, 0.28])
        best = {C: laws.optimum(theta, C)[0] for C in budgets}
        pairs = [(C, m * best[C]) for C in budgets for m in sizes]
        return [dict(params=N, tokens=C / 6 / N, flops=C, loss=law(N, C / 6 / N)) for C, N in pairs]

    around = np.geomspace(0.25, 4, 7)
    law_found = laws.fit_isoflop(points(around, (1e18, 1e19, 1e20, 1e21)))
    assert law_found["exponent_of_N"] == pytest.approx(0.28 / 0.62, abs=0.02)
    assert all(
        b["best_tokens"] == pytest.approx(b["flops"] / 6 / b["best_params"], rel=1e-6) for b in law_found["budgets"]
    )
    low, high = law_found["interval"]
    # The points lie on one line, so the interval is no wider than rounding.
    assert low - 1e-9 <= law_found["exponent_of_N"] <= high + 1e-9 < low + 0.1
    assert (
        "2 budgets with four sizes and a minimum, a trend needs 3"
        in laws.fit_isoflop(points(around, [1e18, 1e19]))["refused"]
    )
    noisy = [p | {"flops": p["flops"] * f} for p, f in zip(points(around), itertools.cycle((0.93, 1, 1.08)))]
    assert [len(budget["params"]) for budget in laws.fit_isoflop(noisy)["budgets"]] == [7, 7, 7]
    assert [len(group) for group in laws.split_budgets(points(around), [1e18, 1e20])] == [7, 7]
    assert "add larger ones" in laws.fit_isoflop(points(around / 16))["refused"]
    assert "add smaller ones" in laws.fit_isoflop(points(around * 16))["refused"]
    assert "3 sizes, a parabola needs 4" in laws.fit_isoflop(points([0.5, 1, 2]))["refused"]


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_intervals_along_an_axis_cover_the_truth(n):
    rng, inside = np.random.default_rng(n), 0
    for _ in range(400):
        x = np.geomspace(16, 256, n)
        low, high = laws.power_intervals(x, 3 * x**-0.3 * np.exp(0.02 * rng.standard_normal(n)))["b"]
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 400 <= 0.98


@pytest.mark.parametrize(("n", "noise", "c"), [(5, 0.01, 1.0), (8, 0.01, 1.5)])
def test_intervals_with_an_offset_cover_the_truth(n, noise, c):
    rng, inside = np.random.default_rng(n), np.zeros(2)
    for _ in range(60):
        x = np.geomspace(1, 200, n)
        found = laws.offset_intervals(x, (c + 3 * x**-0.5) * np.exp(noise * rng.standard_normal(n)))
        inside += [low <= true <= high for true, (low, high) in ((0.5, found["b"]), (c, found["c"]))]
    assert (inside >= 0.90 * 60).all() and (inside <= 0.98 * 60).all(), inside / 60


def test_intervals_of_isoflop_cover_the_truth():
    """Five sizes at four budgets, two seeds, as config/sweep/isoflop.py."""
    rng, inside = np.random.default_rng(0), 0
    N, C, _ = (
        a.ravel() for a in np.meshgrid([11.4e3, 24e3, 41e3, 90e3, 156e3], [6e10, 1.2e11, 2.4e11, 4.8e11], [1, 2])
    )
    for _ in range(200):
        losses = law(N, C / 6 / N, 1.34, 33, 105, 0.443, 0.443) * np.exp(0.006 * rng.standard_normal(len(N)))
        found = laws.fit_isoflop([dict(params=n, tokens=c / 6 / n, flops=c, loss=y) for n, c, y in zip(N, C, losses)])
        low, high = found["interval"]
        inside += low <= 0.5 <= high
    assert 0.90 <= inside / 200 <= 0.98


def test_noise_alone_gives_no_law_of_flops():
    rng, found = np.random.default_rng(0), {"noise": 0, "law": 0}
    for _ in range(200):
        flops = np.geomspace(1e15, 1e17, 12)
        for name, truth in (("noise", np.full(12, 2.0)), ("law", 40 * flops**-0.09)):
            y = truth * np.exp(0.03 * rng.standard_normal(12))
            found[name] += not laws.why_not_frontier([dict(flops=f, loss=v) for f, v in zip(flops, y)])
    assert found["noise"] <= 0.06 * 200 and found["law"] >= 0.95 * 200


def test_a_constant_term_at_zero_is_said_so_and_has_no_interval(tmp_path):
    rows = [f"{n},{d},{law(n, d, E=0.0)}" for n in (1e6, 4e6, 16e6, 64e6) for d in (1e8, 4e8, 16e8)]
    (tmp_path / "p.csv").write_text("params,tokens,loss\n" + "\n".join(rows) + "\n")
    output = run_research("scaling.py", "--results=p.csv", "--bootstrap=25", "--pictures=False", cwd=tmp_path)
    assert "L = 0 + " in output and "E not distinguishable from 0" in output


def test_power_laws_along_an_axis_are_recovered():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 12)
    y = (2 + 3 * x**-0.5) * np.exp(0.002 * rng.standard_normal(12))
    points = [dict(n_embd=a, params=1.0, tokens=1.0, flops=1.0, loss=b) for a, b in zip(x, y)]
    found = scaling.fit_axis(points, "n_embd", rng)["offset"]
    for name, true in dict(b=0.5, c=2.0).items():
        low, high = found["interval"][name]
        assert low <= true <= high and found[name] == pytest.approx(true, rel=0.1)
    assert found["leave_one_out"] < 0.02


def test_intervals_of_few_points_have_a_width():
    rng = np.random.default_rng(0)
    pairs = zip((16, 32, 64, 128), (3.1, 2.4, 2.05, 1.8))
    points = [dict(n_embd=n, params=1.0, tokens=1.0, flops=1.0, loss=loss) for n, loss in pairs]
    found = scaling.fit_axis(points, "n_embd", rng)
    for fit, names in (("power", "ab"), ("offset", "abc")):
        for name in names:
            low, high = found[fit]["interval"][name]
            assert high - low > 1e-4 * abs(found[fit][name]) and low <= found[fit][name] <= high
    assert found["fixed"] == dict(params=1.0, tokens=1.0, flops=1.0)


def test_a_fit_leaves_out_runs_of_another_kind(capsys):
    points = [dict(loss=1.0, kind="pos=rope, optimizer=muon")] * 3 + [dict(loss=2.0, kind="pos=rope, optimizer=sgd")]
    assert points_module.select_kind(points) == points[:3]
    printed = capsys.readouterr().out
    assert (
        "2 kinds of runs: the fits use the 3 with optimizer=muon\n" in printed and '--nuisance=["optimizer"]' in printed
    )


def test_the_kind_of_a_run_is_every_key_of_data_model_and_optimization_but_the_sizes():
    keys = set(points_module.kind_keys())
    assert keys > set("dataset optimizer schedule norm mlp pos qk_norm init tie_weights dropout learning_rate".split())
    assert not keys & set("seed out_dir init_from eval_interval device dtype".split())
    sizes = points_module.SIZE_KEYS
    assert not keys & sizes and sizes <= set(read_keys(ROOT / "train.py"))


def test_fits_that_the_data_cannot_support_are_refused():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e6, 1e9, 9)

    def points(pairs):
        return [dict(params=n, tokens=d, flops=6 * n * d, loss=law(n, d)) for n, d in pairs]

    def reason(pairs) -> str:
        return scaling.fit_params_and_tokens(points(pairs), rng)["refused"]

    assert "grow together" in reason([(n, 20 * n) for n in sizes])
    assert "different tokens" in reason([(n, 1e9) for n in sizes])
    assert "need 8" in reason([(n, d) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9)] + [(1e6, 1e10)])
    assert "span a factor" in reason([(n, d) for n in (1e6, 1.2e6, 1.5e6) for d in (1e8, 1e9, 1e10)])
    assert "needs 3" in scaling.fit_axis(points([(1e6, 1e9), (1e7, 1e9)]), "params", rng)["refused"]
    rising = [dict(p, loss=1 / p["loss"]) for p in points([(n, 1e9) for n in sizes])]
    assert "does not fall" in scaling.fit_axis(rising, "params", rng)["refused"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "params,tokens\n1,2\n",
            "a point needs loss and two of params, tokens, flops. Recognised: params = params, tokens",
        ),
        ("width,depth,final\n1,2,3\n", '["width", "depth", "final"]'),
        ("params,tokens,loss\n1,many,2\n", "line 2: tokens is 'many', not a number"),
        ("params,tokens,loss\n1,-2,2\n", "must be above 0"),
        ("params,tokens,loss\n1,inf,2\n", "must be above 0, and finite"),
        ("params,tokens,loss\n", "no points"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path, text, words):
    (tmp_path / "points.csv").write_text(text)
    assert words in run_research("scaling.py", "--results=points.csv", cwd=tmp_path, code=2)


def test_a_csv_may_have_flops_instead_of_tokens(tmp_path, capsys):
    def read(text: str, name="p.csv", columns="", flops="measured", encoding="utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding)
        return points_module.read_table(tmp_path / name, columns, flops)

    expected = [dict(params=10, flops=1200, loss=3, tokens=20)]
    assert read("Params,FLOPs,Loss\n10,1200,3.0\n") == expected
    assert (
        read("x,Model Size,Training FLOP,hex_color,loss\n7,10,1200,#faebdd,3.0\n") == expected
    )  # as in published data
    assert read("N;D;val_loss\r\n10;20;3.0\r\n", encoding="utf-8-sig") == expected  # as Excel writes it
    assert read("N\tD\tval_loss\n10\t20\t3.0\n", "p.tsv") == expected
    assert read('[{"N": 10, "D": 20, "val_loss": 3.0}]', "p.json") == expected
    assert read('{"N": [10], "D": [20], "val_loss": [3.0]}', "p.json") == expected
    assert read('{"config": {"size": 10}, "D": 20, "val_loss": 3.0}\n', "p.jsonl", "params:config.size") == expected
    nanochat = "flops_budget,depth,num_params,num_scaling_params,tokens_trained,val_bpb\n1300,2,12,10,20,3.0\n"
    assert read(nanochat, columns="params:num_scaling_params", flops="6ND") == expected
    assert read(nanochat)[0]["params"] == 12 and read(nanochat)[0]["flops"] == 1300
    capsys.readouterr()
    # As wandb exports it: a run that has not finished has no loss, and one that diverged has nan.
    wandb = (
        '"Name","State","parameters","tokens","val/loss"\n"a","finished","10","20","3.0"\n"b","crashed","10","20",""\n'
    )
    assert read(wandb) == expected
    printed = capsys.readouterr().out
    assert "left out: 1 rows without loss" in printed and "1 points, loss = val/loss, params = parameters" in printed
    assert "flops = 6 params tokens" in printed
    with pytest.raises(UserError, match="params:size is not one of .*a colon, one of: N, D, val_loss"):
        read("N,D,val_loss\n10,20,3.0\n", columns="params:size")
    (tmp_path / "p.csv").write_text("N,D,loss\n10,20,nan\n10,20,3\n")
    assert points_module.read_points(str(tmp_path / "p.csv"), "", "all", "measured", [], False) == expected
    assert "left out: 1 runs whose loss is not finite" in capsys.readouterr().out


def test_a_mistyped_source_is_an_error_and_leaves_no_folder(tmp_path):
    for script, source in (
        ("scaling.py", "typo.csv"),
        ("scaling.py", "typo"),
        ("plot.py", "typo.json"),
        ("plot.py", "typo"),
    ):
        score = ["--score=acc"] * source.endswith(".json")
        run_research(script, f"--results={source}", *score, cwd=tmp_path, code=2)
    run_research("scaling.py", "--results=typo", "--check=more.csv", cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def published_sets() -> dict[str, list[dict]]:
    """Points of tests/data/porian2024.csv."""
    sets: dict[str, list[dict]] = {}
    with open(ROOT / "tests" / "data" / "porian2024.csv", newline="") as f:
        for row in csv.DictReader(f):
            numbers = dict(params=row["N"], tokens=row["D"], flops=row["flops"], loss=row["val_loss"])
            sets.setdefault(row["set"], []).append({key: float(value) for key, value in numbers.items()})
    return sets


@pytest.mark.parametrize(
    ("name", "published"),
    [("refinedweb_tuned", 0.497), ("refinedweb_long_warmup", 0.701), ("openwebtext2_tuned", 0.518)],
)
def test_isoflop_gives_the_published_exponents(name, published):
    found = laws.fit_isoflop(published_sets()[name])
    low, high = found["interval"]
    assert low <= published <= high and found["exponent_of_N"] == pytest.approx(published, abs=0.015)
    assert len(found["budgets"]) >= 10


def test_budgets_are_found_where_runs_lie_densely_and_the_others_are_named():
    rng = np.random.default_rng(0)
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    theta = np.array([np.log(400), np.log(410), np.log(1.7), 0.34, 0.28])
    flops = np.concatenate(
        [np.repeat(budgets, 16) * np.exp(0.03 * rng.standard_normal(144)), np.geomspace(5e18, 3e21, 60)]
    )
    sizes = np.array([laws.optimum(theta, C)[0] for C in flops]) * np.exp(rng.uniform(-1.2, 1.2, len(flops)))
    runs_found = [dict(params=N, tokens=C / 6 / N, flops=C, loss=law(N, C / 6 / N)) for N, C in zip(sizes, flops)]
    found = laws.fit_isoflop(runs_found)
    assert [b["flops"] for b in found["budgets"]] == pytest.approx(budgets, rel=0.1)
    assert any("runs between the budgets" in reason for reason in found["left_out"])
    given = laws.fit_isoflop(runs_found, [1e19, 1e20, 1e21])
    assert [b["flops"] for b in given["budgets"]] == [1e19, 1e20, 1e21]


def run_points(values: dict[tuple, float], nuisance=("learning_rate",)) -> list[dict]:
    """Points of runs (width, learning rate, seed) -> loss."""
    return [
        dict(
            params=float(w * w), tokens=1e6, flops=6e6 * w * w, loss=loss, n_embd=w, n_layer=2, block_size=64, data_fraction=1.0,
            kind="same", seed=seed, nuisance={"learning_rate": rate} if nuisance else {},
        )
        for (w, rate, seed), loss in values.items()
    ]  # fmt: skip


def test_of_a_nuisance_key_the_best_value_of_each_size_counts(capsys):
    losses = {
        (w, rate, seed): 2 + 30 / w + (np.log(rate) - np.log(0.64 / w)) ** 2 + 0.001 * seed
        for w in (16, 32, 64) for rate in (0.01, 0.02, 0.04) for seed in (1, 2)
    }  # fmt: skip
    kept = points_module.best_of_nuisance(run_points(losses))
    found = {(p["n_embd"], p["nuisance"]["learning_rate"]) for p in kept}
    assert found == {(16, 0.04), (32, 0.02), (64, 0.01)} and len(kept) == 6
    printed = capsys.readouterr().out
    assert "width 32, depth 2, context 64, 1e+06 tokens: learning_rate=0.02, the best of 3\n" in printed
    assert printed.count("the best learning_rate is at the edge of its values: add more") == 2
    assert points_module.best_of_nuisance(run_points(losses, nuisance=())) == run_points(losses, nuisance=())


def test_a_study_says_what_is_a_nuisance_and_other_keys_divide_the_runs(chars):
    zipped = {"n_embd": [8, 16, 32], "weight_decay": [0.1, 0.2, 0.3]}
    run_research("sweep.py", write_study(chars, zipped=zipped, seeds=[1]), cwd=chars)
    output = run_research("scaling.py", "--results=out/study", "--pictures=False", cwd=chars)
    assert "3 kinds of runs: the fits use the 1 with weight_decay=0.1" in output
    run_research("sweep.py", write_study(chars, zipped=zipped, seeds=[1], nuisance=["weight_decay"]), cwd=chars)
    output = run_research("scaling.py", "--results=out/study", "--pictures=False", "--count=non_embedding", cwd=chars)
    units = "N: without the tables of tokens and positions; FLOPs: as measured"
    assert "kinds of runs" not in output and f"3 runs; {units}" in output
    assert all(
        units in (chars / "out" / "study" / f"scaling_laws.{kind}").read_text() for kind in ("md", "tex", "json")
    )
    row = read_jsonl(chars / "out" / "study")[0]
    vocabulary, context = load_dataset("chars", chars / "data").vocab_size, 16
    assert row["embedding_parameters"] == 8 * (vocabulary + context)  # learned positions are the default
    with open(chars / "out" / "study" / "scaling_data.csv", newline="") as data:
        assert float(next(csv.DictReader(data))["params"]) == row["params"] - row["embedding_parameters"]


def test_equal_losses_and_left_out_cells():
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e11, 4)))
    assert laws.why_not_surface(N, D, np.full(16, 2.0)) == "all runs have the same loss"
    assert laws.why_not_axis(np.array([1.0, 2, 4]), np.full(3, 2.0)) == "all runs have the same loss"
    # Two seeds of one size are left out together: the other seed would give it away.
    seen = []
    scaling.leave_one_out(np.repeat(N, 2), np.repeat(D, 2), np.repeat(law(N, D), 2), lambda chosen: seen.append(chosen))
    assert len(seen) == 16 and all((~chosen).sum() == 2 for chosen in seen)


def test_a_prediction_is_made_before_and_checked_after(tmp_path):
    write_points(tmp_path / "points.csv", noise=0.01)
    for name, loss in (("later.csv", law(3e10, 3e11)), ("off.csv", 1.2 * law(3e10, 3e11))):
        (tmp_path / name).write_text(f"N,D,loss\n3e10,3e11,{loss}\n")
    check = ["scaling.py", "--results=points.csv", "--output_dir=fits", "--pictures=False", "--bootstrap=40"]
    assert "run without --check first" in run_research(*check, "--check=later.csv", cwd=tmp_path, code=2)
    run_research(*check, cwd=tmp_path)
    before = (tmp_path / "fits" / "scaling_laws.json").read_bytes()
    assert re.search(r"predicted [\d.]+ \(95 % .*: inside\n", run_research(*check, "--check=later.csv", cwd=tmp_path))
    assert ": outside\n" in run_research(*check, "--check=off.csv", cwd=tmp_path)
    assert (tmp_path / "fits" / "scaling_laws.json").read_bytes() == before


# -----------------------------------------------------------------------------
# plot.py, and a small study from start to end


def test_a_study_ends_with_fits_and_figures(chars):
    base = TINY + " --max_iters=30 --eval_interval=10"
    path = write_study(chars, zipped={"n_embd": [8, 16, 32, 64]}, seeds=[1], base=base)
    run_research("sweep.py", path, "--max_parallel=2", cwd=chars)
    output = run_research("plot.py", "--results=out/study", "--x=flops", cwd=chars)
    assert "n_embd=64" in output
    output = run_research("scaling.py", "--results=out/study", cwd=chars)
    assert "width" in output and "different tokens" in output
    out = chars / "out" / "study"
    assert {"comparison.md", "comparison.tex", "scaling_laws.md", "scaling_laws.tex"} <= {p.name for p in out.iterdir()}
    with open(out / "scaling_data.csv", newline="") as f:
        assert all(float(row["residual_by_n_embd"]) for row in csv.DictReader(f))
    for name in ("comparison.png", "curves_flops.png", "scaling_n_embd.png", "efficiency.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name
    with open(out / "summary.csv", newline="") as f:
        assert [row["n"] for row in csv.DictReader(f)] == ["1"] * 4
    output = run_research("plot.py", "--results=nothing", cwd=chars, code=2)
    assert "no study (results.jsonl) and no run (metrics.jsonl)" in output


def test_a_grid_is_drawn_as_a_heat_map_and_says_its_effects(chars):
    path = write_study(chars, axes={"n_embd": [8, 16], "dropout": [0.0, 0.1]}, seeds=[1, 2])
    output = run_research("sweep.py", path, "--max_parallel=2", cwd=chars)
    assert "n_embd=16 against 8, mean over the other keys: " in output and "n_embd and dropout: " in output
    output = run_research("plot.py", "--results=out/study", "--format=svg,pdf", cwd=chars)
    out = chars / "out" / "study"
    assert "grid.svg, grid.pdf" in output and (out / "grid.pdf").read_bytes()[:5] == b"%PDF-"
    assert "<svg" in (out / "grid.svg").read_text() and not list(out.glob("*.png"))
    assert "choose one of png, pdf, svg" in run_research(
        "plot.py", "--results=out/study", "--format=gif", cwd=chars, code=2
    )
    scores = [dict(path=f"run{n}", loss=3.0 - n / 10, hellaswag_acc=0.25 + n / 100) for n in range(4)]
    (chars / "scores.json").write_text(json.dumps(scores))
    output = run_research("plot.py", "--results=scores.json", "--score=hellaswag_acc", "--output_dir=s", cwd=chars)
    assert "rank correlation -1.00" in output and (chars / "s" / "hellaswag_acc_against_loss.png").exists()
    assert "0 models" in run_research(
        "plot.py", "--results=scores.json", "--score=arc", "--output_dir=s", cwd=chars, code=2
    )


def test_tables_are_markdown_and_latex(tmp_path):
    names = tables.write_tables(tmp_path / "t", ["arm", "loss"], [["n_embd=64 & 50 %", "1.5"], ["a|b", "x^-2"]])
    markdown, latex = ((tmp_path / name).read_text() for name in names)
    assert markdown == "| arm | loss |\n| --- | --- |\n| n_embd=64 & 50 % | 1.5 |\n| a\\|b | x^-2 |\n"
    assert r"n\_embd=64 \& 50 \% & 1.5 \\" in latex and "$x^{-2}$" in latex
    assert tables.to_latex("+0.0156 ± 2 x^-0.5 to -1.5, n-gram") == "$+0.0156$ $\\pm$ 2 $x^{-0.5}$ to $-1.5$, n-gram"
    assert latex.startswith("% \\usepackage{booktabs}\n\\begin{tabular}{lr}\n\\toprule\n") and latex.endswith(
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_curves_are_read_by_step_tokens_flops_and_seconds(tmp_path):
    lines = [
        dict(step=0, tokens=0, val_loss=5.0), dict(step=10, tokens=100, train_loss=4.0, elapsed=2.0),
        dict(step=10, tokens=100, val_loss=4.5),
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = dict(path=str(tmp_path), tokens=200, train_flops=4000)
    found = {by: plot.read_curve(row, "val_loss", by) for by in plot.X_LABELS}
    assert found == dict(steps=[(10, 4.5)], tokens=[(100, 4.5)], flops=[(2000, 4.5)], seconds=[(2.0, 4.5)])


# -----------------------------------------------------------------------------
# pipeline.py

STEP = "python -c 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\"x\")'"


def pipeline_file(folder: Path, steps: dict) -> Path:
    path = folder / "pipe.py"
    path.write_text(f"name = 'pipe'\nsteps = {steps!r}\n")
    return path


def report_of(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "out" / "pipelines" / "pipe.json").read_text())
    return {entry["step"]: entry["state"] for entry in report["steps"]}


def test_a_pipeline_runs_in_order_and_later_only_outdated_steps(tmp_path):
    steps = {
        "last": {"run": f"{STEP} c", "after": ["middle"], "inputs": ["b"], "outputs": ["c"]},
        "first": {"run": f"{STEP} a", "outputs": ["a"]},
        "middle": {"run": f"{STEP} b", "after": ["first"], "inputs": ["a"], "outputs": ["b"]},
    }
    path = pipeline_file(tmp_path, steps)
    output = run_research("pipeline.py", path, "--dry_run", cwd=tmp_path)
    assert output.index("first: to run") < output.index("middle: to run") < output.index("last: to run")
    assert not (tmp_path / "a").exists()
    run_research("pipeline.py", path, cwd=tmp_path)
    assert list(report_of(tmp_path).items()) == [("first", "done"), ("middle", "done"), ("last", "done")]
    run_research("pipeline.py", path, cwd=tmp_path)
    assert set(report_of(tmp_path).values()) == {"up to date"}
    later = time.time() + 5
    os.utime(tmp_path / "b", (later, later))
    run_research("pipeline.py", path, cwd=tmp_path)
    assert report_of(tmp_path) == dict(first="up to date", middle="up to date", last="done")
    run_research("pipeline.py", path, "--step=middle", cwd=tmp_path)
    assert report_of(tmp_path) == dict(middle="done")
    run_research("pipeline.py", path, "--from_step=middle", "--force", cwd=tmp_path)
    assert report_of(tmp_path) == dict(middle="done", last="done")
    run_research("pipeline.py", path, "--step=last", "--step=first", cwd=tmp_path)
    assert report_of(tmp_path) == dict(first="done", last="done")
    # A step whose command has changed runs again, and so does one whose command names a file that has changed.
    run_research("pipeline.py", path, cwd=tmp_path)
    (tmp_path / "study.py").write_text("x = 1\n")
    os.utime(tmp_path / "study.py", (1, 1))
    pipeline_file(tmp_path, steps | {"first": steps["first"] | {"run": f"{STEP} a study.py"}})
    run_research("pipeline.py", path, cwd=tmp_path)
    assert report_of(tmp_path)["first"] == "done"
    run_research("pipeline.py", path, cwd=tmp_path)
    assert report_of(tmp_path)["first"] == "up to date"
    os.utime(tmp_path / "study.py", (later, later))
    run_research("pipeline.py", path, cwd=tmp_path)
    assert report_of(tmp_path)["first"] == "done"


def test_a_failed_step_stops_the_steps_that_depend_on_it(tmp_path):
    steps = {
        "bad": {"run": "python -c 'raise SystemExit(3)'", "retries": 1},
        "needs": {"run": f"{STEP} n", "after": ["bad"]},
        "other": {"run": f"{STEP} o", "env": {"A": 1}},
        "silent": {"run": "python -c 0", "outputs": ["never"]},
    }
    path = pipeline_file(tmp_path, steps)
    run_research("pipeline.py", path, cwd=tmp_path, code=1)
    assert report_of(tmp_path) == {"bad": "failed"}
    run_research("pipeline.py", path, "--continue_on_error", cwd=tmp_path, code=1)
    assert report_of(tmp_path) == dict(bad="failed", needs="not run: bad failed", other="done", silent="failed")
    output = run_research("pipeline.py", path, "--dry_run", cwd=tmp_path)
    assert "bad: to run" in output and "needs: to run" in output
    entry = json.loads((tmp_path / "out" / "pipelines" / "pipe.json").read_text())["steps"][0]
    assert entry["exit"] == 3 and entry["attempts"] == 2 and entry["seconds"] >= 0


def test_outputs_of_a_failed_step_are_not_up_to_date(tmp_path):
    bad = 'python -c \'import sys; open("a", "w"); sys.exit(1)\''
    path = pipeline_file(tmp_path, {"half": {"run": bad, "outputs": ["a"]}})
    run_research("pipeline.py", path, cwd=tmp_path, code=1)
    assert (tmp_path / "a").exists()
    run_research("pipeline.py", path, cwd=tmp_path, code=1)
    assert report_of(tmp_path) == {"half": "failed"}


def test_a_signal_is_passed_on_to_the_step_and_ends_the_pipeline(tmp_path):
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
        ({"a": {"run": "x", "after": ["b"]}}, "runs after b, which is not a step"),
        ({"a": {"run": "x", "after": ["b"]}, "b": {"run": "x", "after": ["a"]}}, "depend on each other: a, b"),
        ({"a": {"rum": "x"}}, "run is missing"),
        ({"a": {"run": "x", "needs": []}}, "unknown key needs"),
        ({"a": {"run": "x", "outputs": "file"}}, "outputs must be a list"),
        ({"a": {"run": "x", "retries": -1}}, "retries must be at least 0"),
        ({"a": {"run": "x 'y"}}, "No closing quotation"),
    ],
)
def test_a_wrong_pipeline_is_refused(tmp_path, steps, words):
    output = run_research("pipeline.py", pipeline_file(tmp_path, steps), cwd=tmp_path, code=2)
    assert words in output and "Traceback" not in output


def test_ready_pipelines_are_valid():
    for path in (ROOT / "config" / "pipeline").glob("*.py"):
        keys = run_file(str(path), {})
        assert keys.keys() <= set(read_keys(pipeline.__file__))
        steps = keys["steps"]
        assert set(pipeline.sort_steps(steps, {})) == set(steps)
        for s in steps.values():
            script = s["run"].split()[0]
            assert (ROOT / script).is_file(), script


def test_research_imports_only_the_configurator_and_files_of_ours():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "research").glob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) ([\w.]+)", source, re.M))
    assert {name for name in imported if name.startswith("common")} == {"common.files"}
    assert not imported & {path.stem for path in ROOT.glob("*.py")} - {"configurator"}


# -----------------------------------------------------------------------------
# peers.py


def test_peers_runs_both_programs_on_the_same_work_in_turn(tmp_path):
    """The peer is a program with nanoGPT's interface: keys, token files, checkpoint and log lines."""
    peer = tmp_path / "peer"
    peer.mkdir()
    (peer / "configurator.py").write_text("")
    (peer / "train.py").write_text(
        "import pathlib, sys\n"
        "assert pathlib.Path('data/tokens/train.bin').stat().st_size == 2_000_000 and '--n_embd=16' in sys.argv\n"
        "[print(f'iter {n}: loss 1.0, time {10 + n}.00ms, mfu 1%') for n in range(13)]\n"
    )
    keys = [f"--nanogpt={peer}", "--rounds=2", "--steps=12", "--flags=--n_layer=1 --n_embd=16", "--output=peers.json"]
    output = run_research("peers.py", *keys, cwd=tmp_path)
    rounds = json.loads((tmp_path / "peers.json").read_text())
    assert [r["nanogpt"]["ms per step"] for r in rounds] == [18.0, 18.0]  # the median after the first third
    assert all(r["flatgpt"]["ms per step"] > 0 and r["flatgpt"]["peak MiB"] > 100 for r in rounds)
    assert (
        "round 2, flatgpt and nanoGPT: ms per step" in output
        and "times as fast" in output
        and "of the memory" in output
    )
    assert "give the folder of a clone" in run_research("peers.py", "--nanogpt=nothing", cwd=tmp_path, code=2)


# -----------------------------------------------------------------------------
# decode_peers.py


def test_decode_peers_runs_the_engines_in_turn_on_one_export(tmp_path, gpt2_vocabulary):
    save_gpt2(tmp_path / "m", vocab_size=50257, n_embd=8, n_layer=1, n_positions=64)
    save_gpt2_tokenizer(tmp_path / "m", gpt2_vocabulary)
    keys = ["--model=m", "--tokens=6", "--rounds=1", "--engines=flatgpt,transformers"]
    output = run_research("decode_peers.py", *keys, "--output=rates.json", cwd=tmp_path)
    rates = json.loads((tmp_path / "rates.json").read_text())["tokens_per_second"]
    assert all(len(own) == 1 and own[0] > 0 for own in rates.values()) and list(rates) == ["flatgpt", "transformers"]
    assert re.search(r"transformers [\d.]+ +[\d.,]+ tokens/s   flatgpt / it: [\d.]+ \(", output)
    only = run_research("decode_peers.py", *keys, "--weights=int8", "--batch=3", cwd=tmp_path)
    assert "transformers" not in only.splitlines()[-1]
    wrong = {
        "--engines=vllm": "--engines=vllm: choose one of flatgpt",
        "--model=nowhere": "give a folder that export.py",
    }
    wrong |= {"--engines=llama_cpp": "llama_cpp"}
    for key, message in wrong.items():
        assert message in run_research("decode_peers.py", "--model=m", key, cwd=tmp_path, code=2)
    eight_bits = ["--model=m", "--weights=int8", "--engines=transformers"]
    assert "no 8-bit weights on a CPU" in run_research("decode_peers.py", *eight_bits, cwd=tmp_path, code=2)
