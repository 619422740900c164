"""Scaling laws: how the loss falls with width, depth, context, data, parameters and compute, and how to spend a budget.

    python research/scaling.py --results=out/scaling                    a study, or several separated by commas
    python research/scaling.py --results=points.csv --budget=1e19       a CSV with columns params, tokens (or flops), loss

Fits three laws, or says why the data cannot support them. The first two have bootstrap intervals:
  by axis     L = a x^-b, and L = c + a x^-b
  N and D     L = E + A / N^alpha + B / D^beta, by the method of https://arxiv.org/abs/2203.15556, section 3.3 (appendix D.3)
  IsoFLOP     the best N for each of several budgets, by parabolas in log N (section 3.2)
Writes scaling_laws.json, scaling_data.csv (with residuals) and PNGs. Needs scipy (pip install -e '.[research]').
"""

import csv
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import laws  # noqa: E402
from runs import check_scipy, read_rows, write_csv  # noqa: E402
from scaling_figures import AXIS_LABELS, draw_all  # noqa: E402

from common.files import atomic_write  # noqa: E402
from configurator import UserError, configure, read_keys, short_errors  # noqa: E402

results = ""  # folders of studies or runs, or CSV files, separated by commas
output_dir = ""  # folder for the fits and figures; empty: the first of --results
budget = 0.0  # FLOPs to spend (6 per parameter and token) in the best way; 0: ten times the largest run's
bootstrap = 200  # bootstrap samples for the intervals
delta = 1e-3  # of the Huber loss: residuals of log loss above it count linearly
seed = 0  # seed of the bootstrap
pictures = True  # draw the figures

CSV_NAMES = {"parameters": "params", "model size": "params", "training tokens": "tokens", "training flop": "flops"}
# Keys that follow from the size of a model or the length of its training. Runs may differ in them within one fit.
SIZE_KEYS = set(
    "depth n_layer n_head n_kv_head n_embd mlp_hidden head_lr weight_decay block_size data_fraction batch_size "
    "gradient_accumulation_steps total_batch_tokens max_iters max_epochs max_flops max_minutes warmup_iters lr_decay_iters".split()
)
# What may change along an axis besides itself: a wider model has more parameters and FLOPs. Everything else must be equal.
CHANGES_WITH = {
    "n_embd": {"params", "flops"}, "n_layer": {"params", "flops"}, "block_size": {"params", "flops"},
    "data_fraction": {"tokens", "flops"}, "tokens": {"flops", "data_fraction"}, "params": {"flops", "n_embd", "n_layer"},
}  # fmt: skip


# -----------------------------------------------------------------------------
# Reading


def read_points(sources: str) -> tuple[list[dict], Path]:
    """Points with params, tokens, flops and loss, and for runs their kind and sizes; and the folder of the first source."""
    points, folders = [], []
    for source in filter(None, sources.split(",")):
        if source.endswith(".csv"):
            points += read_csv(Path(source))
            folders.append(Path(source).parent)
        else:
            rows, folder = read_rows(source)
            points += [run_to_point(row) for row in rows if row.get("final_val_loss") is not None]
            folders.append(folder)
    points = [p for p in points if math.isfinite(p["loss"])]
    if not points:
        raise UserError(f"--results={sources}: no finished run there")
    return points, folders[0]


def run_to_point(row: dict) -> dict:
    config = json.loads((Path(row["path"]) / "config.json").read_text(encoding="utf-8"))
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
    """The points that differ only in sizes and lengths. If there are several kinds, the most frequent one, which is printed."""
    kinds: dict[str, list[dict]] = {}
    for point in points:
        kinds.setdefault(point.get("kind", ""), []).append(point)
    kind, selected = max(kinds.items(), key=lambda item: len(item[1]))
    if len(kinds) > 1:
        common = set.intersection(*(set(other.split(", ")) for other in kinds))
        distinctive = ", ".join(pair for pair in kind.split(", ") if pair not in common)
        print(f"{len(kinds)} kinds of runs: the fits use the {len(selected)} with {distinctive}")
    return selected


def read_csv(path: Path) -> list[dict]:
    """Points of a CSV: loss, and two of params, tokens and flops = 6 params tokens. CSV_NAMES are other names of columns."""
    points = []
    with open(path, newline="", encoding="utf-8") as f:
        for number, row in enumerate(csv.DictReader(f), 2):
            row = {str(column).strip().lower(): text for column, text in row.items()}
            row = {CSV_NAMES.get(column, column): text for column, text in row.items() if text}
            try:
                point = {column: float(row[column]) for column in ("loss", *AXIS_LABELS) if column in row}
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
    if not points:
        raise UserError(f"{path}: no points; it has only a header")
    return points


# -----------------------------------------------------------------------------
# Fits


