"""Models prepared for decoding, the decoding step of static shapes, sampling and beam search, against the plain model."""

import copy
import itertools
import math

from common.chat import chat_prompt
from common.cpu import (
    Int8Linear,
    PackedInt8Linear,
    PackedLinear,
    int8_products_are_available,
    packed_linear_is_available,
)
from common.inference import (
    DecodeStep,
    beam_search,
    complete,
    for_inference,
    one_ahead,
    stream_ids,
)  # fmt: skip
from common.lora import add_lora
from common.pretrained import GPT2_CONV1D
from common.runtime import pick_dtype
from common.tokenizer import EOT, CharTokenizer
from configurator import UserError
from model import GPT, GPTConfig, KVCache, sample_next_token

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")


def new_model(**switches) -> GPT:
    torch.manual_seed(3)
    sizes = dict(vocab_size=203, n_layer=2, n_head=4, n_embd=64, block_size=48)
    model = GPT(GPTConfig(**{**sizes, **switches})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


def collect(iterator) -> torch.Tensor:
    return torch.stack(list(iterator), dim=1)


@pytest.mark.parametrize(
    "switches", [{}, dict(bias=False, mlp="swiglu", norm="rmsnorm", pos="rope", tie_weights=False)]
)
def test_packed_weights_give_the_same_logits_and_text(switches):
    plain = new_model(**switches)
    packed = for_inference(copy.deepcopy(plain), CPU, torch.float32)
    if packed_linear_is_available(CPU, torch.float32):
        assert isinstance(packed.lm_head, PackedLinear) and isinstance(packed.transformer.h[1].mlp.c_fc, PackedLinear)
    idx = torch.randint(203, (3, 20))
    torch.testing.assert_close(packed(idx)[0], plain(idx)[0], atol=1e-4, rtol=0)
    assert torch.equal(
        collect(packed.generate(idx, 60, temperature=0)), collect(plain.generate(idx, 60, temperature=0))
    )


def test_bfloat16_weights_are_as_accurate_as_autocast():
    plain, idx = new_model(), torch.randint(203, (3, 20))
    expected = plain(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        noise = (plain(idx)[0].float() - expected).norm() / expected.norm()
    packed = for_inference(copy.deepcopy(plain), CPU, torch.bfloat16)
    assert (packed(idx)[0].float() - expected).norm() / expected.norm() < 3 * noise


@pytest.mark.parametrize("width", [64, 680, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_weights_are_rounded_to_the_nearest_step(dtype, width, bias):
    layer = torch.nn.Linear(width, 96, bias=bias).requires_grad_(False)
    layer.weight.data[5] = 0
    plain = Int8Linear(layer)
    rounded = plain.weight.float() * plain.scale[:, None]
    assert ((rounded - layer.weight).abs() <= plain.scale[:, None] * 0.501).all()
    plain, tolerance = copy.deepcopy(plain).to(dtype), 1e-4 if dtype == torch.float32 else 1e-2
    for rows in (1, 3, 40):
        x = torch.randn(rows, width).to(dtype)
        x[0] *= 50  # a large row takes nothing from the accuracy of the others
        expected = F.linear(x.float(), rounded, layer.bias)
        assert error_of_rows(plain(x[None])[0], expected) < tolerance
        if int8_products_are_available(CPU):
            packed = PackedInt8Linear(layer)
            got = packed(x[None])[0]
            assert got.dtype == dtype and error_of_rows(got, expected) < tolerance
            zeros = packed(torch.zeros(2, width, dtype=dtype)).float()
            torch.testing.assert_close(
                zeros, F.linear(torch.zeros(2, width), rounded, layer.bias), atol=1e-3, rtol=1e-2
            )
            assert packed(torch.full((1, width), math.nan)).isnan().all()


def error_of_rows(got, expected) -> float:
    """The largest relative error of a row."""
    return ((got.float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def test_an_int8_model_predicts_almost_the_same():
    plain, idx = new_model(), torch.randint(203, (8, 40))
    expected = plain(idx)[0].log_softmax(-1)
    got = for_inference(copy.deepcopy(plain), CPU, torch.float32, "int8")(idx)[0].log_softmax(-1)
    assert 0 < (expected.exp() * (expected - got)).sum(-1).mean() < 0.01  # KL in nats
    with pytest.raises(UserError, match="--quantize=int4: choose one of nothing, int8"):
        for_inference(plain, CPU, torch.float32, "int4")


def test_lora_is_merged_before_decoding():
    tuned = new_model()
    add_lora(tuned, 4, 8.0)
    for n, p in tuned.named_parameters():
        if "lora_b" in n:
            torch.nn.init.normal_(p, std=0.1)
    idx = torch.randint(203, (2, 9))
    expected = tuned(idx)[0]
    torch.testing.assert_close(for_inference(tuned, CPU, torch.float32)(idx)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pos, kv, attn", [*itertools.product(("learned", "rope", "none"), (4, 2), ("sdpa", "manual"))])
def test_decoding_with_static_shapes_gives_the_same_text(pos, kv, attn):
    model = new_model(pos=pos, n_kv_head=kv, attn=attn, block_size=300)
    idx, steps = torch.randint(203, (2, 240)), []

    def make_step(*parts):
        steps.append(DecodeStep(*parts))
        return steps[0]

    ids = collect(model.generate(idx, 100, temperature=0, make_step=make_step))
    assert set(steps[0].graphs) == {256, 300}  # two lengths, and the first again after the context was full
    assert torch.equal(ids, collect(model.generate(idx, 100, temperature=0)))


def test_a_long_prompt_is_read_in_pieces_and_identical_rows_once(monkeypatch):
    model = new_model(block_size=200)
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda idx, **options: seen.append(tuple(idx.shape)) or forward(idx, **options)
    )
    idx = torch.randint(203, (2, 150))
    same = idx[:1].expand(300, -1)
    for rows, shapes in (
        (idx, [(2, 150)]),
        (same, [(1, 150)]),
        (torch.cat((same, idx)), [(302, 64), (302, 64), (302, 22)]),
    ):
        cache = KVCache(model.config, len(rows), 160, CPU, torch.float32)
        seen.clear()
        logits = model.prefill(rows, cache)
        assert seen == shapes and cache.kv_len == 150
        for row in (0, -1):
            torch.testing.assert_close(logits[row], forward(rows[row][None])[0][0, -1:], atol=1e-4, rtol=0)
            after, _ = forward(torch.tensor([[7]] * len(rows)), cache=cache)
            whole = torch.cat((rows[row], torch.tensor([7])))[None]
            torch.testing.assert_close(after[row], forward(whole)[0][0, -1:], atol=1e-4, rtol=0)
            cache.kv_len = 150


def test_one_ahead_returns_every_item_after_starting_the_next():
    started = []

    def numbers(n):
        for i in range(n):
            started.append(i)
            yield i

    for i in one_ahead(numbers(4)):
        assert max(started) == min(i + 1, 3)
    assert list(one_ahead(numbers(0))) == [] and list(one_ahead(numbers(1))) == [0]


def test_sampled_frequencies_match_the_probabilities():
    logits, rng = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    for options, expected in (
        (dict(top_k=0, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2, top_p=1.0), [0.625, 0.375, 0, 0]),
        (dict(top_k=0, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ):
        ids = sample_next_token(logits.expand(40000, -1), 1.0, options["top_k"], options["top_p"], 0.0, rng)
        frequency = torch.bincount(ids, minlength=4) / 40000
        assert (frequency - torch.tensor(expected)).abs().max() < 0.012, (options, frequency)


class Ids:
    """A tokenizer of the ids alone."""

    eot, n_vocab = 7, 203
    stops = property(lambda self: (self.eot,))


def test_weights_that_are_not_finite_are_a_user_error():
    model = new_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        list(model.generate(torch.tensor([[1]]), 3))
    with pytest.raises(UserError, match="not finite"):
        list(stream_ids(model, Ids(), [[1]], 3))
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, [1], 3, 2)


def test_a_setting_out_of_range_is_a_user_error_before_the_first_token():
    with pytest.raises(UserError, match="--top_p=2"):
        stream_ids(new_model(), Ids(), [[1]], 3, top_p=2)


def test_complete_returns_the_new_ids_of_each_prompt_up_to_the_end_of_text():
    model = new_model(pos="rope")
    rows = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    alone = [collect(model.generate(torch.tensor([row]), 12, temperature=0))[0].tolist() for row in rows]
    tokenizer = Ids()
    tokenizer.eot = alone[0][5]
    expected = [ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids for ids in alone]
    assert len(expected[0]) <= 5 and complete(model, tokenizer, rows, 12, temperature=0) == expected

    class TwoEnds(Ids):
        stops = (alone[0][5], alone[0][2])

    assert complete(model, TwoEnds(), [rows[0]], 12, temperature=0) == [expected[0][: alone[0].index(alone[0][2])]]
    assert len(list(stream_ids(model, TwoEnds(), [rows[0]], 12, temperature=0))) <= 3  # and sampling stops there


def test_manual_attention_does_not_overflow_in_float16():
    model = new_model(attn="manual", n_embd=256).transformer.h[0].attn
    q = torch.full((1, 4, 3, 64), 35.0).half()
    assert model.attend(q, q, q).isfinite().all()


def test_prompts_of_different_lengths_are_continued_in_one_batch_as_they_would_be_alone():
    model = new_model(pos="rope")
    rng = torch.Generator().manual_seed(5)
    rows = [torch.randint(203, (n,), generator=rng).tolist() for n in (3, 11, 7, 11, 46)]
    idx = torch.tensor([r + [-1] * (46 - len(r)) for r in rows])
    together = collect(model.generate(idx, 20, temperature=0)).tolist()
    for row, new in zip(rows, together):
        assert len(new) == 43 + 20 and new[: len(row) - 3] == row[3:]
        alone = collect(model.generate(torch.tensor([row]), 5, temperature=0))[0].tolist()
        assert new[len(row) - 3 :][:2] == alone[:2]
        if len(row) < 40:
            assert new[len(row) - 3 :][:5] == alone
    stop = together[0][4]  # the first row samples it; in the prompt of the second it stops nothing
    rows[1][5] = stop
    idx = torch.tensor([r + [-1] * (11 - len(r)) for r in rows[:2]])
    first, second = collect(model.generate(idx, 8, temperature=0, stop_tokens=(stop,))).tolist()
    assert first[4:] == [stop] * (len(first) - 4) and second[:8] == rows[1][3:]


def test_beam_search_with_enough_beams_finds_the_most_likely_texts():
    torch.manual_seed(2)
    model = GPT(GPTConfig(vocab_size=5, n_layer=1, n_head=2, n_embd=16, block_size=8)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    prompt, stop = [1, 3], 4

    def score(ids):
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + ids]))
        logp = logits.log_softmax(-1)[0, len(prompt) - 1 :]
        return sum(logp[n, i].item() for n, i in enumerate(ids))

    texts = [[*t] for t in itertools.product(range(4), repeat=4)]
    texts += [[*t, stop] for n in range(4) for t in itertools.product(range(4), repeat=n)]
    for penalty in (0.0, 1.0):
        best = sorted(((score(t) / len(t) ** penalty, t) for t in texts), reverse=True)[:3]
        found = beam_search(model, prompt, 4, 200, (stop,), penalty)[:3]
        for (expected, text), (got, ids) in zip(best, found):
            assert abs(expected - got) < 1e-4 and ids == [i for i in text if i != stop]


def test_beam_search_equals_transformers():
    import transformers

    model = new_model()
    sizes = dict(vocab_size=203, n_layer=2, n_head=4, n_embd=64, n_positions=48, bos_token_id=202, eos_token_id=202)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ours = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    ours["transformer.wte.weight"] = ours["transformer.wte.weight"][:203]
    theirs.load_state_dict({k: v.t() if k.endswith(GPT2_CONV1D) else v for k, v in ours.items()}, strict=False)
    idx = torch.randint(200, (1, 6), generator=torch.Generator().manual_seed(4))
    for beams in (1, 4):
        options = dict(num_beams=beams, do_sample=False, max_new_tokens=20, pad_token_id=202)
        expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)[0, 6:].tolist()
        ((_, got), *_) = beam_search(model, idx[0].tolist(), 20, beams, (202,))
        assert got == [i for i in expected if i != 202]


def test_beam_search_continues_past_the_context():
    model = new_model(pos="rope")
    ((_, ids), *_) = beam_search(model, [5, 6, 7], 70, 1)
    assert ids == collect(model.generate(torch.tensor([[5, 6, 7]]), 70, temperature=0))[0].tolist()


def test_a_chat_prompt_keeps_the_latest_exchanges_that_fit():
    def prompt(room, is_chat=True, system="", eot=True):
        letters = CharTokenizer(sorted(set("User: Assistant:\nabcdeS")), eot)
        ids, kept = chat_prompt(letters, [("a", "b"), ("c", "d")], "e", room, is_chat, system)
        return letters.decode(ids).replace(EOT, "|"), kept

    past = "|User: a\nAssistant: b|User: c\nAssistant: d"
    assert prompt(1000) == (past + "|User: e\nAssistant:", 2)
    assert prompt(1000, system="S") == ("|S" + past + "|User: e\nAssistant:", 2)
    assert prompt(50, system="S") == ("|S|User: c\nAssistant: d|User: e\nAssistant:", 1)
    assert prompt(30, system="S") == ("|S|User: e\nAssistant:", 0)
    assert prompt(19, system="S") == ("|User: e\nAssistant:", 0)
    with pytest.raises(UserError, match="the message takes 19 tokens, and the context has room for 10"):
        prompt(10)
    assert prompt(1000, eot=False) == (past[1:].replace("|", "\n") + "\nUser: e\nAssistant:", 2)
    assert prompt(1000, is_chat=False) == ("|ab\ncd\ne", 2)
    assert prompt(3, is_chat=False) == ("d\ne", 2)


@pytest.mark.parametrize(
    "instruction, amx, name, training, writing",
    [
        (True, False, "Intel Xeon", torch.float32, torch.bfloat16),
        (True, True, "Intel Xeon", torch.bfloat16, torch.bfloat16),
        (True, False, "AMD EPYC", torch.bfloat16, torch.bfloat16),
        (False, False, "AMD EPYC", torch.float32, torch.float32),
    ],
)
def test_auto_takes_bfloat16_on_a_cpu_where_it_is_faster(monkeypatch, instruction, amx, name, training, writing):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert pick_dtype("auto", CPU) == training and pick_dtype("auto", CPU, writing=True) == writing
    assert pick_dtype("float16", CPU) == torch.float16
