"""A study: runs of train.py that differ only in the keys that are studied, and a comparison of their results.

    python research/sweep.py config/sweep/width.py --dry_run      print the runs and what they will cost
    python research/sweep.py config/sweep/width.py                run them; resumes after an interruption
    python research/sweep.py config/sweep/width.py --retry        run the failed runs again too

Called several times at once, also on machines that share the folder, each call trains runs that no other one has.

A study is a config file with three parts:
  base     the arguments of train.py that all runs share
  arms     what differs: `axes` (a grid of values), `zipped` (values changed together), or `arms` (named sets of keys)
  seeds    each arm is run once with each seed
Each run has its own folder under output_dir/runs. The study writes results.csv and results.jsonl (one row per run) and
sweep_summary.json (arms, comparisons, unintended differences).
"""

import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import queue
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from costs import format_time, print_costs
from runs import (
    ROOT,
    catch_signals,
    check_scipy,
    print_effects,
    print_table,
    same_conditions,
    split_args,
    wait_for,
    write_csv,
)
from verdicts import compare_arms, grid_effects

from common.files import atomic_write, code_hash, file_sha256, read_json, try_lock
from configurator import UserError, check_bounds, configure, read_keys, short_errors

from tqdm import tqdm

# Study
name = "sweep"  # name of the study
base = ""  # arguments of train.py for every run: config/quickstart.py --max_iters=300
axes: dict = {}  # key -> list of values; several keys make a grid
zipped: dict = {}  # key -> list of values; all first values together, then all second values, and so on
arms: dict = {}  # name of the arm -> its keys; instead of axes and zipped
seeds: list = [1, 2, 3]  # each arm is run once with each seed
nuisance: list = []  # keys that are tuned for each size; scaling.py takes the best value of each size
metric = "final_val_loss"  # number of results.json to compare
power = 0.01  # a verdict says how many seeds would show a difference of this size
# Run
output_dir = ""  # folder for runs and tables; empty: out/<name>
dry_run = False  # print the commands and what they would cost
retry = False  # run failed runs again
force = False  # repeat finished runs that were made by other code than today's
mixed = False  # continue and compare runs of different code, torch, device or dtype too
list_runs = False  # print the runs as JSON and stop
runs: list = []  # run only these, by their numbers in that list; [-1]: write only the tables
max_parallel = 1  # number of runs at the same time
devices = ""  # devices to spread parallel runs over: cuda:0,cuda:1; empty: train.py chooses
interval = 5.0  # seconds between updates of the progress display

STOPPED = (130, 138, 143, -2, -10, -15)  # exit codes after SIGINT, SIGUSR1 and SIGTERM: the run saved a checkpoint
STEP_LINE = r"\s*[\d,]+/"  # how a line of train.py about a step starts
SIZES = set("depth n_layer n_embd mlp_hidden block_size max_iters max_epochs max_flops data_fraction".split())
STUDY_KEYS = {"seed", "out_dir", "device", "resume"}  # set for each run by the study


