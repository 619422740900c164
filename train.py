"""Train a GPT: one process on a CPU, a Mac or a GPU, or many under torchrun.

    python train.py config/quickstart.py
    python train.py config/baby_cpu.py --batch_size=4
    torchrun --standalone --nproc_per_node=8 train.py     GPT-2 124M on ten billion tokens of FineWeb-Edu
    python train.py config/baby_gpu.py --resume           continue where the run stopped

Leaves in out_dir: ckpt.pt (latest), best.pt, config.json, metrics.jsonl, log.txt, results.json, loss.png, samples/.
"""

import gc
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import checkpoint, logger, muon, runtime, setup
from common.checkpoint import State
from common.files import lock_run
from common.scoring import sum_losses
from common.windows import Batches, validation_batches, validation_windows
from configurator import add_keys, configure, short_errors
from eval_hellaswag import classic_accuracy, load_classic
from model import GPT, GPTConfig
from prepare_tinystories import make_missing_stories

import numpy as np
import torch

# -----------------------------------------------------------------------------
# Keys: --key=value or a config file sets them; --help prints them

# Run
out_dir = "out"  # folder of the run: checkpoints, logs, results
init_from = "scratch"  # scratch | resume | a run (its best.pt) or checkpoint | gpt2, gpt2-xl, ... | Hugging Face
resume = False  # continue from out_dir's checkpoint, or start if there is none; --init_from=resume fails then
seed = 1337  # of the weights, the batch order and dropout
dry_run = False  # print sizes, FLOPs and memory, and stop before training
eval_only = False  # evaluate eval_iters batches and stop
# Data
dataset = "edu_fineweb10B"  # folder under data_dir, or several with weights: tinystories:0.7,chat:0.3
data_dir = "data"  # where datasets are
data_fraction = 1.0  # train on the first part of the tokens only
verify_data = False  # check every shard's sha256 first; small datasets are always checked
batch_size = 64  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence, the context
gradient_accumulation_steps = 8  # micro-batches in a step, over all ranks together
total_batch_tokens = 0  # tokens in a step; sets gradient_accumulation_steps (0: off)
# Model
depth = 0  # number of layers; derives width, batch size, learning rates and steps; explicit keys win (0: off)
n_layer = 12  # number of blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining; 0.1 or more for small datasets
bias = False  # biases in linear layers and LayerNorms
lora_rank = 0  # train only LoRA adapters of this rank on the blocks' linear layers (0: all weights)
lora_alpha = 16.0  # the adapters are scaled by lora_alpha / lora_rank
add_keys(globals(), GPTConfig, skip=("vocab_size",))  # norm, mlp, pos, n_kv_head, attn, ...: see GPTConfig in model.py
# Optimization
optimizer = "adamw"  # adamw | adam | sgd | adafactor | muon
learning_rate = 6e-4  # peak learning rate
embedding_lr = 0.0  # peak rate of the embeddings, and of a tied head (0: learning_rate)
head_lr = 0.0  # peak rate of an untied head (0: learning_rate)
vector_lr = 0.0  # peak rate of norms and biases (0: learning_rate)
max_iters = 19073  # stop after this many steps (0: no limit); 19,073 are ten billion tokens at 524,288 per step
max_epochs = 0.0  # stop after this many passes over the training tokens (0: no limit)
max_flops = 0.0  # stop after this many floating-point operations (0: no limit)
max_minutes = 0.0  # stop this many minutes after the start, with a schedule that follows the clock (0: no limit)
patience = 0  # stop after this many evaluations in a row without a lower loss (0: off)
weight_decay = 0.1  # on matrices only; with muon on its own matrices only
beta1 = 0.9  # Adam's decay rate of the mean gradient
beta2 = 0.95  # Adam's decay rate of the mean squared gradient
momentum = 0.95  # Nesterov momentum of muon and sgd (0: plain SGD)
momentum_warmup = 0  # steps over which the momentum rises from 0.85 (0: off)
grad_clip = 1.0  # clip the gradient to this norm (0: off)
label_smoothing = 0.0  # probability spread over the other ids in the training loss
schedule = "cosine"  # after a linear warmup: cosine | linear | wsd (warmup-stable-decay) | constant
decay_lr = True  # False: learning_rate throughout
warmup_iters = 715  # steps of linear warmup
lr_decay_iters = 0  # step at which the schedule reaches min_lr (0: max_iters)
decay_fraction = 0.2  # wsd: final fraction of the run, in which the rate falls
min_lr = 6e-5  # final learning rate; other groups' rates fall in proportion
# Evaluation, logs, checkpoints
eval_interval = 250  # steps between evaluations, each with a checkpoint (0: only at the end)
eval_iters = 20  # batches of validation windows in an evaluation, evenly spaced, the same every time
final_eval_tokens = 2**20  # validation tokens per dataset in the last evaluation (0: the whole split)
log_interval = 1  # steps between log lines
always_save_checkpoint = True  # False: evaluations save best.pt only, not ckpt.pt
checkpoint_interval = 0  # steps between further checkpoints (0: none)
keep_checkpoints = 0  # keep the last N checkpoints as step_*.pt
hellaswag_interval = 0  # steps between HellaSwag scores, and one at the end (0: off)
hellaswag_limit = 0  # score the first N examples (0: all 10,042)
hellaswag_data = ""  # a file of examples instead of the validation split, which is downloaded
sample_interval = 0  # steps between texts written to samples/ (0: only at the end)
sample_prompt = ""  # prompt of the samples; empty: the start of a document
sample_temperature = 0.7  # 0: always the most likely token
wandb_log = False  # log to Weights & Biases
wandb_project = "gpt"  # Weights & Biases project
wandb_run_name = "gpt2"  # Weights & Biases run name
wandb_checkpoint = False  # upload best.pt to Weights & Biases at the end
tensorboard = False  # write event files to out_dir/tensorboard
# System
device = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto (bfloat16 where it is fast, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
compile: bool | str = "auto"  # torch.compile; auto: on a GPU, and continue without it where it fails
backend = "nccl"  # of torchrun's ranks on GPUs; CPUs use gloo
timeout = 600  # seconds a rank waits for the others
peak_tflops = 0.0  # the device's peak, for MFU (0: from a table)

# Keys that set the same quantity. Those set last win (defaults < config file < command line); the others become 0.
RUN_LENGTH = ("max_iters", "max_epochs", "max_flops", "max_minutes")
ALTERNATIVES = (RUN_LENGTH, ("gradient_accumulation_steps", "total_batch_tokens"))
OPTIMIZERS = {  # groups of parameters -> optimizer
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(beta1, beta2), fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(beta1, beta2), fused=True),
    # Not fused: torch's fused SGD uses an uninitialised momentum buffer after a skipped first step.
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "muon": lambda groups: torch.optim.AdamW(groups, betas=(beta1, beta2), fused=True),  # what Muon does not take
}
SCHEDULES = {  # fraction of the decay done, 0 to 1 -> fraction of the rate left
    "cosine": lambda decayed: 0.5 * (1 + math.cos(math.pi * decayed)),
    "linear": lambda decayed: 1 - decayed,
    "wsd": lambda decayed: 1 - decayed,
    "constant": lambda decayed: 1.0,
}

