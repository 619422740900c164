"""How fast, and where the time goes: training, decoding, HellaSwag, data, start-up.

    python bench.py                                      a training step that suits the device, synthetic tokens
    python bench.py config/baby_cpu.py --compile=True    of any config and keys of train.py
    python bench.py --find_batch=True                    the fastest micro-batch, and the memory it needs
    python bench.py --mode=decode                        GPT-2 124M, tokens/s for one text and for a batch
    python bench.py --mode=hellaswag                     examples/s, against one at a time in float32
    python bench.py --mode=data --inputs=corpus.txt      tokenizing and the batch reader
    python bench.py --mode=startup                       seconds to the first token, the first step, a compiled step
    python bench.py --output=before.json                 ... edit ...   python bench.py --compare=before.json

The step is train.py's own. It is compared with this machine's roofline, measured in the same run: the rate of a large matrix
product in the run's dtype, and the bandwidth of a copy. Figures are medians, with their range.
"""

import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F

import train
from common import checkpoint, corpus, inference, runtime, setup, shards
from common.cpu import manual_attention_is_faster
from common.files import atomic_write
from common.tokenizer import EOT, gpt2_tokenizer
from configurator import UserError, check_bounds, check_choice, configure, error_in, read_keys, short_errors
from eval_hellaswag import Question, classic_question, ending_losses, load_examples
from model import GPT
from prepare_tinystories import story

mode = "train"  # train | decode | hellaswag | data | startup
steps = 20  # training steps to time, after three to warm up
tokens = 100  # tokens to decode
quantize = ""  # int8: decode with 8-bit weights
decode_batch = 16  # texts at a time, beside a single one
repeat = 5  # repetitions of short measurements, for the median
vocab_size = 50257  # ids of the synthetic tokens
real_data = False  # train on --dataset instead of synthetic tokens
find_batch = False  # train: double the micro-batch while it fits and gets faster
profile: bool | str = False  # True: a Chrome trace of three steps to trace.json; or a file name for it
output = ""  # a .json file for the figures
compare = ""  # such a file from before: prints the ratios
examples = 400  # hellaswag: drawn at random, a tenth of them also one at a time
inputs = ""  # data: a text, documents separated by <|endoftext|> (empty: synthetic stories) | hellaswag: a .jsonl file
megabytes = 100  # data: of text at most

HERE = Path(__file__).resolve().parent
KEYS = vars(train)  # train.py's globals

# -----------------------------------------------------------------------------
# Timing


def timed(work, device: torch.device | None = None) -> tuple:
    """The result of work() and its seconds, with the device's work done."""
    runtime.synchronize(device)
    start = time.perf_counter()
    result = work()
    runtime.synchronize(device)
    return result, time.perf_counter() - start


def median_seconds(work, device: torch.device, times: int) -> float:
    """The median of `times` calls, after one that is not counted."""
    work()
    return statistics.median(timed(work, device)[1] for _ in range(times))


def rates_in_turn(*works, device: torch.device | None = None) -> list[list[float]]:
    """For each work, `repeat` values of the count it returns over its seconds. The works alternate; the first round is not counted."""
    rates: list[list[float]] = [[] for _ in works]
    for _ in range(repeat + 1):
        for own, work in zip(rates, works):
            count, seconds = timed(work, device)
            own.append(count / seconds)
    return [own[1:] for own in rates]


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a copy (read and written) on this device."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, device, repeat)
    source = torch.zeros((1 << 28 if device.type == "cuda" else 1 << 25), device=device)
    target = torch.empty_like(source)
    copying = median_seconds(lambda: target.copy_(source), device, repeat)
    return 2 * n**3 / product, 2 * 4 * len(source) / copying


# -----------------------------------------------------------------------------
# Training


