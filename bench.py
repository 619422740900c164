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
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import train
from common import checkpoint, corpus, inference, runtime, setup, shards
from common.checkpoint import State
from common.cpu import block_attention_is_faster
from common.files import atomic_write, check_writable, parse_json
from common.scoring import Question, ending_losses
from common.tokenizer import EOT, gpt2_tokenizer
from common.windows import Batches, TrainingWindows
from configurator import UserError, check_bounds, check_choice, configure, error_in, read_keys, short_errors
from eval_hellaswag import classic_question, load_examples
from model import GPT
from prepare_tinystories import story

import numpy as np
import psutil
import torch
import torch.nn.functional as F

mode = "train"  # train | decode | hellaswag | data | startup
steps = 20  # training steps to time, after three to warm up
tokens = 100  # tokens to decode
quantize = ""  # int8: decode with 8-bit weights
decode_batch = 16  # texts at a time, beside a single one
repeat = 5  # repetitions of short measurements, for the median
vocab_size = 0  # ids of the synthetic tokens; 0: those of --dataset where it is there, otherwise GPT-2's
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


def seconds_of(*works, device: torch.device | None = None, times=0, warmup=1) -> list[list[float]]:
    """Of each work the seconds of `times` calls (0: `repeat`), after `warmup` calls. The works take turns."""
    seconds = [[] for _ in works]
    for _ in range(warmup + (times or repeat)):
        for own, work in zip(seconds, works):
            runtime.synchronize(device)
            start = time.perf_counter()
            work()
            runtime.synchronize(device)
            own.append(time.perf_counter() - start)
    return [own[warmup:] for own in seconds]


class Measured(float):
    """A median, and `spread`: half its range as a fraction of it, by which two runs of the same may differ."""

    def __new__(cls, values, of=lambda x: x):
        """of: what is measured, as a function of the values."""
        self = super().__new__(cls, of(statistics.median(values)))
        values = [of(value) for value in values]
        self.spread = (max(values) - min(values)) / 2 / self if self else 0.0
        return self

    def times(self, factor: float) -> "Measured":
        """In another unit, with the same spread."""
        scaled = Measured([factor * self])
        scaled.spread = self.spread
        return scaled


def report(name: str, unit: str, count: float, seconds: list[float]) -> Measured:
    """Print count / seconds with its range, and return its median."""
    rate = Measured(seconds, lambda s: count / s)
    print(f"{name:<38} {rate:>12,.2f}{unit} ({count / max(seconds):,.2f} to {count / min(seconds):,.2f})")
    return rate


