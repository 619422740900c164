"""Export a run to a folder that other tools load: transformers, and what builds on it.

    python export.py                                  the newest run under out/, to export/ inside it
    python export.py --out_dir=out/mine --output_dir=mine-gpt
    python export.py --output_format=torch            one file of weights, arguments and tokenizer, without the optimizer
    python export.py --llama_cpp=llama.cpp            also model.gguf, by the converter of llama.cpp's folder
    python export.py --push=owner/name                also to the Hugging Face hub (log in with `hf auth login`)

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained("mine-gpt"), AutoTokenizer.from_pretrained("mine-gpt")

A model becomes the class of transformers that computes the same, with no code of ours:

    layernorm, gelu, learned positions    GPT-2
    rmsnorm, rope, swiglu                 Llama; with qkv_bias Qwen2, with qk_norm Qwen3
    rmsnorm, rope, relu2                  Arcee; with qk_norm Apertus

A key that no class can express is refused by name.
Writes config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json and README.md; of a chat
model also its chat template and a Modelfile, with which Ollama runs model.gguf.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common.chat import render, template_of
from common.checkpoint import chosen_model, find_checkpoint, find_tokenizer, load_model, save_checkpoint
from common.files import atomic_write, read_json
from common.logger import perplexity
from common.lora import merge_lora
from common.pretrained import is_pretrained, to_hugging_face
from common.runtime import DTYPES
from common.tokenizer import BPETokenizer, PretrainedTokenizer, Tokenizer
from configurator import UserError, check_choice, configure, first_line, short_errors
from model import GPT, GPTConfig

out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | a Hugging Face folder or id
output_dir = ""  # folder to write; empty: export/ in the run's folder
output_format = "hf"  # hf: for transformers | torch: model.pt, which these scripts load
dtype = "float32"  # of the weights: float32 | bfloat16 | float16
llama_cpp = ""  # llama.cpp's folder, or its convert_hf_to_gguf.py: also write model.gguf
push = ""  # owner/name: also upload the folder to the hub, to a new private repository or over the one there is
overwrite = False  # replace an earlier export in the folder
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset

GGUF = "model.gguf"
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
FILES |= {"README.md", "model.pt", "Modelfile", GGUF}
COMMAND_KEYS = (  # of train.py, for the model card
    "init_from seed dataset data_fraction batch_size block_size gradient_accumulation_steps max_iters max_minutes "
    "optimizer learning_rate min_lr embedding_lr head_lr vector_lr schedule warmup_iters lr_decay_iters decay_fraction decay_lr "
    "weight_decay beta1 beta2 momentum momentum_warmup grad_clip label_smoothing"
)
EXAMPLE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={length})[0]))
```
"""
TEXT_INPUTS = 'inputs = tokenizer({prompt!r}, return_tensors="pt")'
CHAT_INPUTS = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""


