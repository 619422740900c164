"""Weights made ready for decoding, and generate()'s step of fixed shapes, against the plain model."""

import copy
import itertools

import pytest
import torch

import model as model_file
from common.inference import Int8Linear, PackedLinear, beam_search, chat_prompt, for_inference, packs
from model import GPT, DecodeStep, GPTConfig, KVCache, choose, one_ahead

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
def test_packed_weights_are_the_same_model(switches):
    plain = new_model(**switches)
    packed = for_inference(copy.deepcopy(plain), CPU, torch.float32)
    if packs(CPU, torch.float32):
        assert isinstance(packed.lm_head, PackedLinear) and isinstance(packed.transformer.h[1].mlp.c_fc, PackedLinear)
    idx = torch.randint(203, (3, 20))
    torch.testing.assert_close(packed(idx)[0], plain(idx)[0], atol=1e-4, rtol=0)
    assert torch.equal(
        collect(packed.generate(idx, 60, temperature=0)), collect(plain.generate(idx, 60, temperature=0))
    )


def test_in_bfloat16_it_is_as_close_as_autocast():
    plain, idx = new_model(), torch.randint(203, (3, 20))
    want = plain(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        noise = (plain(idx)[0].float() - want).norm() / want.norm()
    packed = for_inference(copy.deepcopy(plain), CPU, torch.bfloat16)
    assert (packed(idx)[0].float() - want).norm() / want.norm() < 3 * noise


@pytest.mark.parametrize("width", [64, 680, 36])  # of which the CPU's kernel takes the first
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_eight_bits_are_the_weights_to_the_nearest_step(kind, width):
    layer = torch.nn.Linear(width, 96)
    layer.weight.data[5] = 0
    eight = Int8Linear(copy.deepcopy(layer), kind).to(kind)
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    rounded = eight.weight.float() * eight.scale.float()[:, None]
    assert ((rounded - layer.weight).abs() <= scale * 0.51 + layer.weight.abs() / 200).all()
    for rows in (1, 3, 40):  # the kernel for few rows, and the product for many
        x = torch.randn(rows, width).to(kind)
        want = x.float() @ rounded.t() + layer.bias
        torch.testing.assert_close(
            eight(x[None])[0].float(), want, atol=1e-5 if kind == torch.float32 else 3e-2, rtol=1e-2
        )


def test_a_model_of_eight_bits_predicts_almost_the_same():
    plain, idx = new_model(), torch.randint(203, (8, 40))
    want = plain(idx)[0].log_softmax(-1)
    got = for_inference(copy.deepcopy(plain), CPU, torch.float32, "int8")(idx)[0].log_softmax(-1)
    assert 0 < (want.exp() * (want - got)).sum(-1).mean() < 0.01  # KL in nats
    with pytest.raises(ValueError, match="--quantize=int4: choose int8"):
        for_inference(plain, CPU, torch.float32, "int4")


def test_lora_is_merged_first():
    tuned = new_model()
    tuned.add_lora(4, 8.0)
    for n, p in tuned.named_parameters():
        if "lora_b" in n:
            torch.nn.init.normal_(p, std=0.1)
    idx = torch.randint(203, (2, 9))
    want = tuned(idx)[0]
    torch.testing.assert_close(for_inference(tuned, CPU, torch.float32)(idx)[0], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pos, kv, attn", [*itertools.product(("learned", "rope", "none"), (4, 2), ("sdpa", "manual"))])
def test_the_step_of_fixed_shapes_is_the_plain_one(pos, kv, attn):
    model = new_model(pos=pos, n_kv_head=kv, attn=attn, block_size=300)
    idx = torch.randint(203, (2, 240))

    def pick(logits):
        return choose(logits[:, -1], 0, 0, 1.0, 0.0)

    cache = KVCache(model.config, 2, 300, CPU, torch.float32)
    step = DecodeStep(model, cache, pick)
    with torch.no_grad():
        ids = collect(model._decode(idx, idx.size(1), 100, pick, cache, step, ()))
    assert set(step.graphs) == {256, 300}  # two reaches, and back to the first when the context was full
    assert torch.equal(ids, collect(model.generate(idx, 100, temperature=0)))


def test_a_long_prompt_goes_in_parts_and_equal_rows_once(monkeypatch):
    model = new_model(block_size=200)
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **more: seen.append(tuple(idx.shape)) or forward(idx, **more))
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
        assert seen == shapes and cache.filled == 150
        for row in (0, -1):
            torch.testing.assert_close(logits[row], forward(rows[row][None])[0][0, -1:], atol=1e-4, rtol=0)
            after, _ = forward(torch.tensor([[7]] * len(rows)), cache=cache)
            whole = torch.cat((rows[row], torch.tensor([7])))[None]
            torch.testing.assert_close(after[row], forward(whole)[0][0, -1:], atol=1e-4, rtol=0)
            cache.filled = 150


def test_one_ahead_hands_out_everything_and_starts_the_next_first():
    started = []

    def numbers(n):
        for i in range(n):
            started.append(i)
            yield i

    for i in one_ahead(numbers(4)):
        assert max(started) == min(i + 1, 3)
    assert list(one_ahead(numbers(0))) == [] and list(one_ahead(numbers(1))) == [0]


def test_choose_draws_as_often_as_it_should():
    logits, dice = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    for options, want in (
        (dict(top_k=0, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2, top_p=1.0), [0.625, 0.375, 0, 0]),
        (dict(top_k=0, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ):
        ids = choose(logits.expand(40000, -1), 1.0, options["top_k"], options["top_p"], 0.0, dice)
        share = torch.bincount(ids, minlength=4) / 40000
        assert (share - torch.tensor(want)).abs().max() < 0.012, (options, share)


def test_decoding_leaves_training_as_it_was():
    model = new_model().train()
    list(model.generate(torch.tensor([[1]]), 3))
    assert model.training and model_file.GPT.generate.__doc__


def test_weights_that_are_not_numbers_are_told():
    model = new_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not numbers"):
        list(model.generate(torch.tensor([[1]]), 3))


def test_the_formula_stays_in_float16s_range():
    model = new_model(attn="manual", n_embd=256).transformer.h[0].attn
    q = torch.full((1, 4, 3, 64), 35.0).half()
    assert model.attend(q, q, q, 0).isfinite().all()


def test_prompts_of_different_lengths_in_one_batch_are_each_continued_as_alone():
    model = new_model(pos="rope")
    dice = torch.Generator().manual_seed(5)
    rows = [torch.randint(203, (n,), generator=dice).tolist() for n in (3, 11, 7, 11, 46)]
    idx = torch.tensor([r + [-1] * (46 - len(r)) for r in rows])
    together = collect(model.generate(idx, 20, temperature=0)).tolist()
    for row, new in zip(rows, together):
        assert len(new) == 43 + 20 and new[: len(row) - 3] == row[3:]
        alone = collect(model.generate(torch.tensor([row]), 5, temperature=0))[0].tolist()
        assert new[len(row) - 3 :][:2] == alone[:2]
        if len(row) < 40:
            assert new[len(row) - 3 :][:5] == alone
    stop = together[0][4]  # met by the first row, and in the prompt of the others it stops nothing
    rows[1][5] = stop
    idx = torch.tensor([r + [-1] * (11 - len(r)) for r in rows[:2]])
    first, second = collect(model.generate(idx, 8, temperature=0, stop_tokens=(stop,))).tolist()
    assert first[4:] == [stop] * (len(first) - 4) and second[:8] == rows[1][3:]


def test_beams_enough_for_every_text_find_the_likeliest_of_all():
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
        for (want, text), (got, ids) in zip(best, found):
            assert abs(want - got) < 1e-4 and ids == [i for i in text if i != stop]


def test_beams_are_those_of_transformers():
    import transformers

    model = new_model()
    sizes = dict(vocab_size=203, n_layer=2, n_head=4, n_embd=64, n_positions=48, bos_token_id=202, eos_token_id=202)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ours = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    ours["transformer.wte.weight"] = ours["transformer.wte.weight"][:203]
    turned = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    theirs.load_state_dict({k: v.t() if k.endswith(turned) else v for k, v in ours.items()}, strict=False)
    idx = torch.randint(200, (1, 6), generator=torch.Generator().manual_seed(4))
    for beams in (1, 4):
        want = theirs.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=20,
            pad_token_id=202,
        )[0, 6:].tolist()
        ((_, got), *_) = beam_search(model, idx[0].tolist(), 20, beams, (202,))
        assert got == [i for i in want if i != 202]


def test_a_beam_goes_on_past_the_context():
    model = new_model(pos="rope")
    ((_, ids), *_) = beam_search(model, [5, 6, 7], 70, 1)
    assert ids == collect(model.generate(torch.tensor([[5, 6, 7]]), 70, temperature=0))[0].tolist()


def test_a_chats_prompt_keeps_the_latest_turns_that_fit():
    class Letters:
        eot = 0

        def encode(self, text):
            return [ord(c) for c in text]

    def asked(room, turns=True, system="", eot=0):
        letters.eot = eot
        ids, kept = chat_prompt(letters, [("a", "b"), ("c", "d")], "e", room, turns, system)
        return "".join(chr(i) if i else "|" for i in ids), kept

    letters = Letters()
    past = "|User: a\nAssistant: b|User: c\nAssistant: d"
    assert asked(1000) == (past + "|User: e\nAssistant:", 2)
    assert asked(1000, system="S") == ("|S" + past + "|User: e\nAssistant:", 2)
    assert asked(50, system="S") == ("|S|User: c\nAssistant: d|User: e\nAssistant:", 1)
    assert asked(10) == ("Assistant:", 0)
    assert asked(1000, eot=None) == (past[1:].replace("|", "\n") + "\nUser: e\nAssistant:", 2)
    assert asked(1000, turns=False) == ("|ab\ncd\ne", 2)
    assert asked(3, turns=False) == ("d\ne", 2)