def difference(whole: list[float], part: list[float]) -> Measured | None:
    """Seconds of a whole without a part that was timed in turn with it; None where the noise is larger than that."""
    found = sorted(a - b for a, b in zip(whole, part))
    return Measured(found) if found[len(found) // 4] > 0 else None


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a copy (read and written) on this device."""
    n, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source, target = torch.zeros(size, device=device), torch.empty(size, device=device)
    product, copying = seconds_of(lambda: a @ b, lambda: target.copy_(source), device=device)
    flops, bandwidth = 2 * n**3 / statistics.median(product), 2 * 4 * size / statistics.median(copying)
    print(f"this machine: {flops / 1e12:.2f} TFLOP/s in a large product, {bandwidth / 1e9:.0f} GB/s in a copy")
    return flops, bandwidth


# -----------------------------------------------------------------------------
# Training


class SyntheticWindows:
    """Random tokens with the interface of TrainingWindows."""

    def __init__(self, vocab_size: int):
        tokens = np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.int64)
        self.windows = np.lib.stride_tricks.sliding_window_view(tokens, train.block_size + 1)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.windows[np.arange(first, first + count) * 977 % len(self.windows)]
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def learned(self, first: int, count: int) -> int:
        return count * train.block_size


def vocabulary() -> int:
    """The vocabulary size of a model by train.py's keys."""
    if vocab_size:
        return vocab_size
    folder = Path(train.data_dir) / train.dataset.partition(",")[0].partition(":")[0]
    if folder.is_dir():
        return shards.load_dataset(folder.name, train.data_dir).vocab_size
    print(f"{folder} is not there: GPT-2's vocabulary of 50,257 is taken, --vocab_size= takes another")
    return 50257


def make_run() -> train.Run:
    """A run by train.py's keys."""
    device, dtype, rank, world_size = setup.set_up_device(KEYS)
    synthetic = shards.Dataset("synthetic tokens", [], [], None, vocabulary())
    datasets = setup.load_datasets(KEYS, rank) if real_data else [(synthetic, 1.0)]
    loaded = None if train.init_from == "scratch" else checkpoint.read_model(train.init_from)
    model = setup.make_model(KEYS, datasets[0][0], loaded).to(device).train()
    windows = setup.make_windows(KEYS, datasets) if real_data else SyntheticWindows(model.config.vocab_size)
    setup.resolve_limits(KEYS, State(), None, model, world_size)
    batches = Batches(windows, train.batch_size, device, rank, world_size)
    accum = train.gradient_accumulation_steps // world_size
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizers = train.make_optimizers(model, dtype)
    run = train.Run(model, model, optimizers, scaler, batches, device, dtype, accum, rank, world_size)
    run.step_model = setup.compile_and_wrap(run, train.compile, train.label_smoothing)
    return run


def time_steps(run: train.Run) -> list[float]:
    step = partial(train.train_step, run, State(), train.learning_rate)
    return seconds_of(step, device=run.device, times=steps, warmup=3)[0]


def attention_kernel(run: train.Run) -> str:
    c, T = run.model.config, train.block_size
    q = torch.zeros(1, c.n_head, T, c.head_size, device=run.device, dtype=run.dtype, requires_grad=True)
    if c.attn == "sdpa" and block_attention_is_faster(q, q, c.dropout):
        return "blocks"
    if c.attn == "manual":
        return "manual"
    choice = torch._fused_sdp_choice(q, q, q, None, c.dropout, True)
    return torch.nn.attention.SDPBackend(choice).name.lower().removesuffix("_attention")


def bench_train() -> dict:
    """train.py's step, its parts, and the roofline."""
    run = make_run()
    device, model, plain = run.device, run.model, getattr(run.step_model, "module", run.step_model) is run.model
    times = time_steps(run)
    if run.world_size > 1:
        run.step_model = model  # DDP must go before its process group
    runtime.shutdown_distributed()
    if run.rank:
        return {}
    ranks = f" x {run.world_size} ranks" if run.world_size > 1 else ""
    batch = f"{train.batch_size} x {train.block_size} tokens x {run.grad_accum_steps}{ranks}"
    kernel = f"attention: {attention_kernel(run)}, {'not compiled' if plain else 'compiled'}"
    print(f"{model.num_params():,} parameters, {batch}, {device}, {runtime.dtype_name(run.dtype)}, {kernel}")
    tokens_per_step = run.sequences_per_step * train.block_size
    seconds, memory = Measured(times), runtime.peak_memory(device)
    rate = report("a step", " tokens/s", tokens_per_step, times)
    print(f"{1e3 * seconds:.1f} ms per step, peak memory {memory or math.nan:,.0f} MiB")
    figures = {"tokens_per_second": rate, "ms_per_step": Measured([1e3 * s for s in times]), "peak_memory_mib": memory}
    if peak := runtime.peak_flops(device, train.peak_tflops):
        palm = runtime.flops_per_token(model, train.block_size) * tokens_per_step / run.world_size
        print(f"MFU {palm / seconds / peak:.1%} (PaLM) of {peak / 1e12:,.0f} TFLOP/s")
    if run.world_size > 1:
        return figures
    print("where the time goes, each part timed by itself, in turn with the others:")
    for name, part in time_parts(run).items():
        if part is None:
            print(f"  {name:<12}  too noisy to split")
            continue
        figures[f"ms_{name}"] = part.times(1e3)
        print(f"  {name:<12} {1e3 * part:>9.1f} ms  {part / seconds:>6.1%}")
    flops, bandwidth = roofline(device, run.dtype)
    products = runtime.flops_per_token(model, train.block_size, "causal") * tokens_per_step / flops
    traffic = sum(p.numel() for p in model.parameters()) * 4 * 7 / bandwidth  # AdamW reads 4 tensors and writes 3
    figures["ms_roofline"] = 1e3 * (products + traffic)
    bound = f"{1e3 * products:.1f} ms for the products, {1e3 * traffic:.1f} ms for the optimizer's memory"
    print(f"roofline: {bound}: the step takes {seconds / (products + traffic):.1f} times that")
    if profile:
        with torch.profiler.profile() as trace:
            seconds_of(partial(train.train_step, run, State(), 0.0), device=device, times=3, warmup=0)
        file = "trace.json" if profile is True else profile
        trace.export_chrome_trace(file)
        print(f"{file}: open it in chrome://tracing or ui.perfetto.dev")
    return figures


def time_parts(run: train.Run) -> dict[str, Measured | None]:
    """Seconds of a step's parts, each by itself; None where noise hides one."""
    x, y = run.batches.load(0)
    with torch.no_grad(), run.autocast():
        hidden = run.model.hidden(x).detach().requires_grad_()
    compiled = run.step_model is not run.model
    loss_of = torch.compile(run.model.loss_of, dynamic=False) if compiled else run.model.loss_of

    def forward():
        with run.autocast():
            return run.step_model(x, y, return_logits=False)[1]

    def head():
        with run.autocast():
            return loss_of(hidden, y)

    def optimize():
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), train.grad_clip or math.inf)
        for optimizer in run.optimizers:
            optimizer.step()

    load = partial(run.batches.load, 0)
    works = (load, forward, head, lambda: run.scaler.scale(forward()).backward(), optimize)
    batch, whole, loss_head, both, optimizer = seconds_of(*works, device=run.device)
    parts = {"batch": Measured(batch), "forward": difference(whole, loss_head), "loss_head": Measured(loss_head)}
    parts["backward"] = difference(both, whole)
    parts = {name: part and part.times(run.grad_accum_steps) for name, part in parts.items()}
    return parts | {"optimizer": Measured(optimizer)}


