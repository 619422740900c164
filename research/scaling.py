"""Scaling laws: how the loss falls with width, depth, context, data, parameters and compute, and how to spend a budget.

    python research/scaling.py --results=out/scaling                    a study, or several separated by commas
    python research/scaling.py --results=points.csv --budget=1e19       a table: params, tokens (or flops), loss

Fits three laws with 95 % intervals, or says why the data cannot support them:
  by axis     L = a x^-b, and L = c + a x^-b
  N and D     L = E + A / N^alpha + B / D^beta, by the method of https://arxiv.org/abs/2203.15556, section 3.3
  IsoFLOP     the best N for each of several budgets, by parabolas in log N (section 3.2)
Writes scaling_laws.json, tables (.csv with residuals, .md, .tex) and figures. Needs scipy (pip install -e '.[research]').
"""

import json
import math
from pathlib import Path

import laws
from figures import AXIS_LABELS, check_format, draw_all
from points import describe_units, read_points
from runs import check_scipy, folder_of, make_folder, write_csv
from tables import write_laws

from common.files import atomic_write, read_json
from configurator import UserError, check_bounds, configure, short_errors

import numpy as np

# Data
results = ""  # folders of studies or runs, or tables (.csv, .tsv, .json, .jsonl), separated by commas
columns = ""  # columns of a table whose names are not known: loss:val,params:N
count = "all"  # what N counts in runs: all | non_embedding (without the tables of tokens and positions)
flops = "measured"  # measured (by train.py, or a table's column) | 6ND (6 per parameter and token)
nuisance: list = []  # keys that were tuned for each size: the best value of each size counts; a study may say so itself
mixed = False  # fit runs of different code, torch, device or dtype too
# Fits
budget = 0.0  # FLOPs to spend (6 per parameter and token) in the best way; 0: ten times the largest run's
budgets: list = []  # FLOPs of the IsoFLOP budgets: [6e18,1e19]; empty: where the runs lie densely
bootstrap = 200  # bootstrap samples for the intervals of L(N, D) and of the law of FLOPs
delta = 1e-3  # of the Huber loss: residuals of log loss above it count linearly
seed = 0  # seed of the bootstrap
check = ""  # later runs or studies: compare their losses with what was predicted before (by scaling_laws.json), without a new fit
# Output
output_dir = ""  # folder for the fits and figures; empty: the first of --results
pictures = True  # draw the figures
figure_format = "png"  # png | pdf | svg, or several separated by commas; --format is the same

# What may change along an axis besides itself: a wider model has more parameters. Everything else must be equal.
CHANGES_WITH = {
    "n_embd": {"params", "flops"}, "n_layer": {"params", "flops"}, "params": {"flops", "n_embd", "n_layer"},
    "block_size": {"params", "flops"}, "data_fraction": {"tokens", "flops"}, "tokens": {"flops", "data_fraction"},
}  # fmt: skip


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
    x, y = laws.columns(points, axis, "loss")
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
    N, D, y = laws.columns(points, "params", "tokens", "loss")
    if reason := laws.why_not_surface(N, D, y):
        return {"refused": reason}
    theta = laws.fit_surface(N, D, y, delta)
    alpha, beta = theta[3:].tolist()
    if min(alpha, beta) < 1e-6:
        return {"refused": f"the loss does not fall with {'params' if alpha < beta else 'tokens'}: exponent 0"}
    law = laws.coefficients(theta) | {"points": len(y), "interval": None, "theta": theta.tolist()}

    def refit(chosen: np.ndarray) -> np.ndarray | None:
        if laws.why_not_surface(N[chosen], D[chosen], y[chosen]):
            return None
        return laws.fit_surface(N[chosen], D[chosen], y[chosen], delta, theta)

    refits = [refit(rng.integers(len(y), size=len(y))) for _ in range(bootstrap)]
    law["samples"] = [sample.tolist() for sample in refits if sample is not None]
    law["residuals"] = (np.log(y) - laws.surface(theta, N, D)).tolist()
    samples = [laws.coefficients(sample) for sample in law["samples"]]
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
    law["leave_one_out"] = leave_one_out(N, D, y, refit)
    law["exponent_of_N"] = beta / (alpha + beta)
    spend = budget or 10 * 6 * float((N * D).max())
    params, tokens = laws.optimum(theta, spend)
    loss = math.exp(laws.surface(theta, params, tokens))
    return law | dict(budget=spend, best_params=params, best_tokens=tokens, best_loss=loss)


def leave_one_out(N, D, y, refit) -> float | None:
    """Mean relative error of the loss at each (N, D), all its seeds together, predicted from the others by refit(chosen)."""
    errors, cells = [], np.unique(np.stack((N, D), axis=1), axis=0)
    for n, d in cells if len(cells) <= 60 else ():  # a refit for each takes too long with more
        out = (N == n) & (D == d)
        theta = refit(~out)
        if theta is not None:
            errors += list(abs(np.exp(laws.surface(theta, N[out], D[out])) / y[out] - 1))
    return float(np.mean(errors)) if errors else None


