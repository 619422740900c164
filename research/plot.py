"""Pictures of runs and studies: loss curves, comparison bars with every run as a point, and a table of their statistics.

    python research/plot.py --results=out/width                    a study: bars, its curves, summary.csv
    python research/plot.py --results=out/quickstart,out/mine      loss curves of single runs
    python research/plot.py --results=out/width --x=flops          by steps, tokens, flops or seconds

--results takes folders of runs or studies, or a study's results.jsonl, with commas between. Needs matplotlib
(pip install -e '.[research]').
"""

import csv
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure, short_errors  # noqa: E402

results = ""  # folders of runs or studies, or results.jsonl, with commas between
output_dir = ""  # where the pictures go; empty: the first of --results
x = "tokens"  # of the curves: steps | tokens | flops | seconds
metric = "final_val_loss"  # of the bars: a column of results.jsonl
curve = "val_loss"  # of the curves: val_loss | train_loss
title = ""  # over the pictures; empty: the study's name

# Okabe and Ito's palette, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/), darker ones first
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")
DASHES = ("-", "--", "-.", ":")
UNITS = {"steps": "step", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (s)"}
NAMES = {"val_loss": "validation loss (nats a token)", "train_loss": "training loss (nats a token)"}
NAMES |= {"final_val_loss": NAMES["val_loss"], "best_val_loss": "best validation loss (nats a token)"}


def figure(width=7.0, height=4.5, panels=(1, 1)):
    """matplotlib's pyplot, a figure and its axes, or an array of rows x columns of them. Raises ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install -e '.[research]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, every = plt.subplots(*panels, figsize=(width, height), layout="constrained", dpi=150, squeeze=False)
    for axes in every.flat:
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return plt, fig, axes if every.size == 1 else every


def short_number(v: float) -> str:
    """A tick's label: 200, 20k, 5M, 2e12."""
    if 1e3 < v < 1e9:
        return f"{v / 1e6:.3g}M" if v >= 1e6 else f"{v / 1e3:.3g}k"
    return f"{v:.3g}".replace("e+0", "e").replace("e+", "e")


def log_axis(axis, low: float, high: float) -> None:
    """An axis (axes.xaxis or axes.yaxis) in logarithms, with few labels and none on top of another."""
    from matplotlib import ticker

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(high / low) if high > low > 0 else 0
    subs = (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(ticker.MaxNLocator(5) if decades < 0.7 else ticker.LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: short_number(v)))


def find_rows(where: str) -> tuple[list[dict], Path]:
    """A row for each run named by --results, with "path" and "arm", and the first folder. Raises ValueError if there is none."""
    rows, first = [], None
    for part in filter(None, where.split(",")):
        path = Path(part)
        if path.is_dir() and (path / "results.jsonl").exists():
            path = path / "results.jsonl"
        if path.is_file() and path.suffix == ".jsonl":
            try:
                found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            except ValueError:
                raise ValueError(f"{path} is damaged: python research/sweep.py writes it anew") from None
            if any("path" not in row or "arm" not in row for row in found):
                raise ValueError(f"{path} is not a study's: its rows have no path and arm")
            folder = path.parent
        elif (path / "metrics.jsonl").exists():
            more = json.loads((path / "results.json").read_text()) if (path / "results.json").exists() else {}
            found, folder = [{"arm": path.name, "path": str(path), **more}], path
        else:
            raise ValueError(f"--results={part}: no run (metrics.jsonl) and no study (results.jsonl) there")
        rows += found
        first = first or folder
    if not rows:
        raise ValueError("--results= names nothing with a finished run: give folders of runs or studies")
    return rows, first


def read_curve(row: dict, key: str, by: str) -> list[tuple[float, float]]:
    """(x, loss) at each of a run's logged points that has the loss; flops and seconds are read off the steps beside them."""
    folder = Path(row["path"])
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder}/metrics.jsonl is gone: the curves need the runs' folders")
    points, seconds = [], 0.0
    if by == "flops" and not row.get("tokens"):
        raise ValueError(f"{folder} has no results.json yet, which tells its FLOPs: choose another --x")
    a_token = row["train_flops"] / row["tokens"] if row.get("tokens") else 0.0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True):
        if not line.endswith("\n"):  # the run died writing it
            continue
        entry = json.loads(line)
        seconds = entry.get("elapsed", seconds)
        if entry.get(key) is not None and entry["step"]:
            place = {
                "steps": entry["step"], "tokens": entry["tokens"], "flops": entry["tokens"] * a_token, "seconds": seconds
            }  # fmt: skip
            points.append((place[by], entry[key]))
    return points


