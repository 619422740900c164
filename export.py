"""A run as a folder that other tools load: transformers, and what builds on it.

    python export.py                                  the newest run under out/, to export/ inside it
    python export.py --out_dir=out/mine --output_dir=mine-gpt
    python export.py --format=torch                   one file of weights, arguments and tokenizer, without the optimizer

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("mine-gpt"), AutoTokenizer.from_pretrained("mine-gpt")

A model with layernorm, gelu and learned positions becomes a GPT-2, one with rmsnorm, swiglu, rope and no biases a Llama;
biases that GPT-2 has and ours lacks are zeros. What neither has is refused by its name.
Leaves config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json and README.md.
"""

import contextlib
import json
import os
import shlex
import shutil
from pathlib import Path

import torch

from common.checkpoint import find_checkpoint, find_tokenizer, is_pretrained, load_model, newest_run, save_checkpoint
from common.shards import atomic_write
from common.tokenizer import Tokenizer
from configurator import configure, short_errors
from model import GPT, GPTConfig

out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | a Hugging Face folder or id
output_dir = ""  # folder to write; empty: export/ in the run's folder
format = "hf"  # hf: for transformers | torch: model.pt, which our scripts load
dtype = "float32"  # of the weights: float32 | bfloat16 | float16
overwrite = False  # replace what an export left there before
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
FILES |= {"README.md", "model.pt"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEEDS = {  # of each target, key -> values; the first is what a message names
    "gpt2": {"norm": ("layernorm",), "mlp": ("gelu", "gelu_erf"), "pos": ("learned",)},
    "llama": {"norm": ("rmsnorm",), "mlp": ("swiglu",), "pos": ("rope",), "bias": (False,)},
}


def target_of(c: GPTConfig) -> str:
    """gpt2 or llama. Raises ValueError naming the switches that neither has."""
    wrong = [f"{key}={value}" for key, value in (("qk_norm", c.qk_norm), ("logit_softcap", c.logit_softcap)) if value]
    lacks = {
        t: [f"{k}={getattr(c, k)}" for k, v in needs.items() if getattr(c, k) not in v] for t, needs in NEEDS.items()
    }
    if c.n_kv_head != c.n_head:
        lacks["gpt2"].append(f"n_kv_head={c.n_kv_head}")
    target = min(lacks, key=lambda t: len(lacks[t]))
    if wrong or lacks[target]:
        name = {"gpt2": "GPT-2", "llama": "Llama"}[target]
        raise ValueError(
            f"there is no model of transformers for {', '.join(wrong + lacks[target])}: {name}, the closest, does not have "
            "it; --format=torch keeps it for our own scripts"
        )
    return target


def gpt2_export(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """transformers' config.json and weights of a GPT-2; its Conv1D matrices are (in, out)."""
    c, weights = model.config, {}
    for name, tensor in model.state_dict().items():
        conv1d = ".h." in name and name.endswith(".weight") and "ln_" not in name
        weights[name] = tensor.t() if conv1d else tensor
        if not c.bias and (conv1d or "ln_" in name):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.block_size,
        "n_ctx": c.block_size, "n_embd": c.n_embd,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": c.mlp_hidden, "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new" if c.mlp == "gelu" else "gelu", "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout, "tie_word_embeddings": c.tie_weights,
    }  # fmt: skip
    return config, weights


def llama_export(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """transformers' config.json and weights of a Llama: what pretrained.llama_to_gpt reads, the other way."""
    c, own = model.config, model.state_dict()
    K = c.n_kv_head * c.head_size
    weights = {
        "model.embed_tokens.weight": own["transformer.wte.weight"],
        "model.norm.weight": own["transformer.ln_f.weight"],
    }
    weights["lm_head.weight"] = own["lm_head.weight"]
    for i in range(c.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        qkv = own[ours + "attn.c_attn.weight"].split((c.n_embd, K, K))
        gate_up = own[ours + "mlp.c_fc.weight"].chunk(2)
        weights |= {f"{theirs}self_attn.{n}_proj.weight": t for n, t in zip("qkv", qkv)}
        weights |= {f"{theirs}mlp.{n}_proj.weight": t for n, t in zip(("gate", "up"), gate_up)}
        weights[theirs + "self_attn.o_proj.weight"] = own[ours + "attn.c_proj.weight"]
        weights[theirs + "mlp.down_proj.weight"] = own[ours + "mlp.c_proj.weight"]
        weights[theirs + "input_layernorm.weight"] = own[ours + "ln_1.weight"]
        weights[theirs + "post_attention_layernorm.weight"] = own[ours + "ln_2.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": c.block_size,
        "hidden_size": c.n_embd, "intermediate_size": c.mlp_hidden, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": c.tie_weights,
    }  # fmt: skip
    return config, weights


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot is not None:
        eot = tokenizer.token_bytes(tokenizer.eot).decode()
        pretrained = tokenizer.to_dict()["kind"] == "pretrained"  # what it begins with is in its tokenizer.json
        config |= {"eos_token": eot} | ({} if pretrained else {"bos_token": eot, "unk_token": eot})
    return {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": json.dumps(config, indent=1)}


def read_json(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):  # it is for the card alone
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def model_card(name: str, model: GPT, config: dict, results: dict, target: str) -> str:
    """README.md: what it is, how good, on what, and by which command."""
    c = model.config
    sizes = (
        f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size:,}"
    )
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", ""]
    base = {"resume": "scratch"}.get(config.get("init_from"), config.get("init_from"))
    made = f"trained from {base}" if base else "converted"
    lines += [f"A {target} model of {model.num_params():,} parameters ({sizes}), {made} with flatgpt.", ""]
    facts = {
        "trained on": config.get("dataset"),
        "steps": results.get("total_steps"),
        "tokens": results.get("tokens"),
        "validation loss (nats a token)": results.get("final_val_loss"),
        "validation perplexity": results.get("final_val_perplexity"),
        "HellaSwag acc_norm": results.get("hellaswag_acc_norm"),
        "training time (s)": results.get("train_seconds"),
        "device": results.get("device"),
        "torch": results.get("versions", {}).get("torch"),
        "commit": results.get("git_commit"),
    }
    rows = [
        (k, f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v)
        for k, v in facts.items()
        if v
    ]
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""] if rows else []
    if config:
        keys = (
            "init_from seed dataset data_fraction batch_size block_size gradient_accumulation_steps max_iters optimizer "
            "learning_rate min_lr embedding_lr head_lr vector_lr schedule warmup_iters lr_decay_iters decay_fraction decay_lr "
            "weight_decay beta1 beta2 momentum grad_clip label_smoothing"
        ).split()
        keys += [k for k in GPTConfig.__dataclass_fields__ if k in config and k not in keys]
        command = shlex.join(f"--{k}={config[k]}" for k in keys if k in config)
        lines += ["```sh", f"python train.py {command}", "```", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    lines += ['ids = tokenizer("Once upon a time", return_tensors="pt").input_ids']
    lines += ["print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))", "```", ""]
    return "\n".join(lines)


def export(model: GPT, payload: dict, tokenizer: Tokenizer, folder: Path, results: dict) -> None:
    """Write the folder for transformers: all of it, or nothing."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("exporting needs the safetensors package: pip install -e '.[hf]'") from None
    model.merge_lora()
    target = target_of(model.config)
    known = min(model.config.vocab_size, tokenizer.n_vocab)
    config, weights = {"gpt2": gpt2_export, "llama": llama_export}[target](model)
    config |= {"vocab_size": known, "torch_dtype": dtype}
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": min(200, known)}
    if tokenizer.eot is not None:
        config |= {"eos_token_id": tokenizer.eot}
        sampling |= {"eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot}
    else:
        config |= {"eos_token_id": None}
    config["bos_token_id"] = None if tokenizer.to_dict()["kind"] == "pretrained" else tokenizer.eot
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    for name in weights:
        rows = known if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")) else None
        weights[name] = weights[name][:rows].to(DTYPES[dtype]).contiguous().clone()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        safetensors.torch.save_file(weights, part / "model.safetensors", {"format": "pt"})
        files = tokenizer_files(tokenizer, model.config.block_size)
        files |= {"config.json": json.dumps(config, indent=1), "generation_config.json": json.dumps(sampling, indent=1)}
        files["README.md"] = model_card(folder.name, model, payload.get("config", {}), results, target)
        for name, text in files.items():
            atomic_write(part / name, text)
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        if type(e).__name__ == "SafetensorError":
            raise OSError(f"{folder} could not be written: {e}") from None
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    print(f"{folder}: {target}, {model.num_params():,} parameters in {dtype}, vocabulary {known:,}")


def main() -> None:
    if format not in ("hf", "torch"):
        raise ValueError(f"--format={format}: choose hf or torch")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: choose one of {', '.join(DTYPES)}")
    name = init_from if init_from != "resume" else out_dir or str(newest_run())
    model, payload = load_model(name)
    tokenizer = find_tokenizer(payload, data_dir)
    run = Path(".") if is_pretrained(name) else find_checkpoint(name).parent
    folder = Path(output_dir) if output_dir else run / "export"
    if folder.resolve() in (Path.cwd(), run.resolve(), Path(name).resolve()):
        raise ValueError(f"--output_dir={folder}: an export takes a folder of its own")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder} is there already: choose another --output_dir, or --overwrite=True")
        if foreign := sorted({p.name for p in folder.iterdir()} - FILES):
            raise ValueError(f"{folder} holds {foreign[0]}, which is not an export's: choose another --output_dir")
    if format == "hf":
        return export(model, payload, tokenizer, folder, read_json(run / "results.json"))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: t.to(DTYPES[dtype]) for n, t in model.state_dict().items()}
    keep = {k: payload[k] for k in ("model_args", "config", "step") if k in payload}
    save_checkpoint(folder / "model.pt", {"model": weights, **keep, "tokenizer": tokenizer.to_dict()})
    print(
        f"{folder / 'model.pt'}: {model.num_params():,} parameters in {dtype}, loaded by --init_from={folder / 'model.pt'}"
    )


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
