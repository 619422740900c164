import itertools
import math

from common.checkpoint import load_weights
from common.cpu import BlockAttention, Dropout, fused_linear_cross_entropy
from common.pretrained import from_llama
from common.rope import rotary_table
from common.runtime import flops_per_token, peak_flops_of
from common.scoring import token_losses
from configurator import UserError
from model import ACTIVATIONS, GPT, GPTConfig, KVCache, RMSNorm, rotate, sample_next_token

import pytest
import torch
import torch.nn.functional as F

SIZES = dict(block_size=32, vocab_size=101, n_layer=2, n_head=4, n_embd=32)


def small(**switches) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SIZES, **switches})).eval()
    for p in model.parameters():  # larger than the initialisation, and without zeros, so that differences show
        torch.nn.init.normal_(p, std=0.15)
    return model


def collect(iterator) -> torch.Tensor:
    return torch.stack(list(iterator), dim=1)


# --- the network


def test_logits_equal_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=211)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ours = GPT(GPTConfig(block_size=48, vocab_size=211, n_layer=3, n_head=4, n_embd=64)).eval()
    load_weights(ours, theirs.state_dict())
    idx = torch.randint(211, (3, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_llama(kv_heads, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4, vocab_size=211,
        num_key_value_heads=kv_heads, max_position_embeddings=48, tie_word_embeddings=tied, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ours = GPT(
        GPTConfig(
            block_size=48, vocab_size=211, n_layer=3, n_head=4, n_embd=64, bias=False, norm="rmsnorm", mlp="swiglu",
            mlp_hidden=144, pos="rope", n_kv_head=kv_heads, tie_weights=tied,
        )
    ).eval()  # fmt: skip
    load_weights(ours, from_llama(theirs.state_dict(), vars(ours.config)))
    idx = torch.randint(211, (3, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


COMBINATIONS = [  # norm, mlp, pos, n_kv_head, qk_norm
    *itertools.product(
        ("layernorm", "rmsnorm"), ("gelu", "gelu_erf", "swiglu", "relu2"), ("learned", "rope", "none"), (0, 2, 1), (0, 1)
    )
]  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "manual"])
def test_cached_logits_equal_uncached_for_every_combination(attn):
    for norm, mlp, pos, kv, qk in COMBINATIONS:
        model = small(norm=norm, mlp=mlp, pos=pos, n_kv_head=kv, qk_norm=bool(qk), attn=attn)
        idx = torch.randint(101, (2, 20))
        with torch.no_grad():
            whole, _ = model(idx)
            cache = KVCache(model.config, 2, 20, "cpu", torch.float32)
            ranges = ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 20)))
            pieces = [model(idx[:, a:b], cache=cache)[0] for a, b in ranges]
        expected = whole[:, [6, 11, *range(12, 20)]]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)


def test_every_combination_trains_and_its_state_loads():
    for norm, mlp, pos, kv, qk in COMBINATIONS:
        more = dict(tie_weights=kv == 0, logit_softcap=5.0 * qk)
        model = small(norm=norm, mlp=mlp, pos=pos, n_kv_head=kv, qk_norm=bool(qk), **more).train()
        idx = torch.randint(101, (2, 16))
        logits, loss = model(idx, idx)
        assert logits.shape == (2, 16, 101)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        other = GPT(model.config)
        load_weights(other, model.state_dict())
        torch.testing.assert_close(other(idx)[0], logits)


