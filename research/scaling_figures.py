"""The figures of scaling.py: a scatter with its fits for each axis, L(N, D) and its residuals, IsoFLOP curves, efficiency."""

import math
from pathlib import Path

import numpy as np
from figures import COLOURS, colour, new_figure, save_figure, set_log_scale, short_number
from laws import frontier, power_law, surface

AXIS_LABELS = {
    "n_embd": "width", "n_layer": "depth", "block_size": "context (tokens)", "data_fraction": "fraction of the data",
    "tokens": "training tokens", "params": "parameters", "flops": "training FLOPs",
}  # fmt: skip
LOSS_LABEL = "validation loss (nats per token)"


def draw_all(points: list[dict], fits: dict, folder: Path) -> list[str]:
    """Draw every law that was fitted. Returns the names of the files."""
    fitted = {axis: law for axis, law in fits["axes"].items() if "refused" not in law}
    figures = {f"scaling_{axis}.png": draw_axis(axis, law) for axis, law in fitted.items()}
    if "refused" not in fits["params_and_tokens"]:
        figures["params_and_tokens.png"] = draw_params_and_tokens(points, fits["params_and_tokens"])
        figures["residuals.png"] = draw_residuals(points, fits["params_and_tokens"])
    if fits["isoflop"]["budgets"]:
        figures["isoflop.png"] = draw_isoflop(points, fits["isoflop"]["budgets"])
    figures["efficiency.png"] = draw_efficiency(points)
    for name, fig in figures.items():
        save_figure(fig, folder / name)
    return list(figures)


def finish(axes, x_label: str, log_loss: bool = True) -> None:
    axes.set(xlabel=x_label, ylabel=LOSS_LABEL)
    set_log_scale(axes.xaxis, *axes.dataLim.intervalx)
    if log_loss:
        set_log_scale(axes.yaxis, *axes.dataLim.intervaly)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def values(points: list[dict], key: str) -> np.ndarray:
    return np.array([point[key] for point in points])


def draw_axis(axis: str, law: dict):
    fig, axes = new_figure()
    x, power, offset = np.array(law["x"]), law["power"], law["offset"]
    line = np.geomspace(x.min(), x.max() * (x.max() / x.min()) ** 0.15, 100)
    axes.plot(x, law["loss"], "o", color=COLOURS[1], label="runs", zorder=3)
    label = f"{power['a']:.3g} x^-{power['b']:.3g}, R² {power['r2']:.3f}"
    axes.plot(line, power_law(line, power["a"], power["b"]), color=COLOURS[0], label=label)
    middle = math.exp(np.log(x).mean())
    band = [power_law(line / middle, power_law(middle, power["a"], power["b"]), b) for b in power["interval"]["b"]]
    style = dict(color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.fill_between(line, np.minimum(*band), np.maximum(*band), label="95 % interval of the exponent", **style)
    if "refused" not in offset:
        label = f"{offset['c']:.3g} + {offset['a']:.3g} x^-{offset['b']:.3g}, R² {offset['r2']:.3f}"
        axes.plot(line, power_law(line, *(offset[name] for name in "abc")), "--", color=COLOURS[2], label=label)
    finish(axes, AXIS_LABELS[axis])
    return fig


def draw_params_and_tokens(points: list[dict], law: dict):
    """Loss against parameters: a curve of the fit at each number of tokens, or at six of them, and the runs nearest to it."""
    fig, axes = new_figure()
    N, D, loss = (values(points, key) for key in ("params", "tokens", "loss"))
    levels = np.unique(D) if len(np.unique(D)) <= 6 else np.geomspace(D.min(), D.max(), 6)
    nearest = abs(np.log(levels)[:, None] - np.log(D)).argmin(0)  # (n_points,)
    sizes = np.geomspace(N.min(), N.max(), 100)
    for n, tokens in enumerate(levels):
        axes.plot(N[nearest == n], loss[nearest == n], "o", color=colour(n), markersize=4)
        predicted = np.exp(surface(law["theta"], sizes, np.full_like(sizes, tokens)))
        axes.plot(sizes, predicted, color=colour(n), label=f"{short_number(tokens)} tokens")
    finish(axes, AXIS_LABELS["params"])
    return fig


def draw_residuals(points: list[dict], law: dict):
    fig, axes = new_figure()
    predicted = np.exp(surface(law["theta"], values(points, "params"), values(points, "tokens")))
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.plot(predicted, 100 * (values(points, "loss") / predicted - 1), "o", color=COLOURS[1])
    axes.set(xlabel=f"predicted {LOSS_LABEL}", ylabel="measured relative to predicted (%)")
    return fig


def draw_isoflop(points: list[dict], curves: list[dict]):
    fig, axes = new_figure()
    label_every = 1 + len(curves) // 9  # more than nine labels do not fit
    for n, curve in enumerate(curves):
        group = [point for point in points if abs(point["flops"] / curve["flops"] - 1) <= 0.1]
        N = values(group, "params")
        sizes = np.geomspace(N.min(), N.max(), 100)
        axes.plot(N, values(group, "loss"), "o", color=colour(n), markersize=4)
        label = None if n % label_every else f"{short_number(curve['flops'])} FLOPs"
        axes.plot(sizes, np.polyval(curve["coefficients"], np.log(sizes)), color=colour(n), label=label)
        axes.plot(curve["best_params"], curve["best_loss"], "*", color=colour(n), markersize=12)
    finish(axes, AXIS_LABELS["params"], log_loss=False)
    return fig


def draw_efficiency(points: list[dict]):
    """Loss against training FLOPs: a line for each model size, and the frontier."""
    fig, axes = new_figure()
    sizes = np.unique(values(points, "params"))
    for n, size in enumerate(sizes):
        runs = sorted((point["flops"], point["loss"]) for point in points if point["params"] == size)
        label = f"{short_number(size)} parameters" if len(sizes) <= 10 else None
        axes.plot(*zip(*runs), "o-", color=colour(n), linewidth=0.8, markersize=4, label=label)
    best = frontier(points)
    axes.plot(values(best, "flops"), values(best, "loss"), "k:", label="frontier")
    finish(axes, AXIS_LABELS["flops"])
    return fig
