"""export.py: transformers loads what it writes, with the same logits, text and tokens as ours."""

import json
import os

import pytest
import torch
import transformers
from conftest import SMALL, TEXT, call
from test_pretrained import save_llama
from test_tokenizer import foreign_tokenizer

import export
from common.checkpoint import load_model
from common.tokenizer import read_tokenizer, tokenizer_from_dict

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
    options = ["--start=line", "--temperature=0", "--max_new_tokens=20"]
    texts = [run("sample.py", f"--init_from={name}", *options) for name in ("out/export", "out/ckpt.pt")]
    assert texts[0] == texts[1]


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


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["--mlp=relu2"], "mlp=relu2: the closest, GPT-2, lacks it"),
        (["--qk_norm=True"], "qk_norm=True"),
        (["--logit_softcap=20.0"], "logit_softcap=20.0"),
        (["--norm=rmsnorm", "--mlp=swiglu", "--pos=none"], "pos=none: the closest, Llama"),
        (["--norm=rmsnorm", "--mlp=swiglu", "--pos=rope", "--bias=True"], "bias=True: the closest, Llama"),
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


def export_files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_export_goes_into_a_linked_folder_and_a_failure_keeps_the_one_before(run, refused, chars, monkeypatch):
    run("train.py", *SMALL, "--dataset=chars", "--mlp=gelu")
    (chars / "disk").mkdir()
    (chars / "link").symlink_to("disk")
    run("export.py", "--output_dir=link")
    before = export_files(chars / "disk")
    assert (chars / "link").is_symlink() and {"config.json", "model.safetensors"} <= before.keys()
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
