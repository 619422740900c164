"""Hugging Face weights in and out: GPT-2 and Llama, one table of names for both directions.

In: read_pretrained() gives GPTConfig's arguments and weights under our names. Out: to_hugging_face() gives config.json and
weights under theirs. What an architecture lacks is refused by the name of the key.
"""

import re
from dataclasses import fields
from pathlib import Path

import torch

from common.files import parse_json
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
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,),
    },
}  # fmt: skip
# What transformers assumes where config.json has no such key. None: it follows from the others.
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048, "vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
DEFAULTS = {
    "gpt2": {
        "n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS
    | {"max_position_embeddings": 2**17, "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
}  # fmt: skip
GPT2_ALIASES = {  # other names that transformers takes
    "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}  # fmt: skip
MOST = 10**7  # no size of a model that fits here is larger
NOT_IN_THE_WEIGHTS = {"dropout", "attn", "activation_checkpointing", "init", "lora_alpha"}  # any value can be exported
TITLES = {"gpt2": "GPT-2", "llama": "Llama"}


# -----------------------------------------------------------------------------
# In


def is_pretrained(name: str) -> bool:
    """Whether --init_from names a Hugging Face model: gpt2*, a folder with its config and weights, or a hub id."""
    path = Path(name)
    if name and path.is_dir():
        return not any((path / n).exists() for n in ("best.pt", "ckpt.pt")) and (
            any(path.glob("*.safetensors")) or (path / "config.json").exists()
        )
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".pt" and not path.parent.exists()
    return name in GPT2_NAMES or bool(hub_id)


def read_pretrained(name: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """GPTConfig's arguments, the weights under our names, and the folder, of a pretrained GPT-2 or Llama.

    name: a folder with config.json and safetensors, one of GPT2_NAMES, or a hub id (owner/model), downloaded once.
    Raises UserError for what is missing and, by name, for a feature of the model that is not implemented here.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"reading {name} needs two packages: pip install -e '.[hf]'") from None
    folder = Path(name) if Path(name).is_dir() else download_pretrained(name)
    try:
        theirs = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        arguments = arguments_from(theirs, str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}/config.json cannot be understood: {e or type(e).__name__}") from None
    weights = {}
    for file in weight_files(folder):
        try:
            weights |= safetensors.torch.load_file(file)
        except Exception as e:
            raise UserError(f"{file} cannot be read: {e}") from None
    for weight, tensor in weights.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and tensor.dim() > 1:
            raise UserError(f"{folder}: {weight} holds {tensor.dtype}, only float32, bfloat16 and float16 are read")
    if theirs["model_type"] != "gpt2":
        weights = from_llama(weights, arguments["n_layer"])
    weights = to_our_names(weights)
    rows = len(weights.get("transformer.wte.weight", ()))
    if 0 < rows < arguments["vocab_size"]:
        raise UserError(
            f"{folder}: the embedding has {rows:,} rows, config.json says vocab_size={arguments['vocab_size']}"
        )
    return arguments, weights, folder


def weight_files(folder: Path) -> list[Path]:
    """As transformers chooses them: model.safetensors, otherwise those its index names; otherwise the only one there is."""
    whole, index, found = (folder / "model.safetensors"), folder / "model.safetensors.index.json", []
    if whole.exists():
        return [whole]
    if index.exists():
        try:
            names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name or "\\" in name or name == ".."]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} cannot be understood: {e!r}") from None
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which is not a file of this folder")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{folder} lacks {missing[0]}, which {index.name} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder} has no *.safetensors; save the model with safe_serialization=True")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{folder} holds {names} and no {index.name}: rename the one to use to model.safetensors")
    return found


def download_pretrained(name: str) -> Path:
    """The folder in the hub's cache with a model's files. Raises UserError if the hub does not have the model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"downloading {name} needs two packages: pip install -e '.[hf]'") from None
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    files += ["model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as e:
        raise UserError(f"{name} is no folder here, and the hub does not have {repository}: {first_line(e)}") from None


def arguments_from(theirs: dict, where: str) -> dict:
    """GPTConfig's arguments for a transformers config.json, with transformers' defaults and precedence.

    Raises UserError for a feature that is not ours, and where the file contradicts itself.
    """
    kind = theirs.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{where}: model_type {kind!r} is not supported, only {', '.join(DEFAULTS)}")
    target = "gpt2" if kind == "gpt2" else "llama"
    for key, supported in SUPPORTED[target].items():
        if theirs.get(key, supported[0]) not in supported:
            raise UserError(f"{where}: {key}={theirs[key]!r} is not supported, only {supported[0]!r}")
    found = {}
    for key, default in DEFAULTS[kind].items():
        places = [name for name in (key, GPT2_ALIASES.get(key) if target == "gpt2" else None) if name in theirs]
        if len({theirs[name] for name in places}) > 1:
            raise UserError(
                f"{where}: {' and '.join(f'{name}={theirs[name]!r}' for name in places)} contradict each other"
            )
        value = found[key] = theirs[places[0]] if places else default
        if isinstance(default, bool):
            valid = isinstance(value, bool)
        elif isinstance(default, float):
            valid = type(value) in (int, float) and 0 <= value < 1
        else:
            optional = default is None or key == "sliding_window"
            valid = (type(value) is int and 0 < value <= MOST) or (optional and value is None)
        if not valid:
            raise UserError(f"{where}: {key}={value!r} is not a size that a model can have")
    if target == "gpt2":
        fixed = {"bias": True, "mlp": "gelu_erf" if theirs.get("activation_function") == "gelu" else "gelu"}
    else:
        window, context = found["sliding_window"], found["max_position_embeddings"]
        if window and window < context:
            raise UserError(
                f"{where}: sliding_window={window} is not supported, below max_position_embeddings={context}"
            )
        head_dim = found["hidden_size"] / found["num_attention_heads"]
        if theirs.get("head_dim") not in (None, head_dim):
            raise UserError(f"{where}: head_dim={theirs['head_dim']!r} is not supported, only {head_dim:g}")
        fixed = {
            "bias": False,
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "pos": "rope",
            "rope_base": rope_base(theirs, where),
        }
    arguments = {ours: found[key] for ours, key in CONFIG_KEYS[target].items() if key in found}
    arguments |= {key: 0 for key in ("mlp_hidden", "n_kv_head") if key in arguments and arguments[key] is None}
    return arguments | fixed


def rope_base(theirs: dict, where: str) -> float:
    """RoPE's theta. As transformers: of rope_scaling, otherwise rope_parameters, otherwise the top level."""
    places = [place for key in ("rope_scaling", "rope_parameters") if (place := theirs.get(key))]
    for place in places:
        kind = place.get("rope_type", place.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: rope scaling {kind!r} is not supported")
    if any(place.get("partial_rotary_factor") not in (None, 1, 1.0) for place in (*places, theirs)):
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    base = (places or [{}])[0].get("rope_theta", theirs.get("rope_theta", 10000.0))
    if type(base) not in (int, float) or not 0 < base < 1e15:
        raise UserError(f"{where}: rope_theta={base!r} is not a base")
    if others := {repr(place["rope_theta"]) for place in (*places, theirs) if place.get("rope_theta", base) != base}:
        raise UserError(f"{where}: rope_theta is {base!r} in one place and {', '.join(others)} in another")
    return float(base)


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
