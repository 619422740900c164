"""A page in the browser to play with trained models, at http://127.0.0.1:7870.

    python demo.py                            the runs under out/, the newest first
    python demo.py --out_dir=out/quickstart   select this run first
    python demo.py --init_from=gpt2           offer a pretrained model too
    python demo.py --host=0.0.0.0             for every machine that can reach this one

Needs the extra: pip install -e '.[demo]'. The page loads nothing from other machines.
"""

import contextlib
import functools
import html
import itertools
import os
import sys
import threading
import time
from pathlib import Path

from common import chat, inference
from common.checkpoint import find_checkpoint, find_runs
from common.files import read_json, read_metrics
from common.inference import text_pieces, until
from common.pretrained import is_pretrained
from common.tokenizer import replace_surrogates
from configurator import UserError, configure, short_errors

import torch

out_dir = ""  # the run to select first; empty: the newest one
init_from = "resume"  # resume: a run | a checkpoint | gpt2, gpt2-medium, ... | a Hugging Face folder or id
data_dir = "data"  # where nanoGPT's checkpoints find the meta.pkl of their dataset
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto (bfloat16 where the processor has it, float16 on older GPUs, else float32) | float32 | bfloat16 | float16
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
NO_RUN = "There is no trained model under out/ yet. Train one: `python train.py config/quickstart.py`"
# Of Okabe and Ito, those that are seen on white and on black.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#999933")
# The chat fills the window above its input; the table of the next tokens follows the colours of the theme.
CSS = """
main.fillable { padding: 8px 16px !important }
main .tabs { margin-top: -8px }
main .tab-container button { padding: 0 10px }
main .tabitem { padding: 8px 0 0 }
#run { min-width: 0 }
#run input { text-overflow: ellipsis; padding-right: 24px }
#results td:not(:first-child), #results th { white-space: nowrap }
#talked button[title=Clear] { display: none }
#refresh { min-width: 44px; font-size: 20px }
#new_chat { flex-grow: 0 }
#settings .chevron { display: none }
#settings .toggle-button::after { content: "⚙"; font-size: 20px; line-height: 1; margin: auto }
#settings.open .toggle-button::after { content: "✕" }
.quiet, .notice { flex-grow: 1; align-self: center }
.quiet:not(:has(p)), .notice:not(:has(p)) { display: none }
.notice, .notice * { color: #b91c1c }
.dark .notice, .dark .notice * { color: #fca5a5 }
#could table { width: 100%; border-collapse: collapse; font: 14px ui-monospace, monospace }
#could td, #could tr { padding: 2px 8px; white-space: pre; border: 0 !important; background: none }
#could td:nth-child(2) { width: 60%; min-width: 80px }
#could td:nth-child(3) { text-align: right }
#could .bar { background: var(--neutral-400); height: 12px; border-radius: 3px }
#could .taken td { font-weight: bold; color: var(--primary-600) }
#could .taken .bar { background: var(--primary-500) }
.dark #could .taken td { color: var(--primary-300) }
@media (max-width: 600px) { main .tab-container button { padding: 0 6px; font-size: 14px } }
"""


class Models:
    """The last three models used, in memory. A checkpoint that changed on disk is loaded again."""

    def __init__(self):
        self.lock = threading.Lock()
        self.loaded = {}  # name -> [modification time, (model, tokenizer, checkpoint), warning]
        self.pretrained = ""  # the one model that is not a run of ours, if there is one
        self.warn = print

    def get(self, name: str) -> tuple:
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
            self.warn(entry[2])
        return entry[1]


models = Models()
step_lock = threading.Lock()  # whoever holds it has the whole machine for one token


def short_name(name: str) -> str:
    """A run's name as people know it: without the folder out/."""
    path = Path(name)
    return str(path.relative_to("out")) if path.parts[:1] == ("out",) and len(path.parts) > 1 else name


def label(name: str) -> str:
    """A run as the picker shows it: "quickstart · loss 0.272 · 0.54M parameters"."""
    results, path = read_json(Path(name) / "results.json"), Path(name)
    parts = [short_name(name)]
    if (loss := results.get("final_val_loss")) is not None:
        parts.append(f"loss {loss:.3f}")
    if size := results.get("model_parameters"):
        parts.append(f"{size / 1e6:.2f}M parameters")
    return " · ".join(parts if len(parts) > 1 or not path.is_dir() else [*parts, "not finished"])


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


