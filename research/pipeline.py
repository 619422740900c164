"""Named steps with dependencies, each a script of ours with its arguments: run what is out of date, in order.

    python research/pipeline.py config/pipeline/reproduce_small.py --dry_run
    python research/pipeline.py config/pipeline/reproduce_small.py
    python research/pipeline.py config/pipeline/reproduce_small.py --step=fit           that one alone
    python research/pipeline.py config/pipeline/reproduce_small.py --from_step=sweep    it and what comes after it

A step is a dict: `run`, the command ("train.py config/quickstart.py"; a name that ends in .py is one of our scripts, anything
else a program); and where they are wanted `after` (names of steps), `inputs` and `outputs` (files or folders; a step whose
outputs are all newer than its inputs is skipped, unless its last run failed or was cut off), `env` (variables), `retries`.
Leaves out/pipelines/<name>.json.
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
from configurator import configure, short_errors  # noqa: E402

name = "pipeline"  # what it is called
steps: dict = {}  # step -> dict(run=..., after=[...], inputs=[...], outputs=[...], env={...}, retries=0)
env: dict = {}  # variables for every step
step = ""  # this one alone, whether it is out of date or not
from_step = ""  # this one and all that come after it
dry_run = False  # print what would run
continue_on_error = False  # go on with what does not need the step that failed
force = False  # run what is up to date too
output_dir = "out/pipelines"  # where the report goes

FIELDS = {"run", "after", "inputs", "outputs", "env", "retries"}


def in_order(steps: dict) -> list[str]:
    """The steps, each behind those it needs, else as written. Raises ValueError for a step that is wrong or needs itself."""
    for title, s in steps.items():
        if not isinstance(s, dict) or not isinstance(s.get("run"), str) or not s["run"].strip():
            raise ValueError(f"step {title}: run is missing, the command as a string")
        if wrong := s.keys() - FIELDS:
            raise ValueError(f"step {title}: {', '.join(sorted(wrong))} is not among {', '.join(sorted(FIELDS))}")
        for key in ("after", "inputs", "outputs"):
            if not isinstance(s.get(key, []), list | tuple):
                raise ValueError(f"step {title}: {key} is a list, not {s[key]!r}")
        if not isinstance(s.get("retries", 0), int) or s.get("retries", 0) < 0:
            raise ValueError(f"step {title}: retries is a number of times, not {s['retries']!r}")
        try:
            shlex.split(s["run"])
        except ValueError as e:
            raise ValueError(f"step {title}: {s['run']}: {e}") from None
        for need in s.get("after", []):
            if need not in steps:
                raise ValueError(f"step {title}: comes after {need}, which is no step ({', '.join(steps)})")
    ordered: list[str] = []
    while len(ordered) < len(steps):
        ready = [t for t in steps if t not in ordered and all(n in ordered for n in steps[t].get("after", []))]
        if not ready:
            raise ValueError(f"these steps wait for one another: {', '.join(t for t in steps if t not in ordered)}")
        ordered.append(ready[0])
    return ordered


def command_of(run: str, *more: str, python: str = sys.executable) -> list[str]:
    """A step's command as a list, and more arguments; our scripts are run by that Python."""
    words = [*shlex.split(run), *more]
    return [python, str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else words


def after_all(title: str, steps: dict) -> set[str]:
    """The step and every one that needs it, directly or not."""
    found = {title}
    while more := {t for t, s in steps.items() if t not in found and found & set(s.get("after", []))}:
        found |= more
    return found


def newest(path: Path) -> float:
    """When a file, or the youngest one in a folder, was last written."""
    return (
        max((p.stat().st_mtime for p in path.rglob("*") if p.is_file()), default=0.0)
        if path.is_dir()
        else path.stat().st_mtime
    )


def up_to_date(s: dict) -> bool:
    """All outputs are there and none is older than an input (of a folder the youngest file counts)."""
    inputs, outputs = ([Path(p) for p in s.get(k, [])] for k in ("inputs", "outputs"))
    if not outputs or not all(p.exists() for p in outputs):
        return False
    return all(p.exists() and newest(p) <= min(map(newest, outputs)) for p in inputs)


def run_step(title: str, s: dict, stopped: list) -> tuple[int, int]:
    """Run it, again up to `retries` times if it fails. Returns (exit code, attempts). A signal is passed on, and waited for."""
    for attempt in range(1 + s.get("retries", 0)):
        if attempt:
            print(f"{title}: attempt {attempt + 1}")
        try:
            process = subprocess.Popen(
                command_of(s["run"]), env={**os.environ, **strings(env), **strings(s.get("env", {}))}
            )
        except OSError as e:
            print(f"{title}: {e.strerror}: {e.filename}")
            return 127, attempt + 1
        told = False
        while process.poll() is None:
            if stopped and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.05)
        code = process.returncode
        if not code or stopped:
            break
    return code, attempt + 1


