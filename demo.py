"""A page in the browser to play with trained models, at http://127.0.0.1:7870.

    python demo.py                            the runs under out/, the newest first
    python demo.py --out_dir=out/quickstart   begin with this one
    python demo.py --init_from=gpt2           a pretrained model besides
    python demo.py --host=0.0.0.0             for every machine that can reach this one

Needs the extra: pip install -e '.[demo]'. The page itself asks nothing of other machines.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from common.checkpoint import find_checkpoint, find_runs, is_pretrained
from common.inference import END_OF_TURN, chat_prompt, likeliest, load_for_inference, shown, text_pieces, until
from configurator import configure, short_errors

out_dir = ""  # the run to begin with; empty: the newest one
init_from = "resume"  # resume: a run | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where native, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
quantize = ""  # int8: weights of 8 bits
host = "127.0.0.1"  # the address to listen on; 0.0.0.0: on all, so that others reach the page
port = 7870  # its port
visitors = 8  # texts written at once, token by token in turns; who comes later waits in a queue
max_prompt = 20_000  # characters of a prompt at most
pace = 0.0  # seconds at least from token to token, to watch them come

TIPS = """\
- Begin as the texts begin that it was trained on: a model of stories knows "Once upon a time", not questions.
- Temperature 0.5 to 0.7 keeps it to what it is sure of, above 1 it becomes bold; top-k and top-p cut off the unlikely.
- The same seed, prompt and settings give the same text. Without a seed every text is another.
- A loss that is lower by 0.1 is seen in the text; compare two runs with one prompt and one seed."""


class Models:
    """The models in memory, the last three used. A checkpoint that changed is read again."""

    def __init__(self):
        self.lock, self.loaded = threading.Lock(), {}  # name -> [its file's time, (model, tokenizer, payload), trouble]
        self.pretrained = ""  # the one model that is no run of ours, if there is one

    def get(self, name: str, warn=lambda message: None) -> tuple:
        """Model, tokenizer and checkpoint. One that changed and cannot be read stays as it was, and warn() is told.

        Raises ValueError, OSError or RuntimeError if it cannot be loaded and is not in memory.
        """
        with self.lock:
            # Of a run the file, not its name: a hub would be asked for one that is gone.
            file = name if name == self.pretrained else find_checkpoint(name)
            changed = 0 if name == self.pretrained else modified(file)
            entry = self.loaded.pop(name, None)
            if entry is None or changed != entry[0]:
                try:
                    entry = [changed, load_for_inference(str(file), device, dtype, quantize, data_dir), ""]
                except (ValueError, OSError, RuntimeError) as e:
                    if entry is None:
                        raise
                    entry = [changed, entry[1], f"{e}. The model from before stays."]
            self.loaded[name] = entry
            while len(self.loaded) > 3:
                self.loaded.pop(next(iter(self.loaded)))
        if entry[2]:
            warn(entry[2])
        return entry[1]


def modified(file: Path) -> float | None:
    """When a file was last written; None if it is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


models, turn = Models(), threading.Lock()  # of a step: whoever holds it has the whole machine for a token


def label(name: str) -> str:
    """A run as the picker shows it: its loss and size."""
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


def within(value, least, most, otherwise):
    return otherwise if value is None else min(max(value, least), most)