def bench_batches() -> dict:
    """Micro-batches of 1, 2, 4, ... until memory ends or two in a row are not faster: tokens/s of each."""
    figures, rows, slower, device = {}, 1, 0, runtime.pick_device(train.device)
    print(f"{'micro-batch':>12} {'tokens/s':>12} {'ms per step':>12} {'MiB':>8}")
    while slower < 2:
        train.batch_size, train.gradient_accumulation_steps, train.total_batch_tokens = rows, 1, 0
        gc.collect()  # the run before
        try:
            seconds = Measured(time_steps(make_run()))
        except Exception as e:
            if not (runtime.is_out_of_memory(e) and figures):
                raise
            break
        rate, memory = Measured([rows * train.block_size / seconds]), runtime.peak_memory(device) or 0.0
        rate.spread = seconds.spread
        slower = 0 if rate > max(figures.values(), default=0) * 1.02 else slower + 1
        figures[f"tokens_per_second_batch_{rows}"] = rate
        print(f"{rows:>12} {rate:>12,.0f} {1e3 * seconds:>12.1f} {memory:>8,.0f}")
        rows *= 2
        # A CPU's memory is not tried: the system would end the process.
        if device.type == "cpu" and memory > psutil.virtual_memory().available / 2**20:
            break
    if slower < 2:
        print(f"{rows:>12} does not fit")
    print(f"the fastest: --batch_size={max(figures, key=figures.get).rpartition('_')[2]}")
    return figures


# -----------------------------------------------------------------------------
# Decoding, HellaSwag


def bench_decode() -> dict:
    """Tokens/s of GPT.generate, for one text and for a batch of them."""
    device, _, _, _ = setup.set_up_device(KEYS)
    dtype, cuda, figures = runtime.pick_dtype(train.dtype, device, writing=True), device.type == "cuda", {}
    model, _ = load_or_make_model(50257 if train.init_from != "scratch" else vocabulary())
    if 16 + tokens > model.config.block_size:
        raise UserError(f"--tokens={tokens}: with a prompt of 16, more than the context of {model.config.block_size}")
    weights = quantize or runtime.dtype_name(dtype)
    print(f"{model.num_params():,} parameters, {device}, {weights}, {tokens} tokens after a prompt of 16")
    inference.for_inference(model, device, dtype, quantize)
    make_step = (lambda *parts: inference.DecodeStep(*parts, compile=train.compile is True)) if cuda else None

    def seconds_per_token(batch: int) -> float:
        idx = torch.zeros(batch, 16, dtype=torch.long, device=device)
        settings = dict(temperature=train.sample_temperature, top_k=min(200, model.config.vocab_size))
        stream = model.generate(idx, tokens, **settings, make_step=make_step)
        start, counted = time.perf_counter(), tokens
        for n, _ in enumerate(inference.one_ahead(stream) if cuda else stream):
            if n == 2 and cuda:  # the graph is captured by now
                runtime.synchronize(device)
                start, counted = time.perf_counter(), tokens - 4  # one_ahead has launched the next
        runtime.synchronize(device)
        return (time.perf_counter() - start) / counted

    for batch in (1, decode_batch):
        seconds = [seconds_per_token(batch) for _ in range(repeat + 1)]
        figures[f"decode_tokens_per_second_batch_{batch}"] = report(f"batch {batch}", " tokens/s", batch, seconds[1:])
    return figures


def load_or_make_model(vocab_size: int) -> tuple[GPT, dict]:
    """The model of --init_from with its checkpoint, or a new one by the keys."""
    if train.init_from == "scratch":
        return checkpoint.model_from_keys(KEYS, vocab_size), {"tokenizer": {"kind": "gpt2"}}
    return checkpoint.load_model(train.init_from)


