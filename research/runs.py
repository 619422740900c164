"""Results of runs as rows: read from studies and runs, written as CSV, compared by arm."""

import csv
import importlib.util
import json
import math
import statistics
from pathlib import Path

from configurator import UserError, check_choice


def read_rows(sources: str) -> tuple[list[dict], Path]:
    """A row for each run in --results, and the folder of the first source. Raises UserError if there is no run.

    sources: folders of studies or runs, or results.jsonl files of studies, separated by commas. A row has at least "arm" and
    "path", and the results of the run if it has finished.
    """
    rows, folders = [], []
    for source in filter(None, sources.split(",")):
        path = Path(source)
        table = path if path.suffix == ".jsonl" else path / "results.jsonl"
        found = [p.parent for p in sorted(path.rglob("metrics.jsonl")) if not p.parent.name.startswith("previous-")]
        if table.is_file():
            try:
                own = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
            except ValueError:
                raise UserError(f"{table} is damaged: run research/sweep.py again to rewrite it") from None
            if any("path" not in row or "arm" not in row for row in own):
                raise UserError(f"{table} is not the table of a study: its rows have no path and arm")
        elif found:
            own = [{"arm": run.name, "path": str(run)} | read_json(run / "results.json") for run in found]
        else:
            raise UserError(f"--results={source}: no study (results.jsonl) and no run (metrics.jsonl) there")
        rows += own
        folders.append(table.parent)
    if not rows:
        raise UserError(f"--results={sources}: no finished run there; give folders of runs or studies")
    return rows, folders[0]


def read_json(file: Path) -> dict:
    """{} if the file is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_csv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def check_metric(rows: list[dict], metric: str) -> None:
    """Raise UserError if no run has the metric. Nothing is checked if no run has any result yet."""
    numbers = {key: None for row in rows for key, value in row.items() if isinstance(value, int | float)}
    if numbers:
        check_choice("metric", metric, numbers)


def check_scipy(purpose: str) -> None:
    if importlib.util.find_spec("scipy") is None:
        raise UserError(f"{purpose} need scipy: pip install -e '.[research]'")


def arm_statistics(rows: list[dict], metric: str) -> list[dict]:
    """n, mean, std, min and max of the metric for each arm, in the order of the rows. std is None for a single run."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        values = [row[metric] for row in rows if row["arm"] == arm and row.get(metric) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            mean = statistics.fmean(values)
            table.append(dict(arm=arm, n=len(values), mean=mean, std=std, min=min(values), max=max(values)))
    return table


def print_statistics(table: list[dict], metric: str, reference: str = "") -> None:
    """Print the table of arm_statistics() or, with the name of the reference arm, of compare_arms()."""
    difference = f"   difference to {reference}, 95 % interval" if reference else ""
    print(f"\n{metric:<40} {'n':>2} {'mean':>9} {'std':>8} {'min':>9} {'max':>9}{difference}")
    for entry in table:
        std = "" if entry["std"] is None else f"{entry['std']:.4f}"
        numbers = f"{entry['n']:>2} {entry['mean']:>9.4f} {std:>8} {entry['min']:>9.4f} {entry['max']:>9.4f}"
        if "difference" in entry:
            interval = "[{:+.4f}, {:+.4f}]".format(*entry["interval"]) if entry["interval"] else "(one seed)"
            numbers += f"   {entry['difference']:+.4f}  {interval}"
        print(f"{entry['arm']:<40} {numbers}")


def compare_arms(rows: list[dict], metric: str, order: list[str]) -> list[dict]:
    """arm_statistics(), and for each arm its difference to the first one of `order`, over the seeds that both have.

    The difference has a 95 % confidence interval, or None where there is only one such seed.
    """
    table = arm_statistics(sorted(rows, key=lambda row: order.index(row["arm"])), metric)
    values = {(row["arm"], row["seed"]): row[metric] for row in rows if row.get(metric) is not None}
    for entry in table:
        arm = entry["arm"]
        shared = [seed for other, seed in values if other == arm and (order[0], seed) in values]
        differences = [values[arm, seed] - values[order[0], seed] for seed in shared]
        if differences and arm != order[0]:
            entry["difference"] = statistics.fmean(differences)
            entry["interval"] = confidence_interval(differences) if len(differences) > 1 else None
    return table


def confidence_interval(values: list[float]) -> list[float]:
    """The 95 % confidence interval of the mean of two values or more, by Student's t."""
    check_scipy("confidence intervals")
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def unintended_differences(rows: list[dict], arm_keys: dict[str, dict], study_keys: set[str]) -> list[str]:
    """How the arms differ from the first one in anything but their own keys, parameters and tokens included.

    arm_keys: name of the arm -> its keys. study_keys: the keys that the study sets for each run.
    """
    differences = []
    first_rows = {row["arm"]: row for row in reversed(rows)}  # the first row of each arm
    configs = {arm: read_json(Path(row["path"]) / "config.json") for arm, row in first_rows.items()}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms[1:]:
        reference, ours, theirs, keys = arms[0], configs[arm], configs[arms[0]], arm_keys[arm]
        # config.json holds the values that train.py derived for the last two keys.
        intended = {*keys, *arm_keys[reference], *study_keys, "n_kv_head", "mlp_hidden"}
        for key in sorted(ours.keys() & theirs.keys() - intended):
            if ours[key] != theirs[key]:
                differences.append(f"{arm}: {key} is {ours[key]!r}, in {reference} {theirs[key]!r}")
        for key, value in keys.items():
            if value and key in ours and ours[key] != value:  # 0 stands for a value that train.py derives
                differences.append(f"{arm}: {key} was set to {value!r} but is {ours[key]!r}")
        for key in ("dataset", "block_size"):
            if ours[key] != theirs[key]:
                differences.append(f"{arm}: {key} is {ours[key]}, so {reference} has other validation windows")
        for key, word, tolerance in (("params", "parameters", 0.02), ("tokens", "tokens", 0.0)):
            a, b = first_rows[arm][key], first_rows[reference][key]
            if abs(a / b - 1) > tolerance:
                differences.append(f"{arm}: {a:,} {word}, {reference} {b:,}")
    return differences
