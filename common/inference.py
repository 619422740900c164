"""A model that writes: weights cast, packed or quantized, a CUDA-graph decoding step, streams of text, beams."""

import codecs
import itertools
import math
from collections.abc import Iterable, Iterator

from common.checkpoint import find_tokenizer, load_model
from common.cpu import (
    Int8Linear,
    PackedInt8Linear,
    PackedLinear,
    int8_products_are_available,
    packed_linear_is_available,
    tune_malloc,
)
from common.lora import merge_lora
from common.runtime import pick_device, pick_dtype
from common.tokenizer import Tokenizer
from configurator import UserError, check_choice
from model import GPT, KVCache

import torch
import torch.nn as nn

Rows = list[list[int]]  # token ids, a row per text

# -----------------------------------------------------------------------------
# A model ready to write


@torch.no_grad()
def for_inference(model: GPT, device: torch.device, dtype: torch.dtype, quantize: str = "") -> GPT:
    """Move the model to the device and cast its weights; pack its linear layers on a CPU, or quantize them to 8 bits.

    The model is changed in place and can no longer be trained or saved.
    """
    check_choice("quantize", quantize, ("", "int8"))
    merge_lora(model)
    model.requires_grad_(False).eval()
    if quantize:
        replace_linears(model, PackedInt8Linear if int8_products_are_available(device) else Int8Linear)
    model.to(device, dtype)
    if packed_linear_is_available(device, dtype):
        approximation = {"gelu": "tanh", "gelu_erf": "none"}.get(model.config.mlp)
        if approximation and not quantize:  # GELU in the kernel of the layer before it
            for block in model.transformer.h:
                block.mlp.c_fc, block.mlp.activation = PackedLinear(block.mlp.c_fc, approximation), nn.Identity()
        replace_linears(model, PackedLinear)
    return model


def replace_linears(model: nn.Module, new) -> None:
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, nn.Linear):
                setattr(module, name, new(layer))


def load_for_inference(name: str, device: str, dtype: str, quantize: str, data_dir: str) -> tuple[GPT, Tokenizer, dict]:
    """A model (see checkpoint.read_model) ready to write, its tokenizer, and its checkpoint without the weights."""
    device = pick_device(device)
    if device.type == "cpu":
        tune_malloc()
    model, checkpoint = load_model(name)
    tokenizer = find_tokenizer(checkpoint, data_dir)
    # Ids that only pad the vocabulary are never sampled.
    model.config.vocab_size = min(model.config.vocab_size, tokenizer.n_vocab)
    checkpoint["model"] = None  # frees memory
    return for_inference(model, device, pick_dtype(dtype, device, writing=True), quantize), tokenizer, checkpoint


# -----------------------------------------------------------------------------
# Decoding on a GPU


class StaticKVCache(KVCache):
    """A KV cache for steps of one token whose shapes never change: positions are tensors on the device.

    input_pos, integer (1,): where the token goes. mask, bool (1, S): the positions it attends to.
    """

    def __init__(self, cache: KVCache):
        self.__dict__.update(cache.__dict__)  # the same memory
        self.input_pos = torch.zeros(1, dtype=torch.long, device=cache.keys[0].device)

    def positions(self, T: int, device):
        return self.input_pos

    def update(self, layer: int, k, v):
        keys, values, S = self.keys[layer], self.values[layer], self.mask.size(-1)
        keys.index_copy_(2, self.input_pos, k.to(keys.dtype))
        values.index_copy_(2, self.input_pos, v.to(keys.dtype))
        return keys[:, :, :S], values[:, :, :S]