def new_ids(model, tokenizer, ids: list[int], settings: tuple, watch=None, most: int | None = None, ended=lambda: None):
    """The ids that continue a prompt, to the end-of-text token, of which ended() is told. Visitors take turns, token by token."""
    max_new_tokens, temperature, top_k, top_p, seed = settings
    on, V, eot = model.device, model.config.vocab_size, tokenizer.eot
    dice = torch.Generator(on)
    dice.manual_seed(int(seed)) if seed.strip() else dice.seed()
    new = model.generate(
        torch.tensor([ids], device=on),
        most or int(within(max_new_tokens, 10, 500, 200)),
        temperature=within(temperature, 0.1, 2.0, 0.8),
        top_k=int(within(top_k, 0, min(500, V), min(200, V))),
        top_p=within(top_p, 0.0, 1.0, 1.0),
        stop_tokens=() if eot is None else (eot,),
        generator=dice,
        graph=False,
        watch=watch,
    )
    due = 0.0
    while True:
        time.sleep(max(0.0, due - time.perf_counter()))
        due = time.perf_counter() + pace
        with turn:
            step = next(new, None)
        if step is None:
            return
        if step.item() == eot:
            return ended()
        yield step.item()


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
        except (ValueError, OSError, RuntimeError) as e:
            raise gr.Error(str(e)) from None

    def ids_of(name: str | None, prompt: str, seed: str) -> tuple:
        if len(prompt) > max_prompt:
            raise gr.Error(f"The prompt has {len(prompt):,} characters; at most {max_prompt:,} are taken.")
        model, tokenizer, _ = model_of(name, seed)
        try:
            ids = tokenizer.encode(prompt, special=True) or [tokenizer.eot or 0]
        except ValueError as e:
            raise gr.Error(str(e)) from None
        return model, tokenizer, ids[-model.config.block_size :], len(ids)

    def told(stream):
        """What a stream of ids gives; what goes wrong in it is shown in the page."""
        try:
            yield from stream
        except (ValueError, RuntimeError) as e:
            raise gr.Error(str(e)) from None

    def write(name, prompt, *settings):
        """The text as it grows, and how fast."""
        model, tokenizer, ids, all_ids = ids_of(name, prompt, settings[-1])
        note = f"; it sees the last {len(ids):,} of the prompt's {all_ids:,} tokens" if all_ids > len(ids) else ""
        text, count, began = prompt, 0, time.perf_counter()
        for piece in text_pieces(tokenizer, told(new_ids(model, tokenizer, ids, settings))):
            text, count = text + piece, count + 1
            yield text, f"{count} tokens, {count / (time.perf_counter() - began):.0f} a second{note}"
        yield text, f"{count - 1} tokens, {count / (time.perf_counter() - began):.0f} a second{note}"

    def grow(name, prompt, *settings, most=None):
        """The text as it grows; what each token could have been; which it was."""
        model, tokenizer, ids, _ = ids_of(name, prompt, settings[-1])
        logits, text, new = [], prompt, []
        for i in told(new_ids(model, tokenizer, ids, settings, lambda rows: logits.append(rows[0]), most)):
            could, new = likeliest(logits.pop(0), tokenizer), [*new, i]
            text, taken = prompt + tokenizer.decode(new), shown(tokenizer, i)
            yield text, dict(could), f"taken: `{taken}`, {dict(could).get(taken, 0):.1%}"
        if logits:  # the end of the text
            yield text, dict(likeliest(logits.pop(0), tokenizer)), "taken: the end of the text"

    def grow_one(name, prompt, *settings):
        yield from grow(name, prompt, *settings, most=1)

    def talk(name, message, history, said, *settings):
        """The conversation as the answer grows; said: the exchanges that the model is to remember."""
        if len(message) > max_prompt:
            raise gr.Error(f"The message has {len(message):,} characters; at most {max_prompt:,} are taken.")
        model, tokenizer, payload = model_of(name, settings[-1])
        if not message.strip():
            yield history, message, said
            return
        limit, in_turns = model.config.block_size, bool(payload.get("turns"))
        room = max(1, limit - min(int(within(settings[0], 10, 500, 200)), limit // 2))
        try:
            ids, _ = chat_prompt(tokenizer, said, message, room, in_turns)
        except ValueError as e:
            raise gr.Error(str(e)) from None
        answer, over = "", []
        stream = new_ids(model, tokenizer, ids, settings, ended=lambda: over.append(True))
        pieces = text_pieces(tokenizer, told(stream))
        box = ""  # the message goes with the first token, and no later one
        for piece in until(pieces, END_OF_TURN if in_turns else ""):
            answer += piece if answer or not in_turns else piece.lstrip()
            exchange = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
            yield history + exchange, box, [*said, (message, answer)]
            box = gr.skip()
        if over and not in_turns:  # the text is at its end: what comes next begins another
            yield gr.skip(), gr.skip(), []

    def choose(name, current):
        """The run that was picked and a new conversation, or the one before if it cannot be loaded."""
        try:
            model_of(name)
        except gr.Error as e:
            if current is None:
                raise
            gr.Warning(f"{e.message} {current} stays.")
            return gr.update(value=current), current, gr.skip(), gr.skip()
        return gr.update(), name, [], []

    def look():
        """What there is to choose from now."""
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
        shown = {
            k: f"{v:,.5g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for k, v in values.items()
        }
        table = f"| {name} | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in shown.items())
        return picture, table if found else "no results yet"

    def kind_of(name):
        try:
            turns = bool(models.get(name)[2].get("turns")) if name else None
        except (ValueError, OSError, RuntimeError):
            turns = None
        if turns is None:
            return ""
        return "It was trained on conversations." if turns else "It is no chat model: it goes on with your text."

    found = choices()
    first = found[0][1] if found else None
    with gr.Blocks(analytics_enabled=False, title="flatgpt") as page:
        current, said = gr.State(first), gr.State([])
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
                                     label="The ten likeliest, as the model predicts them (temperature 1)")  # fmt: skip
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
            event(talk, [current, message, talked, said, *settings], [talked, message, said], **shared)
            for event in (send.click, message.submit)
        ]
        halt.click(None, cancels=answers)
        cleared = talked.clear(None, cancels=answers)  # what cancels loses the answers of its own function, so then:
        cleared.then(lambda: ([], []), None, [talked, said], api_name=False, show_progress="hidden")
        steps = [
            event(f, [current, grown, *settings], [grown, could, taken], api_name=False, **shared)
            for event, f in ((one.click, grow_one), (many.click, grow))
        ]
        still.click(None, cancels=steps)
        picked = run.input(choose, [run, current], [run, current, talked, said], api_name=False)
        picked.then(about, current, [curve, table], api_name=False).then(kind_of, current, kind, api_name=False)
        again.click(look, None, run, api_name=False)
        loss_tab.select(about, current, [curve, table], api_name=False)
        page.load(look, None, run, api_name=False).then(kind_of, current, kind, api_name=False)
    return page.queue(max_size=8 * visitors, default_concurrency_limit=4 * visitors, api_open=False)


def main() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("the page needs gradio: pip install -e '.[demo]'") from None
    for key, least, most in (("port", 1, 65535), ("visitors", 1, 1000), ("max_prompt", 1, 10**7), ("pace", 0, 60)):
        if not least <= globals()[key] <= most:
            raise ValueError(f"--{key}={globals()[key]}: must be between {least} and {most}")
    given = out_dir if init_from == "resume" else init_from
    if given:
        models.pretrained = given if is_pretrained(given) else ""
        models.get(given)  # what was asked for is there, or this ends now
    own = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # no font is fetched
    theme = gr.themes.Default(font=own[0], font_mono=own[1])
    try:
        build_page(gr).launch(
            server_name=host, server_port=port, theme=theme, ssr_mode=False, footer_links=[], quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
    except OSError:
        raise ValueError(
            f"--host={host} --port={port}: cannot listen there; the port is taken, or the address is not this machine's"
        ) from None
    print(f"http://{host}:{port} shows the page; Ctrl-C ends it")
    threading.Event().wait()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    with short_errors():
        configure(globals())
        main()
