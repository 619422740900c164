"""A study: runs of train.py that differ in stated keys alone, and what the difference comes to.

    python research/sweep.py config/sweep/width.py --dry_run      what would run, and what it would cost
    python research/sweep.py config/sweep/width.py                run it; called again, it goes on where it stopped
    python research/sweep.py config/sweep/width.py --retry        failed runs too

A study is a config file: `base`, the arguments of train.py that all runs share; the arms, as `axes` (a grid), `zipped`
(values that go together) or `arms` (named sets of keys); and `seeds`. Each run has a folder under output_dir/runs.
Leaves results.csv and results.jsonl (a line a run), sweep_summary.json (arms, comparisons, fairness).
"""

import csv
import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure, read_keys, short_errors  # noqa: E402

# Study
name = "sweep"  # what it is called
base = ""  # arguments of train.py for every run: config/quickstart.py --max_iters=300
axes: dict = {}  # key -> values; several keys make a grid
zipped: dict = {}  # key -> values; the first ones go together, then the second ones, and so on
arms: dict = {}  # name -> keys, instead of axes
seeds: list = [1, 2, 3]  # each arm is run with each
metric = "final_val_loss"  # of results.json: what is compared
# Run
output_dir = ""  # where runs and tables go; empty: out/<name>
dry_run = False  # print the commands and what they would cost
retry = False  # run again what failed
list_runs = False  # print the runs as JSON, and no more
runs: list = []  # run these alone, by their numbers in that list; [-1]: none, only the tables
max_parallel = 1  # runs at a time
devices = ""  # of the runs side by side, in turn: cuda:0,cuda:1; empty: each picks its own
interval = 5.0  # seconds between looks at the runs


