"""Printing never ends a run, and what a user names as an output is written as what it is."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import ROOT, SMALL, Script

from common.checkpoint import hard_link
from common.files import atomic_write, check_writable, writes_through
from configurator import Console, UserError, consoles, short_errors

import pytest
import torch

LONG = [*SMALL, "--dataset=chars", "--max_iters=4000", "--eval_interval=0"]


def start(chars, *argv, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=chars, env=env, **options)


def read_first(chars, *argv, size: int) -> tuple[Script, bytes]:
    """A running script, and the first bytes it printed into a pipe, whose reader has gone since then."""
    os.mkfifo(chars / "pipe")
    read = []

    def reader():
        with open(chars / "pipe", "rb", buffering=0) as pipe:
            read.append(pipe.read(size))

    thread = threading.Thread(target=reader)
    thread.start()
    script = Script(*argv, cwd=chars, out=chars / "pipe")
    thread.join(timeout=100)
    return script, read[0]


def logged_steps(chars) -> int:
    log = chars / "out" / "log.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_step(chars, step: int) -> None:
    deadline = time.monotonic() + 100
    while logged_steps(chars) < step and time.monotonic() < deadline:
        time.sleep(0.05)
    assert logged_steps(chars) >= step


def test_a_run_whose_reader_has_gone_trains_on_and_saves_at_ctrl_c(chars):
    run, _ = read_first(chars, "train.py", *LONG, size=1)  # as with `| tee log`, when Ctrl-C ends tee first
    wait_for_step(chars, 5)
    run.kill(signal.SIGINT)
    assert run.wait().returncode == 130
    assert torch.load(chars / "out" / "ckpt.pt", weights_only=True)["step"] >= 5


def test_a_run_with_closed_streams_finishes_and_its_files_are_whole(chars):
    command = f"exec {sys.executable} {ROOT}/train.py {' '.join(SMALL)} --dataset=chars >&- 2>&- <&-"
    done = subprocess.run(["bash", "-c", command], cwd=chars, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert torch.load(chars / "out" / "ckpt.pt", weights_only=True)["step"] == 6
    assert json.loads((chars / "out" / "results.json").read_text())["total_steps"] == 6
    assert all(json.loads(line) for line in (chars / "out" / "metrics.jsonl").read_text().splitlines())


def test_a_console_that_cannot_encode_a_name_or_a_sample_shows_a_question_mark(chars):
    (chars / "é.txt").write_text("é b ü ß.\n" * 500, encoding="utf-8")
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    for argv in (
        ["prepare_text.py", "--inputs=é.txt", "--dataset=d", "--tokenizer=char"],
        ["train.py", *SMALL, "--dataset=d", "--sample_prompt=é"],
    ):
        run = start(chars, *argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        printed, errors = run.communicate(timeout=100)
        assert run.returncode == 0, errors.decode()
        assert printed.isascii()
    assert b"?" in printed


def test_a_reader_that_stops_ends_a_text_quietly(run, chars):
    run("train.py", *SMALL, "--dataset=chars", cwd=chars)
    argv = ["sample.py", "--max_new_tokens=100000", "--start=a", "--temperature=2"]
    sample, text = read_first(chars, *argv, size=1)
    assert text == b"a" and sample.wait(timeout=60).returncode == 141 and "Traceback" not in sample.stderr


class FullDisk(io.StringIO):
    full = True

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_text_that_finds_the_disk_full_is_lost_and_later_text_is_not():
    disk = FullDisk()
    console = Console(disk)
    print("lost", file=console)
    disk.full = False
    print("kept", file=console)
    assert disk.getvalue().strip() == "kept" and not console.broken


def test_streams_are_as_before_after_a_script(capsys):
    before = sys.stdout, sys.stderr
    with consoles():
        print("printed")
        assert isinstance(sys.stdout, Console)
    with pytest.raises(SystemExit) as end, short_errors():
        raise UserError("wrong")
    captured = capsys.readouterr()
    assert (sys.stdout, sys.stderr) == before and end.value.code == 2
    assert captured.out == "printed\n" and captured.err == "error: wrong\n"


def test_a_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]
    hard_link(tmp_path / "link", tmp_path / "previous")  # as a checkpoint is kept before the next one replaces it
    atomic_write(tmp_path / "link", "newer")
    assert (tmp_path / "previous").read_text() == "new" and (tmp_path / "target").read_text() == "newer"


def test_a_file_in_a_ram_disk_is_replaced_like_any_other(tmp_path, monkeypatch):
    assert not writes_through(Path("/dev/shm")) and not writes_through(tmp_path / "file")
    monkeypatch.setattr(Path, "absolute", lambda self: Path("/dev/shm/out/ckpt.pt"))
    (tmp_path / "file").write_text("old")
    assert not writes_through(tmp_path / "file")


def test_a_pipe_and_an_open_file_are_written_through(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    atomic_write(tmp_path / "pipe", "through")
    reader.join(timeout=20)
    assert read == ["through"] and (tmp_path / "pipe").is_fifo()
    with open(tmp_path / "file", "w+") as f:
        check_writable("output", f"/dev/fd/{f.fileno()}")
        atomic_write(Path(f"/dev/fd/{f.fileno()}"), "written")
        assert f.read() == "written"


def test_completions_go_into_a_pipe(run, chars):
    run("train.py", *SMALL, "--dataset=chars", cwd=chars)
    (chars / "prompts.txt").write_text("a\nb\n")
    argv = ["sample.py", "--prompts=prompts.txt", "--max_new_tokens=3", "--output=/dev/fd/1"]
    done, printed = read_first(chars, *argv, size=10_000)
    lines = printed.decode().splitlines()
    assert done.wait().returncode == 0 and [json.loads(line)["prompt"] for line in lines if line.startswith("{")] == [
        "a",
        "b",
    ]


def test_a_path_that_cannot_be_written_is_refused_before_the_work(refused, run, chars):
    run("train.py", *SMALL, "--dataset=chars", cwd=chars)
    (chars / "prompts.txt").write_text("a\n")
    for output, words in (("out", "is a folder"), ("gone/x.jsonl", "there is no folder gone")):
        message = refused("sample.py", "--prompts=prompts.txt", f"--output={output}")
        assert words in message
    assert "it is for --prompts" in refused("sample.py", "--start=a", "--output=x.txt")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_part_is_left_by_any_exception(tmp_path, error):
    from common.files import atomic_file

    with pytest.raises(error), atomic_file(tmp_path / "file") as f:
        f.write(b"half")
        raise error
    assert not list(tmp_path.iterdir())
