import math

from conftest import ROOT, two_ranks

import train
from common.muon import Muon, orthogonalise
from common.setup import check_keys
from configurator import UserError
from model import GPT, GPTConfig
from train import OPTIMIZERS, get_lr, make_optimizers

import pytest
import torch


def new_model(**switches):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, **switches))


@pytest.fixture
def set_keys(monkeypatch):
    """set_keys(key=value, ...): sets keys of train.py for one test."""

    def setter(**keys):
        for key, value in keys.items():
            monkeypatch.setattr(train, key, value)

    return setter


# --- groups


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_every_parameter_once_and_learns(set_keys, name):
    set_keys(optimizer=name, learning_rate=3e-3)
    model = new_model()
    optimizers = make_optimizers(model)
    params = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    idx = torch.arange(16).repeat(4, 1)
    losses = []
    for _ in range(30):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_on_matrices_and_not_on_embeddings_beside_muon(set_keys, name):
    set_keys(optimizer=name)
    model = new_model()
    embeddings = {id(p) for n, p in model.named_parameters() if n.startswith(("transformer.w", "lm_head"))}
    for optimizer in make_optimizers(model):
        for group in optimizer.param_groups:
            for p in group["params"]:
                decays = p.dim() >= 2 and not (name == "muon" and id(p) in embeddings)
                assert decays == (group["weight_decay"] > 0)


def test_muon_gets_the_hidden_matrices_only(set_keys):
    set_keys(optimizer="muon")
    model = new_model(tie_weights=False)
    muon, adamw = make_optimizers(model)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {p: n for n, p in model.named_parameters()}
    in_muon = {names[p] for g in muon.param_groups for p in g["params"]}
    assert in_muon == {n for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}


def test_embedding_head_and_vectors_have_learning_rates_of_their_own(set_keys):
    model = new_model(tie_weights=False)
    names, rates = {p: n for n, p in model.named_parameters()}, {}
    set_keys(optimizer="muon", learning_rate=0.02, embedding_lr=0.3, head_lr=0.004, vector_lr=0.01)
    for o in make_optimizers(model):
        for g in o.param_groups:
            assert g["lr_scale"] == pytest.approx(g["lr"] / 0.02)
            rates |= {names[p]: g["lr"] for p in g["params"]}
    assert rates["transformer.wte.weight"] == rates["transformer.wpe.weight"] == 0.3
    assert rates["lm_head.weight"] == 0.004 and rates["transformer.ln_f.weight"] == 0.01
    assert rates["transformer.h.0.attn.c_attn.weight"] == 0.02
    set_keys(vector_lr=0.0)
    tied = new_model()
    (_, adamw), embedding = make_optimizers(tied), tied.transformer.wte.weight
    (group,) = [g for g in adamw.param_groups if any(p is embedding for p in g["params"])]
    assert tied.lm_head.weight is embedding and group["lr"] == 0.3  # a tied head goes with the embedding


def test_without_rates_of_their_own_there_are_the_two_groups_of_nanogpts_checkpoints():
    model = new_model()
    (adamw,) = make_optimizers(model)
    matrices, vectors = ([id(p) for p in g["params"]] for g in adamw.param_groups)
    assert matrices == [id(p) for p in model.parameters() if p.dim() >= 2]
    assert vectors == [id(p) for p in model.parameters() if p.dim() < 2]


