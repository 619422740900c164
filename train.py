"""Train a GPT: one process on a CPU, a Mac or a GPU, or many under torchrun.

    python train.py config/quickstart.py
    python train.py config/baby_cpu.py --batch_size=4
    torchrun --standalone --nproc_per_node=8 train.py          GPT-2 124M on ten billion tokens of FineWeb-Edu
    python train.py config/baby_gpu.py --resume                go on where the run stopped

Leaves in out_dir: ckpt.pt (latest), best.pt, config.json, metrics.jsonl, log.txt, results.json, loss.png, samples/.
"""

import contextlib
import gc
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import Saver, build_model, load_checkpoint, load_latest, load_payload, restore, save_checkpoint
from common.logger import Log, close_bars, describe, measures
from common.muon import OPTIMIZERS, SCHEDULES, learning_rate_at, make_optimizers
from common.runtime import (
    Signals,
    from_first_rank,
    is_out_of_memory,
    join_ranks,
    largest_batch,
    leave_ranks,
    pick_dtype,
    pick_own_device,
    read_later,
    tune_malloc,
)
from common.shards import Dataset, MixedWindows, TrainingWindows, load_mixture, validation_batches, validation_windows
from common.tokenizer import tokenizer_from_dict
from configurator import configure, first_line, short_errors
from eval_hellaswag import classic_accuracy, classic_questions, find_examples, read_examples
from model import GPT, GPTConfig

# Run
out_dir = "out"  # folder of the run: checkpoints, logs, results
init_from = "scratch"  # scratch | resume | a run's folder or checkpoint | gpt2, gpt2-medium, ... | a Hugging Face one
resume = False  # go on from out_dir's checkpoint; without one, begin. --init_from=resume insists on one
seed = 1337  # of the weights, the batch order and dropout
dry_run = False  # print sizes, FLOPs and memory, and stop before training
eval_only = False  # evaluate once and stop
# Data
dataset = "edu_fineweb10B"  # folder under data_dir, or several with weights: tinystories:0.7,chat:0.3
data_dir = "data"  # where datasets are
data_fraction = 1.0  # train on the first part of the tokens only
verify_data = False  # hold every shard against its sha256 first; small datasets always are
batch_size: int | str = 64  # sequences in a micro-batch; auto: as many as fit, for total_batch_tokens
block_size = 1024  # tokens in a sequence, the context
gradient_accumulation_steps = 8  # micro-batches in a step, over all ranks together
total_batch_tokens = 0  # tokens in a step: sets gradient_accumulation_steps; 0: off
# Model
depth = 0  # one dial: the modern recipe for so many blocks, its width, batch, rates, length; keys given beside it win; 0: off
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
lora_rank = 0  # fine-tune by low-rank additions to the blocks' matrices alone; 0: all weights
lora_alpha = 16.0  # which count lora_alpha / lora_rank times
# Optimization
optimizer = "adamw"  # adamw | adam | sgd | adafactor | muon
learning_rate = 6e-4  # peak learning rate
embedding_lr = 0.0  # that of the embeddings, and of the head where it is tied; 0: learning_rate
head_lr = 0.0  # that of an untied head; 0: learning_rate
vector_lr = 0.0  # that of norms, biases and gates; 0: learning_rate
max_iters = 19073  # steps; one epoch of ten billion tokens at 524,288 a step
max_epochs = 0.0  # passes over the training tokens: sets max_iters; 0: off
max_flops = 0.0  # floating-point operations to train for: sets max_iters; 0: off
max_minutes = 0.0  # train until so long after the start, by a schedule that follows the clock; 0: off
patience = 0  # stop after so many evaluations in a row without a lower loss; 0: off
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # Adam's decay of the mean gradient
beta2 = 0.95  # and of its square
momentum = 0.95  # of muon and sgd, nesterov; 0: plain
grad_clip = 1.0  # clip the norm of the gradient; 0: off
skip_bad_steps = 0  # go on over so many steps whose loss or gradient is not finite, without updating
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
hellaswag_interval = 0  # steps between scores on HellaSwag, and one at the end; 0: off
hellaswag_limit = 0  # of its first so many examples; 0: all 10,042
hellaswag_data = ""  # a file of examples instead of the validation split, which is downloaded
sample_interval = 0  # steps between texts written to samples/; 0: only at the end
sample_prompt = ""  # how they begin; empty: the start of a document
sample_temperature = 0.7  # how freely they are written; 0: always the likeliest
wandb_log = False  # log to Weights & Biases
wandb_project = "gpt"  # its project
wandb_run_name = "gpt2"  # and the run's name in it
wandb_checkpoint = False  # upload best.pt to it in the end
tensorboard = False  # write event files to out_dir/tensorboard
# System
device = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
compile: bool | str = "auto"  # torch.compile: auto goes on without it where it fails, True does not
backend = "nccl"  # of torchrun's ranks on GPUs; the CPU's is gloo
timeout = 600  # seconds that a rank waits for the others before it gives up
peak_tflops = 0.0  # the device's peak for MFU; 0: from a table


