"""Conversations as text and as tokens: the chat template, what of a conversation is learned, and the prompt for an answer.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": text}. A system message may come
first; then user and assistant take turns. A chat template, in Jinja as transformers has it, makes one text of them. The
tokenizer stores it, and an export gives it to others, so that all of them make the same tokens.
"""

import datetime
import functools
import json
import re

from common.shards import BEGINS, CUT, LEARNED
from common.tokenizer import CharTokenizer, IdTokenizer, PretrainedTokenizer, Tokenizer, replace_surrogates
from configurator import UserError, first_line

import numpy as np

# The format of ChatML, which most models of today use: for vocabularies that have its two tokens.
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# For vocabularies without: END ends every answer, which is the end-of-text token where there is one.
PLAIN = (
    "START{% for message in messages %}{% if message['role'] == 'user' %}User: {{ message['content'] }}\nAssistant:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}END{% else %}{{ message['content'] }}END{% endif %}{% endfor %}"
)
END_OF_TURN = "\nUser:"  # ends an answer of a vocabulary without an end-of-text token
Messages = list[dict[str, str]]


def template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template, or the one that suits its vocabulary."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if isinstance(tokenizer, IdTokenizer):
        raise UserError("a vocabulary of numbers cannot chat")
    end = "" if tokenizer.eot is None else tokenizer.token_bytes(tokenizer.eot).decode()
    if {*TURN_TOKENS} <= {*tokenizer.special_names()}:
        # Our datasets begin every document with the end-of-text token; other models' conversations begin without one.
        return CHATML if isinstance(tokenizer, PretrainedTokenizer) else end + CHATML
    start = tokenizer.decode(tokenizer.bos) if tokenizer.bos else end
    return PLAIN.replace("START", start).replace("END", end or "{{ '\n' }}")


def for_chat(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with its chat template stored, and the token that ends a turn among its stops."""
    tokenizer.chat_template = template_of(tokenizer)
    if TURN_TOKENS[1] in tokenizer.special_names() and TURN_TOKENS[1] in tokenizer.chat_template:
        (end,) = tokenizer.encode(TURN_TOKENS[1], special=True)
        tokenizer.stops = tuple(sorted({*tokenizer.stops, end}))
    return tokenizer


@functools.lru_cache(8)
def compile_template(text: str):
    """With the options and functions of transformers, in a sandbox: a template may come from the hub."""
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks the assistant's words, which are found otherwise here."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)


def render(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The text of a conversation. add_generation_prompt: up to where the next answer begins."""
    tokens = {"bos_token": "", "eos_token": ""}
    if tokenizer.eot is not None:
        tokens["eos_token"] = tokens["bos_token"] = tokenizer.token_bytes(tokenizer.eot).decode()
    if tokenizer.bos:
        tokens["bos_token"] = tokenizer.decode(tokenizer.bos)
    elif tokenizer.bos_token is not None:
        tokens["bos_token"] = tokenizer.bos_token
    try:
        template = compile_template(template_of(tokenizer))
        options = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return template.render(messages=messages, **options, **tokens)
    except UserError:
        raise
    except Exception as e:  # a template can raise anything
        raise UserError(f"the model's chat template fails: {first_line(e)}") from None


def clean_content(tokenizer: Tokenizer, text: str) -> str:
    """A message without spaces around it and without the special tokens, which would end its turn."""
    pattern, before = "|".join(map(re.escape, tokenizer.special_names())), None
    while pattern and text != before:  # what is left may form a special token anew
        before, text = text, re.sub(pattern, "", text)
    return replace_surrogates(text).strip()


def clean_messages(tokenizer: Tokenizer, messages: Messages) -> Messages:
    """The messages cleaned, without the exchanges that then have no question or no answer."""
    messages = [{**m, "content": clean_content(tokenizer, m["content"])} for m in messages]
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(system) :]
    kept = [pair for pair in zip(rest[::2], rest[1::2]) if all(m["content"] for m in pair)]
    return [*(m for m in system if m["content"] and kept), *(message for pair in kept for message in pair)]


