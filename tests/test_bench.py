"""bench.py: every mode runs and prints what it measured. No test depends on how fast."""

import json
import re

from conftest import TEXT

import bench

import pytest
from test_hellaswag import examples

TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2 --device=cpu".split()


def test_data_mode_compares_with_the_bare_tokenizer(run, tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([TEXT[:2000]] * 20))
    for more in ([], ["--inputs=text.txt"], ["--input=text.txt"]):  # the last is the older spelling
        printed = run("bench.py", "--mode=data", "--megabytes=1", "--repeat=1", *more)
        rates = re.findall(r"([\d,.]+)M tokens/s \(", printed)
        assert len(rates) == 4 and all(float(r.replace(",", "")) > 0 for r in rates), printed
        assert re.search(r"[\d.]+ x \d+ cores? of that", printed)


def test_training_and_decoding_print_and_write_their_figures(run, tmp_path):
    keys = [*TINY, "--steps=2", "--repeat=1", "--tokens=5", "--decode_batch=3", "--dtype=float32"]
    printed = run("bench.py", *keys, "--output=one.json", "--profile=True")
    assert "128 x" not in printed and "2 x 32 tokens x 2, cpu, float32, attention: flash" in printed
    figures = json.loads((tmp_path / "one.json").read_text())
    assert figures["tokens_per_second"] * figures["ms_per_step"] / 1000 == pytest.approx(128)
    assert {"ms_batch", "ms_loss_head", "ms_optimizer", "ms_roofline"} < set(figures)
    for name in ("forward", "backward"):  # are differences
        assert figures.get(f"ms_{name}", 1) > 0 and (f"ms_{name}" in figures or "too noisy to split" in printed)
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    again = run("bench.py", *keys, "--compare=one.json")
    assert re.search(r"tokens_per_second .* -> .* x as good", again)
    assert all(0 <= spread < 10 for spread in figures["spreads"].values()) and "tokens_per_second" in figures["spreads"]
    decoded = run("bench.py", "--mode=decode", *keys, "--output=two.json")
    figures = json.loads((tmp_path / "two.json").read_text())
    assert set(figures) == {"decode_tokens_per_second_batch_1", "decode_tokens_per_second_batch_3", "spreads"}
    assert "batch 3" in decoded and "roofline" in printed
    assert "cpu, int8," in run("bench.py", "--mode=decode", "--quantize=int8", *keys)


def test_a_difference_that_noise_hides_is_not_told():
    assert bench.difference([3.0, 3.1, 2.9, 3.0, 3.2], [1.0, 1.1, 0.9, 1.0, 1.0]) == pytest.approx(2.0)
    assert bench.difference([1.0, 1.0, 1.0, 1.0, 1.0], [0.9, 1.1, 1.2, 0.8, 1.3]) is None


def test_comparing_ignores_what_is_below_the_noise(tmp_path, monkeypatch, capsys):
    def measured(*values):
        monkeypatch.setitem(bench.BENCHES, "train", lambda: {"tokens_per_second": bench.Measured(values)})
        bench.main()
        return capsys.readouterr().out

    monkeypatch.setattr(bench, "output", str(tmp_path / "a.json"))
    measured(95.0, 100.0, 105.0)
    monkeypatch.setattr(bench, "compare", str(tmp_path / "a.json"))
    monkeypatch.setattr(bench, "output", "")
    assert "0.93 x as good  within the noise" in measured(88.0, 93.0, 98.0)
    assert "0.80 x as good  slower" in measured(79.0, 80.0, 81.0)
    assert measured(149.0, 150.0, 151.0).strip().endswith("1.50 x as good")


def test_the_vocabulary_is_that_of_the_dataset_where_it_is_there(run, chars):
    keys = [*TINY, "--steps=1", "--repeat=1", "--dtype=float32"]
    printed = run("bench.py", *keys, "--dataset=chars")
    assert " 27,040 parameters" in " " + printed and "is not there" not in printed
    printed = run("bench.py", *keys, "--dataset=gone", "--vocab_size=40")
    assert " 27,040 parameters" in " " + printed
    assert "data/gone is not there: GPT-2's vocabulary" in run("bench.py", *keys, "--dataset=gone")


def test_hellaswag_mode_makes_the_same_choices_as_one_at_a_time(run, tmp_path):
    (tmp_path / "hs.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples(30)))
    keys = ["--mode=hellaswag", "--inputs=hs.jsonl", *TINY, "--block_size=128", "--dtype=float32", "--repeat=1"]
    printed = run("bench.py", *keys, "--output=hs.json")
    assert "30 examples, 3 of them one at a time" in printed and "the same choice in 3 of 3" in printed
    assert json.loads((tmp_path / "hs.json").read_text())["hellaswag_examples_per_second"] > 0


def test_find_batch_doubles_the_batch_until_it_is_not_faster(run, tmp_path):
    printed = run("bench.py", *TINY, "--find_batch=True", "--steps=1", "--vocab_size=600", "--output=batches.json")
    figures = json.loads((tmp_path / "batches.json").read_text())
    best = max((k for k in figures if k != "spreads"), key=figures.get)
    assert f"the fastest: --batch_size={best.rpartition('_')[2]}" in printed
    figures.pop("spreads")
    assert [int(k.rpartition("_")[2]) for k in figures] == [2**n for n in range(len(figures))] and len(figures) > 2


def test_startup_mode_times_whole_processes(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(bench, "process_seconds", lambda *c, times=3, **e: commands.append((c, e)) or [0.5] * times)
    figures = bench.bench_startup()
    assert len(figures) == 5 and set(figures.values()) == {0.5} and "1.00 x import torch" in capsys.readouterr().out
    assert sum("--compile=True" in c for c, _ in commands) == 2 and "TORCHINDUCTOR_CACHE_DIR" in commands[-1][1]
    monkeypatch.undo()
    assert len(bench.process_seconds("-c", "print(7)", times=2)) == 2
    with pytest.raises(RuntimeError, match="ZeroDivision"):
        bench.process_seconds("-c", "1/0", times=1)


def test_arguments_are_split_between_bench_and_train():
    mine, theirs = ["--steps=3", "--mode=train", "--real-data", "--input=a"], ["config/baby_cpu.py", "--n_layer=2"]
    assert bench.split_arguments([theirs[0], mine[0], theirs[1], *mine[1:]]) == (mine, theirs)


def test_bad_input_is_refused_in_one_line(refused, tmp_path):
    assert "--mode=speed: choose one of train, decode, hellaswag, data, startup" in refused(
        "bench.py", "--mode=speed", *TINY
    )
    assert "--inputs=gone.txt: no such file" in refused("bench.py", "--mode=data", "--inputs=gone.txt")
    assert "--megabytes=0: must be at least 1" in refused("bench.py", "--megabytes=0", *TINY)
    assert "unknown key n_layr (did you mean n_layer?)" in refused("bench.py", "--n_layr=2")
    assert "takes no key of train.py" in refused("bench.py", "--mode=data", "--n_layer=2")
    (tmp_path / "bad.json").write_text("{")
    assert "not a file that --output wrote" in refused("bench.py", "--compare=bad.json", *TINY)
    quantize = ["--mode=decode", "--quantize=int4", "--tokens=5", *TINY]
    assert "--quantize=int4: choose one of nothing, int8" in refused("bench.py", *quantize)
    assert "more than the context of 32" in refused("bench.py", "--mode=decode", *TINY)