@dataclass
class Run:
    """Everything that train_step and evaluate need."""

    model: GPT  # plain: saved, sampled from
    step_model: torch.nn.Module  # the same weights, compiled and wrapped as the device asks
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    windows: TrainingWindows | MixedWindows
    device: torch.device
    dtype: torch.dtype
    accumulation: int  # micro-batches of a step on this rank
    rank: int = 0
    world: int = 1
    ahead: tuple = (None, None, None)  # a step and its first micro-batch, fetched before it is needed
    bad: int | torch.Tensor = 0  # steps so far whose gradient was not finite, counted on the device

    def __post_init__(self):
        self.bad = torch.tensor(self.bad, device=self.device)

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
        return self.to_device(*self.windows.batch(self.first_window(step, micro, self.rank), batch_size))

    def first_window(self, step: int, micro: int, rank: int) -> int:
        return ((step * self.accumulation + micro) * self.world + rank) * batch_size


@dataclass
class State:
    """Where a run stands: what its checkpoints keep beside weights and optimizers."""

    step: int = 0
    best_val_loss: float = math.inf
    waited: int = 0  # evaluations since the best one
    elapsed: float = 0.0  # seconds in training steps
    spent: float = 0.0  # seconds since the start, over all the processes there were
    bad_steps: int = 0  # without an update
    wandb_id: str | None = None


def dropout_seed(step: int, rank: int) -> int:
    """Masks are a function of (seed, step, rank), as the batches are: a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]) >> 1


def train_step(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights. Returns this rank's mean loss and the gradient's norm, on the device, not waited for.

    A gradient that is not finite updates nothing, and after more than skip_bad_steps of them no gradient does, so the weights
    are still those that led there.
    """
    if dropout:
        torch.manual_seed(dropout_seed(step, run.rank))
    fetched, x, y = run.ahead
    if fetched != step:
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
    hold = ~torch.isfinite(norm)
    known = total.clone()
    if run.world > 1 and run.scaler.is_enabled():  # the ranks agree on what is an overflow
        dist.all_reduce(known)
    overflow = torch.isfinite(known) & run.scaler.is_enabled()  # float16's, which the scaler mends
    run.bad += hold & ~overflow
    hold |= run.bad > skip_bad_steps
    for each in run.optimizers:  # a fused one checks found_inf on the device, except on a Mac
        if each.defaults.get("fused") and run.device.type != "mps":
            each.found_inf = hold.float()
            each.step()
        elif not hold:  # waits for the device
            each.step()
    run.scaler.update()
    for each in run.optimizers:
        each.zero_grad(set_to_none=True)
    run.ahead = (step + 1, *run.batch(step + 1, 0))  # while the device works
    return total, norm


@torch.no_grad()
def evaluate(run: Run, shards: list, limit: int, interrupted=lambda: False) -> tuple[float, float] | None:
    """Mean loss (nats a token) and accuracy over `limit` fixed validation windows (0: all), shared out over the ranks.

    None if interrupted() became true on any rank.
    """
    windows = validation_windows(shards, block_size, limit)
    model = run.model.eval()  # not the compiled one, whose graph without gradients would have to be built first
    sums = [torch.zeros(3, device=run.device)]
    for x, y in validation_batches(windows, block_size, run.windows.vocab_size, batch_size, run.rank, run.world):
        if interrupted():
            break
        x, y = run.to_device(x, y)
        known = y >= 0
        with run.autocast():
            losses, right = model.token_losses(model.hidden(x)[known], y[known], accuracy=True)
        sums.append(torch.stack((losses.sum(), right.sum(), known.sum())))
    model.train()
    total = torch.cat(
        (torch.stack(sums).cpu().double().sum(0), torch.tensor([float(interrupted())], dtype=torch.float64))
    )
    if run.world > 1:
        dist.all_reduce(total)  # gloo's, on the CPU
    loss_sum, correct, tokens, stopped = total.tolist()
    return None if stopped else (loss_sum / tokens, correct / tokens)


def evaluate_all(run: Run, found: list[tuple[Dataset, float]], limit: int, interrupted=lambda: False) -> tuple | None:
    """evaluate() on each dataset: loss and accuracy, weighted by their shares, and the losses by name if they are several."""
    losses, accuracy = {}, 0.0
    for each, share in found:
        measured = evaluate(run, each.val, limit, interrupted)
        if measured is None:
            return None
        losses[each.name], accuracy = measured[0], accuracy + share * measured[1]
    loss = sum(share * losses[each.name] for each, share in found)
    return loss, accuracy, losses if len(found) > 1 else {}


