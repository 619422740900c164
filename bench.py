"""How fast, and where the time goes: training, decoding, HellaSwag, data, start-up.

    python bench.py                                      a training step that suits the device, synthetic tokens
    python bench.py config/baby_cpu.py --compile=True    of any config and keys of train.py
    python bench.py --find_batch=True                    which micro-batch is the fastest, and what memory it takes
    python bench.py --mode=decode                        GPT-2 124M, tokens/s for one text and for a batch
    python bench.py --mode=hellaswag                     its examples/s, against one at a time in float32
    python bench.py --mode=data --input=corpus.txt       tokenizing and the batch reader
    python bench.py --mode=startup                       seconds to the first token, the first step, a compiled one
    python bench.py --output=before.json                 ... edit ...   python bench.py --compare=before.json

The step is train.py's own. It is held against the roofline of this machine, which is measured in the same run: the rate of
a large matrix product at the run's dtype, and the bandwidth of a copy. Medians, with the spread beside them.
"""

import contextlib
import copy
import io
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
import torch
import torch.nn.functional as F

import train
from common.checkpoint import find_tokenizer, load_model
from common.corpus import DatasetWriter, cores, split_text
from common.inference import for_inference
from common.logger import Log
from common.runtime import free_memory, is_out_of_memory, largest_batch, peak_flops, peak_memory, pick_device
from common.shards import TrainingWindows, atomic_write, load_dataset
from common.tokenizer import EOT, CharTokenizer, gpt2_tokenizer
from configurator import configure, error_of, read_keys, short_errors
from eval_hellaswag import Question, classic_question, ending_losses, find_examples, read_examples
from model import GPT, GPTConfig, formula_is_faster

mode = "train"  # train | decode | hellaswag | data | startup | all (but HellaSwag, which is downloaded)
steps = 20  # training steps to time, after three to warm up
tokens = 100  # to decode
quantize = ""  # int8: decode with weights of 8 bits
decode_batch = 16  # texts at a time, beside one alone
repeat = 5  # how often what is short is measured, of which the median is told
vocab_size = 50257  # ids of the synthetic tokens
real_data = False  # train on --dataset instead of synthetic tokens
find_batch = False  # train: double the micro-batch as long as it fits and gets faster
profile: bool | str = False  # True: a Chrome trace of three steps to trace.json; or a file for it
output = ""  # a .json file for the figures
compare = ""  # such a file from before: prints the ratios
examples = 400  # hellaswag: drawn at random, of which a tenth one at a time
input = ""  # data: a text, documents separated by <|endoftext|>; empty: made-up stories | hellaswag: a .jsonl file
megabytes = 100  # data: of text at most

HERE = Path(__file__).resolve().parent


def timed(work, on: torch.device | None = None) -> tuple:
    """What work() returns, and its seconds, with the device's work done."""
    synchronize(on)
    begin = time.perf_counter()
    result = work()
    synchronize(on)
    return result, time.perf_counter() - begin


def synchronize(on: torch.device | None) -> None:
    if on is not None and on.type == "cuda":
        torch.cuda.synchronize()
    elif on is not None and on.type == "mps":
        torch.mps.synchronize()


def median_of(work, on: torch.device, times: int) -> float:
    """Seconds of work(), the median of so many times after one that does not count."""
    work()
    return statistics.median(timed(work, on)[1] for _ in range(times))


