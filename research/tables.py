"""Tables for papers and pages: the same rows as Markdown (.md) and as LaTeX (.tex, for \\input, with booktabs)."""

import re
from pathlib import Path

from figures import AXIS_LABELS
from laws import formula

from common.files import atomic_write

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "²": "$^2$", "±": r"$\pm$"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def write_tables(path: Path, header: list[str], rows: list[list[str]], note: str = "") -> list[str]:
    """Write path.md and path.tex, with a note below. Returns the names of the files."""
    lines = [header, ["---"] * len(header), *rows]
    markdown = "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in lines)
    markdown += f"\n{note}\n" if note else ""
    escaped = [[to_latex(cell) for cell in row] for row in (header, *rows)]
    title, *body = (" & ".join(row) + r" \\" + "\n" for row in escaped)
    latex = "% \\usepackage{booktabs}\n" + (f"% {note}\n" if note else "")
    latex += f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n\\toprule\n{title}\\midrule\n"
    latex += "".join(body) + "\\bottomrule\n\\end{tabular}\n"
    atomic_write(path.with_name(path.name + ".md"), markdown)
    atomic_write(path.with_name(path.name + ".tex"), latex)
    return [path.name + ".md", path.name + ".tex"]


def to_latex(text: str) -> str:
    """With powers and signed numbers in math mode."""
    parts = re.split(r"(\b[a-zA-Z]\^-?[\d.]+|(?<![\w.])[-+][\d.]+)", text)
    escaped = ["".join(LATEX.get(character, character) for character in part) for part in parts]
    powers = [re.sub(r"\^(.*)", r"^{\1}", part) for part in parts[1::2]]
    escaped[1::2] = [f"${power}$" for power in powers]
    return "".join(escaped)


def difference_cells(entry: dict) -> list[str]:
    """Difference, interval and verdict of an entry of compare_arms() or grid_effects(), those that it has."""
    difference = f"{entry['difference']:+.4f}" if "difference" in entry else ""
    interval = "{:+.4f} to {:+.4f}".format(*entry["interval"]) if entry.get("interval") else ""
    words = entry.get("verdict", "")
    return [difference, interval, words.split(", 95 %")[0]]  # the interval has its own cell


def write_effects(folder: Path, effects: list[dict]) -> list[str]:
    """What grid_effects() found of a grid: each difference with its interval, and the interactions."""
    rows = [[effect["title"], *difference_cells(effect)] for effect in effects]
    return write_tables(folder / "effects", ["effect", "difference", "95 % interval", "verdict"], rows)


def write_comparison(folder: Path, table: list[dict], metric: str) -> list[str]:
    """The table of compare_arms(): mean and standard deviation of each arm, and its difference to the first with interval."""
    rows = []
    for entry in table:
        mean = f"{entry['mean']:.4f}" + ("" if entry["std"] is None else f" ± {entry['std']:.4f}")
        rows.append([entry["arm"], str(entry["n"]), mean, *difference_cells(entry)])
    header = ["arm", "runs", metric, "difference to the first", "95 % interval, all together", "verdict"]
    return write_tables(folder / "comparison", header, rows)


def write_laws(folder: Path, fits: dict) -> list[str]:
    """Every law that was fitted: its formula, and the 95 % interval of its exponents."""
    rows = []

    def add(name: str, law: dict, exponents: str) -> None:
        found = law.get("interval") or {}
        ends = [f"{e} {found[e][0]:.3g} to {found[e][1]:.3g}" for e in exponents.split() if found.get(e)]
        rows.append([name, formula(law) if "b" in law else law["formula"], f"{law['r2']:.3f}", ", ".join(ends)])

    for axis, law in fits["axes"].items():
        for fit in (law.get("power"), law.get("offset")):
            if fit and "refused" not in fit:
                add(AXIS_LABELS[axis], fit, "b c")
    surface, isoflop = fits["params_and_tokens"], fits["isoflop"]
    if "refused" not in surface:
        text = "{E:.4g} + {A:.4g} N^-{alpha:.4g} + {B:.4g} D^-{beta:.4g}".format(**surface)
        add("N and D", surface | {"formula": text}, "E A B alpha beta")
    if "refused" not in isoflop:
        low, high = isoflop["interval"]
        best = f"{isoflop['factor']:.4g} C^{isoflop['exponent_of_N']:.4g}"
        rows.append(["best N (IsoFLOP)", best, "", f"exponent {low:.3g} to {high:.3g}"])
    return write_tables(folder / "scaling_laws", ["law", "formula", "R²", "95 % intervals"], rows, fits["units"])