def token_rows(top: dict[str, float], taken: str) -> str:
    """A table of the most likely tokens, as HTML: those of 1 % and more, and the token that was taken, marked."""
    rows = []
    for token, p in top.items():
        if p >= 0.01 or token == taken:
            mark = ("taken", " ← taken") if token == taken else ("", "")
            bar = f'<div class="bar" style="width: {max(1, round(100 * p))}%"></div>'
            rows.append(
                f'<tr class="{mark[0]}"><td>{html.escape(token + mark[1])}</td><td>{bar}</td><td>{p:.1%}</td></tr>'
            )
    return f"<table>{''.join(rows)}</table>"


def loss_rows(names: list[str], key: str) -> list[dict]:
    """The losses of runs, at most 500 of each, as the rows of a table: run, step, loss. key: val_loss | train_loss."""
    rows = []
    for name in names:
        found: list[dict] = []
        with contextlib.suppress(OSError):  # no run of ours
            found = [h for h in read_metrics(Path(name)) if h.get(key) is not None and h["step"]]
        every = -(-len(found) // 500) or 1
        kept = found[::every] + found[-1:] * bool((len(found) - 1) % every)
        rows += [{"run": short_name(name), "step": h["step"], "loss": h[key]} for h in kept]
    return rows


def results_table(names: list[str]) -> str:
    """The results of runs side by side, as Markdown."""
    units = {
        "final_val_loss": "validation loss, nats per token (lower is better)", "final_val_perplexity": "perplexity",
        "model_parameters": "parameters", "tokens": "training tokens", "total_steps": "steps",
        "train_seconds": "seconds of training", "device": "device",
    }  # fmt: skip
    results = [read_json(Path(name) / "results.json") for name in names]
    if not any(results):
        return "No results yet: they are written at the end of a run."

    def cell(value) -> str:
        return "" if value is None else format(value, {float: ",.4g", int: ","}.get(type(value), ""))

    lines = ["| | " + " | ".join(short_name(name) for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {unit} | " + " | ".join(cell(r.get(key)) for r in results) + " |" for key, unit in units.items()]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# What the tabs do. Each function yields the values of its outputs, again with every token; the last is a notice.


def model_of(name: str | None, text: str = "", seed: str = "") -> tuple:
    """Model, tokenizer and checkpoint of a run. Raises UserError for a text or a seed that is out of range, too."""
    seed = seed.strip()
    if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63):
        raise UserError(f"The seed {seed[:30]} is not a whole number below 2^63.")
    if len(text) > max_prompt:
        raise UserError(f"The text has {len(text):,} characters; at most {max_prompt:,} are taken.")
    if not name:
        raise UserError(NO_RUN)
    return models.get(name)


def write(name, prompt, *settings):
    """Yields the text as it is sampled, the speed, and a notice if the prompt was cut."""
    model, tokenizer, _ = model_of(name, prompt, settings[-1])
    all_ids = inference.prompt_ids(tokenizer, prompt)
    ids = all_ids[-model.config.block_size :]
    cut = len(all_ids) > len(ids)
    note = f"It sees the last {len(ids):,} of the prompt's {len(all_ids):,} tokens." if cut else ""
    text, began = replace_surrogates(prompt), time.perf_counter()

    def speed(count: int) -> str:
        return f"{count} tokens, {count / (time.perf_counter() - began):.0f} a second"

    for count, piece in enumerate(text_pieces(tokenizer, sample_ids(model, tokenizer, ids, settings)), 1):
        text += piece
        yield text, speed(count), note
    yield text, speed(count - 1), note  # the last piece is no token, only the rest of an incomplete character


def next_tokens(name, text, *settings, limit=None):
    """Yields the text as it is sampled, and the most likely tokens of each step, the one that was taken marked."""
    model, tokenizer, _ = model_of(name, text, settings[-1])
    text = replace_surrogates(text)
    ids, logits, new = inference.prompt_ids(tokenizer, text)[-model.config.block_size :], [], []
    stream = sample_ids(model, tokenizer, ids, settings, limit, on_logits=lambda rows: logits.append(rows[0]))
    for i in stream:
        new.append(i)
        row, token = logits.pop(0), inference.token_repr(tokenizer, i)
        top = inference.top_tokens(row, tokenizer)
        top.setdefault(token, row.float().softmax(-1)[i].item())
        yield text + tokenizer.decode(new), token_rows(top, token), ""
    if logits:
        top = inference.top_tokens(logits.pop(0), tokenizer)
        yield text + tokenizer.decode(new), token_rows(top, ""), "The model ended the text here."


def one_token(name, text, *settings):
    yield from next_tokens(name, text, *settings, limit=1)


# A conversation is a list of exchanges (message, answer, whether the model then ended the text).


def shown(exchanges: list) -> list[dict]:
    """The exchanges as messages of the page."""
    messages = []
    for question, answer, _ in exchanges:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer}] * bool(answer)
    return messages


