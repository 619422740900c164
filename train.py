"""Train a GPT: one process on a CPU, a Mac or a GPU, or many under torchrun.

    python train.py config/quickstart.py
    python train.py config/baby_cpu.py --batch_size=4
    torchrun --standalone --nproc_per_node=8 train.py          GPT-2 124M on ten billion tokens of FineWeb-Edu
    python train.py config/baby_gpu.py --resume                go on where the run stopped

Leaves in out_dir: ckpt.pt (latest), best.pt, config.json, metrics.jsonl, log.txt, results.json, loss.png, samples/.
"""

import contextlib
import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import build_model, find_checkpoint, load_checkpoint, save_checkpoint
from configurator import configure, short_errors
from data import (
    TrainingWindows, Dataset, atomic_write, gpt2_tokenizer, load_dataset, tokenizer_from_dict, validation_batches,
    validation_windows,
)  # fmt: skip
from model import GPT, GPTConfig, peak_flops
from optim import OPTIMIZERS, SCHEDULES, learning_rate_at, make_optimizers

# Run
out_dir = "out"  # folder of the run: checkpoints, logs, results
init_from = "scratch"  # scratch | resume | a run's folder or checkpoint to start from
resume = False  # go on from out_dir/ckpt.pt; the same as --init_from=resume
seed = 1337  # of the weights, the batch order and dropout
dry_run = False  # print sizes, FLOPs and memory, and stop before training
eval_only = False  # evaluate once and stop
# Data
dataset = "edu_fineweb10B"  # folder under data_dir
data_dir = "data"  # where datasets are
data_fraction = 1.0  # train on the first part of the tokens only
batch_size = 64  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence, the context
gradient_accumulation_steps = 8  # micro-batches in a step, over all ranks together
total_batch_tokens = 0  # tokens in a step: sets gradient_accumulation_steps; 0: off
# Model
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # for pretraining 0, for small data try 0.1 and more
bias = False  # biases in linear layers and LayerNorms
norm = "layernorm"  # layernorm | rmsnorm
norm_eps = 1e-5  # added to the variance
mlp = "gelu"  # gelu | gelu_erf | swiglu | relu2
mlp_hidden = 0  # width inside the MLP; 0: 4 n_embd, and as many parameters for swiglu
pos = "learned"  # learned | rope | none
rope_base = 10000.0  # RoPE's longest wavelength over 2 pi
n_kv_head = 0  # key/value heads, shared by groups of query heads; 0: n_head
qk_norm = False  # normalise queries and keys
tie_weights = True  # one matrix for the embedding and the head
logit_softcap = 0.0  # bound the logits smoothly; 0: off
init = "gpt2"  # gpt2 | zero_proj
attn = "sdpa"  # sdpa | manual
activation_checkpointing = False  # less memory for more time
# Optimization
optimizer = "adamw"  # adamw | adam | sgd | adafactor | muon
learning_rate = 6e-4  # peak learning rate
max_iters = 19073  # steps; one epoch of ten billion tokens at 524,288 a step
max_epochs = 0.0  # passes over the training tokens: sets max_iters; 0: off
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # Adam's decay of the mean gradient
beta2 = 0.95  # and of its square
momentum = 0.9  # of sgd, nesterov; 0: plain
grad_clip = 1.0  # clip the norm of the gradient; 0: off
label_smoothing = 0.0  # probability spread over the other ids in the training loss
schedule = "cosine"  # cosine | linear | wsd (warmup-stable-decay) | constant, after a linear warm-up
decay_lr = True  # False: learning_rate throughout
warmup_iters = 715  # steps of linear warm-up
lr_decay_iters = 0  # the step at which the schedule reaches min_lr; 0: max_iters
decay_fraction = 0.2  # of wsd: the last part of the run, in which the rate falls
min_lr = 6e-5  # final learning rate
# Evaluation, logs, checkpoints
eval_interval = 250  # steps between evaluations, with a checkpoint at each; 0: only at the end
eval_iters = 20  # batches of validation windows in one evaluation, evenly spaced and always the same
final_eval_tokens = 2**20  # validation tokens in the last evaluation; 0: the whole split
log_interval = 1  # steps between log lines
always_save_checkpoint = True  # False: only best.pt at evaluations, ckpt.pt at the end
checkpoint_interval = 0  # more checkpoints: every so many steps; 0: at evaluations
keep_checkpoints = 0  # keep so many of them as step_N.pt
sample_interval = 0  # steps between texts written to samples/; 0: only at the end
sample_prompt = ""  # how they begin; empty: the start of a document
wandb_log = False  # log to Weights & Biases
wandb_project = "gpt"  # its project
wandb_run_name = "gpt2"  # and the run's name in it
# System
device = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
compile: bool | str = "auto"  # torch.compile: auto goes on without it where it fails, True does not
backend = "nccl"  # of torchrun's ranks on GPUs; the CPU's is gloo
peak_tflops = 0.0  # the device's peak for MFU; 0: from a table


