"""Figures of runs and studies: loss curves, the arms compared, a grid as a heat map, and scores against loss.

    python research/plot.py --results=out/width                    a study: its arms compared, their curves, summary.csv
    python research/plot.py --results=out/quickstart,out/mine      loss curves of single runs
    python research/plot.py --results=out/width --x=flops          loss against steps, tokens, flops or seconds
    python research/plot.py --results=out/width/evaluation/evaluation_results.json --score=hellaswag_acc_norm

Several sources are separated by commas. Tables are written beside the figures, as CSV, Markdown and LaTeX.
"""

import re
from pathlib import Path

from figures import COLOURS, LOSS_LABEL, check_format, label_ends, ordered_colours, plt, set_log_scale
from points import is_number, table_rows
from runs import (
    check_scipy,
    higher_is_better,
    make_folder,
    print_effects,
    print_table,
    read_rows,
    same_conditions,
    save_figure,
    write_csv,
)
from tables import write_comparison, write_effects
from verdicts import compare_arms

from common.files import read_json, read_metrics
from configurator import UserError, check_choice, configure, short_errors

import numpy as np
from matplotlib import ticker

results = ""  # folders of runs or studies, or results.jsonl files, separated by commas
output_dir = ""  # folder for the figures; empty: the first of --results
x = "tokens"  # horizontal axis of the curves: steps | tokens | flops | seconds
metric = "final_val_loss"  # what is compared: a column of results.jsonl
curve = "val_loss"  # what the curves show: val_loss | train_loss
mixed = False  # draw a study's runs of different code, torch, device or dtype too
score = ""  # draw only this score of evaluate.py or train.py against the loss: hellaswag_acc_norm
figure_format = "png"  # png | pdf | svg, or several separated by commas; --format is the same
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


def draw_curves(rows: list[dict], path: Path) -> list[str]:
    """A line for each arm: the mean over its seeds, the range shaded. Returns the files: none if there is nothing to draw."""
    fig, axes = plt.subplots()
    names, ends = list(dict.fromkeys(row["arm"] for row in rows)), []
    colours = COLOURS if len(names) <= len(COLOURS) else ordered_colours(len(names))
    for arm, colour in zip(names, colours):
        curves = [read_curve(row, curve, x) for row in rows if row["arm"] == arm]
        if curves := [points for points in curves if points]:
            common = min(map(len, curves))
            points = np.array([points[:common] for points in curves])  # (runs, common, 2)
            (xs, means), losses = points.mean(0).T, points[..., 1]  # x is averaged too, because seconds differ
            axes.plot(xs, means, color=colour, linewidth=1.6, marker="o" if common < 3 else None)
            axes.fill_between(xs, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            ends.append((arm, xs[-1], means[-1], colour))
    if not axes.lines:
        return []
    axes.set(xlabel=X_LABELS[x], ylabel=LOSS_LABELS.get(curve, curve), title=title or path.parent.name)
    if x != "steps":
        set_log_scale(axes.xaxis)
    label_ends(axes, ends)
    return save_figure(fig, path, figure_format.split(","))


def draw_comparison(rows: list[dict], table: list[dict], path: Path) -> list[str]:
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
    for axes in panels[0]:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    if several:
        right.axvline(0, color="#333333", linewidth=0.8)
        right.set_xlabel(f"difference to: {first}\nintervals that all hold together in 95 % of studies")
    fig.suptitle(title or path.parent.name)
    return save_figure(fig, path, figure_format.split(","))


def draw_grid(table: list[dict], arm_keys: dict[str, dict], axes_of_grid: dict, path: Path) -> list[str]:
    """A heat map of a grid of two keys: the mean of each arm, and a line through the best value of the second key for each of the first."""
    (first, columns), (second, lines) = axes_of_grid.items()
    means = {entry["arm"]: entry["mean"] for entry in table}
    values = np.full((len(lines), len(columns)), np.nan)
    for arm, keys in arm_keys.items():
        values[lines.index(keys[second]), columns.index(keys[first])] = means.get(arm, np.nan)
    fig, axes = plt.subplots(figsize=(2.5 + 0.9 * len(columns), 1.5 + 0.55 * len(lines)))
    colours = np.log(values) if np.nanmin(values) > 0 else values  # a run that diverged does not hide the others
    higher = higher_is_better(metric)
    axes.imshow(colours, cmap="viridis" if higher else "viridis_r", aspect="auto", origin="lower")
    middle = (np.nanmin(colours) + np.nanmax(colours)) / 2
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = (colours[y, x] > middle) != higher
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if light else "black")
    best = np.nanargmax if higher else np.nanargmin
    track = [best(column) if np.isfinite(column).any() else np.nan for column in values.T]
    if all(isinstance(value, int | float) for value in columns):  # sizes, along which the best value moves
        axes.plot(range(len(columns)), track, "-", color="#D55E00", alpha=0.5)
    axes.plot(range(len(columns)), track, "s", color="#D55E00", markersize=32, fillstyle="none", markeredgewidth=1.6)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(lines)), lines)
    axes.grid(False)
    axes.set(xlabel=first, ylabel=second, title=f"{LOSS_LABELS.get(metric, metric)}\nthe best {second} is framed")
    return save_figure(fig, path, figure_format.split(","))


