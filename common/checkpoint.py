"""A run's folder: checkpoints saved whole or not at all, loaded without running code, found, and resumed from.

A checkpoint is a dict of tensors and JSON-able values: model, model_args, optimizers, scaler, the fields of State
(step, sequences, tokens, best_val_loss, ...), config (keys as resolved), requested (keys as given), tokenizer, is_chat.
nanoGPT's ckpt.pt loads as well.
"""

import math
import os
import re
import shutil
import sys
import threading
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.files import atomic_file
from common.lora import add_lora
from common.pretrained import MOST, NothingDrawn, is_pretrained, read_pretrained, to_our_names
from common.runtime import all_reduce, broadcast_object, is_master, is_out_of_memory
from common.shards import Dataset, load_dataset
from common.tokenizer import Tokenizer, read_tokenizer, same_vocabulary, tokenizer_from_dict
from configurator import UserError, check_type, first_line
from model import GPT, GPTConfig

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

PREVIOUS = "ckpt_previous.pt"  # the checkpoint before ckpt.pt, for when that is damaged


@dataclass
class State:
    """Where a run stands. Checkpoints keep it, beside the weights and the optimizers."""

    step: int = 0  # updates so far
    sequences: int = 0  # training sequences seen: the position in the batch order
    tokens: int = 0  # training tokens seen
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    train_seconds: float = 0.0  # spent in training steps
    total_seconds: float = 0.0  # since the start, over all processes of the run
    wandb_id: str | None = None


class DamagedCheckpoint(UserError):
    """Truncated or corrupt checkpoint (not: temporarily unreadable)."""


# -----------------------------------------------------------------------------
# Saving


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write to a temporary file, sync, rename: a crash leaves either the old file or the new one intact.

    The old ckpt.pt stays as ckpt_previous.pt. Raises OSError, and leaves the old files, where the disk is full.
    """
    try:
        with atomic_file(path) as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
            if path.name == "ckpt.pt" and path.exists():
                hard_link(path, path.with_name(PREVIOUS))
    except RuntimeError as e:  # torch's writer hides the OSError behind it
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # makes the renames durable
        os.close(folder)


def hard_link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`, at no cost of disk; a copy where the file system has no links."""
    part = other.with_name(other.name + ".part")
    part.unlink(missing_ok=True)
    try:
        try:
            os.link(path.resolve(), part)  # of a link its target, which would be replaced
        except OSError:
            shutil.copyfile(path, part)
        os.replace(part, other)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def copy_to_host(checkpoint: dict, buffers: dict) -> dict:
    """The checkpoint with copies of its tensors on the CPU.

    buffers: the copies by the address of the tensor. A later call reuses their memory, and tied weights share one copy.
    """

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype)
        if key not in buffers:
            buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        return buffers[key].copy_(value.detach(), non_blocking=value.is_cuda)

    return tree_map(copy, checkpoint)


class CheckpointSaver:
    """Writes checkpoints in a thread, one at a time, from a copy of their tensors, while training continues.

    A failed write is reported with the space it needs, and the files before it stay. failed: file name -> step, of files
    whose last write failed. Only rank 0 writes.
    """

    def __init__(self, run, config: dict, requested: dict, datasets: list, eval_windows: int, tokenizer: dict):
        self.run, self.folder, self.keep = run, Path(config["out_dir"]), config["keep_checkpoints"]
        self.constant = {
            "model_args": asdict(run.model.config), "config": config, "requested": requested, "tokenizer": tokenizer,
            "is_chat": any(dataset.is_chat for dataset, _ in datasets), "eval_windows": eval_windows,
            "dataset_sha256": {dataset.name: dataset.sha256 for dataset, _ in datasets},
        }  # fmt: skip
        self.thread: threading.Thread | None = None
        self.failed: dict[str, int] = {}
        self.buffers: dict = {}  # memory of the copies

    def save(self, name: str, state, with_optimizer=True, **extra) -> None:
        """Write out_dir/name; with_optimizer=False leaves out what only resuming needs."""
        run = self.run
        if run.rank:
            return
        checkpoint = {"model": run.model.state_dict(), **self.constant, **asdict(state), **extra}
        if with_optimizer:
            checkpoint |= {"optimizers": [o.state_dict() for o in run.optimizers], "scaler": run.scaler.state_dict()}
        self.wait()
        copy = copy_to_host(checkpoint, self.buffers)  # after wait(): the thread writes from the same memory
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        also = f"step_{state.step}.pt" if with_optimizer and self.keep else ""
        self.thread = threading.Thread(target=self.write, args=(self.folder / name, copy, also))
        self.thread.start()

    def write(self, path: Path, checkpoint: dict, also: str) -> None:
        step = checkpoint["step"]
        try:
            save_checkpoint(path, checkpoint)
            self.failed.pop(path.name, None)
            if also:
                hard_link(path, path.with_name(also))
                for old in kept_steps(path.parent)[: -self.keep]:
                    old.unlink()
        except (OSError, MemoryError) as e:
            self.failed[path.name] = step
            need = sum(t.nbytes for t in tree_leaves(checkpoint) if isinstance(t, torch.Tensor)) / 2**20
            free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else math.nan
            old = f"; {path} is still the previous one" if path.exists() else ""
            print(
                f"warning: the checkpoint of step {step:,} is not saved ({getattr(e, 'strerror', None) or e}): it needs "
                f"{need:,.1f} MiB, {free:,.1f} MiB are free in {path.parent}{old}; training continues"
            )

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None

    def raise_if_failed(self) -> None:
        for name, step in self.failed.items():
            raise UserError(f"{self.folder}/{name} of step {step:,} is not saved: free some space, then --resume")