class SyntheticWindows:
    """Random tokens with the interface of TrainingWindows."""

    def __init__(self, vocab_size: int):
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.int64)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        T = train.block_size
        starts = np.arange(first, first + count) * 977 % (len(self.tokens) - T - 1)
        rows = np.lib.stride_tricks.sliding_window_view(self.tokens, T + 1)[starts]
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def make_run() -> tuple[train.Run, float]:
    """A run by train.py's keys, and the seconds its compilation took."""
    setup.check_keys(KEYS, train.OPTIMIZERS, train.SCHEDULES)
    device, dtype, rank, world_size = setup.set_up_device(KEYS)
    torch.manual_seed(train.seed)
    windows, ids = None, vocab_size
    if real_data:
        datasets = setup.load_datasets(KEYS, rank)
        windows, ids = train.make_windows(datasets), datasets[0][0].vocab_size
    model = new_model(ids).to(device).train()
    c = model.config
    if train.block_size > c.block_size or (windows and c.vocab_size < ids):
        raise UserError(
            f"--init_from={train.init_from}: its context is {c.block_size} and its vocabulary {c.vocab_size:,}: give "
            f"--block_size={c.block_size}, or its own dataset"
        )
    setup.resolve_limits(KEYS, train.State(), None, model, world_size)
    batches = train.Batches(windows or SyntheticWindows(c.vocab_size), device, rank, world_size)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    accum = train.gradient_accumulation_steps // world_size
    run = train.Run(model, model, [], scaler, batches, device, dtype, accum, rank, world_size)
    run.optimizers = train.make_optimizers(model, dtype)
    run.step_model, seconds = timed(lambda: setup.compile_and_wrap(run, train.compile, train.label_smoothing), device)
    return run, 0.0 if getattr(run.step_model, "module", run.step_model) is model else seconds


def new_model(ids: int) -> GPT:
    """train.py's model, new or with the weights of --init_from."""
    return (
        checkpoint.model_from_keys(KEYS, ids)
        if train.init_from == "scratch"
        else checkpoint.load_model(train.init_from)[0]
    )


def time_steps(run: train.Run, state: train.State) -> list[float]:
    """Seconds of each of `steps` steps, after three that are not counted."""
    times = []
    for n in range(3 + steps):
        if n == 3 and run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        times.append(timed(lambda: train.train_step(run, state, train.learning_rate), run.device)[1])
    return times[3:]


def attention_kernel(run: train.Run) -> str:
    c, T = run.model.config, train.block_size
    q = torch.zeros(1, c.n_head, T, c.head_size, device=run.device, dtype=run.dtype, requires_grad=True)
    if c.attn == "manual" or manual_attention_is_faster(q, T, training=True):
        return "manual"
    choice = torch._fused_sdp_choice(q, q, q, None, c.dropout, True)
    return torch.nn.attention.SDPBackend(choice).name.lower().replace("_attention", "")


def bench_train() -> dict:
    """train.py's step, its parts, and the roofline."""
    run, compile_seconds = make_run()
    device, model, state, master = run.device, run.model, train.State(), run.rank == 0
    tokens_per_step = train.batch_size * train.block_size * run.grad_accum_steps * run.world_size
    if master:
        ranks = f" x {run.world_size} ranks" if run.world_size > 1 else ""
        compiled = f"compiled in {compile_seconds:.1f} s" if compile_seconds else "not compiled"
        print(
            f"{model.num_params():,} parameters, {train.batch_size} x {train.block_size} tokens x {run.grad_accum_steps}{ranks}, "
            f"{device}, {runtime.dtype_name(run.dtype)}, attention: {attention_kernel(run)}, {compiled}"
        )
    times = time_steps(run, state)
    seconds, memory = statistics.median(times), runtime.peak_memory(device)
    figures = {"tokens_per_second": tokens_per_step / seconds, "ms_per_step": 1e3 * seconds, "peak_memory_mib": memory}
    figures["compile_seconds"] = compile_seconds or None
    causal = model.flops_per_token(train.block_size, "causal") * tokens_per_step / run.world_size
    if master:
        span = f"({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
        print(f"{figures['tokens_per_second']:,.0f} tokens/s, {1e3 * seconds:.1f} ms per step {span}")
        print(f"peak memory {memory or float('nan'):,.0f} MiB")
        if peak := runtime.peak_flops(device, train.peak_tflops):
            palm = model.flops_per_token(train.block_size) * tokens_per_step / run.world_size
            mfu = f"{palm / seconds / peak:.1%} (PaLM), {causal / seconds / peak:.1%} (causal)"
            print(f"MFU {mfu} of {peak / 1e12:,.0f} TFLOP/s")
    if run.world_size > 1:  # the parts below need one rank only
        torch.distributed.barrier()
        run.step_model = model  # DDP must go before its process group
        torch.distributed.destroy_process_group()
        return figures if master else {}
    parts = time_parts(run)
    figures |= {f"ms_{name.replace(' ', '_')}": 1e3 * s for name, s in parts.items()}
    print("where the time goes, each part timed by itself:")
    for name, s in parts.items():
        print(f"  {name:<28} {1e3 * s:>9.1f} ms  {s / seconds:>6.1%}")
    flops, bandwidth = roofline(device, run.dtype)
    print(f"this machine: {flops / 1e12:.2f} TFLOP/s in a large product, {bandwidth / 1e9:.0f} GB/s in a copy")
    optimizer_bytes = sum(p.numel() for p in model.parameters()) * 4 * 7  # AdamW reads 4 tensors and writes 3
    figures["ms_roofline"] = 1e3 * (causal / flops + optimizer_bytes / bandwidth)
    print(
        f"roofline: {1e3 * causal / flops:.1f} ms for the products (causal), {1e3 * optimizer_bytes / bandwidth:.1f} ms for the "
        f"optimizer's memory: the step takes {1e3 * seconds / figures['ms_roofline']:.1f} times that"
    )
    if profile:
        with torch.profiler.profile() as trace:
            for _ in range(3):
                train.train_step(run, state, train.learning_rate)
        file = "trace.json" if profile is True else profile
        trace.export_chrome_trace(file)
        print(f"{file}: open it in chrome://tracing or ui.perfetto.dev")
    return figures