def points_along(points: list[dict], axis: str) -> list[dict]:
    """The points for a law along one axis: they differ in the axis and in what changes with it, and in nothing else.

    Of several such sets, the one with the most values of the axis; of equals, the one trained longest.
    """
    if axis == "flops":
        return laws.frontier(points)
    fixed = [key for key in AXIS_LABELS if key != axis and key not in CHANGES_WITH[axis]]
    sets: dict[tuple, list[dict]] = {}
    for point in points:
        if axis in point:
            sets.setdefault(tuple(point.get(key) for key in fixed), []).append(point)

    def extent(group: list[dict]) -> tuple:
        return len({p[axis] for p in group}), len(group), sum(p["tokens"] for p in group)

    return max(sets.values(), key=extent, default=[])


def fit_axis(points: list[dict], axis: str, rng: np.random.Generator) -> dict:
    """The fits along an axis, or {"refused": why}."""
    points = points_along(points, axis)
    x, y = (np.array([p[key] for p in points], float) for key in (axis, "loss"))
    if reason := laws.why_not_axis(x, y):
        return {"refused": reason}
    power = fit_with_intervals(laws.fit_power, "ab", x, y, rng)
    fixed = {key: points[0][key] for key in AXIS_LABELS if key in points[0] and len({p.get(key) for p in points}) == 1}
    law = dict(points=len(x), power=power, fixed=fixed, x=x.tolist(), loss=y.tolist())
    distinct = len(np.unique(x))
    if distinct < 4:
        return law | {"offset": {"refused": f"{distinct} different values, three coefficients need 4"}}
    offset = fit_with_intervals(laws.fit_offset, "abc", x, y, rng)
    offset["leave_one_out"] = laws.leave_one_out(x, y)
    low, high = offset["interval"]["c"]
    if high - low > 0.5 * y.min():
        offset["warning"] = "the offset is very uncertain: its interval is wider than half the lowest loss"
    return law | {"offset": offset}


