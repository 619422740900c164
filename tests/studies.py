"""What the tests of research/ share: its scripts as commands, small studies, and their results."""

import json
from pathlib import Path

from conftest import ROOT, call

TINY = (
    "--dataset=chars --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1 "
    "--max_iters=3 --eval_interval=0 --warmup_iters=1 --learning_rate=1e-3 --device=cpu --compile=False --dtype=float32"
)
STUDIES = sorted((ROOT / "config" / "sweep").glob("*.py"))


def run_research(script: str, *arguments, cwd: Path, code=0) -> str:
    done = call(f"research/{script}", *arguments, cwd=cwd, timeout=400)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_study(folder: Path, **keys) -> Path:
    path = folder / "study.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in {"name": "study", "base": TINY, **keys}.items()))
    return path


def read_jsonl(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