def time_parts(run: train.Run) -> dict[str, float]:
    """Seconds of a step's parts, each by itself."""
    device, model, n = run.device, run.model, run.grad_accum_steps
    x, y = run.batches.load(0)
    with torch.no_grad(), run.autocast():
        hidden = model.hidden(x).detach()
    hidden.requires_grad_()
    loss_of = model.loss_of if run.step_model is model else torch.compile(model.loss_of, dynamic=False)

    def forward():
        with run.autocast():
            return run.step_model(x, y, return_logits=False)[1]

    def head():
        with run.autocast():
            return loss_of(hidden, y)

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or float("inf"))
        for optimizer in run.optimizers:
            optimizer.step()

    whole, loss_head = (median_seconds(work, device, repeat) * n for work in (forward, head))
    both = median_seconds(lambda: run.scaler.scale(forward()).backward(), device, repeat) * n
    return {
        "batch": median_seconds(lambda: run.batches.load(0), device, repeat) * n, "loss head": loss_head,
        "forward": max(0.0, whole - loss_head), "backward": both - whole,
        "optimizer": median_seconds(optimize, device, repeat),
    }  # fmt: skip


def bench_batches() -> dict:
    """Micro-batches of 1, 2, 4, ... until memory ends or two in a row are not faster: tokens/s and memory of each."""
    figures, rows, slower, device = {}, 1, 0, runtime.pick_device(train.device)
    print(f"{'micro-batch':>12} {'tokens/s':>12} {'ms per step':>12} {'MiB':>8}")
    while slower < 2:
        train.batch_size, train.gradient_accumulation_steps, train.total_batch_tokens = rows, 1, 0
        try:
            run, _ = make_run()
            seconds = statistics.median(time_steps(run, train.State()))
        except Exception as e:
            if not runtime.is_out_of_memory(e):
                raise
            if not figures:
                raise UserError(f"not even one sequence of {train.block_size} tokens fits") from None
            print(f"{rows:>12} does not fit")
            break
        rate = rows * train.block_size / seconds
        slower = 0 if rate > max(figures.values(), default=0) * 1.02 else slower + 1
        figures[f"tokens_per_second_batch_{rows}"] = rate
        memory = runtime.peak_memory(device) or 0.0
        print(f"{rows:>12} {rate:>12,.0f} {1e3 * seconds:>12.1f} {memory:>8,.0f}")
        del run
        rows *= 2
        available = psutil.virtual_memory().available / 2**20 + memory  # on a GPU torch raises instead
        if device.type == "cpu" and 2 * memory > available:
            print(f"{rows:>12} would not fit")
            break
    best = max(figures, key=figures.get).rpartition("_")[2]
    print(f"the fastest: --batch_size={best}")
    return figures


# -----------------------------------------------------------------------------
# Decoding, HellaSwag


