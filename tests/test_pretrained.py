"""Weights of other projects: Hugging Face folders, a hub (on this machine), nanoGPT's checkpoints."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from conftest import SMALL, TEXT, make_nanogpt_chars

from common.checkpoint import load_model
from common.inference import prompt_ids
from common.pretrained import arguments_from, from_llama, read_pretrained, to_hugging_face, to_our_names
from common.tokenizer import EOT, BPETokenizer, PretrainedTokenizer, gpt2_tokenizer, read_tokenizer, tokenizer_from_dict
from configurator import UserError
from model import GPT, GPTConfig

import numpy as np
import pytest
import torch
import transformers
from hub import start_hub

LLAMA = dict(
    hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, max_position_embeddings=48, rope_theta=500.0, bos_token_id=1, eos_token_id=0,
)  # fmt: skip


def save_llama(folder: Path, **changes):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(folder, max_shard_size="200kB")
    return theirs


def save_gpt2(folder: Path, **changes):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=48, vocab_size=211, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    for n, p in theirs.named_parameters():
        if "wte" not in n or p.shape[0] < 1000:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(folder)
    return theirs


def save_gpt2_tokenizer(folder: Path, vocabulary: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = models.BPE.from_file(*(str(p) for p in sorted(vocabulary.iterdir())))  # encoder.json, then vocab.bpe
    library = Tokenizer(bpe)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([EOT])
    library.save(str(folder / "tokenizer.json"))


SCALED = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 12}
YARN = {**SCALED, "rope_type": "yarn", "beta_fast": 2.0}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
RELATIVES = {  # model_type, changes of LLAMA
    "llama 3's rope scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope scaling": ("llama", {"rope_parameters": {"rope_type": "linear", **SCALED}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn, its defaults": ("llama", {"rope_parameters": {k: YARN[k] for k in YARN if k != "beta_fast"}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, head_dim of its width": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "arcee": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "apertus": ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "apertus, its default rope": ("apertus", {}),
}


def save_relative(folder: Path, kind: str, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{k: v for k, v in {**LLAMA, **changes}.items() if k != "rope_theta" or kind != "apertus"}
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.1)
        if "act_fn" in name:  # a ReLU squared times softplus(alpha_p)
            p.data.fill_(0.7 if name.endswith("alpha_p") else -100.0)
    for name, buffer in theirs.named_buffers():
        if name.endswith("act_fn.beta"):
            buffer.zero_()
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("kind", "changes"), RELATIVES.values(), ids=RELATIVES)
def test_llamas_relatives_are_read_and_written_with_transformers_logits(kind, changes, tmp_path):
    theirs = save_relative(tmp_path / "m", kind, **changes)
    ours, _ = load_model(tmp_path / "m")
    idx = torch.randint(1, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(ours(idx)[0], expected, atol=1e-4, rtol=0)
        greedy = theirs.generate(idx[:, :24], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.stack(list(ours.generate(idx[:, :24], 12, temperature=0)), 1).tolist() == greedy[:, 24:].tolist()
    _, config, weights = to_hugging_face(ours)
    assert config["model_type"] == kind and config["architectures"] == [type(theirs).__name__]
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**json.loads(json.dumps(config))), dtype=torch.float32
    ).eval()
    rows = {
        name: tensor[: len(theirs.state_dict()[name])] if tensor.dim() else tensor for name, tensor in weights.items()
    }
    again.load_state_dict(rows)
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_the_context_of_an_own_model_is_stretched_and_its_export_says_so(scaling, run, refused, chars):
    keys = [*SMALL, "--dataset=chars", "--pos=rope", "--norm=rmsnorm", "--mlp=swiglu"]
    run("train.py", *keys, "--out_dir=short")
    longer = [*keys, "--init_from=short", "--block_size=64"]
    assert "--rope_scaling=yarn --rope_factor=2 stretches it" in refused("train.py", *longer)
    assert "it needs --rope_scaling" in refused("train.py", *keys, "--init_from=short", "--rope_factor=4.0")
    longer += [f"--rope_scaling={scaling}", "--rope_factor=2", "--max_iters=4"]
    run("train.py", *longer, "--out_dir=long")
    run("train.py", *longer[:-1], "--out_dir=long", "--max_iters=6", "--resume")
    again = [*keys, "--init_from=long", f"--rope_scaling={scaling}", "--rope_factor=4"]
    assert f"this model is stretched already, {scaling} by 2" in refused("train.py", *again)
    ours, checkpoint = load_model(chars / "long")
    assert (ours.config.block_size, ours.config.rope_original, checkpoint["step"]) == (64, 32, 6)
    run("export.py", "--out_dir=long")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chars / "long" / "export").eval()
    assert theirs.config.rope_parameters["rope_type"] == scaling
    idx = torch.randint(0, 30, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    run("train.py", *SMALL, "--dataset=chars", "--out_dir=learned")
    stretched = [*SMALL, "--dataset=chars", "--init_from=learned", "--pos=rope", f"--rope_scaling={scaling}"]
    assert "has no rotary positions" in refused("train.py", *stretched)


def test_an_xielu_that_is_not_relu_squared_is_refused(tmp_path):
    theirs = save_relative(tmp_path / "m", "apertus")
    theirs.model.layers[1].mlp.act_fn.beta.fill_(0.5)
    theirs.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="its xIELU is not ReLU squared"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("save", [save_gpt2, save_llama])
def test_a_hugging_face_folder_gives_transformers_logits_loss_and_greedy_text(save, tmp_path):
    theirs = save(tmp_path / "m")
    ours, _ = load_model(tmp_path / "m")
    idx = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        torch.testing.assert_close(ours(idx)[0], expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(idx[:, :-1], idx[:, 1:])[1], expected.loss, atol=1e-4, rtol=0)
        greedy = theirs.generate(idx, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.stack(list(ours.generate(idx, 12, temperature=0)), 1).tolist() == greedy[:, 24:].tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale=1.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "attention_factor=3.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True with mlp_bias=False"),
        ({"mlp_bias": True}, "attention_bias=False with mlp_bias=True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "arcee", "hidden_act": "silu"}, "hidden_act='silu'"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(changes, words):
    plain = transformers.LlamaConfig(**LLAMA).to_dict()
    assert arguments_from(plain, "m")["rope_base"] == 500
    with pytest.raises(UserError, match="is not supported") as e:
        arguments_from({**plain, **changes}, "m")
    assert words in str(e.value)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx=True"):
        arguments_from({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "m")


def test_damaged_folders_are_refused_in_one_line(refused, tmp_path):
    save_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    command = ("sample.py", "--device=cpu", "--init_from=m")
    assert "tokenizer" in refused(*command)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    assert "cannot be read" in refused(*command)
    shard.unlink()
    assert f"m lacks {shard.name}" in refused(*command)
    shard.write_bytes(whole)
    for changes, words in (
        ({"hidden_size": "64"}, "hidden_size='64' is not a size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 is not a size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is not a size"),
        ({"num_hidden_layers": 10**6}, "model.layers.3.input_layernorm.weight is missing"),
        ({"vocab_size": 10**6}, "the embedding has 300 rows"),
        ({"intermediate_size": 10**6}, "the weights do not fit this model"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' is not a number"),
        ({"rope_parameters": 3}, "cannot be understood"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as e:
            load_model(str(tmp_path / "m"))
        assert words in str(e.value), changes
    (tmp_path / "m" / "config.json").write_text("[" * 100_000)
    assert "cannot be understood" in refused(*command)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for shard in (tmp_path / "m").glob("*.safetensors"):
        shard.unlink()
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"pickled")
    assert "m has no *.safetensors; save the model with safe_serialization=True" in refused(*command)
    assert "there is no checkpoint gone" in refused("sample.py", "--init_from=gone")
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    assert "openai-community/gpt2-xl cannot be had from the hub" in refused("sample.py", "--init_from=gpt2-xl", env=hub)


PLACES = {  # key -> where and how a config.json may say it
    "theta": [{}, {"rope_theta": 500}, {"rope_theta": None}],
    "parameters": [{}, {"rope_parameters": None}, {"rope_parameters": {"rope_theta": 500.0}},
                   {"rope_parameters": {"rope_type": "default"}}, {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}],
    "scaling": [{}, {"rope_scaling": None}, {"rope_scaling": {"type": "default"}}, {"rope_scaling": {"rope_theta": 500.0}},
                {"rope_scaling": {"type": "linear", "factor": 2}}],
    "heads": [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": None}],
    "window": [{}, {"sliding_window": None}, {"sliding_window": 200_000}],
    "defaults": [{}, {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 64}],
}  # fmt: skip


def accepted(config: dict) -> tuple[dict, object] | None:
    """Our arguments and transformers' config object, None where we refuse."""
    try:
        ours = arguments_from(config, "m")
    except UserError:
        return None
    return ours, transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "arcee", "apertus"])
