"""How a training step's time and memory grow with batch, context, depth and ranks, and which of these are straight lines.

    python research/growth.py                                        a model that suits the device
    python research/growth.py --base="config/baby_gpu.py --compile=True" --axes="{'batch_size': [8, 16, 32, 64]}"

Each point is a process of bench.py, whose memory is its own. Leaves growth.csv and growth.png. Needs matplotlib
(pip install -e '.[research]').
"""

import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plot import COLOURS, figure  # noqa: E402

from configurator import configure, error_of, short_errors  # noqa: E402

base = ""  # arguments of train.py for every point; empty: GPT-2 124M on a GPU, config/baby_cpu.py elsewhere
axes: dict = {}  # key -> values; one key grows at a time; empty: all four, doubling
steps = 5  # training steps to time at each point, after three to warm up
vocab_size = 50257  # ids of the synthetic tokens
output_dir = "out/growth"  # where the table and the picture go

AXES = {
    "batch_size": [1, 2, 4, 8, 16],
    "block_size": [64, 128, 256, 512, 1024],
    "n_layer": [1, 2, 4, 8, 16],
    "ranks": [1, 2, 4, 8],  # processes under torchrun, one to a GPU or core
}
MEASURES = {"ms_a_step": "ms a step", "peak_memory_mib": "peak MiB"}


def measure(axis: str, value: int, shared: list[str]) -> dict:
    """bench.py's figures at one point. Raises RuntimeError with its error if it does not run."""
    ranks = value if axis == "ranks" else 1
    grown = [] if axis == "ranks" else [f"--{axis}={value}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "point.json"
        command = [sys.executable, *launcher, str(ROOT / "bench.py"), *shared, "--total_batch_tokens=0", *grown]
        command += [f"--gradient_accumulation_steps={ranks}", f"--vocab_size={vocab_size}", f"--steps={steps}"]
        command += ["--repeat=1", f"--output={told}"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(error_of(done.stderr) or f"exit code {done.returncode}")
        figures = json.loads(told.read_text(encoding="utf-8"))
    return {"axis": axis, "value": value} | {k: figures[k] for k in ("tokens_per_second", *MEASURES)}


def draw_and_tell(rows: list[dict], drawn: list[str], path: Path) -> None:
    """A column of panels for each axis; prints for each panel how it grows."""
    plt, fig, panels = figure(3.4 * len(drawn), 6, (len(MEASURES), len(drawn)))
    for column, axis in enumerate(drawn):
        own = [r for r in rows if r["axis"] == axis]
        x = np.array([r["value"] for r in own], float)
        for panel, (key, unit) in zip(panels[:, column], MEASURES.items()):
            if None in (y := [r[key] for r in own]):  # Windows does not tell the memory
                continue
            y = np.array(y)
            slope, level = np.polyfit(x, y, 1)
            power = np.log2(y[-1] / y[-2]) / np.log2(x[-1] / x[-2])
            off = np.abs(level + slope * x - y).max() / y.max()
            panel.plot(x, y, "o-", color=COLOURS[0], label="measured")
            panel.plot(x, level + slope * x, "--", color=COLOURS[1], label=f"{level:,.3g} + {slope:,.3g} x")
            panel.set(xlabel=axis, ylabel=unit, ylim=(0, 1.08 * y.max()))
            panel.locator_params(axis="x", integer=True)
            panel.legend(fontsize=7, frameon=False)
            shape = "a straight line" if off < 0.05 else f"no straight line (up to {off:.0%} off)"
            grows = f"{axis:>12}: {unit} is {shape}, at the end it grows as {axis}^{power:.2f}"
            if key == "ms_a_step" and axis == "batch_size" and slope > 0:
                a_sequence = own[0]["tokens_per_second"] * own[0]["ms_a_step"] / own[0]["value"]
                grows += f"; {a_sequence / slope:,.0f} tokens/s is the limit it approaches"
            print(grows)
    fig.savefig(path)
    plt.close(fig)


def main() -> None:
    wanted = axes or AXES
    for axis, values in wanted.items():
        if axis not in AXES:
            raise ValueError(f"--axes: {axis} is not one of {', '.join(AXES)}")
        if not (values and isinstance(values, list) and all(isinstance(v, int) and v > 0 for v in values)):
            raise ValueError(f"--axes: the values of {axis} are a list of whole numbers from 1 on, not {values}")
    if steps < 1:
        raise ValueError(f"--steps={steps}: must be at least 1")
    figure()[0].close("all")  # matplotlib is missing now, or not after an hour
    cuda = torch.cuda.is_available()
    try:
        shared = shlex.split(base or ("" if cuda else f"'{ROOT}/config/baby_cpu.py' --dropout=0.0"))
    except ValueError as e:
        raise ValueError(f"--base={base}: {e}") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.cuda.device_count() if cuda else cores
    rows, folder = [], Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for axis, values in wanted.items():
        for value in sorted(set(values)):
            if axis == "ranks" and value > most:
                print(f"{axis:>12} {value:>6} are more than the {'GPUs' if cuda else 'cores'} here, {most}")
                break
            try:
                row = measure(axis, value, shared)
            except RuntimeError as e:
                print(f"{axis:>12} {value:>6} does not run: {e}")
                break
            rows.append(row)
            print(
                f"{axis:>12} {value:>6} {row['ms_a_step']:>12.1f} ms {row['tokens_per_second']:>12,.0f} tokens/s "
                f"{row['peak_memory_mib'] or math.nan:>8,.0f} MiB"
            )
    if not rows:
        raise ValueError(f"--base={base}: nothing could be measured")
    with open(folder / "growth.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    drawn = [a for a in wanted if sum(r["axis"] == a for r in rows) > 1]
    if drawn:
        draw_and_tell(rows, drawn, folder / "growth.png")
    print(f"{folder}/ has growth.csv{', growth.png' if drawn else '; a single point makes no curve'}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