def bench_decode() -> dict:
    """Tokens/s of GPT.generate, for one text and for a batch of them."""
    setup.check_keys(KEYS, train.OPTIMIZERS, train.SCHEDULES)
    device, dtype, _, _ = setup.set_up_device(KEYS)
    model = new_model(vocab_size)
    c, figures, params = model.config, {}, model.num_params()
    if 16 + tokens > c.block_size:
        raise UserError(f"--tokens={tokens}: with a prompt of 16, more than the context of {c.block_size}")
    width = 1 if quantize else torch.finfo(dtype).bits // 8
    size = sum(p.numel() for n, p in model.named_parameters() if ".wpe." not in n) * width
    if not c.tie_weights:  # one row of the embedding is read
        size -= model.transformer.wte.weight.numel() * width
    inference.for_inference(model, device, dtype, quantize)
    _, bandwidth = roofline(device, dtype)
    print(
        f"{params:,} parameters, {device}, {quantize or runtime.dtype_name(dtype)}, {tokens} tokens after a prompt of 16"
    )
    for batch in (1, decode_batch):
        idx, settings = torch.zeros(batch, 16, dtype=torch.long, device=device), dict(top_k=min(200, c.vocab_size))
        if device.type == "cuda":
            settings["make_step"] = lambda *parts: inference.DecodeStep(*parts, compile=train.compile is True)

        def decode(idx=idx, settings=settings) -> float:
            start, counted = time.perf_counter(), tokens
            stream = model.generate(idx, tokens, **settings)
            for n, _ in enumerate(inference.one_ahead(stream) if device.type == "cuda" else stream):
                if n == 2 and device.type == "cuda":  # the graph is captured by now
                    runtime.synchronize(device)
                    start, counted = time.perf_counter(), tokens - 3
            runtime.synchronize(device)
            return len(idx) * counted / (time.perf_counter() - start)

        decode()
        rates = [decode() for _ in range(repeat)]
        figures[f"decode_tokens_per_second_batch_{batch}"] = rate = statistics.median(rates)
        print(f"batch {batch:<4} {rate:>10,.1f} tokens/s ({min(rates):,.1f} to {max(rates):,.1f})")
    bound = f"batch 1 is bound to {bandwidth / size:,.0f} tokens/s"
    print(f"reading the weights once per token at {bandwidth / 1e9:.0f} GB/s (a copy's rate), {bound}")
    return figures


