"""Scaling laws: how the loss falls with width, depth, context, data, parameters and compute, and how to spend a budget.

    python research/scaling.py --results=out/scaling                    a study, or several separated by commas
    python research/scaling.py --results=points.csv --budget=1e19       a CSV: params, tokens (or flops), loss

Fits three laws, or says why the data cannot support them. The first two have bootstrap intervals:
  by axis     L = a x^-b, and L = c + a x^-b
  N and D     L = E + A / N^alpha + B / D^beta, by the method of https://arxiv.org/abs/2203.15556, section 3.3
  IsoFLOP     the best N for each of several budgets, by parabolas in log N (section 3.2)
Writes scaling_laws.json, scaling_data.csv (with residuals) and PNGs. Needs scipy (pip install -e '.[research]').
"""

import collections
import csv
import functools
import json
import math
from pathlib import Path

import laws
from figures import AXIS_LABELS, draw_all
from laws import columns
from runs import ROOT, check_scipy, make_folder, read_rows, same_conditions, write_csv

from common.files import atomic_write, parse_json
from configurator import UserError, check_bounds, configure, read_keys, short_errors

import numpy as np

results = ""  # folders of studies or runs, or CSV files, separated by commas
output_dir = ""  # folder for the fits and figures; empty: the first of --results
budget = 0.0  # FLOPs to spend (6 per parameter and token) in the best way; 0: ten times the largest run's
mixed = False  # fit runs of different code, torch, device or dtype too
budgets: list = []  # FLOPs of the IsoFLOP budgets: [6e18,1e19]; empty: groups with a gap of 20 % between them
bootstrap = 200  # bootstrap samples for the intervals
delta = 1e-3  # of the Huber loss: residuals of log loss above it count linearly
seed = 0  # seed of the bootstrap
pictures = True  # draw the figures

CSV_NAMES = {"parameters": "params", "model size": "params", "training tokens": "tokens", "training flop": "flops"}
# Keys that follow from the size of a model or the length of its training. Runs may differ in them within one fit.
SIZE_KEYS = set(
    "depth n_layer n_head n_kv_head n_embd mlp_hidden head_lr weight_decay block_size data_fraction batch_size "
    "gradient_accumulation_steps total_batch_tokens warmup_iters lr_decay_iters "
    "max_iters max_epochs max_flops max_minutes".split()
)
# What may change along an axis besides itself: a wider model has more parameters. Everything else must be equal.
CHANGES_WITH = {
    "n_embd": {"params", "flops"}, "n_layer": {"params", "flops"}, "params": {"flops", "n_embd", "n_layer"},
    "block_size": {"params", "flops"}, "data_fraction": {"tokens", "flops"}, "tokens": {"flops", "data_fraction"},
}  # fmt: skip


def read_points(sources: str) -> list[dict]:
    """Points with params, tokens, flops and loss, and for runs their kind and sizes. sources: as --results."""
    points, rows = [], []
    for source in filter(None, sources.split(",")):
        if source.endswith(".csv"):
            points += read_csv(Path(source))
        else:
            rows += [row for row in read_rows(source) if row.get("final_val_loss") is not None]
    rows = rows if mixed else same_conditions(rows, "--mixed=True fits them too")
    points += [run_to_point(row) for row in rows]
    points = [p for p in points if math.isfinite(p["loss"])]
    if not points:
        raise UserError(f"--results={sources}: no points there: no finished run, or a CSV with only a header")
    return points


def run_to_point(row: dict) -> dict:
    config = parse_json((Path(row["path"]) / "config.json").read_text(encoding="utf-8"))
    point = {key: config[key] for key in ("n_embd", "n_layer", "block_size", "data_fraction", "seed")}
    point["kind"] = ", ".join(f"{key}={config[key]}" for key in kind_keys() if key in config)
    params = row.get("params") or row["model_parameters"]
    numbers = dict(params=params, tokens=row["tokens"], flops=row["train_flops"], loss=row["final_val_loss"])
    return point | {key: float(value) for key, value in numbers.items()}


