"""What users and other programs write, mutated at random: it is read, or refused in one line, never a traceback.

Bounded to about half a minute; the examples are the same in every run.
"""

import copy
import hashlib
import json
import math
import os
import struct
import sys
from pathlib import Path

from conftest import ROOT, TEXT

import build_fineweb_shards
import prepare_text
import sample
import train
from common.checkpoint import build_model, config_from
from common.files import read_metrics
from common.pretrained import DEFAULTS, arguments_from
from common.shards import load_dataset, open_shard
from common.tokenizer import CharTokenizer, read_tokenizer, tokenizer_from_dict, train_bpe
from common.windows import TrainingWindows
from configurator import UserError, configure, read_keys
from model import GPT, GPTConfig

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "research"))
from test_tokenizer import foreign_tokenizer

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # more, and others in every run
few = settings(
    max_examples=EXAMPLES or 30, deadline=None, derandomize=not EXAMPLES, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 300) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../x", "default", "llama3", "<s>", 2**63, 10**30, -1, 0, 1e300, "1", "\ud83d"])
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=6
)


def mutated(data, original):
    """A copy of nested JSON with one to three values replaced, removed or added."""
    changed = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            if data.draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = data.draw(values)
            break
    return changed


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@few
@given(st.data())
def test_arguments(data):
    namespace = {k: v for k, v in vars(train).items() if k != "__builtins__"}
    keys = [key for key in read_keys(train.__file__) if not key.startswith("#")]
    some = st.sampled_from(keys) | st.sampled_from(["", "x", "out-dir", "helpp", "=", "--"])
    text = scalars.map(str) | st.sampled_from(["True", "none", "1e-3", "0x10", "[1]", "{", "1_000", "'a'"])
    arguments = [f"--{data.draw(some)}" + ("=" + data.draw(text)) * data.draw(st.booleans()) for _ in range(3)]
    before = {key: namespace[key] for key in keys}
    try:
        config = configure(namespace, arguments)
    except UserError:
        return
    for key in keys:  # accepted: of the key's type
        annotation = train.__annotations__.get(key)
        allowed = getattr(annotation, "__args__", None) or (annotation or type(before[key]),)
        assert config[key] is None and before[key] is None or isinstance(config[key], allowed), (key, config[key])


