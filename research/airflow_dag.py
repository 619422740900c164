"""A pipeline file as an Airflow 3 DAG named gpt_research_pipeline: one task a step, the same commands, order and retries.

Put this file's folder on Airflow's dags_folder, or link it there, and say by environment variables

    GPT_PIPELINE   the pipeline file (config/pipeline/reproduce_small.py)
    GPT_PYTHON     the Python that has torch (Airflow's own environment need not)
    GPT_WORK_DIR   where data/ and out/ are (this repository); storage that all workers see

    airflow dags test gpt_research_pipeline

A sweep becomes a task that lists its runs, a mapped task with one instance a run, which Airflow's executor spreads over its
workers, and a task that writes the tables. Needs apache-airflow (pip install -e '.[airflow]').
"""

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "research")]

import pipeline  # noqa: E402
from airflow.providers.standard.operators.bash import BashOperator  # noqa: E402
from airflow.sdk import DAG, task  # noqa: E402

from configurator import run_file  # noqa: E402

PIPELINE = os.environ.get("GPT_PIPELINE", str(ROOT / "config" / "pipeline" / "reproduce_small.py"))
PYTHON = os.environ.get("GPT_PYTHON", sys.executable)
WORK_DIR = os.environ.get("GPT_WORK_DIR", str(ROOT))
command_of = partial(pipeline.command_of, python=PYTHON)


@task
def list_runs(run: str) -> list[str]:
    """The commands of a sweep's runs, one each."""
    listed = subprocess.run(
        command_of(run, "--list_runs", "--retry"), cwd=WORK_DIR, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise RuntimeError(listed.stderr.strip())
    return [shlex.join(command_of(run, "--retry", f"--runs=[{found['run']}]")) for found in json.loads(listed.stdout)]


def add_step(title: str, s: dict, env: dict):
    """The step's first and last task."""
    about = dict(
        cwd=WORK_DIR,
        env={**pipeline.strings(env), **pipeline.strings(s.get("env", {}))},
        append_env=True,
        retries=s.get("retries", 0),
    )
    if not s["run"].split()[0].endswith("sweep.py"):
        only = BashOperator(task_id=title, bash_command=shlex.join(command_of(s["run"])), **about)
        return only, only
    commands = list_runs.override(task_id=f"{title}_list")(s["run"])
    runs = BashOperator.partial(task_id=f"{title}_run", **about).expand(bash_command=commands)
    tables = BashOperator(task_id=title, bash_command=shlex.join(command_of(s["run"], "--runs=[-1]")), **about)
    runs >> tables
    return commands, tables


keys = run_file(PIPELINE, {})
with DAG(
    "gpt_research_pipeline", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=timezone.utc), catchup=False,
    doc_md=f"{keys.get('name', 'pipeline')}, from {PIPELINE}",
) as dag:  # fmt: skip
    ends = {}
    for title in pipeline.in_order(keys["steps"]):
        first, last = add_step(title, keys["steps"][title], keys.get("env", {}))
        for need in keys["steps"][title].get("after", []):
            ends[need] >> first
        ends[title] = last
