"""The depth dial's rates move models of any width alike. `python tests/test_recipe.py` prints the table of BENCHMARKS.md."""

import sys

import torch
from conftest import TEXT

import train
from common.muon import make_optimizers
from model import GPT, GPTConfig

CLASSIC = dict(optimizer="adamw", learning_rate=1e-3)


def rms(x) -> float:
    return x.float().square().mean().sqrt().item()


def look(model, idx) -> dict[str, torch.Tensor]:
    """Activations by name: the residual stream behind each block, what the last block's matrices make of it, the logits."""
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
    """RMS of each activation after so many steps, and of how far the steps moved it, for the dial's model of this width."""
    keys = recipe or train.from_depth(vars(train) | {"depth": 4, "n_embd": width, "block_size": 64}, {"n_embd"})
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    model_keys = {k: v for k, v in keys.items() if k in GPTConfig.__dataclass_fields__}
    sizes = dict(block_size=64, vocab_size=len(letters), n_layer=4, n_head=width // 64, n_embd=width, bias=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**sizes, **model_keys}))
    rates = {k: keys[k] for k in ("embedding_lr", "head_lr", "vector_lr") if k in keys}
    optimizers = make_optimizers(model, keys["optimizer"], keys["learning_rate"], weight_decay=0.0, **rates)
    dice = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - 65, (steps + 1, 16), generator=dice)
    windows = ids[starts[..., None] + torch.arange(65)]
    before = look(model, windows[-1, :, :-1])
    for step in range(steps):
        model(windows[step, :, :-1], windows[step, :, 1:])[1].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    after = look(model, windows[-1, :, :-1])
    return {name: (rms(after[name]), rms(after[name] - before[name])) for name in after}


def test_activations_and_updates_are_of_one_size_across_widths():
    narrow, wide = (coordinates(width, TEXT[:8000]) for width in (64, 256))
    for name in narrow:
        for small, large in zip(narrow[name], wide[name]):
            assert 0.6 < large / small < 1.6, (name, narrow, wide)
    # The same look at GPT-2's parametrisation with one learning rate for all widths: there they grow.
    narrow, wide = (coordinates(width, TEXT[:8000], CLASSIC) for width in (64, 256))
    assert wide["block 3"][1] / narrow["block 3"][1] > 2


if __name__ == "__main__":
    words = open(sys.argv[1], encoding="utf-8").read()[:200_000] if len(sys.argv) > 1 else TEXT
    for title, recipe in (("the dial's", None), ("GPT-2's, AdamW at 1e-3", CLASSIC)):
        print(f"{title}: RMS after 10 steps / of the change")
        for width in (64, 128, 256, 512):
            found = coordinates(width, words, recipe)
            print(f"{width:>6}  " + "  ".join(f"{name} {a:.3f}/{b:.3f}" for name, (a, b) in found.items()), flush=True)
