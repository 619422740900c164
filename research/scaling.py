"""Scaling laws: how loss falls with width, depth, context, data, parameters and compute, and what a budget should buy.

    python research/scaling.py --results=out/scaling                    a study, or several with commas between
    python research/scaling.py --results=points.csv --budget=1e19       columns params, tokens (or flops), loss

Fits, or a word on why the data cannot carry them; by axis and for N and D with bootstrap intervals:
  by axis     L = a x^-b, and L = c + a x^-b
  N and D     L = E + A / N^alpha + B / D^beta, by the method of https://arxiv.org/abs/2203.15556, section 3.3 (appendix D.3)
  IsoFLOP     the best N for each of several budgets, by parabolas in log N (section 3.2)
Leaves scaling_laws.json, scaling_data.csv (with residuals) and PNGs. Needs scipy and matplotlib (pip install -e '.[research]').
"""

import csv
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
from laws import (  # noqa: E402
    fit_isoflop,
    fit_offset,
    fit_power,
    fit_surface,
    grid_of_starts,
    leave_one_out,
    natural,
    optimum,
    r_squared,
    scaled,
    surface,
    why_not_axis,
    why_not_surface,
)

from configurator import configure, short_errors  # noqa: E402

results = ""  # folders of studies or runs, or CSV files, with commas between
output_dir = ""  # where the fits and pictures go; empty: the first of --results
budget = 0.0  # FLOPs to spend, 6 a parameter and token: what is best for them; 0: ten times the largest run's
bootstrap = 200  # resamplings for the intervals
delta = 1e-3  # of Huber's loss: residuals of log loss beyond it count linearly
seed = 0  # of the resamplings
pictures = True  # draw

AXES = {
    "n_embd": "width", "n_layer": "depth", "block_size": "context (tokens)", "data_fraction": "fraction of the data",
    "tokens": "training tokens", "params": "parameters", "flops": "training FLOPs",
}  # fmt: skip
COLUMNS = {"parameters": "params", "model size": "params", "training tokens": "tokens", "training flop": "flops"}
KIND = "dataset optimizer schedule norm mlp pos qk_norm init tie_weights dropout label_smoothing learning_rate".split()
LABEL = "validation loss (nats a token)"


# -----------------------------------------------------------------------------
# Reading


def read_points(where: str) -> tuple[list[dict], Path]:
    """Points with params, tokens, flops and loss (and the keys of their runs), and the folder of the first source."""
    points, first = [], None
    for part in filter(None, where.split(",")):
        path = Path(part)
        if path.suffix == ".csv":
            points += read_csv(path)
            folder = path.parent
        else:
            found = [path] if path.suffix == ".jsonl" else sorted(path.glob("results.jsonl")) if path.is_dir() else []
            runs = sorted(path.rglob("results.json")) if path.is_dir() and not found else []
            if not found and not runs:
                raise ValueError(f"--results={part}: no results.jsonl of a study, no run's results.json, no CSV")
            for file in found:
                try:
                    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                    points += [of_row(row, json.loads((Path(row["path"]) / "config.json").read_text())) for row in rows]
                except (ValueError, KeyError) as e:
                    raise ValueError(
                        f"{file}, or a config.json it names, is not a study's: {type(e).__name__} {e}"
                    ) from None
            for file in runs:
                config = json.loads((file.parent / "config.json").read_text())
                points.append(of_row(json.loads(file.read_text()), config))
            folder = path if path.is_dir() else path.parent
        first = first or folder
    points = [p for p in points if p["loss"] is not None and math.isfinite(p["loss"])]
    if not points:
        raise ValueError(f"--results={where}: no finished run")
    return points, first


def of_row(row: dict, config: dict) -> dict:
    """A run's results and config as a point."""
    keys = {k: config[k] for k in ("n_embd", "n_layer", "block_size", "data_fraction", "seed")}
    keys["kind"] = ", ".join(f"{k}={config[k]}" for k in KIND if k in config)
    params = row.get("params") or row["model_parameters"]
    point = dict(params=params, tokens=row["tokens"], flops=row["train_flops"], loss=row["final_val_loss"])
    return {**keys, **{k: None if v is None else float(v) for k, v in point.items()}}


