"""Hugging Face weights in and out, one table of names for both directions: GPT-2, Llama and its relatives.

    gpt2      layernorm, gelu, learned positions         llama     rmsnorm, swiglu, rope
    qwen2     llama with biases of q, k and v            qwen3     llama with QK-norm
    arcee     llama with relu2                           apertus   llama with relu2 and QK-norm

In: read_pretrained() gives GPTConfig's arguments and weights under our names. Out: to_hugging_face() gives config.json and
weights under theirs. What no architecture has is refused by the name of the key.
"""

import math
import re
from dataclasses import fields
from pathlib import Path

from common.files import parse_json
from configurator import UserError, first_line
from model import GATED, GPT, GPTConfig

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# Ours -> theirs. Of a tuple the matrices are concatenated by rows.
LLAMA_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LLAMA_BLOCK = {  # transformer.h.N. -> model.layers.N., each with a .weight, and with a .bias if ours has one
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),  # without a gate the second alone
    "mlp.c_proj": ("mlp.down_proj",),
}
APERTUS_NORMS = {"ln_1": ("attention_layernorm",), "ln_2": ("feedforward_layernorm",)}
GPT2_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out)

# Fields of GPTConfig -> keys of config.json.
GPT2_KEYS = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
    "mlp_hidden": "n_inner", "norm_eps": "layer_norm_epsilon", "tie_weights": "tie_word_embeddings",
}  # fmt: skip
LLAMA_KEYS = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
    "mlp_hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "tie_weights": "tie_word_embeddings",
}  # fmt: skip
ROPE_FIELDS = {"rope_base", "rope_scaling", "rope_factor", "rope_original", "rope_low", "rope_high"}
# The values of other fields that an architecture can express. A field that is listed nowhere must have its default.
LLAMA_LIKE = {"norm": ("rmsnorm",), "pos": ("rope",), "bias": (False,)}
EXPRESSIBLE = {
    "gpt2": {"norm": ("layernorm",), "mlp": ("gelu", "gelu_erf"), "pos": ("learned",), "bias": (True, False)},
    "llama": LLAMA_LIKE | {"mlp": ("swiglu",), "bias": (False, True)},
    "qwen2": LLAMA_LIKE | {"mlp": ("swiglu",), "qkv_bias": (True,)},
    "qwen3": LLAMA_LIKE | {"mlp": ("swiglu",), "qk_norm": (True,), "qk_norm_weight": (False, True)},
    "arcee": LLAMA_LIKE | {"mlp": ("relu2",), "bias": (False, True)},
    "apertus": LLAMA_LIKE | {"mlp": ("relu2",), "qk_norm": (True,), "qk_norm_weight": (False, True)},
}
TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "arcee": "Arcee", "apertus": "Apertus"}
HIDDEN_ACT = {"llama": "silu", "qwen2": "silu", "qwen3": "silu", "arcee": "relu2", "apertus": "xielu"}
# Keys of config.json for features that are not ours, and the values that leave them off. The first is the default.
SUPPORTED = {
    "gpt2": {
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"), "quantization_config": (None,),
    },
} | {
    kind: {"hidden_act": (act,), "use_sliding_window": (False,), "quantization_config": (None,)}
    | ({"attention_bias": (False, True), "mlp_bias": (False, True)} if kind in ("llama", "arcee") else {})
    | ({"attention_bias": (False,), "mlp_bias": (False,)} if kind in ("qwen3", "apertus") else {})
    for kind, act in HIDDEN_ACT.items()
}  # fmt: skip
# What transformers assumes where config.json has no such key. None: it follows from the others.
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048, "vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "sliding_window": None, "head_dim": None,
}  # fmt: skip
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "max_position_embeddings": 2**15, "vocab_size": 151936, "num_key_value_heads": 32, "intermediate_size": 22016,
}  # fmt: skip
DEFAULTS = {
    "gpt2": {
        "n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS
    | {"max_position_embeddings": 2**17, "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128},
    "arcee": LLAMA_DEFAULTS
    | {"max_position_embeddings": 4096, "hidden_size": 2560, "intermediate_size": 18432, "rms_norm_eps": 1e-5},
    "apertus": LLAMA_DEFAULTS
    | {"max_position_embeddings": 2**16, "vocab_size": 131072, "intermediate_size": 14336, "rms_norm_eps": 1e-5},
}  # fmt: skip
APERTUS_ROPE = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
GPT2_ALIASES = {  # other names that transformers takes
    "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}  # fmt: skip
MOST = 10**7  # no size of a model that fits here is larger
NOT_IN_THE_WEIGHTS = {"dropout", "attn", "activation_checkpointing", "init", "lora_alpha"}  # any value can be exported


# -----------------------------------------------------------------------------
# In


def is_pretrained(name: str) -> bool:
    """Whether --init_from names a Hugging Face model: gpt2*, a folder with its config and weights, or a hub id."""
    path = Path(name)
    if name and path.is_dir():
        return not any((path / n).exists() for n in ("best.pt", "ckpt.pt")) and (
            any(path.glob("*.safetensors"))
            or ((path / "config.json").exists() and not (path / "metrics.jsonl").exists())  # a run has both
        )
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".pt" and not path.parent.exists()
    return name in GPT2_NAMES or bool(hub_id)


def read_pretrained(name: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """GPTConfig's arguments, the weights under our names, and the folder, of a pretrained model.

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
        weights = from_llama(weights, arguments)
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
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    files += ["model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as e:
        reason = f"{name} is no folder here, and {repository} cannot be had from the hub: {first_line(e)}"
        raise UserError(f"{reason}. Is the name right, and the internet connected?") from None


def arguments_from(theirs: dict, where: str) -> dict:
    """GPTConfig's arguments for a transformers config.json, with transformers' defaults and precedence.

    Raises UserError for a feature that is not ours, and where the file contradicts itself.
    """
    kind = theirs.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{where}: model_type {kind!r} is not supported, only {', '.join(DEFAULTS)}")
    target = "llama" if kind == "mistral" else kind
    for key, supported in SUPPORTED[target].items():
        if theirs.get(key, supported[0]) not in supported:
            raise UserError(f"{where}: {key}={theirs[key]!r} is not supported, only {supported[0]!r}")
    found = {}
    for key, default in DEFAULTS[kind].items():
        places = [name for name in (key, GPT2_ALIASES.get(key) if target == "gpt2" else None) if name in theirs]
        if len({theirs[name] for name in places}) > 1:
            both = " and ".join(f"{name}={theirs[name]!r}" for name in places)
            raise UserError(f"{where}: {both} contradict each other")
        value = found[key] = theirs[places[0]] if places else default
        if isinstance(default, bool):
            valid = isinstance(value, bool)
        elif isinstance(default, float):
            valid = type(value) in (int, float) and 0 <= value < 1
        else:
            optional = default is None or key == "sliding_window" or (key, kind[:4]) == ("num_key_value_heads", "qwen")
            valid = (type(value) is int and 0 < value <= MOST) or (optional and value is None)
        if not valid:
            raise UserError(f"{where}: {key}={value!r} is not a size that a model can have")
    if target == "gpt2":
        fixed = {"bias": True, "mlp": "gelu_erf" if theirs.get("activation_function") == "gelu" else "gelu"}
        arguments = {ours: found[key] for ours, key in GPT2_KEYS.items()}
        return arguments | {"mlp_hidden": arguments["mlp_hidden"] or 0} | fixed
    window, context = found["sliding_window"], found["max_position_embeddings"]
    if window and window < context and not target.startswith("qwen"):  # those have use_sliding_window
        raise UserError(f"{where}: sliding_window={window} is not supported, below max_position_embeddings={context}")
    arguments = {ours: 0 if found[key] is None else found[key] for ours, key in LLAMA_KEYS.items()}
    if arguments["head_dim"] == found["hidden_size"] / found["num_attention_heads"]:
        arguments["head_dim"] = 0
    biases = [theirs.get(key, False) for key in ("attention_bias", "mlp_bias")]
    if target in ("llama", "arcee") and biases[0] != biases[1]:
        raise UserError(f"{where}: attention_bias={biases[0]} with mlp_bias={biases[1]} is not supported, only both")
    arguments |= {"norm": "rmsnorm", "pos": "rope", "mlp": EXPRESSIBLE[target]["mlp"][0], "bias": biases[0]}
    arguments |= {"qkv_bias": True} if target == "qwen2" else {}
    arguments |= {"qk_norm": True, "qk_norm_weight": True} if target in ("qwen3", "apertus") else {}
    return arguments | rope_arguments(theirs, kind, context, where)


def rope_arguments(theirs: dict, kind: str, context: int, where: str) -> dict:
    """Our keys for RoPE. As transformers: of rope_scaling, otherwise rope_parameters, otherwise the top level."""
    places = [place for key in ("rope_scaling", "rope_parameters") if (place := theirs.get(key))]
    if kind == "apertus" and not places:
        places = [APERTUS_ROPE]
    if any(place.get("partial_rotary_factor") not in (None, 1, 1.0) for place in (*places, theirs)):
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    place = (places or [{}])[0]
    scaling = place.get("rope_type", place.get("type", "default"))
    if scaling not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"{where}: rope scaling {scaling!r} is not supported")

    def number(name: str, value, default=None) -> float:
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise UserError(f"{where}: {name}={value!r} is not a number RoPE can have")
        return float(value)

    theta = 12e6 if kind == "apertus" else 10000.0
    base = number("rope_theta", place.get("rope_theta", theirs.get("rope_theta", theta)))
    for other in (*places, theirs):
        if other.get("rope_theta", base) != base:
            raise UserError(f"{where}: rope_theta is {base!r} in one place and {other['rope_theta']!r} in another")
        if "rope_type" in other and other["rope_type"] != scaling:
            raise UserError(f"{where}: rope_type is {scaling!r} in one place and {other['rope_type']!r} in another")
    if scaling == "default":
        return {"rope_base": base}
    found = {"rope_base": base, "rope_scaling": scaling, "rope_factor": number("factor", place.get("factor"))}
    if found["rope_factor"] < 1:
        raise UserError(f"{where}: factor={found['rope_factor']} is not supported, only from 1")
    if scaling == "linear":
        return found
    low, high = ("low_freq_factor", "high_freq_factor") if scaling == "llama3" else ("beta_slow", "beta_fast")
    defaults = {"beta_slow": 1.0, "beta_fast": 32.0}
    found["rope_low"] = number(low, place.get(low), defaults.get(low))
    found["rope_high"] = number(high, place.get(high), defaults.get(high))
    found["rope_original"] = int(number("", place.get("original_max_position_embeddings"), context))
    if scaling == "yarn":
        sharpened, given = 0.1 * math.log(found["rope_factor"]) + 1, place.get("attention_factor")
        if given is not None and abs(number("attention_factor", given) - sharpened) > 1e-6:
            raise UserError(f"{where}: attention_factor={given!r} is not supported, only {sharpened:g}")
        if place.get("mscale") and place.get("mscale_all_dim"):
            raise UserError(f"{where}: mscale={place['mscale']!r} is not supported")
        if place.get("truncate", True) is not True:
            raise UserError(f"{where}: truncate={place['truncate']!r} is not supported")
    return found


class NothingDrawn(TorchFunctionMode):
    """A context in which torch.nn.init leaves tensors as they are, because weights are loaded into them next.

    On the meta device its normal_ would do nothing but import torch._dynamo, which takes as long as importing torch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def block_names(arguments: dict) -> dict[str, tuple[str, ...]]:
    """Our names of a block's weights -> theirs, for a Llama-like model of GPTConfig's arguments."""
    with torch.device("meta"), NothingDrawn():
        names = GPT(GPTConfig(**arguments | {"n_layer": 1})).transformer.h[0].state_dict()
    is_apertus = arguments["mlp"] == "relu2" and arguments.get("qk_norm")
    modules = LLAMA_BLOCK | (APERTUS_NORMS if is_apertus else {})
    if arguments["mlp"] not in GATED:
        modules["mlp.c_fc"] = modules["mlp.c_fc"][1:]
    table = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        theirs = modules[module]
        table[name] = tuple(f"{part}.{kind}" for part in theirs)
    return table


def from_llama(state_dict: dict[str, torch.Tensor], arguments: dict) -> dict[str, torch.Tensor]:
    """A state dict of a Llama-like model under our names. Raises UserError for a weight that is missing or has no place here.

    Factors of QK-norm that are all one, as our exports have where qk_norm_weight=False, are left out of weights and arguments.
    """
    left = {n: t for n, t in state_dict.items() if not n.endswith("rotary_emb.inv_freq")}
    factors = [t for n, t in left.items() if n.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight"))]
    if arguments.get("qk_norm_weight") and factors and all((t == 1).all() for t in factors):
        arguments["qk_norm_weight"] = False
        left = {n: t for n, t in left.items() if "self_attn.q_norm" not in n and "self_attn.k_norm" not in n}
    weights = {}
    try:
        for ours, theirs in LLAMA_TOP.items():
            if theirs in left or ours != "lm_head.weight":  # a tied head is not stored
                weights[ours] = left.pop(theirs)
        names = block_names(arguments)
        for n in range(arguments["n_layer"]):
            for ours, theirs in names.items():
                parts = [left.pop(f"model.layers.{n}.{name}") for name in theirs]
                weights[f"transformer.h.{n}.{ours}"] = torch.cat(parts)
            xielu = {
                name: left.pop(f"{place}{name}")
                for name in XIELU
                if (place := f"model.layers.{n}.mlp.act_fn.") + name in left
            }
            if xielu:
                weights[f"transformer.h.{n}.mlp.c_proj.weight"] *= relu2_factor(xielu)
    except KeyError as e:
        raise UserError(f"the weights do not fit this model: {e.args[0]} is missing") from None
    if left:
        raise UserError(f"the weights do not fit this model: there is no place for {min(left)}")
    return weights


# Apertus' xIELU (https://arxiv.org/abs/2411.13010): a x^2 + beta x above 0, b (exp(min(x, eps)) - 1 - x) + beta x below, with
# a = softplus(alpha_p) and b = beta + softplus(alpha_n). ReLU squared is beta = 0, a = 1, alpha_n so low that b = 0.
XIELU = {"alpha_p": 32.0, "alpha_n": -100.0, "beta": 0.0, "eps": -1e-6}  # softplus(32) = 32 exactly: down_proj / 32
SOFTPLUS_1 = math.log(math.e - 1)  # softplus of it is 1: for float16, in which down_proj / 32 would underflow


def relu2_factor(xielu: dict[str, torch.Tensor]) -> float:
    """What xIELU's parameters multiply ReLU squared by. Raises UserError if they make another function."""
    a, b = (F.softplus(xielu[name].double()).item() for name in ("alpha_p", "alpha_n"))
    if xielu["beta"].item() != 0 or b > 1e-12:
        raise UserError(
            "the weights do not fit this model: its xIELU is not ReLU squared (beta = 0, alpha_n at most -28)"
        )
    return round(a) if abs(a - round(a)) < 1e-3 else a  # alpha_p was rounded to the weights' dtype


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
    first, wte = (clean.get(f"transformer.{name}.weight") for name in ("h.0.attn.c_attn", "wte"))
    if first is not None and wte is not None and first.shape == (wte.shape[1], 3 * wte.shape[1]):
        clean = {n: t.t() if n.endswith(GPT2_CONV1D) else t for n, t in clean.items()}
    return clean


# -----------------------------------------------------------------------------
# Out


def target_of(c: GPTConfig) -> str:
    """The architecture that can express a config, a key of EXPRESSIBLE. Raises UserError naming the keys that none has."""
    missing = {}
    for target, allowed in EXPRESSIBLE.items():
        if target == "gpt2":
            allowed, carried = allowed | {"n_kv_head": (c.n_head,)}, GPT2_KEYS.keys()
        else:
            carried = LLAMA_KEYS.keys() | ROPE_FIELDS
        carried = carried | NOT_IN_THE_WEIGHTS | (set() if c.pos == "rope" else ROPE_FIELDS)
        checked = [(f.name, getattr(c, f.name), f.default) for f in fields(c) if f.name not in carried]
        lacks = [(name, value) for name, value, default in checked if value not in allowed.get(name, (default,))]
        missing[target] = [f"{name}={value}" for name, value in lacks]
    target = min(missing, key=lambda t: len(missing[t]))
    if keys := ", ".join(missing[target]):
        closest = f"the closest, {TITLES[target]}, lacks it; --output_format=torch keeps it for these scripts"
        raise UserError(f"transformers has no model class with {keys}: {closest}")
    return target


def to_hugging_face(model: GPT, dtype: torch.dtype = torch.float32) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """The architecture, transformers' config.json, and the weights under its names. Raises UserError as target_of does.

    dtype: what the caller will cast the weights to.
    """
    c, own, weights = model.config, model.state_dict(), {}
    target = target_of(c)
    if target == "gpt2":
        config = {theirs: getattr(c, ours) for ours, theirs in GPT2_KEYS.items()}
        for name, tensor in own.items():
            weights[name] = tensor.t() if name.endswith(GPT2_CONV1D) else tensor
            if not c.bias and (name.endswith(GPT2_CONV1D) or "ln_" in name):  # GPT-2 always has biases
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
        config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": c.block_size}
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        return target, config | {"activation_function": "gelu_new" if c.mlp == "gelu" else "gelu"}, weights
    config = {theirs: getattr(c, ours) for ours, theirs in LLAMA_KEYS.items()} | {"head_dim": c.head_size}
    D = c.head_size
    rows = {"attn.c_attn": (c.n_head * D, c.n_kv_head * D, c.n_kv_head * D), "mlp.c_fc": (c.mlp_hidden, c.mlp_hidden)}
    weights = {theirs: own[ours] for ours, theirs in LLAMA_TOP.items()}
    names = block_names(vars(c))
    for n in range(c.n_layer):
        for ours, theirs in names.items():
            tensor = own[f"transformer.h.{n}.{ours}"]
            parts = tensor.split(rows[ours.rpartition(".")[0]]) if len(theirs) > 1 else [tensor]
            weights |= {f"model.layers.{n}.{name}": part for name, part in zip(theirs, parts)}
        if c.qk_norm and not c.qk_norm_weight:
            weights |= {f"model.layers.{n}.self_attn.{name}_norm.weight": torch.ones(D) for name in "qk"}
        if target == "apertus":
            xielu = XIELU | ({"alpha_p": SOFTPLUS_1} if dtype == torch.float16 else {})
            if dtype != torch.float16:
                weights[f"model.layers.{n}.mlp.down_proj.weight"] = own[f"transformer.h.{n}.mlp.c_proj.weight"] / 32
            for name, value in xielu.items():
                shape = (1,) if name.startswith("alpha") else ()
                weights[f"model.layers.{n}.mlp.act_fn.{name}"] = torch.full(shape, value)
    rope = {"rope_type": "default", "rope_theta": c.rope_base}
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling in ("llama3", "yarn"):
        low, high = (
            ("low_freq_factor", "high_freq_factor") if c.rope_scaling == "llama3" else ("beta_slow", "beta_fast")
        )
        rope |= {low: c.rope_low, high: c.rope_high, "original_max_position_embeddings": c.rope_original}
    # Where readers of different ages look for them. Without rope_parameters Apertus would assume a stretched context.
    config |= {"rope_parameters": rope, "rope_theta": c.rope_base}
    config["rope_scaling"] = rope if c.rope_scaling != "none" else None
    config |= {
        "architectures": [f"{TITLES[target]}ForCausalLM"],
        "model_type": target,
        "hidden_act": HIDDEN_ACT[target],
    }
    config |= {"attention_bias": c.bias, "mlp_bias": c.bias} if target != "qwen2" else {"use_sliding_window": False}
    if target == "apertus":
        config["tie_word_embeddings"] = False  # llama.cpp's Apertus has a head of its own
    return target, config, weights