def fit_with_intervals(fit, names: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> dict:
    """The coefficients of a power law, their intervals from a bootstrap of the residuals of log loss, and R².

    The residuals are widened by sqrt(n / (n - coefficients)), because a fit to few points leaves them too small.
    """
    found = fit(x, y)
    predicted = laws.power_law(x, *found)
    residuals = np.log(y / predicted)
    residuals = (residuals - residuals.mean()) * math.sqrt(len(y) / (len(y) - len(names)))
    samples = [fit(x, predicted * np.exp(rng.choice(residuals, len(y)))) for _ in range(bootstrap)]
    return dict(zip(names, found)) | dict(interval=intervals(samples, names), r2=laws.r_squared(y, predicted))


def intervals(samples, names) -> dict[str, list[float]]:
    """The 95 % interval of each column of the bootstrap samples."""
    low, high = np.quantile(np.array(samples, float), (0.025, 0.975), axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(names, low, high)}


def fit_params_and_tokens(points: list[dict], rng: np.random.Generator) -> dict:
    """L(N, D), its intervals, how well it predicts runs it has not seen, and the best use of the budget; or why not."""
    N, D, y = (np.array([p[key] for p in points], float) for key in ("params", "tokens", "loss"))
    if reason := laws.why_not_surface(N, D):
        return {"refused": reason}
    theta = laws.fit_surface(N, D, y, laws.grid_of_starts(y), delta)
    if min(theta[3:]) < 1e-6:
        return {"refused": f"the loss does not fall with {'params' if theta[3] < theta[4] else 'tokens'}: exponent 0"}

    def refit(i) -> np.ndarray | None:
        """theta of the points with these indices, None if they cannot support a law."""
        if laws.why_not_surface(N[i], D[i]):
            return None
        return laws.fit_surface(N[i], D[i], y[i], [laws.to_scaled(theta, N[i], D[i])], delta)

    samples = [refit(rng.integers(len(y), size=len(y))) for _ in range(bootstrap)]
    samples = [sample for sample in samples if sample is not None]
    law = laws.coefficients(theta) | {"points": len(y), "interval": None, "theta": theta.tolist()}
    if len(samples) > 20:
        natural = [laws.coefficients(sample) for sample in samples]
        law["interval"] = intervals([list(each.values()) for each in natural], natural[0])
        exponents = {name: law["interval"][name] for name in ("alpha", "beta")}
        if uncertain := [name for name, (low, high) in exponents.items() if high > 4 * max(low, 1e-9)]:
            law["warning"] = f"{' and '.join(uncertain)} very uncertain: add runs over a wider range"
    law["r2"] = laws.r_squared(y, np.exp(laws.surface(theta, N, D)))
    errors = []
    for i in range(len(y)) if len(y) <= 60 else ():  # a refit for each point takes too long with more
        other = refit(np.arange(len(y)) != i)
        if other is not None:
            errors.append(abs(math.exp(laws.surface(other, N[i], D[i])) / y[i] - 1))
    law["leave_one_out"] = float(np.mean(errors)) if errors else None
    law["exponent_of_N"] = float(theta[4] / (theta[3] + theta[4]))
    flops = budget or 10 * 6 * float((N * D).max())
    params, tokens = laws.optimum(theta, flops)
    loss = float(np.exp(laws.surface(theta, params, tokens)))
    law |= dict(budget=flops, best_params=params, best_tokens=tokens, best_loss=loss)
    if optima := [laws.optimum(sample, flops) for sample in samples if min(sample[3:]) > 1e-6]:
        law["best_interval"] = intervals(optima, ("params", "tokens"))
    return law


# -----------------------------------------------------------------------------
# Output


def format_intervals(law: dict, names) -> str:
    return ", ".join("{} {:.4g} to {:.4g}".format(name, *law["interval"][name]) for name in names)


def print_axis(axis: str, law: dict) -> None:
    label = AXIS_LABELS[axis]
    if "refused" in law:
        print(f"{label:<28} none: {law['refused']}")
        return
    power, offset = law["power"], law["offset"]
    low, high = power["interval"]["b"]
    formula = f"{power['a']:.4g} x^-{power['b']:.4g}"
    fixed = ", ".join(f"{AXIS_LABELS[key]} {value:,.4g}" for key, value in law["fixed"].items() if key != "flops")
    print(
        f"{label:<28} {formula:<36} {power['r2']:>6.3f}   exponent {low:.3g} to {high:.3g}{fixed and f', at {fixed}'}"
    )
    if "refused" in offset:
        print(f"{'':<28} with an offset: none, {offset['refused']}")
        return
    formula = f"{offset['c']:.4g} + {offset['a']:.4g} x^-{offset['b']:.4g}"
    error = f"leave-one-out error {offset['leave_one_out']:.2%}"
    print(f"{'':<28} {formula:<36} {offset['r2']:>6.3f}   {format_intervals(offset, 'bc')}; {error}")
    if "warning" in offset:
        print(f"{'':<28} {offset['warning']}")


def print_params_and_tokens(law: dict) -> None:
    if "refused" in law:
        print(f"L = E + A/N^alpha + B/D^beta: none, {law['refused']}")
        return
    formula = "L = {E:.4g} + {A:.4g}/N^{alpha:.4g} + {B:.4g}/D^{beta:.4g}   R² {r2:.4f}"
    print(formula.format(**law))
    if law["interval"]:
        print(f"  {format_intervals(law, law['interval'])}")
    if law["leave_one_out"] is not None:
        print(f"  mean leave-one-out error {law['leave_one_out']:.2%}")
    best = "{best_params:,.0f} parameters, {best_tokens:,.0f} tokens, loss {best_loss:.4f}".format(**law)
    print(f"  the best N grows as C^{law['exponent_of_N']:.3g}; the best use of {law['budget']:.3g} FLOPs: {best}")
    if "warning" in law:
        print(f"  {law['warning']}")


def print_isoflop(law: dict) -> None:
    for curve in law["budgets"]:
        print(
            "IsoFLOP {flops:.3g}: the best model has {best_params:,.0f} parameters, loss {best_loss:.4f}".format(
                **curve
            )
        )
    trend = "none, {refused}" if "refused" in law else "best N = {factor:.3g} C^{exponent_of_N:.3g}"
    print("IsoFLOP: " + trend.format(**law))


def main() -> None:
    check_scipy("fits")
    if bootstrap < 20 or delta <= 0 or budget < 0:
        raise UserError("--bootstrap must be at least 20, --delta above 0, --budget at least 0")
    points, first_folder = read_points(results)
    points = select_kind(points)
    folder = Path(output_dir or first_folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    varied = [axis for axis in AXIS_LABELS if len({p[axis] for p in points if axis in p}) > 1]
    fits = {
        "points": len(points),
        "axes": {axis: fit_axis(points, axis, rng) for axis in varied},
        "params_and_tokens": fit_params_and_tokens(points, rng),
        "isoflop": laws.fit_isoflop(points),
    }
    print(f"{'loss against':<28} {'fit':<36} {'R²':>6}   95 % intervals")
    for axis, law in fits["axes"].items():
        print_axis(axis, law)
    print_params_and_tokens(fits["params_and_tokens"])
    print_isoflop(fits["isoflop"])
    atomic_write(folder / "scaling_laws.json", json.dumps(fits, indent=1))
    table = [{key: value for key, value in p.items() if key != "kind"} for p in points]  # all have the same kind
    if theta := fits["params_and_tokens"].get("theta"):
        for row in table:
            row["predicted"] = float(np.exp(laws.surface(theta, row["params"], row["tokens"])))
            row["residual"] = row["loss"] - row["predicted"]
    write_csv(folder / "scaling_data.csv", table)
    files = ["scaling_laws.json", "scaling_data.csv"] + (draw_all(points, fits, folder) if pictures else [])
    print(f"{folder}/ has {', '.join(files)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