def model_card(name: str, model: GPT, checkpoint: dict, results: dict, target: str) -> str:
    """README.md: what the model is, how good, trained on what, and with which command."""
    config = checkpoint.get("config", {})
    val_loss = checkpoint.get("val_loss")  # an estimate; the final evaluation was of the last step
    if val_loss is None or checkpoint.get("step") == results.get("total_steps"):
        val_loss = results.get("final_val_loss", val_loss)
    base = {"resume": "scratch"}.get(config.get("init_from"), config.get("init_from"))
    origin = f"trained from {base}" if base else "converted"
    facts = {
        "trained on": config.get("dataset"),
        "steps": checkpoint.get("step"),
        "tokens": checkpoint.get("tokens"),
        "validation loss (nats per token)": val_loss,
        "validation perplexity": val_loss and perplexity(val_loss),
        "HellaSwag acc_norm": results.get("hellaswag_acc_norm"),
        "training time (s)": results.get("train_seconds"),
        "device": results.get("device"),
        "torch": results.get("versions", {}).get("torch"),
        "commit": results.get("git_commit"),
    }
    formats = {float: ",.4f", int: ","}
    rows = [f"| {key} | {value:{formats.get(type(value), '')}} |" for key, value in facts.items() if value]
    keys = [key for key in COMMAND_KEYS.split() + [*GPTConfig.__dataclass_fields__] if key in config]
    command = shlex.join(f"--{key}={config[key]}" for key in dict.fromkeys(keys))
    prompt = config.get("sample_prompt") or "The"
    inputs = CHAT_INPUTS if checkpoint.get("is_chat") else TEXT_INPUTS.format(prompt=prompt)
    c = model.config
    sizes = (
        f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}, vocabulary {c.vocab_size:,}"
    )
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}",
        f"A GPT of {model.num_params():,} parameters ({sizes}), {origin} with flatgpt. transformers loads it as its class "
        f"{target}.",
        "\n".join(["| | |", "|---|---|", *rows]) if rows else "",
        f"```sh\npython train.py {command}\n```" if command else "",
        EXAMPLE.format(name=name, inputs=inputs, length=min(100, c.block_size // 2)),
    ]
    return "\n\n".join(filter(None, sections))


def export_hugging_face(model: GPT, checkpoint: dict, tokenizer: Tokenizer, folder: Path, results: dict) -> None:
    """Write the folder for transformers: all of it, or nothing."""
    is_chat = bool(checkpoint.get("is_chat"))
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("exporting needs the safetensors package: pip install -e '.[hf]'") from None
    merge_lora(model)
    target, config, weights = to_hugging_face(model, DTYPES[dtype])
    vocab_size = min(model.config.vocab_size, tokenizer.n_vocab)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": min(200, vocab_size)}
    reader = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    reader["clean_up_tokenization_spaces"] = False
    if is_chat:
        reader["chat_template"] = template_of(tokenizer)
    config |= {"vocab_size": vocab_size, "torch_dtype": dtype, "eos_token_id": tokenizer.eot, "bos_token_id": None}
    config["pad_token_id"] = None  # some classes have a default, which would freeze that row in training
    if tokenizer.eot is not None:
        eot = tokenizer.token_bytes(tokenizer.eot).decode()
        stops = list(tokenizer.stops) if len(tokenizer.stops) > 1 else tokenizer.eot
        sampling |= {"eos_token_id": stops, "pad_token_id": tokenizer.eot}
        reader["eos_token"] = eot
        if tokenizer.to_dict()["kind"] != "pretrained":  # whose tokenizer.json says what a text begins with
            config["bos_token_id"] = tokenizer.eot
            reader |= {"bos_token": eot, "unk_token": eot}
        elif tokenizer.bos or tokenizer.bos_token:
            reader["bos_token"] = tokenizer.decode(tokenizer.bos) if tokenizer.bos else tokenizer.bos_token
            config["bos_token_id"] = (
                tokenizer.bos[0] if tokenizer.bos else tokenizer.encode(tokenizer.bos_token, True)[0]
            )
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    for name in weights:
        if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
            weights[name] = weights[name][:vocab_size]
        weights[name] = weights[name].to(DTYPES[dtype]).contiguous().clone()
    title = folder.resolve().parent.name if folder.name == "export" else folder.name
    card = model_card(push or title, model, checkpoint, results, target)
    objects = {"config.json": config, "generation_config.json": sampling, "tokenizer_config.json": reader}
    texts = {name: json.dumps(value, indent=1) for name, value in objects.items()}
    texts |= {"tokenizer.json": tokenizer.to_json(), "README.md": card}
    if is_chat and (described := modelfile(tokenizer)):
        texts["Modelfile"] = described
    try:
        with replaced_files(folder, [*texts, "model.safetensors"]) as part_of:
            safetensors.torch.save_file(weights, part_of("model.safetensors"), {"format": "pt"})
            for name, text in texts.items():
                atomic_write(part_of(name), text)
            shutil.copymode(
                part_of("config.json"), part_of("model.safetensors")
            )  # safetensors 0.8 lets only its owner read
    except safetensors.SafetensorError as e:
        raise UserError(f"{folder} could not be written: {e}") from None
    print(f"{folder}: {target}, {model.num_params():,} parameters in {dtype}, vocabulary {vocab_size:,}")


def modelfile(tokenizer: Tokenizer) -> str:
    """Ollama's description of a chat model: its template, in Go's language, says what ours says in Jinja. "" if it cannot."""
    user, system = {"role": "user", "content": "{{ .Prompt }}"}, {"role": "system", "content": "{{ .System }}"}
    try:
        alone, both = (render(tokenizer, messages, True) for messages in ([user], [system, user]))
    except UserError as e:
        print(f"no Modelfile for Ollama: {e}")
        return ""
    template = f"{{{{ if .System }}}}{both}{{{{ else }}}}{alone}{{{{ end }}}}{{{{ .Response }}}}"
    stops = [tokenizer.token_bytes(i).decode(errors="replace") for i in tokenizer.stops]
    lines = [f"FROM ./{GGUF}", f'TEMPLATE """{template}"""', *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops)]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def replaced_files(folder: Path, names: list[str]):
    """Gives the paths to write files of the folder to. After the block all of them have their names; on any error none has.

    The folder itself stays: it may be a link or a mount point. Other files of an earlier export are removed at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = []  # the former files that were moved away
    try:
        yield lambda name: folder / f"{name}.part"
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, folder / f"{name}.old")
                kept.append(name)
            os.replace(folder / f"{name}.part", folder / name)
    except BaseException:
        for name in names:
            (folder / f"{name}.part").unlink(missing_ok=True)
        for name in kept:
            os.replace(folder / f"{name}.old", folder / name)
        raise
    for name in [*(f"{name}.old" for name in kept), *(FILES - {*names})]:
        (folder / name).unlink(missing_ok=True)


def write_gguf(folder: Path, tokenizer: Tokenizer) -> None:
    """Convert the exported folder by llama.cpp's own script, to what llama.cpp and Ollama run. Raises UserError if it fails."""
    script = Path(llama_cpp)
    script = (script / "convert_hf_to_gguf.py" if script.is_dir() else script).resolve()
    # The converter knows the vocabularies of known models by a hash. A vocabulary of ours is split as GPT-2's is.
    code = "import importlib, sys; sys.path.insert(0, sys.argv[1]); module = importlib.import_module(sys.argv[2])\n"
    if isinstance(tokenizer, BPETokenizer):
        code += "for c in module.ModelBase.__subclasses__():\n    c.get_vocab_base_pre = lambda *_: 'gpt-2'\n"
    code += "sys.argv = sys.argv[2:]; module.main()"
    part = folder / f"{GGUF}.part"
    outtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    options = [str(folder), "--outfile", str(part), "--outtype", outtype]
    done = subprocess.run(
        [sys.executable, "-c", code, str(script.parent), script.stem, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not part.exists():
        part.unlink(missing_ok=True)
        reason = (done.stderr.strip() or "it wrote no file").splitlines()[-1]
        raise UserError(f"--llama_cpp={llama_cpp}: {script.name} failed: {reason}; the export without it is complete")
    os.replace(part, folder / GGUF)
    print(f"{folder / GGUF}: {(folder / GGUF).stat().st_size / 2**20:,.1f} MiB")


def check_gguf(tokenizer: Tokenizer) -> None:
    """Raise UserError for what llama.cpp cannot run, before anything is written."""
    script = Path(llama_cpp) / "convert_hf_to_gguf.py" if Path(llama_cpp).is_dir() else Path(llama_cpp)
    if not script.is_file():
        raise UserError(f"--llama_cpp={llama_cpp}: there is no convert_hf_to_gguf.py")
    if not isinstance(tokenizer, BPETokenizer | PretrainedTokenizer):
        raise UserError(f"--llama_cpp={llama_cpp}: llama.cpp has no vocabulary of single characters or numbers")
    if isinstance(tokenizer, BPETokenizer) and not tokenizer.is_merged():
        raise UserError(
            f"--llama_cpp={llama_cpp}: llama.cpp cannot use a vocabulary of whole words; prepare with --tokenizer=bpe"
        )


def push_to_hub(folder: Path) -> None:
    """Upload the folder. Raises UserError if the hub refuses."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push needs the huggingface_hub package: pip install -e '.[hf]'") from None
    try:
        api = HfApi()
        api.create_repo(push, private=True, exist_ok=True)
        result = api.upload_folder(repo_id=push, folder_path=folder, allow_patterns=sorted(FILES - {"model.pt"}))
    except Exception as e:  # of the connection, of the hub
        raise UserError(f"--push={push}: {first_line(e)}; the export is complete in {folder}") from None
    print(f"pushed to {getattr(result, 'commit_url', '') or push}")


def export_torch(model: GPT, checkpoint: dict, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: t.to(DTYPES[dtype]) for n, t in model.state_dict().items()}
    kept = {k: checkpoint[k] for k in ("model_args", "config", "step", "is_chat") if k in checkpoint}
    path = folder / "model.pt"
    save_checkpoint(path, {"model": weights, **kept, "tokenizer": tokenizer.to_dict()})
    for name in FILES - {path.name}:  # of an earlier export, with other weights
        (folder / name).unlink(missing_ok=True)
    print(f"{path}: {model.num_params():,} parameters in {dtype}, loaded by --init_from={path}")


def main() -> None:
    check_choice("output_format", output_format, ("hf", "torch"))
    check_choice("dtype", dtype, DTYPES)
    name = chosen_model(out_dir, init_from)
    model, checkpoint = load_model(name)
    tokenizer = find_tokenizer(checkpoint, data_dir)
    run = Path() if is_pretrained(name) else find_checkpoint(name).parent
    folder = Path(output_dir) if output_dir else run / "export"
    if folder.resolve() in (Path.cwd(), run.resolve(), Path(name).resolve()):
        raise UserError(f"--output_dir={folder}: an export needs a folder of its own")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite and not push:  # what is pushed is always exported anew
            raise UserError(f"{folder} exists already: choose another --output_dir, or --overwrite=True")
        names = {p.name.removesuffix(".part").removesuffix(".old") for p in folder.iterdir()}
        if foreign := sorted(names - FILES):
            raise UserError(f"{folder} holds {foreign[0]}, which is not part of an export: choose another --output_dir")
    if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UserError(f"--push={push}: an id on the hub is owner/name")
    if output_format == "torch" and (push or llama_cpp):
        raise UserError(f"--output_format=torch: {'--push' if push else '--llama_cpp'} needs the format hf")
    if llama_cpp:
        check_gguf(tokenizer)
    if output_format == "torch":
        return export_torch(model, checkpoint, tokenizer, folder)
    results = {} if is_pretrained(name) else read_json(run / "results.json")
    if results.get("total_steps") != checkpoint.get("step"):  # best.pt is from before the run's end
        results = {key: results[key] for key in ("device", "versions", "git_commit") if key in results}
    export_hugging_face(model, checkpoint, tokenizer, folder, results)
    if llama_cpp:
        write_gguf(folder, tokenizer)
    if push:
        push_to_hub(folder)


if __name__ == "__main__":
    with short_errors():
        configure(globals(), aliases={"format": "output_format"})
        main()