def roofline(on: torch.device, kind: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a copy, read and written, on this device."""
    n = 8192 if on.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=on, dtype=kind) for _ in range(2))
    product = median_of(lambda: a @ b, on, repeat)
    source = torch.zeros((1 << 28 if on.type == "cuda" else 1 << 25), device=on)
    target = torch.empty_like(source)
    copy = median_of(lambda: target.copy_(source), on, repeat)
    return 2 * n**3 / product, 2 * 4 * len(source) / copy


def attention_backend(run: train.Run) -> str:
    """How this run's attention is computed."""
    c, T = run.model.config, train.block_size
    q = torch.zeros(1, c.n_head, T, c.head_size, device=run.device, dtype=run.dtype, requires_grad=True)
    if c.attn == "manual" or formula_is_faster(q, T, training=True):
        return "formula"
    choice = torch._fused_sdp_choice(q, q, q, None, c.dropout, True)
    return torch.nn.attention.SDPBackend(choice).name.lower().replace("_attention", "")


def make_run() -> tuple[train.Run, float]:
    """A run of train.py's keys with its optimizer, and the seconds that compiling took."""
    train.check_keys()
    on, kind, rank, world = train.set_up_device()
    torch.manual_seed(train.seed)
    if real_data:
        found = train.find_datasets(rank)
        windows, ids = train.training_windows(found), found[0][0].vocab_size
    else:
        windows, ids = None, vocab_size
    model = new_model(ids).to(on).train()
    c = model.config
    if train.block_size > c.block_size or (windows and c.vocab_size < ids):
        raise ValueError(
            f"--init_from={train.init_from}: its context is {c.block_size}, its vocabulary {c.vocab_size:,}: give "
            f"--block_size={c.block_size}, or tokens of its own"
        )
    windows = windows or Synthetic(c.vocab_size)
    if train.batch_size == "auto":
        train.batch_size = largest_batch(model, train.total_batch_tokens, train.block_size, on, kind, world)
    _, micro_batches = train.steps_and_accumulation(model, world, None)
    optimizers = train.new_optimizers(model, kind)
    scaler = torch.amp.GradScaler(on.type, enabled=kind == torch.float16)
    run = train.Run(model, model, optimizers, scaler, windows, on, kind, micro_batches // world, rank, world)
    run.step_model, seconds = timed(lambda: train.prepare_step(run), on)
    return run, 0.0 if getattr(run.step_model, "module", run.step_model) is model else seconds


def new_model(ids: int) -> GPT:
    """train.py's model, with weights of its own or those of --init_from."""
    if train.init_from != "scratch":
        return load_model(train.init_from)[0]
    keys = GPTConfig.__dataclass_fields__.keys() & vars(train).keys()
    return GPT(GPTConfig(vocab_size=ids, **{k: getattr(train, k) for k in keys}))


def time_steps(run: train.Run) -> list[float]:
    """Seconds of each of so many steps, after three that are not counted."""
    for step in range(3):
        train.train_step(run, step)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    return [timed(lambda s=s: train.train_step(run, s), run.device)[1] for s in range(3, 3 + steps)]


class Synthetic:
    """Random tokens in the place of data.TrainingWindows."""

    def __init__(self, vocab_size: int):
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.int64)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        T = train.block_size
        starts = np.arange(first, first + count) * 977 % (len(self.tokens) - T - 1)
        rows = np.lib.stride_tricks.sliding_window_view(self.tokens, T + 1)[starts]
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def bench_train() -> dict:
    """train.py's step, its parts, and the roofline."""
    run, compiling = make_run()
    on, kind, model = run.device, run.dtype, run.model
    a_step = train.batch_size * train.block_size * run.accumulation * run.world
    if run.rank == 0:
        print(
            f"{model.num_params():,} parameters, {train.batch_size} x {train.block_size} tokens x {run.accumulation}"
            f"{f' x {run.world} ranks' if run.world > 1 else ''}, {on}, {str(kind).removeprefix('torch.')}, attention: "
            f"{attention_backend(run)}, " + (f"compiled in {compiling:.1f} s" if compiling else "not compiled")
        )
    times = time_steps(run)
    step_seconds, peak_mib = statistics.median(times), peak_memory(on)
    if run.world > 1:
        torch.distributed.barrier()
    figures = {
        "tokens_per_second": a_step / step_seconds,
        "ms_a_step": 1e3 * step_seconds,
        "peak_memory_mib": peak_mib,
        "compile_seconds": compiling or None,
    }
    causal = model.flops_per_token(train.block_size, "causal") * a_step / run.world
    if run.rank == 0:
        spread = f"({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
        print(f"{figures['tokens_per_second']:,.0f} tokens/s, {1e3 * step_seconds:.1f} ms a step {spread}")
        print(f"peak memory {peak_mib or float('nan'):,.0f} MiB")
        name = torch.cuda.get_device_name(on) if on.type == "cuda" else ""
        if peak := train.peak_tflops * 1e12 or peak_flops(name):
            palm = model.flops_per_token(train.block_size) * a_step / run.world
            mfu = f"{palm / step_seconds / peak:.1%} (PaLM), {causal / step_seconds / peak:.1%} (causal)"
            print(f"MFU {mfu} of {peak / 1e12:,.0f} TFLOP/s")
    if run.world > 1:  # the parts below need no one else
        run.step_model = None  # DDP goes before its group
        torch.distributed.destroy_process_group()
        return figures if run.rank == 0 else {}
    parts = time_parts(run)
    figures |= {f"ms_{name.replace(' ', '_')}": 1e3 * seconds for name, seconds in parts.items()}
    print("where the time goes, each part by itself:")
    for name, seconds in parts.items():
        print(f"  {name:<28} {1e3 * seconds:>9.1f} ms  {seconds / step_seconds:>6.1%}")
    products, bandwidth = roofline(on, kind)
    print(f"this machine: {products / 1e12:.2f} TFLOP/s in a large product, {bandwidth / 1e9:.0f} GB/s in a copy")
    least = causal / products
    moved = sum(p.numel() for p in model.parameters()) * 4 * 7  # AdamW reads 4 tensors and writes 3
    figures["ms_roofline"] = 1e3 * (least + moved / bandwidth)
    print(
        f"roofline: {1e3 * least:.1f} ms for the products (causal), {1e3 * moved / bandwidth:.1f} ms for the optimizer's "
        f"memory: the step takes {1e3 * step_seconds / figures['ms_roofline']:.1f} times that"
    )
    if profile:
        with torch.profiler.profile() as trace:
            for step in range(3):
                train.train_step(run, step)
        file = "trace.json" if profile is True else profile
        trace.export_chrome_trace(file)
        print(f"{file}: open it in chrome://tracing or ui.perfetto.dev")
    return figures


def time_parts(run: train.Run) -> dict[str, float]:
    """Seconds of a step's parts, each run by itself."""
    on, model, times = run.device, run.model, run.accumulation
    x, y = run.batch(0, 0)
    with torch.no_grad(), run.autocast():
        hidden = model.hidden(x).detach()
    hidden.requires_grad_()

    def forward():
        with run.autocast():
            return run.step_model(x, y, return_logits=False)[1]

    head_loss = model.head_loss if run.step_model is model else torch.compile(model.head_loss, dynamic=False)

    def head():
        with run.autocast():
            return head_loss(hidden, y)

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or float("inf"))
        for each in run.optimizers:
            each.step()

    parts = {"batch": median_of(lambda: run.batch(0, 0), on, repeat) * times}
    whole, parts["loss head"] = (median_of(work, on, repeat) * times for work in (forward, head))
    both = median_of(lambda: run.scaler.scale(forward()).backward(), on, repeat) * times
    parts |= {"forward": max(0.0, whole - parts["loss head"]), "backward": both - whole}
    parts["optimizer"] = median_of(optimize, on, repeat)
    parts["logging"] = time_logging(run)
    return parts