def split(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as e:
        raise ValueError(f"--base={words}: {e}") from None


STOPPED = (130, 138, 143, -2, -10, -15)  # exit codes of a run that was asked to end, and saved


class Child:
    """One run: an arm with a seed, in a folder of its own."""

    def __init__(self, arm: str, keys: dict, seed: int, folder: Path):
        self.arm, self.keys, self.seed = arm, keys, seed
        slug = re.sub(r"[^\w.=+-]+", "_", arm)
        self.folder = folder / "runs" / f"{slug}-seed{seed}"
        options = [f"--{k}={v}" for k, v in keys.items()]
        self.command = [*split(base), *options, f"--seed={seed}", f"--out_dir={self.folder}"]
        self.process = self.lock = self.log = None

    @property
    def title(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def read(self, file: str) -> dict:
        try:
            return json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def state(self) -> str:
        """done, failed, begun or new; what was run with another command counts for nothing."""
        told = self.read("run.json")
        if told.get("command") != self.command:
            return "new"
        results = self.folder / "results.json"
        if results.exists() and results.stat().st_mtime >= told["started"]:
            return "done"
        return "failed" if told.get("exit") else "begun"

    def start(self, device: str, stopped: list) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        if not wait_for(self.lock, self.title, stopped) or self.state() == "done":  # by a process of an earlier call
            return
        again = self.state() != "new"
        self.note()
        self.log = open(self.folder / "train.log", "a" if again else "w", encoding="utf-8")
        command = [sys.executable, str(ROOT / "train.py"), *self.command]
        command += ["--resume"] * again + [f"--device={device}"] * bool(device)
        held = [self.lock.fileno()] if os.name == "posix" else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, pass_fds=held
        )

    def note(self, **more) -> None:
        """run.json: the command and when it began; written whole or not at all."""
        began = self.read("run.json").get("started") if more else time.time()
        part = self.folder / "run.json.part"
        part.write_text(json.dumps(dict(command=self.command, started=began, **more)), encoding="utf-8")
        os.replace(part, self.folder / "run.json")

    def ended(self) -> bool:
        """Whether it is over; then its exit code is kept."""
        if self.process and self.process.poll() is None:
            return False
        if self.process and self.process.returncode not in (0, *STOPPED):
            self.note(exit=self.process.returncode)
        for file in (self.lock, self.log):
            if file:
                file.close()
        return True

    def progress(self) -> str:
        """The last line its log has of a step."""
        try:
            lines = (self.folder / "train.log").read_text(encoding="utf-8").splitlines()
        except OSError:
            return ""
        steps = [line.strip() for line in lines if re.match(r"\s*[\d,]+/", line)]
        return steps[-1] if steps else ""


def wait_for(lock, title: str, stopped: list) -> bool:
    """Have the lock of a run's folder, which the run itself keeps while it lives; False if a signal came before that."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    told = False
    while not stopped:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not told:
                print(f"{title} is still running from an earlier call: waiting for it")
            told = True
            time.sleep(0.2)
    return False


def plan(folder: Path) -> list[Child]:
    """The runs of the study, seed by seed, so that each arm has a first result early. Raises ValueError if it makes no sense."""
    if sum(map(bool, (axes, zipped, arms))) > 1 and arms:
        raise ValueError("a study has axes and zipped keys, or named arms: not both")
    made = {}
    if arms:
        made = dict(arms)
    else:
        for key, values in {**axes, **zipped}.items():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"the values of {key} are a list, not {values!r}")
        if len({len(v) for v in zipped.values()}) > 1:
            raise ValueError(f"zipped keys have equally many values: {zipped}")
        together = [dict(zip(zipped, values)) for values in zip(*zipped.values())] or [{}]
        for values in itertools.product(*axes.values()):
            for more in together:
                keys = {**dict(zip(axes, values)), **more}
                made[" ".join(f"{k}={v}" for k, v in keys.items()) or "all"] = keys
    known = set(read_keys(str(ROOT / "train.py")))
    for arm, keys in made.items():
        if not isinstance(keys, dict):
            raise ValueError(f"arm {arm}: its keys are a dict, not {keys!r}")
        for key in keys.keys() - known:  # told before the first hour is spent
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"arm {arm}: train.py has no key {key}" + (f" (did you mean {close[0]}?)" if close else "")
            )
        if taken := {"seed", "out_dir", "device", "resume"} & keys.keys():
            raise ValueError(f"arm {arm}: {', '.join(sorted(taken))} belong to the study, not to an arm")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={seeds}: give at least one, each once")
    children = [Child(arm, keys, seed, folder) for seed in seeds for arm, keys in made.items()]
    if len({c.folder for c in children}) < len(children):
        raise ValueError("two arms have the same name but for signs that a folder cannot have")
    return children


def ask_train(child: Child) -> dict:
    """Parameters, tokens and FLOPs of a run, from train.py --dry_run. Raises ValueError with train.py's own words."""
    command = [sys.executable, str(ROOT / "train.py"), *child.command, "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{child.arm}: train.py says {words[-1].removeprefix('error: ')}")

    def number(pattern: str) -> float:
        found = re.search(pattern, done.stdout)
        return float(found.group(1).replace(",", "")) if found else math.nan

    return {
        "parameters": number(r"model: ([\d,]+) parameters"),
        "tokens": number(r"steps, ([\d,]+)"),
        "flops": number(r"; ([\d.e+]+) in all"),
    }


def flops_per_second(child: Child, cost: dict, children: list[Child]) -> float:
    """Training FLOP/s here: of the study's finished runs, else of a few steps by bench.py; nan where neither can say."""
    known = [c.read("results.json") for c in children if c.state() == "done"]
    rates = sorted(r["train_flops"] / r["train_seconds"] for r in known if r.get("train_seconds"))
    if rates:
        return rates[len(rates) // 2]
    output = child.folder.parent.parent / "bench.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "bench.py"),
        *child.command[:-2],
        "--steps=5",
        "--real_data=True",
        f"--output={output}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return math.nan
    found = json.loads(output.read_text(encoding="utf-8"))
    return found["tokens_per_second"] * cost["flops"] / cost["tokens"]


def estimate(children: list[Child]) -> None:
    """Print every command, and tokens, FLOPs and time of the whole."""
    costs = {}
    for child in children:
        if child.arm not in costs:
            costs[child.arm] = ask_train(child)
        print(f"{child.state():>6}  python train.py {shlex.join(child.command)}")
    print(f"\n{'arm':<40} {'parameters':>14} {'tokens':>14} {'FLOPs':>10}")
    for arm, cost in costs.items():
        print(f"{arm:<40} {cost['parameters']:>14,.0f} {cost['tokens']:>14,.0f} {cost['flops']:>10.3g}")
    left = [c for c in children if c.state() != "done"]
    tokens, flops = (sum(costs[c.arm][k] for c in left) for k in ("tokens", "flops"))
    rate = flops_per_second(children[0], costs[children[0].arm], children)
    seconds = flops / rate / max(1, max_parallel)
    when = (
        "time unknown"
        if math.isnan(seconds)
        else f"about {clock(seconds)} of training at {rate / 1e9:,.0f} GFLOP/s a run"
    )
    print(f"{len(left)} of {len(children)} runs to do: {tokens:,.0f} tokens, {flops:.3g} FLOPs, {when}")


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def run_all(children: list[Child]) -> None:
    """Run what is not done, max_parallel at a time. A signal stops the runs too, which save and are gone on with later."""
    waiting = [c for c in children if c.state() in ("new", "begun") or (retry and c.state() == "failed")]
    places = devices.split(",") if devices else [""]
    running: dict[Child, str] = {}
    before, total, began, stopped = len(children) - len(waiting), len(children), time.time(), []

    def stop(number, frame):
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    ended, live = before, Live()
    print(f"{name}: {total} runs, {ended} ended before")
    while (waiting and not stopped) or running:
        while waiting and not stopped and len(running) < max(1, max_parallel):
            child = waiting.pop(0)
            place = min(places, key=list(running.values()).count)
            child.start(place, stopped)
            running[child] = place
        if stopped and running:
            for child in running:
                if child.process:
                    child.process.send_signal(signal.SIGTERM)
            for child in running:
                if child.process:
                    child.process.wait()
        elif not any(c.process is None or c.process.poll() is not None for c in running):
            try:
                next(iter(running)).process.wait(interval)
            except subprocess.TimeoutExpired:
                pass
        for child in [c for c in running if c.ended()]:
            del running[child]
            if stopped:
                continue
            ended += 1
            state, found = child.state(), child.read("results.json")
            value = found.get(metric) if state == "done" else None
            what = (
                failure(child) if state != "done" else f"{metric} {value:.4f}" if value is not None else f"no {metric}"
            )
            left = (time.time() - began) / (ended - before) * (total - ended)
            live.draw([])
            print(f"{ended:>4}/{total}  {child.title:<44} {what}  left {clock(left)}", flush=True)
        rows = [f"   ...  {c.title}: {c.progress()}" for c in running]
        live.draw(
            [*rows, f"{ended} of {total} ended, {len(running)} running, {len(waiting)} to come"] if running else []
        )
    if stopped:
        print(
            f"stopped with {sum(c.state() == 'done' for c in children)} of {total} runs done: the same command goes on"
        )
        raise SystemExit(128 + stopped[0])


class Live:
    """Lines at the foot of a terminal that are drawn anew in their place. Elsewhere nothing is drawn."""

    def __init__(self):
        self.count = 0

    def draw(self, lines: list[str]) -> None:
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            up = f"\033[{self.count}A\033[J" if self.count else ""
            print(up + "".join(f"{line[:width]}\n" for line in lines), end="", flush=True)
            self.count = len(lines)


def failure(child: Child) -> str:
    lines = (child.folder / "train.log").read_text(encoding="utf-8").splitlines() if child.folder.exists() else []
    errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    return f"FAILED ({' '.join(errors[-1:])[:120]}), see {child.folder}/train.log"


def collect(children: list[Child]) -> list[dict]:
    """A row for each finished run: its arm, what was set, and results.json."""
    rows = []
    for child in children:
        if child.state() == "done":
            results, config = child.read("results.json"), child.read("config.json")
            row = {
                "arm": child.arm, "seed": child.seed, "path": str(child.folder), "step": results["total_steps"],
                "params": results["model_parameters"], **{k: config[k] for k in ("n_embd", "n_layer", "n_head")},
                **child.keys,
            }  # fmt: skip
            plain = {k: v for k, v in results.items() if not isinstance(v, dict | list) and k not in row}
            rows.append(row | plain)
    return rows


# 97.5 % quantiles of Student's t by degrees of freedom, then the normal's
T_QUANTILE = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def interval_of(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t; nan for fewer than two values)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = T_QUANTILE[n - 2] if n - 2 < len(T_QUANTILE) else 1.96 + 2.4 / (n - 1)
    return mean, t * spread / math.sqrt(n)


def compare(rows: list[dict], order: list[str]) -> list[dict]:
    """Each arm: n, mean, std, min, max of the metric, and its difference to the first arm over the seeds both have."""
    table = []
    by_arm = {
        arm: {r["seed"]: r[metric] for r in rows if r["arm"] == arm and r.get(metric) is not None} for arm in order
    }
    first = by_arm[order[0]]
    for arm in order:
        found = by_arm[arm]
        if not found:
            continue
        values = list(found.values())
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
        entry = dict(arm=arm, n=len(values), mean=mean, std=std, min=min(values), max=max(values))
        pairs = [found[s] - first[s] for s in found if s in first]
        if arm != order[0] and pairs:
            entry["difference"], half = interval_of(pairs)
            entry["interval"] = None if math.isnan(half) else [entry["difference"] - half, entry["difference"] + half]
        table.append(entry)
    return table


def fairness(children: list[Child]) -> list[str]:
    """What differs between the arms beside the keys of their axes, parameters and tokens included; [] if nothing does."""
    told, firsts = [], {}
    for child in children:
        if child.state() == "done":
            firsts.setdefault(child.arm, child)
    if not firsts:
        return []
    first, *others = firsts.values()
    config, results = first.read("config.json"), first.read("results.json")
    for other in others:
        theirs, got = other.read("config.json"), other.read("results.json")
        meant = (
            first.keys.keys() | other.keys.keys() | {"seed", "out_dir", "device", "resume", "n_kv_head", "mlp_hidden"}
        )
        for key in sorted(config.keys() & theirs.keys() - meant):
            if config[key] != theirs[key]:
                told.append(f"{other.arm}: {key} is {theirs[key]!r}, in {first.arm} {config[key]!r}")
        for key in other.keys:
            if key in theirs and theirs[key] != other.keys[key] and other.keys[key]:  # 0 stands for what is derived
                told.append(f"{other.arm}: {key} was to be {other.keys[key]!r} and is {theirs[key]!r}")
        for key in ("dataset", "block_size"):
            if config[key] != theirs[key]:
                told.append(f"{other.arm}: {key} {theirs[key]}, so other evaluation windows than {first.arm}")
        for key, least in (("model_parameters", 0.02), ("tokens", 0.0)):
            if abs(got[key] / results[key] - 1) > least:
                told.append(f"{other.arm}: {got[key]:,} {key.replace('model_', '')}, {first.arm} {results[key]:,}")
    return told


def report(children: list[Child], folder: Path) -> None:
    """Print and write the study's tables."""
    rows = collect(children)
    order = list(dict.fromkeys(c.arm for c in children))
    columns = list(dict.fromkeys(k for row in rows for k in row))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if rows and not any(isinstance(row.get(metric), int | float) for row in rows):
        known = [k for k in rows[0] if isinstance(rows[0][k], float)]
        raise ValueError(f"--metric={metric}: the runs have no such number, but {', '.join(known)}")
    table = compare(rows, order) if rows else []
    unfair, failed = fairness(children), [c.title for c in children if c.state() == "failed"]
    summary = dict(
        name=name, base=base, metric=metric, seeds=seeds, arms=table, differences=unfair, failed=failed, runs=rows
    )
    (folder / "sweep_summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if not table:
        print("no run has finished")
        return
    if arms:  # an ablation: the base, then the largest effect first
        table = table[:1] + sorted(table[1:], key=lambda e: -abs(e.get("difference", 0)))
    print(f"\n{metric:<40} {'n':>2} {'mean':>9} {'std':>8}   difference to {order[0]}, 95 % interval")
    for e in table:
        line = f"{e['arm']:<40} {e['n']:>2} {e['mean']:>9.4f} " + (
            f"{e['std']:>8.4f}" if e["std"] is not None else f"{'':>8}"
        )
        if "difference" in e:
            line += f"   {e['difference']:+.4f}"
            line += f"  [{e['interval'][0]:+.4f}, {e['interval'][1]:+.4f}]" if e["interval"] else "  (one seed)"
        print(line)
    for line in unfair:
        print(f"not alike: {line}")
    if not unfair and len(order) > 1:
        print("the arms differ in their own keys alone, with equal parameters (2 %) and tokens")
    for title in failed:
        print(f"failed: {title} (--retry runs it again)")
    print(
        f"{folder}/ has results.csv, results.jsonl, sweep_summary.json; python research/plot.py --results={folder} draws"
    )


def main() -> None:
    if not (axes or zipped or arms or base):
        raise ValueError("which study? Name its file, such as config/sweep/width.py")
    folder = Path(output_dir or f"out/{name}")
    children = plan(folder)
    if list_runs:
        print(json.dumps([dict(run=n, arm=c.arm, seed=c.seed) for n, c in enumerate(children)]))
        return
    if dry_run:
        estimate(children)
        return
    if runs:
        if not all(-1 <= n < len(children) for n in runs):
            raise ValueError(f"--runs={runs}: the study has runs 0 to {len(children) - 1}")
        mine = [children[n] for n in runs if n >= 0]
        run_all(mine)
        if -1 in runs:
            report(children, folder)
        if any(c.state() != "done" for c in mine):
            raise SystemExit(1)
        return
    run_all(children)
    report(children, folder)
    if any(c.state() == "failed" for c in children):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
