"""Write with a trained model, or chat with it. A run's folder is all it takes.

python sample.py                                          the newest run under out/
python sample.py --out_dir=out/quickstart --start="Once upon a time" --num_samples=3
python sample.py --start=FILE:prompt.txt --temperature=0
python sample.py --chat                                   chat; /help lists the commands
python sample.py --start="Once upon" --explain --max_new_tokens=5       the ten most likely tokens at every step
python sample.py --start="Once upon" --beams=4            the most likely text, by beam search
python sample.py --prompts=prompts.txt --output=completions.jsonl       every line of a file, in batches
"""

import contextlib
import itertools
import json
import math
import sys
from pathlib import Path

from common import chat as chats
from common import inference
from common.checkpoint import chosen_model
from common.files import atomic_write, check_writable, parse_json
from common.inference import text_pieces, token_repr, until
from common.runtime import explain_memory
from common.tokenizer import EOT, replace_surrogates
from configurator import UserError, check_bounds, check_choice, configure, short_errors

import torch

# The model
out_dir = ""  # the run's folder; empty: the newest run
init_from = "resume"  # resume: from out_dir | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where the processor has it, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: 8-bit weights; faster on a CPU with AVX-512 VNNI, smaller elsewhere
graph = True  # on a GPU, decode with CUDA graphs
compile = False  # on a GPU, torch.compile the decoding step: takes a minute, pays for long or many texts
# What to write
start = ""  # the prompt, FILE:path reads it from a file; empty: the start of a document
num_samples = 1  # number of texts
max_new_tokens = 500  # tokens at most in each
stop = ""  # stop at this text; the end of a document always stops
prompts = ""  # instead: complete every line of a file, or the "prompt" of every object in a .jsonl file
batch_size = 16  # texts at a time
output = ""  # of --prompts: a JSONL file for the completions; empty: the terminal
chat = False  # instead: chat with the model
turns: bool | str = "auto"  # of --chat: answer in turns (True), continue your text (False), or as it was trained (auto)
system = ""  # of --chat: a text that comes before the conversation
# How
seed = 1337  # the same seed, prompt and settings give the same text
temperature = 0.8  # 1: as the model predicts; lower: safer; 0: always the most likely token
top_k: int | None = None  # keep the k most likely ids; None: 200, or all of a smaller vocabulary; 0: all
top_p = 1.0  # keep the most likely ids that sum to p; 1: all
min_p = 0.0  # keep ids at least p times as likely as the most likely one; 0: all
beams = 0  # beam search with this many beams, instead of sampling; 0: off
length_penalty = 1.0  # of --beams: the score is log probability / length^length_penalty
explain = False  # show the ten most likely tokens at every step


def read_text(key: str, path: Path) -> str:
    """The text of a file that --key names."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--{key}={path}: the file is not UTF-8 text") from None
    except FileNotFoundError:
        raise UserError(f"--{key}={path}: no such file") from None


def read_prompts(path: Path) -> dict[int, str]:
    """Line number -> prompt, of the lines of a file, or of the objects with a "prompt" in a .jsonl file."""
    lines = {n: line for n, line in enumerate(read_text("prompts", path).split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"--prompts={path}: there is no prompt in it")
    if path.suffix != ".jsonl":
        return lines
    for n, line in lines.items():
        try:
            lines[n] = parse_json(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            lines[n] = None
        if isinstance(lines[n], str):
            lines[n] = replace_surrogates(lines[n])
        else:
            raise UserError(f'--prompts={path}, line {n}: not an object with a text "prompt"')
    return lines


def encode_prompt(tokenizer, prompt: str, limit: int, name: str) -> list[int]:
    """The prompt's ids. Raises UserError, with `name` for the prompt, if they do not fit the context."""
    try:
        ids = inference.prompt_ids(tokenizer, prompt)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    if len(ids) > limit:
        raise UserError(f"{name} has {len(ids):,} tokens, the model's context is {limit:,}: shorten it")
    return ids