def time_logging(run: train.Run) -> float:
    """Seconds of a line in the console's, metrics.jsonl's and log.txt's form."""
    keys = {k: v for k, v in vars(train).items() if k.islower() and isinstance(v, (int, float, str, bool))}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = keys | {"out_dir": folder, "wandb_log": False, "sample_prompt": "", "resume": False}
        log = Log(run, config, CharTokenizer("a").to_dict(), 1, 0, 1000, None)
        return median_of(lambda: log.step(1, 1.0, 1.0, 1.0, 1.0, 1.0), run.device, 20)


def bench_batches() -> dict:
    """Micro-batches of 1, 2, 4, ... until memory ends or two in a row are not faster: tokens/s and memory of each."""
    figures, rows, slower, on = {}, 1, 0, pick_device(train.device)
    print(f"{'micro-batch':>12} {'tokens/s':>12} {'ms a step':>12} {'MiB':>8}")
    while slower < 2:
        train.batch_size, train.gradient_accumulation_steps, train.total_batch_tokens = rows, 1, 0
        try:
            run, _ = make_run()
            seconds = statistics.median(time_steps(run))
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            if not figures:
                raise ValueError(f"not even one sequence of {train.block_size} tokens fits") from None
            print(f"{rows:>12} does not fit")
            break
        rate = rows * train.block_size / seconds
        slower = 0 if rate > max(figures.values(), default=0) * 1.02 else slower + 1
        figures[f"tokens_per_second_batch_{rows}"] = rate
        print(f"{rows:>12} {rate:>12,.0f} {1e3 * seconds:>12.1f} {peak_memory(run.device) or float('nan'):>8,.0f}")
        del run
        rows *= 2
        if 2 * (peak_memory(on) or 0) > free_memory(on):
            print(f"{rows:>12} would not fit")
            break
    best = max(figures, key=figures.get).rpartition("_")[2]
    print(f"the fastest: --batch_size={best}")
    return figures


