"""A pipeline: named steps with dependencies, run in order, without those that are up to date.

    python research/pipeline.py config/pipeline/reproduce_small.py --dry_run
    python research/pipeline.py config/pipeline/reproduce_small.py --step=fit           only this step
    python research/pipeline.py config/pipeline/reproduce_small.py --from_step=sweep    this step and its dependents

A step is a dict with the key `run` and any of the others:
  run                the command; a word that ends in .py is a script of this repository, anything else a program
  after              names of the steps it depends on
  inputs, outputs    files or folders; a step that succeeded is up to date while its outputs are newer than its inputs
  env                environment variables
  retries            how often to repeat the step if it fails
Writes out/pipelines/<name>.json.
"""

import graphlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from runs import ROOT, catch_signals, split_args, wait_for

from common.files import atomic_write, read_json
from configurator import UserError, check_choice, configure, short_errors

name = "pipeline"  # name of the pipeline
steps: dict = {}  # step -> dict(run=..., after=[...], inputs=[...], outputs=[...], env={...}, retries=0)
env: dict = {}  # environment variables for every step
step = ""  # run only this step, or these steps (a,b or --step=a --step=b), even if they are up to date
from_step = ""  # run only this step and those that depend on it
dry_run = False  # print what would run
continue_on_error = False  # after a failure, run the steps that do not depend on the failed one
force = False  # run steps that are up to date too
output_dir = "out/pipelines"  # folder for the report

DEFAULTS = {"run": "", "after": [], "inputs": [], "outputs": [], "env": {}, "retries": 0}


def sort_steps(steps: dict, env: dict) -> dict[str, dict]:
    """The steps with all keys and all of env, each after those it depends on. Raises UserError if one is wrong."""
    for title, s in steps.items():
        if not isinstance(s, dict) or not s.get("run"):
            raise UserError(f"step {title}: run is missing, the command of the step")
        for key, value in s.items():
            if key not in DEFAULTS:
                raise UserError(f"step {title}: unknown key {key}; the keys are {', '.join(DEFAULTS)}")
            if type(value) is not type(DEFAULTS[key]):
                raise UserError(f"step {title}: {key} must be a {type(DEFAULTS[key]).__name__}, not {value!r}")
        split_args(s["run"], f"step {title}: run")
        if s.get("retries", 0) < 0:
            raise UserError(f"step {title}: retries must be at least 0, not {s['retries']}")
        if unknown := [other for other in s.get("after", []) if other not in steps]:
            raise UserError(f"step {title}: runs after {unknown[0]}, which is not a step ({', '.join(steps)})")
    dependencies = {title: s.get("after", []) for title, s in steps.items()}
    try:
        order = list(graphlib.TopologicalSorter(dependencies).static_order())
    except graphlib.CycleError as e:
        raise UserError(f"these steps depend on each other: {', '.join(sorted(set(e.args[1])))}") from None
    complete = {title: DEFAULTS | steps[title] for title in order}
    for s in complete.values():
        s["env"] = {key: str(value) for key, value in (env | s["env"]).items()}
    return complete


def command_of(run: str, *more: str, python: str = sys.executable) -> list[str]:
    """A step's command and more arguments as a list. Scripts of this repository run with the given Python."""
    words = [*shlex.split(run), *more]
    return [python, str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else words


def has_new_outputs(s: dict) -> bool:
    """Whether a step has outputs and none is older than an input; a folder is as old as its newest file.

    A file that the command names, such as a study, is an input too.
    """

    def last_write(path: str) -> float:
        files = [p for p in (Path(path), *Path(path).rglob("*")) if p.is_file()]
        return max((p.stat().st_mtime for p in files), default=0.0)

    if not s["outputs"] or not all(Path(p).exists() for p in s["inputs"] + s["outputs"]):
        return False
    named = [word for word in shlex.split(s["run"])[1:] if os.path.isfile(word)]
    return max(map(last_write, s["inputs"] + named), default=0.0) <= min(map(last_write, s["outputs"]))


def run_step(title: str, s: dict, signals: list[int]) -> dict:
    """Run a step, again if it fails and has retries. Passes a signal on to it. Returns its entry of the report."""
    start_time = time.time()
    for attempt in range(1, 2 + s["retries"]):
        print(f"== {title}: {s['run']}" + (f" (attempt {attempt})" if attempt > 1 else ""))
        try:
            exit_code = wait_for(subprocess.Popen(command_of(s["run"]), env=os.environ | s["env"]), signals)
        except OSError as e:
            print(f"{title}: {e.strerror}: {e.filename}")
            exit_code = 127
        if exit_code == 0 or signals:
            break
    missing = [p for p in s["outputs"] if not Path(p).exists()]
    if exit_code == 0 and missing:
        print(f"{title}: its outputs {', '.join(missing)} do not exist")
    seconds = round(time.time() - start_time, 2)
    print(f"{title}: exit code {exit_code} after {seconds:.1f} s")
    state = "failed" if exit_code or missing else "done"
    return dict(state=state, exit=exit_code, attempts=attempt, seconds=seconds)


def main() -> None:
    if not steps:
        raise UserError("no steps given: name a pipeline file, such as config/pipeline/reproduce_small.py")
    ordered = sort_steps(steps, env)
    only = [title for title in step.split(",") if title]
    for key, value in (*(("step", title) for title in only), ("from_step", from_step)):
        if value:
            check_choice(key, value, ordered)
    chosen = set(only) or ({from_step} if from_step else set(ordered))
    for title, s in ordered.items():
        if from_step and chosen & set(s["after"]):
            chosen.add(title)
    path = Path(output_dir) / f"{name}.json"
    commands = read_json(path).get("commands", {})  # step -> what it ran last
    last = read_json(path).get("last", {})  # step -> done, failed, or running if the pipeline was killed meanwhile
    report = dict(name=name, started=time.strftime("%Y-%m-%d %H:%M:%S"), steps=[], last=last, commands=commands)
    would_run, failed = set(), set()  # would_run: only in a dry run, where no output becomes newer
    signals = catch_signals()

    def is_current(title: str, s: dict) -> bool:
        return not (force or step) and commands.get(title, [s["run"], s["env"]]) == [s["run"], s["env"]]

    def write_report() -> None:
        if not dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(report, indent=1))

    for title in [title for title in ordered if title in chosen]:
        s, after = ordered[title], set(ordered[title]["after"])
        succeeded = last.get(title, "done") == "done"
        if blocked := sorted(failed & after):
            entry = {"state": f"not run: {', '.join(blocked)} failed"}
        elif is_current(title, s) and succeeded and not would_run & after and has_new_outputs(s):
            entry = {"state": "up to date"}
        elif dry_run:
            entry = {"state": f"to run: {s['run']}"}
            would_run.add(title)
        else:
            last[title], commands[title] = "running", [s["run"], s["env"]]
            write_report()
            entry = run_step(title, s, signals)
            last[title] = entry["state"]
        print(f"{title}: {entry['state']}")
        if entry["state"] == "failed" or blocked:
            failed.add(title)
        report["steps"].append({"step": title, "run": s["run"]} | entry)
        write_report()
        if signals or (failed and not continue_on_error):
            break
    if not dry_run:
        print(f"{path}: {sum(e['state'] == 'done' for e in report['steps'])} done, {len(failed)} failed")
    if signals or failed:
        raise SystemExit(128 + signals[0] if signals else 1)


if __name__ == "__main__":
    with short_errors():
        given = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--step=")]
        others = [a for a in sys.argv[1:] if not a.startswith("--step=")]
        configure(globals(), others + [f"--step={','.join(given)}"] * bool(given))
        main()