class Sampler:
    """A model with this script's settings, which a chat may change."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.settings = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "min_p": min_p,
            "top_k": min(200, model.config.vocab_size) if top_k is None else top_k,
            "rng": torch.Generator(model.device).manual_seed(seed), "graph": graph, "compile": compile,
        }  # fmt: skip

    def stream(self, ids: list[int], stop: str, on_end=lambda: None):
        """The text that continues ids, in pieces as it is sampled. on_end() is called if the model ends the text itself."""
        stream = inference.stream_ids(self.model, self.tokenizer, [ids], **self.settings)
        return until(text_pieces(self.tokenizer, inference.until_eot(stream, self.tokenizer, on_end)), stop)

    def batch(self, rows: list[list[int]], stop: str) -> list[tuple[str, int]]:
        """The continuation of each prompt: its text up to `stop`, and the number of tokens sampled for it."""
        new = inference.complete(self.model, self.tokenizer, rows, **self.settings)
        return [("".join(until(text_pieces(self.tokenizer, ids), stop)), len(ids)) for ids in new]


def write_out(text: str) -> None:
    print(text, end="", flush=True)
    if sys.stdout.broken:  # nobody reads any more
        sys.exit(141)


def write(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    if num_samples > 1:
        for first in range(0, num_samples, batch_size):
            for text, _ in sampler.batch([ids] * min(batch_size, num_samples - first), stop):
                write_out(f"{prompt}{text}\n---------------\n")
        return
    pieces = sampler.stream(ids, stop)  # a setting out of range is an error before the prompt is printed
    for piece in itertools.chain([prompt], pieces, ["\n"]):
        write_out(piece)


def write_beams(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    if beams > sampler.model.config.vocab_size:
        raise UserError(f"--beams={beams}: at most the vocabulary size, {sampler.model.config.vocab_size}")
    if num_samples > beams:
        raise UserError(f"--num_samples={num_samples}: --beams={beams} finds no more than {beams}")
    tokenizer = sampler.tokenizer
    found = inference.beam_search(sampler.model, ids, max_new_tokens, beams, tokenizer.stops, length_penalty)
    for score, new in found[:num_samples]:
        print(prompt + "".join(until(text_pieces(tokenizer, new), stop)))
        if num_samples > 1:
            print(f"--------------- score {score:.4f}")


def write_explained(sampler: Sampler, prompt: str, ids: list[int]) -> None:
    """Print one text with the ten most likely tokens of every step and the one that was sampled."""
    tokenizer, steps, new = sampler.tokenizer, [], []
    settings = sampler.settings | {"on_logits": lambda logits: steps.append(logits[0])}
    for sampled in inference.stream_ids(sampler.model, tokenizer, [ids], **settings):
        logits, i = steps.pop(0), sampled.item()
        probabilities, name = inference.top_tokens(logits, tokenizer), token_repr(tokenizer, i)
        probabilities.setdefault(name, logits.float().softmax(-1)[i].item())
        text = (prompt + tokenizer.decode(new)).replace("\n", "\\n")
        print(("..." + text[-70:] if len(text) > 73 else text) + "|")
        for token, p in probabilities.items():
            mark = "  <- sampled" if token == name else ""
            print(f"  {p:6.1%} {'#' * round(30 * p):<30} {token}{mark}")
        print()
        if i in tokenizer.stops:
            break
        new.append(i)
        if stop and stop in tokenizer.decode(new):
            break
    print(prompt + "".join(until(text_pieces(tokenizer, new), stop)))


def complete_file(sampler: Sampler) -> None:
    """Complete every prompt of a file, prompts of similar length together; write JSONL in the file's order."""
    from tqdm import tqdm

    texts, limit = read_prompts(Path(prompts)), sampler.model.config.block_size
    rows = {n: encode_prompt(sampler.tokenizer, t, limit, f"--prompts={prompts}, line {n}") for n, t in texts.items()}
    order = sorted([*rows] * num_samples, key=lambda n: len(rows[n]))
    completed, error = {n: [] for n in rows}, None
    with tqdm(total=len(order), unit="text", disable=None) as bar:
        try:
            for first in range(0, len(order), batch_size):
                chunk = order[first : first + batch_size]
                for n, (text, size) in zip(chunk, sampler.batch([rows[n] for n in chunk], stop)):
                    completed[n].append({"prompt": texts[n], "completion": text, "tokens": size})
                bar.update(len(chunk))
        except BaseException as e:  # Ctrl-C, or no memory for a long prompt: write what is complete
            error = e
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for found in completed.values() for line in found]
    if lines and output:
        atomic_write(Path(output), "".join(lines))
        print(f"{output}: {len(lines):,} completions" + (f" of {len(order):,}" if error else ""))
    else:
        write_out("".join(lines))
    if error:
        raise error


