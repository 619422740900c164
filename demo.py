"""A page in the browser to play with trained models, at http://127.0.0.1:7870.

    python demo.py                            the runs under out/, the newest first
    python demo.py --out_dir=out/quickstart   select this run first
    python demo.py --init_from=gpt2           offer a pretrained model too
    python demo.py --host=0.0.0.0             for every machine that can reach this one

Needs the extra: pip install -e '.[demo]'. The page loads nothing from other machines.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from common.checkpoint import find_checkpoint, find_runs
from common.inference import (
    END_OF_TURN,
    chat_prompt,
    load_for_inference,
    prompt_ids,
    stream_ids,
    text_pieces,
    token_repr,
    top_tokens,
    until,
)
from common.pretrained import is_pretrained
from configurator import UserError, configure, short_errors

out_dir = ""  # the run to select first; empty: the newest one
init_from = "resume"  # resume: a run | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: 8-bit weights
host = "127.0.0.1"  # address to listen on; 0.0.0.0: all, so that others reach the page
port = 7870  # port to listen on
visitors = 8  # texts sampled at once, taking turns token by token; later visitors wait in a queue
max_prompt = 20_000  # characters of a prompt at most
pace = 0.0  # seconds per token at least, to watch them come

TIPS = """\
- Start as the training texts start: a model of stories knows "Once upon a time", not questions.
- Temperature 0.5 to 0.7 is safe, above 1 is bold; top-k and top-p cut off unlikely tokens.
- The same seed, prompt and settings give the same text. Without a seed every text is different.
- A loss that is lower by 0.1 shows in the text: compare two runs with one prompt and one seed."""


class Models:
    """The last three models used, in memory. A checkpoint that changed on disk is loaded again."""

    def __init__(self):
        self.lock, self.loaded = (
            threading.Lock(),
            {},
        )  # name -> [modification time, (model, tokenizer, checkpoint), warning]
        self.pretrained = ""  # the one model that is not a run of ours, if there is one

    def get(self, name: str, warn=lambda message: None) -> tuple:
        """Model, tokenizer and checkpoint. If a changed file cannot be loaded, warn() is called and the old model stays.

        Raises UserError, OSError or RuntimeError if it cannot be loaded and is not in memory.
        """
        with self.lock:
            # A run's file, not its name: if the run is gone, its name could be taken for a hub id.
            file = name if name == self.pretrained else find_checkpoint(name)
            changed = 0 if name == self.pretrained else modification_time(file)
            entry = self.loaded.pop(name, None)
            if entry is None or changed != entry[0]:
                try:
                    entry = [changed, load_for_inference(str(file), device, dtype, quantize, data_dir), ""]
                except (UserError, OSError, RuntimeError) as e:
                    if entry is None:
                        raise
                    entry = [changed, entry[1], f"{e}. The model from before stays."]
            self.loaded[name] = entry
            while len(self.loaded) > 3:
                self.loaded.pop(next(iter(self.loaded)))
        if entry[2]:
            warn(entry[2])
        return entry[1]


def modification_time(file: Path) -> float | None:
    """None if the file is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


models = Models()
step_lock = threading.Lock()  # whoever holds it has the whole machine for one token


def label(name: str) -> str:
    """A run as the picker shows it: with its loss and size."""
    try:
        r = json.loads((Path(name) / "results.json").read_text(encoding="utf-8"))
        return f"{name}: loss {r['final_val_loss']:.3f}, {r['model_parameters'] / 1e6:.2f}M parameters"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{name}: no results yet" if Path(name).is_dir() else name


def choices() -> list[tuple[str, str]]:
    """(label, name) of the models to choose from."""
    given, root, names = out_dir if init_from == "resume" else init_from, Path().resolve(), {}
    if given:
        names[given if given == models.pretrained else Path(given).resolve()] = given
    for run in find_runs():
        names.setdefault(root / run, str(run))
    return [(label(n), n) for n in names.values()]


def clamp(value, low, high, default):
    return default if value is None else min(max(value, low), high)


