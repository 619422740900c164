"""A study: runs of train.py that differ only in the keys that are studied, and a comparison of their results.

    python research/sweep.py config/sweep/width.py --dry_run      print the runs and what they will cost
    python research/sweep.py config/sweep/width.py                run them; the same command resumes after an interruption
    python research/sweep.py config/sweep/width.py --retry        run the failed runs again too

A study is a config file with three parts:
  base     the arguments of train.py that all runs share
  arms     what differs: `axes` (a grid of values), `zipped` (values that change together), or `arms` (named sets of keys)
  seeds    each arm is run once with each seed
Each run has its own folder under output_dir/runs. The study writes results.csv and results.jsonl (one row per run) and
sweep_summary.json (arms, comparisons, unintended differences).
"""

import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commands import catch_signals, run_script, split_command  # noqa: E402
from runs import check_metric, check_scipy, compare_arms, print_statistics, read_json, unintended_differences, write_csv  # noqa: E402

from common.files import atomic_write  # noqa: E402
from configurator import UserError, configure, read_keys, short_errors  # noqa: E402

# Study
name = "sweep"  # name of the study
base = ""  # arguments of train.py for every run: config/quickstart.py --max_iters=300
axes: dict = {}  # key -> list of values; several keys make a grid
zipped: dict = {}  # key -> list of values; all first values together, then all second values, and so on
arms: dict = {}  # name of the arm -> its keys; instead of axes and zipped
seeds: list = [1, 2, 3]  # each arm is run once with each seed
metric = "final_val_loss"  # number of results.json to compare
# Run
output_dir = ""  # folder for runs and tables; empty: out/<name>
dry_run = False  # print the commands and what they would cost
retry = False  # run failed runs again
list_runs = False  # print the runs as JSON and stop
runs: list = []  # run only these, by their numbers in that list; [-1]: write only the tables
max_parallel = 1  # number of runs at the same time
devices = ""  # devices to spread parallel runs over: cuda:0,cuda:1; empty: train.py chooses
interval = 5.0  # seconds between updates of the progress display

STOPPED = (130, 138, 143, -2, -10, -15)  # exit codes after SIGINT, SIGUSR1 and SIGTERM: the run saved a checkpoint
STEP_LINE = r"\s*[\d,]+/"  # how a line of train.py about a step starts
STUDY_KEYS = {"seed", "out_dir", "device", "resume"}  # set for each run by the study


# -----------------------------------------------------------------------------
# Runs


