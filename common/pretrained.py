"""Other people's weights: GPT-2 and Llama in Hugging Face's format, from a folder or the hub, under our names."""

import contextlib
import json
from pathlib import Path

import torch

from configurator import first_line
from model import clean_state_dict


def llama_to_gpt(state_dict: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """A transformers Llama state dict under our names: q, k, v in one matrix, gate and up in one.

    Raises ValueError for a weight that is missing or has no place here.
    """
    left = {n: t for n, t in state_dict.items() if not n.endswith("rotary_emb.inv_freq")}
    try:
        out = {"transformer.wte.weight": left.pop("model.embed_tokens.weight")}
        out["transformer.ln_f.weight"] = left.pop("model.norm.weight")
        for i in range(n_layer):
            theirs, ours = f"model.layers.{i}.", f"transformer.h.{i}."
            qkv = [left.pop(f"{theirs}self_attn.{n}_proj.weight") for n in "qkv"]
            out[ours + "attn.c_attn.weight"] = torch.cat(qkv)
            out[ours + "attn.c_proj.weight"] = left.pop(theirs + "self_attn.o_proj.weight")
            out[ours + "mlp.c_fc.weight"] = torch.cat(
                [left.pop(f"{theirs}mlp.{n}_proj.weight") for n in ("gate", "up")]
            )
            out[ours + "mlp.c_proj.weight"] = left.pop(theirs + "mlp.down_proj.weight")
            out[ours + "ln_1.weight"] = left.pop(theirs + "input_layernorm.weight")
            out[ours + "ln_2.weight"] = left.pop(theirs + "post_attention_layernorm.weight")
    except KeyError as e:
        raise ValueError(f"the weights do not fit this model: {e.args[0]} is missing") from None
    if "lm_head.weight" in left:
        out["lm_head.weight"] = left.pop("lm_head.weight")
    if left:
        raise ValueError(f"the weights do not fit this model: there is no place for {min(left)}")
    return out


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def read_pretrained(name: str) -> tuple[dict, dict[str, torch.Tensor], Path]:
    """GPTConfig's arguments, the weights under our names, and the folder, of a pretrained GPT-2 or Llama.

    name: a folder with config.json and *.safetensors, one of GPT2_NAMES, or a hub id (owner/model), downloaded once.
    Raises ValueError for what is missing and, by name, for a feature of the model that is not implemented here;
    ImportError where the hf extra is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(f"reading {name} needs two packages: pip install -e '.[hf]'") from None
    folder = Path(name) if Path(name).is_dir() else download_pretrained(name)
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} is not a model's folder: config.json: {e}") from None
    try:
        arguments = pretrained_arguments(theirs, str(folder))
    except KeyError as e:
        raise ValueError(f"{folder}/config.json lacks {e.args[0]}") from None
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{folder}/config.json is not understood: {e}") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; save the model with safe_serialization=True")
    weights = {}
    for file in files:
        try:
            weights |= safetensors.torch.load_file(file)
        except Exception as e:
            raise ValueError(f"{file} cannot be read: {e}") from None
    if theirs["model_type"] != "gpt2":
        weights = llama_to_gpt(weights, arguments["n_layer"])
    return arguments, clean_state_dict(weights), folder


def download_pretrained(name: str, weights: bool = True) -> Path:
    """The files of a model on the Hugging Face hub, in its cache, or without its weights. Raises ValueError if it has none."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise ImportError(f"downloading {name} needs two packages: pip install -e '.[hf]'") from None
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    try:
        config = hf_hub_download(repository, "config.json")
        try:
            with open(hf_hub_download(repository, "model.safetensors.index.json"), encoding="utf-8") as f:
                files = sorted(set(json.load(f)["weight_map"].values()))
        except EntryNotFoundError:
            files = ["model.safetensors"]
        for file in files if weights else ():
            hf_hub_download(repository, file)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(repository, file)
    except Exception as e:
        raise ValueError(f"{name} is no folder here, and the hub does not give {repository}: {first_line(e)}") from None
    return Path(config).parent


def pretrained_arguments(theirs: dict, where: str) -> dict:
    """GPTConfig's arguments for a transformers config.json. Raises ValueError for a feature that is not ours."""

    def must_be(key: str, *allowed) -> None:
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {key}={theirs[key]!r} is not supported, only {allowed[0]!r}")

    kind = theirs.get("model_type")
    for key, value in theirs.items():
        if key.startswith(("n_", "num_", "hidden_size", "intermediate", "vocab", "max_pos")) and value is not None:
            if type(value) is not int or value < 1:
                raise ValueError(f"{where}: {key}={value!r} is not a size")
    must_be("quantization_config", None)
    if kind == "gpt2":
        must_be("scale_attn_weights", True)
        must_be("scale_attn_by_inverse_layer_idx", False)
        must_be("add_cross_attention", False)
        must_be("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu")
        return dict(
            block_size=theirs["n_positions"], vocab_size=theirs["vocab_size"], n_layer=theirs["n_layer"],
            n_head=theirs["n_head"], n_embd=theirs["n_embd"], tie_weights=theirs.get("tie_word_embeddings", True), norm_eps=theirs.get("layer_norm_epsilon", 1e-5), bias=True,
            mlp="gelu_erf" if theirs.get("activation_function") == "gelu" else "gelu", mlp_hidden=theirs.get("n_inner") or 0,
        )  # fmt: skip
    if kind not in ("llama", "mistral"):
        raise ValueError(f"{where}: model_type {kind!r} is not supported, only gpt2, llama and mistral")
    rope = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"{where}: rope scaling {scaling.get('rope_type', scaling.get('type'))!r} is not supported")
    must_be("hidden_act", "silu")
    must_be("attention_bias", False)
    must_be("mlp_bias", False)
    must_be("sliding_window", None)
    must_be("partial_rotary_factor", 1.0)
    must_be("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"], None)
    return dict(
        block_size=theirs["max_position_embeddings"], vocab_size=theirs["vocab_size"],
        n_layer=theirs["num_hidden_layers"], n_head=theirs["num_attention_heads"], n_embd=theirs["hidden_size"],
        n_kv_head=theirs.get("num_key_value_heads") or 0, bias=False, norm="rmsnorm", norm_eps=theirs["rms_norm_eps"],
        mlp="swiglu", mlp_hidden=theirs["intermediate_size"], pos="rope",
        rope_base=float(theirs.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        tie_weights=theirs.get("tie_word_embeddings", False),
    )  # fmt: skip
