import math

import pytest
import torch

from model import GPT, GPTConfig
from optim import OPTIMIZERS, learning_rate_at, make_optimizers


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
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {p: n for n, p in net.named_parameters()}
    taken = {names[p] for g in muon.param_groups for p in g["params"]}
    assert taken == {n for n, p in net.named_parameters() if ".h." in n and p.dim() == 2}


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
