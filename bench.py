"""How fast, and where the time goes: training, decoding, data.

    python bench.py                                      a training step that suits the device, synthetic tokens
    python bench.py config/baby_cpu.py --compile=True    of any config and keys of train.py
    python bench.py --mode=decode                        GPT-2 124M, tokens/s for one text and for a batch
    python bench.py --mode=data --input=corpus.txt       tokenizing and the batch reader
    python bench.py --output=before.json                 ... edit ...   python bench.py --compare=before.json

The step is train.py's own. It is held against the roofline of this machine, which is measured in the same run: the rate of
a large matrix product at the run's dtype, and the bandwidth of a copy. Medians, with the spread beside them.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import train
from checkpoint import load_model
from configurator import configure, read_keys, short_errors
from corpus import DatasetWriter, cores, split_text
from data import TrainingWindows, atomic_write, load_dataset
from machine import peak_flops, peak_memory
from model import GPT, GPTConfig
from optim import make_optimizers
from tokenizer import EOT, gpt2_tokenizer

mode = "train"  # train | decode | data
steps = 20  # training steps to time, after three that are not
tokens = 100  # to decode
decode_batch = 16  # texts at a time, beside one alone
repeat = 5  # measurements of what is short, of which the median is told
vocab_size = 50257  # ids of the synthetic tokens
real_data = False  # train on --dataset instead of synthetic tokens
profile = ""  # a file for a Chrome trace of three steps: trace.json
output = ""  # a .json file for the figures
compare = ""  # such a file from before: prints the ratios
input = ""  # data: a text to tokenize, documents separated by <|endoftext|>; empty: made-up stories
megabytes = 100  # data: of text at most


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
    if c.attn == "manual" or (run.device.type == "cpu" and run.dtype == torch.bfloat16 and T <= 512):
        return "formula"
    q = torch.zeros(1, c.n_head, T, c.head_size, device=run.device, dtype=run.dtype, requires_grad=True)
    choice = torch._fused_sdp_choice(q, q, q, None, c.dropout, True)
    return torch.nn.attention.SDPBackend(choice).name.lower().replace("_attention", "")


def make_run() -> tuple[train.Run, float]:
    """A run of train.py's keys with its optimizer, and the seconds that compiling took."""
    train.check_keys()
    on, kind, rank, world = train.set_up_device()
    if world > 1:
        raise ValueError("bench.py measures one process: start it without torchrun")
    torch.manual_seed(train.seed)
    if real_data:
        found = train.find_datasets(rank)
        windows, ids = train.training_windows(found), found[0][0].vocab_size
    else:
        windows, ids = None, vocab_size
    keys = GPTConfig.__dataclass_fields__.keys() & vars(train).keys()
    model = GPT(GPTConfig(vocab_size=ids, **{k: getattr(train, k) for k in keys})).to(on).train()
    if train.batch_size == "auto":
        train.batch_size = train.largest_batch(model, on, kind, world)
    _, accumulation = train.steps_and_accumulation(world, windows)
    optimizers = make_optimizers(
        model, train.optimizer, train.learning_rate, train.weight_decay, train.beta1, train.beta2, train.momentum
    )
    scaler = torch.amp.GradScaler(on.type, enabled=kind == torch.float16)
    run = train.Run(model, model, optimizers, scaler, windows or Synthetic(ids), on, kind, accumulation)
    run.step_model, seconds = timed(lambda: train.compile_model(run), on)
    return run, seconds


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
    on, kind, model, T = run.device, run.dtype, run.model, train.block_size
    compiled = run.step_model is not model
    micro_tokens = train.batch_size * T
    a_step = micro_tokens * run.accumulation
    print(
        f"{model.num_params():,} parameters, {train.batch_size} x {T} tokens x {run.accumulation}, {on}, "
        f"{str(kind).removeprefix('torch.')}, attention: {attention_backend(run)}, "
        + (f"compiled in {compiling:.1f} s" if compiled else "not compiled")
    )
    for step in range(3):
        train.train_step(run, step)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    times = [timed(lambda s=s: train.train_step(run, s), on)[1] for s in range(3, 3 + steps)]
    step_seconds, peak_mib = statistics.median(times), peak_memory(on)
    products, bandwidth = roofline(on, kind)

    x, y = run.batch(0, 0)

    def forward():
        with run.autocast():
            return run.step_model(x, y, return_logits=False)[1]

    def head():
        with run.autocast():
            logits = model.logits(hidden)
            return torch.nn.functional.cross_entropy(logits.float().view(-1, logits.size(-1)), y.view(-1))

    def optimize():
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or float("inf"))
        for each in run.optimizers:
            each.step()

    with torch.no_grad(), run.autocast():
        hidden = model.hidden(x).detach()
    parts = {"batch": median_of(lambda: run.batch(0, 0), on, repeat) * run.accumulation}
    parts["forward"] = median_of(forward, on, repeat) * run.accumulation
    with torch.no_grad():
        parts["  of it the head, by itself"] = median_of(head, on, repeat) * run.accumulation
    both = median_of(lambda: run.scaler.scale(forward()).backward(), on, repeat) * run.accumulation
    parts["backward"] = both - parts["forward"]
    parts["optimizer"] = median_of(optimize, on, repeat)
    causal = model.flops_per_token(T, "causal") * a_step
    peak = train.peak_tflops * 1e12 or (peak_flops(torch.cuda.get_device_name(on)) if on.type == "cuda" else None)
    figures = {
        "tokens_per_second": a_step / step_seconds,
        "ms_a_step": 1e3 * step_seconds,
        "peak_memory_mib": peak_mib,
        "compile_seconds": compiling if compiled else None,
    }
    figures |= {f"ms_{name.strip().split(' ')[0]}": 1e3 * seconds for name, seconds in parts.items()}
    print(
        f"{figures['tokens_per_second']:,.0f} tokens/s, {1e3 * step_seconds:.1f} ms a step ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
    )
    if peak:
        palm = model.flops_per_token(T) * a_step
        print(
            f"MFU {palm / step_seconds / peak:.1%} (PaLM), {causal / step_seconds / peak:.1%} (causal) of {peak / 1e12:,.0f} TFLOP/s"
        )
    print(f"peak memory {figures['peak_memory_mib'] or float('nan'):,.0f} MiB")
    print("where the time goes, each part by itself:")
    for name, seconds in parts.items():
        print(f"  {name:<28} {1e3 * seconds:>9.1f} ms  {seconds / step_seconds:>6.1%}")
    print(f"this machine: {products / 1e12:.2f} TFLOP/s in a large product, {bandwidth / 1e9:.0f} GB/s in a copy")
    least = causal / products
    moved = sum(p.numel() for p in model.parameters()) * 4 * 7  # AdamW reads 4 tensors and writes 3
    print(
        f"roofline: {1e3 * least:.1f} ms for the products (causal), {1e3 * moved / bandwidth:.1f} ms for the optimizer's "
        f"memory: the step takes {step_seconds / (least + moved / bandwidth):.1f} times that"
    )
    if profile:
        with torch.profiler.profile() as trace:
            for step in range(3):
                train.train_step(run, step)
        trace.export_chrome_trace(profile)
        print(f"{profile}: open it in chrome://tracing or ui.perfetto.dev")
    return figures