class Run:
    """One run of train.py: an arm of the study with one seed, in its own folder."""

    def __init__(self, arm: str, keys: dict, seed: int, study_folder: Path):
        self.arm, self.keys, self.seed = arm, keys, seed
        self.title = f"{arm}, seed {seed}"
        slug = re.sub(r"[^\w.=+-]+", "_", arm)
        self.folder = study_folder / "runs" / f"{slug}-seed{seed}"
        options = [f"--{key}={value}" for key, value in keys.items()]
        self.arguments = [*split_command(base, "--base"), *options, f"--seed={seed}", f"--out_dir={self.folder}"]
        self.process = self.lock_file = self.log_file = None

    def state(self) -> str:
        """new, started, done or failed. A run is new again when its arguments have changed."""
        record = read_json(self.folder / "run.json")
        if record.get("command") != self.arguments:
            return "new"
        results = self.folder / "results.json"
        if results.exists() and results.stat().st_mtime >= record["started"]:
            return "done"
        return "failed" if record.get("exit") else "started"

    def start(self, device: str, signals: list[int]) -> None:
        """Start train.py, unless a signal arrives first or the run turns out to be done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.lock_folder(signals) or self.state() == "done":
            return
        resume = self.state() != "new"
        self.record = {"command": self.arguments, "started": time.time()}
        atomic_write(self.folder / "run.json", json.dumps(self.record))
        self.log_file = open(self.folder / "train.log", "a" if resume else "w", encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), *self.arguments]
        command += ["--resume"] * resume + [f"--device={device}"] * bool(device)
        inherited = [self.lock_file.fileno()] if os.name == "posix" else []
        output = dict(stdout=self.log_file, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited, **output)

    def lock_folder(self, signals: list[int]) -> bool:
        """Wait for the lock of the run's folder; False if a signal arrives first.

        train.py inherits the lock, so it lasts as long as the training, even if this process is killed.
        """
        self.lock_file = open(self.folder / "lock", "w")
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        reported = False
        while not signals:
            try:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not reported:
                    print(f"{self.title}: still running from an earlier call; waiting for it to end")
                reported = True
                time.sleep(0.2)
        return False

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self) -> None:
        """Record the exit code of a failed run, and release the folder."""
        if self.process and self.process.returncode not in (0, *STOPPED):
            atomic_write(self.folder / "run.json", json.dumps(self.record | {"exit": self.process.returncode}))
        for file in filter(None, (self.lock_file, self.log_file)):
            file.close()

    def last_line(self, pattern: str) -> str:
        """The last line of the run's output that starts with a pattern."""
        log = self.folder / "train.log"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return next((line.strip() for line in reversed(lines) if re.match(pattern, line)), "")

    def outcome(self) -> str:
        """The metric of a finished run, or why the run failed."""
        if self.state() == "done":
            value = read_json(self.folder / "results.json").get(metric)
            return f"no {metric}" if value is None else f"{metric} {value:.4f}"
        error = self.last_line("error: ") or self.last_line("")
        return f"FAILED ({error[:120]}), see {self.folder}/train.log"

    def row(self) -> dict:
        """The row of a finished run in the tables: its arm, its keys, and the numbers of results.json."""
        results, config = (read_json(self.folder / file) for file in ("results.json", "config.json"))
        row = {"arm": self.arm, "seed": self.seed, "path": str(self.folder)}
        row |= {"step": results["total_steps"], "params": results["model_parameters"]}
        row |= {key: config[key] for key in ("n_embd", "n_layer", "n_head")} | self.keys
        return row | {k: v for k, v in results.items() if k not in row and not isinstance(v, dict | list)}


def expand_arms() -> dict[str, dict]:
    """Name of each arm -> its keys. Raises UserError if the study does not make sense."""
    if arms and (axes or zipped):
        raise UserError("a study has either arms, or axes and zipped; remove one of them")
    expanded = dict(arms)
    if not arms:
        for key, values in {**axes, **zipped}.items():
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"the values of {key} must be a list, not {values!r}")
        if len({len(values) for values in zipped.values()}) > 1:
            raise UserError(f"all keys of zipped must have the same number of values: {zipped}")
        zipped_sets = [dict(zip(zipped, values)) for values in zip(*zipped.values())] or [{}]
        for values, zipped_set in itertools.product(itertools.product(*axes.values()), zipped_sets):
            keys = dict(zip(axes, values)) | zipped_set
            expanded[" ".join(f"{k}={v}" for k, v in keys.items()) or "all"] = keys
    known = read_keys(ROOT / "train.py")
    for arm, keys in expanded.items():
        if not isinstance(keys, dict):
            raise UserError(f"arm {arm}: its keys must be a dict, not {keys!r}")
        for key in keys.keys() - known.keys():  # train.py would refuse it too, but only when this arm starts
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"arm {arm}: train.py has no key {key}" + (f" (did you mean {close[0]}?)" if close else ""))
        if reserved := STUDY_KEYS & keys.keys():
            raise UserError(f"arm {arm}: the study sets {', '.join(sorted(reserved))}; an arm cannot")
    return expanded