# -----------------------------------------------------------------------------
# What a run consists of


@dataclass
class Run:
    """What train_step and evaluate need."""

    model: GPT  # the plain module: saved, evaluated and sampled from
    step_model: torch.nn.Module  # the same weights, compiled and wrapped in DDP
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    batches: Batches
    device: torch.device
    dtype: torch.dtype
    grad_accum_steps: int = 1  # micro-batches per step on this rank
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.diverged = torch.zeros((), dtype=torch.bool, device=self.device)  # a gradient was not finite

    @property
    def sequences_per_step(self) -> int:
        return self.grad_accum_steps * self.world_size * batch_size

    def autocast(self):
        return runtime.autocast(self.device, self.dtype)

    def seed_dropout(self, step: int) -> None:
        """Dropout masks are a function of (seed, step, rank), so a resumed run draws the same."""
        if dropout:
            torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0]) >> 1)


# -----------------------------------------------------------------------------
# Learning rate and optimizers


def get_lr(step: int, minutes: float = 0.0) -> float:
    """Learning rate of a step (counted from 0), `minutes` after the start: a linear warmup, then --schedule down to min_lr.

    The progress of a run, 0 to 1, is by step or by the clock, whichever is ahead.
    """
    if not decay_lr:
        return learning_rate
    decay_iters = lr_decay_iters or max_iters
    by_step = step / decay_iters if decay_iters else 0.0
    by_clock = minutes / max_minutes if max_minutes else 0.0
    if step < warmup_iters and by_clock < 0.1:  # by the clock, warmup takes a tenth of the time at most
        return learning_rate * max((step + 1) / (warmup_iters + 1), by_clock / 0.1)
    progress = min(1.0, max(by_step, by_clock))
    start = warmup_iters / decay_iters if decay_iters else 0.0  # progress at which the decay starts
    if schedule == "wsd":
        start = max(start, 1 - decay_fraction)
    if progress < start:
        return learning_rate
    decayed = (progress - start) / (1 - start) if start < 1 else 1.0
    lowest = min(min_lr, learning_rate)
    return lowest + SCHEDULES[schedule](decayed) * (learning_rate - lowest)


