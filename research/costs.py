"""What a study will cost: its commands, parameters, tokens and FLOPs by train.py --dry_run, and its time by bench.py."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

from runs import ROOT

from common.files import read_json
from configurator import UserError, error_in


def run_script(script: str, *arguments: str) -> str:
    """What a script of this repository prints. Raises UserError with its error message if it fails."""
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise UserError(f"{script}: {error_in(done.stderr).removeprefix('error: ') or f'exit code {done.returncode}'}")
    return done.stdout


def read_costs(run) -> tuple[float, float, float]:
    """Parameters, tokens and FLOPs of a run as train.py --dry_run prints them; nan if it does not print them all."""
    output = run_script("train.py", *run.arguments, "--dry_run")
    found = re.search(r"model: ([\d,]+) parameters.*steps, ([\d,]+) tokens.*FLOPs: ([\d.e+]+)", output, re.DOTALL)
    numbers = [float(number.replace(",", "")) for number in found.groups()] if found else [math.nan] * 3
    return numbers[0], numbers[1], numbers[1] * numbers[2]


def print_costs(planned: list, folder: Path, max_parallel: int) -> None:
    """Print the commands, their costs, and how long they will take by a few steps of each arm in bench.py."""
    for run in planned:
        print(f"{run.state():>7}  python train.py {shlex.join(run.arguments)}")
    print(f"\n{'arm':<40} {'parameters':>14} {'tokens':>14} {'FLOPs':>10}")
    costs = {run.arm: read_costs(run) for run in {run.arm: run for run in reversed(planned)}.values()}
    for arm in dict.fromkeys(run.arm for run in planned):
        print("{:<40} {:>14,.0f} {:>14,.0f} {:>10.3g}".format(arm, *costs[arm]))
    remaining = [run for run in planned if run.state() != "done"]
    tokens, flops = (sum(costs[run.arm][n] for run in remaining) for n in (1, 2))
    folder.mkdir(parents=True, exist_ok=True)
    if not remaining:
        return print(f"all {len(planned)} runs are done")
    print("measuring a few steps of each arm ...")
    try:
        rates = {run.arm: run for run in remaining}  # arms of one size may differ in speed too
        rates = {arm: measure_rate(run, folder / "bench.json") for arm, run in rates.items()}
        seconds = sum(costs[run.arm][1] / rates[run.arm] for run in remaining)
        duration = f"about {format_time(seconds / max_parallel)} of training steps, by a few steps of each arm"
    except (UserError, ValueError):  # bench.py fails, or a cost is nan
        duration = "duration unknown"
    print(f"{len(remaining)} of {len(planned)} runs to do: {tokens:,.0f} tokens, {flops:.3g} FLOPs, {duration}")


def measure_rate(run, output: Path) -> float:
    """Tokens per second of a few steps of a run, by bench.py, which has no --seed and --out_dir, a run's last arguments."""
    run_script("bench.py", *run.arguments[:-2], "--steps=5", "--real_data=True", f"--output={output}")
    return read_json(output)["tokens_per_second"]


def format_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