def test_manual_attention_and_activation_checkpointing_give_the_same_gradients():
    torch.manual_seed(0)
    idx = torch.randint(101, (2, 32))
    outcomes = []
    for switches in (dict(), dict(attn="manual"), dict(activation_checkpointing=True)):
        model = small(n_kv_head=2, **switches).train()
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        outcomes.append((loss.detach(), [p.grad for p in model.parameters()]))
    for loss, grads in outcomes[1:]:
        torch.testing.assert_close(loss, outcomes[0][0])
        for a, b in zip(grads, outcomes[0][1]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rope_and_softcap_equal_their_formulas_in_float64():
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    cos, sin = rotary_table(GPTConfig(block_size=9, n_head=4, n_embd=32, pos="rope"))
    got = rotate(x.float(), cos, sin).double()
    for position in range(9):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            a, b = x[0, 0, position, i], x[0, 0, position, i + 4]
            assert math.isclose(got[0, 0, position, i], a * math.cos(angle) - b * math.sin(angle), abs_tol=1e-5)
            assert math.isclose(got[0, 0, position, i + 4], b * math.cos(angle) + a * math.sin(angle), abs_tol=1e-5)
    plain, capped = small(), small(logit_softcap=2.0)
    idx = torch.randint(101, (1, 8))
    torch.testing.assert_close(capped(idx)[0], 2 * torch.tanh(plain(idx)[0] / 2))


def test_swiglu_has_as_many_parameters_as_gelu():
    gelu, swiglu = (GPT(GPTConfig(n_layer=2, n_head=6, n_embd=384, vocab_size=64, mlp=m)) for m in ("gelu", "swiglu"))
    assert abs(gelu.num_params() / swiglu.num_params() - 1) < 0.01


def test_parameter_and_flop_counts_of_gpt2():
    with torch.device("meta"):
        with_bias, without = GPT(GPTConfig()), GPT(GPTConfig(bias=False))
    assert with_bias.num_params() == 124_439_808
    assert without.num_params() == 124_337_664
    assert round(flops_per_token(with_bias, 1024) / 1e5) == 8554
    assert round(flops_per_token(with_bias, 1024, "causal") / 1e5) == 7981
    assert peak_flops_of("NVIDIA H200") == 989e12 and peak_flops_of("Some GPU") is None


def test_initial_loss_is_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    for switches in (dict(), dict(init="zero_proj"), dict(norm="rmsnorm", mlp="swiglu", pos="rope")):
        model = GPT(GPTConfig(**{**SIZES, "n_layer": 6}, **switches))
        idx = torch.randint(101, (8, 32))
        _, loss = model(idx, torch.randint(101, (8, 32)))
        assert abs(loss.item() - math.log(101)) < 0.1


@pytest.mark.parametrize("init", ["gpt2", "zero_proj"])
def test_initial_weights_have_the_standard_deviations_of_the_table(init):
    torch.manual_seed(0)
    gpt2 = init == "gpt2"
    expected = {
        "wte": 0.02, "wpe": 0.02, "lm_head": 0.02 if gpt2 else 0.0, "attn.c_attn": 0.02 if gpt2 else 0.5 / 16,
        "mlp.c_fc": 0.02 if gpt2 else 0.5 / 16, "attn.c_proj": 0.02 / 4 if gpt2 else 0.0, "mlp.c_proj": 0.02 / 4 if gpt2 else 0.0,
    }  # fmt: skip
    sizes = dict(n_layer=8, n_head=4, n_embd=256, vocab_size=256, block_size=256)
    seen = set()
    for name, p in GPT(GPTConfig(**sizes, init=init, tie_weights=False)).named_parameters():
        kind = next((k for k in expected if name.endswith(f"{k}.weight")), "")
        if kind:
            assert p.std().item() == pytest.approx(expected[kind], rel=0.03), name
        else:  # norms and biases
            assert (p == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)).all(), name
        seen.add(kind)
    assert seen == {*expected, ""}


def test_targets_of_minus_one_are_ignored():
    model = small()
    idx, targets = torch.randint(101, (2, 8)), torch.randint(101, (2, 8))
    targets[0, 3:] = -1
    logits, loss = model(idx, targets)
    known = targets >= 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[known], targets[known]))


# --- sampling


def test_generate_equals_greedy_search_without_a_cache():
    model = small(pos="rope")
    idx = torch.randint(101, (2, 5))
    text = idx
    with torch.no_grad():
        for _ in range(20):
            text = torch.cat((text, model(text)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(collect(model.generate(idx, 20, temperature=0)), text[:, 5:])


@pytest.mark.parametrize("pos", ["learned", "rope", "none"])
def test_generate_continues_past_the_context(pos):
    model = small(pos=pos)
    out = collect(model.generate(torch.randint(101, (2, 30)), 100, temperature=1.0, top_k=50))
    assert out.shape == (2, 100) and out.max() < 101
    one = collect(small(pos=pos, block_size=1).generate(torch.tensor([[3]]), 5))
    assert one.shape == (1, 5)


def test_generation_keeps_the_global_rng_state_and_the_training_mode():
    model = small(dropout=0.3).train()
    state = torch.get_rng_state()
    rng = torch.Generator().manual_seed(5)
    first = collect(model.generate(torch.tensor([[1, 2]]), 10, rng=rng))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert torch.equal(first, collect(model.generate(torch.tensor([[1, 2]]), 10, rng=rng.manual_seed(5))))


def test_top_k_top_p_and_min_p_restrict_the_sampled_ids():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]])).repeat(4000, 1)
    rng = torch.Generator().manual_seed(0)

    def kept(**settings):
        options = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, rng=rng) | settings
        return set(sample_next_token(logits, **options).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.7) == {0, 1}
    assert kept(top_p=0.0) == {0}
    assert kept(min_p=0.2) == {0, 1, 2}
    assert kept(temperature=0) == {0}
    share = (sample_next_token(logits, 1.0, 0, 1.0, 0.0, rng) == 0).float().mean()
    assert abs(share - 0.5) < 0.03


