"""What the figures of research/ share: colours, axes, labels."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

# The palette of Okabe and Ito, for the colour-blind (https://jfly.uni-koeln.de/color/), dark colours first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")
DASHES = ("-", "--", "-.", ":")


def new_figure(width: float = 7.0, height: float = 4.5, rows: int = 1, columns: int = 1):
    """A figure and its axes; with several rows or columns, an array (rows, columns) of axes."""
    fig, panels = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", dpi=150, squeeze=False)
    for axes in panels.flat:
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return fig, panels if panels.size > 1 else panels[0, 0]


def save_figure(fig, path) -> None:
    fig.savefig(path)
    plt.close(fig)


def colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]


def short_number(value: float) -> str:
    """A label for a tick: 200, 20k, 5M, 2e12."""
    if 1e3 < value < 1e9:
        return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def set_log_scale(axis, low: float, high: float) -> None:
    """Make axes.xaxis or axes.yaxis logarithmic, with few labels that do not overlap."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    decades = math.log10(high / low) if high > low > 0 else 0
    subs = (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(ticker.MaxNLocator(5) if decades < 0.7 else ticker.LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short_number(value)))
