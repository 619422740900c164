"""What train.py does before its first step: the --depth dial, the range of its keys, datasets, model, number of steps.

`keys` is always train.py's globals().
"""

import math
import os
from pathlib import Path

from common import checkpoint
from common.cpu import tune_malloc
from common.lora import add_lora, merge_lora
from common.runtime import (
    all_reduce,
    flops_per_token,
    init_distributed,
    is_master,
    is_out_of_memory,
    keep_dynamo_out,
    pick_dtype,
    pick_local_device,
)
from common.shards import Dataset, load_mixture
from common.windows import MixedWindows, PackedRows, TrainingWindows, training_windows, validation_windows
from configurator import UserError, check_bounds, check_choice, first_line
from model import GPT

import torch
from torch.nn.parallel import DistributedDataParallel


def from_depth(keys: dict, explicit: set[str]) -> list[tuple[str, dict]]:
    """The decisions that --depth=N stands for: a sentence and the keys that follow. Explicit keys enter the formulas.

    Sources: nanochat (https://github.com/karpathy/nanochat) for the tokens, the batch size at 1.3 billion tokens, its growth
    beyond them and the embeddings' rate; docs/training.md for smaller batches; BENCHMARKS.md for the other rates;
    https://arxiv.org/abs/2405.13698 for the weight decay, with which the weights average over the run.
    Raises UserError for a key that is out of range.
    """
    check_bounds(keys, at_least_0="depth max_iters", at_least_1="n_layer n_embd block_size batch_size")

    def given(key: str, otherwise):
        return keys[key] if key in explicit and keys[key] else otherwise

    T, width = keys["block_size"], given("n_embd", 64 * keys["depth"])
    weights = 12 * given("n_layer", keys["depth"]) * width**2 + vocab_size_of(keys) * width
    tokens = 12 * weights
    growth = 0.383 if tokens > 1.3e9 else 0.75
    sequences = 2 ** max(0, round(math.log2(2**19 * (tokens / 1.3e9) ** growth / T)))  # per step
    cuda = keys["device"].startswith("cuda") or (keys["device"] == "auto" and torch.cuda.is_available())
    rows = 2 ** max(0, int(math.log2((2**16 if cuda else 2**13) / T)))  # what fits
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = given("batch_size", max(1, min(rows, sequences // ranks)))
    sequences = max(1, round(sequences / (rows * ranks))) * rows * ranks  # the ranks share them evenly
    tokens_per_step = given("total_batch_tokens", sequences * T)
    if "gradient_accumulation_steps" in explicit:
        tokens_per_step = rows * T * keys["gradient_accumulation_steps"]
    steps = given("max_iters", max(1, round(tokens / max(1, tokens_per_step))))
    parts = {
        "norm": "rmsnorm",
        "mlp": "relu2",
        "pos": "rope",
        "qk_norm": True,
        "init": "zero_proj",
        "tie_weights": False,
    }
    heads = max(d for d in range(1, max(1, width // 64) + 1) if width % d == 0)
    rates = {"learning_rate": 0.02, "embedding_lr": 0.3, "head_lr": 1.28 / width, "vector_lr": 0.01}
    schedule = {"schedule": "wsd", "decay_fraction": 0.5, "min_lr": 0.0, "warmup_iters": 20}
    return [
        (
            "blocks of width 64 x depth, the modern parts",
            {"n_layer": keys["depth"], "n_embd": width, "n_head": heads} | parts,
        ),
        (
            f"tokens per step, 2^19 x (tokens / 1.3 billion)^{growth}",
            {"total_batch_tokens": tokens_per_step, "batch_size": rows},
        ),
        (f"12 tokens for each of {weights:,} weights in matrices and head, {tokens:,} tokens", {"max_iters": steps}),
        (
            "Muon's rate suits any width, the head's falls as 1 / width",
            {"optimizer": "muon", "momentum_warmup": 300, "beta1": 0.8} | rates | schedule,
        ),
        ("weight decay, 1 / (rate x steps)", {"weight_decay": 1 / (given("learning_rate", 0.02) * steps)}),
    ]


def vocab_size_of(keys: dict) -> int:
    """The vocabulary of --dataset; GPT-2's if it is missing or damaged, which loading it reports later."""
    try:
        return load_mixture(keys["dataset"], Path(keys["data_dir"]))[0][0].vocab_size
    except UserError:
        return 50257


def check_keys(keys: dict, optimizers, schedules) -> None:
    """Raise UserError for a key that is out of range, before anything is loaded."""
    for key, value in keys.items():
        if type(value) is float and key.islower() and not math.isfinite(value):
            raise UserError(f"--{key}={value}: must be a finite number")
    check_bounds(
        keys,
        at_least_1="batch_size block_size log_interval eval_iters timeout",
        at_least_0="depth learning_rate embedding_lr head_lr vector_lr min_lr weight_decay warmup_iters momentum_warmup "
        "grad_clip norm_eps patience max_iters max_epochs max_flops max_minutes total_batch_tokens gradient_accumulation_steps eval_interval "
        "final_eval_tokens lr_decay_iters sample_interval sample_temperature checkpoint_interval keep_checkpoints hellaswag_interval "
        "hellaswag_limit seed peak_tflops lora_rank",
        below_1="beta1 beta2 momentum label_smoothing",
    )
    if keys["seed"] >= 2**63:
        raise UserError(f"--seed={keys['seed']}: must be less than 2^63")
    if not keys["learning_rate"] and (keys["embedding_lr"] or keys["head_lr"] or keys["vector_lr"]):
        raise UserError("--learning_rate=0: the other learning rates are multiples of it")
    if keys["lora_alpha"] <= 0:
        raise UserError(f"--lora_alpha={keys['lora_alpha']}: must be above 0")
    if not 0 <= keys["decay_fraction"] <= 1:
        raise UserError(f"--decay_fraction={keys['decay_fraction']}: must be between 0 and 1")
    if keys["hellaswag_interval"] and keys["hellaswag_data"] and not Path(keys["hellaswag_data"]).is_file():
        raise UserError(f"--hellaswag_data={keys['hellaswag_data']}: no such file")
    check_choice("compile", keys["compile"], ("auto", True, False))
    check_choice("optimizer", keys["optimizer"], optimizers)
    check_choice("schedule", keys["schedule"], schedules)


def set_up_device(keys: dict) -> tuple[torch.device, torch.dtype, int, int]:
    """Device, dtype of autocast, rank and world size."""
    keep_dynamo_out()
    device = pick_local_device(keys["device"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    elif device.type == "cpu":
        tune_malloc()
    rank, world_size = init_distributed(device, keys["backend"], keys["timeout"])
    return device, pick_dtype(keys["dtype"], device), rank, world_size


def load_datasets(keys: dict, rank: int) -> list[tuple[Dataset, float]]:
    """The datasets of --dataset with their weights, which sum to 1."""
    root = Path(keys["data_dir"])
    missing = keys["dataset"] == "edu_fineweb10B" and not (root / "edu_fineweb10B").is_dir()
    if missing and (root / "openwebtext").is_dir():
        keys["dataset"] = "openwebtext"  # nanoGPT's default, which its config files rely on
        if rank == 0:
            print(f"{root}/edu_fineweb10B is missing, training on {root}/openwebtext; --dataset chooses another")
    name = keys["dataset"].partition(":")[0]
    if keys["dry_run"] and "," not in keys["dataset"] and not (root / name).is_dir():
        print(f"{root / name} does not exist: sizes are for GPT-2's vocabulary")
        return [(Dataset(keys["dataset"], [], [], None, 50257), 1.0)]
    return load_mixture(keys["dataset"], root, keys["verify_data"] and rank == 0)


def make_model(keys: dict, dataset: Dataset, loaded: dict | None, resuming: bool = False) -> GPT:
    """The model to train, on the CPU: from the keys, or from a loaded checkpoint, whose weights are freed."""
    torch.manual_seed(keys["seed"])
    if loaded is None:
        if keys["lora_rank"]:
            rank = keys["lora_rank"]
            raise UserError(f"--lora_rank={rank} is for fine-tuning: give --init_from, the weights to start from")
        return checkpoint.model_from_keys(keys, dataset.vocab_size)
    model = checkpoint.build_model_to_train(loaded, dataset, keys)
    loaded["model"] = None
    if not resuming:
        merge_lora(model)
        if keys["lora_rank"]:
            add_lora(model, keys["lora_rank"], keys["lora_alpha"])
    return model


def make_windows(keys: dict, datasets: list) -> TrainingWindows | PackedRows | MixedWindows | None:
    """The training sequences in the order of the seed. Raises UserError if a split cannot fill a window."""
    if not datasets[0][0].train:  # a dry run without its dataset
        return None
    T, seed, fraction = keys["block_size"], keys["seed"], keys["data_fraction"]
    for dataset, _ in datasets:
        validation_windows(dataset.val, T)
    parts = [training_windows(dataset, T, seed, fraction) for dataset, _ in datasets]
    for (dataset, _), part in zip(datasets, parts):
        if (left_out := getattr(part, "left_out", 0)) and is_master():
            print(f"{dataset.name}: {left_out:,} conversations do not fit --block_size={T} and are left out")
    return parts[0] if len(parts) == 1 else MixedWindows(parts, [weight for _, weight in datasets], seed)


def resolve_limits(keys: dict, state, windows, model: GPT, world_size: int) -> None:
    """Set gradient_accumulation_steps from total_batch_tokens, and max_iters to the first limit of steps, epochs and FLOPs."""
    micro_batch = keys["batch_size"] * keys["block_size"]
    if total := keys["total_batch_tokens"]:
        if total % (micro_batch * world_size):
            raise UserError(
                f"--total_batch_tokens={total} is not a multiple of batch_size x block_size x ranks = "
                f"{keys['batch_size']} x {keys['block_size']} x {world_size} = {micro_batch * world_size}"
            )
        accumulation = total // micro_batch
        if keys["gradient_accumulation_steps"] not in (0, accumulation):
            raise UserError(
                f"--gradient_accumulation_steps={keys['gradient_accumulation_steps']} and --total_batch_tokens={total} differ "
                f"(that is {accumulation} micro-batches): give one of them"
            )
        keys["gradient_accumulation_steps"] = accumulation
    accumulation = keys["gradient_accumulation_steps"]
    if accumulation < 1:
        raise UserError(f"--gradient_accumulation_steps={accumulation}: must be at least 1")
    if accumulation % world_size:
        raise UserError(f"--gradient_accumulation_steps={accumulation} is not divisible by the {world_size} ranks")
    sequences_per_step = accumulation * keys["batch_size"]
    goals = {}  # total sequences at which to stop
    if keys["max_epochs"] and windows:
        goals["max_epochs"] = keys["max_epochs"] * windows.per_epoch
    if keys["max_flops"]:
        goals["max_flops"] = keys["max_flops"] / (flops_per_token(model, keys["block_size"]) * keys["block_size"])
    limits = {k: max(1, state.step + round((goal - state.sequences) / sequences_per_step)) for k, goal in goals.items()}
    if keys["max_iters"]:
        limits["max_iters"] = keys["max_iters"]
    endless = not limits and not keys["max_minutes"] and not keys["max_epochs"]  # epochs of a dataset that is not there
    if endless and not keys["eval_only"]:
        raise UserError("--max_iters=0: give --max_iters, --max_epochs, --max_flops or --max_minutes")
    first = min(limits, key=limits.get, default=None)
    if first and limits[first] < state.step and not keys["eval_only"]:
        raise UserError(f"--{first}={keys[first]:g}: the run to resume is at step {state.step:,} already")
    keys["max_iters"] = limits[first] if first else 0


def compile_and_wrap(run, compile: bool | str, label_smoothing: float) -> torch.nn.Module:
    """run.model as a step calls it: compiled if --compile says so, and wrapped in DDP if there are several ranks.

    run: train.py's Run. With "auto" it is compiled on a GPU only, and stays uncompiled where that fails.
    """
    if compile is False or (compile == "auto" and run.device.type != "cuda"):
        return wrap_in_ddp(run, run.model)
    # Activation checkpoints cannot be split into DDP's buckets.
    torch._dynamo.config.optimize_ddp = not run.model.config.activation_checkpointing
    if run.world_size > 1:  # the backward graph cannot be tried below without reducing: build it with the forward graph
        torch._functorch.config.force_non_lazy_backward_lowering = True
    step_model, failure = wrap_in_ddp(run, torch.compile(run.model, dynamic=False)), ""
    x, y = run.batches.load(run.batches.first_sequence(0))
    try:  # torch compiles at the first call: make it here, where an error is the compiler's and not training's
        if run.world_size > 1:
            step_model.require_backward_grad_sync = False
        with run.autocast():
            _, loss = step_model(x, y, return_logits=False, label_smoothing=label_smoothing)
        if run.world_size == 1:
            run.scaler.scale(loss).backward()
    except Exception as e:
        if compile is True or is_out_of_memory(e):
            raise
        failure = first_line(e)
    run.model.zero_grad(set_to_none=True)
    if not all_reduce(torch.tensor(float(bool(failure)))):  # all ranks continue without it, or none
        return step_model
    if failure:
        print(f"torch.compile failed, continuing without it ({failure}); --compile=True shows the whole error")
    del step_model  # and DDP's hooks on the gradients, before new ones are added
    return wrap_in_ddp(run, run.model)


def wrap_in_ddp(run, model: torch.nn.Module) -> torch.nn.Module:
    if run.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        [run.device.index] if run.device.type == "cuda" else None,
        broadcast_buffers=False,  # they are constants
        gradient_as_bucket_view=True,
        static_graph=run.grad_accum_steps == 1,  # a static graph deadlocks when accumulation skips the sync
    )
