"""Synthetic conversations: small talk by the grammar of small_talk.txt, and sums. They need no network.

For every pair of one-digit numbers one form of the question is never generated: evaluate.py --task=sums asks it.
"""

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from common.chat import Messages

QUESTIONS = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b} = ?", "How much is {a} + {b}?", "Please add {a} and {b}.",
    "Can you add {a} and {b}?", "What do you get if you add {a} and {b}?", "{a} plus {b} is what?", "Calculate {a} + {b}.",
    "I have {a} apples and get {b} more. How many do I have?",
)  # fmt: skip


def sum_question(rng: random.Random) -> tuple[str, str]:
    """A question and its answer: mostly about one-digit numbers, sometimes a difference, or numbers up to 99."""
    kind = rng.random()
    if kind < 0.7:
        a, b = rng.randrange(10), rng.randrange(10)
        forms = [form for form in QUESTIONS if form != held_out_form(a, b)]
        return rng.choice(forms).format(a=a, b=b), answer(a, b)
    if kind < 0.85:
        a, b = rng.randrange(10, 100), rng.randrange(100)
        return rng.choice(QUESTIONS).format(a=a, b=b), answer(a, b)
    a, b = sorted((rng.randrange(20), rng.randrange(20)), reverse=True)
    return rng.choice(("What is {a} - {b}?", "What is {a} minus {b}?")).format(a=a, b=b), f"{a} - {b} = {a - b}"


def answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def held_out_form(a: int, b: int) -> str:
    return QUESTIONS[(a * 10 + b) * 7 % len(QUESTIONS)] if a < 10 and b < 10 else ""


def held_out_sums() -> list[tuple[str, int]]:
    """The 100 questions about one-digit numbers that no synthetic conversation asks, and their results."""
    return [(held_out_form(a, b).format(a=a, b=b), a + b) for a in range(10) for b in range(10)]


@functools.cache
def read_grammar() -> tuple[dict[str, list[str]], list[list[tuple[list[str], list[str]]]]]:
    """The words by name, and the passages of small_talk.txt: each a list of exchanges (questions, answers)."""
    text = (Path(__file__).parent / "small_talk.txt").read_text(encoding="utf-8")
    words = {name: values.split(", ") for name, values in re.findall(r"^(\w+) = (.*)$", text, re.M)}
    passages = []
    for block in text.split("\n\n"):
        exchanges: list[tuple[list[str], list[str]]] = []
        for line in block.splitlines() if block.startswith("> ") else ():
            if line.startswith("> "):
                if not exchanges or exchanges[-1][1]:
                    exchanges.append(([], []))
                exchanges[-1][0].append(line[2:])
            else:
                exchanges[-1][1].append(line[2:])
        passages += [exchanges] if exchanges else []
    return words, passages


def conversation(rng: random.Random) -> Messages:
    """One to four exchanges: passages of the grammar and sums, in any order."""
    words, passages = read_grammar()
    drawn, messages = {name: rng.choice(values) for name, values in words.items()}, []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            pairs = [sum_question(rng)]
        else:
            passage = rng.choice(passages)
            passage = passage[: rng.randint(1, len(passage))]
            pairs = [tuple(rng.choice(variants).format(**drawn) for variants in exchange) for exchange in passage]
            if rng.random() < 0.2:  # as people type
                pairs = [(question.lower().rstrip(".?!"), reply) for question, reply in pairs]
        for question, reply in pairs:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return messages


def conversations(rng: random.Random) -> Iterator[Messages]:
    """Without end."""
    while True:
        yield conversation(rng)
