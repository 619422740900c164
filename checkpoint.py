"""A run's weights on disk: saved whole or not at all, loaded without running code.

A checkpoint is a dict of tensors and JSON-able values: model, optimizers, scaler, step, tokens, best_val_loss,
model_args, config, tokenizer, wandb_id. nanoGPT's ckpt.pt loads as well.
"""

import os
from pathlib import Path

import torch

from model import GPT, GPTConfig


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
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if not isinstance(payload, dict) or "model" not in payload or "model_args" not in payload:
        raise ValueError(f"{path} is not a checkpoint: it has no model and model_args")
    if "iter_num" in payload:  # nanoGPT's, whose GELU is the exact one
        payload["step"] = payload["iter_num"]
        payload["model_args"] = {"mlp": "gelu_erf", **payload["model_args"]}
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


def load_model(init_from: str | Path = "") -> tuple[GPT, dict]:
    """The model of a run, in evaluation mode on the CPU, and its checkpoint. See find_checkpoint for init_from."""
    payload = load_checkpoint(find_checkpoint(init_from))
    return build_model(payload).eval(), payload