def format_intervals(law: dict, names) -> str:
    found = ((name, law["interval"][name]) for name in names)
    found = ((name, ends and [0.0 if abs(end) < 1e-6 else end for end in ends]) for name, ends in found)
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
    ratio = law["best_tokens"] / law["best_params"]
    best = "{best_params:,.0f} parameters, {best_tokens:,.0f} tokens".format(**law)
    best += f" ({ratio:.3g} per parameter), loss {law['best_loss']:.4f}"
    print(f"  the best N grows as C^{law['exponent_of_N']:.3g}; the best use of {law['budget']:.3g} FLOPs: {best}")
    if "warning" in law:
        print(f"  {law['warning']}")


def print_isoflop(law: dict) -> None:
    for best in law["budgets"]:
        ratio = best["best_tokens"] / best["best_params"]
        model = f"{best['best_params']:,.0f} parameters, {ratio:.3g} tokens per parameter, loss {best['best_loss']:.4f}"
        print(f"IsoFLOP {best['flops']:.3g}: the best model has {model}")
    if "refused" in law:
        print(f"IsoFLOP: none, {law['refused']}")
        return
    trend = "best N = {factor:.3g} C^{exponent_of_N:.3g}".format(**law)
    print(f"IsoFLOP: {trend}, 95 % {law['interval'][0]:.3g} to {law['interval'][1]:.3g}, {len(law['budgets'])} budgets")
    for reason in law["left_out"]:
        print(f"IsoFLOP: left out: {reason}")


def main() -> None:
    check_scipy("fits")
    check_bounds(globals(), at_least_0="budget seed")
    if bootstrap < 20 or delta <= 0:
        raise UserError(f"--bootstrap={bootstrap} must be at least 20 and --delta={delta} above 0")
    if not all(isinstance(b, int | float) and b > 0 for b in budgets):
        raise UserError(f"--budgets={budgets}: a list of FLOPs above 0")
    check_format(figure_format)
    if check:
        return check_prediction(folder_of(output_dir, results))
    points = read_points(results, columns, count, flops, nuisance, mixed)
    folder = make_folder(output_dir, results)
    rng = np.random.default_rng(seed)
    varied = [axis for axis in AXIS_LABELS if len({p[axis] for p in points if axis in p}) > 1]
    axes = {axis: fit_axis(points, axis, rng) for axis in varied}
    surface, isoflop = fit_params_and_tokens(points, rng), laws.fit_isoflop(points, budgets)
    units = describe_units(points, count, flops)
    print(f"{len(points)} runs; {units}")
    print(f"{'loss against':<28} {'fit':<36} {'R²':>6}   95 % intervals")
    for axis, law in axes.items():
        print_axis(axis, law)
    print_params_and_tokens(surface)
    print_isoflop(isoflop)
    fits = {"points": len(points), "count": count, "flops": flops, "units": units}
    fits |= {"axes": axes, "params_and_tokens": surface, "isoflop": isoflop}
    atomic_write(folder / "scaling_laws.json", json.dumps(fits, indent=1))
    write_csv(folder / "scaling_data.csv", with_residuals(points, fits))
    files = ["scaling_laws.json", "scaling_data.csv", *write_laws(folder, fits)]
    files += draw_all(points, fits, folder, figure_format.split(",")) if pictures else []
    print(f"{folder}/ has {', '.join(files)}")


def check_prediction(folder: Path) -> None:
    """Print for each later run its loss, and what the law that was fitted before predicts, with a 95 % interval."""
    fits = read_json(folder / "scaling_laws.json")
    law = fits.get("params_and_tokens", {})
    if not law.get("samples"):
        raise UserError(f"--check={check}: {folder}/scaling_laws.json has no law of N and D; run without --check first")
    rng = np.random.default_rng(seed)
    for point in read_points(check, columns, fits["count"], fits["flops"], nuisance, mixed):
        N, D, loss = point["params"], point["tokens"], point["loss"]
        predicted = math.exp(laws.surface(law["theta"], N, D))
        logs = [laws.surface(theta, N, D) for theta in law["samples"]]
        low, high = np.exp(np.quantile(logs + rng.choice(law["residuals"], len(logs)), (0.025, 0.975)))
        where = "inside" if low <= loss <= high else "outside"
        size = f"{N:,.0f} parameters, {D:,.0f} tokens"
        print(f"{size}: predicted {predicted:.4f} (95 % {low:.4f} to {high:.4f}), measured {loss:.4f}: {where}")


def with_residuals(points: list[dict], fits: dict) -> list[dict]:
    """The points as rows of a table, with what L(N, D) and the law of each axis predict for them, and the residuals."""
    rows = {id(p): {key: value for key, value in p.items() if key not in ("kind", "nuisance")} for p in points}
    for point in points:
        rows[id(point)] |= point.get("nuisance", {})
        if theta := fits["params_and_tokens"].get("theta"):
            predicted = math.exp(laws.surface(theta, point["params"], point["tokens"]))
            rows[id(point)] |= {"predicted": predicted, "residual": point["loss"] - predicted}
    for axis, law in fits["axes"].items():
        best = law.get("offset", {})
        if best := best if "c" in best else law.get("power"):
            for point in points_along(points, axis):
                predicted = float(laws.power_law(point[axis], best["a"], best["b"], best.get("c", 0.0)))
                rows[id(point)] |= {f"predicted_by_{axis}": predicted, f"residual_by_{axis}": point["loss"] - predicted}
    return list(rows.values())


if __name__ == "__main__":
    with short_errors():
        configure(globals(), aliases={"format": "figure_format"})
        main()
