"""Figures of runs and studies: loss curves, and bars that compare the arms.

    python research/plot.py --results=out/width                    a study: bars and curves of its arms, summary.csv
    python research/plot.py --results=out/quickstart,out/mine      loss curves of single runs
    python research/plot.py --results=out/width --x=flops          loss against steps, tokens, flops or seconds

Several sources are separated by commas.
"""

from pathlib import Path

import numpy as np
from figures import COLOURS, LOSS_LABEL, plt, set_log_scale
from runs import arm_statistics, make_folder, print_table, read_rows, save_figure, write_csv

from common.files import read_metrics
from configurator import UserError, check_choice, configure, short_errors

results = ""  # folders of runs or studies, or results.jsonl files, separated by commas
output_dir = ""  # folder for the figures; empty: the first of --results
x = "tokens"  # horizontal axis of the curves: steps | tokens | flops | seconds
metric = "final_val_loss"  # what the bars show: a column of results.jsonl
curve = "val_loss"  # what the curves show: val_loss | train_loss
title = ""  # title of the figures; empty: the name of the study

X_LABELS = {"steps": "step", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (s)"}
LOSS_LABELS = {
    "val_loss": LOSS_LABEL, "train_loss": "training loss (nats per token)",
    "final_val_loss": LOSS_LABEL, "best_val_loss": f"best {LOSS_LABEL}",
}  # fmt: skip


def read_curve(row: dict, loss_key: str, x_key: str) -> list[tuple[float, float]]:
    """(x, loss) for each entry of a run's metrics.jsonl that has the loss, except at step 0."""
    log = Path(row["path"]) / "metrics.jsonl"
    if not log.exists():
        raise UserError(f"{log} does not exist: the curves need the folders of the runs")
    if x_key == "flops" and not row.get("tokens"):
        raise UserError(f"--x=flops: {log.parent} has no results.json yet, which holds its FLOPs; choose another --x")
    flops_per_token = row["train_flops"] / row["tokens"] if row.get("tokens") else 0.0
    points, seconds = [], 0.0
    for entry in read_metrics(log.parent):
        seconds = entry.get("elapsed", seconds)  # only training entries have it
        step, tokens, loss = entry["step"], entry.get("tokens"), entry.get(loss_key)
        if step and type(tokens) is int and isinstance(loss, int | float):
            values = {"steps": step, "tokens": tokens, "flops": tokens * flops_per_token, "seconds": seconds}
            points.append((values[x_key], loss))
    return points


def draw_curves(rows: list[dict], path: Path) -> bool:
    """A line for each arm: the mean over its seeds, the range shaded. Returns False if there is nothing to draw."""
    fig, axes = plt.subplots()
    axes.set_prop_cycle(plt.cycler(linestyle=("-", "--", "-.", ":")) * plt.cycler(color=COLOURS))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        curves = [read_curve(row, curve, x) for row in rows if row["arm"] == arm]
        if curves := [points for points in curves if points]:
            common = min(map(len, curves))
            points = np.array([points[:common] for points in curves])  # (runs, common, 2)
            (xs, means), losses = points.mean(0).T, points[..., 1]  # x is averaged too, because seconds differ
            (line,) = axes.plot(xs, means, label=arm, linewidth=1.6, marker="o" if common < 3 else None)
            axes.fill_between(xs, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    if not axes.lines:
        return False
    axes.set(xlabel=X_LABELS[x], ylabel=LOSS_LABELS.get(curve, curve), title=title or path.parent.name)
    if x != "steps":
        set_log_scale(axes.xaxis)
    axes.legend()
    save_figure(fig, path)
    return True


def draw_bars(rows: list[dict], table: list[dict], path: Path) -> None:
    """A bar for the mean of each arm, its standard deviation, a dot for every run. The axis does not start at 0."""
    fig, axes = plt.subplots(figsize=(7.0, 1.4 + 0.38 * len(table)))
    low, high = min(entry["min"] for entry in table), max(entry["max"] for entry in table)
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1
    start = low - margin if low < 0 else max(0.0, low - margin)
    for n, entry in enumerate(table):
        axes.barh(n, entry["mean"] - start, left=start, height=0.62, color="#56B4E9", alpha=0.55)
        if entry["std"] is not None:
            axes.errorbar(entry["mean"], n, xerr=entry["std"], color="#333333", capsize=3, linewidth=1.1)
        values = [row[metric] for row in rows if row["arm"] == entry["arm"] and row.get(metric) is not None]
        heights = n + np.linspace(-0.15, 0.15, len(values) + 2)[1:-1]
        axes.plot(values, heights, "o", color="#D55E00", markersize=4, markeredgecolor="white", markeredgewidth=0.5)
    axes.axvline(table[0]["mean"], color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(table)), [entry["arm"] for entry in table])
    axes.invert_yaxis()
    axes.set(xlim=(start, high + margin), title=title or path.parent.name)
    explanation = f"mean, standard deviation, every run; the axis starts at {start:.3g}"
    # A label of the figure, because long arm names leave the axes too narrow for it.
    fig.supxlabel(f"{LOSS_LABELS.get(metric, metric)}\n{explanation}", fontsize=10)
    save_figure(fig, path)


def main() -> None:
    check_choice("x", x, X_LABELS)
    rows = read_rows(results)
    table = arm_statistics(rows, metric)
    folder = make_folder(output_dir, results)
    written = []
    if table:
        draw_bars(rows, table, folder / "comparison.png")
        write_csv(folder / "summary.csv", table)
        written += ["comparison.png", "summary.csv"]
        print_table(table, metric)
    if draw_curves(rows, folder / f"curves_{x}.png"):
        written.append(f"curves_{x}.png")
    else:
        print(f"no curves: no run has logged {curve}")
    print(f"{folder}/ has {', '.join(written)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
