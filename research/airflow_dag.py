"""A pipeline file as an Airflow 3 DAG named gpt_research_pipeline: one task per step, with its retries.

Make this folder Airflow's dags_folder, or link this file into it, and set these environment variables:

    GPT_PIPELINE   the pipeline file (default: config/pipeline/reproduce_small.py)
    GPT_PYTHON     the Python that has torch; Airflow may run in an environment without it
    GPT_WORK_DIR   the folder with data/ and out/, on storage that all workers share (default: this repository)
    GPT_POOL       the Airflow pool whose slots the steps take, such as one slot for each GPU (default: default_pool)

    airflow dags test gpt_research_pipeline

A sweep becomes three tasks: one lists its runs, a mapped one runs them on Airflow's workers, and one writes the tables.
Needs apache-airflow (pip install -e '.[airflow]').
"""

import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pipeline import ROOT, command_of, sort_steps  # noqa: E402

from configurator import run_file  # noqa: E402

from airflow.providers.standard.operators.bash import BashOperator  # noqa: E402
from airflow.sdk import DAG, task  # noqa: E402

PIPELINE = os.environ.get("GPT_PIPELINE", str(ROOT / "config" / "pipeline" / "reproduce_small.py"))
WORK_DIR = os.environ.get("GPT_WORK_DIR", str(ROOT))
worker_command = partial(command_of, python=os.environ.get("GPT_PYTHON", sys.executable))


@task
def list_runs(run: str) -> list[str]:
    """The command of each run of a sweep."""
    command = worker_command(run, "--list_runs", "--retry")
    done = subprocess.run(command, cwd=WORK_DIR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return [shlex.join(worker_command(run, "--retry", f"--runs=[{n}]")) for n in range(len(json.loads(done.stdout)))]


def add_step(title: str, s: dict):
    """Add the tasks of a step. Returns the first and the last one."""
    pool = os.environ.get("GPT_POOL", "default_pool")
    options = dict(cwd=WORK_DIR, env=s["env"], append_env=True, retries=s["retries"], pool=pool)
    if not shlex.split(s["run"])[0].endswith("sweep.py"):
        only = BashOperator(task_id=title, bash_command=shlex.join(worker_command(s["run"])), **options)
        return only, only
    commands = list_runs.override(task_id=f"{title}_list")(s["run"])
    runs = BashOperator.partial(task_id=f"{title}_run", **options).expand(bash_command=commands)
    tables = BashOperator(task_id=title, bash_command=shlex.join(worker_command(s["run"], "--runs=[-1]")), **options)
    runs >> tables
    return commands, tables


keys = run_file(PIPELINE, {})
with DAG("gpt_research_pipeline", schedule=None, doc_md=f"{keys.get('name', 'pipeline')}, from {PIPELINE}") as dag:
    last_tasks = {}
    for title, s in sort_steps(keys["steps"], keys.get("env", {})).items():
        first, last_tasks[title] = add_step(title, s)
        for dependency in s["after"]:
            last_tasks[dependency] >> first
