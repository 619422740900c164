import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common.muon import OPTIMIZERS, Muon, learning_rate_at, make_optimizers, orthogonalise
from model import GPT, GPTConfig


def model(**switches):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, **switches))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_every_parameter_once_and_learns(name):
    net = model()
    optimizers = make_optimizers(net, name, learning_rate=3e-3)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(net.parameters()))
    idx = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(30):
        _, loss = net(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_on_matrices_only(name):
    for optimizer in make_optimizers(model(), name):
        for group in optimizer.param_groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_takes_the_hidden_matrices_alone():
    net = model(tie_weights=False)
    muon, adamw = make_optimizers(net, "muon")
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {p: n for n, p in net.named_parameters()}
    taken = {names[p] for g in muon.param_groups for p in g["params"]}
    assert taken == {n for n, p in net.named_parameters() if ".h." in n and p.dim() == 2}


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape, dtype=torch.float64)
    X = orthogonalise(G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    sizes = (U.mT @ X @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    clear = S > 0.05 * S.norm(dim=-1, keepdim=True)  # the iteration lifts what is not tiny
    assert (sizes[clear] > 0.65).all() and (sizes[clear] < 1.25).all()
    off = U.mT @ X @ Vh.mT - torch.diag_embed(sizes)
    assert off.abs().max() < 1e-6
    torch.testing.assert_close(orthogonalise(G)[1], orthogonalise(G[1:2])[0])  # together or alone


def muon_by_hand(net, grads: list[dict], lr, weight_decay, momentum) -> dict[str, torch.Tensor]:
    """The weights after Muon's steps, one matrix at a time, as its page writes it."""
    C, weights, means = net.config.n_embd, {}, {}
    for name, p in net.named_parameters():
        if p.dim() == 2 and ".h." in name:
            weights[name] = p.detach().clone()
    for step in grads:
        for name, w in weights.items():
            mean = means[name] = means.get(name, torch.zeros_like(w)) * momentum + (1 - momentum) * step[name]
            look = (1 - momentum) * step[name] + momentum * mean
            for rows in range(0, len(w), C) if "c_attn" in name else (slice(None),):
                part = slice(rows, rows + C) if isinstance(rows, int) else rows
                update = orthogonalise(look[part][None])[0]
                scale = max(1, update.size(0) / update.size(1)) ** 0.5
                w[part] = w[part] * (1 - lr * weight_decay) - lr * scale * update
    return weights


def test_muon_steps_equal_the_formula_a_matrix_at_a_time():
    net = model()
    names = [n for n, p in net.named_parameters()]
    torch.manual_seed(1)
    grads = [{n: torch.randn_like(p) for n, p in net.named_parameters()} for _ in range(3)]
    expected = muon_by_hand(net, grads, 0.02, 0.1, 0.95)
    muon, _ = make_optimizers(net, "muon", learning_rate=0.02, weight_decay=0.1)
    for step in grads:
        for n, p in net.named_parameters():
            p.grad = step[n].clone()
        muon.step()
    for n in names:
        if n in expected:
            torch.testing.assert_close(net.get_parameter(n).detach(), expected[n], atol=1e-6, rtol=1e-5)


def test_a_held_muon_step_changes_nothing_even_with_gradients_that_are_not_numbers():
    net = model()
    muon, _ = make_optimizers(net, "muon", learning_rate=0.02)
    params = [p for g in muon.param_groups for p in g["params"]]
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    before = [(p.detach().clone(), muon.state[p]["momentum_buffer"].clone()) for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    for p, (weight, mean) in zip(params, before):
        assert torch.equal(p, weight) and torch.equal(muon.state[p]["momentum_buffer"], mean)
    muon.found_inf = torch.tensor(0.0)
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    assert not torch.equal(params[0], before[0][0])


RANKS = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from common.runtime import join_ranks
from model import GPT, GPTConfig
from common.muon import make_optimizers
join_ranks(torch.device("cpu"), "gloo", 60)
torch.manual_seed(0)
net = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32, mlp="swiglu", n_kv_head=1))
for dtype in (torch.float32, torch.bfloat16):
    muon = make_optimizers(net, "muon", learning_rate=0.02, dtype=dtype)[0]
    torch.manual_seed(1)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        muon.step()
    if dtype == torch.float32:
        torch.save(net.state_dict(), sys.argv[2] + f"/{dist.get_world_size()}_{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
threads = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
assert not [t for t in threads if "gloo" in t], threads  # one left over can abort the process at its end
"""


def test_ranks_share_muon_and_step_alike(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [*command, str(tmp_path / "ranks.py"), str(ROOT), str(tmp_path)],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-6, rtol=1e-5)


def test_sgd_held_in_its_first_step_begins_from_its_gradient_afterwards():
    net = model()
    (sgd,) = make_optimizers(net, "sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.0)
    assert not sgd.defaults["fused"]  # torch's fused one keeps a momentum that it never wrote


def test_parts_of_the_model_have_learning_rates_of_their_own():
    net = model(tie_weights=False)
    names = {p: n for n, p in net.named_parameters()}
    found = {}
    for o in make_optimizers(net, "muon", learning_rate=0.02, embedding_lr=0.3, head_lr=0.004, vector_lr=0.01):
        for g in o.param_groups:
            assert g["share"] == pytest.approx(g["lr"] / 0.02)
            found |= {names[p]: g["lr"] for p in g["params"]}
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == 0.3
    assert found["lm_head.weight"] == 0.004 and found["transformer.ln_f.weight"] == 0.01
    assert found["transformer.h.0.attn.c_attn.weight"] == 0.02
    tied = make_optimizers(model(), "adamw", learning_rate=1e-3)
    assert len(tied) == 1 and len(tied[0].param_groups) == 2  # as nanoGPT's checkpoints have them


def test_adamw_step_equals_the_formula_in_float64():
    net = model()
    name, p = next((n, p) for n, p in net.named_parameters() if p.dim() == 2)
    before = p.detach().double().clone()
    (optimizer,) = make_optimizers(net, "adamw", learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    p.grad = torch.randn_like(p)
    g = p.grad.double()
    optimizer.step()
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * g / (
        g.abs() + 1e-8
    )  # first step: m = g, v = g² after bias correction
    torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_schedules_reach_their_landmarks():
    def at(step, schedule):
        return learning_rate_at(step, schedule, 1.0, 0.1, warmup_iters=10, decay_iters=110, decay_fraction=0.2)

    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert at(0, schedule) == pytest.approx(1 / 11) and at(9, schedule) == pytest.approx(10 / 11)
        assert at(10, schedule) == pytest.approx(1.0)
        rates = [at(s, schedule) for s in range(10, 130)]
        assert all(a >= b for a, b in zip(rates, rates[1:]))
    assert at(60, "cosine") == pytest.approx(0.55) and at(35, "cosine") == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    )
    assert at(60, "linear") == pytest.approx(0.55)
    assert at(88, "wsd") == 1.0 and at(99, "wsd") == pytest.approx(0.55)
    assert at(200, "constant") == 1.0
    for schedule in ("cosine", "linear", "wsd"):
        assert at(110, schedule) == pytest.approx(0.1) and at(500, schedule) == pytest.approx(0.1)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--optimizer=adamax"):
        make_optimizers(model(), "adamax")
    with pytest.raises(ValueError, match="--schedule=step"):
        learning_rate_at(0, "step")