def get_momentum(step: int) -> float:
    """Momentum of a step (counted from 0), for Muon and SGD. It rises by equal amounts, and is never above --momentum."""
    rising = max(0.0, 1 - step / momentum_warmup) if momentum_warmup else 0.0  # from 1 to 0
    return momentum - rising * max(0.0, momentum - 0.85)


def make_optimizers(model: GPT, amp_dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every trainable parameter exactly once.

    Muon takes the blocks' matrices; embeddings, head, norms and biases go to AdamW. Weight decay applies to matrices only,
    and with Muon to its own only: embeddings learn at rates that would decay a rare token's row between two of its uses.
    A group's "lr_scale" is its peak rate / learning_rate. amp_dtype: dtype of Muon's matrix products. An optimizer with
    defaults["fused"] must check found_inf itself; train_step skips the others, at the cost of a GPU sync.
    """
    hidden, groups = [], {}
    peak_lr = {"embedding": embedding_lr, "head": head_lr, "vector": vector_lr}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trainable:
        is_vector, is_embedding = p.dim() < 2, name.startswith("transformer.w")  # wte, wpe
        if optimizer == "muon" and not is_vector and ".h." in name:
            hidden.append((name, p))
            continue
        kind = "vector" if is_vector else "embedding" if is_embedding else "head" if name == "lm_head.weight" else ""
        lr = peak_lr.get(kind) or learning_rate
        # Kinds without a rate of their own share two groups, matrices and vectors, as in nanoGPT's checkpoints.
        key = (is_vector, kind if peak_lr.get(kind) else "")
        decay = 0.0 if is_vector or optimizer == "muon" else weight_decay
        group = groups.setdefault(key, dict(params=[], lr=lr, weight_decay=decay))
        group["params"].append(p)
    groups = [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # matrices first

    optimizers = [OPTIMIZERS[optimizer](groups)] if groups else []
    if hidden:
        rows = [muon.rows_of_matrices(name, p, model.config) for name, p in hidden]
        products = torch.bfloat16 if amp_dtype == torch.bfloat16 else torch.float32
        matrices = [p for _, p in hidden]
        optimizers.insert(0, muon.Muon(matrices, learning_rate, weight_decay, momentum, rows, products))
    all_groups = [group for each in optimizers for group in each.param_groups]
    updated = sorted(id(p) for group in all_groups for p in group["params"])
    assert updated == sorted(id(p) for _, p in trainable), f"--optimizer={optimizer} misses or repeats parameters"
    for group in all_groups:
        group["lr_scale"] = group["lr"] / learning_rate if learning_rate else 1.0
    return optimizers


# -----------------------------------------------------------------------------
# One step, one evaluation


def train_step(run: Run, state: State, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One update. Returns this rank's mean loss and the gradient norm, on the device, without waiting for them.

    Once a gradient is not finite, all later updates are skipped, until the loop reads the loss and stops the run.
    """
    for each in run.optimizers:
        for group in each.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if "momentum" in group:
                group["momentum"] = get_momentum(state.step)
    run.seed_dropout(state.step)
    mean_loss = torch.zeros((), device=run.device)
    targets = run.batches.windows.learned(state.sequences, run.sequences_per_step)  # of all ranks; with masks they vary
    first = run.batches.first_sequence(state.sequences)
    x, y = run.batches.load(first)
    for micro in range(run.grad_accum_steps):
        last = micro == run.grad_accum_steps - 1
        if run.world_size > 1:  # reduce gradients once per step; DDP reads this flag in the forward pass
            run.step_model.require_backward_grad_sync = last
        with run.autocast():
            _, loss = run.step_model(x, y, return_logits=False, label_smoothing=label_smoothing)
        # The step's gradient is that of the mean over all its targets. DDP averages over the ranks.
        loss = loss / (targets / (run.batches.windows.learned(first, batch_size) * run.world_size))
        run.scaler.scale(loss).backward()
        mean_loss += loss.detach()
        if not last:  # load the next micro-batch while the device works on this one
            first = run.batches.first_sequence(state.sequences, micro + 1)
            x, y = run.batches.load(first)
    for each in run.optimizers:
        run.scaler.unscale_(each)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), grad_clip or math.inf)

    # In float16 a gradient that overflows while all losses are finite is normal: the scaler skips the step and adapts.
    # Any other gradient that is not finite means that the run has diverged.
    not_finite = diverged = ~torch.isfinite(grad_norm)
    if run.scaler.is_enabled():
        diverged = not_finite & ~torch.isfinite(runtime.all_reduce(mean_loss.clone()))
    run.diverged |= diverged
    skip_update = not_finite | run.diverged
    for each in run.optimizers:
        if each.defaults.get("fused") and run.device.type != "mps":
            each.found_inf = skip_update.float()  # fused optimizers check it on the device
            each.step()
        elif not skip_update:  # syncs with a GPU
            each.step()
    run.scaler.update()
    for each in run.optimizers:
        each.zero_grad(set_to_none=True)
    state.step += 1
    state.sequences += run.sequences_per_step
    state.tokens += run.sequences_per_step * block_size
    run.batches.prefetch(run.batches.first_sequence(state.sequences))  # while the device still works
    return mean_loss, grad_norm