@dataclass
class Run:
    """Everything a step needs: made by set_up, used by train_step and evaluate."""

    model: GPT  # plain: saved, sampled from
    step_model: torch.nn.Module  # the same weights, compiled and wrapped as the device asks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    windows: TrainingWindows
    device: torch.device
    dtype: torch.dtype
    accumulation: int  # micro-batches of a step on this rank
    rank: int = 0
    world: int = 1

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(a) for a in arrays]
        if self.device.type == "cuda":  # pinned, so that the copy does not wait for the GPU
            return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]

    def batch(self, step: int, micro: int) -> list[torch.Tensor]:
        """Micro-batch `micro` of this rank in a step: inputs and targets (batch_size, block_size).

        The ranks take turns through the step's sequences, so the step is the same on any number of them.
        """
        number = (step * self.accumulation + micro) * self.world + self.rank
        return self.to_device(*self.windows.batch(number * batch_size, batch_size))


def train_step(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights. Returns this rank's mean loss and the gradient's norm, on the device, not waited for."""
    if dropout:  # masks are a function of (seed, step, rank), as the batches are: a resumed run draws the same
        torch.manual_seed(int(np.random.SeedSequence((seed, step, run.rank)).generate_state(1, np.uint64)[0]) >> 1)
    x, y = run.batch(step, 0)
    total = torch.zeros((), device=run.device)
    for micro in range(run.accumulation):
        if run.world > 1:  # read in the forward pass: reduce gradients once, with the last micro-batch
            run.step_model.require_backward_grad_sync = micro == run.accumulation - 1
        with run.autocast():
            _, loss = run.step_model(x, y, return_logits=False, label_smoothing=label_smoothing)
            loss = loss / run.accumulation
        run.scaler.scale(loss).backward()
        total += loss.detach()
        if micro < run.accumulation - 1:  # gathered while the device works on the last one
            x, y = run.batch(step, micro + 1)
    for each in run.optimizers:
        run.scaler.unscale_(each)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), grad_clip or math.inf)
    for each in run.optimizers:
        run.scaler.step(each)
    run.scaler.update()
    for each in run.optimizers:
        each.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(run: Run, shards: list, limit: int) -> tuple[float, float]:
    """Mean loss (nats a token) and accuracy over `limit` fixed validation windows (0: all), shared out over the ranks."""
    found = validation_windows(shards, block_size, limit)
    # Its own graph on a GPU; on a CPU compiling one takes longer than it saves.
    model = getattr(run.step_model, "module", run.step_model) if run.device.type == "cuda" else run.model
    model.eval()
    sums = []
    for x, y in validation_batches(found, block_size, run.windows.vocab_size, batch_size, run.rank, run.world):
        x, y = run.to_device(x, y)
        with run.autocast():
            logits, loss = model(x, y)
        known = (y >= 0).sum()
        sums.append(torch.stack((loss.float() * known, ((logits.argmax(-1) == y) & (y >= 0)).sum(), known)))
    model.train()
    total = torch.stack(sums).double().sum(0).cpu() if sums else torch.zeros(3, dtype=torch.float64)
    if run.world > 1:
        total = total.to(run.device)
        dist.all_reduce(total)
    loss_sum, correct, tokens = total.tolist()
    return loss_sum / tokens, correct / tokens


def set_up_device() -> tuple[torch.device, torch.dtype, int, int]:
    """Resolve device, then dtype; join the other ranks. Returns (device, dtype, rank, world size)."""
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device={device}: choose auto, cpu, cuda or mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[kind]:
        raise ValueError(f"--device={device}: this machine has no {kind} device (torch {torch.__version__}); try --device=cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0)) if ":" not in name else int(name.split(":")[1])
        if local >= torch.cuda.device_count():
            raise ValueError(f"--device={name}, local rank {local}: this machine has {torch.cuda.device_count()} GPUs")
        name = f"cuda:{local}"
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")  # tf32 for what stays float32
    if "RANK" in os.environ:
        dist.init_process_group(backend if kind == "cuda" else "gloo")
    return torch.device(name), resolve_dtype(torch.device(name)), rank, world


def resolve_dtype(on: torch.device) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in names:
        return names[dtype]
    if dtype != "auto":
        raise ValueError(f"--dtype={dtype}: choose auto, {', '.join(names)}")
    if on.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(on)[0] >= 8 else torch.float16
    native = on.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def find_dataset(rank: int) -> Dataset:
    """The dataset; the quickstart's own stories are made where they are missing."""
    folder = Path(data_dir) / dataset
    if dataset == "tinystories_synthetic" and not (folder / "meta.json").exists():
        if rank == 0:
            from prepare_tinystories import make_synthetic

            print(f"{folder} is not there yet: writing the stories it takes (python prepare_tinystories.py --synthetic=True)")
            make_synthetic(folder)
        if dist.is_initialized():
            dist.barrier()
    if dry_run and not folder.is_dir():
        print(f"there is no dataset {folder}: sizes assume GPT-2's vocabulary")
        return Dataset(dataset, [], [], None, 50257)
    return load_dataset(dataset, data_dir)


def new_model(found: Dataset) -> tuple[GPT, dict]:
    """The model to train and the checkpoint it comes from ({} from scratch)."""
    torch.manual_seed(seed)
    if init_from == "scratch":
        keys = GPTConfig.__dataclass_fields__.keys() & globals().keys()
        return GPT(GPTConfig(vocab_size=found.vocab_size, **{k: globals()[k] for k in keys})), {}
    payload = load_checkpoint(Path(out_dir) / "ckpt.pt" if init_from == "resume" else find_checkpoint(init_from))
    arguments, trained_on = payload["model_args"], payload.get("tokenizer")
    if trained_on != found.tokenizer if trained_on else arguments["vocab_size"] < found.vocab_size:
        raise ValueError(
            f"--init_from={init_from}: trained with a vocabulary of {arguments['vocab_size']:,} ids, "
            f"the dataset {dataset} has another, of {found.vocab_size:,}: choose the --dataset it was trained on"
        )
    if block_size > arguments["block_size"]:
        raise ValueError(f"--block_size={block_size} is more than the checkpoint's context of {arguments['block_size']}")
    if block_size < arguments["block_size"]:
        arguments["block_size"] = block_size
        positions = "transformer.wpe.weight"
        payload["model"] = {n: t[:block_size] if n.endswith(positions) else t for n, t in payload["model"].items()}
    arguments["dropout"] = dropout
    return build_model(payload), payload


def compile_model(run: Run) -> torch.nn.Module:
    """The model compiled, or as it is where that is not asked for or, under auto, not possible."""
    if compile is False or (compile == "auto" and run.device.type != "cuda"):
        return run.model
    if compile not in (True, "auto"):
        raise ValueError(f"--compile={compile}: choose auto, True or False")
    compiled = torch.compile(run.model, dynamic=False)
    try:  # a graph is built at the first call: make it here, where a failure can be told from training's
        x, y = run.batch(0, 0)
        with run.autocast():
            _, loss = compiled(x, y, return_logits=False, label_smoothing=label_smoothing)
        run.scaler.scale(loss).backward()
        run.model.zero_grad(set_to_none=True)
        return compiled
    except Exception as e:
        if compile is True:
            raise
        reason = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
        print(f"torch.compile does not work here, going on without it ({reason}); --compile=True shows all")
        run.model.zero_grad(set_to_none=True)
        return run.model


def check_keys() -> None:
    """What a key may not be, said before anything is loaded. Raises ValueError."""
    for key in ("batch_size", "block_size", "gradient_accumulation_steps", "max_iters", "log_interval", "eval_iters"):
        if globals()[key] < 1:
            raise ValueError(f"--{key}={globals()[key]}: must be at least 1")
    for key, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if globals()[key] not in choices:
            raise ValueError(f"--{key}={globals()[key]}: choose one of {', '.join(choices)}")


def steps_and_accumulation(world: int, windows: TrainingWindows | None) -> tuple[int, int]:
    """(max_iters, micro-batches of a step over all ranks), from epochs and tokens a step where these are given."""
    micro_batches = gradient_accumulation_steps
    micro_tokens = batch_size * block_size
    if total_batch_tokens:
        if total_batch_tokens % (micro_tokens * world):
            raise ValueError(
                f"--total_batch_tokens={total_batch_tokens} is not a multiple of batch_size x block_size x ranks = "
                f"{batch_size} x {block_size} x {world} = {micro_tokens * world}"
            )
        micro_batches = total_batch_tokens // micro_tokens
    if micro_batches % world:
        raise ValueError(f"--gradient_accumulation_steps={micro_batches} is not divisible by the {world} ranks that share it")
    steps = max_iters
    if max_epochs and windows:
        steps = max(1, round(max_epochs * windows.per_epoch / (micro_batches * batch_size)))
    return steps, micro_batches


def describe(model: GPT, found: Dataset, on: torch.device, kind: torch.dtype, steps: int, micro_batches: int) -> None:
    """Print what is about to be trained."""
    tokens = micro_batches * batch_size * block_size
    c, B, T = model.config, batch_size, block_size
    sizes = f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size:,}"
    print(f"model: {model.num_params():,} parameters: {sizes}")
    print(f"device: {on}, {str(kind).removeprefix('torch.')}, torch {torch.__version__}")
    have = ", ".join(f"{sum(s.tokens for s in x):,} {n}" for n, x in (("train", found.train), ("val", found.val)))
    print(f"data: {dataset}, {have} tokens")
    print(f"step: {B} x {T} tokens x {micro_batches} micro-batches = {tokens:,} tokens; {steps:,} steps, {steps * tokens:,}")
    if dry_run:
        palm, causal = model.flops_per_token(T), model.flops_per_token(T, "causal")
        print(f"FLOPs: {palm:.4g} a token (PaLM), {causal:.4g} (causal, products alone); {palm * steps * tokens:.3g} in all")
        state = sum(p.numel() for p in model.parameters()) * 4 * {"sgd": 3, "adafactor": 2}.get(optimizer, 4)
        size = 4 if kind == torch.float32 else 2
        block = B * T * (10 * c.n_embd + 2 * c.mlp_hidden) * size  # what a block keeps for its backward pass
        kept = B * T * c.n_embd * size if c.activation_checkpointing else block
        activations = c.n_layer * kept + B * T * c.vocab_size * (size + 8)
        print(f"memory: {state / 2**20:,.0f} MiB weights, gradients, optimizer; about {activations / 2**20:,.0f} MiB activations")
        print(f"shapes: idx and targets ({B}, {T}) int64, logits ({B}, {T}, {c.vocab_size})")