def bench_decode() -> dict:
    """Tokens/s of generate(), for one text and for a batch of them."""
    train.check_keys()
    on, kind, _, _ = train.set_up_device()
    model = new_model(vocab_size)
    c, figures, params = model.config, {}, model.num_params()
    if 16 + tokens > c.block_size:
        raise ValueError(f"--tokens={tokens}: with a prompt of 16, more than the context of {c.block_size}")
    width = 1 if quantize else torch.finfo(kind).bits // 8
    size = sum(p.numel() for n, p in model.named_parameters() if ".wpe." not in n) * width
    if not c.tie_weights:  # one row of the embedding is read
        size -= model.transformer.wte.weight.numel() * width
    for_inference(model, on, kind, quantize)
    _, bandwidth = roofline(on, kind)
    print(
        f"{params:,} parameters, {on}, {quantize or str(kind).removeprefix('torch.')}, {tokens} tokens behind a prompt of 16"
    )
    for batch in (1, decode_batch):
        idx = torch.zeros(batch, 16, dtype=torch.long, device=on)

        def decode(idx=idx) -> float:
            begin, counted = time.perf_counter(), tokens
            new = model.generate(idx, tokens, top_k=min(200, c.vocab_size), compile=train.compile is True)
            for n, _ in enumerate(new):
                if n == 2 and on.type == "cuda":  # the graph is captured
                    synchronize(on)
                    begin, counted = time.perf_counter(), tokens - 3
            synchronize(on)
            return len(idx) * counted / (time.perf_counter() - begin)

        decode()
        rates = [decode() for _ in range(repeat)]
        figures[f"decode_tokens_per_second_batch_{batch}"] = rate = statistics.median(rates)
        print(f"batch {batch:<4} {rate:>10,.1f} tokens/s ({min(rates):,.1f} to {max(rates):,.1f})")
    print(
        f"reading the weights once a token at {bandwidth / 1e9:.0f} GB/s (a copy's) bounds batch 1 at {bandwidth / size:,.0f} tokens/s"
    )
    return figures