def evaluate(run: Run, datasets: list, n_windows: int, interrupted=lambda: False) -> dict | None:
    """Loss (nats per token) and accuracy on each dataset's fixed validation windows, and their means by the datasets' weights.

    n_windows: evenly spaced windows per dataset (0: all), split over the ranks. None if interrupted() on any rank.
    """
    result = {"loss": 0.0, "accuracy": 0.0, "by_source": {}}
    run.model.eval()  # the plain model: compiling it again for evaluation would take longer than it saves
    for each, weight in datasets:
        windows = validation_windows(each.val, block_size, n_windows)
        batches = validation_batches(windows, block_size, each.vocab_size, batch_size, run.rank, run.world_size)
        sums = sum_losses(run.model, batches, run.autocast, interrupted)
        sums = torch.cat((sums, torch.tensor([float(interrupted())])))
        loss_sum, correct, tokens, stopped = runtime.all_reduce(sums).tolist()
        if stopped:
            result = None
            break
        result["by_source"][each.name] = loss_sum / tokens
        result["loss"] += weight * loss_sum / tokens
        result["accuracy"] += weight * correct / tokens
    run.model.train()
    return result


# -----------------------------------------------------------------------------
# Set-up and the loop


def from_depth(keys: dict, explicit: set[str]) -> list[tuple[str, dict]]:
    """setup.from_depth, with the dataset made before: its vocabulary enters the formulas."""
    make_missing_stories(keys)
    return setup.from_depth(keys, explicit)


