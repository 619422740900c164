"""Write with a trained model. A run's folder is all it takes.

python sample.py                                          the newest run under out/
python sample.py --out_dir=out/quickstart --start="Once upon a time" --num_samples=3
python sample.py --start=FILE:prompt.txt --temperature=0
"""

import codecs
import os
import sys
from pathlib import Path

import torch

from checkpoint import find_tokenizer, load_model
from configurator import configure, short_errors
from inference import for_inference
from machine import pick_device, pick_dtype, tune_malloc

out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
start = ""  # the prompt, FILE:path reads it from a file; empty: the start of a document
num_samples = 1  # how many, in one batch
max_new_tokens = 500  # tokens at most in each
temperature = 0.8  # 1: as the model predicts, lower: safer, 0: always the likeliest
top_k: int | None = None  # keep the k likeliest ids; None: 200, or all of a smaller vocabulary; 0: all
top_p = 1.0  # keep the likeliest ids that sum to p; 1: all
min_p = 0.0  # keep ids at least p times as likely as the likeliest; 0: all
stop = ""  # stop where this text appears; the end of a document always stops
seed = 1337  # the same seed, prompt and settings give the same text
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: weights of 8 bits; faster on a CPU with bfloat16, elsewhere smaller
graph = True  # on a GPU, launch the step of a token whole, as a CUDA graph
compile = False  # torch.compile the step on a GPU: worth its minute for long texts and many


def text_pieces(tokenizer, ids):
    """Decode a stream of ids as it comes: a character whose bytes are spread over tokens appears when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.token_bytes(i))
    yield decoder.decode(b"", final=True)


def until(pieces, stop: str):
    """The pieces up to the text `stop`, which is not part of them; what may be its beginning waits for what follows."""
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = (
            max((n for n in range(min(len(stop), len(held)) + 1) if held.endswith(stop[:n])), default=0) if stop else 0
        )
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def main() -> None:
    global top_k
    on = pick_device(device)
    if on.type == "cpu":
        tune_malloc()
    model, payload = load_model(out_dir if init_from == "resume" else init_from)
    tokenizer = find_tokenizer(payload, data_dir)
    known = min(model.config.vocab_size, tokenizer.n_vocab)
    model.config.vocab_size = known  # ids that only pad the vocabulary are never sampled
    if top_k is None:
        top_k = min(200, known)
    prompt = start
    if start.startswith("FILE:"):
        try:
            prompt = Path(start[5:]).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--start={start}: the file is not UTF-8 text") from None
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"--num_samples={num_samples}, --max_new_tokens={max_new_tokens}: must be at least 1")
    eot = tokenizer.eot
    ids = tokenizer.encode(prompt, special=True) or [eot or 0]
    if len(ids) > model.config.block_size:
        raise ValueError(
            f"--start has {len(ids):,} tokens, the model's context is {model.config.block_size:,}: shorten it"
        )

    for_inference(model, on, pick_dtype(dtype, on), quantize)
    dice = torch.Generator(on).manual_seed(seed)
    idx = torch.tensor([ids] * num_samples, device=on)
    stops = () if eot is None else (eot,)
    new = model.generate(idx, max_new_tokens, temperature, top_k, top_p, min_p, stops, dice, graph, compile)
    if num_samples == 1:
        stream = (t.item() for t in new)
        sys.stdout.write(prompt)
        for piece in until(text_pieces(tokenizer, (i for i in stream if i != eot)), stop):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    rows = torch.stack(list(new), dim=1).tolist()
    for row in rows:
        row = row[: row.index(eot)] if eot in row else row
        print(prompt + "".join(until(text_pieces(tokenizer, row), stop)) + "\n---------------")


if __name__ == "__main__":
    with short_errors():
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        configure(globals())
        try:
            main()
        except (BrokenPipeError, KeyboardInterrupt):  # the reader has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
