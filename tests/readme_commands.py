"""Run every command of README.md and docs/*.md once, in a copy of the repository: python tests/readme_commands.py FOLDER.

Appended arguments make each command short. Commands that prepare data run first. A small hub on this machine (tests/hub.py)
replaces the network, two CPU ranks replace the GPUs, and Weights & Biases is offline.
"""

import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT, copy = Path(__file__).resolve().parent.parent, Path(sys.argv[1])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import set_gpt2_vocabulary  # noqa: E402

from hub import parquet, start_hub  # noqa: E402
from test_corpora import CONFIGS, ROWS, corpora  # noqa: E402
from test_harness import TASKS  # noqa: E402
from test_pretrained import save_gpt2, save_gpt2_tokenizer, save_llama  # noqa: E402

TRAIN = "--max_iters=30 --eval_interval=15 --eval_iters=1 --warmup_iters=2 --final_eval_tokens=4096 --sample_interval=0"
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --gradient_accumulation_steps=2 --total_batch_tokens=0 --device=cpu"
SHORT = {
    "research/sweep.py": "--seeds=[1]",
    "train.py": TRAIN,
    "sample.py": "--max_new_tokens=20",
    "bench.py": "--megabytes=1 --repeat=1 --steps=1",
    "prepare_tinystories.py": "--vocab_size=1000",
    "build_fineweb_shards.py": "--shard_tokens=3000 --max_tokens=60000",
    "eval_hellaswag.py": "--limit=8",
}
INSTEAD = {  # replaces what this machine lacks
    "--source=shakespeare": "--inputs=tinyshakespeare.txt --dataset=shakespeare",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "-d cuda": "-d cpu",
    "--dataset=chat_mix --tokenizer=bpe": "--dataset=chat_mix --tokenizer=bpe --vocab_size=300",
    "--tasks=arc_easy,lambada_openai": "--tasks=choices --tasks_dir=tasks",
}


def lay_out() -> None:
    """Copy the repository's files, and write the input files that the commands name."""
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    text = "".join(f"{n} men went to town, and {n * n} came back.\n" for n in range(3000))
    for name in ("my.txt", "tinyshakespeare.txt"):
        (copy / name).write_text(text)
    (copy / "prompts.txt").write_text("Once upon a time\nLily\n")
    (copy / "corpus").mkdir()
    for n in range(4):
        (copy / "corpus" / f"{n}.parquet").write_bytes(parquet(ROWS[100 * n : 100 * n + 100]))
    question = {"ind": 1, "ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "activity_label": "Work", "label": 0}
    lines = (json.dumps({**question, "endings": [f"does {n}.", "sleeps.", "runs.", "eats."]}) for n in range(10042))
    words = ["".join(pair) for pair in itertools.product(("ba", "do", "ki", "lu", "me"), repeat=4)]
    talks = []
    for n in range(0, 400, 2):
        asked, answer = f"Is {n} even, {words[n]}?", f"Yes, {n} is, {words[-n]}."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        talks.append(json.dumps({"messages": messages}) + "\n")
    (copy / "chats.jsonl").write_text("".join(talks))
    (copy / "tasks").mkdir()
    rows = "".join(
        json.dumps({"question": f"{n} men", "choices": ["went", "sat"], "label": 0}) + "\n" for n in range(9)
    )
    (copy / "tasks" / "rows.jsonl").write_text(rows)
    data = f"task: choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {copy}/tasks/rows.jsonl\ntest_split: test\n"
    (copy / "tasks" / "choices.yaml").write_text(data + TASKS["choices"])
    (copy / "data" / "hellaswag").mkdir(parents=True)
    (copy / "data" / "hellaswag" / "hellaswag_val.jsonl").write_text("\n".join(lines))


def hub_of(vocabulary: Path) -> dict[str, dict[str, bytes]]:
    """Small versions of the models and corpora that the commands download: {id: {path: bytes}}."""
    repos = corpora()
    for name, save in (("openai-community/gpt2", save_gpt2), ("HuggingFaceTB/SmolLM2-135M", save_llama)):
        folder = copy / ".hub" / name
        sizes = dict(n_positions=1024, n_embd=8, n_layer=1) if save is save_gpt2 else dict(max_position_embeddings=2048)
        save(folder, vocab_size=50257, **sizes)
        save_gpt2_tokenizer(folder, vocabulary)
        repos[name] = {p.name: p.read_bytes() for p in folder.iterdir()}
    chat = {
        "eos_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    repos["HuggingFaceTB/SmolLM2-135M-Instruct"] = repos["HuggingFaceTB/SmolLM2-135M"] | {
        "tokenizer_config.json": json.dumps(chat).encode()
    }
    rows = parquet([{"content": row["text"]} for row in ROWS[:300]])
    repos["owner/name"] = {
        "README.md": CONFIGS.format("config").encode(), "config/train-0.parquet": rows, "config/validation-0.parquet": rows,
    }  # fmt: skip
    stories = "<|endoftext|>".join(row["text"] for row in ROWS).encode()
    names = (f"TinyStories{v}-{split}.txt" for v in ("", "V2-GPT4") for split in ("train", "valid"))
    repos["roneneldan/TinyStories"] = dict.fromkeys(names, stories)
    header = b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 300)) + bytes(1012)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, 104))]
    repos["kjj0/fineweb10B-gpt2"] = dict.fromkeys(names, header + bytes(range(200)) * 3)
    return repos


