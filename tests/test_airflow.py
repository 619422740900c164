"""The pipeline as a DAG in a real Airflow, installed in an environment of its own in pytest's cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from studies import TINY

import pytest

COMMANDS = """
import sys
from airflow.__main__ import main
for command in sys.stdin.read().splitlines():
    sys.argv = ["airflow", *command.split("|")]
    try:
        main()
    except SystemExit as e:
        assert not e.code, command
"""


@pytest.fixture(scope="module")
def airflow(request) -> Path:
    """The Python of Airflow's environment."""
    folder = Path(request.config.cache.mkdir("airflow")) / f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "apache-airflow>=3,<4"], check=True)
        (folder / "complete").touch()
    return folder / "bin" / "python"


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

    # The commands of `airflow`, in one process: its import takes seconds.
    commands = "db|migrate\npools|set|gpu|1|one run at a time\ndags|list-import-errors\ndags|test|gpt_research_pipeline"
    done = subprocess.run(
        [airflow, "-c", COMMANDS], env=env, cwd=chars, input=commands, capture_output=True, text=True, timeout=400, check=False
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0 and "No data found" in done.stdout, log
    ended = re.findall(r"end task task_id=(\w+) map_index=(-?\d+)", log)
    assert {("sweep_list", "-1"), ("sweep_run", "0"), ("sweep_run", "1"), ("sweep", "-1"), ("plot", "-1")} < set(ended)
    assert ended.index(("sweep", "-1")) < ended.index(("plot", "-1"))
    assert "state=success" in log
    assert len((chars / "out" / "study" / "results.jsonl").read_text().splitlines()) == 2
    assert (chars / "out" / "study" / "comparison.png").exists() and (chars / "env").read_text() == "7"
