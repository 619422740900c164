"""export.py: transformers loads what it writes, with the same logits, text and tokens as ours."""

import itertools
import json
import os
import random
import re

from conftest import SMALL, TEXT, call

import export
from common.checkpoint import load_model
from common.pretrained import EXPRESSIBLE, target_of, to_hugging_face
from common.tokenizer import read_tokenizer, tokenizer_from_dict
from configurator import UserError
from model import GPT, GPTConfig

import pytest
import torch
import transformers
from hub import start_hub
from test_configs import CONFIGS
from test_pretrained import save_llama
from test_tokenizer import foreign_tokenizer

GPT2 = ["--bias=True"]
LLAMA = "--norm=rmsnorm --mlp=swiglu --pos=rope --n_kv_head=1 --rope_base=500.0 --tie_weights=False".split()
RUNS = {
    "gpt2": GPT2,
    "gpt2 without biases, exact gelu": ["--bias=False", "--mlp=gelu_erf", "--tie_weights=False"],
    "llama": LLAMA,
    "llama tied": [*LLAMA[:-1], "--n_kv_head=2", "--norm_eps=1e-6"],
}


@pytest.fixture
def book(run, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT.replace("line 7:", "<|endoftext|>line 7:"))
    run("prepare_text.py", "--inputs=book.txt", "--tokenizer=bpe", "--vocab_size=300")
    return tmp_path


