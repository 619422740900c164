"""A pipeline: named steps with dependencies, run in order, without those that are up to date.

    python research/pipeline.py config/pipeline/reproduce_small.py --dry_run
    python research/pipeline.py config/pipeline/reproduce_small.py
    python research/pipeline.py config/pipeline/reproduce_small.py --step=fit           only this step
    python research/pipeline.py config/pipeline/reproduce_small.py --from_step=sweep    this step and all that depend on it

A step is a dict with the key `run` and any of the others:
  run                the command; a word that ends in .py is a script of this repository, anything else a program
  after              names of the steps it depends on
  inputs, outputs    files or folders; a step is up to date when its last run succeeded and all outputs are newer than the inputs
  env                environment variables
  retries            how often to repeat the step if it fails
Writes out/pipelines/<name>.json.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from commands import catch_signals, split_command  # noqa: E402

from common.files import atomic_write  # noqa: E402
from configurator import UserError, check_choice, configure, short_errors  # noqa: E402

name = "pipeline"  # name of the pipeline
steps: dict = {}  # step -> dict(run=..., after=[...], inputs=[...], outputs=[...], env={...}, retries=0)
env: dict = {}  # environment variables for every step
step = ""  # run only this step, even if it is up to date
from_step = ""  # run only this step and those that depend on it
dry_run = False  # print what would run
continue_on_error = False  # after a failure, run the steps that do not depend on the failed one
force = False  # run steps that are up to date too
output_dir = "out/pipelines"  # folder for the report

LIST = (list, tuple)
FIELDS = {"run": (str,), "after": LIST, "inputs": LIST, "outputs": LIST, "env": (dict,), "retries": (int,)}


def sort_steps(steps: dict) -> list[str]:
    """The names of the steps as written, but each after those it depends on. Raises UserError if that is impossible."""
    for title, s in steps.items():
        if not isinstance(s, dict) or not s.get("run"):
            raise UserError(f"step {title}: run is missing, the command of the step")
        for key, value in s.items():
            if key not in FIELDS:
                raise UserError(f"step {title}: unknown key {key}; the keys are {', '.join(FIELDS)}")
            if not isinstance(value, FIELDS[key]):
                raise UserError(f"step {title}: {key} must be a {FIELDS[key][0].__name__}, not {value!r}")
        if s.get("retries", 0) < 0:
            raise UserError(f"step {title}: retries must be at least 0, not {s['retries']}")
        if not split_command(s["run"], f"step {title}: run"):
            raise UserError(f"step {title}: run is empty")
        if unknown := [other for other in s.get("after", []) if other not in steps]:
            raise UserError(f"step {title}: runs after {unknown[0]}, which is not a step ({', '.join(steps)})")
    ordered: list[str] = []
    while remaining := [title for title in steps if title not in ordered]:
        ready = [title for title in remaining if set(steps[title].get("after", [])) <= set(ordered)]
        if not ready:
            raise UserError(f"these steps depend on each other: {', '.join(remaining)}")
        ordered.append(ready[0])
    return ordered


def command_of(run: str, *more: str, python: str = sys.executable) -> list[str]:
    """A step's command and more arguments as a list. Scripts of this repository run with the given Python."""
    words = [*shlex.split(run), *more]
    return [python, str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else words


def with_dependents(title: str, steps: dict) -> set[str]:
    """The step and all steps that depend on it, directly or not."""
    found = {title}
    while more := {t for t, s in steps.items() if t not in found and found & set(s.get("after", []))}:
        found |= more
    return found


def last_write(path: Path) -> float:
    """When a file, or the newest file in a folder, was last written."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return max((p.stat().st_mtime for p in files), default=0.0)


def has_new_outputs(s: dict) -> bool:
    """Whether a step has outputs, all of them exist, and none is older than an input."""
    inputs, outputs = ([Path(p) for p in s.get(key, [])] for key in ("inputs", "outputs"))
    if not outputs or not all(p.exists() for p in inputs + outputs):
        return False
    return max(map(last_write, inputs), default=0.0) <= min(map(last_write, outputs))


def to_strings(variables: dict) -> dict[str, str]:
    return {key: str(value) for key, value in variables.items()}


def run_step(title: str, s: dict, signals: list[int]) -> dict:
    """Run a step, up to `retries` times again if it fails, and pass a signal on to it. Returns its entry of the report."""
    start_time = time.time()
    variables = os.environ | to_strings(env) | to_strings(s.get("env", {}))
    for attempt in range(1, 2 + s.get("retries", 0)):
        if attempt > 1:
            print(f"{title}: attempt {attempt}")
        try:
            process = subprocess.Popen(command_of(s["run"]), env=variables)
        except OSError as e:
            print(f"{title}: {e.strerror}: {e.filename}")
            exit_code = 127
            break
        while process.poll() is None and not signals:
            time.sleep(0.05)
        if signals:
            process.send_signal(signal.SIGTERM)
        exit_code = process.wait()
        if not exit_code or signals:
            break
    entry = dict(exit=exit_code, attempts=attempt, seconds=round(time.time() - start_time, 2))
    missing = [p for p in s.get("outputs", []) if not Path(p).exists()]
    if not exit_code and missing:
        print(f"{title}: its outputs {', '.join(missing)} do not exist")
        entry["missing"] = missing
    return entry | {"state": "failed" if exit_code or missing else "done"}


def read_last_states(path: Path) -> dict[str, str]:
    """How the last run of each step ended: done, failed, or running if the pipeline was killed meanwhile."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["last"]
    except (OSError, ValueError, KeyError):
        return {}


def main() -> None:
    if not steps:
        raise UserError("no steps given: name a pipeline file, such as config/pipeline/reproduce_small.py")
    order = sort_steps(steps)
    for key, value in (("step", step), ("from_step", from_step)):
        if value:
            check_choice(key, value, order)
    chosen = {step} if step else with_dependents(from_step, steps) if from_step else set(order)
    path = Path(output_dir) / f"{name}.json"
    last = read_last_states(path)
    report = dict(name=name, started=time.strftime("%Y-%m-%d %H:%M:%S"), steps=[], last=last)
    would_run, failed = set(), set()  # would_run: only in a dry run, where no output becomes newer
    signals = catch_signals()

    def write_report() -> None:
        if not dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(report, indent=1))

    for title in [t for t in order if t in chosen]:
        s, after = steps[title], set(steps[title].get("after", []))
        entry = dict(step=title, run=s["run"])
        succeeded = last.get(title, "done") == "done"
        if blocked := sorted(failed & after):
            entry["state"] = f"not run: {', '.join(blocked)} failed"
        elif not (force or step) and succeeded and not would_run & after and has_new_outputs(s):
            entry["state"] = "up to date"
        elif dry_run:
            entry["state"] = "to run"
            would_run.add(title)
        if "state" in entry:
            print(f"{title}: {entry['state']}" + (f": {s['run']}" if dry_run else ""))
        else:
            print(f"== {title}: {s['run']}", flush=True)
            last[title] = "running"
            write_report()
            entry |= run_step(title, s, signals)
            last[title] = entry["state"]
            exit_code = f", exit code {entry['exit']}" if entry["exit"] else ""
            print(f"== {title}: {entry['state']} in {entry['seconds']:.1f} s{exit_code}", flush=True)
        if entry["state"] == "failed" or blocked:
            failed.add(title)
        report["steps"].append(entry)
        report["seconds"] = round(sum(e.get("seconds", 0) for e in report["steps"]), 2)
        write_report()
        if signals or (failed and not continue_on_error):
            break
    if not dry_run:
        print(f"{path}: {sum(e['state'] == 'done' for e in report['steps'])} done, {len(failed)} failed")
    if signals:
        raise SystemExit(128 + signals[0])
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
