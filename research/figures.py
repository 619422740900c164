"""Figures: the style of all of them, and those of scaling.py."""

import math
from pathlib import Path

from laws import columns, formula, frontier, power_law, surface
from runs import save_figure

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
    """A label for a tick: 200, 20k, 5M, 2e12."""
    if 1e3 < value < 1e9:
        return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def set_log_scale(axis) -> None:
    """Make axes.xaxis or axes.yaxis logarithmic, with few labels that do not overlap."""
    low, high = axis.get_data_interval()
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(high / low) if high > low > 0 else 0
    subs = (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(ticker.MaxNLocator(5) if decades < 0.7 else ticker.LogLocator(subs=subs, numticks=12))
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


def draw_all(points: list[dict], fits: dict, folder: Path) -> list[str]:
    """Draw every law that was fitted. Returns the names of the files."""
    fitted = {axis: law for axis, law in fits["axes"].items() if "refused" not in law}
    drawings = {f"scaling_{axis}.png": (draw_axis, axis, law) for axis, law in fitted.items()}
    if "refused" not in fits["params_and_tokens"]:
        drawings["params_and_tokens.png"] = (draw_surface, points, fits["params_and_tokens"]["theta"])
        drawings["residuals.png"] = (draw_residuals, points, fits["params_and_tokens"]["theta"])
    if budgets := fits["isoflop"]["budgets"]:
        drawings["isoflop.png"] = (draw_isoflop, budgets)
    drawings["efficiency.png"] = (draw_efficiency, points)
    for name, (draw, *arguments) in drawings.items():
        fig, axes = plt.subplots()
        draw(axes, *arguments)
        save_figure(fig, folder / name)
    return list(drawings)


def finish(axes, x_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=LOSS_LABEL)
    set_log_scale(axes.xaxis)
    set_log_scale(axes.yaxis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_axis(axes, axis: str, law: dict) -> None:
    """The runs, both power laws, and the interval of the exponent, turned around the middle of the runs."""
    x, power = np.array(law["x"]), law["power"]
    axes.plot(x, law["loss"], "o", color="C1", label="runs", zorder=3)
    line = np.geomspace(x.min(), x.max() * (x.max() / x.min()) ** 0.15, 100)
    for fit, style in ((power, "C0-"), (law["offset"], "C2--")):
        if "refused" not in fit:
            label = f"{formula(fit)}, R² {fit['r2']:.3f}"
            axes.plot(line, power_law(line, fit["a"], fit["b"], fit.get("c", 0.0)), style, label=label)
    middle = math.exp(np.log(x).mean())
    band = [power_law(line / middle, power_law(middle, power["a"], power["b"]), b) for b in power["interval"]["b"]]
    label = "95 % interval of the exponent"
    axes.fill_between(line, *band, label=label, color="C0", alpha=0.15, linewidth=0)
    finish(axes, AXIS_LABELS[axis])


def draw_surface(axes, points: list[dict], theta) -> None:
    """Loss against parameters: the fit at each number of tokens, or at six of them, and the runs nearest to it."""
    N, D, loss = columns(points, "params", "tokens", "loss")
    levels = np.unique(D) if len(np.unique(D)) <= 6 else np.geomspace(D.min(), D.max(), 6)
    nearest = abs(np.log(levels)[:, None] - np.log(D)).argmin(0)  # (n_points,)
    sizes = np.geomspace(N.min(), N.max(), 100)
    ends = []
    for n, tokens in enumerate(levels):
        axes.plot(N[nearest == n], loss[nearest == n], "o", color=f"C{n}", markersize=4)
        line = np.exp(surface(theta, sizes, tokens))
        axes.plot(sizes, line, color=f"C{n}")
        ends.append((f"{short_number(tokens)} tokens", sizes[-1], line[-1], f"C{n}"))
    finish(axes, AXIS_LABELS["params"])
    label_ends(axes, ends)


def draw_residuals(axes, points: list[dict], theta) -> None:
    N, D, loss = columns(points, "params", "tokens", "loss")
    predicted = np.exp(surface(theta, N, D))
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.plot(predicted, 100 * (loss / predicted - 1), "o", color="C1")
    axes.set(xlabel=f"predicted {LOSS_LABEL}", ylabel="measured relative to predicted (%)")


def draw_isoflop(axes, budgets: list[dict]) -> None:
    ends = []
    for n, budget in enumerate(budgets):
        N, loss = np.array(budget["params"]), np.array(budget["loss"])
        sizes = np.geomspace(N.min(), N.max(), 100)
        axes.plot(N, loss, "o", color=f"C{n}", markersize=4)
        line = np.polyval(budget["coefficients"], np.log(sizes))
        axes.plot(sizes, line, color=f"C{n}")
        ends.append((f"{short_number(budget['flops'])} FLOPs", sizes[-1], line[-1], f"C{n}"))
        axes.plot(budget["best_params"], budget["best_loss"], "*", color=f"C{n}", markersize=12)
    finish(axes, AXIS_LABELS["params"])
    label_ends(axes, ends)


def draw_efficiency(axes, points: list[dict]) -> None:
    """Loss against training FLOPs: a line for each model size, and the frontier."""
    sizes, ends = np.unique([point["params"] for point in points]), []
    for n, size in enumerate(sizes):
        runs = sorted((point["flops"], point["loss"]) for point in points if point["params"] == size)
        axes.plot(*zip(*runs), "o-", color=f"C{n}", linewidth=0.8, markersize=4)
        ends.append((f"{short_number(size)} parameters", *runs[-1], f"C{n}"))
    axes.plot(*columns(frontier(points), "flops", "loss"), "k:", label="frontier")
    finish(axes, AXIS_LABELS["flops"])
    if len(ends) <= 30:  # more labels do not fit
        label_ends(axes, ends)