def strings(variables: dict) -> dict[str, str]:
    return {k: str(v) for k, v in variables.items()}


def last_states(path: Path) -> dict[str, str]:
    """How each step ended when it was last run: done, failed, or running if the pipeline itself died then."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["last"]
    except (OSError, ValueError, KeyError):
        return {}


def write_report(folder: Path, report: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{report['name']}.json.part"
    part.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(part, folder / f"{report['name']}.json")


def main() -> None:
    if not steps:
        raise ValueError("there are no steps: name a pipeline's file, such as config/pipeline/reproduce_small.py")
    order = in_order(steps)
    for key, wanted in (("step", step), ("from_step", from_step)):
        if wanted and wanted not in steps:
            raise ValueError(f"--{key}={wanted}: the steps are {', '.join(order)}")
    chosen = {step} if step else after_all(from_step, steps) if from_step else set(order)
    folder, stopped, to_run, failed = Path(output_dir), [], set(), set()
    last = last_states(folder / f"{name}.json")
    report = dict(name=name, started=time.strftime("%Y-%m-%d %H:%M:%S"), steps=[], last=last)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    for title in (t for t in order if t in chosen):
        s = steps[title]
        entry = dict(step=title, run=s["run"])
        blocked = sorted(failed & set(s.get("after", [])))
        if blocked:
            entry["state"] = f"not run: {', '.join(blocked)} failed"
            failed.add(title)
        elif (
            not (force or step)
            and last.get(title, "done") == "done"
            and not to_run & set(s.get("after", []))
            and up_to_date(s)
        ):
            entry["state"] = "up to date"
        elif dry_run:
            entry["state"] = "to run"
            to_run.add(title)
        if "state" in entry:
            print(f"{title}: {entry['state']}" + (f": {s['run']}" if dry_run else ""))
        else:
            print(f"== {title}: {s['run']}", flush=True)
            began = time.time()
            last[title] = "running"
            write_report(folder, report)
            entry["exit"], entry["attempts"] = run_step(title, s, stopped)
            entry |= dict(seconds=round(time.time() - began, 2), state="failed" if entry["exit"] else "done")
            missing = [p for p in s.get("outputs", []) if not Path(p).exists()]
            if not entry["exit"] and missing:
                entry |= dict(state="failed", missing=missing)
                print(f"{title}: it did not make {', '.join(missing)}")
            print(
                f"== {title}: {entry['state']} in {entry['seconds']:.1f} s"
                + (f", exit code {entry['exit']}" if entry["exit"] else ""),
                flush=True,
            )
            last[title] = entry["state"]
            if entry["state"] == "failed":
                failed.add(title)
        report["steps"].append(entry)
        report["seconds"] = round(sum(e.get("seconds", 0) for e in report["steps"]), 2)
        if not dry_run:
            write_report(folder, report)
        if stopped or (failed and not continue_on_error):
            break
    if not dry_run:
        print(f"{folder}/{name}.json: {sum(e['state'] == 'done' for e in report['steps'])} done, {len(failed)} failed")
    if stopped:
        raise SystemExit(128 + stopped[0])
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
