"""A run's weights on disk: saved whole or not at all, loaded without running code.

A checkpoint is a dict of tensors and JSON-able values: model, optimizers, scaler, step, tokens, best_val_loss,
model_args, config, tokenizer, wandb_id. nanoGPT's ckpt.pt loads as well.
"""

import math
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path

import torch

from common.pretrained import GPT2_NAMES, read_pretrained
from common.runtime import is_out_of_memory
from common.shards import load_dataset
from common.tokenizer import Tokenizer, read_tokenizer, tokenizer_from_dict
from configurator import first_line
from model import GPT, GPTConfig

PREVIOUS = "ckpt_previous.pt"  # the one before ckpt.pt, for when that is damaged


class Damaged(ValueError):
    """A checkpoint that is not whole or not what was written, as against one that cannot be read just now."""


def save_checkpoint(path: Path, payload: dict) -> None:
    """Write to a temporary name, sync, rename: at every instant the old file or the new one is whole.

    What ckpt.pt held stays as ckpt_previous.pt. Raises OSError, and leaves the old files, where the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(payload, f)
            f.flush()
            os.fsync(f.fileno())
        if path.name == "ckpt.pt" and path.exists():
            link(path, path.with_name(PREVIOUS))
        os.replace(part, path)
    except BaseException as e:
        part.unlink(missing_ok=True)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):  # torch's writer hides the reason
            raise e.__context__ from None
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renames themselves
        os.close(folder)


def link(path: Path, other: Path) -> None:
    """Let `other` be the same file, at no cost of disk; on a file system without links, a copy."""
    part = other.with_name(other.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        shutil.copyfile(path, part)
    os.replace(part, other)


def copy_to_host(value, into=None):
    """A copy of nested dicts and lists with every tensor on the CPU, in the memory of `into`, an earlier copy, if it fits."""
    if isinstance(value, dict):
        return {k: copy_to_host(v, into.get(k) if isinstance(into, dict) else None) for k, v in value.items()}
    if isinstance(value, list):
        into = into if isinstance(into, list) and len(into) == len(value) else [None] * len(value)
        return [copy_to_host(v, old) for v, old in zip(value, into)]
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(into, torch.Tensor) or into.shape != value.shape or into.dtype != value.dtype:
        into = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
    return into.copy_(value.detach(), non_blocking=value.is_cuda)


class Saver:
    """Writes checkpoints in a thread, one at a time, from a copy of their tensors, while training goes on.

    A write that fails is told, with what it needs; the files before it stay. `steps` says of which step each file is.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.steps: dict[str, int] = {}
        self.failed: dict[str, int] = {}  # of which step the last write of a file was, if it failed
        self.copies: dict[str, dict] = {}  # the memory of the last copy, by file name

    def save(self, path: Path, payload: dict, also: Path | None = None, keep: int = 0) -> None:
        """Write payload to path; with `also`, keep it under that name too, and of such step_N.pt the last `keep`."""
        self.wait()
        copy = self.copies[path.name] = copy_to_host(payload, self.copies.get(path.name))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self.write, args=(path, copy, also, keep))
        self.thread.start()

    def write(self, path: Path, payload: dict, also: Path | None, keep: int) -> None:
        try:
            save_checkpoint(path, payload)
            self.steps[path.name] = payload["step"]
            self.failed.pop(path.name, None)
            if also:
                link(path, also)
                for old in kept_steps(also.parent)[:-keep]:
                    old.unlink()
        except OSError as e:
            self.failed[path.name] = payload["step"]
            need = sum(t.numel() * t.element_size() for t in tensors(payload)) / 2**20
            free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else math.nan
            old = f"; {path} is still the one before" if path.exists() else ""
            print(
                f"warning: the checkpoint of step {payload['step']:,} is not saved ({e.strerror or e}): it needs "
                f"{need:,.1f} MiB, {free:,.1f} MiB are free in {path.parent}{old}; training goes on"
            )

    def wait(self) -> None:
        """Until the last write is done."""
        if self.thread:
            self.thread.join()
            self.thread = None