class DecodeStep:
    """GPT.generate's step as a CUDA graph: one launch per token, without waiting for it.

    Attention looks at the first S positions, S a multiple of 256, masked past the current one; each S has its own graph.
    """

    def __init__(self, model: GPT, cache: KVCache, sample, rng=None, compile=False):
        self.model, self.cache, self.sample, self.rng, self.compile = model, cache, sample, rng, compile
        self.static = StaticKVCache(cache)
        self.token = torch.zeros(cache.keys[0].size(0), dtype=torch.long, device=model.device)
        self.new, self.graphs = self.token.clone(), {}

    def __call__(self, token) -> torch.Tensor:
        """The ids (B,) after token (B,), which joins the cache."""
        kv_len, device = self.cache.kv_len, self.model.device
        self.token.copy_(token)
        self.static.input_pos.fill_(kv_len)
        S = self.cache.length if self.compile else min(self.cache.length, (kv_len // 256 + 1) * 256)
        if S not in self.graphs:
            self.graphs[S] = self.capture(S) if device.type == "cuda" else None
        if graph := self.graphs[S]:
            with torch.cuda.device(device):
                graph.replay()
        else:
            self.run(S)
        self.cache.kv_len += 1
        return self.new.to(token.dtype, copy=True)

    def run(self, S: int) -> None:
        model = self.model
        self.static.mask = (torch.arange(S, device=model.device) <= self.static.input_pos)[None]
        if self.compile and not hasattr(model, "compiled_forward"):
            model.compiled_forward = torch.compile(model.forward, dynamic=False)
        forward = model.compiled_forward if self.compile else model.forward
        self.new.copy_(self.sample(forward(self.token[:, None], cache=self.static)[0]))

    def capture(self, S: int) -> torch.cuda.CUDAGraph:
        device = self.model.device
        with torch.cuda.device(device):
            rng = self.rng or torch.cuda.default_generators[device.index or 0]
            state, stream, graph = rng.get_state(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocations and tuning of the first runs must not be captured
                for _ in range(3):
                    self.run(S)
            torch.cuda.current_stream().wait_stream(stream)
            if self.rng is not None:
                graph.register_generator_state(self.rng)
            try:
                with torch.cuda.graph(graph):
                    self.run(S)
            except RuntimeError as e:
                raise UserError(f"decoding cannot be captured as a CUDA graph ({e}): try --graph=False") from e
            rng.set_state(state)  # as before the warmup runs
        return graph


def one_ahead(iterator: Iterator) -> Iterator:
    """The same items, each returned when the next is under way: the device works while the caller reads."""
    last = next(iterator, None)
    for item in iterator:
        yield last
        last = item
    if last is not None:
        yield last


# -----------------------------------------------------------------------------
# Sampling: the one loop of training, sample.py, evaluate.py and the page


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; of an empty one the end-of-text token, which starts a document."""
    return [*tokenizer.bos, *tokenizer.encode(prompt, special=True)] or [tokenizer.eot or 0]


def stream_ids(
    model: GPT, tokenizer: Tokenizer, rows: Rows, max_new_tokens: int, graph=True, compile=False, **settings
) -> Iterator[torch.Tensor]:
    """Yields the next ids (B,) of prompts that may differ in length, until all rows met the end of the text.

    graph: on a GPU decode with CUDA graphs, compiled if compile is set. settings: of GPT.generate. Raises UserError for a
    setting out of range, at once.
    """
    longest, cuda = max(map(len, rows)), model.device.type == "cuda"
    idx = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=model.device)
    if graph and cuda and not settings.get("on_logits"):
        rng = settings.get("rng")
        settings["make_step"] = lambda *parts: DecodeStep(*parts, rng=rng, compile=compile)
    try:
        new = model.generate(idx, max_new_tokens, stop_tokens=tokenizer.stops, **settings)
    except ValueError as e:
        raise UserError(str(e)) from None
    return user_errors(one_ahead(new) if cuda else new)  # weights that are not finite are found while sampling


def user_errors(stream: Iterator) -> Iterator:
    try:
        yield from stream
    except ValueError as e:
        raise UserError(str(e)) from None


def until_eot(stream: Iterable[torch.Tensor], tokenizer: Tokenizer, on_end=lambda: None) -> Iterator[int]:
    """The ids of a single text's stream up to the end-of-text token, where on_end() is called."""
    for new in stream:
        if new.item() in tokenizer.stops:
            return on_end()
        yield new.item()


def complete(model: GPT, tokenizer: Tokenizer, rows: Rows, max_new_tokens: int, **settings) -> Rows:
    """The new ids of each prompt, up to the end-of-text token, at most max_new_tokens. See stream_ids."""
    new = torch.stack(list(stream_ids(model, tokenizer, rows, max_new_tokens, **settings)), dim=1).tolist()
    start = min(map(len, rows))
    completed = []
    for row, ids in zip(rows, new):
        ids = ids[len(row) - start :][:max_new_tokens]  # without the rest of the prompt
        ids = itertools.takewhile(lambda i: i not in tokenizer.stops, ids)
        completed.append([i for i in ids if i < tokenizer.n_vocab])
    return completed


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Decode a stream of ids; a character whose bytes are spread over several tokens comes when it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.token_bytes(i))
    yield decoder.decode(b"", final=True)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The pieces up to the text `stop`, without it. Text that may be its beginning is held back until the next piece."""
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


def top_tokens(logits, tokenizer: Tokenizer) -> dict[str, float]:
    """token_repr() -> probability at temperature 1 of the ten most likely tokens, from logits (V,)."""
    probs, ids = logits.float().softmax(-1).topk(min(10, len(logits)))
    return {token_repr(tokenizer, i): p for i, p in zip(ids.tolist(), probs.tolist())}


def token_repr(tokenizer: Tokenizer, i: int) -> str:
    """A token as a Python literal, so that spaces and newlines are visible; as bytes if it is not whole characters."""
    data = tokenizer.token_bytes(i)
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


# -----------------------------------------------------------------------------
# Beam search


@torch.no_grad()
def beam_search(
    model: GPT, ids: list[int], max_new_tokens: int, beams: int, stop_tokens=(), length_penalty=1.0
) -> list[tuple[float, list[int]]]:
    """The most likely continuations of ids found by a search with `beams` hypotheses: (score, new ids), best first.

    The score is log probability / length^length_penalty; it includes the stop token, the ids do not.
    Raises UserError for fewer than one beam, an empty prompt, or one longer than the context.
    """
    config, device = model.config, model.device
    if beams < 1 or not 0 < len(ids) <= config.block_size:
        raise UserError(f"--beams={beams}: at least 1, and a prompt of 1 to {config.block_size} tokens, not {len(ids)}")
    V, stops = config.vocab_size, torch.tensor(sorted(stop_tokens), device=device, dtype=torch.long)
    length = min(config.block_size, len(ids) + max_new_tokens)
    cache = KVCache(config, beams, length, device, model.kv_dtype())
    text = torch.tensor([ids] * beams, device=device)  # (beams, T)
    logits, scores = model.prefill(text, cache), torch.full((beams,), -math.inf, device=device)
    scores[0], done = 0.0, []  # all beams start as the same text: only one counts
    for n in range(1, max_new_tokens + 1):
        candidates = scores[:, None] + logits[:, -1].float().log_softmax(-1)  # (beams, V)
        if candidates.isnan().any():
            raise UserError("the model's probabilities are not finite numbers")
        score, index = candidates.flatten().topk(min(beams * (1 + len(stops)), candidates.numel()))
        row, new = index // V, index % V
        is_stop = torch.isin(new, stops)
        for j in (is_stop & score.isfinite())[:beams].nonzero()[:, 0].tolist():
            done.append((score[j].item() / n**length_penalty, text[row[j], len(ids) :].tolist()))
        alive = (~is_stop).nonzero()[:beams, 0]
        scores, row, new = score[alive], row[alive], new[alive]
        text = torch.cat((text[row], new[:, None]), dim=1)
        done = sorted(done, key=lambda d: -d[0])[:beams]
        if n == max_new_tokens or (len(done) == beams and done[-1][0] >= scores[0].item() / n**length_penalty):
            break
        if cache.kv_len == config.block_size:  # re-read the last half of the context, as GPT.generate
            logits = model.prefill(text[:, -(config.block_size // 2 or 1) :], cache)
        else:
            cache = cache.select_rows(row, length)
            logits, _ = model(new[:, None], cache=cache)
    unfinished = zip(scores.tolist(), text[:, len(ids) :].tolist())
    done += [(score / n**length_penalty, new) for score, new in unfinished if score > -math.inf]
    return sorted(done, key=lambda d: -d[0])[:beams]
