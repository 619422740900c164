"""Speed and memory beside nanoGPT: both programs' own train.py and sample.py, the same flags, tokens and checkpoint, in turn.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python research/peers.py --nanogpt=../nanoGPT                             training, a character model
    python research/peers.py --nanogpt=../nanoGPT --model=baby_cpu            training, 16 million parameters
    python research/peers.py --nanogpt=../nanoGPT --work=sample               sampling from a checkpoint of nanoGPT

The flags are nanoGPT's, which train.py here takes unchanged. Prints the median over the rounds, and the ratio of each round.
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import ROOT

from common.files import atomic_write, read_metrics
from configurator import UserError, check_bounds, check_choice, configure, short_errors

import numpy as np

nanogpt = ""  # a clone of nanoGPT
work = "train"  # train | sample
model = "characters"  # characters | baby_cpu
rounds = 5  # of each program, in turn
steps = 60  # training steps of a round, of which the first third only warms up
tokens = 1000  # tokens to sample in a round
flags = ""  # more flags for both programs: --batch_size=4
output = ""  # a .json file for the figures

MODELS = {  # flags and vocabulary
    "characters": ("--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12", 65),
    "baby_cpu": ("--n_layer=4 --n_head=4 --n_embd=256 --block_size=256 --batch_size=8", 50257),
}
COMMON = (
    "--dataset=tokens --device=cpu --compile=False --dropout=0.0 --bias=False --gradient_accumulation_steps=1 "
    "--log_interval=1 --eval_iters=1 --wandb_log=False"
)


def make_folder(folder: Path, vocab_size: int) -> None:
    """A working folder for both programs: data/tokens with random tokens (uint16), and what nanoGPT reads from where it runs."""
    data, rng = folder / "data" / "tokens", np.random.default_rng(0)
    data.mkdir(parents=True)
    for split, size in (("train", 1_000_000), ("val", 100_000)):
        rng.integers(vocab_size, size=size, dtype=np.uint16).tofile(data / f"{split}.bin")
    characters = [chr(0x10000 + n) for n in range(vocab_size)]
    itos = dict(enumerate(characters))
    meta = {"vocab_size": vocab_size, "itos": itos, "stoi": {character: n for n, character in itos.items()}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "configurator.py").symlink_to(Path(nanogpt).resolve() / "configurator.py")


def call(root: Path, script: str, arguments: list[str], folder: Path) -> tuple[str, float, float]:
    """Run a program's script in the folder. Returns what it prints, its seconds and its peak memory (MiB). UserError if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        command = [sys.executable, str(root / script), *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise UserError(f"{root / script} failed:\n{text[-2000:]}")
    return text, seconds, usage.ru_maxrss / 1024


def train(root: Path, folder: Path, arguments: list[str]) -> dict:
    """Milliseconds per training step (median after the first third), and peak memory in MiB."""
    ours = root == ROOT
    keys = [f"--max_iters={steps}", "--eval_interval=1000000", f"--out_dir=out_{'ours' if ours else 'peer'}"]
    keys += ["--final_eval_tokens=65536", "--sample_prompt="] if ours else []
    text, _, memory = call(root, "train.py", [*arguments, *keys], folder)
    if ours:
        per_step = re.search(r"= ([\d,]+) tokens", text)
        size = int(per_step[1].replace(",", ""))
        times = [1000 * size / h["tokens_per_sec"] for h in read_metrics(folder / "out_ours") if "tokens_per_sec" in h]
    else:
        times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", text)]
    return {"ms per step": statistics.median(times[steps // 3 :]), "peak MiB": memory}


def sample(root: Path, folder: Path, arguments: list[str]) -> dict:
    """Tokens per second of one text, from the difference of a long and a short one, which start alike."""
    seconds = {}
    for count in (20, 20 + tokens):
        keys = [
            "--out_dir=out_peer",
            "--device=cpu",
            "--num_samples=1",
            f"--max_new_tokens={count}",
            "--start=" + chr(0x10000),
        ]
        _, seconds[count], memory = call(root, "sample.py", keys, folder)
    difference = seconds[20 + tokens] - seconds[20]
    if difference < 0.1 * seconds[20]:
        raise UserError(f"--tokens={tokens}: too few, a text of them takes no longer than the start of the program")
    return {"tokens/s": tokens / difference, "peak MiB": memory}


def main() -> None:
    check_choice("work", work, ("train", "sample"))
    check_choice("model", model, MODELS)
    check_bounds(globals(), at_least_1="rounds tokens", at_least_0="steps")
    peer = Path(nanogpt).resolve()
    if not nanogpt or not (peer / "configurator.py").is_file():
        raise UserError(f"--nanogpt={nanogpt}: give the folder of a clone of nanoGPT")
    sizes, vocab_size = MODELS[model]
    arguments = [*sizes.split(), *COMMON.split(), *flags.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, vocab_size)
        if work == "sample":  # a checkpoint of nanoGPT, which both programs read
            call(peer, "train.py", [*arguments, "--max_iters=2", "--eval_interval=2", "--out_dir=out_peer"], folder)
        measure = {"train": train, "sample": sample}[work]
        found: list[tuple[dict, dict]] = []
        for n in range(rounds):
            pair = measure(ROOT, folder, arguments), measure(peer, folder, arguments)
            found.append(pair)
            values = [f"{key} {pair[0][key]:,.1f} and {pair[1][key]:,.1f}" for key in pair[0]]
            print(f"round {n + 1}, flatgpt and nanoGPT: {'; '.join(values)}")
    for key in found[0][0]:
        ours, theirs = ([pair[side][key] for pair in found] for side in (0, 1))
        ratios = sorted(a / b if key == "tokens/s" else b / a for a, b in zip(ours, theirs))
        median = statistics.median(ratios)
        word = f"{median:.2f} times as fast" if key != "peak MiB" else f"{1 / median:.2f} of the memory"
        values = f"flatgpt {statistics.median(ours):,.1f}, nanoGPT {statistics.median(theirs):,.1f}"
        print(f"{key}: {values}: {word} (ratios {ratios[0]:.2f} to {ratios[-1]:.2f})")
    if output:
        atomic_write(Path(output), json.dumps([dict(zip(("flatgpt", "nanogpt"), pair)) for pair in found], indent=1))


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