def plan_runs(folder: Path) -> list[Run]:
    """The runs of the study, seed by seed, so that every arm has a first result early."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={seeds}: give at least one seed, and each only once")
    expanded = expand_arms()
    planned = [Run(arm, keys, seed, folder) for seed in seeds for arm, keys in expanded.items()]
    if len({run.folder for run in planned}) < len(planned):
        raise UserError("the names of two arms give the same folder name; rename one")
    return planned


# -----------------------------------------------------------------------------
# What the study will cost


def read_costs(run: Run) -> dict[str, float]:
    """Parameters, tokens and FLOPs of a run as train.py --dry_run prints them; nan for what it does not print."""
    output = run_script("train.py", *run.arguments, "--dry_run")

    def number(pattern: str) -> float:
        found = re.search(pattern, output)
        return float(found[1].replace(",", "")) if found else math.nan

    parameters, tokens = number(r"model: ([\d,]+) parameters"), number(r"steps, ([\d,]+)")
    return {"parameters": parameters, "tokens": tokens, "flops": tokens * number(r"FLOPs: ([\d.e+]+)")}


def measure_flops_per_second(run: Run, cost: dict[str, float], all_runs: list[Run]) -> float:
    """Median of the study's finished runs, otherwise of a few steps of `run` in bench.py; nan if bench.py fails."""
    finished = [read_json(r.folder / "results.json") for r in all_runs if r.state() == "done"]
    if rates := [r["train_flops"] / r["train_seconds"] for r in finished if r.get("train_seconds")]:
        return statistics.median(rates)
    output = run.folder.parent.parent / "bench.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:  # without the last two arguments, --seed and --out_dir, which bench.py does not have
        run_script("bench.py", *run.arguments[:-2], "--steps=5", "--real_data=True", f"--output={output}")
    except UserError:
        return math.nan
    return json.loads(output.read_text(encoding="utf-8"))["tokens_per_second"] * cost["flops"] / cost["tokens"]


def print_costs(planned: list[Run]) -> None:
    costs: dict[str, dict[str, float]] = {}
    for run in planned:
        print(f"{run.state():>7}  python train.py {shlex.join(run.arguments)}")
        if run.arm not in costs:
            costs[run.arm] = read_costs(run)
    print(f"\n{'arm':<40} {'parameters':>14} {'tokens':>14} {'FLOPs':>10}")
    for arm, cost in costs.items():
        print(f"{arm:<40} {cost['parameters']:>14,.0f} {cost['tokens']:>14,.0f} {cost['flops']:>10.3g}")
    remaining = [run for run in planned if run.state() != "done"]
    tokens, flops = (sum(costs[run.arm][key] for run in remaining) for key in ("tokens", "flops"))
    rate = measure_flops_per_second(planned[0], costs[planned[0].arm], planned)
    seconds, speed = flops / rate / max(1, max_parallel), f"{rate / 1e9:,.0f} GFLOP/s per run"
    duration = "duration unknown" if math.isnan(seconds) else f"about {format_time(seconds)} at {speed}"
    print(f"{len(remaining)} of {len(planned)} runs to do: {tokens:,.0f} tokens, {flops:.3g} FLOPs, {duration}")


def format_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


# -----------------------------------------------------------------------------
# Running


class LiveDisplay:
    """Lines at the bottom of a terminal that are redrawn in place. Nothing is drawn where stdout is not a terminal."""

    def __init__(self):
        self.height = 0

    def show(self, lines: list[str]) -> None:
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            erase = f"\033[{self.height}A\033[J" if self.height else ""
            print(erase + "".join(f"{line[:width]}\n" for line in lines), end="", flush=True)
            self.height = len(lines)