@functools.cache
def kind_keys() -> list[str]:
    """The keys of train.py that say what is trained and how, but not how large or how long."""
    group, found = "", []
    for key in read_keys(ROOT / "train.py"):
        if key.startswith("# "):
            group = key.removeprefix("# ")
        elif group in ("Data", "Model", "Optimization") and key not in SIZE_KEYS:
            found.append(key)
    return found


def select_kind(points: list[dict]) -> list[dict]:
    """The points that differ only in sizes and lengths: of several kinds the most frequent one, which is printed."""
    kinds = collections.Counter(point.get("kind", "") for point in points)
    kind, count = kinds.most_common(1)[0]
    if len(kinds) > 1:
        common = set.intersection(*(set(other.split(", ")) for other in kinds))
        distinctive = ", ".join(pair for pair in kind.split(", ") if pair not in common)
        print(f"{len(kinds)} kinds of runs: the fits use the {count} with {distinctive}")
    return [point for point in points if point.get("kind", "") == kind]


def read_csv(path: Path) -> list[dict]:
    """Points of a CSV: loss, and two of params, tokens and flops = 6 params tokens, or other names (CSV_NAMES)."""
    points = []
    with open(path, newline="", encoding="utf-8") as f:
        for number, row in enumerate(csv.DictReader(f), 2):
            row = {str(column).strip().lower(): text for column, text in row.items() if text}
            row = {CSV_NAMES.get(column, column): text for column, text in row.items()}
            try:
                point = {key: float(row[key]) for key in ("loss", *AXIS_LABELS) if key in row}
            except ValueError as e:
                raise UserError(f"{path}, line {number}: {e}") from None
            if "loss" not in point or len(point.keys() & {"params", "tokens", "flops"}) < 2:
                raise UserError(f"{path}, line {number}: a point needs loss and two of params, tokens, flops")
            if min(point.values()) <= 0:
                raise UserError(f"{path}, line {number}: all numbers must be above 0")
            if "tokens" not in point:
                point["tokens"] = point["flops"] / (6 * point["params"])
            if "params" not in point:
                point["params"] = point["flops"] / (6 * point["tokens"])
            point.setdefault("flops", 6 * point["params"] * point["tokens"])
            points.append(point)
    return points


def points_along(points: list[dict], axis: str) -> list[dict]:
    """The largest set of points that differ in the axis and what changes with it, and in nothing else."""
    if axis == "flops":
        return laws.frontier(points)
    fixed = [key for key in AXIS_LABELS if key != axis and key not in CHANGES_WITH[axis]]
    sets: dict[tuple, list[dict]] = {}
    for point in points:
        if axis in point:
            sets.setdefault(tuple(point.get(key) for key in fixed), []).append(point)
    longest_first = sorted(sets.values(), key=lambda group: -sum(p["tokens"] for p in group))
    return max(longest_first, key=lambda group: (len({p[axis] for p in group}), len(group)), default=[])


def fit_axis(points: list[dict], axis: str, rng: np.random.Generator) -> dict:
    """The fits along an axis, or {"refused": why}."""
    all_points, points = points, points_along(points, axis)
    x, y = columns(points, axis, "loss")
    reason = laws.why_not_axis(x, y) or (laws.why_not_frontier(all_points) if axis == "flops" else "")
    if reason:
        return {"refused": reason}
    fixed = {key: points[0][key] for key in AXIS_LABELS if key in points[0] and len({p.get(key) for p in points}) == 1}
    power = dict(zip("ab", laws.fit_power(x, y))) | {"interval": laws.power_intervals(x, y)}
    power["r2"] = laws.r_squared(y, laws.power_law(x, power["a"], power["b"]))
    if axis == "flops":  # which runs are on the frontier is chance too: resample them
        samples = [laws.frontier_exponent([*rng.choice(all_points, len(all_points))]) for _ in range(bootstrap)]
        power["interval"]["b"] = np.nanquantile(samples, (0.025, 0.975)).tolist()
    distinct = len(np.unique(x))
    if distinct < 4:
        offset = {"refused": f"{distinct} different values, three coefficients need 4"}
    else:
        offset = dict(zip("abc", laws.fit_offset(x, y))) | {"interval": laws.offset_intervals(x, y)}
        offset["r2"] = laws.r_squared(y, laws.power_law(x, offset["a"], offset["b"], offset["c"]))
        offset["leave_one_out"] = laws.leave_one_out(x, y)
        low, high = offset["interval"]["c"]
        if high - low > 0.5 * y.min():
            offset["warning"] = "the offset is very uncertain: its interval is wider than half the lowest loss"
    return dict(points=len(x), power=power, offset=offset, fixed=fixed, x=x.tolist(), loss=y.tolist())