def bench_decode() -> dict:
    """Tokens/s of generate(), for one text and for a batch of them."""
    train.check_keys()
    on, kind, _, _ = train.set_up_device()
    if train.init_from == "scratch":
        keys = GPTConfig.__dataclass_fields__.keys() & vars(train).keys()
        model = GPT(GPTConfig(vocab_size=vocab_size, **{k: getattr(train, k) for k in keys}))
    else:
        model, _ = load_model(train.init_from)
    model.to(on).eval()
    c, figures = model.config, {}
    if 16 + tokens > c.block_size:
        raise ValueError(f"--tokens={tokens}: with a prompt of 16, more than the context of {c.block_size}")
    run = train.Run(model, model, [], None, None, on, kind, 1)
    size = sum(p.numel() for p in model.parameters()) * (4 if kind == torch.float32 else 2)
    _, bandwidth = roofline(on, kind)
    print(
        f"{model.num_params():,} parameters, {on}, {str(kind).removeprefix('torch.')}, {tokens} tokens behind a prompt of 16"
    )
    for batch in (1, decode_batch):
        idx = torch.zeros(batch, 16, dtype=torch.long, device=on)

        def decode(idx=idx):
            with run.autocast():
                for _ in model.generate(idx, tokens, temperature=1.0, top_k=min(200, c.vocab_size)):
                    pass

        decode()
        times = [timed(decode, on)[1] for _ in range(repeat)]
        rate = batch * tokens / statistics.median(times)
        figures[f"decode_tokens_per_second_batch_{batch}"] = rate
        print(
            f"batch {batch:<4} {rate:>10,.1f} tokens/s ({batch * tokens / max(times):,.1f} to {batch * tokens / min(times):,.1f})"
        )
    print(
        f"reading the weights once a token at {bandwidth / 1e9:.0f} GB/s (a copy's) bounds batch 1 at {bandwidth / size:,.0f} tokens/s"
    )
    return figures


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


