"""The learning rates of --depth suit models of any width. `python tests/test_recipe.py` prints the table of BENCHMARKS.md."""

import sys
from unittest import mock

from conftest import TEXT

import train
from common.setup import from_depth
from model import GPT, GPTConfig

import torch

CLASSIC = dict(optimizer="adamw", learning_rate=1e-3)


def depth_keys(**given) -> dict:
    """What --depth derives, with these keys given."""
    return {k: v for _, keys in from_depth(vars(train) | given, set(given)) for k, v in keys.items()}


def rms(x) -> float:
    return x.float().square().mean().sqrt().item()


def activations(model, idx) -> dict[str, torch.Tensor]:
    """Name -> activation: the residual stream after each block, the outputs of the last block's matrices, the logits."""
    found, hooks = {}, []
    watched = {f"block {n}": block for n, block in enumerate(model.transformer.h)}
    watched |= {"c_attn": model.transformer.h[-1].attn.c_attn, "c_fc": model.transformer.h[-1].mlp.c_fc}
    for name, module in watched.items():
        hooks.append(module.register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, out.detach())))
    with torch.no_grad():
        found["logits"] = model(idx)[0]
    for hook in hooks:
        hook.remove()
    return found


def coordinates(width: int, text: str, recipe: dict | None = None, steps: int = 10) -> dict[str, tuple[float, float]]:
    """RMS of each activation after `steps` steps, and of its change by them, for --depth's model of this width."""
    keys = recipe or depth_keys(depth=4, n_embd=width, block_size=64)
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    model_keys = {k: v for k, v in keys.items() if k in GPTConfig.__dataclass_fields__}
    sizes = dict(block_size=64, vocab_size=len(letters), n_layer=4, n_head=width // 64, n_embd=width, bias=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**sizes, **model_keys}))
    rates = {k: keys.get(k, 0.0) for k in ("embedding_lr", "head_lr", "vector_lr")}
    own = {"optimizer": keys["optimizer"], "learning_rate": keys["learning_rate"], "weight_decay": 0.0} | rates
    with mock.patch.multiple(train, **own):
        optimizers = train.make_optimizers(model)
    rng = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - 65, (steps + 1, 16), generator=rng)
    windows = ids[starts[..., None] + torch.arange(65)]
    before = activations(model, windows[-1, :, :-1])
    for step in range(steps):
        model(windows[step, :, :-1], windows[step, :, 1:])[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = activations(model, windows[-1, :, :-1])
    return {name: (rms(after[name]), rms(after[name] - before[name])) for name in after}


def test_activations_and_their_changes_have_one_size_across_widths():
    narrow, wide = (coordinates(width, TEXT[:8000]) for width in (64, 256))
    for name in narrow:
        for small, large in zip(narrow[name], wide[name]):
            assert 0.6 < large / small < 1.6, (name, narrow, wide)
    # With GPT-2's parametrisation and one learning rate for all widths they grow.
    narrow, wide = (coordinates(width, TEXT[:8000], CLASSIC) for width in (64, 256))
    assert wide["block 3"][1] / narrow["block 3"][1] > 2


if __name__ == "__main__":
    words = open(sys.argv[1], encoding="utf-8").read()[:200_000] if len(sys.argv) > 1 else TEXT
    for title, recipe in (("--depth", None), ("GPT-2's, AdamW at 1e-3", CLASSIC)):
        print(f"{title}: RMS after 10 steps / RMS of the change")
        for width in (64, 128, 256, 512):
            found = coordinates(width, words, recipe)
            print(f"{width:>6}  " + "  ".join(f"{name} {a:.3f}/{b:.3f}" for name, (a, b) in found.items()), flush=True)