def set_up_device() -> tuple[torch.device, torch.dtype, int, int]:
    """Resolve device, then dtype; join the other ranks. Returns (device, dtype, rank, world size)."""
    on = pick_own_device(device)
    if on.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for what stays float32
    elif on.type == "cpu":
        tune_malloc()
    rank, world = join_ranks(on, backend, timeout)
    return on, pick_dtype(dtype, on), rank, world


def find_datasets(rank: int) -> list[tuple[Dataset, float]]:
    """The datasets and their shares; the quickstart's own stories are made where they are missing."""
    global dataset
    root = Path(data_dir)
    if dataset == "edu_fineweb10B" and not (root / dataset).is_dir() and (root / "openwebtext").is_dir():
        dataset = "openwebtext"  # nanoGPT's default, which its config files lean on
        if rank == 0:
            print(f"there is no {data_dir}/edu_fineweb10B, so this trains on {root / dataset}; --dataset chooses")
    if "tinystories_synthetic" in re.split("[:,]", dataset):
        folder = root / "tinystories_synthetic"
        if rank == 0 and not (folder / "meta.json").exists():
            from common.corpus import alone
            from prepare_tinystories import make_synthetic

            with alone(root / ".tinystories_synthetic.lock"):  # two runs may begin at once
                if not (folder / "meta.json").exists():
                    print(f"{folder} is not there yet: writing its stories (prepare_tinystories.py --synthetic=True)")
                    make_synthetic(folder)
        if dist.is_initialized():
            dist.barrier()
    name = dataset.partition(":")[0]
    if dry_run and "," not in dataset and not (root / name).is_dir():
        print(f"there is no dataset {root / name}: sizes assume GPT-2's vocabulary")
        return [(Dataset(dataset, [], [], None, 50257), 1.0)]
    return load_mixture(dataset, data_dir, verify_data and rank == 0)


def training_windows(found: list[tuple[Dataset, float]]) -> TrainingWindows | MixedWindows:
    parts = [TrainingWindows(d.train, block_size, d.vocab_size, seed, data_fraction) for d, _ in found]
    return MixedWindows(parts, [share for _, share in found], seed) if len(found) > 1 else parts[0]


def find_payload(config: dict, rank: int, world: int) -> dict:
    """The checkpoint to go on from or to start from, {} from scratch. A run's own is read by rank 0 for all.

    --resume goes on if there is anything to go on from, and so does a job that torchrun started again, from a checkpoint
    that was asked for with the same keys.
    """
    global init_from
    payload, again = None, resume or init_from == "resume"
    attempt = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if world > 1:
        dist.all_reduce(attempt, dist.ReduceOp.MAX)  # a host that came back counts from 0
    if again or attempt:
        if rank == 0:
            payload = load_latest(Path(out_dir))
            same = config.keys() - {"wandb_run_name", "batch_size"}
            if payload and not again and any(payload.get("asked", {}).get(k) != config[k] for k in same):
                payload = None  # another run's, which this one was not asked to go on with
        payload = from_first_rank(payload)
        if payload is None and init_from == "resume":
            raise ValueError(
                f"there is no checkpoint {out_dir}/ckpt.pt: train first, or set --out_dir to a run's folder"
            )
        if payload:
            init_from = "resume"
            return payload
        if rank == 0:
            print(f"there is nothing in {out_dir} to go on from: the run begins")
    return {} if init_from == "scratch" else load_payload(init_from)


def resumed(payload: dict, steps: int) -> State:
    """Where the checkpoint's run stands. Raises ValueError if it cannot go on from there."""
    if any(k not in payload for k in ("optimizers", "scaler", "step", "best_val_loss", "config")):
        raise ValueError(
            f"{out_dir}/ckpt.pt has no state to go on from: begin a run with --init_from={out_dir}/ckpt.pt"
        )
    if payload["step"] > steps and not eval_only:
        raise ValueError(f"--max_iters={steps}: the run to resume is at step {payload['step']:,} already")
    state = State(**{k: payload[k] for k in State.__dataclass_fields__ if k in payload})
    state.best_val_loss = float(state.best_val_loss)
    return state


def meet_best(state: State, rank: int) -> State:
    """The state, on all ranks, with the best loss of best.pt, which may be newer than the checkpoint. One of this very step is
    evaluated again, which counts for nothing.
    """
    if rank == 0:
        with contextlib.suppress(ValueError):  # there is none, or it is damaged
            best = load_checkpoint(Path(out_dir) / "best.pt")
            if best["step"] <= state.step:
                state.best_val_loss = min(state.best_val_loss, best.get("val_loss", math.inf))
                state.waited = -1 if best["step"] == state.step else state.waited
    return from_first_rank(state)