@few
@given(st.data())
def test_token_files(tmp_path, data):
    np.save(tmp_path / "whole.npy", np.arange(100, dtype=np.uint16))
    header = struct.pack("<256i", 20240520, 1, 100, *[0] * 253)
    originals = {
        "a.npy": (tmp_path / "whole.npy").read_bytes(),
        "a.bin": header + bytes(200),
        "b.bin": bytes(range(200)),
    }
    name = data.draw(st.sampled_from(sorted(originals)))
    content = bytearray(originals[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 130)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    (tmp_path / name).write_bytes(bytes(content))
    try:
        shard = open_shard(tmp_path / name)
    except UserError:
        return
    assert shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize == len(content)
    assert len(shard.map()) == shard.tokens > 0 and np.dtype(shard.dtype).kind in "ui"


@few
@given(st.data())
def test_meta_json(tmp_path, data):
    folder = tmp_path / "d"
    folder.mkdir(exist_ok=True)
    tokenizer = data.draw(st.sampled_from([CharTokenizer("abc", True), train_bpe([TEXT], 260)]))
    shards = {}
    for split in ("train", "val"):
        np.save(folder / f"d_{split}_000000.npy", np.arange(90, dtype=np.uint16) % 4)
        digest = hashlib.sha256((folder / f"d_{split}_000000.npy").read_bytes()).hexdigest()
        shards[split] = [{"file": f"d_{split}_000000.npy", "tokens": 90, "sha256": digest}]
    meta = {
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.n_vocab,
        "shards": shards,
        "arguments": {"source": "x"},
    }
    write(folder / "meta.json", mutated(data, meta))
    try:
        dataset = load_dataset("d", tmp_path)
        assert all(shard.tokens == 90 for shard in dataset.train + dataset.val) and dataset.vocab_size > 0
        TrainingWindows(dataset.train, 8, dataset.vocab_size).batch(0, 4)
        tokenizer_from_dict(dataset.tokenizer).encode("abc")
    except UserError:
        pass


@few
@given(st.data())
def test_hugging_face_configs(data):
    kind = data.draw(st.sampled_from(sorted(DEFAULTS)))
    config = DEFAULTS[kind] | {"model_type": kind, "hidden_act": "silu", "rope_theta": 500.0}
    config |= data.draw(st.sampled_from([{}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}]))
    config |= {"sliding_window": None}
    if kind != "gpt2":
        config |= {"num_key_value_heads": 8, "head_dim": 128}
    try:
        arguments = arguments_from(mutated(data, config), "m")
        found = config_from(arguments)
    except (UserError, TypeError, AttributeError, ValueError) as e:  # read_pretrained makes one line of these
        assert str(e)
        return
    assert all(type(getattr(found, k)) is int for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    assert math.isfinite(found.rope_base) and 0 < found.rope_base and 0 <= found.norm_eps < 1


@pytest.fixture(scope="module")
def tokenizers():
    found = [json.loads(foreign_tokenizer(kind).to_str()) for kind in ("unigram", "wordpiece", "suffix", "wordlevel")]
    return found + [json.loads(t.to_json()) for t in (CharTokenizer("ab ", True), train_bpe([TEXT], 300, ["<|x|>"]))]


@few
@given(st.data())
def test_tokenizer_json(tmp_path, tokenizers, data):
    original = data.draw(st.sampled_from(tokenizers))
    rest = {key: value for key, value in original.items() if key != "model"}
    part = mutated(data, rest) if data.draw(st.booleans()) else rest | {"model": mutated(data, original["model"])}
    write(tmp_path / "tokenizer.json", {"model": original["model"]} | part)
    write(tmp_path / "tokenizer_config.json", data.draw(st.just({}) | st.fixed_dictionaries({"eos_token": values})))
    write(tmp_path / "generation_config.json", data.draw(st.just({}) | st.fixed_dictionaries({"eos_token_id": values})))
    try:
        tokenizer = read_tokenizer(tmp_path)
    except UserError:
        return
    assert all(0 <= i < tokenizer.n_vocab for i in tokenizer.stops)
    try:
        assert isinstance(tokenizer.decode(tokenizer.encode("a b")), str)
    except UserError:
        pass


@few
@given(st.data())
def test_json_lines(tmp_path, data):
    lines = [
        json.dumps(data.draw(values | st.fixed_dictionaries({"text": values, "prompt": values}))) for _ in range(3)
    ]
    raw = "\n".join(lines).encode()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw = (
            raw[:at] + data.draw(st.sampled_from([b"\xff", b"\n", b"{", b"[" * 3000, b"\x00", b'"', b"\r"])) + raw[at:]
        )
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    readers = (
        lambda: list(prepare_text.file_documents([path], "text")),
        lambda: [text for text, _ in build_fineweb_shards.read_files([path], None)],
        lambda: list(sample.read_prompts(path).values()),
    )
    for read in readers:
        try:
            found = read()
        except UserError as e:
            assert str(path) in str(e)
            continue
        assert all(isinstance(text, str) and text.encode() is not None for text in found)


@few
@given(st.binary(max_size=80), st.lists(values, max_size=3))
def test_metrics(tmp_path, raw, entries):
    lines = [json.dumps(e).encode() for e in entries] + [b'{"step": 3, "tokens": 9, "val_loss": 1.5}', raw]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = read_metrics(tmp_path)
    assert {"step": 3, "tokens": 9, "val_loss": 1.5} in found and all(type(e["step"]) is int for e in found)
    import plot

    for x in plot.X_LABELS:
        points = plot.read_curve({"path": str(tmp_path), "tokens": 9, "train_flops": 9}, "val_loss", x)
        assert all(isinstance(number, int | float) for point in points for number in point) and points


@few
@given(st.data())
def test_model_arguments_of_a_checkpoint(data):
    args = dict(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8, bias=True)
    weights = GPT(GPTConfig(**args)).state_dict()
    try:
        model = build_model({"model": dict(weights), "model_args": mutated(data, args)})
    except UserError:
        return
    assert model.config.n_embd == 8 and model.config.n_layer == 1