def test_every_placement_of_a_setting_means_what_transformers_reads(kind):
    n_accepted = 0
    for parts in itertools.product(*PLACES.values()):
        config = {
            "model_type": kind,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_hidden_layers": 2,
            "vocab_size": 99,
        }
        for part in parts:
            config |= part
        if found := accepted(config):
            n_accepted += 1
            ours, theirs = found
            rope, head = theirs.rope_parameters, getattr(theirs, "head_dim", None) or 8
            assert ours["rope_base"] == rope["rope_theta"] and (ours["head_dim"] or 8) == head, config
            assert ours.get("rope_scaling", "none") == {"default": "none"}.get(rope["rope_type"], rope["rope_type"]), (
                config
            )
            assert (ours["n_kv_head"] or 8) == theirs.num_key_value_heads, config
            window = getattr(theirs, "sliding_window", None) or 10**9
            assert kind != "mistral" or window >= theirs.max_position_embeddings == ours["block_size"], config
            assert ours["norm_eps"] == theirs.rms_norm_eps and ours["tie_weights"] == theirs.tie_word_embeddings
            assert (
                ours["mlp_hidden"] == theirs.intermediate_size and ours["block_size"] == theirs.max_position_embeddings
            )
    assert n_accepted > 100


def test_a_gpt2_config_has_transformers_defaults_and_other_names():
    ours, theirs = accepted({"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 4})
    assert (
        (ours["n_embd"], ours["n_head"], ours["n_layer"])
        == (theirs.n_embd, theirs.n_head, theirs.n_layer)
        == (64, 4, 12)
    )
    assert ours["norm_eps"] == theirs.layer_norm_epsilon and ours["block_size"] == theirs.n_positions == 1024
    with pytest.raises(UserError, match="contradict each other"):
        arguments_from({"model_type": "gpt2", "hidden_size": 64, "n_embd": 32}, "m")


def test_the_weights_of_a_folder_are_those_transformers_reads(tmp_path):
    import safetensors.torch

    theirs = save_llama(tmp_path / "m")  # in shards, with an index
    stale = {name: torch.zeros_like(t) for name, t in theirs.state_dict().items()}
    for name in ("a_old", "model-00009-of-00009", "zzz"):
        safetensors.torch.save_file(stale, tmp_path / "m" / f"{name}.safetensors")
    (tmp_path / "m" / "notes.safetensors").write_bytes(b"not weights")
    _, weights, _ = read_pretrained(str(tmp_path / "m"))
    assert torch.equal(weights["transformer.wte.weight"], theirs.state_dict()["model.embed_tokens.weight"])
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = index.read_text()
    for name, words in (
        ("../m/zzz.safetensors", "which is not a file of this folder"),
        ("gone.safetensors", "m lacks gone"),
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(UserError, match=words):
            read_pretrained(str(tmp_path / "m"))
    index.write_text(whole)
    safetensors.torch.save_file(stale, tmp_path / "m" / "model.safetensors")  # comes first, as in transformers
    assert not read_pretrained(str(tmp_path / "m"))[1]["transformer.wte.weight"].any()
    (tmp_path / "m" / "model.safetensors").unlink()
    index.unlink()
    with pytest.raises(UserError, match="rename the one to use to model.safetensors"):
        read_pretrained(str(tmp_path / "m"))


def test_quantized_weights_are_refused(tmp_path):
    import safetensors.torch

    theirs = save_llama(tmp_path / "m").state_dict()
    theirs = {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in theirs.items()}
    safetensors.torch.save_file(theirs, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="holds torch.float8_e4m3fn"):
        read_pretrained(str(tmp_path / "m"))


def test_a_tied_model_with_two_different_matrices_is_untied(tmp_path):
    import safetensors.torch

    theirs = save_llama(tmp_path / "m")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    idx = torch.randint(300, (2, 20))
    model = load_model(str(tmp_path / "m"))[0]
    with torch.no_grad():
        assert not model.config.tie_weights and (model(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def test_a_weight_that_is_missing_or_has_no_place_is_refused(tmp_path):
    model = save_llama(tmp_path / "m")
    theirs, arguments = model.state_dict(), arguments_from(model.config.to_dict(), "m")
    with pytest.raises(UserError, match="no place for model.layers.0.self_attn.q_proj.bias"):
        from_llama({**theirs, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, arguments)
    del theirs["model.norm.weight"]
    with pytest.raises(UserError, match="model.norm.weight is missing"):
        from_llama(theirs, arguments)


def test_gpt2s_tokenizer_json_is_read_as_our_gpt2_tokenizer(tmp_path, gpt2_vocabulary):
    save_gpt2_tokenizer(tmp_path, gpt2_vocabulary)
    found, known = read_tokenizer(tmp_path), gpt2_tokenizer()
    text = "Héllo wörld's 1234   tabs\t\n\n  <|endoftext|> 你好 🙂 don't"
    assert isinstance(found, BPETokenizer) and found.kind == "gpt2" and found.n_vocab == 50257
    for special in (False, True):
        assert found.encode(text, special) == known.encode(text, special)


def other_tokenizer(folder: Path, sentencepiece: bool):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if sentencepiece:
        library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        library.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
        named = [t for t in special if not t.startswith("<0x")]
    else:
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        library.decoder = decoders.ByteLevel()
        named = ["</s>", "<s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        library.train_from_iterator(
            [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=named, initial_alphabet=alphabet)
        )
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    written = json.loads(library.to_str())
    written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] in named]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_other_tokenizers_are_used_as_they_are(sentencepiece, tmp_path):
    other_tokenizer(tmp_path, sentencepiece)
    found = read_tokenizer(tmp_path)
    assert isinstance(found, PretrainedTokenizer)
    text = "line 12: the quick é brown 🙂 fox</s>"
    ids = found.encode(text)
    assert found.eot not in ids and found.decode(ids).strip() == text
    special = prompt_ids(found, text)
    assert special[0] == 1 and special[-1] == found.eot
    again = tokenizer_from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.encode(text) == ids and again.n_vocab == found.n_vocab <= 300 and again.eot == found.eot
    assert b"".join(found.token_bytes(i) for i in ids).decode() == found.decode(ids)


def test_text_is_tokenized_for_a_pretrained_folder_which_is_fine_tuned_and_sampled(run, tmp_path):
    save_llama(tmp_path / "m")
    other_tokenizer(tmp_path / "m", sentencepiece=False)
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    run("prepare_text.py", "--inputs=docs.jsonl", "--dataset=d", "--tokenizer=m")
    options = ["--dataset=d", "--init_from=m", "--max_iters=30", "--eval_interval=30", "--learning_rate=1e-2"]
    run("train.py", *SMALL, *options)
    found = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    losses = [m["val_loss"] for m in found if "val_loss" in m]
    assert losses[-1] < losses[0] - 0.5
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"]["norm"] == "rmsnorm" and checkpoint["tokenizer"]["kind"] == "pretrained"
    assert run("sample.py", "--start=line 1", "--max_new_tokens=5", "--device=cpu").startswith("line 1")


@pytest.fixture
def hub(tmp_path, gpt2_vocabulary):
    """The environment in which `gpt2` is a small model of a hub on this machine."""
    save_gpt2(tmp_path / "hub", vocab_size=50257, n_positions=1024, n_embd=8, n_layer=1)
    save_gpt2_tokenizer(tmp_path / "hub", gpt2_vocabulary)
    files = {p.name: p.read_bytes() for p in (tmp_path / "hub").iterdir()}
    server, environment = start_hub({"openai-community/gpt2": files})
    yield {**environment, "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()


def test_a_model_in_shards_is_downloaded_with_the_index_that_names_them(run, tmp_path, gpt2_vocabulary):
    save_llama(tmp_path / "hub", vocab_size=50257)
    save_gpt2_tokenizer(tmp_path / "hub", gpt2_vocabulary)
    files = {p.name: p.read_bytes() for p in (tmp_path / "hub").iterdir()}
    assert "model.safetensors" not in files and sum("-of-" in name for name in files) > 1
    server, environment = start_hub({"owner/llama": files})
    env = {**environment, "HF_HOME": str(tmp_path / "hf")}
    assert run("sample.py", "--init_from=owner/llama", "--start=a", "--max_new_tokens=2", env=env).startswith("a")
    server.shutdown()


SHORTER = ["--device=cpu", "--compile=False", "--block_size=16", "--eval_iters=2", "--max_iters=2"]


def test_nanogpts_fine_tuning_and_evaluation_configs_run_unmodified(run, hub, tmp_path):
    """The keys of its config/finetune_shakespeare.py and eval_gpt2.py; the command line only makes them shorter."""
    (tmp_path / "finetune.py").write_text(
        "import time\nout_dir = 'out-shakespeare'\neval_interval = 5\neval_iters = 40\nwandb_log = False\n"
        "wandb_project = 'shakespeare'\nwandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare'\n"
        "init_from = 'gpt2'\nalways_save_checkpoint = False\nbatch_size = 1\ngradient_accumulation_steps = 32\n"
        "max_iters = 20\nlearning_rate = 3e-5\ndecay_lr = False\n"
    )
    (tmp_path / "evaluate.py").write_text(
        "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n"
    )
    ids = np.array(gpt2_tokenizer().encode(TEXT), np.uint16)
    for name in ("shakespeare", "openwebtext"):
        (tmp_path / "data" / name).mkdir(parents=True)
        ids[:3000].tofile(tmp_path / "data" / name / "train.bin")
        ids[3000:].tofile(tmp_path / "data" / name / "val.bin")
    printed = run("train.py", "finetune.py", *SHORTER, env=hub)
    assert "1 x 16 tokens x 32 micro-batches" in printed
    assert torch.load(tmp_path / "out-shakespeare" / "ckpt.pt", weights_only=True)["model_args"]["bias"]
    printed = run("train.py", "evaluate.py", *SHORTER, env=hub)
    assert "training on data/openwebtext" in printed and "val loss" in printed
    assert run("sample.py", "--init_from=gpt2", "--start=What", "--max_new_tokens=3", env=hub).startswith("What")


def test_prefixes_of_compile_and_ddp_are_dropped_in_any_order():
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        assert [*to_our_names({f"{prefix}transformer.ln_f.weight": torch.ones(2)})] == ["transformer.ln_f.weight"]


def test_a_c_attn_of_ours_that_has_the_shape_of_a_conv1d_is_not_transposed():
    config = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, head_dim=2, n_embd=18)
    weights = GPT(config).state_dict()
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (6, 18)
    assert all(torch.equal(weights[name], tensor) for name, tensor in to_our_names(weights).items())


@pytest.mark.parametrize("save", [save_gpt2, save_llama])
def test_reading_and_writing_hugging_face_weights_are_inverse(save, tmp_path):
    theirs = save(tmp_path / "m")
    ours, _ = load_model(tmp_path / "m")
    _, config, weights = to_hugging_face(ours)
    stored, original = theirs.state_dict(), theirs.config.to_dict()
    assert weights.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(weights[name][: len(tensor)], tensor), name
    differing = {k for k, v in config.items() if k in original and original[k] != v}
    assert differing <= {"architectures", "n_inner", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    assert arguments_from(config, "ours") == arguments_from(original, "theirs") | {"mlp_hidden": ours.config.mlp_hidden}


def nanogpt_checkpoint(folder: Path, steps: int) -> None:
    """What its train.py saves: weights with compile's prefix, AdamW's state in its order, iter_num, best_val_loss as a tensor."""
    model, _ = load_model(folder / "m")
    arguments = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, bias=True, vocab_size=211, dropout=0.0)
    groups = [[p for p in model.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    # nanoGPT does not pad the vocabulary.
    groups = [[p[:211] if len(p) == 256 else p for p in g] for g in groups]
    groups = [[p.detach().clone().requires_grad_() for p in g] for g in groups]
    theirs = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3
    )
    for p in (*groups[0], *groups[1]):
        p.grad = torch.full_like(p, 0.5)
    theirs.step()
    weights = {n: p[:211] if len(p) == 256 else p for n, p in model.state_dict().items()}
    torch.save(
        {
            "model": {"_orig_mod." + n: p for n, p in weights.items()},
            "optimizer": theirs.state_dict(),
            "model_args": arguments,
            "iter_num": steps,
            "best_val_loss": torch.tensor(3.5),
            "config": {"dataset": "chars", "learning_rate": 1e-3, "block_size": 48},
        },
        folder / "out" / "ckpt.pt",
    )


def test_nanogpts_checkpoint_is_sampled_evaluated_and_resumed(run, refused, tmp_path):
    save_gpt2(tmp_path / "m")
    make_nanogpt_chars(tmp_path / "data" / "chars", TEXT)
    (tmp_path / "out").mkdir()
    nanogpt_checkpoint(tmp_path, steps=40)
    common = [*SMALL, "--dataset=chars", "--bias=True", "--block_size=48", "--device=cpu"]
    run("sample.py", "--out_dir=out", "--start=line", "--max_new_tokens=5")
    assert "val loss" in run("train.py", *common, "--init_from=resume", "--eval_only")
    printed = run("train.py", *common, "--init_from=resume", "--max_iters=43", "--eval_interval=0")
    assert " 41/43 " in printed and " 43/43 " in printed
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    state = checkpoint["optimizers"][0]["state"]
    assert checkpoint["step"] == 43 and {int(s["step"]) for s in state.values()} == {
        4
    }  # one step of theirs, three of ours
    assert checkpoint["model_args"]["mlp"] == "gelu_erf"


@dataclass
class Config:
    """A class that is pickled into the checkpoint below, as build-nanogpt pickles its GPTConfig."""

    block_size: int = 48
    vocab_size: int = 211
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


def test_a_pickled_config_is_refused_with_the_code_that_converts_it(run, refused, tmp_path):
    theirs = save_gpt2(tmp_path / "m")
    make_nanogpt_chars(tmp_path / "data" / "chars", TEXT)
    weights = to_our_names(theirs.state_dict())
    torch.save({"model": weights, "config": Config(), "step": 7, "val_loss": 3.0}, tmp_path / "old.pt")
    message = refused("sample.py", "--init_from=old.pt")
    assert "holds the Python object test_pretrained.Config" in message
    code = message.partition("where that object is known: ")[2]
    exec(code, {"torch": torch, "path": tmp_path / "old.pt"})
    common = [*SMALL, "--dataset=chars", "--init_from=old.pt", "--block_size=16"]
    assert "val loss" in run("train.py", *common, "--eval_only")