def bench_hellaswag() -> dict:
    """Examples/s of eval_hellaswag.py, and of the same model one ending at a time, in turn."""
    device, dtype, _, _ = setup.set_up_device(KEYS)
    if train.init_from == "scratch":
        tokenizer = gpt2_tokenizer()
        model = new_model(tokenizer.n_vocab)
    else:
        model, loaded = checkpoint.load_model(train.init_from)
        tokenizer = checkpoint.find_tokenizer(loaded, train.data_dir)
    every = load_examples(inputs, train.data_dir, 0)
    drawn = random.Random(train.seed).sample(every, min(examples, len(every)))
    questions = [classic_question(e, tokenizer) for e in drawn]
    few = questions[: -(-len(questions) // 10)]
    plain = copy.deepcopy(model).to(device).eval()
    inference.for_inference(model, device, dtype)
    print(f"{plain.num_params():,} parameters, {device}; {len(questions)} examples, {len(few)} of them one at a time")
    choices, batched = [-1] * len(few), np.zeros((len(questions), 4))

    def one_at_a_time() -> int:
        choices[:] = (int(plain_losses(plain, q).argmin()) for q in few)
        return len(few)

    def together() -> int:
        for indices, losses in ending_losses(model, questions):
            batched[indices] = losses
        return len(questions)

    one, whole = rates_in_turn(one_at_a_time, together, device=device)
    for name, rates in (("one at a time, float32", one), (f"together, {runtime.dtype_name(dtype)}", whole)):
        print(f"{name:<24} {statistics.median(rates):9.2f} examples/s ({min(rates):.2f} to {max(rates):.2f})")
    ratio = statistics.median(a / b for a, b in zip(whole, one))
    same = sum(batched[: len(few)].argmin(1) == choices)
    print(f"ratio {ratio:.2f}, the same choice in {same} of {len(few)}")
    return {"hellaswag_examples_per_second": statistics.median(whole)}


@torch.no_grad()
def plain_losses(model: GPT, question: Question) -> torch.Tensor:
    """The four endings' summed token losses, (4,): texts padded to one length, all logits computed."""
    T, lengths = model.config.block_size, [len(e) for e in question.endings]
    texts = [(question.context + e)[-T - 1 :] for e in question.endings]
    ids = torch.zeros(4, max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros(4, ids.size(1) - 1)
    for n, text in enumerate(texts):
        ids[n, : len(text)], mask[n, len(text) - 1 - lengths[n] : len(text) - 1] = torch.tensor(text), 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits, _ = model(ids[:, :-1])
    per_token = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (per_token.view(mask.shape) * mask).sum(1)


# -----------------------------------------------------------------------------
# Data, start-up


def print_rates(name: str, rates: list[float], baseline: list[float] | None = None, of: str = "") -> None:
    ratio = f"{statistics.median(a / b for a, b in zip(rates, baseline)):8.2f} x {of}" if baseline else ""
    span = f"({min(rates) / 1e6:,.2f} to {max(rates) / 1e6:,.2f})"
    print(f"{name:<44} {statistics.median(rates) / 1e6:>9,.2f}M tokens/s {span:<22} {ratio}")


def bench_data() -> dict:
    """One core's encode_ordinary, the whole way from text to shards, and the reader of batches."""
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name) / "text.txt"
        if inputs:
            with open(inputs, "rb") as f:
                text.write_text(f.read(megabytes * 10**6).decode("utf-8", errors="replace"), encoding="utf-8")
        else:
            rng = random.Random(1337)
            with open(text, "w", encoding="utf-8") as f:
                while f.tell() < megabytes * 10**6:
                    f.write("".join(f"{story(rng)}\n{EOT}\n" for _ in range(1000)))
        tokenizing = bench_tokenizing(text, folder)
        return {"tokenizing_tokens_per_second": tokenizing, "reading_tokens_per_second": bench_reading(folder)}


def bench_tokenizing(text: Path, folder: Path) -> float:
    """Tokens/s from a text to the shards of a dataset `d` in the folder."""
    tokenizer = gpt2_tokenizer()
    documents = [document for document, _ in corpus.split_text(text)]
    if not documents:
        raise UserError(f"--inputs={inputs}: there is no text in it")
    size = sum(len(d.encode()) for d in documents)
    print(f"text: {len(documents):,} documents, {size / 1e6:.1f} MB; {corpus.cores()} cores; medians of {repeat}")

    def bare() -> int:
        encode = tokenizer.encoding.encode_ordinary
        return sum(len(encode(d)) for d in documents)

    def ours() -> int:
        writer = corpus.DatasetWriter(folder / "d", {}, lambda: tokenizer, overwrite=True)
        writer.write(lambda position: corpus.split_text(text, position or 0), "train")
        return writer.finish("")["train"]

    one_core, whole = rates_in_turn(bare, ours)
    print_rates("tiktoken's encode_ordinary, one core", one_core)
    print_rates(
        "from text to shards, all cores",
        whole,
        [r * corpus.cores() for r in one_core],
        f"{corpus.cores()} corpus.cores of that",
    )
    return statistics.median(whole)


def bench_reading(folder: Path) -> float:
    """Tokens/s of TrainingWindows on the dataset `d` in the folder."""
    data = shards.load_dataset("d", folder)
    stream, need = np.concatenate([s.map() for s in data.train]), 64 * 1025
    stream = np.resize(stream, max(len(stream), need))
    windows, count = shards.TrainingWindows(data.train, 1024, data.vocab_size), max(1, 2 * 10**7 // (64 * 1024))

    def read() -> int:
        for n in range(count):
            windows.batch(n * 64, 64)
        return count * 64 * 1024

    def convert() -> int:  # the least any reader does: inputs and targets as int64
        for n in range(count):
            start = n * 1000 % (len(stream) - need + 1)
            part = stream[start : start + need].reshape(64, -1)
            part[:, :-1].astype(np.int64), part[:, 1:].astype(np.int64)
        return count * 64 * 1024

    copying, reading = rates_in_turn(convert, read)
    print_rates("copying tokens into inputs and targets", copying)
    print_rates("batches of shuffled windows, one core", reading, copying, "that")
    print(
        f"8 GPUs at half a million tokens/s each need 4M: the reader gives {statistics.median(reading) / 4e6:.0f} times that"
    )
    return statistics.median(reading)


def process_seconds(*command: str, times: int = 3, **environment: str) -> list[float]:
    """Seconds of a Python process from start to end, `times` times. Raises RuntimeError if it fails."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | environment)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {error_in(done.stderr)}")
    return seconds


def bench_startup() -> dict:
    """Whole processes: what a person waits for before anything is to be seen."""
    figures, one = {}, ["--max_iters=1", "--eval_iters=1", "--final_eval_tokens=1000", "--eval_interval=0"]

    def report(name: str, seconds: list[float]) -> None:
        figures[f"seconds_{name.replace(' ', '_')}"] = value = statistics.median(seconds)
        ratio = f"{value / figures['seconds_import_torch']:.2f} x import torch"
        print(f"{name:<32} {value:>6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  {ratio}")

    report("import torch", process_seconds("-c", "import torch", times=repeat))
    with tempfile.TemporaryDirectory() as folder:
        out, data = f"--out_dir={folder}/run", f"--data_dir={folder}/data"
        quickstart = [str(HERE / "train.py"), str(HERE / "config/quickstart.py"), data, out, *one]
        process_seconds(*quickstart, times=1)  # makes its data
        sample = [str(HERE / "sample.py"), out, "--max_new_tokens=20"]
        report("sample.py, a small run", process_seconds(*sample, times=repeat))
        report("train.py, one step", process_seconds(*quickstart, times=repeat))
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for name, times in (("the same compiled, the first time", 1), ("again, from the cache on disk", 2)):
            report(name, process_seconds(*quickstart, "--compile=True", times=times, **cache))
    return figures


# -----------------------------------------------------------------------------


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for bench.py's own keys, and those for train.py's."""
    own = {k for k in read_keys(__file__) if not k.startswith("#")} | {"input"}
    mine = [a for a in argv if a in ("--help", "-h") or a.removeprefix("--").partition("=")[0].replace("-", "_") in own]
    return mine, [a for a in argv if a not in mine]


def default_arguments(argv: list[str]) -> list[str]:
    """train.py's arguments; if there are none, on a CPU those of a model that it can train."""
    if argv or mode in ("decode", "hellaswag") or torch.cuda.is_available():
        return argv
    return [str(HERE / "config" / "baby_cpu.py"), "--dropout=0.0"]


BENCHES = {
    "train": bench_train, "decode": bench_decode, "hellaswag": bench_hellaswag, "data": bench_data, "startup": bench_startup,
}  # fmt: skip


def show_ratios(figures: dict, before: dict) -> None:
    for name, value in figures.items():
        if value and before.get(name):
            ratio = value / before[name] if "per_second" in name else before[name] / value
            note = "  slower" if ratio < 0.95 else ""
            print(f"{name:<40} {before[name]:>12,.1f} -> {value:>12,.1f}  {ratio:5.2f} x as good{note}")


def main() -> None:
    check_choice("mode", mode, BENCHES)
    check_bounds(globals(), at_least_1="megabytes steps tokens decode_batch repeat examples")
    if find_batch and mode != "train":
        raise UserError(f"--find_batch is for --mode=train, not {mode}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (mode != "train" or find_batch):
        raise UserError("under torchrun only --mode=train runs, without --find_batch")
    for path in filter(None, (inputs, compare)):
        if not Path(path).is_file():
            raise UserError(f"--{'inputs' if path == inputs else 'compare'}={path}: no such file")
    try:
        before = json.loads(Path(compare).read_text(encoding="utf-8")) if compare else {}
    except ValueError:
        raise UserError(f"--compare={compare}: not a file that --output wrote") from None
    figures = bench_batches() if find_batch else BENCHES[mode]()
    if compare:
        show_ratios(figures, before)
    if output and figures:
        atomic_write(Path(output), json.dumps(figures, indent=1))


if __name__ == "__main__":
    with short_errors(), runtime.explain_errors(KEYS):
        mine, theirs = split_arguments(sys.argv[1:])
        configure(globals(), mine, aliases={"input": "inputs"})
        if mode not in ("data", "startup"):
            configure(KEYS, default_arguments(theirs), dial=("depth", setup.from_depth), one_of=train.ALTERNATIVES)
        elif theirs:
            raise UserError(f"{theirs[0]}: --mode={mode} takes no key of train.py")
        main()