class Log:
    """What rank 0 tells: the console, metrics.jsonl, log.txt, samples/, wandb, and at the end results.json and loss.png."""

    def __init__(self, run: Run, config: dict, found: Dataset, steps: int, tokens_a_step: int, first_step: int, wandb_id):
        self.run, self.config, self.steps, self.tokens_a_step = run, config, steps, tokens_a_step
        self.folder, self.wandb, self.wandb_id, self.rate = Path(out_dir), None, wandb_id, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "config.json", json.dumps(config, indent=1))
        self.metrics = self.rewind("metrics.jsonl", lambda line: json.loads(line)["step"], first_step)
        self.text = self.rewind("log.txt", lambda line: int(line.split()[0]), first_step)
        try:
            self.tokenizer = tokenizer_from_dict(found.tokenizer)
        except (ValueError, ImportError) as e:
            self.tokenizer = None
            print(f"no samples will be written: {e}")
        self.prompt()  # a prompt the tokenizer cannot encode is said now, not at the end
        name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        self.peak = peak_tflops * 1e12 or peak_flops(name)
        self.flops = run.model.flops_per_token(block_size)
        if wandb_log:
            try:
                import wandb
            except ImportError:
                raise ImportError("--wandb_log needs the wandb package: pip install wandb") from None
            again = dict(id=wandb_id, resume="allow") if wandb_id else {}
            self.wandb = wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=out_dir, **again)
            self.wandb_id = self.wandb.id

    def rewind(self, name: str, step_of, first_step: int):
        """Open a log for appending, with what it says of steps after first_step taken off."""
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() and first_step else []
        atomic_write(path, "".join(line for line in lines if line.endswith("\n") and step_of(line) <= first_step))
        return open(path, "a", encoding="utf-8", buffering=1)

    def record(self, step: int, **values) -> None:
        entry = {"step": step, "tokens": step * self.tokens_a_step, **values}
        self.metrics.write(json.dumps(entry) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def step(self, step: int, loss: float, norm: float, lr: float, seconds: float, elapsed: float) -> None:
        """seconds: of one step, on average since the last line. elapsed: spent training."""
        per_second = self.tokens_a_step / seconds
        self.rate = per_second if not self.rate else 0.9 * self.rate + 0.1 * per_second
        mfu = per_second * self.flops / self.run.world / self.peak if self.peak else None
        left = (self.steps - step) * self.tokens_a_step / self.rate
        self.record(
            step, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_sec=round(per_second, 1), mfu=mfu, elapsed=elapsed
        )
        self.text.write(f"{step} train {loss:.6f}\n")
        print(
            f"{step:>6,}/{self.steps:,}  loss {loss:.4f}  lr {lr:.1e}  norm {norm:.2f}  {seconds * 1e3:.1f} ms  "
            f"{per_second:,.0f} tok/s  mfu {f'{mfu:.1%}' if mfu else 'n/a'}  eta {int(left) // 60}:{int(left) % 60:02d}",
            flush=True,
        )

    def validation(self, step: int, loss: float, accuracy: float, best: float) -> None:
        self.record(step, val_loss=loss, val_accuracy=accuracy)
        self.text.write(f"{step} val {loss:.6f}\n")
        note = "  (best)" if loss <= best else f"  (best {best:.4f})"
        print(
            f"{step:>6,}/{self.steps:,}  val loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}  "
            f"accuracy {accuracy:.1%}{note}",
            flush=True,
        )
        if step:
            plot_losses(self.folder)

    def prompt(self) -> list[int]:
        if self.tokenizer is None:
            return []
        if sample_prompt or self.tokenizer.eot is None:
            return self.tokenizer.encode(sample_prompt or self.tokenizer.decode([0]), special=True)
        return [self.tokenizer.eot]

    def sample(self, step: int) -> str:
        """Complete the prompt with dropout off, on random numbers of its own, into samples/step_N.txt."""
        if self.tokenizer is None:
            return ""
        ids, eot = self.prompt(), self.tokenizer.eot
        start = torch.tensor([ids], device=self.run.device)
        dice = torch.Generator(self.run.device).manual_seed(seed)
        stop = () if eot is None else (eot,)
        top_k = min(200, self.run.model.config.vocab_size)
        with self.run.autocast():
            new = self.run.model.generate(start, 200, 0.7, top_k, stop_tokens=stop, generator=dice)
            ids = [i for i in ids + [t.item() for t in new] if i != eot and i < self.tokenizer.n_vocab]
        text = self.tokenizer.decode(ids)
        (self.folder / "samples").mkdir(exist_ok=True)
        atomic_write(self.folder / "samples" / f"step_{step}.txt", text + "\n")
        return text

    def finish(self, val_loss: float, accuracy: float, best: float, trained: float, total: float) -> None:
        run, tokens = self.run, self.steps * self.tokens_a_step
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
        history = [json.loads(line) for line in open(self.folder / "metrics.jsonl", encoding="utf-8")]
        speeds = sorted(h["tokens_per_sec"] for h in history if "tokens_per_sec" in h)
        speed = speeds[len(speeds) // 2] if speeds else None
        results = {
            "final_val_loss": val_loss,
            "final_val_perplexity": math.exp(min(val_loss, 700)),
            "final_val_accuracy": accuracy,
            "best_val_loss": best,
            "total_steps": self.steps,
            "model_parameters": run.model.num_params(),
            "tokens": tokens,
            "tokens_per_sec": speed,
            "mfu": speed * self.flops / run.world / self.peak if self.peak and speed else None,
            "train_flops": tokens * self.flops,
            "train_seconds": trained,
            "total_seconds": total,
            "peak_memory_mib": peak_memory(run.device),
            "seed": seed,
            "world_size": run.world,
            "device": str(run.device),
            "dtype": str(run.dtype).removeprefix("torch."),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "git_commit": commit.stdout.strip() or None,
        }
        atomic_write(self.folder / "results.json", json.dumps(results, indent=1))
        text = self.sample(self.steps)
        if text:
            print(f"\n{text}\n")
        if self.wandb:
            self.wandb.summary.update(results)
            self.wandb.finish()
        files = "results.json, loss.png, metrics.jsonl, best.pt, ckpt.pt" + (", samples/" if text else "")
        print(f"val loss {val_loss:.4f} after {tokens:,} tokens in {total:.0f} s. {self.folder}/ has {files}")
        start = " ".join(text.split()[:4])
        print("Try next:")
        print(f'  python sample.py --out_dir={out_dir} --start="{start}"')
        print(f"  python sample.py --out_dir={out_dir} --num_samples=5 --temperature=1.0")
        print("  python prepare_text.py --input=my.txt --dataset=mine --tokenizer=char      (train on your own text)")


def peak_memory(on: torch.device) -> float | None:
    """MiB: of the GPU's allocator, or resident on a CPU; None where the system does not say."""
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


FONT = {  # five columns a glyph, the lowest bit on top
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539",
    "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e", ".": "0060600000", "a": "2054545478",
    "e": "3854545418", "i": "00447d4000", "k": "7f10284400", "l": "00417f4000", "n": "7c08040478", "o": "3844444438",
    "p": "7c14141408", "r": "7c08040408", "s": "4854545420", "t": "043f444020", "v": "1c2040201c", "M": "7f020c027f",
}  # fmt: skip


def plot_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss by step, in numpy, so that it needs no package."""
    history = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    series = [
        (name, rgb, np.array([(h["step"], h[key]) for h in history if key in h and math.isfinite(h[key])]))
        for name, key, rgb in (("train loss", "train_loss", (150, 180, 220)), ("val loss", "val_loss", (200, 60, 20)))
    ]
    series = [s for s in series if len(s[2])]
    if not series:
        return
    points = np.concatenate([s[2] for s in series])
    x1, low, high = points[:, 0].max() or 1, points[:, 1].min(), points[:, 1].max()
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    W, H, left, top, right, bottom = 1600, 1000, 150, 50, 40, 110
    image = np.full((H, W, 3), 255, np.uint8)

    def text(x: float, y: float, words: str, rgb=(60, 60, 60), scale=4) -> None:
        for n, char in enumerate(words):
            columns = np.frombuffer(bytes.fromhex(FONT.get(char, "0000000000")), np.uint8)
            bits = (columns[None] >> np.arange(7)[:, None] & 1).astype(bool).repeat(scale, 0).repeat(scale, 1)
            spot = image[int(y) : int(y) + 7 * scale, int(x) + 6 * scale * n :][:, : 5 * scale]
            spot[bits[: spot.shape[0], : spot.shape[1]]] = rgb

    def place(steps, losses):
        x = left + steps / x1 * (W - left - right)
        return x, top + (high - losses) / (high - low) * (H - top - bottom)

    def ticks(a: float, b: float) -> np.ndarray:
        size = 10 ** math.floor(math.log10((b - a) / 4))
        size *= next(m for m in (1, 2, 2.5, 5, 10) if (b - a) / (m * size) <= 7)
        return np.arange(math.ceil(a / size) * size, b + size / 1e3, size)

    for loss in ticks(low, high):
        y = int(place(0, loss)[1])
        image[y : y + 2, left : W - right] = 225
        text(left - 24 * len(f"{loss:.4g}") - 16, y - 13, f"{loss:.4g}")
    for step in ticks(0, x1):
        label = f"{step / 1e6:g}M" if x1 >= 1e6 else f"{step / 1e3:g}k" if x1 >= 1e4 else f"{step:g}"
        x = int(place(step, 0)[0])
        image[H - bottom : H - bottom + 12, x : x + 2] = 120
        text(x - 12 * len(label), H - bottom + 20, label)
    image[top : H - bottom, left : left + 2] = image[H - bottom : H - bottom + 2, left : W - right] = 120
    text((W + left) / 2 - 48, H - 44, "step")
    for n, (name, rgb, data) in enumerate(series):
        x, y = place(data[:, 0], data[:, 1])
        for i in range(max(1, len(x) - 1)):
            j = min(i + 1, len(x) - 1)
            dense = np.linspace(0, 1, int(max(abs(x[j] - x[i]), abs(y[j] - y[i]))) + 1)
            px, py = (x[i] + dense * (x[j] - x[i])).astype(int), (y[i] + dense * (y[j] - y[i])).astype(int)
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1)):
                image[np.clip(py + dy, 0, H - 1), np.clip(px + dx, 0, W - 1)] = rgb
        text(W - right - 260, top + 10 + 50 * n, name, rgb)
    half = image.reshape(H // 2, 2, W // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)  # smooth by averaging
    rows = b"".join(b"\0" + row.tobytes() for row in half)
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", W // 2, H // 2, 8, 2, 0, 0, 0)
    for tag, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    atomic_write(folder / "loss.png", png)


def keep_step(step: int) -> None:
    """Keep ckpt.pt as step_N.pt too, and of those the last keep_checkpoints."""
    folder = Path(out_dir)
    shutil.copyfile(folder / "ckpt.pt", folder / f"step_{step}.pt.part")
    os.replace(folder / f"step_{step}.pt.part", folder / f"step_{step}.pt")
    kept = sorted(folder.glob("step_*.pt"), key=lambda p: int(p.stem[5:]))
    for old in kept[:-keep_checkpoints]:
        old.unlink()


def main(config: dict) -> None:
    global init_from
    started = time.perf_counter()
    if resume:
        init_from = "resume"
    check_keys()
    on, kind, rank, world = set_up_device()
    master = rank == 0
    found = find_dataset(rank)
    windows = TrainingWindows(found.train, block_size, found.vocab_size, seed, data_fraction) if found.train else None
    steps, micro_batches = steps_and_accumulation(world, windows)
    tokens_a_step = micro_batches * batch_size * block_size
    model, payload = new_model(found)
    if master:
        describe(model, found, on, kind, steps, micro_batches)
    if dry_run:
        return
    validation_windows(found.val, block_size)  # too little text is said now, not after the first steps
    model.to(on).train()
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay, beta1, beta2, momentum)
    scaler = torch.amp.GradScaler(on.type, enabled=kind == torch.float16)
    run = Run(model, model, optimizers, scaler, windows, on, kind, micro_batches // world, rank, world)
    first_step, best_val_loss = 0, math.inf
    if init_from == "resume":
        for each, state in zip(optimizers, payload["optimizers"]):
            each.load_state_dict(state)
        scaler.load_state_dict(payload["scaler"])
        first_step, best_val_loss = payload["step"], payload["best_val_loss"]
    run.step_model = compile_model(run)
    if world > 1:
        gpus = [on.index] if on.type == "cuda" else None
        run.step_model = DistributedDataParallel(run.step_model, gpus, gradient_as_bucket_view=True, static_graph=False)
    log = None
    if master:
        config = config | {"max_iters": steps, "gradient_accumulation_steps": micro_batches}
        log = Log(run, config, found, steps, tokens_a_step, first_step, payload.get("wandb_id"))

    def save(name: str, whole: bool = True, **extra) -> None:
        """Rank 0 writes out_dir/name: the weights, and with whole what it takes to go on."""
        if not master:
            return
        state = {
            "model": model.state_dict(),
            "model_args": asdict(model.config),
            "step": step,
            "tokens": step * tokens_a_step,
            "best_val_loss": best_val_loss,
            "config": config,
            "tokenizer": found.tokenizer,
            "wandb_id": log.wandb_id,
        }
        if whole:
            state |= {"optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict()}
        save_checkpoint(Path(out_dir) / name, state | extra)

    payload = None  # its tensors are in the model and the optimizers now
    gc.collect()
    gc.freeze()  # what lives for the whole run is not searched for garbage again
    step, pending, bad = first_step, None, torch.zeros((), dtype=torch.bool, device=on)
    clock, paused, trained_seconds, last_logged = time.perf_counter(), 0.0, 0.0, first_step

    def read_pending() -> None:
        """Log the step before: by now the device has finished it, so reading its numbers stalls nothing."""
        nonlocal pending, clock, paused, trained_seconds, last_logged
        if pending is None:
            return
        at, loss, norm, lr = pending
        pending = None
        numbers = torch.stack((loss, norm.float(), bad.float()))
        if world > 1:
            dist.all_reduce(numbers)
        loss, norm, is_bad = (numbers / world).tolist()
        now = time.perf_counter()
        seconds = now - clock - paused
        trained_seconds += seconds
        if master:
            log.step(at, loss, norm, lr, seconds / (at - last_logged), trained_seconds)
        clock, paused, last_logged = now, 0.0, at
        if is_bad:
            raise RuntimeError(
                f"the loss is not finite at step {at} or up to {log_interval - 1} before it: nothing was saved since; "
                "lower --learning_rate, or --grad_clip, or use --dtype=float32"
            )

    while True:
        last = step >= steps
        evaluate_now = last or (eval_interval and step % eval_interval == 0)
        if evaluate_now or (checkpoint_interval and step % checkpoint_interval == 0):
            read_pending()
            aside = time.perf_counter()
            saves = always_save_checkpoint and evaluate_now or checkpoint_interval and step % checkpoint_interval == 0
            if step > first_step and (saves or last):  # before the evaluation, which may fail
                save("ckpt.pt")
                if keep_checkpoints and master:
                    keep_step(step)
            if evaluate_now:
                limit = eval_iters * batch_size if not last else -(-final_eval_tokens // block_size)
                val_loss, accuracy = evaluate(run, found.val, limit)
                if val_loss < best_val_loss and not eval_only:
                    best_val_loss = val_loss
                    if step > 0 or last:
                        save("best.pt", whole=False, val_loss=val_loss)
                if master:
                    log.validation(step, val_loss, accuracy, best_val_loss)
            if master and sample_interval and step % sample_interval == 0 and not last:
                log.sample(step)
            paused += time.perf_counter() - aside
        if last or eval_only:
            break
        lr = learning_rate
        if decay_lr:
            lr = learning_rate_at(
                step, schedule, learning_rate, min_lr, warmup_iters, lr_decay_iters or steps, decay_fraction
            )
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = lr
        loss, norm = train_step(run, step)
        bad |= ~torch.isfinite(loss)
        read_pending()
        step += 1
        if step % log_interval == 0 or step == steps:
            pending = (step, loss, norm, lr)
    if master and not eval_only:
        log.finish(val_loss, accuracy, best_val_loss, trained_seconds, time.perf_counter() - started)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    with short_errors():
        main(configure(globals()))
