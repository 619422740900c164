"""Figures: the style of all of them, and those of scaling.py."""

import math
import re
from pathlib import Path

from laws import columns, formula, frontier, power_law, surface
from runs import save_figure

from configurator import check_choice

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

# The palette of Okabe and Ito, for the colour-blind (https://jfly.uni-koeln.de/color/), dark colours first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")
STYLE = {
    "backend": "agg", "figure.figsize": (7.0, 4.5), "figure.dpi": 150, "figure.constrained_layout.use": True,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
    "axes.prop_cycle": plt.cycler(color=COLOURS),  # "C0" is the first of COLOURS
}  # fmt: skip
plt.rcParams.update(STYLE)
AXIS_LABELS = {
    "n_embd": "width", "n_layer": "depth", "block_size": "context (tokens)", "data_fraction": "fraction of the data",
    "tokens": "training tokens", "params": "parameters", "flops": "training FLOPs",
}  # fmt: skip
LOSS_LABEL = "validation loss (nats per token)"


def short_number(value: float) -> str:
    """A label for a tick: 200, 20k, 5M, 3B, 2e12."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1e12 and value > 1e3:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def set_log_scale(axis) -> None:
    """Make axes.xaxis or axes.yaxis logarithmic, with few labels that do not overlap."""
    low, high = axis.get_data_interval()
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(high / low) if high > low > 0 else 0
    subs = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 0.7 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(ticker.MaxNLocator(5) if decades < 0.2 else ticker.LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short_number(value)))


def label_ends(axes, ends: list[tuple]) -> None:
    """Name lines at their ends (text, x, y, colour), in place of a legend; labels that would overlap move apart."""
    from scipy.optimize import isotonic_regression

    ends = sorted(ends, key=lambda end: end[2])
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.autoscale_view()
    wanted = np.array([to_axes.transform((x, y))[1] for _, x, y, _ in ends])
    gap = 10 / (axes.bbox.height * 72 / axes.figure.dpi) * np.arange(len(ends))
    # In order, a text's height apart, within the axes, and nearest to the ends.
    places = np.clip(isotonic_regression(wanted - gap).x, 0, max(0, 1 - gap[-1])) + gap
    for (text, x, y, colour), place in zip(ends, places):
        line = dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkA=0, shrinkB=2, relpos=(0, 0.5))
        style = dict(va="center", fontsize=8, color=colour, arrowprops=line)
        axes.annotate(text, (x, y), (1.03, place), textcoords="axes fraction", **style)


def ordered_colours(n: int) -> list:
    """n different colours for n sizes, from small to large."""
    return [plt.cm.viridis(part) for part in np.linspace(0, 0.9, n)]


def check_format(formats: str) -> None:
    for name in formats.split(","):
        check_choice("figure_format", name, ("png", "pdf", "svg"))


def draw_all(points: list[dict], fits: dict, folder: Path, formats: list[str]) -> list[str]:
    """Draw every law that was fitted. Returns the names of the files."""
    fitted = {axis: law for axis, law in fits["axes"].items() if "refused" not in law}
    labels = dict(AXIS_LABELS)
    for key, unit in zip(("params", "flops"), re.findall(r": ([^;]*)", fits["units"])):
        labels[key] += f" ({unit})"
    drawings: dict[str, tuple] = {f"scaling_{axis}": (draw_axis, law, labels[axis]) for axis, law in fitted.items()}
    if "refused" not in fits["params_and_tokens"]:
        theta = fits["params_and_tokens"]["theta"]
        drawings["params_and_tokens"] = (draw_surface, points, theta, labels["params"])
        drawings["residuals"] = (draw_residuals, points, theta)
    if budgets := fits["isoflop"]["budgets"]:
        drawings["isoflop"] = (draw_isoflop, budgets, labels["params"])
        drawings["tokens_per_parameter"] = (draw_tokens_per_parameter, budgets, labels["flops"])
    drawings["efficiency"] = (draw_efficiency, points, labels["flops"])
    names = []
    for name, (draw, *arguments) in drawings.items():
        fig = draw(*arguments)
        names += save_figure(fig, folder / name, formats)
        plt.close(fig)
    return names


def finish(axes, x_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=LOSS_LABEL)
    set_log_scale(axes.xaxis)
    set_log_scale(axes.yaxis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_axis(law: dict, label: str):
    """Above the runs, both power laws, and the interval of the exponent, turned around the middle of the runs; below, the residuals."""
    fig, (axes, below) = plt.subplots(2, sharex=True, figsize=(7, 6), height_ratios=(3, 1))
    x, y, power = np.array(law["x"]), np.array(law["loss"]), law["power"]
    axes.plot(x, y, "o", color="C1", label="runs", zorder=3)
    line = np.geomspace(x.min(), x.max() * (x.max() / x.min()) ** 0.15, 100)
    for fit, colour, style, marker in ((power, "C0", "-", "o"), (law["offset"], "C2", "--", "s")):
        if "refused" not in fit:
            curve = dict(a=fit["a"], b=fit["b"], c=fit.get("c", 0.0))
            name = f"{formula(fit)}, R² {fit['r2']:.3f}"
            axes.plot(line, power_law(line, **curve), style, color=colour, label=name)
            below.plot(x, 100 * (y / power_law(x, **curve) - 1), marker, color=colour, markersize=4)
    middle = math.exp(np.log(x).mean())
    band = [power_law(line / middle, power_law(middle, power["a"], power["b"]), b) for b in power["interval"]["b"]]
    axes.fill_between(line, *band, label="95 % interval of the exponent", color="C0", alpha=0.15, linewidth=0)
    finish(axes, "")
    below.axhline(0, color="#333333", linewidth=0.8)
    below.set(xlabel=label, ylabel="residual (%)")
    return fig


def draw_surface(points: list[dict], theta, label: str):
    """Loss against parameters: the fit at numbers of tokens that the runs have, at most six, and the runs nearest to them."""
    fig, axes = plt.subplots()
    N, D, loss = columns(points, "params", "tokens", "loss")
    levels = np.unique(D.round(-int(np.log10(D.min())) + 2))  # runs of one length differ by less than a step
    if len(levels) > 6:
        levels = np.unique([D[abs(np.log(D / d)).argmin()] for d in np.geomspace(D.min(), D.max(), 6)])
    distance = abs(np.log(levels)[:, None] - np.log(D))  # (n_levels, n_points)
    sizes, ends = np.geomspace(N.min(), N.max(), 100), []
    between = distance.min(0) > math.log(1.25)
    axes.plot(N[between], loss[between], ".", color="#bbbbbb", markersize=4)
    for n, (tokens, colour) in enumerate(zip(levels, ordered_colours(len(levels)))):
        near = (distance.argmin(0) == n) & ~between
        axes.plot(N[near], loss[near], "o", color=colour, markersize=4)
        line = np.exp(surface(theta, sizes, tokens))
        axes.plot(sizes, line, color=colour)
        ends.append((f"{short_number(tokens)} tokens", sizes[-1], line[-1], colour))
    finish(axes, label)
    label_ends(axes, ends)
    return fig


def draw_residuals(points: list[dict], theta):
    fig, axes = plt.subplots()
    N, D, loss = columns(points, "params", "tokens", "loss")
    predicted = np.exp(surface(theta, N, D))
    axes.axhline(0, color="#333333", linewidth=0.8)
    shown = axes.scatter(predicted, 100 * (loss / predicted - 1), c=np.log10(N), cmap="viridis", s=18)
    axes.set(xlabel=f"predicted {LOSS_LABEL}", ylabel="measured relative to predicted (%)")
    bar = fig.colorbar(shown, label=AXIS_LABELS["params"])
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short_number(10**value)))
    return fig


def draw_isoflop(budgets: list[dict], label: str):
    """Loss against parameters at each budget: the parabola over the sizes it was fitted to; the other sizes are hollow."""
    fig, axes = plt.subplots()
    ends = []
    for budget, colour in zip(budgets, ordered_colours(len(budgets))):
        N, loss, used = (np.array(budget[key]) for key in ("params", "loss", "used"))
        sizes = np.geomspace(N[used].min(), N[used].max(), 100)
        axes.plot(N[used], loss[used], "o", color=colour, markersize=4)
        axes.plot(N[~used], loss[~used], "o", color=colour, markersize=4, fillstyle="none", alpha=0.6)
        line = np.polyval(budget["coefficients"], np.log(sizes))
        axes.plot(sizes, line, color=colour)
        ends.append((f"{budget['flops']:.2g} FLOPs".replace("e+", "e"), sizes[-1], line[-1], colour))
        axes.plot(budget["best_params"], budget["best_loss"], "*", color=colour, markersize=12)
    finish(axes, label)
    label_ends(axes, ends)
    return fig


def draw_tokens_per_parameter(budgets: list[dict], label: str):
    """Tokens per parameter of the best model of each budget."""
    fig, axes = plt.subplots()
    flops, params, tokens = columns(budgets, "flops", "best_params", "best_tokens")
    axes.plot(flops, tokens / params, "o-", linewidth=0.8)
    finish(axes, label)
    axes.set(ylabel="tokens per parameter of the best model")
    return fig


def draw_efficiency(points: list[dict], label: str):
    """Loss against training FLOPs: the runs, a line through the means of each model size, and the Pareto front."""
    fig, axes = plt.subplots()
    sizes, ends = np.unique([point["params"] for point in points]), []
    for size, colour in zip(sizes, ordered_colours(len(sizes))):
        runs = sorted((point["flops"], point["loss"]) for point in points if point["params"] == size)
        axes.plot(*zip(*runs), "o", color=colour, markersize=4)
        seeds: dict[str, list] = {}  # runs that differ in their seed, by their FLOPs
        for run in runs:
            seeds.setdefault(f"{run[0]:.2g}", []).append(run)
        means = [np.mean(group, axis=0) for group in seeds.values()]
        axes.plot(*zip(*means), color=colour, linewidth=0.8)
        ends.append((f"{short_number(size)} parameters", *means[-1], colour))
    front = columns(frontier(points), "flops", "loss")
    axes.plot(*front, "k:", label="Pareto front: no run with fewer FLOPs is better")
    finish(axes, label)
    if len(ends) <= 16:  # more labels do not fit
        label_ends(axes, ends)
    return fig
