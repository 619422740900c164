"""Hugging Face weights in and out: GPT-2 and Llama, one table of names for both directions.

In: read_pretrained() gives GPTConfig's arguments and weights under our names. Out: to_hugging_face() gives config.json and
weights under theirs. What an architecture lacks is refused by the name of the key.
"""

import json
import re
from dataclasses import fields
from pathlib import Path

import torch

from configurator import UserError, first_line
from model import GPT, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# Ours -> theirs. Of a tuple the matrices are concatenated by rows.
LLAMA_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LLAMA_BLOCK = {  # transformer.h.N. -> model.layers.N.
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.c_fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
    "ln_1.weight": ("input_layernorm.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
}
GPT2_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out)

# Fields of GPTConfig -> keys of config.json.
CONFIG_KEYS = {
    "gpt2": {
        "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
        "mlp_hidden": "n_inner", "norm_eps": "layer_norm_epsilon", "tie_weights": "tie_word_embeddings",
    },
    "llama": {
        "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
        "mlp_hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
        "tie_weights": "tie_word_embeddings",
    },
}  # fmt: skip
# The values of other fields that an architecture can express. A field that is listed nowhere must have its default.
EXPRESSIBLE = {
    "gpt2": {"norm": ("layernorm",), "mlp": ("gelu", "gelu_erf"), "pos": ("learned",), "bias": (True, False)},
    "llama": {"norm": ("rmsnorm",), "mlp": ("swiglu",), "pos": ("rope",), "bias": (False,)},
}
# Keys of config.json for features that are not ours, and the values that leave them off. The first is the default.
SUPPORTED = {
    "gpt2": {
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"), "quantization_config": (None,),
    },
    "llama": {
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,),
        "partial_rotary_factor": (1.0,), "quantization_config": (None,),
    },
}  # fmt: skip
NOT_IN_THE_WEIGHTS = {"dropout", "attn", "activation_checkpointing", "init", "lora_alpha"}  # any value can be exported
TITLES = {"gpt2": "GPT-2", "llama": "Llama"}


# -----------------------------------------------------------------------------
# In


def is_pretrained(name: str) -> bool:
    """Whether --init_from names a Hugging Face model: gpt2*, a folder with its config and weights, or a hub id."""
    path = Path(name)
    if name and path.is_dir():
        return not any((path / n).exists() for n in ("best.pt", "ckpt.pt")) and any(path.glob("*.safetensors"))
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".pt" and not path.parent.exists()
    return name in GPT2_NAMES or bool(hub_id)


def read_pretrained(name: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """GPTConfig's arguments, the weights under our names, and the folder, of a pretrained GPT-2 or Llama.

    name: a folder with config.json and *.safetensors, one of GPT2_NAMES, or a hub id (owner/model), downloaded once.
    Raises UserError for what is missing and, by name, for a feature of the model that is not implemented here.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"reading {name} needs two packages: pip install -e '.[hf]'") from None
    folder = Path(name) if Path(name).is_dir() else download_pretrained(name)
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arguments = arguments_from(theirs, str(folder))
    except KeyError as e:
        raise UserError(f"{folder}/config.json lacks {e.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{folder}/config.json cannot be understood: {e}") from None
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            weights |= safetensors.torch.load_file(file)
        except Exception as e:
            raise UserError(f"{file} cannot be read: {e}") from None
    if not weights:
        raise UserError(f"{folder} has no *.safetensors; save the model with safe_serialization=True")
    if theirs["model_type"] != "gpt2":
        weights = from_llama(weights, arguments["n_layer"])
    return arguments, to_our_names(weights), folder


def download_pretrained(name: str) -> Path:
    """The folder in the hub's cache with a model's files. Raises UserError if the hub does not have the model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"downloading {name} needs two packages: pip install -e '.[hf]'") from None
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as e:
        raise UserError(f"{name} is no folder here, and the hub does not have {repository}: {first_line(e)}") from None


