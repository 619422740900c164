"""A run's weights on disk: saved whole or not at all, loaded without running code.

A checkpoint is a dict of tensors and JSON-able values: model, optimizers, scaler, step, tokens, best_val_loss,
model_args, config, tokenizer, wandb_id. nanoGPT's ckpt.pt loads as well.
"""

import os
import re
from pathlib import Path

import torch

from data import read_tokenizer
from model import GPT, GPT2_NAMES, GPTConfig, read_pretrained


def save_checkpoint(path: Path, payload: dict) -> None:
    """Write to a temporary name, sync, rename: at every instant the old file or the new one is whole."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(payload, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


def load_checkpoint(path: Path, map_location="cpu") -> dict:
    """Read a checkpoint of ours or of nanoGPT. Raises ValueError if it is damaged or holds anything but plain data."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: train first, or set --out_dir to a run's folder")
    try:
        payload = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise ValueError(
                f"{path} holds the Python class {code[1]}, and loading it could run code. If you trust the file, convert it "
                "where that class is: p = torch.load(path, weights_only=False); p['config'] = vars(p['config']); "
                "torch.save(p, path)"
            ) from None
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if not isinstance(payload, dict) or "model" not in payload:
        raise ValueError(f"{path} is not a checkpoint: it has no model and model_args")
    if "model_args" not in payload:  # build-nanogpt's, converted: GPT-2's tanh GELU and biases
        known = GPTConfig.__dataclass_fields__
        payload["model_args"] = {k: v for k, v in payload.get("config", {}).items() if k in known}
        if "n_layer" not in payload["model_args"]:
            raise ValueError(f"{path} is not a checkpoint: it has no model_args")
        payload["config"] = {}
    if "iter_num" in payload:  # nanoGPT's, whose GELU is the exact one and whose optimizer is one AdamW
        payload["step"] = payload["iter_num"]
        payload["model_args"] = {"mlp": "gelu_erf", **payload["model_args"]}
        if "optimizer" in payload:
            payload |= {"optimizers": [payload.pop("optimizer")], "scaler": {}}
    return payload


def newest_run(root: Path = Path()) -> Path:
    """The folder with the newest checkpoint among out*/ and out*/*/. Raises ValueError if there is none."""
    found = [
        p
        for pattern in ("out*/ckpt.pt", "out*/*/ckpt.pt", "out*/best.pt", "out*/*/best.pt")
        for p in root.glob(pattern)
    ]
    if not found:
        raise ValueError(
            "there is no trained model under out/: run python train.py config/quickstart.py, or set --out_dir"
        )
    return max(found, key=lambda p: p.stat().st_mtime).parent


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