def bench_data() -> dict:
    """One core's encode_ordinary, our whole way from text to shards, and the reader of batches."""
    tokenizer = gpt2_tokenizer()
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        if input:
            with open(input, "rb") as f:
                text.write_text(f.read(megabytes * 10**6).decode("utf-8", errors="replace"), encoding="utf-8")
        else:
            made_up_stories(text, megabytes * 10**6)
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

        bare(), ours()
        one_core, whole = [], []
        for _ in range(repeat):
            for rates, work in ((one_core, bare), (whole, ours)):
                tokens, seconds = timed(work)
                rates.append(tokens / seconds)
        tell("tiktoken's encode_ordinary, one core", one_core)
        tell("from text to shards, all cores", whole, [r * cores() for r in one_core], f"{cores()} cores of that")

        shards = load_dataset("d", folder).train
        tokens, need = np.concatenate([s.map() for s in shards]), 64 * 1025
        tokens = np.resize(tokens, max(len(tokens), need))
        windows = TrainingWindows(shards, 1024, tokenizer.n_vocab)
        count = max(1, 2 * 10**7 // (64 * 1024))

        def read() -> int:
            for n in range(count):
                windows.batch(n * 64, 64)
            return count * 64 * 1024

        def copy() -> int:  # what any reader does at least: inputs and targets as int64
            for n in range(count):
                begin = n * 1000 % (len(tokens) - need + 1)
                part = tokens[begin : begin + need].reshape(64, -1)
                part[:, :-1].astype(np.int64), part[:, 1:].astype(np.int64)
            return count * 64 * 1024

        read(), copy()
        reading, copying = [], []
        for _ in range(repeat):
            for rates, work in ((copying, copy), (reading, read)):
                done, seconds = timed(work)
                rates.append(done / seconds)
        tell("copying tokens into inputs and targets", copying)
        tell("batches of shuffled windows, one core", reading, copying, "that")
        print(
            f"8 GPUs at half a million tokens/s each take 4M: the reader gives {statistics.median(reading) / 4e6:.0f} x that"
        )
    return {
        "tokenizing_tokens_per_second": statistics.median(whole),
        "reading_tokens_per_second": statistics.median(reading),
    }


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments for bench.py's own keys, and those for train.py's."""
    own = {k for k in read_keys(__file__) if not k.startswith("#")}
    mine = [a for a in argv if a in ("--help", "-h") or a.removeprefix("--").partition("=")[0].replace("-", "_") in own]
    return mine, [a for a in argv if a not in mine]


def suit_the_device(argv: list[str]) -> list[str]:
    """train.py's arguments; without any, those of a model that this machine can train."""
    if argv or mode == "data" or torch.cuda.is_available():
        return argv
    if mode == "decode":
        return ["--device=auto"]
    return [str(Path(__file__).parent / "config" / "baby_cpu.py"), "--dropout=0.0"]


def show_ratios(figures: dict, before: dict) -> None:
    for name, value in figures.items():
        if value and before.get(name):
            faster = value / before[name] if "per_second" in name else before[name] / value
            note = "  slower" if faster < 0.95 else ""
            print(f"{name:<40} {before[name]:>12,.1f} -> {value:>12,.1f}  {faster:5.2f} x as good{note}")


def main() -> None:
    if mode not in ("train", "decode", "data"):
        raise ValueError(f"--mode={mode}: choose train, decode or data")
    if min(megabytes, steps, tokens, decode_batch, repeat) < 1:
        raise ValueError("--megabytes, --steps, --tokens, --decode_batch and --repeat are at least 1")
    for path in filter(None, (input, compare)):
        if not Path(path).is_file():
            raise ValueError(f"--{'input' if path == input else 'compare'}={path}: there is no such file")
    try:
        before = json.loads(Path(compare).read_text(encoding="utf-8")) if compare else {}
    except ValueError:
        raise ValueError(f"--compare={compare}: not a file that --output wrote") from None
    figures = {"train": bench_train, "decode": bench_decode, "data": bench_data}[mode]()
    if compare:
        show_ratios(figures, before)
    if output:
        atomic_write(Path(output), json.dumps(figures, indent=1))


if __name__ == "__main__":
    with short_errors(), train.explained():
        mine, theirs = split_arguments(sys.argv[1:])
        configure(globals(), mine)
        if mode != "data":
            configure(vars(train), suit_the_device(theirs))
        elif theirs:
            raise ValueError(f"{theirs[0]}: --mode=data takes no key of train.py")
        main()
