"""What the scripts share: results of runs as rows, their comparison by arm, and calls of other programs."""

import csv
import importlib.util
import io
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the scripts of this folder find common/ and configurator.py
from common.files import atomic_file, atomic_write, parse_json, read_json  # noqa: E402
from configurator import UserError, check_choice  # noqa: E402


def read_rows(sources: str) -> list[dict]:
    """A row for each run in --results: at least "arm" and "path", and the run's results if it has finished.

    sources: folders of studies or runs, or results.jsonl files of studies, separated by commas.
    """
    rows = []
    for source in filter(None, sources.split(",")):
        path = Path(source)
        table = path if path.suffix == ".jsonl" else path / "results.jsonl"
        runs = [p.parent for p in sorted(path.rglob("metrics.jsonl")) if not p.parent.name.startswith("previous-")]
        if table.is_file():
            try:
                found = [parse_json(line) for line in table.read_text(encoding="utf-8", errors="replace").splitlines()]
                rows += [{"arm": row["arm"], "path": row["path"]} | row for row in found]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{table} is damaged or not a study's: research/sweep.py writes it again") from None
        elif runs:
            rows += [{"arm": run.name, "path": str(run)} | read_json(run / "results.json") for run in runs]
        else:
            raise UserError(f"--results={source}: no study (results.jsonl) and no run (metrics.jsonl) there")
    if not rows:
        raise UserError(f"--results={sources}: no finished run there; give folders of runs or studies")
    return rows


def same_conditions(rows: list[dict], hint: str, intended: set[str] = frozenset()) -> list[dict]:
    """The rows of one code, torch, device and dtype: those of the most runs. What is left out is printed, with a hint.

    intended: keys that the study varies itself.
    """
    keys = [key for key in ("code", "torch", "device", "dtype") if key not in intended]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        row = {"torch": (row.get("versions") or {}).get("torch")} | row
        groups.setdefault(tuple(str(row.get(key)).partition(":")[0] for key in keys), []).append(row)
    kept = max(groups, key=lambda group: len(groups[group]), default=())
    for group in groups.keys() - {kept}:
        names = ", ".join(f"{row['arm']} seed {row.get('seed')}" for row in groups[group])
        unlike = ", ".join(f"{key} {a} and not {b}" for key, a, b in zip(keys, group, kept) if a != b)
        print(f"left out, with {unlike}: {names} ({hint})")
    return groups[kept] if groups else []


def folder_of(output_dir: str, sources: str) -> Path:
    """output_dir or, if it is empty, the folder of the first source."""
    first = Path(sources.split(",")[0])
    return Path(output_dir or (first.parent if first.is_file() else first))


def make_folder(output_dir: str, sources: str) -> Path:
    """folder_of(), made if it is missing. Call it once the sources are read: a mistyped one would become a folder."""
    folder = folder_of(output_dir, sources)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def save_figure(fig, path: Path, formats: list[str]) -> list[str]:
    """Write a figure as path.png, path.pdf or path.svg. Returns the names of the files."""
    for name in formats:
        with atomic_file(path.with_name(f"{path.name}.{name}")) as f:
            fig.savefig(f, format=name)
    return [f"{path.name}.{name}" for name in formats]


def arm_statistics(rows: list[dict], metric: str) -> list[dict]:
    """n, mean, std (None for one run), min and max of the metric for each arm. UserError if no result has it."""
    numbers = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    if numbers:
        check_choice("metric", metric, numbers)
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        values = [row[metric] for row in rows if row["arm"] == arm and row.get(metric) is not None]
        if values:
            mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
            table.append(dict(arm=arm, n=len(values), mean=mean, std=std, min=min(values), max=max(values)))
    return table


def check_scipy(purpose: str) -> None:
    if importlib.util.find_spec("scipy") is None:
        raise UserError(f"{purpose} need scipy: pip install -e '.[research]'")


def higher_is_better(metric: str) -> bool:
    """Accuracies and speeds of results.json; its other numbers are losses, sizes and times."""
    return any(word in metric for word in ("acc", "per_sec", "mfu"))


def print_table(table: list[dict], metric: str) -> None:
    """Print the table of arm_statistics() or of compare_arms(), whose differences are to the first arm."""
    lower = "" if higher_is_better(metric) else " (lower is better)"
    title, compared = metric + lower, any("difference" in entry for entry in table)
    print(f"\n{title:<40} {'n':>2} {'mean':>9} {'std':>8} {'min':>9} {'max':>9}" + "  to the first arm" * compared)
    for entry in table:
        std = "" if entry["std"] is None else f"{entry['std']:.4f}"
        line = "{arm:<40} {n:>2} {mean:>9.4f} {0:>8} {min:>9.4f} {max:>9.4f}".format(std, **entry)
        difference = f"  {entry['difference']:+.4f}  {entry.get('verdict', '')}" if "difference" in entry else ""
        print((line + difference).rstrip())
    spreads = [entry["std"] for entry in table if entry["std"]]
    if compared and spreads and max(spreads) > 4 * min(spreads):
        print("the spreads of the arms differ widely: the intervals take them as equal, and are rough")
    if compared and not any("verdict" in entry for entry in table):
        print("no verdicts: every arm has one run; several seeds tell an effect from luck")


def print_effects(effects: list[dict]) -> None:
    """Print what grid_effects() found."""
    for effect in effects:
        difference = f"{effect['difference']:+.4f}  " if "difference" in effect else ""
        print(f"{effect['title']}: {difference}{effect['verdict']}")


def split_args(text: str, key: str) -> list[str]:
    """The words of a command line. Raises UserError, naming its key, if a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{key}={text}: {e}") from None


def catch_signals() -> list[int]:
    """From now on SIGINT and SIGTERM only append their number to the list that is returned."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def wait_for(process: subprocess.Popen, signals: list[int]) -> int:
    """The exit code of a process, which gets SIGTERM when a signal arrives."""
    while process.poll() is None and not signals:
        time.sleep(0.05)
    if signals:
        process.terminate()
    return process.wait()
