"""Several ranks and several hosts: ranks that die, jobs that start again, hosts that leave and come back."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT, SMALL, Script, call, free_port, readme_block, two_ranks

from common.checkpoint import load_checkpoint

import pytest
import torch

JOB = [*SMALL, "--dataset=chars", "--gradient_accumulation_steps=4", "--eval_interval=5", "--checkpoint_interval=2"]


def losses(out: Path) -> list[float]:
    found = [json.loads(line) for line in open(out / "metrics.jsonl") if line.endswith("\n")]
    found = [m for m in found if "train_loss" in m]
    assert [m["step"] for m in found] == list(range(1, len(found) + 1))
    return [m["train_loss"] for m in found]


@contextmanager
def gone_at_the_end(job):
    """Kills a job and all that it started."""
    try:
        yield
    finally:
        for pid in family(job.pid):
            kill(pid)
        job.wait()


@contextmanager
def warm_torchrun(*arguments, cwd: Path, options=("--standalone", "--nproc_per_node=2"), env=None):
    """A torchrun job whose processes need not import torch (warm.py); all of it is gone at the end."""
    (cwd / "torchrun.py").write_text("import os\n\nfrom torch.distributed.run import main\n\nos.dup2(1, 2)\nmain()\n")
    job = Script(
        cwd / "torchrun.py", *options, ROOT / "train.py", *arguments, cwd=cwd, env=env, out=cwd / "torchrun.log"
    )
    job.log = cwd / "torchrun.log"
    with gone_at_the_end(job):
        yield job


@contextmanager
def torchrun(*arguments, cwd: Path, options=("--standalone", "--nproc_per_node=2"), prefix=(), env=None):
    """The same in processes of its own, each with what it prints in cwd/NAME."""
    log = open(cwd / f"torchrun-{len(list(cwd.glob('torchrun-*')))}.log", "w+")
    job = subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *arguments], cwd=cwd,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
    )  # fmt: skip
    job.log = Path(log.name)
    with gone_at_the_end(job):
        yield job


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = []
    with suppress(OSError):
        found = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(p for child in found for p in family(int(child)))]


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def worker_of_rank(job, rank: int) -> int | None:
    for pid in family(job.pid):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == f"rank {rank}\n":
                return pid
    return None


def wait_for(condition, job, seconds=90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None, job.log.read_text()[-3000:]
        time.sleep(0.02)


def logged(out: Path) -> int:
    return len(losses(out)) if (out / "metrics.jsonl").exists() else 0


def test_ranks_check_the_network_train_one_run_and_only_rank_0_writes(chars, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("rank1")
    keys = [*JOB, f"--data_dir={chars}/data", "--max_iters=12", "--sample_interval=3"]
    first, second = two_ranks(*keys, "--out_dir=two", cwds=(chars, elsewhere))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert f"ranks: 2 (2 on {socket.gethostname()}), all-reduce" in first.stdout and "GB/s" in first.stdout
    assert not list(elsewhere.iterdir()) and not second.stdout
    # The second half on another number of ranks goes on with the same batches, and the other way round.
    keys.append("--lr_decay_iters=12")
    assert call("train.py", *keys, "--out_dir=one", cwd=chars).returncode == 0
    for start, go_on in ((1, 2), (2, 1)):
        out = f"{start}to{go_on}"
        for ranks, steps in ((start, 6), (go_on, 12)):
            more = [*keys, f"--max_iters={steps}", f"--out_dir={out}", "--resume"]
            if ranks == 1:
                done = [call("train.py", *more, cwd=chars)]
            else:
                done = two_ranks(*more, cwds=(chars, chars))
            assert all(d.returncode == 0 for d in done), [d.stderr for d in done]
        assert "sequences per step" not in done[0].stdout
        assert losses(chars / out) == pytest.approx(losses(chars / "one"), abs=1e-4)
    assert losses(chars / "two") == pytest.approx(losses(chars / "one"), abs=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])  # micro-batches of a rank: with and without DDP's static graph
def test_compiled_ranks_reduce_during_the_backward_pass(chars, accumulation):
    sizes = ["--n_embd=256", "--n_layer=1", f"--gradient_accumulation_steps={2 * accumulation}", "--max_iters=3"]
    keys = [*JOB, *sizes, "--sample_prompt=", "--final_eval_tokens=64"]
    logged = {"TORCH_LOGS": "ddp_graphs"}
    with warm_torchrun(*keys, "--compile=True", "--out_dir=compiled", cwd=chars, env=logged) as job:
        assert job.wait(timeout=120).returncode == 0, job.log.read_text()[-3000:]
        # The graph is cut at DDP's buckets: one is reduced before all are there.
        assert "submod_1" in job.log.read_text()
    plain, _ = two_ranks(*keys, "--compile=False", "--out_dir=plain", cwds=(chars, chars))
    assert plain.returncode == 0 and losses(chars / "compiled") == pytest.approx(losses(chars / "plain"), abs=1e-4)


def test_a_missing_rank_is_an_error_within_the_timeout(chars):
    start = time.monotonic()
    (alone,) = two_ranks(*JOB, "--timeout=3", cwds=(chars,), ranks=(0,))
    assert alone.returncode == 2 and time.monotonic() - start < 40
    message = alone.stderr.strip().splitlines()[-1]
    assert message.startswith("error: rank 0 of 2: the ranks cannot connect") and "--timeout" in message


def test_a_gradient_that_is_not_finite_is_blamed_on_its_rank(chars):
    """The losses are finite on both ranks, and the averaged gradient is bad on both."""
    (chars / "broken.py").write_text(
        "import os\n\nimport model\n\n_forward = model.MLP.forward\n\ndef forward(self, x):\n    y = _forward(self, x)\n"
        "    if y.requires_grad and os.environ['RANK'] == '1':\n        y.register_hook(lambda g: g / 0)\n    return y\n\n"
        "model.MLP.forward = forward\n"
    )
    first, second = two_ranks("broken.py", *JOB, "--out_dir=bad", cwds=(chars, chars))
    assert first.returncode == second.returncode == 2, first.stderr + second.stderr
    message = first.stderr.strip().splitlines()[-1]
    assert re.search(
        r"error: step 1: loss [\d.]+, gradient norm (nan|inf). It comes from rank 1, micro-batch 0: train.bin", message
    )
    assert "rank 0" not in message


def test_a_signal_to_one_rank_stops_all_at_the_same_step(chars):
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    keys = [*JOB, "--max_iters=100000", "--eval_interval=0", "--checkpoint_interval=0"]
    ranks = [Script("train.py", *keys, cwd=chars, env={**where, "RANK": str(r)}) for r in range(2)]
    while logged(chars / "out") < 5:
        time.sleep(0.02)
    ranks[1].kill(signal.SIGTERM)
    assert [r.wait().returncode for r in ranks] == [143, 143], [r.stderr for r in ranks]
    assert load_checkpoint(chars / "out" / "ckpt.pt")["step"] == logged(chars / "out")


def test_a_rank_that_dies_ends_the_job_with_its_error(chars):
    with warm_torchrun(*JOB, "--max_iters=100000", cwd=chars) as job:
        wait_for(lambda: logged(chars / "out") > 5, job)
        start = time.monotonic()
        kill(worker_of_rank(job, 1))
        assert job.wait(60).returncode != 0 and time.monotonic() - start < 30
        printed = job.log.read_text()
    assert "Signal 9 (SIGKILL)" in printed and "rank      : 1" in printed
    assert "rank 0: another rank is gone" in printed or "rank      : 0" in printed
    assert 'train.py", line' not in printed  # no traceback of ours
    assert load_checkpoint(chars / "out" / "ckpt.pt")["step"] > 0


def test_torchrun_restarts_continue_from_the_last_checkpoint(chars):
    keys = [*JOB, "--max_iters=150", "--eval_interval=50"]
    done = two_ranks(*keys, "--out_dir=whole", cwds=(chars, chars))
    assert all(d.returncode == 0 for d in done)
    # A checkpoint of another job is there: the new one must put it aside, and go on with its own alone.
    assert call("train.py", *JOB, "--max_iters=4", "--out_dir=parts", cwd=chars).returncode == 0
    options = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    with warm_torchrun(*keys, "--out_dir=parts", cwd=chars, options=options) as job:
        for step in (20, 70):
            wait_for(
                lambda step=step: (chars / "parts" / "previous-1").exists() and logged(chars / "parts") > step, job
            )
            kill(worker_of_rank(job, int(step == 70)))
            wait_for(lambda: worker_of_rank(job, 0) is None, job, 30) if step == 20 else None
        assert job.wait(90).returncode == 0, job.log.read_text()[-3000:]
    assert losses(chars / "parts") == losses(chars / "whole")
    a, b = (load_checkpoint(chars / d / "ckpt.pt")["model"] for d in ("parts", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@contextmanager
def two_hosts():
    """Two network namespaces joined by a cable, at 10.99.0.1 and 10.99.0.2. Needs root on Linux, as CI has."""
    names = [f"gpt{os.getpid()}h{n}" for n in (0, 1)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            hosts = Path("/etc/netns") / name / "hosts"  # what /etc/hosts is inside
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n10.99.0.1 host0\n10.99.0.2 host1\n")
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.0.{n + 1}/24", "dev", f"cable{n}")
            ip("-n", name, "link", "set", f"cable{n}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes network namespaces")
def test_two_hosts_train_and_survive_the_loss_of_one(chars):
    """README's recipe for several hosts; the second host's cable is cut and its processes are killed, then it starts again."""
    keys = [*JOB, "--max_iters=60"]
    done = two_ranks(*keys, "--out_dir=whole", cwds=(chars, chars))
    assert all(d.returncode == 0 for d in done)
    with two_hosts() as names:
        recipe = readme_block("--nnodes=2").replace("\\\n", " ")
        variable, value = recipe.split()[1].split("=")
        options = (
            recipe.partition("torchrun ")[2]
            .partition(" train.py")[0]
            .replace("--nproc_per_node=8", "--nproc_per_node=1")
        )

        def host(n: int):
            named = ["unshare", "--uts", "sh", "-c", f'hostname host{n}; exec "$@"', "sh"]
            prefix = ["ip", "netns", "exec", names[n], *named]
            env = {"GLOO_SOCKET_IFNAME": f"cable{n}", variable: value}
            more = ["--out_dir=parts", "--timeout=8"]
            return torchrun(*keys, *more, cwd=chars, options=options.split(), prefix=prefix, env=env)

        with host(0) as first:
            with host(1) as second:
                wait_for(lambda: logged(chars / "parts") > 10, first)
                subprocess.run(["ip", "-n", names[1], "link", "set", "cable1", "down"], check=True)
                for pid in family(second.pid):
                    kill(pid)
            before = first.log.read_text()
            assert "ranks: 2 (1 on host0, 1 on host1)" in before or "ranks: 2 (1 on host1, 1 on host0)" in before
            subprocess.run(["ip", "-n", names[1], "link", "set", "cable1", "up"], check=True)
            with host(1) as second:
                both = [first.wait(120), second.wait(60)]
            assert both == [0, 0], first.log.read_text()[-3000:]
        assert "another rank is gone" in first.log.read_text()
    assert losses(chars / "parts") == losses(chars / "whole")


def test_the_slurm_recipe_saves_on_a_signal_and_queues_itself_again(chars):
    """README's job script, with Slurm's part played: it gets the signal, and scontrol is a file that says it was called."""
    bin = chars / "bin"
    bin.mkdir()
    for name, text in {
        "scontrol": f'echo "$@" >> {chars}/queued',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    script = readme_block("#SBATCH").replace("--nproc_per_node=8 train.py", f"--nproc_per_node=2 {ROOT}/train.py")
    arguments = [*JOB, "--eval_interval=1000"]

    def submit(end: int):
        keys = " ".join([*arguments, f"--max_iters={end}", "--lr_decay_iters=40"])
        (chars / "job.sh").write_text(script.replace("config/train_gpt2.py", keys))
        path = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "OMP_NUM_THREADS": "1"}
        log = open(chars / "slurm.log", "a")
        return subprocess.Popen(
            ["bash", "job.sh"], cwd=chars, env={**os.environ, **path}, stdout=log, stderr=log, start_new_session=True
        )

    job = submit(100000)
    job.log = chars / "slurm.log"
    wait_for(lambda: logged(chars / "out") > 10, job)
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    assert (chars / "queued").read_text() == "requeue 77\n"
    step = load_checkpoint(chars / "out" / "ckpt.pt")["step"]
    assert step == logged(chars / "out") and f"stopped at step {step:,}" in job.log.read_text()
    assert submit(step + 5).wait(90) == 0, job.log.read_text()[-3000:]
    assert logged(chars / "out") == step + 5
