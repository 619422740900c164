"""A model that writes: its weights as decoding wants them, its ids as text while they come, the likeliest text, a conversation.

What for_inference makes samples and evaluates; it is not trained and not saved.
"""

import codecs
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.checkpoint import find_tokenizer, load_model
from common.runtime import pick_device, pick_dtype, tune_malloc
from common.tokenizer import Tokenizer
from model import GELU, GPT, KVCache

QUANTIZE = ("", "int8")


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN's kernels read them: one row goes through at the memory's speed.

    gelu: tanh or none, to apply this approximation of GELU as well, while the product is at hand.
    """

    def __init__(self, layer: nn.Linear, gelu: str = ""):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 1)
        self.bias, self.then = layer.bias, ("gelu", [], gelu) if gelu else ("none", [], "")

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, *self.then)


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights, a scale a row of the matrix; activations stay as they are. For decoding.

    Rounded to the nearest of 255 steps between a row's largest magnitudes, as LLM.int8()'s vector-wise weights
    (https://arxiv.org/abs/2208.07339). On a CPU in bfloat16 a few rows read half the bytes; elsewhere memory is saved,
    and time is not: the matrix is widened for its product.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = layer.weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(dtype))
        self.bias = layer.bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        # The kernel reads whole blocks of a row, beyond its end if it is not made of them.
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= 4 and x.size(-1) % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has packed layers for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def for_inference(model: nn.Module, device: torch.device, dtype: torch.dtype, quantize: str = "") -> nn.Module:
    """The model on the device, its weights in the dtype and its linear layers packed or, with quantize="int8", in 8 bits.

    It is changed in place and can no longer be trained or saved. Raises ValueError for another name.
    """
    if quantize not in QUANTIZE:
        raise ValueError(f"--quantize={quantize}: choose int8, or leave it out")
    model.merge_lora()
    model.requires_grad_(False).eval()
    if quantize:
        replace_linears(model, lambda layer: Int8Linear(layer, dtype))
    model.to(device, dtype)
    if packs(device, dtype):
        for mlp in [block.mlp for block in model.transformer.h]:
            if mlp.kind in GELU and not quantize:
                mlp.c_fc, mlp.activate = PackedLinear(mlp.c_fc, GELU[mlp.kind]), lambda x: x
        replace_linears(model, PackedLinear)
    return model


def replace_linears(model: nn.Module, new) -> None:
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear):
                setattr(module, name, new(layer))


def load_for_inference(
    init_from: str = "", device="auto", dtype="auto", quantize: str = "", data_dir: str = "data"
) -> tuple[GPT, Tokenizer, dict]:
    """A model ready to write (see checkpoint.load_model and for_inference), its tokenizer, its checkpoint.

    Ids that only pad the vocabulary are never written. Raises ValueError for what cannot be loaded.
    """
    on = pick_device(device)
    if on.type == "cpu":
        tune_malloc()
    model, payload = load_model(init_from)
    tokenizer = find_tokenizer(payload, data_dir)
    model.config.vocab_size = min(model.config.vocab_size, tokenizer.n_vocab)
    payload["model"] = None  # memory
    return for_inference(model, on, pick_dtype(dtype, on), quantize), tokenizer, payload


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Decode a stream of ids as it comes: a character whose bytes are spread over tokens appears when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.token_bytes(i))
    yield decoder.decode(b"", final=True)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The pieces up to the text `stop`, which is not part of them; what may be its beginning waits for what follows."""
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = max((n for n in range(1, min(len(stop), len(held) + 1)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def likeliest(logits, tokenizer: Tokenizer, n: int = 10) -> list[tuple[str, float]]:
    """The n likeliest next tokens and their probabilities at temperature 1, from logits (V,)."""
    p, ids = logits.float().softmax(-1).topk(min(n, len(logits)))
    return [(shown(tokenizer, i), v) for i, v in zip(ids.tolist(), p.tolist())]


def shown(tokenizer: Tokenizer, i: int) -> str:
    """A token as Python would write its text, so that spaces and line ends are seen; bytes where it is not whole characters."""
    written = tokenizer.token_bytes(i)
    try:
        return repr(written.decode())
    except UnicodeDecodeError:
        return repr(written)


@torch.no_grad()
def beam_search(
    model: GPT, ids: list[int], max_new_tokens: int, beams: int, stop_tokens=(), length_penalty=1.0
) -> list[tuple[float, list[int]]]:
    """The likeliest continuations of ids that a search of `beams` texts at once finds, best first: (score, ids) of each.

    A text scores its log probability / length^length_penalty, its stop token included, which is not part of the ids.
    Raises ValueError for fewer than one beam, an empty prompt, or one beyond the context.
    """
    config, on = model.config, model.device
    if beams < 1 or not 0 < len(ids) <= config.block_size:
        raise ValueError(
            f"--beams={beams}: at least 1, and a prompt of 1 to {config.block_size} tokens, not {len(ids)}"
        )
    V, stops = config.vocab_size, torch.tensor(sorted(stop_tokens), device=on, dtype=torch.long)
    length = min(config.block_size, len(ids) + max_new_tokens)
    cache = KVCache(config, beams, length, on, model._cache_dtype())
    text = torch.tensor([ids] * beams, device=on)
    logits, scores = model.prefill(text, cache), torch.full((beams,), -math.inf, device=on)
    scores[0], done = 0.0, []  # at first the beams are all the same text
    for n in range(1, max_new_tokens + 1):
        every = scores[:, None] + logits[:, -1].float().log_softmax(-1)
        if every.isnan().any():
            raise RuntimeError("the model's probabilities are not numbers")
        score, place = every.flatten().topk(min(beams * (1 + len(stops)), every.numel()))
        row, new = place // V, place % V
        ends = torch.isin(new, stops)
        for j in (ends & score.isfinite())[:beams].nonzero()[:, 0].tolist():
            done.append((score[j].item() / n**length_penalty, text[row[j], len(ids) :].tolist()))
        on_with = (~ends).nonzero()[:beams, 0]
        scores, row, new = score[on_with], row[on_with], new[on_with]
        text = torch.cat((text[row], new[:, None]), dim=1)
        done = sorted(done, key=lambda d: -d[0])[:beams]
        if n == max_new_tokens or (len(done) == beams and done[-1][0] >= scores[0].item() / n**length_penalty):
            break
        if cache.filled == config.block_size:  # as GPT.generate does
            logits = model.prefill(text[:, -(config.block_size // 2 or 1) :], cache)
        else:
            cache = cache.rows(row, length)
            logits, _ = model(new[:, None], cache=cache)
    going = [(s / n**length_penalty, t) for s, t in zip(scores.tolist(), text[:, len(ids) :].tolist()) if s > -math.inf]
    return sorted(done + going, key=lambda d: -d[0])[:beams]


END_OF_TURN = "\nUser:"  # where no end-of-text token came before it


def chat_prompt(
    tokenizer: Tokenizer, said: list[tuple[str, str]], question: str, room: int, turns: bool, system: str = ""
) -> tuple[list[int], int]:
    """The ids that ask for an answer, at most `room`, and how many of the last exchanges (question, answer) are in them.

    turns: as prepare_text.py's chat mix has them, each a document, "User: ...\nAssistant: ...". Otherwise one text that both
    write on. `system` stands before all. Raises ValueError for a character that the tokenizer does not know.
    """
    if not turns:
        line = line_end(tokenizer)
        text = system + "".join(q + a + line for q, a in said) + question
        return as_documents(tokenizer, [text])[-room:], len(said)
    first = [system] if system else []
    past = [f"User: {q}\nAssistant: {a}" for q, a in said]
    last = f"User: {question}\nAssistant:"
    while len(ids := as_documents(tokenizer, [*first, *past, last])) > room and past:
        past.pop(0)
    return ids[-room:], len(past)


def as_documents(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Their ids, the end-of-text token before each; without one, a line end between them."""
    if tokenizer.eot is None:
        return tokenizer.encode(line_end(tokenizer).join(texts))
    return [i for text in texts for i in (tokenizer.eot, *tokenizer.encode(text))]


def line_end(tokenizer: Tokenizer) -> str:
    """A line end, where the vocabulary has one."""
    try:
        tokenizer.encode("\n")
    except ValueError:
        return ""
    return "\n"
