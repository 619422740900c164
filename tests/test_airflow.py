"""The pipeline as a DAG in a real Airflow, installed in an environment of its own in pytest's cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from studies import TINY

import pytest


@pytest.fixture(scope="module")
def airflow(request) -> Path:
    """The airflow command."""
    folder = Path(request.config.cache.mkdir("airflow")) / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "apache-airflow>=3,<4"], check=True)
        (folder / "complete").touch()
    return folder / "bin" / "airflow"


def test_airflow_imports_the_dag_and_runs_a_small_pipeline(airflow, chars):
    (chars / "study.py").write_text(f"name = 'study'\nbase = {TINY!r}\naxes = {{'n_embd': [16, 32]}}\nseeds = [1]\n")
    steps = {
        "sweep": {"run": "research/sweep.py study.py --interval=0.2"},
        "plot": {"run": "research/plot.py --results=out/study", "after": ["sweep"], "retries": 2},
        "env": {"run": 'python -c \'import os; open("env", "w").write(os.environ["WORD"])\'', "env": {"WORD": 7}},
    }
    (chars / "pipe.py").write_text(f"name = 'pipe'\nenv = {{'OMP_NUM_THREADS': 1}}\nsteps = {steps!r}\n")
    env = os.environ | {
        "AIRFLOW_HOME": str(chars / "home"), "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "research"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "GPT_PIPELINE": str(chars / "pipe.py"), "GPT_PYTHON": sys.executable,
        "GPT_WORK_DIR": str(chars), "GPT_POOL": "gpu", "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
    }  # fmt: skip
    env.pop("PYTHONPATH", None)

    def run_airflow(*arguments) -> str:
        done = subprocess.run(
            [airflow, *arguments], env=env, cwd=chars, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run_airflow("db", "migrate")
    run_airflow("pools", "set", "gpu", "1", "one run at a time")
    assert "No data found" in run_airflow("dags", "list-import-errors")
    log = run_airflow("dags", "test", "gpt_research_pipeline")
    ended = re.findall(r"end task task_id=(\w+) map_index=(-?\d+)", log)
    assert {("sweep_list", "-1"), ("sweep_run", "0"), ("sweep_run", "1"), ("sweep", "-1"), ("plot", "-1")} < set(ended)
    assert ended.index(("sweep", "-1")) < ended.index(("plot", "-1"))
    assert "state=success" in log
    assert len((chars / "out" / "study" / "results.jsonl").read_text().splitlines()) == 2
    assert (chars / "out" / "study" / "comparison.png").exists() and (chars / "env").read_text() == "7"