def known_part(tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """A text without the characters that the vocabulary lacks, and those characters."""
    if not isinstance(tokenizer, CharTokenizer):
        return text, ""
    unknown = "".join(dict.fromkeys(c for c in text if c not in tokenizer.ids))
    return "".join(c for c in text if c in tokenizer.ids), unknown


def check_messages(messages: object, where: str) -> Messages:
    """The messages of a conversation. Raises UserError if they are none.

    An exchange whose question or answer is empty is left out, a question at the end that has no answer too.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    found: Messages = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}, message {number}: the role is {role!r}, not system, user or assistant")
        if not isinstance(content, str):
            raise UserError(f"{where}, message {number}: the content is a {type(content).__name__}, not a text")
        found.append({"role": role, "content": replace_surrogates(content).strip()})
    system = found[:1] if found[0]["role"] == "system" else []
    rest = found[len(system) :]
    if any(message["role"] != ("user", "assistant")[n % 2] for n, message in enumerate(rest)):
        raise UserError(
            f"{where}: after an optional system message, user and assistant must take turns, the user first"
        )
    if len(rest) < 2:
        raise UserError(f"{where}: there is no assistant turn to learn")
    pairs = [(q, a) for q, a in zip(rest[::2], rest[1::2]) if q["content"] and a["content"]]
    return [*(m for m in system if m["content"]), *(message for pair in pairs for message in pair)]


def encode_conversation(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], np.ndarray]:
    """The ids of a conversation and the flags of their mask, uint8: LEARNED, BEGINS and CUT of common/shards.py.

    The ids are those of the whole text at once, as transformers' apply_chat_template gives them.
    """
    messages = clean_messages(tokenizer, messages)
    if not messages:
        return [], np.zeros(0, np.uint8)
    text, spans, cuts = render(tokenizer, messages), [], []
    stop_texts = [tokenizer.token_bytes(i).decode(errors="replace") for i in tokenizer.stops]
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(tokenizer, messages[:n], True), render(tokenizer, messages[: n + 1])
            if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
                raise UserError(
                    "the model's chat template changes earlier turns later on: it is not known what to learn"
                )
            end = max(
                (after.rfind(stop, len(before)) + len(stop) for stop in stop_texts if stop in after[len(before) :]),
                default=0,
            )
            spans += [len(before), end or len(after)]
        elif n and messages[n - 1]["role"] == "assistant":
            cuts.append(len(render(tokenizer, messages[:n])))
    ids, starts = encode_with_starts(tokenizer, text)
    flags = (np.searchsorted(spans, starts, side="right") % 2).astype(np.uint8) * LEARNED
    flags[:1] |= BEGINS
    for i in np.searchsorted(starts, cuts).tolist():
        i -= ids[i - 1] == tokenizer.eot  # which begins a document
        flags[i] |= CUT
    return ids, flags


def encode_with_starts(tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """The ids of a text with its special tokens, and the character that each begins with."""
    if isinstance(tokenizer, PretrainedTokenizer):
        encoded = tokenizer.library.encode(text, add_special_tokens=False)
        return encoded.ids, np.array([start for start, _ in encoded.offsets], np.int64)
    ids = tokenizer.encode(text, special=True)
    sizes = np.cumsum([0, *(len(tokenizer.token_bytes(i)) for i in ids)])[:-1]
    is_first_byte = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    return ids, (np.cumsum(is_first_byte) - 1)[sizes]


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """The ids of documents, with their flags above bit 32: each the JSON of a conversation, or of a text, all of it learned."""
    parts = [np.zeros(0, np.int64)]
    for document in map(json.loads, documents):
        if isinstance(document, str):
            first = [] if tokenizer.eot is None else [tokenizer.eot]
            ids = [*first, *tokenizer.encode(document)]
            flags = np.full(len(ids), LEARNED, np.uint8)
            flags[:1] = BEGINS
        else:
            ids, flags = encode_conversation(tokenizer, document)
        parts.append(np.array(ids, np.int64) | flags.astype(np.int64) << 32)
    return np.concatenate(parts)


def plain_text(document: str) -> str:
    """The text of a document of encode_documents, from which a vocabulary is learned."""
    document = json.loads(document)
    if isinstance(document, str):
        return document
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    return "\n".join(names[message["role"]] + message["content"] for message in document)


def prompt_room(context: int, max_new_tokens: int) -> int:
    """The tokens of the context that a prompt may take: the answer keeps its own, but at most a quarter of the context."""
    return context - min(max_new_tokens, context // 4)


def chat_prompt(
    tokenizer: Tokenizer, history: list[tuple[str, str]], message: str, room: int, is_chat: bool, system: str = ""
) -> tuple[list[int], int]:
    """The ids that ask for an answer, at most `room`, and the number of exchanges of the history (message, answer) in them.

    is_chat: by the chat template; the oldest exchanges, then the system text, are left out to make it fit. Otherwise the
    messages and answers continue one text. Raises UserError for a character the tokenizer lacks, and for a message that
    does not fit.
    """
    if not is_chat:
        newline = "\n" if known_part(tokenizer, "\n")[0] else ""
        text = system + "".join(q + a + newline for q, a in history) + message
        start = tokenizer.bos or ([] if tokenizer.eot is None else [tokenizer.eot])
        return [*start, *tokenizer.encode(text)][-room:], len(history)
    history = list(history)
    while True:
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in (*history, (message, None)):
            messages.append({"role": "user", "content": question})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        messages = [{**m, "content": clean_content(tokenizer, m["content"])} for m in messages]
        ids, _ = encode_with_starts(tokenizer, render(tokenizer, messages, add_generation_prompt=True))
        if len(ids) <= room:
            return ids, len(history)
        if history:
            history.pop(0)
        elif system:
            system = ""
        else:
            raise UserError(
                f"the message takes {len(ids):,} tokens, and the context has room for {room:,} beside the answer: shorten it"
            )
