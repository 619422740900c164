"""A pipeline file as an Airflow 3 DAG named gpt_research_pipeline: one task per step, the same commands, order and retries.

Make this folder Airflow's dags_folder, or link this file into it, and set these environment variables:

    GPT_PIPELINE   the pipeline file (default: config/pipeline/reproduce_small.py)
    GPT_PYTHON     the Python that has torch; Airflow may run in an environment without it
    GPT_WORK_DIR   the folder with data/ and out/, on storage that all workers share (default: this repository)

    airflow dags test gpt_research_pipeline

A sweep becomes three tasks: one lists its runs; a mapped one has an instance for each run, which Airflow's executor
distributes over its workers; one writes the tables. Needs apache-airflow (pip install -e '.[airflow]').
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

from airflow.providers.standard.operators.bash import BashOperator  # noqa: E402
from airflow.sdk import DAG, task  # noqa: E402
from pipeline import command_of, sort_steps, to_strings  # noqa: E402

from configurator import run_file  # noqa: E402

PIPELINE = os.environ.get("GPT_PIPELINE", str(ROOT / "config" / "pipeline" / "reproduce_small.py"))
PYTHON = os.environ.get("GPT_PYTHON", sys.executable)
WORK_DIR = os.environ.get("GPT_WORK_DIR", str(ROOT))
worker_command = partial(command_of, python=PYTHON)


@task
def list_runs(run: str) -> list[str]:
    """The command of each run of a sweep."""
    command = worker_command(run, "--list_runs", "--retry")
    done = subprocess.run(command, cwd=WORK_DIR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    numbers = [listed["run"] for listed in json.loads(done.stdout)]
    return [shlex.join(worker_command(run, "--retry", f"--runs=[{number}]")) for number in numbers]


def add_step(title: str, s: dict, env: dict):
    """Add the tasks of a step. Returns the first and the last one."""
    variables = to_strings(env) | to_strings(s.get("env", {}))
    options = dict(cwd=WORK_DIR, env=variables, append_env=True, retries=s.get("retries", 0))
    if not s["run"].split()[0].endswith("sweep.py"):
        only = BashOperator(task_id=title, bash_command=shlex.join(worker_command(s["run"])), **options)
        return only, only
    commands = list_runs.override(task_id=f"{title}_list")(s["run"])
    runs = BashOperator.partial(task_id=f"{title}_run", **options).expand(bash_command=commands)
    tables = BashOperator(task_id=title, bash_command=shlex.join(worker_command(s["run"], "--runs=[-1]")), **options)
    runs >> tables
    return commands, tables


keys = run_file(PIPELINE, {})
doc = f"{keys.get('name', 'pipeline')}, from {PIPELINE}"
start = datetime(2024, 1, 1, tzinfo=timezone.utc)
with DAG("gpt_research_pipeline", schedule=None, start_date=start, catchup=False, doc_md=doc) as dag:
    last_tasks = {}
    for title in sort_steps(keys["steps"]):
        first, last_tasks[title] = add_step(title, keys["steps"][title], keys.get("env", {}))
        for dependency in keys["steps"][title].get("after", []):
            last_tasks[dependency] >> first