def find_hellaswag(rank: int) -> list[dict]:
    """The examples to score on while training, if that is asked for; rank 0 downloads them."""
    if not hellaswag_interval:
        return []
    if hellaswag_data:
        return read_examples(Path(hellaswag_data), hellaswag_limit)
    if rank == 0:
        find_examples("val", data_dir)
    if dist.is_initialized():
        dist.barrier()
    return find_examples("val", data_dir, hellaswag_limit)


def new_model(found: Dataset, payload: dict) -> GPT:
    """The model to train: of the keys, or of the checkpoint."""
    torch.manual_seed(seed)
    if not payload:
        if lora_rank:
            raise ValueError(f"--lora_rank={lora_rank} is for fine-tuning: give --init_from, the weights to start from")
        keys = GPTConfig.__dataclass_fields__.keys() & globals().keys()
        return GPT(GPTConfig(vocab_size=found.vocab_size, **{k: globals()[k] for k in keys}))
    arguments, trained_on = payload["model_args"], payload.get("tokenizer")
    if found.tokenizer is None:  # a dry run without its dataset
        fits = True
    elif trained_on is None:  # nanoGPT's checkpoints do not say
        fits = arguments["vocab_size"] >= found.vocab_size
    else:
        fits = trained_on == found.tokenizer or trained_on["kind"] == found.tokenizer["kind"] == "gpt2"
    if not fits:
        raise ValueError(
            f"--init_from={init_from}: trained with a vocabulary of {arguments['vocab_size']:,} ids, "
            f"the dataset {dataset} has another, of {found.vocab_size:,}: choose the --dataset it was trained on"
        )
    if block_size > arguments["block_size"]:
        raise ValueError(
            f"--block_size={block_size} is more than the checkpoint's context of {arguments['block_size']}"
        )
    if block_size < arguments["block_size"]:
        arguments["block_size"] = block_size
        positions = "transformer.wpe.weight"
        payload["model"] = {n: t[:block_size] if n.endswith(positions) else t for n, t in payload["model"].items()}
    arguments |= dict(dropout=dropout, attn=attn, activation_checkpointing=activation_checkpointing)
    model = build_model(payload)
    if init_from != "resume":
        model.merge_lora()
        if lora_rank:
            model.add_lora(lora_rank, lora_alpha)
    return model


def new_optimizers(model: GPT, kind: torch.dtype) -> list[torch.optim.Optimizer]:
    """Those of the keys, for a run in dtype `kind`."""
    rates = (embedding_lr, head_lr, vector_lr)
    exact = torch.bfloat16 if kind == torch.bfloat16 else torch.float32  # of Muon's products
    return make_optimizers(model, optimizer, learning_rate, weight_decay, beta1, beta2, momentum, *rates, dtype=exact)


def prepare_step(run: Run) -> torch.nn.Module:
    """The model as a step calls it: compiled where --compile asks for it (auto: on a GPU, if it works), in DDP if there are ranks."""
    if compile not in (True, False, "auto"):
        raise ValueError(f"--compile={compile}: choose auto, True or False")
    if compile is False or (compile == "auto" and run.device.type != "cuda"):
        return in_ddp(run, run.model)
    torch._dynamo.config.optimize_ddp = not activation_checkpointing  # which cannot be cut into DDP's buckets
    if run.world > 1:  # a trial of the backward pass would already reduce: its graph is built with the forward pass's
        torch._functorch.config.force_non_lazy_backward_lowering = True
    step_model, failure = in_ddp(run, torch.compile(run.model, dynamic=False)), ""
    x, y = run.batch(0, 0)
    try:  # a graph is built at the first call: make it here, where a failure can be told from training's
        if run.world > 1:
            step_model.require_backward_grad_sync = False
        with run.autocast():
            _, loss = step_model(x, y, return_logits=False, label_smoothing=label_smoothing)
        if run.world == 1:
            run.scaler.scale(loss).backward()
    except Exception as e:
        if compile is True or is_out_of_memory(e):
            raise
        failure = first_line(e)
    run.model.zero_grad(set_to_none=True)
    failed = torch.tensor(float(bool(failure)))
    if run.world > 1:
        dist.all_reduce(failed)  # gloo's, on the CPU: all go on without it, or none
    if not failed:
        return step_model
    if failure:
        print(f"torch.compile does not work here, going on without it ({failure}); --compile=True shows all")
    del step_model  # its hooks on the gradients go before the next ones come
    return in_ddp(run, run.model)