def run_all(planned: list[Run]) -> None:
    """Run everything that is not done, max_parallel at a time.

    SIGINT and SIGTERM are passed on to the runs, which save a checkpoint: the same command resumes them.
    """
    states = ("new", "started", "failed") if retry else ("new", "started")
    queue = [run for run in planned if run.state() in states]
    running: dict[Run, str] = {}  # run -> its device
    total, ended_before = len(planned), len(planned) - len(queue)
    ended = ended_before
    signals, start_time, display = catch_signals(), time.time(), LiveDisplay()
    print(f"{name}: {total} runs, {ended_before} already ended")
    while (queue and not signals) or running:
        while queue and not signals and len(running) < max(1, max_parallel):
            run, device = queue.pop(0), min(devices.split(","), key=list(running.values()).count)
            run.start(device, signals)
            running[run] = device
        next_update = time.monotonic() + interval
        while time.monotonic() < next_update and not signals and all(run.is_running() for run in running):
            time.sleep(0.05)
        if signals:
            processes = [run.process for run in running if run.process]
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()
        for run in [run for run in running if not run.is_running()]:
            del running[run]
            run.finish()
            if not signals:
                ended += 1
                seconds_per_run = (time.time() - start_time) / (ended - ended_before)
                remaining = format_time(seconds_per_run * (total - ended))
                display.show([])
                print(f"{ended:>4}/{total}  {run.title:<44} {run.outcome()}  {remaining} remaining", flush=True)
        rows = [f"   ...  {run.title}: {run.last_line(STEP_LINE)}" for run in running]
        rows += [f"{ended} of {total} ended, {len(running)} running, {len(queue)} queued"] * bool(running)
        display.show(rows)
    if signals:
        done = sum(run.state() == "done" for run in planned)
        print(f"stopped with {done} of {total} runs done; the same command resumes")
        raise SystemExit(128 + signals[0])


# -----------------------------------------------------------------------------
# Results


def report(planned: list[Run], folder: Path) -> None:
    """Write the study's tables, and print the comparison of its arms."""
    rows = [run.row() for run in planned if run.state() == "done"]
    order = list(dict.fromkeys(run.arm for run in planned))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "results.csv", rows)
    atomic_write(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    check_metric(rows, metric)
    table = compare_arms(rows, metric, order)
    differences = unintended_differences(rows, {run.arm: run.keys for run in planned}, STUDY_KEYS)
    failed = [run.title for run in planned if run.state() == "failed"]
    summary = dict(name=name, base=base, metric=metric, seeds=seeds, arms=table, differences=differences, failed=failed)
    atomic_write(folder / "sweep_summary.json", json.dumps(summary | {"runs": rows}, indent=1))
    if arms:  # named arms are an ablation: the first arm, then the largest effects first
        table = table[:1] + sorted(table[1:], key=lambda entry: -abs(entry.get("difference", 0)))
    if table:
        print_statistics(table, metric, order[0])
    else:
        print("no run has finished")
    for line in differences:
        print(f"also different: {line}")
    if not differences and len(table) > 1:
        print("the arms differ only in their own keys; parameters (within 2 %) and tokens are equal")
    for title in failed:
        print(f"failed: {title} (--retry runs it again)")
    files = "results.csv, results.jsonl, sweep_summary.json"
    print(f"{folder}/ has {files}; python research/plot.py --results={folder} draws them")


def main() -> None:
    if not (axes or zipped or arms or base):
        raise UserError("no study given: name its file, such as config/sweep/width.py")
    folder = Path(output_dir or f"out/{name}")
    planned = plan_runs(folder)
    if list_runs:
        print(json.dumps([dict(run=n, arm=run.arm, seed=run.seed) for n, run in enumerate(planned)]))
        return
    if dry_run:
        print_costs(planned)
        return
    if not all(-1 <= n < len(planned) for n in runs):
        raise UserError(f"--runs={runs}: the study has runs 0 to {len(planned) - 1}")
    with_tables = not runs or -1 in runs
    if with_tables and len(seeds) > 1 and len(planned) > len(seeds):
        check_scipy("confidence intervals")  # now, not after hours of training
    chosen = [planned[n] for n in runs if n >= 0] if runs else planned
    run_all(chosen)
    if with_tables:
        report(planned, folder)
    if any(run.state() == "failed" or (runs and run.state() != "done") for run in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
