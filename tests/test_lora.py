"""LoRA: the additions start as zero, are all that is trained, and merge into plain weights."""

import json

from conftest import SMALL

from common.checkpoint import load_checkpoint, load_model
from common.lora import add_lora, merge_lora
from model import GPT, GPTConfig
from train import make_optimizers

import pytest
import torch
import transformers

LLAMA = "--norm=rmsnorm --mlp=swiglu --pos=rope --n_kv_head=1".split()
TUNE = [
    *SMALL,
    "--dataset=chars",
    "--init_from=base/ckpt.pt",
    "--lora_rank=3",
    "--lora_alpha=6",
    "--learning_rate=1e-2",
]


@pytest.mark.parametrize("options", [{}, dict(mlp="swiglu", pos="rope", n_kv_head=1, bias=False)])
def test_lora_starts_as_the_base_model_and_merging_keeps_the_output(options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=100, n_layer=2, n_head=2, n_embd=32, block_size=16) | options)).eval()
    x = torch.randint(100, (2, 16))
    base, shapes = model(x)[0], {n: p.shape for n, p in model.named_parameters()}
    add_lora(model, 3, 6.0)
    assert torch.equal(model(x)[0], base)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 and all(".h." in n and "lora_" in n for n in trained)
    in_optimizer = [id(p) for group in make_optimizers(model)[0].param_groups for p in group["params"]]
    assert sorted(in_optimizer) == sorted(map(id, trained.values()))
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.2)
    changed = model(x)[0]
    assert not torch.allclose(changed, base, atol=1e-2)
    merge_lora(model)
    assert torch.allclose(model(x)[0], changed, atol=1e-4)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(p.requires_grad for p in model.parameters())


def test_muon_trains_the_additions_only_and_resumes(run, chars):
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=base", *LLAMA)
    tune = [*TUNE, "--optimizer=muon", "--max_iters=20", "--lr_decay_iters=20"]
    run("train.py", *tune, "--out_dir=tuned")
    run("train.py", *tune, "--out_dir=parts", "--max_iters=7")
    run("train.py", *tune, "--out_dir=parts", "--resume")
    base, tuned, parts = (load_checkpoint(chars / d / "ckpt.pt")["model"] for d in ("base", "tuned", "parts"))
    assert all(torch.equal(base[n], tuned[n]) for n in base) and len(tuned) == len(base) + 16
    assert all(torch.equal(parts[n], tuned[n]) and tuned[n].any() for n in tuned)


def test_a_lora_run_trains_the_additions_only_resumes_samples_and_exports(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=base", *LLAMA)
    tune = [*TUNE, "--optimizer=adamw", "--max_iters=20", "--eval_interval=10"]
    printed = run("train.py", *tune, "--out_dir=tuned")
    assert "LoRA: trains 2,928 of the parameters" in printed
    base, tuned = (load_checkpoint(chars / d / "ckpt.pt") for d in ("base", "tuned"))
    own = {n for n in tuned["model"] if "lora_" in n}
    assert len(own) == 16 and set(base["model"]) == set(tuned["model"]) - own
    assert all(torch.equal(base["model"][n], tuned["model"][n]) for n in base["model"])
    assert all(tuned["model"][n].any() for n in own)
    lines = [json.loads(line) for line in open(chars / "tuned" / "metrics.jsonl")]
    val = [m["val_loss"] for m in lines if "val_loss" in m]
    before = [json.loads(line) for line in open(chars / "base" / "metrics.jsonl")]
    assert val[0] == pytest.approx([m["val_loss"] for m in before if "val_loss" in m][-1], abs=1e-5)
    assert val[-1] < val[0] - 0.02
    run("train.py", *tune, "--out_dir=parts", "--max_iters=7", "--lr_decay_iters=20")
    run("train.py", *tune, "--out_dir=parts", "--resume", "--lr_decay_iters=20")
    parts = load_checkpoint(chars / "parts" / "ckpt.pt")["model"]
    assert all(torch.equal(parts[n], tuned["model"][n]) for n in parts)
    again = [*tune, "--out_dir=parts", "--resume", "--max_iters=21"]
    assert "--lora_alpha=3.0: the run to resume had" in refused("train.py", *again, "--lora_alpha=3")
    assert "n_layer" not in run("train.py", *again, "--n_layer=3").partition("resumed with")[2].partition("\n")[0]
    run("export.py", "--init_from=tuned/ckpt.pt", "--output_dir=merged")
    ours, _ = load_model(chars / "tuned" / "ckpt.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chars / "merged").eval()
    x = torch.randint(40, (1, 32))
    with torch.no_grad():
        assert torch.allclose(ours(x)[0], theirs(x).logits, atol=1e-4)
    # A tuned run can be fine-tuned in turn, here all its weights.
    again = run("train.py", *TUNE, "--init_from=tuned/ckpt.pt", "--lora_rank=0", "--out_dir=whole", "--max_iters=2")
    assert "LoRA" not in again
    assert not any("lora_" in n for n in load_checkpoint(chars / "whole" / "ckpt.pt")["model"])
    assert run("sample.py", "--init_from=tuned/ckpt.pt", "--max_new_tokens=20", "--temperature=0")


def test_lora_without_a_base_model_is_refused(refused, chars):
    assert "--lora_rank=4 is for fine-tuning" in refused("train.py", *SMALL, "--dataset=chars", "--lora_rank=4")
    for wrong in ("--lora_rank=-1: must be at least 0", "--lora_alpha=0.0: must be above 0"):
        assert wrong in refused("train.py", *TUNE, wrong.split(":")[0])