@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_transformers_loads_an_export_with_the_same_logits_text_and_tokens(run, book, keys):
    run("train.py", *SMALL, "--dataset=book", "--learning_rate=1e-2", *keys)
    run("export.py", "--init_from=out/ckpt.pt")
    ours, checkpoint = load_model(book / "out" / "ckpt.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(book / "out" / "export").eval()
    reader = transformers.AutoTokenizer.from_pretrained(book / "out" / "export")
    tokenizer = tokenizer_from_dict(checkpoint["tokenizer"])
    text = TEXT[100:160] + " naïve 日本"
    ids = tokenizer.encode(text)
    assert reader(text).input_ids == ids and reader.decode(ids) == text
    assert len(reader) == tokenizer.n_vocab == theirs.config.vocab_size and reader.eos_token_id == tokenizer.eot
    x = torch.tensor([ids[:20]])
    with torch.no_grad():
        assert torch.allclose(ours(x)[0], theirs(x).logits, atol=1e-4)
    greedy = theirs.generate(x, do_sample=False, max_new_tokens=10, pad_token_id=0, eos_token_id=None)[0, 20:]
    assert greedy.tolist() == [int(t) for t in ours.generate(x, 10, temperature=0)]
    assert sum(p.numel() for p in theirs.parameters()) >= ours.num_params()
    config = json.loads((book / "out" / "export" / "config.json").read_text())
    if config["model_type"] == "gpt2":
        assert config["n_ctx"] == config["n_positions"]  # llama.cpp's converter needs it
    card = (book / "out" / "export" / "README.md").read_text()
    results = json.loads((book / "out" / "results.json").read_text())
    assert f"{results['final_val_loss']:.4f}" in card and "| trained on | book |" in card and "--n_layer=2" in card
    run_example(card, "out", book / "out" / "export")
    options = ["--start=line", "--temperature=0", "--max_new_tokens=20"]
    texts = [run("sample.py", f"--init_from={name}", *options) for name in ("out/export", "out/ckpt.pt")]
    assert texts[0] == texts[1]


def run_example(card: str, name: str, folder) -> None:
    """Run the Python code of a model card, which loads the model by its name."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert code.count(f'"{name}"') == 2
    exec(code.replace(f'"{name}"', repr(str(folder))), {})


TINY = (
    "--init_from=scratch --dataset=book --out_dir=out --n_layer=2 --n_head=2 --n_kv_head=0 --n_embd=32 --mlp_hidden=0 --block_size=256 --batch_size=2 "
    "--gradient_accumulation_steps=1 --max_iters=4 --max_minutes=0 --max_epochs=0 --warmup_iters=0 --schedule=constant --eval_interval=0 "
    "--eval_iters=1 --log_interval=100 --device=cpu --compile=False --dtype=float32 --hellaswag_interval=0 --wandb_log=False"
).split()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(1).choices(TEXT.split(), k=4000)
    (folder / "book.txt").write_text(" ".join(words))
    options = ("--tokenizer=bpe", "--vocab_size=280", "--data_dir=.")
    assert call("prepare_text.py", "--inputs=book.txt", *options, cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_ready_config_is_exported_to_a_class_of_transformers_and_read_back(run, tmp_path, data_dir, path):
    run("train.py", path, *TINY, f"--data_dir={data_dir}")
    run("export.py", "--out_dir=out", "--init_from=out/ckpt.pt")
    ours, checkpoint = load_model(tmp_path / "out" / "ckpt.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export").eval()
    again, _ = load_model(str(tmp_path / "out" / "export"))
    x = torch.tensor([tokenizer_from_dict(checkpoint["tokenizer"]).encode(TEXT[100:150])])
    with torch.no_grad():
        logits = ours(x)[0]
        torch.testing.assert_close(theirs(x).logits, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(again(x)[0], logits, atol=1e-4, rtol=0)
        greedy = theirs.generate(x, do_sample=False, max_new_tokens=200, pad_token_id=0, eos_token_id=None)
    assert greedy[0, x.size(1) :].tolist() == [int(t) for t in ours.generate(x, 200, temperature=0)]


SWITCHES = {
    "norm": ("layernorm", "rmsnorm"), "mlp": ("gelu", "gelu_erf", "swiglu", "relu2"), "pos": ("learned", "rope"),
    "bias": (False, True), "qkv_bias": (False, True), "qk_norm": (False, True), "qk_norm_weight": (False, True),
    "n_kv_head": (0, 1), "head_dim": (0, 6), "tie_weights": (True, False), "mlp_hidden": (0, 50), "rope_base": (1e4, 5e2),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
}  # fmt: skip
BASES = (
    {},
    {"norm": "rmsnorm", "mlp": "swiglu", "pos": "rope", "bias": False},
    {"norm": "rmsnorm", "mlp": "relu2", "pos": "rope", "bias": False, "qk_norm": True},
)


def test_every_pair_of_switches_is_exported_with_the_same_logits_or_refused():
    seen = {}
    for base in BASES:
        for one, other in itertools.combinations(SWITCHES, 2):
            for values in itertools.product(SWITCHES[one], SWITCHES[other]):
                switches = base | {one: values[0], other: values[1]}
                try:
                    factor = 1.0 if switches.get("rope_scaling", "none") == "none" else 2.0
                    config = GPTConfig(64, 99, 2, 2, 16, rope_factor=factor, **switches)
                    seen[str(config)] = (config, target_of(config))
                except (ValueError, UserError):
                    continue
    assert {target for _, target in seen.values()} == EXPRESSIBLE.keys() and len(seen) > 120
    x = torch.randint(99, (1, 60), generator=torch.Generator().manual_seed(1))
    for config, target in seen.values():
        torch.manual_seed(2)
        ours = GPT(config).eval()
        for p in ours.parameters():
            torch.nn.init.normal_(p, mean=0.3, std=0.2)
        _, exported, weights = to_hugging_face(ours)
        assert exported["model_type"] == target
        classes = transformers.AutoConfig.for_model(**json.loads(json.dumps(exported)))
        theirs = transformers.AutoModelForCausalLM.from_config(classes, dtype=torch.float32).eval()
        theirs.load_state_dict(
            {n: t[:99] if t.size(0) == 128 else t for n, t in weights.items() if t.dim()}, strict=False
        )
        for n, t in weights.items():
            if not t.dim():
                theirs.get_buffer(n).fill_(t)
        with torch.no_grad():
            torch.testing.assert_close(theirs(x).logits, ours(x)[0], atol=1e-4, rtol=1e-4, msg=str(config))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_relu2_with_qk_norm_survives_the_dtypes_with_few_bits(run, book, dtype):
    keys = "--norm=rmsnorm --mlp=relu2 --pos=rope --qk_norm=True --tie_weights=True".split()
    run("train.py", *SMALL, "--dataset=book", "--learning_rate=1e-2", *keys)
    run("export.py", "--init_from=out/ckpt.pt", f"--dtype={dtype}")
    ours, checkpoint = load_model(book / "out" / "ckpt.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(book / "out" / "export", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "ApertusForCausalLM" and "lm_head.weight" in theirs.state_dict()
    again, _ = load_model(str(book / "out" / "export"))
    x = torch.tensor([tokenizer_from_dict(checkpoint["tokenizer"]).encode(TEXT[100:150])])[:, :30]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x)[0], atol=0.05, rtol=0.05)
        torch.testing.assert_close(again(x)[0], theirs(x).logits, atol=2e-3, rtol=1e-3)


def test_the_card_of_the_best_weights_gives_their_loss_and_not_the_last(run, chars):
    run("train.py", *SMALL, "--dataset=chars", *GPT2)
    best = torch.load(chars / "out" / "best.pt", weights_only=True)
    torch.save(best | {"step": 1, "val_loss": 1.2345}, chars / "out" / "best.pt")
    run("export.py")
    card = (chars / "out" / "export" / "README.md").read_text()
    assert "| steps | 1 |" in card and "| validation loss (nats per token) | 1.2345 |" in card
    assert "HellaSwag" not in card and "training time" not in card


def test_character_models_bfloat16_and_torch_files_are_exported(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars", *GPT2)
    run("export.py", "--dtype=bfloat16", "--output_dir=half")
    reader = transformers.AutoTokenizer.from_pretrained(chars / "half")
    ours, checkpoint = load_model(chars / "out")
    assert reader("the fox").input_ids == tokenizer_from_dict(checkpoint["tokenizer"]).encode("the fox")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chars / "half")
    assert theirs.dtype == torch.bfloat16
    run("export.py", "--output_format=torch", "--output_dir=plain")
    assert (chars / "plain" / "model.pt").stat().st_size < (chars / "out" / "ckpt.pt").stat().st_size / 2
    a, b = (run("sample.py", f"--init_from={p}", "--max_new_tokens=30") for p in ("plain/model.pt", "out/best.pt"))
    assert a == b
    assert "exists already" in refused("export.py", "--output_dir=half")
    (chars / "mine").mkdir()
    (chars / "mine" / "thesis.txt").write_text("years of work")
    assert "thesis.txt, which is not part of an export" in refused("export.py", "--output_dir=mine", "--overwrite=True")
    before = (chars / "half" / "model.safetensors").read_bytes()
    run("export.py", "--dtype=float32", "--output_dir=half", "--overwrite=True")
    assert len((chars / "half" / "model.safetensors").read_bytes()) > len(before) and not list(chars.glob("*.part"))
    run("export.py", "--output_format=torch", "--output_dir=half", "--overwrite=True")
    assert [p.name for p in (chars / "half").iterdir()] == ["model.pt"]  # nothing of the weights before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["--mlp=relu2"], "mlp=relu2: the closest, GPT-2, lacks it"),
        (
            ["--norm=rmsnorm", "--mlp=swiglu", "--pos=rope", "--qk_norm=True", "--qkv_bias=True"],
            "qk_norm=True: the closest, Qwen2",
        ),
        (["--qk_norm=True"], "qk_norm=True"),
        (["--logit_softcap=20.0"], "logit_softcap=20.0"),
        (["--norm=rmsnorm", "--mlp=swiglu", "--pos=none"], "pos=none: the closest, Llama"),
        (["--norm=rmsnorm", "--mlp=gelu", "--pos=rope"], "mlp=gelu: the closest, Llama"),
        (["--n_kv_head=1"], "n_kv_head=1: the closest, GPT-2"),
    ],
)
def test_a_key_that_no_architecture_can_express_is_refused_by_name(run, refused, chars, keys, words):
    run("train.py", *SMALL, "--dataset=chars", "--max_iters=2", *keys)
    message = refused("export.py")
    assert words in message and "--output_format=torch" in message and not (chars / "out" / "export").exists()
    run("export.py", "--format=torch")  # the older spelling of --output_format


def test_bad_input_is_refused_in_one_line(refused, tmp_path):
    assert "there is no trained model under out/" in refused("export.py")
    assert "--output_format=onnx: choose one of hf, torch" in refused("export.py", "--output_format=onnx")
    assert "--dtype=int8" in refused("export.py", "--dtype=int8")


def test_a_runs_folder_is_never_overwritten_by_an_export(run, refused, chars):
    run("train.py", *SMALL, "--dataset=chars", "--max_iters=2")
    before = {p: p.stat().st_mtime_ns for p in chars.rglob("*")}
    for folder in ("out", ".", "./out/../out"):
        assert "a folder of its own" in refused(
            "export.py", "--out_dir=out", f"--output_dir={folder}", "--overwrite=True"
        )
    (chars / "other").mkdir()
    (chars / "other" / "config.json").write_text("{}")
    (chars / "other" / "ckpt.pt").write_text("somebody's")
    assert "holds ckpt.pt" in refused("export.py", "--output_dir=other", "--overwrite=True")
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_export_is_pushed_to_the_hub_and_read_back_from_there(run, refused, book):
    server, environment = start_hub({})
    env = {**environment, "HF_HOME": str(book / "hf"), "HF_TOKEN": "hf_test"}
    run("train.py", *SMALL, "--dataset=book", *LLAMA)
    printed = run("export.py", "--push=somebody/book", env=env)
    assert "pushed to http" in printed and f"somebody/book/commit/{'3' * 40}" in printed
    files = server.repos["somebody/book"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert files["model.safetensors"] == (book / "out" / "export" / "model.safetensors").read_bytes()
    options = ("--start=line", "--temperature=0", "--max_new_tokens=10")
    assert run("sample.py", "--init_from=somebody/book", *options, env=env) == run("sample.py", *options)
    server.refuses = 403
    message = refused("export.py", "--push=somebody/book", "--overwrite=True", env=env)
    assert "--push=somebody/book: " in message and "the export is complete in out/export" in message
    assert "an id on the hub is owner/name" in refused("export.py", "--push=book", "--overwrite=True")
    server.shutdown()


CONVERTER = """import argparse, json, pathlib
class ModelBase:
    pass
class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        raise ValueError("BPE pre-tokenizer was not recognized")
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
    found = parser.parse_args()
    pathlib.Path(found.outfile).write_text(TextModel().get_vocab_base_pre(None) + found.outtype)
"""


def test_llama_cpps_converter_is_run_on_the_export(run, refused, book):
    (book / "llama.cpp").mkdir()
    (book / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    run("train.py", *SMALL, "--dataset=book", *LLAMA)
    assert "model.gguf: " in run("export.py", "--llama_cpp=llama.cpp")
    assert (book / "out" / "export" / "model.gguf").read_text() == "gpt-2f32"
    (book / "llama.cpp" / "convert_hf_to_gguf.py").write_text(
        CONVERTER.replace("def main():", "def main():\n    1 / 0")
    )
    message = refused("export.py", "--llama_cpp=llama.cpp", "--overwrite=True")
    assert "convert_hf_to_gguf.py failed: ZeroDivisionError" in message and not list(book.rglob("*.part"))
    assert "there is no convert_hf_to_gguf.py" in refused("export.py", "--llama_cpp=gone", "--overwrite=True")
    run("prepare_text.py", "--inputs=book.txt", "--dataset=letters", "--tokenizer=char")
    run("train.py", *SMALL, "--dataset=letters", *LLAMA, "--out_dir=letters")
    message = refused("export.py", "--out_dir=letters", "--llama_cpp=llama.cpp")
    assert "no vocabulary of single characters" in message and not (book / "letters" / "export").exists()


def export_files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_export_goes_into_a_linked_folder_and_a_failure_keeps_the_one_before(run, refused, chars, monkeypatch):
    run("train.py", *SMALL, "--dataset=chars", "--mlp=gelu")
    (chars / "disk").mkdir()
    (chars / "link").symlink_to("disk")
    run("export.py", "--output_dir=link")
    before = export_files(chars / "disk")
    assert (chars / "link").is_symlink() and {"config.json", "model.safetensors"} <= before.keys()
    assert len({p.stat().st_mode for p in (chars / "link").iterdir()}) == 1  # whoever reads one may read all
    run("train.py", *SMALL, "--dataset=chars", "--mlp=gelu", "--seed=5")
    limited = call("export.py", "--output_dir=link", "--overwrite=True", cwd=chars, limits={"RLIMIT_FSIZE": 20_000})
    assert limited.returncode != 0 and export_files(chars / "disk") == before
    run("export.py", "--output_dir=link", "--overwrite=True")
    after = export_files(chars / "disk")
    assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"]
    run("export.py", "--output_dir=link", "--overwrite=True", "--output_format=torch")


def test_a_rename_that_fails_brings_the_former_files_back(tmp_path, monkeypatch):
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_text("old")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(5, "Input/output error")
        replace(source, target)

    with (
        pytest.raises(OSError, match="Input/output"),
        export.replaced_files(tmp_path, ["config.json", "README.md"]) as part_of,
    ):
        for name in ("config.json", "README.md"):
            part_of(name).write_text("new")
        monkeypatch.setattr(os, "replace", failing)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"config.json": "old", "README.md": "old"}


def test_all_end_tokens_are_written_back(run, tmp_path):
    save_llama(tmp_path / "m", vocab_size=150)
    (tmp_path / "m" / "tokenizer.json").write_text(foreign_tokenizer("unigram").to_str())
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    run("export.py", "--init_from=m", "--output_dir=again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [0, 2, 7]
    assert read_tokenizer(tmp_path / "again").stops == (0, 2, 7)