# -----------------------------------------------------------------------------
# Chat

COMMANDS = """\
/temp 0.8     temperature; 0: always the most likely token
/top_p 0.9    keep the most likely tokens that sum to this; 1: all
/top_k 50     keep this many of the most likely tokens; 0: all
/max 200      tokens at most in an answer
/seed 7       the same seed and messages give the same answers
/system TEXT  a text that comes before the conversation; without a text: none
/reset        start a new conversation
/save FILE    write the conversation as prepare_text.py --inputs reads it (of a chat model give it the suffix .jsonl)
/quit         or exit, quit, Ctrl-D; Ctrl-C stops an answer
A line that ends in \\ continues in the next; \"\"\" starts and ends a message of several lines."""


def read_message() -> str:
    """The user's message: a line, several if they end in a backslash, or what is between two lines of triple quotes."""
    line = input("user> ")
    if line.strip() == '"""':
        return "\n".join(iter(lambda: input("..... ").rstrip(), '"""'))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("..... "))
    return "\n".join(lines)


class Chat:
    def __init__(self, sampler: Sampler, checkpoint: dict):
        check_choice("turns", turns, ("auto", True, False))
        self.sampler, self.system = sampler, system
        self.history = []  # exchanges (message, answer) in the model's context
        self.transcript = []  # the whole conversation: messages, or the documents of a model that continues texts
        self.conversations = []  # those that /reset ended, each with its system text
        self.is_chat = bool(checkpoint.get("is_chat")) if turns == "auto" else turns

    def run(self) -> None:
        how = "answers in turns" if self.is_chat else "continues your text (it is no chat model)"
        print(f"The model {how}. /help lists the commands, /quit leaves.")
        while True:
            try:
                message = read_message()
            except EOFError:
                return print()
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
            except (UserError, OSError, RuntimeError) as e:  # an unknown character, a full disk, no memory
                print(f"error: {e}")

    def answer(self, message: str) -> None:
        sampler, ended, limit = self.sampler, [], self.sampler.model.config.block_size
        room = chats.prompt_room(limit, sampler.settings["max_new_tokens"])
        message, unknown = chats.known_part(sampler.tokenizer, message)
        if unknown and not message.strip():
            raise UserError(f"the model knows none of the characters {unknown!r}")
        if unknown:
            print(f"(the model does not know {unknown!r}: left out)")
        ids, kept = chats.chat_prompt(sampler.tokenizer, self.history, message, room, self.is_chat, self.system)
        if forgotten := len(self.history) - kept:
            print(f"({forgotten} earlier exchanges no longer fit the context of {limit} tokens)")
            del self.history[:forgotten]
        pieces, text = sampler.stream(ids, stop, lambda: ended.append(True)), ""
        if self.is_chat:
            pieces = until(pieces, chats.END_OF_TURN)
        write_out("assistant> ")
        try:
            for piece in pieces:
                piece = piece if text or not self.is_chat else piece.lstrip()
                text += piece
                write_out(piece)
        except KeyboardInterrupt:
            write_out(" (stopped)")
        write_out("\n")
        if self.is_chat:
            text = text.rstrip()
            self.transcript += [{"role": "user", "content": message}, {"role": "assistant", "content": text}]
        elif self.history:
            self.transcript[-1] += f"\n{message}{text}"
        else:
            self.transcript.append(message + text)
        self.history.append((message, text))
        if ended and not self.is_chat:
            print("(the text ends here; your next message starts another)")
            self.history.clear()

    def command(self, name: str, value: str = "") -> None:
        value, settings = value.strip(), self.sampler.settings
        numbers = {  # command: setting, type, lowest, highest
            "temp": ("temperature", float, 0, 100), "top_p": ("top_p", float, 0, 1), "seed": ("seed", int, 0, 2**63 - 1),
            "top_k": ("top_k", int, 0, self.sampler.model.config.vocab_size), "max": ("max_new_tokens", int, 1, 10**6),
        }  # fmt: skip
        if name in numbers:
            setting, number_type, low, high = numbers[name]
            try:
                number = number_type(value)
            except ValueError:
                number = math.nan
            if not low <= number <= high:
                raise UserError(f"/{name} {value}: a number from {low} to {high}")
            if name == "seed":
                settings["rng"].manual_seed(number)
            else:
                settings[setting] = number
        elif name == "system":
            self.system = value
        elif name == "reset":
            self.history.clear()
            if self.is_chat and self.transcript:
                self.conversations.append(self.with_system())
                self.transcript = []
        elif name == "save":
            self.save(value)
        elif name == "help":
            print(COMMANDS)
        else:
            raise UserError(f"/{name} is not a command; /help lists them")

    def with_system(self) -> list[dict]:
        """The messages of the conversation, after the system text."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.transcript

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save FILE: the file name is missing")
        if Path(name).exists():
            raise UserError(f"/save {name}: the file exists already")
        if not self.transcript and not self.conversations:
            raise UserError("there is no conversation yet")
        if self.is_chat:
            conversations = self.conversations + [self.with_system()] * bool(self.transcript)
            text = "".join(json.dumps({"messages": c}, ensure_ascii=False) + "\n" for c in conversations)
        else:
            text = f"\n{EOT}\n".join([self.system] * bool(self.system) + self.transcript) + "\n"
        atomic_write(Path(name), text)
        print(f"{name}: the whole conversation")


def main() -> None:
    modes = [key for key in ("chat", "prompts", "beams", "explain") if globals()[key]]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: give one of them")
    check_bounds(globals(), at_least_1="num_samples max_new_tokens batch_size", at_least_0="beams seed")
    if (chat or prompts) and start:
        raise UserError(f"--start={start}: --{modes[0]} takes no --start")
    if output and not prompts:
        raise UserError(f"--output={output}: it is for --prompts; redirect the output of a single text")
    if output:
        check_writable("output", output)
    if seed >= 2**63:
        raise UserError(f"--seed={seed}: must be less than 2^63")
    if not -10 <= length_penalty <= 10:
        raise UserError(f"--length_penalty={length_penalty}: must be between -10 and 10")
    prompt = read_text("start", Path(start[5:])) if start.startswith("FILE:") else start
    name = chosen_model(out_dir, init_from)
    model, tokenizer, checkpoint = inference.load_for_inference(name, device, dtype, quantize, data_dir)
    sampler = Sampler(model, tokenizer)
    if chat:
        return Chat(sampler, checkpoint).run()
    if prompts:
        return complete_file(sampler)
    ids = encode_prompt(tokenizer, prompt, model.config.block_size, "--start")
    (write_beams if beams else write_explained if explain else write)(sampler, prompt, ids)


if __name__ == "__main__":
    with short_errors(), explain_memory("--batch_size, --beams or --max_new_tokens"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        configure(globals())
        if chat:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  (line editing and history in input())
        main()