def draw_score() -> None:
    """A figure of the score against the loss, a point for each model, and their rank correlation. UserError below 3 models."""
    from scipy.stats import spearmanr

    points = []
    for source in filter(None, results.split(",")):
        is_file = source.endswith((".json", ".csv"))  # of evaluate.py
        loss = "loss" if is_file else "final_val_loss"
        rows = table_rows(Path(source)) if is_file else read_rows(source)
        points += [(row[loss], row[score]) for row in rows if is_number(row.get(loss)) and is_number(row.get(score))]
    if len(points) < 3:
        raise UserError(f"--score={score}: {len(points)} models with a loss and this score; a figure needs 3")
    losses, scores = np.array(points, float).T
    fig, axes = plt.subplots()
    axes.plot(losses, scores, "o")
    found = spearmanr(losses, scores)
    text = f"rank correlation {found.statistic:.2f} (p = {found.pvalue:.2g}), {len(points)} models"
    axes.set(xlabel=LOSS_LABEL, ylabel=score, title=title or text)
    folder = make_folder(output_dir, results)
    files = save_figure(fig, folder / f"{score}_against_loss", figure_format.split(","))
    print(f"{text}\n{folder}/ has {', '.join(files)}")


def main() -> None:
    check_choice("x", x, X_LABELS)
    check_scipy("figures")
    check_format(figure_format)
    if score:
        return draw_score()
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
        written += draw_comparison(rows, table, folder / "comparison")
        summary = read_json(Path(results) / "sweep_summary.json")
        grid, effects = summary.get("axes") or {}, summary.get("effects") or []
        if len(grid) == 2 and min(map(len, grid.values())) > 1:
            arm_keys = {row["arm"]: {key: row[key] for key in grid} for row in rows}
            written += draw_grid(table, arm_keys, grid, folder / "grid")
        if effects:
            written += write_effects(folder, effects)
        ends = ("interval_low", "interval_high")
        rows_of_csv = [entry | dict(zip(ends, entry.get("interval") or ())) for entry in table]
        write_csv(folder / "summary.csv", [{k: v for k, v in row.items() if k != "interval"} for row in rows_of_csv])
        written += ["summary.csv", *write_comparison(folder, table, metric)]
        print_table(table, metric)
        print_effects(effects)
    curves = draw_curves(rows, folder / f"curves_{x}")
    if not written + curves:
        raise UserError(f"--results={results}: no finished run and no {curve} there yet")
    if not curves:
        print(f"no curves: no run has logged {curve}")
    print(f"{folder}/ has {', '.join(written + curves)}")


if __name__ == "__main__":
    with short_errors():
        configure(globals(), aliases={"format": "figure_format"})
        main()