def kept_steps(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*.pt") if p.stem[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[5:]))


# -----------------------------------------------------------------------------
# Loading


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of ours or of nanoGPT, on the CPU.

    Raises DamagedCheckpoint if it is not whole, UserError if it cannot be read now or holds anything but plain data.
    """
    if not path.is_file():
        raise no_checkpoint(path)
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise DamagedCheckpoint(f"{path} is damaged: the checksum of {bad} in it is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpoint:
        raise
    except Exception as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path} holds the Python object {code[1]}, and loading it could run code. If you trust the file, convert it "
                "where that object is known: p = torch.load(path, weights_only=False); p['config'] = vars(p['config']); "
                "torch.save(p, path)"
            ) from None
        if isinstance(e, OSError) or is_out_of_memory(e):
            raise UserError(f"{path} cannot be read now: {first_line(e)}") from None
        raise DamagedCheckpoint(f"{path} is damaged: {first_line(e)}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint: it has no model and model_args")
    return upgrade(checkpoint, path)


RENAMED = {  # older name -> today's
    "waited": "evals_since_best", "elapsed": "train_seconds", "spent": "total_seconds", "asked": "requested",
    "turns": "is_chat", "eval_sequences": "eval_windows",
}  # fmt: skip


def upgrade(checkpoint: dict, path: Path) -> dict:
    """Bring a checkpoint of nanoGPT, or of an older version of ours, into today's form."""
    checkpoint = {RENAMED.get(k, k): v for k, v in checkpoint.items()}
    if "model_args" not in checkpoint:  # build-nanogpt's, converted: GPT-2's tanh GELU and biases
        known = GPTConfig.__dataclass_fields__
        checkpoint["model_args"] = {k: v for k, v in checkpoint.get("config", {}).items() if k in known}
        checkpoint["config"] = {}
    args = checkpoint["model_args"]
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if not all(isinstance(args.get(k), int) for k in sizes):
        raise UserError(f"{path} is not a checkpoint: its model_args lack one of {', '.join(sizes)}")
    if "iter_num" in checkpoint:  # nanoGPT's: the exact GELU, and one AdamW
        checkpoint["step"] = checkpoint["iter_num"]
        args |= {"mlp": args.get("mlp", "gelu_erf")}
        if "optimizer" in checkpoint:
            checkpoint |= {"optimizers": [checkpoint.pop("optimizer")], "scaler": {}}
    if "best_val_loss" in checkpoint:
        checkpoint["best_val_loss"] = float(checkpoint["best_val_loss"])
    if "sequences" not in checkpoint and "step" in checkpoint:  # before the position was counted in sequences
        config = checkpoint.get("config", {})
        per_step = config.get("gradient_accumulation_steps", 0) * config.get("batch_size", 0)
        checkpoint["sequences"] = checkpoint["step"] * per_step
        checkpoint["tokens"] = checkpoint["sequences"] * config.get("block_size", args["block_size"])
    return checkpoint


def load_latest(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run, or None if it has no checkpoint file at all.

    A damaged one is reported and renamed to *.damaged, and the one before it is taken. Raises UserError if all are damaged,
    or if one cannot be read now.
    """
    for path in (folder / "ckpt.pt", folder / PREVIOUS, *reversed(kept_steps(folder))):
        if path.exists():
            try:
                return load_checkpoint(path)
            except DamagedCheckpoint as e:
                print(f"warning: {e}")
            os.replace(path, path.with_name(path.name + ".damaged"))
    if damaged := sorted(folder.glob("*.pt.damaged")):
        names = ", ".join(p.name for p in damaged)
        raise UserError(f"no checkpoint in {folder} can be read, there is only {names}: remove them to start again")
    return None


# -----------------------------------------------------------------------------
# Finding a model


def find_runs(root: Path = Path()) -> list[Path]:
    """The folders with a checkpoint among out*/ and out*/*/, the most recently written first."""
    patterns = [f"out*/{below}{name}" for name in ("ckpt.pt", "best.pt") for below in ("*/", "")]
    found = sorted(((p.stat().st_mtime, p.parent) for pattern in patterns for p in root.glob(pattern)), reverse=True)
    return list(dict.fromkeys(folder for _, folder in found))


def no_checkpoint(path: str | Path) -> UserError:
    """The error of a checkpoint or run folder that does not exist; names the newest runs."""
    runs = ", ".join(map(str, find_runs()[:3]))
    return UserError(f"there is no checkpoint {path}: {f'there is {runs}' if runs else 'train first'}")


def chosen_model(out_dir: str, init_from: str) -> str:
    """The model a script should load: init_from; if that is "resume", out_dir; if that is empty, the newest run.

    Raises UserError if there is no such folder, or no run.
    """
    if init_from != "resume":
        return init_from
    if out_dir and not Path(out_dir).exists():
        raise no_checkpoint(out_dir)
    if not out_dir and not find_runs():
        hint = "run python train.py config/quickstart.py, or set --out_dir"
        raise UserError(f"there is no trained model under out/: {hint}")
    if not out_dir:
        out_dir = str(find_runs()[0])
        print(f"{out_dir}: the newest run; --out_dir takes another", file=sys.stderr)
    return out_dir


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint of a run's folder (best.pt, otherwise ckpt.pt), or a checkpoint file itself."""
    path = Path(name)
    if path.is_dir():
        return path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
    return path


def read_model(name: str | Path) -> dict:
    """The checkpoint of a run's folder or file, or a pretrained model (GPT-2 by name, Hugging Face) in the same form."""
    if not is_pretrained(str(name)):
        return load_checkpoint(find_checkpoint(name))
    arguments, weights, folder = read_pretrained(str(name))
    tokenizer = {"kind": "gpt2"} if arguments["vocab_size"] == 50257 else None
    if (folder / "tokenizer.json").exists():
        tokenizer = read_tokenizer(folder).to_dict()
    is_chat = bool(tokenizer and tokenizer.get("chat_template"))
    return {
        "model": weights,
        "model_args": arguments,
        "tokenizer": tokenizer,
        "is_chat": is_chat,
        "config": {},
        "step": 0,
    }


def load_model(name: str | Path) -> tuple[GPT, dict]:
    """The model of read_model(), in evaluation mode on the CPU, and its checkpoint."""
    checkpoint = read_model(name)
    return build_model(checkpoint).eval(), checkpoint


def find_tokenizer(checkpoint: dict, data_dir: str = "data") -> Tokenizer:
    """The checkpoint's own tokenizer; nanoGPT's checkpoints have none: that of their dataset, otherwise GPT-2's."""
    if checkpoint.get("tokenizer"):
        return tokenizer_from_dict(checkpoint["tokenizer"])
    name = checkpoint.get("config", {}).get("dataset", "")
    if name and (Path(data_dir) / name / "meta.pkl").exists():
        return tokenizer_from_dict(load_dataset(name, data_dir).tokenizer)
    if checkpoint["model_args"]["vocab_size"] not in (50257, 50304):
        where = (
            f"set --data_dir: there is no {data_dir}/{name}/meta.pkl" if name else "add tokenizer.json to its folder"
        )
        raise UserError(f"the model has no tokenizer: {where}")
    return tokenizer_from_dict({"kind": "gpt2"})


# -----------------------------------------------------------------------------
# Models


def config_from(arguments: dict) -> GPTConfig:
    """Raises UserError for an argument of the wrong type or out of range."""
    for field in fields(GPTConfig):
        if field.name in arguments:
            value = arguments[field.name]
            try:
                check_type(value, field.default, type(field.default))
            except TypeError:
                kind = type(field.default).__name__
                raise UserError(f"the model's arguments are wrong: {field.name}={value!r} is no {kind}") from None
            if type(field.default) is int and value > MOST:
                raise UserError(f"the model's arguments are wrong: {field.name}={value!r} is not a size")
    try:
        return GPTConfig(**arguments)
    except (ValueError, TypeError) as e:
        raise UserError(f"the model's arguments are wrong: {e}" if isinstance(e, TypeError) else str(e)) from None


def model_from_keys(keys: dict, vocab_size: int) -> GPT:
    """A new model by a script's keys."""
    names = GPTConfig.__dataclass_fields__.keys() & keys.keys()
    return GPT(config_from({k: keys[k] for k in names} | {"vocab_size": vocab_size}))


def build_model(checkpoint: dict) -> GPT:
    """The model of a checkpoint, on the CPU. Raises UserError if its weights do not fit its arguments."""
    args, weights = checkpoint["model_args"], to_our_names(checkpoint["model"])
    wte, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if args.get("tie_weights", True) and wte is not None and head is not None and wte.data_ptr() != head.data_ptr():
        # nanoGPT's of before weight tying, and files that say otherwise than they hold.
        args["tie_weights"] = wte.shape == head.shape and torch.equal(wte, head)
    config = config_from(args)
    layers = {int(m[1]) + 1 for name in weights if (m := re.match(r"transformer\.h\.(\d+)\.", name))}
    if config.n_layer != max(layers, default=0):
        raise UserError(
            f"the weights do not fit this model: they have {max(layers, default=0)} layers of {config.n_layer}"
        )
    with NothingDrawn():
        with torch.device("meta"):  # sizes that are wrong must not take memory
            shapes = new_model(config)
        weights, model = check_weights(shapes, weights), new_model(config)
    model.load_state_dict(weights)
    return model


def new_model(config: GPTConfig) -> GPT:
    model = GPT(config)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    return model


def load_weights(model: GPT, state_dict: dict[str, torch.Tensor]) -> None:
    """Load a state dict of ours, nanoGPT's or transformers' GPT-2. Raises UserError if it does not fit the model."""
    model.load_state_dict(check_weights(model, to_our_names(state_dict)))


def check_weights(model: GPT, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with rows for the ids that pad the vocabulary. Raises UserError if they do not fit the model."""
    own, weights = model.state_dict(), dict(weights)
    if model.config.tie_weights and "transformer.wte.weight" in weights:
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    for name in {"transformer.wte.weight", "lm_head.weight"} & weights.keys():
        if 0 < (padding := len(own[name]) - len(weights[name])) < 64:
            weights[name] = F.pad(weights[name], (0, 0, 0, padding))
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"the weights do not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    if wrong := [n for n in own if own[n].shape != weights[n].shape]:
        shapes = ", ".join(f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in wrong[:3])
        raise UserError(f"the weights do not fit this model: {shapes}")
    return weights


RUNTIME_FIELDS = {"dropout", "attn", "activation_checkpointing"}  # of GPTConfig: may change when a run continues


def stretch_context(args: dict, keys: dict) -> None:
    """Give the arguments of a model to train on the --rope_scaling of the keys, and the longer context. Raises UserError."""
    names = ("rope_factor", "rope_original", "rope_low", "rope_high")
    scaling, wanted = args.get("rope_scaling", "none"), keys["rope_scaling"]
    if wanted == "none":
        if any(keys[name] != GPTConfig.__dataclass_fields__[name].default for name in names):
            others = ", ".join(names[1:])
            raise UserError(f"--rope_factor={keys['rope_factor']}: it needs --rope_scaling, and so do {others}")
    elif scaling != "none":
        if (scaling, args["rope_factor"]) != (wanted, keys["rope_factor"]):
            raise UserError(
                f"--rope_scaling={wanted}: this model is stretched already, {scaling} by {args['rope_factor']:g}"
            )
    elif args.get("pos") != "rope":
        raise UserError(f"--rope_scaling={wanted}: the model to start from has no rotary positions")
    else:
        trained = args["block_size"]
        args |= {key: keys[key] for key in ("rope_scaling", "rope_factor", "rope_low", "rope_high")}
        args |= {"rope_original": keys["rope_original"] or trained, "block_size": round(trained * keys["rope_factor"])}


def build_model_to_train(checkpoint: dict, dataset: Dataset, keys: dict) -> GPT:
    """The checkpoint's model with the runtime fields of the keys, and a context cut to --block_size, or stretched by --rope_scaling.

    Raises UserError where its vocabulary is not the dataset's, or its context is too short.
    """
    args, tokenizer = checkpoint["model_args"], checkpoint.get("tokenizer")
    if dataset.tokenizer is None:  # a dry run without its dataset
        fits = True
    elif tokenizer is None:  # nanoGPT's checkpoints do not say
        fits = args["vocab_size"] >= dataset.vocab_size
    else:
        fits = same_vocabulary(tokenizer, dataset.tokenizer)
    if not fits:
        raise UserError(
            f"--init_from={keys['init_from']}: trained with a vocabulary of {args['vocab_size']:,} ids, the dataset "
            f"{dataset.name} has another, of {dataset.vocab_size:,}: choose the --dataset it was trained on"
        )
    T, trained = keys["block_size"], args["block_size"]
    stretch_context(args, keys)
    if T > args["block_size"]:
        longer = f"--rope_scaling=yarn --rope_factor={-(-T // trained)} stretches it"
        advice = f"; {longer}" if args.get("pos") == "rope" and args.get("rope_scaling", "none") == "none" else ""
        raise UserError(f"--block_size={T} is more than the checkpoint's context of {args['block_size']}{advice}")
    if T < args["block_size"]:
        args["block_size"] = T
        weights = checkpoint["model"]
        checkpoint["model"] = {n: t[:T] if n.endswith("transformer.wpe.weight") else t for n, t in weights.items()}
    args |= {key: keys[key] for key in RUNTIME_FIELDS}
    return build_model(checkpoint)


# -----------------------------------------------------------------------------
# Resuming


def load_start(requested: dict, rank: int) -> tuple[dict | None, bool]:
    """The checkpoint that a run starts from, None if from scratch, and whether it resumes it rather than takes its weights.

    A run resumes if --resume or --init_from=resume say so, or if torchrun restarted the job and out_dir's checkpoint was made
    with the same keys. Then requested["init_from"] becomes what it first started from. Rank 0 reads for all.
    """
    folder, init_from = Path(requested["out_dir"]), requested["init_from"]
    asked = requested["resume"] or init_from == "resume"
    # Summed over the ranks, because a replaced host counts its restarts from 0.
    restarts = all_reduce(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    checkpoint = None
    if (asked or restarts) and rank == 0:
        checkpoint = load_latest(folder)
        same_job = requested.keys() - {"wandb_run_name", "batch_size"}
        if checkpoint and not asked and any(checkpoint.get("requested", {}).get(k) != requested[k] for k in same_job):
            checkpoint = None
    if checkpoint := broadcast_object(checkpoint):
        if any(k not in checkpoint for k in ("optimizers", "scaler", "step", "best_val_loss", "config")):
            raise UserError(f"{folder}/ckpt.pt has no optimizer state: start a run with --init_from={folder}/ckpt.pt")
        requested["init_from"] = checkpoint.get("requested", checkpoint["config"]).get("init_from", "scratch")
        return checkpoint, True
    if asked and (init_from == "resume" or requested["eval_only"]):
        raise UserError(f"there is no checkpoint {folder}/ckpt.pt: train first, or set --out_dir to a run's folder")
    if (asked or restarts) and rank == 0:
        print(f"{folder} has no checkpoint to resume from: starting the run")
    return None if init_from == "scratch" else read_model(init_from), False


def restore_best(state, rank: int, out_dir: str) -> None:
    """Take the best loss from best.pt, on all ranks. A best.pt of a later step is ignored: training repeats those steps.

    ckpt.pt is saved before the evaluation of its step, so a best.pt of the same step is newer. That step is evaluated again
    without counting against patience.
    """
    best, path = None, Path(out_dir) / "best.pt"
    if rank == 0 and path.exists():
        try:
            found = load_checkpoint(path)
            best = found["step"], found.get("val_loss", math.inf)
        except UserError:  # damaged
            pass
    if best := broadcast_object(best):
        if best[0] <= state.step:
            state.best_val_loss = min(state.best_val_loss, best[1])
        if best[0] == state.step:
            state.evals_since_best = -1


def restore_optimizers(
    optimizers: list, scaler, checkpoint: dict, config: dict, requested: dict, datasets: list
) -> None:
    """Load the optimizers' state and print which keys changed. Raises UserError for a change that resuming cannot make."""
    for dataset, _ in datasets:
        trained_on = checkpoint.get("dataset_sha256", {}).get(dataset.name, dataset.sha256)
        if dataset.sha256 and trained_on != dataset.sha256:  # a dry run may do without its dataset
            advice = f"--init_from={config['out_dir']} starts a run on the new one"
            raise UserError(f"--resume: the dataset {dataset.name} is another than the run was trained on: {advice}")
    # A key that the checkpoint does not know had its default: nanoGPT has no other optimizer, older versions fewer fields.
    defaults = {f.name: f.default for f in fields(GPTConfig)} if "requested" in checkpoint else {}
    before = defaults | {"optimizer": "adamw"} | checkpoint.get("requested", checkpoint["config"])
    now = requested | {"dataset": config["dataset"]}
    if "dataset" in checkpoint["config"]:  # the one that was found
        before["dataset"] = checkpoint["config"]["dataset"]
    fixed = {f.name for f in fields(GPTConfig)} - RUNTIME_FIELDS | {"optimizer"}
    ignored = set()
    if before.get("init_from", "scratch") not in ("scratch", "resume"):  # its model came from other weights, not keys
        ignored = {key for key in fixed if key != "block_size" and not key.startswith("rope_")}
        fixed = {"optimizer", "lora_rank"} | ({"lora_alpha"} if before.get("lora_rank") else set())
    start_again = f"keep it, or start a run with --init_from={config['out_dir']}"
    for key in sorted(fixed & before.keys() & now.keys()):
        if before[key] != now[key] and ("requested" in checkpoint or key in ("optimizer", "block_size")):
            raise UserError(f"--{key}={now[key]}: the run to resume had {before[key]}; {start_again}")
    changed = changed_keys(before, now, fixed | ignored, checkpoint["config"], config)
    if changed and is_master():
        print(f"resumed with other keys than before: {', '.join(changed)}")
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"]):
        sizes = [[len(g["params"]) for g in groups] for groups in (optimizer.param_groups, saved["param_groups"])]
        if sizes[0] != sizes[1] and "iter_num" in checkpoint:
            if is_master():
                print("warning: the optimizer's state has another layout (nanoGPT's before May 2023): it starts afresh")
            return
        if sizes[0] != sizes[1]:
            rates = "--embedding_lr, --head_lr and --vector_lr"
            raise UserError(f"{rates} may change when a run resumes, but not from or to 0: {start_again}")
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        # nanoGPT's moments have no rows for ids that pad the vocabulary, and a shorter context needs fewer rows.
        for index, values in saved["state"].items():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "row_var"):
                moment = values.get(name)
                if moment is None:
                    continue
                values[name] = F.pad(moment, (0, 0) * (moment.dim() - 1) + (0, len(params[index]) - len(moment)))
        # A decay that no key changed stays: older versions decayed embeddings beside Muon too.
        if before.get("weight_decay") == now["weight_decay"]:
            for ours in settings:
                ours.pop("weight_decay", None)
        for theirs, ours in zip(saved["param_groups"], settings):  # they decide on which device AdamW counts steps
            theirs |= {k: ours[k] for k in ("fused", "capturable") if k in ours}
        optimizer.load_state_dict(saved)
        for group, ours in zip(optimizer.param_groups, settings):  # this run's keys, not the checkpoint's
            group.update(ours)
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


def changed_keys(before: dict, now: dict, fixed: set[str], config_before: dict, config: dict) -> list[str]:
    """Descriptions of the keys that differ and matter: "weight_decay 0.1 -> 0.2"."""
    silent = {"resume", "init_from", "out_dir", "max_iters", "lr_decay_iters", "eval_only", *fixed}
    silent |= {"batch_size", "gradient_accumulation_steps", "total_batch_tokens"}
    if not config["decay_lr"] or config["max_minutes"] or config["schedule"] == "constant":
        silent.add("end of the learning rate schedule")
    for keys, resolved in ((before, config_before), (now, config)):
        if sequences := resolved.get("gradient_accumulation_steps", 0) * resolved.get("batch_size", 0):
            keys["sequences per step"] = sequences
        keys["end of the learning rate schedule"] = resolved.get("lr_decay_iters") or resolved.get("max_iters", 0)
    return [f"{k} {v} -> {now[k]}" for k, v in before.items() if k not in silent and now.get(k, v) != v]