def kept_steps(folder: Path) -> list[Path]:
    """The step_N.pt of a folder, oldest first."""
    found = [p for p in folder.glob("step_*.pt") if p.stem[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def tensors(value):
    """Every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors(v)


def load_checkpoint(path: Path, map_location="cpu") -> dict:
    """Read a checkpoint of ours or of nanoGPT.

    Raises Damaged if it is not whole, ValueError if it cannot be read now or holds anything but plain data.
    """
    if not path.is_file():
        runs = ", ".join(map(str, find_runs()[:3]))
        raise ValueError(f"there is no checkpoint {path}: {f'there is {runs}' if runs else 'train first'}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise Damaged(f"{path} is damaged: the checksum of {wrong} in it is wrong")
        payload = torch.load(path, map_location=map_location, weights_only=True)
    except Damaged:
        raise
    except Exception as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise ValueError(
                f"{path} holds the Python object {code[1]}, and loading it could run code. If you trust the file, convert it "
                "where that object is known: p = torch.load(path, weights_only=False); p['config'] = vars(p['config']); "
                "torch.save(p, path)"
            ) from None
        if isinstance(e, OSError) or is_out_of_memory(e):
            raise ValueError(f"{path} cannot be read now: {first_line(e)}") from None
        raise Damaged(f"{path} is damaged: {first_line(e)}") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint: it has no model and model_args")
    if "model_args" not in payload:  # build-nanogpt's, converted: GPT-2's tanh GELU and biases
        known = GPTConfig.__dataclass_fields__
        payload["model_args"] = {k: v for k, v in payload.get("config", {}).items() if k in known}
        if "n_layer" not in payload["model_args"]:
            raise ValueError(f"{path} is not a checkpoint: it has no model_args")
        payload["config"] = {}
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if not all(isinstance(payload["model_args"].get(k), int) for k in sizes):
        raise ValueError(f"{path} is not a checkpoint: its model_args lack one of {', '.join(sizes)}")
    if "iter_num" in payload:  # nanoGPT's, whose GELU is the exact one and whose optimizer is one AdamW
        payload["step"] = payload["iter_num"]
        payload["model_args"] = {"mlp": "gelu_erf", **payload["model_args"]}
        if "optimizer" in payload:
            payload |= {"optimizers": [payload.pop("optimizer")], "scaler": {}}
    return payload


def load_latest(folder: Path) -> dict | None:
    """The newest checkpoint of a run that can be read, or None if there is no file of one.

    A damaged one is told and put aside as *.damaged, and the one before it is taken. Raises ValueError if all are, and for
    one that cannot be read now.
    """
    found = [p for p in (folder / "ckpt.pt", folder / PREVIOUS, *reversed(kept_steps(folder))) if p.exists()]
    for path in found:
        try:
            return load_checkpoint(path)
        except Damaged as e:
            print(f"warning: {e}")
        os.replace(path, path.with_name(path.name + ".damaged"))
    if damaged := sorted(folder.glob("*.pt.damaged")):
        names = ", ".join(p.name for p in damaged)
        raise ValueError(
            f"no checkpoint in {folder} can be read, there is only {names}: remove them to begin the run again"
        )
    return None


def find_runs(root: Path = Path()) -> list[Path]:
    """The folders with a checkpoint among out*/ and out*/*/, the one written last first."""
    found = [
        (p.stat().st_mtime, p.parent)
        for n in ("ckpt.pt", "best.pt")
        for d in ("*/", "")
        for p in root.glob(f"out*/{d}{n}")
    ]
    return list(dict.fromkeys(folder for _, folder in sorted(found, reverse=True)))


def newest_run(root: Path = Path()) -> Path:
    """The first of find_runs. Raises ValueError if there is none."""
    if not (found := find_runs(root)):
        raise ValueError(
            "there is no trained model under out/: run python train.py config/quickstart.py, or set --out_dir"
        )
    return found[0]


def find_checkpoint(init_from: str | Path = "") -> Path:
    """The checkpoint of a run's folder (best.pt, else ckpt.pt), a checkpoint file itself, or "" for the newest run."""
    path = Path(init_from) if init_from else newest_run()
    if path.is_dir():
        return path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")
    return path


def build_model(payload: dict) -> GPT:
    """The model of a checkpoint, on the CPU. Raises ValueError if its weights do not fit its arguments."""
    try:
        config = GPTConfig(**payload["model_args"])
    except TypeError as e:
        raise ValueError(f"the checkpoint's model_args are not ours: {e}") from None
    model = GPT(config)
    model.load_weights(payload["model"])
    return model


def is_pretrained(name: str) -> bool:
    """Whether --init_from names a Hugging Face model: gpt2*, a folder with its config and weights, or a hub id."""
    path = Path(name)
    if path.is_dir():
        return not any((path / n).exists() for n in ("best.pt", "ckpt.pt")) and any(path.glob("*.safetensors"))
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".pt" and not path.parent.exists()
    return name in GPT2_NAMES or bool(hub_id)


def load_payload(init_from: str | Path = "") -> dict:
    """The checkpoint of a run (see find_checkpoint), or a pretrained model (see is_pretrained) in the same form."""
    if not is_pretrained(str(init_from)):
        return load_checkpoint(find_checkpoint(init_from))
    arguments, weights, folder = read_pretrained(str(init_from))
    tokenizer = {"kind": "gpt2"} if arguments["vocab_size"] == 50257 else None
    if (folder / "tokenizer.json").exists():
        tokenizer = read_tokenizer(folder).to_dict()
    return {"model": weights, "model_args": arguments, "tokenizer": tokenizer, "config": {}, "step": 0}


def load_model(init_from: str | Path = "") -> tuple[GPT, dict]:
    """The model of a run or a pretrained one, in evaluation mode on the CPU, and its checkpoint. See load_payload."""
    payload = load_payload(init_from)
    return build_model(payload).eval(), payload


def find_tokenizer(payload: dict, data_dir: str = "data") -> Tokenizer:
    """The checkpoint's own tokenizer; for nanoGPT's, which has none, its dataset's, else GPT-2's.

    Raises ValueError where none of them can be right.
    """
    if payload.get("tokenizer"):
        return tokenizer_from_dict(payload["tokenizer"])
    name = payload.get("config", {}).get("dataset", "")
    if name and (Path(data_dir) / name / "meta.pkl").exists():
        return tokenizer_from_dict(load_dataset(name, data_dir).tokenizer)
    if payload["model_args"]["vocab_size"] < 50257:
        raise ValueError(f"the checkpoint has no tokenizer and there is no {data_dir}/{name}/meta.pkl: set --data_dir")
    return tokenizer_from_dict({"kind": "gpt2"})


def restore(optimizers: list, scaler, payload: dict, keys: dict, steps: int, micro_batches: int) -> None:
    """Put a checkpoint's state back; say which of train.py's keys are not what they were.

    Raises ValueError where a run cannot go on with them.
    """
    before = {"optimizer": "adamw", **payload.get("asked", payload["config"])}  # nanoGPT knows no other
    if "dataset" in payload["config"]:  # the one found, which where that asked for was missing is another
        before["dataset"] = payload["config"]["dataset"]
    fixed = GPTConfig.__dataclass_fields__.keys() - {"dropout", "attn", "activation_checkpointing"} | {"optimizer"}
    for key in sorted(fixed & before.keys() & keys.keys()):
        if before[key] != keys[key] and ("asked" in payload or key in ("optimizer", "block_size")):
            raise ValueError(
                f"--{key}={keys[key]}: the run to resume had {before[key]}; keep it, or begin a run with "
                f"--init_from={keys['out_dir']}"
            )
    untold = {"resume", "init_from", "out_dir", "max_iters", "lr_decay_iters", "eval_only", "batch_size", *fixed}
    untold |= {"gradient_accumulation_steps", "total_batch_tokens"}
    changed = [f"{k} {v} -> {keys[k]}" for k, v in before.items() if k not in untold and keys.get(k, v) != v]
    resolved, sequences = payload["config"], keys["batch_size"] * micro_batches
    if (past := resolved.get("gradient_accumulation_steps", 0) * resolved.get("batch_size", 0)) not in (0, sequences):
        changed.append(f"sequences a step {past} -> {sequences}")
    past, until = (resolved.get("lr_decay_iters") or resolved.get("max_iters", steps)), keys["lr_decay_iters"] or steps
    if keys["decay_lr"] and not keys["max_minutes"] and keys["schedule"] != "constant" and past != until:
        changed.append(f"end of the learning rate's schedule {past} -> {until}")
    if changed and int(os.environ.get("RANK", 0)) == 0:
        print(f"resumed with other keys than before: {', '.join(changed)}")
    for each, state in zip(optimizers, payload["optimizers"]):
        sizes = [[len(g["params"]) for g in groups] for groups in (each.param_groups, state["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "--embedding_lr, --head_lr and --vector_lr: a rate can change when a run goes on, but not begin or end; "
                f"keep them, or begin a run with --init_from={keys['out_dir']}"
            )
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in each.param_groups]
        parameters = [p for group in each.param_groups for p in group["params"]]
        for number, values in state["state"].items():  # nanoGPT's have no rows for ids that only pad the vocabulary
            for name, t in values.items():
                rows = len(parameters[number]) - len(t) if name in ("exp_avg", "exp_avg_sq") else 0
                values[name] = torch.nn.functional.pad(t, (0, 0, 0, rows)) if rows > 0 else t
        for theirs, ours in zip(state["param_groups"], fresh):  # it decides on which device the count of steps is
            theirs |= {k: ours[k] for k in ("fused", "capturable") if k in ours}
        each.load_state_dict(state)
        for group, settings in zip(each.param_groups, fresh):  # the keys of this run, not the checkpoint's
            group.update(settings)
    if scaler.is_enabled() and payload["scaler"]:
        scaler.load_state_dict(payload["scaler"])