def arguments_from(theirs: dict, where: str) -> dict:
    """GPTConfig's arguments for a transformers config.json. Raises UserError for a feature that is not ours."""
    kind = theirs.get("model_type")
    if kind not in ("gpt2", "llama", "mistral"):
        raise UserError(f"{where}: model_type {kind!r} is not supported, only gpt2, llama and mistral")
    target = "gpt2" if kind == "gpt2" else "llama"
    for key, value in theirs.items():
        is_size = key.startswith(("n_", "num_", "hidden_size", "intermediate", "vocab", "max_pos"))
        if is_size and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where}: {key}={value!r} is not a size")
    for key, supported in SUPPORTED[target].items():
        if theirs.get(key, supported[0]) not in supported:
            raise UserError(f"{where}: {key}={theirs[key]!r} is not supported, only {supported[0]!r}")
    if target == "gpt2":
        optional = {"n_inner": 0, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
        fixed = {"bias": True, "mlp": "gelu_erf" if theirs.get("activation_function") == "gelu" else "gelu"}
    else:
        rope = theirs.get("rope_parameters") or {}
        scaling = theirs.get("rope_scaling") or rope
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type != "default":
            raise UserError(f"{where}: rope scaling {rope_type!r} is not supported")
        head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
        if theirs.get("head_dim") not in (None, head_dim):
            raise UserError(f"{where}: head_dim={theirs['head_dim']!r} is not supported, only {head_dim}")
        rope_base = rope.get("rope_theta", 10000.0)
        optional = {"num_key_value_heads": 0, "rope_theta": rope_base, "tie_word_embeddings": False}
        fixed = {"bias": False, "norm": "rmsnorm", "mlp": "swiglu", "pos": "rope"}
    arguments = {}
    for ours, key in CONFIG_KEYS[target].items():
        value = theirs.get(key)
        arguments[ours] = optional[key] if value is None else value
    if "rope_base" in arguments:
        arguments["rope_base"] = float(arguments["rope_base"])
    return arguments | fixed


def from_llama(state_dict: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """A transformers Llama state dict under our names. Raises UserError for a weight that is missing or has no place here."""
    left = {n: t for n, t in state_dict.items() if not n.endswith("rotary_emb.inv_freq")}
    weights = {}
    try:
        for ours, theirs in LLAMA_TOP.items():
            if theirs in left or ours != "lm_head.weight":  # a tied head is not stored
                weights[ours] = left.pop(theirs)
        for n in range(n_layer):
            for ours, theirs in LLAMA_BLOCK.items():
                parts = [left.pop(f"model.layers.{n}.{name}") for name in theirs]
                weights[f"transformer.h.{n}.{ours}"] = torch.cat(parts)
    except KeyError as e:
        raise UserError(f"the weights do not fit this model: {e.args[0]} is missing") from None
    if left:
        raise UserError(f"the weights do not fit this model: there is no place for {min(left)}")
    return weights


def to_our_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of ours, nanoGPT's or transformers' GPT-2 under our names and in our layout.

    Prefixes of torch.compile and DDP and the buffers of attention masks are dropped, GPT-2's Conv1D matrices transposed.
    """
    clean = {}
    for name, tensor in state_dict.items():
        while name.startswith(("_orig_mod.", "module.")):
            name = name.partition(".")[2]
        name = name.replace("._orig_mod", "")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            clean[name if name.startswith(("transformer.", "lm_head.")) else "transformer." + name] = tensor
    first = clean.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.shape[1] == 3 * first.shape[0]:
        clean = {n: t.t() if n.endswith(GPT2_CONV1D) else t for n, t in clean.items()}
    return clean


# -----------------------------------------------------------------------------
# Out


def target_of(c: GPTConfig) -> str:
    """The architecture that can express a config: gpt2 or llama. Raises UserError naming the keys that neither has."""
    missing = {}
    for target, allowed in EXPRESSIBLE.items():
        allowed = allowed | ({"n_kv_head": (c.n_head,)} if target == "gpt2" else {})
        carried = CONFIG_KEYS[target].keys() | NOT_IN_THE_WEIGHTS | (set() if c.pos == "rope" else {"rope_base"})
        checked = [(f.name, getattr(c, f.name), f.default) for f in fields(c) if f.name not in carried]
        lacks = [(name, value) for name, value, default in checked if value not in allowed.get(name, (default,))]
        missing[target] = [f"{name}={value}" for name, value in lacks]
    target = min(missing, key=lambda t: len(missing[t]))
    if keys := ", ".join(missing[target]):
        closest = f"the closest, {TITLES[target]}, lacks it; --output_format=torch keeps it for these scripts"
        raise UserError(f"transformers has no model class with {keys}: {closest}")
    return target


def to_hugging_face(model: GPT) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """The architecture, transformers' config.json, and the weights under its names. Raises UserError as target_of does."""
    c, own, weights = model.config, model.state_dict(), {}
    target = target_of(c)
    config = {theirs: getattr(c, ours) for ours, theirs in CONFIG_KEYS[target].items()}
    if target == "gpt2":
        for name, tensor in own.items():
            weights[name] = tensor.t() if name.endswith(GPT2_CONV1D) else tensor
            if not c.bias and (name.endswith(GPT2_CONV1D) or "ln_" in name):  # GPT-2 always has biases
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
        config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": c.block_size}
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        return target, config | {"activation_function": "gelu_new" if c.mlp == "gelu" else "gelu"}, weights
    kv_width = c.n_kv_head * c.head_size
    rows = {"attn.c_attn.weight": (c.n_embd, kv_width, kv_width), "mlp.c_fc.weight": (c.mlp_hidden, c.mlp_hidden)}
    weights = {theirs: own[ours] for ours, theirs in LLAMA_TOP.items()}
    for n in range(c.n_layer):
        for ours, theirs in LLAMA_BLOCK.items():
            tensor = own[f"transformer.h.{n}.{ours}"]
            parts = tensor.split(rows.get(ours, len(tensor)))
            weights |= {f"model.layers.{n}.{name}": part for name, part in zip(theirs, parts)}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return target, config | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, weights