def sample_ids(
    model, tokenizer, ids: list[int], settings: tuple, on_logits=None, limit: int | None = None, on_end=lambda: None
):
    """Yields the ids that continue a prompt, up to the end-of-text token, for which on_end() is called.

    Visitors take turns, token by token.
    """
    max_new_tokens, temperature, top_k, top_p, seed = settings
    V, rng = model.config.vocab_size, torch.Generator(model.device)
    rng.manual_seed(int(seed)) if seed.strip() else rng.seed()
    stream = stream_ids(
        model, tokenizer, [ids], limit or int(clamp(max_new_tokens, 10, 500, 200)), graph=False, rng=rng, on_logits=on_logits,
        temperature=clamp(temperature, 0.1, 2.0, 0.8), top_k=int(clamp(top_k, 0, min(500, V), min(200, V))),
        top_p=clamp(top_p, 0.0, 1.0, 1.0),
    )  # fmt: skip
    due = 0.0
    while True:
        time.sleep(max(0.0, due - time.perf_counter()))
        due = time.perf_counter() + pace
        with step_lock:
            new = next(stream, None)
        if new is None:
            return
        if new.item() == tokenizer.eot:
            return on_end()
        yield new.item()


def build_page(gr):
    """The page, as a gradio.Blocks."""
    from PIL import Image  # gradio's own need

    shared = {"concurrency_id": "texts", "concurrency_limit": visitors, "show_progress": "hidden"}

    def model_of(name: str | None, seed: str = "") -> tuple:
        seed = seed.strip()
        if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63):
            raise gr.Error(f"The seed {seed[:30]} is not a whole number below 2^63.")
        if not name:
            raise gr.Error("There is no trained model under out/ yet. Train one: python train.py config/quickstart.py")
        try:
            return models.get(name, gr.Warning)
        except (UserError, OSError, RuntimeError) as e:
            raise gr.Error(str(e)) from None

    def ids_of(name: str | None, prompt: str, seed: str) -> tuple:
        if len(prompt) > max_prompt:
            raise gr.Error(f"The prompt has {len(prompt):,} characters; at most {max_prompt:,} are taken.")
        model, tokenizer, _ = model_of(name, seed)
        try:
            ids = prompt_ids(tokenizer, prompt)
        except UserError as e:
            raise gr.Error(str(e)) from None
        return model, tokenizer, ids[-model.config.block_size :], len(ids)

    def show_errors(stream):
        """The items of a stream; an error in it becomes a message on the page."""
        try:
            yield from stream
        except (UserError, RuntimeError) as e:
            raise gr.Error(str(e)) from None

    def write(name, prompt, *settings):
        """The text as it is sampled, and the speed."""
        model, tokenizer, ids, all_ids = ids_of(name, prompt, settings[-1])
        note = f"; it sees the last {len(ids):,} of the prompt's {all_ids:,} tokens" if all_ids > len(ids) else ""
        text, count, began = prompt, 0, time.perf_counter()
        for piece in text_pieces(tokenizer, show_errors(sample_ids(model, tokenizer, ids, settings))):
            text, count = text + piece, count + 1
            yield text, f"{count} tokens, {count / (time.perf_counter() - began):.0f} a second{note}"
        yield text, f"{count - 1} tokens, {count / (time.perf_counter() - began):.0f} a second{note}"

    def next_tokens(name, prompt, *settings, limit=None):
        """The text as it is sampled, the most likely tokens of each step, and the one that was sampled."""
        model, tokenizer, ids, _ = ids_of(name, prompt, settings[-1])
        logits, text, new = [], prompt, []
        for i in show_errors(sample_ids(model, tokenizer, ids, settings, lambda rows: logits.append(rows[0]), limit)):
            top, new = dict(top_tokens(logits.pop(0), tokenizer)), [*new, i]
            text, token = prompt + tokenizer.decode(new), token_repr(tokenizer, i)
            yield text, top, f"sampled: `{token}`, {top.get(token, 0):.1%}"
        if logits:  # the end of the text
            yield text, dict(top_tokens(logits.pop(0), tokenizer)), "sampled: the end of the text"

    def one_token(name, prompt, *settings):
        yield from next_tokens(name, prompt, *settings, limit=1)

    def talk(name, message, history, remembered, *settings):
        """The conversation as the answer is sampled. remembered: the exchanges (message, answer) in the model's context."""
        if len(message) > max_prompt:
            raise gr.Error(f"The message has {len(message):,} characters; at most {max_prompt:,} are taken.")
        model, tokenizer, checkpoint = model_of(name, settings[-1])
        if not message.strip():
            yield history, message, remembered
            return
        limit, is_chat = model.config.block_size, bool(checkpoint.get("is_chat"))
        room = max(1, limit - min(int(clamp(settings[0], 10, 500, 200)), limit // 2))
        try:
            ids, _ = chat_prompt(tokenizer, remembered, message, room, is_chat)
        except UserError as e:
            raise gr.Error(str(e)) from None
        answer, ended = "", []
        stream = sample_ids(model, tokenizer, ids, settings, on_end=lambda: ended.append(True))
        pieces = text_pieces(tokenizer, show_errors(stream))
        box = ""  # the first token clears the input; later ones leave what is typed meanwhile
        for piece in until(pieces, END_OF_TURN if is_chat else ""):
            answer += piece if answer or not is_chat else piece.lstrip()
            exchange = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
            yield history + exchange, box, [*remembered, (message, answer)]
            box = gr.skip()
        if ended and not is_chat:  # the text has ended: the next message starts another
            yield gr.skip(), gr.skip(), []

    def choose(name, current):
        """The selected run and a new conversation, or the run before if it cannot be loaded."""
        try:
            model_of(name)
        except gr.Error as e:
            if current is None:
                raise
            gr.Warning(f"{e.message} {current} stays.")
            return gr.update(value=current), current, gr.skip(), gr.skip()
        return gr.update(), name, [], []

    def refresh():
        """Refresh the list of models."""
        return gr.update(choices=choices())

    def about(name):
        """The loss curve and results of a run."""
        folder = Path(name or "")
        picture = None
        if name and (folder / "loss.png").exists():
            with Image.open(folder / "loss.png") as file:
                picture = file.copy()
        try:
            found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        keys = "final_val_loss final_val_perplexity model_parameters tokens total_steps train_seconds device"
        values = {k: found[k] for k in keys.split() if found.get(k) is not None}
        texts = {
            k: f"{v:,.5g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for k, v in values.items()
        }
        table = f"| {name} | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in texts.items())
        return picture, table if found else "no results yet"

    def kind_of(name):
        try:
            is_chat = bool(models.get(name)[2].get("is_chat")) if name else None
        except (UserError, OSError, RuntimeError):
            is_chat = None
        if is_chat is None:
            return ""
        return "It was trained on conversations." if is_chat else "It is no chat model: it continues your text."

    found = choices()
    first = found[0][1] if found else None
    with gr.Blocks(analytics_enabled=False, title="flatgpt") as page:
        current, remembered = gr.State(first), gr.State([])
        with gr.Row(equal_height=True):
            run = gr.Dropdown(found, value=first, label="Model", elem_id="run", scale=5)
            again = gr.Button("Refresh", scale=1, min_width=120)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                max_new_tokens = gr.Slider(10, 500, 200, step=10, label="Max new tokens", elem_id="max_new_tokens")
                temperature = gr.Slider(0.1, 2.0, 0.8, step=0.05, label="Temperature", elem_id="temperature")
                top_k = gr.Slider(0, 500, 200, step=1, label="Top-k (0: all)", elem_id="top_k")
                top_p = gr.Slider(0.0, 1.0, 1.0, step=0.01, label="Top-p (1: all)", elem_id="top_p")
                seed = gr.Textbox("", label="Seed (empty: another each time)", elem_id="seed")
                with gr.Accordion("Tips", open=False):
                    gr.Markdown(TIPS)
            with gr.Column(scale=3):
                with gr.Tab("Write"):
                    prompt = gr.Textbox(
                        "Once upon a time", lines=1, max_lines=8, label="Prompt (Enter writes)", elem_id="prompt"
                    )
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                    text = gr.Textbox(lines=14, max_lines=30, label="Text", elem_id="text")
                    speed = gr.Markdown(elem_id="speed")
                with gr.Tab("Chat"):
                    kind = gr.Markdown(elem_id="kind")
                    talked = gr.Chatbot(
                        render_markdown=False, height=420, elem_id="talked", show_label=False, buttons=["copy"]
                    )
                    message = gr.Textbox(lines=1, max_lines=8, label="Message (Enter sends)", elem_id="message")
                    with gr.Row():
                        send = gr.Button("Send", variant="primary", elem_id="send")
                        halt = gr.Button("Stop")
                with gr.Tab("Next token"):
                    grown = gr.Textbox("Once upon a time", lines=4, max_lines=12, label="Text", elem_id="grown")
                    with gr.Row():
                        one = gr.Button("One token", variant="primary", elem_id="one")
                        many = gr.Button("Grow", elem_id="many")
                        still = gr.Button("Stop", elem_id="still")
                    taken = gr.Markdown(elem_id="taken")
                    could = gr.Label(num_top_classes=10, show_heading=False, elem_id="could",
                                     label="The ten most likely tokens, as predicted (temperature 1)")  # fmt: skip
                with gr.Tab("Loss") as loss_tab:
                    curve = gr.Image(interactive=False, show_label=False, buttons=[], elem_id="curve")
                    table = gr.Markdown(elem_id="results")
        settings = [max_new_tokens, temperature, top_k, top_p, seed]
        written = [
            event(write, [current, prompt, *settings], [text, speed], api_name=name, **shared)
            for event, name in ((go.click, "write"), (prompt.submit, False))
        ]
        stop.click(None, cancels=written)
        answers = [
            event(talk, [current, message, talked, remembered, *settings], [talked, message, remembered], **shared)
            for event in (send.click, message.submit)
        ]
        halt.click(None, cancels=answers)
        cleared = talked.clear(None, cancels=answers)  # an event that cancels ignores the outputs of its own function
        cleared.then(lambda: ([], []), None, [talked, remembered], api_name=False, show_progress="hidden")
        steps = [
            event(f, [current, grown, *settings], [grown, could, taken], api_name=False, **shared)
            for event, f in ((one.click, one_token), (many.click, next_tokens))
        ]
        still.click(None, cancels=steps)
        picked = run.input(choose, [run, current], [run, current, talked, remembered], api_name=False)
        picked.then(about, current, [curve, table], api_name=False).then(kind_of, current, kind, api_name=False)
        again.click(refresh, None, run, api_name=False)
        loss_tab.select(about, current, [curve, table], api_name=False)
        page.load(refresh, None, run, api_name=False).then(kind_of, current, kind, api_name=False)
    return page.queue(max_size=8 * visitors, default_concurrency_limit=4 * visitors, api_open=False)


def main() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs gradio: pip install -e '.[demo]'") from None
    for key, low, high in (("port", 1, 65535), ("visitors", 1, 1000), ("max_prompt", 1, 10**7), ("pace", 0, 60)):
        if not low <= globals()[key] <= high:
            raise UserError(f"--{key}={globals()[key]}: must be between {low} and {high}")
    given = out_dir if init_from == "resume" else init_from
    if given:
        models.pretrained = given if is_pretrained(given) else ""
        models.get(given)  # a model that cannot be loaded is an error now
    own = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # fonts of the system, none is downloaded
    theme = gr.themes.Default(font=own[0], font_mono=own[1])
    try:
        build_page(gr).launch(
            server_name=host, server_port=port, theme=theme, ssr_mode=False, footer_links=[], quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there: the port is in use, or the address is not this machine's"
        ) from None
    print(f"http://{host}:{port} shows the page; Ctrl-C ends it")
    threading.Event().wait()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