# --- Muon


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_orthogonalise_keeps_singular_vectors_and_sets_singular_values_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape, dtype=torch.float64)
    X = orthogonalise(G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    sizes = (U.mT @ X @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    clear = S > 0.05 * S.norm(dim=-1, keepdim=True)  # the iteration does not lift the smallest
    assert (sizes[clear] > 0.65).all() and (sizes[clear] < 1.25).all()
    off = U.mT @ X @ Vh.mT - torch.diag_embed(sizes)
    assert off.abs().max() < 1e-6
    torch.testing.assert_close(orthogonalise(G)[1], orthogonalise(G[1:2])[0])  # in a batch or alone


def muon_reference(model, grads: list[dict], lr, weight_decay, momentum) -> dict[str, torch.Tensor]:
    """The weights after Muon's steps, one matrix at a time, as on its page."""
    C, weights, buffers = model.config.n_embd, {}, {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and ".h." in name:
            weights[name] = p.detach().clone()
    for step in grads:
        for name, w in weights.items():
            buffer = buffers[name] = buffers.get(name, torch.zeros_like(w)) * momentum + (1 - momentum) * step[name]
            nesterov = (1 - momentum) * step[name] + momentum * buffer
            height = C if "c_attn" in name else len(w)  # q, k and v are matrices of their own
            for part in (slice(row, row + height) for row in range(0, len(w), height)):
                update = orthogonalise(nesterov[part][None])[0]
                scale = max(1, update.size(0) / update.size(1)) ** 0.5
                w[part] = w[part] * (1 - lr * weight_decay) - lr * scale * update
    return weights


def test_muon_steps_equal_the_formula_for_each_matrix(set_keys):
    set_keys(optimizer="muon", learning_rate=0.02, weight_decay=0.1)
    model = new_model()
    torch.manual_seed(1)
    grads = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(3)]
    expected = muon_reference(model, grads, 0.02, 0.1, 0.95)
    muon, _ = make_optimizers(model)
    for step in grads:
        for n, p in model.named_parameters():
            p.grad = step[n].clone()
        muon.step()
    assert len(expected) == 8
    for n, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(n).detach(), weight, atol=1e-6, rtol=1e-5)


def test_a_skipped_muon_step_changes_nothing_even_with_nan_gradients(set_keys):
    set_keys(optimizer="muon", learning_rate=0.02)
    muon, _ = make_optimizers(new_model())
    params = [p for g in muon.param_groups for p in g["params"]]
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    before = [(p.detach().clone(), muon.state[p]["momentum_buffer"].clone()) for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    for p, (weight, buffer) in zip(params, before):
        assert torch.equal(p, weight) and torch.equal(muon.state[p]["momentum_buffer"], buffer)
    muon.found_inf = torch.tensor(0.0)
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    assert not torch.equal(params[0], before[0][0])


RANKS = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import train
from common.runtime import init_distributed
from model import GPT, GPTConfig
train.optimizer, train.learning_rate = "muon", 0.02
init_distributed(torch.device("cpu"), "gloo", 60)
torch.manual_seed(0)
model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32, mlp="swiglu", n_kv_head=1))
for dtype in (torch.float32, torch.bfloat16):
    muon = train.make_optimizers(model, dtype)[0]
    torch.manual_seed(1)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        muon.step()
    if dtype == torch.float32:
        torch.save(model.state_dict(), sys.argv[2] + f"/{dist.get_world_size()}_{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
threads = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
assert not [t for t in threads if "gloo" in t], threads  # such a thread can abort the process at its end
"""


def test_ranks_share_muons_work_and_make_the_same_step(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    for world in (1, 2):
        options = dict(cwds=[tmp_path] * world, ranks=range(world), world=world, script=tmp_path / "ranks.py")
        for done in two_ranks(ROOT, tmp_path, **options):
            assert done.returncode == 0, done.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-6, rtol=1e-5)


# --- the others


def test_sgd_is_not_fused(set_keys):
    set_keys(optimizer="sgd", momentum=0.9)
    (sgd,) = make_optimizers(new_model())
    assert not sgd.defaults["fused"]  # torch's fused SGD uses an uninitialised buffer after a skipped first step


def test_adamw_step_equals_the_formula_in_float64(set_keys):
    set_keys(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    model = new_model()
    p = next(p for p in model.parameters() if p.dim() == 2)
    before = p.detach().double().clone()
    (optimizer,) = make_optimizers(model)
    p.grad = torch.randn_like(p)
    g = p.grad.double()
    optimizer.step()
    # After the bias correction of the first step m = g and v = g².
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=1e-5)


# --- the learning rate and the momentum


def test_the_momentum_rises_from_085(set_keys):
    set_keys(momentum=0.95, momentum_warmup=0)
    assert train.get_momentum(0) == 0.95
    set_keys(momentum_warmup=10)
    assert [train.get_momentum(step) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    set_keys(momentum=0.6)
    assert train.get_momentum(0) == 0.6  # never above --momentum


SCHEDULE = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, decay_fraction=0.2, max_minutes=0.0, decay_lr=True)


def test_schedules_reach_their_landmarks(set_keys):
    def at(step, schedule):
        set_keys(**SCHEDULE, lr_decay_iters=110, schedule=schedule)
        return get_lr(step)

    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert at(0, schedule) == pytest.approx(1 / 11) and at(9, schedule) == pytest.approx(10 / 11)
        assert at(10, schedule) == pytest.approx(1.0)
        rates = [at(s, schedule) for s in range(10, 130)]
        assert all(a >= b for a, b in zip(rates, rates[1:]))
    assert at(60, "cosine") == pytest.approx(0.55)
    assert at(35, "cosine") == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert at(60, "linear") == pytest.approx(0.55)
    assert at(88, "wsd") == 1.0 and at(99, "wsd") == pytest.approx(0.55)
    assert at(200, "constant") == 1.0
    for schedule in ("cosine", "linear", "wsd"):
        assert at(110, schedule) == pytest.approx(0.1) and at(500, schedule) == pytest.approx(0.1)


def test_the_schedule_follows_steps_or_the_clock_whichever_is_ahead(set_keys):
    set_keys(**SCHEDULE | dict(warmup_iters=100, max_minutes=20.0), schedule="linear", lr_decay_iters=0, max_iters=0)
    assert get_lr(0, 1.0) == pytest.approx(0.5)  # warmup takes a tenth of the time at most
    assert get_lr(99, 0.1) == pytest.approx(100 / 101)  # or its steps, if they are faster
    assert get_lr(0, 2.0) == get_lr(100, 2.0) == pytest.approx(0.1 + 0.9 * 0.9)
    assert get_lr(5000, 11.0) == pytest.approx(0.1 + 0.9 * 0.45) and get_lr(5000, 30.0) == pytest.approx(0.1)
    set_keys(max_iters=1000, warmup_iters=0)
    assert get_lr(500, 5.0) == get_lr(250, 10.0) == pytest.approx(0.55)
    set_keys(decay_lr=False)
    assert get_lr(0, 0.0) == get_lr(999, 20.0) == 1.0


def test_unknown_names_are_refused(set_keys):
    for key, value in (("optimizer", "adamax"), ("schedule", "step")):
        set_keys(optimizer="adamw", schedule="cosine")
        set_keys(**{key: value})
        with pytest.raises(UserError, match=f"--{key}={value}: choose one of"):
            check_keys(vars(train), train.OPTIMIZERS, train.SCHEDULES)


def test_a_learning_rate_below_min_lr_never_rises(monkeypatch):
    for key, value in dict(learning_rate=1e-5, min_lr=6e-5, warmup_iters=2, max_iters=20, lr_decay_iters=0).items():
        monkeypatch.setattr(train, key, value)
    for schedule in train.SCHEDULES:
        monkeypatch.setattr(train, "schedule", schedule)
        assert max(train.get_lr(step) for step in range(30)) == pytest.approx(1e-5)
    monkeypatch.setattr(train, "schedule", "wsd")
    monkeypatch.setattr(train, "decay_fraction", 0.0)
    assert {train.get_lr(step) for step in range(2, 20)} == {1e-5}
