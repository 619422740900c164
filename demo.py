"""A page in the browser to play with trained models, at http://127.0.0.1:7870.

    python demo.py                            the runs under out/, the newest first
    python demo.py --out_dir=out/quickstart   select this run first
    python demo.py --init_from=gpt2           offer a pretrained model too
    python demo.py --host=0.0.0.0             for every machine that can reach this one

Needs the extra: pip install -e '.[demo]'. The page loads nothing from other machines.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

import torch

from common import chat, inference
from common.checkpoint import find_checkpoint, find_runs
from common.files import read_json
from common.inference import text_pieces, until
from common.pretrained import is_pretrained
from common.tokenizer import replace_surrogates
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
auth = ""  # name:password that visitors must give; for --host=0.0.0.0

TIPS = """\
- Start as the training texts start: a model of stories knows "Once upon a time", not questions.
- Temperature 0.5 to 0.7 is safe, above 1 is bold; top-k and top-p cut off unlikely tokens.
- The same seed, prompt and settings give the same text. Without a seed every text is different.
- A loss that is lower by 0.1 shows in the text: compare two runs with one prompt and one seed."""


class Models:
    """The last three models used, in memory. A checkpoint that changed on disk is loaded again."""

    def __init__(self):
        self.lock = threading.Lock()
        self.loaded = {}  # name -> [modification time, (model, tokenizer, checkpoint), warning]
        self.pretrained = ""  # the one model that is not a run of ours, if there is one

    def get(self, name: str, warn=lambda message: None) -> tuple:
        """Model, tokenizer and checkpoint. If a changed file cannot be loaded, warn() is called and the old model stays.

        Raises UserError, OSError or RuntimeError if it cannot be loaded and is not in memory.
        """
        with self.lock:
            # A run's file, not its name: if the run is gone, its name could be taken for a hub id.
            file = Path(name) if name == self.pretrained else find_checkpoint(name)
            changed = file.stat().st_mtime if file.is_file() else None
            entry = self.loaded.pop(name, None)
            if entry is None or changed != entry[0]:
                try:
                    loaded = inference.load_for_inference(str(file), device, dtype, quantize, data_dir)
                    entry = [changed, loaded, ""]
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


models = Models()
step_lock = threading.Lock()  # whoever holds it has the whole machine for one token


def label(name: str) -> str:
    """A run as the picker shows it: with its loss and size."""
    results = read_json(Path(name) / "results.json")
    loss, size = results.get("final_val_loss"), results.get("model_parameters")
    if loss and size:
        return f"{name}: loss {loss:.3f}, {size / 1e6:.2f}M parameters"
    return f"{name}: no results yet" if Path(name).is_dir() else name


def choices() -> list[tuple[str, str]]:
    """(label, name) of the models to choose from."""
    given, names = out_dir if init_from == "resume" else init_from, {}
    if given:
        names[given if given == models.pretrained else Path(given).resolve()] = given
    for run in find_runs():
        names.setdefault(run.resolve(), str(run))
    return [(label(name), name) for name in names.values()]


def clamp(value, low, high, default):
    return default if value is None else min(max(value, low), high)


def paced(stream):
    """The items of a stream: visitors take turns, token by token."""
    while True:
        with step_lock:
            new = next(stream, None)
        if new is None:
            return
        yield new
        time.sleep(pace)


def sample_ids(model, tokenizer, ids: list[int], settings: tuple, limit=None, on_end=lambda: None, on_logits=None):
    """Yields the ids that continue a prompt, up to the end-of-text token, for which on_end() is called."""
    max_new_tokens, temperature, top_k, top_p, seed = settings
    rng, V = torch.Generator(model.device), model.config.vocab_size
    rng.manual_seed(int(seed)) if seed.strip() else rng.seed()
    stream = inference.stream_ids(
        model, tokenizer, [ids], limit or answer_tokens(max_new_tokens), graph=False, rng=rng, on_logits=on_logits,
        temperature=clamp(temperature, 0.1, 2.0, 0.8), top_k=int(clamp(top_k, 0, min(500, V), min(200, V))),
        top_p=clamp(top_p, 0.0, 1.0, 1.0),
    )  # fmt: skip
    return inference.until_eot(paced(stream), tokenizer, on_end)


def answer_tokens(max_new_tokens) -> int:
    return int(clamp(max_new_tokens, 10, 500, 200))


def build_page(gr):
    """The page, as a gradio.Blocks."""
    from PIL import Image  # gradio's own need

    shared = {"concurrency_id": "texts", "concurrency_limit": visitors, "show_progress": "hidden"}

    @contextlib.contextmanager
    def errors_on_page():
        try:
            yield
        except (UserError, OSError, RuntimeError) as e:
            raise gr.Error(str(e), print_exception=False) from None

    def model_of(name: str | None, text: str = "", seed: str = "") -> tuple:
        """Model, tokenizer and checkpoint of a run. Raises UserError for a text or a seed that is out of range, too."""
        seed = seed.strip()
        if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63):
            raise UserError(f"The seed {seed[:30]} is not a whole number below 2^63.")
        if len(text) > max_prompt:
            raise UserError(f"The prompt has {len(text):,} characters; at most {max_prompt:,} are taken.")
        if not name:
            raise UserError("There is no trained model under out/ yet. Train one: python train.py config/quickstart.py")
        return models.get(name, gr.Warning)

    def write(name, prompt, *settings):
        """The text as it is sampled, and the speed."""
        with errors_on_page():
            model, tokenizer, _ = model_of(name, prompt, settings[-1])
            all_ids = inference.prompt_ids(tokenizer, prompt)
            ids = all_ids[-model.config.block_size :]
            cut = len(all_ids) > len(ids)
            note = f"; it sees the last {len(ids):,} of the prompt's {len(all_ids):,} tokens" if cut else ""
            text, began = replace_surrogates(prompt), time.perf_counter()

            def speed(count: int) -> str:
                return f"{count} tokens, {count / (time.perf_counter() - began):.0f} a second{note}"

            for count, piece in enumerate(text_pieces(tokenizer, sample_ids(model, tokenizer, ids, settings)), 1):
                text += piece
                yield text, speed(count)
            yield text, speed(count - 1)  # the last piece is no token, only the rest of an incomplete character

    def next_tokens(name, text, *settings, limit=None):
        """The text as it is sampled, the most likely tokens of each step, and the one that was sampled."""
        with errors_on_page():
            model, tokenizer, _ = model_of(name, text, settings[-1])
            text = replace_surrogates(text)
            ids, logits, new = inference.prompt_ids(tokenizer, text)[-model.config.block_size :], [], []
            stream = sample_ids(model, tokenizer, ids, settings, limit, on_logits=lambda rows: logits.append(rows[0]))
            for i in stream:
                new.append(i)
                top, token = inference.top_tokens(logits.pop(0), tokenizer), inference.token_repr(tokenizer, i)
                yield text + tokenizer.decode(new), top, f"sampled: `{token}`, {top.get(token, 0):.1%}"
            if logits:
                top = inference.top_tokens(logits.pop(0), tokenizer)
                yield text + tokenizer.decode(new), top, "sampled: the end of the text"

    def one_token(name, text, *settings):
        yield from next_tokens(name, text, *settings, limit=1)

    def talk(name, message, history, remembered, *settings):
        """The conversation as the answer is sampled. remembered: the exchanges (message, answer) in the model's context."""
        with errors_on_page():
            model, tokenizer, checkpoint = model_of(name, message, settings[-1])
            message = replace_surrogates(message)
            if not message.strip():
                yield history, message, remembered
                return
            limit, is_chat, answer, ended = model.config.block_size, bool(checkpoint.get("is_chat")), "", []
            room = limit - min(answer_tokens(settings[0]), limit // 2)
            ids, _ = chat.chat_prompt(tokenizer, remembered, chat.known_part(tokenizer, message)[0], room, is_chat)
            stream = sample_ids(model, tokenizer, ids, settings, on_end=lambda: ended.append(True))
            box = ""  # the first token clears the input; later ones leave what is typed meanwhile
            for piece in until(text_pieces(tokenizer, stream), chat.END_OF_TURN if is_chat else ""):
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
        except (UserError, OSError, RuntimeError) as e:
            if current is None:
                raise gr.Error(str(e), print_exception=False) from None
            gr.Warning(f"{e} {current} stays.")
            return gr.update(value=current), current, gr.skip(), gr.skip()
        return gr.update(), name, [], []

    def refresh():
        return gr.update(choices=choices())

    def about(name):
        """The loss curve and results of a run, and whether it is a chat model."""
        if not name:
            return None, "no results yet", ""
        folder, picture, kind, rows = Path(name), None, "", []
        if (folder / "loss.png").exists():
            with Image.open(folder / "loss.png") as file:
                picture = file.copy()
        results = read_json(folder / "results.json")
        keys = "final_val_loss final_val_perplexity model_parameters tokens total_steps train_seconds device"
        for key in keys.split():
            if (value := results.get(key)) is not None:
                number_format = {float: ",.5g", int: ","}.get(type(value), "")
                rows.append(f"| {key} | {value:{number_format}} |")
        table = "\n".join([f"| {name} | |", "|---|---|", *rows]) if rows else "no results yet"
        with contextlib.suppress(UserError, OSError, RuntimeError):
            is_chat = models.get(name)[2].get("is_chat")
            kind = "It was trained on conversations." if is_chat else "It is no chat model: it continues your text."
        return picture, table, kind

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
                        "Once upon a time", max_lines=8, label="Prompt (Enter writes)", elem_id="prompt"
                    )
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                    text = gr.Textbox(lines=14, max_lines=30, label="Text", elem_id="text")
                    speed = gr.Markdown(elem_id="speed")
                with gr.Tab("Chat"):
                    kind = gr.Markdown(elem_id="kind")
                    style = {"render_markdown": False, "show_label": False, "buttons": ["copy"]}
                    talked = gr.Chatbot(height=420, elem_id="talked", **style)
                    message = gr.Textbox(max_lines=8, label="Message (Enter sends)", elem_id="message")
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
        writes = [current, prompt, *settings], [text, speed]
        written = [event(write, *writes, **shared) for event in (go.click, prompt.submit)]
        stop.click(None, cancels=written)
        says = [current, message, talked, remembered, *settings], [talked, message, remembered]
        answers = [event(talk, *says, **shared) for event in (send.click, message.submit)]
        halt.click(None, cancels=answers)
        cleared = talked.clear(None, cancels=answers)  # an event that cancels ignores the outputs of its own function
        cleared.then(lambda: ([], []), None, [talked, remembered], show_progress="hidden")
        grows = [current, grown, *settings], [grown, could, taken]
        steps = [one.click(one_token, *grows, **shared), many.click(next_tokens, *grows, **shared)]
        still.click(None, cancels=steps)
        picked = run.input(choose, [run, current], [run, current, talked, remembered])
        again.click(refresh, None, run)
        for event in (picked.then, loss_tab.select, page.load(refresh, None, run).then):
            event(about, current, [curve, table, kind])
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
    if auth and not all(auth.partition(":")):
        raise UserError("--auth: give a name and a password, --auth=name:password")
    given = out_dir if init_from == "resume" else init_from
    if given:
        models.pretrained = given if is_pretrained(given) else ""
        models.get(given)  # a model that cannot be loaded is an error now
    # The system's fonts: none is downloaded.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"server_name": host, "server_port": port, "theme": theme, "ssr_mode": False, "footer_links": []}
    options |= {"max_file_size": 1, "auth": tuple(auth.split(":", 1)) if auth else None}  # the page takes no file
    try:
        build_page(gr).launch(quiet=True, prevent_thread_lock=True, **options)
    except OSError:
        reason = "cannot listen there: the port is in use, or the address is not this machine's"
        raise UserError(f"--host={host} --port={port}: {reason}") from None
    print(f"http://{host}:{port} shows the page; Ctrl-C ends it")
    threading.Event().wait()


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