def bench_hellaswag() -> dict:
    """Examples/s of eval_hellaswag.py, and of the same model in the plain way, in turns."""
    on, kind, _, _ = train.set_up_device()
    if train.init_from == "scratch":
        tokenizer = gpt2_tokenizer()
        model = new_model(tokenizer.n_vocab)
    else:
        model, payload = load_model(train.init_from)
        tokenizer = find_tokenizer(payload, train.data_dir)
    every = read_examples(Path(input)) if input else find_examples("val", train.data_dir)
    drawn = random.Random(train.seed).sample(every, min(examples, len(every)))
    questions = [classic_question(e, tokenizer) for e in drawn]
    few = questions[: -(-len(questions) // 10)]
    plain = copy.deepcopy(model).to(on).eval()
    for_inference(model, on, kind)
    print(f"{plain.num_params():,} parameters, {on}; {len(questions)} examples, {len(few)} of them one at a time")
    choices, found = [-1] * len(few), np.zeros((len(questions), 4))

    def one_at_a_time() -> int:
        choices[:] = (int(plain_losses(plain, q).argmin()) for q in few)
        return len(few)

    def together() -> int:
        for chosen, losses in ending_losses(model, questions):
            found[chosen] = losses
        return len(questions)

    one, whole = rates_of(one_at_a_time, together, on=on)
    times = statistics.median(a / b for a, b in zip(whole, one))
    for name, rates in (("one at a time, float32", one), (f"together, {str(kind).removeprefix('torch.')}", whole)):
        print(f"{name:<24} {statistics.median(rates):9.2f} examples/s ({min(rates):.2f} to {max(rates):.2f})")
    same = sum(found[: len(few)].argmin(1) == choices)
    print(f"{times:.2f} times as many, the same choice in {same} of {len(few)}")
    return {"hellaswag_examples_per_second": statistics.median(whole)}


@torch.no_grad()
def plain_losses(model: GPT, question: Question) -> torch.Tensor:
    """The four endings' sums of token losses, (4,): the texts padded to one length, all their logits."""
    T, known = model.config.block_size, [len(e) for e in question.endings]
    texts = [(question.context + e)[-T - 1 :] for e in question.endings]
    ids = torch.zeros(4, max(map(len, texts)), dtype=torch.long)
    scored = torch.zeros(4, ids.size(1) - 1)
    for n, text in enumerate(texts):
        ids[n, : len(text)], scored[n, len(text) - 1 - known[n] : len(text) - 1] = torch.tensor(text), 1
    ids, scored = ids.to(model.device), scored.to(model.device)
    logits, _ = model(ids[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (each.view(scored.shape) * scored).sum(1)


def tell(name: str, rates: list[float], baseline: list[float] | None = None, of: str = "") -> None:
    ratio = statistics.median(a / b for a, b in zip(rates, baseline)) if baseline else None
    note = f"{ratio:8.2f} x {of}" if ratio is not None else ""
    spread = f"({min(rates) / 1e6:,.2f} to {max(rates) / 1e6:,.2f})"
    print(f"{name:<44} {statistics.median(rates) / 1e6:>9,.2f}M tokens/s {spread:<22} {note}")


def made_up_stories(path: Path, size: int) -> None:
    from prepare_tinystories import story

    rng = random.Random(1337)
    with open(path, "w", encoding="utf-8") as f:
        while f.tell() < size:
            f.write("".join(f"{story(rng)}\n{EOT}\n" for _ in range(1000)))


def rates_of(*works, on: torch.device | None = None) -> list[list[float]]:
    """The count that each work() returns, over its seconds: in turns, after one that is not measured."""
    rates: list[list[float]] = [[] for _ in works]
    for _ in range(repeat + 1):
        for own, work in zip(rates, works):
            count, seconds = timed(work, on)
            own.append(count / seconds)
    return [own[1:] for own in rates]


def bench_data() -> dict:
    """One core's encode_ordinary, our whole way from text to shards, and the reader of batches."""
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        if input:
            with open(input, "rb") as f:
                text.write_text(f.read(megabytes * 10**6).decode("utf-8", errors="replace"), encoding="utf-8")
        else:
            made_up_stories(text, megabytes * 10**6)
        return {
            "tokenizing_tokens_per_second": bench_tokenizing(text, folder),
            "reading_tokens_per_second": bench_reading(folder),
        }


def bench_tokenizing(text: Path, folder: Path) -> float:
    """Tokens/s from a text to the shards of a dataset `d` in the folder."""
    tokenizer = gpt2_tokenizer()
    documents = [document for document, _ in split_text(text)]
    if not documents:
        raise ValueError(f"--input={input}: there is no text in it")
    size = sum(len(d.encode()) for d in documents)
    print(f"text: {len(documents):,} documents, {size / 1e6:.1f} MB; {cores()} cores; medians of {repeat}")

    def bare() -> int:
        encode = tokenizer.encoding.encode_ordinary
        return sum(len(encode(d)) for d in documents)

    def ours() -> int:
        writer = DatasetWriter(folder / "d", {}, lambda: tokenizer, overwrite=True)
        writer.write(lambda position: split_text(text, position or 0), "train")
        return writer.finish("")["train"]

    one_core, whole = rates_of(bare, ours)
    tell("tiktoken's encode_ordinary, one core", one_core)
    tell("from text to shards, all cores", whole, [r * cores() for r in one_core], f"{cores()} cores of that")
    return statistics.median(whole)


def bench_reading(folder: Path) -> float:
    """Tokens/s of TrainingWindows on the dataset `d` in the folder."""
    found = load_dataset("d", folder)
    stream, need = np.concatenate([s.map() for s in found.train]), 64 * 1025
    stream = np.resize(stream, max(len(stream), need))
    windows = TrainingWindows(found.train, 1024, found.vocab_size)
    count = max(1, 2 * 10**7 // (64 * 1024))

    def read() -> int:
        for n in range(count):
            windows.batch(n * 64, 64)
        return count * 64 * 1024

    def convert() -> int:  # what any reader does at least: inputs and targets as int64
        for n in range(count):
            begin = n * 1000 % (len(stream) - need + 1)
            part = stream[begin : begin + need].reshape(64, -1)
            part[:, :-1].astype(np.int64), part[:, 1:].astype(np.int64)
        return count * 64 * 1024

    copying, reading = rates_of(convert, read)
    tell("copying tokens into inputs and targets", copying)
    tell("batches of shuffled windows, one core", reading, copying, "that")
    times = statistics.median(reading) / 4e6
    print(f"8 GPUs at half a million tokens/s each take 4M: the reader gives {times:.0f} x that")
    return statistics.median(reading)


def seconds_of(*command: str, times: int = 3, **environment: str) -> list[float]:
    """Seconds of a Python process, from its start to its end, so many times. Raises RuntimeError if it fails."""
    found = []
    for _ in range(times):
        start, env = time.perf_counter(), os.environ | environment
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
        found.append(time.perf_counter() - start)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {error_of(done.stderr)}")
    return found


def bench_startup() -> dict:
    """Whole processes: what a person waits for before anything is to be seen."""
    figures, one = {}, ["--max_iters=1", "--eval_iters=1", "--final_eval_tokens=1000", "--eval_interval=0"]

    def tell_seconds(name: str, seconds: list[float]) -> None:
        figures[f"seconds_{name.replace(' ', '_')}"] = value = statistics.median(seconds)
        note = f"{value / figures['seconds_import_torch']:.2f} x import torch"
        print(f"{name:<32} {value:>6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  {note}")

    tell_seconds("import torch", seconds_of("-c", "import torch", times=repeat))
    with tempfile.TemporaryDirectory() as folder:
        out = f"--out_dir={folder}/run"
        quickstart = [
            str(HERE / "train.py"),
            str(HERE / "config/quickstart.py"),
            f"--data_dir={folder}/data",
            out,
            *one,
        ]
        seconds_of(*quickstart, times=1)  # makes its data
        sample = [str(HERE / "sample.py"), out, "--max_new_tokens=20"]
        tell_seconds("sample.py, a small run", seconds_of(*sample, times=repeat))
        tell_seconds("train.py, one step", seconds_of(*quickstart, times=repeat))
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for name, times in (("the same compiled, the first time", 1), ("again, from the cache on disk", 2)):
            tell_seconds(name, seconds_of(*quickstart, "--compile=True", times=times, **cache))
    return figures


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for bench.py's own keys, and those for train.py's."""
    own = {k for k in read_keys(__file__) if not k.startswith("#")}
    mine = [a for a in argv if a in ("--help", "-h") or a.removeprefix("--").partition("=")[0].replace("-", "_") in own]
    return mine, [a for a in argv if a not in mine]


def suit_the_device(argv: list[str]) -> list[str]:
    """train.py's arguments; without any, those of a model that this machine can train."""
    if argv or mode in ("decode", "hellaswag") or torch.cuda.is_available():
        return argv
    return [str(HERE / "config" / "baby_cpu.py"), "--dropout=0.0"]


def bench_all() -> dict:
    figures = {}
    if 16 + tokens > train.block_size:
        raise ValueError(f"--tokens={tokens}: with a prompt of 16, more than --block_size={train.block_size}")
    for name in ("train", "decode", "data", "startup"):
        print(f"\n{name}")
        figures |= BENCHES[name]()
        if output:  # what is measured is kept
            atomic_write(Path(output), json.dumps(figures, indent=1))
    return figures


BENCHES = {
    "train": bench_train, "decode": bench_decode, "hellaswag": bench_hellaswag, "data": bench_data,
    "startup": bench_startup, "all": bench_all,
}  # fmt: skip


def show_ratios(figures: dict, before: dict) -> None:
    for name, value in figures.items():
        if value and before.get(name):
            faster = value / before[name] if "per_second" in name else before[name] / value
            note = "  slower" if faster < 0.95 else ""
            print(f"{name:<40} {before[name]:>12,.1f} -> {value:>12,.1f}  {faster:5.2f} x as good{note}")


def main() -> None:
    if mode not in BENCHES:
        raise ValueError(f"--mode={mode}: choose one of {', '.join(BENCHES)}")
    if min(megabytes, steps, tokens, decode_batch, repeat, examples) < 1:
        raise ValueError("--megabytes, --steps, --tokens, --decode_batch, --repeat and --examples are at least 1")
    if find_batch and mode != "train":
        raise ValueError(f"--find_batch is for --mode=train, not {mode}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (mode != "train" or find_batch):
        raise ValueError("under torchrun there is --mode=train alone, without --find_batch")
    for path in filter(None, (input, compare)):
        if not Path(path).is_file():
            raise ValueError(f"--{'input' if path == input else 'compare'}={path}: there is no such file")
    try:
        before = json.loads(Path(compare).read_text(encoding="utf-8")) if compare else {}
    except ValueError:
        raise ValueError(f"--compare={compare}: not a file that --output wrote") from None
    figures = bench_batches() if find_batch else BENCHES[mode]()
    if compare:
        show_ratios(figures, before)
    if output and figures:
        atomic_write(Path(output), json.dumps(figures, indent=1))


if __name__ == "__main__":
    with short_errors(), train.explained():
        mine, theirs = split_arguments(sys.argv[1:])
        configure(globals(), mine)
        if mode not in ("data", "startup"):
            configure(vars(train), suit_the_device(theirs), ("depth", train.from_depth))
        elif theirs:
            raise ValueError(f"{theirs[0]}: --mode={mode} takes no key of train.py")
        main()