def in_ddp(run: Run, model: torch.nn.Module) -> torch.nn.Module:
    """The model, its gradients averaged over the ranks while the backward pass goes on."""
    if run.world == 1:
        return model
    return DistributedDataParallel(
        model,
        [run.device.index] if run.device.type == "cuda" else None,
        broadcast_buffers=False,  # they are constants
        gradient_as_bucket_view=True,
        static_graph=run.accumulation == 1,  # with more, it would wait for ever for a reduction left to a later one
    )


AT_LEAST_1 = "block_size gradient_accumulation_steps max_iters log_interval eval_iters timeout"
AT_LEAST_0 = """depth learning_rate embedding_lr head_lr vector_lr min_lr weight_decay warmup_iters grad_clip norm_eps patience
max_epochs max_flops max_minutes total_batch_tokens skip_bad_steps eval_interval final_eval_tokens sample_interval
sample_temperature checkpoint_interval keep_checkpoints hellaswag_interval hellaswag_limit"""
BELOW_1 = "beta1 beta2 momentum label_smoothing"


def check_keys() -> None:
    """What a key may not be, said before anything is loaded. Raises ValueError."""
    for key, value in globals().items():
        if type(value) is float and key.islower() and not math.isfinite(value):
            raise ValueError(f"--{key}={value}: must be a finite number")
    bounds = ((AT_LEAST_1, 1, math.inf), (AT_LEAST_0, 0, math.inf), (BELOW_1, 0, 1), ("seed", 0, 2**63))
    for keys, least, below in bounds:
        for key in keys.split():
            if not least <= globals()[key] < below:
                most = f" and less than {below}" if below < math.inf else ""
                raise ValueError(f"--{key}={globals()[key]}: must be at least {least}{most}")
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise ValueError(f"--batch_size={batch_size}: must be at least 1, or auto")
    if batch_size == "auto" and not total_batch_tokens:
        raise ValueError("--batch_size=auto needs --total_batch_tokens, the tokens of a step it divides")
    if not learning_rate and (embedding_lr or head_lr or vector_lr):
        raise ValueError("--learning_rate=0: the other learning rates are multiples of it")
    if sum(map(bool, (max_epochs, max_flops, max_minutes))) > 1:
        raise ValueError("--max_epochs, --max_flops and --max_minutes each say when to stop: give one")
    for key, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if globals()[key] not in choices:
            raise ValueError(f"--{key}={globals()[key]}: choose one of {', '.join(choices)}")


def steps_and_accumulation(model: GPT, world: int, windows: TrainingWindows | None) -> tuple[int, int]:
    """(steps, micro-batches of a step over all ranks), from epochs, FLOPs and tokens a step where these are given.

    By the clock nobody knows how many steps there will be: sys.maxsize.
    """
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
        raise ValueError(
            f"--gradient_accumulation_steps={micro_batches} is not divisible by the {world} ranks that share it"
        )
    steps = max_iters
    if max_epochs and windows:
        steps = max(1, round(max_epochs * windows.per_epoch / (micro_batches * batch_size)))
    elif max_flops:
        steps = max(1, round(max_flops / (model.flops_per_token(block_size) * micro_batches * micro_tokens)))
    elif max_minutes:
        steps = sys.maxsize
    return steps, micro_batches