class Run:
    """One run of train.py: an arm of the study with one seed, in its own folder."""

    def __init__(self, arm: str, keys: dict, seed: int, study_folder: Path):
        self.arm, self.keys, self.seed = arm, keys, seed
        self.title = f"{arm}, seed {seed}"
        slug = re.sub(r"[^\w.=+-]+", "_", arm)
        self.folder = study_folder / "runs" / f"{slug}-seed{seed}"
        options = [f"--{key}={value}" for key, value in keys.items()]
        self.arguments = [*split_args(base, "--base"), *options, f"--seed={seed}", f"--out_dir={self.folder}"]

    def configs(self, hash_of) -> dict[str, str]:
        """Config file -> hash of what it says."""
        return {a: hash_of(Path(a)) for a in self.arguments if not a.startswith("-") and Path(a).is_file()}

    def state(self) -> str:
        """new, started, done or failed. A run is new again when its arguments, or the code of an unfinished run, have changed."""
        record = read_json(self.folder / "run.json")
        # Without the folder, so that a study may be moved, or named by another path.
        theirs, ours = (
            [a for a in c if not a.startswith("--out_dir=")] for c in (record.get("command", []), self.arguments)
        )
        hashes = [self.configs(hash_of) for hash_of in (config_hash, file_sha256)]  # the latter of older studies
        if theirs != ours or record.get("configs", hashes[0]) not in hashes:
            return "new"
        results = self.folder / "results.json"
        if record and results.exists():
            return "new" if force and read_json(results).get("code") != code_hash() else "done"
        if record.get("code", code_hash()) != code_hash() and not mixed:
            return "new"  # a checkpoint of other code is not continued
        return "failed" if record.get("exit") else "started"

    def lock(self):
        """The run's lock; None while another worker has the run, or a training that outlived its worker still goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.folder / "lock")
        if lock and self.is_training():
            lock.release()
            return None
        return lock

    def is_training(self) -> bool:
        """Whether a train.py is writing in the folder: it holds .lock there (common/files.py)."""
        lock = try_lock(self.folder / ".lock")
        if lock:
            lock.release()
        return lock is None

    def train(self, device: str, signals: list[int]) -> None:
        """Run train.py. The caller has the lock."""
        state = self.state()
        with open(self.folder / "train.log", "a", encoding="utf-8") as log:
            if state == "new":  # nothing of another command or of other code is resumed
                if archive := move_to_previous(self.folder):
                    print(f"{self.title}: its command, config or code has changed; what it had is in {archive}")
                log.truncate(0)
            record = {"command": self.arguments, "started": time.time(), "code": code_hash()}
            record["configs"] = self.configs(config_hash)
            atomic_write(self.folder / "run.json", json.dumps(record))
            command = [sys.executable, str(ROOT / "train.py"), *self.arguments]
            command += ["--resume"] * (state != "new") + [f"--device={device}"] * bool(device)
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            exit_code = wait_for(subprocess.Popen(command, **streams), signals)
            # train.py also fails where another one holds the folder, which outlived a worker that was killed.
            if exit_code not in (0, *STOPPED) and not self.is_training():
                atomic_write(self.folder / "run.json", json.dumps(record | {"exit": exit_code}))

    def last_line(self, pattern: str) -> str:
        """The last line of the run's output that starts with a pattern."""
        log = self.folder / "train.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
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
        row["torch"] = results.get("versions", {}).get("torch")
        row |= {key: config[key] for key in ("n_embd", "n_layer", "n_head")} | self.keys
        return row | {k: v for k, v in results.items() if k not in row and not isinstance(v, dict | list)}


def config_hash(path: Path) -> str:
    """Of a config file without its comments."""
    text = path.read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(SyntaxError, ValueError):  # train.py reports what is wrong
        text = ast.unparse(ast.parse(text))
    return hashlib.sha256(text.encode()).hexdigest()


def move_to_previous(folder: Path) -> Path | None:
    """Move what another command left in a run's folder to previous-1/, previous-2/, ... Returns that folder."""
    found = [p for p in folder.iterdir() if p.name not in ("lock", ".lock", "train.log") and "previous-" not in p.name]
    if not found:
        return None
    archive = next(a for n in itertools.count(1) if not (a := folder / f"previous-{n}").exists())
    archive.mkdir()
    shutil.copy(folder / "train.log", archive)  # which is open
    for path in sorted(found, key=lambda p: p.name != "ckpt.pt"):  # the checkpoint first
        path.rename(archive / path.name)
    return archive


def expand_arms() -> dict[str, dict]:
    """Name of each arm -> its keys. Raises UserError if the study does not make sense."""
    if arms and (axes or zipped):
        raise UserError("a study has either arms, or axes and zipped; remove one of them")
    for key, values in {**axes, **zipped}.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"the values of {key} must be a list, not {values!r}")
    if len({len(values) for values in zipped.values()}) > 1:
        raise UserError(f"all keys of zipped must have the same number of values: {zipped}")
    grid = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    zipped_sets = [dict(zip(zipped, values)) for values in zip(*zipped.values())] or [{}]
    combinations = [keys | more for keys in grid for more in zipped_sets]
    expanded = arms or {" ".join(f"{k}={short(v)}" for k, v in keys.items()) or "all": keys for keys in combinations}
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