def in_context(exchanges: list, is_chat: bool) -> list[tuple[str, str]]:
    """The exchanges that the model may see: all, or of a model that continues texts those since a text ended."""
    ends = [n for n, (*_, ended) in enumerate(exchanges, 1) if ended and not is_chat]
    return [(question, answer) for question, answer, _ in exchanges[ends[-1] if ends else 0 :] if answer]


def talk(name, message, exchanges, system, *settings):
    """Yields the messages and the exchanges as the answer is sampled."""
    model, tokenizer, checkpoint = model_of(name, message + system, settings[-1])
    message, system = replace_surrogates(message), replace_surrogates(system.strip())
    if not message.strip():
        return
    limit, is_chat, answer, ended = model.config.block_size, bool(checkpoint.get("is_chat")), "", []
    known, unknown = chat.known_part(tokenizer, message)
    if not known.strip():
        raise UserError(f"The model knows none of the characters {unknown!r}.")
    note = f"The model does not know {unknown!r}: left out." if unknown else ""
    before, room = in_context(exchanges, is_chat), chat.prompt_room(limit, answer_tokens(settings[0]))
    ids, kept = chat.chat_prompt(tokenizer, before, known, room, is_chat, system if is_chat else "")
    if kept < len(before):
        note += f" The context of {limit} tokens has room for {kept} of the {len(before)} earlier exchanges."
    stream = sample_ids(model, tokenizer, ids, settings, on_end=lambda: ended.append(True))
    now = [*exchanges, (message, "", False)]
    yield shown(now), now, note
    for piece in until(text_pieces(tokenizer, stream), chat.END_OF_TURN if is_chat else ""):
        answer += piece if answer or not is_chat else piece.lstrip()
        now = [*exchanges, (message, answer, False)]
        yield shown(now), now, note
    yield shown(now), [*exchanges, (message, answer, bool(ended))], note


def again(index: int, message: str | None, exchanges, name, system, *settings):
    """Answer message number `index` of the page anew and forget what came after it. message: its new text, if edited."""
    for number in range(len(exchanges)):
        if len(shown(exchanges[: number + 1])) > index:
            message = exchanges[number][0] if message is None else message
            yield from talk(name, message, exchanges[:number], system, *settings)
            return


# -----------------------------------------------------------------------------
# The page


