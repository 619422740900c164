"""Tokens per second beside other programs that run the same export, in turn: transformers, CTranslate2, llama.cpp.

    pip install transformers ctranslate2 xllamacpp
    python train.py config/baby_cpu.py --out_dir=out/mine && python export.py --out_dir=out/mine
    python research/decode_peers.py --model=out/mine/export --llama_cpp=../llama.cpp
    python research/decode_peers.py --model=out/mine/export --weights=int8 --batch=16 --engines=flatgpt,ctranslate2

Each measurement is a process of its own, with the same threads: a prompt of 16 tokens is read and --tokens more are written,
once to warm up and three times for the median; greedily. --llama_cpp is llama.cpp's folder, whose converter writes its file.
8 bits are in llama.cpp Q8_0, in CTranslate2 int8 with float32 between the products; transformers has none on a CPU.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runs import ROOT

from common.files import atomic_write, check_writable
from configurator import UserError, check_bounds, check_choice, configure, short_errors

model = ""  # a folder that export.py wrote
engines = "flatgpt,transformers,ctranslate2,llama_cpp"  # in turn, the first is compared with the others
weights = "bfloat16"  # bfloat16 | int8
batch = 1  # texts at a time
tokens = 200  # new tokens of a text
threads = 0  # 0: one for each core
rounds = 3  # processes of each engine
llama_cpp = ""  # llama.cpp's folder, or its convert_hf_to_gguf.py
output = ""  # a .json file for the figures
measure = ""  # internal: measure this engine here, and print its seconds

PACKAGES = {"transformers": "transformers", "ctranslate2": "ctranslate2", "llama_cpp": "xllamacpp"}
PROMPT = [0] * 16


def transformers(path: str):
    """Like the two below: a function that writes the texts once."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs, idx = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), torch.tensor([PROMPT] * batch)
    size = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), **size)


def ctranslate2(path: str):
    import ctranslate2

    theirs = ctranslate2.Generator(path, device="cpu", compute_type=weights, intra_threads=threads)
    words = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))
    prompts = [[words[i] for i in PROMPT]] * batch
    size = dict(max_length=tokens, min_length=tokens, include_prompt_in_result=False, max_batch_size=batch)
    return lambda: theirs.generate_batch(prompts, sampling_topk=1, **size)


def llama_cpp_server(path: str):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = path, batch, batch * (len(PROMPT) + tokens + 8)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    request = dict(prompt=PROMPT, n_predict=tokens, ignore_eos=True, temperature=0, cache_prompt=False)

    def write(_=None):
        answer = server.handle_completions(dict(request))
        if answer.get("usage", {}).get("completion_tokens") != tokens:
            raise UserError(f"llama.cpp wrote {answer}"[:500])

    if batch == 1:
        return write
    pool = ThreadPoolExecutor(batch)
    return lambda: list(pool.map(write, range(batch)))


def seconds_here(engine: str) -> float:
    """Seconds to read the prompts and write the texts, the median of three."""
    check_choice("measure", engine, PACKAGES)
    load = {"transformers": transformers, "ctranslate2": ctranslate2, "llama_cpp": llama_cpp_server}
    write, seconds = load[engine](model), []
    for _ in range(4):
        start = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def name_of(engine: str) -> str:
    """The engine and its version. Raises UserError if it is not installed."""
    if engine not in PACKAGES:
        return engine
    try:
        return f"{engine} {version(PACKAGES[engine])}"
    except PackageNotFoundError:
        raise UserError(f"--engines={engine}: pip install {PACKAGES[engine]}") from None


def convert(engine: str, folder: Path) -> Path:
    """The export in the engine's own format. Raises UserError if its converter fails."""
    if engine in ("flatgpt", "transformers"):
        return Path(model)
    target = folder / ("model.gguf" if engine == "llama_cpp" else "ctranslate2")
    if engine == "ctranslate2":
        code = "import sys, ctranslate2; ctranslate2.converters.TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization=sys.argv[3])"
        command = [sys.executable, "-c", code, model, str(target), weights]
    else:
        script = Path(llama_cpp) / "convert_hf_to_gguf.py" if Path(llama_cpp).is_dir() else Path(llama_cpp)
        if not llama_cpp or not script.is_file():
            raise UserError(f"--llama_cpp={llama_cpp}: there is no convert_hf_to_gguf.py")
        kind = {"bfloat16": "bf16", "int8": "q8_0"}[weights]
        command = [sys.executable, str(script), model, "--outfile", str(target), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{engine}: the conversion failed: {done.stderr[-2000:]}")
    return target


def rate_of(engine: str, path: Path) -> float:
    """Tokens per second of the engine in a process of its own; ours is bench.py's figure. Raises UserError if it fails."""
    keys = [f"--model={path}", f"--measure={engine}", f"--weights={weights}", f"--batch={batch}", f"--tokens={tokens}"]
    command = [sys.executable, __file__, *keys, f"--threads={threads}"]
    if engine == "flatgpt":
        keys = ["--dtype=bfloat16", f"--quantize={'int8' if weights == 'int8' else ''}", f"--decode_batch={batch}"]
        command = [sys.executable, str(ROOT / "bench.py"), "--mode=decode", f"--init_from={path}", *keys]
        command += [f"--tokens={tokens}", "--repeat=3", "--sample_temperature=0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{engine} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    if engine == "flatgpt":
        return float(re.findall(rf"batch {batch} +([\d.,]+) tokens/s", done.stdout)[-1].replace(",", ""))
    return batch * tokens / float(done.stdout.rpartition("seconds ")[2].split()[0])


def main() -> None:
    global threads
    chosen = engines.split(",")
    for engine in chosen:
        check_choice("engines", engine, ("flatgpt", *PACKAGES))
    check_choice("weights", weights, ("bfloat16", "int8"))
    check_bounds(globals(), at_least_1="batch tokens rounds", at_least_0="threads")
    threads = threads or os.cpu_count()
    if measure:
        return print("seconds", seconds_here(measure))
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"--model={model}: give a folder that export.py wrote")
    if output:
        check_writable("output", output)
    if weights == "int8" and "transformers" in chosen:
        chosen.remove("transformers")
    if not chosen:
        raise UserError("--engines=transformers: it has no 8-bit weights on a CPU")
    names = {engine: name_of(engine) for engine in chosen}
    found: dict[str, list[float]] = {engine: [] for engine in chosen}
    with tempfile.TemporaryDirectory() as name:
        paths = {engine: convert(engine, Path(name)) for engine in chosen}
        for n in range(rounds):
            for engine, path in paths.items():
                found[engine].append(rate_of(engine, path))
            rates = ", ".join(f"{names[engine]} {found[engine][-1]:,.1f}" for engine in chosen)
            print(f"round {n + 1}: {rates}", flush=True)
    for engine, rates in found.items():
        ratios = sorted(a / b for a, b in zip(found[chosen[0]], rates))
        ratio = f"   {chosen[0]} / it: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{names[engine]:<28}{statistics.median(rates):>9,.1f} tokens/s{ratio if engine != chosen[0] else ''}")
    if output:
        figures = {"tokens_per_second": found, "batch": batch, "weights": weights}
        atomic_write(Path(output), json.dumps(figures, indent=1))


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
