"""Figures of runs and studies: loss curves, and the arms compared.

    python research/plot.py --results=out/width                    a study: its arms compared, their curves, summary.csv
    python research/plot.py --results=out/quickstart,out/mine      loss curves of single runs
    python research/plot.py --results=out/width --x=flops          loss against steps, tokens, flops or seconds

Several sources are separated by commas.
"""

import re
from pathlib import Path

from figures import COLOURS, LOSS_LABEL, label_ends, plt, set_log_scale
from runs import check_scipy, make_folder, print_table, read_rows, same_conditions, save_figure, write_csv
from verdicts import compare_arms

from common.files import read_metrics
from configurator import UserError, check_choice, configure, short_errors

import numpy as np

results = ""  # folders of runs or studies, or results.jsonl files, separated by commas
output_dir = ""  # folder for the figures; empty: the first of --results
x = "tokens"  # horizontal axis of the curves: steps | tokens | flops | seconds
metric = "final_val_loss"  # what is compared: a column of results.jsonl
curve = "val_loss"  # what the curves show: val_loss | train_loss
mixed = False  # draw a study's runs of different code, torch, device or dtype too
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
    ends = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        curves = [read_curve(row, curve, x) for row in rows if row["arm"] == arm]
        if curves := [points for points in curves if points]:
            common = min(map(len, curves))
            points = np.array([points[:common] for points in curves])  # (runs, common, 2)
            (xs, means), losses = points.mean(0).T, points[..., 1]  # x is averaged too, because seconds differ
            (line,) = axes.plot(xs, means, linewidth=1.6, marker="o" if common < 3 else None)
            axes.fill_between(xs, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
            ends.append((arm, xs[-1], means[-1], line.get_color()))
    if not axes.lines:
        return False
    axes.set(xlabel=X_LABELS[x], ylabel=LOSS_LABELS.get(curve, curve), title=title or path.parent.name)
    if x != "steps":
        set_log_scale(axes.xaxis)
    label_ends(axes, ends)
    save_figure(fig, path)
    return True


def draw_comparison(rows: list[dict], table: list[dict], path: Path) -> None:
    """Left every run and the mean of its arm; right, with several arms, the differences to the first one with intervals."""
    several, first = any("verdict" in entry for entry in table), table[0]["arm"]
    fig, panels = plt.subplots(
        1, 1 + several, figsize=(7 + 3 * several, 1.4 + 0.34 * len(table)), sharey=True, squeeze=False
    )
    left, right = panels[0, 0], panels[0, -1]
    for n, entry in enumerate(table):
        values = [row[metric] for row in rows if row["arm"] == entry["arm"] and row.get(metric) is not None]
        left.plot(values, [n] * len(values), "o", color="C0", markersize=5, alpha=0.7, markeredgewidth=0)
        left.plot(entry["mean"], n, "|", color="#333333", markersize=13, markeredgewidth=1.6)
        if "verdict" in entry:
            word = re.match("better|worse|not told apart", entry["verdict"]).group()
            colour = {"better": "#009E73", "worse": "#D55E00"}.get(word, "#777777")
            right.plot(entry["interval"], [n, n], color=colour, linewidth=2)
            right.plot(entry["difference"], n, "o", color=colour, markersize=5)
            place = dict(xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour)
            right.annotate(word, (1.02, n), annotation_clip=False, **place)
    left.set_yticks(range(len(table)), [entry["arm"] for entry in table])
    left.set_ylim(len(table) - 0.5, -0.5)
    left.set_xlabel(f"{LOSS_LABELS.get(metric, metric)}\na dot is a run, a line the mean")
    if several:
        right.axvline(0, color="#333333", linewidth=0.8)
        right.set_xlabel(f"difference to: {first}\nintervals that all hold together in 95 % of studies")
    fig.suptitle(title or path.parent.name)
    save_figure(fig, path)


def main() -> None:
    check_choice("x", x, X_LABELS)
    check_scipy("figures")
    rows = read_rows(results)
    if not mixed and all(Path(source, "results.jsonl").is_file() for source in filter(None, results.split(","))):
        rows = same_conditions(rows, "--mixed=True draws them too")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    table = compare_arms(rows, metric, arms)
    if not any("=" in arm for arm in arms):  # an ablation: the first arm, then from the lowest to the highest
        table = table[:1] + sorted(table[1:], key=lambda entry: entry["mean"])
    folder = make_folder(output_dir, results)
    written = []
    if table:
        draw_comparison(rows, table, folder / "comparison.png")
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