@contextlib.contextmanager
def explained():
    """Errors of the machine as a line that says what to change: memory that ran out, a rank that is gone."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if is_out_of_memory(e):
            tips = ["--activation_checkpointing=True", "a smaller --block_size or model"]
            if isinstance(batch_size, int) and batch_size > 1:
                part = next(d for d in range(2, batch_size + 1) if batch_size % d == 0)
                keys = f"--batch_size={batch_size // part} --gradient_accumulation_steps={gradient_accumulation_steps * part}"
                tokens = batch_size * block_size * gradient_accumulation_steps
                tips.insert(0, f"{keys} (the same {tokens:,} tokens a step)")
            raise RuntimeError(
                f"out of memory with micro-batches of {batch_size} x {block_size} tokens ({first_line(e)[:100]}); try "
                f"{', or '.join(tips)}"
            ) from None
        if world > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            if int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world:
                time.sleep(5)  # sooner, torchrun has not noticed that a host is lost, and starts again with it (README)
            raise RuntimeError(f"rank {rank}: another rank is gone ({first_line(e)})") from None
        raise
    finally:
        close_bars()


def dump_bad_step(run: Run, step: int, rank: int, config: dict, tokenizer: dict) -> str:
    """Write the weights and micro-batches of a bad step to out_dir/bad_step_N.pt. Returns words on that and on where its data lies."""
    batches = [run.first_window(step, micro, rank) for micro in range(run.accumulation)]
    places = [
        (shard.path.name, shard.offset + int(start) * np.dtype(shard.dtype).itemsize)
        for first in batches
        for shard, starts in run.windows.locate(first, batch_size)
        for start in starts
    ]
    path = Path(out_dir) / f"bad_step_{step + 1}.pt"
    told = f"batch from {places[0][0]} at byte {places[0][1]:,} and {len(places) - 1} more. {path} reproduces it"
    if run.rank == 0:
        x, y = zip(*(run.windows.batch(first, batch_size) for first in batches))
        payload = {
            "model": run.model.state_dict(), "model_args": asdict(run.model.config), "config": config,
            "tokenizer": tokenizer, "step": step, "rank": rank, "dropout_seed": dropout_seed(step, rank),
            "x": torch.from_numpy(np.stack(x)), "y": torch.from_numpy(np.stack(y)), "places": places,
        }  # fmt: skip
        try:
            save_checkpoint(path, payload)
        except OSError as e:
            told = told.replace("reproduces it", f"could not be written: {e.strerror}")
    return told


def rate_at(step: int, steps: int, expected: float) -> float:
    """The learning rate of a step of so many, or by the clock of so many as are expected."""
    if not decay_lr:
        return learning_rate
    until, warmup = lr_decay_iters or steps, warmup_iters
    if max_minutes:
        until, warmup = expected, min(warmup_iters, expected / 10)
    return learning_rate_at(step, schedule, learning_rate, min_lr, warmup, until, decay_fraction)


def from_depth(keys: dict, given: set[str]) -> dict:
    """The keys that --depth stands for: so many blocks, 64 times as wide. keys: all of them; given: those that were set, which win.

    Tokens: 20 for each weight in the blocks' matrices, 12 depth (64 depth)^2 of them (https://arxiv.org/abs/2203.15556).
    Tokens a step grow as tokens^(2/3), from 2^14 at depth 2 to 2^19 at depth 12. The head's rate falls as 1 / width, the others
    suit any (tests/test_recipe.py); weight decay averages over the length of the run (https://arxiv.org/abs/2405.13698).
    """
    for key, least in (("depth", 0), ("n_layer", 1), ("n_embd", 1), ("block_size", 1), ("max_iters", 1)):
        if keys[key] < least:
            raise ValueError(f"--{key}={keys[key]}: must be at least {least}")

    def known(key: str, otherwise):
        return keys[key] if key in given and keys[key] else otherwise

    width, T = known("n_embd", 64 * keys["depth"]), keys["block_size"]
    weights = 12 * known("n_layer", keys["depth"]) * width**2
    sequences = 2 ** max(0, round(math.log2(2**19 * (weights / 85e6) ** (2 / 3) / T)))
    cuda = keys["device"].startswith("cuda") or (keys["device"] == "auto" and torch.cuda.is_available())
    rows = 2 ** max(0, int(math.log2((2**16 if cuda else 2**13) / T)))
    rows = known("batch_size", max(1, min(rows, sequences // int(os.environ.get("WORLD_SIZE", 1)))))
    step = known("total_batch_tokens", sequences * T)
    if "gradient_accumulation_steps" in given and rows != "auto":
        step = rows * T * keys["gradient_accumulation_steps"]
    steps = known("max_iters", max(1, round(20 * weights / max(1, step))))
    return {
        "n_layer": keys["depth"], "n_embd": width,
        "n_head": max(d for d in range(1, max(1, width // 64) + 1) if width % d == 0),
        "norm": "rmsnorm", "mlp": "relu2", "pos": "rope", "qk_norm": True, "init": "zero_proj", "tie_weights": False,
        "optimizer": "muon", "learning_rate": 0.02, "embedding_lr": 0.03, "head_lr": 1.28 / width, "vector_lr": 0.01,
        "weight_decay": 1 / (known("learning_rate", 0.02) * steps), "schedule": "wsd", "decay_fraction": 0.5,
        "min_lr": 0.0, "warmup_iters": 20, "total_batch_tokens": 0 if "gradient_accumulation_steps" in given else step,
        "batch_size": rows, "max_iters": steps,
    }  # fmt: skip


def main(config: dict) -> None:
    global batch_size, gradient_accumulation_steps  # as resolved: a step's batches and explained() use them
    began, asked = time.perf_counter(), config
    signals = Signals()
    check_keys()
    on, kind, rank, world = set_up_device()
    master = rank == 0

    # Data and model
    found = find_datasets(rank)
    first_found = found[0][0]  # its vocabulary is that of all
    windows = training_windows(found) if first_found.train else None
    examples = find_hellaswag(rank)
    payload = find_payload(asked, rank, world)
    model = new_model(first_found, payload).to(on).train()
    eval_sequences = eval_iters * (batch_size if isinstance(batch_size, int) else 64)
    if batch_size == "auto":
        batch_size = largest_batch(model, total_batch_tokens, block_size, on, kind, world)
    steps, gradient_accumulation_steps = steps_and_accumulation(model, world, windows)
    tokens_a_step = gradient_accumulation_steps * batch_size * block_size
    keys = {k: globals()[k] for k in config}
    if master:
        describe(model, found, keys, on, kind, steps, gradient_accumulation_steps)
    if dry_run:
        return leave_ranks()
    for each, _ in found:
        validation_windows(each.val, block_size)  # too little text is said now, not after the first steps

    # What it goes on from
    optimizers = new_optimizers(model, kind)
    scaler = torch.amp.GradScaler(on.type, enabled=kind == torch.float16)
    state = State()
    if init_from == "resume":
        state = resumed(payload, steps)
        restore(optimizers, scaler, payload, keys, steps, gradient_accumulation_steps)
        if payload.get("asked", {}).get("eval_iters") == eval_iters:  # the same windows, whatever the batch size now
            eval_sequences = payload["eval_sequences"]
    first_step, started = state.step, began - state.spent
    accumulation = gradient_accumulation_steps // world
    run = Run(model, model, optimizers, scaler, windows, on, kind, accumulation, rank, world, bad=state.bad_steps)
    run.step_model = prepare_step(run)
    questions = classic_questions(examples, tokenizer_from_dict(first_found.tokenizer), block_size) if examples else []
    log, saver = None, Saver()
    if master and not eval_only:
        config = config | {k: keys[k] for k in ("dataset", "batch_size", "gradient_accumulation_steps")}
        config |= {k: v for k, v in asdict(model.config).items() if k in config}
        config["max_iters"] = max_iters if max_minutes else steps
        log = Log(run, config, first_found.tokenizer, tokens_a_step, first_step, steps, state.wandb_id)
        state.wandb_id = log.wandb_id
    if first_step and not eval_only:
        state = meet_best(state, rank)
    payload = None  # its tensors are in the model and the optimizers now

    def spent() -> float:
        return time.perf_counter() - started

    def save(name: str, whole: bool = True, **extra) -> None:
        """Rank 0 writes out_dir/name: the weights, and with whole what it takes to go on."""
        if not master:
            return
        log.sync()
        state.spent = spent()
        kept = {
            "model": model.state_dict(),
            "model_args": asdict(model.config),
            "tokens": state.step * tokens_a_step,
            "config": config,
            "tokenizer": log.tokenizer.to_dict() if log.tokenizer else first_found.tokenizer,
            "turns": any(each.turns for each, _ in found),
            "asked": asked,
            "eval_sequences": eval_sequences,
            **asdict(state),
        }
        if whole:
            kept |= {"optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict()}
        also = Path(out_dir) / f"step_{state.step}.pt" if whole and keep_checkpoints else None
        saver.save(Path(out_dir) / name, kept | extra, also, keep_checkpoints)

    gc.collect()
    gc.freeze()  # what lives for the whole run is not searched for garbage again
    saved, pending, stop = first_step, None, False
    own_place = torch.eye(world, device=on)[rank]
    clock, last_logged = time.perf_counter(), first_step
    evaluated, scored, unlogged = None, None, None  # the steps evaluated and scored last; the last that has no line yet
    done_before = done = from_first_rank(spent() / (60 * max_minutes) if max_minutes else 0.0)  # part of the minutes
    expected = steps  # of the whole run; by the clock, at the present pace
    if max_minutes and first_step:
        expected = first_step * 60 * max_minutes / max(state.spent, 1e-3)

    def due(interval: int) -> bool:
        return interval > 0 and state.step % interval == 0

    def log_step() -> None:
        """A line for the last step that was read."""
        nonlocal clock, last_logged, unlogged
        at, loss, norm, lr = unlogged
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        state.elapsed += seconds
        if master:
            log.step(at, loss, norm, lr, seconds / (at - last_logged), state.elapsed)
        last_logged, unlogged = at, None

    def read_pending() -> None:
        """Log the step before, which a GPU has finished by the time the next one is launched. Raises if it went bad."""
        nonlocal pending, stop, done, expected, unlogged
        if pending is None:
            return
        (at, read, lr, logged), pending = pending, None
        loss, norm, stopped, done, *bad_loss = read()
        loss, norm, stop = loss / world, norm / world, stopped > 0
        if done > done_before:
            expected = at + max(0.0, 1 - done) / (done - done_before) * (at - first_step)
            if master:
                log.steps = round(expected)
        unlogged = (at, loss, norm, lr)
        if logged:
            log_step()
        if any(bad_loss) or (not math.isfinite(norm) and not scaler.is_enabled()):
            state.bad_steps += 1
            worst = bad_loss.index(max(bad_loss))
            about = f"step {at:,}: loss {loss:.4g}, gradient norm {norm:.4g}, rank {worst}"
            if state.bad_steps <= skip_bad_steps:
                if master:
                    print(f"warning: {about}: no update, {state.bad_steps} of {skip_bad_steps} tolerated")
                return
            saver.wait()
            good = saver.steps.get("ckpt.pt", first_step)
            good = f"the last good checkpoint is of step {good:,}" if good else "there is no checkpoint yet"
            raise RuntimeError(
                f"{about}, {dump_bad_step(run, at - 1, worst, config, first_found.tokenizer)}; {good}. Lower "
                "--learning_rate or --grad_clip, try --dtype=float32, or tolerate some by --skip_bad_steps=N"
            )

    # The loop
    signals.catch(not eval_only)
    while True:
        if done >= 1 and steps > state.step:  # the minutes are over
            read_pending()
            if unlogged:
                log_step()
            steps = state.step
        last = state.step >= steps
        evaluate_now = (last or eval_only or due(eval_interval)) and evaluated != state.step
        save_now = last or (always_save_checkpoint and evaluate_now) or due(checkpoint_interval)
        sample_now = due(sample_interval) and not last
        score_now = examples and state.step > 0 and (due(hellaswag_interval) or last) and scored != state.step
        if evaluate_now or save_now or sample_now or score_now or stop:
            read_pending()
            aside = time.perf_counter()
            if (save_now or stop) and state.step > saved:  # before the evaluation, which may fail
                save("ckpt.pt")
                saved = state.step
            if stop:
                break
            if evaluate_now:
                measured = evaluate_all(run, found, eval_sequences, lambda: signals.number > 0)
                if measured is None:
                    stop = True
                    continue
                val_loss, accuracy, by_source = measured
                if eval_only:
                    break
                evaluated, state.waited = state.step, state.waited + 1
                if val_loss < state.best_val_loss:
                    state.best_val_loss, state.waited = val_loss, 0
                    if state.step or init_from != "scratch":
                        save("best.pt", whole=False, val_loss=val_loss)
                if master:
                    log.validation(state.step, val_loss, accuracy, state.best_val_loss, by_source)
                if patience and state.waited >= patience and state.step < steps:
                    steps = state.step
                    if master:
                        print(
                            f"stopped at step {steps:,}: no lower loss in {state.waited} evaluations; best.pt has the best"
                        )
            if score_now:
                with run.autocast():
                    scores = classic_accuracy(run.model, questions, rank, world)
                scored = state.step
                if master:
                    log.hellaswag(state.step, *scores)
            if master and sample_now:
                log.sample(state.step)
            clock += time.perf_counter() - aside
        if last:
            break
        if state.step >= steps:  # out of patience: once more round, as the last step
            continue
        lr = rate_at(state.step, steps, expected)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = lr * group["share"]
        loss, norm = train_step(run, state.step)
        read_pending()
        state.step += 1
        signalled = torch.full((), float(signals.number > 0), device=on)
        by_now = torch.full((), spent() / (60 * max_minutes) if master and max_minutes else 0.0, device=on)
        numbers = torch.cat((torch.stack((loss, norm.float(), signalled, by_now)), own_place * ~torch.isfinite(loss)))
        if world > 1:  # so that all ranks stop together
            dist.all_reduce(numbers)
        pending = (state.step, read_later(numbers), lr, due(log_interval) or state.step == steps)
        if on.type != "cuda":
            read_pending()

    # The end
    saver.wait()
    signals.catch(False)  # all that training made is on the disk
    if world > 1:  # DDP goes before its group: as the last owner it would wait for gloo's thread with the GIL held
        run.step_model = run.step_model.module
    if stop:
        if "ckpt.pt" in saver.failed:
            raise OSError(
                f"stopped at step {state.step:,}, which is not saved: make room, and --resume goes on from what there is"
            )
        if master:
            print(f"stopped at step {state.step:,}: --resume goes on from there")
        leave_ranks()  # together: torchrun ends the others when the first is gone
        raise SystemExit(128 + (signals.number or signal.SIGTERM))
    if not eval_only:  # the final loss, over more of the split
        final = evaluate_all(run, found, -(-final_eval_tokens // block_size))
    leave_ranks()  # nobody waits while rank 0 writes the results
    if eval_only and master:
        print(measures(val_loss, accuracy, by_source))
    elif master:
        log.steps = steps
        log.finish(*final, state.best_val_loss, state.bad_steps, state.elapsed, time.perf_counter() - began)
        for name, step in saver.failed.items():
            raise OSError(f"{out_dir}/{name} of step {step:,} is not saved: make room, and --resume repeats the end")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # what is printed is seen at once, in a file too
    with short_errors(), explained():
        main(configure(globals(), dial=("depth", from_depth)))