def bench_hellaswag() -> dict:
    """Examples/s of eval_hellaswag.py, and of the same model one example at a time, in turn."""
    device, dtype, _, _ = setup.set_up_device(KEYS)
    model, loaded = load_or_make_model(50257)
    tokenizer = checkpoint.find_tokenizer(loaded, train.data_dir)
    found = load_examples(inputs, train.data_dir, 0)
    drawn = random.Random(train.seed).sample(found, min(examples, len(found)))
    questions = [classic_question(e, tokenizer) for e in drawn]
    few = questions[: -(-len(questions) // 10)]
    plain = copy.deepcopy(model).to(device).eval()
    inference.for_inference(model, device, dtype)
    print(f"{plain.num_params():,} parameters, {device}; {len(questions)} examples, {len(few)} of them one at a time")
    choices = np.zeros((2, len(questions)), int)  # one at a time, together

    def one_at_a_time() -> None:
        choices[0, : len(few)] = [plain_losses(plain, question).argmin().item() for question in few]

    def together() -> None:
        for indices, losses, _ in ending_losses(model, questions):
            choices[1, indices] = losses.argmin(1)

    one, whole = seconds_of(one_at_a_time, together, device=device)
    baseline = report("one at a time, float32", " examples/s", len(few), one)
    rate = report(f"together, {runtime.dtype_name(dtype)}", " examples/s", len(questions), whole)
    same = (choices[0] == choices[1])[: len(few)].sum()
    print(f"{rate / baseline:.2f} x that, the same choice in {same} of {len(few)}")
    return {"hellaswag_examples_per_second": rate}


@torch.no_grad()
def plain_losses(model: GPT, question: Question) -> torch.Tensor:
    """The four endings' summed token losses, (4,): texts padded to one length, all logits computed."""
    texts = [torch.tensor((question.context + e)[-model.config.block_size - 1 :]) for e in question.endings]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)  # (4, T + 1)
    logits, _ = model(ids[:, :-1])
    per_token = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(4, -1)
    ends = [len(text) - 1 for text in texts]
    return torch.stack([row[end - len(e) : end].sum() for row, end, e in zip(per_token, ends, question.endings)])


# -----------------------------------------------------------------------------
# Data, start-up


def bench_data() -> dict:
    """One core's encode_ordinary, the whole way from text to shards, and the reader of batches of 64 x 1024 tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name) / "text.txt"
        text.write_text(text_to_tokenize(), encoding="utf-8")
        documents = [document for document, _ in corpus.split_text(text)]
        if not documents:
            raise UserError(f"--inputs={inputs}: there is no text in it")
        tokenizer, cores, counts = gpt2_tokenizer(), corpus.cores(), {}
        print(f"text: {len(documents):,} documents, {text.stat().st_size / 1e6:.1f} MB")

        def encode() -> None:
            counts["encoded"] = sum(len(tokenizer.encoding.encode_ordinary(d)) for d in documents)

        def write_shards() -> None:
            writer = corpus.DatasetWriter(folder / "d", {}, lambda: tokenizer, overwrite=True)
            writer.write(lambda position: corpus.split_text(text, position or 0), "train")
            counts["written"] = writer.finish("")["train"]

        one_core, whole = seconds_of(encode, write_shards)
        baseline = report("tiktoken's encode_ordinary, one core", "M tokens/s", counts["encoded"] / 1e6, one_core)
        tokenizing = report("from text to shards, all cores", "M tokens/s", counts["written"] / 1e6, whole)
        print(f"{tokenizing / baseline / cores:.2f} x {cores} cores of that")

        data, n_batches = shards.load_dataset("d", folder), 300
        windows = TrainingWindows(data.train, 1024, data.vocab_size)
        rows = np.resize(data.train[0].map(), (64, 1025))

        def copy_rows() -> None:  # the least any reader does
            for _ in range(n_batches):
                rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)

        def read() -> None:
            for n in range(n_batches):
                windows.batch(n * 64, 64)

        copying, reading = seconds_of(copy_rows, read)
        millions = n_batches * 64 * 1024 / 1e6
        report("copying tokens into inputs and targets", "M tokens/s", millions, copying)
        rate = report("batches of shuffled windows, one core", "M tokens/s", millions, reading)
    return {"tokenizing_tokens_per_second": tokenizing.times(1e6), "reading_tokens_per_second": rate.times(1e6)}


def text_to_tokenize() -> str:
    """The first --megabytes of --inputs, or that much of synthetic stories."""
    if inputs:
        with open(inputs, encoding="utf-8", errors="replace") as f:
            return f.read(megabytes * 10**6)
    rng = random.Random(1337)
    return f"\n{EOT}\n".join(story(rng) for _ in range(megabytes * 1600))


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
    figures = {}

    def time_process(name: str, *command: str, times: int = repeat, **environment: str) -> None:
        seconds = process_seconds(*command, times=times, **environment)
        figures[f"seconds_{name.replace(' ', '_')}"] = median = Measured(seconds)
        ratio = f"{median / figures['seconds_import_torch']:.2f} x import torch"
        print(f"{name:<34} {median:>6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  {ratio}")

    with tempfile.TemporaryDirectory() as folder:
        out, data = f"--out_dir={folder}/run", f"--data_dir={folder}/data"
        one_step = ["--max_iters=1", "--eval_iters=1", "--final_eval_tokens=1000", "--eval_interval=0"]
        quickstart = [str(HERE / "train.py"), str(HERE / "config/quickstart.py"), data, out, *one_step]
        compiled, cache = [*quickstart, "--compile=True"], {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        process_seconds(*quickstart, times=1)  # makes its data
        time_process("import torch", "-c", "import torch")
        time_process("sample.py, a small run", str(HERE / "sample.py"), out, "--max_new_tokens=20")
        time_process("train.py, one step", *quickstart)
        time_process("the same compiled, the first time", *compiled, times=1, **cache)
        time_process("again, from the cache on disk", *compiled, times=2, **cache)
    return figures


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for bench.py's own keys, and those for train.py's."""
    own = {*read_keys(__file__), "input", "help", "_h"}
    mine = [a for a in argv if a.removeprefix("--").partition("=")[0].replace("-", "_") in own]
    return mine, [a for a in argv if a not in mine]


BENCHES = {
    "train": bench_train, "decode": bench_decode, "hellaswag": bench_hellaswag, "data": bench_data, "startup": bench_startup,
}  # fmt: skip


def main() -> None:
    check_choice("mode", mode, BENCHES)
    check_bounds(globals(), at_least_1="megabytes steps tokens decode_batch repeat examples")
    if find_batch and mode != "train":
        raise UserError(f"--find_batch is for --mode=train, not {mode}")
    if "WORLD_SIZE" in os.environ and (mode != "train" or find_batch):
        raise UserError("under torchrun only --mode=train runs, without --find_batch")
    if output:
        check_writable("output", output)
    for key, path in (("inputs", inputs), ("compare", compare)):
        if path and not Path(path).is_file():
            raise UserError(f"--{key}={path}: no such file")
    try:
        before = parse_json(Path(compare).read_text(encoding="utf-8")) if compare else {}
        if not isinstance(before, dict) or not isinstance(before.get("spreads", {}), dict):
            raise ValueError
    except ValueError:
        raise UserError(f"--compare={compare}: not a file that --output wrote") from None
    figures = bench_batches() if find_batch else BENCHES[mode]()
    for name, new in figures.items():
        old = before.get(name)
        if not (new and old and isinstance(old, (int, float))):
            continue
        ratio = new / old if "per_second" in name else old / new
        noise = getattr(new, "spread", 0.0) + before.get("spreads", {}).get(name, 0.0)
        verdict = "within the noise" if abs(ratio - 1) <= noise else "slower" if ratio < 0.95 else ""
        print(f"{name:<40} {old:>12,.1f} -> {new:>12,.1f}  {ratio:5.2f} x as good  {verdict}".rstrip())
    if output and figures:
        spreads = {name: figure.spread for name, figure in figures.items() if isinstance(figure, Measured)}
        atomic_write(Path(output), json.dumps(figures | {"spreads": spreads}, indent=1))


if __name__ == "__main__":
    with short_errors(), runtime.explain_errors(KEYS):
        mine, theirs = split_arguments(sys.argv[1:])
        configure(globals(), mine, aliases={"input": "inputs"})
        if mode in ("data", "startup") and theirs:
            raise UserError(f"{theirs[0]}: --mode={mode} takes no key of train.py")
        if mode == "train" and not theirs and not torch.cuda.is_available():  # a model that a CPU can train
            theirs = [str(HERE / "config" / "baby_cpu.py"), "--dropout=0.0"]
        if mode not in ("data", "startup"):
            configure(KEYS, theirs, dial=("depth", setup.from_depth), one_of=train.ALTERNATIVES)
            setup.check_keys(KEYS, train.OPTIMIZERS, train.SCHEDULES)
        main()
