"""Write with a trained model, or talk with it. A run's folder is all it takes.

python sample.py                                          the newest run under out/
python sample.py --out_dir=out/quickstart --start="Once upon a time" --num_samples=3
python sample.py --start=FILE:prompt.txt --temperature=0
python sample.py --chat                                   talk with it; /help lists what can be set
python sample.py --start="Once upon" --explain --max_new_tokens=5       the ten likeliest tokens at every step
python sample.py --start="Once upon" --beams=4            the likeliest text, searched for
python sample.py --prompts=prompts.txt --output=completions.jsonl       every line of a file, in batches
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from common.inference import (
    END_OF_TURN,
    beam_search,
    chat_prompt,
    likeliest,
    load_for_inference,
    shown,
    text_pieces,
    until,
)
from common.shards import atomic_write
from common.tokenizer import EOT
from configurator import configure, short_errors

# The model
out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: weights of 8 bits; faster on a CPU with bfloat16, elsewhere smaller
graph = True  # on a GPU, launch the step of a token whole, as a CUDA graph
compile = False  # torch.compile the step on a GPU: worth its minute for long texts and many
# What to write
start = ""  # the prompt, FILE:path reads it from a file; empty: the start of a document
num_samples = 1  # how many, in one batch
max_new_tokens = 500  # tokens at most in each
stop = ""  # stop where this text appears; the end of a document always stops
prompts = ""  # instead: complete every line of a file; of a .jsonl, the "prompt" of every object
batch_size = 16  # of --prompts, how many at once
output = ""  # where the completions of --prompts go, a JSONL file; empty: the terminal
chat = False  # instead: talk with the model
turns: bool | str = "auto"  # in a chat: answer in turns, or go on with your text (False); auto: as it was trained
system = ""  # a text that stands before the whole chat
# How
seed = 1337  # the same seed, prompt and settings give the same text
temperature = 0.8  # 1: as the model predicts, lower: safer, 0: always the likeliest
top_k: int | None = None  # keep the k likeliest ids; None: 200, or all of a smaller vocabulary; 0: all
top_p = 1.0  # keep the likeliest ids that sum to p; 1: all
min_p = 0.0  # keep ids at least p times as likely as the likeliest; 0: all
beams = 0  # search for the likeliest text with so many at once, instead of drawing one; 0: off
length_penalty = 1.0  # of beams: a text scores its log probability / length^this
explain = False  # show the ten likeliest tokens at every step


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """The prompts of a file and their lines' numbers, a line each; of a .jsonl file objects with a "prompt".

    Raises ValueError for other lines, and for a file without any.
    """
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if path.suffix == ".jsonl" and line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise ValueError(f'--prompts={path}, line {number}: not an object with a text "prompt"')
                found.append((number, row["prompt"]))
            elif line.strip():
                found.append((number, line.removesuffix("\r")))
    except UnicodeDecodeError:
        raise ValueError(f"--prompts={path}: the file is not UTF-8 text") from None
    except FileNotFoundError:
        raise ValueError(f"--prompts={path}: there is no such file") from None
    if not found:
        raise ValueError(f"--prompts={path}: there is no prompt in it")
    return found


def encode_prompt(tokenizer, prompt: str, limit: int, name: str) -> list[int]:
    """Its ids; of an empty one the end-of-text token. Raises ValueError, with `name`, if they are more than the context."""
    try:
        ids = tokenizer.encode(prompt, special=True) or [tokenizer.eot or 0]
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    if len(ids) > limit:
        raise ValueError(f"{name} has {len(ids):,} tokens, the model's context is {limit:,}: shorten it")
    return ids


class Sampler:
    """GPT.generate with this script's settings, which a chat may change."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        V = model.config.vocab_size
        top = min(200, V) if top_k is None else top_k
        self.settings = {"temperature": temperature, "top_k": top, "top_p": top_p, "min_p": min_p}
        self.max_new_tokens = max_new_tokens
        self.dice = torch.Generator(model.device).manual_seed(seed)

    def ids(self, rows: list[list[int]], watch=None):
        """Yields the next ids, (B,), of prompts that may differ in length; see GPT.generate."""
        longest, eot = max(map(len, rows)), self.tokenizer.eot
        idx = torch.tensor([r + [-1] * (longest - len(r)) for r in rows], device=self.model.device)
        how = {"generator": self.dice, "graph": graph, "compile": compile, "watch": watch}
        stops = () if eot is None else (eot,)
        return self.model.generate(idx, self.max_new_tokens, stop_tokens=stops, **self.settings, **how)

    def text(self, ids: list[int], stop: str, ended=lambda: None):
        """The text that continues ids, in pieces as it comes. ended() is called if the model ends it itself."""
        stream = self.ids([ids])  # settings that cannot be are told now

        def written():
            for new in stream:
                if (i := new.item()) == self.tokenizer.eot:
                    ended()
                    return
                yield i

        return until(text_pieces(self.tokenizer, written()), stop)

    def batch(self, rows: list[list[int]], stop: str) -> list[tuple[str, int]]:
        """What continues each prompt: its text up to `stop`, and how many tokens were written for it."""
        new = torch.stack(list(self.ids(rows)), dim=1).tolist()
        shortest, eot, made = min(map(len, rows)), self.tokenizer.eot, []
        for row, ids in zip(rows, new):
            ids = ids[len(row) - shortest :][: self.max_new_tokens]
            ids = ids[: ids.index(eot)] if eot in ids else ids
            made.append(("".join(until(text_pieces(self.tokenizer, ids), stop)), len(ids)))
        return made


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def write(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    """One text as it comes, or several from one batch."""
    if num_samples > 1:
        for text, _ in sampler.batch([ids] * num_samples, stop):
            print(f"{prompt}{text}\n---------------")
        return
    pieces = sampler.text(ids, stop)
    say(prompt)
    for piece in pieces:
        say(piece)
    say("\n")


def search(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    """The likeliest texts that a beam search finds, num_samples of them."""
    if num_samples > beams:
        raise ValueError(f"--num_samples={num_samples}: --beams={beams} finds no more than {beams}")
    stops = () if sampler.tokenizer.eot is None else (sampler.tokenizer.eot,)
    found = beam_search(sampler.model, ids, max_new_tokens, beams, stops, length_penalty)
    for score, new in found[:num_samples]:
        print(prompt + "".join(until(text_pieces(sampler.tokenizer, new), stop)))
        if num_samples > 1:
            print(f"--------------- score {score:.4f}")


def explain_steps(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    """One text, and at each step the ten likeliest tokens as the model predicts them, and which was taken."""
    tokenizer, steps, new = sampler.tokenizer, [], []
    for taken in sampler.ids([ids], watch=lambda logits: steps.append(logits[0])):
        logits, i = steps.pop(0), taken.item()
        rows, text = likeliest(logits, tokenizer), (prompt + tokenizer.decode(new)).replace("\n", "\\n")
        if shown(tokenizer, i) not in dict(rows):
            rows.append((shown(tokenizer, i), logits.float().softmax(-1)[i].item()))
        print(("..." + text[-70:] if len(text) > 73 else text) + "|")
        for token, p in rows:
            mark = "  <- taken" if token == shown(tokenizer, i) else ""
            print(f"  {p:6.1%} {'#' * round(30 * p):<30} {token}{mark}")
        print()
        if i == tokenizer.eot:
            break
        new.append(i)
        if stop and stop in tokenizer.decode(new):
            break
    print(prompt + tokenizer.decode(new))


def complete_file(sampler: Sampler) -> None:
    """Every prompt of a file, those of like length together, to JSONL in the file's order."""
    from tqdm import tqdm

    texts, limit, path = read_prompts(Path(prompts)), sampler.model.config.block_size, Path(output)
    if output and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(
            f"--output={output}: " + ("a folder" if path.is_dir() else f"there is no folder {path.parent}")
        )
    rows = [encode_prompt(sampler.tokenizer, t, limit, f"--prompts={prompts}, line {n}") for n, t in texts]
    order = sorted((n for n in range(len(rows)) for _ in range(num_samples)), key=lambda n: len(rows[n]))
    made, stopped = {n: [] for n in range(len(rows))}, None
    with tqdm(total=len(order), unit="text", disable=None) as bar:
        try:
            for first in range(0, len(order), batch_size):
                some = order[first : first + batch_size]
                for n, done in zip(some, sampler.batch([rows[n] for n in some], stop)):
                    made[n].append(done)
                bar.update(len(some))
        except BaseException as e:  # Ctrl-C, or no memory for a long prompt: what there is is kept
            stopped = e
    if stopped and not any(made.values()):
        raise stopped
    lines = [{"prompt": texts[n][1], "completion": text, "tokens": size} for n in made for text, size in made[n]]
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output:
        atomic_write(path, written)
        print(f"{output}: {len(lines):,} completions" + (f" of {len(order):,}" if stopped else ""))
    else:
        say(written)
    if stopped:
        raise stopped


COMMANDS = """\
/temp 0.8     how freely it writes; 0: always the likeliest token
/top_p 0.9    keep the likeliest tokens that sum to this; 1: all
/top_k 50     keep so many of the likeliest; 0: all
/max 200      tokens at most in an answer
/seed 7       the same seed and the same words give the same answers
/system TEXT  what stands before the whole chat; without a text: nothing
/reset        forget what was said
/save FILE    write down what was said, as prepare_text.py --input reads it
/quit         or exit, quit, Ctrl-D; Ctrl-C stops an answer
A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of many lines."""


def read_message() -> str:
    """What the user says: a line, more where they end in a backslash, or what is between two lines of triple quotes."""
    line = input("user> ")
    if line.strip() == '"""':
        return "\n".join(iter(lambda: input("..... ").rstrip(), '"""'))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("..... "))
    return "\n".join(lines)


class Chat:
    """A conversation in the terminal."""

    def __init__(self, sampler: Sampler, payload: dict):
        if turns not in (True, False, "auto"):
            raise ValueError(f"--turns={turns}: choose auto, True or False")
        self.sampler, self.system = sampler, system
        self.said, self.written = [], []  # exchanges that the model is to remember; all that was said, as documents
        self.turns = bool(payload.get("turns")) if turns == "auto" else turns

    def run(self) -> None:
        kind = (
            "in turns, as the chat mix has them" if self.turns else "by going on with your text (it is no chat model)"
        )
        print(f"The model answers {kind}. /help lists what can be set, /quit leaves.")
        while True:
            try:
                message = read_message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves")
                continue
            if message.strip() in ("exit", "quit", "/exit", "/quit"):
                return
            try:
                if message.startswith("/") and "\n" not in message:
                    self.command(*message[1:].split(" ", 1))
                elif message.strip():
                    self.answer(message)
            except (ValueError, OSError, RuntimeError) as e:  # a character that the tokenizer lacks, a full disk
                print(f"error: {e}")

    def answer(self, question: str) -> None:
        sampler, over = self.sampler, []
        limit = sampler.model.config.block_size
        room = max(1, limit - min(sampler.max_new_tokens, limit // 2))
        ids, kept = chat_prompt(sampler.tokenizer, self.said, question, room, self.turns, self.system)
        if kept < len(self.said):
            print(f"({len(self.said) - kept} of what was said before no longer fits the context of {limit} tokens)")
            del self.said[: len(self.said) - kept]
        pieces, text = sampler.text(ids, stop, lambda: over.append(True)), ""
        if self.turns:
            pieces = until(pieces, END_OF_TURN)
        say("assistant> ")
        try:
            for piece in pieces:
                piece = piece if text or not self.turns else piece.lstrip()
                text += piece
                say(piece)
        except KeyboardInterrupt:
            say(" (stopped)")
        say("\n")
        if self.turns:
            self.written.append(f"User: {question}\nAssistant: {text.rstrip()}")
        elif self.said:
            self.written[-1] += f"\n{question}{text}"
        else:
            self.written.append(question + text)
        self.said.append((question, text.rstrip() if self.turns else text))
        if over and not self.turns:
            print("(the text ends here; what you write now begins another)")
            self.said.clear()

    def command(self, name: str, value: str = "") -> None:
        sampler, value = self.sampler, value.strip()
        ranges = {  # setting -> its name in generate(), type, least, most
            "temp": ("temperature", float, 0, 100),
            "top_p": ("top_p", float, 0, 1),
            "top_k": ("top_k", int, 0, sampler.model.config.vocab_size),
            "max": ("max", int, 1, 10**6),
            "seed": ("seed", int, 0, 2**63 - 1),
        }
        if name in ranges:
            setting, kind, least, most = ranges[name]
            try:
                number = kind(value)
            except ValueError:
                number = None
            if number is None or not least <= number <= most:
                raise ValueError(f"/{name} {value}: a number from {least} to {most}")
            if setting == "seed":
                sampler.dice.manual_seed(number)
            elif setting == "max":
                sampler.max_new_tokens = number
            else:
                sampler.settings[setting] = number
        elif name == "system":
            self.system = value
        elif name == "reset":
            self.said.clear()
        elif name == "save":
            self.save(value)
        elif name == "help":
            print(COMMANDS)
        else:
            raise ValueError(f"/{name} is no command; /help lists them")

    def save(self, name: str) -> None:
        if not name or Path(name).exists():
            raise ValueError(
                f"/save {name}: there is such a file already" if name else "/save FILE: its name is missing"
            )
        if not self.written:
            raise ValueError("nothing was said yet")
        atomic_write(Path(name), f"\n{EOT}\n".join(([self.system] if self.system else []) + self.written) + "\n")
        print(f"{name}: all that was said")


def main() -> None:
    modes = [key for key in ("chat", "prompts", "beams", "explain") if globals()[key]]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]}: one of them at a time")
    for key, least in (("num_samples", 1), ("max_new_tokens", 1), ("batch_size", 1), ("beams", 0)):
        if globals()[key] < least:
            raise ValueError(f"--{key}={globals()[key]}: must be at least {least}")
    if (chat or prompts) and start:
        raise ValueError(f"--start={start}: not with --{modes[0]}, which has prompts of its own")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed={seed}: must be at least 0 and less than 2^63")
    if not -10 <= length_penalty <= 10:
        raise ValueError(f"--length_penalty={length_penalty}: must be between -10 and 10")
    prompt = start
    if start.startswith("FILE:"):
        try:
            prompt = Path(start[5:]).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--start={start}: the file is not UTF-8 text") from None
    name = out_dir if init_from == "resume" else init_from
    model, tokenizer, payload = load_for_inference(name, device, dtype, quantize, data_dir)
    sampler = Sampler(model, tokenizer)
    if chat:
        return Chat(sampler, payload).run()
    if prompts:
        return complete_file(sampler)
    ids = encode_prompt(tokenizer, prompt, model.config.block_size, "--start")
    (search if beams else explain_steps if explain else write)(sampler, prompt, ids)


if __name__ == "__main__":
    with short_errors():
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        configure(globals())
        if chat:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  (line editing and history in input())
        try:
            main()
        except BrokenPipeError:  # the reader has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