def short(value) -> str:
    """1.2e+11 and not 120000000000.0"""
    return f"{value:g}" if isinstance(value, float) and value >= 1e6 else f"{value}"


def plan_runs(folder: Path) -> list[Run]:
    """The runs of the study, seed by seed, so that every arm has a first result early."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={seeds}: give at least one seed, and each only once")
    expanded = expand_arms()
    planned = [Run(arm, keys, seed, folder) for seed in seeds for arm, keys in expanded.items()]
    if len({run.folder for run in planned}) < len(planned):
        raise UserError("the names of two arms give the same folder name; rename one")
    return planned


def run_all(planned: list[Run]) -> None:
    """Run everything that is not done, max_parallel at a time, without what other workers are running.

    SIGINT and SIGTERM are passed on to the runs, which save a checkpoint: the same command resumes them.
    """
    total, signals, start_time = len(planned), catch_signals(), time.time()
    remaining = [run for run in planned if run.state() not in ("done", "failed") or (retry and run.state() == "failed")]
    ended = ended_before = total - len(remaining)
    print(f"{name}: {total} runs, {ended} already ended")
    running: list[Run] = []
    over: set[Run] = set()  # those that this call has tried, and those that others have ended
    said: set[Run] = set()  # those of others, once it is printed that this call waits for them
    events: queue.SimpleQueue = queue.SimpleQueue()  # each run that has ended, and None for a worker that has
    bar = tqdm(total=total, initial=ended, disable=None, leave=False, bar_format="{n_fmt}/{total_fmt}  {desc}")

    def next_run():
        """A run that nobody has, with its lock. None once all have ended; until then it waits for those of others."""
        while not signals:
            for run in [run for run in remaining if run not in over and run not in running]:
                if run.state() == "done" or (run.state() == "failed" and not retry):
                    over.add(run)  # another worker has ended it
                elif lock := run.lock():
                    return run, lock
            busy = [run for run in remaining if run not in over and run not in running]
            if not busy:
                return None
            for run in [run for run in busy if run not in said]:
                bar.write(f"waiting for another worker's run: {run.title}")
                said.add(run)
            time.sleep(0.5)

    def work(device: str) -> None:
        try:
            while found := next_run():
                run, lock = found
                running.append(run)
                if run.state() != "done":
                    run.train(device, signals)
                lock.release()
                running.remove(run)
                if not run.is_training():  # otherwise it waits for that training
                    over.add(run)
                    events.put(run)
        finally:
            events.put(None)

    with bar, ThreadPoolExecutor(max_parallel) as pool:
        workers = [pool.submit(work, d) for d in itertools.islice(itertools.cycle(devices.split(",")), max_parallel)]
        working = len(workers)
        while working:
            with contextlib.suppress(queue.Empty):
                run = events.get(timeout=interval)
                working -= run is None
                if run and not signals:
                    ended = sum(r.state() in ("done", "failed") for r in planned)
                    left = (time.time() - start_time) / max(1, ended - ended_before) * (total - ended)
                    bar.write(f"{ended:>4}/{total}  {run.title:<44} {run.outcome()}  {format_time(left)} remaining")
            bar.n = ended
            if running:
                lines = [f"{r.title}: {' '.join(r.last_line(STEP_LINE).split()[:3])}" for r in [*running]]
                bar.set_description_str("; ".join(lines))
        for worker in workers:
            worker.result()  # raises the error of its thread, if any
    if signals:
        done = sum(run.state() == "done" for run in planned)
        print(f"stopped with {done} of {total} runs done; the same command resumes")
        raise SystemExit(128 + signals[0])


def unintended_differences(rows: list[dict], arm_keys: dict[str, dict]) -> list[str]:
    """How the arms differ from the first one in anything but their own keys, parameters and tokens included."""
    differences, configs = [], {}
    for row in reversed(rows):  # the first row of an arm counts
        sizes = {"parameters": row["params"], "tokens": row["tokens"]}
        configs[row["arm"]] = read_json(Path(row["path"]) / "config.json") | sizes
    for arm in [arm for arm in arm_keys if arm in configs]:
        reference = rows[0]["arm"]
        ours, theirs = configs[arm], configs[reference]
        # config.json holds the values that train.py derived for the last two keys.
        intended = {*arm_keys[arm], *arm_keys[reference], *STUDY_KEYS, "n_kv_head", "mlp_hidden"}
        for key in [key for key in ours if ours[key] != theirs.get(key, ours[key])]:
            if key in ("dataset", "block_size"):
                differences.append(f"{arm}: {key} {ours[key]}, {reference} {theirs[key]}: other validation windows")
            elif axes.keys() & SIZES and key in ("parameters", "tokens"):
                continue  # they are what the study varies
            elif key not in intended and not (key == "parameters" and abs(ours[key] / theirs[key] - 1) <= 0.02):
                differences.append(f"{arm}: {key} {ours[key]!r}, {reference} {theirs[key]!r}")
    return differences


def report(planned: list[Run], folder: Path) -> None:
    """Write the study's tables, and print the comparison of its arms."""
    rows = [run.row() for run in planned if run.state() == "done"]
    folder.mkdir(parents=True, exist_ok=True)
    others = {p.parent.name for p in (folder / "runs").glob("*/results.json")} - {run.folder.name for run in planned}
    if others:
        print(f"not of this study, whose arms have changed: {len(others)} runs in {folder}/runs, such as {min(others)}")
    if not rows:
        return print("no run has finished, so no table is written")
    write_csv(folder / "results.csv", rows)
    atomic_write(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    arm_keys = {run.arm: run.keys for run in planned}
    hint = "--mixed=True compares them too, --force=True repeats those of other code"
    rows = rows if mixed else same_conditions(rows, hint, {key for keys in arm_keys.values() for key in keys})
    table = compare_arms(rows, metric, list(arm_keys), power)  # refuses a wrong metric, after the results are safe
    differences = unintended_differences(rows, arm_keys)
    failed = [run.title for run in planned if run.state() == "failed"]
    effects = grid_effects(rows, metric, arm_keys) if axes and not zipped else []
    summary = dict(name=name, base=base, metric=metric, seeds=seeds, axes=axes, nuisance=nuisance, arms=table)
    summary |= dict(effects=effects, differences=differences, failed=failed)
    atomic_write(folder / "sweep_summary.json", json.dumps(summary | {"runs": rows}, indent=1))
    if arms:  # named arms are an ablation: the first arm, then the largest effects first
        table = table[:1] + sorted(table[1:], key=lambda entry: -abs(entry.get("difference", 0)))
    print_table(table, metric)
    print_effects(effects)
    for line in differences:
        print(f"also different: {line}")
    if not differences and len(table) > 1:
        equal = "" if axes.keys() & SIZES else "; parameters (within 2 %) and tokens are equal"
        print(f"the arms differ only in their own keys{equal}")
    for title in failed:
        print(f"failed: {title} (--retry runs it again)")
    files = "results.csv, results.jsonl, sweep_summary.json"
    print(f"{folder}/ has {files}; python research/plot.py --results={shlex.quote(str(folder))} draws them")


def main() -> None:
    if not (axes or zipped or arms or base):
        raise UserError("no study given: name its file, such as config/sweep/width.py")
    check_bounds(globals(), at_least_1="max_parallel")
    if not power > 0:
        raise UserError(f"--power={power}: must be above 0")
    folder = Path(output_dir or f"out/{name}")
    planned = plan_runs(folder)
    if list_runs:
        print(json.dumps([dict(run=n, arm=run.arm, seed=run.seed) for n, run in enumerate(planned)]))
        return
    if dry_run:
        print_costs(planned, folder, max_parallel)
        return
    if not all(-1 <= n < len(planned) for n in runs):
        raise UserError(f"--runs={runs}: the study has runs 0 to {len(planned) - 1}")
    with_tables = not runs or -1 in runs
    if with_tables and len(seeds) > 1 and len(planned) > len(seeds):
        check_scipy("confidence intervals")  # now, not after hours of training
    chosen = [planned[n] for n in runs if n >= 0] if runs else planned
    if chosen:
        run_all(chosen)
    if with_tables:
        report(planned, folder)
    if any(run.state() == "failed" or (runs and run.state() != "done") for run in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
