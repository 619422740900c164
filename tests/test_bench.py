"""bench.py: it runs, and says what it measured. How fast is for people to read, not for tests to hold."""

import json
import re

import pytest
from conftest import TEXT
from test_hellaswag import examples

import bench

TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2 --device=cpu".split()


def test_data_mode_holds_our_way_beside_the_bare_tokenizer(run, tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([TEXT[:2000]] * 20))
    for more in ([], ["--input=text.txt"]):
        printed = run("bench.py", "--mode=data", "--megabytes=1", "--repeat=1", *more)
        rates = re.findall(r"([\d,.]+)M tokens/s \(", printed)
        assert len(rates) == 4 and all(float(r.replace(",", "")) > 0 for r in rates), printed
        assert re.search(r"[\d.]+ x \d+ cores? of that", printed)


def test_training_and_decoding_print_and_keep_their_figures(run, tmp_path):
    keys = [*TINY, "--steps=2", "--repeat=1", "--tokens=5", "--decode_batch=3", "--dtype=float32"]
    printed = run("bench.py", *keys, "--output=one.json", "--profile=True")
    assert "128 x" not in printed and "2 x 32 tokens x 2, cpu, float32, attention: flash" in printed
    figures = json.loads((tmp_path / "one.json").read_text())
    assert figures["tokens_per_second"] * figures["ms_a_step"] / 1000 > 127.9
    assert {"ms_batch", "ms_forward", "ms_loss_head", "ms_backward", "ms_optimizer", "ms_logging"} < set(figures)
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    again = run("bench.py", *keys, "--compare=one.json")
    assert re.search(r"tokens_per_second .* -> .* x as good", again)
    decoded = run("bench.py", "--mode=decode", *keys, "--output=two.json")
    figures = json.loads((tmp_path / "two.json").read_text())
    assert set(figures) == {"decode_tokens_per_second_batch_1", "decode_tokens_per_second_batch_3"}
    assert "batch 3" in decoded and "roofline" in printed
    assert "cpu, int8," in run("bench.py", "--mode=decode", "--quantize=int8", *keys)


def test_hellaswag_mode_scores_the_same_way_twice(run, tmp_path):
    (tmp_path / "hs.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples(30)))
    keys = ["--mode=hellaswag", "--input=hs.jsonl", *TINY, "--block_size=128", "--dtype=float32", "--repeat=1"]
    printed = run("bench.py", *keys, "--output=hs.json")
    assert "30 examples, 3 of them one at a time" in printed and "the same choice in 3 of 3" in printed
    assert json.loads((tmp_path / "hs.json").read_text())["hellaswag_examples_per_second"] > 0


def test_batches_are_doubled_until_nothing_is_gained(run, tmp_path):
    printed = run("bench.py", *TINY, "--find_batch=True", "--steps=1", "--vocab_size=600", "--output=batches.json")
    figures = json.loads((tmp_path / "batches.json").read_text())
    best = max(figures, key=figures.get)
    assert f"the fastest: --batch_size={best.rpartition('_')[2]}" in printed
    assert [int(k.rpartition("_")[2]) for k in figures] == [2**n for n in range(len(figures))] and len(figures) > 2


def test_startup_times_whole_processes(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(bench, "seconds_of", lambda *c, times=3, **e: commands.append((c, e)) or [0.5] * times)
    figures = bench.bench_startup()
    assert len(figures) == 5 and set(figures.values()) == {0.5} and "1.00 x import torch" in capsys.readouterr().out
    assert sum("--compile=True" in c for c, _ in commands) == 2 and "TORCHINDUCTOR_CACHE_DIR" in commands[-1][1]
    monkeypatch.undo()
    assert len(bench.seconds_of("-c", "print(7)", times=2)) == 2
    with pytest.raises(RuntimeError, match="ZeroDivision"):
        bench.seconds_of("-c", "1/0", times=1)


def test_arguments_go_where_they_belong():
    mine, theirs = bench.split_arguments(
        ["config/baby_cpu.py", "--steps=3", "--n_layer=2", "--mode=train", "--real-data"]
    )
    assert mine == ["--steps=3", "--mode=train", "--real-data"] and theirs == ["config/baby_cpu.py", "--n_layer=2"]


def test_bad_input_is_told_in_one_line(refused, tmp_path):
    assert "--mode=speed: choose one of train, decode, hellaswag, data" in refused("bench.py", "--mode=speed", *TINY)
    assert "--input=gone.txt: there is no such file" in refused("bench.py", "--mode=data", "--input=gone.txt")
    assert "at least 1" in refused("bench.py", "--megabytes=0", *TINY)
    assert "unknown key n_layr (did you mean n_layer?)" in refused("bench.py", "--n_layr=2")
    assert "takes no key of train.py" in refused("bench.py", "--mode=data", "--n_layer=2")
    (tmp_path / "bad.json").write_text("{")
    assert "not a file that --output wrote" in refused("bench.py", "--compare=bad.json", *TINY)
    assert "--quantize=int4: choose int8" in refused(
        "bench.py", "--mode=decode", "--quantize=int4", "--tokens=5", *TINY
    )
    assert "more than the context of 32" in refused("bench.py", "--mode=decode", *TINY)