def mean_curve(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) over the runs of an arm, at the points that all have; x is averaged (seconds differ)."""
    return [
        (sum(p[0] for p in at) / len(at), sum(p[1] for p in at) / len(at), min(p[1] for p in at), max(p[1] for p in at))
        for at in zip(*curves)
    ]


def draw_curves(rows: list[dict], path: Path) -> bool:
    """Loss against x: an arm a line, the mean of its seeds, shaded from the lowest to the highest.

    Where no run was evaluated twice there is no curve of that, and the training loss is drawn.
    """
    plt, fig, axes = figure()
    arms, key = list(dict.fromkeys(r["arm"] for r in rows)), curve
    if key == "val_loss" and all(len(read_curve(r, key, x)) < 2 for r in rows):
        key = "train_loss"
        print("curves of the training loss: the runs were evaluated once (--eval_interval)")
    every = []
    for n, arm in enumerate(arms):
        curves = [read_curve(r, key, x) for r in rows if r["arm"] == arm]
        points = mean_curve([c for c in curves if c])
        if not points:
            continue
        places, means, lows, highs = zip(*points)
        every += places
        style = dict(color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n // len(COLOURS) % len(DASHES)])
        axes.plot(places, means, label=arm, linewidth=1.6, marker="o" if len(points) < 3 else None, **style)
        axes.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    if every:
        axes.set_xlabel(UNITS[x])
        axes.set_ylabel(NAMES.get(key, key))
        axes.set_title(title or path.parent.name)
        if x != "steps":
            log_axis(axes.xaxis, min(every), max(every))
        axes.legend(frameon=False, fontsize=8)
        fig.savefig(path)
    plt.close(fig)
    return bool(every)


def statistics_of(rows: list[dict]) -> list[dict]:
    """n, mean, std, min, max of the metric for each arm, in the order of the runs."""
    table = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        values = [r[metric] for r in rows if r["arm"] == arm and r.get(metric) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            table.append(
                dict(arm=arm, n=len(values), mean=statistics.fmean(values), std=std, min=min(values), max=max(values))
            )
    return table


def draw_bars(rows: list[dict], table: list[dict], path: Path) -> None:
    """The mean of each arm, its standard deviation, and every run as a point; the axis does not begin at 0."""
    plt, fig, axes = figure(7.0, 1.4 + 0.38 * len(table))
    values = [r[metric] for r in rows if r.get(metric) is not None]
    low, high = min(values), max(values)
    room = 0.15 * (high - low) or 0.05 * abs(high) or 1
    begin = low - room if low < 0 else max(0.0, low - room)
    for n, entry in enumerate(table):
        axes.barh(n, entry["mean"] - begin, left=begin, height=0.62, color="#56B4E9", alpha=0.55)
        if entry["std"] is not None:
            axes.errorbar(entry["mean"], n, xerr=entry["std"], color="#333333", capsize=3, linewidth=1.1)
        own = [r[metric] for r in rows if r["arm"] == entry["arm"] and r.get(metric) is not None]
        places = [n + 0.2 * (i - (len(own) - 1) / 2) / max(1, len(own) - 1) for i in range(len(own))]
        axes.plot(own, places, "o", color="#D55E00", markersize=4, markeredgecolor="white", markeredgewidth=0.5)
    axes.axvline(table[0]["mean"], color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(table)), [e["arm"] for e in table])
    axes.invert_yaxis()
    axes.set_xlim(begin, high + room)
    told = f"mean, standard deviation, every run; the axis begins at {begin:.3g}"
    fig.supxlabel(f"{NAMES.get(metric, metric)}\n{told}", fontsize=10)  # the axes may be narrow beside long names
    axes.set_title(title or path.parent.name)
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    if x not in UNITS:
        raise ValueError(f"--x={x}: choose one of {', '.join(UNITS)}")
    rows, first = find_rows(results)
    folder = Path(output_dir or first)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    table = statistics_of(rows)
    if not table and any("final_val_loss" in r for r in rows):
        raise ValueError(
            f"--metric={metric}: the runs have no such number, but {', '.join(k for k in rows[0] if isinstance(rows[0][k], float))}"
        )
    if table:
        draw_bars(rows, table, folder / "comparison.png")
        with open(folder / "summary.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ["arm", "n", "mean", "std", "min", "max"])
            writer.writeheader()
            writer.writerows(table)
        made += ["comparison.png", "summary.csv"]
        print(f"{metric:<40} {'n':>2} {'mean':>9} {'std':>8} {'min':>9} {'max':>9}")
        for e in table:
            std = f"{e['std']:.4f}" if e["std"] is not None else ""
            print(f"{e['arm']:<40} {e['n']:>2} {e['mean']:>9.4f} {std:>8} {e['min']:>9.4f} {e['max']:>9.4f}")
    if draw_curves(rows, folder / f"curves_{x}.png"):
        made.append(f"curves_{x}.png")
    else:
        print(f"no curves: none of the runs has logged {curve}")
    print(f"{folder}/ has {', '.join(made)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