def read_csv(path: Path) -> list[dict]:
    """Points of a CSV: loss, and two of params, tokens and flops (flops = 6 params tokens), also by their names in COLUMNS."""
    points = []
    with open(path, newline="", encoding="utf-8") as f:
        for number, row in enumerate(csv.DictReader(f), 2):
            known = {}
            for k, v in row.items():
                name = COLUMNS.get((k or "").strip().lower(), (k or "").strip().lower())
                if name in ("loss", *AXES) and v not in (None, ""):
                    try:
                        known[name] = float(v)
                    except ValueError:
                        raise ValueError(f"{path}, line {number}: {k} is {v!r}, not a number") from None
            if "loss" not in known or len(known.keys() & {"params", "tokens", "flops"}) < 2:
                raise ValueError(f"{path}, line {number}: a point has loss and two of params, tokens, flops")
            if min(known.values()) <= 0:
                raise ValueError(f"{path}, line {number}: all numbers are above 0")
            if "tokens" not in known:
                known["tokens"] = known["flops"] / (6 * known["params"])
            if "params" not in known:
                known["params"] = known["flops"] / (6 * known["tokens"])
            known.setdefault("flops", 6 * known["params"] * known["tokens"])
            points.append(known)
    if not points:
        raise ValueError(f"{path}: no line with a point")
    return points


def of_one_kind(points: list[dict]) -> list[dict]:
    """The points that differ in sizes and lengths alone; of several kinds the one with most of them, and it says so."""
    kinds: dict[str, list] = {}
    for p in points:
        kinds.setdefault(p.get("kind", ""), []).append(p)
    most = max(kinds.values(), key=len)
    if len(kinds) > 1:
        print(f"{len(kinds)} kinds of runs: the fits take the {len(most)} with {most[0]['kind']}")
    return most


# -----------------------------------------------------------------------------
# By axis


def groups_along(points: list[dict], axis: str) -> list[dict]:
    """The largest set of points that differ along the axis and not in what can be set beside it; of equals the longest trained."""
    if axis == "flops":  # the frontier: what a run of this size or less reached at best
        best, kept = math.inf, []
        for p in sorted(points, key=lambda p: (p["flops"], p["loss"])):
            if p["loss"] < best:
                best = p["loss"]
                kept.append(p)
        return kept
    follows = {"n_embd": {"params", "flops"}, "n_layer": {"params", "flops"}, "data_fraction": {"tokens", "flops"}}
    follows |= {
        "tokens": {"flops", "data_fraction"},
        "params": {"flops", "n_embd", "n_layer"},
        "block_size": {"flops", "params"},
    }
    others = [a for a in AXES if a != axis and a not in follows[axis]]
    sets: dict[tuple, list[dict]] = {}
    for p in points:
        if axis in p:
            sets.setdefault(tuple(p.get(a) for a in others), []).append(p)
    return max(
        sets.values(), key=lambda s: (len({p[axis] for p in s}), len(s), sum(p["tokens"] for p in s)), default=[]
    )


def fit_axis(points: list[dict], axis: str, dice) -> dict:
    """The fits along an axis, or {"refused": why}."""
    found = groups_along(points, axis)
    x, y = (np.array([p[k] for p in found], float) for k in (axis, "loss"))
    if reason := why_not_axis(x, y):
        return {"refused": reason}
    a, b = fit_power(x, y)
    draws = [fit_power(x, other) for other in redrawn(y, a * x**-b, 2, dice)]
    fixed = {k: found[0][k] for k in AXES if k != axis and len({p.get(k) for p in found}) == 1 and k in found[0]}
    told = dict(
        points=len(x), power=dict(a=a, b=b, interval=quantiles(draws, "ab"), r2=r_squared(y, a * x**-b)), fixed=fixed,
        x=x.tolist(), loss=y.tolist(),
    )  # fmt: skip
    if len(np.unique(x)) < 4:
        told["offset"] = {"refused": f"{len(np.unique(x))} different values, three coefficients need 4"}
        return told
    a, b, c = fit_offset(x, y)
    draws = [fit_offset(x, other) for other in redrawn(y, c + a * x**-b, 3, dice)]
    spread = quantiles(draws, "abc")
    told["offset"] = dict(a=a, b=b, c=c, interval=spread, r2=r_squared(y, c + a * x**-b))
    told["offset"]["leave_one_out"] = leave_one_out(x, y)
    if spread["c"][1] - spread["c"][0] > 0.5 * y.min():
        told["offset"]["warning"] = "the offset is hardly known: its interval is wider than half the lowest loss"
    return told