def test_a_stopped_row_repeats_its_stop_token_and_generation_ends_when_all_stopped():
    model = small()
    idx = torch.randint(101, (4, 6))
    free = collect(model.generate(idx, 30, temperature=0))
    stop = free[0, 4].item()
    out = collect(model.generate(idx, 30, temperature=0, stop_tokens=(stop,)))
    for row, expected in zip(out, free):
        hits = (expected == stop).nonzero()
        end = hits[0].item() + 1 if len(hits) else 30
        assert torch.equal(row[: min(end, len(row))], expected[: min(end, len(row))])
        assert (row[end:] == stop).all()
    assert collect(model.generate(idx[:1], 30, temperature=0, stop_tokens=(stop,))).shape[1] <= 5


# --- errors


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        (dict(n_head=5), "n_embd=32 is not divisible by --n_head=5"),
        (dict(n_kv_head=3), "not divisible by --n_kv_head=3"),
        (dict(norm="batchnorm"), "layernorm, rmsnorm"),
        (dict(n_layer=0), "--n_layer=0"),
        (dict(dropout=1.0), "--dropout=1.0"),
        (dict(pos="rope", n_head=32), "even head size"),
    ],
)
def test_an_impossible_config_is_refused(switches, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        GPTConfig(**{**SIZES, **switches})


def test_generation_settings_out_of_range_are_refused():
    model = small()
    for settings in (dict(top_k=102), dict(top_k=-1), dict(temperature=-1.0), dict(top_p=1.1), dict(min_p=-0.1)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            next(model.generate(torch.tensor([[1]]), 3, **settings))
    with pytest.raises(ValueError, match="empty"):
        next(model.generate(torch.zeros(1, 0, dtype=torch.long), 3))
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match=r"transformer.h.0.attn.c_attn.weight \(96, 32\) for \(64, 32\)"):
        load_weights(small(n_kv_head=2, tie_weights=False), small(tie_weights=False).state_dict())
    with pytest.raises(UserError, match="missing"):
        load_weights(small(), {})


# --- losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_fused_loss_and_its_gradients_equal_the_plain_ones(dtype, smoothing, tied):
    torch.manual_seed(1)
    sizes = dict(vocab_size=9000, n_layer=1, n_head=2, n_embd=32, block_size=700)
    model = GPT(GPTConfig(**sizes, tie_weights=tied)).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    x, y = torch.randint(9000, (3, 700)), torch.randint(9000, (3, 700))
    y[0, 5:90] = -1
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits, loss = model(x, y, return_logits=return_logits, label_smoothing=smoothing)
        assert (logits is None) != return_logits
        (3 * loss).backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (plain, expected), (ours, gradients) = results
    assert ours == pytest.approx(plain, rel=1e-6 if dtype == torch.float32 else 1e-3)
    for n, g in expected.items():
        error = (gradients[n] - g).norm() / g.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), (n, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["relu2", "rms_norm", "rms_norm with a weight", "rotate"])