def is_finished(state: State, minutes: float) -> bool:
    """The first limit reached ends the run."""
    out_of_steps = 0 < max_iters <= state.step
    out_of_time = 0 < max_minutes <= minutes and state.step > 0  # a start-up that takes the whole time leaves one step
    return out_of_steps or out_of_time or 0 < patience <= state.evals_since_best


def is_due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def main(config: dict) -> None:
    start_time = time.perf_counter()
    requested = dict(config)  # keys as given; below, config becomes the keys as resolved
    setup.check_keys(globals(), OPTIMIZERS, SCHEDULES)
    run_device, amp_dtype, rank, world_size = setup.set_up_device(globals())
    master = rank == 0

    # Data and model: from scratch, from other weights, or from the checkpoint to resume
    if master:
        make_missing_stories(globals())
    runtime.barrier()
    if master and not (dry_run or eval_only):
        lock_run(Path(out_dir))
    datasets = setup.load_datasets(globals(), rank)  # [(Dataset, weight)]
    loaded, resuming = checkpoint.load_start(requested, rank)
    model = setup.make_model(globals(), datasets[0][0], loaded, resuming).to(run_device).train()
    state = State(**{k: loaded[k] for k in State.__dataclass_fields__ if k in loaded}) if resuming else State()
    windows = setup.make_windows(globals(), datasets)  # None in a dry run without its dataset
    setup.resolve_limits(globals(), state, windows, model, world_size)  # sets max_iters, gradient_accumulation_steps
    config = {key: globals()[key] for key in config} | {"init_from": requested["init_from"]}  # not "resume"
    if master:
        logger.print_summary(model, datasets, config, run_device, amp_dtype)
    eval_windows = eval_iters * batch_size
    if resuming and loaded.get("requested", {}).get("eval_iters") == eval_iters:
        eval_windows = loaded["eval_windows"]  # the same windows as before, also with another batch size
    scaler = torch.amp.GradScaler(run_device.type, enabled=amp_dtype == torch.float16)
    batches = Batches(windows, batch_size, run_device, rank, world_size)
    accum = gradient_accumulation_steps // world_size
    run = Run(model, model, [], scaler, batches, run_device, amp_dtype, accum, rank, world_size)
    if eval_only and not dry_run:
        result = evaluate(run, datasets, eval_windows)
        if master:
            print(logger.format_evaluation(result))
        return runtime.shutdown_distributed()

    # Optimizers, the compiled step, logs
    run.optimizers = make_optimizers(model, amp_dtype)
    if resuming:
        checkpoint.restore_optimizers(run.optimizers, scaler, loaded, config, requested, datasets)
        checkpoint.restore_best(state, rank, out_dir)
    loaded = None  # frees its memory
    if dry_run:
        return runtime.shutdown_distributed()
    run.step_model = setup.compile_and_wrap(run, compile, label_smoothing)
    questions = None
    if hellaswag_interval:
        questions = load_classic(hellaswag_data, data_dir, hellaswag_limit, datasets[0][0].tokenizer, block_size)
    config |= {key: value for key, value in asdict(model.config).items() if key in config}
    log = logger.Logger(run, config, datasets, state, resuming) if master else logger.NullLogger()
    saver = checkpoint.CheckpointSaver(run, config, requested, datasets, eval_windows, log.tokenizer_dict)
    gc.collect()
    gc.freeze()  # objects that live for the whole run are never searched for garbage again
    monitor = runtime.StepMonitor(run_device, world_size, start_time - state.total_seconds)
    monitor.signals.catch(True)
    evaluated, saved = None, state.step  # the steps evaluated and saved last

    while True:
        # Each round first saves, evaluates and samples after the last update, then makes one: N updates take N + 1 rounds.
        step, last = state.step, is_finished(state, monitor.minutes)
        evaluate_now = (last or is_due(eval_interval, step)) and evaluated != step
        save_now = last or (always_save_checkpoint and evaluate_now) or is_due(checkpoint_interval, step)
        score_now = questions is not None and step > 0 and (last or is_due(hellaswag_interval, step))
        sample_now = is_due(sample_interval, step) and not last
        pause = evaluate_now or save_now or score_now or sample_now or monitor.stop
        if pause:
            log_step(run, state, log, monitor)

        # 1. Once in a while: save, before an evaluation that may fail. A signal to stop saves too.
        if (save_now or monitor.stop) and saved != step:
            log.sync()
            state.total_seconds = time.perf_counter() - monitor.start_time
            saver.save("ckpt.pt", state)
            saved = step
        # 2. Stop, on all ranks at the same step.
        if monitor.stop:
            break
        # 3. Once in a while: evaluate, and keep the best weights.
        if evaluate_now:
            result = evaluate(run, datasets, eval_windows, monitor.signals.is_set)
            if result is None:  # a signal came
                monitor.stop = True
                continue
            evaluated, state.evals_since_best = step, state.evals_since_best + 1
            if result["loss"] < state.best_val_loss:
                state.best_val_loss, state.evals_since_best = result["loss"], 0
                if step > 0 or requested["init_from"] != "scratch":
                    saver.save("best.pt", state, with_optimizer=False, val_loss=result["loss"])
            log.evaluation(state, result)
            if is_finished(state, monitor.minutes) and not last:
                log.out_of_patience(state)
                continue  # the next round is the last
        # 4. Once in a while: score on HellaSwag.
        if score_now:
            with run.autocast():
                log.hellaswag(state, *classic_accuracy(run.model, questions, rank, world_size))
        # 5. Once in a while: write a sample.
        if sample_now:
            log.sample(step)
        if last:
            break
        if pause:
            monitor.end_pause()

        # 6. One update.
        lr = get_lr(step, monitor.minutes)
        loss, grad_norm = train_step(run, state, lr)
        # 7. Log: on a GPU the update before, while this one runs; elsewhere this one at once.
        log_step(run, state, log, monitor)
        monitor.submit(state, lr, loss, grad_norm)
        if run_device.type != "cuda":
            log_step(run, state, log, monitor)

    # The end: a stopped run exits with 128 + signal, a finished run does the final evaluation and writes its results.
    saver.wait()
    monitor.signals.catch(False)  # everything that training made is on the disk
    run.step_model = model  # frees DDP before its process group: the other order deadlocks
    if not monitor.stop:
        log.final_evaluation(datasets)
        result = evaluate(run, datasets, -(-final_eval_tokens // block_size))
    runtime.shutdown_distributed()  # all ranks together: torchrun ends the others when one exits
    if not monitor.stop:
        log.finish(state, result, time.perf_counter() - monitor.start_time)
    saver.raise_if_failed()
    if monitor.stop:
        log.stopped(state)
        raise SystemExit(128 + (monitor.signals.received or signal.SIGTERM))


def log_step(run: Run, state: State, log: logger.Logger, monitor: runtime.StepMonitor) -> None:
    """Log the step submitted last, unless that was done before. Raises UserError if its loss or gradient is not finite."""
    if stats := monitor.collect():
        state.train_seconds += stats.seconds
        if is_due(log_interval, stats.step) or is_finished(state, monitor.minutes) or monitor.stop:
            log.step(stats, monitor.minutes)
        log.show_step(stats.step)
        adapting = run.scaler.is_enabled() and monitor.skipped < 100  # its scale would be 2^-84, from 2^16
        if not (math.isfinite(stats.loss) and (math.isfinite(stats.grad_norm) or adapting)):
            raise runtime.bad_step_error(run, stats)


if __name__ == "__main__":
    with short_errors(), runtime.explain_errors(globals()), logger.progress_bar_closed():
        options = dict(one_of=ALTERNATIVES, part_of={"sample_prompt": "dataset"})
        main(configure(globals(), dial=("depth", from_depth), **options))