def redrawn(y: np.ndarray, predicted: np.ndarray, coefficients: int, dice):
    """Losses as they might have come out: the fit's, with its residuals (of log loss, widened by the degrees of freedom) dealt anew."""
    residuals = np.log(y / predicted)
    residuals = (residuals - residuals.mean()) * math.sqrt(len(y) / (len(y) - coefficients))
    for _ in range(bootstrap):
        yield predicted * np.exp(dice.choice(residuals, len(y)))


def quantiles(draws, names) -> dict[str, list[float]]:
    """95 % intervals of each column."""
    low, high = np.quantile(np.array(draws, float), (0.025, 0.975), axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(names, low, high)}


# -----------------------------------------------------------------------------
# N and D


def fit_both(points: list[dict], dice) -> dict:
    """L(N, D), its intervals, how well it predicts what it has not seen, and the best use of a budget; or why not."""
    N, D, y = (np.array([p[k] for p in points], float) for k in ("params", "tokens", "loss"))
    if reason := why_not_surface(N, D):
        return {"refused": reason}
    theta = fit_surface(N, D, y, grid_of_starts(y), delta)
    if min(theta[3:]) < 1e-6:
        return {"refused": f"the loss does not fall with {'params' if theta[3] < theta[4] else 'tokens'}: exponent 0"}
    draws = []
    for _ in range(bootstrap):
        i = dice.integers(len(y), size=len(y))
        if not why_not_surface(N[i], D[i]):
            draws.append(fit_surface(N[i], D[i], y[i], [scaled(theta, N[i], D[i])], delta))
    names = ("E", "A", "B", "alpha", "beta")
    spread = quantiles([list(natural(t).values()) for t in draws], names) if len(draws) > 20 else None
    predicted = np.exp(surface(theta, N, D))
    errors = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        if len(y) <= 60 and not why_not_surface(N[rest], D[rest]):
            t = fit_surface(N[rest], D[rest], y[rest], [scaled(theta, N[rest], D[rest])], delta)
            errors.append(abs(math.exp(surface(t, N[i], D[i])) / y[i] - 1))
    flops = budget or 10 * 6 * float((N * D).max())
    usable = [t for t in draws if min(t[3:]) > 1e-6]
    best = optimum(theta, flops)
    told = natural(theta) | dict(
        points=len(y), interval=spread, r2=r_squared(y, predicted), leave_one_out=float(np.mean(errors)) if errors else None,
        exponent_of_N=float(theta[4] / (theta[3] + theta[4])),
        budget=flops, best_params=best[0], best_tokens=best[1], best_loss=float(np.exp(surface(theta, *best))),
    )  # fmt: skip
    if usable:
        told |= {"best_interval": quantiles([optimum(t, flops) for t in usable], ("params", "tokens"))}
    doubtful = [n for n in ("alpha", "beta") if spread and spread[n][1] > 4 * max(spread[n][0], 1e-9)]
    if doubtful:
        told["warning"] = f"{' and '.join(doubtful)} hardly known: more runs, over a wider range"
    told["theta"] = list(map(float, theta))
    return told


# -----------------------------------------------------------------------------
# Pictures


