"""Figures of runs and studies: loss curves, and bars that compare the arms.

    python research/plot.py --results=out/width                    a study: bars and curves of its arms, summary.csv
    python research/plot.py --results=out/quickstart,out/mine      loss curves of single runs
    python research/plot.py --results=out/width --x=flops          loss against steps, tokens, flops or seconds

--results takes folders of runs or studies, or results.jsonl files of studies, separated by commas.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from figures import COLOURS, DASHES, colour, new_figure, save_figure, set_log_scale  # noqa: E402
from runs import arm_statistics, check_metric, print_statistics, read_rows, write_csv  # noqa: E402

from configurator import UserError, check_choice, configure, short_errors  # noqa: E402

results = ""  # folders of runs or studies, or results.jsonl files, separated by commas
output_dir = ""  # folder for the figures; empty: the first of --results
x = "tokens"  # horizontal axis of the curves: steps | tokens | flops | seconds
metric = "final_val_loss"  # what the bars show: a column of results.jsonl
curve = "val_loss"  # what the curves show: val_loss | train_loss
title = ""  # title of the figures; empty: the name of the study

AXIS_LABELS = {
    "steps": "step", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (s)",
    "val_loss": "validation loss (nats per token)", "train_loss": "training loss (nats per token)",
    "final_val_loss": "validation loss (nats per token)", "best_val_loss": "best validation loss (nats per token)",
}  # fmt: skip
X_CHOICES = ("steps", "tokens", "flops", "seconds")


def read_curve(row: dict, loss_key: str, x_key: str) -> list[tuple[float, float]]:
    """(x, loss) for each entry of a run's metrics.jsonl that has the loss, except at step 0."""
    log = Path(row["path"]) / "metrics.jsonl"
    if not log.exists():
        raise UserError(f"{log} does not exist: the curves need the folders of the runs")
    if x_key == "flops" and not row.get("tokens"):
        raise UserError(f"--x=flops: {log.parent} has no results.json yet, which holds its FLOPs; choose another --x")
    flops_per_token = row["train_flops"] / row["tokens"] if row.get("tokens") else 0.0
    points, seconds = [], 0.0
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):  # the run was killed while it wrote this line
            continue
        entry = json.loads(line)
        seconds = entry.get("elapsed", seconds)  # only training entries have it
        if entry.get(loss_key) is not None and entry["step"]:
            step, tokens = entry["step"], entry["tokens"]
            values = {"steps": step, "tokens": tokens, "flops": tokens * flops_per_token, "seconds": seconds}
            points.append((values[x_key], entry[loss_key]))
    return points


def average_curves(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """(mean x, mean loss, lowest, highest) at each point that all curves have. x is averaged because seconds differ."""
    return [
        (statistics.fmean(xs), statistics.fmean(losses), min(losses), max(losses))
        for xs, losses in (zip(*points) for points in zip(*curves))
    ]


def draw_curves(rows: list[dict], path: Path) -> bool:
    """One line for each arm: the mean over its seeds, with the range shaded. Returns False if there is nothing to draw.

    If no run was evaluated twice, the training loss is drawn instead of the validation loss.
    """
    loss_key = curve
    if curve == "val_loss" and all(len(read_curve(row, curve, x)) < 2 for row in rows):
        loss_key = "train_loss"
        print("the curves show the training loss: the runs were evaluated only once (--eval_interval)")
    fig, axes = new_figure()
    for n, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        curves = [read_curve(row, loss_key, x) for row in rows if row["arm"] == arm]
        if points := average_curves([c for c in curves if c]):
            xs, means, lows, highs = zip(*points)
            dashes, marker = DASHES[n // len(COLOURS) % len(DASHES)], "o" if len(points) < 3 else None
            axes.plot(xs, means, label=arm, linewidth=1.6, color=colour(n), linestyle=dashes, marker=marker)
            axes.fill_between(xs, lows, highs, color=colour(n), alpha=0.15, linewidth=0)
    if not axes.lines:
        return False
    axes.set(xlabel=AXIS_LABELS[x], ylabel=AXIS_LABELS.get(loss_key, loss_key), title=title or path.parent.name)
    if x != "steps":
        set_log_scale(axes.xaxis, *axes.dataLim.intervalx)
    axes.legend(frameon=False, fontsize=8)
    save_figure(fig, path)
    return True


def draw_bars(rows: list[dict], table: list[dict], path: Path) -> None:
    """A bar for the mean of each arm, with its standard deviation and a dot for every run. The axis does not start at 0."""
    fig, axes = new_figure(7.0, 1.4 + 0.38 * len(table))
    low, high = min(entry["min"] for entry in table), max(entry["max"] for entry in table)
    margin = 0.15 * (high - low) or 0.05 * abs(high) or 1
    start = low - margin if low < 0 else max(0.0, low - margin)
    for n, entry in enumerate(table):
        axes.barh(n, entry["mean"] - start, left=start, height=0.62, color="#56B4E9", alpha=0.55)
        if entry["std"] is not None:
            axes.errorbar(entry["mean"], n, xerr=entry["std"], color="#333333", capsize=3, linewidth=1.1)
        values = [row[metric] for row in rows if row["arm"] == entry["arm"] and row.get(metric) is not None]
        heights = [n + 0.2 * (i - (len(values) - 1) / 2) / max(1, len(values) - 1) for i in range(len(values))]
        axes.plot(values, heights, "o", color="#D55E00", markersize=4, markeredgecolor="white", markeredgewidth=0.5)
    axes.axvline(table[0]["mean"], color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(table)), [entry["arm"] for entry in table])
    axes.invert_yaxis()
    axes.set(xlim=(start, high + margin), title=title or path.parent.name)
    explanation = f"mean, standard deviation, every run; the axis starts at {start:.3g}"
    # A label of the figure, because long arm names leave the axes too narrow for it.
    fig.supxlabel(f"{AXIS_LABELS.get(metric, metric)}\n{explanation}", fontsize=10)
    save_figure(fig, path)


def main() -> None:
    check_choice("x", x, X_CHOICES)
    rows, first_folder = read_rows(results)
    check_metric(rows, metric)
    folder = Path(output_dir or first_folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if table := arm_statistics(rows, metric):
        draw_bars(rows, table, folder / "comparison.png")
        write_csv(folder / "summary.csv", table)
        written += ["comparison.png", "summary.csv"]
        print_statistics(table, metric)
    if draw_curves(rows, folder / f"curves_{x}.png"):
        written.append(f"curves_{x}.png")
    else:
        print(f"no curves: no run has logged {curve}")
    print(f"{folder}/ has {', '.join(written)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