def intervals(samples, names) -> dict[str, list[float]]:
    """The 95 % interval of each column of the bootstrap samples."""
    return dict(zip(names, np.quantile(samples, (0.025, 0.975), axis=0).T.tolist()))


def fit_params_and_tokens(points: list[dict], rng: np.random.Generator) -> dict:
    """L(N, D), its intervals, how well it predicts runs it has not seen, and the best use of the budget; or why not."""
    N, D, y = columns(points, "params", "tokens", "loss")
    if reason := laws.why_not_surface(N, D):
        return {"refused": reason}
    theta = laws.fit_surface(N, D, y, delta)
    alpha, beta = theta[3:].tolist()
    if min(alpha, beta) < 1e-6:
        return {"refused": f"the loss does not fall with {'params' if alpha < beta else 'tokens'}: exponent 0"}
    law = laws.coefficients(theta) | {"points": len(y), "interval": None, "theta": theta.tolist()}

    def refit(chosen: np.ndarray) -> np.ndarray | None:
        if laws.why_not_surface(N[chosen], D[chosen]):
            return None
        return laws.fit_surface(N[chosen], D[chosen], y[chosen], delta, theta)

    refits = [refit(rng.integers(len(y), size=len(y))) for _ in range(bootstrap)]
    samples = [laws.coefficients(sample) for sample in refits if sample is not None]
    if len(samples) > 20:
        law["interval"] = intervals([list(sample.values()) for sample in samples], samples[0])
        exponents = {name: law["interval"][name] for name in ("alpha", "beta")}
        if uncertain := [name for name, (low, high) in exponents.items() if high > 4 * max(low, 1e-9)]:
            law["warning"] = f"{' and '.join(uncertain)} very uncertain: add runs over a wider range"
    if law["E"] < 1e-3 * y.min():  # at the bound of the search, where refits cannot move it
        law |= {"E": 0.0, "E_note": "E not distinguishable from 0"}
        if law["interval"]:
            law["interval"]["E"] = None
    law["r2"] = laws.r_squared(y, np.exp(laws.surface(theta, N, D)))
    errors = []
    for i in range(len(y)) if len(y) <= 60 else ():  # a refit for each point takes too long with more
        other = refit(np.arange(len(y)) != i)
        if other is not None:
            errors.append(abs(math.exp(laws.surface(other, N[i], D[i])) / y[i] - 1))
    law["leave_one_out"] = float(np.mean(errors)) if errors else None
    law["exponent_of_N"] = beta / (alpha + beta)
    flops = budget or 10 * 6 * float((N * D).max())
    params, tokens = laws.optimum(theta, flops)
    loss = math.exp(laws.surface(theta, params, tokens))
    return law | dict(budget=flops, best_params=params, best_tokens=tokens, best_loss=loss)


def format_intervals(law: dict, names) -> str:
    found = ((name, law["interval"][name]) for name in names)
    return ", ".join("{} {:.4g} to {:.4g}".format(name, *ends) if ends else law["E_note"] for name, ends in found)