def test_kernels_of_cpu_training_equal_the_plain_formulas_in_float64(kernel, dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(3, 5, 4, 16).to(dtype).transpose(1, 2), torch.randn(3, 4, 5, 16).to(dtype)
    weight, angle = torch.randn(16).to(dtype), torch.randn(5, 8)
    cos, sin = angle.cos(), angle.sin()

    def run(x, weight):
        if kernel == "relu2":
            return ACTIVATIONS["relu2"](x)
        if kernel == "rotate":
            return rotate(x, cos.to(dtype).to(x.dtype), sin.to(dtype).to(x.dtype))
        norm = RMSNorm(16, 1e-5, elementwise_affine=kernel != "rms_norm")
        if norm.weight is not None:
            norm.weight = weight
        return norm(x)

    outcomes = []
    for precision in (dtype, torch.float64):
        a, w = (torch.nn.Parameter(each.to(precision)) for each in (x, weight))
        y = run(a, w)
        uses_kernel = type(y.grad_fn).__name__ in ("ReluSquaredBackward", "RMSNormBackward", "RotateBackward")
        assert uses_kernel == (precision == dtype)
        y.backward(grad.to(precision))
        outcomes.append([y.detach(), a.grad] + [w.grad] * (w.grad is not None))
    for ours, exact in zip(*outcomes):
        assert (ours - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 2e-2)
    with torch.no_grad():
        torch.testing.assert_close(run(x, torch.nn.Parameter(weight)), outcomes[0][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("heads, kv_heads, T", [(4, 4, 300), (4, 2, 256), (4, 1, 129), (2, 2, 7)])
def test_block_attention_equals_the_fused_kernel_and_is_used_to_train_in_bfloat16(heads, kv_heads, T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 16, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    grad = torch.randn(2, heads, T, 16, dtype=torch.float64)
    attention = small(n_head=heads, n_kv_head=kv_heads, block_size=T).train().transformer.h[0].attn

    def run(attend, dtype):
        leaves = [torch.nn.Parameter(x.to(dtype)) for x in (q, k, v)]
        y = attend(*leaves)
        y.backward(grad.to(dtype))
        return type(y.grad_fn).__name__, [y.detach(), *(x.grad for x in leaves)]

    kernel, exact = run(attention.attend, torch.float64)
    assert "BlockAttention" not in kernel
    for dtype, error in ((torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        kernel, ours = run(lambda q, k, v: BlockAttention.apply(q, k, v, 0.0), dtype)
        assert all((a - b).norm() / b.norm() < error for a, b in zip(ours, exact))
    assert run(attention.attend, torch.bfloat16)[0] == kernel == "BlockAttentionBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_scales_the_rest_and_repeats_with_the_seed(dtype):
    x = torch.nn.Parameter(1 + torch.rand(7, 3000, 11, dtype=dtype))
    dropout = Dropout(0.1)
    torch.manual_seed(0)
    y = dropout(x)
    kept = y != 0
    assert 0.098 < 1 - kept.double().mean() < 0.102
    assert kept.double().mean(0).min() < 0.6 and kept.double().mean((0, 1)).min() > 0.89  # no pattern
    torch.testing.assert_close(y[kept], x[kept] / 0.9)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / x.new_tensor(0.9))
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_block_attention_and_its_gradients(monkeypatch):
    def attend(q, k, v):
        torch.manual_seed(3)
        return BlockAttention.apply(q, k, v, 0.3)

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 300)
    v = torch.eye(300).expand(2, 300, 300)[None]  # so that the outputs are the weights
    with_dropout, without = attend(q, k, v), BlockAttention.apply(q, k, v, 0.0)
    dropped = with_dropout == 0
    rows, columns = torch.tril_indices(300, 300)
    assert 0.29 < dropped[:, :, rows, columns].double().mean() < 0.31
    torch.testing.assert_close(with_dropout[~dropped], without[~dropped] / 0.7)

    monkeypatch.setattr(BlockAttention, "ROWS", 4)
    q, k, v = (torch.randn(2, n, 6, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    torch.autograd.gradcheck(attend, (q, k, v))


def test_fused_loss_is_accurate_for_confident_predictions_in_bfloat16():
    V, C = 1024, 64
    torch.manual_seed(0)
    x, weight, y = torch.randn(32, C).bfloat16(), 0.02 * torch.randn(V, C), torch.randperm(V)[:32]
    weight[y] += 6 * x.float() / x.float().pow(2).mean(1, keepdim=True) / C * 2
    results = []
    for exact in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if exact:
            loss = F.cross_entropy((a @ w.bfloat16().t()).float(), y)
        else:
            loss = fused_linear_cross_entropy(a, w, y, V)
        loss.backward()
        results.append((loss.item(), w.grad))
    (expected, expected_grad), (ours, grad) = results
    assert 1e-3 < expected < 0.1  # where 1 - p rounds to 0 in bfloat16
    assert ours == pytest.approx(expected, rel=0.01)
    assert (grad - expected_grad).norm() / expected_grad.norm() < 0.02
    assert fused_linear_cross_entropy(-9 * x, weight, y, V).isfinite()  # the probabilities round to 0


@pytest.mark.parametrize("vocab", [5, 65, 3000])
def test_token_losses_equal_cross_entropy_and_accuracy_breaks_ties_as_argmax(vocab):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab, n_layer=1, n_head=1, n_embd=16, block_size=8))
    hidden = torch.randn(2000, 16).round()
    model.lm_head.weight.data.mul_(50).round_()  # whole numbers, so that many logits are equal
    targets = model.logits(hidden).topk(3)[1][torch.arange(2000), torch.randint(3, (2000,))]
    losses, correct = token_losses(model, hidden, targets, accuracy=True)
    logits = model.logits(hidden)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(correct, logits.argmax(-1) == targets)
    ties = ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).sum()
    assert 0 < correct.sum() < 2000 and ties > 20