def shortened(command: str) -> list[str]:
    """The words of the command as it runs here."""
    for theirs, ours in INSTEAD.items():
        command = command.replace(f"{theirs} --dataset=shakespeare_char", f"{ours}_char").replace(theirs, ours)
    words = shlex.split(command, comments=True)
    script = next(w for w in words if w.endswith(".py"))
    if "--dry_run" in words or "--help" in words or script == "demo.py":
        return words
    words += shlex.split(SHORT.get(script, ""))
    if "torchrun" in words:
        words += shlex.split(f"{TINY} --dataset=edu_fineweb10B --hellaswag_limit=8")
        words = [w.replace("hellaswag_interval=2000", "hellaswag_interval=30") for w in words]
    elif script == "train.py" and any(w in command for w in ("baby_gpu", "chat", "--init_from")):
        words += shlex.split(TINY)
    if "--resume" in words:
        words.append("--max_iters=40")
    if script == "research/sweep.py":  # the same study with short runs
        study = next(w for w in words if w.startswith("config/sweep/"))
        base = runpy.run_path(str(copy / study))["base"]
        words.append(f"--base={base} {TRAIN}")
    if "--worker=0" in words:  # one of several machines: it has a data folder of its own
        words += ["--source=corpus/", "--data_dir=data_of_worker_0"]
    return words


def serve(words: list[str]) -> None:
    """Start the page, request it once, and stop it."""
    with subprocess.Popen(words, cwd=copy, stdout=subprocess.PIPE, text=True) as page:
        url = next((m[0] for line in page.stdout if (m := re.search(r"http://\S+", line))), None)
        served = url and "gradio" in urllib.request.urlopen(url, timeout=60).read().decode()
        page.terminate()
    if not served:
        sys.exit(f"`{shlex.join(words)}` served no page")


def commands_of(page: Path) -> list[str]:
    """The shell commands of a page: the lines of its sh blocks, and the python and torchrun commands within its text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.strip().splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " "))
    return [command for line in lines for command in line.split(" && ")]


copy.mkdir(parents=True)
(copy / ".vocabulary").mkdir()
set_gpt2_vocabulary(copy / ".vocabulary")
lay_out()
server, environment = start_hub(hub_of(copy / ".vocabulary"))
os.environ.update({**environment, "HF_HOME": str(copy / ".hf"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
for page in pages:
    for names in re.findall(r"pip install -e '\.\[(.*?)\]'", page.read_text(encoding="utf-8")):
        for extra in names.split(","):
            if not re.search(rf"^{extra} = \[", extras, re.M):
                sys.exit(f"{page.name}: pyproject.toml has no extra {extra}")
first_page: dict[str, str] = {}  # command -> the page it is on; a command on several pages runs once
for page in pages:
    for command in commands_of(page):
        if not command.startswith(("pip", "pytest")):  # .ci/run runs these
            first_page.setdefault(command, page.name)
for command, page in sorted(
    first_page.items(), key=lambda item: not item[0].startswith(("python prepare", "python build"))
):
    words, start = shortened(command), time.perf_counter()
    print("+", shlex.join(words), flush=True)
    if "demo.py" in words:
        serve(words)
    else:
        done = subprocess.run(
            words, cwd=copy, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{done.stdout}\n{page}: `{command}` failed with exit code {done.returncode}")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
print(f"{len(first_page)} commands of {len(pages)} pages ran")