def draw(points: list[dict], laws: dict, folder: Path) -> list[str]:
    """A log-log scatter for each fitted axis, the surface with its residuals, IsoFLOP curves, loss against compute."""
    from plot import COLOURS, figure, log_axis, short_number

    made = []

    def save(plt, fig, axes, name: str, x: str, log=True) -> None:
        axes.set_xlabel(x)
        axes.set_ylabel(LABEL)
        log_axis(axes.xaxis, *axes.dataLim.intervalx)
        if log:
            log_axis(axes.yaxis, *axes.dataLim.intervaly)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        fig.savefig(folder / name)
        plt.close(fig)
        made.append(name)

    for axis, law in laws["axes"].items():
        if "refused" in law:
            continue
        plt, fig, axes = figure()
        x, y = np.array(law["x"]), np.array(law["loss"])
        line = np.geomspace(x.min(), x.max() * (x.max() / x.min()) ** 0.15, 100)
        a, b = law["power"]["a"], law["power"]["b"]
        axes.plot(x, y, "o", color=COLOURS[1], label="runs", zorder=3)
        axes.plot(line, a * line**-b, color=COLOURS[0], label=f"{a:.3g} x^-{b:.3g}, R² {law['power']['r2']:.3f}")
        bs = law["power"]["interval"]["b"]
        middle = np.exp(np.log(x).mean())
        band = [a * middle**-b * (line / middle) ** -slope for slope in bs]
        axes.fill_between(
            line,
            np.minimum(*band),
            np.maximum(*band),
            color=COLOURS[0],
            alpha=0.15,
            linewidth=0,
            label="95 % of the slope",
        )
        offset = law.get("offset", {})
        if "a" in offset:
            a, b, c = (offset[k] for k in "abc")
            axes.plot(
                line,
                c + a * line**-b,
                "--",
                color=COLOURS[2],
                label=f"{c:.3g} + {a:.3g} x^-{b:.3g}, R² {offset['r2']:.3f}",
            )
        save(plt, fig, axes, f"scaling_{axis}.png", AXES[axis])
    both = laws["params_and_tokens"]
    if "refused" not in both:
        plt, fig, axes = figure()
        tokens = np.array([p["tokens"] for p in points])
        levels = np.unique(tokens) if len(np.unique(tokens)) <= 6 else np.geomspace(tokens.min(), tokens.max(), 6)
        sizes = np.geomspace(min(p["params"] for p in points), max(p["params"] for p in points), 100)
        for n, d in enumerate(levels):
            colour = COLOURS[n % len(COLOURS)]
            own = [p for p in points if levels[np.argmin(abs(np.log(levels) - np.log(p["tokens"])))] == d]
            axes.plot([p["params"] for p in own], [p["loss"] for p in own], "o", color=colour, markersize=4)
            axes.plot(
                sizes,
                np.exp(surface(both["theta"], sizes, np.full_like(sizes, d))),
                color=colour,
                label=f"{short_number(d)} tokens",
            )
        save(plt, fig, axes, "params_and_tokens.png", AXES["params"])
        plt, fig, axes = figure()
        predicted = np.exp([surface(both["theta"], p["params"], p["tokens"]) for p in points])
        measured = np.array([p["loss"] for p in points])
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.plot(predicted, 100 * (measured / predicted - 1), "o", color=COLOURS[1])
        axes.set_xlabel("predicted " + LABEL)
        axes.set_ylabel("measured against predicted (%)")
        fig.savefig(folder / "residuals.png")
        plt.close(fig)
        made.append("residuals.png")
    if laws["isoflop"]["budgets"]:
        plt, fig, axes = figure()
        for n, curve in enumerate(laws["isoflop"]["budgets"]):
            colour = COLOURS[n % len(COLOURS)]
            own = [p for p in points if abs(p["flops"] / curve["flops"] - 1) <= 0.1]
            x = np.geomspace(min(p["params"] for p in own), max(p["params"] for p in own), 100)
            axes.plot([p["params"] for p in own], [p["loss"] for p in own], "o", color=colour, markersize=4)
            label = None if n % (1 + len(laws["isoflop"]["budgets"]) // 9) else f"{short_number(curve['flops'])} FLOPs"
            axes.plot(x, np.polyval(curve["coefficients"], np.log(x)), color=colour, label=label)
            axes.plot(curve["best_params"], curve["best_loss"], "*", color=colour, markersize=12)
        save(plt, fig, axes, "isoflop.png", AXES["params"], log=False)
    plt, fig, axes = figure()
    by_size: dict[float, list] = {}
    for p in points:
        by_size.setdefault(p["params"], []).append((p["flops"], p["loss"]))
    for n, (size, found) in enumerate(sorted(by_size.items())):
        found.sort()
        label = f"{short_number(size)} parameters" if len(by_size) <= 10 else None
        axes.plot(*zip(*found), "o-", color=COLOURS[n % len(COLOURS)], linewidth=0.8, markersize=4, label=label)
    frontier = groups_along(points, "flops")
    axes.plot([p["flops"] for p in frontier], [p["loss"] for p in frontier], "k:", label="the best so far")
    save(plt, fig, axes, "efficiency.png", AXES["flops"])
    return made


# -----------------------------------------------------------------------------


def tell(laws: dict) -> None:
    """The console's table."""
    print(f"{'L against':<28} {'fit':<36} {'R²':>6}   95 % intervals")
    for axis, law in laws["axes"].items():
        if "refused" in law:
            print(f"{AXES[axis]:<28} none: {law['refused']}")
            continue
        power, offset = law["power"], law["offset"]
        b = power["interval"]["b"]
        words = f"{power['a']:.4g} x^-{power['b']:.4g}"
        at = ", ".join(f"{AXES[k]} {v:,.4g}" for k, v in law["fixed"].items() if k != "flops")
        print(
            f"{AXES[axis]:<28} {words:<36} {power['r2']:>6.3f}   exponent {b[0]:.3g} to {b[1]:.3g}{f', at {at}' if at else ''}"
        )
        if "refused" in offset:
            print(f"{'':<28} with an offset: none, {offset['refused']}")
        else:
            words = f"{offset['c']:.4g} + {offset['a']:.4g} x^-{offset['b']:.4g}"
            spread = ", ".join(f"{k} {v[0]:.3g} to {v[1]:.3g}" for k, v in offset["interval"].items() if k != "a")
            print(
                f"{'':<28} {words:<36} {offset['r2']:>6.3f}   {spread}; left out, off by {offset['leave_one_out']:.2%}"
            )
            if "warning" in offset:
                print(f"{'':<28} {offset['warning']}")
    both = laws["params_and_tokens"]
    if "refused" in both:
        print(f"L = E + A/N^alpha + B/D^beta: none, {both['refused']}")
    else:
        print(
            f"L = {both['E']:.4g} + {both['A']:.4g}/N^{both['alpha']:.4g} + {both['B']:.4g}/D^{both['beta']:.4g}   R² {both['r2']:.4f}"
        )
        if both["interval"]:
            print("  " + ", ".join(f"{k} {v[0]:.4g} to {v[1]:.4g}" for k, v in both["interval"].items()))
        if both["leave_one_out"] is not None:
            print(f"  a run left out is predicted within {both['leave_one_out']:.2%} on average")
        print(
            f"  best N grows as C^{both['exponent_of_N']:.3g}; {both['budget']:.3g} FLOPs: {both['best_params']:,.0f} parameters, {both['best_tokens']:,.0f} tokens, loss {both['best_loss']:.4f}"
        )
        if "warning" in both:
            print(f"  {both['warning']}")
    iso = laws["isoflop"]
    for curve in iso["budgets"]:
        print(
            f"IsoFLOP {curve['flops']:.3g}: {curve['best_params']:,.0f} parameters are best, loss {curve['best_loss']:.4f}"
        )
    if "refused" in iso:
        print(f"IsoFLOP: none, {iso['refused']}")
    else:
        print(f"IsoFLOP: best N = {iso['factor']:.3g} C^{iso['exponent_of_N']:.3g}")


def main() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ImportError("fits need scipy: pip install -e '.[research]'") from None
    if bootstrap < 20 or delta <= 0 or budget < 0:
        raise ValueError("--bootstrap is at least 20, --delta above 0, --budget at least 0")
    points, first = read_points(results)
    points = of_one_kind(points)
    folder = Path(output_dir or first)
    folder.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(seed)
    axes = {a: fit_axis(points, a, dice) for a in AXES if len({p[a] for p in points if a in p}) > 1}
    laws = dict(points=len(points), axes=axes, params_and_tokens=fit_both(points, dice), isoflop=fit_isoflop(points))
    tell(laws)
    (folder / "scaling_laws.json").write_text(json.dumps(laws, indent=1), encoding="utf-8")
    columns = list(dict.fromkeys(k for p in points for k in p))
    both = laws["params_and_tokens"]
    with open(folder / "scaling_data.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [*columns, "predicted", "residual"])
        writer.writeheader()
        for p in points:
            told = {}
            if "refused" not in both:
                told["predicted"] = float(np.exp(surface(both["theta"], p["params"], p["tokens"])))
                told["residual"] = p["loss"] - told["predicted"]
            writer.writerow(p | told)
    made = ["scaling_laws.json", "scaling_data.csv"] + (draw(points, laws, folder) if pictures else [])
    print(f"{folder}/ has {', '.join(made)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