def build_page(gr):
    """The page, as a gradio.Blocks."""
    import pandas as pd  # gradio's own need

    shared = {"concurrency_id": "texts", "concurrency_limit": visitors, "show_progress": "hidden"}
    errors = (UserError, OSError, RuntimeError)
    models.warn = gr.Warning

    def busy(name: str):
        """A text box whose button `name` now stops; without a name, the Stop button."""
        return gr.update(submit_btn=False, stop_btn="Stop") if name else gr.update(visible=True)

    def idle(name: str):
        return gr.update(submit_btn=name, stop_btn=False) if name else gr.update(visible=False)

    def streamed(function, trigger, inputs, outputs, notice, box, name="", clear=False):
        """On the trigger, stream the function's values to the outputs, its notices and errors to `notice`.

        Meanwhile `box` (see busy) can stop it. clear: empty the box when the function has begun.
        """
        nothing = [gr.skip()] * len(outputs)

        @functools.wraps(function)  # gradio passes an event's data by the annotation
        def stream(*values):
            yield *nothing, "", busy(name)
            try:
                for number, new in enumerate(function(*values)):
                    yield *new, gr.update(value="") if clear and not number else gr.skip()
            except Exception as e:  # whatever it was, the button comes back
                yield *nothing, str(e) if isinstance(e, errors) else f"{type(e).__name__}: {e}", gr.skip()
            yield *nothing, gr.skip(), idle(name)

        return trigger(stream, inputs, [*outputs, notice, box], **shared)

    def can_be_stopped(events, trigger, box, name=""):
        """The trigger, such as a Stop button, ends the events and gives the box its button back."""
        # An event that cancels ignores the outputs of its own function.
        trigger(None, cancels=events).then(lambda: idle(name), None, box, show_progress="hidden")

    def one_at_a_time(triggers, events):
        """Each trigger ends the others' events before its own begins."""
        for trigger, own in zip(triggers, events):
            trigger(None, cancels=[event for event in events if event is not own])

    def retry(data: gr.RetryData, *values):
        yield from again(data.index, None, *values)

    def edit(data: gr.EditData, *values):
        yield from again(data.index, data.value, *values)

    def undo(exchanges):
        """Without the last exchange, whose message returns to the input."""
        if not exchanges:
            return gr.skip(), gr.skip(), gr.skip()
        return shown(exchanges[:-1]), exchanges[:-1], idle("Send") | {"value": exchanges[-1][0]}

    def choose(name, before):
        """The selected run and a new conversation, or the run before if it cannot be loaded."""
        try:
            model_of(name)
        except errors as e:
            stays = f" {label(before)} stays." if before else ""
            return {run: gr.update(value=before), run_notice: f"{e}{stays}"}
        return {message: idle("Send"), current: name, talked: [], conversation: [], run_notice: "", chat_notice: ""}

    def refresh(name, curves_of):
        known = choices()
        names = [value for _, value in known]
        value = name or (known[0][1] if known else None)
        curves_of = [n for n in curves_of if n in names] or [value] * bool(value)
        short = [(short_name(n), n) for n in names]
        return gr.update(choices=known, value=value), value, gr.update(choices=short, value=curves_of)

    def about(name):
        """Whether a run is a chat model: a line above the chat, and the field for the system text."""
        is_chat, line = False, ""
        with contextlib.suppress(*errors):
            is_chat = bool(name) and bool(models.get(name)[2].get("is_chat"))
            line = "" if is_chat or not name else "This is no chat model: it continues your text."
        return line, gr.update(visible=is_chat)

    def curves(names, which):
        rows = loss_rows(names, "train_loss" if which == "training" else "val_loss")
        return pd.DataFrame(rows, columns=["run", "step", "loss"]), results_table(names)

    def colours(names):
        """Runs and their colours. The plot draws new runs only when this changes after its data has."""
        return gr.LinePlot(color_map=dict(zip(map(short_name, names), itertools.cycle(COLOURS))))

    found = choices()
    first = found[0][1] if found else None
    prompt_of_run = read_json(Path(first or "", "config.json")).get("sample_prompt") or "Once upon a time"
    is_chat = "<|" in prompt_of_run  # the tokens of its turns
    prompt_of_run = "" if is_chat else prompt_of_run
    with gr.Blocks(analytics_enabled=False, title="flatgpt", fill_width=True) as page:
        current, conversation = gr.State(first), gr.State([])
        with gr.Sidebar(label="Settings", open=False, position="right", elem_id="settings", width=320):
            max_new_tokens = gr.Slider(10, 500, 200, step=10, label="Max new tokens", elem_id="max_new_tokens")
            temperature = gr.Slider(0.1, 2.0, 0.8, step=0.05, label="Temperature", elem_id="temperature")
            top_k = gr.Slider(0, 500, 200, step=1, label="Top-k (0: all)", elem_id="top_k")
            top_p = gr.Slider(0.0, 1.0, 1.0, step=0.01, label="Top-p (1: all)", elem_id="top_p")
            seed = gr.Textbox("", label="Seed (empty: another each time)", elem_id="seed")
            system = gr.Textbox(
                "", lines=2, max_lines=6, label="System text of the chat", elem_id="system", visible=False
            )
            with gr.Accordion("Tips", open=False):
                gr.Markdown(TIPS)
        with gr.Row(equal_height=True):
            run = gr.Dropdown(found, value=first, label="Model", elem_id="run", scale=5, container=False)
            renew = gr.Button("↻", elem_id="refresh", scale=0, min_width=44)
        run_notice = gr.Markdown(elem_id="run_notice", elem_classes="notice")
        with gr.Tab("Write") as write_tab:
            prompt = gr.Textbox(
                prompt_of_run, max_lines=8, label="Prompt (Enter writes)", elem_id="prompt", submit_btn="Generate"
            )
            write_notice = gr.Markdown(elem_id="write_notice", elem_classes="notice")
            text = gr.Textbox(lines=14, max_lines=24, label="Text", elem_id="text", buttons=["copy"])
            speed = gr.Markdown(elem_id="speed")
        with gr.Tab("Chat") as chat_tab:
            with gr.Row():
                kind = gr.Markdown(elem_id="kind", elem_classes="quiet")
                new_chat = gr.Button("New chat", size="sm", elem_id="new_chat", scale=0, min_width=90)
            talked = gr.Chatbot(
                height="calc(100dvh - 256px)", min_height=160, elem_id="talked", render_markdown=False, show_label=False,
                buttons=["copy"], editable="user", placeholder="Say something to the model.", group_consecutive_messages=False,
            )  # fmt: skip
            chat_notice = gr.Markdown(elem_id="chat_notice", elem_classes="notice")
            message = gr.Textbox(
                max_lines=8, show_label=False, placeholder="Message (Enter sends)", elem_id="message", submit_btn="Send"
            )
        with gr.Tab("Next token") as next_tab:
            grown = gr.Textbox(prompt_of_run, lines=3, max_lines=12, label="Text", elem_id="grown")
            with gr.Row():
                one = gr.Button("One token", variant="primary", elem_id="one")
                many = gr.Button("Many tokens", elem_id="many")
                still = gr.Button("Stop", variant="stop", elem_id="still", visible=False)
            next_notice = gr.Markdown(elem_id="next_notice", elem_classes="notice")
            could = gr.HTML(elem_id="could")
            gr.Markdown(
                "The most likely tokens before the last one was taken, as the model predicts them (temperature 1)."
            )
        with gr.Tab("Loss") as loss_tab:
            with gr.Row():
                compared = gr.Dropdown(
                    [(short_name(n), n) for _, n in found],
                    value=[first] * bool(first),
                    multiselect=True,
                    label="Runs",
                    elem_id="compared",
                )
                which = gr.Radio(["validation", "training"], value="validation", label="Loss", elem_id="which")
            curve = gr.LinePlot(
                x="step",
                y="loss",
                color="run",
                y_title="loss (nats per token)",
                height=360,
                elem_id="curve",
                buttons=[],
            )
            table = gr.Markdown(elem_id="results")
            clock = gr.Timer(5, active=False)
        settings = [max_new_tokens, temperature, top_k, top_p, seed]

        writes = [current, prompt, *settings]
        written = streamed(write, prompt.submit, writes, [text, speed], write_notice, prompt, "Generate")
        can_be_stopped([written], prompt.stop, prompt, "Generate")
        says = [current, message, conversation, system, *settings]
        parts = [talked, conversation], chat_notice, message
        rest = [conversation, current, system, *settings]
        answers = [
            streamed(talk, message.submit, says, *parts, "Send", clear=True),
            *(streamed(f, on, rest, *parts, "Send") for f, on in ((retry, talked.retry), (edit, talked.edit))),
        ]
        one_at_a_time((message.submit, talked.retry, talked.edit), answers)
        can_be_stopped(answers, message.stop, message, "Send")
        undone = talked.undo(None, cancels=answers)
        undone.then(undo, conversation, [talked, conversation, message], show_progress="hidden")
        emptied = [talked, conversation, chat_notice, message]
        cleared = new_chat.click(None, cancels=answers)
        cleared.then(lambda: ([], [], "", idle("Send")), None, emptied, show_progress="hidden")
        grows, parts = [current, grown, *settings], ([grown, could], next_notice, still)
        steps = [streamed(f, button.click, grows, *parts) for f, button in ((one_token, one), (next_tokens, many))]
        one_at_a_time((one.click, many.click), steps)
        can_be_stopped(steps, still.click, still)
        draw = curves, [compared, which], [curve, table]
        picked = run.input(None, cancels=answers).then(
            choose, [run, current], [run, current, talked, conversation, run_notice, chat_notice, message]
        )
        looked = refresh, [current, compared], [run, current, compared]
        looks = [
            event(about, current, [kind, system]).then
            for event in (picked.then, renew.click(*looked).then, page.load(*looked).then)
        ]
        for tab in (write_tab, chat_tab, next_tab):
            tab.select(lambda: gr.Timer(active=False), None, clock)
        opened = loss_tab.select(lambda: gr.Timer(active=True), None, clock)
        for event in (*looks, opened.then, compared.change, which.change, clock.tick):
            event(*draw, show_progress="hidden").then(colours, compared, curve, show_progress="hidden")
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
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    options = {"server_name": host, "server_port": port, "theme": theme, "ssr_mode": False, "footer_links": []}
    options |= {"css": CSS, "favicon_path": Path(__file__).parent / "common" / "favicon.svg"}
    options |= {"max_file_size": 1, "auth": tuple(auth.split(":", 1)) if auth else None}  # the page takes no file
    try:
        build_page(gr).launch(quiet=True, prevent_thread_lock=True, **options)
    except OSError:
        reason = "cannot listen there: the port is in use, or the address is not this machine's"
        raise UserError(f"--host={host} --port={port}: {reason}") from None
    print(f"http://{host}:{port} shows the page; Ctrl-C ends it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # the threads of a page that is open in a browser would abort an orderly end


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()