def print_axis(axis: str, law: dict) -> None:
    label, indent = f"{AXIS_LABELS[axis]:<28}", " " * 28
    if "refused" in law:
        print(f"{label} none: {law['refused']}")
        return
    power, offset = law["power"], law["offset"]
    exponent = "exponent {:.3g} to {:.3g}".format(*power["interval"]["b"])
    fixed = ", ".join(f"{AXIS_LABELS[key]} {value:,.4g}" for key, value in law["fixed"].items() if key != "flops")
    print(f"{label} {laws.formula(power):<36} {power['r2']:>6.3f}   {exponent}" + (f", at {fixed}" if fixed else ""))
    if "refused" in offset:
        print(f"{indent} with an offset: none, {offset['refused']}")
    else:
        details = f"{format_intervals(offset, 'bc')}; leave-one-out error {offset['leave_one_out']:.2%}"
        print(f"{indent} {laws.formula(offset):<36} {offset['r2']:>6.3f}   {details}")
    if "warning" in offset:
        print(f"{indent} {offset['warning']}")


def print_params_and_tokens(law: dict) -> None:
    if "refused" in law:
        print(f"L = E + A/N^alpha + B/D^beta: none, {law['refused']}")
        return
    print("L = {E:.4g} + {A:.4g}/N^{alpha:.4g} + {B:.4g}/D^{beta:.4g}   R² {r2:.4f}".format(**law))
    if law["interval"]:
        print(f"  {format_intervals(law, law['interval'])}")
    if law["leave_one_out"] is not None:
        print(f"  mean leave-one-out error {law['leave_one_out']:.2%}")
    best = "{best_params:,.0f} parameters, {best_tokens:,.0f} tokens, loss {best_loss:.4f}".format(**law)
    print(f"  the best N grows as C^{law['exponent_of_N']:.3g}; the best use of {law['budget']:.3g} FLOPs: {best}")
    if "warning" in law:
        print(f"  {law['warning']}")


def print_isoflop(law: dict) -> None:
    for best in law["budgets"]:
        model = "the best model has {best_params:,.0f} parameters, loss {best_loss:.4f}".format(**best)
        print(f"IsoFLOP {best['flops']:.3g}: {model}")
    if "refused" in law:
        print(f"IsoFLOP: none, {law['refused']}")
        return
    interval = "95 % {:.3g} to {:.3g}".format(*law["interval"])
    print(
        f"IsoFLOP: best N = {law['factor']:.3g} C^{law['exponent_of_N']:.3g}, {interval}, {len(law['budgets'])} budgets"
    )
    for reason in law["left_out"]:
        print(f"IsoFLOP: left out: {reason}")


def main() -> None:
    check_scipy("fits")
    check_bounds(globals(), at_least_0="budget seed")
    if bootstrap < 20 or delta <= 0:
        raise UserError(f"--bootstrap={bootstrap} must be at least 20 and --delta={delta} above 0")
    if not all(isinstance(b, int | float) and b > 0 for b in budgets):
        raise UserError(f"--budgets={budgets}: a list of FLOPs above 0")
    points = select_kind(read_points(results))
    folder = make_folder(output_dir, results)
    rng = np.random.default_rng(seed)
    varied = [axis for axis in AXIS_LABELS if len({p[axis] for p in points if axis in p}) > 1]
    axes = {axis: fit_axis(points, axis, rng) for axis in varied}
    surface, isoflop = fit_params_and_tokens(points, rng), laws.fit_isoflop(points, budgets)
    print(f"{'loss against':<28} {'fit':<36} {'R²':>6}   95 % intervals")
    for axis, law in axes.items():
        print_axis(axis, law)
    print_params_and_tokens(surface)
    print_isoflop(isoflop)
    fits = {"points": len(points), "axes": axes, "params_and_tokens": surface, "isoflop": isoflop}
    atomic_write(folder / "scaling_laws.json", json.dumps(fits, indent=1))
    table = [{key: value for key, value in p.items() if key != "kind"} for p in points]  # all have the same kind
    if "theta" in surface:
        for row in table:
            row["predicted"] = math.exp(laws.surface(surface["theta"], row["params"], row["tokens"]))
            row["residual"] = row["loss"] - row["predicted"]
    write_csv(folder / "scaling_data.csv", table)
    files = ["scaling_laws.json", "scaling_data.csv"] + (draw_all(points, fits, folder) if pictures else [])
    print(f"{folder}/ has {', '.join(files)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
